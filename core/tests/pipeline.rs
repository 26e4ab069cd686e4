//! What pipelines accept and refuse, and how they say so.

mod common;

use std::sync::Arc;

use gearbox_core::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Stores runs; its level does nothing.
#[derive(Debug)]
struct Levels;

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct LevelSettings {
    #[schemars(range(min = -7, max = 22))]
    level: i32,
}

impl Plugin for Levels {
    const ID: &'static str = "levels";
    const SUMMARY: &'static str = "has a setting, for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = LevelSettings;

    fn new(_: LevelSettings) -> Result<Self> {
        Ok(Self)
    }
}

impl Codec for Levels {
    fn capabilities(&self) -> Capabilities {
        common::Runs.capabilities()
    }

    fn config(&self) -> Value {
        serde_json::json!({})
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        common::Runs.max_encoded_len(lane)
    }

    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        common::Runs.encode(lane, cx, out)
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, cx: &Context<'_>, out: &mut [u8]) -> Result<()> {
        common::Runs.decode(encoded, lane, cx, out)
    }
}

/// Writes a lane that looks like one of an earlier transform.
#[derive(Debug)]
struct Dotted;

impl Plugin for Dotted {
    const ID: &'static str = "dotted";
    const SUMMARY: &'static str = "writes a reserved lane name, for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = common::NoSettings;

    fn new(_: common::NoSettings) -> Result<Self> {
        Ok(Self)
    }
}

impl LossyTransform for Dotted {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        serde_json::json!({})
    }

    fn bound(&self) -> Bound {
        Bound::Unbounded
    }

    fn forward(&self, _: Chunk<'_>, _: &Context<'_>, out: &mut Latents) -> Result<()> {
        out.push(LaneSpec::new("0.seq", Elem::U8, Shape::flat(1)))?;
        Ok(())
    }

    fn inverse(&self, _: &Latents, _: &Context<'_>, _: ChunkMut<'_>) -> Result<()> {
        Ok(())
    }
}

/// Keeps everything.
#[derive(Debug)]
struct Keeps;

impl Plugin for Keeps {
    const ID: &'static str = "keeps";
    const SUMMARY: &'static str = "keeps everything, for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = common::NoSettings;

    fn new(_: common::NoSettings) -> Result<Self> {
        Ok(Self)
    }
}

impl EvictionPolicy for Keeps {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        serde_json::json!({})
    }

    fn session(&self, _: &CacheGeometry) -> Result<Box<dyn EvictionSession>> {
        Err(Error::unsupported("a policy for the tests of pipelines"))
    }
}

fn registry() -> Registry {
    let mut registry = common::registry();
    registry.insert(AnyEntry::Codec(Entry::of::<Levels>("tests", |p| Arc::new(p)))).unwrap();
    registry.insert(AnyEntry::Transform(Entry::of::<Dotted>("tests", |p| Arc::new(p)))).unwrap();
    registry.insert(AnyEntry::Eviction(Entry::of::<Keeps>("tests", |p| Arc::new(p)))).unwrap();
    registry
}

fn refused(json: &str) -> String {
    let built = PipelineSpec::from_json(json).and_then(|spec| Pipeline::build(&spec, &registry()));
    built.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn unknown_id_names_pointer_and_near_ids() {
    let text = refused(r#"{ "routes": [{ "codec": { "id": "rums" } }] }"#);
    assert_eq!(text, "`/routes/0/codec/id`: no codec has the id `rums`, did you mean `runs`?");
}

#[test]
fn id_of_another_kind_is_refused() {
    let text = refused(r#"{ "routes": [{ "codec": { "id": "negative" } }] }"#);
    assert!(text.contains("`negative` is not a codec: it is registered as transform"), "{text}");
}

#[test]
fn unknown_setting_names_its_pointer() {
    let text = refused(r#"{ "routes": [{ "codec": { "id": "runs", "level": 3 } }] }"#);
    assert_eq!(text, "plugin `runs`: `/routes/0/codec/level`: unknown key, no keys are legal here");
}

#[test]
fn unknown_key_of_the_pipeline_names_near_keys() {
    let text = refused(r#"{ "routes": [], "chuncking": { "mode": "per-entry" } }"#);
    assert_eq!(text, "`/chuncking`: unknown key, did you mean `chunking`?");
}

#[test]
fn overlapping_routes_are_refused() {
    let text = refused(
        r#"{ "routes": [{ "layers": "0..3", "codec": { "id": "runs" } }, { "layers": "2..", "codec": { "id": "runs" } }] }"#,
    );
    assert_eq!(text, "`/routes/1/layers`: 2.. overlaps with 0..3 of `/routes/0`");
}

#[test]
fn layer_without_route_is_named() {
    let spec = PipelineSpec::from_json(r#"{ "routes": [{ "layers": "0..2", "codec": { "id": "runs" } }] }"#).unwrap();
    let pipeline = Pipeline::build(&spec, &registry()).unwrap();
    assert!(pipeline.coder(1, Role::Key).is_ok());
    let error = pipeline.coder(2, Role::Key).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::Unsupported, "no route holds layer 2, routes are 0..2")
    );
}

#[test]
fn route_that_evicts_is_for_caches_not_for_containers() {
    let spec = PipelineSpec::from_json(
        r#"{ "routes": [{ "layers": "0..2", "codec": { "id": "runs" } },
            { "layers": "2..4", "evict": { "id": "keeps" }, "codec": { "id": "runs" } }] }"#,
    )
    .unwrap();
    let pipeline = Pipeline::build(&spec, &registry()).unwrap();
    assert!(pipeline.policy(1).unwrap().is_none() && pipeline.policy(2).unwrap().is_some());
    assert!(pipeline.coder(1, Role::Key).is_ok() && pipeline.live_coder(2, Role::Key).is_ok());
    let error = pipeline.coder(2, Role::Key).unwrap_err().to_string();
    assert_eq!(error, "layers 2..4: eviction cannot be written to a container yet");
    assert_eq!(pipeline.policy(4).unwrap_err().to_string(), "no route holds layer 4, routes are 0..2, 2..4");
}

#[test]
fn keys_and_values_may_differ() {
    let spec = PipelineSpec::from_json(
        r#"{ "routes": [{ "codec": { "id": "runs" }, "value": { "transforms": [{ "id": "nibbles" }] } }] }"#,
    )
    .unwrap();
    let pipeline = Pipeline::build(&spec, &registry()).unwrap();
    assert_eq!(pipeline.coder(0, Role::Key).unwrap().transforms(), 0);
    assert_eq!(pipeline.coder(0, Role::Value).unwrap().transforms(), 1);
    assert_eq!(pipeline.name(), "k runs | v nibbles + runs");
    let illegal = pipeline.check(0, Role::Value, DType::Bf16, Needs::default()).unwrap_err();
    assert_eq!(illegal.to_string(), "expected a tensor of f16, got bf16");
}

/// The message for a pipeline of `runs` with one part replaced.
fn refused_with(key: &str, value: &str) -> String {
    refused(&format!(r#"{{ "routes": [{{ "codec": {{ "id": "runs" }} }}], "{key}": {value} }}"#))
}

fn refused_route(route: &str) -> String {
    refused(&format!(r#"{{ "routes": [{route}] }}"#))
}

#[test]
fn chunk_length_zero_names_the_legal_range() {
    for mode in ["chunked", "chunked-grouped"] {
        let text = refused_with("chunking", &format!(r#"{{ "mode": "{mode}", "tokens": 0 }}"#));
        assert_eq!(text, "`/chunking/tokens`: 0 is out of range, expected at least 1");
    }
}

#[test]
fn misspelt_key_of_a_chunking_mode_is_named() {
    assert_eq!(
        refused_with("chunking", r#"{ "mode": "chunked", "token": 3 }"#),
        "`/chunking/token`: unknown key, did you mean `tokens`?\n`/chunking`: the key `tokens` is missing"
    );
}

#[test]
fn chunk_length_that_is_no_integer_names_pointer_and_range() {
    for number in ["128.0", "1e+30", "\"x\""] {
        assert_eq!(
            refused_with("chunking", &format!(r#"{{ "mode": "chunked", "tokens": {number} }}"#)),
            format!("`/chunking/tokens`: expected integer at least 1, got `{number}`")
        );
    }
}

#[test]
fn unknown_chunking_mode_lists_the_legal_ones() {
    let legal = r#""per-entry", "aggregate", "chunked", "chunked-grouped""#;
    assert_eq!(
        refused_with("chunking", r#"{ "mode": "chunk" }"#),
        format!("`/chunking/mode`: expected one of {legal}, got \"chunk\"")
    );
    assert_eq!(
        refused_with("chunking", "{}"),
        format!("`/chunking`: the key `mode` is missing, expected one of {legal}")
    );
}

#[test]
fn settings_of_a_plugin_are_named_from_the_root_of_the_pipeline() {
    let codec = |level: &str| format!(r#"{{ "codec": {{ "a/b": {{ "id": "levels", "level": {level} }} }} }}"#);
    let at = "plugin `levels`: `/routes/0/codec/a~1b/level`";
    assert_eq!(refused_route(&codec("23")), format!("{at}: 23 is out of range, expected -7 to 22"));
    assert_eq!(refused_route(&codec("3.0")), format!("{at}: expected integer -7 to 22, got `3.0`"));
}

#[test]
fn wrong_layer_range_names_pointer_and_form() {
    for (layers, got) in
        [(r#""3""#, "\"3\""), (r#""3..3""#, "\"3..3\""), (r#""99999999999..""#, "\"99999999999..\""), ("3", "3")]
    {
        assert_eq!(
            refused_route(&format!(r#"{{ "layers": {layers}, "codec": {{ "id": "runs" }} }}"#)),
            format!("`/routes/0/layers`: expected `A..B`, `A..`, `..B` or `..` with A < B, got `{got}`")
        );
    }
}

#[test]
fn misspelt_key_of_a_role_is_named() {
    assert_eq!(
        refused_route(r#"{ "key": { "codce": { "id": "runs" } } }"#),
        "`/routes/0/key/codce`: unknown key, did you mean `codec`?"
    );
}

#[test]
fn codec_without_id_says_what_a_codec_is() {
    let expected = "`/routes/0/codec`: expected a codec with `id`, or an object from lane name to codec, got";
    assert_eq!(refused_route(r#"{ "codec": {} }"#), format!("{expected} `{{}}`"));
    assert_eq!(refused_route(r#"{ "codec": "zstd" }"#), format!("{expected} `\"zstd\"`"));
    assert_eq!(
        refused_route(r#"{ "codec": { "level": 3 } }"#),
        "`/routes/0/codec/level`: expected an object with `id` (without `id`, the keys of a codec are lane names), got `3`"
    );
    assert_eq!(refused_route(r#"{ "codec": { "codes": {} } }"#), "`/routes/0/codec/codes`: the key `id` is missing");
    assert_eq!(
        refused_route(r#"{ "evict": "h2o", "codec": { "id": "runs" } }"#),
        "`/routes/0/evict`: expected an object with the string `id`, got `\"h2o\"`"
    );
}

#[test]
fn whole_value_and_escaped_keys_are_named() {
    assert_eq!(refused("[]"), "the whole value: expected object, got `[]`");
    assert_eq!(refused_with("a/b", "1"), "`/a~1b`: unknown key, legal keys are `chunking`, `name`, `routes`");
}

#[test]
fn more_routes_than_allowed_are_refused() {
    let route = RouteSpec { codec: Some(CodecSpec::All(PluginSpec::new("runs"))), ..RouteSpec::default() };
    let spec = PipelineSpec { routes: vec![route; 4097], ..PipelineSpec::default() };
    let error = Pipeline::build(&spec, &registry()).unwrap_err();
    assert_eq!(error.to_string(), "`/routes`: expected at most 4096 routes, got 4097");
}

/// Lanes of a chunk of 3 tokens, or why there are none.
fn lanes(route: &str) -> Result<Vec<(String, usize)>> {
    let spec = PipelineSpec::from_json(&format!(r#"{{ "routes": [{route}] }}"#))?;
    let pipeline = Pipeline::build(&spec, &registry())?;
    let bytes = common::tensor(24, 7);
    let chunk = Chunk::new(Shape::new(3, 2, 2), DType::F16, &bytes)?;
    let lanes = pipeline.coder(0, Role::Key)?.lanes(chunk, &Context::new(0, Role::Key, 0))?;
    Ok(lanes.into_iter().map(|lane| (lane.spec.name.into_owned(), lane.slot)).collect())
}

#[test]
fn bare_lane_name_finds_the_side_lane_of_an_earlier_transform() {
    let chain = r#""transforms": [{ "id": "negative" }, { "id": "negative" }]"#;
    let route = |codec: &str| lanes(&format!(r#"{{ {chain}, "codec": {codec} }}"#)).unwrap();
    let named =
        |slots: [usize; 3]| ["0.seq", "tensor", "seq"].map(str::to_owned).into_iter().zip(slots).collect::<Vec<_>>();
    let runs = r#"{ "id": "runs" }"#;
    assert_eq!(route(&format!(r#"{{ "*": {runs}, "seq": {runs} }}"#)), named([1, 0, 1]));
    assert_eq!(route(&format!(r#"{{ "*": {runs}, "0.seq": {runs}, "seq": {runs} }}"#)), named([1, 0, 2]));
}

#[test]
fn combinations_that_cannot_work_are_unsupported() {
    let text = |route: &str| {
        let error = lanes(route).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        error.to_string()
    };
    assert_eq!(
        text(r#"{ "codec": { "codes": { "id": "runs" } } }"#),
        "no codec for lane `tensor`: there are codecs for `codes` and no `*`"
    );
    assert_eq!(
        text(r#"{ "transforms": [{ "id": "nibbles" }, { "id": "negative" }], "codec": { "id": "runs" } }"#),
        "`/transforms/0`: another transform follows, but this one writes no lane `tensor` (f16 (3, 2, 2))"
    );
    assert_eq!(
        text(r#"{ "transforms": [{ "id": "dotted" }], "codec": { "id": "runs" } }"#),
        "`/transforms/0`: expected lane names without `.`, which ends the index of an earlier transform, got `0.seq`"
    );
}

#[test]
fn every_transform_of_a_chain_must_take_the_tensor() {
    let pipeline = common::pipeline(
        r#"{ "routes": [{ "transforms": [{ "id": "negative" }, { "id": "nibbles" }], "codec": { "id": "runs" } }] }"#,
    );
    let illegal = pipeline.check(0, Role::Key, DType::F32, Needs::default()).unwrap_err();
    assert_eq!(
        (illegal.kind(), illegal.to_string().as_str()),
        (ErrorKind::Unsupported, "expected a tensor of f16, got f32")
    );
}

#[test]
fn rope_facts_outside_their_range_are_refused() {
    let rope = |theta: f64, rotary_dim: usize, factor: f64| {
        let scaling = serde_json::json!({ "kind": "linear", "factor": factor });
        let value = serde_json::json!({ "pairing": "half-split", "theta": theta, "rotary_dim": rotary_dim, "scaling": scaling });
        config::from_value::<Rope>(&value).map_err(|error| error.to_string())
    };
    assert!(rope(1e4, 2, 8.0).is_ok());
    assert_eq!(rope(0.0, 2, 8.0).unwrap_err(), "`/theta`: 0.0 is out of range, expected more than 0");
    assert_eq!(rope(1e4, 1, 8.0).unwrap_err(), "`/rotary_dim`: 1 is out of range, expected at least 2");
    assert_eq!(rope(1e4, 2, 0.0).unwrap_err(), "`/scaling/factor`: 0.0 is out of range, expected more than 0");
}

#[test]
fn layer_ranges_read_and_print() {
    for (text, expected) in [("0..2", "0..2"), ("2..", "2.."), ("..4", "0..4"), ("..", "..")] {
        let range: LayerRange = serde_json::from_value(text.into()).unwrap();
        assert_eq!(range.to_string(), expected);
    }
    for text in ["", "3", "3..3", "a..b", "-1..2"] {
        assert!(serde_json::from_value::<LayerRange>(text.into()).is_err(), "{text}");
    }
}
