//! The streams of a tensor, in reused buffers.

use gearbox_core::{Chunk, DType, Error, ErrorKind, Result};

use crate::kernels;

/// Width of the words of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    Two,
    Four,
}

impl Width {
    pub(crate) fn of(dtype: DType) -> Result<Self> {
        match dtype.size() {
            2 => Ok(Self::Two),
            4 => Ok(Self::Four),
            _ => {
                Err(Error::new(ErrorKind::UnsupportedDType, format!("expected 2 or 4 bytes per element, got {dtype}")))
            }
        }
    }

    /// Puts words together; with `delta_row` the high halves are a delta along rows of that many words.
    pub(crate) fn merge(self, hi: &[u8], lo: &[u8], delta_row: Option<usize>, out: &mut [u8]) {
        match (self, delta_row) {
            (Self::Two, None) => kernels::merge16(hi, lo, out),
            (Self::Two, Some(row)) => kernels::merge16_delta(hi, lo, row, out),
            (Self::Four, None) => kernels::merge32(hi, lo, out),
            (Self::Four, Some(row)) => kernels::merge32_delta(hi, lo, row, out),
        }
    }
}

/// The streams of one tensor: its high halves, their delta along tokens, its low halves. The buffers are used again.
///
/// Each stream keeps the element order of the tensor, so the run of one head can be cut out of a stream as out of the tensor.
///
/// # Examples
/// ```
/// use gearbox_core::{Chunk, DType, Shape};
/// use gearbox_gear::Streams;
///
/// let mut streams = Streams::default();
/// streams.split_both(Chunk::new(Shape::new(2, 1, 1), DType::F16, &[0x10, 0x34, 0x20, 0x35]).unwrap()).unwrap();
/// assert_eq!(streams.hi(), [0x34, 0x35]);
/// assert_eq!(streams.hi_delta(), [0x34, 0x01]);
/// assert_eq!(streams.lo(), [0x10, 0x20]);
/// ```
#[derive(Debug, Default)]
pub struct Streams {
    hi: Vec<u8>,
    delta: Vec<u8>,
    lo: Vec<u8>,
}

impl Streams {
    /// Splits a tensor into high and low halves; there is no delta stream until the next [`Streams::split_both`].
    ///
    /// # Errors
    /// [`ErrorKind::UnsupportedDType`] unless elements have two or four bytes.
    pub fn split(&mut self, chunk: Chunk<'_>) -> Result<()> {
        let width = Width::of(chunk.dtype())?;
        let len = chunk.bytes().len() / 2;
        self.hi.resize(len, 0);
        self.delta.clear();
        self.lo.resize(len, 0);
        match width {
            Width::Two => kernels::split16(chunk.bytes(), &mut self.hi, &mut self.lo),
            Width::Four => kernels::split32(chunk.bytes(), &mut self.hi, &mut self.lo),
        }
        Ok(())
    }

    /// Splits a tensor into the delta of its high halves and its low halves; there are no high halves until another split.
    ///
    /// # Errors
    /// As [`Streams::split`].
    pub fn split_delta(&mut self, chunk: Chunk<'_>) -> Result<()> {
        let width = Width::of(chunk.dtype())?;
        let len = chunk.bytes().len() / 2;
        let row = chunk.shape().row();
        self.hi.clear();
        self.delta.resize(len, 0);
        self.lo.resize(len, 0);
        match width {
            Width::Two => kernels::split16_delta(chunk.bytes(), row, &mut self.delta, &mut self.lo),
            Width::Four => kernels::split32_delta(chunk.bytes(), row, &mut self.delta, &mut self.lo),
        }
        Ok(())
    }

    /// Splits a tensor into all three streams in one pass.
    ///
    /// # Errors
    /// As [`Streams::split`].
    pub fn split_both(&mut self, chunk: Chunk<'_>) -> Result<()> {
        let width = Width::of(chunk.dtype())?;
        let len = chunk.bytes().len() / 2;
        let row = chunk.shape().row();
        self.hi.resize(len, 0);
        self.delta.resize(len, 0);
        self.lo.resize(len, 0);
        match width {
            Width::Two => kernels::split16_both(chunk.bytes(), row, &mut self.hi, &mut self.delta, &mut self.lo),
            Width::Four => kernels::split32_both(chunk.bytes(), row, &mut self.hi, &mut self.delta, &mut self.lo),
        }
        Ok(())
    }

    /// High halves.
    pub fn hi(&self) -> &[u8] {
        &self.hi
    }

    /// Delta of the high halves along tokens; the first token is as it is.
    pub fn hi_delta(&self) -> &[u8] {
        &self.delta
    }

    /// Low halves.
    pub fn lo(&self) -> &[u8] {
        &self.lo
    }
}
