//! The sweep: every pipeline over every dump, written to disk, decoded again, compared, and judged by a gate.
//!
//! Two canaries run before the pipelines of each dump: one that must be exact, and one with a broken head that the gate must catch; see
//! [`canary`].
//!
//! A [`Plan`] enumerates [`Unit`]s, an [`Evaluator`] makes a [`Record`] of each, and a [`Store`] keeps them, so that a
//! sweep goes on where it was stopped, and may be spread over machines.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gearbox_core::{Error, ErrorKind, Pipeline, PipelineSpec, Registry, Result, ResultExt, Role};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::canary::Canary;
pub use self::csv::write_csv;
pub use self::labels::{Label, Refuted};
pub(crate) use self::pareto::front;
pub use self::row::{LedgerRow, Outcome, RoleBytes, Row};
use self::runner::{End, Runner};
pub use self::search::{Found, Objective, Search};
pub use self::shard::Shard;
pub(crate) use self::table::result;
pub use self::unit::{Evaluator, Record, Unit};
use crate::dump::{Dump, Selection};
use crate::entropy::{Entropies, Entropy, Mean};
use crate::gate::{Gate, Verdict};
use crate::isolate::Limits;
use crate::loading::LibraryFile;
use crate::metrics::attention::{Attention, AttentionOptions};
use crate::pipelines;
use crate::receipt::Receipt;
use crate::results::Store;

pub mod canary;
mod csv;
mod labels;
mod pareto;
mod row;
mod runner;
mod search;
mod shard;
mod table;
mod unit;

/// A sweep as it is written down.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SweepConfig {
    /// Dumps to read when none is named on the command line; relative to the config file.
    pub dumps: Vec<PathBuf>,
    /// Pipelines; any scalar in them may be `{ "sweep": [ … ] }`. Empty: every codec with default settings in every chunking
    /// mode, and every transform before every codec.
    pub pipelines: Vec<Value>,
    /// Limits that rows are judged by. No head's cosine may be below 0.99, unless a limit of `worst_head_cosine` says otherwise. If limits are
    /// given and no pipeline holds them on every dump, the sweep fails.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<Gate>,
    /// Look for the cheapest setting that holds all limits, instead of running every product.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub search: Option<Search>,
    /// Libraries with plugins to load, beside those of the command line.
    pub plugins: Vec<LibraryFile>,
    /// What a process that runs loaded plugins may use.
    pub isolation: Limits,
    /// How attention is replayed where the dump holds queries; null for not at all.
    pub attention: Option<AttentionOptions>,
}

impl Default for SweepConfig {
    fn default() -> Self {
        let attention = Some(AttentionOptions { queries: Some(256), ..AttentionOptions::default() });
        Self {
            dumps: Vec::new(),
            pipelines: Vec::new(),
            gate: None,
            search: None,
            plugins: Vec::new(),
            isolation: Limits::default(),
            attention,
        }
    }
}

impl SweepConfig {
    /// Reads a config file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] with file, JSON pointer and what is legal there.
    pub fn read(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let shown = path.display();
            let message =
                format!("`{shown}`: expected a sweep as JSON, got a folder; a dump comes with `--dump {shown}`");
            return Err(Error::invalid_config(message));
        }
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
        let place = || format!("`{}`", path.display());
        let value =
            serde_json::from_str(&text).map_err(|error| Error::invalid_config(error.to_string())).context(place)?;
        let mut config: Self = gearbox_core::config::from_value(&value).context(place)?;
        config.check().context(place)?;
        if let Some(folder) = path.parent() {
            for dump in &mut config.dumps {
                *dump = folder.join(&*dump);
            }
            for library in &mut config.plugins {
                library.path = folder.join(&library.path);
            }
        }
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        self.gate.as_ref().map_or(Ok(()), |gate| gate.check("/gate"))?;
        let Some(search) = &self.search else { return Ok(()) };
        if self.gate.is_some() {
            return Err(Error::invalid_config("`/gate`: expected none beside `search`, whose limits are `subject_to`"));
        }
        if self.pipelines.is_empty() {
            return Err(Error::invalid_config("`/search`: expected `pipelines` to search in, got none"));
        }
        search.check()
    }

    /// The pipelines to run, expanded and built, in written order.
    ///
    /// # Errors
    /// What [`pipelines::expand`] reports, with the number of the pipeline; [`ErrorKind::UnknownPlugin`]; and what [`Pipeline::build`] reports if
    /// none of the products of one pipeline is legal.
    fn planned(&self, registry: &Registry) -> Result<Vec<Planned>> {
        let build = |spec: PipelineSpec| {
            let built = Pipeline::build(&spec, registry);
            Planned { spec, built }
        };
        if self.pipelines.is_empty() {
            return Ok(pipelines::defaults(registry).into_iter().map(build).collect());
        }
        let mut all = Vec::new();
        for (idx, value) in self.pipelines.iter().enumerate() {
            let place = || format!("`/pipelines/{idx}`");
            let products: Vec<_> = pipelines::expand(value).context(place)?.into_iter().map(build).collect();
            let error = |planned: &Planned| planned.built.as_ref().err().map(Error::kind);
            let illegal = products.iter().all(|planned| error(planned) == Some(ErrorKind::InvalidConfig));
            for planned in products {
                match planned.built {
                    // An unknown plugin is a slip of the pen, whatever stands beside it.
                    Err(error) if illegal || error.kind() == ErrorKind::UnknownPlugin => {
                        return Err(error).context(place);
                    }
                    _ => all.push(planned),
                }
            }
        }
        Ok(all)
    }
}

/// A pipeline of a sweep, or why it was not built.
#[derive(Debug)]
struct Planned {
    spec: PipelineSpec,
    built: Result<Pipeline>,
}

/// All rows of a sweep and what is needed to run it again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sweep {
    /// Program, machine and threads.
    pub receipt: Receipt,
    /// The limits that rows are judged by.
    pub gate: Gate,
    /// Whether the limits were asked for, so that at least one row must hold them.
    pub gate_required: bool,
    /// The dumps by path and digest.
    pub dumps: Vec<DumpFacts>,
    /// Two per dump.
    pub canaries: Vec<Canary>,
    /// One row per dump and pipeline.
    pub rows: Vec<Row>,
    /// Pipelines that were left out because they do the same as another one.
    pub same: Vec<Same>,
    /// Promises of loaded plugins that the conformance kit refuted.
    pub refuted: Vec<Refuted>,
    /// What was looked for.
    pub search: Option<Search>,
    /// What a search found, one per pipeline of the config.
    pub found: Vec<Found>,
    /// What was read from a results store, and what was computed; none without a store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<Resumed>,
}

/// What a sweep took from a results store and gave to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// The store.
    pub store: String,
    /// Units that were evaluated.
    pub computed: usize,
    /// Units whose rows were read.
    pub read: usize,
    /// The share of the sweep, if it was cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<String>,
}

/// A pipeline that does the same as another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Same {
    /// The pipeline that was left out.
    pub name: String,
    /// The one that was run.
    pub same_as: String,
}

/// What a sweep says of a dump.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DumpFacts {
    /// As it was named.
    pub path: String,
    /// Which entries were read.
    #[serde(default)]
    pub selection: Selection,
    /// xxh3-128 over names, ranges, shapes and tensors.
    pub digest: String,
    /// Number of runs.
    pub runs: usize,
    /// Number of entries.
    pub entries: usize,
    /// Bytes of keys and values.
    pub original_bytes: u64,
    /// What was left out of the dump or remarked upon, by reason.
    pub findings: BTreeMap<Cow<'static, str>, usize>,
    /// Entropies of keys and values, means over all of them.
    pub entropy: Entropy,
    /// Order-0 floors by layer and role; none in results of versions that did not keep them.
    #[serde(default)]
    pub floors: Vec<LayerFloor>,
}

/// The order-0 floor of one layer and role, see [`crate::entropy`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerFloor {
    /// Layer of the model.
    pub layer: u32,
    /// Keys or values.
    pub role: Role,
    /// Bits per value.
    pub floor: f64,
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
    /// Removes the containers of earlier sweeps, if they may be replaced.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] with the first that may not.
    pub fn clear(&self) -> Result<()> {
        let listed = std::fs::read_dir(&self.folder).map_err(|error| Error::io(&self.folder, &error))?;
        let numbered = |path: &PathBuf| {
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            path.extension().is_some_and(|extension| extension == "gbx")
                && stem.len() >= 4
                && stem.bytes().all(|byte| byte.is_ascii_digit())
        };
        let mut held: Vec<_> = listed.filter_map(|entry| Some(entry.ok()?.path())).filter(numbered).collect();
        held.sort();
        for path in held {
            if !self.overwrite {
                let message = format!("`{}`: exists already; --overwrite replaces it", path.display());
                return Err(Error::invalid_input(message));
            }
            std::fs::remove_file(&path).map_err(|error| Error::io(&path, &error))?;
        }
        Ok(())
    }

    /// The container of a row.
    pub fn path(&self, row: usize) -> PathBuf {
        self.folder.join(format!("{row:04}.gbx"))
    }
}

/// A dump with what a sweep says of it.
#[derive(Debug)]
pub struct Opened {
    /// The dump.
    pub dump: Dump,
    /// Its path, digest and entropies.
    pub facts: DumpFacts,
}

impl Opened {
    /// Reads the whole dump once, for its digest and entropies.
    ///
    /// # Errors
    /// What reading the tensors reports.
    pub fn new(dump: Dump) -> Result<Self> {
        let entropies = Entropies::of(&dump)?;
        let floor = |mean: &Mean| Some(LayerFloor { layer: mean.layer?, role: mean.role?, floor: mean.entropy.floor });
        let facts = DumpFacts {
            path: dump.path.display().to_string(),
            selection: dump.selection.clone(),
            digest: dump.digest()?,
            runs: dump.runs.len(),
            entries: dump.entries(),
            original_bytes: dump.original_bytes(),
            findings: dump.findings.counts().into_iter().map(|(reason, count)| (reason.name().into(), count)).collect(),
            entropy: entropies.all,
            floors: entropies.layers.iter().filter_map(floor).collect(),
        };
        Ok(Self { dump, facts })
    }

    /// Channels per head of keys and values, each pair once.
    fn dims(&self) -> Vec<[usize; 2]> {
        let dims = self.dump.iter().map(|(_, _, entry)| Role::ALL.map(|role| entry.tensor(role).shape.dim));
        let mut dims: Vec<_> = dims.collect();
        dims.sort_unstable();
        dims.dedup();
        dims
    }
}

/// Queries per head that are replayed behind a lossless pipeline.
const EXACT_QUERIES: usize = 16;

/// A sweep whose settings are checked and whose pipelines are built.
#[derive(Debug)]
pub struct Plan<'a> {
    registry: &'a Registry,
    search: Option<Search>,
    /// What a search walks over.
    templates: Vec<Value>,
    /// What runs without one.
    planned: Vec<Planned>,
    gate: Gate,
    gate_required: bool,
    attention: Option<Attention>,
    /// For lossless pipelines, where a few queries show as much as all: that nothing changed.
    exact_attention: Option<Attention>,
    store: Option<&'a Store>,
    rerun: bool,
    shard: Option<Shard>,
}

impl<'a> Plan<'a> {
    /// Checks settings and builds pipelines; those of a search are built when it comes to them.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] with the JSON pointer; [`ErrorKind::UnknownPlugin`].
    pub fn new(config: &SweepConfig, registry: &'a Registry) -> Result<Self> {
        config.check()?;
        let search = config.search.clone();
        let gate = search.as_ref().map(|search| &search.subject_to).or(config.gate.as_ref()).cloned();
        let (gate_required, gate) = (gate.is_some(), gate.unwrap_or_default().with_default());
        let attention = config.attention.clone().map(Attention::new).transpose().context(|| "`/attention`".into())?;
        let few = |attention: &Attention| {
            let options = attention.options().clone();
            Attention::new(AttentionOptions {
                queries: Some(options.queries.unwrap_or(EXACT_QUERIES).min(EXACT_QUERIES)),
                ..options
            })
        };
        let exact_attention = attention.as_ref().map(few).transpose()?;
        let planned = if search.is_none() { config.planned(registry)? } else { Vec::new() };
        let templates = config.pipelines.clone();
        Ok(Self {
            registry,
            search,
            templates,
            planned,
            gate,
            gate_required,
            attention,
            exact_attention,
            store: None,
            rerun: false,
            shard: None,
        })
    }

    /// Stores each row as it is done, and reads those that are there instead of computing them; with `rerun`, computes and replaces them.
    #[must_use]
    pub fn stored_in(self, store: &'a Store, rerun: bool) -> Self {
        Self { store: Some(store), rerun, ..self }
    }

    /// Runs one share of the units. Whether anything holds the gate is for all shares together to say, so limits are not required to hold.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for a search, which cannot be shared: where it goes next depends on what it found.
    pub fn shared(self, shard: Shard) -> Result<Self> {
        if self.search.is_some() {
            return Err(Error::invalid_config("`/search`: expected none in a sweep that is cut into shards"));
        }
        Ok(Self { shard: Some(shard), gate_required: false, ..self })
    }

    /// Everything that the sweep evaluates, in the order of its rows; of a search nothing, as it finds its units while it runs.
    ///
    /// [`Evaluator::evaluate`] makes a record of each, in any process on any machine that has the dump and the plugins.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the library of a loaded plugin cannot be read any more.
    pub fn units(&self, dumps: &[Opened]) -> Result<Vec<Unit>> {
        Ok(self.work(dumps)?.0.into_iter().map(|work| work.unit).collect())
    }

    /// Every unit with its pipeline, and the pipelines that do the same as an earlier one.
    fn work<'p>(&'p self, dumps: &'p [Opened]) -> Result<(Vec<Work<'p>>, Vec<Same>)> {
        let dims = dims(dumps);
        let mut kept: Vec<(&Pipeline, Vec<PipelineSpec>)> = Vec::new();
        let mut same = Vec::new();
        let mut unbuilt = Vec::new();
        for Planned { spec, built } in &self.planned {
            let pipeline = match built {
                Ok(pipeline) => pipeline,
                Err(error) => {
                    unbuilt.push((spec, error));
                    continue;
                }
            };
            let effective = effective(pipeline, &dims);
            let name = |pipeline: &Pipeline| format!("{} {}", pipeline.name(), pipeline.spec().chunking);
            match kept.iter().find(|(_, held)| *held == effective) {
                Some((other, _)) => same.push(Same { name: name(pipeline), same_as: name(other) }),
                None => kept.push((pipeline, effective)),
            }
        }
        let mut all = Vec::new();
        for opened in dumps {
            all.extend(kept.iter().map(|(pipeline, _)| self.built(opened, pipeline)));
            for (spec, error) in &unbuilt {
                all.push(self.unbuilt(opened, spec, error)?);
            }
        }
        Ok((all, same))
    }

    fn built<'p>(&self, opened: &'p Opened, pipeline: &'p Pipeline) -> Work<'p> {
        let attention = if pipeline.is_lossless() { &self.exact_attention } else { &self.attention };
        Work { unit: Unit::of(opened, pipeline, attention.as_ref()), opened, built: Ok(pipeline) }
    }

    fn unbuilt<'p>(&self, opened: &'p Opened, spec: &PipelineSpec, error: &'p Error) -> Result<Work<'p>> {
        let unit = Unit::unbuilt(opened, spec, self.registry, self.attention.as_ref())?;
        Ok(Work { unit, opened, built: Err(error) })
    }

    /// Runs the sweep.
    ///
    /// # Errors
    /// Only what makes the whole sweep pointless; a pipeline that fails is a row that says so.
    pub fn run(self, dumps: Vec<Opened>, containers: &Containers) -> Result<Sweep> {
        let evaluator = Evaluator::new(self.registry)?;
        let mut runner = Runner::new(&self, &dumps, containers, evaluator);
        let mut canaries = Vec::new();
        for opened in &dumps {
            canaries.extend(runner.canaries(opened)?);
        }
        let (mut same, mut found) = (Vec::new(), Vec::new());
        match &self.search {
            Some(search) => {
                for (idx, value) in self.templates.iter().enumerate() {
                    found.push(runner.search(search, value, &dumps).context(|| format!("`/pipelines/{idx}`"))?);
                }
            }
            None => same = runner.all(&dumps)?,
        }
        let End { mut rows, refuted, receipt, resumed } = runner.end();
        pareto::mark(&mut rows);
        let dumps = dumps.into_iter().map(|opened| opened.facts).collect();
        let Self { search, gate, gate_required, .. } = self;
        Ok(Sweep { receipt, gate, gate_required, dumps, canaries, rows, same, refuted, search, found, resumed })
    }
}

/// A unit and what it is made of.
struct Work<'p> {
    unit: Unit,
    opened: &'p Opened,
    built: Result<&'p Pipeline, &'p Error>,
}

/// Channels per head of keys and values in any of the dumps.
fn dims(dumps: &[Opened]) -> Vec<[usize; 2]> {
    let mut dims: Vec<_> = dumps.iter().flat_map(Opened::dims).collect();
    dims.sort_unstable();
    dims.dedup();
    dims
}

/// What a pipeline does to tensors with so many channels; equal for pipelines that do the same.
fn effective(pipeline: &Pipeline, dims: &[[usize; 2]]) -> Vec<PipelineSpec> {
    dims.iter().map(|dims| pipeline.effective_spec(*dims)).collect()
}

impl Sweep {
    /// Whether the pipeline of a row holds the gate on every dump.
    fn holds_everywhere(&self, row: &Row) -> bool {
        let rows = self.rows.iter().filter(|other| other.pipeline == row.pipeline);
        let holding = rows.filter(|row| row.verdict.as_ref().is_some_and(Verdict::passed)).count();
        holding >= self.dumps.len()
    }

    /// Whether a row ended well, every other one was not legal to begin with, the canaries ended as they must, and what was asked for in
    /// the gate or the search was found.
    pub fn passed(&self) -> bool {
        // A share may be empty, or hold nothing but what is not legal.
        let is_share = self.resumed.as_ref().is_some_and(|resumed| resumed.shard.is_some());
        (is_share || self.rows.iter().any(Row::is_ok))
            && !self.rows.iter().any(|row| matches!(row.outcome, Outcome::Failed { .. }))
            && self.canaries.iter().all(|canary| canary.problem.is_none())
            && (!self.gate_required || self.rows.iter().any(|row| self.holds_everywhere(row)))
            && self.found.iter().all(|found| found.passed)
    }
}
