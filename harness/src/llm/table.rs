//! The reference's markdown table: one row per run, mean and deviation over its repeats.

use std::io::Write;
use std::path::Path;

use gearbox_core::{Error, Result};

use crate::atomic::AtomicFile;
use crate::exp::h2o::{Kit, LOG};

/// A cell without a measurement; no gate of `h2o-analyze` passes one.
const MISSING: &str = "n/a";

/// Mean and deviation of the repeats of one measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Deviation of a sample; 0 for one repeat.
    pub deviation: f64,
}

impl Spread {
    /// Of repeats; none if one of them lacks the number, or if there are none.
    pub fn of(values: impl IntoIterator<Item = Option<f64>>) -> Option<Self> {
        let values = values.into_iter().collect::<Option<Vec<f64>>>()?;
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = if values.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 };
        mean.is_finite().then_some(Self { mean, deviation })
    }
}

/// `3.186 ± 0.000`.
pub(super) fn cell(spread: Option<Spread>, decimals: usize) -> String {
    match spread {
        Some(Spread { mean, deviation }) => format!("{mean:.decimals$} ± {deviation:.decimals$}"),
        None => MISSING.to_owned(),
    }
}

/// `6.57 MiB`.
pub(super) fn size(bytes: u64) -> String {
    let mib = bytes as f64 / 1_048_576.0;
    if mib < 1024.0 { format!("{mib:.2} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

/// A table of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// Header and rule.
    head: String,
    row: String,
}

impl Table {
    /// The table of a revision: `cell` gives the cells by column, and `more` are columns behind those of the revision.
    pub(super) fn new(kit: Kit, more: &[&'static str], cell: impl Fn(&str) -> String) -> Self {
        let mut columns: Vec<&str> = kit.columns().into_iter().filter(|column| *column != LOG).collect();
        let place = columns.iter().position(|column| *column == "threads").map_or(0, |place| place + 1);
        columns.insert(place, "precision");
        columns.extend(more);
        let is_number = |column: &str| column.starts_with("h2o_") || column.contains('(');
        let rule = columns.iter().map(|column| if is_number(column) { "---:" } else { "---" });
        let line = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
        let head = line(columns.clone()) + &line(rule.collect());
        let cells: Vec<String> = columns.iter().map(|column| cell(column).replace('|', "/")).collect();
        Self { head, row: line(cells.iter().map(String::as_str).collect()) }
    }

    /// Adds the row to a log, with a header unless the log ends with a table that has the same: a header in the middle of a table is taken
    /// for a row.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if the log is no text; [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
    pub fn append(&self, path: &Path) -> Result<()> {
        let old = match std::fs::read(path) {
            Ok(bytes) => String::from_utf8(bytes)
                .map_err(|_| Error::invalid_input(format!("`{}`: expected a log in UTF-8", path.display())))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::io(path, &error)),
        };
        let gap = if old.is_empty() || old.ends_with('\n') { "" } else { "\n" };
        let header = self.head.lines().next();
        let is_last = old.lines().rfind(|line| line.starts_with("| model |")) == header;
        let head = if is_last && header.is_some() { "" } else { &self.head };
        let mut file = AtomicFile::create(path, true)?;
        write!(file, "{old}{gap}{head}{}", self.row).map_err(|error| Error::io(path, &error))?;
        file.commit()
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.head, self.row.trim_end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_those_of_the_reference() {
        let table = |kit, more: &[&'static str]| Table::new(kit, more, |_| "x".to_owned()).head;
        let v2 = "| model | modelSize | backend | threads | precision | llm_demo | speed(tok/s) | h2o_keep | h2o_lossy | h2o_lossless \
                  | h2o_target_keep_effective | h2o_floor_keep | h2o_quantized_keep | h2o_evict_us | h2o_codec_us";
        let v3 = "| h2o_lossless_raw_mb | h2o_lossless_comp_mb | h2o_lossless_comp_us | h2o_lossless_decomp_us | h2o_lossless_fallback";
        assert_eq!(table(Kit::V2, &[]).lines().next().unwrap(), format!("{v2} |"));
        assert_eq!(table(Kit::V3, &[]).lines().next().unwrap(), format!("{v2} {v3} |"));
        assert!(table(Kit::V4, &["loadingTime(s)"]).lines().next().unwrap().ends_with(" | loadingTime(s) |"));
        assert!(
            table(Kit::V2, &[]).lines().nth(1).unwrap().starts_with("| --- | --- | --- | --- | --- | --- | ---: |")
        );
    }

    #[test]
    fn spread_is_of_a_sample() {
        let of = |values: &[f64]| Spread::of(values.iter().copied().map(Some));
        assert_eq!(of(&[1.0, 3.0]), Some(Spread { mean: 2.0, deviation: 2.0_f64.sqrt() }));
        assert_eq!(cell(of(&[3.186]), 3), "3.186 ± 0.000");
        assert_eq!(cell(Spread::of([Some(1.0), None]), 3), "n/a");
        assert_eq!(of(&[]), None);
        assert_eq!((size(6_892_248), size(3 << 29)), ("6.57 MiB".to_owned(), "1.50 GiB".to_owned()));
    }

    #[test]
    fn rows_of_one_table_share_a_header() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("a.log");
        std::fs::write(&log, "warm-up").unwrap();
        let of = |kit, value: &str| Table::new(kit, &[], |_| value.to_owned());
        of(Kit::V2, "a").append(&log).unwrap();
        of(Kit::V2, "b").append(&log).unwrap();
        of(Kit::V3, "c").append(&log).unwrap();
        let text = std::fs::read_to_string(&log).unwrap();
        let starts: Vec<_> = text.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(starts, ["warm-up", "| model", "| ---", "| a", "| b", "| model", "| ---", "| c"]);
        std::fs::write(&log, [0xFF]).unwrap();
        assert!(of(Kit::V2, "a").append(&log).unwrap_err().to_string().contains("expected a log in UTF-8"));
        assert_eq!(std::fs::read(&log).unwrap(), [0xFF]);
    }
}
