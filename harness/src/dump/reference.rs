//! Reads the reference layout: one meta file per entry beside its tensor files.
//!
//! To the keys of the reference come ours, all of them optional: `q_file` and `q_heads`, `tokens`, `rope`, and two that are of the layer alone,
//! `attention` (an object of `scale`, `softcap` and `window`, see [`AttentionFacts`](super::AttentionFacts)) and, instead of `rope`, `rope_layer`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use gearbox_core::{DType, Rope, Shape, Stage};
use rayon::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::meta::Meta;
use super::open::{Candidate, Defect, Reading, Selection};
use super::{Entry, LayerFacts, Layout, Reason, Tensor};

type Checked<T> = std::result::Result<T, Defect>;

/// A meta file beyond this is not read. Token ids of a million tokens take about 11 MiB.
const LARGEST_META: u64 = 64 << 20;

/// A meta file whose values are sound; nothing is known of its tensor files yet.
struct Described {
    place: String,
    meta: Arc<Path>,
    run: String,
    layer: u32,
    start: u64,
    shape: Shape,
    dtype: DType,
    stage: Stage,
    /// Tokens that the engine appended; more than the entry holds if it was truncated.
    added: u64,
    key: PathBuf,
    value: PathBuf,
    query: Option<(PathBuf, usize)>,
    tokens: Option<Arc<[u32]>>,
    rope: Option<Rope>,
    facts: LayerFacts,
}

/// Reads all entries below `root`.
pub(super) fn read(root: &Path, metas: &[PathBuf], selection: &Selection, reading: &mut Reading) {
    let read: Vec<_> = metas.par_iter().map(|path| describe(path, root)).collect();
    let mut described = Vec::new();
    for (path, read) in metas.iter().zip(read) {
        match read {
            Ok(mut entry) => {
                entry.tokens = entry.tokens.map(|tokens| reading.intern(&tokens));
                described.push(entry);
            }
            Err(defect) => reading.findings.push(defect.reason, path.display().to_string(), defect.message),
        }
    }
    let prompts = prompt_ends(&described);
    let mut wanted = Vec::new();
    for entry in described {
        let prompt = prompts.get(&(entry.run.clone(), entry.layer)).copied().unwrap_or_default();
        let end = entry.start + entry.shape.seq as u64;
        if entry.stage == Stage::Decode && end <= prompt {
            let message =
                format!("tokens {}..{end} lie inside the prompt 0..{prompt}: warm-up of the engine", entry.start);
            reading.findings.push(Reason::TuningLeftover, entry.place, message);
            continue;
        }
        if !selection.admits(Some(entry.stage), entry.shape.seq, &mut reading.dropped) {
            continue;
        }
        if (entry.shape.seq as u64) < entry.added {
            let message = format!("holds {} of the {} tokens that the engine appended", entry.shape.seq, entry.added);
            reading.findings.push(Reason::TruncatedEntry, entry.place.clone(), message);
        }
        wanted.push(entry);
    }
    let located: Vec<_> = wanted.into_par_iter().map(|entry| (entry.place.clone(), locate(entry))).collect();
    for (place, located) in located {
        match located {
            Ok(candidate) => reading.candidates.push(candidate),
            Err(defect) => reading.findings.push(defect.reason, place, defect.message),
        }
    }
}

/// Where the prompt of each layer ends, for prompts that start at 0.
///
/// Decode entries inside it come from the engine's warm-up before the request. A truncated prompt counts in full.
fn prompt_ends(described: &[Described]) -> BTreeMap<(String, u32), u64> {
    let mut ends: BTreeMap<_, u64> = BTreeMap::new();
    for entry in described.iter().filter(|entry| entry.stage == Stage::Prefill && entry.start == 0) {
        let end = ends.entry((entry.run.clone(), entry.layer)).or_default();
        *end = (*end).max(entry.added).max(entry.shape.seq as u64);
    }
    ends
}

fn describe(path: &Path, root: &Path) -> Checked<Described> {
    let meta = read_meta(path)?;
    let fields = Fields(&meta);
    let size: u64 = fields.required("bytes_per_elem")?;
    let named: Option<String> = fields.optional("dtype")?;
    let dtype = dtype(size, named.as_deref())?;
    let seq = fields.at_least_one("seq_len")?;
    let shape = Shape::new(seq, fields.at_least_one("kv_heads")?, fields.at_least_one("head_dim")?);
    let start: u64 = fields.required("seq_start")?;
    let end = start
        .checked_add(seq as u64)
        .ok_or_else(|| fields.invalid("seq_start", "a position whose entry ends below 2^64"))?;
    if fields.optional("seq_end_exclusive")?.is_some_and(|stated: u64| stated != end) {
        return Err(fields.invalid("seq_end_exclusive", &format!("seq_start + seq_len = {end}")));
    }
    let query = match fields.optional::<String>("q_file")? {
        Some(_) => Some((fields.file("q_file", path)?, fields.at_least_one("q_heads")?)),
        None => None,
    };
    if query.as_ref().is_some_and(|(_, heads)| !heads.is_multiple_of(shape.heads)) {
        return Err(fields.invalid("q_heads", &format!("a multiple of the {} KV heads", shape.heads)));
    }
    let tokens: Option<Vec<u32>> = fields.optional("tokens")?;
    if let Some(tokens) = tokens.as_ref().filter(|tokens| tokens.len() != seq) {
        let message = format!("`tokens`: expected {seq} token ids, got {}", tokens.len());
        return Err(Defect::new(Reason::TokensDifferFromShape, message));
    }
    let rope: Option<Rope> = fields.optional("rope")?;
    if let Some(rope) = &rope {
        check_rope(rope, shape.dim).map_err(|message| Defect::new(Reason::MetaValueInvalid, message))?;
    }
    let facts = LayerFacts { attention: fields.optional("attention")?, rope: fields.optional("rope_layer")? };
    facts.check(shape.dim).map_err(|message| Defect::new(Reason::MetaValueInvalid, message))?;
    if rope.is_some() && facts.rope.is_some() {
        return Err(fields.invalid("rope_layer", "none beside `rope`, the rotation of all layers"));
    }
    Ok(Described {
        place: path.display().to_string(),
        meta: Arc::from(path),
        run: fields.run(path, root)?,
        layer: fields.required("layer_id")?,
        start,
        shape,
        dtype,
        stage: fields.stage()?.unwrap_or(Stage::Unknown),
        added: fields.optional("add")?.unwrap_or(seq as u64),
        key: fields.file("k_file", path)?,
        value: fields.file("v_file", path)?,
        query,
        tokens: tokens.map(Arc::from),
        rope,
        facts,
    })
}

fn locate(entry: Described) -> Checked<Candidate> {
    let Described {
        place, meta, run, layer, start, shape, dtype, stage, key, value, query, tokens, rope, facts, ..
    } = entry;
    let tensor = |path: PathBuf, shape: Shape| -> Checked<Tensor> {
        let expected = byte_len(shape, dtype)?;
        check_file(&path, expected, dtype)?;
        Ok(Tensor { dtype, shape, path: path.into(), offset: 0, layout: Layout::Logical })
    };
    let entry = Entry {
        stage,
        start,
        seq: shape.seq,
        key: tensor(key, shape)?,
        value: tensor(value, shape)?,
        query: query.map(|(path, heads)| tensor(path, Shape { heads, ..shape })).transpose()?,
        tokens,
        place,
        meta: Some(meta),
    };
    Ok(Candidate { run, layer, rope, facts, entry })
}

fn byte_len(shape: Shape, dtype: DType) -> Checked<u64> {
    [shape.seq, shape.heads, shape.dim]
        .into_iter()
        .try_fold(dtype.size() as u64, |product, extent| product.checked_mul(extent as u64))
        .ok_or_else(|| Defect::new(Reason::MetaValueInvalid, format!("shape {shape} has more than 2^64 bytes")))
}

/// Reads a meta file as an object.
pub(super) fn read_meta(path: &Path) -> Checked<Meta> {
    let unreadable = |message: String| Defect::new(Reason::MetaUnreadable, message);
    let found = fs::metadata(path).map_err(|error| unreadable(error.to_string()))?;
    // Opening a pipe would wait for ever.
    if !found.is_file() {
        return Err(unreadable("expected a regular file".into()));
    }
    if found.len() > LARGEST_META {
        return Err(unreadable(format!("expected at most {LARGEST_META} bytes, got {}", found.len())));
    }
    let mut text = Vec::with_capacity(usize::try_from(found.len()).unwrap_or_default() + 1);
    File::open(path)
        .and_then(|file| file.take(LARGEST_META).read_to_end(&mut text))
        .map_err(|error| unreadable(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| match serde_json::from_slice::<Value>(&text) {
        Ok(value) if !value.is_object() => {
            Defect::new(Reason::MetaNotObject, "expected an object, got another JSON value")
        }
        _ => Defect::new(Reason::MetaNotJson, error.to_string()),
    })
}

/// Checks a tensor file without reading it.
pub(super) fn check_file(path: &Path, expected: u64, dtype: DType) -> Checked<()> {
    let name = path.display();
    let found = fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            Defect::new(Reason::TensorFileMissing, format!("`{name}`: expected {expected} bytes, got no file"))
        }
        _ => Defect::new(Reason::TensorFileUnreadable, format!("`{name}`: {error}")),
    })?;
    if !found.is_file() {
        return Err(Defect::new(Reason::TensorFileUnreadable, format!("`{name}`: expected a regular file")));
    }
    let got = found.len();
    let reason = match got {
        _ if got == expected => return Ok(()),
        0 => Reason::TensorEmpty,
        _ if got % dtype.size() as u64 != 0 => Reason::SizeNotMultipleOfElement,
        _ => Reason::SizeDiffersFromShape,
    };
    Err(Defect::new(reason, format!("`{name}`: expected {expected} bytes, got {got}")))
}

/// The element type of a size and an optional name; without a name two bytes are F16.
pub(super) fn dtype(size: u64, name: Option<&str>) -> Checked<DType> {
    if size != 2 && size != 4 {
        let message = format!("`bytes_per_elem`: expected 2 or 4, got {size}");
        return Err(Defect::new(Reason::UnsupportedElementSize, message));
    }
    let dtype = match name.unwrap_or(if size == 2 { "fp16" } else { "fp32" }) {
        "fp16" => DType::F16,
        "bf16" => DType::Bf16,
        "fp32" => DType::F32,
        other => {
            let message = format!("`dtype`: expected `fp16`, `bf16` or `fp32`, got `{other}`");
            return Err(Defect::new(Reason::MetaValueInvalid, message));
        }
    };
    if dtype.size() as u64 != size {
        let message = format!("`bytes_per_elem`: expected {} for {dtype}, got {size}", dtype.size());
        return Err(Defect::new(Reason::DtypeContradictsSize, message));
    }
    Ok(dtype)
}

/// Checks a rotation against the channels it turns.
pub(super) fn check_rope(rope: &Rope, dim: usize) -> std::result::Result<(), String> {
    if rope.rotary_dim == 0 || !rope.rotary_dim.is_multiple_of(2) || rope.rotary_dim > dim {
        return Err(format!("`rope`: expected an even `rotary_dim` from 2 to {dim}, got {}", rope.rotary_dim));
    }
    if !(rope.theta.is_finite() && rope.theta > 0.0) {
        return Err(format!("`rope`: expected a positive `theta`, got {}", rope.theta));
    }
    Ok(())
}

/// Whether a run name is `[A-Za-z0-9._-]+` and names a folder of its own.
pub(super) fn check_run(name: &str) -> Checked<()> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if !name.is_empty() && name.bytes().all(legal) && name != "." && name != ".." {
        return Ok(());
    }
    let message = format!("run name: expected letters, digits, `.`, `_` or `-`, got `{}`", name.escape_debug());
    Err(Defect::new(Reason::RunIdInvalid, message))
}

/// Typed access to the keys of a meta file.
pub(super) struct Fields<'a>(pub &'a Meta);

impl Fields<'_> {
    /// A key that may be absent or null.
    pub fn optional<T: DeserializeOwned>(&self, key: &str) -> Checked<Option<T>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value).map(Some).map_err(|error| {
                Defect::new(Reason::MetaValueInvalid, format!("`{key}`: {error}, got `{}`", shorten(value)))
            }),
        }
    }

    /// A key that must be there.
    pub fn required<T: DeserializeOwned>(&self, key: &str) -> Checked<T> {
        self.optional(key)?.ok_or_else(|| Defect::new(Reason::MetaKeyMissing, format!("the key `{key}` is missing")))
    }

    /// A required number above 0.
    pub fn at_least_one(&self, key: &str) -> Checked<usize> {
        match self.required(key)? {
            0 => Err(self.invalid(key, "at least 1")),
            number => Ok(number),
        }
    }

    /// The defect of a value that has the right type.
    pub fn invalid(&self, key: &str, expected: &str) -> Defect {
        let got = self.0.get(key).map(shorten).unwrap_or_default();
        Defect::new(Reason::MetaValueInvalid, format!("`{key}`: expected {expected}, got {got}"))
    }

    /// A required file name, joined with the folder of its meta file.
    pub fn file(&self, key: &str, meta: &Path) -> Checked<PathBuf> {
        let name: String = self.required(key)?;
        let mut components = Path::new(&name).components();
        let inside = components.all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if !inside || Path::new(&name).file_name().is_none() {
            let message = format!("`{key}`: expected a name inside the folder of the meta file, got `{name}`");
            return Err(Defect::new(Reason::PathEscapesFolder, message));
        }
        Ok(meta.with_file_name("").join(name))
    }

    /// The stage, if the key is there; a reader takes other words than its own as unknown.
    pub fn stage(&self) -> Checked<Option<Stage>> {
        Ok(self.optional::<String>("stage")?.map(|name| parse_stage(&name)))
    }

    /// The run name; without the key it is that of the folder above `layer_<L>`.
    pub fn run(&self, meta: &Path, root: &Path) -> Checked<String> {
        let name = match self.optional("run_id")? {
            Some(name) => name,
            None => folder_name(meta, root).ok_or_else(|| {
                Defect::new(Reason::MetaKeyMissing, "the key `run_id` is missing and no folder names the run")
            })?,
        };
        check_run(&name)?;
        Ok(name)
    }
}

/// The stage of a name.
pub(super) fn parse_stage(name: &str) -> Stage {
    match name {
        "prefill" => Stage::Prefill,
        "decode" => Stage::Decode,
        _ => Stage::Unknown,
    }
}

fn folder_name(meta: &Path, root: &Path) -> Option<String> {
    // A root such as `.` has no name of its own.
    let folder =
        fs::canonicalize(meta.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(root)).ok()?;
    let is_layer = folder.file_name()?.to_str()?.starts_with("layer_");
    let named = if is_layer { folder.parent()? } else { &folder };
    Some(named.file_name()?.to_str()?.to_owned())
}

/// A value for a message.
fn shorten(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
