//! What a dump says of the attention of a layer, besides its tensors.

use std::fmt;

use gearbox_core::Rope;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::reference::check_rope;

/// How a layer makes logits of queries and keys, and which tokens a query sees.
///
/// What a dump does not say is [`AttentionFacts::usual`].
///
/// # Examples
/// ```
/// use gearbox::dump::AttentionFacts;
///
/// let facts: AttentionFacts = serde_json::from_str(r#"{"scale": 0.0625, "softcap": 50.0, "window": 4096}"#).unwrap();
/// assert_eq!(facts.to_string(), "scale 0.0625, softcap 50, window 4096");
/// assert!(!facts.is_usual(256) && AttentionFacts::usual(256).is_usual(256));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionFacts {
    /// What the product of a query and a key is multiplied with.
    pub scale: f64,
    /// The bound `c` of a layer whose logits are `c * tanh(scale * q·k / c)`.
    pub softcap: Option<f64>,
    /// By how many positions a query looks back at most, its own counted: it sees itself and the `window - 1` tokens in front of it.
    pub window: Option<u64>,
}

/// A scale that is this near to the usual one, relatively, is the usual one: programs round the root differently.
const NEAR: f64 = 1e-6;

impl AttentionFacts {
    /// `1 / √dim` over all tokens up to the query.
    pub fn usual(dim: usize) -> Self {
        Self { scale: 1.0 / (dim as f64).sqrt(), softcap: None, window: None }
    }

    /// Whether it is the usual attention over keys of `dim` channels; scales within a millionth are the same.
    pub fn is_usual(&self, dim: usize) -> bool {
        let usual = Self::usual(dim);
        (self.softcap, self.window) == (None, None) && (self.scale / usual.scale - 1.0).abs() < NEAR
    }

    /// Checks that logits can be made of it, in F32.
    pub(crate) fn check(&self) -> Result<(), String> {
        let positive = |name: &str, number: f64| {
            let legal = (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&number);
            if legal { Ok(()) } else { Err(format!("expected a positive `{name}` in the range of f32, got {number}")) }
        };
        positive("scale", self.scale)?;
        self.softcap.map_or(Ok(()), |softcap| positive("softcap", softcap))?;
        if self.window == Some(0) {
            return Err("expected a `window` of at least 1, got 0".to_owned());
        }
        Ok(())
    }
}

/// `scale 0.0625, softcap 50, window 4096`; what there is none of is left out.
impl fmt::Display for AttentionFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "scale {}", self.scale as f32)?;
        self.softcap.map_or(Ok(()), |softcap| write!(f, ", softcap {softcap}"))?;
        self.window.map_or(Ok(()), |window| write!(f, ", window {window}"))
    }
}

/// What a dump says of one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerFacts {
    /// How it attends; none where the dump does not say, or says what is [usual](AttentionFacts::usual).
    pub attention: Option<AttentionFacts>,
    /// How it rotates, in a dump whose layers rotate differently: an object as the dump has it. One without `pairing` is a rotation that
    /// [`Rope`] cannot express; none is a layer that does not rotate.
    ///
    /// A container holds one rotation for all layers of a run, so plugins do not get these.
    pub rope: Option<Value>,
}

impl LayerFacts {
    /// Checks the facts of a layer whose keys have `dim` channels.
    pub(super) fn check(&self, dim: usize) -> Result<(), String> {
        if let Some(attention) = &self.attention {
            attention.check().map_err(|message| format!("`attention`: {message}"))?;
        }
        let Some(value) = &self.rope else { return Ok(()) };
        if !value.is_object() {
            return Err(format!("rotation of the layer: expected an object, got `{value}`"));
        }
        if value.get("pairing").is_some() {
            let rope = Rope::deserialize(value).map_err(|error| format!("rotation of the layer: {error}"))?;
            check_rope(&rope, dim).map_err(|message| format!("rotation of the layer: {message}"))?;
        }
        Ok(())
    }

    /// Without what goes without saying.
    pub(super) fn without_usual(self, dim: usize) -> Self {
        Self { attention: self.attention.filter(|attention| !attention.is_usual(dim)), ..self }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn scales_that_programs_round_differently_are_the_usual_one() {
        for dim in [64, 80, 96, 128, 256] {
            let rounded = f64::from(1.0 / (dim as f32).sqrt());
            for scale in [rounded, (dim as f64).powf(-0.5)] {
                assert!(AttentionFacts { scale, ..AttentionFacts::usual(dim) }.is_usual(dim), "{dim}");
            }
        }
        let usual = AttentionFacts::usual(64);
        for other in [
            AttentionFacts { scale: 0.1251, ..usual },
            AttentionFacts { softcap: Some(50.0), ..usual },
            AttentionFacts { window: Some(1 << 40), ..usual },
        ] {
            assert!(!other.is_usual(64));
            let facts = LayerFacts { attention: Some(other), rope: None };
            assert_eq!(facts.clone().without_usual(64), facts);
        }
        assert_eq!(LayerFacts { attention: Some(usual), rope: None }.without_usual(64), LayerFacts::default());
    }

    #[test]
    fn impossible_facts_are_refused() {
        let usual = AttentionFacts::usual(16);
        for (attention, message) in [
            (AttentionFacts { scale: 0.0, ..usual }, "a positive `scale` in the range of f32, got 0"),
            (AttentionFacts { scale: f64::NAN, ..usual }, "a positive `scale` in the range of f32, got NaN"),
            (AttentionFacts { scale: 1e-300, ..usual }, "a positive `scale`"),
            (AttentionFacts { softcap: Some(-2.0), ..usual }, "a positive `softcap` in the range of f32, got -2"),
            (AttentionFacts { softcap: Some(f64::INFINITY), ..usual }, "a positive `softcap`"),
            (AttentionFacts { window: Some(0), ..usual }, "a `window` of at least 1, got 0"),
        ] {
            let error = LayerFacts { attention: Some(attention), rope: None }.check(16).unwrap_err();
            assert!(error.starts_with("`attention`: expected ") && error.contains(message), "{error}");
        }
        for (rope, message) in [
            (json!(7), "expected an object, got `7`"),
            (json!({"pairing": "half-split"}), "missing field"),
            (json!({"pairing": "half-split", "theta": 1e4, "rotary_dim": 32}), "from 2 to 16, got 32"),
        ] {
            let error = LayerFacts { attention: None, rope: Some(rope) }.check(16).unwrap_err();
            assert!(error.starts_with("rotation of the layer: ") && error.contains(message), "{error}");
        }
        LayerFacts { attention: None, rope: Some(json!({"rope_type": "yarn"})) }.check(16).unwrap();
    }
}
