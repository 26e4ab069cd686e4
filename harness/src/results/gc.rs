//! Throwing away what nobody will read again.

use gearbox_core::Result;
use rusqlite::{Transaction, TransactionBehavior, params};
use serde::Serialize;

use super::Store;
use crate::metrics;
use crate::sweep::Outcome;

/// What is thrown away besides rows that would be computed again anyway, and parts that no row refers to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rubbish {
    /// Every row that failed.
    pub failed: bool,
    /// Rows of another version of the program or of the metrics: no sweep of this one reads them.
    pub stale: bool,
    /// Rows of dumps that are no longer where they were.
    pub missing: bool,
}

/// What was thrown away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Rows.
    pub rows: usize,
    /// Canaries.
    pub canaries: usize,
    /// Dumps that no row is about any more.
    pub dumps: usize,
    /// Pipelines and receipts that no row refers to any more.
    pub parts: usize,
    /// Bytes of the file before.
    pub bytes_before: u64,
    /// Bytes of the file after.
    pub bytes_after: u64,
}

/// Throws away, and gives the space back to the file system; a dry run counts, but keeps everything.
///
/// # Errors
/// As [`Store::insert`].
pub fn collect(store: &Store, rubbish: Rubbish, dry_run: bool) -> Result<Removed> {
    let missing: Vec<String> = if rubbish.missing {
        let dumps = store.dumps()?.into_iter();
        dumps.filter(|(_, location)| !location.exists()).map(|(facts, _)| facts.digest).collect()
    } else {
        Vec::new()
    };
    let size = || std::fs::metadata(store.path()).map_or(0, |found| found.len());
    let bytes_before = size();
    let removed = store.on(remove(store, rubbish, &missing, dry_run))?;
    if !dry_run {
        store.on(store.connection.execute_batch("VACUUM; PRAGMA wal_checkpoint(TRUNCATE);"))?;
    }
    Ok(Removed { bytes_before, bytes_after: size(), ..removed })
}

fn remove(store: &Store, rubbish: Rubbish, missing: &[String], dry_run: bool) -> rusqlite::Result<Removed> {
    let connection = &store.connection;
    let transaction = Transaction::new_unchecked(connection, TransactionBehavior::Immediate)?;
    let mut removed = Removed::default();
    for state in Outcome::TRANSIENT {
        removed.rows += connection.execute("DELETE FROM rows WHERE state = ?1", [state])?;
    }
    if rubbish.failed {
        removed.rows += connection.execute("DELETE FROM rows WHERE state NOT IN ('ok', 'unsupported')", [])?;
    }
    if rubbish.stale {
        let other = "receipt IN (SELECT id FROM receipts WHERE version <> ?1)";
        let version = env!("CARGO_PKG_VERSION");
        let sql = format!("DELETE FROM rows WHERE metrics_version <> ?2 OR {other}");
        removed.rows += connection.execute(&sql, params![version, metrics::VERSION])?;
        removed.canaries += connection.execute(&format!("DELETE FROM canaries WHERE {other}"), [version])?;
    }
    for digest in missing {
        let of_dump = "dump IN (SELECT id FROM dumps WHERE digest = ?1)";
        removed.rows += connection.execute(&format!("DELETE FROM rows WHERE {of_dump}"), [digest])?;
        removed.canaries += connection.execute(&format!("DELETE FROM canaries WHERE {of_dump}"), [digest])?;
    }
    let unused = "id NOT IN (SELECT dump FROM rows)";
    removed.canaries +=
        connection.execute(&format!("DELETE FROM canaries WHERE dump IN (SELECT id FROM dumps WHERE {unused})"), [])?;
    removed.dumps += connection.execute(&format!("DELETE FROM dumps WHERE {unused}"), [])?;
    removed.parts += connection.execute("DELETE FROM pipelines WHERE id NOT IN (SELECT pipeline FROM rows)", [])?;
    let unused = "id NOT IN (SELECT receipt FROM rows) AND id NOT IN (SELECT receipt FROM canaries)";
    removed.parts += connection.execute(&format!("DELETE FROM receipts WHERE {unused}"), [])?;
    if dry_run {
        transaction.rollback()?;
    } else {
        transaction.commit()?;
    }
    Ok(removed)
}
