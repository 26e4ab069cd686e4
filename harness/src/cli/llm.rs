//! `gearbox llm-bench` and `gearbox llm-demo`: the reference's engines, with its flags.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use gearbox_core::{Error, Registry, Result, ResultExt};
use gearbox_model::Model;
use serde_json::json;

use super::model::{ModelArgs, read_text};
use crate::atomic::AtomicFile;
use crate::exp::h2o::Kit;
use crate::llm::demo::{self, DumpOptions, Total};
use crate::llm::{Engine, Precision, Runtime, bench};
use crate::report;
use crate::status::Status;

/// Flags of the reference that are words behind one dash, which reads as many flags of a letter.
const WORDS: [&str; 5] = ["qatten", "kv", "rep", "fp", "load"];

/// The arguments of the process, with the reference's words behind two dashes.
pub(super) fn arguments(arguments: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    let mut is_bench = false;
    arguments.map(move |argument| {
        is_bench |= argument == "llm-bench";
        let word = argument.to_str().and_then(|text| text.strip_prefix('-')).filter(|word| WORDS.contains(word));
        match word.filter(|_| is_bench) {
            Some(word) => format!("--{word}").into(),
            None => argument,
        }
    })
}

/// Times requests through the cache that a runtime config of the reference asks for.
///
/// `kv_h2o_*` becomes the policy `h2o` in mode `reference` over its layers, `kv_lossless_*` the codec `gear-delta` over its layers, in chunks of
/// `kv_lossless_block_tokens` behind the newest `kv_lossless_hot_recent_tokens`. Chunks are the storage that attention reads, so the
/// lossless columns are of bytes really stored and decoded; keys about samples, queues, decode caches and predictors have no effect.
/// One run that does not count comes before the repeats. Prompt and decoded tokens are text, the same in each. The model is that of --model
/// or --hub, else that in `base_dir` or beside the config, else the bundled one.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox llm-bench -m runtime.json -p 512 -n 128 -rep 3 -fp bench.log
  gearbox llm-bench -m runtime.json -a cpu -t 4 -qatten 0 -kv true -p 1024 -n 128 -rep 5 -j bench.json
  gearbox exp h2o-bench --base-config model/config.json --h2o-trigger-min-tokens 384 --out-dir out
  gearbox exp h2o-parse --log-files bench.log --out-csv rows.csv

-qatten, -kv, -rep, -fp and -load may be written with one dash, as the reference has them. A cell without a measurement is n/a.
Exit status: 0; 1 if repeats or compressed and raw chunks give different logits; 2 usage or data error, with no log written.")]
pub(super) struct BenchArgs {
    /// Runtime config of the reference, or a folder with a config.json
    #[arg(short = 'm', long = "config", value_name = "CONFIG")]
    config: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// What to compute on
    #[arg(short = 'a', long, value_name = "NAME", default_value = "cpu", value_parser = ["cpu"])]
    backend: String,
    /// Threads
    #[arg(short = 't', long, value_name = "N", default_value_t = 4)]
    threads: usize,
    /// Element type of the cache: 2 (low) is F16; 0 (normal) and 1 (high) are F32
    #[arg(short = 'c', long, value_name = "NUMBER", default_value_t = 2, value_parser = clap::value_parser!(u8).range(..=2))]
    precision: u8,
    /// Kind of attention; only 0, over keys and values that are not quantised
    #[arg(long, value_name = "NUMBER", default_value_t = 0, value_parser = clap::value_parser!(u8).range(..=0))]
    qatten: u8,
    /// Requests with a cache; only true
    #[arg(long, value_name = "BOOL", default_value = "true", value_parser = ["true"])]
    kv: String,
    /// Tokens of the prompt
    #[arg(short = 'p', long, value_name = "TOKENS", default_value_t = 512)]
    prompt: usize,
    /// Tokens to decode
    #[arg(short = 'n', long, value_name = "TOKENS", default_value_t = 128)]
    tokens: usize,
    /// Repeats that count
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    rep: usize,
    /// Log that the table is added to
    #[arg(long, value_name = "FILE")]
    fp: Option<PathBuf>,
    /// File for the reference's JSON, with the whole request's ledger beside it
    #[arg(short = 'j', value_name = "FILE")]
    json_file: Option<PathBuf>,
    /// Whether the time of loading gets a column
    #[arg(long, value_name = "BOOL", default_value_t = false, action = clap::ArgAction::Set)]
    load: bool,
    /// Revision whose columns are written [default: the newest whose keys are in the config]
    #[arg(long, value_enum)]
    kit: Option<Kit>,
    /// Text that the tokens are from [default: the opening of a novel]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// One token id again and again in place of a text: the reference's prompt is 16
    #[arg(long, value_name = "ID", conflicts_with = "text")]
    prompt_token: Option<u32>,
    /// Leave out unknown keys and take illegal values as the reference takes them
    #[arg(long)]
    lenient: bool,
    /// Replace an existing JSON file
    #[arg(long)]
    overwrite: bool,
}

impl BenchArgs {
    pub(super) fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        let runtime = Runtime::read(&self.config, self.kit, self.lenient)?;
        let text = self.text.as_deref().map(read_text).transpose()?;
        let json_file = self.json_file.as_deref().map(|path| AtomicFile::create(path, self.overwrite)).transpose()?;
        let folder = folder(&self.model, &runtime)?;
        let start = Instant::now();
        let model = Model::load(&folder)?;
        let loading = self.load.then(|| start.elapsed().as_secs_f64());
        let options = bench::Options {
            kit: runtime.kit(),
            precision: [Precision::Normal, Precision::High, Precision::Low][usize::from(self.precision)],
            prompt: self.prompt,
            tokens: self.tokens,
            repeat: self.rep,
            text: text.as_deref(),
            token: self.prompt_token,
            lenient: self.lenient,
        };
        let about = bench::About { folder: &folder, threads: self.threads, loading };
        let found = bench::run(&model, &runtime, registry, &options, &about)?;
        found.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        if let Some(file) = json_file {
            file.commit_json(&found.json)?;
        }
        if let Some(log) = &self.fp {
            found.table.append(log)?;
        }
        if json {
            return report::print_json(&found.json).map(|()| Status::Pass);
        }
        found.lines.iter().try_for_each(|line| report::print(line))?;
        report::print(&found.table.to_string())?;
        Ok(Status::Pass)
    }
}

/// The folder of the model: that of the flags, else that of the config, else the bundled one.
fn folder(flags: &ModelArgs, runtime: &Runtime) -> Result<PathBuf> {
    if let Some(folder) = flags.folder()? {
        return Ok(folder);
    }
    if let Some(folder) = runtime.model_folder() {
        return Ok(folder.to_path_buf());
    }
    tracing::info!("the config names no model: the bundled one is used");
    gearbox_model::bundled()
}

/// What is one prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PromptFileMode {
    /// The whole file
    Whole,
    /// Each line, but for empty ones and those that begin with #
    Lines,
}

/// Decodes the prompts of a file, and dumps the cache.
///
/// The dump is one folder in the reference layout, with queries and token ids beside keys (after RoPE) and values. It is written if
/// `MNN_KV_DUMP_DIR` is set, under the name `MNN_KV_DUMP_RUN_ID`; `MNN_KV_DUMP_STAGE` (prefill, decode, both) and `MNN_KV_DUMP_MAX_TOKENS` choose
/// entries. Keys of the config are those of `llm-bench`; `precision` `low` makes cache and dump F16, `normal` and `high` F32.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox llm-demo runtime.json prompt.txt 128 --prompt-file-mode whole
  MNN_KV_DUMP_DIR=dumps MNN_KV_DUMP_RUN_ID=a MNN_KV_DUMP_STAGE=both gearbox llm-demo runtime.json prompt.txt 16 --prompt-file-mode whole
  gearbox exp run-demo --config runtime.json --prompt-dir prompts --dump-dir dumps

Decoding takes the most probable token, and ends at the end of the text or of the model's context. Exit status: 0, or 2 for bad input, which
leaves no dump behind.")]
pub(super) struct DemoArgs {
    /// Runtime config of the reference, or a folder with a config.json
    config: PathBuf,
    /// Text with the prompts
    file: PathBuf,
    /// Tokens to decode behind each, at most
    #[arg(default_value_t = 128)]
    tokens: usize,
    /// What is one prompt; a dump takes one
    #[arg(long, value_enum, default_value_t = PromptFileMode::Lines)]
    prompt_file_mode: PromptFileMode,
    #[command(flatten)]
    model: ModelArgs,
    /// File that a line of JSON is added to for every prompt
    #[arg(long, value_name = "FILE")]
    metrics_jsonl: Option<PathBuf>,
    /// Leave out unknown keys and take illegal values as the reference takes them
    #[arg(long)]
    lenient: bool,
}

impl DemoArgs {
    pub(super) fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let dump = DumpOptions::from_environment(|name| std::env::var(name).ok(), now)?;
        let runtime = Runtime::read(&self.config, None, self.lenient)?;
        let text = read_text(&self.file)?;
        let place = || format!("`{}`", self.file.display());
        let prompts = demo::prompts(&text, self.prompt_file_mode == PromptFileMode::Whole);
        if prompts.is_empty() {
            return Err(Error::invalid_input(format!("{}: expected a prompt, got none", place())));
        }
        if dump.is_some() && prompts.len() > 1 {
            let message = format!("{}: expected one prompt in a dump, got {} lines", place(), prompts.len());
            return Err(Error::invalid_input(format!("{message}; `--prompt-file-mode whole` takes the file as one")));
        }
        let model = Model::load(&folder(&self.model, &runtime)?)?;
        let engine = Engine::new(&model, &runtime, runtime.precision(), "gear-delta", registry, self.lenient)?;
        let (mut total, mut metrics) = (Total::default(), Vec::new());
        for (idx, prompt) in prompts.iter().enumerate() {
            let decoded = demo::decode(&engine, prompt, self.tokens, dump.as_ref()).context(place)?;
            if decoded.overflow > 0 {
                tracing::warn!("{}: {} elements of the dump are infinite in F16", place(), decoded.overflow);
            }
            total.add(&decoded.measured);
            metrics.push(demo::metrics(idx, &decoded.measured));
            if !json {
                if runtime.logs_stats() {
                    decoded.measured.decision_lines().iter().try_for_each(|line| report::print(line))?;
                }
                report::print(&decoded.text)?;
            }
        }
        if let Some(path) = &self.metrics_jsonl {
            demo::append_lines(path, &metrics)?;
        }
        if json {
            report::print_json(&json!({ "total": total, "prompts": metrics }))?;
        } else {
            report::print(&format!("{0}\n{total}\n{0}", "#".repeat(33)))?;
        }
        Ok(Status::Pass)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_behind_one_dash_are_rewritten_for_the_benchmark_alone() {
        let rewritten = |line: &str| {
            let words = line.split(' ').map(OsString::from);
            arguments(words).map(|word| word.into_string().unwrap()).collect::<Vec<_>>().join(" ")
        };
        let line = "gearbox --json llm-bench -m a -qatten 0 -kv true -p 5 -rep 3 -fp log -load false";
        assert_eq!(
            rewritten(line),
            "gearbox --json llm-bench -m a --qatten 0 --kv true -p 5 --rep 3 --fp log --load false"
        );
        for other in ["gearbox sweep -v -kv", "gearbox llm-demo a b 3 -q"] {
            assert_eq!(rewritten(other), other);
        }
    }
}
