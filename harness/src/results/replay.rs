//! Rows computed again from what their receipt says, to see whether the same comes out.

use std::path::PathBuf;

use gearbox_core::{Error, Registry, Result};
use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Store;
use super::diff::{Field, fields};
use crate::dump::{Dump, Selection};
use crate::receipt::Receipt;
use crate::sweep::{Evaluator, Opened, Record, Unit};

/// Which rows to replay.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Their keys.
    pub keys: Vec<String>,
    /// So many others, chosen by the seed.
    pub sample: usize,
    /// The same seed chooses the same rows of the same store.
    pub seed: u64,
    /// Dumps to look at before the places where the store says they were.
    pub dumps: Vec<PathBuf>,
}

/// What replaying rows found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Replays {
    /// One per row, in the order of the request.
    pub rows: Vec<Replayed>,
}

/// One row, then and now.
#[derive(Clone, Debug, Serialize)]
pub struct Replayed {
    /// Its key.
    pub key: String,
    /// Pipeline and chunking.
    pub name: String,
    /// The dump, where it was read now.
    pub dump: String,
    /// Whether everything but times is the same.
    pub same: bool,
    /// The first of the facts that differ.
    pub fields: Vec<Field>,
    /// How many more do.
    pub more: usize,
    /// What is other than the receipt says, whether it matters or not: commit, versions, processor, threads, plugins, input.
    pub circumstances: Vec<String>,
}

impl Replays {
    /// Whether every row came out the same.
    pub fn passed(&self) -> bool {
        self.rows.iter().all(|row| row.same)
    }
}

/// Computes rows again and compares.
///
/// A dump that holds something else now is a row that differs, without being computed.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for an unknown key, and for a dump that is not found.
pub fn replay(store: &Store, request: &Request, registry: &Registry) -> Result<Replays> {
    let mut keys = request.keys.iter().map(|key| store.resolve(key)).collect::<Result<Vec<_>>>()?;
    let mut others: Vec<_> = store.keys()?.into_iter().filter(|key| !keys.contains(key)).collect();
    others.sort_by_cached_key(|key| xxh3_64_with_seed(key.as_bytes(), request.seed));
    keys.extend(others.into_iter().take(request.sample));
    let scratch = tempfile::tempdir().map_err(|error| Error::io(std::env::temp_dir(), &error))?;
    let mut evaluator = Evaluator::new(registry)?;
    let mut dumps = Dumps { store, given: &request.dumps, opened: Vec::new() };
    let mut replays = Replays::default();
    for key in keys {
        let then = store.record(&key)?;
        let opened = dumps.of(&then.unit)?;
        let mut circumstances = changes(&then.receipt, evaluator.receipt());
        circumstances.extend(evaluator.differences(&then.unit, opened));
        let same_input = then.unit.digest == opened.facts.digest;
        let now = same_input.then(|| evaluator.evaluate_anyway(&then.unit, opened, scratch.path())).transpose()?;
        let (fields, more) = now.as_ref().map_or((Vec::new(), 0), |now| fields(&then.facts(), &now.facts()));
        let same = now.as_ref().is_some_and(|now: &Record| now.digest() == then.digest());
        let name = format!("{} {}", then.row.name, then.row.chunking);
        let dump = opened.facts.path.clone();
        replays.rows.push(Replayed { key, name, dump, same, fields, more, circumstances });
    }
    Ok(replays)
}

/// What two receipts say differently.
fn changes(then: &Receipt, now: &Receipt) -> Vec<String> {
    let none = || "none".into();
    let pairs = [
        ("commit", then.commit.clone().unwrap_or_else(none), now.commit.clone().unwrap_or_else(none)),
        ("processor", then.cpu_features.join(" ").into(), now.cpu_features.join(" ").into()),
        ("threads", then.threads.to_string().into(), now.threads.to_string().into()),
    ];
    let changed = pairs.into_iter().filter(|(_, then, now)| then != now);
    changed.map(|(what, then, now)| format!("{what}: expected {then}, got {now}")).collect()
}

/// Dumps by what is read of them, each opened once.
struct Dumps<'a> {
    store: &'a Store,
    given: &'a [PathBuf],
    opened: Vec<(PathBuf, Selection, Opened)>,
}

impl Dumps<'_> {
    /// The dump of a unit: one with its digest, else the first that is where it should be.
    fn of(&mut self, unit: &Unit) -> Result<&Opened> {
        let known = self.store.dumps()?.into_iter().find(|(facts, _)| facts.digest == unit.digest);
        let mut places = self.given.to_vec();
        places.extend(known.map(|(_, location)| location));
        places.push((&unit.dump).into());
        places.retain(|place| place.exists());
        let mut first = None;
        for place in &places {
            let idx = self.open(place, &unit.selection)?;
            first = first.or(Some(idx));
            if self.opened[idx].2.facts.digest == unit.digest {
                first = Some(idx);
                break;
            }
        }
        let idx = first.ok_or_else(|| {
            Error::invalid_input(format!(
                "row {}: the dump `{}` with the digest {} is not there any more; name where it lies now with --dump",
                unit.key(),
                unit.dump,
                unit.digest
            ))
        })?;
        Ok(&self.opened[idx].2)
    }

    fn open(&mut self, place: &PathBuf, selection: &Selection) -> Result<usize> {
        let known = self.opened.iter().position(|(path, held, _)| (path, held) == (place, selection));
        if let Some(idx) = known {
            return Ok(idx);
        }
        let opened = Opened::new(Dump::open(place, selection)?)?;
        self.opened.push((place.clone(), selection.clone(), opened));
        Ok(self.opened.len() - 1)
    }
}
