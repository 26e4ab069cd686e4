//! Tensor elements as numbers to compute with, and parameters rounded to the type in which they are stored.
//!
//! Everything here is `+`, `-`, `*`, `/` and bit operations, so that every machine, with and without vectors, finds the same bits.

#![expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]

use std::ops::{Add, Mul, Sub};

use gearbox_core::DType;
use half::{bf16, f16};

/// Numbers that elements are computed with: wide enough that no difference of two elements overflows.
pub(crate) trait Real:
    Copy + PartialOrd + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Send + 'static
{
    const ZERO: Self;
    const NAN: Self;
    const INFINITY: Self;
    fn of(value: f64) -> Self;
    fn wide(self) -> f64;
    /// The nearest integer, ties to even, of a number between -2^16 and 2^16, modulo 2^16.
    fn nearest(self) -> u16;
    fn integer(value: i32) -> Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const NAN: Self = Self::NAN;
    const INFINITY: Self = Self::INFINITY;

    fn of(value: f64) -> Self {
        value as Self
    }

    fn wide(self) -> f64 {
        self.into()
    }

    #[inline(always)]
    fn nearest(self) -> u16 {
        // 1.5 * 2^23: the sum has no place for a fraction, and its last bits are the integer.
        (self + 12_582_912.0).to_bits() as u16
    }

    #[inline(always)]
    fn integer(value: i32) -> Self {
        value as Self
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const NAN: Self = Self::NAN;
    const INFINITY: Self = Self::INFINITY;

    fn of(value: f64) -> Self {
        value
    }

    fn wide(self) -> f64 {
        self
    }

    #[inline(always)]
    fn nearest(self) -> u16 {
        (self + 6_755_399_441_055_744.0).to_bits() as u16
    }

    #[inline(always)]
    fn integer(value: i32) -> Self {
        value.into()
    }
}

/// An element type of tensors.
pub(crate) trait Format: 'static {
    type Bytes: Copy + Send + Sync;
    type Real: Real;
    const DTYPE: DType;

    fn elements(bytes: &[u8]) -> &[Self::Bytes];
    fn elements_mut(bytes: &mut [u8]) -> &mut [Self::Bytes];
    /// The value, if it is finite, and NaN otherwise.
    fn unpack(bytes: Self::Bytes) -> Self::Real;
    /// The value, infinities included.
    fn value(bytes: Self::Bytes) -> Self::Real;
    /// The nearest finite element, ties to even.
    fn pack(value: Self::Real) -> Self::Bytes;
}

/// IEEE 754 binary16, computed with in F32: a difference of two of them is below 2^17 and at least 2^-24.
pub(crate) struct F16;
/// bfloat16, computed with in F64, as differences overflow F32.
pub(crate) struct Bf16;
/// IEEE 754 binary32, computed with in F64.
pub(crate) struct F32;

impl Format for F16 {
    type Bytes = [u8; 2];
    type Real = f32;
    const DTYPE: DType = DType::F16;

    #[inline(always)]
    fn elements(bytes: &[u8]) -> &[[u8; 2]] {
        bytes.as_chunks().0
    }

    #[inline(always)]
    fn elements_mut(bytes: &mut [u8]) -> &mut [[u8; 2]] {
        bytes.as_chunks_mut().0
    }

    // By integers rather than by the converter of `half`, which is a call for every eight elements that nothing is inlined into.
    #[inline(always)]
    fn unpack(bytes: [u8; 2]) -> f32 {
        let bits = u32::from(u16::from_le_bytes(bytes));
        let magnitude = bits & 0x7FFF;
        let normal = (magnitude << 13) + (112 << 23);
        let subnormal = (magnitude as f32 * (1.0 / 16_777_216.0)).to_bits();
        let finite = if magnitude < 0x400 { subnormal } else { normal };
        let value = if magnitude < 0x7C00 { finite } else { 0x7FC0_0000 };
        f32::from_bits(value | (bits & 0x8000) << 16)
    }

    fn value(bytes: [u8; 2]) -> f32 {
        f16::from_le_bytes(bytes).to_f32()
    }

    #[inline(always)]
    fn pack(value: f32) -> [u8; 2] {
        let sign = value.to_bits() >> 16 & 0x8000;
        let magnitude = value.abs();
        let magnitude = if magnitude < 65504.0 { magnitude } else { 65504.0 };
        let bits = magnitude.to_bits();
        let normal = (bits.wrapping_add(0xFFF + (bits >> 13 & 1))).wrapping_sub(112 << 23) >> 13;
        // A sum in [0.5, 1) has steps of 2^-24, as subnormals have.
        let subnormal = (magnitude + 0.5).to_bits().wrapping_sub(0x3F00_0000);
        let bits = if magnitude < 1.0 / 16384.0 { subnormal } else { normal };
        ((bits | sign) as u16).to_le_bytes()
    }
}

impl Format for Bf16 {
    type Bytes = [u8; 2];
    type Real = f64;
    const DTYPE: DType = DType::Bf16;

    #[inline(always)]
    fn elements(bytes: &[u8]) -> &[[u8; 2]] {
        bytes.as_chunks().0
    }

    #[inline(always)]
    fn elements_mut(bytes: &mut [u8]) -> &mut [[u8; 2]] {
        bytes.as_chunks_mut().0
    }

    #[inline(always)]
    fn unpack(bytes: [u8; 2]) -> f64 {
        finite(f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16))
    }

    fn value(bytes: [u8; 2]) -> f64 {
        bf16::from_le_bytes(bytes).to_f64()
    }

    #[inline(always)]
    fn pack(value: f64) -> [u8; 2] {
        // 0x7F7F, the largest finite one.
        const MAX: f64 = f32::from_bits(0x7F7F_0000) as f64;
        let bits = odd(clamped(value, MAX)).to_bits();
        (((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16).to_le_bytes()
    }
}

impl Format for F32 {
    type Bytes = [u8; 4];
    type Real = f64;
    const DTYPE: DType = DType::F32;

    #[inline(always)]
    fn elements(bytes: &[u8]) -> &[[u8; 4]] {
        bytes.as_chunks().0
    }

    #[inline(always)]
    fn elements_mut(bytes: &mut [u8]) -> &mut [[u8; 4]] {
        bytes.as_chunks_mut().0
    }

    #[inline(always)]
    fn unpack(bytes: [u8; 4]) -> f64 {
        finite(f32::from_le_bytes(bytes))
    }

    fn value(bytes: [u8; 4]) -> f64 {
        f32::from_le_bytes(bytes).into()
    }

    #[inline(always)]
    fn pack(value: f64) -> [u8; 4] {
        (clamped(value, f32::MAX.into()) as f32).to_le_bytes()
    }
}

#[inline(always)]
fn finite(value: f32) -> f64 {
    if value.abs() <= f32::MAX { value.into() } else { f64::NAN }
}

/// The value between `-max` and `max`; `max` for NaN.
#[inline(always)]
fn clamped(value: f64, max: f64) -> f64 {
    let value = if value < max { value } else { max };
    if value > -max { value } else { -max }
}

/// Rounds to odd: what is rounded again to fewer bits is then as if rounded once.
#[inline(always)]
fn odd(value: f64) -> f32 {
    let near = value as f32;
    let back = f64::from(near);
    let toward_zero = near.to_bits() - u32::from(back.abs() > value.abs());
    f32::from_bits(if back.to_bits() == value.to_bits() { near.to_bits() } else { toward_zero | 1 })
}

/// Rounds a number of any sign to an element of a tensor type, ties to even, and gives its value.
pub(crate) fn element(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F16 => {
            // Through F32 rounded to odd, so that it is rounded once.
            let [low, high] = F16::pack(odd(clamped(value, 65504.0)));
            f16::from_le_bytes([low, high]).to_f64()
        }
        DType::Bf16 => bf16::from_le_bytes(Bf16::pack(value)).to_f64(),
        _ => f32::from_le_bytes(F32::pack(value)).into(),
    }
}

/// The least number that is not below a positive one, among those of a stored type; infinity if there is none.
pub(crate) fn round_up(dtype: DType, value: f64) -> f32 {
    let near = value as f32;
    let single = if f64::from(near) < value { near.next_up() } else { near };
    match dtype {
        DType::F16 => half_up(single),
        DType::Bf16 => f32::from_bits((single.to_bits() + 0xFFFF) & 0xFFFF_0000),
        _ => single,
    }
}

/// The greatest number that is not above this one, among those of a stored type; infinite if there is none.
pub(crate) fn round_down(dtype: DType, value: f64) -> f32 {
    if value < 0.0 {
        return -round_up(dtype, -value);
    }
    let near = value as f32;
    let single = if f64::from(near) > value { near.next_down() } else { near };
    match dtype {
        DType::F16 => half_down(single),
        DType::Bf16 => f32::from_bits(single.to_bits() & 0xFFFF_0000),
        _ => single,
    }
}

/// Steps of F16 below its smallest normal number.
const STEP: f32 = 1.0 / 16_777_216.0;

#[expect(clippy::cast_sign_loss, reason = "magnitudes have no sign")]
fn half_up(value: f32) -> f32 {
    let up = if value < 1.0 / 16384.0 {
        // At most 1024, so the conversions are exact.
        let steps = value * 16_777_216.0;
        let whole = steps as u32;
        (whole + u32::from((whole as f32) < steps)) as f32 * STEP
    } else {
        f32::from_bits((value.to_bits() + 0x1FFF) & !0x1FFF)
    };
    if up <= 65504.0 { up } else { f32::INFINITY }
}

#[expect(clippy::cast_sign_loss, reason = "magnitudes have no sign")]
fn half_down(value: f32) -> f32 {
    if value < 1.0 / 16384.0 {
        return (value * 16_777_216.0) as u32 as f32 * STEP;
    }
    if value < 65504.0 { f32::from_bits(value.to_bits() & !0x1FFF) } else { 65504.0 }
}

/// Appends a number that is one of a type, in its stored form.
pub(crate) fn put(dtype: DType, value: f32, out: &mut Vec<u8>) {
    match dtype {
        DType::F16 => out.extend(F16::pack(value)),
        DType::Bf16 => out.extend(((value.to_bits() >> 16) as u16).to_le_bytes()),
        _ => out.extend(value.to_le_bytes()),
    }
}

/// Appends the numbers of a lane, which may be anything, to `out`.
pub(crate) fn take<R: Real>(dtype: DType, bytes: &[u8], out: &mut Vec<R>) {
    match dtype {
        DType::F16 => out.extend(F16::elements(bytes).iter().map(|bytes| R::of(F16::unpack(*bytes).wide()))),
        DType::Bf16 => out.extend(Bf16::elements(bytes).iter().map(|bytes| R::of(Bf16::unpack(*bytes)))),
        _ => out.extend(F32::elements(bytes).iter().map(|bytes| R::of(F32::unpack(*bytes)))),
    }
}

/// Logarithm to the base 2 of a positive number, to about 9 digits: the library's differs between systems.
pub(crate) fn log2(value: f64) -> f64 {
    let bits = value.to_bits();
    let exponent = (bits >> 52) as f64 - 1023.0;
    let mantissa = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    // ln(m) = 2 artanh(y).
    let y = (mantissa - 1.0) / (mantissa + 1.0);
    let square = y * y;
    let series = (0..9).rev().fold(0.0, |sum, n| sum * square + 1.0 / f64::from(2 * n + 1));
    exponent + 2.0 * y * series * std::f64::consts::LOG2_E
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "roundings are exact")]
mod tests {
    use super::*;

    #[test]
    fn every_half_converts_as_the_library_does() {
        for bits in 0..=u16::MAX {
            let library = f16::from_bits(bits);
            let got = F16::unpack(bits.to_le_bytes());
            if library.is_finite() {
                assert_eq!(got.to_bits(), library.to_f32().to_bits(), "{bits:#x}");
                assert_eq!(F16::pack(got), bits.to_le_bytes(), "{bits:#x}");
            } else {
                assert!(got.is_nan(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn singles_round_to_the_nearest_half_and_saturate() {
        let mut bits = 0u32;
        for _ in 0..2_000_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(bits);
            let expected = f16::from_f32(value.clamp(-65504.0, 65504.0));
            if !value.is_nan() {
                assert_eq!(F16::pack(value), expected.to_le_bytes(), "{value:e}");
            }
        }
        for value in [0.0, -0.0, 6e-8, 2.9e-8, 3e-8, 6.1e-5, 6.104e-5, 65519.0, 65520.0, 1e30, f32::INFINITY] {
            assert_eq!(F16::pack(value), f16::from_f32(value.min(65504.0)).to_le_bytes(), "{value:e}");
        }
    }

    #[test]
    fn doubles_round_once_to_bf16() {
        // Halfway between two of them but for a bit that F32 would lose.
        let tie = 1.0 + 2f64.powi(-8);
        for (value, expected) in [
            (tie, 0x3F80),
            (tie + 2f64.powi(-40), 0x3F81),
            (tie + 2f64.powi(-7), 0x3F82),
            (-tie - 2f64.powi(-40), 0xBF81),
            (1e300, 0x7F7F),
            (f64::NAN, 0x7F7F),
            (2f64.powi(-133), 0x0001),
            (1e-300, 0x0000),
        ] {
            assert_eq!(u16::from_le_bytes(Bf16::pack(value)), expected, "{value:e}");
        }
        for bits in 0..=u16::MAX {
            let value = Bf16::unpack(bits.to_le_bytes());
            if !value.is_nan() {
                assert_eq!(Bf16::pack(value), bits.to_le_bytes(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn parameters_round_to_the_neighbour_on_the_asked_side() {
        let mut state = 1u64;
        for _ in 0..300_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let exponent = (state >> 40 & 0x3F) as i32 - 40;
            let value = (1.0 + (state >> 12 & 0xFFFF_FFFF) as f64 / 4_294_967_296.0) * 2f64.powi(exponent);
            for dtype in DType::ALL {
                let (up, down) = (f64::from(round_up(dtype, value)), f64::from(round_down(dtype, value)));
                assert!(down <= value && value <= up, "{dtype} {value:e}: {down:e}, {up:e}");
                assert_eq!(f64::from(round_down(dtype, -value)), -up);
                if up.is_finite() {
                    // Neighbours: nothing of the type lies between them.
                    let middle = element(dtype, f64::midpoint(down, up));
                    assert!(middle == down || middle == up, "{dtype} {value:e}: {down:e}, {up:e}");
                    let mut stored = Vec::new();
                    put(dtype, up as f32, &mut stored);
                    let mut back = Vec::<f64>::new();
                    take(dtype, &stored, &mut back);
                    assert_eq!(back, [up], "{dtype} {value:e}");
                }
            }
        }
        assert_eq!(round_up(DType::F16, 65504.1), f32::INFINITY);
        assert_eq!(round_down(DType::F16, 1e9), 65504.0);
        assert_eq!(round_down(DType::F16, -1e9), f32::NEG_INFINITY);
    }

    #[test]
    fn logarithm_is_that_of_the_library_to_nine_digits() {
        for value in [1.0, 1.5, 2.0, 3.0, 1e-3, 12_345.678, 131_072.0, 1.999_999] {
            assert!((log2(value) - value.log2()).abs() < 1e-8, "{value}: {}", log2(value));
        }
    }
}
