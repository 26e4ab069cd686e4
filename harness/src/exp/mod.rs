//! The reference's experiments, one to one: its flags, its files, its columns, our plugins.

use clap::Subcommand;
use gearbox_core::{Registry, Result};

use crate::status::Status;

/// One experiment.
#[derive(Debug, Subcommand)]
pub enum ExpCommand {}

impl ExpCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the experiment reports.
    pub fn run(self, _registry: &Registry, _json: bool) -> Result<Status> {
        match self {}
    }
}
