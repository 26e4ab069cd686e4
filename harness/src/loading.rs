//! Plugins from libraries: where they are looked for, and whether they run in this process or in processes of their own.
//!
//! Libraries come from `--plugin`, from the paths in `GEARBOX_PLUGIN_PATH` and from the list `plugins` of a sweep, in this order; never from
//! the working directory by itself.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use gearbox_abi::{Host, Level, LoadError, Source};
use gearbox_core::{AnyEntry, Registry, Result, ResultExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::isolate::{Isolation, Limits, Spawn};

/// Paths of libraries and folders, separated as in `PATH`.
pub const SEARCH_PATH: &str = "GEARBOX_PLUGIN_PATH";

/// Which libraries to load, and how their plugins run.
#[derive(Clone, Debug, Default, Args)]
pub struct LoadArgs {
    /// Library with plugins, or a folder of them, beside those of `GEARBOX_PLUGIN_PATH`; may be repeated
    #[arg(long = "plugin", global = true, value_name = "LIB", help_heading = "Global")]
    pub plugins: Vec<PathBuf>,
    /// Run loaded plugins in processes of their own, as `sweep` and `plugin check` do
    #[arg(long, global = true, help_heading = "Global")]
    pub isolate: bool,
    /// Run loaded plugins in this process everywhere
    #[arg(long, global = true, help_heading = "Global", conflicts_with = "isolate")]
    pub no_isolate: bool,
    /// Also load libraries that every user of the machine can replace
    #[arg(long, global = true, help_heading = "Global")]
    pub allow_insecure_plugins: bool,
}

/// A library that a config names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LibraryFile {
    /// Where it is, relative to the config file.
    pub path: PathBuf,
    /// SHA-256 that it must have, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^[0-9a-fA-F]{64}$"))]
    pub sha256: Option<String>,
}

/// What there is to know of a plugin, its default settings and their schema included.
///
/// # Errors
/// What building the plugin with default settings reports.
pub fn describe(entry: &AnyEntry) -> Result<Value> {
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

impl LoadArgs {
    /// The libraries of the flags and of the environment.
    pub fn sources(&self) -> Vec<Source> {
        let environment = std::env::var_os(SEARCH_PATH).unwrap_or_default();
        let environment: Vec<_> =
            std::env::split_paths(&environment).filter(|path| !path.as_os_str().is_empty()).collect();
        self.plugins.iter().cloned().chain(environment).map(Source::from).collect()
    }

    /// Whether loaded plugins run in processes of their own.
    pub fn isolates(&self, by_default: bool) -> bool {
        self.isolate || by_default && !self.no_isolate
    }

    /// The built-ins and the plugins of the flags and of the environment.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn registry(&self) -> Result<Registry> {
        let mut registry = gearbox_plugins::registry()?;
        self.add(&mut registry, &self.sources(), self.isolates(false), &Limits::default())?;
        Ok(registry)
    }

    /// Adds the plugins of libraries to a registry.
    ///
    /// # Errors
    /// What loading reports, with the file; [`ErrorKind::DuplicatePlugin`](gearbox_core::ErrorKind::DuplicatePlugin) if an id is taken.
    pub fn add(&self, registry: &mut Registry, sources: &[Source], isolate: bool, limits: &Limits) -> Result<()> {
        for entry in self.entries(sources, isolate, limits)? {
            registry.insert(entry)?;
        }
        Ok(())
    }

    /// The plugins of libraries.
    ///
    /// # Errors
    /// What loading reports, with the file.
    pub fn entries(&self, sources: &[Source], isolate: bool, limits: &Limits) -> Result<Vec<AnyEntry>> {
        if !isolate {
            return Ok(self.load(sources)?.iter().flat_map(|library| library.entries.clone()).collect());
        }
        let mut entries = Vec::new();
        let mut seen = Vec::new();
        for Source { path, sha256 } in sources {
            let canonical = path.canonicalize().unwrap_or_else(|_| path.clone());
            if seen.contains(&canonical) {
                continue;
            }
            let mut spawn = Spawn::worker(std::slice::from_ref(&canonical))?;
            if let Some(sha256) = sha256 {
                spawn.arguments.extend(["--sha256".into(), sha256.into()]);
            }
            if self.allow_insecure_plugins {
                spawn.arguments.push("--allow-insecure-plugins".into());
            }
            let found = Isolation::new(spawn, limits.clone()).entries();
            entries.extend(found.context(|| format!("`{}`", path.display()))?);
            seen.push(canonical);
        }
        Ok(entries)
    }

    /// Opens libraries in this process.
    ///
    /// # Errors
    /// What the loader reports; the long story is logged at level `info`.
    pub fn load(&self, sources: &[Source]) -> Result<Vec<Arc<gearbox_abi::Library>>> {
        let log = |level: Level, text: &str| match level {
            Level::Error => tracing::error!("plugin: {text}"),
            Level::Warn => tracing::warn!("plugin: {text}"),
            _ => tracing::info!("plugin: {text}"),
        };
        let host = Host { log: Some(Arc::new(log)), allow_insecure: self.allow_insecure_plugins, ..Host::default() };
        gearbox_abi::load_all(sources, &host).map_err(|error: LoadError| {
            if let Some(details) = &error.details {
                tracing::info!("{details}");
            }
            error.into_error()
        })
    }
}
