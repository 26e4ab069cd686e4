//! Rows of a results store.

use std::path::PathBuf;

use gearbox::results::{Cell, Query, Store};
use pyo3::prelude::*;
use serde_json::{Map, Value};

use crate::error::raise;
use crate::json::to_python;

/// The rows of a store as dicts, as `gearbox results list` finds them: `columns` of the view that docs/RESULTS-STORE.md describes (all by
/// default), those for which the SQL expression `where` is true, by the column `sort` (descending with `-` before it), at most `limit`.
#[pyfunction]
#[pyo3(signature = (path, columns, r#where, sort, limit))]
pub(crate) fn read_results(
    py: Python<'_>,
    path: PathBuf,
    columns: Vec<String>,
    r#where: Option<String>,
    sort: Option<String>,
    limit: Option<usize>,
) -> PyResult<Bound<'_, PyAny>> {
    let read = || {
        let store = Store::read(&path)?;
        let query = Query { columns, condition: r#where, order: sort, limit };
        let names = if query.columns.is_empty() { store.columns()? } else { query.columns.clone() };
        let object = |cells: Vec<Cell>| -> Map<String, Value> {
            names.iter().cloned().zip(cells.iter().map(Cell::to_value)).collect()
        };
        Ok(store.select(&query)?.into_iter().map(object).collect::<Vec<_>>())
    };
    to_python(py, &py.detach(read).map_err(raise)?)
}
