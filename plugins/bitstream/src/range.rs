//! A range coder with static frequencies whose total is a power of two.
//!
//! The interval is `low` and `range`, both of 64 bits. With `part = range >> scale`, a symbol whose frequencies start at `start` makes
//! it `low + part × start` and `part × frequency`. A `range` below 2^32 is made longer by 32 bits: the highest 32 of `low` are written, the
//! highest byte first, and both are shifted. `low` may pass 2^64; the carry is added to what is written. At the end 32 more bits are
//! written, those of the lowest multiple of 2^32 that is not below `low`. The decoder takes 32 zero bits behind them.
//!
//! Bounds: before a symbol `range` is at least 2^32, and `scale` at most 14, so `part` is at least 2^18. A frequency is at least 1, so
//! the new `range` is at least 2^18 and after 32 more bits at least 2^50: one step is enough. Frequencies and starts add up to no more
//! than 2^scale, so `part × (start + frequency)` is at most the old `range`, which keeps the interval inside the old one. That is inside of
//! the first, 0 to 2^64, so no carry passes the first byte. What the shift to `part` cuts off is less than 2^14 of 2^32 parts.

use gearbox_core::{Elem, Error, Result};

use crate::counts::{Counts, LOG2_POINT, log2};
use crate::model::Model;
use crate::segments;
use crate::symbols::{self, Field, narrow, symbol_size, widen};
use crate::wire::{Reader, put_sparse};

/// Symbols of the largest alphabet.
const MOST: usize = 1 << 12;

/// The largest total of frequencies.
const LARGEST_SCALE: u8 = 14;

/// Frequencies of a stream and where they start.
#[derive(Debug)]
pub struct RangeCoder {
    /// Bits of the alphabet.
    bits: u8,
    /// Where the frequencies of each symbol start, in the upper half, and the frequency in the lower.
    parts: Box<[u32; MOST]>,
    /// The symbol at every place of the total.
    places: Box<[u16; 1 << LARGEST_SCALE]>,
    /// Frequencies that are read or made, one per symbol of the alphabet.
    frequencies: Vec<u64>,
}

impl Default for RangeCoder {
    #[expect(clippy::large_stack_arrays, reason = "32 KiB on their way to the heap, once per pooled buffer")]
    fn default() -> Self {
        Self { bits: 0, parts: Box::new([0; MOST]), places: Box::new([0; 1 << LARGEST_SCALE]), frequencies: Vec::new() }
    }
}

impl Model for RangeCoder {
    const REFERENCE: bool = false;

    fn fields(elem: Elem) -> Result<Vec<Field>> {
        symbols::fields(elem)
    }

    fn learn(&mut self, counts: &Counts) -> Result<()> {
        self.bits = counts.bits();
        normalise(counts, self.scale(), &mut self.frequencies);
        self.ready_to_encode();
        Ok(())
    }

    fn store(&self, out: &mut Vec<u8>) {
        put_sparse(self.frequencies.iter().copied(), out);
    }

    fn load(&mut self, bits: u8, from: &mut Reader<'_>, _: usize) -> Result<()> {
        self.bits = bits;
        from.sparse(1 << bits, &mut self.frequencies)?;
        let total = self.frequencies.iter().fold(0, |sum: u64, frequency| sum.saturating_add(*frequency));
        if total != 1 << self.scale() {
            return Err(Error::corrupt(format!("expected frequencies of {} in all, got {total}", 1 << self.scale())));
        }
        self.ready_to_encode();
        let mut start = 0;
        for (symbol, frequency) in self.frequencies.iter().enumerate() {
            let end = start + *frequency as usize;
            self.places[start..end].fill(symbol as u16);
            start = end;
        }
        Ok(())
    }

    fn ready_to_encode(&mut self) {
        let mut start = 0;
        for (part, frequency) in self.parts.iter_mut().zip(&self.frequencies) {
            *part = start << 16 | *frequency as u32;
            start += *frequency as u32;
        }
    }

    fn encoded_len(&self, counts: &Counts) -> Option<u64> {
        let scale = u64::from(self.scale()) << LOG2_POINT;
        let bits = counts.cost(&self.frequencies, |frequency| scale - log2(frequency))?;
        Some((bits >> LOG2_POINT) / 8)
    }

    fn encode(&self, symbols: &[u8], out: &mut Vec<u8>) {
        match symbol_size(self.bits) {
            1 => self.encode_as::<1>(symbols, out),
            _ => self.encode_as::<2>(symbols, out),
        }
    }

    fn decode(&self, encoded: &[u8], symbols: &mut [u8]) -> Result<()> {
        match symbol_size(self.bits) {
            1 => self.decode_as::<1>(encoded, symbols),
            _ => self.decode_as::<2>(encoded, symbols),
        }
    }
}

impl RangeCoder {
    /// Twelve bits are enough for exponents and make tables small; large alphabets need more for their rare symbols.
    fn scale(&self) -> u8 {
        if self.bits <= 8 { 12 } else { LARGEST_SCALE }
    }

    /// Encodes symbols of `SIZE` bytes each.
    fn encode_as<const SIZE: usize>(&self, symbols: &[u8], out: &mut Vec<u8>) {
        let scale = self.scale();
        segments::put(symbols, SIZE, out, |part, out| {
            let mut interval = Encoder { low: 0, range: u64::MAX, start: out.len() };
            for symbol in part.as_chunks::<SIZE>().0 {
                let part = self.parts[widen(*symbol) as usize & (MOST - 1)];
                interval.narrow(scale, part >> 16, part & 0xFFFF, out);
            }
            interval.finish(out);
        });
    }

    /// Decodes symbols of `SIZE` bytes each.
    fn decode_as<const SIZE: usize>(&self, encoded: &[u8], symbols: &mut [u8]) -> Result<()> {
        let (scale, count) = (self.scale(), symbols.len() / SIZE);
        let (input, ranges) = segments::take(encoded, count)?;
        let mut decoders = ranges.map(|range| Decoder::new(&input[range]));
        let parts = segments::split_mut(symbols, SIZE);
        let used = parts.iter().filter(|part| !part.is_empty()).count();
        let mut parts = parts.map(|part| part.as_chunks_mut::<SIZE>().0.iter_mut());
        for _ in 0..segments::segment_len(count) {
            // One symbol of each in turn: none waits for its own division.
            for (decoder, part) in decoders.iter_mut().zip(&mut parts) {
                if let Some(to) = part.next() {
                    // No symbol is beyond the total: a damaged stream, which the end shows.
                    let symbol = self.places[decoder.place(scale) as usize & (self.places.len() - 1)];
                    let part = self.parts[usize::from(symbol) & (MOST - 1)];
                    decoder.narrow(part >> 16, part & 0xFFFF);
                    *to = narrow(symbol.into());
                }
            }
        }
        decoders[..used].iter().try_for_each(Decoder::end)
    }
}

/// Frequencies in proportion to the counts, of 2^`scale` in all and at least 1 for every symbol that occurs.
fn normalise(counts: &Counts, scale: u8, frequencies: &mut Vec<u64>) {
    let total = u128::from(counts.total());
    let share = |count: u64| ((u128::from(count) << scale) / total) as u64;
    frequencies.clear();
    frequencies.extend(counts.counts().iter().map(|count| if *count == 0 { 0 } else { share(*count).max(1) }));
    let mut order: Vec<(usize, u64)> = counts.used().collect();
    order.sort_by_key(|(symbol, count)| (std::cmp::Reverse(*count), *symbol));
    let sum: u64 = frequencies.iter().sum();
    // Rounding up rare symbols takes from frequent ones, which lose least by it; what is left over goes to the most frequent.
    let mut excess = sum.saturating_sub(1 << scale);
    for (symbol, _) in &order {
        let taken = excess.min(frequencies[*symbol] / 2);
        frequencies[*symbol] -= taken;
        excess -= taken;
    }
    if let Some((symbol, _)) = order.first() {
        frequencies[*symbol] += (1_u64 << scale).saturating_sub(sum);
    }
}

/// The interval of an encoder.
struct Encoder {
    low: u64,
    range: u64,
    /// Where the bytes of the segment start.
    start: usize,
}

impl Encoder {
    fn narrow(&mut self, scale: u8, start: u32, frequency: u32, out: &mut Vec<u8>) {
        let part = self.range >> scale;
        self.add(part * u64::from(start), out);
        self.range = part * u64::from(frequency);
        if self.range >> 32 == 0 {
            out.extend_from_slice(&self.low.to_be_bytes()[..4]);
            self.low <<= 32;
            self.range <<= 32;
        }
    }

    fn add(&mut self, number: u64, out: &mut [u8]) {
        let (low, carry) = self.low.overflowing_add(number);
        self.low = low;
        if carry {
            for byte in out[self.start..].iter_mut().rev() {
                *byte = byte.wrapping_add(1);
                if *byte != 0 {
                    break;
                }
            }
        }
    }

    fn finish(mut self, out: &mut Vec<u8>) {
        self.add(u64::from(u32::MAX), out);
        out.extend_from_slice(&self.low.to_be_bytes()[..4]);
    }
}

/// The interval of a decoder.
struct Decoder<'a> {
    input: &'a [u8],
    /// How far the code is above the low end.
    above: u64,
    range: u64,
    part: u64,
    /// Whether the code was ever outside of the interval.
    is_outside: bool,
    /// Bytes of the segment.
    len: usize,
    /// Words of 4 bytes that are taken, also behind the end.
    words: usize,
}

impl<'a> Decoder<'a> {
    fn new(input: &'a [u8]) -> Self {
        let mut decoder =
            Self { input, above: 0, range: u64::MAX, part: 0, is_outside: false, len: input.len(), words: 0 };
        decoder.take_word();
        decoder.take_word();
        decoder
    }

    fn take_word(&mut self) {
        let (word, rest) = self.input.split_first_chunk().unwrap_or((&[0; 4], &[]));
        self.input = rest;
        self.words += 1;
        self.above = self.above << 32 | u64::from(u32::from_be_bytes(*word));
    }

    /// The place of the next symbol in the total; too high if the code is outside of the interval.
    fn place(&mut self, scale: u8) -> u64 {
        self.part = self.range >> scale;
        let place = self.above / self.part;
        self.is_outside |= place >> scale != 0;
        place
    }

    fn narrow(&mut self, start: u32, frequency: u32) {
        self.above = self.above.wrapping_sub(self.part * u64::from(start));
        // Damaged streams can name symbols without a frequency.
        self.range = self.part * u64::from(frequency.max(1));
        if self.range >> 32 == 0 {
            self.range <<= 32;
            self.take_word();
        }
    }

    /// Makes sure that all bytes were taken, and one word behind them, and that the code is in the interval, where the encoder puts it.
    fn end(&self) -> Result<()> {
        let expected = 4 * (self.words - 1);
        if self.len != expected {
            return Err(Error::corrupt(format!("the code takes {expected} bytes of {}", self.len)));
        }
        if self.is_outside || self.above >> 32 != 0 {
            return Err(Error::corrupt("the code is outside of its interval"));
        }
        Ok(())
    }
}
