//! Every file under `configs/` works, and the schemas there are those of the code.

use std::fs;
use std::path::{Path, PathBuf};

use gearbox_core::{PipelineSpec, config};
use serde_json::Value;

use crate::run::{json, root, text};

fn files(folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join("configs").join(folder)).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty());
    paths
}

#[test]
fn every_pipeline_runs_on_the_sample() {
    for path in files("pipelines") {
        let sweep = json(&["sweep", "--pipeline", text(&path)]);
        assert_eq!(sweep["rows"][0]["state"], "ok", "{}", path.display());
    }
}

#[test]
fn every_sweep_runs_on_the_sample() {
    for path in files("sweeps") {
        let sweep = json(&["sweep", text(&path)]);
        for row in sweep["rows"].as_array().unwrap() {
            assert_eq!(row["state"], "ok", "{}: {row}", path.display());
        }
    }
}

#[test]
fn limits_and_pipelines_of_models_are_legal() {
    for path in files("gate") {
        gearbox::gate::Gate::read(&path).unwrap();
    }
    let registry = gearbox_plugins::registry().unwrap();
    for path in files("model") {
        let value = gearbox::pipelines::read(text(&path), &registry).unwrap();
        for spec in gearbox::pipelines::expand(&value).unwrap() {
            gearbox_core::Pipeline::build(&spec, &registry).unwrap();
        }
    }
}

#[test]
fn schemas_are_those_of_the_code() {
    let folder = root().join("configs/schema");
    check(&folder.join("pipeline.json"), &config::schema_of::<PipelineSpec>());
    check(&folder.join("sweep.json"), &config::schema_of::<gearbox::sweep::SweepConfig>());
    check(&folder.join("gate.json"), &config::schema_of::<gearbox::gate::Gate>());
    check(&folder.join("h2o-preset.json"), &config::schema_of::<gearbox::exp::h2o::Preset>());
    for entry in gearbox_plugins::registry().unwrap().entries() {
        check(&folder.join(format!("plugin-{}.json", entry.id())), entry.schema());
    }
}

fn check(path: &Path, schema: &Value) {
    let text = format!("{}\n", serde_json::to_string_pretty(schema).unwrap());
    if std::env::var_os("GEARBOX_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &text).unwrap();
    }
    let found = fs::read_to_string(path).unwrap_or_default();
    assert_eq!(found, text, "{}: GEARBOX_BLESS=1 writes it again", path.display());
}
