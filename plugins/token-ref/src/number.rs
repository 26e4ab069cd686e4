//! Bits of floats: their value, the nearest float, and the distance of two floats in steps.
//!
//! All of it is defined for every bit pattern and is the same on every machine: the largest exponent, which stands for infinities and
//! NaNs, is read as one more power of two, so there is nothing that platforms treat differently.
#![expect(clippy::inline_always, reason = "what is not inlined into a dispatch is compiled without its vectors")]

/// How a tensor's element type lays out its bits.
pub(crate) trait Format {
    /// Bytes of an element.
    const BYTES: usize;
    /// Bits of the mantissa as stored.
    const MANTISSA: u32;
    /// Bits of an element.
    const WIDTH: u32 = 8 * Self::BYTES as u32;
    /// The sign.
    const SIGN: u32 = 1 << (Self::WIDTH - 1);
    /// All bits.
    const MASK: u32 = u32::MAX >> (32 - Self::WIDTH);
    /// The largest exponent as stored.
    const LARGEST: i32 = (1 << (Self::WIDTH - 1 - Self::MANTISSA)) - 1;
    /// Exponent as stored, of 1, plus the bits of the mantissa: what an integer mantissa is scaled by.
    const SCALE: i32 = Self::LARGEST / 2 + Self::MANTISSA.cast_signed();
}

/// IEEE 754 binary16.
pub(crate) struct F16;
/// bfloat16.
pub(crate) struct Bf16;
/// IEEE 754 binary32.
pub(crate) struct F32;

impl Format for F16 {
    const BYTES: usize = 2;
    const MANTISSA: u32 = 10;
}

impl Format for Bf16 {
    const BYTES: usize = 2;
    const MANTISSA: u32 = 7;
}

impl Format for F32 {
    const BYTES: usize = 4;
    const MANTISSA: u32 = 23;
}

/// The elements of little-endian bytes.
pub(crate) fn elements<F: Format>(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(F::BYTES).map(|bytes| {
        let mut word = [0; 4];
        word[..F::BYTES].copy_from_slice(bytes);
        u32::from_le_bytes(word)
    })
}

/// `2^exponent`, for exponents of normal numbers.
#[inline(always)]
pub(crate) fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(u64::from((exponent + 1023).cast_unsigned()) << 52)
}

/// The value of an element.
#[inline(always)]
pub(crate) fn value<F: Format>(bits: u32) -> f64 {
    let exponent = ((bits & !F::SIGN) >> F::MANTISSA).cast_signed();
    let fraction = (bits & ((1 << F::MANTISSA) - 1)).cast_signed();
    // A stored exponent of 0 means that of 1, without the leading bit.
    let mantissa = fraction | i32::from(exponent > 0) << F::MANTISSA;
    let magnitude = f64::from(mantissa) * power_of_two(exponent.max(1) - F::SCALE);
    f64::from_bits(magnitude.to_bits() | u64::from(bits & F::SIGN) << (64 - F::WIDTH))
}

/// The element nearest to a value, ties to the even one.
#[inline(always)]
pub(crate) fn nearest<F: Format>(value: f64) -> u32 {
    let bits = value.to_bits();
    let exponent = ((bits >> 52) as i32 & 0x7FF) - 1023 + F::LARGEST / 2;
    let exponent = exponent.clamp(1, F::LARGEST);
    // A turn makes a number at most √2 times larger; the limit is for what is no number of this format.
    let mantissa = (value.abs() * power_of_two(F::SCALE - exponent)).min(f64::from(4 << F::MANTISSA));
    // Adding 2^52 leaves no bits for a fraction: the sum is rounded to an integer, which its low bits hold.
    let mantissa = (mantissa + power_of_two(52)).to_bits() as u32;
    // The leading bit of the mantissa adds one to the exponent, and so does a mantissa that was rounded up to a power of two.
    let magnitude = (((exponent - 1).cast_unsigned() << F::MANTISSA) + mantissa).min(F::SIGN - 1);
    magnitude | (bits >> (64 - F::WIDTH)) as u32 & F::SIGN
}

/// Rank of an element in the order of values, -0 right below +0.
fn rank<F: Format>(bits: u32) -> u32 {
    if bits & F::SIGN == 0 { bits | F::SIGN } else { !bits & F::MASK }
}

/// Steps from the predicted element to the actual one, as an unsigned number: 0, -1, 1, -2, 2, …
pub(crate) fn difference<F: Format>(actual: u32, predicted: u32) -> u32 {
    let unused = 32 - F::WIDTH;
    let steps = (rank::<F>(actual).wrapping_sub(rank::<F>(predicted)) << unused).cast_signed() >> unused;
    (steps << 1 ^ steps >> 31).cast_unsigned() & F::MASK
}

/// Undoes [`difference`].
pub(crate) fn actual<F: Format>(predicted: u32, difference: u32) -> u32 {
    let steps = difference >> 1 ^ 0u32.wrapping_sub(difference & 1);
    let rank = rank::<F>(predicted).wrapping_add(steps) & F::MASK;
    if rank & F::SIGN == 0 { !rank & F::MASK } else { rank & !F::SIGN }
}

/// Bits that a number takes; one more for some numbers above 2^24.
pub(crate) fn bit_length(number: u32) -> u32 {
    // The exponent of a float is found four at a time, leading zeros one at a time.
    ((number as f32).to_bits() >> 23).saturating_sub(126)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn finite_halves_are_their_values_and_come_back() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            let bits = u32::from(bits);
            if half.is_finite() {
                assert_eq!(value::<F16>(bits).to_bits(), half.to_f64().to_bits(), "{bits:#x}");
            }
            if brain.is_finite() {
                assert_eq!(value::<Bf16>(bits).to_bits(), brain.to_f64().to_bits(), "{bits:#x}");
            }
            assert_eq!((nearest::<F16>(value::<F16>(bits)), nearest::<Bf16>(value::<Bf16>(bits))), (bits, bits));
        }
    }

    #[test]
    fn singles_are_their_values_and_come_back() {
        let step = 65_521; // prime, so that low and high bits vary
        for bits in (0..=u32::MAX).step_by(step) {
            if f32::from_bits(bits).is_finite() {
                assert_eq!(value::<F32>(bits).to_bits(), f64::from(f32::from_bits(bits)).to_bits(), "{bits:#x}");
            }
            assert_eq!(nearest::<F32>(value::<F32>(bits)), bits);
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_even_element() {
        let mut at = -6e-8;
        while at < 70_000.0 {
            // `half` rounds doubles twice on some machines, singles once.
            let single = at as f32;
            assert_eq!(nearest::<F32>(at), single.to_bits(), "{at}");
            if f16::from_f32(single).is_finite() {
                assert_eq!(nearest::<F16>(single.into()), u32::from(f16::from_f32(single).to_bits()), "{single}");
            }
            at += at.abs() / 1777.0 + 3e-9;
        }
        for (tie, even) in [(2049.0, 2048.0), (2051.0, 2052.0), (-2049.0, -2048.0)] {
            assert_eq!(nearest::<F16>(tie), u32::from(f16::from_f64(even).to_bits()));
        }
        // Above the last exponent everything is the last element.
        assert_eq!((nearest::<F16>(1e9), nearest::<F16>(-1e300)), (0x7FFF, 0xFFFF));
        assert_eq!(nearest::<F32>(f64::MAX), 0x7FFF_FFFF);
    }

    #[test]
    fn differences_count_steps_in_the_order_of_values() {
        let one = u32::from(f16::ONE.to_bits());
        assert_eq!([one - 1, one, one + 1, one + 2].map(|actual| difference::<F16>(actual, one)), [1, 0, 2, 4]);
        // From +0 down: -0, the smallest subnormal, the next.
        assert_eq!([0x8000, 0x8001, 0x8002].map(|actual| difference::<F16>(actual, 0)), [1, 3, 5]);
        let edges = [0, 1, 0x3C00, 0x7C00, 0x7FFF, 0x8000, 0x8001, 0xBC00, 0xFFFF];
        for (from, to) in edges.into_iter().flat_map(|from| edges.map(|to| (from, to))) {
            assert_eq!(actual::<F16>(from, difference::<F16>(to, from)), to, "{from:#x} {to:#x}");
            let (wide, far) = (from << 16 | 1, to << 16 | 0xFFFF);
            assert_eq!(actual::<F32>(wide, difference::<F32>(far, wide)), far, "{wide:#x} {far:#x}");
        }
    }

    #[test]
    fn bit_lengths_are_those_of_numbers() {
        let numbers = [0, 1, 2, 3, 4, 255, 256, 65_535, 1 << 20, 0xFF_FFFF];
        assert_eq!(numbers.map(bit_length), [0, 1, 2, 2, 3, 8, 9, 16, 21, 24]);
        assert_eq!(bit_length(u32::MAX), 33);
    }
}
