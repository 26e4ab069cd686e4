//! What pipelines promise, and what is left of it after the conformance kit has attacked the loaded plugins among them.

use std::borrow::Cow;
use std::fmt;

use gearbox_conformance::Outcome;
use gearbox_core::{AnyEntry, Pipeline, PluginSpec, Registry};
use serde::{Deserialize, Serialize};

/// A promise of a pipeline that holds for any input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Label {
    /// Every bit comes back.
    Lossless,
    /// Each transform keeps the bound on errors that it declares.
    Bounded,
    /// Equal input gives equal bytes.
    Deterministic,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lossless => "lossless",
            Self::Bounded => "bounded",
            Self::Deterministic => "deterministic",
        })
    }
}

/// A property that a loaded plugin does not have, and the labels that its pipelines lose.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refuted {
    /// Id and settings.
    pub plugin: PluginSpec,
    /// The property of the kit.
    pub property: Cow<'static, str>,
    /// The first counter-example, with shape, element type and seed.
    pub found: String,
    /// What is withheld; empty if the property belongs to no label.
    pub labels: Vec<Label>,
}

/// The labels that a property of the kit attacks.
fn attacked(property: &str) -> Vec<Label> {
    let exact = ["round_trip_", "empty_", "max_encoded_len_", "decode_fills_", "inverse_fills_", "artifacts_"];
    if exact.iter().any(|prefix| property.starts_with(prefix)) {
        return vec![Label::Lossless, Label::Bounded];
    }
    match property {
        "instances_agree" | "eight_threads_share_one_instance" => vec![Label::Deterministic],
        _ => Vec::new(),
    }
}

/// Gives labels. Plugins that come with the program are attacked by its own tests, loaded ones here: each with its settings, once.
pub(super) struct Labels<'a> {
    registry: &'a Registry,
    checked: Vec<(PluginSpec, Vec<Refuted>)>,
}

impl<'a> Labels<'a> {
    pub fn new(registry: &'a Registry) -> Self {
        Self { registry, checked: Vec::new() }
    }

    /// The labels of a pipeline that ran, and what was refuted of its plugins.
    pub fn of(&mut self, pipeline: &Pipeline) -> (Vec<Label>, Vec<Refuted>) {
        let mut labels = Vec::new();
        if pipeline.is_lossless() {
            labels.push(Label::Lossless);
        } else if pipeline.is_bounded() {
            labels.push(Label::Bounded);
        }
        if pipeline.is_deterministic() {
            labels.push(Label::Deterministic);
        }
        let mut all = Vec::new();
        for plugin in pipeline.spec().plugins() {
            let refuted = self.refuted_of(plugin);
            labels.retain(|label| !refuted.iter().any(|refuted| refuted.labels.contains(label)));
            all.extend(refuted.iter().filter(|refuted| !all.contains(*refuted)).cloned().collect::<Vec<_>>());
        }
        (labels, all)
    }

    fn refuted_of(&mut self, plugin: &PluginSpec) -> &[Refuted] {
        if let Some(idx) = self.checked.iter().position(|(held, _)| held == plugin) {
            return &self.checked[idx].1;
        }
        let refuted = match self.registry.get(&plugin.id) {
            Ok(entry) if entry.is_loaded() => refute(entry, plugin),
            _ => Vec::new(),
        };
        self.checked.push((plugin.clone(), refuted));
        self.checked.last().map_or(&[], |(_, refuted)| refuted)
    }
}

/// Runs the kit.
fn refute(entry: &AnyEntry, plugin: &PluginSpec) -> Vec<Refuted> {
    let outcomes = gearbox_conformance::run(entry, &plugin.settings_value());
    let refuted = |Outcome { property, failure, .. }| {
        Some(Refuted { plugin: plugin.clone(), property: property.into(), found: failure?, labels: attacked(property) })
    };
    outcomes.into_iter().filter_map(refuted).collect()
}
