//! What the coders of a stream have in common.

use std::fmt::Debug;

use gearbox_core::{Elem, Result};

use crate::counts::Counts;
use crate::symbols::Field;
use crate::wire::Reader;

/// A static model of one stream and the coder that follows from it. Its buffers are used again by the next model.
///
/// Symbols are as `symbols.rs` has them in memory; all are below 2 to the power of the alphabet's bits.
pub trait Model: Debug + Default + Send + Sync + 'static {
    /// Whether streams are coded as the reference does, whatever their length.
    const REFERENCE: bool;

    /// The fields of an element type, see `symbols.rs`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) for elements that are not taken.
    fn fields(elem: Elem) -> Result<Vec<Field>>;

    /// Fits the model to counts, at least one of which is not 0, ready to encode.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) if there are more symbols than the coder can model.
    fn learn(&mut self, counts: &Counts) -> Result<()>;

    /// Appends the model.
    fn store(&self, out: &mut Vec<u8>);

    /// Reads what [`Model::store`] wrote for an alphabet of `bits` bits, ready to decode about `symbols` symbols.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](gearbox_core::ErrorKind::Corrupt) if it is no sound model.
    fn load(&mut self, bits: u8, from: &mut Reader<'_>, symbols: usize) -> Result<()>;

    /// Makes a loaded model ready to encode as well.
    fn ready_to_encode(&mut self);

    /// Bytes that a stream with these counts takes, up to 1 % off; `None` if the model lacks one of its symbols.
    fn encoded_len(&self, counts: &Counts) -> Option<u64>;

    /// Appends a stream that is not empty and whose symbols the model knows.
    fn encode(&self, symbols: &[u8], out: &mut Vec<u8>);

    /// Fills `symbols` from exactly the bytes that [`Model::encode`] wrote.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](gearbox_core::ErrorKind::Corrupt) if they are too short, too long or otherwise not what it writes.
    fn decode(&self, encoded: &[u8], symbols: &mut [u8]) -> Result<()>;
}
