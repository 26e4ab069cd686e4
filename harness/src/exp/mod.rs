//! The reference's experiments, one to one: its flags, its files, its columns, our plugins.

use clap::Subcommand;
use gearbox_core::{Registry, Result};
use gearbox_plugins::bitstream::reference::{Arithmetic, Huffman};

use crate::status::Status;

pub mod bench_latency;
pub mod bitstream;
pub mod blocknorm;
pub mod blocknorm_sweep;
pub mod gear_fp16;
mod input;
mod lossy;
pub mod lossy_compare;
pub mod mixed;
pub mod offline_lossless;
#[cfg(test)]
mod samples;
pub mod text;
pub mod verify_roundtrip;

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
        }
    }
}

/// Original ÷ stored; zero if nothing was stored.
fn ratio(original: u64, stored: u64) -> f64 {
    if stored == 0 { 0.0 } else { original as f64 / stored as f64 }
}
