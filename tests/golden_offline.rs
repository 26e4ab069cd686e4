//! `exp offline-lossless` beside what the reference wrote for the same dumps.

use std::fs;

use crate::run::{run, shared, text};

/// Runs the experiment with these flags and compares both files with those of the reference.
fn offline_equals(name: &str, dump: &str, flags: &[&str]) {
    let Some(shared) = shared() else { return };
    let golden = shared.join("golden/offline");
    let dump = shared.join("data/dumps").join(dump);
    let folder = tempfile::tempdir().unwrap();
    let [json, md] = ["json", "md"].map(|ending| folder.path().join(format!("{name}.{ending}")));
    let paths =
        ["exp", "offline-lossless", "--dump-dir", text(&dump), "--out-json", text(&json), "--out-md", text(&md)];
    run(&[&paths, flags].concat(), 0);

    let resolved = dump.canonicalize().unwrap();
    for path in [&json, &md] {
        let got = fs::read_to_string(path).unwrap();
        let expected = fs::read_to_string(golden.join(path.file_name().unwrap())).unwrap();
        // Paths of the reference were shortened: to that of the JSON file's first fields, or of the first line of the list.
        let shortened = expected.lines().find_map(|line| line.split(['"', '`']).find(|part| part.starts_with("dumps")));
        let got = got.replace(text(&resolved), shortened.unwrap());
        if path == &md {
            assert_eq!(got, expected, "{name}");
        } else {
            // Our fields follow those of the reference.
            let fields = expected.strip_suffix("\n}").unwrap();
            assert_eq!(got.get(..fields.len()), Some(fields), "{name}");
            assert!(got[fields.len()..].starts_with(",\n  \"complete\": true,\n"), "{name}");
        }
    }
}

#[test]
fn offline_lossless_equals_the_reference_entry_by_entry() {
    offline_equals("per_meta", "fp16", &[]);
    offline_equals("legacy", "fp16", &["--codec-mode", "legacy"]);
}

#[test]
fn offline_lossless_equals_the_reference_in_chunks() {
    offline_equals("chunked", "fp16", &["--entry-mode", "chunked", "--online-chunk-seq", "128"]);
    let grouped = ["--entry-mode", "chunked_grouped", "--online-chunk-seq", "192", "--online-framing-bytes", "8"];
    offline_equals("chunked_grouped", "fp16", &grouped);
}

#[test]
fn offline_lossless_equals_the_reference_over_whole_layers() {
    offline_equals("aggregate", "fp16", &["--entry-mode", "aggregate", "--aggregate-by-stage"]);
    let all = ["--scope", "layer_range", "--layer-start", "0", "--entry-mode", "aggregate", "--bitshuffle"];
    offline_equals("all_bitshuffle", "fp16", &all);
    offline_equals("from_fp32", "fp32", &["--entry-mode", "aggregate"]);
}
