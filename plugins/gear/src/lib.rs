//! Splits floats into a high and a low half and compresses both apart, with or without a delta over tokens.
//!
//! The high byte of a half-precision number holds sign, exponent and the top of the mantissa: few values, which zstd shrinks well. The low
//! byte is nearly noise. Apart, neither spoils the other. `gear-delta` also tries the difference of each high half to the same channel
//! of the token before, which wins where neighbouring tokens resemble each other. F16 and Bf16 are split into bytes, F32 into 16-bit halves.
//!
//! # Source
//! The byte-split experiment `gear_fp16` on KV-cache dumps. Differences in the default mode: a stream that zstd does not shrink is
//! stored as it is, the delta is used only where it is smaller, and what was chosen is written down.
//!
//! # Settings
//! | Key | Range | Default | Meaning |
//! |---|---|---|---|
//! | `level` | -7 to 22 | 3 | effort of zstd; 0 is the library's default, which is 3 |
//! | `mode` | `smallest`, `reference` | `smallest` | the smallest form of each stream, or what the experiment did: always frames, `gear-delta` always with the delta |
//!
//! # Bytes
//! A lane without elements takes none. Every other lane is
//!
//! | Bytes | Content |
//! |---|---|
//! | 1 | form of the high stream: 0 stored, 1 zstd frame, 2 zstd frame of the delta (`gear-delta` only) |
//! | 1 | form of the low stream: 0 stored, 1 zstd frame |
//! | 1 to 9 | length of the high stream's bytes, LEB128 in its shortest form |
//! | that many | high stream |
//! | the rest | low stream |
//!
//! Both streams are half as long as the lane, in its element order; 16-bit halves are little-endian. The delta is modulo 256 or 65536, its
//! first token is as it is. Frames state their content size. In `smallest` no lane grows by more than those first two rows and the length.
//!
//! # What it is bad at
//! Bits: the split is by bytes, so the F16 exponent shares its byte with two bits of mantissa, and the Bf16 exponent loses its lowest bit to
//! the other stream. One decoded token at a time leaves no earlier token for the delta and pays for two frames. zstd sees no channels.

mod entropy;
mod frame;
pub mod kernels;
mod streams;

pub use entropy::ByteCounts;
pub use frame::Frames;
use frame::Unframer;
use gearbox_core::{
    Capabilities, Chunk, Codec, Context, ElemSet, Error, ErrorKind, LaneRef, LaneSpec, Plugin, Pool, Result, ResultExt,
    register_codec,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
pub use streams::Streams;
use streams::Width;

/// Settings of [`Gear`] and [`GearDelta`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Effort of zstd: negative is fastest, 22 smallest; 0 is the library's default, which is 3.
    #[schemars(range(min = -7, max = 22))]
    pub level: i32,
    /// How the form of each stream is chosen.
    pub mode: Mode,
}

impl Default for Config {
    fn default() -> Self {
        Self { level: 3, mode: Mode::Smallest }
    }
}

/// How the form of each stream is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The smallest of the stored stream, its zstd frame and, in `gear-delta`, the zstd frame of its delta.
    #[default]
    Smallest,
    /// Always a zstd frame, in `gear-delta` always of the delta: the frames of the reference experiment.
    Reference,
}

/// The codec `gear`: both halves apart.
pub type Gear = ByteSplit<false>;

/// The codec `gear-delta`: both halves apart, the high one also as a delta along tokens.
pub type GearDelta = ByteSplit<true>;

/// Splits floats into halves; with `DELTA` the high ones may be stored as a delta along tokens.
#[derive(Debug)]
pub struct ByteSplit<const DELTA: bool> {
    config: Config,
    encoders: Pool<Encoder>,
    decoders: Pool<Decoder>,
}

#[derive(Debug)]
struct Encoder {
    streams: Streams,
    frames: Frames,
    /// Frame of the high stream.
    plain: Vec<u8>,
    /// Frame of its delta.
    delta: Vec<u8>,
}

#[derive(Debug, Default)]
struct Decoder {
    unframer: Unframer,
    hi: Vec<u8>,
    lo: Vec<u8>,
}

/// Forms of a stream, as stored.
const STORED: u8 = 0;
const FRAME: u8 = 1;
const DELTA_FRAME: u8 = 2;

impl Plugin for Gear {
    const ID: &'static str = "gear";
    const SUMMARY: &'static str = "high and low bytes of floats in separate zstd frames";
    const SOURCE: &'static str = "gear_fp16 experiment, byte split";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self::with(config))
    }
}

impl Plugin for GearDelta {
    const ID: &'static str = "gear-delta";
    const SUMMARY: &'static str =
        "high and low bytes of floats in separate zstd frames, high ones as a delta along tokens";
    const SOURCE: &'static str = "gear_fp16 experiment, byte split with delta";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self::with(config))
    }
}

register_codec!(Gear);
register_codec!(GearDelta);

impl<const DELTA: bool> ByteSplit<DELTA> {
    fn with(config: Config) -> Self {
        Self { config, encoders: Pool::default(), decoders: Pool::default() }
    }
}

impl<const DELTA: bool> Codec for ByteSplit<DELTA> {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        let half = lane.byte_len() / 2;
        let stream = match self.config.mode {
            _ if half == 0 => return 0,
            Mode::Smallest => half,
            Mode::Reference => zstd::compress_bound(half),
        };
        stream.saturating_mul(2).saturating_add(2 + varint_len(stream))
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let chunk = float_chunk(lane.spec(), lane.bytes())?;
        if chunk.bytes().is_empty() {
            return Ok(());
        }
        let start = out.len();
        let result = self
            .encoders
            .with(|| Encoder::new(self.config.level), |encoder| encoder.encode(chunk, DELTA, self.config.mode, out));
        if result.is_err() {
            out.truncate(start);
        }
        result.context(|| lane.spec().to_string())
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        let width = Width::of(float_chunk(lane, out)?.dtype())?;
        self.decoders
            .with(Decoder::default, |decoder| decoder.decode(encoded, width, DELTA.then_some(lane.shape.row()), out))
            .context(|| lane.to_string())
    }
}

fn float_chunk<'a>(lane: &LaneSpec, bytes: &'a [u8]) -> Result<Chunk<'a>> {
    let dtype = lane.elem.dtype().ok_or_else(|| {
        Error::new(ErrorKind::UnsupportedDType, format!("{lane}: expected elements f16, bf16 or f32"))
    })?;
    Chunk::new(lane.shape, dtype, bytes)
}

impl Encoder {
    fn new(level: i32) -> Self {
        Self { streams: Streams::default(), frames: Frames::new(level), plain: Vec::new(), delta: Vec::new() }
    }

    fn encode(&mut self, chunk: Chunk<'_>, delta: bool, mode: Mode, out: &mut Vec<u8>) -> Result<()> {
        let Self { streams, frames, plain, delta: delta_frame } = self;
        let smallest = mode == Mode::Smallest;
        match (delta, smallest) {
            (false, _) => streams.split(chunk)?,
            (true, true) => streams.split_both(chunk)?,
            (true, false) => streams.split_delta(chunk)?,
        }

        let mut hi = (STORED, streams.hi());
        if smallest || !delta {
            plain.clear();
            frames.append(streams.hi(), plain)?;
            if plain.len() < hi.1.len() || !smallest {
                hi = (FRAME, plain);
            }
        }
        // The delta of a single token is the token itself.
        if delta && (chunk.shape().seq > 1 || !smallest) {
            delta_frame.clear();
            frames.append(streams.hi_delta(), delta_frame)?;
            if delta_frame.len() < hi.1.len() || !smallest {
                hi = (DELTA_FRAME, delta_frame);
            }
        }

        let head = out.len();
        out.extend_from_slice(&[hi.0, FRAME]);
        put_varint(hi.1.len(), out);
        out.extend_from_slice(hi.1);
        let start = out.len();
        frames.append(streams.lo(), out)?;
        if smallest && out.len() - start >= streams.lo().len() {
            out.truncate(start);
            out.extend_from_slice(streams.lo());
            out[head + 1] = STORED;
        }
        Ok(())
    }
}

impl Decoder {
    fn decode(&mut self, encoded: &[u8], width: Width, row: Option<usize>, out: &mut [u8]) -> Result<()> {
        let Self { unframer, hi, lo } = self;
        let half = out.len() / 2;
        if half == 0 {
            let got = encoded.len();
            return if got == 0 { Ok(()) } else { Err(Error::corrupt(format!("expected no bytes, got {got}"))) };
        }
        let cut = || Error::corrupt(format!("expected a header, got {} bytes", encoded.len()));
        let (&[hi_form, lo_form], rest) = encoded.split_first_chunk().ok_or_else(cut)?;
        let (hi_len, rest) = take_varint(rest).ok_or_else(cut)?;
        let (hi_bytes, lo_bytes) = usize::try_from(hi_len)
            .ok()
            .and_then(|len| rest.split_at_checked(len))
            .ok_or_else(|| Error::corrupt(format!("high stream: expected {hi_len} bytes, got {}", rest.len())))?;
        let delta_row = match (hi_form, row) {
            (DELTA_FRAME, Some(row)) => Some(row),
            (STORED | FRAME, _) => None,
            _ => return Err(Error::corrupt(format!("high stream: form {hi_form} is unknown"))),
        };
        if lo_form > FRAME {
            return Err(Error::corrupt(format!("low stream: form {lo_form} is unknown")));
        }
        let hi = stream(hi_form, hi_bytes, half, unframer, hi).context(|| "high stream".to_owned())?;
        let lo = stream(lo_form, lo_bytes, half, unframer, lo).context(|| "low stream".to_owned())?;
        width.merge(hi, lo, delta_row, out);
        Ok(())
    }
}

/// The content of a stored stream: where it lies, or decompressed into `scratch`.
fn stream<'a>(
    form: u8,
    bytes: &'a [u8],
    len: usize,
    unframer: &mut Unframer,
    scratch: &'a mut Vec<u8>,
) -> Result<&'a [u8]> {
    if form != STORED {
        unframer.decompress(bytes, len, scratch)?;
        return Ok(scratch);
    }
    if bytes.len() == len {
        Ok(bytes)
    } else {
        Err(Error::corrupt(format!("expected {len} bytes, got {}", bytes.len())))
    }
}

/// Bytes that [`put_varint`] writes.
fn varint_len(value: usize) -> usize {
    (usize::BITS - value.leading_zeros()).max(1).div_ceil(7) as usize
}

/// Appends LEB128 in its shortest form.
fn put_varint(mut value: usize, out: &mut Vec<u8>) {
    while value > 0x7F {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// What [`put_varint`] wrote, and what follows it; longer forms are refused.
fn take_varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (i, &byte) in bytes.iter().enumerate().take(9) {
        value |= u64::from(byte & 0x7F) << (7 * i);
        if byte < 0x80 {
            return (byte != 0 || i == 0).then_some((value, &bytes[i + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests;
