//! Element types: little-endian bytes to F32 and back.
//!
//! The conversions are integer and float operations without branches, so that the loops they stand in are vectorised; the slice
//! conversions of `half` would need the bytes to be copied into its types first.
//!
//! A closure for `dispatch` moves one of its captures, `let out = out`, so that it can be called once only: another kind is called through
//! a function that the compiler writes, which need not be inlined, and then the loops have no wide instructions. It also owns its numbers:
//! behind a reference they could change with every store, for all that the compiler knows, and nothing would be vectorised.

#![expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]

use gearbox_core::{Chunk, DType};
use pulp::Arch;

/// One element type of a tensor.
pub(super) trait Element {
    /// Little-endian bytes of one element.
    type Bytes: Copy + Default + Send + Sync;
    /// Mantissa bits that are stored.
    const MANTISSA: u32;

    /// The elements of a tensor, and how many there are.
    fn elements(bytes: &[u8]) -> &[Self::Bytes];
    fn elements_mut(bytes: &mut [u8]) -> &mut [Self::Bytes];
    fn widen(bytes: Self::Bytes) -> f32;
    /// Rounds to nearest, ties to even.
    fn narrow(value: f32) -> Self::Bytes;
    /// Rounds to nearest, ties to even, once.
    fn narrow_f64(value: f64) -> Self::Bytes;
    /// The bits without the sign: in the order of the magnitudes, NaN above infinity.
    fn magnitude(bytes: Self::Bytes) -> u32;
    /// The magnitude as a number.
    fn of_magnitude(bits: u32) -> f32;
    /// A number whose unsigned order is that of the values.
    fn ordered(bytes: Self::Bytes) -> u32;
    /// Undoes [`Element::ordered`].
    fn of_ordered(key: u32) -> f32;
    /// The element with only the bits of `mask`, of which the lowest belong to the mantissa.
    fn masked(bytes: Self::Bytes, mask: u32) -> Self::Bytes;
}

pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct F32;

/// Magnitude of infinity in F32.
const INFINITY: u32 = 0x7F80_0000;

/// Rounds to F32 so that a second rounding to fewer bits gives what one rounding would: inexact results become odd.
fn round_to_odd(value: f64) -> f32 {
    let near = value as f32;
    let exact = f64::from(near);
    if value.is_nan() || exact.to_bits() == value.to_bits() {
        return near;
    }
    let bits = near.to_bits() - u32::from(exact.abs() > value.abs());
    f32::from_bits(bits | 1)
}

/// The order of signed magnitudes of `bits` bits as an unsigned one.
#[inline(always)]
fn order(word: u32, sign: u32) -> u32 {
    if word & sign == 0 { word | sign } else { !word & (sign | (sign - 1)) }
}

/// Undoes [`order`].
fn disorder(key: u32, sign: u32) -> u32 {
    if key & sign == 0 { !key & (sign | (sign - 1)) } else { key & !sign }
}

/// What elements of two bytes share.
macro_rules! two_bytes {
    () => {
        type Bytes = [u8; 2];

        #[inline(always)]
        fn elements(bytes: &[u8]) -> &[[u8; 2]] {
            bytes.as_chunks().0
        }

        #[inline(always)]
        fn elements_mut(bytes: &mut [u8]) -> &mut [[u8; 2]] {
            bytes.as_chunks_mut().0
        }

        fn narrow_f64(value: f64) -> [u8; 2] {
            Self::narrow(round_to_odd(value))
        }

        #[inline(always)]
        fn magnitude(bytes: [u8; 2]) -> u32 {
            u32::from(u16::from_le_bytes(bytes) & 0x7FFF)
        }

        fn of_magnitude(bits: u32) -> f32 {
            Self::widen((bits as u16).to_le_bytes())
        }

        #[inline(always)]
        fn ordered(bytes: [u8; 2]) -> u32 {
            order(u16::from_le_bytes(bytes).into(), 0x8000)
        }

        fn of_ordered(key: u32) -> f32 {
            Self::widen((disorder(key, 0x8000) as u16).to_le_bytes())
        }

        #[inline(always)]
        fn masked(bytes: [u8; 2], mask: u32) -> [u8; 2] {
            (u16::from_le_bytes(bytes) & mask as u16).to_le_bytes()
        }
    };
}

impl Element for F16 {
    const MANTISSA: u32 = 10;
    two_bytes!();

    #[inline(always)]
    fn widen(bytes: [u8; 2]) -> f32 {
        // 2^112 moves the exponent from the bias of F16 to that of F32, and makes subnormals normal.
        const SCALE: f32 = f32::from_bits((127 + 112) << 23);
        let word = u32::from(u16::from_le_bytes(bytes));
        let magnitude = (word & 0x7FFF) << 13;
        let infinite = if magnitude >= 0x7C00 << 13 { INFINITY } else { 0 };
        let scaled = f32::from_bits(magnitude) * SCALE;
        f32::from_bits(scaled.to_bits() | infinite | (word & 0x8000) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> [u8; 2] {
        let word = value.to_bits();
        let magnitude = word & 0x7FFF_FFFF;
        // Half of the last place that is kept, less one where it is even: carries reach the exponent and, in the end, infinity.
        let half = 0xFFF + (magnitude >> 13 & 1);
        let normal = (magnitude.wrapping_sub(112 << 23).wrapping_add(half) >> 13).min(0x7C00);
        // The last place of 0.5 is the smallest subnormal: the sum rounds to it.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
        let nan = 0x7E00 | magnitude >> 13 & 0x3FF;
        let finite = if magnitude < 113 << 23 { subnormal } else { normal };
        let bits = if magnitude > INFINITY { nan } else { finite };
        ((word >> 16 & 0x8000 | bits) as u16).to_le_bytes()
    }
}

impl Element for Bf16 {
    const MANTISSA: u32 = 7;
    two_bytes!();

    #[inline(always)]
    fn widen(bytes: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> [u8; 2] {
        let word = value.to_bits();
        let rounded = word.wrapping_add(0x7FFF + (word >> 16 & 1)) >> 16;
        let bits = if word & 0x7FFF_FFFF > INFINITY { word >> 16 | 0x40 } else { rounded };
        (bits as u16).to_le_bytes()
    }
}

impl Element for F32 {
    type Bytes = [u8; 4];
    const MANTISSA: u32 = 23;

    #[inline(always)]
    fn elements(bytes: &[u8]) -> &[[u8; 4]] {
        bytes.as_chunks().0
    }

    #[inline(always)]
    fn elements_mut(bytes: &mut [u8]) -> &mut [[u8; 4]] {
        bytes.as_chunks_mut().0
    }

    #[inline(always)]
    fn widen(bytes: [u8; 4]) -> f32 {
        f32::from_le_bytes(bytes)
    }

    #[inline(always)]
    fn narrow(value: f32) -> [u8; 4] {
        value.to_le_bytes()
    }

    fn narrow_f64(value: f64) -> [u8; 4] {
        (value as f32).to_le_bytes()
    }

    #[inline(always)]
    fn magnitude(bytes: [u8; 4]) -> u32 {
        u32::from_le_bytes(bytes) & 0x7FFF_FFFF
    }

    fn of_magnitude(bits: u32) -> f32 {
        f32::from_bits(bits)
    }

    #[inline(always)]
    fn ordered(bytes: [u8; 4]) -> u32 {
        order(u32::from_le_bytes(bytes), 1 << 31)
    }

    fn of_ordered(key: u32) -> f32 {
        f32::from_bits(disorder(key, 1 << 31))
    }

    #[inline(always)]
    fn masked(bytes: [u8; 4], mask: u32) -> [u8; 4] {
        (u32::from_le_bytes(bytes) & mask).to_le_bytes()
    }
}

/// Runs an expression with `$element` as the type of a tensor's elements.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            gearbox_core::DType::F16 => {
                type $element = crate::reference::element::F16;
                $body
            }
            gearbox_core::DType::Bf16 => {
                type $element = crate::reference::element::Bf16;
                $body
            }
            gearbox_core::DType::F32 => {
                type $element = crate::reference::element::F32;
                $body
            }
            other => unreachable!("{other} is not an element type of this version of core"),
        }
    };
}
pub(super) use with_element;

/// Makes room for `count` more elements at the end of `out` and hands it out to be filled.
pub(super) fn room<E: Element>(out: &mut Vec<u8>, count: usize) -> &mut [E::Bytes] {
    let start = out.len();
    out.resize(start + count * size_of::<E::Bytes>(), 0);
    E::elements_mut(&mut out[start..])
}

/// Applies a function to every element of a tensor and appends the results to `out`.
#[inline(always)]
pub(super) fn map<E: Element>(bytes: &[u8], out: &mut Vec<u8>, each: impl Fn(E::Bytes) -> E::Bytes) {
    let elements = E::elements(bytes);
    let out = room::<E>(out, elements.len());
    Arch::new().dispatch(
        #[inline(always)]
        move || {
            let out = out;
            for (out, element) in out.iter_mut().zip(elements) {
                *out = each(*element);
            }
        },
    );
}

/// The largest magnitude, as a number; NaN if one element is.
pub(super) fn peak<E: Element>(elements: &[E::Bytes]) -> f32 {
    let mut peak = 0;
    let found = &mut peak;
    Arch::new().dispatch(
        #[inline(always)]
        move || {
            let found = found;
            *found = elements.iter().fold(0, |peak, element| E::magnitude(*element).max(peak));
        },
    );
    E::of_magnitude(peak)
}

/// Appends the elements as F32.
///
/// # Examples
/// ```
/// use gearbox_core::{Chunk, DType, Shape};
///
/// let mut values = Vec::new();
/// let bytes = [0x00, 0x3C, 0x01, 0x80];
/// gearbox_quant::reference::widen(Chunk::new(Shape::flat(2), DType::F16, &bytes).unwrap(), &mut values);
/// assert_eq!(values, [1.0, -(-24_f32).exp2()]);
/// ```
pub fn widen(chunk: Chunk<'_>, out: &mut Vec<f32>) {
    with_element!(chunk.dtype(), E => {
        let elements = E::elements(chunk.bytes());
        let start = out.len();
        out.resize(start + elements.len(), 0.0);
        let out = &mut out[start..];
        Arch::new().dispatch(
            #[inline(always)]
            move || {
                let out = out;
                for (out, element) in out.iter_mut().zip(elements) {
                    *out = E::widen(*element);
                }
            },
        );
    });
}

/// Appends values rounded to an element type, to nearest and ties to even.
pub fn narrow(values: &[f32], dtype: DType, out: &mut Vec<u8>) {
    with_element!(dtype, E => {
        let out = room::<E>(out, values.len());
        Arch::new().dispatch(
            #[inline(always)]
            move || {
                let out = out;
                for (out, value) in out.iter_mut().zip(values) {
                    *out = E::narrow(*value);
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn all_sixteen_bit_values_widen_and_come_back() {
        for word in 0..=u16::MAX {
            let bytes = word.to_le_bytes();
            let (half, brain) = (f16::from_bits(word), bf16::from_bits(word));
            if half.is_nan() {
                assert!(F16::widen(bytes).is_nan());
                assert_eq!(u16::from_le_bytes(F16::narrow(F16::widen(bytes))), word | 0x200);
            } else {
                assert_eq!(F16::widen(bytes).to_bits(), f32::from(half).to_bits(), "{word:#06x}");
                assert_eq!(F16::narrow(F16::widen(bytes)), bytes);
            }
            assert_eq!(F16::of_ordered(F16::ordered(bytes)).to_bits(), F16::widen(bytes).to_bits());
            if brain.is_nan() {
                assert_eq!(u16::from_le_bytes(Bf16::narrow(Bf16::widen(bytes))), word | 0x40);
            } else {
                assert_eq!(Bf16::narrow(Bf16::widen(bytes)), bytes);
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_with_subnormals_and_overflow() {
        // Every step around the boundary between two F16 numbers, over all exponents, and what lies outside of them.
        for exponent in 90..=150_u32 {
            for mantissa in (0..1 << 23).step_by(0x3FF).chain([0x1000, 0x1001, 0x3000, 0x2FFF, 0x7F_F000, 0x7F_EFFF]) {
                for sign in [0, 1 << 31] {
                    let value = f32::from_bits(sign | exponent << 23 | mantissa);
                    assert_eq!(F16::narrow(value), f16::from_f32_const(value).to_le_bytes(), "{value:e}");
                    assert_eq!(Bf16::narrow(value), bf16::from_f32_const(value).to_le_bytes(), "{value:e}");
                }
            }
        }
        assert_eq!(F16::narrow(f32::INFINITY), [0x00, 0x7C]);
        assert_eq!(Bf16::narrow(f32::MAX), [0x80, 0x7F]);
    }

    #[test]
    fn rounding_from_f64_happens_once() {
        // Half way between two F16 numbers for an F32, and a hair above for an F64.
        let value = 1.0 + (-11_f64).exp2() + (-40_f64).exp2();
        assert_eq!(F16::narrow(value as f32), [0x00, 0x3C]);
        assert_eq!(F16::narrow_f64(value), [0x01, 0x3C]);
        assert_eq!(F16::narrow_f64(-value), [0x01, 0xBC]);
        let value = 1.0 + (-10_f64).exp2() + (-11_f64).exp2() - (-40_f64).exp2();
        assert_eq!(F16::narrow_f64(value), [0x01, 0x3C]);
        assert_eq!(F16::narrow_f64(f64::MAX), [0x00, 0x7C]);
        assert_eq!(F16::narrow_f64(f64::NEG_INFINITY), [0x00, 0xFC]);
        assert_eq!(F16::narrow_f64(0.0), [0, 0]);
        assert_eq!(F16::narrow_f64(1e-300), [0, 0]);
        assert!(F16::widen(F16::narrow_f64(f64::NAN)).is_nan());
    }

    #[test]
    fn order_of_keys_is_that_of_values() {
        let values = [-f32::INFINITY, -3.5, -1.0, -0.0, 0.0, 1e-7, 2.0, 65504.0, f32::INFINITY];
        let keys = |key: fn(f32) -> u32| values.map(key);
        for keys in [keys(|v| F16::ordered(F16::narrow(v))), keys(|v| F32::ordered(F32::narrow(v)))] {
            assert!(keys.is_sorted() && keys[3] < keys[4], "{keys:?}");
        }
        assert_eq!(F32::of_ordered(F32::ordered((-1.5_f32).to_le_bytes())).to_bits(), (-1.5_f32).to_bits());
    }
}
