//! The bundled sample dump, used when a command is given none.

use std::path::{Path, PathBuf};

use gearbox_core::{Error, Result};

/// Where the sample lies below the workspace, or below any folder above the executable.
const SAMPLE: &str = "tests/data/sample";

/// Finds the bundled sample dump: beside or above the executable, else in the workspace that built it.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput), naming where it was looked for.
pub fn find() -> Result<PathBuf> {
    let executable = std::env::current_exe().unwrap_or_default();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let mut folders = executable.ancestors().skip(1).chain(workspace);
    let found = folders.find_map(|folder| Some(folder.join(SAMPLE)).filter(|path| path.is_dir()));
    // A short name reads better in tables.
    let here = std::env::current_dir().unwrap_or_default();
    let short = |path: PathBuf| path.strip_prefix(&here).map(Path::to_owned).unwrap_or(path);
    found.map(short).ok_or_else(|| {
        Error::invalid_input(format!(
            "the bundled sample dump `{SAMPLE}` is neither above the executable `{}` nor in the workspace; name a dump with --dump",
            executable.display()
        ))
    })
}
