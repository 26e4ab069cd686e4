//! Dumps that say how their layers attend: the sample, with scale, softcap and window of some layers.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::run::{json as json_of, run, sample, stdout, text};

/// The sample with more metadata.
fn with_metadata(folder: &Path, name: &str, key: &str, value: &Value) -> PathBuf {
    let bytes = std::fs::read(sample().join("demo_prompt_512_1.safetensors")).unwrap();
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, tensors) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    header["__metadata__"][key] = value.to_string().into();
    let header = header.to_string();
    let path = folder.join(format!("{name}.safetensors"));
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), tensors].concat();
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Six layers, of which the last three do not attend in the usual way of 64 channels.
fn attention() -> Value {
    let usual = json!({ "scale": 0.125, "softcap": null, "window": null });
    json!([
        usual, usual, usual,
        { "scale": 0.125, "softcap": 2.0, "window": null },
        { "scale": 0.125, "softcap": null, "window": 40 },
        { "scale": 0.0625, "softcap": null, "window": null },
    ])
}

/// Compares rows of layers: the first three are equal, the others differ in these numbers.
fn compare(stated: &Value, usual: &Value, keys: &[&str]) {
    let [stated, usual] = [stated, usual].map(|rows| rows.as_array().unwrap());
    assert_eq!((stated.len(), usual.len(), &stated[..3]), (6, 6, &usual[..3]));
    for (stated, usual) in stated.iter().zip(usual).skip(3) {
        for key in keys {
            assert_ne!(stated[*key], usual[*key], "{key}: {stated}");
        }
    }
}

#[test]
fn sweeps_and_evictions_replay_each_layer_as_its_dump_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = with_metadata(folder.path(), "stated", "attention", &attention());
    let pipeline = json!({ "routes": [{ "transforms": [{ "id": "quant", "bits": 4 }], "codec": { "id": "zstd" } }] });
    let sweep = |path: &Path| {
        let sweep = json_of(&["sweep", "--pipeline", &pipeline.to_string(), "--dump", text(path)]);
        let identity = &sweep["canaries"][0];
        assert_eq!((&identity["problem"], &identity["attention"]["kl_max"]), (&Value::Null, &json!(0.0)));
        sweep["rows"][0].clone()
    };
    let (stated, usual) = (sweep(&path), sweep(&sample()));
    assert_eq!((&stated["stored_bytes"], &stated["error"]), (&usual["stored_bytes"], &usual["error"]));
    let [stated, usual] = [&stated["attention"]["layers"], &usual["attention"]["layers"]];
    compare(stated, usual, &["kl_mean", "output_error"]);
    // Neither a softcap nor another scale changes the order of tokens.
    for layer in [3, 5] {
        assert_eq!(stated[layer]["top_agreement"], usual[layer]["top_agreement"]);
        assert_ne!(stated[layer]["logit_rmse"], usual[layer]["logit_rmse"]);
    }
    assert_ne!(stated[4]["top_agreement"], usual[4]["top_agreement"]);

    let evict = |path: &Path| json_of(&["evict", "--policy", "window", "--dump", text(path)])["layers"].clone();
    compare(&evict(&path), &evict(&sample()), &["kept_mass", "output_error"]);
}

#[test]
fn facts_are_shown_kept_and_part_of_the_digest() {
    let folder = tempfile::tempdir().unwrap();
    let digest_of = |path: &Path| {
        let info = stdout(&["dump", "info", "--digest", "--dump", text(path)]);
        info.lines().last().unwrap().to_owned()
    };
    let usual = json!(vec![json!({ "scale": 0.125, "softcap": null, "window": null }); 6]);
    let usual = with_metadata(folder.path(), "usual", "attention", &usual);
    assert_eq!(digest_of(&usual), "digest 1a3300b260a6e979bcd78fd57882c468");
    assert!(!stdout(&["dump", "info", "--dump", text(&usual)]).contains("attention"));

    let path = with_metadata(folder.path(), "stated", "attention", &attention());
    let digest = digest_of(&path);
    assert_ne!(digest, digest_of(&usual));
    let info = stdout(&["dump", "info", "--dump", text(&path)]);
    let line = "attention of demo_prompt_512_1: scale 0.125, softcap 2 in 1 of 6 layers; scale 0.125, window 40 in 1 of 6 layers; \
                scale 0.0625 in 1 of 6 layers\n";
    assert!(info.contains(line), "{info}");
    for format in ["reference", "safetensors"] {
        let out = folder.path().join(format);
        run(&["dump", "convert", text(&path), text(&out), "--format", format, "--dtype", "keep"], 0);
        assert_eq!(digest_of(&out), digest, "{format}");
        assert!(stdout(&["dump", "info", "--dump", text(&out)]).contains(line));
    }
}

#[test]
fn facts_that_cannot_be_are_bad_input() {
    let folder = tempfile::tempdir().unwrap();
    let mut attention = attention();
    attention[4]["window"] = json!(0);
    let path = with_metadata(folder.path(), "bad", "attention", &attention);
    let found = stdout_of_bad(&path);
    let expected =
        "bad.safetensors layers.4: safetensors-invalid: `attention`: expected a `window` of at least 1, got 0";
    assert!(found.contains(expected), "{found}");
    let path = with_metadata(folder.path(), "short", "attention", &json!([attention[0]]));
    let found = stdout_of_bad(&path);
    let expected =
        "short.safetensors: safetensors-invalid: `attention`: expected one element for each of 6 layers, got 1";
    assert!(found.contains(expected), "{found}");
}

fn stdout_of_bad(path: &Path) -> String {
    String::from_utf8(run(&["dump", "check", "--dump", text(path)], 2).stdout).unwrap()
}
