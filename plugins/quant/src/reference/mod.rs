//! What the reference's lossy experiments compute, to the bit: values, scales, bounds and error figures.
//!
//! Its quirks are kept: one scale per tensor, percentile bounds that cut two in a hundred values, blocks that are normalised by the unrounded
//! scale, sums in F32. Nothing here is a good setting; it is what our transforms are measured against.
//!
//! # Source
//! The `n_lossless` experiments on KV-cache dumps, with the rounding of `NumPy` 2.4: F32 arithmetic, products and quotients of integers and
//! scales in F64 where it has them, pairwise sums over the whole array. Differences: Bf16 tensors work like F16 ones; settings that made it
//! stop or gave only NaN (fewer than two bits, blocks of no elements) are errors; dot products are accumulated in F64, because those of the
//! reference depend on its build.

mod block_norm;
mod clip;
mod element;
mod error;
mod pairwise;
mod quantise;
#[cfg(test)]
mod tests;
mod truncate;

pub use block_norm::{BlockNorm, Normalised};
pub use clip::{Clip, clip, clip_bounds};
pub use element::{narrow, widen};
pub use error::{Error, error};
pub use quantise::{BITS, quantise, quantise_codes};
pub use truncate::truncate;
