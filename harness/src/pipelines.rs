//! Pipelines as a user names them: a file, JSON on the command line, or a codec's id; and the sweep over their settings.

use std::path::Path;

use gearbox_core::{AnyEntry, Chunking, Error, Kind, PipelineSpec, PluginSpec, Registry, Result, ResultExt, config};
use serde_json::Value;

/// Key of an object that stands for each of its values in turn: `{ "sweep": [ … ] }`.
const SWEEP: &str = "sweep";

/// Reads one pipeline from a file (`*.json`), from JSON text, or from the id of a codec.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) with the JSON pointer and what is legal there, also for a sweep;
/// [`ErrorKind::UnknownPlugin`](gearbox_core::ErrorKind::UnknownPlugin) with near ids.
pub fn parse(text: &str, registry: &Registry) -> Result<PipelineSpec> {
    let (value, place) = read_value(text, registry)?;
    if let Some(pointer) = find_sweep(&value, "") {
        return Err(Error::invalid_config(format!(
            "{}: expected one pipeline, got a `{SWEEP}` over several, which only `gearbox sweep` takes",
            config::place(&pointer)
        ))
        .context(place));
    }
    config::from_value(&value).context(|| place)
}

/// Reads a pipeline as [`parse`] does, but leaves every `{ "sweep": [ … ] }` in place for [`expand`].
///
/// # Errors
/// As [`parse`] and [`expand`].
pub fn read(text: &str, registry: &Registry) -> Result<Value> {
    let (value, place) = read_value(text, registry)?;
    expand(&value).context(|| place)?;
    Ok(value)
}

/// The JSON of a pipeline, and where it comes from.
fn read_value(text: &str, registry: &Registry) -> Result<(Value, String)> {
    let json = |text: &str, place: String| {
        let value = serde_json::from_str(text);
        let value = value.map_err(|error| Error::invalid_config(format!("not valid JSON: {error}")));
        Ok((value.context(|| place.clone())?, place))
    };
    if text.trim_start().starts_with('{') {
        return json(text, "pipeline".to_owned());
    }
    let path = Path::new(text);
    if path.extension().is_some_and(|extension| extension == "json") {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
        return json(&text, format!("`{}`", path.display()));
    }
    registry.codec(text).context(|| "pipeline (a `.json` file, JSON text or the id of a codec)".into())?;
    let spec = PipelineSpec::of_codec(PluginSpec::new(text), Chunking::default());
    Ok((spec.to_value(), "pipeline".to_owned()))
}

/// JSON pointer of the first sweep.
fn find_sweep(value: &Value, pointer: &str) -> Option<String> {
    match value {
        Value::Object(map) if map.contains_key(SWEEP) => Some(pointer.to_owned()),
        Value::Object(map) => map.iter().find_map(|(key, value)| find_sweep(value, &config::join(pointer, key))),
        Value::Array(items) => {
            items.iter().enumerate().find_map(|(idx, item)| find_sweep(item, &format!("{pointer}/{idx}")))
        }
        _ => None,
    }
}

/// Every codec with its default settings, in every chunking mode.
pub fn defaults(registry: &Registry) -> Vec<PipelineSpec> {
    let chunkings = [
        Chunking::PerEntry,
        Chunking::Chunked { tokens: 128 },
        Chunking::ChunkedGrouped { tokens: 128 },
        Chunking::Aggregate,
    ];
    let codecs = registry.entries().filter(|entry| entry.kind() == Kind::Codec).map(AnyEntry::id);
    codecs.flat_map(|id| chunkings.map(|chunking| PipelineSpec::of_codec(PluginSpec::new(id), chunking))).collect()
}

/// Expands every `{ "sweep": [ … ] }` in a pipeline into its values: the product of all of them, in the order they are written.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) if a sweep is not a list of at least one value, or a result is not a pipeline; the
/// message then names that result if there are several.
pub fn expand(value: &Value) -> Result<Vec<PipelineSpec>> {
    let values = products(value, "")?;
    let spec = |value: &Value| match config::from_value(value) {
        Err(error) if values.len() > 1 => Err(error.context(format!("pipeline {value}"))),
        spec => spec,
    };
    values.iter().map(spec).collect()
}

fn products(value: &Value, pointer: &str) -> Result<Vec<Value>> {
    match value {
        Value::Object(map) if map.contains_key(SWEEP) => match &map[SWEEP] {
            Value::Array(values) if !values.is_empty() && map.len() == 1 => {
                let each = values.iter().enumerate();
                let each = each.map(|(idx, value)| products(value, &format!("{pointer}/{SWEEP}/{idx}")));
                Ok(each.collect::<Result<Vec<_>>>()?.concat())
            }
            _ => Err(Error::invalid_config(format!(
                "{}: expected {{\"{SWEEP}\": [value, …]}} with at least one value and no other key, got {value}",
                config::place(pointer)
            ))),
        },
        Value::Object(map) => {
            let mut results = vec![serde_json::Map::new()];
            for (key, value) in map {
                let values = products(value, &config::join(pointer, key))?;
                results = product(&results, &values, |map, value| {
                    map.insert(key.clone(), value);
                });
            }
            Ok(results.into_iter().map(Value::Object).collect())
        }
        Value::Array(items) => {
            let mut results = vec![Vec::new()];
            for (idx, item) in items.iter().enumerate() {
                let values = products(item, &format!("{pointer}/{idx}"))?;
                results = product(&results, &values, Vec::push);
            }
            Ok(results.into_iter().map(Value::Array).collect())
        }
        scalar => Ok(vec![scalar.clone()]),
    }
}

fn product<T: Clone>(prefixes: &[T], values: &[Value], add: impl Fn(&mut T, Value)) -> Vec<T> {
    let extend = |prefix: &T, value: &Value| {
        let mut longer = prefix.clone();
        add(&mut longer, value.clone());
        longer
    };
    prefixes
        .iter()
        .flat_map(|prefix| values.iter().map(move |value| (prefix, value)))
        .map(|(p, v)| extend(p, v))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sweep_expands_to_the_product_in_written_order() {
        let specs = expand(&json!({
            "routes": [{ "codec": { "id": "zstd", "level": { "sweep": [1, 3] } } }],
            "chunking": { "mode": "chunked", "tokens": { "sweep": [64, 128] } }
        }))
        .unwrap();
        let settings: Vec<_> = specs.iter().map(|spec| spec.to_value()["chunking"]["tokens"].clone()).collect();
        assert_eq!(specs.len(), 4);
        assert!(settings.contains(&json!(64)) && settings.contains(&json!(128)));
    }

    #[test]
    fn sweep_without_values_is_refused_with_its_pointer() {
        let error = expand(&json!({ "chunking": { "mode": "chunked", "tokens": { "sweep": [] } } })).unwrap_err();
        assert!(error.to_string().starts_with("`/chunking/tokens`: expected"), "{error}");
    }

    #[test]
    fn sweep_may_stand_anywhere_and_hold_sweeps() {
        let zstd = json!({ "id": "zstd", "level": { "sweep": [1, 3] } });
        let value = json!({ "routes": [{ "codec": { "sweep": [zstd, { "id": "store" }] } }] });
        assert_eq!(expand(&value).unwrap().len(), 3);
        assert_eq!(expand(&json!({ "sweep": [value.clone(), value] })).unwrap().len(), 6);
    }

    #[test]
    fn illegal_product_names_the_expanded_pipeline() {
        let value = json!({ "chunking": { "mode": "chunked", "tokens": { "sweep": [64, 0] } } });
        assert_eq!(
            expand(&value).unwrap_err().to_string(),
            r#"pipeline {"chunking":{"mode":"chunked","tokens":0}}: `/chunking/tokens`: 0 is out of range, expected at least 1"#
        );
    }

    #[test]
    fn single_pipeline_refuses_a_sweep_with_its_pointer() {
        let text = r#"{ "chunking": { "mode": "chunked", "tokens": { "sweep": [64, 128] } } }"#;
        let registry = Registry::empty();
        assert_eq!(
            parse(text, &registry).unwrap_err().to_string(),
            "pipeline: `/chunking/tokens`: expected one pipeline, got a `sweep` over several, which only `gearbox sweep` takes"
        );
        let value: Value = serde_json::from_str(text).unwrap();
        assert_eq!(read(text, &registry).unwrap(), value);
    }
}
