//! Properties of the settings of any plugin, whatever its kind.

use std::sync::Arc;

use gearbox_core::{Entry, ErrorKind, config};
use serde_json::{Map, Number, Value};

use crate::Outcome;
use crate::outcome::{Cases, Check};

/// Reads the resolved settings of a plugin, such as [`Codec::config`](gearbox_core::Codec::config).
pub type Resolved<T> = fn(&T) -> Value;

/// Resolved settings pass the schema and build the same plugin again, from `{}` and from `settings`; what was set is kept.
pub fn fixed_point<T: ?Sized>(entry: &Entry<T>, settings: &Value, resolved: Resolved<T>) -> Outcome {
    Outcome::of("settings_are_a_fixed_point", |cases| {
        for given in [&empty(), settings] {
            cases.check(format!("settings {given}"), || {
                let first = resolved(&*build(entry, given)?);
                for (key, value) in given.as_object().into_iter().flatten() {
                    // `1` may come back as `1.0`, and a nested object with its defaults.
                    let same = first[key] == *value || first[key].as_f64() == value.as_f64() || value.is_object();
                    if !same {
                        return Err(format!("expected `{key}` to be {value}, got resolved settings {first}"));
                    }
                }
                config::check(&entry.schema, &first)
                    .map_err(|error| format!("resolved settings {first} break the schema: {error}"))?;
                let second = resolved(&*build(entry, &first)?);
                if second == first { Ok(()) } else { Err(format!("resolved to {first}, and that to {second}")) }
            })?;
        }
        Ok(())
    })
}

/// Unknown keys, settings that are no object, and numbers outside each range of the schema are refused as [`ErrorKind::InvalidConfig`].
pub fn strict<T: ?Sized>(entry: &Entry<T>, settings: &Value, resolved: Resolved<T>) -> Outcome {
    Outcome::of("settings_are_strict", |cases| {
        for other in [Value::Null, Value::Bool(true), "text".into(), 1.into(), Value::Array(vec![])] {
            refuses(entry, &other, cases)?;
        }
        let legal = resolved(&*build(entry, settings)?);
        let mut unknown = legal.clone();
        let Some(map) = unknown.as_object_mut() else {
            return Err(format!("expected the resolved settings to be an object, got {legal}"));
        };
        map.insert("no-such-setting".to_owned(), true.into());
        refuses(entry, &unknown, cases)?;
        for (pointer, value) in outside(&entry.schema, &entry.schema, &legal, "") {
            let mut broken = legal.clone();
            if let Some(place) = broken.pointer_mut(&pointer) {
                *place = value;
                refuses(entry, &broken, cases)?;
            }
        }
        Ok(())
    })
}

/// The entry says what the plugin is: kebab-case id, one line of summary, a source, a description of every setting.
pub fn described<T: ?Sized>(entry: &Entry<T>) -> Outcome {
    Outcome::of("entry_is_described", |cases| {
        let kebab = |id: &str| {
            id.split('-')
                .all(|word| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()))
        };
        let demand = |met: bool, text: &str| if met { Ok(()) } else { Err(text.to_owned()) };
        cases.check(format!("id `{}`", entry.id), || demand(kebab(&entry.id), "expected kebab-case"))?;
        let summary = &entry.summary;
        cases.check(format!("summary `{summary}`"), || {
            demand(
                !summary.is_empty() && !summary.contains('\n') && !summary.ends_with('.'),
                "expected one line without a period",
            )
        })?;
        cases.check("source", || {
            demand(!entry.source.is_empty(), "expected a paper, a repository or `own work`, got nothing")
        })?;
        cases.check("format version", || demand(entry.format_version >= 1, "expected at least 1, got 0"))?;
        for (name, setting) in entry.schema["properties"].as_object().into_iter().flatten() {
            let text = setting["description"].as_str().unwrap_or_default();
            cases.check(format!("setting `{name}`"), || {
                demand(!text.is_empty(), "expected a description in the schema")
            })?;
        }
        Ok(())
    })
}

/// Builds the plugin; the error as text.
pub(crate) fn build<T: ?Sized>(entry: &Entry<T>, settings: &Value) -> Check<Arc<T>> {
    entry.build(settings).map_err(|error| format!("cannot be built from {settings}: {error}"))
}

/// No settings at all.
pub(crate) fn empty() -> Value {
    Value::Object(Map::new())
}

fn refuses<T: ?Sized>(entry: &Entry<T>, settings: &Value, cases: &mut Cases) -> Check {
    cases.check(format!("settings {settings}"), || match entry.build(settings) {
        Ok(_) => Err("expected an error, got a plugin".to_owned()),
        Err(error) if error.kind() == ErrorKind::InvalidConfig => Ok(()),
        Err(error) => Err(format!("expected `InvalidConfig`, got `{:?}`: {error}", error.kind())),
    })
}

/// For each number of `value` that the schema bounds: its JSON pointer, and the nearest numbers outside.
fn outside(root: &Value, schema: &Value, value: &Value, pointer: &str) -> Vec<(String, Value)> {
    let mut found: Vec<_> = beyond(schema).into_iter().map(|number| (pointer.to_owned(), number)).collect();
    if let Some(target) = schema["$ref"].as_str().and_then(|reference| root.pointer(reference.strip_prefix('#')?)) {
        found.extend(outside(root, target, value, pointer));
    }
    for keyword in ["allOf", "anyOf", "oneOf"] {
        for branch in schema[keyword].as_array().into_iter().flatten() {
            found.extend(outside(root, branch, value, pointer));
        }
    }
    for (key, inner) in schema["properties"].as_object().into_iter().flatten() {
        if let Some(value) = value.get(key) {
            let key = key.replace('~', "~0").replace('/', "~1");
            found.extend(outside(root, inner, value, &format!("{pointer}/{key}")));
        }
    }
    found
}

/// The nearest numbers outside the range that one schema states.
fn beyond(schema: &Value) -> Vec<Value> {
    let whole = schema["type"].as_str() == Some("integer")
        || schema["type"].as_array().is_some_and(|types| types.iter().any(|name| name == "integer"));
    let past = |bound: &Value, up: bool| -> Option<Value> {
        if whole {
            let bound = bound.as_i64().map(i128::from).or_else(|| bound.as_u64().map(i128::from));
            let past = bound? + if up { 1 } else { -1 };
            return i64::try_from(past)
                .map(Number::from)
                .or_else(|_| u64::try_from(past).map(Number::from))
                .ok()
                .map(Value::from);
        }
        let bound = bound.as_f64()?;
        Number::from_f64(if up { bound.next_up() } else { bound.next_down() }).map(Value::from)
    };
    [
        past(&schema["minimum"], false),
        past(&schema["maximum"], true),
        schema.get("exclusiveMinimum").cloned(),
        schema.get("exclusiveMaximum").cloned(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_outside_follow_references_and_branches() {
        let schema = json!({
            "properties": {
                "level": {"type": "integer", "minimum": -7, "maximum": 22},
                "ratio": {"type": "number", "exclusiveMinimum": 0, "maximum": 1.0},
                "inner": {"$ref": "#/$defs/Inner"},
                "maybe": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
                "absent": {"type": "integer", "minimum": 0},
            },
            "$defs": {"Inner": {"properties": {"n/m": {"type": "integer", "minimum": 1, "maximum": u64::MAX}}}},
        });
        let value = json!({"level": 3, "ratio": 0.5, "inner": {"n/m": 1}, "maybe": null});
        let mut found = outside(&schema, &schema, &value, "");
        found.sort_by(|a, b| a.0.cmp(&b.0));
        let expected = [
            ("/inner/n~1m", json!(0)),
            ("/level", json!(-8)),
            ("/level", json!(23)),
            ("/maybe", json!(-1)),
            ("/ratio", json!(1.0f64.next_up())),
            ("/ratio", json!(0)),
        ];
        assert_eq!(found, expected.map(|(pointer, value)| (pointer.to_owned(), value)));
    }
}
