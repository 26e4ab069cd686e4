//! Reads safetensors files: one run per file, one tensor per layer and role.
//!
//! Tensors `layers.<L>.key`, `layers.<L>.value` and optionally `layers.<L>.query` have the shape `(seq, heads, dim)`; an optional
//! `tokens` of shape `(seq)` holds the token ids. The metadata strings say the rest: `format` is `gearbox-dump`, `version` is `1`,
//! `run` is the name, `rope` the rotation as JSON, `entries` a JSON list of `[start, seq, stage]` whose tokens follow each other in
//! the tensors. Two JSON lists have one element for each layer of the file, in ascending order: `attention` objects of `scale`, `softcap`
//! and `window`, see [`AttentionFacts`](super::AttentionFacts); `rope_layers`, instead of `rope`, the rotation of each layer or null. All of them
//! are optional, so that a file written by hand is read as one prefill entry.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::safetensors::tensor::{Dtype, Metadata, TensorInfo};
use gearbox_core::{DType, Rope, Shape, Stage};

use super::open::{Candidate, Defect, Reading, Selection};
use super::reference::{check_rope, check_run, parse_stage};
use super::{AttentionFacts, Entry, LayerFacts, Layout, Reason, Tensor};

type Checked<T> = Result<T, Defect>;

/// Value of the metadata key `format`.
pub(super) const FORMAT: &str = "gearbox-dump";
/// Value of the metadata key `version`.
pub(super) const VERSION: &str = "1";
/// Metadata keys that the reader knows; the others are free.
pub(super) const KEYS: [&str; 7] = ["format", "version", "run", "rope", "rope_layers", "attention", "entries"];
/// Bytes of the length in front of the header.
const LENGTH: u64 = 8;
/// The longest header that the format allows, in bytes.
const LONGEST_HEADER: u64 = 100_000_000;

/// Name of a tensor in a safetensors dump; `part` is `key`, `value` or `query`.
///
/// # Examples
/// ```
/// assert_eq!(gearbox::dump::tensor_name(7, "key"), "layers.7.key");
/// ```
pub fn tensor_name(layer: u32, part: &str) -> String {
    format!("layers.{layer}.{part}")
}

/// Reads all files.
pub(super) fn read(files: &[PathBuf], selection: &Selection, reading: &mut Reading) {
    for path in files {
        let place = path.display().to_string();
        if let Err(defect) = read_file(path, &place, selection, reading) {
            reading.findings.push(defect.reason, place, defect.message);
        }
    }
}

/// The metadata strings that the reader does not know itself.
pub(super) fn free_metadata(path: &Path) -> BTreeMap<String, String> {
    let Ok(Header { metadata, .. }) = read_header(path) else { return BTreeMap::new() };
    let strings = metadata.metadata().iter().flatten().filter(|(key, _)| !KEYS.contains(&key.as_str()));
    strings.map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn invalid(message: impl Into<String>) -> Defect {
    Defect::new(Reason::SafetensorsInvalid, message)
}

fn unreadable(error: &std::io::Error) -> Defect {
    Defect::new(Reason::TensorFileUnreadable, error.to_string())
}

struct Header {
    metadata: Metadata,
    /// Where the tensors start in the file.
    data: u64,
    file: File,
}

/// Reads the header and nothing behind it.
fn read_header(path: &Path) -> Checked<Header> {
    // Opening a pipe would wait for ever.
    let found = std::fs::metadata(path).map_err(|error| unreadable(&error))?;
    if !found.is_file() {
        return Err(Defect::new(Reason::TensorFileUnreadable, "expected a regular file"));
    }
    let mut file = File::open(path).map_err(|error| unreadable(&error))?;
    let found = file.metadata().map_err(|error| unreadable(&error))?.len();
    let Some(rest) = found.checked_sub(LENGTH) else {
        return Err(invalid(format!("expected a header length of {LENGTH} bytes, got {found} bytes")));
    };
    let mut length = [0; LENGTH as usize];
    file.read_exact(&mut length).map_err(|error| unreadable(&error))?;
    let length = u64::from_le_bytes(length);
    if length > rest.min(LONGEST_HEADER) {
        return Err(invalid(format!("expected a header of at most {} bytes, got {length}", rest.min(LONGEST_HEADER))));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).map_err(|error| unreadable(&error))?;
    let metadata: Metadata = serde_json::from_slice(&text).map_err(|error| invalid(format!("header: {error}")))?;
    let (expected, got) = (metadata.data_len() as u64, rest - length);
    if expected != got {
        let message = format!("expected {expected} bytes of tensors, got {got}");
        return Err(Defect::new(Reason::SizeDiffersFromShape, message));
    }
    Ok(Header { metadata, data: LENGTH + length, file })
}

/// The strings of the header.
struct Strings<'a>(&'a Metadata);

impl Strings<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.metadata().as_ref()?.get(key).map(String::as_str)
    }

    fn expect(&self, key: &str, expected: &str) -> Checked<()> {
        match self.get(key) {
            Some(got) if got != expected => Err(invalid(format!("`{key}`: expected `{expected}`, got `{got}`"))),
            _ => Ok(()),
        }
    }

    fn json<T: serde::de::DeserializeOwned>(&self, key: &str) -> Checked<Option<T>> {
        let parse = |text| serde_json::from_str(text).map_err(|error| invalid(format!("`{key}`: {error}")));
        self.get(key).map(parse).transpose()
    }

    /// One element for each layer of the file, or none at all.
    fn of_layers<T: serde::de::DeserializeOwned>(&self, key: &str, layers: usize) -> Checked<Vec<Option<T>>> {
        let Some(list) = self.json::<Vec<Option<T>>>(key)? else { return Ok((0..layers).map(|_| None).collect()) };
        if list.len() != layers {
            let got = list.len();
            return Err(invalid(format!("`{key}`: expected one element for each of {layers} layers, got {got}")));
        }
        Ok(list)
    }

    /// What the file says of each of its layers.
    fn facts(&self, layers: usize) -> Checked<Vec<LayerFacts>> {
        if self.get("rope").is_some() && self.get("rope_layers").is_some() {
            return Err(invalid("expected `rope` or `rope_layers`, got both"));
        }
        let attention = self.of_layers::<AttentionFacts>("attention", layers)?;
        let ropes = self.of_layers("rope_layers", layers)?;
        Ok(attention.into_iter().zip(ropes).map(|(attention, rope)| LayerFacts { attention, rope }).collect())
    }

    /// Start, number of tokens and stage of each entry, if the file says so.
    fn entries(&self) -> Checked<Option<Vec<(u64, usize, Stage)>>> {
        let Some(list) = self.json::<Vec<(u64, usize, String)>>("entries")? else { return Ok(None) };
        let parse = |(start, seq, stage): (u64, usize, String)| {
            if seq == 0 || start.checked_add(seq as u64).is_none() {
                return Err(invalid(format!(
                    "`entries`: expected at least one token below 2^64, got [{start}, {seq}]"
                )));
            }
            Ok((start, seq, parse_stage(&stage)))
        };
        list.into_iter().map(parse).collect::<Checked<_>>().map(Some)
    }
}

fn read_file(path: &Path, place: &str, selection: &Selection, reading: &mut Reading) -> Checked<()> {
    let Header { metadata, data, mut file } = read_header(path)?;
    let strings = Strings(&metadata);
    strings.expect("format", FORMAT)?;
    strings.expect("version", VERSION)?;
    let stem = || path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let run = strings.get("run").map_or_else(stem, str::to_owned);
    check_run(&run)?;
    let rope: Option<Rope> = strings.json("rope")?;
    let entries = strings.entries()?;

    let infos = metadata.tensors();
    let layers = layer_ids(infos.keys());
    if layers.is_empty() {
        return Err(invalid("expected tensors named `layers.<L>.key`, got none"));
    }
    let tokens = match infos.get("tokens") {
        Some(info) => Some(read_tokens(&mut file, data, info)?),
        None => None,
    };
    let facts = strings.facts(layers.len())?;
    let source = Source { path: Arc::from(path), data, infos: &infos };
    for (layer, facts) in layers.into_iter().zip(facts) {
        let place = format!("{place} layers.{layer}");
        let parts = source.layer(layer, (rope.as_ref(), &facts), entries.as_deref(), tokens.as_deref());
        let Parts { key, value, query, entries } = match parts {
            Ok(parts) => parts,
            Err(defect) => {
                reading.findings.push(defect.reason, place, defect.message);
                continue;
            }
        };
        let mut row = 0;
        for (start, seq, stage) in entries {
            let rows = row..row + seq;
            row = rows.end;
            if !selection.admits(Some(stage), seq, &mut reading.dropped) {
                continue;
            }
            let ids = tokens.as_ref().and_then(|tokens| tokens.get(rows.clone()));
            let entry = Entry {
                stage,
                start,
                seq,
                key: slice(&key, rows.start, seq),
                value: slice(&value, rows.start, seq),
                query: query.as_ref().map(|query| slice(query, rows.start, seq)),
                tokens: ids.map(|ids| reading.intern(ids)),
                place: format!("{place} {start}..{}", start + seq as u64),
                meta: None,
            };
            let (run, rope, facts) = (run.clone(), rope.clone(), facts.clone());
            reading.candidates.push(Candidate { run, layer, rope, facts, entry });
        }
    }
    Ok(())
}

/// Layers that have at least one tensor of a dump, ascending.
fn layer_ids<'a>(names: impl Iterator<Item = &'a String>) -> std::collections::BTreeSet<u32> {
    names
        .filter_map(|name| {
            let (id, part) = name.strip_prefix("layers.")?.split_once('.')?;
            let layer: u32 = id.parse().ok()?;
            // `layers.07.key` would be a second name of layer 7.
            (matches!(part, "key" | "value" | "query") && id == layer.to_string()).then_some(layer)
        })
        .collect()
}

fn read_tokens(file: &mut File, data: u64, info: &TensorInfo) -> Checked<Vec<u32>> {
    let size = match info.dtype {
        Dtype::I64 => 8,
        Dtype::I32 | Dtype::U32 => 4,
        other => return Err(invalid(format!("`tokens`: expected I64, I32 or U32, got {other}"))),
    };
    if info.shape.len() != 1 {
        return Err(invalid(format!("`tokens`: expected the shape (seq), got {:?}", info.shape)));
    }
    // The header was checked against the length of the file.
    let (from, to) = info.data_offsets;
    let mut bytes = vec![0; to.saturating_sub(from)];
    file.seek(SeekFrom::Start(data + from as u64))
        .and_then(|_| file.read_exact(&mut bytes))
        .map_err(|error| unreadable(&error))?;
    let id = |bytes: &[u8]| -> Checked<u32> {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let id = match info.dtype {
            Dtype::I32 => i64::from(u64::from_le_bytes(wide) as i32),
            _ => u64::from_le_bytes(wide).cast_signed(),
        };
        u32::try_from(id).map_err(|_| invalid(format!("`tokens`: expected ids of 0 to 2^32 - 1, got {id}")))
    };
    bytes.chunks_exact(size).map(id).collect()
}

/// A run of rows of a tensor that holds at least as many.
fn slice(tensor: &Tensor, row: usize, seq: usize) -> Tensor {
    let skipped = (row * tensor.shape.row() * tensor.dtype.size()) as u64;
    Tensor { shape: tensor.shape.with_seq(seq), offset: tensor.offset + skipped, ..tensor.clone() }
}

struct Source<'a> {
    path: Arc<Path>,
    data: u64,
    infos: &'a std::collections::HashMap<String, &'a TensorInfo>,
}

struct Parts {
    key: Tensor,
    value: Tensor,
    query: Option<Tensor>,
    entries: Vec<(u64, usize, Stage)>,
}

impl Source<'_> {
    fn tensor(&self, name: &str) -> Checked<Option<Tensor>> {
        let Some(info) = self.infos.get(name) else { return Ok(None) };
        let dtype = match info.dtype {
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            Dtype::F32 => DType::F32,
            other => {
                let message = format!("`{name}`: expected F16, BF16 or F32, got {other}");
                return Err(Defect::new(Reason::UnsupportedElementSize, message));
            }
        };
        let &[seq, heads, dim] = info.shape.as_slice() else {
            return Err(invalid(format!("`{name}`: expected the shape (seq, heads, dim), got {:?}", info.shape)));
        };
        let shape = Shape::new(seq, heads, dim);
        if seq == 0 || heads == 0 || dim == 0 {
            return Err(Defect::new(
                Reason::TensorEmpty,
                format!("`{name}`: expected at least one element, got {shape}"),
            ));
        }
        let offset = self.data + info.data_offsets.0 as u64;
        Ok(Some(Tensor { dtype, shape, path: Arc::clone(&self.path), offset, layout: Layout::Logical }))
    }

    /// The tensors of a layer, checked against each other and against what the file says of all layers.
    fn layer(
        &self,
        layer: u32,
        (rope, facts): (Option<&Rope>, &LayerFacts),
        entries: Option<&[(u64, usize, Stage)]>,
        tokens: Option<&[u32]>,
    ) -> Checked<Parts> {
        let required = |part| {
            let name = tensor_name(layer, part);
            self.tensor(&name)?.ok_or_else(|| invalid(format!("the tensor `{name}` is missing")))
        };
        let (key, value) = (required("key")?, required("value")?);
        let query = self.tensor(&tensor_name(layer, "query"))?;
        let (seq, heads) = (key.shape.seq, key.shape.heads);
        if (value.shape.seq, value.shape.heads) != (seq, heads) {
            let message = format!("value: expected tokens and heads of the key {}, got {}", key.shape, value.shape);
            return Err(invalid(message));
        }
        if let Some(Tensor { shape, .. }) = &query
            && ((shape.seq, shape.dim) != (seq, key.shape.dim) || shape.heads % heads != 0)
        {
            let message = format!("query: expected ({seq}, a multiple of {heads}, {}), got {shape}", key.shape.dim);
            return Err(invalid(message));
        }
        if let Some(rope) = rope {
            check_rope(rope, key.shape.dim).map_err(invalid)?;
        }
        facts.check(key.shape.dim).map_err(invalid)?;
        if let Some(tokens) = tokens.filter(|tokens| tokens.len() != seq) {
            let message = format!("`tokens`: expected {seq} token ids, got {}", tokens.len());
            return Err(Defect::new(Reason::TokensDifferFromShape, message));
        }
        let entries = entries.map_or_else(|| vec![(0, seq, Stage::Prefill)], <[_]>::to_vec);
        let covered = entries.iter().try_fold(0_usize, |sum, (_, seq, _)| sum.checked_add(*seq));
        if covered != Some(seq) {
            let covered = covered.unwrap_or(usize::MAX);
            return Err(invalid(format!("`entries`: expected {seq} tokens in all, got {covered}")));
        }
        Ok(Parts { key, value, query, entries })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::super::samples::open;
    use super::super::{Dropped, Dump};
    use super::*;

    /// A file of these tensors (name, dtype, bytes per element, shape) filled with consecutive bytes.
    fn file(metadata: &Value, tensors: &[(&str, &str, usize, &[usize])]) -> Vec<u8> {
        let mut header = json!({"__metadata__": metadata});
        let mut end = 0;
        for (name, dtype, size, shape) in tensors {
            let from = end;
            end += shape.iter().product::<usize>() * size;
            header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": [from, end]});
        }
        with_header(&header.to_string(), &(0..end).map(|i| i as u8).collect::<Vec<_>>())
    }

    fn with_header(text: &str, data: &[u8]) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes(), data].concat()
    }

    fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn finding(bytes: &[u8]) -> (Reason, String) {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "run.safetensors", bytes);
        let finding = open(folder.path()).findings.list.swap_remove(0);
        assert!(finding.place.contains("run.safetensors"), "{finding}");
        (finding.reason, finding.message)
    }

    #[test]
    fn file_without_metadata_is_one_prefill_entry_named_like_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let tensors: [(&str, &str, usize, &[usize]); 2] =
            [("layers.3.key", "F16", 2, &[4, 2, 3]), ("layers.3.value", "BF16", 2, &[4, 2, 5])];
        let path = write(folder.path(), "my-run.safetensors", &file(&json!({}), &tensors));
        for root in [path.as_path(), folder.path()] {
            let dump = open(root);
            assert!(dump.findings.list.is_empty(), "{}", dump.findings);
            let (run, layer, entry) = dump.iter().next().unwrap();
            assert_eq!((run.name.as_str(), layer.id, entry.seq, entry.stage), ("my-run", 3, 4, Stage::Prefill));
            assert_eq!((entry.key.dtype, entry.key.shape), (DType::F16, Shape::new(4, 2, 3)));
            assert_eq!((entry.value.dtype, entry.value.shape), (DType::Bf16, Shape::new(4, 2, 5)));
            assert_eq!(*entry.key.map().unwrap(), (0..48).collect::<Vec<u8>>());
            assert_eq!(*entry.value.map().unwrap(), (48..128).collect::<Vec<u8>>());
            assert!(entry.query.is_none() && entry.tokens.is_none());
        }
    }

    #[test]
    fn entries_split_the_tensors_and_token_ids() {
        let folder = tempfile::tempdir().unwrap();
        for (dtype, size) in [("I32", 4), ("U32", 4), ("I64", 8)] {
            let metadata = json!({
                "format": "gearbox-dump", "version": "1", "run": "named", "author": "someone",
                "rope": r#"{"pairing": "half-split", "theta": 10000, "rotary_dim": 2}"#,
                "entries": r#"[[0, 2, "prefill"], [7, 1, "decode"]]"#,
            });
            let tensors: [(&str, &str, usize, &[usize]); 7] = [
                ("layers.0.key", "F16", 2, &[3, 1, 2]),
                ("layers.0.value", "F16", 2, &[3, 1, 2]),
                ("layers.0.query", "F16", 2, &[3, 2, 2]),
                ("layers.1.key", "F16", 2, &[3, 1, 2]),
                ("layers.1.value", "F16", 2, &[3, 1, 2]),
                ("other", "I16", 2, &[2]),
                ("tokens", dtype, size, &[3]),
            ];
            let mut bytes = file(&metadata, &tensors);
            let at = bytes.len() - 3 * size;
            bytes[at..].fill(0);
            for (i, id) in [300_u32, 5, 6].iter().enumerate() {
                bytes[at + i * size..][..4].copy_from_slice(&id.to_le_bytes());
            }
            let path = write(folder.path(), "x.safetensors", &bytes);
            let dump = open(&path);
            assert!(dump.findings.list.is_empty(), "{}", dump.findings);
            assert_eq!((dump.runs[0].name.as_str(), dump.entries()), ("named", 4));
            assert_eq!(dump.runs[0].rope.as_ref().unwrap().rotary_dim, 2);
            let [first, second] = dump.runs[0].layers[0].entries.as_slice() else { panic!("two entries") };
            assert_eq!((first.start, first.seq, first.stage), (0, 2, Stage::Prefill));
            assert_eq!((second.start, second.seq, second.stage), (7, 1, Stage::Decode));
            assert_eq!(first.tokens.as_deref(), Some(&[300, 5][..]));
            assert_eq!(second.tokens.as_deref(), Some(&[6][..]));
            assert_eq!(*second.key.map().unwrap(), [8, 9, 10, 11]);
            assert_eq!(*second.query.as_ref().unwrap().map().unwrap(), (40..48).collect::<Vec<u8>>());
            assert!(second.place.ends_with("x.safetensors layers.0 7..8"), "{}", second.place);
            let shared = dump.runs[0].layers[1].entries[0].tokens.as_ref().unwrap();
            assert!(Arc::ptr_eq(shared, first.tokens.as_ref().unwrap()));
            assert_eq!(free_metadata(&path), BTreeMap::from([("author".to_owned(), "someone".to_owned())]));

            let decode = Selection { stage: Some(Stage::Decode), ..Selection::default() };
            let dump = Dump::open(&path, &decode).unwrap();
            assert_eq!((dump.entries(), dump.dropped), (2, Dropped { stage: 2, ..Dropped::default() }));
        }
    }

    #[test]
    fn facts_of_layers_follow_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let yarn = json!({"rope_type": "yarn", "factor": 4.0});
        let metadata = json!({
            "attention": r#"[{"scale": 0.5, "softcap": null, "window": null}, {"scale": 0.25, "softcap": 50, "window": 2}]"#,
            "rope_layers": json!([null, yarn]).to_string(),
        });
        let tensors: [(&str, &str, usize, &[usize]); 4] = [
            ("layers.10.key", "F16", 2, &[3, 1, 4]),
            ("layers.10.value", "F16", 2, &[3, 1, 4]),
            ("layers.9.key", "F16", 2, &[3, 1, 4]),
            ("layers.9.value", "F16", 2, &[3, 1, 4]),
        ];
        let path = write(folder.path(), "x.safetensors", &file(&metadata, &tensors));
        let dump = open(&path);
        assert!(dump.findings.list.is_empty(), "{}", dump.findings);
        let [first, second] = dump.runs[0].layers.as_slice() else { panic!("two layers") };
        // Half is 1 / √4, so nothing is said of layer 9.
        assert_eq!((first.id, &first.facts), (9, &LayerFacts::default()));
        let attention = AttentionFacts { scale: 0.25, softcap: Some(50.0), window: Some(2) };
        assert_eq!((second.id, &second.facts), (10, &LayerFacts { attention: Some(attention), rope: Some(yarn) }));
        assert_eq!((&dump.runs[0].rope, free_metadata(&path)), (&None, BTreeMap::new()));
    }

    #[test]
    fn impossible_facts_are_findings_of_their_layer_or_of_the_file() {
        let tensors: [(&str, &str, usize, &[usize]); 4] = [
            ("layers.0.key", "F16", 2, &[3, 2, 4]),
            ("layers.0.value", "F16", 2, &[3, 2, 4]),
            ("layers.7.key", "F16", 2, &[3, 2, 4]),
            ("layers.7.value", "F16", 2, &[3, 2, 4]),
        ];
        let usual = r#"{"scale": 0.5, "softcap": null, "window": null}"#;
        let of_second = |facts: &str| json!({"attention": format!("[{usual}, {facts}]")});
        for (metadata, place, message) in [
            (json!({"attention": "x"}), "", "`attention`: expected value at line 1"),
            (json!({"attention": usual}), "", "`attention`: invalid type: map, expected a sequence"),
            (
                json!({"attention": format!("[{usual}]")}),
                "",
                "`attention`: expected one element for each of 2 layers, got 1",
            ),
            (
                json!({"rope_layers": "[null, null, null]"}),
                "",
                "`rope_layers`: expected one element for each of 2 layers, got 3",
            ),
            (of_second(r#"{"softcap": 1.0}"#), "", "missing field `scale`"),
            (of_second(r#"{"scale": NaN}"#), "", "expected value"),
            (of_second(r#"{"scale": 1e999}"#), "", "number out of range"),
            (
                of_second(r#"{"scale": 1, "cap": 2}"#),
                "",
                "unknown field `cap`, expected one of `scale`, `softcap`, `window`",
            ),
            (of_second(r#"{"scale": 1, "window": -4}"#), "", "invalid value: integer `-4`, expected u64"),
            (
                json!({"rope": r#"{"pairing": "adjacent", "theta": 1, "rotary_dim": 4}"#, "rope_layers": "[null, null]"}),
                "",
                "expected `rope` or `rope_layers`, got both",
            ),
            (
                of_second(r#"{"scale": 0}"#),
                " layers.7",
                "`attention`: expected a positive `scale` in the range of f32, got 0",
            ),
            (
                of_second(r#"{"scale": 1, "softcap": -50}"#),
                " layers.7",
                "expected a positive `softcap` in the range of f32, got -50",
            ),
            (of_second(r#"{"scale": 1, "window": 0}"#), " layers.7", "expected a `window` of at least 1, got 0"),
            (json!({"rope_layers": "[null, 3]"}), " layers.7", "rotation of the layer: expected an object, got `3`"),
            (
                json!({"rope_layers": r#"[null, {"pairing": "adjacent", "theta": 1, "rotary_dim": 3}]"#}),
                " layers.7",
                "`rotary_dim` from 2 to 4, got 3",
            ),
        ] {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), "r.safetensors", &file(&metadata, &tensors));
            let dump = open(folder.path());
            let finding = &dump.findings.list[0];
            assert_eq!(finding.reason, Reason::SafetensorsInvalid, "{finding}");
            assert!(finding.place.ends_with(&format!("r.safetensors{place}")), "{finding}");
            assert!(finding.message.contains(message), "{finding}");
            assert_eq!(dump.entries(), usize::from(!place.is_empty()), "the other layer stays: {finding}");
        }
    }

    #[test]
    fn bad_header_is_an_invalid_file() {
        let good =
            file(&json!({}), &[("layers.0.key", "F16", 2, &[1, 1, 1]), ("layers.0.value", "F16", 2, &[1, 1, 1])]);
        let long = [&1000_u64.to_le_bytes()[..], &good[8..]].concat();
        let huge = [&u64::MAX.to_le_bytes()[..], &good[8..]].concat();
        for (bytes, reason, message) in [
            (&[][..], Reason::SafetensorsInvalid, "expected a header length of 8 bytes, got 0 bytes"),
            (&good[..7], Reason::SafetensorsInvalid, "got 7 bytes"),
            (&long, Reason::SafetensorsInvalid, "got 1000"),
            (&huge, Reason::SafetensorsInvalid, "got 18446744073709551615"),
            (&with_header("{", b""), Reason::SafetensorsInvalid, "header: EOF"),
            (&with_header("[]", b""), Reason::SafetensorsInvalid, "header: "),
            (&with_header("{}", b""), Reason::SafetensorsInvalid, "expected tensors named `layers.<L>.key`, got none"),
            (&good[..good.len() - 1], Reason::SizeDiffersFromShape, "expected 4 bytes of tensors, got 3"),
            (&[&good[..], b"x"].concat(), Reason::SizeDiffersFromShape, "expected 4 bytes of tensors, got 5"),
        ] {
            let (got, text) = finding(bytes);
            assert_eq!(got, reason, "{text}");
            assert!(text.contains(message), "{text}");
        }
    }

    #[test]
    fn header_that_breaks_the_naming_of_dumps_is_invalid() {
        type Tensors = &'static [(&'static str, &'static str, usize, &'static [usize])];
        const KEY: (&str, &str, usize, &[usize]) = ("layers.0.key", "F16", 2, &[3, 2, 4]);
        const VALUE: (&str, &str, usize, &[usize]) = ("layers.0.value", "F16", 2, &[3, 2, 4]);
        let rows: &[(Value, Tensors, Reason, &str)] = &[
            (
                json!({"format": "other"}),
                &[KEY, VALUE],
                Reason::SafetensorsInvalid,
                "`format`: expected `gearbox-dump`",
            ),
            (json!({"version": "2"}), &[KEY, VALUE], Reason::SafetensorsInvalid, "`version`: expected `1`, got `2`"),
            (json!({"run": "a b"}), &[KEY, VALUE], Reason::RunIdInvalid, "`a b`"),
            (json!({"rope": "{}"}), &[KEY, VALUE], Reason::SafetensorsInvalid, "`rope`"),
            (
                json!({"rope": r#"{"pairing": "adjacent", "theta": 1, "rotary_dim": 3}"#}),
                &[KEY, VALUE],
                Reason::SafetensorsInvalid,
                "`rotary_dim` from 2 to 4, got 3",
            ),
            (json!({"entries": "x"}), &[KEY, VALUE], Reason::SafetensorsInvalid, "`entries`"),
            (
                json!({"entries": "[[0, 2, \"prefill\"]]"}),
                &[KEY, VALUE],
                Reason::SafetensorsInvalid,
                "expected 3 tokens in all, got 2",
            ),
            (
                json!({"entries": "[[0, 3, \"a\"], [3, 0, \"a\"]]"}),
                &[KEY, VALUE],
                Reason::SafetensorsInvalid,
                "at least one token",
            ),
            (
                json!({"entries": format!("[[{}, 3, \"a\"]]", u64::MAX)}),
                &[KEY, VALUE],
                Reason::SafetensorsInvalid,
                "below 2^64",
            ),
            (
                json!({"entries": "[[0, 2, \"prefill\"], [1, 1, \"decode\"]]"}),
                &[KEY, VALUE],
                Reason::OverlappingRange,
                "tokens 1..2 overlap 0..2",
            ),
            (json!({}), &[KEY], Reason::SafetensorsInvalid, "the tensor `layers.0.value` is missing"),
            (json!({}), &[VALUE], Reason::SafetensorsInvalid, "the tensor `layers.0.key` is missing"),
            (json!({}), &[("layers.00.key", "F16", 2, &[3, 2, 4])], Reason::SafetensorsInvalid, "got none"),
            (
                json!({}),
                &[("layers.0.key", "F64", 8, &[3, 2, 4]), VALUE],
                Reason::UnsupportedElementSize,
                "F16, BF16 or F32, got F64",
            ),
            (
                json!({}),
                &[("layers.0.key", "F16", 2, &[6, 4]), VALUE],
                Reason::SafetensorsInvalid,
                "(seq, heads, dim), got [6, 4]",
            ),
            (json!({}), &[("layers.0.key", "F16", 2, &[0, 2, 4]), VALUE], Reason::TensorEmpty, "got (0, 2, 4)"),
            (json!({}), &[KEY, ("layers.0.value", "F16", 2, &[2, 2, 4])], Reason::SafetensorsInvalid, "got (2, 2, 4)"),
            (
                json!({}),
                &[KEY, VALUE, ("layers.0.query", "F16", 2, &[3, 3, 4])],
                Reason::SafetensorsInvalid,
                "a multiple of 2",
            ),
            (
                json!({}),
                &[KEY, VALUE, ("tokens", "F32", 4, &[3])],
                Reason::SafetensorsInvalid,
                "expected I64, I32 or U32, got F32",
            ),
            (
                json!({}),
                &[KEY, VALUE, ("tokens", "I32", 4, &[1, 3])],
                Reason::SafetensorsInvalid,
                "expected the shape (seq)",
            ),
            (
                json!({}),
                &[KEY, VALUE, ("tokens", "I32", 4, &[2])],
                Reason::TokensDifferFromShape,
                "expected 3 token ids, got 2",
            ),
            // The bytes count up, so the 64-bit ids are far beyond 32 bits.
            (
                json!({}),
                &[KEY, VALUE, ("tokens", "I64", 8, &[3])],
                Reason::SafetensorsInvalid,
                "expected ids of 0 to 2^32 - 1",
            ),
        ];
        for (metadata, tensors, reason, message) in rows {
            let (got, text) = finding(&file(metadata, tensors));
            assert_eq!(got, *reason, "{text}");
            assert!(text.contains(message), "{text}");
        }
    }

    #[test]
    fn bad_layer_leaves_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let tensors: [(&str, &str, usize, &[usize]); 3] = [
            ("layers.0.key", "F16", 2, &[4, 2, 3]),
            ("layers.1.key", "F16", 2, &[4, 2, 3]),
            ("layers.1.value", "F16", 2, &[4, 2, 3]),
        ];
        write(folder.path(), "r.safetensors", &file(&json!({}), &tensors));
        let dump = open(folder.path());
        assert_eq!((dump.entries(), dump.runs[0].layers[0].id), (1, 1));
        assert!(dump.findings.list[0].place.ends_with("r.safetensors layers.0"));
    }

    #[test]
    fn two_files_of_one_run_complete_or_contradict_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let layer = |key: &'static str, value: &'static str| {
            file(&json!({"run": "shared"}), &[(key, "F16", 2, &[4, 2, 3]), (value, "F16", 2, &[4, 2, 3])])
        };
        write(folder.path(), "a.safetensors", &layer("layers.0.key", "layers.0.value"));
        write(folder.path(), "b.safetensors", &layer("layers.1.key", "layers.1.value"));
        let dump = open(folder.path());
        assert_eq!((dump.runs.len(), dump.entries(), dump.findings.list.len()), (1, 2, 0));
        write(folder.path(), "c.safetensors", &layer("layers.1.key", "layers.1.value"));
        assert_eq!(open(folder.path()).findings.list[0].reason, Reason::DuplicateRange);
    }

    #[test]
    fn damaged_file_never_panics() {
        let metadata = json!({"run": "r", "entries": "[[0, 2, \"prefill\"], [2, 1, \"decode\"]]"});
        let tensors: [(&str, &str, usize, &[usize]); 3] = [
            ("layers.0.key", "F16", 2, &[3, 2, 4]),
            ("layers.0.value", "F16", 2, &[3, 2, 4]),
            ("tokens", "U32", 4, &[3]),
        ];
        let good = file(&metadata, &tensors);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.safetensors");
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, &bad).unwrap();
            if let Ok(dump) = Dump::open(&path, &Selection::default()) {
                dump.scan();
            }
            fs::write(&path, &good[..at]).unwrap();
            assert!(!open(&path).findings.is_clean(), "cut at {at}");
        }
    }
}
