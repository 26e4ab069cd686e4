//! The loader: files to registry entries.

use std::ffi::c_void;
use std::fmt;
use std::fs::{self, File, Metadata};
use std::io::{self, BufReader};
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use abi_stable::library::{LibHeader, LibraryError, lib_header_from_path};
use gearbox_core::{AnyEntry, Error, ErrorKind, LibraryUse, NameLibrary};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::Level;
use crate::convert;
use crate::host::{Described, Functions, Loaded, functions, missing};
use crate::raw::{self, ABI_MAJOR, ABI_MINOR};
use crate::root::RootRef;

/// Takes lines that plugins log.
pub type Log = Arc<dyn Fn(Level, &str) + Send + Sync>;

/// What a program offers to the libraries that it loads.
#[derive(Clone)]
pub struct Host {
    /// Takes lines that plugins log, from any thread; `None` drops them.
    pub log: Option<Log>,
    /// Threads that one call of a plugin may use, its own included.
    pub threads: usize,
    /// Also loads files that every user of the machine can replace.
    pub allow_insecure: bool,
    /// Gives decoders a buffer of their own with a guard behind it, so that one byte too many is seen. Costs a copy; encoders and the lanes of
    /// transforms are always guarded.
    pub guarded: bool,
}

impl Default for Host {
    /// No log, one thread, nothing insecure; decoders are guarded in debug builds.
    fn default() -> Self {
        Self { log: None, threads: 1, allow_insecure: false, guarded: cfg!(debug_assertions) }
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host")
            .field("log", &self.log.is_some())
            .field("threads", &self.threads)
            .field("allow_insecure", &self.allow_insecure)
            .field("guarded", &self.guarded)
            .finish()
    }
}

/// How a library exports its plugins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    /// The entry point of `gearbox_plugin.h`.
    C,
    /// The root module that [`export_plugins!`](crate::export_plugins) writes.
    Rust,
}

impl fmt::Display for Abi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::C => "C",
            Self::Rust => "Rust",
        })
    }
}

/// A loaded library. It stays in memory until the process ends, whoever drops this.
#[derive(Debug)]
pub struct Library {
    /// Canonical path.
    pub path: PathBuf,
    /// How it exports its plugins.
    pub abi: Abi,
    /// Version of the ABI that it was built with: major, minor.
    pub version: (u32, u32),
    /// Its plugins, in its own order; their origin is the path.
    pub entries: Vec<AnyEntry>,
    image: Arc<Image>,
}

impl Library {
    /// SHA-256 of the file, 64 hexadecimal digits in lower case. Reading all of it takes longer than loading, so that is done when it is
    /// first asked for; what was opened is what is read, whatever has the path by then.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the file cannot be read, or was written to since it was loaded.
    pub fn sha256(&self) -> gearbox_core::Result<&str> {
        self.image.named_sha256(&self.path)
    }
}

/// The file of a library, opened before it is loaded.
#[derive(Debug)]
struct Image {
    file: File,
    /// Length and time of the last change, at that moment.
    stamp: (u64, Option<SystemTime>),
    sha256: OnceLock<Result<String, String>>,
}

impl Image {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self { stamp: stamp(&file.metadata()?), file, sha256: OnceLock::new() })
    }

    fn named_sha256(&self, path: &Path) -> gearbox_core::Result<&str> {
        self.sha256().map_err(|reason| Error::new(ErrorKind::Io, format!("`{}`: {reason}", path.display())))
    }

    /// The digest, or why there is none.
    fn sha256(&self) -> Result<&str, &str> {
        let read = || {
            let mut hasher = Sha256::new();
            io::copy(&mut BufReader::with_capacity(256 << 10, &self.file), &mut hasher)?;
            if stamp(&self.file.metadata()?) != self.stamp {
                return Err(io::Error::other("it was written to since it was loaded"));
            }
            Ok(format!("{:x}", hasher.finalize()))
        };
        self.sha256.get_or_init(|| read().map_err(|error| error.to_string())).as_deref().map_err(String::as_str)
    }
}

fn stamp(metadata: &Metadata) -> (u64, Option<SystemTime>) {
    (metadata.len(), metadata.modified().ok())
}

/// A library, or a folder of libraries, to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// A file, or a folder whose shared libraries are loaded in the order of their names.
    pub path: PathBuf,
    /// SHA-256 that the file must have, in hexadecimal digits.
    pub sha256: Option<String>,
}

impl<P: Into<PathBuf>> From<P> for Source {
    fn from(path: P) -> Self {
        Self { path: path.into(), sha256: None }
    }
}

/// Why a library is not loaded, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LoadErrorKind {
    /// No such file, or it cannot be read.
    NotFound,
    /// Every user of the machine can replace the file.
    Insecure,
    /// The file does not have the SHA-256 that it is pinned to.
    PinMismatch,
    /// The system does not load it: another format, another processor, a missing dependency.
    NotALibrary,
    /// A library that exports no Gearbox plugins.
    NoEntryPoint,
    /// Built for another major version of the ABI.
    WrongAbi,
    /// A Rust library whose structs are laid out differently.
    LayoutMismatch,
    /// Its entry point failed.
    EntryFailed,
    /// What it says about a plugin breaks the rules.
    BadPlugin,
}

/// Why a library is not loaded.
#[derive(Clone, Debug)]
pub struct LoadError {
    /// What went wrong, for programs.
    pub kind: LoadErrorKind,
    /// The file or folder.
    pub path: PathBuf,
    /// What went wrong, for people.
    pub message: String,
    /// The whole story where it is long, such as each field that differs.
    pub details: Option<String>,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.path.display(), self.message)
    }
}

impl std::error::Error for LoadError {}

impl LoadError {
    /// The same as an [`Error`].
    pub fn into_error(self) -> Error {
        let error = self;
        let kind = match error.kind {
            LoadErrorKind::NotFound => ErrorKind::Io,
            LoadErrorKind::EntryFailed => ErrorKind::PluginPanicked,
            LoadErrorKind::WrongAbi | LoadErrorKind::LayoutMismatch => ErrorKind::Unsupported,
            LoadErrorKind::PinMismatch => ErrorKind::Mismatch,
            _ => ErrorKind::InvalidInput,
        };
        Error::new(kind, error.to_string())
    }
}

/// An error that has no path yet.
struct Failure {
    kind: LoadErrorKind,
    message: String,
    details: Option<String>,
}

impl Failure {
    fn new(kind: LoadErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), details: None }
    }

    fn bad(message: impl Into<String>) -> Self {
        Self::new(LoadErrorKind::BadPlugin, message)
    }

    fn io(error: &io::Error) -> Self {
        Self::new(LoadErrorKind::NotFound, error.to_string())
    }

    fn at(self, path: &Path) -> LoadError {
        LoadError { kind: self.kind, path: path.to_owned(), message: self.message, details: self.details }
    }
}

/// Every library that this process has loaded.
static LOADED: Mutex<Vec<Arc<Library>>> = Mutex::new(Vec::new());

/// Loads the plugins of one file.
///
/// A file that is loaded already, under this path or with the same contents, is not loaded again: its first [`Library`] is returned, with
/// the [`Host`] it was loaded for.
///
/// # Errors
/// [`LoadError`], whose kinds name the cases. The library stays in memory even then, once the system has loaded it.
pub fn load(source: &Source, host: &Host) -> Result<Arc<Library>, LoadError> {
    load_file(source, host).map_err(|failure| failure.at(&source.path))
}

/// Loads the plugins of files and folders, each library once.
///
/// In a folder only files that are named like shared libraries of this system are loaded. The caller gives all paths: nothing is searched.
///
/// # Errors
/// The [`LoadError`] of the first library that fails.
pub fn load_all(sources: &[Source], host: &Host) -> Result<Vec<Arc<Library>>, LoadError> {
    let mut libraries: Vec<Arc<Library>> = Vec::new();
    for source in sources {
        let files = files(source, host).map_err(|failure| failure.at(&source.path))?;
        for file in files {
            let library = load(&file, host)?;
            if !libraries.iter().any(|known| Arc::ptr_eq(known, &library)) {
                libraries.push(library);
            }
        }
    }
    Ok(libraries)
}

/// The libraries that a source stands for.
fn files(source: &Source, host: &Host) -> Result<Vec<Source>, Failure> {
    if !source.path.is_dir() {
        return Ok(vec![source.clone()]);
    }
    if source.sha256.is_some() {
        return Err(Failure::new(
            LoadErrorKind::PinMismatch,
            "expected a file, since a SHA-256 is given; got a folder",
        ));
    }
    check_permissions(&source.path, host)?;
    let mut files = Vec::new();
    for entry in fs::read_dir(&source.path).map_err(|error| Failure::io(&error))? {
        let path = entry.map_err(|error| Failure::io(&error))?.path();
        if path.is_file() && path.extension().is_some_and(|extension| extension == std::env::consts::DLL_EXTENSION) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files.into_iter().map(Source::from).collect())
}

fn load_file(source: &Source, host: &Host) -> Result<Arc<Library>, Failure> {
    let path = fs::canonicalize(&source.path).map_err(|error| Failure::io(&error))?;
    if path.is_dir() {
        return Err(Failure::new(LoadErrorKind::NotALibrary, "expected a shared library, got a folder"));
    }
    check_permissions(&path, host)?;
    let image = Image::open(&path).map_err(|error| Failure::io(&error))?;
    if let Some(pin) = &source.sha256 {
        let sha256 = image.sha256().map_err(|reason| Failure::new(LoadErrorKind::NotFound, reason))?;
        if !pin.eq_ignore_ascii_case(sha256) {
            return Err(Failure::new(LoadErrorKind::PinMismatch, format!("expected the SHA-256 {pin}, got {sha256}")));
        }
    }
    // Held to the end, so that two threads do not load one file twice.
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let same = |known: &Library| {
        known.image.stamp.0 == image.stamp.0 && known.image.sha256().is_ok_and(|known| image.sha256() == Ok(known))
    };
    if let Some(known) = loaded.iter().find(|known| same(known)) {
        return Ok(Arc::clone(known));
    }
    if loaded.iter().any(|known| known.path == path) {
        let message =
            "the file has changed since this process loaded it, and libraries are never unloaded; start again";
        return Err(Failure::new(LoadErrorKind::NotALibrary, message));
    }
    // Its constructors have run and may have started threads or registered callbacks: it is never unloaded, whatever follows.
    let opened = ManuallyDrop::new(open(&path)?);
    // The system opens the path once more, and nobody wants the plugins or the digest of another file.
    if !fs::metadata(&path).is_ok_and(|metadata| stamp(&metadata) == image.stamp) {
        return Err(Failure::new(LoadErrorKind::NotALibrary, "the file was replaced while it was loaded"));
    }
    let (abi, place) = entry_point(&path, &opened, host)?;
    // SAFETY: the entry point promises null or a library that stays as it is until the process ends.
    let (version, plugins) = unsafe { plugins(place) }?;
    let origin = path.display().to_string();
    let image = Arc::new(image);
    let library: NameLibrary = {
        let (path, image) = (path.clone(), Arc::clone(&image));
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Arc::new(move || Ok(LibraryUse { file: file.clone(), sha256: image.named_sha256(&path)?.to_owned() }))
    };
    let mut entries: Vec<AnyEntry> = Vec::new();
    for (idx, place) in plugins.iter().enumerate() {
        // SAFETY: as above, for every plugin.
        let entry = unsafe { entry(*place, &origin, &library, host) }
            .map_err(|message| Failure::bad(format!("plugin {idx}: {message}")))?;
        if entries.iter().any(|other| other.id() == entry.id()) {
            return Err(Failure::bad(format!("two of its plugins have the id `{}`", entry.id())));
        }
        entries.push(entry);
    }
    let library = Arc::new(Library { path, abi, version, entries, image });
    loaded.push(Arc::clone(&library));
    Ok(library)
}

/// Refuses a file that another user may have put there: it, its folder, or a folder above can be written by everyone.
#[cfg(unix)]
fn check_permissions(path: &Path, host: &Host) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;

    const WRITABLE: u32 = 0o002;
    const STICKY: u32 = 0o1000;

    if host.allow_insecure {
        return Ok(());
    }
    let path = fs::canonicalize(path).map_err(|error| Failure::io(&error))?;
    // The library and its folder, or the folder that was named.
    let near = if path.is_dir() { 1 } else { 2 };
    for (depth, place) in path.ancestors().enumerate() {
        let mode = fs::metadata(place).map_err(|error| Failure::io(&error))?.permissions().mode();
        // In a sticky folder further up, such as `/tmp`, nobody can rename what belongs to others; the library itself does not belong there.
        if mode & WRITABLE != 0 && (depth < near || mode & STICKY == 0) {
            return Err(Failure::new(
                LoadErrorKind::Insecure,
                format!("`{}` can be written by every user (mode {:o})", place.display(), mode & 0o7777),
            ));
        }
    }
    Ok(())
}

/// Other systems have no such bits.
#[cfg(not(unix))]
#[expect(clippy::unnecessary_wraps, reason = "one signature for all systems")]
fn check_permissions(_: &Path, _: &Host) -> Result<(), Failure> {
    Ok(())
}

#[cfg(unix)]
fn open(path: &Path) -> Result<libloading::Library, Failure> {
    use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

    // SAFETY: loading runs the library's own code, which the user asked for by naming it. Missing symbols are found now rather than in the
    // middle of a run, and its symbols do not replace those of others.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
        .map(Into::into)
        .map_err(|error| not_a_library(path, &error))
}

#[cfg(not(unix))]
fn open(path: &Path) -> Result<libloading::Library, Failure> {
    // SAFETY: loading runs the library's own code, which the user asked for by naming it.
    unsafe { libloading::Library::new(path) }.map_err(|error| not_a_library(path, &error))
}

/// The system's reason, without the path that it repeats.
fn not_a_library(path: &Path, error: &libloading::Error) -> Failure {
    let source = std::error::Error::source(error);
    let text = source.map_or_else(|| error.to_string(), ToString::to_string);
    let reason = text.trim().trim_start_matches(&format!("{}:", path.display())).trim();
    let reason: String = reason.chars().take(200).collect();
    Failure { details: Some(text.clone()), ..Failure::new(LoadErrorKind::NotALibrary, format!("not loaded: {reason}")) }
}

type Entry = unsafe extern "C" fn(*const raw::Host) -> *const raw::Library;

/// Name of the entry point of C libraries built for a major version.
fn symbol(major: u32) -> String {
    format!("gearbox_plugin_v{major}")
}

/// Majors whose entry points are looked for, to name them.
const OTHER_MAJORS: std::ops::RangeInclusive<u32> = 2..=16;

fn entry_point(path: &Path, opened: &libloading::Library, host: &Host) -> Result<(Abi, *const raw::Library), Failure> {
    // SAFETY: a function of this name has this type, whatever the library; the header reserves it.
    if let Ok(entry) = unsafe { opened.get::<Entry>(symbol(ABI_MAJOR)) } {
        // SAFETY: the type is as the header says, and the host lives as long as the process.
        return Ok((Abi::C, unsafe { entry(give(host)) }));
    }
    let root = lib_header_from_path(path).and_then(LibHeader::init_root_module::<RootRef>);
    match root {
        // SAFETY: abi_stable compared the function's type, and the host lives as long as the process.
        Ok(root) => Ok((Abi::Rust, unsafe { root.library()(give(host)) })),
        Err(LibraryError::GetSymbolError { .. }) => {
            for major in OTHER_MAJORS {
                // SAFETY: only looked for, never called.
                if unsafe { opened.get::<Entry>(symbol(major)) }.is_ok() {
                    return Err(wrong_abi(&format!("{major}")));
                }
            }
            Err(Failure::new(
                LoadErrorKind::NoEntryPoint,
                format!(
                    "a library without Gearbox plugins: it exports neither `{}` (C) nor what `export_plugins!` writes (Rust)",
                    symbol(ABI_MAJOR)
                ),
            ))
        }
        Err(error) => Err(rust_failure(error)),
    }
}

fn wrong_abi(got: &str) -> Failure {
    Failure::new(
        LoadErrorKind::WrongAbi,
        format!("built for version {got} of the plugin ABI, this program has {ABI_MAJOR}.{ABI_MINOR}; build it again"),
    )
}

/// What `abi_stable` found, in one line; the rest becomes the details.
fn rust_failure(error: LibraryError) -> Failure {
    let details = Some(error.to_string());
    let failure = match error {
        LibraryError::IncompatibleVersionNumber { actual_version, .. } => {
            wrong_abi(&format!("{}.{}", actual_version.major, actual_version.minor))
        }
        LibraryError::InvalidAbiHeader(header) => Failure::new(
            LoadErrorKind::WrongAbi,
            format!(
                "built with version {}.{} of abi_stable, this program has 0.11",
                header.abi_major, header.abi_minor
            ),
        ),
        LibraryError::AbiInstability(_) | LibraryError::InvalidCAbi { .. } => Failure::new(
            LoadErrorKind::LayoutMismatch,
            "its structs are laid out differently: built with another version of gearbox-abi that claims the same ABI",
        ),
        LibraryError::RootModule { err, .. } => {
            Failure::new(LoadErrorKind::EntryFailed, format!("its root module failed: {}", err.to_string().trim()))
        }
        other => Failure::new(LoadErrorKind::NotALibrary, other.to_string().trim().lines().next().unwrap_or_default()),
    };
    Failure { details, ..failure }
}

/// The host in the form of the ABI; leaked, since a library may use it until the process ends.
fn give(host: &Host) -> *const raw::Host {
    let log: &'static Option<Log> = Box::leak(Box::new(host.log.clone()));
    let host = raw::Host {
        size: raw::size_of::<raw::Host>(),
        abi_major: ABI_MAJOR,
        abi_minor: ABI_MINOR,
        state: std::ptr::from_ref(log).cast_mut().cast(),
        log: Some(take_line),
        threads: host.threads as u64,
    };
    Box::leak(Box::new(host))
}

unsafe extern "C" fn take_line(state: *mut c_void, level: u32, text: raw::Str) {
    // SAFETY: `give` made the state, which is never freed nor changed.
    let Some(log) = (unsafe { &*state.cast::<Option<Log>>() }) else { return };
    // SAFETY: the plugin promises that the text is readable during this call.
    let bytes = unsafe { convert::slice(text.data, text.len) };
    let level = match level {
        1 => Level::Error,
        2 => Level::Warn,
        3 => Level::Info,
        _ => Level::Debug,
    };
    // A panic of the host's logger must not cross the library's frames; a line is lost.
    let _ = catch_unwind(AssertUnwindSafe(|| log(level, &String::from_utf8_lossy(bytes))));
}

/// Plugins that one library may list.
const MAX_PLUGINS: usize = 1024;

/// # Safety
/// `place` is null or points to a library that stays valid until the process ends.
unsafe fn plugins(place: *const raw::Library) -> Result<((u32, u32), &'static [*const raw::Plugin]), Failure> {
    if place.is_null() {
        return Err(Failure::new(LoadErrorKind::EntryFailed, "its entry point returned null instead of its plugins"));
    }
    // SAFETY: as the caller promises.
    let library = unsafe { raw::read(place) }
        .ok_or_else(|| Failure::bad("its `gearbox_library` is shorter than in version 1.0; is `size` set?"))?;
    if library.abi_major != ABI_MAJOR {
        return Err(wrong_abi(&format!("{}.{}", library.abi_major, library.abi_minor)));
    }
    if library.count > MAX_PLUGINS {
        return Err(Failure::bad(format!("expected at most {MAX_PLUGINS} plugins, got {}", library.count)));
    }
    // SAFETY: as the caller promises.
    Ok(((library.abi_major, library.abi_minor), unsafe { convert::slice(library.plugins, library.count) }))
}

/// Checks what a library says about a plugin.
///
/// # Safety
/// `place` is null or points to a plugin that stays valid until the process ends.
unsafe fn entry(
    place: *const raw::Plugin,
    origin: &str,
    library: &NameLibrary,
    host: &Host,
) -> Result<AnyEntry, String> {
    // SAFETY: as the caller promises.
    let table = unsafe { raw::read(place) }
        .ok_or("its `gearbox_plugin` is null or shorter than in version 1.0; is `size` set?")?;
    // SAFETY: as the caller promises, for all texts of a plugin.
    let read =
        |what: &str, text| unsafe { convert::str(text) }.map_err(|why| format!("{what}: {why}")).map(str::to_owned);
    let id = read("id", table.id)?;
    let name = |error: String| format!("`{id}`: {error}");
    check_id(&id)?;
    if table.alias_count > MAX_PLUGINS {
        return Err(name(format!("expected at most {MAX_PLUGINS} aliases, got {}", table.alias_count)));
    }
    // SAFETY: as the caller promises.
    let aliases = unsafe { convert::slice(table.aliases, table.alias_count) };
    let aliases: Vec<String> =
        aliases.iter().map(|alias| read("alias", *alias)).collect::<Result<_, _>>().map_err(name)?;
    let (summary, source) =
        (read("summary", table.summary).map_err(name)?, read("source", table.source).map_err(name)?);
    let schema = schema(&read("schema", table.schema).map_err(name)?).map_err(|why| name(format!("schema: {why}")))?;
    let kind = convert::kind(table.kind).ok_or_else(|| name(format!("expected kind 0, 1 or 2, got {}", table.kind)))?;
    // SAFETY: as the caller promises.
    let functions: Functions = unsafe { functions(&table, kind) }
        .ok_or_else(|| name(format!("the table of its {kind} functions is null or too short")))?;
    if let Some(missing) = missing(&table, &functions) {
        return Err(name(format!("its function `{missing}` is null")));
    }
    let (origin, library) = (origin.to_owned(), Arc::clone(library));
    let loaded = Loaded { table, functions, id: id.clone(), origin: origin.clone(), guarded: host.guarded };
    let format_version = table.format_version;
    Ok(loaded.entry(Described { aliases, summary, source, schema, id, origin, library, format_version }))
}

fn check_id(id: &str) -> Result<(), String> {
    let word = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    if id.split('-').all(word) && id.starts_with(|first: char| first.is_ascii_lowercase()) {
        return Ok(());
    }
    Err(format!("expected a kebab-case id such as `delta-varint`, got `{}`", id.escape_debug()))
}

fn schema(text: &str) -> Result<Value, String> {
    let schema: Value = serde_json::from_str(text).map_err(|error| format!("expected JSON, got {error}"))?;
    if schema.is_object() { Ok(schema) } else { Err(format!("expected a JSON object, got {schema}")) }
}

#[cfg(test)]
mod tests {
    use gearbox_core::Kind;

    use super::*;

    #[test]
    fn ids_are_kebab_case() {
        for good in ["a", "delta-varint", "lz4", "adaptive-v22"] {
            check_id(good).unwrap();
        }
        for bad in ["", "-", "a-", "A", "a_b", "a--b", "4a", "ä", "a b"] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn kinds_have_codes() {
        for expected in [Kind::Codec, Kind::Transform, Kind::Eviction] {
            assert_eq!(convert::kind(convert::kind_code(expected)), Some(expected));
        }
        assert_eq!(convert::kind(3), None);
    }
}
