//! The one module of the harness that maps files into memory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::{Deref, Range};
use std::path::Path;

use gearbox_core::{Error, Result, Role, Shape};
use memmap2::{Mmap, MmapMut, MmapOptions};

use super::{Layout, Packed, Tensor};

/// The bytes of one tensor: in logical order `(seq, heads, dim)`, little-endian.
///
/// Pages of the file are read when they are touched. Packed tensors are put in order in a buffer of their own.
#[derive(Debug)]
pub struct Mapped(Bytes);

#[derive(Debug)]
enum Bytes {
    File(Mmap),
    Owned(Vec<u8>),
}

impl Mapped {
    /// Bytes that were computed rather than mapped.
    pub(super) fn owned(bytes: Vec<u8>) -> Self {
        Self(Bytes::Owned(bytes))
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Bytes::File(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

impl Tensor {
    /// Bytes of the elements, without padding.
    pub fn bytes_len(&self) -> u64 {
        (self.shape.elements() as u64).saturating_mul(self.dtype.size() as u64)
    }

    /// Maps the tensor; an empty one needs no file.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if the file cannot be opened.
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if it became too short since the dump was opened.
    pub fn map(&self) -> Result<Mapped> {
        self.map_tokens(0..self.shape.seq)
    }

    /// Maps a run of its tokens.
    ///
    /// # Errors
    /// As [`Tensor::map`]; [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if the range ends behind the last token.
    pub fn map_tokens(&self, range: Range<usize>) -> Result<Mapped> {
        let row = self.shape.row() * self.dtype.size();
        if range.end > self.shape.seq || range.start > range.end {
            return Err(Error::shape(format!("tokens {range:?} of a tensor of shape {}", self.shape)));
        }
        let len = (range.len() * row) as u64;
        if len == 0 {
            return Ok(Mapped::owned(Vec::new()));
        }
        match self.layout {
            Layout::Logical => map_range(&self.path, self.offset.saturating_add((range.start * row) as u64), len),
            Layout::Packed(packed) => {
                let file = map_range(&self.path, self.offset, packed.file_bytes(self.shape))?;
                Ok(Mapped::owned(packed.unpack(self, &file, range)?))
            }
        }
    }
}

impl Tensor {
    /// The tensor in runs of whole tokens of about a megabyte, so that pages can be dropped behind the reader.
    ///
    /// A packed tensor comes in one piece.
    pub(super) fn windows(&self) -> impl Iterator<Item = Result<Mapped>> {
        const WINDOW: usize = 1 << 20;
        let row = self.shape.row() * self.dtype.size();
        let step = match self.layout {
            Layout::Logical => (WINDOW / row.max(1)).max(1),
            Layout::Packed(_) => self.shape.seq.max(1),
        };
        (0..self.shape.seq).step_by(step).map(move |start| self.map_tokens(start..self.shape.seq.min(start + step)))
    }
}

/// Pieces up to this size are read instead of mapped: with chunks of 32 KiB, mapping and page faults took more than half of a sweep.
const SMALL: u64 = 64 << 10;

/// Maps `len` bytes from `offset`, at least one.
fn map_range(path: &Path, offset: u64, len: u64) -> Result<Mapped> {
    let io = |error| Error::io(path, &error);
    let mut file = File::open(path).map_err(io)?;
    let end = offset.saturating_add(len);
    let too_short = |file: &File| -> Result<Option<Error>> {
        let found = file.metadata().map_err(io)?.len();
        let message =
            || format!("`{}`: expected at least {end} bytes, got {found}; did the file change?", path.display());
        Ok((end > found || end == u64::MAX).then(|| Error::invalid_input(message())))
    };
    if len <= SMALL {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        let sought = if offset == 0 { Ok(0) } else { file.seek(SeekFrom::Start(offset)) };
        // The length is asked for only if reading fails: a dump holds thousands of files of this size.
        return match sought.and_then(|_| file.read_exact(&mut bytes)) {
            Ok(()) => Ok(Mapped::owned(bytes)),
            Err(error) => Err(too_short(&file)?.unwrap_or_else(|| io(error))),
        };
    }
    match too_short(&file)? {
        Some(error) => Err(error),
        None => Ok(Mapped(Bytes::File(map_file(&file, offset, len).map_err(io)?))),
    }
}

/// Maps bytes that lie within the file.
#[expect(unsafe_code, reason = "mapping a file is unsafe because other processes may change it")]
fn map_file(file: &File, offset: u64, len: u64) -> std::io::Result<Mmap> {
    let len = usize::try_from(len).map_err(std::io::Error::other)?;
    // SAFETY: the map is read-only and lies within the file, whose length the caller checked. That no process shortens or
    // rewrites a dump while it is read is upheld by the user; our own writers only ever replace files by renaming.
    unsafe { MmapOptions::new().offset(offset).len(len).map(file) }
}

/// Maps the first bytes of a file through which this process and a worker of its own exchange data, one at a time.
///
/// # Errors
/// What the system reports; an error too if the file is shorter.
#[expect(unsafe_code, reason = "mapping a file is unsafe because other processes may change it")]
pub(crate) fn map_shared(file: &File, len: usize) -> std::io::Result<MmapMut> {
    let found = file.metadata()?.len();
    if found < len as u64 {
        return Err(std::io::Error::other(format!("expected at least {len} bytes, got {found}")));
    }
    // SAFETY: the map lies within the file, which was checked above, and the file cannot be shortened: on Linux the kernel refuses it
    // (`Buffer::create` seals it), elsewhere no other process than the worker knows its path. Host and worker take turns, each touching the
    // bytes only between a message to it and its answer. A hostile plugin can break that turn: the worker's process is its own to break; the
    // host only copies bytes in and out, for which every value is valid, and looks at its copy.
    unsafe { MmapOptions::new().len(len).map_mut(file) }
}

impl Packed {
    /// Bytes of all heads with their padding; saturates.
    pub(super) fn file_bytes(self, shape: Shape) -> u64 {
        self.head_bytes.saturating_mul(shape.heads as u64)
    }

    /// Whether every element of the shape lies within its head.
    pub(super) fn holds(self, shape: Shape, element: usize) -> bool {
        let last = || -> Option<u64> {
            let token = self.token_index(shape, shape.seq.checked_sub(1)? as u64)?;
            let channel = self.channel_index(shape.dim.checked_sub(1)? as u64)?;
            // Both indices grow with their argument, so this is the highest element.
            token.checked_add(channel)?.checked_add(1)?.checked_mul(element as u64)
        };
        last().is_some_and(|end| end <= self.head_bytes)
    }

    /// The part of an element's index within its head that comes from the token.
    fn token_index(self, shape: Shape, token: u64) -> Option<u64> {
        let (h, l) = (self.pack_h, self.pack_l);
        let dim = shape.dim as u64;
        match self.role {
            Role::Key => {
                let block = dim.checked_next_multiple_of(l)?.checked_mul(h)?;
                token.checked_div(h)?.checked_mul(block)?.checked_add((token % h).checked_mul(l)?)
            }
            Role::Value => {
                let row = token.checked_rem(self.upper)?;
                let width = self.value_width()?;
                let block = width.checked_mul(dim.checked_next_multiple_of(h)? / h)?;
                let within = row.checked_div(l)?.checked_mul(l.checked_mul(h)?)?.checked_add(row % l)?;
                (token / self.upper).checked_mul(block)?.checked_add(within)
            }
        }
    }

    /// The part that comes from the channel.
    fn channel_index(self, channel: u64) -> Option<u64> {
        let (h, l) = (self.pack_h, self.pack_l);
        match self.role {
            Role::Key => channel.checked_div(l)?.checked_mul(h.checked_mul(l)?)?.checked_add(channel % l),
            Role::Value => {
                channel.checked_div(h)?.checked_mul(self.value_width()?)?.checked_add((channel % h).checked_mul(l)?)
            }
        }
    }

    /// Elements of one block of `pack_h` channels and `upper` tokens.
    fn value_width(self) -> Option<u64> {
        self.upper.checked_next_multiple_of(self.pack_l)?.checked_mul(self.pack_h)
    }

    fn unpack(self, tensor: &Tensor, file: &[u8], range: Range<usize>) -> Result<Vec<u8>> {
        let (shape, size) = (tensor.shape, tensor.dtype.size());
        let damaged = || {
            Error::invalid_input(format!(
                "`{}`: a packed tensor of shape {shape} does not fit the {} bytes of a head",
                tensor.path.display(),
                self.head_bytes
            ))
        };
        // Checked before anything is allocated: all indices differ, so the output is no longer than the file.
        if !self.holds(shape, size) {
            return Err(damaged());
        }
        let index = |index: Option<u64>| index.and_then(|index| usize::try_from(index).ok()).ok_or_else(damaged);
        let channels: Vec<usize> =
            (0..shape.dim as u64).map(|channel| index(self.channel_index(channel))).collect::<Result<_>>()?;
        let head_bytes = index(Some(self.head_bytes))?;
        let mut out = Vec::with_capacity(range.len() * shape.row() * size);
        for token in range {
            let token = index(self.token_index(shape, token as u64))?;
            for head in file.chunks_exact(head_bytes) {
                for channel in &channels {
                    let at = (token + channel) * size;
                    out.extend_from_slice(head.get(at..at + size).ok_or_else(damaged)?);
                }
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use gearbox_core::{DType, ErrorKind};

    use super::*;

    fn tensor(path: &Path, shape: Shape, offset: u64) -> Tensor {
        Tensor { dtype: DType::F16, shape, path: Arc::from(path), offset, layout: Layout::Logical }
    }

    #[test]
    fn map_gives_exactly_the_bytes_of_the_tensor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.bin");
        let bytes: Vec<u8> = (0..40).collect();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(&*tensor(&path, Shape::new(5, 2, 2), 0).map().unwrap(), &bytes[..]);
        assert_eq!(&*tensor(&path, Shape::new(1, 1, 3), 7).map().unwrap(), &bytes[7..13]);
    }

    #[test]
    fn empty_tensor_maps_even_without_a_file() {
        let missing = tensor(Path::new("missing"), Shape::new(0, 2, 64), 0);
        assert!(missing.map().unwrap().is_empty());
        assert_eq!(missing.bytes_len(), 0);
    }

    #[test]
    fn file_that_shrank_is_named_with_expected_and_got() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.bin");
        std::fs::write(&path, [0; 39]).unwrap();
        let error = tensor(&path, Shape::new(5, 2, 2), 0).map().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let expected = format!("`{}`: expected at least 40 bytes, got 39; did the file change?", path.display());
        assert_eq!(error.to_string(), expected);
        assert!(tensor(&path, Shape::new(1, 1, 1), u64::MAX).map().is_err());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(tensor(&path, Shape::new(5, 2, 2), 0).map().unwrap_err().kind(), ErrorKind::Io);
    }

    /// Element `(token, head, channel)` has the value `1000 * token + 100 * head + channel`; padding has the value 65535.
    fn value(token: usize, head: usize, channel: usize) -> u16 {
        u16::try_from(1000 * token + 100 * head + channel).unwrap()
    }

    /// Writes a storage with the block shapes of the specification, one loop per axis, and maps it back.
    fn packed_round_trip(role: Role, shape: Shape, pack_h: usize, pack_l: usize, upper: usize) {
        let mut words = Vec::new();
        let mut put = |head: usize, token: usize, channel: usize| {
            let inside = token < shape.seq && channel < shape.dim;
            words.push(if inside { value(token, head, channel) } else { u16::MAX });
        };
        for head in 0..shape.heads {
            match role {
                Role::Key => {
                    for block in 0..shape.seq.div_ceil(pack_h) {
                        for part in 0..shape.dim.div_ceil(pack_l) {
                            for h in 0..pack_h {
                                for l in 0..pack_l {
                                    put(head, block * pack_h + h, part * pack_l + l);
                                }
                            }
                        }
                    }
                }
                Role::Value => {
                    for block in 0..shape.seq.div_ceil(upper) {
                        for part in 0..shape.dim.div_ceil(pack_h) {
                            for row in 0..upper.div_ceil(pack_l) {
                                for h in 0..pack_h {
                                    for l in 0..pack_l {
                                        let within = row * pack_l + l;
                                        let token = if within < upper { block * upper + within } else { usize::MAX };
                                        put(head, token, part * pack_h + h);
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("packed.bin");
        std::fs::write(&path, words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>()).unwrap();
        let head_bytes = (words.len() / shape.heads * 2) as u64;
        let packed = Packed { role, head_bytes, pack_h: pack_h as u64, pack_l: pack_l as u64, upper: upper as u64 };
        let tensor = Tensor { layout: Layout::Packed(packed), ..tensor(&path, shape, 0) };
        let mapped = tensor.map().unwrap();
        let mut expected = Vec::new();
        for token in 0..shape.seq {
            for head in 0..shape.heads {
                for channel in 0..shape.dim {
                    expected.extend(value(token, head, channel).to_le_bytes());
                }
            }
        }
        assert_eq!(&*mapped, &expected[..], "{role} {shape} {pack_h} {pack_l} {upper}");
    }

    #[test]
    fn packed_tensors_come_back_in_logical_order() {
        for role in Role::ALL {
            for (pack_h, pack_l, upper) in [(8, 1, 64), (8, 4, 64), (4, 2, 3), (1, 1, 1), (8, 8, 5), (24, 1, 17)] {
                for (seq, heads, dim) in [(1, 1, 1), (5, 2, 6), (17, 3, 8), (65, 1, 10)] {
                    packed_round_trip(role, Shape::new(seq, heads, dim), pack_h, pack_l, upper);
                }
            }
        }
    }

    #[test]
    fn packed_shape_beyond_its_head_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("packed.bin");
        std::fs::write(&path, [0; 64]).unwrap();
        let shape = Shape::new(4, 1, 8);
        for role in Role::ALL {
            let good = Packed { role, head_bytes: 64, pack_h: 4, pack_l: 1, upper: 4 };
            assert!(good.holds(shape, 2));
            let bad = [
                Packed { head_bytes: 62, ..good },
                Packed { pack_h: 0, ..good },
                Packed { pack_l: 0, ..good },
                Packed { pack_h: u64::MAX, ..good },
                Packed { pack_l: u64::MAX, ..good },
            ];
            for packed in bad {
                assert!(!packed.holds(shape, 2), "{packed:?}");
                let tensor = Tensor { layout: Layout::Packed(packed), ..tensor(&path, shape, 0) };
                assert_eq!(tensor.map().unwrap_err().kind(), ErrorKind::InvalidInput, "{packed:?}");
            }
        }
    }
}
