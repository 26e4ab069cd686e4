//! The cache without a model: keys, values and queries made up, and attention over what is left computed plainly beside it.

use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};
use gearbox_core::{
    AttentionStep, CacheGeometry, CacheView, Capabilities, Codec, Context, DType, ElemSet, EvictionPolicy,
    EvictionSession, KeepSet, LaneRef, LaneSpec, Needs, Pipeline, PipelineSpec, Plugin, Registry, Result, Role, Rope,
    RopePairing, RopeScaling, register_codec, register_eviction,
};
use gearbox_plugins as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::*;
use crate::element::widen;

mod tensors;

const Q_HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 4;

fn config() -> Config {
    Config {
        vocab_size: 50,
        hidden_size: Q_HEADS * DIM,
        intermediate_size: 8,
        layers: 1,
        q_heads: Q_HEADS,
        kv_heads: KV_HEADS,
        head_dim: DIM,
        context: 1000,
        rms_norm_eps: 1e-5,
        rope: Rope { pairing: RopePairing::HalfSplit, theta: 1e4, rotary_dim: DIM, scaling: RopeScaling::None },
        windows: vec![None],
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        tied_head: true,
        eos: Vec::new(),
    }
}

/// Keeps the first tokens and the newest ones; with `per_head`, heads after the first also drop every third position between.
#[derive(Debug)]
struct Thin(ThinConfig);

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct ThinConfig {
    sinks: u32,
    recent: u32,
    /// Tokens above the budget at which it acts.
    margin: u32,
    per_head: bool,
    /// Under which name probabilities are noted.
    note: String,
}

/// What a session was shown: note, positions, probabilities.
type Shown = (String, Vec<u32>, Vec<f32>);

static SHOWN: Mutex<Vec<Shown>> = Mutex::new(Vec::new());

impl Plugin for Thin {
    const ID: &'static str = "test-thin";
    const SUMMARY: &'static str = "first and newest tokens";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = ThinConfig;

    fn new(config: ThinConfig) -> Result<Self> {
        Ok(Self(config))
    }
}

impl EvictionPolicy for Thin {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!(self.0)
    }

    fn session(&self, _: &CacheGeometry) -> Result<Box<dyn EvictionSession>> {
        Ok(Box::new(ThinSession(self.0.clone())))
    }
}

struct ThinSession(ThinConfig);

impl EvictionSession for ThinSession {
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()> {
        let shown = (self.0.note.clone(), step.live.to_vec(), step.probabilities.to_vec());
        SHOWN.lock().unwrap().push(shown);
        Ok(())
    }

    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet> {
        let Self(ThinConfig { sinks, recent, margin, per_head, .. }) = self;
        let end = cache.seen as u32;
        let tokens = cache.tokens;
        if tokens as u32 <= *sinks + *recent + *margin {
            return Ok(KeepSet::All);
        }
        let kept = |row: &[u32]| -> Vec<u32> {
            let stays = |position: u32| position < *sinks || position + *recent >= end;
            (0..tokens as u32).filter(|slot| stays(row[*slot as usize])).collect()
        };
        let rows: Vec<Vec<u32>> = cache.live.chunks(tokens).map(kept).collect();
        if !*per_head {
            return Ok(KeepSet::Shared(rows[0].clone()));
        }
        // The second head trades the first sink for the newest token that is not kept yet.
        let row = &cache.live[cache.live.len() - tokens..];
        let mut other = kept(row);
        other.retain(|slot| row[*slot as usize] != 0);
        let missing = rows[0].len() - other.len();
        let spare: Vec<u32> = (0..tokens as u32).rev().filter(|slot| !other.contains(slot)).take(missing).collect();
        other.extend(spare);
        other.sort_unstable();
        Ok(KeepSet::PerHead(vec![rows[0].clone(), other]))
    }
}

register_eviction!(Thin);

/// Codes F32 whose low halves are zero, mixed with everything around the chunk: decoding is wrong unless it sees the same.
#[derive(Debug)]
struct Around;

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct AroundConfig {}

impl Around {
    fn pad(cx: &Context<'_>) -> u8 {
        let chunks = [cx.peer, cx.history].into_iter().flatten();
        let bytes = chunks.flat_map(|chunk| chunk.bytes().iter().copied());
        let ids = [cx.tokens, cx.history_tokens].into_iter().flatten().flatten().map(|id| *id as u8);
        let facts = [u8::from(cx.rope.is_some()), cx.first_token as u8, cx.role as u8];
        bytes.chain(ids).chain(facts).fold(1, |pad, byte| pad.wrapping_mul(31).wrapping_add(byte))
    }
}

impl Plugin for Around {
    const ID: &'static str = "test-around";
    const SUMMARY: &'static str = "looks at everything";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = AroundConfig;

    fn new(_: AroundConfig) -> Result<Self> {
        Ok(Self)
    }
}

impl Codec for Around {
    fn capabilities(&self) -> Capabilities {
        let needs = Needs { peer: true, history: true, ..Needs::NONE };
        Capabilities { needs, wants: Needs { tokens: true, rope: true, ..needs }, ..Capabilities::new(ElemSet::ALL) }
    }

    fn config(&self) -> Value {
        json!({})
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        lane.byte_len()
    }

    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        assert_eq!((cx.history.is_some(), cx.peer.is_some()), (true, cx.role == Role::Value));
        for element in lane.bytes().chunks(4) {
            assert_eq!(element[..2], [0, 0]);
            out.extend(element[2..].iter().map(|byte| byte ^ Self::pad(cx)));
        }
        Ok(())
    }

    fn decode(&self, encoded: &[u8], _: &LaneSpec, cx: &Context<'_>, out: &mut [u8]) -> Result<()> {
        for (element, encoded) in out.chunks_mut(4).zip(encoded.chunks(2)) {
            element.copy_from_slice(&[0, 0, encoded[0] ^ Self::pad(cx), encoded[1] ^ Self::pad(cx)]);
        }
        Ok(())
    }
}

register_codec!(Around);

/// Multiples of 1/32 without order from -1.5 to 1.5.
struct Noise(u32);

impl Noise {
    fn take(&mut self, count: usize) -> Vec<f32> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((self.0 >> 8) % 97) as f32 / 32.0 - 1.5
        };
        (0..count).map(|_| next()).collect()
    }
}

/// A cache of one layer beside everything it was ever given.
struct Pair {
    cache: Cache,
    dtype: DType,
    window: Option<usize>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Of the last step, computed plainly: `(tokens, q_heads, live)`.
    probabilities: Vec<f32>,
    noise: Noise,
}

fn options(pipeline: Option<Value>, dtype: DType) -> CacheOptions {
    let build = |value: Value| {
        let spec: PipelineSpec = gearbox_core::config::from_value(&value).unwrap();
        Arc::new(Pipeline::build(&spec, &Registry::built_in().unwrap()).unwrap())
    };
    CacheOptions { dtype, pipeline: pipeline.map(build), residual: 4, chunk: Some(8), ..CacheOptions::default() }
}

/// The ids of some tokens.
fn ids(positions: std::ops::Range<usize>) -> Vec<u32> {
    positions.map(|position| (position * position % 50) as u32).collect()
}

impl Pair {
    fn new(pipeline: Option<Value>, dtype: DType, window: Option<usize>) -> Self {
        let cache = Cache::new(&config(), &options(pipeline, dtype)).unwrap();
        Self { cache, dtype, window, keys: Vec::new(), values: Vec::new(), probabilities: Vec::new(), noise: Noise(7) }
    }

    /// Runs a step and compares what attention gave with attention over the tokens that were left, computed plainly.
    fn step(&mut self, tokens: usize) {
        let first = self.cache.seen();
        let row = KV_HEADS * DIM;
        let (query, new) = (self.noise.take(tokens * Q_HEADS * DIM), [0; 2].map(|_| self.noise.take(tokens * row)));
        for (all, new) in [&mut self.keys, &mut self.values].into_iter().zip(&new) {
            let mut bytes = Vec::new();
            narrow(self.dtype, new, &mut bytes).unwrap();
            let mut rounded = vec![0.0; new.len()];
            widen(self.dtype, &bytes, &mut rounded);
            all.extend(rounded);
        }
        let mut live = self.cache.layers[0].positions.flat();
        let rows = self.cache.layers[0].positions.rows();
        let tensor = |values: &[f32], heads| Tensor::from_slice(values, (tokens, heads, DIM), &Device::Cpu).unwrap();
        self.cache.begin(&ids(first..first + tokens)).unwrap();
        let given = [&tensor(&query, Q_HEADS), &tensor(&new[0], KV_HEADS), &tensor(&new[1], KV_HEADS)];
        let output = values(&self.cache.attend(0, self.window, given).unwrap()).unwrap();
        self.cache.end(1, 0);
        let before = live.len() / rows;
        let visible: Vec<Vec<usize>> = (0..KV_HEADS)
            .map(|head| {
                let row = head.min(rows - 1) * before;
                let kept = live[row..row + before].iter().map(|position| *position as usize);
                kept.chain(first..first + tokens).collect()
            })
            .collect();
        live.clear();
        self.probabilities.clear();
        for token in 0..tokens {
            for head in 0..Q_HEADS {
                let kv = head / (Q_HEADS / KV_HEADS);
                let at = |position: usize| (position * KV_HEADS + kv) * DIM;
                let query = &query[(token * Q_HEADS + head) * DIM..][..DIM];
                let seen = visible[kv].iter().copied().filter(|position| {
                    *position <= first + token && self.window.is_none_or(|window| first + token - position < window)
                });
                let weighted: Vec<(usize, f64)> = seen
                    .map(|position| {
                        let key = &self.keys[at(position)..][..DIM];
                        let score: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                        (position, (score / (DIM as f64).sqrt()).exp())
                    })
                    .collect();
                let total: f64 = weighted.iter().map(|(_, weight)| weight).sum();
                let mut weights = weighted.iter().peekable();
                self.probabilities.extend(visible[kv].iter().map(|position| {
                    weights.next_if(|(seen, _)| seen == position).map_or(0.0, |(_, weight)| (weight / total) as f32)
                }));
                for channel in 0..DIM {
                    let value = |position: usize| f64::from(self.values[at(position) + channel]);
                    let expected: f64 =
                        weighted.iter().map(|(position, weight)| weight / total * value(*position)).sum();
                    let got = output[(token * Q_HEADS + head) * DIM + channel];
                    // A few roundings of F32 in sums of values below 1.5.
                    assert!(
                        (f64::from(got) - expected).abs() < 2e-6,
                        "token {}, head {head}: {got}, {expected}",
                        first + token
                    );
                }
            }
        }
    }

    fn run(&mut self) {
        for tokens in [23, 17, 1, 1, 1, 30, 1] {
            self.step(tokens);
        }
        for _ in 0..40 {
            self.step(1);
        }
    }

    fn live(&self) -> Vec<u32> {
        self.cache.live(0)
    }
}

fn coded(codec: &Value, evict: Option<Value>) -> Value {
    let mut route = json!({ "codec": codec });
    if let Some(evict) = evict {
        route["evict"] = evict;
    }
    json!({ "routes": [route] })
}

fn thin(margin: u32, per_head: bool) -> Value {
    json!({ "id": "test-thin", "sinks": 3, "recent": 20, "margin": margin, "per_head": per_head })
}

#[test]
fn attention_reads_what_was_appended() {
    let codec = json!({ "id": "planes" });
    for dtype in DType::ALL {
        for window in [None, Some(10)] {
            for pipeline in [None, Some(coded(&codec, None))] {
                let mut pair = Pair::new(pipeline, dtype, window);
                pair.run();
                assert_eq!(pair.live(), (0..114).collect::<Vec<u32>>());
            }
        }
    }
}

#[test]
fn attention_over_kept_tokens_is_masked_dense_attention() {
    for codec in ["store", "zstd", "planes", "gear-delta"] {
        let codec = json!({ "id": codec });
        for margin in [0, 6] {
            for window in [None, Some(10)] {
                let mut pair = Pair::new(Some(coded(&codec, Some(thin(margin, false)))), DType::F16, window);
                pair.run();
                let live = pair.live();
                assert_eq!(live[..3], [0, 1, 2]);
                assert!((23..=23 + margin as usize).contains(&live.len()), "{live:?}");
                assert_eq!(live[live.len() - 20..], (94..114).collect::<Vec<u32>>());
            }
        }
    }
}

#[test]
fn heads_may_keep_different_tokens() {
    for codec in ["store", "planes"] {
        for margin in [0, 6] {
            for window in [None, Some(10)] {
                let evict = Some(thin(margin, true));
                let mut pair = Pair::new(Some(coded(&json!({ "id": codec }), evict)), DType::F16, window);
                pair.run();
                let live = pair.live();
                let (first, second) = live.split_at(live.len() / 2);
                assert_eq!((first[0], second[0]), (0, 1), "{live:?}");
                assert!(first.is_sorted() && second.is_sorted() && first.len() < 30);
            }
        }
    }
}

#[test]
fn plugins_that_look_around_code_chunks_with_gaps() {
    for evict in [None, Some(thin(0, false)), Some(thin(3, false)), Some(thin(3, true))] {
        let mut pair = Pair::new(Some(coded(&json!({ "id": "test-around" }), evict.clone())), DType::F32, None);
        pair.run();
        let bytes = pair.cache.ledger().layers[0].bytes;
        // 114 or 23 to 26 tokens of 64 bytes; chunks take half.
        assert!(
            bytes.payload > 0 && bytes.payload + bytes.tail < if evict.is_none() { 4500 } else { 26 * 64 },
            "{bytes:?}"
        );
        let mut route = json!({ "transforms": [{ "id": "token-ref" }], "codec": { "*": { "id": "zstd" } } });
        if let Some(evict) = evict {
            route["evict"] = evict;
        }
        Pair::new(Some(json!({ "routes": [route] })), DType::F16, None).run();
    }
}

#[test]
fn probabilities_are_true_ones() {
    let evict = json!({ "id": "test-thin", "sinks": 3, "recent": 20, "per_head": true, "note": "probabilities" });
    let mut pair = Pair::new(Some(coded(&json!({ "id": "store" }), Some(evict))), DType::F32, None);
    let steps = [23, 17, 1, 5];
    for tokens in steps {
        pair.step(tokens);
    }
    let shown = SHOWN.lock().unwrap();
    let shown: Vec<_> = shown.iter().filter(|(note, ..)| note == "probabilities").collect();
    assert_eq!(shown.len(), steps.len());
    for ((_, live, probabilities), tokens) in shown.into_iter().zip(steps) {
        let width = probabilities.len() / (tokens * Q_HEADS);
        assert!(live.len() == width || live.len() == KV_HEADS * width);
        for (row, probabilities) in probabilities.chunks(width).enumerate() {
            let sum: f32 = probabilities.iter().sum();
            assert!((sum - 1.0).abs() < 1e-5, "{sum}");
            // Rows go by query, then by head: the last query sees all, the first ones nothing behind them.
            let behind = tokens - 1 - row / Q_HEADS;
            assert!(probabilities[width - behind..].iter().all(|probability| *probability == 0.0));
            assert!(probabilities[..width - behind].iter().all(|probability| *probability > 0.0));
        }
    }
}

#[test]
fn memory_is_given_back() {
    let mut pair = Pair::new(Some(coded(&json!({ "id": "zstd" }), Some(thin(0, false)))), DType::F16, None);
    pair.step(400);
    let peak = pair.cache.ledger().usage.peak;
    assert!(peak >= 400 * 32, "{peak}");
    let ledger = pair.cache.ledger();
    let layer = ledger.layers[0];
    assert_eq!((layer.seen, layer.live), (400, 23));
    let bytes = layer.bytes;
    // 23 tokens of 32 bytes; the structs of three small chunks outweigh them.
    assert!(bytes.payload + bytes.tail <= 23 * 32, "{bytes:?}");
    assert_eq!(bytes.positions, 23 * 4);
    assert_eq!(ledger.usage.now, layer.bytes.total());
    assert!(ledger.usage.now < peak / 4, "{ledger:?}");
}

#[test]
fn wrong_keep_sets_are_refused() {
    let lists = |keep| keep_lists(keep, 4, 2).map_err(|error| error.to_string());
    assert_eq!(lists(KeepSet::All), Ok(None));
    assert_eq!(lists(KeepSet::Shared(vec![0, 1, 2, 3])), Ok(None));
    assert_eq!(lists(KeepSet::Shared(vec![1, 3])), Ok(Some(vec![vec![1, 3]])));
    assert_eq!(lists(KeepSet::Shared(Vec::new())), Ok(Some(vec![Vec::new()])));
    assert!(lists(KeepSet::Shared(vec![1, 4])).unwrap_err().contains("below the 4"));
    assert!(lists(KeepSet::Shared(vec![1, 1])).unwrap_err().contains("ascending"));
    assert!(lists(KeepSet::PerHead(vec![vec![1]])).unwrap_err().contains("2 KV heads, got 1"));
    assert!(lists(KeepSet::PerHead(vec![vec![1], vec![]])).unwrap_err().contains("got 1 and 0"));
}
