//! Predictors: what is left of a byte when its neighbour is known.

use gearbox_core::Shape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A reversible change of a block of bytes of shape `(seq, heads, dim)`; all arithmetic is modulo 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Predictor {
    /// The bytes as they are.
    Raw,
    /// The difference to the same channel of the token before; the first token stays.
    DeltaSeq,
    /// The exclusive or with the same channel of the token before; the first token stays.
    XorSeq,
    /// Odd channels of a head as the difference to the even channel before them; even ones, and an odd last one, stay.
    PairDelta,
    /// `pair_delta`, and then `delta_seq` of the result.
    PairDeltaDeltaSeq,
}

impl Predictor {
    /// Every predictor, in the order of their mode bytes.
    pub const ALL: [Self; 5] = [Self::Raw, Self::DeltaSeq, Self::XorSeq, Self::PairDelta, Self::PairDeltaDeltaSeq];

    /// The name used in settings, flags and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::DeltaSeq => "delta_seq",
            Self::XorSeq => "xor_seq",
            Self::PairDelta => "pair_delta",
            Self::PairDeltaDeltaSeq => "pair_delta_delta_seq",
        }
    }

    /// The predictor of a name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|predictor| predictor.name() == name)
    }

    /// The byte that stands for it in encoded lanes.
    pub(crate) const fn mode(self) -> u8 {
        self as u8
    }

    /// The predictor of a mode byte.
    pub(crate) fn of_mode(mode: u8) -> Option<Self> {
        Self::ALL.get(usize::from(mode)).copied()
    }

    /// The simplest predictor that does the same to blocks of this shape: without an earlier token or a second channel there is nothing to
    /// predict from.
    pub(crate) fn simplest(self, shape: Shape) -> Self {
        match (self, shape.seq > 1, shape.dim > 1) {
            (Self::PairDeltaDeltaSeq, true, false) => Self::DeltaSeq,
            (Self::PairDeltaDeltaSeq, false, true) => Self::PairDelta,
            (Self::DeltaSeq | Self::XorSeq | Self::PairDeltaDeltaSeq, false, _) | (Self::PairDelta, _, false) => {
                Self::Raw
            }
            _ => self,
        }
    }

    /// Predicts a block into `out`.
    ///
    /// # Shapes
    /// Tokens have `row` bytes, heads `dim`; `out` is as long as `block`.
    pub fn forward(self, block: &[u8], row: usize, dim: usize, out: &mut [u8]) {
        match self {
            Self::Raw => out.copy_from_slice(block),
            Self::DeltaSeq => with_token_before(block, row, out, u8::wrapping_sub),
            Self::XorSeq => with_token_before(block, row, out, |byte, before| byte ^ before),
            Self::PairDelta => pairs(block, dim, out),
            Self::PairDeltaDeltaSeq => {
                pairs(block, dim, out);
                // From the last token on, so that each still finds the one before as it was.
                for token in (1..out.len().div_ceil(row.max(1))).rev() {
                    update_token(out, row, token, u8::wrapping_sub);
                }
            }
        }
    }

    /// Undoes [`Predictor::forward`] in place.
    pub fn inverse(self, block: &mut [u8], row: usize, dim: usize) {
        let later = 1..block.len().div_ceil(row.max(1));
        match self {
            Self::Raw | Self::PairDelta => {}
            Self::XorSeq => later.for_each(|token| update_token(block, row, token, |byte, before| byte ^ before)),
            Self::DeltaSeq | Self::PairDeltaDeltaSeq => {
                later.for_each(|token| update_token(block, row, token, u8::wrapping_add));
            }
        }
        if matches!(self, Self::PairDelta | Self::PairDeltaDeltaSeq) {
            for head in block.chunks_mut(pairs_in_a_row(block.len(), dim)) {
                for pair in head.as_chunks_mut::<2>().0 {
                    let word = u16::from_le_bytes(*pair);
                    *pair = word.wrapping_add(word << 8).to_le_bytes();
                }
            }
        }
    }
}

/// The first token as it is, every later byte combined with the one a token earlier.
fn with_token_before(block: &[u8], row: usize, out: &mut [u8], combine: impl Fn(u8, u8) -> u8) {
    let first = row.min(block.len()).min(out.len());
    let (head, tail) = out.split_at_mut(first);
    head.copy_from_slice(&block[..first]);
    for ((to, byte), before) in tail.iter_mut().zip(&block[first..]).zip(block) {
        *to = combine(*byte, *before);
    }
}

/// Combines one token, which must not be the first, with the one before it.
fn update_token(block: &mut [u8], row: usize, token: usize, combine: impl Fn(u8, u8) -> u8) {
    let (earlier, rest) = block.split_at_mut(token * row);
    for (byte, before) in rest.iter_mut().zip(&earlier[(token - 1) * row..]) {
        *byte = combine(*byte, *before);
    }
}

/// The odd channels of every head as the difference to the even ones before them.
fn pairs(block: &[u8], dim: usize, out: &mut [u8]) {
    let len = pairs_in_a_row(block.len(), dim);
    for (head, to) in block.chunks(len).zip(out.chunks_mut(len)) {
        let ((pairs, last), (to, to_last)) = (head.as_chunks::<2>(), to.as_chunks_mut::<2>());
        for (pair, to) in pairs.iter().zip(to) {
            // As one word: the low byte loses nothing, the high byte the low one, and there is no borrow between them.
            let word = u16::from_le_bytes(*pair);
            *to = word.wrapping_sub(word << 8).to_le_bytes();
        }
        to_last.copy_from_slice(last);
    }
}

/// Bytes that can be cut into pairs at once: a head whose last channel stands alone ends them.
fn pairs_in_a_row(len: usize, dim: usize) -> usize {
    if dim % 2 == 1 { dim } else { len.max(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three tokens of one head of five channels.
    const BLOCK: [u8; 15] = [10, 250, 3, 7, 255, 12, 1, 3, 9, 0, 5, 2, 200, 100, 50];

    fn forward(predictor: Predictor, block: &[u8], row: usize, dim: usize) -> Vec<u8> {
        let mut out = vec![0xEE; block.len()];
        predictor.forward(block, row, dim, &mut out);
        out
    }

    #[test]
    fn vectors_of_the_reference() {
        let expected = [
            BLOCK,
            [10, 250, 3, 7, 255, 2, 7, 0, 2, 1, 249, 1, 197, 91, 50],
            [10, 250, 3, 7, 255, 6, 251, 0, 14, 255, 9, 3, 203, 109, 50],
            [10, 240, 3, 4, 255, 12, 245, 3, 6, 0, 5, 253, 200, 156, 50],
            [10, 240, 3, 4, 255, 2, 5, 0, 2, 1, 249, 8, 197, 150, 50],
        ];
        for (predictor, expected) in Predictor::ALL.into_iter().zip(expected) {
            assert_eq!(forward(predictor, &BLOCK, 5, 5), expected, "{}", predictor.name());
        }
    }

    #[test]
    fn pairs_do_not_cross_heads() {
        let block = [1, 3, 10, 11, 20, 40];
        assert_eq!(forward(Predictor::PairDelta, &block, 6, 3), [1, 2, 10, 11, 9, 40]);
        assert_eq!(forward(Predictor::PairDelta, &block, 6, 2), [1, 2, 10, 1, 20, 20]);
        assert_eq!(forward(Predictor::PairDelta, &block, 6, 1), block);
    }

    #[test]
    fn inverse_undoes_forward_for_every_shape() {
        for shape in [(0, 1, 1), (1, 1, 1), (1, 2, 4), (2, 1, 1), (7, 1, 3), (9, 2, 5), (33, 3, 16), (64, 2, 64)] {
            let shape = Shape::new(shape.0, shape.1, shape.2);
            let block: Vec<u8> = (0..shape.elements() as u32).map(|i| (i.wrapping_mul(i + 77) >> 3) as u8).collect();
            for predictor in Predictor::ALL {
                let mut bytes = forward(predictor, &block, shape.row(), shape.dim);
                assert_eq!(
                    bytes,
                    forward(predictor.simplest(shape), &block, shape.row(), shape.dim),
                    "{shape}, {}",
                    predictor.name()
                );
                predictor.inverse(&mut bytes, shape.row(), shape.dim);
                assert_eq!(bytes, block, "{shape}, {}", predictor.name());
            }
        }
    }

    #[test]
    fn names_and_modes_lead_back() {
        for (mode, predictor) in Predictor::ALL.into_iter().enumerate() {
            assert_eq!(Predictor::of_name(predictor.name()), Some(predictor));
            assert_eq!((usize::from(predictor.mode()), Predictor::of_mode(mode as u8)), (mode, Some(predictor)));
            assert_eq!(serde_json::json!(predictor), predictor.name());
        }
        assert_eq!((Predictor::of_name("delta"), Predictor::of_mode(5)), (None, None));
    }
}
