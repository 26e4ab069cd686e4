//! `gearbox sweep`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use gearbox_abi::Source;
use gearbox_core::{Error, Result};

use crate::atomic::AtomicFile;
use crate::loading::LoadArgs;
use crate::results::Store;
use crate::select::SelectArgs;
use crate::status::Status;
use crate::sweep::{Containers, Opened, Plan, Shard, Sweep, SweepConfig, write_csv};
use crate::{report, sample};

/// Runs every pipeline over a dump, and judges each by what attention would see.
///
/// Each row is a container that was written to disk, read back, decoded from its bytes alone, compared with the dump and, where the dump holds
/// queries, read by them. A gate judges the rows. Two canaries show that the measuring works: one arm that must be exact, and one with a
/// broken head that the gate must catch.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox sweep                                  bundled sample, every codec, every chunking mode
  gearbox sweep configs/sweeps/zstd-levels.json  pipelines from a file
  gearbox sweep configs/sweeps/strict-gate.json  the cheapest setting within limits on attention
  gearbox sweep --dump DIR --pipeline gear --pipeline zstd --out results
  gearbox sweep big.json --results all.db                 each row is stored when it is done; the same again goes on
  gearbox sweep big.json --results part-3.db --shard 3/8  one of eight equal shares; `gearbox results merge` joins them
  gearbox sweep --pipeline '{\"routes\": [{\"transforms\": [{\"id\": \"quant\", \"bits\": 4}],
                            \"codec\": {\"codes\": {\"id\": \"rans\"}, \"*\": {\"id\": \"zstd\"}}}]}'

The key and value columns count chunks and sequence headers of that role; the ratio counts the whole file,
whose bytes are in the column stored. Bits are stored bits per value, and the gap is what they are above the order-0 floor of the dump;
below zero, the pipeline found structure beyond order 0, or lost something. SNR is over all elements, the worst head is the lowest cosine of
any head, KL p99 and output error are of the replayed attention. A * marks the Pareto front of stored bytes, worst-head error and both
times. Exit status: 0 pass; 1 if a row or a canary failed, or if nothing holds the limits of the config; 2 usage or data error.")]
pub(super) struct SweepArgs {
    /// Sweep as JSON: `{ "dumps": […], "pipelines": […], "gate": {…}, "search": {…} }` [default: every codec in every chunking mode, and every transform before every codec]
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
    /// Results store: rows that it holds are read instead of computed, the others are added as each is done
    #[arg(long, value_name = "FILE", conflicts_with = "keep_containers")]
    results: Option<PathBuf>,
    /// Compute the rows that the store holds again, and replace them
    #[arg(long, requires = "results")]
    rerun: bool,
    /// Run share I of N, for machines that do not know of each other; each needs a store of its own
    #[arg(long, value_name = "I/N", requires = "results")]
    shard: Option<Shard>,
    #[command(flatten)]
    select: SelectArgs,
}

impl SweepArgs {
    pub(super) fn run(self, load: &LoadArgs, json: bool) -> Result<Status> {
        let mut config = self.config.as_deref().map(SweepConfig::read).transpose()?.unwrap_or_default();
        let mut sources = load.sources();
        sources
            .extend(config.plugins.iter().map(|file| Source { path: file.path.clone(), sha256: file.sha256.clone() }));
        let mut registry = gearbox_plugins::registry()?;
        load.add(&mut registry, &sources, load.isolates(true), &config.isolation)?;
        let registry = &registry;
        for text in &self.pipeline {
            config.pipelines.push(crate::pipelines::read(text, registry)?);
        }
        let mut plan = Plan::new(&config, registry)?;
        if let Some(shard) = self.shard {
            plan = plan.shared(shard)?;
        }
        let store = self.results.as_deref().map(Store::open).transpose()?;
        if let Some(store) = &store {
            plan = plan.stored_in(store, self.rerun);
        }
        let mut paths = if self.dump.is_empty() { config.dumps.clone() } else { self.dump.clone() };
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
        if self.keep_containers {
            containers.clear()?;
        }
        let mut status = Status::Pass;
        let mut dumps = Vec::new();
        for path in &paths {
            let (dump, opened) = self.select.open(path)?;
            status = status.and(opened);
            dumps.push(Opened::new(dump)?);
        }
        let result = plan.run(dumps, &containers)?;
        status = status.and(Status::pass_if(result.passed()));
        let mut text = result.summary();
        if let Some(files) = files.take() {
            files.write(&result, &text)?;
        }
        if let Some(out) = &self.out {
            let containers = if self.keep_containers { " and the containers" } else { "" };
            let _ = write!(text, "\n`sweep.json`, `sweep.csv`, `sweep.md`{containers} in `{}`", out.display());
        }
        if json {
            report::print_json(&result)?;
        } else {
            report::print(&text)?;
        }
        Ok(status)
    }
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

        self.json.commit_json(sweep)?;
        let rows = sweep.rows.iter().map(|row| (row, row.pareto));
        write_csv(rows, &mut self.csv).map_err(|error| Error::io("sweep.csv", &error.into()))?;
        self.csv.commit()?;
        writeln!(self.markdown, "# Sweep\n\n{text}").map_err(|error| Error::io("sweep.md", &error))?;
        self.markdown.commit()
    }
}
