//! Elements of tensors as words and as numbers, for loops that the compiler vectorises.
#![expect(clippy::inline_always, reason = "what is not inlined into the dispatch is compiled without its vectors")]

/// One element type.
pub(super) trait Element {
    /// An element in memory.
    type Bytes;
    /// The bits of the exponent: all set in infinities and NaNs, and in nothing else.
    const EXPONENT: u32;

    /// The elements of a tensor; what is behind the last whole one is left out.
    fn elements(bytes: &[u8]) -> &[Self::Bytes];

    /// The word that an element is.
    fn word(bytes: &Self::Bytes) -> u32;

    /// The number that a word stands for; every element type fits in F32.
    fn number(word: u32) -> f32;

    /// Whether a word stands for a finite number.
    #[inline(always)]
    fn is_finite(word: u32) -> bool {
        word & Self::EXPONENT != Self::EXPONENT
    }
}

pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct F32;

macro_rules! words {
    ($word:ty) => {
        type Bytes = [u8; size_of::<$word>()];

        #[inline(always)]
        fn elements(bytes: &[u8]) -> &[Self::Bytes] {
            bytes.as_chunks().0
        }

        #[inline(always)]
        fn word(bytes: &Self::Bytes) -> u32 {
            <$word>::from_le_bytes(*bytes).into()
        }
    };
}

impl Element for F16 {
    const EXPONENT: u32 = 0x7c00;
    words!(u16);

    // `half` asks for the features of the machine at every element unless it is compiled for one machine; this needs none.
    #[inline(always)]
    fn number(word: u32) -> f32 {
        const BIAS: u32 = 127 - 15;
        let exponent = word & Self::EXPONENT;
        let magnitude = (word & 0x7fff) << 13;
        let normal = f32::from_bits(magnitude + (BIAS << 23));
        // A subnormal becomes the mantissa of a number from 2^-14 to 2^-13, from which 2^-14 is taken away.
        let offset = f32::from_bits((BIAS + 1) << 23);
        let small = f32::from_bits(magnitude + ((BIAS + 1) << 23)) - offset;
        let infinite = f32::from_bits(magnitude | 0x7f80_0000);
        let number = if exponent == 0 { small } else { normal };
        let number = if exponent == Self::EXPONENT { infinite } else { number };
        f32::from_bits(number.to_bits() | (word & 0x8000) << 16)
    }
}

impl Element for Bf16 {
    const EXPONENT: u32 = 0x7f80;
    words!(u16);

    #[inline(always)]
    fn number(word: u32) -> f32 {
        f32::from_bits(word << 16)
    }
}

impl Element for F32 {
    const EXPONENT: u32 = 0x7f80_0000;
    words!(u32);

    #[inline(always)]
    fn number(word: u32) -> f32 {
        f32::from_bits(word)
    }
}

/// Calls a generic function with the [`Element`] of a [`DType`](gearbox_core::DType); an error for one that is not known here.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $call:expr) => {
        match $dtype {
            gearbox_core::DType::F16 => {
                type $element = $crate::metrics::element::F16;
                Ok($call)
            }
            gearbox_core::DType::Bf16 => {
                type $element = $crate::metrics::element::Bf16;
                Ok($call)
            }
            gearbox_core::DType::F32 => {
                type $element = $crate::metrics::element::F32;
                Ok($call)
            }
            dtype => {
                let message = format!("expected f16, bf16 or f32, got {dtype}");
                Err(gearbox_core::Error::new(gearbox_core::ErrorKind::UnsupportedDType, message))
            }
        }
    };
}
pub(super) use with_element;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_the_number_that_half_says() {
        for word in 0..=u16::MAX {
            let bits = u32::from(word);
            let (f16, bf16) = (half::f16::from_bits(word), half::bf16::from_bits(word));
            assert_eq!(F16::is_finite(bits), f16.is_finite(), "{word:#x}");
            assert_eq!(Bf16::is_finite(bits), bf16.is_finite(), "{word:#x}");
            if f16.is_nan() {
                assert!(F16::number(bits).is_nan(), "{word:#x}");
            } else {
                assert_eq!(F16::number(bits).to_bits(), f16.to_f32().to_bits(), "{word:#x}");
            }
            if bf16.is_nan() {
                assert!(Bf16::number(bits).is_nan(), "{word:#x}");
            } else {
                assert_eq!(Bf16::number(bits).to_bits(), bf16.to_f32().to_bits(), "{word:#x}");
            }
        }
    }

    #[test]
    fn words_are_little_endian_and_a_cut_element_is_left_out() {
        assert_eq!(F16::elements(&[1, 2, 3, 4, 5]).iter().map(F16::word).collect::<Vec<_>>(), [0x0201, 0x0403]);
        assert_eq!(F32::elements(&[1, 2, 3, 4, 5]).iter().map(F32::word).collect::<Vec<_>>(), [0x0403_0201]);
    }
}
