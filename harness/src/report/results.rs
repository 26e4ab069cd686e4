//! Results of any number of files, put together.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use gearbox_core::{Error, Result, ResultExt};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::gate::{Gate, Metric, Verdict};
use crate::results::{Query, Store, is_database};
use crate::sweep::{DumpFacts, Outcome, Record, Row, Sweep, front};

/// What a report is made of.
#[derive(Debug)]
pub struct Results {
    /// Sweeps, in the order in which they were named.
    pub sweeps: Vec<Source<Sweep>>,
    /// Results of models, in the order in which they were named.
    pub models: Vec<Source<ModelResults>>,
    /// Each dump once, whichever files have it.
    pub dumps: Vec<DumpFacts>,
    /// Rows of stores that were not read, because a store may hold more than anyone looks at.
    pub left_out: usize,
    /// Where the rows of all sweeps belong, in their order.
    places: Vec<Place>,
}

/// Which results are read, and how they are judged.
#[derive(Debug, Default)]
pub struct Options {
    /// Limits that take the place of those in the files; rows of stores have none, and are judged by the default ones otherwise.
    pub gate: Option<Gate>,
    /// An SQL condition that rows of stores must meet.
    pub condition: Option<String>,
}

/// Most rows that are read from one store, those with the highest ratios.
const STORE_ROWS: usize = 10_000;

/// What one file held.
#[derive(Debug)]
pub struct Source<T> {
    /// The file, as it was named.
    pub file: String,
    /// What it held.
    pub results: T,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    dump: usize,
    front: bool,
}

/// A row with what the report says of it beside its own numbers.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// Number of the sweep that has it.
    pub sweep: usize,
    /// Number of its dump.
    pub dump: usize,
    /// Whether no other row of the dump beats it, those of other files included.
    pub front: bool,
    /// The row.
    pub row: &'a Row,
}

/// What a run of a model through compressed caches left behind; what else its file holds is passed over.
#[derive(Debug, Deserialize)]
pub struct ModelResults {
    /// One row per cache, the dense one included.
    pub rows: Vec<ModelRow>,
    /// What a control did that it must not do; results without controls have none.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// One cache that a model read through.
#[derive(Debug, Deserialize)]
pub struct ModelRow {
    /// The cache in a few words.
    pub name: String,
    /// `ok`, or how it failed in a word.
    pub state: String,
    /// Why it failed.
    #[serde(default)]
    pub reason: Option<String>,
    /// Numbers by name; none where one is not finite.
    pub measured: BTreeMap<Metric, Option<f64>>,
    /// What the gate says.
    #[serde(default)]
    pub verdict: Option<Verdict>,
}

impl Results {
    /// Reads results stores, and files of `sweep --out`, `model perplexity --out` or `model bench --out`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) with the file that holds none.
    pub fn read(paths: &[PathBuf], options: &Options) -> Result<Self> {
        let mut found =
            Self { sweeps: Vec::new(), models: Vec::new(), dumps: Vec::new(), left_out: 0, places: Vec::new() };
        for path in paths {
            let file = path.display().to_string();
            let (all, left_out) = read(path, options)?;
            found.left_out += left_out;
            for held in all {
                match held {
                    Held::Sweep(mut results) => {
                        if let Some(gate) = &options.gate {
                            judge(&mut results, gate);
                        }
                        found.add(file.clone(), *results).context(|| format!("`{file}`"))?;
                    }
                    Held::Model(results) => found.models.push(Source { file: file.clone(), results }),
                }
            }
        }
        found.mark();
        Ok(found)
    }

    /// Takes in a sweep; [`Results::mark`] comes after the last.
    fn add(&mut self, file: String, results: Sweep) -> Result<()> {
        for facts in &results.dumps {
            if self.dump(&facts.digest).is_none() {
                self.dumps.push(facts.clone());
            }
        }
        for row in &results.rows {
            let facts = results.dumps.iter().find(|facts| facts.path == row.dump);
            let dump = facts.and_then(|facts| self.dump(&facts.digest)).ok_or_else(|| {
                let known: Vec<_> = results.dumps.iter().map(|facts| format!("`{}`", facts.path)).collect();
                let (name, dump) = (&row.name, &row.dump);
                Error::invalid_input(format!("row `{name}`: expected a dump of {}, got `{dump}`", known.join(", ")))
            })?;
            self.places.push(Place { dump, front: row.pareto });
        }
        self.sweeps.push(Source { file, results });
        Ok(())
    }

    fn dump(&self, digest: &str) -> Option<usize> {
        self.dumps.iter().position(|facts| facts.digest == digest)
    }

    /// Looks for the fronts again where rows of several files meet.
    fn mark(&mut self) {
        let rows: Vec<_> = self.lines().map(|line| (line.dump, line.row)).collect();
        let found = front(&rows);
        for (place, on_front) in self.places.iter_mut().zip(found) {
            place.front = on_front;
        }
    }

    /// All rows.
    pub fn lines(&self) -> impl Iterator<Item = Line<'_>> {
        let sweeps = self.sweeps.iter().enumerate();
        let rows = sweeps.flat_map(|(sweep, source)| source.results.rows.iter().map(move |row| (sweep, row)));
        rows.zip(&self.places).map(|((sweep, row), Place { dump, front })| Line {
            sweep,
            dump: *dump,
            front: *front,
            row,
        })
    }

    /// The counts of the rows in a line.
    pub fn summary(&self) -> String {
        let ended = self.lines().filter(|line| line.row.is_ok()).count();
        let holding = self.lines().filter(Line::holds).count();
        let count = |test: fn(&Outcome) -> bool| self.lines().filter(|line| test(&line.row.outcome)).count();
        let failed = count(|outcome| matches!(outcome, Outcome::Failed { .. }));
        let unsupported = count(|outcome| matches!(outcome, Outcome::Unsupported(_)));
        let plural = |count: usize, word: &str| format!("{count} {word}{}", if count == 1 { "" } else { "s" });
        let (rows, dumps) = (plural(self.lines().count(), "row"), plural(self.dumps.len(), "dump"));
        let mut text = format!("{rows} over {dumps}: {holding} of {ended} that ran to the end hold the gate");
        for (count, what) in [(failed, "failed"), (unsupported, "not legal")] {
            if count > 0 {
                let _ = write!(text, ", {count} {what}");
            }
        }
        text
    }

    /// The row of a dump that best shows what its sweep is about: the highest ratio among lossy rows within the gate, else among all rows.
    pub fn best(&self, dump: usize) -> Option<Line<'_>> {
        let ended = || self.lines().filter(|line| line.dump == dump && line.row.is_ok());
        let smallest = |lines: &mut dyn Iterator<Item = _>| lines.min_by_key(|line: &Line<'_>| line.row.stored_bytes);
        smallest(&mut ended().filter(|line| line.holds() && line.row.changed_values > 0))
            .or_else(|| smallest(&mut ended()))
    }
}

impl ModelResults {
    /// The numbers that any row has.
    pub fn metrics(&self) -> Vec<Metric> {
        let metrics: BTreeSet<_> = self.rows.iter().flat_map(|row| row.measured.keys().copied()).collect();
        metrics.into_iter().collect()
    }
}

impl ModelRow {
    /// How it ended, and what the gate says of it.
    pub fn end(&self) -> String {
        match (&self.reason, &self.verdict) {
            (Some(reason), _) => format!("{}: {reason}", self.state),
            (None, Some(verdict)) => verdict.to_string(),
            (None, None) => self.state.clone(),
        }
    }
}

impl Line<'_> {
    /// Whether the row holds all limits of its gate.
    pub fn holds(&self) -> bool {
        self.row.is_ok() && self.row.verdict.as_ref().is_some_and(Verdict::passed)
    }
}

/// What a file may hold.
enum Held {
    Sweep(Box<Sweep>),
    Model(ModelResults),
}

/// What tells the kinds of results apart: only sweeps have dumps.
#[derive(Deserialize)]
struct Kind {
    dumps: Option<IgnoredAny>,
}

/// Judges all rows by other limits.
fn judge(sweep: &mut Sweep, gate: &Gate) {
    sweep.gate = gate.clone().with_default();
    sweep.gate_required = true;
    for row in &mut sweep.rows {
        row.judge(&sweep.gate);
    }
}

/// Reads the rows of a store as one sweep per receipt, and says how many rows are left.
fn read_store(path: &Path, options: &Options) -> Result<(Vec<Held>, usize)> {
    let store = Store::read(path)?;
    let query = |columns: &[&str], limit| Query {
        columns: columns.iter().map(|name| (*name).to_owned()).collect(),
        condition: options.condition.clone(),
        order: Some("-ratio".into()),
        limit,
    };
    let mut keys = Vec::new();
    store.each(&query(&["key"], Some(STORE_ROWS)), |cells| {
        keys.extend(cells.first().map(ToString::to_string));
        Ok(())
    })?;
    let mut left_out = 0;
    if keys.len() == STORE_ROWS {
        let mut all = 0;
        store.each(&query(&["key"], None), |_| {
            all += 1;
            Ok(())
        })?;
        left_out = all - keys.len();
    }
    let dumps: BTreeMap<_, _> = store.dumps()?.into_iter().map(|(facts, _)| (facts.digest.clone(), facts)).collect();
    let mut sweeps: Vec<Sweep> = Vec::new();
    for key in keys {
        let Record { unit, mut row, refuted, receipt } = store.record(&key)?;
        if let Some(facts) = dumps.get(&unit.digest) {
            row.dump.clone_from(&facts.path);
        }
        let held = sweeps.iter().position(|sweep| sweep.receipt == receipt);
        let idx = held.unwrap_or_else(|| {
            sweeps.push(Sweep {
                receipt,
                gate: Gate::default(),
                gate_required: false,
                dumps: dumps.values().cloned().collect(),
                canaries: Vec::new(),
                rows: Vec::new(),
                same: Vec::new(),
                refuted: Vec::new(),
                search: None,
                found: Vec::new(),
                resumed: None,
            });
            sweeps.len() - 1
        });
        let sweep = &mut sweeps[idx];
        for refuted in refuted {
            if !sweep.refuted.contains(&refuted) {
                sweep.refuted.push(refuted);
            }
        }
        row.judge(&sweep.gate);
        sweep.rows.push(row);
    }
    // A store does not say which receipt its canaries belong to.
    if let Some(first) = sweeps.first_mut() {
        first.canaries = store.all_canaries()?.into_iter().map(|(_, canary)| canary).collect();
    }
    Ok((sweeps.into_iter().map(|sweep| Held::Sweep(Box::new(sweep))).collect(), left_out))
}

/// Reads a file, and says how many of its rows are left; the one place that knows in which forms results are stored.
fn read(path: &Path, options: &Options) -> Result<(Vec<Held>, usize)> {
    if is_database(path) {
        return read_store(path, options);
    }
    let text = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
    let wrong = |error: serde_json::Error| {
        Error::invalid_input(format!(
            "`{}`: expected results of `sweep`, `model perplexity` or `model bench` as JSON: {error}",
            path.display()
        ))
    };
    let Kind { dumps } = serde_json::from_slice(&text).map_err(wrong)?;
    let held = if dumps.is_some() {
        Held::Sweep(serde_json::from_slice(&text).map_err(wrong)?)
    } else {
        Held::Model(serde_json::from_slice(&text).map_err(wrong)?)
    };
    Ok((vec![held], 0))
}
