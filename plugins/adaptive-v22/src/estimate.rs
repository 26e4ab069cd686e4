//! What a predictor would cost, from counts of a sample instead of a frame.

use gearbox_core::Shape;

use crate::{Predictor, bitshuffle};

/// Most bytes of a block that are counted.
const SAMPLE: usize = 1024;

/// Fraction bits of [`LOG`].
const FRACTION: u32 = 12;

/// `count * log2(count)` in units of `2^-FRACTION`, for every count that a sample can have, up to a power of two.
///
/// Integers, so that every machine chooses the same predictors.
static LOG: [u32; 2 * SAMPLE] = {
    let mut table = [0; 2 * SAMPLE];
    let mut count = 1;
    while count < table.len() {
        table[count] = count as u32 * log2(count as u32);
        count += 1;
    }
    table
};

/// Base-2 logarithm of at least 1 in units of `2^-FRACTION`, rounded down.
const fn log2(number: u32) -> u32 {
    let mut log = number.ilog2();
    // The number over its greatest power of two, 1 to 2, in units of 2^-31; squaring it doubles what is left of the logarithm.
    let mut rest = (number as u64) << (31 - log);
    let mut bit = 0;
    while bit < FRACTION {
        rest = (rest * rest) >> 31;
        let is_above_two = rest >> 32;
        log = log << 1 | is_above_two as u32;
        rest >>= is_above_two;
        bit += 1;
    }
    log
}

/// Marks of the pieces that [`Estimator::repeats`] can tell apart at once.
const MARKS: usize = 1 << 13;

/// Estimates costs; its buffers are used again.
#[derive(Debug, Default)]
pub(crate) struct Estimator {
    /// Pieces of a block as one or two tokens: those a token before the pieces, if there are any, and the pieces.
    sample: Vec<u8>,
    predicted: Vec<u8>,
    shuffled: Vec<u8>,
    /// Bytes of the last token of the sample, which are counted.
    counted: usize,
    /// Channels of a piece.
    dim: usize,
    /// Bytes of the block.
    block_len: usize,
    /// Marks of the pieces of a stream that were seen.
    seen: Vec<u32>,
}

impl Estimator {
    /// Picks what is counted of a block: heads of tokens, spread over it.
    pub fn look_at(&mut self, block: &[u8], shape: Shape) {
        let Shape { seq, heads, dim } = shape;
        self.block_len = block.len();
        // A longer head is cut behind a whole pair of channels.
        self.dim = dim.clamp(1, SAMPLE);
        // The first token is not predicted and tells nothing, unless it is the only one.
        let back = if seq > 1 { heads } else { 0 };
        let candidates = (seq * heads).saturating_sub(back);
        // Odd, so that all heads have their turn.
        let step = candidates.div_ceil(SAMPLE / self.dim) | 1;
        self.sample.clear();
        let mut gather = |first: usize| {
            for piece in (first..first + candidates).step_by(step) {
                let start = piece * dim;
                self.sample.extend_from_slice(&block[start..start + self.dim]);
            }
        };
        gather(0);
        if back > 0 {
            gather(back);
        }
        self.counted = candidates.div_ceil(step) * self.dim;
        self.predicted.resize(self.sample.len(), 0);
        self.shuffled.resize(self.counted, 0);
    }

    /// Estimated cost of the block behind a predictor and perhaps a bitshuffle, in units of `2^-12` bits: the order-0 entropy of its bytes.
    ///
    /// Repeats, which zstd finds, are not estimated.
    pub fn cost(&mut self, predictor: Predictor, shuffle: bool) -> u64 {
        predictor.forward(&self.sample, self.counted, self.dim, &mut self.predicted);
        let mut counted = &self.predicted[self.predicted.len() - self.counted..];
        if shuffle {
            bitshuffle::shuffle(counted, &mut self.shuffled);
            counted = &self.shuffled;
        }
        // Four tables, so that runs of one value do not wait for their own last increment.
        let mut tables = [[0_u16; 256]; 4];
        let (quads, rest) = counted.as_chunks::<4>();
        for quad in quads {
            for (table, byte) in tables.iter_mut().zip(quad) {
                table[usize::from(*byte)] += 1;
            }
        }
        for byte in rest {
            tables[0][usize::from(*byte)] += 1;
        }
        let [mut counts, others @ ..] = tables;
        for other in others {
            for (count, more) in counts.iter_mut().zip(other) {
                *count += more;
            }
        }
        let present: u32 = counts.iter().map(|count| LOG[usize::from(*count) % LOG.len()]).sum();
        u64::from(LOG[self.counted] - present) * self.block_len as u64 / self.counted.max(1) as u64
    }

    /// Whether so much of a stream occurred before that a search for repeats will pay.
    ///
    /// Compares pieces of 16 bytes at every 64th of a token of `row` bytes: where keys or values repeat, they do so for a whole token.
    pub fn repeats(&mut self, stream: &[u8], row: usize) -> bool {
        let marks = (stream.len() / 8).next_power_of_two().min(MARKS);
        self.seen.clear();
        self.seen.resize(marks, 0);
        let (mut pieces, mut repeated) = (0_usize, 0_usize);
        for token in stream.chunks(row.max(16)) {
            for piece in token.chunks(64).filter_map(<[u8]>::first_chunk::<16>) {
                let halves = u128::from_le_bytes(*piece);
                let hash =
                    ((halves as u64) ^ ((halves >> 64) as u64).rotate_left(23)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let hash = (hash ^ hash >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                // Never 0, which marks an empty place.
                let mark = (hash >> 32) as u32 | 1;
                let place = &mut self.seen[hash as usize % marks];
                repeated += usize::from(*place == mark);
                *place = mark;
                pieces += 1;
            }
        }
        repeated * 16 > pieces
    }
}

#[cfg(test)]
mod tests {
    use gearbox_conformance::data::SplitMix64;

    use super::*;

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut random = SplitMix64::new(seed);
        (0..len).map(|_| random.next_u64() as u8).collect()
    }

    #[test]
    fn logarithms_are_those_of_floats() {
        for count in 1..=SAMPLE as u32 {
            let exact = f64::from(count).log2() * f64::from(1 << FRACTION);
            assert!((exact - f64::from(log2(count))).abs() < 1.01, "{count}: {exact} and {}", log2(count));
        }
    }

    #[test]
    fn costs_of_blocks_known_by_hand() {
        let mut estimator = Estimator::default();
        let bits =
            |estimator: &mut Estimator, predictor| (estimator.cost(predictor, false) + (1 << FRACTION) / 2) >> FRACTION;
        // Four tokens of 256 channels: every value once per token, and each token one more than the last.
        let shape = Shape::new(4, 1, 256);
        let block: Vec<u8> = (0..1024_u32).map(|i| (i % 256 + i / 256) as u8).collect();
        estimator.look_at(&block, shape);
        let costs = Predictor::ALL.map(|predictor| bits(&mut estimator, predictor));
        assert_eq!(costs[0], 8 * 1024);
        assert_eq!(costs[1], 0, "the difference to the token before is one");
        assert!(costs[2] < 4 * 1024 && costs[3] < 8 * 1024, "{costs:?}");
        assert_eq!(costs[4], 1024, "which leaves one and, as the difference of a pair, zero");
        // A single token has nothing before it.
        estimator.look_at(&block[..256], shape.with_seq(1));
        assert_eq!([0, 1, 2].map(|idx| bits(&mut estimator, Predictor::ALL[idx])), [2048; 3]);
        assert!(bits(&mut estimator, Predictor::PairDelta) < 2048);
    }

    #[test]
    fn samples_stay_within_their_limit_for_every_shape() {
        let mut estimator = Estimator::default();
        for (seq, heads, dim) in
            [(1, 1, 1), (1, 8, 128), (64, 8, 128), (64, 2, 64), (2, 1, 5000), (500, 3, 7), (70_000, 1, 1), (1, 1, 9999)]
        {
            let shape = Shape::new(seq, heads, dim);
            let block = noise(shape.elements(), 3);
            estimator.look_at(&block, shape);
            assert!((1..=SAMPLE).contains(&estimator.counted), "{shape}: {}", estimator.counted);
            assert_eq!(estimator.sample.len(), estimator.counted * if seq > 1 { 2 } else { 1 }, "{shape}");
            let most = 8 * shape.elements() as u64;
            assert!(
                Predictor::ALL.iter().all(|predictor| estimator.cost(*predictor, false) >> FRACTION <= most),
                "{shape}"
            );
        }
    }

    #[test]
    fn repeated_tokens_are_found_and_noise_is_not() {
        let mut estimator = Estimator::default();
        for row in [16, 64, 100, 128, 1024] {
            let tokens = noise(200 * row, 5);
            assert!(!estimator.repeats(&tokens, row), "row {row}");
            let again = [&tokens[..], &tokens[..40 * row]].concat();
            assert!(estimator.repeats(&again, row), "row {row}");
        }
        assert!(!estimator.repeats(&[], 16) && !estimator.repeats(&[0; 10], 1) && estimator.repeats(&[0; 999], 1));
    }
}
