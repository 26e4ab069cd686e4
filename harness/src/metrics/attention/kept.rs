//! Attention over some of the tokens, and how far it is from attention over all.

use gearbox_core::{Chunk, Error, Result};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use serde::Serialize;

use super::panels::{Columns, PANEL, Side};
use super::rule::Rule;
use super::softmax::{LANES, Row, all_finite};
use super::{Geometry, LayerInput, Query, Sides, add_outputs, columns, products, side};
use crate::dump::AttentionFacts;
use crate::metrics::element::{Element, with_element};
use crate::metrics::error::share;

/// Keys and values of one layer, from which queries attend to those that are live.
///
/// Memory is that of the layer in F32, and of about three million logits per thread.
pub struct KeptAttention {
    geometry: Geometry,
    /// Keys and values of each KV head.
    heads: Vec<(Side, Side)>,
}

/// Sums over queries of one head.
///
/// A query is *cut* if a token that it could see is gone; sums are over cut queries.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KeptSums {
    queries: u64,
    undefined: u64,
    cut: u64,
    mass: f64,
    lost_most: f64,
    seen: u64,
    held: u64,
    output_squares: f64,
    output_norm: f64,
}

/// How far attention over the tokens kept is from attention over all.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct KeptError {
    /// Queries that attended.
    pub queries: u64,
    /// Queries left out of all else, because their logits or outputs are not finite.
    pub undefined: u64,
    /// Queries that could see a token which is gone; the numbers below are over these.
    pub cut: u64,
    /// Mean of the probability that full attention gives to the tokens kept.
    pub kept_mass: f64,
    /// The least of them.
    pub kept_mass_least: f64,
    /// Norm of the difference of all outputs ÷ norm of all outputs of full attention.
    pub output_error: f64,
    /// Tokens that all queries could see ÷ tokens that they did see, cut or not: what attention read less.
    pub read_ratio: f64,
}

impl KeptSums {
    /// Adds the sums of other queries.
    pub fn merge(&mut self, other: &Self) {
        self.queries += other.queries;
        self.undefined += other.undefined;
        self.cut += other.cut;
        self.mass += other.mass;
        self.lost_most = self.lost_most.max(other.lost_most);
        self.seen += other.seen;
        self.held += other.held;
        self.output_squares += other.output_squares;
        self.output_norm += other.output_norm;
    }

    /// The error over all queries that were added.
    pub fn error(&self) -> KeptError {
        KeptError {
            queries: self.queries,
            undefined: self.undefined,
            cut: self.cut,
            kept_mass: if self.cut == 0 { 1.0 } else { self.mass / self.cut as f64 },
            kept_mass_least: 1.0 - self.lost_most,
            output_error: share(self.output_squares, self.output_norm).sqrt(),
            read_ratio: if self.held == 0 { 1.0 } else { self.seen as f64 / self.held as f64 },
        }
    }
}

impl KeptAttention {
    /// Takes in keys and values of consecutive tokens from position 0, in any number of parts; `facts` say how the layer attends, if not as
    /// [usual](AttentionFacts::usual).
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if they disagree in heads, tokens, or element type within a role.
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for facts that are impossible.
    pub fn new(
        keys: &[Chunk<'_>],
        values: &[Chunk<'_>],
        q_heads: usize,
        facts: Option<AttentionFacts>,
    ) -> Result<Self> {
        let tokens = keys.iter().map(|chunk| chunk.shape().seq).sum();
        let spans = [gearbox_core::Span { start: 0, seq: tokens }];
        let key = Sides { original: keys, decoded: keys };
        let value = Sides { original: values, decoded: values };
        let mut geometry = Geometry::of(&LayerInput { spans: &spans, key, value, queries: &[], facts })?;
        if q_heads == 0 || !q_heads.is_multiple_of(geometry.kv_heads) {
            let message = format!("expected query heads to be a multiple of {}, got {q_heads}", geometry.kv_heads);
            return Err(Error::shape(message));
        }
        geometry.q_heads = q_heads;
        let head = |head| Ok((side(&key, head, Columns::Tokens)?, side(&value, head, Columns::Channels)?));
        let heads = (0..geometry.kv_heads).into_par_iter().map(head).collect::<Result<_>>()?;
        Ok(Self { geometry, heads })
    }

    /// KV heads.
    pub fn kv_heads(&self) -> usize {
        self.geometry.kv_heads
    }

    /// Lets queries at consecutive positions from `first` on attend to live tokens up to their own, or to those of their window.
    ///
    /// Gives probabilities `(queries, q_heads, tokens)`, which sum to 1 over the live tokens that a query sees, and sums of each query head. `live` gives the
    /// positions of the tokens that a KV head holds, ascending, as many for each. The result does not depend on the number of threads.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if queries have another shape or positions lie behind the last
    /// token.
    pub fn attend<'a>(
        &self,
        queries: Chunk<'_>,
        first: usize,
        live: impl Fn(usize) -> &'a [u32] + Sync,
    ) -> Result<(Vec<f32>, Vec<KeptSums>)> {
        let Geometry { tokens, q_heads, kv_heads, key_dim, .. } = self.geometry;
        let shape = queries.shape();
        if (shape.heads, shape.dim) != (q_heads, key_dim) || first.saturating_add(shape.seq) > tokens {
            let expected = format!("queries of ({q_heads}, {key_dim}) up to token {tokens}");
            return Err(Error::shape(format!("expected {expected}, got {shape} from token {first} on")));
        }
        let row = live(0).len();
        for kv_head in 0..kv_heads {
            let live = live(kv_head);
            if live.len() != row || live.last().is_some_and(|last| *last as usize >= tokens) {
                let got = format!("{} up to {:?}", live.len(), live.last());
                return Err(Error::shape(format!("expected {row} live tokens below {tokens}, got {got}")));
            }
        }
        let block = self.geometry.block();
        let tasks: Vec<(usize, usize)> =
            (0..shape.seq).step_by(block).flat_map(|start| (0..q_heads).map(move |head| (start, head))).collect();
        let replay = |scratch: &mut Scratch, (start, head): &(usize, usize)| -> Result<(Vec<f32>, KeptSums)> {
            let part = queries.tokens(*start..shape.seq.min(start + block));
            scratch.load(part, *head)?;
            let kv_head = head / (q_heads / kv_heads);
            let (key, value) = &self.heads[kv_head];
            let (live, first) = (live(kv_head), first + start);
            Ok(Arch::new().dispatch(Block { geometry: self.geometry, key, value, first, live, scratch }))
        };
        let found: Vec<_> = tasks.par_iter().map_init(Scratch::default, replay).collect();
        let mut probabilities = vec![0.0; shape.seq * q_heads * row];
        let mut sums = vec![KeptSums::default(); q_heads];
        for ((start, head), found) in tasks.iter().zip(found) {
            let (rows, own) = found?;
            sums[*head].merge(&own);
            for (query, probabilities_of) in rows.chunks_exact(row.max(1)).enumerate() {
                let at = ((start + query) * q_heads + head) * row;
                probabilities[at..at + row].copy_from_slice(probabilities_of);
            }
        }
        Ok((probabilities, sums))
    }
}

/// Buffers of one thread, for one block. Matrices have one row per query.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    /// Logits, then probabilities over all tokens.
    full: Vec<f32>,
    /// Probabilities over live tokens less those over all.
    changes: Vec<f32>,
    /// Logits of the live tokens of one query, then probabilities.
    live: Vec<f32>,
    row: Row,
    outputs: Vec<f64>,
    errors: Vec<f64>,
}

impl Scratch {
    fn load(&mut self, queries: Chunk<'_>, head: usize) -> Result<()> {
        let shape = queries.shape();
        self.queries.clear();
        with_element!(queries.dtype(), E => {
            let rows = E::elements(queries.bytes()).chunks_exact(shape.dim).skip(head).step_by(shape.heads);
            self.queries.extend(rows.flatten().map(|element| E::number(E::word(element))));
        })
    }
}

/// A block of queries of one head, for the widest vectors of the machine.
struct Block<'a> {
    geometry: Geometry,
    key: &'a Side,
    value: &'a Side,
    /// Position of the first query.
    first: usize,
    live: &'a [u32],
    scratch: &'a mut Scratch,
}

impl WithSimd for Block<'_> {
    type Output = (Vec<f32>, KeptSums);

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        let Self { geometry, key, value, first, live, scratch } = self;
        let count = scratch.queries.len() / geometry.key_dim;
        let query = |token| {
            let up_to = |position: u64| position as usize + 1;
            let hidden = geometry.rule.hidden((first + token) as u64, up_to);
            Query { part: 0, token, sees: hidden..first + token + 1 }
        };
        let queries: Vec<Query> = (0..count).map(query).collect();
        let tokens = columns(&queries);
        let width = tokens.len().next_multiple_of(PANEL);
        products(&scratch.queries, &geometry, &key.original, &tokens, &mut scratch.full);
        scratch.changes.clear();
        scratch.changes.resize(count * width, 0.0);
        let mut rows = vec![0.0; count * live.len()];
        let masses: Vec<Option<(f64, usize)>> = queries
            .iter()
            .zip(rows.chunks_exact_mut(live.len().max(1)))
            .map(|(query, out)| scratch.attend(query, tokens.start, width, &geometry.rule, live, out))
            .collect();
        let dim = geometry.value_dim.next_multiple_of(PANEL);
        let Scratch { full, changes, outputs, errors, .. } = scratch;
        for matrix in [&mut *outputs, &mut *errors] {
            matrix.clear();
            matrix.resize(count * dim, 0.0);
        }
        add_outputs(value.finite, full, width, &queries, &value.original, outputs);
        if masses.iter().zip(&queries).any(|(mass, query)| mass.is_some_and(|(_, held)| held < query.sees.len())) {
            add_outputs(value.finite, changes, width, &queries, &value.original, errors);
        }
        let mut sums = KeptSums { queries: count as u64, ..KeptSums::default() };
        let squares = |vector: &[f64]| vector.iter().map(|number| number * number).sum::<f64>();
        let vectors = outputs.chunks_exact(dim).zip(errors.chunks_exact(dim));
        for ((query, mass), (output, error)) in queries.iter().zip(masses).zip(vectors) {
            let (norm, error) = (squares(output), squares(error));
            match mass {
                Some((mass, held)) if norm.is_finite() && error.is_finite() => {
                    sums.seen += query.sees.len() as u64;
                    sums.held += held as u64;
                    if held < query.sees.len() {
                        sums.cut += 1;
                        sums.mass += mass;
                        sums.lost_most = sums.lost_most.max(1.0 - mass);
                        sums.output_norm += norm;
                        sums.output_squares += error;
                    }
                }
                _ => sums.undefined += 1,
            }
        }
        (rows, sums)
    }
}

impl Scratch {
    /// Fills in the probabilities of one query over the live tokens that it sees, and how they differ from those over all. Gives the
    /// probability that these give to the live tokens, and their number.
    ///
    /// Rows begin with the token `start` and are `width` tokens wide.
    #[inline(always)]
    fn attend(
        &mut self,
        query: &Query,
        start: usize,
        width: usize,
        rule: &Rule,
        live: &[u32],
        out: &mut [f32],
    ) -> Option<(f64, usize)> {
        let row = query.token * width..(query.token + 1) * width;
        let (full, changes) = (&mut self.full[row.clone()], &mut self.changes[row]);
        let visible = query.sees.start - start..query.sees.end - start;
        let before = |token: usize| live.partition_point(|position| (*position as usize) < token);
        let seen = before(query.sees.start)..before(query.sees.end);
        let held = seen.len();
        if held == 0 || !all_finite(&full[visible.clone()]) {
            full.fill(0.0);
            return None;
        }
        rule.cap(&mut full[visible.clone()]);
        let (live, out) = (&live[seen.clone()], &mut out[seen]);
        self.live.clear();
        self.live.extend(live.iter().map(|position| full[*position as usize - start]));
        self.live.resize(held.next_multiple_of(LANES), f32::NEG_INFINITY);
        let padded = visible.end.next_multiple_of(LANES);
        full[..visible.start].fill(f32::NEG_INFINITY);
        full[visible.end..padded].fill(f32::NEG_INFINITY);
        full[padded..].fill(0.0);
        self.row.soften(&mut full[..padded]);
        if held == visible.len() {
            out.copy_from_slice(&full[visible]);
            return Some((1.0, held));
        }
        self.row.soften(&mut self.live);
        let mut mass = 0.0;
        for (change, probability) in changes.iter_mut().zip(&*full) {
            *change = -probability;
        }
        for ((position, probability), out) in live.iter().zip(&self.live).zip(out) {
            let token = *position as usize - start;
            mass += f64::from(full[token]);
            changes[token] += probability;
            *out = *probability;
        }
        Some((mass.min(1.0), held))
    }
}

#[cfg(test)]
mod tests {
    use gearbox_core::{DType, Shape};

    use super::*;

    const TOKENS: usize = 45;
    const Q_HEADS: usize = 4;
    const KV_HEADS: usize = 2;
    const DIM: usize = 20;

    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|idx| ((idx as f32 + seed) * 12.9898).sin() * 1.5).collect()
    }

    fn bytes(numbers: &[f32]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    /// Softmax over these tokens and the sum of their values, computed the plain way.
    fn plain(
        query: &[f32],
        keys: &[f32],
        values: &[f32],
        head: usize,
        tokens: &[usize],
        facts: AttentionFacts,
    ) -> (Vec<f64>, Vec<f64>) {
        let of = |numbers: &[f32], token: usize| -> Vec<f64> {
            let start = (token * KV_HEADS + head) * DIM;
            numbers[start..start + DIM].iter().copied().map(f64::from).collect()
        };
        let logit = |token: &usize| {
            let key = of(keys, *token);
            let logit = query.iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum::<f64>() * facts.scale;
            facts.softcap.map_or(logit, |softcap| softcap * (logit / softcap).tanh())
        };
        let weights: Vec<f64> = tokens.iter().map(|token| logit(token).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let probabilities: Vec<f64> = weights.iter().map(|weight| weight / sum).collect();
        let mut output = vec![0.0; DIM];
        for (token, probability) in tokens.iter().zip(&probabilities) {
            output.iter_mut().zip(of(values, *token)).for_each(|(out, value)| *out += probability * value);
        }
        (probabilities, output)
    }

    #[test]
    fn attention_over_live_tokens_is_that_of_plain_loops() {
        check(None);
    }

    #[test]
    fn scale_softcap_and_window_are_those_of_plain_loops() {
        check(Some(AttentionFacts { scale: 0.4, softcap: None, window: None }));
        check(Some(AttentionFacts { scale: 0.4, softcap: Some(1.5), window: None }));
        check(Some(AttentionFacts { scale: 0.4, softcap: Some(1.5), window: Some(11) }));
    }

    fn check(facts: Option<AttentionFacts>) {
        let stated = facts.unwrap_or_else(|| AttentionFacts::usual(DIM));
        let [keys, values] = [0.0, 0.5].map(|seed| numbers(TOKENS * KV_HEADS * DIM, seed));
        let queries = numbers(TOKENS * Q_HEADS * DIM, 0.25);
        let [key_bytes, value_bytes, query_bytes] = [&keys, &values, &queries].map(|numbers| bytes(numbers));
        let chunk = |heads, bytes| Chunk::new(Shape::new(TOKENS, heads, DIM), DType::F32, bytes).unwrap();
        let (key, value) = (chunk(KV_HEADS, &key_bytes), chunk(KV_HEADS, &value_bytes));
        let attention =
            KeptAttention::new(&[key.tokens(0..7), key.tokens(7..TOKENS)], &[value], Q_HEADS, facts).unwrap();
        // The last nine tokens are queries; each KV head lost other tokens, but none of those.
        let first = TOKENS - 9;
        let live: Vec<Vec<u32>> = (0..KV_HEADS)
            .map(|head| (head as u32..first as u32).step_by(2).chain(first as u32..TOKENS as u32).collect())
            .collect();
        let queries_of = chunk(Q_HEADS, &query_bytes).tokens(first..TOKENS);
        let (probabilities, sums) = attention.attend(queries_of, first, |head| &live[head]).unwrap();
        let row = live[0].len();
        for head in 0..Q_HEADS {
            let kv_head = head / (Q_HEADS / KV_HEADS);
            let (mut mass, mut least, mut squares, mut norm) = (0.0, 1.0_f64, 0.0, 0.0);
            for query in 0..9 {
                let start = ((first + query) * Q_HEADS + head) * DIM;
                let vector = &queries[start..start + DIM];
                let window = stated.window.map_or(TOKENS, |window| window as usize);
                let nearest = (first + query + 1).saturating_sub(window);
                let all: Vec<usize> = (nearest..=first + query).collect();
                let seen: Vec<usize> =
                    live[kv_head].iter().map(|token| *token as usize).filter(|token| all.contains(token)).collect();
                let (full, output) = plain(vector, &keys, &values, kv_head, &all, stated);
                let (kept, other) = plain(vector, &keys, &values, kv_head, &seen, stated);
                let got = &probabilities[(query * Q_HEADS + head) * row..][..row];
                let hidden = live[kv_head].iter().filter(|token| (**token as usize) < nearest).count();
                let expected = std::iter::repeat_n(&0.0, hidden).chain(&kept).chain(std::iter::repeat(&0.0));
                for (got, expected) in got.iter().zip(expected) {
                    assert!((f64::from(*got) - expected).abs() < 1e-6, "{got} {expected}");
                }
                let own: f64 = seen.iter().map(|token| full[*token - nearest]).sum();
                mass += own;
                least = least.min(own);
                squares += output.iter().zip(&other).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
                norm += output.iter().map(|a| a.powi(2)).sum::<f64>();
            }
            let error = sums[head].error();
            assert_eq!((error.queries, error.undefined, error.cut), (9, 0, 9));
            assert!((error.kept_mass - mass / 9.0).abs() < 1e-6);
            assert!((error.kept_mass_least - least).abs() < 1e-6);
            assert!((error.output_error / (squares / norm).sqrt() - 1.0).abs() < 1e-4);
        }
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let again = alone.install(|| attention.attend(queries_of, first, |head| &live[head]).unwrap());
        assert_eq!(again, (probabilities, sums), "the number of threads changes nothing");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let zeros = vec![0; 4 * 2 * 4 * 4];
        let chunk = Chunk::new(Shape::new(4, 2, 4), DType::F32, &zeros).unwrap();
        assert!(KeptAttention::new(&[chunk], &[chunk], 3, None).is_err());
        assert!(KeptAttention::new(&[chunk], &[chunk.tokens(0..3)], 2, None).is_err());
        let attention = KeptAttention::new(&[chunk], &[chunk], 2, None).unwrap();
        let refused =
            |first, live: [&[u32]; 2]| attention.attend(chunk.tokens(0..2), first, |head| live[head]).unwrap_err();
        assert!(refused(3, [&[0], &[1]]).to_string().starts_with("expected queries of (2, 4) up to token 4"));
        assert!(refused(1, [&[0], &[1, 2]]).to_string().starts_with("expected 1 live tokens below 4, got 2"));
        assert!(refused(1, [&[0], &[4]]).to_string().starts_with("expected 1 live tokens below 4, got 1 up to"));
    }
}
