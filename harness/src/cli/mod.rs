//! The command line. Each command has its own module with its flags, their help and its `run`.

mod bench;
mod container;
mod doctor;
mod dump;
mod evict;
mod gate;
mod llm;
mod model;
mod plugin;
mod report;
mod results;
mod sweep;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use gearbox_core::{Error, ErrorKind, Result};
use tracing::Level;

use crate::dump::Dump;
use crate::loading::LoadArgs;
use crate::prompts::PromptsArgs;
use crate::report::print;
use crate::select::SelectArgs;
use crate::status::Status;
use crate::{exp, sample};

/// Compresses KV caches of language models with any codec, counts every stored byte, decodes it again and measures what changed.
///
/// Data goes to standard output, logs and progress to standard error. Exit status: 0 all well, 1 a check failed, 2 bad input or usage.
#[derive(Debug, Parser)]
#[command(name = "gearbox", version, max_term_width = 110)]
#[command(after_help = "Examples:
  gearbox sweep                               every codec over the bundled sample
  gearbox sweep --dump DIR --json             the same over your dump, as JSON
  gearbox encode --dump DIR --pipeline gear-delta --out kv.gbx
  gearbox verify kv.gbx --dump DIR            decode from the file alone and compare
  gearbox plugin list                         what can be combined")]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(flatten)]
    load: LoadArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What the program says when it is given nothing to do.
const OVERVIEW: &str = "\
gearbox: codecs, lossy transforms and eviction policies for KV caches, measured in stored bytes and in what attention sees.

Look around
  gearbox sweep                             every codec over the bundled sample, seconds
  gearbox plugin list                       what can be combined
  gearbox doctor                            what this machine has
With dumps of your own
  gearbox dump check --dump DIR             is every entry sound?
  gearbox sweep --dump DIR --results all.db table, front and gate; rows are kept, a killed sweep goes on
  gearbox report all.db --out report        tables, plots and one page to open, search and cite
  gearbox encode --dump DIR --pipeline planes --out kv.gbx
  gearbox verify kv.gbx --dump DIR          decode from the file alone and compare
With a model
  gearbox model capture --text FILE --out dumps
  gearbox model perplexity --text FILE --pipeline planes
With a method of your own
  gearbox plugin new my-codec --kind codec
  gearbox plugin check LIB

gearbox --help lists all commands, gearbox COMMAND --help explains one.";

/// Flags of every command.
#[derive(Clone, Copy, Debug, Args)]
struct Global {
    /// Print JSON instead of tables
    #[arg(long, global = true, help_heading = "Global")]
    json: bool,
    /// Log more; twice for everything
    #[arg(short, long, global = true, help_heading = "Global", action = clap::ArgAction::Count)]
    verbose: u8,
    /// Log errors only
    #[arg(short, long, global = true, help_heading = "Global", conflicts_with = "verbose")]
    quiet: bool,
    /// Worker threads; 0 takes one per core
    #[arg(long, global = true, help_heading = "Global", value_name = "N", default_value_t = 0)]
    threads: usize,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every pipeline over a dump: encode, count, decode, compare
    Sweep(sweep::SweepArgs),
    /// Encode a dump into a container
    Encode(container::EncodeArgs),
    /// Decode a container into a dump
    Decode(container::DecodeArgs),
    /// Show what a container holds and where its bytes go
    Inspect(container::InspectArgs),
    /// Decode a container from its bytes alone and compare digests, or the dump itself
    Verify(container::VerifyArgs),
    /// Look into a results store, join stores, compare them, and check rows by computing them again
    #[command(subcommand)]
    Results(results::ResultsCommand),
    /// Judge stored results by limits: one pipeline must hold them all
    Gate(gate::GateArgs),
    /// Write tables, plots and a page of stored results
    Report(report::ReportArgs),
    /// Measure encode and decode time of pipelines, warm, alternating, verified
    Bench(bench::BenchArgs),
    /// Show what an eviction policy keeps, and what that does to attention over a dump
    Evict(evict::EvictArgs),
    /// List and show plugins
    #[command(subcommand)]
    Plugin(plugin::PluginCommand),
    /// Show, check and convert dumps
    #[command(subcommand)]
    Dump(dump::DumpCommand),
    /// Run a real model: capture dumps, measure quality and speed through a compressed cache
    #[command(subcommand)]
    Model(model::ModelCommand),
    /// Time requests like the reference's benchmark: its flags, config and table
    LlmBench(Box<llm::BenchArgs>),
    /// Decode prompts and dump the cache like the reference's demo: its arguments, environment and lines
    LlmDemo(llm::DemoArgs),
    /// Write prompt files of wanted lengths in tokens from a corpus
    Prompts(PromptsArgs),
    /// Run an experiment of the reference, with its flags, files and columns
    #[command(subcommand)]
    Exp(exp::ExpCommand),
    /// Serve plugins to the program that started this one
    #[command(hide = true)]
    Worker(worker::WorkerArgs),
    /// Show what this program finds on this machine: version, processor, bundled data, libraries
    Doctor(doctor::DoctorArgs),
    /// Print a completion script for a shell
    Completions {
        /// Shell to print it for
        shell: clap_complete::Shell,
    },
    /// Write the manual pages, one per command
    Man {
        /// Folder to write them to, such as `~/.local/share/man/man1`
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

/// Which dump to read, and which of its entries.
#[derive(Clone, Debug, Args)]
struct DumpArgs {
    /// Dump: a run folder, a folder of runs, or safetensors [default: the bundled sample]
    #[arg(long, value_name = "PATH")]
    dump: Option<PathBuf>,
    #[command(flatten)]
    select: SelectArgs,
}

impl DumpArgs {
    fn open(&self) -> Result<(Dump, Status)> {
        let path = self.dump.clone().map_or_else(sample::find, Ok)?;
        self.select.open(&path)
    }
}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    let cli = Cli::parse_from(llm::arguments(std::env::args_os()));
    start_logging(cli.global);
    match start(cli) {
        Ok(status) => status.into(),
        Err(error) => {
            eprintln!("error: {error}");
            match error.kind() {
                ErrorKind::Mismatch => Status::Fail.into(),
                _ => Status::BadInput.into(),
            }
        }
    }
}

fn start_logging(global: Global) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => Level::ERROR,
        (false, 0) => Level::WARN,
        (false, 1) => Level::INFO,
        (false, 2) => Level::DEBUG,
        (false, _) => Level::TRACE,
    };
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .with_target(false)
        .without_time()
        .init();
}

fn start(cli: Cli) -> Result<Status> {
    // Before any thread starts: its limits come first.
    if let Some(Command::Worker(args)) = &cli.command {
        return args.run(&cli.load);
    }
    let Some(command) = cli.command else {
        print(OVERVIEW)?;
        return Ok(Status::Pass);
    };
    rayon::ThreadPoolBuilder::new()
        .num_threads(cli.global.threads)
        .build_global()
        .map_err(|error| Error::invalid_config(format!("--threads {}: {error}", cli.global.threads)))?;
    let load = cli.load;
    let json = cli.global.json;
    match command {
        Command::Sweep(args) => args.run(&load, json),
        Command::Encode(args) => args.run(&load.registry()?, json),
        Command::Decode(args) => args.run(&load.registry()?, json),
        Command::Inspect(args) => args.run(json),
        Command::Verify(args) => args.run(&load.registry()?, json),
        Command::Results(command) => command.run(&load, json),
        Command::Gate(args) => args.run(json),
        Command::Report(args) => args.run(json),
        Command::Bench(args) => args.run(&load.registry()?, json),
        Command::Evict(args) => args.run(&load.registry()?, json),
        Command::Plugin(command) => command.run(&load, json),
        Command::Dump(command) => command.run(json),
        Command::Model(command) => command.run(&load, json),
        Command::LlmBench(args) => args.run(&load.registry()?, json),
        Command::LlmDemo(args) => args.run(&load.registry()?, json),
        Command::Exp(command) => command.run(&load.registry()?, json),
        Command::Prompts(args) => args.run(json),
        Command::Worker(_) => unreachable!("it has run"),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "gearbox", &mut script);
            print(String::from_utf8_lossy(&script).trim_end())?;
            Ok(Status::Pass)
        }
        Command::Doctor(doctor::DoctorArgs {}) => doctor::run(&load, json),
        Command::Man { out } => {
            std::fs::create_dir_all(&out).map_err(|error| Error::io(&out, &error))?;
            clap_mangen::generate_to(Cli::command(), &out).map_err(|error| Error::io(&out, &error))?;
            Ok(Status::Pass)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_consistent() {
        Cli::command().debug_assert();
    }
}
