//! From a container back to tensors.

use std::ops::Deref;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use gearbox_core::container::{Container, ReadAt, StoredSequence};
use gearbox_core::{ChunkMut, Context, Error, Limits, Pipeline, Result, ResultExt, Role};
use indicatif::ProgressBar;
use xxhash_rust::xxh3::Xxh3;

use super::{Known, SequenceCost, Uses, guarded, in_batches};

/// What decoding a container gave.
#[derive(Debug)]
pub struct Decoded {
    /// Cost per run, layer and role, in stored order.
    pub sequences: Vec<SequenceCost>,
    /// Chunks that could not be decoded, and sequences whose digest differs.
    pub failures: Vec<Error>,
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
    sink: impl FnMut(usize, usize, &[u8]) -> Result<()> + Send,
) -> Result<Decoded> {
    decode_rooms(container, pipeline, progress, |_, _, bytes| Ok(Room::Own(vec![0; bytes])), visit, sink)
}

/// Decodes all chunks straight into memory of the caller, and checks digests: one slice for each of
/// [`Container::sequences`], as long as its tensor.
///
/// # Errors
/// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if there are more or fewer slices, or one has another length; damage
/// of the container is reported as failures, and leaves what was in the slices.
pub fn decode_into<S: ReadAt>(
    container: &Container<S>,
    pipeline: &Pipeline,
    progress: &ProgressBar,
    tensors: Vec<&mut [u8]>,
) -> Result<Decoded> {
    let sequences: Vec<&StoredSequence> = container.sequences().collect();
    if tensors.len() != sequences.len() {
        let message = format!("expected slices for {} sequences, got {}", sequences.len(), tensors.len());
        return Err(Error::shape(message));
    }
    let mut rooms: Vec<Vec<Mutex<Option<&mut [u8]>>>> = Vec::with_capacity(sequences.len());
    for (sequence, mut tensor) in sequences.into_iter().zip(tensors) {
        let (expected, got) = (sequence.info.original_bytes(), tensor.len());
        let place = || format!("layer {}, {}", sequence.info.layer, sequence.info.role);
        if expected != got as u64 {
            return Err(Error::shape(format!("{}: expected a slice of {expected} bytes, got {got}", place())));
        }
        let bytes = |seq: usize| sequence.info.shape(seq).elements().saturating_mul(sequence.info.dtype.size());
        let room = |seq: usize| tensor.split_off_mut(..bytes(seq)).map(|room| Mutex::new(Some(room)));
        let chunks: Option<Vec<_>> = sequence.chunks.iter().map(|chunk| chunk.seq).map(room).collect();
        let more = || Error::corrupt(format!("{}: chunks hold more tokens than the sequence", place()));
        rooms.push(chunks.ok_or_else(more)?);
    }
    let room = |idx: usize, chunk: usize, _: usize| {
        let held = rooms.get(idx).and_then(|chunks| chunks.get(chunk));
        let room = held.and_then(|room| room.lock().unwrap_or_else(PoisonError::into_inner).take());
        room.map(Room::Lent).ok_or_else(|| Error::corrupt("a chunk is named twice"))
    };
    decode_rooms(container, pipeline, progress, room, |_, _, _| Ok(()), |_, _, _| Ok(()))
}

/// Memory for a decoded chunk.
enum Room<'a> {
    Own(Vec<u8>),
    Lent(&'a mut [u8]),
}

impl Room<'_> {
    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Lent(bytes) => bytes,
        }
    }
}

impl Deref for Room<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Lent(bytes) => bytes,
        }
    }
}

/// Decodes into memory that `room` gives for a sequence, a chunk of it, and so many bytes.
fn decode_rooms<'a, S: ReadAt>(
    container: &Container<S>,
    pipeline: &Pipeline,
    progress: &ProgressBar,
    room: impl Fn(usize, usize, usize) -> Result<Room<'a>> + Sync,
    visit: impl Fn(usize, usize, &[u8]) -> Result<()> + Sync,
    mut sink: impl FnMut(usize, usize, &[u8]) -> Result<()> + Send,
) -> Result<Decoded> {
    let sequences: Vec<&StoredSequence> = container.sequences().collect();
    let mut costs: Vec<SequenceCost> = sequences.iter().map(|sequence| cost(container, sequence)).collect();
    let mut digests: Vec<Xxh3> = sequences.iter().map(|_| Xxh3::new()).collect();
    let mut failures = Vec::new();
    let mut failed = vec![false; sequences.len()];
    let mut jobs: Vec<(Pair, Vec<(Role, usize)>)> = Vec::new();
    for (layer, pair) in pairs(&sequences) {
        let chunks = pair.iter().flatten().map(|idx| sequences[*idx].chunks.len()).max().unwrap_or(0);
        jobs.extend(Uses::of(pipeline, layer).jobs(chunks, &Role::ALL).into_iter().map(|steps| (pair, steps)));
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
            let done = decode_job(container, pipeline, &sequences, *pair, steps, &room);
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

/// Keys and values of the same run and layer, with the layer.
fn pairs(sequences: &[&StoredSequence]) -> Vec<(u32, Pair)> {
    let mut pairs = std::collections::BTreeMap::<_, Pair>::new();
    for (idx, sequence) in sequences.iter().enumerate() {
        let info = &sequence.info;
        pairs.entry((info.run, info.layer)).or_default()[info.role as usize] = Some(idx);
    }
    pairs.into_iter().map(|((_, layer), pair)| (layer, pair)).collect()
}

/// Sequence, chunk, decoded tensor, and the time it took.
type DecodedStep<'a> = (usize, usize, Result<Room<'a>>, u64);

fn decode_job<'a, S: ReadAt>(
    container: &Container<S>,
    pipeline: &Pipeline,
    sequences: &[&StoredSequence],
    pair: Pair,
    steps: &[(Role, usize)],
    room: &impl Fn(usize, usize, usize) -> Result<Room<'a>>,
) -> Vec<DecodedStep<'a>> {
    let layer = pair.iter().flatten().next().map_or(0, |idx| sequences[*idx].info.layer);
    let mut known = Known::new(Uses::of(pipeline, layer));
    let mut done: Vec<DecodedStep<'a>> = Vec::with_capacity(steps.len());
    for &(role, chunk) in steps {
        let Some(idx) = pair[role as usize].filter(|idx| chunk < sequences[*idx].chunks.len()) else { continue };
        let mut ns = 0;
        let key = pair[Role::Key as usize].map(|idx| sequences[idx]);
        let room = |bytes| room(idx, chunk, bytes);
        let result = decode_step(container, pipeline, &mut known, (sequences[idx], key), chunk, room, &mut ns);
        known.keep(role, result.as_deref().ok());
        done.push((idx, chunk, result, ns));
    }
    done
}

fn decode_step<'a, S: ReadAt>(
    container: &Container<S>,
    pipeline: &Pipeline,
    known: &mut Known,
    (sequence, key): (&StoredSequence, Option<&StoredSequence>),
    number: usize,
    room: impl FnOnce(usize) -> Result<Room<'a>>,
    ns: &mut u64,
) -> Result<Room<'a>> {
    let info = &sequence.info;
    let run = container.run(info.run)?;
    let chunk = sequence.chunks[number];
    let shape = info.shape(chunk.seq);
    let place = || format!("run `{}`, layer {}, {}, chunk {number}", run.name, info.layer, info.role);
    let limit = Limits::default().lane;
    let bytes = shape.elements().saturating_mul(info.dtype.size());
    if bytes > limit {
        return Err(Error::limit(format!("{bytes} bytes, the limit is {limit}")).context(place()));
    }
    known.begin(run, info.role, chunk.first_token, chunk.seq);
    let cx = Context::new(info.layer, info.role, chunk.first_token);
    let cx = Context { rope: run.rope.as_ref(), end_token: Some(info.end()), ..cx };
    let key = key.map(|key| (key.info.shape(chunk.seq), key.info.dtype));
    let cx = known.context(cx, (shape, info.dtype), key).context(place)?;
    let mut out = room(bytes).context(place)?;
    let start = Instant::now();
    let target = ChunkMut::new(shape, info.dtype, out.bytes())?;
    guarded(|| container.decode_chunk(pipeline, sequence, number, &cx, target))?;
    *ns = start.elapsed().as_nanos() as u64;
    Ok(out)
}
