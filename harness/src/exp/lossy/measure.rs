//! Coding one tensor: stream, decoded tensor, errors.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gearbox_core::{Chunk, Codec, Context, DType, Error, LaneRef, LaneSpec, Pool, Registry, Result, Role, Shape};
use gearbox_plugins::quant::reference::{self, BlockNorm, Normalised};
use serde_json::json;
use xxhash_rust::xxh3::xxh3_128;

use super::logit::{LogitSums, Queries};
use super::{CompressMode, Place};
use crate::metrics::error::HeadErrors;

/// What was measured on one tensor.
#[derive(Clone, Debug)]
pub(in crate::exp) struct Measured {
    pub shape: Shape,
    pub dtype: DType,
    /// Bytes of the tensor.
    pub raw: u64,
    /// Bytes as the reference counts them: frames, and side information at its price.
    pub compressed: u64,
    /// Bytes that were written and decoded again, side information included.
    pub actual: u64,
    /// As the reference computes them; zeros for a lossless tensor.
    pub error: reference::Error,
    /// Of the decoded tensor in its element type, by head.
    pub heads: HeadErrors,
    /// Of keys whose entry has queries.
    pub logits: Option<LogitSums>,
}

impl Measured {
    /// Number of elements.
    pub fn values(&self) -> u64 {
        self.shape.elements() as u64
    }
}

/// One stream: its length, and what of it are frames.
#[derive(Clone, Copy, Debug)]
struct Stream {
    frames: u64,
    bytes: u64,
}

/// A codec that writes streams, and another instance that reads them.
#[derive(Debug)]
pub(in crate::exp) struct Coder {
    plugin: &'static str,
    encoder: Arc<dyn Codec>,
    decoder: Arc<dyn Codec>,
    encode_ns: AtomicU64,
}

impl Coder {
    /// The codec of a mode for lossy or lossless tensors.
    pub fn new(registry: &Registry, mode: CompressMode, lossy: bool, level: i32) -> Result<Self> {
        let plugin = mode.plugin(lossy);
        let settings =
            if plugin == "zstd" { json!({ "level": level }) } else { json!({ "level": level, "mode": "reference" }) };
        let entry = registry.codec(plugin)?;
        let encoder = entry.build(&settings)?;
        let decoder = entry.build(&encoder.config())?;
        Ok(Self { plugin, encoder, decoder, encode_ns: AtomicU64::new(0) })
    }

    /// Time that all threads together spent in encoding.
    pub fn encode_time(&self) -> Duration {
        Duration::from_nanos(self.encode_ns.load(Ordering::Relaxed))
    }

    /// Writes a stream, decodes it into `decoded` and compares.
    fn code(
        &self,
        chunk: Chunk<'_>,
        context: &Context<'_>,
        encoded: &mut Vec<u8>,
        decoded: &mut Vec<u8>,
    ) -> Result<Stream> {
        let spec = LaneSpec::tensor(chunk.dtype(), chunk.shape());
        encoded.clear();
        let start = Instant::now();
        self.encoder.encode(LaneRef::new(&spec, chunk.bytes())?, context, encoded)?;
        self.encode_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        // What the decoder leaves alone differs from the input wherever that is not a run of this value.
        decoded.clear();
        decoded.resize(chunk.bytes().len(), 0xA5);
        self.decoder
            .decode(encoded, &spec, context, decoded)
            .map_err(|error| Error::mismatch(format!("what was encoded does not decode: {error}")))?;
        if decoded != chunk.bytes() {
            return Err(Error::mismatch("decoded bytes differ from the input"));
        }
        let bytes = encoded.len() as u64;
        Ok(Stream { frames: bytes - self.header_bytes(encoded), bytes })
    }

    /// Bytes before the frames: two forms and the length of the high stream, as the plugin documents its bytes; none in a plain frame.
    fn header_bytes(&self, encoded: &[u8]) -> u64 {
        if self.plugin == "zstd" || encoded.is_empty() {
            return 0;
        }
        let length = encoded.iter().skip(2).take_while(|byte| **byte >= 0x80).count() + 1;
        2 + length as u64
    }
}

/// What threads keep between tensors.
#[derive(Debug, Default)]
pub(in crate::exp) struct Shared(Pool<Buffers>);

#[derive(Debug, Default)]
struct Buffers {
    encoded: Vec<u8>,
    decoded: Vec<u8>,
    original: Vec<f32>,
    restored: Vec<f32>,
    narrowed: Vec<u8>,
    lane: Vec<u8>,
    difference: Vec<f32>,
    normalised: Normalised,
    known: Vec<(u128, Measured)>,
}

impl Shared {
    /// Lends buffers for the work on one tensor.
    pub fn with<R>(
        &self,
        coder: &Coder,
        place: &Place<'_>,
        role: Role,
        work: impl FnOnce(&mut Worker<'_>) -> Result<R>,
    ) -> Result<R> {
        let tensor = place.entry.tensor(role);
        let bytes = tensor.map()?;
        let chunk = Chunk::new(tensor.shape, tensor.dtype, &bytes)?;
        let context = Context::new(place.layer, role, place.entry.start);
        self.0.with(Buffers::default, |buffers| {
            buffers.original.clear();
            reference::widen(chunk, &mut buffers.original);
            buffers.known.clear();
            let queries = match role {
                Role::Key => Queries::of(place.entry)?,
                Role::Value => None,
            };
            work(&mut Worker { chunk, coder, context: &context, queries, buffers })
        })
    }
}

/// The work on one tensor.
pub(in crate::exp) struct Worker<'a> {
    /// The tensor.
    pub chunk: Chunk<'a>,
    coder: &'a Coder,
    context: &'a Context<'a>,
    queries: Option<Queries>,
    buffers: &'a mut Buffers,
}

impl Worker<'_> {
    /// Stores the tensor as it is.
    pub fn lossless(&mut self) -> Result<Measured> {
        let stream = self.code(None)?;
        Ok(self.measured(stream.frames, stream.bytes, reference::Error::default(), HeadErrors::default()))
    }

    /// Stores values that stand for the tensor, in its shape and element type; the same values are measured once.
    pub fn values(&mut self, stored: &[u8]) -> Result<Measured> {
        let hash = xxh3_128(stored);
        if let Some((_, known)) = self.buffers.known.iter().find(|(known, _)| *known == hash) {
            return Ok(known.clone());
        }
        let stream = self.code(Some(stored))?;
        let Buffers { decoded, original, restored, difference, .. } = &mut *self.buffers;
        let decoded = Chunk::new(self.chunk.shape(), self.chunk.dtype(), decoded)?;
        restored.clear();
        reference::widen(decoded, restored);
        let error = reference::error(original, restored);
        let mut heads = HeadErrors::default();
        heads.add(self.chunk, decoded)?;
        let kv_heads = self.chunk.shape().heads;
        let logits = self.queries.as_ref().map(|queries| queries.error(kv_heads, original, restored, difference));
        let measured = Measured { logits, ..self.measured(stream.frames, stream.bytes, error, heads) };
        self.buffers.known.push((hash, measured.clone()));
        Ok(measured)
    }

    /// Stores the tensor in blocks, once for all of `norms`, which differ only in what does not change the normalised values: the
    /// share of blocks that keep their scale, and prices.
    pub fn blocks(&mut self, norms: &[BlockNorm]) -> Result<Vec<Measured>> {
        let Some(first) = norms.first() else { return Ok(Vec::new()) };
        let (shape, dtype) = (self.chunk.shape(), self.chunk.dtype());
        let mut normalised = std::mem::take(&mut self.buffers.normalised);
        first.normalise_into(self.chunk, &mut normalised)?;
        let stream = self.code(Some(&normalised.stored))?;

        let mut list: Vec<Measured> = Vec::new();
        // Of each: the blocks that keep their scale, which is all that can make a difference.
        let mut tops: Vec<Vec<u32>> = Vec::new();
        for norm in norms {
            let mut top = Vec::new();
            if norm.keeps_scales(dtype) {
                norm.find_top(self.chunk, &mut top)?;
            }
            let (side_bytes, scales) = self.side(norm, &normalised.scales, &top)?;
            let compressed = stream.frames + norm.metadata_bytes(shape);
            let actual = stream.bytes + side_bytes;
            if let Some(same) = tops.iter().position(|other| *other == top) {
                list.push(Measured { compressed, actual, ..list[same].clone() });
                tops.push(top);
                continue;
            }
            let Buffers { decoded, original, restored, narrowed, difference, .. } = &mut *self.buffers;
            let read = Normalised { stored: std::mem::take(decoded), scales, top };
            norm.restore_into(shape, dtype, &read, restored);
            let error = reference::error(original, restored);
            narrowed.clear();
            reference::narrow(restored, dtype, narrowed);
            let rounded = Chunk::new(shape, dtype, narrowed)?;
            let mut heads = HeadErrors::default();
            heads.add(self.chunk, rounded)?;
            restored.clear();
            reference::widen(rounded, restored);
            let logits =
                self.queries.as_ref().map(|queries| queries.error(shape.heads, original, restored, difference));
            *decoded = read.stored;
            tops.push(read.top);
            list.push(Measured { logits, ..self.measured(compressed, actual, error, heads) });
        }
        self.buffers.normalised = normalised;
        Ok(list)
    }

    /// Writes the side information of blocks and reads it back: its bytes, and the scales that a decoder has.
    ///
    /// Rounded scales are F16. Others are magnitudes of the tensor, so its element type holds them. Blocks that keep theirs follow with
    /// their indices, 4 bytes each.
    fn side(&mut self, norm: &BlockNorm, scales: &[f32], top: &[u32]) -> Result<(u64, Vec<f32>)> {
        let dtype = self.chunk.dtype();
        let stored = if norm.scale_bytes == 2 { DType::F16 } else { dtype };
        let lane = &mut self.buffers.lane;
        lane.clear();
        reference::narrow(scales, stored, lane);
        let side_bytes = lane.len() + top.len() * (dtype.size() + 4);
        let mut read = Vec::with_capacity(scales.len());
        reference::widen(Chunk::new(Shape::flat(scales.len()), stored, lane)?, &mut read);
        for &block in top {
            if let (Some(read), Some(scale)) = (read.get_mut(block as usize), scales.get(block as usize)) {
                *read = *scale;
            }
        }
        Ok((side_bytes as u64, read))
    }

    /// Writes and reads a stream of the tensor, or of other bytes in its shape and element type.
    fn code(&mut self, other: Option<&[u8]>) -> Result<Stream> {
        let bytes = other.unwrap_or(self.chunk.bytes());
        let chunk = Chunk::new(self.chunk.shape(), self.chunk.dtype(), bytes)?;
        let Buffers { encoded, decoded, .. } = &mut *self.buffers;
        self.coder.code(chunk, self.context, encoded, decoded)
    }

    fn measured(&self, compressed: u64, actual: u64, error: reference::Error, heads: HeadErrors) -> Measured {
        let (shape, dtype) = (self.chunk.shape(), self.chunk.dtype());
        Measured { shape, dtype, raw: self.chunk.bytes().len() as u64, compressed, actual, error, heads, logits: None }
    }
}
