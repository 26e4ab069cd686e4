//! Compresses each lane with pcodec: the numeric baseline.
//!
//! pcodec bins numbers by size, codes the bin of each with a table-based asymmetric numeral system and stores the offset within the bin as
//! it is, after a delta or a common divisor where a sample says that one helps. F16 and F32 lanes go in as floats, in their order from
//! negative to positive; Bf16 goes in as its 16 bits, and every integer as itself. NaN payloads and the sign of zero are kept.
//!
//! # Source
//! <https://github.com/pcodec/pcodec>, linked as a library.
//!
//! # Settings
//! | Key | Range | Default | Meaning |
//! |---|---|---|---|
//! | `level` | 0 to 12 | 8 | effort: 0 hardly compresses, 12 is marginally smaller than 8 |
//!
//! # Bytes
//! A lane without elements takes none. Every other lane is in the *wrapped* format of pcodec, the one for numbers within another format:
//! its header of two bytes, and then for each chunk its meta data and its one page. Chunks hold at most 2^18 numbers and differ by at most
//! one in length, the longer ones first; their lengths follow from that of the lane and are not stored.
//!
//! # What it is bad at
//! Lanes of a few hundred numbers, which do not pay for the table of bins. KV data knows better contexts than its neighbour along the lane:
//! each channel has its own range, which the bins do not see. The library promises the same numbers, not the same bytes: the mode is chosen
//! with floating-point arithmetic that differs in the last bit between machines, and levels may change their meaning with its version. Where
//! it takes a lane for multiples of a float, NaN of that lane go through a multiplication: their payloads come back on machines that keep
//! payloads when they multiply, which x86-64 and 64-bit Arm do.

use gearbox_core::{
    Capabilities, Codec, Context, Elem, ElemSet, Error, LaneRef, LaneSpec, Plugin, Pool, Result, register_codec,
};
use half::f16;
use pco::data_types::Number;
use pco::errors::{ErrorKind, PcoError, PcoResult};
use pco::metadata::{ChunkMeta, DeltaEncoding};
use pco::wrapped::{FileCompressor, FileDecompressor, guarantee};
use pco::{ChunkConfig, DEFAULT_MAX_PAGE_N, DecompressorScratch, PagingSpec};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Settings of [`Pcodec`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Effort: 0 hardly compresses, 12 is marginally smaller than 8.
    #[schemars(range(min = 0, max = 12))]
    pub level: u8,
}

impl Default for Config {
    fn default() -> Self {
        Self { level: 8 }
    }
}

/// Compresses each lane with pcodec.
#[derive(Debug)]
pub struct Pcodec {
    config: Config,
    decoders: Pool<DecompressorScratch>,
}

impl Plugin for Pcodec {
    const ID: &'static str = "pcodec";
    const SUMMARY: &'static str = "pcodec: binned numbers, per lane";
    const SOURCE: &'static str = "https://github.com/pcodec/pcodec";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config, decoders: Pool::default() })
    }
}

register_codec!(Pcodec);

impl Codec for Pcodec {
    fn capabilities(&self) -> Capabilities {
        // Same numbers, but the choice of a mode is not the same to the last bit everywhere.
        Capabilities { deterministic: false, ..Capabilities::new(ElemSet::ALL) }
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        let elements = lane.shape.elements();
        if elements == 0 {
            return 0;
        }
        let meta = match lane.elem.size() {
            1 => guarantee::chunk_size::<u8>(0),
            2 => guarantee::chunk_size::<u16>(0),
            _ => guarantee::chunk_size::<u32>(0),
        };
        let chunks = elements.div_ceil(DEFAULT_MAX_PAGE_N);
        chunks.saturating_mul(meta).saturating_add(guarantee::header_size()).saturating_add(lane.byte_len())
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (bytes, start) = (lane.bytes(), out.len());
        if bytes.is_empty() {
            return Ok(());
        }
        let result = match (lane.spec().elem, lane.spec().elem.size()) {
            (Elem::F16, _) => self.write(&numbers(bytes, f16::from_le_bytes), out),
            (Elem::F32, _) => self.write(&numbers(bytes, f32::from_le_bytes), out),
            (_, 1) => self.write(bytes, out),
            (_, 2) => self.write(&numbers(bytes, u16::from_le_bytes), out),
            _ => self.write(&numbers(bytes, u32::from_le_bytes), out),
        };
        result.map_err(|error| {
            out.truncate(start);
            Error::unsupported(format!("pcodec level {} fails: {error}", self.config.level))
        })
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        LaneRef::new(lane, out)?;
        if out.is_empty() {
            let len = encoded.len();
            return if len == 0 { Ok(()) } else { Err(Error::corrupt(format!("expected no bytes, got {len}"))) };
        }
        self.decoders.with(DecompressorScratch::default, |scratch| match (lane.elem, lane.elem.size()) {
            (Elem::F16, _) => read(encoded, scratch, out, f16::to_le_bytes),
            (Elem::F32, _) => read(encoded, scratch, out, f32::to_le_bytes),
            (_, 1) => read(encoded, scratch, out, u8::to_le_bytes),
            (_, 2) => read(encoded, scratch, out, u16::to_le_bytes),
            _ => read(encoded, scratch, out, u32::to_le_bytes),
        })
    }
}

impl Pcodec {
    fn write<T: Number>(&self, numbers: &[T], mut out: &mut Vec<u8>) -> PcoResult<()> {
        let file = FileCompressor::default();
        out = file.write_header(out)?;
        let mut rest = numbers;
        for len in chunk_lens(numbers.len()) {
            let (chunk, after) = rest.split_at(len);
            let config = ChunkConfig::default()
                .with_compression_level(self.config.level.into())
                .with_paging_spec(PagingSpec::Exact(vec![len]))
                .with_enable_8_bit(true);
            let mut compressor = file.chunk_compressor(chunk, &config)?;
            out.reserve(compressor.meta_size_hint() + compressor.page_size_hint(0));
            out = compressor.write_meta(out)?;
            out = compressor.write_page(0, out)?;
            rest = after;
        }
        Ok(())
    }
}

/// The numbers in little-endian bytes. The library takes a slice of them, and makes several copies of its own besides.
fn numbers<T, const SIZE: usize>(bytes: &[u8], from_le_bytes: impl Fn([u8; SIZE]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|number| from_le_bytes(*number)).collect()
}

/// Numbers in each chunk of a lane: the rule of the library's own files, so that the sizes can be compared.
fn chunk_lens(elements: usize) -> impl Iterator<Item = usize> {
    let chunks = elements.div_ceil(DEFAULT_MAX_PAGE_N);
    (0..chunks).map(move |chunk| elements / chunks + usize::from(chunk < elements % chunks))
}

/// Numbers that are decoded at once; a multiple of the batch of the library.
const BATCH: usize = 16 * pco::FULL_BATCH_N;

fn read<T: Number, const SIZE: usize>(
    encoded: &[u8],
    scratch: &mut DecompressorScratch,
    mut out: &mut [u8],
    to_le_bytes: impl Fn(T) -> [u8; SIZE],
) -> Result<()> {
    let (file, mut rest) = FileDecompressor::new(encoded).map_err(corrupt)?;
    let mut numbers = [T::default(); BATCH];
    for len in chunk_lens(out.len() / SIZE) {
        check_mode(rest)?;
        let (chunk, pages) = file.chunk_decompressor::<T, _>(rest).map_err(corrupt)?;
        check_window(chunk.meta(), len)?;
        let mut page = chunk.page_decompressor_with_scratch(pages, len, scratch).map_err(corrupt)?;
        let mut missing = len;
        while missing > 0 {
            let batch = &mut numbers[..missing.min(BATCH)];
            let got = page.read(batch).map_err(corrupt)?.n_processed;
            if got != batch.len() {
                return Err(Error::corrupt(format!("expected {missing} numbers more in a chunk of {len}, got {got}")));
            }
            let (filled, after) = out.split_at_mut(got * SIZE);
            for (to, number) in filled.as_chunks_mut().0.iter_mut().zip(batch) {
                *to = to_le_bytes(*number);
            }
            out = after;
            missing -= got;
        }
        rest = page.into_src();
    }
    match rest.len() {
        0 => Ok(()),
        len => Err(Error::corrupt(format!("expected the end of the last chunk, got {len} bytes more"))),
    }
}

/// Refuses the dictionary mode, which is never written: the library would allocate up to 2^25 numbers because a length says so.
fn check_mode(chunk: &[u8]) -> Result<()> {
    const DICTIONARY: u8 = 4;
    match chunk.first() {
        Some(byte) if byte & 0xF == DICTIONARY => Err(Error::corrupt("expected a mode without a dictionary")),
        _ => Ok(()),
    }
}

/// Refuses a window for repeats that is longer than its chunk: the library allocates two of them, whatever the chunk holds.
fn check_window(meta: &ChunkMeta, len: usize) -> Result<()> {
    /// The shortest window that is written.
    const SHORTEST: usize = 16;
    match &meta.delta_encoding {
        DeltaEncoding::Lookback { config, .. } if 1 << config.window_n_log > len.next_power_of_two().max(SHORTEST) => {
            Err(Error::corrupt(format!("expected a window within {len} numbers, got 2^{}", config.window_n_log)))
        }
        _ => Ok(()),
    }
}

fn corrupt(PcoError { kind, mut message }: PcoError) -> Error {
    message.insert_str(0, if kind == ErrorKind::InsufficientData { "pcodec: too few bytes: " } else { "pcodec: " });
    Error::corrupt(message)
}

#[cfg(test)]
mod tests;
