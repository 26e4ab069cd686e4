//! Records the commit that the program is built from; it goes into every receipt.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=../.git/HEAD");
    println!("cargo::rerun-if-changed=../.git/logs/HEAD");
    let commit = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]).output();
    if let Ok(output) = commit
        && output.status.success()
    {
        println!("cargo::rustc-env=GEARBOX_COMMIT={}", String::from_utf8_lossy(&output.stdout).trim());
    }
}
