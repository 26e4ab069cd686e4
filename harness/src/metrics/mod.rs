//! What decoding lost: numbers that compare decoded tensors with the original ones.
//!
//! [`error`] compares element with element, by head. [`attention`] goes on to what a model would see of it, where the dump holds queries.
//! Both add up sums in F64 and divide at the end, so numbers of a layer, a role or a dump are over all its elements or queries, never means
//! of means: each element has the same weight, and so has each query.
//!
//! # Error of tensors
//! `x` is an element of the original, `r` the decoded one, `d = r - x`, computed in F64.
//!
//! | Number | Definition | Unit | Exact | Nothing but noise (`x = 0`, some `r` not) |
//! |---|---|---|---|---|
//! | `elements` | elements that were compared | | | |
//! | `changed` | elements that came back with other bits; `-0.0` for `0.0` is one | | 0 | |
//! | `broken` | elements that are not finite in either tensor, and came back with other bits | | 0 | |
//! | `mae` | `Σ\|d\| / n` | of the tensor | 0 | |
//! | `rmse` | `√(Σd² / n)` | of the tensor | 0 | |
//! | `nmse` | `Σd² / Σx²` | | 0 | infinite |
//! | `snr_db` | `-10 log10(nmse)` | dB | none | minus infinity |
//! | `max_abs` | `max\|d\|` | of the tensor | 0 | |
//! | `cosine` | `Σxr / √(Σx² Σr²)`, within -1 and 1 | | 1 | 0 |
//!
//! `n` counts pairs of finite elements, and sums are over these. Nothing to compare, and zeros for zeros, count as exact. An original
//! element that is not finite and comes back with the same bits adds nothing. Any `broken` element makes `mae`, `rmse`, `nmse` and `max_abs`
//! infinite, `snr_db` minus infinity and `cosine` NaN, in every sum that it is part of.
//!
//! The worst head has the lowest `cosine` or the highest `nmse`, NaN being the worst of all; the worst layer has the highest `nmse`.
//!
//! # Error of attention
//! For a query `q` at position `t` and the cached tokens `i` at positions up to `t`: `z_i = q·k_i / √dim`, `p = softmax(z)`, `o = Σ p_i v_i`;
//! with decoded keys and values they are `z'`, `p'` and `o'`. Where the dump states them for a layer, its `scale` stands for `1 / √dim`, a
//! `softcap` `c` makes `z_i = c·tanh(scale·q·k_i / c)`, and with a `window` `w` a query sees the tokens at positions above `t - w` alone.
//! `P` is the set of pairs of a query and a token that it sees, `Q` that of queries.
//!
//! | Number | Definition | Unit | Exact |
//! |---|---|---|---|
//! | `queries` | queries that the numbers are over, `\|Q\|` | | |
//! | `undefined` | queries left out: they see no token, or `z` (before a softcap) or `o` is not finite | | |
//! | `broken` | queries whose `z` and `o` are finite, and `z' - z` or `o' - o` is not | | 0 |
//! | `logit_rmse` | `√(Σ_P (z'_i - z_i)² / \|P\|)` | | 0 |
//! | `logit_max` | `max_P \|z'_i - z_i\|` | | 0 |
//! | `kl_mean` | `Σ_Q KL / \|Q\|` with `KL = Σ_i p_i ln(p_i / p'_i)` | nats | 0 |
//! | `kl_p99` | the smallest `KL` that at least 99 % of the queries do not exceed, rounded up by less than 1/128 of it, at most `kl_max` | nats | 0 |
//! | `kl_max` | `max_Q KL` | nats | 0 |
//! | `output_error` | `√(Σ_Q ‖o' - o‖² / Σ_Q ‖o‖²)` | | 0 |
//! | `top_agreement` | mean over `Q` of the share of the `k` tokens with the highest `z` that are among the `k` with the highest `z'`; `k` is 8, or all that are seen if they are fewer; of equal ones the earlier token counts | | 1 |
//!
//! A query whose decoded logits break makes all these infinite and agrees in nothing; one whose output alone breaks makes `output_error`
//! infinite. The worst head has the highest `kl_mean` or the highest `output_error`; the worst layer has the highest `output_error`.
//!
//! # Error of eviction
//! Where only the tokens of a set `K` are live, `p'` is the softmax over those that the query sees, and `o' = Σ p'_i v_i`. A query is *cut* if
//! a token that it could see is not live; `C` is the set of cut queries. `KL(p' ‖ p) = -ln(mass)`, so the mass says what that would.
//!
//! | Number | Definition | Unit | Exact |
//! |---|---|---|---|
//! | `queries`, `undefined` | queries that attended, and those of them left out: `z` or `o` is not finite | | |
//! | `cut` | `\|C\|` | | 0 |
//! | `kept_mass` | `Σ_C Σ_K p_i / \|C\|` | | 1 |
//! | `kept_mass_least` | `min_C Σ_K p_i` | | 1 |
//! | `output_error` | `√(Σ_C ‖o' - o‖² / Σ_C ‖o‖²)` | | 0 |
//! | `read_ratio` | tokens that all queries could see ÷ live ones that they saw | | 1 |
//!
//! # JSON
//! Numbers that are not finite are `null`. A `snr_db` of `null` goes with an `nmse` of 0 where nothing was lost, and of `null` where all was.

pub mod attention;
mod element;
pub mod error;

/// Version of these definitions, and of what a sweep measures besides: raised whenever the same bytes give another number. Stored rows of
/// another version are not used again.
pub const VERSION: u32 = 1;
