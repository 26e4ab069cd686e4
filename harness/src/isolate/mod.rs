//! Loaded plugins in processes of their own, so that none can take the program with it.
//!
//! [`Isolation::entries`] lists the plugins of a worker, the program `gearbox worker`, as registry entries; [`Isolation::isolated`] moves an
//! entry that is known already. The objects they build forward every call. One worker serves one call at a time, so there are as many as
//! threads call at once; they are started when they are needed, kept, and replaced when they fail. Tensors and stored bytes travel
//! through memory that both processes map, everything else as messages over pipes.
//!
//! A call that fails says how by the kind of its error, see [`ErrorKind::state`](gearbox_core::ErrorKind::state): the plugin's own error is
//! handed on as it is, and a plugin that panics, crashes, hangs, asks for too much memory or writes too much ends in a state of its own.
//! The next call finds a fresh worker. What the plugin printed to standard error in that call is part of the message.
//!
//! What crosses is what the traits of `core` say: contexts with token ids, decoded keys and history (all of it, in each call), trained
//! artifacts, sessions of eviction policies. A session has its worker to itself; when that fails, the session is lost.

mod host;
mod proxy;
mod shared;
#[cfg(test)]
mod tests;
mod wire;
mod worker;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gearbox_core::{AnyEntry, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::proxy::Isolation;
pub use self::worker::serve;

/// What one worker may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Seconds that a call may take on the clock; training counts from sample to sample. Then the worker is killed.
    #[schemars(range(max = 86400.0), extend("exclusiveMinimum" = 0))]
    pub wall_seconds: f64,
    /// Seconds of processor time that a call may take, or all calls of an eviction session. Counted per worker, which is replaced once it has
    /// used as much: a call may get up to twice that.
    #[schemars(range(min = 1, max = 86400))]
    pub cpu_seconds: u32,
    /// Bytes of address space: program, libraries, buffers, and whatever a plugin allocates.
    #[schemars(range(min = 268_435_456, max = 1_125_899_906_842_624_u64))]
    pub address_space_bytes: u64,
    /// Bytes that a call may give back: an encoded lane, the lanes of a chunk, a decoded tensor, an artifact.
    #[schemars(range(min = 1, max = 1_099_511_627_776_u64))]
    pub output_bytes: u64,
}

impl Default for Limits {
    /// Ten minutes of either time, 16 GiB of address space, and 4 GiB of output: what a reader of containers accepts of one lane.
    fn default() -> Self {
        Self { wall_seconds: 600.0, cpu_seconds: 600, address_space_bytes: 16 << 30, output_bytes: 4 << 30 }
    }
}

impl Limits {
    /// The time of a call; the schema keeps it in range, and what is not becomes the nearest that is.
    fn wall(&self) -> Duration {
        Duration::try_from_secs_f64(self.wall_seconds).unwrap_or(Duration::from_hours(24))
    }
}

/// How a worker is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spawn {
    /// The program: `gearbox`, or another one that ends up in [`serve`].
    pub program: PathBuf,
    /// Its arguments, before `--limits` and the limits as JSON.
    pub arguments: Vec<OsString>,
}

impl Spawn {
    /// `gearbox worker`, which must be the running program, with these libraries; without any it serves the built-ins.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if the system does not tell the path of the running program.
    pub fn worker(plugins: &[PathBuf]) -> Result<Self> {
        let program = std::env::current_exe().map_err(|error| Error::io("the running program", &error))?;
        Ok(Self::program(program, plugins))
    }

    /// The same with another program that has the command line of `gearbox`.
    pub fn program(program: impl AsRef<Path>, plugins: &[PathBuf]) -> Self {
        let mut arguments = vec![OsString::from("worker")];
        for plugin in plugins {
            arguments.extend(["--plugin".into(), plugin.into()]);
        }
        Self { program: program.as_ref().to_path_buf(), arguments }
    }
}

/// An entry whose objects forward every call to workers, which must know a plugin with its id.
///
/// Entries of one library share their workers if they come from one [`Isolation`].
pub fn isolated(entry: &AnyEntry, how: Spawn, limits: Limits) -> AnyEntry {
    Isolation::new(how, limits).isolated(entry)
}
