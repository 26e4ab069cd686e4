//! Splitting words into a high and a low half, and back.
//!
//! A word of 16 bits has halves of one byte, a word of 32 bits has halves of two; every word and every half is little-endian. The delta of
//! a high half is its difference to the one `row` words earlier, modulo 256 or 65536; the first `row` halves stay as they are.
//! Low halves are never changed.
//!
//! All functions are total: what lies behind the shortest slice is left alone, and a `row` of 0 or of more words than there are makes
//! all words one row. They are plain loops that the compiler vectorises; [`pulp`] picks the widest vectors of the machine at run time.
//! It brings twelve small crates and buys AVX2. Measured on an AMD EPYC in 2026-11, 64 KiB buffers, as a part of memcpy: the best of
//! several loops for `split16_delta` 0.59 with SSE2 alone; with AVX2 0.86 where `src` is aligned to 32 bytes, as mapped files are,
//! 0.79 where it is not. Peeling words off to align it made it 0.58: then the stores straddle lines. `cargo bench -p gearbox-gear`
//! prints memcpy beside every kernel.
//!
//! What runs inside `dispatch` must be inlined into it, or it is compiled without the vectors: slices are cut before it.

use pulp::Arch;

/// Words that [`Word::undo`] computes at once where rows are long enough; of 16, 32 and 64 the fastest for 32-bit words, by 7 and 13 %,
/// and no slower for 16-bit words.
const BLOCK: usize = 16;

/// One width of words: its halves, and the loops that several functions share.
trait Word: Sized {
    type Bytes;
    type Half;
    /// The bits of the high half.
    const HIGH: Self;

    fn high(self) -> Self::Half;
    fn low(self) -> Self::Half;
    fn join(hi: Self::Half, lo: Self::Half) -> Self;
    fn split(src: &[u8], hi: &mut [u8], lo: &mut [u8]);
    /// Splits words, with the difference of the high halves to those of the words `before`.
    fn split_delta(src: &[u8], before: &[u8], hi: &mut [u8], lo: &mut [u8]);
    fn merge(hi: &[u8], lo: &[u8], out: &mut [u8]);

    /// Fills `out` from word `row + from` on, `N` words at once, and returns how many words of `hi` are then done.
    ///
    /// Word `row + i` comes from `hi[i]`, `lo[i]` and word `i`, so `N` must not be above `row`.
    fn undo<const N: usize>(
        hi: &[Self::Half],
        lo: &[Self::Half],
        row: usize,
        from: usize,
        out: &mut [Self::Bytes],
    ) -> usize;
}

/// Bytes that the first row takes of `len` bytes with `size` bytes per element.
fn first_row(row: usize, size: usize, len: usize) -> usize {
    if row == 0 { len } else { row.saturating_mul(size).min(len) }
}

/// Makes the functions for one width of words.
macro_rules! kernels {
    ($word:ty, $half:ty, $split:ident, $split_delta:ident, $split_both:ident, $merge:ident, $merge_delta:ident) => {
        #[doc = concat!("Splits every `", stringify!($word), "` of `src` into its halves.")]
        pub fn $split(src: &[u8], hi: &mut [u8], lo: &mut [u8]) {
            Arch::new().dispatch(
                #[inline(always)]
                || <$word>::split(src, hi, lo),
            );
        }

        #[doc = concat!("Like [`", stringify!($split), "`], but writes the delta of the high halves.")]
        ///
        /// One pass: the halves one row earlier are read from `src`, so nothing waits for what was just written.
        pub fn $split_delta(src: &[u8], row: usize, hi: &mut [u8], lo: &mut [u8]) {
            const HALF: usize = size_of::<$half>();
            let (src0, src1) = src.split_at(first_row(row, 2 * HALF, src.len()));
            let (hi0, hi1) = hi.split_at_mut(first_row(row, HALF, hi.len()));
            let (lo0, lo1) = lo.split_at_mut(first_row(row, HALF, lo.len()));
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    <$word>::split(src0, hi0, lo0);
                    <$word>::split_delta(src1, src, hi1, lo1);
                },
            );
        }

        #[doc = concat!("Like [`", stringify!($split), "`], and writes the delta of the high halves beside them, in one pass.")]
        pub fn $split_both(src: &[u8], row: usize, hi: &mut [u8], delta: &mut [u8], lo: &mut [u8]) {
            const HALF: usize = size_of::<$half>();
            let (src0, src1) = src.split_at(first_row(row, 2 * HALF, src.len()));
            let (hi0, hi1) = hi.split_at_mut(first_row(row, HALF, hi.len()));
            let (delta0, delta1) = delta.split_at_mut(first_row(row, HALF, delta.len()));
            let (lo0, lo1) = lo.split_at_mut(first_row(row, HALF, lo.len()));
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    <$word>::split(src0, hi0, lo0);
                    for (delta, hi) in delta0.iter_mut().zip(hi0) {
                        *delta = *hi;
                    }
                    let words = src1.as_chunks().0.iter().zip(src.as_chunks().0);
                    let halves = words.zip(hi1.as_chunks_mut().0).zip(lo1.as_chunks_mut().0);
                    for ((((word, before), hi), lo), delta) in halves.zip(delta1.as_chunks_mut().0) {
                        let word = <$word>::from_le_bytes(*word);
                        let before = <$word>::from_le_bytes(*before);
                        *hi = word.high();
                        *delta = word.wrapping_sub(before & <$word>::HIGH).high();
                        *lo = word.low();
                    }
                },
            );
        }

        #[doc = concat!("Undoes [`", stringify!($split), "`].")]
        pub fn $merge(hi: &[u8], lo: &[u8], out: &mut [u8]) {
            Arch::new().dispatch(
                #[inline(always)]
                || <$word>::merge(hi, lo, out),
            );
        }

        #[doc = concat!("Undoes [`", stringify!($split_delta), "`], in one pass.")]
        pub fn $merge_delta(hi: &[u8], lo: &[u8], row: usize, out: &mut [u8]) {
            const HALF: usize = size_of::<$half>();
            let (hi0, hi1) = hi.split_at(first_row(row, HALF, hi.len()));
            let (lo0, lo1) = lo.split_at(first_row(row, HALF, lo.len()));
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    <$word>::merge(hi0, lo0, out);
                    let (hi, lo, out) = (hi1.as_chunks().0, lo1.as_chunks().0, out.as_chunks_mut().0);
                    let done = if row >= BLOCK { <$word>::undo::<BLOCK>(hi, lo, row, 0, out) } else { 0 };
                    <$word>::undo::<1>(hi, lo, row, done, out);
                },
            );
        }

        impl Word for $word {
            type Bytes = [u8; size_of::<$word>()];
            type Half = [u8; size_of::<$half>()];
            const HIGH: Self = <$word>::MAX << <$half>::BITS;

            #[inline(always)]
            fn high(self) -> Self::Half {
                ((self >> <$half>::BITS) as $half).to_le_bytes()
            }

            #[inline(always)]
            fn low(self) -> Self::Half {
                (self as $half).to_le_bytes()
            }

            #[inline(always)]
            fn join(hi: Self::Half, lo: Self::Half) -> Self {
                (Self::from(<$half>::from_le_bytes(hi)) << <$half>::BITS) | Self::from(<$half>::from_le_bytes(lo))
            }

            #[inline(always)]
            fn split(src: &[u8], hi: &mut [u8], lo: &mut [u8]) {
                let halves = hi.as_chunks_mut().0.iter_mut().zip(lo.as_chunks_mut().0);
                for (word, (hi, lo)) in src.as_chunks().0.iter().zip(halves) {
                    let word = Self::from_le_bytes(*word);
                    (*hi, *lo) = (word.high(), word.low());
                }
            }

            #[inline(always)]
            fn split_delta(src: &[u8], before: &[u8], hi: &mut [u8], lo: &mut [u8]) {
                let words = src.as_chunks().0.iter().zip(before.as_chunks().0);
                for (((word, before), hi), lo) in words.zip(hi.as_chunks_mut().0).zip(lo.as_chunks_mut().0) {
                    let word = Self::from_le_bytes(*word);
                    let before = Self::from_le_bytes(*before);
                    *hi = word.wrapping_sub(before & Self::HIGH).high();
                    *lo = word.low();
                }
            }

            #[inline(always)]
            fn merge(hi: &[u8], lo: &[u8], out: &mut [u8]) {
                let halves = hi.as_chunks().0.iter().zip(lo.as_chunks().0);
                for (word, (hi, lo)) in out.as_chunks_mut().0.iter_mut().zip(halves) {
                    *word = Self::join(*hi, *lo).to_le_bytes();
                }
            }

            #[inline(always)]
            fn undo<const N: usize>(
                hi: &[Self::Half],
                lo: &[Self::Half],
                row: usize,
                from: usize,
                out: &mut [Self::Bytes],
            ) -> usize {
                let mut done = from;
                let (hi, lo) = (hi.get(from..).unwrap_or_default(), lo.get(from..).unwrap_or_default());
                for (hi, lo) in hi.as_chunks::<N>().0.iter().zip(lo.as_chunks::<N>().0) {
                    let Some((before, next)) = out.split_at_mut_checked(row + done) else { break };
                    let before = before.get(done..).and_then(<[_]>::first_chunk::<N>);
                    let (Some(before), Some(next)) = (before, next.first_chunk_mut::<N>()) else { break };
                    *next = std::array::from_fn(|i| {
                        let before = Self::from_le_bytes(before[i]) & Self::HIGH;
                        Self::join(hi[i], lo[i]).wrapping_add(before).to_le_bytes()
                    });
                    done += N;
                }
                done
            }
        }
    };
}

kernels!(u16, u8, split16, split16_delta, split16_both, merge16, merge16_delta);
kernels!(u32, u16, split32, split32_delta, split32_both, merge32, merge32_delta);

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes without a pattern that a kernel could get right by chance.
    fn noise(len: usize) -> Vec<u8> {
        (0..len as u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29) >> 17) as u8).collect()
    }

    /// The definition, one word at a time: high halves, their deltas, low halves.
    fn plain(src: &[u8], half: usize, row: usize) -> [Vec<u8>; 3] {
        let words: Vec<&[u8]> = src.chunks_exact(2 * half).collect();
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |n, byte| n << 8 | u32::from(*byte));
        let row = if row == 0 { words.len() } else { row };
        let mut streams = [Vec::new(), Vec::new(), Vec::new()];
        for (i, word) in words.iter().enumerate() {
            let before = if i < row { 0 } else { number(&words[i - row][half..]) };
            let delta = number(&word[half..]).wrapping_sub(before).to_le_bytes();
            streams[0].extend(&word[half..]);
            streams[1].extend(&delta[..half]);
            streams[2].extend(&word[..half]);
        }
        streams
    }

    /// Overwrites what an earlier kernel left.
    fn spoil<const N: usize>(planes: [&mut Vec<u8>; N]) {
        for plane in planes {
            plane.fill(0xEE);
        }
    }

    type Split = fn(&[u8], &mut [u8], &mut [u8]);
    type SplitDelta = fn(&[u8], usize, &mut [u8], &mut [u8]);
    type SplitBoth = fn(&[u8], usize, &mut [u8], &mut [u8], &mut [u8]);
    type Merge = fn(&[u8], &[u8], &mut [u8]);
    type MergeDelta = fn(&[u8], &[u8], usize, &mut [u8]);
    type Kernels = (usize, Split, SplitDelta, SplitBoth, Merge, MergeDelta);

    const WIDTHS: [Kernels; 2] = [
        (1, split16, split16_delta, split16_both, merge16, merge16_delta),
        (2, split32, split32_delta, split32_both, merge32, merge32_delta),
    ];

    #[test]
    fn kernels_agree_with_the_definition_at_every_length_and_row() {
        for (half, split, split_delta, split_both, merge, merge_delta) in WIDTHS {
            for words in [0, 1, 2, 3, 15, 16, 31, 32, 33, 64, 65, 127, 200, 1000] {
                for row in [0, 1, 2, 5, 16, 31, 32, 33, 48, 64, 199, 200, 5000] {
                    let src = noise(words * 2 * half);
                    let [high, delta, low] = plain(&src, half, row);
                    let (mut a, mut b, mut c) = (high.clone(), high.clone(), high.clone());
                    let mut out = src.clone();
                    let case = format!("half {half}, {words} words, row {row}");

                    spoil([&mut a, &mut b]);
                    split(&src, &mut a, &mut b);
                    assert_eq!((&a, &b), (&high, &low), "split, {case}");
                    spoil([&mut out]);
                    merge(&a, &b, &mut out);
                    assert_eq!(out, src, "merge, {case}");

                    spoil([&mut a, &mut b]);
                    split_delta(&src, row, &mut a, &mut b);
                    assert_eq!((&a, &b), (&delta, &low), "split with delta, {case}");
                    spoil([&mut out]);
                    merge_delta(&a, &b, row, &mut out);
                    assert_eq!(out, src, "merge with delta, {case}");

                    spoil([&mut a, &mut b, &mut c]);
                    split_both(&src, row, &mut a, &mut b, &mut c);
                    assert_eq!((a, b, c), (high, delta, low), "split with both, {case}");
                }
            }
        }
    }

    #[test]
    fn high_halves_wrap_around() {
        let (mut hi, mut lo) = ([0; 2], [0; 2]);
        split16_delta(&[0x34, 0x01, 0x56, 0x00], 1, &mut hi, &mut lo);
        assert_eq!((hi, lo), ([0x01, 0xFF], [0x34, 0x56]));

        let (mut hi, mut lo) = ([0; 4], [0; 4]);
        split32_delta(&[1, 2, 0, 1, 3, 4, 255, 0], 1, &mut hi, &mut lo);
        assert_eq!((hi, lo), ([0x00, 0x01, 0xFF, 0xFF], [1, 2, 3, 4]));
    }

    #[test]
    fn short_slices_never_panic() {
        for (_, split, split_delta, split_both, merge, merge_delta) in WIDTHS {
            let src = noise(301);
            for lens in [[0, 300, 300], [300, 0, 300], [7, 99, 300], [300, 300, 1]] {
                for row in [0, 1, 32, 33, 100] {
                    let [mut a, mut b, mut c] = lens.map(noise);
                    split(&src, &mut a, &mut b);
                    split_delta(&src, row, &mut a, &mut b);
                    split_both(&src, row, &mut a, &mut b, &mut c);
                    merge(&a, &b, &mut c);
                    merge_delta(&a, &b, row, &mut c);
                }
            }
        }
    }
}
