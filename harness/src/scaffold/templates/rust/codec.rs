//! The codec `@NAME@`: differences between tokens, with runs of zeros as one count.

#![forbid(unsafe_code)]

use gearbox_core::{
    Capabilities, Codec, Context, ElemSet, Error, LaneRef, LaneSpec, Plugin, Result,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

// The whole boundary to the host. More plugins of any kind may stand in these lists.
gearbox_abi::export_plugins! { codecs: [TokenRuns] }

/// Settings. Doc comments become the descriptions that `gearbox plugin show` prints, and the host
/// checks the ranges before `new` is called.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How many tokens back lies what an element is subtracted from; 0 to subtract nothing.
    #[schemars(range(max = 64))]
    pub distance: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { distance: 1 }
    }
}

/// Subtracts each byte from that of an earlier token, and stores runs of zeros as their length.
///
/// Any byte but zero stands for itself; a zero is followed by a byte that says how many more
/// follow, up to 255. Good for integer codes that stay the same from token to token, bad for floats.
#[derive(Debug)]
pub struct TokenRuns {
    config: Config,
}

impl Plugin for TokenRuns {
    const ID: &'static str = "@NAME@";
    const SUMMARY: &'static str = "difference to an earlier token, runs of zeros";
    const SOURCE: &'static str = "own work";
    // Raise it when bytes of earlier versions can no longer be read.
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config })
    }
}

impl TokenRuns {
    /// Bytes between a byte and the one it is subtracted from.
    fn step(&self, lane: &LaneSpec) -> usize {
        let row = lane.shape.row().saturating_mul(lane.elem.size());
        row.saturating_mul(self.config.distance as usize)
    }
}

/// The byte `step` before place `idx`; 0 where nothing is subtracted.
fn earlier(bytes: &[u8], idx: usize, step: usize) -> u8 {
    match idx.checked_sub(step) {
        Some(place) if step > 0 => bytes[place],
        _ => 0,
    }
}

impl Codec for TokenRuns {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        // A lone zero takes two bytes.
        lane.byte_len().saturating_mul(2)
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (bytes, step) = (lane.bytes(), self.step(lane.spec()));
        let mut zeros = 0;
        for (idx, byte) in bytes.iter().enumerate() {
            let difference = byte.wrapping_sub(earlier(bytes, idx, step));
            if difference == 0 {
                zeros += 1;
            }
            if zeros == 256 || (difference != 0 && zeros > 0) {
                out.extend([0, (zeros - 1) as u8]);
                zeros = 0;
            }
            if difference != 0 {
                out.push(difference);
            }
        }
        if zeros > 0 {
            out.extend([0, (zeros - 1) as u8]);
        }
        Ok(())
    }

    fn decode(
        &self,
        encoded: &[u8],
        lane: &LaneSpec,
        _: &Context<'_>,
        out: &mut [u8],
    ) -> Result<()> {
        let (step, len) = (self.step(lane), out.len());
        let mut encoded = encoded.iter().copied();
        let mut idx = 0;
        // `encoded` may be damaged in any way: every length in it is checked before it is used.
        while let Some(difference) = encoded.next() {
            let run = match difference {
                0 => {
                    usize::from(encoded.next().ok_or_else(|| {
                        Error::corrupt(format!("{lane}: ends within a run at byte {idx}"))
                    })?) + 1
                }
                _ => 1,
            };
            if run > len - idx {
                return Err(Error::corrupt(format!(
                    "{lane}: expected at most {} bytes at byte {idx}, got a run of {run}",
                    len - idx
                )));
            }
            for _ in 0..run {
                out[idx] = earlier(out, idx, step).wrapping_add(difference);
                idx += 1;
            }
        }
        if idx < len {
            return Err(Error::corrupt(format!(
                "{lane}: expected {len} bytes, got {idx}"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gearbox_core::{Elem, Role, Shape};

    #[test]
    fn equal_tokens_are_one_run() -> Result<()> {
        let codec = TokenRuns::new(Config::default())?;
        let spec = LaneSpec::new("codes", Elem::U8, Shape::new(3, 1, 2));
        let (bytes, context) = ([5, 7, 5, 7, 5, 8], Context::new(0, Role::Key, 0));
        let mut encoded = Vec::new();
        codec.encode(LaneRef::new(&spec, &bytes)?, &context, &mut encoded)?;
        assert_eq!(encoded, [5, 7, 0, 2, 1]);
        let mut decoded = [0; 6];
        codec.decode(&encoded, &spec, &context, &mut decoded)?;
        assert_eq!(decoded, bytes);
        Ok(())
    }
}
