//! Error of attention logits, where the dump holds queries.
//!
//! As `metrics::attention` defines it, with two limits that make it cheap enough for every setting of a sweep: a query sees the tokens of
//! its own entry alone, and few queries stand for all.

use gearbox_core::{Chunk, Result, Shape};
use gearbox_plugins::quant::reference;
use pulp::Arch;

use crate::dump::Entry;

/// Most queries of each head.
const QUERIES: usize = 16;

/// Queries of one entry, evenly spaced and with the last one.
#[derive(Clone, Debug)]
pub(in crate::exp) struct Queries {
    /// Tokens of the entry that they belong to, ascending.
    tokens: Vec<usize>,
    /// `(tokens, q_heads, dim)`, divided by the root of `dim`.
    values: Vec<f32>,
    shape: Shape,
}

impl Queries {
    /// Reads the queries of an entry, if it has any that fit its keys.
    ///
    /// # Errors
    /// What mapping the tensor reports.
    pub fn of(entry: &Entry) -> Result<Option<Self>> {
        let (Some(query), key) = (&entry.query, entry.key.shape) else { return Ok(None) };
        let shape = query.shape;
        let fits = key.heads > 0 && shape.heads > 0 && shape.heads.is_multiple_of(key.heads);
        if !fits || (shape.seq, shape.dim) != (key.seq, key.dim) {
            return Ok(None);
        }
        let count = QUERIES.min(shape.seq);
        let tokens: Vec<usize> = (1..=count).map(|i| i * shape.seq / count - 1).collect();
        let mut values = Vec::with_capacity(count * shape.row());
        for &token in &tokens {
            let bytes = query.map_tokens(token..token + 1)?;
            reference::widen(Chunk::new(shape.with_seq(1), query.dtype, &bytes)?, &mut values);
        }
        let root = (shape.dim as f32).sqrt();
        for value in &mut values {
            *value /= root;
        }
        Ok(Some(Self { tokens, values, shape }))
    }

    /// Errors of the logits of all queries with the keys up to their own token.
    ///
    /// Keys are `(seq, kv_heads, dim)`; `difference` is overwritten. Products are added in F32, their squares in F64.
    pub fn error(&self, kv_heads: usize, original: &[f32], decoded: &[f32], difference: &mut Vec<f32>) -> LogitSums {
        let (dim, heads) = (self.shape.dim.max(1), self.shape.heads);
        let group = heads / kv_heads.max(1);
        difference.clear();
        difference.extend(original.iter().zip(decoded).map(|(x, r)| r - x));
        let mut sums = LogitSums::default();
        let squares = &mut sums.squares;
        Arch::new().dispatch(
            #[inline(always)]
            || {
                // Moved, so that the closure is called once only: another kind need not be inlined, and then has no wide instructions.
                let squares = squares;
                for (token, row) in difference.chunks_exact(kv_heads * dim).enumerate() {
                    let first = self.tokens.partition_point(|query| *query < token);
                    for query in self.values.chunks_exact(heads * dim).skip(first) {
                        for (kv_head, key) in row.chunks_exact(dim).enumerate() {
                            let own = &query[kv_head * group * dim..(kv_head + 1) * group * dim];
                            for query in own.chunks_exact(dim) {
                                let logit = f64::from(dot(query, key));
                                *squares += logit * logit;
                            }
                        }
                    }
                }
            },
        );
        sums.pairs = self.tokens.iter().map(|token| (token + 1) as u64 * heads as u64).sum();
        sums
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut sums = [0.0_f32; 16];
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0] + rest
}

/// Squared errors of logits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(in crate::exp) struct LogitSums {
    squares: f64,
    pairs: u64,
}

impl LogitSums {
    /// Adds those of other entries.
    pub fn merge(&mut self, other: &Self) {
        self.squares += other.squares;
        self.pairs += other.pairs;
    }

    /// Root of the mean of the squares, or none without queries.
    pub fn error(&self) -> Option<f64> {
        (self.pairs > 0).then(|| (self.squares / self.pairs as f64).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_sees_keys_of_its_head_up_to_its_token() {
        // Two tokens, one head of keys of two channels, two heads of queries; the root of `dim` is taken out already.
        let shape = Shape::new(2, 2, 2);
        let queries = Queries { tokens: vec![0, 1], values: vec![1.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 3.0], shape };
        let (original, decoded) = ([0.0; 4], [1.0, 2.0, 10.0, 20.0]);
        let sums = queries.error(1, &original, &decoded, &mut Vec::new());
        // Token 0: 1 and 2. Token 1: 2 and 6 with the first key, 20 and 60 with the second.
        assert_eq!(sums, LogitSums { squares: 1.0 + 4.0 + 4.0 + 36.0 + 400.0 + 3600.0, pairs: 6 });
        assert_eq!(queries.error(1, &decoded, &decoded, &mut Vec::new()).error(), Some(0.0));
        assert_eq!(LogitSums::default().error(), None);
    }

    #[test]
    fn dot_is_the_sum_of_products() {
        for len in [0_u16, 1, 15, 16, 17, 40] {
            let values: Vec<f32> = (0..len).map(f32::from).collect();
            let expected: f32 = values.iter().map(|value| 2.0 * value).sum();
            assert_eq!(dot(&values, &vec![2.0; values.len()]).to_bits(), (expected + 0.0).to_bits());
        }
    }
}
