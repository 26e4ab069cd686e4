//! The reference's runtime config: where the model is, and what is evicted and compressed while decoding.

use std::ops::Range;
use std::path::{Path, PathBuf};

use gearbox_core::{
    Chunking, CodecSpec, Error, LayerRange, PipelineSpec, PluginSpec, Result, ResultExt, RouteSpec, config,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::exp::h2o::{Codec, FILES, Kit, Mode, Scope, TargetMode};

/// The keys of the reference's cache, with its defaults and ranges.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_excessive_bools, clippy::struct_field_names, reason = "keys of the reference's config")]
struct Keys {
    /// Whether tokens are evicted.
    kv_h2o_enable: bool,
    /// First layer that evicts.
    kv_h2o_layer_start: u32,
    /// Last layer that evicts; negative is the last of the model.
    kv_h2o_layer_end: i32,
    /// Tokens of a block.
    #[schemars(range(min = 1, max = 65536))]
    kv_h2o_block_tokens: u32,
    /// First tokens that stay.
    kv_h2o_sink_tokens: u32,
    /// Last tokens that stay.
    kv_h2o_recent_tokens: u32,
    /// Kept fraction of mode `static`.
    #[schemars(range(min = 0, max = 1))]
    kv_h2o_target_keep_ratio: f64,
    /// What decides how much is kept.
    kv_h2o_target_mode: TargetMode,
    /// Ratio of mode `adaptive`.
    #[schemars(range(min = 1, max = 1e6))]
    kv_h2o_target_lossy_ratio: f64,
    /// Weight of the past in the scores.
    #[schemars(range(min = 0, max = 1))]
    kv_h2o_ema_alpha: f64,
    /// Calls of attention between two evictions.
    #[schemars(range(min = 1))]
    kv_h2o_update_interval: u32,
    /// Tokens below which nothing is evicted.
    #[schemars(range(min = 1))]
    kv_h2o_trigger_min_tokens: u32,
    /// Print every decision.
    kv_h2o_log_stats: bool,
    /// Whether chunks are compressed.
    kv_lossless_enable: bool,
    /// Which layers are compressed.
    kv_lossless_scope: Scope,
    /// Number of front layers.
    kv_lossless_front_n: u32,
    /// How chunks are compressed.
    kv_lossless_codec: Codec,
    /// Whether they are compressed while decoding.
    kv_lossless_runtime_enable: bool,
    /// The reference's ways to use what it compressed; here chunks always are the storage.
    kv_lossless_runtime_mode: Mode,
    /// Tokens of a chunk.
    #[schemars(range(min = 1))]
    kv_lossless_block_tokens: u32,
    /// Last tokens that stay raw.
    kv_lossless_hot_recent_tokens: u32,
    /// Without effect: sinks are compressed like other tokens.
    kv_lossless_hot_sink_tokens: u32,
    /// Without effect: every chunk is compressed, none is sampled.
    kv_lossless_kept_sample_layers: u32,
    /// Without effect, as the key before.
    kv_lossless_kept_sample_token_interval: u32,
    /// Without effect, as the key before.
    kv_lossless_front_sample_token_interval: u32,
    /// Without effect: front layers are stored like others.
    kv_lossless_store_disable_front: bool,
    /// Without effect: all chunks have the same length.
    kv_lossless_store_bootstrap_tokens: u32,
    /// Without effect, as the key before.
    kv_lossless_store_grouped_step_tokens: u32,
    /// Without effect, as in the reference.
    kv_lossless_codec_runtime: String,
    /// Without effect: `gear-delta` takes the smallest form by itself.
    kv_lossless_predictors_k: String,
    /// Without effect, as the key before.
    kv_lossless_predictors_v: String,
    /// Without effect: chunks are encoded at once, by the threads of the engine.
    kv_lossless_async_threads: u32,
    /// Without effect: nothing waits.
    #[schemars(range(min = 1))]
    kv_lossless_max_queue: u32,
    /// Without effect: every read decodes.
    kv_lossless_decode_cache_blocks: u32,
    /// Run one request more with raw chunks, whose logits must be the same to the bit.
    kv_lossless_strict_roundtrip_check: bool,
}

impl Default for Keys {
    /// The defaults of the reference's engine, which are not those of its scripts.
    fn default() -> Self {
        Self {
            kv_h2o_enable: false,
            kv_h2o_layer_start: 2,
            kv_h2o_layer_end: -1,
            kv_h2o_block_tokens: 64,
            kv_h2o_sink_tokens: 32,
            kv_h2o_recent_tokens: 256,
            kv_h2o_target_keep_ratio: 0.5,
            kv_h2o_target_mode: TargetMode::Adaptive,
            kv_h2o_target_lossy_ratio: 3.0,
            kv_h2o_ema_alpha: 0.9,
            kv_h2o_update_interval: 16,
            kv_h2o_trigger_min_tokens: 512,
            kv_h2o_log_stats: false,
            kv_lossless_enable: false,
            kv_lossless_scope: Scope::FrontN,
            kv_lossless_front_n: 2,
            kv_lossless_codec: Codec::None,
            kv_lossless_runtime_enable: false,
            kv_lossless_runtime_mode: Mode::Probe,
            kv_lossless_block_tokens: 128,
            kv_lossless_hot_recent_tokens: 256,
            kv_lossless_hot_sink_tokens: 16,
            kv_lossless_kept_sample_layers: 1,
            kv_lossless_kept_sample_token_interval: 1,
            kv_lossless_front_sample_token_interval: 1,
            kv_lossless_store_disable_front: false,
            kv_lossless_store_bootstrap_tokens: 32,
            kv_lossless_store_grouped_step_tokens: 256,
            kv_lossless_codec_runtime: "fp16_gear_predictive_v3".to_owned(),
            kv_lossless_predictors_k: "raw,delta_seq,xor_seq,pair_delta".to_owned(),
            kv_lossless_predictors_v: "raw,delta_seq,xor_seq".to_owned(),
            kv_lossless_async_threads: 1,
            kv_lossless_max_queue: 256,
            kv_lossless_decode_cache_blocks: 64,
            kv_lossless_strict_roundtrip_check: false,
        }
    }
}

/// What the keys of the cache begin with.
const CACHE_KEY: &str = "kv_";
/// The key with the folder of the model.
const BASE_DIR: &str = "base_dir";
/// Another spelling of a scope that the reference takes.
const JOINT: &str = "front_n+h2o_kept";

/// Other keys of the reference's engine: they choose what flags choose here, or what a model folder says by itself.
const ENGINE_KEYS: [&str; 15] = [
    "backend_type",
    "chunk",
    "is_single",
    "max_new_tokens",
    "memory",
    "penalty",
    "power",
    "precision",
    "sampler_type",
    "temperature",
    "thread_num",
    "tmp_path",
    "top_k",
    "top_p",
    "use_mmap",
];

/// Keys that came with a revision of the reference's kit.
const SINCE: [(Kit, &[&str]); 3] = [
    (
        Kit::V3,
        &[
            "kv_lossless_runtime_enable",
            "kv_lossless_block_tokens",
            "kv_lossless_hot_recent_tokens",
            "kv_lossless_hot_sink_tokens",
            "kv_lossless_codec_runtime",
            "kv_lossless_predictors_k",
            "kv_lossless_predictors_v",
            "kv_lossless_async_threads",
            "kv_lossless_max_queue",
            "kv_lossless_decode_cache_blocks",
            "kv_lossless_strict_roundtrip_check",
        ],
    ),
    (
        Kit::V4,
        &["kv_lossless_runtime_mode", "kv_lossless_kept_sample_layers", "kv_lossless_kept_sample_token_interval"],
    ),
    // The keys of the fifth, and the columns of the sixth, which has no key of its own.
    (
        Kit::V6,
        &[
            "kv_lossless_front_sample_token_interval",
            "kv_lossless_store_disable_front",
            "kv_lossless_store_bootstrap_tokens",
            "kv_lossless_store_grouped_step_tokens",
        ],
    ),
];

/// How exactly the engine computes, which here is the element type of its cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// A cache in F32.
    Normal,
    /// A cache in F32.
    High,
    /// A cache in F16.
    #[default]
    Low,
}

/// A runtime config of the reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Runtime {
    keys: Keys,
    kit: Kit,
    folder: Option<PathBuf>,
    precision: Precision,
}

impl Runtime {
    /// Reads a config, or the `config.json` of a folder.
    ///
    /// `lenient` does what the reference does with unknown keys (nothing), with numbers out of range (takes the nearest legal one) and with
    /// misspelt modes (takes the default), and warns. `kit` is the revision whose rules hold, else the newest that has keys in the config.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) for unknown keys and illegal values, with file and JSON pointer;
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if it is no JSON object or names a folder that does not exist;
    /// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) if it names a model of another engine.
    pub fn read(path: &Path, kit: Option<Kit>, lenient: bool) -> Result<Self> {
        let path = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
        Self::read_file(&path, kit, lenient).context(|| format!("`{}`", path.display()))
    }

    fn read_file(path: &Path, kit: Option<Kit>, lenient: bool) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Error::io("config", &error))?;
        let map: Map<String, Value> = serde_json::from_slice(&bytes)
            .map_err(|error| Error::invalid_input(format!("expected a JSON object: {error}")))?;
        let folder = folder(path, &map)?;
        let newest = SINCE.iter().rev().find(|(_, keys)| keys.iter().any(|key| map.contains_key(*key)));
        let kit = kit.unwrap_or(newest.map_or(Kit::V2, |(kit, _)| *kit));
        let precision = map.get("precision").map(Precision::deserialize).transpose();
        let precision = precision.map_err(|error| Error::invalid_config(format!("`/precision`: {error}")))?;
        let (mut cache, others): (Map<_, _>, Map<_, _>) =
            map.into_iter().partition(|(key, _)| key.starts_with(CACHE_KEY));
        check_others(&others, folder.as_deref(), lenient)?;
        if cache.get("kv_lossless_scope").is_some_and(|scope| scope == JOINT) {
            cache.insert("kv_lossless_scope".to_owned(), json!(Scope::FrontNAndH2oKept));
        }
        if lenient {
            soften(&mut cache);
        }
        let keys = config::from_value(&Value::Object(cache))?;
        Ok(Self { keys, kit, folder, precision: precision.unwrap_or_default() })
    }

    /// The folder of the model; none if the config names none, so that the bundled one is meant.
    pub fn model_folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The revision whose rules hold.
    pub fn kit(&self) -> Kit {
        self.kit
    }

    /// How exactly the engine computes.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether tokens are evicted.
    pub fn evicts(&self) -> bool {
        self.keys.kv_h2o_enable
    }

    /// Whether every decision is printed.
    pub fn logs_stats(&self) -> bool {
        self.keys.kv_h2o_log_stats
    }

    /// Whether one request more shows that chunks come back to the bit.
    pub fn checks_roundtrip(&self) -> bool {
        self.keys.kv_lossless_strict_roundtrip_check
    }

    /// Newest tokens that stay raw.
    pub(super) fn residual(&self) -> usize {
        self.keys.kv_lossless_hot_recent_tokens as usize
    }

    /// Every key of the cache with its value.
    pub fn keys(&self) -> Value {
        json!(self.keys)
    }

    /// Whether chunks of any layer can be compressed.
    fn compresses(&self) -> bool {
        // Revision 2 has no key for the third condition.
        let runs = self.keys.kv_lossless_runtime_enable || self.kit == Kit::V2;
        self.keys.kv_lossless_enable && self.keys.kv_lossless_codec == Codec::GearDelta && runs
    }

    /// Layers of a model that evict, or would if eviction were on.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) for layers that the model does not have, unless `lenient`.
    fn range(&self, layers: u32, lenient: bool) -> Result<Range<u32>> {
        let Keys { kv_h2o_layer_start: start, kv_h2o_layer_end: end, kv_lossless_scope: scope, .. } = self.keys;
        let takes_kept = matches!(scope, Scope::H2oKept | Scope::FrontNAndH2oKept);
        if !(self.evicts() || self.compresses() && takes_kept) {
            return Ok(0..0);
        }
        let last = layers.saturating_sub(1);
        let end = u32::try_from(end).unwrap_or(last);
        for (key, layer) in [("kv_h2o_layer_start", start), ("kv_h2o_layer_end", end)] {
            if layer > last {
                let message = format!("`/{key}`: expected at most {last}, the last layer of the model, got {layer}");
                if !lenient {
                    return Err(Error::invalid_config(message));
                }
                tracing::warn!("{message}: taken as {last}");
            }
        }
        let (start, end) = (start.min(last), end.min(last));
        if start > end && !lenient {
            let message = "`/kv_h2o_layer_start`, `/kv_h2o_layer_end`: expected a first layer and a last one behind it";
            return Err(Error::invalid_config(format!("{message}, got {start} and {end}")));
        }
        Ok(start..end + 1)
    }

    /// Whether a layer is compressed; `range` are those that evict, or would.
    fn is_compressed(&self, range: &Range<u32>, layer: u32) -> bool {
        let is_front = layer < self.keys.kv_lossless_front_n;
        // Without eviction all tokens of these layers are kept.
        let is_kept = range.contains(&layer);
        self.compresses()
            && match self.keys.kv_lossless_scope {
                Scope::None => false,
                Scope::FrontN => is_front,
                Scope::H2oKept => is_kept,
                Scope::FrontNAndH2oKept => is_front || is_kept,
            }
    }

    /// The policy of layers that evict.
    fn policy(&self, range: &Range<u32>) -> PluginSpec {
        let keys = &self.keys;
        let mut settings = json!({
            "mode": "reference",
            "layers": LayerRange { start: range.start, end: Some(range.end) },
            "block_tokens": keys.kv_h2o_block_tokens,
            "sinks": keys.kv_h2o_sink_tokens,
            "recent_tokens": keys.kv_h2o_recent_tokens,
            "min_tokens": keys.kv_h2o_trigger_min_tokens,
            "ema": keys.kv_h2o_ema_alpha,
            "update_interval": keys.kv_h2o_update_interval,
        });
        match keys.kv_h2o_target_mode {
            TargetMode::Adaptive => settings["target_ratio"] = json!(keys.kv_h2o_target_lossy_ratio),
            TargetMode::Static => settings["kept_fraction"] = json!(keys.kv_h2o_target_keep_ratio),
        }
        let Value::Object(settings) = settings else { unreachable!("it was made as an object") };
        PluginSpec { id: "h2o".to_owned(), settings }
    }

    /// The pipeline for a model of so many layers, and the layers that it compresses; `codec` compresses them.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) for layers that the model does not have, unless `lenient`.
    pub(super) fn pipeline(&self, layers: u32, codec: &str, lenient: bool) -> Result<(PipelineSpec, Vec<u32>)> {
        let range = self.range(layers, lenient)?;
        let kind = |layer: u32| (self.evicts() && range.contains(&layer), self.is_compressed(&range, layer));
        let all: Vec<u32> = (0..layers).collect();
        let routes = all.chunk_by(|a, b| kind(*a) == kind(*b)).map(|run| {
            let (evicts, compresses) = kind(run[0]);
            RouteSpec {
                layers: LayerRange { start: run[0], end: Some(run[0] + run.len() as u32) },
                evict: evicts.then(|| self.policy(&range)),
                codec: Some(CodecSpec::All(PluginSpec::new(if compresses { codec } else { "store" }))),
                ..RouteSpec::default()
            }
        });
        let chunking = Chunking::ChunkedGrouped { tokens: self.keys.kv_lossless_block_tokens as usize };
        let spec = PipelineSpec { name: None, routes: routes.collect(), chunking };
        let compressed = all.iter().copied().filter(|layer| kind(*layer).1).collect();
        Ok((spec, compressed))
    }
}

/// The folder of the model, if there is one.
fn folder(path: &Path, map: &Map<String, Value>) -> Result<Option<PathBuf>> {
    let here = path.parent().unwrap_or(Path::new(""));
    let folder = match map.get(BASE_DIR) {
        None => here.to_path_buf(),
        Some(Value::String(folder)) => here.join(folder),
        Some(other) => return Err(Error::invalid_config(format!("`/{BASE_DIR}`: expected a string, got {other}"))),
    };
    if !folder.as_os_str().is_empty() && !folder.is_dir() {
        return Err(Error::invalid_input(format!("`/{BASE_DIR}`: expected a folder, got `{}`", folder.display())));
    }
    if is_model(&folder) {
        return Ok(Some(folder));
    }
    // A file of the reference's engine is a wish that cannot be granted; without one there is no wish.
    let (_, weights) = FILES[1];
    let weights = folder.join(map.get(FILES[1].0).and_then(Value::as_str).unwrap_or(weights));
    if weights.is_file() {
        return Err(Error::unsupported(format!(
            "`{}`: expected a folder with config.json, tokenizer.json and safetensors, got a model of the reference's engine",
            weights.display()
        )));
    }
    Ok(None)
}

/// Whether a folder says that it holds a model in Hugging Face layout; what is missing there is an error of loading it.
fn is_model(folder: &Path) -> bool {
    let is_there = ["tokenizer.json", "model.safetensors", "model.safetensors.index.json"];
    is_there.iter().any(|name| folder.join(name).is_file())
        || model_keys(folder).is_some_and(|keys| keys.contains_key("model_type"))
}

/// The `config.json` of a model folder.
fn model_keys(folder: &Path) -> Option<Map<String, Value>> {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).ok()?).ok()
}

/// Checks the keys that are not of the cache: nobody knows what an unknown one was to change.
fn check_others(others: &Map<String, Value>, folder: Option<&Path>, lenient: bool) -> Result<()> {
    let model = folder.and_then(model_keys).unwrap_or_default();
    let is_known = |key: &str| {
        key == BASE_DIR
            || FILES.iter().any(|(file, _)| *file == key)
            || ENGINE_KEYS.contains(&key)
            || model.contains_key(key)
    };
    let unknown: Vec<_> = others.keys().filter(|key| !is_known(key)).map(|key| format!("`/{key}`")).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let message = format!("{}: expected a key of the reference's config or of the model's", unknown.join(", "));
    if lenient {
        tracing::warn!("{message}: left out");
        return Ok(());
    }
    Err(Error::invalid_config(format!("{message}; --lenient leaves unknown keys out")))
}

/// Does what the reference does with illegal values: numbers move into their range, the rest takes its default.
fn soften(cache: &mut Map<String, Value>) {
    let schema = config::schema_of::<Keys>();
    cache.retain(|key, value| {
        let check = |value: &Value| config::check(&schema, &json!({ key: value }));
        let Err(error) = check(value) else { return true };
        let bounds = &schema["properties"][key.as_str()];
        let number = value.as_f64().zip(bounds["minimum"].as_f64());
        if let Some((number, least)) = number {
            let nearest = number.clamp(least, bounds["maximum"].as_f64().unwrap_or(f64::from(u32::MAX)));
            let nearest = if bounds["type"] == "integer" { json!(nearest as i64) } else { json!(nearest) };
            if check(&nearest).is_ok() {
                tracing::warn!("{error}: taken as {nearest}");
                *value = nearest;
                return true;
            }
        }
        tracing::warn!("{error}: left out");
        false
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads keys from a file in a folder of its own.
    fn read(keys: &Value, lenient: bool) -> Result<Runtime> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runtime.json");
        std::fs::write(&path, keys.to_string()).unwrap();
        Runtime::read(&path, None, lenient)
    }

    fn says(keys: &Value) -> String {
        read(keys, false).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_config_is_the_dense_cache_of_the_bundled_model() {
        let runtime = read(&json!({}), false).unwrap();
        assert_eq!((runtime.kit(), runtime.model_folder(), runtime.precision()), (Kit::V2, None, Precision::Low));
        let (spec, compressed) = runtime.pipeline(6, "gear-delta", false).unwrap();
        assert!(compressed.is_empty() && spec.routes.len() == 1 && spec.routes[0].evict.is_none());
    }

    #[test]
    fn keys_become_routes() {
        let keys = json!({
            "kv_h2o_enable": true, "kv_h2o_block_tokens": 32, "kv_h2o_sink_tokens": 16, "kv_h2o_recent_tokens": 96,
            "kv_h2o_target_lossy_ratio": 3.5, "kv_h2o_trigger_min_tokens": 384, "kv_h2o_layer_end": 4,
            "kv_lossless_enable": true, "kv_lossless_codec": "gear_delta", "kv_lossless_runtime_enable": true,
            "kv_lossless_block_tokens": 64,
        });
        let runtime = read(&keys, false).unwrap();
        assert_eq!(runtime.kit(), Kit::V3);
        let (spec, compressed) = runtime.pipeline(6, "gear-delta", false).unwrap();
        assert_eq!(compressed, [0, 1]);
        let policy = json!({
            "id": "h2o", "mode": "reference", "layers": "2..5", "block_tokens": 32, "sinks": 16, "recent_tokens": 96,
            "min_tokens": 384, "ema": 0.9, "update_interval": 16, "target_ratio": 3.5,
        });
        let expected = json!({
            "routes": [
                { "layers": "0..2", "codec": { "id": "gear-delta" } },
                { "layers": "2..5", "evict": policy, "codec": { "id": "store" } },
                { "layers": "5..6", "codec": { "id": "store" } },
            ],
            "chunking": { "mode": "chunked-grouped", "tokens": 64 },
        });
        assert_eq!(spec.to_value(), expected);

        let mut joint = keys;
        joint["kv_lossless_scope"] = json!("front_n+h2o_kept");
        joint["kv_h2o_target_mode"] = json!("static");
        let (spec, compressed) = read(&joint, false).unwrap().pipeline(6, "gear-delta", false).unwrap();
        assert_eq!(compressed, [0, 1, 2, 3, 4]);
        assert_eq!(spec.routes[1].evict.as_ref().unwrap().settings["kept_fraction"], 0.5);
        joint["kv_lossless_scope"] = json!("h2o_kept");
        assert_eq!(read(&joint, false).unwrap().pipeline(6, "gear-delta", false).unwrap().1, [2, 3, 4]);
        joint["kv_h2o_enable"] = json!(false);
        let (spec, compressed) = read(&joint, false).unwrap().pipeline(6, "gear-delta", false).unwrap();
        assert_eq!(compressed, [2, 3, 4], "all tokens of these layers are kept");
        assert!(spec.routes.iter().all(|route| route.evict.is_none()));
    }

    #[test]
    fn compression_takes_all_of_its_conditions() {
        let keys = json!({ "kv_lossless_enable": true, "kv_lossless_codec": "gear_delta" });
        let compressed = |keys: &Value| read(keys, false).unwrap().pipeline(6, "gear-delta", false).unwrap().1;
        assert_eq!(compressed(&keys), [0, 1], "revision 2 has no third condition");
        for (key, value) in [
            ("kv_lossless_runtime_enable", json!(false)),
            ("kv_lossless_codec", json!("none")),
            ("kv_lossless_enable", json!(false)),
            ("kv_lossless_scope", json!("none")),
        ] {
            let mut keys = keys.clone();
            keys[key] = value;
            assert!(compressed(&keys).is_empty(), "{key}");
        }
    }

    #[test]
    fn what_is_unknown_or_illegal_is_named() {
        let unknown = says(&json!({ "kv_h2o_sink_token": 4 }));
        assert!(unknown.contains("runtime.json`: ") && unknown.contains("kv_h2o_sink_token"), "{unknown}");
        let other = says(&json!({ "thread_num": 4, "llm_model": "x", "theta": 1 }));
        assert!(other.contains("`/theta`: expected a key") && other.contains("--lenient"), "{other}");
        let range = says(&json!({ "kv_h2o_ema_alpha": 1.5 }));
        assert!(range.contains("`/kv_h2o_ema_alpha`") && range.contains("1.5"), "{range}");
        let mode = says(&json!({ "kv_h2o_target_mode": "adaptve" }));
        assert!(mode.contains("`/kv_h2o_target_mode`") && mode.contains("adaptive"), "{mode}");
        assert!(says(&json!({ "base_dir": "nowhere" })).contains("expected a folder"));
        assert!(says(&json!({ "base_dir": 1 })).contains("expected a string, got 1"));
        assert!(says(&json!([1])).contains("expected a JSON object"));
        assert!(says(&json!({ "precision": "medium" })).contains("`/precision`"));
        let layers = read(&json!({ "kv_h2o_enable": true, "kv_h2o_layer_start": 6 }), false).unwrap();
        let error = layers.pipeline(6, "gear-delta", false).unwrap_err().to_string();
        assert_eq!(error, "`/kv_h2o_layer_start`: expected at most 5, the last layer of the model, got 6");
        let layers = read(&json!({ "kv_h2o_enable": true, "kv_h2o_layer_end": 1 }), false).unwrap();
        assert!(layers.pipeline(6, "gear-delta", false).is_err());
        assert_eq!(layers.range(6, true).unwrap(), 2..2, "as in the reference, no layer is in that range");
    }

    #[test]
    fn lenient_takes_what_the_reference_takes() {
        let keys = json!({
            "theta": 1, "kv_h2o_sink_token": 4, "kv_h2o_ema_alpha": 1.5, "kv_h2o_block_tokens": 0,
            "kv_h2o_layer_start": -3, "kv_h2o_target_mode": "adaptve", "kv_h2o_recent_tokens": 7,
        });
        let runtime = read(&keys, true).unwrap();
        let expected = Keys {
            kv_h2o_ema_alpha: 1.0,
            kv_h2o_block_tokens: 1,
            kv_h2o_layer_start: 0,
            kv_h2o_recent_tokens: 7,
            ..Keys::default()
        };
        assert_eq!(runtime.keys, expected);
    }

    #[test]
    fn the_model_is_that_of_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path("model")).unwrap();
        std::fs::write(path("model/config.json"), "{\"model_type\": \"llama\", \"theta\": 1}").unwrap();
        std::fs::write(path("runtime.json"), "{\"base_dir\": \"model\", \"theta\": 1}").unwrap();
        let read = |name: &str| Runtime::read(&path(name), None, false);
        assert_eq!(read("runtime.json").unwrap().model_folder(), Some(path("model").as_path()));
        assert_eq!(read("model").unwrap().model_folder(), Some(path("model").as_path()));
        std::fs::write(path("llm.mnn"), "").unwrap();
        std::fs::write(path("other.json"), "{}").unwrap();
        let error = read("other.json").unwrap_err().to_string();
        assert!(error.contains("llm.mnn`: expected a folder with config.json"), "{error}");
    }
}
