//! The conformance kit on the example plugins, loaded from their libraries.

mod support;

use gearbox_conformance::Outcome;
use gearbox_conformance::codec::run_codec;
use gearbox_conformance::transform::run_transform;
use serde_json::json;
use support::{c_demo, codec_entry, example, loaded, rust_demo, transform_entry};
use tempfile::tempdir;

fn all_pass(outcomes: Vec<Outcome>) {
    let failed: Vec<String> =
        outcomes.into_iter().filter(|outcome| !outcome.passed()).map(|outcome| outcome.to_string()).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn rust_codec_conforms() {
    let library = loaded(&rust_demo());
    for settings in [json!({}), json!({"from": "element"})] {
        all_pass(run_codec(&codec_entry(&library, "delta-varint"), &settings));
    }
}

#[test]
fn rust_transform_conforms() {
    let library = loaded(&rust_demo());
    for settings in [json!({}), json!({"seed": 7})] {
        all_pass(run_transform(&transform_entry(&library, "hadamard"), &settings));
    }
}

#[test]
fn rust_codec_in_place_conforms() {
    let library = loaded(&example("zoo"));
    all_pass(run_codec(&codec_entry(&library, "copy"), &json!({})));
}

#[test]
fn c_codec_conforms() {
    let folder = tempdir().unwrap();
    let library = loaded(&c_demo(folder.path()));
    for settings in [json!({}), json!({"planes": false})] {
        all_pass(run_codec(&codec_entry(&library, "plane-runs"), &settings));
    }
}

#[test]
fn c_transform_conforms() {
    let folder = tempdir().unwrap();
    let library = loaded(&c_demo(folder.path()));
    all_pass(run_transform(&transform_entry(&library, "channel-major"), &json!({})));
}
