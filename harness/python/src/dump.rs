//! Dumps.

use std::path::PathBuf;
use std::sync::Arc;

use gearbox::dump::{Dump as Index, Entry as IndexEntry, Layout, Selection, Tensor};
use gearbox_core::{DType, Error, Shape, Stage};
use numpy::PyArray1;
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::arrays::{name_of, numpy_dtype, shaped};
use crate::error::raise;
use crate::json::to_python;

/// A KV-cache dump: an index of entries whose tensors stay in their files until they are read.
///
/// `path` is a folder or file in one of the formats that `gearbox dump` knows. `stage` keeps the entries of `prefill` or `decode`,
/// `min_seq` and `max_seq` those of so many tokens (0 is off), `packed` reads packed snapshots of the reference engine. Entries that are
/// damaged are left out and listed in `findings`.
///
/// `len(dump)` is the number of entries; `dump[i]` and iteration give them, sorted by run, layer and position.
#[pyclass(frozen, module = "gearbox", sequence)]
pub(crate) struct Dump {
    pub(crate) index: Arc<Index>,
    /// Run, layer and entry, by number.
    places: Vec<[usize; 3]>,
}

/// Tokens of one layer that were appended together.
///
/// `key()`, `value()` and `query()` read a tensor of shape `(seq, heads, dim)`.
#[pyclass(frozen, module = "gearbox")]
pub(crate) struct Entry {
    index: Arc<Index>,
    place: [usize; 3],
}

#[pymethods]
impl Dump {
    #[new]
    #[pyo3(signature = (path, *, stage=None, min_seq=0, max_seq=0, packed=false))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        stage: Option<&str>,
        min_seq: usize,
        max_seq: usize,
        packed: bool,
    ) -> PyResult<Self> {
        let stage = match stage {
            None | Some("both") => None,
            Some("prefill") => Some(Stage::Prefill),
            Some("decode") => Some(Stage::Decode),
            Some(other) => {
                return Err(PyValueError::new_err(format!("stage: expected prefill, decode or both, got {other}")));
            }
        };
        let selection = Selection { stage, min_seq, max_seq, packed };
        let index = py.detach(|| Index::open(&path, &selection)).map_err(raise)?;
        let mut places = Vec::with_capacity(index.entries());
        for (run, held) in index.runs.iter().enumerate() {
            for (layer, held) in held.layers.iter().enumerate() {
                places.extend((0..held.entries.len()).map(|entry| [run, layer, entry]));
            }
        }
        Ok(Self { index: Arc::new(index), places })
    }

    /// What was opened.
    #[getter]
    fn path(&self) -> PathBuf {
        self.index.path.clone()
    }

    /// Names of the runs.
    #[getter]
    fn runs(&self) -> Vec<&str> {
        self.index.runs.iter().map(|run| run.name.as_str()).collect()
    }

    /// Bytes of all keys and values.
    #[getter]
    fn original_bytes(&self) -> u64 {
        self.index.original_bytes()
    }

    /// What was left out or remarked upon: dicts with `place`, `reason` and `message`.
    #[getter]
    fn findings<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let found = PyList::empty(py);
        for finding in &self.index.findings.list {
            let row = PyDict::new(py);
            row.set_item("place", &finding.place)?;
            row.set_item("reason", finding.reason.name())?;
            row.set_item("message", &finding.message)?;
            found.append(row)?;
        }
        Ok(found)
    }

    /// Runs, layers, tokens and shapes as a dict, as `gearbox dump info --json` prints them.
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.index.info())
    }

    /// xxh3-128 over names, ranges, shapes and tensors; reads the whole dump.
    fn digest(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| self.index.digest()).map_err(raise)
    }

    fn __len__(&self) -> usize {
        self.places.len()
    }

    fn __getitem__(&self, at: isize) -> PyResult<Entry> {
        let len = self.places.len();
        let idx = if at < 0 { at.checked_add_unsigned(len) } else { Some(at) };
        let place = idx.and_then(|idx| self.places.get(usize::try_from(idx).ok()?));
        let place = place.ok_or_else(|| PyIndexError::new_err(format!("expected one of {len} entries, got {at}")))?;
        Ok(Entry { index: Arc::clone(&self.index), place: *place })
    }

    fn __repr__(&self) -> String {
        format!(
            "Dump({:?}, {} runs, {} entries)",
            self.index.path.display().to_string(),
            self.index.runs.len(),
            self.places.len()
        )
    }
}

impl Entry {
    fn held(&self) -> &IndexEntry {
        let [run, layer, entry] = self.place;
        &self.index.runs[run].layers[layer].entries[entry]
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        tensor: &Tensor,
        (start, stop): (usize, Option<usize>),
    ) -> PyResult<Bound<'py, PyAny>> {
        let stop = stop.unwrap_or(tensor.shape.seq);
        if start >= stop || stop > tensor.shape.seq {
            let message = format!("expected tokens within 0..{}, got {start}..{stop}", tensor.shape.seq);
            return Err(PyValueError::new_err(message));
        }
        let shape = tensor.shape.with_seq(stop - start);
        if tensor.layout == Layout::Logical {
            return memory_map(py, tensor, start, shape);
        }
        let bytes = py.detach(|| Ok(tensor.map_tokens(start..stop)?.to_vec()));
        let bytes = bytes.map_err(|error: Error| raise(error.context(self.held().place.clone())))?;
        shaped(PyArray1::from_vec(py, bytes).as_any(), tensor.dtype, shape)
    }
}

/// The tokens of a tensor as an array over its file.
fn memory_map<'py>(py: Python<'py>, tensor: &Tensor, start: usize, shape: Shape) -> PyResult<Bound<'py, PyAny>> {
    let arguments = PyDict::new(py);
    let stored = match tensor.dtype {
        DType::F16 => "<f2",
        DType::Bf16 => "<u2",
        _ => "<f4",
    };
    arguments.set_item("dtype", stored)?;
    arguments.set_item("mode", "r")?;
    arguments.set_item("offset", tensor.offset + (start * shape.row() * tensor.dtype.size()) as u64)?;
    arguments.set_item("shape", (shape.seq, shape.heads, shape.dim))?;
    let map = py.import("numpy")?.call_method("memmap", (&*tensor.path,), Some(&arguments))?;
    if tensor.dtype == DType::Bf16 { map.call_method1("view", (numpy_dtype(py, tensor.dtype)?,)) } else { Ok(map) }
}

#[pymethods]
impl Entry {
    /// Name of the run.
    #[getter]
    fn run(&self) -> &str {
        &self.index.runs[self.place[0]].name
    }

    /// Layer of the model.
    #[getter]
    fn layer(&self) -> u32 {
        self.index.runs[self.place[0]].layers[self.place[1]].id
    }

    /// `prefill`, `decode` or `unknown`.
    #[getter]
    fn stage(&self) -> &'static str {
        self.held().stage.name()
    }

    /// Position of the first token.
    #[getter]
    fn start(&self) -> u64 {
        self.held().start
    }

    /// Number of tokens.
    #[getter]
    fn seq(&self) -> usize {
        self.held().seq
    }

    /// Name of the dtype of the keys.
    #[getter]
    fn dtype(&self) -> &'static str {
        name_of(self.held().key.dtype)
    }

    /// Shape of the keys, `(seq, heads, dim)`.
    #[getter]
    fn shape(&self) -> (usize, usize, usize) {
        let Shape { seq, heads, dim } = self.held().key.shape;
        (seq, heads, dim)
    }

    /// Ids of the tokens as an array of uint32, or None.
    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyArray1<u32>>> {
        self.held().tokens.as_ref().map(|tokens| PyArray1::from_slice(py, tokens))
    }

    /// How keys and queries were rotated, as a dict, or None.
    #[getter]
    fn rope<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.index.runs[self.place[0]].rope)
    }

    /// Keys of the tokens `start..stop` of the entry, after `RoPE`; read-only and mapped from the file where its layout allows.
    #[pyo3(signature = (start=0, stop=None))]
    fn key<'py>(&self, py: Python<'py>, start: usize, stop: Option<usize>) -> PyResult<Bound<'py, PyAny>> {
        self.read(py, &self.held().key, (start, stop))
    }

    /// Values of the tokens `start..stop` of the entry; as `key`.
    #[pyo3(signature = (start=0, stop=None))]
    fn value<'py>(&self, py: Python<'py>, start: usize, stop: Option<usize>) -> PyResult<Bound<'py, PyAny>> {
        self.read(py, &self.held().value, (start, stop))
    }

    /// Queries of the tokens `start..stop` of the entry, `(seq, q_heads, dim)`, or None; as `key`.
    #[pyo3(signature = (start=0, stop=None))]
    fn query<'py>(&self, py: Python<'py>, start: usize, stop: Option<usize>) -> PyResult<Bound<'py, PyAny>> {
        match &self.held().query {
            Some(query) => self.read(py, query, (start, stop)),
            None => py.None().into_bound_py_any(py),
        }
    }

    fn __repr__(&self) -> String {
        let held = self.held();
        format!(
            "Entry(run={:?}, layer={}, stage={:?}, tokens={}..{})",
            self.run(),
            self.layer(),
            held.stage.name(),
            held.start,
            held.end()
        )
    }
}
