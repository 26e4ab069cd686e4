//! Arrays in memory that are encoded like a dump.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use gearbox_core::{Chunk, Error, Result, Role};

use super::open::Candidate;
use super::{
    Dropped, Dump, Entry, Findings, LayerFacts, Layout, NewEntry, Selection, Tensor, assemble, check_run_name,
};

/// Keys and values in memory, or only one of them.
///
/// # Examples
/// ```
/// use gearbox::dump::{Arrays, NewEntry, Stage};
/// use gearbox_core::{Chunk, DType, Shape};
///
/// let (keys, values) = ([0x3c; 24], [0x38; 24]);
/// let chunk = |bytes| Chunk::new(Shape::new(3, 2, 2), DType::F16, bytes).unwrap();
/// let entry = NewEntry::new("my-run", 0, 0, Stage::Prefill, chunk(&keys), chunk(&values));
/// assert_eq!(Arrays::new(&[entry]).unwrap().index().original_bytes(), 48);
/// assert!(Arrays::new(&[entry, entry]).is_err(), "two entries of the same tokens");
/// ```
#[derive(Debug)]
pub struct Arrays<'a> {
    /// The offset of a tensor is the number of its array.
    index: Dump,
    bytes: Vec<&'a [u8]>,
    roles: Vec<Role>,
}

impl<'a> Arrays<'a> {
    /// Puts entries in order. Queries are passed over.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if keys, values and token ids of an entry are not equally many, or
    /// there are none; [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if entries overlap or contradict each other, or the
    /// name of a run is not legal.
    pub fn new(entries: &[NewEntry<'a>]) -> Result<Self> {
        Self::with_roles(entries, &Role::ALL)
    }

    /// Puts entries in order, of which only the tensors of one role count.
    ///
    /// # Errors
    /// As [`Arrays::new`].
    pub fn of_role(entries: &[NewEntry<'a>], role: Role) -> Result<Self> {
        Self::with_roles(entries, &[role])
    }

    fn with_roles(entries: &[NewEntry<'a>], roles: &[Role]) -> Result<Self> {
        let path: Arc<Path> = Arc::from(Path::new("memory"));
        let mut bytes = Vec::with_capacity(2 * entries.len());
        let mut candidates = Vec::with_capacity(entries.len());
        for entry in entries {
            check_run_name(entry.run)?;
            let seq = entry.key.shape().seq;
            let place = format!("layer {}, tokens {}..{}", entry.layer, entry.start, entry.start + seq as u64);
            check(entry, seq).map_err(|error| error.context(place.clone()))?;
            let mut tensor = |chunk: Chunk<'a>| {
                bytes.push(chunk.bytes());
                let offset = bytes.len() as u64 - 1;
                let (dtype, shape) = (chunk.dtype(), chunk.shape());
                Tensor { dtype, shape, path: Arc::clone(&path), offset, layout: Layout::Logical }
            };
            let (key, value) = (tensor(entry.key), tensor(entry.value));
            candidates.push(Candidate {
                run: entry.run.to_owned(),
                layer: entry.layer,
                rope: entry.rope.cloned(),
                facts: LayerFacts { attention: entry.attention, rope: None },
                entry: Entry {
                    stage: entry.stage,
                    start: entry.start,
                    seq,
                    key,
                    value,
                    query: None,
                    tokens: entry.tokens.map(Arc::from),
                    place,
                    meta: None,
                },
            });
        }
        let mut findings = Findings::default();
        let runs = assemble::assemble(candidates, &mut findings);
        if let Some(finding) = findings.list.first() {
            return Err(Error::invalid_input(finding.to_string()));
        }
        let (selection, dropped) = (Selection::default(), Dropped::default());
        let index = Dump { path: path.to_path_buf(), selection, runs, findings, dropped };
        Ok(Self { index, bytes, roles: roles.to_vec() })
    }

    /// Runs, layers and entries. The tensors in it belong to no file.
    pub fn index(&self) -> &Dump {
        &self.index
    }

    /// Which tensors of the entries count.
    pub fn roles(&self) -> &[Role] {
        &self.roles
    }

    /// A run of the tokens of a tensor of the index.
    pub(crate) fn tokens(&self, tensor: &Tensor, range: Range<usize>) -> &'a [u8] {
        let row = tensor.shape.row() * tensor.dtype.size();
        &self.bytes[tensor.offset as usize][range.start * row..range.end * row]
    }
}

fn check(entry: &NewEntry<'_>, seq: usize) -> Result<()> {
    for (what, tensor) in [("keys", entry.key), ("values", entry.value)] {
        let shape = tensor.shape();
        if shape.elements() == 0 {
            return Err(Error::shape(format!("{what}: expected at least one token, head and channel, got {shape}")));
        }
        if shape.seq != seq {
            return Err(Error::shape(format!("{what}: expected {seq} tokens, got {}", shape.seq)));
        }
    }
    match entry.tokens {
        Some(tokens) if tokens.len() != seq => {
            Err(Error::shape(format!("token ids: expected {seq}, got {}", tokens.len())))
        }
        _ => Ok(()),
    }
}
