//! The transform `clip`.

use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, DType, ElemSet, Lane, LaneSpec, Latents, LossyTransform, Plugin,
    Result, Role, register_transform,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::kernels::{self, Levels};
use crate::layout::Layout;
use crate::number::{Bf16, F16, F32, Format, Real, element};
use crate::quantiser::unsupported;
use crate::range;
use crate::reference;
use crate::settings::{Granularity, Mode, Range, canonical, only_reference, percentiles};
use crate::tensor;

/// Settings of [`Clip`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whose arithmetic is used; the reference has one pair of bounds for the whole tensor.
    pub mode: Mode,
    /// Where the bounds are.
    pub method: Method,
    /// Lower percentile with `percentile`; if null 0.05, or 1 in mode `reference`.
    #[schemars(range(min = 0.0, max = 100.0))]
    pub low: Option<f64>,
    /// Upper percentile with `percentile`; if null 99.95, or 99 in mode `reference`.
    #[schemars(range(min = 0.0, max = 100.0))]
    pub high: Option<f64>,
    /// Standard deviations on each side of the mean with `sigma`.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub sigma: f64,
    /// Which values share bounds.
    pub granularity: Granularity,
    /// Values of a group: channels with `token`, tokens with `channel`; the whole axis if null.
    #[schemars(range(min = 1))]
    pub group: Option<usize>,
}

/// Where the bounds of `clip` are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// At two percentiles, linear between values.
    #[default]
    Percentile,
    /// At some standard deviations around the mean.
    Sigma,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mode: Mode::Default,
            method: Method::Percentile,
            low: None,
            high: None,
            sigma: 3.0,
            granularity: Granularity::Auto,
            group: None,
        }
    }
}

/// Moves the values outside the bounds of their group to the bounds.
#[derive(Debug)]
pub struct Clip {
    config: Config,
    rule: Range,
}

impl Plugin for Clip {
    const ID: &'static str = "clip";
    const SUMMARY: &'static str = "values moved into percentiles or standard deviations of their group";
    const SOURCE: &'static str = "n_lossless experiments, clipping";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        if config.mode == Mode::Reference {
            only_reference(&json!(config), &json!(Config::default()), &["method", "low", "high", "sigma"])?;
        }
        let rule = match config.method {
            Method::Percentile => percentiles(config.mode, config.low, config.high)?,
            Method::Sigma => Range::Sigma(config.sigma),
        };
        Ok(Self { config, rule })
    }
}

register_transform!(Clip);

/// Sets those of `low`, `high` and `sigma` to their defaults that a rule does not look at, and the others to what they are.
pub(crate) fn canonical_bounds(config: &mut Value, rule: Range, default_sigma: f64) {
    let (mut low, mut high, mut sigma) = (Value::Null, Value::Null, json!(default_sigma));
    match rule {
        Range::Percentile { low: least, high: most } => (low, high) = (json!(least), json!(most)),
        Range::Sigma(factor) => sigma = json!(factor),
        Range::Full | Range::LeastError => {}
    }
    (config["low"], config["high"], config["sigma"]) = (low, high, sigma);
}

impl LossyTransform for Clip {
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
        canonical_bounds(&mut config, self.rule, Config::default().sigma);
        config
    }

    fn bound(&self) -> Bound {
        Bound::Unbounded
    }

    fn forward(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()> {
        let mut bytes = Vec::new();
        match (self.config.mode, self.rule.reference(), chunk.dtype()) {
            (Mode::Reference, Some(rule), _) => reference::clip(chunk, rule, &mut bytes),
            (_, _, DType::F16) => bytes = self.clip::<F16>(chunk, cx),
            (_, _, DType::Bf16) => bytes = self.clip::<Bf16>(chunk, cx),
            (_, _, DType::F32) => bytes = self.clip::<F32>(chunk, cx),
            (_, _, other) => return Err(unsupported(other)),
        }
        out.push_lane(Lane { spec: LaneSpec::tensor(chunk.dtype(), chunk.shape()), bytes })
    }

    fn inverse(&self, latents: &Latents, _: &Context<'_>, out: ChunkMut<'_>) -> Result<()> {
        tensor::inverse(latents, out)
    }
}

impl Clip {
    fn clip<F: Format>(&self, chunk: Chunk<'_>, cx: &Context<'_>) -> Vec<u8> {
        let mut bytes = chunk.bytes().to_vec();
        let mut values = Vec::new();
        kernels::load::<F>(&bytes, &mut values);
        let layout = Layout::new(self.config.granularity, self.config.group, cx.role, chunk.shape());
        let (mut low, mut high) = (Vec::new(), Vec::new());
        range::bounds(&layout, self.rule, Levels::new(2, false), &values, &mut low, &mut high);
        let elements = F::elements_mut(&mut bytes);
        for ((group, low), high) in layout.groups().zip(low).zip(high) {
            let rounded = |bound: F::Real| F::Real::of(element(F::DTYPE, bound.wide()));
            if low > high {
                // No finite value.
                continue;
            }
            let (low, high) = (rounded(low), rounded(high));
            for place in group.places() {
                let mut value = values[place];
                if value.partial_cmp(&value).is_none() {
                    value = F::value(elements[place]);
                }
                if value < low {
                    elements[place] = F::pack(low);
                } else if value > high {
                    elements[place] = F::pack(high);
                }
            }
        }
        bytes
    }
}
