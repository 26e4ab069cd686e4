//! Tables of frequencies, stored as logarithms in fractions of an octave.
//!
//! A table needs no more precision than the counts it was made from: half or quarter octaves cost less than a hundredth of a bit per
//! symbol, and neighbouring symbols often have the same level. A level of zero means that the symbol does not occur; level `l` stands for
//! a weight of `2^((l - 1) / steps)`, `steps` levels to an octave. Frequencies are those weights scaled to sum to `1 << log`, by integer
//! arithmetic alone.

use crate::coder::{Freqs, MAX_LOG};
use crate::math::log2;
use crate::side::{Bit, Side};

/// Level of each symbol.
pub(crate) type Levels = [u8; 256];

/// Which symbols resemble each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Sign in bit 7: the other sign is as likely.
    Signed,
    /// Difference modulo 256: the negative is as likely.
    Difference,
    /// Neither.
    Plain,
}

impl Kind {
    /// The symbol, coded earlier, that this one resembles.
    fn mirror(self, symbol: usize) -> Option<usize> {
        match self {
            Self::Signed => (symbol >= 128).then(|| symbol - 128),
            Self::Difference => (symbol > 128).then(|| 256 - symbol),
            Self::Plain => None,
        }
    }
}

/// Levels of symbols that occur so often.
pub(crate) fn levels(counts: &[u32; 256], steps: u8) -> Levels {
    let total: u32 = counts.iter().sum();
    let highest = log2(total.max(1) as f32);
    #[expect(clippy::cast_sign_loss, reason = "at most 12 octaves, none of them negative")]
    let level = |count: u32| {
        if count == 0 {
            return 0;
        }
        let octaves = (log2(count as f32) - highest + MAX_LOG as f32).max(0.0);
        1 + (octaves * f32::from(steps) + 0.5) as u8
    };
    counts.map(level)
}

/// Highest level there is.
fn highest(steps: u8) -> u8 {
    1 + MAX_LOG as u8 * steps
}

/// Frequencies that sum to `1 << log`, or all zero if no symbol has a level.
pub(crate) fn frequencies(levels: &Levels, steps: u8, log: u32) -> Freqs {
    /// Quarters of an octave in 256ths.
    const QUARTERS: [u64; 4] = [256, 304, 362, 431];
    let quarter = 4 / steps.max(1);
    let weight = |level: u8| match level.checked_sub(1) {
        Some(level) => {
            QUARTERS[usize::from(level % steps.max(1) * quarter) % 4] << u32::from(level / steps.max(1)).min(MAX_LOG)
        }
        None => 0,
    };
    let mut weights = [0; 64];
    weights.iter_mut().zip(0..).for_each(|(place, level)| *place = weight(level));
    let total: u64 = levels.iter().map(|level| weights[usize::from(*level) % 64]).sum();
    let mut freqs = [0; 256];
    if total == 0 {
        return freqs;
    }
    // One division for all symbols: weights are below 2^21, so nothing overflows.
    let scale = (1 << (log + 32)) / total;
    let scaled = weights.map(|weight| ((weight * scale) >> 32).max(1) as u16);
    for (freq, level) in freqs.iter_mut().zip(levels) {
        *freq = if *level > 0 { scaled[usize::from(*level) % 64] } else { 0 };
    }
    let sum: i64 = freqs.iter().map(|freq| i64::from(*freq)).sum();
    let mut left = (1 << log) - sum;
    // What rounding left over goes to the largest; what it took too much comes from the largest, as often as needed.
    while left != 0 {
        let largest = largest(&freqs);
        let change = left.max(-i64::from(freqs[largest] / 2));
        freqs[largest] = freqs[largest].wrapping_add_signed(change as i16);
        left -= change;
        if change == 0 {
            break;
        }
    }
    // A symbol that is alone leaves one slot to another, so that its frequency fits into twelve bits.
    let largest = largest(&freqs);
    if freqs[largest] == 1 << MAX_LOG {
        freqs[largest] -= 1;
        freqs[255 - largest] = 1;
    }
    freqs
}

/// The first symbol of the highest frequency.
fn largest(freqs: &Freqs) -> usize {
    let highest = freqs.iter().max().copied().unwrap_or_default();
    freqs.iter().position(|freq| *freq == highest).unwrap_or_default()
}

/// Models of the levels of tables of one kind.
#[derive(Clone, Debug)]
pub(crate) struct Models {
    kind: Kind,
    steps: u8,
    /// The table before, which the next one resembles.
    last: Levels,
    groups: [Bit; 16],
    used: [Bit; 16],
    rise: [[Bit; 3]; 4],
    far: [[Bit; 32]; 4],
}

impl Models {
    /// Models that know nothing yet; `steps` is 1, 2 or 4.
    pub fn new(kind: Kind, steps: u8) -> Self {
        Self {
            kind,
            steps,
            last: [0; 256],
            groups: [Bit::default(); 16],
            used: [Bit::default(); 16],
            rise: [[Bit::default(); 3]; 4],
            far: [[Bit::default(); 32]; 4],
        }
    }

    /// Which symbols resemble each other.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Codes the levels of a table.
    pub fn code(&mut self, side: &mut impl Side, levels: &mut Levels) {
        let mut left = [0, 0];
        for first in (0..256).step_by(4) {
            // Whole exponents are often absent.
            let any =
                |levels: &Levels, first: usize| usize::from(levels[first..first + 4].iter().any(|level| *level > 0));
            let mirror = self.kind.mirror(first + 3).map_or(0, |mirror| 2 + any(levels, mirror & !3));
            let context = usize::from(left != [0, 0]) << 3 | any(&self.last, first) << 2 | mirror;
            if !side.bit(&mut self.groups[context], any(levels, first) == 1) {
                levels[first..first + 4].fill(0);
                left = [0, 0];
                continue;
            }
            for symbol in first..first + 4 {
                let level = self.code_level(side, levels, symbol, left);
                levels[symbol] = level;
                left = [level, left[0]];
            }
        }
        self.last = *levels;
    }

    /// Codes the level of a symbol; `left` has the two before it.
    fn code_level(&mut self, side: &mut impl Side, levels: &Levels, symbol: usize, left: [u8; 2]) -> u8 {
        let mirror = self.kind.mirror(symbol).map(|mirror| levels[mirror]);
        let last = self.last[symbol];
        let occupied = [left[0], left[1], mirror.unwrap_or(last), last].map(|level| usize::from(level > 0));
        let used = &mut self.used[occupied.iter().fold(0, |context, bit| context * 2 + bit)];
        let level = levels[symbol];
        if !side.bit(used, level > 0) {
            return 0;
        }
        // What the level is compared with, and how much that can be trusted.
        let (guess, trust) = match (mirror, last, left[0]) {
            (Some(mirror), ..) if mirror > 0 => (mirror, 0),
            (_, last, 1..) if last > 0 => (left[0].midpoint(last), 1),
            (_, _, 1..) => (left[0], 2),
            (_, last, _) => (last.max(1), 3),
        };
        self.difference(side, level, guess, trust)
    }

    /// Codes a level above zero as its difference to a guess.
    fn difference(&mut self, side: &mut impl Side, level: u8, guess: u8, trust: usize) -> u8 {
        let [same, up, _] = &mut self.rise[trust];
        if side.bit(same, level == guess) {
            return guess;
        }
        let up = side.bit(up, level > guess);
        let mut steps = 1;
        while steps < 64 && side.bit(&mut self.far[trust][(steps as usize).min(31)], level.abs_diff(guess) > steps) {
            steps += 1;
        }
        let level = if up { guess.saturating_add(steps) } else { guess.saturating_sub(steps) };
        level.clamp(1, highest(self.steps))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::side::{Reader, Writer};

    fn some_counts() -> Vec<[u32; 256]> {
        vec![
            [0; 256],
            [1; 256],
            std::array::from_fn(|s| u32::from(s == 200) * 7),
            std::array::from_fn(|s| 100_000 >> (s / 8)),
            std::array::from_fn(|s| if s % 3 == 0 { (s as u32 * 7919) % 100 } else { 0 }),
        ]
    }

    #[test]
    fn frequencies_sum_up_and_follow_the_counts() {
        for counts in some_counts() {
            for steps in [1, 2, 4] {
                for log in 10..=12 {
                    let freqs = frequencies(&levels(&counts, steps), steps, log);
                    let sum: u32 = freqs.iter().map(|freq| u32::from(*freq)).sum();
                    let total: u32 = counts.iter().sum();
                    assert_eq!(sum, if total > 0 { 1 << log } else { 0 });
                    assert!(counts.iter().zip(freqs).all(|(count, freq)| *count == 0 || freq > 0));
                }
            }
        }
    }

    #[test]
    fn tables_come_back_and_similar_ones_are_cheap() {
        for kind in [Kind::Signed, Kind::Difference, Kind::Plain] {
            for steps in [2, 4] {
                let tables: Vec<_> = some_counts().iter().map(|counts| levels(counts, steps)).collect();
                let mut bytes = Vec::new();
                let mut writer = Writer::new(&mut bytes);
                let mut models = Models::new(kind, steps);
                for table in &tables {
                    models.code(&mut writer, &mut table.clone());
                }
                writer.finish();
                let mut reader = Reader::new(&bytes);
                let mut models = Models::new(kind, steps);
                for table in &tables {
                    let mut read = [0; 256];
                    models.code(&mut reader, &mut read);
                    assert_eq!(read, *table, "{kind:?}");
                }
                reader.finish().unwrap();
            }
        }
    }

    #[test]
    fn any_bytes_make_tables_that_can_be_used() {
        for seed in 0..50_u32 {
            let bytes: Vec<u8> =
                (0..400_u32).map(|i| (i.wrapping_mul(seed * 2 + 1).wrapping_mul(2_654_435_761) >> 13) as u8).collect();
            let mut reader = Reader::new(&bytes);
            let mut models = Models::new(Kind::Signed, 4);
            for _ in 0..5 {
                let mut read = [0; 256];
                models.code(&mut reader, &mut read);
                let sum: u32 = frequencies(&read, 4, 10).iter().map(|freq| u32::from(*freq)).sum();
                assert!(sum == 1024 || sum == 0, "{sum}");
            }
        }
    }
}
