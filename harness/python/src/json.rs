//! Values that cross as JSON: settings on the way in, reports on the way out.

use gearbox_core::{Error, ResultExt};
use pyo3::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::raise;

/// Dicts, lists, strings and numbers for what serialises.
pub(crate) fn to_python<'py>(py: Python<'py>, value: &impl Serialize) -> PyResult<Bound<'py, PyAny>> {
    let text = serde_json::to_string(value).map_err(|error| raise(Error::invalid_input(error.to_string())))?;
    py.import("json")?.call_method1("loads", (text,))
}

/// The JSON text of a Python value.
pub(crate) fn text(value: &Bound<'_, PyAny>) -> PyResult<String> {
    value.py().import("json")?.call_method1("dumps", (value,))?.extract()
}

/// Reads a Python value as a type of the harness.
pub(crate) fn from_python<T: DeserializeOwned>(name: &str, value: &Bound<'_, PyAny>) -> PyResult<T> {
    let read = serde_json::from_str(&text(value)?).map_err(|error| Error::invalid_config(error.to_string()));
    read.context(|| format!("`{name}`")).map_err(raise)
}
