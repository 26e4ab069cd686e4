//! `exp offline-lossless`: how small do byte split, block-wise predictors and zstd make the front layers, coded entry by entry, in chunks, or
//! all together?
//!
//! The reference computed sizes of streams that it never wrote. Here the plugin writes every stream that is counted, another instance
//! decodes it, and the bytes are compared before anything is reported. Its accounting is kept: F16 only (F32 is rounded), 8 bytes of header
//! and one per block for every stream, and what `--online-framing-bytes` says for every chunk. What a container really takes, with all
//! layers and element types, is what `gearbox sweep` reports.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use gearbox_core::{Error, Registry, Result};
use gearbox_plugins::adaptive_v22::{Choice, Config, Predictor};
use serde::Serialize;
use serde_json::json;

use self::measure::Coder;
use self::results::Results;
use self::units::Plan;
use crate::atomic::AtomicFile;
use crate::exp::InputArgs;
use crate::report;
use crate::status::Status;

mod measure;
mod rejected;
mod results;
#[cfg(test)]
mod tests;
mod units;

/// Measures byte split, block-wise predictors and zstd over the front layers.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Every stream is decoded again before it is counted. Exit status: 0, or 2 if entries were bad and left out; the field
`complete` says so in the results too. Fields behind `skip_reasons` are not in the reference's file."
)]
pub struct OfflineLosslessArgs {
    #[command(flatten)]
    input: InputArgs,
    /// File for the results as JSON; its folder is created if needed
    #[arg(long, value_name = "FILE")]
    out_json: PathBuf,
    /// File for a summary in Markdown
    #[arg(long, value_name = "FILE")]
    out_md: Option<PathBuf>,
    /// Replace existing results
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    layers: LayerArgs,
    /// Effort of zstd: negative is fastest, 22 smallest, 0 the library's default
    #[arg(long, value_name = "LEVEL", default_value_t = 3, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-7..=22))]
    zstd_level: i32,
    /// Leave out F32 entries instead of rounding them to F16
    #[arg(long)]
    strict_fp16: bool,
    #[command(flatten)]
    units: UnitArgs,
    #[command(flatten)]
    codec: CodecArgs,
}

/// Which layers are measured.
#[derive(Clone, Debug, Args)]
struct LayerArgs {
    /// How layers are chosen
    #[arg(long, value_enum, default_value_t = Scope::FrontN)]
    scope: Scope,
    /// Layers of `front_n`: those below this number
    #[arg(long, value_name = "LAYERS", default_value_t = 2, allow_negative_numbers = true)]
    front_n: i64,
    /// First layer of `layer_range`
    #[arg(long, value_name = "LAYER", default_value_t = 2, allow_negative_numbers = true)]
    layer_start: i64,
    /// Last layer of `layer_range`; negative is no end
    #[arg(long, value_name = "LAYER", default_value_t = -1, allow_negative_numbers = true)]
    layer_end: i64,
    /// Layers of `layer_ids`, separated by commas
    #[arg(long, value_name = "LAYERS", value_delimiter = ',', allow_hyphen_values = true)]
    layer_ids: Vec<i64>,
}

/// How layers are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
enum Scope {
    /// Those below `--front-n`
    FrontN,
    /// From `--layer-start` to `--layer-end`
    LayerRange,
    /// Those of `--layer-ids`
    LayerIds,
}

impl LayerArgs {
    fn check(&self) -> Result<()> {
        let wrong = match self.scope {
            Scope::FrontN if self.front_n <= 0 => {
                format!("--front-n: expected at least 1 with the scope `front_n`, got {}", self.front_n)
            }
            Scope::LayerIds if self.layer_ids.is_empty() => {
                "--layer-ids: expected at least one layer with the scope `layer_ids`, got none".to_owned()
            }
            _ => return Ok(()),
        };
        Err(Error::invalid_config(wrong))
    }

    /// Whether a layer is measured.
    fn hold(&self, layer: i64) -> bool {
        match self.scope {
            Scope::FrontN => (0..self.front_n).contains(&layer),
            Scope::LayerRange => layer >= self.layer_start && (self.layer_end < 0 || layer <= self.layer_end),
            Scope::LayerIds => self.layer_ids.contains(&layer),
        }
    }
}

/// What is coded at once.
#[derive(Clone, Copy, Debug, Args)]
struct UnitArgs {
    /// What is coded at once
    #[arg(long, value_enum, default_value_t = EntryMode::PerMeta)]
    entry_mode: EntryMode,
    /// Tokens of a chunk in the chunked modes; 0 makes one chunk of all
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    online_chunk_seq: usize,
    /// Bytes that the chunked modes add for each chunk of keys or values
    #[arg(long, value_name = "BYTES", default_value_t = 16)]
    online_framing_bytes: u64,
    /// Keep prompt and decoded tokens apart in the modes that join entries
    #[arg(long)]
    aggregate_by_stage: bool,
}

/// What is coded at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
enum EntryMode {
    /// Each entry
    PerMeta,
    /// All entries of a run and layer, joined
    Aggregate,
    /// Each entry, cut into chunks
    Chunked,
    /// All entries of a run and layer, joined and then cut into chunks
    ChunkedGrouped,
}

impl EntryMode {
    fn is_grouped(self) -> bool {
        matches!(self, Self::Aggregate | Self::ChunkedGrouped)
    }

    fn is_chunked(self) -> bool {
        matches!(self, Self::Chunked | Self::ChunkedGrouped)
    }
}

/// How it is coded.
#[derive(Clone, Debug, Args)]
struct CodecArgs {
    /// How streams are predicted
    #[arg(long, value_enum, default_value_t = CodecMode::AdaptiveV22)]
    codec_mode: CodecMode,
    /// Tokens of a block
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    adaptive_block_seq: u32,
    /// Order the bits of predicted bytes by their place in the byte
    #[arg(long)]
    bitshuffle: bool,
    /// Candidates for the high bytes of keys, separated by commas; an earlier one wins a tie
    #[arg(long, value_name = "NAMES", default_value = "raw,delta_seq,xor_seq,pair_delta,pair_delta_delta_seq")]
    k_hi_predictors: Predictors,
    /// Candidates for the low bytes of keys
    #[arg(long, value_name = "NAMES", default_value = "raw,delta_seq,xor_seq,pair_delta,pair_delta_delta_seq")]
    k_lo_predictors: Predictors,
    /// Candidates for the high bytes of values
    #[arg(long, value_name = "NAMES", default_value = "raw,delta_seq,xor_seq")]
    v_hi_predictors: Predictors,
    /// Candidates for the low bytes of values
    #[arg(long, value_name = "NAMES", default_value = "raw,delta_seq,xor_seq")]
    v_lo_predictors: Predictors,
}

/// How streams are predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum CodecMode {
    /// High bytes as a delta over all tokens, low bytes as they are
    Legacy,
    /// The best predictor for each block
    #[value(name = "adaptive_v22")]
    #[serde(rename = "adaptive_v22")]
    AdaptiveV22,
}

/// A list of candidates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Predictors(Vec<Predictor>);

impl std::str::FromStr for Predictors {
    type Err = String;

    /// Names separated by commas; empty ones are left out, and those that were named before.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut list = Vec::new();
        for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let legal = || Predictor::ALL.map(Predictor::name).join("`, `");
            let predictor = Predictor::of_name(name).ok_or_else(|| format!("`{name}` is none of `{}`", legal()))?;
            if !list.contains(&predictor) {
                list.push(predictor);
            }
        }
        if list.is_empty() { Err("expected at least one predictor, got none".to_owned()) } else { Ok(Self(list)) }
    }
}

impl CodecArgs {
    /// Settings of the plugin whose streams have the sizes of the reference, but for [`CodecArgs::uncounted_bytes`].
    fn config(&self, level: i32) -> Config {
        let Self { bitshuffle, .. } = *self;
        let common = Config { choice: Choice::Reference, level, bitshuffle, ..Config::default() };
        match self.codec_mode {
            CodecMode::AdaptiveV22 => Config {
                block_seq: self.adaptive_block_seq.min(Config::MAX_BLOCK),
                key_high: self.k_hi_predictors.0.clone(),
                key_low: self.k_lo_predictors.0.clone(),
                value_high: self.v_hi_predictors.0.clone(),
                value_low: self.v_lo_predictors.0.clone(),
                ..common
            },
            // One block over all tokens, whose predictor is not chosen.
            CodecMode::Legacy => Config {
                block_seq: Config::MAX_BLOCK,
                key_high: vec![Predictor::DeltaSeq],
                key_low: vec![Predictor::Raw],
                value_high: vec![Predictor::DeltaSeq],
                value_low: vec![Predictor::Raw],
                ..common
            },
        }
    }

    /// Bytes of both streams of a tensor that the reference does not count: in `legacy` header and mode.
    fn uncounted_bytes(&self) -> u64 {
        match self.codec_mode {
            CodecMode::Legacy => 2 * (8 + 1),
            CodecMode::AdaptiveV22 => 0,
        }
    }
}

impl OfflineLosslessArgs {
    /// Runs the experiment and prints which files it wrote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) for flags that name no layer;
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for existing results or if no entry is selected;
    /// [`ErrorKind::Mismatch`](gearbox_core::ErrorKind::Mismatch) if a stream does not decode to its input; else what reading and writing
    /// report.
    pub fn run(&self, registry: &Registry, json: bool) -> Result<Status> {
        let start = Instant::now();
        self.layers.check()?;
        let (dump, status) = self.input.open()?;
        let select = &self.input.select;
        let rejected = rejected::rejected(&dump, select, &self.layers);
        let plan = Plan::new(&dump, rejected, &self.layers, self.units, self.strict_fp16);
        if plan.selected == 0 {
            let path = self.input.dump_dir.display();
            return Err(Error::invalid_input(format!("`{path}`: no entry of the chosen layers is left")));
        }
        let outputs = self.create_outputs()?;

        let pieces = plan.pieces(self.units);
        let coder = Coder::new(registry, &self.codec, self.zstd_level)?;
        let measured = coder.measure_all(&pieces)?;
        let results = Results::new(self, &dump, &plan, &pieces, &measured);

        let mut paths = Vec::new();
        for (mut file, text) in outputs.into_iter().zip([results.json()?, results.markdown()]) {
            file.write_all(text.as_bytes()).map_err(|error| Error::io(file.path(), &error))?;
            paths.push(file.path().display().to_string());
            file.commit()?;
        }
        let zstd: f64 = measured.iter().flatten().map(|measured| measured.usage.zstd_time.as_secs_f64()).sum();
        let (wall, threads) = (start.elapsed().as_secs_f64(), rayon::current_num_threads());
        let share = zstd / threads as f64;
        eprintln!(
            "wall {wall:.3} s, {:.2} times the {share:.3} s that zstd took on each of {threads} threads",
            wall / share
        );
        if json {
            report::print_json(&json!({
                "files": paths, "result": results, "wall_s": wall, "zstd_s": zstd, "threads": threads,
            }))?;
        } else {
            paths.iter().try_for_each(|path| report::print(&format!("Wrote {path}")))?;
            if tracing::enabled!(tracing::Level::INFO) {
                report::print(&results.line())?;
            }
        }
        let failed = measured.iter().any(Option::is_none);
        Ok(if failed && !select.allow_bad { status.and(Status::BadInput) } else { status })
    }

    /// Starts the JSON file, and the Markdown file if there is to be one, before any work, so that an existing one is known at once.
    fn create_outputs(&self) -> Result<Vec<AtomicFile>> {
        let paths = [Some(&self.out_json), self.out_md.as_ref()];
        let create = |path: &PathBuf| {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, &error))?;
            }
            AtomicFile::create(path, self.overwrite)
        };
        paths.into_iter().flatten().map(create).collect()
    }
}
