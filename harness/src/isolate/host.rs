//! The host's side of a worker: its process, one question at a time, and how it ended.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use gearbox_core::{Error, ErrorKind, Result};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::process::{Pid, Signal, kill_process_group};

use super::shared::{Buffer, Parts};
use super::wire::{self, Answer, Answered, Ask, Asked};
use super::{Limits, Spawn};

/// Bytes of standard error that are kept.
const TAIL: usize = 4 << 10;
/// How often it is looked whether the process still lives, in case another process holds its pipes open.
const LOOK: Duration = Duration::from_millis(200);
/// How long a process may live after it closed its pipe.
const GRACE: Duration = Duration::from_secs(1);
/// Objects that a worker remembers.
const OBJECTS: usize = 16;

/// Workers of one kind.
#[derive(Debug)]
pub struct Pool {
    how: Spawn,
    pub limits: Limits,
    idle: Mutex<Vec<Worker>>,
}

impl Pool {
    pub fn new(how: Spawn, limits: Limits) -> Self {
        Self { how, limits, idle: Mutex::new(Vec::new()) }
    }

    /// A worker for one call: an idle one, best of all one that knows the object, or a new one.
    pub fn worker(self: &Arc<Self>, object: u64) -> Result<Lent> {
        loop {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            let known = idle.iter().rposition(|worker| worker.objects.contains(&object));
            let found = known.or(idle.len().checked_sub(1)).map(|idx| idle.swap_remove(idx));
            drop(idle);
            let worker = match found {
                Some(mut worker) => {
                    // It may have been killed from outside, which is no fault of the next call.
                    if !worker.process.lives() {
                        continue;
                    }
                    worker
                }
                None => Worker::start(&self.how, &self.limits)?,
            };
            return Ok(Lent { pool: Arc::clone(self), worker: Some(worker) });
        }
    }

    fn give_back(&self, worker: Worker) {
        if worker.busy || worker.lost.is_some() || worker.cpu_ms > u64::from(self.limits.cpu_seconds) * 1000 {
            return;
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < rayon::current_num_threads().max(1) {
            idle.push(worker);
        }
    }
}

/// A worker that goes back to its pool when it is dropped, unless it failed.
#[derive(Debug)]
pub struct Lent {
    pool: Arc<Pool>,
    /// None only while it is dropped.
    worker: Option<Worker>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.pool.give_back(worker);
        }
    }
}

impl std::ops::Deref for Lent {
    type Target = Worker;

    fn deref(&self) -> &Worker {
        match &self.worker {
            Some(worker) => worker,
            None => unreachable!("only `drop` takes the worker"),
        }
    }
}

impl std::ops::DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Worker {
        match &mut self.worker {
            Some(worker) => worker,
            None => unreachable!("only `drop` takes the worker"),
        }
    }
}

/// A worker and what the host knows of it.
#[derive(Debug)]
pub struct Worker {
    process: Process,
    /// What the host writes.
    input: Buffer,
    /// What the worker writes.
    output: Buffer,
    /// Bytes of the input that the next question speaks of.
    used: usize,
    number: u64,
    /// Objects that it remembers, oldest first.
    objects: VecDeque<u64>,
    cpu_ms: u64,
    wall: Duration,
    /// Whether a call of several questions is under way.
    pub busy: bool,
    /// How it ended, if it did.
    lost: Option<ErrorKind>,
}

impl Worker {
    fn start(how: &Spawn, limits: &Limits) -> Result<Self> {
        let buffer = || Buffer::create().map_err(|error| Error::io("a shared buffer", &error));
        let (input, output) = (buffer()?, buffer()?);
        let process = Process::start(how, limits)?;
        let (input_path, output_path) = (input.path().to_path_buf(), output.path().to_path_buf());
        let wall = limits.wall();
        let objects = VecDeque::new();
        let mut worker =
            Self { process, input, output, used: 0, number: 0, objects, cpu_ms: 0, wall, busy: false, lost: None };
        let opened = worker.ask(Ask::Open { input: input_path, output: output_path });
        worker.input.opened();
        worker.output.opened();
        match opened? {
            Answer::Done => Ok(worker),
            _ => Err(worker.strange()),
        }
    }

    /// Whether it remembers an object.
    pub fn knows(&self, object: u64) -> bool {
        self.objects.contains(&object)
    }

    /// Forgets as many objects as it must to learn one more; it is to be told which.
    pub fn forget(&mut self) -> Vec<u64> {
        self.objects.drain(..self.objects.len().saturating_sub(OBJECTS - 1)).collect()
    }

    /// Notes that it remembers an object.
    pub fn learnt(&mut self, object: u64) {
        self.objects.push_back(object);
    }

    /// Writes the parts of the next question.
    pub fn put<T>(&mut self, write: impl FnOnce(&mut Parts<'_>) -> io::Result<T>) -> Result<T> {
        let mut parts = self.input.rewrite();
        let written = write(&mut parts).map_err(|error| Error::io("a shared buffer", &error))?;
        self.used = parts.used();
        Ok(written)
    }

    /// The first bytes of the output.
    pub fn output(&mut self, len: usize, most: u64) -> Result<&[u8]> {
        if len as u64 > most || self.output.follow(len).is_err() {
            return Err(self.strange());
        }
        Ok(&self.output.bytes()[..len])
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// What the plugin reports; [`ErrorKind::PluginCrashed`], [`ErrorKind::PluginTimedOut`] and [`ErrorKind::OutOfMemory`] for how the
    /// process ended.
    pub fn ask(&mut self, ask: Ask) -> Result<Answer> {
        if let Some(kind) = self.lost {
            return Err(Error::new(kind, "its process ended in an earlier call"));
        }
        self.number += 1;
        let frame = wire::frame(&Asked { number: self.number, used: std::mem::take(&mut self.used), ask })?;
        self.process.tail.clear();
        let until = Instant::now() + self.wall;
        let text = match self.process.send(&frame, until).and_then(|()| self.process.receive(until)) {
            Ok(text) => text,
            Err(lost) => return Err(self.lose(&lost)),
        };
        match serde_json::from_slice::<Answered>(&text) {
            Ok(Answered { number, cpu_ms, answer }) if number == self.number => {
                self.cpu_ms = cpu_ms;
                self.take_in(answer)
            }
            _ => Err(self.strange()),
        }
    }

    fn take_in(&mut self, answer: Answer) -> Result<Answer> {
        let Answer::Failed { kind, mut message } = answer else { return Ok(answer) };
        // After these nobody knows what state the plugin is in.
        if matches!(kind, ErrorKind::PluginPanicked | ErrorKind::WrongLength | ErrorKind::OutOfMemory) {
            self.lost = Some(kind);
            self.process.kill();
            message += &self.process.printed();
        }
        Err(Error::new(kind, message))
    }

    /// The error of an answer that no worker of ours gives.
    pub fn strange(&mut self) -> Error {
        self.lose(&Lost::Strange)
    }

    fn lose(&mut self, lost: &Lost) -> Error {
        let (kind, message) = self.process.end(lost, self.wall);
        self.lost = Some(kind);
        Error::new(kind, message + &self.process.printed())
    }
}

/// Why no answer came.
#[derive(Debug)]
enum Lost {
    /// The pipe was closed, or the process has ended.
    Closed,
    /// The time of the call is over.
    TimedOut,
    /// What came is no answer.
    Strange,
    /// The system refused to write or wait.
    Io(io::Error),
}

impl From<Errno> for Lost {
    fn from(error: Errno) -> Self {
        match error {
            Errno::PIPE => Self::Closed,
            error => Self::Io(error.into()),
        }
    }
}

/// A process with its pipes, none of which blocks. It is killed when it is dropped.
#[derive(Debug)]
struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    /// Bytes of answers that nobody has asked for yet.
    unread: Vec<u8>,
    /// None once it was closed.
    stderr: Option<ChildStderr>,
    /// The last bytes of standard error.
    tail: VecDeque<u8>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Process {
    fn start(how: &Spawn, limits: &Limits) -> Result<Self> {
        let limits = serde_json::to_string(limits).map_err(|error| Error::invalid_config(error.to_string()))?;
        let failed = |error: io::Error| Error::io(&how.program, &error).context("starting a worker");
        let mut command = Command::new(&how.program);
        command.args(&how.arguments).arg("--limits").arg(limits);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own, so that what a plugin starts is killed with it.
        let mut child = command.process_group(0).spawn().map_err(failed)?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), stderr) = pipes else { unreachable!("all pipes were asked for") };
        let process = Self { child, stdin, stdout, unread: Vec::new(), stderr, tail: VecDeque::new() };
        let fds = [process.stdin.as_fd(), process.stdout.as_fd()];
        for fd in fds.into_iter().chain(process.stderr.as_ref().map(AsFd::as_fd)) {
            ioctl_fionbio(fd, true).map_err(|error| failed(error.into()))?;
        }
        Ok(process)
    }

    fn send(&mut self, frame: &[u8], until: Instant) -> Result<(), Lost> {
        if !self.unread.is_empty() {
            return Err(Lost::Strange);
        }
        let mut left = frame;
        while !left.is_empty() {
            match rustix::io::write(&self.stdin, left) {
                Ok(written) => left = &left[written..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(true, until)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The text of the next frame.
    fn receive(&mut self, until: Instant) -> Result<Vec<u8>, Lost> {
        loop {
            let mut end = wire::HEAD;
            if let Some(head) = self.unread.first_chunk::<{ wire::HEAD }>() {
                end += wire::text_len(*head).ok_or(Lost::Strange)?;
                if self.unread.len() >= end {
                    let text = self.unread[wire::HEAD..end].to_vec();
                    self.unread.drain(..end);
                    return Ok(text);
                }
            }
            // Not all that a length claims at once: it is only a claim.
            let missing = end.saturating_sub(self.unread.len());
            self.unread.reserve(missing.min(self.unread.len()).max(4 << 10));
            self.wait(false, until)?;
            match rustix::io::read(&self.stdout, spare_capacity(&mut self.unread)) {
                Ok(0) => return Err(Lost::Closed),
                Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until the pipe to the worker takes bytes, or the one from it has some; reads standard error meanwhile.
    fn wait(&mut self, writing: bool, until: Instant) -> Result<(), Lost> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Lost::TimedOut);
            }
            let main = if writing {
                PollFd::new(&self.stdin, PollFlags::OUT)
            } else {
                PollFd::new(&self.stdout, PollFlags::IN)
            };
            let mut fds = vec![main];
            fds.extend(self.stderr.as_ref().map(|stderr| PollFd::new(stderr, PollFlags::IN)));
            let timeout = left.min(LOOK);
            let timeout = Timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() };
            let ready = match poll(&mut fds, Some(&timeout)) {
                Err(Errno::INTR) => continue,
                ready => ready?,
            };
            let main = !fds[0].revents().is_empty();
            if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) {
                self.listen();
            }
            if main {
                return Ok(());
            }
            if ready == 0 && !self.lives() {
                return Err(Lost::Closed);
            }
        }
    }

    fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Reads what standard error has, without waiting.
    fn listen(&mut self) {
        let mut bytes = [0; 4096];
        while let Some(stderr) = &mut self.stderr {
            match stderr.read(&mut bytes) {
                Ok(0) => self.stderr = None,
                Ok(len) => {
                    self.tail.extend(&bytes[..len]);
                    self.tail.drain(..self.tail.len().saturating_sub(TAIL));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.stderr = None,
            }
        }
    }

    /// What was printed to standard error since the last question, as the end of a message.
    fn printed(&mut self) -> String {
        self.listen();
        let text = String::from_utf8_lossy(self.tail.make_contiguous()).into_owned();
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        if lines.is_empty() { String::new() } else { format!("; it printed: {}", lines.join(" | ")) }
    }

    /// Kills the process and what it started.
    fn kill(&mut self) -> Option<ExitStatus> {
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.kill();
        self.child.wait().ok()
    }

    /// Ends the process, if it did not end itself, and says how it ended.
    fn end(&mut self, lost: &Lost, wall: Duration) -> (ErrorKind, String) {
        match lost {
            Lost::TimedOut => {
                self.kill();
                (ErrorKind::PluginTimedOut, format!("no answer within {} s (`wall_seconds`)", wall.as_secs_f64()))
            }
            Lost::Strange => {
                self.kill();
                (ErrorKind::PluginCrashed("bad-reply"), "what it sent is not the answer of a worker".to_owned())
            }
            Lost::Io(error) => {
                self.kill();
                (ErrorKind::Io, format!("the pipe to its process: {error}"))
            }
            Lost::Closed => {
                let until = Instant::now() + GRACE;
                while self.lives() && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let ended = !self.lives();
                let status = self.kill();
                self.listen();
                match status {
                    Some(status) if ended => self.judge(status),
                    _ => (ErrorKind::PluginCrashed("bad-reply"), "it closed the pipe of its process".to_owned()),
                }
            }
        }
    }

    /// What the status of a process that ended on its own says.
    fn judge(&mut self, status: ExitStatus) -> (ErrorKind, String) {
        let Some(signal) = status.signal() else {
            return (ErrorKind::PluginCrashed("exit"), format!("its process ended with {status}"));
        };
        let name = SIGNALS.iter().find(|(known, _)| known.as_raw() == signal).map_or("signal", |(_, name)| name);
        if name == "SIGXCPU" {
            return (ErrorKind::PluginTimedOut, "its process used up its processor time (`cpu_seconds`)".to_owned());
        }
        if name == "SIGXFSZ" {
            return (ErrorKind::WrongLength, "its process wrote too large a file (`output_bytes`)".to_owned());
        }
        let printed = String::from_utf8_lossy(self.tail.make_contiguous());
        if name == "SIGABRT" && NO_MEMORY.iter().any(|text| printed.contains(text)) {
            return (ErrorKind::OutOfMemory, "an allocation failed (`address_space_bytes`)".to_owned());
        }
        (ErrorKind::PluginCrashed(name), format!("its process was ended by signal {signal}, {name}"))
    }
}

/// What the standard libraries of Rust and C++ print before they abort for want of memory.
const NO_MEMORY: [&str; 2] = ["memory allocation of ", "std::bad_alloc"];

/// Signals that end a process.
const SIGNALS: [(Signal, &str); 15] = [
    (Signal::SEGV, "SIGSEGV"),
    (Signal::ABORT, "SIGABRT"),
    (Signal::BUS, "SIGBUS"),
    (Signal::ILL, "SIGILL"),
    (Signal::FPE, "SIGFPE"),
    (Signal::KILL, "SIGKILL"),
    (Signal::TERM, "SIGTERM"),
    (Signal::TRAP, "SIGTRAP"),
    (Signal::SYS, "SIGSYS"),
    (Signal::PIPE, "SIGPIPE"),
    (Signal::XCPU, "SIGXCPU"),
    (Signal::XFSZ, "SIGXFSZ"),
    (Signal::INT, "SIGINT"),
    (Signal::HUP, "SIGHUP"),
    (Signal::QUIT, "SIGQUIT"),
];
