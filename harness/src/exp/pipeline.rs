//! `exp pipeline`: prompts, an engine that dumps its cache, F16, ratios, and a round trip of everything that was measured.
//!
//! The reference analysed every dump that was ever made in its folders, left out engines that dump F16, and verified nothing.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use gearbox_core::{DType, Error, Registry, Result};
use serde_json::json;

use super::flags::Flags;
use super::gear_fp16::GearFp16Args;
use super::run_demo::RunDemoArgs;
use super::verify_roundtrip::verify;
use crate::dump::{self, ConvertOptions, Dump, Format};
use crate::prompts::PromptsArgs;
use crate::report;
use crate::select::SelectArgs;
use crate::status::Status;

/// Makes prompts, dumps an engine's cache, measures it and verifies the round trip.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Steps: `prompts`, `exp run-demo`, `dump convert`, `exp gear-fp16` and the check of `exp verify-roundtrip`; the first that fails ends it
with its exit status. Only dumps of this run id are converted and measured; with --skip-demo and no run id, all. With --json every step prints
its own document."
)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub struct PipelineArgs {
    /// Name of this run [default: the time in UTC]
    #[arg(long, value_name = "NAME", default_value = "auto")]
    run_id: String,
    #[command(flatten)]
    demo: DemoArgs,
    #[command(flatten)]
    prompts: PromptFlags,
    /// Folder for F16 dumps; created if needed
    #[arg(long, value_name = "DIR", default_value = "exp/gear_fp16/dumps_fp16")]
    fp16_dump_dir: PathBuf,
    /// Folder for results; created if needed, with a folder for the run in it
    #[arg(long, value_name = "DIR", default_value = "exp/gear_fp16/out")]
    out_dir: PathBuf,
    /// Effort of zstd: negative is fastest, 22 smallest, 0 the library's default
    #[arg(long, value_name = "LEVEL", default_value_t = 3, allow_negative_numbers = true)]
    zstd_level: i32,
    /// Which entries are converted and measured; the engine dumps this stage only
    #[command(flatten)]
    select: SelectArgs,
    /// Leave out single heads and `head_metrics.csv`
    #[arg(long)]
    skip_head_metrics: bool,
    /// Decode nothing: the dumps are there
    #[arg(long)]
    skip_demo: bool,
    /// Convert nothing: the F16 dumps are there
    #[arg(long)]
    skip_convert: bool,
    /// Measure and verify nothing
    #[arg(long)]
    skip_analyze: bool,
}

/// The engine and its dumps.
#[derive(Clone, Debug, Args)]
struct DemoArgs {
    /// Program with the reference's arguments [default: `gearbox llm-demo`]
    #[arg(long, value_name = "PROGRAM")]
    llm_demo: Option<PathBuf>,
    /// Config of the model
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Folder of prompts; those that are made get a folder for the run in it
    #[arg(long, value_name = "DIR", default_value = "exp/gear_fp16/prompts")]
    prompt_dir: PathBuf,
    /// Prompts that come before those of the folder
    #[arg(long, value_name = "FILE", num_args = 0..)]
    prompt_files: Vec<PathBuf>,
    /// Tokens to decode, at most
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    decode_tokens: u32,
    /// Folder for the engine's dumps; created if needed
    #[arg(long, value_name = "DIR", default_value = "exp/gear_fp16/dumps_raw")]
    dump_dir: PathBuf,
    /// Tokens of an entry, at most; 0 has no limit
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    max_dump_tokens: u32,
    /// Dumps are named after it, the run and their prompt file
    #[arg(long, value_name = "NAME", default_value = "demo")]
    run_prefix: String,
    /// Log of the engine's runs [default: `llm_demo_runs.jsonl` beside the results]
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// More environment of the engine; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    extra_env: Vec<String>,
}

/// The flags of `prompts`, whose defaults hold where none is given.
#[derive(Clone, Debug, Args)]
struct PromptFlags {
    /// Make prompts, as a corpus does too
    #[arg(long, requires = "corpus")]
    gen_prompts: bool,
    /// Texts to make prompts from
    #[arg(long, value_name = "PATH", num_args = 1..)]
    corpus: Vec<PathBuf>,
    /// Lengths in tokens [default: 128,512,2048]
    #[arg(long, value_name = "TOKENS,…")]
    prompt_targets: Option<String>,
    /// Prompts of each length [default: 3]
    #[arg(long, value_name = "COUNT")]
    prompt_per_target: Option<String>,
    /// What counts tokens [default: auto]
    #[arg(long, value_name = "NAME")]
    prompt_tokenizer: Option<String>,
    /// Folder with a tokenizer.json
    #[arg(long, value_name = "DIR")]
    prompt_hf_path: Option<String>,
    /// Share of the length by which a prompt may differ [default: 0.05]
    #[arg(long, value_name = "SHARE")]
    prompt_tolerance: Option<String>,
    /// Shortest piece of a text, in characters [default: 200]
    #[arg(long, value_name = "CHARS")]
    prompt_min_piece_chars: Option<String>,
    /// What rows of JSON hold [default: auto]
    #[arg(long, value_name = "NAME")]
    prompt_jsonl_format: Option<String>,
    /// Seed of the order of pieces [default: 42]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    prompt_seed: Option<String>,
    /// Never count words in place of a tokenizer that cannot be read
    #[arg(long)]
    prompt_strict: bool,
    /// Replace existing prompts
    #[arg(long)]
    prompt_overwrite: bool,
}

/// Names of one run.
struct Names {
    run_id: String,
    /// What the names of its dumps begin with, an underscore aside.
    prefix: String,
    prompts: PathBuf,
    out: PathBuf,
    log: PathBuf,
    /// Whether dumps of other runs are left alone.
    is_scoped: bool,
}

impl PipelineArgs {
    /// Runs all steps; each prints what it wrote.
    ///
    /// # Errors
    /// What the steps report.
    pub fn run(&self, registry: &Registry, json: bool) -> Result<Status> {
        let names = self.names()?;
        Self::announce(&names, json)?;
        let steps: [(bool, &dyn Fn() -> Result<Status>); 4] = [
            (!self.prompts.corpus.is_empty(), &|| self.make_prompts(&names, json)),
            (!self.skip_demo, &|| self.decode(&names, json)),
            (!self.skip_convert, &|| self.convert(&names, json)),
            (!self.skip_analyze, &|| self.analyze(&names, registry, json)),
        ];
        for (_, step) in steps.into_iter().filter(|(is_wanted, _)| *is_wanted) {
            let status = step()?;
            if status != Status::Pass {
                return Ok(status);
            }
        }
        Ok(Status::Pass)
    }

    fn names(&self) -> Result<Names> {
        let is_auto = self.run_id.is_empty() || self.run_id == "auto";
        let run_id = if is_auto { now() } else { self.run_id.clone() };
        dump::check_run_name(&run_id)?;
        let DemoArgs { prompt_dir, run_prefix, log_file, .. } = &self.demo;
        let prompts = if self.prompts.corpus.is_empty() { prompt_dir.clone() } else { prompt_dir.join(&run_id) };
        let out = self.out_dir.join(&run_id);
        let log = log_file.clone().unwrap_or_else(|| out.join("llm_demo_runs.jsonl"));
        let prefix = if run_prefix.is_empty() { run_id.clone() } else { format!("{run_prefix}_{run_id}") };
        Ok(Names { run_id, prefix, prompts, out, log, is_scoped: !(is_auto && self.skip_demo) })
    }

    fn announce(names: &Names, json: bool) -> Result<()> {
        let Names { run_id, prefix, prompts, out, log, .. } = names;
        if json {
            return report::print_json(&json!({
                "run_id": run_id, "prompt_dir": prompts, "out_dir": out, "log_file": log, "run_prefix": prefix,
            }));
        }
        report::print(&format!("[run_id] {run_id}\n[prompt_dir] {}", prompts.display()))?;
        report::print(&format!("[out_dir] {}\n[log_file] {}\n[run_prefix] {prefix}", out.display(), log.display()))
    }

    fn make_prompts(&self, names: &Names, json: bool) -> Result<Status> {
        let given = &self.prompts;
        let flags = Flags::default().value("config", &self.demo.config).value("out-dir", &names.prompts);
        let flags = flags.values("corpus", &given.corpus).values("targets", &given.prompt_targets);
        let flags = flags.values("per-target", &given.prompt_per_target).values("tokenizer", &given.prompt_tokenizer);
        let flags = flags.values("hf-path", &given.prompt_hf_path).values("tolerance", &given.prompt_tolerance);
        let flags = flags.values("min-piece-chars", &given.prompt_min_piece_chars);
        let flags = flags.values("jsonl-format", &given.prompt_jsonl_format).values("seed", &given.prompt_seed);
        let flags = flags.switch("strict", given.prompt_strict).switch("overwrite", given.prompt_overwrite);
        flags.parse::<PromptsArgs>()?.run(json)
    }

    fn decode(&self, names: &Names, json: bool) -> Result<Status> {
        let demo = &self.demo;
        let flags = Flags::default().values("llm-demo", &demo.llm_demo).value("config", &demo.config);
        let flags = flags.values("prompt-files", &demo.prompt_files).value("dump-dir", &demo.dump_dir);
        let is_given = !names.prompts.as_os_str().is_empty();
        let flags = flags.values("prompt-dir", is_given.then_some(&names.prompts));
        let flags = flags.value("decode-tokens", demo.decode_tokens.to_string()).value("run-prefix", &names.prefix);
        let flags = flags.value("stage", &self.select.stage).value("log-file", &names.log);
        let flags = flags.value("max-dump-tokens", demo.max_dump_tokens.to_string());
        flags.values("extra-env", &demo.extra_env).parse::<RunDemoArgs>()?.run(json)
    }

    fn convert(&self, names: &Names, json: bool) -> Result<Status> {
        let (source, status) = self.open(&self.demo.dump_dir, names)?;
        // An engine that dumps F16 needs no rounding.
        let options = ConvertOptions {
            format: Format::Reference,
            dtype: Some(DType::F16),
            allow_fp16: true,
            ..ConvertOptions::default()
        };
        let converted = dump::convert(&source, &self.fp16_dump_dir, &options)?;
        if json {
            report::print_json(&converted)?;
        } else {
            report::print(converted.to_string().trim_end())?;
        }
        Ok(status.and(if converted.findings.is_clean() { Status::Pass } else { Status::BadInput }))
    }

    fn analyze(&self, names: &Names, registry: &Registry, json: bool) -> Result<Status> {
        let (dump, status) = self.open(&self.fp16_dump_dir, names)?;
        let flags = Flags::default().value("dump-dir", &self.fp16_dump_dir).value("out-dir", &names.out);
        let flags = flags.value("zstd-level", self.zstd_level.to_string());
        let flags = flags.values("run-log", names.log.is_file().then_some(&names.log));
        let flags = flags.switch("skip-head-metrics", self.skip_head_metrics);
        let measured = flags.parse::<GearFp16Args>()?.measure(&dump, status, json)?;
        let verified = verify(&dump, registry, 0)?;
        if json {
            report::print_json(&verified)?;
        } else {
            report::print(&format!("Checked: {}, Failed: {}", verified.checked, verified.failures.len()))?;
        }
        Ok(if verified.failures.is_empty() { measured } else { Status::Fail })
    }

    /// The dumps of this run, or all of the folder.
    fn open(&self, path: &Path, names: &Names) -> Result<(Dump, Status)> {
        let mut dump = Dump::open(path, &self.select.selection())?;
        if names.is_scoped {
            let head = format!("{}_", names.prefix);
            dump.runs.retain(|run| run.name.starts_with(&head));
            let is_here = |place: &str| Path::new(place).iter().any(|part| part.to_string_lossy().starts_with(&head));
            dump.findings.list.retain(|finding| is_here(&finding.place));
        }
        if dump.runs.is_empty() {
            let (path, prefix) = (path.display(), &names.prefix);
            return Err(Error::invalid_input(format!("`{path}`: expected dumps of the run `{prefix}`, got none")));
        }
        let status = self.select.judge(&dump)?;
        Ok((dump, status))
    }
}

/// The time in UTC, as `20260205_102843`.
fn now() -> String {
    stamp(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

/// Seconds since 1970 as a date and a time (after Hinnant, *`chrono`-compatible low-level date algorithms*: days from March of year 0).
fn stamp(seconds: u64) -> String {
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_of_year = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_of_year + 2) / 5 + 1;
    let month = if month_of_year < 10 { month_of_year + 3 } else { month_of_year - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}{month:02}{day:02}_{hour:02}{minute:02}{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_dates() {
        for (seconds, expected) in [
            (0, "19700101_000000"),
            (951_782_400, "20000229_000000"),
            (1_770_287_323, "20260205_102843"),
            (1_893_455_999, "20291231_235959"),
        ] {
            assert_eq!(stamp(seconds), expected);
        }
    }
}
