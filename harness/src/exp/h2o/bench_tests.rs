//! Tests of sweeps with scripts that act as engines.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use gearbox_core::Result;
use serde_json::{Value, json};

use super::{BenchArgs, Preset, SweepArgs};
use crate::exp::samples::parse;
use crate::status::Status;

/// A folder with a base config in `model` and an engine.
struct Place(tempfile::TempDir);

impl Place {
    /// `script` sees prompt length, decoded tokens and log as `$p`, `$n` and `$log`.
    fn new(script: &str) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir(place.path("model")).unwrap();
        fs::write(place.path("model/config.json"), "{\"thread_num\": 4, \"llm_model\": \"sub/llm.mnn\"}").unwrap();
        let head = "#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in\n\
                    -p) p=$2 ;; -n) n=$2 ;; -fp) log=$2 ;; -m) config=$2 ;; esac; shift 2; done\n\
                    row() { printf '| h2o_lossy | llm_demo |\\n| --- | --- |\\n| 3.0 | prompt=%s<br>decode=%s |\\n' $p $n >> $log; }\n";
        let engine = place.path("engine.sh");
        fs::write(&engine, format!("{head}{script}\n")).unwrap();
        fs::set_permissions(&engine, fs::Permissions::from_mode(0o755)).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn bench(&self, flags: &[&str]) -> Result<Status> {
        let [engine, config, out] = ["engine.sh", "model/config.json", "out"].map(|name| self.path(name));
        let paths = [
            "--llm-bench",
            engine.to_str().unwrap(),
            "--base-config",
            config.to_str().unwrap(),
            "--out-dir",
            out.to_str().unwrap(),
        ];
        parse::<BenchArgs>(&[&paths[..], flags].concat()).unwrap().run(false)
    }

    fn manifest(&self) -> Vec<Value> {
        serde_json::from_slice(&fs::read(self.path("out/manifest.json")).unwrap()).unwrap()
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let items = fs::read_dir(self.path(folder)).unwrap();
        let mut names: Vec<_> = items.map(|item| item.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[test]
fn every_combination_runs_once_with_its_config() {
    let place = Place::new("echo \"$p $n\"; grep -q '\"kv_h2o_block_tokens\": 8' $config; row");
    let flags = ["--prompts", "4,5", "--gens", "2", "--h2o-block-tokens", "8", "--h2o-keep-ratios", "0.3,0.5"];
    assert_eq!(place.bench(&flags).unwrap(), Status::Pass);
    let ids = ["1_p4_g2_k0.3_b8_lr3.0", "2_p4_g2_k0.5_b8_lr3.0", "3_p5_g2_k0.3_b8_lr3.0", "4_p5_g2_k0.5_b8_lr3.0"];
    let ids = ids.map(|id| format!("run_000{id}"));
    assert_eq!(place.names("out/logs"), ids.clone().map(|id| format!("{id}.log")));
    assert_eq!(place.names("out/configs"), ids.clone().map(|id| format!("{id}.json")));
    assert_eq!(place.names("out"), ["bench_stdout.log", "configs", "logs", "manifest.json"]);
    let printed = fs::read_to_string(place.path("out/bench_stdout.log")).unwrap();
    assert!(printed.starts_with("== run_0001_p4_g2_k0.3_b8_lr3.0\n4 2\n"), "{printed}");

    let text = fs::read_to_string(place.path("out/manifest.json")).unwrap();
    let names: Vec<&str> = text.lines().filter_map(|line| line.trim().strip_prefix('"')?.split('"').next()).collect();
    assert_eq!(
        names[..names.len() / 4],
        [
            "run_id",
            "prompt_len",
            "gen_len",
            "keep_ratio",
            "block_tokens",
            "sink_tokens",
            "recent_tokens",
            "ema_alpha",
            "update_interval",
            "trigger_min_tokens",
            "h2o_layer_start",
            "h2o_layer_end",
            "h2o_target_mode",
            "h2o_target_lossy_ratio",
            "kv_lossless_enable",
            "kv_lossless_scope",
            "kv_lossless_front_n",
            "kv_lossless_codec",
            "kv_lossless_runtime_enable",
            "kv_lossless_block_tokens",
            "kv_lossless_hot_recent_tokens",
            "kv_lossless_hot_sink_tokens",
            "kv_lossless_codec_runtime",
            "kv_lossless_predictors_k",
            "kv_lossless_predictors_v",
            "kv_lossless_async_threads",
            "kv_lossless_max_queue",
            "kv_lossless_decode_cache_blocks",
            "kv_lossless_strict_roundtrip_check",
            "config",
            "log",
            "return_code",
        ]
    );
    let config: Value =
        serde_json::from_slice(&fs::read(place.path("out/configs/run_0002_p4_g2_k0.5_b8_lr3.0.json")).unwrap())
            .unwrap();
    for (key, value) in [
        ("thread_num", json!(4)),
        ("kv_h2o_enable", json!(true)),
        ("kv_h2o_target_keep_ratio", json!(0.5)),
        ("kv_h2o_block_tokens", json!(8)),
        ("kv_h2o_layer_end", json!(-1)),
        ("kv_h2o_log_stats", json!(false)),
        ("kv_lossless_scope", json!("front_n")),
        ("llm_model", json!("sub/llm.mnn")),
        ("tokenizer_file", json!("tokenizer.txt")),
        ("base_dir", json!(format!("{}/", place.path("model").canonicalize().unwrap().display()))),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert!(config.get("kv_lossless_runtime_mode").is_none(), "a key of kit v4");
}

#[test]
fn runs_that_fail_are_named_and_the_others_go_on() {
    let place = Place::new(
        "case $p in\n1) row ;;\n2) row; echo oom >&2; exit 9 ;;\n3) row; sleep 600 ;;\n4) echo junk > $log ;;\n\
         5) ;;\n6) row; row ;;\n7) row; kill -SEGV $$ ;;\n8) row ;;\nesac",
    );
    let flags = ["--prompts", "1,2,3,4,5,6,7,8", "--timeout", "10"];
    assert_eq!(place.bench(&flags).unwrap(), Status::BadInput);
    let expected = [
        (0, None),
        (9, Some("the engine ended with exit status 9: oom")),
        (-9, Some("the engine took longer than 10 s and was ended")),
        (0, Some("its log: expected a table with rows, got none")),
        (0, Some("the engine wrote no log: No such file or directory (os error 2)")),
        (0, Some("its log: line 4: the table begins again: a second run appended to this log")),
        (-11, Some("the engine ended by signal 11")),
        (0, None),
    ];
    for (entry, (code, error)) in place.manifest().iter().zip(expected) {
        assert_eq!((&entry["return_code"], entry["error"].as_str()), (&json!(code), error), "{entry}");
    }
    let logs = place.names("out/logs");
    assert_eq!(logs, ["run_0001_p1_g128_k0.5_b64_lr3.0.log", "run_0008_p8_g128_k0.5_b64_lr3.0.log"]);
}

#[test]
fn results_of_an_earlier_sweep_are_refused_or_removed() {
    let place = Place::new("row");
    assert_eq!(place.bench(&["--prompts", "1,2"]).unwrap(), Status::Pass);
    let error = place.bench(&["--prompts", "3"]).unwrap_err().to_string();
    assert!(error.contains("exists already; --overwrite"), "{error}");
    assert_eq!(place.bench(&["--prompts", "3", "--overwrite"]).unwrap(), Status::Pass);
    assert_eq!(place.names("out/logs"), ["run_0001_p3_g128_k0.5_b64_lr3.0.log"]);
    assert_eq!(place.names("out/configs"), ["run_0001_p3_g128_k0.5_b64_lr3.0.json"]);
}

#[test]
fn dry_run_writes_configs_and_manifest_only() {
    let place = Place::new("exit 1");
    assert_eq!(place.bench(&["--dry-run"]).unwrap(), Status::Pass);
    assert_eq!(place.names("out"), ["configs", "logs", "manifest.json"]);
    assert!(place.names("out/logs").is_empty());
    assert_eq!(place.manifest()[0]["return_code"], 0);
}

#[test]
fn preset_of_the_third_kit_is_27_runs_of_9_settings() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/h2o/v3/target_ratio_v3.json");
    let preset = Preset::read(&path).unwrap();
    let runs = preset.runs([false; 2]);
    assert_eq!((runs.len(), preset.distinct(&runs)), (27, 9));
    let ids: Vec<_> = runs.iter().take(4).map(|run| run.id.as_str()).collect();
    let expected = [
        "1_p512_g128_k0.28_b8_lr3.0",
        "2_p512_g128_k0.28_b8_lr3.2",
        "3_p512_g128_k0.28_b8_lr3.4",
        "4_p512_g128_k0.28_b16_lr3.0",
    ];
    assert_eq!(ids, expected.map(|id| format!("run_000{id}")));
}

#[test]
fn every_preset_is_one_that_its_kit_can_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/h2o");
    let count = |name: &str| Preset::read(&root.join(name)).unwrap().runs([false; 2]).len();
    for (name, runs) in [
        ("v1/small.json", 3),
        ("v1/medium.json", 192),
        ("v1/large.json", 11_664),
        ("v2/target_ratio.json", 3),
        ("v4/target_speed_v4.json", 12),
        ("v5/target_core_gate.json", 4),
        ("v6/target_joint_scope_full_coverage.json", 4),
    ] {
        assert_eq!(count(name), runs, "{name}");
    }
    let mut presets = 0;
    for kit in fs::read_dir(root).unwrap() {
        for file in fs::read_dir(kit.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            Preset::read(&path).unwrap().check().unwrap();
            presets += 1;
        }
    }
    assert_eq!(presets, 34);
}

#[test]
fn defaults_follow_the_kit() {
    let place = Place::new("row");
    let keys = ["kv_lossless_scope", "kv_lossless_runtime_mode", "kv_lossless_kept_sample_token_interval"];
    for (kit, expected) in [
        ("v4", [json!("front_n"), json!("probe"), json!(1)]),
        ("v5", [json!("front_n_and_h2o_kept"), json!("full"), json!(2)]),
    ] {
        assert_eq!(place.bench(&["--kit", kit, "--dry-run", "--overwrite"]).unwrap(), Status::Pass);
        assert_eq!(keys.map(|key| place.manifest()[0][key].clone()), expected, "{kit}");
    }
    let off =
        ["--kit", "v6", "--disable-h2o", "--disable-lossless", "--kv-lossless-enable", "--dry-run", "--overwrite"];
    assert_eq!(place.bench(&off).unwrap(), Status::Pass);
    let config = place.path("out/configs/run_0001_p512_g128_k0.5_b64_lr3.0.json");
    let config: Value = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    assert_eq!((&config["kv_h2o_enable"], &config["kv_lossless_enable"]), (&json!(false), &json!(false)));
}

#[test]
fn bad_settings_are_refused_before_anything_is_written() {
    let place = Place::new("row");
    for (flags, message) in [
        (&["--h2o-block-tokens", "0"][..], "`/h2o_block_tokens/0`"),
        (&["--h2o-keep-ratios", "1.5"], "`/h2o_keep_ratios/0`"),
        (&["--kv-lossless-store-disable-front"], "`kv_lossless_store_disable_front`: expected kit v5 or later, got v3"),
        (&["--kv-lossless-scope", "joint"], "expected kit v4 or later for `front_n_and_h2o_kept`, got v3"),
        (&["--disable-h2o"], "expected --kit v6 or later, got v3"),
    ] {
        let error = place.bench(flags).unwrap_err().to_string();
        assert!(error.contains(message), "{flags:?}: {error}");
        assert!(!place.path("out").exists());
    }
    for (text, message) in [("[]", "expected a JSON object"), ("{", "expected a JSON object")] {
        fs::write(place.path("model/config.json"), text).unwrap();
        assert!(place.bench(&[]).unwrap_err().to_string().contains(message));
    }
}

#[test]
fn presets_are_strict_and_take_one_ratio_for_a_list() {
    let place = Place::new("row");
    let preset = place.path("preset.json");
    let read = |text: &str| {
        fs::write(&preset, text).unwrap();
        Preset::read(&preset)
    };
    let ratio = read("{\"h2o_target_lossy_ratio\": 3.5}").unwrap().runs([false; 2])[0].id.clone();
    assert_eq!(ratio, "run_0001_p512_g128_k0.5_b64_lr3.5");
    let both = read("{\"h2o_target_lossy_ratio\": 3.5, \"h2o_target_lossy_ratios\": [2.0, 4.0]}").unwrap();
    assert_eq!(both.runs([false; 2]).len(), 2);
    for (text, message) in [
        ("{", "expected JSON"),
        ("{\"h2o_keep_ratio\": [0.5]}", "h2o_keep_ratio"),
        ("{\"prompts\": []}", "`/prompts`"),
        ("{\"h2o_target_mode\": \"adaptve\"}", "`/h2o_target_mode`"),
    ] {
        let error = read(text).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let config = place.path("model/config.json");
    let paths = ["--preset", preset.to_str().unwrap(), "--base-config", config.to_str().unwrap()];
    fs::write(&preset, "{\"kit\": \"v5\", \"kv_lossless_runtime_mode\": \"store\"}").unwrap();
    let out = place.path("out");
    let flags = [&paths[..], &["--dry-run", "--out-dir", out.to_str().unwrap()]].concat();
    assert_eq!(parse::<SweepArgs>(&flags).unwrap().run(false).unwrap(), Status::Pass);
    assert_eq!(place.manifest()[0]["kv_lossless_runtime_mode"], "store");
    let error = parse::<SweepArgs>(&[&flags[..], &["--kit", "v3"]].concat()).unwrap().run(false).unwrap_err();
    assert!(error.to_string().ends_with("`kv_lossless_runtime_mode`: expected kit v4 or later, got v3"), "{error}");
}
