//! Attention over decoded layers, each as soon as both of its tensors are there.

use std::collections::BTreeMap;

use gearbox_core::{Chunk, Error, Result, ResultExt, Role};

use super::Original;
use crate::dump::{Entry, Layer, Mapped, Tensor};
use crate::metrics::attention::{Attention, AttentionTally, LayerAttention, LayerInput, Queries, Sides};

/// Replays attention layer by layer.
pub(super) struct Replay<'a> {
    attention: &'a Attention,
    /// By sequence, the keys and values of its layer; none where entries lack queries.
    pairs: Vec<Option<Pair>>,
    /// Decoded tensors by sequence; those of a layer are dropped when it has been replayed.
    held: BTreeMap<usize, Vec<u8>>,
    tally: AttentionTally,
}

/// The sequences of a layer, keys and values.
#[derive(Clone, Copy)]
struct Pair {
    sequences: [usize; 2],
    bytes: [usize; 2],
}

impl<'a> Replay<'a> {
    /// None if no layer holds queries for all of its entries.
    pub fn new(attention: &'a Attention, originals: &[Original<'_>]) -> Option<Self> {
        let place = |original: &Original<'_>, role| (original.run.clone(), original.layer.id, role);
        let numbers: BTreeMap<_, usize> =
            originals.iter().enumerate().map(|(idx, original)| (place(original, original.role), idx)).collect();
        let pair = |original: &Original<'_>| {
            original.layer.entries.iter().all(|entry| entry.query.is_some()).then_some(())?;
            let [key, value] = Role::ALL.map(|role| numbers.get(&place(original, role)).copied());
            let sequences = [key?, value?];
            Some(Pair { sequences, bytes: sequences.map(|idx| originals[idx].bytes()) })
        };
        let pairs: Vec<_> = originals.iter().map(pair).collect();
        let any = pairs.iter().any(Option::is_some);
        any.then(|| Self { attention, pairs, held: BTreeMap::new(), tally: AttentionTally::default() })
    }

    /// Takes the next chunk of a sequence.
    pub fn add(&mut self, originals: &[Original<'_>], idx: usize, decoded: &[u8]) -> Result<()> {
        let Some(Pair { sequences, bytes }) = self.pairs[idx] else { return Ok(()) };
        self.held.entry(idx).or_default().extend_from_slice(decoded);
        if sequences.map(|idx| self.held.get(&idx).map_or(0, Vec::len)) != bytes {
            return Ok(());
        }
        let own = &originals[idx];
        let [keys, values] = sequences.map(|idx| self.held.remove(&idx).unwrap_or_default());
        let found = layer(self.attention, own.layer, &keys, &values);
        let found = found.context(|| format!("run `{}`, layer {}", own.run, own.layer.id))?;
        self.tally.add(&own.run, own.layer.id, &found);
        Ok(())
    }

    pub fn finish(self) -> AttentionTally {
        self.tally
    }
}

fn layer(attention: &Attention, layer: &Layer, decoded_keys: &[u8], decoded_values: &[u8]) -> Result<LayerAttention> {
    let spans: Vec<_> = layer.entries.iter().map(Entry::span).collect();
    let keys = map(layer.entries.iter().map(|entry| &entry.key))?;
    let values = map(layer.entries.iter().map(|entry| &entry.value))?;
    let queries = map(layer.entries.iter().filter_map(|entry| entry.query.as_ref()))?;
    let queries = chunks(&queries)?.into_iter().zip(&spans);
    let queries: Vec<_> = queries.map(|(chunk, span)| Queries { first: span.start, chunk }).collect();
    attention.layer(&LayerInput {
        spans: &spans,
        key: Sides { original: &chunks(&keys)?, decoded: &[joined(&keys, decoded_keys)?] },
        value: Sides { original: &chunks(&values)?, decoded: &[joined(&values, decoded_values)?] },
        queries: &queries,
        facts: layer.facts.attention,
    })
}

fn map<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<Vec<(&'a Tensor, Mapped)>> {
    tensors.map(|tensor| Ok((tensor, tensor.map()?))).collect()
}

fn chunks<'a>(mapped: &'a [(&Tensor, Mapped)]) -> Result<Vec<Chunk<'a>>> {
    mapped.iter().map(|(tensor, bytes)| Chunk::new(tensor.shape, tensor.dtype, bytes)).collect()
}

/// The decoded tensor of all entries together.
fn joined<'a>(originals: &[(&Tensor, Mapped)], decoded: &'a [u8]) -> Result<Chunk<'a>> {
    let (first, _) = originals.first().ok_or_else(|| Error::invalid_input("expected entries, got none"))?;
    let seq = originals.iter().map(|(tensor, _)| tensor.shape.seq).sum();
    Chunk::new(first.shape.with_seq(seq), first.dtype, decoded)
}
