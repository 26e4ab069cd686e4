//! The `huffman-*` and `arith-*` experiments beside what the reference wrote for the same dumps.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::run::{run, shared, stdout, text};

/// The runs that the reference encoded.
const RUNS: [&str; 2] = ["demo_prompt_128_1", "demo_prompt_512_1"];

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        let target = to.join(item.file_name());
        if item.file_type().unwrap().is_dir() {
            copy(&item.path(), &target);
        } else {
            fs::copy(item.path(), target).unwrap();
        }
    }
}

/// SHA-256 of every file below `root`, by its path as `sha256sum` lists it.
fn digests(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut open = vec![root.to_path_buf()];
    while let Some(folder) = open.pop() {
        for item in fs::read_dir(folder).unwrap() {
            let path = item.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let digest = Sha256::digest(fs::read(&path).unwrap());
                let digits = digest.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
                found.insert(format!("./{}", text(path.strip_prefix(root).unwrap())), digits);
            }
        }
    }
    found
}

/// Lines in sorted order: those of the reference are in the order of its directories.
fn sorted(path: &Path) -> Vec<String> {
    let content = fs::read_to_string(path).unwrap();
    assert!(content.ends_with('\n') && !content.contains('\r'), "{}", path.display());
    let mut lines: Vec<_> = content.lines().map(ToOwned::to_owned).collect();
    lines[1..].sort();
    lines
}

fn equals_the_reference(coder: &str) {
    let Some(shared) = shared() else { return };
    let golden = shared.join("golden");
    let folder = tempfile::tempdir().unwrap();
    let [dump, out, decoded] = ["dump", "out", "decoded"].map(|name| folder.path().join(name));
    for run in RUNS {
        copy(&shared.join("data/dumps/fp16").join(run), &dump.join(run));
    }
    let command = |step: &str| format!("{coder}-{step}");
    let encode = command("encode");
    let flags = ["exp", &encode, "--dump-dir", text(&dump), "--out-dir", text(&out), "--stage", "prefill"];
    assert_eq!(stdout(&flags), "Encoded: 12\nSkipped: 192\n");

    let listed = fs::read_to_string(golden.join(coder).join("sha256.txt")).unwrap();
    let expected: BTreeMap<String, String> = listed
        .lines()
        .map(|line| line.split_once("  ").unwrap())
        .map(|(digest, path)| (path.into(), digest.into()))
        .collect();
    assert_eq!(digests(&out), expected);

    let decode = command("decode");
    let folders = ["--bitstream-dir", text(&out), "--orig-dump-dir", text(&dump)];
    let flags = [&["exp", &decode, "--verify", "--out-dir", text(&decoded)], &folders[..]].concat();
    assert_eq!(stdout(&flags), "Checked: 12, Failed: 0\n");
    run(&["dump", "check", "--dump", text(&decoded)], 0);

    let analyze = command("analyze");
    for (more, name) in [(&[][..], coder.to_owned()), (&["--include-meta"], format!("{coder}-meta"))] {
        let results = folder.path().join(&name);
        let flags = [&["exp", &analyze, "--out-dir", text(&results)], more, &folders[..]].concat();
        let [table, summary] = ["metrics.csv", "summary.md"].map(|file| format!("{coder}_{file}"));
        let paths = [&table, &summary].map(|file| results.join(file).display().to_string());
        assert_eq!(stdout(&flags), format!("Wrote {}\nWrote {}\n", paths[0], paths[1]));
        assert_eq!(sorted(&results.join(&table)), sorted(&golden.join(&name).join(&table)), "{name}");
        let summaries =
            [&results, &golden.join(&name)].map(|folder| fs::read_to_string(folder.join(&summary)).unwrap());
        assert_eq!(summaries[0], summaries[1], "{name}");
        run(&flags, 2);
    }
}

#[test]
fn huffman_files_equal_the_reference() {
    equals_the_reference("huffman");
}

#[test]
fn arithmetic_files_equal_the_reference() {
    equals_the_reference("arith");
}
