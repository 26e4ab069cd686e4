//! The files of one experiment in one folder: all of them, or none.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use gearbox_core::{Error, Result};

use crate::atomic::AtomicFile;

/// Files that get their names together once everything is written.
#[derive(Debug, Default)]
pub(crate) struct Outputs {
    files: Vec<AtomicFile>,
    /// Files of an earlier run that this one does not write.
    stale: Vec<PathBuf>,
}

impl Outputs {
    /// Starts the files `names` in a folder, which is created if needed, before any work: existing ones are known at once.
    ///
    /// Those of `absent` belong to the same experiment but are not written this time: an old one would pass for a result of this run.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if a file of either list exists and `overwrite` is off; else what
    /// the file system reports.
    pub fn create(folder: &Path, names: &[&str], absent: &[&str], overwrite: bool) -> Result<Self> {
        let mut outputs = Self::default();
        outputs.add(folder, names, absent, overwrite)?;
        Ok(outputs)
    }

    /// Starts one file; its folder is created if needed.
    ///
    /// # Errors
    /// As [`Outputs::create`].
    pub fn file(path: &Path, overwrite: bool) -> Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|error| Error::io(folder, &error))?;
        }
        Ok(Self { files: vec![AtomicFile::create(path, overwrite)?], stale: Vec::new() })
    }

    /// Adds files that were started elsewhere.
    pub fn join(&mut self, more: Self) {
        self.files.extend(more.files);
        self.stale.extend(more.stale);
    }

    /// Starts more files, in another folder.
    ///
    /// # Errors
    /// As [`Outputs::create`].
    pub fn add(&mut self, folder: &Path, names: &[&str], absent: &[&str], overwrite: bool) -> Result<()> {
        fs::create_dir_all(folder).map_err(|error| Error::io(folder, &error))?;
        for name in absent {
            self.expect_absent(folder.join(name), overwrite)?;
        }
        for name in names {
            self.files.push(AtomicFile::create(folder.join(name), overwrite)?);
        }
        Ok(())
    }

    /// Removes a file of an earlier run at the end.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if it exists and `overwrite` is off.
    pub fn expect_absent(&mut self, path: PathBuf, overwrite: bool) -> Result<()> {
        if fs::symlink_metadata(&path).is_ok() {
            if !overwrite {
                return Err(Error::invalid_input(format!(
                    "`{}`: left by an earlier run, which wrote more than this one will; --overwrite removes it",
                    path.display()
                )));
            }
            self.stale.push(path);
        }
        Ok(())
    }

    /// Fills the next file that was started.
    ///
    /// # Errors
    /// What `content` reports, or [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
    pub fn write(&mut self, idx: usize, content: impl FnOnce(&Path, &mut dyn Write) -> Result<()>) -> Result<()> {
        let file =
            self.files.get_mut(idx).ok_or_else(|| Error::invalid_input(format!("file {idx} was not started")))?;
        let path = file.path().to_path_buf();
        content(&path, file)
    }

    /// Fills a file with text.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io).
    pub fn write_text(&mut self, idx: usize, text: &str) -> Result<()> {
        self.write(idx, |path, out| out.write_all(text.as_bytes()).map_err(|error| Error::io(path, &error)))
    }

    /// Gives all files their names, removes what is stale, and returns the paths that were written.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn commit(self) -> Result<Vec<String>> {
        let paths = self.files.iter().map(|file| file.path().display().to_string()).collect();
        for path in &self.stale {
            fs::remove_file(path).map_err(|error| Error::io(path, &error))?;
        }
        for file in self.files {
            file.commit()?;
        }
        Ok(paths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_files_are_refused_or_removed() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("old.csv"), "x").unwrap();
        let error = Outputs::create(folder.path(), &["new.csv"], &["old.csv"], false).unwrap_err().to_string();
        assert!(error.contains("old.csv`: left by an earlier run") && error.contains("--overwrite"), "{error}");
        let mut outputs = Outputs::create(folder.path(), &["new.csv"], &["old.csv", "never.csv"], true).unwrap();
        outputs.write_text(0, "y").unwrap();
        assert!(folder.path().join("old.csv").exists(), "nothing is removed before the end");
        assert_eq!(outputs.commit().unwrap().len(), 1);
        assert!(!folder.path().join("old.csv").exists());
        assert_eq!(fs::read_to_string(folder.path().join("new.csv")).unwrap(), "y");
    }
}
