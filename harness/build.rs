//! Records the commit that the program is built from; it goes into every receipt.

use std::process::Command;

fn main() {
    // Whatever changes what the program does may also change whether the tree is dirty.
    for path in ["../Cargo.lock", "../core/src", "../plugins", "build.rs", "src"] {
        println!("cargo::rerun-if-changed={path}");
    }
    // Where they are depends on the checkout: a second worktree has its own. A path that does not exist would build anew every time.
    for name in ["HEAD", "logs/HEAD"] {
        if let Ok(output) = Command::new("git").args(["rev-parse", "--git-path", name]).output()
            && output.status.success()
        {
            println!("cargo::rerun-if-changed={}", String::from_utf8_lossy(&output.stdout).trim());
        }
    }
    let commit = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]).output();
    if let Ok(output) = commit
        && output.status.success()
    {
        println!("cargo::rustc-env=GEARBOX_COMMIT={}", String::from_utf8_lossy(&output.stdout).trim());
    }
}
