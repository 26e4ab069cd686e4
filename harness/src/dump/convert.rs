//! Copies a dump into another format, rounding to F16 on the way if asked to.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use gearbox_core::{DType, Error, ErrorKind, Result, ResultExt};
use rayon::prelude::*;
use serde::Serialize;

use super::meta::Meta;
use super::reference::read_meta;
use super::rounding::{Tally, to_f16};
use super::safetensors::free_metadata;

use super::write::{Facts, RunSpec, SafetensorsWriter, dtype_label, write_files};
use super::{Dump, Entry, Findings, Layer, Mapped, Reason, Rounding, Run, Tensor, check_run_name, tensor_name};
use crate::atomic::remove_leftovers;

/// A format that dumps are written in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `<run>/layer_<L>/{k,v,q,meta}_t<A>_<B>`: what the reference engine writes.
    #[default]
    Reference,
    /// `<run>.safetensors`: one file per run.
    Safetensors,
}

/// How [`convert`] works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConvertOptions {
    /// Format of the output.
    pub format: Format,
    /// [`DType::F16`] rounds all tensors; `None` keeps what they are.
    pub dtype: Option<DType>,
    /// Accept that finite values become infinite.
    pub allow_inf: bool,
    /// Copy entries that are F16 already; otherwise rounding refuses them.
    pub allow_fp16: bool,
    /// Write everything again and replace what differs.
    pub overwrite: bool,
}

/// What [`convert`] did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ConvertReport {
    /// Entries written.
    pub done: usize,
    /// Entries that an earlier call had completed.
    pub already_done: usize,
    /// Entries left out by a rule: they are F16 already, or would hold new infinities.
    pub refused: usize,
    /// Entries that could not be read or written.
    pub failed: usize,
    /// Bytes of tensors written.
    pub written_bytes: u64,
    /// What rounding did, over the entries of this call that were written or refused for new infinities.
    pub rounding: Rounding,
    /// Why entries were refused or failed.
    pub findings: Findings,
}

/// One line of counts, one of rounding if there was any, then the findings.
impl fmt::Display for ConvertReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} entries done ({} bytes), {} already done, {} refused, {} failed",
            self.done, self.written_bytes, self.already_done, self.refused, self.failed
        )?;
        if self.rounding.values > 0 {
            writeln!(f, "{}", self.rounding)?;
        }
        self.findings.fmt(f)
    }
}

/// Writes a dump in another format or element type.
///
/// A destination that was begun is continued: an entry counts as done if its meta and all its files are there with the right sizes
/// and the meta says what would be written; what is incomplete is written again. Safetensors output is continued run by run, and a run is
/// refused as a whole; a destination that ends in `.safetensors` is the file of a single run. Whatever fails is reported and the
/// rest goes on.
///
/// Queries, token ids, the rotation and the facts of layers are carried over. Other keys of meta files survive from the reference layout to itself, other
/// metadata strings from safetensors to itself.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] for a dtype other than F16. [`ErrorKind::InvalidInput`] if a file destination meets several runs.
/// [`ErrorKind::Io`] if the destination cannot be created.
pub fn convert(source: &Dump, destination: &Path, options: &ConvertOptions) -> Result<ConvertReport> {
    let options = *options;
    if let Some(dtype) = options.dtype.filter(|dtype| *dtype != DType::F16) {
        return Err(Error::invalid_config(format!("expected f16 or no dtype to round to, got {dtype}")));
    }
    for run in &source.runs {
        check_run_name(&run.name)?;
    }
    let is_file = options.format == Format::Safetensors && destination.extension().is_some_and(|e| e == "safetensors");
    if is_file && source.runs.len() > 1 {
        let runs = source.runs.len();
        return Err(Error::invalid_input(format!("`{}`: expected one run, got {runs}", destination.display())));
    }
    let folder = if is_file { destination.parent().unwrap_or(destination) } else { destination };
    if !folder.as_os_str().is_empty() {
        fs::create_dir_all(folder).map_err(|error| Error::io(folder, &error))?;
    }
    let outcomes: Vec<Outcome> = match options.format {
        Format::Reference => {
            for (run, layer) in source.runs.iter().flat_map(|run| run.layers.iter().map(move |layer| (run, layer))) {
                remove_leftovers(&layer_dir(destination, run, layer));
            }
            let entries: Vec<_> = source.iter().collect();
            let convert = |(run, layer, entry)| ReferenceTarget::new(destination, options, run, layer, entry).convert();
            entries.into_par_iter().map(convert).collect()
        }
        Format::Safetensors => {
            remove_leftovers(folder);
            let convert = |run: &Run| {
                let file = || destination.join(format!("{}.safetensors", run.name));
                convert_run(run, &if is_file { destination.to_path_buf() } else { file() }, options)
            };
            source.runs.par_iter().map(convert).collect()
        }
    };
    let mut report = ConvertReport::default();
    let mut tally = Tally::default();
    for outcome in outcomes {
        let count = match outcome.state {
            State::Done => &mut report.done,
            State::AlreadyDone => &mut report.already_done,
            State::Refused => &mut report.refused,
            State::Failed => &mut report.failed,
        };
        *count += outcome.entries;
        report.written_bytes += outcome.written_bytes;
        report.findings.append(outcome.findings);
        tally.merge(&outcome.tally);
    }
    report.rounding = tally.rounding();
    Ok(report)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Done,
    AlreadyDone,
    Refused,
    Failed,
}

/// What became of an entry, or of all entries of a run.
struct Outcome {
    state: State,
    entries: usize,
    written_bytes: u64,
    tally: Tally,
    findings: Findings,
}

impl Outcome {
    fn new(state: State, entries: usize) -> Self {
        Self { state, entries, written_bytes: 0, tally: Tally::default(), findings: Findings::default() }
    }

    fn because(mut self, reason: Reason, place: &str, message: impl Into<String>) -> Self {
        self.findings.push(reason, place, message);
        self
    }
}

/// The reason that fits an error while files are written.
fn write_reason(error: &Error) -> Reason {
    if error.kind() == ErrorKind::InvalidInput { Reason::OutputExists } else { Reason::WriteFailed }
}

fn layer_dir(root: &Path, run: &Run, layer: &Layer) -> PathBuf {
    root.join(&run.name).join(format!("layer_{}", layer.id))
}

fn target_dtype(tensor: &Tensor, options: ConvertOptions) -> DType {
    options.dtype.unwrap_or(tensor.dtype)
}

/// Whether rounding has nothing to do.
fn is_refused_f16(entry: &Entry, options: ConvertOptions) -> bool {
    options.dtype == Some(DType::F16)
        && !options.allow_fp16
        && [&entry.key, &entry.value].iter().all(|tensor| tensor.dtype == DType::F16)
}

/// A tensor as it will be written.
fn read(tensor: &Tensor, options: ConvertOptions, tally: &mut Tally) -> Result<Mapped> {
    let bytes = tensor.map()?;
    Ok(match options.dtype {
        Some(dtype) if dtype != tensor.dtype => Mapped::owned(to_f16(tensor.dtype, &bytes, tally)),
        _ => bytes,
    })
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

const SOURCE_IS_DESTINATION: &str = "expected another destination, got the source itself";
const ALREADY_F16: &str = "expected f32 or bf16 to round, got f16";

fn new_infinities(count: u64) -> String {
    format!("expected no value beyond the range of f16, got {count} that would become infinite")
}

/// One entry on its way into the reference layout.
struct ReferenceTarget<'a> {
    options: ConvertOptions,
    entry: &'a Entry,
    layer_dir: PathBuf,
    facts: Facts<'a>,
}

impl<'a> ReferenceTarget<'a> {
    fn new(root: &Path, options: ConvertOptions, run: &'a Run, layer: &'a Layer, entry: &'a Entry) -> Self {
        Self {
            options,
            entry,
            layer_dir: layer_dir(root, run, layer),
            facts: Facts {
                run: &run.name,
                layer: layer.id,
                start: entry.start,
                stage: entry.stage,
                shape: entry.key.shape,
                dtype: target_dtype(&entry.key, options),
                query_heads: entry.query.as_ref().map(|query| query.shape.heads),
                tokens: entry.tokens.as_deref(),
                rope: run.rope.as_ref(),
                attention: layer.facts.attention,
                rope_layer: layer.facts.rope.as_ref(),
            },
        }
    }

    fn convert(&self) -> Outcome {
        let (options, entry) = (self.options, self.entry);
        let place = entry.place.as_str();
        if is_refused_f16(entry, options) {
            return Outcome::new(State::Refused, 1).because(Reason::AlreadyF16, place, ALREADY_F16);
        }
        if let Some(message) = self.not_representable() {
            return Outcome::new(State::Failed, 1).because(Reason::NotRepresentable, place, message);
        }
        let meta = match self.meta() {
            Ok(meta) => meta,
            Err(message) => return Outcome::new(State::Failed, 1).because(Reason::MetaUnreadable, place, message),
        };
        let meta_path = self.facts.meta_path(&self.layer_dir);
        let in_place = self.facts.tensor_files(&self.layer_dir).any(|(path, _)| same_file(&path, &entry.key.path));
        if in_place || entry.meta.as_deref().is_some_and(|source| same_file(&meta_path, source)) {
            return Outcome::new(State::Failed, 1).because(Reason::OutputExists, place, SOURCE_IS_DESTINATION);
        }
        match self.existing(&meta_path, &meta) {
            Existing::Complete if !options.overwrite => return Outcome::new(State::AlreadyDone, 1),
            Existing::Other if !options.overwrite => {
                let message = format!("`{}`: exists already with other content", meta_path.display());
                return Outcome::new(State::Failed, 1).because(Reason::OutputExists, place, message);
            }
            _ => {}
        }
        self.write(&meta)
    }

    /// Why the layout cannot hold the entry: it has one dtype and one shape for all tensors, but for the query heads.
    fn not_representable(&self) -> Option<String> {
        let Facts { shape, dtype, .. } = self.facts;
        self.entry.tensors().find_map(|(role, tensor)| {
            let expected = if role == "query" { super::Shape { heads: tensor.shape.heads, ..shape } } else { shape };
            let got = target_dtype(tensor, self.options);
            (tensor.shape != expected || got != dtype)
                .then(|| format!("{role}: expected {dtype} {expected} as the key has it, got {got} {}", tensor.shape))
        })
    }

    /// What the meta file will say: that of the source with the changes, or a new one.
    fn meta(&self) -> Result<Meta, String> {
        let facts = &self.facts;
        let mut meta = match &self.entry.meta {
            Some(path) => {
                let mut meta = read_meta(path).map_err(|defect| defect.message)?;
                meta.set("bytes_per_elem", facts.dtype.size());
                meta.set("dtype", dtype_label(facts.dtype));
                meta.set("run_id", facts.run);
                facts.set_files(&mut meta);
                meta
            }
            None => facts.meta(),
        };
        if self.options.dtype.is_some() {
            let source = self.entry.key.dtype;
            meta.set("source_bytes_per_elem", source.size());
            if source != DType::F16 {
                meta.set("converted_from", dtype_label(source));
            }
        }
        Ok(meta)
    }

    fn existing(&self, meta_path: &Path, meta: &Meta) -> Existing {
        let Ok(found) = read_meta(meta_path) else { return Existing::Incomplete };
        let complete = |(path, len): (PathBuf, u64)| fs::metadata(path).is_ok_and(|f| f.is_file() && f.len() == len);
        if !self.facts.tensor_files(&self.layer_dir).all(complete) {
            Existing::Incomplete
        } else if found.agrees(meta) {
            Existing::Complete
        } else {
            Existing::Other
        }
    }

    fn write(&self, meta: &Meta) -> Outcome {
        let place = self.entry.place.as_str();
        let mut tally = Tally::default();
        let read: Result<Vec<Mapped>> =
            self.entry.tensors().map(|(_, tensor)| read(tensor, self.options, &mut tally)).collect();
        let mut outcome = match read {
            Ok(tensors) if tally.overflow() == 0 || self.options.allow_inf => {
                let parts = [0, 1, 2].map(|i| tensors.get(i).map(|tensor| &**tensor));
                // Nothing that is complete is left at this point unless it is to be replaced.
                match write_files(&self.layer_dir, &self.facts, &meta.to_bytes(), parts, true) {
                    Ok(()) => {
                        let written_bytes = tensors.iter().map(|tensor| tensor.len() as u64).sum();
                        Outcome { written_bytes, ..Outcome::new(State::Done, 1) }
                    }
                    Err(error) => {
                        Outcome::new(State::Failed, 1).because(write_reason(&error), place, error.to_string())
                    }
                }
            }
            Ok(_) => {
                let message = new_infinities(tally.overflow());
                Outcome::new(State::Refused, 1).because(Reason::NewInfinities, place, message)
            }
            Err(error) => {
                // Nothing was rounded that counts.
                let outcome = Outcome::new(State::Failed, 1);
                return outcome.because(Reason::TensorFileUnreadable, place, error.to_string());
            }
        };
        if outcome.state != State::Failed {
            outcome.tally = tally;
        }
        outcome
    }
}

/// What stands where an entry would be written.
enum Existing {
    Incomplete,
    Complete,
    Other,
}

/// Writes a run as one safetensors file.
fn convert_run(run: &Run, path: &Path, options: ConvertOptions) -> Outcome {
    let entries = || run.layers.iter().flat_map(|layer| &layer.entries);
    let place = path.display().to_string();
    let end = |state| Outcome::new(state, entries().count());
    if let Some(entry) = entries().find(|entry| is_refused_f16(entry, options)) {
        return end(State::Refused).because(Reason::AlreadyF16, &entry.place, ALREADY_F16);
    }
    let spec = match run_spec(run, options) {
        Ok(spec) => spec,
        Err(error) => return end(State::Failed).because(Reason::NotRepresentable, &place, error.to_string()),
    };
    if entries().any(|entry| same_file(&entry.key.path, path)) {
        return end(State::Failed).because(Reason::OutputExists, &place, SOURCE_IS_DESTINATION);
    }
    if !options.overwrite && path.exists() {
        return match is_written(path, &spec) {
            Ok(true) => end(State::AlreadyDone),
            Ok(false) => end(State::Failed).because(Reason::OutputExists, &place, "exists already with other content"),
            Err(error) => end(State::Failed).because(Reason::WriteFailed, &place, error.to_string()),
        };
    }
    let mut outcome = end(State::Done);
    match write_run(run, path, &spec, options, &mut outcome) {
        Ok(()) => {}
        Err((reason, error)) => {
            outcome.state = State::Failed;
            outcome.written_bytes = 0;
            outcome.tally = Tally::default();
            outcome.findings.push(reason, place, error.to_string());
        }
    }
    outcome
}

fn run_spec(run: &Run, options: ConvertOptions) -> Result<RunSpec> {
    let mut spec = RunSpec::of(run)?;
    let first = run.layers.first().and_then(|layer| layer.entries.first());
    if let Some(Entry { key, .. }) = first {
        if key.path.extension().is_some_and(|ending| ending == "safetensors") {
            spec.metadata = free_metadata(&key.path);
        }
        if options.dtype.is_some() && key.dtype != DType::F16 {
            spec.metadata.insert("converted_from".into(), dtype_label(key.dtype).into());
        }
    }
    if let Some(dtype) = options.dtype {
        for layer in &mut spec.layers {
            layer.key.dtype = dtype;
            layer.value.dtype = dtype;
            if let Some(query) = &mut layer.query {
                query.dtype = dtype;
            }
        }
    }
    Ok(spec)
}

/// Whether the file has the length and the header that it would get; it was complete when it got its name.
fn is_written(path: &Path, spec: &RunSpec) -> Result<bool> {
    use std::io::Read;
    let (header, bytes) = spec.header()?;
    let io = |error| Error::io(path, &error);
    let file = fs::File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.len() != (header.len() as u64).saturating_add(bytes) {
        return Ok(false);
    }
    let mut found = Vec::with_capacity(header.len());
    file.take(header.len() as u64).read_to_end(&mut found).map_err(io)?;
    Ok(found == header)
}

/// Writes entry by entry; after the first new infinity it only counts.
fn write_run(
    run: &Run,
    path: &Path,
    spec: &RunSpec,
    options: ConvertOptions,
    outcome: &mut Outcome,
) -> std::result::Result<(), (Reason, Error)> {
    let on_write = |error: Error| (write_reason(&error), error);
    let mut writer = Some(SafetensorsWriter::create(path, spec, options.overwrite).map_err(on_write)?);
    for layer in &run.layers {
        for part in ["key", "value", "query"] {
            let name = tensor_name(layer.id, part);
            for entry in &layer.entries {
                let Some((_, tensor)) = entry.tensors().find(|(role, _)| *role == part) else { continue };
                let mut tally = Tally::default();
                let bytes = read(tensor, options, &mut tally)
                    .context(|| entry.place.clone())
                    .map_err(|error| (Reason::TensorFileUnreadable, error))?;
                outcome.tally.merge(&tally);
                if tally.overflow() > 0 && !options.allow_inf {
                    let message = format!("{part}: {}", new_infinities(tally.overflow()));
                    outcome.findings.push(Reason::NewInfinities, entry.place.clone(), message);
                    outcome.state = State::Refused;
                    outcome.written_bytes = 0;
                    writer = None;
                }
                if let Some(writer) = &mut writer {
                    writer.append(&name, &bytes).map_err(on_write)?;
                    outcome.written_bytes += bytes.len() as u64;
                }
            }
        }
    }
    writer.map_or(Ok(()), |writer| writer.finish().map_err(on_write))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::samples::{Sample, open};
    use super::super::{LayerFacts, Selection, Stage};
    use super::*;

    const TO_F16: ConvertOptions = ConvertOptions {
        format: Format::Reference,
        dtype: Some(DType::F16),
        allow_inf: false,
        allow_fp16: false,
        overwrite: false,
    };
    const KEEP: ConvertOptions = ConvertOptions { dtype: None, ..TO_F16 };
    const SAFETENSORS: ConvertOptions = ConvertOptions { format: Format::Safetensors, ..KEEP };

    /// Two layers with a prompt of three tokens and a decoded one, with queries and token ids, in F32.
    fn source(folder: &Path) -> Dump {
        for layer in 0..2 {
            let mut sample = Sample::new(folder);
            sample.set("layer_id", layer);
            for (start, seq, stage) in [(0, 3, "prefill"), (3, 1, "decode")] {
                sample.range(start, seq);
                sample.set("stage", stage);
                sample.f32(&[1.0, 1.0 + 3.0 * 2f32.powi(-11), 65504.0, 2f32.powi(-25)]);
                sample.extend();
                sample.write();
            }
        }
        open(folder)
    }

    fn counts(report: &ConvertReport) -> [usize; 4] {
        [report.done, report.already_done, report.refused, report.failed]
    }

    fn reasons(report: &ConvertReport) -> Vec<Reason> {
        report.findings.list.iter().map(|finding| finding.reason).collect()
    }

    /// Every file below a folder with its content.
    fn tree(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        let mut folders = vec![folder.to_path_buf()];
        while let Some(next) = folders.pop() {
            for entry in fs::read_dir(&next).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    files.push((path.strip_prefix(folder).unwrap().to_path_buf(), fs::read(&path).unwrap()));
                }
            }
        }
        files.sort();
        files
    }

    #[test]
    fn rounding_writes_the_reference_bytes_and_reports_what_was_lost() {
        let folder = tempfile::tempdir().unwrap();
        let dump = source(&folder.path().join("in"));
        let out = folder.path().join("out");
        let report = convert(&dump, &out, &TO_F16).unwrap();
        assert_eq!(counts(&report), [4, 0, 0, 0]);
        assert!(report.findings.list.is_empty());
        // Per layer: four tokens of eight values, as keys, values and, twice as many, queries.
        assert_eq!((report.rounding.values, report.written_bytes), (256, 512));
        assert_eq!((report.rounding.overflow, report.rounding.flushed), (0, 2 * 2 * 4));

        let converted = open(&out);
        assert!(converted.findings.list.is_empty());
        let entry = &converted.runs[0].layers[1].entries[0];
        assert_eq!(entry.key.map().unwrap()[..8], [0x00, 0x3c, 0x02, 0x3c, 0xff, 0x7b, 0x00, 0x00]);
        assert_eq!(entry.tokens.as_deref(), Some(&[100, 101, 102][..]));
        assert_eq!(entry.query.as_ref().unwrap().dtype, DType::F16);
        assert!(
            report
                .to_string()
                .starts_with("4 entries done (512 bytes), 0 already done, 0 refused, 0 failed\nrounded 256")
        );
    }

    #[test]
    fn meta_of_the_source_is_kept_with_the_changes_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(&folder.path().join("in"));
        sample.f32(&[]);
        sample.set("flash_attention", true);
        sample.set("note", "ü");
        sample.set("k_file", "keys.bin");
        sample.write();
        fs::rename(sample.layer_dir().join("k_t0_3.bin"), sample.layer_dir().join("keys.bin")).unwrap();
        let out = folder.path().join("out");
        convert(&open(&folder.path().join("in")), &out, &TO_F16).unwrap();
        let text = fs::read_to_string(out.join("sample/layer_0/meta_t0_3.json")).unwrap();
        let expected = String::from_utf8(sample.meta.to_bytes()).unwrap();
        let expected = expected
            .replace("\"bytes_per_elem\": 4", "\"bytes_per_elem\": 2")
            .replace("fp32", "fp16")
            .replace("keys.bin", "k_t0_3.bin")
            .replace("\n}", ",\n  \"source_bytes_per_elem\": 4,\n  \"converted_from\": \"fp32\"\n}");
        assert_eq!(text, expected);
    }

    #[test]
    fn f16_entries_are_a_notice_unless_they_may_be_copied() {
        let folder = tempfile::tempdir().unwrap();
        let (from, out) = (folder.path().join("in"), folder.path().join("out"));
        let sample = Sample::new(&from);
        sample.write();
        for format in [Format::Reference, Format::Safetensors] {
            let options = ConvertOptions { format, ..TO_F16 };
            let report = convert(&open(&from), &out, &options).unwrap();
            assert_eq!((counts(&report), reasons(&report)), ([0, 0, 1, 0], vec![Reason::AlreadyF16]));
            assert!(report.findings.is_clean() && tree(&out).is_empty());
            let report = convert(&open(&from), &out, &ConvertOptions { allow_fp16: true, ..options }).unwrap();
            assert_eq!((counts(&report), report.rounding), ([1, 0, 0, 0], Rounding::default()));
            assert_eq!(*open(&out).runs[0].layers[0].entries[0].key.map().unwrap(), sample.key[..]);
            fs::remove_dir_all(&out).unwrap();
        }
    }

    #[test]
    fn new_infinities_refuse_the_entry_unless_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let (from, out) = (folder.path().join("in"), folder.path().join("out"));
        let mut sample = Sample::new(&from);
        sample.f32(&[65520.0, f32::INFINITY, f32::NAN, 1.0]);
        sample.write();
        sample.range(3, 1);
        sample.f32(&[f32::INFINITY]);
        sample.write();
        let report = convert(&open(&from), &out, &TO_F16).unwrap();
        assert_eq!((counts(&report), reasons(&report)), ([1, 0, 1, 0], vec![Reason::NewInfinities]));
        assert_eq!((report.rounding.overflow, report.rounding.infinite, report.rounding.nan), (2, 4, 2));
        assert!(report.findings.list[0].message.contains("got 2 that would become infinite"));
        assert_eq!(open(&out).entries(), 1, "the other entry only has the infinity of the source");

        let report = convert(&open(&from), &out, &ConvertOptions { allow_inf: true, ..TO_F16 }).unwrap();
        assert_eq!(counts(&report), [1, 1, 0, 0]);

        // A safetensors file is refused as a whole, but all of it is examined.
        let out = folder.path().join("st");
        let options = ConvertOptions { format: Format::Safetensors, ..TO_F16 };
        let report = convert(&open(&from), &out, &options).unwrap();
        assert_eq!((counts(&report), reasons(&report)), ([0, 0, 2, 0], vec![Reason::NewInfinities; 2]));
        assert_eq!((report.rounding.values, report.written_bytes), (64, 0));
        assert!(tree(&out).is_empty());
        let report = convert(&open(&from), &out, &ConvertOptions { allow_inf: true, ..options }).unwrap();
        assert_eq!(counts(&report), [2, 0, 0, 0]);
    }

    #[test]
    fn second_call_finds_everything_done_and_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let dump = source(&folder.path().join("in"));
        for (i, options) in [TO_F16, KEEP, SAFETENSORS, ConvertOptions { dtype: Some(DType::F16), ..SAFETENSORS }]
            .into_iter()
            .enumerate()
        {
            let out = folder.path().join(format!("out{i}"));
            assert_eq!(counts(&convert(&dump, &out, &options).unwrap()), [4, 0, 0, 0]);
            let first = tree(&out);
            assert_eq!(counts(&convert(&dump, &out, &options).unwrap()), [0, 4, 0, 0]);
            assert_eq!(tree(&out), first);
            let again = convert(&dump, &out, &ConvertOptions { overwrite: true, ..options }).unwrap();
            assert_eq!((counts(&again), tree(&out)), ([4, 0, 0, 0], first));
        }
    }

    #[test]
    fn incomplete_entries_are_written_again_without_overwrite() {
        let folder = tempfile::tempdir().unwrap();
        let dump = source(&folder.path().join("in"));
        let out = folder.path().join("out");
        convert(&dump, &out, &TO_F16).unwrap();
        let whole = tree(&out);
        let layer = out.join("sample/layer_0");
        let damages: [&dyn Fn(); 6] = [
            &|| fs::remove_file(layer.join("meta_t0_3.json")).unwrap(),
            &|| fs::remove_file(layer.join("k_t0_3.bin")).unwrap(),
            &|| fs::write(layer.join("v_t0_3.bin"), b"short").unwrap(),
            &|| fs::remove_file(layer.join("q_t0_3.bin")).unwrap(),
            &|| fs::write(layer.join("meta_t0_3.json"), b"{\"layer_id\": ").unwrap(),
            &|| fs::remove_dir_all(&layer).unwrap(),
        ];
        for (i, damage) in damages.iter().enumerate() {
            damage();
            if layer.exists() {
                fs::write(layer.join(".k_t0_3.bin.abcdef.gearbox-tmp"), b"half").unwrap();
            }
            let report = convert(&dump, &out, &TO_F16).unwrap();
            assert_eq!((report.done, report.failed), (if i == 5 { 2 } else { 1 }, 0), "damage {i}");
            assert_eq!(tree(&out), whole, "damage {i}");
        }
    }

    #[test]
    fn other_output_is_an_error_for_its_entry_only() {
        let folder = tempfile::tempdir().unwrap();
        let dump = source(&folder.path().join("in"));
        let out = folder.path().join("out");
        convert(&dump, &out, &TO_F16).unwrap();
        let meta = out.join("sample/layer_0/meta_t0_3.json");
        let changed = fs::read_to_string(&meta).unwrap().replace("prefill", "decode");
        fs::write(&meta, &changed).unwrap();
        let report = convert(&dump, &out, &TO_F16).unwrap();
        assert_eq!((counts(&report), reasons(&report)), ([0, 3, 0, 1], vec![Reason::OutputExists]));
        assert_eq!(fs::read_to_string(&meta).unwrap(), changed);
        let report = convert(&dump, &out, &ConvertOptions { overwrite: true, ..TO_F16 }).unwrap();
        assert_eq!(report.done, 4);
        assert!(fs::read_to_string(&meta).unwrap().contains("prefill"));

        let out = folder.path().join("st");
        fs::create_dir(&out).unwrap();
        fs::write(out.join("sample.safetensors"), b"something else").unwrap();
        let report = convert(&dump, &out, &SAFETENSORS).unwrap();
        assert_eq!((counts(&report), reasons(&report)), ([0, 0, 0, 4], vec![Reason::OutputExists]));
        assert_eq!(convert(&dump, &out, &ConvertOptions { overwrite: true, ..SAFETENSORS }).unwrap().done, 4);
    }

    #[test]
    fn copies_in_both_formats_have_the_digest_of_the_source() {
        let folder = tempfile::tempdir().unwrap();
        let dump = source(&folder.path().join("in"));
        let digest = dump.digest().unwrap();
        let paths = ["reference", "safetensors", "back"].map(|name| folder.path().join(name));
        convert(&dump, &paths[0], &KEEP).unwrap();
        convert(&dump, &paths[1], &SAFETENSORS).unwrap();
        convert(&open(&paths[1]), &paths[2], &KEEP).unwrap();
        for path in &paths {
            let copy = open(path);
            assert!(copy.findings.list.is_empty());
            assert_eq!(copy.digest().unwrap(), digest, "{}", path.display());
        }
        assert_eq!(tree(&paths[0]).len(), 16);
    }

    #[test]
    fn facts_of_layers_are_kept_in_both_formats() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("in");
        source(&from);
        let mut sample = Sample::new(&from);
        sample.set("attention", json!({"scale": 0.25, "softcap": 30.0, "window": 2}));
        sample.set("rope_layer", json!({"pairing": "half-split", "theta": 1e6, "rotary_dim": 4}));
        sample.set("layer_id", 2);
        for (start, seq) in [(0, 3), (3, 1)] {
            sample.range(start, seq);
            sample.set("stage", if start == 0 { "prefill" } else { "decode" });
            sample.extend();
            sample.write();
        }
        let dump = open(&from);
        assert!(dump.findings.list.is_empty(), "{}", dump.findings);
        let facts = |dump: &Dump| dump.runs[0].layers.iter().map(|layer| layer.facts.clone()).collect::<Vec<_>>();
        let expected = facts(&dump);
        assert_eq!(expected[..2], [LayerFacts::default(), LayerFacts::default()]);
        assert_eq!(expected[2].attention.unwrap().to_string(), "scale 0.25, softcap 30, window 2");
        let paths = ["reference", "safetensors", "back", "again"].map(|name| folder.path().join(name));
        convert(&dump, &paths[0], &KEEP).unwrap();
        convert(&dump, &paths[1], &SAFETENSORS).unwrap();
        convert(&open(&paths[1]), &paths[2], &KEEP).unwrap();
        convert(&open(&paths[1]), &paths[3], &SAFETENSORS).unwrap();
        for path in &paths {
            let copy = open(path);
            assert!(copy.findings.list.is_empty(), "{}", copy.findings);
            assert_eq!((facts(&copy), copy.digest().unwrap()), (expected.clone(), dump.digest().unwrap()));
        }
        assert_eq!(tree(&paths[1]), tree(&paths[3]));

        // The first layer alone is as usual, so that nothing is said of it.
        let mut usual = open(&from);
        usual.runs[0].layers.truncate(2);
        let path = folder.path().join("usual.safetensors");
        convert(&usual, &path, &SAFETENSORS).unwrap();
        let text = fs::read(&path).unwrap();
        for key in ["attention", "rope_layers"] {
            assert!(!text.windows(key.len()).any(|window| window == key.as_bytes()), "{key}");
        }
    }

    #[test]
    fn one_run_may_be_named_as_a_file_and_keeps_its_free_metadata() {
        let folder = tempfile::tempdir().unwrap();
        let dump = source(&folder.path().join("in"));
        let (a, b) = (folder.path().join("a.safetensors"), folder.path().join("new/b.safetensors"));
        let options = ConvertOptions { dtype: Some(DType::F16), ..SAFETENSORS };
        assert_eq!(convert(&dump, &a, &options).unwrap().done, 4);
        assert_eq!(free_metadata(&a)["converted_from"], "fp32");
        assert_eq!(convert(&open(&a), &b, &SAFETENSORS).unwrap().done, 4);
        assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap());

        let mut two = Sample::new(&folder.path().join("two"));
        two.write();
        two.set("run_id", "other");
        two.set("layer_id", 1);
        two.write();
        let error = convert(&open(&folder.path().join("two")), &a, &SAFETENSORS).unwrap_err();
        assert!(error.to_string().ends_with("expected one run, got 2"), "{error}");
    }

    #[test]
    fn source_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let dump = source(folder.path());
        let before = tree(folder.path());
        let report = convert(&dump, folder.path(), &ConvertOptions { overwrite: true, ..TO_F16 }).unwrap();
        assert_eq!((counts(&report), reasons(&report)), ([0, 0, 0, 4], vec![Reason::OutputExists; 4]));
        // The same folder through the run inside it.
        let run = open(&folder.path().join("sample"));
        assert_eq!(convert(&run, folder.path(), &ConvertOptions { overwrite: true, ..KEEP }).unwrap().failed, 4);
        assert_eq!(tree(folder.path()), before);

        let file = folder.path().join("x.safetensors");
        convert(&dump, &file, &SAFETENSORS).unwrap();
        let report = convert(&open(&file), &file, &ConvertOptions { overwrite: true, ..SAFETENSORS }).unwrap();
        assert_eq!(report.failed, 4);
    }

    #[test]
    fn unwritable_and_unreadable_entries_fail_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (from, out) = (folder.path().join("in"), folder.path().join("out"));
        let dump = source(&from);
        fs::create_dir_all(out.join("sample")).unwrap();
        // A file stands where the folder of layer 0 belongs.
        fs::write(out.join("sample/layer_0"), b"").unwrap();
        let report = convert(&dump, &out, &TO_F16).unwrap();
        assert_eq!((counts(&report), reasons(&report)), ([2, 0, 0, 2], vec![Reason::WriteFailed; 2]));

        fs::write(from.join("sample/layer_1/v_t3_4.bin"), b"").unwrap();
        let report = convert(&dump, &folder.path().join("out2"), &TO_F16).unwrap();
        assert_eq!((counts(&report), reasons(&report)), ([3, 0, 0, 1], vec![Reason::TensorFileUnreadable]));
        let out = folder.path().join("st");
        let report = convert(&dump, &out, &SAFETENSORS).unwrap();
        assert_eq!((counts(&report), reasons(&report)), ([0, 0, 0, 4], vec![Reason::TensorFileUnreadable]));
        assert!(tree(&out).is_empty());
    }

    #[test]
    fn what_a_format_cannot_hold_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (from, out) = (folder.path().join("in"), folder.path().join("out"));
        let mut dump = source(&from);
        dump.runs[0].layers[1].entries.pop();
        let report = convert(&dump, &out, &SAFETENSORS).unwrap();
        assert_eq!((counts(&report), reasons(&report)), ([0, 0, 0, 3], vec![Reason::NotRepresentable]));
        dump.runs[0].layers[0].entries[0].value.shape.dim = 2;
        let report = convert(&dump, &out, &KEEP).unwrap();
        assert_eq!((counts(&report), reasons(&report)), ([2, 0, 0, 1], vec![Reason::NotRepresentable]));
        assert!(report.findings.list[0].message.starts_with("value: expected f32 (3, 2, 4) as the key has it"));
        let error = convert(&dump, &out, &ConvertOptions { dtype: Some(DType::F32), ..KEEP }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    }

    #[test]
    fn selection_limits_what_is_converted() {
        let folder = tempfile::tempdir().unwrap();
        source(&folder.path().join("in"));
        let decode = Selection { stage: Some(Stage::Decode), ..Selection::default() };
        let dump = Dump::open(folder.path().join("in"), &decode).unwrap();
        for options in [TO_F16, SAFETENSORS] {
            let out = folder.path().join(format!("{:?}", options.format));
            assert_eq!(convert(&dump, &out, &options).unwrap().done, 2);
            assert_eq!(open(&out).runs[0].layers[0].entries[0].start, 3);
        }
    }

    /// Needs `GEARBOX_DUMPS`: a folder with `fp32/<run>` and `fp16/<run>`, the same runs before and after the reference conversion.
    #[test]
    fn captured_dumps_open_clean_and_convert_to_the_bytes_of_the_reference() {
        let Some(dumps) = std::env::var_os("GEARBOX_DUMPS").map(PathBuf::from) else {
            eprintln!("skipped: GEARBOX_DUMPS is not set");
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let (wide, halves) = (open(&dumps.join("fp32")), open(&dumps.join("fp16")));
        for dump in [&wide, &halves] {
            assert!(dump.entries() > 0 && dump.findings.list.is_empty(), "{}", dump.findings);
            assert!(dump.scan().list.is_empty());
            println!("{}{}", dump.info(), dump.digest().unwrap());
        }
        let report = convert(&wide, folder.path(), &TO_F16).unwrap();
        println!("{report}");
        assert_eq!(report.done, wide.entries());
        for (path, bytes) in tree(folder.path()) {
            assert!(bytes == fs::read(dumps.join("fp16").join(&path)).unwrap(), "{}", path.display());
        }
    }
}
