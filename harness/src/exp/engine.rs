//! Inference engines as programs: started, watched, and ended if they hang.

use std::fs::File;
use std::io::{IsTerminal, Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use gearbox_core::{Error, Result};
use rustix::process::{Pid, Signal, kill_process_group};

/// Bytes of each output that are kept.
const KEPT: u64 = 16 << 20;
/// How often it is looked whether the engine has ended.
const LOOK: Duration = Duration::from_millis(20);

/// How long an engine may take.
#[derive(Clone, Copy, Debug, Args)]
pub struct TimeoutArgs {
    /// End an engine that runs longer; 0 waits for ever
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
}

/// A program that runs a model, or a subcommand of this program.
#[derive(Clone, Debug)]
pub(super) struct Engine {
    program: PathBuf,
    subcommand: Option<&'static str>,
    timeout: Option<Duration>,
}

/// How an engine ended, and what it printed.
#[derive(Debug)]
pub(super) struct Ended {
    /// Exit status; the negative signal if one ended it, as the reference has it.
    pub code: i32,
    timed_out: Option<Duration>,
    pub stdout: String,
    pub stderr: String,
}

impl Engine {
    /// An external program, or a subcommand of this one.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if the program does not exist, or if this one does not know where it is.
    pub fn new(external: Option<&Path>, subcommand: &'static str, timeout: TimeoutArgs) -> Result<Self> {
        let timeout = (timeout.timeout > 0).then(|| Duration::from_secs(timeout.timeout));
        if let Some(program) = external {
            // A bare name is looked up when it is started.
            if program.components().count() > 1 {
                std::fs::metadata(program).map_err(|error| Error::io(program, &error))?;
            }
            return Ok(Self { program: program.to_path_buf(), subcommand: None, timeout });
        }
        let program = std::env::current_exe().map_err(|error| Error::io("this program", &error))?;
        Ok(Self { program, subcommand: Some(subcommand), timeout })
    }

    /// The program, before its arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(self.subcommand);
        command
    }

    /// Runs a command to its end, or to the end of its time.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if it cannot be started; how it ends is in the result.
    pub fn run(&self, mut command: Command) -> Result<Ended> {
        let failed = |error: std::io::Error| Error::io(&self.program, &error);
        let [mut stdout, mut stderr] = [tempfile::tempfile().map_err(failed)?, tempfile::tempfile().map_err(failed)?];
        command.stdin(Stdio::null());
        command.stdout(stdout.try_clone().map_err(failed)?).stderr(stderr.try_clone().map_err(failed)?);
        // At a terminal an interrupt must reach the engine too; elsewhere what the engine started must end with it.
        let grouped = !std::io::stdin().is_terminal();
        if grouped {
            command.process_group(0);
        }
        let mut child = command.spawn().map_err(failed)?;
        let (status, timed_out) = self.wait(&mut child, grouped).map_err(failed)?;
        Ok(Ended {
            code: status.code().unwrap_or_else(|| -status.signal().unwrap_or(0)),
            timed_out,
            stdout: text(&mut stdout).map_err(failed)?,
            stderr: text(&mut stderr).map_err(failed)?,
        })
    }

    fn wait(&self, child: &mut Child, grouped: bool) -> std::io::Result<(ExitStatus, Option<Duration>)> {
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok((status, None));
            }
            if let Some(timeout) = self.timeout.filter(|timeout| start.elapsed() >= *timeout) {
                if grouped {
                    // It may have ended by itself meanwhile.
                    let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
                } else {
                    child.kill()?;
                }
                return Ok((child.wait()?, Some(timeout)));
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Ended {
    /// Why the run does not count, if it does not: how it ended, with the last line that it printed, or that speaks of an error.
    pub fn error(&self) -> Option<String> {
        let how = match (self.timed_out, self.code) {
            (Some(timeout), _) => format!("took longer than {} s and was ended", timeout.as_secs()),
            (None, 0) => return None,
            (None, code) if code < 0 => format!("ended by signal {}", -code),
            (None, code) => format!("ended with exit status {code}"),
        };
        let lines =
            || self.stdout.lines().chain(self.stderr.lines()).rev().map(str::trim).filter(|line| !line.is_empty());
        let error = lines().find(|line| line.to_lowercase().contains("error"));
        Some(match error.or_else(|| lines().next()) {
            Some(line) => format!("the engine {how}: {line}"),
            None => format!("the engine {how}"),
        })
    }
}

/// What was written to a file; bytes that are no UTF-8 are replaced.
fn text(file: &mut File) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(KEPT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str, timeout: u64) -> Ended {
        let engine = Engine::new(Some(Path::new("/bin/sh")), "", TimeoutArgs { timeout }).unwrap();
        let mut command = engine.command();
        command.args(["-c", script]);
        engine.run(command).unwrap()
    }

    #[test]
    fn every_way_to_end_is_named() {
        let ended = run("echo out; echo err >&2", 60);
        assert_eq!(
            (ended.code, ended.error(), ended.stdout.as_str(), ended.stderr.as_str()),
            (0, None, "out\n", "err\n")
        );
        let ended = run("echo bad model >&2; echo; exit 3", 60);
        assert_eq!(
            run("echo 'Error: x' >&2; echo see >&2; exit 2", 60).error().unwrap(),
            "the engine ended with exit status 2: Error: x"
        );
        assert_eq!(ended.error().unwrap(), "the engine ended with exit status 3: bad model");
        let ended = run("kill -SEGV $$", 60);
        assert_eq!((ended.code, ended.error().unwrap().as_str()), (-11, "the engine ended by signal 11"));
        assert_eq!(run("printf '\\377x'", 60).stdout, "\u{FFFD}x");
    }

    #[test]
    fn engine_that_hangs_is_ended_with_what_it_started() {
        let began = Instant::now();
        let ended = run("sleep 600 & echo $!; wait", 1);
        assert!(began.elapsed() < Duration::from_mins(1));
        assert!(ended.error().unwrap().starts_with("the engine took longer than 1 s and was ended"));
        if !std::io::stdin().is_terminal() {
            let child = ended.stdout.trim();
            // A process that is gone, or that waits for its parent to notice.
            let gone = (0..100).any(|_| {
                std::thread::sleep(LOOK);
                let state = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
                state.is_empty() || state.contains(") Z ")
            });
            assert!(gone, "{child} still runs");
        }
    }

    #[test]
    fn program_that_does_not_exist_is_an_error() {
        let engine = |name: &str| Engine::new(Some(Path::new(name)), "", TimeoutArgs { timeout: 1 });
        assert!(engine("/no/such/engine").unwrap_err().to_string().starts_with("`/no/such/engine`: "));
        let engine = engine("no-such-engine").unwrap();
        assert!(engine.run(engine.command()).unwrap_err().to_string().starts_with("`no-such-engine`: "));
    }
}
