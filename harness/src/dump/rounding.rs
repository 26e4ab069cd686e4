//! Rounds tensors to F16 and keeps account of what that loses.

use std::fmt;

use gearbox_core::DType;
use half::{bf16, f16};
use serde::Serialize;

/// What rounding to F16 did to the values.
///
/// Errors are taken over values that are finite before and after; relative ones over those that are not zero before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rounding {
    /// Values that were rounded.
    pub values: u64,
    /// Finite values that became infinite.
    pub overflow: u64,
    /// Values that were infinite before.
    pub infinite: u64,
    /// Values that were NaN before, and still are.
    pub nan: u64,
    /// Values other than zero that became zero.
    pub flushed: u64,
    /// Values that became subnormal: their relative error is larger.
    pub subnormal: u64,
    /// Largest absolute error.
    pub max_abs: f64,
    /// Mean absolute error.
    pub mean_abs: f64,
    /// Largest relative error.
    pub max_rel: f64,
    /// Mean relative error.
    pub mean_rel: f64,
}

impl fmt::Display for Rounding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "rounded {} values: {} overflowed, {} infinite before, {} NaN, {} flushed to zero, {} became subnormal, \
             absolute error max {:.3e} mean {:.3e}, relative error max {:.3e} mean {:.3e}",
            self.values,
            self.overflow,
            self.infinite,
            self.nan,
            self.flushed,
            self.subnormal,
            self.max_abs,
            self.mean_abs,
            self.max_rel,
            self.mean_rel
        )
    }
}

/// Running sums of a [`Rounding`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    counts: Rounding,
    finite: u64,
    sum_abs: f64,
    not_zero: u64,
    sum_rel: f64,
}

impl Tally {
    pub fn overflow(&self) -> u64 {
        self.counts.overflow
    }

    /// Adds the sums of another part. The order of parts decides the last digits, so keep it fixed.
    pub fn merge(&mut self, other: &Self) {
        let (counts, more) = (&mut self.counts, &other.counts);
        counts.values += more.values;
        counts.overflow += more.overflow;
        counts.infinite += more.infinite;
        counts.nan += more.nan;
        counts.flushed += more.flushed;
        counts.subnormal += more.subnormal;
        counts.max_abs = counts.max_abs.max(more.max_abs);
        counts.max_rel = counts.max_rel.max(more.max_rel);
        self.finite += other.finite;
        self.sum_abs += other.sum_abs;
        self.not_zero += other.not_zero;
        self.sum_rel += other.sum_rel;
    }

    pub fn rounding(&self) -> Rounding {
        let mean = |sum: f64, count: u64| if count == 0 { 0.0 } else { sum / count as f64 };
        Rounding {
            mean_abs: mean(self.sum_abs, self.finite),
            mean_rel: mean(self.sum_rel, self.not_zero),
            ..self.counts
        }
    }

    fn add(&mut self, before: f32, after: f16) {
        let counts = &mut self.counts;
        counts.values += 1;
        if before.is_nan() {
            counts.nan += 1;
        } else if before.is_infinite() {
            counts.infinite += 1;
        } else if after.is_infinite() {
            counts.overflow += 1;
        } else {
            let (exact, rounded) = (f64::from(before), f64::from(after));
            let error = (exact - rounded).abs();
            counts.max_abs = counts.max_abs.max(error);
            self.finite += 1;
            self.sum_abs += error;
            if before != 0.0 {
                let relative = error / exact.abs();
                counts.flushed += u64::from(rounded == 0.0);
                counts.subnormal += u64::from(rounded != 0.0 && !after.is_normal());
                counts.max_rel = counts.max_rel.max(relative);
                self.not_zero += 1;
                self.sum_rel += relative;
            }
        }
    }
}

/// Rounds to nearest, ties to even. NaN keeps its sign and the top ten bits of its payload, of which 0 becomes 1.
pub(crate) fn round(value: f32) -> f16 {
    if value.is_nan() {
        // `half` sets the quiet bit as well; the reference does not.
        let bits = value.to_bits();
        let payload = ((bits >> 13) & 0x3ff).max(1);
        return f16::from_bits((((bits >> 16) & 0x8000) | 0x7c00 | payload) as u16);
    }
    f16::from_f32(value)
}

/// The elements of an F32 or BF16 tensor as F16; those of an F16 tensor as they are.
pub(super) fn to_f16(dtype: DType, bytes: &[u8], tally: &mut Tally) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() / dtype.size() * 2);
    let mut put = |value: f32| {
        let rounded = round(value);
        tally.add(value, rounded);
        out.extend_from_slice(&rounded.to_le_bytes());
    };
    match dtype {
        DType::F32 => bytes.as_chunks::<4>().0.iter().for_each(|word| put(f32::from_le_bytes(*word))),
        DType::Bf16 => bytes.as_chunks::<2>().0.iter().for_each(|word| {
            // Widened by hand: a conversion would set the quiet bit of NaN.
            put(f32::from_bits(u32::from(bf16::from_le_bytes(*word).to_bits()) << 16));
        }),
        _ => out.extend_from_slice(bytes),
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(value: f32) -> u16 {
        round(value).to_bits()
    }

    #[test]
    fn rounding_matches_the_reference_vectors() {
        let tiny = 2f32.powi(-25);
        for (value, expected) in [
            (65504.0, 0x7bff),
            (65519.996, 0x7bff),
            (65520.0, 0x7c00),
            (-65520.0, 0xfc00),
            (tiny, 0x0000),
            (f32::from_bits(tiny.to_bits() + 1), 0x0001),
            (-tiny, 0x8000),
            (1.0 + 2f32.powi(-11), 0x3c00),
            (1.0 + 3.0 * 2f32.powi(-11), 0x3c02),
            (f32::from_bits(0x7f80_0001), 0x7c01),
            (f32::from_bits(0xffc1_2345), 0xfe09),
            (f32::INFINITY, 0x7c00),
            (-0.0, 0x8000),
        ] {
            assert_eq!(bits(value), expected, "{value:e}");
        }
    }

    #[test]
    fn every_f16_survives_widening_and_rounding() {
        for word in 0..=u16::MAX {
            let half = f16::from_bits(word);
            // NaN by hand: the payload moves up by the difference of the mantissas.
            let wide = if half.is_nan() {
                f32::from_bits(u32::from(word & 0x8000) << 16 | 0x7f80_0000 | u32::from(word & 0x3ff) << 13)
            } else {
                half.to_f32()
            };
            assert_eq!(bits(wide), word);
        }
    }

    #[test]
    fn tally_counts_each_kind_once() {
        let values =
            [1.0_f32, 0.0, 1.0 + 2f32.powi(-11), 1e6, -1e6, f32::INFINITY, f32::NAN, 1e-10, 2f32.powi(-24), -3e-5];
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut tally = Tally::default();
        assert_eq!(to_f16(DType::F32, &bytes, &mut tally).len(), 20);
        let rounding = tally.rounding();
        assert_eq!((rounding.values, rounding.overflow, rounding.infinite, rounding.nan), (10, 2, 1, 1));
        assert_eq!((rounding.flushed, rounding.subnormal), (1, 2));
        assert_eq!((rounding.max_abs, rounding.max_rel), (2f64.powi(-11), 1.0));
        assert_eq!(tally.overflow(), 2);

        let mut halves = Tally::default();
        for half in [&bytes[..16], &bytes[16..]] {
            let mut part = Tally::default();
            to_f16(DType::F32, half, &mut part);
            halves.merge(&part);
        }
        let merged = halves.rounding();
        assert_eq!(Rounding { mean_abs: rounding.mean_abs, mean_rel: rounding.mean_rel, ..merged }, rounding);
    }

    #[test]
    fn means_are_over_finite_values_only() {
        let bytes: Vec<u8> = [1.0 + 2f32.powi(-11), 2.0, f32::NAN, 1e9].iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut tally = Tally::default();
        to_f16(DType::F32, &bytes, &mut tally);
        let rounding = tally.rounding();
        assert_eq!(rounding.mean_abs.to_bits(), 2f64.powi(-12).to_bits());
        let mean_rel = 2f64.powi(-11) / (1.0 + 2f64.powi(-11)) / 2.0;
        assert_eq!(rounding.mean_rel.to_bits(), mean_rel.to_bits());
        assert_eq!(Tally::default().rounding(), Rounding::default());
    }

    #[test]
    fn bf16_is_widened_and_f16_is_copied() {
        let mut tally = Tally::default();
        // 1.0, the largest finite BF16, a signalling NaN.
        let wide = to_f16(DType::Bf16, &[0x80, 0x3f, 0x7f, 0x7f, 0x81, 0x7f], &mut tally);
        assert_eq!(wide, [0x00, 0x3c, 0x00, 0x7c, 0x08, 0x7c]);
        assert_eq!((tally.counts.values, tally.counts.overflow, tally.counts.nan), (3, 1, 1));
        let mut untouched = Tally::default();
        assert_eq!(to_f16(DType::F16, &[1, 2, 3, 4], &mut untouched), [1, 2, 3, 4]);
        assert_eq!(untouched.counts.values, 0);
    }
}
