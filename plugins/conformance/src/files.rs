//! What a plugin keeps on disk: the schema of its settings, and bytes that earlier versions wrote.
//!
//! Both are written when the environment variable `GEARBOX_BLESS` is `1`, and compared otherwise.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Codec, DType, Elem, Entry, Error, Lane, LaneRef, LaneSpec, Latents,
    LossyTransform, Result, Shape,
};
use serde_json::{Map, Value, json};

use crate::Outcome;
use crate::config;
use crate::data::{Case, DataKind, elements, typical_elements};
use crate::outcome::Check;

/// Tests of one program run at once, and those of one crate share its files.
static FILES: Mutex<()> = Mutex::new(());

/// The schema of the settings is the one in `schema.json` of `folder`, which holds one schema per plugin id of the crate.
///
/// With `GEARBOX_BLESS=1` the file is brought up to date instead, so that a change of settings is a visible diff.
pub fn schema_is_pinned<T: ?Sized>(entry: &Entry<T>, folder: &Path) -> Outcome {
    pin_schema(entry, folder, blessing())
}

/// Every file `*.bin` in `folder` that this plugin wrote, in any version, still decodes to what it was made from; and there is one for
/// each element type with these settings and the present format version.
///
/// A golden is one line of JSON (id, format version, settings, the generated lane or tensor, and what [`Recorded`] adds) and then bytes.
/// With `GEARBOX_BLESS=1` missing ones are written; an existing one is never written again.
pub fn goldens_decode<T: ?Sized + Recorded>(entry: &Entry<T>, settings: &Value, folder: &Path) -> Outcome {
    check_goldens(entry, settings, folder, blessing())
}

/// A kind of plugin whose output is kept in goldens.
pub trait Recorded {
    /// What the plugin declares.
    fn declared(&self) -> Capabilities;
    /// The resolved settings.
    fn resolved(&self) -> Value;
    /// Shape and kinds of data of which goldens are kept, for each element type.
    fn samples(&self) -> (Shape, &[DataKind]);
    /// Encodes a case behind what is in `bytes`, and adds to `head` what decoding needs to know besides.
    ///
    /// # Errors
    /// What went wrong.
    fn record(&self, case: &Case, head: &mut Map<String, Value>, bytes: &mut Vec<u8>) -> Result<(), String>;
    /// Decodes what an earlier version recorded, and compares.
    ///
    /// # Errors
    /// What is wrong, or differs.
    fn replay(&self, case: &Case, head: &Value, bytes: &[u8]) -> Result<(), String>;
}

impl Recorded for dyn Codec {
    fn declared(&self) -> Capabilities {
        self.capabilities()
    }

    fn resolved(&self) -> Value {
        self.config()
    }

    fn samples(&self) -> (Shape, &[DataKind]) {
        (Shape::new(17, 2, 8), &[DataKind::Walk])
    }

    fn record(&self, case: &Case, _: &mut Map<String, Value>, bytes: &mut Vec<u8>) -> Check {
        let (lane, around) = (case.bytes(), case.surroundings(self.capabilities().context()));
        LaneRef::new(&case.spec, &lane)
            .and_then(|lane| self.encode(lane, &around.context(), bytes))
            .map_err(|error| format!("encode fails: {error}"))
    }

    fn replay(&self, case: &Case, _: &Value, bytes: &[u8]) -> Check {
        let (expected, around) = (case.bytes(), case.surroundings(self.capabilities().context()));
        let mut got = vec![0xA5; expected.len()];
        self.decode(bytes, &case.spec, &around.context(), &mut got)
            .map_err(|error| format!("decode fails: {error}"))?;
        crate::codec::same(&expected, &got, case.spec.elem.size())
    }
}

/// The lanes in memory form, end to end, and then the tensor that they are inverted to, unless that is the generated one.
impl Recorded for dyn LossyTransform {
    fn declared(&self) -> Capabilities {
        self.capabilities()
    }

    fn resolved(&self) -> Value {
        self.config()
    }

    fn samples(&self) -> (Shape, &[DataKind]) {
        (Shape::new(40, 2, 16), &[DataKind::Walk, DataKind::Repeats])
    }

    fn record(&self, case: &Case, head: &mut Map<String, Value>, bytes: &mut Vec<u8>) -> Check {
        let (tensor, around) = (case.bytes(), case.surroundings(self.capabilities().context()));
        let mut latents = Latents::new();
        tensor_type(case)
            .and_then(|dtype| Chunk::new(case.spec.shape, dtype, &tensor))
            .and_then(|chunk| self.forward(chunk, &around.context(), &mut latents))
            .map_err(|error| format!("forward fails: {error}"))?;
        let lanes = latents.lanes().iter().map(|lane| {
            let Shape { seq, heads, dim } = lane.spec.shape;
            json!({"name": lane.spec.name, "elem": lane.spec.elem.to_string(), "shape": [seq, heads, dim]})
        });
        head.insert("lanes".to_owned(), lanes.collect());
        for lane in latents.lanes() {
            bytes.extend_from_slice(&lane.bytes);
        }
        if self.bound() != Bound::Lossless {
            bytes.extend(invert(self, case, &latents)?);
        }
        Ok(())
    }

    fn replay(&self, case: &Case, head: &Value, mut bytes: &[u8]) -> Check {
        let mut latents = Latents::new();
        for lane in head["lanes"].as_array().into_iter().flatten() {
            let name = lane["name"].as_str().ok_or_else(|| missing("name", lane))?.to_owned();
            let spec = LaneSpec::new(name, read_elem(lane)?, read_shape(lane)?);
            let (own, rest) =
                bytes.split_at_checked(spec.byte_len()).ok_or_else(|| format!("the file ends within {spec}"))?;
            latents.push_lane(Lane { spec, bytes: own.to_vec() }).map_err(|error| error.to_string())?;
            bytes = rest;
        }
        let expected = if self.bound() == Bound::Lossless { &case.bytes() } else { bytes };
        crate::codec::same(expected, &invert(self, case, &latents)?, case.spec.elem.size())
    }
}

fn tensor_type(case: &Case) -> Result<DType> {
    case.spec.elem.dtype().ok_or_else(|| Error::invalid_input(format!("expected a tensor, got {}", case.spec)))
}

fn invert(transform: &dyn LossyTransform, case: &Case, latents: &Latents) -> Check<Vec<u8>> {
    let around = case.surroundings(transform.capabilities().context());
    let mut got = vec![0xA5; case.spec.byte_len()];
    tensor_type(case)
        .and_then(|dtype| ChunkMut::new(case.spec.shape, dtype, &mut got))
        .and_then(|out| transform.inverse(latents, &around.context(), out))
        .map_err(|error| format!("inverse fails: {error}"))?;
    Ok(got)
}

fn blessing() -> bool {
    std::env::var_os("GEARBOX_BLESS").is_some_and(|value| value == "1")
}

const HINT: &str = "run the tests with GEARBOX_BLESS=1 to write it";

fn pin_schema<T: ?Sized>(entry: &Entry<T>, folder: &Path, bless: bool) -> Outcome {
    let path = folder.join("schema.json");
    Outcome::of("schema_is_pinned", |cases| {
        let _files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
        cases.check(format!("`{}` in `{}`", entry.id, path.display()), || {
            let mut pinned = if path.exists() { read_schemas(&path).map_err(|e| e.to_string())? } else { Map::new() };
            if pinned.get(&entry.id) == Some(&entry.schema) {
                return Ok(());
            }
            if !bless {
                return Err(match pinned.get(&entry.id) {
                    None => format!("the schema is not pinned yet, {HINT}"),
                    Some(old) => format!("the schema has changed, {HINT}: expected {old}, got {}", entry.schema),
                });
            }
            pinned.insert(entry.id.clone(), entry.schema.clone());
            let text = format!("{:#}\n", Value::Object(pinned));
            write(&path, text.as_bytes()).map_err(|e| e.to_string())
        })
    })
}

fn read_schemas(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).map_err(|source| Error::io(path, &source))?;
    serde_json::from_str(&text).map_err(|error| Error::invalid_input(format!("`{}`: {error}", path.display())))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|source| Error::io(folder, &source))?;
    }
    fs::write(path, bytes).map_err(|source| Error::io(path, &source))
}

fn check_goldens<T: ?Sized + Recorded>(entry: &Entry<T>, settings: &Value, folder: &Path, bless: bool) -> Outcome {
    Outcome::of("goldens_decode", |cases| {
        let _files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
        let plugin = config::build(entry, settings)?;
        for case in golden_cases(&*plugin) {
            let name = file_name(entry, settings, &case);
            cases.check(format!("{case}, `{name}`"), || {
                let path = folder.join(&name);
                if path.exists() {
                    return Ok(());
                }
                if !bless {
                    return Err(format!("there is no such golden in `{}`, {HINT}", folder.display()));
                }
                write(&path, &make_golden(entry, &*plugin, &case)?).map_err(|error| error.to_string())
            })?;
        }
        for (name, bytes) in read_goldens(folder).map_err(|error| error.to_string())? {
            let golden = cases.check(format!("`{name}`"), || Golden::parse(&bytes))?;
            if golden.id == entry.id || entry.aliases.contains(&golden.id) {
                cases.check(format!("`{name}`: {}", golden.case), || {
                    let plugin = config::build(entry, &golden.head["settings"])?;
                    plugin.replay(&golden.case, &golden.head, golden.bytes)
                })?;
            }
        }
        Ok(())
    })
}

/// Small lanes for each declared element type, and one of edge patterns for the first.
fn golden_cases<T: ?Sized + Recorded>(plugin: &T) -> Vec<Case> {
    let mut elems = typical_elements();
    elems.retain(|elem| plugin.declared().elems.contains(*elem));
    let (shape, kinds) = plugin.samples();
    let usual = kinds.iter().flat_map(|kind| elems.iter().map(|elem| Case::new(*elem, shape, *kind, 1)));
    usual.chain(elems.first().map(|elem| Case::new(*elem, shape, DataKind::Special, 1))).collect()
}

/// Such as `v1_zstd_f16_walk.bin`, or `v1_zstd_level-19_f16_walk.bin` with settings.
fn file_name<T: ?Sized>(entry: &Entry<T>, settings: &Value, case: &Case) -> String {
    let words = |text: &str| -> Vec<String> {
        text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_owned).collect()
    };
    let settings = words(&settings.to_string().replace(":-", ":minus")).join("-");
    let elem = words(&case.spec.elem.to_string()).concat();
    let parts = [entry.id.clone(), settings, elem, case.kind.to_string()];
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    format!("v{}_{}.bin", entry.format_version, parts.join("_"))
}

fn make_golden<T: ?Sized + Recorded>(entry: &Entry<T>, plugin: &T, case: &Case) -> Check<Vec<u8>> {
    let Shape { seq, heads, dim } = case.spec.shape;
    let mut head = Map::new();
    head.insert("id".to_owned(), json!(entry.id));
    head.insert("format_version".to_owned(), json!(entry.format_version));
    head.insert("settings".to_owned(), plugin.resolved());
    head.insert("elem".to_owned(), json!(case.spec.elem.to_string()));
    head.insert("shape".to_owned(), json!([seq, heads, dim]));
    head.insert("kind".to_owned(), json!(case.kind.name()));
    head.insert("seed".to_owned(), json!(case.seed));
    let mut bytes = Vec::new();
    plugin.record(case, &mut head, &mut bytes)?;
    Ok([format!("{}\n", Value::Object(head)).into_bytes(), bytes].concat())
}

fn read_goldens(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut goldens = Vec::new();
    let listing = fs::read_dir(folder).map_err(|source| Error::io(folder, &source))?;
    for file in listing {
        let path = file.map_err(|source| Error::io(folder, &source))?.path();
        if path.extension().is_some_and(|extension| extension == "bin") {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            goldens.push((name, fs::read(&path).map_err(|source| Error::io(&path, &source))?));
        }
    }
    goldens.sort();
    Ok(goldens)
}

/// A golden file.
struct Golden<'a> {
    id: String,
    case: Case,
    /// The whole first line.
    head: Value,
    bytes: &'a [u8],
}

impl<'a> Golden<'a> {
    fn parse(file: &'a [u8]) -> Check<Self> {
        let end = file.iter().position(|byte| *byte == b'\n').ok_or("expected a line of JSON, got no line end")?;
        let head: Value = serde_json::from_slice(&file[..end]).map_err(|error| format!("first line: {error}"))?;
        let text = |key: &str| head[key].as_str().ok_or_else(|| missing(key, &head));
        let kind = text("kind")?;
        let kind =
            DataKind::ALL.into_iter().find(|known| known.name() == kind).ok_or_else(|| missing("kind", &head))?;
        let seed = head["seed"].as_u64().ok_or_else(|| missing("seed", &head))?;
        let (id, case) = (text("id")?.to_owned(), Case::new(read_elem(&head)?, read_shape(&head)?, kind, seed));
        Ok(Self { id, case, head, bytes: &file[end + 1..] })
    }
}

fn missing(key: &str, head: &Value) -> String {
    format!("first line: expected a legal `{key}`, got {}", head[key])
}

fn read_elem(head: &Value) -> Check<Elem> {
    let named = |elem: &Elem| head["elem"].as_str().is_some_and(|name| elem.to_string() == name);
    elements().into_iter().find(named).ok_or_else(|| missing("elem", head))
}

fn read_shape(head: &Value) -> Check<Shape> {
    let [seq, heads, dim] =
        [0, 1, 2].map(|axis| head["shape"][axis].as_u64().and_then(|extent| usize::try_from(extent).ok()));
    let shape = seq.zip(heads).zip(dim).map(|((seq, heads), dim)| Shape::new(seq, heads, dim));
    shape.ok_or_else(|| missing("shape", head))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use gearbox_core::{Context, ElemSet};

    use super::*;

    /// Stores F16 lanes, every byte turned over if `turned`.
    #[derive(Debug)]
    struct Plain {
        turned: bool,
    }

    impl Codec for Plain {
        fn capabilities(&self) -> Capabilities {
            Capabilities::new(ElemSet::F16)
        }

        fn config(&self) -> Value {
            json!({"level": -2})
        }

        fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
            lane.byte_len()
        }

        fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
            out.extend(lane.bytes().iter().map(|byte| if self.turned { !byte } else { *byte }));
            Ok(())
        }

        fn decode(&self, encoded: &[u8], _: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
            for (to, from) in out.iter_mut().zip(encoded) {
                *to = if self.turned { !from } else { *from };
            }
            Ok(())
        }
    }

    fn entry(turned: bool, schema: Value) -> Entry<dyn Codec> {
        Entry {
            id: "plain".to_owned(),
            aliases: vec![],
            summary: String::new(),
            source: String::new(),
            format_version: 1,
            schema,
            origin: String::new(),
            library: None,
            build: Arc::new(move |_| Ok(Arc::new(Plain { turned }))),
        }
    }

    #[test]
    fn changed_schema_fails_until_blessed() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (entry(false, json!({"title": "old"})), entry(false, json!({"title": "new"})));
        let failure = |entry: &Entry<dyn Codec>| pin_schema(entry, folder.path(), false).failure.unwrap();
        assert!(failure(&old).contains("the schema is not pinned yet"));
        pin_schema(&old, folder.path(), true).expect_passed();
        pin_schema(&old, folder.path(), false).expect_passed();
        assert!(failure(&new).contains(r#"expected {"title":"old"}, got {"title":"new"}"#));
        // A second plugin of the same crate keeps its own place.
        let other = Entry { id: "other".to_owned(), ..new };
        pin_schema(&other, folder.path(), true).expect_passed();
        pin_schema(&old, folder.path(), false).expect_passed();
    }

    #[test]
    fn goldens_are_written_once_and_decoded_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let settings = json!({"level": -2});
        let check = |turned, bless| check_goldens(&entry(turned, json!({})), &settings, folder.path(), bless);
        assert!(
            check(false, false)
                .failure
                .unwrap()
                .contains("`v1_plain_level-minus2_f16_walk.bin`: there is no such golden")
        );
        check(false, true).expect_passed();
        let names = || read_goldens(folder.path()).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(), ["v1_plain_level-minus2_f16_special.bin", "v1_plain_level-minus2_f16_walk.bin"]);
        let outcome = check(false, false);
        assert_eq!((outcome.passed(), outcome.cases), (true, 6), "two exist, two are read, two decode");
        // A codec whose bytes changed fails, and blessing does not hide that.
        for bless in [false, true] {
            assert!(check(true, bless).failure.unwrap().contains("element 0 is wrong"));
        }
        // A version that is gone from the code is still read.
        let (from, to) = (folder.path().join(&names()[1]), folder.path().join("v0_old.bin"));
        fs::copy(from, &to).unwrap();
        assert_eq!(check(false, false).cases, 8);
        fs::write(to, b"no line end").unwrap();
        assert_eq!(check(false, false).failure.unwrap(), "`v0_old.bin`: expected a line of JSON, got no line end");
    }
}
