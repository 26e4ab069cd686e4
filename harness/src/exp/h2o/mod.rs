//! The kit around decoding with eviction: run a benchmark over a grid, collect its logs, summarise and judge them.
//!
//! The reference's kits differ in the columns that their engine printed, in defaults and in gates; [`Kit`] names them. Their figures are what
//! an engine reports of itself, and no gate among them measures quality; what a policy costs is what `gearbox evict` and the model commands
//! measure.

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod analyze;
mod bench;
#[cfg(test)]
mod bench_tests;
mod gate;
mod parse;
mod preset;
mod rows;

pub use analyze::AnalyzeArgs;
pub(crate) use bench::FILES;
pub use bench::{BenchArgs, SweepArgs};
pub(crate) use parse::LOG;
pub use parse::ParseArgs;
pub use preset::Preset;
pub(crate) use preset::{Codec, Scope, TargetMode};

/// A revision of the reference's kit; each adds to the one before.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Kit {
    /// Layer range, adaptive target, estimate of the lossless ratio
    V2,
    /// Real lossless bytes and times, offline results, decode gate
    #[default]
    V3,
    /// Probe, full and store modes, queue
    V4,
    /// Store limits, budget for decompression
    V5,
    /// Asynchronous encoders, decode cache
    V6,
    /// Plans of each layer, decode gate over all rows
    Final,
}

impl Kit {
    /// As flags have it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V2 => "v2",
            Self::V3 => "v3",
            Self::V4 => "v4",
            Self::V5 => "v5",
            Self::V6 => "v6",
            Self::Final => "final",
        }
    }
}

/// What the engine does with compressed blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// Encodes samples and decodes one
    Probe,
    /// Encodes more layers
    Full,
    /// Keeps what it encoded
    Store,
}
