//! Quality of a model through the very cache that was compressed: teacher-forced, token by token, beside the dense cache.

use std::collections::BTreeMap;

use gearbox_core::{Error, Result};
use gearbox_model::{Cache, CacheLedger, CacheOptions, LayerStep, Model, Step, Timings, most_probable};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::Value;

use super::shadow::{OutputErrors, Shadow};
use super::{Arm, CORRUPT, IDENTITY, log_softmax};
use crate::gate::{Gate, Metric, Verdict};
use crate::receipt::Receipt;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens of each window that are read as a prompt, unscored.
    pub prompt: usize,
    /// Tokens that follow, each one a decode step, scored by what the model says of the next token.
    pub tokens: usize,
    /// Windows of the text, one behind the other from its start; fewer if the text ends.
    pub windows: usize,
    /// How caches hold tokens; the pipeline is that of the arm.
    pub cache: CacheOptions,
    /// Attention is compared with the dense one in every so many decode steps.
    pub attention_every: usize,
}

/// All arms and what they are measured against.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Program, machine and threads.
    pub receipt: Receipt,
    /// Tokens of each window that were read as a prompt.
    pub prompt_tokens: usize,
    /// Scored tokens of each window.
    pub tokens: usize,
    /// Windows.
    pub windows: usize,
    /// Perplexity through the dense cache: `exp` of the mean negative log-likelihood.
    pub dense_perplexity: f64,
    /// The limits that rows are judged by, if any were given.
    pub gate: Option<Gate>,
    /// One row per arm; controls first.
    pub rows: Vec<Row>,
    /// What a control did that it must not do; none if all is well.
    pub problems: Vec<String>,
}

/// One arm.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Name of the arm.
    pub name: String,
    /// The resolved pipeline.
    pub pipeline: Value,
    /// `ok`, or how it failed in a word.
    pub state: String,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: Option<f64>,
    /// Mean increase of the negative log-likelihood per token over the dense cache, in nats.
    pub nll_increase: Option<f64>,
    /// Half the width of its 95 % interval, from the spread over tokens as if they were independent.
    pub nll_increase_ci95: Option<f64>,
    /// What the gate looks at.
    pub measured: BTreeMap<Metric, f64>,
    /// Layer and query head with the largest attention error.
    pub worst_head: Option<(usize, usize)>,
    /// Resident bytes of the last window.
    pub ledger: Option<CacheLedger>,
    /// Where the time of the last window went.
    pub timings: Option<Timings>,
    /// What the gate says.
    pub verdict: Option<Verdict>,
}

impl Row {
    /// Whether it ran to the end.
    pub fn is_ok(&self) -> bool {
        self.reason.is_none()
    }
}

/// Negative log-likelihoods and divergences of an arm, over all scored tokens.
#[derive(Default)]
struct Tally {
    /// In nats, arm and dense.
    nll: Vec<[f64; 2]>,
    /// Divergence of the dense distribution from the arm's, in nats.
    kl: Vec<f64>,
    agree: usize,
    /// Sums over steps: tokens seen and left, all layers.
    seen: f64,
    live: f64,
    /// Sums over windows: dense and resident bytes, each averaged over the steps.
    dense_bytes: f64,
    bytes: f64,
    errors: OutputErrors,
    last: Option<(CacheLedger, Timings)>,
}

/// Logits of the dense cache over one window.
struct Dense<'a> {
    ids: &'a [u32],
    /// `(tokens, vocab)`.
    logits: Vec<f32>,
}

/// Runs all arms over windows of a text.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if the text is shorter than one window or the window longer than the context; an arm that fails is a row that
/// says so.
pub fn run(
    model: &Model,
    ids: &[u32],
    arms: &[Arm],
    options: &Options,
    gate: Option<&Gate>,
    receipt: Receipt,
    progress: &ProgressBar,
) -> Result<Report> {
    let (prompt, tokens) = (options.prompt, options.tokens);
    let (window, context) = (prompt + tokens, model.config().context);
    if prompt == 0 || tokens == 0 || options.windows == 0 || window > context {
        return Err(Error::invalid_input(format!(
            "expected at least one prompt token, scored token and window, and at most {context} tokens (the context of the model), got a \
             prompt of {prompt} and {tokens} scored tokens in {} windows",
            options.windows
        )));
    }
    // The last scored token needs the one behind it.
    let windows: Vec<&[u32]> =
        (0..options.windows).map_while(|idx| ids.get(idx * window..(idx + 1) * window + 1)).collect();
    if windows.is_empty() {
        let message = format!("expected a text of more than {window} tokens, got {}", ids.len());
        return Err(Error::invalid_input(message));
    }
    let mut tallies: Vec<Result<Tally>> = arms.iter().map(|_| Ok(Tally::default())).collect();
    progress.set_length(((arms.len() + 1) * windows.len() * tokens) as u64);
    for ids in &windows {
        let logits = dense(model, ids, options, progress)?;
        let dense = Dense { ids, logits };
        for (arm, tally) in arms.iter().zip(&mut tallies) {
            if let Ok(sums) = tally
                && let Err(error) = score(model, arm, &dense, options, sums, progress)
            {
                *tally = Err(error);
            }
        }
    }
    let nll = tallies.iter().flatten().map(|tally| tally.nll.iter().map(|pair| pair[1]));
    let dense_nll = nll.map(mean).next().unwrap_or(f64::NAN);
    let rows: Vec<Row> = arms.iter().zip(tallies).map(|(arm, tally)| row(arm, tally, gate)).collect();
    let problems = problems(&rows);
    Ok(Report {
        receipt,
        prompt_tokens: prompt,
        tokens,
        windows: windows.len(),
        dense_perplexity: dense_nll.exp(),
        gate: gate.cloned(),
        rows,
        problems,
    })
}

fn dense(model: &Model, ids: &[u32], options: &Options, progress: &ProgressBar) -> Result<Vec<f32>> {
    let mut cache = model.cache(&CacheOptions { pipeline: None, ..options.cache.clone() })?;
    model.forward(&mut cache, &ids[..options.prompt], Step::silent())?;
    let mut logits = Vec::with_capacity(options.tokens * model.config().vocab_size);
    for id in &ids[options.prompt..ids.len() - 1] {
        logits.extend(model.forward(&mut cache, &[*id], Step::last())?);
        progress.inc(1);
    }
    Ok(logits)
}

fn score(
    model: &Model,
    arm: &Arm,
    dense: &Dense<'_>,
    options: &Options,
    tally: &mut Tally,
    progress: &ProgressBar,
) -> Result<()> {
    let config = model.config();
    let mut cache = model.cache(&CacheOptions { pipeline: arm.pipeline.clone(), ..options.cache.clone() })?;
    let mut shadow = Shadow::new(config, options.cache.dtype, std::mem::take(&mut tally.errors));
    let mut probe = |step: LayerStep<'_>| {
        shadow.step(&step, false);
        Ok(())
    };
    let (prompt, scored) = dense.ids.split_at(options.prompt);
    model.forward(&mut cache, prompt, Step::silent().probe(&mut probe))?;
    let (mut p, mut q) = (Vec::new(), Vec::new());
    let rows = dense.logits.chunks_exact(config.vocab_size);
    for (idx, (pair, dense)) in scored.windows(2).zip(rows).enumerate() {
        let compare = idx % options.attention_every.max(1) == 0;
        let mut probe = |step: LayerStep<'_>| {
            shadow.step(&step, compare);
            Ok(())
        };
        let logits = model.forward(&mut cache, &pair[..1], Step::last().probe(&mut probe))?;
        log_softmax(dense, &mut p);
        log_softmax(&logits, &mut q);
        let target = pair[1] as usize;
        tally.nll.push([-q[target], -p[target]]);
        // Equal logits give zero exactly; rounding must not make a divergence negative.
        tally.kl.push(p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>().max(0.0));
        tally.agree += usize::from(most_probable(dense) == most_probable(&logits));
        let (seen, live) = lengths(&cache);
        (tally.seen, tally.live) = (tally.seen + seen, tally.live + live);
        progress.inc(1);
    }
    tally.errors = shadow.errors;
    let ledger = cache.ledger();
    (tally.dense_bytes, tally.bytes) =
        (tally.dense_bytes + ledger.usage.dense_average, tally.bytes + ledger.usage.average);
    tally.last = Some((ledger, cache.timings()));
    Ok(())
}

/// Tokens seen and left, summed over layers.
fn lengths(cache: &Cache) -> (f64, f64) {
    let layers = cache.ledger().layers;
    layers.iter().fold((0.0, 0.0), |(seen, live), layer| (seen + layer.seen as f64, live + layer.live as f64))
}

fn mean(numbers: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = numbers.fold((0.0, 0u64), |(sum, count), number| (sum + number, count + 1));
    sum / count as f64
}

fn row(arm: &Arm, tally: Result<Tally>, gate: Option<&Gate>) -> Row {
    let empty = Row {
        name: arm.name.clone(),
        pipeline: arm.spec(),
        state: "ok".to_owned(),
        reason: None,
        perplexity: None,
        nll_increase: None,
        nll_increase_ci95: None,
        measured: BTreeMap::new(),
        worst_head: None,
        ledger: None,
        timings: None,
        verdict: None,
    };
    let tally = match tally {
        Ok(tally) => tally,
        Err(error) => {
            return Row { state: error.kind().state().into_owned(), reason: Some(error.to_string()), ..empty };
        }
    };
    let nll = mean(tally.nll.iter().map(|pair| pair[0]));
    let dense = mean(tally.nll.iter().map(|pair| pair[1]));
    let increase = nll - dense;
    let count = tally.nll.len() as f64;
    let variance =
        tally.nll.iter().map(|[arm, dense]| (arm - dense - increase).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    let mut kl = tally.kl;
    kl.sort_by(f64::total_cmp);
    let total = tally.dense_bytes / tally.bytes;
    let lossy = tally.seen / tally.live;
    let mut measured = BTreeMap::from([
        (Metric::ResidentRatio, total),
        (Metric::LossyRatio, lossy),
        (Metric::PerplexityIncrease, increase.exp_m1()),
        (Metric::TokenKlMean, mean(kl.iter().copied())),
        (Metric::TokenKlP99, kl[(kl.len() * 99).div_ceil(100).max(1) - 1]),
        (Metric::Top1Agreement, tally.agree as f64 / count),
    ]);
    if arm.pipeline.as_ref().is_none_or(|pipeline| pipeline.is_lossless()) {
        measured.insert(Metric::LosslessRatio, total / lossy);
    }
    let worst = tally.errors.worst();
    if let Some((error, ..)) = worst {
        measured.insert(Metric::WorstHeadOutputError, error);
    }
    let verdict = gate.map(|gate| gate.judge(|metric| measured.get(&metric).copied()));
    let (ledger, timings) = tally.last.unzip();
    Row {
        perplexity: Some(nll.exp()),
        nll_increase: Some(increase),
        nll_increase_ci95: Some(1.96 * (variance / count).sqrt()),
        measured,
        worst_head: worst.map(|(_, layer, head)| (layer, head)),
        ledger,
        timings,
        verdict,
        ..empty
    }
}

/// What the controls did that they must not do.
fn problems(rows: &[Row]) -> Vec<String> {
    let mut problems = Vec::new();
    for row in rows {
        let kl = row.measured.get(&Metric::TokenKlMean);
        match (row.name.as_str(), kl) {
            (IDENTITY, Some(kl)) if *kl == 0.0 && row.nll_increase == Some(0.0) => {}
            (IDENTITY, kl) => {
                problems.push(format!("control `{IDENTITY}`: expected the dense logits, got a divergence of {kl:?}"));
            }
            (CORRUPT, Some(kl)) if *kl > 0.01 => {}
            (CORRUPT, kl) => {
                problems.push(format!("control `{CORRUPT}`: expected a divergence above 0.01, got {kl:?}"));
            }
            _ => {}
        }
    }
    problems
}
