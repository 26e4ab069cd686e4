//! `exp blocknorm`: blocks along the channels, each normalised by its largest magnitude.
//!
//! The reference stores normalised floats and a scale for every block, which costs more than codes would. Some blocks also keep an unrounded
//! scale: on F16 dumps that changes nothing, because their scales are F16 numbers, and our streams leave it out there.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use gearbox_core::{Error, Registry, Result, Role};
use gearbox_plugins::quant::reference::BlockNorm;
use serde_json::json;

use super::files::Outputs;
use super::lossy::{
    Coder, Columns, CommonArgs, Measured, Place, Row, Shared, Totals, bits, finish, for_each_tensor, report_of,
    write_rows,
};
use super::text::{Float, push};
use crate::status::Status;

/// Measures layers that are normalised in blocks along the channels.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Writes blocknorm_metrics.csv and blocknorm_summary.md. Lossless layers are left out.
Ratios count zstd frames, and scales and indices at their prices. `actual_bytes` is what was written and decoded.")]
pub struct BlocknormArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Folder for the results; created if needed
    #[arg(long, value_name = "DIR", default_value = "exp/n_lossless/out")]
    out_dir: PathBuf,
    /// Channels of a block
    #[arg(long, value_name = "CHANNELS", default_value = "64", value_parser = block_size)]
    block_size: usize,
    /// Share of the blocks, those with the most energy, that keep an unrounded scale: 0 to 1, at least one block
    #[arg(long, value_name = "SHARE", default_value = "0.8", value_parser = topk_ratio)]
    topk_ratio: f64,
    /// Bits of a value, 2 to 24
    #[arg(long, value_name = "BITS", default_value = "10", value_parser = bits)]
    bits: u8,
    #[command(flatten)]
    prices: PriceArgs,
}

/// What side information costs.
#[expect(clippy::struct_field_names, reason = "the flags are named after them")]
#[derive(Clone, Copy, Debug, Args)]
pub struct PriceArgs {
    /// Price of a scale; 2 rounds it to F16, any other number is a price only
    #[arg(long, value_name = "BYTES", default_value_t = 2)]
    scale_bytes: u16,
    /// Price of an unrounded scale; with 0 there are none, but their indices are still paid for
    #[arg(long, value_name = "BYTES", default_value_t = 4)]
    topk_extra_scale_bytes: u16,
    /// Price of the index of an unrounded scale
    #[arg(long, value_name = "BYTES", default_value_t = 4)]
    index_bytes: u16,
}

/// A number of channels.
pub(super) fn block_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size) if size > 0 => Ok(size),
        _ => Err(format!("expected a block of at least 1 channel, got `{text}`")),
    }
}

/// A share of blocks.
pub(super) fn topk_ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err(format!("expected a share of 0 to 1, got `{text}`")),
    }
}

impl PriceArgs {
    /// All settings of the blocks.
    pub(super) fn norm(self, block_size: usize, topk_ratio: f64, bits: u8) -> BlockNorm {
        BlockNorm {
            block_size,
            topk_ratio,
            bits,
            scale_bytes: self.scale_bytes.into(),
            topk_extra_scale_bytes: self.topk_extra_scale_bytes.into(),
            index_bytes: self.index_bytes.into(),
        }
    }
}

const COLUMNS: [Columns; 7] = [
    Columns::Entry,
    Columns::Own(&["block_size", "topk_ratio", "bits"]),
    Columns::Ratios,
    Columns::ShortErrors,
    Columns::Where,
    Columns::Bytes,
    Columns::Decoded,
];
/// The files of the experiment.
pub(super) const FILES: [&str; 2] = ["blocknorm_metrics.csv", "blocknorm_summary.md"];

impl BlocknormArgs {
    /// Runs the experiment and prints which files it wrote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for existing results or if no lossy entry is left;
    /// [`ErrorKind::Mismatch`](gearbox_core::ErrorKind::Mismatch) if a stream does not decode to its input; else what reading and writing
    /// report.
    pub fn run(&self, registry: &Registry, json: bool) -> Result<Status> {
        let start = Instant::now();
        let common = &self.common;
        let (dump, status) = common.input.open()?;
        let places = common.lossy(&dump)?;
        let mut outputs = Outputs::create(&self.out_dir, &FILES, &[], common.overwrite)?;

        let (coder, shared) = (common.coder(registry, true)?, Shared::default());
        let norm = self.prices.norm(self.block_size, self.topk_ratio, self.bits);
        let pairs = for_each_tensor(&places, "blocknorm", |place, role| {
            let measured = measure(&coder, &shared, place, role, &[norm])?;
            measured.into_iter().next().ok_or_else(|| Error::mismatch("expected one result, got none"))
        })?;
        let rows: Vec<Row<'_>> = places.into_iter().zip(pairs).map(|(place, pair)| Row { place, pair }).collect();

        outputs.write(0, |path, out| csv(out, path, &norm, &rows))?;
        outputs.write_text(1, &markdown(common, &norm, &rows))?;
        finish(outputs, [start.elapsed(), coder.encode_time()], json, || {
            let [key, value] = Totals::of_rows(&rows);
            json!({
                "dumps": rows.len(),
                "compress_mode": common.compress_mode,
                "key": key.to_json(),
                "value": value.to_json(),
                "error": report_of(&rows),
            })
        })?;
        Ok(status)
    }
}

/// Stores one tensor in blocks, once for all settings, which differ in shares of blocks and in prices only.
pub(super) fn measure(
    coder: &Coder,
    shared: &Shared,
    place: &Place<'_>,
    role: Role,
    norms: &[BlockNorm],
) -> Result<Vec<Measured>> {
    shared.with(coder, place, role, |worker| worker.blocks(norms))
}

/// `blocknorm_metrics.csv`.
pub(super) fn csv(out: &mut dyn Write, path: &Path, norm: &BlockNorm, rows: &[Row<'_>]) -> Result<()> {
    write_rows(
        out,
        path,
        &COLUMNS,
        rows,
        |row| row,
        |_, cells| {
            cells.push(norm.block_size);
            cells.push(Float(norm.topk_ratio));
            cells.push(norm.bits);
        },
    )
}

/// `blocknorm_summary.md`.
pub(super) fn markdown(common: &CommonArgs, norm: &BlockNorm, rows: &[Row<'_>]) -> String {
    let mut text = "# Block-Norm Summary\n\n".to_owned();
    push(&mut text, format_args!("- Lossless first N layers: {}\n", common.lossless_first_n));
    push(&mut text, format_args!("- Block size: {}\n- Top-k ratio: {}\n", norm.block_size, Float(norm.topk_ratio)));
    push(&mut text, format_args!("- Quant bits: {}\n- Scale bytes (all blocks): {}\n", norm.bits, norm.scale_bytes));
    push(&mut text, format_args!("- Extra scale bytes (top-k): {}\n", norm.topk_extra_scale_bytes));
    push(&mut text, format_args!("- Compress mode: {}\n\n", common.compress_mode.name()));

    let totals = Totals::of_rows(rows);
    let (k, v, both) = (totals[0].ratio(), totals[1].ratio(), Totals::ratio_of_both(&totals));
    push(&mut text, format_args!("- Weighted K ratio: {k:.3}\n- Weighted V ratio: {v:.3}\n"));
    push(&mut text, format_args!("- Weighted KV ratio: {both:.3}\n\n## Error (weighted by elements)\n"));
    for (letter, total) in ["K", "V"].into_iter().zip(&totals) {
        let error = total.figures(totals[0].values);
        push(&mut text, format_args!("- {letter} MAE: {:.6}\n- {letter} Cosine: {:.6}\n", error.mae, error.cosine));
    }
    text
}
