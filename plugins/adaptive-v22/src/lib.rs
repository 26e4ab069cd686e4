//! Predicts the byte streams of floats block by block and compresses each stream as one zstd frame.
//!
//! Every float is split into its bytes: the high byte of a half-precision number holds sign, exponent and the top of the mantissa, the low
//! byte is nearly noise. Each stream of bytes is cut into blocks of tokens, and each block gets the one of five predictors that suits it:
//! none, the difference or exclusive or with the token before, the difference to the neighbouring channel, or both differences. The
//! predicted blocks are joined again and compressed at once.
//!
//! # Source
//! The codec `adaptive_v22` of the offline evaluations `h2o_v2` to `h2o_final`, which only ever computed sizes. Differences from it: the
//! stream is written and decoded, the 8 header bytes that it counted have a content, and unless `choice` is `reference` a stream that
//! does not shrink is stored as it is. F32 is our addition.
//!
//! # Settings
//! | Key | Range | Default | Meaning |
//! |---|---|---|---|
//! | `choice` | `entropy`, `trial`, `reference` | `entropy` | how the predictor of a block is chosen, see below |
//! | `level` | -7 to 22 | 3 | effort of zstd; 0 is the library's default, which is 3 |
//! | `block_seq` | 1 to 16777215 | 64 | tokens of a block |
//! | `bitshuffle` | | false | order the bits of a predicted block by their place in the byte |
//! | `key_high`, `key_low` | list of predictors | all five | candidates for the first byte of keys, and for the others; earlier ones win ties |
//! | `value_high`, `value_low` | list of predictors | `raw`, `delta_seq`, `xor_seq` | the same for values |
//!
//! Predictors are `raw`, `delta_seq`, `xor_seq`, `pair_delta` and `pair_delta_delta_seq`, see [`Predictor`]. Each starts anew in every block.
//!
//! - `trial` compresses every candidate of every block as a frame of its own and takes the smallest. What is stored is one frame of all
//!   blocks, so the choice can still be wrong; and it takes as long as that many compressions.
//! - `reference` is `trial` without stored streams: the bytes and the accounting of the reference.
//! - `entropy` counts the bytes of a sample of each block behind each candidate instead, after the bitshuffle if there is one. The candidate
//!   with the least order-0 entropy over all blocks becomes that of the stream, or an earlier one that costs at most 1/64 more; a block keeps
//!   another one if that saves more than 1/16. If blocks differ, the stream is compressed with and without those exceptions.
//!
//! What `entropy` promises: a stream takes no more bytes than with the candidate of the stream in all blocks, and no more than 8 bytes beyond
//! the stream itself. That no other candidate alone would take fewer needs one compression each to prove, and the estimate does not see
//! repeats. On the bundled sample none did, and with a bitshuffle the best took 0.9 % fewer; the tests hold the codec to that.
//!
//! The search for repeats takes most of the time of zstd, and finds little in floats unless whole tokens repeat, as values of the first layer
//! do. So `entropy` looks for repeated pieces first: streams without them are compressed at level 1, which leaves the Huffman code, and only
//! the others, and all bitshuffled ones, at `level`.
//!
//! # Bytes
//! A lane without elements takes none. Every other lane is one stream for each byte of an element, the most significant first:
//!
//! | Bytes | Content |
//! |---|---|
//! | 1 | bit 0: the payload is a zstd frame, not the stream itself; bit 1: blocks are bitshuffled; other bits are 0 |
//! | 3 | tokens of a block `b`, little-endian, 1 to `seq`; 0 if the stream is stored as it is |
//! | 4 | bytes of the payload, little-endian |
//! | `ceil(seq / b)` | for each block the predictor: 0 `raw`, 1 `delta_seq`, 2 `xor_seq`, 3 `pair_delta`, 4 `pair_delta_delta_seq`; none if stored |
//! | as stated | payload |
//!
//! The stream has one byte per element, in the order of the lane. The frame states its content size, has no checksum and no dictionary;
//! its content is the predicted, and then perhaps bitshuffled, blocks in order. A lane grows by no more than the 8 bytes of each stream
//! unless `choice` is `reference`.
//!
//! # What it is bad at
//! Bits: the split is by bytes, so the exponent of F16 shares its byte with two bits of mantissa, and that of Bf16 loses its lowest bit to
//! the other stream. Prediction starts anew in every block although the joined frame cannot be decoded from the middle. Pairs of channels
//! are neighbours, while most models rotate channels half a head apart. One decoded token at a time pays for two headers and two frames.

pub mod bitshuffle;
mod decode;
mod encode;
mod estimate;
mod frame;
mod predictor;

use decode::Decoder;
pub use encode::{Encoder, Usage};
use gearbox_core::{
    Capabilities, Chunk, Codec, Context, ElemSet, Error, ErrorKind, LaneRef, LaneSpec, Plugin, Pool, Result, ResultExt,
    Role, Shape, register_codec,
};
pub use predictor::Predictor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Settings of [`AdaptiveV22`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How the predictor of a block is chosen.
    pub choice: Choice,
    /// Effort of zstd: negative is fastest, 22 smallest; 0 is the library's default, which is 3.
    #[schemars(range(min = -7, max = 22))]
    pub level: i32,
    /// Tokens of a block.
    #[schemars(range(min = 1, max = Config::MAX_BLOCK))]
    pub block_seq: u32,
    /// Order the bits of a predicted block by their place in the byte.
    pub bitshuffle: bool,
    /// Candidates for the most significant byte of keys, without repetition; an earlier one wins a tie.
    #[schemars(length(min = 1), extend("uniqueItems" = true, "x-expected" = EXPECTED))]
    pub key_high: Vec<Predictor>,
    /// Candidates for the other bytes of keys.
    #[schemars(length(min = 1), extend("uniqueItems" = true, "x-expected" = EXPECTED))]
    pub key_low: Vec<Predictor>,
    /// Candidates for the most significant byte of values.
    #[schemars(length(min = 1), extend("uniqueItems" = true, "x-expected" = EXPECTED))]
    pub value_high: Vec<Predictor>,
    /// Candidates for the other bytes of values.
    #[schemars(length(min = 1), extend("uniqueItems" = true, "x-expected" = EXPECTED))]
    pub value_low: Vec<Predictor>,
}

/// What is legal for a list of predictors, in words.
const EXPECTED: &str = "a list of predictors that is not empty and names none twice";

impl Default for Config {
    fn default() -> Self {
        let of_keys = Predictor::ALL.to_vec();
        let of_values = vec![Predictor::Raw, Predictor::DeltaSeq, Predictor::XorSeq];
        Self {
            choice: Choice::Entropy,
            level: 3,
            block_seq: 64,
            bitshuffle: false,
            key_high: of_keys.clone(),
            key_low: of_keys,
            value_high: of_values.clone(),
            value_low: of_values,
        }
    }
}

impl Config {
    /// Most tokens of a block: what three bytes hold.
    pub const MAX_BLOCK: u32 = (1 << 24) - 1;

    /// Candidates for the first stream of a role, or for the others.
    fn candidates(&self, role: Role, high: bool) -> &[Predictor] {
        match (role, high) {
            (Role::Key, true) => &self.key_high,
            (Role::Key, false) => &self.key_low,
            (Role::Value, true) => &self.value_high,
            (Role::Value, false) => &self.value_low,
        }
    }
}

/// How the predictor of a block is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// By counting bytes of a sample; streams that do not shrink are stored as they are.
    #[default]
    Entropy,
    /// By compressing every candidate of every block; streams that do not shrink are stored as they are.
    Trial,
    /// As `trial`, but always as a frame: the bytes that the reference counts.
    Reference,
}

/// The codec `adaptive-v22`.
#[derive(Debug)]
pub struct AdaptiveV22 {
    config: Config,
    encoders: Pool<Encoder>,
    decoders: Pool<Decoder>,
}

/// Bytes before the modes of a stream.
const HEADER: usize = 8;

/// Bits of the first byte of a header.
const FRAMED: u8 = 1;
const SHUFFLED: u8 = 2;

impl Plugin for AdaptiveV22 {
    const ID: &'static str = "adaptive-v22";
    const ALIASES: &'static [&'static str] = &["adaptive_v22"];
    const SUMMARY: &'static str = "byte streams of floats, predicted block by block, in one zstd frame each";
    const SOURCE: &'static str = "offline evaluations h2o_v2 to h2o_final, codec adaptive_v22";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config, encoders: Pool::default(), decoders: Pool::default() })
    }
}

register_codec!(AdaptiveV22);

impl Codec for AdaptiveV22 {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        let elements = lane.shape.elements();
        let stream = match self.config.choice {
            _ if elements == 0 => return 0,
            Choice::Entropy | Choice::Trial => elements,
            Choice::Reference => {
                zstd::compress_bound(elements).saturating_add(blocks(lane.shape, self.config.block_seq as usize))
            }
        };
        stream.saturating_add(HEADER).saturating_mul(lane.elem.size())
    }

    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let chunk = float_chunk(lane.spec(), lane.bytes())?;
        self.encoders
            .with(|| Encoder::new(self.config.clone()), |encoder| encoder.encode(chunk, cx.role, out))
            .map(|_| ())
            .context(|| lane.spec().to_string())
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        float_chunk(lane, out)?;
        self.decoders
            .with(Decoder::default, |decoder| decoder.decode(encoded, lane.shape, out))
            .context(|| lane.to_string())
    }
}

/// Version of the linked zstd library; the sizes of frames depend on it.
pub fn zstd_version() -> &'static str {
    zstd::zstd_safe::version_string()
}

/// Blocks of a stream.
fn blocks(shape: Shape, block_seq: usize) -> usize {
    shape.seq.div_ceil(block_seq.max(1))
}

/// A lane as a tensor; refuses lanes that are none.
fn float_chunk<'a>(lane: &LaneSpec, bytes: &'a [u8]) -> Result<Chunk<'a>> {
    match lane.elem.dtype() {
        Some(dtype) => Chunk::new(lane.shape, dtype, bytes),
        None => Err(Error::new(ErrorKind::UnsupportedDType, format!("{lane}: expected elements f16, bf16 or f32"))),
    }
}

#[cfg(test)]
mod tests;
