//! Attention over decoded layers, each as soon as both of its tensors are there.

use std::collections::BTreeMap;

use gearbox_core::{Chunk, Error, Result, ResultExt, Role};

use super::Original;
use crate::dump::{Entry, Layer, Mapped, Tensor};
use crate::metrics::attention::{Attention, AttentionTally, LayerAttention, LayerInput, Queries, Sides};

/// Replays attention layer by layer.
pub(super) struct Replay<'a> {
    attention: &'a Attention,
    /// Decoded tensors by sequence; those of a layer are dropped when it has been replayed.
    held: BTreeMap<usize, Vec<u8>>,
    tally: AttentionTally,
}

impl<'a> Replay<'a> {
    /// None if no layer holds queries for all of its entries.
    pub fn new(attention: &'a Attention, originals: &[Original<'_>]) -> Option<Self> {
        let any = originals.iter().any(|original| has_queries(original.layer));
        any.then(|| Self { attention, held: BTreeMap::new(), tally: AttentionTally::default() })
    }

    /// Takes the next chunk of a sequence.
    pub fn add(&mut self, originals: &[Original<'_>], idx: usize, decoded: &[u8]) -> Result<()> {
        let own = &originals[idx];
        if !has_queries(own.layer) {
            return Ok(());
        }
        self.held.entry(idx).or_default().extend_from_slice(decoded);
        let of_role = |role| {
            let same = |other: &Original<'_>| std::ptr::eq(other.layer, own.layer) && other.role == role;
            originals.iter().position(same)
        };
        let (Some(key), Some(value)) = (of_role(Role::Key), of_role(Role::Value)) else { return Ok(()) };
        let complete = |idx| self.held.get(&idx).map_or(0, Vec::len) == originals[idx].bytes();
        if !(complete(key) && complete(value)) {
            return Ok(());
        }
        let mut take = |idx| self.held.remove(&idx).unwrap_or_default();
        let found = layer(self.attention, own.layer, &take(key), &take(value));
        let found = found.context(|| format!("run `{}`, layer {}", own.run, own.layer.id))?;
        self.tally.add(&own.run, own.layer.id, &found);
        Ok(())
    }

    pub fn finish(self) -> AttentionTally {
        self.tally
    }
}

fn has_queries(layer: &Layer) -> bool {
    layer.entries.iter().all(|entry| entry.query.is_some())
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
