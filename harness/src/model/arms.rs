//! What is compared: pipelines, and the controls that show whether the measuring can be trusted.

use std::sync::Arc;

use gearbox_core::{
    AnyEntry, Bound, Capabilities, Chunk, ChunkMut, Chunking, CodecSpec, Context, ElemSet, Entry, LaneSpec, Latents,
    LossyTransform, Pipeline, PipelineSpec, Plugin, PluginSpec, Registry, Result, RouteSpec,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::compare::flip_head;

/// One way to hold a cache.
#[derive(Clone, Debug)]
pub struct Arm {
    /// What to call it in tables.
    pub name: String,
    /// What codes and evicts; none for the dense cache.
    pub pipeline: Option<Arc<Pipeline>>,
}

impl Arm {
    /// All tokens, raw.
    pub fn dense() -> Self {
        Self { name: "dense".to_owned(), pipeline: None }
    }

    /// Builds the arm of a pipeline.
    ///
    /// # Errors
    /// What [`Pipeline::build`] reports.
    pub fn of(spec: &PipelineSpec, registry: &Registry) -> Result<Self> {
        let pipeline = Pipeline::build(spec, registry)?;
        Ok(Self { name: pipeline.name().to_owned(), pipeline: Some(Arc::new(pipeline)) })
    }

    /// The resolved pipeline; null for the dense cache.
    pub fn spec(&self) -> Value {
        self.pipeline.as_ref().map_or(Value::Null, |pipeline| pipeline.spec().to_value())
    }
}

/// The control that must change nothing: chunks are stored and read back.
pub const IDENTITY: &str = "identity";
/// The control that any policy must beat: random tokens go.
pub const RANDOM: &str = "random";
/// The control that must be caught: the signs of one head are turned around.
pub const CORRUPT: &str = "corrupt";

/// The controls of every comparison. `random` evicts as much as the first of these pipelines that evicts; without one it is left out.
///
/// # Errors
/// What [`Pipeline::build`] reports.
pub fn controls(pipelines: &[PipelineSpec], registry: &Registry) -> Result<Vec<Arm>> {
    let mut registry = registry.clone();
    registry.insert(AnyEntry::Transform(Entry::of::<FlipHead>("control", |plugin| Arc::new(plugin))))?;
    let chunking = Chunking::ChunkedGrouped { tokens: 64 };
    let store = PipelineSpec::of_codec(PluginSpec::new("store"), chunking);
    let named = |name: &str, spec: PipelineSpec| PipelineSpec { name: Some(name.to_owned()), ..spec };
    let mut specs = vec![named(IDENTITY, store.clone())];
    if let Some(evict) = pipelines.iter().flat_map(|spec| &spec.routes).find_map(|route| route.evict.as_ref()) {
        let budget = ["target_ratio", "budget_tokens"];
        let settings = evict.settings.iter().filter(|(key, _)| budget.contains(&key.as_str()));
        let settings = settings.map(|(key, value)| (key.clone(), value.clone())).collect();
        let random = PluginSpec { id: "random".to_owned(), settings };
        let route = RouteSpec { evict: Some(random), ..store.routes[0].clone() };
        specs.push(named(RANDOM, PipelineSpec { routes: vec![route], ..store.clone() }));
    }
    let flip = RouteSpec {
        transforms: Some(vec![PluginSpec::new(FlipHead::ID)]),
        codec: Some(CodecSpec::All(PluginSpec::new("store"))),
        ..RouteSpec::default()
    };
    specs.push(named(CORRUPT, PipelineSpec { routes: vec![flip], ..store }));
    specs.iter().map(|spec| Arm::of(spec, &registry)).collect()
}

/// No settings.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Nothing {}

/// Turns the signs of the first head around; only a control knows it.
#[derive(Debug)]
struct FlipHead;

impl Plugin for FlipHead {
    const ID: &'static str = "flip-head";
    const SUMMARY: &'static str = "turns the signs of one head around";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = Nothing;

    fn new(_: Nothing) -> Result<Self> {
        Ok(Self)
    }
}

impl LossyTransform for FlipHead {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        json!({})
    }

    fn bound(&self) -> Bound {
        Bound::Unbounded
    }

    fn forward(&self, chunk: Chunk<'_>, _: &Context<'_>, out: &mut Latents) -> Result<()> {
        let lane = out.push(LaneSpec::tensor(chunk.dtype(), chunk.shape()))?;
        lane.copy_from_slice(chunk.bytes());
        flip_head(0, chunk.shape(), chunk.dtype(), lane);
        Ok(())
    }

    fn inverse(&self, latents: &Latents, _: &Context<'_>, mut out: ChunkMut<'_>) -> Result<()> {
        out.bytes_mut().copy_from_slice(&latents.lane(LaneSpec::TENSOR)?.bytes);
        Ok(())
    }
}
