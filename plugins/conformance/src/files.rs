//! What a plugin keeps on disk: the schema of its settings, and bytes that earlier versions wrote.
//!
//! Both are written when the environment variable `GEARBOX_BLESS` is `1`, and compared otherwise.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use gearbox_core::{Codec, Entry, Error, Needs, Result, Shape};
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

/// Every file `*.bin` in `folder` that this codec wrote, in any version, still decodes to its lane; and there is one for each element
/// type with these settings and the present format version.
///
/// A golden is one line of JSON (id, format version, settings and the generated lane) and then the encoded bytes. With
/// `GEARBOX_BLESS=1` missing ones are written; an existing one is never written again.
pub fn goldens_decode(entry: &Entry<dyn Codec>, settings: &Value, folder: &Path) -> Outcome {
    check_goldens(entry, settings, folder, blessing())
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

fn check_goldens(entry: &Entry<dyn Codec>, settings: &Value, folder: &Path, bless: bool) -> Outcome {
    Outcome::of("goldens_decode", |cases| {
        let _files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
        let codec = config::build(entry, settings)?;
        for case in golden_cases(&*codec) {
            let name = file_name(entry, settings, &case);
            cases.check(format!("{case}, `{name}`"), || {
                let path = folder.join(&name);
                if path.exists() {
                    return Ok(());
                }
                if !bless {
                    return Err(format!("there is no such golden in `{}`, {HINT}", folder.display()));
                }
                write(&path, &make_golden(entry, &*codec, &case)?).map_err(|error| error.to_string())
            })?;
        }
        for (name, bytes) in read_goldens(folder).map_err(|error| error.to_string())? {
            let golden = cases.check(format!("`{name}`"), || Golden::parse(&bytes))?;
            if golden.id == entry.id || entry.aliases.contains(&golden.id) {
                cases.check(format!("`{name}`: {}", golden.case), || golden.decode(entry))?;
            }
        }
        Ok(())
    })
}

/// One small walk for each declared element type, and one lane of edge patterns for the first.
fn golden_cases(codec: &dyn Codec) -> Vec<Case> {
    let mut elems = typical_elements();
    elems.retain(|elem| codec.capabilities().elems.contains(*elem));
    let shape = Shape::new(17, 2, 8);
    let walks = elems.iter().map(|elem| Case::new(*elem, shape, DataKind::Walk, 1));
    walks.chain(elems.first().map(|elem| Case::new(*elem, shape, DataKind::Special, 1))).collect()
}

/// Such as `v1_zstd_f16_walk.bin`, or `v1_zstd_level-19_f16_walk.bin` with settings.
fn file_name(entry: &Entry<dyn Codec>, settings: &Value, case: &Case) -> String {
    let words = |text: &str| -> Vec<String> {
        text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_owned).collect()
    };
    let settings = words(&settings.to_string().replace(":-", ":minus")).join("-");
    let elem = words(&case.spec.elem.to_string()).concat();
    let parts = [entry.id.clone(), settings, elem, case.kind.to_string()];
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    format!("v{}_{}.bin", entry.format_version, parts.join("_"))
}

fn make_golden(entry: &Entry<dyn Codec>, codec: &dyn Codec, case: &Case) -> Check<Vec<u8>> {
    let Shape { seq, heads, dim } = case.spec.shape;
    let head = json!({
        "id": entry.id,
        "format_version": entry.format_version,
        "settings": codec.config(),
        "elem": case.spec.elem.to_string(),
        "shape": [seq, heads, dim],
        "kind": case.kind.name(),
        "seed": case.seed,
    });
    let mut golden = format!("{head}\n").into_bytes();
    let (bytes, around) = (case.bytes(), case.surroundings(codec.capabilities().needs));
    let lane = gearbox_core::LaneRef::new(&case.spec, &bytes).map_err(|error| error.to_string())?;
    codec.encode(lane, &around.context(), &mut golden).map_err(|error| format!("encode fails: {error}"))?;
    Ok(golden)
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
    settings: Value,
    case: Case,
    encoded: &'a [u8],
}

impl<'a> Golden<'a> {
    fn parse(file: &'a [u8]) -> Check<Self> {
        let end = file.iter().position(|byte| *byte == b'\n').ok_or("expected a line of JSON, got no line end")?;
        let head: Value = serde_json::from_slice(&file[..end]).map_err(|error| format!("first line: {error}"))?;
        let missing = |key: &str| format!("first line: expected a legal `{key}`, got {}", head[key]);
        let text = |key: &str| head[key].as_str().ok_or_else(|| missing(key));
        let elem = text("elem")?;
        let elem = elements().into_iter().find(|known| known.to_string() == elem).ok_or_else(|| missing("elem"))?;
        let kind = text("kind")?;
        let kind = DataKind::ALL.into_iter().find(|known| known.name() == kind).ok_or_else(|| missing("kind"))?;
        let [seq, heads, dim] =
            [0, 1, 2].map(|axis| head["shape"][axis].as_u64().and_then(|extent| usize::try_from(extent).ok()));
        let shape = seq.zip(heads).zip(dim).map(|((seq, heads), dim)| Shape::new(seq, heads, dim));
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let seed = head["seed"].as_u64().ok_or_else(|| missing("seed"))?;
        Ok(Self {
            id: text("id")?.to_owned(),
            settings: head["settings"].clone(),
            case: Case::new(elem, shape, kind, seed),
            encoded: &file[end + 1..],
        })
    }

    /// Decodes with the settings that the file names and compares with its lane.
    fn decode(&self, entry: &Entry<dyn Codec>) -> Check {
        let codec = config::build(entry, &self.settings)?;
        let needs: Needs = codec.capabilities().needs;
        let (expected, around) = (self.case.bytes(), self.case.surroundings(needs));
        let mut got = vec![0xA5; expected.len()];
        codec
            .decode(self.encoded, &self.case.spec, &around.context(), &mut got)
            .map_err(|error| format!("decode fails: {error}"))?;
        crate::codec::same(&expected, &got, self.case.spec.elem.size())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use gearbox_core::{Capabilities, Context, ElemSet, LaneRef, LaneSpec};

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
