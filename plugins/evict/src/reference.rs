//! The decision rules of the reference's runtime, in its last revision: when it evicts, and which blocks.
//!
//! The reference keeps whole blocks, the same for all heads. In each call of attention while decoding it adds up, over all heads, weights
//! that are no probabilities (see [`Reference::observe`]), takes a moving average per block, and when its clock says so keeps sinks, recent
//! tokens and the best blocks until a target is met, rounded up to whole blocks. If sinks and recent tokens alone exceed the target, the
//! floor *dominates*: nothing is evicted.
//!
//! Its clock counts calls of attention, those of all layers in turn, and one layer that decides uses up the interval of all. A session here
//! sees one layer. What other layers do depends on lengths and never on scores, so a session follows all of them by itself: as long as every
//! layer of the request evicts by these settings, as in the reference, it decides when the reference would.
//!
//! Deliberate differences: of blocks with equal scores the first stays, where the reference leaves it to an unstable sort; sums are F64;
//! and the reference's leak of the previous request, a defect, has no counterpart.
//!
//! # Examples
//! ```
//! use gearbox_evict::reference::{Keep, Rules};
//!
//! let rules = Rules { block: 32, sinks: 16, recent: 96, keep: Keep::Ratio(3.5) };
//! let decision = rules.decide(513, &[]);
//! assert_eq!((decision.floor, decision.target, decision.kept), (129, 147, 161));
//! assert!(!decision.dominated);
//! ```

use gearbox_core::{AttentionStep, CacheGeometry, CacheView, Error, EvictionSession, KeepSet, LayerRange, Result};
use serde::Serialize;

/// How many tokens are to stay, in F32 as in the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// One of so many tokens (`adaptive`).
    Ratio(f32),
    /// This part of the tokens (`static`).
    Fraction(f32),
}

/// Settings of a decision.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// Tokens of a block, at least 1.
    pub block: usize,
    /// First tokens whose blocks stay.
    pub sinks: usize,
    /// Last tokens whose blocks stay.
    pub recent: usize,
    /// How many tokens are to stay.
    pub keep: Keep,
}

/// Which tokens stay, and why so many.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// Tokens that the layer holds.
    pub tokens: usize,
    /// Tokens in blocks of sinks and recent tokens.
    pub floor: usize,
    /// Tokens that were to stay.
    pub target: usize,
    /// Tokens that stay by the rules, whole blocks of them: `q` in the reference. All stay all the same if the floor dominates.
    pub kept: usize,
    /// Whether the floor reaches the target, so that nothing is evicted.
    pub dominated: bool,
    /// Runs of tokens that stay by the rules, as first token and length.
    pub runs: Vec<(usize, usize)>,
}

impl Decision {
    /// Bytes of the tokens ÷ bytes of those that stay with eight for each run, as the reference states it.
    ///
    /// # Units
    /// `token_bytes` are those of a token in one layer, keys and values.
    pub fn lossy_ratio(&self, token_bytes: usize) -> f64 {
        let bytes = |tokens: usize| tokens as f64 * token_bytes as f64;
        bytes(self.tokens) / (bytes(self.kept) + 8.0 * self.runs.len() as f64)
    }
}

impl Rules {
    /// Decides for a layer that holds so many tokens. `scores` has one number per block; what is missing or not finite counts as none.
    pub fn decide(&self, tokens: usize, scores: &[f64]) -> Decision {
        let block = self.block.max(1);
        let blocks = tokens.div_ceil(block);
        let len = |idx: usize| block.min(tokens - idx * block);
        let sinks = tokens.min(self.sinks).div_ceil(block);
        let recent = tokens.saturating_sub(self.recent) / block;
        let mut stays: Vec<bool> = (0..blocks).map(|idx| idx < sinks || idx >= recent).collect();
        let floor: usize = (0..blocks).filter(|idx| stays[*idx]).map(len).sum();
        let ratio = match self.keep {
            Keep::Ratio(ratio) => 1.0 / ratio.max(1.0),
            Keep::Fraction(fraction) => fraction.clamp(0.0, 1.0),
        };
        #[expect(clippy::cast_sign_loss, reason = "a ratio is not negative")]
        let target = ((ratio * tokens as f32).ceil() as usize).min(tokens).max(1);
        let dominated = floor >= target;
        let kept = if dominated { floor } else { tokens.min(floor + (target - floor).next_multiple_of(block)) };
        let score =
            |idx: usize| scores.get(idx).filter(|score| score.is_finite()).map_or(f64::MIN, |score| score + 0.0);
        let mut others: Vec<usize> = (0..blocks).filter(|idx| !stays[*idx]).collect();
        others.sort_by(|a, b| score(*b).total_cmp(&score(*a)).then(a.cmp(b)));
        // Only the last block can be shorter, and that one is recent.
        others.truncate((kept - floor).div_ceil(block));
        for idx in others {
            stays[idx] = true;
        }
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for idx in (0..blocks).filter(|idx| stays[*idx]) {
            match runs.last_mut() {
                Some((start, run)) if *start + *run == idx * block => *run += len(idx),
                _ => runs.push((idx * block, len(idx))),
            }
        }
        Decision { tokens, floor, target, kept, dominated, runs }
    }
}

/// When decisions are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clock {
    /// Layers that evict.
    pub layers: LayerRange,
    /// Tokens below which a layer is left alone.
    pub min_tokens: usize,
    /// Calls of attention, those of all layers, between two decisions.
    pub interval: u64,
}

/// One layer of one request.
#[derive(Debug)]
pub struct Reference {
    rules: Rules,
    clock: Clock,
    /// Weight of the past in the moving average.
    ema: f64,
    geometry: CacheGeometry,
    /// Tokens that each layer holds.
    lengths: Vec<usize>,
    /// Calls of attention so far, in decoding.
    calls: u64,
    /// The call of the last decision of any layer.
    decided: u64,
    /// Whether this layer has a decision to make.
    is_due: bool,
    /// Average weight of each block.
    scores: Vec<f64>,
    decision: Option<Decision>,
}

/// Tokens that the reference's kernel looks at together.
const TILE: usize = 64;

impl Reference {
    pub(crate) fn new(rules: Rules, clock: Clock, ema: f64, geometry: &CacheGeometry) -> Result<Self> {
        if geometry.layer >= geometry.layers {
            let CacheGeometry { layer, layers, .. } = geometry;
            return Err(Error::shape(format!("expected a layer below {layers}, got {layer}")));
        }
        let lengths = vec![0; geometry.layers as usize];
        let (calls, decided, scores) = (0, 0, Vec::new());
        let (geometry, is_due, decision) = (*geometry, false, None);
        Ok(Self { rules, clock, ema, geometry, lengths, calls, decided, is_due, scores, decision })
    }

    /// What the last plan decided; none if its clock did not ask for a decision.
    pub fn decision(&self) -> Option<&Decision> {
        self.decision.as_ref()
    }

    /// Layer of the next call.
    fn next_layer(&self) -> usize {
        (self.calls % self.lengths.len() as u64) as usize
    }

    /// One call of attention, after a layer got a token.
    fn call(&mut self) {
        let layer = self.next_layer();
        self.calls += 1;
        self.lengths[layer] += 1;
        let tokens = self.lengths[layer];
        let interval = self.clock.interval.max(1);
        if !self.clock.layers.contains(layer as u32)
            || tokens < self.clock.min_tokens.max(1)
            || self.calls - self.decided < interval
        {
            return;
        }
        self.decided = self.calls;
        if layer == self.geometry.layer as usize {
            self.is_due = true;
            return;
        }
        // How many stay depends on no score.
        let decision = self.rules.decide(tokens, &[]);
        if !decision.dominated {
            self.lengths[layer] = decision.kept;
        }
    }

    /// Adds the weights of one query to the average of each block.
    ///
    /// Tokens are scanned in tiles of 64, and the kernel leaves `exp(x - m)` with the greatest logit `m` so far and without division by the
    /// sum: `p / max p` with the greatest probability up to the end of the tile. Where that is not defined, a weight counts as 0.
    fn score(&mut self, step: &AttentionStep<'_>) {
        let block = self.rules.block.max(1);
        let mut sums = vec![0.0; step.tokens.div_ceil(block)];
        for row in step.probabilities.chunks_exact(step.tokens.max(1)).take(self.geometry.q_heads) {
            let mut greatest = 0.0_f32;
            for (tile, probabilities) in row.chunks(TILE).enumerate() {
                greatest = probabilities.iter().copied().filter(|p| p.is_finite()).fold(greatest, f32::max);
                for (idx, probability) in probabilities.iter().enumerate() {
                    let weight = probability / greatest;
                    if weight.is_finite() {
                        sums[(tile * TILE + idx) / block] += f64::from(weight);
                    }
                }
            }
        }
        self.scores.resize(sums.len(), 0.0);
        let rows = self.geometry.q_heads.max(1) as f64;
        for (score, sum) in self.scores.iter_mut().zip(sums) {
            *score = self.ema * *score + (1.0 - self.ema) * (sum / rows);
        }
    }
}

impl EvictionSession for Reference {
    /// Takes in the attention of one generated token; steps of more queries, and the first of a sequence, are prefill, which the reference
    /// neither scores nor counts.
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()> {
        step.check(&self.geometry)?;
        if step.queries != 1 || step.first_query == 0 {
            self.lengths.iter_mut().for_each(|tokens| *tokens += step.queries);
            return Ok(());
        }
        let layer = self.geometry.layer as usize;
        while self.next_layer() != layer {
            self.call();
        }
        self.lengths[layer] = step.tokens.saturating_sub(1);
        self.call();
        if self.clock.layers.contains(self.geometry.layer) {
            self.score(step);
        }
        Ok(())
    }

    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet> {
        cache.check(&self.geometry)?;
        self.decision = None;
        if !std::mem::take(&mut self.is_due) {
            return Ok(KeepSet::All);
        }
        let decision = &*self.decision.insert(self.rules.decide(cache.tokens, &self.scores));
        if decision.dominated || decision.kept == cache.tokens {
            return Ok(KeepSet::All);
        }
        self.lengths[self.geometry.layer as usize] = decision.kept;
        let kept: Vec<u32> =
            decision.runs.iter().flat_map(|(start, len)| *start as u32..(start + len) as u32).collect();
        // Kept blocks but the last are whole, so those that stay are blocks again.
        let block = self.rules.block.max(1);
        let scores = kept.iter().step_by(block).map(|idx| self.scores.get(*idx as usize / block).copied());
        self.scores = scores.map(Option::unwrap_or_default).collect();
        Ok(KeepSet::Shared(kept))
    }
}

#[cfg(test)]
#[path = "reference_tests.rs"]
mod tests;
