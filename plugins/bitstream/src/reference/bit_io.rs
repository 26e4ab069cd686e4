//! Streams of bits that start at the highest bit of their first byte.

/// Appends bits.
#[derive(Debug)]
pub struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    /// Bits that are no whole byte yet, in the lowest `held` bits.
    word: u64,
    held: u32,
}

impl<'a> BitWriter<'a> {
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out, word: 0, held: 0 }
    }

    /// Appends the lowest `len` bits, at most 63, the highest of them first.
    pub fn put(&mut self, bits: u64, len: u32) {
        // Up to 7 bits are held, so 32 more always fit.
        if len > 32 {
            self.put(bits >> 32, len - 32);
            return self.put(bits & u64::from(u32::MAX), 32);
        }
        self.word = self.word << len | bits;
        self.held += len;
        while self.held >= 8 {
            self.held -= 8;
            self.out.push((self.word >> self.held) as u8);
        }
    }

    /// Appends zero bits up to a whole byte.
    pub fn finish(mut self) {
        if self.held > 0 {
            self.put(0, 8 - self.held);
        }
    }
}

/// The 64 bits from bit `at` on, the first of them highest; zeros behind the end.
pub fn peek(bytes: &[u8], at: usize) -> u64 {
    let rest = bytes.get(at / 8..).unwrap_or_default();
    let mut nine = [0; 9];
    let len = rest.len().min(9);
    nine[..len].copy_from_slice(&rest[..len]);
    let [first @ .., last] = nine;
    let shift = at % 8;
    u64::from_be_bytes(first) << shift | u64::from(last) << shift >> 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_come_back_from_every_place() {
        let mut bytes = Vec::new();
        let mut writer = BitWriter::new(&mut bytes);
        writer.put(0b101, 3);
        writer.put(0x0123_4567_89AB_CDEF, 63);
        writer.put(1, 1);
        writer.finish();
        assert_eq!(bytes.len(), 9);
        assert_eq!(peek(&bytes, 0) >> 61, 0b101);
        assert_eq!(peek(&bytes, 3) >> 1, 0x0123_4567_89AB_CDEF);
        assert_eq!(peek(&bytes, 66), 1 << 63);
        assert_eq!((peek(&bytes, 67), peek(&bytes, 1000)), (0, 0));
    }
}
