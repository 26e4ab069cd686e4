//! What both codecs share about the bytes of a lane.

use crate::math::entropy_bits;

/// First byte of a lane that follows as it is.
pub(crate) const STORED: u8 = 0;
/// First byte of a lane that is coded.
pub(crate) const CODED: u8 = 1;

/// Whether coding a plane saves more than a hundredth of it; counts it then.
pub(crate) fn pays(plane: &[u8], width: u8, counts: &mut [u32; 256]) -> bool {
    if looks_random(plane, width) {
        return false;
    }
    add(counts, plane);
    let pays = saves(counts, width);
    if !pays {
        counts.fill(0);
    }
    pays
}

/// Whether coding symbols that occur so often saves more than a hundredth of them.
pub(crate) fn saves(counts: &[u32; 256], width: u8) -> bool {
    let len: u32 = counts.iter().sum();
    entropy_bits(counts) + 700.0 < 0.99 * len as f32 * f32::from(width)
}

/// Whether a long plane is noise, as far as parts of it show.
pub(crate) fn looks_random(plane: &[u8], width: u8) -> bool {
    /// Noise in fewer bytes looks as if it had less entropy, by up to `255 / (2 ln 2 * 4096)` of a bit for each.
    const LOOK: usize = 1 << 12;
    const PARTS: usize = 8;
    if plane.len() < 3 * LOOK {
        return false;
    }
    let mut some = [0; 256];
    for part in plane.chunks(plane.len() / PARTS) {
        add(&mut some, &part[..part.len().min(LOOK / PARTS)]);
    }
    let len: u32 = some.iter().sum();
    entropy_bits(&some) >= 0.99 * len as f32 * f32::from(width)
}

/// Counts symbols.
pub(crate) fn add(counts: &mut [u32; 256], symbols: &[u8]) {
    for symbol in symbols {
        counts[usize::from(*symbol)] += 1;
    }
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
