//! A sweep among hostile plugins: each ends in its named state, and nothing else notices.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::run::{c_library, gearbox, json as json_of, root, run, sample, stderr, text};

/// The library of `tests/isolate/rude.rs`, in the profile of the tests.
fn rude() -> PathBuf {
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    let build = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--locked", "--workspace", "--example", "rude", "--profile", profile])
        .current_dir(root())
        .status();
    assert!(build.unwrap().success(), "the library does not build");
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("examples/librude.so")
}

/// A library of `hostile.c` of the loader's tests.
fn hostile(folder: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let out = folder.join(format!("lib{name}.so"));
    c_library("plugins/abi/tests/hostile.c", flags, &out);
    out
}

fn pipeline(name: &str, route: &Value) -> Value {
    json!({ "name": name, "routes": [route], "chunking": { "mode": "aggregate" } })
}

/// What must not depend on who else runs: everything but times.
fn facts(row: &Value) -> Value {
    let mut row = row.clone();
    for key in ["encode_ns", "decode_ns", "pareto", "sequences"] {
        row.as_object_mut().unwrap().remove(key);
    }
    row
}

#[test]
fn sweep_among_hostile_plugins_names_their_states_and_keeps_the_other_rows() {
    let folder = tempdir().unwrap();
    let good: Vec<Value> = ["store", "zstd", "gear-delta", "planes"]
        .map(|id| pipeline(id, &json!({ "codec": { "id": id } })))
        .into_iter()
        .chain([pipeline("quant", &json!({ "transforms": [{ "id": "quant" }], "codec": { "id": "zstd" } }))])
        .collect();
    // Rust: where, what, and the state that it ends in.
    let deeds = [
        ("new", "panic", "panicked"),
        ("capabilities", "panic", "panicked"),
        ("config", "panic", "panicked"),
        ("train", "panic", "panicked"),
        ("encode", "panic", "panicked"),
        ("decode", "panic", "panicked"),
        ("new", "abort", "crashed(SIGABRT)"),
        ("encode", "abort", "crashed(SIGABRT)"),
        ("decode", "overflow", "crashed(SIGABRT)"),
        ("encode", "kill", "crashed(SIGKILL)"),
        ("encode", "exit", "crashed(exit)"),
        ("encode", "spin", "timed-out"),
        ("decode", "sleep", "timed-out"),
        ("encode", "allocate", "out-of-memory"),
        ("encode", "longer", "wrong-length"),
        ("decode", "wrong", "mismatch"),
        ("encode", "random", "ok"),
        ("encode", "nothing", "ok"),
    ];
    let mut expected = BTreeMap::new();
    let mut pipelines = good.clone();
    for (at, act, state) in deeds {
        let name = format!("rude {at} {act}");
        pipelines.push(pipeline(&name, &json!({ "codec": { "id": "rude", "at": at, "act": act } })));
        expected.insert(name, state);
    }
    for (at, act, state) in
        [("forward", "panic", "panicked"), ("inverse", "abort", "crashed(SIGABRT)"), ("bound", "panic", "panicked")]
    {
        let name = format!("transform {at} {act}");
        let transform = json!([{ "id": "hostile-transform", "at": at, "act": act }]);
        pipelines.push(pipeline(&name, &json!({ "transforms": transform, "codec": { "id": "zstd" } })));
        expected.insert(name, state);
    }
    // C, where lengths are only promised.
    for (mode, state) in [("overrun", "wrong-length"), ("long", "wrong-length"), ("unload", "crashed(SIGSEGV)")] {
        let name = format!("hostile {mode}");
        pipelines.push(pipeline(&name, &json!({ "codec": { "id": "hostile", "mode": mode } })));
        expected.insert(name, state);
    }
    let config = |name: &str, config: &Value| {
        let path = folder.path().join(name);
        std::fs::write(&path, config.to_string()).unwrap();
        path
    };
    let alone = config("alone.json", &json!({ "pipelines": good }));
    let among = json!({
        "pipelines": pipelines,
        "plugins": [{ "path": rude() }, { "path": hostile(folder.path(), "hostile", &["-DTRANSFORM_ID=\"c-transform\""]) }],
        "isolation": { "wall_seconds": 5.0, "cpu_seconds": 3, "address_space_bytes": 1_u64 << 30 },
    });
    let among = config("among.json", &among);
    let sweep = |config: &Path, out: &str, status: i32| -> Value {
        let out = folder.path().join(out);
        let arguments =
            ["sweep", text(config), "--allow-insecure-plugins", "--out", text(&out), "--keep-containers", "--quiet"];
        let sample = sample();
        let output = gearbox().args(arguments).args(["--dump", text(&sample)]).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{errors}");
        serde_json::from_slice(&std::fs::read(out.join("sweep.json")).unwrap()).unwrap()
    };
    let (alone, among) = (sweep(&alone, "alone", 0), sweep(&among, "among", 1));
    let rows = among["rows"].as_array().unwrap();
    for (number, row) in alone["rows"].as_array().unwrap().iter().enumerate() {
        assert_eq!(facts(row), facts(&rows[number]));
        let container = |out: &str| std::fs::read(folder.path().join(out).join(format!("{number:04}.gbx"))).unwrap();
        assert!(container("alone") == container("among"), "container {number} differs");
    }
    let found: BTreeMap<String, &str> = rows[good.len()..]
        .iter()
        .map(|row| (row["name"].as_str().unwrap().to_owned(), row["state"].as_str().unwrap()))
        .collect();
    assert_eq!(found, expected);
    // What the kit refutes is no label any more.
    let labels = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap()["labels"].clone();
    assert_eq!(labels("rude encode nothing"), json!(["lossless", "deterministic"]));
    assert_eq!(labels("rude encode random"), json!(["lossless"]));
    assert_eq!(labels("rude decode wrong"), json!([]));
    let refuted = among["refuted"].as_array().unwrap();
    let of_random = refuted.iter().find(|refuted| refuted["labels"] == json!(["deterministic"])).unwrap();
    assert_eq!(of_random["plugin"]["act"], "random");
    let summary = std::fs::read_to_string(folder.path().join("among/sweep.md")).unwrap();
    assert!(summary.contains("label `deterministic` withheld: instances_agree: "), "{summary}");
    assert!(summary.contains("rude encode spin aggregate FAILED (timed-out)"), "{summary}");
}

#[test]
fn container_of_a_loaded_plugin_names_its_library() {
    let folder = tempdir().unwrap();
    let library = hostile(folder.path(), "hostile", &[]);
    let other = hostile(folder.path(), "other", &["-g"]);
    let file = folder.path().join("kv.gbx");
    let (library, other, file, sample) = (text(&library), text(&other), text(&file), sample());
    let insecure = "--allow-insecure-plugins";
    run(&["encode", "--plugin", library, insecure, "--dump", text(&sample), "--pipeline", "hostile", "--out", file], 0);
    let facts = json_of(&["inspect", file]);
    let sha256 = facts["plugins"][0]["library"]["sha256"].as_str().unwrap();
    assert_eq!(facts["plugins"][0]["library"]["file"], "libhostile.so");
    assert_eq!(sha256.len(), 64);
    run(&["verify", "--plugin", library, insecure, file], 0);
    let errors = stderr(&["verify", file], 2);
    let expected =
        format!("`hostile` is a plugin of the library `libhostile.so` (SHA-256 {sha256}), which is not loaded");
    assert!(errors.contains(&expected), "{errors}");
    assert!(errors.contains("`--plugin` or `GEARBOX_PLUGIN_PATH`"), "{errors}");
    let warned = stderr(&["verify", "--plugin", other, insecure, file], 0);
    assert!(warned.contains("`hostile` was written by the library `libhostile.so`"), "{warned}");
}

#[test]
fn one_id_in_two_libraries_is_refused_and_one_library_twice_is_not() {
    let folder = tempdir().unwrap();
    let (one, two) = (hostile(folder.path(), "one", &[]), hostile(folder.path(), "two", &["-g"]));
    let (one, two) = (text(&one), text(&two));
    let insecure = "--allow-insecure-plugins";
    for isolation in ["--isolate", "--no-isolate"] {
        run(&["plugin", "list", insecure, isolation, "--plugin", one, "--plugin", one], 0);
        let errors = stderr(&["plugin", "list", insecure, isolation, "--plugin", one, "--plugin", two], 2);
        assert!(errors.contains("is claimed by both"), "{errors}");
        assert!(errors.contains("libone.so") && errors.contains("libtwo.so"), "{errors}");
    }
}
