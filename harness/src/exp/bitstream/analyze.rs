//! Sizes: a table of all entries and the ratios over them.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use gearbox_core::{Error, Result, ResultExt};
use serde_json::json;

use super::folder::{Encoded, create_dir, list};
use super::{Coder, folder};
use crate::exp::text::Float;
use crate::report;
use crate::status::Status;

/// Adds up the sizes of what the encoder wrote.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Without --include-meta neither meta files nor codebooks are counted, although nothing decodes without them; with it \
half of each counts as keys and half as values. Entries whose original is missing are left out.
Exit status: 0, or 2 if entries cannot be read."
)]
pub struct AnalyzeArgs {
    /// Folder of the streams
    #[arg(long, value_name = "DIR")]
    bitstream_dir: PathBuf,
    /// Dump that was encoded
    #[arg(long, value_name = "DIR")]
    orig_dump_dir: PathBuf,
    /// Folder for the results; created if needed
    #[arg(long, value_name = "DIR", default_value = "exp/bitstream/out")]
    out_dir: PathBuf,
    /// Count meta files, and in the totals the codebook
    #[arg(long)]
    include_meta: bool,
    /// Replace existing results
    #[arg(long)]
    overwrite: bool,
}

/// Sizes of one entry in bytes.
struct Row {
    /// Run, layer, stage and tokens as the meta file has them.
    labels: [String; 4],
    raw: [u64; 2],
    coded: [u64; 2],
    meta: u64,
}

const HEADER: &str = "run_id,layer_id,stage,seq_len,k_raw,v_raw,k_comp,v_comp,k_ratio,v_ratio";

impl AnalyzeArgs {
    /// Runs the experiment and prints which files it wrote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if there is no entry or results exist already; else what reading
    /// and writing report.
    pub fn run<C: Coder>(&self, json: bool) -> Result<Status> {
        let listing = list::<C>(&self.bitstream_dir)?;
        let mut status = if listing.bad > 0 { Status::BadInput } else { Status::Pass };
        let mut rows = Vec::new();
        let mut missing = 0;
        for entry in &listing.entries {
            match self.row(entry).context(|| format!("`{}`", entry.path.display())) {
                Ok(Some(row)) => rows.push(row),
                Ok(None) => missing += 1,
                Err(error) => {
                    tracing::error!("{error}");
                    status = Status::BadInput;
                }
            }
        }
        if missing > 0 {
            tracing::warn!("left out {missing} entries whose original is missing");
        }
        let book = if self.include_meta { size(&self.bitstream_dir.join(C::BOOK))? } else { None };
        let totals = Totals::of(&rows, self.include_meta, book.unwrap_or_default());

        create_dir(&self.out_dir)?;
        let mut paths = Vec::new();
        for (name, text) in [("metrics.csv", self.csv(&rows)), ("summary.md", self.markdown::<C>(rows.len(), &totals))]
        {
            let path = self.out_dir.join(format!("{}_{name}", C::RESULTS));
            folder::write(&path, text.as_bytes(), self.overwrite)?;
            paths.push(path.display().to_string());
        }
        if json {
            report::print_json(&json!({
                "files": paths, "dumps": rows.len(), "include_meta": self.include_meta, "codebook_bytes": totals.book,
                "k_ratio": totals.ratio([true, false]), "v_ratio": totals.ratio([false, true]), "kv_ratio": totals.ratio([true, true]),
            }))?;
        } else {
            for path in paths {
                report::print(&format!("Wrote {path}"))?;
            }
        }
        Ok(status)
    }

    /// The sizes of an entry; none if its original is missing.
    fn row(&self, entry: &Encoded) -> Result<Option<Row>> {
        let originals = self.orig_dump_dir.join(entry.place(&self.bitstream_dir)?);
        let raw = [size(&entry.file("k_file", &originals)?)?, size(&entry.file("v_file", &originals)?)?];
        let [Some(key), Some(value)] = raw else { return Ok(None) };
        let mut streams = [0; 4];
        for (size_of, path) in streams.iter_mut().zip(entry.streams()?) {
            *size_of = expect_size(&path)?;
        }
        let label = |key: &str| entry.meta.get(key).map(ToString::to_string).unwrap_or_default();
        Ok(Some(Row {
            labels: ["run_id", "layer_id", "stage", "seq_len"].map(label),
            raw: [key, value],
            coded: [streams[0] + streams[1], streams[2] + streams[3]],
            meta: expect_size(&entry.path)?,
        }))
    }

    fn csv(&self, rows: &[Row]) -> String {
        // The reference takes the header from its first row.
        if rows.is_empty() {
            return "\n".to_owned();
        }
        let mut text = format!("{HEADER}\n");
        for row in rows {
            let coded =
                row.coded.map(|coded| coded as f64 + if self.include_meta { row.meta as f64 / 2.0 } else { 0.0 });
            let shown =
                coded.map(|coded| if self.include_meta { Float(coded).to_string() } else { format!("{coded}") });
            let ratios = [0, 1].map(|role| Float(ratio(row.raw[role] as f64, coded[role])));
            let [key, value] = row.raw;
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{},{key},{value},{},{},{}",
                row.labels.join(","),
                shown.join(","),
                ratios[0],
                ratios[1]
            );
        }
        text
    }

    fn markdown<C: Coder>(&self, rows: usize, totals: &Totals) -> String {
        let include_meta = if self.include_meta { "True" } else { "False" };
        let mut text = format!("{}\n\n- Dumps analyzed: {rows}\n- Include meta bytes: {include_meta}\n\n", C::TITLE);
        if totals.book > 0 {
            let _ = writeln!(text, "- Global codebook bytes: {}\n", totals.book);
        }
        for (name, roles) in [("K", [true, false]), ("V", [false, true]), ("KV", [true, true])] {
            let _ = writeln!(text, "- Weighted {name} ratio: {:.3}", totals.ratio(roles));
        }
        text
    }
}

/// Sums over all entries.
struct Totals {
    raw: [f64; 2],
    coded: [f64; 2],
    /// Bytes of the codebook.
    book: u64,
}

impl Totals {
    fn of(rows: &[Row], include_meta: bool, book: u64) -> Self {
        let sum = |of: &dyn Fn(&Row) -> u64| rows.iter().map(of).sum::<u64>() as f64;
        let shared = if include_meta { sum(&|row| row.meta) / 2.0 + book as f64 / 2.0 } else { 0.0 };
        Self {
            raw: [sum(&|row| row.raw[0]), sum(&|row| row.raw[1])],
            coded: [sum(&|row| row.coded[0]) + shared, sum(&|row| row.coded[1]) + shared],
            book,
        }
    }

    /// The ratio over some of the roles.
    fn ratio(&self, roles: [bool; 2]) -> f64 {
        let sum = |of: [f64; 2]| of.into_iter().zip(roles).filter(|(_, is_in)| *is_in).map(|(bytes, _)| bytes).sum();
        ratio(sum(self.raw), sum(self.coded))
    }
}

fn ratio(raw: f64, coded: f64) -> f64 {
    if coded > 0.0 { raw / coded } else { 0.0 }
}

/// Bytes of a file, none if there is no such file.
fn size(path: &Path) -> Result<Option<u64>> {
    match fs::metadata(path) {
        Ok(found) => Ok(Some(found.len())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path, &error)),
    }
}

fn expect_size(path: &Path) -> Result<u64> {
    size(path)?.ok_or_else(|| Error::invalid_input(format!("`{}`: expected a file, found none", path.display())))
}
