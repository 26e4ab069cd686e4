//! Finds for each token an earlier one that resembles it, by content.
//!
//! Keys and values of a token resemble those of the same token elsewhere: exactly in the first layer's values, in sign and exponent
//! further up. Tokens are compared by the signs of their channels. Several bands of twelve channels are looked up in tables of the
//! latest token with the same signs there; of the tokens found, the one with the fewest different signs is taken. That finds nearly
//! all that a comparison with every earlier token finds, and takes a time per token that does not grow with their number.

use gearbox_core::Shape;
use pulp::{Arch, NullaryFnOnce};

/// Channels of a band.
const BAND: usize = 12;

/// Bands that are looked up per token, as far as there are channels.
const BANDS: usize = 16;

/// Finds references; kept between chunks.
#[derive(Debug, Default)]
pub(crate) struct Search {
    /// Signs of every token: `words` words for each head.
    signs: Vec<u64>,
    /// For each band and content, the latest token, counted from `epoch`.
    latest: Vec<u32>,
    /// Tokens of earlier chunks end here, so that the table need not be cleared.
    epoch: u32,
}

impl Search {
    /// Reports, for tokens from `from` on, the earlier token that resembles each most, and per head the number of different signs.
    ///
    /// `symbols` has the sign in bit 7 and the shape `shape`. `found` is called in order with the token, its reference and the differences.
    pub fn run(&mut self, symbols: &[u8], shape: Shape, from: usize, found: impl FnMut(usize, usize, &[u32])) {
        // For the instruction that counts bits.
        Arch::new().dispatch(Run { search: self, symbols, shape, from, found });
    }

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
    fn run_inlined(&mut self, symbols: &[u8], shape: Shape, from: usize, found: &mut impl FnMut(usize, usize, &[u32])) {
        let Shape { seq, heads, dim } = shape;
        let bands_per_head = (BANDS / heads.max(1)).clamp(1, (dim / BAND).max(1));
        let heads_used = (BANDS / bands_per_head).min(heads);
        if dim < BAND || seq < 2 {
            return;
        }
        let words = dim.div_ceil(64);
        self.read_signs(symbols, shape, words);
        let table = (bands_per_head * heads_used) << BAND;
        let next = u32::try_from(seq).ok().and_then(|seq| self.epoch.checked_add(seq));
        if self.latest.len() < table || next.is_none() {
            self.latest.clear();
            self.latest.resize(table, 0);
            self.epoch = 1;
        }
        let epoch = self.epoch;
        let row = heads * words;
        let mut best = vec![0; heads];
        // Where each band lies: heads in use are spread over all of them, bands over the channels of a head.
        let places: Vec<usize> = (0..bands_per_head * heads_used)
            .map(|band| {
                let head = band / bands_per_head * heads / heads_used;
                let bit = band % bands_per_head * dim / bands_per_head;
                head * words * 64 + bit.min(dim - BAND)
            })
            .collect();
        for token in 0..seq {
            let (earlier, own) = self.signs.split_at(token * row);
            let own = &own[..row];
            // Whether a band was seen before is as good as random, so there are no branches on it.
            let (mut candidates, mut found_in, mut tried) = ([0; BANDS + 1], 0, 0);
            for (latest, &place) in self.latest.as_chunks_mut::<{ 1 << BAND }>().0.iter_mut().zip(&places) {
                let candidate = std::mem::replace(&mut latest[window(own, place)], epoch + token as u32);
                candidates[found_in % (BANDS + 1)] = candidate;
                found_in += usize::from(candidate >= epoch && candidate != tried);
                tried = candidate;
            }
            if token < from {
                continue;
            }
            // The fewest differences, and of several such tokens the latest one.
            let mut least = u64::MAX;
            for candidate in &candidates[..found_in] {
                let at = (candidate - epoch) as usize * row;
                let sum = different(own, &earlier[at..at + row]);
                least = least.min(u64::from(sum) << 32 | u64::from(!candidate));
            }
            if found_in > 0 {
                let reference = (!(least as u32) - epoch) as usize;
                let other = &earlier[reference * row..(reference + 1) * row];
                for ((best, a), b) in best.iter_mut().zip(own.chunks_exact(words)).zip(other.chunks_exact(words)) {
                    *best = different(a, b);
                }
                found(token, reference, &best);
            }
        }
        self.epoch = epoch.saturating_add(seq as u32);
    }

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
    fn read_signs(&mut self, symbols: &[u8], shape: Shape, words: usize) {
        let Shape { seq, heads, dim } = shape;
        self.signs.clear();
        self.signs.reserve(seq * heads * words);
        for head in symbols.chunks_exact(dim) {
            for part in head.chunks(64) {
                let (eights, rest) = part.as_chunks::<8>();
                let mut word = 0;
                for (i, eight) in eights.iter().enumerate() {
                    word |= sign_bits(*eight) << (8 * i);
                }
                for (i, symbol) in (8 * eights.len()..).zip(rest) {
                    word |= u64::from(symbol >> 7) << i;
                }
                self.signs.push(word);
            }
        }
    }
}

/// What [`Search::run`] works on. A closure in its place would not be inlined, and so not get the wider instructions.
struct Run<'a, F> {
    search: &'a mut Search,
    symbols: &'a [u8],
    shape: Shape,
    from: usize,
    found: F,
}

impl<F: FnMut(usize, usize, &[u32])> NullaryFnOnce for Run<'_, F> {
    type Output = ();

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
    fn call(mut self) {
        self.search.run_inlined(self.symbols, self.shape, self.from, &mut self.found);
    }
}

/// Signs that differ.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn different(a: &[u64], b: &[u64]) -> u32 {
    if let ([a, b], [c, d]) = (a, b) {
        // Too short for vectors.
        return (a ^ c).count_ones() + (b ^ d).count_ones();
    }
    a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum()
}

/// Bit 7 of eight bytes, the first one lowest.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn sign_bits(bytes: [u8; 8]) -> u64 {
    let high = u64::from_le_bytes(bytes) >> 7 & 0x0101_0101_0101_0101;
    high.wrapping_mul(0x0102_0408_1020_4080) >> 56
}

/// Twelve bits from `bit` on.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn window(words: &[u64], bit: usize) -> usize {
    let (word, shift) = (bit / 64, bit % 64);
    let low = words[word] >> shift;
    let high = if shift + BAND > 64 { words.get(word + 1).map_or(0, |word| word << (64 - shift)) } else { 0 };
    ((low | high) as usize) & ((1 << BAND) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_are_read_in_order() {
        assert_eq!(sign_bits([0x80, 0, 0xFF, 0x7F, 0, 0, 0, 0x80]), 0b1000_0101);
        let words = [1 << 63, 0b101];
        assert_eq!(window(&words, 63), 0b1011);
        assert_eq!(window(&words, 60), 0b101_1000);
    }

    #[test]
    fn repeated_and_similar_tokens_are_found() {
        for shape in [Shape::new(40, 2, 64), Shape::new(40, 1, 80), Shape::new(40, 3, 128), Shape::new(40, 20, 16)] {
            let row = shape.row();
            let noise = |token: usize, channel: usize| {
                ((token * 7919 + channel * 104_729).wrapping_mul(2_654_435_761) >> 16) as u8
            };
            // Token 30 is token 7 again, token 35 token 20 with one sign changed.
            let source = |token| match token {
                30 => 7,
                35 => 20,
                other => other,
            };
            let mut symbols: Vec<u8> =
                (0..shape.seq).flat_map(|token| (0..row).map(move |channel| noise(source(token), channel))).collect();
            symbols[35 * row] ^= 0x80;
            let mut search = Search::default();
            for _ in 0..3 {
                let mut all = Vec::new();
                search.run(&symbols, shape, 10, |token, reference, differences| {
                    all.push((token, reference, differences.iter().sum::<u32>()));
                });
                assert!(all.contains(&(30, 7, 0)), "{shape}");
                assert!(all.contains(&(35, 20, 1)), "{shape}");
                assert!(all.iter().all(|(token, reference, _)| reference < token && *token >= 10));
            }
        }
    }
}
