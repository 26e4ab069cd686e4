//! A rotation that spreads outliers over all channels.

use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, DType, ElemSet, Error, LaneSpec, Latents, LossyTransform, Plugin,
    Result,
};
use half::{bf16, f16};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Settings of [`Hadamard`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Seed of the random signs that channels get before the rotation; 0 for none.
    pub seed: u32,
}

/// Rotates each head's vectors with a Hadamard matrix, so that outliers spread over all channels; what follows is a quantiser.
///
/// A number of channels that is no power of two is cut into powers of two, the largest first: 80 channels are 64 and 16.
///
/// # Shapes
/// The lane `tensor` has the type and shape of the chunk.
///
/// # Source
/// Ashkboos et al., *`QuaRot`*, 2024, section 3; differences from it: no matrices for sizes that are no power of two.
#[derive(Debug)]
pub struct Hadamard {
    config: Config,
}

impl Plugin for Hadamard {
    const ID: &'static str = "hadamard";
    const SUMMARY: &'static str = "rotation of each head that spreads outliers over its channels";
    const SOURCE: &'static str = "Ashkboos et al., QuaRot, 2024";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config })
    }
}

impl Hadamard {
    /// One sign per channel.
    fn signs(&self, dim: usize) -> Vec<f32> {
        let mut state = u64::from(self.config.seed);
        let mut sign = || {
            // A step of splitmix64.
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            if mixed >> 63 == 0 { 1.0 } else { -1.0 }
        };
        (0..dim).map(|_| if self.config.seed == 0 { 1.0 } else { sign() }).collect()
    }
}

/// Multiplies a vector with the normalised Hadamard matrices of its parts. The matrix is symmetric and its own inverse.
fn rotate(mut vector: &mut [f32]) {
    while !vector.is_empty() {
        let (part, rest) = vector.split_at_mut(1 << vector.len().ilog2());
        let mut half = 1;
        while half < part.len() {
            for pair in part.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (low, high) in low.iter_mut().zip(high) {
                    (*low, *high) = (*low + *high, *low - *high);
                }
            }
            half *= 2;
        }
        let scale = (part.len() as f32).sqrt().recip();
        for value in part {
            *value *= scale;
        }
        vector = rest;
    }
}

fn read(dtype: DType, bytes: &[u8]) -> Result<Vec<f32>> {
    let halves = |value: fn([u8; 2]) -> f32| bytes.as_chunks().0.iter().map(|pair| value(*pair)).collect();
    Ok(match dtype {
        DType::F16 => halves(|pair| f16::from_le_bytes(pair).to_f32()),
        DType::Bf16 => halves(|pair| bf16::from_le_bytes(pair).to_f32()),
        DType::F32 => bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect(),
        other => return Err(Error::unsupported(format!("expected f16, bf16 or f32, got {other}"))),
    })
}

fn write(dtype: DType, values: &[f32], out: &mut [u8]) {
    for (value, place) in values.iter().zip(out.chunks_exact_mut(dtype.size())) {
        // Which bits a computed NaN has depends on the machine.
        let value = if value.is_nan() { f32::NAN } else { *value };
        match dtype {
            DType::F16 => place.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            DType::Bf16 => place.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            _ => place.copy_from_slice(&value.to_le_bytes()),
        }
    }
}

impl LossyTransform for Hadamard {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    /// Rounding to the type of the chunk costs something that depends on the whole vector, and sums of huge numbers overflow.
    fn bound(&self) -> Bound {
        Bound::Unbounded
    }

    fn forward(&self, chunk: Chunk<'_>, _: &Context<'_>, out: &mut Latents) -> Result<()> {
        let (shape, dtype) = (chunk.shape(), chunk.dtype());
        let mut values = read(dtype, chunk.bytes())?;
        let signs = self.signs(shape.dim);
        for vector in values.chunks_exact_mut(shape.dim.max(1)) {
            vector.iter_mut().zip(&signs).for_each(|(value, sign)| *value *= sign);
            rotate(vector);
        }
        write(dtype, &values, out.push(LaneSpec::tensor(dtype, shape))?);
        Ok(())
    }

    fn inverse(&self, latents: &Latents, _: &Context<'_>, mut out: ChunkMut<'_>) -> Result<()> {
        let (expected, lane) = (LaneSpec::tensor(out.dtype(), out.shape()), latents.lane(LaneSpec::TENSOR)?);
        if lane.spec != expected || latents.lanes().len() != 1 {
            return Err(Error::corrupt(format!(
                "expected only {expected}, got {} of {}",
                lane.spec,
                latents.lanes().len()
            )));
        }
        let (shape, dtype) = (out.shape(), out.dtype());
        let mut values = read(dtype, &lane.bytes)?;
        let signs = self.signs(shape.dim);
        for vector in values.chunks_exact_mut(shape.dim.max(1)) {
            rotate(vector);
            vector.iter_mut().zip(&signs).for_each(|(value, sign)| *value *= sign);
        }
        write(dtype, &values, out.bytes_mut());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_outlier_is_spread_evenly_and_comes_back() {
        let mut vector = [0.0; 5];
        vector[2] = 8.0;
        rotate(&mut vector);
        assert_eq!(vector.map(f32::to_bits), [4.0, 4.0, -4.0, -4.0, 0.0].map(f32::to_bits));
        rotate(&mut vector);
        assert_eq!(vector.map(f32::to_bits), [0.0, 0.0, 8.0, 0.0, 0.0].map(f32::to_bits));
    }
}
