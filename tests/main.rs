//! Cross-crate tests: whole pipelines through the command line, bad input, configs, and the reference's own outputs.

mod bad_input;
mod configs;
mod containers;
mod engine;
mod eviction;
mod golden_bitstream;
mod golden_gear;
mod golden_h2o;
mod golden_lossy;
mod golden_offline;
mod isolate;
mod lossless;
mod matrix;
mod model;
mod results;
mod run;
mod scaffold;
mod sweeps;
mod zoo;
