//! KV-cache dumps, experiments, sweep and command line of Gearbox.

pub mod atomic;
pub mod bench;
pub mod cli;
pub mod compare;
pub mod digest;
pub mod dump;
pub mod engine;
pub mod entropy;
pub mod evict;
pub mod exp;
pub mod gate;
pub mod inspect;
pub mod isolate;
pub mod loading;
pub mod metrics;
pub mod model;
mod number;
pub mod pipelines;
pub mod prompts;
pub mod receipt;
pub mod report;
pub mod results;
pub mod sample;
pub mod scaffold;
pub mod select;
pub mod status;
pub mod sweep;
