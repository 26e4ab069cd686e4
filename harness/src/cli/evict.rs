//! `gearbox evict`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use gearbox_core::{CacheGeometry, Error, EvictionPolicy, PluginSpec, Registry, Result, ResultExt, config};
use gearbox_plugins::evict::h2o::H2o;
use gearbox_plugins::evict::reference::Decision;
use serde_json::{Value, json};

use crate::evict::{self, Replay, ReplayOptions};
use crate::report::{self, Columns};
use crate::select::SelectArgs;
use crate::status::Status;

/// Shows what an eviction policy keeps.
///
/// Without a dump: the decision about a number of tokens, as JSON. With one: the policy is replayed over its layers, step by step, and
/// attention over what it keeps is compared with attention over all tokens.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox evict --policy '{\"id\": \"h2o\", \"mode\": \"reference\", \"block_tokens\": 32}' --tokens 1025
  gearbox evict --policy window --tokens 100
  gearbox evict --policy '{\"id\": \"snapkv\", \"target_ratio\": 4}' --dump DIR
  gearbox evict --policy random --dump DIR --step 64 --json")]
pub(super) struct EvictArgs {
    /// Policy: a `.json` file, JSON text or an id
    #[arg(long, value_name = "POLICY")]
    policy: String,
    /// Tokens to decide about
    #[arg(long, value_name = "N", required_unless_present = "dump", conflicts_with = "dump")]
    tokens: Option<usize>,
    /// A JSON list of scores: one per token, or per block in h2o's mode `reference` [default: all alike]
    #[arg(long, value_name = "FILE", requires = "tokens")]
    scores: Option<PathBuf>,
    /// Layer to decide about
    #[arg(long, value_name = "L", default_value_t = 0, conflicts_with = "dump")]
    layer: u32,
    /// Layers of the model [default: one more than the layer]
    #[arg(long, value_name = "N", conflicts_with = "dump")]
    layers: Option<u32>,
    /// KV heads
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "dump", value_parser = at_least_one)]
    kv_heads: usize,
    /// Dump to replay, may be repeated: a run folder, a folder of runs, or safetensors; it must hold queries
    #[arg(long, value_name = "PATH")]
    dump: Vec<PathBuf>,
    /// Most tokens of a step of the replay; longer entries come in several, with a plan after each
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = at_least_one)]
    step: usize,
    #[command(flatten)]
    select: SelectArgs,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count > 0).ok_or_else(|| "expected at least 1".to_owned())
}

impl EvictArgs {
    pub(super) fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        let spec = read_policy(&self.policy)?;
        let entry = registry.eviction(&spec.id)?;
        let policy = entry.build(&Value::Object(spec.settings))?;
        let Some(tokens) = self.tokens else { return self.replay(&entry.id, &*policy, json) };
        let scores: Option<Vec<f64>> = self.scores.as_deref().map(read_json).transpose()?;
        report::print_json(&self.decide(&entry.id, &policy, tokens, scores)?)?;
        Ok(Status::Pass)
    }

    /// The decision, with every setting.
    fn decide(
        &self,
        id: &str,
        policy: &Arc<dyn EvictionPolicy>,
        tokens: usize,
        scores: Option<Vec<f64>>,
    ) -> Result<Value> {
        let mut settings = policy.config();
        // Settings of a policy that was built from settings.
        if let ("h2o", Some(rules)) = (id, reference(&settings)?) {
            let decision = rules.rules().map(|rules| rules.decide(tokens, &scores.unwrap_or_default()));
            settings["id"] = json!(id);
            return Ok(decision.map_or(Value::Null, |decision| of_reference(&settings, decision)));
        }
        let layers = self.layers.unwrap_or(self.layer.saturating_add(1));
        if self.layer >= layers {
            return Err(Error::invalid_config(format!("--layer: expected less than {layers}, got {}", self.layer)));
        }
        let kv_heads = self.kv_heads;
        let geometry = CacheGeometry { layer: self.layer, layers, q_heads: kv_heads, kv_heads, dim: 1 };
        let even = || vec![1.0 / tokens.max(1) as f32; tokens];
        let scores = scores.map_or_else(even, |scores| scores.into_iter().map(|score| score as f32).collect());
        let keep = evict::decide(&**policy, &geometry, tokens, &scores)?;
        settings["id"] = json!(id);
        let list = |head| keep.of(head).map_or_else(|| (0..tokens as u32).collect(), <[u32]>::to_vec);
        let heads: Vec<Vec<u32>> = (0..kv_heads).map(list).collect();
        Ok(json!({ "policy": settings, "tokens": tokens, "kept": keep.kept(tokens), "heads": heads }))
    }

    fn replay(&self, id: &str, policy: &dyn EvictionPolicy, json: bool) -> Result<Status> {
        let mut status = Status::Pass;
        let mut dumps = Vec::new();
        for path in &self.dump {
            let (dump, clean) = self.select.open(path)?;
            status = status.and(clean);
            dumps.push(dump);
        }
        let replay = evict::replay(id, policy, &dumps, ReplayOptions { step: self.step })?;
        if json {
            report::print_json(&replay)?;
        } else {
            report::print(&table(&replay))?;
        }
        Ok(status)
    }
}

/// A policy that follows the reference, if that is what the settings say.
fn reference(settings: &Value) -> Result<Option<H2o>> {
    if settings["mode"] != "reference" {
        return Ok(None);
    }
    config::from_value(settings).and_then(gearbox_core::Plugin::new).map(Some)
}

/// `q` is what the rules keep, `kept` what stays: all if the floor dominates.
fn of_reference(settings: &Value, decision: Decision) -> Value {
    let Decision { tokens, floor, target, kept: q, dominated, runs } = decision;
    let kept = if dominated { tokens } else { q };
    json!({
        "policy": settings, "tokens": tokens, "floor": floor, "target": target, "q": q, "dominated": dominated, "kept": kept, "runs": runs,
    })
}

fn read_policy(text: &str) -> Result<PluginSpec> {
    let parse = |text: &str| {
        let value = serde_json::from_str(text);
        value.map_err(|error| Error::invalid_config(format!("expected a policy with `id`: {error}")))
    };
    if text.trim_start().starts_with('{') {
        return parse(text).context(|| "--policy".into());
    }
    let path = Path::new(text);
    if path.extension().is_some_and(|extension| extension == "json") {
        return read_json(path);
    }
    Ok(PluginSpec::new(text))
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
    let value = serde_json::from_str(&text);
    value.map_err(|error| Error::invalid_config(format!("`{}`: {error}", path.display())))
}

fn table(replay: &Replay) -> String {
    let mut table = Columns::new(&[
        "run",
        ">layer",
        ">tokens",
        ">kept",
        ">peak",
        ">read ratio",
        ">cut queries",
        ">kept mass",
        ">least",
        ">output error",
    ]);
    let number = |number, decimals| report::decimal(Some(number), decimals);
    for row in &replay.layers {
        table.row([
            row.run.clone(),
            row.layer.to_string(),
            row.tokens.to_string(),
            row.kept.to_string(),
            row.peak.to_string(),
            number(row.error.read_ratio, 3),
            row.error.cut.to_string(),
            number(row.error.kept_mass, 4),
            number(row.error.kept_mass_least, 4),
            number(row.error.output_error, 4),
        ]);
    }
    let all = &replay.all;
    let text = format!(
        "{table}\n\nall: {} of {} queries cut, kept fraction {}, read ratio {}, kept mass {}, output error {}",
        all.cut,
        all.queries,
        number(replay.kept_fraction, 4),
        number(all.read_ratio, 3),
        number(all.kept_mass, 4),
        number(all.output_error, 4)
    );
    let worst = replay.worst.as_ref().map_or_else(String::new, |worst| {
        let (run, layer, head) = (&worst.run, worst.layer, worst.head);
        let error = number(worst.error.output_error, 4);
        format!("\nworst: run `{run}`, layer {layer}, query head {head}, output error {error}")
    });
    text + &worst
}
