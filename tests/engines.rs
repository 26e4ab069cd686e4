//! `gearbox llm-bench` and `llm-demo`: the reference's experiments end to end, with nothing but this program and the bundled model.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::run::{gearbox, json as json_of, root, run, stderr, stdout, text};

fn path(folder: &TempDir, name: &str) -> PathBuf {
    folder.path().join(name)
}

fn write(folder: &TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = path(folder, name);
    fs::write(&path, content).unwrap();
    path
}

fn model() -> PathBuf {
    root().join("tests/data/tiny-llama/config.json")
}

/// Eviction and compression that show with few tokens.
fn small() -> Value {
    json!({
        "kv_h2o_enable": true, "kv_h2o_block_tokens": 8, "kv_h2o_sink_tokens": 8, "kv_h2o_recent_tokens": 8,
        "kv_h2o_target_lossy_ratio": 3.0, "kv_h2o_trigger_min_tokens": 64,
        "kv_lossless_enable": true, "kv_lossless_codec": "gear_delta", "kv_lossless_runtime_enable": true,
        "kv_lossless_block_tokens": 32, "kv_lossless_hot_recent_tokens": 16,
    })
}

/// Flags of a sweep with the same settings.
const SWEEP: [&str; 24] = [
    "--prompts",
    "96",
    "--gens",
    "20",
    "--repeat",
    "2",
    "--threads",
    "2",
    "--h2o-block-tokens",
    "8",
    "--h2o-sink-tokens",
    "8",
    "--h2o-recent-tokens",
    "8",
    "--h2o-trigger-min-tokens",
    "64",
    "--kv-lossless-block-tokens",
    "32",
    "--kv-lossless-hot-recent-tokens",
    "16",
    "--kv-lossless-enable",
    "--kv-lossless-codec",
    "gear_delta",
    "--kv-lossless-runtime-enable",
];

/// The rows of a CSV file by column.
fn rows(path: &Path) -> Vec<Vec<(String, String)>> {
    let text = fs::read_to_string(path).unwrap();
    let mut lines = text.lines().map(|line| line.split(',').map(ToOwned::to_owned).collect::<Vec<_>>());
    let header = lines.next().unwrap();
    lines.map(|cells| header.iter().cloned().zip(cells).collect()).collect()
}

fn cell<'a>(row: &'a [(String, String)], column: &str) -> &'a str {
    row.iter().find(|(name, _)| name == column).map_or("", |(_, cell)| cell)
}

/// The mean of a cell.
fn mean(row: &[(String, String)], column: &str) -> f64 {
    let cell = cell(row, column);
    cell.split(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("{column}: {cell}"))
}

#[test]
fn sweep_of_the_reference_runs_end_to_end() {
    let folder = tempdir().unwrap();
    let (config, out, csv, summary) =
        (model(), path(&folder, "out"), path(&folder, "rows.csv"), path(&folder, "summary.md"));
    let bench = ["exp", "h2o-bench", "--base-config", text(&config), "--out-dir", text(&out)];
    let swept = json_of(&[&bench[..], &SWEEP, &["--h2o-target-lossy-ratios", "2.0,3.0"]].concat());
    assert_eq!((&swept["runs"], &swept["failed"]), (&json!(2), &json!(0)), "{swept}");

    let logs = out.join("logs");
    run(&["exp", "h2o-parse", "--log-dir", text(&logs), "--out-csv", text(&csv)], 0);
    let rows = rows(&csv);
    let [two, three] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!((cell(two, "model"), cell(two, "modelSize"), cell(two, "threads")), ("tiny-llama", "6.57 MiB", "2"));
    assert_eq!((cell(two, "llm_demo"), cell(two, "precision")), ("prompt=96<br>decode=20", "Low"));
    assert!(mean(three, "h2o_lossy") > mean(two, "h2o_lossy") && mean(two, "h2o_lossy") > 1.5);
    for row in [two, three] {
        assert!((1.05..1.5).contains(&mean(row, "h2o_lossless")), "chunks are of real text: {row:?}");
        assert!(mean(row, "h2o_lossless_raw_mb") > mean(row, "h2o_lossless_comp_mb"));
        assert!(mean(row, "h2o_lossless_decomp_us") > 0.0 && mean(row, "h2o_lossless_fallback") == 0.0);
        assert!(mean(row, "h2o_evict_us") > 0.0 && mean(row, "h2o_codec_us") > 0.0);
        assert!(cell(row, "speed(tok/s)").contains("<br>"));
    }
    let analyze = |lossy: &str, status: i32| {
        let judge = ["exp", "h2o-analyze", "--csv", text(&csv), "--out", text(&summary), "--overwrite"];
        run(&[&judge[..], &["--lossy-target", lossy, "--lossless-target", "1.05"]].concat(), status);
        fs::read_to_string(&summary).unwrap()
    };
    assert!(analyze("1.5", 0).contains("- overall_pass: true"));
    assert!(analyze("9", 1).contains("- overall_pass: false"));
}

#[test]
fn columns_are_those_of_the_kit() {
    let folder = tempdir().unwrap();
    let (config, csv) = (model(), path(&folder, "rows.csv"));
    for (kit, last, at) in [
        ("v2", "h2o_codec_us", 15),
        ("v4", "h2o_lossless_fallback", 21),
        ("final", "h2o_lossless_decode_cache_miss", 26),
    ] {
        let (out, logs) = (path(&folder, kit), path(&folder, kit).join("logs"));
        let bench = ["exp", "h2o-bench", "--kit", kit, "--base-config", text(&config), "--out-dir", text(&out)];
        let size = ["--prompts", "40", "--gens", "2", "--repeat", "1", "--threads", "1"];
        let lossless = ["--kv-lossless-enable", "--kv-lossless-codec", "gear_delta"];
        run(&[&bench[..], &size, &lossless].concat(), 0);
        run(&["exp", "h2o-parse", "--kit", kit, "--log-dir", text(&logs), "--out-csv", text(&csv), "--overwrite"], 0);
        let rows = rows(&csv);
        let columns: Vec<_> = rows[0].iter().map(|(column, _)| column.as_str()).collect();
        // The log and the precision come behind what the kit knows.
        assert_eq!((columns.len(), columns[columns.len() - 3]), (at + 1, last), "{kit}: {columns:?}");
        assert_eq!(cell(&rows[0], "h2o_keep"), "1.0000 ± 0.0000", "nothing reaches the trigger");
        assert_eq!(cell(&rows[0], "h2o_evict_us"), "n/a");
        // Kit v2 compresses without a key for it; 40 tokens fill no chunk behind 256 recent ones.
        assert_eq!(cell(&rows[0], "h2o_lossless"), if kit == "v2" { "n/a" } else { "1.000 ± 0.000" }, "{kit}");
    }
    let judged = ["exp", "h2o-analyze", "--kit", "v2", "--lossy-target", "1", "--lossless-target", "1"];
    let v2 = path(&folder, "v2").join("logs");
    run(&["exp", "h2o-parse", "--kit", "v2", "--log-dir", text(&v2), "--out-csv", text(&csv), "--overwrite"], 0);
    let out = path(&folder, "summary.md");
    run(&[&judged[..], &["--csv", text(&csv), "--out", text(&out)]].concat(), 1);
}

#[test]
fn benchmark_tells_the_whole_request_and_appends_rows() {
    let folder = tempdir().unwrap();
    let mut keys = small();
    keys["kv_lossless_strict_roundtrip_check"] = json!(true);
    keys["kv_lossless_scope"] = json!("front_n_and_h2o_kept");
    let config = write(&folder, "runtime.json", keys.to_string());
    let (log, out) = (path(&folder, "bench.log"), path(&folder, "bench.json"));
    let size = ["-a", "cpu", "-t", "2", "-qatten", "0", "-kv", "true", "-p", "96", "-n", "20", "-rep", "2"];
    let bench = [&["llm-bench", "-m", text(&config)][..], &size, &["-fp", text(&log)]].concat();
    run(&[&bench[..], &["-j", text(&out), "-load", "false"]].concat(), 0);
    let found: Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
    let result = &found["results"][0];
    assert_eq!((&result["type"], &result["prompt_len"]), (&json!("prefill_and_decode"), &json!(96)));
    let number = |key: &str| result[key].as_f64().unwrap();
    assert!(number("h2o_lossless_ratio") > 1.0 && number("h2o_lossy_ratio") > 2.0 && number("decode_tps") > 0.0);
    let runs = found["gearbox"]["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    assert_eq!(runs[0]["logits"], runs[1]["logits"], "no request leaves anything behind");
    // One ledger of the whole request holds less than the last decision claims.
    let resident = runs[0]["resident_ratio"].as_f64().unwrap();
    assert!(resident > 1.0 && resident < number("h2o_lossy_ratio") * number("h2o_lossless_ratio"), "{found}");
    let layers = runs[0]["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["coded"]["decoded_bytes"].as_u64().unwrap() > 0), "{found}");
    assert!(layers[0]["live"] == 116 && layers[3]["live"].as_u64().unwrap() < 116);

    // A second run adds a row to the same table, and an existing file of JSON is kept.
    run(&bench, 0);
    let table = fs::read_to_string(&log).unwrap();
    let lines: Vec<_> = table.lines().map(|line| line.split(' ').nth(1).unwrap()).collect();
    assert_eq!(lines, ["model", "---", "tiny-llama", "tiny-llama"]);
    assert!(stderr(&[&bench[..], &["-j", text(&out)]].concat(), 2).contains("exists already"));
    assert_eq!(fs::read_to_string(&log).unwrap(), table, "nothing is written when a run fails");

    // The reference's prompt of one token flatters every codec, and so it is not the default.
    let flattered = json_of(&[&bench[..11], &["-p", "96", "-n", "20", "-rep", "1", "--prompt-token", "16"]].concat());
    assert!(flattered["results"][0]["h2o_lossless_ratio"].as_f64().unwrap() > 1.5, "{flattered}");
}

#[test]
fn demo_dumps_what_capture_captures() {
    let folder = tempdir().unwrap();
    let config = write(&folder, "runtime.json", r#"{ "precision": "high" }"#);
    let prompt = write(&folder, "a.txt", "It was a dark and stormy night.\n\nThe captain said that he would go.");
    let (dumps, captured) = (path(&folder, "dumps"), path(&folder, "captured"));
    let demo = |stage: &str, run_id: &str, more: &[&str], status: i32| {
        let mut command = gearbox();
        command.env("MNN_KV_DUMP_DIR", &dumps).env("MNN_KV_DUMP_RUN_ID", run_id).env("MNN_KV_DUMP_STAGE", stage);
        let output = command.args(["llm-demo", text(&config), text(&prompt), "5"]).args(more).output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{printed}\n{errors}");
        printed + &errors
    };
    let whole = ["--prompt-file-mode", "whole"];
    let printed = demo("both", "a", &whole, 0);
    for line in ["decode tokens num = 5\n", "prompt tokens num = ", "\nprefill time = ", "\n decode time = "] {
        assert!(printed.contains(line), "{printed}");
    }
    run(&["model", "capture", "--text", text(&prompt), "--decode", "5", "--dtype", "f32", "--out", text(&captured)], 0);
    let digest = |dump: &Path| json_of(&["dump", "info", "--digest", "--dump", text(dump)])["digest"].clone();
    let capture = captured.join("a.safetensors");
    assert!(digest(&dumps.join("a")).is_string());
    assert_eq!(digest(&dumps.join("a")), digest(&capture));

    assert!(demo("both", "a", &whole, 2).contains("exists already"));
    assert!(demo("both", "b", &[], 2).contains("expected one prompt in a dump, got 2 lines"));
    assert!(demo("all", "c", &whole, 2).contains("`MNN_KV_DUMP_STAGE`: expected prefill, decode or both, got `all`"));
    demo("decode", "d", &whole, 0);
    let only = json_of(&["dump", "info", "--dump", text(&dumps.join("d"))]);
    assert_eq!(only["info"]["runs"][0]["entries"], 6 * 5, "{only}");
    let names = || fs::read_dir(&dumps).unwrap().count();
    assert_eq!(names(), 2, "what failed leaves nothing");
    // Without a dump, every line is a prompt.
    let metrics = path(&folder, "metrics.jsonl");
    let printed = stdout(&["llm-demo", text(&config), text(&prompt), "2", "--metrics-jsonl", text(&metrics)]);
    assert!(printed.contains("decode tokens num = 4\n"), "{printed}");
    assert_eq!(fs::read_to_string(&metrics).unwrap().lines().count(), 2);
}

#[test]
fn prompts_dumps_and_gates_run_end_to_end() {
    let folder = tempdir().unwrap();
    let (config, corpus) = (model(), root().join("docs/DESIGN.md"));
    let [prompts, raw, fp16, out] = ["prompts", "raw", "fp16", "out"].map(|name| path(&folder, name));
    let places = ["exp", "pipeline", "--run-id", "R", "--config", text(&config), "--prompt-dir", text(&prompts)];
    let more = ["--dump-dir", text(&raw), "--fp16-dump-dir", text(&fp16), "--out-dir", text(&out)];
    let size = ["--prompt-targets", "64", "--prompt-per-target", "2", "--decode-tokens", "3"];
    let made = ["--corpus", text(&corpus), "--prompt-tolerance", "0.2"];
    let printed = stdout(&[&places[..], &more, &size, &made].concat());
    assert!(printed.ends_with("Checked: 48, Failed: 0\n"), "two runs, 6 layers, 4 entries: {printed}");
    let log = fs::read_to_string(out.join("R/llm_demo_runs.jsonl")).unwrap();
    let first: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!(first["metrics"]["decode_tokens"], 3, "{first}");
    assert!(first["metrics"]["prefill_s"].is_number() && first["metrics"]["prompt_tokens"].as_u64().unwrap() > 40);
    assert!(fs::read_to_string(out.join("R/grouped_summary.md")).unwrap().contains("- Dumps: 48"));

    // The dumps of that run beside the logs of a sweep.
    let sweep = path(&folder, "sweep");
    let bench = ["exp", "h2o-bench", "--base-config", text(&config), "--out-dir", text(&sweep)];
    run(&[&bench[..], &SWEEP].concat(), 0);
    run(&["exp", "full-eval", text(&sweep), text(&raw), "1.0", "0", "0.05", "32", "8", "16"], 1);
    let summary = fs::read_to_string(sweep.join("summary.md")).unwrap();
    assert!(summary.contains("- lossless_selected_source: offline_online_sim"), "{summary}");
    assert!(summary.contains("- lossy_pass: false"), "a ratio of 3 is rounded up to whole blocks: {summary}");
}

#[test]
fn bad_input_is_named_and_writes_nothing() {
    let folder = tempdir().unwrap();
    let written = path(&folder, "bench.log");
    let bench = |name: &str, content: &str, flags: &[&str]| {
        let config = write(&folder, name, content);
        let arguments =
            [&["llm-bench", "-m", text(&config), "-p", "8", "-n", "2", "-rep", "1", "-fp", text(&written)], flags];
        let errors = stderr(&arguments.concat(), 2);
        assert!(!written.exists(), "{errors}");
        errors
    };
    let unknown = bench("a.json", r#"{ "kv_h2o_blocks": 3, "theta": 1 }"#, &[]);
    assert!(unknown.contains("a.json`: ") && unknown.contains("`/theta`"), "{unknown}");
    assert!(bench("a.json", r#"{ "kv_h2o_blocks": 3 }"#, &[]).contains("kv_h2o_blocks"));
    let range = bench("a.json", r#"{ "kv_h2o_ema_alpha": 2 }"#, &[]);
    assert!(range.contains("`/kv_h2o_ema_alpha`"), "{range}");
    let layers = bench("a.json", r#"{ "kv_h2o_enable": true, "kv_h2o_layer_start": 6 }"#, &[]);
    assert!(layers.contains("expected at most 5, the last layer of the model, got 6"), "{layers}");
    assert!(bench("a.json", "{}", &["-p", "2048"]).contains("cannot be used multiple times"));
    let long = stderr(&["llm-bench", "-m", text(&path(&folder, "a.json")), "-p", "2048", "-n", "1"], 2);
    assert!(long.contains("at most 2048 tokens in all, the context of the model"), "{long}");
    assert!(bench("a.json", "{}", &["-qatten", "1"]).contains("--qatten"));
    assert!(bench("a.json", "{}", &["-a", "opencl"]).contains("cpu"));
    assert!(bench("a.json", "{}", &["--model", text(folder.path())]).contains("config.json"));
    assert!(bench("a.json", "{}", &["--prompt-token", "4096"]).contains("token ids below 4096"));
    assert!(bench("a.json", "{}", &["--hub", "owner/name"]).contains("--features hub"));
    assert!(bench("a.json", "[]", &[]).contains("expected a JSON object"));
    // What the reference takes, and what it makes of it.
    let lenient = write(
        &folder,
        "a.json",
        r#"{ "kv_h2o_ema_alpha": 2, "theta": 1, "kv_h2o_enable": true, "kv_h2o_layer_start": 9 }"#,
    );
    let size = ["-p", "8", "-n", "2", "-rep", "1"];
    let output = run(&[&["llm-bench", "--lenient", "-m", text(&lenient)][..], &size].concat(), 0);
    let warnings = String::from_utf8(output.stderr).unwrap();
    assert!(
        warnings.contains("taken as 1") && warnings.contains("left out") && warnings.contains("taken as 5"),
        "{warnings}"
    );

    let demo = |content: &[u8], tokens: &str| {
        let config = write(&folder, "b.json", "{}");
        let prompt = write(&folder, "prompt.txt", content);
        stderr(&["llm-demo", text(&config), text(&prompt), tokens, "--prompt-file-mode", "whole"], 2)
    };
    assert!(demo(&[b'a', 0xFF], "1").contains("expected UTF-8, got another byte at 1"));
    assert!(demo(b"", "1").contains("prompt.txt`: expected a prompt, got none"));
    let long = demo("dark night ".repeat(2000).as_bytes(), "1");
    assert!(long.contains("prompt.txt`: expected a prompt of 1 to 2048 tokens, the context of the model"), "{long}");
    assert!(demo(b"a", "many").contains("invalid value 'many'"));

    // A sweep goes on, and says which run failed.
    let (config, out) = (model(), path(&folder, "out"));
    let sweep = ["exp", "h2o-bench", "--base-config", text(&config), "--out-dir", text(&out), "--threads", "1"];
    let output = run(&[&sweep[..], &["--prompts", "9999,8", "--gens", "2", "--repeat", "1", "--json"]].concat(), 2);
    let swept: Value = serde_json::from_slice(&output.stdout).unwrap();
    let [bad, good] = &swept["manifest"].as_array().unwrap()[..] else { panic!("{swept}") };
    assert!(bad["error"].as_str().unwrap().contains("the context of the model"), "{bad}");
    assert_eq!((&bad["return_code"], &good["return_code"], good.get("error")), (&json!(2), &json!(0), None));
}
