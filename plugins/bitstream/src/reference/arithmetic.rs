//! The reference's arithmetic coder: an interval of 32 bits, and the counts as they are.
//!
//! `low` and `high` are the ends of the interval, both inside. While they agree in the highest bit, it is written; while they lie around
//! the middle, a bit whose value is still open is counted as pending. After that the interval is longer than 2^30, so every symbol keeps
//! a part of it as long as the counts add up to no more than 2^30, which is checked.

use gearbox_core::{Elem, Error, Result};

use super::Reference;
use super::bit_io::{BitWriter, peek};
use crate::counts::{Counts, LOG2_POINT, log2};
use crate::model::Model;
use crate::symbols::{self, Field, reference_fields, symbol_size};
use crate::wire::{Reader, put_sparse};

const QUARTER: u64 = 1 << 30;
const HALF: u64 = 2 * QUARTER;
const WHOLE: u64 = 4 * QUARTER;

/// Most symbols that the counts may stand for.
const MOST_SYMBOLS: u64 = QUARTER;

/// The reference's arithmetic coder; its table are the counts.
#[derive(Debug, Default)]
pub struct Arithmetic {
    /// Bits of the alphabet.
    bits: u8,
    counts: Vec<u64>,
    /// Sum of the counts before each symbol, and of all.
    sums: Vec<u64>,
}

impl Model for Arithmetic {
    const REFERENCE: bool = true;

    fn fields(elem: Elem) -> Result<Vec<Field>> {
        reference_fields(elem)
    }

    fn learn(&mut self, counts: &Counts) -> Result<()> {
        self.bits = counts.bits();
        self.counts.clear();
        self.counts.extend_from_slice(counts.counts());
        if counts.total() > MOST_SYMBOLS {
            let got = counts.total();
            return Err(Error::unsupported(format!(
                "expected at most {MOST_SYMBOLS} symbols for one model, got {got}"
            )));
        }
        self.add_up();
        Ok(())
    }

    fn store(&self, out: &mut Vec<u8>) {
        put_sparse(self.counts.iter().copied(), out);
    }

    fn load(&mut self, bits: u8, from: &mut Reader<'_>, _: usize) -> Result<()> {
        self.bits = bits;
        from.sparse(1 << bits, &mut self.counts)?;
        self.check()?;
        self.add_up();
        Ok(())
    }

    fn ready_to_encode(&mut self) {}

    fn encoded_len(&self, counts: &Counts) -> Option<u64> {
        let total = log2(self.total());
        let bits = counts.cost(&self.counts, |count| total.saturating_sub(log2(count)))?;
        Some((bits >> LOG2_POINT) / 8)
    }

    fn encode(&self, symbols: &[u8], out: &mut Vec<u8>) {
        let mut writer = BitWriter::new(out);
        let mut interval = Interval::default();
        let mut write = |bit: u64, pending: u64| {
            writer.put(bit, 1);
            let mut left = pending;
            while left > 0 {
                let run = left.min(32) as u32;
                writer.put(if bit == 0 { (1 << run) - 1 } else { 0 }, run);
                left -= u64::from(run);
            }
        };
        for symbol in symbols::values(symbols, self.bits) {
            let [from, to] = self.part(symbol.into());
            interval.narrow(from, to, self.total());
            while let Some(step) = interval.step() {
                if let Step::Write { bit, pending } = step {
                    write(bit, pending);
                }
            }
        }
        write(u64::from(interval.low >= QUARTER), interval.pending + 1);
        writer.finish();
    }

    fn decode(&self, encoded: &[u8], symbols: &mut [u8]) -> Result<()> {
        let mut interval = Interval::default();
        let mut code = peek(encoded, 0) >> 32;
        let mut shifts = 0;
        for to in symbols.chunks_exact_mut(symbol_size(self.bits)) {
            // The code is never outside of the interval: the part that is chosen is the one that holds it.
            let scaled = ((code - interval.low + 1) * self.total() - 1) / (interval.high - interval.low + 1);
            // Symbols that do not occur have the sum of the one behind them.
            let symbol = self.sums.partition_point(|sum| *sum <= scaled) - 1;
            to.copy_from_slice(&(symbol as u16).to_le_bytes()[..to.len()]);
            let [from, end] = self.part(symbol);
            interval.narrow(from, end, self.total());
            while let Some(step) = interval.step() {
                let taken_off = match step {
                    Step::Write { bit, .. } => bit * HALF,
                    Step::Wait => QUARTER,
                };
                let next = encoded.get((shifts + 32) / 8).map_or(0, |byte| byte >> (7 - shifts % 8) & 1);
                code = (code - taken_off) << 1 | u64::from(next);
                shifts += 1;
            }
        }
        // What the encoder writes at the end fixes the code, and so does how far it came the length.
        let expected = (shifts + 2).div_ceil(8);
        if encoded.len() != expected {
            return Err(Error::corrupt(format!("the code takes {expected} bytes of {}", encoded.len())));
        }
        if code != if interval.low < QUARTER { QUARTER } else { HALF } {
            return Err(Error::corrupt("the code does not end as the encoder ends it"));
        }
        Ok(())
    }
}

impl Arithmetic {
    /// The sum of all counts.
    fn total(&self) -> u64 {
        self.sums.last().copied().unwrap_or_default()
    }

    /// The part of the sums that belongs to a symbol.
    fn part(&self, symbol: usize) -> [u64; 2] {
        [symbol, symbol + 1].map(|place| self.sums.get(place).copied().unwrap_or_default())
    }

    fn check(&self) -> Result<()> {
        let total = self.counts.iter().fold(0, |sum: u64, count| sum.saturating_add(*count));
        if (1..=MOST_SYMBOLS).contains(&total) {
            return Ok(());
        }
        Err(Error::corrupt(format!("expected counts of 1 to {MOST_SYMBOLS} in all, got {total}")))
    }

    fn add_up(&mut self) {
        self.sums.clear();
        self.sums.push(0);
        let mut sum = 0;
        self.sums.extend(self.counts.iter().map(|count| {
            sum += count;
            sum
        }));
    }
}

impl Reference for Arithmetic {
    fn table(&self) -> &[u64] {
        &self.counts
    }

    fn from_table(bits: u8, table: &[u64]) -> Result<Self> {
        if table.len() != 1 << bits {
            return Err(Error::corrupt(format!("expected {} counts, got {}", 1 << bits, table.len())));
        }
        let mut coder = Self { bits, counts: table.to_vec(), sums: Vec::new() };
        coder.check()?;
        coder.add_up();
        Ok(coder)
    }
}

/// The interval that encoder and decoder narrow in the same way.
struct Interval {
    low: u64,
    high: u64,
    /// Bits around the middle whose value is still open.
    pending: u64,
}

impl Default for Interval {
    fn default() -> Self {
        Self { low: 0, high: WHOLE - 1, pending: 0 }
    }
}

/// How the interval is doubled.
enum Step {
    /// Both halves of the choice are made: this bit, and as many of the other value as were pending.
    Write { bit: u64, pending: u64 },
    /// The interval lies around the middle.
    Wait,
}

impl Interval {
    fn narrow(&mut self, from: u64, to: u64, total: u64) {
        // At most 2^32 × 2^30.
        let range = self.high - self.low + 1;
        self.high = self.low + range * to / total - 1;
        self.low += range * from / total;
    }

    fn step(&mut self) -> Option<Step> {
        let (off, step) = if self.high < HALF {
            (0, Step::Write { bit: 0, pending: std::mem::take(&mut self.pending) })
        } else if self.low >= HALF {
            (HALF, Step::Write { bit: 1, pending: std::mem::take(&mut self.pending) })
        } else if self.low >= QUARTER && self.high < 3 * QUARTER {
            self.pending += 1;
            (QUARTER, Step::Wait)
        } else {
            return None;
        };
        self.low = (self.low - off) << 1;
        self.high = (self.high - off) << 1 | 1;
        Some(step)
    }
}
