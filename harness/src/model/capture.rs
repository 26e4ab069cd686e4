//! Dumps of a real model: keys after `RoPE`, values, queries and token ids, of a prompt and of the tokens decoded behind it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use gearbox_core::{DType, Error, Result, ResultExt};
use gearbox_model::{CacheOptions, Config, Model, Step, most_probable};
use serde::Serialize;

use super::spool::Spool;
use crate::dump::{
    AttentionFacts, LayerFacts, LayerSpec, RunSpec, SafetensorsWriter, Stage, TensorSpec, check_run_name,
};

/// How a dump is captured.
#[derive(Clone, Copy, Debug)]
pub struct CaptureOptions {
    /// Tokens decoded behind the prompt, each the most probable one; every one is an entry.
    pub decode: usize,
    /// Element type of the dump. The model computes in F32 over a cache in F32, whatever this is.
    pub dtype: DType,
    /// Tokens of the prompt that are worked on at a time.
    pub block: usize,
    /// Whether an existing file may be replaced.
    pub overwrite: bool,
}

/// What was captured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Captured {
    /// Name of the run.
    pub run: String,
    /// The dump.
    pub path: PathBuf,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded behind it.
    pub decode_tokens: usize,
    /// Time of the prompt, the writing of temporary files included.
    pub prefill_s: f64,
    /// Time of the decoded tokens.
    pub decode_s: f64,
    /// Finite elements that are infinite in the type of the dump.
    pub overflow: u64,
}

/// Runs a prompt and decodes behind it; writes `<folder>/<name>.safetensors`.
///
/// Memory does not grow with the dump: tensors wait in temporary files of the folder until the order of the file needs them.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for a name that is none, an empty prompt, or more tokens than the
/// context of the model; [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
pub fn capture(model: &Model, name: &str, prompt: &[u32], folder: &Path, options: &CaptureOptions) -> Result<Captured> {
    check_run_name(name)?;
    let config = model.config();
    let seq = prompt.len() + options.decode;
    if prompt.is_empty() || seq > config.context {
        return Err(Error::invalid_input(format!(
            "expected 1 to {} tokens, the context of the model, got {} of the prompt and {} to decode",
            config.context,
            prompt.len(),
            options.decode
        )));
    }
    let path = folder.join(format!("{name}.safetensors"));
    if path.exists() && !options.overwrite {
        let message = format!("`{}`: exists already; --overwrite replaces it", path.display());
        return Err(Error::invalid_input(message));
    }
    let mut spool = Spool::new(folder, config.layers, options.dtype)?;
    let mut cache =
        model.cache(&CacheOptions { dtype: DType::F32, block: options.block, ..CacheOptions::default() })?;
    let mut ids = prompt.to_vec();
    let start = Instant::now();
    let mut step = |ids: &[u32]| {
        let mut probe = |step: gearbox_model::LayerStep<'_>| spool.append(&step);
        model.forward(&mut cache, ids, Step::last().probe(&mut probe))
    };
    let mut logits = step(prompt)?;
    let prefill_s = start.elapsed().as_secs_f64();
    let start = Instant::now();
    for _ in 0..options.decode {
        let id = most_probable(&logits);
        ids.push(id);
        logits = step(&[id])?;
    }
    let decode_s = start.elapsed().as_secs_f64();
    let tensor = |heads| TensorSpec { dtype: options.dtype, heads, dim: config.head_dim };
    let (kv, query) = (tensor(config.kv_heads), Some(tensor(config.q_heads)));
    let decoded = (prompt.len()..seq).map(|at| (at as u64, 1, Stage::Decode));
    let spec = RunSpec {
        name: name.to_owned(),
        rope: Some(config.rope.clone()),
        entries: std::iter::once((0, prompt.len(), Stage::Prefill)).chain(decoded).collect(),
        tokens: Some(ids),
        layers: (0..config.layers as u32).map(|id| LayerSpec { id, key: kv, value: kv, query }).collect(),
        facts: (0..config.layers)
            .map(|layer| LayerFacts { attention: Some(attention_facts(config, layer)), rope: None })
            .collect(),
        metadata: BTreeMap::from([("writer".to_owned(), concat!("gearbox ", env!("CARGO_PKG_VERSION")).to_owned())]),
    };
    let overflow = spool.overflow();
    let mut writer = SafetensorsWriter::create(&path, &spec, options.overwrite)?;
    spool.write(&spec, &mut writer)?;
    writer.finish()?;
    let (prompt_tokens, decode_tokens) = (prompt.len(), options.decode);
    Ok(Captured { run: name.to_owned(), path, prompt_tokens, decode_tokens, prefill_s, decode_s, overflow })
}

/// How a layer of a model attends.
pub(crate) fn attention_facts(config: &Config, layer: usize) -> AttentionFacts {
    let window = config.windows.get(layer).copied().flatten().map(|window| window as u64);
    AttentionFacts { window, ..AttentionFacts::usual(config.head_dim) }
}

/// One line of the run log, with the keys of the reference's `llm_demo_runs.jsonl`.
///
/// # Errors
/// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
pub fn log_run(path: &Path, prompt_file: &str, captured: &Captured) -> Result<()> {
    let line = serde_json::json!({
        "prompt_file": prompt_file,
        "run_id": captured.run,
        "returncode": 0,
        "metrics": {
            "prompt_tokens": captured.prompt_tokens,
            "decode_tokens": captured.decode_tokens,
            "prefill_s": captured.prefill_s,
            "decode_s": captured.decode_s,
        },
    });
    let append = || -> std::io::Result<()> {
        let mut file = File::options().create(true).append(true).open(path)?;
        file.write_all(format!("{line}\n").as_bytes())
    };
    append().map_err(|error| Error::io(path, &error)).context(|| "run log".to_owned())
}
