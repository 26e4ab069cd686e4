//! Arrays to containers and back.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

use gearbox::dump::{Arrays, NewEntry};
use gearbox::engine;
use gearbox_core::container::{Container, Parts, ReadAt};
use gearbox_core::{Error, Limits, Pipeline, Result, ResultExt, Role, Rope, Stage};
use indicatif::ProgressBar;
use numpy::PyUntypedArray;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple};

use crate::arrays::{NewArray, Tensor};
use crate::dump::Dump;
use crate::error::raise;
use crate::json::{from_python, to_python};
use crate::pipeline::pipeline;
use crate::registry::registry;

/// Encode arrays or a dump into a container, and return its bytes.
///
/// `data` is one of
///
/// - an array of shape `(seq, heads, dim)`: only keys, or only values, of one layer (`role`, `layer`);
/// - a pair `(key, value)` of such arrays: one layer;
/// - a dict of pairs by layer number: one request;
/// - a `Dump`.
///
/// Arrays are C-contiguous and of float16, float32 or bfloat16 (from `ml_dtypes`, or its bits as uint16); they are read where they lie.
/// `pipeline` is whatever `Pipeline` takes. `start` is the position of the first token, `stage` is `prefill`, `decode` or `unknown`,
/// `tokens` are the ids of the tokens, `rope` says how keys were rotated: `{"pairing": "half-split", "theta": 1e4, "rotary_dim": 128}`.
/// A `Dump` knows all of that itself.
///
/// The bytes are those of a file that `gearbox encode` writes for a dump with the same content.
#[pyfunction]
#[pyo3(signature = (data, pipeline, *, layer=0, role="key", start=0, stage="unknown", run="array", tokens=None, rope=None))]
#[expect(clippy::too_many_arguments, clippy::similar_names, reason = "named arguments in Python")]
pub(crate) fn encode<'py>(
    py: Python<'py>,
    data: &Bound<'py, PyAny>,
    pipeline: &Bound<'py, PyAny>,
    layer: u32,
    role: &str,
    start: u64,
    stage: &str,
    run: &str,
    tokens: Option<Vec<u32>>,
    rope: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyBytes>> {
    let mut pipeline = Pipeline::clone(&*self::pipeline(pipeline)?);
    let bar = ProgressBar::hidden();
    if let Ok(dump) = data.cast::<Dump>() {
        let index = &dump.get().index;
        let encoded = py.detach(|| engine::encode(index, &mut pipeline, Parts::default(), &bar));
        return bytes(py, encoded.map_err(raise)?.0);
    }
    let role = named("role", role, Role::ALL, Role::name)?;
    let stage = named("stage", stage, [Stage::Prefill, Stage::Decode, Stage::Unknown], Stage::name)?;
    let rope: Option<Rope> = rope.map(|rope| from_python("rope", rope)).transpose()?;
    let (arrays, one) = layers(data, layer, role)?;
    let mut entries = Vec::with_capacity(arrays.len());
    for (layer, [key, value]) in &arrays {
        let entry = NewEntry::new(run, *layer, start, stage, key.chunk()?, value.chunk()?);
        entries.push(NewEntry { tokens: tokens.as_deref(), rope: rope.as_ref(), ..entry });
    }
    let work = || -> Result<Parts> {
        let arrays = if one { Arrays::of_role(&entries, role) } else { Arrays::new(&entries) }?;
        Ok(engine::encode_arrays(&arrays, &mut pipeline, Parts::default(), &bar)?.0)
    };
    bytes(py, py.detach(work).map_err(raise)?)
}

fn bytes(py: Python<'_>, parts: Parts) -> PyResult<Bound<'_, PyBytes>> {
    PyBytes::new_with(py, parts.len(), |out| {
        py.detach(|| parts.copy_to(out));
        Ok(())
    })
}

/// Finds the value with a name.
fn named<T: Copy, const N: usize>(what: &str, got: &str, all: [T; N], name: impl Fn(T) -> &'static str) -> PyResult<T> {
    all.into_iter().find(|value| name(*value) == got).ok_or_else(|| {
        let names: Vec<_> = all.into_iter().map(name).collect();
        PyValueError::new_err(format!("{what}: expected one of {}, got {got}", names.join(", ")))
    })
}

/// Keys and values by layer, and whether there is only one array, which then stands for both.
#[expect(clippy::type_complexity, reason = "read in one place")]
fn layers<'py>(data: &Bound<'py, PyAny>, layer: u32, role: Role) -> PyResult<(Vec<(u32, [Tensor<'py>; 2])>, bool)> {
    if data.is_instance_of::<PyUntypedArray>() {
        let tensor = || Tensor::of(role.name(), data);
        return Ok((vec![(layer, [tensor()?, tensor()?])], true));
    }
    if let Ok(by_layer) = data.cast::<PyDict>() {
        let layers = by_layer.iter().map(|(layer, arrays)| {
            let layer = layer.extract::<u32>()?;
            Ok((layer, pair(&format!("layer {layer}, "), &arrays)?))
        });
        return Ok((layers.collect::<PyResult<_>>()?, false));
    }
    Ok((vec![(layer, pair("", data)?)], false))
}

/// A pair of keys and values.
fn pair<'py>(place: &str, data: &Bound<'py, PyAny>) -> PyResult<[Tensor<'py>; 2]> {
    let items = match (data.cast::<PyTuple>(), data.cast::<PyList>()) {
        (Ok(tuple), _) => tuple.clone(),
        (_, Ok(list)) => list.to_tuple(),
        _ => {
            let got = data.get_type().name()?;
            return Err(PyTypeError::new_err(format!(
                "{place}data: expected an array, (key, value), a dict or a Dump, got {got}"
            )));
        }
    };
    if items.len() != 2 {
        let message = format!("{place}data: expected a pair of keys and values, got {} items", items.len());
        return Err(PyValueError::new_err(message));
    }
    Ok([
        Tensor::of(&format!("{place}key"), &items.get_item(0)?)?,
        Tensor::of(&format!("{place}value"), &items.get_item(1)?)?,
    ])
}

/// Where a container is read from.
enum Source {
    Bytes(PyBackedBytes),
    File(PathBuf, File),
}

impl Source {
    fn of(data: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(bytes) = data.extract::<PyBackedBytes>() {
            return Ok(Self::Bytes(bytes));
        }
        let Ok(path) = data.extract::<PathBuf>() else {
            let got = data.get_type().name()?;
            return Err(PyTypeError::new_err(format!("data: expected bytes or the path of a container, got {got}")));
        };
        let file = File::open(&path).map_err(|error| raise(Error::io(&path, &error)))?;
        Ok(Self::File(path, file))
    }
}

impl ReadAt for Source {
    fn size(&self) -> Result<u64> {
        match self {
            Self::Bytes(bytes) => (&**bytes).size(),
            Self::File(path, file) => file.size().context(|| format!("`{}`", path.display())),
        }
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Bytes(bytes) => (&**bytes).read_at(offset, out),
            Self::File(path, file) => file.read_at(offset, out).context(|| format!("`{}`", path.display())),
        }
    }
}

fn open(py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<Container<Source>> {
    let source = Source::of(data)?;
    py.detach(|| Container::open(source, &Limits::default())).map_err(raise)
}

/// Decode a container, and return its arrays in the form that `encode` took.
///
/// `data` is `bytes`, or the path of a file. Nothing else is needed: the file names its pipeline; plugins that are not built in must be
/// loaded. Arrays have shape `(seq, heads, dim)`, and the dtype that was encoded: float16, float32, or bfloat16 of `ml_dtypes` (its
/// bits as uint16 where that is not installed).
///
/// Returns an array for a single one, `(key, value)` for one layer, a dict of pairs by layer for one run, and a dict of those by run for
/// several.
#[pyfunction]
pub(crate) fn decode<'py>(py: Python<'py>, data: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let container = open(py, data)?;
    let registry = registry().map_err(raise)?;
    let infos: Vec<_> = container.sequences().map(|sequence| sequence.info.clone()).collect();
    let array = |info: &gearbox_core::container::SequenceInfo| NewArray::new(py, info.dtype, info.shape(info.seq()));
    let mut arrays = infos.iter().map(array).collect::<PyResult<Vec<_>>>()?;
    let tensors = arrays.iter_mut().map(NewArray::bytes).collect::<PyResult<Vec<_>>>()?;
    let work = || -> Result<()> {
        let pipeline = container.pipeline(&registry)?;
        let decoded = engine::decode_into(&container, &pipeline, &ProgressBar::hidden(), tensors)?;
        decoded.failures.into_iter().next().map_or(Ok(()), Err)
    };
    py.detach(work).map_err(raise)?;
    let mut runs: BTreeMap<usize, BTreeMap<u32, Vec<Bound<'py, PyAny>>>> = BTreeMap::new();
    for (info, array) in infos.iter().zip(arrays) {
        runs.entry(info.run.0).or_default().entry(info.layer).or_default().push(array.finish()?);
    }
    let one_layer = runs.len() == 1 && runs.values().all(|layers| layers.len() == 1);
    let result = PyDict::new(py);
    for (run, layers) in runs {
        let by_layer = PyDict::new(py);
        for (layer, arrays) in layers {
            let arrays = match <[_; 1]>::try_from(arrays) {
                Ok([array]) => array,
                Err(pair) => PyTuple::new(py, pair)?.into_any(),
            };
            if one_layer {
                return Ok(arrays);
            }
            by_layer.set_item(layer, arrays)?;
        }
        let name = &container.run(gearbox_core::container::RunId(run)).map_err(raise)?.name;
        result.set_item(PyString::new(py, name), by_layer)?;
    }
    if result.len() == 1 {
        return result.values().get_item(0);
    }
    Ok(result.into_any())
}

/// Tell what a container holds and where its bytes go, as `gearbox inspect --json` does.
///
/// `data` is `bytes`, or the path of a file. The dict has `pipeline`, `plugins`, `sequences`, `ledger` (every stored byte once) and
/// `file_bytes`, the sum of the ledger.
#[pyfunction]
pub(crate) fn inspect<'py>(py: Python<'py>, data: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let container = open(py, data)?;
    to_python(py, &gearbox::inspect::describe(&container, &[]))
}
