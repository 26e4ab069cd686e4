//! The main job: sweeps over real dumps.

use gearbox_core::Kind;
use serde_json::{Value, json};

use crate::run::{json as json_of, run, sample, stderr, stdout, text};

#[test]
fn sweep_without_arguments_decodes_every_codec_exactly_on_the_sample() {
    let sweep = json_of(&["sweep"]);
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

/// A sweep from a config that must end with this status.
fn sweep_of(config: &Value, status: i32) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sweep.json");
    std::fs::write(&path, config.to_string()).unwrap();
    serde_json::from_slice(&run(&["sweep", text(&path), "--json"], status).stdout).unwrap()
}

/// `quant` before `rans`, in chunks of 128 tokens.
fn quant(settings: &Value) -> Value {
    let mut transform = json!({ "id": "quant" });
    transform.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    json!({
        "name": "quant",
        "routes": [{ "transforms": [transform], "codec": { "codes": { "id": "rans" }, "*": { "id": "zstd" } } }],
        "chunking": { "mode": "chunked-grouped", "tokens": 128 }
    })
}

#[test]
fn canaries_show_that_nothing_is_lost_and_that_a_broken_head_is_caught() {
    let sweep = sweep_of(&json!({ "pipelines": [{ "routes": [{ "codec": { "id": "store" } }] }] }), 0);
    let [identity, flipped] = &sweep["canaries"].as_array().unwrap()[..] else { panic!("{sweep}") };
    assert_eq!((&identity["problem"], &identity["error"]["changed"]), (&Value::Null, &Value::from(0)));
    assert_eq!(identity["attention"]["output_error"], 0.0);
    assert_eq!((&flipped["name"], &flipped["problem"]), (&Value::from("flipped-head"), &Value::Null));
    let cosine = flipped["error"]["cosine"].as_f64().unwrap();
    let worst = flipped["worst_head_cosine"].as_f64().unwrap();
    assert!(cosine > 0.99 && worst < 0.6, "{flipped}");
}

#[test]
fn gate_that_lets_a_broken_head_pass_fails_the_sweep() {
    let config = |gate: Value| json!({ "pipelines": [quant(&json!({}))], "gate": gate });
    let sweep = sweep_of(&config(json!({ "nmse": { "max": 0.1 }, "worst_head_cosine": { "min": 0.0 } })), 1);
    assert_eq!(sweep["rows"][0]["verdict"]["violations"], json!([]));
    let problem = sweep["canaries"][1]["problem"].as_str().unwrap();
    assert!(problem.contains("tighten `worst_head_cosine`"), "{problem}");
    // Other limits come on top of the default one.
    let sweep = sweep_of(&config(json!({ "nmse": { "max": 0.1 } })), 0);
    assert_eq!(sweep["gate"]["worst_head_cosine"]["min"], 0.99);
}

#[test]
fn search_finds_the_cheapest_setting_of_the_whole_grid_in_fewer_rows() {
    let bits: Vec<_> = (2..=12).collect();
    let limits = json!({ "worst_head_cosine": { "min": 0.998 }, "kl_p99": { "max": 0.02 } });
    let pipeline = quant(&json!({ "bits": { "sweep": bits } }));
    let search = json!({ "minimise": "bytes", "subject_to": limits });
    let config = json!({ "pipelines": [pipeline], "search": search });
    let sweep = sweep_of(&config, 0);
    let found = &sweep["found"][0];
    assert!(found["passed"].as_bool().unwrap() && found["evaluated"].as_u64() < found["products"].as_u64(), "{found}");
    let best = &sweep["rows"][found["best"][0].as_u64().unwrap() as usize];

    let all = sweep_of(&json!({ "pipelines": [pipeline], "gate": limits }), 0);
    let passing = all["rows"].as_array().unwrap().iter().filter(|row| row["verdict"]["violations"] == json!([]));
    let cheapest = passing.min_by_key(|row| row["stored_bytes"].as_u64().unwrap()).unwrap();
    assert_eq!((&best["name"], &best["stored_bytes"]), (&cheapest["name"], &cheapest["stored_bytes"]));
    assert_eq!(best["name"], "quant (bits 5)");
}

#[test]
fn search_without_a_result_names_the_nearest_miss_and_what_it_violates() {
    let limits = json!({ "nmse": { "max": 1e-9 }, "worst_head_cosine": { "min": 0.9 } });
    let search = json!({ "minimise": "bytes", "subject_to": limits });
    let config = json!({ "pipelines": [quant(&json!({ "bits": { "sweep": [2, 4, 8] } }))], "search": search });
    let sweep = sweep_of(&config, 1);
    let found = &sweep["found"][0];
    assert_eq!(found["passed"], false);
    assert_eq!(found["violations"][0]["violations"][0]["metric"], "nmse");
    assert_eq!(sweep["rows"][found["best"][0].as_u64().unwrap() as usize]["name"], "quant (bits 8)");
}

#[test]
fn settings_that_do_not_go_together_are_rows_with_their_reason() {
    let mode = json!({ "mode": { "sweep": ["default", "reference"] }, "symmetric": true });
    let sweep = sweep_of(&json!({ "pipelines": [quant(&mode)] }), 0);
    let rows = sweep["rows"].as_array().unwrap();
    assert_eq!((rows[0]["state"].as_str(), rows[1]["state"].as_str()), (Some("ok"), Some("unsupported")));
    assert!(rows[1]["reason"].as_str().unwrap().contains("`/symmetric`"), "{}", rows[1]["reason"]);
    // Alone, or if none is legal, they are a mistake.
    let pipeline = quant(&json!({ "mode": "reference", "symmetric": true }));
    let message = stderr(&["sweep", "--pipeline", &pipeline.to_string()], 2);
    assert!(message.contains("`/symmetric`"), "{message}");
}

#[test]
fn settings_that_do_the_same_run_once() {
    // The sample has 64 channels per head.
    let pipeline = |block: u64| json!({ "routes": [{ "transforms": [{ "id": "block-norm", "block": block }], "codec": { "id": "zstd" } }] });
    let sweep = sweep_of(&json!({ "pipelines": [pipeline(64), pipeline(128), pipeline(32)] }), 0);
    assert_eq!((sweep["rows"].as_array().unwrap().len(), sweep["same"].as_array().unwrap().len()), (2, 1));
    assert!(sweep["same"][0]["name"].as_str().unwrap().contains("block=128"), "{}", sweep["same"]);
}

#[test]
fn lossy_rows_carry_errors_attention_verdict_and_escapes() {
    let config = json!({ "pipelines": [quant(&json!({ "bits": 4, "outliers": 0.01 }))] });
    let sweep = sweep_of(&config, 0);
    let row = &sweep["rows"][0];
    let (nmse, worst) =
        (row["error"]["all"]["nmse"].as_f64().unwrap(), row["error"]["all"]["worst_nmse"]["nmse"].as_f64().unwrap());
    assert!(0.0 < nmse && nmse < worst && worst < 0.1, "{nmse} {worst}");
    assert_eq!(row["error"]["heads"].as_array().unwrap().len(), 6 * 2 * 2);
    let attention = &row["attention"];
    assert!(
        attention["all"]["kl_p99"].as_f64().unwrap() > 0.0 && attention["worst_output"]["head"].is_u64(),
        "{attention}"
    );
    // One in a hundred values of each group of 64, at least.
    assert!(row["escapes"].as_u64().unwrap() > 811_008 / 200, "{}", row["escapes"]);
    assert_eq!((&row["pareto"], &row["verdict"]["violations"]), (&Value::from(true), &json!([])));
}

#[test]
fn illegal_settings_of_transforms_name_pointer_and_range_before_any_work() {
    let refused = |transform: Value| {
        let pipeline = json!({ "routes": [{ "transforms": [transform], "codec": { "id": "zstd" } }] });
        stderr(&["sweep", "--pipeline", &pipeline.to_string()], 2)
    };
    for (transform, expected) in [
        (json!({ "id": "quant", "bits": 1 }), "`/routes/0/transforms/0/bits`: 1 is out of range, expected 2 to 16"),
        (
            json!({ "id": "quant", "group": 0 }),
            "`/routes/0/transforms/0/group`: 0 is out of range, expected at least 1",
        ),
        (json!({ "id": "quant", "outliers": 0.6 }), "`/routes/0/transforms/0/outliers`: 0.6 is out of range"),
        (json!({ "id": "block-norm", "block": 0 }), "`/routes/0/transforms/0/block`: 0 is out of range"),
        (
            json!({ "id": "block-norm", "mode": "reference", "top_k": 1.5 }),
            "`/routes/0/transforms/0/top_k`: 1.5 is out of range",
        ),
        (json!({ "id": "clip", "low": 99, "high": 1 }), "expected `low` below `high`, got 99 and 1"),
        (json!({ "id": "clip", "method": "percentil" }), "`/routes/0/transforms/0/method`"),
        (
            json!({ "id": "truncate", "mantissa_bits": 24 }),
            "`/routes/0/transforms/0/mantissa_bits`: 24 is out of range, expected 0 to 23",
        ),
    ] {
        let message = refused(transform);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn same_sweep_stores_the_same_bytes_for_any_number_of_threads() {
    let stored = |threads| {
        let sweep = json_of(&["sweep", "configs/sweeps/lossless.json", "--threads", threads]);
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
    let (table, place) = table.trim().rsplit_once('\n').unwrap();
    assert_eq!(place, format!("`sweep.json`, `sweep.csv`, `sweep.md` and the containers in `{}`", out.display()));
    assert!(std::fs::read_to_string(out.join("sweep.md")).unwrap().contains(table));
    let csv = std::fs::read_to_string(out.join("sweep.csv")).unwrap();
    for (idx, line) in csv.lines().skip(1).enumerate() {
        let size = std::fs::metadata(out.join(format!("{idx:04}.gbx"))).unwrap().len().to_string();
        assert_eq!(line.split(',').nth(9).unwrap(), size, "{line}");
    }
    let message = stderr(&arguments, 2);
    assert!(message.contains("sweep.json") && message.contains("overwrite"), "{message}");
    run(&[&arguments[..], &["--overwrite"]].concat(), 0);
}

#[test]
fn rows_tell_how_far_they_are_from_the_order_0_floor() {
    let sweep = json_of(&[
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
    let found = json_of(&["dump", "info", "--entropy"])["entropy"].take();
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
    let sweep = json_of(&["sweep", text(&config)]);
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
    assert_eq!(json_of(&["sweep", "--pipeline", pipeline])["rows"].as_array().unwrap().len(), 2);
    let message = stderr(&["bench", "--pipeline", pipeline], 2);
    assert!(message.contains("`/routes/0/codec/level`: expected one pipeline"), "{message}");
}

#[test]
fn pipeline_that_is_not_legal_is_a_row_with_its_reason() {
    let pipeline = r#"{ "routes": [{ "layers": "0..2", "codec": { "id": "gear" } }] }"#;
    let sweep = json_of(&["sweep", "--pipeline", pipeline, "--pipeline", "store"]);
    let rows = sweep["rows"].as_array().unwrap();
    assert_eq!(rows[0]["state"], "unsupported");
    let reason = rows[0]["reason"].as_str().unwrap();
    assert!(reason.contains("no route holds layer 2"), "{reason}");
    assert_eq!(rows[1]["state"], "ok");
}

#[test]
fn receipt_names_versions_threads_and_the_input_digest() {
    let sweep = json_of(&["sweep", "--pipeline", "store", "--dump", text(&sample())]);
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
    let bench = json_of(&[
        "bench",
        "--pipeline",
        "gear-delta",
        "--pipeline",
        "store",
        "--repeats",
        "2",
        "--max-bytes",
        "300000",
    ]);
    let rows = bench["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8, "two pipelines, keys and values, prefill and decode");
    assert!(rows.iter().all(|row| row["encode_mb_s"]["median"].as_f64().unwrap() > 0.0));
}

#[test]
fn plugins_are_listed_and_shown_with_ranges() {
    let list = json_of(&["plugin", "list"]);
    let ids: Vec<_> = list.as_array().unwrap().iter().map(|entry| entry["id"].as_str().unwrap()).collect();
    assert!(ids.is_sorted() && ids.contains(&"gear-delta"), "{ids:?}");
    let shown = stdout(&["plugin", "show", "zstd"]);
    assert!(shown.contains("-7 to 22"), "{shown}");
    assert!(stderr(&["plugin", "show", "zst"], 2).contains("did you mean `zstd`"));
}

#[test]
fn results_are_read_back_as_they_were_written() {
    let mut pipelines = [
        json!({ "routes": [{ "codec": { "id": "planes" } }] }),
        json!({ "routes": [{ "evict": { "id": "window" }, "codec": { "id": "store" } }] }),
    ]
    .to_vec();
    pipelines.push(quant(&json!({ "bits": 2 })));
    let sweep = sweep_of(&json!({ "pipelines": pipelines }), 0);
    let states: Vec<_> = sweep["rows"].as_array().unwrap().iter().map(|row| row["state"].clone()).collect();
    assert_eq!(states, ["ok", "unsupported", "ok"]);
    let read: gearbox::sweep::Sweep = serde_json::from_value(sweep.clone()).unwrap();
    assert_eq!(serde_json::to_value(&read).unwrap(), sweep);
    assert!(read.rows[2].attention.is_some() && !read.rows[2].verdict.as_ref().unwrap().passed());

    // What is not finite is `null` in a file, and damage again when it is read.
    let mut broken = sweep["rows"][2].clone();
    for name in ["mae", "nmse", "cosine"] {
        broken["error"]["all"][name] = Value::Null;
    }
    broken["measured"]["worst_head_nmse"] = Value::Null;
    broken["measured"]["worst_head_cosine"] = Value::Null;
    let row: gearbox::sweep::Row = serde_json::from_value(broken.clone()).unwrap();
    let error = &row.error.as_ref().unwrap().all.error;
    assert!(error.mae.is_infinite() && error.nmse.is_infinite() && error.cosine.is_nan());
    let measured = |metric| row.measured(metric).unwrap();
    assert!(measured(gearbox::gate::Metric::WorstHeadNmse).is_infinite());
    assert!(measured(gearbox::gate::Metric::WorstHeadCosine).is_nan());
    assert_eq!(serde_json::to_value(&row).unwrap(), broken);
}
