//! `gearbox gate`.

use std::path::{Path, PathBuf};

use clap::Args;
use gearbox_core::{Error, Result, ResultExt};
use serde_json::json;

use crate::gate::{Candidates, Gate};
use crate::report;
use crate::results::{self, Store};
use crate::status::Status;

/// Judges stored results: one pipeline must hold every limit.
///
/// Rows of all files that have the same pipeline are put together, so that speed may come from `model bench`, quality from `model perplexity` and
/// errors over dumps from `sweep`. Of a number that several rows have, such as those of several dumps, the worst one counts. A number that
/// nobody measured passes nothing, and neither does a pipeline that failed somewhere.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox model perplexity --text book.txt --pipeline p.json --out quality.json
  gearbox model bench --text book.txt --pipeline p.json --out speed.json
  gearbox gate quality.json speed.json --config configs/gate/default.json
  gearbox gate all.db --config gate.json            every row of a results store

Exit status: 0 if a pipeline passes; 1 if none does, or if a control of a file failed; 2 usage or data error.")]
pub(super) struct GateArgs {
    /// Results: JSON of `sweep --out`, `model perplexity --out` or `model bench --out`, or a store of `sweep --results`
    #[arg(required = true, value_name = "RESULTS")]
    results: Vec<PathBuf>,
    /// Limits as JSON: `{ "resident_ratio": { "min": 3 }, "perplexity_increase": { "max": 0.05 } }`
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl GateArgs {
    pub(super) fn run(self, json: bool) -> Result<Status> {
        let gate = Gate::read(&self.config)?;
        let mut candidates = Candidates::default();
        for path in &self.results {
            candidates.add(&read(path)?).context(|| format!("`{}`", path.display()))?;
        }
        let judged = candidates.judge(&gate);
        let passed = candidates.problems().is_empty() && judged.iter().any(|(_, verdict)| verdict.passed());
        if json {
            let rows: Vec<_> = judged
                .iter()
                .map(|(candidate, verdict)| json!({ "candidate": candidate, "passed": verdict.passed(), "verdict": verdict }))
                .collect();
            report::print_json(
                &json!({ "gate": gate, "passed": passed, "rows": rows, "problems": candidates.problems() }),
            )?;
            return Ok(Status::pass_if(passed));
        }
        for (candidate, verdict) in &judged {
            report::print(&format!("{}: {verdict}", candidate.name))?;
        }
        for problem in candidates.problems() {
            report::print(&format!("FAILED {problem}"))?;
        }
        report::print(if passed { "PASS" } else { "FAIL" })?;
        Ok(Status::pass_if(passed))
    }
}

fn read(path: &Path) -> Result<serde_json::Value> {
    if results::is_database(path) {
        return Store::read(path)?.to_results();
    }
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::invalid_input(format!("`{}`: expected results as JSON: {error}", path.display())))
}
