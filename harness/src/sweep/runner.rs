//! What runs the units of a sweep, or reads their rows from a store.

use std::collections::BTreeMap;

use gearbox_core::{Error, ErrorKind, Pipeline, PipelineSpec, Result};
use serde_json::Value;

use super::{
    Canary, Containers, Evaluator, Found, Opened, Plan, Record, Refuted, Resumed, Row, Same, Search, Work, canary,
    dims, effective, search,
};
use crate::atomic::AtomicFile;
use crate::gate::Verdict;
use crate::pipelines::Grid;
use crate::receipt::Receipt;
use crate::results;

/// What runs rows.
pub(super) struct Runner<'a> {
    plan: &'a Plan<'a>,
    containers: &'a Containers,
    evaluator: Evaluator<'a>,
    /// Channels per head of keys and values in any dump.
    dims: Vec<[usize; 2]>,
    rows: Vec<Row>,
    refuted: Vec<Refuted>,
    computed: usize,
    /// Commits that rows were computed by which were read.
    others: BTreeMap<String, usize>,
    read: usize,
}

/// What a runner leaves.
pub(super) struct End {
    pub rows: Vec<Row>,
    pub refuted: Vec<Refuted>,
    pub receipt: Receipt,
    pub resumed: Option<Resumed>,
}

impl<'a> Runner<'a> {
    pub fn new(plan: &'a Plan<'a>, dumps: &[Opened], containers: &'a Containers, evaluator: Evaluator<'a>) -> Self {
        let (rows, refuted, others) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { plan, containers, evaluator, dims: dims(dumps), rows, refuted, computed: 0, others, read: 0 }
    }

    pub fn end(self) -> End {
        let Self { plan, evaluator, rows, refuted, computed, others, read, .. } = self;
        let resumed = plan.store.map(|store| Resumed {
            store: store.path().display().to_string(),
            computed,
            read,
            shard: plan.shard.map(|shard| shard.to_string()),
        });
        if let (Some(resumed), false) = (&resumed, others.is_empty()) {
            let others: Vec<_> = others.iter().map(|(commit, count)| format!("{count} by {commit}")).collect();
            tracing::warn!(
                "rows in `{}` were computed by other commits than this program: {}; `results replay` checks them, `sweep --rerun` replaces them",
                resumed.store,
                others.join(", ")
            );
        }
        End { rows, refuted, receipt: evaluator.receipt().clone(), resumed }
    }

    /// Both canaries of a dump.
    pub fn canaries(&mut self, opened: &Opened) -> Result<[Canary; 2]> {
        let Plan { registry, gate, attention, store, rerun, .. } = self.plan;
        let run = || canary::run(&opened.dump, gate, registry, attention.as_ref());
        let Some(store) = store else { return run() };
        store.add_dump(&opened.facts)?;
        let key = results::canary_key(&opened.facts.digest, gate, attention.as_ref());
        if let (Some(mut held), false) = (store.canaries(&key)?, *rerun) {
            for canary in &mut held {
                canary.dump.clone_from(&opened.facts.path);
            }
            return Ok(held);
        }
        let canaries = run()?;
        store.add_canaries(&key, &opened.facts.digest, &canaries, self.evaluator.receipt())?;
        Ok(canaries)
    }

    /// Runs every pipeline over every dump, or the share that was asked for, and names those that do the same as an earlier one.
    pub fn all(&mut self, dumps: &[Opened]) -> Result<Vec<Same>> {
        let (mut work, same) = self.plan.work(dumps)?;
        if let Some(shard) = self.plan.shard {
            let units: Vec<_> = work.iter().map(|work| work.unit.clone()).collect();
            let mut members = shard.members(&units).into_iter();
            work.retain(|_| members.next().unwrap_or(false));
        }
        work.iter().try_for_each(|work| self.row(work))?;
        Ok(same)
    }

    pub fn search(&mut self, search: &Search, value: &Value, dumps: &[Opened]) -> Result<Found> {
        let grid = Grid::of(value)?;
        let lens = grid.lens();
        let mut known: Vec<(Vec<PipelineSpec>, Vec<usize>)> = Vec::new();
        let mut numbers = BTreeMap::new();
        let best = search::walk(&lens, |point| {
            let spec = grid.at(point)?;
            let first = self.rows.len();
            let rows = match Pipeline::build(&spec, self.plan.registry) {
                Ok(pipeline) => {
                    let effective = effective(&pipeline, &self.dims);
                    if let Some((_, rows)) = known.iter().find(|(held, _)| *held == effective) {
                        rows.clone()
                    } else {
                        let plan = self.plan;
                        dumps.iter().try_for_each(|opened| self.row(&plan.built(opened, &pipeline)))?;
                        let rows: Vec<_> = (first..self.rows.len()).collect();
                        known.push((effective, rows.clone()));
                        rows
                    }
                }
                Err(error) if error.kind() == ErrorKind::UnknownPlugin || lens.iter().product::<usize>() == 1 => {
                    return Err(error.context(format!("pipeline {}", spec.to_value())));
                }
                Err(error) => {
                    let plan = self.plan;
                    dumps.iter().try_for_each(|opened| self.row(&plan.unbuilt(opened, &spec, &error)?))?;
                    (first..self.rows.len()).collect()
                }
            };
            let score = search.score(rows.iter().map(|row| &self.rows[*row]));
            numbers.insert(point.to_vec(), rows);
            Ok(score)
        })?;
        let best = numbers.remove(&best).unwrap_or_default();
        let violations: Vec<Verdict> = best.iter().map(|row| search.judge(&self.rows[*row])).collect();
        let passed = best.iter().zip(&violations).all(|(row, verdict)| self.rows[*row].is_ok() && verdict.passed());
        Ok(Found { products: lens.iter().product(), evaluated: known.len(), best, passed, violations })
    }

    /// Reads or runs one pipeline over one dump.
    fn row(&mut self, work: &Work<'_>) -> Result<()> {
        let record = match self.held(work)? {
            Some(record) => {
                self.read += 1;
                let (own, other) = (self.evaluator.receipt(), &record.receipt);
                if other.commit != own.commit {
                    *self.others.entry(other.commit.as_deref().unwrap_or("no commit").to_owned()).or_default() += 1;
                }
                record
            }
            None => self.compute(work)?,
        };
        for refuted in record.refuted {
            if !self.refuted.contains(&refuted) {
                self.refuted.push(refuted);
            }
        }
        let mut row = record.row;
        // What a row in a store says of these belongs to the sweep that stored it.
        (row.name, row.dump) = (work.unit.name.clone(), work.unit.dump.clone());
        row.judge(&self.plan.gate);
        self.rows.push(row);
        Ok(())
    }

    /// What the store holds of a unit, unless it should be tried again.
    fn held(&self, work: &Work<'_>) -> Result<Option<Record>> {
        let store = self.plan.store.filter(|_| !self.plan.rerun);
        let held = store.map(|store| store.get(&work.unit.key())).transpose()?.flatten();
        Ok(held.filter(|record| !record.row.outcome.is_transient()))
    }

    fn compute(&mut self, work: &Work<'_>) -> Result<Record> {
        let path = self.containers.path(self.rows.len());
        let out = || AtomicFile::create(&path, self.containers.overwrite);
        let mut record = self.evaluator.run(&work.unit, work.opened, work.built, out)?;
        self.computed += 1;
        if let Some(store) = self.plan.store {
            let key = work.unit.key();
            if self.plan.rerun {
                store.replace(&record)?;
            } else {
                store.insert(&record)?;
            }
            tracing::info!(
                "{key}: {} {} over {}: {}",
                record.row.name,
                record.row.chunking,
                work.unit.dump,
                record.row.outcome.state()
            );
        }
        if self.containers.keep && work.built.is_ok() {
            record.row.container = path.file_name().map(|name| name.to_string_lossy().into_owned());
        } else if record.row.stored_bytes > 0 {
            std::fs::remove_file(&path).map_err(|error| Error::io(&path, &error))?;
        }
        Ok(record)
    }
}
