//! The results store: the rows of sweeps in one SQLite file, each under the digest of everything that its numbers depend on.
//!
//! A row is written in one transaction when its unit is done, and read instead of computed by every later sweep that comes to the same
//! unit. So a sweep that was killed goes on where it was, and no unit is evaluated twice. Tables and keys are described in
//! `docs/RESULTS-STORE.md`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use gearbox_core::{Error, ErrorKind, Result, ResultExt};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params};
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use self::diff::{Diff, Differing, Field, diff};
pub use self::export::{export_csv, export_json};
pub use self::gc::{Removed, Rubbish, collect};
pub use self::merge::{Merged, merge};
pub use self::replay::{Replayed, Replays, Request, replay};
use self::schema::{APPLICATION, Marks, VERSION};
pub use self::select::{Cell, Query};
use crate::digest;
use crate::gate::{Gate, Metric};
use crate::metrics::{self, attention::Attention};
use crate::receipt::Receipt;
use crate::sweep::{Canary, DumpFacts, Record, Refuted, Row, Unit};

mod diff;
mod export;
mod gc;
mod merge;
mod replay;
mod schema;
mod select;
#[cfg(test)]
mod tests;

/// How long one process waits for another that writes.
const PATIENCE: Duration = Duration::from_mins(1);

/// A results store that is open.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    connection: Connection,
}

/// What a row holds besides its columns.
#[derive(Deserialize)]
struct Body {
    unit: Unit,
    row: Row,
    refuted: Vec<Refuted>,
}

impl Store {
    /// Opens a store to read and write; a file that does not exist is made, one of an older version brought up to date.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the file is no results store, or one of a newer version; [`ErrorKind::Io`] if it cannot be written.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let store = Self::connect(path, path, flags)?;
        if store.check()?.version < VERSION {
            store.on(schema::migrate(&store.connection))?;
        }
        // Where the file system has no shared memory, SQLite keeps another journal: slower, as safe. Busy is one that another process opens.
        match store.connection.execute_batch("PRAGMA journal_mode = WAL") {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {}
            done => store.on(done)?,
        }
        store.on(store.connection.execute_batch("PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON"))?;
        Ok(store)
    }

    /// Opens a store to read; one of an older version is brought up to date first.
    ///
    /// # Errors
    /// As [`Store::open`]; [`ErrorKind::Io`] if there is no such file.
    pub fn read(path: &Path) -> Result<Self> {
        let found = std::fs::metadata(path).map_err(|error| Error::io(path, &error))?;
        if !found.is_file() || found.len() == 0 {
            let got = if found.is_file() { "an empty file" } else { "a folder" };
            return Err(Error::invalid_input(format!("`{}`: expected a results store, got {got}", path.display())));
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let store = Self::connect(path, path, flags)?;
        let refused = Marks::of(&store.connection).err().and_then(|error| error.sqlite_error_code());
        if matches!(refused, Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly)) && !journal(path).exists() {
            // A folder that takes no files has no room for the index of the journal. There is no journal, so nobody writes.
            let store = Self::connect(path, Path::new(&immutable(path)), flags | OpenFlags::SQLITE_OPEN_URI)?;
            store.check()?;
            return Ok(store);
        }
        let marks = store.check()?;
        if marks.is_blank() {
            return Err(Error::invalid_input(format!(
                "`{}`: expected a results store, got an empty database",
                path.display()
            )));
        }
        if marks.version < VERSION {
            drop(store);
            drop(Self::open(path)?);
            return Self::connect(path, path, flags);
        }
        Ok(store)
    }

    fn connect(path: &Path, name: &Path, flags: OpenFlags) -> Result<Self> {
        let connection = Connection::open_with_flags(name, flags).map_err(|error| failed(path, &error))?;
        let store = Self { path: path.to_owned(), connection };
        store.on(store.connection.busy_timeout(PATIENCE))?;
        Ok(store)
    }

    /// Refuses what is no store, or one of a newer version.
    fn check(&self) -> Result<Marks> {
        let marks = self.marks()?;
        let Marks { application, version, .. } = marks;
        if marks.is_blank() {
            return Ok(marks);
        }
        let shown = self.path.display();
        if application != APPLICATION {
            return Err(Error::invalid_input(format!(
                "`{shown}`: expected a results store, got another SQLite database"
            )));
        }
        if version > VERSION {
            return Err(Error::invalid_input(format!(
                "`{shown}`: expected a results store of version up to {VERSION}, got {version}, which a newer gearbox wrote"
            )));
        }
        Ok(marks)
    }

    fn marks(&self) -> Result<Marks> {
        self.on(Marks::of(&self.connection))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of rows.
    ///
    /// # Errors
    /// What reading reports; so all methods.
    pub fn len(&self) -> Result<usize> {
        let count: i64 = self.on(self.connection.query_row("SELECT count(*) FROM rows", [], |row| row.get(0)))?;
        Ok(usize::try_from(count).unwrap_or_default())
    }

    /// Whether there is no row.
    ///
    /// # Errors
    /// As [`Store::len`].
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// The keys of all rows, ascending.
    ///
    /// # Errors
    /// As [`Store::len`].
    pub fn keys(&self) -> Result<Vec<String>> {
        let keys = || {
            let mut statement = self.connection.prepare_cached("SELECT key FROM rows ORDER BY key")?;
            statement.query_map([], |row| row.get(0))?.collect()
        };
        self.on(keys())
    }

    /// The key that begins like this.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if no key does, or several.
    pub fn resolve(&self, prefix: &str) -> Result<String> {
        let keys = || {
            let sql = "SELECT key FROM rows WHERE substr(key, 1, length(?1)) = ?1 ORDER BY key LIMIT 4";
            self.connection.prepare_cached(sql)?.query_map([prefix], |row| row.get(0))?.collect()
        };
        let keys: Vec<String> = self.on(keys())?;
        let shown = self.path.display();
        match keys.as_slice() {
            [key] => Ok(key.clone()),
            [] => Err(Error::invalid_input(format!("`{shown}`: no key begins with `{prefix}`"))),
            several => Err(Error::invalid_input(format!(
                "`{shown}`: several keys begin with `{prefix}`: `{}`{}",
                several[..several.len().min(3)].join("`, `"),
                if several.len() > 3 { " and more" } else { "" }
            ))),
        }
    }

    /// The record under a key.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if it cannot be read back.
    pub fn get(&self, key: &str) -> Result<Option<Record>> {
        let sql = "SELECT bodies.zstd, receipts.json FROM rows JOIN bodies ON bodies.row = rows.id JOIN receipts ON receipts.id = rows.receipt
            WHERE rows.key = ?1";
        let texts = || {
            let mut statement = self.connection.prepare_cached(sql)?;
            statement.query_row([key], |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, String>(1)?))).optional()
        };
        let Some((body, receipt)) = self.on(texts())? else { return Ok(None) };
        let place = || format!("row {key}");
        let body = schema::unpack(&body).map_err(|error| self.damaged(&error)).context(place)?;
        let Body { unit, row, refuted } = self.parse(&body).context(place)?;
        let receipt = self.parse(receipt.as_bytes()).context(place)?;
        Ok(Some(Record { unit, row, refuted, receipt }))
    }

    /// The record under a key that [`Store::resolve`] gave.
    ///
    /// # Errors
    /// As [`Store::get`]; [`ErrorKind::InvalidInput`] if there is none.
    pub fn record(&self, key: &str) -> Result<Record> {
        let missing = || Error::invalid_input(format!("`{}`: no row has the key `{key}`", self.path.display()));
        self.get(key)?.ok_or_else(missing)
    }

    /// Adds a dump that rows are about; one that is there already stays as it is.
    ///
    /// # Errors
    /// As [`Store::insert`].
    pub fn add_dump(&self, facts: &DumpFacts) -> Result<()> {
        let location = Path::new(&facts.path).canonicalize();
        let location = location.map_or_else(|_| facts.path.clone(), |path| path.display().to_string());
        self.put_dump(facts, &location)
    }

    fn put_dump(&self, facts: &DumpFacts, location: &str) -> Result<()> {
        let sql = "INSERT INTO dumps (digest, path, location, json) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING";
        let values = params![facts.digest, facts.path, location, to_json(facts)];
        self.on(self.connection.execute(sql, values)).map(|_| ())
    }

    /// Dumps with the absolute paths at which they were found.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn dumps(&self) -> Result<Vec<(DumpFacts, PathBuf)>> {
        let texts = || {
            let mut statement =
                self.connection.prepare_cached("SELECT json, location FROM dumps ORDER BY path, digest")?;
            statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        };
        let texts: Vec<(String, String)> = self.on(texts())?;
        texts.into_iter().map(|(text, location)| Ok((self.parse(text.as_bytes())?, location.into()))).collect()
    }

    /// Adds a record whose dump was [added](Store::add_dump). A row that is there stays, unless it [failed because of the
    /// machine](crate::sweep::Outcome::is_transient). Tells whether the record was added.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the disk is full, or if another process keeps the store locked; nothing is added then.
    /// [`ErrorKind::InvalidInput`] if the dump was not added.
    pub fn insert(&self, record: &Record) -> Result<bool> {
        self.put(record, false, now())
    }

    /// Adds a record in place of any that is there.
    ///
    /// # Errors
    /// As [`Store::insert`].
    pub fn replace(&self, record: &Record) -> Result<()> {
        self.put(record, true, now()).map(|_| ())
    }

    fn put(&self, record: &Record, replace: bool, created: i64) -> Result<bool> {
        let key = record.unit.key();
        let dump: Option<i64> =
            self.on(self.id("SELECT id FROM dumps WHERE digest = ?1", &record.unit.digest).optional())?;
        let dump = dump.ok_or_else(|| {
            let shown = self.path.display();
            Error::invalid_input(format!(
                "`{shown}`: row {key}: expected its dump to be added first, got the digest {}",
                record.unit.digest
            ))
        })?;
        self.on(self.put_row(record, &key, dump, replace, created))
    }

    fn put_row(&self, record: &Record, key: &str, dump: i64, replace: bool, created: i64) -> rusqlite::Result<bool> {
        let Record { unit, row, refuted, receipt } = record;
        let transaction = Transaction::new_unchecked(&self.connection, TransactionBehavior::Immediate)?;
        let held: Option<(i64, String)> = self
            .connection
            .prepare_cached("SELECT id, state FROM rows WHERE key = ?1")?
            .query_row([key], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        if let Some((id, state)) = held {
            let gives_way = replace || crate::sweep::Outcome::TRANSIENT.contains(&state.as_str());
            if !gives_way {
                return Ok(false);
            }
            self.connection.execute("DELETE FROM rows WHERE id = ?1", [id])?;
        }
        let pipeline = self.text_id("pipelines", &to_json(&row.pipeline))?;
        let receipt = self.receipt_id(receipt)?;
        let labels: Vec<_> = row.labels.iter().map(ToString::to_string).collect();
        let mut values: Vec<(String, Cell)> = [
            ("key", key.into()),
            ("digest", record.digest().into()),
            ("created", created.into()),
            ("dump", dump.into()),
            ("pipeline", pipeline.into()),
            ("receipt", receipt.into()),
            ("metrics_version", i64::from(unit.metrics).into()),
            ("name", row.name.as_str().into()),
            ("chunking", row.chunking.as_str().into()),
            ("state", row.outcome.state().into()),
            ("reason", row.outcome.reason().into()),
            ("labels", labels.join(" ").into()),
            ("original_bytes", row.original_bytes.into()),
            ("stored_bytes", row.stored_bytes.into()),
            ("key_original_bytes", row.key.original_bytes.into()),
            ("key_stored_bytes", row.key.stored_bytes.into()),
            ("value_original_bytes", row.value.original_bytes.into()),
            ("value_stored_bytes", row.value.stored_bytes.into()),
            ("value_count", row.values.into()),
            ("changed_values", row.changed_values.into()),
            ("escapes", row.escapes.into()),
            ("encode_ns", row.encode_ns.into()),
            ("decode_ns", row.decode_ns.into()),
            ("floor", row.floor.into()),
            ("gap", row.gap.into()),
        ]
        .map(|(name, cell): (&str, Cell)| (name.to_owned(), cell))
        .into();
        values.extend(Metric::OF_DUMPS.map(|metric| (metric.to_string(), row.measured(metric).into())));
        let names: Vec<_> = values.iter().map(|(name, _)| name.as_str()).collect();
        let marks = vec!["?"; names.len()].join(", ");
        let sql = format!("INSERT INTO rows ({}) VALUES ({marks})", names.join(", "));
        let cells = values.iter().map(|(_, cell)| cell);
        self.connection.prepare_cached(&sql)?.execute(rusqlite::params_from_iter(cells))?;
        let id = self.connection.last_insert_rowid();
        let body = schema::pack(&to_json(&json!({ "unit": unit, "row": row, "refuted": refuted })));
        self.connection.prepare_cached("INSERT INTO bodies (row, zstd) VALUES (?1, ?2)")?.execute(params![id, body])?;
        transaction.commit()?;
        Ok(true)
    }

    fn id(&self, sql: &str, text: &str) -> rusqlite::Result<i64> {
        self.connection.prepare_cached(sql)?.query_row([text], |row| row.get(0))
    }

    /// The number of a text in a table of texts, where it is put if it is new.
    fn text_id(&self, table: &str, json: &str) -> rusqlite::Result<i64> {
        self.connection
            .prepare_cached(&format!("INSERT INTO {table} (json) VALUES (?1) ON CONFLICT DO NOTHING"))?
            .execute([json])?;
        self.id(&format!("SELECT id FROM {table} WHERE json = ?1"), json)
    }

    fn receipt_id(&self, receipt: &Receipt) -> rusqlite::Result<i64> {
        let text = to_json(receipt);
        let threads = i64::try_from(receipt.threads).unwrap_or(i64::MAX);
        let sql = "INSERT INTO receipts (json, version, commit_id, cpu_features, threads) VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING";
        let values = params![text, receipt.version, receipt.commit, receipt.cpu_features.join(" "), threads];
        self.connection.prepare_cached(sql)?.execute(values)?;
        self.id("SELECT id FROM receipts WHERE json = ?1", &text)
    }

    /// The canaries under a key.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn canaries(&self, key: &str) -> Result<Option<[Canary; 2]>> {
        let texts = || {
            let sql = "SELECT json FROM canaries WHERE key = ?1 ORDER BY name DESC";
            self.connection.prepare_cached(sql)?.query_map([key], |row| row.get(0))?.collect()
        };
        let texts: Vec<String> = self.on(texts())?;
        let canaries = texts.iter().map(|text| self.parse(text.as_bytes())).collect::<Result<Vec<Canary>>>()?;
        Ok(canaries.try_into().ok())
    }

    /// Adds both canaries of a dump, in place of any that are there under the key.
    ///
    /// # Errors
    /// As [`Store::insert`].
    pub fn add_canaries(&self, key: &str, digest: &str, canaries: &[Canary; 2], receipt: &Receipt) -> Result<()> {
        let put = || {
            let transaction = Transaction::new_unchecked(&self.connection, TransactionBehavior::Immediate)?;
            let dump = self.id("SELECT id FROM dumps WHERE digest = ?1", digest)?;
            let receipt = self.receipt_id(receipt)?;
            let sql = "INSERT OR REPLACE INTO canaries (key, name, dump, receipt, problem, json) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
            for canary in canaries {
                let values = params![key, canary.name, dump, receipt, canary.problem, to_json(canary)];
                self.connection.prepare_cached(sql)?.execute(values)?;
            }
            transaction.commit()
        };
        self.on(put())
    }

    /// Every pair of canaries with its key.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn all_canaries(&self) -> Result<Vec<(String, Canary)>> {
        let texts = || {
            let mut statement =
                self.connection.prepare_cached("SELECT key, json FROM canaries ORDER BY key, name DESC")?;
            statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        };
        let texts: Vec<(String, String)> = self.on(texts())?;
        texts.into_iter().map(|(key, text)| Ok((key, self.parse(text.as_bytes())?))).collect()
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, text: &[u8]) -> Result<T> {
        serde_json::from_slice(text).map_err(|error| self.damaged(&error))
    }

    fn damaged(&self, error: &impl std::fmt::Display) -> Error {
        Error::corrupt(format!("`{}`: expected what this version stores: {error}", self.path.display()))
    }

    /// Names the file in what SQLite reports.
    fn on<T>(&self, result: rusqlite::Result<T>) -> Result<T> {
        result.map_err(|error| failed(&self.path, &error))
    }
}

/// What the canaries of a dump are stored under: all that their ending depends on.
pub fn canary_key(digest: &str, gate: &Gate, attention: Option<&Attention>) -> String {
    let attention = attention.map(Attention::options);
    digest::of(&json!({
        "canaries": digest, "gate": gate, "attention": attention, "version": env!("CARGO_PKG_VERSION"), "metrics": metrics::VERSION,
    }))
}

/// Whether a file begins like an SQLite database.
pub fn is_database(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 16];
    let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && magic == *b"SQLite format 3\0"
}

fn journal(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

/// The name of a file that nobody changes, as SQLite takes it.
fn immutable(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut name = "file:".to_owned();
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' => name.push(char::from(*byte)),
            byte if byte.is_ascii_alphanumeric() => name.push(char::from(*byte)),
            byte => {
                let _ = write!(name, "%{byte:02x}");
            }
        }
    }
    name + "?immutable=1"
}

/// Seconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| unreachable!("string keys only: {error}"))
}

fn failed(path: &Path, error: &rusqlite::Error) -> Error {
    let shown = path.display();
    let io = |text: &str| Error::new(ErrorKind::Io, format!("`{shown}`: {text}"));
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => {
            Error::invalid_input(format!("`{shown}`: expected a results store, got a file that is no SQLite database"))
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => io(&format!(
            "locked by another process for more than {} s; what was stored before is intact",
            PATIENCE.as_secs()
        )),
        Some(ErrorCode::DiskFull) => io("no space is left on the disk; what was stored before is intact"),
        Some(ErrorCode::ReadOnly) => io("expected a store that can be written, got one that is read-only"),
        Some(ErrorCode::CannotOpen) => io("cannot be opened or created as a results store"),
        Some(ErrorCode::DatabaseCorrupt) => Error::corrupt(format!("`{shown}`: the results store is damaged: {error}")),
        _ => io(&error.to_string()),
    }
}
