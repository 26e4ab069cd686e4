//! Comparison of decoded tensors with the dump they come from.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use gearbox_core::container::{Container, ReadAt, StoredSequence};
use gearbox_core::{Error, Pipeline, Result, Role};
use indicatif::ProgressBar;

use crate::dump::{Dump, Layer};
use crate::engine::{self, Decoded};

/// What a comparison found.
#[derive(Debug)]
pub struct Compared {
    /// Cost and failures of decoding.
    pub decoded: Decoded,
    /// Elements that were compared.
    pub values: u64,
    /// Elements that came back with other bits.
    pub changed_values: u64,
}

/// Decodes a container and compares every element with the dump.
///
/// # Errors
/// [`ErrorKind::Mismatch`](gearbox_core::ErrorKind::Mismatch) if the container holds other runs, layers, entries or shapes than the dump.
pub fn with_dump<S: ReadAt>(
    container: &Container<S>,
    pipeline: &Pipeline,
    dump: &Dump,
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
    let (values, changed_values) = (AtomicU64::new(0), AtomicU64::new(0));
    let count = |idx: usize, chunk, decoded: &[u8]| {
        let elements = decoded.len() / sequences[idx].info.dtype.size();
        values.fetch_add(elements as u64, Ordering::Relaxed);
        changed_values.fetch_add(originals[idx].count_changed(chunk, decoded)?, Ordering::Relaxed);
        Ok(())
    };
    let decoded = engine::decode(container, pipeline, progress, count, |_, _, _| Ok(()))?;
    Ok(Compared { decoded, values: values.into_inner(), changed_values: changed_values.into_inner() })
}

/// The tensors of a sequence in the dump.
struct Original<'a> {
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
        Ok(Self { layer, role: info.role, chunk_starts, entry_starts })
    }

    /// Counts the elements of a decoded chunk whose bits differ.
    fn count_changed(&self, chunk: usize, mut decoded: &[u8]) -> Result<u64> {
        let mut token = self.chunk_starts[chunk];
        let mut entry = self.entry_starts.partition_point(|start| *start <= token) - 1;
        let mut changed = 0;
        while !decoded.is_empty() {
            let tensor = self.layer.entries[entry].tensor(self.role);
            let (size, row) = (tensor.dtype.size(), tensor.shape.row() * tensor.dtype.size());
            let first = token - self.entry_starts[entry];
            let tokens = (tensor.shape.seq - first).min(decoded.len() / row.max(1));
            let original = tensor.map_tokens(first..first + tokens)?;
            let expected: &[u8] = &original;
            let (now, later) = decoded.split_at(expected.len());
            if now != expected {
                let pairs = now.chunks_exact(size).zip(expected.chunks_exact(size));
                changed += pairs.filter(|(a, b)| a != b).count() as u64;
            }
            decoded = later;
            entry += 1;
            token = self.entry_starts.get(entry).copied().unwrap_or_default();
        }
        Ok(changed)
    }
}

/// Where each part starts when parts of these lengths lie end to end.
fn starts(lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    lengths.scan(0, |at, len| Some(std::mem::replace(at, *at + len))).collect()
}
