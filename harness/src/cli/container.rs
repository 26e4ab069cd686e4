//! `gearbox encode`, `decode`, `inspect` and `verify`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use gearbox_core::container::{Container, Damage, SequenceInfo};
use gearbox_core::ledger::Section;
use gearbox_core::{
    Error, ErrorKind, LibraryUse, Limits, Pipeline, PluginUse, Registry, Result, ResultExt, Role, Shape,
};
use serde_json::json;

use super::DumpArgs;
use crate::atomic::AtomicFile;
use crate::dump::{self, ConvertOptions, Dump, Entry, Format, Layer, Layout, Run, Tensor};
use crate::loading::SEARCH_PATH;
use crate::report::{self, Columns};
use crate::select::SelectArgs;
use crate::status::Status;
use crate::{compare, engine, inspect, pipelines};

/// Encodes a dump into a container.
#[derive(Debug, Args)]
pub(super) struct EncodeArgs {
    #[command(flatten)]
    dump: DumpArgs,
    /// Pipeline: a `.json` file, JSON text or the id of a codec
    #[arg(long, value_name = "PIPELINE")]
    pipeline: String,
    /// Container to write
    #[arg(long, value_name = "FILE.gbx")]
    out: PathBuf,
    /// Replace an existing file
    #[arg(long)]
    overwrite: bool,
}

impl EncodeArgs {
    pub(super) fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        let spec = pipelines::parse(&self.pipeline, registry)?;
        let mut pipeline = Pipeline::build(&spec, registry)?;
        let (dump, status) = self.dump.open()?;
        let file = AtomicFile::create(&self.out, self.overwrite)?;
        let bar = report::progress(dump.original_bytes(), "encoding");
        let (file, encoded) =
            engine::encode(&dump, &mut pipeline, file, &bar).context(|| format!("`{}`", self.out.display()))?;
        file.commit()?;
        bar.finish_and_clear();
        let (original, stored) = (dump.original_bytes(), encoded.ledger.total());
        let ns = encoded.sequences.iter().map(|cost| cost.ns).sum();
        if json {
            report::print_json(&json!({
                "out": self.out, "pipeline": pipeline.spec(), "original_bytes": original, "stored_bytes": stored, "encode_ns": ns
            }))?;
        } else {
            report::print(&format!(
                "{}: {stored} bytes for {original}, ratio {}, {} MB/s per thread",
                self.out.display(),
                report::ratio(original, stored),
                report::rate(original, ns)
            ))?;
        }
        Ok(status)
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|error| Error::io(path, &error))
}

/// A complete container and the pipeline that its header names.
fn open_with_pipeline(path: &Path, registry: &Registry) -> Result<(Container<File>, Pipeline)> {
    let read = |file| {
        let container = Container::open(file, &Limits::default())?;
        let pipeline = container.pipeline(registry).map_err(|error| match error.kind() {
            ErrorKind::UnknownPlugin => {
                error.context(format!("(`--plugin` or `{SEARCH_PATH}` names libraries to load)"))
            }
            _ => error,
        })?;
        for plugin in &container.header().plugins {
            let here = registry.get(&plugin.id)?.as_use()?.library;
            if here != plugin.library {
                let name = |library: &Option<LibraryUse>| {
                    library.as_ref().map_or("this program".to_owned(), ToString::to_string)
                };
                let (then, now) = (name(&plugin.library), name(&here));
                tracing::warn!("`{}`: `{}` was written by {then}, and is read by {now}", path.display(), plugin.id);
            }
        }
        Ok((container, pipeline))
    };
    read(open(path)?).context(|| format!("`{}`", path.display()))
}

/// Decodes a container into a dump.
#[derive(Debug, Args)]
pub(super) struct DecodeArgs {
    /// Container to read
    file: PathBuf,
    /// Folder to write the dump to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Format of the dump
    #[arg(long, value_enum, default_value_t = Format::Safetensors)]
    format: Format,
    /// Replace existing files
    #[arg(long)]
    overwrite: bool,
}

impl DecodeArgs {
    pub(super) fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        let (container, pipeline) = open_with_pipeline(&self.file, registry)?;
        check_free(&container, &self.out, self.format, self.overwrite)?;
        fs::create_dir_all(&self.out).map_err(|error| Error::io(&self.out, &error))?;
        let spool = tempfile::Builder::new().prefix(".gearbox-").tempdir_in(&self.out);
        let spool = spool.map_err(|error| Error::io(&self.out, &error))?;
        let decoded =
            decode_to(&container, &pipeline, spool.path()).context(|| format!("`{}`", self.file.display()))?;
        let options = ConvertOptions { format: self.format, overwrite: self.overwrite, ..ConvertOptions::default() };
        let report = dump::convert(&decoded, &self.out, &options)?;
        if json {
            report::print_json(&report)?;
        } else {
            report::print(&report.to_string())?;
        }
        Ok(if report.findings.is_clean() { Status::Pass } else { Status::BadInput })
    }
}

/// Refuses to touch runs that are there already.
fn check_free(container: &Container<File>, folder: &Path, format: Format, overwrite: bool) -> Result<()> {
    for sequence in container.sequences() {
        let run = container.run(sequence.info.run)?;
        dump::check_run_name(&run.name)?;
        let path = match format {
            Format::Reference => folder.join(&run.name),
            Format::Safetensors => folder.join(format!("{}.safetensors", run.name)),
        };
        if !overwrite && path.exists() {
            return Err(Error::invalid_input(format!("`{}` exists; --overwrite replaces it", path.display())));
        }
    }
    Ok(())
}

/// Decodes every sequence into a file of its own, and describes them as a dump.
fn decode_to(container: &Container<File>, pipeline: &Pipeline, folder: &Path) -> Result<Dump> {
    let infos: Vec<&SequenceInfo> = container.sequences().map(|sequence| &sequence.info).collect();
    let total = container.original_bytes();
    let bar = report::progress(total, "decoding");
    let path = |idx: usize| folder.join(format!("{idx}.bin"));
    // Chunks arrive layer by layer, so at most a few files are open at a time.
    let mut open: BTreeMap<usize, File> = BTreeMap::new();
    let decoded = engine::decode(
        container,
        pipeline,
        &bar,
        |_, _, _| Ok(()),
        |idx, _, bytes| {
            let failed = |error| Error::io(path(idx), &error);
            open.retain(|other, _| infos[*other].run == infos[idx].run && infos[*other].layer == infos[idx].layer);
            if let std::collections::btree_map::Entry::Vacant(slot) = open.entry(idx) {
                slot.insert(File::options().create(true).append(true).open(path(idx)).map_err(failed)?);
            }
            open.get_mut(&idx).map_or(Ok(()), |file| file.write_all(bytes)).map_err(failed)
        },
    )?;
    bar.finish_and_clear();
    if let Some(failure) = decoded.failures.into_iter().next() {
        return Err(failure);
    }
    let mut runs: BTreeMap<usize, BTreeMap<u32, [Option<usize>; 2]>> = BTreeMap::new();
    for (idx, info) in infos.iter().enumerate() {
        runs.entry(info.run.0).or_default().entry(info.layer).or_default()[info.role as usize] = Some(idx);
    }
    let mut result = Vec::new();
    for (run_id, layers) in runs {
        let run = container.run(gearbox_core::container::RunId(run_id))?;
        let mut dump_layers = Vec::new();
        for (id, roles) in layers {
            let [Some(key), Some(value)] = roles else {
                return Err(Error::corrupt(format!("run `{}`, layer {id}: keys or values are missing", run.name)));
            };
            let mut tokens_before = 0;
            let mut entries = Vec::new();
            for entry in &infos[key].entries {
                let tensor = |idx: usize| {
                    let info = infos[idx];
                    let row = info.heads * info.dim * info.dtype.size();
                    Tensor {
                        dtype: info.dtype,
                        shape: Shape::new(entry.span.seq, info.heads, info.dim),
                        path: path(idx).into(),
                        offset: (tokens_before * row) as u64,
                        layout: Layout::Logical,
                    }
                };
                entries.push(Entry {
                    stage: entry.stage,
                    start: entry.span.start,
                    seq: entry.span.seq,
                    key: tensor(key),
                    value: tensor(value),
                    query: None,
                    tokens: run.tokens(entry.span.start, entry.span.seq).map(Into::into),
                    place: format!("run `{}`, layer {id}, token {}", run.name, entry.span.start),
                    meta: None,
                });
                tokens_before += entry.span.seq;
            }
            dump_layers.push(Layer { id, entries, ..Layer::default() });
        }
        result.push(Run { name: run.name.clone(), rope: run.rope.clone(), layers: dump_layers });
    }
    Ok(Dump {
        path: folder.to_owned(),
        selection: dump::Selection::default(),
        runs: result,
        findings: dump::Findings::default(),
        dropped: dump::Dropped::default(),
    })
}

/// Shows what a container holds and where its bytes go.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Container to read
    file: PathBuf,
    /// Walk a damaged file and show what is left of it
    #[arg(long)]
    recover: bool,
}

impl InspectArgs {
    pub(super) fn run(self, json: bool) -> Result<Status> {
        let file = open(&self.file)?;
        let place = || format!("`{}`", self.file.display());
        let (container, damage) = if self.recover {
            Container::recover(file, &Limits::default()).context(place)?
        } else {
            let hint = |error: Error| error.context("(`--recover` shows what is left)");
            (Container::open(file, &Limits::default()).map_err(hint).context(place)?, Vec::new())
        };
        if json {
            report::print_json(&inspect::describe(&container, &damage))?;
        } else {
            report::print(&inspect_text(&container, &damage))?;
        }
        Ok(if damage.is_empty() { Status::Pass } else { Status::BadInput })
    }
}

fn ledger_rows(container: &Container<File>) -> BTreeMap<(Section, Option<Role>, Option<String>), u64> {
    let mut rows = BTreeMap::new();
    for (account, bytes) in container.ledger().rows() {
        *rows.entry((account.section, account.role, account.lane.clone())).or_default() += bytes;
    }
    rows
}

fn inspect_text(container: &Container<File>, damage: &[Damage]) -> String {
    let header = container.header();
    let original: u64 = container.original_bytes();
    let plugin = |plugin: &PluginUse| {
        let from = plugin.library.as_ref().map_or(String::new(), |library| format!(" of {library}"));
        format!("{} v{}{from}", plugin.id, plugin.format_version)
    };
    let plugins: Vec<_> = header.plugins.iter().map(plugin).collect();
    let mut lines = vec![
        format!("written by  {}", header.writer),
        format!("plugins     {}", plugins.join(", ")),
        format!("pipeline    {}", header.pipeline.to_value()),
        format!(
            "size        {} bytes for {original}, ratio {}",
            container.file_bytes(),
            report::ratio(original, container.file_bytes())
        ),
        String::new(),
    ];
    let mut runs = Columns::new(&["run", ">layers", ">tokens", "key", "value", ">chunks"]);
    let mut by_run: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for sequence in container.sequences() {
        by_run.entry(sequence.info.run).or_default().push(sequence);
    }
    for (run, sequences) in by_run {
        let describe = |role| {
            let found = sequences.iter().find(|sequence| sequence.info.role == role);
            found.map_or("-".into(), |sequence| {
                let info = &sequence.info;
                format!("{} heads × {} {}", info.heads, info.dim, info.dtype)
            })
        };
        let layers: std::collections::BTreeSet<_> = sequences.iter().map(|sequence| sequence.info.layer).collect();
        runs.row([
            container.run(run).map(|run| run.name.clone()).unwrap_or_default(),
            layers.len().to_string(),
            sequences.iter().map(|sequence| sequence.info.seq()).max().unwrap_or(0).to_string(),
            describe(Role::Key),
            describe(Role::Value),
            sequences.iter().map(|sequence| sequence.chunks.len()).sum::<usize>().to_string(),
        ]);
    }
    lines.push(runs.to_string());
    lines.push(String::new());
    let mut table = Columns::new(&["bytes for", "role", "lane", ">bytes", ">share"]);
    let mut total = 0;
    for ((section, role, lane), bytes) in ledger_rows(container) {
        total += bytes;
        table.row([
            section.to_string(),
            role.map(|role| role.to_string()).unwrap_or_default(),
            lane.unwrap_or_default(),
            bytes.to_string(),
            format!("{:.2} %", 100.0 * bytes as f64 / container.file_bytes() as f64),
        ]);
    }
    table.row(["sum".into(), String::new(), String::new(), total.to_string(), String::new()]);
    lines.push(table.to_string());
    for damage in damage {
        lines.push(format!("\ndamaged: bytes {}..{}: {}", damage.range.start, damage.range.end, damage.message));
    }
    lines.join("\n")
}

/// Decodes a container from its bytes alone and compares digests, or the dump itself.
#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// Container to read
    file: PathBuf,
    /// Also compare every value with this dump
    #[arg(long, value_name = "PATH")]
    dump: Option<PathBuf>,
    #[command(flatten)]
    select: SelectArgs,
}

impl VerifyArgs {
    pub(super) fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        let (container, pipeline) = open_with_pipeline(&self.file, registry)?;
        let total: u64 = container.original_bytes();
        let chunks: usize = container.sequences().map(|sequence| sequence.chunks.len()).sum();
        let bar = report::progress(total, "verifying");
        let mut status = Status::Pass;
        let mut error = None;
        let failures = match &self.dump {
            None => engine::decode(&container, &pipeline, &bar, |_, _, _| Ok(()), |_, _, _| Ok(()))?.failures,
            Some(path) => {
                let (dump, opened) = self.select.open(path)?;
                status = opened;
                let compared = compare::with_dump(&container, &pipeline, &dump, compare::Options::default(), &bar)?;
                error = Some(compared.error_report().all);
                compared.decoded.failures
            }
        };
        bar.finish_and_clear();
        let changed = error.as_ref().map(|all| all.error.changed);
        let lossy = changed.is_some_and(|changed| changed > 0 && pipeline.is_lossless());
        let passed = failures.is_empty() && !lossy && chunks > 0;
        let corrupt = failures.iter().any(|failure| failure.kind() != ErrorKind::Mismatch);
        status = status.and(if corrupt { Status::BadInput } else { Status::pass_if(passed) });
        if json {
            report::print_json(&json!({
                "file": self.file, "chunks": chunks, "original_bytes": total, "lossless": pipeline.is_lossless(),
                "changed_values": changed, "error": error,
                "failures": failures.iter().map(ToString::to_string).collect::<Vec<_>>(),
            }))?;
            return Ok(status);
        }
        for failure in &failures {
            report::print(&format!("FAILED  {failure}"))?;
        }
        let compared = error.as_ref().map_or(String::new(), |all| {
            format!(", {} of {} values differ from the dump", all.error.changed, all.error.elements)
        });
        let lost = error.filter(|all| all.error.changed > 0).map_or(String::new(), |all| {
            let worst = all.worst_cosine.map(|head| head.error.cosine);
            let (snr, worst) = (report::decimal(all.error.snr_db, 1), report::decimal(worst, 5));
            format!(", SNR {snr} dB, greatest error {:.4e}, cosine of the worst head {worst}", all.error.max_abs)
        });
        let verdict = if passed { "ok" } else { "FAILED" };
        report::print(&format!("{verdict}: {chunks} chunks, {} failures{compared}{lost}", failures.len()))?;
        Ok(status)
    }
}
