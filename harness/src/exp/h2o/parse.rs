//! `exp h2o-parse`: the tables in benchmark logs as one CSV file.
//!
//! The reference took every row that fits, so a log that a second run was appended to gave its header as a row, and a log that was cut off
//! gave fewer rows. Here such a log is left out as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use gearbox_core::{Error, Result, ResultExt};
use serde_json::json;

use super::Kit;
use crate::exp::files::Outputs;
use crate::exp::text::write_csv;
use crate::report;
use crate::status::Status;

/// Collects the tables of benchmark logs in one CSV file.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "A log without a table, with a table that begins again because a second run appended to it, or with a row that is cut off is
bad and left out. Exit status: 0, or 2 if logs were bad."
)]
pub struct ParseArgs {
    /// Folder whose `*.log` files are read, in the order of their names
    #[arg(long, value_name = "DIR", required_unless_present = "log_files")]
    log_dir: Option<PathBuf>,
    /// More logs, separated by commas
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    log_files: Vec<PathBuf>,
    /// File for the rows; its folder is created if needed
    #[arg(long, value_name = "FILE")]
    out_csv: PathBuf,
    /// Revision whose columns come first; the others follow by name
    #[arg(long, value_enum, default_value_t = Kit::V3)]
    kit: Kit,
    /// Replace existing results
    #[arg(long)]
    overwrite: bool,
    /// Exit with 0 although logs were bad and left out
    #[arg(long)]
    allow_bad: bool,
}

/// The column with the path of the log.
pub(crate) const LOG: &str = "log_file";

impl Kit {
    /// Columns of this revision, in the order of its CSV file.
    pub(crate) fn columns(self) -> Vec<&'static str> {
        let mut columns = vec![
            "model",
            "modelSize",
            "backend",
            "threads",
            "llm_demo",
            "speed(tok/s)",
            "h2o_keep",
            "h2o_lossy",
            "h2o_lossless",
            "h2o_target_keep_effective",
            "h2o_floor_keep",
            "h2o_quantized_keep",
            "h2o_evict_us",
            "h2o_codec_us",
        ];
        if self >= Self::V3 {
            columns.extend([
                "h2o_lossless_raw_mb",
                "h2o_lossless_comp_mb",
                "h2o_lossless_comp_us",
                "h2o_lossless_decomp_us",
            ]);
            columns.extend((self >= Self::V4).then_some("h2o_lossless_queue_peak"));
            columns.push("h2o_lossless_fallback");
        }
        if self >= Self::V6 {
            columns.extend([
                "h2o_lossless_backpressure_skip",
                "h2o_lossless_async_queue_peak",
                "h2o_lossless_async_wait_us",
                "h2o_lossless_decode_cache_hit",
                "h2o_lossless_decode_cache_miss",
            ]);
        }
        columns.push(LOG);
        columns
    }
}

/// Cells by column.
type Row = BTreeMap<String, String>;

impl ParseArgs {
    /// Runs the experiment and prints which file it wrote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if there is no log, none of them is good, or the file exists; else
    /// what reading and writing report.
    pub fn run(&self, json: bool) -> Result<Status> {
        let (mut rows, mut bad) = (Vec::new(), Vec::new());
        for path in self.logs()? {
            let bytes = fs::read(&path).map_err(|error| Error::io(&path, &error))?;
            let name = path.display().to_string();
            match table(&String::from_utf8_lossy(&bytes)).context(|| format!("`{name}`")) {
                Ok(table) => rows.extend(table.into_iter().map(|mut row| {
                    row.insert(LOG.to_owned(), name.clone());
                    row
                })),
                Err(error) => {
                    tracing::warn!("left out: {error}");
                    bad.push(error.to_string());
                }
            }
        }
        if rows.is_empty() {
            return Err(Error::invalid_input(format!("expected at least one good log, got {} bad ones", bad.len())));
        }

        let found: BTreeSet<&str> = rows.iter().flat_map(Row::keys).map(String::as_str).collect();
        let known = self.kit.columns();
        let others = found.iter().copied().filter(|name| !known.contains(name));
        let header: Vec<String> =
            known.iter().copied().filter(|name| found.contains(name)).chain(others).map(ToOwned::to_owned).collect();
        let mut outputs = Outputs::file(&self.out_csv, self.overwrite)?;
        outputs.write(0, |path, out| {
            write_csv(out, path, &header, &rows, |row, cells| {
                cells.extend(header.iter().map(|name| row.get(name).map_or("", String::as_str)));
            })?;
            Ok(())
        })?;
        let paths = outputs.commit()?;
        if json {
            report::print_json(&json!({ "files": paths, "rows": rows.len(), "columns": header, "bad": bad }))?;
        } else {
            paths.iter().try_for_each(|path| report::print(&format!("Wrote {path}")))?;
        }
        Ok(if bad.is_empty() || self.allow_bad { Status::Pass } else { Status::BadInput })
    }

    /// The logs of the folder in the order of their names, then those of the list, each file once.
    fn logs(&self) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        if let Some(folder) = &self.log_dir {
            let failed = |error: &std::io::Error| Error::io(folder, error);
            for item in fs::read_dir(folder).map_err(|error| failed(&error))? {
                let path = item.map_err(|error| failed(&error))?.path();
                if path.extension().is_some_and(|ending| ending == "log") {
                    paths.push(path);
                }
            }
            paths.sort();
        }
        paths.extend(self.log_files.iter().cloned());
        let mut seen = BTreeSet::new();
        let mut logs = Vec::new();
        for path in paths {
            let real = path.canonicalize().map_err(|error| Error::io(&path, &error))?;
            if seen.insert(real) {
                logs.push(path);
            }
        }
        if logs.is_empty() {
            let place = self.log_dir.as_deref().unwrap_or(Path::new("--log-files"));
            return Err(Error::invalid_input(format!("`{}`: expected logs, got none", place.display())));
        }
        Ok(logs)
    }
}

/// The rows of the one table of a log.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if there is none, if it begins again, or if a row has too many or too
/// few cells.
pub(super) fn table(text: &str) -> Result<Vec<Row>> {
    let lines = text.lines().enumerate().map(|(idx, line)| (idx + 1, line.trim()));
    let lines = lines.filter(|(_, line)| line.starts_with('|')).map(|(number, line)| (number, cells(line)));
    let is_rule = |cells: &[&str]| cells.iter().all(|cell| cell.bytes().all(|byte| matches!(byte, b'-' | b':')));
    let mut lines = lines.filter(|(_, cells)| !is_rule(cells));
    let header = lines.next().map(|(_, header)| header).unwrap_or_default();
    let mut rows = Vec::new();
    for (number, cells) in lines {
        let bad = |message: String| Err(Error::invalid_input(message).context(format!("line {number}")));
        if cells == header {
            return bad("the table begins again: a second run appended to this log".to_owned());
        }
        if cells.len() != header.len() {
            return bad(format!("expected {} cells, got {}", header.len(), cells.len()));
        }
        rows.push(header.iter().zip(cells).map(|(name, cell)| ((*name).to_owned(), cell.to_owned())).collect());
    }
    if rows.is_empty() { Err(Error::invalid_input("expected a table with rows, got none")) } else { Ok(rows) }
}

fn cells(line: &str) -> Vec<&str> {
    let line = line.strip_prefix('|').unwrap_or(line);
    line.strip_suffix('|').unwrap_or(line).split('|').map(str::trim).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exp::samples::parse;

    const HEAD: &str = "| model | h2o_lossy | zeta |\n| --- | ---: | :--- |\n";

    fn run(flags: &[&str]) -> Result<Status> {
        parse::<ParseArgs>(flags).unwrap().run(false)
    }

    #[test]
    fn table_is_found_between_other_lines() {
        let log = format!("warm-up\n{HEAD}| a | 3.0 ± 0.1 | |\nbye\n  | b | 2.0 ± 0.0 | x |\n");
        let rows = table(&log).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(
            (rows[0]["model"].as_str(), rows[0]["h2o_lossy"].as_str(), rows[0]["zeta"].as_str()),
            ("a", "3.0 ± 0.1", "")
        );
        assert_eq!(rows[1]["zeta"], "x");
    }

    #[test]
    fn bad_logs_are_named() {
        for (log, message) in [
            (String::new(), "expected a table with rows, got none"),
            ("Segmentation fault\n".to_owned(), "expected a table with rows, got none"),
            (HEAD.to_owned(), "expected a table with rows, got none"),
            (format!("{HEAD}| a | 3.0"), "line 3: expected 3 cells, got 2"),
            (
                format!("{HEAD}| a | 3.0 | 1 |\n{HEAD}| a | 3.1 | 1 |\n"),
                "line 4: the table begins again: a second run appended to this log",
            ),
        ] {
            assert_eq!(table(&log).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn bad_log_is_left_out_and_makes_the_status_2() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (dir, csv) = (path(""), path("out/rows.csv"));
        fs::write(path("b.log"), format!("{HEAD}| b | 3.0 | 1 |\n")).unwrap();
        let flags = ["--log-dir", dir.as_str(), "--out-csv", &csv];
        assert_eq!(run(&flags).unwrap(), Status::Pass);
        let expected = format!("model,h2o_lossy,log_file,zeta\r\nb,3.0,{},1\r\n", path("b.log"));
        assert_eq!(fs::read_to_string(&csv).unwrap(), expected);

        fs::write(path("a.log"), "garbage").unwrap();
        fs::write(path("c.txt"), "not a log").unwrap();
        assert!(run(&flags).unwrap_err().to_string().contains("exists already"));
        assert_eq!(run(&[&flags[..], &["--overwrite"]].concat()).unwrap(), Status::BadInput);
        assert_eq!(fs::read_to_string(&csv).unwrap(), expected);
        assert_eq!(run(&[&flags[..], &["--overwrite", "--allow-bad"]].concat()).unwrap(), Status::Pass);
        fs::remove_file(path("b.log")).unwrap();
        let error = run(&[&flags[..], &["--overwrite"]].concat()).unwrap_err();
        assert_eq!(error.to_string(), "expected at least one good log, got 1 bad ones");
        assert_eq!(fs::read_to_string(&csv).unwrap(), expected, "the old rows are still there");
    }

    #[test]
    fn listed_logs_follow_and_count_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        for name in ["a.log", "b.log"] {
            fs::write(path(name), format!("{HEAD}| {name} | 3.0 | 1 |\n")).unwrap();
        }
        let (list, csv) = (format!("{},{}", path("b.log"), path("./a.log")), path("rows.csv"));
        let args: ParseArgs = parse(&["--log-files", &list, "--log-dir", &path(""), "--out-csv", &csv]).unwrap();
        assert_eq!(args.logs().unwrap(), [path("a.log"), path("b.log")].map(PathBuf::from));
        let missing = format!("{},{}", path("a.log"), path("z.log"));
        assert!(run(&["--log-files", &missing, "--out-csv", &csv]).unwrap_err().to_string().contains("z.log"));
        fs::create_dir(path("empty")).unwrap();
        let error = run(&["--log-dir", &path("empty"), "--out-csv", &csv]).unwrap_err().to_string();
        assert!(error.ends_with("empty`: expected logs, got none"), "{error}");
        assert!(parse::<ParseArgs>(&["--out-csv", &csv]).is_err(), "neither a folder nor a list");
    }
}
