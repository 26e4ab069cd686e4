//! What both codecs share about the bytes of a lane.

use crate::math::entropy_bits;

/// First byte of a lane that follows as it is.
pub(crate) const STORED: u8 = 0;
/// First byte of a lane that is coded.
pub(crate) const CODED: u8 = 1;

/// Whether coding a plane saves more than a hundredth of it; counts it then.
pub(crate) fn pays(plane: &[u8], width: u8, counts: &mut [u32; 256]) -> bool {
    // A look at a part is enough to see that noise is noise.
    const PART: usize = 1 << 14;
    let worth = |counts: &[u32; 256], len: usize| entropy_bits(counts) + 700.0 < 0.99 * len as f32 * f32::from(width);
    let count = |counts: &mut [u32; 256], part: &[u8]| part.iter().for_each(|value| counts[usize::from(*value)] += 1);
    if plane.len() > 4 * PART {
        let mut some = [0; 256];
        let middle = plane.len() / 2;
        count(&mut some, &plane[middle..middle + PART]);
        if !worth(&some, PART) {
            return false;
        }
    }
    count(counts, plane);
    let pays = worth(counts, plane.len());
    if !pays {
        counts.fill(0);
    }
    pays
}

/// Appends LEB128 in its shortest form.
pub(crate) fn put_len(mut len: usize, out: &mut Vec<u8>) {
    while len > 0x7F {
        out.push(len as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
}

/// What [`put_len`] wrote, and what follows it; longer forms are refused.
pub(crate) fn take_len(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let mut len = 0;
    for (i, &byte) in bytes.iter().enumerate().take(5) {
        len |= usize::from(byte & 0x7F) << (7 * i);
        if byte < 0x80 {
            return (byte != 0 || i == 0).then_some((len, &bytes[i + 1..]));
        }
    }
    None
}
