//! The sweep: every pipeline over a dump, written to disk, decoded again and compared.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};

use gearbox_core::container::Container;
use gearbox_core::ledger::Ledger;
use gearbox_core::{Error, ErrorKind, Limits, Pipeline, PipelineSpec, Registry, Result, ResultExt, Role};
use indicatif::ProgressBar;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::atomic::AtomicFile;
use crate::dump::Dump;
use crate::engine::{self, SequenceCost};
use crate::entropy::Entropy;
use crate::receipt::Receipt;
use crate::report::{self, Columns};
use crate::{compare, pipelines};

/// A sweep as it is written down.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SweepConfig {
    /// Dumps to read when none is named on the command line; relative to the config file.
    pub dumps: Vec<PathBuf>,
    /// Pipelines; any scalar in them may be `{ "sweep": [ … ] }`. Empty: every codec with default settings in every chunking mode.
    pub pipelines: Vec<Value>,
}

impl SweepConfig {
    /// Reads a config file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] with file, JSON pointer and what is legal there.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
        let place = || format!("`{}`", path.display());
        let value =
            serde_json::from_str(&text).map_err(|error| Error::invalid_config(error.to_string())).context(place)?;
        let mut config: Self = gearbox_core::config::from_value(&value).context(place)?;
        if let Some(folder) = path.parent() {
            for dump in &mut config.dumps {
                *dump = folder.join(&*dump);
            }
        }
        Ok(config)
    }

    /// The pipelines to run: expanded, resolved and without repetitions, in written order.
    ///
    /// # Errors
    /// What [`pipelines::expand`] and [`Pipeline::build`] report, with the number of the pipeline.
    pub fn pipelines(&self, registry: &Registry) -> Result<Vec<PipelineSpec>> {
        let mut specs = Vec::new();
        if self.pipelines.is_empty() {
            specs = pipelines::defaults(registry);
        }
        for (idx, value) in self.pipelines.iter().enumerate() {
            specs.extend(pipelines::expand(value).context(|| format!("`/pipelines/{idx}`"))?);
        }
        let mut seen = Vec::new();
        let mut unique = Vec::new();
        for spec in specs {
            let built = Pipeline::build(&spec, registry).context(|| format!("pipeline {}", spec.to_value()))?;
            if !seen.contains(built.spec()) {
                seen.push(built.spec().clone());
                unique.push(spec);
            }
        }
        Ok(unique)
    }
}

/// How one pipeline ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", content = "reason", rename_all = "kebab-case")]
pub enum Outcome {
    /// Decoded from stored bytes and compared.
    Ok,
    /// Not legal for this dump.
    Unsupported(String),
    /// An error, or decoded data that is not what the pipeline promises.
    Failed(String),
}

/// Original and stored bytes of one role.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RoleBytes {
    /// Bytes of the original tensors.
    pub original_bytes: u64,
    /// Bytes of chunks and sequence headers of this role; what belongs to the whole file is counted in the total only.
    pub stored_bytes: u64,
}

/// One row of a sweep: one pipeline over one dump.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The pipeline in a few words.
    pub name: String,
    /// Chunking mode.
    pub chunking: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The dump, as it was named.
    pub dump: String,
    /// Bytes of the original tensors.
    pub original_bytes: u64,
    /// Bytes of the container file, all of them.
    pub stored_bytes: u64,
    /// Original elements.
    pub values: u64,
    /// 8 × stored bytes ÷ original elements, if the pipeline encoded them.
    pub bits_per_value: Option<f64>,
    /// Order-0 floor of the dump in bits per value, see [`crate::entropy`].
    pub floor: Option<f64>,
    /// Bits per value − floor: below zero where the pipeline found structure beyond order 0, or lost something.
    pub gap: Option<f64>,
    /// Keys.
    pub key: RoleBytes,
    /// Values.
    pub value: RoleBytes,
    /// Elements that came back with other bits.
    pub changed_values: u64,
    /// Encoding time, summed over chunks, one thread each.
    pub encode_ns: u64,
    /// Decoding time, summed over chunks, one thread each.
    pub decode_ns: u64,
    /// Stored bytes by account; they sum to `stored_bytes`.
    pub ledger: Vec<LedgerRow>,
    /// Cost of encoding per run, layer and role.
    pub sequences: Vec<SequenceCost>,
    /// The resolved pipeline.
    pub pipeline: Value,
}

/// One account of a ledger.
#[derive(Clone, Debug, Serialize)]
pub struct LedgerRow {
    /// What the bytes are for, and where they belong.
    #[serde(flatten)]
    pub account: gearbox_core::ledger::Account,
    /// Stored bytes.
    pub bytes: u64,
}

/// All rows of a sweep and what is needed to run it again.
#[derive(Debug, Serialize)]
pub struct Sweep {
    /// Program, machine and threads.
    pub receipt: Receipt,
    /// The dumps by path and digest.
    pub dumps: Vec<DumpFacts>,
    /// One row per dump and pipeline.
    pub rows: Vec<Row>,
}

/// What a sweep says of a dump.
#[derive(Clone, Debug, Serialize)]
pub struct DumpFacts {
    /// As it was named.
    pub path: String,
    /// xxh3-128 over names, ranges, shapes and tensors.
    pub digest: String,
    /// Number of runs.
    pub runs: usize,
    /// Number of entries.
    pub entries: usize,
    /// Bytes of keys and values.
    pub original_bytes: u64,
    /// Entropies of keys and values, means over all of them.
    pub entropy: Entropy,
}

/// Where a sweep puts its containers, numbered in the order of the rows.
#[derive(Debug)]
pub struct Containers {
    /// Folder that holds them.
    pub folder: PathBuf,
    /// Whether they stay there when their row is done.
    pub keep: bool,
    /// Whether files of earlier sweeps may be replaced.
    pub overwrite: bool,
}

impl Containers {
    /// The container of a row.
    pub fn path(&self, row: usize) -> PathBuf {
        self.folder.join(format!("{row:04}.gbx"))
    }
}

/// Runs pipelines over a dump; the rows are numbered from `first`.
///
/// # Errors
/// Only what makes the whole sweep pointless; a pipeline that fails is a row that says so.
pub fn run(
    dump: &Dump,
    specs: &[PipelineSpec],
    registry: &Registry,
    containers: &Containers,
    first: usize,
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (idx, spec) in specs.iter().enumerate() {
        let mut pipeline = Pipeline::build(spec, registry)?;
        let path = containers.path(first + idx);
        let mut row = Row::new(dump, &pipeline);
        let bar = report::progress(2 * row.original_bytes, format!("{} {}", row.name, row.chunking));
        let outcome = row.fill(dump, &mut pipeline, registry, &path, containers.overwrite, &bar);
        bar.finish_and_clear();
        row.outcome = outcome.unwrap_or_else(|error| Outcome::Failed(error.to_string()));
        if !containers.keep && row.stored_bytes > 0 {
            std::fs::remove_file(&path).map_err(|error| Error::io(&path, &error))?;
        }
        rows.push(row);
    }
    Ok(rows)
}

impl Row {
    fn new(dump: &Dump, pipeline: &Pipeline) -> Self {
        Self {
            name: pipeline.name().to_owned(),
            chunking: pipeline.spec().chunking.to_string(),
            outcome: Outcome::Ok,
            dump: dump.path.display().to_string(),
            original_bytes: dump.original_bytes(),
            stored_bytes: 0,
            values: 0,
            bits_per_value: None,
            floor: None,
            gap: None,
            key: RoleBytes::default(),
            value: RoleBytes::default(),
            changed_values: 0,
            encode_ns: 0,
            decode_ns: 0,
            ledger: Vec::new(),
            sequences: Vec::new(),
            pipeline: pipeline.spec().to_value(),
        }
    }

    fn fill(
        &mut self,
        dump: &Dump,
        pipeline: &mut Pipeline,
        registry: &Registry,
        path: &Path,
        overwrite: bool,
        bar: &ProgressBar,
    ) -> Result<Outcome> {
        let (out, encoded) = match engine::encode(dump, pipeline, AtomicFile::create(path, overwrite)?, bar) {
            // Only what a pipeline cannot take is harmless; a file that does not come back never is.
            Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::UnsupportedDType) => {
                return Ok(Outcome::Unsupported(error.to_string()));
            }
            encoded => encoded?,
        };
        out.commit()?;
        self.stored_bytes = encoded.ledger.total();
        let file = File::open(path).map_err(|error| Error::io(path, &error))?;
        let container = Container::open(file, &Limits::default())?;
        check_ledger(&encoded.ledger, container.ledger(), container.file_bytes())?;
        // Decoding starts from the file alone: the pipeline is built again from its header.
        let decoder = container.pipeline(registry)?;
        let compared = compare::with_dump(&container, &decoder, dump, bar)?;
        for cost in &encoded.sequences {
            self.encode_ns += cost.ns;
            let role = match cost.role {
                Role::Key => &mut self.key,
                Role::Value => &mut self.value,
            };
            role.original_bytes += cost.original_bytes;
        }
        self.key.stored_bytes = encoded.ledger.sum(|account| account.role == Some(Role::Key));
        self.value.stored_bytes = encoded.ledger.sum(|account| account.role == Some(Role::Value));
        self.decode_ns = compared.decoded.sequences.iter().map(|cost| cost.ns).sum();
        self.values = compared.values;
        self.bits_per_value = Some(self.stored_bytes as f64 * 8.0 / self.values as f64);
        self.changed_values = compared.changed_values;
        self.ledger =
            encoded.ledger.rows().map(|(account, bytes)| LedgerRow { account: account.clone(), bytes }).collect();
        self.sequences = encoded.sequences;
        Ok(match compared.decoded.failures.first() {
            Some(failure) => Outcome::Failed(failure.to_string()),
            None if decoder.is_lossless() && compared.changed_values > 0 => Outcome::Failed(format!(
                "{} of {} values came back with other bits from a lossless pipeline",
                compared.changed_values, compared.values
            )),
            None => Outcome::Ok,
        })
    }
}

fn check_ledger(written: &Ledger, read: &Ledger, file_bytes: u64) -> Result<()> {
    if written == read && written.total() == file_bytes {
        return Ok(());
    }
    Err(Error::mismatch(format!(
        "ledger of the writer sums to {}, of the reader to {}, the file has {file_bytes} bytes",
        written.total(),
        read.total()
    )))
}

impl Sweep {
    /// Adds a dump and its rows, which take its floor.
    pub fn add(&mut self, dump: DumpFacts, rows: Vec<Row>) {
        let floor = dump.entropy.floor;
        self.rows.extend(rows.into_iter().map(|row| Row {
            floor: Some(floor),
            gap: row.bits_per_value.map(|bits| bits - floor),
            ..row
        }));
        self.dumps.push(dump);
    }

    /// Whether at least one row ended well, and every other one was not legal to begin with.
    pub fn passed(&self) -> bool {
        self.rows.iter().any(|row| row.outcome == Outcome::Ok)
            && !self.rows.iter().any(|row| matches!(row.outcome, Outcome::Failed(_)))
    }

    /// The rows as a Markdown table, the smallest file first.
    pub fn table(&self) -> String {
        let mut rows: Vec<_> = self.rows.iter().collect();
        rows.sort_by_key(|row| (row.dump.clone(), row.outcome != Outcome::Ok, row.stored_bytes));
        let mut table = Columns::new(&[
            "pipeline",
            "chunking",
            ">ratio",
            ">key",
            ">value",
            ">bits",
            ">gap",
            ">stored",
            ">enc MB/s",
            ">dec MB/s",
            "result",
        ]);
        let mut notes = String::new();
        for row in rows {
            let decoded = match &row.outcome {
                Outcome::Ok if row.changed_values == 0 => "exact".to_owned(),
                Outcome::Ok => format!("{} changed", row.changed_values),
                Outcome::Unsupported(reason) => {
                    let _ = write!(notes, "\n{} {}: unsupported: {reason}", row.name, row.chunking);
                    "unsupported".into()
                }
                Outcome::Failed(reason) => {
                    let _ = write!(notes, "\n{} {}: failed: {reason}", row.name, row.chunking);
                    "FAILED".into()
                }
            };
            let mut cells = vec![row.name.clone(), row.chunking.clone()];
            if row.outcome == Outcome::Ok {
                cells.extend([
                    report::ratio(row.original_bytes, row.stored_bytes),
                    report::ratio(row.key.original_bytes, row.key.stored_bytes),
                    report::ratio(row.value.original_bytes, row.value.stored_bytes),
                    report::decimal(row.bits_per_value, 2),
                    report::decimal(row.gap, 2),
                    row.stored_bytes.to_string(),
                    report::rate(row.original_bytes, row.encode_ns),
                    report::rate(row.original_bytes, row.decode_ns),
                ]);
            } else {
                cells.extend(std::iter::repeat_n("-".to_owned(), 8));
            }
            cells.push(decoded);
            table.row(cells);
        }
        format!("{table}{notes}")
    }
}
