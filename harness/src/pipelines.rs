//! Pipelines as a user names them: a file, JSON on the command line, or a codec's id; and the sweep over their settings.

use std::path::Path;

use gearbox_core::{AnyEntry, Chunking, Error, Kind, PipelineSpec, PluginSpec, Registry, Result, ResultExt, config};
use serde_json::Value;

/// Key of an object that stands for each of its values in turn: `{ "sweep": [ … ] }`.
const SWEEP: &str = "sweep";

/// Reads a pipeline from a file (`*.json`), from JSON text, or from the id of a codec.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) with the JSON pointer and what is legal there;
/// [`ErrorKind::UnknownPlugin`](gearbox_core::ErrorKind::UnknownPlugin) with near ids.
pub fn parse(text: &str, registry: &Registry) -> Result<PipelineSpec> {
    if text.trim_start().starts_with('{') {
        return PipelineSpec::from_json(text).context(|| "pipeline".into());
    }
    let path = Path::new(text);
    if path.extension().is_some_and(|extension| extension == "json") {
        let json = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
        return PipelineSpec::from_json(&json).context(|| format!("`{}`", path.display()));
    }
    registry.codec(text).context(|| "pipeline (a `.json` file, JSON text or the id of a codec)".into())?;
    Ok(PipelineSpec::of_codec(PluginSpec::new(text), Chunking::default()))
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
/// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) if a sweep is not a list of at least one value, or a result is not a pipeline.
pub fn expand(value: &Value) -> Result<Vec<PipelineSpec>> {
    products(value, "")?.iter().map(config::from_value).collect()
}

fn products(value: &Value, pointer: &str) -> Result<Vec<Value>> {
    match value {
        Value::Object(map) if map.contains_key(SWEEP) => match &map[SWEEP] {
            Value::Array(values) if !values.is_empty() && map.len() == 1 => Ok(values.clone()),
            _ => Err(Error::invalid_config(format!(
                "`{pointer}`: expected {{\"{SWEEP}\": [value, …]}} with at least one value and no other key, got {value}"
            ))),
        },
        Value::Object(map) => {
            let mut results = vec![serde_json::Map::new()];
            for (key, value) in map {
                let values = products(value, &format!("{pointer}/{key}"))?;
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
}
