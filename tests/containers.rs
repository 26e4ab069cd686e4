//! Containers through the command line: every process sees nothing but the file.

use std::fs;
use std::path::Path;

use crate::run::{json, run, sample, stderr, stdout, text};

fn encode(folder: &Path, pipeline: &str) -> std::path::PathBuf {
    let file = folder.join("kv.gbx");
    run(&["encode", "--pipeline", pipeline, "--out", text(&file)], 0);
    file
}

#[test]
fn verify_in_a_fresh_process_compares_digests_and_the_dump() {
    let folder = tempfile::tempdir().unwrap();
    for pipeline in ["gear-delta", "configs/pipelines/keys-and-values-apart.json"] {
        let file = encode(folder.path(), pipeline);
        let verified = json(&["verify", text(&file), "--dump", text(&sample())]);
        assert_eq!(verified["changed_values"], 0);
        assert!(verified["chunks"].as_u64().unwrap() > 0);
        run(&["verify", text(&file)], 0);
        fs::remove_file(file).unwrap();
    }
}

#[test]
fn verify_against_another_dump_fails() {
    let folder = tempfile::tempdir().unwrap();
    let file = encode(folder.path(), "store");
    let dump = folder.path().join("dump");
    fs::create_dir(&dump).unwrap();
    let name = "demo_prompt_512_1.safetensors";
    let mut bytes = fs::read(sample().join(name)).unwrap();
    let value = bytes.len() - 300_000;
    bytes[value] ^= 1;
    fs::write(dump.join(name), bytes).unwrap();
    let changed = run(&["verify", text(&file), "--dump", text(&dump), "--json"], 1);
    let changed: serde_json::Value = serde_json::from_slice(&changed.stdout).unwrap();
    assert_eq!(changed["changed_values"], 1);
}

#[test]
fn decode_gives_back_the_dump_in_both_formats() {
    let folder = tempfile::tempdir().unwrap();
    let file = encode(folder.path(), "gear");
    for format in ["safetensors", "reference"] {
        let out = folder.path().join(format);
        run(&["decode", text(&file), "--out", text(&out), "--format", format], 0);
        let verified = json(&["verify", text(&file), "--dump", text(&out)]);
        assert_eq!(verified["changed_values"], 0);
        let left: Vec<_> = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 1, "nothing but the run: {left:?}");
        let message = stderr(&["decode", text(&file), "--out", text(&out), "--format", format], 2);
        assert!(message.contains("exists"), "{message}");
        run(&["decode", text(&file), "--out", text(&out), "--format", format, "--overwrite"], 0);
    }
}

#[test]
fn inspect_accounts_for_every_byte() {
    let folder = tempfile::tempdir().unwrap();
    let file = encode(folder.path(), "gear-delta");
    let size = fs::metadata(&file).unwrap().len();
    let shown = json(&["inspect", text(&file)]);
    let ledger: u64 = shown["ledger"].as_array().unwrap().iter().map(|row| row["bytes"].as_u64().unwrap()).sum();
    assert_eq!((ledger, shown["file_bytes"].as_u64().unwrap()), (size, size));
    assert!(stdout(&["inspect", text(&file)]).contains(&size.to_string()));
}

#[test]
fn existing_container_is_kept_unless_overwrite() {
    let folder = tempfile::tempdir().unwrap();
    let file = encode(folder.path(), "store");
    let before = fs::read(&file).unwrap();
    let message = stderr(&["encode", "--pipeline", "zstd", "--out", text(&file)], 2);
    assert!(message.contains("kv.gbx") && message.contains("overwrite"), "{message}");
    assert_eq!(fs::read(&file).unwrap(), before);
    run(&["encode", "--pipeline", "zstd", "--out", text(&file), "--overwrite"], 0);
    assert_ne!(fs::read(&file).unwrap(), before);
}

#[test]
fn damaged_container_is_refused_naming_chunk_and_lane_and_can_be_walked() {
    let folder = tempfile::tempdir().unwrap();
    let file = encode(folder.path(), "zstd");
    let whole = fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    fs::write(&file, &flipped).unwrap();
    let failed = run(&["verify", text(&file)], 2);
    let report = String::from_utf8(failed.stdout).unwrap();
    assert!(
        report.contains("chunk") && report.contains("lane `tensor`") && report.contains("checksum differs"),
        "{report}"
    );
    let out = folder.path().join("out");
    assert!(stderr(&["decode", text(&file), "--out", text(&out)], 2).contains("lane `tensor`"));
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "nothing half-written");
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    for command in ["verify", "inspect"] {
        assert!(stderr(&[command, text(&file)], 2).contains("cut off"));
    }
    let walked = run(&["inspect", "--recover", text(&file)], 2);
    assert!(String::from_utf8(walked.stdout).unwrap().contains("damaged: bytes"));
    fs::write(&file, b"not a container, but long enough to be one").unwrap();
    assert!(stderr(&["inspect", text(&file)], 2).contains("not a Gearbox container"));
}

#[test]
fn interrupted_encode_leaves_nothing_under_the_name() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("kv.gbx");
    let mut child = std::process::Command::new(crate::run::gearbox().get_program())
        .args(["encode", "--pipeline", r#"{"routes":[{"codec":{"id":"zstd","level":22}}]}"#, "--out", text(&out)])
        .current_dir(crate::run::root())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(30));
    child.kill().unwrap();
    let finished = child.wait().unwrap().success();
    assert_eq!(out.exists(), finished);
}

#[test]
fn sweep_keeps_no_container_of_a_pipeline_that_is_not_legal_and_replaces_none_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let out = text(folder.path());
    let illegal = r#"{ "routes": [{ "layers": "100..", "codec": { "id": "gear" } }] }"#;
    run(&["sweep", "--pipeline", illegal, "--out", out, "--keep-containers"], 1);
    assert!(!folder.path().join("0000.gbx").exists());
    fs::write(folder.path().join("0000.gbx"), "mine").unwrap();
    let message = stderr(&["sweep", "--pipeline", "store", "--out", out, "--keep-containers"], 2);
    assert!(message.contains("overwrite"), "{message}");
    assert_eq!(fs::read(folder.path().join("0000.gbx")).unwrap(), b"mine");
}
