//! One row of a sweep: one pipeline over one dump.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use gearbox_core::container::Container;
use gearbox_core::ledger::Ledger;
use gearbox_core::{Error, ErrorKind, Limits, Pipeline, Registry, Result, Role};
use indicatif::ProgressBar;
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::{Label, Unit};
use crate::atomic::AtomicFile;
use crate::compare::{self, Compared};
use crate::dump::Dump;
use crate::engine::{self, SequenceCost};
use crate::gate::{self, Gate, Metric, Verdict};
use crate::metrics::attention::{Attention, AttentionReport};
use crate::metrics::error::ErrorReport;

/// How one pipeline ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Decoded from stored bytes and compared.
    Ok,
    /// Not legal for this dump.
    Unsupported(String),
    /// An error, or decoded data that is not what the pipeline promises.
    Failed {
        /// How, in a word: `error`, `mismatch`, `panicked` and the others of [`ErrorKind::state`], but never `unsupported`; `io` if the
        /// machine refused a file operation.
        state: Cow<'static, str>,
        /// Why.
        reason: String,
    },
}

impl Outcome {
    /// How a pipeline ended that was not built: its settings do not go together, or a plugin failed.
    pub(super) fn of_unbuilt(error: &Error) -> Self {
        match error.kind() {
            ErrorKind::InvalidConfig => Self::Unsupported(error.to_string()),
            _ => Self::failed(error),
        }
    }

    pub(super) fn failed(error: &Error) -> Self {
        let state = match error.kind() {
            // What was encoded and does not come back is no harmless refusal.
            ErrorKind::Unsupported | ErrorKind::UnsupportedDType => "error".into(),
            ErrorKind::Io => "io".into(),
            kind => kind.state(),
        };
        Self::Failed { state, reason: error.to_string() }
    }

    /// Whether the machine may be to blame, so that another try may end otherwise: a file operation was refused, or a process with a plugin was
    /// killed, took too long or asked for too much memory.
    pub fn is_transient(&self) -> bool {
        Self::TRANSIENT.contains(&self.state())
    }

    /// The states of [`Outcome::is_transient`].
    pub(crate) const TRANSIENT: [&'static str; 4] = ["io", "timed-out", "out-of-memory", "crashed(SIGKILL)"];

    /// The state in a word.
    pub fn state(&self) -> &str {
        match self {
            Self::Ok => "ok",
            Self::Unsupported(_) => "unsupported",
            Self::Failed { state, .. } => state,
        }
    }

    /// Why it did not end well.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Ok => None,
            Self::Unsupported(reason) | Self::Failed { reason, .. } => Some(reason),
        }
    }
}

impl Serialize for Outcome {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("state", self.state())?;
        if let Some(reason) = self.reason() {
            map.serialize_entry("reason", reason)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Outcome {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Read {
            state: String,
            #[serde(default)]
            reason: Option<String>,
        }
        let Read { state, reason } = Read::deserialize(deserializer)?;
        let reason = reason.unwrap_or_default();
        Ok(match state.as_str() {
            "ok" => Self::Ok,
            "unsupported" => Self::Unsupported(reason),
            _ => Self::Failed { state: state.into(), reason },
        })
    }
}

/// Original and stored bytes of one role.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleBytes {
    /// Bytes of the original tensors.
    pub original_bytes: u64,
    /// Bytes of chunks and sequence headers of this role; what belongs to the whole file is counted in the total only.
    pub stored_bytes: u64,
}

/// One row of a sweep: one pipeline over one dump.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The pipeline in a few words.
    pub name: String,
    /// Chunking mode.
    pub chunking: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// What the gate says; none if the row did not end well.
    pub verdict: Option<Verdict>,
    /// Whether no other row of the dump beats it in bytes, worst-head error, encoding and decoding time at once.
    pub pareto: bool,
    /// The dump, as it was named.
    pub dump: String,
    /// The container in the output folder, if it was kept.
    pub container: Option<String>,
    /// Bytes of the original tensors.
    pub original_bytes: u64,
    /// Bytes of the container file, all of them.
    pub stored_bytes: u64,
    /// What the pipeline promises, less what the conformance kit refuted of its loaded plugins.
    pub labels: Vec<Label>,
    /// Original elements.
    pub values: u64,
    /// 8 × stored bytes ÷ original elements, if the pipeline encoded them.
    pub bits_per_value: Option<f64>,
    /// Order-0 floor of the dump in bits per value, see [`crate::entropy`].
    pub floor: Option<f64>,
    /// Bits per value − floor: below zero where the pipeline found structure beyond order 0, or lost something.
    pub gap: Option<f64>,
    /// Keys.
    pub key: RoleBytes,
    /// Values.
    pub value: RoleBytes,
    /// Elements that came back with other bits.
    pub changed_values: u64,
    /// Elements that a transform keeps exact beside its codes: those of lanes named `outliers`.
    pub escapes: u64,
    /// Error of the decoded tensors, measured in the type that attention reads.
    pub error: Option<ErrorReport>,
    /// What attention makes of it, if the dump holds queries.
    pub attention: Option<AttentionReport>,
    /// What a gate looks at, by name.
    #[serde(deserialize_with = "gate::read_measured")]
    pub measured: BTreeMap<Metric, f64>,
    /// Encoding time, summed over chunks, one thread each.
    pub encode_ns: u64,
    /// Decoding time, summed over chunks, one thread each.
    pub decode_ns: u64,
    /// Stored bytes by account; they sum to `stored_bytes`.
    pub ledger: Vec<LedgerRow>,
    /// Cost of encoding per run, layer and role.
    pub sequences: Vec<SequenceCost>,
    /// The resolved pipeline.
    pub pipeline: Value,
}

/// One account of a ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerRow {
    /// What the bytes are for, and where they belong.
    #[serde(flatten)]
    pub account: gearbox_core::ledger::Account,
    /// Stored bytes.
    pub bytes: u64,
}

impl Row {
    /// The row of a unit before anything was measured.
    pub(super) fn new(dump: &Dump, unit: &Unit) -> Self {
        Self {
            name: unit.name.clone(),
            chunking: unit.pipeline.chunking.to_string(),
            outcome: Outcome::Ok,
            verdict: None,
            pareto: false,
            dump: unit.dump.clone(),
            container: None,
            original_bytes: dump.original_bytes(),
            stored_bytes: 0,
            labels: Vec::new(),
            values: 0,
            bits_per_value: None,
            floor: None,
            gap: None,
            key: RoleBytes::default(),
            value: RoleBytes::default(),
            changed_values: 0,
            escapes: 0,
            error: None,
            attention: None,
            measured: BTreeMap::new(),
            encode_ns: 0,
            decode_ns: 0,
            ledger: Vec::new(),
            sequences: Vec::new(),
            pipeline: unit.pipeline.to_value(),
        }
    }

    /// Takes the verdict of a gate; a row that did not end well gets none.
    pub(crate) fn judge(&mut self, gate: &Gate) {
        self.verdict = self.is_ok().then(|| gate.judge(|metric| self.measured(metric)));
    }

    /// Whether it was decoded and is what the pipeline promises.
    pub fn is_ok(&self) -> bool {
        self.outcome == Outcome::Ok
    }

    /// A number by its name, if it was measured.
    pub fn measured(&self, metric: Metric) -> Option<f64> {
        self.measured.get(&metric).copied()
    }

    fn measure(&self, metric: Metric) -> Option<f64> {
        match metric {
            Metric::Ratio => (self.stored_bytes > 0).then(|| self.original_bytes as f64 / self.stored_bytes as f64),
            Metric::BitsPerValue => self.bits_per_value,
            metric => quality(metric, self.error.as_ref(), self.attention.as_ref()),
        }
    }

    pub(super) fn fill(
        &mut self,
        dump: &Dump,
        pipeline: &mut Pipeline,
        registry: &Registry,
        out: AtomicFile,
        attention: Option<&Attention>,
        bar: &ProgressBar,
    ) -> Result<Outcome> {
        let path = out.path().to_path_buf();
        let (out, encoded) = match engine::encode(dump, pipeline, out, bar) {
            // Only what a pipeline cannot take is harmless; a file that does not come back never is.
            Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::UnsupportedDType) => {
                return Ok(Outcome::Unsupported(error.to_string()));
            }
            encoded => encoded?,
        };
        out.commit()?;
        self.stored_bytes = encoded.ledger.total();
        let container = open(&path)?;
        check_ledger(&encoded.ledger, container.ledger(), container.file_bytes())?;
        // Decoding starts from the file alone: the pipeline is built again from its header.
        let decoder = container.pipeline(registry)?;
        let options = compare::Options { attention, flipped: None };
        let compared = compare::with_dump(&container, &decoder, dump, options, bar)?;
        for cost in &encoded.sequences {
            self.encode_ns += cost.ns;
            let role = match cost.role {
                Role::Key => &mut self.key,
                Role::Value => &mut self.value,
            };
            role.original_bytes += cost.original_bytes;
        }
        self.key.stored_bytes = encoded.ledger.sum(|account| account.role == Some(Role::Key));
        self.value.stored_bytes = encoded.ledger.sum(|account| account.role == Some(Role::Value));
        self.decode_ns = compared.decoded.sequences.iter().map(|cost| cost.ns).sum();
        self.values = compared.values;
        self.bits_per_value = Some(self.stored_bytes as f64 * 8.0 / self.values as f64);
        self.changed_values = compared.changed_values;
        self.escapes = encoded.escapes;
        self.ledger =
            encoded.ledger.rows().map(|(account, bytes)| LedgerRow { account: account.clone(), bytes }).collect();
        self.sequences = encoded.sequences;
        let outcome = outcome(&compared, decoder.is_lossless());
        self.error = Some(compared.error_report());
        self.attention = compared.attention_report();
        self.measured =
            Metric::OF_DUMPS.into_iter().filter_map(|metric| Some((metric, self.measure(metric)?))).collect();
        Ok(outcome)
    }
}

/// A number that tells how far decoded tensors are from the original ones.
pub(super) fn quality(metric: Metric, error: Option<&ErrorReport>, attention: Option<&AttentionReport>) -> Option<f64> {
    let all = error.map(|error| &error.all);
    // Without a query that can be replayed nothing is known.
    let attention = attention.filter(|attention| attention.all.queries > 0);
    let of_role = |role| {
        let mut roles = error?.roles.iter();
        roles.find(|error| error.role == Some(role)).map(|error| &error.error)
    };
    let (key, value) = (|| of_role(Role::Key), || of_role(Role::Value));
    Some(match metric {
        Metric::Ratio
        | Metric::BitsPerValue
        | Metric::ResidentRatio
        | Metric::LossyRatio
        | Metric::LosslessRatio
        | Metric::DecodeDrop
        | Metric::PerplexityIncrease
        | Metric::TokenKlMean
        | Metric::TokenKlP99
        | Metric::Top1Agreement => return None,
        Metric::Mae => all?.error.mae,
        Metric::Rmse => all?.error.rmse,
        Metric::Nmse => all?.error.nmse,
        Metric::MaxAbs => all?.error.max_abs,
        Metric::Cosine => all?.error.cosine,
        Metric::KeyMae => key()?.mae,
        Metric::ValueMae => value()?.mae,
        Metric::KeyNmse => key()?.nmse,
        Metric::ValueNmse => value()?.nmse,
        Metric::KeyCosine => key()?.cosine,
        Metric::ValueCosine => value()?.cosine,
        Metric::WorstHeadCosine => all?.worst_cosine.as_ref()?.error.cosine,
        Metric::WorstHeadNmse => all?.worst_nmse.as_ref()?.error.nmse,
        Metric::WorstLayerNmse => all?.worst_layer.as_ref()?.error.nmse,
        Metric::LogitRmse => attention?.all.logit_rmse,
        Metric::LogitMax => attention?.all.logit_max,
        Metric::KlMean => attention?.all.kl_mean,
        Metric::KlP99 => attention?.all.kl_p99,
        Metric::KlMax => attention?.all.kl_max,
        Metric::WorstHeadKl => attention?.worst_kl.as_ref()?.error.kl_mean,
        Metric::OutputError => attention?.all.output_error,
        Metric::WorstHeadOutputError => attention?.worst_output.as_ref()?.error.output_error,
        Metric::TopAgreement => attention?.all.top_agreement,
    })
}

/// Opens a container file.
pub(super) fn open(path: &Path) -> Result<Container<File>> {
    let file = File::open(path).map_err(|error| Error::io(path, &error))?;
    Container::open(file, &Limits::default())
}

fn outcome(compared: &Compared, lossless: bool) -> Outcome {
    match compared.decoded.failures.first() {
        Some(failure) => Outcome::failed(failure),
        None if lossless && compared.changed_values > 0 => Outcome::failed(&Error::mismatch(format!(
            "{} of {} values came back with other bits from a lossless pipeline",
            compared.changed_values, compared.values
        ))),
        None => Outcome::Ok,
    }
}

fn check_ledger(written: &Ledger, read: &Ledger, file_bytes: u64) -> Result<()> {
    if written == read && written.total() == file_bytes {
        return Ok(());
    }
    Err(Error::mismatch(format!(
        "ledger of the writer sums to {}, of the reader to {}, the file has {file_bytes} bytes",
        written.total(),
        read.total()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_read_back_as_they_were_written() {
        let failed = |state: &str| Outcome::Failed { state: state.to_owned().into(), reason: "layer 3: why".into() };
        for outcome in [Outcome::Ok, Outcome::Unsupported("no".into()), failed("panicked"), failed("crashed(SIGSEGV)")]
        {
            let text = serde_json::to_string(&outcome).unwrap();
            assert_eq!(serde_json::from_str::<Outcome>(&text).unwrap(), outcome, "{text}");
        }
    }

    #[test]
    fn failure_is_never_taken_for_a_refusal() {
        let failed = Outcome::failed(&Error::unsupported("the decoder of this file"));
        assert_eq!(failed.state(), "error");
        let full = Outcome::failed(&Error::io("kv.gbx", &std::io::Error::from(std::io::ErrorKind::StorageFull)));
        assert_eq!(full.state(), "io");
    }
}
