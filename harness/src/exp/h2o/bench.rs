//! `exp h2o-bench` and `exp h2o-sweep`: one run of a benchmark engine for every combination of a grid.
//!
//! The reference let the engine append to the logs of earlier runs and counted what crashed as a warning. Here a log gets its name only
//! once its run has ended well with a table in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use clap::Args;
use gearbox_core::{Error, Result};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::preset::{Preset, Run};
use super::{Kit, parse};
use crate::exp::engine::{Engine, TimeoutArgs};
use crate::exp::files::Outputs;
use crate::exp::text::{ascii_json, push};
use crate::report;
use crate::status::Status;

/// The subcommand of this program that is the engine if none is given.
const OWN_ENGINE: &str = "llm-bench";

/// Runs a benchmark for every combination of the lists.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Writes configs/<RUN>.json, logs/<RUN>.log, manifest.json and bench_stdout.log. A run that crashes, hangs or prints no table
leaves no log and the others go on. Exit status: 0, or 2 if a run failed. What `h2o-parse` reads next is the folder of logs."
)]
pub struct BenchArgs {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    preset: Preset,
    /// Run without eviction (kit v6 on)
    #[arg(long)]
    disable_h2o: bool,
    /// Run without lossless compression (kit v6 on)
    #[arg(long)]
    disable_lossless: bool,
}

/// Runs a benchmark for every combination of a preset.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Presets are in configs/h2o, their schema is configs/schema/h2o-preset.json. Files and exit status are those of `h2o-bench`."
)]
pub struct SweepArgs {
    /// Lists and settings, as JSON
    #[arg(long, value_name = "FILE")]
    preset: PathBuf,
    /// Revision, instead of that of the preset
    #[arg(long, value_enum)]
    kit: Option<Kit>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// The engine, and where its results go.
#[derive(Clone, Debug, Args)]
struct EngineArgs {
    /// Benchmark program with the reference's arguments [default: `gearbox llm-bench`]
    #[arg(long, value_name = "PROGRAM")]
    llm_bench: Option<PathBuf>,
    /// Config of the model, to which the swept keys are added
    #[arg(long, value_name = "FILE")]
    base_config: PathBuf,
    /// Folder for the results; created if needed [default: `exp/h2o_<KIT>/out`]
    #[arg(long, value_name = "DIR")]
    out_dir: Option<PathBuf>,
    /// What the engine computes on
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    backend: String,
    // The name of the global flag for the threads of this program, which does nothing here but wait.
    /// Threads of the engine
    #[arg(long, value_name = "N", default_value_t = 4)]
    threads: usize,
    /// Kind of attention of the engine
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    attention_option: u32,
    #[command(flatten)]
    timeout: TimeoutArgs,
    /// Write configs and the manifest, and run nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace existing results
    #[arg(long)]
    overwrite: bool,
}

/// One run in the manifest: the reference's fields in its order, and why it failed.
struct Entry<'a> {
    run: &'a Run,
    config: String,
    log: String,
    return_code: i32,
    error: Option<String>,
}

impl Serialize for Entry<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("run_id", &self.run.id)?;
        map.serialize_entry("prompt_len", &self.run.prompt)?;
        map.serialize_entry("gen_len", &self.run.generated)?;
        for (name, value) in self.run.settings() {
            map.serialize_entry(name, value)?;
        }
        map.serialize_entry("config", &self.config)?;
        map.serialize_entry("log", &self.log)?;
        map.serialize_entry("return_code", &self.return_code)?;
        if let Some(error) = &self.error {
            map.serialize_entry("error", error)?;
        }
        map.end()
    }
}

impl BenchArgs {
    /// Runs the experiment and prints which files it wrote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) for values out of range;
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for existing results or a base config that is no JSON object; else
    /// what starting the engine, reading and writing report. Runs that fail are in the manifest.
    pub fn run(&self, json: bool) -> Result<Status> {
        let disabled = [self.disable_h2o, self.disable_lossless];
        if disabled.contains(&true) && self.preset.kit < Kit::V6 {
            let kit = self.preset.kit.name();
            return Err(Error::invalid_config(format!("--disable-…: expected --kit v6 or later, got {kit}")));
        }
        self.engine.run(&self.preset, disabled, json)
    }
}

impl SweepArgs {
    /// Runs the experiment and prints which files it wrote.
    ///
    /// # Errors
    /// As [`BenchArgs::run`] and [`Preset::read`].
    pub fn run(&self, json: bool) -> Result<Status> {
        let mut preset = Preset::read(&self.preset)?;
        preset.kit = self.kit.unwrap_or(preset.kit);
        self.engine.run(&preset, [false; 2], json)
    }
}

impl EngineArgs {
    fn run(&self, preset: &Preset, disabled: [bool; 2], json: bool) -> Result<Status> {
        preset.check()?;
        let base = base_config(&self.base_config)?;
        let engine = Engine::new(self.llm_bench.as_deref(), OWN_ENGINE, self.timeout)?;
        let default = || PathBuf::from(format!("exp/h2o_{}/out", preset.kit.name()));
        let folder = Folder::create(self.out_dir.clone().unwrap_or_else(default), self.overwrite)?;
        let mut outputs = Outputs::create(&folder.root, &["manifest.json"], &[], self.overwrite)?;
        let mut printed = String::new();

        let runs = preset.runs(disabled);
        let distinct = preset.distinct(&runs);
        if distinct < runs.len() {
            let mode = "each target mode ignores the other's target";
            tracing::warn!("{} runs of {distinct} distinct settings: {mode}", runs.len());
        }
        let mut entries = Vec::with_capacity(runs.len());
        for (idx, run) in runs.iter().enumerate() {
            let [config, log] = [folder.config(run), folder.log(run)];
            let mut content = base.clone();
            run.configure(&mut content);
            let mut file = Outputs::file(&config, self.overwrite)?;
            file.write_text(0, &ascii_json(&content)?)?;
            file.commit()?;
            let [config, log] = [&config, &log].map(|path| path.display().to_string());
            let mut entry = Entry { run, config, log, return_code: 0, error: None };
            if !self.dry_run {
                tracing::info!("{} of {}: {}", idx + 1, runs.len(), run.id);
                self.measure(&engine, preset, &folder, &mut entry, &mut printed)?;
                if let Some(error) = &entry.error {
                    tracing::warn!("{}: {error}", run.id);
                }
            }
            entries.push(entry);
        }

        outputs.write_text(0, &ascii_json(&entries)?)?;
        let mut paths = outputs.commit()?;
        if !self.dry_run {
            let mut file = Outputs::file(&folder.root.join(Folder::PRINTED), self.overwrite)?;
            file.write_text(0, &printed)?;
            paths.extend(file.commit()?);
        }
        let failed = entries.iter().filter(|entry| entry.error.is_some()).count();
        if json {
            let count = runs.len();
            report::print_json(
                &json!({ "files": paths, "runs": count, "distinct": distinct, "failed": failed, "manifest": entries }),
            )?;
        } else {
            paths.iter().try_for_each(|path| report::print(&format!("Wrote {path}")))?;
            report::print(&format!("Runs: {}, distinct: {distinct}, failed: {failed}", runs.len()))?;
        }
        Ok(if failed == 0 { Status::Pass } else { Status::BadInput })
    }

    /// Runs the engine once; its log gets its name if all went well.
    fn measure(
        &self,
        engine: &Engine,
        preset: &Preset,
        folder: &Folder,
        entry: &mut Entry<'_>,
        printed: &mut String,
    ) -> Result<()> {
        let run = entry.run;
        let name = folder.log(run);
        let work = folder.work()?;
        let log = work.path().join("log");
        let mut command = engine.command();
        command.args(["-m", &entry.config, "-a", &self.backend, "-t", &self.threads.to_string()]);
        command.args(["-qatten", &self.attention_option.to_string(), "-kv", "true"]);
        command.args(["-p", &run.prompt.to_string(), "-n", &run.generated.to_string()]);
        command.args(["-rep", &preset.repeat.to_string(), "-fp"]).arg(&log);
        let ended = engine.run(command)?;
        push(printed, format_args!("== {}\n{}\n{}\n", run.id, ended.stdout.trim_end(), ended.stderr.trim_end()));
        entry.return_code = ended.code;
        entry.error = ended.error().or_else(|| match fs::read(&log) {
            Ok(bytes) => parse::table(&String::from_utf8_lossy(&bytes)).err().map(|error| format!("its log: {error}")),
            Err(error) => Some(format!("the engine wrote no log: {error}")),
        });
        if entry.error.is_none() {
            fs::rename(&log, &name).map_err(|error| Error::io(&name, &error))?;
        }
        Ok(())
    }
}

/// Where the results of all runs lie.
struct Folder {
    root: PathBuf,
}

impl Folder {
    /// What the engine printed in all runs.
    const PRINTED: &str = "bench_stdout.log";

    /// Creates the folder; configs and logs of an earlier sweep are refused or removed, because they would pass for results of this one.
    fn create(root: PathBuf, overwrite: bool) -> Result<Self> {
        let mut old = vec![root.join(Self::PRINTED)];
        for part in ["configs", "logs"] {
            let folder = root.join(part);
            fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, &error))?;
            for item in fs::read_dir(&folder).map_err(|error| Error::io(&folder, &error))? {
                let item = item.map_err(|error| Error::io(&folder, &error))?;
                if item.file_name().as_encoded_bytes().starts_with(b"run_") {
                    old.push(item.path());
                }
            }
        }
        for path in old.iter().filter(|path| path.exists()) {
            if !overwrite {
                let path = path.display();
                return Err(Error::invalid_input(format!("`{path}`: exists already; --overwrite removes it")));
            }
            fs::remove_file(path).map_err(|error| Error::io(path, &error))?;
        }
        Ok(Self { root })
    }

    fn config(&self, run: &Run) -> PathBuf {
        self.root.join("configs").join(format!("{}.json", run.id))
    }

    fn log(&self, run: &Run) -> PathBuf {
        self.root.join("logs").join(format!("{}.log", run.id))
    }

    /// A folder beside the logs that is gone when it is dropped.
    fn work(&self) -> Result<tempfile::TempDir> {
        let folder = self.root.join("logs");
        tempfile::Builder::new().prefix(".run").tempdir_in(&folder).map_err(|error| Error::io(&folder, &error))
    }
}

/// The files of a model, by key of the config, with the names that they have if the config does not say.
pub(crate) const FILES: [(&str, &str); 6] = [
    ("llm_config", "llm_config.json"),
    ("llm_model", "llm.mnn"),
    ("llm_weight", "llm.mnn.weight"),
    ("embedding_file", "embeddings_bf16.bin"),
    ("tokenizer_file", "tokenizer.txt"),
    ("context_file", "context.json"),
];

/// The base config as it reads from another folder: the engine joins its folder and its files as texts.
fn base_config(path: &Path) -> Result<Map<String, Value>> {
    let bytes = fs::read(path).map_err(|error| Error::io(path, &error))?;
    let bad = |message: String| Error::invalid_input(message).context(format!("`{}`", path.display()));
    let mut config: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|error| bad(format!("expected a JSON object: {error}")))?;
    let here = path.canonicalize().map_err(|error| Error::io(path, &error))?;
    let here = here.parent().unwrap_or(&here);
    let base = resolve(&here.join(config.get("base_dir").and_then(Value::as_str).unwrap_or_default()));
    let mut fields = BTreeMap::new();
    for (key, default) in FILES {
        match config.get(key).unwrap_or(&default.into()) {
            Value::String(file) if !file.is_empty() => {
                let file = relative(&resolve(&base.join(file)), &base);
                fields.insert(key, Value::from(file));
            }
            _ => {}
        }
    }
    config.extend(fields.into_iter().map(|(key, file)| (key.to_owned(), file)));
    let folder = base.display().to_string();
    config.insert("base_dir".to_owned(), format!("{}/", folder.trim_end_matches('/')).into());
    Ok(config)
}

/// An absolute path without links and dots, as far as it exists.
fn resolve(path: &Path) -> PathBuf {
    for (parent, rest) in path.ancestors().filter_map(|parent| Some((parent, path.strip_prefix(parent).ok()?))) {
        if let Ok(mut real) = parent.canonicalize() {
            for part in rest.components() {
                match part {
                    Component::ParentDir => drop(real.pop()),
                    part => real.push(part),
                }
            }
            return real;
        }
    }
    path.to_path_buf()
}

/// The way from a folder to a file, with `/`.
fn relative(file: &Path, folder: &Path) -> String {
    let common = file.components().zip(folder.components()).take_while(|(a, b)| a == b).count();
    let up = folder.components().skip(common).map(|_| "..".to_owned());
    let down = file.components().skip(common).map(|part| part.as_os_str().to_string_lossy().into_owned());
    up.chain(down).collect::<Vec<_>>().join("/")
}
