//! `gearbox report`.

use std::path::PathBuf;

use clap::Args;
use gearbox_core::Result;
use serde_json::json;

use crate::gate::Gate;
use crate::report::{self, Options, Results};
use crate::status::Status;

/// Writes a report of results that others can open, search and cite: tables, plots and one page.
///
/// The folder gets `index.html`, a page that works without a network and beside nothing else; `report.md` and `rows.csv` with the same rows; and
/// per dump the plots `front-N.svg`, `ledger-N.svg` and `heads-N.svg`. It appears whole or not at all. Rows of several files are shown together,
/// and those over equal dumps share one front.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox sweep --dump DIR --out results && gearbox report results/sweep.json --out report
  gearbox report results.db --where \"ratio > 2\" --gate configs/gate/default.json --out report
  gearbox report monday/sweep.json tuesday/sweep.json --out report --overwrite
  gearbox report results/sweep.json quality.json speed.json --out report    with results of models

The page holds every row, and heat maps and ledgers of as many rows as fit into 6 MB, those of the front and within the gate first; it
says what it leaves out. Of a store the 10 000 rows with the highest ratios are read. Exit status: 0 written; 2 usage or data error. `gearbox gate` judges.")]
pub(super) struct ReportArgs {
    /// Results: a store of `sweep --results`, or JSON of `sweep --out`, `model perplexity --out` or `model bench --out`
    #[arg(required = true, value_name = "RESULTS")]
    results: Vec<PathBuf>,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Limits as JSON that judge the rows instead of those in the files; rows of stores have none of their own
    #[arg(long, value_name = "FILE")]
    gate: Option<PathBuf>,
    /// Take those rows of stores alone that meet an SQL condition over the columns of `gearbox results list`
    #[arg(long = "where", value_name = "SQL")]
    condition: Option<String>,
    /// Replace the report that is there; a folder that holds anything else stays
    #[arg(long)]
    overwrite: bool,
}

impl ReportArgs {
    pub(super) fn run(self, json: bool) -> Result<Status> {
        let gate = self.gate.as_deref().map(Gate::read).transpose()?;
        let results = Results::read(&self.results, &Options { gate, condition: self.condition })?;
        let files = report::write_folder(&results, &self.out, self.overwrite)?;
        if json {
            let (rows, dumps) = (results.lines().count(), results.dumps.len());
            report::print_json(&json!({ "out": self.out, "files": files, "rows": rows, "dumps": dumps }))?;
        } else {
            report::print(&results.summary())?;
            report::print(&format!("{}: open it in a browser", self.out.join("index.html").display()))?;
        }
        Ok(Status::Pass)
    }
}
