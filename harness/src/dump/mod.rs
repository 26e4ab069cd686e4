//! KV-cache dumps: what was captured from a model, as it lies on disk.
//!
//! A [`Dump`] is an index: runs, layers and entries with their shapes. The tensors stay in their files until [`Tensor::map`]
//! maps one of them, so memory does not grow with the dump. Two formats are read and written: the reference layout
//! (`<run>/layer_<L>/{k,v,meta}_t<A>_<B>`) and safetensors (one file per run).
//!
//! # Examples
//! ```
//! use gearbox::dump::{Dump, NewEntry, Selection, Stage, write_reference_entry};
//! use gearbox_core::{Chunk, DType, Shape};
//!
//! let folder = tempfile::tempdir().unwrap();
//! let (keys, values) = ([0x3c; 24], [0x38; 24]);
//! let chunk = |bytes| Chunk::new(Shape::new(3, 2, 2), DType::F16, bytes).unwrap();
//! let entry = NewEntry::new("my-run", 0, 0, Stage::Prefill, chunk(&keys), chunk(&values));
//! write_reference_entry(&folder.path().join("my-run/layer_0"), &entry, false).unwrap();
//!
//! let dump = Dump::open(folder.path(), &Selection::default()).unwrap();
//! assert!(dump.findings.is_clean());
//! for (run, layer, entry) in dump.iter() {
//!     assert_eq!((run.name.as_str(), layer.id, entry.seq), ("my-run", 0, 3));
//!     assert_eq!(*entry.key.map().unwrap(), keys);
//! }
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use gearbox_core::Stage;
use gearbox_core::{DType, Error, Result, Role, Rope, Shape, Span};

mod assemble;
mod content;
mod convert;
mod facts;
mod findings;
mod info;
mod map;
mod memory;
mod meta;
mod open;
mod packed;
mod reference;
mod rounding;
mod safetensors;
#[cfg(test)]
mod samples;
mod write;

pub use convert::{ConvertOptions, ConvertReport, Format, convert};
pub use facts::{AttentionFacts, LayerFacts};
pub use findings::{Finding, Findings, Reason};
pub use info::{AttentionInfo, Info, RunInfo};
pub use map::Mapped;
pub(crate) use map::map_shared;
pub use memory::Arrays;
pub use open::{Dropped, Selection};
pub use rounding::Rounding;
pub(crate) use rounding::round;
pub use safetensors::tensor_name;
pub use write::{LayerSpec, NewEntry, RunSpec, SafetensorsWriter, TensorSpec, write_reference_entry};

/// An opened dump: runs sorted by name, layers by id, entries by position.
#[derive(Debug)]
pub struct Dump {
    /// What was opened.
    pub path: PathBuf,
    /// Which entries were wanted.
    pub selection: Selection,
    /// The valid part.
    pub runs: Vec<Run>,
    /// Everything that was left out, with its reason.
    pub findings: Findings,
    /// How many entries the [`Selection`] left out.
    pub dropped: Dropped,
}

/// One request.
#[derive(Debug)]
pub struct Run {
    /// Name, `[A-Za-z0-9._-]+`.
    pub name: String,
    /// How the model rotated keys and queries in all layers, if the dump says so.
    pub rope: Option<Rope>,
    /// Layers, ascending by id.
    pub layers: Vec<Layer>,
}

/// One layer of one request.
#[derive(Debug, Default)]
pub struct Layer {
    /// Layer of the model.
    pub id: u32,
    /// What the dump says of the layer alone.
    pub facts: LayerFacts,
    /// Entries, ascending and without overlap; all have the same heads, dim and dtype per role.
    pub entries: Vec<Entry>,
}

/// Tokens that were appended together.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Phase of the request.
    pub stage: Stage,
    /// Position of the first token.
    pub start: u64,
    /// Number of tokens; at least 1.
    pub seq: usize,
    /// Keys, after `RoPE`.
    pub key: Tensor,
    /// Values.
    pub value: Tensor,
    /// Queries, after `RoPE`; `heads` is the number of query heads.
    pub query: Option<Tensor>,
    /// Token ids, one per token.
    pub tokens: Option<Arc<[u32]>>,
    /// What to call the entry in messages: the path of its meta file, or file and tensor name.
    pub place: String,
    /// The meta file of an entry in the reference layout; holds the keys that a conversion carries over.
    pub meta: Option<Arc<Path>>,
}

/// A tensor in a file.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Element type.
    pub dtype: DType,
    /// Extent in `(seq, heads, dim)`.
    pub shape: Shape,
    /// The file that holds it.
    pub path: Arc<Path>,
    /// Where it starts in the file, in bytes.
    pub offset: u64,
    /// How its elements are ordered in the file.
    pub layout: Layout,
}

/// Order of the elements in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `(seq, heads, dim)`, row-major, without padding.
    Logical,
    /// The storage of the reference engine: head by head, in blocks, with padding.
    Packed(Packed),
}

/// Blocking of the reference engine's storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Keys and values are blocked differently.
    pub role: Role,
    /// Bytes of one head, padding included.
    pub head_bytes: u64,
    /// Tokens (keys) or channels (values) of one block.
    pub pack_h: u64,
    /// Channels (keys) or tokens (values) that lie side by side within a block.
    pub pack_l: u64,
    /// Tokens of one outer block of values.
    pub upper: u64,
}

impl Entry {
    /// Keys or values.
    pub fn tensor(&self, role: Role) -> &Tensor {
        match role {
            Role::Key => &self.key,
            Role::Value => &self.value,
        }
    }

    /// Positions of the tokens.
    pub fn span(&self) -> Span {
        Span { start: self.start, seq: self.seq }
    }

    /// Position behind the last token.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.seq as u64)
    }

    /// Bytes of keys and values.
    pub fn original_bytes(&self) -> u64 {
        self.key.bytes_len().saturating_add(self.value.bytes_len())
    }

    /// Keys, values and, if there are any, queries.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        [("key", &self.key), ("value", &self.value)].into_iter().chain(self.query.iter().map(|query| ("query", query)))
    }
}

impl Dump {
    /// Every entry with its run and layer, in sorted order.
    pub fn iter(&self) -> impl Iterator<Item = (&Run, &Layer, &Entry)> {
        self.runs.iter().flat_map(|run| {
            run.layers.iter().flat_map(move |layer| layer.entries.iter().map(move |entry| (run, layer, entry)))
        })
    }

    /// Number of entries.
    pub fn entries(&self) -> usize {
        self.runs.iter().flat_map(|run| &run.layers).map(|layer| layer.entries.len()).sum()
    }

    /// Bytes of all keys and values: the numerator of a compression ratio.
    pub fn original_bytes(&self) -> u64 {
        self.iter().map(|(_, _, entry)| entry.original_bytes()).fold(0, u64::saturating_add)
    }
}

/// Checks that a name can be that of a run, and so of a folder or file: `[A-Za-z0-9._-]+`, and neither `.` nor `..`.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) with the name.
pub fn check_run_name(name: &str) -> Result<()> {
    reference::check_run(name).map_err(|defect| Error::invalid_input(defect.message))
}
