//! TOVA: what the last query attended to stays.
//!
//! A token is as good as the attention of the newest query to it, averaged over the heads of the layer. There is no memory of older queries
//! and no protected token, so the policy adapts at once, and forgets at once what one query did not look at.
//!
//! Differences to the paper: none with the defaults; `sinks` and recent tokens may be protected.

use gearbox_core::{AttentionStep, CacheGeometry, Plugin, Result};

use crate::budget::Budget;
use crate::rows::{Group, Row, together};
use crate::select::Scorer;
use crate::settings::{budget_policy, choosing_settings};

choosing_settings! {
    /// Settings of [`Tova`].
    Config {}
}

/// Keeps what the last query attended to most.
#[derive(Clone, Debug)]
pub struct Tova {
    config: Config,
    budget: Budget,
}

impl Plugin for Tova {
    const ID: &'static str = "tova";
    const SUMMARY: &'static str = "what the last query attended to stays";
    const SOURCE: &'static str = "Oren et al., *Transformers are Multi-State RNNs*, 2024";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(mut config: Config) -> Result<Self> {
        let budget = config.budget(0, 0.0)?;
        Ok(Self { config, budget })
    }
}

budget_policy!(Tova, |_, geometry| Last { geometry: *geometry, row: Row::new(1) });

/// The mean probabilities of the last query.
struct Last {
    geometry: CacheGeometry,
    row: Row<f32>,
}

impl Scorer for Last {
    fn observe(&mut self, step: &AttentionStep<'_>) {
        if let Some(last) = step.queries.checked_sub(1) {
            self.row.align(step.row(0));
            together(step, &self.geometry, last, 0..self.geometry.q_heads, Group::Mean, &mut self.row.columns[0]);
        }
    }

    fn score(&mut self, _: usize, live: &[u32], scores: &mut Vec<f64>) {
        self.row.align(live);
        scores.extend(self.row.columns[0].iter().copied().map(f64::from));
    }

    fn is_shared(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use gearbox_core::{CacheView, EvictionPolicy, KeepSet};

    use super::*;

    #[test]
    fn only_the_last_query_counts() {
        let config = Config { budget_tokens: Some(2), min_tokens: Some(1), ..Config::default() };
        let policy = Tova::new(config).unwrap();
        let geometry = CacheGeometry { layer: 0, layers: 1, q_heads: 2, kv_heads: 1, dim: 1 };
        let mut session = policy.session(&geometry).unwrap();
        let probabilities = [[0.9, 0.1, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4], [0.1, 0.6, 0.3, 0.0]];
        let live = [0, 1, 2, 3];
        let step = AttentionStep {
            first_query: 2,
            queries: 2,
            tokens: 4,
            live: &live,
            probabilities: probabilities.as_flattened(),
        };
        session.observe(&step).unwrap();
        let plan = session.plan(&CacheView { seen: 4, tokens: 4, live: &live }).unwrap();
        // Means 0.1, 0.4, 0.3, 0.2.
        assert_eq!(plan, KeepSet::Shared(vec![1, 2]));
    }
}
