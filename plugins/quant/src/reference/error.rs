//! How far a restored tensor is from the original, as the reference prints it.

#![expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]

use pulp::Arch;

use super::pairwise::{combine, mean, pairwise};

/// Error figures of one tensor.
///
/// All are 0 for a tensor without elements. With a NaN all are NaN but the cosine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Error {
    /// Mean of the absolute differences.
    pub mae: f32,
    /// Root of the mean of their squares.
    pub rmse: f32,
    /// The largest of them.
    pub max_abs: f32,
    /// Cosine of the angle between both tensors, -1 to 1 but for rounding; 0 if one of them is all zeros or has a NaN.
    pub cosine: f64,
}

/// What is summed in F64 over all elements, in eight parts.
#[derive(Default)]
struct Dots {
    original: [f64; 8],
    restored: [f64; 8],
    both: [f64; 8],
    /// Bits of the largest difference without its sign: NaN is above all numbers.
    peak: [u32; 8],
}

/// Compares a restored tensor with the original; what one of them has more than the other is left out.
///
/// Differences, their squares and the sums of both are F32, added pairwise as `NumPy` does. Dot products are F64.
pub fn error(original: &[f32], restored: &[f32]) -> Error {
    let count = original.len().min(restored.len());
    if count == 0 {
        return Error::default();
    }
    let arch = Arch::new();
    let mut dots = Dots::default();
    let [absolute, squares] = pairwise(0..count, &mut |range| {
        let (original, restored) = (&original[range.clone()], &restored[range]);
        let dots = &mut dots;
        arch.dispatch(
            #[inline(always)]
            move || {
                let dots = dots;
                leaf(original, restored, dots)
            },
        )
    });
    let [original, restored, both] = [dots.original, dots.restored, dots.both].map(|parts| parts.iter().sum::<f64>());
    let norms = original.sqrt() * restored.sqrt();
    Error {
        mae: mean(absolute, count),
        rmse: mean(squares, count).sqrt(),
        max_abs: f32::from_bits(dots.peak.into_iter().max().unwrap_or_default()),
        cosine: if norms > 0.0 { both / norms } else { 0.0 },
    }
}

/// Sums of absolute differences and of their squares, over at most 128 elements.
#[inline(always)]
fn leaf(original: &[f32], restored: &[f32], dots: &mut Dots) -> [f32; 2] {
    let ((a, a_rest), (r, r_rest)) = (original.as_chunks::<8>(), restored.as_chunks::<8>());
    // -0.0 plus the first term is the first term.
    let (mut absolute, mut squares) = ([-0.0_f32; 8], [-0.0_f32; 8]);
    let Dots { original, restored, both, peak } = dots;
    let (mut aa, mut rr, mut ar, mut top) = (*original, *restored, *both, *peak);
    for (a, r) in a.iter().zip(r) {
        for i in 0..8 {
            let d = a[i] - r[i];
            absolute[i] += d.abs();
            squares[i] += d * d;
            top[i] = top[i].max(d.to_bits() & 0x7FFF_FFFF);
        }
        for i in 0..8 {
            let (a, r) = (f64::from(a[i]), f64::from(r[i]));
            aa[i] += a * a;
            rr[i] += r * r;
            ar[i] += a * r;
        }
    }
    let mut sums = if a.is_empty() { [-0.0; 2] } else { [combine(absolute), combine(squares)] };
    for (i, (a, r)) in a_rest.iter().zip(r_rest).enumerate() {
        let d = a - r;
        sums[0] += d.abs();
        sums[1] += d * d;
        top[i] = top[i].max(d.to_bits() & 0x7FFF_FFFF);
        let (a, r) = (f64::from(*a), f64::from(*r));
        aa[i] += a * a;
        rr[i] += r * r;
        ar[i] += a * r;
    }
    (*original, *restored, *both, *peak) = (aa, rr, ar, top);
    sums
}
