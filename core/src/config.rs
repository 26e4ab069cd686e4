//! Checks of JSON settings against their schema, with the JSON pointer and the legal range in the message.

use jsonschema::error::ValidationErrorKind;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result};

/// The JSON Schema of a config type; doc comments become descriptions.
pub fn schema_of<T: JsonSchema>() -> Value {
    schemars::schema_for!(T).to_value()
}

/// Reads settings after checking them against the schema of their type.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig), see [`check`].
pub fn from_value<T: DeserializeOwned + JsonSchema>(value: &Value) -> Result<T> {
    check(&schema_of::<T>(), value)?;
    serde_json::from_value(value.clone()).map_err(|error| Error::invalid_config(error.to_string()))
}

/// Checks settings against a JSON Schema.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) with the JSON pointer, the value and what is legal there, one line per finding.
pub fn check(schema: &Value, value: &Value) -> Result<()> {
    let validator = jsonschema::validator_for(schema)
        .map_err(|error| Error::invalid_config(format!("the JSON Schema itself is invalid: {error}")))?;
    let findings: Vec<_> = validator.iter_errors(value).map(|error| describe(schema, value, &error)).collect();
    if findings.is_empty() { Ok(()) } else { Err(Error::invalid_config(findings.join("\n"))) }
}

fn describe(root: &Value, value: &Value, error: &jsonschema::ValidationError<'_>) -> String {
    let pointer = error.instance_path().to_string();
    let schema_pointer = error.schema_path().to_string();
    // The last step of the schema path is the keyword that failed; its parent is the schema of the value.
    let schema = schema_pointer.rsplit_once('/').and_then(|(parent, _)| resolve(root, parent)).unwrap_or(root);
    match error.kind() {
        ValidationErrorKind::AdditionalProperties { unexpected } => {
            let known: Vec<&str> =
                schema["properties"].as_object().into_iter().flat_map(|map| map.keys().map(String::as_str)).collect();
            unexpected
                .iter()
                .map(|key| {
                    let at = format!("`{pointer}/{key}`: unknown key");
                    match near(key, known.iter().copied()).as_slice() {
                        [] => format!("{at}, legal keys are `{}`", known.join("`, `")),
                        names => format!("{at}, did you mean `{}`?", names.join("` or `")),
                    }
                })
                .collect::<Vec<_>>()
                .join("\n")
        }
        // A schema without any property is `false` for each of them; the finding does not name the key.
        ValidationErrorKind::FalseSchema if schema_pointer.ends_with("/additionalProperties") => {
            let keys = value.pointer(&pointer).and_then(Value::as_object).into_iter().flat_map(|map| map.keys());
            keys.map(|key| format!("`{pointer}/{key}`: unknown key, no keys are legal here"))
                .collect::<Vec<_>>()
                .join("\n")
        }
        ValidationErrorKind::Minimum { .. }
        | ValidationErrorKind::Maximum { .. }
        | ValidationErrorKind::ExclusiveMinimum { .. }
        | ValidationErrorKind::ExclusiveMaximum { .. } => {
            format!("`{pointer}`: {} is out of range, expected {}", error.instance(), range(schema))
        }
        ValidationErrorKind::Type { .. } => {
            let expected = match &schema["type"] {
                Value::String(name) => name.clone(),
                other => other.to_string(),
            };
            let bounds = range(schema);
            let bounds = if bounds.is_empty() { bounds } else { format!(" {bounds}") };
            format!("`{pointer}`: expected {expected}{bounds}, got `{}`", error.instance())
        }
        ValidationErrorKind::Required { property } => format!("`{pointer}`: the key {property} is missing"),
        ValidationErrorKind::Enum { options } => {
            format!("`{pointer}`: expected one of {options}, got {}", error.instance())
        }
        ValidationErrorKind::OneOfNotValid { .. } | ValidationErrorKind::AnyOf { .. } => {
            let names = alternatives(schema);
            if names.is_empty() {
                format!("`{pointer}`: {error}")
            } else {
                format!("`{pointer}`: expected one of {}, got {}", names.join(", "), error.instance())
            }
        }
        _ => format!("`{pointer}`: {error}"),
    }
}

/// Follows a schema path, which may step through `$ref`.
fn resolve<'a>(root: &'a Value, pointer: &str) -> Option<&'a Value> {
    let mut at = root;
    for step in pointer.split('/').skip(1) {
        if step == "$ref" {
            let target = at["$ref"].as_str()?;
            at = root.pointer(target.strip_prefix('#')?)?;
        } else {
            let step = step.replace("~1", "/").replace("~0", "~");
            at = match at {
                Value::Array(items) => items.get(step.parse::<usize>().ok()?)?,
                other => other.get(step)?,
            };
        }
    }
    Some(at)
}

/// The legal range of a number, as words; empty if the schema has none.
fn range(schema: &Value) -> String {
    let low = schema.get("minimum").map(ToString::to_string);
    let above = schema.get("exclusiveMinimum").map(|v| format!("more than {v}"));
    let high = schema.get("maximum").map(ToString::to_string);
    let below = schema.get("exclusiveMaximum").map(|v| format!("less than {v}"));
    match (low, high) {
        (Some(low), Some(high)) => format!("{low} to {high}"),
        (Some(low), None) => {
            [Some(format!("at least {low}")), below].into_iter().flatten().collect::<Vec<_>>().join(", ")
        }
        (None, Some(high)) => {
            [above, Some(format!("at most {high}"))].into_iter().flatten().collect::<Vec<_>>().join(", ")
        }
        (None, None) => [above, below].into_iter().flatten().collect::<Vec<_>>().join(", "),
    }
}

/// The constants that the branches of a `oneOf` or `anyOf` name.
fn alternatives(schema: &Value) -> Vec<String> {
    let branches = schema["oneOf"].as_array().or_else(|| schema["anyOf"].as_array());
    branches
        .into_iter()
        .flatten()
        .flat_map(|branch| {
            let tag = branch["properties"].as_object().and_then(|map| {
                map.iter()
                    .find_map(|(key, value)| value.get("const").map(|constant| format!("{{\"{key}\": {constant}}}")))
            });
            let constant = branch.get("const").map(ToString::to_string);
            let list = branch["enum"].as_array().into_iter().flatten().map(ToString::to_string);
            constant.into_iter().chain(tag).chain(list).collect::<Vec<_>>()
        })
        .collect()
}

/// Up to three known names that resemble `name`, the nearest first.
pub fn near<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut scored: Vec<_> =
        known.map(|other| (strsim::jaro_winkler(name, other), other)).filter(|(score, _)| *score > 0.75).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.into_iter().take(3).map(|(_, other)| other).collect()
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};
    use serde_json::json;

    use super::*;

    #[derive(Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields, default)]
    struct Settings {
        /// Effort.
        #[schemars(range(min = -7, max = 22))]
        level: i32,
        mode: Mode,
        inner: Inner,
    }

    #[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields, default)]
    struct Inner {
        #[schemars(range(min = 1))]
        tokens: usize,
    }

    #[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        /// Small.
        #[default]
        Smallest,
        /// Same.
        Reference,
    }

    impl Default for Settings {
        fn default() -> Self {
            Self { level: 3, mode: Mode::Smallest, inner: Inner { tokens: 1 } }
        }
    }

    fn message(value: &Value) -> String {
        from_value::<Settings>(value).unwrap_err().to_string()
    }

    #[test]
    fn defaults_fill_what_is_absent() {
        let settings: Settings = from_value(&json!({"inner": {"tokens": 4}})).unwrap();
        assert_eq!((settings.level, settings.inner.tokens), (3, 4));
    }

    #[test]
    fn unknown_key_names_pointer_and_near_key() {
        assert_eq!(message(&json!({"levle": 3})), "`/levle`: unknown key, did you mean `level`?");
        assert_eq!(message(&json!({"inner": {"xyz": 3}})), "`/inner/xyz`: unknown key, legal keys are `tokens`");
    }

    #[test]
    fn out_of_range_names_the_range() {
        assert_eq!(message(&json!({"level": 23})), "`/level`: 23 is out of range, expected -7 to 22");
        assert_eq!(
            message(&json!({"inner": {"tokens": 0}})),
            "`/inner/tokens`: 0 is out of range, expected at least 1"
        );
    }

    #[test]
    fn wrong_type_names_both() {
        assert_eq!(message(&json!({"level": "x"})), "`/level`: expected integer -7 to 22, got `\"x\"`");
    }

    #[test]
    fn unknown_mode_lists_the_legal_ones() {
        assert_eq!(
            message(&json!({"mode": "best"})),
            "`/mode`: expected one of \"smallest\", \"reference\", got \"best\""
        );
    }
}
