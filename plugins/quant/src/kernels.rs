//! Loops over all elements of a chunk: numbers, ranges of groups, codes, and back.
//!
//! Plain loops that the compiler vectorises. What runs inside `dispatch` must be inlined into it, or it is compiled without the vectors.
//! That holds for the closure, too: one that could be called twice is called by way of a function that is not always inlined, so each
//! moves a reference out of itself (`let out = out;`), after which it can be called once only.

#![expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]

use pulp::Arch;

use crate::layout::{Kind, Layout, piece};
use crate::number::{Format, Real};

/// A code in memory: one byte, or two little-endian ones.
pub(crate) trait Code: Copy {
    fn slice(bytes: &[u8]) -> &[Self];
    fn slice_mut(bytes: &mut [u8]) -> &mut [Self];
    fn new(value: u16) -> Self;
    fn value(self) -> u16;
}

impl Code for [u8; 1] {
    fn slice(bytes: &[u8]) -> &[Self] {
        bytes.as_chunks().0
    }

    fn slice_mut(bytes: &mut [u8]) -> &mut [Self] {
        bytes.as_chunks_mut().0
    }

    #[inline(always)]
    fn new(value: u16) -> Self {
        [value as u8]
    }

    #[inline(always)]
    fn value(self) -> u16 {
        self[0].into()
    }
}

impl Code for [u8; 2] {
    fn slice(bytes: &[u8]) -> &[Self] {
        bytes.as_chunks().0
    }

    fn slice_mut(bytes: &mut [u8]) -> &mut [Self] {
        bytes.as_chunks_mut().0
    }

    #[inline(always)]
    fn new(value: u16) -> Self {
        value.to_le_bytes()
    }

    #[inline(always)]
    fn value(self) -> u16 {
        u16::from_le_bytes(self)
    }
}

/// Codes of so many bits, and where zero is among them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Levels {
    /// The least and the greatest multiple of a scale.
    pub(crate) low: i32,
    pub(crate) high: i32,
}

impl Levels {
    pub(crate) fn new(bits: u8, symmetric: bool) -> Self {
        if symmetric {
            let high = (1 << (bits - 1)) - 1;
            return Self { low: -high, high };
        }
        Self { low: 0, high: (1 << bits) - 1 }
    }
}

/// Reads elements as numbers, those that are not finite as NaN; tells whether there are such.
pub(crate) fn load<F: Format>(bytes: &[u8], out: &mut Vec<F::Real>) -> bool {
    let elements = F::elements(bytes);
    out.clear();
    out.resize(elements.len(), F::Real::ZERO);
    Arch::new().dispatch(
        #[inline(always)]
        move || {
            let out = out;
            let mut odd = false;
            for (out, bytes) in out.iter_mut().zip(elements) {
                let value = F::unpack(*bytes);
                *out = value;
                // A value is not equal to itself if it is NaN.
                odd |= value.partial_cmp(&value).is_none();
            }
            odd
        },
    )
}

#[inline(always)]
fn less<R: Real>(a: R, b: R) -> R {
    if a < b { a } else { b }
}

#[inline(always)]
fn more<R: Real>(a: R, b: R) -> R {
    if a > b { a } else { b }
}

/// Numbers that are compared at once.
const LANES: usize = 16;

#[inline(always)]
fn extremes<R: Real>(values: &[R]) -> (R, R) {
    let (blocks, rest) = values.as_chunks::<LANES>();
    let (mut low, mut high) = ([R::INFINITY; LANES], [R::ZERO - R::INFINITY; LANES]);
    for block in blocks {
        low = std::array::from_fn(|lane| less(block[lane], low[lane]));
        high = std::array::from_fn(|lane| more(block[lane], high[lane]));
    }
    let (mut least, mut most) = (R::INFINITY, R::ZERO - R::INFINITY);
    for value in low.iter().chain(rest) {
        least = less(*value, least);
    }
    for value in high.iter().chain(rest) {
        most = more(*value, most);
    }
    (least, most)
}

/// Ranges of the columns of whole rows.
///
/// A block of columns at a time, with its bounds in registers: bounds in memory would be stored at every row, and stores that depend on a
/// comparison, which the compiler makes of that, took five times as long here (x86-64 with AVX2, 2026-11).
#[inline(always)]
fn columns<R: Real>(values: &[R], row: usize, low: &mut [R], high: &mut [R]) {
    const BLOCK: usize = 32;
    let (low, low_rest) = low.as_chunks_mut::<BLOCK>();
    let (high, high_rest) = high.as_chunks_mut::<BLOCK>();
    let whole = low.len() * BLOCK;
    for (block, (low, high)) in low.iter_mut().zip(high).enumerate() {
        let (mut least, mut most) = (*low, *high);
        for values in values.chunks_exact(row) {
            let Some(values) = values[block * BLOCK..].first_chunk::<BLOCK>() else { break };
            least = std::array::from_fn(|lane| less(values[lane], least[lane]));
            most = std::array::from_fn(|lane| more(values[lane], most[lane]));
        }
        (*low, *high) = (least, most);
    }
    for values in values.chunks_exact(row) {
        for ((value, low), high) in values[whole..].iter().zip(&mut *low_rest).zip(&mut *high_rest) {
            *low = less(*value, *low);
            *high = more(*value, *high);
        }
    }
}

/// Calls `each` with the index of the group and the elements of every run of neighbours that share one; not for groups along tokens.
#[inline(always)]
fn runs(layout: &Layout, mut each: impl FnMut(usize, std::ops::Range<usize>)) {
    let (shape, kind) = (layout.shape, layout.kind);
    for vector in 0..shape.seq * shape.heads {
        let start = vector * shape.dim;
        match kind {
            Kind::Tensor => each(0, start..start + shape.dim),
            Kind::Head => each(vector % shape.heads, start..start + shape.dim),
            Kind::Token(parts) | Kind::Channel(parts) => {
                for part in 0..parts {
                    let (from, to) = piece(shape.dim, parts, part);
                    each(vector * parts + part, start + from..start + to);
                }
            }
        }
    }
}

/// Calls `each` with the parameters and the elements of every row; for groups along tokens.
#[inline(always)]
fn rows(layout: &Layout, parts: usize, mut each: impl FnMut(std::ops::Range<usize>, std::ops::Range<usize>)) {
    let (seq, row) = (layout.shape.seq, layout.shape.row());
    for part in 0..parts {
        let (from, to) = piece(seq, parts, part);
        for idx in from..to {
            each(part * row..(part + 1) * row, idx * row..(idx + 1) * row);
        }
    }
}

/// The least and the greatest number of each group, NaN aside; infinities the wrong way round if there is none.
pub(crate) fn ranges<R: Real>(layout: &Layout, values: &[R], low: &mut Vec<R>, high: &mut Vec<R>) {
    let count = layout.parameters().elements();
    for (bounds, start) in [(&mut *low, R::INFINITY), (&mut *high, R::ZERO - R::INFINITY)] {
        bounds.clear();
        bounds.resize(count, start);
    }
    if values.is_empty() {
        return;
    }
    Arch::new().dispatch(
        #[inline(always)]
        move || {
            let (low, high) = (low, high);
            match layout.kind {
                Kind::Channel(parts) => {
                    let row = layout.shape.row();
                    let bounds = low.chunks_exact_mut(row).zip(high.chunks_exact_mut(row));
                    for (part, (low, high)) in bounds.enumerate() {
                        let (from, to) = piece(layout.shape.seq, parts, part);
                        columns(&values[from * row..to * row], row, low, high);
                    }
                }
                _ => runs(
                    layout,
                    #[inline(always)]
                    |group, elements| {
                        let (least, most) = extremes(&values[elements]);
                        low[group] = less(least, low[group]);
                        high[group] = more(most, high[group]);
                    },
                ),
            }
        },
    );
}

/// Parameters of each group as numbers: what a code of zero stands for, and the scale, or one divided by it.
pub(crate) struct Parameters<'a, R> {
    pub(crate) zero: &'a [R],
    pub(crate) scale: &'a [R],
}

/// The nearest level of a number of steps; NaN is the lowest.
#[inline(always)]
fn level<R: Real>(steps: R, low: R, high: R, offset: u16) -> u16 {
    less(more(steps, low), high).nearest().wrapping_add(offset)
}

#[inline(always)]
fn multiple<R: Real, C: Code>(code: C, low: i32, zero: R, scale: R) -> R {
    zero + R::integer(i32::from(code.value()) + low) * scale
}

/// Codes of all numbers; that of NaN is the least.
pub(crate) fn quantise<R: Real, C: Code>(
    layout: &Layout,
    levels: Levels,
    values: &[R],
    parameters: &Parameters<'_, R>,
    codes: &mut [C],
) {
    if values.is_empty() {
        return;
    }
    let (low, high, offset) = (R::integer(levels.low), R::integer(levels.high), levels.low.unsigned_abs() as u16);
    let code = |value: R, zero: R, inverse: R| C::new(level((value - zero) * inverse, low, high, offset));
    Arch::new().dispatch(
        #[inline(always)]
        move || {
            let codes = codes;
            match layout.kind {
                Kind::Channel(parts) => rows(
                    layout,
                    parts,
                    #[inline(always)]
                    |place, elements| {
                        let parameters = parameters.zero[place.clone()].iter().zip(&parameters.scale[place]);
                        let pairs = codes[elements.clone()].iter_mut().zip(&values[elements]);
                        for ((out, value), (zero, inverse)) in pairs.zip(parameters) {
                            *out = code(*value, *zero, *inverse);
                        }
                    },
                ),
                _ => runs(
                    layout,
                    #[inline(always)]
                    |group, elements| {
                        let (zero, inverse) = (parameters.zero[group], parameters.scale[group]);
                        for (out, value) in codes[elements.clone()].iter_mut().zip(&values[elements]) {
                            *out = code(*value, zero, inverse);
                        }
                    },
                ),
            }
        },
    );
}

/// The elements that codes stand for.
pub(crate) fn restore<F: Format, C: Code>(
    layout: &Layout,
    levels: Levels,
    codes: &[C],
    parameters: &Parameters<'_, F::Real>,
    out: &mut [F::Bytes],
) {
    if codes.is_empty() {
        return;
    }
    let element = |code: C, zero: F::Real, scale: F::Real| F::pack(multiple(code, levels.low, zero, scale));
    Arch::new().dispatch(
        #[inline(always)]
        move || {
            let out = out;
            match layout.kind {
                Kind::Channel(parts) => rows(
                    layout,
                    parts,
                    #[inline(always)]
                    |place, elements| {
                        let parameters = parameters.zero[place.clone()].iter().zip(&parameters.scale[place]);
                        let pairs = out[elements.clone()].iter_mut().zip(&codes[elements]);
                        for ((out, code), (zero, scale)) in pairs.zip(parameters) {
                            *out = element(*code, *zero, *scale);
                        }
                    },
                ),
                _ => runs(
                    layout,
                    #[inline(always)]
                    |group, elements| {
                        let (zero, scale) = (parameters.zero[group], parameters.scale[group]);
                        for (out, code) in out[elements.clone()].iter_mut().zip(&codes[elements]) {
                            *out = element(*code, zero, scale);
                        }
                    },
                ),
            }
        },
    );
}

/// Replaces codes by their differences to those `row` codes earlier, modulo `2^bits`.
pub(crate) fn difference<C: Code>(codes: &mut [C], row: usize, bits: u8) {
    let mask = u16::MAX >> (16 - bits);
    Arch::new().dispatch(
        #[inline(always)]
        move || {
            let codes = codes;
            for start in (row..codes.len()).step_by(row.max(1)).rev() {
                let (before, rest) = codes.split_at_mut(start);
                for (code, before) in rest[..row].iter_mut().zip(&before[start - row..]) {
                    *code = C::new(code.value().wrapping_sub(before.value()) & mask);
                }
            }
        },
    );
}

/// Undoes [`difference`].
pub(crate) fn sum<C: Code>(codes: &mut [C], row: usize, bits: u8) {
    let mask = u16::MAX >> (16 - bits);
    Arch::new().dispatch(
        #[inline(always)]
        move || {
            let codes = codes;
            for start in (row..codes.len()).step_by(row.max(1)) {
                let (before, rest) = codes.split_at_mut(start);
                for (code, before) in rest[..row].iter_mut().zip(&before[start - row..]) {
                    *code = C::new(code.value().wrapping_add(before.value()) & mask);
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use gearbox_core::{Role, Shape};

    use super::*;
    use crate::number::{F16, F32};
    use crate::settings::Granularity;

    /// Compares the loops with the definition, one element at a time.
    fn check<F: Format, C: Code + PartialEq + std::fmt::Debug>(granularity: Granularity, shape: Shape, levels: Levels)
    where
        F::Bytes: PartialEq + std::fmt::Debug + Default,
        F::Real: std::fmt::Debug,
    {
        let layout = Layout::new(granularity, Some(7), Role::Key, shape);
        let number = |i: usize| F::Real::of(((i * i * 7919 + i * 31) % 4001) as f64 / 16.0 - 100.0);
        let mut values: Vec<F::Real> = (0..shape.elements()).map(number).collect();
        values[shape.elements() / 2] = F::Real::NAN;
        let (mut low, mut high) = (Vec::new(), Vec::new());
        ranges(&layout, &values, &mut low, &mut high);
        let scale: Vec<_> = (0..low.len()).map(|group| F::Real::of(0.25 + group as f64 / 64.0)).collect();
        let parameters = Parameters { zero: &low, scale: &scale };
        let mut codes = vec![C::new(0xEEEE); values.len()];
        quantise(&layout, levels, &values, &parameters, &mut codes);
        let mut restored = vec![F::Bytes::default(); values.len()];
        restore::<F, C>(&layout, levels, &codes, &parameters, &mut restored);
        for (group, members) in layout.groups().enumerate() {
            let own: Vec<F::Real> = members.places().map(|place| values[place]).collect();
            let least = own.iter().fold(F::Real::INFINITY, |least, value| less(*value, least));
            let most = own.iter().fold(F::Real::ZERO - F::Real::INFINITY, |most, value| more(*value, most));
            assert_eq!(
                (low[group].wide(), high[group].wide()),
                (least.wide(), most.wide()),
                "{layout:?}, group {group}"
            );
            for place in members.places() {
                let steps = ((values[place] - low[group]) * scale[group]).wide().round_ties_even();
                let steps = if steps.is_nan() { f64::from(levels.low) } else { steps };
                let steps = steps.clamp(f64::from(levels.low), f64::from(levels.high)) as i32;
                let code = C::new((steps - levels.low).unsigned_abs() as u16);
                assert_eq!(codes[place], code, "{layout:?}, element {place}");
                let value = F::pack(low[group] + F::Real::integer(steps) * scale[group]);
                assert_eq!(restored[place], value, "{layout:?}, element {place}");
            }
        }
        let (row, whole) = (shape.row(), codes.clone());
        difference(&mut codes, row, 8);
        assert_eq!(codes[..row], whole[..row]);
        for place in row..codes.len() {
            let expected = whole[place].value().wrapping_sub(whole[place - row].value()) & 0xFF;
            assert_eq!(codes[place].value(), expected);
        }
        sum(&mut codes, row, 8);
        assert!(codes.iter().zip(&whole).all(|(code, whole)| code.value() & 0xFF == whole.value() & 0xFF));
    }

    #[test]
    fn loops_agree_with_the_definition() {
        for granularity in [Granularity::Tensor, Granularity::Head, Granularity::Token, Granularity::Channel] {
            for shape in [Shape::new(1, 1, 1), Shape::new(30, 3, 13), Shape::new(25, 2, 64), Shape::new(26, 1, 100)] {
                for (bits, symmetric) in [(2, false), (8, false), (8, true), (5, true)] {
                    check::<F16, [u8; 1]>(granularity, shape, Levels::new(bits, symmetric));
                    check::<F32, [u8; 1]>(granularity, shape, Levels::new(bits, symmetric));
                }
                check::<F16, [u8; 2]>(granularity, shape, Levels::new(13, true));
                check::<F32, [u8; 2]>(granularity, shape, Levels::new(16, false));
            }
        }
    }
}
