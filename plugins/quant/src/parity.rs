//! The reference's quantiser as a transform: its restored values, or codes and one scale that give the same values.
//!
//! A value is a code times the scale. Codes end at `2^(bits - 1) - 1` on both sides, which leaves one unused: it stands for -0.0, which the
//! reference makes of small negative numbers and stores. So codes restore every bit, but for the payload of NaN: where the scale is not
//! finite, all values are the NaN that the element type prefers.

use gearbox_core::{Chunk, ChunkMut, DType, Elem, Error, Lane, LaneSpec, Latents, Result, Shape};

use crate::quantiser::{CODES, SCALES, bytes};
use crate::reference;
use crate::settings::Storage;

/// Adds the lanes of a chunk to `out`.
pub(crate) fn quantise(chunk: Chunk<'_>, bits: u8, storage: Storage, out: &mut Latents) -> Result<()> {
    if storage == Storage::Values {
        let mut values = Vec::with_capacity(chunk.bytes().len());
        reference::quantise(chunk, bits, &mut values)?;
        return out.push_lane(Lane { spec: LaneSpec::tensor(chunk.dtype(), chunk.shape()), bytes: values });
    }
    if chunk.bytes().is_empty() {
        return Ok(());
    }
    let mut codes = Vec::new();
    let scale = reference::quantise_codes(chunk, bits, &mut codes)?;
    let largest = (1 << (bits - 1)) - 1;
    let size = Elem::Bits(bits).size();
    // The sign is the top bit of the last byte.
    let elements = chunk.bytes().chunks_exact(chunk.dtype().size());
    let negative = elements.map(|bytes| bytes.last().is_some_and(|byte| byte & 0x80 != 0));
    let stored = codes.iter().zip(negative).map(|(code, negative)| match code {
        0 if negative => 2 * largest + 1,
        _ => code + largest,
    });
    let stored = stored.flat_map(|code| code.to_le_bytes().into_iter().take(size)).collect();
    out.push_lane(Lane { spec: LaneSpec::new(CODES, Elem::Bits(bits), chunk.shape()), bytes: stored })?;
    out.push(LaneSpec::new(SCALES, Elem::F32, Shape::flat(1)))?.copy_from_slice(&scale.to_le_bytes());
    Ok(())
}

/// Fills `out` from codes.
pub(crate) fn restore(latents: &Latents, bits: u8, mut out: ChunkMut<'_>) -> Result<()> {
    let (dtype, shape) = (out.dtype(), out.shape());
    let out = out.bytes_mut();
    if out.is_empty() && latents.lanes().is_empty() {
        return Ok(());
    }
    if latents.lanes().len() != 2 {
        return Err(Error::corrupt(format!("expected `{CODES}` and `{SCALES}`, got {} lanes", latents.lanes().len())));
    }
    let codes = bytes(latents.lane(CODES)?, Elem::Bits(bits), shape)?;
    let scale = bytes(latents.lane(SCALES)?, Elem::F32, Shape::flat(1))?;
    let scale = scale.first_chunk().map_or(0.0, |bytes| f32::from_le_bytes(*bytes));
    if !scale.is_finite() {
        let nan: &[u8] = match dtype {
            DType::F16 => &[0x00, 0x7E],
            DType::Bf16 => &[0xC0, 0x7F],
            _ => &[0x00, 0x00, 0xC0, 0x7F],
        };
        for element in out.chunks_exact_mut(nan.len()) {
            element.copy_from_slice(nan);
        }
        return Ok(());
    }
    let largest = (1 << (bits - 1)) - 1;
    let codes = codes.chunks_exact(Elem::Bits(bits).size());
    let codes = codes.map(|bytes| bytes.iter().rev().fold(0, |code, byte| code << 8 | i32::from(*byte)));
    let values: Vec<f32> =
        codes.map(|code| if code > 2 * largest { -0.0 } else { (code - largest) as f32 * scale }).collect();
    let mut restored = Vec::with_capacity(out.len());
    reference::narrow(&values, dtype, &mut restored);
    out.copy_from_slice(&restored);
    Ok(())
}
