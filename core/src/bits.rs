//! Bit packing of narrow unsigned integers: the stored form of [`Elem::Bits`](crate::Elem::Bits).
//!
//! Element `i` of width `n` takes the bits `i * n` to `i * n + n - 1` of the packed bytes, least significant bit first; the bits behind
//! the last element are zero. In memory an element takes one byte up to 8 bits and a little-endian `u16` above.

use crate::{Error, ErrorKind, Result};

/// Bytes of `elements` packed integers of `bits` bits; saturates, so that a later length check refuses the result.
///
/// # Examples
/// ```
/// assert_eq!(gearbox_core::bits::packed_len(3, 5), 2);
/// ```
pub const fn packed_len(bits: u8, elements: usize) -> usize {
    // Eight elements take exactly `bits` bytes.
    let groups = (elements / 8).saturating_mul(bits as usize);
    groups.saturating_add((elements % 8 * bits as usize).div_ceil(8))
}

/// Appends the packed `elements` to `out`.
///
/// # Errors
/// [`ErrorKind::Unsupported`] unless `bits` is 1 to 16; [`ErrorKind::ShapeMismatch`] if a `u16` is cut in half;
/// [`ErrorKind::InvalidInput`] if an element does not fit its width. `out` is then as before.
///
/// # Examples
/// ```
/// let mut packed = Vec::new();
/// gearbox_core::bits::pack(4, &[1, 2, 3, 4], &mut packed).unwrap();
/// assert_eq!(packed, [0x21, 0x43]);
/// ```
pub fn pack(bits: u8, elements: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let count = count(elements.len(), bits)?;
    check_range(elements, bits)?;
    out.reserve(packed_len(bits, count));
    match bits {
        1 => pack_bytes(elements, out, |group| {
            let word = u64::from_le_bytes(group);
            (0..8).fold(0, |byte, i| byte | (word >> (7 * i)) as u8)
        }),
        2 => pack_bytes(elements, out, |group| {
            let word = u32::from_le_bytes(group);
            (word | word >> 6 | word >> 12 | word >> 18) as u8
        }),
        4 => pack_bytes(elements, out, |group| {
            let word = u16::from_le_bytes(group);
            (word | word >> 4) as u8
        }),
        8 | 16 => out.extend_from_slice(elements),
        ..8 => {
            let groups = elements.chunks(8);
            pack_groups(
                groups.map(|group| (group.len(), gather(group.iter().copied().map(u128::from), bits))),
                bits,
                out,
            );
        }
        _ => {
            let groups = elements.chunks(16);
            let words = |group: &[u8]| {
                gather(group.chunks_exact(2).map(|w| u128::from(u16::from_le_bytes([w[0], w[1]]))), bits)
            };
            pack_groups(groups.map(|group| (group.len() / 2, words(group))), bits, out);
        }
    }
    Ok(())
}

/// Fills `elements` from packed bytes.
///
/// # Errors
/// [`ErrorKind::Unsupported`] unless `bits` is 1 to 16; [`ErrorKind::ShapeMismatch`] if a `u16` would be cut in half;
/// [`ErrorKind::Corrupt`] if `packed` has another length than [`packed_len`] or ends in bits that are not zero.
pub fn unpack(bits: u8, packed: &[u8], elements: &mut [u8]) -> Result<()> {
    let count = count(elements.len(), bits)?;
    let expected = packed_len(bits, count);
    if packed.len() != expected {
        return Err(Error::corrupt(format!(
            "{count} packed elements of {bits} bits: expected {expected} bytes, got {}",
            packed.len()
        )));
    }
    let used = count % 8 * usize::from(bits) % 8;
    if let Some(last) = packed.last()
        && used != 0
        && last >> used != 0
    {
        return Err(Error::corrupt(format!("expected zero bits behind the last element, got last byte {last:#04x}")));
    }
    match bits {
        1 => unpack_bytes(packed, elements, |byte| {
            let word = (0..8).fold(0, |word, i| word | u64::from(byte) << (7 * i));
            (word & 0x0101_0101_0101_0101).to_le_bytes()
        }),
        2 => unpack_bytes(packed, elements, |byte| {
            let word = u32::from(byte);
            ((word | word << 6 | word << 12 | word << 18) & 0x0303_0303).to_le_bytes()
        }),
        4 => unpack_bytes(packed, elements, |byte| [byte & 0xF, byte >> 4]),
        8 | 16 => elements.copy_from_slice(packed),
        ..8 => {
            for (group, bytes) in elements.chunks_mut(8).zip(packed.chunks(usize::from(bits))) {
                let word = word(bytes);
                for (i, element) in group.iter_mut().enumerate() {
                    *element = (word >> (i * usize::from(bits))) as u8 & low_mask(bits) as u8;
                }
            }
        }
        _ => {
            for (group, bytes) in elements.chunks_mut(16).zip(packed.chunks(usize::from(bits))) {
                let word = word(bytes);
                for (i, element) in group.chunks_exact_mut(2).enumerate() {
                    let value = (word >> (i * usize::from(bits))) as u16 & low_mask(bits);
                    element.copy_from_slice(&value.to_le_bytes());
                }
            }
        }
    }
    Ok(())
}

/// The largest element of a width.
const fn low_mask(bits: u8) -> u16 {
    u16::MAX >> (16 - bits)
}

/// Elements in so many bytes of memory.
fn count(bytes: usize, bits: u8) -> Result<usize> {
    match bits {
        1..=8 => Ok(bytes),
        9..=16 if bytes.is_multiple_of(2) => Ok(bytes / 2),
        9..=16 => Err(Error::shape(format!("elements of {bits} bits take 2 bytes each, got {bytes} bytes"))),
        _ => Err(Error::unsupported(format!("expected a width of 1 to 16 bits, got {bits}"))),
    }
}

/// Refuses elements that do not fit their width: packed they would spill into their neighbours.
fn check_range(elements: &[u8], bits: u8) -> Result<()> {
    if bits == 8 || bits == 16 {
        return Ok(());
    }
    let [low, high] = low_mask(bits).to_le_bytes();
    // Every byte that may not be above `low` (or `high`, for the odd bytes of a `u16`) shows in the bits of the union.
    let (even, odd) = if bits <= 8 {
        (elements.iter().fold(0, |all, byte| all | byte), 0)
    } else {
        elements.chunks_exact(2).fold((0, 0), |all, pair| (all.0 | pair[0], all.1 | pair[1]))
    };
    if even & !low == 0 && odd & !high == 0 {
        return Ok(());
    }
    let size = if bits <= 8 { 1 } else { 2 };
    let values =
        elements.chunks_exact(size).map(|element| element.iter().rev().fold(0u16, |v, byte| v << 8 | u16::from(*byte)));
    let (idx, value) = values.enumerate().find(|(_, value)| *value > low_mask(bits)).unwrap_or_default();
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!("element {idx}: expected at most {} ({bits} bits), got {value}", low_mask(bits)),
    ))
}

/// Up to eight elements side by side in one word.
fn gather(elements: impl Iterator<Item = u128>, bits: u8) -> u128 {
    elements.enumerate().fold(0, |word, (i, element)| word | element << (i * usize::from(bits)))
}

/// Up to sixteen bytes as one little-endian word.
fn word(bytes: &[u8]) -> u128 {
    let mut word = [0; 16];
    word[..bytes.len()].copy_from_slice(bytes);
    u128::from_le_bytes(word)
}

fn pack_groups(groups: impl Iterator<Item = (usize, u128)>, bits: u8, out: &mut Vec<u8>) {
    for (len, word) in groups {
        out.extend_from_slice(&word.to_le_bytes()[..packed_len(bits, len)]);
    }
}

/// Packs `N` elements into each byte. Whole words rather than one element at a time, because that is vectorised: 4 bits pack ten times
/// as fast (one 2-core x86-64 machine, 2026-11).
fn pack_bytes<const N: usize>(elements: &[u8], out: &mut Vec<u8>, byte: impl Fn([u8; N]) -> u8) {
    let (groups, rest) = elements.as_chunks();
    out.extend(groups.iter().map(|group| byte(*group)));
    if !rest.is_empty() {
        let mut group = [0; N];
        group[..rest.len()].copy_from_slice(rest);
        out.push(byte(group));
    }
}

/// Unpacks `N` elements from each byte.
fn unpack_bytes<const N: usize>(packed: &[u8], elements: &mut [u8], group: impl Fn(u8) -> [u8; N]) {
    let (groups, rest) = elements.as_chunks_mut();
    for (to, byte) in groups.iter_mut().zip(packed) {
        *to = group(*byte);
    }
    if let Some(byte) = packed.last() {
        rest.copy_from_slice(&group(*byte)[..rest.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(elements: &[u8], bits: u8) -> Vec<u8> {
        let mut out = vec![0xAA];
        pack(bits, elements, &mut out).unwrap();
        assert_eq!(out.remove(0), 0xAA, "pack appends");
        out
    }

    #[test]
    fn widths_pack_lsb_first() {
        assert_eq!(packed(&[1, 0, 1, 1], 1), [0b1101]);
        assert_eq!(packed(&[1, 2, 3, 0, 3], 2), [0b0011_1001, 0b11]);
        // 5, 2, 7 as 3 bits each: 101, 010, 111, from the right.
        assert_eq!(packed(&[5, 2, 7], 3), [0b1101_0101, 0b1]);
        assert_eq!(packed(&[0xF, 0x1, 0x8], 4), [0x1F, 0x08]);
        assert_eq!(packed(&[0x12, 0xFF], 8), [0x12, 0xFF]);
        // 0x1FF and 0x001 as 9 bits each.
        assert_eq!(packed(&[0xFF, 0x01, 0x01, 0x00], 9), [0xFF, 0b11, 0]);
        assert_eq!(packed(&[0xBC, 0x0A, 0x23, 0x01], 12), [0xBC, 0x3A, 0x12]);
        assert_eq!(packed(&[0x34, 0x12], 16), [0x34, 0x12]);
    }

    #[test]
    fn every_width_and_length_round_trips() {
        for bits in 1..=16 {
            let size = if bits <= 8 { 1 } else { 2 };
            for count in (0..=34).chain([255, 1000]) {
                let value = |i: usize| (i.wrapping_mul(40_503) >> 3) as u16 & low_mask(bits);
                let elements: Vec<u8> = (0..count).flat_map(|i| value(i).to_le_bytes()[..size].to_vec()).collect();
                let stored = packed(&elements, bits);
                assert_eq!(stored.len(), packed_len(bits, count), "{count} elements of {bits} bits");
                // Each element is where the format says, whichever path packed it.
                for i in 0..count {
                    let bit = |b: usize| u16::from(stored[b / 8] >> (b % 8) & 1);
                    let width = usize::from(bits);
                    let got = (0..width).fold(0, |v, b| v | bit(i * width + b) << b);
                    assert_eq!(got, value(i), "element {i} of {count}, {bits} bits");
                }
                let mut got = vec![0xFF; elements.len()];
                unpack(bits, &stored, &mut got).unwrap();
                assert_eq!(got, elements, "{count} elements of {bits} bits");
            }
        }
    }

    #[test]
    fn packed_len_is_the_ceiling_and_saturates() {
        for bits in 1..=16u8 {
            for count in 0..=100 {
                assert_eq!(packed_len(bits, count), (count * usize::from(bits)).div_ceil(8));
            }
        }
        assert_eq!(packed_len(16, usize::MAX), usize::MAX);
        assert_eq!(packed_len(1, usize::MAX), usize::MAX / 8 + 1);
    }

    #[test]
    fn pack_refuses_what_does_not_fit() {
        let message = |elements: &[u8], bits| {
            let mut out = vec![7];
            let error = pack(bits, elements, &mut out).unwrap_err();
            assert_eq!(out, [7], "out is as before");
            error.to_string()
        };
        assert_eq!(message(&[1, 4, 9], 2), "element 1: expected at most 3 (2 bits), got 4");
        assert_eq!(message(&[0, 0, 0xFF, 0x04], 10), "element 1: expected at most 1023 (10 bits), got 1279");
        assert_eq!(message(&[1, 2, 3], 9), "elements of 9 bits take 2 bytes each, got 3 bytes");
        assert_eq!(message(&[1], 0), "expected a width of 1 to 16 bits, got 0");
        assert_eq!(message(&[1, 1], 17), "expected a width of 1 to 16 bits, got 17");
    }

    #[test]
    fn unpack_rejects_wrong_lengths_and_padding() {
        let message = |packed: &[u8], bits, len| unpack(bits, packed, &mut vec![0; len]).unwrap_err().to_string();
        assert_eq!(message(&[1], 4, 3), "3 packed elements of 4 bits: expected 2 bytes, got 1");
        assert_eq!(message(&[1, 2, 3], 4, 3), "3 packed elements of 4 bits: expected 2 bytes, got 3");
        assert_eq!(message(&[1, 0x10], 4, 3), "expected zero bits behind the last element, got last byte 0x10");
        assert_eq!(message(&[1, 0x08], 9, 4), "2 packed elements of 9 bits: expected 3 bytes, got 2");
        assert_eq!(message(&[1, 0, 0x04], 9, 4), "expected zero bits behind the last element, got last byte 0x04");
        assert!(unpack(5, &[], &mut []).is_ok());
    }
}
