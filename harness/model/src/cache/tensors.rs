//! A cache that is written and read as tensors, for programs that bring their own model.

use gearbox_core::{Chunk, Error, ErrorKind, Result, ResultExt, Role, Rope};

use super::layer::{Decoded, Layer};
use super::ledger::{CacheLedger, Usage};
use super::{CacheOptions, Spec, append};

/// What a [`TensorCache`] has to know of the model.
#[derive(Clone, Debug, Default)]
pub struct TensorCacheSpec {
    /// Layers.
    pub layers: usize,
    /// Query heads of each layer, which only policies look at; as many as KV heads if absent.
    pub q_heads: Option<usize>,
    /// KV heads of each layer.
    pub kv_heads: usize,
    /// Channels per head.
    pub dim: usize,
    /// How keys were rotated, if that is known.
    pub rope: Option<Rope>,
    /// Whether tokens come with their ids.
    pub tokens: bool,
}

/// Keys and values of one request, held as [`Cache`](super::Cache) holds them: older tokens as chunks that a pipeline encoded, the
/// newest ones raw.
///
/// Attention is up to the caller, who reads a layer as two tensors. Layers may be ahead of each other. Where the pipeline evicts tokens, a
/// step is [`append`](Self::append), [`read`](Self::read) and [`observe`](Self::observe), which shows the policy what attention did.
///
/// # Examples
/// ```
/// use std::sync::Arc;
///
/// use gearbox_core::{Chunk, Chunking, DType, Pipeline, PipelineSpec, PluginSpec, Registry, Shape};
/// use gearbox_model::{CacheOptions, TensorCache, TensorCacheSpec};
/// use gearbox_plugins as _; // links the built-ins
///
/// let spec = PipelineSpec::of_codec(PluginSpec::new("zstd"), Chunking::Chunked { tokens: 16 });
/// let pipeline = Arc::new(Pipeline::build(&spec, &Registry::built_in()?)?);
/// let options = CacheOptions { pipeline: Some(pipeline), residual: 4, ..CacheOptions::default() };
/// let model = TensorCacheSpec { layers: 2, kv_heads: 1, dim: 8, ..TensorCacheSpec::default() };
/// let mut cache = TensorCache::new(&model, &options)?;
///
/// let bytes: Vec<u8> = (0..40 * 8).flat_map(|value: u16| value.to_le_bytes()).collect();
/// let tensor = Chunk::new(Shape::new(40, 1, 8), DType::F16, &bytes)?;
/// cache.append(1, tensor, tensor, None)?;
/// let (mut keys, mut values) = (vec![0; bytes.len()], vec![0; bytes.len()]);
/// cache.read(1, &mut keys, &mut values)?;
/// assert_eq!((keys, cache.len(1), cache.ledger().layers[1].chunks), (bytes, 40, 4));
/// # Ok::<(), gearbox_core::Error>(())
/// ```
pub struct TensorCache {
    spec: Spec,
    layers: Vec<Layer>,
    /// By layer.
    progress: Vec<Progress>,
    ids: Vec<u32>,
    uses_ids: bool,
    decoded: Decoded,
    usage: Usage,
    failed: bool,
}

/// How far a layer is.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// Steps that ended.
    steps: u64,
    /// Tokens seen, evicted ones included.
    seen: usize,
    /// The newest ones among them whose queries the policy has yet to see.
    due: usize,
}

impl std::fmt::Debug for TensorCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorCache({} layers, {:?})", self.layers.len(), self.spec)
    }
}

impl TensorCache {
    /// An empty cache. [`CacheOptions::block`] is of no meaning here.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the pipeline has no route for a layer or cannot code its tensors;
    /// [`ErrorKind::InvalidConfig`] for extents of 0, query heads that KV heads cannot share evenly, or a budget that cannot be met.
    pub fn new(model: &TensorCacheSpec, options: &CacheOptions) -> Result<Self> {
        for (name, value) in [("layers", model.layers), ("kv_heads", model.kv_heads), ("dim", model.dim)] {
            if value == 0 {
                return Err(Error::invalid_config(format!("`{name}`: expected at least 1, got 0")));
            }
        }
        let q_heads = model.q_heads.unwrap_or(model.kv_heads);
        if q_heads == 0 || !q_heads.is_multiple_of(model.kv_heads) {
            let message = format!("`q_heads`: expected a multiple of {} KV heads, got {q_heads}", model.kv_heads);
            return Err(Error::invalid_config(message));
        }
        let spec = Spec {
            q_heads,
            kv_heads: model.kv_heads,
            dim: model.dim,
            rope: model.rope.clone(),
            knows_ids: model.tokens,
            ..Spec::new(options)?
        };
        let (layers, uses_ids) = spec.layers(model.layers)?;
        let mut cache = Self {
            progress: Vec::new(),
            spec,
            layers,
            ids: Vec::new(),
            uses_ids,
            decoded: Decoded::default(),
            usage: Usage::default(),
            failed: false,
        };
        cache.reset()?;
        Ok(cache)
    }

    fn layer(&self, layer: usize) -> Result<&Layer> {
        if self.failed {
            return Err(Error::unsupported("the cache failed earlier, expected a new one"));
        }
        let count = self.layers.len();
        self.layers
            .get(layer)
            .ok_or_else(|| Error::invalid_input(format!("expected one of {count} layers, counted from 0, got {layer}")))
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Tokens that a layer has seen, evicted ones included: the position of the next one. 0 for a layer that is not there.
    pub fn seen(&self, layer: usize) -> usize {
        self.progress.get(layer).map_or(0, |progress| progress.seen)
    }

    /// Whether the pipeline evicts tokens of a layer, so that it has to be shown attention.
    pub fn evicts(&self, layer: usize) -> bool {
        self.layers.get(layer).is_some_and(|layer| layer.session.is_some())
    }

    /// Positions of the tokens that a layer holds, `(rows, len)` row-major: one row if all heads hold the same, else one per KV head.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if there is no such layer.
    pub fn live(&self, layer: usize) -> Result<Vec<u32>> {
        Ok(self.layer(layer)?.positions.flat())
    }

    /// Tokens that a layer holds; 0 for one that is not there.
    pub fn len(&self, layer: usize) -> usize {
        self.layers.get(layer).map_or(0, |layer| layer.positions.len())
    }

    /// Whether no layer holds a token.
    pub fn is_empty(&self) -> bool {
        (0..self.layers.len()).all(|layer| self.len(layer) == 0)
    }

    /// Appends tokens to a layer; whole chunks of tokens that are older than the newest ones are encoded, in a layer that evicts as soon as
    /// [`observe`](Self::observe) was shown the attention of these tokens.
    ///
    /// `tokens` are their ids: needed if the cache was made with [`TensorCacheSpec::tokens`] and no layer brought them before, else unused.
    ///
    /// # Shapes
    /// `key` and `value` are `(seq, kv_heads, dim)`.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`], [`ErrorKind::UnsupportedDType`] and [`ErrorKind::InvalidInput`] if the arguments are not what the cache
    /// holds, or if attention of the last tokens is due: it stays as it was. What the plugins report, with layer and role: after that the
    /// cache is of no more use.
    pub fn append(&mut self, layer: usize, key: Chunk<'_>, value: Chunk<'_>, tokens: Option<&[u32]>) -> Result<()> {
        self.layer(layer)?;
        let Progress { seen: start, due, .. } = self.progress[layer];
        if due > 0 {
            let message = format!("layer {layer}: expected the attention of the last {due} tokens before new ones");
            return Err(Error::invalid_input(message));
        }
        let place = || format!("layer {layer}");
        let seq = key.shape().seq;
        for (role, tensor) in Role::ALL.into_iter().zip([key, value]) {
            self.check(seq, tensor).context(|| format!("layer {layer}, {role}"))?;
        }
        if self.spec.knows_ids {
            self.learn(start, seq, tokens).context(place)?;
        }
        self.failed = true;
        let target = &mut self.layers[layer];
        for (tail, new) in target.tail.iter_mut().zip([key, value]) {
            append(tail, new.bytes().len(), new.bytes().iter().copied());
        }
        target.positions.append(start as u32..(start + seq) as u32);
        target.usage.reached(target.bytes().total());
        self.progress[layer].seen += seq;
        if seq > 0 && self.layers[layer].session.is_some() {
            self.progress[layer].due = seq;
            self.usage.reached(self.resident());
        } else {
            self.end(layer, None).context(place)?;
        }
        self.failed = false;
        Ok(())
    }

    /// Shows the policy of a layer what attention did with the next queries of the tokens appended last. As soon as it has seen all of
    /// them, it decides which tokens stay; then chunks are encoded. Nothing happens in a layer that does not evict.
    ///
    /// Long prompts may be shown in blocks of queries; a step of a single query behind the first token is taken as one of decoding.
    ///
    /// # Shapes
    /// `probabilities` is `(queries, q_heads, len)`: softmax probabilities over all tokens that the layer holds, 0 where masked.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`] if they have another length, or if fewer queries are due: the cache stays as it was. What the plugins
    /// report, with the layer: after that the cache is of no more use.
    pub fn observe(&mut self, layer: usize, queries: usize, probabilities: &[f32]) -> Result<()> {
        let live = self.layer(layer)?.positions.len();
        if !self.evicts(layer) {
            return Ok(());
        }
        let Progress { seen, due, .. } = self.progress[layer];
        let (q_heads, place) = (self.spec.q_heads, || format!("layer {layer}"));
        let expected = queries.checked_mul(q_heads * live);
        if queries == 0 || queries > due || expected != Some(probabilities.len()) {
            let numbers = probabilities.len();
            return Err(Error::shape(format!(
                "layer {layer}: expected probabilities of ({due} queries at most, {q_heads}, {live}), got {numbers} of {queries} queries"
            )));
        }
        self.failed = true;
        let target = &mut self.layers[layer];
        target.observe(seen - due, queries, probabilities).context(place)?;
        self.progress[layer].due -= queries;
        if queries == due {
            let keep = target.plan(&self.spec, seen).context(place)?;
            self.end(layer, keep).context(place)?;
        }
        self.failed = false;
        Ok(())
    }

    /// Ends a step of a layer: drops what is not among the slots that stay, if some do not, and encodes what became old.
    fn end(&mut self, layer: usize, keep: Option<Vec<Vec<u32>>>) -> Result<()> {
        let (spec, target, decoded) = (&self.spec, &mut self.layers[layer], &mut self.decoded);
        let mut raw = Vec::new();
        let is_old = spec.ages(target.tail[0].len() / spec.row());
        if let Some(lists) = keep {
            target.decode(spec, &self.ids, decoded)?;
            raw = target.evict(spec, &lists, decoded)?;
        } else if is_old && target.looks_back(spec)? {
            target.decode(spec, &self.ids, decoded)?;
        } else if is_old {
            // What was encoded before need not be decoded: its place in the buffer is enough.
            for decoded in decoded.iter_mut() {
                decoded.resize(target.coded_len(spec), 0);
            }
        }
        target.encode(spec, &self.ids, raw, decoded)?;
        self.account(layer);
        Ok(())
    }

    fn check(&self, seq: usize, tensor: Chunk<'_>) -> Result<()> {
        let (expected, got) = (self.spec.shape(seq), tensor.shape());
        if got != expected {
            return Err(Error::shape(format!("expected shape {expected}, got {got}")));
        }
        if tensor.dtype() != self.spec.dtype {
            let message = format!("expected {}, got {}", self.spec.dtype, tensor.dtype());
            return Err(Error::new(ErrorKind::UnsupportedDType, message));
        }
        Ok(())
    }

    /// Takes in the ids of tokens that no layer brought before.
    fn learn(&mut self, start: usize, seq: usize, tokens: Option<&[u32]>) -> Result<()> {
        let Some(tokens) = tokens else {
            let known = self.ids.len() >= start + seq;
            return if known { Ok(()) } else { Err(Error::invalid_input("expected the ids of the tokens, got none")) };
        };
        if tokens.len() != seq {
            return Err(Error::shape(format!("expected {seq} token ids, got {}", tokens.len())));
        }
        let known = (self.ids.len() - start).min(seq);
        if self.ids[start..start + known] != tokens[..known] {
            return Err(Error::invalid_input("expected the token ids that another layer brought, got other ones"));
        }
        append(&mut self.ids, seq - known, tokens[known..].iter().copied());
        Ok(())
    }

    fn resident(&self) -> u64 {
        let layers: u64 = self.layers.iter().map(|layer| layer.bytes().total()).sum();
        layers + self.spec.artifact_bytes() + self.id_bytes()
    }

    /// Takes in the bytes at the end of a step of a layer.
    fn account(&mut self, layer: usize) {
        let dense = |progress: &Progress| 2 * (progress.seen * self.spec.row()) as u64;
        self.progress[layer].steps += 1;
        let progress = self.progress[layer];
        let (one, all) = (dense(&progress), self.progress.iter().map(dense).sum());
        let steps = self.progress.iter().map(|progress| progress.steps).sum();
        let target = &mut self.layers[layer];
        target.usage.ended(target.bytes().total(), one, progress.steps);
        let resident = self.resident();
        self.usage.reached(resident);
        self.usage.ended(resident, all, steps);
    }

    /// Decodes a layer.
    ///
    /// # Shapes
    /// `keys` and `values` are filled with tensors of `(len, kv_heads, dim)`.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`] if they have another length; what the plugins report, with layer and role.
    pub fn read(&self, layer: usize, keys: &mut [u8], values: &mut [u8]) -> Result<()> {
        let (spec, held) = (&self.spec, self.layer(layer)?);
        let expected = held.positions.len() * spec.row();
        let outs = [keys, values];
        if let Some(out) = outs.iter().find(|out| out.len() != expected) {
            return Err(Error::shape(format!("layer {layer}: expected room for {expected} bytes, got {}", out.len())));
        }
        let coded = held.coded_len(spec);
        let [(keys, key_tail), (values, value_tail)] = outs.map(|out| out.split_at_mut(coded));
        key_tail.copy_from_slice(&held.tail[0]);
        value_tail.copy_from_slice(&held.tail[1]);
        held.decode_into(spec, &self.ids, [keys, values]).context(|| format!("layer {layer}"))
    }

    /// Forgets all tokens.
    ///
    /// # Errors
    /// What policies report when they begin anew; after that the cache is of no more use.
    pub fn reset(&mut self) -> Result<()> {
        self.failed = true;
        let count = self.layers.len() as u32;
        for layer in &mut self.layers {
            *layer = Layer::new(layer.id);
            layer.session = self.spec.session(layer.id, count)?;
        }
        self.progress = vec![Progress::default(); self.layers.len()];
        self.ids.clear();
        (self.usage, self.failed) = (Usage::default(), false);
        Ok(())
    }

    /// What is resident, by layer. A step of the usage is an append; in a layer that evicts, it ends when all attention was shown.
    pub fn ledger(&self) -> CacheLedger {
        let layers = self.layers.iter().zip(&self.progress);
        CacheLedger {
            layers: layers.map(|(layer, progress)| layer.ledger(progress.seen as u64)).collect(),
            artifacts: self.spec.artifact_bytes(),
            token_ids: self.id_bytes(),
            usage: self.usage,
            scratch: self.decoded.iter().map(|bytes| bytes.capacity() as u64).sum(),
        }
    }

    fn id_bytes(&self) -> u64 {
        if self.uses_ids { (self.ids.capacity() * size_of::<u32>()) as u64 } else { 0 }
    }
}
