//! Numbers that JSON cannot hold: what is not finite is written as `null`, and read back as what it stands for.

use serde::{Deserialize, Deserializer};

/// Reads a number of which `null` means damaged beyond measure, where less is better.
pub(crate) fn or_infinite<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// Reads a number of which `null` means that it is not defined.
pub(crate) fn or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}
