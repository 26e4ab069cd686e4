//! A decoder model whose KV cache is held by a Gearbox pipeline.
//!
//! [`Model`] loads a folder in Hugging Face layout (Llama 2 and 3, Mistral, Qwen 2 and 2.5, `SmolLM`) and computes in F32 on candle.
//! [`Cache`] belongs to one request: older tokens are chunks that a [`Pipeline`](gearbox_core::Pipeline) encoded, attention reads them
//! through decode, and a policy may evict tokens. Its [`ledger`](Cache::ledger) counts every resident byte, its
//! [`timings`](Cache::timings) say where the time went.
//!
//! # Examples
//! ```
//! use std::sync::Arc;
//!
//! use gearbox_core::{Chunking, Pipeline, PipelineSpec, PluginSpec, Registry};
//! use gearbox_model::{CacheOptions, Model};
//! use gearbox_plugins as _; // links the built-ins
//!
//! let model = Model::bundled()?;
//! let prompt = model.tokenizer().encode("It was a dark and stormy night. ")?;
//!
//! let spec = PipelineSpec::of_codec(PluginSpec::new("planes"), Chunking::ChunkedGrouped { tokens: 16 });
//! let pipeline = Arc::new(Pipeline::build(&spec, &Registry::built_in()?)?);
//! let dense = CacheOptions::default();
//! let coded = CacheOptions { pipeline: Some(pipeline), residual: 8, ..CacheOptions::default() };
//!
//! let mut cache = model.cache(&coded)?;
//! let text = model.greedy(&mut cache, &prompt, 40, &[])?;
//! assert_eq!(text, model.greedy(&mut model.cache(&dense)?, &prompt, 40, &[])?, "a lossless pipeline changes nothing");
//! assert!(cache.ledger().layers[0].chunks > 0);
//! # Ok::<(), gearbox_core::Error>(())
//! ```

mod cache;
mod config;
mod element;
pub mod hub;
mod model;
mod tokenizer;
mod train;
mod weights;

pub use cache::{
    Cache, CacheLedger, CacheOptions, Coded, LayerBytes, LayerLedger, TensorCache, TensorCacheSpec, Timings, Usage,
};
pub use candle_core::Device;
pub use config::Config;
pub use model::{LayerStep, Model, Probe, Step, bundled, most_probable};
pub use tokenizer::Tokenizer;

/// The error of a tensor operation. Shapes are checked before, so what is left is mostly the device.
#[expect(clippy::needless_pass_by_value, reason = "as `map_err` hands it over")]
fn from_candle(error: candle_core::Error) -> gearbox_core::Error {
    gearbox_core::Error::unsupported(format!("tensor operation: {error}"))
}
