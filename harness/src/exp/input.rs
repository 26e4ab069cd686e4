//! The input flags that the reference's experiments share.

use std::path::PathBuf;

use clap::Args;
use gearbox_core::Result;

use crate::dump::Dump;
use crate::select::SelectArgs;
use crate::status::Status;

/// Which dump to read, and which of its entries.
#[derive(Clone, Debug, Args)]
pub struct InputArgs {
    /// Dump: a run folder, a folder of runs, or safetensors
    #[arg(long, value_name = "PATH")]
    pub dump_dir: PathBuf,
    /// Which of its entries
    #[command(flatten)]
    pub select: SelectArgs,
}

impl InputArgs {
    /// Opens the dump, see [`SelectArgs::open`].
    ///
    /// # Errors
    /// As [`SelectArgs::open`].
    pub fn open(&self) -> Result<(Dump, Status)> {
        self.select.open(&self.dump_dir)
    }
}
