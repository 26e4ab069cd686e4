//! The calls that `encode` and `decode` wrap, timed without Python: what a measurement of the wheel compares itself with.

use std::time::Instant;

use gearbox::dump::{Arrays, NewEntry};
use gearbox::engine;
use gearbox_core::container::Container;
use gearbox_core::{Limits, Pipeline, Result, Stage};
use indicatif::ProgressBar;
use pyo3::prelude::*;

use crate::arrays::Tensor;
use crate::error::raise;
use crate::pipeline::pipeline;
use crate::registry::registry;

/// Encode a pair of arrays into memory and decode them again, as a Rust program does it.
///
/// Returns the nanoseconds that each took, and the number of encoded bytes.
#[pyfunction]
pub(crate) fn rust_calls(
    py: Python<'_>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    pipeline: &Bound<'_, PyAny>,
) -> PyResult<(u64, u64, usize)> {
    let pipeline = self::pipeline(pipeline)?;
    let (key, value) = (Tensor::of("key", key)?, Tensor::of("value", value)?);
    let entry = NewEntry::new("array", 0, 0, Stage::Unknown, key.chunk()?, value.chunk()?);
    let work = || -> Result<_> {
        let bar = ProgressBar::hidden();
        let start = Instant::now();
        let mut trained = Pipeline::clone(&pipeline);
        let stored = engine::encode_arrays(&Arrays::new(&[entry])?, &mut trained, Vec::new(), &bar)?.0;
        let encode_ns = start.elapsed().as_nanos() as u64;
        let start = Instant::now();
        let container = Container::open(&stored[..], &Limits::default())?;
        let pipeline = container.pipeline(&*registry()?)?;
        let lengths = container.sequences().map(|sequence| sequence.info.original_bytes() as usize);
        let mut tensors: Vec<Vec<u8>> = lengths.map(|bytes| vec![0; bytes]).collect();
        let rooms = tensors.iter_mut().map(Vec::as_mut_slice).collect();
        let decoded = engine::decode_into(&container, &pipeline, &bar, rooms)?;
        let decode_ns = start.elapsed().as_nanos() as u64;
        decoded.failures.into_iter().next().map_or(Ok((encode_ns, decode_ns, stored.len())), Err)
    };
    py.detach(work).map_err(raise)
}
