//! Records the commit that the program is built from; it goes into every receipt.

use std::process::Command;

fn main() {
    // Whatever changes what the program does may also change whether the tree is dirty.
    for path in ["../.git/HEAD", "../.git/logs/HEAD", "../Cargo.lock", "../core/src", "../plugins", "build.rs", "src"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let commit = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]).output();
    if let Ok(output) = commit
        && output.status.success()
    {
        println!("cargo::rustc-env=GEARBOX_COMMIT={}", String::from_utf8_lossy(&output.stdout).trim());
    }
}
