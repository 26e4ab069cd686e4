//! Sums over queries, and the report that is made of them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::metrics::error::{share, worst};
use crate::number;

/// What one query saw.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Seen {
    /// Tokens that the query sees.
    pub live: usize,
    /// Sum of the squared differences of logits.
    pub logit_squares: f64,
    /// Greatest difference of logits.
    pub logit_max: f64,
    /// Divergence in nats.
    pub kl: f64,
    /// Squared norm of the difference of outputs.
    pub output_squares: f64,
    /// Squared norm of the original output.
    pub output_norm: f64,
    /// Share of the most attended tokens that are the same.
    pub agreement: f64,
    /// Whether candidate logits or outputs are not finite.
    pub broken: bool,
}

/// Sums over the queries of one head, layer or dump; what divides them is [`AttentionSums::error`].
///
/// Merged in the same order they give the same bits, with any number of threads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttentionSums {
    queries: u64,
    undefined: u64,
    broken: u64,
    pairs: u64,
    logit_squares: f64,
    logit_max: f64,
    kl: f64,
    kl_max: f64,
    kls: BTreeMap<u32, u64>,
    output_squares: f64,
    output_norm: f64,
    agreement: f64,
}

/// Bits of an F64 below those that tell divergences apart: 7 bits of the mantissa stay, so two within 1/128 may be one.
const BUCKET_SHIFT: u32 = 52 - 7;

impl AttentionSums {
    pub(super) fn add(&mut self, seen: &Seen) {
        self.queries += 1;
        self.broken += u64::from(seen.broken);
        self.pairs += seen.live as u64;
        self.logit_squares += seen.logit_squares;
        self.logit_max = self.logit_max.max(seen.logit_max);
        self.kl += seen.kl;
        self.kl_max = self.kl_max.max(seen.kl);
        *self.kls.entry((seen.kl.to_bits() >> BUCKET_SHIFT) as u32).or_default() += 1;
        self.output_squares += seen.output_squares;
        self.output_norm += seen.output_norm;
        self.agreement += seen.agreement;
    }

    pub(super) fn add_undefined(&mut self) {
        self.undefined += 1;
    }

    /// Adds the sums of other queries.
    pub fn merge(&mut self, other: &Self) {
        self.queries += other.queries;
        self.undefined += other.undefined;
        self.broken += other.broken;
        self.pairs += other.pairs;
        self.logit_squares += other.logit_squares;
        self.logit_max = self.logit_max.max(other.logit_max);
        self.kl += other.kl;
        self.kl_max = self.kl_max.max(other.kl_max);
        for (bucket, count) in &other.kls {
            *self.kls.entry(*bucket).or_default() += count;
        }
        self.output_squares += other.output_squares;
        self.output_norm += other.output_norm;
        self.agreement += other.agreement;
    }

    /// The error over all queries that were added; without any it is that of exact inputs.
    pub fn error(&self) -> AttentionError {
        let queries = self.queries.max(1) as f64;
        AttentionError {
            queries: self.queries,
            undefined: self.undefined,
            broken: self.broken,
            logit_rmse: (self.logit_squares / self.pairs.max(1) as f64).sqrt(),
            logit_max: self.logit_max,
            kl_mean: self.kl / queries,
            kl_p99: self.kl_quantile(99),
            kl_max: self.kl_max,
            output_error: share(self.output_squares, self.output_norm).sqrt(),
            top_agreement: if self.queries == 0 { 1.0 } else { self.agreement / queries },
        }
    }

    /// The upper end of the bucket that holds the divergence of this rank.
    fn kl_quantile(&self, percent: u64) -> f64 {
        let rank = (self.queries * percent).div_ceil(100);
        let mut below = 0;
        for (bucket, count) in &self.kls {
            below += count;
            if below >= rank {
                let end = f64::from_bits(u64::from(bucket + 1) << BUCKET_SHIFT);
                return if *bucket == 0 { 0.0 } else { end.min(self.kl_max) };
            }
        }
        0.0
    }
}

/// How far attention over decoded keys and values is from attention over the original ones.
///
/// [`crate::metrics`] defines each number. Infinite ones become `null` in JSON, and infinite again when they are read; let that fail a gate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionError {
    /// Queries that the numbers are over.
    pub queries: u64,
    /// Queries left out, because they see no token, or because the logits or the output of the original are not finite.
    pub undefined: u64,
    /// Queries of which the original is finite and the decoded logits or output are not; they make what they break infinite.
    pub broken: u64,
    /// Root of the mean squared difference of scaled logits, over all pairs of a query and a token it sees.
    #[serde(deserialize_with = "number::or_infinite")]
    pub logit_rmse: f64,
    /// Greatest difference of scaled logits.
    #[serde(deserialize_with = "number::or_infinite")]
    pub logit_max: f64,
    /// Mean over queries of the divergence of the original probabilities from the decoded ones, in nats.
    #[serde(deserialize_with = "number::or_infinite")]
    pub kl_mean: f64,
    /// Divergence that 99 of 100 queries do not exceed, rounded up by less than 1 %, in nats.
    #[serde(deserialize_with = "number::or_infinite")]
    pub kl_p99: f64,
    /// Greatest divergence of a query, in nats.
    #[serde(deserialize_with = "number::or_infinite")]
    pub kl_max: f64,
    /// Norm of the difference of all outputs ÷ norm of all original outputs.
    #[serde(deserialize_with = "number::or_infinite")]
    pub output_error: f64,
    /// Mean over queries of the share of the most attended tokens that are the same.
    pub top_agreement: f64,
}

/// Sums of one run and layer, by query head.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerAttention {
    /// One per query head, in order.
    pub heads: Vec<AttentionSums>,
}

impl LayerAttention {
    /// Sums over all heads.
    pub fn total(&self) -> AttentionSums {
        let mut total = AttentionSums::default();
        self.heads.iter().for_each(|sums| total.merge(sums));
        total
    }
}

/// Error of one query head of one run and layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadAttention {
    /// Name of the run.
    pub run: String,
    /// Layer of the model.
    pub layer: u32,
    /// Query head.
    pub head: usize,
    /// Its error.
    #[serde(flatten)]
    pub error: AttentionError,
}

/// Error of one layer, over all heads and runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerAttentionError {
    /// Layer of the model.
    pub layer: u32,
    /// Its error.
    #[serde(flatten)]
    pub error: AttentionError,
}

/// Attention errors of a dump.
///
/// Of equally bad heads or layers the first in the order of the tables is named; there is none without any head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionReport {
    /// Over everything.
    pub all: AttentionError,
    /// The head with the highest mean divergence.
    pub worst_kl: Option<HeadAttention>,
    /// The head with the highest output error.
    pub worst_output: Option<HeadAttention>,
    /// The layer with the highest output error.
    pub worst_layer: Option<LayerAttentionError>,
    /// Each layer.
    pub layers: Vec<LayerAttentionError>,
    /// Each query head, in the order in which layers were added.
    pub heads: Vec<HeadAttention>,
}

/// Collects layers of any number of runs.
///
/// What it reports depends on the order in which layers are added, in the last digits and in the order of the tables: add them in stored
/// order. Memory grows by about a hundred bytes per head.
#[derive(Clone, Debug, Default)]
pub struct AttentionTally {
    heads: Vec<HeadAttention>,
    layers: BTreeMap<u32, AttentionSums>,
}

impl AttentionTally {
    /// Adds one layer of one run.
    pub fn add(&mut self, run: &str, layer: u32, found: &LayerAttention) {
        for (head, sums) in found.heads.iter().enumerate() {
            self.heads.push(HeadAttention { run: run.to_owned(), layer, head, error: sums.error() });
        }
        self.layers.entry(layer).or_default().merge(&found.total());
    }

    /// Adds what was collected from later layers or runs.
    pub fn merge(&mut self, other: Self) {
        self.heads.extend(other.heads);
        for (layer, sums) in &other.layers {
            self.layers.entry(*layer).or_default().merge(sums);
        }
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// The report over everything that was added.
    pub fn report(&self) -> AttentionReport {
        let mut all = AttentionSums::default();
        self.layers.values().for_each(|sums| all.merge(sums));
        let layers = self.layers.iter().map(|(layer, sums)| LayerAttentionError { layer: *layer, error: sums.error() });
        let layers: Vec<_> = layers.collect();
        AttentionReport {
            all: all.error(),
            worst_kl: worst(self.heads.iter(), |head| head.error.kl_mean).cloned(),
            worst_output: worst(self.heads.iter(), |head| head.error.output_error).cloned(),
            worst_layer: worst(layers.iter(), |layer| layer.error.output_error).cloned(),
            layers,
            heads: self.heads.clone(),
        }
    }
}
