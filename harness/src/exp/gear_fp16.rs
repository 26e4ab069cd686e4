//! `exp gear-fp16`: how small do plain zstd, the byte split and the byte split with delta make each tensor and each head?
//!
//! Only the lengths of zstd frames are counted, without shapes or headers; what a container really takes is what `gearbox sweep` reports.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use gearbox_core::{Error, Result, ResultExt};
use rayon::prelude::*;
use serde_json::json;

use self::bins::Bins;
use self::measure::{Measurer, Pair};
use self::run_log::PromptTokens;
use crate::atomic::AtomicFile;
use crate::dump::{Dump, Entry};
use crate::exp::InputArgs;
use crate::exp::text::write_csv;
use crate::report;
use crate::status::Status;

mod bins;
mod measure;
mod run_log;
mod summary;
mod table;
#[cfg(test)]
mod tests;

/// Measures zstd, byte split and byte split with delta over every entry and head.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Writes layer_metrics.csv, head_metrics.csv, summary.md and, with --run-log, grouped_summary.md.
Ratios count zstd frames only; the byte columns on the right are the lengths they come from."
)]
pub struct GearFp16Args {
    #[command(flatten)]
    input: InputArgs,
    /// Folder for the results; created if needed
    #[arg(long, value_name = "DIR", default_value = "exp/gear_fp16/out")]
    out_dir: PathBuf,
    /// Effort of zstd: negative is fastest, 22 smallest, 0 the library's default
    #[arg(long, value_name = "LEVEL", default_value_t = 3, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-131_072..=22))]
    zstd_level: i32,
    /// Leave out single heads and `head_metrics.csv`
    #[arg(long)]
    skip_head_metrics: bool,
    /// JSON lines with `run_id` and `metrics.prompt_tokens`; adds prompt tokens and `grouped_summary.md`
    #[arg(long, value_name = "FILE")]
    run_log: Option<PathBuf>,
    /// Groups of `grouped_summary.md` in prompt tokens: `LOW-HIGH`, both ends included, or `LOW+`, separated by commas
    #[arg(long, value_name = "BINS", default_value = "0-256,257-512,513-1024,1025-2048,2049+")]
    group_bins: Bins,
    /// Replace existing results
    #[arg(long)]
    overwrite: bool,
}

/// One entry with what was measured on it.
struct Row<'a> {
    run: &'a str,
    layer: u32,
    entry: &'a Entry,
    prompt_tokens: Option<u64>,
    measured: Pair,
}

impl GearFp16Args {
    /// Runs the experiment and prints which files it wrote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for a bad run log, existing results or a dump without entries;
    /// else what reading and writing report.
    pub fn run(&self, json: bool) -> Result<Status> {
        let (dump, status) = self.input.open()?;
        self.measure(&dump, status, json)
    }

    /// The same on a dump that is open; `status` is how opening it ended.
    ///
    /// # Errors
    /// As [`GearFp16Args::run`].
    pub(super) fn measure(&self, dump: &Dump, status: Status, json: bool) -> Result<Status> {
        let start = Instant::now();
        let prompt_tokens = self.run_log.as_deref().map(PromptTokens::read).transpose()?;
        let outputs = self.create_outputs()?;

        let (pairs, zstd) = measure(dump, self.zstd_level, !self.skip_head_metrics)?;
        let rows: Vec<Row<'_>> = dump
            .iter()
            .zip(pairs)
            .map(|((run, layer, entry), measured)| {
                let prompt_tokens = prompt_tokens.as_ref().and_then(|tokens| tokens.of(&run.name));
                Row { run: &run.name, layer: layer.id, entry, prompt_tokens, measured }
            })
            .collect();
        if prompt_tokens.is_some() {
            let unknown = rows.iter().filter(|row| row.prompt_tokens.is_none()).count();
            if unknown > 0 {
                tracing::warn!("{unknown} of {} entries are of runs that the run log does not name", rows.len());
            }
        }

        let write = |(output, mut file): (Output, AtomicFile)| {
            let path = file.path().to_path_buf();
            let failed = |error: std::io::Error| Error::io(&path, &error);
            match output {
                Output::Layers => {
                    file = write_csv(file, &path, &table::layer_header(), &rows, table::layer_row)?;
                }
                Output::Heads => {
                    let widths = table::widths(&rows);
                    file = write_csv(
                        file,
                        &path,
                        &table::head_header(&widths),
                        table::heads(&rows),
                        |(row, head), cells| {
                            table::head_row(row, head, &widths, cells);
                        },
                    )?;
                }
                Output::Summary => file.write_all(summary::markdown(&rows).as_bytes()).map_err(failed)?,
                Output::Grouped => {
                    file.write_all(summary::grouped(&rows, &self.group_bins).as_bytes()).map_err(failed)?;
                }
            }
            Ok(file)
        };
        let written: Vec<AtomicFile> = outputs.into_par_iter().map(write).collect::<Result<_>>()?;
        let paths: Vec<_> = written.iter().map(|file| file.path().display().to_string()).collect();
        for file in written {
            file.commit()?;
        }

        let time = Time { wall: start.elapsed(), zstd, threads: rayon::current_num_threads() };
        eprintln!("{time}");
        if json {
            report::print_json(&json!({
                "files": paths,
                "dumps": rows.len(),
                "ratios": summary::ratios(&rows),
                "totals": summary::totals(&rows),
                "wall_s": time.wall.as_secs_f64(),
                "zstd_s": time.zstd.as_secs_f64(),
                "threads": time.threads,
            }))?;
        } else {
            for path in paths {
                report::print(&format!("Wrote {path}"))?;
            }
        }
        Ok(status)
    }

    /// Starts every output before any work, so that an existing one is known at once.
    fn create_outputs(&self) -> Result<Vec<(Output, AtomicFile)>> {
        std::fs::create_dir_all(&self.out_dir).map_err(|error| Error::io(&self.out_dir, &error))?;
        let mut outputs = vec![(Output::Layers, "layer_metrics.csv")];
        if !self.skip_head_metrics {
            outputs.push((Output::Heads, "head_metrics.csv"));
        }
        outputs.push((Output::Summary, "summary.md"));
        if self.run_log.is_some() {
            outputs.push((Output::Grouped, "grouped_summary.md"));
        }
        let create = |(output, name)| Ok((output, AtomicFile::create(self.out_dir.join(name), self.overwrite)?));
        outputs.into_iter().map(create).collect()
    }
}

/// One file of results.
enum Output {
    Layers,
    Heads,
    Summary,
    Grouped,
}

/// Measures every entry of the dump, in its order, and how long zstd took in all threads together.
fn measure(dump: &Dump, level: i32, heads: bool) -> Result<(Vec<Pair>, Duration)> {
    let entries: Vec<&Entry> = dump.iter().map(|(_, _, entry)| entry).collect();
    let progress = report::progress(dump.original_bytes(), "gear-fp16");
    let measurer = Measurer::new(level, heads);
    let tensors: Vec<_> = (0..2 * entries.len())
        .into_par_iter()
        .with_max_len(1)
        .map(|idx| {
            let entry = entries[idx / 2];
            let tensor = if idx % 2 == 0 { &entry.key } else { &entry.value };
            let result = measurer.measure(tensor).context(|| entry.place.clone())?;
            progress.inc(tensor.bytes_len());
            Ok(result)
        })
        .collect::<Result<_>>()?;
    progress.finish_and_clear();
    let zstd = tensors.iter().map(|tensor| tensor.zstd_time).sum();
    let mut tensors = tensors.into_iter();
    let mut pairs = Vec::with_capacity(entries.len());
    while let (Some(key), Some(value)) = (tensors.next(), tensors.next()) {
        pairs.push(Pair { key, value });
    }
    Ok((pairs, zstd))
}

/// What the whole experiment took, beside what zstd alone took.
struct Time {
    wall: Duration,
    zstd: Duration,
    threads: usize,
}

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (wall, zstd) = (self.wall.as_secs_f64(), self.zstd.as_secs_f64());
        let share = zstd / self.threads as f64;
        write!(
            f,
            "{wall:.3} s in all; zstd alone {zstd:.3} s, {share:.3} s on each of {} threads; {:.2} times that",
            self.threads,
            wall / share
        )
    }
}
