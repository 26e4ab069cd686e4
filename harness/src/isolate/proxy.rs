//! Plugins whose calls are answered by workers.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gearbox_core::{
    AnyEntry, Artifact, AttentionStep, Bound, CacheGeometry, CacheView, Capabilities, Chunk, ChunkMut, Codec, Context,
    Entry, Error, EvictionPolicy, EvictionSession, KeepSet, LaneRef, LaneSpec, Latents, LossyTransform, NameLibrary,
    Result, Retention, Role, Sample,
};
use serde_json::Value;

use super::host::{Lent, Pool, Worker};
use super::wire::{self, Answer, Ask, Facts, Known, Listed, SampleOf, Spec, Tensor};
use super::{Limits, Spawn};

/// Workers of one library, or of the built-ins; its entries share them.
#[derive(Clone, Debug)]
pub struct Isolation(Arc<Pool>);

impl Isolation {
    /// Starts nothing yet.
    pub fn new(how: Spawn, limits: Limits) -> Self {
        Self(Arc::new(Pool::new(how, limits)))
    }

    /// The plugins that a worker finds, isolated. This process never opens their libraries.
    ///
    /// # Errors
    /// What starting a worker and loading its libraries report.
    pub fn entries(&self) -> Result<Vec<AnyEntry>> {
        // No object has the number zero.
        let mut worker = self.0.worker(0)?;
        match worker.ask(Ask::List)? {
            Answer::List(listed) => {
                listed.into_iter().map(|entry| self.listed(entry).ok_or_else(|| worker.strange())).collect()
            }
            _ => Err(worker.strange()),
        }
    }

    fn listed(&self, entry: Listed) -> Option<AnyEntry> {
        Some(match entry.kind.as_str() {
            "codec" => AnyEntry::Codec(self.entry(entry, Self::codec)),
            "transform" => AnyEntry::Transform(self.entry(entry, Self::transform)),
            "eviction" => AnyEntry::Eviction(self.entry(entry, Self::eviction)),
            _ => return None,
        })
    }

    /// The entry with objects that forward every call to workers, which must know a plugin with its id.
    #[must_use]
    pub fn isolated(&self, entry: &AnyEntry) -> AnyEntry {
        let listed = Listed::of(entry, None);
        match entry {
            AnyEntry::Codec(known) => {
                AnyEntry::Codec(Entry { library: known.library.clone(), ..self.entry(listed, Self::codec) })
            }
            AnyEntry::Transform(known) => {
                AnyEntry::Transform(Entry { library: known.library.clone(), ..self.entry(listed, Self::transform) })
            }
            AnyEntry::Eviction(known) => {
                AnyEntry::Eviction(Entry { library: known.library.clone(), ..self.entry(listed, Self::eviction) })
            }
        }
    }

    fn entry<T: ?Sized + 'static>(&self, entry: Listed, erase: fn(Remote) -> Arc<T>) -> Entry<T> {
        let Listed { kind: _, id, aliases, summary, source, format_version, schema, origin, library } = entry;
        let (pool, name) = (Arc::clone(&self.0), id.clone());
        let build = Arc::new(move |settings: &Value| {
            let built = Remote::build(Arc::clone(&pool), &name, settings.clone(), Arc::new(Vec::new()))?;
            built.map(erase).ok_or_else(|| Error::unsupported("it was not built"))
        });
        let library = library.map(|library| -> NameLibrary { Arc::new(move || Ok(library.clone())) });
        Entry { id, aliases, summary, source, format_version, schema, origin, library, build }
    }

    fn codec(remote: Remote) -> Arc<dyn Codec> {
        Arc::new(remote)
    }

    fn transform(remote: Remote) -> Arc<dyn LossyTransform> {
        Arc::new(remote)
    }

    fn eviction(remote: Remote) -> Arc<dyn EvictionPolicy> {
        Arc::new(remote)
    }
}

/// A plugin with settings, which any worker of the pool builds when it first hears of it.
struct Remote {
    pool: Arc<Pool>,
    /// Its number, which no other object of this process has.
    object: u64,
    id: String,
    settings: Value,
    /// Artifacts that it was given, one after the other.
    artifacts: Arc<Vec<Vec<u8>>>,
    facts: Facts,
    capabilities: Capabilities,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "isolated {} {}", self.id, self.facts.config)
    }
}

/// Names the plugin, unless the error is in its own words, which are handed on as they are.
fn named(error: Error, id: &str) -> Error {
    match error.kind().state().as_ref() {
        "error" | "unsupported" | "mismatch" => error,
        _ => error.context(format!("isolated plugin `{id}`")),
    }
}

/// Builds an object in a worker that does not know it yet.
fn build(worker: &mut Worker, object: u64, id: &str, settings: &Value, artifacts: &[Vec<u8>]) -> Result<Option<Facts>> {
    let forget = worker.forget();
    let artifacts = worker.put(|parts| artifacts.iter().map(|artifact| parts.put(artifact)).collect())?;
    let (id, settings) = (id.to_owned(), settings.clone());
    match worker.ask(Ask::Build { object, id, settings, artifacts, forget })? {
        Answer::Built(facts) => {
            if facts.is_some() {
                worker.learnt(object);
            }
            Ok(facts)
        }
        _ => Err(worker.strange()),
    }
}

impl Remote {
    /// `None` if an artifact is not for it.
    fn build(pool: Arc<Pool>, id: &str, settings: Value, artifacts: Arc<Vec<Vec<u8>>>) -> Result<Option<Self>> {
        static OBJECTS: AtomicU64 = AtomicU64::new(1);
        let object = OBJECTS.fetch_add(1, Ordering::Relaxed);
        let mut worker = pool.worker(object)?;
        let Some(facts) = build(&mut worker, object, id, &settings, &artifacts)? else { return Ok(None) };
        let capabilities = facts.capabilities().ok_or_else(|| worker.strange())?;
        drop(worker);
        Ok(Some(Self { pool, object, id: id.to_owned(), settings, artifacts, facts, capabilities }))
    }

    /// A worker that knows this object.
    fn worker(&self) -> Result<Lent> {
        let mut worker = self.pool.worker(self.object)?;
        if !worker.knows(self.object) {
            let facts = build(&mut worker, self.object, &self.id, &self.settings, &self.artifacts)?;
            if facts.is_none_or(|facts| facts != self.facts) {
                return Err(Error::unsupported("it was built again from the same settings and is another one now"));
            }
        }
        Ok(worker)
    }

    /// Runs a call.
    fn call<T>(&self, work: impl FnOnce(&mut Worker) -> Result<T>) -> Result<T> {
        self.worker().and_then(|mut worker| work(&mut worker)).map_err(|error| named(error, &self.id))
    }

    fn most(&self) -> u64 {
        self.pool.limits.output_bytes
    }

    /// Asks for something that fills the output with as many bytes as `out` has.
    fn fill(&self, worker: &mut Worker, ask: Ask, out: &mut [u8]) -> Result<()> {
        match worker.ask(ask)? {
            Answer::Done => out.copy_from_slice(worker.output(out.len(), self.most())?),
            _ => return Err(worker.strange()),
        }
        Ok(())
    }

    /// Asks for lanes.
    fn lanes(&self, worker: &mut Worker, ask: Ask) -> Result<Option<Latents>> {
        let Answer::Lanes(lanes) = worker.ask(ask)? else { return Err(worker.strange()) };
        let Some(lanes) = lanes else { return Ok(None) };
        let end = lanes.iter().map(|lane| lane.bytes.at.saturating_add(lane.bytes.len)).max().unwrap_or_default();
        // Parts lie at multiples of 64, so there may be a little more than what was asked for.
        let most = self.most().saturating_add(64 * lanes.len() as u64);
        match wire::read_lanes(&lanes, worker.output(end, most)?) {
            Ok(latents) => Ok(Some(latents)),
            Err(_) => Err(worker.strange()),
        }
    }
}

impl Codec for Remote {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn config(&self) -> Value {
        self.facts.config.clone()
    }

    /// A failure has no place here; the next call meets it again.
    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        let asked =
            self.call(|worker| match worker.ask(Ask::MaxEncodedLen { object: self.object, lane: Spec::of(lane) })? {
                Answer::Len(len) => Ok(len),
                _ => Err(worker.strange()),
            });
        asked.unwrap_or_else(|_| lane.byte_len())
    }

    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        self.call(|worker| {
            let (bytes, cx) = worker.put(|parts| Ok((parts.put(lane.bytes())?, Known::put(cx, parts)?)))?;
            match worker.ask(Ask::Encode { object: self.object, lane: Spec::of(lane.spec()), bytes, cx })? {
                Answer::Bytes(len) => out.extend_from_slice(worker.output(len, self.most())?),
                _ => return Err(worker.strange()),
            }
            Ok(())
        })
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, cx: &Context<'_>, out: &mut [u8]) -> Result<()> {
        LaneRef::new(lane, out)?;
        self.call(|worker| {
            let (bytes, cx) = worker.put(|parts| Ok((parts.put(encoded)?, Known::put(cx, parts)?)))?;
            let ask = Ask::Decode { object: self.object, lane: Spec::of(lane), bytes, cx };
            self.fill(worker, ask, out)
        })
    }

    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        self.call(|worker| {
            worker.busy = true;
            let mut ask = Ask::Train { object: self.object };
            loop {
                match worker.ask(ask)? {
                    Answer::More => ask = Ask::Sample(next(samples, worker)?),
                    Answer::Artifact(None) => {
                        worker.busy = false;
                        return Ok(None);
                    }
                    Answer::Artifact(Some(len)) => {
                        worker.busy = false;
                        return Ok(Some(Artifact(worker.output(len, self.most())?.to_vec())));
                    }
                    _ => return Err(worker.strange()),
                }
            }
        })
    }

    fn with_artifact(&self, artifact: &[u8]) -> Result<Option<Arc<dyn Codec>>> {
        let mut artifacts = self.artifacts.to_vec();
        artifacts.push(artifact.to_vec());
        let built = Self::build(Arc::clone(&self.pool), &self.id, self.settings.clone(), Arc::new(artifacts));
        let built = built.map_err(|error| named(error, &self.id))?;
        Ok(built.map(|codec| Arc::new(codec) as Arc<dyn Codec>))
    }
}

/// Sends the next sample.
fn next(samples: &mut dyn Iterator<Item = Sample<'_>>, worker: &mut Worker) -> Result<Option<SampleOf>> {
    let Some(Sample { spec, bytes, layer, role }) = samples.next() else { return Ok(None) };
    let bytes = worker.put(|parts| parts.put(&bytes))?;
    Ok(Some(SampleOf { spec: Spec::of(&spec), bytes, layer, role }))
}

impl LossyTransform for Remote {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn config(&self) -> Value {
        self.facts.config.clone()
    }

    /// A failure has no place here; settings then count as different from all others.
    fn effective_config(&self, role: Role, dim: usize) -> Value {
        let asked = self.call(|worker| match worker.ask(Ask::EffectiveConfig { object: self.object, role, dim })? {
            Answer::Settings(settings) => Ok(settings),
            _ => Err(worker.strange()),
        });
        asked.unwrap_or_else(|_| self.facts.config.clone())
    }

    fn bound(&self) -> Bound {
        self.facts.bound.map_or(Bound::Unbounded, Bound::from)
    }

    fn forward(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()> {
        let lanes = self.call(|worker| {
            let (chunk, cx) = worker.put(|parts| Ok((Tensor::put(chunk, parts)?, Known::put(cx, parts)?)))?;
            match self.lanes(worker, Ask::Forward { object: self.object, chunk, cx })? {
                Some(lanes) => Ok(lanes),
                None => Err(worker.strange()),
            }
        })?;
        lanes.into_lanes().into_iter().try_for_each(|lane| out.push_lane(lane))
    }

    fn alternative(&self, chunk: Chunk<'_>, latents: &Latents) -> Result<Option<Latents>> {
        self.call(|worker| {
            let (chunk, latents) =
                worker.put(|parts| Ok((Tensor::put(chunk, parts)?, wire::put_lanes(latents, parts)?)))?;
            self.lanes(worker, Ask::Alternative { object: self.object, chunk, latents })
        })
    }

    fn inverse(&self, latents: &Latents, cx: &Context<'_>, mut out: ChunkMut<'_>) -> Result<()> {
        self.call(|worker| {
            let (latents, cx) = worker.put(|parts| Ok((wire::put_lanes(latents, parts)?, Known::put(cx, parts)?)))?;
            let (shape, dtype) = (out.shape(), out.dtype());
            self.fill(worker, Ask::Inverse { object: self.object, latents, shape, dtype, cx }, out.bytes_mut())
        })
    }
}

impl EvictionPolicy for Remote {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn config(&self) -> Value {
        self.facts.config.clone()
    }

    /// A failure has no place here; nothing is promised then.
    fn retention(&self, geometry: &CacheGeometry, seen: u64) -> Retention {
        let asked = self.call(|worker| {
            let ask = Ask::Retention { object: self.object, geometry: geometry.into(), seen };
            match worker.ask(ask)? {
                Answer::Retention(most, sinks, recent) => Ok(Retention { most, sinks, recent }),
                _ => Err(worker.strange()),
            }
        });
        asked.unwrap_or_default()
    }

    fn session(&self, geometry: &CacheGeometry) -> Result<Box<dyn EvictionSession>> {
        let begun = self.worker().and_then(|mut worker| {
            match worker.ask(Ask::Session { object: self.object, geometry: geometry.into() })? {
                Answer::Done => Ok(worker),
                _ => Err(worker.strange()),
            }
        });
        let worker = begun.map_err(|error| named(error, &self.id))?;
        Ok(Box::new(Session { worker, id: self.id.clone(), kv_heads: geometry.kv_heads }))
    }
}

/// A session, with a worker to itself.
struct Session {
    worker: Lent,
    id: String,
    kv_heads: usize,
}

impl EvictionSession for Session {
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()> {
        let put = |parts: &mut super::shared::Parts<'_>| {
            let live = parts.put_words(step.live, u32::to_le_bytes)?;
            Ok((live, parts.put_words(step.probabilities, f32::to_le_bytes)?))
        };
        let (live, probabilities) = self.worker.put(put)?;
        let AttentionStep { first_query, queries, tokens, .. } = *step;
        match self.ask(Ask::Observe { first_query, queries, tokens, live, probabilities })? {
            Answer::Done => Ok(()),
            _ => Err(self.worker.strange()),
        }
    }

    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet> {
        let live = self.worker.put(|parts| parts.put_words(cache.live, u32::to_le_bytes))?;
        let CacheView { seen, tokens, .. } = *cache;
        match self.ask(Ask::Plan { seen, tokens, live })? {
            Answer::Keep(keep) => {
                let keep = KeepSet::from(keep);
                keep.check(tokens, self.kv_heads)?;
                Ok(keep)
            }
            _ => Err(self.worker.strange()),
        }
    }
}

impl Session {
    fn ask(&mut self, ask: Ask) -> Result<Answer> {
        self.worker.ask(ask).map_err(|error| named(error, &self.id))
    }
}
