//! Temporary files that host and worker both map: what one writes, the other reads without a system call.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use memmap2::MmapMut;
use serde::{Deserialize, Serialize};

use crate::dump::map_shared;

/// Every part starts at a multiple of this: enough for any vector instruction.
const ALIGN: usize = 64;
/// The least bytes that are mapped: most calls of a sweep fit, and a map of untouched pages costs nothing.
const LEAST: usize = 1 << 20;
/// Bytes behind a buffer that a plugin fills, of which none may change.
pub const GUARD: usize = 64;
/// What those bytes hold: a value that neither zeroing nor copying tensors is likely to leave there.
const GUARD_BYTE: u8 = 0xA7;

/// Where bytes lie in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// First byte.
    pub at: usize,
    /// Number of bytes.
    pub len: usize,
}

/// A file and the map of its first bytes; it grows and never shrinks.
#[derive(Debug)]
pub struct Buffer {
    file: File,
    map: MmapMut,
    /// Where the worker opens it.
    path: PathBuf,
    /// Where it has a name in a folder: it loses it when both sides have opened it.
    named: Option<tempfile::TempPath>,
}

impl Buffer {
    /// Makes an empty one in memory, without a name in any folder, that nobody can shorten under its maps.
    #[cfg(target_os = "linux")]
    pub fn create() -> io::Result<Self> {
        use std::os::fd::AsRawFd;

        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

        let file = File::from(memfd_create("gearbox", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        fcntl_add_seals(&file, SealFlags::SHRINK)?;
        file.set_len(LEAST as u64)?;
        let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
        Ok(Self { map: map_shared(&file, LEAST)?, file, path, named: None })
    }

    /// Makes an empty one in the folder for temporary files, readable by its owner alone.
    #[cfg(not(target_os = "linux"))]
    pub fn create() -> io::Result<Self> {
        let (file, named) = tempfile::NamedTempFile::with_prefix("gearbox-")?.into_parts();
        file.set_len(LEAST as u64)?;
        let path = named.to_path_buf();
        Ok(Self { map: map_shared(&file, LEAST)?, file, path, named: Some(named) })
    }

    /// Opens the one that the host made.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self { map: map_shared(&file, LEAST)?, file, path: path.to_path_buf(), named: None })
    }

    /// Where the worker opens it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the name away: both sides have opened it.
    pub fn opened(&mut self) {
        drop(self.named.take());
    }

    /// Grows file and map to hold `len` bytes; what is there stays.
    pub fn grow(&mut self, len: usize) -> io::Result<()> {
        if len > self.map.len() {
            let wanted = len.checked_next_power_of_two().ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
            if self.file.metadata()?.len() < wanted as u64 {
                self.file.set_len(wanted as u64)?;
            }
            self.map = map_shared(&self.file, wanted)?;
        }
        Ok(())
    }

    /// Maps the first `len` bytes, which the other side has made.
    pub fn follow(&mut self, len: usize) -> io::Result<()> {
        if len > self.map.len() {
            self.map = map_shared(&self.file, len.next_power_of_two())?;
        }
        Ok(())
    }

    /// Everything that is mapped.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Makes room for `len` bytes with a guard behind them.
    pub fn guarded(&mut self, len: usize) -> io::Result<Guarded<'_>> {
        let end = len.checked_add(GUARD).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        self.grow(end)?;
        let (bytes, guard) = self.map[..end].split_at_mut(len);
        guard.fill(GUARD_BYTE);
        Ok(Guarded { bytes, guard })
    }

    /// Starts writing parts from the first byte on.
    pub fn rewrite(&mut self) -> Parts<'_> {
        Parts { buffer: self, used: 0 }
    }
}

/// A buffer that a plugin fills, and what lies behind it.
#[derive(Debug)]
pub struct Guarded<'a> {
    /// The bytes to fill; they hold what an earlier call left there.
    pub bytes: &'a mut [u8],
    guard: &'a [u8],
}

impl Guarded<'_> {
    /// Whether nothing was written behind the end.
    pub fn holds(&self) -> bool {
        self.guard.iter().all(|byte| *byte == GUARD_BYTE)
    }
}

/// Parts that are written one behind the other.
#[derive(Debug)]
pub struct Parts<'a> {
    buffer: &'a mut Buffer,
    used: usize,
}

impl Parts<'_> {
    /// Room for the next part.
    fn room(&mut self, len: usize) -> io::Result<(Part, &mut [u8])> {
        let at = self.used.next_multiple_of(ALIGN);
        let end = at.checked_add(len).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        self.buffer.grow(end)?;
        self.used = end;
        Ok((Part { at, len }, &mut self.buffer.map[at..end]))
    }

    /// Bytes up to the end of the last part.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Writes bytes.
    pub fn put(&mut self, bytes: &[u8]) -> io::Result<Part> {
        let (part, room) = self.room(bytes.len())?;
        room.copy_from_slice(bytes);
        Ok(part)
    }

    /// Writes numbers of four bytes, little-endian.
    pub fn put_words<T: Copy>(&mut self, words: &[T], bytes: impl Fn(T) -> [u8; 4]) -> io::Result<Part> {
        let len = words.len().checked_mul(4).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let (part, room) = self.room(len)?;
        for (place, word) in room.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *place = bytes(*word);
        }
        Ok(part)
    }
}

/// The bytes of a part, if they lie within what is mapped.
pub fn part(bytes: &[u8], part: Part) -> Option<&[u8]> {
    bytes.get(part.at..part.at.checked_add(part.len)?)
}
