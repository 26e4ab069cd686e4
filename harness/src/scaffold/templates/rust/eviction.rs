//! The eviction policy `@NAME@`: the first tokens and the last ones stay.

#![forbid(unsafe_code)]

use gearbox_core::{
    AttentionStep, CacheGeometry, CacheView, Capabilities, ElemSet, EvictionPolicy,
    EvictionSession, KeepSet, Plugin, Result, Retention,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

// The whole boundary to the host. More plugins of any kind may stand in these lists.
gearbox_abi::export_plugins! { evictions: [SinksAndRecent] }

/// Settings. Doc comments become the descriptions that `gearbox plugin show` prints, and the host
/// checks the ranges before `new` is called.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// First tokens of the sequence that stay, whatever happens: attention leans on them.
    #[schemars(range(max = 65536))]
    pub sinks: u32,
    /// Last tokens that stay.
    #[schemars(range(min = 1, max = 1048576))]
    pub recent: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            sinks: 4,
            recent: 128,
        }
    }
}

/// Keeps the first and the last tokens.
#[derive(Debug)]
pub struct SinksAndRecent {
    config: Config,
}

impl Plugin for SinksAndRecent {
    const ID: &'static str = "@NAME@";
    const SUMMARY: &'static str = "first tokens and last tokens stay";
    const SOURCE: &'static str = "Xiao et al., StreamingLLM, 2023";
    // Raise it when the same settings decide differently.
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config })
    }
}

impl EvictionPolicy for SinksAndRecent {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    /// What `gearbox plugin check` holds every plan to.
    fn retention(&self, _: &CacheGeometry, _: u64) -> Retention {
        let (sinks, recent) = (u64::from(self.config.sinks), u64::from(self.config.recent));
        Retention {
            most: Some(sinks + recent),
            sinks,
            recent,
        }
    }

    fn session(&self, _: &CacheGeometry) -> Result<Box<dyn EvictionSession>> {
        Ok(Box::new(Session {
            config: self.config,
        }))
    }
}

/// One layer of one request. What a policy learns from attention belongs here.
struct Session {
    config: Config,
}

impl EvictionSession for Session {
    /// Takes in true attention probabilities, `(queries, q_heads, tokens)`. This policy needs none.
    fn observe(&mut self, _: &AttentionStep<'_>) -> Result<()> {
        Ok(())
    }

    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet> {
        let Config { sinks, recent } = self.config;
        let oldest = cache.seen.saturating_sub(u64::from(recent));
        let stays = |position: u32| position < sinks || u64::from(position) >= oldest;
        // The cache holds positions; a keep set holds indices into them. One row serves all heads,
        // as this policy keeps the same tokens in each.
        let live = cache.row(0);
        let keep: Vec<u32> = (0..)
            .zip(live)
            .filter(|(_, position)| stays(**position))
            .map(|(idx, _)| idx)
            .collect();
        Ok(if keep.len() == live.len() {
            KeepSet::All
        } else {
            KeepSet::Shared(keep)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_between_go() -> Result<()> {
        let policy = SinksAndRecent::new(Config {
            sinks: 1,
            recent: 2,
        })?;
        let geometry = CacheGeometry {
            layer: 0,
            layers: 1,
            q_heads: 2,
            kv_heads: 1,
            dim: 4,
        };
        let mut session = policy.session(&geometry)?;
        let plan = session.plan(&CacheView {
            seen: 6,
            tokens: 5,
            live: &[0, 2, 3, 4, 5],
        })?;
        assert_eq!(plan, KeepSet::Shared(vec![0, 3, 4]));
        assert_eq!(
            session.plan(&CacheView {
                seen: 6,
                tokens: 3,
                live: &[0, 4, 5]
            })?,
            KeepSet::All
        );
        Ok(())
    }
}
