//! The coders of the reference, bit by bit: streams of the same bytes from the same symbols.
//!
//! Both work on the fields of [`reference_fields`]: for F16 `hi6` (sign and exponent) and `lo10` (mantissa).
//!
//! # Examples
//! ```
//! use gearbox_bitstream::reference::{Huffman, Reference};
//! use gearbox_bitstream::{Counts, Model};
//!
//! let symbols = [0, 1, 2, 3, 0, 0, 3];
//! let mut counts = Counts::new(2);
//! counts.add(&symbols);
//! let mut code = Huffman::default();
//! code.learn(&counts)?;
//! assert_eq!(code.table(), [1_u8, 3, 3, 2].map(u64::from));
//!
//! let mut bytes = Vec::new();
//! code.encode(&symbols, &mut bytes);
//! let mut back = [0; 7];
//! code.decode(&bytes, &mut back)?;
//! assert_eq!(back, symbols);
//! # Ok::<(), gearbox_core::Error>(())
//! ```

mod arithmetic;
mod bit_io;
mod huffman;

use gearbox_core::Result;

pub use self::arithmetic::Arithmetic;
pub use self::huffman::Huffman;
use crate::model::Model;
pub use crate::symbols::reference_fields;

/// A coder of the reference, whose model is a table of one number per symbol.
pub trait Reference: Model {
    /// The numbers that the reference writes into its codebooks.
    fn table(&self) -> &[u64];

    /// A coder with such a table, for an alphabet of `bits` bits.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](gearbox_core::ErrorKind::Corrupt) if the table is no sound model.
    fn from_table(bits: u8, table: &[u64]) -> Result<Self>;
}

#[cfg(test)]
mod tests;
