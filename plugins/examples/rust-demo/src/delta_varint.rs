//! Differences between tokens, each in as few bytes as it needs.

use gearbox_core::{Capabilities, Codec, Context, ElemSet, Error, LaneRef, LaneSpec, Plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Settings of [`DeltaVarint`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What each element is subtracted from.
    pub from: From,
}

/// What an element is subtracted from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum From {
    /// The same channel of the token before.
    #[default]
    Token,
    /// The element before.
    Element,
}

/// Stores each element as its difference from an earlier one: zigzag, then 7 bits per byte, low bits first (LEB128).
///
/// Elements count as unsigned integers of their width, floats by their bits. Good for integer codes that change slowly from token to token,
/// bad for floats, whose low bits are noise.
#[derive(Debug)]
pub struct DeltaVarint {
    config: Config,
}

impl Plugin for DeltaVarint {
    const ID: &'static str = "delta-varint";
    const SUMMARY: &'static str = "difference to the token before, zigzag and LEB128";
    const SOURCE: &'static str = "own work, to show how a plugin is written";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config })
    }
}

impl DeltaVarint {
    /// Elements between an element and the one it is subtracted from.
    fn step(&self, lane: &LaneSpec) -> usize {
        match self.config.from {
            From::Token => lane.shape.row(),
            From::Element => 1,
        }
    }
}

/// Reads an element of 1, 2 or 4 bytes.
fn element(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// The difference as a number that is small if it is near zero, on either side; both wrap around at the width of the element.
fn zigzag(difference: u32, bits: u32) -> u32 {
    let signed = (difference << (32 - bits)).cast_signed() >> (32 - bits);
    (signed << 1 ^ signed >> 31).cast_unsigned()
}

fn unzigzag(code: u32) -> u32 {
    code >> 1 ^ (code & 1).wrapping_neg()
}

impl Codec for DeltaVarint {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        let bytes_per_element = (8 * lane.elem.size()).div_ceil(7);
        lane.shape.elements().saturating_mul(bytes_per_element)
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (size, step) = (lane.spec().elem.size(), self.step(lane.spec()));
        let bytes = lane.bytes();
        for (idx, current) in bytes.chunks_exact(size).enumerate() {
            let before = idx.checked_sub(step).map_or(0, |before| element(&bytes[before * size..][..size]));
            let mut code = zigzag(element(current).wrapping_sub(before), 8 * size as u32);
            while code >= 0x80 {
                out.push(code as u8 | 0x80);
                code >>= 7;
            }
            out.push(code as u8);
        }
        Ok(())
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        let (size, step) = (lane.elem.size(), self.step(lane));
        let mut encoded = encoded.iter();
        for idx in 0..out.len() / size {
            let (mut code, mut shift) = (0u32, 0);
            loop {
                let byte = *encoded.next().ok_or_else(|| Error::corrupt(format!("{lane}: ends at element {idx}")))?;
                let part = u32::from(byte & 0x7F);
                if shift > 28 || part > u32::MAX >> shift {
                    return Err(Error::corrupt(format!("{lane}: element {idx} has more than 32 bits")));
                }
                code |= part << shift;
                shift += 7;
                if byte < 0x80 {
                    break;
                }
            }
            let before = idx.checked_sub(step).map_or(0, |before| element(&out[before * size..][..size]));
            let value = before.wrapping_add(unzigzag(code));
            out[idx * size..][..size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
        match encoded.len() {
            0 => Ok(()),
            more => Err(Error::corrupt(format!("{lane}: {more} bytes behind the last element"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_differences_are_small_codes() {
        assert_eq!([0, 1, 2, u32::MAX].map(|difference| zigzag(difference, 32)), [0, 2, 4, 1]);
        assert_eq!(zigzag(0xFF, 8), 1);
        for difference in [0, 1, 255, 1 << 31, u32::MAX] {
            assert_eq!(unzigzag(zigzag(difference, 32)), difference);
        }
    }
}
