//! The group quantiser that several transforms share: what [the crate's documentation](crate) says of codes and lanes.

use std::ops::Range as Rows;

use gearbox_core::{
    Chunk, ChunkMut, Context, DType, Elem, ElemSet, Error, ErrorKind, Lane, LaneSpec, Latents, Pool, Result, Shape,
};

use crate::escapes;
use crate::kernels::{self, Code, Levels, Parameters};
use crate::layout::Layout;
use crate::number::{Bf16, F16, F32, Format, Real, log2, put, round_down, round_up, take};
use crate::range;
use crate::settings::{Delta, Range, Spec};

pub(crate) const CODES: &str = "codes";
pub(crate) const SCALES: &str = "scales";
const ZEROS: &str = "zeros";
const DELTA: &str = "delta";
const EXACT: &str = "exact";

/// Bytes that differences must save for `delta: auto` to choose them: what the lane that says so costs.
const WORTH: f64 = 16.0;

/// Part by which rounding may widen a range; where it would be more, parameters are stored as F32.
const WIDEST: f64 = 1.125;

/// Quantises by one [`Spec`].
#[derive(Debug)]
pub(crate) struct Quantiser {
    spec: Spec,
    singles: Pool<Work<f32>>,
    doubles: Pool<Work<f64>>,
}

/// Buffers that are kept between chunks.
#[derive(Debug)]
struct Work<R> {
    /// The elements to quantise; NaN for those that are kept exact.
    values: Vec<R>,
    /// Range of each group.
    low: Vec<R>,
    high: Vec<R>,
    /// Parameters of each group: as numbers, and as they are stored.
    zero: Vec<R>,
    scale: Vec<R>,
    zeros: Vec<u8>,
    scales: Vec<u8>,
    codes: Vec<u8>,
}

impl<R> Default for Work<R> {
    fn default() -> Self {
        Self {
            values: Vec::new(),
            low: Vec::new(),
            high: Vec::new(),
            zero: Vec::new(),
            scale: Vec::new(),
            zeros: Vec::new(),
            scales: Vec::new(),
            codes: Vec::new(),
        }
    }
}

/// Error for tensors of a type that a later version of core may have.
pub(crate) fn unsupported(dtype: DType) -> Error {
    Error::new(ErrorKind::UnsupportedDType, format!("expected a tensor of {}, got {dtype}", ElemSet::FLOATS))
}

impl Quantiser {
    pub(crate) fn new(spec: Spec) -> Self {
        Self { spec, singles: Pool::default(), doubles: Pool::default() }
    }

    fn levels(&self) -> Levels {
        Levels::new(self.spec.bits, self.spec.symmetric)
    }

    /// The error of any element, as a part of the largest magnitude of the chunk.
    ///
    /// A range is at most twice the peak (once if symmetric, counted from zero), and rounding makes it at most [`WIDEST`] times as wide, so
    /// a scale is `s <= 9/8 * 2 * peak / steps`. (Where that cannot hold, all numbers are so small that they are multiples of the scale.)
    /// A value lies in the rounded range, thus at most `s/2` from its nearest level; computing in F32 adds less than `s/16`, because there
    /// are at most `2^16` levels and a sum of an F16 and a multiple of `s` is off by less than that or by less than half a step of F16,
    /// which rounding repairs. Rounding the restored number `y` to the element type at most doubles its distance to `x`, since `x` is an
    /// element: `|round(y) - x| <= |round(y) - y| + |y - x| <= 2 * |y - x|`. In all `9/8 * s`.
    pub(crate) fn peak_error(&self) -> f64 {
        let levels = self.levels();
        1.125 * WIDEST * 2.0 / f64::from(levels.high - levels.low)
    }

    pub(crate) fn forward(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()> {
        if chunk.bytes().is_empty() {
            return Ok(());
        }
        match chunk.dtype() {
            DType::F16 => self.singles.with(Work::default, |work| self.forward_as::<F16>(work, chunk, cx, out)),
            DType::Bf16 => self.doubles.with(Work::default, |work| self.forward_as::<Bf16>(work, chunk, cx, out)),
            DType::F32 => self.doubles.with(Work::default, |work| self.forward_as::<F32>(work, chunk, cx, out)),
            other => Err(unsupported(other)),
        }
    }

    pub(crate) fn inverse(&self, latents: &Latents, cx: &Context<'_>, out: ChunkMut<'_>) -> Result<()> {
        match out.dtype() {
            DType::F16 => self.singles.with(Work::default, |work| self.inverse_as::<F16>(work, latents, cx, out)),
            DType::Bf16 => self.doubles.with(Work::default, |work| self.inverse_as::<Bf16>(work, latents, cx, out)),
            DType::F32 => self.doubles.with(Work::default, |work| self.inverse_as::<F32>(work, latents, cx, out)),
            other => Err(unsupported(other)),
        }
    }

    /// Adds the restored values of a chunk to `out`, as lane `tensor`.
    pub(crate) fn forward_values(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()> {
        let mut latents = Latents::new();
        self.forward(chunk, cx, &mut latents)?;
        let bytes = out.push(LaneSpec::tensor(chunk.dtype(), chunk.shape()))?;
        self.inverse(&latents, cx, ChunkMut::new(chunk.shape(), chunk.dtype(), bytes)?)
    }

    /// The rows that are quantised: all but the first and the last of the sequence.
    fn rows(&self, cx: &Context<'_>, seq: usize) -> Rows<usize> {
        let place = |token: u64| usize::try_from(token.saturating_sub(cx.first_token)).unwrap_or(seq).min(seq);
        let start = place(self.spec.sink);
        let end = match cx.end_token {
            Some(end) if self.spec.recent > 0 => place(end.saturating_sub(self.spec.recent)),
            _ => seq,
        };
        start..end.max(start)
    }

    fn layout(&self, cx: &Context<'_>, shape: Shape) -> Layout {
        Layout::new(self.spec.granularity, self.spec.group, cx.role, shape)
    }

    fn forward_as<F: Format>(
        &self,
        work: &mut Work<F::Real>,
        chunk: Chunk<'_>,
        cx: &Context<'_>,
        out: &mut Latents,
    ) -> Result<()> {
        let (spec, levels, shape) = (&self.spec, self.levels(), chunk.shape());
        let rows = self.rows(cx, shape.seq);
        let layout = self.layout(cx, shape.with_seq(rows.len()));
        let bytes = chunk.tokens(rows.clone()).bytes();
        let mut escapes = kernels::load::<F>(bytes, &mut work.values);
        if spec.outliers > 0.0 {
            range::exclude(&layout, spec.outliers, &mut work.values);
            escapes = true;
        }
        let Work { values, low, high, .. } = work;
        match spec.range {
            Range::Full => kernels::ranges(&layout, values, low, high),
            rule => range::bounds(&layout, rule, levels, values, low, high),
        }
        let stored = self.parameters::<F>(work);
        let element = |name: &'static str, bytes: &[u8]| {
            let spec = LaneSpec::new(name, stored.into(), layout.parameters());
            (bytes.iter().any(|byte| *byte != 0)).then(|| Lane { spec, bytes: bytes.to_vec() })
        };
        let scales = element(SCALES, &work.scales);
        if scales.is_some() {
            let size = Elem::Bits(spec.bits).size();
            let mut codes = vec![0; work.values.len() * size];
            let parameters = Parameters { zero: &work.zero, scale: &work.scale };
            let differs = if size == 1 {
                self.code::<F, [u8; 1]>(&layout, &work.values, &parameters, &mut codes)
            } else {
                self.code::<F, [u8; 2]>(&layout, &work.values, &parameters, &mut codes)
            };
            out.push_lane(Lane { spec: LaneSpec::new(CODES, Elem::Bits(spec.bits), layout.shape), bytes: codes })?;
            if differs && spec.delta == Delta::Auto {
                out.push(LaneSpec::new(DELTA, Elem::Bits(1), Shape::flat(1)))?.fill(1);
            }
        }
        for lane in scales.into_iter().chain(element(ZEROS, &work.zeros)) {
            out.push_lane(lane)?;
        }
        if escapes {
            let places = work.values.iter().enumerate().filter(|(_, value)| value.partial_cmp(value).is_none());
            let places: Vec<usize> = places.map(|(place, _)| place).collect();
            if !places.is_empty() {
                let size = F::DTYPE.size();
                let kept = places.iter().flat_map(|place| &bytes[place * size..][..size]).copied().collect();
                let spec = LaneSpec::new(escapes::VALUES, F::DTYPE.into(), Shape::flat(places.len()));
                out.push_lane(Lane { spec, bytes: kept })?;
                out.push_lane(escapes::gaps(&places))?;
            }
        }
        let exact = shape.with_seq(shape.seq - rows.len());
        if exact.seq > 0 {
            let (first, last) = (chunk.tokens(0..rows.start), chunk.tokens(rows.end..shape.seq));
            let spec = LaneSpec::new(EXACT, F::DTYPE.into(), exact);
            out.push_lane(Lane { spec, bytes: [first.bytes(), last.bytes()].concat() })?;
        }
        Ok(())
    }

    /// Fills `codes`; tells whether they are differences.
    fn code<F: Format, C: Code>(
        &self,
        layout: &Layout,
        values: &[F::Real],
        parameters: &Parameters<'_, F::Real>,
        codes: &mut [u8],
    ) -> bool {
        let codes = C::slice_mut(codes);
        kernels::quantise(layout, self.levels(), values, parameters, codes);
        let row = layout.shape.row();
        let differs = match self.spec.delta {
            Delta::None => false,
            Delta::Token => true,
            Delta::Auto => differences_save(codes, row, self.spec.bits) > WORTH,
        };
        if differs {
            kernels::difference(codes, row, self.spec.bits);
        }
        differs
    }

    /// Finds the parameters of every group; tells as what they are stored.
    fn parameters<F: Format>(&self, work: &mut Work<F::Real>) -> DType {
        let asked = self.spec.scale.dtype();
        if self.parameters_as::<F>(asked, work) {
            return asked;
        }
        self.parameters_as::<F>(DType::F32, work);
        DType::F32
    }

    /// Finds the parameters of every group, rounded to a type; tells whether the type does.
    fn parameters_as<F: Format>(&self, stored: DType, work: &mut Work<F::Real>) -> bool {
        let Levels { low: least, high: most } = self.levels();
        let (steps, most) = (f64::from(most - least), f64::from(most));
        let symmetric = self.spec.symmetric;
        // Multiples of the smallest F16 are restored exactly.
        let finest: f64 = if (F::DTYPE, stored) == (DType::F16, DType::F16) { 1.0 / 16_777_216.0 } else { 0.0 };
        let Work { low, high, zero, scale, zeros, scales, .. } = work;
        zero.clear();
        scale.clear();
        zeros.clear();
        scales.clear();
        let mut fits = true;
        for (low, high) in low.iter().zip(&*high) {
            let (low, high) = (low.wide(), high.wide());
            let (mut minimum, mut step) = (0.0, 0.0);
            if low <= high {
                let (width, steps) = if symmetric {
                    (high.max(-low), most)
                } else {
                    // The sum gives zero its positive sign.
                    minimum = round_down(stored, low + 0.0);
                    (high - low, steps)
                };
                let reach = if symmetric { width } else { high - f64::from(minimum) };
                if reach > 0.0 {
                    step = round_up(stored, reach / steps);
                }
                let rounded = f64::from(step);
                fits &=
                    minimum.is_finite() && (rounded * steps <= WIDEST * width || rounded.to_bits() == finest.to_bits());
            }
            if !symmetric {
                put(stored, minimum, zeros);
            }
            put(stored, step, scales);
            zero.push(F::Real::of(minimum.into()));
            scale.push(F::Real::of(if step > 0.0 { 1.0 / f64::from(step) } else { 0.0 }));
        }
        fits
    }

    fn inverse_as<F: Format>(
        &self,
        work: &mut Work<F::Real>,
        latents: &Latents,
        cx: &Context<'_>,
        mut out: ChunkMut<'_>,
    ) -> Result<()> {
        let (dtype, shape) = (out.dtype(), out.shape());
        let shape = if out.bytes_mut().is_empty() { shape.with_seq(0) } else { shape };
        let rows = self.rows(cx, shape.seq);
        let layout = self.layout(cx, shape.with_seq(rows.len()));
        let lanes = Lanes::read(&self.spec, latents, dtype, &layout, shape.seq - rows.len())?;
        let row = shape.row() * dtype.size();
        let bytes = out.bytes_mut();
        let (first, rest) = bytes.split_at_mut(rows.start * row);
        let (middle, last) = rest.split_at_mut(rows.len() * row);
        let (exact_first, exact_last) = lanes.exact.split_at(first.len());
        first.copy_from_slice(exact_first);
        last.copy_from_slice(exact_last);

        let groups = layout.parameters().elements();
        let Work { zero, scale, codes, .. } = work;
        for (numbers, lane) in [(&mut *zero, lanes.zeros), (&mut *scale, lanes.scales)] {
            numbers.clear();
            match lane {
                Some((stored, bytes)) => take(stored, bytes, numbers),
                None => numbers.resize(groups, F::Real::ZERO),
            }
        }
        let parameters = Parameters { zero, scale };
        let elements = F::elements_mut(middle);
        match Elem::Bits(self.spec.bits).size() {
            1 => self.restore::<F, [u8; 1]>(&layout, &lanes, codes, &parameters, elements),
            _ => self.restore::<F, [u8; 2]>(&layout, &lanes, codes, &parameters, elements),
        }
        let size = dtype.size();
        for (place, value) in lanes.places.iter().zip(lanes.escapes.chunks_exact(size)) {
            middle[place * size..][..size].copy_from_slice(value);
        }
        Ok(())
    }

    fn restore<F: Format, C: Code>(
        &self,
        layout: &Layout,
        lanes: &Lanes<'_>,
        buffer: &mut Vec<u8>,
        parameters: &Parameters<'_, F::Real>,
        out: &mut [F::Bytes],
    ) {
        let (levels, row) = (self.levels(), layout.shape.row());
        buffer.clear();
        let codes = match lanes.codes {
            Some(codes) if lanes.differs => {
                buffer.extend_from_slice(codes);
                kernels::sum(C::slice_mut(buffer), row, self.spec.bits);
                C::slice(buffer)
            }
            Some(codes) => C::slice(codes),
            None => {
                // Without scales any code will do.
                buffer.resize(size_of_val(out) / F::DTYPE.size() * size_of::<C>(), 0);
                C::slice(buffer)
            }
        };
        kernels::restore::<F, C>(layout, levels, codes, parameters, out);
    }
}

/// Bytes that differences along tokens save, by the entropies of the upper eight bits: those below are noise either way.
fn differences_save<C: Code>(codes: &[C], row: usize, bits: u8) -> f64 {
    let (mask, shift) = (u16::MAX >> (16 - bits), bits.saturating_sub(8));
    // Half of what is cut off, so that small differences of either sign meet.
    let half = if shift > 0 { 1 << (shift - 1) } else { 0 };
    let mut counts = [[0u32; 256]; 2];
    for (code, before) in codes.iter().skip(row).zip(codes) {
        let (code, before) = (code.value(), before.value());
        let difference = code.wrapping_sub(before).wrapping_add(half) & mask;
        counts[0][usize::from(code >> shift) % 256] += 1;
        counts[1][usize::from(difference >> shift) % 256] += 1;
    }
    let total = codes.len().saturating_sub(row) as f64;
    let [plain, differences] = counts.map(|counts| {
        let cost = |count: &u32| f64::from(*count) * (log2(total) - log2(f64::from(*count)));
        counts.iter().filter(|count| **count > 0).map(cost).fold(0.0, |sum, bits| sum + bits) / 8.0
    });
    plain - differences
}

/// The lanes of a chunk, checked.
struct Lanes<'a> {
    codes: Option<&'a [u8]>,
    /// Whether the codes are differences.
    differs: bool,
    scales: Option<(DType, &'a [u8])>,
    zeros: Option<(DType, &'a [u8])>,
    /// Elements that are kept as they are, and their places.
    escapes: &'a [u8],
    places: Vec<usize>,
    /// Rows that are kept as they are.
    exact: &'a [u8],
}

impl<'a> Lanes<'a> {
    fn read(spec: &Spec, latents: &'a Latents, dtype: DType, layout: &Layout, exact_rows: usize) -> Result<Self> {
        let mut rest: Vec<&Lane> = latents.lanes().iter().collect();
        let mut lane = |name: &str| {
            let idx = rest.iter().position(|lane| lane.spec.name == name)?;
            Some(rest.swap_remove(idx))
        };
        let (codes, scales, zeros) = (lane(CODES), lane(SCALES), lane(ZEROS));
        let (delta, values, gaps, exact) = (lane(DELTA), lane(escapes::VALUES), lane(escapes::GAPS), lane(EXACT));
        if let Some(unknown) = rest.first() {
            return Err(Error::corrupt(format!("{} is unknown here", unknown.spec)));
        }
        if zeros.is_some() && spec.symmetric {
            return Err(Error::corrupt(format!("lane `{ZEROS}` is not expected with symmetric codes")));
        }
        if codes.is_some() != scales.is_some() {
            return Err(Error::corrupt(format!("expected `{CODES}` and `{SCALES}`, or neither")));
        }
        let codes = codes.map(|lane| bytes(lane, Elem::Bits(spec.bits), layout.shape)).transpose()?;
        let parameters = |lane: Option<&'a Lane>| {
            let Some(lane) = lane else { return Ok(None) };
            let stored = lane.spec.elem.dtype().filter(|stored| [spec.scale.dtype(), DType::F32].contains(stored));
            let stored = stored.unwrap_or(spec.scale.dtype());
            Ok(Some((stored, bytes(lane, stored.into(), layout.parameters())?)))
        };
        let (scales, zeros) = (parameters(scales)?, parameters(zeros)?);
        let marked = match delta {
            Some(lane) if spec.delta == Delta::Auto => bytes(lane, Elem::Bits(1), Shape::flat(1))? != [0],
            Some(lane) => return Err(Error::corrupt(format!("{} is unknown here", lane.spec))),
            None => false,
        };
        let (escapes, places) = match (values, gaps) {
            (Some(values), Some(gaps)) => {
                let count = values.spec.shape.elements();
                let places = escapes::places(gaps, count, layout.shape.elements())?;
                (bytes(values, dtype.into(), Shape::flat(count))?, places)
            }
            (None, None) => (&[][..], Vec::new()),
            _ => {
                return Err(Error::corrupt(format!(
                    "expected `{}` and `{}`, or neither",
                    escapes::VALUES,
                    escapes::GAPS
                )));
            }
        };
        let exact_shape = layout.shape.with_seq(exact_rows);
        let exact = match exact {
            Some(lane) => bytes(lane, dtype.into(), exact_shape)?,
            None if exact_shape.elements() == 0 => &[],
            None => return Err(Error::corrupt(format!("lane `{EXACT}` is missing, expected {exact_rows} rows"))),
        };
        Ok(Self { codes, differs: marked || spec.delta == Delta::Token, scales, zeros, escapes, places, exact })
    }
}

/// The bytes of a lane that must have this type and shape.
pub(crate) fn bytes(lane: &Lane, elem: Elem, shape: Shape) -> Result<&[u8]> {
    if lane.spec.elem == elem && lane.spec.shape == shape {
        return Ok(&lane.bytes);
    }
    Err(Error::corrupt(format!("expected {elem} {shape}, got {}", lane.spec)))
}
