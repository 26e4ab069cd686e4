//! Checks of JSON settings against their schema, with the JSON pointer and the legal range in the message.

use jsonschema::error::ValidationErrorKind;
use jsonschema::paths::Location;
use jsonschema::{Keyword, ValidationError};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use serde_path_to_error::Segment;

use crate::{Error, Result};

/// Key of a schema that says in words what is legal where its keywords do not read well.
pub(crate) const EXPECTED: &str = "x-expected";

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
    serde_path_to_error::deserialize(value).map_err(|error| {
        let steps = error.path().iter().filter_map(|segment| match segment {
            Segment::Seq { index } => Some(index.to_string()),
            Segment::Map { key } => Some(key.clone()),
            Segment::Enum { .. } | Segment::Unknown => None,
        });
        let pointer: String = steps.map(|step| join("", &step)).collect();
        Error::invalid_config(format!("{}: {}", place(&pointer), error.inner()))
    })
}

/// Checks settings against a JSON Schema.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) with the JSON pointer, the value and what is legal there, one line per finding.
pub fn check(schema: &Value, value: &Value) -> Result<()> {
    check_at(schema, value, "")
}

/// Checks settings that stand at a JSON pointer of a larger value, from which the pointers of the findings start.
pub(crate) fn check_at(schema: &Value, value: &Value, base: &str) -> Result<()> {
    let validator = jsonschema::options()
        .with_keyword("type", strict_type)
        .build(schema)
        .map_err(|error| Error::invalid_config(format!("the JSON Schema itself is invalid: {error}")))?;
    let errors: Vec<_> = validator.iter_errors(value).collect();
    if errors.is_empty() {
        return Ok(());
    }
    let mut findings = Findings { root: schema, value, base, lines: Vec::new() };
    findings.describe_all(&errors);
    Err(Error::invalid_config(findings.lines.join("\n")))
}

/// The JSON pointer of a key of the object at `pointer`.
///
/// # Examples
/// ```
/// assert_eq!(gearbox_core::config::join("/codec", "a/b"), "/codec/a~1b");
/// ```
pub fn join(pointer: &str, key: &str) -> String {
    format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1"))
}

/// A JSON pointer as messages name it: in backticks, or in words for the value itself.
pub fn place(pointer: &str) -> String {
    if pointer.is_empty() { "the whole value".to_owned() } else { format!("`{pointer}`") }
}

/// The keyword `type`, but `128.0` is no integer, and an integer must fit the type that `format` names: what serde reads.
struct StrictType {
    names: Vec<String>,
    integers: std::ops::RangeInclusive<i128>,
}

#[expect(clippy::unnecessary_wraps, reason = "the signature of a keyword factory")]
fn strict_type<'a>(
    parent: &'a Map<String, Value>,
    names: &'a Value,
    _: Location,
) -> Result<Box<dyn for<'i> Keyword<'i>>, ValidationError<'a>> {
    let names = match names {
        Value::Array(names) => names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        name => name.as_str().map(str::to_owned).into_iter().collect(),
    };
    // A bound that the schema states has a keyword and a finding of its own.
    let (low, high) = format_bounds(parent.get("format"));
    let low = if parent.contains_key("minimum") { i128::MIN } else { low };
    let high = if parent.contains_key("maximum") { i128::MAX } else { high };
    Ok(Box::new(StrictType { names, integers: low..=high }))
}

/// Least and greatest integer of a format; the narrower ones have both bounds in the schema.
fn format_bounds(format: Option<&Value>) -> (i128, i128) {
    match format.and_then(Value::as_str) {
        Some("int32") => (i32::MIN.into(), i32::MAX.into()),
        Some("int" | "int64") => (i64::MIN.into(), i64::MAX.into()),
        Some("uint32") => (0, u32::MAX.into()),
        _ => (i128::MIN, i128::MAX),
    }
}

fn as_integer(value: &Value) -> Option<i128> {
    value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from))
}

impl<'i> Keyword<'i> for StrictType {
    fn validate(&self, instance: &'i Value) -> Result<(), ValidationError<'i>> {
        if Keyword::is_valid(self, instance) { Ok(()) } else { Err(ValidationError::custom("has another type")) }
    }

    fn is_valid(&self, instance: &'i Value) -> bool {
        self.names.iter().any(|name| match (name.as_str(), instance) {
            ("integer", number) => as_integer(number).is_some_and(|integer| self.integers.contains(&integer)),
            ("null", Value::Null)
            | ("boolean", Value::Bool(_))
            | ("number", Value::Number(_))
            | ("string", Value::String(_))
            | ("array", Value::Array(_))
            | ("object", Value::Object(_)) => true,
            _ => false,
        })
    }
}

/// What is wrong with a value, one line each.
struct Findings<'a> {
    /// The whole schema, into which references point.
    root: &'a Value,
    /// The value that is checked.
    value: &'a Value,
    /// JSON pointer of the checked value.
    base: &'a str,
    lines: Vec<String>,
}

impl Findings<'_> {
    fn add(&mut self, pointer: &str, text: &str) {
        let line = format!("{}: {text}", place(&format!("{}{pointer}", self.base)));
        if !self.lines.contains(&line) {
            self.lines.push(line);
        }
    }

    /// A missing key comes last: what is unknown may be that key, misspelt.
    fn describe_all(&mut self, errors: &[ValidationError<'_>]) {
        let missing = |error: &&ValidationError<'_>| matches!(error.kind(), ValidationErrorKind::Required { .. });
        errors.iter().filter(|error| !missing(error)).for_each(|error| self.describe(error));
        errors.iter().filter(missing).for_each(|error| self.describe(error));
    }

    fn describe(&mut self, error: &ValidationError<'_>) {
        let pointer = error.instance_path().to_string();
        let schema_pointer = error.schema_path().to_string();
        let got = error.instance();
        // The last step of the schema path is the keyword that failed; its parent is the schema of the value.
        let schema = schema_pointer.rsplit_once('/').and_then(|(parent, _)| resolve(self.root, parent));
        let schema = schema.unwrap_or(self.root);
        let expected = schema[EXPECTED].as_str();
        match error.kind() {
            ValidationErrorKind::AdditionalProperties { unexpected } => {
                let known = schema["properties"].as_object().into_iter().flat_map(Map::keys).map(String::as_str);
                let known: Vec<&str> = known.collect();
                for key in unexpected {
                    let hint = match near(key, known.iter().copied()).as_slice() {
                        [] => format!("legal keys are `{}`", known.join("`, `")),
                        names => format!("did you mean `{}`?", names.join("` or `")),
                    };
                    self.add(&join(&pointer, key), &format!("unknown key, {hint}"));
                }
            }
            // A schema without any property is `false` for each of them; the finding does not name the key.
            ValidationErrorKind::FalseSchema if schema_pointer.ends_with("/additionalProperties") => {
                let object = self.value.pointer(&pointer).and_then(Value::as_object);
                for key in object.into_iter().flat_map(Map::keys) {
                    self.add(&join(&pointer, key), "unknown key, no keys are legal here");
                }
            }
            ValidationErrorKind::Minimum { .. }
            | ValidationErrorKind::Maximum { .. }
            | ValidationErrorKind::ExclusiveMinimum { .. }
            | ValidationErrorKind::ExclusiveMaximum { .. } => {
                // A number of another type has a finding of its own, which names the range too.
                if type_names(schema) == ["integer"] && as_integer(got).is_none() {
                    return;
                }
                self.add(&pointer, &format!("{got} is out of range, expected {}", range(schema)));
            }
            ValidationErrorKind::Custom { keyword, .. } if keyword == "type" => {
                let names = type_names(schema);
                if as_integer(got).is_some() && names.contains(&"integer") {
                    let (low, high) = format_bounds(schema.get("format"));
                    let low = schema.get("minimum").map_or(low.to_string(), Value::to_string);
                    let high = schema.get("maximum").map_or(high.to_string(), Value::to_string);
                    return self.add(&pointer, &format!("{got} is out of range, expected {low} to {high}"));
                }
                let mut words = expected.map_or_else(|| names.join(" or "), str::to_owned);
                let bounds = range(schema);
                if !bounds.is_empty() {
                    words = format!("{words} {bounds}");
                }
                self.add(&pointer, &format!("expected {words}, got `{got}`"));
            }
            ValidationErrorKind::Required { property } => {
                let key = property.as_str().map_or_else(|| property.to_string(), str::to_owned);
                self.add(&pointer, &format!("the key `{key}` is missing"));
            }
            ValidationErrorKind::Enum { options } => {
                let options: Vec<_> = options.as_array().into_iter().flatten().map(ToString::to_string).collect();
                self.add(&pointer, &format!("expected one of {}, got {got}", options.join(", ")));
            }
            ValidationErrorKind::OneOfNotValid { context } => self.branches(&pointer, &schema["oneOf"], context, error),
            ValidationErrorKind::AnyOf { context } => self.branches(&pointer, &schema["anyOf"], context, error),
            _ => match expected {
                Some(expected) => self.add(&pointer, &format!("expected {expected}, got `{got}`")),
                None => self.add(&pointer, &error.to_string()),
            },
        }
    }

    /// Reports what is wrong in the branch that the value means, or which branches there are.
    fn branches(
        &mut self,
        pointer: &str,
        branches: &Value,
        context: &[Vec<ValidationError<'static>>],
        error: &ValidationError<'_>,
    ) {
        let got = error.instance();
        let branches: Vec<_> = branches.as_array().into_iter().flatten().map(|it| follow(self.root, it)).collect();
        let tags: Vec<_> = branches.iter().filter_map(|branch| tag(branch)).collect();
        let tagged = |branch: &&Value| tag(branch).is_some_and(|(key, constant)| got.get(key) == Some(constant));
        let meant = branches.iter().position(tagged).or_else(|| only(branches.iter(), |it| it["type"] != "null"));
        // Failing that, the one branch that takes a value of this type.
        let other_type = |error: &ValidationError<'_>| {
            error.kind().keyword() == "type" && error.instance_path().to_string() == pointer
        };
        let meant = meant.or_else(|| {
            if tags.is_empty() { only(context.iter(), |found| !found.iter().any(other_type)) } else { None }
        });
        if let Some(found) = meant.and_then(|idx| context.get(idx)) {
            self.describe_all(found);
        } else if let [(key, _), ..] = tags.as_slice()
            && tags.len() == branches.len()
        {
            let legal: Vec<_> = tags.iter().map(|(_, constant)| constant.to_string()).collect();
            let legal = legal.join(", ");
            match got.as_ref() {
                Value::Object(map) => match map.get(*key) {
                    Some(other) => self.add(&join(pointer, key), &format!("expected one of {legal}, got {other}")),
                    None => self.add(pointer, &format!("the key `{key}` is missing, expected one of {legal}")),
                },
                _ => self.add(pointer, &format!("expected object with the key `{key}`, one of {legal}, got `{got}`")),
            }
        } else {
            match alternatives(&branches) {
                names if names.is_empty() => self.add(pointer, &error.to_string()),
                names => self.add(pointer, &format!("expected one of {}, got {got}", names.join(", "))),
            }
        }
    }
}

/// The place of the only item that meets a condition.
fn only<T>(items: impl Iterator<Item = T>, meets: impl Fn(T) -> bool) -> Option<usize> {
    let mut places = items.enumerate().filter_map(|(idx, item)| meets(item).then_some(idx));
    places.next().filter(|_| places.next().is_none())
}

/// The key whose constant tells this branch from its siblings.
fn tag(branch: &Value) -> Option<(&str, &Value)> {
    let properties = branch["properties"].as_object()?;
    properties.iter().find_map(|(key, schema)| Some((key.as_str(), schema.get("const")?)))
}

/// The types of a schema; `null` stands for an absent key and is left out beside others.
fn type_names(schema: &Value) -> Vec<&str> {
    match &schema["type"] {
        Value::Array(names) => names.iter().filter_map(Value::as_str).filter(|name| *name != "null").collect(),
        name => name.as_str().into_iter().collect(),
    }
}

/// The schema that a reference stands for.
fn follow<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let target = schema["$ref"].as_str().and_then(|reference| root.pointer(reference.strip_prefix('#')?));
    target.unwrap_or(schema)
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

/// The constants that branches name.
fn alternatives(branches: &[&Value]) -> Vec<String> {
    let names = branches.iter().flat_map(|branch| {
        let tag = tag(branch).map(|(key, constant)| format!("{{\"{key}\": {constant}}}"));
        let constant = branch.get("const").map(ToString::to_string);
        let list = branch["enum"].as_array().into_iter().flatten().map(ToString::to_string);
        constant.into_iter().chain(tag).chain(list).collect::<Vec<_>>()
    });
    names.collect()
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

    /// Tagged, so serde alone would name no pointer.
    #[derive(Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(tag = "mode", rename_all = "kebab-case", deny_unknown_fields)]
    enum Tagged {
        /// Nothing to set.
        Whole,
        /// One setting.
        Cut {
            /// Tokens.
            #[schemars(range(min = 1))]
            tokens: u32,
        },
    }

    /// Branches that are told apart by their type.
    #[derive(Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(untagged)]
    enum Untagged {
        Number(i64),
        Settings(Inner),
    }

    fn refused<T: DeserializeOwned + JsonSchema + std::fmt::Debug>(value: &Value) -> String {
        from_value::<T>(value).unwrap_err().to_string()
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

    #[test]
    fn number_with_a_fraction_part_is_no_integer() {
        for (number, got) in [(json!(3.0), "3.0"), (json!(1e30), "1e+30")] {
            assert_eq!(message(&json!({"level": number})), format!("`/level`: expected integer -7 to 22, got `{got}`"));
        }
    }

    #[test]
    fn integer_outside_its_type_names_the_range() {
        assert_eq!(
            refused::<Tagged>(&json!({"mode": "cut", "tokens": 5_000_000_000_u64})),
            "`/tokens`: 5000000000 is out of range, expected 1 to 4294967295"
        );
    }

    #[test]
    fn value_itself_is_named_in_words() {
        assert_eq!(message(&json!([])), "the whole value: expected object, got `[]`");
    }

    #[test]
    fn pointer_of_an_unknown_key_is_escaped() {
        assert_eq!(message(&json!({"a/b~": 1})), "`/a~1b~0`: unknown key, legal keys are `inner`, `level`, `mode`");
    }

    #[test]
    fn branch_of_a_tagged_enum_is_found_by_its_tag() {
        let refused = refused::<Option<Tagged>>;
        assert_eq!(refused(&json!({"mode": "cut", "tokens": 0})), "`/tokens`: 0 is out of range, expected at least 1");
        assert_eq!(
            refused(&json!({"mode": "cut", "token": 3})),
            "`/token`: unknown key, did you mean `tokens`?\nthe whole value: the key `tokens` is missing"
        );
        assert_eq!(refused(&json!({"mode": "whole", "tokens": 3})), "`/tokens`: unknown key, legal keys are `mode`");
    }

    #[test]
    fn unknown_tag_lists_the_legal_ones() {
        let refused = refused::<Tagged>;
        assert_eq!(refused(&json!({"mode": "cute"})), "`/mode`: expected one of \"whole\", \"cut\", got \"cute\"");
        assert_eq!(
            refused(&json!({"tokens": 3})),
            "the whole value: the key `mode` is missing, expected one of \"whole\", \"cut\""
        );
        assert_eq!(
            refused(&json!("cut")),
            "the whole value: expected object with the key `mode`, one of \"whole\", \"cut\", got `\"cut\"`"
        );
    }

    #[test]
    fn branch_of_an_untagged_enum_is_found_by_its_type() {
        assert_eq!(refused::<Untagged>(&json!({"tokens": 0})), "`/tokens`: 0 is out of range, expected at least 1");
    }
}
