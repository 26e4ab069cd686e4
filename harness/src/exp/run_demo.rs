//! `exp run-demo`: an engine decodes prompt files and dumps its cache, one run folder for each.
//!
//! The reference searched the output for patterns that never matched, let the lines of a file become sequences of one run, and ended well
//! whatever happened.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, ValueEnum};
use gearbox_core::{Error, Result};
use serde::Serialize;
use serde_json::json;

use super::engine::{Ended, Engine, TimeoutArgs};
use crate::dump::check_run_name;
use crate::report;
use crate::status::Status;

/// The subcommand of this program that is the engine if none is given.
const OWN_ENGINE: &str = "llm-demo";

/// Lets an engine decode prompt files and dump its cache.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "The engine is called with config, prompt file and number of tokens, and with MNN_KV_DUMP_DIR, _RUN_ID, _STAGE and _MAX_TOKENS in its
environment. A run that crashes, hangs, prints no token counts or dumps nothing leaves no dump; the others go on. Exit status: 0, or 2 if one
failed. Every run has a line in the log."
)]
pub struct RunDemoArgs {
    /// Program with the reference's arguments [default: `gearbox llm-demo`]
    #[arg(long, value_name = "PROGRAM")]
    llm_demo: Option<PathBuf>,
    /// Config of the model
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Folder whose `.txt` files are prompts, in the order of their names
    #[arg(long, value_name = "DIR")]
    prompt_dir: Option<PathBuf>,
    /// Prompts that come before those of the folder
    #[arg(long, value_name = "FILE", num_args = 0..)]
    prompt_files: Vec<PathBuf>,
    /// What is one prompt
    #[arg(long, value_enum, default_value_t = PromptFileMode::Whole)]
    prompt_file_mode: PromptFileMode,
    /// Tokens to decode, at most
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    decode_tokens: u32,
    /// Folder for the dumps; created if needed
    #[arg(long, value_name = "DIR", default_value = "exp/gear_fp16/dumps_raw")]
    dump_dir: PathBuf,
    /// Runs are named after it and their prompt file
    #[arg(long, value_name = "NAME", default_value = "demo")]
    run_prefix: String,
    /// Entries of one phase only
    #[arg(long, value_name = "STAGE", default_value = "both", value_parser = ["prefill", "decode", "both"])]
    stage: String,
    /// Tokens of an entry, at most; 0 has no limit
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    max_dump_tokens: u32,
    /// File that a line of JSON is added to for every run; its folder is created if needed
    #[arg(long, value_name = "FILE", default_value = "exp/gear_fp16/out/llm_demo_runs.jsonl")]
    log_file: PathBuf,
    /// More environment of the engine; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    extra_env: Vec<Variable>,
    #[command(flatten)]
    timeout: TimeoutArgs,
}

/// What is one prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PromptFileMode {
    /// The whole file
    Whole,
    /// Each line, as engines take it that know no other way; their run is a mixture of sequences
    Lines,
}

/// One variable of the environment.
#[derive(Clone, Debug)]
struct Variable(String, String);

impl FromStr for Variable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').ok_or_else(|| format!("expected KEY=VALUE, got `{text}`"))?;
        if key.is_empty() {
            Err("expected a name before `=`, got none".to_owned())
        } else {
            Ok(Self(key.into(), value.into()))
        }
    }
}

/// One line of the log: the reference's fields, then why the run does not count.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Record {
    prompt_file: String,
    run_id: String,
    returncode: i32,
    metrics: Metrics,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// What the engine printed of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Metrics {
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    decode_tokens: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    decode_s: Option<f64>,
}

impl Metrics {
    fn of(ended: &Ended) -> Self {
        let texts = [ended.stdout.as_str(), &ended.stderr];
        Self {
            prompt_tokens: labelled(texts, "prompt tokens num"),
            decode_tokens: labelled(texts, "decode tokens num"),
            prefill_s: labelled(texts, "prefill time"),
            decode_s: labelled(texts, "decode time"),
        }
    }
}

/// The first number of the form `label = 1.5`.
fn labelled<T: FromStr>(texts: [&str; 2], label: &str) -> Option<T> {
    texts.iter().flat_map(|text| text.split(label).skip(1)).find_map(|rest| {
        let line = rest.lines().next()?.trim_start().strip_prefix('=')?.trim_start();
        let end = line.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(line.len());
        line[..end].parse().ok()
    })
}

impl RunDemoArgs {
    /// Runs all prompts and prints where the log is.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) without prompts, for two prompts of one name and for existing runs;
    /// else what starting the engine, reading and writing report. Runs that fail are in the log.
    pub fn run(&self, json: bool) -> Result<Status> {
        let engine = Engine::new(self.llm_demo.as_deref(), OWN_ENGINE, self.timeout)?;
        let prompts = self.prompts()?;
        let folder = self.log_file.parent().unwrap_or(Path::new(""));
        for folder in [folder, &self.dump_dir] {
            fs::create_dir_all(folder).map_err(|error| Error::io(folder, &error))?;
        }
        let failed = |error: std::io::Error| Error::io(&self.log_file, &error);
        let mut log = fs::OpenOptions::new().append(true).create(true).open(&self.log_file).map_err(failed)?;
        let mut records = Vec::with_capacity(prompts.len());
        for (idx, (run_id, path)) in prompts.iter().enumerate() {
            tracing::info!("{} of {}: {run_id}", idx + 1, prompts.len());
            let record = self.decode(&engine, run_id, path)?;
            if let Some(error) = &record.error {
                tracing::warn!("{run_id}: {error}");
            }
            let line = serde_json::to_string(&record).map_err(|error| Error::invalid_input(error.to_string()))?;
            log.write_all(format!("{line}\n").as_bytes()).map_err(failed)?;
            records.push(record);
        }
        let bad = records.iter().filter(|record| record.error.is_some()).count();
        if json {
            report::print_json(&json!({ "log": self.log_file, "runs": records, "failed": bad }))?;
        } else {
            report::print(&format!("Wrote {}", self.log_file.display()))?;
            report::print(&format!("Runs: {}, failed: {bad}", records.len()))?;
        }
        Ok(if bad == 0 { Status::Pass } else { Status::BadInput })
    }

    /// Run ids and files, in order.
    fn prompts(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut paths = self.prompt_files.clone();
        if let Some(folder) = &self.prompt_dir {
            let mut files = Vec::new();
            for item in fs::read_dir(folder).map_err(|error| Error::io(folder, &error))? {
                let path = item.map_err(|error| Error::io(folder, &error))?.path();
                files.extend(path.extension().is_some_and(|ending| ending == "txt").then_some(path.clone()));
            }
            files.sort();
            paths.extend(files);
        }
        let mut seen = BTreeSet::new();
        let mut prompts = Vec::new();
        for path in paths {
            let metadata = fs::metadata(&path).map_err(|error| Error::io(&path, &error))?;
            let shown = path.display();
            if metadata.len() == 0 {
                return Err(Error::invalid_input(format!("`{shown}`: expected a prompt, got an empty file")));
            }
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let run_id = format!("{}_{stem}", self.run_prefix);
            check_run_name(&run_id).map_err(|error| error.context(format!("`{shown}`")))?;
            let dump = self.dump_dir.join(&run_id);
            if dump.exists() {
                return Err(Error::invalid_input(format!(
                    "`{}`: exists already; name a new --run-prefix",
                    dump.display()
                )));
            }
            if !seen.insert(run_id.clone()) {
                return Err(Error::invalid_input(format!("`{shown}`: another prompt is of the run `{run_id}` too")));
            }
            prompts.push((run_id, path));
        }
        if prompts.is_empty() {
            return Err(Error::invalid_input("expected prompts in --prompt-files or --prompt-dir, got none"));
        }
        Ok(prompts)
    }

    /// Runs the engine once; the dump gets its name if all went well.
    fn decode(&self, engine: &Engine, run_id: &str, prompt: &Path) -> Result<Record> {
        let failed = |error: std::io::Error| Error::io(&self.dump_dir, &error);
        let work = tempfile::Builder::new().prefix(".run").tempdir_in(&self.dump_dir).map_err(failed)?;
        let mut command = engine.command();
        command.arg(&self.config).arg(prompt).arg(self.decode_tokens.to_string());
        if self.prompt_file_mode == PromptFileMode::Whole {
            command.args(["--prompt-file-mode", "whole"]);
        }
        command.envs(self.extra_env.iter().map(|Variable(key, value)| (key, value)));
        command.env("MNN_KV_DUMP_DIR", work.path());
        command.env("MNN_KV_DUMP_RUN_ID", run_id).env("MNN_KV_DUMP_STAGE", &self.stage);
        if self.max_dump_tokens > 0 {
            command.env("MNN_KV_DUMP_MAX_TOKENS", self.max_dump_tokens.to_string());
        }
        let ended = engine.run(command)?;
        let metrics = Metrics::of(&ended);
        let dump = work.path().join(run_id);
        let missing = [
            (metrics.prompt_tokens.is_none(), "the engine printed no `prompt tokens num = …`"),
            (!dump.is_dir(), "the engine dumped nothing"),
        ];
        let error = ended
            .error()
            .or_else(|| missing.iter().find(|(is_missing, _)| *is_missing).map(|(_, message)| (*message).to_owned()));
        if error.is_none() {
            fs::rename(&dump, self.dump_dir.join(run_id)).map_err(failed)?;
        }
        let prompt_file = prompt.display().to_string();
        Ok(Record { prompt_file, run_id: run_id.to_owned(), returncode: ended.code, metrics, error })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use serde_json::Value;

    use super::*;
    use crate::exp::samples::parse;

    /// What the engine prints if all goes well.
    const WELL: &str = "mkdir -p $MNN_KV_DUMP_DIR/$MNN_KV_DUMP_RUN_ID\n\
                        echo 'prompt tokens num = 5'; echo ' decode tokens num = 3'\n\
                        echo 'prefill time = 0.50 s'; echo ' decode time = 1.25 s' >&2";

    /// Runs prompts `a`, `b`, … with a script and gives status and log.
    fn run(folder: &Path, script: &str, prompts: &[&str], flags: &[&str]) -> Result<(Status, Vec<Value>)> {
        let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
        let _ = fs::create_dir(path("prompts"));
        for name in prompts {
            fs::write(path(&format!("prompts/{name}.txt")), "two\nlines").unwrap();
        }
        fs::write(path("engine.sh"), format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(path("engine.sh"), fs::Permissions::from_mode(0o755)).unwrap();
        let (engine, log) = (path("engine.sh"), path("out/log.jsonl"));
        let (dir, dumps) = (path("prompts"), path("dumps"));
        let paths = ["--llm-demo", &engine, "--config", "model.json", "--log-file", &log, "--dump-dir", &dumps];
        let status =
            parse::<RunDemoArgs>(&[&paths[..], &["--prompt-dir", &dir], flags].concat()).unwrap().run(false)?;
        let text = fs::read_to_string(&log).unwrap();
        Ok((status, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()))
    }

    fn names(folder: &Path) -> Vec<String> {
        let items = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = items.map(|item| item.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn every_prompt_is_one_run_with_its_metrics() {
        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "{WELL}\necho \"$@\" $MNN_KV_DUMP_STAGE $MNN_KV_DUMP_MAX_TOKENS $X > $MNN_KV_DUMP_DIR/$MNN_KV_DUMP_RUN_ID/seen"
        );
        let flags = ["--decode-tokens", "7", "--stage", "decode", "--max-dump-tokens", "9", "--extra-env", "X=y=z"];
        let (status, log) = run(folder.path(), &script, &["b", "a"], &flags).unwrap();
        assert_eq!(status, Status::Pass);
        let ids: Vec<_> = log.iter().map(|record| record["run_id"].as_str().unwrap()).collect();
        assert_eq!(ids, ["demo_a", "demo_b"]);
        let metrics = json!({ "prompt_tokens": 5, "decode_tokens": 3, "prefill_s": 0.5, "decode_s": 1.25 });
        assert_eq!((&log[0]["metrics"], &log[0]["returncode"], log[0].get("error")), (&metrics, &json!(0), None));
        let prompt = folder.path().join("prompts/a.txt");
        let seen = fs::read_to_string(folder.path().join("dumps/demo_a/seen")).unwrap();
        assert_eq!(seen, format!("model.json {} 7 --prompt-file-mode whole decode 9 y=z\n", prompt.display()));
        assert_eq!(names(&folder.path().join("dumps")), ["demo_a", "demo_b"]);

        let error = run(folder.path(), WELL, &[], &[]).unwrap_err().to_string();
        assert!(error.contains("demo_a`: exists already"), "{error}");
        let more = ["--run-prefix", "next", "--prompt-file-mode", "lines"];
        assert_eq!(run(folder.path(), WELL, &[], &more).unwrap().1.len(), 4, "the log grows");
    }

    #[test]
    fn runs_that_fail_are_named_leave_no_dump_and_the_others_go_on() {
        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "case $2 in\n*a.txt) {WELL}; exit 3 ;;\n*b.txt) {WELL}; sleep 600 ;;\n*c.txt) printf '\\377\\n' ;;\n\
             *d.txt) echo 'prompt tokens num = 5' ;;\n*) {WELL} ;;\nesac"
        );
        let (status, log) = run(folder.path(), &script, &["a", "b", "c", "d", "e"], &["--timeout", "10"]).unwrap();
        assert_eq!(status, Status::BadInput);
        let errors: Vec<_> = log.iter().map(|record| record["error"].as_str().unwrap_or_default()).collect();
        assert_eq!(errors[0], "the engine ended with exit status 3: decode time = 1.25 s");
        assert!(errors[1].starts_with("the engine took longer than 10 s"), "{}", errors[1]);
        let rest = ["the engine printed no `prompt tokens num = …`", "the engine dumped nothing", ""];
        assert_eq!(errors[2..], rest);
        assert_eq!(names(&folder.path().join("dumps")), ["demo_e"]);
    }

    #[test]
    fn bad_prompts_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(run(folder.path(), WELL, &[], &[]).unwrap_err().to_string().contains("got none"));
        let twin = folder.path().join("a.txt");
        fs::write(&twin, "x").unwrap();
        let error = run(folder.path(), WELL, &["a"], &["--prompt-files", twin.to_str().unwrap()]).unwrap_err();
        assert!(error.to_string().contains("another prompt is of the run `demo_a` too"), "{error}");
        fs::write(folder.path().join("prompts/b c.txt"), "x").unwrap();
        assert!(run(folder.path(), WELL, &[], &[]).unwrap_err().to_string().contains("b c.txt"));
        fs::write(folder.path().join("prompts/a.txt"), "").unwrap();
        assert!(run(folder.path(), WELL, &[], &[]).unwrap_err().to_string().contains("got an empty file"));
        assert!(parse::<RunDemoArgs>(&["--config", "c", "--extra-env", "X"]).is_err());
    }

    #[test]
    fn numbers_are_found_behind_their_labels() {
        let text = "prompt tokens num: 4\nprompt tokens num = x\n  prompt tokens num=12, …\nprompt tokens num = 13";
        assert_eq!(labelled::<u64>(["", text], "prompt tokens num"), Some(12));
        assert_eq!(labelled::<f64>([" decode time = 0.25 s", ""], "decode time"), Some(0.25));
        assert_eq!(labelled::<u64>(["decode time", "="], "decode time"), None);
    }
}
