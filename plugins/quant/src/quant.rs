//! The transform `quant`.

use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, ElemSet, Latents, LossyTransform, Plugin, Result, Role,
    register_transform,
};
use serde_json::{Value, json};

use crate::parity;
use crate::quantiser::Quantiser;
use crate::settings::{Mode, Range, Storage, canonical, only_reference, quantiser_settings};
use crate::tensor;

quantiser_settings! {
    /// Settings of [`Quant`].
    Config {}
}

/// Replaces values by the nearest of evenly spaced levels, with a scale for each group.
#[derive(Debug)]
pub struct Quant {
    config: Config,
    quantiser: Quantiser,
}

impl Plugin for Quant {
    const ID: &'static str = "quant";
    const SUMMARY: &'static str = "integer codes with a scale per channel, token, head, tensor or group";
    const SOURCE: &'static str =
        "n_lossless experiments; groups as in Liu et al., *KIVI*, 2024, outliers as in Hooper et al., *KVQuant*, 2024";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        if config.mode == Mode::Reference {
            only_reference(&json!(config), &json!(Config::default()), &["bits", "storage"])?;
        }
        Ok(Self { quantiser: Quantiser::new(config.spec(Range::Full)), config })
    }
}

register_transform!(Quant);

impl LossyTransform for Quant {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn effective_config(&self, role: Role, dim: usize) -> Value {
        let mut config = self.config();
        if self.config.mode == Mode::Default {
            canonical(&mut config, role, dim);
        }
        config
    }

    fn bound(&self) -> Bound {
        match self.config.mode {
            Mode::Default => Bound::Peak(self.quantiser.peak_error()),
            // One NaN makes all values NaN.
            Mode::Reference => Bound::Unbounded,
        }
    }

    fn forward(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()> {
        match (self.config.mode, self.config.storage) {
            (Mode::Default, Storage::Codes) => self.quantiser.forward(chunk, cx, out),
            (Mode::Default, Storage::Values) => self.quantiser.forward_values(chunk, cx, out),
            (Mode::Reference, storage) => parity::quantise(chunk, self.config.bits, storage, out),
        }
    }

    fn inverse(&self, latents: &Latents, cx: &Context<'_>, out: ChunkMut<'_>) -> Result<()> {
        match (self.config.mode, self.config.storage) {
            (_, Storage::Values) => tensor::inverse(latents, out),
            (Mode::Default, Storage::Codes) => self.quantiser.inverse(latents, cx, out),
            (Mode::Reference, Storage::Codes) => parity::restore(latents, self.config.bits, out),
        }
    }
}
