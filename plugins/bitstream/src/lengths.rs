//! Lengths of prefix codes: the best under a limit, and how they are stored.
//!
//! Stored lengths are half bytes, the lower half first, and zero bits up to a whole byte:
//!
//! | Half byte | Meaning |
//! |---|---|
//! | 0 to 12 | the length of the next symbol, 0 for one without a code |
//! | 13, a | 2 + a symbols without a code |
//! | 14, a, b, c | 18 + a + 16 b + 256 c symbols without a code |
//! | 15, a | 3 + a times the length before |

use gearbox_core::{Error, Result};

use crate::wire::Reader;

/// The longest code.
pub const LONGEST: u8 = 12;

/// Half bytes that are no lengths.
const FEW_ZEROS: u8 = 13;
const MANY_ZEROS: u8 = 14;
const REPEAT: u8 = 15;

/// Code lengths of at most `limit` bits with the least sum of `count × length`; 0 for symbols that do not occur.
///
/// At least two symbols occur, and at most 2^`limit`.
///
/// # Source
/// Larmore, Hirschberg, *A fast algorithm for optimal length-limited Huffman codes*, 1990 (package-merge); differences from it: none.
pub fn limited(counts: &[u64], limit: u8, lengths: &mut Vec<u8>) {
    lengths.clear();
    lengths.resize(counts.len(), 0);
    let mut leaves: Vec<(u64, usize)> =
        counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(symbol, count)| (*count, symbol)).collect();
    leaves.sort_unstable();
    // Of each level only the cheapest items can be part of the solution.
    let most = 2 * leaves.len() - 2;
    let mut weights: Vec<u64> = leaves.iter().map(|(weight, _)| *weight).collect();
    // Per level, whether each item is a leaf rather than two items of the level before.
    let mut levels: Vec<Vec<bool>> = vec![vec![true; weights.len()]];
    for _ in 1..limit {
        let mut packages = weights.chunks_exact(2).map(|pair| pair[0] + pair[1]).peekable();
        let mut singles = leaves.iter().map(|(weight, _)| *weight).peekable();
        let mut merged = Vec::with_capacity(most);
        let mut is_leaf = Vec::with_capacity(most);
        while merged.len() < most {
            let leaf = match (singles.peek(), packages.peek()) {
                (Some(single), Some(package)) => single <= package,
                (single, None) => single.is_some(),
                (None, Some(_)) => false,
            };
            let Some(weight) = (if leaf { singles.next() } else { packages.next() }) else { break };
            merged.push(weight);
            is_leaf.push(leaf);
        }
        weights = merged;
        levels.push(is_leaf);
    }
    let mut taken = most;
    for level in levels.iter().rev() {
        let single = level.iter().take(taken).filter(|is_leaf| **is_leaf).count();
        for (_, symbol) in &leaves[..single] {
            lengths[*symbol] += 1;
        }
        taken = 2 * (taken - single);
    }
}

/// Appends lengths of at most [`LONGEST`].
pub fn store(lengths: &[u8], out: &mut Vec<u8>) {
    let mut halves = Vec::with_capacity(lengths.len());
    let mut before = 0;
    for run in lengths.chunk_by(|a, b| a == b) {
        let (length, mut left) = (run[0], run.len());
        while left > 0 {
            let digits = |number: usize| (0..3).map(move |digit| (number >> (4 * digit)) as u8 & 0xF);
            let done = match (length, left) {
                (0, 18..) => {
                    let most = left.min(18 + 0xFFF);
                    halves.push(MANY_ZEROS);
                    halves.extend(digits(most - 18));
                    most
                }
                (0, 2..) => {
                    halves.extend([FEW_ZEROS, (left - 2) as u8]);
                    left
                }
                (_, 3..) if length == before => {
                    let most = left.min(18);
                    halves.extend([REPEAT, (most - 3) as u8]);
                    most
                }
                _ => {
                    halves.push(length);
                    1
                }
            };
            before = length;
            left -= done;
        }
    }
    out.extend(halves.chunks(2).map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4));
}

/// Replaces `lengths` by `count` lengths that [`store`] wrote.
///
/// # Errors
/// [`ErrorKind::Corrupt`](gearbox_core::ErrorKind::Corrupt) if they are cut, more than `count`, or do not make a complete code.
pub fn load(from: &mut Reader<'_>, count: usize, lengths: &mut Vec<u8>) -> Result<()> {
    lengths.clear();
    let mut high = None;
    let mut half = || -> Result<u8> {
        if let Some(half) = high.take() {
            return Ok(half);
        }
        let byte = from.byte()?;
        high = Some(byte >> 4);
        Ok(byte & 0xF)
    };
    let mut before = 0;
    while lengths.len() < count {
        let first = half()?;
        let (length, run) = match first {
            FEW_ZEROS => (0, 2 + usize::from(half()?)),
            MANY_ZEROS => {
                let [a, b, c] = [half()?, half()?, half()?].map(usize::from);
                (0, 18 + a + (b << 4) + (c << 8))
            }
            REPEAT => (before, 3 + usize::from(half()?)),
            length => (length, 1),
        };
        if run > count - lengths.len() {
            return Err(Error::corrupt(format!("expected {count} code lengths, got more")));
        }
        lengths.resize(lengths.len() + run, length);
        before = length;
    }
    if high.is_some_and(|half| half != 0) {
        return Err(Error::corrupt("expected zero bits behind the code lengths"));
    }
    let space: usize = lengths.iter().filter(|length| **length > 0).map(|length| 1 << (LONGEST - length)).sum();
    // One code alone would fill the space with length 0, so there are at least two.
    if space == 1 << LONGEST {
        return Ok(());
    }
    Err(Error::corrupt(format!("code lengths fill {space} of {} parts of the code space", 1 << LONGEST)))
}

/// Replaces `order` by the symbols that have a code and its length, by length and then by symbol: the order of their codes.
pub fn canonical_order(lengths: &[u8], order: &mut Vec<(u16, u8)>) {
    let mut starts = [0_usize; 256];
    for length in lengths {
        starts[usize::from(*length)] += 1;
    }
    starts[0] = 0;
    let mut used = 0;
    for start in &mut starts {
        used += *start;
        *start = used - *start;
    }
    order.clear();
    order.resize(used, (0, 0));
    for (symbol, length) in lengths.iter().enumerate().filter(|(_, length)| **length > 0) {
        let place = &mut starts[usize::from(*length)];
        order[*place] = (symbol as u16, *length);
        *place += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited_lengths(counts: &[u64], limit: u8) -> Vec<u8> {
        let mut lengths = Vec::new();
        limited(counts, limit, &mut lengths);
        lengths
    }

    /// The least cost of any lengths of up to `limit` bits that make a code: all are tried.
    fn least_cost(counts: &[u64], limit: u8) -> u64 {
        let count = counts.len() as u32;
        let costs = (0..u64::from(limit).pow(count)).filter_map(|number| {
            let lengths = (0..count).map(|digit| number / u64::from(limit).pow(digit) % u64::from(limit) + 1);
            let space: u64 = lengths.clone().map(|length| 1 << (LONGEST - length as u8)).sum();
            (space <= 1 << LONGEST).then(|| lengths.zip(counts).map(|(length, count)| length * count).sum())
        });
        costs.min().unwrap()
    }

    #[test]
    fn limited_lengths_are_the_best_there_are() {
        let cases: [&[u64]; 5] =
            [&[5, 3], &[2, 2, 4, 4, 8], &[1, 1, 2, 3, 5, 8, 13], &[100, 1, 1, 1, 1, 1], &[7, 7, 7, 7, 7, 7, 7]];
        for counts in cases {
            for limit in 3..=6 {
                let lengths = limited_lengths(counts, limit);
                let cost: u64 = lengths.iter().zip(counts).map(|(length, count)| u64::from(*length) * count).sum();
                assert_eq!(cost, least_cost(counts, limit), "{counts:?}, up to {limit} bits: {lengths:?}");
                assert!(lengths.iter().all(|length| (1..=limit).contains(length)));
            }
        }
        assert_eq!(limited_lengths(&[0, 5, 0, 3], 12), [0, 1, 0, 1]);
        assert_eq!(limited_lengths(&vec![1; 4096], 12), vec![12; 4096]);
    }

    #[test]
    fn lengths_come_back_and_are_small() {
        let spread: Vec<u64> = (0..64_u64).map(|i| if (20..40).contains(&i) { 1 << (i - 20) } else { 0 }).collect();
        let full: Vec<u64> = (0..64).map(|i| 1 + i * i).collect();
        let wide: Vec<u64> = (0..4096).map(|i| u64::from(i % 4 == 0)).collect();
        let distant: Vec<u64> = (0..4096).map(|i| u64::from(i == 17 || i == 4095)).collect();
        for (counts, most) in [(spread, 16), (full, 40), (wide, 2 * 1024), (distant, 8)] {
            let lengths = limited_lengths(&counts, LONGEST);
            let mut stored = Vec::new();
            store(&lengths, &mut stored);
            assert!(stored.len() <= most, "{} bytes", stored.len());
            let mut got = Vec::new();
            let mut reader = Reader::new(&stored);
            load(&mut reader, lengths.len(), &mut got).unwrap();
            assert_eq!((got, reader.remaining()), (lengths, 0));
        }
    }

    #[test]
    fn load_refuses_codes_that_are_not_complete() {
        let load =
            |bytes: &[u8], count| load(&mut Reader::new(bytes), count, &mut Vec::new()).map_err(|e| e.to_string());
        assert_eq!(load(&[0x11], 2), Ok(()));
        assert_eq!(load(&[0x21], 2).unwrap_err(), "code lengths fill 3072 of 4096 parts of the code space");
        assert_eq!(load(&[0x11, 0x01], 3).unwrap_err(), "code lengths fill 6144 of 4096 parts of the code space");
        assert_eq!(load(&[0x01], 2).unwrap_err(), "code lengths fill 2048 of 4096 parts of the code space");
        assert_eq!(load(&[0xFD], 4).unwrap_err(), "expected 4 code lengths, got more");
        assert_eq!(load(&[0x22, 0x12], 3).unwrap_err(), "expected zero bits behind the code lengths");
        assert_eq!(load(&[0x1], 3).unwrap_err(), "expected 1 more bytes, got 0");
    }

    #[test]
    fn canonical_order_is_by_length_and_symbol() {
        let mut order = Vec::new();
        canonical_order(&[2, 0, 3, 1, 3, 0], &mut order);
        assert_eq!(order, [(3, 1), (0, 2), (2, 3), (4, 3)]);
    }
}
