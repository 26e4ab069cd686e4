//! Writes dumps: entries in the reference layout, runs as safetensors files.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use gearbox_core::{Chunk, DType, Error, Result, Rope, Shape, Stage};
use serde_json::{Value, json};

use super::meta::Meta;
use super::reference::check_rope;
use super::safetensors::{FORMAT, KEYS, VERSION};
use super::{AttentionFacts, LayerFacts, Run, Tensor, check_run_name, tensor_name};
use crate::atomic::AtomicFile;

/// An entry to be written in the reference layout.
#[derive(Clone, Copy, Debug)]
pub struct NewEntry<'a> {
    /// Name of the run, `[A-Za-z0-9._-]+`.
    pub run: &'a str,
    /// Layer of the model.
    pub layer: u32,
    /// Position of the first token.
    pub start: u64,
    /// Phase of the request.
    pub stage: Stage,
    /// Keys, after `RoPE`.
    pub key: Chunk<'a>,
    /// Values; the layout has one shape and dtype for keys and values.
    pub value: Chunk<'a>,
    /// Queries, after `RoPE`, of the same dtype.
    pub query: Option<Chunk<'a>>,
    /// Token ids, one per token.
    pub tokens: Option<&'a [u32]>,
    /// How keys and queries were rotated.
    pub rope: Option<&'a Rope>,
    /// How the layer attends, if not as [usual](AttentionFacts::usual).
    pub attention: Option<AttentionFacts>,
}

impl<'a> NewEntry<'a> {
    /// An entry without queries, token ids, rotation and attention.
    pub fn new(run: &'a str, layer: u32, start: u64, stage: Stage, key: Chunk<'a>, value: Chunk<'a>) -> Self {
        Self { run, layer, start, stage, key, value, query: None, tokens: None, rope: None, attention: None }
    }

    fn facts(&self) -> Result<Facts<'a>> {
        let (shape, dtype) = (self.key.shape(), self.key.dtype());
        let differs = |what: &str, got: Chunk<'_>, expected: Shape| {
            Err(Error::shape(format!("{what}: expected {dtype} {expected}, got {} {}", got.dtype(), got.shape())))
        };
        if (self.value.shape(), self.value.dtype()) != (shape, dtype) {
            return differs("value", self.value, shape);
        }
        if let Some(query) = self.query {
            let heads = query.shape().heads;
            if (query.shape(), query.dtype()) != (Shape { heads, ..shape }, dtype) || heads % shape.heads.max(1) != 0 {
                return differs("query", query, Shape { heads, ..shape });
            }
        }
        let facts = Facts {
            run: self.run,
            layer: self.layer,
            start: self.start,
            stage: self.stage,
            shape,
            dtype,
            query_heads: self.query.map(|query| query.shape().heads),
            tokens: self.tokens,
            rope: self.rope,
            attention: self.attention,
            rope_layer: None,
        };
        facts.check()?;
        Ok(facts)
    }
}

/// Writes keys, values and queries, then the meta file that makes them an entry; creates the folder.
///
/// Each file appears complete or not at all. An interrupted call leaves no meta file, so readers see no entry.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if the entry exists and `overwrite` is off, or if the run name is
/// not legal. [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if the parts disagree.
/// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if a file cannot be written.
pub fn write_reference_entry(layer_dir: &Path, entry: &NewEntry<'_>, overwrite: bool) -> Result<()> {
    let facts = entry.facts()?;
    let mut meta = facts.meta().to_bytes();
    meta.push(b'\n');
    let query = entry.query.map(|query| query.bytes());
    write_files(layer_dir, &facts, &meta, [Some(entry.key.bytes()), Some(entry.value.bytes()), query], overwrite)
}

/// What a meta file says, without the tensors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts<'a> {
    pub run: &'a str,
    pub layer: u32,
    pub start: u64,
    pub stage: Stage,
    pub shape: Shape,
    pub dtype: DType,
    pub query_heads: Option<usize>,
    pub tokens: Option<&'a [u32]>,
    pub rope: Option<&'a Rope>,
    pub attention: Option<AttentionFacts>,
    pub rope_layer: Option<&'a Value>,
}

/// The name of an element type in meta files.
pub(super) fn dtype_label(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "fp16",
        DType::F32 => "fp32",
        other => other.name(),
    }
}

impl Facts<'_> {
    fn check(&self) -> Result<()> {
        check_run_name(self.run)?;
        if self.shape.elements() == 0 || self.start.checked_add(self.shape.seq as u64).is_none() {
            return Err(Error::shape(format!("expected at least one element below position 2^64, got {}", self.shape)));
        }
        if let Some(tokens) = self.tokens.filter(|tokens| tokens.len() != self.shape.seq) {
            return Err(Error::shape(format!("expected {} token ids, got {}", self.shape.seq, tokens.len())));
        }
        self.rope.map_or(Ok(()), |rope| check_rope(rope, self.shape.dim)).map_err(Error::invalid_input)?;
        self.attention.map_or(Ok(()), |attention| attention.check()).map_err(Error::invalid_input)
    }

    fn end(&self) -> u64 {
        self.start + self.shape.seq as u64
    }

    /// `k`, `v`, `q` or `meta` with the range of the entry.
    fn name(&self, part: &str) -> String {
        let ending = if part == "meta" { "json" } else { "bin" };
        format!("{part}_t{}_{}.{ending}", self.start, self.end())
    }

    /// The file that describes the entry.
    pub fn meta_path(&self, layer_dir: &Path) -> PathBuf {
        layer_dir.join(self.name("meta"))
    }

    /// The tensor files with their sizes: keys, values and, if there are any, queries.
    pub fn tensor_files(&self, layer_dir: &Path) -> impl Iterator<Item = (PathBuf, u64)> {
        let bytes = |heads| (Shape { heads, ..self.shape }.elements() * self.dtype.size()) as u64;
        let parts = [("k", Some(self.shape.heads)), ("v", Some(self.shape.heads)), ("q", self.query_heads)];
        parts.into_iter().filter_map(move |(part, heads)| Some((layer_dir.join(self.name(part)), bytes(heads?))))
    }

    /// The meta file: keys of the reference in its order, then ours.
    pub fn meta(&self) -> Meta {
        let mut meta = Meta::default();
        meta.set("layer_id", self.layer);
        meta.set("seq_start", self.start);
        meta.set("seq_len", self.shape.seq);
        meta.set("seq_end_exclusive", self.end());
        meta.set("kv_heads", self.shape.heads);
        meta.set("head_dim", self.shape.dim);
        meta.set("bytes_per_elem", self.dtype.size());
        meta.set("dtype", dtype_label(self.dtype));
        meta.set("add", self.shape.seq);
        meta.set("tensor_seq_len", self.shape.seq);
        meta.set("quant_key", false);
        meta.set("quant_value", false);
        meta.set("flash_attention", false);
        meta.set("stage", self.stage.name());
        meta.set("run_id", self.run);
        self.set_files(&mut meta);
        if let Some(heads) = self.query_heads {
            meta.set("q_heads", heads);
        }
        if let Some(tokens) = self.tokens {
            meta.set("tokens", tokens);
        }
        if let Some(rope) = self.rope {
            meta.set("rope", json!(rope));
        }
        if let Some(attention) = self.attention.filter(|attention| !attention.is_usual(self.shape.dim)) {
            meta.set("attention", json!(attention));
        }
        if let Some(rope) = self.rope_layer {
            meta.set("rope_layer", rope.clone());
        }
        meta
    }

    /// Names the tensor files.
    pub fn set_files(&self, meta: &mut Meta) {
        meta.set("k_file", self.name("k"));
        meta.set("v_file", self.name("v"));
        if self.query_heads.is_some() {
            meta.set("q_file", self.name("q"));
        }
    }
}

/// Writes the files of an entry; `tensors` are keys, values and queries.
pub(super) fn write_files(
    layer_dir: &Path,
    facts: &Facts<'_>,
    meta: &[u8],
    tensors: [Option<&[u8]>; 3],
    overwrite: bool,
) -> Result<()> {
    fs::create_dir_all(layer_dir).map_err(|error| Error::io(layer_dir, &error))?;
    let meta_path = facts.meta_path(layer_dir);
    if overwrite && meta_path.exists() {
        // While the tensors are replaced there must be no entry: its old meta would describe new bytes.
        fs::remove_file(&meta_path).map_err(|error| Error::io(&meta_path, &error))?;
    }
    // Created before the tensors are touched: an existing entry stays as it is.
    let meta_file = AtomicFile::create(&meta_path, overwrite)?;
    for ((path, _), bytes) in facts.tensor_files(layer_dir).zip(tensors.into_iter().flatten()) {
        // A tensor file without meta is the rest of an interrupted write.
        write_all(AtomicFile::create(&path, true)?, bytes)?;
    }
    write_all(meta_file, meta)
}

fn write_all(mut file: AtomicFile, bytes: &[u8]) -> Result<()> {
    file.write_all(bytes).map_err(|error| Error::io(file.path(), &error))?;
    file.commit()
}

/// Element type, heads and channels of a tensor of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Element type.
    pub dtype: DType,
    /// Heads.
    pub heads: usize,
    /// Channels per head.
    pub dim: usize,
}

impl From<&Tensor> for TensorSpec {
    fn from(tensor: &Tensor) -> Self {
        Self { dtype: tensor.dtype, heads: tensor.shape.heads, dim: tensor.shape.dim }
    }
}

/// The tensors of a layer of a safetensors file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerSpec {
    /// Layer of the model.
    pub id: u32,
    /// Keys.
    pub key: TensorSpec,
    /// Values.
    pub value: TensorSpec,
    /// Queries, if there are any.
    pub query: Option<TensorSpec>,
}

impl LayerSpec {
    /// The tensors in the order of the file, by the part of their name: `key`, `value`, `query`.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, TensorSpec)> {
        [("key", Some(self.key)), ("value", Some(self.value)), ("query", self.query)]
            .into_iter()
            .filter_map(|(part, spec)| Some((part, spec?)))
    }
}

/// Everything a safetensors file says before its tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunSpec {
    /// Name of the run, `[A-Za-z0-9._-]+`.
    pub name: String,
    /// How keys and queries were rotated.
    pub rope: Option<Rope>,
    /// Start, number of tokens and stage of each entry; the same for all layers.
    pub entries: Vec<(u64, usize, Stage)>,
    /// Token ids of all entries, one behind the other.
    pub tokens: Option<Vec<u32>>,
    /// Layers in the order of the file.
    pub layers: Vec<LayerSpec>,
    /// What is said of each layer; empty if nothing is of any.
    pub facts: Vec<LayerFacts>,
    /// Free strings, such as the name of the model.
    pub metadata: BTreeMap<String, String>,
}

impl RunSpec {
    /// Describes a run of a dump.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) if its layers hold different ranges, or if only some entries have
    /// token ids or queries: one tensor per layer cannot say that.
    pub fn of(run: &Run) -> Result<Self> {
        let mut spec = Self { name: run.name.clone(), rope: run.rope.clone(), ..Self::default() };
        let ranges = |layer: &super::Layer| -> Vec<_> {
            layer.entries.iter().map(|entry| (entry.start, entry.seq, entry.stage)).collect()
        };
        for layer in &run.layers {
            let place = |what: String| Error::unsupported(format!("run {}, layer {}: {what}", run.name, layer.id));
            let Some(first) = layer.entries.first() else { continue };
            let entries = ranges(layer);
            if spec.layers.is_empty() {
                spec.entries = entries;
            } else if spec.entries != entries {
                let (expected, got) = (spec.entries.len(), entries.len());
                return Err(place(format!("expected the {expected} entries of the first layer, got {got} others")));
            }
            let queries = layer.entries.iter().filter(|entry| entry.query.is_some()).count();
            if queries != 0 && queries != layer.entries.len() {
                return Err(place(format!("expected queries in all {} entries, got {queries}", layer.entries.len())));
            }
            spec.layers.push(LayerSpec {
                id: layer.id,
                key: (&first.key).into(),
                value: (&first.value).into(),
                query: first.query.as_ref().map(TensorSpec::from),
            });
        }
        let facts: Vec<_> = run.layers.iter().map(|layer| layer.facts.clone()).collect();
        if facts.iter().any(|facts| *facts != LayerFacts::default()) {
            spec.facts = facts;
        }
        // One layer that names the ids of a range is enough.
        let ids = |i: usize| run.layers.iter().find_map(|layer| layer.entries.get(i)?.tokens.as_deref());
        let named: Vec<_> = (0..spec.entries.len()).map_while(ids).collect();
        if named.len() == spec.entries.len() {
            spec.tokens = Some(named.concat());
        } else if (0..spec.entries.len()).any(|i| ids(i).is_some()) {
            let (start, seq, _) = spec.entries[named.len()];
            return Err(Error::unsupported(format!(
                "run {}: expected token ids in all entries or in none, got none for {start}..{}",
                run.name,
                start + seq as u64
            )));
        }
        Ok(spec)
    }

    /// Tokens of all entries.
    pub fn seq(&self) -> usize {
        self.entries.iter().fold(0, |sum, (_, seq, _)| sum.saturating_add(*seq))
    }

    /// Name and bytes of each tensor in the order of the file, without the token ids.
    fn tensors(&self) -> impl Iterator<Item = (String, TensorSpec, u64)> {
        let seq = self.seq();
        self.layers.iter().flat_map(move |layer| {
            layer.parts().map(move |(part, spec)| {
                let bytes = [spec.heads, spec.dim, spec.dtype.size()]
                    .into_iter()
                    .fold(seq as u64, |product, extent| product.saturating_mul(extent as u64));
                (tensor_name(layer.id, part), spec, bytes)
            })
        })
    }

    /// What is said of single layers, as far as it does not go without saying.
    fn set_facts(&self, strings: &mut Meta) -> Result<()> {
        if self.facts.is_empty() {
            return Ok(());
        }
        if self.facts.len() != self.layers.len() {
            let (expected, got) = (self.layers.len(), self.facts.len());
            return Err(Error::shape(format!("expected facts of {expected} layers or of none, got {got}")));
        }
        let layers = || self.facts.iter().zip(&self.layers);
        for (facts, layer) in layers() {
            facts
                .check(layer.key.dim)
                .map_err(|message| Error::invalid_input(message).context(format!("layer {}", layer.id)))?;
        }
        if self.facts.iter().any(|facts| facts.rope.is_some()) {
            strings
                .set("rope_layers", json!(self.facts.iter().map(|facts| &facts.rope).collect::<Vec<_>>()).to_string());
        }
        if layers().any(|(facts, layer)| facts.attention.is_some_and(|attention| !attention.is_usual(layer.key.dim))) {
            let stated = |(facts, layer): (&LayerFacts, &LayerSpec)| {
                facts.attention.unwrap_or_else(|| AttentionFacts::usual(layer.key.dim))
            };
            strings.set("attention", json!(layers().map(stated).collect::<Vec<_>>()).to_string());
        }
        Ok(())
    }

    /// The header with its length in front and padding behind, and the bytes of the tensors.
    pub(super) fn header(&self) -> Result<(Vec<u8>, u64)> {
        check_run_name(&self.name)?;
        let mut strings = Meta::default();
        strings.set("format", FORMAT);
        strings.set("version", VERSION);
        strings.set("run", self.name.as_str());
        if let Some(rope) = &self.rope {
            strings.set("rope", json!(rope).to_string());
        }
        self.set_facts(&mut strings)?;
        let entries: Vec<_> =
            self.entries.iter().map(|(start, seq, stage)| json!([start, seq, stage.name()])).collect();
        strings.set("entries", Value::from(entries).to_string());
        for (key, value) in self.metadata.iter().filter(|(key, _)| !KEYS.contains(&key.as_str())) {
            strings.set(key, value.as_str());
        }

        let mut header = Meta::default();
        header.set("__metadata__", json!(strings));
        let mut end = 0_u64;
        let mut add = |name: &str, dtype: &str, shape: &[usize], bytes: u64| {
            let from = end;
            end = end.saturating_add(bytes);
            header.set(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [from, end]}));
        };
        // Token ids come first, because they have the widest elements: what follows stays aligned.
        if let Some(tokens) = &self.tokens {
            if tokens.len() != self.seq() {
                return Err(Error::shape(format!("expected {} token ids, got {}", self.seq(), tokens.len())));
            }
            add("tokens", "I64", &[tokens.len()], tokens.len() as u64 * 8);
        }
        for (name, spec, bytes) in self.tensors() {
            let dtype = match spec.dtype {
                DType::F16 => "F16",
                DType::Bf16 => "BF16",
                DType::F32 => "F32",
                other => return Err(Error::unsupported(format!("`{name}`: {other} has no name in safetensors"))),
            };
            add(&name, dtype, &[self.seq(), spec.heads, spec.dim], bytes);
        }
        let mut text = json_bytes(&header);
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.append(&mut text);
        Ok((bytes, end))
    }
}

fn json_bytes(meta: &Meta) -> Vec<u8> {
    serde_json::to_vec(meta).unwrap_or_else(|_| unreachable!("keys are strings and a `Vec` takes all bytes"))
}

/// Writes a run as a safetensors file, part by part, without ever holding a whole tensor.
///
/// The file appears under its name with [`SafetensorsWriter::finish`]; dropping the writer leaves nothing.
///
/// # Examples
/// ```
/// use gearbox::dump::{Dump, LayerSpec, RunSpec, SafetensorsWriter, Selection, Stage, TensorSpec};
/// use gearbox_core::DType;
///
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("my-run.safetensors");
/// let tensor = TensorSpec { dtype: DType::F32, heads: 1, dim: 2 };
/// let spec = RunSpec {
///     name: "my-run".into(),
///     entries: vec![(0, 3, Stage::Prefill), (3, 1, Stage::Decode)],
///     tokens: Some(vec![5, 6, 7, 8]),
///     layers: vec![LayerSpec { id: 0, key: tensor, value: tensor, query: None }],
///     ..RunSpec::default()
/// };
/// let mut writer = SafetensorsWriter::create(&path, &spec, false).unwrap();
/// for name in ["layers.0.key", "layers.0.value"] {
///     writer.append(name, &[0; 24]).unwrap();
///     writer.append(name, &[0; 8]).unwrap();
/// }
/// writer.finish().unwrap();
///
/// let dump = Dump::open(&path, &Selection::default()).unwrap();
/// assert_eq!(dump.entries(), 2);
/// assert_eq!(dump.runs[0].layers[0].entries[1].tokens.as_deref(), Some(&[8][..]));
/// ```
#[derive(Debug)]
pub struct SafetensorsWriter {
    file: AtomicFile,
    /// Name and missing bytes of the tensors that are not complete, in reverse order.
    missing: Vec<(String, u64)>,
}

impl SafetensorsWriter {
    /// Writes the header and the token ids; the folder must exist.
    ///
    /// # Errors
    /// Those of [`AtomicFile::create`]; [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) and
    /// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) for a name or token ids that do not fit.
    pub fn create(path: &Path, spec: &RunSpec, overwrite: bool) -> Result<Self> {
        let (header, _) = spec.header()?;
        let mut missing: Vec<_> = spec.tensors().map(|(name, _, bytes)| (name, bytes)).collect();
        missing.reverse();
        let mut writer = Self { file: AtomicFile::create(path, overwrite)?, missing };
        writer.write(&header)?;
        for id in spec.tokens.iter().flatten() {
            writer.write(&u64::from(*id).to_le_bytes())?;
        }
        Ok(writer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io(self.file.path(), &error))
    }

    /// Appends the next bytes of a tensor; see [`tensor_name`] for its name.
    ///
    /// Tensors follow each other in the order of the layers, within a layer as [`LayerSpec::parts`] gives them.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if it is another tensor's turn or too much comes.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        while self.missing.last().is_some_and(|(_, left)| *left == 0) {
            self.missing.pop();
        }
        let path = self.file.path().display();
        let len = bytes.len() as u64;
        match self.missing.last_mut() {
            Some((expected, left)) if expected == name && len <= *left => *left -= len,
            Some((expected, left)) => {
                let message = format!("`{path}`: expected up to {left} bytes of `{expected}`, got {len} of `{name}`");
                return Err(Error::shape(message));
            }
            None => return Err(Error::shape(format!("`{path}`: expected no more bytes, got {len} of `{name}`"))),
        }
        self.write(bytes)
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](gearbox_core::ErrorKind::ShapeMismatch) if a tensor is not complete; those of [`AtomicFile::commit`].
    pub fn finish(self) -> Result<()> {
        if let Some((name, left)) = self.missing.iter().rev().find(|(_, left)| *left > 0) {
            let path = self.file.path().display();
            return Err(Error::shape(format!("`{path}`: expected {left} more bytes of `{name}`, got the end")));
        }
        self.file.commit()
    }
}

#[cfg(test)]
mod tests {
    use gearbox_core::{ErrorKind, RopePairing, RopeScaling};

    use super::super::samples::{Sample, open};
    use super::super::{Dump, Selection};
    use super::*;

    fn chunk(bytes: &[u8], heads: usize) -> Chunk<'_> {
        Chunk::new(Shape::new(bytes.len() / heads / 8, heads, 4), DType::F16, bytes).unwrap()
    }

    fn rope() -> Rope {
        Rope { pairing: RopePairing::HalfSplit, theta: 1e4, rotary_dim: 4, scaling: RopeScaling::None }
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn meta_has_the_keys_of_the_reference_in_its_order_then_ours() {
        let folder = tempfile::tempdir().unwrap();
        let (key, query, rope) = ([1; 32], [2; 64], rope());
        let entry = NewEntry {
            query: Some(chunk(&query, 4)),
            tokens: Some(&[5, 6]),
            rope: Some(&rope),
            ..NewEntry::new("a-run", 7, 10, Stage::Decode, chunk(&key, 2), chunk(&key, 2))
        };
        write_reference_entry(folder.path(), &entry, false).unwrap();
        assert_eq!(names(folder.path()), ["k_t10_12.bin", "meta_t10_12.json", "q_t10_12.bin", "v_t10_12.bin"]);
        let text = fs::read_to_string(folder.path().join("meta_t10_12.json")).unwrap();
        assert_eq!(
            text,
            r#"{
  "layer_id": 7,
  "seq_start": 10,
  "seq_len": 2,
  "seq_end_exclusive": 12,
  "kv_heads": 2,
  "head_dim": 4,
  "bytes_per_elem": 2,
  "dtype": "fp16",
  "add": 2,
  "tensor_seq_len": 2,
  "quant_key": false,
  "quant_value": false,
  "flash_attention": false,
  "stage": "decode",
  "run_id": "a-run",
  "k_file": "k_t10_12.bin",
  "v_file": "v_t10_12.bin",
  "q_file": "q_t10_12.bin",
  "q_heads": 4,
  "tokens": [
    5,
    6
  ],
  "rope": {
    "pairing": "half-split",
    "rotary_dim": 4,
    "scaling": {
      "kind": "none"
    },
    "theta": 10000.0
  }
}
"#
        );
        let dump = open(folder.path());
        assert!(dump.findings.list.is_empty(), "{}", dump.findings);
        let (run, layer, found) = dump.iter().next().unwrap();
        assert_eq!((run.name.as_str(), run.rope.as_ref(), layer.id), ("a-run", Some(&rope), 7));
        assert_eq!((found.start, found.seq, found.stage), (10, 2, Stage::Decode));
        assert_eq!(*found.query.as_ref().unwrap().map().unwrap(), query);
    }

    #[test]
    fn existing_entry_stays_unless_overwrite() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = ([1; 16], [2; 16]);
        let entry = |bytes| NewEntry::new("r", 0, 0, Stage::Prefill, chunk(bytes, 2), chunk(bytes, 2));
        write_reference_entry(folder.path(), &entry(&old), false).unwrap();
        let error = write_reference_entry(folder.path(), &entry(&new), false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("meta_t0_1.json`: exists already"), "{error}");
        assert_eq!(fs::read(folder.path().join("k_t0_1.bin")).unwrap(), old);
        write_reference_entry(folder.path(), &entry(&new), true).unwrap();
        assert_eq!(fs::read(folder.path().join("k_t0_1.bin")).unwrap(), new);
        assert_eq!(names(folder.path()), ["k_t0_1.bin", "meta_t0_1.json", "v_t0_1.bin"]);
    }

    #[test]
    fn failed_write_leaves_no_meta_and_no_temporary_file() {
        let folder = tempfile::tempdir().unwrap();
        // A folder stands where the values belong.
        fs::create_dir(folder.path().join("v_t0_1.bin")).unwrap();
        let bytes = [1; 16];
        let entry = NewEntry::new("r", 0, 0, Stage::Prefill, chunk(&bytes, 2), chunk(&bytes, 2));
        write_reference_entry(folder.path(), &entry, false).unwrap_err();
        assert_eq!(names(folder.path()), ["k_t0_1.bin", "v_t0_1.bin"]);
    }

    #[test]
    fn parts_that_disagree_are_refused_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let (bytes, longer) = ([0; 32], [0; 48]);
        let good = NewEntry::new("r", 0, 0, Stage::Prefill, chunk(&bytes, 2), chunk(&bytes, 2));
        let wide = Rope { rotary_dim: 6, ..rope() };
        let hidden = AttentionFacts { window: Some(0), ..AttentionFacts::usual(4) };
        for (entry, message) in [
            (NewEntry { run: "a/b", ..good }, "got `a/b`"),
            (NewEntry { value: chunk(&bytes, 4), ..good }, "value: expected f16 (2, 2, 4), got f16 (1, 4, 4)"),
            (NewEntry { query: Some(chunk(&longer, 3)), ..good }, "query: expected f16 (2, 3, 4), got f16 (2, 3, 4)"),
            (NewEntry { query: Some(chunk(&longer, 2)), ..good }, "query: expected f16 (2, 2, 4), got f16 (3, 2, 4)"),
            (NewEntry { tokens: Some(&[1]), ..good }, "expected 2 token ids, got 1"),
            (NewEntry { start: u64::MAX, ..good }, "below position 2^64"),
            (NewEntry { rope: Some(&wide), ..good }, "got 6"),
            (NewEntry { attention: Some(hidden), ..good }, "expected a `window` of at least 1, got 0"),
            (NewEntry { key: chunk(&[], 2), value: chunk(&[], 2), ..good }, "expected at least one element"),
        ] {
            let error = write_reference_entry(folder.path(), &entry, false).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
        assert!(names(folder.path()).is_empty());
    }

    fn spec() -> RunSpec {
        let tensor = TensorSpec { dtype: DType::Bf16, heads: 2, dim: 4 };
        RunSpec {
            name: "r".into(),
            rope: Some(rope()),
            entries: vec![(0, 2, Stage::Prefill), (9, 1, Stage::Unknown)],
            tokens: Some(vec![u32::MAX, 1, 2]),
            layers: vec![
                LayerSpec { id: 0, key: tensor, value: TensorSpec { dim: 6, ..tensor }, query: None },
                LayerSpec { id: 5, key: tensor, value: tensor, query: Some(TensorSpec { heads: 4, ..tensor }) },
            ],
            facts: vec![],
            metadata: BTreeMap::from([("model".into(), "a \"b\"".into()), ("run".into(), "ignored".into())]),
        }
    }

    /// Name and bytes per token of the tensors of [`spec`].
    const PARTS: [(&str, usize); 5] = [
        ("layers.0.key", 16),
        ("layers.0.value", 24),
        ("layers.5.key", 16),
        ("layers.5.value", 16),
        ("layers.5.query", 32),
    ];

    #[test]
    fn safetensors_file_reads_back_and_is_valid_for_the_library() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.safetensors");
        let mut writer = SafetensorsWriter::create(&path, &spec(), false).unwrap();
        for (i, (name, row)) in PARTS.into_iter().enumerate() {
            writer.append(name, &vec![i as u8; 2 * row]).unwrap();
            writer.append(name, &vec![0x10 + i as u8; row]).unwrap();
        }
        assert!(!path.exists());
        writer.finish().unwrap();
        assert_eq!(names(folder.path()), ["r.safetensors"]);

        let dump = open(&path);
        assert!(dump.findings.list.is_empty(), "{}", dump.findings);
        assert_eq!(RunSpec { metadata: spec().metadata, ..RunSpec::of(&dump.runs[0]).unwrap() }, spec());
        let entry = &dump.runs[0].layers[1].entries[1];
        assert_eq!((entry.start, entry.stage, entry.tokens.as_deref()), (9, Stage::Unknown, Some(&[2][..])));
        assert_eq!(*entry.query.as_ref().unwrap().map().unwrap(), [0x14; 32]);

        let bytes = fs::read(&path).unwrap();
        let (header, metadata) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header % 8, 0, "tensors are aligned");
        assert_eq!(metadata.metadata().as_ref().unwrap()["model"], "a \"b\"");
        assert_eq!(metadata.metadata().as_ref().unwrap()["run"], "r");
    }

    #[test]
    fn writer_wants_the_tensors_in_order_and_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.safetensors");
        let mut writer = SafetensorsWriter::create(&path, &spec(), false).unwrap();
        let message = writer.append("layers.0.value", &[0; 4]).unwrap_err().to_string();
        assert!(message.ends_with("expected up to 48 bytes of `layers.0.key`, got 4 of `layers.0.value`"), "{message}");
        assert!(writer.append("layers.0.key", &[0; 49]).is_err());
        writer.append("layers.0.key", &[0; 47]).unwrap();
        let message = writer.finish().unwrap_err().to_string();
        assert!(message.ends_with("expected 1 more bytes of `layers.0.key`, got the end"), "{message}");
        assert!(names(folder.path()).is_empty());

        let mut writer = SafetensorsWriter::create(&path, &spec(), false).unwrap();
        for (name, row) in PARTS {
            writer.append(name, &vec![0; 3 * row]).unwrap();
        }
        assert!(writer.append("layers.5.query", &[0]).unwrap_err().to_string().contains("expected no more bytes"));
        drop(writer);
        assert!(names(folder.path()).is_empty(), "dropping leaves nothing");
    }

    #[test]
    fn run_whose_layers_differ_is_not_representable() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        sample.write();
        sample.set("layer_id", 1);
        sample.extend();
        sample.write();
        // Token ids of one layer stand for all.
        let spec = RunSpec::of(&open(folder.path()).runs[0]).unwrap();
        assert_eq!(spec.tokens, Some(vec![100, 101, 102]));
        assert_eq!(spec.layers.iter().map(|layer| layer.query.is_some()).collect::<Vec<_>>(), [false, true]);

        sample.range(3, 1);
        sample.write();
        let refuse = |dump: &Dump| {
            let error = RunSpec::of(&dump.runs[0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            error.to_string()
        };
        // Its file names no longer fit, so the entry has no queries and no token ids.
        for key in ["q_file", "tokens"] {
            sample.set(key, Value::Null);
        }
        sample.write();
        assert_eq!(
            refuse(&open(folder.path())),
            "run sample, layer 1: expected the 1 entries of the first layer, got 2 others"
        );
        sample.set("layer_id", 0);
        sample.write();
        assert_eq!(refuse(&open(folder.path())), "run sample, layer 1: expected queries in all 2 entries, got 1");
        let mut dump = Dump::open(folder.path(), &Selection::default()).unwrap();
        dump.runs[0].layers[1].entries[0].query = None;
        assert_eq!(refuse(&dump), "run sample: expected token ids in all entries or in none, got none for 3..4");
    }
}
