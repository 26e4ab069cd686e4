//! Error of decoded tensors, by head; [the module above](super) defines each number.

#![expect(clippy::inline_always, reason = "what is not inlined into the dispatch is compiled without its vectors")]

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::marker::PhantomData;

use gearbox_core::{Chunk, Error, Result, Role};
use pulp::{Arch, Simd, WithSimd};
use serde::{Deserialize, Serialize};

use super::element::{Element, with_element};
use crate::number;

/// What is added up over the elements of one head, to be merged before anything is divided.
///
/// The additions are made in an order that depends on the shapes of the chunks alone, so the same chunks added and merged in the same
/// order give the same bits, with any number of threads and on any machine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ErrorSums {
    /// Elements that are finite in both tensors; the sums below are over these.
    pub values: u64,
    /// Elements of which the original is not finite and came back with the same bits.
    pub kept_non_finite: u64,
    /// Elements of which either is not finite, with other bits than the original.
    pub broken: u64,
    /// Elements that came back with other bits, the broken ones included.
    pub changed: u64,
    /// `Σ|d|`, where `d = r - x` is the decoded number less the original.
    pub sum_abs: f64,
    /// `Σd²`.
    pub sum_squares: f64,
    /// `Σx²`.
    pub sum_original: f64,
    /// `Σr²`.
    pub sum_decoded: f64,
    /// `Σxr`.
    pub sum_product: f64,
    /// `max|d|`.
    pub max_abs: f64,
}

impl ErrorSums {
    /// Adds the sums of other elements.
    pub fn merge(&mut self, other: &Self) {
        self.values += other.values;
        self.kept_non_finite += other.kept_non_finite;
        self.broken += other.broken;
        self.changed += other.changed;
        self.sum_abs += other.sum_abs;
        self.sum_squares += other.sum_squares;
        self.sum_original += other.sum_original;
        self.sum_decoded += other.sum_decoded;
        self.sum_product += other.sum_product;
        self.max_abs = self.max_abs.max(other.max_abs);
    }

    /// Elements that were compared.
    pub fn elements(&self) -> u64 {
        self.values + self.kept_non_finite + self.broken
    }

    /// The error over all elements that were added.
    ///
    /// # Examples
    /// ```
    /// use gearbox::metrics::error::HeadErrors;
    /// use gearbox_core::{Chunk, DType, Shape};
    ///
    /// // Two heads of one channel: 1.0 and 2.0 come back as 1.0 and 1.5.
    /// let chunk = |bytes| Chunk::new(Shape::new(1, 2, 1), DType::F16, bytes).unwrap();
    /// let mut errors = HeadErrors::default();
    /// errors.add(chunk(&[0, 0x3c, 0, 0x40]), chunk(&[0, 0x3c, 0, 0x3e])).unwrap();
    /// assert_eq!(errors.heads()[0].error().rmse, 0.0);
    /// assert_eq!(errors.heads()[1].error().rmse, 0.5);
    /// assert_eq!(errors.total().error().nmse, 0.05);
    /// ```
    pub fn error(&self) -> TensorError {
        let n = self.values.max(1) as f64;
        let error = TensorError {
            elements: self.elements(),
            changed: self.changed,
            broken: self.broken,
            mae: self.sum_abs / n,
            rmse: (self.sum_squares / n).sqrt(),
            nmse: share(self.sum_squares, self.sum_original),
            snr_db: None,
            max_abs: self.max_abs,
            cosine: self.cosine(),
        };
        if self.broken > 0 {
            let (bad, cosine) = (f64::INFINITY, f64::NAN);
            return TensorError { mae: bad, rmse: bad, nmse: bad, snr_db: Some(-bad), max_abs: bad, cosine, ..error };
        }
        let snr_db = (error.nmse > 0.0).then(|| -10.0 * error.nmse.log10());
        TensorError { snr_db, ..error }
    }

    fn cosine(&self) -> f64 {
        // The root of a square is exact, so equal tensors score exactly 1.
        let norms = (self.sum_original * self.sum_decoded).sqrt();
        if norms > 0.0 {
            (self.sum_product / norms).clamp(-1.0, 1.0)
        } else if self.sum_squares > 0.0 {
            0.0
        } else {
            1.0
        }
    }
}

/// Noise per signal: 0 without noise, infinite where there is only noise.
pub(super) fn share(noise: f64, signal: f64) -> f64 {
    if noise == 0.0 { 0.0 } else { noise / signal }
}

/// How far decoded elements are from the original ones.
///
/// Numbers that are not finite become `null` in JSON. Of all but `snr_db` that means: damaged beyond measure, so let it fail a gate. They are
/// read back as infinite, the cosine as NaN, and `snr_db` as none.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorError {
    /// Elements that were compared.
    pub elements: u64,
    /// Elements that came back with other bits.
    pub changed: u64,
    /// Elements that are not finite in the original or in the decoded tensor, and came back with other bits.
    pub broken: u64,
    /// Mean of `|d|`.
    #[serde(deserialize_with = "number::or_infinite")]
    pub mae: f64,
    /// Root of the mean of `d²`.
    #[serde(deserialize_with = "number::or_infinite")]
    pub rmse: f64,
    /// `Σd² / Σx²`.
    #[serde(deserialize_with = "number::or_infinite")]
    pub nmse: f64,
    /// Signal-to-noise ratio in decibels, `-10 log10(nmse)`; none if `nmse` is 0.
    pub snr_db: Option<f64>,
    /// Greatest `|d|`.
    #[serde(deserialize_with = "number::or_infinite")]
    pub max_abs: f64,
    /// Cosine of the angle between original and decoded elements as vectors.
    #[serde(deserialize_with = "number::or_nan")]
    pub cosine: f64,
}

/// Sums of every head of one run, layer and role, filled chunk by chunk.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadErrors {
    heads: Vec<ErrorSums>,
}

impl HeadErrors {
    /// Compares a decoded chunk with its original; at most a few hundred bytes are allocated.
    ///
    /// # Shapes
    /// Both are `(seq, heads, dim)`; `heads` stays the same from call to call.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if the chunks differ in shape or element type, or in heads from
    /// those before.
    pub fn add(&mut self, original: Chunk<'_>, decoded: Chunk<'_>) -> Result<()> {
        let (shape, dtype) = (original.shape(), original.dtype());
        if (shape, dtype) != (decoded.shape(), decoded.dtype()) {
            let (got, other) = (decoded.shape(), decoded.dtype());
            return Err(Error::shape(format!("expected a {dtype} tensor of shape {shape}, got {other} of {got}")));
        }
        self.fit(shape.heads)?;
        let equal = original.bytes() == decoded.bytes();
        let (original, decoded) = (original.bytes(), decoded.bytes());
        for (head, sums) in self.heads.iter_mut().enumerate() {
            let place = Place { head, heads: shape.heads, dim: shape.dim };
            let more = with_element!(dtype, E => {
                let element = PhantomData::<E>;
                Arch::new().dispatch(Compare { original, decoded, equal, place, element })
            })?;
            sums.merge(&more);
        }
        Ok(())
    }

    /// Adds what was found in later chunks of the same tensor.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if the other has another number of heads, and any at all.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if other.heads.is_empty() {
            return Ok(());
        }
        self.fit(other.heads.len())?;
        self.heads.iter_mut().zip(&other.heads).for_each(|(sums, more)| sums.merge(more));
        Ok(())
    }

    /// Sums by head; empty before anything was added.
    pub fn heads(&self) -> &[ErrorSums] {
        &self.heads
    }

    /// Sums over all heads.
    pub fn total(&self) -> ErrorSums {
        total(&self.heads)
    }

    /// Takes the number of heads from the first chunk.
    fn fit(&mut self, heads: usize) -> Result<()> {
        if self.heads.is_empty() {
            self.heads.resize(heads, ErrorSums::default());
        }
        if self.heads.len() == heads {
            return Ok(());
        }
        Err(Error::shape(format!("expected {} heads as before, got {heads}", self.heads.len())))
    }
}

fn total<'a>(sums: impl IntoIterator<Item = &'a ErrorSums>) -> ErrorSums {
    let mut total = ErrorSums::default();
    sums.into_iter().for_each(|sums| total.merge(sums));
    total
}

/// Which elements of a tensor belong to a head.
#[derive(Clone, Copy)]
struct Place {
    head: usize,
    heads: usize,
    dim: usize,
}

/// Independent sums, so that additions do not wait for each other; a part of the result, as it fixes the order of additions.
const LANES: usize = 8;

/// Elements that are widened at a time, so that they stay in the fastest cache and a count of them fits in 16 bits.
const PIECE: usize = 512;

/// The comparison of one head, for the widest vectors of the machine.
struct Compare<'a, E> {
    original: &'a [u8],
    decoded: &'a [u8],
    /// Whether all bytes are equal.
    equal: bool,
    place: Place,
    element: PhantomData<E>,
}

impl<E: Element> WithSimd for Compare<'_, E> {
    type Output = ErrorSums;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> ErrorSums {
        let Place { head, heads, dim } = self.place;
        let (mut sums, mut found) = (Lanes::default(), ErrorSums::default());
        if dim == 0 {
            return found;
        }
        let (mut xs, mut rs) = ([0.0; PIECE], [0.0; PIECE]);
        let originals = E::elements(self.original).chunks_exact(dim).skip(head).step_by(heads);
        let decodeds = E::elements(self.decoded).chunks_exact(dim).skip(head).step_by(heads);
        for (original, decoded) in originals.zip(decodeds) {
            for (original, decoded) in original.chunks(PIECE).zip(decoded.chunks(PIECE)) {
                if self.equal {
                    sums = sums.with_equal(widen_equal::<E>(original, &mut xs, &mut found));
                } else {
                    let (xs, rs) = widen::<E>(original, decoded, (&mut xs, &mut rs), &mut found);
                    sums = sums.with(xs, rs);
                }
            }
        }
        if self.equal {
            (sums.decoded, sums.product) = (sums.original, sums.original);
        }
        sums.finish(found)
    }
}

/// Numbers, filled up with zeros, which add nothing to any sum.
type Numbers = [[f32; LANES]];

/// The part of a buffer that holds `len` numbers, and zeros behind them.
#[inline(always)]
fn filled(buffer: &mut [f32; PIECE], len: usize) -> &Numbers {
    let end = len.next_multiple_of(LANES);
    buffer[len..end].fill(0.0);
    buffer[..end].as_chunks().0
}

/// Turns elements into numbers and counts them; pairs that are not finite become zeros.
#[inline(always)]
fn widen<'a, E: Element>(
    original: &[E::Bytes],
    decoded: &[E::Bytes],
    (xs, rs): (&'a mut [f32; PIECE], &'a mut [f32; PIECE]),
    found: &mut ErrorSums,
) -> (&'a Numbers, &'a Numbers) {
    let (mut changed, mut infinite) = (0u16, 0u16);
    for (((x, r), original), decoded) in xs.iter_mut().zip(rs.iter_mut()).zip(original).zip(decoded) {
        let (a, b) = (E::word(original), E::word(decoded));
        changed += u16::from(a != b);
        infinite |= u16::from(!E::is_finite(a)) | u16::from(!E::is_finite(b));
        (*x, *r) = (E::number(a), E::number(b));
    }
    found.changed += u64::from(changed);
    found.values += original.len() as u64;
    if infinite != 0 {
        for (((x, r), original), decoded) in xs.iter_mut().zip(rs.iter_mut()).zip(original).zip(decoded) {
            if !(x.is_finite() && r.is_finite()) {
                (*x, *r) = (0.0, 0.0);
                found.values -= 1;
                let kept = E::word(original) == E::word(decoded);
                *(if kept { &mut found.kept_non_finite } else { &mut found.broken }) += 1;
            }
        }
    }
    (filled(xs, original.len()), filled(rs, original.len()))
}

/// What [`widen`] does with twice the same elements.
#[inline(always)]
fn widen_equal<'a, E: Element>(elements: &[E::Bytes], xs: &'a mut [f32; PIECE], found: &mut ErrorSums) -> &'a Numbers {
    let mut infinite = 0u16;
    for (x, element) in xs.iter_mut().zip(elements) {
        let word = E::word(element);
        infinite += u16::from(!E::is_finite(word));
        *x = if E::is_finite(word) { E::number(word) } else { 0.0 };
    }
    found.kept_non_finite += u64::from(infinite);
    found.values += elements.len() as u64 - u64::from(infinite);
    filled(xs, elements.len())
}

/// Sums over every [`LANES`]th element.
#[derive(Clone, Copy, Default)]
struct Lanes {
    abs: [f64; LANES],
    squares: [f64; LANES],
    original: [f64; LANES],
    decoded: [f64; LANES],
    product: [f64; LANES],
    max: [f64; LANES],
}

impl Lanes {
    // By value, or the sums would be kept in memory.
    #[inline(always)]
    fn with(mut self, xs: &Numbers, rs: &Numbers) -> Self {
        for (xs, rs) in xs.iter().zip(rs) {
            for lane in 0..LANES {
                let (x, r) = (f64::from(xs[lane]), f64::from(rs[lane]));
                let d = r - x;
                self.abs[lane] += d.abs();
                self.squares[lane] += d * d;
                self.original[lane] += x * x;
                self.decoded[lane] += r * r;
                self.product[lane] += x * r;
                self.max[lane] = if d.abs() > self.max[lane] { d.abs() } else { self.max[lane] };
            }
        }
        self
    }

    /// What [`Lanes::with`] does with twice the same numbers, but for two sums that are those of the original.
    #[inline(always)]
    fn with_equal(mut self, xs: &Numbers) -> Self {
        for xs in xs {
            for (sum, x) in self.original.iter_mut().zip(xs) {
                *sum += f64::from(*x) * f64::from(*x);
            }
        }
        self
    }

    fn finish(&self, found: ErrorSums) -> ErrorSums {
        let sum = |lanes: &[f64; LANES]| lanes.iter().sum();
        ErrorSums {
            sum_abs: sum(&self.abs),
            sum_squares: sum(&self.squares),
            sum_original: sum(&self.original),
            sum_decoded: sum(&self.decoded),
            sum_product: sum(&self.product),
            max_abs: self.max.iter().copied().fold(0.0, f64::max),
            ..found
        }
    }
}

/// Sums of one head of one run, layer and role.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacedSums {
    /// Name of the run.
    pub run: String,
    /// Layer of the model.
    pub layer: u32,
    /// Keys or values.
    pub role: Role,
    /// KV head.
    pub head: usize,
    /// Its sums.
    pub sums: ErrorSums,
}

/// Error of one head of one run, layer and role.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadError {
    /// Name of the run.
    pub run: String,
    /// Layer of the model.
    pub layer: u32,
    /// Keys or values.
    pub role: Role,
    /// KV head.
    pub head: usize,
    /// Its error.
    #[serde(flatten)]
    pub error: TensorError,
}

/// Error of one layer and role, over all heads and runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerError {
    /// Layer of the model.
    pub layer: u32,
    /// Keys or values.
    pub role: Role,
    /// Its error.
    #[serde(flatten)]
    pub error: TensorError,
}

/// Error over all heads, layers and runs of one role or of both, and where it is worst.
///
/// Of equally bad heads or layers the first in the order of the tables is named; there is none without any head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoleError {
    /// Keys or values; both if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// The error over all elements.
    #[serde(flatten)]
    pub error: TensorError,
    /// The head with the lowest cosine.
    pub worst_cosine: Option<HeadError>,
    /// The head with the highest NMSE.
    pub worst_nmse: Option<HeadError>,
    /// The layer and role with the highest NMSE.
    pub worst_layer: Option<LayerError>,
}

/// Errors of a dump.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorReport {
    /// Over everything.
    pub all: RoleError,
    /// Keys, then values; a role without heads is left out.
    pub roles: Vec<RoleError>,
    /// Each layer and role, in that order.
    pub layers: Vec<LayerError>,
    /// Each head, by run, layer, role and head.
    pub heads: Vec<HeadError>,
}

impl ErrorReport {
    /// Sums up over the heads of any number of tensors, given in any order; those of the same place are added.
    pub fn of(sums: impl IntoIterator<Item = PlacedSums>) -> Self {
        let mut heads = BTreeMap::<_, ErrorSums>::new();
        for PlacedSums { run, layer, role, head, sums } in sums {
            heads.entry((run, layer, role, head)).or_default().merge(&sums);
        }
        let mut layers = BTreeMap::<_, ErrorSums>::new();
        for ((_, layer, role, _), sums) in &heads {
            layers.entry((*layer, *role)).or_default().merge(sums);
        }
        let by_role = |wanted| total(heads.iter().filter(|((_, _, role, _), _)| *role == wanted).map(|(_, sums)| sums));
        let sums = Role::ALL.map(|role| (role, by_role(role)));
        let all = total(sums.iter().map(|(_, sums)| sums));
        let heads: Vec<_> = heads
            .into_iter()
            .map(|((run, layer, role, head), sums)| HeadError { run, layer, role, head, error: sums.error() })
            .collect();
        let layers: Vec<_> =
            layers.into_iter().map(|((layer, role), sums)| LayerError { layer, role, error: sums.error() }).collect();
        let role_error = |role: Option<Role>, sums: &ErrorSums| {
            let of_role = |other: Role| role.is_none_or(|role| role == other);
            let heads = || heads.iter().filter(|head| of_role(head.role));
            let layers = layers.iter().filter(|layer| of_role(layer.role));
            RoleError {
                role,
                error: sums.error(),
                worst_cosine: worst(heads(), |head| -head.error.cosine).cloned(),
                worst_nmse: worst(heads(), |head| head.error.nmse).cloned(),
                worst_layer: worst(layers, |layer| layer.error.nmse).cloned(),
            }
        };
        let present = sums.iter().filter(|(wanted, _)| heads.iter().any(|head| head.role == *wanted));
        let roles = present.map(|(role, sums)| role_error(Some(*role), sums)).collect();
        Self { all: role_error(None, &all), roles, layers, heads }
    }
}

/// The first of those with the highest badness, NaN being the highest of all.
pub(crate) fn worst<T>(items: impl Iterator<Item = T>, badness: impl Fn(&T) -> f64) -> Option<T> {
    let order = |a: f64, b: f64| a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()));
    items.reduce(|worst, item| if order(badness(&item), badness(&worst)) == Ordering::Greater { item } else { worst })
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "these are exact")]
mod tests {
    use gearbox_core::{DType, ErrorKind, Shape};
    use half::{bf16, f16};

    use super::*;

    fn bytes(dtype: DType, numbers: &[f32]) -> Vec<u8> {
        let bytes = |number: &f32| match dtype {
            DType::F16 => f16::from_f32(*number).to_le_bytes().to_vec(),
            DType::Bf16 => bf16::from_f32(*number).to_le_bytes().to_vec(),
            _ => number.to_le_bytes().to_vec(),
        };
        numbers.iter().flat_map(bytes).collect()
    }

    fn compare(shape: Shape, dtype: DType, original: &[f32], decoded: &[f32]) -> HeadErrors {
        let (original, decoded) = (bytes(dtype, original), bytes(dtype, decoded));
        let chunk = |bytes| Chunk::new(shape, dtype, bytes).unwrap();
        let mut errors = HeadErrors::default();
        errors.add(chunk(&original), chunk(&decoded)).unwrap();
        errors
    }

    fn flat(original: &[f32], decoded: &[f32]) -> TensorError {
        let shape = Shape::new(original.len(), 1, 1);
        compare(shape, DType::F32, original, decoded).total().error()
    }

    /// Numbers of a fixed sequence (xorshift, seed 1): multiples of 1/16 from -4 to 4.
    fn numbers(count: usize) -> Vec<f32> {
        let mut state = 1u64;
        let number = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 20) % 129) as f32 / 16.0 - 4.0
        };
        std::iter::repeat_with(number).take(count).collect()
    }

    #[test]
    fn numbers_worked_out_by_hand() {
        // d = 0, 1, -2, 0; Σx² = 1 + 4 + 16 + 4 = 25; Σr² = 1 + 9 + 4 + 4 = 18; Σxr = 1 + 6 + 8 + 4 = 19.
        let error = flat(&[1.0, 2.0, 4.0, -2.0], &[1.0, 3.0, 2.0, -2.0]);
        assert_eq!((error.elements, error.changed, error.broken), (4, 2, 0));
        assert_eq!((error.mae, error.rmse, error.nmse, error.max_abs), (0.75, 1.25f64.sqrt(), 0.2, 2.0));
        assert_eq!(error.cosine, 19.0 / (25.0 * 18.0f64).sqrt());
        assert_eq!(error.snr_db, Some(-10.0 * 0.2f64.log10()));
    }

    #[test]
    fn nothing_and_zeros_are_defined() {
        let exact = |error: TensorError| (error.rmse, error.nmse, error.snr_db, error.cosine);
        assert_eq!(exact(HeadErrors::default().total().error()), (0.0, 0.0, None, 1.0));
        assert_eq!(exact(flat(&[0.0; 3], &[0.0; 3])), (0.0, 0.0, None, 1.0));
        let sign = flat(&[0.0; 3], &[0.0, -0.0, 0.0]);
        assert_eq!((exact(sign), sign.changed), ((0.0, 0.0, None, 1.0), 1));
        let noise = flat(&[0.0, 0.0], &[0.0, 2.0]);
        assert_eq!((noise.mae, noise.max_abs, noise.cosine), (1.0, 2.0, 0.0));
        assert_eq!((noise.nmse, noise.snr_db), (f64::INFINITY, Some(f64::NEG_INFINITY)));
        let lost = flat(&[0.0, 2.0], &[0.0, 0.0]);
        assert_eq!((lost.nmse, lost.snr_db, lost.cosine), (1.0, Some(0.0), 0.0));
        let empty = compare(Shape::new(3, 2, 0), DType::F16, &[], &[]);
        assert_eq!((empty.heads().len(), exact(empty.total().error())), (2, (0.0, 0.0, None, 1.0)));
    }

    #[test]
    fn what_is_not_finite_is_counted_and_kept_out_of_sums() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        for dtype in DType::ALL {
            // Nine channels, so that the last is behind the whole vectors.
            let original = [1.0, inf, 2.0, -inf, 3.0, nan, 1.0, 1.0, nan];
            let mut decoded = original;
            decoded[0] = 2.0;
            let kept = compare(Shape::new(1, 1, 9), dtype, &original, &decoded).heads()[0];
            assert_eq!((kept.values, kept.kept_non_finite, kept.broken, kept.changed), (5, 4, 0, 1));
            assert_eq!((kept.sum_abs, kept.sum_original, kept.sum_decoded), (1.0, 16.0, 19.0));
            assert!(kept.error().cosine < 1.0);

            let equal = compare(Shape::new(1, 1, 9), dtype, &original, &original).heads()[0];
            assert_eq!((equal.values, equal.kept_non_finite, equal.changed, equal.sum_original), (5, 4, 0, 16.0));
            assert_eq!(equal.error().cosine, 1.0);

            for (idx, number) in [(1, -inf), (3, 0.0), (2, inf), (0, nan), (8, 1.0)] {
                let mut decoded = original;
                decoded[idx] = number;
                let broken = compare(Shape::new(1, 1, 9), dtype, &original, &decoded).heads()[0];
                assert_eq!((broken.broken, broken.changed, broken.elements()), (1, 1, 9), "{dtype} {idx}");
                let error = broken.error();
                let infinite = [error.mae, error.rmse, error.nmse, error.max_abs];
                assert_eq!((infinite, error.snr_db), ([f64::INFINITY; 4], Some(f64::NEG_INFINITY)));
                assert!(error.cosine.is_nan());
                let json = serde_json::to_value(error).unwrap();
                assert!(["mae", "nmse", "snr_db", "cosine"].iter().all(|name| json[name].is_null()));
            }
        }
    }

    #[test]
    fn heads_follow_a_plain_sum() {
        for (shape, dtype) in [
            (Shape::new(7, 3, 5), DType::F16),
            (Shape::new(4, 2, 64), DType::Bf16),
            (Shape::new(3, 2, 2 * PIECE + 13), DType::F32),
        ] {
            let original = numbers(shape.elements());
            let decoded: Vec<f32> = original.iter().enumerate().map(|(i, x)| x + [0.0, 0.5, -0.25][i % 3]).collect();
            let found = compare(shape, dtype, &original, &decoded);
            // Bf16 has eight bits, which is what these numbers need: none is rounded, and all sums are of multiples of 2^-8.
            for (head, sums) in found.heads().iter().enumerate() {
                let mut expected = ErrorSums::default();
                for (i, (x, r)) in original.iter().zip(&decoded).enumerate() {
                    if i / shape.dim % shape.heads == head {
                        let (x, r) = (f64::from(*x), f64::from(*r));
                        expected.values += 1;
                        expected.changed += u64::from(x != r);
                        expected.sum_abs += (r - x).abs();
                        expected.sum_squares += (r - x) * (r - x);
                        expected.sum_original += x * x;
                        expected.sum_decoded += r * r;
                        expected.sum_product += x * r;
                        expected.max_abs = expected.max_abs.max((r - x).abs());
                    }
                }
                assert_eq!(*sums, expected, "{dtype} {shape} head {head}");
            }
        }
    }

    #[test]
    fn equal_bytes_take_a_shorter_way_to_the_same_bits() {
        // Irrational numbers, so that another order of additions would show; the long way is taken because of the sign of a zero.
        let shape = Shape::new(9, 2, 37);
        let mut original: Vec<f32> = numbers(shape.elements()).iter().map(|x| (x * x + 0.7).sqrt()).collect();
        original[5] = 0.0;
        let mut decoded = original.clone();
        decoded[5] = -0.0;
        let (short, long) =
            (compare(shape, DType::F32, &original, &original), compare(shape, DType::F32, &original, &decoded));
        for (short, long) in short.heads().iter().zip(long.heads()) {
            assert_eq!(*short, ErrorSums { changed: 0, ..*long });
        }
        assert_eq!(long.heads()[0].changed, 1);
    }

    #[test]
    fn chunks_are_added_in_order_and_merged() {
        let shape = Shape::new(6, 2, 3);
        let (original, decoded) = (numbers(36), numbers(37)[1..].to_vec());
        let whole = compare(shape, DType::F16, &original, &decoded);
        let mut parts = compare(shape.with_seq(2), DType::F16, &original[..12], &decoded[..12]);
        parts.merge(&compare(shape.with_seq(4), DType::F16, &original[12..], &decoded[12..])).unwrap();
        parts.merge(&HeadErrors::default()).unwrap();
        // All numbers are multiples of 1/16, so no order of additions rounds.
        assert_eq!(parts, whole);
    }

    #[test]
    fn errors_name_expected_and_got() {
        let bytes = [0; 24];
        let chunk = |shape, dtype| Chunk::new(shape, dtype, &bytes).unwrap();
        let mut errors = HeadErrors::default();
        let (wide, tall) = (chunk(Shape::new(1, 3, 4), DType::F16), chunk(Shape::new(3, 1, 4), DType::F16));
        let error = errors.add(wide, tall).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ShapeMismatch);
        assert_eq!(error.to_string(), "expected a f16 tensor of shape (1, 3, 4), got f16 of (3, 1, 4)");
        errors.add(wide, wide).unwrap();
        assert_eq!(errors.add(tall, tall).unwrap_err().to_string(), "expected 3 heads as before, got 1");
        assert!(errors.add(wide, chunk(Shape::new(1, 3, 4), DType::Bf16)).is_err());
    }

    #[test]
    fn reports_name_the_worst_and_the_first_among_equals() {
        let placed = |run: &str, layer, role, head, original: &[f32], decoded: &[f32]| {
            let shape = Shape::new(1, 1, original.len());
            let sums = compare(shape, DType::F32, original, decoded).heads()[0];
            PlacedSums { run: run.to_owned(), layer, role, head, sums }
        };
        let sums = || {
            [
                placed("b", 0, Role::Key, 0, &[1.0, 1.0], &[1.0, 2.0]),
                placed("a", 1, Role::Value, 0, &[1.0, 0.0], &[1.0, 1.0]),
                placed("a", 0, Role::Key, 1, &[2.0, 0.0], &[0.0, 1.0]),
                placed("a", 0, Role::Key, 0, &[4.0, 4.0], &[4.0, 4.0]),
            ]
        };
        let report = ErrorReport::of(sums());
        let mut reversed = sums();
        reversed.reverse();
        assert_eq!(ErrorReport::of(reversed), report);
        let place = |head: &HeadError| (head.run.clone(), head.layer, head.role, head.head);
        let order: Vec<_> = report.heads.iter().map(place).collect();
        let name = |run: &str, layer, role, head| (run.to_owned(), layer, role, head);
        let (key, value) = (Role::Key, Role::Value);
        assert_eq!(order, [name("a", 0, key, 0), name("a", 0, key, 1), name("a", 1, value, 0), name("b", 0, key, 0)]);
        assert_eq!(report.all.worst_cosine.as_ref().map(place), Some(name("a", 0, key, 1)));
        assert_eq!(report.all.worst_nmse.as_ref().map(place), Some(name("a", 0, key, 1)));
        let [keys, values] = report.roles.as_slice() else { panic!("two roles") };
        assert_eq!((keys.role, values.role), (Some(key), Some(value)));
        assert_eq!(keys.error.nmse, (1.0 + 5.0) / (2.0 + 4.0 + 32.0));
        assert_eq!(values.worst_nmse.as_ref().map(place), Some(name("a", 1, value, 0)));
        assert_eq!(report.all.worst_layer.as_ref().map(|layer| (layer.layer, layer.role)), Some((1, value)));
        assert_eq!(report.layers.len(), 2);

        let exact = ErrorReport::of([placed("a", 0, key, 0, &[1.0], &[1.0]), placed("a", 0, key, 1, &[1.0], &[1.0])]);
        assert_eq!(exact.all.worst_cosine.map(|head| head.head), Some(0));
        let broken =
            ErrorReport::of([placed("a", 0, key, 0, &[1.0], &[-1.0]), placed("a", 0, key, 1, &[1.0], &[f32::NAN])]);
        assert_eq!(broken.all.worst_cosine.as_ref().map(|head| head.head), Some(1));
        assert_eq!(broken.roles.len(), 1);
        assert_eq!(ErrorReport::of([]).all.worst_nmse, None);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["heads"][0]["run"], &json["heads"][0]["snr_db"]), (&"a".into(), &serde_json::Value::Null));
    }
}
