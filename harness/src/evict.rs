//! Offline replay of eviction policies over dumps that hold queries.
//!
//! The tokens of a run pass through each layer in steps, as in a decoder: they are appended, their queries attend to what is live, the policy
//! is shown the probabilities and plans, and what it does not keep is gone for all later queries. Keys, values and queries are those of the
//! dump, which full attention made. So the errors of one layer do not reach the next, as they would in a model, and the numbers are a lower
//! bound of what eviction does to it.
//!
//! The policies are those that a live decoder runs, and see what they would see there.

use gearbox_core::{
    AttentionStep, CacheGeometry, CacheView, Chunk, Error, EvictionPolicy, KeepSet, LiveTokens, Result, ResultExt,
};
use serde::Serialize;
use serde_json::Value;

use crate::dump::{Dump, Layer, Mapped, Run, Tensor};
use crate::metrics::attention::{KeptAttention, KeptError, KeptSums};
use crate::metrics::error::worst;

/// How a replay goes.
#[derive(Clone, Copy, Debug)]
pub struct ReplayOptions {
    /// Most tokens of a step, at least 1: entries of more tokens come in several, with a plan after each.
    pub step: usize,
}

impl Default for ReplayOptions {
    fn default() -> Self {
        Self { step: 256 }
    }
}

/// One query head of one layer of one run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeadReplay {
    /// Name of the run.
    pub run: String,
    /// Layer of the model.
    pub layer: u32,
    /// Query head.
    pub head: usize,
    /// Its error.
    #[serde(flatten)]
    pub error: KeptError,
}

/// One layer of one run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerReplay {
    /// Name of the run.
    pub run: String,
    /// Layer of the model.
    pub layer: u32,
    /// Tokens of the run.
    pub tokens: u64,
    /// Tokens that each head holds after the last plan.
    pub kept: usize,
    /// Most tokens that each head held while queries attended.
    pub peak: usize,
    /// Plans that evicted.
    pub evictions: usize,
    /// Over all query heads.
    #[serde(flatten)]
    pub error: KeptError,
}

/// What a replay found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Replay {
    /// The policy with its settings, every default filled in.
    pub policy: Value,
    /// Over everything.
    pub all: KeptError,
    /// Tokens kept ÷ tokens, at the end, over all layers.
    pub kept_fraction: f64,
    /// The head with the highest output error; the first of equal ones.
    pub worst: Option<HeadReplay>,
    /// Each layer.
    pub layers: Vec<LayerReplay>,
    /// Each query head.
    pub heads: Vec<HeadReplay>,
}

/// Replays a policy over all layers of dumps, one after the other, in parallel over heads and queries on the thread pool of the caller.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if a layer lacks queries or does not begin at position 0 and go on
/// without gaps; what the policy reports; keep sets that are not well formed.
pub fn replay(id: &str, policy: &dyn EvictionPolicy, dumps: &[Dump], options: ReplayOptions) -> Result<Replay> {
    if options.step == 0 {
        return Err(Error::invalid_config("expected steps of at least 1 token, got 0"));
    }
    let (mut layers, mut heads, mut all) = (Vec::new(), Vec::new(), KeptSums::default());
    for run in dumps.iter().flat_map(|dump| &dump.runs) {
        let count = run.layers.last().map_or(0, |layer| layer.id.saturating_add(1));
        for layer in &run.layers {
            let played = play(policy, layer, count, options.step);
            let (row, sums) = played.context(|| format!("run `{}`, layer {}", run.name, layer.id))?;
            let mut total = KeptSums::default();
            for (head, sums) in sums.iter().enumerate() {
                total.merge(sums);
                heads.push(HeadReplay { run: run.name.clone(), layer: layer.id, head, error: sums.error() });
            }
            all.merge(&total);
            layers.push(row.named(run, layer, &total));
        }
    }
    let (kept, tokens) =
        layers.iter().fold((0, 0), |(kept, tokens), row| (kept + row.kept as u64, tokens + row.tokens));
    let mut settings = policy.config();
    if let Value::Object(map) = &mut settings {
        map.insert("id".into(), id.into());
    }
    Ok(Replay {
        policy: settings,
        all: all.error(),
        kept_fraction: kept as f64 / tokens.max(1) as f64,
        worst: worst(heads.iter(), |head| head.error.output_error).cloned(),
        layers,
        heads,
    })
}

/// What became of the tokens of a layer.
#[derive(Default)]
struct Held {
    tokens: u64,
    kept: usize,
    peak: usize,
    evictions: usize,
}

impl Held {
    fn named(self, run: &Run, layer: &Layer, sums: &KeptSums) -> LayerReplay {
        let Self { tokens, kept, peak, evictions } = self;
        LayerReplay { run: run.name.clone(), layer: layer.id, tokens, kept, peak, evictions, error: sums.error() }
    }
}

fn play(policy: &dyn EvictionPolicy, layer: &Layer, layers: u32, step: usize) -> Result<(Held, Vec<KeptSums>)> {
    let map = |tensor: fn(&crate::dump::Entry) -> Option<&Tensor>| -> Result<Vec<(Tensor, Mapped)>> {
        let tensors = layer.entries.iter().map(|entry| {
            tensor(entry).ok_or_else(|| Error::invalid_input("expected queries in every entry").context(&entry.place))
        });
        tensors.map(|tensor| tensor.and_then(|tensor| Ok((tensor.clone(), tensor.map()?)))).collect()
    };
    let mut end = 0;
    for entry in &layer.entries {
        if entry.start != end {
            let message = format!("expected tokens from {end} on, got {}", entry.start);
            return Err(Error::invalid_input(message).context(&entry.place));
        }
        end = entry.end();
    }
    let (keys, values, queries) =
        (map(|entry| Some(&entry.key))?, map(|entry| Some(&entry.value))?, map(|entry| entry.query.as_ref())?);
    let queries = chunks(&queries)?;
    let shape = queries.first().ok_or_else(|| Error::invalid_input("expected entries, got none"))?.shape();
    let attention = KeptAttention::new(&chunks(&keys)?, &chunks(&values)?, shape.heads, layer.facts.attention)?;
    let kv_heads = attention.kv_heads();
    let geometry = CacheGeometry { layer: layer.id, layers, q_heads: shape.heads, kv_heads, dim: shape.dim };
    let mut session = policy.session(&geometry)?;
    let mut cache = LiveTokens::default();
    let (mut held, mut sums) = (Held { tokens: end, ..Held::default() }, vec![KeptSums::default(); shape.heads]);
    for entry in queries {
        let seq = entry.shape().seq;
        for start in (0..seq).step_by(step) {
            let queries = entry.tokens(start..seq.min(start + step));
            let count = queries.shape().seq;
            let first_query = cache.view().seen;
            cache.append(count);
            let view = cache.view();
            held.peak = held.peak.max(view.tokens);
            let (probabilities, found) = attention.attend(queries, first_query as usize, |head| view.row(head))?;
            sums.iter_mut().zip(&found).for_each(|(sums, found)| sums.merge(found));
            let CacheView { tokens, live, .. } = view;
            let step = AttentionStep { first_query, queries: count, tokens, live, probabilities: &probabilities };
            session.observe(&step)?;
            let keep = session.plan(&view)?;
            keep.check(tokens, kv_heads)?;
            held.evictions += usize::from(keep.kept(tokens) < tokens);
            cache.keep(&keep, kv_heads);
        }
    }
    held.kept = cache.view().tokens;
    Ok((held, sums))
}

fn chunks(mapped: &[(Tensor, Mapped)]) -> Result<Vec<Chunk<'_>>> {
    mapped.iter().map(|(tensor, bytes)| Chunk::new(tensor.shape, tensor.dtype, bytes)).collect()
}

/// What a policy decides about so many tokens of which these probabilities are known, one per token, for all heads alike.
///
/// Two queries at the end of the sequence attend to all tokens that they can see.
///
/// # Errors
/// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if there is not one score per token; what the policy reports.
pub fn decide(policy: &dyn EvictionPolicy, geometry: &CacheGeometry, tokens: usize, scores: &[f32]) -> Result<KeepSet> {
    if scores.len() != tokens {
        return Err(Error::shape(format!("expected {tokens} scores, got {}", scores.len())));
    }
    let mut session = policy.session(geometry)?;
    let mut cache = LiveTokens::default();
    cache.append(tokens);
    let view = cache.view();
    let first = tokens.saturating_sub(2);
    let mut probabilities = Vec::new();
    for visible in first + 1..=tokens {
        for _ in 0..geometry.q_heads {
            probabilities.extend_from_slice(&scores[..visible]);
            probabilities.resize(probabilities.len() + tokens - visible, 0.0);
        }
    }
    let CacheView { live, .. } = view;
    let (first_query, queries) = (first as u64, tokens - first);
    session.observe(&AttentionStep { first_query, queries, tokens, live, probabilities: &probabilities })?;
    let keep = session.plan(&view)?;
    keep.check(tokens, geometry.kv_heads)?;
    Ok(keep)
}
