//! The transform `truncate`.

use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, DType, ElemSet, Lane, LaneSpec, Latents, LossyTransform, Plugin,
    Result, Role, register_transform,
};
use pulp::Arch;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::quantiser::unsupported;
use crate::reference;
use crate::settings::Mode;
use crate::tensor;

/// Settings of [`Truncate`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whether mantissas are rounded, or cut off as in the reference.
    pub mode: Mode,
    /// Bits of the mantissa that are kept, without the leading one; more than the element type has keep all.
    #[schemars(range(min = 0, max = 23))]
    pub mantissa_bits: u8,
}

impl Default for Config {
    fn default() -> Self {
        Self { mode: Mode::Default, mantissa_bits: 6 }
    }
}

/// Rounds mantissas to fewer bits.
#[derive(Debug)]
pub struct Truncate {
    config: Config,
}

impl Plugin for Truncate {
    const ID: &'static str = "truncate";
    const SUMMARY: &'static str = "mantissas rounded to fewer bits";
    const SOURCE: &'static str = "n_lossless experiments, mantissa truncation";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config })
    }
}

register_transform!(Truncate);

impl LossyTransform for Truncate {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn effective_config(&self, _: Role, _: usize) -> Value {
        self.config()
    }

    fn bound(&self) -> Bound {
        match self.config.mode {
            // Half of the last place, which is 2^-k of a number of which nothing but the leading one is known; see `rounded`.
            Mode::Default => Bound::Relative(0.5f64.powi(i32::from(self.config.mantissa_bits) + 1)),
            // A NaN may become infinite, and a subnormal number zero.
            Mode::Reference => Bound::Unbounded,
        }
    }

    fn forward(&self, chunk: Chunk<'_>, _: &Context<'_>, out: &mut Latents) -> Result<()> {
        let mut bytes = Vec::with_capacity(chunk.bytes().len());
        let kept = u32::from(self.config.mantissa_bits);
        match (self.config.mode, chunk.dtype()) {
            (Mode::Reference, _) => reference::truncate(chunk, self.config.mantissa_bits, &mut bytes),
            (_, DType::F16) => halves(chunk.bytes(), 10, kept, &mut bytes),
            (_, DType::Bf16) => halves(chunk.bytes(), 7, kept, &mut bytes),
            (_, DType::F32) => singles(chunk.bytes(), kept, &mut bytes),
            (_, other) => return Err(unsupported(other)),
        }
        out.push_lane(Lane { spec: LaneSpec::tensor(chunk.dtype(), chunk.shape()), bytes })
    }

    fn inverse(&self, latents: &Latents, _: &Context<'_>, out: ChunkMut<'_>) -> Result<()> {
        tensor::inverse(latents, out)
    }
}

fn halves(bytes: &[u8], mantissa: u32, kept: u32, out: &mut Vec<u8>) {
    out.resize(bytes.len(), 0);
    let pairs = out.as_chunks_mut().0.iter_mut().zip(bytes.as_chunks().0);
    let dropped = mantissa.saturating_sub(kept);
    Arch::new().dispatch(
        #[inline(always)]
        move || {
            for (out, element) in pairs {
                let bits = u16::from_le_bytes(*element);
                let magnitude = rounded(u32::from(bits & 0x7FFF), 15, mantissa, dropped);
                *out = (magnitude as u16 | bits & 0x8000).to_le_bytes();
            }
        },
    );
}

fn singles(bytes: &[u8], kept: u32, out: &mut Vec<u8>) {
    out.resize(bytes.len(), 0);
    let pairs = out.as_chunks_mut().0.iter_mut().zip(bytes.as_chunks().0);
    let dropped = 23u32.saturating_sub(kept);
    Arch::new().dispatch(
        #[inline(always)]
        move || {
            for (out, element) in pairs {
                let bits = u32::from_le_bytes(*element);
                *out = (rounded(bits & 0x7FFF_FFFF, 31, 23, dropped) | bits & 0x8000_0000).to_le_bytes();
            }
        },
    );
}

/// The magnitude without its `dropped` last bits, to nearest and ties to even.
///
/// A carry makes the next power of two, which is right; where that would be infinity, it is the largest number of so many bits instead: what
/// lies above that is off by less than half of its last place too, since the largest of all numbers has not reached the power of two.
/// Infinities and NaNs stay what they are. So do subnormals, whose leading one may be among the dropped bits.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn rounded(magnitude: u32, width: u32, mantissa: u32, dropped: u32) -> u32 {
    let mask = u32::MAX << dropped;
    let infinity = (1 << width) - (1 << mantissa);
    let half = (1u32 << dropped >> 1).wrapping_sub(1);
    let carried = if dropped == 0 {
        magnitude
    } else {
        magnitude.wrapping_add(half).wrapping_add(magnitude >> dropped & 1) & mask
    };
    let most = (infinity - 1) & mask;
    let finite = if carried < most { carried } else { most };
    if magnitude >> mantissa == 0 || magnitude >= infinity { magnitude } else { finite }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "roundings are exact")]
mod tests {
    use half::f16;

    use super::*;

    fn half(value: f32, kept: u32) -> f32 {
        let mut out = Vec::new();
        halves(&f16::from_f32(value).to_le_bytes(), 10, kept, &mut out);
        f16::from_le_bytes([out[0], out[1]]).to_f32()
    }

    #[test]
    fn mantissas_round_to_nearest_even_with_carry() {
        for (value, kept, expected) in [
            (1.25, 1, 1.0), // tie, to even
            (1.75, 1, 2.0), // tie, carries
            (1.26, 1, 1.5),
            (-1.74, 1, -1.5),
            (1.5, 0, 2.0),
            (2.9, 0, 2.0),
            (3.1, 0, 4.0),
            (1.7, 10, f16::from_f32(1.7).to_f32()),
            (1.7, 23, f16::from_f32(1.7).to_f32()),
            (65504.0, 4, 63488.0), // the next power of two would be infinity
            (0.0, 3, 0.0),
            (f32::NEG_INFINITY, 3, f32::NEG_INFINITY),
        ] {
            assert_eq!(half(value, kept), expected, "{value} to {kept} bits");
        }
        assert_eq!(half(2f32.powi(-24) * 3.0, 0), 2f32.powi(-24) * 3.0, "subnormals are kept");
    }

    #[test]
    fn every_half_keeps_the_bound() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for kept in 0..=10 {
            let mut out = Vec::new();
            halves(&all, 10, kept, &mut out);
            for (from, to) in all.as_chunks::<2>().0.iter().zip(out.as_chunks::<2>().0) {
                let (x, y) = (f16::from_le_bytes(*from), f16::from_le_bytes(*to));
                if x.is_finite() {
                    let (x, y) = (x.to_f64(), y.to_f64());
                    assert!((x - y).abs() <= x.abs() * (-f64::from(kept) - 1.0).exp2(), "{x} to {kept} bits: {y}");
                } else {
                    assert_eq!(from, to);
                }
            }
        }
    }
}
