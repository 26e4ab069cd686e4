//! The worker: a process that serves plugins to the process that started it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use gearbox_core::{
    AnyEntry, AttentionStep, CacheView, ChunkMut, Codec, Error, ErrorKind, EvictionPolicy, EvictionSession, LaneRef,
    LaneSpec, Latents, LossyTransform, Registry, Result, Retention, Sample,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, Rlimit, Signal, getpid, kill_process, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

use super::Limits;
use super::shared::{Buffer, Part};
use super::wire::{self, Answer, Answered, Ask, Asked, Facts, Listed, SampleOf, Spec};

/// Serves plugins over standard input and output until standard input ends.
///
/// Limits hold before `load` runs, which opens the libraries; what plugins print goes to standard error.
///
/// # Errors
/// If the process cannot be set up or the host breaks off in the middle of a message. What `load` reports is answered to every question
/// instead.
pub fn serve(limits: &Limits, load: impl FnOnce() -> Result<Registry>) -> Result<()> {
    let mut channel = Channel::take()?;
    apply(limits)?;
    // The message of a panic is in its answer; plugins that are linked dynamically have a hook of their own.
    std::panic::set_hook(Box::new(|_| {}));
    let registry = guarded(load);
    let Some(Asked { ask: Ask::Open { input, output }, .. }) = channel.read()? else {
        return Err(Error::invalid_input(
            "expected a host that names its buffers; this program is started by another one",
        ));
    };
    let mut worker = match open(&input, &output) {
        Ok((input, output)) => Worker::new(registry, input, output, limits.output_bytes),
        Err(error) => return channel.answer(Err(error)),
    };
    channel.answer(Ok(Answer::Done))?;
    while let Some(Asked { used, ask, .. }) = channel.read()? {
        worker.input.follow(used).map_err(io)?;
        let answer = guarded(|| worker.answer(ask, &mut channel));
        channel.answer(answer)?;
    }
    Ok(())
}

/// Runs the code of plugins; a panic in it becomes an error.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Error::new(ErrorKind::PluginPanicked, format!("a plugin panicked: {}", text.unwrap_or("no message"))))
    })
}

fn io(error: impl Into<std::io::Error>) -> Error {
    let error = error.into();
    let kind = match error.kind() {
        std::io::ErrorKind::OutOfMemory => ErrorKind::OutOfMemory,
        _ => ErrorKind::Io,
    };
    Error::new(kind, format!("the worker: {error}"))
}

fn open(input: &Path, output: &Path) -> Result<(Buffer, Buffer)> {
    let open = |path| Buffer::open(path).map_err(|error| Error::io(path, &error));
    Ok((open(input)?, open(output)?))
}

/// The frames of standard input and output, under other descriptors, so that neither a plugin's printing nor its reading breaks them.
struct Channel {
    input: BufReader<File>,
    output: File,
    /// Number of the last question.
    number: u64,
}

impl Channel {
    fn take() -> Result<Self> {
        let input = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).map_err(io)?;
        let output = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3).map_err(io)?;
        let nothing = File::open("/dev/null").map_err(io)?;
        rustix::stdio::dup2_stdin(&nothing).map_err(io)?;
        rustix::stdio::dup2_stdout(std::io::stderr()).map_err(io)?;
        watch(input.try_clone().map_err(io)?)?;
        Ok(Self { input: BufReader::new(File::from(input)), output: File::from(output), number: 0 })
    }

    /// The next question; none if the host has closed the pipe.
    fn read(&mut self) -> Result<Option<Asked>> {
        let mut head = [0; wire::HEAD];
        match self.input.read_exact(&mut head) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read.map_err(io)?,
        }
        let strange = || Error::invalid_input("expected a question of a host of the same version");
        let mut text = vec![0; wire::text_len(head).ok_or_else(strange)?];
        self.input.read_exact(&mut text).map_err(io)?;
        let asked: Asked = serde_json::from_slice(&text).map_err(|error| Error::invalid_input(error.to_string()))?;
        self.number = asked.number;
        Ok(Some(asked))
    }

    /// Answers the last question.
    fn answer(&mut self, answer: Result<Answer>) -> Result<()> {
        let answer = answer.unwrap_or_else(|error| Answer::Failed { kind: error.kind(), message: error.to_string() });
        let time = clock_gettime(ClockId::ProcessCPUTime);
        let cpu_ms = time.tv_sec.cast_unsigned() * 1000 + time.tv_nsec.cast_unsigned() / 1_000_000;
        let frame = wire::frame(&Answered { number: self.number, cpu_ms, answer })?;
        self.output.write_all(&frame).map_err(io)
    }
}

/// Ends the process when the host has ended, even while a plugin never returns.
fn watch(input: OwnedFd) -> Result<()> {
    let wait = move || {
        // Without events only the end of the pipe wakes the thread; an interrupted wait is tried again.
        while poll(&mut [PollFd::new(&input, PollFlags::empty())], None).is_err() {}
        // The kindest way out: no handler of a plugin runs, and there is nobody to see the status.
        let _ = kill_process(getpid(), Signal::KILL);
    };
    std::thread::Builder::new().name("watch".into()).stack_size(64 << 10).spawn(wait).map_err(io)?;
    Ok(())
}

fn apply(limits: &Limits) -> Result<()> {
    let set = |resource, soft: u64, hard: u64| {
        let hard = rustix::process::getrlimit(resource).maximum.map_or(hard, |most| most.min(hard));
        setrlimit(resource, Rlimit { current: Some(soft.min(hard)), maximum: Some(hard) }).map_err(io)
    };
    set(Resource::Core, 0, 0)?;
    set(Resource::As, limits.address_space_bytes, limits.address_space_bytes)?;
    // The host replaces a worker that has used the time of one call, so each call has at least that. At the soft limit a signal says why
    // the process ends; the hard one ends a plugin that ignores it.
    let seconds = 2 * u64::from(limits.cpu_seconds);
    set(Resource::Cpu, seconds, seconds + 2)?;
    // Buffers grow by doubling, and hold a guard.
    let bytes = limits.output_bytes.saturating_mul(2).max(4 << 20);
    set(Resource::Fsize, bytes, bytes)
}

/// A plugin with settings.
#[derive(Clone)]
enum Object {
    Codec(Arc<dyn Codec>),
    Transform(Arc<dyn LossyTransform>),
    Eviction(Arc<dyn EvictionPolicy>),
}

impl Object {
    /// `None` if an artifact is not for it.
    fn build(entry: &AnyEntry, settings: &Value, artifacts: &[&[u8]]) -> Result<Option<Self>> {
        Ok(Some(match entry {
            AnyEntry::Codec(entry) => {
                let mut codec = (entry.build)(settings)?;
                for artifact in artifacts {
                    match codec.with_artifact(artifact)? {
                        Some(trained) => codec = trained,
                        None => return Ok(None),
                    }
                }
                Self::Codec(codec)
            }
            AnyEntry::Transform(entry) => Self::Transform((entry.build)(settings)?),
            AnyEntry::Eviction(entry) => Self::Eviction((entry.build)(settings)?),
        }))
    }

    fn facts(&self) -> Facts {
        match self {
            Self::Codec(codec) => Facts::new(codec.capabilities(), codec.config(), None),
            Self::Transform(transform) => {
                Facts::new(transform.capabilities(), transform.config(), Some(transform.bound()))
            }
            Self::Eviction(policy) => Facts::new(policy.capabilities(), policy.config(), None),
        }
    }
}

struct Worker {
    registry: Result<Registry>,
    input: Buffer,
    output: Buffer,
    most: u64,
    objects: HashMap<u64, Object>,
    session: Option<Box<dyn EvictionSession>>,
    /// What codecs append to that cannot write to the output; kept so that its pages are.
    encoded: Vec<u8>,
}

/// A host that asks what does not fit: a fault of ours.
fn confused(what: &str) -> Error {
    Error::invalid_input(format!("the worker has {what}"))
}

fn lane(spec: &Spec) -> Result<LaneSpec> {
    spec.lane().ok_or_else(|| confused("no such element type"))
}

impl Worker {
    fn new(registry: Result<Registry>, input: Buffer, output: Buffer, most: u64) -> Self {
        Self { registry, input, output, most, objects: HashMap::new(), session: None, encoded: Vec::new() }
    }

    fn registry(&self) -> Result<&Registry> {
        self.registry.as_ref().map_err(|error| Error::new(error.kind(), error.to_string()))
    }

    fn codec(&self, object: u64) -> Result<Arc<dyn Codec>> {
        match self.objects.get(&object) {
            Some(Object::Codec(codec)) => Ok(Arc::clone(codec)),
            _ => Err(confused("no such codec")),
        }
    }

    fn transform(&self, object: u64) -> Result<Arc<dyn LossyTransform>> {
        match self.objects.get(&object) {
            Some(Object::Transform(transform)) => Ok(Arc::clone(transform)),
            _ => Err(confused("no such transform")),
        }
    }

    fn policy(&self, object: u64) -> Result<&Arc<dyn EvictionPolicy>> {
        match self.objects.get(&object) {
            Some(Object::Eviction(policy)) => Ok(policy),
            _ => Err(confused("no such eviction policy")),
        }
    }

    fn session(&mut self) -> Result<&mut Box<dyn EvictionSession>> {
        self.session.as_mut().ok_or_else(|| confused("no session"))
    }

    /// Checks that so many bytes may be answered.
    fn allowed(&self, len: usize) -> Result<()> {
        if len as u64 <= self.most {
            return Ok(());
        }
        let most = self.most;
        Err(Error::new(ErrorKind::WrongLength, format!("expected at most {most} bytes (`output_bytes`), got {len}")))
    }

    fn answer(&mut self, ask: Ask, channel: &mut Channel) -> Result<Answer> {
        match ask {
            Ask::Open { .. } => Err(confused("its buffers already")),
            Ask::Sample(_) => Err(confused("asked for no sample")),
            Ask::List => {
                let listed = |entry: &AnyEntry| Ok(Listed::of(entry, entry.as_use()?.library));
                Ok(Answer::List(self.registry()?.entries().map(listed).collect::<Result<_>>()?))
            }
            Ask::Build { object, id, settings, artifacts, forget } => {
                for object in forget {
                    self.objects.remove(&object);
                }
                let input = self.input.bytes();
                let artifacts: Vec<_> = artifacts.iter().map(|at| wire::bytes(input, *at)).collect::<Result<_>>()?;
                let built = Object::build(self.registry()?.get(&id)?, &settings, &artifacts)?;
                let facts = built.as_ref().map(Object::facts);
                self.objects.extend(built.map(|built| (object, built)));
                Ok(Answer::Built(facts))
            }
            Ask::MaxEncodedLen { object, lane: spec } => {
                Ok(Answer::Len(self.codec(object)?.max_encoded_len(&lane(&spec)?)))
            }
            Ask::Encode { object, lane: spec, bytes, cx } => self.encode(object, &lane(&spec)?, bytes, &cx),
            Ask::Decode { object, lane: spec, bytes, cx } => {
                let (codec, spec) = (self.codec(object)?, lane(&spec)?);
                self.allowed(spec.byte_len())?;
                let input = self.input.bytes();
                let encoded = wire::bytes(input, bytes)?;
                let out = self.output.guarded(spec.byte_len()).map_err(io)?;
                cx.with(input, |cx| codec.decode(encoded, &spec, cx, out.bytes))?;
                filled(out.holds())
            }
            Ask::Train { object } => self.train(object, channel),
            Ask::EffectiveConfig { object, role, dim } => {
                Ok(Answer::Settings(self.transform(object)?.effective_config(role, dim)))
            }
            Ask::Forward { object, chunk, cx } => {
                let (transform, input) = (self.transform(object)?, self.input.bytes());
                let mut latents = Latents::new();
                cx.with(input, |cx| transform.forward(chunk.chunk(input)?, cx, &mut latents))?;
                self.lanes(Some(&latents))
            }
            Ask::Alternative { object, chunk, latents } => {
                let (transform, input) = (self.transform(object)?, self.input.bytes());
                let latents = wire::read_lanes(&latents, input)?;
                let other = transform.alternative(chunk.chunk(input)?, &latents)?;
                self.lanes(other.as_ref())
            }
            Ask::Inverse { object, latents, shape, dtype, cx } => {
                let transform = self.transform(object)?;
                let len = shape.elements().saturating_mul(dtype.size());
                self.allowed(len)?;
                let input = self.input.bytes();
                let latents = wire::read_lanes(&latents, input)?;
                let out = self.output.guarded(len).map_err(io)?;
                cx.with(input, |cx| transform.inverse(&latents, cx, ChunkMut::new(shape, dtype, out.bytes)?))?;
                filled(out.holds())
            }
            Ask::Session { object, geometry } => {
                self.session = None;
                self.session = Some(self.policy(object)?.session(&geometry.into())?);
                Ok(Answer::Done)
            }
            Ask::Retention { object, geometry, seen } => {
                let Retention { most, sinks, recent } = self.policy(object)?.retention(&geometry.into(), seen);
                Ok(Answer::Retention(most, sinks, recent))
            }
            Ask::Observe { first_query, queries, tokens, live, probabilities } => {
                let live = wire::words(self.input.bytes(), live, u32::from_le_bytes)?;
                let probabilities = wire::words(self.input.bytes(), probabilities, f32::from_le_bytes)?;
                let step = AttentionStep { first_query, queries, tokens, live: &live, probabilities: &probabilities };
                self.session()?.observe(&step)?;
                Ok(Answer::Done)
            }
            Ask::Plan { seen, tokens, live } => {
                let live = wire::words(self.input.bytes(), live, u32::from_le_bytes)?;
                Ok(Answer::Keep(self.session()?.plan(&CacheView { seen, tokens, live: &live })?.into()))
            }
        }
    }

    fn encode(&mut self, object: u64, spec: &LaneSpec, bytes: Part, cx: &wire::Known) -> Result<Answer> {
        let codec = self.codec(object)?;
        let most = codec.max_encoded_len(spec);
        let input = self.input.bytes();
        let lane = LaneRef::new(spec, wire::bytes(input, bytes)?)?;
        if self.allowed(most).is_ok() {
            let out = self.output.guarded(most).map_err(io)?;
            if let Some(len) = cx.with(input, |cx| codec.encode_into(lane, cx, out.bytes))? {
                fits(spec, most, len)?;
                filled(out.holds())?;
                return Ok(Answer::Bytes(len));
            }
        }
        self.encoded.clear();
        cx.with(input, |cx| codec.encode(lane, cx, &mut self.encoded))?;
        self.allowed(self.encoded.len())?;
        fits(spec, most, self.encoded.len())?;
        self.output.rewrite().put(&self.encoded).map_err(io)?;
        Ok(Answer::Bytes(self.encoded.len()))
    }

    fn train(&mut self, object: u64, channel: &mut Channel) -> Result<Answer> {
        let codec = self.codec(object)?;
        let mut samples = Samples { input: &mut self.input, channel, ended: Ok(false) };
        let artifact = codec.train(&mut samples)?;
        samples.ended?;
        let Some(artifact) = artifact else { return Ok(Answer::Artifact(None)) };
        self.allowed(artifact.0.len())?;
        self.output.rewrite().put(&artifact.0).map_err(io)?;
        Ok(Answer::Artifact(Some(artifact.0.len())))
    }

    fn lanes(&mut self, latents: Option<&Latents>) -> Result<Answer> {
        let Some(latents) = latents else { return Ok(Answer::Lanes(None)) };
        self.allowed(latents.lanes().iter().fold(0, |sum, lane| lane.bytes.len().saturating_add(sum)))?;
        let lanes = wire::put_lanes(latents, &mut self.output.rewrite()).map_err(io)?;
        Ok(Answer::Lanes(Some(lanes)))
    }
}

/// Checks that a codec kept its word.
fn fits(spec: &LaneSpec, most: usize, len: usize) -> Result<()> {
    if len <= most {
        return Ok(());
    }
    let message = format!("{spec}: expected at most {most} bytes (`max_encoded_len`), got {len}");
    Err(Error::new(ErrorKind::WrongLength, message))
}

fn filled(guard_holds: bool) -> Result<Answer> {
    if guard_holds {
        return Ok(Answer::Done);
    }
    Err(Error::new(ErrorKind::WrongLength, "it wrote behind the end of the buffer that it was to fill"))
}

/// The samples of the host, which comes up with one at a time.
struct Samples<'a> {
    input: &'a mut Buffer,
    channel: &'a mut Channel,
    /// Whether the host has no more, or what went wrong.
    ended: Result<bool>,
}

impl Samples<'_> {
    fn ask(&mut self) -> Result<Option<Sample<'static>>> {
        self.channel.answer(Ok(Answer::More))?;
        let Some(Asked { used, ask: Ask::Sample(sample), .. }) = self.channel.read()? else {
            return Err(confused("asked for a sample"));
        };
        self.input.follow(used).map_err(io)?;
        let Some(SampleOf { spec, bytes, layer, role }) = sample else { return Ok(None) };
        let bytes = wire::bytes(self.input.bytes(), bytes)?.to_vec();
        Ok(Some(Sample { spec: lane(&spec)?, bytes: bytes.into(), layer, role }))
    }
}

impl Iterator for Samples<'_> {
    type Item = Sample<'static>;

    fn next(&mut self) -> Option<Self::Item> {
        if !matches!(self.ended, Ok(false)) {
            return None;
        }
        match self.ask() {
            Ok(Some(sample)) => Some(sample),
            Ok(None) => {
                self.ended = Ok(true);
                None
            }
            Err(error) => {
                self.ended = Err(error);
                None
            }
        }
    }
}
