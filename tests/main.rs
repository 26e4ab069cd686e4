//! Cross-crate tests: whole pipelines through the command line, bad input, configs, and the reference's own outputs.

mod attention;
mod bad_input;
mod browser;
mod configs;
mod containers;
mod engine;
mod engines;
mod eviction;
mod golden_bitstream;
mod golden_gear;
mod golden_h2o;
mod golden_lossy;
mod golden_offline;
mod isolate;
mod lossless;
mod manual;
mod matrix;
mod model;
mod report;
mod results;
mod run;
mod scaffold;
mod sweeps;
mod zoo;
