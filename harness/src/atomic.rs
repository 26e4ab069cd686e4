//! Files that appear under their name only when they are complete.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use gearbox_core::{Error, Result};
use serde::Serialize;
use tempfile::NamedTempFile;

/// Ending of temporary names; the leading dot and this keep readers of the folder from taking them for finished files.
const ENDING: &str = ".gearbox-tmp";

/// Removes what killed processes left in a folder; temporary files that a process still writes stay.
///
/// A process that ends normally leaves nothing. What cannot be listed or removed is left alone: it does no harm.
pub fn remove_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        if name.starts_with(b".") && name.ends_with(ENDING.as_bytes()) {
            // The lock of a writer ends with its process.
            let is_dead = File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
            if is_dead {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// A file that is written under a temporary name in its own folder and renamed when it is complete.
///
/// Dropping it without [`AtomicFile::commit`] removes what was written, so an interrupted command leaves no half-written output.
///
/// # Examples
/// ```
/// use std::io::Write;
///
/// use gearbox::atomic::AtomicFile;
///
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("rows.csv");
/// let mut file = AtomicFile::create(&path, false).unwrap();
/// file.write_all(b"run,bytes\n").unwrap();
/// assert!(!path.exists());
/// file.commit().unwrap();
/// assert_eq!(std::fs::read(&path).unwrap(), b"run,bytes\n");
/// assert!(AtomicFile::create(&path, false).is_err(), "it exists now");
/// ```
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    overwrite: bool,
    file: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    /// Starts a file; its folder must exist.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if `path` exists and `overwrite` is off, or if it is a folder.
    /// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if the folder takes no new file.
    pub fn create(path: impl AsRef<Path>, overwrite: bool) -> Result<Self> {
        let path = path.as_ref();
        let name = path
            .file_name()
            .ok_or_else(|| Error::invalid_input(format!("`{}`: expected a file name, got none", path.display())))?;
        match fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => {
                return Err(Error::invalid_input(format!("`{}`: expected a file, got a folder", path.display())));
            }
            Ok(_) if !overwrite => return Err(exists(path)),
            _ => {}
        }
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let prefix = [".".as_ref(), name, ".".as_ref()].join("".as_ref());
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(ENDING);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Temporary files are private by default, results are not; the umask still applies.
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(folder).map_err(|error| Error::io(path, &error))?;
        // Tells `remove_leftovers` that someone writes it. A file system without locks has to do without.
        let _ = file.as_file().try_lock();
        Ok(Self { path: path.to_path_buf(), overwrite, file: BufWriter::new(file) })
    }

    /// The name that the file will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name that the file has until then, for those who write it by name. Nothing may be written through [`Write`] beside that.
    pub fn temporary(&self) -> &Path {
        self.file.get_ref().path()
    }

    /// Writes a value as indented JSON and gives the file its name.
    ///
    /// # Errors
    /// As [`AtomicFile::commit`].
    pub fn commit_json(mut self, value: &impl Serialize) -> Result<()> {
        serde_json::to_writer_pretty(&mut self, value).map_err(|error| Error::io(&self.path, &error.into()))?;
        self.commit()
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if the name was taken meanwhile and `overwrite` is off.
    /// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if the rest cannot be written.
    pub fn commit(self) -> Result<()> {
        let Self { path, overwrite, file } = self;
        let file = file.into_inner().map_err(|error| Error::io(&path, error.error()))?;
        let renamed = if overwrite { file.persist(&path) } else { file.persist_noclobber(&path) };
        match renamed {
            Ok(_) => Ok(()),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Err(exists(&path)),
            Err(error) => Err(Error::io(&path, &error.error)),
        }
    }
}

fn exists(path: &Path) -> Error {
    Error::invalid_input(format!("`{}`: exists already; --overwrite replaces it", path.display()))
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use gearbox_core::ErrorKind;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn drop_leaves_nothing_and_commit_leaves_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let mut file = AtomicFile::create(&path, false).unwrap();
        file.write_all(b"half").unwrap();
        file.flush().unwrap();
        drop(file);
        assert!(names(folder.path()).is_empty());

        let mut file = AtomicFile::create(&path, false).unwrap();
        file.write_all(b"whole").unwrap();
        assert_eq!(file.path(), path);
        file.commit().unwrap();
        assert_eq!(names(folder.path()), ["a.json"]);
        assert_eq!(fs::read(&path).unwrap(), b"whole");
    }

    #[test]
    fn temporary_name_is_hidden_and_has_another_ending() {
        let folder = tempfile::tempdir().unwrap();
        let _file = AtomicFile::create(folder.path().join("meta_t0_1.json"), false).unwrap();
        let names = names(folder.path());
        let random = names[0].strip_prefix(".meta_t0_1.json.").and_then(|rest| rest.strip_suffix(ENDING));
        assert!(random.is_some(), "{names:?}");
    }

    #[test]
    fn leftovers_of_dead_writers_are_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let alive = AtomicFile::create(folder.path().join("a"), false).unwrap();
        for name in [".b.x1y2z3.gearbox-tmp", ".other.tmp", "c"] {
            fs::write(folder.path().join(name), b"").unwrap();
        }
        remove_leftovers(folder.path());
        let names = names(folder.path());
        assert_eq!(names.len(), 3, "{names:?}");
        assert_eq!(names[1..], [".other.tmp", "c"]);
        alive.commit().unwrap();
        remove_leftovers(&folder.path().join("missing"));
    }

    #[test]
    fn existing_file_is_named_and_kept_unless_overwrite() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, b"old").unwrap();
        let error = AtomicFile::create(&path, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert_eq!(error.to_string(), format!("`{}`: exists already; --overwrite replaces it", path.display()));

        let mut file = AtomicFile::create(&path, true).unwrap();
        file.write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        file.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn name_taken_between_create_and_commit_is_not_clobbered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let file = AtomicFile::create(&path, false).unwrap();
        fs::write(&path, b"other").unwrap();
        assert_eq!(file.commit().unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(fs::read(&path).unwrap(), b"other");
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[test]
    fn missing_folder_and_folder_as_target_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("no/a");
        let error = AtomicFile::create(&missing, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("no/a"), "{error}");
        assert_eq!(AtomicFile::create(folder.path(), true).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[cfg(unix)]
    #[test]
    fn finished_file_has_the_permissions_of_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (atomic, plain) = (folder.path().join("atomic"), folder.path().join("plain"));
        AtomicFile::create(&atomic, false).unwrap().commit().unwrap();
        fs::write(&plain, b"").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&atomic), mode(&plain));
    }
}
