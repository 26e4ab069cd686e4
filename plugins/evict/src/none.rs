//! All tokens stay: the control that any other policy is compared with.

use gearbox_core::{
    AttentionStep, CacheGeometry, CacheView, Capabilities, ElemSet, EvictionPolicy, EvictionSession, KeepSet, Plugin,
    Result, register_eviction,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Settings of [`Nothing`]: none.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {}

/// Evicts nothing.
#[derive(Clone, Copy, Debug)]
pub struct Nothing;

impl Plugin for Nothing {
    const ID: &'static str = "none";
    const SUMMARY: &'static str = "control: all tokens stay";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(_: Config) -> Result<Self> {
        Ok(Self)
    }
}

register_eviction!(Nothing);

impl EvictionPolicy for Nothing {
    fn capabilities(&self) -> Capabilities {
        Capabilities { streaming: true, ..Capabilities::new(ElemSet::FLOATS) }
    }

    fn config(&self) -> Value {
        json!({})
    }

    fn session(&self, geometry: &CacheGeometry) -> Result<Box<dyn EvictionSession>> {
        Ok(Box::new(Session(*geometry)))
    }
}

struct Session(CacheGeometry);

impl EvictionSession for Session {
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()> {
        step.check(&self.0)
    }

    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet> {
        cache.check(&self.0)?;
        Ok(KeepSet::All)
    }
}
