//! The input flags that the reference's experiments share.

use std::path::PathBuf;

use clap::Args;
use gearbox_core::{Error, Result, Stage};

use crate::dump::{Dump, Selection};
use crate::status::Status;

/// Which dump to read, and which of its entries.
#[derive(Clone, Debug, Args)]
pub struct InputArgs {
    /// Dump: a run folder, a folder of runs, or safetensors
    #[arg(long, value_name = "PATH")]
    pub dump_dir: PathBuf,
    /// Entries of one phase only
    #[arg(long, value_name = "STAGE", default_value = "both", value_parser = ["prefill", "decode", "both"])]
    pub stage: String,
    /// Leave out entries of fewer tokens; 0 keeps all
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub min_seq_len: usize,
    /// Leave out entries of more tokens; 0 keeps all
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub max_seq_len: usize,
    /// Exit with 0 although entries were bad and left out
    #[arg(long)]
    pub allow_bad: bool,
}

impl InputArgs {
    /// Opens the dump; bad entries are logged and, unless allowed, make the command end with [`Status::BadInput`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if no entry is left; else what opening reports.
    pub fn open(&self) -> Result<(Dump, Status)> {
        let stage = match self.stage.as_str() {
            "prefill" => Some(Stage::Prefill),
            "decode" => Some(Stage::Decode),
            _ => None,
        };
        let selection = Selection { stage, min_seq: self.min_seq_len, max_seq: self.max_seq_len, packed: false };
        let dump = Dump::open(&self.dump_dir, &selection)?;
        let place = self.dump_dir.display();
        if !dump.findings.list.is_empty() {
            tracing::warn!("{place}:\n{}", dump.findings);
        }
        if dump.entries() == 0 {
            return Err(Error::invalid_input(format!("`{place}`: expected at least one valid entry, got none")));
        }
        let status = if dump.findings.is_clean() || self.allow_bad { Status::Pass } else { Status::BadInput };
        Ok((dump, status))
    }
}
