//! Bitshuffle: the bits of many bytes, ordered by their place in the byte.
//!
//! First the lowest bit of every byte in order, then the next one of every byte, up to the highest. The bits are packed without gaps, the
//! first into bit 0 of the first byte, so the eight planes begin within a byte where the number of bytes is no multiple of eight.

/// Shuffles `bytes` into `out`, which is as long.
///
/// # Examples
/// ```
/// use gearbox_adaptive_v22::bitshuffle::{shuffle, unshuffle};
///
/// let mut bits = [0; 3];
/// shuffle(&[1, 2, 3], &mut bits);
/// assert_eq!(bits, [0b0011_0101, 0, 0]);
/// let mut bytes = [0; 3];
/// unshuffle(&bits, &mut bytes);
/// assert_eq!(bytes, [1, 2, 3]);
/// ```
pub fn shuffle(bytes: &[u8], out: &mut [u8]) {
    let (groups, rest) = bytes.as_chunks::<8>();
    if rest.is_empty() {
        return shuffle_groups(groups, out);
    }
    out.fill(0);
    for (group, eight) in bytes.chunks(8).enumerate() {
        let mut padded = [0; 8];
        padded[..eight.len()].copy_from_slice(eight);
        let planes = transpose_bits(u64::from_le_bytes(padded)).to_le_bytes();
        for (plane, bits) in planes.into_iter().enumerate() {
            let start = plane * bytes.len() + 8 * group;
            let [low, high] = (u16::from(bits) << (start % 8)).to_le_bytes();
            out[start / 8] |= low;
            if high > 0 {
                out[start / 8 + 1] |= high;
            }
        }
    }
}

/// Undoes [`shuffle`].
pub fn unshuffle(bits: &[u8], out: &mut [u8]) {
    let len = out.len();
    let (groups, rest) = out.as_chunks_mut::<8>();
    if rest.is_empty() {
        return unshuffle_groups(bits, groups);
    }
    for (group, eight) in out.chunks_mut(8).enumerate() {
        let planes = std::array::from_fn(|plane| {
            let start = plane * len + 8 * group;
            let next = bits.get(start / 8 + 1).copied().unwrap_or_default();
            (u16::from_le_bytes([bits[start / 8], next]) >> (start % 8)) as u8
        });
        let bytes = transpose_bits(u64::from_le_bytes(planes)).to_le_bytes();
        eight.copy_from_slice(&bytes[..eight.len()]);
    }
}

/// Eight bytes as a square of bits, transposed: bit `i` of byte `j` becomes bit `j` of byte `i`. It undoes itself.
fn transpose_bits(mut word: u64) -> u64 {
    // Squares of 1, 2 and 4 bits off the diagonal change places.
    for (distance, mask) in [(7, 0x00AA_00AA_00AA_00AA), (14, 0x0000_CCCC_0000_CCCC), (28, 0x0000_0000_F0F0_F0F0)] {
        let swapped = (word ^ word >> distance) & mask;
        word ^= swapped ^ swapped << distance;
    }
    word
}

/// Eight words as a square of bytes, transposed: byte `i` of word `j` becomes byte `j` of word `i`. It undoes itself.
fn transpose_bytes(words: &mut [u64; 8]) {
    for (distance, bits, mask) in
        [(1, 8, 0x00FF_00FF_00FF_00FF), (2, 16, 0x0000_FFFF_0000_FFFF), (4, 32, 0x0000_0000_FFFF_FFFF_u64)]
    {
        for first in (0..8).filter(|word| word & distance == 0) {
            let second = first + distance;
            let swapped = (words[first] >> bits ^ words[second]) & mask;
            words[first] ^= swapped << bits;
            words[second] ^= swapped;
        }
    }
}

/// Shuffles whole groups of eight bytes, eight groups at once: then every plane gets whole words.
fn shuffle_groups(groups: &[[u8; 8]], out: &mut [u8]) {
    let plane_len = groups.len();
    for (square, groups) in groups.chunks(8).enumerate() {
        let mut words = [0; 8];
        for (word, group) in words.iter_mut().zip(groups) {
            *word = transpose_bits(u64::from_le_bytes(*group));
        }
        transpose_bytes(&mut words);
        for (plane, word) in words.into_iter().enumerate() {
            let to = &mut out[plane * plane_len + 8 * square..];
            match to.first_chunk_mut::<8>() {
                Some(to) if groups.len() == 8 => *to = word.to_le_bytes(),
                _ => to[..groups.len()].copy_from_slice(&word.to_le_bytes()[..groups.len()]),
            }
        }
    }
}

/// Undoes [`shuffle_groups`].
fn unshuffle_groups(bits: &[u8], groups: &mut [[u8; 8]]) {
    let plane_len = groups.len();
    for (square, groups) in groups.chunks_mut(8).enumerate() {
        let mut words = std::array::from_fn(|plane| {
            let from = &bits[plane * plane_len + 8 * square..];
            if let Some(word) = from.first_chunk::<8>() {
                return u64::from_le_bytes(*word);
            }
            let mut last = [0; 8];
            last[..from.len()].copy_from_slice(from);
            u64::from_le_bytes(last)
        });
        transpose_bytes(&mut words);
        for (word, group) in words.into_iter().zip(groups) {
            *group = transpose_bits(word).to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shuffled(bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![0xEE; bytes.len()];
        shuffle(bytes, &mut out);
        out
    }

    #[test]
    fn vectors_of_the_reference() {
        assert_eq!(shuffled(&[1, 2, 3]), [0x35, 0, 0]);
        assert_eq!(shuffled(&[0, 1, 2, 3, 4, 5, 6, 7]), [0xAA, 0xCC, 0xF0, 0, 0, 0, 0, 0]);
        let nine = [0x80, 0x01, 0xFF, 0x00, 0x0F, 0xF0, 0x55, 0xAA, 0x12];
        assert_eq!(shuffled(&nine), [0x56, 0x28, 0x53, 0xA1, 0x44, 0x96, 0x14, 0x99, 0x52]);
        assert!(shuffled(&[]).is_empty());
    }

    #[test]
    fn every_length_agrees_with_the_definition_and_comes_back() {
        for len in (0..150).chain([1000, 1024]) {
            let bytes: Vec<u8> = (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
            let mut expected = vec![0; len];
            for plane in 0..8 {
                for (i, byte) in bytes.iter().enumerate() {
                    let place = plane * len + i;
                    expected[place / 8] |= (byte >> plane & 1) << (place % 8);
                }
            }
            let bits = shuffled(&bytes);
            assert_eq!(bits, expected, "{len} bytes");
            let mut back = vec![0xEE; len];
            unshuffle(&bits, &mut back);
            assert_eq!(back, bytes, "{len} bytes");
        }
    }
}
