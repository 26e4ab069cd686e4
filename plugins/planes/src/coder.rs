//! Interleaved range asymmetric numeral systems: 8 or 32 states share one stream of 16-bit words.
//!
//! The symbol at index `i` belongs to state `i % lanes`, so that many independent chains of arithmetic are in flight at once. Short streams
//! have 8 lanes, because every state takes four bytes; long ones have 32, which vectors decode about twice as fast. Every symbol has a
//! context, which chooses its table; the frequencies of a table sum to `1 << log`, with `log` at most [`MAX_LOG`]. A state lies in
//! `[2^16, 2^32)`: encoding moves its low word out before it would leave the interval, decoding takes a word in after it fell below, and
//! one word is always enough. Encoding runs backwards from the last symbol. All its states start at `2^16`, and a decoder that does not
//! end there was given other bytes.

use std::hint::select_unpredictable;

use gearbox_core::{Error, Result};
use pulp::Arch;

/// Symbols that are worked on together, each with a state of its own.
pub(crate) const GROUP: usize = 8;

/// The most states in flight.
const MOST_LANES: usize = 32;

/// States in flight for a stream of about so many symbols.
pub(crate) fn lanes(symbols: usize) -> usize {
    if symbols < 1 << 16 { GROUP } else { MOST_LANES }
}

/// Frequencies sum to `1 << log`, with `log` from here
pub(crate) const MIN_LOG: u32 = 10;
/// to here.
pub(crate) const MAX_LOG: u32 = 12;

/// Contexts of one stream.
pub(crate) const MAX_CONTEXTS: usize = 64;

/// Decoding tables: as many as a byte can name, which spares a check for every symbol. Those that are never set take no memory.
const TABLES: usize = 256;

/// Lower end of the interval of a state.
const LOW: u32 = 1 << 16;

const SLOTS: usize = 1 << MAX_LOG;

/// Frequency of each symbol in one context; they sum to `1 << log`, and each is below 4096.
pub(crate) type Freqs = [u16; 256];

/// A symbol with its context in the upper byte.
pub(crate) type Coded = u16;

/// A symbol in a context.
pub(crate) fn in_context(context: usize, symbol: u8) -> Coded {
    (context as Coded) << 8 | Coded::from(symbol)
}

/// Symbols in contexts that are in the upper byte.
pub(crate) fn in_contexts(contexts: &[Coded], symbols: &[u8]) -> impl Iterator<Item = Coded> {
    contexts.iter().zip(symbols).map(|(context, symbol)| context | Coded::from(*symbol))
}

/// What encoding takes, for each frequency: division by the frequency is multiplication by a reciprocal.
///
/// The quotient of `x` is `(x + round) * factor >> (32 + shift)`, with `factor` in bits 0 to 31, the frequency in bits 32 to 43, `shift`
/// in bits 56 to 59 and `round` in bit 60. Bits 44 to 55 are left to the start of the symbol.
static DIVISORS: [u64; SLOTS] = {
    let mut divisors = [0; SLOTS];
    let mut freq = 1;
    while freq < SLOTS {
        divisors[freq] = divisor(freq as u64);
        freq += 1;
    }
    divisors
};

const fn divisor(freq: u64) -> u64 {
    if freq == 1 {
        return 1 << 60 | freq << 32 | u32::MAX as u64;
    }
    // The factor has 32 bits. It is rounded to the nearer side, so its error is at most half a unit: with `x` below `freq << (32 - log)` and
    // `freq` at most `1 << (shift + 1)`, the product is too large or, with one added to `x`, too small by less than what matters.
    let shift = (freq - 1).ilog2();
    let one = 1_u64 << (32 + shift);
    let (lower, left) = (one / freq, one % freq);
    let round = left > 0 && left * 2 < freq;
    let factor = if left == 0 || round { lower } else { lower + 1 };
    (round as u64) << 60 | (shift as u64) << 56 | freq << 32 | factor
}

/// Encodes symbols in contexts.
#[derive(Debug)]
pub(crate) struct Encoder {
    /// An entry of [`DIVISORS`] with the start of the symbol, for all that a [`Coded`] can name. What is never set takes no memory.
    steps: Box<[u64; 1 << 16]>,
    log: u32,
    words: Vec<u16>,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { steps: boxed(0), log: MAX_LOG, words: Vec::new() }
    }
}

impl Encoder {
    /// Starts over with frequencies that sum to `1 << log`.
    pub fn start(&mut self, log: u32) {
        self.log = log.clamp(MIN_LOG, MAX_LOG);
    }

    /// Sets the table of a context; the frequencies sum to `1 << log`.
    pub fn set(&mut self, context: usize, freqs: &Freqs) {
        let mut start = 0;
        for (step, &freq) in self.steps[(context % MAX_CONTEXTS) << 8..][..256].iter_mut().zip(freqs) {
            *step = DIVISORS[usize::from(freq) % SLOTS] | start << 44;
            start += u64::from(freq);
        }
    }

    /// Appends the states of all lanes and the words for `symbols`, each of which has a frequency above zero in its context.
    pub fn encode(&mut self, lanes: usize, symbols: &[Coded], out: &mut Vec<u8>) {
        self.words.resize(symbols.len() + GROUP, 0);
        let mut all = [LOW; MOST_LANES];
        let mut end = self.words.len();
        let whole = symbols.len() / lanes * lanes;
        let (symbols, tail) = symbols.split_at(whole);
        for (state, symbol) in all.iter_mut().zip(tail).rev() {
            end -= push(&self.steps, self.log, std::slice::from_mut(state), &[*symbol], window(&mut self.words, end));
        }
        // A shift by a constant is cheaper.
        end = match self.log {
            12 => self.groups::<12>(lanes, &mut all, symbols, end),
            11 => self.groups::<11>(lanes, &mut all, symbols, end),
            _ => self.groups::<10>(lanes, &mut all, symbols, end),
        };
        for state in &all[..lanes] {
            out.extend_from_slice(&state.to_le_bytes());
        }
        let words = &self.words[end..];
        let at = out.len();
        out.resize(at + 2 * words.len(), 0);
        for (bytes, word) in out[at..].as_chunks_mut().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
    }

    /// Encodes a symbol from each lane, again and again, with words that end at `end`; returns where they start.
    fn groups<const LOG: u32>(
        &mut self,
        lanes: usize,
        states: &mut [u32; MOST_LANES],
        symbols: &[Coded],
        mut end: usize,
    ) -> usize {
        let Self { steps, words, .. } = self;
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            return match lanes {
                GROUP => vectors::encode::<LOG, 1>(simd, steps, states, symbols, words, end),
                _ => vectors::encode::<LOG, { vectors::VECTORS }>(simd, steps, states, symbols, words, end),
            };
        }
        let (states, _) = states[..lanes].as_chunks_mut::<GROUP>();
        Arch::new().dispatch(
            #[inline(always)]
            || {
                let groups = symbols.as_chunks::<GROUP>().0;
                for (idx, symbols) in groups.iter().enumerate().rev() {
                    let states = &mut states[idx % (lanes / GROUP)];
                    end -= push(steps, LOG, states, symbols, window(words, end));
                }
                end
            },
        )
    }
}

/// The last eight words before `end`.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn window(words: &mut [u16], end: usize) -> &mut [u16; GROUP] {
    words[..end].last_chunk_mut().unwrap_or_else(|| unreachable!("there is a word for every symbol, and eight more"))
}

/// Encodes up to eight symbols, the last one first, and returns how many words it put at the end of `window`.
#[inline(always)]
#[expect(clippy::inline_always, reason = "the loop unrolls only where the number of symbols is known")]
fn push(steps: &[u64; 1 << 16], log: u32, states: &mut [u32], symbols: &[Coded], window: &mut [u16; GROUP]) -> usize {
    let mut used = 0;
    for (state, &symbol) in states.iter_mut().zip(symbols).rev() {
        let step = steps[usize::from(symbol)];
        let info = (step >> 32) as u32;
        let freq = info & 0xFFF;
        let full = *state >> (32 - log) >= freq;
        // Written always and counted only if full: a branch here would be taken at random.
        window[(GROUP - 1 - used) % GROUP] = *state as u16;
        used += usize::from(full);
        let x = select_unpredictable(full, *state >> 16, *state);
        let product = u64::from(x.wrapping_add(info >> 28)) * u64::from(step as u32);
        let quotient = (product >> 32) as u32 >> (info >> 24 & 0xF);
        *state = x.wrapping_add(info >> 12 & 0xFFF).wrapping_add(quotient.wrapping_mul((1 << log) - freq));
    }
    used
}

/// Decoding tables of all contexts: one entry per slot with symbol in bits 0 to 7, offset within its frequency in bits 8 to 19, and frequency.
#[derive(Debug)]
pub(crate) struct Tables {
    slots: Box<[[u32; SLOTS]; TABLES]>,
    log: u32,
}

impl Default for Tables {
    fn default() -> Self {
        Self { slots: boxed([0; SLOTS]), log: MAX_LOG }
    }
}

impl Tables {
    /// Starts over with frequencies that sum to `1 << log`.
    pub fn start(&mut self, log: u32) {
        self.log = log.clamp(MIN_LOG, MAX_LOG);
    }

    /// Sets the table of a context; the frequencies sum to `1 << log`.
    pub fn set(&mut self, context: usize, freqs: &Freqs) {
        let mut slots = self.slots[context % TABLES].as_mut_slice();
        for (symbol, &freq) in (0..).zip(freqs) {
            let (own, rest) = slots.split_at_mut(usize::from(freq).min(slots.len()));
            let entry = u32::from(freq) << 20 | symbol;
            for (offset, slot) in (0..).zip(own) {
                *slot = entry | offset << 8;
            }
            slots = rest;
        }
        // Of no use to a valid stream; a damaged one shall not see what another chunk left here.
        slots.fill(0);
    }
}

/// Decodes what [`Encoder::encode`] wrote, in as many pieces as wanted.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    states: [u32; MOST_LANES],
    lanes: usize,
    /// All words, and zeros so that every group can look at eight.
    words: Vec<u16>,
    at: usize,
    lane: usize,
}

impl Decoder {
    /// Starts with the states and words that make up `bytes`.
    pub fn start(&mut self, lanes: usize, bytes: &[u8]) -> Result<()> {
        let cut = || Error::corrupt(format!("expected at least {} bytes of states, got {}", 4 * lanes, bytes.len()));
        let (states, words) = bytes.split_at_checked(4 * lanes).ok_or_else(cut)?;
        let (words, odd) = words.as_chunks();
        if !odd.is_empty() {
            return Err(Error::corrupt("expected whole 16-bit words, got half of one at the end"));
        }
        for (state, bytes) in self.states.iter_mut().zip(states.as_chunks().0) {
            *state = u32::from_le_bytes(*bytes);
        }
        self.words.resize(words.len() + MOST_LANES, 0);
        for (word, bytes) in self.words.iter_mut().zip(words) {
            *word = u16::from_le_bytes(*bytes);
        }
        self.words[words.len()..].fill(0);
        (self.lanes, self.at, self.lane) = (lanes, 0, 0);
        Ok(())
    }

    /// Decodes the next symbols.
    pub fn decode(&mut self, tables: &Tables, contexts: &[u8], out: &mut [u8]) -> Result<()> {
        let until_first = (self.lanes - self.lane) % self.lanes;
        let head = until_first.min(out.len());
        self.singly(tables, &contexts[..head], &mut out[..head])?;
        let whole = head + (out.len() - head) / self.lanes * self.lanes;
        let (contexts, tail_contexts) = contexts[head..].split_at(whole - head);
        let (out, tail) = out[head..].split_at_mut(whole - head);
        // A shift by a constant leaves a register free in a loop that is short of them.
        match tables.log {
            12 => self.groups::<12>(tables, contexts, out),
            11 => self.groups::<11>(tables, contexts, out),
            _ => self.groups::<10>(tables, contexts, out),
        }?;
        self.singly(tables, tail_contexts, tail)
    }

    /// Decodes a symbol from each lane, again and again.
    fn groups<const LOG: u32>(&mut self, tables: &Tables, contexts: &[u8], out: &mut [u8]) -> Result<()> {
        let words = self.words.get(self.at..).ok_or_else(short)?;
        #[cfg(target_arch = "x86_64")]
        if self.lanes == MOST_LANES
            && let Some(simd) = pulp::x86::V3::try_new()
        {
            let (contexts, out) = (contexts.as_chunks().0, out.as_chunks_mut().0);
            let used = vectors::decode::<LOG>(simd, tables, &mut self.states, words, contexts, out);
            self.at += used.ok_or_else(short)?;
            return Ok(());
        }
        let mut states = self.states;
        let mut rest = words;
        let complete = Arch::new().dispatch(
            #[inline(always)]
            || {
                let pieces = out.as_chunks_mut::<GROUP>().0.iter_mut().zip(contexts.as_chunks::<GROUP>().0);
                let (states, _) = states.as_chunks_mut::<GROUP>();
                for (idx, (symbols, contexts)) in pieces.enumerate() {
                    let Some(window) = rest.first_chunk() else { return false };
                    let states = &mut states[idx % (self.lanes / GROUP)];
                    let used = pull(tables, LOG, states, contexts, symbols, window);
                    rest = &rest[used..];
                }
                true
            },
        );
        self.at = self.words.len() - rest.len();
        self.states = states;
        if complete { Ok(()) } else { Err(short()) }
    }

    /// Decodes fewer symbols than there are lanes, from the current lane on.
    fn singly(&mut self, tables: &Tables, contexts: &[u8], out: &mut [u8]) -> Result<()> {
        for (symbol, context) in out.iter_mut().zip(contexts) {
            let window = self.words.get(self.at..).and_then(|words| words.first_chunk()).ok_or_else(short)?;
            let state = &mut self.states[self.lane..=self.lane];
            self.at += pull(tables, tables.log, state, &[*context], std::slice::from_mut(symbol), window);
            self.lane = (self.lane + 1) % self.lanes;
        }
        Ok(())
    }

    /// Checks that all bytes were used and that they were written by an encoder.
    pub fn finish(&self) -> Result<()> {
        let left = self.words.len().checked_sub(MOST_LANES + self.at).ok_or_else(short)?;
        if left > 0 {
            return Err(Error::corrupt(format!("{left} words are left behind the last symbol")));
        }
        if self.states[..self.lanes].iter().any(|state| *state != LOW) {
            return Err(Error::corrupt("the states do not end where encoding starts"));
        }
        Ok(())
    }
}

fn short() -> Error {
    Error::corrupt("the words end before the last symbol")
}

/// Decodes up to eight symbols and returns how many words it took.
#[inline(always)]
#[expect(clippy::inline_always, reason = "the loop unrolls only where the number of symbols is known")]
fn pull(
    tables: &Tables,
    log: u32,
    states: &mut [u32],
    contexts: &[u8],
    out: &mut [u8],
    window: &[u16; GROUP],
) -> usize {
    let mask = (1 << log) - 1;
    let mut used = 0;
    for ((state, symbol), &context) in states.iter_mut().zip(out).zip(contexts) {
        let entry = tables.slots[usize::from(context)][(*state & mask) as usize % SLOTS];
        *symbol = entry as u8;
        let x = (entry >> 20).wrapping_mul(*state >> log).wrapping_add(entry >> 8 & 0xFFF);
        let empty = x < LOW;
        let word = u32::from(window[used % GROUP]);
        *state = select_unpredictable(empty, x << 16 | word, x);
        used += usize::from(empty);
    }
    used
}

/// Coding with vectors of eight states each. Tables are looked up one by one; all else is done for eight symbols at once.
#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::__m256i;

    use pulp::x86::V3;

    use super::{Coded, GROUP, MOST_LANES, SLOTS, Tables, window};

    pub const VECTORS: usize = MOST_LANES / GROUP;

    /// For each set of lanes that put no word out, which bytes of the eight words of all lanes make up those of the others, as the last ones.
    static PUT: [[u8; 2 * GROUP]; 256] = {
        let mut put = [[0; 2 * GROUP]; 256];
        let mut set = 0;
        while set < 256 {
            let (mut lane, mut place) = (GROUP, GROUP);
            while lane > 0 {
                lane -= 1;
                if set >> lane & 1 == 0 {
                    place -= 1;
                    put[set][2 * place] = 2 * lane as u8;
                    put[set][2 * place + 1] = 2 * lane as u8 + 1;
                }
            }
            set += 1;
        }
        put
    };

    /// Encodes a symbol from each of `8 * N` lanes, again and again, with words that end at `end`; returns where they start.
    pub fn encode<const LOG: u32, const N: usize>(
        simd: V3,
        steps: &[u64; 1 << 16],
        states: &mut [u32; MOST_LANES],
        symbols: &[Coded],
        words: &mut [u16],
        end: usize,
    ) -> usize {
        let mut vectors: [__m256i; VECTORS] = pulp::cast(*states);
        let end = simd.vectorize(
            #[inline(always)]
            || {
                let mut end = end;
                for symbols in symbols.as_chunks::<GROUP>().0.as_chunks::<N>().0.iter().rev() {
                    for (state, symbols) in vectors[..N].iter_mut().zip(symbols).rev() {
                        let (used, put) = put::<LOG>(simd, steps, state, symbols);
                        *window(words, end) = put;
                        end -= used;
                    }
                }
                end
            },
        );
        *states = pulp::cast(vectors);
        end
    }

    /// Encodes eight symbols; returns how many words that takes, and these as the last ones of eight.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "what runs inside `vectorize` must be inlined into it")]
    fn put<const LOG: u32>(
        V3 { ssse3, avx, avx2, .. }: V3,
        steps: &[u64; 1 << 16],
        state: &mut __m256i,
        symbols: &[Coded; GROUP],
    ) -> (usize, [u16; GROUP]) {
        let twelve = avx._mm256_set1_epi32(0xFFF);
        // Set from registers: a vector that is loaded from separate stores waits for all of them.
        let step = |lane: usize| steps[usize::from(symbols[lane])].cast_signed();
        let even = avx._mm256_set_epi64x(step(6), step(4), step(2), step(0));
        let odd = avx._mm256_set_epi64x(step(7), step(5), step(3), step(1));
        let info = avx2._mm256_blend_epi32::<0xAA>(avx2._mm256_srli_epi64::<32>(even), odd);
        let freq = avx2._mm256_and_si256(info, twelve);
        let upper = match LOG {
            12 => avx2._mm256_srli_epi32::<20>(*state),
            11 => avx2._mm256_srli_epi32::<21>(*state),
            _ => avx2._mm256_srli_epi32::<22>(*state),
        };
        let fits = avx2._mm256_cmpgt_epi32(freq, upper);

        let low = avx2._mm256_and_si256(*state, avx._mm256_set1_epi32(0xFFFF));
        let low = avx2._mm256_permute4x64_epi64::<0b1000>(avx2._mm256_packus_epi32(low, low));
        let set = avx._mm256_movemask_ps(avx._mm256_castsi256_ps(fits)).cast_unsigned() as usize % 256;
        let words = ssse3._mm_shuffle_epi8(avx._mm256_castsi256_si128(low), pulp::cast(PUT[set]));

        let x = avx2._mm256_blendv_epi8(avx2._mm256_srli_epi32::<16>(*state), *state, fits);
        let rounded = avx2._mm256_add_epi32(x, avx2._mm256_srli_epi32::<28>(info));
        let even = avx2._mm256_mul_epu32(rounded, even);
        let odd = avx2._mm256_mul_epu32(avx2._mm256_srli_epi64::<32>(rounded), odd);
        let product = avx2._mm256_blend_epi32::<0xAA>(avx2._mm256_srli_epi64::<32>(even), odd);
        let shift = avx2._mm256_and_si256(avx2._mm256_srli_epi32::<24>(info), avx._mm256_set1_epi32(0xF));
        let quotient = avx2._mm256_srlv_epi32(product, shift);
        let start = avx2._mm256_and_si256(avx2._mm256_srli_epi32::<12>(info), twelve);
        let complement = avx2._mm256_sub_epi32(avx._mm256_set1_epi32(1 << LOG), freq);
        let steps = avx2._mm256_mullo_epi32(quotient, complement);
        *state = avx2._mm256_add_epi32(avx2._mm256_add_epi32(x, start), steps);
        (GROUP - set.count_ones() as usize, pulp::cast(words))
    }

    /// For each set of lanes that take a word, which of the next eight words each of them takes.
    static TAKEN: [[u32; GROUP]; 256] = {
        let mut taken = [[0; GROUP]; 256];
        let mut set = 0;
        while set < 256 {
            let (mut lane, mut next) = (0, 0);
            while lane < GROUP {
                taken[set][lane] = next;
                next += (set >> lane & 1) as u32;
                lane += 1;
            }
            set += 1;
        }
        taken
    };

    /// Decodes a symbol from each lane, again and again; returns how many words that took, or `None` if there are too few.
    pub fn decode<const LOG: u32>(
        simd: V3,
        tables: &Tables,
        states: &mut [u32; MOST_LANES],
        words: &[u16],
        contexts: &[[u8; MOST_LANES]],
        out: &mut [[u8; MOST_LANES]],
    ) -> Option<usize> {
        let mut vectors: [__m256i; VECTORS] = pulp::cast(*states);
        let mut rest = words;
        let complete = simd.vectorize(
            #[inline(always)]
            || {
                for (symbols, contexts) in out.iter_mut().zip(contexts) {
                    // Each lane takes at most one word.
                    let Some(window) = rest.first_chunk() else { return false };
                    rest = &rest[step::<LOG>(simd, tables, &mut vectors, window, contexts, symbols)..];
                }
                true
            },
        );
        *states = pulp::cast(vectors);
        complete.then(|| words.len() - rest.len())
    }

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "what runs inside `vectorize` must be inlined into it")]
    fn step<const LOG: u32>(
        V3 { avx, avx2, .. }: V3,
        tables: &Tables,
        states: &mut [__m256i; VECTORS],
        words: &[u16; MOST_LANES],
        contexts: &[u8; MOST_LANES],
        out: &mut [u8; MOST_LANES],
    ) -> usize {
        let mask = avx._mm256_set1_epi32((1 << LOG) - 1);
        let twelve = avx._mm256_set1_epi32(0xFFF);
        let zero = avx._mm256_setzero_si256();
        let pieces = contexts.as_chunks::<GROUP>().0.iter().zip(out.as_chunks_mut::<GROUP>().0);
        for (state, (contexts, symbols)) in states.iter_mut().zip(pieces) {
            let slots: [u32; GROUP] = pulp::cast(avx2._mm256_and_si256(*state, mask));
            let [e0, e1, e2, e3, e4, e5, e6, e7] = std::array::from_fn(|lane| {
                let entry = tables.slots[usize::from(contexts[lane])][slots[lane] as usize % SLOTS];
                symbols[lane] = entry as u8;
                entry.cast_signed()
            });
            // Set from registers: a vector that is loaded from eight separate stores waits for all of them.
            let entries = avx._mm256_set_epi32(e7, e6, e5, e4, e3, e2, e1, e0);
            let offset = avx2._mm256_and_si256(avx2._mm256_srli_epi32::<8>(entries), twelve);
            let freq = avx2._mm256_srli_epi32::<20>(entries);
            let upper = match LOG {
                12 => avx2._mm256_srli_epi32::<12>(*state),
                11 => avx2._mm256_srli_epi32::<11>(*state),
                _ => avx2._mm256_srli_epi32::<10>(*state),
            };
            *state = avx2._mm256_add_epi32(avx2._mm256_mullo_epi32(freq, upper), offset);
        }
        let mut used = 0;
        for state in states {
            let empty = avx2._mm256_cmpeq_epi32(avx2._mm256_srli_epi32::<16>(*state), zero);
            let set = avx._mm256_movemask_ps(avx._mm256_castsi256_ps(empty)).cast_unsigned() as usize % 256;
            // Three vectors took at most 24 words before the last.
            let window = words[used.min(MOST_LANES - GROUP)..].first_chunk::<GROUP>().copied().unwrap_or_default();
            let window = avx2._mm256_cvtepu16_epi32(pulp::cast(window));
            let word = avx2._mm256_permutevar8x32_epi32(window, pulp::cast(TAKEN[set]));
            let full = avx2._mm256_or_si256(avx2._mm256_slli_epi32::<16>(*state), word);
            *state = avx2._mm256_blendv_epi8(*state, full, empty);
            used += set.count_ones() as usize;
        }
        used
    }
}

/// An array on the heap that never was on the stack.
pub(crate) fn boxed<T: Clone, const N: usize>(value: T) -> Box<[T; N]> {
    let boxed = vec![value; N].into_boxed_slice();
    boxed.try_into().unwrap_or_else(|_| unreachable!("made with that length"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frequencies proportional to `weights`, at least one for each positive weight.
    fn freqs(weights: &[u32], log: u32) -> Freqs {
        let total: u32 = weights.iter().sum();
        let mut freqs = [0; 256];
        for (freq, &weight) in freqs.iter_mut().zip(weights) {
            if weight > 0 {
                *freq = ((weight << log) / total).max(1) as u16;
            }
        }
        let sum: u32 = freqs.iter().map(|freq| u32::from(*freq)).sum();
        let largest = (0..256).max_by_key(|&symbol| freqs[symbol]).unwrap();
        freqs[largest] = (u32::from(freqs[largest]) + (1 << log) - sum) as u16;
        if freqs[largest] == 4096 {
            freqs[largest] -= 1;
            freqs[255 - largest] = 1;
        }
        freqs
    }

    fn noise(len: usize) -> impl Iterator<Item = u32> {
        let mut state = 1_u64;
        std::iter::repeat_with(move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        })
        .take(len)
    }

    fn coded(symbols: &[u8], contexts: &[u8]) -> Vec<Coded> {
        symbols
            .iter()
            .zip(contexts)
            .map(|(symbol, context)| Coded::from(*context) << 8 | Coded::from(*symbol))
            .collect()
    }

    #[test]
    fn quotients_are_exact() {
        for log in MIN_LOG..=MAX_LOG {
            for freq in 1..(1_u32 << log).min(4096) {
                let step = divisor(u64::from(freq));
                let most = (u64::from(freq) << (32 - log)) - 1;
                let near = |x: u64| x.saturating_sub(2)..=(x + 2).min(most);
                // Where the quotient changes, at both ends, and in between.
                let steps = (0..40).map(|i| most / u64::from(freq) * i / 39 * u64::from(freq));
                for x in steps.flat_map(near) {
                    let product = (x + (step >> 60)) * (step & 0xFFFF_FFFF);
                    assert_eq!(product >> (32 + (step >> 56 & 0xF)), x / u64::from(freq), "{x} / {freq}");
                }
            }
        }
    }

    #[test]
    fn symbols_come_back_in_pieces_of_any_length() {
        for log in MIN_LOG..=MAX_LOG {
            let tables_of = [vec![1; 2], vec![0, 7], vec![1, 100], (1..=(1_u32 << log).min(256)).rev().collect()];
            let tables_of: Vec<_> = tables_of.iter().map(|weights| freqs(weights, log)).collect();
            let (mut encoder, mut tables, mut decoder) = (Encoder::default(), Tables::default(), Decoder::default());
            tables.start(log);
            encoder.start(log);
            for (context, freqs) in tables_of.iter().enumerate() {
                encoder.set(context, freqs);
                tables.set(context, freqs);
            }
            for len in [0, 1, 7, 8, 9, 1000] {
                let contexts: Vec<u8> = noise(len).map(|word| (word >> 9) as u8 % 4).collect();
                let pick = |(context, word): (&u8, u32)| {
                    let mut slot = word % (1 << log);
                    (0..=255)
                        .find(|&symbol| {
                            let freq = u32::from(tables_of[usize::from(*context)][usize::from(symbol)]);
                            let found = slot < freq;
                            slot = slot.wrapping_sub(freq);
                            found
                        })
                        .unwrap()
                };
                let symbols: Vec<u8> = contexts.iter().zip(noise(len)).map(pick).collect();
                let mut bytes = b"before".to_vec();
                for lanes in [8, 32] {
                    bytes.truncate(6);
                    encoder.encode(lanes, &coded(&symbols, &contexts), &mut bytes);
                    for piece in [3, 8, 40, 1000] {
                        decoder.start(lanes, &bytes[6..]).unwrap();
                        let mut back = vec![0; len];
                        for (contexts, out) in contexts.chunks(piece).zip(back.chunks_mut(piece)) {
                            decoder.decode(&tables, contexts, out).unwrap();
                        }
                        decoder.finish().unwrap();
                        assert_eq!(back, symbols, "log {log}, {len} symbols in pieces of {piece}, {lanes} lanes");
                    }
                }
            }
        }
    }

    #[test]
    fn size_is_the_entropy() {
        let freqs = freqs(&[1, 2, 4, 8, 16, 32, 64, 128], 12);
        let mut encoder = Encoder::default();
        encoder.set(0, &freqs);
        let symbols: Vec<u8> =
            noise(100_000).map(|word| (7 - (word % 255 + 1).leading_zeros().abs_diff(24)) as u8).collect();
        let bits: f64 = symbols.iter().map(|&symbol| 12.0 - f64::from(freqs[usize::from(symbol)]).log2()).sum();
        let mut bytes = Vec::new();
        encoder.encode(32, &coded(&symbols, &vec![0; symbols.len()]), &mut bytes);
        let excess = (bytes.len() - 128) as f64 * 8.0 / bits;
        assert!((0.998..1.002).contains(&excess), "{excess}");
    }

    #[test]
    fn damage_is_refused() {
        let freqs = freqs(&[3, 1], 12);
        let (mut encoder, mut tables, mut decoder) = (Encoder::default(), Tables::default(), Decoder::default());
        encoder.set(0, &freqs);
        tables.set(0, &freqs);
        let (symbols, contexts) = ([0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0].repeat(50), [0; 550]);
        let mut bytes = Vec::new();
        encoder.encode(8, &coded(&symbols, &contexts), &mut bytes);
        let mut decode = |bytes: &[u8], len: usize| {
            decoder.start(8, bytes)?;
            decoder.decode(&tables, &contexts[..len], &mut vec![0; len])?;
            decoder.finish()
        };
        decode(&bytes, 550).unwrap();
        decode(&bytes, 549).unwrap_err();
        for len in 0..bytes.len() {
            decode(&bytes[..len], 550).unwrap_err();
        }
        bytes.extend([0, 0]);
        decode(&bytes, 550).unwrap_err();
    }
}
