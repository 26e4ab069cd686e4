//! Decode time of the cache beside a plain candle model, whose cache grows by `Tensor::cat`.
//!
//! `cargo bench -p gearbox-model`. All arms decode the same tokens behind the same prompt, alternating within each round; per arm the
//! median over rounds of the time per token, with the fastest and slowest round.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Embedding, Linear, Module, RmsNorm, VarBuilder, linear_no_bias, ops, rms_norm, rotary_emb::rope};
use gearbox_core::{Chunking, Pipeline, PipelineSpec, PluginSpec, Registry};
use gearbox_model::{CacheOptions, Model, Step};
use gearbox_plugins as _;

const ROUNDS: usize = 15;
const STEPS: usize = 64;

struct PlainLayer {
    norms: [RmsNorm; 2],
    /// Query, key, value, output, gate, up, down.
    linear: [Linear; 7],
}

/// A decoder as one writes it in candle, in F32.
struct Plain {
    embedding: Embedding,
    layers: Vec<PlainLayer>,
    norm: RmsNorm,
    head: Linear,
    cos: Tensor,
    sin: Tensor,
    q_heads: usize,
    kv_heads: usize,
}

type PlainCache = Vec<Option<[Tensor; 2]>>;

impl Plain {
    fn load(folder: &Path, config: &gearbox_model::Config) -> Result<Self> {
        let weights = std::fs::read(folder.join("model.safetensors"))?;
        let vb = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)?.pp("model");
        let (hidden, inner, eps) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
        let (q, kv) = (config.q_heads * config.head_dim, config.kv_heads * config.head_dim);
        let layer = |idx: usize| {
            let vb = vb.pp("layers").pp(idx);
            let linear = |name: &str, from: usize, to: usize| linear_no_bias(from, to, vb.pp(name));
            Ok(PlainLayer {
                norms: [
                    rms_norm(hidden, eps, vb.pp("input_layernorm"))?,
                    rms_norm(hidden, eps, vb.pp("post_attention_layernorm"))?,
                ],
                linear: [
                    linear("self_attn.q_proj", hidden, q)?,
                    linear("self_attn.k_proj", hidden, kv)?,
                    linear("self_attn.v_proj", hidden, kv)?,
                    linear("self_attn.o_proj", q, hidden)?,
                    linear("mlp.gate_proj", hidden, inner)?,
                    linear("mlp.up_proj", hidden, inner)?,
                    linear("mlp.down_proj", inner, hidden)?,
                ],
            })
        };
        let embedding = candle_nn::embedding(config.vocab_size, hidden, vb.pp("embed_tokens"))?;
        let half = config.head_dim / 2;
        let frequency = |pair: usize| config.rope.theta.powf(-(pair as f64) / half as f64) as f32;
        let angles = (0..config.context).flat_map(|token| (0..half).map(move |pair| token as f32 * frequency(pair)));
        let angles = Tensor::from_vec(angles.collect::<Vec<_>>(), (config.context, half), &Device::Cpu)?;
        Ok(Self {
            head: Linear::new(embedding.embeddings().clone(), None),
            embedding,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            norm: rms_norm(hidden, eps, vb.pp("norm"))?,
            cos: angles.cos()?,
            sin: angles.sin()?,
            q_heads: config.q_heads,
            kv_heads: config.kv_heads,
        })
    }

    fn attention(
        &self,
        layer: &PlainLayer,
        x: &Tensor,
        seen: usize,
        cache: &mut Option<[Tensor; 2]>,
    ) -> Result<Tensor> {
        let (_, seq, _) = x.dims3()?;
        let heads = |linear: &Linear, heads: usize| {
            linear.forward(x)?.reshape((1, seq, heads, ()))?.transpose(1, 2)?.contiguous()
        };
        let (cos, sin) = (self.cos.narrow(0, seen, seq)?, self.sin.narrow(0, seen, seq)?);
        let query = rope(&heads(&layer.linear[0], self.q_heads)?, &cos, &sin)?;
        let mut key = rope(&heads(&layer.linear[1], self.kv_heads)?, &cos, &sin)?;
        let mut value = heads(&layer.linear[2], self.kv_heads)?;
        if let Some([keys, values]) = cache {
            key = Tensor::cat(&[&*keys, &key], 2)?.contiguous()?;
            value = Tensor::cat(&[&*values, &value], 2)?.contiguous()?;
        }
        *cache = Some([key.clone(), value.clone()]);
        let (live, dim) = (key.dim(2)?, key.dim(3)?);
        let repeat = self.q_heads / self.kv_heads;
        let repeated = |x: &Tensor| Tensor::cat(&vec![x; repeat], 2)?.reshape((1, self.q_heads, live, dim));
        let (key, value) = (repeated(&key)?, repeated(&value)?);
        let mut scores = (query.matmul(&key.t()?)? / (dim as f64).sqrt())?;
        if seq > 1 {
            let visible = |query: usize, slot: usize| if slot <= seen + query { 0.0 } else { f32::NEG_INFINITY };
            let mask = (0..seq).flat_map(|query| (0..live).map(move |slot| visible(query, slot)));
            scores = scores.broadcast_add(&Tensor::from_vec(mask.collect::<Vec<_>>(), (seq, live), &Device::Cpu)?)?;
        }
        let output = ops::softmax_last_dim(&scores)?.matmul(&value.contiguous()?)?;
        layer.linear[3].forward(&output.transpose(1, 2)?.reshape((1, seq, ()))?)
    }

    /// Logits of the last token.
    fn forward(&self, ids: &[u32], seen: usize, cache: &mut PlainCache) -> Result<Vec<f32>> {
        let mut x = self.embedding.forward(&Tensor::new(ids, &Device::Cpu)?)?.unsqueeze(0)?;
        for (layer, cache) in self.layers.iter().zip(cache) {
            x = (&x + self.attention(layer, &layer.norms[0].forward(&x)?, seen, cache)?)?;
            let inner = layer.norms[1].forward(&x)?;
            let inner = (ops::silu(&layer.linear[4].forward(&inner)?)? * layer.linear[5].forward(&inner)?)?;
            x = (&x + layer.linear[6].forward(&inner)?)?;
        }
        let x = self.norm.forward(&x.narrow(1, ids.len() - 1, 1)?)?;
        self.head.forward(&x)?.squeeze(0)?.squeeze(0)?.to_vec1()
    }

    fn run(&self, prompt: &[u32], next: &[u32]) -> Result<(f64, Vec<f32>)> {
        let mut cache: PlainCache = vec![None; self.layers.len()];
        for (idx, block) in prompt.chunks(256).enumerate() {
            self.forward(block, 256 * idx, &mut cache)?;
        }
        let mut logits = Vec::new();
        let start = Instant::now();
        for (idx, id) in next.iter().enumerate() {
            logits = self.forward(&[*id], prompt.len() + idx, &mut cache)?;
        }
        Ok((start.elapsed().as_secs_f64() / next.len() as f64, logits))
    }
}

fn run(model: &Model, options: &CacheOptions, prompt: &[u32], next: &[u32]) -> gearbox_core::Result<(f64, Vec<f32>)> {
    let mut cache = model.cache(options)?;
    model.forward(&mut cache, prompt, Step::silent())?;
    let mut logits = Vec::new();
    let start = Instant::now();
    for id in next {
        logits = model.forward(&mut cache, &[*id], Step::last())?;
    }
    Ok((start.elapsed().as_secs_f64() / next.len() as f64, logits))
}

fn main() {
    // What `cargo test --benches` passes.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let folder = gearbox_model::bundled().unwrap();
    let model = Model::load(&folder).unwrap();
    let plain = Plain::load(&folder, model.config()).unwrap();
    let arm = |id: &str| {
        let spec = PipelineSpec::of_codec(PluginSpec::new(id), Chunking::PerEntry);
        let pipeline = Pipeline::build(&spec, &Registry::built_in().unwrap()).unwrap();
        CacheOptions { pipeline: Some(Arc::new(pipeline)), ..CacheOptions::default() }
    };
    let f32 = CacheOptions { dtype: gearbox_core::DType::F32, ..CacheOptions::default() };
    let arms = [
        ("f32", f32),
        ("f16", CacheOptions::default()),
        ("store", arm("store")),
        ("zstd", arm("zstd")),
        ("planes", arm("planes")),
    ];
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../LICENSE-APACHE")).unwrap();
    let ids = model.tokenizer().encode_part(&text).unwrap();
    let ids: Vec<u32> = ids.iter().copied().cycle().take(2048).collect();
    println!("{:>7} {:>8} {:>10} {:>19} {:>9}", "prompt", "arm", "ms/token", "fastest..slowest", "÷ plain");
    for tokens in [128, 512, 1024, 1900] {
        let (prompt, next) = ids[..tokens + STEPS].split_at(tokens);
        let mut times = vec![Vec::new(); arms.len() + 1];
        for round in 0..=ROUNDS {
            let (time, expected) = plain.run(prompt, next).unwrap();
            let mut took = vec![time];
            for (name, options) in &arms {
                let (time, logits) = run(&model, options, prompt, next).unwrap();
                let worst = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                // F16 rounds keys and values to 11 bits.
                assert!(worst < if *name == "f32" { 1e-3 } else { 0.2 }, "{name}: {worst}");
                took.push(time);
            }
            // The first round warms up.
            if round > 0 {
                times.iter_mut().zip(took).for_each(|(times, time)| times.push(time));
            }
        }
        let mut base = 0.0;
        for (idx, times) in times.iter_mut().enumerate() {
            times.sort_by(f64::total_cmp);
            let median = times[ROUNDS / 2];
            base = if idx == 0 { median } else { base };
            let name = idx.checked_sub(1).map_or("plain", |idx| arms[idx].0);
            let spread = format!("{:.3}..{:.3}", 1e3 * times[0], 1e3 * times[ROUNDS - 1]);
            println!("{tokens:>7} {name:>8} {:>10.3} {spread:>19} {:>9.3}", 1e3 * median, median / base);
        }
    }
}
