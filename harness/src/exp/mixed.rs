//! `exp mixed`: front layers lossless, the others quantised or truncated, all compressed alike.
//!
//! The reference's quantiser has one scale per tensor and stores restored floats instead of codes; the transforms of `gearbox sweep`
//! do better on both counts.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use gearbox_core::{Registry, Result, Role};
use gearbox_plugins::quant::reference;
use serde::Serialize;
use serde_json::json;

use super::files::Outputs;
use super::lossy::{
    Coder, Columns, CommonArgs, Measured, Place, Row, Shared, Totals, bits, finish, for_each_tensor, report_of,
    write_rows,
};
use super::text::push;
use crate::status::Status;

/// Measures front layers that are lossless and other layers that are quantised or truncated.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Writes mixed_layer_metrics.csv, mixed_summary.md and, unless all layers are lossless, lossy_error_metrics.csv.
Ratios count zstd frames only. `actual_bytes` is the length of the stream that was written and decoded."
)]
pub struct MixedArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Folder for the results; created if needed
    #[arg(long, value_name = "DIR", default_value = "exp/n_lossless/out")]
    out_dir: PathBuf,
    /// What happens to the layers that are not lossless
    #[arg(long, value_enum, default_value_t = LossyMethod::Truncate)]
    lossy_method: LossyMethod,
    /// Mantissa bits that `truncate` keeps, at most those of the element type
    #[arg(long, value_name = "BITS", default_value_t = 6, value_parser = clap::value_parser!(u8).range(..=23))]
    lossy_mantissa_bits: u8,
    /// Bits of a value for `quant`, 2 to 24
    #[arg(long, value_name = "BITS", default_value = "8", value_parser = bits)]
    lossy_bits: u8,
}

/// What happens to the layers that are not lossless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum LossyMethod {
    /// Low bits of the mantissa become zero
    Truncate,
    /// Values are rounded to evenly spaced levels, with one scale per tensor
    Quant,
}

const LAYERS: [Columns; 5] =
    [Columns::Entry, Columns::Own(&["lossless"]), Columns::Ratios, Columns::Where, Columns::Bytes];
const ERRORS: [Columns; 4] = [Columns::Entry, Columns::Errors, Columns::Where, Columns::Decoded];
const FILES: [&str; 3] = ["mixed_layer_metrics.csv", "mixed_summary.md", "lossy_error_metrics.csv"];

impl MixedArgs {
    /// Runs the experiment and prints which files it wrote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for existing results or a dump without entries;
    /// [`ErrorKind::Mismatch`](gearbox_core::ErrorKind::Mismatch) if a stream does not decode to its input; else what reading and writing
    /// report.
    pub fn run(&self, registry: &Registry, json: bool) -> Result<Status> {
        let start = Instant::now();
        let common = &self.common;
        let (dump, status) = common.input.open()?;
        let places = CommonArgs::all(&dump);
        let has_lossy = places.iter().any(|place| !common.is_lossless(place));
        let (names, absent) = FILES.split_at(if has_lossy { 3 } else { 2 });
        let mut outputs = Outputs::create(&self.out_dir, names, absent, common.overwrite)?;

        let [lossless, lossy] = [false, true].map(|lossy| common.coder(registry, lossy));
        let coders = [lossless?, lossy?];
        let shared = Shared::default();
        let pairs = for_each_tensor(&places, "mixed", |place, role| self.measure(&coders, &shared, place, role))?;
        let rows: Vec<Row<'_>> = places.into_iter().zip(pairs).map(|(place, pair)| Row { place, pair }).collect();

        let is_lossless = |row: &Row<'_>| common.is_lossless(&row.place);
        outputs.write(0, |path, out| {
            write_rows(
                out,
                path,
                &LAYERS,
                &rows,
                |row| row,
                |row, cells| {
                    cells.push(if is_lossless(row) { "True" } else { "False" });
                },
            )
        })?;
        outputs.write_text(1, &self.markdown(&rows))?;
        let lossy: Vec<&Row<'_>> = rows.iter().filter(|row| !is_lossless(row)).collect();
        if has_lossy {
            outputs.write(2, |path, out| write_rows(out, path, &ERRORS, &lossy, |row| row, |_, _| {}))?;
        }
        let time = [start.elapsed(), coders[0].encode_time() + coders[1].encode_time()];
        finish(outputs, time, json, || {
            let [key, value] = Totals::of_rows(&rows);
            json!({
                "dumps": rows.len(),
                "lossy_dumps": lossy.len(),
                "lossy_method": self.lossy_method,
                "compress_mode": common.compress_mode,
                "key": key.to_json(),
                "value": value.to_json(),
                "error": report_of(lossy.iter().copied()),
            })
        })?;
        Ok(status)
    }

    fn measure(&self, coders: &[Coder; 2], shared: &Shared, place: &Place<'_>, role: Role) -> Result<Measured> {
        let lossy = !self.common.is_lossless(place);
        shared.with(&coders[usize::from(lossy)], place, role, |worker| {
            if !lossy {
                return worker.lossless();
            }
            let mut stored = Vec::new();
            match self.lossy_method {
                LossyMethod::Truncate => reference::truncate(worker.chunk, self.lossy_mantissa_bits, &mut stored),
                LossyMethod::Quant => reference::quantise(worker.chunk, self.lossy_bits, &mut stored)?,
            }
            worker.values(&stored)
        })
    }

    /// `mixed_summary.md`.
    fn markdown(&self, rows: &[Row<'_>]) -> String {
        let (method, bits) = match self.lossy_method {
            LossyMethod::Truncate => ("truncate", format!("mantissa bits: {}", self.lossy_mantissa_bits)),
            LossyMethod::Quant => ("quant", format!("quant bits: {}", self.lossy_bits)),
        };
        let (first, mode) = (self.common.lossless_first_n, self.common.compress_mode.name());
        let mut text = "# Mixed Compression Summary\n\n".to_owned();
        push(&mut text, format_args!("- Lossless first N layers: {first}\n- Lossy method: {method}\n- Lossy {bits}\n"));
        push(&mut text, format_args!("- Compress mode: {mode}\n- Dumps analyzed: {}\n\n", rows.len()));

        let [key, value] = Totals::of_rows(rows);
        let both = Totals::ratio_of_both(&[key, value]);
        let (k, v) = (key.ratio(), value.ratio());
        push(&mut text, format_args!("## Weighted Ratios (overall)\n- Weighted K ratio: {k:.3}\n"));
        push(&mut text, format_args!("- Weighted V ratio: {v:.3}\n- Weighted KV ratio: {both:.3}\n\n"));

        let of = |lossless: bool| {
            let rows = rows.iter().filter(move |row| self.common.is_lossless(&row.place) == lossless);
            [0, 1].map(|role: usize| Totals::of(rows.clone().map(|row| &row.pair[role])))
        };
        let [lossless, lossy] = [of(true), of(false)];
        for (name, [key, value]) in [("lossless", &lossless), ("lossy", &lossy)] {
            let (k, v) = (key.ratio(), value.ratio());
            push(&mut text, format_args!("## Weighted Ratios ({name} layers)\n- K: {k:.3}\n- V: {v:.3}\n\n"));
        }
        if lossy[0].tensors == 0 {
            return text;
        }
        text.push_str("## Lossy Error Metrics (weighted by elements)\n");
        for (letter, totals) in ["K", "V"].into_iter().zip(&lossy) {
            let error = totals.figures(totals.values);
            push(&mut text, format_args!("- {letter} MAE: {:.6}\n- {letter} RMSE: {:.6}\n", error.mae, error.rmse));
            push(&mut text, format_args!("- {letter} max_abs (avg): {:.6}\n", error.max_abs));
            push(&mut text, format_args!("- {letter} cosine: {:.6}\n", error.cosine));
        }
        text
    }
}
