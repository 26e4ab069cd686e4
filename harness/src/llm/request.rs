//! Requests through the model, with what they measured.

use std::hash::Hasher;
use std::sync::Arc;
use std::time::Instant;

use gearbox_core::{DType, Pipeline, Registry, Result};
use gearbox_model::{Cache, CacheLedger, CacheOptions, Coded, Model, Probe, Step, Timings};
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3Default;

use super::runtime::{Precision, Runtime};
use super::trace::{Trace, Traced};

/// A model behind a runtime config.
#[derive(Debug)]
pub struct Engine<'m> {
    model: &'m Model,
    options: CacheOptions,
    /// Layers that are compressed.
    compressed: Vec<u32>,
    trace: Trace,
}

impl<'m> Engine<'m> {
    /// Builds the pipeline that a config asks for. Chunks that it compresses are coded by `codec`: `gear-delta`, or another one to compare with.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) for settings that do not fit the model, unless `lenient` and the
    /// reference would make something of them.
    pub fn new(
        model: &'m Model,
        runtime: &Runtime,
        precision: Precision,
        codec: &str,
        registry: &Registry,
        lenient: bool,
    ) -> Result<Self> {
        let config = model.config();
        let (spec, compressed) = runtime.pipeline(config.layers as u32, codec, lenient)?;
        let trace = Trace::default();
        let pipeline = Pipeline::build(&spec, &trace.registry(registry)?)?;
        let dtype = match precision {
            Precision::Low => DType::F16,
            Precision::Normal | Precision::High => DType::F32,
        };
        // Without compression nothing is ever old enough for a chunk.
        let residual = if compressed.is_empty() { config.context } else { runtime.residual() };
        let options = CacheOptions { dtype, pipeline: Some(Arc::new(pipeline)), residual, ..CacheOptions::default() };
        let engine = Self { model, options, compressed, trace };
        // Settings that no session can follow are known before any work starts.
        engine.model.cache(&engine.options)?;
        Ok(engine)
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Element type of the cache.
    pub fn dtype(&self) -> DType {
        self.options.dtype
    }

    /// The resolved pipeline.
    pub fn spec(&self) -> Value {
        self.options.pipeline.as_ref().map_or(Value::Null, |pipeline| pipeline.spec().to_value())
    }

    /// Whether chunks of any layer are compressed.
    pub fn compresses(&self) -> bool {
        !self.compressed.is_empty()
    }

    /// Begins a request with an empty cache.
    ///
    /// # Errors
    /// As [`Model::cache`].
    pub fn request(&self) -> Result<Request<'_>> {
        drop(self.trace.take());
        Ok(Request {
            cache: self.model.cache(&self.options)?,
            engine: self,
            prompt_tokens: 0,
            decode_tokens: 0,
            prefill_ns: 0,
            decode_ns: 0,
            before_decode: Timings::default(),
            last_encode_ns: None,
            encode_ns: vec![0; self.compressed.len()],
            digest: Xxh3Default::new(),
        })
    }

    /// Bytes of a token in one layer, keys and values.
    fn token_bytes(&self) -> usize {
        let config = self.model.config();
        2 * config.kv_heads * config.head_dim * self.options.dtype.size()
    }
}

/// One request under way.
pub struct Request<'a> {
    engine: &'a Engine<'a>,
    cache: Cache,
    prompt_tokens: usize,
    decode_tokens: usize,
    prefill_ns: u64,
    decode_ns: u64,
    before_decode: Timings,
    last_encode_ns: Option<u64>,
    /// Time of encoding so far, by compressed layer.
    encode_ns: Vec<u64>,
    digest: Xxh3Default,
}

impl std::fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Request({} prompt tokens, {} decoded)", self.prompt_tokens, self.decode_tokens)
    }
}

impl Request<'_> {
    /// Appends the prompt and gives the logits behind it.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn prefill(&mut self, ids: &[u32], probe: Option<Probe<'_>>) -> Result<Vec<f32>> {
        let (logits, ns) = self.step(ids, probe)?;
        self.prompt_tokens += ids.len();
        self.prefill_ns += ns;
        self.before_decode = self.cache.timings();
        Ok(logits)
    }

    /// Appends one token and gives the logits behind it.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn decode(&mut self, id: u32, probe: Option<Probe<'_>>) -> Result<Vec<f32>> {
        let (logits, ns) = self.step(&[id], probe)?;
        self.decode_tokens += 1;
        self.decode_ns += ns;
        Ok(logits)
    }

    fn step(&mut self, ids: &[u32], probe: Option<Probe<'_>>) -> Result<(Vec<f32>, u64)> {
        let step = match probe {
            Some(probe) => Step::last().probe(probe),
            None => Step::last(),
        };
        let start = Instant::now();
        let logits = self.engine.model.forward(&mut self.cache, ids, step)?;
        let ns = start.elapsed().as_nanos() as u64;
        for logit in &logits {
            self.digest.write(&logit.to_le_bytes());
        }
        if self.engine.compresses() {
            let ledger = self.cache.ledger();
            for (before, layer) in self.encode_ns.iter_mut().zip(&self.engine.compressed) {
                let now = ledger.layers[*layer as usize].coded.encode_ns;
                if now > *before {
                    self.last_encode_ns = Some(now - *before);
                    *before = now;
                }
            }
        }
        Ok((logits, ns))
    }

    /// What the request came to.
    pub fn end(self) -> Measured {
        let ledger = self.cache.ledger();
        let mut coded = Coded::default();
        for layer in &self.engine.compressed {
            coded += ledger.layers[*layer as usize].coded;
        }
        Measured {
            prompt_tokens: self.prompt_tokens,
            decode_tokens: self.decode_tokens,
            prefill_ns: self.prefill_ns,
            decode_ns: self.decode_ns,
            decisions: self.engine.trace.take(),
            token_bytes: self.engine.token_bytes(),
            coded: self.engine.compresses().then_some(coded),
            last_encode_ns: self.last_encode_ns,
            ledger,
            timings: [self.before_decode, self.cache.timings()],
            logits: self.digest.finish(),
        }
    }
}

/// What a request came to.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded behind it.
    pub decode_tokens: usize,
    /// Time of the prompt in nanoseconds.
    pub prefill_ns: u64,
    /// Time of the decoded tokens in nanoseconds.
    pub decode_ns: u64,
    /// Every decision of the policy, in order.
    pub decisions: Vec<Traced>,
    token_bytes: usize,
    /// What coding the compressed layers came to; none if no layer is compressed.
    pub coded: Option<Coded>,
    last_encode_ns: Option<u64>,
    /// What the cache held.
    pub ledger: CacheLedger,
    /// Where the time went, before the first decoded token and behind the last.
    pub timings: [Timings; 2],
    /// Hash of all logits (XXH3).
    pub logits: u64,
}

/// One number that the reference's engine tells of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Field {
    /// Its column in tables.
    pub column: &'static str,
    /// Its key in JSON.
    pub key: &'static str,
    /// Decimals of its column.
    pub decimals: usize,
    /// The number; none if it was not measured.
    pub value: Option<f64>,
}

/// A number of bytes or nanoseconds in the reference's units.
const MIB: f64 = 1_048_576.0;
const US: f64 = 1e3;

impl Measured {
    /// Decoded tokens per second.
    pub fn decode_tps(&self) -> f64 {
        self.decode_tokens as f64 * 1e9 / self.decode_ns as f64
    }

    /// Tokens of the prompt per second.
    pub fn prefill_tps(&self) -> f64 {
        self.prompt_tokens as f64 * 1e9 / self.prefill_ns as f64
    }

    /// Tokens that the last eviction of any layer removed, and those of all evictions together.
    pub fn evicted(&self) -> (usize, usize) {
        let evicted = self.decisions.iter().map(Traced::evicted).filter(|tokens| *tokens > 0);
        (evicted.clone().next_back().unwrap_or(0), evicted.sum())
    }

    /// What the reference tells of a request, in the order of its columns.
    ///
    /// The kept fractions and the lossy ratio are of the last decision of any layer, as in the reference, and so they say little of the whole
    /// request: that is what [`Self::ledger`] is for. The lossless numbers add up every chunk that was stored since the request began.
    pub fn fields(&self) -> [Field; 19] {
        let share = |tokens: usize, of: usize| tokens as f64 / of as f64;
        let last = self.decisions.last();
        let evicted = self.decisions.iter().rev().find(|traced| !traced.decision.dominated);
        let coded = self.coded.unwrap_or_default();
        // Without a decision every token was kept.
        let kept = |of: fn(&Traced) -> usize| last.map_or(1.0, |last| share(of(last), last.decision.tokens));
        let lossless = match self.coded {
            None => Some(1.0),
            Some(coded) => (coded.chunks > 0).then(|| coded.raw_bytes as f64 / coded.stored_bytes as f64),
        };
        let of = |column: &'static str, decimals, value: Option<f64>| {
            let key = match column {
                "h2o_keep" => "h2o_keep_ratio",
                "h2o_lossy" => "h2o_lossy_ratio",
                "h2o_lossless" => "h2o_lossless_ratio",
                other => other,
            };
            Field { column, key, decimals, value }
        };
        let total = |column, value: f64| of(column, 2, Some(value));
        [
            of("h2o_keep", 4, Some(evicted.map_or(1.0, |last| share(last.decision.kept, last.decision.tokens)))),
            of("h2o_lossy", 3, Some(evicted.map_or(1.0, |last| last.decision.lossy_ratio(self.token_bytes)))),
            of("h2o_lossless", 3, lossless),
            of("h2o_target_keep_effective", 4, Some(kept(|last| last.decision.target.max(last.decision.floor)))),
            of("h2o_floor_keep", 4, Some(kept(|last| last.decision.floor))),
            of("h2o_quantized_keep", 4, Some(kept(|last| last.decision.kept))),
            of("h2o_evict_us", 2, last.map(|last| last.plan_ns as f64 / US)),
            of("h2o_codec_us", 2, self.last_encode_ns.map(|ns| ns as f64 / US)),
            total("h2o_lossless_raw_mb", coded.raw_bytes as f64 / MIB),
            total("h2o_lossless_comp_mb", coded.stored_bytes as f64 / MIB),
            total("h2o_lossless_comp_us", coded.encode_ns as f64 / US),
            total("h2o_lossless_decomp_us", coded.decode_ns as f64 / US),
            total("h2o_lossless_fallback", coded.raw_chunks as f64),
            // There is neither a queue nor a cache of decoded chunks, so nothing ever waited in one.
            total("h2o_lossless_queue_peak", 0.0),
            total("h2o_lossless_backpressure_skip", 0.0),
            total("h2o_lossless_async_queue_peak", 0.0),
            total("h2o_lossless_async_wait_us", 0.0),
            total("h2o_lossless_decode_cache_hit", 0.0),
            total("h2o_lossless_decode_cache_miss", 0.0),
        ]
    }

    /// The reference's lines about decisions.
    pub fn decision_lines(&self) -> Vec<String> {
        let line = |traced: &Traced| {
            let Traced { layer, decision, plan_ns } = traced;
            let share = |tokens: usize| tokens as f64 / decision.tokens as f64;
            format!(
                "[H2O] layer={layer} kv={} keep_ratio={:.4} evict={} lossy_ratio={:.3} evict_us={:.2} reserve_pairs={} \
                 effective={:.4} floor={:.4} quantized={:.4} dominated={}",
                decision.tokens,
                share(decision.tokens - traced.evicted()),
                traced.evicted(),
                if decision.dominated { 1.0 } else { decision.lossy_ratio(self.token_bytes) },
                *plan_ns as f64 / US,
                decision.runs.len(),
                share(decision.target.max(decision.floor)),
                share(decision.floor),
                share(decision.kept),
                decision.dominated,
            )
        };
        self.decisions.iter().map(line).collect()
    }
}
