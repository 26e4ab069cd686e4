//! What attention would have seen had the cache kept everything: the keys and values of a run, dense, beside the cache under test.

use gearbox_core::DType;
use gearbox_model::{Config, LayerStep};
use half::{bf16, f16};

/// Squared error and squared norm of attention outputs, by layer and query head.
#[derive(Clone, Debug, Default)]
pub(super) struct OutputErrors(Vec<Vec<[f64; 2]>>);

impl OutputErrors {
    /// The largest relative error of any head, with its layer and head.
    pub fn worst(&self) -> Option<(f64, usize, usize)> {
        let heads = self.0.iter().enumerate();
        let heads =
            heads.flat_map(|(layer, heads)| heads.iter().enumerate().map(move |(head, sums)| (layer, head, sums)));
        heads
            .filter(|(.., [_, norm])| *norm > 0.0)
            .map(|(layer, head, [error, norm])| ((error / norm).sqrt(), layer, head))
            .max_by(|a, b| a.0.total_cmp(&b.0))
    }

    fn add(&mut self, layer: usize, head: usize, error: f64, norm: f64) {
        if self.0.len() <= layer {
            self.0.resize_with(layer + 1, Vec::new);
        }
        let heads = &mut self.0[layer];
        if heads.len() <= head {
            heads.resize(head + 1, [0.0; 2]);
        }
        heads[head][0] += error;
        heads[head][1] += norm;
    }
}

/// Keys and values of every token, rounded as the cache stores them.
pub(super) struct Shadow {
    dtype: DType,
    group: usize,
    heads: usize,
    dim: usize,
    windows: Vec<Option<usize>>,
    /// By layer: keys and values `(tokens, kv_heads, dim)`.
    held: Vec<[Vec<f32>; 2]>,
    logits: Vec<f32>,
    output: Vec<f32>,
    pub errors: OutputErrors,
}

impl Shadow {
    pub fn new(config: &Config, dtype: DType, errors: OutputErrors) -> Self {
        Self {
            dtype,
            group: config.q_heads / config.kv_heads,
            heads: config.kv_heads,
            dim: config.head_dim,
            windows: config.windows.clone(),
            held: vec![[Vec::new(), Vec::new()]; config.layers],
            logits: Vec::new(),
            output: Vec::new(),
            errors,
        }
    }

    /// Takes in a step; where `compare` says so, attention over everything is set against the output of the step.
    pub fn step(&mut self, step: &LayerStep<'_>, compare: bool) {
        let layer = step.layer as usize;
        for (held, new) in self.held[layer].iter_mut().zip([step.key, step.value]) {
            held.extend(new.iter().map(|number| rounded(self.dtype, *number)));
        }
        if !compare {
            return;
        }
        let (dim, heads) = (self.dim, self.heads);
        let q_heads = heads * self.group;
        let [keys, values] = &self.held[layer];
        for token in 0..step.tokens {
            let seen = step.first_token as usize + token + 1;
            let first = self.windows[layer].map_or(0, |window| seen.saturating_sub(window));
            for head in 0..q_heads {
                let place = (token * q_heads + head) * dim;
                let query = &step.query[place..place + dim];
                let row = |at: usize| (at * heads + head / self.group) * dim;
                let scale = 1.0 / (dim as f32).sqrt();
                self.logits.clear();
                self.logits.extend((first..seen).map(|at| scale * dot(query, &keys[row(at)..row(at) + dim])));
                let max = self.logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                self.output.clear();
                self.output.resize(dim, 0.0);
                let mut sum = 0.0;
                for (at, logit) in (first..seen).zip(&self.logits) {
                    let weight = (logit - max).exp();
                    sum += weight;
                    let value = &values[row(at)..row(at) + dim];
                    self.output.iter_mut().zip(value).for_each(|(out, value)| *out += weight * value);
                }
                let (mut error, mut norm) = (0.0, 0.0);
                for (dense, got) in self.output.iter().zip(&step.output[place..place + dim]) {
                    let dense = f64::from(dense / sum);
                    error += (f64::from(*got) - dense).powi(2);
                    norm += dense * dense;
                }
                self.errors.add(layer, head, error, norm);
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight sums, so that the compiler may use vectors.
    let mut sums = [0.0f32; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

fn rounded(dtype: DType, number: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(number).to_f32(),
        DType::Bf16 => bf16::from_f32(number).to_f32(),
        _ => number,
    }
}
