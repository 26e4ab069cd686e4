//! `exp blocknorm-sweep`: `exp blocknorm` over a grid of settings, ranked.
//!
//! Many settings of the grid do the same: blocks longer than a vector are the vector, and on F16 dumps the share of blocks that keep their
//! scale changes what is counted and nothing else. What is the same is computed once; every setting has its row.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use clap::Args;
use gearbox_core::{Error, Registry, Result};
use gearbox_plugins::quant::reference::BlockNorm;
use serde::Serialize;
use serde_json::json;

use super::blocknorm::{self, PriceArgs, block_size, topk_ratio};
use super::files::Outputs;
use super::lossy::{
    CommonArgs, Figures, Measured, Place, Row, Shared, Totals, bits, finish, for_each_tensor, list, report_of,
};
use super::text::{Float, push};
use crate::metrics::error::ErrorReport;
use crate::status::Status;

/// Measures a grid of block sizes, shares of kept scales and bits.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Writes blocknorm_sweep.csv and blocknorm_best.md; with --save-combo also a folder for each setting.
Settings that miss a limit keep their place in the ranking, which is by ratio alone. Lossless layers are left out."
)]
pub struct BlocknormSweepArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Folder for the results; created if needed
    #[arg(long, value_name = "DIR", default_value = "exp/n_lossless/out/blocknorm_sweep")]
    out_dir: PathBuf,
    /// Channels of a block, separated by commas
    #[arg(long, value_name = "CHANNELS,…", default_value = "64,128,256")]
    block_sizes: BlockSizes,
    /// Shares of the blocks that keep an unrounded scale, 0 to 1, separated by commas
    #[arg(long, value_name = "SHARE,…", default_value = "0.02,0.05,0.1")]
    topk_ratios: TopkRatios,
    /// Bits of a value, 2 to 24, separated by commas
    #[arg(long, value_name = "BITS,…", default_value = "8,10")]
    bits_list: BitsList,
    #[command(flatten)]
    prices: PriceArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// Settings in each list of `blocknorm_best.md`, at most
    #[arg(long, value_name = "COUNT", default_value_t = 10)]
    top_n: usize,
    /// Write the files of `exp blocknorm` for every setting
    #[arg(long)]
    save_combo: bool,
}

/// What a setting must reach on all dumps together.
#[derive(Clone, Copy, Debug, Args)]
struct LimitArgs {
    /// Least cosine of keys
    #[arg(long, value_name = "COSINE", default_value_t = 0.9999)]
    min_k_cosine: f64,
    /// Least cosine of values
    #[arg(long, value_name = "COSINE", default_value_t = 0.9999)]
    min_v_cosine: f64,
    /// Greatest mean absolute error of keys
    #[arg(long, value_name = "ERROR", default_value_t = 0.01)]
    max_k_mae: f64,
    /// Greatest mean absolute error of values
    #[arg(long, value_name = "ERROR", default_value_t = 0.002)]
    max_v_mae: f64,
}

macro_rules! lists {
    ($($(#[$doc:meta])* $name:ident($item:ty) = $parse:path;)*) => {
        $($(#[$doc])*
        #[derive(Clone, Debug, PartialEq)]
        struct $name(Vec<$item>);

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                list(text, $parse).map(Self)
            }
        })*
    };
}

lists! {
    /// Block sizes, in the order of the grid.
    BlockSizes(usize) = block_size;
    /// Shares of blocks, in the order of the grid.
    TopkRatios(f64) = topk_ratio;
    /// Numbers of bits, in the order of the grid.
    BitsList(u8) = bits;
}

impl LimitArgs {
    /// Whether errors are within the limits; NaN is not.
    fn hold(&self, [key, value]: &[Figures; 2]) -> bool {
        key.cosine >= self.min_k_cosine
            && value.cosine >= self.min_v_cosine
            && key.mae <= self.max_k_mae
            && value.mae <= self.max_v_mae
    }
}

/// One setting of the grid.
#[derive(Clone, Copy, Debug)]
struct Combo {
    norm: BlockNorm,
    /// Which settings do the same to every tensor of the dump, ratios and prices aside.
    group: usize,
    /// Its place in that group.
    member: usize,
}

/// What a setting does.
#[derive(Debug, Serialize)]
struct Ranked {
    combo: String,
    block_size: usize,
    topk_ratio: f64,
    bits: u8,
    weighted_k_ratio: f64,
    weighted_v_ratio: f64,
    weighted_kv_ratio: f64,
    key: Figures,
    value: Figures,
    passes_precision: bool,
    out_dir: String,
    actual_bytes: [u64; 2],
    bits_per_value: [f64; 2],
    k_logit_error: Option<f64>,
    error: ErrorReport,
}

fn name(norm: &BlockNorm) -> String {
    format!("bs{}_topk{}_b{}", norm.block_size, Float(norm.topk_ratio), norm.bits)
}

impl BlocknormSweepArgs {
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
        let grid = self.grid();
        let mut outputs = self.create_outputs(&grid)?;

        let (groups, combos) = group(&grid, &places);
        let (coder, shared) = (common.coder(registry, true)?, Shared::default());
        let pairs = for_each_tensor(&places, "blocknorm-sweep", |place, role| {
            groups
                .iter()
                .map(|norms| blocknorm::measure(&coder, &shared, place, role, norms))
                .collect::<Result<Vec<_>>>()
        })?;
        // Errors of settings that share all their restored tensors are added up once.
        let mut ranked = Vec::with_capacity(grid.len());
        for (idx, combo) in combos.iter().enumerate() {
            let rows = rows(&places, &pairs, combo)?;
            if self.save_combo {
                outputs.write(2 + 2 * idx, |path, out| blocknorm::csv(out, path, &combo.norm, &rows))?;
                outputs.write_text(3 + 2 * idx, &blocknorm::markdown(common, &combo.norm, &rows))?;
            }
            ranked.push(self.rank(&combo.norm, &rows));
        }
        // Stable: settings of one ratio stay in the order of the grid.
        ranked.sort_by(|a, b| b.weighted_kv_ratio.total_cmp(&a.weighted_kv_ratio));

        outputs.write_text(0, &csv(&ranked, places.len()))?;
        outputs.write_text(1, &self.markdown(&ranked))?;
        finish(outputs, [start.elapsed(), coder.encode_time()], json, || {
            json!({
                "dumps": places.len(),
                "computed": groups.len(),
                "compress_mode": common.compress_mode,
                "passing": ranked.iter().filter(|ranked| ranked.passes_precision).count(),
                "combos": ranked,
            })
        })?;
        Ok(status)
    }

    /// Block sizes outermost, bits innermost.
    fn grid(&self) -> Vec<BlockNorm> {
        let mut grid = Vec::new();
        for &block_size in &self.block_sizes.0 {
            for &topk_ratio in &self.topk_ratios.0 {
                grid.extend(self.bits_list.0.iter().map(|bits| self.prices.norm(block_size, topk_ratio, *bits)));
            }
        }
        grid
    }

    fn create_outputs(&self, grid: &[BlockNorm]) -> Result<Outputs> {
        let overwrite = self.common.overwrite;
        let names: Vec<String> = if self.save_combo { grid.iter().map(name).collect() } else { Vec::new() };
        if let Some(twice) = (1..names.len()).find(|idx| names[..*idx].contains(&names[*idx])) {
            let name = &names[twice];
            return Err(Error::invalid_config(format!(
                "`{name}` is in the grid twice: --save-combo needs one folder each"
            )));
        }
        let mut outputs =
            Outputs::create(&self.out_dir, &["blocknorm_sweep.csv", "blocknorm_best.md"], &[], overwrite)?;
        for name in &names {
            outputs.add(&self.out_dir.join(name), &blocknorm::FILES, &[], overwrite)?;
        }
        for folder in old_combos(&self.out_dir)? {
            if folder.file_name().is_none_or(|name| !names.iter().any(|new| name == new.as_str())) {
                for file in blocknorm::FILES {
                    outputs.expect_absent(folder.join(file), overwrite)?;
                }
            }
        }
        Ok(outputs)
    }

    fn rank(&self, norm: &BlockNorm, rows: &[Row<'_>]) -> Ranked {
        let totals = Totals::of_rows(rows);
        let [key, value] = [0, 1].map(|role: usize| totals[role].figures(totals[0].values));
        let name = name(norm);
        let out_dir = if self.save_combo { self.out_dir.join(&name).display().to_string() } else { String::new() };
        Ranked {
            combo: name,
            block_size: norm.block_size,
            topk_ratio: norm.topk_ratio,
            bits: norm.bits,
            weighted_k_ratio: totals[0].ratio(),
            weighted_v_ratio: totals[1].ratio(),
            weighted_kv_ratio: Totals::ratio_of_both(&totals),
            key,
            value,
            passes_precision: self.limits.hold(&[key, value]),
            out_dir,
            actual_bytes: [totals[0].actual, totals[1].actual],
            bits_per_value: [totals[0].bits_per_value(), totals[1].bits_per_value()],
            k_logit_error: totals[0].logit_error(),
            error: report_of(rows),
        }
    }

    /// `blocknorm_best.md`.
    fn markdown(&self, ranked: &[Ranked]) -> String {
        let passing = || ranked.iter().filter(|ranked| ranked.passes_precision);
        let LimitArgs { min_k_cosine, min_v_cosine, max_k_mae, max_v_mae } = self.limits;
        let mut text = "# Block-Norm Sweep Summary\n\n".to_owned();
        push(&mut text, format_args!("- Total combos: {}\n- Passing precision: {}\n", ranked.len(), passing().count()));
        push(&mut text, format_args!("- Precision thresholds: K cosine>={}, ", Float(min_k_cosine)));
        push(&mut text, format_args!("V cosine>={}, K MAE<={}, ", Float(min_v_cosine), Float(max_k_mae)));
        push(&mut text, format_args!("V MAE<={}\n\n## Top Overall (by KV ratio)\n", Float(max_v_mae)));
        ranked.iter().take(self.top_n).for_each(|ranked| ranked.line(&mut text));
        text.push_str("\n## Top Passing Precision\n");
        passing().take(self.top_n).for_each(|ranked| ranked.line(&mut text));
        text
    }
}

impl Ranked {
    fn line(&self, text: &mut String) {
        let (kv, k, v) = (self.weighted_kv_ratio, self.weighted_k_ratio, self.weighted_v_ratio);
        push(text, format_args!("- {}: KV {kv:.3}, K {k:.3}, V {v:.3}, ", self.combo));
        let Self { key, value, .. } = self;
        push(text, format_args!("K MAE {:.6}, V MAE {:.6}, ", key.mae, value.mae));
        push(text, format_args!("K cos {:.6}, V cos {:.6}\n", key.cosine, value.cosine));
    }
}

/// `blocknorm_sweep.csv`, whose lines end in LF alone; the reference's columns, then ours.
fn csv(ranked: &[Ranked], rows: usize) -> String {
    let mut text = "combo,block_size,topk_ratio,bits,weighted_k_ratio,weighted_v_ratio,weighted_kv_ratio,k_mae,v_mae,\
                    k_cosine,v_cosine,rows,passes_precision,out_dir"
        .to_owned();
    for letter in ["k", "v"] {
        push(&mut text, format_args!(",{letter}_actual_bytes,{letter}_bits_per_value,{letter}_nmse"));
        push(&mut text, format_args!(",{letter}_worst_head_cosine,{letter}_worst_head,{letter}_worst_head_layer"));
    }
    text.push_str(",k_logit_error\n");
    for row in ranked {
        push(&mut text, format_args!("{},{},{},{},", row.combo, row.block_size, Float(row.topk_ratio), row.bits));
        let ratios = [row.weighted_k_ratio, row.weighted_v_ratio, row.weighted_kv_ratio];
        let errors = [row.key.mae, row.value.mae, row.key.cosine, row.value.cosine];
        for figure in ratios.into_iter().chain(errors) {
            push(&mut text, format_args!("{},", Float(figure)));
        }
        let passes = if row.passes_precision { "True" } else { "False" };
        push(&mut text, format_args!("{rows},{passes},{}", quoted(&row.out_dir)));
        let streams = row.actual_bytes.iter().zip(row.bits_per_value);
        for ((bytes, bits_per_value), role) in streams.zip(&row.error.roles) {
            push(&mut text, format_args!(",{bytes},{},{}", Float(bits_per_value), Float(role.error.nmse)));
            match &role.worst_cosine {
                Some(head) => {
                    push(&mut text, format_args!(",{},{},{}", Float(head.error.cosine), head.head, head.layer));
                }
                None => text.push_str(",,,"),
            }
        }
        match row.k_logit_error {
            Some(error) => push(&mut text, format_args!(",{}\n", Float(error))),
            None => text.push_str(",\n"),
        }
    }
    text
}

/// A path as a CSV cell.
fn quoted(path: &str) -> String {
    if path.contains([',', '"', '\n', '\r']) { format!("\"{}\"", path.replace('"', "\"\"")) } else { path.to_owned() }
}

/// Settings that share their normalised tensors, and for each setting of the grid where it is among them.
///
/// The sizes of blocks that are at least as long as every vector are one size, unless blocks keep their scale: their order by energy depends
/// on how far they are padded.
fn group(grid: &[BlockNorm], places: &[Place<'_>]) -> (Vec<Vec<BlockNorm>>, Vec<Combo>) {
    let tensors = || places.iter().flat_map(|place| [&place.entry.key, &place.entry.value]);
    let longest = tensors().map(|tensor| tensor.shape.dim).max().unwrap_or(1).max(1);
    let mut groups: Vec<Vec<BlockNorm>> = Vec::new();
    let mut combos = Vec::with_capacity(grid.len());
    for norm in grid {
        let padding_matters = tensors().any(|tensor| norm.keeps_scales(tensor.dtype));
        let block_size = if padding_matters { norm.block_size } else { norm.block_size.min(longest) };
        let effective = BlockNorm { block_size, ..*norm };
        let same = |other: &Vec<BlockNorm>| {
            other.first().is_some_and(|other| (other.block_size, other.bits) == (block_size, norm.bits))
        };
        let group = groups.iter().position(same).unwrap_or_else(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        let member = groups[group].iter().position(|other| *other == effective).unwrap_or_else(|| {
            groups[group].push(effective);
            groups[group].len() - 1
        });
        combos.push(Combo { norm: *norm, group, member });
    }
    (groups, combos)
}

/// The rows of one setting; `pairs` holds what was measured by entry, role, group and member.
fn rows<'a>(places: &[Place<'a>], pairs: &[[Vec<Vec<Measured>>; 2]], combo: &Combo) -> Result<Vec<Row<'a>>> {
    let of = |measured: &Vec<Vec<Measured>>| {
        let found = measured.get(combo.group).and_then(|group| group.get(combo.member));
        found.cloned().ok_or_else(|| Error::mismatch("expected a result for every setting, got fewer"))
    };
    let row = |(place, [key, value]): (&Place<'a>, &[Vec<Vec<Measured>>; 2])| {
        Ok(Row { place: *place, pair: [of(key)?, of(value)?] })
    };
    places.iter().zip(pairs).map(row).collect()
}

/// Folders of settings that an earlier run left.
fn old_combos(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(folder, &error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::io(folder, &error))?;
        let name = entry.file_name();
        let is_combo = name.to_str().is_some_and(|name| {
            name.strip_prefix("bs").is_some_and(|rest| rest.contains("_topk") && rest.contains("_b"))
        });
        if is_combo && entry.path().is_dir() {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}
