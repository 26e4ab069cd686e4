//! Where a container is read from.

use std::fs::File;

use crate::{Error, ErrorKind, Result};

/// Bytes that can be read at any place, by many threads at once.
///
/// A file is read piece by piece, so the memory of a reader does not grow with the container.
pub trait ReadAt: Sync {
    /// Number of bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the system does not tell.
    fn size(&self) -> Result<u64>;

    /// Fills `out` from `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the bytes end before; [`ErrorKind::Io`] if reading fails.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()>;
}

impl ReadAt for &[u8] {
    fn size(&self) -> Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = self.get(start..).and_then(|rest| rest.get(..out.len()));
        out.copy_from_slice(found.ok_or_else(|| ends_before(offset, out.len()))?);
        Ok(())
    }
}

impl ReadAt for File {
    fn size(&self) -> Result<u64> {
        Ok(self.metadata().map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?.len())
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        read_exact_at(self, offset, out).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => ends_before(offset, out.len()),
            _ => Error::new(ErrorKind::Io, error.to_string()),
        })
    }
}

fn ends_before(offset: u64, len: usize) -> Error {
    Error::corrupt(format!("the file ends before byte {}", offset.saturating_add(len as u64)))
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> std::io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read => {
                out = &mut out[read..];
                offset += read as u64;
            }
        }
    }
    Ok(())
}
