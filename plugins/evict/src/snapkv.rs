//! SnapKV: what the end of the prompt attended to stays.
//!
//! The last queries of a prompt, the observation window, tell well which of its tokens the answer will look at. Their probabilities are
//! averaged per KV head, each token takes the greatest score of its neighbourhood, so that phrases stay whole, and after the prompt the
//! scores are fixed. It costs memory for the window while the prompt is read, and nothing afterwards; what the answer turns to later, and
//! the window did not look at, is lost.
//!
//! Differences to the paper: there the cache grows with the answer, here the budget holds: generated tokens are better than any of the
//! prompt, and push out its worst; when none is left, the oldest generated ones go. Query heads that share a KV head are taken together as
//! `group` says, where the paper's models have as many of both. A prompt may come in several steps; it ends with the first step of a single
//! query behind position 0.

use std::collections::VecDeque;

use gearbox_core::{AttentionStep, CacheGeometry, Plugin, Result};

use crate::budget::Budget;
use crate::rows::{Group, Row, grouped};
use crate::select::Scorer;
use crate::settings::{budget_policy, choosing_settings};

choosing_settings! {
    /// Settings of [`SnapKv`].
    Config {
        /// Last queries of the prompt that score its tokens; 32 in the paper.
        #[schemars(range(min = 1, max = 4096))]
        window: Option<u32>,
        /// Tokens of a neighbourhood, of which each takes the greatest score; an even number reaches further back than ahead. 7 in the paper.
        #[schemars(range(min = 1, max = 255))]
        kernel: Option<u32>,
        /// How the query heads that share a KV head are taken together.
        group: Group,
    }
}

/// Keeps what the last queries of the prompt attended to.
#[derive(Clone, Debug)]
pub struct SnapKv {
    config: Config,
    window: usize,
    kernel: usize,
    budget: Budget,
}

impl Plugin for SnapKv {
    const ID: &'static str = "snapkv";
    const SUMMARY: &'static str = "what the last queries of the prompt attended to stays, with its neighbours";
    const SOURCE: &'static str = "Li et al., *SnapKV: LLM Knows What You are Looking for Before Generation*, 2024";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(mut config: Config) -> Result<Self> {
        let budget = config.budget(4, 0.25)?;
        let (window, kernel) = (*config.window.get_or_insert(32) as usize, *config.kernel.get_or_insert(7) as usize);
        Ok(Self { config, window, kernel, budget })
    }
}

budget_policy!(SnapKv, |policy, geometry| Snapshot {
    geometry: *geometry,
    window: policy.window,
    kernel: policy.kernel,
    group: policy.config.group,
    prompt: 0,
    frozen: false,
    rows: vec![Row::new(0); geometry.kv_heads],
});

struct Snapshot {
    geometry: CacheGeometry,
    window: usize,
    kernel: usize,
    group: Group,
    /// Position behind the prompt.
    prompt: u64,
    /// Whether the prompt has ended; then each row has one column, the scores.
    frozen: bool,
    /// One per KV head, with one column per query of the window.
    rows: Vec<Row<f32>>,
}

impl Snapshot {
    /// Mean over the window, then the greatest of the neighbourhood.
    fn scores(&self, row: &Row<f32>) -> Vec<f32> {
        let tokens = row.columns.first().map_or(0, Vec::len);
        let mut means = vec![0.0; tokens];
        for column in &row.columns {
            for (mean, probability) in means.iter_mut().zip(column) {
                *mean += probability / row.columns.len() as f32;
            }
        }
        pooled(&means, self.kernel)
    }
}

/// The greatest number among `kernel` neighbours of each, half of them before it.
fn pooled(numbers: &[f32], kernel: usize) -> Vec<f32> {
    let (before, after) = (kernel / 2, kernel.saturating_sub(1) / 2);
    // Indices whose numbers fall from front to back: the front is the greatest of the window.
    let mut falling: VecDeque<usize> = VecDeque::new();
    let mut next = 0;
    let greatest = |idx: usize| {
        while next < numbers.len().min(idx + after + 1) {
            while falling.back().is_some_and(|back| numbers[*back] <= numbers[next]) {
                falling.pop_back();
            }
            falling.push_back(next);
            next += 1;
        }
        while falling.front().is_some_and(|front| front + before < idx) {
            falling.pop_front();
        }
        falling.front().map_or(0.0, |front| numbers[*front])
    };
    (0..numbers.len()).map(greatest).collect()
}

impl Scorer for Snapshot {
    fn observe(&mut self, step: &AttentionStep<'_>) {
        if self.frozen {
            return;
        }
        if step.queries == 1 && step.first_query > 0 {
            self.frozen = true;
            for kv_head in 0..self.rows.len() {
                self.rows[kv_head].columns = vec![self.scores(&self.rows[kv_head])];
            }
            return;
        }
        self.prompt = step.first_query + step.queries as u64;
        let fresh = step.queries.min(self.window);
        for (kv_head, row) in self.rows.iter_mut().enumerate() {
            row.align(step.row(kv_head));
            let old = row.columns.len().min(self.window - fresh);
            row.columns.drain(..row.columns.len() - old);
            for query in step.queries - fresh..step.queries {
                let mut column = Vec::new();
                grouped(step, &self.geometry, query, kv_head, self.group, &mut column);
                row.columns.push(column);
            }
        }
    }

    fn score(&mut self, kv_head: usize, live: &[u32], scores: &mut Vec<f64>) {
        let Some(row) = self.rows.get_mut(kv_head) else { return };
        row.align(live);
        let found = match (self.frozen, row.columns.first()) {
            (true, Some(scores)) => scores.clone(),
            _ => self.scores(&self.rows[kv_head]),
        };
        // Probabilities are at most 1, so any generated token is better than all of the prompt; without a prompt all are generated.
        let score = |idx: usize, position: u32| match found.get(idx) {
            Some(score) if u64::from(position) < self.prompt => f64::from(*score),
            _ => 2.0 + f64::from(position),
        };
        scores.extend(live.iter().enumerate().map(|(idx, position)| score(idx, *position)));
    }
}

#[cfg(test)]
mod tests {
    use gearbox_core::{CacheView, EvictionPolicy, KeepSet};

    use super::*;

    #[test]
    fn neighbours_take_the_greatest_score() {
        let numbers = [0.0, 0.1, 0.9, 0.2, 0.0, 0.0, 0.3];
        assert_eq!(pooled(&numbers, 1), numbers);
        assert_eq!(pooled(&numbers, 3), [0.1, 0.9, 0.9, 0.9, 0.2, 0.3, 0.3]);
        assert_eq!(pooled(&numbers, 4), [0.1, 0.9, 0.9, 0.9, 0.9, 0.3, 0.3]);
        assert_eq!(pooled(&numbers, 255), [0.9; 7]);
        assert!(pooled(&[], 7).is_empty());
    }

    /// Six tokens of prompt whose last two queries look at token 2 and, a little, at token 0; then decoding looks elsewhere.
    #[test]
    fn scores_are_fixed_when_the_prompt_ends() {
        let config = Config {
            window: Some(2),
            kernel: Some(1),
            budget_tokens: Some(4),
            sinks: Some(0),
            recent_tokens: Some(0),
            min_tokens: Some(1),
            ..Config::default()
        };
        let policy = SnapKv::new(config).unwrap();
        let geometry = CacheGeometry { layer: 0, layers: 1, q_heads: 1, kv_heads: 1, dim: 1 };
        let mut session = policy.session(&geometry).unwrap();
        let live: Vec<u32> = (0..6).collect();
        let mut probabilities = [[0.0; 6]; 6];
        (0..6).for_each(|query| probabilities[query][1] = 1.0);
        probabilities[4] = [0.2, 0.0, 0.5, 0.0, 0.3, 0.0];
        probabilities[5] = [0.2, 0.0, 0.5, 0.1, 0.0, 0.2];
        let probabilities = probabilities.as_flattened();
        let step = AttentionStep { first_query: 0, queries: 6, tokens: 6, live: &live, probabilities };
        session.observe(&step).unwrap();
        let plan = session.plan(&CacheView { seen: 6, tokens: 6, live: &live }).unwrap();
        assert_eq!(plan, KeepSet::PerHead(vec![vec![0, 2, 4, 5]]));
        let live = [0, 2, 4, 5, 6];
        let probabilities = &[0.0, 0.0, 1.0, 0.0, 0.0];
        let step = AttentionStep { first_query: 6, queries: 1, tokens: 5, live: &live, probabilities };
        session.observe(&step).unwrap();
        let plan = session.plan(&CacheView { seen: 7, tokens: 5, live: &live }).unwrap();
        // Token 5 was the worst of the prompt; the query of decoding counts no more.
        assert_eq!(plan, KeepSet::PerHead(vec![vec![0, 1, 2, 4]]));
    }
}
