//! The flags that choose entries of a dump, shared by all commands and experiments.

use std::path::Path;

use clap::Args;
use gearbox_core::{Error, Result, Stage};

use crate::dump::{Dump, Selection};
use crate::status::Status;

/// Which entries of a dump to read.
#[derive(Clone, Debug, Args)]
pub struct SelectArgs {
    /// Entries of one phase only
    #[arg(long, value_name = "STAGE", default_value = "both", value_parser = ["prefill", "decode", "both"])]
    pub stage: String,
    /// Leave out entries of fewer tokens; 0 keeps all
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub min_seq_len: usize,
    /// Leave out entries of more tokens; 0 keeps all
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub max_seq_len: usize,
    /// Read packed entries of the reference engine
    #[arg(long)]
    pub packed: bool,
    /// Exit with 0 although entries were bad and left out
    #[arg(long)]
    pub allow_bad: bool,
}

impl SelectArgs {
    /// The same as the dump reader takes it.
    pub fn selection(&self) -> Selection {
        let stage = match self.stage.as_str() {
            "prefill" => Some(Stage::Prefill),
            "decode" => Some(Stage::Decode),
            _ => None,
        };
        Selection { stage, min_seq: self.min_seq_len, max_seq: self.max_seq_len, packed: self.packed }
    }

    /// Opens a dump; bad entries are logged and, unless allowed, make the command end with [`Status::BadInput`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if no valid entry is left; else what opening reports.
    pub fn open(&self, path: &Path) -> Result<(Dump, Status)> {
        let dump = Dump::open(path, &self.selection())?;
        let status = self.judge(&dump)?;
        Ok((dump, status))
    }

    /// Logs the bad entries of a dump, and tells how a command that reads it ends.
    ///
    /// # Errors
    /// As [`SelectArgs::open`].
    pub fn judge(&self, dump: &Dump) -> Result<Status> {
        if !dump.findings.list.is_empty() {
            tracing::warn!("{}:\n{}", dump.path.display(), dump.findings);
        }
        if dump.entries() == 0 {
            return Err(Error::invalid_input(format!("`{}`: none of its entries is valid", dump.path.display())));
        }
        Ok(if dump.findings.is_clean() || self.allow_bad { Status::Pass } else { Status::BadInput })
    }
}
