//! Coding one piece: read, encode, decode, compare, count.

use std::sync::Arc;

use gearbox_core::{Chunk, Codec, Context, DType, Error, ErrorKind, LaneSpec, Pool, Registry, Result, ResultExt};
use gearbox_plugins::adaptive_v22::{Encoder, Usage};
use rayon::prelude::*;
use serde_json::json;

use super::CodecArgs;
use super::units::Piece;
use crate::dump::round;
use crate::report;

/// What one piece takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    /// Bytes in F16.
    pub raw: u64,
    /// Bytes that were written, decoded and compared.
    pub encoded: u64,
    /// Bytes as the reference counts them.
    pub compressed: u64,
    /// Blocks of each predictor, and the time in zstd.
    pub usage: Usage,
    /// Finite values that became infinite when they were rounded to F16.
    pub new_infinities: u64,
}

/// Codes pieces on many threads; contexts and buffers are kept between them.
pub(super) struct Coder<'a> {
    args: &'a CodecArgs,
    level: i32,
    decoder: Arc<dyn Codec>,
    workers: Pool<Worker>,
}

struct Worker {
    encoder: Encoder,
    joined: Vec<u8>,
    encoded: Vec<u8>,
    decoded: Vec<u8>,
}

impl<'a> Coder<'a> {
    pub fn new(registry: &Registry, args: &'a CodecArgs, level: i32) -> Result<Self> {
        let decoder = registry.codec("adaptive-v22")?.build(&json!({}))?;
        Ok(Self { args, level, decoder, workers: Pool::default() })
    }

    /// Codes all pieces; one that cannot be read or encoded is logged and left out.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] if one does not come back.
    pub fn measure_all(&self, pieces: &[Piece<'_>]) -> Result<Vec<Option<Measured>>> {
        let progress = report::progress(pieces.iter().map(Piece::bytes).sum(), "offline-lossless");
        let measured = pieces.par_iter().with_max_len(1).map(|piece| {
            let result = self.measure(piece).context(|| piece.to_string());
            progress.inc(piece.bytes());
            match result {
                Ok(measured) => Ok(Some(measured)),
                Err(error) if error.kind() == ErrorKind::Mismatch => Err(error),
                Err(error) => {
                    tracing::warn!("left out: {error}");
                    Ok(None)
                }
            }
        });
        let measured = measured.collect();
        progress.finish_and_clear();
        measured
    }

    fn measure(&self, piece: &Piece<'_>) -> Result<Measured> {
        let worker = || Worker {
            encoder: Encoder::new(self.args.config(self.level)),
            joined: Vec::new(),
            encoded: Vec::new(),
            decoded: Vec::new(),
        };
        self.workers.with(worker, |worker| self.measure_with(piece, worker))
    }

    fn measure_with(&self, piece: &Piece<'_>, worker: &mut Worker) -> Result<Measured> {
        let Worker { encoder, joined, encoded, decoded } = worker;
        let mut parts = piece.parts().peekable();
        let Some((entry, tokens)) = parts.next() else { return Err(Error::invalid_input("expected tokens, got none")) };
        let tensor = entry.tensor(piece.role);
        let shape = tensor.shape.with_seq(piece.tokens.len());
        let context = Context::new(0, piece.role, entry.start + tokens.start as u64);
        let (mapped, mut new_infinities) = (tensor.map_tokens(tokens)?, 0);
        let bytes = if tensor.dtype.size() == 2 && parts.peek().is_none() {
            // The element type says nothing to a byte split; the reference takes all 16-bit floats for F16.
            &mapped[..]
        } else {
            joined.clear();
            new_infinities += append_f16(tensor.dtype, &mapped, joined);
            for (entry, tokens) in parts {
                let tensor = entry.tensor(piece.role);
                new_infinities += append_f16(tensor.dtype, &tensor.map_tokens(tokens)?, joined);
            }
            joined
        };

        encoded.clear();
        let usage = encoder.encode(Chunk::new(shape, DType::F16, bytes)?, piece.role, encoded)?;
        // What the decoder leaves alone differs from the input wherever that is not a run of this value.
        decoded.clear();
        decoded.resize(bytes.len(), 0xA5);
        self.decoder
            .decode(encoded, &LaneSpec::tensor(DType::F16, shape), &context, decoded)
            .map_err(|error| Error::mismatch(format!("what was encoded does not decode: {error}")))?;
        if decoded != bytes {
            return Err(Error::mismatch("decoded bytes differ from the input"));
        }
        let encoded = encoded.len() as u64;
        Ok(Measured {
            raw: bytes.len() as u64,
            encoded,
            compressed: encoded - self.args.uncounted_bytes() + piece.framing,
            usage,
            new_infinities,
        })
    }
}

/// Appends 16-bit floats as they are and rounds F32 to nearest, ties to even; returns how many finite values became infinite.
fn append_f16(dtype: DType, bytes: &[u8], out: &mut Vec<u8>) -> u64 {
    if dtype.size() == 2 {
        out.extend_from_slice(bytes);
        return 0;
    }
    let mut new_infinities = 0;
    out.extend(bytes.as_chunks::<4>().0.iter().flat_map(|word| {
        let value = f32::from_le_bytes(*word);
        let rounded = round(value);
        new_infinities += u64::from(value.is_finite() && rounded.is_infinite());
        rounded.to_le_bytes()
    }));
    new_infinities
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_reference() {
        let values = [0x3F80_0000, 0x477F_F000, 0x7F80_0000, 0x8000_0001, 0x7F80_0001, 0xFFC0_0000_u32, 0x3F80_1000];
        let bytes: Vec<u8> = values.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let mut out = vec![1];
        assert_eq!(append_f16(DType::F32, &bytes, &mut out), 1, "65520 is the first that overflows");
        let words: Vec<u16> = out[1..].as_chunks::<2>().0.iter().map(|word| u16::from_le_bytes(*word)).collect();
        assert_eq!(words, [0x3C00, 0x7C00, 0x7C00, 0x8000, 0x7C01, 0xFE00, 0x3C00]);
        assert_eq!(append_f16(DType::Bf16, &bytes[..4], &mut out), 0);
        assert_eq!(out[15..], bytes[..4]);
    }
}
