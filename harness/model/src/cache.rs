//! The KV cache of one request: encoded chunks and raw recent tokens, read by attention through decode.

mod attention;
mod layer;
mod ledger;
mod positions;
mod tensors;

use std::sync::Arc;
use std::time::Instant;

use candle_core::Tensor;
use gearbox_core::{
    CacheGeometry, Chunking, DType, Error, EvictionSession, KeepSet, Needs, Pipeline, Result, ResultExt, Role, Rope,
    Shape,
};

use self::attention::Scratch;
use self::layer::{Decoded, Layer};
pub use self::ledger::{CacheLedger, Coded, LayerBytes, LayerLedger, Timings, Usage};
pub use self::tensors::{TensorCache, TensorCacheSpec};
use crate::element::narrow;
use crate::{Config, from_candle};

/// How a cache holds keys and values.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// Element type that keys and values are rounded to when they are appended.
    pub dtype: DType,
    /// What encodes chunks of older tokens, and what evicts tokens; without it all tokens stay raw.
    pub pipeline: Option<Arc<Pipeline>>,
    /// Newest tokens that are never encoded.
    pub residual: usize,
    /// Tokens per chunk; those of the pipeline's chunking if absent, and 128 if that names none.
    pub chunk: Option<usize>,
    /// Tokens of a prompt that are worked on at a time; it bounds the memory of attention.
    pub block: usize,
}

impl Default for CacheOptions {
    /// F16 without a pipeline; 64 residual tokens, blocks of 256.
    fn default() -> Self {
        Self { dtype: DType::F16, pipeline: None, residual: 64, chunk: None, block: 256 }
    }
}

/// What is fixed for the life of a cache.
#[derive(Debug)]
struct Spec {
    q_heads: usize,
    kv_heads: usize,
    dim: usize,
    dtype: DType,
    rope: Option<Rope>,
    /// Whether the ids of tokens are known.
    knows_ids: bool,
    pipeline: Option<Arc<Pipeline>>,
    residual: usize,
    chunk: usize,
    block: usize,
}

impl Spec {
    /// Takes over the options; what belongs to the model is left to the caller.
    fn new(options: &CacheOptions) -> Result<Self> {
        let pipeline = options.pipeline.clone();
        let chunk = options.chunk.unwrap_or(pipeline.as_deref().map_or(CHUNK, chunk_tokens));
        for (name, value) in [("chunk", chunk), ("block", options.block)] {
            if value == 0 {
                return Err(Error::invalid_config(format!("`{name}`: expected at least 1 token, got 0")));
            }
        }
        let (dtype, residual, block) = (options.dtype, options.residual, options.block);
        Ok(Self {
            q_heads: 0,
            kv_heads: 0,
            dim: 0,
            dtype,
            rope: None,
            knows_ids: false,
            pipeline,
            residual,
            chunk,
            block,
        })
    }

    /// What plugins may look at besides the tensor they code.
    fn offered(&self) -> Needs {
        Needs { tokens: self.knows_ids, rope: self.rope.is_some(), peer: true, history: true }
    }

    /// Empty layers, after a check that the pipeline can code them; and whether it looks at token ids.
    fn layers(&self, count: usize) -> Result<(Vec<Layer>, bool)> {
        let mut layers = Vec::with_capacity(count);
        let mut uses_ids = false;
        for id in 0..count as u32 {
            for role in Role::ALL {
                let Some(pipeline) = &self.pipeline else { continue };
                let coder = pipeline.live_coder(id, role)?;
                coder.check(self.dtype, self.offered()).context(|| format!("layer {id}, {role}"))?;
                uses_ids |= coder.context().tokens && self.knows_ids;
            }
            layers.push(Layer::new(id));
        }
        Ok((layers, uses_ids))
    }

    /// A session of the policy of a layer.
    fn session(&self, layer: u32, layers: u32) -> Result<Option<Box<dyn EvictionSession>>> {
        let Some(pipeline) = &self.pipeline else { return Ok(None) };
        let geometry = CacheGeometry { layer, layers, q_heads: self.q_heads, kv_heads: self.kv_heads, dim: self.dim };
        let session = pipeline.policy(layer)?.map(|policy| policy.session(&geometry)).transpose();
        session.context(|| format!("layer {layer}"))
    }

    /// Whether a tail of so many tokens holds a chunk that is old enough to be encoded.
    fn ages(&self, tail: usize) -> bool {
        self.pipeline.is_some() && tail >= self.residual + self.chunk
    }

    /// Bytes of the trained models of the pipeline.
    fn artifact_bytes(&self) -> u64 {
        let pipeline = self.pipeline.iter();
        pipeline.flat_map(|pipeline| pipeline.artifacts()).map(|(_, artifact)| artifact.0.len() as u64).sum()
    }

    fn shape(&self, seq: usize) -> Shape {
        Shape::new(seq, self.kv_heads, self.dim)
    }

    /// Bytes of one token of one role.
    fn row(&self) -> usize {
        self.shape(1).elements() * self.dtype.size()
    }
}

/// The KV cache of one request. It belongs to nobody else: nothing of an earlier request is in it.
///
/// New tokens are appended raw, in the storage type. As soon as a chunk of them is older than the newest tokens that stay raw, the
/// pipeline encodes it; attention reads it through decode from then on. Keys are stored after `RoPE`, and a token keeps its position
/// when others are evicted.
pub struct Cache {
    spec: Spec,
    layers: Vec<Layer>,
    ids: Vec<u32>,
    uses_ids: bool,
    scratch: Scratch,
    decoded: Decoded,
    usage: Usage,
    timings: Timings,
    failed: bool,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cache({} tokens, {} layers, {:?})", self.ids.len(), self.layers.len(), self.spec)
    }
}

/// Tokens per chunk where neither options nor pipeline say.
const CHUNK: usize = 128;

/// Tokens per chunk as the chunking of a pipeline says.
pub(crate) fn chunk_tokens(pipeline: &Pipeline) -> usize {
    match pipeline.spec().chunking {
        Chunking::Chunked { tokens } | Chunking::ChunkedGrouped { tokens } => tokens,
        Chunking::PerEntry | Chunking::Aggregate => CHUNK,
    }
}

/// Appends behind a buffer that grows by an eighth: doubling would hold up to twice what is needed.
fn append<T>(buffer: &mut Vec<T>, len: usize, items: impl Iterator<Item = T>) {
    reserve(buffer, len);
    buffer.extend(items);
}

fn reserve<T>(buffer: &mut Vec<T>, more: usize) {
    if buffer.capacity() - buffer.len() < more {
        buffer.reserve_exact(more.max(buffer.len() / 8));
    }
}

/// Gives memory back that a buffer of rows no longer needs.
fn shrink<T>(buffer: &mut Vec<T>, row: usize) {
    if buffer.capacity() > buffer.len() + buffer.len() / 8 + 16 * row {
        buffer.shrink_to_fit();
    }
}

impl Cache {
    pub(crate) fn new(config: &Config, options: &CacheOptions) -> Result<Self> {
        let spec = Spec {
            q_heads: config.q_heads,
            kv_heads: config.kv_heads,
            dim: config.head_dim,
            rope: Some(config.rope.clone()),
            knows_ids: true,
            ..Spec::new(options)?
        };
        let (mut layers, uses_ids) = spec.layers(config.layers)?;
        for layer in &mut layers {
            layer.session = spec.session(layer.id, config.layers as u32)?;
        }
        Ok(Self {
            spec,
            layers,
            ids: Vec::new(),
            uses_ids,
            scratch: Scratch::default(),
            decoded: Decoded::default(),
            usage: Usage::default(),
            timings: Timings::default(),
            failed: false,
        })
    }

    /// Tokens seen, evicted ones included: the position of the next one.
    pub fn seen(&self) -> usize {
        self.ids.len()
    }

    /// Ids of all tokens seen.
    pub fn tokens(&self) -> &[u32] {
        &self.ids
    }

    /// Positions of the live tokens of a layer, `(rows, tokens)` row-major: one row if all heads hold the same, else one per KV head.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn live(&self, layer: usize) -> Vec<u32> {
        self.layers[layer].positions.flat()
    }

    /// Tokens of a prompt that are worked on at a time.
    pub fn block(&self) -> usize {
        self.spec.block
    }

    /// What is resident, by layer.
    pub fn ledger(&self) -> CacheLedger {
        let seen = self.ids.len() as u64;
        CacheLedger {
            layers: self.layers.iter().map(|layer| layer.ledger(seen)).collect(),
            artifacts: self.spec.artifact_bytes(),
            token_ids: self.id_bytes(),
            usage: self.usage,
            scratch: self.scratch.bytes() + self.decoded.iter().map(|bytes| bytes.capacity() as u64).sum::<u64>(),
        }
    }

    /// Where the time of all steps so far went.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    fn id_bytes(&self) -> u64 {
        if self.uses_ids { (self.ids.capacity() * size_of::<u32>()) as u64 } else { 0 }
    }

    fn resident(&self) -> u64 {
        let layers: u64 = self.layers.iter().map(|layer| layer.bytes().total()).sum();
        layers + self.spec.artifact_bytes() + self.id_bytes()
    }

    /// Begins a step with these tokens. A cache that failed in the middle of a step is of no more use.
    pub(crate) fn begin(&mut self, ids: &[u32]) -> Result<()> {
        if self.failed {
            return Err(Error::unsupported("the cache failed in an earlier step, expected a new one"));
        }
        self.failed = true;
        append(&mut self.ids, ids.len(), ids.iter().copied());
        self.scratch.begin();
        Ok(())
    }

    /// Ends a step that took so long.
    pub(crate) fn end(&mut self, ns: u64, cache_ns_before: u64) {
        self.timings.steps += 1;
        self.timings.rest_ns += ns.saturating_sub(self.timings.cache_ns() - cache_ns_before);
        let dense = 2 * (self.ids.len() * self.spec.row()) as u64;
        let steps = self.timings.steps;
        for layer in &mut self.layers {
            layer.usage.ended(layer.bytes().total(), dense, steps);
        }
        let layers = self.layers.len() as u64;
        self.usage.ended(self.resident(), dense * layers, steps);
        self.failed = false;
    }

    /// Appends the keys and values `(seq, kv_heads, dim)` of a step to a layer, and attends to all live tokens with its queries
    /// `(seq, q_heads, dim)`. Gives `(seq, q_heads * dim)`.
    pub(crate) fn attend(
        &mut self,
        layer: usize,
        window: Option<usize>,
        [query, key, value]: [&Tensor; 3],
    ) -> Result<Tensor> {
        let mut clock = Clock(Instant::now());
        let place = || format!("layer {layer}");
        self.append(layer, [key, value]).context(place)?;
        let resident = self.resident();
        self.usage.reached(resident);
        clock.lap(&mut self.timings.attention_ns);
        self.read(layer, window, query, &mut clock).context(place)
    }

    fn append(&mut self, layer: usize, new: [&Tensor; 2]) -> Result<()> {
        let (spec, seen, layer) = (&self.spec, self.ids.len(), &mut self.layers[layer]);
        let seq = new[0].dim(0).map_err(from_candle)?;
        for (tail, new) in layer.tail.iter_mut().zip(new) {
            let new = values(new)?;
            reserve(tail, seq * spec.row());
            narrow(spec.dtype, &new, tail)?;
        }
        layer.positions.append((seen - seq) as u32..seen as u32);
        layer.usage.reached(layer.bytes().total());
        Ok(())
    }

    /// Attends to what a layer holds, then evicts and encodes.
    fn read(&mut self, layer: usize, window: Option<usize>, query: &Tensor, clock: &mut Clock) -> Result<Tensor> {
        let (spec, layer, decoded) = (&self.spec, &mut self.layers[layer], &mut self.decoded);
        let is_coded = layer.chunks() > 0;
        layer.decode(spec, &self.ids, decoded)?;
        let decode_ns = clock.lap(&mut self.timings.decode_ns);
        layer.coding.decode_ns += if is_coded { decode_ns } else { 0 };
        let attended = self.scratch.attend(spec, query, [decoded, &layer.tail], &layer.positions, window);
        let (output, probabilities) = attended.map_err(from_candle)?;
        clock.lap(&mut self.timings.attention_ns);
        let mut raw = Vec::new();
        if layer.session.is_some() {
            let probabilities = probabilities.transpose(0, 1).map_err(from_candle)?;
            let seq = probabilities.dim(0).map_err(from_candle)?;
            layer.observe(self.ids.len() - seq, seq, &values(&probabilities)?)?;
            clock.lap(&mut self.timings.score_ns);
            let keep = layer.plan(spec, self.ids.len())?;
            clock.lap(&mut self.timings.plan_ns);
            if let Some(lists) = keep {
                raw = layer.evict(spec, &lists, decoded)?;
            }
            clock.lap(&mut self.timings.move_ns);
        }
        let chunks = layer.coding.chunks;
        layer.encode(spec, &self.ids, raw, decoded)?;
        let encode_ns = clock.lap(&mut self.timings.encode_ns);
        layer.coding.encode_ns += if layer.coding.chunks > chunks { encode_ns } else { 0 };
        Ok(output)
    }
}

/// Elements of a tensor in logical order.
pub(crate) fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all().and_then(|flat| flat.to_vec1()).map_err(from_candle)
}

/// Gives the time since it was last asked to a phase, in nanoseconds.
struct Clock(Instant);

impl Clock {
    fn lap(&mut self, phase: &mut u64) -> u64 {
        let now = Instant::now();
        let ns = (now - self.0).as_nanos() as u64;
        *phase += ns;
        self.0 = now;
        ns
    }
}

/// The slots that stay: one list, or one per KV head of equal length; `None` if all stay.
fn keep_lists(keep: KeepSet, live: usize, kv_heads: usize) -> Result<Option<Vec<Vec<u32>>>> {
    keep.check(live, kv_heads).context(|| "keep set".to_owned())?;
    let lists = match keep {
        KeepSet::All => return Ok(None),
        KeepSet::Shared(list) => vec![list],
        KeepSet::PerHead(lists) => lists,
    };
    Ok(Some(lists).filter(|lists| lists[0].len() < live))
}

#[cfg(test)]
mod tests;
