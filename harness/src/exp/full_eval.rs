//! `exp full-eval`: the kit behind a sweep in one go: collect logs, measure the lossless ratio offline, summarise and judge.

use std::fs;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use gearbox_core::{Error, Registry, Result};

use super::flags::Flags;
use super::h2o::{AnalyzeArgs, Kit, ParseArgs};
use super::offline_lossless::OfflineLosslessArgs;
use crate::report;
use crate::status::Status;

/// Collects logs, measures the lossless ratio of a dump and judges both.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Runs `h2o-parse` over OUT/logs (or takes OUT/h2o_metrics.csv if the logs are gone), `offline-lossless` over the two front layers whole
and in chunks, and `h2o-analyze` with a lossy target of 3. Exit status: 0 if all gates pass, 1 if one fails, 2 for bad input. With --json every step
prints its own document."
)]
pub struct FullEvalArgs {
    /// Folder of a sweep, which takes the results too
    out: PathBuf,
    /// Dump: a run folder, a folder of runs, or safetensors
    dumps: PathBuf,
    /// Least lossless ratio
    lossless_target: f64,
    /// Decoded tokens per second without eviction; 0 judges no speed
    #[arg(default_value_t = 0.0)]
    baseline: f64,
    /// Greatest share of the baseline that may be lost
    #[arg(default_value_t = 0.05)]
    drop: f64,
    /// Tokens of a chunk
    #[arg(default_value_t = 128)]
    chunk: usize,
    /// Bytes that are added for each chunk
    #[arg(default_value_t = 16)]
    framing: u64,
    /// Tokens of a block
    #[arg(default_value_t = 64)]
    block: u32,
    /// What is cut into chunks
    #[arg(value_enum, default_value_t = OnlineMode::ChunkedGrouped)]
    mode: OnlineMode,
    /// Revision of columns, text and gates
    #[arg(long, value_enum, default_value_t = Kit::V3)]
    kit: Kit,
    /// Whether decompression must have taken time, from kit v4 on
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    require_runtime_decomp: bool,
    /// Replace existing results
    #[arg(long)]
    overwrite: bool,
}

/// What is cut into chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum OnlineMode {
    /// Each entry
    Chunked,
    /// All entries of a run and layer, joined
    ChunkedGrouped,
    /// One after the other; the summary is that of the second
    Both,
}

impl FullEvalArgs {
    /// Runs all steps; each prints which files it wrote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if there are neither logs nor rows; else what the steps report.
    pub fn run(&self, registry: &Registry, json: bool) -> Result<Status> {
        let path = |name: &str| self.out.join(name);
        let csv = path("h2o_metrics.csv");
        let logs = path("logs");
        let has_logs = fs::read_dir(&logs)
            .into_iter()
            .flatten()
            .flatten()
            .any(|item| item.path().extension().is_some_and(|ending| ending == "log"));
        let mut status = Status::Pass;
        if has_logs {
            let flags = self.flags().value("log-dir", &logs).value("out-csv", &csv).value("kit", self.kit.name());
            status = flags.parse::<ParseArgs>()?.run(json)?;
        } else if !csv.is_file() {
            let (logs, csv) = (logs.display(), csv.display());
            return Err(Error::invalid_input(format!("expected logs in `{logs}` or rows in `{csv}`, got neither")));
        }

        let upper = path("offline_lossless_upper.json");
        let flags = self.flags().value("entry-mode", "aggregate").switch("aggregate-by-stage", true);
        status = status.and(self.offline(registry, flags, &upper, json)?);
        let (chunked, grouped) = (path("offline_lossless_online.json"), path("offline_lossless_online_grouped.json"));
        let modes = match self.mode {
            OnlineMode::Chunked => vec![("chunked", chunked, "summary.md")],
            OnlineMode::ChunkedGrouped => vec![("chunked_grouped", grouped, "summary.md")],
            OnlineMode::Both => {
                vec![("chunked", chunked, "summary_chunked.md"), ("chunked_grouped", grouped, "summary_grouped.md")]
            }
        };
        for (mode, online, summary) in &modes {
            let flags = self.flags().value("entry-mode", *mode);
            let flags = flags.value("online-chunk-seq", self.chunk.to_string());
            let flags = flags.value("online-framing-bytes", self.framing.to_string());
            status = status.and(self.offline(registry, flags, online, json)?);
            let flags = self.flags().value("kit", self.kit.name()).value("csv", &csv);
            let flags = flags.value("offline-lossless-json", &upper).value("offline-lossless-online-json", online);
            let flags = flags.value("lossy-target", "3.0").value("lossless-target", self.lossless_target.to_string());
            let flags = flags.value("decode-baseline", self.baseline.to_string());
            let flags = flags.value("decode-drop-target", self.drop.to_string()).value("out", path(summary));
            let decomp = self.kit >= Kit::V4 && self.require_runtime_decomp;
            status = status.and(flags.switch("require-runtime-decomp", decomp).parse::<AnalyzeArgs>()?.run(json)?);
        }
        if self.mode == OnlineMode::Both {
            let summary = path("summary.md");
            let mut file = super::Outputs::file(&summary, self.overwrite)?;
            let grouped = path("summary_grouped.md");
            file.write_text(0, &fs::read_to_string(&grouped).map_err(|error| Error::io(&grouped, &error))?)?;
            file.commit()?;
            if !json {
                report::print(&format!("Wrote {}", summary.display()))?;
            }
        }
        Ok(status)
    }

    fn flags(&self) -> Flags {
        Flags::default().switch("overwrite", self.overwrite)
    }

    /// Measures the front layers and writes both files.
    fn offline(&self, registry: &Registry, flags: Flags, out: &std::path::Path, json: bool) -> Result<Status> {
        let flags =
            flags.value("dump-dir", &self.dumps).value("out-json", out).value("out-md", out.with_extension("md"));
        let flags = flags.value("adaptive-block-seq", self.block.to_string());
        flags.parse::<OfflineLosslessArgs>()?.run(registry, json)
    }
}
