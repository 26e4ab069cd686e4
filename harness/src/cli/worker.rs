//! `gearbox worker`: serves plugins to the process that started it.

use clap::Args;
use gearbox_abi::Source;
use gearbox_core::{Error, Registry, Result};

use crate::isolate::{self, Limits};
use crate::loading::LoadArgs;
use crate::status::Status;

/// Serves plugins over standard input and output.
#[derive(Debug, Args)]
pub(super) struct WorkerArgs {
    /// What the process may use, as JSON
    #[arg(long, value_name = "JSON", default_value = "{}")]
    limits: String,
    /// SHA-256 that the library must have, one per library in their order; `-` for any
    #[arg(long, value_name = "HEX")]
    sha256: Vec<String>,
}

impl WorkerArgs {
    pub(super) fn run(&self, load: &LoadArgs) -> Result<Status> {
        let limits = serde_json::from_str(&self.limits).map_err(|error| Error::invalid_config(error.to_string()))?;
        let limits: Limits = gearbox_core::config::from_value(&limits)?;
        isolate::serve(&limits, || self.load(load))?;
        Ok(Status::Pass)
    }

    /// The one place where a worker opens libraries; without any it serves the built-ins.
    fn load(&self, load: &LoadArgs) -> Result<Registry> {
        if load.plugins.is_empty() {
            return gearbox_plugins::registry();
        }
        let pins = self.sha256.iter().map(|pin| (pin != "-").then(|| pin.clone())).chain(std::iter::repeat(None));
        let sources = load.plugins.iter().zip(pins).map(|(path, sha256)| Source { path: path.clone(), sha256 });
        let mut registry = Registry::empty();
        for library in load.load(&sources.collect::<Vec<_>>())? {
            library.entries.iter().try_for_each(|entry| registry.insert(entry.clone()))?;
        }
        Ok(registry)
    }
}
