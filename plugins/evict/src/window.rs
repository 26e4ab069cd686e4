//! StreamingLLM: the first tokens and the last ones stay.
//!
//! Attention looks at the first tokens of a sequence whatever they say ("sinks"), and else mostly at recent ones. The policy looks at no
//! attention at all, costs nothing and is the base line that a score has to beat. What lies between sinks and window is lost for good,
//! so nothing that was said long ago can be recalled.
//!
//! Differences to the paper: tokens keep their positions, where the paper numbers those in the cache anew.

use gearbox_core::{AttentionStep, Plugin, Result};

use crate::budget::{Budget, Recent};
use crate::select::Scorer;
use crate::settings::{budget_policy, budget_settings};

budget_settings! {
    /// Settings of [`Window`].
    Config {}
}

/// Keeps the first tokens and fills the rest of the budget with the last ones.
#[derive(Clone, Debug)]
pub struct Window {
    config: Config,
    budget: Budget,
}

impl Plugin for Window {
    const ID: &'static str = "window";
    const SUMMARY: &'static str = "first tokens and last tokens stay";
    const SOURCE: &'static str = "Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, 2024";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(mut config: Config) -> Result<Self> {
        config.sinks.get_or_insert(4);
        // One recent token at least; the scores make it all that there is room for.
        let budget = Budget::new(config.wishes(Recent::Tokens(1)))?;
        config.resolve(&budget);
        Ok(Self { config, budget })
    }
}

budget_policy!(Window, |_, _| Positions);

/// The later, the better.
struct Positions;

impl Scorer for Positions {
    fn observe(&mut self, _: &AttentionStep<'_>) {}

    fn score(&mut self, _: usize, live: &[u32], scores: &mut Vec<f64>) {
        scores.extend(live.iter().copied().map(f64::from));
    }

    fn is_shared(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use gearbox_core::{CacheGeometry, CacheView, EvictionPolicy, KeepSet};

    use super::*;

    #[test]
    fn between_sinks_and_window_all_goes() {
        let policy = Window::new(Config { budget_tokens: Some(5), sinks: Some(2), ..Config::default() }).unwrap();
        let geometry = CacheGeometry { layer: 0, layers: 1, q_heads: 1, kv_heads: 1, dim: 1 };
        let mut session = policy.session(&geometry).unwrap();
        let live: Vec<u32> = (0..80).collect();
        let plan = session.plan(&CacheView { seen: 80, tokens: 80, live: &live }).unwrap();
        assert_eq!(plan, KeepSet::Shared(vec![0, 1, 77, 78, 79]));
        let plan = session.plan(&CacheView { seen: 81, tokens: 6, live: &[0, 1, 77, 78, 79, 80] }).unwrap();
        assert_eq!(plan, KeepSet::Shared(vec![0, 1, 3, 4, 5]));
        let plan = session.plan(&CacheView { seen: 63, tokens: 63, live: &live[..63] }).unwrap();
        assert_eq!(plan, KeepSet::All);
    }
}
