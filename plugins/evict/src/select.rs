//! The session that all policies with a budget share: sinks and recent tokens stay, and the best of the others.

use gearbox_core::{AttentionStep, CacheGeometry, CacheView, EvictionSession, KeepSet, Result};

use crate::budget::{Allowance, Budget, LayerBudget};

/// What a policy learns from attention.
pub(crate) trait Scorer: Send {
    /// Takes in a step, whose lengths are right.
    fn observe(&mut self, step: &AttentionStep<'_>);

    /// Scores the live tokens of a KV head: the higher, the rather they stay.
    fn score(&mut self, kv_head: usize, live: &[u32], scores: &mut Vec<f64>);

    /// Whether all KV heads score alike.
    fn is_shared(&self) -> bool {
        false
    }
}

/// One layer of one request.
struct Session<S> {
    geometry: CacheGeometry,
    budget: Option<LayerBudget>,
    scorer: S,
}

/// Starts a session; the scorer is made only for layers that evict.
pub(crate) fn session<S: Scorer + 'static>(
    budget: &Budget,
    geometry: &CacheGeometry,
    scorer: S,
) -> Result<Box<dyn EvictionSession>> {
    let (geometry, budget) = (*geometry, budget.layer(geometry)?);
    Ok(Box::new(Session { geometry, budget, scorer }))
}

impl<S: Scorer> EvictionSession for Session<S> {
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()> {
        step.check(&self.geometry)?;
        if self.budget.is_some() {
            self.scorer.observe(step);
        }
        Ok(())
    }

    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet> {
        cache.check(&self.geometry)?;
        let allowance = self.budget.and_then(|budget| budget.at(cache.seen));
        let Some(allowance) = allowance.filter(|allowance| cache.tokens > allowance.most) else {
            return Ok(KeepSet::All);
        };
        let is_shared = cache.live.len() == cache.tokens && self.scorer.is_shared();
        let mut scores = Vec::new();
        let mut keep = |kv_head| {
            let live = cache.row(kv_head);
            scores.clear();
            self.scorer.score(kv_head, live, &mut scores);
            choose(&scores, live, cache.seen, &allowance)
        };
        if is_shared {
            return Ok(KeepSet::Shared(keep(0)));
        }
        Ok(KeepSet::PerHead((0..self.geometry.kv_heads).map(keep).collect()))
    }
}

/// Indices of the tokens that stay: sinks, recent ones, and those with the highest scores; of equal ones the first.
fn choose(scores: &[f64], live: &[u32], seen: u64, allowance: &Allowance) -> Vec<u32> {
    let oldest = seen.saturating_sub(allowance.recent);
    let is_protected = |position: u32| u64::from(position) < allowance.sinks || u64::from(position) >= oldest;
    let (mut keep, mut others): (Vec<u32>, Vec<u32>) =
        (0..live.len() as u32).partition(|idx| is_protected(live[*idx as usize]));
    let room = allowance.target.saturating_sub(keep.len());
    if room < others.len() {
        // What is not finite is no reason to stay; adding zero makes both zeros one.
        let score = |idx: u32| scores.get(idx as usize).filter(|score| score.is_finite()).map_or(f64::MIN, |s| s + 0.0);
        others.select_nth_unstable_by(room, |a, b| score(*b).total_cmp(&score(*a)).then(a.cmp(b)));
        others.truncate(room);
    }
    keep.append(&mut others);
    keep.sort_unstable();
    keep
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWANCE: Allowance = Allowance { most: 5, target: 4, sinks: 1, recent: 1 };

    #[test]
    fn the_best_stay_beside_sinks_and_recent_tokens() {
        let live = [0, 1, 2, 3, 9];
        assert_eq!(choose(&[0.0, 0.1, 0.3, 0.2, 0.0], &live, 10, &ALLOWANCE), [0, 2, 3, 4]);
        assert_eq!(choose(&[9.0; 5], &live, 10, &ALLOWANCE), [0, 1, 2, 4]);
        assert_eq!(choose(&[0.0, -0.0, 0.0, 0.0, 0.0], &live, 10, &ALLOWANCE), [0, 1, 2, 4]);
    }

    #[test]
    fn scores_that_are_not_finite_count_as_none() {
        let live = [0, 1, 2, 3, 9];
        assert_eq!(choose(&[0.0, f64::NAN, f64::INFINITY, 0.0, 0.0], &live, 10, &ALLOWANCE), [0, 1, 3, 4]);
        assert_eq!(choose(&[f64::NAN; 5], &live, 10, &ALLOWANCE), [0, 1, 2, 4]);
        assert_eq!(choose(&[], &live, 10, &ALLOWANCE), [0, 1, 2, 4]);
    }

    #[test]
    fn without_recent_tokens_the_last_one_is_like_the_others() {
        let allowance = Allowance { most: 2, target: 2, sinks: 0, recent: 0 };
        assert_eq!(choose(&[0.5, 0.4, 0.1], &[0, 1, 2], 3, &allowance), [0, 1]);
    }
}
