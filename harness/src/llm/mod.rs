//! The reference's engines on our own model: what `exp h2o-bench`, `exp run-demo` and `exp pipeline` call.
//!
//! [`Runtime`] reads the reference's config and says which pipeline it asks for, [`Engine`] runs requests through it, [`mod@bench`] times them and
//! [`demo`] decodes prompts and dumps the cache. Flags, keys, columns and printed lines are the reference's; what they stand for is corrected:
//!
//! - A request has a cache of its own, so nothing of an earlier one is in it.
//! - Chunks are the storage, and attention reads them through decode. The lossless columns add up what was really stored and decoded.
//! - Prompts are text, and every repeat decodes the same tokens.
//! - What was not measured is `n/a` in a table, which no gate passes.

pub mod bench;
pub mod demo;
mod request;
mod runtime;
mod table;
mod trace;

pub use self::request::{Engine, Measured, Request};
pub use self::runtime::{Precision, Runtime};
pub use self::trace::Traced;
