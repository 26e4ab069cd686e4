//! Compresses each lane as one LZ4 block: the fast general-purpose baseline.
//!
//! A block is written in one shot: no frame, no length in front, no checksum and no dictionary. The decoder knows the length of the lane. A
//! lane without elements takes no bytes at all. Narrow elements go in as they are in memory, one or two bytes each. Hash tables are kept
//! between calls, one pool for each of the two sizes that the library has: 16-bit places below 65535 bytes, 32-bit places from there on.
//!
//! # Source
//! LZ4 block format, <https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md>, as written by `lz4_flex`. The library has one effort,
//! that of the fast mode of LZ4, and is used with its safe features: no `unsafe` code runs.
//!
//! # Settings
//! None.
//!
//! # Bytes
//! The block alone, and nothing for an empty lane.
//!
//! # What it is bad at
//! Floats, and anything else without repeated runs of four bytes or more: there is no entropy coder, so half-precision KV data shrinks only
//! where whole rows repeat. Incompressible lanes grow by 1 byte in 255 and a few more. On a machine with 32-bit pointers the library hashes
//! lanes of 65535 bytes and more in another way, so their blocks differ from those of other machines; all of them decode everywhere.

use gearbox_core::{
    Capabilities, Codec, Context, ElemSet, Error, LaneRef, LaneSpec, Plugin, Pool, Result, register_codec,
};
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Settings of [`Lz4`]: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {}

/// Compresses each lane as one LZ4 block.
#[derive(Debug)]
pub struct Lz4 {
    config: Config,
    /// Tables of 16-bit places.
    small: Pool<CompressTable>,
    /// Tables of 32-bit places. Apart, because a table that has grown stays large, and a large one gives small lanes other bytes.
    large: Pool<CompressTable>,
}

/// From this many bytes on the library needs 32-bit places.
const LARGE: usize = 65_535;

/// The longest lane: `LZ4_MAX_INPUT_SIZE` of the block format.
const MAX_INPUT: usize = 0x7E00_0000;

impl Plugin for Lz4 {
    const ID: &'static str = "lz4";
    const SUMMARY: &'static str = "one LZ4 block per lane";
    const SOURCE: &'static str = "LZ4 block format; https://github.com/PSeitz/lz4_flex";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config, small: Pool::default(), large: Pool::default() })
    }
}

register_codec!(Lz4);

impl Codec for Lz4 {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    /// The bound of the block format, which is tighter than the buffer that the library asks for.
    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        match lane.byte_len() {
            0 => 0,
            len => (len / 255 + 16).saturating_add(len),
        }
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let bytes = lane.bytes();
        let tables = match bytes.len() {
            0 => return Ok(()),
            1..LARGE => &self.small,
            LARGE..=MAX_INPUT => &self.large,
            len => return Err(Error::unsupported(format!("expected a lane of at most {MAX_INPUT} bytes, got {len}"))),
        };
        let start = out.len();
        out.resize(start + get_maximum_output_size(bytes.len()), 0);
        let new = || if bytes.len() < LARGE { CompressTable::small() } else { CompressTable::large() };
        let written = tables.with(new, |table| compress_into_with_table(bytes, &mut out[start..], table));
        out.truncate(start + *written.as_ref().unwrap_or(&0));
        written.map(|_| ()).map_err(|error| Error::unsupported(format!("lz4 fails: {error}")))
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        LaneRef::new(lane, out)?;
        let expected = out.len();
        let written = match encoded.len() {
            0 => 0,
            _ => decompress_into(encoded, out).map_err(|error| Error::corrupt(format!("lz4: {error}")))?,
        };
        if written == expected && encoded.is_empty() == out.is_empty() {
            Ok(())
        } else {
            Err(Error::corrupt(format!(
                "expected an lz4 block of {expected} bytes, got {written} bytes from a block of {}",
                encoded.len()
            )))
        }
    }
}

#[cfg(test)]
mod tests;
