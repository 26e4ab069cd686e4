//! Elements as streams of small symbols, and back.
//!
//! A [`Field`] names bits of every element; the symbols of its stream are the values of these bits, in element order. In memory a symbol
//! takes one byte up to 8 bits and two little-endian bytes above, as [`Elem::Bits`] does.

use gearbox_core::{Elem, Error, ErrorKind, Result, bits};
use pulp::{Arch, Simd, WithSimd};

use crate::wire::Reader;

/// Bits of every element that form one stream of symbols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Position of the lowest bit within the element.
    pub shift: u8,
    /// Number of bits, 1 to 12.
    pub bits: u8,
}

impl Field {
    const fn new(shift: u8, bits: u8) -> Self {
        Self { shift, bits }
    }

    /// Bytes of one symbol in memory.
    pub fn symbol_size(self) -> usize {
        symbol_size(self.bits)
    }

    /// Whether the symbols in memory are the elements themselves.
    fn is_whole(self, elem: Elem) -> bool {
        let width = match elem {
            Elem::Bits(bits) => usize::from(bits),
            _ => 8 * elem.size(),
        };
        self.shift == 0 && usize::from(self.bits) == width && self.symbol_size() == elem.size()
    }

    /// Bytes of a raw stream of `count` symbols.
    pub fn raw_len(self, count: usize) -> usize {
        planes(self).fold(0, |len: usize, plane| len.saturating_add(bits::packed_len(plane.bits, count)))
    }
}

/// Bytes of one symbol of so many bits in memory.
pub fn symbol_size(bits: u8) -> usize {
    if bits <= 8 { 1 } else { 2 }
}

/// The values of symbols of so many bits.
pub fn values(symbols: &[u8], bits: u8) -> impl Iterator<Item = u16> {
    symbols
        .chunks_exact(symbol_size(bits))
        .map(|symbol| symbol.iter().rev().fold(0, |value, byte| value << 8 | u16::from(*byte)))
}

/// The fields of an element type: sign, exponent and mantissa apart, integers by bytes.
///
/// The sign is as good as random and would only double the alphabet of the exponents.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for widths that no element has.
pub fn fields(elem: Elem) -> Result<Vec<Field>> {
    Ok(match elem {
        Elem::F16 => vec![Field::new(10, 5), Field::new(15, 1), Field::new(0, 10)],
        Elem::Bf16 => vec![Field::new(7, 8), Field::new(15, 1), Field::new(0, 7)],
        Elem::F32 => vec![Field::new(23, 8), Field::new(31, 1), Field::new(11, 12), Field::new(0, 11)],
        other => return integer_fields(other),
    })
}

/// The fields of an element type as the reference has them: sign and exponent are one symbol.
///
/// # Errors
/// As [`fields`].
pub fn reference_fields(elem: Elem) -> Result<Vec<Field>> {
    Ok(match elem {
        Elem::F16 => vec![Field::new(10, 6), Field::new(0, 10)],
        Elem::Bf16 => vec![Field::new(7, 9), Field::new(0, 7)],
        Elem::F32 => vec![Field::new(23, 9), Field::new(11, 12), Field::new(0, 11)],
        other => return integer_fields(other),
    })
}

fn integer_fields(elem: Elem) -> Result<Vec<Field>> {
    let bytes = |count: u8| (0..count).rev().map(|byte| Field::new(8 * byte, 8)).collect();
    match elem {
        Elem::U8 | Elem::U16 | Elem::U32 => Ok(bytes(elem.size() as u8)),
        Elem::Bits(width @ 1..=12) => Ok(vec![Field::new(0, width)]),
        Elem::Bits(width @ 13..=16) => Ok(vec![Field::new(8, width - 8), Field::new(0, 8)]),
        other => Err(Error::unsupported(format!("expected elements of a known width, got {other}"))),
    }
}

/// Refuses elements of [`Elem::Bits`] that are above their width.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] with the width.
pub fn check_range(elem: Elem, elements: &[u8]) -> Result<()> {
    let Elem::Bits(width) = elem else { return Ok(()) };
    let all = if elem.size() == 1 {
        u16::from(elements.iter().fold(0, |all, element| all | element))
    } else {
        elements.as_chunks().0.iter().fold(0, |all, element| all | u16::from_le_bytes(*element))
    };
    if u32::from(all) >> width == 0 {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidInput, format!("expected elements of {width} bits, got one above")))
}

/// A buffer for the symbols of one stream.
#[derive(Debug, Default)]
pub struct SymbolBuffer(Vec<u8>);

impl SymbolBuffer {
    /// The symbols of a field; they are the elements themselves where that is possible.
    pub fn gather<'a>(&'a mut self, elements: &'a [u8], elem: Elem, field: Field) -> &'a [u8] {
        if field.is_whole(elem) {
            return elements;
        }
        gather(elements, elem.size(), field, &mut self.0);
        &self.0
    }

    /// Lets `fill` write the symbols of a field and puts them into `elements`, which are zero there.
    ///
    /// # Errors
    /// What `fill` reports.
    pub fn scatter(
        &mut self,
        elements: &mut [u8],
        elem: Elem,
        field: Field,
        fill: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        if field.is_whole(elem) {
            return fill(elements);
        }
        self.0.resize(elements.len() / elem.size() * field.symbol_size(), 0);
        fill(&mut self.0)?;
        scatter(&self.0, field.symbol_size(), field.shift, elements, elem.size());
        Ok(())
    }

    /// Appends symbols as they are: planes of 8, 4, 2 and 1 bits from the lowest bit up, each packed by itself.
    ///
    /// Those widths are packed many at a time; ten bits in a row are not.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if a symbol is wider than the field.
    pub fn put_raw(&mut self, symbols: &[u8], field: Field, out: &mut Vec<u8>) -> Result<()> {
        for plane in planes(field) {
            if plane.bits == field.bits {
                bits::pack(plane.bits, symbols, out)?;
            } else {
                gather(symbols, field.symbol_size(), plane, &mut self.0);
                bits::pack(plane.bits, &self.0, out)?;
            }
        }
        Ok(())
    }

    /// Puts symbols that [`SymbolBuffer::put_raw`] wrote into `elements`, which are zero there.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the bytes end early or are padded with other bits than zeros.
    pub fn take_raw(&mut self, from: &mut Reader<'_>, elements: &mut [u8], elem: Elem, field: Field) -> Result<()> {
        let count = elements.len() / elem.size();
        for plane in planes(field) {
            self.0.resize(count, 0);
            bits::unpack(plane.bits, from.take(bits::packed_len(plane.bits, count))?, &mut self.0)?;
            scatter(&self.0, 1, field.shift + plane.shift, elements, elem.size());
        }
        Ok(())
    }
}

/// The planes of a raw stream, as fields of its symbols.
fn planes(field: Field) -> impl Iterator<Item = Field> {
    let mut shift = 0;
    [8, 4, 2, 1].into_iter().filter(move |width| field.bits & width != 0).map(move |bits| {
        shift += bits;
        Field { shift: shift - bits, bits }
    })
}

/// Replaces `out` by the values of a field.
fn gather(elements: &[u8], size: usize, field: Field, out: &mut Vec<u8>) {
    out.resize(elements.len() / size * field.symbol_size(), 0);
    match (size, field.symbol_size()) {
        (1, _) => gather_as::<1, 1>(elements, field, out),
        (2, 1) => gather_as::<2, 1>(elements, field, out),
        (2, _) => gather_as::<2, 2>(elements, field, out),
        (_, 1) => gather_as::<4, 1>(elements, field, out),
        _ => gather_as::<4, 2>(elements, field, out),
    }
}

fn gather_as<const FROM: usize, const TO: usize>(elements: &[u8], field: Field, out: &mut [u8]) {
    let mask = u32::MAX >> (32 - field.bits);
    vectorized(
        #[inline(always)]
        || {
            for (to, from) in out.as_chunks_mut::<TO>().0.iter_mut().zip(elements.as_chunks::<FROM>().0) {
                *to = narrow(widen(*from) >> field.shift & mask);
            }
        },
    );
}

/// Adds symbols, shifted, to elements whose bits there are zero.
fn scatter(symbols: &[u8], symbol_size: usize, shift: u8, elements: &mut [u8], size: usize) {
    match (symbol_size, size) {
        (_, 1) => scatter_as::<1, 1>(symbols, shift, elements),
        (1, 2) => scatter_as::<1, 2>(symbols, shift, elements),
        (_, 2) => scatter_as::<2, 2>(symbols, shift, elements),
        (1, _) => scatter_as::<1, 4>(symbols, shift, elements),
        _ => scatter_as::<2, 4>(symbols, shift, elements),
    }
}

fn scatter_as<const FROM: usize, const TO: usize>(symbols: &[u8], shift: u8, elements: &mut [u8]) {
    vectorized(
        #[inline(always)]
        || {
            for (to, from) in elements.as_chunks_mut::<TO>().0.iter_mut().zip(symbols.as_chunks::<FROM>().0) {
                *to = narrow(widen(*to) | widen(*from) << shift);
            }
        },
    );
}

/// Up to four bytes as a little-endian number.
#[inline]
pub fn widen<const LEN: usize>(bytes: [u8; LEN]) -> u32 {
    let mut word = [0; 4];
    word[..LEN].copy_from_slice(&bytes);
    u32::from_le_bytes(word)
}

/// The lowest bytes of a number.
#[inline]
pub fn narrow<const LEN: usize>(word: u32) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes.copy_from_slice(&word.to_le_bytes()[..LEN]);
    bytes
}

/// Runs a loop with the widest instructions of the machine.
///
/// `work` must be inlined into it, or it is compiled without them: an `FnMut`, because the compiler calls any other closure through a
/// function of its own.
#[inline(always)]
pub fn vectorized<R>(work: impl FnMut() -> R) -> R {
    struct Work<F>(F);

    impl<R, F: FnMut() -> R> WithSimd for Work<F> {
        type Output = R;

        #[inline(always)]
        #[expect(clippy::inline_always, reason = "outside of `dispatch` the loop has no wide instructions")]
        fn with_simd<S: Simd>(mut self, _: S) -> R {
            (self.0)()
        }
    }

    Arch::new().dispatch(Work(work))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements() -> impl Iterator<Item = Elem> {
        let fixed = [Elem::F16, Elem::Bf16, Elem::F32, Elem::U8, Elem::U16, Elem::U32];
        fixed.into_iter().chain((1..=16).map(Elem::Bits))
    }

    /// Elements with all kinds of bits, none above the width.
    fn sample(elem: Elem, count: usize) -> Vec<u8> {
        let width = if let Elem::Bits(bits) = elem { u32::from(bits) } else { 8 * elem.size() as u32 };
        let value = |i: usize| (i as u32).wrapping_mul(0x9E37_79B1) >> (32 - width);
        (0..count).flat_map(|i| value(i).to_le_bytes().into_iter().take(elem.size())).collect()
    }

    #[test]
    fn fields_cover_every_bit_once() {
        for elem in elements() {
            for fields in [fields(elem).unwrap(), reference_fields(elem).unwrap()] {
                let mask = |field: &Field| ((1_u64 << field.bits) - 1) << field.shift;
                let width = if let Elem::Bits(bits) = elem { u32::from(bits) } else { 8 * elem.size() as u32 };
                assert_eq!(fields.iter().map(mask).sum::<u64>(), (1_u64 << width) - 1, "{elem}");
                assert!(fields.len() <= 4 && fields.iter().all(|field| (1..=12).contains(&field.bits)), "{elem}");
            }
        }
        assert!(fields(Elem::Bits(0)).is_err());
        assert!(fields(Elem::Bits(17)).is_err());
    }

    #[test]
    fn streams_and_raw_streams_put_elements_together_again() {
        let mut buffer = SymbolBuffer::default();
        for elem in elements() {
            for count in [0, 1, 7, 8, 100, 1001] {
                let expected = sample(elem, count);
                let (mut coded, mut raw) = (vec![0; expected.len()], vec![0; expected.len()]);
                for field in fields(elem).unwrap() {
                    let symbols = buffer.gather(&expected, elem, field).to_vec();
                    let fill = |to: &mut [u8]| {
                        to.copy_from_slice(&symbols);
                        Ok(())
                    };
                    buffer.scatter(&mut coded, elem, field, fill).unwrap();
                    let mut stored = Vec::new();
                    buffer.put_raw(&symbols, field, &mut stored).unwrap();
                    assert_eq!(stored.len(), field.raw_len(count), "{elem}, {field:?}, {count}");
                    buffer.take_raw(&mut Reader::new(&stored), &mut raw, elem, field).unwrap();
                }
                assert_eq!((&coded, &raw), (&expected, &expected), "{count} elements of {elem}");
            }
        }
    }

    #[test]
    fn symbols_of_a_float_are_its_parts() {
        // -1.5: sign 1, exponent 15, mantissa 0x200.
        let bytes = 0xBE00_u16.to_le_bytes();
        let mut buffer = SymbolBuffer::default();
        let symbols: Vec<Vec<u8>> =
            fields(Elem::F16).unwrap().iter().map(|f| buffer.gather(&bytes, Elem::F16, *f).to_vec()).collect();
        assert_eq!(symbols, [vec![15], vec![1], vec![0, 2]]);
        let hi6 = reference_fields(Elem::F16).unwrap()[0];
        assert_eq!(buffer.gather(&bytes, Elem::F16, hi6), [0b10_1111]);
    }

    #[test]
    fn raw_streams_are_planes_from_the_lowest_bit() {
        // 0x2A5 as 10 bits: the low eight, then the two above.
        let mut out = Vec::new();
        let field = Field::new(0, 10);
        SymbolBuffer::default().put_raw(&[0xA5, 2, 0xFF, 1], field, &mut out).unwrap();
        assert_eq!(out, [0xA5, 0xFF, 0b01_10]);
    }

    #[test]
    fn elements_above_their_width_are_refused() {
        assert!(check_range(Elem::Bits(4), &[15, 0, 7]).is_ok());
        assert!(check_range(Elem::Bits(4), &[16]).is_err());
        assert!(check_range(Elem::Bits(10), &[0xFF, 3]).is_ok());
        assert!(check_range(Elem::Bits(10), &[0, 4]).is_err());
        assert!(check_range(Elem::Bits(16), &[0xFF, 0xFF]).is_ok());
    }
}
