//! Encoding: four streams and a meta file per entry.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use gearbox_core::{DType, Elem, Error, Result, ResultExt, Role};
use gearbox_plugins::bitstream::{Counts, SymbolBuffer};
use rayon::prelude::*;
use serde_json::json;

use super::folder::{create_dir, put_book, read_json, write};
use super::json::Object;
use super::{Book, Codebook, Coder, STREAMS, count, fields};
use crate::dump::{Dump, Entry, Layout, Mapped, Reason};
use crate::exp::InputArgs;
use crate::report;
use crate::status::Status;

/// Encodes the F16 entries of a dump.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Entries that are not F16 are skipped, and so are those that are encoded already, unless --overwrite is given.
Exit status: 0, or 2 if entries were bad and left out."
)]
pub struct EncodeArgs {
    #[command(flatten)]
    input: InputArgs,
    /// Folder for the streams; created if needed
    #[arg(long, value_name = "DIR", default_value = "exp/bitstream/out")]
    out_dir: PathBuf,
    /// Where the tables are kept
    #[arg(long, value_enum, default_value_t = Codebook::Global)]
    codebook: Codebook,
    /// Encode entries again that are encoded already
    #[arg(long)]
    overwrite: bool,
}

/// An entry that can be encoded.
struct Source<'a> {
    entry: &'a Entry,
    /// Its meta file.
    meta: &'a Path,
    /// Folder for its streams.
    folder: PathBuf,
}

impl Source<'_> {
    fn tensors(&self) -> Result<[Mapped; 2]> {
        Ok([self.entry.key.map()?, self.entry.value.map()?])
    }

    /// What its meta file is called, without the ending.
    fn stem(&self) -> &str {
        self.meta.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default()
    }

    fn out_meta<C: Coder>(&self) -> PathBuf {
        self.folder.join(format!("{}{}.json", C::META, self.stem()))
    }
}

impl EncodeArgs {
    /// Runs the experiment and prints how many entries it encoded.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if there is no F16 entry or if the folder holds streams that need
    /// another codebook; else what reading and writing report.
    pub fn run<C: Coder>(&self, json: bool) -> Result<Status> {
        let (dump, mut status) = self.input.open()?;
        let sources = self.sources(&dump)?;
        let warm_up = dump.findings.list.iter().filter(|finding| finding.reason == Reason::TuningLeftover).count();
        let other = dump.entries() - sources.len();
        if other > 0 {
            tracing::warn!("skipped {other} entries that are not F16 in the reference layout");
        }
        if sources.is_empty() {
            let path = self.input.dump_dir.display();
            return Err(Error::invalid_input(format!(
                "`{path}`: expected F16 entries in the reference layout, got none"
            )));
        }
        let mut skipped = dump.dropped.total() + warm_up + other;

        create_dir(&self.out_dir)?;
        let global = match self.codebook {
            Codebook::Global => {
                let book = Book::<C>::learn(&count_all(&sources)?)?;
                put_book(&self.out_dir, &book, self.overwrite)?;
                Some(book)
            }
            Codebook::PerDump => None,
        };
        let (present, open): (Vec<_>, Vec<_>) =
            sources.into_iter().partition(|source| !self.overwrite && source.out_meta::<C>().exists());
        skipped += present.len();

        let progress = report::progress(open.iter().map(|source| source.entry.original_bytes()).sum(), "encode");
        let results: Vec<Result<()>> = open
            .par_iter()
            .with_max_len(1)
            .map(|source| {
                encode(source, global.as_ref(), self.overwrite).context(|| source.entry.place.clone())?;
                progress.inc(source.entry.original_bytes());
                Ok(())
            })
            .collect();
        progress.finish_and_clear();

        let mut errors = dump.findings.bad();
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            tracing::error!("{error}");
            errors += 1;
            status = Status::BadInput;
        }
        let encoded = results.iter().filter(|result| result.is_ok()).count();
        if json {
            report::print_json(&json!({ "encoded": encoded, "skipped": skipped, "errors": errors }))?;
        } else {
            report::print(&format!("Encoded: {encoded}\nSkipped: {skipped}"))?;
        }
        if errors > 0 {
            eprintln!("Errors: {errors}");
        }
        Ok(status)
    }

    /// The entries that can be encoded.
    fn sources<'a>(&self, dump: &'a Dump) -> Result<Vec<Source<'a>>> {
        let mut sources = Vec::new();
        for (_, _, entry) in dump.iter() {
            let is_f16 = [&entry.key, &entry.value]
                .into_iter()
                .all(|tensor| tensor.dtype == DType::F16 && tensor.layout == Layout::Logical);
            let Some(meta) = entry.meta.as_deref().filter(|_| is_f16) else { continue };
            let place = meta.parent().and_then(|folder| folder.strip_prefix(&dump.path).ok());
            let place = place.ok_or_else(|| {
                Error::invalid_input(format!("`{}` is not below `{}`", meta.display(), dump.path.display()))
            })?;
            sources.push(Source { entry, meta, folder: self.out_dir.join(place) });
        }
        Ok(sources)
    }
}

/// Counts of each stream over all entries.
fn count_all(sources: &[Source<'_>]) -> Result<[Counts; 4]> {
    let counted = sources.par_iter().map(|source| {
        let [key, value] = source.tensors().context(|| source.entry.place.clone())?;
        count([&key, &value])
    });
    let sum = |mut sum: [Counts; 4], more: [Counts; 4]| {
        sum.iter_mut().zip(&more).for_each(|(sum, more)| sum.merge(more));
        sum
    };
    counted.try_reduce_with(|a, b| Ok(sum(a, b))).unwrap_or_else(|| count([&[], &[]]))
}

fn encode<C: Coder>(source: &Source<'_>, global: Option<&Book<C>>, overwrite: bool) -> Result<()> {
    let tensors = source.tensors()?;
    let tensors = tensors.each_ref().map(|tensor| &**tensor);
    let own = match global {
        Some(_) => None,
        None => Some(Book::<C>::learn(&count(tensors)?)?),
    };
    let book =
        global.or(own.as_ref()).unwrap_or_else(|| unreachable!("an entry has a codebook of its own or the global one"));

    create_dir(&source.folder)?;
    let path = source.out_meta::<C>();
    if overwrite && path.exists() {
        // While the streams are replaced there must be no entry: its old meta file would describe new streams.
        fs::remove_file(&path).map_err(|error| Error::io(&path, &error))?;
    }
    let fields = fields()?;
    let names = STREAMS.map(|(stream, ..)| format!("{stream}_{}.{}", source.stem(), C::ENDING));
    let mut buffer = SymbolBuffer::default();
    for ((model, (_, role, field)), name) in book.0.iter().zip(STREAMS).zip(&names) {
        let mut stream = Vec::new();
        model.encode(buffer.gather(tensors[role as usize], Elem::F16, fields[field]), &mut stream);
        // A stream without a meta file is the rest of an interrupted run.
        write(&source.folder.join(name), &stream, true)?;
    }

    let mut meta: Object = read_json(source.meta)?;
    meta.set("layout", C::LAYOUT);
    meta.set("bytes_per_elem", 2_u64);
    let set_streams = |meta: &mut Object| {
        for ((stream, ..), name) in STREAMS.iter().zip(&names) {
            meta.set(&format!("{stream}_file"), name.as_str());
        }
    };
    if C::STREAMS_FIRST {
        set_streams(&mut meta);
    }
    let codebook = if global.is_some() { Codebook::Global } else { Codebook::PerDump };
    meta.set("codebook", codebook.name());
    meta.set("num_elements", tensors[Role::Key as usize].len() as u64 / 2);
    if !C::STREAMS_FIRST {
        set_streams(&mut meta);
    }
    if let Some(own) = own {
        own.write(&mut meta);
    }
    write(&path, &meta.to_bytes(), overwrite)
}
