//! What pipelines accept and refuse, and how they say so.

mod common;

use common::registry;
use gearbox_core::{DType, ErrorKind, LayerRange, Needs, Pipeline, PipelineSpec, Role};

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
    assert_eq!(text, "`/routes/0/codec`: plugin `runs`: `/level`: unknown key, no keys are legal here");
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

#[test]
fn chunk_length_zero_names_the_legal_range() {
    let text =
        refused(r#"{ "routes": [{ "codec": { "id": "runs" } }], "chunking": { "mode": "chunked", "tokens": 0 } }"#);
    assert!(text.starts_with("`/chunking"), "{text}");
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
