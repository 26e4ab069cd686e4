//! The `h2o-*` experiments beside what the reference wrote for the same logs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::run::{gearbox, json, run, shared, stderr, stdout, text};

/// Runs a command in a folder and checks its exit status: paths in logs and summaries are as they were given.
fn run_in(folder: &Path, arguments: &[&str], status: i32) {
    let output = gearbox().current_dir(folder).args(arguments).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "gearbox {}\n{printed}", arguments.join(" "));
}

#[test]
fn parse_and_analyze_equal_the_reference() {
    let Some(shared) = shared() else { return };
    let golden = shared.join("golden/h2o").canonicalize().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let offline = ["--offline-lossless-json", "offline_lossless_upper.json"];
    let online = ["--offline-lossless-online-json", "offline_lossless_online.json"];
    for (kit, logs, summary, flags, status) in [
        ("v2", "logs2", "v2/summary.md", vec![], 0),
        ("v3", "logs3", "v3/summary.md", [&offline[..], &online, &["--decode-baseline", "6.72"]].concat(), 1),
        ("v3", "logs3", "v3/summary_fail.md", vec!["--lossy-target", "3.5"], 1),
    ] {
        let [csv, md] = ["h2o_metrics.csv", summary].map(|name| folder.path().join(kit).join(name));
        let out = text(&csv);
        run_in(&golden, &["exp", "h2o-parse", "--kit", kit, "--log-dir", logs, "--out-csv", out, "--overwrite"], 0);
        let expected = golden.join(kit).join("h2o_metrics.csv");
        assert_eq!(fs::read_to_string(&csv).unwrap(), fs::read_to_string(expected).unwrap(), "{kit}");

        let paths = ["exp", "h2o-analyze", "--kit", kit, "--csv", out, "--out", text(&md)];
        run_in(&golden, &[&paths[..], &flags].concat(), status);
        let expected = golden.join(summary);
        assert_eq!(fs::read_to_string(&md).unwrap(), fs::read_to_string(expected).unwrap(), "{summary}");
    }
}

#[test]
fn dry_run_of_a_preset_has_the_runs_of_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let [config, out] = ["config.json", "out"].map(|name| folder.path().join(name));
    fs::write(&config, "{}").unwrap();
    let preset = ["exp", "h2o-sweep", "--preset", "configs/h2o/v3/target_ratio_v3.json", "--dry-run"];
    let sweep = json(&[&preset[..], &["--base-config", text(&config), "--out-dir", text(&out)]].concat());
    assert_eq!((&sweep["runs"], &sweep["distinct"], &sweep["failed"]), (&27.into(), &9.into(), &0.into()));
    let ids = [
        "1_p512_g128_k0.28_b8_lr3.0",
        "2_p512_g128_k0.28_b8_lr3.2",
        "3_p512_g128_k0.28_b8_lr3.4",
        "4_p512_g128_k0.28_b16_lr3.0",
    ];
    for (entry, id) in sweep["manifest"].as_array().unwrap().iter().zip(ids) {
        assert_eq!(entry["run_id"], format!("run_000{id}"));
        assert!(Path::new(entry["config"].as_str().unwrap()).is_file());
    }
}

#[test]
fn full_eval_gives_the_summary_of_its_steps() {
    let Some(shared) = shared() else { return };
    let golden = shared.join("golden/h2o");
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("logs")).unwrap();
    for log in fs::read_dir(golden.join("logs3")).unwrap() {
        let log = log.unwrap();
        fs::copy(log.path(), folder.path().join("logs").join(log.file_name())).unwrap();
    }
    let dumps = shared.join("data/dumps/fp16");
    let target = |target: &'static str| {
        [
            "exp",
            "full-eval",
            text(folder.path()),
            text(&dumps),
            target,
            "6.72",
            "0.05",
            "192",
            "8",
            "64",
            "chunked_grouped",
        ]
    };
    run(&target("1.3"), 1);
    let summary = fs::read_to_string(folder.path().join("summary.md")).unwrap();
    let here = format!("{}/", text(folder.path()));
    let summary = summary.replace(&here, "").replace("`logs/", "`logs3/").replace("online_grouped.json", "online.json");
    assert_eq!(summary, fs::read_to_string(golden.join("v3/summary.md")).unwrap());

    run(&target("1.25"), 2);
    run(&[&target("1.25")[..], &["--overwrite"]].concat(), 0);
    // The rows are enough, and both kinds of chunks have a summary.
    fs::remove_dir_all(folder.path().join("logs")).unwrap();
    let mut both = target("1.25");
    [both[7], both[8], both[10]] = ["128", "16", "both"];
    run(&[&both[..], &["--overwrite"]].concat(), 1);
    for name in ["summary_chunked.md", "summary_grouped.md", "offline_lossless_online.json"] {
        assert!(folder.path().join(name).is_file(), "{name}");
    }
    fs::remove_file(folder.path().join("h2o_metrics.csv")).unwrap();
    assert!(stderr(&both, 2).contains("got neither"));
}

#[test]
fn pipeline_measures_and_verifies_what_the_engine_dumped() {
    let Some(shared) = shared() else { return };
    let shared = shared.canonicalize().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&folder.path().join(name)).to_owned();
    let engine = path("engine.sh");
    let source = shared.join("data/dumps/fp32/demo_prompt_128_1");
    let script = format!(
        "#!/bin/sh\nrun=$MNN_KV_DUMP_DIR/$MNN_KV_DUMP_RUN_ID\ncp -r {} $run && chmod -R u+w $run\n\
         sed -i s/demo_prompt_128_1/$MNN_KV_DUMP_RUN_ID/ $run/*/meta_*.json\necho 'prompt tokens num = 128'\n",
        text(&source)
    );
    fs::write(&engine, script).unwrap();
    fs::set_permissions(&engine, fs::Permissions::from_mode(0o755)).unwrap();
    let (config, corpus) = (shared.join("data/tiny-llama/config.json"), shared.join("data/text/sherlock.txt"));
    let folders = [path("prompts"), path("raw"), path("fp16"), path("out")];
    let flags = |run_id: &'static str| {
        let [prompts, raw, fp16, out] = &folders;
        let places = ["exp", "pipeline", "--run-id", run_id, "--llm-demo", &engine, "--config", text(&config)];
        let more = ["--prompt-dir", prompts, "--dump-dir", raw, "--fp16-dump-dir", fp16, "--out-dir", out];
        [&places[..], &more].concat()
    };
    let made =
        ["--corpus", text(&corpus), "--prompt-targets", "128", "--prompt-per-target", "2", "--prompt-tokenizer", "hf"];
    let printed = stdout(&[&flags("R")[..], &made].concat());
    let heads: Vec<_> = printed.lines().take(5).filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(heads, ["[run_id]", "[prompt_dir]", "[out_dir]", "[log_file]", "[run_prefix]"]);
    // Two runs, each of a prompt and 16 decoded tokens in 6 layers.
    assert!(printed.ends_with("Checked: 204, Failed: 0\n"), "{printed}");
    let manifest = fs::read_to_string(folder.path().join("prompts/R/prompts_manifest.jsonl")).unwrap();
    for line in manifest.lines() {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        let tokens = record["actual_tokens"].as_u64().unwrap();
        assert!((122..=134).contains(&tokens) && record["tokenizer"] == "hf", "{line}");
    }
    let out = folder.path().join("out/R");
    for name in ["layer_metrics.csv", "head_metrics.csv", "summary.md", "grouped_summary.md", "llm_demo_runs.jsonl"] {
        assert!(out.join(name).is_file(), "{name}");
    }
    let grouped = fs::read_to_string(out.join("grouped_summary.md")).unwrap();
    assert!(grouped.contains("## 0-256\n\n- Dumps: 204") || grouped.contains("## 0-256\n- Dumps: 204"), "{grouped}");

    // Another run sees its own dumps only.
    let prompt = folder.path().join("prompts/R/prompt_128_1.txt");
    let empty = path("none");
    fs::create_dir(&empty).unwrap();
    let one = ["--prompt-files", text(&prompt), "--prompt-dir", &empty];
    let mut other = flags("S");
    other.retain(|flag| *flag != "--prompt-dir" && *flag != folders[0]);
    assert!(stdout(&[&other[..], &one].concat()).ends_with("Checked: 102, Failed: 0\n"));
    assert!(
        stderr(&[&flags("T")[..], &["--skip-demo"]].concat(), 2)
            .contains("expected dumps of the run `demo_T`, got none")
    );
}
