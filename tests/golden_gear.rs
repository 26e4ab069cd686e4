//! The `gear-fp16` experiments beside what the reference wrote for the same dumps.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::run::{json, run, shared, stdout, text};

/// A CSV file without quotes: cells by column, row by row.
fn table(path: &Path) -> Vec<BTreeMap<String, String>> {
    let content = fs::read_to_string(path).unwrap();
    assert!(content.ends_with("\r\n"), "{}", path.display());
    let mut lines = content.split_terminator("\r\n").map(|line| line.split(',').map(ToOwned::to_owned));
    let header: Vec<String> = lines.next().unwrap().collect();
    lines.map(|cells| header.iter().cloned().zip(cells).collect()).collect()
}

fn columns(path: &Path) -> Vec<String> {
    let content = fs::read_to_string(path).unwrap();
    content.lines().next().unwrap().split(',').map(ToOwned::to_owned).collect()
}

type Key = (String, u32, u64, u32);

/// Rows by run, layer, start and head. Heads of the reference have no run: they follow the rows of its layers.
fn keyed(out: &Path) -> [BTreeMap<Key, BTreeMap<String, String>>; 2] {
    let (layers, heads) = (table(&out.join("layer_metrics.csv")), table(&out.join("head_metrics.csv")));
    let count = heads.len() / layers.len();
    let key = |layer: &BTreeMap<String, String>, head: usize| {
        (layer["run_id"].clone(), layer["layer_id"].parse().unwrap(), layer["seq_start"].parse().unwrap(), head as u32)
    };
    let mut keyed = [BTreeMap::new(), BTreeMap::new()];
    for (row, cells) in heads.into_iter().enumerate() {
        let (layer, head) = (&layers[row / count], row % count);
        assert_eq!((&cells["layer_id"], &cells["seq_start"]), (&layer["layer_id"], &layer["seq_start"]));
        assert_eq!(cells["head_id"], head.to_string());
        assert!(keyed[1].insert(key(layer, head), cells).is_none());
    }
    for layer in layers {
        assert!(keyed[0].insert(key(&layer, 0), layer).is_none());
    }
    keyed
}

fn gear_fp16_equals(name: &str, dump: &str, flags: &[&str]) {
    let Some(shared) = shared() else { return };
    let golden = shared.join("golden").join(name);
    let folder = tempfile::tempdir().unwrap();
    let dump = shared.join("data/dumps").join(dump);
    let paths = ["exp", "gear-fp16", "--dump-dir", text(&dump), "--out-dir", text(folder.path())];
    run(&[&paths, flags].concat(), 0);

    for file in ["layer_metrics.csv", "head_metrics.csv"] {
        let reference = columns(&golden.join(file));
        assert_eq!(columns(&folder.path().join(file))[..reference.len()], reference, "{name}/{file}");
    }
    let mut compared = 0;
    for (ours, theirs) in keyed(folder.path()).into_iter().zip(keyed(&golden)) {
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{name}");
        for (key, theirs) in theirs {
            for (column, expected) in theirs {
                let got = &ours[&key][&column];
                if column.ends_with("_entropy") {
                    let [expected, got] = [&expected, got].map(|text| text.parse::<f64>().unwrap());
                    assert!(
                        (expected - got).abs() <= 1e-12,
                        "{name}, {key:?}, {column}: expected {expected}, got {got}"
                    );
                } else {
                    assert_eq!(*got, expected, "{name}, {key:?}, {column}");
                }
                compared += 1;
            }
        }
    }
    assert!(compared > 0);
    let summaries = [folder.path(), &golden].map(|out| fs::read_to_string(out.join("summary.md")).unwrap());
    assert_eq!(summaries[0], summaries[1], "{name}/summary.md");
}

#[test]
fn gear_fp16_equals_the_reference_on_fp16() {
    gear_fp16_equals("gear-fp16", "fp16", &[]);
}

#[test]
fn gear_fp16_equals_the_reference_on_prompts_alone() {
    gear_fp16_equals("gear-fp16-prefill", "fp16", &["--stage", "prefill"]);
}

#[test]
fn gear_fp16_equals_the_reference_on_fp32() {
    gear_fp16_equals("gear-fp32", "fp32", &[]);
}

#[test]
fn verify_roundtrip_prints_what_the_reference_prints() {
    let Some(shared) = shared() else { return };
    let dump = shared.join("data/dumps/fp16");
    let printed = stdout(&["exp", "verify-roundtrip", "--dump-dir", text(&dump)]);
    assert_eq!(printed.trim_end(), fs::read_to_string(shared.join("golden/verify.txt")).unwrap().trim_end());
    let verified = json(&["exp", "verify-roundtrip", "--dump-dir", text(&dump), "--limit", "5"]);
    assert_eq!((&verified["checked"], &verified["failures"]), (&5.into(), &serde_json::json!([])));
    run(&["exp", "verify-roundtrip", "--dump-dir", text(&dump), "--min-seq-len", "9999"], 2);
}

#[test]
fn bench_latency_prints_the_lines_of_the_reference() {
    let Some(shared) = shared() else { return };
    let dump = shared.join("data/dumps/fp16");
    let flags = ["exp", "bench-latency", "--dump-dir", text(&dump), "--stage", "prefill", "--iters", "1"];
    let printed = stdout(&flags);
    let golden = fs::read_to_string(shared.join("golden/bench-latency.txt")).unwrap();
    let label = |line: &str| line.split(": ").next().unwrap().to_owned();
    for (got, expected) in printed.lines().zip(golden.lines()) {
        // Sizes are equal, times are those of this machine.
        if ["Mode", "Dumps", "Avg ratio"].contains(&label(expected).as_str()) {
            assert_eq!(got, expected);
        } else {
            assert_eq!(label(got), label(expected));
        }
    }
    let entries = json(&flags)["entries"].as_array().unwrap().len();
    assert_eq!(entries, 2 * 24, "keys and values");
}
