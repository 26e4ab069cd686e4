//! A real model in the loop: dumps of it, its quality through a compressed and evicted cache, and its speed.

mod arms;
pub mod bench;
pub mod capture;
pub mod perplexity;
mod shadow;
mod spool;

pub use self::arms::{Arm, CORRUPT, IDENTITY, RANDOM, controls};
pub(crate) use self::spool::Spool;

/// `ln softmax` in F64.
fn log_softmax(logits: &[f32], out: &mut Vec<f64>) {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - max).exp()).sum();
    let shift = max + sum.ln();
    out.clear();
    out.extend(logits.iter().map(|logit| f64::from(*logit) - shift));
}
