//! The decoder: weights and forward pass.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType as CandleDType, Device, Tensor};
use candle_nn::ops::{rms_norm, silu};
use candle_nn::rotary_emb::rope_thd;
use gearbox_core::{Error, Result, ResultExt};

use crate::cache::values;
use crate::config::frequencies;
use crate::weights::Weights;
use crate::{Cache, CacheOptions, Config, Tokenizer, from_candle};

/// A projection: `x · weightᵀ + bias`.
#[derive(Debug)]
struct Linear {
    /// `(out, in)`.
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    fn take(weights: &mut Weights, name: &str, [output, input]: [usize; 2], bias: bool) -> Result<Self> {
        let weight = weights.take(&format!("{name}.weight"), &[output, input])?;
        let bias = bias.then(|| weights.take(&format!("{name}.bias"), &[output])).transpose()?;
        Ok(Self { weight, bias })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = x.matmul(&self.weight.t()?)?;
        match &self.bias {
            Some(bias) => x.broadcast_add(bias),
            None => Ok(x),
        }
    }
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn take(weights: &mut Weights, config: &Config, idx: usize) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.q_heads * config.head_dim, config.kv_heads * config.head_dim);
        let (qkv, out, mlp) = (config.qkv_bias, config.output_bias, config.mlp_bias);
        let mut norm = |name: &str| weights.take(&format!("model.layers.{idx}.{name}.weight"), &[hidden]);
        let (attention_norm, mlp_norm) = (norm("input_layernorm")?, norm("post_attention_layernorm")?);
        let mut linear =
            |name: &str, shape, bias| Linear::take(weights, &format!("model.layers.{idx}.{name}"), shape, bias);
        Ok(Self {
            attention_norm,
            query: linear("self_attn.q_proj", [q, hidden], qkv)?,
            key: linear("self_attn.k_proj", [kv, hidden], qkv)?,
            value: linear("self_attn.v_proj", [kv, hidden], qkv)?,
            output: linear("self_attn.o_proj", [hidden, q], out)?,
            mlp_norm,
            gate: linear("mlp.gate_proj", [inner, hidden], mlp)?,
            up: linear("mlp.up_proj", [inner, hidden], mlp)?,
            down: linear("mlp.down_proj", [hidden, inner], mlp)?,
        })
    }

    fn mlp(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.down.forward(&(silu(&self.gate.forward(x)?)? * self.up.forward(x)?)?)
    }
}

/// Keys, values, queries and attention of one layer in one step, F32, before anything is rounded to the storage type.
#[derive(Clone, Copy, Debug)]
pub struct LayerStep<'a> {
    /// Layer of the model.
    pub layer: u32,
    /// Position of the first token.
    pub first_token: u64,
    /// Number of tokens.
    pub tokens: usize,
    /// Keys after `RoPE`, `(tokens, kv_heads, dim)`.
    pub key: &'a [f32],
    /// Values, `(tokens, kv_heads, dim)`.
    pub value: &'a [f32],
    /// Queries after `RoPE`, `(tokens, q_heads, dim)`.
    pub query: &'a [f32],
    /// What attention made of them through the cache, `(tokens, q_heads, dim)`.
    pub output: &'a [f32],
}

/// Looks at every layer of every step.
pub type Probe<'a> = &'a mut dyn FnMut(LayerStep<'_>) -> Result<()>;

/// What a forward pass gives besides an extended cache.
#[derive(Default)]
pub struct Step<'a> {
    logits: Logits,
    probe: Option<Probe<'a>>,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Logits {
    #[default]
    None,
    Last,
    All,
}

impl<'a> Step<'a> {
    /// No logits.
    pub fn silent() -> Self {
        Self::default()
    }

    /// The logits of the last token.
    pub fn last() -> Self {
        Self { logits: Logits::Last, probe: None }
    }

    /// The logits of every token, `(tokens, vocab_size)`.
    pub fn all() -> Self {
        Self { logits: Logits::All, probe: None }
    }

    /// Shows keys, values and queries of each layer to `probe`, in order.
    #[must_use]
    pub fn probe(self, probe: Probe<'a>) -> Self {
        Self { probe: Some(probe), ..self }
    }
}

impl std::fmt::Debug for Step<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Step")
    }
}

/// A decoder model with its tokenizer. It computes in F32, and holds nothing of any request.
#[derive(Debug)]
pub struct Model {
    config: Config,
    tokenizer: Tokenizer,
    device: Device,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Linear,
    /// Rotations per token of each pair of channels.
    frequencies: Vec<f32>,
}

impl Model {
    /// Loads the bundled model; see [`bundled`](crate::bundled).
    ///
    /// # Errors
    /// As [`bundled`](crate::bundled) and [`Model::load`].
    pub fn bundled() -> Result<Self> {
        Self::load(&crate::bundled()?)
    }

    /// Loads a model folder in Hugging Face layout: `config.json`, `tokenizer.json`, and `model.safetensors` or several files with
    /// `model.safetensors.index.json`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) for another architecture, with file and key;
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for missing tensors, wrong shapes, and a tokenizer with more
    /// tokens than the model; [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
    pub fn load(folder: &Path) -> Result<Self> {
        Self::load_on(folder, Device::Cpu)
    }

    /// Loads a model folder to a device. The cache stays in memory of the CPU; attention gets a decoded copy of one layer at a time.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_on(folder: &Path, device: Device) -> Result<Self> {
        let config = Config::load(&folder.join("config.json"))?;
        let path = folder.join("tokenizer.json");
        let tokenizer = Tokenizer::load(&path)?;
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(Error::invalid_input(format!(
                "`{}`: expected at most the {} tokens of the model's `vocab_size`, got {}",
                path.display(),
                config.vocab_size,
                tokenizer.vocab_size()
            )));
        }
        let mut weights = Weights::load(folder, &device)?;
        let table = [config.vocab_size, config.hidden_size];
        let embedding = weights.take("model.embed_tokens.weight", &table)?;
        let layers = (0..config.layers).map(|idx| Layer::take(&mut weights, &config, idx)).collect::<Result<_>>()?;
        let norm = weights.take("model.norm.weight", &[config.hidden_size])?;
        let head = if config.tied_head {
            Linear { weight: embedding.clone(), bias: None }
        } else {
            Linear::take(&mut weights, "lm_head", table, false)?
        };
        weights.finish(config.tied_head)?;
        let frequencies = frequencies(&config.rope);
        Ok(Self { config, tokenizer, device, embedding, layers, norm, head, frequencies })
    }

    /// Its geometry.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// An empty cache for one request.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) if the pipeline has no route for a layer or cannot code its
    /// tensors; [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) for illegal options, or a policy that cannot meet
    /// its budget.
    pub fn cache(&self, options: &CacheOptions) -> Result<Cache> {
        Cache::new(&self.config, options)
    }

    /// Appends tokens to a cache, block by block, and gives the logits that `step` asks for.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for no tokens, unknown ones, or more than the context holds;
    /// what plugins report, with layer and role. After a failure inside a step the cache is of no more use.
    pub fn forward(&self, cache: &mut Cache, ids: &[u32], mut step: Step<'_>) -> Result<Vec<f32>> {
        if ids.is_empty() {
            return Err(Error::invalid_input("expected at least one token, got none"));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.config.vocab_size) {
            return Err(Error::invalid_input(format!("expected token ids below {}, got {id}", self.config.vocab_size)));
        }
        let (seen, context) = (cache.seen(), self.config.context);
        if seen + ids.len() > context {
            return Err(Error::invalid_input(format!(
                "{} tokens after {seen}: expected at most {context} in all, the context of the model",
                ids.len()
            )));
        }
        let mut logits = Vec::new();
        let blocks = ids.len().div_ceil(cache.block());
        for (idx, block) in ids.chunks(cache.block()).enumerate() {
            let wanted = match step.logits {
                Logits::Last if idx + 1 < blocks => Logits::None,
                wanted => wanted,
            };
            let (start, before) = (Instant::now(), cache.timings().cache_ns());
            cache.begin(block)?;
            if let Some(new) = self.block(cache, block, wanted, &mut step.probe)? {
                logits.extend(values(&new)?);
            }
            cache.end(start.elapsed().as_nanos() as u64, before);
        }
        Ok(logits)
    }

    fn block(
        &self,
        cache: &mut Cache,
        ids: &[u32],
        wanted: Logits,
        probe: &mut Option<Probe<'_>>,
    ) -> Result<Option<Tensor>> {
        let first = cache.seen() - ids.len();
        let (cos, sin) = self.rotations(first, ids.len()).map_err(from_candle)?;
        let mut x = self.embed(ids).map_err(from_candle)?;
        for (idx, layer) in self.layers.iter().enumerate() {
            let qkv = self.project(layer, &x, (&cos, &sin)).map_err(from_candle)?;
            let [query, key, value] = &qkv;
            let attended = cache.attend(idx, self.config.windows[idx], [query, key, value])?;
            if let Some(probe) = probe {
                let [query, key, value, output] =
                    [&values(query)?, &values(key)?, &values(value)?, &values(&attended)?];
                let (layer, first_token) = (idx as u32, first as u64);
                probe(LayerStep { layer, first_token, tokens: ids.len(), key, value, query, output })
                    .context(|| format!("layer {idx}"))?;
            }
            x = self.finish_layer(layer, &x, &attended).map_err(from_candle)?;
        }
        self.logits(&x, wanted).map_err(from_candle)
    }

    fn embed(&self, ids: &[u32]) -> candle_core::Result<Tensor> {
        self.embedding.index_select(&Tensor::new(ids, &self.device)?, 0)
    }

    /// Cosines and sines of the rotations of a run of positions, `(tokens, dim / 2)`; angles are rounded to F32 as in training.
    fn rotations(&self, first: usize, tokens: usize) -> candle_core::Result<(Tensor, Tensor)> {
        let angles =
            (first..first + tokens).flat_map(|position| self.frequencies.iter().map(move |f| position as f32 * f));
        let (sin, cos): (Vec<_>, Vec<_>) = angles.map(f32::sin_cos).unzip();
        let shape = (tokens, self.frequencies.len());
        Ok((Tensor::from_vec(cos, shape, &self.device)?, Tensor::from_vec(sin, shape, &self.device)?))
    }

    fn normed(&self, x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
        rms_norm(x, weight, self.config.rms_norm_eps as f32)
    }

    /// Queries, keys and values of a layer, `(tokens, heads, dim)`, queries and keys rotated.
    fn project(&self, layer: &Layer, x: &Tensor, (cos, sin): (&Tensor, &Tensor)) -> candle_core::Result<[Tensor; 3]> {
        let x = self.normed(x, &layer.attention_norm)?;
        let heads =
            |linear: &Linear, heads: usize| linear.forward(&x)?.reshape((1, x.dim(0)?, heads, self.config.head_dim));
        let query = rope_thd(&heads(&layer.query, self.config.q_heads)?, cos, sin)?;
        let key = rope_thd(&heads(&layer.key, self.config.kv_heads)?, cos, sin)?;
        let value = heads(&layer.value, self.config.kv_heads)?;
        Ok([query.squeeze(0)?, key.squeeze(0)?, value.squeeze(0)?])
    }

    fn finish_layer(&self, layer: &Layer, x: &Tensor, attended: &Tensor) -> candle_core::Result<Tensor> {
        let x = (x + layer.output.forward(attended)?)?;
        let inner = self.normed(&x, &layer.mlp_norm)?;
        &x + layer.mlp(&inner)?
    }

    fn logits(&self, x: &Tensor, wanted: Logits) -> candle_core::Result<Option<Tensor>> {
        let x = match wanted {
            Logits::None => return Ok(None),
            Logits::Last => x.narrow(0, x.dim(0)? - 1, 1)?,
            Logits::All => x.clone(),
        };
        let logits = self.head.forward(&self.normed(&x, &self.norm)?)?;
        Ok(Some(logits.to_dtype(CandleDType::F32)?))
    }

    /// Log-probabilities (nats) of `ids[1..]`, each given all tokens before it: teacher-forced, through the cache.
    ///
    /// With [`CacheOptions::block`] of 1 every token is a decode step, so that each one reads what the cache made of the others.
    ///
    /// # Errors
    /// As [`Model::forward`]; [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for fewer than two tokens.
    pub fn log_probs(&self, cache: &mut Cache, ids: &[u32]) -> Result<Vec<f64>> {
        let Some((_, inputs)) = ids.split_last().filter(|(_, inputs)| !inputs.is_empty()) else {
            return Err(Error::invalid_input(format!("expected at least two tokens, got {}", ids.len())));
        };
        let mut result = Vec::with_capacity(inputs.len());
        let block = cache.block();
        for (inputs, targets) in inputs.chunks(block).zip(ids[1..].chunks(block)) {
            let logits = self.forward(cache, inputs, Step::all())?;
            let rows = logits.chunks_exact(self.config.vocab_size);
            for (row, target) in rows.zip(targets) {
                let logit = row.get(*target as usize).ok_or_else(|| {
                    Error::invalid_input(format!("expected token ids below {}, got {target}", self.config.vocab_size))
                })?;
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|other| f64::from(other - max).exp()).sum();
                result.push(f64::from(logit - max) - sum.ln());
            }
        }
        Ok(result)
    }

    /// Appends `ids`, then up to `limit` tokens, each the most probable one (of equal ones the first), and returns these.
    ///
    /// Ends early behind one of `stop`, which is included. The last token is not appended to the cache: nothing follows it.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn greedy(&self, cache: &mut Cache, ids: &[u32], limit: usize, stop: &[u32]) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        if limit == 0 {
            self.forward(cache, ids, Step::silent())?;
            return Ok(tokens);
        }
        let mut logits = self.forward(cache, ids, Step::last())?;
        loop {
            let next = most_probable(&logits);
            tokens.push(next);
            if tokens.len() == limit || stop.contains(&next) {
                return Ok(tokens);
            }
            logits = self.forward(cache, &[next], Step::last())?;
        }
    }
}

/// Index of the largest logit, of equal ones the first; 0 if there are none.
pub fn most_probable(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (idx, logit) in logits.iter().enumerate() {
        if logit.total_cmp(&logits[best]).is_gt() {
            best = idx;
        }
    }
    best as u32
}

/// Where the bundled model lies below the workspace, or below any folder above the executable.
const BUNDLED: &str = "tests/data/tiny-llama";

/// Finds the folder of the bundled model: beside or above the executable, else in the workspace that built it.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput), naming where it was looked for.
pub fn bundled() -> Result<PathBuf> {
    let executable = std::env::current_exe().unwrap_or_default();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    let mut folders = executable.ancestors().skip(1).chain(workspace);
    folders.find_map(|folder| Some(folder.join(BUNDLED)).filter(|path| path.is_dir())).ok_or_else(|| {
        Error::invalid_input(format!(
            "the bundled model `{BUNDLED}` is neither above the executable `{}` nor in the workspace; name a model folder",
            executable.display()
        ))
    })
}
