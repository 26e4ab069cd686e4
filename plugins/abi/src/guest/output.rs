//! Where an encoder writes.

use std::mem::MaybeUninit;

use gearbox_core::{Error, ErrorKind, Result};

/// A buffer of the host that an encoder fills from its start. It has room for what
/// [`Codec::max_encoded_len`](gearbox_core::Codec::max_encoded_len) promised, and no more.
#[derive(Debug)]
pub struct Output<'a> {
    spare: &'a mut [MaybeUninit<u8>],
    len: usize,
}

impl<'a> Output<'a> {
    /// A buffer without contents.
    pub fn new(spare: &'a mut [MaybeUninit<u8>]) -> Self {
        Self { spare, len: 0 }
    }

    /// Bytes written.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is written yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that still fit.
    pub fn remaining(&self) -> usize {
        self.spare.len() - self.len
    }

    fn room(&mut self, len: usize) -> Result<&mut [MaybeUninit<u8>]> {
        let (start, remaining) = (self.len, self.remaining());
        if len > remaining {
            return Err(Error::new(
                ErrorKind::WrongLength,
                format!(
                    "expected at most the {} bytes that `max_encoded_len` promised, got {start} and {len} more",
                    self.spare.len()
                ),
            ));
        }
        self.len += len;
        Ok(&mut self.spare[start..start + len])
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`ErrorKind::WrongLength`] if they do not fit; nothing is written then.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) -> Result<()> {
        self.room(bytes.len())?.write_copy_of_slice(bytes);
        Ok(())
    }

    /// Appends zeros and returns them, to be overwritten.
    ///
    /// # Errors
    /// As [`Output::extend_from_slice`].
    pub fn zeroed(&mut self, len: usize) -> Result<&mut [u8]> {
        let room = self.room(len)?;
        room.fill(MaybeUninit::new(0));
        // SAFETY: every byte was written in the line above.
        Ok(unsafe { room.assume_init_mut() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_never_takes_more_than_fits() {
        let mut room = [MaybeUninit::uninit(); 5];
        let mut out = Output::new(&mut room);
        out.extend_from_slice(&[1, 2]).unwrap();
        out.zeroed(2).unwrap()[1] = 7;
        let error = out.extend_from_slice(&[3, 4]).unwrap_err();
        assert_eq!(error.to_string(), "expected at most the 5 bytes that `max_encoded_len` promised, got 4 and 2 more");
        assert_eq!((out.len(), out.remaining(), out.is_empty()), (4, 1, false));
    }
}
