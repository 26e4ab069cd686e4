//! Sweeps: their units, what evaluates them in any process, and the result of all of them.
//!
//! Units and records cross as JSON text, because that is also how they travel between machines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use gearbox::dump::{Dump, Selection};
use gearbox::results::Store;
use gearbox::sweep::{
    Containers, Evaluator as RustEvaluator, Opened, Plan as RustPlan, Record, Resumed, Shard, SweepConfig, Unit,
};
use gearbox::{pipelines, sample};
use gearbox_abi::Source;
use gearbox_core::{Error, Registry, Result, ResultExt, config};
use pyo3::prelude::*;

use crate::error::raise;
use crate::json::{text, to_python};
use crate::registry::{load, registry};

/// Opens a dump and reads it once, for its digest and entropies.
fn open(path: &Path, selection: &Selection) -> Result<Opened> {
    let dump = Dump::open(path, selection)?;
    if !dump.findings.list.is_empty() {
        tracing::warn!("{}:\n{}", path.display(), dump.findings);
    }
    if dump.entries() == 0 {
        return Err(Error::invalid_input(format!("`{}`: none of its entries is valid", path.display())));
    }
    Opened::new(dump)
}

fn parsed<T: serde::de::DeserializeOwned>(what: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::invalid_input(format!("{what}: {error}")))
}

fn written(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::invalid_input(error.to_string()))
}

fn scratch() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(|error| Error::io(std::env::temp_dir(), &error))
}

/// A sweep over dumps: the units it consists of, and its result once a store holds them.
///
/// `config` is None, a dict, JSON text or the path of a file; `dumps` are paths, by default those of the config, else the sample of a
/// checkout; `pipelines` are added to those of the config, each JSON text, a path or the id of a codec.
#[pyclass(frozen, module = "gearbox._gearbox")]
pub(crate) struct Plan {
    registry: Arc<Registry>,
    config: SweepConfig,
    paths: Vec<PathBuf>,
    dumps: Vec<Opened>,
}

impl Plan {
    fn make(config: Option<&str>, dumps: Vec<PathBuf>, texts: &[String]) -> Result<Self> {
        let mut config = match config {
            None => SweepConfig::default(),
            Some(text) if text.trim_start().starts_with('{') => {
                config::from_value(&parsed("config", text)?).context(|| "config".to_owned())?
            }
            Some(path) => SweepConfig::read(Path::new(path))?,
        };
        let libraries = config.plugins.iter();
        let libraries = libraries.map(|file| Source { path: file.path.clone(), sha256: file.sha256.clone() });
        load(&libraries.collect::<Vec<_>>(), false)?;
        let registry = registry()?;
        for text in texts {
            config.pipelines.push(pipelines::read(text, &registry)?);
        }
        RustPlan::new(&config, &registry)?;
        let mut paths = if dumps.is_empty() { config.dumps.clone() } else { dumps };
        if paths.is_empty() {
            paths.push(sample::find()?);
        }
        let dumps = paths.iter().map(|path| open(path, &Selection::default())).collect::<Result<_>>()?;
        Ok(Self { registry, config, paths, dumps })
    }

    fn units_left(&self, store: Option<&Path>, shard: Option<Shard>) -> Result<Vec<(String, String)>> {
        let mut units = RustPlan::new(&self.config, &self.registry)?.units(&self.dumps)?;
        if let Some(shard) = shard {
            let mut members = shard.members(&units).into_iter();
            units.retain(|_| members.next().unwrap_or(false));
        }
        let store = store.map(Store::open).transpose()?;
        let mut left = Vec::new();
        for unit in units {
            let key = unit.key();
            let held = store.as_ref().map(|store| store.get(&key)).transpose()?.flatten();
            if held.is_none_or(|record| record.row.outcome.is_transient()) {
                left.push((key, written(&unit)?));
            }
        }
        Ok(left)
    }

    fn add(&self, store: &Path, records: &[String], replace: bool) -> Result<usize> {
        let store = Store::open(store)?;
        for opened in &self.dumps {
            store.add_dump(&opened.facts)?;
        }
        let mut added = 0;
        for text in records {
            let record: Record = parsed("record", text)?;
            if replace {
                store.replace(&record)?;
            }
            added += usize::from(replace || store.insert(&record)?);
        }
        Ok(added)
    }
}

fn shard_of(text: Option<&str>) -> PyResult<Option<Shard>> {
    text.map(str::parse).transpose().map_err(raise)
}

#[pymethods]
impl Plan {
    #[new]
    fn new(
        py: Python<'_>,
        config: Option<&Bound<'_, PyAny>>,
        dumps: Vec<PathBuf>,
        pipelines: Vec<String>,
    ) -> PyResult<Self> {
        let path = |config: &Bound<'_, PyAny>| Ok(config.extract::<PathBuf>()?.display().to_string());
        let config =
            config.map(|config| config.extract::<String>().or_else(|_| path(config)).or_else(|_: PyErr| text(config)));
        let config = config.transpose()?;
        py.detach(|| Self::make(config.as_deref(), dumps, &pipelines)).map_err(raise)
    }

    /// What the sweep says of its dumps: dicts with `path`, `digest`, `entries`, `original_bytes`, `entropy` and more.
    #[getter]
    fn dumps<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.dumps.iter().map(|opened| &opened.facts).collect::<Vec<_>>())
    }

    /// The libraries that the config names, as pairs of path and SHA-256; they are loaded.
    #[getter]
    fn libraries(&self) -> Vec<(PathBuf, Option<String>)> {
        self.config.plugins.iter().map(|file| (file.path.clone(), file.sha256.clone())).collect()
    }

    /// The units to evaluate, as pairs of key and JSON text: all, or those that a store does not hold, or the share `I/N` of them.
    #[pyo3(signature = (results=None, shard=None))]
    fn units(&self, py: Python<'_>, results: Option<PathBuf>, shard: Option<&str>) -> PyResult<Vec<(String, String)>> {
        let shard = shard_of(shard)?;
        py.detach(|| self.units_left(results.as_deref(), shard)).map_err(raise)
    }

    /// Add records to a store, and return how many were not there; with `replace`, put them in place of what is there.
    #[pyo3(signature = (results, records, replace=false))]
    fn insert(&self, py: Python<'_>, results: PathBuf, records: Vec<String>, replace: bool) -> PyResult<usize> {
        py.detach(|| self.add(&results, &records, replace)).map_err(raise)
    }

    /// The whole sweep as `(dict, table, passed)`; what the store holds is read, what it lacks is evaluated here.
    ///
    /// `computed` units of the store were evaluated for this sweep; without it, the store is a passing one that nobody is told of.
    #[pyo3(signature = (results, shard=None, computed=None))]
    fn run<'py>(
        &self,
        py: Python<'py>,
        results: PathBuf,
        shard: Option<&str>,
        computed: Option<usize>,
    ) -> PyResult<(Bound<'py, PyAny>, String, bool)> {
        let shard = shard_of(shard)?;
        let work = || {
            let store = Store::open(&results)?;
            let mut plan = RustPlan::new(&self.config, &self.registry)?;
            if let Some(shard) = shard {
                plan = plan.shared(shard)?;
            }
            let folder = scratch()?;
            let containers = Containers { folder: folder.path().to_owned(), keep: false, overwrite: true };
            let dumps = self.dumps.iter().zip(&self.paths).map(|(opened, path)| {
                // What was read for the digest is not read again.
                Ok(Opened { dump: Dump::open(path, &Selection::default())?, facts: opened.facts.clone() })
            });
            plan.stored_in(&store, false).run(dumps.collect::<Result<_>>()?, &containers)
        };
        let mut sweep = py.detach(work).map_err(raise)?;
        sweep.resumed = sweep.resumed.zip(computed).map(|(resumed, computed)| Resumed {
            computed: resumed.computed + computed,
            read: resumed.read.saturating_sub(computed),
            ..resumed
        });
        Ok((to_python(py, &sweep)?, sweep.summary(), sweep.passed()))
    }
}

/// Evaluates units, in any process that has their dumps and plugins. Dumps are opened once, by the path that the unit names.
///
/// `dumps` says where dumps lie that have another path here.
#[pyclass(frozen, module = "gearbox._gearbox")]
pub(crate) struct Evaluator {
    registry: Arc<Registry>,
    places: BTreeMap<String, PathBuf>,
    dumps: Mutex<BTreeMap<(String, String), Arc<Opened>>>,
}

impl Evaluator {
    fn opened(&self, unit: &Unit) -> Result<Arc<Opened>> {
        let key = (unit.dump.clone(), written(&unit.selection)?);
        let mut dumps = self.dumps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opened) = dumps.get(&key) {
            return Ok(Arc::clone(opened));
        }
        let path = self.places.get(&unit.dump).cloned().unwrap_or_else(|| unit.dump.clone().into());
        let opened = Arc::new(open(&path, &unit.selection)?);
        dumps.insert(key, Arc::clone(&opened));
        Ok(opened)
    }
}

#[pymethods]
impl Evaluator {
    #[new]
    #[pyo3(signature = (dumps=None))]
    fn new(dumps: Option<BTreeMap<String, PathBuf>>) -> PyResult<Self> {
        let registry = registry().map_err(raise)?;
        Ok(Self { registry, places: dumps.unwrap_or_default(), dumps: Mutex::default() })
    }

    /// Evaluate units, and return a record for each, as JSON text. A pipeline that fails is a record that says so; another dump,
    /// plugin or version than the unit names raises `GearboxError` with kind `mismatch`.
    fn evaluate(&self, py: Python<'_>, units: Vec<String>) -> PyResult<Vec<String>> {
        let work = || {
            let folder = scratch()?;
            let mut evaluator = RustEvaluator::new(&self.registry)?;
            let evaluate = |text: &String| {
                let unit: Unit = parsed("unit", text)?;
                written(&evaluator.evaluate(&unit, &*self.opened(&unit)?, folder.path())?)
            };
            units.iter().map(evaluate).collect::<Result<_>>()
        };
        py.detach(work).map_err(raise)
    }
}
