//! The rows that `h2o-parse` wrote, as numbers.

use std::path::Path;

use csv::StringRecord;
use gearbox_core::{Error, Result};

use super::parse::LOG;

/// The column of which the second part is the decode rate.
pub(super) const SPEED: &str = "speed(tok/s)";
/// What stands between the prefill and the decode rate.
const BREAK: &str = "<br>";

/// A CSV file with a header.
#[derive(Debug)]
pub(super) struct Rows {
    header: StringRecord,
    rows: Vec<StringRecord>,
}

/// One column as numbers.
#[derive(Clone, Debug)]
pub(super) struct Column {
    /// One number per row; zero where there is none, as in the reference.
    pub values: Vec<f64>,
    /// Why nothing may be judged by it: it is missing, or a cell is no measurement.
    pub problem: Option<String>,
}

impl Rows {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if it is no CSV or has no row.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
        Self::parse(&bytes).map_err(|error| error.context(format!("`{}`", path.display())))
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let bad = |error: csv::Error| Error::invalid_input(error.to_string());
        let mut reader = csv::Reader::from_reader(bytes);
        let header = reader.headers().map_err(bad)?.clone();
        let rows = reader.into_records().collect::<Result<Vec<_>, _>>().map_err(bad)?;
        if rows.is_empty() {
            return Err(Error::invalid_input("expected at least one row, got none"));
        }
        Ok(Self { header, rows })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.header.iter().position(|column| column == name)
    }

    /// Whether there is a column of this name.
    pub fn has(&self, name: &str) -> bool {
        self.place(name).is_some()
    }

    /// The log that a row is from.
    pub fn log(&self, row: usize) -> &str {
        self.place(LOG).map_or("", |place| &self.rows[row][place])
    }

    /// A column; the decode rates for [`SPEED`].
    pub fn column(&self, name: &str) -> Column {
        let Some(place) = self.place(name) else {
            let problem = Some(format!("column `{name}` is missing"));
            return Column { values: vec![0.0; self.len()], problem };
        };
        let mut problem = None;
        let values = self.rows.iter().enumerate().map(|(row, cells)| {
            let cell = &cells[place];
            let part = if name == SPEED { cell.split_once(BREAK).map_or("", |(_, decode)| decode) } else { cell };
            if !is_measurement(part) && problem.is_none() {
                problem = Some(format!("row {}, `{name}`: expected a measurement, got `{cell}`", row + 1));
            }
            number(part)
        });
        Column { values: values.collect(), problem }
    }
}

impl Column {
    /// The greatest value, not below zero.
    pub fn max(&self) -> f64 {
        self.values.iter().copied().fold(0.0, f64::max)
    }

    /// The mean, added up in the order of the rows.
    pub fn mean(&self) -> f64 {
        self.values.iter().sum::<f64>() / self.values.len() as f64
    }
}

/// The first number in a text: sign, digits and a fraction, without exponents; zero if there is none.
fn number(text: &str) -> f64 {
    let Some(start) = text.find(|c: char| c.is_ascii_digit()) else { return 0.0 };
    let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let mut end = start + digits(&text[start..]);
    if let Some(fraction) = text[end..].strip_prefix('.') {
        // A point without digits behind it is none of the number, but reads the same.
        end += 1 + digits(fraction);
    }
    let size: f64 = text[start..end].parse().unwrap_or(0.0);
    if text[..start].ends_with('-') { -size } else { size }
}

/// Whether a cell is a number that [`number`] reads whole, or a mean and a deviation of the form `1.5 ± 0.1`.
fn is_measurement(cell: &str) -> bool {
    let is_number = |part: &str| part.parse::<f64>().is_ok() && !part.contains(|c: char| c.is_ascii_alphabetic());
    cell.split('±').count() <= 2 && cell.split('±').all(|part| is_number(part.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_number_of_a_cell_counts() {
        for (text, expected) in [
            ("3.186 ± 0.000", 3.186),
            ("h2o_lossy", 2.0),
            ("x-1.5y", -1.5),
            ("+7", 7.0),
            ("1.", 1.0),
            ("1.2.3", 1.2),
            ("2e5", 2.0),
            ("- 4", 4.0),
            ("", 0.0),
            ("none", 0.0),
        ] {
            assert_eq!(number(text).to_bits(), f64::to_bits(expected), "{text}");
        }
    }

    #[test]
    fn only_measurements_may_be_judged() {
        for good in ["3", "-0.5", "3.186 ± 0.000", " 1 ± 2 "] {
            assert!(is_measurement(good), "{good}");
        }
        for bad in ["", "h2o_lossy", "3.1 ±", "1 ± 2 ± 3", "nan", "inf", "1e5", "3 MiB"] {
            assert!(!is_measurement(bad), "{bad}");
        }
    }

    #[test]
    fn columns_say_why_they_may_not_be_judged() {
        let rows =
            Rows::parse("a,speed(tok/s)\n3.0 ± 0.1,30.10 ± 0.10<br>6.65 ± 0.01\na,speed(tok/s)\n".as_bytes()).unwrap();
        assert_eq!((rows.len(), rows.has("a"), rows.has("b")), (2, true, false));
        let a = rows.column("a");
        assert_eq!((a.max(), a.mean()), (3.0, 1.5));
        assert_eq!(a.problem.unwrap(), "row 2, `a`: expected a measurement, got `a`");
        assert_eq!(rows.column(SPEED).values, [6.65, 0.0]);
        let missing = rows.column("b");
        assert_eq!((missing.values, missing.problem.unwrap().as_str()), (vec![0.0; 2], "column `b` is missing"));
        assert_eq!(rows.log(0), "");
    }

    #[test]
    fn nothing_to_read_is_an_error() {
        for text in ["", "a,b\n"] {
            let error = Rows::parse(text.as_bytes()).unwrap_err();
            assert_eq!(error.to_string(), "expected at least one row, got none");
        }
        assert!(Rows::parse(b"a,b\n1\n").unwrap_err().to_string().contains("found record with 1 fields"));
    }
}
