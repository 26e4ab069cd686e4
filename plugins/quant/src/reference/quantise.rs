//! The uniform quantiser: symmetric, one scale for the whole tensor.

#![expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]

use std::ops::RangeInclusive;

use gearbox_core::{Chunk, Error, Result};
use pulp::Arch;

use super::element::{Element, map, peak, with_element};

/// Bits of a code: with one there is only zero, with more than these not every code is an F32.
pub const BITS: RangeInclusive<u8> = 2..=24;

/// The largest code, after a check of the number of bits.
pub(super) fn largest_code(bits: u8) -> Result<f32> {
    if BITS.contains(&bits) {
        return Ok(((1_u32 << (bits - 1)) - 1) as f32);
    }
    Err(Error::invalid_config(format!("`/bits`: expected {} to {}, got {bits}", BITS.start(), BITS.end())))
}

/// The code as a number: a small negative value gives -0.0. NaN stays NaN.
#[inline(always)]
pub(super) fn code(value: f32, scale: f32, largest: f32) -> f32 {
    (value / scale).round_ties_even().clamp(-largest, largest)
}

/// Appends a tensor whose values were rounded to `2^bits - 1` evenly spaced levels, in its own element type.
///
/// The distance of two levels is the largest magnitude divided by the largest code, `2^(bits - 1) - 1`; the middle level is zero. A tensor
/// of zeros stays as it is. A single NaN or infinity makes all values NaN.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) if `bits` is not in [`BITS`].
///
/// # Examples
/// ```
/// use gearbox_core::{Chunk, DType, Shape};
///
/// let tensor: Vec<u8> = [3.0_f32, -1.2, 0.4].iter().flat_map(|value| value.to_le_bytes()).collect();
/// let mut restored = Vec::new();
/// let chunk = Chunk::new(Shape::flat(3), DType::F32, &tensor).unwrap();
/// gearbox_quant::reference::quantise(chunk, 3, &mut restored).unwrap();
/// assert_eq!(restored, [3.0_f32, -1.0, 0.0].map(f32::to_le_bytes).concat());
/// ```
pub fn quantise(chunk: Chunk<'_>, bits: u8, out: &mut Vec<u8>) -> Result<()> {
    let largest = largest_code(bits)?;
    with_element!(chunk.dtype(), E => match scale::<E>(chunk.bytes(), largest) {
        None => out.extend_from_slice(chunk.bytes()),
        Some(scale) => {
            map::<E>(chunk.bytes(), out, #[inline(always)] move |bytes| E::narrow(code(E::widen(bytes), scale, largest) * scale));
        }
    });
    Ok(())
}

/// Appends the codes of [`quantise`], and returns the scale: codes times scale, rounded to the element type, are the restored values.
///
/// A code does not tell -0.0 from 0.0. Codes of values that are not numbers are 0, and the scale is then not finite. A tensor of zeros has
/// scale 0.
///
/// # Errors
/// As [`quantise`].
pub fn quantise_codes(chunk: Chunk<'_>, bits: u8, codes: &mut Vec<i32>) -> Result<f32> {
    let largest = largest_code(bits)?;
    with_element!(chunk.dtype(), E => {
        let elements = E::elements(chunk.bytes());
        let start = codes.len();
        codes.resize(start + elements.len(), 0);
        let Some(scale) = scale::<E>(chunk.bytes(), largest) else { return Ok(0.0) };
        let codes = &mut codes[start..];
        Arch::new().dispatch(
            #[inline(always)]
            move || {
                let codes = codes;
                for (out, bytes) in codes.iter_mut().zip(elements) {
                    *out = code(E::widen(*bytes), scale, largest) as i32;
                }
            },
        );
        Ok(scale)
    })
}

/// The distance of two levels, or `None` if there is nothing but zeros.
fn scale<E: Element>(bytes: &[u8], largest: f32) -> Option<f32> {
    let peak = peak::<E>(E::elements(bytes));
    let scale = (f64::from(peak) / f64::from(largest)) as f32;
    // A scale that underflows makes every output zero; one of 1 does the same without dividing zeros by zero.
    let underflows = peak != 0.0 && scale == 0.0;
    (peak != 0.0).then_some(if underflows { 1.0 } else { scale })
}
