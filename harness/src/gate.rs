//! The gate: limits on what a row measured, and the verdict.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use gearbox_core::{Error, Result, ResultExt};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// A number that a row measures: of a sweep over the whole dump, of a run of a model over the whole request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Original ÷ stored bytes, all of them counted.
    Ratio,
    /// 8 × stored bytes ÷ original elements.
    BitsPerValue,
    /// Mean absolute error.
    Mae,
    /// Root of the mean squared error, pooled over all elements.
    Rmse,
    /// Squared error ÷ squared original.
    Nmse,
    /// Greatest absolute error.
    MaxAbs,
    /// Cosine of the angle between original and decoded elements.
    Cosine,
    /// Mean absolute error of keys.
    KeyMae,
    /// Mean absolute error of values.
    ValueMae,
    /// Squared error ÷ squared original of keys.
    KeyNmse,
    /// Squared error ÷ squared original of values.
    ValueNmse,
    /// Cosine of keys.
    KeyCosine,
    /// Cosine of values.
    ValueCosine,
    /// Lowest cosine of any head of any run, layer and role.
    WorstHeadCosine,
    /// Highest squared error ÷ squared original of any head.
    WorstHeadNmse,
    /// Highest squared error ÷ squared original of any layer and role.
    WorstLayerNmse,
    /// Attention: root mean square of the difference of scaled logits.
    LogitRmse,
    /// Attention: greatest difference of scaled logits.
    LogitMax,
    /// Attention: mean Kullback-Leibler divergence of the softmax, in nats.
    KlMean,
    /// Attention: 99th percentile of the divergence over queries.
    KlP99,
    /// Attention: greatest divergence of any query.
    KlMax,
    /// Attention: highest mean divergence of any head.
    WorstHeadKl,
    /// Attention: relative error of the output.
    OutputError,
    /// Attention: highest relative error of the output of any head.
    WorstHeadOutputError,
    /// Attention: share of the most attended tokens that stay the same.
    TopAgreement,
    /// Model: bytes of all tokens seen ÷ resident bytes, from one ledger, averaged over the steps.
    ResidentRatio,
    /// Model: tokens seen ÷ tokens kept, averaged over the steps.
    LossyRatio,
    /// Model: bytes of the kept tokens ÷ resident bytes, where every bit of them comes back.
    LosslessRatio,
    /// Model: 1 − decoded tokens per second ÷ those of the dense cache.
    DecodeDrop,
    /// Model: perplexity ÷ perplexity of the dense cache − 1.
    PerplexityIncrease,
    /// Model: mean Kullback-Leibler divergence of the next token from the dense cache, in nats.
    TokenKlMean,
    /// Model: 99th percentile of that divergence.
    TokenKlP99,
    /// Model: share of steps in which the most probable token is that of the dense cache.
    Top1Agreement,
}

impl Metric {
    /// What a run of a model measures, besides [`Metric::WorstHeadOutputError`].
    pub const OF_MODELS: [Self; 8] = [
        Self::ResidentRatio,
        Self::LossyRatio,
        Self::LosslessRatio,
        Self::DecodeDrop,
        Self::PerplexityIncrease,
        Self::TokenKlMean,
        Self::TokenKlP99,
        Self::Top1Agreement,
    ];

    /// What a sweep over dumps measures.
    pub const OF_DUMPS: [Self; 25] = [
        Self::Ratio,
        Self::BitsPerValue,
        Self::Mae,
        Self::Rmse,
        Self::Nmse,
        Self::MaxAbs,
        Self::Cosine,
        Self::KeyMae,
        Self::ValueMae,
        Self::KeyNmse,
        Self::ValueNmse,
        Self::KeyCosine,
        Self::ValueCosine,
        Self::WorstHeadCosine,
        Self::WorstHeadNmse,
        Self::WorstLayerNmse,
        Self::LogitRmse,
        Self::LogitMax,
        Self::KlMean,
        Self::KlP99,
        Self::KlMax,
        Self::WorstHeadKl,
        Self::OutputError,
        Self::WorstHeadOutputError,
        Self::TopAgreement,
    ];

    /// Whether more is better.
    fn is_better_high(self) -> bool {
        self.is_share() || matches!(self, Self::Ratio | Self::ResidentRatio | Self::LossyRatio | Self::LosslessRatio)
    }

    /// Whether 1 is perfect and less is worse, so that what matters is the distance from 1.
    fn is_share(self) -> bool {
        matches!(
            self,
            Self::Cosine
                | Self::KeyCosine
                | Self::ValueCosine
                | Self::WorstHeadCosine
                | Self::TopAgreement
                | Self::Top1Agreement
        )
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Reads what was measured, by name. `null` stands for a number that is not finite, and passes no limit here either.
pub(crate) fn read_measured<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<Metric, f64>, D::Error> {
    let read = BTreeMap::<Metric, Option<f64>>::deserialize(deserializer)?;
    let worst = |metric: Metric| if metric.is_better_high() { f64::NAN } else { f64::INFINITY };
    Ok(read.into_iter().map(|(metric, value)| (metric, value.unwrap_or(worst(metric)))).collect())
}

/// What a number may be; at least one side is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limit {
    /// At least this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// At most this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.min, self.max) {
            (Some(min), Some(max)) => write!(f, "{min} to {max}"),
            (Some(min), None) => write!(f, "at least {min}"),
            (None, Some(max)) => write!(f, "at most {max}"),
            (None, None) => f.write_str("anything"),
        }
    }
}

/// Limits by metric; a row passes if it holds all of them. A number that was not measured does not pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Gate(pub BTreeMap<Metric, Limit>);

impl JsonSchema for Gate {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Gate".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let limit = generator.subschema_for::<Limit>();
        let metrics = Metric::OF_DUMPS.into_iter().chain(Metric::OF_MODELS);
        let limits = metrics.map(|metric| (metric.to_string(), limit.clone().to_value()));
        json_schema!({
            "type": "object",
            "description": "Limits by metric; a row passes if it holds all of them. A number that was not measured does not pass.",
            "properties": limits.collect::<serde_json::Map<_, _>>(),
            "additionalProperties": false
        })
    }
}

impl Default for Gate {
    /// No head may lose its direction: the least that anyone would ask, which still catches a single broken head.
    fn default() -> Self {
        Self(BTreeMap::from([(Metric::WorstHeadCosine, Limit { min: Some(0.99), max: None })]))
    }
}

impl Gate {
    /// Reads limits from a JSON file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) with file, JSON pointer and what is legal there, also for no limits.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
        let read = || -> Result<Self> {
            let value = serde_json::from_str(&text).map_err(|error| Error::invalid_config(error.to_string()))?;
            let gate: Self = gearbox_core::config::from_value(&value)?;
            if gate.0.is_empty() {
                return Err(Error::invalid_config("expected at least one limit, got none"));
            }
            gate.check("").map(|()| gate)
        };
        read().context(|| format!("`{}`", path.display()))
    }

    /// Checks that every limit says something that can hold.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) with the JSON pointer below `pointer`.
    pub fn check(&self, pointer: &str) -> Result<()> {
        for (metric, limit) in &self.0 {
            let wrong = |text: String| Err(Error::invalid_config(format!("`{pointer}/{metric}`: {text}")));
            match (limit.min, limit.max) {
                (None, None) => return wrong("expected `min`, `max` or both, got neither".into()),
                (Some(min), Some(max)) if min > max => {
                    return wrong(format!("expected `min` up to `max`, got {min} and {max}"));
                }
                (Some(min), _) if metric.is_share() && min > 1.0 => {
                    return wrong(format!("expected `min` up to 1, got {min}"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// These limits, and the default one on the worst head unless they say otherwise: averages hide a head that was lost.
    #[must_use]
    pub fn with_default(mut self) -> Self {
        for (metric, limit) in Self::default().0 {
            self.0.entry(metric).or_insert(limit);
        }
        self
    }

    /// Judges what was measured.
    ///
    /// # Examples
    /// ```
    /// use gearbox::gate::{Gate, Metric};
    ///
    /// let gate: Gate = serde_json::from_str(r#"{ "nmse": { "max": 1e-3 }, "worst_head_cosine": { "min": 0.99 } }"#).unwrap();
    /// let verdict = gate.judge(|metric| match metric {
    ///     Metric::Nmse => Some(2e-3),
    ///     _ => None,
    /// });
    /// assert_eq!(verdict.to_string(), "nmse 0.002, at most 0.001; worst_head_cosine was not measured, at least 0.99");
    /// ```
    pub fn judge(&self, measured: impl Fn(Metric) -> Option<f64>) -> Verdict {
        let violation = |(metric, limit): (&Metric, &Limit)| {
            let value = measured(*metric);
            // Written so that NaN passes nothing.
            let low = limit.min.is_none_or(|min| value.is_some_and(|value| value >= min));
            let high = limit.max.is_none_or(|max| value.is_some_and(|value| value <= max));
            let measured = value.is_some();
            (!(low && high && measured)).then_some(Violation { metric: *metric, value, limit: *limit })
        };
        Verdict { violations: self.0.iter().filter_map(violation).collect() }
    }
}

/// A limit that does not hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Violation {
    /// What was measured.
    pub metric: Metric,
    /// Its value; none if it was not measured. One that is not finite is read back from JSON as none.
    pub value: Option<f64>,
    /// What it may be.
    pub limit: Limit,
}

impl Violation {
    /// How far the value is from its limit, as a multiple: 1 is twice as bad as allowed. Infinite if nothing was measured.
    pub fn excess(&self) -> f64 {
        let Some(value) = self.value.filter(|value| !value.is_nan()) else { return f64::INFINITY };
        let badness = |number: f64| if self.metric.is_share() { 1.0 - number } else { number };
        let (value, least, most) = if self.metric.is_share() {
            (badness(value), self.limit.max.map(badness), self.limit.min.map(badness))
        } else {
            (value, self.limit.min, self.limit.max)
        };
        let over = |value: f64, limit: f64| (value / limit.max(f64::MIN_POSITIVE) - 1.0).max(0.0);
        most.map_or(0.0, |most| over(value, most)).max(least.map_or(0.0, |least| over(least, value)))
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.value {
            Some(value) => write!(f, "{} {}, {}", self.metric, short(value), self.limit),
            None => write!(f, "{} was not measured, {}", self.metric, self.limit),
        }
    }
}

/// A number with up to six digits that count.
fn short(value: f64) -> String {
    let rounded: f64 = format!("{value:.5e}").parse().unwrap_or(value);
    if rounded == 0.0 || (1e-4..1e6).contains(&rounded.abs()) { rounded.to_string() } else { format!("{rounded:e}") }
}

/// What a gate says of a row.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The limits that do not hold, in the order of their metrics; a row without any passes.
    pub violations: Vec<Violation>,
}

impl Verdict {
    /// Whether every limit holds.
    pub fn passed(&self) -> bool {
        self.violations.is_empty()
    }

    /// How far the worst violated limit is exceeded, see [`Violation::excess`]; 0 if all hold.
    pub fn excess(&self) -> f64 {
        self.violations.iter().map(Violation::excess).fold(0.0, f64::max)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (idx, violation) in self.violations.iter().enumerate() {
            let comma = if idx == 0 { "" } else { "; " };
            write!(f, "{comma}{violation}")?;
        }
        if self.passed() { f.write_str("pass") } else { Ok(()) }
    }
}

/// A pipeline as results files know it.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    /// What the first file calls it.
    pub name: String,
    /// The resolved pipeline.
    pub pipeline: Value,
    /// What was measured, by any file; of several values the worst.
    pub measured: BTreeMap<Metric, f64>,
    /// Where it failed, and how.
    pub failures: Vec<String>,
}

/// The pipelines of results files.
#[derive(Clone, Debug, Default)]
pub struct Candidates {
    rows: Vec<Candidate>,
    problems: Vec<String>,
}

/// What all results files have; the rest is passed over.
#[derive(Deserialize)]
struct ResultsFile {
    rows: Vec<ResultsRow>,
    #[serde(default)]
    problems: Vec<String>,
    #[serde(default)]
    canaries: Vec<ResultsCanary>,
}

#[derive(Deserialize)]
struct ResultsRow {
    name: String,
    pipeline: Value,
    state: String,
    #[serde(default)]
    reason: Option<String>,
    #[serde(deserialize_with = "read_measured")]
    measured: BTreeMap<Metric, f64>,
}

#[derive(Deserialize)]
struct ResultsCanary {
    name: String,
    problem: Option<String>,
}

impl Candidates {
    /// Takes in a results file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if it is none, or holds no rows.
    pub fn add(&mut self, results: &Value) -> Result<()> {
        let file = ResultsFile::deserialize(results)
            .map_err(|error| Error::invalid_input(format!("expected results of a sweep or of a model: {error}")))?;
        if file.rows.is_empty() {
            return Err(Error::invalid_input("expected rows, got none"));
        }
        let canaries = file.canaries.into_iter();
        self.problems
            .extend(canaries.filter_map(|canary| Some(format!("canary `{}`: {}", canary.name, canary.problem?))));
        self.problems.extend(file.problems);
        // The dense cache and the controls are what others are measured against.
        for row in file.rows.into_iter().filter(|row| !row.pipeline.is_null()) {
            let known = self.rows.iter_mut().position(|held| held.pipeline == row.pipeline);
            let idx = known.unwrap_or_else(|| {
                let (name, pipeline) = (row.name.clone(), row.pipeline.clone());
                self.rows.push(Candidate { name, pipeline, measured: BTreeMap::new(), failures: Vec::new() });
                self.rows.len() - 1
            });
            let held = &mut self.rows[idx];
            if row.state != "ok" {
                held.failures.push(format!("{}: {}", row.state, row.reason.unwrap_or_default()));
            }
            for (metric, value) in row.measured {
                let least_good = held.measured.entry(metric).or_insert(value);
                let is_worse = if metric.is_better_high() { value < *least_good } else { value > *least_good };
                if is_worse || value.is_nan() {
                    *least_good = value;
                }
            }
        }
        Ok(())
    }

    /// What controls of the files did that they must not do.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// The verdict on each pipeline that ran everywhere; the others fail whatever the limits are.
    pub fn judge(&self, gate: &Gate) -> Vec<(&Candidate, Verdict)> {
        let verdict = |candidate: &Candidate| {
            gate.judge(|metric| candidate.measured.get(&metric).copied().filter(|_| candidate.failures.is_empty()))
        };
        self.rows.iter().map(|candidate| (candidate, verdict(candidate))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(text: &str) -> Gate {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn limits_are_inclusive_and_nan_passes_nothing() {
        let gate = gate(r#"{ "nmse": { "max": 0.5 }, "cosine": { "min": 0.5 } }"#);
        assert!(gate.judge(|_| Some(0.5)).passed());
        assert_eq!(gate.judge(|_| Some(f64::NAN)).violations.len(), 2);
        assert_eq!(gate.judge(|_| None).violations.len(), 2);
    }

    #[test]
    fn excess_is_relative_to_the_limit_and_for_shares_to_their_distance_from_one() {
        let nmse = gate(r#"{ "nmse": { "max": 0.001 } }"#).judge(|_| Some(0.003));
        assert!((nmse.excess() - 2.0).abs() < 1e-9);
        let cosine = gate(r#"{ "worst_head_cosine": { "min": 0.99 } }"#).judge(|_| Some(0.97));
        assert!((cosine.excess() - 2.0).abs() < 1e-9);
        let ratio = gate(r#"{ "ratio": { "min": 4 } }"#).judge(|_| Some(2.0));
        assert!((ratio.excess() - 1.0).abs() < 1e-9);
        assert!(gate(r#"{ "kl_p99": { "max": 1 } }"#).judge(|_| None).excess().is_infinite());
        assert!(gate("{}").judge(|_| None).excess() < f64::MIN_POSITIVE);
    }

    #[test]
    fn rows_of_one_pipeline_are_put_together_and_what_is_missing_fails() {
        let row = |pipeline: &str, measured: Value| serde_json::json!({ "name": pipeline, "pipeline": { "id": pipeline }, "state": "ok", "measured": measured });
        let quality = serde_json::json!({ "rows": [
            row("a", serde_json::json!({ "resident_ratio": 3.2, "token_kl_p99": 0.1 })),
            row("a", serde_json::json!({ "resident_ratio": 2.9, "token_kl_p99": 0.2 })),
            row("b", serde_json::json!({ "resident_ratio": 4.0, "token_kl_p99": 0.1 })),
            { "name": "dense", "pipeline": null, "state": "ok", "measured": {} },
            { "name": "c", "pipeline": { "id": "c" }, "state": "panicked", "reason": "at b", "measured": {} },
        ] });
        let speed = serde_json::json!({ "rows": [row("b", serde_json::json!({ "decode_drop": 0.02 }))] });
        let gate = gate(
            r#"{ "resident_ratio": { "min": 3 }, "token_kl_p99": { "max": 0.15 }, "decode_drop": { "max": 0.05 } }"#,
        );
        let mut candidates = Candidates::default();
        candidates.add(&quality).unwrap();
        assert!(candidates.judge(&gate).iter().all(|(_, verdict)| !verdict.passed()), "no speed, no pass");
        candidates.add(&speed).unwrap();
        let judged = candidates.judge(&gate);
        let verdicts: Vec<String> = judged.iter().map(|(row, verdict)| format!("{}: {verdict}", row.name)).collect();
        assert_eq!(
            verdicts[0],
            "a: resident_ratio 2.9, at least 3; decode_drop was not measured, at most 0.05; token_kl_p99 0.2, at most 0.15"
        );
        assert_eq!(verdicts[1], "b: pass");
        assert!(verdicts[2].starts_with("c: resident_ratio was not measured"));
        let broken = serde_json::json!({ "rows": [row("b", serde_json::json!({}))], "problems": ["control"] });
        candidates.add(&broken).unwrap();
        assert_eq!(candidates.problems(), ["control"]);
        assert!(Candidates::default().add(&serde_json::json!({ "rows": [] })).is_err());
        assert!(Candidates::default().add(&serde_json::json!([1])).is_err());
    }

    #[test]
    fn limits_that_say_nothing_or_cannot_hold_are_refused_with_their_pointer() {
        let check = |text| gate(text).check("/gate").unwrap_err().to_string();
        assert_eq!(check(r#"{ "nmse": {} }"#), "`/gate/nmse`: expected `min`, `max` or both, got neither");
        assert_eq!(
            check(r#"{ "mae": { "min": 2, "max": 1 } }"#),
            "`/gate/mae`: expected `min` up to `max`, got 2 and 1"
        );
        assert_eq!(check(r#"{ "cosine": { "min": 1.5 } }"#), "`/gate/cosine`: expected `min` up to 1, got 1.5");
        assert!(Gate::default().check("/gate").is_ok());
    }
}
