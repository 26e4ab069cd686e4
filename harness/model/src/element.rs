//! Elements of tensors: little-endian bytes of a storage type to F32 and back.

use gearbox_core::{DType, Error, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Elements that are converted at a time: long enough for the vector unit, short enough for the stack.
const BLOCK: usize = 256;

macro_rules! widen_half {
    ($half:ty, $bytes:expr, $out:expr) => {{
        let mut block = [<$half>::ZERO; BLOCK];
        for (bytes, out) in $bytes.chunks(2 * BLOCK).zip($out.chunks_mut(BLOCK)) {
            for (element, bytes) in block.iter_mut().zip(bytes.as_chunks().0) {
                *element = <$half>::from_le_bytes(*bytes);
            }
            block[..out.len()].convert_to_f32_slice(out);
        }
    }};
}

/// Appends, and gives the first finite value that became infinite.
macro_rules! narrow_half {
    ($half:ty, $values:expr, $out:expr) => {{
        let mut block = [<$half>::ZERO; BLOCK];
        let mut lost = None;
        for values in $values.chunks(BLOCK) {
            let block = &mut block[..values.len()];
            block.convert_from_f32_slice(values);
            $out.extend(block.iter().flat_map(|element| element.to_le_bytes()));
            lost = lost.or_else(|| {
                let overflows = |(value, element): &(&f32, &$half)| value.is_finite() && !element.is_finite();
                values.iter().zip(&*block).find(overflows).map(|(value, _)| *value)
            });
        }
        lost
    }};
}

/// Fills `out` with elements as F32, which holds all of them exactly; `bytes` holds as many.
pub(crate) fn widen(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    debug_assert_eq!(bytes.len(), out.len() * dtype.size(), "one element per value");
    match dtype {
        DType::F16 => widen_half!(f16, bytes, out),
        DType::Bf16 => widen_half!(bf16, bytes, out),
        _ => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
    }
}

/// Appends values rounded to the nearest element, ties to even.
///
/// # Errors
/// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) if a finite value becomes infinite: attention would see NaN.
pub(crate) fn narrow(dtype: DType, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    let lost: Option<f32> = match dtype {
        DType::F16 => narrow_half!(f16, values, out),
        DType::Bf16 => narrow_half!(bf16, values, out),
        _ => {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            None
        }
    };
    lost.map_or(Ok(()), |value| {
        Err(Error::unsupported(format!("{value} does not fit {dtype}; expected a cache of bf16 or f32 for this model")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_the_way_there_and_back() {
        for dtype in [DType::F16, DType::Bf16] {
            // Without infinities and NaN.
            let top = if dtype == DType::F16 { 0x7c00 } else { 0x7f80 };
            let bytes: Vec<u8> = (0..=u16::MAX).filter(|bits| bits & 0x7fff < top).flat_map(u16::to_le_bytes).collect();
            let mut values = vec![0.0; bytes.len() / 2];
            widen(dtype, &bytes, &mut values);
            let mut back = vec![7];
            narrow(dtype, &values, &mut back).unwrap();
            assert_eq!(back[1..], bytes, "{dtype}");
            assert_eq!(back[0], 7, "appended");
        }
    }

    #[test]
    fn rounds_to_even_and_refuses_what_overflows() {
        let mut out = Vec::new();
        narrow(DType::F16, &[1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0], &mut out).unwrap();
        assert_eq!(out, [0x00, 0x3c, 0x02, 0x3c]);
        let error = narrow(DType::F16, &[0.0, 70_000.0], &mut out).unwrap_err().to_string();
        assert_eq!(error, "70000 does not fit f16; expected a cache of bf16 or f32 for this model");
        narrow(DType::Bf16, &[70_000.0], &mut out).unwrap();
        narrow(DType::F32, &[f32::NAN], &mut out).unwrap();
    }
}
