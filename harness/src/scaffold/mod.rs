//! Projects for new plugins: small, real, and ready for `gearbox plugin check`.
//!
//! Templates are files beside this one. `@NAME@` and its like are the only marks in them, and stand only where any text may stand, so that
//! the templates are valid Rust and C as they are.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind as IoKind, Write as _};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use gearbox_core::{Error, Kind, Result};

/// What a new plugin is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Language {
    /// A crate with `gearbox_abi::export_plugins!`.
    Rust,
    /// One file and `gearbox_plugin.h`.
    C,
}

/// The most characters of a name: it becomes part of file names, and of lines in tables.
const LONGEST: usize = 64;

/// Writes a project for a plugin called `name` into a folder, which is made if it does not exist, and returns the files.
///
/// The project builds without warnings, and passes the conformance kit as it is.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if `name` is not kebab-case or is a built-in's, or if the folder is
/// not empty; [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if it cannot be written. Nothing is left behind then.
///
/// # Examples
/// ```
/// use gearbox::scaffold::{self, Language};
/// use gearbox_core::Kind;
///
/// let parent = tempfile::tempdir().unwrap();
/// let folder = parent.path().join("token-runs");
/// let files = scaffold::create(&folder, "token-runs", Kind::Codec, Language::C).unwrap();
/// assert!(files.contains(&folder.join("token-runs.c")));
/// assert!(scaffold::create(&folder, "token-runs", Kind::Codec, Language::C).is_err(), "it is not empty now");
/// ```
pub fn create(folder: &Path, name: &str, kind: Kind, language: Language) -> Result<Vec<PathBuf>> {
    check_name(name)?;
    let is_new = check_folder(folder)?;
    let mut made = Made::default();
    if is_new {
        fs::create_dir(folder).map_err(|error| Error::io(folder, &error))?;
        made.folders.push(folder.to_owned());
    }
    for (path, text) in files(name, kind, language) {
        made.write(folder, &path, &text)?;
    }
    Ok(made.keep())
}

/// A kebab-case id that no built-in has.
fn check_name(name: &str) -> Result<()> {
    let is_word =
        |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    if name.len() > LONGEST || !name.split('-').all(is_word) {
        return Err(Error::invalid_input(format!(
            "expected a name of at most {LONGEST} characters, of a to z, 0 to 9 and single `-` between them, got `{name}`"
        )));
    }
    match gearbox_plugins::registry()?.get(name) {
        Ok(entry) => Err(Error::invalid_input(format!(
            "expected a new name, got `{name}`, which is a built-in {}; ids are never given twice",
            entry.kind()
        ))),
        Err(_) => Ok(()),
    }
}

/// Whether the folder has to be made; it is empty if not.
fn check_folder(folder: &Path) -> Result<bool> {
    match fs::read_dir(folder) {
        Ok(mut entries) => match entries.next() {
            None => Ok(false),
            Some(_) => Err(Error::invalid_input(format!("`{}`: expected an empty folder or none", folder.display()))),
        },
        Err(error) if error.kind() == IoKind::NotFound => Ok(true),
        Err(error) if error.kind() == IoKind::NotADirectory => {
            Err(Error::invalid_input(format!("`{}`: expected an empty folder or none, got a file", folder.display())))
        }
        Err(error) => Err(Error::io(folder, &error)),
    }
}

/// What was written so far; dropping it removes that again.
#[derive(Default)]
struct Made {
    /// Outermost first.
    folders: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Made {
    fn write(&mut self, folder: &Path, path: &str, text: &str) -> Result<()> {
        let path = folder.join(path);
        if let Some(parent) = path.parent().filter(|parent| !parent.is_dir()) {
            fs::create_dir(parent).map_err(|error| Error::io(parent, &error))?;
            self.folders.push(parent.to_owned());
        }
        // A file that appeared since the folder was found empty is not ours to replace.
        let mut file =
            OpenOptions::new().write(true).create_new(true).open(&path).map_err(|error| Error::io(&path, &error))?;
        self.files.push(path);
        let written = file.write_all(text.as_bytes());
        written.map_err(|error| Error::io(folder, &error))
    }

    fn keep(mut self) -> Vec<PathBuf> {
        self.folders.clear();
        std::mem::take(&mut self.files)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        // What cannot be removed stays: the error that led here is the one to report.
        for file in &self.files {
            let _ = fs::remove_file(file);
        }
        for folder in self.folders.iter().rev() {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Paths within the project, and contents.
fn files(name: &str, kind: Kind, language: Language) -> Vec<(String, String)> {
    let fill = |text: &str| text.replace("@NAME@", name);
    let readme = readme(name, kind, language);
    match language {
        Language::Rust => vec![
            ("Cargo.toml".to_owned(), fill(&manifest(kind))),
            ("src/lib.rs".to_owned(), fill(rust_source(kind))),
            ("README.md".to_owned(), readme),
            (".gitignore".to_owned(), include_str!("templates/rust/gitignore").to_owned()),
        ],
        Language::C => vec![
            (format!("{name}.c"), fill(&c_source(kind))),
            ("gearbox_plugin.h".to_owned(), include_str!("../../../plugins/abi/include/gearbox_plugin.h").to_owned()),
            ("Makefile".to_owned(), fill(include_str!("templates/c/Makefile.in"))),
            ("README.md".to_owned(), readme),
            (".gitignore".to_owned(), include_str!("templates/c/gitignore").to_owned()),
        ],
    }
}

fn rust_source(kind: Kind) -> &'static str {
    match kind {
        Kind::Codec => include_str!("templates/rust/codec.rs"),
        Kind::Transform => include_str!("templates/rust/transform.rs"),
        Kind::Eviction => include_str!("templates/rust/eviction.rs"),
    }
}

/// The same beginning and end for all kinds.
fn c_source(kind: Kind) -> String {
    let (what, middle) = match kind {
        Kind::Codec => (
            "a codec: differences between tokens, with runs of zeros as one count.",
            include_str!("templates/c/codec.c"),
        ),
        Kind::Transform => {
            ("an exact transform: differences of the bits between tokens.", include_str!("templates/c/transform.c"))
        }
        Kind::Eviction => {
            ("an eviction policy: the first tokens and the last ones stay.", include_str!("templates/c/eviction.c"))
        }
    };
    [&include_str!("templates/c/head.c").replace("@WHAT@", what), middle, include_str!("templates/c/tail.c")].concat()
}

/// `Cargo.toml`, which finds the crates of Gearbox where this program was built, or else by their version.
fn manifest(kind: Kind) -> String {
    let checkout =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().filter(|root| root.join("plugins/abi/Cargo.toml").is_file());
    let gearbox = match checkout {
        Some(root) => format!(
            "# The checkout that this project was made with; elsewhere, `{{ git = \"…\", rev = \"…\" }}` or a version instead of `path`.\n\
             gearbox-abi = {{ path = {} }}\ngearbox-core = {{ path = {} }}",
            quoted(&root.join("plugins/abi")),
            quoted(&root.join("core"))
        ),
        None => format!(
            "# To use a checkout: `{{ path = \"…/plugins/abi\" }}` and `{{ path = \"…/core\" }}`, or `git` and `rev`.\n\
             gearbox-abi = \"{0}\"\ngearbox-core = \"{0}\"",
            env!("CARGO_PKG_VERSION")
        ),
    };
    let half = match kind {
        Kind::Transform => "half = { version = \"2.7\", default-features = false, features = [\"std\"] }\n",
        Kind::Codec | Kind::Eviction => "",
    };
    include_str!("templates/rust/Cargo.toml.in").replace("@GEARBOX@", &gearbox).replace("@HALF@", half)
}

/// A path as a TOML string; JSON's escapes are among TOML's.
fn quoted(path: &Path) -> String {
    serde_json::Value::from(path.to_string_lossy()).to_string()
}

fn readme(name: &str, kind: Kind, language: Language) -> String {
    let about = match (kind, language) {
        (Kind::Codec, _) => {
            "A codec for Gearbox: differences between tokens, with runs of zeros as one count. Good for integer codes that stay the same from \
             token to token, bad for floats."
        }
        (Kind::Transform, Language::Rust) => {
            "A transform for Gearbox: each channel without its mean over a group of tokens, so that a quantiser behind it spends its range on \
             what varies."
        }
        (Kind::Transform, Language::C) => "An exact transform for Gearbox: differences of the bits between tokens.",
        (Kind::Eviction, _) => "An eviction policy for Gearbox: the first tokens and the last ones stay.",
    };
    let pipeline = |route: &str| format!("--pipeline '{{\"routes\": [{{{route}}}]}}'");
    let behind =
        |transforms: &str| pipeline(&format!("\"transforms\": [{transforms}], \"codec\": {{\"id\": \"zstd\"}}"));
    let pipelines = match (kind, language) {
        (Kind::Codec, _) => format!("--pipeline {name} --pipeline zstd"),
        (Kind::Transform, Language::Rust) => {
            let quant = "{\"id\": \"quant\"}";
            format!("{} {}", behind(&format!("{{\"id\": \"{name}\"}}, {quant}")), behind(quant))
        }
        (Kind::Transform, Language::C) => format!("{} --pipeline zstd", behind(&format!("{{\"id\": \"{name}\"}}"))),
        (Kind::Eviction, _) => pipeline(&format!("\"evict\": {{\"id\": \"{name}\"}}, \"codec\": {{\"id\": \"zstd\"}}")),
    };
    let note = match kind {
        Kind::Eviction => {
            "\n\nTwo of these are not there yet for eviction policies: the kit has no suite for them and says so, and a sweep, whose rows are containers,\n\
             lists the pipeline as not legal, since containers cannot hold evicted caches."
        }
        Kind::Codec | Kind::Transform => "",
    };
    let (build, library, place) = match language {
        Language::Rust => (
            "cargo build --release",
            format!(
                "target/release/{}gearbox_plugin_{}{}",
                std::env::consts::DLL_PREFIX,
                name.replace('-', "_"),
                std::env::consts::DLL_SUFFIX
            ),
            "`src/lib.rs` is the whole plugin; `cargo test` runs its own test.",
        ),
        Language::C => {
            ("make", format!("./lib{name}.so"), "`@NAME@.c` is the whole plugin; `gearbox_plugin.h` is the contract.")
        }
    };
    include_str!("templates/README.md.in")
        .replace("@ABOUT@", about)
        .replace("@BUILD@", build)
        .replace("@LIBRARY@", &library)
        .replace("@PIPELINES@", &pipelines)
        .replace("@NOTE@", note)
        .replace("@WHERE@", place)
        .replace("@NAME@", name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use gearbox_core::ErrorKind;
    use tempfile::tempdir;

    use super::*;

    const KINDS: [Kind; 3] = [Kind::Codec, Kind::Transform, Kind::Eviction];

    fn refused(folder: &Path, name: &str) -> (ErrorKind, String) {
        let error = create(folder, name, Kind::Codec, Language::Rust).unwrap_err();
        (error.kind(), error.to_string())
    }

    #[test]
    fn every_mark_is_filled_in() {
        for kind in KINDS {
            for language in [Language::Rust, Language::C] {
                let parent = tempdir().unwrap();
                let made = create(&parent.path().join("new"), "new-one", kind, language).unwrap();
                for path in made {
                    let text = fs::read_to_string(&path).unwrap();
                    let marks =
                        ["NAME", "WHAT", "GEARBOX", "HALF", "ABOUT", "BUILD", "LIBRARY", "PIPELINES", "NOTE", "WHERE"];
                    let left = marks.iter().find(|mark| text.contains(&format!("@{mark}@")));
                    assert_eq!((left, text.ends_with('\n')), (None, true), "{}:\n{text}", path.display());
                }
            }
        }
    }

    #[test]
    fn empty_folder_is_used_and_what_is_written_is_returned() {
        let folder = tempdir().unwrap();
        let made = create(folder.path(), "a1", Kind::Codec, Language::C).unwrap();
        let found = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        assert_eq!(made.into_iter().collect::<BTreeSet<_>>(), found.collect());
    }

    #[test]
    fn names_are_kebab_case_and_new() {
        let parent = tempdir().unwrap();
        let folder = parent.path().join("new");
        let long = "a".repeat(65);
        for name in ["", "-", "a-", "-a", "a--b", "A", "a_b", "a b", "../a", "ä", &long] {
            let (kind, text) = refused(&folder, name);
            assert_eq!(kind, ErrorKind::InvalidInput);
            assert!(text.contains("got `") && text.contains("a to z"), "{text}");
        }
        let (kind, text) = refused(&folder, "zstd");
        assert_eq!(kind, ErrorKind::InvalidInput);
        assert!(text.starts_with("expected a new name, got `zstd`, which is a built-in codec"), "{text}");
        assert!(!folder.exists());
    }

    #[test]
    fn folders_with_something_in_them_and_files_are_refused() {
        let parent = tempdir().unwrap();
        let file = parent.path().join("file");
        fs::write(&file, "mine").unwrap();
        let (kind, text) = refused(parent.path(), "new");
        assert_eq!(kind, ErrorKind::InvalidInput);
        assert!(text.ends_with("expected an empty folder or none"), "{text}");
        assert!(refused(&file, "new").1.ends_with("expected an empty folder or none, got a file"));
        assert_eq!(refused(&parent.path().join("no/new"), "new").0, ErrorKind::Io);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn failure_leaves_nothing() {
        let parent = tempdir().unwrap();
        let folder = parent.path().join("new");
        fs::create_dir(&folder).unwrap();
        let mut made = Made::default();
        made.folders.push(folder.clone());
        made.write(&folder, "src/lib.rs", "text").unwrap();
        made.write(&folder, "src/lib.rs", "again").unwrap_err();
        drop(made);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
