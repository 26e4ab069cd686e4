//! `gearbox llm-bench`: requests of one length, repeated, as a row of the reference's table.

use std::path::Path;

use gearbox_core::{Error, ErrorKind, Registry, Result, ResultExt};
use gearbox_model::{LayerLedger, Model};
use serde_json::{Value, json};

use super::request::{Engine, Measured};
use super::runtime::{Precision, Runtime};
use super::table::{self, Spread, Table};
use crate::exp::h2o::Kit;
use crate::receipt::Receipt;

/// The opening of *The Adventures of Sherlock Holmes* (Arthur Conan Doyle, 1892, public domain), which the prompts are from.
const TEXT: &str = include_str!("text.txt");

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Revision whose columns are written.
    pub kit: Kit,
    /// How exactly the engine computes.
    pub precision: Precision,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens decoded behind it.
    pub tokens: usize,
    /// Measured repeats; one more comes first and does not count.
    pub repeat: usize,
    /// Text that prompt and decoded tokens are from; the built-in one if absent.
    pub text: Option<&'a str>,
    /// One token that takes the place of a text, as in the reference.
    pub token: Option<u32>,
    /// Whether illegal settings are taken as the reference takes them.
    pub lenient: bool,
}

/// All repeats of one run.
#[derive(Clone, Debug)]
pub struct Report {
    /// The table with its one row.
    pub table: Table,
    /// The reference's JSON object, with what its figures leave out under `gearbox`.
    pub json: Value,
    /// The reference's lines about the decisions of each repeat.
    pub lines: Vec<String>,
    /// What is to be known about the figures.
    pub warnings: Vec<String>,
}

/// What a run tells about its model and machine.
#[derive(Clone, Copy, Debug)]
pub struct About<'a> {
    /// Folder of the model.
    pub folder: &'a Path,
    /// Threads of the engine.
    pub threads: usize,
    /// Seconds that loading took, if they get a column.
    pub loading: Option<f64>,
}

/// Runs all repeats. Each has a cache of its own and decodes the same tokens, those that follow the prompt in the text.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for more tokens than the context of the model or the text holds;
/// [`ErrorKind::InvalidConfig`] for settings that do not fit the model;
/// [`ErrorKind::Mismatch`] if two repeats compute different logits, or raw chunks others than
/// compressed ones; what the plugins report.
pub fn run(
    model: &Model,
    runtime: &Runtime,
    registry: &Registry,
    options: &Options<'_>,
    about: &About<'_>,
) -> Result<Report> {
    let ids = ids(model, options)?;
    let engine = |codec| Engine::new(model, runtime, options.precision, codec, registry, options.lenient);
    let compressed = engine("gear-delta")?;
    let first = once(&compressed, &ids, options)?;
    let runs = (0..options.repeat).map(|_| once(&compressed, &ids, options)).collect::<Result<Vec<_>>>()?;
    if let Some(repeat) = runs.iter().position(|run| run.logits != first.logits) {
        let message = format!("repeat {}: expected the logits of the run before it, got others", repeat + 1);
        return Err(Error::new(ErrorKind::Mismatch, message));
    }
    if runtime.checks_roundtrip() && once(&engine("store")?, &ids, options)?.logits != first.logits {
        let message = "compressed chunks: expected the logits that raw ones give, got others";
        return Err(Error::new(ErrorKind::Mismatch, message));
    }
    report(&compressed, runtime, registry, &runs, options, about)
}

/// Ids of the prompt and of the tokens behind it.
fn ids(model: &Model, options: &Options<'_>) -> Result<Vec<u32>> {
    let (wanted, context) = (options.prompt + options.tokens, model.config().context);
    if options.prompt == 0 || options.tokens == 0 || options.repeat == 0 || wanted > context {
        return Err(Error::invalid_input(format!(
            "expected a prompt, tokens to decode, repeats, and at most {context} tokens in all, the context of the model, got {} of the \
             prompt, {} to decode, {} repeats",
            options.prompt, options.tokens, options.repeat
        )));
    }
    if let Some(token) = options.token {
        return Ok(vec![token; wanted]);
    }
    let mut ids = model.tokenizer().encode(options.text.unwrap_or(TEXT)).context(|| "text".to_owned())?;
    if ids.len() < wanted {
        let (what, len) = (if options.text.is_some() { "the text" } else { "the built-in text" }, ids.len());
        return Err(Error::invalid_input(format!("expected at least {wanted} tokens, got the {len} of {what}")));
    }
    ids.truncate(wanted);
    Ok(ids)
}

fn once(engine: &Engine<'_>, ids: &[u32], options: &Options<'_>) -> Result<Measured> {
    let (prompt, decoded) = ids.split_at(options.prompt);
    let mut request = engine.request()?;
    request.prefill(prompt, None)?;
    for id in decoded {
        request.decode(*id, None)?;
    }
    Ok(request.end())
}

fn report(
    engine: &Engine<'_>,
    runtime: &Runtime,
    registry: &Registry,
    runs: &[Measured],
    options: &Options<'_>,
    about: &About<'_>,
) -> Result<Report> {
    let folder = about.folder.canonicalize().map_err(|error| Error::io(about.folder, &error))?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let bytes = weights_bytes(&folder)?;
    let prefill = Spread::of(runs.iter().map(|run| Some(run.prefill_tps())));
    let decode = Spread::of(runs.iter().map(|run| Some(run.decode_tps())));
    let fields: Vec<_> = runs.iter().map(Measured::fields).collect();
    let names = fields.first().into_iter().flatten();
    let spreads: Vec<_> =
        names.enumerate().map(|(at, field)| (field, Spread::of(fields.iter().map(|run| run[at].value)))).collect();
    let precision = format!("{:?}", options.precision);

    let more: &[&str] = if about.loading.is_some() { &["loadingTime(s)"] } else { &[] };
    let table = Table::new(options.kit, more, |column| match column {
        "model" => name.clone(),
        "modelSize" => table::size(bytes),
        "backend" => "CPU".to_owned(),
        "threads" => about.threads.to_string(),
        "precision" => precision.clone(),
        "llm_demo" => format!("prompt={}<br>decode={}", options.prompt, options.tokens),
        "speed(tok/s)" => format!("{}<br>{}", table::cell(prefill, 2), table::cell(decode, 2)),
        "loadingTime(s)" => table::cell(Spread::of([about.loading]), 2),
        column => {
            let found = spreads.iter().find(|(field, _)| field.column == column);
            table::cell(found.and_then(|(_, spread)| *spread), found.map_or(2, |(field, _)| field.decimals))
        }
    });

    let mut result = json!({
        "type": "prefill_and_decode", "prompt_len": options.prompt, "generate_len": options.tokens,
        "prefill_tps": prefill.map(|spread| spread.mean), "prefill_std": prefill.map(|spread| spread.deviation),
        "decode_tps": decode.map(|spread| spread.mean), "decode_std": decode.map(|spread| spread.deviation),
    });
    if let Some(loading) = about.loading {
        result["loading_time"] = json!(loading);
    }
    for (field, spread) in &spreads {
        result[field.key] = json!(spread.map(|spread| spread.mean));
        result[format!("{}_std", field.key)] = json!(spread.map(|spread| spread.deviation));
    }
    let json = json!({
        "model": name, "modelSize": bytes as f64 / f64::from(1 << 30), "backend": "CPU", "threads": about.threads,
        "useMmap": false, "precision": precision, "memory": "Normal", "power": "Normal", "attentionOption": 0,
        "results": [result],
        "gearbox": {
            "config": runtime.keys(), "pipeline": engine.spec(), "receipt": Receipt::new(registry)?,
            "runs": runs.iter().map(whole_request).collect::<Vec<_>>(),
        },
    });
    let lines =
        if runtime.logs_stats() { runs.iter().flat_map(Measured::decision_lines).collect() } else { Vec::new() };
    Ok(Report { table, json, lines, warnings: warnings(runtime, runs) })
}

/// What the reference's columns leave out: the whole request, from one ledger.
fn whole_request(run: &Measured) -> Value {
    let [before, after] = run.timings;
    let per_token = |of: fn(&gearbox_model::Timings) -> u64| (of(&after) - of(&before)) / run.decode_tokens as u64;
    let layer = |layer: &LayerLedger| {
        let ratio = layer.usage.average_ratio();
        json!({ "layer": layer.layer, "live": layer.live, "coded": layer.coded, "resident_ratio": ratio })
    };
    json!({
        "resident_ratio": run.ledger.usage.average_ratio(), "resident": run.ledger.usage,
        "layers": run.ledger.layers.iter().map(layer).collect::<Vec<_>>(),
        "decisions": run.decisions.len(),
        "dominated": run.decisions.iter().filter(|traced| traced.decision.dominated).count(),
        "decode_ns_per_token": {
            "score": per_token(|t| t.score_ns), "plan": per_token(|t| t.plan_ns), "move": per_token(|t| t.move_ns),
            "encode": per_token(|t| t.encode_ns), "decode": per_token(|t| t.decode_ns),
            "attention": per_token(|t| t.attention_ns), "rest": per_token(|t| t.rest_ns),
        },
        "logits": format!("{:016x}", run.logits),
    })
}

fn warnings(runtime: &Runtime, runs: &[Measured]) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(run) = runs.iter().find(|run| run.coded.is_some_and(|coded| coded.chunks == 0)) {
        let (seen, recent) = (run.prompt_tokens + run.decode_tokens, runtime.residual());
        warnings.push(format!(
            "no chunk was stored, so there is no lossless ratio: of {seen} tokens the newest {recent} stay raw \
             (`kv_lossless_hot_recent_tokens`), and the rest fills no chunk (`kv_lossless_block_tokens`)"
        ));
    }
    if runtime.evicts() && runs.iter().all(|run| run.evicted().1 == 0) {
        let decisions: usize = runs.iter().map(|run| run.decisions.len()).sum();
        warnings.push(match decisions {
            0 => "nothing was evicted: no layer reached `kv_h2o_trigger_min_tokens` when its turn came".to_owned(),
            _ => format!("nothing was evicted: sinks and recent tokens reach the target in all {decisions} decisions"),
        });
    }
    warnings
}

/// Bytes of the weights of a model.
fn weights_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for item in std::fs::read_dir(folder).map_err(|error| Error::io(folder, &error))? {
        let path = item.map_err(|error| Error::io(folder, &error))?.path();
        if path.extension().is_some_and(|ending| ending == "safetensors") {
            bytes += std::fs::metadata(&path).map_err(|error| Error::io(&path, &error))?.len();
        }
    }
    Ok(bytes)
}
