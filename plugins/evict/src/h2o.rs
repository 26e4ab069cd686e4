//! H2O: tokens that were attended to stay ("heavy hitters").
//!
//! A token is as good as the attention that it got from all queries so far, those of the prompt included: the mean probability over the
//! queries that could see it. Taken per KV head, as heads look at different things. It finds tokens that matter all along; what mattered
//! long ago and does no more keeps its place, and a token that is needed late and was never looked at is gone.
//!
//! Differences to the paper: the sum there favours old tokens, which more queries saw, so the mean is the default (`score: "sum"` is the
//! paper's); query heads that share a KV head are taken together as `group` says.
//!
//! `mode: "reference"` follows the runtime of the reference, rule by rule: see [`reference`](crate::reference). It has settings and
//! defaults of its own:
//!
//! | setting | `default` | `reference` |
//! |---|---|---|
//! | `block_tokens` | 1 | 64 |
//! | `sinks` | 4 | 32 |
//! | recent tokens | `recent_fraction` 0.5 or `recent_tokens` | `recent_tokens` 256 |
//! | tokens kept | `target_ratio` 3 or `budget_tokens`, of tokens seen | `target_ratio` 3 or `kept_fraction`, of tokens held |
//! | `min_tokens` | 64, of tokens seen | 512, of tokens held |
//! | `layers` | `..` | `2..` |
//! | `group`, `score`, `margin_tokens`, `layer_budgets` | `mean`, `mean`, 0, `uniform` | refused |
//! | `ema`, `update_interval` | refused | 0.9, 16 |

use gearbox_core::{
    AttentionStep, CacheGeometry, Capabilities, ElemSet, Error, EvictionPolicy, EvictionSession, LayerRange, Plugin,
    Result, Retention, register_eviction,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::budget::Budget;
use crate::reference::{Clock, Keep, Reference, Rules};
use crate::rows::{Group, Row, grouped};
use crate::select::{Scorer, session};
use crate::settings::choosing_settings;

/// Whose rules are followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Those of the paper, corrected.
    #[default]
    Default,
    /// Those of the reference's runtime, flaws included.
    Reference,
}

/// What a token's probabilities make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// Their mean over the queries that could see it.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

choosing_settings! {
    /// Settings of [`H2o`].
    Config {
        /// Whose rules are followed.
        mode: Mode,
        /// Tokens that share a score, the mean of theirs; blocks begin at multiples of it.
        #[schemars(range(min = 1, max = 65536))]
        block_tokens: Option<u32>,
        /// How the query heads that share a KV head are taken together.
        group: Option<Group>,
        /// What a token's probabilities make.
        score: Option<Score>,
        /// Tokens kept ÷ tokens held, instead of `target_ratio`; mode `reference` only.
        #[schemars(range(min = 0.0, max = 1.0))]
        kept_fraction: Option<f64>,
        /// Weight of the past in the moving average of scores; mode `reference` only.
        #[schemars(range(min = 0.0, max = 1.0))]
        ema: Option<f64>,
        /// Calls of attention, those of all layers, between two decisions; mode `reference` only.
        #[schemars(range(min = 1))]
        update_interval: Option<u32>,
    }
}

/// Keeps what was attended to.
#[derive(Clone, Debug)]
pub struct H2o {
    config: Config,
    rules: By,
}

#[derive(Clone, Debug)]
enum By {
    Default { budget: Budget, block: u32, group: Group, score: Score },
    Reference { rules: Rules, clock: Clock, ema: f64 },
}

impl Config {
    /// Refuses settings of the other mode.
    fn only(&self, others: &[&str]) -> Result<()> {
        let settings = json!(self);
        match others.iter().find(|key| !settings[**key].is_null()) {
            Some(key) => Err(Error::invalid_config(format!(
                "`/{key}`: {} has no meaning in mode {}",
                settings[*key], settings["mode"]
            ))),
            None => Ok(()),
        }
    }

    fn by_reference(&mut self) -> Result<By> {
        self.only(&["group", "score", "margin_tokens", "layer_budgets", "budget_tokens", "recent_fraction"])?;
        let keep = match (self.target_ratio, self.kept_fraction) {
            (Some(_), Some(_)) => {
                let message = "`/target_ratio`, `/kept_fraction`: expected one of both, got both";
                return Err(Error::invalid_config(message));
            }
            (None, Some(fraction)) => Keep::Fraction(fraction as f32),
            (ratio, None) => Keep::Ratio(*self.target_ratio.insert(ratio.unwrap_or(3.0)) as f32),
        };
        let rules = Rules {
            block: *self.block_tokens.get_or_insert(64) as usize,
            sinks: *self.sinks.get_or_insert(32) as usize,
            recent: *self.recent_tokens.get_or_insert(256) as usize,
            keep,
        };
        let clock = Clock {
            layers: *self.layers.get_or_insert(LayerRange { start: 2, end: None }),
            min_tokens: *self.min_tokens.get_or_insert(512) as usize,
            interval: (*self.update_interval.get_or_insert(16)).into(),
        };
        Ok(By::Reference { rules, clock, ema: *self.ema.get_or_insert(0.9) })
    }

    fn by_attention(&mut self) -> Result<By> {
        self.only(&["kept_fraction", "ema", "update_interval"])?;
        Ok(By::Default {
            budget: self.budget(4, 0.5)?,
            block: *self.block_tokens.get_or_insert(1),
            group: *self.group.get_or_insert_default(),
            score: *self.score.get_or_insert_default(),
        })
    }
}

impl Plugin for H2o {
    const ID: &'static str = "h2o";
    const SUMMARY: &'static str = "what queries so far attended to stays";
    const SOURCE: &'static str = "Zhang et al., *H2O: Heavy-Hitter Oracle*, 2023; mode `reference`: h2o experiments";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(mut config: Config) -> Result<Self> {
        let rules = match config.mode {
            Mode::Default => config.by_attention()?,
            Mode::Reference => config.by_reference()?,
        };
        Ok(Self { config, rules })
    }
}

register_eviction!(H2o);

impl H2o {
    /// The rules of mode `reference`; none in the other.
    pub fn rules(&self) -> Option<Rules> {
        match self.rules {
            By::Reference { rules, .. } => Some(rules),
            By::Default { .. } => None,
        }
    }

    /// A session of mode `reference`, which tells what it decided; none in the other.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if the model has no such layer.
    pub fn reference(&self, geometry: &CacheGeometry) -> Result<Option<Reference>> {
        match &self.rules {
            By::Default { .. } => Ok(None),
            By::Reference { rules, clock, ema } => Reference::new(*rules, *clock, *ema, geometry).map(Some),
        }
    }
}

impl EvictionPolicy for H2o {
    fn capabilities(&self) -> Capabilities {
        Capabilities { streaming: true, ..Capabilities::new(ElemSet::FLOATS) }
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn retention(&self, geometry: &CacheGeometry, seen: u64) -> Retention {
        match &self.rules {
            By::Default { budget, .. } => budget.retention(geometry, seen),
            // It evicts when its clock says so, and keeps positions in the cache, not in the sequence.
            By::Reference { .. } => Retention::default(),
        }
    }

    fn session(&self, geometry: &CacheGeometry) -> Result<Box<dyn EvictionSession>> {
        match &self.rules {
            By::Default { budget, block, group, score } => {
                let rows = vec![Row::new(2); geometry.kv_heads];
                let scorer = Hitters { geometry: *geometry, block: *block, group: *group, score: *score, rows };
                session(budget, geometry, scorer)
            }
            By::Reference { rules, clock, ema } => Ok(Box::new(Reference::new(*rules, *clock, *ema, geometry)?)),
        }
    }
}

/// Attention that tokens got so far.
struct Hitters {
    geometry: CacheGeometry,
    block: u32,
    group: Group,
    score: Score,
    /// One per KV head: the sum of probabilities, and the number of queries that could see the token.
    rows: Vec<Row<f64>>,
}

impl Scorer for Hitters {
    fn observe(&mut self, step: &AttentionStep<'_>) {
        let mut probabilities = Vec::new();
        for (kv_head, row) in self.rows.iter_mut().enumerate() {
            let live = step.row(kv_head);
            row.align(live);
            let [sums, counts] = &mut row.columns[..] else { continue };
            for query in 0..step.queries {
                grouped(step, &self.geometry, query, kv_head, self.group, &mut probabilities);
                for (sum, probability) in sums.iter_mut().zip(&probabilities) {
                    *sum += f64::from(*probability);
                }
            }
            for (count, position) in counts.iter_mut().zip(live) {
                let before = u64::from(*position).saturating_sub(step.first_query);
                *count += (step.queries as u64).saturating_sub(before) as f64;
            }
        }
    }

    fn score(&mut self, kv_head: usize, live: &[u32], scores: &mut Vec<f64>) {
        let Some(row) = self.rows.get_mut(kv_head) else { return };
        row.align(live);
        let (sums, counts) = (&row.columns[0], &row.columns[1]);
        match self.score {
            Score::Sum => scores.extend_from_slice(sums),
            Score::Mean => scores.extend(sums.iter().zip(counts).map(|(sum, count)| sum / count.max(1.0))),
        }
        if self.block > 1 {
            let mut start = 0;
            for block in live.chunk_by(|a, b| a / self.block == b / self.block) {
                let own = &mut scores[start..start + block.len()];
                let mean = own.iter().sum::<f64>() / block.len() as f64;
                own.fill(mean);
                start += block.len();
            }
        }
    }
}
