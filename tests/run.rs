//! Running the real `gearbox` program.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use assert_cmd::Command;

/// The workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The bundled sample dump.
pub fn sample() -> PathBuf {
    root().join("tests/data/sample")
}

/// Real dumps and reference outputs that are not part of the repository, where they lie beside it.
pub fn shared() -> Option<PathBuf> {
    let path = std::env::var_os("GEARBOX_SHARED").map_or_else(|| root().join("../shared"), PathBuf::from);
    let found = path.join("golden").is_dir().then_some(path);
    if found.is_none() {
        eprintln!("skipped: neither ../shared nor GEARBOX_SHARED holds the reference's outputs");
    }
    found
}

/// The program: the one that `GEARBOX_PROGRAM` names, as `tests/run` built it, else built once in the profile of the tests.
pub fn gearbox() -> Command {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        if let Some(program) = std::env::var_os("GEARBOX_PROGRAM") {
            return program.into();
        }
        let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
        let build = std::process::Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--locked", "--workspace", "--bin", "gearbox", "--profile", profile])
            .current_dir(root())
            .status();
        assert!(build.unwrap().success(), "the program does not build");
        assert_cmd::cargo::cargo_bin("gearbox")
    });
    let mut command = Command::new(program);
    command.current_dir(root()).env_remove("RUST_LOG");
    command
}

/// Runs a command and checks its exit status.
pub fn run(arguments: &[&str], status: i32) -> Output {
    let output = gearbox().args(arguments).output().unwrap();
    let text = format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(status), "gearbox {}\n{text}", arguments.join(" "));
    assert!(!text.contains("panicked"), "gearbox {}\n{text}", arguments.join(" "));
    output
}

/// Standard output of a command that must succeed.
pub fn stdout(arguments: &[&str]) -> String {
    String::from_utf8(run(arguments, 0).stdout).unwrap()
}

/// JSON of a command that must succeed.
pub fn json(arguments: &[&str]) -> serde_json::Value {
    serde_json::from_str(&stdout(&[arguments, &["--json"]].concat())).unwrap()
}

/// Standard error of a command that must end with this status.
pub fn stderr(arguments: &[&str], status: i32) -> String {
    String::from_utf8(run(arguments, status).stderr).unwrap()
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Builds a library with plugins of a C source of the workspace.
pub fn c_library(source: &str, flags: &[&str], out: &Path) {
    let mut compiler = std::process::Command::new("cc");
    compiler.args(["-std=c11", "-O1", "-shared", "-fPIC", "-I"]).arg(root().join("plugins/abi/include"));
    let status = compiler.args(flags).arg(root().join(source)).arg("-o").arg(out).status();
    assert!(status.unwrap().success(), "{source}");
}
