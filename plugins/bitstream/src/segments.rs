//! The parts of a coded stream, which are coded at once so that none waits for another.
//!
//! Up to 1023 symbols are one segment. More are four segments in a row, of equal numbers of symbols but for the last, which may have up to
//! three less; the coded bytes begin with the lengths of the first three in LEB128.

use std::ops::Range;

use gearbox_core::Result;

use crate::wire::{Reader, put_number};

/// Segments of a long stream.
pub const SEGMENTS: usize = 4;

/// Symbols from which on a stream has several segments.
const LONG: usize = 1024;

/// Most bytes that the lengths of segments take.
pub const LENGTHS_MOST: usize = 9 * (SEGMENTS - 1);

/// Symbols of each segment but the last; all if there is only one.
pub fn segment_len(count: usize) -> usize {
    if count < LONG { count } else { count.div_ceil(SEGMENTS) }
}

/// Appends the segments of `symbols`, which have `size` bytes each, as `encode` writes them.
pub fn put(symbols: &[u8], size: usize, out: &mut Vec<u8>, mut encode: impl FnMut(&[u8], &mut Vec<u8>)) {
    let mut parts = symbols.chunks((segment_len(symbols.len() / size) * size).max(1)).peekable();
    let start = out.len();
    let mut lengths = Vec::with_capacity(LENGTHS_MOST);
    while let Some(part) = parts.next() {
        let before = out.len();
        encode(part, out);
        if parts.peek().is_some() {
            put_number((out.len() - before) as u64, &mut lengths);
        }
    }
    out.splice(start..start, lengths);
}

/// Where the bytes of the segments of `count` symbols lie, and all bytes behind the lengths; segments that do not exist are empty.
///
/// # Errors
/// [`ErrorKind::Corrupt`](gearbox_core::ErrorKind::Corrupt) if they are longer than the bytes.
pub fn take(encoded: &[u8], count: usize) -> Result<(&[u8], [Range<usize>; SEGMENTS])> {
    let mut reader = Reader::new(encoded);
    let mut ends = [0; SEGMENTS];
    let used = if count < LONG { 1 } else { SEGMENTS };
    let mut lengths = [0; SEGMENTS];
    for length in &mut lengths[..used - 1] {
        *length = reader.length()?;
    }
    let all = &encoded[encoded.len() - reader.remaining()..];
    for (end, length) in ends.iter_mut().zip(&lengths[..used - 1]) {
        reader.take(*length)?;
        *end = all.len() - reader.remaining();
    }
    ends[used - 1..].fill(all.len());
    let mut start = 0;
    Ok((all, ends.map(|end| std::mem::replace(&mut start, end)..end)))
}

/// Cuts the symbols of a stream into its segments; those that do not exist are empty.
pub fn split_mut(symbols: &mut [u8], size: usize) -> [&mut [u8]; SEGMENTS] {
    let len = segment_len(symbols.len() / size) * size;
    let mut parts = symbols.chunks_mut(len.max(1));
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_found_again() {
        for (count, size) in [(1, 1), (1023, 2), (1024, 1), (1025, 2), (1026, 1), (1027, 1), (5000, 2)] {
            let symbols: Vec<u8> = (0..count * size).map(|i| (i % 251) as u8).collect();
            let mut out = vec![9];
            // Each segment is stored with its first byte in front of it.
            put(&symbols, size, &mut out, |part, out| {
                out.push(part[0]);
                out.extend_from_slice(part);
            });
            let (all, ranges) = take(&out[1..], count).unwrap();
            let mut copy = symbols.clone();
            let parts = split_mut(&mut copy, size);
            assert_eq!(parts.iter().filter(|part| !part.is_empty()).count(), if count < 1024 { 1 } else { 4 });
            for (part, range) in parts.iter().zip(ranges).filter(|(part, _)| !part.is_empty()) {
                assert_eq!(all[range.start], part[0]);
                assert_eq!(&all[range.start + 1..range.end], &**part);
            }
            assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), symbols.len());
        }
    }

    #[test]
    fn lengths_beyond_the_bytes_are_refused() {
        assert!(take(&[], 2000).is_err());
        assert!(take(&[1, 1, 1, 0, 0], 2000).is_err());
        assert!(take(&[1, 1, 1, 0, 0, 0], 2000).is_ok());
    }
}
