//! Eviction policies: which tokens stay in the cache.

use std::fmt::Debug;

use serde_json::Value;

use crate::{Capabilities, Result};

/// Extent of the cache of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheGeometry {
    /// Layer of the model.
    pub layer: u32,
    /// Layers of the model.
    pub layers: u32,
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels per head.
    pub dim: usize,
}

/// What attention did while one or more tokens were appended.
#[derive(Clone, Copy, Debug)]
pub struct AttentionStep<'a> {
    /// Position of the first query.
    pub first_query: u64,
    /// Number of queries.
    pub queries: usize,
    /// Positions of the live tokens, ascending; shared by all heads.
    pub live: &'a [u32],
    /// Softmax probabilities `(queries, q_heads, live)`, row-major; zero where masked.
    pub probabilities: &'a [f32],
}

/// The cache at the moment of a decision.
#[derive(Clone, Copy, Debug)]
pub struct CacheView<'a> {
    /// Tokens seen so far, evicted ones included.
    pub seen: u64,
    /// Positions of the live tokens, ascending.
    pub live: &'a [u32],
}

/// Which of the live tokens stay, as indices into [`CacheView::live`], ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeepSet {
    /// All of them.
    All,
    /// The same for every KV head.
    Shared(Vec<u32>),
    /// One list per KV head.
    PerHead(Vec<Vec<u32>>),
}

/// Which tokens stay. The settings live here, the state of one layer in a session.
pub trait EvictionPolicy: Send + Sync + Debug {
    /// What it needs to know.
    fn capabilities(&self) -> Capabilities;

    /// The settings with every default filled in; stored in containers.
    fn config(&self) -> Value;

    /// Starts deciding for one layer of one request.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) if the budget cannot be met with this geometry.
    fn session(&self, geometry: &CacheGeometry) -> Result<Box<dyn EvictionSession>>;
}

/// One layer of one request. It sees attention step by step, so that the same code serves offline replay and a live decoder.
pub trait EvictionSession: Send {
    /// Takes in the attention of one step.
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()>;

    /// Decides which tokens stay.
    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet>;
}
