//! The unit of a sweep, one pipeline over one dump, as a value that can be sent elsewhere; and its evaluation, a pure function but for times.

use std::path::Path;

use gearbox_core::{AnyEntry, Error, Pipeline, PipelineSpec, PluginUse, Registry, Result, ResultExt};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::labels::Labels;
use super::{Opened, Outcome, Refuted, Row};
use crate::atomic::AtomicFile;
use crate::dump::Selection;
use crate::metrics::attention::{Attention, AttentionOptions};
use crate::receipt::Receipt;
use crate::{digest, metrics, report};

/// What evaluates to one row: everything that its numbers depend on, and what it is called.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Unit {
    /// The pipeline in a few words; changes no number.
    pub name: String,
    /// The dump, as it was named; changes no number.
    pub dump: String,
    /// Which of its entries are read; what they hold is in the digest.
    pub selection: Selection,
    /// Digest of what is read, see [`Dump::digest`](crate::dump::Dump::digest).
    pub digest: String,
    /// The resolved pipeline; one that cannot be built as it was written.
    pub pipeline: PipelineSpec,
    /// The plugins that it names, with format versions and library digests, sorted by id.
    pub plugins: Vec<PluginUse>,
    /// How attention is replayed; none for not at all.
    pub attention: Option<AttentionOptions>,
    /// Version of the program, which stands in the header of every container and is counted there.
    pub version: String,
    /// [`metrics::VERSION`].
    pub metrics: u32,
}

impl Unit {
    /// The unit of a pipeline that was built.
    pub(super) fn of(opened: &Opened, pipeline: &Pipeline, attention: Option<&Attention>) -> Self {
        Self::new(opened, pipeline.name().to_owned(), pipeline.spec(), pipeline.plugins().to_vec(), attention)
    }

    /// The unit of a pipeline that cannot be built.
    pub(super) fn unbuilt(
        opened: &Opened,
        spec: &PipelineSpec,
        registry: &Registry,
        attention: Option<&Attention>,
    ) -> Result<Self> {
        let name = spec.name.clone().unwrap_or_else(|| json!(spec.routes).to_string());
        Ok(Self::new(opened, name, spec, uses(spec, registry)?, attention))
    }

    fn new(
        opened: &Opened,
        name: String,
        spec: &PipelineSpec,
        plugins: Vec<PluginUse>,
        attention: Option<&Attention>,
    ) -> Self {
        Self {
            name,
            dump: opened.facts.path.clone(),
            selection: opened.facts.selection.clone(),
            digest: opened.facts.digest.clone(),
            pipeline: spec.clone(),
            plugins,
            attention: attention.map(|attention| attention.options().clone()),
            version: env!("CARGO_PKG_VERSION").into(),
            metrics: metrics::VERSION,
        }
    }

    /// What the row of this unit is stored under: a digest of everything that its numbers depend on.
    pub fn key(&self) -> String {
        let Self { name: _, dump: _, selection: _, digest, pipeline, plugins, attention, version, metrics } = self;
        digest::of(&json!({
            "dump": digest, "pipeline": pipeline, "plugins": plugins, "attention": attention, "version": version, "metrics": metrics,
        }))
    }
}

/// The plugins that a spec names, as far as they exist, sorted by id.
fn uses(spec: &PipelineSpec, registry: &Registry) -> Result<Vec<PluginUse>> {
    let entries = spec.plugins().filter_map(|plugin| registry.get(&plugin.id).ok());
    let mut uses = entries.map(AnyEntry::as_use).collect::<Result<Vec<_>>>()?;
    uses.sort();
    uses.dedup();
    Ok(uses)
}

/// A unit and what it evaluated to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// What was evaluated.
    pub unit: Unit,
    /// The result. Verdict and Pareto front belong to a sweep and are not filled in.
    pub row: Row,
    /// Promises of its loaded plugins that the conformance kit refuted.
    pub refuted: Vec<Refuted>,
    /// Program, machine and threads.
    pub receipt: Receipt,
}

/// Keys of a row that times, names, the sweep or the machine decide.
const NOT_FACTS: [&str; 7] = ["name", "dump", "container", "verdict", "pareto", "encode_ns", "decode_ns"];

impl Record {
    /// What an evaluation of the same unit must give again: everything but times, and messages of failures, which name files and processes.
    pub fn facts(&self) -> Value {
        let mut facts =
            serde_json::to_value(&self.row).unwrap_or_else(|error| unreachable!("string keys only: {error}"));
        if let Value::Object(map) = &mut facts {
            map.retain(|key, _| !NOT_FACTS.contains(&key.as_str()));
            if matches!(self.row.outcome, Outcome::Failed { .. }) {
                map.remove("reason");
            }
            for sequence in map.get_mut("sequences").and_then(Value::as_array_mut).into_iter().flatten() {
                sequence.as_object_mut().and_then(|sequence| sequence.remove("ns"));
            }
        }
        facts
    }

    /// The digest of [`Record::facts`].
    pub fn digest(&self) -> String {
        digest::of(&self.facts())
    }
}

/// Evaluates units one after the other. Loaded plugins are attacked by the conformance kit once, whatever number of units uses them.
pub struct Evaluator<'a> {
    registry: &'a Registry,
    labels: Labels<'a>,
    receipt: Receipt,
}

impl<'a> Evaluator<'a> {
    /// An evaluator with these plugins.
    ///
    /// # Errors
    /// As [`Receipt::new`].
    pub fn new(registry: &'a Registry) -> Result<Self> {
        Ok(Self { registry, labels: Labels::new(registry), receipt: Receipt::new(registry)? })
    }

    /// The receipt of its records.
    pub fn receipt(&self) -> &Receipt {
        &self.receipt
    }

    /// Evaluates a unit that was enumerated here or elsewhere: encodes into a file of a folder, decodes, compares, and removes the file.
    ///
    /// A pipeline that fails gives a row that says so.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`](gearbox_core::ErrorKind::Mismatch) if the dump, a plugin or its library, or the program is not the one of the
    /// unit; [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if the folder takes no file.
    pub fn evaluate(&mut self, unit: &Unit, opened: &Opened, scratch: &Path) -> Result<Record> {
        let differences = self.differences(unit, opened);
        if !differences.is_empty() {
            return Err(Error::mismatch(differences.join("; ")).context(format!("unit {}", unit.key())));
        }
        self.evaluate_anyway(unit, opened, scratch)
    }

    /// Evaluates a unit although what it names may be other things here.
    pub(crate) fn evaluate_anyway(&mut self, unit: &Unit, opened: &Opened, scratch: &Path) -> Result<Record> {
        let built = Pipeline::build(&unit.pipeline, self.registry);
        // A folder of its own: others may evaluate the same unit there.
        let folder = tempfile::tempdir_in(scratch).map_err(|error| Error::io(scratch, &error))?;
        self.run(unit, opened, built.as_ref(), || AtomicFile::create(folder.path().join("unit.gbx"), false))
    }

    /// What is not as the unit says: dump, plugins, versions. Each names what was expected and what is here.
    pub(crate) fn differences(&self, unit: &Unit, opened: &Opened) -> Vec<String> {
        let mut found = Vec::new();
        let mut differ = |what: &str, expected: &str, got: &str| {
            if expected != got {
                found.push(format!("{what}: expected {expected}, got {got}"));
            }
        };
        let dump = format!("digest of the dump `{}`", opened.facts.path);
        differ(&dump, &unit.digest, &opened.facts.digest);
        differ("version of the program", &unit.version, env!("CARGO_PKG_VERSION"));
        differ("version of the metrics", &unit.metrics.to_string(), &metrics::VERSION.to_string());
        for plugin in &unit.plugins {
            let here = self.receipt.plugins.iter().find(|here| here.id == plugin.id);
            let here = here.map_or_else(|| "none".to_owned(), describe);
            differ(&format!("plugin `{}`", plugin.id), &describe(plugin), &here);
        }
        found
    }

    /// Evaluates a unit whose pipeline was built, or was not.
    pub(super) fn run(
        &mut self,
        unit: &Unit,
        opened: &Opened,
        built: Result<&Pipeline, &Error>,
        out: impl FnOnce() -> Result<AtomicFile>,
    ) -> Result<Record> {
        let Opened { dump, facts } = opened;
        let mut record = Record {
            unit: unit.clone(),
            row: Row::new(dump, unit),
            refuted: Vec::new(),
            receipt: self.receipt.clone(),
        };
        let row = &mut record.row;
        let pipeline = match built {
            Ok(pipeline) => pipeline,
            Err(error) => {
                row.outcome = Outcome::of_unbuilt(error);
                return Ok(record);
            }
        };
        let attention = unit.attention.clone().map(Attention::new).transpose().context(|| "`/attention`".into())?;
        let bar = report::progress(2 * row.original_bytes, format!("{} {}", row.name, row.chunking));
        // Each dump trains its own models.
        let outcome = row.fill(dump, &mut pipeline.clone(), self.registry, out()?, attention.as_ref(), &bar);
        bar.finish_and_clear();
        row.outcome = outcome.unwrap_or_else(|error| Outcome::failed(&error));
        row.floor = Some(facts.entropy.floor);
        row.gap = row.bits_per_value.map(|bits| bits - facts.entropy.floor);
        if row.is_ok() {
            (row.labels, record.refuted) = self.labels.of(pipeline);
        }
        Ok(record)
    }
}

fn describe(plugin: &PluginUse) -> String {
    let library = plugin.library.as_ref().map_or_else(String::new, |library| format!(" in {library}"));
    format!("format {}{library}", plugin.format_version)
}

#[cfg(test)]
pub(super) mod tests {
    use gearbox_core::{Chunking, LibraryUse, PluginSpec};

    use super::*;

    /// A unit of `zstd`.
    pub(in super::super) fn unit(name: &str, digest: &str) -> Unit {
        Unit {
            name: name.into(),
            dump: "dump".into(),
            selection: Selection::default(),
            digest: digest.into(),
            pipeline: PipelineSpec::of_codec(PluginSpec::new("zstd"), Chunking::Aggregate),
            plugins: vec![PluginUse { id: "zstd".into(), format_version: 1, library: None }],
            attention: Some(AttentionOptions::default()),
            version: "0.1.0".into(),
            metrics: 1,
        }
    }

    #[test]
    fn key_holds_what_changes_numbers_and_nothing_else() {
        let first = unit("a", "00");
        let changed = |change: fn(&mut Unit)| {
            let mut unit = first.clone();
            change(&mut unit);
            unit.key()
        };
        assert_eq!(changed(|unit| unit.name = "b".into()), first.key());
        assert_eq!(changed(|unit| unit.dump = "elsewhere".into()), first.key());
        assert_eq!(changed(|unit| unit.selection.min_seq = 1), first.key(), "the digest covers what is read");
        let library = || Some(LibraryUse { file: "a.so".into(), sha256: "0".repeat(64) });
        let mut keys = vec![
            first.key(),
            changed(|unit| unit.digest = "01".into()),
            changed(|unit| unit.pipeline.chunking = Chunking::PerEntry),
            changed(|unit| unit.pipeline.name = Some("written into the header".into())),
            changed(|unit| unit.plugins[0].format_version = 2),
            changed(|unit| unit.attention = None),
            changed(|unit| unit.attention = Some(AttentionOptions { queries: Some(1), top: 8 })),
            changed(|unit| unit.version = "0.2.0".into()),
            changed(|unit| unit.metrics = 2),
        ];
        let mut loaded = first.clone();
        loaded.plugins[0].library = library();
        keys.push(loaded.key());
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
        assert!(keys.iter().all(|key| key.len() == 32));
    }

    #[test]
    fn unit_is_sent_as_json() {
        let unit = unit("a", "00");
        let text = serde_json::to_string(&unit).unwrap();
        let read: Unit = serde_json::from_str(&text).unwrap();
        assert_eq!((&read, read.key()), (&unit, unit.key()));
    }
}
