//! Eviction policies: which tokens of a KV cache stay.
//!
//! | id | a token stays because | lists |
//! |---|---|---|
//! | `h2o` | queries so far attended to it ([`h2o`]); `mode: "reference"` follows the reference's runtime rule by rule | per KV head |
//! | `window` | it is among the first or the last ([`window`]) | shared |
//! | `snapkv` | the last queries of the prompt attended to it or a neighbour ([`snapkv`]) | per KV head |
//! | `tova` | the last query attended to it ([`tova`]) | shared |
//! | `random` | a hash of its position is high ([`random`]): a control | per KV head |
//! | `none` | always ([`none`]): the other control | all |
//!
//! All but `none` share the settings of a budget:
//!
//! | setting | default | meaning |
//! |---|---|---|
//! | `target_ratio` | 3 | tokens seen ÷ tokens kept, at least; or `budget_tokens`, a number of tokens that are kept at most |
//! | `sinks` | 4 (`tova` 0) | first tokens of the sequence that stay |
//! | `recent_fraction` | 0.25 (`h2o` 0.5, `tova` 0) | part of the budget that is the last tokens; or `recent_tokens`. `window` has neither, as all of its budget is |
//! | `min_tokens` | 64 | nothing is evicted while fewer tokens were seen |
//! | `margin_tokens` | 0 | tokens that are evicted beyond what the budget demands, so that it happens less often |
//! | `layers` | `..` | layers that evict |
//! | `layer_budgets` | `uniform` | how the budget is spread over layers: `uniform`, `pyramid` or `explicit` |
//!
//! Sinks and recent tokens are part of the budget. Settings under which they do not fit are refused when the policy is built, or when a
//! session starts where that depends on the layer, with the ratio that can be had. After a plan is applied a head never holds more tokens
//! than the budget says. Of tokens with equal scores the earlier ones stay, and scores that are not finite count as none.
//!
//! A keep set is rectangular: all KV heads of a layer keep equally many tokens, though not the same ones.
//!
//! # Examples
//! ```
//! use gearbox_core::{CacheGeometry, CacheView, EvictionPolicy, KeepSet, Plugin, config};
//! use gearbox_evict::window::Window;
//!
//! let settings = serde_json::json!({ "budget_tokens": 4, "sinks": 1, "min_tokens": 4 });
//! let policy = Window::new(config::from_value(&settings)?)?;
//! let mut session = policy.session(&CacheGeometry { layer: 0, layers: 1, q_heads: 2, kv_heads: 1, dim: 8 })?;
//! let plan = session.plan(&CacheView { seen: 6, tokens: 6, live: &[0, 1, 2, 3, 4, 5] })?;
//! assert_eq!(plan, KeepSet::Shared(vec![0, 3, 4, 5]));
//! # Ok::<(), gearbox_core::Error>(())
//! ```

mod budget;
pub mod h2o;
pub mod none;
pub mod random;
pub mod reference;
mod rows;
mod select;
mod settings;
pub mod snapkv;
pub mod tova;
pub mod window;

#[cfg(test)]
mod properties;

pub use budget::LayerBudgets;
