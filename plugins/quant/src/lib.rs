//! Lossy transforms that keep fewer levels of each value: quantisation, clipping, truncation.
//!
//! `quant` replaces the values of a group by the nearest of `2^bits` evenly spaced levels and stores their numbers: keys in groups of tokens
//! of one channel, since their outliers stay in few channels, values in groups of channels of one token. `clip-quant` does so over a
//! narrower range, which pays at 2 to 4 bits. `block-norm` is `quant` with symmetric groups of channels, `clip` moves values into bounds,
//! and `truncate` rounds mantissas.
//!
//! # Source
//! The `n_lossless` experiments; groups by channel and by token are those of Liu et al., *KIVI*, 2024, outliers apart from them those of
//! Hooper et al., *KVQuant*, 2024. Mode `reference` does what the experiments did, see [`mod@reference`]. The default mode differs: codes are
//! stored instead of restored floats, scales and minima are stored, and rounded before they are used, ranges need not be symmetric nor span
//! the tensor, and one bad value spoils nothing.
//!
//! # Settings
//! | Transform | Key | Range | Default | Meaning |
//! |---|---|---|---|---|
//! | all | `mode` | `default`, `reference` | `default` | whose arithmetic; `reference` refuses settings that it does not have |
//! | `quant`, `clip-quant` | `storage` | `codes`, `values` | `codes` | lanes of codes, or the restored values as lane `tensor` |
//! | | `bits` | 2 to 16 | 8 | bits of a code |
//! | | `symmetric` | bool | false | `2^bits - 1` levels around zero instead of `2^bits` from a minimum on |
//! | | `granularity` | `auto`, `tensor`, `head`, `token`, `channel` | `auto` | which values share a scale; `auto`: `channel` for keys, `token` for values |
//! | | `group` | 1 or more, or null | 64 | tokens of a group with `channel`, channels with `token`; null for all |
//! | | `scale_dtype` | `f16`, `bf16`, `f32` | `f16` | type of scales and minima |
//! | | `outliers` | 0 to 0.5 | 0 | part of the values that is kept exact: those farthest from the median of their group |
//! | | `sink`, `recent` | 0 or more | 0 | first and last tokens of the sequence that are kept exact |
//! | | `delta` | `none`, `token`, `auto` | `none` | codes as differences to those of the token before, modulo `2^bits` |
//! | `clip-quant` | `method` | `auto`, `mse`, `percentile`, `sigma` | `auto` | the range of a group: the least squared error of eight, or as in `clip`; `auto`: `mse` |
//! | `clip` | `method` | `percentile`, `sigma` | `percentile` | where the bounds are; `granularity` and `group` (null) as above |
//! | both | `low`, `high` | 0 to 100, or null | 0.05, 99.95 | percentiles; 1 and 99 in mode `reference` |
//! | | `sigma` | more than 0 | 3 | standard deviations around the mean |
//! | `truncate` | `mantissa_bits` | 0 to 23 | 6 | bits of the mantissa that stay |
//! | `block-norm` | `block` | 1 or more | 64 | channels of a block; `bits` (10), `scale_dtype`, `symmetric` (true) as above |
//! | | `top_k` | 0 to 1 | 0 | in mode `reference`, part of the blocks with a second, unrounded scale |
//!
//! # Lanes
//! `clip` and `truncate` write `tensor`. So does `storage: values`. Else, for the rows that are not protected:
//!
//! | Lane | Type | Shape | Content |
//! |---|---|---|---|
//! | `codes` | `bits(bits)` | `(rows, heads, dim)` | number of the level, from the lowest on |
//! | `delta` | `bits(1)` | `(1, 1, 1)` | 1 if `auto` chose differences |
//! | `scales`, `zeros` | `scale_dtype`, or `f32` | `(groups, heads, dim)`, `(rows, heads, groups)`, `(1, heads, 1)` or `(1, 1, 1)` | distance of two levels; lowest level, unless symmetric |
//! | `outliers` | as the tensor | `(count, 1, 1)` | elements that are kept exact, among them all that are not finite |
//! | `outlier-gaps` | `bits(2)` to `bits(16)` | flat | elements between them; the largest number: as many elements, and the gap goes on |
//! | `exact` | as the tensor | `(protected rows, heads, dim)` | sinks, then recent tokens |
//!
//! A lane that would be all zeros, or empty, is left out, and codes with their scales. A value is `zero + code * scale` (symmetric codes
//! count from `2^(bits - 1) - 1`), computed in F32 for F16 tensors and in F64 for others, without fusing, rounded once to the nearest
//! finite element. Scales are rounded up and minima down; if that widens a range by more than an eighth, all of the chunk are F32. Zeros
//! lose their sign. Groups along an axis are as many as fit best, their lengths differ by at most one, longer ones first. Chunks of fewer
//! than 24 tokens have groups as with `token`.
//!
//! In mode `reference` codes are those of the reference plus `2^(bits - 1) - 1`, and `2^bits - 1` is -0.0; `scales` is one F32.
//! `block-norm` stores `normalised` (as the tensor), `scales` (one per block), `top-scales` (F32) and `top-indices` (`u32`).
//!
//! # Bounds
//! `quant` and `block-norm` promise `81/32 / (2^bits - 1)` of the largest magnitude of the chunk, symmetric ones `81/64 / (2^(bits - 1) - 1)`;
//! errors are smaller by as much as a group is narrower than the chunk. `truncate` promises `2^-(mantissa_bits + 1)` of each value. Clipping, and mode `reference`, which one NaN spoils, promise nothing.
//!
//! # What it is bad at
//! Single tokens: a chunk of one decoded token pays for the headers of three lanes and for groups of its own. Keys after rotation: a channel
//! that turns fast has no narrow range, whatever the group. Few bits with outliers that are spread: then a rotation before it helps more.

mod block_norm;
mod clip;
mod clip_quant;
mod escapes;
mod kernels;
mod layout;
mod number;
mod parity;
mod quant;
mod quantiser;
mod range;
pub mod reference;
mod settings;
mod tensor;
mod truncate;

pub use block_norm::{BlockNorm, Config as BlockNormConfig};
pub use clip::{Clip, Config as ClipConfig, Method as ClipMethod};
pub use clip_quant::{ClipQuant, Config as ClipQuantConfig, Method as ClipQuantMethod};
pub use quant::{Config as QuantConfig, Quant};
pub use settings::{Delta, Granularity, Mode, ScaleType, Storage};
pub use truncate::{Config as TruncateConfig, Truncate};

#[cfg(test)]
mod tests;
