//! Truncation of the mantissa.

use gearbox_core::Chunk;

use super::element::{Element, map, with_element};

/// Appends a tensor of whose mantissas only the top `mantissa_bits` are kept, rounded toward zero.
///
/// More bits than the element type has keep all. The mask hits NaNs too: one whose payload lies in the dropped bits becomes infinite.
pub fn truncate(chunk: Chunk<'_>, mantissa_bits: u8, out: &mut Vec<u8>) {
    with_element!(chunk.dtype(), E => {
        let mask = u32::MAX << E::MANTISSA.saturating_sub(mantissa_bits.into());
        map::<E>(chunk.bytes(), out, #[inline(always)] move |bytes| E::masked(bytes, mask));
    });
}
