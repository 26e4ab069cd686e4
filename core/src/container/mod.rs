//! The container: encoded chunks in one append-only file that alone rebuilds the pipeline and the tensors.
//!
//! `docs/FORMAT.md` holds the format byte by byte. [`ContainerWriter`] writes it, [`Container`] reads it; a file without its end is
//! walked by [`Container::recover`], which says where the damage lies.

mod cover;
mod reader;
mod record;
mod sink;
mod source;
mod wire;
mod writer;

use serde::{Deserialize, Serialize};

pub use reader::{Container, Damage, StoredChunk, StoredSequence};
pub use sink::{Parts, Sink};
pub use source::ReadAt;
pub use writer::{ContainerWriter, RunId, SequenceId};

use crate::{DType, PipelineSpec, PluginUse, Role, Rope, Shape, Span, Stage};

/// First bytes of every container: not text, and damaged by a transfer that converts line ends.
pub const MAGIC: [u8; 8] = *b"\x89GBX\r\n\x1a\n";
/// Last bytes of a complete container.
pub const END_MAGIC: [u8; 8] = *b"GBXEND\r\n";
/// Version of the format that is written.
pub const VERSION: (u16, u16) = (1, 1);

/// Bytes behind the index: its offset, a checksum of the offset and [`END_MAGIC`].
const TRAILER: u64 = 8 + 4 + 8;

/// Tags of the records.
mod tag {
    pub(super) const RUN: u8 = b'R';
    pub(super) const SEQUENCE: u8 = b'S';
    pub(super) const LANE: u8 = b'L';
    pub(super) const ARTIFACT: u8 = b'A';
    pub(super) const CHUNK: u8 = b'C';
    pub(super) const DIGEST: u8 = b'D';
    pub(super) const INDEX: u8 = b'I';
    pub(super) const ALL: [u8; 7] = [RUN, SEQUENCE, LANE, ARTIFACT, CHUNK, DIGEST, INDEX];
}

/// The JSON at the start of a container. Keys that a later minor version adds are passed over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Name and version of the program that wrote it.
    pub writer: String,
    /// The resolved pipeline.
    pub pipeline: PipelineSpec,
    /// The plugins it uses, sorted by id.
    pub plugins: Vec<PluginUse>,
}

/// One request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunInfo {
    /// Name of the run in the dump.
    pub name: String,
    /// How keys were rotated.
    pub rope: Option<Rope>,
    /// Token ids by position, ascending; stored only if a plugin needs them.
    pub tokens: Vec<(u64, Vec<u32>)>,
}

impl RunInfo {
    /// The ids of a run of tokens, if all of them are known.
    pub fn tokens(&self, first: u64, seq: usize) -> Option<Vec<u32>> {
        let end = first.checked_add(seq as u64)?;
        let mut ids = Vec::new();
        let mut at = first;
        for (start, span) in &self.tokens {
            let Some(span_end) = start.checked_add(span.len() as u64) else { continue };
            let stop = span_end.min(end);
            if *start <= at && at < stop {
                ids.extend_from_slice(&span[(at - start) as usize..(stop - start) as usize]);
                at = stop;
            }
        }
        (at == end).then_some(ids)
    }
}

/// An entry of a sequence: tokens that were appended together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryInfo {
    /// Positions.
    pub span: Span,
    /// Phase of the request.
    pub stage: Stage,
}

/// All tokens of one run, layer and role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceInfo {
    /// The run it belongs to.
    pub run: RunId,
    /// Layer of the model.
    pub layer: u32,
    /// Keys or values.
    pub role: Role,
    /// Element type of the tensors.
    pub dtype: DType,
    /// KV heads.
    pub heads: usize,
    /// Channels per head.
    pub dim: usize,
    /// Entries, ascending and without overlap.
    pub entries: Vec<EntryInfo>,
}

impl SequenceInfo {
    /// Tokens of all entries; saturates.
    pub fn seq(&self) -> usize {
        self.entries.iter().fold(0, |sum: usize, entry| sum.saturating_add(entry.span.seq))
    }

    /// Position behind its last token.
    pub fn end(&self) -> u64 {
        self.entries.last().map_or(0, |entry| entry.span.start.saturating_add(entry.span.seq as u64))
    }

    /// Shape of a run of its tokens.
    pub fn shape(&self, seq: usize) -> Shape {
        Shape::new(seq, self.heads, self.dim)
    }

    /// Bytes of the original tensors; saturates.
    pub fn original_bytes(&self) -> u64 {
        (self.shape(self.seq()).elements() as u64).saturating_mul(self.dtype.size() as u64)
    }
}
