//! `gearbox model` and `gearbox gate`: the bundled model in the loop, on the command line.

use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::run::{json as json_of, root, run, stderr, text};

/// A text that belongs to the repository, of some thousand tokens.
fn book() -> PathBuf {
    root().join("docs/PLUGINS.md")
}

fn file(folder: &TempDir, name: &str, value: &Value) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, value.to_string()).unwrap();
    path
}

fn evicting(policy: &str) -> Value {
    let evict = json!({ "id": policy, "target_ratio": 2.0, "margin_tokens": 4 });
    json!({
        "name": policy,
        "routes": [{ "evict": evict, "codec": { "id": "planes" } }],
        "chunking": { "mode": "chunked-grouped", "tokens": 16 }
    })
}

#[test]
fn capture_writes_a_dump_that_attention_can_be_replayed_over() {
    let folder = tempdir().unwrap();
    let (book, out) = (book(), folder.path().join("dumps"));
    let capture = [
        "model",
        "capture",
        "--text",
        text(&book),
        "--tokens",
        "96",
        "--decode",
        "3",
        "--block",
        "40",
        "--out",
        text(&out),
    ];
    let captured = json_of(&capture);
    assert_eq!((&captured[0]["prompt_tokens"], &captured[0]["decode_tokens"]), (&json!(96), &json!(3)));
    let log: Value = serde_json::from_str(&std::fs::read_to_string(out.join("runs.jsonl")).unwrap()).unwrap();
    assert_eq!((&log["run_id"], &log["metrics"]["prompt_tokens"]), (&json!("PLUGINS"), &json!(96)));
    let dump = out.join("PLUGINS.safetensors");
    let swept = json_of(&["sweep", "--dump", text(&dump), "--pipeline", "planes"]);
    assert_eq!(swept["dumps"][0]["entries"], 6 * 4);
    let row = &swept["rows"][0];
    assert_eq!(row["state"], "ok");
    assert_eq!(row["attention"]["all"]["kl_max"], 0.0);
    assert!(row["attention"]["all"]["queries"].as_u64().unwrap() > 0, "the dump holds queries");
    let first = std::fs::read(&dump).unwrap();
    run(&[&capture[..], &["--overwrite"]].concat(), 0);
    assert!(first == std::fs::read(&dump).unwrap(), "the same input gives the same bytes");
    let refused = stderr(&capture, 2);
    assert!(refused.contains("exists already"), "{refused}");
}

#[test]
fn quality_and_speed_are_judged_together_by_the_gate() {
    let folder = tempdir().unwrap();
    let (book, quality, speed) = (book(), folder.path().join("quality.json"), folder.path().join("speed.json"));
    let (kept, planes) = (
        file(&folder, "h2o.json", &evicting("h2o")),
        file(
            &folder,
            "planes.json",
            &json!({
                "routes": [{ "codec": { "id": "planes" } }], "chunking": { "mode": "chunked-grouped", "tokens": 128 }
            }),
        ),
    );
    let arms = ["--text", text(&book), "--pipeline", text(&kept), "--pipeline", text(&planes), "--residual", "8"];
    let size = ["--prompt", "288", "--tokens", "24"];
    let perplexity = ["model", "perplexity", "--windows", "1", "--out", text(&quality)];
    let found = json_of(&[&perplexity[..], &arms, &size].concat());
    let rows = found["rows"].as_array().unwrap();
    let named = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{found}"));
    let measured = |name: &str, metric: &str| named(name)["measured"][metric].as_f64().unwrap();
    assert_eq!(found["problems"], json!([]));
    let identity = &named("identity")["measured"];
    assert_eq!((&identity["token_kl_mean"], &identity["top1_agreement"]), (&json!(0.0), &json!(1.0)));
    assert_eq!(named("planes")["measured"]["token_kl_mean"], 0.0, "lossless is lossless");
    assert_eq!(named("planes")["nll_increase"], 0.0);
    assert!(measured("planes", "lossless_ratio") > 1.0);
    assert!(measured("corrupt", "token_kl_mean") > 0.01);
    assert!(measured("h2o", "lossy_ratio") > 1.5);
    assert!(measured("random", "token_kl_mean") > measured("h2o", "token_kl_mean"));
    let bench = ["model", "bench", "--repeat", "2", "--out", text(&speed)];
    let timed = json_of(&[&bench[..], &arms, &size].concat());
    assert_eq!(timed["rows"][0]["name"], "dense");
    assert!(timed["rows"][1]["per_token_ns"]["score"].as_f64().unwrap() > 0.0);
    let easy = json!({ "lossy_ratio": { "min": 1.5 }, "decode_drop": { "max": 100 }, "token_kl_p99": { "max": 100 } });
    let easy = file(&folder, "easy.json", &easy);
    let gate = |config: &PathBuf, files: &[&str], status: i32| {
        let arguments = [&["gate", "--config", text(config)][..], files].concat();
        String::from_utf8(run(&arguments, status).stdout).unwrap()
    };
    let files = [text(&quality), text(&speed)];
    assert!(gate(&easy, &files, 0).ends_with("PASS\n"));
    let missing = gate(&easy, &files[..1], 1);
    assert!(missing.contains("decode_drop was not measured") && missing.ends_with("FAIL\n"), "{missing}");
    let hard = file(&folder, "hard.json", &json!({ "lossy_ratio": { "min": 100 } }));
    assert!(gate(&hard, &files, 1).contains("lossy_ratio "));
    let errors = stderr(&["gate", "--config", text(&easy), text(&easy)], 2);
    assert!(errors.contains("expected results of a sweep or of a model"), "{errors}");
}

#[test]
fn bad_input_is_named() {
    let folder = tempdir().unwrap();
    let binary = folder.path().join("binary.txt");
    std::fs::write(&binary, [b'a', 0xFF]).unwrap();
    let (book, binary, out) = (book(), text(&binary), folder.path().join("out"));
    let capture = |rest: &[&str]| stderr(&[&["model", "capture", "--out", text(&out)][..], rest].concat(), 2);
    assert!(capture(&["--text", binary]).contains("expected UTF-8, got another byte at 1"));
    let long = capture(&["--text", text(&book), "--decode", "9999"]);
    assert!(long.contains("expected 1 to 2048 tokens, the context of the model"), "{long}");
    assert!(capture(&["--text", text(&book), "--model", text(folder.path())]).contains("config.json"));
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0, "nothing is left behind");
    let impossible = file(
        &folder,
        "impossible.json",
        &json!({ "routes": [{ "evict": { "id": "window", "target_ratio": 1000.0 }, "codec": { "id": "store" } }] }),
    );
    let errors = stderr(&["model", "perplexity", "--text", text(&book), "--pipeline", text(&impossible)], 2);
    assert!(errors.contains("`/routes/0/evict`") && errors.contains("achievable is a ratio of 12.8"), "{errors}");
}
