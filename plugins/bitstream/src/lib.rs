//! Static order-0 entropy coding: `huffman` and `arithmetic`.
//!
//! Elements are cut into streams of small symbols, and each stream is coded with one table of how often its symbols occur. Of floats only
//! the exponents have few values; signs and mantissas are nearly random and stay as they are, unless their counts say otherwise.
//!
//! # Source
//! The experiments `bitstream/huffman` and `bitstream/arith` on KV-cache dumps; Huffman 1952, and Martin, *Range encoding*, 1979. Differences
//! in the fast mode: the sign is no part of the exponent's symbol, streams that do not pay are not coded, tables take tens of bytes
//! instead of kilobytes, codes are limited to 12 bits and frequencies to 14, four parts of a stream are decoded at once, and damage is found.
//!
//! # Settings
//! | Key | Range | Default | Meaning |
//! |---|---|---|---|
//! | `mode` | `fast`, `reference` | `fast` | `reference`: streams are those of the experiments, bit by bit |
//! | `codebook` | `global`, `per-dump` | `global` | tables learned from all lanes and stored once, or with each lane |
//!
//! With `global` a lane still keeps a table of its own where that is smaller, where the learned one lacks one of its symbols, and where
//! nothing was learned; so it is never worse than `per-dump` by more than the artifact.
//!
//! # Bytes
//! A lane without elements takes none. Streams, from the first bit of an element down (`reference` in brackets where it differs):
//!
//! | Elements | Streams |
//! |---|---|
//! | F16 | 5 bits exponent, sign, 10 bits mantissa (6 bits sign and exponent, 10 bits mantissa) |
//! | Bf16 | 8 bits exponent, sign, 7 bits mantissa (9 bits sign and exponent, 7 bits mantissa) |
//! | F32 | 8 bits exponent, sign, 12 and 11 bits mantissa (9 bits sign and exponent, 12 and 11 bits mantissa) |
//! | U8, U16, U32 | bytes |
//! | Bits(n) | n bits; above 12 the upper n - 8 and the lower 8 |
//!
//! | Bytes | Content |
//! |---|---|
//! | 1 | two bits per stream, the first stream in the lowest: 0 raw, 1 constant, 2 coded with its own table, 3 with the shared one |
//! | the rest | the streams |
//!
//! | Stream | Content |
//! |---|---|
//! | raw | planes of 8, 4, 2 and 1 bits of each symbol, from its lowest bit, as many as make up its width; each packed as [`gearbox_core::bits`] does |
//! | constant | the symbol, 1 byte, or 2 little-endian above 8 bits |
//! | coded | if another coded stream follows: the length of what comes, in LEB128; with an own table: the table; then the codes |
//!
//! LEB128 is always in its shortest form. `reference` codes every stream. Codes and tables:
//!
//! | | Table | Codes |
//! |---|---|---|
//! | `huffman` | lengths as half bytes, see `lengths.rs` | segments of bits, see `segments.rs` and `huffman.rs` |
//! | `huffman`, `reference` | lengths as sparse numbers | the bits of the experiment's file |
//! | `arithmetic` | frequencies as sparse numbers, 4096 in all, 16384 above 8 bits | segments of 32-bit steps, see `segments.rs` and `range.rs` |
//! | `arithmetic`, `reference` | counts as sparse numbers | the bits of the experiment's file |
//!
//! Sparse numbers are one LEB128 per symbol of the alphabet; a 0 is followed by how many more zeros there are. An artifact holds, sorted by
//! element type and role, the number of the type (F16 0, Bf16 1, F32 2, U8 3, U16 4, U32 5, Bits(n) 16 + n), the role (key 0, value 1),
//! and for each stream 0, or 1 and the table.
//!
//! # What it is bad at
//! Anything but the frequency of single symbols: it sees neither channels nor earlier tokens, so the exponents of F16 keys stay at 2.5 to 3
//! bits, and with 11 bits of sign and mantissa no F16 tensor gets below 13.5 of its 16. Lanes of few elements pay for their table.

mod counts;
mod huffman;
mod lane;
mod lengths;
mod model;
mod range;
pub mod reference;
mod segments;
mod symbols;
mod wire;

#[cfg(test)]
mod tests;

use std::marker::PhantomData;
use std::sync::Arc;

pub use counts::Counts;
use gearbox_core::{
    Artifact, Capabilities, Codec, Context, ElemSet, LaneRef, LaneSpec, Plugin, Result, ResultExt, Sample,
    register_codec,
};
use lane::{LaneCoder, Lanes};
pub use model::Model;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
pub use symbols::{Field, SymbolBuffer, fields};
pub use wire::Reader;

/// Settings of [`Huffman`] and [`Arithmetic`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Which streams are made and how they are coded.
    pub mode: Mode,
    /// Where the models of the streams are kept.
    pub codebook: Codebook,
}

/// Which streams are made and how they are coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Sign, exponent and mantissa apart, each coded only where that pays, by a fast coder.
    #[default]
    Fast,
    /// The streams of the reference, bit by bit: sign and exponent as one symbol, everything coded.
    Reference,
}

/// Where the models of the streams are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Codebook {
    /// Learned from all lanes and stored once; a lane that it does not fit, or every lane where nothing was learned, keeps its own.
    #[default]
    Global,
    /// With every lane.
    PerDump,
}

/// A pair of coders: that of the fast mode and that of the reference.
pub trait Kind: std::fmt::Debug + Send + Sync + 'static {
    /// Id of the codec.
    const ID: &'static str;
    /// One line for tables.
    const SUMMARY: &'static str;
    /// Where the method comes from.
    const SOURCE: &'static str;
    /// The coder of the fast mode.
    type Fast: Model;
    /// The coder of the reference.
    type Reference: Model;
}

/// Huffman codes.
#[derive(Debug)]
pub enum HuffmanKind {}

impl Kind for HuffmanKind {
    const ID: &'static str = "huffman";
    const SUMMARY: &'static str = "Huffman codes for exponents; signs and mantissas as they are";
    const SOURCE: &'static str = "bitstream experiment, Huffman";
    type Fast = huffman::Huffman;
    type Reference = reference::Huffman;
}

/// Arithmetic codes.
#[derive(Debug)]
pub enum ArithmeticKind {}

impl Kind for ArithmeticKind {
    const ID: &'static str = "arithmetic";
    const SUMMARY: &'static str = "a range coder for exponents; signs and mantissas as they are";
    const SOURCE: &'static str = "bitstream experiment, arithmetic coder";
    type Fast = range::RangeCoder;
    type Reference = reference::Arithmetic;
}

/// The codec `huffman`.
pub type Huffman = Bitstream<HuffmanKind>;

/// The codec `arithmetic`.
pub type Arithmetic = Bitstream<ArithmeticKind>;

/// Codes the streams of symbols that elements are made of.
#[derive(Debug)]
pub struct Bitstream<K> {
    config: Config,
    coder: Box<dyn LaneCoder>,
    kind: PhantomData<K>,
}

impl<K: Kind> Plugin for Bitstream<K> {
    const ID: &'static str = K::ID;
    const SUMMARY: &'static str = K::SUMMARY;
    const SOURCE: &'static str = K::SOURCE;
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        let coder: Box<dyn LaneCoder> = match config.mode {
            Mode::Fast => Box::new(Lanes::<K::Fast>::new()),
            Mode::Reference => Box::new(Lanes::<K::Reference>::new()),
        };
        Ok(Self { config, coder, kind: PhantomData })
    }
}

register_codec!(Huffman);
register_codec!(Arithmetic);

impl<K: Kind> Codec for Bitstream<K> {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        self.coder.max_encoded_len(lane)
    }

    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        self.coder.encode(lane, cx.role, out).context(|| lane.spec().to_string())
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, cx: &Context<'_>, out: &mut [u8]) -> Result<()> {
        self.coder.decode(encoded, lane, cx.role, out).context(|| lane.to_string())
    }

    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        match self.config.codebook {
            Codebook::Global => self.coder.train(samples),
            Codebook::PerDump => Ok(None),
        }
    }

    fn with_artifact(&self, artifact: &[u8]) -> Result<Option<Arc<dyn Codec>>> {
        let coder: Box<dyn LaneCoder> = match (self.config.codebook, self.config.mode) {
            (Codebook::PerDump, _) => return Ok(None),
            (_, Mode::Fast) => Box::new(Lanes::<K::Fast>::with_artifact(artifact)?),
            (_, Mode::Reference) => Box::new(Lanes::<K::Reference>::with_artifact(artifact)?),
        };
        Ok(Some(Arc::new(Self { config: self.config, coder, kind: PhantomData })))
    }
}
