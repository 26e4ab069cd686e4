//! `gearbox doctor`.

use std::fmt::Write as _;

use clap::Args;
use gearbox_core::{AnyEntry, Result};
use serde::Serialize;

use crate::isolate::Limits;
use crate::loading::{LoadArgs, SEARCH_PATH};
use crate::receipt::Receipt;
use crate::status::Status;
use crate::{bench, report, sample};

/// Shows what this program finds on this machine: version, processor, bundled data and libraries with plugins.
///
/// Each library of `--plugin` and of the search path is opened in a process of its own, so that one that cannot be loaded is a line here and
/// stops nothing. Exit status 1 if anything is missing or cannot be loaded.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox doctor
  gearbox doctor --plugin target/release/libmine.so
  gearbox doctor --json                          for a bug report")]
pub(super) struct DoctorArgs {}

/// What was found.
#[derive(Debug, Serialize)]
struct Findings {
    receipt: Receipt,
    operating_system: String,
    /// Bytes of memory that are free, where the system says so.
    available_memory: Option<u64>,
    checks: Vec<Check>,
}

/// Something that is needed, and whether it is there.
#[derive(Debug, Serialize)]
struct Check {
    what: String,
    ok: bool,
    found: String,
}

impl Check {
    fn new(what: impl Into<String>, found: Result<String>) -> Self {
        let ok = found.is_ok();
        Self { what: what.into(), ok, found: found.unwrap_or_else(|error| error.to_string()) }
    }
}

/// Looks around and prints what is there.
pub(super) fn run(load: &LoadArgs, json: bool) -> Result<Status> {
    let registry = gearbox_plugins::registry()?;
    let mut checks = vec![
        Check::new("bundled sample", sample::find().map(|path| path.display().to_string())),
        Check::new("bundled model", gearbox_model::bundled().map(|path| path.display().to_string())),
        Check::new("temporary files", temporary()),
    ];
    for source in load.sources() {
        let loaded = load.entries(std::slice::from_ref(&source), true, &Limits::default());
        let ids = loaded.map(|entries| entries.iter().map(AnyEntry::id).collect::<Vec<_>>().join(", "));
        checks.push(Check::new(format!("library `{}`", source.path.display()), ids));
    }
    let findings = Findings {
        receipt: Receipt::new(&registry)?,
        operating_system: format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH),
        available_memory: bench::available_bytes(),
        checks,
    };
    if json {
        report::print_json(&findings)?;
    } else {
        report::print(findings.text().trim_end())?;
    }
    Ok(Status::pass_if(findings.checks.iter().all(|check| check.ok)))
}

impl Findings {
    fn text(&self) -> String {
        let receipt = &self.receipt;
        let mut text = String::new();
        let mut line = |what: &str, found: &str| writeln!(text, "{what:<18}{found}").ok();
        let commit = receipt.commit.as_ref().map_or(String::new(), |commit| format!(", commit {commit}"));
        line("gearbox", &format!("{}{commit}", receipt.version));
        line("system", &self.operating_system);
        line("processor", &receipt.cpu_features.join(", "));
        line("threads", &receipt.threads.to_string());
        line(
            "memory",
            &self.available_memory.map_or("unknown".to_owned(), |bytes| report::bytes(bytes) + " available"),
        );
        line("built-in plugins", &receipt.plugins.len().to_string());
        let path = std::env::var(SEARCH_PATH).unwrap_or_default();
        line("plugin path", &if path.is_empty() { format!("{SEARCH_PATH} is not set") } else { path });
        for check in &self.checks {
            line(&check.what, &format!("{}{}", if check.ok { "" } else { "NOT OK: " }, check.found));
        }
        text
    }
}

/// Whether containers of a sweep can be written.
fn temporary() -> Result<String> {
    let folder = std::env::temp_dir();
    let made = tempfile::tempfile_in(&folder);
    made.map(|_| folder.display().to_string()).map_err(|error| gearbox_core::Error::io(&folder, &error))
}
