//! Properties of eviction policies. Each takes a registry entry and settings for it.
//!
//! A request is played: tokens come in steps, attention over what is live is made up, and what the policy keeps is what is live afterwards,
//! as in a real cache. What a policy promises by [`EvictionPolicy::retention`] is attacked; where it promises nothing, only that keep sets
//! are well formed, that nothing breaks it and that it is as deterministic as it says.

use std::fmt;
use std::sync::Arc;
use std::thread;

use gearbox_core::{
    AttentionStep, CacheGeometry, CacheView, Entry, EvictionPolicy, EvictionSession, KeepSet, LiveTokens, Registry,
    Retention,
};
use serde_json::Value;

use crate::data::SplitMix64;
use crate::outcome::{Cases, Check, panic_text};
use crate::{__properties, Outcome, config};

/// Runs every property, in the order of the tests that [`eviction_tests!`](crate::eviction_tests) makes.
pub fn run_eviction(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Vec<Outcome> {
    __properties!(eviction, __outcomes, entry, settings)
}

/// Resolved settings pass the schema and build the same policy again; see [`config::fixed_point`].
pub fn settings_are_a_fixed_point(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Outcome {
    config::fixed_point(entry, settings, EvictionPolicy::config)
}

/// Unknown keys and numbers outside their range are refused; see [`config::strict`].
pub fn settings_are_strict(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Outcome {
    config::strict(entry, settings, EvictionPolicy::config)
}

/// The entry says what the policy is; see [`config::described`].
pub fn entry_is_described(entry: &Entry<dyn EvictionPolicy>, _settings: &Value) -> Outcome {
    config::described(entry)
}

/// The built-in policy with this id, for tests.
///
/// # Panics
/// If no such policy is linked into this program.
pub fn find(id: &str) -> Entry<dyn EvictionPolicy> {
    crate::linked(Registry::built_in().and_then(|registry| registry.eviction(id).cloned()))
}

/// Attention that a policy is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attention {
    /// A softmax over random logits, few of them large.
    Heavy,
    /// All tokens alike, so that every choice is a tie.
    Even,
    /// No attention at all.
    Zero,
    /// Numbers that are not finite among random ones.
    Broken,
}

impl Attention {
    const ALL: [Self; 4] = [Self::Heavy, Self::Even, Self::Zero, Self::Broken];

    /// Probabilities of one query of a head over the tokens at these positions, depending on positions alone.
    fn fill(self, seed: u64, query: u64, head: usize, live: &[u32], out: &mut Vec<f32>) {
        let visible = live.partition_point(|position| u64::from(*position) <= query);
        let logit = |position: u32| {
            let mut random = SplitMix64::new(seed ^ (u64::from(position) << 32) ^ ((head as u64) << 20) ^ (query / 4));
            let uniform = (random.next_u64() >> 40) as f32 / (1u64 << 24) as f32;
            if uniform > 0.9 { 4.0 * uniform } else { uniform }
        };
        let start = out.len();
        out.extend(live[..visible].iter().map(|position| match self {
            Self::Heavy | Self::Broken => logit(*position).exp(),
            Self::Even => 1.0,
            Self::Zero => 0.0,
        }));
        let sum: f32 = out[start..].iter().sum();
        if sum > 0.0 {
            out[start..].iter_mut().for_each(|weight| *weight /= sum);
        }
        if self == Self::Broken {
            let strange = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX];
            let at = query as usize + head;
            for (idx, weight) in out[start..].iter_mut().enumerate().filter(|(idx, _)| (idx + at).is_multiple_of(5)) {
                *weight = strange[(idx + at) / 5 % strange.len()];
            }
        }
        out.resize(start + live.len(), 0.0);
    }
}

/// A request that is played.
#[derive(Clone, Debug)]
struct Trial {
    geometry: CacheGeometry,
    attention: Attention,
    /// Tokens of each step.
    steps: Vec<usize>,
    /// Whether there is a plan after each step, or only after the last.
    plans: Plans,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plans {
    Each,
    Last,
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CacheGeometry { layer, layers, q_heads, kv_heads, .. } = self.geometry;
        write!(
            f,
            "layer {layer} of {layers}, {q_heads} query heads of {kv_heads} KV heads, {:?} attention, ",
            self.attention
        )?;
        let runs = self.steps.chunk_by(|a, b| a == b).map(|run| format!("{} x {}", run.len(), run[0]));
        write!(f, "steps of {} tokens", runs.collect::<Vec<_>>().join(", "))
    }
}

/// What was kept at each plan, and what is live in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Played {
    plans: Vec<KeepSet>,
    cache: LiveTokens,
}

const SEED: u64 = 0x6576_6963_7400;

/// One session with the cache that it decides about.
struct Player {
    session: Box<dyn EvictionSession>,
    cache: LiveTokens,
    geometry: CacheGeometry,
}

impl Player {
    fn start(policy: &dyn EvictionPolicy, geometry: &CacheGeometry) -> Check<Self> {
        let session = policy.session(geometry).map_err(|error| format!("the session fails: {error}"))?;
        Ok(Self { session, cache: LiveTokens::default(), geometry: *geometry })
    }

    /// Appends tokens and shows the attention of their queries.
    fn step(&mut self, tokens: usize, attention: Attention) -> Check {
        let first_query = self.cache.view().seen;
        self.cache.append(tokens);
        let view = self.cache.view();
        let group = self.geometry.q_heads / self.geometry.kv_heads;
        let mut probabilities = Vec::with_capacity(tokens * self.geometry.q_heads * view.tokens);
        for query in first_query..self.cache.view().seen {
            for head in 0..self.geometry.q_heads {
                attention.fill(SEED, query, head, view.row(head / group), &mut probabilities);
            }
        }
        let CacheView { tokens: live_tokens, live, .. } = view;
        let step =
            AttentionStep { first_query, queries: tokens, tokens: live_tokens, live, probabilities: &probabilities };
        self.session.observe(&step).map_err(|error| format!("observe fails: {error}"))
    }

    /// Asks for a plan, checks that it is well formed, and applies it.
    fn plan(&mut self) -> Check<KeepSet> {
        let keep = self.session.plan(&self.cache.view()).map_err(|error| format!("plan fails: {error}"))?;
        let CacheGeometry { kv_heads, .. } = self.geometry;
        keep.check(self.cache.view().tokens, kv_heads)
            .map_err(|error| format!("at {} tokens: {error}", self.cache.view().seen))?;
        self.cache.keep(&keep, kv_heads);
        Ok(keep)
    }
}

impl Trial {
    fn play(
        &self,
        policy: &dyn EvictionPolicy,
        mut look: impl FnMut(&LiveTokens, &LiveTokens) -> Check,
    ) -> Check<Played> {
        let mut player = Player::start(policy, &self.geometry)?;
        let mut plans = Vec::new();
        for (idx, tokens) in self.steps.iter().enumerate() {
            player.step(*tokens, self.attention)?;
            if self.plans == Plans::Each || idx + 1 == self.steps.len() {
                let before = player.cache.clone();
                plans.push(player.plan()?);
                look(&before, &player.cache)?;
            }
        }
        Ok(Played { plans, cache: player.cache })
    }
}

fn geometry(layer: u32, q_heads: usize, kv_heads: usize) -> CacheGeometry {
    CacheGeometry { layer, layers: 4, q_heads, kv_heads, dim: 8 }
}

/// A prompt in one step and in several, and tokens one by one behind it; heads alone, in groups and together.
fn trials() -> Vec<Trial> {
    let shapes = [geometry(0, 1, 1), geometry(3, 4, 2), geometry(1, 6, 1)];
    let prompts = [vec![300], vec![64, 1, 128, 107], vec![1; 8], vec![1]];
    let mut trials = Vec::new();
    for geometry in shapes {
        for attention in Attention::ALL {
            for prompt in &prompts {
                let steps = prompt.iter().copied().chain([1; 40]).collect();
                trials.push(Trial { geometry, attention, steps, plans: Plans::Each });
            }
        }
    }
    trials
}

fn build(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Check<Arc<dyn EvictionPolicy>> {
    config::build(entry, settings)
}

/// Keep sets ascend, name live tokens, and are as long for every KV head.
pub fn keep_sets_are_well_formed(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Outcome {
    well_formed("keep_sets_are_well_formed", entry, settings, |attention| attention == Attention::Heavy)
}

fn well_formed(
    property: &'static str,
    entry: &Entry<dyn EvictionPolicy>,
    settings: &Value,
    of: fn(Attention) -> bool,
) -> Outcome {
    Outcome::of(property, |cases| {
        let policy = build(entry, settings)?;
        let mut trials = trials().into_iter().filter(|trial| of(trial.attention));
        trials.try_for_each(|trial| cases.check(&trial, || trial.play(&*policy, |_, _| Ok(())).map(drop)))
    })
}

/// Checks something of what is promised after each plan.
fn promised(
    property: &'static str,
    entry: &Entry<dyn EvictionPolicy>,
    settings: &Value,
    check: fn(&Retention, &LiveTokens, &[u32]) -> Check,
) -> Outcome {
    Outcome::of(property, |cases| {
        let policy = build(entry, settings)?;
        trials().iter().try_for_each(|trial| {
            cases.check(trial, || {
                let kv_heads = trial.geometry.kv_heads;
                trial.play(&*policy, |before, after| {
                    let promise = policy.retention(&trial.geometry, before.view().seen);
                    (0..kv_heads).try_for_each(|kv_head| {
                        let found = check(&promise, before, after.view().row(kv_head));
                        found.map_err(|found| format!("KV head {kv_head}, at {} tokens: {found}", before.view().seen))
                    })
                })?;
                Ok(())
            })
        })
    })
}

/// No head holds more tokens than [`Retention::most`].
pub fn budget_is_met(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Outcome {
    promised("budget_is_met", entry, settings, |promise, _, after| match promise.most {
        Some(most) if after.len() as u64 > most => Err(format!("expected at most {most} tokens, got {}", after.len())),
        _ => Ok(()),
    })
}

/// First and last tokens stay, as many as [`Retention`] says.
pub fn sinks_and_recent_tokens_stay(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Outcome {
    promised("sinks_and_recent_tokens_stay", entry, settings, |promise, before, after| {
        let first = 0..promise.sinks.min(before.view().seen);
        let last = before.view().seen.saturating_sub(promise.recent)..before.view().seen;
        let gone = first.chain(last).find(|position| after.binary_search(&(*position as u32)).is_err());
        gone.map_or(Ok(()), |position| Err(format!("expected token {position} to stay, got {after:?}")))
    })
}

/// Attention that is zero, even or not finite ends in well-formed keep sets too.
pub fn strange_attention_is_harmless(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Outcome {
    well_formed("strange_attention_is_harmless", entry, settings, |attention| attention != Attention::Heavy)
}

/// A cache without tokens, with one token, and a plan before any attention.
pub fn small_caches_are_planned(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Outcome {
    Outcome::of("small_caches_are_planned", |cases| {
        let policy = build(entry, settings)?;
        for geometry in [geometry(0, 1, 1), geometry(2, 4, 2)] {
            cases.check("an empty cache, no attention", || Player::start(&*policy, &geometry)?.plan().map(drop))?;
            cases.check("an empty cache, a step of nothing", || {
                let mut player = Player::start(&*policy, &geometry)?;
                player.step(0, Attention::Heavy)?;
                player.plan().map(drop)
            })?;
            cases.check("one token", || {
                let mut player = Player::start(&*policy, &geometry)?;
                player.step(1, Attention::Heavy)?;
                match player.plan()?.kept(1) {
                    1 => Ok(()),
                    kept => Err(format!("expected the only token to stay, got {kept}")),
                }
            })?;
            cases.check("500 tokens, no attention", || {
                let mut player = Player::start(&*policy, &geometry)?;
                player.cache.append(500);
                player.plan().map(drop)
            })?;
        }
        Ok(())
    })
}

/// A policy that declares [streaming](gearbox_core::Capabilities::streaming) decides the same after a prompt in one step and in many.
pub fn steps_may_be_split(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Outcome {
    Outcome::of("steps_may_be_split", |cases| {
        let policy = build(entry, settings)?;
        if !policy.capabilities().streaming {
            return Ok(());
        }
        for geometry in [geometry(0, 1, 1), geometry(3, 4, 2)] {
            let trial = |steps| Trial { geometry, attention: Attention::Heavy, steps, plans: Plans::Last };
            let whole = trial(vec![300]).play(&*policy, |_, _| Ok(()))?;
            for steps in [vec![100; 3], vec![7; 42].into_iter().chain([6]).collect(), vec![2; 150]] {
                let parts = trial(steps);
                cases.check(&parts, || agree(&whole, &parts.play(&*policy, |_, _| Ok(()))?))?;
            }
        }
        Ok(())
    })
}

fn agree(expected: &Played, got: &Played) -> Check {
    if expected == got {
        return Ok(());
    }
    let plan = expected.plans.iter().zip(&got.plans).position(|(a, b)| a != b);
    Err(format!("expected the same decisions, got others from plan {} on", plan.unwrap_or_default()))
}

/// Sessions of one policy know nothing of each other: eight threads, and two sessions in turn, decide as one session alone.
pub fn sessions_are_independent(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Outcome {
    Outcome::of("sessions_are_independent", |cases| {
        let policy = build(entry, settings)?;
        if !policy.capabilities().deterministic {
            return Ok(());
        }
        let trials: Vec<Trial> = trials().into_iter().filter(|trial| trial.attention == Attention::Heavy).collect();
        let alone: Vec<Played> = trials
            .iter()
            .map(|trial| cases.check(trial, || trial.play(&*policy, |_, _| Ok(()))))
            .collect::<Check<_>>()?;
        in_turn(cases, &*policy, &trials, &alone)?;
        let work = |first: usize| {
            let order = (0..trials.len()).map(|idx| (idx + first) % trials.len());
            order.into_iter().try_for_each(|idx| {
                let played = trials[idx].play(&*policy, |_, _| Ok(()));
                let found = played.and_then(|played| agree(&alone[idx], &played));
                found.map_err(|found| format!("{}: {found}", trials[idx]))
            })
        };
        let threads = thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|first| scope.spawn(move || work(first))).collect();
            threads.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>()
        });
        threads.into_iter().try_for_each(|result| {
            cases.check("all trials in one thread", || result.unwrap_or_else(|panic| Err(panic_text(panic.as_ref()))))
        })
    })
}

/// Two sessions step by step in turn, the second with other attention.
fn in_turn(cases: &mut Cases, policy: &dyn EvictionPolicy, trials: &[Trial], alone: &[Played]) -> Check {
    for (trial, alone) in trials.iter().zip(alone) {
        cases.check(format!("{trial}, beside another session"), || {
            let mut one = Player::start(policy, &trial.geometry)?;
            let mut other = Player::start(policy, &trial.geometry)?;
            for (tokens, expected) in trial.steps.iter().zip(&alone.plans) {
                one.step(*tokens, trial.attention)?;
                other.step(*tokens, Attention::Even)?;
                let plan = one.plan()?;
                other.plan()?;
                if plan != *expected {
                    let seen = one.cache.view().seen;
                    return Err(format!("expected the decision at {seen} tokens as alone, got another"));
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Two instances, and one instance twice, decide the same, if the policy declares to be deterministic.
pub fn instances_agree(entry: &Entry<dyn EvictionPolicy>, settings: &Value) -> Outcome {
    Outcome::of("instances_agree", |cases| {
        let (one, other) = (build(entry, settings)?, build(entry, settings)?);
        if !one.capabilities().deterministic {
            return Ok(());
        }
        for trial in trials() {
            let expected = cases.check(&trial, || trial.play(&*one, |_, _| Ok(())))?;
            for policy in [&one, &other] {
                cases.check(&trial, || agree(&expected, &trial.play(&**policy, |_, _| Ok(()))?))?;
            }
        }
        Ok(())
    })
}
