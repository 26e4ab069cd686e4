//! The folder of a report, which appears whole or not at all.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use gearbox_core::{Error, Result};

use super::results::Results;
use super::{markdown, page, plots};
use crate::sweep;

/// Writes a report, and returns the names of its files.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if the folder exists, unless it is empty, or `overwrite` is on and it holds
/// nothing but a report. [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if it cannot be written.
pub fn write(results: &Results, folder: &Path, overwrite: bool) -> Result<Vec<String>> {
    let name = folder.file_name().ok_or_else(|| {
        Error::invalid_input(format!("`{}`: expected the name of a folder, got none", folder.display()))
    })?;
    check(folder, overwrite)?;
    let parent = match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(|error| Error::io(parent, &error))?;
    let new = temporary(parent, name)?;
    let mut names = Vec::new();
    for (name, text) in files(results)? {
        let path = new.path().join(&name);
        fs::write(&path, text).map_err(|error| Error::io(&path, &error))?;
        names.push(name);
    }
    let old = temporary(parent, name)?;
    // What is there makes way first: a folder cannot be renamed over one that holds something. It may have changed since, so look again.
    check(folder, overwrite)?;
    let aside = old.path().join(name);
    let replaced = match fs::rename(folder, &aside) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        Err(error) => return Err(Error::io(folder, &error)),
    };
    if let Err(error) = fs::rename(new.path(), folder) {
        if replaced {
            let _ = fs::rename(&aside, folder);
        }
        return Err(Error::io(folder, &error));
    }
    // It has another name now.
    let _ = new.keep();
    names.sort();
    Ok(names)
}

fn temporary(parent: &Path, name: &std::ffi::OsStr) -> Result<tempfile::TempDir> {
    let prefix = [".".as_ref(), name, ".".as_ref()].join("".as_ref());
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".gearbox-tmp");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary folders are private by default, results are not; the umask still applies.
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(parent).map_err(|error| Error::io(parent, &error))
}

/// Refuses to replace anything but a report.
fn check(folder: &Path, overwrite: bool) -> Result<()> {
    let refuse = |what: &str| Err(Error::invalid_input(format!("`{}`: {what}", folder.display())));
    let listed = match fs::read_dir(folder) {
        Ok(listed) => listed,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => return refuse("expected a folder, got a file"),
        Err(error) => return Err(Error::io(folder, &error)),
    };
    let mut names: Vec<PathBuf> = listed.filter_map(|entry| Some(entry.ok()?.path())).collect();
    names.sort();
    if names.is_empty() {
        return Ok(());
    }
    if !overwrite {
        return refuse("exists already; --overwrite replaces it");
    }
    match names.iter().find(|path| !is_ours(path)) {
        Some(other) => refuse(&format!("expected nothing but a report, got `{}`; it stays as it is", other.display())),
        None => Ok(()),
    }
}

/// Whether a report writes files of this name.
fn is_ours(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let numbered = |kind: &str| {
        let number = name.strip_prefix(kind).and_then(|rest| rest.strip_suffix(".svg"));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    path.is_file()
        && (["index.html", "report.md", "rows.csv"].contains(&name)
            || ["front-", "ledger-", "heads-"].into_iter().any(numbered))
}

/// All files of a report with their names.
fn files(results: &Results) -> Result<Vec<(String, Vec<u8>)>> {
    let plots = plots::all(results);
    let names: Vec<_> = plots.iter().map(|(name, _)| name.clone()).collect();
    let mut files = vec![
        ("index.html".to_owned(), page::text(results)?.into_bytes()),
        ("report.md".to_owned(), markdown::text(results, &names).into_bytes()),
    ];
    let mut csv = Vec::new();
    sweep::write_csv(results.lines().map(|line| (line.row, line.front)), &mut csv)
        .map_err(|error| Error::io("rows.csv", &error.into()))?;
    files.push(("rows.csv".to_owned(), csv));
    files.extend(plots.into_iter().map(|(name, text)| (name, text.into_bytes())));
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_report_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("report");
        check(&out, false).unwrap();
        fs::create_dir(&out).unwrap();
        check(&out, false).unwrap();
        for name in ["index.html", "front-1.svg", "ledger-12.svg"] {
            fs::write(out.join(name), b"").unwrap();
        }
        let error = check(&out, false).unwrap_err().to_string();
        assert!(error.ends_with("exists already; --overwrite replaces it"), "{error}");
        check(&out, true).unwrap();
        fs::write(out.join("front-x.svg"), b"").unwrap();
        let error = check(&out, true).unwrap_err().to_string();
        assert!(error.contains("expected nothing but a report") && error.contains("front-x.svg"), "{error}");
        let error = check(&out.join("index.html"), true).unwrap_err().to_string();
        assert!(error.ends_with("expected a folder, got a file"), "{error}");
    }
}
