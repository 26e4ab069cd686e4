//! How often each symbol of a stream occurs.

use crate::symbols::{symbol_size, vectorized};

/// Counts of the symbols of one stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    bits: u8,
    counts: Vec<u64>,
}

impl Counts {
    /// Symbols that [`Counts::is_noise`] looks at, in runs.
    pub const SAMPLE: usize = 4096;
    const RUN: usize = 256;

    /// Zeros for an alphabet of `bits` bits, 1 to 12.
    pub fn new(bits: u8) -> Self {
        Self { bits, counts: vec![0; 1 << bits] }
    }

    /// Back to zeros, for an alphabet of `bits` bits.
    pub fn reset(&mut self, bits: u8) {
        self.bits = bits;
        self.counts.clear();
        self.counts.resize(1 << bits, 0);
    }

    /// Counts symbols in memory, see `symbols.rs`; none is above the alphabet.
    pub fn add(&mut self, symbols: &[u8]) {
        // A table of 32-bit counts cannot overflow within a block.
        for block in symbols.chunks(1 << 31) {
            match self.bits {
                1 => self.add_bits(block),
                2..=8 => self.add_narrow(block),
                _ => self.add_wide(block),
            }
        }
    }

    fn add_bits(&mut self, symbols: &[u8]) {
        // Sums of up to 255 fit a byte, which makes them eight times as fast.
        let sum = |part: &[u8]| u64::from(part.iter().fold(0, |sum: u8, symbol| sum.wrapping_add(*symbol)));
        let ones: u64 = symbols.chunks(255).map(sum).sum();
        if let [zeros, sum] = &mut self.counts[..] {
            *zeros += symbols.len() as u64 - ones;
            *sum += ones;
        }
    }

    fn add_narrow(&mut self, symbols: &[u8]) {
        // Four tables, so that a run of one symbol does not wait for its own last increment; adding them up pays from here on.
        let (groups, rest) = if symbols.len() < 1024 { (&[][..], symbols) } else { symbols.as_chunks::<4>() };
        if !groups.is_empty() {
            let mut tables = [[0_u32; 256]; 4];
            for group in groups {
                for (table, symbol) in tables.iter_mut().zip(group) {
                    table[usize::from(*symbol)] += 1;
                }
            }
            let [a, b, c, d] = &tables;
            for ((((count, a), b), c), d) in self.counts.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                *count += u64::from(*a) + u64::from(*b) + u64::from(*c) + u64::from(*d);
            }
        }
        for symbol in rest {
            if let Some(count) = self.counts.get_mut(usize::from(*symbol)) {
                *count += 1;
            }
        }
    }

    fn add_wide(&mut self, symbols: &[u8]) {
        let symbols = symbols.as_chunks::<2>().0;
        let mut table = [0_u32; 1 << 12];
        let last = table.len() - 1;
        vectorized(
            #[inline(always)]
            || {
                for symbol in symbols {
                    table[usize::from(u16::from_le_bytes(*symbol)) & last] += 1;
                }
            },
        );
        for (count, more) in self.counts.iter_mut().zip(table) {
            *count += u64::from(more);
        }
    }

    /// Whether a stream of at least [`Counts::SAMPLE`] symbols looks as if coding would save less than a hundredth, from a part of it.
    pub fn is_noise(&mut self, symbols: &[u8]) -> bool {
        let size = symbol_size(self.bits);
        let step = symbols.len() / size / Self::SAMPLE * Self::RUN * size;
        for run in symbols.chunks(step.max(1)).take(Self::SAMPLE / Self::RUN) {
            self.add(&run[..run.len().min(Self::RUN * size)]);
        }
        // How often two symbols of the sample are equal tells the collision entropy, which even a small sample of a large alphabet
        // estimates without bias. Near noise it lacks twice as much as Shannon's: 1/64 instead of 1/128.
        let total = self.total();
        let equal: u64 = self.used().map(|(_, count)| count * (count - 1)).sum();
        let entropy = log2(total * (total - 1)).saturating_sub(log2(equal));
        entropy >= (u64::from(self.bits) << LOG2_POINT) / 64 * 63
    }

    /// Adds the counts of another stream of the same alphabet.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
    }

    /// Bits of the alphabet.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Count of every symbol of the alphabet.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Symbols that occur, ascending, with their counts.
    pub fn used(&self) -> impl Iterator<Item = (usize, u64)> + Clone {
        self.counts.iter().copied().enumerate().filter(|(_, count)| *count > 0)
    }

    /// The sum of what `cost` says for each symbol counted, from its place in `table`; `None` if one that occurs has a zero there.
    pub fn cost<N: Copy + Into<u64>>(&self, table: &[N], cost: impl Fn(u64) -> u64) -> Option<u64> {
        self.used().try_fold(0, |sum: u64, (symbol, count)| {
            let number = table.get(symbol).map_or(0, |number| (*number).into());
            (number > 0).then(|| sum + count * cost(number))
        })
    }

    /// Number of all symbols counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The symbol, if all are equal.
    pub fn only_symbol(&self) -> Option<u16> {
        let mut used = self.used();
        match (used.next(), used.next()) {
            (Some((symbol, _)), None) => Some(symbol as u16),
            _ => None,
        }
    }

    /// Bytes that an ideal coder with these very counts would need, less than 0.1 % off.
    pub fn entropy_bytes(&self) -> u64 {
        let total = self.total();
        let sum = self.used().fold(0, |sum, (_, count)| sum + count * log2(count));
        (total * log2(total)).saturating_sub(sum) >> (LOG2_POINT + 3)
    }
}

/// Binary digits of [`log2`] behind the point.
pub const LOG2_POINT: u32 = 16;

/// The logarithm to base 2 of a number above 0, in units of 2^-16, up to 0.006 too small.
///
/// Whole numbers, because what depends on it decides which bytes are written, and those must be equal on every machine.
pub fn log2(number: u64) -> u64 {
    const TABLE: [u16; 256] = fractions();
    let zeros = number.max(1).leading_zeros();
    let digits = number << zeros >> 55;
    u64::from(63 - zeros) << LOG2_POINT | u64::from(TABLE[(digits & 0xFF) as usize])
}

/// Digits behind the point of `log2(1 + i / 256)`.
const fn fractions() -> [u16; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        // Squaring a number from 1 to 2 doubles its logarithm; each time it passes 2, the next digit is 1.
        let mut number = (256 + i as u64) << 23;
        let mut digit = 1 << (LOG2_POINT - 1);
        while digit > 0 {
            number = (number * number) >> 31;
            if number >> 32 > 0 {
                number >>= 1;
                table[i] |= digit;
            }
            digit >>= 1;
        }
        i += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_close_and_never_too_large() {
        for number in (1..5000).chain([65_535, 65_536, 1 << 40, (1 << 63) - 1, u64::MAX]) {
            let (got, expected) = (log2(number) as f64 / 65_536.0, (number as f64).log2());
            assert!(got <= expected + 1e-9 && got > expected - 0.006, "{number}: {got}, expected {expected}");
        }
    }

    #[test]
    fn counts_are_those_of_the_symbols_in_every_length() {
        for len in [0, 1, 5, 1023, 1024, 1027, 5000] {
            let symbols: Vec<u8> = (0..len).map(|i: u32| (i * i % 7) as u8).collect();
            let mut counts = Counts::new(3);
            counts.add(&symbols);
            for (symbol, count) in counts.counts().iter().enumerate() {
                assert_eq!(*count, symbols.iter().filter(|s| usize::from(**s) == symbol).count() as u64);
            }
            let wide: Vec<u8> = symbols.iter().flat_map(|s| (u16::from(*s) * 100).to_le_bytes()).collect();
            let mut wide_counts = Counts::new(10);
            wide_counts.add(&wide);
            assert!(wide_counts.used().eq(counts.used().map(|(symbol, count)| (symbol * 100, count))));
        }
    }

    #[test]
    fn noise_is_told_from_what_can_be_coded() {
        let mut random = gearbox_conformance::data::SplitMix64::new(1);
        let mut looks_like_noise = |bits: u8, len: usize, symbol: &dyn Fn(usize, u32) -> u32| {
            let size = if bits <= 8 { 1 } else { 2 };
            let symbols: Vec<u8> = (0..len)
                .flat_map(|i| symbol(i, random.below(1 << bits)).to_le_bytes().into_iter().take(size))
                .collect();
            let mut counts = Counts::new(bits);
            counts.is_noise(&symbols)
        };
        for len in [4096, 5000, 100_000] {
            for bits in [4, 7, 8, 10, 11, 12] {
                assert!(looks_like_noise(bits, len, &|_, random| random), "{len} symbols of {bits} bits");
                assert!(!looks_like_noise(bits, len, &|_, random| random & !1), "{len} symbols of {bits} bits, even");
                let quarter = |i: usize, random| if i < len / 4 { 0 } else { random };
                assert!(!looks_like_noise(bits, len, &quarter), "{len} symbols of {bits} bits, zeros first");
            }
        }
    }

    #[test]
    fn entropy_of_known_counts() {
        let mut counts = Counts::new(2);
        counts.add(&[0, 1, 2, 3].repeat(1000));
        assert_eq!((counts.entropy_bytes(), counts.only_symbol()), (1000, None));
        counts.reset(2);
        counts.add(&[2; 77]);
        assert_eq!((counts.entropy_bytes(), counts.only_symbol(), counts.total()), (0, Some(2), 77));
        counts.reset(1);
        counts.add(&[0, 0, 0, 1].repeat(10_000));
        let expected = 40_000.0 * 0.811_278_124 / 8.0;
        assert!((counts.entropy_bytes() as f64 - expected).abs() < expected / 100.0);
    }
}
