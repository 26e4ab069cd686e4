//! `gearbox sweep`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use gearbox_core::{Error, Registry, Result};

use crate::atomic::AtomicFile;
use crate::entropy::{Entropies, Entropy};
use crate::receipt::Receipt;
use crate::select::SelectArgs;
use crate::status::Status;
use crate::sweep::{Containers, DumpFacts, Sweep, SweepConfig};
use crate::{report, sample, sweep};

/// Runs every pipeline over a dump.
///
/// Each row is a container that was written to disk, read back, decoded from its bytes alone and compared with the dump.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox sweep                                  bundled sample, every codec, every chunking mode
  gearbox sweep configs/zstd-levels.json         pipelines from a file
  gearbox sweep --dump DIR --pipeline gear --pipeline zstd --out results

The key and value columns count chunks and sequence headers of that role; the ratio counts the whole file,
whose bytes are in the column stored. Bits are stored bits per value, and the gap is what they are above the order-0 floor of the dump;
below zero, the pipeline found structure beyond order 0.")]
pub(super) struct SweepArgs {
    /// Sweep as JSON: `{ "dumps": […], "pipelines": […] }` [default: every codec in every chunking mode]
    config: Option<PathBuf>,
    /// Dump to read, may be repeated [default: the config's, else the bundled sample]
    #[arg(long, value_name = "PATH")]
    dump: Vec<PathBuf>,
    /// Pipeline to run, may be repeated: a `.json` file, JSON text or the id of a codec; any value may be `{"sweep": […]}`
    #[arg(long, value_name = "PIPELINE", conflicts_with = "config")]
    pipeline: Vec<String>,
    /// Folder for sweep.json, sweep.csv and sweep.md
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Keep the containers beside them
    #[arg(long, requires = "out")]
    keep_containers: bool,
    /// Replace existing files
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    select: SelectArgs,
}

impl SweepArgs {
    pub(super) fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        let mut config = self.config.as_deref().map(SweepConfig::read).transpose()?.unwrap_or_default();
        for text in &self.pipeline {
            config.pipelines.push(crate::pipelines::read(text, registry)?);
        }
        let specs = config.pipelines(registry)?;
        let mut paths = if self.dump.is_empty() { config.dumps } else { self.dump.clone() };
        if paths.is_empty() {
            paths.push(sample::find()?);
        }
        if let Some(out) = &self.out {
            std::fs::create_dir_all(out).map_err(|error| Error::io(out, &error))?;
        }
        let mut files = match &self.out {
            Some(out) => Some(Files::create(out, self.overwrite)?),
            None => None,
        };
        let temporary = tempfile::tempdir().map_err(|error| Error::io(std::env::temp_dir(), &error))?;
        let containers = Containers {
            folder: self.out.clone().filter(|_| self.keep_containers).unwrap_or_else(|| temporary.path().to_owned()),
            keep: self.keep_containers,
            overwrite: self.overwrite,
        };
        let taken = (0..specs.len() * paths.len()).map(|row| containers.path(row)).find(|path| path.exists());
        if let Some(path) = taken.filter(|_| !self.overwrite) {
            return Err(Error::invalid_input(format!("`{}`: exists already; --overwrite replaces it", path.display())));
        }
        let mut status = Status::Pass;
        let mut result = Sweep { receipt: Receipt::new(registry), dumps: Vec::new(), rows: Vec::new() };
        for path in &paths {
            let (dump, opened) = self.select.open(path)?;
            status = status.and(opened);
            let facts = DumpFacts {
                path: path.display().to_string(),
                digest: dump.digest()?,
                runs: dump.runs.len(),
                entries: dump.entries(),
                original_bytes: dump.original_bytes(),
                entropy: Entropies::of(&dump)?.all,
            };
            let rows = sweep::run(&dump, &specs, registry, &containers, result.rows.len())?;
            result.add(facts, rows);
        }
        status = status.and(Status::pass_if(result.passed()));
        let text = summary(&result);
        if let Some(files) = files.take() {
            files.write(&result, &text)?;
        }
        if json {
            report::print_json(&result)?;
        } else {
            report::print(&text)?;
        }
        Ok(status)
    }
}

fn summary(sweep: &Sweep) -> String {
    let mut text = String::new();
    for dump in &sweep.dumps {
        let _ = writeln!(
            text,
            "{}: {} runs, {} entries, {} of keys and values, digest {}",
            dump.path,
            dump.runs,
            dump.entries,
            report::bytes(dump.original_bytes),
            dump.digest
        );
        let Entropy { floor, ceiling, channel_floor, channel_ceiling, .. } = dump.entropy;
        let number = |number| report::decimal(Some(number), 3);
        let _ = writeln!(
            text,
            "order-0 floor: {} bits per value, a ratio of {}; {} and {} with exponents per channel",
            number(floor),
            number(ceiling),
            number(channel_floor),
            number(channel_ceiling)
        );
    }
    let _ = write!(text, "\n{}", sweep.table());
    text
}

/// The output files, created before the work starts so that a name that is taken costs nothing.
struct Files {
    json: AtomicFile,
    csv: AtomicFile,
    markdown: AtomicFile,
}

impl Files {
    fn create(folder: &Path, overwrite: bool) -> Result<Self> {
        let create = |name| AtomicFile::create(folder.join(name), overwrite);
        Ok(Self { json: create("sweep.json")?, csv: create("sweep.csv")?, markdown: create("sweep.md")? })
    }

    fn write(mut self, sweep: &Sweep, text: &str) -> Result<()> {
        use std::io::Write as _;
        serde_json::to_writer_pretty(&mut self.json, sweep).map_err(|error| Error::io("sweep.json", &error.into()))?;
        self.json.commit()?;
        let mut csv = csv::Writer::from_writer(&mut self.csv);
        let failed = |error: csv::Error| Error::io("sweep.csv", &error.into());
        csv.write_record([
            "dump",
            "pipeline",
            "chunking",
            "state",
            "original_bytes",
            "stored_bytes",
            "key_original_bytes",
            "key_stored_bytes",
            "value_original_bytes",
            "value_stored_bytes",
            "values",
            "changed_values",
            "encode_ns",
            "decode_ns",
            "bits_per_value",
            "floor",
            "gap",
            "pipeline_json",
        ])
        .map_err(failed)?;
        for row in &sweep.rows {
            let state =
                serde_json::to_value(&row.outcome).ok().and_then(|value| Some(value["state"].as_str()?.to_owned()));
            let mut record = vec![row.dump.clone(), row.name.clone(), row.chunking.clone(), state.unwrap_or_default()];
            let numbers = [
                row.original_bytes,
                row.stored_bytes,
                row.key.original_bytes,
                row.key.stored_bytes,
                row.value.original_bytes,
                row.value.stored_bytes,
                row.values,
                row.changed_values,
                row.encode_ns,
                row.decode_ns,
            ];
            record.extend(numbers.map(|number| number.to_string()));
            let bits = [row.bits_per_value, row.floor, row.gap];
            record.extend(bits.map(|bits| bits.map_or(String::new(), |bits| format!("{bits:.4}"))));
            record.push(row.pipeline.to_string());
            csv.write_record(&record).map_err(failed)?;
        }
        csv.flush().map_err(|error| Error::io("sweep.csv", &error))?;
        drop(csv);
        self.csv.commit()?;
        writeln!(self.markdown, "# Sweep\n\n{text}").map_err(|error| Error::io("sweep.md", &error))?;
        self.markdown.commit()
    }
}
