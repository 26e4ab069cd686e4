//! Replay of attention over original and decoded keys and values, for dumps that hold queries; [the module above](super) defines each
//! number.
//!
//! Dumps hold keys and queries after RoPE, so a logit is a scaled dot product, and all else that is needed of the model is what
//! [`AttentionFacts`] say of the layer: scale, softcap and window. Query head `h` reads KV head `h / (q_heads / kv_heads)`, and a query
//! sees every cached token up to its own position, or those of its window.
//!
//! Logits and outputs are sums of products in F32, softmax is F64. Errors are not differences of two results: they are computed from the
//! differences of the inputs, so equal inputs give exactly zero, and errors far below the rounding of F32 keep their digits. A softcap keeps
//! that, because the change of a capped logit is computed from the change of the product, as `sinh(d) / (cosh(a) cosh(b))`. All sums are
//! made in an order that the shapes fix, so the bits are the same with any number of threads.
//!
//! Memory is that of one KV head in F32, its keys and values and what changed of both, and of about three million logits per thread.
//!
//! The loops are our own: the crate `gemm` is unsafe to call, and made 71 GFLOP/s where these make 86 (logits of 32 queries of 64 channels
//! over 2048 tokens, one thread, alternating, AMD EPYC, 2026-11).
//!
//! # Examples
//! ```
//! use gearbox::metrics::attention::{Attention, AttentionOptions, AttentionTally, LayerInput, Queries, Sides};
//! use gearbox_core::{Chunk, DType, Shape, Span};
//!
//! // Two tokens, one head of one channel; keys 0 and 1, values 1 and 2. The decoder lost the key of the second token.
//! let bytes = |numbers: [f32; 2]| numbers.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
//! let (keys, lost, values) = (bytes([0.0, 1.0]), bytes([0.0, 0.0]), bytes([1.0, 2.0]));
//! let chunk = |bytes| Chunk::new(Shape::new(2, 1, 1), DType::F32, bytes).unwrap();
//! let (keys, lost, values) = ([chunk(&keys)], [chunk(&lost)], [chunk(&values)]);
//! let input = LayerInput {
//!     spans: &[Span { start: 0, seq: 2 }],
//!     key: Sides { original: &keys, decoded: &lost },
//!     value: Sides { original: &values, decoded: &values },
//!     queries: &[Queries { first: 0, chunk: keys[0] }],
//!     facts: None,
//! };
//! let found = Attention::new(AttentionOptions::default()).unwrap().layer(&input).unwrap();
//! let mut tally = AttentionTally::default();
//! tally.add("run", 0, &found);
//! let all = tally.report().all;
//! // The query of the second token is 1: its logits 0 and 1 became 0 and 0.
//! assert_eq!((all.queries, all.logit_max), (2, 1.0));
//! let p = 1.0 / (1.0 + 1f64.exp());
//! let kl = p * (2.0 * p).ln() + (1.0 - p) * (2.0 * (1.0 - p)).ln();
//! assert!((all.kl_max - kl).abs() < 1e-15);
//! ```
#![expect(clippy::inline_always, reason = "what is not inlined into the dispatch is compiled without its vectors")]

use std::ops::Range;

use gearbox_core::{Chunk, DType, Error, Result, ResultExt, Role, Span};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::kept::{KeptAttention, KeptError, KeptSums};
use self::panels::{Columns, PANEL, Panels, ROWS, Side, product};
use self::rule::Rule;
use self::softmax::{LANES, Row, all_finite};
use self::tally::Seen;
pub use self::tally::{
    AttentionError, AttentionReport, AttentionSums, AttentionTally, HeadAttention, LayerAttention, LayerAttentionError,
};
use super::element::{Element, with_element};
use crate::dump::AttentionFacts;

mod kept;
mod panels;
mod rule;
mod softmax;
mod tally;
#[cfg(test)]
#[expect(clippy::float_cmp, reason = "what is compared is exact")]
mod tests;

/// How much is replayed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AttentionOptions {
    /// Most queries per head, evenly spaced and with the last one; all if absent.
    #[schemars(range(min = 1))]
    pub queries: Option<usize>,
    /// How many of the most attended tokens are compared.
    #[schemars(range(min = 1))]
    pub top: usize,
}

impl Default for AttentionOptions {
    fn default() -> Self {
        Self { queries: None, top: 8 }
    }
}

/// One layer of one run: what the cache held, what came back, and the queries that read it.
#[derive(Clone, Copy, Debug)]
pub struct LayerInput<'a> {
    /// Positions of the cached tokens: ascending runs, with gaps where tokens are missing.
    pub spans: &'a [Span],
    /// Keys.
    pub key: Sides<'a>,
    /// Values; their `dim` may be another one than that of keys.
    pub value: Sides<'a>,
    /// Queries, in any number of parts.
    pub queries: &'a [Queries<'a>],
    /// How the layer attends, if not as [usual](AttentionFacts::usual).
    pub facts: Option<AttentionFacts>,
}

/// One tensor before and after. Each comes in any number of parts that follow each other, cut wherever it suits.
///
/// # Shapes
/// Parts are `(seq, kv_heads, dim)`, together as many tokens as the spans.
#[derive(Clone, Copy, Debug)]
pub struct Sides<'a> {
    /// The tensor in the dump.
    pub original: &'a [Chunk<'a>],
    /// The tensor that was decoded.
    pub decoded: &'a [Chunk<'a>],
}

/// Queries at consecutive positions.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// Position of the first.
    pub first: u64,
    /// The queries, `(seq, q_heads, dim)`, with `q_heads` a multiple of `kv_heads`.
    pub chunk: Chunk<'a>,
}

/// Replays attention.
#[derive(Clone, Debug)]
pub struct Attention {
    options: AttentionOptions,
}

impl Attention {
    /// Takes options.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) if a count is 0.
    pub fn new(options: AttentionOptions) -> Result<Self> {
        for (pointer, count) in [("/queries", options.queries.unwrap_or(1)), ("/top", options.top)] {
            if count == 0 {
                return Err(Error::invalid_config(format!("`{pointer}`: expected at least 1, got 0")));
            }
        }
        Ok(Self { options })
    }

    /// The options.
    pub fn options(&self) -> &AttentionOptions {
        &self.options
    }

    /// Replays one layer of one run, in parallel over heads and queries on the thread pool of the caller.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if the parts disagree in heads, channels, tokens or, original
    /// and decoded, in element type.
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if there are no queries, or positions do not ascend, or for
    /// facts that are impossible.
    /// [`ErrorKind::UnsupportedDType`](gearbox_core::ErrorKind::UnsupportedDType) for element types other than F16, BF16 and F32.
    pub fn layer(&self, input: &LayerInput<'_>) -> Result<LayerAttention> {
        let geometry = Geometry::of(input)?;
        let queries = self.select(input, &geometry.rule)?;
        let block = geometry.block();
        let blocks: Vec<&[Query]> = queries.chunks(block).collect();
        let group = geometry.q_heads / geometry.kv_heads;
        let mut heads = vec![AttentionSums::default(); geometry.q_heads];
        for kv_head in 0..geometry.kv_heads {
            let (key, value) = rayon::join(
                || side(&input.key, kv_head, Columns::Tokens),
                || side(&input.value, kv_head, Columns::Channels),
            );
            let (key, value) = (key?, value?);
            let tasks: Vec<(usize, &[Query])> =
                (0..group).flat_map(|head| blocks.iter().map(move |block| (kv_head * group + head, *block))).collect();
            let replay = |scratch: &mut Scratch, (head, block): &(usize, &[Query])| {
                scratch.load(input.queries, *head, block)?;
                let mut sums = AttentionSums::default();
                let (key, value, options) = (&key, &value, &self.options);
                let block = Block { geometry, key, value, options, queries: block, scratch, sums: &mut sums };
                Arch::new().dispatch(block);
                Ok((*head, sums))
            };
            let found: Vec<Result<(usize, AttentionSums)>> =
                tasks.par_iter().map_init(Scratch::default, replay).collect();
            for found in found {
                let (head, sums) = found?;
                heads[head].merge(&sums);
            }
        }
        Ok(LayerAttention { heads })
    }

    /// Queries to replay, with the tokens that each sees.
    fn select(&self, input: &LayerInput<'_>, rule: &Rule) -> Result<Vec<Query>> {
        let mut before = Vec::with_capacity(input.spans.len());
        let (mut tokens, mut end) = (0, 0);
        for span in input.spans {
            if span.start < end {
                let message = format!("expected ascending positions, got {} after {end} were taken", span.start);
                return Err(Error::invalid_input(message));
            }
            before.push(tokens);
            tokens += span.seq;
            end = span.start.saturating_add(span.seq as u64);
        }
        let up_to = |position: u64| {
            let idx = input.spans.partition_point(|span| span.start <= position);
            let Some(idx) = idx.checked_sub(1) else { return 0 };
            let span = input.spans[idx];
            let seen = usize::try_from(position - span.start).unwrap_or(usize::MAX).saturating_add(1);
            before[idx] + seen.min(span.seq)
        };
        let all = input.queries.iter().enumerate().flat_map(|(part, queries)| {
            (0..queries.chunk.shape().seq).map(move |token| (part, token, queries.first.saturating_add(token as u64)))
        });
        let total: usize = input.queries.iter().map(|queries| queries.chunk.shape().seq).sum();
        if total == 0 {
            return Err(Error::invalid_input("expected queries, got none"));
        }
        let count = self.options.queries.unwrap_or(total).min(total);
        let mut wanted = (1..=count).map(|i| i * total / count - 1).peekable();
        let chosen = all.enumerate().filter(|(idx, _)| wanted.next_if_eq(idx).is_some());
        let query = |part, token, position| Query { part, token, sees: rule.hidden(position, up_to)..up_to(position) };
        Ok(chosen.map(|(_, (part, token, position))| query(part, token, position)).collect())
    }
}

/// Takes one KV head out of keys or values.
fn side(sides: &Sides<'_>, head: usize, columns: Columns) -> Result<Side> {
    let dtype = sides.original.first().map_or(DType::F32, Chunk::dtype);
    with_element!(dtype, E => Side::new::<E>(sides.original, sides.decoded, head, columns))
}

/// A query to replay.
#[derive(Clone, Debug)]
struct Query {
    /// Number of the part that holds it.
    part: usize,
    /// Its number there.
    token: usize,
    /// Tokens that it sees, by their number in the cache.
    sees: Range<usize>,
}

/// Extents of a layer, checked against each other.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    tokens: usize,
    q_heads: usize,
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    rule: Rule,
}

/// Most queries that are replayed together.
const BLOCK: usize = 32;

/// Logits of a block, where a block of [`ROWS`] queries has fewer.
const BLOCK_LOGITS: usize = 1 << 20;

impl Geometry {
    fn of(input: &LayerInput<'_>) -> Result<Self> {
        let tokens = input.spans.iter().map(|span| span.seq).fold(0, usize::saturating_add);
        let (kv_heads, key_dim) = Self::sides(&input.key, tokens).context(|| Role::Key.to_string())?;
        let (value_heads, value_dim) = Self::sides(&input.value, tokens).context(|| Role::Value.to_string())?;
        if kv_heads != value_heads {
            return Err(Error::shape(format!("expected {kv_heads} heads of values as of keys, got {value_heads}")));
        }
        let q_heads = input.queries.first().map_or(kv_heads, |queries| queries.chunk.shape().heads);
        if q_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
            return Err(Error::shape(format!("expected query heads to be a multiple of {kv_heads}, got {q_heads}")));
        }
        for queries in input.queries {
            let shape = queries.chunk.shape();
            if (shape.heads, shape.dim) != (q_heads, key_dim) {
                return Err(Error::shape(format!("expected queries of ({q_heads}, {key_dim}), got {shape}")));
            }
        }
        let rule = Rule::of(input.facts, key_dim)?;
        Ok(Self { tokens, q_heads, kv_heads, key_dim, value_dim, rule })
    }

    /// Heads and channels of keys or values.
    fn sides(sides: &Sides<'_>, tokens: usize) -> Result<(usize, usize)> {
        let first = sides.original.first().ok_or_else(|| Error::invalid_input("expected a tensor, got no parts"))?;
        let (heads, dim, dtype) = (first.shape().heads, first.shape().dim, first.dtype());
        if heads == 0 || dim == 0 {
            return Err(Error::shape(format!("expected heads and channels, got {}", first.shape())));
        }
        for (name, chunks) in [("original", sides.original), ("decoded", sides.decoded)] {
            let mut seq = 0usize;
            for chunk in chunks {
                let shape = chunk.shape();
                if (shape.heads, shape.dim, chunk.dtype()) != (heads, dim, dtype) {
                    let got = format!("{} of {shape}", chunk.dtype());
                    return Err(Error::shape(format!("expected {dtype} of ({heads}, {dim}), got {got}")).context(name));
                }
                seq = seq.saturating_add(shape.seq);
            }
            if seq != tokens {
                return Err(Error::shape(format!("expected {tokens} tokens, got {seq}")).context(name));
            }
        }
        Ok((heads, dim))
    }

    /// Queries of a block; it depends on the shapes alone, as the order of additions depends on it.
    fn block(&self) -> usize {
        (BLOCK_LOGITS / self.tokens.max(1)).clamp(ROWS, BLOCK) / ROWS * ROWS
    }
}

/// The tokens that any of these queries sees, from the start of a panel on: the columns of a block.
fn columns(queries: &[Query]) -> Range<usize> {
    let first = queries.iter().map(|query| query.sees.start).min().unwrap_or(0) / PANEL * PANEL;
    first..queries.iter().map(|query| query.sees.end).max().unwrap_or(0).max(first)
}

/// Buffers of one thread, for one block. Matrices have one row per query.
#[derive(Default)]
struct Scratch {
    /// The queries, as many columns as a key has channels.
    queries: Vec<f32>,
    /// Original logits, then probabilities.
    logits: Vec<f32>,
    /// Changes of the logits, then of the probabilities.
    changes: Vec<f32>,
    /// Decoded probabilities.
    decoded: Vec<f32>,
    /// Changed logits of one query.
    sums: Vec<f64>,
    row: Row,
    /// The most attended tokens, original and decoded.
    tops: [Vec<u32>; 2],
    /// Original outputs.
    outputs: Vec<f64>,
    /// Changes of the outputs.
    errors: Vec<f64>,
    /// What is known of each query; none if it is undefined.
    seen: Vec<Option<Seen>>,
}

impl Scratch {
    /// Fills in the queries of a block.
    fn load(&mut self, parts: &[Queries<'_>], head: usize, block: &[Query]) -> Result<()> {
        self.queries.clear();
        for query in block {
            let chunk = parts[query.part].chunk.tokens(query.token..query.token + 1);
            let dim = chunk.shape().dim;
            with_element!(chunk.dtype(), E => {
                let elements = &E::elements(chunk.bytes())[head * dim..(head + 1) * dim];
                self.queries.extend(elements.iter().map(|element| E::number(E::word(element))));
            })?;
        }
        Ok(())
    }
}

/// The replay of a block of queries of one head, for the widest vectors of the machine.
struct Block<'a> {
    geometry: Geometry,
    key: &'a Side,
    value: &'a Side,
    options: &'a AttentionOptions,
    queries: &'a [Query],
    scratch: &'a mut Scratch,
    sums: &'a mut AttentionSums,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { geometry, key, value, options, queries, scratch, sums } = self;
        let tokens = columns(queries);
        let width = tokens.len().next_multiple_of(PANEL);
        products(&scratch.queries, &geometry, &key.original, &tokens, &mut scratch.logits);
        if let Some(change) = &key.change {
            products(&scratch.queries, &geometry, change, &tokens, &mut scratch.changes);
            scratch.decoded.resize(queries.len() * width, 0.0);
        }
        scratch.seen.clear();
        for (idx, query) in queries.iter().enumerate() {
            let visible = query.sees.start - tokens.start..query.sees.end - tokens.start;
            let row = idx * width..(idx + 1) * width;
            let seen = scratch.attend(row, visible, &geometry.rule, key.change.is_some(), options.top);
            scratch.seen.push(seen);
        }
        let dim = geometry.value_dim.next_multiple_of(PANEL);
        let Scratch { logits: original, changes, decoded, outputs, errors, seen, .. } = scratch;
        for matrix in [&mut *outputs, &mut *errors] {
            matrix.clear();
            matrix.resize(queries.len() * dim, 0.0);
        }
        let finite = value.finite;
        add_outputs(finite, original, width, queries, &value.original, outputs);
        if key.change.is_some() {
            add_outputs(finite, changes, width, queries, &value.original, errors);
        }
        if let Some(change) = &value.change {
            let weights = if key.change.is_some() { decoded } else { original };
            add_outputs(finite, weights, width, queries, change, errors);
        }
        let vectors = outputs.chunks_exact(dim).zip(errors.chunks_exact(dim));
        for (seen, (output, error)) in seen.iter().zip(vectors) {
            let squares = |vector: &[f64]| vector.iter().map(|number| number * number).sum::<f64>();
            let (norm, error) = (squares(output), squares(error));
            match *seen {
                Some(seen) if norm.is_finite() => {
                    let broken = seen.broken || !error.is_finite();
                    let output_squares = if broken { f64::INFINITY } else { error };
                    sums.add(&Seen { output_norm: norm, output_squares, broken, ..seen });
                }
                _ => sums.add_undefined(),
            }
        }
    }
}

impl Scratch {
    /// Turns the products of one query into probabilities; what it does not see becomes zero.
    #[inline(always)]
    fn attend(
        &mut self,
        row: Range<usize>,
        visible: Range<usize>,
        rule: &Rule,
        keys_changed: bool,
        top: usize,
    ) -> Option<Seen> {
        let logits = &mut self.logits[row.clone()];
        let padded = visible.end.next_multiple_of(LANES);
        let mut seen = Seen { live: visible.len(), agreement: 1.0, ..Seen::default() };
        let defined = !visible.is_empty() && all_finite(&logits[visible.clone()]);
        if !defined {
            logits.fill(0.0);
            if keys_changed {
                self.changes[row.clone()].fill(0.0);
                self.decoded[row].fill(0.0);
            }
            return None;
        }
        let changes_finite = keys_changed && all_finite(&self.changes[row.clone()][visible.clone()]);
        logits[..visible.start].fill(f32::NEG_INFINITY);
        logits[visible.end..padded].fill(f32::NEG_INFINITY);
        logits[padded..].fill(0.0);
        let logits = &mut logits[..padded];
        if !keys_changed {
            rule.cap(&mut logits[visible]);
            self.row.soften(logits);
            return Some(seen);
        }
        let (changes, decoded) = (&mut self.changes[row.clone()], &mut self.decoded[row]);
        if !changes_finite {
            changes.fill(0.0);
            decoded.fill(0.0);
            let infinite = f64::INFINITY;
            (seen.logit_squares, seen.logit_max, seen.kl, seen.agreement) = (infinite, infinite, infinite, 0.0);
            seen.broken = true;
            rule.cap(&mut logits[visible]);
            self.row.soften(logits);
            return Some(seen);
        }
        changes[..visible.start].fill(0.0);
        changes[visible.end..].fill(0.0);
        decoded[padded..].fill(0.0);
        let (changes, decoded) = (&mut changes[..padded], &mut decoded[..padded]);
        self.sums.resize(padded, 0.0);
        add_changes(logits, changes, &mut self.sums);
        // A softcap leaves the order as it is, but rounds logits to others; so what is ranked are the products.
        let [before, after] = &mut self.tops;
        largest(logits, f32::NEG_INFINITY, top, before);
        largest(&self.sums, f64::NEG_INFINITY, top, after);
        let common = before.iter().filter(|token| after.contains(token)).count();
        seen.agreement = common as f64 / before.len().max(1) as f64;
        if rule.cap_changes(&logits[visible.clone()], &mut changes[visible.clone()]) {
            rule.cap(&mut logits[visible]);
            add_changes(logits, changes, &mut self.sums);
        }
        let normalizer = self.row.soften(logits);
        self.row.change(normalizer, &self.sums, changes, decoded, &mut seen);
        Some(seen)
    }
}

/// Changed logits.
#[inline(always)]
fn add_changes(logits: &[f32], changes: &[f32], sums: &mut [f64]) {
    for (sum, (z, change)) in sums.iter_mut().zip(logits.iter().zip(changes)) {
        *sum = f64::from(*z) + f64::from(*change);
    }
}

/// Finds the tokens with the `count` largest logits, all that there are if they are fewer; of equal ones the first.
///
/// Logits fill whole lanes; those at `lowest` are of no token.
#[inline(always)]
fn largest<T: Copy + PartialOrd>(logits: &[T], lowest: T, count: usize, tokens: &mut Vec<u32>) {
    tokens.clear();
    let mut least = lowest;
    for (idx, lanes) in logits.as_chunks::<LANES>().0.iter().enumerate() {
        // All of them are compared, which vectors do at once; few pass.
        if lanes.iter().filter(|logit| **logit > least).count() == 0 {
            continue;
        }
        for (lane, logit) in lanes.iter().enumerate() {
            if *logit > least {
                let at = tokens.partition_point(|token| logits[*token as usize] >= *logit);
                tokens.truncate(count - 1);
                tokens.insert(at, (idx * LANES + lane) as u32);
                if tokens.len() == count {
                    least = tokens.last().map_or(lowest, |token| logits[*token as usize]);
                }
            }
        }
    }
}

/// Computes scaled products of all queries with the keys of these tokens, filled up to whole panels.
#[inline(always)]
fn products(queries: &[f32], geometry: &Geometry, keys: &Panels, tokens: &Range<usize>, out: &mut Vec<f32>) {
    let (dim, scale) = (geometry.key_dim, geometry.rule.scale);
    let width = tokens.len().next_multiple_of(PANEL);
    out.resize(queries.len() / dim * width, 0.0);
    for (panel, keys) in keys.panels(0..dim).skip(tokens.start / PANEL).take(width / PANEL).enumerate() {
        let column = panel * PANEL;
        let groups = queries.chunks_exact(ROWS * dim);
        let (rest, whole) = (groups.remainder(), queries.len() / (ROWS * dim) * ROWS);
        for (group, rows) in groups.enumerate() {
            let weights: [&[f32]; ROWS] = std::array::from_fn(|row| &rows[row * dim..(row + 1) * dim]);
            for (row, sums) in product(weights, keys).into_iter().enumerate() {
                store(&mut out[(group * ROWS + row) * width + column..], sums, scale);
            }
        }
        for (row, weights) in rest.chunks_exact(dim).enumerate() {
            let [sums] = product([weights], keys);
            store(&mut out[(whole + row) * width + column..], sums, scale);
        }
    }
}

#[inline(always)]
fn store(out: &mut [f32], sums: [f32; PANEL], scale: f32) {
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = sum * scale;
    }
}

/// Tokens that are summed in F32 before they are added in F64; 16 KiB of a panel.
const SECTION: usize = 256;

/// Adds values times weights to the outputs of all queries.
///
/// Where values are not all `finite`, they must not meet the zero weight of a query that does not see them.
#[inline(always)]
fn add_outputs(finite: bool, weights: &[f32], width: usize, queries: &[Query], values: &Panels, out: &mut [f64]) {
    let tokens = columns(queries);
    let dim = out.len() / queries.len().max(1);
    let together = if finite { queries.len() / ROWS * ROWS } else { 0 };
    for start in tokens.clone().step_by(SECTION) {
        let end = tokens.end.min(start + SECTION);
        let section = start - tokens.start..end - tokens.start;
        for (panel, values) in values.panels(start..end).enumerate() {
            for first in (0..together).step_by(ROWS) {
                let rows = std::array::from_fn(|row| &weights[(first + row) * width..][section.clone()]);
                for (row, sums) in product::<ROWS>(rows, values).into_iter().enumerate() {
                    add(&mut out[(first + row) * dim + panel * PANEL..], sums);
                }
            }
            for (row, query) in queries.iter().enumerate().skip(together) {
                let sees = if finite {
                    start..end
                } else {
                    query.sees.start.clamp(start, end)..query.sees.end.clamp(start, end)
                };
                let weights = &weights[row * width..][sees.start - tokens.start..sees.end - tokens.start];
                let [sums] = product([weights], &values[sees.start - start..sees.end - start]);
                add(&mut out[row * dim + panel * PANEL..], sums);
            }
        }
    }
}

#[inline(always)]
fn add(out: &mut [f64], sums: [f32; PANEL]) {
    for (out, sum) in out.iter_mut().zip(sums) {
        *out += f64::from(sum);
    }
}
