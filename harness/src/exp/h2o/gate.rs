//! The gates of `h2o-analyze`.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use gearbox_core::{Error, Result};

use super::analyze::{Lossless, Offline};
use super::rows::{Column, Rows, SPEED};
use super::{Kit, Mode};
use crate::exp::text::push;

/// What the engine must reach beside the two ratios.
#[derive(Clone, Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub(super) struct GateArgs {
    /// Decoded tokens per second without eviction; 0 judges no speed (kit v3 on)
    #[arg(long, value_name = "TPS", default_value_t = 0.0)]
    decode_baseline: f64,
    /// Greatest share of the baseline that may be lost (kit v3 on)
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    decode_drop_target: f64,
    /// Decompression must have taken time in some row (kit v4 on)
    #[arg(long)]
    require_runtime_decomp: bool,
    /// Greatest length of the queue in any row; negative allows all, as in the limits below (kit v4 on)
    #[arg(long, value_name = "COUNT", default_value_t = -1.0, allow_negative_numbers = true)]
    max_lossless_queue_peak: f64,
    /// Greatest number of fallbacks (kit v4 on)
    #[arg(long, value_name = "COUNT", default_value_t = -1.0, allow_negative_numbers = true)]
    max_lossless_fallback: f64,
    /// Greatest time of decompression in microseconds (kit v5 on)
    #[arg(long, value_name = "US", default_value_t = -1.0, allow_negative_numbers = true)]
    max_lossless_decomp_us: f64,
    /// Greatest number of skipped samples (kit v6 on)
    #[arg(long, value_name = "COUNT", default_value_t = -1.0, allow_negative_numbers = true)]
    max_lossless_backpressure_skip: f64,
    /// Greatest time waited for encoders in microseconds (kit v6 on)
    #[arg(long, value_name = "US", default_value_t = -1.0, allow_negative_numbers = true)]
    max_lossless_async_wait_us: f64,
    /// Some row must have used the encoders' queue (kit v6 on)
    #[arg(long)]
    require_async_queue_activity: bool,
    /// Some row must have found a block in the decode cache (kit v6 on)
    #[arg(long)]
    require_decode_cache_hit: bool,
    /// Some row must have looked into the decode cache (kit v6 on)
    #[arg(long)]
    require_decode_cache_activity: bool,
    /// All columns of the lossless path must be there (kit v6 on)
    #[arg(long)]
    strict_runtime_metric_columns: bool,
    /// Where the baseline is from, for the summary (kit v6 on)
    #[arg(long, value_name = "TEXT", default_value = "")]
    decode_baseline_source: String,
    /// How many runs the baseline is from, for the summary (kit v6 on)
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    decode_baseline_samples: u64,
    /// Which rate of all rows is compared with the baseline; earlier kits take the best (kit final)
    #[arg(long, value_enum, default_value_t = Aggregation::Avg)]
    decode_gate_aggregation: Aggregation,
    /// Mode that the engine ran in (kit final)
    #[arg(long, value_enum)]
    runtime_mode: Option<Mode>,
    /// Encoders that the engine ran (kit final)
    #[arg(long, value_name = "THREADS", default_value_t = 0)]
    async_threads: u64,
    /// What the engine printed, searched for errors (kit final)
    #[arg(long, value_name = "FILE")]
    bench_stdout_log: Option<PathBuf>,
    /// Folder whose `*.log` files are searched for errors (kit final)
    #[arg(long, value_name = "DIR")]
    logs_dir: Option<PathBuf>,
    /// Lines with errors that are allowed (kit final)
    #[arg(long, value_name = "LINES", default_value_t = 0)]
    max_kv_invalid_log_lines: usize,
    /// Logs must be free of errors, and counters must fit the mode; no content is compared (kit final)
    #[arg(long)]
    require_kv_content_consistency: bool,
    /// Warn if less than this share of the limit on waiting is left (kit final)
    #[arg(long, value_name = "SHARE", default_value_t = 0.15)]
    async_wait_headroom_warn_ratio: f64,
}

/// How the rates of all rows become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Aggregation {
    /// Mean
    Avg,
    /// Middle value, or the mean of the two in the middle
    Median,
    /// The value that nine of ten rows do not exceed
    P90,
    /// Greatest value
    Best,
}

impl Aggregation {
    fn of(self, column: &Column) -> f64 {
        let mut values = column.values.clone();
        values.sort_by(f64::total_cmp);
        let count = values.len();
        match self {
            Self::Avg => column.mean(),
            Self::Median => f64::midpoint(values[(count - 1) / 2], values[count / 2]),
            Self::P90 => values[(9 * count).div_ceil(10) - 1],
            Self::Best => column.max(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Avg => "avg",
            Self::Median => "median",
            Self::P90 => "p90",
            Self::Best => "best",
        }
    }
}

/// Columns of the lossless path from kit v6 on.
const RUNTIME: [&str; 8] = [
    "h2o_lossless_decomp_us",
    "h2o_lossless_queue_peak",
    "h2o_lossless_fallback",
    "h2o_lossless_backpressure_skip",
    "h2o_lossless_async_queue_peak",
    "h2o_lossless_async_wait_us",
    "h2o_lossless_decode_cache_hit",
    "h2o_lossless_decode_cache_miss",
];

/// What a line of a log holds, in lower case, if the engine failed or found its cache broken.
const ERRORS: [&str; 5] = ["invalid kv", "segmentation fault", "core dumped", "abort", "crash"];

/// Whether a limit holds: a negative one allows all, one that is no number nothing.
fn is_limit(limit: f64) -> bool {
    limit.is_nan() || limit >= 0.0
}

/// Verdicts, and the lines that report them.
#[derive(Debug, Default)]
pub(super) struct Gates {
    /// Lines before and behind the verdict on everything.
    lines: [Vec<(String, String)>; 2],
    verdicts: Vec<(String, bool)>,
    /// Why gates fail that cannot be judged.
    pub problems: BTreeSet<String>,
}

impl Gates {
    /// Whether all gates pass.
    pub fn passed(&self) -> bool {
        self.verdicts.iter().all(|(_, passed)| *passed)
    }

    /// `PASS` or `FAIL`.
    pub fn status(&self) -> &'static str {
        if self.passed() { "PASS" } else { "FAIL" }
    }

    /// Verdicts by name.
    pub fn verdicts(&self) -> serde_json::Map<String, serde_json::Value> {
        self.verdicts.iter().map(|(name, passed)| (name.clone(), (*passed).into())).collect()
    }

    /// The section of the summary, without its heading.
    pub fn markdown(&self) -> String {
        let mut text = format!("- quality_status: {}\n", self.status());
        let overall = [("overall_pass".to_owned(), self.passed().to_string())];
        for (key, value) in self.lines[0].iter().chain(&overall).chain(&self.lines[1]) {
            push(&mut text, format_args!("- {key}: {value}\n"));
        }
        text
    }

    fn line(&mut self, behind: bool, key: impl Into<String>, value: impl Display) {
        self.lines[usize::from(behind)].push((key.into(), value.to_string()));
    }

    /// A gate passes if its condition holds and nothing is wrong with what it was computed from.
    fn gate(&mut self, behind: bool, name: &str, holds: bool, problems: &[&Option<String>]) {
        let problems: Vec<_> = problems.iter().copied().flatten().collect();
        let passed = holds && problems.is_empty();
        self.problems.extend(problems.into_iter().cloned());
        self.line(behind, name, passed);
        self.verdicts.push((name.to_owned(), passed));
    }

    /// A gate on the greatest value of a column; a negative limit allows all.
    fn limit(&mut self, name: &str, column: &Column, limit: f64) {
        self.line(false, format!("{name}_max"), format_args!("{:.2}", column.max()));
        self.line(false, format!("{name}_limit"), format_args!("{limit:.2}"));
        let limited = is_limit(limit);
        let problem = column.problem.clone().filter(|_| limited);
        self.gate(false, &format!("{name}_pass"), !limited || column.max() <= limit, &[&problem]);
    }
}

impl GateArgs {
    /// Whether the kit has every flag that is given.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig), naming the flag, if not.
    pub fn check(&self, kit: Kit, online_json: bool) -> Result<()> {
        for (flag, given, since) in [
            ("--offline-lossless-online-json", online_json, Kit::V3),
            ("--decode-baseline", self.decode_baseline > 0.0, Kit::V3),
            ("--require-runtime-decomp", self.require_runtime_decomp, Kit::V4),
            ("--max-lossless-queue-peak", is_limit(self.max_lossless_queue_peak), Kit::V4),
            ("--max-lossless-fallback", is_limit(self.max_lossless_fallback), Kit::V4),
            ("--max-lossless-decomp-us", is_limit(self.max_lossless_decomp_us), Kit::V5),
            ("--max-lossless-backpressure-skip", is_limit(self.max_lossless_backpressure_skip), Kit::V6),
            ("--max-lossless-async-wait-us", is_limit(self.max_lossless_async_wait_us), Kit::V6),
            ("--require-async-queue-activity", self.require_async_queue_activity, Kit::V6),
            ("--require-decode-cache-hit", self.require_decode_cache_hit, Kit::V6),
            ("--require-decode-cache-activity", self.require_decode_cache_activity, Kit::V6),
            ("--strict-runtime-metric-columns", self.strict_runtime_metric_columns, Kit::V6),
            ("--require-kv-content-consistency", self.require_kv_content_consistency, Kit::Final),
        ] {
            if given && kit < since {
                let (kit, since) = (kit.name(), since.name());
                return Err(Error::invalid_config(format!("{flag}: expected --kit {since} or later, got {kit}")));
            }
        }
        Ok(())
    }

    /// Judges the rows; `targets` are the least lossy and the least lossless ratio.
    ///
    /// # Errors
    /// What reading the logs reports.
    pub fn judge(&self, kit: Kit, rows: &Rows, lossless: &Lossless, targets: [f64; 2]) -> Result<Gates> {
        let mut gates = Gates::default();
        let [lossy_target, lossless_target] = targets;
        let lossy = rows.column("h2o_lossy");
        gates.line(false, "lossy_target", format_args!("{lossy_target:.4}"));
        gates.line(false, "lossy_best", format_args!("{:.4}", lossy.max()));
        gates.gate(false, "lossy_pass", lossy.max() >= lossy_target, &[&lossy.problem]);

        let Lossless { source, value, .. } = *lossless;
        let (selected, names) = if kit == Kit::V2 {
            ("lossless", &["lossless_pass"][..])
        } else {
            ("lossless_selected", &["lossless_selected_pass", "lossless_online_pass"][..])
        };
        gates.line(false, "lossless_target", format_args!("{lossless_target:.4}"));
        gates.line(false, format!("{selected}_source"), source);
        gates.line(false, format!("{selected}_value"), format_args!("{value:.4}"));
        for (idx, name) in names.iter().enumerate() {
            if idx == 1 {
                // The online ratio is the selected one wherever it is given.
                gates.line(false, "lossless_online_value", format_args!("{value:.4}"));
            }
            gates.gate(false, name, value >= lossless_target, &[&lossless.problem]);
        }

        self.judge_runtime(kit, rows, &mut gates);
        if kit >= Kit::Final {
            self.judge_consistency(rows, &mut gates)?;
        }
        self.judge_decode(kit, rows, &mut gates);
        for (name, offline) in [("upper", &lossless.upper), ("online", &lossless.online)] {
            if let Some(Offline { path, entries, layers, .. }) = offline {
                gates.line(true, format!("{name}_selected_entries"), entries);
                gates.line(true, format!("{name}_selected_layers"), format_args!("{layers:?}"));
                gates.line(true, format!("{name}_json"), format_args!("`{path}`"));
            }
        }
        Ok(gates)
    }

    fn judge_runtime(&self, kit: Kit, rows: &Rows, gates: &mut Gates) {
        if kit >= Kit::V4 {
            let decomp = rows.column("h2o_lossless_decomp_us");
            let (most, budget) = (decomp.max(), self.max_lossless_decomp_us);
            let (required, limited) = (self.require_runtime_decomp, kit >= Kit::V5 && is_limit(budget));
            gates.line(false, "runtime_decomp_required", required);
            gates.line(false, "runtime_decomp_us_max", format_args!("{most:.2}"));
            if kit >= Kit::V5 {
                gates.line(false, "runtime_decomp_us_limit", format_args!("{budget:.2}"));
            }
            let holds = (!required || most > 0.0) && (!limited || most <= budget);
            let problem = decomp.problem.filter(|_| required || limited);
            gates.gate(false, "runtime_decomp_pass", holds, &[&problem]);
            gates.limit("queue_peak", &rows.column("h2o_lossless_queue_peak"), self.max_lossless_queue_peak);
            gates.limit("fallback", &rows.column("h2o_lossless_fallback"), self.max_lossless_fallback);
        }
        if kit >= Kit::V6 {
            let skip = rows.column("h2o_lossless_backpressure_skip");
            gates.limit("backpressure_skip", &skip, self.max_lossless_backpressure_skip);
            let (wait, limit) = (rows.column("h2o_lossless_async_wait_us"), self.max_lossless_async_wait_us);
            gates.limit("async_wait", &wait, limit);
            if kit >= Kit::Final && limit > 0.0 && (limit - wait.max()) / limit < self.async_wait_headroom_warn_ratio {
                tracing::warn!("waited {:.0} of at most {limit:.0} us for encoders", wait.max());
            }
            let [queue, hit, miss] = ["async_queue_peak", "decode_cache_hit", "decode_cache_miss"]
                .map(|n| rows.column(&format!("h2o_lossless_{n}")));
            for (name, required, columns) in [
                ("async_queue_activity", self.require_async_queue_activity, &[&queue][..]),
                ("decode_cache_hit", self.require_decode_cache_hit, &[&hit]),
                ("decode_cache_activity", self.require_decode_cache_activity, &[&hit, &miss]),
            ] {
                let is_active = columns.iter().any(|column| column.max() > 0.0);
                let problems: Vec<_> = columns.iter().filter(|_| required).map(|column| &column.problem).collect();
                gates.line(false, format!("{name}_required"), required);
                gates.gate(false, &format!("{name}_pass"), !required || is_active, &problems);
            }
            let missing: Vec<_> = RUNTIME.into_iter().filter(|name| !rows.has(name)).collect();
            if !missing.is_empty() {
                tracing::warn!("missing columns: {}", missing.join(", "));
            }
            let holds = missing.is_empty() || !self.strict_runtime_metric_columns;
            gates.gate(false, "runtime_metric_columns_pass", holds, &[]);
        }
    }

    fn judge_consistency(&self, rows: &Rows, gates: &mut Gates) -> Result<()> {
        let found = error_lines(self.bench_stdout_log.as_deref(), self.logs_dir.as_deref())?;
        let [queue, decomp, fallback] =
            ["async_queue_peak", "decomp_us", "fallback"].map(|name| rows.column(&format!("h2o_lossless_{name}")));
        let required = self.require_kv_content_consistency;
        let stores = matches!(self.runtime_mode, Some(Mode::Full | Mode::Store));
        let holds = found <= self.max_kv_invalid_log_lines
            && (self.async_threads == 0 || self.runtime_mode == Some(Mode::Probe) || queue.max() > 0.0)
            && (!stores || decomp.max() > 0.0)
            && fallback.max() == 0.0;
        gates.line(false, "kv_invalid_log_lines", found);
        let problems: Vec<_> =
            [&queue, &decomp, &fallback].into_iter().filter(|_| required).map(|column| &column.problem).collect();
        gates.gate(false, "kv_content_consistency_pass", !required || holds, &problems);
        Ok(())
    }

    fn judge_decode(&self, kit: Kit, rows: &Rows, gates: &mut Gates) {
        let baseline = self.decode_baseline;
        if baseline <= 0.0 {
            return;
        }
        let decode = rows.column(SPEED);
        let aggregation = if kit >= Kit::Final { self.decode_gate_aggregation } else { Aggregation::Best };
        let value = aggregation.of(&decode);
        let drop = (baseline - value) / baseline;
        gates.line(true, "decode_baseline", format_args!("{baseline:.4}"));
        if kit >= Kit::V6 {
            gates.line(true, "decode_baseline_source", &self.decode_baseline_source);
            gates.line(true, "decode_baseline_samples", self.decode_baseline_samples);
        }
        gates.line(true, "decode_best", format_args!("{:.4}", decode.max()));
        if kit >= Kit::Final {
            gates.line(true, "decode_gate_aggregation", aggregation.name());
            gates.line(true, "decode_gate_value", format_args!("{value:.4}"));
        }
        gates.line(true, "decode_drop_ratio", format_args!("{drop:.6}"));
        gates.line(true, "decode_drop_target", format_args!("{:.6}", self.decode_drop_target));
        gates.gate(true, "decode_pass", drop <= self.decode_drop_target, &[&decode.problem]);
    }
}

/// Lines with errors in a file and in the `*.log` files of a folder.
fn error_lines(file: Option<&Path>, folder: Option<&Path>) -> Result<usize> {
    let mut paths: Vec<PathBuf> = file.map(Path::to_path_buf).into_iter().collect();
    if let Some(folder) = folder {
        for item in fs::read_dir(folder).map_err(|error| Error::io(folder, &error))? {
            let path = item.map_err(|error| Error::io(folder, &error))?.path();
            paths.extend(path.extension().is_some_and(|ending| ending == "log").then_some(path.clone()));
        }
    }
    let mut found = 0;
    for path in paths {
        let bytes = fs::read(&path).map_err(|error| Error::io(&path, &error))?;
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        found += text.lines().filter(|line| ERRORS.iter().any(|error| line.contains(error))).count();
    }
    Ok(found)
}
