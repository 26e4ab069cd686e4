//! Matrices in panels, and their product with rows of weights.
//!
//! A head's logits and outputs are both sums over the rows of a matrix, each times a weight: channels times a query, or tokens times
//! probabilities. Each sum is made in one order, whatever the vectors of the machine, and without fused multiplication, so it has the same
//! bits everywhere.
#![expect(clippy::inline_always, reason = "what is not inlined into the dispatch is compiled without its vectors")]

use gearbox_core::Chunk;

use crate::metrics::element::Element;

/// Columns of a panel.
pub(super) const PANEL: usize = 16;

/// Rows of weights that are multiplied at a time: with [`PANEL`] columns they keep the sixteen registers of AVX2 busy.
pub(super) const ROWS: usize = 4;

/// A matrix of F32 cut into panels of [`PANEL`] columns, each holding all rows; the last one is filled up with zeros.
#[derive(Debug)]
pub(super) struct Panels {
    rows: usize,
    data: Vec<[f32; PANEL]>,
}

impl Panels {
    fn new(rows: usize, columns: usize) -> Self {
        Self { rows, data: vec![[0.0; PANEL]; rows * columns.div_ceil(PANEL)] }
    }

    fn set(&mut self, row: usize, column: usize, number: f32) {
        self.data[column / PANEL * self.rows + row][column % PANEL] = number;
    }

    /// Each panel, cut to the rows of a range.
    #[inline(always)]
    pub(super) fn panels(&self, rows: std::ops::Range<usize>) -> impl Iterator<Item = &[[f32; PANEL]]> {
        self.data.chunks_exact(self.rows.max(1)).map(move |panel| &panel[rows.clone()])
    }
}

/// Keys or values of one head: the original ones, and what decoding changed.
#[derive(Debug)]
pub(super) struct Side {
    pub original: Panels,
    /// Decoded less original; none if all bits are equal.
    pub change: Option<Panels>,
    /// Whether all of both is finite.
    pub finite: bool,
}

/// What the columns of a matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Columns {
    Tokens,
    Channels,
}

impl Side {
    /// Takes one head out of tensors in any number of parts.
    pub(super) fn new<E: Element>(
        original: &[Chunk<'_>],
        decoded: &[Chunk<'_>],
        head: usize,
        columns: Columns,
    ) -> Self {
        let tokens = original.iter().map(|chunk| chunk.shape().seq).sum();
        let dim = original.first().map_or(0, |chunk| chunk.shape().dim);
        let empty = || match columns {
            Columns::Tokens => Panels::new(dim, tokens),
            Columns::Channels => Panels::new(tokens, dim),
        };
        let changed = rows::<E>(original, head)
            .zip(rows::<E>(decoded, head))
            .any(|(x, r)| x.iter().zip(r).any(|(x, r)| E::word(x) != E::word(r)));
        let mut side = Self { original: empty(), change: changed.then(empty), finite: true };
        for (token, (x, r)) in rows::<E>(original, head).zip(rows::<E>(decoded, head)).enumerate() {
            for (channel, (x, r)) in x.iter().zip(r).enumerate() {
                let (row, column) = match columns {
                    Columns::Tokens => (channel, token),
                    Columns::Channels => (token, channel),
                };
                let (x, r) = (E::word(x), E::word(r));
                side.original.set(row, column, E::number(x));
                let change = if x == r { 0.0 } else { E::number(r) - E::number(x) };
                side.finite &= E::is_finite(x) & change.is_finite();
                if let Some(panels) = &mut side.change {
                    panels.set(row, column, change);
                }
            }
        }
        side
    }
}

/// The channels of one head, token by token.
fn rows<'a, E: Element + 'a>(chunks: &'a [Chunk<'a>], head: usize) -> impl Iterator<Item = &'a [E::Bytes]> {
    chunks.iter().flat_map(move |chunk| {
        let shape = chunk.shape();
        E::elements(chunk.bytes()).chunks_exact(shape.dim.max(1)).skip(head).step_by(shape.heads.max(1))
    })
}

/// Sums the rows of a panel, each times its weight, for several rows of weights.
#[inline(always)]
pub(super) fn product<const N: usize>(weights: [&[f32]; N], panel: &[[f32; PANEL]]) -> [[f32; PANEL]; N] {
    let weights = weights.map(|row| &row[..panel.len()]);
    let mut sums = [[0.0; PANEL]; N];
    for (idx, row) in panel.iter().enumerate() {
        // By index: as an iterator over arrays, the sums stay in memory and nothing is vectorised.
        for n in 0..N {
            let weight = weights[n][idx];
            for lane in 0..PANEL {
                sums[n][lane] += weight * row[lane];
            }
        }
    }
    sums
}
