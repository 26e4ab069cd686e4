//! Entries that the dump reader refused, under the names that the reference has for their defects.

use std::path::Path;

use gearbox_core::Stage;
use serde::Deserialize;
use serde_json::Value;

use super::LayerArgs;
use crate::dump::{Dump, Finding, Reason};
use crate::select::SelectArgs;

/// The name of the one defect that the reference finds only when it compresses an entry: until then the entry counts as selected.
pub(super) const COMPRESSION_FAILED: &str = "compression_failed";

/// An entry that was refused.
pub(super) struct Rejected {
    /// The reference's name of its defect, or that of ours where the reference has none.
    pub reason: String,
    /// What its meta file says, as far as it can be read.
    pub meta: Option<Meta>,
}

/// Keys of a meta file, with the reference's values for absent ones.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub(super) struct Meta {
    pub run_id: Option<String>,
    stage: String,
    pub layer_id: i64,
    seq_len: i64,
    kv_heads: i64,
    head_dim: i64,
    pub bytes_per_elem: i64,
    k_file: Value,
    v_file: Value,
}

impl Default for Meta {
    fn default() -> Self {
        Self {
            run_id: None,
            stage: Stage::Unknown.name().to_owned(),
            layer_id: -1,
            seq_len: 0,
            kv_heads: 0,
            head_dim: 0,
            bytes_per_elem: 0,
            k_file: Value::Null,
            v_file: Value::Null,
        }
    }
}

impl Meta {
    fn read(place: &str) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(Path::new(place)).ok()?).ok()
    }

    /// The phase of the request.
    pub fn stage(&self) -> Stage {
        let named = |stage: &Stage| stage.name() == self.stage;
        [Stage::Prefill, Stage::Decode].into_iter().find(named).unwrap_or(Stage::Unknown)
    }

    /// KV heads, and channels of each.
    pub fn heads_and_dim(&self) -> [u64; 2] {
        [self.kv_heads, self.head_dim].map(|extent| u64::try_from(extent).unwrap_or_default())
    }

    /// Whether the flags ask for such an entry.
    fn is_wanted(&self, select: &SelectArgs, layers: &LayerArgs) -> bool {
        let above = |limit: usize| i128::from(self.seq_len) > limit as i128;
        (select.stage == "both" || select.stage == self.stage)
            && layers.hold(self.layer_id)
            && !(select.max_seq_len > 0 && above(select.max_seq_len))
            && (select.min_seq_len == 0 || above(select.min_seq_len - 1))
    }

    /// What the reference finds wrong with its values.
    fn defect(&self) -> String {
        let named = |file: &Value| file.as_str().is_some_and(|name| !name.is_empty());
        if [self.seq_len, self.kv_heads, self.head_dim].iter().any(|extent| *extent <= 0) {
            "invalid_shape".to_owned()
        } else if !(named(&self.k_file) && named(&self.v_file)) {
            "missing_k_or_v_file".to_owned()
        } else if ![2, 4].contains(&self.bytes_per_elem) {
            format!("unsupported_bytes_per_elem_{}", self.bytes_per_elem)
        } else {
            "meta_invalid_numeric_fields".to_owned()
        }
    }
}

/// Whether the finding stands for an entry that was left out.
fn is_of_an_entry(reason: Reason) -> bool {
    !matches!(reason, Reason::NoEntries | Reason::FolderUnreadable | Reason::TruncatedEntry | Reason::AlreadyF16)
}

/// How many entries were looked at.
pub(super) fn scanned(dump: &Dump) -> usize {
    let rejected = dump.findings.list.iter().filter(|finding| is_of_an_entry(finding.reason)).count();
    dump.entries() + dump.dropped.total() + rejected
}

/// The entries that were refused although the flags ask for them; those that nothing is known of are among them.
pub(super) fn rejected(dump: &Dump, select: &SelectArgs, layers: &LayerArgs) -> Vec<Rejected> {
    let findings = dump.findings.list.iter().filter(|finding| is_of_an_entry(finding.reason));
    let rejected = findings.map(|Finding { reason, place, .. }| {
        let meta = Meta::read(place);
        let reason = match reason {
            Reason::MetaUnreadable | Reason::MetaNotJson | Reason::MetaNotObject => "meta_parse_error".to_owned(),
            Reason::MetaKeyMissing | Reason::MetaValueInvalid | Reason::UnsupportedElementSize => {
                meta.as_ref().map_or_else(|| "meta_invalid_numeric_fields".to_owned(), Meta::defect)
            }
            Reason::TensorFileMissing => "missing_k_or_v_binary".to_owned(),
            Reason::TensorFileUnreadable => "binary_read_error".to_owned(),
            Reason::TensorEmpty | Reason::SizeNotMultipleOfElement | Reason::SizeDiffersFromShape => {
                COMPRESSION_FAILED.to_owned()
            }
            other => other.name().replace('-', "_"),
        };
        Rejected { reason, meta }
    });
    let wanted = |rejected: &Rejected| rejected.meta.as_ref().is_none_or(|meta| meta.is_wanted(select, layers));
    rejected.filter(wanted).collect()
}
