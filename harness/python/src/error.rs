//! Errors of the harness as Python exceptions.

use gearbox_core::{Error, ErrorKind};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

pyo3::create_exception!(
    gearbox,
    GearboxError,
    PyException,
    "What Gearbox reports: a message for people, and `kind`, such as `invalid-config`, for programs."
);

/// The exception for an error: to be used with `map_err`.
pub(crate) fn raise(error: Error) -> PyErr {
    let exception = GearboxError::new_err(error.to_string());
    Python::attach(|py| match exception.value(py).setattr("kind", name(error.kind())) {
        Ok(()) => exception,
        Err(other) => other,
    })
}

/// The name of a kind as containers and tables write it.
fn name(kind: ErrorKind) -> String {
    match serde_json::to_value(kind) {
        Ok(serde_json::Value::String(name)) => name,
        // A plugin that crashed has no name apart from the way it did.
        _ => kind.state().into_owned(),
    }
}
