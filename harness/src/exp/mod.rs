//! The reference's experiments, one to one: its flags, its files, its columns, our plugins.

use clap::Subcommand;
use gearbox_core::{Registry, Result};
use gearbox_plugins::bitstream::reference::{Arithmetic, Huffman};

use crate::status::Status;

pub mod bench_latency;
pub mod bitstream;
pub mod blocknorm;
pub mod blocknorm_sweep;
mod engine;
mod files;
mod flags;
pub mod full_eval;
pub mod gear_fp16;
pub mod h2o;
mod input;
mod lossy;
pub mod lossy_compare;
pub mod mixed;
pub mod offline_lossless;
pub mod pipeline;
pub mod run_demo;
#[cfg(test)]
pub(crate) mod samples;
pub mod text;
pub mod verify_roundtrip;

pub(crate) use files::Outputs;
pub use input::InputArgs;
pub use lossy::{CommonArgs, CompressMode};

/// One experiment.
#[derive(Clone, Debug, Subcommand)]
pub enum ExpCommand {
    /// Measure zstd, byte split and byte split with delta over every entry and head
    GearFp16(gear_fp16::GearFp16Args),
    /// Encode every entry, decode the bytes in a fresh codec and compare
    VerifyRoundtrip(verify_roundtrip::VerifyRoundtripArgs),
    /// Measure byte split, block-wise predictors and zstd over the front layers, whole or in chunks
    OfflineLossless(offline_lossless::OfflineLosslessArgs),
    /// Time encode and decode of every entry
    BenchLatency(bench_latency::BenchLatencyArgs),
    /// Measure front layers that are lossless and other layers that are quantised or truncated
    Mixed(mixed::MixedArgs),
    /// Measure layers that are normalised in blocks along the channels
    Blocknorm(blocknorm::BlocknormArgs),
    /// Measure a grid of block sizes, shares of kept scales and bits
    BlocknormSweep(blocknorm_sweep::BlocknormSweepArgs),
    /// Measure clipping, quantisation and both
    LossyCompare(lossy_compare::LossyCompareArgs),
    /// Write sign, exponent and mantissa of every F16 entry as Huffman codes
    HuffmanEncode(bitstream::EncodeArgs),
    /// Decode what `huffman-encode` wrote, compare it or write it as a dump
    HuffmanDecode(bitstream::DecodeArgs),
    /// Add up the sizes of what `huffman-encode` wrote
    HuffmanAnalyze(bitstream::AnalyzeArgs),
    /// Write sign, exponent and mantissa of every F16 entry as arithmetic codes
    ArithEncode(bitstream::EncodeArgs),
    /// Decode what `arith-encode` wrote, compare it or write it as a dump
    ArithDecode(bitstream::DecodeArgs),
    /// Add up the sizes of what `arith-encode` wrote
    ArithAnalyze(bitstream::AnalyzeArgs),
    /// Let an engine decode prompt files and dump its cache
    RunDemo(run_demo::RunDemoArgs),
    /// Make prompts, dump an engine's cache, round it to F16, measure it and verify the round trip
    Pipeline(Box<pipeline::PipelineArgs>),
    /// Run a benchmark of decoding with eviction over a grid of settings
    H2oBench(Box<h2o::BenchArgs>),
    /// Run a benchmark of decoding with eviction over a preset
    H2oSweep(h2o::SweepArgs),
    /// Collect the tables of benchmark logs in one CSV file
    H2oParse(h2o::ParseArgs),
    /// Summarise what `h2o-parse` wrote, beside offline results, and judge it
    H2oAnalyze(Box<h2o::AnalyzeArgs>),
    /// Run `h2o-parse`, `offline-lossless` and `h2o-analyze` over the folder of a sweep
    FullEval(full_eval::FullEvalArgs),
}

impl ExpCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the experiment reports.
    pub fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        match self {
            Self::GearFp16(args) => args.run(json),
            Self::OfflineLossless(args) => args.run(registry, json),
            Self::VerifyRoundtrip(args) => args.run(registry, json),
            Self::BenchLatency(args) => args.run(registry, json),
            Self::Mixed(args) => args.run(registry, json),
            Self::Blocknorm(args) => args.run(registry, json),
            Self::BlocknormSweep(args) => args.run(registry, json),
            Self::LossyCompare(args) => args.run(registry, json),
            Self::HuffmanEncode(args) => args.run::<Huffman>(json),
            Self::HuffmanDecode(args) => args.run::<Huffman>(json),
            Self::HuffmanAnalyze(args) => args.run::<Huffman>(json),
            Self::ArithEncode(args) => args.run::<Arithmetic>(json),
            Self::ArithDecode(args) => args.run::<Arithmetic>(json),
            Self::ArithAnalyze(args) => args.run::<Arithmetic>(json),
            Self::RunDemo(args) => args.run(json),
            Self::Pipeline(args) => args.run(registry, json),
            Self::FullEval(args) => args.run(registry, json),
            Self::H2oBench(args) => args.run(json),
            Self::H2oSweep(args) => args.run(json),
            Self::H2oParse(args) => args.run(json),
            Self::H2oAnalyze(args) => args.run(json),
        }
    }
}

/// Original ÷ stored; zero if nothing was stored.
fn ratio(original: u64, stored: u64) -> f64 {
    if stored == 0 { 0.0 } else { original as f64 / stored as f64 }
}
