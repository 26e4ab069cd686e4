//! Huffman codes without a limit of length, as the reference breaks ties.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use gearbox_core::{Elem, Error, Result};

use super::Reference;
use super::bit_io::{BitWriter, peek};
use crate::counts::Counts;
use crate::lengths::canonical_order;
use crate::model::Model;
use crate::symbols::{self, Field, reference_fields, symbol_size};
use crate::wire::{Reader, put_sparse};

/// Longer codes need more symbols than any memory holds.
const LONGEST: u64 = 63;

/// The reference's Huffman coder; its table are the code lengths.
#[derive(Debug, Default)]
pub struct Huffman {
    /// Bits of the alphabet.
    bits: u8,
    /// Of every symbol, 0 for those that do not occur.
    lengths: Vec<u64>,
    /// Symbols with a code and its length, in the order of their codes.
    order: Vec<(u16, u8)>,
    /// Code and length of every symbol.
    codes: Vec<(u64, u32)>,
    /// Per length that occurs: the length, its last code from bit 63 down with ones behind it, and the place of that one in `order`.
    groups: Vec<(u32, u64, usize)>,
}

/// A node of the tree. The order is the reference's: by weight, inner nodes before leaves, leaves by symbol, inner nodes by their children.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Node {
    weight: u64,
    kind: Kind,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Inner(Box<[Node; 2]>),
    Leaf(usize),
}

impl Node {
    fn mark_depths(&self, depth: u64, lengths: &mut [u64]) {
        match &self.kind {
            Kind::Inner(children) => children.iter().for_each(|child| child.mark_depths(depth + 1, lengths)),
            Kind::Leaf(symbol) => lengths[*symbol] = depth.max(1),
        }
    }
}

impl Model for Huffman {
    const REFERENCE: bool = true;

    fn fields(elem: Elem) -> Result<Vec<Field>> {
        reference_fields(elem)
    }

    fn learn(&mut self, counts: &Counts) -> Result<()> {
        self.bits = counts.bits();
        self.lengths.clear();
        self.lengths.resize(counts.counts().len(), 0);
        let mut heap: BinaryHeap<_> =
            counts.used().map(|(symbol, weight)| Reverse(Node { weight, kind: Kind::Leaf(symbol) })).collect();
        while let Some(Reverse(left)) = heap.pop() {
            let Some(Reverse(right)) = heap.pop() else {
                left.mark_depths(0, &mut self.lengths);
                break;
            };
            let weight = left.weight + right.weight;
            heap.push(Reverse(Node { weight, kind: Kind::Inner(Box::new([left, right])) }));
        }
        self.assign();
        Ok(())
    }

    fn store(&self, out: &mut Vec<u8>) {
        put_sparse(self.lengths.iter().copied(), out);
    }

    fn load(&mut self, bits: u8, from: &mut Reader<'_>, _: usize) -> Result<()> {
        self.bits = bits;
        from.sparse(1 << bits, &mut self.lengths)?;
        self.check()?;
        self.assign();
        Ok(())
    }

    fn ready_to_encode(&mut self) {}

    fn encoded_len(&self, counts: &Counts) -> Option<u64> {
        counts.cost(&self.lengths, |length| length).map(|bits| bits.div_ceil(8))
    }

    fn encode(&self, symbols: &[u8], out: &mut Vec<u8>) {
        let mut writer = BitWriter::new(out);
        for symbol in symbols::values(symbols, self.bits) {
            let (code, length) = self.codes.get(usize::from(symbol)).copied().unwrap_or_default();
            writer.put(code, length);
        }
        writer.finish();
    }

    fn decode(&self, encoded: &[u8], symbols: &mut [u8]) -> Result<()> {
        let (mut at, end) = (0, 8 * encoded.len());
        let size = symbol_size(self.bits);
        let count = symbols.len() / size;
        for (i, to) in symbols.chunks_exact_mut(size).enumerate() {
            let next = peek(encoded, at);
            let group = self.groups.iter().find(|(_, highest, _)| next <= *highest);
            let symbol = group.and_then(|(length, highest, last)| {
                let back = usize::try_from((highest - next) >> (64 - length)).ok()?;
                self.order.get(last.checked_sub(back)?)
            });
            let Some((symbol, length)) = symbol else {
                return Err(Error::corrupt(format!("symbol {i} of {count}: the bits are no code")));
            };
            to.copy_from_slice(&symbol.to_le_bytes()[..to.len()]);
            at += usize::from(*length);
            if at > end {
                return Err(Error::corrupt(format!("symbol {i} of {count}: the code is cut")));
            }
        }
        if end - at >= 8 || peek(encoded, at) != 0 {
            return Err(Error::corrupt(format!("codes take {} bytes of {}", at.div_ceil(8), encoded.len())));
        }
        Ok(())
    }
}

impl Huffman {
    /// Makes sure that the lengths are those of a tree, or of one symbol.
    fn check(&self) -> Result<()> {
        let used = || self.lengths.iter().filter(|length| **length > 0);
        if let Some(length) = used().find(|length| **length > LONGEST) {
            return Err(Error::corrupt(format!("expected codes of up to {LONGEST} bits, got {length}")));
        }
        let space = used().fold(0_u128, |space, length| space + (1 << (LONGEST - length)));
        if space == 1 << LONGEST || (used().count() == 1 && space == 1 << (LONGEST - 1)) {
            return Ok(());
        }
        Err(Error::corrupt("code lengths are not those of a tree"))
    }

    /// Makes the codes from the lengths.
    fn assign(&mut self) {
        let lengths: Vec<u8> = self.lengths.iter().map(|length| *length as u8).collect();
        canonical_order(&lengths, &mut self.order);
        self.codes.clear();
        self.codes.resize(lengths.len(), (0, 0));
        self.groups.clear();
        let mut next = 0_u64;
        for (place, (symbol, length)) in self.order.iter().enumerate() {
            let length = u32::from(*length);
            self.codes[usize::from(*symbol)] = (next >> (64 - length), length);
            let highest = next | u64::MAX >> length;
            match self.groups.last_mut() {
                Some(group) if group.0 == length => *group = (length, highest, place),
                _ => self.groups.push((length, highest, place)),
            }
            // Behind the last code of a tree there is no number left.
            next = highest.wrapping_add(1);
        }
    }
}

impl Reference for Huffman {
    fn table(&self) -> &[u64] {
        &self.lengths
    }

    fn from_table(bits: u8, table: &[u64]) -> Result<Self> {
        if table.len() != 1 << bits {
            return Err(Error::corrupt(format!("expected {} code lengths, got {}", 1 << bits, table.len())));
        }
        let mut code = Self { bits, lengths: table.to_vec(), ..Self::default() };
        code.check()?;
        code.assign();
        Ok(code)
    }
}
