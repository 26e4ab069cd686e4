//! Length-limited Huffman codes: four bit streams at once, several symbols per table look-up.
//!
//! A stream of bits starts at the highest bit of its first byte. Codes are canonical, in the order of [`lengths::canonical_order`]; behind
//! the last one follow zero bits up to a whole byte.
//!
//! The decoder looks up the next bits, as many as the longest code has, and finds all symbols that they hold in full. Four streams in turn
//! keep the machine busy while each of them waits for its table: in one thread of a 3 GHz AMD EPYC (2026-11) one stream gives 1.0 GB/s of
//! exponents, four give 3.7, six give 2.7, because their state no longer fits into registers. `cargo bench -p gearbox-bitstream` compares.

use gearbox_core::{Elem, Error, Result};

use crate::counts::Counts;
use crate::lengths::{self, LONGEST};
use crate::model::Model;
use crate::segments::{self, SEGMENTS};
use crate::symbols::{self, Field, vectorized};
use crate::wire::Reader;

/// Symbols of the largest alphabet, and entries of the largest table.
const MOST: usize = 1 << LONGEST;

/// Bytes that one look-up writes, and the most it may use of them.
const ENTRY: usize = 8;
const ENTRY_USED: usize = 6;

/// Bytes that a round of look-ups may touch: five times [`ENTRY_USED`] and the rest of an entry, and what is easy to compute with.
const WINDOW: usize = 40;

/// The code of a stream.
#[derive(Debug)]
pub struct Huffman {
    /// Bits of the alphabet.
    bits: u8,
    /// Of every symbol, 0 for those without a code.
    lengths: Vec<u8>,
    /// Symbols with a code and its length, in the order of their codes.
    order: Vec<(u16, u8)>,
    /// Code of every symbol from bit 63 down, its length in the lowest bits.
    codes: Box<[u64; MOST]>,
    table: Box<Table>,
}

/// What the next bits of a stream mean; only the first 2^`bits` entries are in use.
#[derive(Debug)]
struct Table {
    /// Bits to look at: the longest code.
    bits: u8,
    /// Symbols in memory, one behind the other.
    symbols: [u64; MOST],
    /// Bits of these symbols' codes in the lowest six bits, bytes of the symbols in the highest three.
    sizes: [u16; MOST],
    /// Symbols and sizes of the parts that a table is made of.
    scratch: ([u64; MOST], [u16; MOST]),
}

impl Default for Huffman {
    #[expect(clippy::large_stack_arrays, reason = "80 KiB on their way to the heap, once per pooled buffer")]
    fn default() -> Self {
        Self {
            bits: 0,
            lengths: Vec::new(),
            order: Vec::new(),
            codes: Box::new([0; MOST]),
            table: Box::new(Table { bits: 0, symbols: [0; MOST], sizes: [0; MOST], scratch: ([0; MOST], [0; MOST]) }),
        }
    }
}

impl Model for Huffman {
    const REFERENCE: bool = false;

    fn fields(elem: Elem) -> Result<Vec<Field>> {
        symbols::fields(elem)
    }

    fn learn(&mut self, counts: &Counts) -> Result<()> {
        self.bits = counts.bits();
        lengths::limited(counts.counts(), longest(counts), &mut self.lengths);
        self.ready_to_encode();
        Ok(())
    }

    fn store(&self, out: &mut Vec<u8>) {
        lengths::store(&self.lengths, out);
    }

    fn load(&mut self, bits: u8, from: &mut Reader<'_>, symbols: usize) -> Result<()> {
        self.bits = bits;
        lengths::load(from, 1 << bits, &mut self.lengths)?;
        lengths::canonical_order(&self.lengths, &mut self.order);
        // Few symbols are decoded one by one before a table of several is made.
        let most = if symbols < 1 << (self.table_bits() + 1) { self.symbol_size() } else { ENTRY_USED };
        self.table.make(&self.order, self.symbol_size(), most);
        Ok(())
    }

    fn ready_to_encode(&mut self) {
        lengths::canonical_order(&self.lengths, &mut self.order);
        let mut next = 0_u64;
        for (symbol, length) in &self.order {
            self.codes[usize::from(*symbol)] = next | u64::from(*length);
            next = next.wrapping_add(1 << (64 - length));
        }
    }

    fn encoded_len(&self, counts: &Counts) -> Option<u64> {
        counts.cost(&self.lengths, |length| length).map(|bits| bits.div_ceil(8))
    }

    fn encode(&self, symbols: &[u8], out: &mut Vec<u8>) {
        segments::put(symbols, self.symbol_size(), out, |part, out| {
            // The longest code for every symbol, and the last word.
            let (start, most) = (out.len(), part.len() / self.symbol_size() * usize::from(LONGEST) / 8 + 16);
            out.resize(start + most, 0);
            let len = if self.symbol_size() == 1 {
                put_codes(part.as_chunks().0, |[symbol]: [u8; 1]| self.codes[usize::from(symbol)], &mut out[start..])
            } else {
                let code = |symbol| self.codes[usize::from(u16::from_le_bytes(symbol)) & (MOST - 1)];
                put_codes(part.as_chunks().0, code, &mut out[start..])
            };
            out.truncate(start + len);
        });
    }

    fn decode(&self, encoded: &[u8], symbols: &mut [u8]) -> Result<()> {
        let size = self.symbol_size();
        let (input, ranges) = segments::take(encoded, symbols.len() / size)?;
        let parts = segments::split_mut(symbols, size).into_iter().zip(&ranges);
        let mut segments =
            parts.map(|(out, range)| Segment { input: &input[range.start..], out, ..Segment::default() });
        let mut segments: [Segment<'_>; SEGMENTS] = std::array::from_fn(|_| segments.next().unwrap_or_default());
        self.table.decode_rounds(&mut segments);
        for (segment, range) in segments.into_iter().zip(ranges) {
            let mut alone = [segment];
            self.table.decode_rounds(&mut alone);
            let [mut segment] = alone;
            self.decode_rest(&mut segment);
            segment.end(range.len(), input.len() - range.start)?;
        }
        Ok(())
    }
}

/// What is left of a segment.
#[derive(Default)]
struct Segment<'a> {
    /// From the byte of the next bit to the end of all segments.
    input: &'a [u8],
    /// Bits of the first byte that are used.
    used: u32,
    /// Whether a code went past the end.
    is_cut: bool,
    out: &'a mut [u8],
}

impl Segment<'_> {
    /// The next bits from bit 63 down, zeros behind the end.
    fn next(&self) -> u64 {
        let word = self.input.first_chunk().copied().unwrap_or_else(|| {
            let mut word = [0; 8];
            word[..self.input.len()].copy_from_slice(self.input);
            word
        });
        u64::from_be_bytes(word) << self.used
    }

    /// Drops bits.
    fn skip(&mut self, bits: u32) {
        let bits = self.used + bits;
        self.used = bits % 8;
        let rest = self.input.get((bits / 8) as usize..).filter(|rest| !rest.is_empty() || self.used == 0);
        self.is_cut |= rest.is_none();
        self.input = rest.unwrap_or_default();
    }

    /// Makes sure that the segment took `len` of the `all` bytes that there were, and that zero bits follow.
    fn end(&self, len: usize, all: usize) -> Result<()> {
        let used = all - self.input.len() + usize::from(self.used > 0);
        if self.is_cut || used != len {
            let more = if self.is_cut { "more than " } else { "" };
            return Err(Error::corrupt(format!("codes take {more}{used} bytes of {len}")));
        }
        if self.used > 0 && self.next() >> (56 + self.used) != 0 {
            return Err(Error::corrupt("expected zero bits behind the last code"));
        }
        Ok(())
    }
}

impl Huffman {
    fn symbol_size(&self) -> usize {
        symbols::symbol_size(self.bits)
    }

    /// Length of the longest code.
    fn table_bits(&self) -> u8 {
        self.order.last().map_or(0, |(_, length)| *length)
    }

    /// Decodes what is left of a segment, one look-up after the other.
    ///
    /// Bits behind the end are zero.
    fn decode_rest(&self, segment: &mut Segment<'_>) {
        let table = &*self.table;
        while !segment.out.is_empty() {
            let idx = (segment.next() >> (64 - u32::from(table.bits))) as usize & (MOST - 1);
            let (symbols, size) = (table.symbols[idx].to_le_bytes(), table.sizes[idx]);
            let held = usize::from(size >> 13);
            let taken = held.min(segment.out.len());
            let (to, rest) = std::mem::take(&mut segment.out).split_at_mut(taken);
            to.copy_from_slice(&symbols[..taken]);
            segment.out = rest;
            segment.skip(if taken == held {
                u32::from(size & 63)
            } else {
                // The entry reaches into what is no longer there.
                let length = |symbol: u16| self.lengths.get(usize::from(symbol)).map_or(0, |length| u32::from(*length));
                symbols::values(&symbols[..taken], self.bits).map(length).sum()
            });
        }
    }
}

/// The most bits that a code may have: the more symbols follow, the more pays a table that is close to the counts but longer to make.
fn longest(counts: &Counts) -> u8 {
    let used = counts.used().count();
    let enough = (usize::BITS - used.leading_zeros()) as u8 + 1;
    let fitting = match counts.total() {
        0..8192 => 9,
        8192..262_144 => 10,
        _ => 11,
    };
    fitting.max(enough).min(LONGEST)
}

/// Writes the codes of symbols and returns how many bytes they take; `out` has room for them and eight more bytes.
fn put_codes<const SIZE: usize>(
    symbols: &[[u8; SIZE]],
    code: impl Fn([u8; SIZE]) -> u64 + Copy,
    out: &mut [u8],
) -> usize {
    vectorized(
        #[inline(always)]
        || {
            // `bits` counts in its lowest six bits; those above hold what is left of the codes that were added. Shifts see only the six.
            let (mut len, mut word, mut bits) = (0, 0_u64, 0_u64);
            let (groups, rest) = symbols.as_chunks::<4>();
            for group in groups {
                for symbol in group {
                    let code = code(*symbol);
                    word |= code >> (bits & 63);
                    bits = bits.wrapping_add(code);
                }
                // Up to 7 bits from before and 4 × 12: the lengths in the lowest bits of the codes never reach them.
                if let Some(to) = out.get_mut(len..).and_then(|out| out.first_chunk_mut()) {
                    *to = word.to_be_bytes();
                }
                let whole = bits & 0x38;
                len += (whole / 8) as usize;
                word = word << whole & 0xFF << 56;
                bits &= 7;
            }
            for symbol in rest {
                let code = code(*symbol);
                word |= code >> (bits & 63);
                bits = bits.wrapping_add(code);
            }
            bits &= 63;
            // What is behind the last code is no zero: the lengths of the codes.
            word &= !(u64::MAX >> bits);
            if let Some(to) = out.get_mut(len..).and_then(|out| out.first_chunk_mut()) {
                *to = word.to_be_bytes();
            }
            len + bits.div_ceil(8) as usize
        },
    )
}

/// Entries of a table.
struct Entries<'a> {
    symbols: &'a mut [u64],
    sizes: &'a mut [u16],
}

impl Entries<'_> {
    fn split(self, len: usize) -> (Self, Self) {
        let (symbols, symbols_behind) = self.symbols.split_at_mut(len);
        let (sizes, sizes_behind) = self.sizes.split_at_mut(len);
        (Self { symbols, sizes }, Self { symbols: symbols_behind, sizes: sizes_behind })
    }
}

/// The code that tables are made of.
struct Code<'a> {
    order: &'a [(u16, u8)],
    symbol_size: usize,
}

impl Code<'_> {
    /// Fills entries for all values of the next `bits` bits with the symbols that fit into them and into `room` bytes.
    ///
    /// Behind a code follows what fits into the bits that it leaves, which is the same for all codes of its length: those entries are made
    /// once, in `scratch`, and then copied with the symbol in front of them. `scratch` has as many entries as there are values.
    fn fill(&self, bits: u8, room: usize, mut entries: Entries<'_>, scratch: &mut Entries<'_>) {
        for codes in self.order.chunk_by(|a, b| a.1 == b.1) {
            let length = codes[0].1;
            if length > bits || self.symbol_size > room {
                break;
            }
            let left = bits - length;
            let scratch = Entries { symbols: &mut *scratch.symbols, sizes: &mut *scratch.sizes };
            let (behind, mut deeper) = scratch.split(1 << left);
            let of_behind = Entries { symbols: &mut *behind.symbols, sizes: &mut *behind.sizes };
            self.fill(left, room - self.symbol_size, of_behind, &mut deeper);
            for (symbol, _) in codes {
                // Codes follow each other from the first entry on.
                let (own, rest) = entries.split(1 << left);
                for (to, from) in own.symbols.iter_mut().zip(&mut *behind.symbols) {
                    *to = *from << (8 * self.symbol_size) | u64::from(*symbol);
                }
                let size = (self.symbol_size as u16) << 13 | u16::from(length);
                for (to, from) in own.sizes.iter_mut().zip(&mut *behind.sizes) {
                    *to = *from + size;
                }
                entries = rest;
            }
        }
        // What is left starts with a code that does not fit.
        entries.symbols.fill(0);
        entries.sizes.fill(0);
    }
}

impl Table {
    /// Makes the table of a code; an entry holds as many symbols as fit into its bits and take at most `most` bytes.
    fn make(&mut self, order: &[(u16, u8)], symbol_size: usize, most: usize) {
        self.bits = order.last().map_or(0, |(_, length)| *length);
        let len = 1 << self.bits;
        let entries = Entries { symbols: &mut self.symbols[..len], sizes: &mut self.sizes[..len] };
        let (symbols, sizes) = &mut self.scratch;
        Code { order, symbol_size }.fill(self.bits, most, entries, &mut Entries { symbols, sizes });
    }

    /// Decodes `N` segments at once, up to where one of them nears the end of its symbols or of the input.
    fn decode_rounds<const N: usize>(&self, segments: &mut [Segment<'_>; N]) {
        // With the number of bits known the compiler needs no check that they stay inside of the table.
        match self.bits {
            9 => self.decode_rounds_of::<9, 5, N>(segments),
            10 => self.decode_rounds_of::<10, 5, N>(segments),
            11 => self.decode_rounds_of::<11, 5, N>(segments),
            12 => self.decode_rounds_of::<12, 4, N>(segments),
            _ => {}
        }
    }

    /// Of the 56 bits that a word has behind its first byte and the mark, a round uses up to `LOOK_UPS` × `BITS`.
    fn decode_rounds_of<const BITS: u32, const LOOK_UPS: usize, const N: usize>(
        &self,
        segments: &mut [Segment<'_>; N],
    ) {
        vectorized(
            #[inline(always)]
            || {
                // Copies, which no write to the output can change.
                let (symbols, sizes) = (&self.symbols, &self.sizes);
                let mut inputs = segments.each_ref().map(|segment| segment.input);
                let mut used = segments.each_ref().map(|segment| segment.used);
                let mut outs = segments.each_mut().map(|segment| std::mem::take(&mut segment.out));
                while inputs.iter().all(|input| input.len() >= 8) && outs.iter().all(|out| out.len() >= WINDOW) {
                    // The mark in the lowest bit shows at the end how far the word was shifted.
                    let word = |input: &[u8]| input.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes) | 1);
                    let mut words = inputs.map(word);
                    for (word, used) in words.iter_mut().zip(used) {
                        *word <<= used;
                    }
                    let mut held = [0; N];
                    for _ in 0..LOOK_UPS {
                        for i in 0..N {
                            let idx = (words[i] >> (64 - BITS)) as usize;
                            outs[i][held[i]..held[i] + ENTRY].copy_from_slice(&symbols[idx].to_le_bytes());
                            words[i] <<= sizes[idx] & 63;
                            held[i] += usize::from(sizes[idx] >> 13);
                        }
                    }
                    for i in 0..N {
                        let bits = words[i].trailing_zeros();
                        inputs[i] = &inputs[i][(bits / 8) as usize..];
                        used[i] = bits % 8;
                        outs[i] = &mut std::mem::take(&mut outs[i])[held[i]..];
                    }
                }
                for (((segment, input), used), out) in segments.iter_mut().zip(inputs).zip(used).zip(outs) {
                    *segment = Segment { input, used, out, is_cut: false };
                }
            },
        );
    }
}
