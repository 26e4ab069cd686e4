//! The files: the reference's fields in its order, and ours behind them.

use std::collections::{BTreeMap, BTreeSet};

use gearbox_core::{Result, Role};
use gearbox_plugins::adaptive_v22::{self, Predictor};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::measure::Measured;
use super::units::{Piece, Plan, Skips};
use super::{CodecMode, EntryMode, OfflineLosslessArgs, Scope, rejected};
use crate::dump::Dump;
use crate::exp::text::{ascii_json, push};

/// Sums over keys or values.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    raw: u64,
    compressed: u64,
    framing: u64,
    /// Blocks of each predictor in high and in low streams.
    blocks: [[u64; Predictor::ALL.len()]; 2],
}

impl Sums {
    fn add(&mut self, piece: &Piece<'_>, measured: &Measured) {
        self.raw += measured.raw;
        self.compressed += measured.compressed;
        self.framing += piece.framing;
        let [high, low] = &mut self.blocks;
        for (predictor, (high, low)) in Predictor::ALL.into_iter().zip(high.iter_mut().zip(low)) {
            *high += measured.usage.high(predictor);
            *low += measured.usage.low(predictor);
        }
    }

    /// How often each candidate was chosen.
    fn counts(&self, is_low: bool, candidates: &[Predictor]) -> Counts {
        let count = |candidate: &Predictor| {
            let of_all = Predictor::ALL.iter().zip(self.blocks[usize::from(is_low)]);
            of_all.filter(|(predictor, _)| *predictor == candidate).map(|(_, count)| count).sum()
        };
        Counts(candidates.iter().map(|candidate| (candidate.name().to_owned(), count(candidate))).collect())
    }
}

/// Raw ÷ compressed; zero if nothing was compressed.
fn ratio(raw: u64, compressed: u64) -> f64 {
    if compressed == 0 { 0.0 } else { raw as f64 / compressed as f64 }
}

/// Numbers by name, in an order of their own.
#[derive(Clone, Debug)]
struct Counts(Vec<(String, u64)>);

impl Serialize for Counts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, count) in &self.0 {
            map.serialize_entry(name, count)?;
        }
        map.end()
    }
}

/// As the reference's language prints a mapping.
impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let items: Vec<_> = self.0.iter().map(|(name, count)| format!("'{name}': {count}")).collect();
        write!(f, "{{{}}}", items.join(", "))
    }
}

/// Bytes of one layer.
#[derive(Clone, Debug, Serialize)]
struct Layer {
    #[serde(rename = "layer_id")]
    id: i64,
    k_raw_bytes: u64,
    k_compressed_bytes: u64,
    v_raw_bytes: u64,
    v_compressed_bytes: u64,
    k_lossless_ratio: f64,
    v_lossless_ratio: f64,
}

/// The result file.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Results<'a> {
    schema_version: u32,
    dump_dir: String,
    stage: &'a str,
    scope: Scope,
    front_n: i64,
    layer_start: i64,
    layer_end: i64,
    layer_ids: Vec<i64>,
    selected_layers: Vec<i64>,
    selected_entries: usize,
    selected_dumps: usize,
    entry_mode: EntryMode,
    online_chunk_seq: usize,
    online_framing_bytes: u64,
    aggregate_by_stage: bool,
    aggregate_groups: usize,
    online_chunks: usize,
    codec: &'static str,
    codec_mode: CodecMode,
    bitshuffle: bool,
    adaptive_block_seq: u32,
    k_hi_predictors: &'a [Predictor],
    k_lo_predictors: &'a [Predictor],
    v_hi_predictors: &'a [Predictor],
    v_lo_predictors: &'a [Predictor],
    zstd_level: i32,
    k_raw_bytes: u64,
    k_compressed_bytes: u64,
    v_raw_bytes: u64,
    v_compressed_bytes: u64,
    k_chunk_meta_bytes: u64,
    v_chunk_meta_bytes: u64,
    raw_bytes: u64,
    compressed_bytes: u64,
    k_lossless_ratio: f64,
    v_lossless_ratio: f64,
    lossless_ratio: f64,
    weighted_lossless_ratio: f64,
    k_hi_mode_counts: Counts,
    k_lo_mode_counts: Counts,
    v_hi_mode_counts: Counts,
    v_lo_mode_counts: Counts,
    scanned_entries: usize,
    converted_fp32_entries: usize,
    skipped_entries: u64,
    skip_reasons: Counts,
    // From here on they are ours.
    /// Whether nothing was left out.
    complete: bool,
    /// Tensors that were encoded, decoded and compared.
    decoded_tensors: usize,
    /// Bytes of the streams that were decoded; what the reference charges beside them is not in it.
    decoded_bytes: u64,
    /// Finite values that rounding to F16 made infinite.
    new_infinities: u64,
    zstd_version: &'static str,
    layers: Vec<Layer>,
}

impl<'a> Results<'a> {
    /// Adds up what was measured, `None` where a piece failed: then its whole group does not count.
    pub fn new(
        args: &'a OfflineLosslessArgs,
        dump: &Dump,
        plan: &Plan<'_>,
        pieces: &[Piece<'_>],
        measured: &[Option<Measured>],
    ) -> Self {
        let mut failed: Vec<bool> = plan.groups.iter().map(|group| group.is_broken).collect();
        for (piece, _) in pieces.iter().zip(measured).filter(|(_, measured)| measured.is_none()) {
            failed[piece.group] = true;
        }
        let mut skips = Skips(plan.skips.0.clone());
        failed.iter().filter(|failed| **failed).for_each(|_| skips.add(rejected::COMPRESSION_FAILED));

        let mut layers: BTreeMap<i64, [Sums; 2]> = BTreeMap::new();
        let mut sums = [Sums::default(); 2];
        let (mut decoded_tensors, mut decoded_bytes, mut new_infinities) = (0, 0, 0);
        for (piece, measured) in pieces.iter().zip(measured) {
            let Some(measured) = measured.as_ref().filter(|_| !failed[piece.group]) else { continue };
            let role = usize::from(piece.role == Role::Value);
            sums[role].add(piece, measured);
            layers.entry(plan.groups[piece.group].layer).or_default()[role].add(piece, measured);
            decoded_tensors += 1;
            decoded_bytes += measured.encoded;
            new_infinities += measured.new_infinities;
        }
        let [key, value] = sums;
        let (raw, compressed) = (key.raw + value.raw, key.compressed + value.compressed);
        let config = args.codec.config(args.zstd_level);
        let layer_ids: BTreeSet<i64> = args.layers.layer_ids.iter().copied().collect();
        let path = dump.path.canonicalize().unwrap_or_else(|_| dump.path.clone());
        Self {
            schema_version: 3,
            dump_dir: path.display().to_string(),
            stage: &args.input.select.stage,
            scope: args.layers.scope,
            front_n: args.layers.front_n,
            layer_start: args.layers.layer_start,
            layer_end: args.layers.layer_end,
            layer_ids: layer_ids.into_iter().collect(),
            selected_layers: plan.layers.iter().copied().collect(),
            selected_entries: plan.selected,
            selected_dumps: plan.runs.len(),
            entry_mode: args.units.entry_mode,
            online_chunk_seq: args.units.online_chunk_seq,
            online_framing_bytes: args.units.online_framing_bytes,
            aggregate_by_stage: args.units.aggregate_by_stage,
            aggregate_groups: if args.units.entry_mode.is_grouped() { plan.groups.len() } else { 0 },
            online_chunks: if args.units.entry_mode.is_chunked() { decoded_tensors } else { 0 },
            codec: "fp16_gear_predictive_zstd",
            codec_mode: args.codec.codec_mode,
            bitshuffle: args.codec.bitshuffle,
            adaptive_block_seq: args.codec.adaptive_block_seq,
            k_hi_predictors: &args.codec.k_hi_predictors.0,
            k_lo_predictors: &args.codec.k_lo_predictors.0,
            v_hi_predictors: &args.codec.v_hi_predictors.0,
            v_lo_predictors: &args.codec.v_lo_predictors.0,
            zstd_level: args.zstd_level,
            k_raw_bytes: key.raw,
            k_compressed_bytes: key.compressed,
            v_raw_bytes: value.raw,
            v_compressed_bytes: value.compressed,
            k_chunk_meta_bytes: key.framing,
            v_chunk_meta_bytes: value.framing,
            raw_bytes: raw,
            compressed_bytes: compressed,
            k_lossless_ratio: ratio(key.raw, key.compressed),
            v_lossless_ratio: ratio(value.raw, value.compressed),
            lossless_ratio: ratio(raw, compressed),
            weighted_lossless_ratio: ratio(raw, compressed),
            k_hi_mode_counts: key.counts(false, &config.key_high),
            k_lo_mode_counts: key.counts(true, &config.key_low),
            v_hi_mode_counts: value.counts(false, &config.value_high),
            v_lo_mode_counts: value.counts(true, &config.value_low),
            scanned_entries: rejected::scanned(dump),
            converted_fp32_entries: plan.converted,
            skipped_entries: skips.total(),
            complete: skips.0.is_empty() && dump.findings.is_clean(),
            skip_reasons: Counts(skips.0),
            decoded_tensors,
            decoded_bytes,
            new_infinities,
            zstd_version: adaptive_v22::zstd_version(),
            layers: layers
                .into_iter()
                .map(|(id, [key, value])| Layer {
                    id,
                    k_raw_bytes: key.raw,
                    k_compressed_bytes: key.compressed,
                    v_raw_bytes: value.raw,
                    v_compressed_bytes: value.compressed,
                    k_lossless_ratio: ratio(key.raw, key.compressed),
                    v_lossless_ratio: ratio(value.raw, value.compressed),
                })
                .collect(),
        }
    }

    /// The JSON file, in ASCII and without a line end behind it.
    pub fn json(&self) -> Result<String> {
        ascii_json(self)
    }

    /// One line for the terminal.
    pub fn line(&self) -> String {
        let Self { selected_entries, aggregate_groups, k_lossless_ratio: k, v_lossless_ratio: v, .. } = self;
        format!(
            "entry_mode={} selected={selected_entries} groups={aggregate_groups} k={k:.4} v={v:.4} overall={:.4}",
            name(self.entry_mode),
            self.lossless_ratio
        )
    }

    /// The Markdown file.
    pub fn markdown(&self) -> String {
        let mut text = "# H2O v6 Offline Lossless Summary\n\n".to_owned();
        let code = |value: &str| format!("`{value}`");
        let truth = |value: bool| code(if value { "True" } else { "False" });
        let mut section = |title: &str, lines: &[(&str, String)]| {
            if !title.is_empty() {
                push(&mut text, format_args!("\n## {title}\n\n"));
            }
            for (label, value) in lines {
                push(&mut text, format_args!("- {label}: {value}\n"));
            }
        };
        section(
            "",
            &[
                ("Dump dir", code(&self.dump_dir)),
                ("Stage", code(self.stage)),
                ("Scope", code(&name(self.scope))),
                ("Selected entries", self.selected_entries.to_string()),
                ("Selected layers", format!("{:?}", self.selected_layers)),
                ("Selected dumps", self.selected_dumps.to_string()),
                ("Entry mode", code(&name(self.entry_mode))),
                ("Online chunk seq", self.online_chunk_seq.to_string()),
                ("Online framing bytes", self.online_framing_bytes.to_string()),
                ("Aggregate by stage", truth(self.aggregate_by_stage)),
                ("Aggregate groups", self.aggregate_groups.to_string()),
                ("Online chunks", self.online_chunks.to_string()),
                ("Codec mode", code(&name(self.codec_mode))),
                ("Bitshuffle", truth(self.bitshuffle)),
                ("Zstd level", self.zstd_level.to_string()),
                ("Codec", code(self.codec)),
            ],
        );
        let ratio = |value: f64| format!("{value:.4}");
        section(
            "Ratios",
            &[
                ("K lossless ratio", ratio(self.k_lossless_ratio)),
                ("V lossless ratio", ratio(self.v_lossless_ratio)),
                ("Overall lossless ratio", ratio(self.lossless_ratio)),
                ("Weighted lossless ratio", ratio(self.weighted_lossless_ratio)),
            ],
        );
        section(
            "Bytes",
            &[
                ("K raw bytes", self.k_raw_bytes.to_string()),
                ("K compressed bytes", self.k_compressed_bytes.to_string()),
                ("V raw bytes", self.v_raw_bytes.to_string()),
                ("V compressed bytes", self.v_compressed_bytes.to_string()),
                ("K chunk metadata bytes", self.k_chunk_meta_bytes.to_string()),
                ("V chunk metadata bytes", self.v_chunk_meta_bytes.to_string()),
                ("Total raw bytes", self.raw_bytes.to_string()),
                ("Total compressed bytes", self.compressed_bytes.to_string()),
            ],
        );
        section(
            "Predictor Usage",
            &[
                ("K hi mode counts", self.k_hi_mode_counts.to_string()),
                ("K lo mode counts", self.k_lo_mode_counts.to_string()),
                ("V hi mode counts", self.v_hi_mode_counts.to_string()),
                ("V lo mode counts", self.v_lo_mode_counts.to_string()),
            ],
        );
        section(
            "Diagnostics",
            &[
                ("Scanned entries", self.scanned_entries.to_string()),
                ("Converted fp32->fp16 entries", self.converted_fp32_entries.to_string()),
                ("Skipped entries", self.skipped_entries.to_string()),
            ],
        );
        if !self.skip_reasons.0.is_empty() {
            text.push_str("- Skip reasons:\n");
            let mut reasons = self.skip_reasons.0.clone();
            reasons.sort();
            for (reason, count) in reasons {
                push(&mut text, format_args!("  - {reason}: {count}\n"));
            }
        }
        text
    }
}

/// The name of a value in flags and files.
fn name(value: impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|name| name.as_str().map(ToOwned::to_owned)).unwrap_or_default()
}
