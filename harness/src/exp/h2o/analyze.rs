//! `exp h2o-analyze`: averages, best rows and a verdict on what `h2o-parse` wrote.
//!
//! The text is the reference's: averages without weights, a cell without a number counts as zero, and one lossless ratio, measured elsewhere,
//! times the lossy ratio of each row. Its verdict is not: here a gate whose column is missing or garbled fails, and FAIL is an exit status.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use gearbox_core::{Error, Result};
use serde_json::{Value, json};

use super::Kit;
use super::gate::{GateArgs, Gates};
use super::rows::{Column, Rows, SPEED};
use crate::exp::files::Outputs;
use crate::exp::text::push;
use crate::report;
use crate::status::Status;

/// Summarises what `h2o-parse` wrote, beside offline results, and judges it.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Exit status: 0 if all gates pass, 1 if one fails (the reference ended with 0), 2 for bad input. A gate whose column is missing,
or has a cell that is no measurement such as the header of an appended log, fails with a warning; the averages count such a cell as the
reference does. No gate measures quality, and the total multiplies ratios of different layers: see `gearbox evict` for what a policy costs."
)]
pub struct AnalyzeArgs {
    /// CSV file of `h2o-parse`
    #[arg(long, value_name = "FILE")]
    csv: PathBuf,
    /// Result of `offline-lossless` over whole layers, an upper bound
    #[arg(long, value_name = "FILE")]
    offline_lossless_json: Option<PathBuf>,
    /// Result of `offline-lossless` in chunks, preferred to the upper bound
    #[arg(long, value_name = "FILE")]
    offline_lossless_online_json: Option<PathBuf>,
    /// Least lossy ratio of the best row
    #[arg(long, value_name = "RATIO", default_value_t = 3.0)]
    lossy_target: f64,
    /// Least lossless ratio
    #[arg(long, value_name = "RATIO", default_value_t = 1.3)]
    lossless_target: f64,
    /// Revision of text and gates
    #[arg(long, value_enum, default_value_t = Kit::V3)]
    kit: Kit,
    /// File for the summary; its folder is created if needed [default: `exp/h2o_<KIT>/out/summary.md`]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Replace an existing summary
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    gates: GateArgs,
}

/// What `offline-lossless` found.
#[derive(Debug)]
pub(super) struct Offline {
    pub path: String,
    pub ratio: f64,
    pub entries: u64,
    pub layers: Vec<i64>,
    /// Whether no entry was left out; the reference did not say.
    complete: bool,
}

impl Offline {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
        let bad = |message: String| Error::invalid_input(message).context(format!("`{}`", path.display()));
        let value: Value = serde_json::from_str(&text).map_err(|error| bad(format!("expected JSON: {error}")))?;
        let ratio = value.get("weighted_lossless_ratio").unwrap_or(&value["lossless_ratio"]);
        Ok(Self {
            path: path.display().to_string(),
            ratio: ratio.as_f64().filter(|ratio| *ratio > 0.0).ok_or_else(|| {
                bad(format!("expected a positive `weighted_lossless_ratio` or `lossless_ratio`, got {ratio}"))
            })?,
            entries: value["selected_entries"].as_u64().unwrap_or(0),
            layers: value["selected_layers"].as_array().into_iter().flatten().filter_map(Value::as_i64).collect(),
            complete: value["complete"] != Value::Bool(false),
        })
    }
}

/// The one lossless ratio of all rows.
#[derive(Debug)]
pub(super) struct Lossless {
    pub source: &'static str,
    pub value: f64,
    /// Whole layers.
    pub upper: Option<Offline>,
    /// Chunks.
    pub online: Option<Offline>,
    /// Why nothing may be judged by it.
    pub problem: Option<String>,
}

impl Lossless {
    fn new(upper: Option<Offline>, online: Option<Offline>, runtime: &Column) -> Self {
        let (source, chosen) = match (&online, &upper) {
            (Some(online), _) => ("offline_online_sim", Some(online)),
            (None, Some(upper)) => ("offline_upper_bound", Some(upper)),
            (None, None) => ("runtime", None),
        };
        if online.is_none() {
            tracing::warn!("no result of chunks is given: the lossless ratio is `{source}`");
        }
        let incomplete = |offline: &Offline| {
            (!offline.complete).then(|| format!("`{}`: `complete` is false, entries were left out", offline.path))
        };
        let value = chosen.map_or_else(|| runtime.mean(), |offline| offline.ratio);
        let problem = chosen.map_or_else(|| runtime.problem.clone(), incomplete);
        Self { source, value, upper, online, problem }
    }
}

/// The columns that the summary shows of every row.
struct Figures {
    keep: Column,
    lossy: Column,
    runtime: Column,
    decode: Column,
    /// Lossy ratio times the one lossless ratio.
    total: Vec<f64>,
}

impl AnalyzeArgs {
    /// Runs the experiment and prints which file it wrote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) for a flag that the kit does not have;
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for a file without rows, an offline result without a ratio, or an
    /// existing summary; else what reading and writing report.
    pub fn run(&self, json: bool) -> Result<Status> {
        self.gates.check(self.kit, self.offline_lossless_online_json.is_some())?;
        let rows = Rows::read(&self.csv)?;
        let offline = |path: &Option<PathBuf>| path.as_deref().map(Offline::read).transpose();
        let (upper, online) = (offline(&self.offline_lossless_json)?, offline(&self.offline_lossless_online_json)?);
        let runtime = rows.column("h2o_lossless");
        let lossless = Lossless::new(upper, online, &runtime);
        let lossy = rows.column("h2o_lossy");
        let total = lossy.values.iter().map(|lossy| lossy * lossless.value).collect();
        let figures = Figures { keep: rows.column("h2o_keep"), lossy, runtime, decode: rows.column(SPEED), total };
        let targets = [self.lossy_target, self.lossless_target];
        let gates = self.gates.judge(self.kit, &rows, &lossless, targets)?;
        for problem in &gates.problems {
            tracing::warn!("fails its gates: {problem}");
        }

        let default = || PathBuf::from(format!("exp/h2o_{}/out/summary.md", self.kit.name()));
        let mut outputs = Outputs::file(&self.out.clone().unwrap_or_else(default), self.overwrite)?;
        outputs.write_text(0, &self.markdown(&rows, &figures, &lossless, &gates))?;
        let paths = outputs.commit()?;
        if json {
            report::print_json(&json!({
                "files": paths,
                "rows": rows.len(),
                "lossless": {
                    "source": lossless.source,
                    "value": lossless.value,
                    "upper_bound": lossless.upper.as_ref().map(|offline| offline.ratio),
                    "online_sim": lossless.online.as_ref().map(|offline| offline.ratio),
                },
                "lossy": figures.lossy.values,
                "total": figures.total,
                "decode_tps": figures.decode.values,
                "logs": (0..rows.len()).map(|row| rows.log(row)).collect::<Vec<_>>(),
                "gates": gates.verdicts(),
                "overall_pass": gates.passed(),
                "problems": gates.problems,
            }))?;
        } else {
            paths.iter().try_for_each(|path| report::print(&format!("Wrote {path}")))?;
            report::print(gates.status())?;
        }
        Ok(Status::pass_if(gates.passed()))
    }

    fn markdown(&self, rows: &Rows, figures: &Figures, lossless: &Lossless, gates: &Gates) -> String {
        let Lossless { source, value, .. } = *lossless;
        let is_v2 = self.kit == Kit::V2;
        let mut text = format!("# H2O {} Summary\n\n", self.kit.name());
        let mean = |name: &str| rows.column(name).mean();
        let total = figures.total.iter().sum::<f64>() / rows.len() as f64;
        let mut line = |label: &str, value: String| push(&mut text, format_args!("- {label}: {value}\n"));
        line("Rows", rows.len().to_string());
        line("Avg keep ratio", format!("{:.4}", figures.keep.mean()));
        line("Avg lossy ratio", format!("{:.4}", figures.lossy.mean()));
        line("Avg runtime lossless ratio", format!("{:.4}", figures.runtime.mean()));
        if is_v2 {
            line(&format!("Effective lossless ratio ({source})"), format!("{value:.4}"));
            line("Avg total ratio (lossy*lossless)", format!("{total:.4}"));
        } else {
            line("Lossless selected source", source.to_owned());
            line("Lossless selected value", format!("{value:.4}"));
            for (label, offline) in [("upper-bound", &lossless.upper), ("online-sim", &lossless.online)] {
                if let Some(offline) = offline {
                    line(&format!("Offline {label} lossless"), format!("{:.4}", offline.ratio));
                }
            }
            line("Avg total ratio (selected)", format!("{total:.4}"));
        }
        line("Avg target keep effective", format!("{:.4}", mean("h2o_target_keep_effective")));
        line("Avg floor keep (sink+recent)", format!("{:.4}", mean("h2o_floor_keep")));
        line("Avg quantized keep", format!("{:.4}", mean("h2o_quantized_keep")));
        line("Avg evict us", format!("{:.2}", mean("h2o_evict_us")));
        line("Avg codec us", format!("{:.2}", mean("h2o_codec_us")));
        if !is_v2 {
            text.push('\n');
            for (label, name, decimals, since) in LOSSLESS {
                if self.kit >= since {
                    push(&mut text, format_args!("- Avg lossless {label}: {:.decimals$}\n", mean(name)));
                }
            }
        }

        let item = |figure: Figure, row: usize| match figure {
            Figure::Lossy => format!("- lossy ratio: {:.4}\n", figures.lossy.values[row]),
            Figure::Keep => format!("- keep ratio: {:.4}\n", figures.keep.values[row]),
            Figure::Lossless => format!("- lossless ratio ({source}): {value:.4}\n"),
            Figure::Runtime => format!("- runtime lossless ratio: {:.4}\n", figures.runtime.values[row]),
            Figure::Total => format!("- total ratio: {:.4}\n", figures.total[row]),
            Figure::Decode => format!("- decode tps: {:.2}\n", figures.decode.values[row]),
        };
        let bests: [(&str, &[f64], &[Figure]); 3] = {
            use Figure::{Decode, Keep, Lossless, Lossy, Runtime, Total};
            [
                ("Lossy Ratio", &figures.lossy.values, &[Lossy, Keep, Lossless, Runtime, Total, Decode]),
                ("Decode TPS", &figures.decode.values, &[Decode, Keep, Lossy, Lossless, Runtime, Total]),
                ("Total Ratio", &figures.total, &[Total, Lossy, Lossless, Runtime, Decode]),
            ]
        };
        for (title, values, items) in bests {
            let row = best(values);
            push(&mut text, format_args!("\n## Best {title}\n\n"));
            for figure in items {
                text.push_str(&item(*figure, row));
            }
            push(&mut text, format_args!("- log: `{}`\n", rows.log(row)));
        }

        let by = if is_v2 { "total ratio" } else { "selected total" };
        push(&mut text, format_args!("\n## Pareto Top-5 (by {by} then decode)\n\n"));
        let mut order: Vec<usize> = (0..rows.len()).collect();
        let rank = |row: usize| [figures.total[row], figures.decode.values[row]];
        order.sort_by(|a, b| rank(*b).partial_cmp(&rank(*a)).unwrap_or(std::cmp::Ordering::Equal));
        for (place, &row) in order.iter().take(5).enumerate() {
            let ([total, decode], lossy) = (rank(row), figures.lossy.values[row]);
            push(
                &mut text,
                format_args!(
                    "{}. total={total:.4}, decode={decode:.2}, lossy={lossy:.4}, lossless={value:.4}, log=`{}`\n",
                    place + 1,
                    rows.log(row)
                ),
            );
        }

        text.push_str("\n## Quality Gate\n\n");
        text.push_str(&gates.markdown());
        text
    }
}

/// A line of the sections of best rows.
#[derive(Clone, Copy)]
enum Figure {
    Lossy,
    Keep,
    Lossless,
    Runtime,
    Total,
    Decode,
}

/// Label, column, decimals and first revision of the averages of the lossless path.
const LOSSLESS: [(&str, &str, usize, Kit); 11] = [
    ("raw MB", "h2o_lossless_raw_mb", 4, Kit::V3),
    ("comp MB", "h2o_lossless_comp_mb", 4, Kit::V3),
    ("comp us", "h2o_lossless_comp_us", 2, Kit::V3),
    ("decomp us", "h2o_lossless_decomp_us", 2, Kit::V3),
    ("queue peak", "h2o_lossless_queue_peak", 2, Kit::V4),
    ("fallback", "h2o_lossless_fallback", 2, Kit::V3),
    ("backpressure skip", "h2o_lossless_backpressure_skip", 2, Kit::V6),
    ("async queue peak", "h2o_lossless_async_queue_peak", 2, Kit::V6),
    ("async wait us", "h2o_lossless_async_wait_us", 2, Kit::V6),
    ("decode cache hit", "h2o_lossless_decode_cache_hit", 2, Kit::V6),
    ("decode cache miss", "h2o_lossless_decode_cache_miss", 2, Kit::V6),
];

/// The row of the greatest value; the first of several.
fn best(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, row| if values[row] > values[best] { row } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exp::samples::parse;

    /// Runs over these rows and gives the verdict and the summary.
    fn run(csv: &str, flags: &[&str]) -> Result<(Status, String)> {
        let folder = tempfile::tempdir().unwrap();
        let [path, out] = ["rows.csv", "new/summary.md"].map(|name| folder.path().join(name));
        fs::write(&path, csv).unwrap();
        let files = ["--csv", path.to_str().unwrap(), "--out", out.to_str().unwrap()];
        let status = parse::<AnalyzeArgs>(&[&files[..], flags].concat()).unwrap().run(false)?;
        Ok((status, fs::read_to_string(&out).unwrap()))
    }

    fn holds(summary: &str, lines: &[&str]) {
        for line in lines {
            assert!(summary.lines().any(|found| found == format!("- {line}")), "{line}\n{summary}");
        }
    }

    const ROW: &str = "h2o_keep,h2o_lossy,h2o_lossless,speed(tok/s)\n\
                       0.3138,3.186 ± 0.000,2.621 ± 0.000,30.10 ± 0.10<br>6.65 ± 0.01\n";

    #[test]
    fn one_row_passes_against_a_baseline() {
        let (status, text) = run(ROW, &["--decode-baseline", "6.6"]).unwrap();
        assert_eq!(status, Status::Pass);
        holds(
            &text,
            &[
                "Lossless selected source: runtime",
                "Lossless selected value: 2.6210",
                "total ratio: 8.3505",
                "quality_status: PASS",
                "lossless_online_pass: true",
                "overall_pass: true",
                "decode_drop_ratio: -0.007576",
                "decode_pass: true",
            ],
        );
        let (status, text) = run(ROW, &["--decode-baseline", "7.1"]).unwrap();
        assert_eq!(status, Status::Fail);
        holds(&text, &["quality_status: FAIL", "overall_pass: false", "decode_pass: false"]);
    }

    #[test]
    fn appended_table_is_averaged_as_the_reference_does_and_fails() {
        let (status, text) = run(&ROW.repeat(2), &["--decode-baseline", "6.6"]).unwrap();
        assert_eq!(status, Status::Fail);
        holds(
            &text,
            &[
                "Rows: 3",
                "Avg keep ratio: 0.8759",
                "Avg lossy ratio: 2.7907",
                "Avg runtime lossless ratio: 2.4140",
                "lossy_best: 3.1860",
                "lossy_pass: false",
                "lossless_selected_pass: false",
                "decode_pass: false",
                "overall_pass: false",
            ],
        );
    }

    #[test]
    fn missing_columns_count_as_zero_and_fail() {
        let (status, text) = run("model\ntiny\n", &[]).unwrap();
        assert_eq!(status, Status::Fail);
        holds(&text, &["lossy_best: 0.0000", "lossless_selected_value: 0.0000", "quality_status: FAIL"]);
        // In the reference a limit held on a column that is not there.
        let (status, text) = run(ROW, &["--kit", "v4", "--max-lossless-fallback", "0"]).unwrap();
        assert_eq!(status, Status::Fail);
        holds(&text, &["fallback_max: 0.00", "fallback_pass: false", "queue_peak_pass: true", "lossy_pass: true"]);
        assert_eq!(run(ROW, &["--kit", "v4"]).unwrap().0, Status::Pass);
        assert_eq!(run(ROW, &["--kit", "v4", "--max-lossless-fallback", "nan"]).unwrap().0, Status::Fail);
        assert_eq!(run(ROW, &["--kit", "v6", "--strict-runtime-metric-columns"]).unwrap().0, Status::Fail);
        assert!(run("", &[]).is_err());
    }

    #[test]
    fn limits_and_requirements_of_later_kits_judge_the_greatest_value() {
        let head = "h2o_lossy,h2o_lossless,h2o_lossless_decomp_us,h2o_lossless_decode_cache_hit,h2o_lossless_fallback,\
                    h2o_lossless_async_queue_peak,speed(tok/s)\n";
        let csv =
            format!("{head}3.1,1.4,700.00 ± 1.00,0,0,2,1<br>10\n3.0,1.4,900,3,0,0,1<br>8\n3.0,1.4,900,3,0,0,1<br>9\n");
        let verdict = |kit: &str, flags: &[&str]| run(&csv, &[&["--kit", kit][..], flags].concat()).unwrap().0;
        assert_eq!(verdict("v4", &["--require-runtime-decomp"]), Status::Pass);
        assert_eq!(verdict("v5", &["--max-lossless-decomp-us", "900"]), Status::Pass);
        assert_eq!(verdict("v5", &["--max-lossless-decomp-us", "899"]), Status::Fail);
        assert_eq!(verdict("v6", &["--require-decode-cache-hit"]), Status::Pass);
        assert_eq!(verdict("v6", &["--require-decode-cache-activity"]), Status::Fail, "no column of misses");
        let baseline = ["--decode-baseline", "10", "--decode-drop-target", "0.05"];
        assert_eq!(verdict("v6", &baseline), Status::Pass, "the best");
        for (aggregation, status, value) in [
            ("avg", Status::Fail, "9.0"),
            ("median", Status::Fail, "9.0"),
            ("p90", Status::Pass, "10.0"),
            ("best", Status::Pass, "10.0"),
        ] {
            let flags = [&baseline[..], &["--kit", "final", "--decode-gate-aggregation", aggregation]].concat();
            let (verdict, text) = run(&csv, &flags).unwrap();
            assert_eq!(verdict, status, "{aggregation}");
            holds(
                &text,
                &[&format!("decode_gate_value: {value}000"), &format!("decode_gate_aggregation: {aggregation}")],
            );
        }
    }

    #[test]
    fn consistency_needs_clean_logs_and_counters_that_fit_the_mode() {
        let folder = tempfile::tempdir().unwrap();
        let csv = "h2o_lossy,h2o_lossless,h2o_lossless_decomp_us,h2o_lossless_fallback,h2o_lossless_async_queue_peak\n3.1,1.4,0,0,2\n";
        fs::write(folder.path().join("a.log"), "fine\nInvalid KV length\n").unwrap();
        let logs = folder.path().to_str().unwrap();
        let verdict = |flags: &[&str]| {
            run(csv, &[&["--kit", "final", "--require-kv-content-consistency"][..], flags].concat()).unwrap().0
        };
        assert_eq!(verdict(&["--async-threads", "2"]), Status::Pass);
        assert_eq!(verdict(&["--runtime-mode", "store"]), Status::Fail, "nothing was decompressed");
        assert_eq!(verdict(&["--logs-dir", logs]), Status::Fail);
        assert_eq!(verdict(&["--logs-dir", logs, "--max-kv-invalid-log-lines", "1"]), Status::Pass);
    }

    #[test]
    fn flags_of_later_kits_and_bad_offline_results_are_refused() {
        for (kit, flag) in [
            ("v2", ["--decode-baseline", "6.6"]),
            ("v3", ["--max-lossless-fallback", "0"]),
            ("v4", ["--max-lossless-decomp-us", "1"]),
        ] {
            let error = run(ROW, &[&["--kit", kit][..], &flag].concat()).unwrap_err().to_string();
            assert!(error.starts_with(flag[0]) && error.ends_with(&format!("or later, got {kit}")), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("offline.json");
        let flags = ["--offline-lossless-json", path.to_str().unwrap()];
        for (text, message) in [("{", "expected JSON"), ("{}", "got null"), ("{\"lossless_ratio\": 0}", "got 0")] {
            fs::write(&path, text).unwrap();
            assert!(run(ROW, &flags).unwrap_err().to_string().contains(message));
        }
        fs::write(&path, "{\"lossless_ratio\": 1.5, \"selected_layers\": [0, 1]}").unwrap();
        let (status, text) = run(ROW, &flags).unwrap();
        assert_eq!(status, Status::Pass);
        holds(&text, &["lossless_selected_source: offline_upper_bound", "upper_selected_layers: [0, 1]"]);
        fs::write(&path, "{\"weighted_lossless_ratio\": 1.5, \"complete\": false}").unwrap();
        assert_eq!(run(ROW, &flags).unwrap().0, Status::Fail);
    }

    #[test]
    fn first_of_several_best_rows_counts() {
        assert_eq!((best(&[1.0, 3.0, 3.0]), best(&[-1.0, -2.0])), (1, 0));
    }
}
