//! Pipelines: which plugins code which layers and roles, in which chunks.
//!
//! A [`PipelineSpec`] is the JSON that a sweep enumerates. [`Pipeline::build`] turns it into plugins; the resolved spec, with every
//! default filled in, is what a container stores.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::coder::ChunkCoder;
use crate::{
    Artifact, Codec, DType, Entry, Error, EvictionPolicy, LossyTransform, Needs, PluginUse, Registry, Result,
    ResultExt, Role, Sample, config,
};

/// A pipeline as it is written down.
///
/// # Examples
/// ```
/// use gearbox_core::PipelineSpec;
///
/// let spec = PipelineSpec::from_json(r#"{
///     "routes": [
///         { "layers": "0..2", "codec": { "id": "gear-delta", "level": 3 } },
///         { "layers": "2..", "codec": { "id": "zstd" } } ],
///     "chunking": { "mode": "chunked-grouped", "tokens": 128 }
/// }"#).unwrap();
/// assert_eq!(spec.routes.len(), 2);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PipelineSpec {
    /// What to call it in tables; derived from the plugins when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Treatment per layer range; ranges do not overlap.
    pub routes: Vec<RouteSpec>,
    /// How entries become chunks.
    pub chunking: Chunking,
}

/// Treatment of a range of layers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RouteSpec {
    /// Layers, `A..B` with B exclusive; either end may be left out.
    pub layers: LayerRange,
    /// Eviction policy that decides which tokens stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evict: Option<PluginSpec>,
    /// Transforms for keys and values, in the order of encoding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transforms: Option<Vec<PluginSpec>>,
    /// Codec for keys and values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codec: Option<CodecSpec>,
    /// What differs for keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<RoleSpec>,
    /// What differs for values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<RoleSpec>,
}

/// Treatment of one role where it differs from its route.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RoleSpec {
    /// Transforms instead of the route's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transforms: Option<Vec<PluginSpec>>,
    /// Codec instead of the route's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codec: Option<CodecSpec>,
}

/// A plugin and its settings: `{ "id": …, …settings }`.
#[derive(Clone, Debug, PartialEq)]
pub struct PluginSpec {
    /// Id or alias.
    pub id: String,
    /// Settings; what is absent takes the plugin's default.
    pub settings: Map<String, Value>,
}

impl PluginSpec {
    /// A plugin with its default settings.
    pub fn new(id: impl Into<String>) -> Self {
        Self { id: id.into(), settings: Map::new() }
    }

    fn resolved(id: &str, settings: Value) -> Self {
        let settings = match settings {
            Value::Object(map) => map,
            // Not what a plugin should say, but what differs must not look the same.
            other => Map::from_iter([("value".to_owned(), other)]),
        };
        Self { id: id.to_owned(), settings }
    }

    /// The settings as JSON.
    pub fn settings_value(&self) -> Value {
        Value::Object(self.settings.clone())
    }
}

impl Serialize for PluginSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = Map::new();
        map.insert("id".into(), Value::String(self.id.clone()));
        map.extend(self.settings.clone());
        map.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PluginSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut settings = Map::deserialize(deserializer)?;
        match settings.remove("id") {
            Some(Value::String(id)) => Ok(Self { id, settings }),
            _ => Err(D::Error::custom("expected an object with a string `id`")),
        }
    }
}

impl JsonSchema for PluginSpec {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "PluginSpec".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "x-expected": "an object with the string `id`",
            "description": "A plugin and its settings.",
            "properties": { "id": { "type": "string", "description": "Id or alias of the plugin." } },
            "required": ["id"]
        })
    }
}

/// One codec for all lanes, or one per lane name with `*` for the rest.
///
/// In a chain of transforms, the lanes that an earlier one leaves beside the tensor are named `{index}.{name}`, the index counting
/// transforms from 0: `0.scales`. A codec is looked up by that name, then by the bare one (`scales`), then by `*`.
#[derive(Clone, Debug, PartialEq)]
pub enum CodecSpec {
    /// The same codec for every lane.
    All(PluginSpec),
    /// A codec per lane name.
    PerLane(BTreeMap<String, PluginSpec>),
}

impl Serialize for CodecSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All(plugin) => plugin.serialize(serializer),
            Self::PerLane(lanes) => lanes.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for CodecSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        if value.get("id").is_some_and(Value::is_string) {
            PluginSpec::deserialize(value).map(Self::All).map_err(D::Error::custom)
        } else {
            BTreeMap::deserialize(value).map(Self::PerLane).map_err(D::Error::custom)
        }
    }
}

impl JsonSchema for CodecSpec {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "CodecSpec".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let plugin = generator.subschema_for::<PluginSpec>();
        json_schema!({
            "type": "object",
            "x-expected": CODEC,
            "description": "A codec for all lanes (an object with `id`), or an object from lane name to codec with `*` for the rest. Lanes beside the tensor of an earlier transform are named `{index}.{name}`; the bare name matches them too.",
            "if": { "type": "object", "properties": { "id": { "type": "string" } }, "required": ["id"] },
            "then": plugin,
            "else": {
                "additionalProperties": {
                    "type": "object",
                    "x-expected": "an object with `id` (without `id`, the keys of a codec are lane names)",
                    "properties": { "id": { "type": "string", "description": "Id or alias of the plugin." } },
                    "required": ["id"]
                },
                "minProperties": 1,
                "x-expected": CODEC
            }
        })
    }
}

/// What a [`CodecSpec`] may be, for messages.
const CODEC: &str = "a codec with `id`, or an object from lane name to codec";

/// What a [`LayerRange`] may be, for messages.
const LAYERS: &str = "`A..B`, `A..`, `..B` or `..` with A < B";

/// Layers `A..B`, B exclusive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerRange {
    /// First layer.
    pub start: u32,
    /// Layer behind the last one; `None` has no end.
    pub end: Option<u32>,
}

impl LayerRange {
    /// Whether the layer is in the range.
    pub fn contains(self, layer: u32) -> bool {
        layer >= self.start && self.end.is_none_or(|end| layer < end)
    }

    fn overlaps(self, other: Self) -> bool {
        self.end.is_none_or(|end| other.start < end) && other.end.is_none_or(|end| self.start < end)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected {LAYERS}, got `\"{text}\"`");
        let (start, end) = text.split_once("..").ok_or_else(wrong)?;
        let number = |text: &str| text.trim().parse::<u32>().map_err(|_| wrong());
        let start = if start.trim().is_empty() { 0 } else { number(start)? };
        let end = if end.trim().is_empty() { None } else { Some(number(end)?) };
        if end.is_some_and(|end| end <= start) { Err(wrong()) } else { Ok(Self { start, end }) }
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.end {
            Some(end) => write!(f, "{}..{end}", self.start),
            None if self.start == 0 => f.write_str(".."),
            None => write!(f, "{}..", self.start),
        }
    }
}

impl Serialize for LayerRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LayerRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl JsonSchema for LayerRange {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "LayerRange".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": r"^\s*[0-9]*\s*\.\.\s*[0-9]*\s*$",
            "x-expected": LAYERS,
            "description": "Layers `A..B`, B exclusive; either end may be left out."
        })
    }
}

/// How the entries of a sequence become chunks. No chunk crosses a gap in the positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "mode", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Chunking {
    /// Every entry is one chunk.
    #[default]
    PerEntry,
    /// The entries of a sequence are joined into one chunk.
    Aggregate,
    /// Every entry is cut into chunks.
    Chunked {
        /// Tokens per chunk.
        #[schemars(range(min = 1))]
        tokens: usize,
    },
    /// The entries of a sequence are joined and then cut into chunks.
    ChunkedGrouped {
        /// Tokens per chunk.
        #[schemars(range(min = 1))]
        tokens: usize,
    },
}

impl fmt::Display for Chunking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerEntry => f.write_str("per-entry"),
            Self::Aggregate => f.write_str("aggregate"),
            Self::Chunked { tokens } => write!(f, "chunked({tokens})"),
            Self::ChunkedGrouped { tokens } => write!(f, "chunked-grouped({tokens})"),
        }
    }
}

/// Position and length of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Position of the first token.
    pub start: u64,
    /// Number of tokens.
    pub seq: usize,
}

/// A planned chunk: tokens of one or more entries that follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkPlan {
    /// Position of the first token.
    pub first_token: u64,
    /// Number of tokens.
    pub seq: usize,
    /// Entries and the tokens taken from each, in order.
    pub pieces: Vec<(usize, Range<usize>)>,
}

impl Chunking {
    /// Plans the chunks of a sequence whose entries are sorted and do not overlap.
    ///
    /// # Examples
    /// ```
    /// use gearbox_core::{Chunking, Span};
    ///
    /// let entries = [Span { start: 0, seq: 3 }, Span { start: 3, seq: 2 }, Span { start: 9, seq: 1 }];
    /// let plan = Chunking::ChunkedGrouped { tokens: 4 }.plan(&entries);
    /// let starts: Vec<_> = plan.iter().map(|chunk| (chunk.first_token, chunk.seq)).collect();
    /// assert_eq!(starts, [(0, 4), (4, 1), (9, 1)]);
    /// assert_eq!(plan[0].pieces, [(0, 0..3), (1, 0..1)]);
    /// ```
    pub fn plan(self, entries: &[Span]) -> Vec<ChunkPlan> {
        let (limit, grouped) = match self {
            Self::PerEntry => (usize::MAX, false),
            Self::Aggregate => (usize::MAX, true),
            Self::Chunked { tokens } => (tokens.max(1), false),
            Self::ChunkedGrouped { tokens } => (tokens.max(1), true),
        };
        let mut chunks: Vec<ChunkPlan> = Vec::new();
        for (idx, entry) in entries.iter().enumerate() {
            let mut taken = 0;
            while taken < entry.seq {
                let position = entry.start + taken as u64;
                let open = chunks
                    .last_mut()
                    .filter(|chunk| grouped && chunk.seq < limit && chunk.first_token + chunk.seq as u64 == position);
                let room = limit - open.as_ref().map_or(0, |chunk| chunk.seq);
                let take = (entry.seq - taken).min(room);
                let piece = (idx, taken..taken + take);
                match open {
                    Some(chunk) => {
                        chunk.seq += take;
                        chunk.pieces.push(piece);
                    }
                    None => chunks.push(ChunkPlan { first_token: position, seq: take, pieces: vec![piece] }),
                }
                taken += take;
            }
        }
        chunks
    }
}

impl PipelineSpec {
    /// All layers, keys and values through one codec.
    pub fn of_codec(codec: PluginSpec, chunking: Chunking) -> Self {
        let route = RouteSpec { codec: Some(CodecSpec::All(codec)), ..RouteSpec::default() };
        Self { name: None, routes: vec![route], chunking }
    }

    /// Every plugin with its settings, in written order.
    pub fn plugins(&self) -> impl Iterator<Item = &PluginSpec> {
        fn of<'a>(
            transforms: Option<&'a Vec<PluginSpec>>,
            codec: Option<&'a CodecSpec>,
        ) -> impl Iterator<Item = &'a PluginSpec> {
            let (all, per_lane) = match codec {
                Some(CodecSpec::All(plugin)) => (Some(plugin), None),
                Some(CodecSpec::PerLane(plugins)) => (None, Some(plugins.values())),
                None => (None, None),
            };
            transforms.into_iter().flatten().chain(all).chain(per_lane.into_iter().flatten())
        }
        self.routes.iter().flat_map(|route| {
            let roles = [&route.key, &route.value].into_iter().flatten();
            let roles = roles.flat_map(|role| of(role.transforms.as_ref(), role.codec.as_ref()));
            route.evict.iter().chain(of(route.transforms.as_ref(), route.codec.as_ref())).chain(roles)
        })
    }

    /// Reads a pipeline from JSON text.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) with line and column, or with the JSON pointer and what is legal there.
    pub fn from_json(text: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).map_err(|error| Error::invalid_config(format!("not valid JSON: {error}")))?;
        config::from_value(&value)
    }

    /// The same pipeline as JSON.
    pub fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_else(|error| unreachable!("string keys only: {error}"))
    }
}

/// A codec at one place of the pipeline: what a trained model belongs to.
#[derive(Clone, Debug)]
struct Slot {
    /// JSON pointer into the spec.
    pointer: String,
    codec: Arc<dyn Codec>,
    artifact: Option<Artifact>,
}

#[derive(Clone, Debug)]
struct Route {
    layers: LayerRange,
    policy: Option<Arc<dyn EvictionPolicy>>,
    coders: [ChunkCoder; 2],
}

/// A pipeline whose plugins are built. A clone shares them, and is trained on its own.
#[derive(Clone, Debug)]
pub struct Pipeline {
    name: String,
    spec: PipelineSpec,
    plugins: Vec<PluginUse>,
    slots: Vec<Slot>,
    routes: Vec<Route>,
    context: Needs,
    lossless: bool,
}

/// Most routes of a pipeline; each is compared with every earlier one.
const MAX_ROUTES: usize = 4096;

impl Pipeline {
    /// Builds every plugin of a spec.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) with the JSON pointer for overlapping or missing routes and for illegal settings;
    /// [`ErrorKind::UnknownPlugin`](crate::ErrorKind::UnknownPlugin) with near ids.
    pub fn build(spec: &PipelineSpec, registry: &Registry) -> Result<Self> {
        if spec.routes.is_empty() {
            return Err(Error::invalid_config("`/routes`: expected at least one route, got none"));
        }
        if spec.routes.len() > MAX_ROUTES {
            return Err(Error::invalid_config(format!(
                "`/routes`: expected at most {MAX_ROUTES} routes, got {}",
                spec.routes.len()
            )));
        }
        let mut builder = Builder { registry, plugins: Vec::new(), slots: Vec::new() };
        let mut resolved = Vec::new();
        let mut routes: Vec<Route> = Vec::new();
        for (idx, route) in spec.routes.iter().enumerate() {
            let pointer = format!("/routes/{idx}");
            if let Some(other) = routes.iter().position(|other| other.layers.overlaps(route.layers)) {
                return Err(Error::invalid_config(format!(
                    "`{pointer}/layers`: {} overlaps with {} of `/routes/{other}`",
                    route.layers, routes[other].layers
                )));
            }
            let (route, route_spec) = builder.route(route, &pointer)?;
            routes.push(route);
            resolved.push(route_spec);
        }
        let Builder { mut plugins, slots, .. } = builder;
        plugins.sort();
        plugins.dedup();
        let name =
            spec.name.clone().unwrap_or_else(|| spec.routes.iter().map(route_name).collect::<Vec<_>>().join("; "));
        let spec = PipelineSpec { name: spec.name.clone(), routes: resolved, chunking: spec.chunking };
        let coders = || routes.iter().flat_map(|route| &route.coders);
        let context = coders().fold(Needs::NONE, |context, coder| context.or(coder.context()));
        let lossless = coders().all(ChunkCoder::is_lossless);
        Ok(Self { name, spec, plugins, slots, routes, context, lossless })
    }

    /// The spec with ids instead of aliases and every default filled in.
    pub fn spec(&self) -> &PipelineSpec {
        &self.spec
    }

    /// The plugins it uses, sorted by id.
    pub fn plugins(&self) -> &[PluginUse] {
        &self.plugins
    }

    /// The given name, or one that is made of the plugins and the settings that were given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What codes this layer and role in a container.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if no route holds the layer, or if its route evicts tokens.
    pub fn coder(&self, layer: u32, role: Role) -> Result<&ChunkCoder> {
        let route = self.route(layer)?;
        if route.policy.is_some() {
            return Err(Error::unsupported(format!(
                "layers {}: eviction cannot be written to a container yet",
                route.layers
            )));
        }
        Ok(&route.coders[role as usize])
    }

    /// What codes this layer and role in a cache that knows itself which tokens are left.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if no route holds the layer.
    pub fn live_coder(&self, layer: u32, role: Role) -> Result<&ChunkCoder> {
        Ok(&self.route(layer)?.coders[role as usize])
    }

    /// What decides which tokens of this layer stay, if its route names a policy.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if no route holds the layer.
    pub fn policy(&self, layer: u32) -> Result<Option<&dyn EvictionPolicy>> {
        Ok(self.route(layer)?.policy.as_deref())
    }

    fn route(&self, layer: u32) -> Result<&Route> {
        self.routes.iter().find(|route| route.layers.contains(layer)).ok_or_else(|| {
            let held: Vec<_> = self.routes.iter().map(|route| route.layers.to_string()).collect();
            Error::unsupported(format!("no route holds layer {layer}, routes are {}", held.join(", ")))
        })
    }

    /// What the pipeline does to keys and values with so many channels per head: pipelines that do the same give equal specs.
    ///
    /// Keys and values are written apart, without a name, and settings that make no difference there have one value; see
    /// [`LossyTransform::effective_config`].
    pub fn effective_spec(&self, dims: [usize; 2]) -> PipelineSpec {
        let role_spec = |spec: &RouteSpec, route: &Route, role: Role| {
            let own = if role == Role::Key { &spec.key } else { &spec.value };
            let own = own.clone().unwrap_or_default();
            let transforms = own.transforms.or_else(|| spec.transforms.clone()).unwrap_or_default();
            let effective = route.coders[role as usize].effective(role, dims[role as usize]);
            let transforms =
                transforms.iter().zip(effective).map(|(plugin, value)| PluginSpec::resolved(&plugin.id, value));
            Some(RoleSpec { transforms: Some(transforms.collect()), codec: own.codec.or_else(|| spec.codec.clone()) })
        };
        let routes = self.spec.routes.iter().zip(&self.routes).map(|(spec, route)| RouteSpec {
            layers: spec.layers,
            evict: spec.evict.clone(),
            key: role_spec(spec, route, Role::Key),
            value: role_spec(spec, route, Role::Value),
            ..RouteSpec::default()
        });
        PipelineSpec { name: None, routes: routes.collect(), chunking: self.spec.chunking }
    }

    /// The parts of the context that any coder of the pipeline needs or wants.
    pub fn context(&self) -> Needs {
        self.context
    }

    /// Whether every coder gives back every bit.
    pub fn is_lossless(&self) -> bool {
        self.lossless
    }

    /// Whether every transform promises a bound on the error.
    pub fn is_bounded(&self) -> bool {
        self.coders().all(ChunkCoder::is_bounded)
    }

    /// Whether equal input gives equal bytes, as its plugins declare.
    pub fn is_deterministic(&self) -> bool {
        self.coders().all(ChunkCoder::is_deterministic)
    }

    fn coders(&self) -> impl Iterator<Item = &ChunkCoder> {
        self.routes.iter().flat_map(|route| &route.coders)
    }

    /// Checks that tensors of a type can be coded, before any work starts.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) with the reason: element type, or a need that `offered` lacks.
    pub fn check(&self, layer: u32, role: Role, dtype: DType, offered: Needs) -> Result<()> {
        self.coder(layer, role)?.check(dtype, offered)
    }

    /// Trains every codec that learns a model. `samples` gives the lanes that reach a codec, by slot; see [`ChunkCoder::lanes`].
    ///
    /// # Errors
    /// What the codec reports, with its JSON pointer.
    pub fn train<'a>(&mut self, samples: &dyn Fn(usize) -> Box<dyn Iterator<Item = Sample<'a>> + 'a>) -> Result<()> {
        for slot in 0..self.slots.len() {
            let trained = self.slots[slot].codec.train(&mut samples(slot));
            if let Some(artifact) = trained.context(|| format!("training `{}`", self.slots[slot].pointer))? {
                self.set_artifact(slot, artifact)?;
            }
        }
        Ok(())
    }

    /// The trained models by slot.
    pub fn artifacts(&self) -> impl Iterator<Item = (usize, &Artifact)> {
        self.slots.iter().enumerate().filter_map(|(idx, slot)| Some((idx, slot.artifact.as_ref()?)))
    }

    /// Puts a trained model in place.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) if there is no such slot or its codec takes no such model.
    pub fn set_artifact(&mut self, slot: usize, artifact: Artifact) -> Result<()> {
        let count = self.slots.len();
        let place = self
            .slots
            .get_mut(slot)
            .ok_or_else(|| Error::corrupt(format!("artifact for codec {slot}, but the pipeline has {count} codecs")))?;
        let codec = place
            .codec
            .with_artifact(&artifact.0)?
            .ok_or_else(|| Error::corrupt(format!("artifact for `{}`, but its codec takes none", place.pointer)))?;
        place.codec = Arc::clone(&codec);
        place.artifact = Some(artifact);
        for coder in self.routes.iter_mut().flat_map(|route| &mut route.coders) {
            coder.replace_codec(slot, &codec);
            self.context = self.context.or(coder.context());
        }
        Ok(())
    }
}

struct Builder<'a> {
    registry: &'a Registry,
    plugins: Vec<PluginUse>,
    slots: Vec<Slot>,
}

/// Built transforms with their resolved specs.
type Transforms = (Vec<Arc<dyn LossyTransform>>, Vec<PluginSpec>);

/// Slots of a codec spec: lane name to slot, `*` for the rest.
type Lanes = BTreeMap<String, usize>;

impl Builder<'_> {
    fn route(&mut self, spec: &RouteSpec, pointer: &str) -> Result<(Route, RouteSpec)> {
        let mut resolved = RouteSpec { layers: spec.layers, ..RouteSpec::default() };
        let mut policy = None;
        if let Some(evict) = &spec.evict {
            let entry = self.registry.eviction(&evict.id);
            let entry = entry.context(|| format!("`{pointer}/evict/id`"))?;
            let built = build(entry, evict, &format!("{pointer}/evict"))?;
            self.plugins.push(entry.as_use()?);
            resolved.evict = Some(PluginSpec::resolved(&entry.id, built.config()));
            policy = Some(built);
        }
        let shared_codec = match &spec.codec {
            Some(codec) => Some(self.codec(codec, &format!("{pointer}/codec"))?),
            None => None,
        };
        resolved.codec = shared_codec.as_ref().map(|(_, spec)| spec.clone());
        let mut coders = Vec::new();
        let mut shared_transforms = None;
        for role in Role::ALL {
            let own = if role == Role::Key { &spec.key } else { &spec.value };
            let own = own.clone().unwrap_or_default();
            let mut own_resolved = RoleSpec::default();
            let lanes = match (&own.codec, &shared_codec) {
                (Some(codec), _) => {
                    let (lanes, codec) = self.codec(codec, &format!("{pointer}/{role}/codec"))?;
                    own_resolved.codec = Some(codec);
                    lanes
                }
                (None, Some((lanes, _))) => lanes.clone(),
                (None, None) => {
                    return Err(Error::invalid_config(format!(
                        "`{pointer}`: no codec for {role}, expected `codec` or `{role}.codec`"
                    )));
                }
            };
            let transforms = if let Some(list) = &own.transforms {
                let (built, specs) = self.transforms(list, &format!("{pointer}/{role}/transforms"))?;
                own_resolved.transforms = Some(specs);
                built
            } else if let Some(built) = &shared_transforms {
                Clone::clone(built)
            } else {
                let list = spec.transforms.as_deref().unwrap_or_default();
                let (built, specs) = self.transforms(list, &format!("{pointer}/transforms"))?;
                resolved.transforms = (!specs.is_empty()).then_some(specs);
                shared_transforms = Some(built.clone());
                built
            };
            let lanes = lanes.into_iter().map(|(name, slot)| (name, (slot, Arc::clone(&self.slots[slot].codec))));
            coders.push(ChunkCoder::new(transforms, lanes.collect()));
            let own_resolved = (own_resolved != RoleSpec::default()).then_some(own_resolved);
            if role == Role::Key {
                resolved.key = own_resolved;
            } else {
                resolved.value = own_resolved;
            }
        }
        let coders = coders.try_into().unwrap_or_else(|_| unreachable!("one coder per role"));
        Ok((Route { layers: spec.layers, policy, coders }, resolved))
    }

    fn codec(&mut self, spec: &CodecSpec, pointer: &str) -> Result<(Lanes, CodecSpec)> {
        match spec {
            CodecSpec::All(plugin) => {
                let (slot, resolved) = self.slot(plugin, pointer)?;
                Ok((Lanes::from([("*".to_owned(), slot)]), CodecSpec::All(resolved)))
            }
            CodecSpec::PerLane(plugins) => {
                let mut lanes = Lanes::new();
                let mut specs = BTreeMap::new();
                for (name, plugin) in plugins {
                    let (slot, resolved) = self.slot(plugin, &config::join(pointer, name))?;
                    lanes.insert(name.clone(), slot);
                    specs.insert(name.clone(), resolved);
                }
                Ok((lanes, CodecSpec::PerLane(specs)))
            }
        }
    }

    fn slot(&mut self, plugin: &PluginSpec, pointer: &str) -> Result<(usize, PluginSpec)> {
        let entry = self.registry.codec(&plugin.id).context(|| format!("`{pointer}/id`"))?;
        let codec = build(entry, plugin, pointer)?;
        let resolved = PluginSpec::resolved(&entry.id, codec.config());
        self.plugins.push(entry.as_use()?);
        self.slots.push(Slot { pointer: pointer.to_owned(), codec, artifact: None });
        Ok((self.slots.len() - 1, resolved))
    }

    fn transforms(&mut self, list: &[PluginSpec], pointer: &str) -> Result<Transforms> {
        let mut built = Vec::new();
        let mut specs = Vec::new();
        for (idx, plugin) in list.iter().enumerate() {
            let pointer = format!("{pointer}/{idx}");
            let entry = self.registry.transform(&plugin.id).context(|| format!("`{pointer}/id`"))?;
            let transform = build(entry, plugin, &pointer)?;
            specs.push(PluginSpec::resolved(&entry.id, transform.config()));
            self.plugins.push(entry.as_use()?);
            built.push(transform);
        }
        Ok((built, specs))
    }
}

/// Builds a plugin; the findings of its schema start at `pointer`, as if the pipeline's own schema held it.
fn build<T: ?Sized>(entry: &Entry<T>, plugin: &PluginSpec, pointer: &str) -> Result<Arc<T>> {
    let settings = plugin.settings_value();
    let name = || format!("plugin `{}`", entry.id);
    config::check_at(&entry.schema, &settings, pointer).context(name)?;
    (entry.build)(&settings).context(name).context(|| format!("`{pointer}`"))
}

fn plugin_name(plugin: &PluginSpec) -> String {
    let settings: Vec<_> = plugin
        .settings
        .iter()
        .map(|(key, value)| format!("{key}={}", value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
        .collect();
    if settings.is_empty() { plugin.id.clone() } else { format!("{}({})", plugin.id, settings.join(",")) }
}

fn codec_name(codec: &CodecSpec) -> String {
    match codec {
        CodecSpec::All(plugin) => plugin_name(plugin),
        CodecSpec::PerLane(lanes) => {
            let lanes: Vec<_> = lanes.iter().map(|(lane, plugin)| format!("{lane}: {}", plugin_name(plugin))).collect();
            format!("{{{}}}", lanes.join(", "))
        }
    }
}

fn steps_name(transforms: Option<&[PluginSpec]>, codec: Option<&CodecSpec>) -> String {
    let transforms = transforms.unwrap_or_default().iter().map(plugin_name);
    transforms.chain(codec.map(codec_name)).collect::<Vec<_>>().join(" + ")
}

fn route_name(route: &RouteSpec) -> String {
    let part = |own: Option<&RoleSpec>| {
        let transforms = own.and_then(|own| own.transforms.as_deref()).or(route.transforms.as_deref());
        let codec = own.and_then(|own| own.codec.as_ref()).or(route.codec.as_ref());
        steps_name(transforms, codec)
    };
    let (key, value) = (part(route.key.as_ref()), part(route.value.as_ref()));
    let body = if key == value { key } else { format!("k {key} | v {value}") };
    let body = route.evict.as_ref().map_or(body.clone(), |evict| format!("{} + {body}", plugin_name(evict)));
    if route.layers == LayerRange::default() { body } else { format!("{}: {body}", route.layers) }
}
