//! Folders that hold encoded entries.

use std::cmp::Ordering;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use gearbox_core::{Error, Result, ResultExt};

use super::json::{Json, Object};
use super::{Book, Codebook, Coder, STREAMS};
use crate::atomic::AtomicFile;

/// JSON files beyond this are not read. Token ids of a million tokens take about 11 MiB.
const LARGEST_JSON: u64 = 64 << 20;

/// One encoded entry.
#[derive(Debug)]
pub(super) struct Encoded {
    /// Its meta file.
    pub path: PathBuf,
    /// The content of the meta file.
    pub meta: Object,
}

impl Encoded {
    /// Reads a meta file.
    pub fn read(path: PathBuf) -> Result<Self> {
        Ok(Self { meta: read_json(&path)?, path })
    }

    /// The folder of the entry.
    pub fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }

    /// The folder below `root`, and so the place of the entry's original below its own.
    pub fn place(&self, root: &Path) -> Result<&Path> {
        let outside = |_| Error::invalid_input(format!("`{}` is not below `{}`", self.path.display(), root.display()));
        self.folder().strip_prefix(root).map_err(outside)
    }

    /// A file that the meta file names by this key, in a folder of one's own choice.
    pub fn file(&self, key: &str, folder: &Path) -> Result<PathBuf> {
        let name = self.meta.text(key)?;
        if Path::new(name).file_name() == Some(name.as_ref()) {
            return Ok(folder.join(name));
        }
        Err(Error::invalid_input(format!("`{key}`: expected the name of a file, got `{name}`")))
    }

    /// Its four streams.
    pub fn streams(&self) -> Result<[PathBuf; 4]> {
        let paths: Vec<_> = STREAMS
            .iter()
            .map(|(stream, ..)| self.file(&format!("{stream}_file"), self.folder()))
            .collect::<Result<_>>()?;
        Ok(paths.try_into().unwrap_or_else(|_| unreachable!("one path per stream")))
    }

    /// Whether its tables are in the codebook of the folder.
    pub fn is_global(&self) -> Result<bool> {
        match self.meta.text("codebook")? {
            "global" => Ok(true),
            "per-dump" => Ok(false),
            other => Err(Error::invalid_input(format!("`codebook`: expected `global` or `per-dump`, got `{other}`"))),
        }
    }

    /// By run, layer and position.
    pub fn order(&self, other: &Self) -> Ordering {
        let text = |entry: &Self| entry.meta.text("run_id").unwrap_or_default().to_owned();
        let number = |entry: &Self, key: &str| entry.meta.get(key).and_then(Json::as_u64);
        let key = |entry: &Self| (text(entry), number(entry, "layer_id"), number(entry, "seq_start"));
        key(self).cmp(&key(other)).then_with(|| self.path.cmp(&other.path))
    }
}

/// The meta files of encoded entries below `root`, at any depth, sorted by path; linked folders are not followed.
pub(super) fn metas<C: Coder>(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![root.to_path_buf()];
    while let Some(folder) = open.pop() {
        let failed = |error: std::io::Error| Error::io(&folder, &error);
        for item in fs::read_dir(&folder).map_err(failed)? {
            let item = item.map_err(failed)?;
            let path = item.path();
            let starts = item.file_name().as_encoded_bytes().starts_with(C::META.as_bytes());
            if item.file_type().map_err(failed)?.is_dir() {
                open.push(path);
            } else if starts && path.extension().is_some_and(|ending| ending == "json") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// What reading the encoded entries of a folder gave.
pub(super) struct Listing {
    /// The entries by run, layer and position.
    pub entries: Vec<Encoded>,
    /// Meta files that cannot be used; each is logged.
    pub bad: usize,
}

/// Reads the encoded entries below `root`.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if there are none.
pub(super) fn list<C: Coder>(root: &Path) -> Result<Listing> {
    let paths = metas::<C>(root)?;
    if paths.is_empty() {
        return Err(Error::invalid_input(format!("`{}`: expected `{}*.json`, found none", root.display(), C::META)));
    }
    let mut listing = Listing { entries: Vec::with_capacity(paths.len()), bad: 0 };
    for path in paths {
        match Encoded::read(path) {
            Ok(entry) => listing.entries.push(entry),
            Err(error) => {
                tracing::error!("{error}");
                listing.bad += 1;
            }
        }
    }
    listing.entries.sort_by(Encoded::order);
    Ok(listing)
}

/// Reads the codebook of a folder.
pub(super) fn read_book<C: Coder>(root: &Path) -> Result<Book<C>> {
    let path = root.join(C::BOOK);
    Book::read(&read_json(&path)?).context(|| format!("`{}`", path.display()))
}

/// Puts a codebook into a folder and keeps it from contradicting what is there: encoded entries that use another one.
///
/// With `overwrite` these entries are removed first, so that whatever happens no entry is left with tables that are not its own.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if there are such entries and `overwrite` is off.
pub(super) fn put_book<C: Coder>(root: &Path, book: &Book<C>, overwrite: bool) -> Result<()> {
    let path = root.join(C::BOOK);
    let bytes = book.to_bytes();
    match fs::read(&path) {
        Ok(found) if found == bytes => return Ok(()),
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&path, &error)),
        _ => {}
    }
    let mut outdated = Vec::new();
    for meta in metas::<C>(root)? {
        let entry = Encoded::read(meta)?;
        if entry.is_global().context(|| format!("`{}`", entry.path.display()))? {
            outdated.push(entry);
        }
    }
    if !outdated.is_empty() {
        let count = outdated.len();
        if !overwrite {
            return Err(Error::invalid_input(format!(
                "`{}`: {count} entries there use a codebook of other dumps, which this run would replace; encode into another folder, \
                 with `--codebook {}`, or with --overwrite, which removes these entries",
                path.display(),
                Codebook::PerDump.name()
            )));
        }
        for entry in outdated {
            let streams = entry.streams();
            fs::remove_file(&entry.path).map_err(|error| Error::io(&entry.path, &error))?;
            // A stream that is gone already does no harm.
            for stream in streams.into_iter().flatten() {
                let _ = fs::remove_file(stream);
            }
        }
        tracing::warn!("removed {count} entries with another codebook from `{}`", root.display());
    }
    write(&path, &bytes, true)
}

/// Writes a whole file.
pub(super) fn write(path: &Path, bytes: &[u8], overwrite: bool) -> Result<()> {
    let mut file = AtomicFile::create(path, overwrite)?;
    file.write_all(bytes).map_err(|error| Error::io(path, &error))?;
    file.commit()
}

/// Creates a folder and those above it.
pub(super) fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| Error::io(path, &error))
}

/// Reads a JSON object.
pub(super) fn read_json(path: &Path) -> Result<Object> {
    let failed = |error: std::io::Error| Error::io(path, &error);
    let file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    if len > LARGEST_JSON {
        let message = format!("`{}`: expected at most {LARGEST_JSON} bytes, got {len}", path.display());
        return Err(Error::invalid_input(message));
    }
    let mut bytes = Vec::new();
    file.take(LARGEST_JSON).read_to_end(&mut bytes).map_err(failed)?;
    serde_json::from_slice(&bytes).map_err(|error| Error::invalid_input(format!("`{}`: {error}", path.display())))
}
