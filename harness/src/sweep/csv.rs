//! Rows as CSV, one line each, with every number that a gate may look at.

use std::io::Write;

use super::Row;
use crate::gate::Metric;

const FIXED: [&str; 21] = [
    "dump",
    "pipeline",
    "chunking",
    "state",
    "reason",
    "gate",
    "pareto",
    "labels",
    "original_bytes",
    "stored_bytes",
    "key_original_bytes",
    "key_stored_bytes",
    "value_original_bytes",
    "value_stored_bytes",
    "values",
    "changed_values",
    "escapes",
    "encode_ns",
    "decode_ns",
    "floor",
    "gap",
];

/// Writes rows, each with whether it is on the front.
///
/// # Errors
/// What the writer reports.
pub fn write_csv<'a>(rows: impl Iterator<Item = (&'a Row, bool)>, out: impl Write) -> Result<(), csv::Error> {
    let mut csv = csv::Writer::from_writer(out);
    let metrics: Vec<_> = Metric::OF_DUMPS.iter().map(ToString::to_string).collect();
    csv.write_record(FIXED.into_iter().chain(metrics.iter().map(String::as_str)).chain(["pipeline_json"]))?;
    for (row, front) in rows {
        let (state, reason) = (row.outcome.state(), row.outcome.reason().unwrap_or_default());
        let gate = row.verdict.as_ref().map_or(String::new(), ToString::to_string);
        let mut record =
            vec![row.dump.clone(), row.name.clone(), row.chunking.clone(), state.into(), reason.into(), gate];
        let labels: Vec<_> = row.labels.iter().map(ToString::to_string).collect();
        record.extend([front.to_string(), labels.join(" ")]);
        let numbers = [
            row.original_bytes,
            row.stored_bytes,
            row.key.original_bytes,
            row.key.stored_bytes,
            row.value.original_bytes,
            row.value.stored_bytes,
            row.values,
            row.changed_values,
            row.escapes,
            row.encode_ns,
            row.decode_ns,
        ];
        record.extend(numbers.map(|number| number.to_string()));
        let number = |number: Option<f64>| number.map_or(String::new(), |number| number.to_string());
        record.extend([row.floor, row.gap].map(number));
        record.extend(Metric::OF_DUMPS.map(|metric| number(row.measured(metric))));
        record.push(row.pipeline.to_string());
        csv.write_record(&record)?;
    }
    csv.flush()?;
    Ok(())
}
