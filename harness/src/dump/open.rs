//! Opening a dump: which files are there, which of them are wanted.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gearbox_core::{Error, Result, Rope, Stage};
use serde::{Deserialize, Serialize};

use super::{Dump, Entry, Findings, LayerFacts, Reason, assemble, packed, reference, safetensors};

/// Which entries of a dump are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Selection {
    /// Keep one stage. Packed snapshots hold all stages and pass.
    pub stage: Option<Stage>,
    /// Keep entries of at least so many tokens; 0 is off.
    pub min_seq: usize,
    /// Keep entries of at most so many tokens; 0 is off.
    pub max_seq: usize,
    /// Read the packed snapshots of the reference engine and nothing else.
    ///
    /// A dump that holds only packed snapshots is read without it.
    pub packed: bool,
}

/// How many entries a [`Selection`] left out, each counted at the first filter that refused it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Of another stage.
    pub stage: usize,
    /// Shorter than the minimum.
    pub min_seq: usize,
    /// Longer than the maximum.
    pub max_seq: usize,
}

impl Selection {
    /// Whether an entry is wanted; counts it if not.
    pub(super) fn admits(&self, stage: Option<Stage>, seq: usize, dropped: &mut Dropped) -> bool {
        if self.stage.is_some_and(|wanted| stage.is_some_and(|stage| stage != wanted)) {
            dropped.stage += 1;
        } else if seq < self.min_seq {
            dropped.min_seq += 1;
        } else if self.max_seq > 0 && seq > self.max_seq {
            dropped.max_seq += 1;
        } else {
            return true;
        }
        false
    }
}

impl Dropped {
    /// All of them.
    pub fn total(&self) -> usize {
        self.stage + self.min_seq + self.max_seq
    }
}

/// An entry that is valid by itself, not yet checked against its neighbours.
#[derive(Debug)]
pub(super) struct Candidate {
    pub run: String,
    pub layer: u32,
    pub rope: Option<Rope>,
    pub facts: LayerFacts,
    pub entry: Entry,
}

/// Why a part of a dump is refused.
#[derive(Debug)]
pub(super) struct Defect {
    pub reason: Reason,
    pub message: String,
}

impl Defect {
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

/// What the readers of all formats fill.
#[derive(Debug, Default)]
pub(super) struct Reading {
    pub candidates: Vec<Candidate>,
    pub findings: Findings,
    pub dropped: Dropped,
    tokens: HashSet<Arc<[u32]>>,
}

impl Reading {
    /// Shares equal lists of token ids: every layer of a run states the same ones.
    pub fn intern(&mut self, tokens: &[u32]) -> Arc<[u32]> {
        if let Some(known) = self.tokens.get(tokens) {
            return Arc::clone(known);
        }
        let shared: Arc<[u32]> = tokens.into();
        self.tokens.insert(Arc::clone(&shared));
        shared
    }
}

/// Files of a dump, sorted.
#[derive(Debug, Default)]
struct Files {
    metas: Vec<PathBuf>,
    packed_metas: Vec<PathBuf>,
    safetensors: Vec<PathBuf>,
}

impl Files {
    /// Takes a file if its name is one of a dump.
    fn offer(&mut self, path: PathBuf) {
        // Names of dumps are ASCII; any other name starts or ends differently.
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        if name.ends_with(b".safetensors") {
            self.safetensors.push(path);
        } else if name.ends_with(b".json") && name.starts_with(b"meta_") {
            self.metas.push(path);
        } else if name.ends_with(b".json") && name.starts_with(b"packed_meta_") {
            self.packed_metas.push(path);
        }
    }

    /// Lists a folder and everything below it; linked folders are not followed, linked files are.
    fn walk(root: &Path, findings: &mut Findings) -> Self {
        let mut files = Self::default();
        let mut folders = vec![root.to_path_buf()];
        while let Some(folder) = folders.pop() {
            let listed = fs::read_dir(&folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
            let entries = match listed {
                Ok(entries) => entries,
                Err(error) => {
                    findings.push(Reason::FolderUnreadable, folder.display().to_string(), error.to_string());
                    continue;
                }
            };
            for entry in entries {
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                    Ok(kind) if kind.is_symlink() && entry.path().is_dir() => {}
                    _ => files.offer(entry.path()),
                }
            }
        }
        files.metas.sort();
        files.packed_metas.sort();
        files.safetensors.sort();
        files
    }
}

impl Dump {
    /// Opens a dump: a folder with entries in the reference layout or safetensors files at any depth, or one safetensors file.
    ///
    /// Reads the descriptions of the entries and the sizes of their files, no tensor. An entry that is not valid is left out and
    /// becomes a [finding](Dump::findings); if none is left, the dump is empty and says so with [`Reason::NoEntries`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if `path` does not exist, if it holds no dump, or if the
    /// selection leaves out every entry.
    pub fn open(path: impl AsRef<Path>, selection: &Selection) -> Result<Self> {
        let path = path.as_ref();
        let shown = path.display();
        let mut reading = Reading::default();
        let found = fs::metadata(path)
            .map_err(|error| Error::invalid_input(format!("`{shown}`: expected a dump, got nothing: {error}")))?;
        let files = if found.is_dir() {
            Files::walk(path, &mut reading.findings)
        } else if path.extension().is_some_and(|ending| ending == "safetensors") {
            Files { safetensors: vec![path.to_path_buf()], ..Files::default() }
        } else {
            return Err(Error::invalid_input(format!("`{shown}`: expected a folder or a `.safetensors` file")));
        };

        let only_packed = files.metas.is_empty() && files.safetensors.is_empty();
        if selection.packed || only_packed {
            let (looked_for, instead) = if selection.packed {
                ("`packed_meta_*.json`", "; without the packed option there may be some")
            } else {
                ("`meta_*.json`, `packed_meta_*.json` or `*.safetensors`", "")
            };
            if files.packed_metas.is_empty() {
                let unreadable =
                    reading.findings.list.first().map(|finding| format!("; {finding}")).unwrap_or_default();
                let instead = if only_packed { "" } else { instead };
                return Err(Error::invalid_input(format!(
                    "`{shown}`: no dump found, looked for {looked_for} at any depth{instead}{unreadable}"
                )));
            }
            packed::read(path, &files.packed_metas, selection, &mut reading);
        } else {
            reference::read(path, &files.metas, selection, &mut reading);
            safetensors::read(&files.safetensors, selection, &mut reading);
        }

        let Reading { candidates, mut findings, dropped, .. } = reading;
        if candidates.is_empty() && findings.is_clean() && dropped.total() > 0 {
            return Err(Error::invalid_input(format!(
                "`{shown}`: no entry is left: {} of another stage, {} shorter than the minimum, {} longer than the maximum",
                dropped.stage, dropped.min_seq, dropped.max_seq
            )));
        }
        let runs = assemble::assemble(candidates, &mut findings);
        if runs.is_empty() {
            let message = format!("expected at least one valid entry, got none ({} filtered out)", dropped.total());
            findings.push(Reason::NoEntries, shown.to_string(), message);
        }
        Ok(Self { path: path.to_path_buf(), selection: selection.clone(), runs, findings, dropped })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use gearbox_core::ErrorKind;
    use serde_json::{Value, json};

    use super::super::samples::{Sample, open};
    use super::super::{Findings, Tensor};
    use super::*;

    fn refused(path: &Path, selection: &Selection) -> String {
        let error = Dump::open(path, selection).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        error.to_string()
    }

    fn reasons(findings: &Findings) -> Vec<Reason> {
        findings.list.iter().map(|finding| finding.reason).collect()
    }

    /// Every way an entry of the reference layout can be bad: its name, what is done to it, the reason, a part of the message.
    type Row = (&'static str, fn(&mut Sample), Reason, &'static str);

    const MATRIX: &[Row] = &[
        ("not JSON", |s| fs::write(s.meta_path(), b"{\"layer_id\": 0, ").unwrap(), Reason::MetaNotJson, "EOF"),
        ("empty meta", |s| fs::write(s.meta_path(), b"").unwrap(), Reason::MetaNotJson, "EOF"),
        ("not UTF-8", |s| fs::write(s.meta_path(), b"{\"run_id\": \"\xff\"}").unwrap(), Reason::MetaNotJson, ""),
        ("unescaped quote", |s| fs::write(s.meta_path(), b"{\"run_id\": \"a\"b\"}").unwrap(), Reason::MetaNotJson, ""),
        ("list", |s| fs::write(s.meta_path(), b"[1]").unwrap(), Reason::MetaNotObject, "expected an object"),
        ("string", |s| fs::write(s.meta_path(), b"\"x\"").unwrap(), Reason::MetaNotObject, ""),
        ("no k_file", |s| null(s, "k_file"), Reason::MetaKeyMissing, "`k_file`"),
        ("no v_file", |s| null(s, "v_file"), Reason::MetaKeyMissing, "`v_file`"),
        ("no bytes_per_elem", |s| null(s, "bytes_per_elem"), Reason::MetaKeyMissing, "`bytes_per_elem`"),
        ("no seq_len", |s| null(s, "seq_len"), Reason::MetaKeyMissing, "`seq_len`"),
        ("no seq_start", |s| null(s, "seq_start"), Reason::MetaKeyMissing, "`seq_start`"),
        ("no kv_heads", |s| null(s, "kv_heads"), Reason::MetaKeyMissing, "`kv_heads`"),
        ("no head_dim", |s| null(s, "head_dim"), Reason::MetaKeyMissing, "`head_dim`"),
        ("no layer_id", |s| null(s, "layer_id"), Reason::MetaKeyMissing, "`layer_id`"),
        ("text number", |s| put(s, "seq_len", "3"), Reason::MetaValueInvalid, "`seq_len`"),
        ("negative", |s| put(s, "seq_start", -1), Reason::MetaValueInvalid, "`seq_start`"),
        ("fraction", |s| put(s, "kv_heads", 2.5), Reason::MetaValueInvalid, "`kv_heads`"),
        ("zero tokens", |s| put(s, "seq_len", 0), Reason::MetaValueInvalid, "`seq_len`: expected at least 1, got 0"),
        ("layer beyond u32", |s| put(s, "layer_id", 1_u64 << 32), Reason::MetaValueInvalid, "`layer_id`"),
        ("end at 2^64", |s| put(s, "seq_start", u64::MAX), Reason::MetaValueInvalid, "`seq_start`"),
        ("wrong end", |s| put(s, "seq_end_exclusive", 9), Reason::MetaValueInvalid, "seq_start + seq_len = 3, got 9"),
        ("huge shape", |s| put(s, "head_dim", u64::MAX), Reason::MetaValueInvalid, "more than 2^64 bytes"),
        ("unknown dtype", |s| put(s, "dtype", "int8"), Reason::MetaValueInvalid, "`int8`"),
        ("stage number", |s| put(s, "stage", 1), Reason::MetaValueInvalid, "`stage`"),
        ("q_file alone", |s| put(s, "q_file", "q_t0_3.bin"), Reason::MetaKeyMissing, "`q_heads`"),
        (
            "odd q_heads",
            |s| {
                s.extend();
                put(s, "q_heads", 3);
            },
            Reason::MetaValueInvalid,
            "a multiple of the 2 KV heads, got 3",
        ),
        ("text tokens", |s| put(s, "tokens", json!(["a", "b", "c"])), Reason::MetaValueInvalid, "`tokens`"),
        (
            "too few tokens",
            |s| put(s, "tokens", json!([1, 2])),
            Reason::TokensDifferFromShape,
            "expected 3 token ids, got 2",
        ),
        ("bad rope", |s| put(s, "rope", json!({"pairing": "x"})), Reason::MetaValueInvalid, "`rope`"),
        (
            "rope beyond dim",
            |s| put(s, "rope", json!({"pairing": "adjacent", "theta": 1e4, "rotary_dim": 6})),
            Reason::MetaValueInvalid,
            "`rotary_dim` from 2 to 4, got 6",
        ),
        (
            "attention without scale",
            |s| put(s, "attention", json!({"window": 4})),
            Reason::MetaValueInvalid,
            "`attention`: missing field `scale`",
        ),
        (
            "no window",
            |s| put(s, "attention", json!({"scale": 1.0, "window": 0})),
            Reason::MetaValueInvalid,
            "`attention`: expected a `window` of at least 1, got 0",
        ),
        (
            "two rotations",
            |s| {
                put(s, "rope", json!({"pairing": "adjacent", "theta": 1e4, "rotary_dim": 4}));
                put(s, "rope_layer", json!({"rope_type": "yarn"}));
            },
            Reason::MetaValueInvalid,
            "`rope_layer`: expected none beside `rope`",
        ),
        ("eight bytes", |s| put(s, "bytes_per_elem", 8), Reason::UnsupportedElementSize, "expected 2 or 4, got 8"),
        ("fp32 of two bytes", |s| put(s, "dtype", "fp32"), Reason::DtypeContradictsSize, "expected 4 for f32, got 2"),
        ("run with slash", |s| put(s, "run_id", "a/b"), Reason::RunIdInvalid, "`a/b`"),
        ("run of dots", |s| put(s, "run_id", ".."), Reason::RunIdInvalid, "`..`"),
        ("empty run", |s| put(s, "run_id", ""), Reason::RunIdInvalid, "``"),
        ("absolute path", |s| put(s, "k_file", "/etc/passwd"), Reason::PathEscapesFolder, "`/etc/passwd`"),
        (
            "parent path",
            |s| put(s, "v_file", "../layer_1/v_t0_3.bin"),
            Reason::PathEscapesFolder,
            "`../layer_1/v_t0_3.bin`",
        ),
        ("hidden parent", |s| put(s, "v_file", "a/../../v.bin"), Reason::PathEscapesFolder, "`a/../../v.bin`"),
        ("empty path", |s| put(s, "k_file", ""), Reason::PathEscapesFolder, "``"),
        (
            "K missing",
            |s| fs::remove_file(tensor_path(s, "k")).unwrap(),
            Reason::TensorFileMissing,
            "expected 48 bytes, got no file",
        ),
        ("V missing", |s| fs::remove_file(tensor_path(s, "v")).unwrap(), Reason::TensorFileMissing, "v_t0_3.bin"),
        (
            "Q missing",
            |s| {
                s.extend();
                fs::write(s.meta_path(), s.meta.to_bytes()).unwrap();
            },
            Reason::TensorFileMissing,
            "expected 96 bytes, got no file",
        ),
        ("K a folder", |s| put(s, "k_file", "folder"), Reason::TensorFileUnreadable, "expected a regular file"),
        ("K empty", |s| fs::write(tensor_path(s, "k"), b"").unwrap(), Reason::TensorEmpty, "expected 48 bytes, got 0"),
        ("V empty", |s| fs::write(tensor_path(s, "v"), b"").unwrap(), Reason::TensorEmpty, "v_t0_3.bin"),
        (
            "odd size",
            |s| fs::write(tensor_path(s, "v"), [0; 47]).unwrap(),
            Reason::SizeNotMultipleOfElement,
            "expected 48 bytes, got 47",
        ),
        (
            "short",
            |s| fs::write(tensor_path(s, "v"), [0; 46]).unwrap(),
            Reason::SizeDiffersFromShape,
            "expected 48 bytes, got 46",
        ),
        (
            "long",
            |s| fs::write(tensor_path(s, "k"), [0; 50]).unwrap(),
            Reason::SizeDiffersFromShape,
            "expected 48 bytes, got 50",
        ),
    ];

    fn put(sample: &mut Sample, key: &str, value: impl Into<Value>) {
        let path = sample.meta_path();
        sample.meta.set(key, value);
        fs::write(path, sample.meta.to_bytes()).unwrap();
    }

    fn null(sample: &mut Sample, key: &str) {
        put(sample, key, Value::Null);
    }

    fn tensor_path(sample: &Sample, part: &str) -> PathBuf {
        sample.layer_dir().join(format!("{part}_t0_3.bin"))
    }

    #[test]
    fn each_bad_entry_has_a_named_reason_and_the_others_stay() {
        for (name, damage, reason, message) in MATRIX {
            let folder = tempfile::tempdir().unwrap();
            let mut sample = Sample::new(folder.path());
            sample.write();
            fs::create_dir(sample.layer_dir().join("folder")).unwrap();
            let mut other = Sample::new(folder.path());
            other.set("layer_id", 1);
            other.write();
            assert!(open(folder.path()).findings.list.is_empty());

            let place = sample.meta_path().display().to_string();
            damage(&mut sample);
            let dump = open(folder.path());
            assert_eq!(reasons(&dump.findings), [*reason], "{name}: {:?}", dump.findings);
            let finding = &dump.findings.list[0];
            assert!(finding.message.contains(message), "{name}: {}", finding.message);
            assert_eq!(finding.place, place, "{name}");
            assert!(!dump.findings.is_clean());
            assert_eq!(dump.entries(), 1, "{name}");
            assert_eq!(dump.runs[0].layers[0].id, 1, "{name}");
        }
    }

    #[test]
    fn only_bad_entries_make_an_empty_dump_that_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let sample = Sample::new(folder.path());
        sample.write();
        fs::remove_file(tensor_path(&sample, "k")).unwrap();
        let dump = open(folder.path());
        assert_eq!(reasons(&dump.findings), [Reason::TensorFileMissing, Reason::NoEntries]);
        assert_eq!((dump.entries(), dump.original_bytes()), (0, 0));
    }

    #[test]
    fn missing_root_and_other_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("no");
        assert!(
            refused(&missing, &Selection::default()).starts_with(&format!("`{}`: expected a dump", missing.display()))
        );
        let file = folder.path().join("a.txt");
        fs::write(&file, b"x").unwrap();
        assert!(refused(&file, &Selection::default()).ends_with("expected a folder or a `.safetensors` file"));
        let message = refused(folder.path(), &Selection::default());
        assert!(
            message.ends_with("looked for `meta_*.json`, `packed_meta_*.json` or `*.safetensors` at any depth"),
            "{message}"
        );
        Sample::new(folder.path()).write();
        let message = refused(folder.path(), &Selection { packed: true, ..Selection::default() });
        assert!(message.contains("looked for `packed_meta_*.json` at any depth; without"), "{message}");
    }

    #[test]
    fn filters_count_what_they_drop_and_dropping_all_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        sample.write();
        sample.range(3, 1);
        sample.set("stage", "decode");
        sample.write();
        sample.range(4, 1);
        sample.set("stage", "other");
        sample.write();

        let select = |stage, min_seq, max_seq| Selection { stage, min_seq, max_seq, packed: false };
        for (selection, kept, dropped) in [
            (select(None, 0, 0), 3, Dropped::default()),
            (select(Some(Stage::Prefill), 0, 0), 1, Dropped { stage: 2, ..Dropped::default() }),
            (select(Some(Stage::Decode), 0, 0), 1, Dropped { stage: 2, ..Dropped::default() }),
            (select(Some(Stage::Unknown), 0, 0), 1, Dropped { stage: 2, ..Dropped::default() }),
            (select(None, 2, 0), 1, Dropped { min_seq: 2, ..Dropped::default() }),
            (select(None, 3, 3), 1, Dropped { min_seq: 2, ..Dropped::default() }),
            (select(None, 0, 2), 2, Dropped { max_seq: 1, ..Dropped::default() }),
        ] {
            let dump = Dump::open(folder.path(), &selection).unwrap();
            assert_eq!((dump.entries(), dump.dropped), (kept, dropped), "{selection:?}");
            assert!(dump.findings.is_clean());
        }
        let message = refused(folder.path(), &select(Some(Stage::Decode), 2, 0));
        assert!(
            message.ends_with("2 of another stage, 1 shorter than the minimum, 0 longer than the maximum"),
            "{message}"
        );
    }

    #[test]
    fn entries_of_any_depth_come_in_sorted_order() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("a/b");
        let mut sample = Sample::new(&root);
        for (layer, start) in [(10, 0), (2, 11), (2, 3), (2, 0)] {
            sample.range(start, if start == 0 { 3 } else { 1 });
            sample.set("layer_id", layer);
            sample.write();
        }
        for root in [folder.path(), &root, &root.join("sample")] {
            let dump = open(root);
            let order: Vec<_> = dump.iter().map(|(_, layer, entry)| (layer.id, entry.start)).collect();
            assert_eq!(order, [(2, 0), (2, 3), (2, 11), (10, 0)]);
            assert_eq!(dump.original_bytes(), 2 * 16 * 8);
        }
        let layer = open(&root.join("sample/layer_2"));
        assert_eq!((layer.entries(), layer.runs[0].name.as_str()), (3, "sample"));
    }

    #[test]
    fn run_without_a_name_takes_that_of_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        sample.set("run_id", Value::Null);
        sample.write();
        for root in [folder.path().to_path_buf(), sample.layer_dir()] {
            let dump = open(&root);
            assert!(dump.findings.is_clean(), "{}", dump.findings);
            assert_eq!(dump.runs[0].name, "sample");
        }
    }

    #[test]
    fn optional_keys_default_and_extensions_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        for key in ["dtype", "stage", "add", "tensor_seq_len", "quant_key", "flash_attention", "seq_end_exclusive"] {
            sample.set(key, Value::Null);
        }
        sample.extend();
        sample.set("rope", json!({"pairing": "half-split", "theta": 10000.0, "rotary_dim": 4}));
        sample.set("someone_elses_key", json!({"a": [1]}));
        sample.write();
        let dump = open(folder.path());
        assert!(dump.findings.list.is_empty(), "{}", dump.findings);
        let entry = &dump.runs[0].layers[0].entries[0];
        assert_eq!((entry.stage, entry.seq), (Stage::Unknown, 3));
        assert_eq!(entry.tokens.as_deref(), Some(&[100, 101, 102][..]));
        assert_eq!(entry.query.as_ref().unwrap().shape, super::super::Shape::new(3, 4, 4));
        assert_eq!(*entry.query.as_ref().unwrap().map().unwrap(), sample.query.unwrap()[..]);
        assert_eq!(dump.runs[0].rope.as_ref().unwrap().rotary_dim, 4);
    }

    #[test]
    fn bf16_is_told_by_its_label_only() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        sample.set("dtype", "bf16");
        sample.write();
        assert_eq!(open(folder.path()).runs[0].layers[0].entries[0].key.dtype, gearbox_core::DType::Bf16);
    }

    #[test]
    fn duplicate_and_overlapping_ranges_keep_the_longer_entry_that_starts_first() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        sample.write();
        // The same range in a second folder of the same run.
        let mut copy = Sample::new(&folder.path().join("z"));
        copy.write();
        sample.range(2, 4);
        sample.write();
        sample.range(0, 2);
        sample.write();
        sample.range(3, 5);
        sample.write();
        let dump = open(folder.path());
        let ranges: Vec<_> = dump.iter().map(|(_, _, entry)| (entry.start, entry.seq)).collect();
        assert_eq!(ranges, [(0, 3), (3, 5)]);
        assert_eq!(
            reasons(&dump.findings),
            [Reason::DuplicateRange, Reason::OverlappingRange, Reason::OverlappingRange]
        );
        assert!(dump.findings.list[0].message.starts_with("tokens 0..3 are also in "));
        copy.set("run_id", "another");
        copy.write();
        assert_eq!(open(folder.path()).findings.counts().get(&Reason::DuplicateRange), None);
    }

    #[test]
    fn layer_keeps_the_heads_dim_and_dtype_of_its_first_entry() {
        let changes: [fn(&mut Sample); 3] = [
            |s| {
                s.set("kv_heads", 4);
                s.set("head_dim", 2);
            },
            |s| s.set("dtype", "bf16"),
            |s| s.f32(&[]),
        ];
        for change in changes {
            let folder = tempfile::tempdir().unwrap();
            let mut sample = Sample::new(folder.path());
            sample.write();
            sample.range(3, 2);
            change(&mut sample);
            sample.write();
            let dump = open(folder.path());
            assert_eq!(reasons(&dump.findings), [Reason::ShapeDiffersInLayer]);
            assert_eq!(dump.entries(), 1);
        }
    }

    #[test]
    fn query_heads_agree_within_a_layer_even_behind_entries_without() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        sample.write();
        sample.range(3, 3);
        sample.extend();
        sample.write();
        sample.range(6, 3);
        sample.extend();
        sample.set("q_heads", 2);
        sample.query = Some(sample.key.clone());
        sample.write();
        assert_eq!(reasons(&open(folder.path()).findings), [Reason::ShapeDiffersInLayer]);
    }

    #[test]
    fn layers_share_token_ids_and_must_agree_on_them() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        sample.extend();
        for layer in 0..3 {
            sample.set("layer_id", layer);
            sample.set("tokens", vec![7, 8, if layer == 2 { 10 } else { 9 }]);
            sample.write();
        }
        let dump = open(folder.path());
        assert_eq!(reasons(&dump.findings), [Reason::TokensDifferInRun]);
        assert!(dump.findings.list[0].message.ends_with("token 2 of the entry"));
        let tokens: Vec<_> = dump.iter().map(|(_, _, entry)| entry.tokens.clone().unwrap()).collect();
        assert_eq!(tokens.len(), 2);
        assert!(Arc::ptr_eq(&tokens[0], &tokens[1]));
    }

    #[test]
    fn entries_of_a_run_must_agree_on_the_rotation() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        for (layer, theta) in [(0, None), (1, Some(1e4)), (2, Some(1e5))] {
            sample.set("layer_id", layer);
            let rope = theta.map(|theta| json!({"pairing": "adjacent", "theta": theta, "rotary_dim": 2}));
            sample.set("rope", rope.unwrap_or_default());
            sample.write();
        }
        let dump = open(folder.path());
        assert_eq!(reasons(&dump.findings), [Reason::RopeDiffersInRun]);
        assert_eq!(dump.runs[0].rope.as_ref().unwrap().theta.to_bits(), 1e4_f64.to_bits());
    }

    #[test]
    fn entries_of_a_layer_must_agree_on_its_facts() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        let attention = [None, Some(json!({"scale": 0.5})), None, Some(json!({"scale": 0.5, "window": 3}))];
        for (start, attention) in (0..).zip(attention) {
            sample.range(start, 1);
            sample.set("attention", attention.unwrap_or_default());
            sample.set("rope_layer", json!({"rope_type": if start == 2 { "yarn" } else { "longrope" }}));
            sample.write();
        }
        sample.set("layer_id", 1);
        sample.set("rope_layer", Value::Null);
        sample.set("rope", json!({"pairing": "adjacent", "theta": 1e4, "rotary_dim": 2}));
        sample.write();
        let dump = open(folder.path());
        let expected = [Reason::FactsDifferInLayer, Reason::FactsDifferInLayer, Reason::RopeDiffersInRun];
        assert_eq!(reasons(&dump.findings), expected);
        let messages: Vec<_> = dump.findings.list.iter().map(|finding| finding.message.as_str()).collect();
        assert!(messages[0].ends_with(r#"meta_t0_1.json, got {"rope_type":"yarn"}"#), "{}", messages[0]);
        assert!(messages[1].starts_with("expected attention with scale 0.5 as in "), "{}", messages[1]);
        assert!(messages[1].ends_with("meta_t1_2.json, got scale 0.5, window 3"), "{}", messages[1]);
        assert_eq!((dump.entries(), &dump.runs[0].rope), (2, &None));
    }

    #[test]
    fn warm_up_entries_are_notices_whatever_is_selected() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        for start in 0..7 {
            sample.range(start, 1);
            sample.set("stage", "decode");
            sample.write();
        }
        // Truncated to four tokens: the prompt still ends at 9.
        sample.range(0, 4);
        sample.set("stage", "prefill");
        sample.set("add", 9);
        sample.write();
        sample.range(9, 1);
        sample.set("stage", "decode");
        sample.write();
        // Another layer has no prompt, so nothing says that its entries are leftovers.
        sample.set("layer_id", 1);
        sample.range(0, 1);
        sample.write();

        for (stage, starts) in [
            (None, vec![(0, 0), (0, 9), (1, 0)]),
            (Some(Stage::Decode), vec![(0, 9), (1, 0)]),
            (Some(Stage::Prefill), vec![(0, 0)]),
        ] {
            let dump = Dump::open(folder.path(), &Selection { stage, ..Selection::default() }).unwrap();
            assert_eq!(dump.findings.counts()[&Reason::TuningLeftover], 7, "{stage:?}");
            assert!(dump.findings.is_clean());
            let found: Vec<_> = dump.iter().map(|(_, layer, entry)| (layer.id, entry.start)).collect();
            assert_eq!(found, starts);
            let truncated = dump.findings.counts().get(&Reason::TruncatedEntry).copied();
            assert_eq!(truncated, (stage != Some(Stage::Decode)).then_some(1));
        }
    }

    #[test]
    fn opened_tensors_map_to_the_bytes_of_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let sample = Sample::new(folder.path());
        sample.write();
        let dump = open(folder.path());
        let bytes = |tensor: &Tensor| tensor.map().unwrap().to_vec();
        let entry = &dump.runs[0].layers[0].entries[0];
        assert_eq!((bytes(&entry.key), bytes(&entry.value)), (sample.key, sample.value));
    }

    #[test]
    fn odd_names_and_temporary_files_are_not_entries() {
        let folder = tempfile::tempdir().unwrap();
        let sample = Sample::new(folder.path());
        sample.write();
        for name in [".meta_t0_3.json.abc.tmp", "meta_t0_3.json.bak", "notes.json", "my_meta_t0.json"] {
            fs::write(sample.layer_dir().join(name), b"{").unwrap();
        }
        assert!(open(folder.path()).findings.list.is_empty());
    }

    #[test]
    fn damaged_meta_never_panics() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        sample.extend();
        sample.write();
        let good = sample.meta.to_bytes();
        let path = sample.meta_path();
        for at in 0..good.len() {
            fs::write(&path, &good[..at]).unwrap();
            assert!(!open(folder.path()).findings.is_clean(), "cut at {at}");
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, bad).unwrap();
            open(folder.path()).scan();
        }
    }

    #[cfg(unix)]
    #[test]
    fn linked_files_are_read_and_linked_folders_are_not_followed() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let sample = Sample::new(folder.path());
        sample.write();
        symlink(folder.path(), sample.layer_dir().join("loop")).unwrap();
        let key = tensor_path(&sample, "k");
        fs::rename(&key, folder.path().join("elsewhere.bin")).unwrap();
        symlink(folder.path().join("elsewhere.bin"), &key).unwrap();
        assert_eq!(open(folder.path()).entries(), 1);
        // The root itself may be a link.
        let link = folder.path().join("link");
        symlink(folder.path().join("sample"), &link).unwrap();
        assert_eq!(open(&link).entries(), 1);
        symlink("nowhere", sample.layer_dir().join("meta_t9_10.json")).unwrap();
        assert_eq!(reasons(&open(folder.path()).findings), [Reason::MetaUnreadable]);
    }
}
