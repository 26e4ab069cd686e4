//! `gearbox plugin`.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use gearbox_abi::Source;
use gearbox_core::{AnyEntry, Error, Kind, Registry, Result};
use serde_json::{Value, json};

use crate::isolate::Limits;
use crate::loading::{LoadArgs, describe};
use crate::report::{self, Columns};
use crate::scaffold::{self, Language};
use crate::status::Status;

/// What can be combined.
#[derive(Debug, Subcommand)]
pub(super) enum PluginCommand {
    /// List all plugins
    List,
    /// Show a plugin's settings, their ranges and defaults, and where it comes from
    Show {
        /// Id or alias
        id: String,
    },
    /// Attack the plugins of a library with the conformance kit
    ///
    /// Prints each property with the number of cases and the first counter-example. Exit status 1 if there is one.
    Check {
        /// Library, or a folder of them
        library: PathBuf,
        /// Settings of the plugins as JSON
        #[arg(long, value_name = "JSON", default_value = "{}")]
        settings: String,
    },
    /// Write a project for a plugin that builds and passes `plugin check`
    New {
        /// Id of the plugin, in kebab-case
        name: String,
        /// What it is
        #[arg(long)]
        kind: NewKind,
        /// Language to write it in
        #[arg(long, default_value = "rust")]
        lang: Language,
        /// Folder to write it to [default: the name]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
}

/// Kinds of plugins, as flags name them.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum NewKind {
    Codec,
    Transform,
    Eviction,
}

impl PluginCommand {
    pub(super) fn run(self, load: &LoadArgs, json: bool) -> Result<Status> {
        match self {
            Self::List => list(&load.registry()?, json)?,
            Self::Show { id } => show(load.registry()?.get(&id)?, json)?,
            Self::Check { library, settings } => return check(library, &settings, load, json),
            Self::New { name, kind, lang, out } => new(&name, kind, lang, out, json)?,
        }
        Ok(Status::Pass)
    }
}

/// Runs the kit on every plugin of a library.
fn check(library: PathBuf, settings: &str, load: &LoadArgs, json: bool) -> Result<Status> {
    let settings: Value = serde_json::from_str(settings)
        .map_err(|error| Error::invalid_config(format!("--settings: not valid JSON: {error}")))?;
    let entries = load.entries(&[Source::from(library)], load.isolates(true), &Limits::default())?;
    let mut table = Columns::new(&["plugin", "property", ">cases", "result"]);
    let mut all = Vec::new();
    let mut status = Status::Pass;
    for entry in &entries {
        for outcome in gearbox_conformance::run(entry, &settings) {
            status = status.and(Status::pass_if(outcome.passed()));
            let result = outcome.failure.clone().unwrap_or_else(|| "ok".to_owned());
            all.push(json!({
                "plugin": entry.id(), "property": outcome.property, "cases": outcome.cases, "failure": outcome.failure,
            }));
            table.row([entry.id().to_owned(), outcome.property.to_owned(), outcome.cases.to_string(), result]);
        }
    }
    if json {
        report::print_json(&all)?;
    } else {
        report::print(&table.to_string())?;
    }
    Ok(status)
}

/// Writes a project and names its files.
fn new(name: &str, kind: NewKind, language: Language, out: Option<PathBuf>, json: bool) -> Result<()> {
    let kind = match kind {
        NewKind::Codec => Kind::Codec,
        NewKind::Transform => Kind::Transform,
        NewKind::Eviction => Kind::Eviction,
    };
    let folder = out.unwrap_or_else(|| PathBuf::from(name));
    let files = scaffold::create(&folder, name, kind, language)?;
    if json {
        return report::print_json(&json!({ "files": files }));
    }
    for file in files {
        report::print(&format!("Wrote {}", file.display()))?;
    }
    report::print(&format!("next: {}", folder.join("README.md").display()))
}

fn list(registry: &Registry, json: bool) -> Result<()> {
    if json {
        return report::print_json(&registry.entries().map(describe).collect::<Result<Vec<_>>>()?);
    }
    let mut table = Columns::new(&["id", "kind", ">format", "origin", "summary"]);
    for entry in registry.entries() {
        table.row([
            entry.id().to_owned(),
            entry.kind().to_string(),
            entry.format_version().to_string(),
            entry.origin().to_owned(),
            entry.summary().to_owned(),
        ]);
    }
    report::print(&table.to_string())
}

fn show(entry: &AnyEntry, json: bool) -> Result<()> {
    if json {
        return report::print_json(&describe(entry)?);
    }
    let aliases =
        if entry.aliases().is_empty() { String::new() } else { format!(" (also `{}`)", entry.aliases().join("`, `")) };
    report::print(&format!(
        "{}{aliases}: {}\n\nkind    {}\nformat  version {}\norigin  {}\nsource  {}\n",
        entry.id(),
        entry.summary(),
        entry.kind(),
        entry.format_version(),
        entry.origin(),
        entry.source()
    ))?;
    let defaults = entry.default_config()?;
    let properties = entry.schema()["properties"].as_object().cloned().unwrap_or_default();
    if properties.is_empty() {
        return report::print("It has no settings.");
    }
    let mut table = Columns::new(&["setting", "type", "default", "meaning"]);
    for (name, schema) in &properties {
        table.row([
            name.clone(),
            legal(entry.schema(), schema),
            defaults[name].to_string(),
            text(&schema["description"]),
        ]);
    }
    report::print(&table.to_string())
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Type and range, or the names that are legal.
fn legal(root: &Value, schema: &Value) -> String {
    let target = schema["$ref"].as_str().and_then(|target| root.pointer(target.trim_start_matches('#')));
    let schema = target.unwrap_or(schema);
    let names: Vec<String> = schema["oneOf"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|branch| branch["const"].to_string())
        .chain(schema["enum"].as_array().into_iter().flatten().map(ToString::to_string))
        .collect();
    if !names.is_empty() {
        return names.join(" | ");
    }
    match (schema.get("minimum"), schema.get("maximum")) {
        (Some(low), Some(high)) => format!("{} {low} to {high}", text(&schema["type"])),
        (Some(low), None) => format!("{} from {low}", text(&schema["type"])),
        _ => text(&schema["type"]),
    }
}
