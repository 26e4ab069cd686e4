//! Compresses each lane as one Zstandard frame: the general-purpose baseline.
//!
//! A frame is written in one shot, with the content size in its header, no checksum and no dictionary, so its length is that of
//! `zstd::bulk::compress` at the same level; a lane without elements takes no bytes at all. Narrow elements go in as they are in memory,
//! one or two bytes each: the entropy coder of zstd removes what is unused. Contexts are kept between calls, one pool for each direction.
//!
//! # Source
//! RFC 8878; <https://github.com/facebook/zstd>, linked as a library.
//!
//! # Settings
//! | Key | Range | Default | Meaning |
//! |---|---|---|---|
//! | `level` | -7 to 22 | 3 | effort: negative is fastest, 22 smallest; 0 is the library's default, which is 3 |
//!
//! # What it is bad at
//! Floats: mantissa bytes look like noise and hide the exponents between them, so half-precision KV data shrinks by a few per cent only,
//! at any level. Split the bytes first. Incompressible lanes grow by 9 to 12 bytes and 3 more per 128 KiB. From level 20 on a context
//! holds hundreds of megabytes if lanes are that large.

use std::io::Cursor;

use gearbox_core::{
    Capabilities, Codec, Context, ElemSet, Error, LaneRef, LaneSpec, Plugin, Pool, Result, register_codec,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, find_frame_compressed_size, get_error_name, get_frame_content_size};

/// Settings of [`Zstd`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Effort: negative is fastest, 22 smallest; 0 is the library's default, which is 3.
    #[schemars(range(min = -7, max = 22))]
    pub level: i32,
}

impl Default for Config {
    fn default() -> Self {
        Self { level: 3 }
    }
}

/// Compresses each lane as one Zstandard frame.
#[derive(Debug)]
pub struct Zstd {
    config: Config,
    compressors: Pool<Compressor<'static>>,
    decompressors: Pool<Decompressor<'static>>,
}

impl Plugin for Zstd {
    const ID: &'static str = "zstd";
    const SUMMARY: &'static str = "one Zstandard frame per lane";
    const SOURCE: &'static str = "RFC 8878; https://github.com/facebook/zstd";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config, compressors: Pool::default(), decompressors: Pool::default() })
    }
}

register_codec!(Zstd);

impl Codec for Zstd {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        match lane.byte_len() {
            0 => 0,
            // Above the largest input of zstd this is an error code, which is a number above every length.
            len => zstd::compress_bound(len),
        }
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        if lane.bytes().is_empty() {
            return Ok(());
        }
        let start = out.len();
        out.reserve(zstd::compress_bound(lane.bytes().len()));
        // Behind the cursor lies the spare capacity of `out`: the frame is written there, and nothing is filled with zeros before.
        let mut tail = Cursor::new(out);
        tail.set_position(start as u64);
        let result = self.compressors.with(Compressor::default, |compressor| {
            compressor.set_parameter(CParameter::CompressionLevel(self.config.level))?;
            compressor.compress_to_buffer(lane.bytes(), &mut tail)
        });
        result
            .map(|_| ())
            .map_err(|error| Error::unsupported(format!("zstd level {} fails: {error}", self.config.level)))
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        LaneRef::new(lane, out)?;
        let expected = out.len();
        if expected == 0 {
            let len = encoded.len();
            return if len == 0 { Ok(()) } else { Err(Error::corrupt(format!("expected no bytes, got {len}"))) };
        }
        check_frame(encoded, expected).map_err(Error::corrupt)?;
        let written = self
            .decompressors
            .with(Decompressor::default, |decompressor| decompressor.decompress_to_buffer(encoded, out))
            .map_err(|error| Error::corrupt(format!("zstd: {error}")))?;
        if written == expected {
            Ok(())
        } else {
            Err(Error::corrupt(format!("expected {expected} bytes, got {written}")))
        }
    }
}

/// Whether these bytes are one whole frame that holds `expected` bytes, as far as its headers tell; the error is what they are instead.
fn check_frame(encoded: &[u8], expected: usize) -> Result<(), String> {
    match get_frame_content_size(encoded) {
        Ok(Some(size)) if size == expected as u64 => {}
        Ok(Some(size)) => return Err(format!("expected a zstd frame of {expected} bytes, got one of {size}")),
        Ok(None) => return Err("expected a zstd frame that states its content size".to_owned()),
        Err(_) => return Err(format!("expected a zstd frame, got {} other bytes", encoded.len())),
    }
    match find_frame_compressed_size(encoded) {
        Ok(len) if len == encoded.len() => Ok(()),
        Ok(len) => Err(format!("expected a zstd frame of {len} bytes alone, got {}", encoded.len())),
        Err(code) => Err(format!("expected a whole zstd frame: {}", get_error_name(code))),
    }
}

#[cfg(test)]
mod tests;
