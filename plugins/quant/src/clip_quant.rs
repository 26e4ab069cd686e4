//! The transform `clip-quant`.

use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, ElemSet, Error, Latents, LossyTransform, Plugin, Result, Role,
    register_transform,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::clip::canonical_bounds;
use crate::parity;
use crate::quantiser::Quantiser;
use crate::reference;
use crate::settings::{Mode, Range, Storage, canonical, only_reference, percentiles, quantiser_settings};
use crate::tensor;

quantiser_settings! {
    /// Settings of [`ClipQuant`].
    Config {
        /// How the range of a group is found.
        method: Method = Method::Auto,
        /// Lower percentile with `percentile`; if null 0.05, or 1 in mode `reference`.
        #[schemars(range(min = 0.0, max = 100.0))]
        low: Option<f64> = None,
        /// Upper percentile with `percentile`; if null 99.95, or 99 in mode `reference`.
        #[schemars(range(min = 0.0, max = 100.0))]
        high: Option<f64> = None,
        /// Standard deviations on each side of the mean with `sigma`.
        #[schemars(extend("exclusiveMinimum" = 0))]
        sigma: f64 = 3.0,
    }
}

/// How `clip-quant` finds the range of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// `mse`; in mode `reference` `percentile`.
    #[default]
    Auto,
    /// Of the whole range and seven smaller ones, the one with the least squared error.
    Mse,
    /// Between two percentiles, linear between values.
    Percentile,
    /// Some standard deviations around the mean.
    Sigma,
}

/// Quantises with ranges that leave out the ends, whose values move to the outermost levels.
#[derive(Debug)]
pub struct ClipQuant {
    config: Config,
    rule: Range,
    quantiser: Quantiser,
}

impl Plugin for ClipQuant {
    const ID: &'static str = "clip-quant";
    const SUMMARY: &'static str = "integer codes over a range that is narrower than the values of its group";
    const SOURCE: &'static str = "n_lossless experiments, clipping and quantisation";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        if config.mode == Mode::Reference {
            let used = ["bits", "storage", "method", "low", "high", "sigma"];
            only_reference(&json!(config), &json!(Config::default()), &used)?;
        }
        let rule = match (config.method, config.mode) {
            (Method::Percentile, _) | (Method::Auto, Mode::Reference) => {
                percentiles(config.mode, config.low, config.high)?
            }
            (Method::Sigma, _) => Range::Sigma(config.sigma),
            (Method::Auto | Method::Mse, Mode::Default) => Range::LeastError,
            (Method::Mse, Mode::Reference) => {
                return Err(Error::invalid_config(
                    "`/method`: \"mse\" has no meaning in mode `reference`, expected \"percentile\" or \"sigma\"",
                ));
            }
        };
        Ok(Self { quantiser: Quantiser::new(config.spec(rule)), rule, config })
    }
}

register_transform!(ClipQuant);

impl LossyTransform for ClipQuant {
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
        config["method"] = json!(match self.rule {
            Range::Percentile { .. } => Method::Percentile,
            Range::Sigma(_) => Method::Sigma,
            Range::Full | Range::LeastError => Method::Mse,
        });
        canonical_bounds(&mut config, self.rule, Config::default().sigma);
        config
    }

    fn bound(&self) -> Bound {
        Bound::Unbounded
    }

    fn forward(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()> {
        match (self.config.mode, self.rule.reference(), self.config.storage) {
            (Mode::Reference, Some(rule), storage) => {
                let mut clipped = Vec::with_capacity(chunk.bytes().len());
                reference::clip(chunk, rule, &mut clipped);
                let clipped = Chunk::new(chunk.shape(), chunk.dtype(), &clipped)?;
                parity::quantise(clipped, self.config.bits, storage, out)
            }
            (_, _, Storage::Codes) => self.quantiser.forward(chunk, cx, out),
            (_, _, Storage::Values) => self.quantiser.forward_values(chunk, cx, out),
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
