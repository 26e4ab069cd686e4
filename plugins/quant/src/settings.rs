//! Settings that several transforms share.

use gearbox_core::{DType, Error, Result, Role};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::reference::Clip;

/// Whose arithmetic is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The corrected one.
    #[default]
    Default,
    /// That of the reference's programs, flaws included; settings that they do not have must be left alone.
    Reference,
}

/// What a transform writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Storage {
    /// Integer codes with scales and whatever else the restored values are made from.
    #[default]
    Codes,
    /// The restored values as lane `tensor`, so that another transform or a codec for floats may follow.
    Values,
}

/// Which values share a scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Granularity {
    /// `channel` for keys, whose outliers stay in their channels, and `token` for values.
    #[default]
    Auto,
    /// All values of a chunk.
    Tensor,
    /// All values of a head.
    Head,
    /// `group` channels of one token and head.
    Token,
    /// `group` tokens of one channel; chunks of fewer than 24 tokens are grouped as with `token`.
    Channel,
}

impl Granularity {
    pub(crate) fn of(self, role: Role) -> Self {
        match (self, role) {
            (Self::Auto, Role::Key) => Self::Channel,
            (Self::Auto, Role::Value) => Self::Token,
            (other, _) => other,
        }
    }
}

/// Element type of stored scales and minima.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScaleType {
    /// IEEE 754 binary16.
    #[default]
    F16,
    /// bfloat16: a wider range, three bits less.
    Bf16,
    /// IEEE 754 binary32.
    F32,
}

impl ScaleType {
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::Bf16 => DType::Bf16,
            Self::F32 => DType::F32,
        }
    }
}

/// Whether codes are stored as differences to those of the token before, modulo `2^bits`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Delta {
    /// As they are.
    #[default]
    None,
    /// Differences.
    Token,
    /// Whichever has the lower entropy in the chunk.
    Auto,
}

/// How a quantiser finds the range of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Range {
    /// From the least to the greatest value.
    Full,
    /// The whole range or a smaller one around its middle, whichever gives the least squared error.
    LeastError,
    Percentile {
        low: f64,
        high: f64,
    },
    /// So many standard deviations around the mean.
    Sigma(f64),
}

impl Range {
    /// The same in the reference, which has no other ranges.
    pub(crate) fn reference(self) -> Option<Clip> {
        match self {
            Self::Percentile { low, high } => Some(Clip::Percentile { low, high }),
            Self::Sigma(factor) => Some(Clip::Sigma(factor)),
            Self::Full | Self::LeastError => None,
        }
    }
}

/// Percentiles by mode, where settings do not name them.
pub(crate) fn percentiles(mode: Mode, low: Option<f64>, high: Option<f64>) -> Result<Range> {
    let (default_low, default_high) = match mode {
        Mode::Default => (0.05, 99.95),
        Mode::Reference => (1.0, 99.0),
    };
    let (low, high) = (low.unwrap_or(default_low), high.unwrap_or(default_high));
    if low < high {
        return Ok(Range::Percentile { low, high });
    }
    Err(Error::invalid_config(format!("`/low` and `/high`: expected `low` below `high`, got {low} and {high}")))
}

/// What the quantiser does; the settings of several transforms come down to this.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Spec {
    pub(crate) bits: u8,
    pub(crate) symmetric: bool,
    pub(crate) granularity: Granularity,
    pub(crate) group: Option<usize>,
    pub(crate) scale: ScaleType,
    pub(crate) outliers: f64,
    pub(crate) sink: u64,
    pub(crate) recent: u64,
    pub(crate) delta: Delta,
    pub(crate) range: Range,
}

/// Refuses settings that the reference does not have, unless they are those that do nothing.
pub(crate) fn only_reference(settings: &Value, defaults: &Value, used: &[&str]) -> Result<()> {
    let changed = settings.as_object().into_iter().flatten().find(|(key, value)| {
        key.as_str() != "mode" && !used.contains(&key.as_str()) && defaults[key.as_str()] != **value
    });
    changed.map_or(Ok(()), |(key, value)| {
        Err(Error::invalid_config(format!(
            "`/{key}`: {value} has no meaning in mode `reference`, expected {}",
            defaults[key.as_str()]
        )))
    })
}

/// The settings of the quantiser in the form in which equal ones are equal, for one role and so many channels.
pub(crate) fn canonical(settings: &mut Value, role: Role, dim: usize) {
    let granularity = serde_json::from_value(settings["granularity"].clone()).unwrap_or_default();
    let granularity = Granularity::of(granularity, role);
    settings["granularity"] = json!(granularity);
    let group = settings["group"].as_u64().and_then(|group| usize::try_from(group).ok());
    let whole = match granularity {
        Granularity::Tensor | Granularity::Head => true,
        Granularity::Token => crate::layout::pieces(dim, group) == 1,
        _ => false,
    };
    if whole {
        settings["group"] = Value::Null;
    }
    if settings["storage"] == "values" {
        settings["delta"] = json!(Delta::None);
    }
}

/// Makes the settings of a transform that quantises: those that all of them share, and its own before them.
macro_rules! quantiser_settings {
    ($(#[$about:meta])* $name:ident { $($(#[$meta:meta])* $field:ident: $type:ty = $default:expr,)* }) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            /// Whose arithmetic is used.
            pub mode: $crate::settings::Mode,
            $($(#[$meta])* pub $field: $type,)*
            /// What is written.
            pub storage: $crate::settings::Storage,
            /// Bits of a code.
            #[schemars(range(min = 2, max = 16))]
            pub bits: u8,
            /// Whether zero is in the middle of each range, which then needs no minimum.
            pub symmetric: bool,
            /// Which values share a scale.
            pub granularity: $crate::settings::Granularity,
            /// Values of a group: channels with `token`, tokens with `channel`; the whole axis if null.
            #[schemars(range(min = 1))]
            pub group: Option<usize>,
            /// Element type of scales and minima; a chunk in which it does not do stores them as F32.
            pub scale_dtype: $crate::settings::ScaleType,
            /// Part of the values that is kept exact and does not widen the scale: those farthest from the median of their group.
            #[schemars(range(min = 0.0, max = 0.5))]
            pub outliers: f64,
            /// First tokens of the sequence that are kept exact.
            pub sink: u64,
            /// Last tokens of the sequence that are kept exact, if its end is known.
            pub recent: u64,
            /// Whether codes are stored as differences to those of the token before.
            pub delta: $crate::settings::Delta,
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    mode: $crate::settings::Mode::Default,
                    $($field: $default,)*
                    storage: $crate::settings::Storage::Codes,
                    bits: 8,
                    symmetric: false,
                    granularity: $crate::settings::Granularity::Auto,
                    group: Some(64),
                    scale_dtype: $crate::settings::ScaleType::F16,
                    outliers: 0.0,
                    sink: 0,
                    recent: 0,
                    delta: $crate::settings::Delta::None,
                }
            }
        }

        impl $name {
            fn spec(&self, range: $crate::settings::Range) -> $crate::settings::Spec {
                $crate::settings::Spec {
                    bits: self.bits,
                    symmetric: self.symmetric,
                    granularity: self.granularity,
                    group: self.group,
                    scale: self.scale_dtype,
                    outliers: self.outliers,
                    sink: self.sink,
                    recent: self.recent,
                    delta: self.delta,
                    range,
                }
            }
        }
    };
}

pub(crate) use quantiser_settings;
