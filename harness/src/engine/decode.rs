//! From a container back to tensors.

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
type DecodedStep = (usize, usize, Result<Vec<u8>>, u64);

fn decode_job<S: ReadAt>(
    container: &Container<S>,
    pipeline: &Pipeline,
    sequences: &[&StoredSequence],
    pair: Pair,
    steps: &[(Role, usize)],
) -> Vec<DecodedStep> {
    let layer = pair.iter().flatten().next().map_or(0, |idx| sequences[*idx].info.layer);
    let mut known = Known::new(Uses::of(pipeline, layer));
    let mut done: Vec<DecodedStep> = Vec::with_capacity(steps.len());
    for &(role, chunk) in steps {
        let Some(idx) = pair[role as usize].filter(|idx| chunk < sequences[*idx].chunks.len()) else { continue };
        let mut ns = 0;
        let key = pair[Role::Key as usize].map(|idx| sequences[idx]);
        let result = decode_step(container, pipeline, &mut known, (sequences[idx], key), chunk, &mut ns);
        known.keep(role, result.as_deref().ok());
        done.push((idx, chunk, result, ns));
    }
    done
}

fn decode_step<S: ReadAt>(
    container: &Container<S>,
    pipeline: &Pipeline,
    known: &mut Known,
    (sequence, key): (&StoredSequence, Option<&StoredSequence>),
    number: usize,
    ns: &mut u64,
) -> Result<Vec<u8>> {
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
    let mut out = vec![0; bytes];
    let start = Instant::now();
    let target = ChunkMut::new(shape, info.dtype, &mut out)?;
    guarded(|| container.decode_chunk(pipeline, sequence, number, &cx, target))?;
    *ns = start.elapsed().as_nanos() as u64;
    Ok(out)
}
