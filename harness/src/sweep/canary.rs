//! The canaries: two arms that show whether the measuring itself can be trusted.
//!
//! `identity` stores every byte and must come back without any error. `flipped-head` turns the signs of one head around in one chunk, behind
//! the decoder's back: the head with the least energy, so that the cosine over everything hardly moves, in the chunk that holds most of it.
//! Chunks have 128 tokens, in sequences of more than 1024 an eighth of the tokens. The gate must catch it by something that was measured; one
//! that does not is blind to what averages hide, and the sweep fails.

use std::borrow::Cow;

use gearbox_core::{Chunking, Pipeline, PipelineSpec, PluginSpec, Registry, Result};
use serde::{Deserialize, Serialize};

use super::row;
use crate::atomic::AtomicFile;
use crate::compare::{self, Compared, FlippedHead};
use crate::dump::Dump;
use crate::gate::{Gate, Metric};
use crate::metrics::attention::{Attention, AttentionError};
use crate::metrics::error::TensorError;
use crate::{engine, report};

/// Least tokens of the chunk that is broken.
const TOKENS: usize = 128;
/// Most chunks of a sequence, so that what is broken is not lost in a long one.
const CHUNKS: usize = 8;

/// How a canary ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Canary {
    /// `identity` or `flipped-head`.
    pub name: Cow<'static, str>,
    /// The dump, as it was named.
    pub dump: String,
    /// The head that was broken.
    pub flipped: Option<FlippedHead>,
    /// What was measured over everything.
    pub error: TensorError,
    /// Lowest cosine of any head.
    pub worst_head_cosine: Option<f64>,
    /// What attention makes of it, over everything, if the dump holds queries.
    pub attention: Option<AttentionError>,
    /// What did not happen as it must; none if all is well.
    pub problem: Option<String>,
}

/// Runs both canaries over a dump.
///
/// # Errors
/// What reading the dump and writing the temporary container report.
pub fn run(dump: &Dump, gate: &Gate, registry: &Registry, attention: Option<&Attention>) -> Result<[Canary; 2]> {
    let layers = dump.runs.iter().flat_map(|run| &run.layers);
    let longest = layers.map(|layer| layer.entries.iter().map(|entry| entry.seq).sum::<usize>()).max().unwrap_or(0);
    let tokens = longest.div_ceil(CHUNKS).max(TOKENS);
    let spec = PipelineSpec::of_codec(PluginSpec::new("store"), Chunking::ChunkedGrouped { tokens });
    let folder = tempfile::tempdir().map_err(|error| gearbox_core::Error::io(std::env::temp_dir(), &error))?;
    let path = folder.path().join("canary.gbx");
    let mut pipeline = Pipeline::build(&spec, registry)?;
    let bar = report::progress(3 * dump.original_bytes(), "canaries");
    let (out, _) = engine::encode(dump, &mut pipeline, AtomicFile::create(&path, false)?, &bar)?;
    out.commit()?;
    let container = row::open(&path)?;
    let compare = |flipped| {
        let options = compare::Options { attention, flipped };
        compare::with_dump(&container, &pipeline, dump, options, &bar)
    };
    let exact = compare(None)?;
    let flipped = quietest(&exact);
    let broken = flipped.as_ref().map(|head| compare(Some(head))).transpose()?;
    bar.finish_and_clear();
    let identity = Canary { problem: identity_problem(&exact), ..Canary::new("identity", dump, &exact) };
    let flipped = match broken {
        Some(broken) => {
            Canary { flipped, problem: flipped_problem(&broken, gate), ..Canary::new("flipped-head", dump, &broken) }
        }
        None => Canary {
            problem: Some("expected a head with energy to break, got none: every element of the dump is zero".into()),
            ..Canary::new("flipped-head", dump, &exact)
        },
    };
    Ok([identity, flipped])
}

impl Canary {
    fn new(name: &'static str, dump: &Dump, compared: &Compared) -> Self {
        let all = compared.error_report().all;
        Self {
            name: name.into(),
            dump: dump.path.display().to_string(),
            flipped: None,
            error: all.error,
            worst_head_cosine: all.worst_cosine.map(|head| head.error.cosine),
            attention: compared.attention_report().map(|report| report.all),
            problem: None,
        }
    }
}

/// The head with the least energy that is not zero.
fn quietest(compared: &Compared) -> Option<FlippedHead> {
    let heads = compared.sums.iter().zip(&compared.loudest_chunks);
    let loud = heads.filter(|(placed, _)| placed.sums.sum_original > 0.0);
    let (quietest, chunk) = loud.min_by(|(a, _), (b, _)| a.sums.sum_original.total_cmp(&b.sums.sum_original))?;
    let (run, layer, role, head) = (quietest.run.clone(), quietest.layer, quietest.role, quietest.head);
    Some(FlippedHead { run, layer, role, head, chunk: *chunk })
}

fn identity_problem(compared: &Compared) -> Option<String> {
    let error = compared.error_report().all.error;
    let of_attention = compared.attention_report().map(|report| report.all);
    let zero = |numbers: &[f64]| numbers.iter().all(|number| *number == 0.0);
    let exact = error.changed == 0 && zero(&[error.mae, error.rmse, error.nmse, error.max_abs]);
    let attends = of_attention.as_ref().is_none_or(|attention| {
        let AttentionError { logit_rmse, logit_max, kl_mean, kl_p99, kl_max, output_error, .. } = attention;
        zero(&[*logit_rmse, *logit_max, *kl_mean, *kl_p99, *kl_max, *output_error])
    });
    match compared.decoded.failures.first() {
        Some(failure) => Some(failure.to_string()),
        None if exact && attends => None,
        None => Some(format!("expected no error at all, got {error:?}, {of_attention:?}")),
    }
}

fn flipped_problem(compared: &Compared, gate: &Gate) -> Option<String> {
    let (error, attention) = (compared.error_report(), compared.attention_report());
    // Limits on bytes say nothing here, where everything is stored as it is.
    let limits = gate.0.iter().filter(|(metric, _)| !matches!(metric, Metric::Ratio | Metric::BitsPerValue));
    let gate = Gate(limits.map(|(metric, limit)| (*metric, *limit)).collect());
    let verdict = gate.judge(|metric| row::quality(metric, Some(&error), attention.as_ref()));
    let caught = verdict.violations.iter().any(|violation| violation.value.is_some());
    (!caught).then(|| "the gate lets a head with turned signs pass; tighten `worst_head_cosine`".to_owned())
}
