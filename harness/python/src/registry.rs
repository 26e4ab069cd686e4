//! Which plugins there are: the built-ins, those of `GEARBOX_PLUGIN_PATH`, and what was loaded since.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use gearbox::loading::{LoadArgs, describe};
use gearbox_abi::Source;
use gearbox_core::{Registry, Result};
use pyo3::prelude::*;
use serde_json::Value;

use crate::error::raise;
use crate::json::to_python;

/// What was loaded so far; who works with it keeps what there was when the work began.
static REGISTRY: Mutex<Option<Arc<Registry>>> = Mutex::new(None);

/// The plugins there are now.
pub(crate) fn registry() -> Result<Arc<Registry>> {
    let mut held = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(registry) = &*held {
        return Ok(Arc::clone(registry));
    }
    let registry = Arc::new(LoadArgs::default().registry()?);
    *held = Some(Arc::clone(&registry));
    Ok(registry)
}

/// Adds the plugins of libraries, and gives their ids. A library that was loaded from the same path before stays as it is.
pub(crate) fn load(sources: &[Source], allow_insecure: bool) -> Result<Vec<String>> {
    let mut longer = (*registry()?).clone();
    let args = LoadArgs { allow_insecure_plugins: allow_insecure, ..LoadArgs::default() };
    let entries = args.entries(sources, false, &gearbox::isolate::Limits::default())?;
    let ids = entries.iter().map(|entry| entry.id().to_owned()).collect();
    for entry in entries {
        let held = longer.get(entry.id()).is_ok_and(|held| (held.id(), held.origin()) == (entry.id(), entry.origin()));
        if !held {
            longer.insert(entry)?;
        }
    }
    *REGISTRY.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(longer));
    Ok(ids)
}

/// Describe every plugin: built in, from `GEARBOX_PLUGIN_PATH`, or loaded.
///
/// Returns a list of dicts with `id`, `kind`, `aliases`, `summary`, `source`, `format_version`, `origin`, `defaults` and `schema` (a JSON
/// Schema), sorted by id.
#[pyfunction]
pub(crate) fn plugins(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    let describe_all = || registry()?.entries().map(describe).collect::<Result<Vec<Value>>>();
    to_python(py, &py.detach(describe_all).map_err(raise)?)
}

/// Load the plugins of a shared library into this process, and return their ids.
///
/// A library is code: it runs with the rights of this process. `sha256` pins its contents. A library that every user of the machine
/// can replace is refused unless `allow_insecure` is true.
#[pyfunction]
#[pyo3(signature = (path, *, sha256=None, allow_insecure=false))]
pub(crate) fn load_plugin(
    py: Python<'_>,
    path: PathBuf,
    sha256: Option<String>,
    allow_insecure: bool,
) -> PyResult<Vec<String>> {
    py.detach(|| load(&[Source { path, sha256 }], allow_insecure)).map_err(raise)
}
