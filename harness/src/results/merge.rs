//! Several stores into one: the shards of a sweep, or the work of several machines.

use gearbox_core::Result;
use serde::Serialize;

use super::{Cell, Query, Store};

/// What merging one store did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Merged {
    /// Rows that were new.
    pub added: usize,
    /// Rows that were there already.
    pub held: usize,
    /// Keys of those that have other numbers there; the first ones stay.
    pub differing: Vec<String>,
}

/// Adds everything that one store holds to another.
///
/// # Errors
/// What reading the one and writing the other report.
pub fn merge(from: &Store, to: &Store) -> Result<Merged> {
    for (facts, location) in from.dumps()? {
        to.put_dump(&facts, &location.display().to_string())?;
    }
    let mut merged = Merged::default();
    let query = Query { columns: ["key", "digest", "created"].map(str::to_owned).into(), ..Query::default() };
    from.each(&query, |cells| {
        let [Cell::Text(key), Cell::Text(digest), Cell::Integer(created)] = cells.as_slice() else { return Ok(()) };
        if to.put(&from.record(key)?, false, *created)? {
            merged.added += 1;
        } else {
            merged.held += 1;
            if to.digest_of(key)?.as_ref() != Some(digest) {
                merged.differing.push(key.clone());
            }
        }
        Ok(())
    })?;
    to.copy_canaries(from)?;
    Ok(merged)
}

impl Store {
    /// The digest of the row under a key.
    pub(super) fn digest_of(&self, key: &str) -> Result<Option<String>> {
        use rusqlite::OptionalExtension;
        self.on(self
            .connection
            .prepare_cached("SELECT digest FROM rows WHERE key = ?1")
            .and_then(|mut statement| statement.query_row([key], |row| row.get(0)).optional()))
    }

    /// Adds the canaries of another store that this one lacks; its dumps are here already.
    fn copy_canaries(&self, from: &Self) -> Result<()> {
        let canaries = || -> rusqlite::Result<Vec<[Option<String>; 6]>> {
            let sql = "SELECT canaries.key, canaries.name, dumps.digest, receipts.json, canaries.problem, canaries.json FROM canaries
                JOIN dumps ON dumps.id = canaries.dump JOIN receipts ON receipts.id = canaries.receipt ORDER BY canaries.key, canaries.name";
            let mut statement = from.connection.prepare(sql)?;
            let texts = |row: &rusqlite::Row<'_>| {
                let text = |idx| row.get::<_, Option<String>>(idx);
                Ok([text(0)?, text(1)?, text(2)?, text(3)?, text(4)?, text(5)?])
            };
            statement.query_map([], texts)?.collect()
        };
        for [key, name, digest, receipt, problem, json] in from.on(canaries())? {
            let receipt = self.parse(receipt.unwrap_or_default().as_bytes())?;
            let put = || {
                let dump = self.id("SELECT id FROM dumps WHERE digest = ?1", &digest.unwrap_or_default())?;
                let receipt = self.receipt_id(&receipt)?;
                let sql = "INSERT INTO canaries (key, name, dump, receipt, problem, json) VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO NOTHING";
                self.connection.execute(sql, rusqlite::params![key, name, dump, receipt, problem, json])
            };
            self.on(put())?;
        }
        Ok(())
    }
}
