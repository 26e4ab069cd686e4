//! Every way in which loading can fail, and what is loaded once.

// The reasons are those of the system's loader.
#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use gearbox_abi::{Host, LoadErrorKind, Source, load, load_all};
use support::{c_demo, example, hostile, loaded, other_c_demo, rust_demo, try_load};
use tempfile::tempdir;

/// Expects a kind, and a part of the message.
fn fails(path: &Path, kind: LoadErrorKind, part: &str) {
    let error = try_load(path).err().unwrap_or_else(|| panic!("loaded, expected {kind:?}: {part}"));
    assert_eq!(error.kind, kind, "{error}");
    assert!(error.message.contains(part), "{error}");
    assert!(!error.message.contains('\n') && error.message.len() < 300, "{error}");
}

#[test]
fn missing_files_folders_and_other_files_are_refused() {
    let folder = tempdir().unwrap();
    fails(&folder.path().join("none.so"), LoadErrorKind::NotFound, "No such file");
    fails(folder.path(), LoadErrorKind::NotALibrary, "expected a shared library, got a folder");
    let text = folder.path().join("text.so");
    fs::write(&text, "not a library, but long enough for a header of one, which has to have 64 bytes or more").unwrap();
    fails(&text, LoadErrorKind::NotALibrary, "not loaded: invalid ELF header");
    fs::write(&text, "").unwrap();
    fails(&text, LoadErrorKind::NotALibrary, "not loaded: file too short");
    let source = folder.path().join("other.c");
    fs::write(&source, "int other(void);\nint other(void) { return 7; }\n").unwrap();
    let other = support::c_library(&source, &[], folder.path());
    fails(&other, LoadErrorKind::NoEntryPoint, "exports neither `gearbox_plugin_v1` (C) nor");
    fs::write(&source, "int missing(void);\nint other(void);\nint other(void) { return missing(); }\n").unwrap();
    let other = support::c_library(&source, &["-Wl,-z,now"], tempdir().unwrap().keep().as_path());
    fails(&other, LoadErrorKind::NotALibrary, "undefined symbol: missing");
    let _ = fs::remove_dir_all(other.parent().unwrap());
}

#[test]
fn other_versions_are_refused_with_both_numbers() {
    let folder = tempdir().unwrap();
    fails(
        &hostile(folder.path(), &["-DMAJOR=3"]),
        LoadErrorKind::WrongAbi,
        "version 3.9 of the plugin ABI, this program has 1.0",
    );
    let folder = tempdir().unwrap();
    let later = hostile(folder.path(), &["-DENTRY=gearbox_plugin_v2"]);
    fails(&later, LoadErrorKind::WrongAbi, "version 2 of the plugin ABI, this program has 1.0");
    fails(&example("future"), LoadErrorKind::WrongAbi, "version 2.3 of the plugin ABI, this program has 1.0");
}

#[test]
fn a_newer_minor_version_is_accepted() {
    let folder = tempdir().unwrap();
    let later = loaded(&hostile(folder.path(), &["-DSIZE=sizeof(gearbox_plugin)+8"]));
    assert_eq!((later.version, later.entries.len()), ((1, 9), 3));
}

#[test]
fn other_layouts_are_refused_with_the_difference_in_the_details() {
    let skewed = example("skewed");
    fails(&skewed, LoadErrorKind::LayoutMismatch, "its structs are laid out differently");
    let details = try_load(&skewed).unwrap_err().details.unwrap();
    assert!(details.contains("Library") && details.lines().count() > 5, "{details}");
}

#[test]
fn what_a_library_says_about_its_plugins_is_checked() {
    let cases: [(&[&str], LoadErrorKind, &str); 9] = [
        (&["-DNULL_LIBRARY"], LoadErrorKind::EntryFailed, "its entry point returned null"),
        (&["-DSIZE=8"], LoadErrorKind::BadPlugin, "plugin 0: its `gearbox_plugin` is null or shorter"),
        (
            &["-DID=\"Bad_Id\""],
            LoadErrorKind::BadPlugin,
            "expected a kebab-case id such as `delta-varint`, got `Bad_Id`",
        ),
        (&["-DID=\"\\xFF\""], LoadErrorKind::BadPlugin, "plugin 0: id: expected UTF-8, got byte 0xff at 0"),
        (&["-DSUMMARY=\"a\\xFF\""], LoadErrorKind::BadPlugin, "`hostile`: summary: expected UTF-8, got byte 0xff at 1"),
        (&["-DSCHEMA=\"{\""], LoadErrorKind::BadPlugin, "`hostile`: schema: expected JSON, got EOF"),
        (&["-DSCHEMA=\"7\""], LoadErrorKind::BadPlugin, "`hostile`: schema: expected a JSON object, got 7"),
        (&["-DNO_ENCODE"], LoadErrorKind::BadPlugin, "`hostile`: its function `max_encoded_len` is null"),
        (&["-DTWICE"], LoadErrorKind::BadPlugin, "two of its plugins have the id `hostile`"),
    ];
    for (arguments, kind, part) in cases {
        let folder = tempdir().unwrap();
        fails(&hostile(folder.path(), arguments), kind, part);
    }
    for (kind, part) in
        [("-DKIND=1", "the table of its transform functions is null"), ("-DKIND=7", "expected kind 0, 1 or 2, got 7")]
    {
        let folder = tempdir().unwrap();
        fails(&hostile(folder.path(), &[kind]), LoadErrorKind::BadPlugin, part);
    }
}

#[test]
fn what_everyone_can_write_is_refused_unless_allowed() {
    let folder = tempdir().unwrap();
    let inner = folder.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let library = c_demo(&inner);
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    mode(&library, 0o666);
    fails(&library, LoadErrorKind::Insecure, "can be written by every user (mode 666)");
    mode(&library, 0o644);
    for bits in [0o777, 0o1777] {
        mode(&inner, bits);
        fails(&library, LoadErrorKind::Insecure, "can be written by every user");
    }
    let error = load_all(&[inner.clone().into()], &Host::default()).unwrap_err();
    assert_eq!(error.kind, LoadErrorKind::Insecure);
    mode(&inner, 0o755);
    mode(folder.path(), 0o777);
    fails(&library, LoadErrorKind::Insecure, "(mode 777)");
    let host = Host { allow_insecure: true, ..Host::default() };
    assert_eq!(load(&library.into(), &host).unwrap().entries.len(), 2);
}

#[test]
fn pins_are_compared_before_anything_runs() {
    let folder = tempdir().unwrap();
    let path = c_demo(folder.path());
    let pinned = |sha256: &str| Source { path: path.clone(), sha256: Some(sha256.to_owned()) };
    let wrong = "0".repeat(64);
    let error = load(&pinned(&wrong), &Host::default()).unwrap_err();
    assert_eq!(error.kind, LoadErrorKind::PinMismatch);
    assert!(error.message.starts_with(&format!("expected the SHA-256 {wrong}, got ")), "{error}");
    let library = loaded(&path);
    let digest = library.sha256().unwrap();
    assert_eq!(digest.len(), 64);
    load(&pinned(&digest.to_uppercase()), &Host::default()).unwrap();
    assert_eq!(load(&pinned(&wrong), &Host::default()).unwrap_err().kind, LoadErrorKind::PinMismatch);
}

#[test]
fn the_same_library_is_loaded_once() {
    let folder = tempdir().unwrap();
    let first = other_c_demo(folder.path(), &["-O0"]);
    let (link, copy) = (folder.path().join("link.so"), folder.path().join("copy.so"));
    std::os::unix::fs::symlink(&first, &link).unwrap();
    fs::copy(&first, &copy).unwrap();
    fs::write(folder.path().join("readme.txt"), "not looked at").unwrap();
    let sources = [folder.path().into(), first.clone().into(), link.into(), copy.into()];
    let libraries = load_all(&sources, &Host::default()).unwrap();
    assert_eq!(libraries.len(), 1);
    assert!(Arc::ptr_eq(&libraries[0], &loaded(&first)));
    // Another file under a path that is in use.
    fs::remove_file(&first).unwrap();
    fs::remove_file(folder.path().join("copy.so")).unwrap();
    let path = libraries[0].path.clone();
    fs::copy(rust_demo(), &path).unwrap();
    fails(&path, LoadErrorKind::NotALibrary, "has changed since this process loaded it");
}
