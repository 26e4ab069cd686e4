//! `exp verify-roundtrip`: does every entry come back from its encoded bytes?
//!
//! The reference undoes an addition in memory; here the plugin really writes bytes, and a codec that shares nothing with the encoder but
//! its stored settings reads them.

use clap::Args;
use gearbox_core::{Codec, Context, Error, LaneRef, LaneSpec, Registry, Result, ResultExt, Role};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};

use crate::dump::{Dump, Entry, Tensor};
use crate::exp::InputArgs;
use crate::report;
use crate::status::Status;

/// The codec that is checked.
const CODEC: &str = "gear-delta";

/// Encodes every entry with `gear-delta`, decodes the bytes in a fresh codec and compares.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Exit status: 0 if every entry came back, 1 if one did not, 2 if there was nothing to check.")]
pub struct VerifyRoundtripArgs {
    #[command(flatten)]
    input: InputArgs,
    /// Check this many entries; 0 checks all
    #[arg(long, value_name = "ENTRIES", default_value_t = 0)]
    limit: usize,
}

/// What was checked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Entries whose keys and values were encoded, decoded and compared.
    pub checked: usize,
    /// Entries that did not come back.
    pub failures: Vec<Failure>,
}

/// An entry that did not come back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// The entry, as messages name it.
    pub place: String,
    /// Keys.
    pub key: Outcome,
    /// Values.
    pub value: Outcome,
}

/// How one tensor came back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Number of elements that differ; zero is success.
    Diff(usize),
    /// What the codec reported.
    Error(String),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Diff(count) => write!(f, "diff={count}"),
            Self::Error(message) => write!(f, "error={message}"),
        }
    }
}

impl VerifyRoundtripArgs {
    /// Runs the experiment and prints what failed.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if there is nothing to check; else what opening the dump reports.
    pub fn run(&self, registry: &Registry, json: bool) -> Result<Status> {
        let (dump, status) = self.input.open()?;
        let verified = verify(&dump, registry, self.limit)?;
        if json {
            report::print_json(&json!({ "codec": CODEC, "checked": verified.checked, "failures": verified.failures }))?;
        } else {
            for failure in &verified.failures {
                report::print(&format!("FAIL {}: K {}, V {}", failure.place, failure.key, failure.value))?;
            }
            report::print(&format!("Checked: {}, Failed: {}", verified.checked, verified.failures.len()))?;
        }
        // A round trip that fails outweighs entries that were bad before.
        Ok(if verified.failures.is_empty() { status } else { Status::Fail })
    }
}

/// Checks the first `limit` entries of a dump, or all if it is 0.
///
/// # Errors
/// What building the codec reports; a tensor that cannot be read or decoded is a [`Failure`].
pub fn verify(dump: &Dump, registry: &Registry, limit: usize) -> Result<Verified> {
    let plugin = registry.codec(CODEC)?;
    let encoder = plugin.build(&json!({}))?;
    let settings: Value = encoder.config();
    let entries: Vec<(u32, &Entry)> = dump.iter().map(|(_, layer, entry)| (layer.id, entry)).collect();
    let entries = &entries[..if limit == 0 { entries.len() } else { limit.min(entries.len()) }];
    let progress = report::progress(entries.iter().map(|(_, entry)| entry.original_bytes()).sum(), "verify-roundtrip");
    let failures = entries
        .par_iter()
        .with_max_len(1)
        .map(|(layer, entry)| {
            let decoder = plugin.build(&settings)?;
            let [key, value] = Role::ALL.map(|role| {
                let context = Context::new(*layer, role, entry.start);
                round_trip(entry.tensor(role), &*encoder, &*decoder, &context)
                    .map_or_else(|error| Outcome::Error(error.to_string()), Outcome::Diff)
            });
            progress.inc(entry.original_bytes());
            let passed = key == Outcome::Diff(0) && value == Outcome::Diff(0);
            Ok((!passed).then(|| Failure { place: entry.place.clone(), key, value }))
        })
        .collect::<Result<Vec<_>>>()?;
    progress.finish_and_clear();
    Ok(Verified { checked: entries.len(), failures: failures.into_iter().flatten().collect() })
}

/// Encodes a tensor, decodes the bytes and counts the elements that differ.
fn round_trip(tensor: &Tensor, encoder: &dyn Codec, decoder: &dyn Codec, context: &Context<'_>) -> Result<usize> {
    let bytes = tensor.map()?;
    let spec = LaneSpec::tensor(tensor.dtype, tensor.shape);
    let mut stored = Vec::new();
    encoder.encode(LaneRef::new(&spec, &bytes)?, context, &mut stored).context(|| "encode".to_owned())?;
    let bound = encoder.max_encoded_len(&spec);
    if stored.len() > bound {
        return Err(Error::mismatch(format!("expected at most {bound} encoded bytes, got {}", stored.len())));
    }
    // Bytes that the decoder leaves alone differ from the input wherever it is not a run of this value.
    let mut back = vec![0xA5; bytes.len()];
    decoder.decode(&stored, &spec, context, &mut back).context(|| "decode".to_owned())?;
    let size = tensor.dtype.size();
    Ok(bytes.chunks(size).zip(back.chunks(size)).filter(|(before, after)| before != after).count())
}

#[cfg(test)]
mod tests {
    use gearbox_core::DType;

    use super::*;
    use crate::exp::samples::{parse, write_run};

    fn run(dump: &std::path::Path, more: &[&str]) -> Result<Status> {
        let flags = [&["--dump-dir", dump.to_str().unwrap()], more].concat();
        parse::<VerifyRoundtripArgs>(&flags).unwrap().run(&gearbox_plugins::registry()?, false)
    }

    #[test]
    fn entries_of_every_element_type_come_back() {
        let folder = tempfile::tempdir().unwrap();
        for dtype in DType::ALL {
            write_run(folder.path(), dtype.name(), dtype);
        }
        assert_eq!(run(folder.path(), &[]).unwrap(), Status::Pass);
        let dump = Dump::open(folder.path(), &crate::dump::Selection::default()).unwrap();
        let registry = gearbox_plugins::registry().unwrap();
        assert_eq!(verify(&dump, &registry, 0).unwrap(), Verified { checked: 6, failures: Vec::new() });
        assert_eq!(verify(&dump, &registry, 4).unwrap().checked, 4);
    }

    #[test]
    fn nothing_to_check_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        write_run(folder.path(), "a", DType::F16);
        assert!(run(folder.path(), &["--min-seq-len", "65"]).is_err());
    }

    #[test]
    fn tensor_that_vanishes_is_a_failure_with_its_reason() {
        let folder = tempfile::tempdir().unwrap();
        write_run(folder.path(), "a", DType::F16);
        let dump = Dump::open(folder.path(), &crate::dump::Selection::default()).unwrap();
        std::fs::remove_file(&dump.runs[0].layers[0].entries[1].key.path).unwrap();
        let verified = verify(&dump, &gearbox_plugins::registry().unwrap(), 0).unwrap();
        assert_eq!((verified.checked, verified.failures.len()), (2, 1));
        assert!(matches!(verified.failures[0].key, Outcome::Error(_)));
        assert_eq!(verified.failures[0].value.to_string(), "diff=0");
    }
}
