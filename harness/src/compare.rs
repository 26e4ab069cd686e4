//! Comparison of decoded tensors with the dump they come from.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use gearbox_core::container::{Container, ReadAt, SequenceInfo, StoredSequence};
use gearbox_core::{Chunk, DType, Error, Pipeline, Result, Role, Shape};
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};

use crate::dump::{Dump, Layer};
use crate::engine::{self, Decoded};
use crate::metrics::attention::{Attention, AttentionReport, AttentionTally};
use crate::metrics::error::{ErrorReport, HeadErrors, PlacedSums};

mod replay;

use self::replay::Replay;

/// What a comparison found.
#[derive(Debug)]
pub struct Compared {
    /// Cost and failures of decoding.
    pub decoded: Decoded,
    /// Elements that were compared.
    pub values: u64,
    /// Elements that came back with other bits.
    pub changed_values: u64,
    /// Sums over every head, in stored order.
    pub sums: Vec<PlacedSums>,
    /// Number of the chunk in which each of these heads has the most energy.
    pub loudest_chunks: Vec<usize>,
    /// What attention makes of it, over the layers that hold queries for all of their entries; none if no layer does.
    pub attention: Option<AttentionTally>,
}

impl Compared {
    /// Errors by head, layer and role.
    pub fn error_report(&self) -> ErrorReport {
        ErrorReport::of(self.sums.iter().cloned())
    }

    /// Errors of attention by head and layer.
    pub fn attention_report(&self) -> Option<AttentionReport> {
        self.attention.as_ref().map(AttentionTally::report)
    }
}

/// What else a comparison does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Replay attention where the dump holds queries; it needs the decoded tensors of one layer in memory.
    pub attention: Option<&'a Attention>,
    /// A head to break after decoding, to see whether anybody notices.
    pub flipped: Option<&'a FlippedHead>,
}

/// One head of one chunk of one tensor, every sign of which is turned around.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlippedHead {
    /// Name of the run.
    pub run: String,
    /// Layer of the model.
    pub layer: u32,
    /// Keys or values.
    pub role: Role,
    /// KV head.
    pub head: usize,
    /// Number of the chunk.
    pub chunk: usize,
}

impl FlippedHead {
    fn flip(&self, info: &SequenceInfo, decoded: &mut [u8]) {
        flip_head(self.head, info.shape(0), info.dtype, decoded);
    }
}

/// Turns the signs of one head around in every row of a tensor `(seq, heads, dim)`, of which the shape tells heads and dim.
pub(crate) fn flip_head(head: usize, shape: Shape, dtype: DType, bytes: &mut [u8]) {
    let (size, len) = (dtype.size(), shape.dim * dtype.size());
    for row in bytes.chunks_exact_mut((shape.heads * len).max(1)) {
        // Little-endian: the sign is in the last byte.
        row[head * len..][..len].iter_mut().skip(size - 1).step_by(size).for_each(|byte| *byte ^= 0x80);
    }
}

/// Decodes a container and compares every element with the dump.
///
/// # Errors
/// [`ErrorKind::Mismatch`](gearbox_core::ErrorKind::Mismatch) if the container holds other runs, layers, entries or shapes than the dump.
pub fn with_dump<S: ReadAt>(
    container: &Container<S>,
    pipeline: &Pipeline,
    dump: &Dump,
    options: Options<'_>,
    progress: &ProgressBar,
) -> Result<Compared> {
    let mut layers = BTreeMap::new();
    for run in &dump.runs {
        for layer in &run.layers {
            layers.insert((run.name.as_str(), layer.id), layer);
        }
    }
    let sequences: Vec<&StoredSequence> = container.sequences().collect();
    let mut originals = Vec::new();
    for sequence in &sequences {
        originals.push(Original::new(container, sequence, &layers)?);
    }
    if sequences.len() != 2 * layers.len() {
        return Err(Error::mismatch(format!("expected {} sequences, got {}", 2 * layers.len(), sequences.len())));
    }
    let flipped = options.flipped.and_then(|head| {
        let place = |original: &Original<'_>| {
            (&head.run, head.layer, head.role) == (&original.run, original.layer.id, original.role)
        };
        originals.iter().position(place).map(|idx| (idx, head))
    });
    let broken = |idx: usize, chunk: usize, decoded: &[u8]| {
        let (_, head) = flipped.filter(|(flipped, head)| (*flipped, head.chunk) == (idx, chunk))?;
        let mut bytes = decoded.to_vec();
        head.flip(&sequences[idx].info, &mut bytes);
        Some(bytes)
    };
    let parts = Mutex::new(BTreeMap::new());
    let compare = |idx: usize, chunk: usize, decoded: &[u8]| {
        let broken = broken(idx, chunk, decoded);
        let errors = originals[idx].errors(chunk, broken.as_deref().unwrap_or(decoded))?;
        parts.lock().unwrap_or_else(PoisonError::into_inner).insert((idx, chunk), errors);
        Ok(())
    };
    let mut replay = options.attention.and_then(|attention| Replay::new(attention, &originals));
    let replay_chunk = |idx: usize, chunk: usize, decoded: &[u8]| match &mut replay {
        Some(replay) => {
            let broken = broken(idx, chunk, decoded);
            replay.add(&originals, idx, broken.as_deref().unwrap_or(decoded))
        }
        None => Ok(()),
    };
    let decoded = engine::decode(container, pipeline, progress, compare, replay_chunk)?;
    let parts = parts.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut heads: Vec<HeadErrors> = sequences.iter().map(|_| HeadErrors::default()).collect();
    let mut loudest: Vec<Vec<(f64, usize)>> = vec![Vec::new(); sequences.len()];
    for ((idx, chunk), errors) in &parts {
        heads[*idx].merge(errors)?;
        let loudest = &mut loudest[*idx];
        loudest.resize(errors.heads().len().max(loudest.len()), (0.0, 0));
        for (held, sums) in loudest.iter_mut().zip(errors.heads()) {
            if sums.sum_original > held.0 {
                *held = (sums.sum_original, *chunk);
            }
        }
    }
    let placed = originals.iter().zip(&heads).flat_map(|(original, heads)| {
        let heads = heads.heads().iter().enumerate();
        let (run, layer, role) = (&original.run, original.layer.id, original.role);
        heads.map(move |(head, sums)| PlacedSums { run: run.clone(), layer, role, head, sums: *sums })
    });
    let sums: Vec<_> = placed.collect();
    Ok(Compared {
        values: sums.iter().map(|placed| placed.sums.elements()).sum(),
        changed_values: sums.iter().map(|placed| placed.sums.changed).sum(),
        attention: replay.filter(|_| decoded.failures.is_empty()).map(Replay::finish),
        decoded,
        sums,
        loudest_chunks: loudest.into_iter().flatten().map(|(_, chunk)| chunk).collect(),
    })
}

/// The tensors of a sequence in the dump.
struct Original<'a> {
    run: String,
    layer: &'a Layer,
    role: Role,
    /// Tokens before each chunk.
    chunk_starts: Vec<usize>,
    /// Tokens before each entry.
    entry_starts: Vec<usize>,
}

impl<'a> Original<'a> {
    fn new<S: ReadAt>(
        container: &Container<S>,
        sequence: &StoredSequence,
        layers: &BTreeMap<(&str, u32), &'a Layer>,
    ) -> Result<Self> {
        let info = &sequence.info;
        let run = container.run(info.run)?;
        let place = format!("run `{}`, layer {}, {}", run.name, info.layer, info.role);
        let layer = layers
            .get(&(run.name.as_str(), info.layer))
            .ok_or_else(|| Error::mismatch("the dump does not hold it").context(place.clone()))?;
        let stored = info.entries.iter().map(|entry| (entry.span.start, entry.span.seq));
        let same = stored.eq(layer.entries.iter().map(|entry| (entry.start, entry.seq)))
            && layer.entries.iter().all(|entry| {
                let tensor = entry.tensor(info.role);
                tensor.dtype == info.dtype && tensor.shape == info.shape(entry.seq)
            });
        if !same {
            return Err(Error::mismatch("the dump has other entries or shapes there").context(place));
        }
        let chunk_starts = starts(sequence.chunks.iter().map(|chunk| chunk.seq));
        let entry_starts = starts(layer.entries.iter().map(|entry| entry.seq));
        Ok(Self { run: run.name.clone(), layer, role: info.role, chunk_starts, entry_starts })
    }

    /// Bytes of the whole tensor.
    fn bytes(&self) -> usize {
        let bytes = self
            .layer
            .entries
            .iter()
            .map(|entry| entry.tensor(self.role))
            .map(|tensor| tensor.shape.elements() * tensor.dtype.size());
        bytes.sum()
    }

    /// Compares a decoded chunk.
    fn errors(&self, chunk: usize, mut decoded: &[u8]) -> Result<HeadErrors> {
        let mut token = self.chunk_starts[chunk];
        let mut entry = self.entry_starts.partition_point(|start| *start <= token) - 1;
        let mut errors = HeadErrors::default();
        while !decoded.is_empty() {
            let tensor = self.layer.entries[entry].tensor(self.role);
            let row = tensor.shape.row() * tensor.dtype.size();
            let first = token - self.entry_starts[entry];
            let tokens = (tensor.shape.seq - first).min(decoded.len() / row.max(1));
            let original = tensor.map_tokens(first..first + tokens)?;
            let (now, later) = decoded.split_at(original.len());
            let shape = tensor.shape.with_seq(tokens);
            errors.add(Chunk::new(shape, tensor.dtype, &original)?, Chunk::new(shape, tensor.dtype, now)?)?;
            decoded = later;
            entry += 1;
            token = self.entry_starts.get(entry).copied().unwrap_or_default();
        }
        Ok(errors)
    }
}

/// Where each part starts when parts of these lengths lie end to end.
fn starts(lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    lengths.scan(0, |at, len| Some(std::mem::replace(at, *at + len))).collect()
}
