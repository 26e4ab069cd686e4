//! `gearbox results`.

use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use gearbox_core::{Error, Result, ResultExt};
use serde_json::{Map, Value, json};

use crate::atomic::AtomicFile;
use crate::loading::LoadArgs;
use crate::report::{self, Columns};
use crate::results::{self, Cell, Diff, Field, Query, Replays, Request, Rubbish, Store};
use crate::status::Status;
use crate::sweep::Record;

/// Results stores: what `gearbox sweep --results FILE` writes.
#[derive(Debug, Subcommand)]
pub(super) enum ResultsCommand {
    /// List rows
    List(ListArgs),
    /// Show everything about one row: pipeline, numbers, where its bytes go, receipt
    Show(ShowArgs),
    /// Write rows as CSV or JSON
    Export(ExportArgs),
    /// Join stores into a new one, such as the shards of a sweep
    Merge(MergeArgs),
    /// Throw away what nobody will read again, and give the space back
    Gc(GcArgs),
    /// Compare two stores row by row
    Diff(DiffArgs),
    /// Compute rows again from what is known of them, and compare everything but times
    Replay(ReplayArgs),
}

impl ResultsCommand {
    pub(super) fn run(self, load: &LoadArgs, json: bool) -> Result<Status> {
        match self {
            Self::List(args) => args.run(json),
            Self::Show(args) => args.run(json),
            Self::Export(args) => args.run(),
            Self::Merge(args) => args.run(json),
            Self::Gc(args) => args.run(json),
            Self::Diff(args) => args.run(json),
            Self::Replay(args) => args.run(load, json),
        }
    }
}

/// Which store to read.
#[derive(Debug, Args)]
struct StoreArgs {
    /// Results store
    #[arg(long, value_name = "FILE", default_value = "results.db")]
    results: PathBuf,
}

impl StoreArgs {
    fn read(&self) -> Result<Store> {
        Store::read(&self.results)
    }
}

/// Which rows to read.
#[derive(Debug, Args)]
struct RowsArgs {
    /// Condition on columns, in SQL: `docs/RESULTS-STORE.md` lists them
    #[arg(long = "where", value_name = "SQL")]
    condition: Option<String>,
    /// Column to sort by, `-COLUMN` for descending [default: dump, then those that ended well, then stored bytes]
    #[arg(long, value_name = "COLUMN", allow_hyphen_values = true)]
    sort: Option<String>,
    /// Most rows
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

impl RowsArgs {
    fn query(&self, columns: Vec<String>) -> Query {
        Query { columns, condition: self.condition.clone(), order: self.sort.clone(), limit: self.limit }
    }
}

/// Lists rows, one line each.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox results list --results all.db
  gearbox results list --results all.db --where \"state = 'ok' AND worst_head_cosine > 0.99\" --sort stored_bytes --limit 20
  gearbox results list --results all.db --columns name,ratio,kl_p99 --sort -ratio
  gearbox results list --results all.db --where \"dump LIKE '%llama%'\" --json")]
pub(super) struct ListArgs {
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    rows: RowsArgs,
    /// Columns to show, separated by commas [default: the ones that matter most; with --json all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    columns: Vec<String>,
}

/// What a list shows, and under which heading.
const LISTED: [(&str, &str); 11] = [
    ("key", "key"),
    ("dump", "dump"),
    ("name", "pipeline"),
    ("chunking", "chunking"),
    ("ratio", ">ratio"),
    ("stored_bytes", ">stored"),
    ("worst_head_cosine", ">worst head"),
    ("kl_p99", ">KL p99"),
    ("encode_ns", ">enc MB/s"),
    ("decode_ns", ">dec MB/s"),
    ("state", "state"),
];

/// Digits of a key in a table: enough to name a row.
const SHORT_KEY: usize = 12;

impl ListArgs {
    fn run(self, json: bool) -> Result<Status> {
        let store = self.store.read()?;
        let query = self.rows.query(self.columns.clone());
        if json {
            let names = if self.columns.is_empty() { store.columns()? } else { self.columns };
            let object = |cells: Vec<Cell>| -> Map<String, Value> {
                names.iter().cloned().zip(cells.iter().map(Cell::to_value)).collect()
            };
            report::print_json(&store.select(&query)?.into_iter().map(object).collect::<Vec<_>>())?;
            return Ok(Status::Pass);
        }
        let rows = if self.columns.is_empty() {
            let mut names: Vec<_> = LISTED.map(|(name, _)| name.to_owned()).into();
            names.push("original_bytes".into());
            store.select(&Query { columns: names, ..query })?
        } else {
            store.select(&query)?
        };
        let mut table = if self.columns.is_empty() {
            Columns::new(&LISTED.map(|(_, heading)| heading))
        } else {
            Columns::new(&self.columns.iter().map(String::as_str).collect::<Vec<_>>())
        };
        for cells in &rows {
            table.row(if self.columns.is_empty() {
                listed(cells)
            } else {
                cells.iter().map(ToString::to_string).collect()
            });
        }
        report::print(&format!("{table}\n\n{} of {} rows in `{}`", rows.len(), store.len()?, store.path().display()))?;
        Ok(Status::Pass)
    }
}

/// The cells of one line; the last of the row is its original bytes.
fn listed(cells: &[Cell]) -> Vec<String> {
    let original = cells.last().and_then(Cell::count).unwrap_or_default();
    let text = |(cell, (name, _)): (&Cell, &(&str, &str))| match *name {
        "key" => cell.to_string().chars().take(SHORT_KEY).collect(),
        "ratio" => report::decimal(cell.number(), 3),
        "worst_head_cosine" => report::decimal(cell.number(), 5),
        "kl_p99" => report::decimal(cell.number(), 4),
        "encode_ns" | "decode_ns" => report::rate(original, cell.count().unwrap_or_default()),
        _ => cell.to_string(),
    };
    cells.iter().zip(&LISTED).map(text).collect()
}

/// Shows everything about one row.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox results show 3fa9 --results all.db
  gearbox results show 3fa9 --results all.db --json")]
pub(super) struct ShowArgs {
    /// Key of the row, or how it begins
    key: String,
    #[command(flatten)]
    store: StoreArgs,
}

impl ShowArgs {
    fn run(self, json: bool) -> Result<Status> {
        let store = self.store.read()?;
        let key = store.resolve(&self.key)?;
        let record = store.record(&key)?;
        if json {
            report::print_json(&json!({ "key": key, "digest": record.digest(), "record": record }))?;
        } else {
            report::print(&shown(&key, &record))?;
        }
        Ok(Status::Pass)
    }
}

fn shown(key: &str, record: &Record) -> String {
    let Record { unit, row, refuted, receipt } = record;
    let mut lines = vec![
        format!("key       {key}"),
        format!("digest    {}", record.digest()),
        format!("pipeline  {} {}", row.name, row.chunking),
        format!("          {}", row.pipeline),
        format!("dump      {}, digest {}", unit.dump, unit.digest),
        format!(
            "state     {}{}",
            row.outcome.state(),
            row.outcome.reason().map_or(String::new(), |why| format!(": {why}"))
        ),
        format!(
            "bytes     {} of {}, ratio {}, {} bits per value, floor {}",
            row.stored_bytes,
            row.original_bytes,
            report::ratio(row.original_bytes, row.stored_bytes),
            report::decimal(row.bits_per_value, 3),
            report::decimal(row.floor, 3)
        ),
        format!("changed   {} of {} values, {} escapes", row.changed_values, row.values, row.escapes),
        format!(
            "time      encode {} MB/s, decode {} MB/s",
            report::rate(row.original_bytes, row.encode_ns),
            report::rate(row.original_bytes, row.decode_ns)
        ),
    ];
    let labels: Vec<_> = row.labels.iter().map(ToString::to_string).collect();
    lines.push(format!("labels    {}", if labels.is_empty() { "none".to_owned() } else { labels.join(", ") }));
    lines.extend(refuted.iter().map(|refuted| format!("refuted   {}: {}", refuted.plugin.id, refuted.property)));
    lines.push("measured".to_owned());
    lines.extend(row.measured.iter().map(|(metric, value)| format!("  {:24}{value}", metric.to_string())));
    lines.push("stored bytes".to_owned());
    for account in &row.ledger {
        let place = &account.account;
        let layer = place.layer.map_or(String::new(), |layer| format!(" layer {layer}"));
        let role = place.role.map_or(String::new(), |role| format!(" {role}"));
        let lane = place.lane.as_ref().map_or(String::new(), |lane| format!(" {lane}"));
        lines.push(format!("  {:>12} {}{layer}{role}{lane}", account.bytes, place.section));
    }
    let commit = receipt.commit.as_deref().unwrap_or("none");
    lines.push(format!("receipt   gearbox {}, commit {commit}, {} threads", receipt.version, receipt.threads));
    lines.push(format!("          processor with {}", receipt.cpu_features.join(", ")));
    for plugin in &unit.plugins {
        let library = plugin.library.as_ref().map_or(String::new(), |library| format!(", {library}"));
        lines.push(format!("plugin    {} format {}{library}", plugin.id, plugin.format_version));
    }
    lines.join("\n")
}

/// A format of an export.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// One line per row: the columns that `results list` takes.
    Csv,
    /// Whole rows with their receipts, and the dumps and canaries; `gearbox gate` reads it.
    Json,
}

/// Writes rows for programs that know no SQLite.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox results export --results all.db --format csv > all.csv
  gearbox results export --results all.db --format json --where \"state = 'ok'\" --out good.json")]
pub(super) struct ExportArgs {
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    rows: RowsArgs,
    /// What to write
    #[arg(long, value_name = "FORMAT")]
    format: Format,
    /// File to write [default: standard output]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Replace an existing file
    #[arg(long, requires = "out")]
    overwrite: bool,
}

impl ExportArgs {
    fn run(self) -> Result<Status> {
        let store = self.store.read()?;
        let query = self.rows.query(Vec::new());
        let write = |out: &mut dyn Write| -> Result<()> {
            let mut out = io::BufWriter::new(out);
            match self.format {
                Format::Csv => results::export_csv(&store, &query, &mut out)?,
                Format::Json => results::export_json(&store, &query, &mut out)?,
            }
            out.flush().map_err(|error| Error::io("export", &error))
        };
        match &self.out {
            Some(path) => {
                let mut file = AtomicFile::create(path, self.overwrite)?;
                write(&mut file)?;
                file.commit()?;
            }
            None => write(&mut UntilClosed(io::stdout().lock()))?,
        }
        Ok(Status::Pass)
    }
}

/// Drops what nobody reads any more: `gearbox results export … | head` has seen enough.
struct UntilClosed<W>(W);

impl<W: Write> Write for UntilClosed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .write(bytes)
            .or_else(|error| if error.kind() == ErrorKind::BrokenPipe { Ok(bytes.len()) } else { Err(error) })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().or_else(|error| if error.kind() == ErrorKind::BrokenPipe { Ok(()) } else { Err(error) })
    }
}

/// Joins stores into a new one.
///
/// A row that several of them have is taken from the first. If another one has other numbers under its key, that is reported, and the exit
/// status is 1; `gearbox results diff` shows what differs.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox results merge part-*.db --out all.db
  gearbox results merge all.db new.db --out all.db --overwrite")]
pub(super) struct MergeArgs {
    /// Stores to read
    #[arg(required = true, value_name = "FILE")]
    from: Vec<PathBuf>,
    /// Store to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace an existing file
    #[arg(long)]
    overwrite: bool,
}

impl MergeArgs {
    fn run(self, json: bool) -> Result<Status> {
        let stores = self.from.iter().map(|path| Store::read(path)).collect::<Result<Vec<_>>>()?;
        let file = AtomicFile::create(&self.out, self.overwrite)?;
        let to = Store::open(file.temporary())?;
        let merged = stores.iter().map(|store| results::merge(store, &to)).collect::<Result<Vec<_>>>();
        let merged = merged.context(|| format!("`{}`", self.out.display()))?;
        let rows = to.len()?;
        drop((to, stores));
        file.commit()?;
        let differs = merged.iter().any(|merged| !merged.differing.is_empty());
        if json {
            let parts: Vec<_> =
                self.from.iter().zip(&merged).map(|(path, merged)| json!({ "path": path, "merged": merged })).collect();
            report::print_json(&json!({ "out": self.out, "rows": rows, "from": parts }))?;
        } else {
            for (path, merged) in self.from.iter().zip(&merged) {
                report::print(&format!(
                    "`{}`: {} rows added, {} were there",
                    path.display(),
                    merged.added,
                    merged.held
                ))?;
                for key in &merged.differing {
                    report::print(&format!("  {key} has other numbers here; those of an earlier store stay"))?;
                }
            }
            report::print(&format!("{rows} rows in `{}`", self.out.display()))?;
        }
        Ok(Status::pass_if(!differs))
    }
}

/// Throws away what nobody will read again.
///
/// Always: rows that failed because of the machine, which the next sweep would compute again, and dumps, pipelines, receipts and canaries that
/// no row refers to.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox results gc --results all.db --dry-run
  gearbox results gc --results all.db --stale --missing")]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag")]
pub(super) struct GcArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// Also every row that failed
    #[arg(long)]
    failed: bool,
    /// Also rows of another version of the program or of its metrics, which no sweep of this one reads
    #[arg(long)]
    stale: bool,
    /// Also rows of dumps that are no longer where they were
    #[arg(long)]
    missing: bool,
    /// Count, but keep everything
    #[arg(long)]
    dry_run: bool,
}

impl GcArgs {
    fn run(self, json: bool) -> Result<Status> {
        // It must exist: a slip of the pen is not to make a new one.
        drop(self.store.read()?);
        let store = Store::open(&self.store.results)?;
        let Self { failed, stale, missing, dry_run, .. } = self;
        let removed = results::collect(&store, Rubbish { failed, stale, missing }, dry_run)?;
        if json {
            report::print_json(&removed)?;
            return Ok(Status::Pass);
        }
        let sizes =
            format!("{} before, {} after", report::bytes(removed.bytes_before), report::bytes(removed.bytes_after));
        report::print(&format!(
            "{} {} rows, {} canaries, {} dumps, {} pipelines and receipts; {sizes}",
            if dry_run { "would remove" } else { "removed" },
            removed.rows,
            removed.canaries,
            removed.dumps,
            removed.parts
        ))?;
        Ok(Status::Pass)
    }
}

/// Compares two stores row by row; times, names of dumps and dates do not count.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox results diff before.db after.db
  gearbox results diff mine.db yours.db --json

Exit status: 0 if both hold the same rows with the same numbers, 1 if not.")]
pub(super) struct DiffArgs {
    /// First store
    first: PathBuf,
    /// Second store
    second: PathBuf,
}

impl DiffArgs {
    fn run(self, json: bool) -> Result<Status> {
        let [first, second] = [Store::read(&self.first)?, Store::read(&self.second)?];
        let diff = results::diff(&first, &second)?;
        let status = Status::pass_if(diff.is_empty());
        if json {
            report::print_json(&diff)?;
            return Ok(status);
        }
        for (path, keys) in [(&self.first, &diff.only_first), (&self.second, &diff.only_second)] {
            for key in keys {
                report::print(&format!("{key} only in `{}`", path.display()))?;
            }
        }
        for differing in &diff.differing {
            report::print(&format!("{} {}", differing.key, differing.name))?;
            print_fields(&differing.fields, differing.more)?;
        }
        let Diff { equal, only_first, only_second, differing } = &diff;
        report::print(&format!(
            "{equal} rows are equal, {} differ, {} only in the first, {} only in the second",
            differing.len(),
            only_first.len(),
            only_second.len()
        ))?;
        Ok(status)
    }
}

fn print_fields(fields: &[Field], more: usize) -> Result<()> {
    let text = |value: &Option<Value>| match value {
        None => "nothing".to_owned(),
        Some(Value::Object(_)) => "an object".to_owned(),
        Some(Value::Array(items)) => format!("a list of {}", items.len()),
        Some(value) => value.to_string(),
    };
    for Field { pointer, first, second } in fields {
        report::print(&format!("  `{pointer}`: {} and {}", text(first), text(second)))?;
    }
    if more > 0 {
        report::print(&format!("  and {more} more"))?;
    }
    Ok(())
}

/// Computes rows again and compares everything but times.
///
/// Each row is computed from what the store knows of it: the resolved pipeline, the dump and which of its entries were read, the options of
/// attention. What is other than its receipt says is named, whether it matters or not.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox results replay 3fa9 77c0 --results all.db
  gearbox results replay --sample 20 --seed 7 --results all.db
  gearbox results replay 3fa9 --results theirs.db --dump /data/the-same-dump --plugin libcodec.so

Exit status: 0 if every row comes out the same, 1 if one differs, 2 if a dump or a key is not found.")]
pub(super) struct ReplayArgs {
    /// Keys of rows, or how they begin
    #[arg(required_unless_present = "sample", value_name = "KEY")]
    keys: Vec<String>,
    /// So many rows besides
    #[arg(long, value_name = "N", default_value_t = 0)]
    sample: usize,
    /// Chooses the rows of the sample
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Where a dump lies now, may be repeated [default: where it was]
    #[arg(long, value_name = "PATH")]
    dump: Vec<PathBuf>,
    #[command(flatten)]
    store: StoreArgs,
}

impl ReplayArgs {
    fn run(self, load: &LoadArgs, json: bool) -> Result<Status> {
        let store = self.store.read()?;
        if let Some(missing) = self.dump.iter().find(|path| !path.exists()) {
            return Err(Error::invalid_input(format!("`{}`: expected a dump, got nothing", missing.display())));
        }
        let mut registry = gearbox_plugins::registry()?;
        load.add(&mut registry, &load.sources(), load.isolates(true), &crate::isolate::Limits::default())?;
        let Self { keys, sample, seed, dump: dumps, .. } = self;
        let replays = results::replay(&store, &Request { keys, sample, seed, dumps }, &registry)?;
        if json {
            report::print_json(&replays)?;
        } else {
            print_replays(&replays, store.path())?;
        }
        Ok(Status::pass_if(replays.passed()))
    }
}

fn print_replays(replays: &Replays, path: &Path) -> Result<()> {
    for row in &replays.rows {
        let end = if row.same { "the same" } else { "DIFFERS" };
        report::print(&format!("{} {} over {}: {end}", row.key, row.name, row.dump))?;
        print_fields(&row.fields, row.more)?;
        for circumstance in &row.circumstances {
            report::print(&format!("  {circumstance}"))?;
        }
    }
    let same = replays.rows.iter().filter(|row| row.same).count();
    report::print(&format!("{same} of {} rows of `{}` come out the same", replays.rows.len(), path.display()))
}
