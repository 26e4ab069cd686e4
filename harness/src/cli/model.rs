//! `gearbox model`.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use gearbox_core::{DType, Error, PipelineSpec, Registry, Result, ResultExt};
use gearbox_model::{CacheOptions, Model};
use serde::Serialize;

use crate::atomic::AtomicFile;
use crate::gate::{Gate, Metric};
use crate::loading::LoadArgs;
use crate::model::capture::{self, CaptureOptions};
use crate::model::{Arm, bench, controls, perplexity};
use crate::receipt::Receipt;
use crate::report::{self, Columns};
use crate::status::Status;

/// What a model can be used for.
#[derive(Debug, Subcommand)]
pub(super) enum ModelCommand {
    /// Write dumps of keys, values, queries and token ids
    Capture(CaptureArgs),
    /// Measure decode speed, memory and where the time goes, beside the dense cache
    Bench(BenchArgs),
    /// Measure perplexity and divergence through the compressed cache, beside the dense one
    Perplexity(PerplexityArgs),
}

impl ModelCommand {
    pub(super) fn run(self, load: &LoadArgs, json: bool) -> Result<Status> {
        match self {
            Self::Capture(args) => args.run(json),
            Self::Bench(args) => args.run(&load.registry()?, json),
            Self::Perplexity(args) => args.run(&load.registry()?, json),
        }
    }
}

/// The model and the text it reads.
#[derive(Debug, Args)]
pub(super) struct ModelArgs {
    /// Model folder in Hugging Face layout [default: the bundled tiny model]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Model of the Hugging Face hub, fetched into its usual cache, if this program was built with the feature `hub`
    #[arg(long, value_name = "OWNER/NAME", conflicts_with = "model")]
    hub: Option<String>,
}

impl ModelArgs {
    /// The folder that the flags name; none for the bundled model.
    pub(super) fn folder(&self) -> Result<Option<PathBuf>> {
        self.hub.as_deref().map(gearbox_model::hub::fetch).transpose().map(|hub| hub.or_else(|| self.model.clone()))
    }

    fn load(&self) -> Result<Model> {
        match self.folder()? {
            None => Model::bundled(),
            Some(folder) => Model::load(&folder),
        }
    }
}

/// Element types, as flags name them.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Storage {
    F16,
    Bf16,
    F32,
}

impl From<Storage> for DType {
    fn from(storage: Storage) -> Self {
        match storage {
            Storage::F16 => Self::F16,
            Storage::Bf16 => Self::Bf16,
            Storage::F32 => Self::F32,
        }
    }
}

/// Text of a file, which must be UTF-8.
pub(super) fn read_text(path: &std::path::Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::invalid_input(format!("`{}`: expected UTF-8, got another byte at {at}", path.display()))
    })
}

/// Runs prompts through a model and writes what its cache held, one dump per prompt.
///
/// Keys are those after RoPE. The prompt is one prefill entry, each token decoded behind it a decode entry; queries and token ids are there too,
/// so that attention can be replayed without the model.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox model capture --text book.txt --tokens 2048 --out dumps
  gearbox model capture --text prompts/*.txt --decode 128 --out dumps
  gearbox sweep --dump dumps/book.safetensors")]
pub(super) struct CaptureArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text file with a prompt, one dump each
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Most tokens of each prompt [default: all]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Tokens to decode behind each prompt
    #[arg(long, value_name = "N", default_value_t = 16)]
    decode: usize,
    /// Element type of the dumps
    #[arg(long, value_enum, default_value = "f16")]
    dtype: Storage,
    /// Tokens of a prompt that are worked on at a time
    #[arg(long, value_name = "N", default_value_t = 256)]
    block: usize,
    /// Folder to write to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Run log to append to, one JSON object per prompt [default: runs.jsonl in the folder]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Replace existing files
    #[arg(long)]
    overwrite: bool,
}

impl CaptureArgs {
    fn run(self, json: bool) -> Result<Status> {
        let model = self.model.load()?;
        std::fs::create_dir_all(&self.out).map_err(|error| Error::io(&self.out, &error))?;
        let log = self.log.unwrap_or_else(|| self.out.join("runs.jsonl"));
        let options = CaptureOptions {
            decode: self.decode,
            dtype: self.dtype.into(),
            block: self.block,
            overwrite: self.overwrite,
        };
        let mut all = Vec::new();
        for path in &self.text {
            let place = || format!("`{}`", path.display());
            let mut ids = model.tokenizer().encode(&read_text(path)?).context(place)?;
            ids.truncate(self.tokens.unwrap_or(usize::MAX));
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let captured = capture::capture(&model, &name, &ids, &self.out, &options).context(place)?;
            capture::log_run(&log, &path.display().to_string(), &captured)?;
            if captured.overflow > 0 {
                tracing::warn!(
                    "{}: {} elements are infinite in this type; try --dtype bf16",
                    place(),
                    captured.overflow
                );
            }
            if !json {
                report::print(&format!(
                    "Wrote {}: {} prompt tokens in {:.2} s, {} decoded in {:.2} s",
                    captured.path.display(),
                    captured.prompt_tokens,
                    captured.prefill_s,
                    captured.decode_tokens,
                    captured.decode_s
                ))?;
            }
            all.push(captured);
        }
        if json {
            report::print_json(&all)?;
        }
        Ok(Status::Pass)
    }
}

/// How caches hold tokens.
#[derive(Debug, Args)]
struct CacheArgs {
    /// Pipeline to compare, may be repeated: a `.json` file, JSON text or the id of a codec; any value may be `{"sweep": […]}`
    #[arg(long, value_name = "PIPELINE", required = true)]
    pipeline: Vec<String>,
    /// Newest tokens that stay raw
    #[arg(long, value_name = "N", default_value_t = 64)]
    residual: usize,
    /// Element type of the cache
    #[arg(long, value_enum, default_value = "f16")]
    dtype: Storage,
    /// Tokens of the prompt that are worked on at a time
    #[arg(long, value_name = "N", default_value_t = 256)]
    block: usize,
}

impl CacheArgs {
    fn options(&self) -> CacheOptions {
        let (dtype, residual, block) = (self.dtype.into(), self.residual, self.block);
        CacheOptions { dtype, residual, block, ..CacheOptions::default() }
    }

    fn specs(&self, registry: &Registry) -> Result<Vec<PipelineSpec>> {
        let mut specs = Vec::new();
        for text in &self.pipeline {
            let value = crate::pipelines::read(text, registry)?;
            specs.extend(crate::pipelines::expand(&value).context(|| format!("`--pipeline {text}`"))?);
        }
        Ok(specs)
    }
}

fn arms(specs: &[PipelineSpec], registry: &Registry) -> Result<Vec<Arm>> {
    specs.iter().map(|spec| Arm::of(spec, registry)).collect()
}

/// Where a result is kept.
#[derive(Debug, Args)]
struct OutArgs {
    /// File for the result as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Replace an existing file
    #[arg(long)]
    overwrite: bool,
}

impl OutArgs {
    /// The file, made before the work starts so that a name that is taken costs nothing.
    fn create(&self) -> Result<Option<AtomicFile>> {
        self.out.as_deref().map(|path| AtomicFile::create(path, self.overwrite)).transpose()
    }
}

/// Keeps a result in its file, if there is one, and prints it as JSON or as text.
fn show<T: Serialize>(result: &T, out: Option<AtomicFile>, json: bool, text: fn(&T) -> String) -> Result<()> {
    if let Some(file) = out {
        file.commit_json(result)?;
    }
    if json { report::print_json(result) } else { report::print(&text(result)) }
}

/// Measures perplexity and next-token divergence through compressed caches, token by token.
///
/// Each window of the text begins with a prompt; then every token is a decode step that reads the cache as it is stored, and is scored by what
/// the model says of the next one. The same tokens go through the dense cache. Controls run along: `identity` must give the dense logits to the
/// bit, `corrupt` (the signs of one head turned around) must be caught, and `random` evicts as much as the first pipeline that evicts.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox model perplexity --text book.txt --pipeline planes
  gearbox model perplexity --text book.txt --pipeline configs/model/evict.json --out quality.json
  gearbox gate quality.json --config configs/gate/default.json

Exit status: 0 pass; 1 if a control failed, or nothing holds the limits of --gate; 2 usage or data error.")]
pub(super) struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// Text file to read
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of each window that are read as a prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Scored tokens of each window
    #[arg(long, value_name = "N", default_value_t = 512)]
    tokens: usize,
    /// Windows of the text
    #[arg(long, value_name = "N", default_value_t = 2)]
    windows: usize,
    /// Limits to judge rows by: a JSON file as for `gearbox gate`
    #[arg(long, value_name = "FILE")]
    gate: Option<PathBuf>,
    #[command(flatten)]
    out: OutArgs,
}

impl PerplexityArgs {
    fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        let specs = self.cache.specs(registry)?;
        let all: Vec<Arm> = controls(&specs, registry)?.into_iter().chain(arms(&specs, registry)?).collect();
        let gate = self.gate.as_deref().map(Gate::read).transpose()?;
        let out = self.out.create()?;
        let model = self.model.load()?;
        let ids = model.tokenizer().encode(&read_text(&self.text)?)?;
        let (prompt, tokens, windows) = (self.prompt, self.tokens, self.windows);
        let options = perplexity::Options { prompt, tokens, windows, cache: self.cache.options(), attention_every: 8 };
        let bar = report::steps("perplexity");
        let found = perplexity::run(&model, &ids, &all, &options, gate.as_ref(), Receipt::new(registry)?, &bar)?;
        bar.finish_and_clear();
        show(&found, out, json, perplexity_text)?;
        let ran = found.rows.iter().all(perplexity::Row::is_ok);
        let holds = found.gate.is_none()
            || found.rows.iter().any(|row| row.verdict.as_ref().is_some_and(crate::gate::Verdict::passed));
        Ok(Status::pass_if(ran && found.problems.is_empty() && holds))
    }
}

fn perplexity_text(found: &perplexity::Report) -> String {
    let mut text = format!(
        "{} windows of {} prompt and {} scored tokens; perplexity of the dense cache {:.4}\n\n",
        found.windows, found.prompt_tokens, found.tokens, found.dense_perplexity
    );
    let mut headings =
        vec!["arm", ">total", ">lossy", ">coding", ">perplexity", ">change %", ">± %", ">KL mean", ">KL p99"];
    headings.extend([">top-1 %", ">worst head"]);
    headings.push("result");
    let mut table = Columns::new(&headings);
    for row in &found.rows {
        let number = |metric: Metric, factor: f64, decimals: usize| {
            report::decimal(row.measured.get(&metric).map(|number| number * factor), decimals)
        };
        let coding = row.measured.get(&Metric::ResidentRatio).zip(row.measured.get(&Metric::LossyRatio));
        let result = match &row.verdict {
            _ if !row.is_ok() => "FAILED".to_owned(),
            Some(verdict) if verdict.passed() => "passes".to_owned(),
            Some(_) => "below the gate".to_owned(),
            None => String::new(),
        };
        table.row([
            row.name.clone(),
            number(Metric::ResidentRatio, 1.0, 3),
            number(Metric::LossyRatio, 1.0, 3),
            report::decimal(coding.map(|(total, lossy)| total / lossy), 3),
            report::decimal(row.perplexity, 4),
            number(Metric::PerplexityIncrease, 100.0, 2),
            report::decimal(row.nll_increase_ci95.map(|half| 100.0 * half), 2),
            number(Metric::TokenKlMean, 1.0, 5),
            number(Metric::TokenKlP99, 1.0, 4),
            number(Metric::Top1Agreement, 100.0, 2),
            number(Metric::WorstHeadOutputError, 1.0, 4),
            result,
        ]);
    }
    let _ = writeln!(text, "{table}\n");
    text.push_str(
        "total: dense ÷ resident bytes, mean over the steps of the request; lossy: tokens seen ÷ kept; coding: their quotient\n",
    );
    for row in &found.rows {
        if let Some(reason) = &row.reason {
            let _ = writeln!(text, "{} FAILED ({}): {reason}", row.name, row.state);
        }
        if let Some(verdict) = row.verdict.as_ref().filter(|verdict| !verdict.passed()) {
            let _ = writeln!(text, "{}: {verdict}", row.name);
        }
    }
    for problem in &found.problems {
        let _ = writeln!(text, "FAILED {problem}");
    }
    text.truncate(text.trim_end().len());
    text
}

/// Measures decoding through compressed caches: speed, memory, and the time of each phase.
///
/// All arms decode the same tokens, those that the dense cache makes of the prompt. They run interleaved, and each is compared with the dense run
/// of the same round.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox model bench --text book.txt --pipeline planes --pipeline zstd
  gearbox model bench --text book.txt --prompt 1024 --tokens 256 --pipeline configs/model/evict.json --out speed.json")]
pub(super) struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// Text file whose first tokens are the prompt
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens to decode
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Times that every arm runs
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeat: usize,
    #[command(flatten)]
    out: OutArgs,
}

impl BenchArgs {
    fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        let arms = arms(&self.cache.specs(registry)?, registry)?;
        let out = self.out.create()?;
        let model = self.model.load()?;
        let ids = model.tokenizer().encode(&read_text(&self.text)?)?;
        let prompt = ids.get(..self.prompt).ok_or_else(|| {
            Error::invalid_input(format!(
                "`{}`: expected at least {} tokens, got {}",
                self.text.display(),
                self.prompt,
                ids.len()
            ))
        })?;
        let options = bench::Options { tokens: self.tokens, repeat: self.repeat, cache: self.cache.options() };
        let bar = report::steps("decoding");
        let found = bench::run(&model, prompt, &arms, &options, Receipt::new(registry)?, &bar)?;
        bar.finish_and_clear();
        show(&found, out, json, bench_text)?;
        Ok(Status::pass_if(found.rows.iter().all(|row| row.reason.is_none())))
    }
}

fn bench_text(found: &bench::Report) -> String {
    let mut text = format!(
        "{} prompt tokens, {} decoded, {} repeats, interleaved; medians, with lowest and highest\n\n",
        found.prompt_tokens, found.tokens, found.repeat
    );
    let mut table = Columns::new(&[
        "arm",
        ">decode tok/s",
        ">drop %",
        ">prefill tok/s",
        ">total",
        ">resident",
        ">peak",
        ">score",
        ">plan",
        ">move",
        ">encode",
        ">decode",
        ">attend",
        ">rest",
    ]);
    for row in &found.rows {
        let spread = |spread: Option<bench::Spread>, factor: f64| {
            spread.map_or("-".to_owned(), |spread| {
                let [median, low, high] = [spread.median, spread.low, spread.high].map(|number| factor * number);
                format!("{median:.1} ({low:.1} to {high:.1})")
            })
        };
        let kib = |of: fn(&gearbox_model::Usage) -> f64| {
            row.ledger.as_ref().map_or("-".to_owned(), |ledger| format!("{:.0}", of(&ledger.usage) / 1024.0))
        };
        let mut cells = vec![
            row.name.clone(),
            spread(row.decode_tps, 1.0),
            spread(row.decode_drop, 100.0),
            spread(row.prefill_tps, 1.0),
            report::decimal(row.measured.get(&Metric::ResidentRatio).copied(), 3),
            kib(|usage| usage.average),
            kib(|usage| usage.peak as f64),
        ];
        let phases = row.per_token_ns.map(|p| [p.score, p.plan, p.r#move, p.encode, p.decode, p.attention, p.rest]);
        for idx in 0..7 {
            cells.push(report::decimal(phases.map(|phases| phases[idx] / 1e3), 0));
        }
        table.row(cells);
    }
    let _ = writeln!(text, "{table}\n");
    text.push_str("resident and peak in KiB, phases in µs per decoded token; total: dense ÷ resident bytes, resident: both means over the steps of the request\n");
    for row in found.rows.iter().filter(|row| row.reason.is_some()) {
        let _ = writeln!(text, "{} FAILED ({}): {}", row.name, row.state, row.reason.as_deref().unwrap_or_default());
    }
    text.truncate(text.trim_end().len());
    text
}
