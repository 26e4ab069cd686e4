//! The `gearbox` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    gearbox::cli::main()
}
