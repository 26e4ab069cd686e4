//! Side information: an adaptive binary arithmetic coder for what is small and has to be known before the symbols, such as tables.
//!
//! One description of a format serves both directions: [`Side::bit`] writes the bit it is given, or ignores it and returns the one it
//! reads.

use gearbox_core::{Error, Result};

/// The probability of a one in 65536ths; follows what it sees.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bit(u16);

impl Default for Bit {
    fn default() -> Self {
        Self(1 << 15)
    }
}

impl Bit {
    /// How fast it follows: a sixteenth of the way.
    const RATE: u32 = 4;

    fn learn(&mut self, bit: bool) {
        if bit {
            self.0 += (u16::MAX - self.0) >> Self::RATE;
        } else {
            self.0 -= self.0 >> Self::RATE;
        }
    }

    /// Splits an interval; both parts hold at least one number because the ends differ in their top byte.
    fn split(self, low: u32, high: u32) -> u32 {
        // Away from the ends, where a part could become empty.
        let p = self.0.clamp(64, u16::MAX - 64);
        low + ((u64::from(high - low) * u64::from(p)) >> 16) as u32
    }
}

/// Writes or reads side information.
pub(crate) trait Side {
    /// Codes one bit, of which a reader knows nothing beforehand.
    fn bit(&mut self, model: &mut Bit, bit: bool) -> bool;

    /// Codes `bits` bits of a number without a model, highest first.
    fn raw(&mut self, bits: u32, value: u32) -> u32 {
        (0..bits).rev().fold(0, |read, i| read << 1 | u32::from(self.bit(&mut Bit::default(), value >> i & 1 == 1)))
    }

    /// Codes a number as the length of its digits, each with its model, and the digits.
    fn number(&mut self, models: &mut [Bit; 32], value: u32) -> u32 {
        let value = u64::from(value) + 1;
        let len = value.ilog2();
        let mut read = 0;
        while read < 32 && self.bit(&mut models[read as usize], read < len) {
            read += 1;
        }
        let digits = (0..read)
            .rev()
            .fold(1_u64, |digits, i| digits << 1 | u64::from(self.bit(&mut Bit::default(), value >> i & 1 == 1)));
        (digits - 1) as u32
    }
}

/// Writes.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    low: u32,
    high: u32,
    out: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Appends to `out`.
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        Self { low: 0, high: u32::MAX, out }
    }

    /// Writes what is needed to tell the last bits.
    pub fn finish(self) {
        // The top bytes differ, so this byte followed by zeros lies in the interval; zeros are what a reader sees behind the end.
        self.out.push((self.low >> 24) as u8 + 1);
    }
}

impl Side for Writer<'_> {
    fn bit(&mut self, model: &mut Bit, bit: bool) -> bool {
        let middle = model.split(self.low, self.high);
        if bit {
            self.high = middle;
        } else {
            self.low = middle + 1;
        }
        model.learn(bit);
        while (self.low ^ self.high) >> 24 == 0 {
            self.out.push((self.low >> 24) as u8);
            self.low <<= 8;
            self.high = self.high << 8 | 0xFF;
        }
        bit
    }
}

/// Reads.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    low: u32,
    high: u32,
    value: u32,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Reads from `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        let mut reader = Self { low: 0, high: u32::MAX, value: 0, bytes, at: 0 };
        for _ in 0..4 {
            reader.shift();
        }
        reader
    }

    fn shift(&mut self) {
        let byte = self.bytes.get(self.at).copied().unwrap_or_default();
        self.value = self.value << 8 | u32::from(byte);
        self.at += 1;
    }

    /// Checks that the bytes ended where a writer ends them.
    pub fn finish(self) -> Result<()> {
        // A writer ends with one byte; the reader is three ahead of it.
        let expected = self.at.saturating_sub(3);
        if self.bytes.len() == expected {
            return Ok(());
        }
        Err(Error::corrupt(format!("side information: expected {expected} bytes, got {}", self.bytes.len())))
    }
}

impl Side for Reader<'_> {
    fn bit(&mut self, model: &mut Bit, _: bool) -> bool {
        let middle = model.split(self.low, self.high);
        let bit = self.value <= middle;
        if bit {
            self.high = middle;
        } else {
            self.low = middle + 1;
        }
        model.learn(bit);
        while (self.low ^ self.high) >> 24 == 0 {
            self.shift();
            self.low <<= 8;
            self.high = self.high << 8 | 0xFF;
        }
        bit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe(side: &mut impl Side, values: &[u32]) -> Vec<u32> {
        let mut models = [Bit::default(); 32];
        let mut skewed = Bit::default();
        let mut read = Vec::new();
        for value in values {
            read.push(side.number(&mut models, *value));
            read.push(side.raw(11, value & 0x7FF));
            read.push(u32::from(side.bit(&mut skewed, false)));
        }
        read
    }

    #[test]
    fn reader_returns_what_was_written() {
        for values in [&[][..], &[0], &[u32::MAX; 9], &[0; 1000], &[1, 2, 3, 1 << 31, 5, 80, 65535, 65536]] {
            let mut bytes = Vec::new();
            let mut writer = Writer::new(&mut bytes);
            let written = describe(&mut writer, values);
            writer.finish();
            let mut reader = Reader::new(&bytes);
            assert_eq!(describe(&mut reader, &vec![7; values.len()]), written);
            reader.finish().unwrap();
            bytes.push(0);
            let mut reader = Reader::new(&bytes);
            describe(&mut reader, values);
            reader.finish().unwrap_err();
        }
    }
}
