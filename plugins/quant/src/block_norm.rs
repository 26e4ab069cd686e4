//! The transform `block-norm`.

use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, DType, Elem, ElemSet, Error, Lane, LaneSpec, Latents,
    LossyTransform, Plugin, Result, Role, Shape, register_transform,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::layout::pieces;
use crate::quantiser::{Quantiser, SCALES, bytes};
use crate::reference::{self, Normalised};
use crate::settings::{Delta, Granularity, Mode, Range, ScaleType, Spec, only_reference};

/// Settings of [`BlockNorm`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whose arithmetic is used.
    pub mode: Mode,
    /// Channels of a block.
    #[schemars(range(min = 1))]
    pub block: usize,
    /// Bits of a code.
    #[schemars(range(min = 2, max = 16))]
    pub bits: u8,
    /// Element type of scales; in mode `reference` `f16` or `f32`.
    pub scale_dtype: ScaleType,
    /// Whether zero is in the middle of each range, which then needs no minimum.
    pub symmetric: bool,
    /// Part of the blocks, at least one, whose scale is also stored as F32, in mode `reference`; has no meaning otherwise.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_k: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { mode: Mode::Default, block: 64, bits: 10, scale_dtype: ScaleType::F16, symmetric: true, top_k: 0.0 }
    }
}

const NORMALISED: &str = "normalised";
const TOP_SCALES: &str = "top-scales";
const TOP_INDICES: &str = "top-indices";

/// Quantises blocks of channels of one token and head, each with its own scale.
#[derive(Debug)]
pub struct BlockNorm {
    config: Config,
    quantiser: Quantiser,
}

impl Plugin for BlockNorm {
    const ID: &'static str = "block-norm";
    const SUMMARY: &'static str = "integer codes with a scale per block of channels";
    const SOURCE: &'static str = "n_lossless experiments, block normalisation";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        if config.mode == Mode::Reference {
            let used = ["block", "bits", "scale_dtype", "top_k"];
            only_reference(&json!(config), &json!(Config::default()), &used)?;
            if config.scale_dtype == ScaleType::Bf16 {
                return Err(Error::invalid_config(
                    "`/scale_dtype`: \"bf16\" has no meaning in mode `reference`, expected \"f16\" or \"f32\"",
                ));
            }
        }
        let spec = Spec {
            bits: config.bits,
            symmetric: config.symmetric,
            granularity: Granularity::Token,
            group: Some(config.block),
            scale: config.scale_dtype,
            outliers: 0.0,
            sink: 0,
            recent: 0,
            delta: Delta::None,
            range: Range::Full,
        };
        Ok(Self { quantiser: Quantiser::new(spec), config })
    }
}

register_transform!(BlockNorm);

impl LossyTransform for BlockNorm {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn effective_config(&self, _: Role, dim: usize) -> Value {
        let mut config = self.config.clone();
        let whole = match config.mode {
            Mode::Default => pieces(dim, Some(config.block)) == 1,
            Mode::Reference => config.block >= dim,
        };
        if whole {
            config.block = dim.max(1);
        }
        if config.mode == Mode::Default {
            config.top_k = 0.0;
        }
        json!(config)
    }

    fn bound(&self) -> Bound {
        match self.config.mode {
            Mode::Default => Bound::Peak(self.quantiser.peak_error()),
            // One NaN makes its block NaN.
            Mode::Reference => Bound::Unbounded,
        }
    }

    fn forward(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()> {
        match self.config.mode {
            Mode::Default => self.quantiser.forward(chunk, cx, out),
            Mode::Reference => self.normalise(chunk, out),
        }
    }

    fn inverse(&self, latents: &Latents, cx: &Context<'_>, out: ChunkMut<'_>) -> Result<()> {
        match self.config.mode {
            Mode::Default => self.quantiser.inverse(latents, cx, out),
            Mode::Reference => self.restore(latents, out),
        }
    }
}

impl BlockNorm {
    /// The reference's settings; a scale of the top blocks is priced as an F32, an index as a `u32`.
    fn reference(&self) -> reference::BlockNorm {
        reference::BlockNorm {
            block_size: self.config.block,
            topk_ratio: self.config.top_k,
            bits: self.config.bits,
            scale_bytes: self.config.scale_dtype.dtype().size(),
            topk_extra_scale_bytes: DType::F32.size(),
            index_bytes: size_of::<u32>(),
        }
    }

    /// Scales of a tensor: one for each block of each vector.
    fn blocks(&self, shape: Shape) -> Shape {
        Shape { dim: shape.dim.div_ceil(self.config.block), ..shape }
    }

    fn normalise(&self, chunk: Chunk<'_>, out: &mut Latents) -> Result<()> {
        if chunk.bytes().is_empty() {
            return Ok(());
        }
        let (shape, stored) = (chunk.shape(), self.config.scale_dtype.dtype());
        let Normalised { stored: values, scales, top } = self.reference().normalise(chunk)?;
        out.push_lane(Lane { spec: LaneSpec::new(NORMALISED, chunk.dtype().into(), shape), bytes: values })?;
        let bytes = match stored {
            // To nearest, as the reference rounds; those of F16 tensors fit.
            DType::F16 => scales.iter().flat_map(|scale| half::f16::from_f32(*scale).to_le_bytes()).collect(),
            _ => scales.iter().flat_map(|scale| scale.to_le_bytes()).collect(),
        };
        out.push_lane(Lane { spec: LaneSpec::new(SCALES, stored.into(), self.blocks(shape)), bytes })?;
        let count = Shape::flat(top.len());
        let exact = top.iter().filter_map(|block| scales.get(*block as usize)).flat_map(|scale| scale.to_le_bytes());
        out.push_lane(Lane { spec: LaneSpec::new(TOP_SCALES, Elem::F32, count), bytes: exact.collect() })?;
        let indices = top.iter().flat_map(|block| block.to_le_bytes()).collect();
        out.push_lane(Lane { spec: LaneSpec::new(TOP_INDICES, Elem::U32, count), bytes: indices })
    }

    fn restore(&self, latents: &Latents, mut out: ChunkMut<'_>) -> Result<()> {
        let (dtype, shape) = (out.dtype(), out.shape());
        let out = out.bytes_mut();
        if out.is_empty() && latents.lanes().is_empty() {
            return Ok(());
        }
        if latents.lanes().len() != 4 {
            return Err(Error::corrupt(format!("expected four lanes, got {}", latents.lanes().len())));
        }
        let stored = self.config.scale_dtype.dtype();
        let values = bytes(latents.lane(NORMALISED)?, dtype.into(), shape)?;
        let scales = bytes(latents.lane(SCALES)?, stored.into(), self.blocks(shape))?;
        let top = latents.lane(TOP_INDICES)?;
        let count = Shape::flat(top.spec.shape.elements());
        let top = bytes(top, Elem::U32, count)?;
        let exact = bytes(latents.lane(TOP_SCALES)?, Elem::F32, count)?;
        let mut scales: Vec<f32> = match stored {
            DType::F16 => scales.as_chunks().0.iter().map(|bytes| half::f16::from_le_bytes(*bytes).to_f32()).collect(),
            _ => scales.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        };
        let top: Vec<u32> = top.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        for (block, scale) in top.iter().zip(exact.as_chunks().0) {
            let blocks = scales.len();
            let place = usize::try_from(*block).ok().and_then(|block| scales.get_mut(block)).ok_or_else(|| {
                Error::corrupt(format!("lane `{TOP_INDICES}`: block {block}, expected less than {blocks}"))
            })?;
            *place = f32::from_le_bytes(*scale);
        }
        // The rounded scales are their own rounding, so the reference's restoring takes them as well.
        let normalised = Normalised { stored: values.to_vec(), scales, top };
        let restored = self.reference().restore(shape, dtype, &normalised);
        let mut bytes = Vec::with_capacity(out.len());
        reference::narrow(&restored, dtype, &mut bytes);
        out.copy_from_slice(&bytes);
        Ok(())
    }
}
