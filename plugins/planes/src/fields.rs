//! Floats as one symbol of eight bits and the rest.
//!
//! The symbol is `sign << 7 | exponent code << 2 | top two bits of the mantissa`. An F16 exponent is its own code. The wider exponents of
//! Bf16 and F32 have code 0 for exponent 0, codes 1 to 30 for thirty exponents in a row from a *base* on, and code 31 for all others,
//! which are listed apart as exceptions. The rest of the mantissa lies in planes of one number per element:
//!
//! | Type | Planes |
//! |---|---|
//! | F16 | 8 bits |
//! | Bf16 | 5 bits |
//! | F32 | 5, 8 and 8 bits, highest first |

use gearbox_core::DType;

/// Code of an exponent that is listed apart.
const ELSEWHERE: u8 = 31;

/// Exponents with a code of their own, zero apart.
const WINDOW: usize = 30;

/// Most planes that a type has.
pub(crate) const MAX_PLANES: usize = 3;

/// How elements of a chunk are taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fields {
    dtype: DType,
    /// The exponent of code 1; 1 for F16.
    pub base: u8,
}

/// The planes behind the symbols.
pub(crate) type Planes = [Vec<u8>; MAX_PLANES];

impl Fields {
    /// Fields with a base, which is ignored for F16.
    pub fn new(dtype: DType, base: u8) -> Self {
        Self { dtype, base: if dtype == DType::F16 { 1 } else { base.max(1) } }
    }

    /// Fields for these elements: the base is the one that leaves the fewest exceptions.
    pub fn of(dtype: DType, bytes: &[u8]) -> Self {
        if dtype == DType::F16 {
            return Self::new(dtype, 1);
        }
        let mut counts = [0_u32; 256];
        let size = dtype.size();
        for element in bytes.chunks_exact(size) {
            let top = u16::from_le_bytes([element[size - 2], element[size - 1]]);
            counts[usize::from(top >> 7 & 0xFF)] += 1;
        }
        let covered = |base: usize| counts[base..(base + WINDOW).min(256)].iter().sum::<u32>();
        // The lowest of several equally good ones.
        let base = (1..=255).rev().max_by_key(|&base| covered(base)).unwrap_or(1);
        Self::new(dtype, base as u8)
    }

    /// Bits of each plane.
    pub fn widths(self) -> &'static [u8] {
        match self.dtype {
            DType::F16 => &[8],
            DType::Bf16 => &[5],
            _ => &[5, 8, 8],
        }
    }

    /// Code of an exponent of Bf16 or F32.
    fn code(self, exponent: u8) -> u8 {
        let offset = exponent.wrapping_sub(self.base);
        let code = if usize::from(offset) < WINDOW { offset + 1 } else { ELSEWHERE };
        if exponent == 0 { 0 } else { code }
    }

    /// The exponent of a code, which is arbitrary for exceptions.
    fn exponent(self, code: u8) -> u8 {
        if code == 0 { 0 } else { self.base.wrapping_add(code - 1) }
    }

    /// Takes elements apart, replacing what the planes held. `symbols` are appended.
    pub fn split(self, bytes: &[u8], symbols: &mut Vec<u8>, planes: &mut Planes) {
        let [first, second, third] = planes;
        let count = bytes.len() / self.dtype.size();
        let at = symbols.len();
        symbols.resize(at + count, 0);
        let symbols = &mut symbols[at..];
        first.resize(count, 0);
        if self.dtype.size() == 2 {
            let elements = bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
            let pairs = symbols.iter_mut().zip(first.iter_mut());
            if self.dtype == DType::F16 {
                for (element, (symbol, rest)) in elements.zip(pairs) {
                    (*symbol, *rest) = ((element >> 8) as u8, element as u8);
                }
                return;
            }
            for (element, (symbol, rest)) in elements.zip(pairs) {
                *symbol = self.symbol(element);
                *rest = (element & 0x1F) as u8;
            }
            return;
        }
        second.resize(count, 0);
        third.resize(count, 0);
        let elements = bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
        let pairs = symbols.iter_mut().zip(first.iter_mut()).zip(second.iter_mut().zip(third.iter_mut()));
        for (element, ((symbol, first), (second, third))) in elements.zip(pairs) {
            let top = (element >> 16) as u16;
            *symbol = self.symbol(top);
            (*first, *second, *third) = ((top & 0x1F) as u8, (element >> 8) as u8, element as u8);
        }
    }

    /// Symbol of the upper 16 bits of a Bf16 or F32.
    fn symbol(self, top: u16) -> u8 {
        (top >> 8 & 0x80) as u8 | self.code((top >> 7) as u8) << 2 | (top >> 5 & 3) as u8
    }

    /// Puts elements together; exceptions are set afterwards with [`Fields::set_exponent`].
    pub fn merge(self, symbols: &[u8], planes: [&[u8]; MAX_PLANES], out: &mut [u8]) {
        let [first, second, third] = planes;
        let pairs = symbols.iter().zip(first);
        match self.dtype {
            DType::F16 => {
                for (out, (symbol, rest)) in out.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
                    *out = [*rest, *symbol];
                }
            }
            DType::Bf16 => {
                for (out, (symbol, rest)) in out.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
                    *out = self.top(*symbol, *rest).to_le_bytes();
                }
            }
            _ => {
                let lower = second.iter().zip(third);
                for ((out, (symbol, rest)), (second, third)) in
                    out.as_chunks_mut::<4>().0.iter_mut().zip(pairs).zip(lower)
                {
                    let [low, high] = self.top(*symbol, *rest).to_le_bytes();
                    *out = [*third, *second, low, high];
                }
            }
        }
    }

    /// Upper 16 bits of a Bf16 or F32.
    fn top(self, symbol: u8, rest: u8) -> u16 {
        let exponent = u16::from(self.exponent(symbol >> 2 & 0x1F));
        u16::from(symbol & 0x80) << 8 | exponent << 7 | u16::from(symbol & 3) << 5 | u16::from(rest & 0x1F)
    }

    /// Exponents that have no code, with the index of their element.
    pub fn exceptions<'a>(self, bytes: &'a [u8], symbols: &'a [u8]) -> impl Iterator<Item = (usize, u8)> + 'a {
        let size = self.dtype.size();
        let elsewhere = |symbol: u8| symbol >> 2 & 0x1F == ELSEWHERE;
        let symbols = if self.dtype == DType::F16 { &[] } else { symbols };
        // Most chunks have none: looking at the symbols alone is quick.
        let found = symbols.iter().enumerate().filter(move |(_, symbol)| elsewhere(**symbol));
        found.map(move |(idx, _)| {
            let end = (idx + 1) * size;
            (idx, (u16::from_le_bytes([bytes[end - 2], bytes[end - 1]]) >> 7) as u8)
        })
    }

    /// Replaces the exponent of an element of Bf16 or F32.
    pub fn set_exponent(self, element: &mut [u8], exponent: u8) {
        if let Some(top) = element.last_chunk_mut::<2>().filter(|_| self.dtype != DType::F16) {
            let value = u16::from_le_bytes(*top) & 0x807F | u16::from(exponent) << 7;
            *top = value.to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_comes_back() {
        let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let words: Vec<u8> = (0..1 << 17).flat_map(|i: u32| (i.wrapping_mul(0x9E37_79B1)).to_le_bytes()).collect();
        for (dtype, bytes) in [(DType::F16, &halves), (DType::Bf16, &halves), (DType::F32, &words)] {
            for base in [1, 100, 250] {
                let fields = Fields::new(dtype, base);
                let (mut symbols, mut planes) = (Vec::new(), Planes::default());
                fields.split(bytes, &mut symbols, &mut planes);
                for (plane, width) in planes.iter().zip(fields.widths()) {
                    assert!(plane.iter().all(|rest| u32::from(*rest) < 1 << width));
                }
                let mut out = vec![0; bytes.len()];
                fields.merge(&symbols, planes.each_ref().map(|plane| &plane[..]), &mut out);
                for (idx, exponent) in fields.exceptions(bytes, &symbols) {
                    fields.set_exponent(&mut out[idx * dtype.size()..(idx + 1) * dtype.size()], exponent);
                }
                assert!(out == *bytes, "{dtype} with base {base}");
            }
        }
    }

    #[test]
    fn base_covers_what_occurs() {
        let bytes: Vec<u8> = [1.0_f32, 0.0, 1e-4, 3.0e4].iter().flat_map(|x| x.to_le_bytes()).collect();
        let fields = Fields::of(DType::F32, &bytes);
        let (mut symbols, mut planes) = (Vec::new(), Planes::default());
        fields.split(&bytes, &mut symbols, &mut planes);
        assert_eq!(fields.exceptions(&bytes, &symbols).count(), 0);
        assert_eq!(Fields::of(DType::F16, &bytes).base, 1);
    }
}
