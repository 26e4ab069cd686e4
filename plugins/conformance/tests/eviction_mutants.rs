//! The kit finds what it looks for in eviction policies: every fault below fails its property, and a sound policy passes all.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use gearbox_conformance::Outcome;
use gearbox_conformance::eviction::{self, run_eviction};
use gearbox_core::{
    AttentionStep, CacheGeometry, CacheView, Capabilities, ElemSet, Entry, EvictionPolicy, EvictionSession, KeepSet,
    Result, Retention,
};
use serde_json::{Value, json};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    Descends,
    NamesOneBehind,
    UnevenHeads,
    OneListTooMany,
    KeepsOneMore,
    LosesTheFirst,
    LosesTheLast,
    PanicsOnNan,
    UnwrapsTheGreatest,
    PanicsOnEmpty,
    EvictsTheOnlyOne,
    CountsSteps,
    SharesState,
    Counts,
    Remembers,
    SettingsDrift,
    SettingsLax,
    IdNotKebab,
}

use Fault::*;

const SINKS: u64 = 2;
const RECENT: u64 = 5;

/// Keeps sinks, recent tokens, and per KV head what the last query attended to.
#[derive(Debug)]
struct Mutant {
    fault: Fault,
    budget: u64,
    calls: Arc<AtomicU32>,
    last: Arc<Mutex<Vec<f32>>>,
}

impl Mutant {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }
}

impl EvictionPolicy for Mutant {
    fn capabilities(&self) -> Capabilities {
        Capabilities { streaming: true, ..Capabilities::new(ElemSet::FLOATS) }
    }

    fn config(&self) -> Value {
        json!({"budget": self.budget + u64::from(self.is(SettingsDrift))})
    }

    fn retention(&self, _: &CacheGeometry, _: u64) -> Retention {
        Retention { most: Some(self.budget), sinks: SINKS, recent: RECENT }
    }

    fn session(&self, geometry: &CacheGeometry) -> Result<Box<dyn EvictionSession>> {
        Ok(Box::new(Session {
            fault: self.fault,
            budget: self.budget as usize,
            geometry: *geometry,
            calls: if self.is(Remembers) { Arc::clone(&self.calls) } else { Arc::default() },
            steps: 0,
            last: if self.is(SharesState) { Arc::clone(&self.last) } else { Arc::default() },
        }))
    }
}

struct Session {
    fault: Fault,
    budget: usize,
    geometry: CacheGeometry,
    calls: Arc<AtomicU32>,
    steps: usize,
    /// Probabilities of the last query, `(kv_heads, tokens)`.
    last: Arc<Mutex<Vec<f32>>>,
}

/// Calls of the whole program.
static CALLS: AtomicU32 = AtomicU32::new(0);

impl Session {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }
}

impl EvictionSession for Session {
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()> {
        step.check(&self.geometry)?;
        assert!(!self.is(PanicsOnNan) || !step.probabilities.iter().any(|p| p.is_nan()), "not a number");
        self.steps += 1;
        let group = self.geometry.q_heads / self.geometry.kv_heads;
        let Some(query) = step.queries.checked_sub(1) else { return Ok(()) };
        let heads = (0..self.geometry.kv_heads).map(|head| query * self.geometry.q_heads + head * group);
        let last =
            heads.flat_map(|head| step.probabilities[head * step.tokens..(head + 1) * step.tokens].iter().copied());
        *self.last.lock().unwrap() = last.collect();
        Ok(())
    }

    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet> {
        cache.check(&self.geometry)?;
        assert!(!self.is(PanicsOnEmpty) || cache.tokens > 0, "nothing to do");
        if self.is(EvictsTheOnlyOne) && cache.tokens == 1 {
            return Ok(KeepSet::Shared(vec![]));
        }
        let budget = self.budget + usize::from(self.is(KeepsOneMore));
        if cache.tokens <= budget {
            return Ok(KeepSet::All);
        }
        let (tokens, seen) = (cache.tokens, cache.seen);
        let last = self.last.lock().unwrap().clone();
        let offset = match self.fault {
            CountsSteps => self.steps,
            Counts => CALLS.fetch_add(1, Ordering::Relaxed) as usize,
            Remembers => self.calls.fetch_add(1, Ordering::Relaxed) as usize,
            _ => 0,
        };
        let mut lists: Vec<Vec<u32>> = (0..self.geometry.kv_heads)
            .map(|head| {
                let row = cache.row(head);
                let own = last.get(head * tokens..(head + 1) * tokens).unwrap_or_default();
                let score = |idx: u32| {
                    let position = u64::from(row[idx as usize]);
                    let first = position < SINKS && !(self.is(LosesTheFirst) && position == 0);
                    let recent = position + RECENT >= seen && !(self.is(LosesTheLast) && position + 1 == seen);
                    let score = own.get((idx as usize + offset) % tokens).copied().unwrap_or_default();
                    if first || recent {
                        f32::INFINITY
                    } else if score.is_nan() {
                        0.0
                    } else {
                        score.min(1e30)
                    }
                };
                let mut order: Vec<u32> = (0..tokens as u32).collect();
                order.sort_by(|a, b| score(*b).total_cmp(&score(*a)).then(a.cmp(b)));
                if self.is(UnwrapsTheGreatest) {
                    own.iter().find(|p| **p > 0.0 || own.is_empty()).unwrap();
                }
                order.truncate(budget);
                order.sort_unstable();
                order
            })
            .collect();
        match self.fault {
            Descends => lists[0].reverse(),
            NamesOneBehind => *lists[0].last_mut().unwrap() = tokens as u32,
            UnevenHeads if lists.len() > 1 => drop(lists[1].remove(4)),
            OneListTooMany => lists.push(lists[0].clone()),
            _ => {}
        }
        Ok(KeepSet::PerHead(lists))
    }
}

fn entry(fault: Fault) -> Entry<dyn EvictionPolicy> {
    Entry {
        id: if fault == IdNotKebab { "Mutant_1" } else { "mutant-1" }.to_owned(),
        aliases: vec![],
        summary: "a policy with one fault".to_owned(),
        source: "own work".to_owned(),
        format_version: 1,
        schema: json!({
            "type": "object",
            "properties": {"budget": {"description": "Tokens.", "type": "integer", "minimum": 10, "maximum": 1000}},
            "additionalProperties": fault == SettingsLax,
        }),
        origin: "this test".to_owned(),
        library: Option::None,
        build: Arc::new(move |settings| {
            let budget = settings["budget"].as_u64().unwrap_or(40);
            Ok(Arc::new(Mutant { fault, budget, calls: Arc::default(), last: Arc::default() }))
        }),
    }
}

type Property = fn(&Entry<dyn EvictionPolicy>, &Value) -> Outcome;

#[test]
fn sound_policy_passes_everything() {
    for outcome in run_eviction(&entry(None), &json!({})) {
        assert!(outcome.passed() && outcome.cases > 0, "{outcome}");
    }
}

#[test]
fn every_fault_is_found_by_its_property() {
    let expected: [(Fault, Property); 18] = [
        (Descends, eviction::keep_sets_are_well_formed),
        (NamesOneBehind, eviction::keep_sets_are_well_formed),
        (UnevenHeads, eviction::keep_sets_are_well_formed),
        (OneListTooMany, eviction::keep_sets_are_well_formed),
        (KeepsOneMore, eviction::budget_is_met),
        (LosesTheFirst, eviction::sinks_and_recent_tokens_stay),
        (LosesTheLast, eviction::sinks_and_recent_tokens_stay),
        (PanicsOnNan, eviction::strange_attention_is_harmless),
        (UnwrapsTheGreatest, eviction::strange_attention_is_harmless),
        (PanicsOnEmpty, eviction::small_caches_are_planned),
        (EvictsTheOnlyOne, eviction::small_caches_are_planned),
        (CountsSteps, eviction::steps_may_be_split),
        (SharesState, eviction::sessions_are_independent),
        (Counts, eviction::instances_agree),
        (Remembers, eviction::instances_agree),
        (SettingsDrift, eviction::settings_are_a_fixed_point),
        (SettingsLax, eviction::settings_are_strict),
        (IdNotKebab, eviction::entry_is_described),
    ];
    for (fault, property) in expected {
        let outcome = property(&entry(fault), &json!({}));
        assert!(!outcome.passed(), "{fault:?} is not found: {outcome}");
    }
}

#[test]
fn counter_example_names_layer_heads_and_steps() {
    let outcome = eviction::budget_is_met(&entry(KeepsOneMore), &json!({}));
    let failure = outcome.failure.unwrap();
    let expected = "layer 0 of 4, 1 query heads of 1 KV heads, Heavy attention, steps of 1 x 300, 40 x 1 tokens: KV head 0, at 300 tokens: \
                    expected at most 40 tokens, got 41";
    assert_eq!(failure, expected);
}
