//! A worker that serves the built-ins and the plugins of the tests.

mod plugins;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--limits").skip(1);
    let limits = serde_json::from_str(&arguments.next().unwrap()).unwrap();
    let failing = std::env::args().any(|argument| argument == "--fail");
    let load = || if failing { panic!("as the test asked, at load") } else { plugins::registry() };
    match gearbox::isolate::serve(&limits, load) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
