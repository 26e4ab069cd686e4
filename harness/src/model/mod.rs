//! A real model in the loop: dumps of it, its quality through a compressed and evicted cache, and its speed.

mod arms;
pub mod bench;
pub mod capture;
pub mod perplexity;
mod shadow;

pub use self::arms::{Arm, CORRUPT, IDENTITY, RANDOM, controls};

/// The token with the largest logit; of equal ones the first.
fn most_probable(logits: &[f32]) -> u32 {
    let best = logits
        .iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |best, (idx, logit)| if *logit > best.1 { (idx, *logit) } else { best });
    best.0 as u32
}

/// `ln softmax` in F64.
fn log_softmax(logits: &[f32], out: &mut Vec<f64>) {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - max).exp()).sum();
    let shift = max + sum.ln();
    out.clear();
    out.extend(logits.iter().map(|logit| f64::from(*logit) - shift));
}
