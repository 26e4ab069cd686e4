//! Where containers go.

use std::io::{self, Write};

/// Takes the bytes of a container front to back. Everything that can be written to does; [`Parts`] copies less.
pub trait Sink {
    /// Takes a copy of bytes.
    ///
    /// # Errors
    /// If it takes no more.
    fn put(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Takes bytes that nobody needs any more.
    ///
    /// # Errors
    /// As [`Sink::put`].
    fn give(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        self.put(&bytes)
    }

    /// Is told that it has all of them.
    ///
    /// # Errors
    /// If some of them were lost.
    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<W: Write> Sink for W {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn end(&mut self) -> io::Result<()> {
        self.flush()
    }
}

/// A container in memory as the parts that it was made of, for who copies it to a place of the right size.
///
/// # Examples
/// ```
/// use gearbox_core::container::{Parts, Sink};
///
/// let mut parts = Parts::default();
/// parts.put(b"ab")?;
/// parts.put(b"c")?;
/// parts.give(b"def".to_vec())?;
/// parts.put(b"g")?;
/// let mut whole = vec![0; parts.len()];
/// parts.copy_to(&mut whole);
/// assert_eq!(whole, b"abcdefg");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Parts {
    closed: Vec<Vec<u8>>,
    /// What comes behind them.
    open: Vec<u8>,
    len: usize,
}

impl Parts {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies all bytes, and lets go of each part at once.
    ///
    /// # Panics
    /// If there is room for another number of bytes.
    pub fn copy_to(self, mut out: &mut [u8]) {
        for part in self.closed.into_iter().chain([self.open]) {
            let (here, rest) = out.split_at_mut(part.len());
            here.copy_from_slice(&part);
            out = rest;
        }
        assert!(out.is_empty(), "{} bytes too many", out.len());
    }
}

impl Sink for Parts {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.open.extend_from_slice(bytes);
        self.len += bytes.len();
        Ok(())
    }

    fn give(&mut self, mut bytes: Vec<u8>) -> io::Result<()> {
        // Chunks are encoded into buffers that would hold them uncompressed; a small one would keep such a place from the next.
        if bytes.len() < bytes.capacity() / 2 {
            return self.put(&bytes);
        }
        bytes.shrink_to_fit();
        self.len += bytes.len();
        self.closed.push(std::mem::take(&mut self.open));
        self.closed.push(bytes);
        Ok(())
    }
}
