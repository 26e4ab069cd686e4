//! Logarithms that are the same on every machine.
//!
//! Encoders choose by estimated bits, and equal input must give equal bytes everywhere, so nothing here calls the system's library.

/// Base-2 logarithm of a positive finite number, with an error below 0.00001.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
pub(crate) fn log2(x: f32) -> f32 {
    let bits = x.to_bits();
    let exponent = (bits >> 23).cast_signed() - 127;
    let t = f32::from_bits(bits & 0x007F_FFFF | 0x3F80_0000) - 1.0;
    // Exact at both ends of an octave; the polynomial between was fitted.
    let bend = (((0.025_285_5 * t - 0.094_814_8) * t + 0.181_154_2) * t - 0.275_386_2) * t + 0.442_527_3;
    exponent as f32 + t + t * (1.0 - t) * bend
}

/// Bits that symbols take which occur so often, each at its own frequency.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
pub(crate) fn entropy_bits<const N: usize>(counts: &[u32; N]) -> f32 {
    // Eight sums, which the compiler keeps in vectors.
    let mut sums = [0.0; 8];
    for counts in counts.as_chunks::<8>().0 {
        for (sum, &count) in sums.iter_mut().zip(counts) {
            *sum += weighted(count);
        }
    }
    weighted(counts.iter().sum()) - sums.iter().sum::<f32>()
}

/// `x log2 x`, for counts below `2^31`.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn weighted(count: u32) -> f32 {
    // A test for zero costs more than the logarithms that it spares. Vectors convert signed integers only.
    let x = count.max(1).cast_signed() as f32;
    x * log2(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::float_cmp, reason = "powers of two are exact")]
    fn logarithms_are_close() {
        for i in 1..100_000 {
            let x = i as f32 * 0.37;
            assert!((log2(x) - x.log2()).abs() < 1e-5, "{x}");
        }
        assert_eq!([log2(1.0), log2(2.0), log2(1024.0), log2(0.5)], [0.0, 1.0, 10.0, -1.0]);
    }

    #[test]
    #[expect(clippy::float_cmp, reason = "these are exact")]
    fn entropies_of_known_distributions() {
        assert_eq!(entropy_bits(&[0; 256]), 0.0);
        assert_eq!(entropy_bits(&[0, 9, 0, 0, 0, 0, 0, 0]), 0.0);
        assert_eq!(entropy_bits(&[8, 8, 8, 8, 0, 0, 0, 0]), 64.0);
    }
}
