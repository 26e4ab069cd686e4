//! The compressed cache.

use std::sync::{Mutex, MutexGuard, PoisonError};

use gearbox_core::{DType, Shape};
use gearbox_model::{CacheOptions, TensorCache, TensorCacheSpec};
use pyo3::prelude::*;
use serde_json::json;

use crate::arrays::{NewArray, Tensor, dtype_of, name_of};
use crate::error::raise;
use crate::json::{from_python, to_python};
use crate::pipeline::pipeline;

/// Keys and values of one request, held compressed: older tokens as chunks that a pipeline encoded, the newest ones raw.
///
/// `pipeline` is whatever `Pipeline` takes, or None for a cache that keeps everything raw. It holds `layers` layers of `kv_heads` heads with
/// `head_dim` channels in `dtype` (float16, bfloat16 or float32). The newest `residual` tokens of a layer are never encoded; older ones are,
/// `chunk` at a time (by default the tokens of the pipeline's chunking, or 128). `rope` and `tokens` are for plugins that look at
/// rotation or token ids: with `tokens=True`, the ids come with `append`.
///
/// A pipeline that evicts tokens is refused, because this cache sees no attention. After an error in the middle of an `append` the cache
/// is of no more use until `reset`.
#[pyclass(frozen, module = "gearbox")]
pub(crate) struct Cache {
    held: Mutex<TensorCache>,
    kv_heads: usize,
    head_dim: usize,
    dtype: DType,
}

impl Cache {
    fn lock(&self) -> MutexGuard<'_, TensorCache> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Cache {
    #[new]
    #[pyo3(signature = (pipeline, *, layers, kv_heads, head_dim, dtype=None, residual=64, chunk=None, rope=None, tokens=false))]
    #[expect(clippy::too_many_arguments, reason = "named arguments in Python")]
    fn new(
        pipeline: Option<&Bound<'_, PyAny>>,
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: Option<&Bound<'_, PyAny>>,
        residual: usize,
        chunk: Option<usize>,
        rope: Option<&Bound<'_, PyAny>>,
        tokens: bool,
    ) -> PyResult<Self> {
        let dtype = dtype.map_or(Ok(DType::F16), dtype_of)?;
        let rope = rope.map(|rope| from_python("rope", rope)).transpose()?;
        let pipeline = pipeline.map(self::pipeline).transpose()?;
        let model = TensorCacheSpec { layers, kv_heads, dim: head_dim, rope, tokens };
        let options = CacheOptions { dtype, pipeline, residual, chunk, ..CacheOptions::default() };
        let held = Mutex::new(TensorCache::new(&model, &options).map_err(raise)?);
        Ok(Self { held, kv_heads, head_dim, dtype })
    }

    /// Append tokens to a layer. `key` and `value` have shape `(seq, kv_heads, head_dim)`; `tokens` are the ids of the tokens.
    #[pyo3(signature = (layer, key, value, tokens=None))]
    fn append(
        &self,
        py: Python<'_>,
        layer: usize,
        key: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
        tokens: Option<Vec<u32>>,
    ) -> PyResult<()> {
        let (key, value) = (Tensor::of("key", key)?, Tensor::of("value", value)?);
        for (name, tensor) in [("key", &key), ("value", &value)] {
            tensor.expect(name, self.dtype, self.kv_heads, self.head_dim)?;
        }
        let (key, value) = (key.chunk()?, value.chunk()?);
        py.detach(|| self.lock().append(layer, key, value, tokens.as_deref())).map_err(raise)
    }

    /// Decode a layer: `(key, value)`, each of shape `(len, kv_heads, head_dim)`.
    fn read<'py>(&self, py: Python<'py>, layer: usize) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        loop {
            let seq = py.detach(|| self.lock().len(layer));
            let shape = Shape::new(seq, self.kv_heads, self.head_dim);
            let (mut key, mut value) = (NewArray::new(py, self.dtype, shape)?, NewArray::new(py, self.dtype, shape)?);
            let (keys, values) = (key.bytes()?, value.bytes()?);
            let read = py.detach(|| {
                let held = self.lock();
                // Another thread may have appended since.
                (held.len(layer) == seq).then(|| held.read(layer, keys, values))
            });
            if let Some(read) = read {
                read.map_err(raise)?;
                return Ok((key.finish()?, value.finish()?));
            }
        }
    }

    /// Tokens that a layer holds.
    #[pyo3(signature = (layer=0))]
    fn len(&self, py: Python<'_>, layer: usize) -> usize {
        py.detach(|| self.lock().len(layer))
    }

    /// Number of layers.
    #[getter]
    fn layers(&self, py: Python<'_>) -> usize {
        py.detach(|| self.lock().layers())
    }

    /// Name of its dtype.
    #[getter]
    fn dtype(&self) -> &'static str {
        name_of(self.dtype)
    }

    /// Every byte the cache holds, once.
    ///
    /// The dict has `original_bytes` (all tokens in the dtype of the cache), `stored_bytes`, `ratio` of the two (None while it is empty),
    /// `layers` with the bytes of each by account (`payload`, `headers`, `tail`, `positions`, `slack`), `artifacts`, `token_ids`, `usage` over
    /// time, and `scratch`: buffers that are no part of what is stored.
    fn ledger<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let ledger = py.detach(|| self.lock().ledger());
        let (original, stored) = (ledger.usage.dense, ledger.usage.now);
        let ratio = (stored > 0).then(|| ledger.usage.ratio());
        let mut value = json!(ledger);
        (value["original_bytes"], value["stored_bytes"], value["ratio"]) =
            (json!(original), json!(stored), json!(ratio));
        to_python(py, &value)
    }

    /// Forget all tokens.
    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.lock().reset());
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let layers = self.layers(py);
        format!(
            "Cache(layers={layers}, kv_heads={}, head_dim={}, dtype={:?}, tokens={})",
            self.kv_heads,
            self.head_dim,
            name_of(self.dtype),
            self.len(py, 0)
        )
    }
}
