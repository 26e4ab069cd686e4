//! Decoding: back to tensors, compared with the originals or written as a dump.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use gearbox_core::{Elem, Error, ErrorKind, Limits, Result, ResultExt, Role};
use gearbox_plugins::bitstream::SymbolBuffer;
use rayon::prelude::*;
use serde_json::json;

use super::folder::{Encoded, create_dir, list, read_book, write};
use super::{Book, Coder, STREAMS, fields};
use crate::report;
use crate::status::Status;

/// Decodes what the encoder wrote.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "The streams hold no checksum: without --verify an entry counts as checked when its streams are the right length and decode.
Exit status: 0, 1 if an entry differs from its original, 2 if an entry cannot be decoded or has no original."
)]
pub struct DecodeArgs {
    /// Folder of the streams
    #[arg(long, value_name = "DIR")]
    bitstream_dir: PathBuf,
    /// Dump that was encoded; needed to verify
    #[arg(long, value_name = "DIR", required_if_eq("verify", "true"))]
    orig_dump_dir: Option<PathBuf>,
    /// Compare with the original
    #[arg(long)]
    verify: bool,
    /// Folder for the decoded dump; queries are not encoded and so not part of it
    #[arg(long, value_name = "DIR")]
    out_dir: Option<PathBuf>,
    /// Replace entries of the decoded dump
    #[arg(long)]
    overwrite: bool,
}

impl DecodeArgs {
    /// Runs the experiment and prints how many entries were decoded.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if there is no entry; [`ErrorKind::Io`] if the codebook is missing.
    pub fn run<C: Coder>(&self, json: bool) -> Result<Status> {
        let listing = list::<C>(&self.bitstream_dir)?;
        let book = if listing.entries.iter().any(|entry| entry.is_global().unwrap_or(false)) {
            Some(read_book::<C>(&self.bitstream_dir)?)
        } else {
            None
        };
        let progress = report::progress(listing.entries.len() as u64, "decode");
        let results: Vec<Result<()>> = listing
            .entries
            .par_iter()
            .with_max_len(1)
            .map(|entry| {
                let result = self.decode(entry, book.as_ref());
                progress.inc(1);
                result.context(|| format!("`{}`", entry.path.display()))
            })
            .collect();
        progress.finish_and_clear();

        let (mut failed, mut status) = (listing.bad, Status::Pass);
        if listing.bad > 0 {
            status = Status::BadInput;
        }
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            tracing::error!("{error}");
            failed += 1;
            let is_difference = error.kind() == ErrorKind::Mismatch;
            status = status.and(if is_difference { Status::Fail } else { Status::BadInput });
        }
        let checked = results.iter().filter(|result| result.is_ok()).count();
        if json {
            report::print_json(&json!({ "checked": checked, "failed": failed, "verified": self.verify }))?;
        } else {
            report::print(&format!("Checked: {checked}, Failed: {failed}"))?;
        }
        Ok(status)
    }

    /// Decodes an entry; compares and writes it as far as it was asked for.
    fn decode<C: Coder>(&self, entry: &Encoded, global: Option<&Book<C>>) -> Result<()> {
        let own = if entry.is_global()? { None } else { Some(Book::<C>::read(&entry.meta)?) };
        let book = global.filter(|_| own.is_none()).or(own.as_ref());
        let book = book.unwrap_or_else(|| unreachable!("the codebook was read because this entry needs it"));
        let tensors = decode_tensors(entry, book)?;
        let place = entry.place(&self.bitstream_dir)?;
        if let Some(originals) = self.orig_dump_dir.as_deref().filter(|_| self.verify) {
            for (role, tensor) in Role::ALL.into_iter().zip(&tensors) {
                let path = entry.file(file_key(role), &originals.join(place))?;
                let original = fs::read(&path).map_err(|error| Error::io(&path, &error))?;
                compare(tensor, &original).context(|| format!("{role}s, `{}`", path.display()))?;
            }
        }
        match &self.out_dir {
            Some(out) => self.write::<C>(entry, &tensors, &out.join(place)),
            None => Ok(()),
        }
    }

    /// Writes an entry in the reference layout, the meta file last.
    fn write<C: Coder>(&self, entry: &Encoded, tensors: &[Vec<u8>; 2], folder: &Path) -> Result<()> {
        let name = entry.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let path = folder.join(name.strip_prefix(C::META).unwrap_or(name));
        create_dir(folder)?;
        if path.exists() {
            if !self.overwrite {
                let message = format!("`{}`: exists already; --overwrite replaces it", path.display());
                return Err(Error::invalid_input(message));
            }
            fs::remove_file(&path).map_err(|error| Error::io(&path, &error))?;
        }
        for (role, tensor) in Role::ALL.into_iter().zip(tensors) {
            write(&entry.file(file_key(role), folder)?, tensor, true)?;
        }
        let mut meta = entry.meta.clone();
        let streams = STREAMS.iter().map(|(stream, ..)| format!("{stream}_file"));
        let tables = STREAMS.iter().map(|(stream, ..)| format!("{stream}_{}", C::TABLE));
        for key in streams.chain(tables) {
            meta.remove(&key);
        }
        for key in ["layout", "codebook", "num_elements", "q_file", "q_heads"] {
            meta.remove(key);
        }
        write(&path, &meta.to_bytes(), self.overwrite)
    }
}

/// The key that names the file of a tensor.
fn file_key(role: Role) -> &'static str {
    match role {
        Role::Key => "k_file",
        Role::Value => "v_file",
    }
}

/// Decodes keys and values.
fn decode_tensors<C: Coder>(entry: &Encoded, book: &Book<C>) -> Result<[Vec<u8>; 2]> {
    let count = entry.meta.number("num_elements")?;
    let len =
        usize::try_from(count).ok().and_then(|count| count.checked_mul(2)).filter(|len| *len <= Limits::default().lane);
    let len = len.ok_or_else(|| Error::invalid_input(format!("`num_elements`: expected up to 2^31, got {count}")))?;
    let fields = fields()?;
    let mut buffer = SymbolBuffer::default();
    let mut tensors = [Vec::new(), Vec::new()];
    for ((path, model), (stream, role, field)) in entry.streams()?.into_iter().zip(&book.0).zip(STREAMS) {
        let bytes = fs::read(&path).map_err(|error| Error::io(&path, &error))?;
        let tensor = &mut tensors[role as usize];
        tensor.resize(len, 0);
        buffer
            .scatter(tensor, Elem::F16, fields[field], |symbols| model.decode(&bytes, symbols))
            .context(|| stream.to_owned())?;
    }
    Ok(tensors)
}

/// Names the first element that differs.
fn compare(got: &[u8], expected: &[u8]) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    if got.len() != expected.len() {
        return Err(Error::mismatch(format!("expected {} bytes, got {}", expected.len(), got.len())));
    }
    let differs = |(got, expected): (&[u8], &[u8])| got != expected;
    let first = got.chunks(2).zip(expected.chunks(2)).position(differs).unwrap_or_default();
    Err(Error::mismatch(format!("element {first} differs from the original")))
}
