//! `gearbox plugin`.

use clap::Subcommand;
use gearbox_core::{AnyEntry, Registry, Result};
use serde_json::{Value, json};

use crate::report::{self, Columns};
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
}

impl PluginCommand {
    pub(super) fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        match self {
            Self::List => list(registry, json)?,
            Self::Show { id } => show(registry.get(&id)?, json)?,
        }
        Ok(Status::Pass)
    }
}

fn facts(entry: &AnyEntry) -> Result<Value> {
    Ok(json!({
        "id": entry.id(),
        "kind": entry.kind(),
        "aliases": entry.aliases(),
        "summary": entry.summary(),
        "source": entry.source(),
        "format_version": entry.format_version(),
        "origin": entry.origin(),
        "defaults": entry.default_config()?,
        "schema": entry.schema(),
    }))
}

fn list(registry: &Registry, json: bool) -> Result<()> {
    if json {
        return report::print_json(&registry.entries().map(facts).collect::<Result<Vec<_>>>()?);
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
        return report::print_json(&facts(entry)?);
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
