//! Tokens stay by chance: the control that shows what a score is worth.
//!
//! Each KV head and position has a fixed random number, and those with the highest stay. So what is live is at any time a uniform choice
//! from the tokens seen, sinks and recent ones aside, and the same one whatever the order of steps and plans.

use gearbox_core::{AttentionStep, Plugin, Result};

use crate::budget::Budget;
use crate::select::Scorer;
use crate::settings::{budget_policy, choosing_settings};

choosing_settings! {
    /// Settings of [`Random`].
    Config {
        /// Another seed, another choice.
        seed: u64,
    }
}

/// Keeps sinks, recent tokens and a random choice of the others.
#[derive(Clone, Debug)]
pub struct Random {
    config: Config,
    budget: Budget,
}

impl Plugin for Random {
    const ID: &'static str = "random";
    const SUMMARY: &'static str = "control: beside first and last tokens a random choice stays";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(mut config: Config) -> Result<Self> {
        let budget = config.budget(4, 0.25)?;
        Ok(Self { config, budget })
    }
}

budget_policy!(Random, |policy, geometry| Chance { seed: mix(policy.config.seed ^ mix(u64::from(geometry.layer))) });

struct Chance {
    seed: u64,
}

/// The finaliser of Steele et al., *Fast splittable pseudorandom number generators*, 2014, as in splitmix64.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Scorer for Chance {
    fn observe(&mut self, _: &AttentionStep<'_>) {}

    fn score(&mut self, kv_head: usize, live: &[u32], scores: &mut Vec<f64>) {
        let seed = mix(self.seed ^ kv_head as u64);
        // The upper bits, as many as an F64 holds exactly.
        scores.extend(live.iter().map(|position| (mix(seed ^ u64::from(*position)) >> 11) as f64));
    }
}

#[cfg(test)]
mod tests {
    use gearbox_core::{CacheGeometry, CacheView, EvictionPolicy};

    use super::*;

    const GEOMETRY: CacheGeometry = CacheGeometry { layer: 0, layers: 2, q_heads: 2, kv_heads: 2, dim: 1 };

    fn policy(seed: u64) -> Random {
        let config = Config { seed, sinks: Some(0), recent_tokens: Some(0), ..Config::default() };
        Random::new(Config { target_ratio: Some(4.0), ..config }).unwrap()
    }

    fn kept(policy: &Random, layer: u32, head: usize) -> Vec<u32> {
        let mut session = policy.session(&CacheGeometry { layer, ..GEOMETRY }).unwrap();
        let live: Vec<u32> = (0..4000).collect();
        let keep = session.plan(&CacheView { seen: 4000, tokens: 4000, live: &live }).unwrap();
        keep.of(head).unwrap().to_vec()
    }

    #[test]
    fn choice_is_even_and_follows_seed_layer_and_head() {
        let choice = kept(&policy(1), 0, 0);
        assert_eq!(choice, kept(&policy(1), 0, 0));
        for part in 0..4 {
            let count = choice.iter().filter(|idx| **idx / 1000 == part).count();
            // Hypergeometric with a deviation of 11.9; seed 1.
            assert!((200..300).contains(&count), "{count}");
        }
        for other in [kept(&policy(2), 0, 0), kept(&policy(1), 1, 0), kept(&policy(1), 0, 1)] {
            let common = other.iter().filter(|idx| choice.binary_search(idx).is_ok()).count();
            assert!((200..300).contains(&common), "{common}");
        }
    }

    #[test]
    fn plans_in_between_change_nothing() {
        // A fixed budget, so that what goes once would go for good.
        let config = Config { budget_tokens: Some(100), sinks: Some(0), recent_tokens: Some(0), ..Config::default() };
        let policy = Random::new(config).unwrap();
        let mut session = policy.session(&GEOMETRY).unwrap();
        let mut live: Vec<u32> = Vec::new();
        for seen in (200..=4000).step_by(200) {
            let fresh = seen - 200..seen;
            let (one, other) = live.split_at(live.len() / 2);
            live = [one, other].iter().flat_map(|head| head.iter().copied().chain(fresh.clone())).collect();
            let cache = CacheView { seen: seen.into(), tokens: live.len() / 2, live: &live };
            live = session.plan(&cache).unwrap().positions(&cache, 2);
        }
        let all: Vec<u32> = (0..4000).collect();
        let cache = CacheView { seen: 4000, tokens: 4000, live: &all };
        assert_eq!(policy.session(&GEOMETRY).unwrap().plan(&cache).unwrap().positions(&cache, 2), live);
    }
}
