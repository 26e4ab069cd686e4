//! What people get to see: aligned tables, JSON for programs, progress for terminals, and the folder that `gearbox report` writes.

use comfy_table::{CellAlignment, Table, presets};
use gearbox_core::{Error, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

mod axis;
mod folder;
mod markdown;
mod page;
mod plots;
mod results;
mod svg;

pub use self::folder::write as write_folder;
pub use self::results::{Line, ModelResults, ModelRow, Options, Results, Source};

/// A table with columns of text on the left and of numbers on the right.
#[derive(Debug)]
pub struct Columns(Table);

impl Columns {
    /// A table with these headings; a heading that starts with `>` is of a number column.
    pub fn new(headings: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header(headings.iter().map(|heading| heading.trim_start_matches('>')));
        for (idx, heading) in headings.iter().enumerate() {
            if let (true, Some(column)) = (heading.starts_with('>'), table.column_mut(idx)) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        Self(table)
    }

    /// Adds a row.
    pub fn row<I: IntoIterator<Item = String>>(&mut self, cells: I) {
        self.0.add_row(cells);
    }
}

impl std::fmt::Display for Columns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Prints a value as indented JSON on standard output.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::invalid_input(error.to_string()))?;
    print(&text)
}

/// Prints a line on standard output.
///
/// # Errors
/// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if standard output takes no more, such as a full disk.
pub fn print(text: &str) -> Result<()> {
    use std::io::{ErrorKind, Write};
    match writeln!(std::io::stdout().lock(), "{text}") {
        // `gearbox … | head` has read enough; the exit status still says how the command ended.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|error| Error::io("standard output", &error)),
    }
}

/// A progress bar over bytes on standard error; silent when that is not a terminal.
pub fn progress(bytes: u64, what: impl Into<String>) -> ProgressBar {
    bar(bytes, what, "{msg} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta} left")
}

/// A progress bar over steps of equal size on standard error, whose number is set later; silent when that is not a terminal.
pub fn steps(what: impl Into<String>) -> ProgressBar {
    bar(0, what, "{msg} [{bar:30}] {pos}/{len} {per_sec} {eta} left")
}

fn bar(len: u64, what: impl Into<String>, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.into());
    bar
}

/// A number of bytes for people, such as `1.6 MiB`.
pub fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// `original ÷ stored` with three decimals; `-` if nothing is stored.
pub fn ratio(original: u64, stored: u64) -> String {
    if stored == 0 { "-".into() } else { format!("{:.3}", original as f64 / stored as f64) }
}

/// A number with so many decimals; `-` if there is none, or if it is infinite.
pub fn decimal(number: Option<f64>, decimals: usize) -> String {
    let text = |number: f64| if number.abs() < 1e6 { format!("{number:.decimals$}") } else { format!("{number:.1e}") };
    number.filter(|number| number.is_finite()).map_or("-".into(), text)
}

/// Throughput in 10^6 bytes per second with no decimals; `-` if no time was measured.
pub fn rate(bytes: u64, ns: u64) -> String {
    if ns == 0 { "-".into() } else { format!("{:.0}", bytes as f64 * 1e3 / ns as f64) }
}
