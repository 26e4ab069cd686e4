//! The two small data sets on which the reference's bit-level and offline experiments are pinned.
//!
//! Both are F16, made by one generator: a 64-bit linear congruential generator whose upper 32 bits give one word per element. [`dataset_a`]
//! looks like KV data with random mantissas; [`dataset_b`] changes its structure every 16 tokens, so that every predictor wins somewhere.
//!
//! # Examples
//! ```
//! use gearbox_conformance::reference::{Entry, dataset_a, dataset_b};
//!
//! let bytes = |entries: &[Entry]| entries.iter().map(|entry| entry.key.len()).sum::<usize>();
//! assert_eq!((bytes(&dataset_a()), bytes(&dataset_b())), (19584, 10240));
//! ```

use gearbox_core::{Shape, Stage};

/// Tokens of one run and layer that were appended together: keys and values in F16.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name of the run.
    pub run: &'static str,
    /// Layer.
    pub layer: u32,
    /// Phase of the request.
    pub stage: Stage,
    /// Position of the first token.
    pub start: u64,
    /// Extent of keys and of values.
    pub shape: Shape,
    /// Keys, little-endian.
    pub key: Vec<u8>,
    /// Values, little-endian.
    pub value: Vec<u8>,
}

/// Dataset A: run `runA`, layers 0 and 1, 150 tokens of prompt and three decoded ones, 2 heads of 16 channels.
///
/// Signs and mantissas are random; the exponents of keys depend on the channel, those of values do not.
pub fn dataset_a() -> Vec<Entry> {
    let shape = Shape::new(0, 2, 16);
    let seqs = [(0, 150), (150, 1), (151, 1), (152, 1)];
    let places = (0..2).flat_map(|layer| seqs.map(|(start, seq)| (layer, start, seq)));
    places
        .zip((1..).step_by(2))
        .map(|((layer, start, seq), seed)| {
            let shape = shape.with_seq(seq);
            let float = |w: u32, exponent: u32| (w >> 31) << 15 | exponent << 10 | (w >> 8 & 0x3FF);
            Entry {
                run: "runA",
                layer,
                stage: if seq > 1 { Stage::Prefill } else { Stage::Decode },
                start,
                shape,
                key: fill(shape, seed, |_, c, _, w| float(w, 8 + 7 * c % 16 / 2 + (w & 3).count_ones())),
                value: fill(shape, seed + 1, |_, _, _, w| float(w, 10 + (w & 255).count_ones())),
            }
        })
        .collect()
}

/// Dataset B: run `runB`, layers 0 and 1, 100 tokens of prompt and one decode entry of 60, 2 heads of 8 channels.
///
/// Every 16 tokens another structure: noise below a fixed sign and exponent, ramps, repeats, pairs of channels, and curves.
pub fn dataset_b() -> Vec<Entry> {
    let places = [(0, 0, 100, 101), (0, 100, 60, 121), (1, 0, 100, 103), (1, 100, 60, 123)];
    places
        .map(|(layer, start, seq, seed)| {
            let shape = Shape::new(seq, 2, 8);
            let first = start as u32;
            Entry {
                run: "runB",
                layer,
                stage: if start == 0 { Stage::Prefill } else { Stage::Decode },
                start,
                shape,
                key: fill(shape, seed, |t, c, before, w| key_b(first + t, c, before, w)),
                value: fill(shape, seed + 1, |t, c, _, w| value_b(first + t, c, w)),
            }
        })
        .into()
}

/// A key of dataset B at token `t` and channel `c`, which follows the element `before`.
fn key_b(t: u32, c: u32, before: u32, w: u32) -> u32 {
    let d = c % 8;
    match t / 16 % 5 {
        0 => 0x2C00 | (w & 0x3FF),
        1 => 0x2000 + 771 * (5 * c % 16) + 129 * t,
        2 => (257 * (37 * c % 256)) ^ (w % 2 * 0x4040),
        3 if d.is_multiple_of(2) => w >> 3,
        3 => before + 0x0305,
        _ => 1031 * (c / 2) + 17 * t * t + 259 * t * (d % 2),
    }
}

/// A value of dataset B at token `t` and channel `c`.
fn value_b(t: u32, c: u32, w: u32) -> u32 {
    match t / 16 % 3 {
        0 => 0x3400 | (w & 0x3FF),
        1 => 0x3000 + 77 * t + 257 * c,
        _ => (257 * (91 * c % 256)) ^ (w % 2 * 0x8080),
    }
}

/// A tensor whose elements are the lower 16 bits of `element(token, channel of all heads, element before, word)`.
fn fill(shape: Shape, seed: u64, element: impl Fn(u32, u32, u32, u32) -> u32) -> Vec<u8> {
    let (mut state, mut before) = (seed, 0);
    let places = (0..shape.seq as u32).flat_map(|token| (0..shape.row() as u32).map(move |channel| (token, channel)));
    let elements = places.flat_map(|(token, channel)| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        before = element(token, channel, before, (state >> 32) as u32);
        (before as u16).to_le_bytes()
    });
    elements.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datasets_begin_with_the_bytes_of_the_reference() {
        let (a, b) = (dataset_a(), dataset_b());
        assert_eq!(a[0].key[..8], [0x6F, 0x23, 0x86, 0xB4, 0xE1, 0xC2, 0x55, 0x2F]);
        assert_eq!(a[0].value[..8], [0x63, 0xBD, 0x1F, 0xB8, 0x4B, 0xAF, 0x90, 0x34]);
        let places = |entries: &[Entry]| -> Vec<_> {
            entries.iter().map(|entry| (entry.layer, entry.start, entry.key.len(), entry.value.len())).collect()
        };
        let four = |layer| [(layer, 0, 9600, 9600), (layer, 150, 64, 64), (layer, 151, 64, 64), (layer, 152, 64, 64)];
        assert_eq!(places(&a), [four(0), four(1)].concat());
        let two = |layer| [(layer, 0, 3200, 3200), (layer, 100, 1920, 1920)];
        assert_eq!(places(&b), [two(0), two(1)].concat());
    }
}
