//! What `gearbox plugin new` writes builds without warnings and passes the conformance kit as it is; so does the wrapper of a real C library.
//! The commands of `docs/PLUGINS.md` are taken from the document and run, and what they print is compared with what it says.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use gearbox::scaffold::{self, Language};
use gearbox_abi::{Abi, Host, Library, Source};
use gearbox_conformance::codec::run_codec;
use gearbox_conformance::eviction::run_eviction;
use gearbox_conformance::transform::run_transform;
use gearbox_core::{AnyEntry, Kind};
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::run::{root, text};

/// Runs a command that must succeed, and returns what it printed to either stream.
fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

/// The command of a new project, in its folder, as its author would run it: nothing of this test's own build gets in.
fn in_project(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder).env_remove("CARGO_TARGET_DIR").env_remove("RUSTFLAGS").env("CARGO_NET_OFFLINE", "true");
    command
}

/// Prepares a Rust project for a test: the versions of the workspace, since others may not be at hand, and a target folder that outlives it.
fn prepare(folder: &Path) {
    std::fs::copy(root().join("Cargo.lock"), folder.join("Cargo.lock")).unwrap();
    let own = std::env::current_exe().unwrap();
    let shared = own.ancestors().nth(3).unwrap().join("scaffold");
    std::fs::create_dir_all(&shared).unwrap();
    std::os::unix::fs::symlink(shared, folder.join("target")).unwrap();
}

fn load(path: &Path, abi: Abi) -> Arc<Library> {
    let library =
        gearbox_abi::load(&Source::from(path), &Host { guarded: true, threads: 2, ..Host::default() }).unwrap();
    assert_eq!(library.abi, abi);
    library
}

/// Runs the kit.
fn conforms(library: &Library, id: &str, settings: &[Value]) {
    let [entry] = &*library.entries else { panic!("expected one plugin, got {:?}", library.entries) };
    assert_eq!(entry.id(), id);
    for settings in settings {
        let outcomes = match entry {
            AnyEntry::Codec(entry) => run_codec(entry, settings),
            AnyEntry::Transform(entry) => run_transform(entry, settings),
            AnyEntry::Eviction(entry) => run_eviction(entry, settings),
        };
        let failed: Vec<String> = outcomes.iter().filter(|found| !found.passed()).map(ToString::to_string).collect();
        assert!(failed.is_empty(), "{id} {settings}\n{}", failed.join("\n"));
    }
}

/// Settings that the templates are tried with.
fn settings(kind: Kind, language: Language) -> Vec<Value> {
    match (kind, language) {
        (Kind::Codec, _) => vec![json!({}), json!({"distance": 0}), json!({"distance": 3})],
        (Kind::Transform, Language::Rust) => vec![json!({}), json!({"tokens": 1}), json!({"tokens": 5})],
        (Kind::Transform, Language::C) => vec![json!({}), json!({"distance": 2})],
        (Kind::Eviction, _) => vec![json!({}), json!({"sinks": 1, "recent": 3})],
    }
}

fn rust_project(kind: Kind) {
    let parent = tempdir().unwrap();
    let (id, folder) = (format!("scaffold-{kind}"), parent.path().join("project"));
    scaffold::create(&folder, &id, kind, Language::Rust).unwrap();
    prepare(&folder);
    succeeds(in_project("rustfmt", &folder).args(["--check", "--edition", "2024", "src/lib.rs"]));
    let built = succeeds(in_project(env!("CARGO"), &folder).args(["build", "--release"]));
    assert!(!built.contains("warning"), "{built}");
    let tested = succeeds(in_project(env!("CARGO"), &folder).args(["test", "--release"]));
    assert!(tested.contains("1 passed"), "{tested}");
    let library =
        format!("{}gearbox_plugin_scaffold_{kind}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let library = load(&folder.join("target/release").join(library), Abi::Rust);
    conforms(&library, &id, &settings(kind, Language::Rust));
}

#[test]
fn new_rust_codec_conforms() {
    rust_project(Kind::Codec);
}

#[test]
fn new_rust_transform_conforms() {
    rust_project(Kind::Transform);
}

#[test]
fn new_rust_eviction_policy_decides() {
    rust_project(Kind::Eviction);
}

/// A program that loads a library and has its first codec code a lane.
const HOST: &str = r#"
use gearbox_abi::{Host, Source, load};
use gearbox_core::{AnyEntry, Context, Elem, ErrorKind, LaneRef, LaneSpec, Role, Shape};

fn main() {
    let path = std::env::args().nth(1).unwrap();
    let library = load(&Source::from(path), &Host::default()).unwrap();
    let [AnyEntry::Codec(entry)] = &*library.entries else { panic!("expected one codec") };
    let codec = entry.build(&serde_json::json!({})).unwrap();
    let (spec, cx) = (LaneSpec::new("tensor", Elem::F16, Shape::new(9, 2, 8)), Context::new(0, Role::Key, 0));
    let lane: Vec<u8> = (0..spec.byte_len()).map(|byte| (byte / 7) as u8).collect();
    let (mut encoded, mut decoded) = (Vec::new(), vec![0; lane.len()]);
    codec.encode(LaneRef::new(&spec, &lane).unwrap(), &cx, &mut encoded).unwrap();
    codec.decode(&encoded, &spec, &cx, &mut decoded).unwrap();
    assert_eq!(decoded, lane);
    let error = codec.decode(&encoded[..1], &spec, &cx, &mut decoded).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}
"#;

#[test]
fn libraries_of_one_profile_work_in_programs_of_the_other() {
    let parent = tempdir().unwrap();
    let folder = parent.path().join("project");
    scaffold::create(&folder, "profiles", Kind::Codec, Language::Rust).unwrap();
    prepare(&folder);
    std::fs::create_dir(folder.join("examples")).unwrap();
    std::fs::write(folder.join("examples/host.rs"), HOST).unwrap();
    for profile in ["dev", "release"] {
        succeeds(in_project(env!("CARGO"), &folder).args([
            "build",
            "--lib",
            "--example",
            "host",
            "--profile",
            profile,
        ]));
    }
    let library = format!("{}gearbox_plugin_profiles{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    for (host, guest) in [("debug", "release"), ("release", "debug")] {
        let program = folder.join("target").join(host).join("examples/host");
        succeeds(Command::new(program).arg(folder.join("target").join(guest).join(&library)));
    }
}

/// Whether the programs that C projects need are there; says so if not.
fn has_make() -> bool {
    let found = Command::new("make").arg("--version").output().is_ok();
    if !found {
        eprintln!("skipped: make is missing");
    }
    found
}

fn c_project(kind: Kind) {
    if !has_make() {
        return;
    }
    let parent = tempdir().unwrap();
    let (id, folder) = (format!("scaffold-c-{kind}"), parent.path().join("project"));
    scaffold::create(&folder, &id, kind, Language::C).unwrap();
    succeeds(in_project("make", &folder).env("CFLAGS", "-O2 -Werror"));
    let library = load(&folder.join(format!("lib{id}.so")), Abi::C);
    conforms(&library, &id, &settings(kind, Language::C));
}

#[test]
fn new_c_codec_conforms() {
    c_project(Kind::Codec);
}

#[test]
fn new_c_transform_conforms() {
    c_project(Kind::Transform);
}

#[test]
fn new_c_eviction_policy_decides() {
    c_project(Kind::Eviction);
}

#[test]
fn codec_around_the_lz4_of_the_system_conforms() {
    let folder = tempdir().unwrap();
    let probe = folder.path().join("probe.c");
    std::fs::write(&probe, "#include <lz4.h>\n").unwrap();
    if !Command::new("cc").arg("-fsyntax-only").arg(&probe).output().unwrap().status.success() {
        eprintln!("skipped: lz4.h is missing; Debian's package is liblz4-dev");
        return;
    }
    let library = folder.path().join("liblz4-plugin.so");
    succeeds(
        Command::new("cc")
            .args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-shared", "-fPIC", "-I"])
            .arg(root().join("plugins/abi/include"))
            .arg(root().join("plugins/examples/c-lz4/lz4.c"))
            .args(["-llz4", "-o", text(&library)]),
    );
    conforms(&load(&library, Abi::C), "system-lz4", &[json!({}), json!({"acceleration": 40})]);
}

/// Commands and what they print, from the `console` blocks of a section of `docs/PLUGINS.md`.
fn steps(heading: &str) -> Vec<(String, String)> {
    let document = std::fs::read_to_string(root().join("docs/PLUGINS.md")).unwrap();
    let section = document.split("\n## ").find(|section| section.starts_with(&format!("{heading}\n"))).unwrap();
    let blocks = section.split("```console\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let steps =
        blocks.flat_map(|block| format!("\n{block}").split("\n$ ").skip(1).map(str::to_owned).collect::<Vec<_>>());
    let parts = steps.map(|step| match step.split_once('\n') {
        Some((command, printed)) => (command.to_owned(), printed.trim_end().to_owned()),
        None => (step, String::new()),
    });
    parts.collect()
}

/// Whether a text is what the document says, where `…` stands for anything.
fn agrees(expected: &str, got: &str) -> bool {
    let mut parts = expected.split('…');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = got.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        let place = if parts.peek().is_none() { rest.rfind(part) } else { rest.find(part) };
        let Some(place) = place else { return false };
        rest = &rest[place + part.len()..];
    }
    rest.is_empty()
}

#[test]
fn ellipses_stand_for_anything_between_what_is_said() {
    for expected in ["a b", "…", "a…", "…b", "a… …b", "a b…", "…a b"] {
        assert!(agrees(expected, "a b"), "{expected}");
    }
    for expected in ["", "a", "b", "…a", "b…", "a…c…b", "b…a"] {
        assert!(!agrees(expected, "a b"), "{expected}");
    }
}

/// Runs a section of the document in an empty folder.
fn follow(heading: &str) {
    let _built = crate::run::gearbox();
    let program = assert_cmd::cargo::cargo_bin("gearbox");
    let mut path = vec![program.parent().unwrap().to_owned()];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
    let path = std::env::join_paths(path).unwrap();
    let parent = tempdir().unwrap();
    let mut folder = parent.path().to_owned();
    let steps = steps(heading);
    assert!(steps.len() >= 5, "{steps:?}");
    for (command, expected) in steps {
        if let Some(name) = command.strip_prefix("cd ") {
            folder.push(name);
            if folder.join("Cargo.toml").exists() {
                prepare(&folder);
            }
            continue;
        }
        let printed =
            succeeds(in_project("bash", &folder).args(["-c", &command]).env("PATH", &path).env_remove("CFLAGS"));
        assert!(agrees(&expected, printed.trim_end()), "{command}\nexpected:\n{expected}\ngot:\n{printed}");
    }
}

#[test]
fn steps_in_rust_do_what_the_document_says() {
    follow("In Rust");
}

#[test]
fn steps_in_c_do_what_the_document_says() {
    if !has_make() {
        return;
    }
    follow("In C");
}
