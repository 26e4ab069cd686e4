//! Speed and memory of decoding through a compressed and evicted cache, beside the dense one: interleaved, the same tokens in every arm.

use std::time::Instant;

use gearbox_core::{Error, Result};
use gearbox_model::{CacheLedger, CacheOptions, Model, Step, Timings};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

use super::Arm;
use crate::bench::resident_bytes;
use crate::gate::Metric;
use crate::receipt::Receipt;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens decoded behind the prompt.
    pub tokens: usize,
    /// Times that every arm runs.
    pub repeat: usize,
    /// How caches hold tokens; the pipeline is that of the arm.
    pub cache: CacheOptions,
}

/// Middle value and both ends of repeated measurements. The ends hold the median with probability `1 - 2^(1 - repeats)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Middle value.
    pub median: f64,
    /// Lowest value.
    pub low: f64,
    /// Highest value.
    pub high: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (low, high) = (values.first().copied().unwrap_or(f64::NAN), values.last().copied().unwrap_or(f64::NAN));
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 if middle > 0 => f64::midpoint(values[middle - 1], values[middle]),
            _ => values.get(middle).copied().unwrap_or(f64::NAN),
        };
        Self { median, low, high }
    }
}

/// All arms.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Program, machine and threads.
    pub receipt: Receipt,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded behind it, the same in every arm.
    pub tokens: usize,
    /// Times that every arm ran.
    pub repeat: usize,
    /// One row per arm, the dense cache first.
    pub rows: Vec<Row>,
}

/// One arm.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Name of the arm.
    pub name: String,
    /// The resolved pipeline; null for the dense cache.
    pub pipeline: Value,
    /// `ok`, or how it failed in a word.
    pub state: String,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Decoded tokens per second.
    pub decode_tps: Option<Spread>,
    /// Tokens of the prompt per second.
    pub prefill_tps: Option<Spread>,
    /// 1 − speed ÷ dense speed of the same repeat.
    pub decode_drop: Option<Spread>,
    /// Nanoseconds per decoded token by phase, from the median repeat.
    pub per_token_ns: Option<Phases>,
    /// What the gate looks at.
    pub measured: BTreeMap<Metric, f64>,
    /// Resident bytes.
    pub ledger: Option<CacheLedger>,
    /// Resident memory of the whole process after the arm's last repeat, where the system tells.
    pub process_rss_bytes: Option<u64>,
}

/// Where the time of a decoded token goes, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Phases {
    /// Handing attention probabilities to policies.
    pub score: f64,
    /// Decisions of policies.
    pub plan: f64,
    /// Moving the tokens that stay.
    pub r#move: f64,
    /// Encoding.
    pub encode: f64,
    /// Decoding.
    pub decode: f64,
    /// Attention.
    pub attention: f64,
    /// Everything else.
    pub rest: f64,
}

impl Phases {
    fn between(before: Timings, after: Timings, tokens: usize) -> Self {
        let per = |phase: fn(&Timings) -> u64| (phase(&after) - phase(&before)) as f64 / tokens as f64;
        Self {
            score: per(|t| t.score_ns),
            plan: per(|t| t.plan_ns),
            r#move: per(|t| t.move_ns),
            encode: per(|t| t.encode_ns),
            decode: per(|t| t.decode_ns),
            attention: per(|t| t.attention_ns),
            rest: per(|t| t.rest_ns),
        }
    }

    /// What policies cost, as a share of all.
    pub fn eviction_share(&self) -> f64 {
        let evict = self.score + self.plan + self.r#move;
        evict / (evict + self.encode + self.decode + self.attention + self.rest)
    }
}

/// One run of one arm.
struct Once {
    prefill_tps: f64,
    decode_tps: f64,
    phases: Phases,
    ledger: CacheLedger,
}

/// Runs every arm `repeat` times, interleaved, in an order that turns around each time.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for an empty prompt, nothing to decode, or more tokens than the
/// context of the model; an arm that fails is a row that says so.
pub fn run(
    model: &Model,
    prompt: &[u32],
    arms: &[Arm],
    options: &Options,
    receipt: Receipt,
    progress: &ProgressBar,
) -> Result<Report> {
    let (tokens, context) = (options.tokens, model.config().context);
    if prompt.is_empty() || tokens == 0 || options.repeat == 0 || prompt.len() + tokens > context {
        return Err(Error::invalid_input(format!(
            "expected a prompt, tokens to decode, repeats, and at most {context} tokens in all, got {} of the prompt, {tokens} to decode, {} \
             repeats",
            prompt.len(),
            options.repeat
        )));
    }
    // Every arm decodes what the dense cache makes of the prompt, so that all do the same work.
    let mut cache = model.cache(&options.cache)?;
    let ids = model.greedy(&mut cache, prompt, tokens, &[])?;
    drop(cache);
    let arms: Vec<Arm> = std::iter::once(Arm::dense()).chain(arms.iter().cloned()).collect();
    progress.set_length(((options.repeat + 1) * arms.len()) as u64);
    let mut runs: Vec<Result<Vec<Once>>> = Vec::new();
    // A first round warms up, and shows which arms run at all.
    for arm in &arms {
        runs.push(once(model, arm, prompt, &ids, options).map(|_| Vec::new()));
        progress.inc(1);
    }
    let mut rss = vec![None; arms.len()];
    for round in 0..options.repeat {
        let order: Vec<usize> =
            if round % 2 == 0 { (0..arms.len()).collect() } else { (0..arms.len()).rev().collect() };
        for idx in order {
            if let Ok(held) = &mut runs[idx] {
                match once(model, &arms[idx], prompt, &ids, options) {
                    Ok(run) => held.push(run),
                    Err(error) => runs[idx] = Err(error),
                }
                rss[idx] = resident_bytes();
            }
            progress.inc(1);
        }
    }
    let dense: Vec<f64> = runs[0].iter().flatten().map(|run| run.decode_tps).collect();
    let rows = arms.iter().zip(runs).zip(rss).map(|((arm, runs), rss)| row(arm, runs, &dense, rss)).collect();
    Ok(Report { receipt, prompt_tokens: prompt.len(), tokens, repeat: options.repeat, rows })
}

fn once(model: &Model, arm: &Arm, prompt: &[u32], ids: &[u32], options: &Options) -> Result<Once> {
    let mut cache = model.cache(&CacheOptions { pipeline: arm.pipeline.clone(), ..options.cache.clone() })?;
    let start = Instant::now();
    model.forward(&mut cache, prompt, Step::last())?;
    let prefill = start.elapsed().as_secs_f64();
    let before = cache.timings();
    let start = Instant::now();
    for id in ids {
        model.forward(&mut cache, &[*id], Step::last())?;
    }
    let decode = start.elapsed().as_secs_f64();
    Ok(Once {
        prefill_tps: prompt.len() as f64 / prefill,
        decode_tps: ids.len() as f64 / decode,
        phases: Phases::between(before, cache.timings(), ids.len()),
        ledger: cache.ledger(),
    })
}

fn row(arm: &Arm, runs: Result<Vec<Once>>, dense: &[f64], process_rss_bytes: Option<u64>) -> Row {
    let empty = Row {
        name: arm.name.clone(),
        pipeline: arm.spec(),
        state: "ok".to_owned(),
        reason: None,
        decode_tps: None,
        prefill_tps: None,
        decode_drop: None,
        per_token_ns: None,
        measured: BTreeMap::new(),
        ledger: None,
        process_rss_bytes,
    };
    let mut runs = match runs {
        Ok(runs) => runs,
        Err(error) => {
            return Row { state: error.kind().state().into_owned(), reason: Some(error.to_string()), ..empty };
        }
    };
    let drop = Spread::of(runs.iter().zip(dense).map(|(run, dense)| 1.0 - run.decode_tps / dense).collect());
    let decode = Spread::of(runs.iter().map(|run| run.decode_tps).collect());
    let prefill = Spread::of(runs.iter().map(|run| run.prefill_tps).collect());
    runs.sort_by(|a, b| a.decode_tps.total_cmp(&b.decode_tps));
    let middle = runs.len() / 2;
    let Some(run) = runs.into_iter().nth(middle) else { return empty };
    Row {
        decode_tps: Some(decode),
        prefill_tps: Some(prefill),
        decode_drop: Some(drop),
        per_token_ns: Some(run.phases),
        measured: BTreeMap::from([
            (Metric::DecodeDrop, drop.median),
            (Metric::ResidentRatio, run.ledger.usage.average_ratio()),
        ]),
        ledger: Some(run.ledger),
        ..empty
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_of_the_middle_and_the_ends() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { median: 2.0, low: 1.0, high: 3.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]), Spread { median: 2.5, low: 1.0, high: 4.0 });
        assert!(Spread::of(Vec::new()).median.is_nan());
    }
}
