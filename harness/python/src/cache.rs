//! The compressed cache.

use std::sync::{Mutex, MutexGuard, PoisonError};

use gearbox_core::{DType, Shape};
use gearbox_model::{CacheOptions, TensorCache, TensorCacheSpec};
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use serde_json::json;

use crate::arrays::{Floats, NewArray, Tensor, dtype_of, name_of};
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
/// Where the pipeline evicts tokens of a layer, a step is `append`, `read`, and `observe` with what attention did; `q_heads` is the number of
/// query heads then (by default as many as KV heads). After an error in the middle of a step the cache is of no more use until `reset`.
#[pyclass(frozen, module = "gearbox")]
pub(crate) struct Cache {
    held: Mutex<TensorCache>,
    q_heads: usize,
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
    #[pyo3(signature = (pipeline, *, layers, kv_heads, head_dim, dtype=None, residual=64, chunk=None, rope=None, tokens=false, q_heads=None))]
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
        q_heads: Option<usize>,
    ) -> PyResult<Self> {
        let dtype = dtype.map_or(Ok(DType::F16), dtype_of)?;
        let rope = rope.map(|rope| from_python("rope", rope)).transpose()?;
        let pipeline = pipeline.map(self::pipeline).transpose()?;
        let model = TensorCacheSpec { layers, q_heads, kv_heads, dim: head_dim, rope, tokens };
        let options = CacheOptions { dtype, pipeline, residual, chunk, ..CacheOptions::default() };
        let held = Mutex::new(TensorCache::new(&model, &options).map_err(raise)?);
        Ok(Self { held, q_heads: q_heads.unwrap_or(kv_heads), kv_heads, head_dim, dtype })
    }

    /// Append tokens to a layer. `key` and `value` have shape `(seq, kv_heads, head_dim)`; `tokens` are the ids of the tokens.
    ///
    /// In a layer that evicts, the attention of these tokens has to be shown before the next ones are appended.
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

    /// Show the policy of a layer what attention did with the tokens appended last; it then decides which tokens stay.
    ///
    /// `probabilities` are float32 of shape `(queries, q_heads, len)`, C-contiguous and read where they lie: softmax probabilities over all
    /// tokens that the layer holds, 0 where masked. The queries of a long prompt may be shown in blocks, in order; tokens are evicted after
    /// the last one. A block of a single query behind the first token is taken as a step of decoding. Nothing happens in a layer that does
    /// not evict.
    fn observe(&self, py: Python<'_>, layer: usize, probabilities: &Bound<'_, PyAny>) -> PyResult<()> {
        let shown = Floats::of("probabilities", ["queries", "q_heads", "len"], probabilities)?;
        let (numbers, [queries, heads, tokens]) = (shown.numbers()?, shown.shape());
        let live = py.detach(|| self.lock().len(layer));
        if (heads, tokens) != (self.q_heads, live) {
            return Err(PyValueError::new_err(format!(
                "probabilities: expected shape (queries, {}, {live}), got ({queries}, {heads}, {tokens})",
                self.q_heads
            )));
        }
        py.detach(|| self.lock().observe(layer, queries, numbers)).map_err(raise)
    }

    /// Positions of the tokens that a layer holds, uint32 of shape `(rows, len)`: one row if all heads hold the same, else one per KV head.
    #[pyo3(signature = (layer=0))]
    fn live<'py>(&self, py: Python<'py>, layer: usize) -> PyResult<Bound<'py, PyArray2<u32>>> {
        let work = || {
            let held = self.lock();
            held.live(layer).map(|live| (live, held.len(layer)))
        };
        let (live, len) = py.detach(work).map_err(raise)?;
        let rows = live.len().checked_div(len).unwrap_or(1);
        PyArray1::from_vec(py, live).reshape([rows, len])
    }

    /// Whether the pipeline evicts tokens of a layer.
    #[pyo3(signature = (layer=0))]
    fn evicts(&self, py: Python<'_>, layer: usize) -> bool {
        py.detach(|| self.lock().evicts(layer))
    }

    /// Tokens that a layer has seen, evicted ones included: the position of the next one.
    #[pyo3(signature = (layer=0))]
    fn seen(&self, py: Python<'_>, layer: usize) -> usize {
        py.detach(|| self.lock().seen(layer))
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
    /// The dict has `original_bytes` (all tokens seen in the dtype of the cache), `stored_bytes`, `ratio` of the two (None while it is empty),
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
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.lock().reset()).map_err(raise)
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
