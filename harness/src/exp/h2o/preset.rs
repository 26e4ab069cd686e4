//! What a sweep runs: lists of values for the swept keys of the engine's config, and values for the others.

use std::collections::BTreeSet;
use std::path::Path;

use clap::{Args, ValueEnum};
use gearbox_core::{Error, Result, config};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Kit, Mode};
use crate::exp::text::Float;

/// A sweep: every combination of its lists, the last list varying fastest.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[expect(clippy::struct_excessive_bools, reason = "keys of the engine's config")]
pub struct Preset {
    /// Revision whose defaults hold and whose keys are written
    #[arg(long, value_enum, default_value_t = Self::default().kit)]
    pub(super) kit: Kit,
    /// Prompt lengths in tokens, separated by commas like the lists below
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',', default_values_t = Self::default().prompts)]
    #[schemars(length(min = 1), inner(range(min = 1)))]
    prompts: Vec<u32>,
    /// Decoded tokens
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',', default_values_t = Self::default().gens)]
    #[schemars(length(min = 1), inner(range(min = 1)))]
    gens: Vec<u32>,
    /// Measured repeats of each run
    #[arg(long, value_name = "COUNT", default_value_t = Self::default().repeat)]
    #[schemars(range(min = 1))]
    pub(super) repeat: u32,
    /// Kept fractions, which the target mode `adaptive` ignores
    #[arg(long, value_name = "SHARE,…", value_delimiter = ',', default_values_t = Self::default().h2o_keep_ratios)]
    #[schemars(length(min = 1), inner(range(min = 0, max = 1)))]
    h2o_keep_ratios: Vec<f64>,
    /// Tokens of a block
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',', default_values_t = Self::default().h2o_block_tokens)]
    #[schemars(length(min = 1), inner(range(min = 1)))]
    h2o_block_tokens: Vec<u32>,
    /// First tokens that are always kept
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',', default_values_t = Self::default().h2o_sink_tokens)]
    #[schemars(length(min = 1))]
    h2o_sink_tokens: Vec<u32>,
    /// Last tokens that are always kept
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',', default_values_t = Self::default().h2o_recent_tokens)]
    #[schemars(length(min = 1))]
    h2o_recent_tokens: Vec<u32>,
    /// Weights of the past in the scores
    #[arg(long, value_name = "SHARE,…", value_delimiter = ',', default_values_t = Self::default().h2o_ema_alphas)]
    #[schemars(length(min = 1), inner(range(min = 0, max = 1)))]
    h2o_ema_alphas: Vec<f64>,
    /// Attention calls between two evictions
    #[arg(long, value_name = "CALLS,…", value_delimiter = ',', default_values_t = Self::default().h2o_update_intervals)]
    #[schemars(length(min = 1), inner(range(min = 1)))]
    h2o_update_intervals: Vec<u32>,
    /// Tokens below which nothing is evicted
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',', default_values_t = Self::default().h2o_trigger_min_tokens)]
    #[schemars(length(min = 1), inner(range(min = 1)))]
    h2o_trigger_min_tokens: Vec<u32>,
    /// Ratios that the target mode `adaptive` aims at
    #[arg(long, value_name = "RATIO,…", value_delimiter = ',', default_values_t = Self::default().h2o_target_lossy_ratios)]
    #[schemars(length(min = 1), inner(range(min = 1)))]
    h2o_target_lossy_ratios: Vec<f64>,
    /// The only one of `h2o_target_lossy_ratios`, where there is no such list
    #[arg(skip)]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    h2o_target_lossy_ratio: Option<f64>,
    /// First layer that evicts
    #[arg(long, value_name = "LAYER", default_value_t = Self::default().h2o_layer_start)]
    h2o_layer_start: u32,
    /// Last layer that evicts; negative is the last of the model
    #[arg(long, value_name = "LAYER", allow_negative_numbers = true, default_value_t = Self::default().h2o_layer_end)]
    h2o_layer_end: i32,
    /// What decides how much is kept
    #[arg(long, value_enum, default_value_t = Self::default().h2o_target_mode)]
    h2o_target_mode: TargetMode,
    /// Let the engine print its decisions
    #[arg(long)]
    h2o_log_stats: bool,
    /// Compress without loss what is kept
    #[arg(long)]
    kv_lossless_enable: bool,
    /// Which layers are compressed [default: `front_n`, from kit v5 on `front_n_and_h2o_kept`]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_lossless_scope: Option<Scope>,
    /// Number of front layers
    #[arg(long, value_name = "LAYERS", default_value_t = Self::default().kv_lossless_front_n)]
    kv_lossless_front_n: u32,
    /// How they are compressed
    #[arg(long, value_enum, default_value_t = Self::default().kv_lossless_codec)]
    kv_lossless_codec: Codec,
    /// Really compress while decoding (kit v3 on, like the rest)
    #[arg(long)]
    kv_lossless_runtime_enable: bool,
    /// Tokens that are compressed at once
    #[arg(long, value_name = "TOKENS", default_value_t = Self::default().kv_lossless_block_tokens)]
    #[schemars(range(min = 1))]
    kv_lossless_block_tokens: u32,
    /// Last tokens that stay uncompressed
    #[arg(long, value_name = "TOKENS", default_value_t = Self::default().kv_lossless_hot_recent_tokens)]
    kv_lossless_hot_recent_tokens: u32,
    /// First tokens that stay uncompressed
    #[arg(long, value_name = "TOKENS", default_value_t = Self::default().kv_lossless_hot_sink_tokens)]
    kv_lossless_hot_sink_tokens: u32,
    /// A name that the engine stores and never reads
    #[arg(long, value_name = "NAME", default_value_t = Self::default().kv_lossless_codec_runtime)]
    kv_lossless_codec_runtime: String,
    /// Candidates for keys
    #[arg(long, value_name = "NAMES", default_value_t = Self::default().kv_lossless_predictors_k)]
    kv_lossless_predictors_k: String,
    /// Candidates for values
    #[arg(long, value_name = "NAMES", default_value_t = Self::default().kv_lossless_predictors_v)]
    kv_lossless_predictors_v: String,
    /// Encoders beside the decoding thread
    #[arg(long, value_name = "THREADS", default_value_t = Self::default().kv_lossless_async_threads)]
    kv_lossless_async_threads: u32,
    /// Blocks that may wait
    #[arg(long, value_name = "BLOCKS", default_value_t = Self::default().kv_lossless_max_queue)]
    #[schemars(range(min = 1))]
    kv_lossless_max_queue: u32,
    /// Decoded blocks that are kept; 0 keeps none
    #[arg(long, value_name = "BLOCKS", default_value_t = Self::default().kv_lossless_decode_cache_blocks)]
    kv_lossless_decode_cache_blocks: u32,
    /// Compare what was decoded by hash
    #[arg(long)]
    kv_lossless_strict_roundtrip_check: bool,
    /// What happens to compressed blocks (kit v4 on) [default: `probe`, from kit v5 on `full`]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_lossless_runtime_mode: Option<Mode>,
    /// Evicting layers that are compressed; 0 is all (kit v4 on)
    #[arg(long, value_name = "LAYERS", default_value_t = Self::default().kv_lossless_kept_sample_layers)]
    kv_lossless_kept_sample_layers: u32,
    /// Tokens between two samples of evicting layers (kit v4 on) [default: 1, from kit v5 on 2]
    #[arg(long, value_name = "TOKENS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_lossless_kept_sample_token_interval: Option<u32>,
    /// Tokens between two samples of front layers (kit v5 on)
    #[arg(long, value_name = "TOKENS", default_value_t = Self::default().kv_lossless_front_sample_token_interval)]
    kv_lossless_front_sample_token_interval: u32,
    /// Do not store front layers (kit v5 on)
    #[arg(long)]
    kv_lossless_store_disable_front: bool,
    /// Tokens of the first block that is stored (kit v5 on)
    #[arg(long, value_name = "TOKENS", default_value_t = Self::default().kv_lossless_store_bootstrap_tokens)]
    kv_lossless_store_bootstrap_tokens: u32,
    /// Tokens of the blocks behind it (kit v5 on)
    #[arg(long, value_name = "TOKENS", default_value_t = Self::default().kv_lossless_store_grouped_step_tokens)]
    kv_lossless_store_grouped_step_tokens: u32,
}

impl Default for Preset {
    /// The defaults of the reference's scripts, which are not those that it recommends.
    fn default() -> Self {
        Self {
            kit: Kit::V3,
            prompts: vec![512],
            gens: vec![128],
            repeat: 3,
            h2o_keep_ratios: vec![0.5],
            h2o_block_tokens: vec![64],
            h2o_sink_tokens: vec![32],
            h2o_recent_tokens: vec![256],
            h2o_ema_alphas: vec![0.9],
            h2o_update_intervals: vec![16],
            h2o_trigger_min_tokens: vec![512],
            h2o_target_lossy_ratios: vec![3.0],
            h2o_target_lossy_ratio: None,
            h2o_layer_start: 2,
            h2o_layer_end: -1,
            h2o_target_mode: TargetMode::Adaptive,
            h2o_log_stats: false,
            kv_lossless_enable: false,
            kv_lossless_scope: None,
            kv_lossless_front_n: 2,
            kv_lossless_codec: Codec::None,
            kv_lossless_runtime_enable: false,
            kv_lossless_block_tokens: 128,
            kv_lossless_hot_recent_tokens: 256,
            kv_lossless_hot_sink_tokens: 16,
            kv_lossless_codec_runtime: "fp16_gear_predictive_v3".to_owned(),
            kv_lossless_predictors_k: "raw,delta_seq,xor_seq,pair_delta".to_owned(),
            kv_lossless_predictors_v: "raw,delta_seq,xor_seq".to_owned(),
            kv_lossless_async_threads: 1,
            kv_lossless_max_queue: 256,
            kv_lossless_decode_cache_blocks: 64,
            kv_lossless_strict_roundtrip_check: false,
            kv_lossless_runtime_mode: None,
            kv_lossless_kept_sample_layers: 1,
            kv_lossless_kept_sample_token_interval: None,
            kv_lossless_front_sample_token_interval: 1,
            kv_lossless_store_disable_front: false,
            kv_lossless_store_bootstrap_tokens: 32,
            kv_lossless_store_grouped_step_tokens: 256,
        }
    }
}

/// What decides how much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TargetMode {
    /// The kept fraction
    Static,
    /// The ratio that is aimed at
    Adaptive,
}

/// Which layers are compressed without loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub(crate) enum Scope {
    /// None
    None,
    /// The front layers
    FrontN,
    /// The layers that evict
    H2oKept,
    /// Both (kit v4 on)
    #[value(alias = "joint")]
    FrontNAndH2oKept,
}

/// How they are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub(crate) enum Codec {
    /// Not at all
    None,
    /// Bytes apart, predicted and compressed
    GearDelta,
}

/// One combination.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Run {
    /// `run_0001_p512_g128_k0.3_b32_lr3.0`.
    pub id: String,
    pub prompt: Value,
    pub generated: Value,
    /// Keys of the engine's config with their names in the manifest, in its order.
    keys: Vec<Key>,
}

/// One key of the engine's config.
#[derive(Clone, Debug, PartialEq)]
struct Key {
    config: &'static str,
    /// Empty if the manifest does not have it.
    manifest: &'static str,
    value: Value,
    since: Kit,
}

impl Run {
    /// Sets the keys in a config.
    pub fn configure(&self, config: &mut Map<String, Value>) {
        config.extend(self.keys.iter().map(|key| (key.config.to_owned(), key.value.clone())));
    }

    /// Names and values for the manifest.
    pub fn settings(&self) -> impl Iterator<Item = (&'static str, &Value)> {
        self.keys.iter().filter(|key| !key.manifest.is_empty()).map(|key| (key.manifest, &key.value))
    }
}

impl Preset {
    /// Reads a preset.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) for unknown keys and values out of range, with the file and the
    /// JSON pointer; [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if it is no JSON.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
        let at = |error: Error| error.context(format!("`{}`", path.display()));
        let value: Value =
            serde_json::from_str(&text).map_err(|error| at(Error::invalid_input(format!("expected JSON: {error}"))))?;
        let mut preset: Self = config::from_value(&value).map_err(at)?;
        if let (Some(ratio), None) = (preset.h2o_target_lossy_ratio.take(), value.get("h2o_target_lossy_ratios")) {
            preset.h2o_target_lossy_ratios = vec![ratio];
        }
        Ok(preset)
    }

    /// Checks ranges, and that the kit has every key that is not at its default.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig), naming the key.
    pub(super) fn check(&self) -> Result<()> {
        let value = serde_json::to_value(self).map_err(|error| Error::invalid_config(error.to_string()))?;
        config::check(&config::schema_of::<Self>(), &value)?;
        let kit = self.kit.name();
        let defaults = Self { kit: self.kit, ..Self::default() };
        let [keys, defaults] = [self, &defaults].map(|preset| preset.fixed_keys(&Value::Null, [false; 2]));
        for (key, default) in keys.into_iter().zip(defaults) {
            if key.since > self.kit && key.value != default.value {
                let (name, since) = (key.manifest, key.since.name());
                return Err(Error::invalid_config(format!("`{name}`: expected kit {since} or later, got {kit}")));
            }
        }
        if self.kit < Kit::V4 && self.kv_lossless_scope == Some(Scope::FrontNAndH2oKept) {
            let message =
                format!("`kv_lossless_scope`: expected kit v4 or later for `front_n_and_h2o_kept`, got {kit}");
            return Err(Error::invalid_config(message));
        }
        Ok(())
    }

    /// Every combination, the last list varying fastest; `disabled` are eviction and compression.
    pub(super) fn runs(&self, disabled: [bool; 2]) -> Vec<Run> {
        let lists = self.lists();
        let mut combinations: Vec<Vec<&Value>> = vec![Vec::new()];
        for (_, _, values) in &lists {
            let longer = |head: Vec<_>| values.iter().map(move |value| [&head[..], &[value]].concat());
            combinations = combinations.into_iter().flat_map(longer).collect();
        }
        let runs = combinations.into_iter().enumerate().map(|(idx, values)| {
            let [prompt, generated, keep, block, .., ratio] = values[..] else {
                unreachable!("one value of each list")
            };
            let [keep_text, ratio_text] = [keep, ratio].map(|value| Float(value.as_f64().unwrap_or(f64::NAN)));
            let id = format!("run_{:04}_p{prompt}_g{generated}_k{keep_text}_b{block}_lr{ratio_text}", idx + 1);
            let swept = lists.iter().zip(&values).filter(|((config, ..), _)| !config.is_empty());
            let swept = swept.map(|((config, manifest, _), value)| Key {
                config,
                manifest,
                value: (*value).clone(),
                since: Kit::V2,
            });
            let keys = swept.chain(self.fixed_keys(ratio, disabled)).filter(|key| key.since <= self.kit).collect();
            Run { id, prompt: prompt.clone(), generated: generated.clone(), keys }
        });
        runs.collect()
    }

    /// How many of the runs differ in what the engine does: each target mode ignores the other's target.
    pub(super) fn distinct(&self, runs: &[Run]) -> usize {
        let ignored = match self.h2o_target_mode {
            TargetMode::Static => "kv_h2o_target_lossy_ratio",
            TargetMode::Adaptive => "kv_h2o_target_keep_ratio",
        };
        let effective = |run: &Run| {
            let values = run.keys.iter().filter(|key| key.config != ignored).map(|key| key.value.to_string());
            ([&run.prompt, &run.generated].map(Value::to_string), values.collect::<Vec<_>>())
        };
        runs.iter().map(effective).collect::<BTreeSet<_>>().len()
    }

    /// The lists: key of the config, name in the manifest, values. Those without a key are arguments of the engine, and the ratio, which the
    /// manifest has further behind.
    fn lists(&self) -> [(&'static str, &'static str, Vec<Value>); 10] {
        let whole = |list: &[u32]| list.iter().map(|value| json!(value)).collect();
        let real = |list: &[f64]| list.iter().map(|value| json!(value)).collect();
        [
            ("", "", whole(&self.prompts)),
            ("", "", whole(&self.gens)),
            ("kv_h2o_target_keep_ratio", "keep_ratio", real(&self.h2o_keep_ratios)),
            ("kv_h2o_block_tokens", "block_tokens", whole(&self.h2o_block_tokens)),
            ("kv_h2o_sink_tokens", "sink_tokens", whole(&self.h2o_sink_tokens)),
            ("kv_h2o_recent_tokens", "recent_tokens", whole(&self.h2o_recent_tokens)),
            ("kv_h2o_ema_alpha", "ema_alpha", real(&self.h2o_ema_alphas)),
            ("kv_h2o_update_interval", "update_interval", whole(&self.h2o_update_intervals)),
            ("kv_h2o_trigger_min_tokens", "trigger_min_tokens", whole(&self.h2o_trigger_min_tokens)),
            ("", "", real(&self.h2o_target_lossy_ratios)),
        ]
    }

    /// The keys that are not swept, and the ratio, in the order of the manifest.
    fn fixed_keys(&self, ratio: &Value, disabled: [bool; 2]) -> Vec<Key> {
        let [no_h2o, no_lossless] = disabled;
        let late = self.kit >= Kit::V5;
        let scope = self.kv_lossless_scope.unwrap_or(if late { Scope::FrontNAndH2oKept } else { Scope::FrontN });
        let mode = self.kv_lossless_runtime_mode.unwrap_or(if late { Mode::Full } else { Mode::Probe });
        let interval = self.kv_lossless_kept_sample_token_interval.unwrap_or(if late { 2 } else { 1 });
        macro_rules! keys {
            ($($since:ident: $($config:literal = $value:expr;)*)*) => {
                vec![$($(Key {
                    config: $config,
                    manifest: $config.strip_prefix("kv_h2o").map_or($config, |_| &$config["kv_".len()..]),
                    value: json!($value),
                    since: Kit::$since,
                }),*),*]
            };
        }
        let mut keys = keys! {
            V2:
            "kv_h2o_layer_start" = self.h2o_layer_start;
            "kv_h2o_layer_end" = self.h2o_layer_end;
            "kv_h2o_target_mode" = self.h2o_target_mode;
            "kv_h2o_target_lossy_ratio" = ratio;
            "kv_lossless_enable" = self.kv_lossless_enable && !no_lossless;
            "kv_lossless_scope" = scope;
            "kv_lossless_front_n" = self.kv_lossless_front_n;
            "kv_lossless_codec" = self.kv_lossless_codec;
            V3:
            "kv_lossless_runtime_enable" = self.kv_lossless_runtime_enable;
            "kv_lossless_block_tokens" = self.kv_lossless_block_tokens;
            "kv_lossless_hot_recent_tokens" = self.kv_lossless_hot_recent_tokens;
            "kv_lossless_hot_sink_tokens" = self.kv_lossless_hot_sink_tokens;
            "kv_lossless_codec_runtime" = self.kv_lossless_codec_runtime;
            "kv_lossless_predictors_k" = self.kv_lossless_predictors_k;
            "kv_lossless_predictors_v" = self.kv_lossless_predictors_v;
            "kv_lossless_async_threads" = self.kv_lossless_async_threads;
            "kv_lossless_max_queue" = self.kv_lossless_max_queue;
            "kv_lossless_decode_cache_blocks" = self.kv_lossless_decode_cache_blocks;
            "kv_lossless_strict_roundtrip_check" = self.kv_lossless_strict_roundtrip_check;
            V4:
            "kv_lossless_runtime_mode" = mode;
            "kv_lossless_kept_sample_layers" = self.kv_lossless_kept_sample_layers;
            "kv_lossless_kept_sample_token_interval" = interval;
            V5:
            "kv_lossless_front_sample_token_interval" = self.kv_lossless_front_sample_token_interval;
            "kv_lossless_store_disable_front" = self.kv_lossless_store_disable_front;
            "kv_lossless_store_bootstrap_tokens" = self.kv_lossless_store_bootstrap_tokens;
            "kv_lossless_store_grouped_step_tokens" = self.kv_lossless_store_grouped_step_tokens;
        };
        for (config, value) in [("kv_h2o_enable", !no_h2o), ("kv_h2o_log_stats", self.h2o_log_stats)] {
            keys.push(Key { config, manifest: "", value: value.into(), since: Kit::V2 });
        }
        keys
    }
}
