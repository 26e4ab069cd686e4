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
/// Attention is up to the caller, who reads a layer as two tensors. Layers may be ahead of each other. Nothing is evicted, because
/// there is no attention that a policy could look at.
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
    /// Appends to each layer.
    steps: Vec<u64>,
    ids: Vec<u32>,
    uses_ids: bool,
    decoded: Decoded,
    usage: Usage,
    failed: bool,
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
    /// [`ErrorKind::Unsupported`] if the pipeline evicts tokens, has no route for a layer or cannot code its tensors;
    /// [`ErrorKind::InvalidConfig`] for extents of 0.
    pub fn new(model: &TensorCacheSpec, options: &CacheOptions) -> Result<Self> {
        for (name, value) in [("layers", model.layers), ("kv_heads", model.kv_heads), ("dim", model.dim)] {
            if value == 0 {
                return Err(Error::invalid_config(format!("`{name}`: expected at least 1, got 0")));
            }
        }
        let spec = Spec {
            q_heads: model.kv_heads,
            kv_heads: model.kv_heads,
            dim: model.dim,
            rope: model.rope.clone(),
            knows_ids: model.tokens,
            ..Spec::new(options)?
        };
        let (layers, uses_ids) = spec.layers(model.layers)?;
        for (layer, pipeline) in layers.iter().flat_map(|layer| spec.pipeline.iter().map(move |held| (layer.id, held)))
        {
            if pipeline.policy(layer)?.is_some() {
                let message = "the pipeline evicts tokens, which takes a cache that sees attention";
                return Err(Error::unsupported(message).context(format!("layer {layer}")));
            }
        }
        Ok(Self {
            steps: vec![0; layers.len()],
            spec,
            layers,
            ids: Vec::new(),
            uses_ids,
            decoded: Decoded::default(),
            usage: Usage::default(),
            failed: false,
        })
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

    /// Tokens of a layer; 0 for one that is not there.
    pub fn len(&self, layer: usize) -> usize {
        self.layers.get(layer).map_or(0, |layer| layer.positions.len())
    }

    /// Whether no layer holds a token.
    pub fn is_empty(&self) -> bool {
        (0..self.layers.len()).all(|layer| self.len(layer) == 0)
    }

    /// Appends tokens to a layer; whole chunks of tokens that are older than the newest ones are encoded.
    ///
    /// `tokens` are their ids: needed if the cache was made with [`TensorCacheSpec::tokens`] and no layer brought them before, else unused.
    ///
    /// # Shapes
    /// `key` and `value` are `(seq, kv_heads, dim)`.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`], [`ErrorKind::UnsupportedDType`] and [`ErrorKind::InvalidInput`] if the arguments are not what the cache
    /// holds: it stays as it was. What the plugins report, with layer and role: after that the cache is of no more use.
    pub fn append(&mut self, layer: usize, key: Chunk<'_>, value: Chunk<'_>, tokens: Option<&[u32]>) -> Result<()> {
        let start = self.layer(layer)?.positions.len();
        let place = || format!("layer {layer}");
        let seq = key.shape().seq;
        for (role, tensor) in Role::ALL.into_iter().zip([key, value]) {
            self.check(seq, tensor).context(|| format!("layer {layer}, {role}"))?;
        }
        if self.spec.knows_ids {
            self.learn(start, seq, tokens).context(place)?;
        }
        self.failed = true;
        let (spec, target) = (&self.spec, &mut self.layers[layer]);
        for (tail, new) in target.tail.iter_mut().zip([key, value]) {
            append(tail, new.bytes().len(), new.bytes().iter().copied());
        }
        target.positions.append(start as u32..(start + seq) as u32);
        target.usage.reached(target.bytes().total());
        if spec.ages(target.tail[0].len() / spec.row()) {
            // What was encoded before is decoded only if plugins look at it; else its place in the buffer is enough.
            if target.looks_back(spec)? {
                target.decode(spec, &self.ids, &mut self.decoded).context(place)?;
            } else {
                self.decoded.iter_mut().for_each(|decoded| decoded.resize(target.coded_len(spec), 0));
            }
            target.encode(spec, &self.ids, Vec::new(), &mut self.decoded).context(place)?;
        }
        self.account(layer);
        self.failed = false;
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

    /// Takes in the bytes after an append.
    fn account(&mut self, layer: usize) {
        let dense = |layer: &Layer| 2 * (layer.positions.len() * self.spec.row()) as u64;
        let all = self.layers.iter().map(dense).sum();
        let resident: u64 = self.layers.iter().map(|layer| layer.bytes().total()).sum();
        let resident = resident + self.spec.artifact_bytes() + self.id_bytes();
        let one = dense(&self.layers[layer]);
        self.steps[layer] += 1;
        let target = &mut self.layers[layer];
        target.usage.ended(target.bytes().total(), one, self.steps[layer]);
        self.usage.reached(resident);
        self.usage.ended(resident, all, self.steps.iter().sum());
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
    pub fn reset(&mut self) {
        for layer in &mut self.layers {
            *layer = Layer::new(layer.id);
        }
        self.steps.fill(0);
        self.ids.clear();
        (self.usage, self.failed) = (Usage::default(), false);
    }

    /// What is resident, by layer. A step of the usage is an append.
    pub fn ledger(&self) -> CacheLedger {
        CacheLedger {
            layers: self.layers.iter().map(|layer| layer.ledger(layer.positions.len() as u64)).collect(),
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
