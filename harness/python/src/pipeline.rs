//! Pipelines.

use std::path::PathBuf;
use std::sync::Arc;

use gearbox::pipelines;
use gearbox_core::{Pipeline as Built, Result};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::error::raise;
use crate::json::{text, to_python};
use crate::registry::registry;

/// What codes which layers, keys and values, in which chunks.
///
/// `spec` is a dict, JSON text, the path of a `.json` file or the id of a codec. Unknown keys and values out of range raise
/// `GearboxError` with the place.
#[pyclass(frozen, module = "gearbox")]
pub(crate) struct Pipeline(pub(crate) Arc<Built>);

/// Builds what an argument describes; a `Pipeline` is taken as it is.
pub(crate) fn pipeline(argument: &Bound<'_, PyAny>) -> PyResult<Arc<Built>> {
    if let Ok(pipeline) = argument.cast::<Pipeline>() {
        return Ok(Arc::clone(&pipeline.get().0));
    }
    let spec = if argument.is_instance_of::<PyDict>() {
        text(argument)?
    } else if argument.is_instance_of::<PyString>() {
        argument.extract()?
    } else {
        argument.extract::<PathBuf>()?.display().to_string()
    };
    let build = || -> Result<Built> {
        let registry = registry()?;
        Built::build(&pipelines::parse(&spec, &registry)?, &registry)
    };
    Ok(Arc::new(argument.py().detach(build).map_err(raise)?))
}

#[pymethods]
impl Pipeline {
    #[new]
    fn new(spec: &Bound<'_, PyAny>) -> PyResult<Self> {
        pipeline(spec).map(Self)
    }

    /// Its name, or one made of its plugins.
    #[getter]
    fn name(&self) -> &str {
        self.0.name()
    }

    /// The pipeline as a dict, with every setting that was left to its default.
    #[getter]
    fn spec<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.0.spec().to_value())
    }

    /// The plugins it uses: dicts with `id`, `format_version` and, for a loaded one, `library` (`file`, `sha256`).
    #[getter]
    fn plugins<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.0.plugins())
    }

    /// Whether every bit comes back.
    #[getter]
    fn lossless(&self) -> bool {
        self.0.is_lossless()
    }

    fn __repr__(&self) -> String {
        format!("Pipeline({})", self.0.spec().to_value())
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.0.spec() == other.0.spec()
    }

    fn __hash__(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        self.0.spec().to_value().to_string().hash(&mut hasher);
        hasher.finish()
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> (Bound<'py, PyAny>, (String,)) {
        (py.get_type::<Self>().into_any(), (self.0.spec().to_value().to_string(),))
    }
}
