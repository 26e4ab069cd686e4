//! Pipelines as a user names them: a file, JSON on the command line, or a codec's id; and the sweep over their settings.

use std::path::Path;

use gearbox_core::{
    AnyEntry, Chunking, CodecSpec, Error, Kind, LaneSpec, PipelineSpec, PluginSpec, Registry, Result, ResultExt,
    RouteSpec, config,
};
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

/// Tokens per chunk of the default pipelines.
const TOKENS: usize = 128;

/// Every codec with its default settings in every chunking mode, then every transform before every codec in chunks of 128 tokens.
///
/// The codec behind a transform codes the lanes that hold most of the data; those beside them (scales, positions, modes) go to `zstd`.
pub fn defaults(registry: &Registry) -> Vec<PipelineSpec> {
    let chunkings = [
        Chunking::PerEntry,
        Chunking::Chunked { tokens: TOKENS },
        Chunking::ChunkedGrouped { tokens: TOKENS },
        Chunking::Aggregate,
    ];
    let ids = |kind| registry.entries().filter(move |entry| entry.kind() == kind).map(AnyEntry::id);
    let alone =
        ids(Kind::Codec).flat_map(|id| chunkings.map(|chunking| PipelineSpec::of_codec(PluginSpec::new(id), chunking)));
    let transformed =
        ids(Kind::Transform).flat_map(|transform| ids(Kind::Codec).map(move |codec| behind(transform, codec)));
    alone.chain(transformed).collect()
}

/// A transform before a codec.
fn behind(transform: &str, codec: &str) -> PipelineSpec {
    let main = [LaneSpec::TENSOR, "codes", "rows"].map(|lane| (lane.to_owned(), PluginSpec::new(codec)));
    let rest = [("*".to_owned(), PluginSpec::new("zstd"))];
    let route = RouteSpec {
        transforms: Some(vec![PluginSpec::new(transform)]),
        codec: Some(CodecSpec::PerLane(main.into_iter().chain(rest).collect())),
        ..RouteSpec::default()
    };
    PipelineSpec {
        name: Some(format!("{transform} + {codec}")),
        routes: vec![route],
        chunking: Chunking::ChunkedGrouped { tokens: TOKENS },
    }
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
    let mut specs = values.iter().map(spec).collect::<Result<Vec<PipelineSpec>>>()?;
    // A name that was given for all products says which is which; sweeps within sweeps are left to their derived names.
    if let Ok(grid) = Grid::of(value) {
        for (spec, point) in specs.iter_mut().zip(grid.points()) {
            grid.name(&point, spec);
        }
    }
    Ok(specs)
}

/// A pipeline with its sweeps as axes, for a search that does not run every product.
#[derive(Clone, Debug)]
pub struct Grid {
    template: Value,
    axes: Vec<(String, Vec<Value>)>,
}

impl Grid {
    /// Finds the sweeps of a pipeline; their values may not hold sweeps themselves.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) as [`expand`], and for a sweep within a sweep.
    pub fn of(value: &Value) -> Result<Self> {
        let mut axes = Vec::new();
        find_axes(value, "", &mut axes)?;
        Ok(Self { template: value.clone(), axes })
    }

    /// Number of values of each axis.
    pub fn lens(&self) -> Vec<usize> {
        self.axes.iter().map(|(_, values)| values.len()).collect()
    }

    /// The pipeline with one value per axis.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) if the result is not a pipeline.
    pub fn at(&self, point: &[usize]) -> Result<PipelineSpec> {
        let mut value = self.template.clone();
        for ((pointer, values), idx) in self.axes.iter().zip(point) {
            if let Some(place) = value.pointer_mut(pointer) {
                place.clone_from(&values[*idx]);
            }
        }
        let mut spec = config::from_value(&value).context(|| format!("pipeline {value}"))?;
        self.name(point, &mut spec);
        Ok(spec)
    }

    /// Every point, the last axis fastest.
    fn points(&self) -> Vec<Vec<usize>> {
        points(self.lens().into_iter().map(|len| (0..len).collect()))
    }

    /// Adds the settings of a point to the name of its pipeline, if it has one.
    fn name(&self, point: &[usize], spec: &mut PipelineSpec) {
        let Some(name) = spec.name.as_mut().filter(|_| !self.axes.is_empty()) else { return };
        let setting = |((pointer, values), idx): (&(String, Vec<Value>), &usize)| {
            let places = pointer.split('/').filter(|place| {
                !place.is_empty() && !place.bytes().all(|byte| byte.is_ascii_digit()) && !STRUCTURE.contains(place)
            });
            let value = &values[*idx];
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            format!("{} {value}", places.collect::<Vec<_>>().join(" "))
        };
        let settings: Vec<_> = self.axes.iter().zip(point).map(setting).collect();
        *name = format!("{name} ({})", settings.join(", "));
    }
}

/// All combinations of one place per axis, the last axis fastest.
pub(crate) fn points(axes: impl Iterator<Item = Vec<usize>>) -> Vec<Vec<usize>> {
    axes.fold(vec![Vec::new()], |points, places| product(&points, &places, Vec::push))
}

/// Parts of a JSON pointer that every pipeline has.
const STRUCTURE: [&str; 3] = ["routes", "transforms", "codec"];

fn find_axes(value: &Value, pointer: &str, axes: &mut Vec<(String, Vec<Value>)>) -> Result<()> {
    match value {
        Value::Object(map) if map.contains_key(SWEEP) => {
            let values = sweep_values(map, value, pointer)?;
            if let Some(inner) = find_sweep(&map[SWEEP], &config::join(pointer, SWEEP)) {
                return Err(Error::invalid_config(format!(
                    "`{inner}`: a search takes no `{SWEEP}` within a `{SWEEP}`"
                )));
            }
            axes.push((pointer.to_owned(), values.clone()));
            Ok(())
        }
        Value::Object(map) => {
            map.iter().try_for_each(|(key, value)| find_axes(value, &config::join(pointer, key), axes))
        }
        Value::Array(items) => {
            items.iter().enumerate().try_for_each(|(idx, item)| find_axes(item, &format!("{pointer}/{idx}"), axes))
        }
        _ => Ok(()),
    }
}

/// The values of a sweep.
fn sweep_values<'a>(map: &'a serde_json::Map<String, Value>, value: &Value, pointer: &str) -> Result<&'a Vec<Value>> {
    match &map[SWEEP] {
        Value::Array(values) if !values.is_empty() && map.len() == 1 => Ok(values),
        _ => Err(Error::invalid_config(format!(
            "{}: expected {{\"{SWEEP}\": [value, …]}} with at least one value and no other key, got {value}",
            config::place(pointer)
        ))),
    }
}

fn products(value: &Value, pointer: &str) -> Result<Vec<Value>> {
    match value {
        Value::Object(map) if map.contains_key(SWEEP) => {
            let each = sweep_values(map, value, pointer)?.iter().enumerate();
            let each = each.map(|(idx, value)| products(value, &format!("{pointer}/{SWEEP}/{idx}")));
            Ok(each.collect::<Result<Vec<_>>>()?.concat())
        }
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

fn product<T: Clone, V: Clone>(prefixes: &[T], values: &[V], add: impl Fn(&mut T, V)) -> Vec<T> {
    let extend = |prefix: &T, value: &V| {
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
    fn grid_gives_the_pipeline_of_each_point() {
        let grid = Grid::of(&json!({
            "routes": [{ "codec": { "id": "zstd", "level": { "sweep": [1, 3, 9] } } }],
            "chunking": { "mode": "chunked", "tokens": { "sweep": [64, 128] } }
        }));
        let grid = grid.unwrap();
        let mut lens = grid.lens();
        lens.sort_unstable();
        assert_eq!(lens, [2, 3]);
        let point: Vec<_> = grid.lens().iter().map(|len| len - 1).collect();
        let spec = grid.at(&point).unwrap().to_value();
        let named = json!({
            "name": "front",
            "routes": [{ "key": { "codec": { "id": "zstd", "level": { "sweep": [1, 3] } } }, "codec": { "id": { "sweep": ["lz4", "gear"] } } }]
        });
        let found: Vec<_> = expand(&named).unwrap().into_iter().filter_map(|spec| spec.name).collect();
        let expected = [
            "front (id lz4, key level 1)",
            "front (id lz4, key level 3)",
            "front (id gear, key level 1)",
            "front (id gear, key level 3)",
        ];
        assert_eq!(found, expected);
        assert_eq!((&spec["chunking"]["tokens"], &spec["routes"][0]["codec"]["level"]), (&json!(128), &json!(9)));
        let nested = Grid::of(&json!({ "routes": { "sweep": [1, [{ "sweep": [2] }]] } })).unwrap_err();
        assert_eq!(nested.to_string(), "`/routes/sweep/1/0`: a search takes no `sweep` within a `sweep`");
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
