//! A store as CSV or JSON, for programs that know no SQLite.

use std::io::{self, Write};

use gearbox_core::{Error, Result};
use serde_json::{Value, json};

use super::{Cell, Query, Store, to_json};

/// Writes rows as CSV: the columns of the view `results`.
///
/// # Errors
/// As [`Store::each`]; [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if `out` takes no more.
pub fn export_csv(store: &Store, query: &Query, out: &mut impl Write) -> Result<()> {
    let failed = |error: csv::Error| Error::io("export", &error.into());
    let mut csv = csv::Writer::from_writer(out);
    let columns = if query.columns.is_empty() { store.columns()? } else { query.columns.clone() };
    csv.write_record(&columns).map_err(failed)?;
    store.each(query, |cells| csv.write_record(cells.iter().map(ToString::to_string)).map_err(failed))?;
    csv.flush().map_err(|error| Error::io("export", &error))
}

/// Writes whole rows as JSON, with their key as `row_key` and their receipt, beside the dumps and canaries: `{ "dumps": […], "canaries": […], "rows": […] }`.
///
/// `gearbox gate` reads it as it reads the results of a sweep.
///
/// # Errors
/// As [`export_csv`].
pub fn export_json(store: &Store, query: &Query, out: &mut impl Write) -> Result<()> {
    let failed = |error: io::Error| Error::io("export", &error);
    let dumps: Vec<_> = store.dumps()?.into_iter().map(|(facts, _)| facts).collect();
    let canaries: Vec<_> = store.all_canaries()?.into_iter().map(|(_, canary)| canary).collect();
    write!(out, "{{\n\"dumps\": {},\n\"canaries\": {},\n\"rows\": [", to_json(&dumps), to_json(&canaries))
        .map_err(failed)?;
    let query = Query { columns: ["key", "digest"].map(str::to_owned).into(), ..query.clone() };
    let mut separator = "\n";
    store.each(&query, |cells| {
        let [Cell::Text(key), Cell::Text(digest)] = cells.as_slice() else { return Ok(()) };
        let text = to_json(&whole(store, key, digest)?);
        write!(out, "{separator}{text}").map_err(failed)?;
        separator = ",\n";
        Ok(())
    })?;
    out.write_all(b"\n]\n}\n").map_err(failed)
}

/// A row with its key, its receipt and the plugins that it was made with.
fn whole(store: &Store, key: &str, digest: &str) -> Result<Value> {
    let record = store.record(key)?;
    let mut row = json!(record.row);
    row["row_key"] = key.into();
    row["digest"] = digest.into();
    row["dump_digest"] = record.unit.digest.into();
    row["plugins"] = json!(record.unit.plugins);
    row["refuted"] = json!(record.refuted);
    row["receipt"] = json!(record.receipt);
    Ok(row)
}
