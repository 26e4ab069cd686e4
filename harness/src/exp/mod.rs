//! The reference's experiments, one to one: its flags, its files, its columns, our plugins.

use clap::Subcommand;
use gearbox_core::{Registry, Result};

use crate::status::Status;

pub mod bench_latency;
pub mod gear_fp16;
mod input;
#[cfg(test)]
mod samples;
pub mod text;
pub mod verify_roundtrip;

pub use input::InputArgs;

/// One experiment.
#[derive(Clone, Debug, Subcommand)]
pub enum ExpCommand {
    /// Measure zstd, byte split and byte split with delta over every entry and head
    GearFp16(gear_fp16::GearFp16Args),
    /// Encode every entry, decode the bytes in a fresh codec and compare
    VerifyRoundtrip(verify_roundtrip::VerifyRoundtripArgs),
    /// Time encode and decode of every entry
    BenchLatency(bench_latency::BenchLatencyArgs),
}

impl ExpCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the experiment reports.
    pub fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        match self {
            Self::GearFp16(args) => args.run(json),
            Self::VerifyRoundtrip(args) => args.run(registry, json),
            Self::BenchLatency(args) => args.run(registry, json),
        }
    }
}
