//! Reading and writing the small parts of stored bytes.

use gearbox_core::{Error, Result};

/// Bytes that are read from front to back.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// A reader at the start of these bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Bytes that are left.
    pub fn remaining(&self) -> usize {
        self.0.len()
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](gearbox_core::ErrorKind::Corrupt) if fewer are left.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let short = || Error::corrupt(format!("expected {len} more bytes, got {}", self.0.len()));
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(short)?;
        self.0 = rest;
        Ok(taken)
    }

    /// The next byte.
    ///
    /// # Errors
    /// As [`Reader::take`].
    pub fn byte(&mut self) -> Result<u8> {
        self.take(1).map(|taken| taken[0])
    }

    /// A number in LEB128.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](gearbox_core::ErrorKind::Corrupt) if it is cut, above 63 bits or not in its shortest form.
    pub fn number(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..63).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    break;
                }
                return Ok(value);
            }
        }
        Err(Error::corrupt("expected a number in its shortest form"))
    }

    /// A number in LEB128 that is a length in memory.
    ///
    /// # Errors
    /// As [`Reader::number`].
    pub fn length(&mut self) -> Result<usize> {
        let number = self.number()?;
        usize::try_from(number).map_err(|_| Error::corrupt(format!("length {number} is beyond this machine")))
    }

    /// As many numbers as `put_sparse` wrote.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](gearbox_core::ErrorKind::Corrupt) if they are cut or more than `count`.
    pub fn sparse(&mut self, count: usize, numbers: &mut Vec<u64>) -> Result<()> {
        numbers.clear();
        while numbers.len() < count {
            let number = self.number()?;
            let zeros = if number == 0 { self.length()?.saturating_add(1) } else { 0 };
            if zeros > count - numbers.len() {
                return Err(Error::corrupt(format!("expected {count} numbers, got more")));
            }
            if number == 0 {
                numbers.resize(numbers.len() + zeros, 0);
            } else {
                numbers.push(number);
            }
        }
        Ok(())
    }

    /// Makes sure that nothing is left.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](gearbox_core::ErrorKind::Corrupt) if there are more bytes.
    pub fn end(&self) -> Result<()> {
        match self.0.len() {
            0 => Ok(()),
            len => Err(Error::corrupt(format!("expected the end, got {len} more bytes"))),
        }
    }
}

/// Appends a number below 2^63 in LEB128, in its shortest form.
pub fn put_number(mut number: u64, out: &mut Vec<u8>) {
    loop {
        let low = number as u8 & 0x7F;
        number >>= 7;
        if number == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

/// Appends numbers of which many are 0: each in LEB128, and behind a 0 how many more of them follow.
pub fn put_sparse(numbers: impl IntoIterator<Item = u64>, out: &mut Vec<u8>) {
    let mut zeros = 0;
    let end_run = |zeros: &mut u64, out: &mut Vec<u8>| {
        if *zeros > 0 {
            out.push(0);
            put_number(*zeros - 1, out);
            *zeros = 0;
        }
    };
    for number in numbers {
        if number == 0 {
            zeros += 1;
        } else {
            end_run(&mut zeros, out);
            put_number(number, out);
        }
    }
    end_run(&mut zeros, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_in_their_shortest_form_only() {
        for number in [0, 1, 127, 128, 16_383, 16_384, u64::from(u32::MAX), (1 << 63) - 1] {
            let mut bytes = Vec::new();
            put_number(number, &mut bytes);
            bytes.push(7);
            let mut reader = Reader::new(&bytes);
            assert_eq!((reader.number().unwrap(), reader.remaining()), (number, 1));
        }
        for refused in [&[][..], &[0x80], &[0x80, 0], &[0xFF; 20]] {
            assert!(Reader::new(refused).number().is_err(), "{refused:?}");
        }
    }

    #[test]
    fn sparse_numbers_come_back_and_take_two_bytes_per_run_of_zeros() {
        let mut numbers = vec![0; 1000];
        (numbers[3], numbers[4], numbers[700]) = (5, 1 << 40, 1);
        let mut bytes = Vec::new();
        put_sparse(numbers.iter().copied(), &mut bytes);
        assert_eq!(bytes.len(), 2 + 1 + 6 + 3 + 1 + 3);
        let mut got = Vec::new();
        let mut reader = Reader::new(&bytes);
        reader.sparse(1000, &mut got).unwrap();
        assert_eq!((got, reader.remaining()), (numbers, 0));
        assert!(Reader::new(&bytes).sparse(999, &mut Vec::new()).is_err(), "the last run is one too long");
        assert!(Reader::new(&bytes).sparse(1001, &mut Vec::new()).is_err(), "one number is missing");
    }
}
