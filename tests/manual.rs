//! What the program says of itself: overview, manual pages, completions, and what it finds on a machine.

use crate::run::{gearbox, json as json_of, run, stderr, stdout};

#[test]
fn without_arguments_it_says_where_to_start() {
    let text = stdout(&[]);
    assert!(text.lines().count() < 30, "{text}");
    // Every command that it names exists.
    for line in text.lines().filter_map(|line| line.strip_prefix("  gearbox ")) {
        let words: Vec<&str> =
            line.split_whitespace().take_while(|word| word.starts_with(char::is_lowercase)).collect();
        let depth = if ["plugin", "dump", "model"].contains(&words[0]) { 2 } else { 1 };
        run(&[&words[..depth], &["--help"]].concat(), 0);
    }
}

#[test]
fn manual_pages_are_written_for_every_command() {
    let folder = tempfile::tempdir().unwrap();
    run(&["man", "--out", folder.path().to_str().unwrap()], 0);
    for page in ["gearbox", "gearbox-sweep", "gearbox-plugin-check", "gearbox-exp-gear-fp16"] {
        let text = std::fs::read_to_string(folder.path().join(format!("{page}.1"))).unwrap();
        assert!(text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"), "{page}");
    }
    let file = folder.path().join("gearbox.1");
    assert!(stderr(&["man", "--out", file.to_str().unwrap()], 2).contains("gearbox.1"));
}

#[test]
fn completions_are_printed_for_every_shell() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(stdout(&["completions", shell]).contains("sweep"), "{shell}");
    }
}

#[test]
fn doctor_names_what_is_there_and_what_is_not() {
    let found = json_of(&["doctor"]);
    let checks = found["checks"].as_array().unwrap();
    assert!(checks.iter().all(|check| check["ok"] == true), "{checks:?}");
    assert!(found["receipt"]["plugins"].as_array().unwrap().len() > 10);
    let missing = gearbox().args(["doctor", "--plugin", "nowhere.so"]).output().unwrap();
    let text = String::from_utf8(missing.stdout).unwrap();
    assert_eq!(missing.status.code(), Some(1), "{text}");
    assert!(text.contains("nowhere.so") && text.contains("NOT OK"), "{text}");
}
