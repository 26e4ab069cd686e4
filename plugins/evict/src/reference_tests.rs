//! The reference's own numbers, and decisions worked out by hand.

use gearbox_core::{EvictionPolicy, Plugin, config};
use serde_json::json;

use super::*;
use crate::h2o::H2o;

/// Tokens, block, sinks, recent tokens, what is to stay; floor, target, kept, dominated, tokens ÷ kept.
type Row = (usize, usize, usize, usize, Keep, usize, usize, usize, bool, f64);

/// Rows that the replay of the reference's rules gave, which its own logs agree with.
const DECISIONS: [Row; 17] = [
    (513, 32, 16, 64, Keep::Ratio(3.0), 97, 171, 193, false, 2.6580),
    (513, 32, 16, 64, Keep::Ratio(3.2), 97, 161, 161, false, 3.1863),
    (513, 32, 16, 64, Keep::Ratio(3.4), 97, 151, 161, false, 3.1863),
    (513, 16, 16, 64, Keep::Ratio(3.0), 81, 171, 177, false, 2.8983),
    (513, 8, 16, 64, Keep::Ratio(3.4), 81, 151, 153, false, 3.3529),
    (513, 32, 16, 96, Keep::Ratio(3.5), 129, 147, 161, false, 3.1863),
    (520, 32, 16, 96, Keep::Ratio(3.5), 136, 149, 168, false, 3.0952),
    (384, 32, 16, 64, Keep::Ratio(3.2), 96, 120, 128, false, 3.0000),
    (384, 32, 16, 96, Keep::Ratio(3.5), 128, 110, 128, true, 3.0000),
    (449, 32, 16, 96, Keep::Ratio(3.5), 129, 129, 129, true, 3.4806),
    (875, 32, 16, 96, Keep::Ratio(3.5), 139, 251, 267, false, 3.2772),
    (1025, 32, 16, 64, Keep::Ratio(3.2), 97, 321, 321, false, 3.1931),
    (1025, 32, 16, 96, Keep::Ratio(3.5), 129, 293, 321, false, 3.1931),
    (513, 64, 32, 256, Keep::Ratio(3.0), 321, 171, 321, true, 1.5981),
    (513, 32, 16, 96, Keep::Fraction(0.35), 129, 180, 193, false, 2.6580),
    (513, 32, 16, 96, Keep::Fraction(0.40), 129, 206, 225, false, 2.2800),
    (512, 32, 0, 0, Keep::Ratio(4.0), 0, 128, 128, false, 4.0000),
];

#[test]
fn decisions_are_those_of_the_reference() {
    for (tokens, block, sinks, recent, keep, floor, target, kept, dominated, ratio) in DECISIONS {
        let decision = Rules { block, sinks, recent, keep }.decide(tokens, &[]);
        let got = (decision.floor, decision.target, decision.kept, decision.dominated);
        assert_eq!(got, (floor, target, kept, dominated), "{tokens} {block} {sinks} {recent} {keep:?}");
        assert_eq!(format!("{:.4}", tokens as f64 / kept as f64), format!("{ratio:.4}"));
        assert_eq!(decision.runs.iter().map(|run| run.1).sum::<usize>(), kept);
    }
}

#[test]
fn lengths_at_which_the_floor_dominates_are_those_of_the_reference() {
    let dominated = |rules: Rules, from: usize, to: usize| {
        let is = |tokens: &usize| rules.decide(*tokens, &[]).dominated;
        let lengths: Vec<usize> = (from..to).filter(is).collect();
        let ranges = lengths.chunk_by(|a, b| a + 1 == *b).map(|run| (run[0], run[run.len() - 1]));
        ranges.collect::<Vec<_>>()
    };
    let last = Rules { block: 32, sinks: 16, recent: 96, keep: Keep::Ratio(3.5) };
    assert_eq!(dominated(last, 384, 2048), [(384, 479), (493, 511), (538, 543)]);
    let defaults = Rules { block: 64, sinks: 32, recent: 256, keep: Keep::Ratio(3.0) };
    assert_eq!(dominated(defaults, 512, 2048), [(512, 1023), (1056, 1087)]);
    let third = Rules { block: 32, sinks: 16, recent: 64, keep: Keep::Ratio(3.2) };
    assert_eq!(dominated(third, 384, 2048), []);
}

#[test]
fn the_best_blocks_stay_and_of_equal_ones_the_first() {
    let rules = Rules { block: 4, sinks: 1, recent: 2, keep: Keep::Ratio(2.0) };
    // Six blocks, the last of two tokens: 4 + 2 of the floor, 11 wanted, so two blocks more.
    let runs = |scores: &[f64]| rules.decide(22, scores).runs;
    assert_eq!(runs(&[0.0, 0.1, 0.9, 0.1, 0.5, 0.0]), [(0, 4), (8, 4), (16, 6)]);
    assert_eq!(runs(&[0.0; 6]), [(0, 12), (20, 2)]);
    assert_eq!(runs(&[0.0, f64::NAN, 0.1, 0.0, f64::INFINITY, 0.0]), [(0, 4), (8, 8), (20, 2)]);
    assert_eq!(
        rules.decide(0, &[]),
        Decision { tokens: 0, floor: 0, target: 1, kept: 0, dominated: false, runs: vec![] }
    );
    assert_eq!(rules.decide(1, &[]).runs, [(0, 1)]);
}

/// What a request of the reference's benchmark comes to.
struct Request {
    /// The ratio that its log shows: that of the last eviction of any layer.
    lossy: f64,
    /// Tokens that a layer holds, over layers and steps.
    held: f64,
    /// Tokens seen ÷ tokens held, when the last token is about to be appended.
    end_ratio: f64,
}

const LAYERS: u32 = 32;
const STEPS: usize = 128;

/// Replays a request of a model of 32 layers, every token alike.
fn replay(settings: &serde_json::Value, prompt: usize) -> Request {
    let policy = H2o::new(config::from_value(settings).unwrap()).unwrap();
    let rules = policy.rules().unwrap();
    // Heads and channels of the reference's model; one head stands for all.
    let token_bytes = 2 * 32 * 128 * 4;
    let of = |layer| CacheGeometry { layer, layers: LAYERS, q_heads: 1, kv_heads: 1, dim: 128 };
    let mut layers: Vec<_> = (0..LAYERS)
        .map(|layer| (policy.session(&of(layer)).unwrap(), (0..prompt as u32).collect::<Vec<_>>()))
        .collect();
    for (session, live) in &mut layers {
        let probabilities = vec![0.0; prompt * prompt];
        let step =
            AttentionStep { first_query: 0, queries: prompt, tokens: prompt, live, probabilities: &probabilities };
        session.observe(&step).unwrap();
        let cache = CacheView { seen: prompt as u64, tokens: prompt, live };
        assert_eq!(session.plan(&cache).unwrap(), KeepSet::All, "prefill never evicts");
    }
    let (mut lossy, mut held, mut end) = (1.0, 0, 0);
    for step in 0..STEPS {
        end = layers.iter().map(|(_, live)| live.len()).sum();
        for (session, live) in &mut layers {
            let position = prompt + step;
            live.push(position as u32);
            let tokens = live.len();
            held += tokens;
            let probabilities = vec![1.0 / tokens as f32; tokens];
            let first_query = position as u64;
            let attention = AttentionStep { first_query, queries: 1, tokens, live, probabilities: &probabilities };
            session.observe(&attention).unwrap();
            let cache = CacheView { seen: first_query + 1, tokens, live };
            let keep = session.plan(&cache).unwrap();
            keep.check(tokens, 1).unwrap();
            if keep != KeepSet::All {
                let decision = rules.decide(tokens, &[]);
                assert_eq!(keep.kept(tokens), decision.kept);
                lossy = decision.lossy_ratio(token_bytes);
            }
            *live = keep.positions(&cache, 1);
        }
    }
    let (layers, seen) = (f64::from(LAYERS), (prompt + STEPS - 1) as f64);
    Request { lossy, held: held as f64 / layers / STEPS as f64, end_ratio: seen * layers / end as f64 }
}

/// The rows of the last revision without its leak. Earlier revisions shared one plan among all layers, which no policy here does.
#[test]
fn whole_requests_are_those_of_the_reference() {
    let settings = json!({
        "mode": "reference", "block_tokens": 32, "sinks": 16, "recent_tokens": 96, "target_ratio": 3.5,
        "min_tokens": 384, "update_interval": 16, "layers": "2..32",
    });
    for (prompt, lossy, held, mean_ratio, end_ratio) in
        [(512, "3.0000", "268", "2.15", "2.07"), (1024, "3.4210", "455", "2.39", "2.44")]
    {
        let request = replay(&settings, prompt);
        assert_eq!(format!("{:.4}", request.lossy), lossy);
        assert_eq!(format!("{:.0}", request.held), held);
        let dense = prompt as f64 + (STEPS + 1) as f64 / 2.0;
        assert_eq!(format!("{:.2}", dense / request.held), mean_ratio);
        assert_eq!(format!("{:.2}", request.end_ratio), end_ratio);
    }
    // The engine's defaults: the floor dominates at every length that a prompt of 512 tokens reaches.
    assert!(replay(&json!({ "mode": "reference" }), 512).end_ratio.to_bits() == 1f64.to_bits());
}

/// The order in which the layers of a prompt of 512 tokens are first compacted: two in the first token, and then a pair in each.
#[test]
fn the_clock_counts_calls_of_all_layers() {
    let settings = json!({
        "mode": "reference", "block_tokens": 32, "sinks": 16, "recent_tokens": 64, "target_ratio": 3.2, "min_tokens": 384,
    });
    let policy = H2o::new(config::from_value(&settings).unwrap()).unwrap();
    let first = |layer: u32| {
        let geometry = CacheGeometry { layer, layers: LAYERS, q_heads: 1, kv_heads: 1, dim: 1 };
        let mut session = policy.session(&geometry).unwrap();
        let (live, zeros): (Vec<u32>, _) = ((0..600).collect(), vec![0.0; 512 * 600]);
        let of = |first_query, queries, tokens| AttentionStep {
            first_query,
            queries,
            tokens,
            live: &live[..tokens],
            probabilities: &zeros[..queries * tokens],
        };
        session.observe(&of(0, 512, 512)).unwrap();
        (0..40).find(|token| {
            let tokens = 513 + token;
            session.observe(&of(tokens as u64 - 1, 1, tokens)).unwrap();
            let cache = CacheView { seen: tokens as u64, tokens, live: &live[..tokens] };
            session.plan(&cache).unwrap() != KeepSet::All
        })
    };
    let first: Vec<_> = (0..LAYERS).map(first).collect();
    let mut expected = vec![None; LAYERS as usize];
    (expected[15], expected[31], expected[16], expected[17]) = (Some(0), Some(0), Some(1), Some(15));
    for (token, layer) in (2..).zip(2..15) {
        (expected[layer], expected[layer + 16]) = (Some(token), Some(token));
    }
    assert_eq!(first, expected);
}

/// Two tiles: in the first the greatest probability so far is 0.1, in the second 0.4.
#[test]
fn weights_are_relative_to_the_greatest_so_far() {
    let geometry = CacheGeometry { layer: 0, layers: 1, q_heads: 2, kv_heads: 1, dim: 1 };
    let rules = Rules { block: 32, sinks: 0, recent: 0, keep: Keep::Ratio(2.0) };
    let clock = Clock { layers: LayerRange::default(), min_tokens: 1, interval: 1 };
    let mut session = Reference::new(rules, clock, 0.5, &geometry).unwrap();
    let live: Vec<u32> = (0..96).collect();
    let mut probabilities = vec![0.0; 192];
    (probabilities[3], probabilities[40], probabilities[70]) = (0.1, 0.05, 0.4);
    // Of the second head only a later tile sees anything.
    probabilities[96 + 95] = 1.0;
    let step = AttentionStep { first_query: 95, queries: 1, tokens: 96, live: &live, probabilities: &probabilities };
    session.observe(&step).unwrap();
    // Half of the past, which is nothing, and half of the mean over two heads.
    assert_eq!(session.scores, [0.25, 0.125, 0.5]);
    session.observe(&step).unwrap();
    assert_eq!(session.scores, [0.375, 0.1875, 0.75]);
    let cache = CacheView { seen: 96, tokens: 96, live: &live };
    let keep: Vec<u32> = (0..32).chain(64..96).collect();
    assert_eq!(session.plan(&cache).unwrap(), KeepSet::Shared(keep));
    assert_eq!(session.scores, [0.375, 0.75], "scores follow their blocks");
}

#[test]
fn session_tells_what_its_last_plan_decided() {
    let settings = json!({
        "mode": "reference", "block_tokens": 4, "sinks": 4, "recent_tokens": 4, "target_ratio": 2.0, "min_tokens": 16,
        "update_interval": 1, "layers": "..",
    });
    let policy = H2o::new(config::from_value(&settings).unwrap()).unwrap();
    let geometry = CacheGeometry { layer: 0, layers: 1, q_heads: 1, kv_heads: 1, dim: 8 };
    let mut session = policy.reference(&geometry).unwrap().unwrap();
    let mut plan = |first: u64, queries: usize, tokens: usize| {
        let live: Vec<u32> = (0..tokens as u32).collect();
        let probabilities = vec![0.0; queries * tokens];
        let step = AttentionStep { first_query: first, queries, tokens, live: &live, probabilities: &probabilities };
        session.observe(&step).unwrap();
        let keep = session.plan(&CacheView { seen: first + queries as u64, tokens, live: &live }).unwrap();
        (keep.kept(tokens), session.decision().cloned())
    };
    assert_eq!(plan(0, 19, 19), (19, None), "prefill decides nothing");
    let (kept, decision) = plan(19, 1, 20);
    let decision = decision.unwrap();
    assert_eq!((kept, decision.tokens, decision.floor, decision.kept), (12, 20, 8, 12));
    assert_eq!(plan(20, 1, 13), (13, None), "below the trigger");
    let default = H2o::new(config::from_value(&json!({})).unwrap()).unwrap();
    assert!(default.reference(&geometry).unwrap().is_none());
}
