//! What holds of every policy under any settings, attention and order of steps.

use std::sync::Arc;

use gearbox_core::{AttentionStep, CacheGeometry, CacheView, EvictionPolicy, KeepSet, LiveTokens, Registry};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::reference::{Keep, Rules};

const IDS: [&str; 5] = ["h2o", "snapkv", "tova", "window", "random"];

fn build(id: &str, settings: &Value) -> Arc<dyn EvictionPolicy> {
    Registry::built_in().unwrap().eviction(id).unwrap().build(settings).unwrap()
}

#[derive(Clone, Debug)]
struct Trial {
    id: &'static str,
    settings: Value,
    geometry: CacheGeometry,
    steps: Vec<usize>,
    probabilities: Vec<f32>,
}

impl Trial {
    fn policy(&self) -> Arc<dyn EvictionPolicy> {
        build(self.id, &self.settings)
    }
}

fn trials() -> impl Strategy<Value = Trial> {
    let number = prop_oneof![
        8 => 0.0..1.0_f32,
        2 => Just(0.0_f32),
        1 => Just(f32::NAN),
        1 => Just(f32::INFINITY),
    ];
    let settings = (0..IDS.len(), 0..6_u32, 8..20_u32, 0..5_u32, prop::bool::ANY);
    let steps = prop::collection::vec(1..9_usize, 1..12);
    let geometry = (1..3_usize, 1..4_usize);
    (settings, geometry, steps, prop::collection::vec(number, 64..257)).prop_map(
        |((id, sinks, budget, margin, by_ratio), (kv_heads, group), steps, probabilities)| {
            let id = IDS[id];
            let mut settings = json!({ "sinks": sinks, "margin_tokens": margin, "min_tokens": 20 });
            if id != "window" {
                settings["recent_tokens"] = json!(2);
            }
            if by_ratio {
                settings["target_ratio"] = json!(20.0 / f64::from(budget));
            } else {
                settings["budget_tokens"] = json!(budget);
            }
            let geometry = CacheGeometry { layer: 1, layers: 3, q_heads: kv_heads * group, kv_heads, dim: 4 };
            Trial { id, settings, geometry, steps, probabilities }
        },
    )
}

/// Plays a request, and hands each plan to `look` with the cache before and after it.
fn play(trial: &Trial, mut look: impl FnMut(&LiveTokens, &KeepSet, &LiveTokens)) {
    let mut session = trial.policy().session(&trial.geometry).unwrap();
    let mut numbers = trial.probabilities.iter().copied().cycle();
    let mut cache = LiveTokens::default();
    for queries in &trial.steps {
        let first_query = cache.view().seen;
        cache.append(*queries);
        let CacheView { tokens, live, .. } = cache.view();
        let probabilities: Vec<f32> = numbers.by_ref().take(queries * trial.geometry.q_heads * tokens).collect();
        let step = AttentionStep { first_query, queries: *queries, tokens, live, probabilities: &probabilities };
        session.observe(&step).unwrap();
        let keep = session.plan(&cache.view()).unwrap();
        keep.check(tokens, trial.geometry.kv_heads).unwrap();
        let before = cache.clone();
        cache.keep(&keep, trial.geometry.kv_heads);
        look(&before, &keep, &cache);
    }
}

proptest! {
    #[test]
    fn what_is_promised_is_kept(trial in trials()) {
        let policy = trial.policy();
        play(&trial, |before, _, after| {
            let (before, after) = (before.view(), after.view());
            let promise = policy.retention(&trial.geometry, before.seen);
            let most = promise.most.map_or(before.tokens, |most| most as usize);
            assert!(after.tokens <= most, "expected at most {most} tokens, got {}", after.tokens);
            // No more goes than what was asked for.
            let margin = trial.settings["margin_tokens"].as_u64().unwrap() as usize;
            assert!(after.tokens == before.tokens || after.tokens + margin >= most);
            for kv_head in 0..trial.geometry.kv_heads {
                let (held, row) = (before.row(kv_head), after.row(kv_head));
                let stays = |position: &u32| {
                    u64::from(*position) < promise.sinks || u64::from(*position) + promise.recent >= before.seen
                };
                assert!(held.iter().filter(|position| stays(position)).all(|position| row.contains(position)));
                assert!(row.is_sorted_by(|a, b| a < b));
            }
        });
    }

    #[test]
    fn one_run_is_like_the_next(trial in trials()) {
        let plans = || {
            let mut plans = Vec::new();
            play(&trial, |_, keep, _| plans.push(keep.clone()));
            plans
        };
        prop_assert_eq!(plans(), plans());
    }

    /// Where all tokens are alike, those in front stay.
    #[test]
    fn ties_go_to_the_first(budget in 8..40_u32, recent in 0..4_u32, kv_heads in 1..3_usize) {
        let geometry = CacheGeometry { layer: 0, layers: 1, q_heads: 2 * kv_heads, kv_heads, dim: 4 };
        for id in ["h2o", "tova", "snapkv"] {
            let settings = json!({
                "budget_tokens": budget, "sinks": 2, "recent_tokens": recent, "min_tokens": 1,
            });
            let mut session = build(id, &settings).session(&geometry).unwrap();
            let mut cache = LiveTokens::default();
            cache.append(50);
            let probabilities = vec![0.0; 50 * 50 * geometry.q_heads];
            let step =
                AttentionStep { first_query: 0, queries: 50, tokens: 50, live: cache.view().live, probabilities: &probabilities };
            session.observe(&step).unwrap();
            let keep = session.plan(&cache.view()).unwrap();
            let expected: Vec<u32> = (0..budget - recent).chain(50 - recent..50).collect();
            for kv_head in 0..kv_heads {
                prop_assert_eq!(keep.of(kv_head).unwrap(), &expected, "{}", id);
            }
        }
    }

    /// Any lengths and settings of the reference's rules: whole blocks, and never fewer than what is to stay.
    #[test]
    fn rules_of_the_reference_hold_for_all_lengths(
        tokens in 0..3000_usize,
        block in 1..100_usize,
        sinks in 0..200_usize,
        recent in 0..400_usize,
        ratio in 1.0..9.0_f32,
        scores in prop::collection::vec(prop::num::f64::ANY, 0..300),
    ) {
        let rules = Rules { block, sinks, recent, keep: Keep::Ratio(ratio) };
        let decision = rules.decide(tokens, &scores);
        let kept: Vec<usize> = decision.runs.iter().flat_map(|(start, len)| *start..start + len).collect();
        prop_assert_eq!(kept.len(), decision.kept);
        prop_assert!(kept.is_sorted_by(|a, b| a < b) && kept.iter().all(|idx| *idx < tokens));
        prop_assert!(kept.len() >= decision.floor && (kept.len() >= decision.target || tokens == 0));
        prop_assert!(kept.len() < decision.target.max(decision.floor) + block || tokens == 0);
        let is_protected = |idx: &usize| *idx < sinks || idx + recent >= tokens;
        prop_assert!((0..tokens).filter(is_protected).all(|idx| kept.binary_search(&idx).is_ok()));
        prop_assert_eq!(&decision, &rules.decide(tokens, &scores));
    }
}
