//! `gearbox llm-demo`: prompts are decoded one after the other, and the cache of one is dumped in the reference layout.

use std::path::{Path, PathBuf};

use gearbox_core::{Chunk, Error, Result, Shape};
use gearbox_model::{LayerStep, most_probable};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::request::{Engine, Measured};
use crate::dump::{NewEntry, Stage, check_run_name, write_reference_entry};
use crate::model::Spool;
use crate::model::capture::attention_facts;

/// Where a dump goes and what of it is written, as the environment of the reference's engine says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpOptions {
    /// Folder that takes the folder of the run.
    pub folder: PathBuf,
    /// Name of the run.
    pub run: String,
    /// Phases that are written.
    pub stages: Vec<Stage>,
    /// Tokens of an entry, at most; the first ones are written.
    pub max_tokens: Option<usize>,
}

impl DumpOptions {
    /// Reads `MNN_KV_DUMP_DIR`, `_RUN_ID`, `_STAGE` and `_MAX_TOKENS`; none if there is no folder, or if it is switched off. `now` names a run
    /// without a name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig), naming the variable: the reference takes a value that it does not
    /// know for another one.
    pub fn from_environment(get: impl Fn(&str) -> Option<String>, now: u64) -> Result<Option<Self>> {
        let get = |name: &str| get(name).filter(|value| !value.is_empty());
        let bad = |name: &str, expected: &str, got: &str| {
            Err(Error::invalid_config(format!("`{name}`: expected {expected}, got `{got}`")))
        };
        let folder = match get("MNN_KV_DUMP_DIR").as_deref() {
            None | Some("0" | "false" | "off") => return Ok(None),
            Some(folder) => PathBuf::from(folder),
        };
        let run = get("MNN_KV_DUMP_RUN_ID").unwrap_or_else(|| format!("run_{now}_0"));
        check_run_name(&run).map_err(|error| error.context("`MNN_KV_DUMP_RUN_ID`"))?;
        let stages = match get("MNN_KV_DUMP_STAGE").as_deref() {
            None | Some("prefill") => vec![Stage::Prefill],
            Some("decode") => vec![Stage::Decode],
            Some("both") => vec![Stage::Prefill, Stage::Decode],
            Some(other) => return bad("MNN_KV_DUMP_STAGE", "prefill, decode or both", other),
        };
        let max_tokens = match get("MNN_KV_DUMP_MAX_TOKENS") {
            None => 0,
            Some(text) => match text.parse::<usize>() {
                Ok(tokens) => tokens,
                Err(_) => return bad("MNN_KV_DUMP_MAX_TOKENS", "a number of tokens, 0 for all", &text),
            },
        };
        if let Some(packed) = get("MNN_KV_DUMP_PACKED").filter(|value| !["0", "false", "off"].contains(&value.as_str()))
        {
            return bad("MNN_KV_DUMP_PACKED", "none, because the cache here has no packed layout", &packed);
        }
        Ok(Some(Self { folder, run, stages, max_tokens: (max_tokens > 0).then_some(max_tokens) }))
    }
}

/// What decoding one prompt gave.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// The decoded tokens as text.
    pub text: String,
    /// What the request came to.
    pub measured: Measured,
    /// Finite elements of the dump that are infinite in its type.
    pub overflow: u64,
    /// The folder of the dump.
    pub dump: Option<PathBuf>,
}

/// Decodes up to so many tokens behind a prompt, each the most probable one, until the text or the context of the model ends.
///
/// Every decoded token but one that ends the text is appended to the cache, and is an entry of the dump.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for an empty prompt, one that is longer than the context of the model, a
/// run that exists already, and a dump without an entry; what plugins and the file system report. Nothing is left of a dump that failed.
pub fn decode(engine: &Engine<'_>, prompt: &str, tokens: usize, dump: Option<&DumpOptions>) -> Result<Decoded> {
    let model = engine.model();
    let (ids, context) = (model.tokenizer().encode(prompt)?, model.config().context);
    if ids.is_empty() || ids.len() > context {
        let got = ids.len();
        let message = format!("expected a prompt of 1 to {context} tokens, the context of the model, got {got}");
        return Err(Error::invalid_input(message));
    }
    let mut writer = dump.map(|options| Writer::new(engine, options)).transpose()?;
    let mut request = engine.request()?;
    let mut logits = appended(&mut writer, &ids, Stage::Prefill, |probe| request.prefill(&ids, probe))?;
    let mut decoded = Vec::new();
    while decoded.len() < tokens.min(context - ids.len()) {
        let id = most_probable(&logits);
        if model.config().eos.contains(&id) {
            break;
        }
        logits = appended(&mut writer, &[id], Stage::Decode, |probe| request.decode(id, probe))?;
        decoded.push(id);
    }
    let measured = request.end();
    let text = model.tokenizer().decode(&decoded)?;
    let overflow = writer.as_ref().map_or(0, |writer| writer.spool.overflow());
    let dump = writer.map(Writer::finish).transpose()?;
    Ok(Decoded { text, measured, overflow, dump })
}

/// Appends tokens to the cache, and then to the dump.
fn appended(
    writer: &mut Option<Writer<'_>>,
    ids: &[u32],
    stage: Stage,
    step: impl FnOnce(Option<gearbox_model::Probe<'_>>) -> Result<Vec<f32>>,
) -> Result<Vec<f32>> {
    let Some(writer) = writer.as_mut().filter(|writer| writer.options.stages.contains(&stage)) else {
        if let Some(writer) = writer {
            writer.seen += ids.len();
        }
        return step(None);
    };
    let logits = step(Some(&mut |layer: LayerStep<'_>| writer.spool.append(&layer)))?;
    writer.write(ids, stage)?;
    Ok(logits)
}

/// A dump under way, in a folder that gets its name at the end.
struct Writer<'a> {
    engine: &'a Engine<'a>,
    options: &'a DumpOptions,
    work: tempfile::TempDir,
    spool: Spool,
    seen: usize,
    entries: usize,
}

impl<'a> Writer<'a> {
    fn new(engine: &'a Engine<'a>, options: &'a DumpOptions) -> Result<Self> {
        let folder = &options.folder;
        let failed = |error: std::io::Error| Error::io(folder, &error);
        std::fs::create_dir_all(folder).map_err(failed)?;
        let path = folder.join(&options.run);
        if path.exists() {
            return Err(Error::invalid_input(format!("`{}`: exists already", path.display())));
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".run");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Temporary folders are private by default, results are not; the umask still applies.
            builder.permissions(std::fs::Permissions::from_mode(0o777));
        }
        let work = builder.tempdir_in(folder).map_err(failed)?;
        let spool = Spool::new(work.path(), engine.model().config().layers, engine.dtype())?;
        Ok(Self { engine, options, work, spool, seen: 0, entries: 0 })
    }

    /// Writes what every layer appended for these tokens.
    fn write(&mut self, ids: &[u32], stage: Stage) -> Result<()> {
        let config = self.engine.model().config();
        let seq = self.options.max_tokens.map_or(ids.len(), |most| most.min(ids.len()));
        for layer in 0..config.layers {
            let parts = self.spool.take(layer)?;
            let heads = [config.kv_heads, config.kv_heads, config.q_heads];
            let mut chunks = Vec::with_capacity(parts.len());
            for (bytes, heads) in parts.iter().zip(heads) {
                let (shape, dtype) = (Shape::new(seq, heads, config.head_dim), self.engine.dtype());
                chunks.push(Chunk::new(shape, dtype, &bytes[..shape.elements() * dtype.size()])?);
            }
            let [key, value, query] = chunks[..] else { unreachable!("one chunk for each part") };
            let entry = NewEntry {
                query: Some(query),
                tokens: Some(&ids[..seq]),
                rope: Some(&config.rope),
                attention: Some(attention_facts(config, layer)),
                ..NewEntry::new(&self.options.run, layer as u32, self.seen as u64, stage, key, value)
            };
            write_reference_entry(&self.work.path().join(format!("layer_{layer}")), &entry, false)?;
            self.entries += 1;
        }
        self.seen += ids.len();
        Ok(())
    }

    /// Gives the folder its name.
    fn finish(self) -> Result<PathBuf> {
        if self.entries == 0 {
            let message = "`MNN_KV_DUMP_STAGE`: expected a phase that the request has, got one without a token";
            return Err(Error::invalid_input(message));
        }
        let path = self.options.folder.join(&self.options.run);
        std::fs::rename(self.work.path(), &path).map_err(|error| Error::io(&path, &error))?;
        Ok(path)
    }
}

/// The prompts of a file: all of it, or its lines without empty ones and those that begin with `#`, as the reference takes them.
pub fn prompts(text: &str, whole: bool) -> Vec<&str> {
    if whole {
        return Vec::from_iter((!text.is_empty()).then_some(text));
    }
    text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')).collect()
}

/// What all prompts came to, as the reference prints it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Total {
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Decoded tokens.
    pub decode_tokens: usize,
    /// Seconds for the prompts.
    pub prefill_s: f64,
    /// Seconds for the decoded tokens.
    pub decode_s: f64,
}

impl Total {
    /// Adds a request.
    pub fn add(&mut self, measured: &Measured) {
        self.prompt_tokens += measured.prompt_tokens;
        self.decode_tokens += measured.decode_tokens;
        self.prefill_s += measured.prefill_ns as f64 / 1e9;
        self.decode_s += measured.decode_ns as f64 / 1e9;
    }
}

impl std::fmt::Display for Total {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { prompt_tokens, decode_tokens, prefill_s, decode_s } = self;
        let speed = |tokens: usize, seconds: f64| if tokens == 0 { 0.0 } else { tokens as f64 / seconds };
        writeln!(f, "prompt tokens num = {prompt_tokens}\ndecode tokens num = {decode_tokens}")?;
        writeln!(f, "prefill time = {prefill_s:.2} s\n decode time = {decode_s:.2} s")?;
        writeln!(f, "prefill speed = {:.2} tok/s", speed(*prompt_tokens, *prefill_s))?;
        write!(f, " decode speed = {:.2} tok/s", speed(*decode_tokens, *decode_s))
    }
}

/// The reference's line of metrics about one prompt. What was not measured is null.
pub fn metrics(prompt: usize, measured: &Measured) -> Value {
    let mut line = Map::new();
    let mut set = |key: &str, value: Value| drop(line.insert(key.to_owned(), value));
    set("prompt_index", json!(prompt));
    set("prompt_tokens", json!(measured.prompt_tokens));
    set("decode_tokens", json!(measured.decode_tokens));
    set("prefill_us", json!(measured.prefill_ns / 1000));
    set("decode_us", json!(measured.decode_ns / 1000));
    // The most probable token is found in no time worth telling.
    set("sample_us", Value::Null);
    let fields = measured.fields();
    let field = |column: &str| fields.iter().find(|field| field.column == column).and_then(|field| field.value);
    for (key, column) in
        [("h2o_keep_ratio", "h2o_keep"), ("h2o_lossy_ratio", "h2o_lossy"), ("h2o_lossless_ratio", "h2o_lossless")]
    {
        set(key, json!(field(column)));
    }
    let coded = measured.coded.unwrap_or_default();
    for (key, value) in [
        ("h2o_lossless_raw_bytes", coded.raw_bytes),
        ("h2o_lossless_compressed_bytes", coded.stored_bytes),
        ("h2o_lossless_decompressed_bytes", coded.decoded_bytes),
        ("h2o_lossless_compress_us", coded.encode_ns / 1000),
        ("h2o_lossless_decompress_us", coded.decode_ns / 1000),
        ("h2o_lossless_queue_depth_peak", 0),
        ("h2o_lossless_fallback_count", coded.raw_chunks),
        ("h2o_lossless_backpressure_skip", 0),
        ("h2o_lossless_async_queue_peak", 0),
        ("h2o_lossless_async_wait_us", 0),
        ("h2o_lossless_decode_cache_hit", 0),
        ("h2o_lossless_decode_cache_miss", 0),
    ] {
        set(key, json!(value));
    }
    let (last, total) = measured.evicted();
    set("h2o_last_evict_tokens", json!(last));
    set("h2o_total_evict_tokens", json!(total));
    Value::Object(line)
}

/// Adds lines of JSON to a file.
///
/// # Errors
/// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
pub fn append_lines(path: &Path, lines: &[Value]) -> Result<()> {
    use std::io::Write;
    let append = || {
        let mut file = std::fs::File::options().create(true).append(true).open(path)?;
        lines.iter().try_for_each(|line| writeln!(file, "{line}"))
    };
    append().map_err(|error| Error::io(path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(variables: &[(&str, &str)]) -> Result<Option<DumpOptions>> {
        let get = |name: &str| {
            let found = variables.iter().find(|(key, _)| name.strip_prefix("MNN_KV_DUMP_") == Some(*key));
            found.map(|(_, value)| (*value).to_owned())
        };
        DumpOptions::from_environment(get, 7)
    }

    #[test]
    fn environment_says_what_is_dumped() {
        for off in [&[][..], &[("DIR", "")], &[("DIR", "off")], &[("RUN_ID", "a")]] {
            assert_eq!(options(off).unwrap(), None);
        }
        let mut expected =
            DumpOptions { folder: "d".into(), run: "run_7_0".into(), stages: vec![Stage::Prefill], max_tokens: None };
        assert_eq!(options(&[("DIR", "d"), ("MAX_TOKENS", "0")]).unwrap().unwrap(), expected);
        expected = DumpOptions { run: "a".into(), stages: vec![Stage::Prefill, Stage::Decode], ..expected };
        expected.max_tokens = Some(9);
        let all = [("DIR", "d"), ("RUN_ID", "a"), ("STAGE", "both"), ("MAX_TOKENS", "9"), ("PACKED", "off")];
        assert_eq!(options(&all).unwrap().unwrap(), expected);
        for (name, value) in [("RUN_ID", "a/b"), ("STAGE", "all"), ("MAX_TOKENS", "x"), ("PACKED", "1")] {
            let error = options(&[("DIR", "d"), (name, value)]).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn prompts_are_a_file_or_its_lines() {
        let text = "one\n# two\n\n three\n";
        assert_eq!(prompts(text, true), [text]);
        assert_eq!(prompts(text, false), ["one", " three"]);
        assert!(prompts("", true).is_empty() && prompts("\n#\n", false).is_empty());
    }

    #[test]
    fn totals_read_as_the_reference_prints_them() {
        let total = Total { prompt_tokens: 5, decode_tokens: 3, prefill_s: 0.5, decode_s: 1.25 };
        let expected = "prompt tokens num = 5\ndecode tokens num = 3\nprefill time = 0.50 s\n decode time = 1.25 s\n\
                        prefill speed = 10.00 tok/s\n decode speed = 2.40 tok/s";
        assert_eq!(total.to_string(), expected);
    }
}
