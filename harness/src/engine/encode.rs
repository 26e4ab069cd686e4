//! From a dump to a container.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::time::Instant;

use gearbox_core::container::{ContainerWriter, EntryInfo, RunId, RunInfo, SequenceId, SequenceInfo, Sink};
use gearbox_core::ledger::Ledger;
use gearbox_core::{
    Chunk, ChunkCoder, ChunkMut, ChunkPlan, Chunking, Context, DType, EncodedChunk, Error, Limits, Needs, Pipeline,
    Result, ResultExt, Role, RoutedLane, Sample, Span,
};
use indicatif::ProgressBar;

use super::{Known, SequenceCost, Uses, guarded, in_batches};
use crate::dump::{Arrays, Dump, Entry, Layer, Mapped, Run, Tensor};

/// What encoding a dump gave.
#[derive(Debug)]
pub struct Encoded {
    /// Every stored byte by account.
    pub ledger: Ledger,
    /// Cost per run, layer and role, in stored order.
    pub sequences: Vec<SequenceCost>,
    /// Elements of the lanes named `outliers`: what a transform keeps exact beside its codes.
    pub escapes: u64,
}

/// What a dump offers to plugins besides its tensors.
pub fn offered(dump: &Dump) -> Needs {
    Input::files(dump).offered()
}

/// Checks before any work starts that a pipeline can code a dump.
///
/// # Errors
/// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) with the reason and the first layer it holds for.
pub fn check(dump: &Dump, pipeline: &Pipeline) -> Result<()> {
    Input::files(dump).check(pipeline)
}

/// What is encoded: an index, and where its tensors lie.
#[derive(Clone, Copy)]
struct Input<'a> {
    index: &'a Dump,
    /// Arrays in memory, instead of the files that the index names.
    memory: Option<&'a Arrays<'a>>,
    roles: &'a [Role],
}

impl<'a> Input<'a> {
    fn files(index: &'a Dump) -> Self {
        Self { index, memory: None, roles: &Role::ALL }
    }

    fn memory(arrays: &'a Arrays<'a>) -> Self {
        Self { index: arrays.index(), memory: Some(arrays), roles: arrays.roles() }
    }

    fn offered(self) -> Needs {
        let entries = || self.index.iter().map(|(_, _, entry)| entry);
        Needs {
            tokens: entries().all(|entry| entry.tokens.is_some()),
            rope: self.index.runs.iter().all(|run| run.rope.is_some()),
            peer: self.roles.contains(&Role::Key),
            history: true,
        }
    }

    fn check(self, pipeline: &Pipeline) -> Result<()> {
        let offered = self.offered();
        for run in &self.index.runs {
            for layer in &run.layers {
                let Some(first) = layer.entries.first() else { continue };
                for &role in self.roles {
                    pipeline
                        .check(layer.id, role, first.tensor(role).dtype, offered)
                        .context(|| format!("run `{}`, layer {}, {role}", run.name, layer.id))?;
                }
            }
        }
        Ok(())
    }

    fn tokens(self, tensor: &Tensor, range: Range<usize>) -> Result<Source<'a>> {
        Ok(match self.memory {
            Some(arrays) => Source::Memory(arrays.tokens(tensor, range)),
            None => Source::Mapped(tensor.map_tokens(range)?),
        })
    }

    /// The tensor of a planned chunk.
    fn read(self, entries: &[Entry], role: Role, plan: &ChunkPlan) -> Result<Source<'a>> {
        if let [(idx, range)] = plan.pieces.as_slice() {
            return self.tokens(entries[*idx].tensor(role), range.clone());
        }
        let bytes = |(idx, range): &(usize, Range<usize>)| {
            let tensor = entries[*idx].tensor(role);
            range.len() * tensor.shape.row() * tensor.dtype.size()
        };
        let mut joined = Vec::with_capacity(plan.pieces.iter().map(bytes).sum());
        for (idx, range) in &plan.pieces {
            joined.extend_from_slice(self.tokens(entries[*idx].tensor(role), range.clone())?.bytes());
        }
        Ok(Source::Joined(joined))
    }
}

/// The tensor of a planned chunk: one piece of a file or array, or several pieces joined.
enum Source<'a> {
    Mapped(Mapped),
    Memory(&'a [u8]),
    Joined(Vec<u8>),
}

impl Source<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(bytes) => bytes,
            Self::Memory(bytes) => bytes,
            Self::Joined(bytes) => bytes,
        }
    }
}

fn spans(layer: &Layer) -> Vec<Span> {
    layer.entries.iter().map(Entry::span).collect()
}

struct Step<'a> {
    role: Role,
    chunk: usize,
    source: Source<'a>,
    encoded: EncodedChunk,
    /// What decoding gives, where that is not the source.
    decoded: Option<Vec<u8>>,
    ns: u64,
}

impl Step<'_> {
    /// Elements that a transform keeps exact beside its codes.
    fn escapes(&self) -> u64 {
        let lanes = self.encoded.lanes.iter().map(|lane| &lane.spec);
        let escapes = lanes.filter(|spec| spec.name.rsplit('.').next() == Some("outliers"));
        escapes.map(|spec| spec.shape.elements() as u64).sum()
    }
}

/// Everything about one layer that its jobs share.
struct LayerWork<'a> {
    input: Input<'a>,
    run: &'a RunInfo,
    layer: &'a Layer,
    plans: Vec<ChunkPlan>,
}

impl<'a> LayerWork<'a> {
    fn new(input: Input<'a>, run: &'a RunInfo, layer: &'a Layer, chunking: Chunking) -> Self {
        Self { input, run, layer, plans: chunking.plan(&spans(layer)) }
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

    /// The context that knows where the chunk lies.
    fn place_of(&self, role: Role, plan: &ChunkPlan) -> Context<'static> {
        let end_token = self.layer.entries.last().map(Entry::end);
        Context { end_token, ..Context::new(self.layer.id, role, plan.first_token) }
    }

    /// The lanes of a chunk, for training; they come without peer and history.
    fn samples(&self, role: Role, coder: &ChunkCoder, chunk: usize) -> Result<Vec<(usize, Sample<'static>)>> {
        let plan = &self.plans[chunk];
        let source = self.input.read(&self.layer.entries, role, plan)?;
        let tensor = self.layer.entries[plan.pieces[0].0].tensor(role);
        let chunk = Chunk::new(tensor.shape.with_seq(plan.seq), tensor.dtype, source.bytes())?;
        let tokens = self.run.tokens(plan.first_token, plan.seq);
        let mut cx = self.place_of(role, plan);
        (cx.tokens, cx.rope) = (tokens.as_deref(), self.run.rope.as_ref());
        let lanes = guarded(|| coder.lanes(chunk, &cx))?.into_iter();
        let sample = |lane: RoutedLane<'_>| {
            (lane.slot, Sample { spec: lane.spec, bytes: lane.bytes.into_owned().into(), layer: cx.layer, role })
        };
        Ok(lanes.map(sample).collect())
    }

    fn encode(&self, pipeline: &Pipeline, steps: &[(Role, usize)]) -> Result<Vec<Step<'a>>> {
        let mut known = Known::new(Uses::of(pipeline, self.layer.id));
        let mut done = Vec::with_capacity(steps.len());
        for &(role, chunk) in steps {
            let step = self.encode_step(pipeline, &mut known, role, chunk).context(|| self.place(role, chunk))?;
            known.keep(role, Some(step.decoded.as_deref().unwrap_or(step.source.bytes())));
            done.push(step);
        }
        Ok(done)
    }

    fn encode_step(&self, pipeline: &Pipeline, known: &mut Known, role: Role, chunk: usize) -> Result<Step<'a>> {
        let plan = &self.plans[chunk];
        let source = self.input.read(&self.layer.entries, role, plan)?;
        let first = &self.layer.entries[plan.pieces[0].0];
        let (dtype, shape) = (first.tensor(role).dtype, first.tensor(role).shape.with_seq(plan.seq));
        let key = Some((first.key.shape.with_seq(plan.seq), first.key.dtype));
        known.begin(self.run, role, plan.first_token, plan.seq);
        let cx = Context { rope: self.run.rope.as_ref(), ..self.place_of(role, plan) };
        let cx = known.context(cx, (shape, dtype), key)?;
        let coder = pipeline.coder(self.layer.id, role)?;
        let input = Chunk::new(shape, dtype, source.bytes())?;
        let mut encoded = EncodedChunk::default();
        let start = Instant::now();
        guarded(|| coder.encode(input, &cx, &mut encoded))?;
        let ns = start.elapsed().as_nanos() as u64;
        let mut decoded = None;
        if !coder.is_lossless() {
            let mut bytes = vec![0; source.bytes().len()];
            let out = ChunkMut::new(shape, dtype, &mut bytes)?;
            guarded(|| coder.decode(encoded.lanes(), &cx, &Limits::default(), out))?;
            decoded = Some(bytes);
        }
        Ok(Step { role, chunk, source, encoded, decoded, ns })
    }
}

/// Encodes a dump into a container.
///
/// # Errors
/// What [`check`] reports before anything is written; then what files and plugins report, with run, layer, role and tokens.
pub fn encode<W: Sink + Send>(
    dump: &Dump,
    pipeline: &mut Pipeline,
    out: W,
    progress: &ProgressBar,
) -> Result<(W, Encoded)> {
    encode_input(Input::files(dump), pipeline, out, progress)
}

/// Encodes arrays into a container, which is the one that [`encode`] makes of a dump with the same content.
///
/// # Errors
/// As [`encode`].
pub fn encode_arrays<W: Sink + Send>(
    arrays: &Arrays<'_>,
    pipeline: &mut Pipeline,
    out: W,
    progress: &ProgressBar,
) -> Result<(W, Encoded)> {
    encode_input(Input::memory(arrays), pipeline, out, progress)
}

fn encode_input<W: Sink + Send>(
    input: Input<'_>,
    pipeline: &mut Pipeline,
    out: W,
    progress: &ProgressBar,
) -> Result<(W, Encoded)> {
    input.check(pipeline)?;
    train_input(input, pipeline)?;
    let pipeline = &*pipeline;
    let chunking = pipeline.spec().chunking;
    let mut writer = ContainerWriter::new(out, pipeline)?;
    let mut costs = Vec::new();
    let mut escapes = 0;
    for run in &input.index.runs {
        let info = run_info(run, pipeline.context())?;
        let run_id = writer.add_run(&info)?;
        let layers: Vec<_> = run.layers.iter().map(|layer| LayerWork::new(input, &info, layer, chunking)).collect();
        // By layer, then by role; with the place of its cost.
        let mut ids: Vec<BTreeMap<Role, (SequenceId, usize)>> = Vec::new();
        let mut jobs = Vec::new();
        for (idx, work) in layers.iter().enumerate() {
            let mut add = |role| {
                let info = sequence_info(run_id, work.layer, role);
                let cost = costs.len();
                costs.push(SequenceCost {
                    run: run.name.clone(),
                    layer: work.layer.id,
                    role,
                    original_bytes: info.original_bytes(),
                    chunks: work.plans.len(),
                    ns: 0,
                });
                Ok((role, (writer.add_sequence(info)?, cost)))
            };
            ids.push(input.roles.iter().map(|role| add(*role)).collect::<Result<_>>()?);
            let uses = Uses::of(pipeline, work.layer.id);
            jobs.extend(uses.jobs(work.plans.len(), input.roles).into_iter().map(|steps| (idx, steps)));
        }
        in_batches(
            &jobs,
            |(layer, steps)| layers[*layer].bytes(steps),
            |(layer, steps)| layers[*layer].encode(pipeline, steps),
            |(layer, _), steps| {
                for step in steps? {
                    let plan = &layers[*layer].plans[step.chunk];
                    let decoded = step.decoded.as_deref().unwrap_or(step.source.bytes());
                    let (id, cost) = ids[*layer][&step.role];
                    costs[cost].ns += step.ns;
                    escapes += step.escapes();
                    writer.add_chunk(id, plan.first_token, plan.seq, step.encoded, decoded)?;
                    progress.inc(decoded.len() as u64);
                }
                Ok(())
            },
        )?;
    }
    let (out, ledger) = writer.finish()?;
    Ok((out, Encoded { ledger, sequences: costs, escapes }))
}

/// What a container tells of a run; its token ids if a plugin uses them.
fn run_info(run: &Run, context: Needs) -> Result<RunInfo> {
    let tokens = if context.tokens { token_spans(run).context(|| format!("run `{}`", run.name))? } else { Vec::new() };
    Ok(RunInfo { name: run.name.clone(), rope: run.rope.clone(), tokens })
}

/// The token ids of a run by position: those of all layers, because one layer may lack an entry that another has.
fn token_spans(run: &Run) -> Result<Vec<(u64, Vec<u32>)>> {
    let entries = run.layers.iter().flat_map(|layer| &layer.entries);
    let mut known: Vec<(u64, &[u32])> =
        entries.filter_map(|entry| Some((entry.start, entry.tokens.as_deref()?))).collect();
    known.sort_unstable();
    known.dedup();
    let mut spans: Vec<(u64, Vec<u32>)> = Vec::new();
    for (start, ids) in known {
        match spans.last_mut() {
            Some((first, span)) if start <= *first + span.len() as u64 => {
                let (held, new) = ids.split_at((span.len() - (start - *first) as usize).min(ids.len()));
                let at = (start - *first) as usize;
                if span[at..at + held.len()] != *held {
                    return Err(Error::invalid_input(format!("layers name other tokens from position {start} on")));
                }
                span.extend_from_slice(new);
            }
            _ => spans.push((start, ids.to_vec())),
        }
    }
    Ok(spans)
}

fn sequence_info(run: RunId, layer: &Layer, role: Role) -> SequenceInfo {
    let entry = |entry: &Entry| EntryInfo { span: entry.span(), stage: entry.stage };
    let tensor = layer.entries.first().map(|entry| entry.tensor(role));
    SequenceInfo {
        run,
        layer: layer.id,
        role,
        dtype: tensor.map_or(DType::F16, |tensor| tensor.dtype),
        heads: tensor.map_or(0, |tensor| tensor.shape.heads),
        dim: tensor.map_or(0, |tensor| tensor.shape.dim),
        entries: layer.entries.iter().map(entry).collect(),
    }
}

/// Trains the codecs of a pipeline that learn a model. Tensors are read only when a codec asks for its samples.
///
/// # Errors
/// What the codecs and the files report.
pub fn train(dump: &Dump, pipeline: &mut Pipeline) -> Result<()> {
    train_input(Input::files(dump), pipeline)
}

fn train_input(input: Input<'_>, pipeline: &mut Pipeline) -> Result<()> {
    let mut coders = BTreeMap::new();
    for layer in input.index.runs.iter().flat_map(|run| &run.layers) {
        for &role in input.roles {
            coders.insert((layer.id, role), pipeline.coder(layer.id, role)?.clone());
        }
    }
    let index = input.index;
    let infos = index.runs.iter().map(|run| run_info(run, pipeline.context())).collect::<Result<Vec<_>>>()?;
    let chunking = pipeline.spec().chunking;
    let failure = RefCell::new(None);
    let (coders, infos, failed) = (&coders, &infos, &failure);
    guarded(|| {
        pipeline.train(&|slot| {
            let runs = infos.iter().zip(&index.runs);
            let layers = runs.flat_map(|(info, run)| run.layers.iter().map(move |layer| (info, layer)));
            let parts = layers.flat_map(move |(run, layer)| {
                let used = input.roles.iter().copied().filter(move |role| coders[&(layer.id, *role)].uses(slot));
                used.map(move |role| (run, layer, role))
            });
            let chunks = parts.flat_map(move |(run, layer, role)| {
                let work = Rc::new(LayerWork::new(input, run, layer, chunking));
                (0..work.plans.len()).map(move |chunk| (Rc::clone(&work), role, chunk))
            });
            let lanes = chunks.map_while(move |(work, role, chunk)| {
                let lanes = work.samples(role, &coders[&(work.layer.id, role)], chunk);
                lanes.map_err(|error| *failed.borrow_mut() = Some(error)).ok()
            });
            Box::new(lanes.flatten().filter(move |(held, _)| *held == slot).map(|(_, sample)| sample))
        })
    })?;
    failure.into_inner().map_or(Ok(()), Err)
}
