//! Bad dumps: every defect has a name, the other entries are still processed, the exit status says so.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json as value};

use crate::run::{json, run, stderr, text};

/// One run, one layer, three entries of two tokens, one head of two channels, FP16.
fn dump(folder: &Path) -> PathBuf {
    let layer = folder.join("demo/layer_0");
    fs::create_dir_all(&layer).unwrap();
    for start in [0u64, 2, 4] {
        write(&layer, start, |_| {});
    }
    folder.to_owned()
}

fn write(layer: &Path, start: u64, change: impl FnOnce(&mut Value)) {
    let name = format!("t{start}_{}", start + 2);
    for role in ["k", "v"] {
        fs::write(layer.join(format!("{role}_{name}.bin")), [start as u8; 8]).unwrap();
    }
    let mut meta = value!({
        "layer_id": 0, "seq_start": start, "seq_len": 2, "seq_end_exclusive": start + 2, "kv_heads": 1, "head_dim": 2,
        "bytes_per_elem": 2, "dtype": "fp16", "add": 2, "tensor_seq_len": 2, "quant_key": false, "quant_value": false,
        "flash_attention": true, "stage": "prefill", "run_id": "demo",
        "k_file": format!("k_{name}.bin"), "v_file": format!("v_{name}.bin"),
    });
    change(&mut meta);
    fs::write(layer.join(format!("meta_{name}.json")), meta.to_string()).unwrap();
}

/// Breaks the entry at token 2 and returns the counts of `dump check`, whose exit status must be 2.
fn reasons(break_entry: impl FnOnce(&Path)) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let path = dump(folder.path());
    break_entry(&path.join("demo/layer_0"));
    let output = run(&["dump", "check", "--dump", text(&path), "--json"], 2);
    let checked: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(checked["entries"].as_u64().unwrap() + checked["bad"].as_u64().unwrap(), 3, "{checked}");
    run(&["dump", "check", "--dump", text(&path), "--allow-bad"], 0);
    // The others are still worked on, and the exit status still says that something is missing.
    let swept = run(&["sweep", "--pipeline", "store", "--dump", text(&path), "--json"], 2);
    let swept: Value = serde_json::from_slice(&swept.stdout).unwrap();
    assert_eq!(swept["rows"][0]["state"], "ok");
    checked["counts"].clone()
}

fn broken_meta(change: impl FnOnce(&mut Value)) -> Value {
    reasons(|layer| write(layer, 2, change))
}

fn remove(key: &'static str) -> impl FnOnce(&mut Value) {
    move |meta| {
        meta.as_object_mut().unwrap().remove(key);
    }
}

#[test]
fn meta_that_is_not_an_object_of_json_is_named() {
    let meta = |layer: &Path| layer.join("meta_t2_4.json");
    assert_eq!(reasons(|layer| fs::write(meta(layer), "{").unwrap()), value!({ "meta-not-json": 1 }));
    assert_eq!(reasons(|layer| fs::write(meta(layer), "[1]").unwrap()), value!({ "meta-not-object": 1 }));
}

#[test]
fn missing_and_wrong_keys_are_named() {
    for key in ["k_file", "v_file", "bytes_per_elem", "seq_len", "kv_heads", "head_dim"] {
        assert_eq!(broken_meta(remove(key)), value!({ "meta-key-missing": 1 }), "{key}");
    }
    assert_eq!(broken_meta(|meta| meta["seq_len"] = "two".into()), value!({ "meta-value-invalid": 1 }));
    assert_eq!(broken_meta(|meta| meta["bytes_per_elem"] = 3.into()), value!({ "unsupported-element-size": 1 }));
}

#[test]
fn missing_empty_and_wrongly_sized_tensors_are_named() {
    let key = |layer: &Path| layer.join("k_t2_4.bin");
    assert_eq!(reasons(|layer| fs::remove_file(key(layer)).unwrap()), value!({ "tensor-file-missing": 1 }));
    assert_eq!(reasons(|layer| fs::write(key(layer), []).unwrap()), value!({ "tensor-empty": 1 }));
    assert_eq!(reasons(|layer| fs::write(key(layer), [0; 7]).unwrap()), value!({ "size-not-multiple-of-element": 1 }));
    assert_eq!(reasons(|layer| fs::write(key(layer), [0; 6]).unwrap()), value!({ "size-differs-from-shape": 1 }));
}

#[test]
fn paths_that_leave_their_folder_are_named() {
    for path in ["../k.bin", "/etc/hostname"] {
        assert_eq!(broken_meta(|meta| meta["k_file"] = path.into()), value!({ "path-escapes-folder": 1 }));
    }
}

#[test]
fn values_that_are_not_finite_are_found_by_a_scan() {
    let folder = tempfile::tempdir().unwrap();
    let path = dump(folder.path());
    fs::write(path.join("demo/layer_0/v_t2_4.bin"), [0, 0x7C, 0, 0, 0, 0, 0, 0x7E]).unwrap();
    let output = run(&["dump", "check", "--dump", text(&path), "--json"], 2);
    let checked: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(checked["counts"], value!({ "non-finite-values": 1 }));
    // A codec does not care: such values come back like all others.
    assert_eq!(json(&["sweep", "--pipeline", "gear-delta", "--dump", text(&path)])["rows"][0]["state"], "ok");
}

#[test]
fn nothing_to_read_is_an_error_that_says_what_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = text(folder.path());
    for command in [["dump", "info"], ["dump", "check"]] {
        let message = stderr(&[&command[..], &["--dump", path]].concat(), 2);
        assert!(message.contains("meta_") && message.contains("safetensors"), "{message}");
    }
    assert!(stderr(&["sweep", "--dump", &format!("{path}/none")], 2).contains("none"));
    dump(folder.path());
    let message = stderr(&["sweep", "--dump", path, "--min-seq-len", "100"], 2);
    assert!(message.contains('3'), "{message}");
}

#[test]
fn convert_rounds_refuses_infinities_and_goes_on_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let path = dump(folder.path());
    let layer = path.join("demo/layer_0");
    for start in [0u64, 2, 4] {
        write(&layer, start, |meta| {
            meta["bytes_per_elem"] = 4.into();
            meta["dtype"] = "fp32".into();
        });
        let big = if start == 2 { 65520f32 } else { 1.0 };
        for role in ["k", "v"] {
            let bytes: Vec<u8> = [big, 1.5, -2.0, 1e-9].iter().flat_map(|value| value.to_le_bytes()).collect();
            fs::write(layer.join(format!("{role}_t{start}_{}.bin", start + 2)), bytes).unwrap();
        }
    }
    let out = path.join("out");
    let convert = ["dump", "convert", text(&layer), text(&out)];
    let report = run(&[&convert[..], &["--json"]].concat(), 2);
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    assert_eq!((&report["done"], &report["refused"]), (&value!(2), &value!(1)), "{report}");
    // A key file that was cut by an interruption does not count as done.
    fs::write(out.join("demo/layer_0/k_t0_2.bin"), [0; 3]).unwrap();
    let report = json(&[&convert[..], &["--allow-inf"]].concat());
    assert_eq!((&report["done"], &report["already_done"]), (&value!(2), &value!(1)), "{report}");
    assert_eq!(fs::read(out.join("demo/layer_0/k_t0_2.bin")).unwrap(), [0, 0x3C, 0, 0x3E, 0, 0xC0, 0, 0]);
    assert_eq!(fs::read(out.join("demo/layer_0/k_t2_4.bin")).unwrap()[..2], [0, 0x7C]);
}
