//! What `dump info` prints: one row per run.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use super::{AttentionFacts, Dropped, Dump, Run, Stage};

/// An overview of a dump.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// What was opened.
    pub path: String,
    /// One row per run.
    pub runs: Vec<RunInfo>,
    /// Entries of all runs.
    pub entries: usize,
    /// Bytes of all keys and values.
    pub original_bytes: u64,
    /// Defects that left entries out.
    pub bad: usize,
    /// Findings that are no defects.
    pub notices: usize,
    /// Entries that the selection left out.
    pub dropped: Dropped,
}

/// An overview of a run.
#[derive(Clone, Debug, Serialize)]
pub struct RunInfo {
    /// Name.
    pub run: String,
    /// Number of layers.
    pub layers: usize,
    /// Entries of all layers.
    pub entries: usize,
    /// Tokens of the layer that has most, in prefill entries.
    pub prefill_tokens: u64,
    /// Tokens of the layer that has most, in decode entries.
    pub decode_tokens: u64,
    /// Element types and shapes that occur, such as `f16 2x64`: dtype, KV heads, channels per head.
    pub tensors: Vec<String>,
    /// Numbers of query heads that occur; empty without queries.
    pub query_heads: Vec<usize>,
    /// Whether every entry names its token ids.
    pub token_ids: bool,
    /// Whether the rotation is known.
    pub rope: bool,
    /// Attention that is not the usual one, with the layers that attend so.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub attention: Vec<AttentionInfo>,
    /// Bytes of keys and values.
    pub original_bytes: u64,
}

/// Layers that attend alike.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AttentionInfo {
    /// How they attend.
    #[serde(flatten)]
    pub facts: AttentionFacts,
    /// The layers, ascending.
    pub layers: Vec<u32>,
}

impl Dump {
    /// Sums the dump up; reads no tensor.
    pub fn info(&self) -> Info {
        Info {
            path: self.path.display().to_string(),
            runs: self.runs.iter().map(RunInfo::of).collect(),
            entries: self.entries(),
            original_bytes: self.original_bytes(),
            bad: self.findings.bad(),
            notices: self.findings.list.len() - self.findings.bad(),
            dropped: self.dropped,
        }
    }
}

impl RunInfo {
    fn of(run: &Run) -> Self {
        let entries = || run.layers.iter().flat_map(|layer| &layer.entries);
        let tokens = |wanted: fn(Stage) -> bool| {
            let of_layer = |layer: &super::Layer| {
                layer.entries.iter().filter(|entry| wanted(entry.stage)).map(|entry| entry.seq as u64).sum()
            };
            run.layers.iter().map(of_layer).max().unwrap_or_default()
        };
        let tensors: BTreeSet<String> = entries()
            .flat_map(|entry| [&entry.key, &entry.value])
            .map(|tensor| format!("{} {}x{}", tensor.dtype, tensor.shape.heads, tensor.shape.dim))
            .collect();
        let query_heads: BTreeSet<usize> =
            entries().filter_map(|entry| entry.query.as_ref()).map(|query| query.shape.heads).collect();
        let mut attention: Vec<AttentionInfo> = Vec::new();
        for layer in &run.layers {
            let Some(facts) = layer.facts.attention else { continue };
            match attention.iter_mut().find(|info| info.facts == facts) {
                Some(info) => info.layers.push(layer.id),
                None => attention.push(AttentionInfo { facts, layers: vec![layer.id] }),
            }
        }
        Self {
            run: run.name.clone(),
            layers: run.layers.len(),
            entries: entries().count(),
            // What the dump does not name is one request as a whole, so it counts as its prompt.
            prefill_tokens: tokens(|stage| stage != Stage::Decode),
            decode_tokens: tokens(|stage| stage == Stage::Decode),
            tensors: tensors.into_iter().collect(),
            query_heads: query_heads.into_iter().collect(),
            token_ids: entries().all(|entry| entry.tokens.is_some()),
            rope: run.rope.is_some() || run.layers.iter().any(|layer| layer.facts.rope.is_some()),
            attention,
            original_bytes: entries().map(super::Entry::original_bytes).sum(),
        }
    }
}

/// A table with one line per run, one of its attention where that is not the usual one, and a line of totals.
impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.runs.iter().map(|run| run.run.len()).max().unwrap_or_default().max(3);
        writeln!(
            f,
            "{:width$}  {:>6}  {:>7}  {:>7}  {:>6}  {:>14}  {:12}  extras",
            "run", "layers", "entries", "prefill", "decode", "bytes", "tensors"
        )?;
        for run in &self.runs {
            let extras = [
                (!run.query_heads.is_empty()).then(|| {
                    let heads: Vec<_> = run.query_heads.iter().map(usize::to_string).collect();
                    format!("queries({})", heads.join(","))
                }),
                run.token_ids.then(|| "tokens".to_owned()),
                run.rope.then(|| "rope".to_owned()),
            ];
            let row = format!(
                "{:width$}  {:>6}  {:>7}  {:>7}  {:>6}  {:>14}  {:12}  {}",
                run.run,
                run.layers,
                run.entries,
                run.prefill_tokens,
                run.decode_tokens,
                run.original_bytes,
                run.tensors.join(", "),
                extras.into_iter().flatten().collect::<Vec<_>>().join(" ")
            );
            writeln!(f, "{}", row.trim_end())?;
        }
        for run in self.runs.iter().filter(|run| !run.attention.is_empty()) {
            let of = |info: &AttentionInfo| format!("{} in {} of {} layers", info.facts, info.layers.len(), run.layers);
            let all: Vec<_> = run.attention.iter().map(of).collect();
            writeln!(f, "attention of {}: {}", run.run, all.join("; "))?;
        }
        write!(f, "{} entries, {} bytes of keys and values", self.entries, self.original_bytes)?;
        for (count, what) in [(self.bad, "bad"), (self.notices, "notices"), (self.dropped.total(), "filtered out")] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        writeln!(f)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::samples::{Sample, open};

    #[test]
    fn info_is_one_line_per_run_and_totals() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        sample.write();
        sample.set("layer_id", 1);
        sample.set("tokens", vec![4, 5, 6]);
        sample.write();
        let info = open(folder.path()).info();
        assert_eq!(
            info.to_string(),
            "run     layers  entries  prefill  decode           bytes  tensors       extras\n\
             sample       2        2        3       0             192  f16 2x4\n\
             2 entries, 192 bytes of keys and values\n"
        );
        assert!(!info.runs[0].token_ids, "one layer does not name them");

        sample.set("layer_id", 2);
        sample.set("attention", json!({"scale": 0.5, "softcap": 50.0, "window": 2}));
        sample.write();
        sample.set("layer_id", 4);
        sample.write();
        let info = open(folder.path()).info();
        let line = "attention of sample: scale 0.5, softcap 50, window 2 in 2 of 4 layers";
        assert_eq!(info.to_string().lines().nth(2), Some(line));
        let attention = json!([{"scale": 0.5, "softcap": 50.0, "window": 2, "layers": [2, 4]}]);
        assert_eq!(json!(info.runs[0])["attention"], attention);
    }
}
