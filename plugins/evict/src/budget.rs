//! How many tokens a layer may hold, and which of them are protected.

use gearbox_core::{CacheGeometry, Error, LayerRange, Result, Retention};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the budget is spread over the layers that evict.
///
/// Shares are relative to the budget of one layer, and their mean is 1. A layer cannot hold more tokens than were seen, so a share above the
/// target ratio is lost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "mode", rename_all = "kebab-case", deny_unknown_fields)]
pub enum LayerBudgets {
    /// All layers alike.
    #[default]
    Uniform,
    /// Falls evenly from the first to the last layer, as in Cai et al., *PyramidKV*, 2024.
    Pyramid {
        /// Share of a mean layer ÷ share of the last one; 20 in the paper.
        #[schemars(range(min = 1.0, max = 1e6))]
        beta: f64,
    },
    /// As listed.
    Explicit {
        /// One weight for each layer that evicts; they are scaled to a mean of 1.
        #[schemars(length(min = 1), inner(range(min = 0.0)))]
        weights: Vec<f64>,
    },
}

impl LayerBudgets {
    /// The share of one of `count` layers.
    fn share(&self, idx: usize, count: usize) -> Result<f64> {
        match self {
            Self::Uniform => Ok(1.0),
            Self::Pyramid { .. } if count == 1 => Ok(1.0),
            Self::Pyramid { beta } => {
                let last = 1.0 / beta;
                let first = 2.0 - last;
                Ok(first + (last - first) * idx as f64 / (count - 1) as f64)
            }
            Self::Explicit { weights } => {
                let weight = weights.get(idx).filter(|_| weights.len() == count).ok_or_else(|| {
                    let got = weights.len();
                    Error::invalid_config(format!(
                        "`/layer_budgets/weights`: expected {count} as layers evict, got {got}"
                    ))
                })?;
                Ok(weight * count as f64 / weights.iter().sum::<f64>())
            }
        }
    }
}

/// The last tokens that stay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Recent {
    /// A part of the budget, rounded down.
    Fraction(f64),
    Tokens(u32),
}

impl Recent {
    pub(crate) fn new(fraction: Option<f64>, tokens: Option<u32>) -> Result<Self> {
        match (fraction, tokens) {
            (Some(_), Some(_)) => Err(both("recent_fraction", "recent_tokens")),
            (_, Some(tokens)) => Ok(Self::Tokens(tokens)),
            (fraction, None) => Ok(Self::Fraction(fraction.unwrap_or_default())),
        }
    }

    fn of(self, budget: u64) -> u64 {
        match self {
            Self::Fraction(fraction) => tokens(fraction * budget as f64),
            Self::Tokens(tokens) => tokens.into(),
        }
    }
}

/// Whole tokens, rounded down.
#[expect(clippy::cast_sign_loss, reason = "no count is negative")]
fn tokens(count: f64) -> u64 {
    count.floor() as u64
}

fn both(one: &str, other: &str) -> Error {
    Error::invalid_config(format!("`/{one}`, `/{other}`: expected one of both, got both"))
}

/// Settings of a budget, as given.
#[derive(Clone, Debug)]
pub(crate) struct Wishes {
    pub(crate) target_ratio: Option<f64>,
    pub(crate) budget_tokens: Option<u32>,
    pub(crate) sinks: Option<u32>,
    pub(crate) recent: Recent,
    pub(crate) min_tokens: Option<u32>,
    pub(crate) margin_tokens: Option<u32>,
    pub(crate) layers: Option<LayerRange>,
    pub(crate) layer_budgets: Option<LayerBudgets>,
}

/// Most tokens of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Most {
    /// Tokens seen ÷ this.
    Ratio(f64),
    Tokens(u32),
}

impl Most {
    /// At least one token.
    fn of(self, share: f64, seen: u64) -> u64 {
        let most = match self {
            Self::Ratio(ratio) => seen as f64 * share / ratio,
            Self::Tokens(tokens) => f64::from(tokens) * share,
        };
        tokens(most).clamp(1, seen.max(1))
    }
}

/// Fewest tokens seen from which on tokens are evicted, unless sinks need more.
const MIN_TOKENS: u32 = 64;

/// The budget of a policy.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    most: Most,
    sinks: u32,
    recent: Recent,
    min_tokens: u32,
    margin: u32,
    layers: LayerRange,
    layer_budgets: LayerBudgets,
}

impl Budget {
    /// Fills in defaults, and refuses what cannot be met.
    pub(crate) fn new(wishes: Wishes) -> Result<Self> {
        let most = match (wishes.target_ratio, wishes.budget_tokens) {
            (Some(_), Some(_)) => return Err(both("target_ratio", "budget_tokens")),
            (None, Some(tokens)) => Most::Tokens(tokens),
            (ratio, None) => Most::Ratio(ratio.unwrap_or(3.0)),
        };
        let sinks = wishes.sinks.unwrap_or_default();
        let mut budget = Self {
            most,
            sinks,
            recent: wishes.recent,
            min_tokens: MIN_TOKENS,
            margin: wishes.margin_tokens.unwrap_or_default(),
            layers: wishes.layers.unwrap_or_default(),
            layer_budgets: wishes.layer_budgets.unwrap_or_default(),
        };
        let auto = match (most, budget.needed()) {
            // With a fixed number of recent tokens a small ratio has to be named, not silently put off.
            (Most::Ratio(ratio), Some(needed)) if matches!(wishes.recent, Recent::Fraction(_)) => {
                u32::try_from(tokens((needed as f64 * ratio).ceil()))
                    .map_or(MIN_TOKENS, |needed| needed.max(MIN_TOKENS))
            }
            _ => MIN_TOKENS,
        };
        budget.min_tokens = wishes.min_tokens.unwrap_or(auto);
        if let LayerBudgets::Explicit { weights } = &budget.layer_budgets {
            let sum: f64 = weights.iter().sum();
            if !(sum > 0.0 && sum.is_finite()) {
                let message = format!("`/layer_budgets/weights`: expected a sum above 0, got {sum}");
                return Err(Error::invalid_config(message));
            }
        }
        budget.feasible(1.0)?;
        Ok(budget)
    }

    /// The settings with every default filled in.
    pub(crate) fn wishes(&self) -> Wishes {
        let (target_ratio, budget_tokens) = match self.most {
            Most::Ratio(ratio) => (Some(ratio), None),
            Most::Tokens(tokens) => (None, Some(tokens)),
        };
        Wishes {
            target_ratio,
            budget_tokens,
            sinks: Some(self.sinks),
            recent: self.recent,
            min_tokens: Some(self.min_tokens),
            margin_tokens: Some(self.margin),
            layers: Some(self.layers),
            layer_budgets: Some(self.layer_budgets.clone()),
        }
    }

    /// Fewest tokens of a budget into which sinks and recent tokens fit, and one more unless that is nothing; none if they never do.
    fn needed(&self) -> Option<u64> {
        let sinks = u64::from(self.sinks);
        let needed = match self.recent {
            Recent::Tokens(tokens) => sinks + u64::from(tokens),
            Recent::Fraction(fraction) if fraction < 1.0 => tokens((sinks as f64 / (1.0 - fraction)).ceil()),
            Recent::Fraction(_) if sinks == 0 => 0,
            Recent::Fraction(_) => return None,
        };
        Some(needed.max(1))
    }

    /// Checks that sinks and recent tokens fit into the smallest budget of a layer.
    fn feasible(&self, share: f64) -> Result<()> {
        let smallest = match self.most {
            Most::Ratio(_) => self.most.of(share, self.min_tokens.into()),
            // Nothing is evicted before so many were seen.
            Most::Tokens(_) => self.most.of(share, u64::MAX),
        };
        let Some(needed) = self.needed() else {
            let message = format!("`/recent_fraction`: expected less than 1 beside {} sinks, got 1", self.sinks);
            return Err(Error::invalid_config(message));
        };
        if needed <= smallest {
            return Ok(());
        }
        let protected = format!("sinks and recent tokens need {needed} tokens");
        Err(Error::invalid_config(match self.most {
            Most::Tokens(_) => format!("`/budget_tokens`: {protected}, and {smallest} may be kept"),
            Most::Ratio(ratio) => format!(
                "`/target_ratio`: {protected}, and {smallest} may be kept of {}: achievable is a ratio of {:.4}, or {} `min_tokens`",
                self.min_tokens,
                f64::from(self.min_tokens) * share / needed as f64,
                (needed as f64 * ratio / share).ceil()
            ),
        }))
    }

    /// The budget of a layer; none if it keeps all tokens.
    pub(crate) fn layer(&self, geometry: &CacheGeometry) -> Result<Option<LayerBudget>> {
        if !self.layers.contains(geometry.layer) {
            return Ok(None);
        }
        let end = self.layers.end.map_or(geometry.layers, |end| end.min(geometry.layers)).max(geometry.layer + 1);
        let (idx, count) = (geometry.layer - self.layers.start, end - self.layers.start);
        let share = self.layer_budgets.share(idx as usize, count as usize)?;
        self.feasible(share).map_err(|error| error.context(format!("layer {}", geometry.layer)))?;
        Ok(Some(LayerBudget {
            most: self.most,
            share,
            sinks: self.sinks.into(),
            recent: self.recent,
            min_tokens: self.min_tokens.into(),
            margin: self.margin.into(),
        }))
    }

    /// What is promised of a layer.
    pub(crate) fn retention(&self, geometry: &CacheGeometry, seen: u64) -> Retention {
        let layer = self.layer(geometry).ok().flatten();
        layer.and_then(|budget| budget.at(seen)).map_or(Retention::default(), Allowance::retention)
    }
}

/// The budget of one layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerBudget {
    most: Most,
    share: f64,
    sinks: u64,
    recent: Recent,
    min_tokens: u64,
    margin: u64,
}

/// The budget of one layer when so many tokens were seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Allowance {
    /// Tokens that it may hold.
    pub(crate) most: usize,
    /// Tokens that are left when some are evicted.
    pub(crate) target: usize,
    /// First tokens that stay.
    pub(crate) sinks: u64,
    /// Last tokens that stay.
    pub(crate) recent: u64,
}

impl Allowance {
    fn retention(self) -> Retention {
        Retention { most: Some(self.most as u64), sinks: self.sinks, recent: self.recent }
    }
}

impl LayerBudget {
    /// None while all tokens stay.
    pub(crate) fn at(&self, seen: u64) -> Option<Allowance> {
        if seen < self.min_tokens {
            return None;
        }
        let most = self.most.of(self.share, seen);
        let recent = self.recent.of(most);
        let target = most.saturating_sub(self.margin).max(self.sinks + recent).max(1);
        let count = |tokens: u64| usize::try_from(tokens).unwrap_or(usize::MAX);
        Some(Allowance { most: count(most), target: count(target), sinks: self.sinks, recent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes() -> Wishes {
        Wishes {
            target_ratio: None,
            budget_tokens: None,
            sinks: Some(4),
            recent: Recent::Fraction(0.25),
            min_tokens: None,
            margin_tokens: None,
            layers: None,
            layer_budgets: None,
        }
    }

    fn geometry(layer: u32) -> CacheGeometry {
        CacheGeometry { layer, layers: 5, q_heads: 4, kv_heads: 2, dim: 8 }
    }

    fn says(wishes: Wishes) -> String {
        Budget::new(wishes).unwrap_err().to_string()
    }

    #[test]
    fn budget_is_of_tokens_seen() {
        let layer = Budget::new(wishes()).unwrap().layer(&geometry(0)).unwrap().unwrap();
        assert_eq!(layer.at(63), None);
        assert_eq!(layer.at(64), Some(Allowance { most: 21, target: 21, sinks: 4, recent: 5 }));
        assert_eq!(layer.at(3000), Some(Allowance { most: 1000, target: 1000, sinks: 4, recent: 250 }));
        let fixed = Wishes { budget_tokens: Some(100), margin_tokens: Some(10), ..wishes() };
        let layer = Budget::new(fixed).unwrap().layer(&geometry(0)).unwrap().unwrap();
        assert_eq!(layer.at(3000), Some(Allowance { most: 100, target: 90, sinks: 4, recent: 25 }));
        assert_eq!(layer.at(70), Some(Allowance { most: 70, target: 60, sinks: 4, recent: 17 }));
    }

    #[test]
    fn a_margin_stops_at_what_is_protected() {
        let wide = Wishes { budget_tokens: Some(100), margin_tokens: Some(1000), ..wishes() };
        let layer = Budget::new(wide).unwrap().layer(&geometry(0)).unwrap().unwrap();
        assert_eq!(layer.at(3000).unwrap().target, 29);
    }

    #[test]
    fn high_ratios_start_later() {
        let budget = Budget::new(Wishes { target_ratio: Some(20.0), ..wishes() }).unwrap();
        assert_eq!(budget.wishes().min_tokens, Some(120));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_does() {
        let defaults = Wishes { sinks: Some(32), recent: Recent::Tokens(256), min_tokens: Some(512), ..wishes() };
        assert_eq!(
            says(defaults),
            "`/target_ratio`: sinks and recent tokens need 288 tokens, and 170 may be kept of 512: achievable is a ratio of 1.7778, or 864 \
             `min_tokens`"
        );
        let few = Wishes { budget_tokens: Some(5), ..wishes() };
        assert_eq!(says(few), "`/budget_tokens`: sinks and recent tokens need 6 tokens, and 5 may be kept");
        let whole = Wishes { recent: Recent::Fraction(1.0), ..wishes() };
        assert_eq!(says(whole), "`/recent_fraction`: expected less than 1 beside 4 sinks, got 1");
        let two = Wishes { budget_tokens: Some(5), target_ratio: Some(2.0), ..wishes() };
        assert_eq!(says(two), "`/target_ratio`, `/budget_tokens`: expected one of both, got both");
    }

    #[test]
    fn shares_have_a_mean_of_one() {
        for (budgets, expected) in [
            (LayerBudgets::Pyramid { beta: 2.0 }, [1.5, 1.25, 1.0, 0.75, 0.5]),
            (LayerBudgets::Explicit { weights: vec![1.0, 2.0, 3.0, 2.0, 2.0] }, [0.5, 1.0, 1.5, 1.0, 1.0]),
        ] {
            let shares: Vec<f64> = (0..5).map(|idx| budgets.share(idx, 5).unwrap()).collect();
            assert_eq!(shares, expected);
        }
    }

    #[test]
    fn layers_outside_the_range_keep_all() {
        let layers = Some(LayerRange { start: 1, end: Some(4) });
        let weights = Some(LayerBudgets::Explicit { weights: vec![1.0, 1.0, 4.0] });
        let budget = Budget::new(Wishes { layers, layer_budgets: weights, ..wishes() }).unwrap();
        assert!(budget.layer(&geometry(0)).unwrap().is_none());
        assert!(budget.layer(&geometry(4)).unwrap().is_none());
        assert_eq!(budget.layer(&geometry(3)).unwrap().unwrap().at(3000).unwrap().most, 2000);
        let error = budget.layer(&CacheGeometry { layers: 3, ..geometry(1) }).unwrap_err();
        assert_eq!(error.to_string(), "`/layer_budgets/weights`: expected 2 as layers evict, got 3");
    }

    #[test]
    fn a_layer_too_small_for_what_is_protected_is_named() {
        let pyramid = Some(LayerBudgets::Pyramid { beta: 20.0 });
        let budget = Budget::new(Wishes { layer_budgets: pyramid, ..wishes() }).unwrap();
        let error = budget.layer(&geometry(4)).unwrap_err().to_string();
        assert!(
            error.starts_with("layer 4: `/target_ratio`: sinks and recent tokens need 6 tokens, and 1 may be kept"),
            "{error}"
        );
    }
}
