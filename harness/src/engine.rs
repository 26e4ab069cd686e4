//! The engine: a dump through a pipeline into a container, and back.
//!
//! Work is cut into jobs (one chunk of one layer and role; more where a plugin needs the decoded keys or earlier tokens) that run in
//! parallel. Results are written in stored order, so the same input gives the same bytes for any number of threads. A bounded number
//! of bytes is in flight, whatever the size of the dump.

use std::cell::RefCell;
use std::io::Write;
use std::time::Instant;

use gearbox_core::container::{
    Container, ContainerWriter, EntryInfo, ReadAt, RunId, RunInfo, SequenceId, SequenceInfo, StoredSequence,
};
use gearbox_core::ledger::Ledger;
use gearbox_core::{
    Chunk, ChunkCoder, ChunkMut, ChunkPlan, Context, EncodedChunk, Error, Limits, Needs, Pipeline, Result, ResultExt,
    Role, RoutedLane, Sample, Span,
};
use indicatif::ProgressBar;
use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use crate::dump::{Dump, Entry, Layer, Mapped, Run};

/// Bytes of tensors that are in flight at a time, unless two chunks alone are larger.
const BATCH_BYTES: usize = 16 << 20;
/// Chunks up to this size are worked on while those before them are handed over; with larger ones that would take too much memory.
const OVERLAP_BYTES: usize = 64 << 20;
/// Jobs that are in flight at a time.
const BATCH_JOBS: usize = 1024;

/// What one sequence cost.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SequenceCost {
    /// Name of the run.
    pub run: String,
    /// Layer of the model.
    pub layer: u32,
    /// Keys or values.
    pub role: Role,
    /// Bytes of the original tensors.
    pub original_bytes: u64,
    /// Number of chunks.
    pub chunks: usize,
    /// Time in the pipeline, summed over chunks, one thread each.
    pub ns: u64,
}

/// What encoding a dump gave.
#[derive(Debug)]
pub struct Encoded {
    /// Every stored byte by account.
    pub ledger: Ledger,
    /// Cost per run, layer and role, in stored order.
    pub sequences: Vec<SequenceCost>,
}

/// What decoding a container gave.
#[derive(Debug)]
pub struct Decoded {
    /// Cost per run, layer and role, in stored order.
    pub sequences: Vec<SequenceCost>,
    /// Chunks that could not be decoded, and sequences whose digest differs.
    pub failures: Vec<Error>,
}

/// What a dump offers to plugins besides its tensors.
pub fn offered(dump: &Dump) -> Needs {
    let entries = || dump.runs.iter().flat_map(|run| &run.layers).flat_map(|layer| &layer.entries);
    Needs {
        tokens: entries().all(|entry| entry.tokens.is_some()),
        rope: dump.runs.iter().all(|run| run.rope.is_some()),
        peer: true,
        history: true,
    }
}

/// Checks before any work starts that a pipeline can code a dump.
///
/// # Errors
/// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) with the reason and the first layer it holds for.
pub fn check(dump: &Dump, pipeline: &Pipeline) -> Result<()> {
    let offered = offered(dump);
    for run in &dump.runs {
        for layer in &run.layers {
            let Some(first) = layer.entries.first() else { continue };
            for role in Role::ALL {
                pipeline
                    .check(layer.id, role, first.tensor(role).dtype, offered)
                    .context(|| format!("run `{}`, layer {}, {role}", run.name, layer.id))?;
            }
        }
    }
    Ok(())
}

/// The tensor of a planned chunk: one piece of a file, or several pieces joined.
enum Source {
    Mapped(Mapped),
    Joined(Vec<u8>),
}

impl Source {
    fn read(entries: &[Entry], role: Role, plan: &ChunkPlan) -> Result<Self> {
        if let [(idx, range)] = plan.pieces.as_slice() {
            return Ok(Self::Mapped(entries[*idx].tensor(role).map_tokens(range.clone())?));
        }
        let mut joined = Vec::new();
        for (idx, range) in &plan.pieces {
            joined.extend_from_slice(&entries[*idx].tensor(role).map_tokens(range.clone())?);
        }
        Ok(Self::Joined(joined))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(bytes) => bytes,
            Self::Joined(bytes) => bytes,
        }
    }
}

fn token_ids(entries: &[Entry], plan: &ChunkPlan) -> Option<Vec<u32>> {
    let mut ids = Vec::with_capacity(plan.seq);
    for (idx, range) in &plan.pieces {
        ids.extend_from_slice(entries[*idx].tokens.as_ref()?.get(range.clone())?);
    }
    Some(ids)
}

fn spans(layer: &Layer) -> Vec<Span> {
    layer.entries.iter().map(|entry| Span { start: entry.start, seq: entry.seq }).collect()
}

/// Which chunks must be coded one after the other.
#[derive(Clone, Copy)]
struct Grain {
    /// Values after the keys of the same tokens.
    pairs: bool,
    /// Chunks of a layer in order.
    sequential: bool,
}

impl Grain {
    fn of(pipeline: &Pipeline) -> Self {
        let needs = pipeline.needs();
        Self { pairs: needs.peer, sequential: needs.history }
    }

    /// Cuts the chunks of one layer into jobs; a step is a role and a chunk number.
    fn jobs(self, chunks: usize) -> Vec<Vec<(Role, usize)>> {
        let steps = (0..chunks).flat_map(|chunk| Role::ALL.map(|role| (role, chunk)));
        match (self.sequential, self.pairs) {
            (true, _) => vec![steps.collect()],
            (false, true) => (0..chunks).map(|chunk| Role::ALL.map(|role| (role, chunk)).to_vec()).collect(),
            (false, false) => steps.map(|step| vec![step]).collect(),
        }
    }
}

/// Decoded tensors that later steps of a job may look at.
#[derive(Default)]
struct Known {
    /// Decoded keys of the current tokens.
    peer: Vec<u8>,
    /// Decoded earlier tokens, by role.
    history: [Vec<u8>; 2],
}

struct Step {
    role: Role,
    chunk: usize,
    source: Source,
    encoded: EncodedChunk,
    /// What decoding gives, where that is not the source.
    decoded: Option<Vec<u8>>,
    ns: u64,
}

/// Everything about one layer that its jobs share.
struct LayerWork<'a> {
    run: &'a Run,
    layer: &'a Layer,
    plans: Vec<ChunkPlan>,
}

impl<'a> LayerWork<'a> {
    fn new(run: &'a Run, layer: &'a Layer, pipeline: &Pipeline) -> Self {
        Self { run, layer, plans: pipeline.spec().chunking.plan(&spans(layer)) }
    }

    fn bytes(&self, steps: &[(Role, usize)]) -> usize {
        let row = |role: Role| {
            self.layer.entries.first().map_or(0, |entry| {
                let tensor = entry.tensor(role);
                tensor.shape.row() * tensor.dtype.size()
            })
        };
        steps.iter().map(|(role, chunk)| self.plans[*chunk].seq * row(*role)).sum()
    }

    fn place(&self, role: Role, chunk: usize) -> String {
        let plan = &self.plans[chunk];
        let last = plan.first_token + plan.seq as u64;
        format!("run `{}`, layer {}, {role}, tokens {}..{last}", self.run.name, self.layer.id, plan.first_token)
    }

    fn samples(&self, role: Role, coder: &ChunkCoder, plan: &ChunkPlan) -> Result<Vec<(usize, Sample<'static>)>> {
        let source = Source::read(&self.layer.entries, role, plan)?;
        let tensor = self.layer.entries[plan.pieces[0].0].tensor(role);
        let chunk = Chunk::new(tensor.shape.with_seq(plan.seq), tensor.dtype, source.bytes())?;
        let tokens = token_ids(&self.layer.entries, plan);
        let mut cx = Context::new(self.layer.id, role, plan.first_token);
        (cx.tokens, cx.rope) = (tokens.as_deref(), self.run.rope.as_ref());
        let lanes = coder.lanes(chunk, &cx)?.into_iter();
        let sample = |lane: RoutedLane<'_>| {
            (lane.slot, Sample { spec: lane.spec, bytes: lane.bytes.into_owned().into(), layer: cx.layer, role })
        };
        Ok(lanes.map(sample).collect())
    }

    fn encode(&self, pipeline: &Pipeline, steps: &[(Role, usize)]) -> Result<Vec<Step>> {
        let needs = pipeline.needs();
        let mut known = Known::default();
        let mut done = Vec::with_capacity(steps.len());
        for &(role, chunk) in steps {
            let step = self.encode_step(pipeline, needs, &mut known, role, chunk);
            done.push(step.context(|| self.place(role, chunk))?);
        }
        Ok(done)
    }

    fn encode_step(
        &self,
        pipeline: &Pipeline,
        needs: Needs,
        known: &mut Known,
        role: Role,
        chunk: usize,
    ) -> Result<Step> {
        let plan = &self.plans[chunk];
        let entries = &self.layer.entries;
        let source = Source::read(entries, role, plan)?;
        let tensor = entries[plan.pieces[0].0].tensor(role);
        let shape = tensor.shape.with_seq(plan.seq);
        let tokens = if needs.tokens { token_ids(entries, plan) } else { None };
        let peer = match role {
            Role::Value if needs.peer => Some(entries[plan.pieces[0].0].tensor(Role::Key)),
            _ => None,
        };
        let coder = pipeline.coder(self.layer.id, role)?;
        let mut encoded = EncodedChunk::default();
        let mut decoded = None;
        let ns;
        {
            let history = &known.history[role as usize];
            let row = tensor.shape.row() * tensor.dtype.size();
            let cx = Context {
                layer: self.layer.id,
                role,
                first_token: plan.first_token,
                tokens: tokens.as_deref(),
                rope: self.run.rope.as_ref(),
                peer: peer.map(|key| Chunk::new(key.shape.with_seq(plan.seq), key.dtype, &known.peer)).transpose()?,
                history: needs
                    .history
                    .then(|| Chunk::new(tensor.shape.with_seq(history.len() / row.max(1)), tensor.dtype, history))
                    .transpose()?,
            };
            let input = Chunk::new(shape, tensor.dtype, source.bytes())?;
            let start = Instant::now();
            coder.encode(input, &cx, &mut encoded)?;
            ns = start.elapsed().as_nanos() as u64;
            if !coder.is_lossless() {
                let mut bytes = vec![0; source.bytes().len()];
                let out = ChunkMut::new(shape, tensor.dtype, &mut bytes)?;
                coder.decode(encoded.lanes(), &cx, &Limits::default(), out)?;
                decoded = Some(bytes);
            }
        }
        let result = decoded.as_deref().unwrap_or(source.bytes());
        known.keep(needs, role, result);
        Ok(Step { role, chunk, source, encoded, decoded, ns })
    }
}

impl Known {
    fn keep(&mut self, needs: Needs, role: Role, decoded: &[u8]) {
        if needs.peer && role == Role::Key {
            self.peer.clear();
            self.peer.extend_from_slice(decoded);
        }
        if needs.history {
            self.history[role as usize].extend_from_slice(decoded);
        }
    }
}

/// Runs jobs in batches: in parallel within a batch, handing over results in order while the next batch is worked on.
fn in_batches<J: Sync, T: Send>(
    jobs: &[J],
    bytes: impl Fn(&J) -> usize,
    work: impl Fn(&J) -> T + Sync,
    mut deliver: impl FnMut(&J, T) -> Result<()> + Send,
) -> Result<()> {
    let mut start = 0;
    let mut finished: Vec<(&J, T)> = Vec::new();
    while start < jobs.len() {
        let mut end = start;
        let mut total = 0;
        let mut largest = 0;
        while end < jobs.len() && end - start < BATCH_JOBS && (end - start < 2 || total < BATCH_BYTES) {
            largest = largest.max(bytes(&jobs[end]));
            total += bytes(&jobs[end]);
            end += 1;
        }
        let batch = &jobs[start..end];
        let mut pass = |finished: Vec<(_, T)>| finished.into_iter().try_for_each(|(job, result)| deliver(job, result));
        let compute = || batch.par_iter().map(|job| (job, work(job))).collect();
        if largest <= OVERLAP_BYTES {
            let (passed, computed) = rayon::join(|| pass(std::mem::take(&mut finished)), compute);
            passed?;
            finished = computed;
        } else {
            pass(std::mem::take(&mut finished))?;
            finished = compute();
        }
        start = end;
    }
    finished.into_iter().try_for_each(|(job, result)| deliver(job, result))
}

/// Encodes a dump into a container.
///
/// # Errors
/// What [`check`] reports before anything is written; then what files and plugins report, with run, layer, role and tokens.
pub fn encode<W: Write + Send>(
    dump: &Dump,
    pipeline: &mut Pipeline,
    out: W,
    progress: &ProgressBar,
) -> Result<(W, Encoded)> {
    check(dump, pipeline)?;
    train(dump, pipeline)?;
    let pipeline = &*pipeline;
    let needs = pipeline.needs();
    let grain = Grain::of(pipeline);
    let mut writer = ContainerWriter::new(out, pipeline)?;
    let mut costs = Vec::new();
    for run in &dump.runs {
        let run_id = writer.add_run(&run_info(run, needs))?;
        let layers: Vec<_> = run.layers.iter().map(|layer| LayerWork::new(run, layer, pipeline)).collect();
        let mut ids: Vec<[SequenceId; 2]> = Vec::new();
        let first_cost = costs.len();
        let mut jobs = Vec::new();
        for (idx, work) in layers.iter().enumerate() {
            let mut add = |role| {
                let info = sequence_info(run_id, work.layer, role);
                costs.push(SequenceCost {
                    run: run.name.clone(),
                    layer: work.layer.id,
                    role,
                    original_bytes: info.original_bytes(),
                    chunks: work.plans.len(),
                    ns: 0,
                });
                writer.add_sequence(info)
            };
            ids.push([add(Role::Key)?, add(Role::Value)?]);
            jobs.extend(grain.jobs(work.plans.len()).into_iter().map(|steps| (idx, steps)));
        }
        in_batches(
            &jobs,
            |(layer, steps)| layers[*layer].bytes(steps),
            |(layer, steps)| layers[*layer].encode(pipeline, steps),
            |(layer, _), steps| {
                for step in steps? {
                    let plan = &layers[*layer].plans[step.chunk];
                    let decoded = step.decoded.as_deref().unwrap_or(step.source.bytes());
                    let id = ids[*layer][step.role as usize];
                    writer.add_chunk(id, plan.first_token, plan.seq, &step.encoded, decoded)?;
                    costs[first_cost + 2 * layer + step.role as usize].ns += step.ns;
                    progress.inc(decoded.len() as u64);
                }
                Ok(())
            },
        )?;
    }
    let (out, ledger) = writer.finish()?;
    Ok((out, Encoded { ledger, sequences: costs }))
}

fn run_info(run: &Run, needs: Needs) -> RunInfo {
    let mut tokens: Vec<(u64, Vec<u32>)> = Vec::new();
    if needs.tokens
        && let Some(layer) = run.layers.first()
    {
        for entry in &layer.entries {
            let Some(ids) = &entry.tokens else { continue };
            match tokens.last_mut() {
                Some((start, span)) if *start + span.len() as u64 == entry.start => span.extend_from_slice(ids),
                _ => tokens.push((entry.start, ids.to_vec())),
            }
        }
    }
    RunInfo { name: run.name.clone(), rope: run.rope.clone(), tokens }
}

fn sequence_info(run: RunId, layer: &Layer, role: Role) -> SequenceInfo {
    let entry = |entry: &Entry| EntryInfo { span: Span { start: entry.start, seq: entry.seq }, stage: entry.stage };
    let tensor = layer.entries.first().map(|entry| entry.tensor(role));
    SequenceInfo {
        run,
        layer: layer.id,
        role,
        dtype: tensor.map_or(gearbox_core::DType::F16, |tensor| tensor.dtype),
        heads: tensor.map_or(0, |tensor| tensor.shape.heads),
        dim: tensor.map_or(0, |tensor| tensor.shape.dim),
        entries: layer.entries.iter().map(entry).collect(),
    }
}

/// Trains the codecs of a pipeline that learn a model. Tensors are read only when a codec asks for its samples.
fn train(dump: &Dump, pipeline: &mut Pipeline) -> Result<()> {
    let mut parts = Vec::new();
    for run in &dump.runs {
        for layer in &run.layers {
            for role in Role::ALL {
                parts.push((LayerWork::new(run, layer, pipeline), role, pipeline.coder(layer.id, role)?.clone()));
            }
        }
    }
    let failure = RefCell::new(None);
    pipeline.train(&|slot| {
        let used = parts.iter().filter(move |(_, _, coder)| coder.uses(slot));
        let chunks = used.flat_map(|(work, role, coder)| work.plans.iter().map(move |plan| (work, *role, coder, plan)));
        let lanes = chunks.map_while(|(work, role, coder, plan)| {
            let lanes = work.samples(role, coder, plan);
            lanes.map_err(|error| *failure.borrow_mut() = Some(error)).ok()
        });
        Box::new(lanes.flatten().filter(move |(held, _)| *held == slot).map(|(_, sample)| sample))
    })?;
    failure.into_inner().map_or(Ok(()), Err)
}

/// Decodes all chunks and checks digests.
///
/// Both closures get the number of the sequence, the number of the chunk and the decoded tensor: `visit` in parallel and in any order,
/// `sink` in stored order. Chunks that cannot be decoded are reported as failures; the others still arrive.
///
/// # Errors
/// What the closures report; damage of the container does not end the walk.
pub fn decode<S: ReadAt>(
    container: &Container<S>,
    pipeline: &Pipeline,
    progress: &ProgressBar,
    visit: impl Fn(usize, usize, &[u8]) -> Result<()> + Sync,
    mut sink: impl FnMut(usize, usize, &[u8]) -> Result<()> + Send,
) -> Result<Decoded> {
    let sequences: Vec<&StoredSequence> = container.sequences().collect();
    let mut costs: Vec<SequenceCost> = sequences.iter().map(|sequence| cost(container, sequence)).collect();
    let mut digests: Vec<Xxh3> = sequences.iter().map(|_| Xxh3::new()).collect();
    let mut failures = Vec::new();
    let mut failed = vec![false; sequences.len()];
    let grain = Grain::of(pipeline);
    let mut jobs: Vec<(Pair, Vec<(Role, usize)>)> = Vec::new();
    for pair in pairs(&sequences) {
        let chunks = pair.iter().flatten().map(|idx| sequences[*idx].chunks.len()).max().unwrap_or(0);
        jobs.extend(grain.jobs(chunks).into_iter().map(|steps| (pair, steps)));
    }
    let step_bytes = |idx: usize, chunk: usize| {
        let sequence = sequences[idx];
        let seq = sequence.chunks.get(chunk).map_or(0, |chunk| chunk.seq);
        sequence.info.shape(seq).elements().saturating_mul(sequence.info.dtype.size())
    };
    in_batches(
        &jobs,
        |(pair, steps)| {
            let bytes = steps.iter().filter_map(|(role, chunk)| Some(step_bytes(pair[*role as usize]?, *chunk)));
            bytes.fold(0, usize::saturating_add)
        },
        |(pair, steps)| {
            let done = decode_job(container, pipeline, &sequences, *pair, steps);
            for (idx, chunk, result, _) in &done {
                if let Ok(bytes) = result {
                    visit(*idx, *chunk, bytes)?;
                }
            }
            Ok(done)
        },
        |_, steps| {
            for (idx, chunk, result, ns) in steps? {
                costs[idx].ns += ns;
                match result {
                    Ok(bytes) => {
                        digests[idx].update(&bytes);
                        progress.inc(bytes.len() as u64);
                        sink(idx, chunk, &bytes)?;
                    }
                    Err(error) => {
                        failed[idx] = true;
                        failures.push(error);
                    }
                }
            }
            Ok(())
        },
    )?;
    for (idx, sequence) in sequences.iter().enumerate() {
        let got = digests[idx].digest128();
        if !failed[idx] && sequence.digest.is_some_and(|expected| expected != got) {
            let expected = sequence.digest.unwrap_or_default();
            failures.push(Error::mismatch(format!(
                "run `{}`, layer {}, {}: digest of the decoded tensor differs: expected {expected:032x}, got {got:032x}",
                costs[idx].run, sequence.info.layer, sequence.info.role
            )));
        }
    }
    Ok(Decoded { sequences: costs, failures })
}

fn cost<S: ReadAt>(container: &Container<S>, sequence: &StoredSequence) -> SequenceCost {
    SequenceCost {
        run: container.run(sequence.info.run).map(|run| run.name.clone()).unwrap_or_default(),
        layer: sequence.info.layer,
        role: sequence.info.role,
        original_bytes: sequence.info.original_bytes(),
        chunks: sequence.chunks.len(),
        ns: 0,
    }
}

/// Numbers of the sequences that hold keys and values of one layer.
type Pair = [Option<usize>; 2];

/// Keys and values of the same run and layer.
fn pairs(sequences: &[&StoredSequence]) -> Vec<Pair> {
    let mut pairs = std::collections::BTreeMap::<_, Pair>::new();
    for (idx, sequence) in sequences.iter().enumerate() {
        let info = &sequence.info;
        pairs.entry((info.run, info.layer)).or_default()[info.role as usize] = Some(idx);
    }
    pairs.into_values().collect()
}

type DecodedStep = (usize, usize, Result<Vec<u8>>, u64);

fn decode_job<S: ReadAt>(
    container: &Container<S>,
    pipeline: &Pipeline,
    sequences: &[&StoredSequence],
    pair: Pair,
    steps: &[(Role, usize)],
) -> Vec<DecodedStep> {
    let needs = pipeline.needs();
    let mut known = Known::default();
    let mut done: Vec<DecodedStep> = Vec::with_capacity(steps.len());
    for &(role, chunk) in steps {
        let Some(idx) = pair[role as usize] else { continue };
        if chunk >= sequences[idx].chunks.len() {
            continue;
        }
        let mut ns = 0;
        let key = pair[Role::Key as usize].map(|idx| sequences[idx]);
        let result = decode_step(container, pipeline, needs, &known, (sequences[idx], key), chunk, &mut ns);
        if let Ok(bytes) = &result {
            known.keep(needs, role, bytes);
        }
        done.push((idx, chunk, result, ns));
    }
    done
}

fn decode_step<S: ReadAt>(
    container: &Container<S>,
    pipeline: &Pipeline,
    needs: Needs,
    known: &Known,
    (sequence, key): (&StoredSequence, Option<&StoredSequence>),
    number: usize,
    ns: &mut u64,
) -> Result<Vec<u8>> {
    let info = &sequence.info;
    let run = container.run(info.run)?;
    let chunk = sequence.chunks[number];
    let shape = info.shape(chunk.seq);
    let tokens = if needs.tokens { run.tokens(chunk.first_token, chunk.seq) } else { None };
    let peer = match (role_needs_peer(info.role, needs), key) {
        (true, Some(key)) => Some(Chunk::new(key.info.shape(chunk.seq), key.info.dtype, &known.peer)?),
        _ => None,
    };
    let history = &known.history[info.role as usize];
    let row = shape.row() * info.dtype.size();
    let cx = Context {
        layer: info.layer,
        role: info.role,
        first_token: chunk.first_token,
        tokens: tokens.as_deref(),
        rope: run.rope.as_ref(),
        peer,
        history: needs
            .history
            .then(|| Chunk::new(info.shape(history.len() / row.max(1)), info.dtype, history))
            .transpose()?,
    };
    let bytes = shape.elements().saturating_mul(info.dtype.size());
    let limit = Limits::default().lane;
    if bytes > limit {
        return Err(Error::limit(format!("chunk of {bytes} bytes, the limit is {limit}")));
    }
    let mut out = vec![0; bytes];
    let start = Instant::now();
    container.decode_chunk(pipeline, sequence, number, &cx, ChunkMut::new(shape, info.dtype, &mut out)?)?;
    *ns = start.elapsed().as_nanos() as u64;
    Ok(out)
}

fn role_needs_peer(role: Role, needs: Needs) -> bool {
    role == Role::Value && needs.peer
}
