//! The main job: sweeps over real dumps.

use gearbox_core::Kind;
use serde_json::Value;

use crate::run::{json, run, sample, stderr, stdout, text};

#[test]
fn sweep_without_arguments_decodes_every_codec_exactly_on_the_sample() {
    let sweep = json(&["sweep"]);
    let rows = sweep["rows"].as_array().unwrap();
    let registry = gearbox_plugins::registry().unwrap();
    let count = |kind| registry.entries().filter(|entry| entry.kind() == kind).count();
    let codecs = count(Kind::Codec);
    assert_eq!(rows.len(), codecs * (4 + count(Kind::Transform)));
    for row in &rows[..4 * codecs] {
        assert_eq!((&row["state"], &row["changed_values"]), (&Value::from("ok"), &Value::from(0)), "{row}");
    }
    for row in rows.iter().filter(|row| row["state"] != "unsupported") {
        assert_eq!(row["state"], "ok", "{row}");
        let ledger: u64 = row["ledger"].as_array().unwrap().iter().map(|row| row["bytes"].as_u64().unwrap()).sum();
        assert_eq!(ledger, row["stored_bytes"].as_u64().unwrap());
    }
}

#[test]
fn same_sweep_stores_the_same_bytes_for_any_number_of_threads() {
    let stored = |threads| {
        let sweep = json(&["sweep", "--threads", threads]);
        let rows = sweep["rows"].as_array().unwrap().clone();
        rows.iter().map(|row| row["stored_bytes"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(stored("1"), stored("4"));
}

#[test]
fn kept_containers_are_the_rows_of_the_table_and_of_the_csv() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("results");
    let arguments = ["sweep", "--pipeline", "gear", "--pipeline", "store", "--out", text(&out), "--keep-containers"];
    let table = stdout(&arguments);
    assert!(std::fs::read_to_string(out.join("sweep.md")).unwrap().contains(table.trim()));
    let csv = std::fs::read_to_string(out.join("sweep.csv")).unwrap();
    for (idx, line) in csv.lines().skip(1).enumerate() {
        let size = std::fs::metadata(out.join(format!("{idx:04}.gbx"))).unwrap().len().to_string();
        assert_eq!(line.split(',').nth(8).unwrap(), size, "{line}");
    }
    let message = stderr(&arguments, 2);
    assert!(message.contains("sweep.json") && message.contains("overwrite"), "{message}");
    run(&[&arguments[..], &["--overwrite"]].concat(), 0);
}

#[test]
fn rows_tell_how_far_they_are_from_the_order_0_floor() {
    let sweep = json(&[
        "sweep",
        "--pipeline",
        "store",
        "--pipeline",
        r#"{"routes": [{"layers": "..1", "codec": {"id": "zstd"}}]}"#,
    ]);
    let entropy = &sweep["dumps"][0]["entropy"];
    let near = |value: &Value, expected: f64| assert!((value.as_f64().unwrap() - expected).abs() < 1e-9, "{value}");
    // By NumPy, over the same values.
    near(&entropy["floor"], f64::midpoint(13.609_253_248_463_752, 13.569_039_429_191_232));
    let row = &sweep["rows"][0];
    near(&row["bits_per_value"], row["stored_bytes"].as_f64().unwrap() * 8.0 / 811_008.0);
    near(&row["gap"], row["bits_per_value"].as_f64().unwrap() - entropy["floor"].as_f64().unwrap());
    let unsupported = &sweep["rows"][1];
    assert_eq!((&unsupported["floor"], &unsupported["gap"]), (&entropy["floor"], &Value::Null));
}

#[test]
fn entropies_of_the_sample_are_those_of_an_independent_count() {
    let found = json(&["dump", "info", "--entropy"])["entropy"].take();
    let keys = &found["roles"][0];
    assert_eq!((&keys["role"], &keys["values"]), (&Value::from("key"), &Value::from(405_504)));
    // By NumPy: means over six layers.
    let expected = [
        ("raw", [0.998_713_084_471, 2.639_081_437_986, 9.971_458_726_006, 5.568_714_454_730, 7.997_973_794_387]),
        ("delta", [0.853_940_235_555, 2.983_162_834_587, 9.998_235_797_437, 5.755_765_704_493, 7.999_666_972_293]),
        ("channel", [0.894_810_482_501, 2.380_354_716_508, 9.118_082_032_867, 5.109_046_872_272, 7.902_928_604_001]),
    ];
    for (view, bits) in expected {
        for (stream, bits) in ["sign", "exponent", "mantissa", "hi", "lo"].into_iter().zip(bits) {
            let found = keys[view][stream].as_f64().unwrap();
            assert!((found - bits).abs() < 1e-9, "{view} {stream}: expected {bits}, got {found}");
        }
    }
    assert_eq!(found["layers"].as_array().unwrap().len(), 12);
    assert_eq!(found["tensors"].as_array().unwrap().len(), 12);
    let table = stdout(&["dump", "info", "--entropy=layer"]);
    assert_eq!(table.lines().filter(|line| line.contains("| layer ")).count(), 12, "{table}");
}

#[test]
fn sweep_of_settings_runs_each_once() {
    let pipeline = r#"{ "pipelines": [
        { "routes": [{ "codec": { "id": "zstd", "level": { "sweep": [1, 3] } } }] },
        { "routes": [{ "codec": { "id": "zstd" } }] }] }"#;
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("levels.json");
    std::fs::write(&config, pipeline).unwrap();
    let sweep = json(&["sweep", text(&config)]);
    let levels: Vec<_> = sweep["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["pipeline"]["routes"][0]["codec"]["level"].as_i64().unwrap())
        .collect();
    assert_eq!(levels, [1, 3], "the default level 3 is there already");
}

#[test]
fn pipeline_of_the_command_line_may_hold_sweeps() {
    let pipeline = r#"{ "routes": [{ "codec": { "id": "zstd", "level": { "sweep": [1, 3] } } }] }"#;
    assert_eq!(json(&["sweep", "--pipeline", pipeline])["rows"].as_array().unwrap().len(), 2);
    let message = stderr(&["bench", "--pipeline", pipeline], 2);
    assert!(message.contains("`/routes/0/codec/level`: expected one pipeline"), "{message}");
}

#[test]
fn pipeline_that_is_not_legal_is_a_row_with_its_reason() {
    let pipeline = r#"{ "routes": [{ "layers": "0..2", "codec": { "id": "gear" } }] }"#;
    let sweep = json(&["sweep", "--pipeline", pipeline, "--pipeline", "store"]);
    let rows = sweep["rows"].as_array().unwrap();
    assert_eq!(rows[0]["state"], "unsupported");
    let reason = rows[0]["reason"].as_str().unwrap();
    assert!(reason.contains("no route holds layer 2"), "{reason}");
    assert_eq!(rows[1]["state"], "ok");
}

#[test]
fn receipt_names_versions_threads_and_the_input_digest() {
    let sweep = json(&["sweep", "--pipeline", "store", "--dump", text(&sample())]);
    assert_eq!(sweep["receipt"]["version"], env!("CARGO_PKG_VERSION"));
    assert!(sweep["receipt"]["threads"].as_u64().unwrap() > 0);
    assert_eq!(sweep["dumps"][0]["digest"], "1a3300b260a6e979bcd78fd57882c468");
}

#[test]
fn wrong_settings_name_pointer_and_range_before_any_work() {
    let pipeline = r#"{ "routes": [{ "codec": { "id": "zstd", "level": 23 } }] }"#;
    let message = stderr(&["sweep", "--pipeline", pipeline], 2);
    let expected = "plugin `zstd`: `/routes/0/codec/level`: 23 is out of range, expected -7 to 22";
    assert!(message.contains(expected), "{message}");
    let message = stderr(&["sweep", "--pipeline", "gaer"], 2);
    assert!(message.contains("did you mean `gear`"), "{message}");
}

#[test]
fn bench_measures_both_directions_and_verifies() {
    let bench =
        json(&["bench", "--pipeline", "gear-delta", "--pipeline", "store", "--repeats", "2", "--max-bytes", "300000"]);
    let rows = bench["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8, "two pipelines, keys and values, prefill and decode");
    assert!(rows.iter().all(|row| row["encode_mb_s"]["median"].as_f64().unwrap() > 0.0));
}

#[test]
fn plugins_are_listed_and_shown_with_ranges() {
    let list = json(&["plugin", "list"]);
    let ids: Vec<_> = list.as_array().unwrap().iter().map(|entry| entry["id"].as_str().unwrap()).collect();
    assert!(ids.is_sorted() && ids.contains(&"gear-delta"), "{ids:?}");
    let shown = stdout(&["plugin", "show", "zstd"]);
    assert!(shown.contains("-7 to 22"), "{shown}");
    assert!(stderr(&["plugin", "show", "zst"], 2).contains("did you mean `zstd`"));
}

#[test]
fn completions_are_printed_for_every_shell() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(stdout(&["completions", shell]).contains("sweep"), "{shell}");
    }
}
