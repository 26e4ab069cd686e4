//! Text as the reference writes it: floats in shortest round-trip form, CSV with CRLF line ends.

use std::fmt::{Display, Write as _};
use std::io::Write;
use std::path::Path;

use csv::{ByteRecord, Terminator, WriterBuilder};
use gearbox_core::{Error, Result};
use serde::Serialize;

/// A float in the shortest decimal form that reads back as the same value, always with a fraction or an exponent.
///
/// The exponent form is used below 1e-4 and from 1e16 on, with a sign and at least two digits.
///
/// # Examples
/// ```
/// use gearbox::exp::text::Float;
///
/// assert_eq!(Float(1.0).to_string(), "1.0");
/// assert_eq!(Float(0.1 + 0.2).to_string(), "0.30000000000000004");
/// assert_eq!(Float(-0.0).to_string(), "-0.0");
/// assert_eq!(Float(1e-5).to_string(), "1e-05");
/// assert_eq!(Float(1.5e16).to_string(), "1.5e+16");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Float(pub f64);

impl Display for Float {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = self.0;
        let size = value.abs();
        if value.is_nan() {
            return f.write_str("nan");
        }
        // Rust's two forms have the same digits; only the choice between them differs.
        if size == 0.0 || (1e-4..1e16).contains(&size) || size.is_infinite() {
            let point = if size.fract() == 0.0 { ".0" } else { "" };
            return match even(value) {
                Some(text) => f.write_str(&text),
                None => write!(f, "{value}{point}"),
            };
        }
        let scientific = format!("{value:e}");
        match scientific.split_once("e-") {
            Some((digits, exponent)) => write!(f, "{digits}e-{exponent:0>2}"),
            None => f.write_str(&scientific.replace('e', "e+")),
        }
    }
}

/// The fixed form of a value that lies in the middle between two shortest ones: the reference takes the even one, Rust the upper one.
fn even(value: f64) -> Option<String> {
    // The value is an odd number divided by two to the power of `places`, and so has as many decimals.
    let bits = value.to_bits();
    let exponent = i64::from((bits >> 52 & 0x7FF) as u32) - 1075;
    let places = -exponent - i64::from((bits | 1 << 52).trailing_zeros());
    // From 1e-4 on, 17 digits end at the 21st decimal.
    let decimals = usize::try_from(places).ok().filter(|places| (2..=22).contains(places))? - 1;
    let even = format!("{value:.decimals$}");
    let shortest = value.to_string();
    (even.len() == shortest.len() && even != shortest && even.parse() == Ok(value)).then_some(even)
}

/// Adds text, a line or several.
pub(super) fn push(text: &mut String, more: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = text.write_fmt(more);
}

/// Indented JSON in ASCII, without a line end behind it.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if a map of the value has keys that are no strings.
pub(super) fn ascii_json(value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::invalid_input(error.to_string()))?;
    let mut ascii = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() {
            ascii.push(c);
        } else {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| push(&mut ascii, format_args!("\\u{unit:04x}")));
        }
    }
    Ok(ascii)
}

/// The cells of one CSV row, filled from left to right.
#[derive(Debug, Default)]
pub struct Cells {
    row: ByteRecord,
    scratch: String,
}

impl Cells {
    /// Adds anything that can be displayed: text, an integer, a [`Float`].
    pub fn push(&mut self, value: impl Display) {
        self.scratch.clear();
        // Writing to a string cannot fail.
        let _ = write!(self.scratch, "{value}");
        self.row.push_field(self.scratch.as_bytes());
    }

    /// Adds several cells.
    pub fn extend(&mut self, values: impl IntoIterator<Item: Display>) {
        for value in values {
            self.push(value);
        }
    }
}

/// Writes a header and rows with commas, CRLF and quotes only where they are needed, and hands back what was written to.
///
/// `fill` adds the cells of one row.
///
/// # Errors
/// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io), naming `path`, if the file cannot be written.
pub fn write_csv<W: Write, R>(
    out: W,
    path: &Path,
    header: &[String],
    rows: impl IntoIterator<Item = R>,
    fill: impl Fn(R, &mut Cells),
) -> Result<W> {
    let failed = |error: csv::Error| Error::io(path, &error.into());
    let mut csv = WriterBuilder::new().terminator(Terminator::CRLF).from_writer(out);
    csv.write_record(header).map_err(failed)?;
    let mut cells = Cells::default();
    for row in rows {
        cells.row.clear();
        fill(row, &mut cells);
        csv.write_byte_record(&cells.row).map_err(failed)?;
    }
    csv.into_inner().map_err(|error| Error::io(path, error.error()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn form_of_floats_changes_where_the_reference_changes_it() {
        let cases = [
            (0.0, "0.0"),
            (0.0001, "0.0001"),
            (0.000_099, "9.9e-05"),
            (123_456_789.0, "123456789.0"),
            (9_007_199_254_740_993.0, "9007199254740992.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1e100, "1e+100"),
            (5e-324, "5e-324"),
            (-2.5, "-2.5"),
            (0.117_771_148_681_640_63, "0.11777114868164062"),
            (-0.001_201_152_801_513_671_9, "-0.0012011528015136719"),
            (0.000_732_421_875, "0.000732421875"),
            (0.5, "0.5"),
            (0.25, "0.25"),
            (f64::NAN, "nan"),
            (f64::INFINITY, "inf"),
            (f64::NEG_INFINITY, "-inf"),
        ];
        for (value, text) in cases {
            assert_eq!(Float(value).to_string(), text);
        }
    }

    #[test]
    fn csv_quotes_only_what_needs_it_and_ends_lines_with_crlf() {
        let header = ["run".to_owned(), "x".to_owned()];
        let fill = |row: [&str; 2], cells: &mut Cells| cells.extend(row);
        let bytes = write_csv(Vec::new(), Path::new("t.csv"), &header, [["a,\"b\"", ""]], fill).unwrap();
        assert_eq!(bytes, b"run,x\r\n\"a,\"\"b\"\"\",\r\n");
    }
}
