//! Probabilities of one query, original and decoded, from its logits and their changes.
//!
//! Errors worth measuring are as small as 1e-10 nats, where the difference of two logarithms would be rounding noise. So nothing is computed
//! twice and subtracted. With original probabilities `p`, changes of logits `δ`, their mean `μ = Σpδ` and `x = δ - μ`:
//!
//! | | |
//! |---|---|
//! | `φ(x) = exp(x) - 1 - x` | never negative, and a series for small `x` |
//! | `Φ = Σpφ(x)` | the sum of `p·exp(x)` is `1 + Φ`, because `Σpx = 0` |
//! | `KL = Σp(ln p - ln p') = ln(1 + Φ)` | never negative |
//! | `p' - p = p(φ(x) + x - Φ) / (1 + Φ)` | |
//!
//! `exp` is computed from additions, multiplications and bit operations, which vectors do as well, with the same result on any machine.
#![expect(clippy::inline_always, reason = "what is not inlined into the dispatch is compiled without its vectors")]

use std::f64::consts::LOG2_E;

use super::tally::Seen;

/// Independent sums, so that additions do not wait for each other; a part of the result, as it fixes the order of additions.
pub(super) const LANES: usize = 8;

/// `1 / i!`.
const INVERSE_FACTORIALS: [f64; 18] = {
    let mut inverse = [1.0; 18];
    let mut i = 1;
    while i < inverse.len() {
        inverse[i] = inverse[i - 1] / i as f64;
        i += 1;
    }
    inverse
};

/// ln 2 in two parts; products of the first with integers up to 2^20 are exact.
const LN_2: [f64; 2] = [0.693_147_180_369_123_8, 1.908_214_929_270_587_7e-10];

/// A number to which others are added to round them to integers, which are then the lowest bits of the sum.
const ROUNDER: f64 = (3u64 << 51) as f64;

/// `exp(x)` for `x` up to 700, to about 1e-16; 0 below -708.
#[inline(always)]
pub(super) fn exp(x: f64) -> f64 {
    let shifted = x * LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let mut sum = INVERSE_FACTORIALS[13];
    for i in (0..13).rev() {
        sum = sum * r + INVERSE_FACTORIALS[i];
    }
    let power = f64::from_bits((shifted.to_bits().wrapping_add(1023)) << 52);
    if x < -708.0 { 0.0 } else { sum * power }
}

/// `exp(x) - 1 - x` for `x` from -1/2 to 1/2.
#[inline(always)]
fn series(x: f64) -> f64 {
    let mut sum = INVERSE_FACTORIALS[16];
    for i in (2..16).rev() {
        sum = sum * x + INVERSE_FACTORIALS[i];
    }
    sum * x * x
}

/// `exp(x) - 1 - x` for `x` up to 700.
#[inline(always)]
fn phi(x: f64) -> f64 {
    let (near, far) = (series(x), exp(x) - 1.0 - x);
    if x.abs() < NEAR { near } else { far }
}

/// `exp(x) - 1` for `x` up to 700.
#[inline(always)]
pub(super) fn expm1(x: f64) -> f64 {
    let (near, far) = (x + series(x), exp(x) - 1.0);
    if x.abs() < NEAR { near } else { far }
}

/// Below this the series has all its digits.
const NEAR: f64 = 0.5;

/// Where the change of a logit is larger, exponentials are taken relative to the largest one, as they might overflow.
const LARGE_CHANGE: f64 = 30.0;

/// Buffers for one query.
#[derive(Default)]
pub(super) struct Row {
    /// Original probabilities.
    original: Vec<f64>,
    /// Terms of the decoded ones.
    terms: Vec<f64>,
}

/// Whether the numbers are all finite.
#[inline(always)]
pub(super) fn all_finite(numbers: &[f32]) -> bool {
    numbers.iter().fold(true, |finite, number| finite & (number.to_bits() & 0x7f80_0000 != 0x7f80_0000))
}

#[inline(always)]
fn add_up(lanes: [f64; LANES]) -> f64 {
    let halves: [f64; LANES / 2] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + LANES / 2]);
    (halves[0] + halves[1]) + (halves[2] + halves[3])
}

/// The sum of products; of numbers that fill whole lanes.
#[inline(always)]
fn dot(xs: &[f64], ys: &[f64]) -> f64 {
    let mut sums = [0.0; LANES];
    for (xs, ys) in xs.as_chunks::<LANES>().0.iter().zip(ys.as_chunks::<LANES>().0) {
        for ((sum, x), y) in sums.iter_mut().zip(xs).zip(ys) {
            *sum += x * y;
        }
    }
    add_up(sums)
}

/// The sum of numbers that fill whole lanes.
#[inline(always)]
fn total_of(xs: &[f64]) -> f64 {
    let mut sums = [0.0; LANES];
    for xs in xs.as_chunks::<LANES>().0 {
        for (sum, x) in sums.iter_mut().zip(xs) {
            *sum += x;
        }
    }
    add_up(sums)
}

/// The largest of numbers that fill whole lanes.
#[inline(always)]
fn largest<T: Copy + PartialOrd>(xs: &[T], lowest: T) -> T {
    let mut most = [lowest; LANES];
    for xs in xs.as_chunks::<LANES>().0 {
        for (most, x) in most.iter_mut().zip(xs) {
            *most = if *x > *most { *x } else { *most };
        }
    }
    most.into_iter().fold(lowest, |a, b| if b > a { b } else { a })
}

/// What is too small for a normal F32 becomes zero: nothing that is printed changes, and some processors take long over such numbers.
#[inline(always)]
fn narrow(number: f64) -> f32 {
    if number.abs() < f64::from(f32::MIN_POSITIVE) { 0.0 } else { number as f32 }
}

impl Row {
    /// Turns finite logits into probabilities.
    ///
    /// # Shapes
    /// `logits` is a multiple of [`LANES`]; what a query does not see must be minus infinity, at least one must be finite.
    #[inline(always)]
    pub(super) fn soften(&mut self, logits: &mut [f32]) -> Normalizer {
        let max = f64::from(largest(logits, f32::NEG_INFINITY));
        self.original.resize(logits.len(), 0.0);
        let original = &mut self.original[..];
        for (p, z) in original.iter_mut().zip(logits.iter()) {
            *p = exp(f64::from(*z) - max);
        }
        let total = total_of(original);
        let inverse = 1.0 / total;
        for (p, z) in original.iter_mut().zip(logits) {
            *p *= inverse;
            *z = narrow(*p);
        }
        Normalizer { max, total }
    }

    /// Turns changes of logits into changes of probabilities after [`Row::soften`], and fills in the decoded probabilities.
    ///
    /// # Shapes
    /// All are as long as the logits were; `sums` are the changed logits of what a query sees and minus infinity elsewhere.
    #[inline(always)]
    pub(super) fn change(
        &mut self,
        normalizer: Normalizer,
        sums: &[f64],
        changes: &mut [f32],
        decoded: &mut [f32],
        seen: &mut Seen,
    ) {
        self.terms.resize(changes.len(), 0.0);
        let (original, terms) = (&self.original[..], &mut self.terms[..]);
        for (term, delta) in terms.iter_mut().zip(changes.iter()) {
            *term = f64::from(*delta);
        }
        seen.logit_squares = dot(terms, terms);
        let mean = dot(original, terms);
        let highest = largest(terms, f64::NEG_INFINITY);
        for term in &mut *terms {
            *term = term.abs();
        }
        seen.logit_max = largest(terms, 0.0);
        if highest - mean > LARGE_CHANGE {
            let max = largest(sums, f64::NEG_INFINITY);
            for (term, sum) in terms.iter_mut().zip(sums) {
                *term = exp(*sum - max);
            }
            let total = total_of(terms);
            seen.kl = ((max - normalizer.max) + (total.ln() - normalizer.total.ln()) - mean).max(0.0);
            let inverse = 1.0 / total;
            for (((p, term), delta), decoded) in original.iter().zip(terms).zip(changes).zip(decoded) {
                let candidate = *term * inverse;
                *delta = narrow(candidate - p);
                *decoded = narrow(candidate);
            }
            return;
        }
        if seen.logit_max + mean.abs() < NEAR {
            for (term, delta) in terms.iter_mut().zip(changes.iter()) {
                *term = series(f64::from(*delta) - mean);
            }
        } else {
            for (term, delta) in terms.iter_mut().zip(changes.iter()) {
                *term = phi(f64::from(*delta) - mean);
            }
        }
        let excess = dot(original, terms);
        seen.kl = excess.ln_1p();
        let inverse = 1.0 / (1.0 + excess);
        for (((p, term), delta), decoded) in original.iter().zip(terms).zip(changes).zip(decoded) {
            let difference = p * ((*term + (f64::from(*delta) - mean)) - excess) * inverse;
            *delta = narrow(difference);
            *decoded = narrow(p + difference);
        }
    }
}

/// What turns logits into the logarithms of probabilities.
#[derive(Clone, Copy)]
pub(super) struct Normalizer {
    /// The greatest logit.
    max: f64,
    /// Sum of the exponentials of the logits less `max`.
    total: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_those_of_the_platform_to_two_units_in_the_last_place() {
        for i in -70_000..=70_000 {
            let x = f64::from(i) * 0.009_99;
            let (got, expected) = (exp(x), x.exp());
            assert!((got / expected - 1.0).abs() <= 2.0 * f64::EPSILON, "{x}: {got} {expected}");
        }
        assert_eq!((exp(0.0), exp(-709.0), exp(f64::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn phi_keeps_its_digits_near_zero() {
        // The series, as far as it matters: x²/2 + x³/6 + x⁴/24.
        for x in [1e-9, -1e-9, 3e-5, -3e-5] {
            let expected = x * x * (0.5 + x * (1.0 / 6.0 + x / 24.0));
            assert!((phi(x) / expected - 1.0).abs() <= 4.0 * f64::EPSILON, "{x}");
        }
        // At 0.5 the series ends and the difference begins, of which 0.15 of 1.65 stays: 11 times the rounding error.
        for x in [0.499_999_999_9_f64, -0.499_999_999_9, 0.5, -0.5, 3.0, -20.0] {
            let expected = x.exp_m1() - x;
            assert!((phi(x) / expected - 1.0).abs() <= 16.0 * f64::EPSILON, "{x}");
        }
        assert!(phi(0.0) == 0.0 && series(0.0) == 0.0);
        for x in [1e-300, 1e-9, -3e-5, 0.4, -0.5, -2.0, 30.0_f64] {
            assert!((expm1(x) / x.exp_m1() - 1.0).abs() <= 4.0 * f64::EPSILON, "{x}");
        }
        assert_eq!((expm1(f64::NEG_INFINITY), expm1(0.0)), (-1.0, 0.0));
    }
}
