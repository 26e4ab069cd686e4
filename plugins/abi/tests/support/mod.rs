//! Builds the libraries that the tests load.

// Each test binary uses a part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use gearbox_abi::{Host, Library, LoadError, Source, load};
use gearbox_core::{AnyEntry, Codec, Entry, EvictionPolicy, LossyTransform};
use serde_json::Value;

/// Folder of this crate.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs `cargo build` into the target folder of this very test, and returns the folder of its profile.
fn cargo_build(arguments: &[&str]) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let profile = own.ancestors().nth(2).unwrap().to_owned();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--offline"]).args(arguments).current_dir(root());
    cargo.arg("--target-dir").arg(profile.parent().unwrap());
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    assert!(cargo.status().unwrap().success(), "cargo build {arguments:?}");
    profile
}

fn dll(name: &str) -> String {
    format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX)
}

/// The library of `plugins/examples/rust-demo`.
pub fn rust_demo() -> PathBuf {
    cargo_build(&["-p", "gearbox-rust-demo"]).join(dll("gearbox_rust_demo"))
}

/// A library of `examples/` in this crate.
pub fn example(name: &str) -> PathBuf {
    cargo_build(&["-p", "gearbox-abi", "--example", name]).join("examples").join(dll(name))
}

/// Runs the C compiler; warnings are errors.
pub fn cc(arguments: &[&str], source: &Path, out: &Path) {
    let status = Command::new("cc")
        .args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"])
        .arg(root().join("include"))
        .args(arguments)
        .arg(source)
        .arg("-o")
        .arg(out)
        .status();
    assert!(status.unwrap().success(), "cc {arguments:?} {}", source.display());
}

/// Compiles a C source to a library.
pub fn c_library(source: &Path, arguments: &[&str], folder: &Path) -> PathBuf {
    let out = folder.join(dll(source.file_stem().unwrap().to_str().unwrap()));
    cc(&[&["-shared", "-fPIC"], arguments].concat(), source, &out);
    out
}

/// The library of `plugins/examples/c-demo`.
pub fn c_demo(folder: &Path) -> PathBuf {
    c_library(&root().join("../examples/c-demo/demo.c"), &[], folder)
}

/// The same with other contents, for tests that must be the first to load it: tests may share a process.
pub fn other_c_demo(folder: &Path, arguments: &[&str]) -> PathBuf {
    c_library(&root().join("../examples/c-demo/demo.c"), arguments, folder)
}

/// A library of `hostile.c`.
pub fn hostile(folder: &Path, arguments: &[&str]) -> PathBuf {
    c_library(&root().join("tests/hostile.c"), arguments, folder)
}

pub fn try_load(path: &Path) -> Result<Arc<Library>, LoadError> {
    load(&Source::from(path), &Host { guarded: true, threads: 3, ..Host::default() })
}

pub fn loaded(path: &Path) -> Arc<Library> {
    try_load(path).unwrap()
}

fn find<'a>(library: &'a Library, id: &str) -> &'a AnyEntry {
    library.entries.iter().find(|entry| entry.id() == id).unwrap_or_else(|| panic!("no `{id}` in {library:?}"))
}

pub fn codec_entry(library: &Library, id: &str) -> Entry<dyn Codec> {
    let AnyEntry::Codec(entry) = find(library, id) else { panic!("`{id}` is no codec") };
    entry.clone()
}

pub fn transform_entry(library: &Library, id: &str) -> Entry<dyn LossyTransform> {
    let AnyEntry::Transform(entry) = find(library, id) else { panic!("`{id}` is no transform") };
    entry.clone()
}

pub fn eviction_entry(library: &Library, id: &str) -> Entry<dyn EvictionPolicy> {
    let AnyEntry::Eviction(entry) = find(library, id) else { panic!("`{id}` is no policy") };
    entry.clone()
}

pub fn codec(library: &Library, id: &str, settings: &Value) -> Arc<dyn Codec> {
    codec_entry(library, id).build(settings).unwrap()
}
