//! `config.json`: the geometry of a decoder, read strictly.

use std::path::Path;

use gearbox_core::{Error, Result, Rope, RopePairing, RopeScaling};
use serde_json::{Map, Value};

/// The geometry of a decoder and the constants of its forward pass.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is one independent property of the model")]
pub struct Config {
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Channels between layers.
    pub hidden_size: usize,
    /// Channels inside the feed-forward part.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub q_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels per head; even.
    pub head_dim: usize,
    /// Tokens of the longest context.
    pub context: usize,
    /// Added to the mean square in `RMSNorm`.
    pub rms_norm_eps: f64,
    /// How keys and queries are rotated.
    pub rope: Rope,
    /// Per layer, how many tokens a query sees, itself included; `None` for all.
    pub windows: Vec<Option<usize>>,
    /// Whether the projections to queries, keys and values add a bias.
    pub qkv_bias: bool,
    /// Whether the projection behind attention adds a bias.
    pub output_bias: bool,
    /// Whether the feed-forward projections add a bias.
    pub mlp_bias: bool,
    /// Whether the head is the embedding.
    pub tied_head: bool,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// Keys that do not change what the model computes.
const IGNORED: [&str; 22] = [
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "dtype",
    "embd_pdrop",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "max_length",
    "max_window_layers",
    "pad_token_id",
    "resid_pdrop",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_version",
    "use_cache",
];

/// Reads keys of one JSON object, and remembers which.
struct Reader<'a> {
    file: String,
    map: &'a Map<String, Value>,
    seen: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    fn wrong(&self, key: &str, expected: impl std::fmt::Display, got: &Value) -> Error {
        Error::unsupported(format!("{}, `{key}`: expected {expected}, got {got}", self.file))
    }

    /// A key that is there and not null.
    fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.seen.push(key);
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn optional<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.get(key).map(|value| read(value).ok_or_else(|| self.wrong(key, expected, value))).transpose()
    }

    fn required<T>(&mut self, key: &'static str, expected: &str, read: impl FnOnce(&Value) -> Option<T>) -> Result<T> {
        self.optional(key, expected, read)?.ok_or_else(|| self.wrong(key, expected, &Value::Null))
    }

    fn size(&mut self, key: &'static str) -> Result<usize> {
        self.required(key, "a positive integer", positive)
    }

    fn flag(&mut self, key: &'static str) -> Result<bool> {
        Ok(self.optional(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    fn number(&mut self, key: &'static str) -> Result<f64> {
        self.required(key, "a positive number", positive_number)
    }

    /// Refuses keys that nobody asked for: they may change what the model computes.
    fn finish(self) -> Result<()> {
        let known = |key: &str| key.starts_with('_') || IGNORED.contains(&key) || self.seen.contains(&key);
        let harmless = |value: &Value| value.is_null() || *value == Value::Bool(false);
        match self.map.iter().find(|(key, value)| !known(key) && !harmless(value)) {
            Some((key, value)) => {
                Err(self.wrong(key, "no such key, because it may change what the model computes", value))
            }
            None => Ok(()),
        }
    }
}

fn positive(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok().filter(|value| *value > 0)
}

fn positive_number(value: &Value) -> Option<f64> {
    value.as_f64().filter(|value| *value > 0.0 && value.is_finite())
}

fn token(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

impl Config {
    /// Reads the `config.json` of Llama 2 and 3, Mistral, Qwen 2 and 2.5, `SmolLM`, and what else is built like them.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported), naming file, key, expected and got, for another architecture and
    /// for every key that may change what the model computes; [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if the
    /// file is not a JSON object; [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|error| Error::invalid_input(format!("`{}`: not valid JSON: {error}", path.display())))?;
        Self::from_value(&value, &format!("`{}`", path.display()))
    }

    fn from_value(value: &Value, file: &str) -> Result<Self> {
        let map = value.as_object().ok_or_else(|| Error::invalid_input(format!("{file}: expected a JSON object")))?;
        let mut keys = Reader { file: file.to_owned(), map, seen: Vec::new() };
        let families = ["llama", "mistral", "qwen2"];
        let family = keys.required("model_type", "`llama`, `mistral` or `qwen2`", |value| {
            families.into_iter().find(|family| value.as_str() == Some(family))
        })?;
        let qwen = family == "qwen2";
        for (key, expected) in [("hidden_act", Value::from("silu")), ("pretraining_tp", Value::from(1))] {
            if let Some(got) = keys.get(key).filter(|got| **got != expected) {
                return Err(keys.wrong(key, expected, got));
            }
        }
        if let Some(got) = keys.get("partial_rotary_factor").filter(|got| got.as_f64() != Some(1.0)) {
            return Err(keys.wrong("partial_rotary_factor", 1.0, got));
        }
        let (hidden_size, q_heads) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
        let kv_heads = keys.optional("num_key_value_heads", "a positive integer", positive)?.unwrap_or(q_heads);
        if q_heads % kv_heads != 0 {
            let expected = format!("a divisor of the {q_heads} query heads");
            return Err(keys.wrong("num_key_value_heads", expected, &kv_heads.into()));
        }
        let derived = hidden_size.is_multiple_of(q_heads).then_some(hidden_size / q_heads);
        let head_dim = keys.optional("head_dim", "a positive integer", positive)?.or(derived);
        let head_dim = head_dim.filter(|dim| dim.is_multiple_of(2)).ok_or_else(|| {
            let got =
                head_dim.map_or_else(|| format!("{hidden_size} channels for {q_heads} heads"), |dim| dim.to_string());
            keys.wrong("head_dim", "an even number of channels per head", &got.into())
        })?;
        let layers = keys.size("num_hidden_layers")?;
        let attention_bias = keys.flag("attention_bias")?;
        let config = Self {
            vocab_size: keys.size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            layers,
            q_heads,
            kv_heads,
            head_dim,
            context: keys.size("max_position_embeddings")?,
            rms_norm_eps: keys.number("rms_norm_eps")?,
            rope: rope(&mut keys, head_dim)?,
            windows: windows(&mut keys, layers, qwen)?,
            qkv_bias: qwen || attention_bias,
            output_bias: attention_bias && !qwen,
            mlp_bias: keys.flag("mlp_bias")?,
            tied_head: keys.flag("tie_word_embeddings")?,
            eos: keys
                .optional("eos_token_id", "a token id or a list of them", |value| match value {
                    Value::Array(list) => list.iter().map(token).collect(),
                    one => token(one).map(|id| vec![id]),
                })?
                .unwrap_or_default(),
        };
        keys.finish()?;
        Ok(config)
    }
}

/// Frequencies: `rope_theta` and `rope_scaling`, or `rope_parameters` in newer files.
fn rope(keys: &mut Reader<'_>, head_dim: usize) -> Result<Rope> {
    let theta = keys.optional("rope_theta", "a positive number", positive_number)?;
    let nested = [("rope_scaling", keys.get("rope_scaling")), ("rope_parameters", keys.get("rope_parameters"))];
    let mut rope = Rope {
        pairing: RopePairing::HalfSplit,
        theta: theta.unwrap_or(10_000.0),
        rotary_dim: head_dim,
        scaling: RopeScaling::None,
    };
    if let [(_, Some(_)), (key, Some(got))] = nested {
        return Err(keys.wrong(key, "not both `rope_scaling` and `rope_parameters`", got));
    }
    let Some((name, value)) = nested.into_iter().find_map(|(name, value)| Some((name, value?))) else {
        return Ok(rope);
    };
    let map = value.as_object().ok_or_else(|| keys.wrong(name, "an object", value))?;
    let mut inner = Reader { file: format!("{}, `{name}`", keys.file), map, seen: vec!["type"] };
    let kinds = ["default", "linear", "llama3"];
    let kind = inner.get("rope_type").or_else(|| inner.get("type"));
    let kind = kind.ok_or_else(|| inner.wrong("rope_type", "`default`, `linear` or `llama3`", &Value::Null))?;
    let kind = kinds.into_iter().find(|known| kind.as_str() == Some(known)).ok_or_else(|| {
        inner.wrong(
            "rope_type",
            "`default`, `linear` or `llama3` (`dynamic`, `yarn` and `longrope` are not supported)",
            kind,
        )
    })?;
    if let Some(theta) = inner.optional("rope_theta", "a positive number", positive_number)? {
        rope.theta = theta;
    }
    if let Some(got) = inner.get("partial_rotary_factor").filter(|got| got.as_f64() != Some(1.0)) {
        return Err(inner.wrong("partial_rotary_factor", 1.0, got));
    }
    rope.scaling = match kind {
        "linear" => RopeScaling::Linear { factor: inner.number("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: inner.number("factor")?,
            low_freq_factor: inner.number("low_freq_factor")?,
            high_freq_factor: inner.number("high_freq_factor")?,
            original_context: inner.required("original_max_position_embeddings", "a positive integer", |value| {
                token(value).filter(|context| *context > 0)
            })?,
        },
        _ => RopeScaling::None,
    };
    inner.finish()?;
    Ok(rope)
}

/// Which layers see a window only. Qwen 2 switches it by `use_sliding_window`, from layer `max_window_layers` on.
fn windows(keys: &mut Reader<'_>, layers: usize, qwen: bool) -> Result<Vec<Option<usize>>> {
    let window = keys.optional("sliding_window", "a positive integer", positive)?;
    let window = if qwen && !keys.flag("use_sliding_window")? { None } else { window };
    if let Some(types) = keys.get("layer_types") {
        let list = types.as_array().filter(|list| list.len() == layers);
        let list = list.ok_or_else(|| keys.wrong("layer_types", format!("a list of {layers} types"), types))?;
        return list
            .iter()
            .map(|kind| match (kind.as_str(), window) {
                (Some("full_attention"), _) => Ok(None),
                (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
                _ => Err(keys.wrong("layer_types", "`full_attention`, or `sliding_attention` with a window", kind)),
            })
            .collect();
    }
    let first = if qwen && window.is_some() { keys.size("max_window_layers")? } else { 0 };
    Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect())
}

/// Rotations per token of each pair of channels, in radians.
///
/// Computed as the models were trained: powers in F64, rounded once to F32.
///
/// # Source
/// Su et al., *Enhanced transformer with rotary position embedding*, 2021; scaling as in the Llama 3.1 release.
pub(crate) fn frequencies(rope: &Rope) -> Vec<f32> {
    let half = rope.rotary_dim / 2;
    let plain = (0..half).map(|pair| rope.theta.powf(-(pair as f64) / half as f64));
    let scaled = plain.map(|frequency| match rope.scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let turns = f64::from(original_context) * frequency / std::f64::consts::TAU;
            let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            frequency * (kept + (1.0 - kept) / factor)
        }
    });
    scaled.map(|frequency| frequency as f32).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 32, "hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "torch_dtype": "bfloat16", "_name_or_path": "x", "use_cache": true, "eos_token_id": [2, 3]
        })
    }

    fn with(change: &Value) -> Result<Config> {
        let mut value = base();
        for (key, changed) in change.as_object().unwrap() {
            value[key] = changed.clone();
        }
        Config::from_value(&value, "`config.json`")
    }

    fn message(change: &Value) -> String {
        with(change).unwrap_err().to_string()
    }

    #[test]
    fn derives_what_is_absent() {
        let config = with(&json!({})).unwrap();
        assert_eq!((config.head_dim, config.kv_heads, config.rope.theta), (6, 4, 10_000.0));
        assert_eq!((config.qkv_bias, config.output_bias, config.tied_head), (false, false, false));
        assert_eq!((config.eos, config.windows), (vec![2, 3], vec![None; 3]));
    }

    #[test]
    fn families_differ_in_bias_and_windows() {
        let qwen =
            json!({ "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 2, "use_sliding_window": false });
        let config = with(&qwen).unwrap();
        assert_eq!((config.qkv_bias, config.output_bias, config.windows), (true, false, vec![None; 3]));
        let qwen =
            json!({ "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 2, "use_sliding_window": true });
        assert_eq!(with(&qwen).unwrap().windows, [None, None, Some(8)]);
        let mistral = json!({ "model_type": "mistral", "sliding_window": 16 });
        assert_eq!(with(&mistral).unwrap().windows, [Some(16); 3]);
        assert_eq!(with(&json!({ "model_type": "mistral", "sliding_window": null })).unwrap().windows, [None; 3]);
        let types = json!(["full_attention", "sliding_attention", "full_attention"]);
        let mixed = json!({ "model_type": "mistral", "sliding_window": 16, "layer_types": types });
        assert_eq!(with(&mixed).unwrap().windows, [None, Some(16), None]);
    }

    #[test]
    fn what_changes_the_result_is_refused_by_name() {
        assert_eq!(
            message(&json!({ "model_type": "gemma2" })),
            "`config.json`, `model_type`: expected `llama`, `mistral` or `qwen2`, got \"gemma2\""
        );
        assert_eq!(
            message(&json!({ "hidden_act": "gelu" })),
            "`config.json`, `hidden_act`: expected \"silu\", got \"gelu\""
        );
        assert_eq!(
            message(&json!({ "num_key_value_heads": 3 })),
            "`config.json`, `num_key_value_heads`: expected a divisor of the 4 query heads, got 3"
        );
        assert_eq!(
            message(&json!({ "vocab_size": 0 })),
            "`config.json`, `vocab_size`: expected a positive integer, got 0"
        );
        assert!(
            message(&json!({ "attn_logit_softcapping": 30.0 }))
                .contains("`attn_logit_softcapping`: expected no such key")
        );
        assert!(message(&json!({ "quantization_config": { "bits": 4 } })).contains("`quantization_config`"));
        let yarn = json!({ "rope_scaling": { "type": "yarn", "factor": 4.0 } });
        assert!(
            message(&yarn)
                .starts_with("`config.json`, `rope_scaling`, `rope_type`: expected `default`, `linear` or `llama3`")
        );
        let unknown = json!({ "rope_scaling": { "type": "linear", "factor": 4.0, "beta": 1 } });
        assert!(message(&unknown).contains("`rope_scaling`, `beta`"));
        assert!(message(&json!({ "head_dim": 5 })).contains("`head_dim`: expected an even number"));
        assert!(message(&json!({ "num_attention_heads": 5 })).contains("24 channels for 5 heads"));
    }

    #[test]
    fn rope_scaling_of_llama3_bends_low_frequencies_only() {
        let scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        });
        let config = with(&json!({ "head_dim": 128, "rope_theta": 500_000.0, "rope_scaling": scaling })).unwrap();
        let plain = frequencies(&Rope { scaling: RopeScaling::None, ..config.rope.clone() });
        let bent = frequencies(&config.rope);
        assert_eq!([plain[0], bent[0]].map(f32::to_bits), [1f32.to_bits(); 2]);
        assert_eq!(bent[63].to_bits(), (plain[63] / 8.0).to_bits());
        // Wavelengths above 8192 tokens are scaled in full, those below 2048 not at all.
        let wavelength = |pair: usize| std::f32::consts::TAU / plain[pair];
        for pair in 0..64 {
            let ratio = plain[pair] / bent[pair];
            let expected = if wavelength(pair) > 8192.0 {
                8.0..8.001
            } else if wavelength(pair) < 2048.0 {
                1.0..1.001
            } else {
                1.0..8.0
            };
            assert!(expected.contains(&ratio), "pair {pair}: {ratio}");
        }
        let newer = json!({ "rope_parameters": { "rope_type": "linear", "factor": 2.0, "rope_theta": 1e6 } });
        let config = with(&newer).unwrap();
        assert_eq!((config.rope.theta, config.rope.scaling), (1e6, RopeScaling::Linear { factor: 2.0 }));
    }
}
