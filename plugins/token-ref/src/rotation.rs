//! Turns keys from one position to another.
//!
//! The decoder must turn exactly as the encoder did, on any machine, but `sin`, `cos`, `ln` and `exp` of the platform may differ in the
//! last bit. So they are computed here from additions, multiplications, divisions and bit operations alone, whose results IEEE 754 fixes.
//!
//! [`pulp`] picks the widest vectors of the machine at run time, which changes no result. It brings twelve small crates and buys AVX2: a
//! chunk with every other key turned is inverted at 0.95 GB/s instead of 0.53 (`cargo bench -p gearbox-token-ref`, AMD EPYC, 2026-11).
#![expect(clippy::inline_always, reason = "what is not inlined into the dispatch is compiled without its vectors")]

use std::f64::consts::{FRAC_2_PI, LN_2, SQRT_2, TAU};
use std::marker::PhantomData;

use gearbox_core::{Rope, RopePairing, RopeScaling};
use pulp::{Arch, Simd, WithSimd};

use crate::number::{Format, nearest, power_of_two, value};

/// Angles of one position after the other, by pair of channels.
#[derive(Debug, Default)]
pub(crate) struct Rotation {
    /// What the frequencies were made of.
    rope: Option<Rope>,
    /// Radians per position, by pair.
    frequencies: Vec<f32>,
    cosines: Vec<f64>,
    sines: Vec<f64>,
}

impl Rotation {
    /// Takes RoPE facts; the frequencies are kept for the next chunk of the same model.
    ///
    /// `false` if no key of `dim` channels is rotated like that.
    pub(crate) fn set(&mut self, rope: &Rope, dim: usize) -> bool {
        let pairs = rope.rotary_dim / 2;
        if rope.rotary_dim < 2 || rope.rotary_dim > dim || !rope.rotary_dim.is_multiple_of(2) {
            return false;
        }
        if self.rope.as_ref() != Some(rope) {
            self.frequencies.clear();
            self.frequencies.extend((0..pairs).map(|pair| frequency(rope, pair)));
            self.rope = Some(rope.clone());
        }
        true
    }

    /// Turns a row of heads of `dim` channels from one position to another.
    pub(crate) fn turn<F: Format>(&mut self, row: &mut [u32], dim: usize, from: f32, to: f32) {
        self.cosines.resize(self.frequencies.len(), 0.0);
        self.sines.resize(self.frequencies.len(), 0.0);
        Arch::new().dispatch(Turn::<F> { rotation: self, row, dim, from, to, format: PhantomData });
    }
}

/// The work of [`Rotation::turn`], for the widest vectors of the machine: all that it calls is inlined, or it would be compiled for others.
struct Turn<'a, F> {
    rotation: &'a mut Rotation,
    row: &'a mut [u32],
    dim: usize,
    from: f32,
    to: f32,
    format: PhantomData<F>,
}

impl<F: Format> WithSimd for Turn<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { rotation: Rotation { rope, frequencies, cosines, sines }, row, dim, from, to, .. } = self;
        let Some(rope) = rope else { return };
        for ((frequency, cosine), sine) in frequencies.iter().zip(&mut *cosines).zip(&mut *sines) {
            // Models compute angles as F32, and it shows: in F64 the same keys come out a few F32 steps away.
            (*sine, *cosine) = sin_cos(f64::from(to * frequency) - f64::from(from * frequency));
        }
        for head in row.chunks_exact_mut(dim) {
            turn_head::<F>(rope.pairing, &mut head[..rope.rotary_dim], cosines, sines);
        }
    }
}

#[inline(always)]
fn turn_head<F: Format>(pairing: RopePairing, rotated: &mut [u32], cosines: &[f64], sines: &[f64]) {
    let turns = cosines.iter().zip(sines);
    match pairing {
        RopePairing::HalfSplit => {
            let (low, high) = rotated.split_at_mut(rotated.len() / 2);
            for ((x, y), (cosine, sine)) in low.iter_mut().zip(high).zip(turns) {
                (*x, *y) = turn_pair::<F>(*x, *y, *cosine, *sine);
            }
        }
        RopePairing::Adjacent => {
            for ([x, y], (cosine, sine)) in rotated.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
                (*x, *y) = turn_pair::<F>(*x, *y, *cosine, *sine);
            }
        }
    }
}

#[inline(always)]
fn turn_pair<F: Format>(x: u32, y: u32, cosine: f64, sine: f64) -> (u32, u32) {
    let (x, y) = (value::<F>(x), value::<F>(y));
    (nearest::<F>(x * cosine - y * sine), nearest::<F>(x * sine + y * cosine))
}

/// Radians per position of a pair of channels, rounded to F32 where models round.
fn frequency(rope: &Rope, pair: usize) -> f32 {
    let exponent = (2 * pair) as f32 / rope.rotary_dim as f32;
    let plain = 1.0 / power(rope.theta, exponent.into()) as f32;
    let scaled = match rope.scaling {
        RopeScaling::None => return plain,
        RopeScaling::Linear { factor } => f64::from(plain) / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let plain = f64::from(plain);
            let wavelengths = f64::from(original_context) / (TAU / plain);
            if wavelengths < low_freq_factor {
                plain / factor
            } else if wavelengths > high_freq_factor {
                plain
            } else {
                let kept = (wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - kept) * plain / factor + kept * plain
            }
        }
    };
    scaled as f32
}

/// Angles above this are not turned by: positions of a damaged file, since models end far below.
const LARGEST_ANGLE: f64 = (1u32 << 30) as f64;

/// π/2 in three parts; the first two have 33 bits, so that products with numbers up to 2^20 are exact.
const QUARTER: [f64; 3] = [1.570_796_326_734_125_6, 6.077_100_506_303_966e-11, 2.022_266_248_795_950_6e-21];

/// A number to which others up to 2^50 are added to round them to integers, ties to the even one.
const ROUNDER: f64 = (3u64 << 51) as f64;

/// Sine and cosine, to about 1e-16.
#[inline(always)]
fn sin_cos(angle: f64) -> (f64, f64) {
    let angle = if angle.abs() < LARGEST_ANGLE { angle } else { 0.0 };
    let rounded = angle * FRAC_2_PI + ROUNDER;
    let quarters = rounded - ROUNDER;
    let x = angle - quarters * QUARTER[0] - quarters * QUARTER[1] - quarters * QUARTER[2];
    let square = x * x;
    // Taylor series; |x| is at most π/4, so the first term left out is below 1e-17.
    let sine = x * series(square, [17, 15, 13, 11, 9, 7, 5, 3]);
    let cosine = series(square, [16, 14, 12, 10, 8, 6, 4, 2]);
    // The low bits of the sum are the number of quarter turns: odd ones swap sine and cosine, the second and third negate the sine, the
    // first and second the cosine.
    let count = rounded.to_bits();
    let (sine, cosine) = if count & 1 == 0 { (sine, cosine) } else { (cosine, sine) };
    let negate = |number: f64, bit: u64| f64::from_bits(number.to_bits() ^ (bit & 2) << 62);
    (negate(sine, count), negate(cosine, count.wrapping_add(1)))
}

/// `1 - square / ((n - 1) * n) * (1 - …)` for each `n`, the last `n` outermost.
#[inline(always)]
fn series<const N: usize>(square: f64, steps: [u32; N]) -> f64 {
    steps.into_iter().fold(1.0, |inner, n| 1.0 - square * (1.0 / f64::from((n - 1) * n)) * inner)
}

/// `base^exponent` for a positive base, to about 1e-14.
fn power(base: f64, exponent: f64) -> f64 {
    let bits = base.to_bits();
    let mut twos = (bits >> 52) as i32 - 1023;
    let mut mantissa = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    if mantissa > SQRT_2 {
        (mantissa, twos) = (mantissa / 2.0, twos + 1);
    }
    // ln((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + s^5 / 5 + …), with |s| at most 0.172.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let sum = (0..12).rev().fold(0.0, |sum, n| sum * s * s + 1.0 / f64::from(2 * n + 1));
    let natural = exponent * (2.0 * s * sum + f64::from(twos) * LN_2);
    let halvings = natural / LN_2 + ROUNDER - ROUNDER;
    let x = natural - halvings * LN_2;
    let exponential = (1..18).rev().fold(1.0, |sum, n| sum * x / f64::from(n) + 1.0);
    exponential * power_of_two((halvings as i32).clamp(-1022, 1023))
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::number::F16;

    fn rope(pairing: RopePairing, rotary_dim: usize, scaling: RopeScaling) -> Rope {
        Rope { pairing, theta: 10_000.0, rotary_dim, scaling }
    }

    #[test]
    fn sines_and_cosines_are_those_of_the_platform() {
        let mut angle = 1e-9f64;
        while angle < 2e6 {
            for angle in [angle, -angle] {
                let (sine, cosine) = sin_cos(angle);
                assert!((sine - angle.sin()).abs() < 1e-12 && (cosine - angle.cos()).abs() < 1e-12, "{angle}");
            }
            angle *= 1.0007;
        }
        assert_eq!(sin_cos(0.0), (0.0, 1.0));
        for no_angle in [f64::NAN, f64::INFINITY, 1e300] {
            assert_eq!(sin_cos(no_angle), (0.0, 1.0));
        }
    }

    #[test]
    fn powers_are_those_of_the_platform() {
        for base in [0.5, 1.0, 2.0, 3.7, 100.0, 10_000.0, 500_000.0, 1e6, 1e7] {
            for step in 0..=256 {
                let exponent = f64::from(step) / 256.0;
                let (got, expected) = (power(base, exponent), base.powf(exponent));
                assert!((got - expected).abs() <= 1e-12 * expected, "{base}^{exponent}: {got}, {expected}");
            }
        }
    }

    #[test]
    fn sines_never_change() {
        // Containers depend on every bit; these are the nearest doubles or their neighbours.
        let bits = [1.0, 2.5, -7.0, 1000.0, 123_456.78].map(sin_cos).map(|(s, c)| [s.to_bits(), c.to_bits()]);
        let expected = [
            [0x3FEA_ED54_8F09_0CEE, 0x3FE1_4A28_0FB5_068C],
            [0x3FE3_26AF_0DCF_CAB0, 0xBFE9_A2F7_EF85_8B7D],
            [0xBFE5_0608_C26D_0A09, 0x3FE8_1FF7_9ED9_2017],
            [0x3FEA_75CC_150A_206C, 0x3FE1_FF02_6793_F1BB],
            [0xBFEF_F888_D489_DE5C, 0x3FA5_DA7D_E1CF_70B1],
        ];
        assert_eq!(bits, expected, "{bits:#x?}");
    }

    #[test]
    fn frequencies_follow_theta_and_scaling() {
        let of =
            |scaling| (0..4).map(|pair| frequency(&rope(RopePairing::HalfSplit, 8, scaling), pair)).collect::<Vec<_>>();
        assert_eq!(of(RopeScaling::None), [1.0, 0.1, 0.01, 0.001]);
        assert_eq!(of(RopeScaling::Linear { factor: 4.0 }), [0.25, 0.025, 0.0025, 0.000_25]);
        let llama =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 1024 };
        // Wavelengths 6.3, 63, 628 and 6283: the first two fit four times into 1024 tokens, the last not once.
        let [first, second, third, fourth] = of(llama)[..] else { panic!() };
        assert_eq!((first, second, fourth), (1.0, 0.1, 0.000_125));
        let kept = (1024.0 * 0.01 / TAU - 1.0) / 3.0;
        assert!((f64::from(third) - 0.01 * (kept + (1.0 - kept) / 8.0)).abs() < 1e-9);
    }

    #[test]
    fn pairs_turn_by_the_angle_between_the_positions() {
        let mut rotation = Rotation::default();
        let half = |value: f64| u32::from(f16::from_f64(value).to_bits());
        let (sine, cosine) = 3.0f64.sin_cos();
        for (pairing, expected) in [
            (RopePairing::HalfSplit, [cosine, 0.0, sine, 0.0, 7.0]),
            (RopePairing::Adjacent, [cosine, sine, 0.0, 0.0, 7.0]),
        ] {
            assert!(rotation.set(&rope(pairing, 4, RopeScaling::None), 5));
            let mut row = [1.0, 0.0, 0.0, 0.0, 7.0].map(half);
            rotation.turn::<F16>(&mut row, 5, 10.0, 13.0);
            assert_eq!(row, expected.map(half), "{pairing:?}");
            rotation.turn::<F16>(&mut row, 5, 13.0, 13.0);
            assert_eq!(row, expected.map(half), "a turn by nothing");
        }
    }

    #[test]
    fn facts_that_do_not_fit_the_head_are_refused() {
        let mut rotation = Rotation::default();
        for rotary_dim in [0, 1, 3, 66] {
            assert!(!rotation.set(&rope(RopePairing::Adjacent, rotary_dim, RopeScaling::None), 64), "{rotary_dim}");
        }
    }
}
