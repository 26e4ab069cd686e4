//! The tables of a results store, and how an older store becomes a newer one. `docs/RESULTS-STORE.md` explains them.

use std::io;

use rusqlite::{Connection, Transaction, TransactionBehavior, params};

/// What marks an SQLite file as a results store: `GBXR`.
pub(super) const APPLICATION: i64 = 0x4742_5852;

/// What makes the next version out of the one before.
type Step = fn(&Transaction<'_>) -> rusqlite::Result<()>;

/// Steps are never changed, only added.
const STEPS: [Step; VERSION as usize] =
    [|store| store.execute_batch(ROWS), |store| store.execute_batch(CANARIES), pack_bodies];

/// The version that this program writes.
pub(super) const VERSION: i64 = 3;

const ROWS: &str = "
CREATE TABLE dumps (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    path TEXT NOT NULL,
    location TEXT NOT NULL,
    json TEXT NOT NULL
);
CREATE TABLE pipelines (
    id INTEGER PRIMARY KEY,
    json TEXT NOT NULL UNIQUE
);
CREATE TABLE receipts (
    id INTEGER PRIMARY KEY,
    json TEXT NOT NULL UNIQUE,
    version TEXT NOT NULL,
    commit_id TEXT,
    cpu_features TEXT NOT NULL,
    threads INTEGER NOT NULL
);
CREATE TABLE rows (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    digest TEXT NOT NULL,
    created INTEGER NOT NULL,
    dump INTEGER NOT NULL REFERENCES dumps (id),
    pipeline INTEGER NOT NULL REFERENCES pipelines (id),
    receipt INTEGER NOT NULL REFERENCES receipts (id),
    metrics_version INTEGER NOT NULL,
    name TEXT NOT NULL,
    chunking TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,
    labels TEXT NOT NULL,
    original_bytes INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL,
    key_original_bytes INTEGER NOT NULL,
    key_stored_bytes INTEGER NOT NULL,
    value_original_bytes INTEGER NOT NULL,
    value_stored_bytes INTEGER NOT NULL,
    value_count INTEGER NOT NULL,
    changed_values INTEGER NOT NULL,
    escapes INTEGER NOT NULL,
    encode_ns INTEGER NOT NULL,
    decode_ns INTEGER NOT NULL,
    floor REAL,
    gap REAL,
    ratio REAL,
    bits_per_value REAL,
    mae REAL,
    rmse REAL,
    nmse REAL,
    max_abs REAL,
    cosine REAL,
    key_mae REAL,
    value_mae REAL,
    key_nmse REAL,
    value_nmse REAL,
    key_cosine REAL,
    value_cosine REAL,
    worst_head_cosine REAL,
    worst_head_nmse REAL,
    worst_layer_nmse REAL,
    logit_rmse REAL,
    logit_max REAL,
    kl_mean REAL,
    kl_p99 REAL,
    kl_max REAL,
    worst_head_kl REAL,
    output_error REAL,
    worst_head_output_error REAL,
    top_agreement REAL
);
CREATE TABLE bodies (
    row INTEGER PRIMARY KEY REFERENCES rows (id) ON DELETE CASCADE,
    json TEXT NOT NULL
);
CREATE INDEX rows_of_dump ON rows (dump, stored_bytes);
CREATE VIEW results AS
    SELECT rows.key, dumps.path AS dump, rows.name, rows.chunking, rows.state, rows.reason, rows.labels,
        rows.original_bytes, rows.stored_bytes, rows.key_original_bytes, rows.key_stored_bytes, rows.value_original_bytes,
        rows.value_stored_bytes, rows.value_count, rows.changed_values, rows.escapes, rows.encode_ns, rows.decode_ns, rows.floor, rows.gap,
        rows.ratio, rows.bits_per_value, rows.mae, rows.rmse, rows.nmse, rows.max_abs, rows.cosine, rows.key_mae, rows.value_mae,
        rows.key_nmse, rows.value_nmse, rows.key_cosine, rows.value_cosine, rows.worst_head_cosine, rows.worst_head_nmse,
        rows.worst_layer_nmse, rows.logit_rmse, rows.logit_max, rows.kl_mean, rows.kl_p99, rows.kl_max, rows.worst_head_kl,
        rows.output_error, rows.worst_head_output_error, rows.top_agreement,
        rows.digest, dumps.digest AS dump_digest, rows.metrics_version, receipts.version, receipts.commit_id, receipts.cpu_features,
        receipts.threads, rows.created, pipelines.json AS pipeline
    FROM rows
    JOIN dumps ON dumps.id = rows.dump
    JOIN pipelines ON pipelines.id = rows.pipeline
    JOIN receipts ON receipts.id = rows.receipt;
";

const CANARIES: &str = "
CREATE TABLE canaries (
    key TEXT NOT NULL,
    name TEXT NOT NULL,
    dump INTEGER NOT NULL REFERENCES dumps (id),
    receipt INTEGER NOT NULL REFERENCES receipts (id),
    problem TEXT,
    json TEXT NOT NULL,
    PRIMARY KEY (key, name)
);
";

/// Most of a store are bodies, and they say nearly the same over and over. The index that goes misled SQLite to read a large store in an
/// order of its own, ten times slower than from one end to the other.
fn pack_bodies(store: &Transaction<'_>) -> rusqlite::Result<()> {
    store.execute_batch(
        "DROP INDEX IF EXISTS rows_of_dump;
        ALTER TABLE bodies RENAME TO texts;
        CREATE TABLE bodies (row INTEGER PRIMARY KEY REFERENCES rows (id) ON DELETE CASCADE, zstd BLOB NOT NULL);",
    )?;
    {
        let mut texts = store.prepare("SELECT row, json FROM texts")?;
        let mut insert = store.prepare("INSERT INTO bodies (row, zstd) VALUES (?1, ?2)")?;
        let mut rows = texts.query([])?;
        while let Some(row) = rows.next()? {
            insert.execute(params![row.get::<_, i64>(0)?, pack(&row.get::<_, String>(1)?)])?;
        }
    }
    store.execute_batch("DROP TABLE texts")
}

/// The body of a row as it is stored.
pub(super) fn pack(json: &str) -> Vec<u8> {
    zstd::bulk::compress(json.as_bytes(), zstd::DEFAULT_COMPRESSION_LEVEL)
        .unwrap_or_else(|error| unreachable!("a level that exists, in memory: {error}"))
}

/// The body that was stored.
pub(super) fn unpack(stored: &[u8]) -> io::Result<Vec<u8>> {
    zstd::stream::decode_all(stored)
}

/// What a file says it is.
pub(super) struct Marks {
    pub application: i64,
    pub version: i64,
    pub tables: i64,
}

impl Marks {
    pub fn of(connection: &Connection) -> rusqlite::Result<Self> {
        let number = |sql| connection.query_row(sql, [], |row| row.get(0));
        Ok(Self {
            application: number("PRAGMA application_id")?,
            version: number("PRAGMA user_version")?,
            tables: number("SELECT count(*) FROM sqlite_schema")?,
        })
    }

    /// Whether nothing was ever written.
    pub fn is_blank(&self) -> bool {
        (self.application, self.version, self.tables) == (0, 0, 0)
    }
}

/// Takes the steps that a store lacks, all of them or none.
pub(super) fn migrate(connection: &Connection) -> rusqlite::Result<()> {
    let transaction = Transaction::new_unchecked(connection, TransactionBehavior::Immediate)?;
    // Another process may have been faster.
    let version = Marks::of(connection)?.version;
    for (step, number) in STEPS.iter().zip(1..).filter(|(_, number)| *number > version) {
        step(&transaction)?;
        transaction.pragma_update(None, "user_version", number)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION)?;
    transaction.commit()
}
