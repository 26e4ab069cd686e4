//! The transform `@NAME@`: each channel without its mean, so that a quantiser behind it spends its
//! range on what varies.

#![forbid(unsafe_code)]

use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, DType, ElemSet, Error, LaneSpec, Latents,
    LossyTransform, Plugin, Result, Shape,
};
use half::{bf16, f16};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

// The whole boundary to the host. More plugins of any kind may stand in these lists.
gearbox_abi::export_plugins! { transforms: [ChannelMean] }

/// Settings. Doc comments become the descriptions that `gearbox plugin show` prints, and the host
/// checks the ranges before `new` is called.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Tokens that share a mean, counted from the first of the chunk.
    #[schemars(range(min = 1, max = 65536))]
    pub tokens: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { tokens: 128 }
    }
}

/// Subtracts from each channel its mean over a group of tokens.
///
/// Keys have channels far from zero; without their mean the rest fits in fewer bits.
///
/// # Shapes
/// The lane `means` is `(groups, heads, dim)`; the lane `tensor` has the shape of the chunk. Both
/// have its type. Another transform, or a codec, may follow behind `tensor`.
#[derive(Debug)]
pub struct ChannelMean {
    config: Config,
}

impl Plugin for ChannelMean {
    const ID: &'static str = "@NAME@";
    const SUMMARY: &'static str = "each channel without its mean over a group of tokens";
    const SOURCE: &'static str = "own work";
    // Raise it when lanes of earlier versions can no longer be read.
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config })
    }
}

const MEANS: &str = "means";

impl ChannelMean {
    /// Tokens that share a mean.
    fn group(&self) -> usize {
        self.config.tokens.max(1) as usize
    }

    /// The lane of means that belongs to a chunk.
    fn means(&self, dtype: DType, shape: Shape) -> LaneSpec {
        LaneSpec::new(
            MEANS,
            dtype.into(),
            shape.with_seq(shape.seq.div_ceil(self.group())),
        )
    }
}

fn get(dtype: DType, bytes: &[u8]) -> Result<Vec<f32>> {
    let pairs = bytes.as_chunks().0.iter();
    Ok(match dtype {
        DType::F16 => pairs
            .map(|&pair| f16::from_le_bytes(pair).to_f32())
            .collect(),
        DType::Bf16 => pairs
            .map(|&pair| bf16::from_le_bytes(pair).to_f32())
            .collect(),
        DType::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&four| f32::from_le_bytes(four))
            .collect(),
        other => {
            return Err(Error::unsupported(format!(
                "expected f16, bf16 or f32, got {other}"
            )));
        }
    })
}

fn put(dtype: DType, values: impl Iterator<Item = f32>, out: &mut [u8]) {
    for (value, place) in values.zip(out.chunks_exact_mut(dtype.size())) {
        // Which bits a computed NaN has depends on the machine.
        let value = if value.is_nan() { f32::NAN } else { value };
        match dtype {
            DType::F16 => place.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            DType::Bf16 => place.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            _ => place.copy_from_slice(&value.to_le_bytes()),
        }
    }
}

/// Mean of the finite values of each channel of some rows; 0 if there are none.
fn channel_means(rows: &[f32], row: usize) -> Vec<f32> {
    let mean = |channel: usize| {
        let values = rows
            .iter()
            .skip(channel)
            .step_by(row)
            .filter(|value| value.is_finite());
        let (sum, count) = values.fold((0.0, 0u32), |(sum, count), &value| {
            (sum + f64::from(value), count + 1)
        });
        (sum / f64::from(count.max(1))) as f32
    };
    (0..row).map(mean).collect()
}

impl LossyTransform for ChannelMean {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    /// Both subtraction and addition round, and a huge value minus a huge mean overflows: nothing
    /// is promised. What is promised is attacked by `gearbox plugin check`.
    fn bound(&self) -> Bound {
        Bound::Unbounded
    }

    fn forward(&self, chunk: Chunk<'_>, _: &Context<'_>, out: &mut Latents) -> Result<()> {
        let (shape, dtype) = (chunk.shape(), chunk.dtype());
        let row = shape.row().max(1);
        let mut values = get(dtype, chunk.bytes())?;
        let groups = || values.chunks(row.saturating_mul(self.group()));
        let means: Vec<f32> = groups().flat_map(|rows| channel_means(rows, row)).collect();
        let lane = out.push(self.means(dtype, shape))?;
        put(dtype, means.into_iter(), lane);
        // What the decoder adds: the mean as it is stored.
        let means = get(dtype, lane)?;
        for (rows, means) in values
            .chunks_mut(row.saturating_mul(self.group()))
            .zip(means.chunks(row))
        {
            for row in rows.chunks_mut(row) {
                row.iter_mut()
                    .zip(means)
                    .for_each(|(value, mean)| *value -= mean);
            }
        }
        put(
            dtype,
            values.into_iter(),
            out.push(LaneSpec::tensor(dtype, shape))?,
        );
        Ok(())
    }

    fn inverse(&self, latents: &Latents, _: &Context<'_>, mut out: ChunkMut<'_>) -> Result<()> {
        let (shape, dtype) = (out.shape(), out.dtype());
        let row = shape.row().max(1);
        // Lanes may be damaged, missing or of other shapes.
        let read = |expected: LaneSpec| {
            let lane = latents.lane(&expected.name)?;
            if lane.spec == expected {
                return get(dtype, &lane.bytes);
            }
            Err(Error::corrupt(format!(
                "expected {expected}, got {}",
                lane.spec
            )))
        };
        let means = read(self.means(dtype, shape))?;
        let mut values = read(LaneSpec::tensor(dtype, shape))?;
        if latents.lanes().len() != 2 {
            let count = latents.lanes().len();
            return Err(Error::corrupt(format!("expected 2 lanes, got {count}")));
        }
        for (rows, means) in values
            .chunks_mut(row.saturating_mul(self.group()))
            .zip(means.chunks(row))
        {
            for row in rows.chunks_mut(row) {
                row.iter_mut()
                    .zip(means)
                    .for_each(|(value, mean)| *value += mean);
            }
        }
        put(dtype, values.into_iter(), out.bytes_mut());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gearbox_core::Role;

    #[test]
    fn channels_lose_their_means_and_get_them_back() -> Result<()> {
        let transform = ChannelMean::new(Config::default())?;
        let (shape, context) = (Shape::new(2, 1, 2), Context::new(0, Role::Key, 0));
        let bytes: Vec<u8> = [8.0f32, -1.0, 10.0, 3.0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        let mut latents = Latents::new();
        transform.forward(
            Chunk::new(shape, DType::F32, &bytes)?,
            &context,
            &mut latents,
        )?;
        assert_eq!(get(DType::F32, &latents.lane("means")?.bytes)?, [9.0, 1.0]);
        assert_eq!(
            get(DType::F32, &latents.lane("tensor")?.bytes)?,
            [-1.0, -2.0, 1.0, 2.0]
        );
        let mut back = vec![0; bytes.len()];
        transform.inverse(
            &latents,
            &context,
            ChunkMut::new(shape, DType::F32, &mut back)?,
        )?;
        assert_eq!(back, bytes);
        Ok(())
    }
}
