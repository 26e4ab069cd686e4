//! `gearbox dump`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use gearbox_core::{DType, Error, Result, Rope};

use super::DumpArgs;
use crate::dump::{self, ConvertOptions, Dump, Format};
use crate::entropy::Entropies;
use crate::select::SelectArgs;
use crate::status::Status;
use crate::{report, sample};

/// Shows, checks and converts dumps.
#[derive(Debug, Subcommand)]
pub(super) enum DumpCommand {
    /// Show runs, layers, shapes and what else the dump holds
    Info(InfoArgs),
    /// Check every entry, including its values, and report defects by reason and count
    Check(DumpArgs),
    /// Convert between formats, and from FP32 to FP16 with a report of overflow, NaN and flushed values
    Convert(ConvertArgs),
}

/// What to show of a dump.
#[derive(Debug, Args)]
pub(super) struct InfoArgs {
    #[command(flatten)]
    dump: DumpArgs,
    /// Also print the digest of names, ranges, shapes and tensors; reads everything
    #[arg(long)]
    digest: bool,
    /// Also print the order-0 entropies of signs, exponents, mantissas and bytes, and the floor that they set; reads everything
    #[arg(long, value_enum, value_name = "BY", num_args = 0..=1, require_equals = true, default_missing_value = "role")]
    entropy: Option<EntropyBy>,
}

/// The rows of a table of entropies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EntropyBy {
    /// One row for keys and one for values
    Role,
    /// One row per layer and role
    Layer,
}

/// What to convert, and to what.
#[derive(Debug, Args)]
#[command(
    after_help = "An interrupted conversion goes on where it stopped: entries that are complete are not written again."
)]
pub(super) struct ConvertArgs {
    /// Dump to read
    source: PathBuf,
    /// Folder to write to
    out: PathBuf,
    /// Format to write
    #[arg(long, value_enum, default_value_t = Format::Reference)]
    format: Format,
    /// Element type to write
    #[arg(long, value_enum, default_value_t = Target::F16)]
    dtype: Target,
    /// How the model rotated keys, as JSON, for dumps that do not say: `{ "pairing": "half-split", "theta": 1e4, "rotary_dim": 64 }`
    #[arg(long, value_name = "JSON", value_parser = parse_rope)]
    rope: Option<Rope>,
    /// Write values beyond the FP16 range as infinities instead of refusing the entry
    #[arg(long)]
    allow_inf: bool,
    /// Copy entries that are FP16 already instead of refusing them
    #[arg(long)]
    allow_fp16: bool,
    /// Replace existing entries that differ
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    select: SelectArgs,
}

/// Element type of the output.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Target {
    /// FP16: FP32 is rounded to nearest even, FP16 is copied
    F16,
    /// As it is
    Keep,
}

impl DumpCommand {
    pub(super) fn run(self, json: bool) -> Result<Status> {
        match self {
            Self::Info(args) => info(&args, json),
            Self::Check(args) => check(&args, json),
            Self::Convert(args) => convert(&args, json),
        }
    }
}

fn info(args: &InfoArgs, json: bool) -> Result<Status> {
    let (dump, status) = args.dump.open()?;
    let info = dump.info();
    let digest = if args.digest { Some(dump.digest()?) } else { None };
    let entropy = args.entropy.map(|by| Ok((by, Entropies::of(&dump)?))).transpose()?;
    if json {
        let entropy = entropy.map(|(_, entropies)| entropies);
        report::print_json(&serde_json::json!({ "info": info, "digest": digest, "entropy": entropy }))?;
    } else {
        report::print(info.to_string().trim_end())?;
        if let Some(digest) = digest {
            report::print(&format!("digest {digest}"))?;
        }
        if let Some((by, entropies)) = entropy {
            let table = entropies.table(by == EntropyBy::Layer);
            report::print(&format!(
                "\nbits per value, order 0; /channel: with exponents given their channel\n\n{table}"
            ))?;
        }
    }
    Ok(status)
}

fn check(args: &DumpArgs, json: bool) -> Result<Status> {
    let path = args.dump.clone().map_or_else(sample::find, Ok)?;
    let dump = Dump::open(&path, &args.select.selection())?;
    let mut findings = dump.findings.clone();
    findings.append(dump.scan());
    let status = if findings.is_clean() || args.select.allow_bad { Status::Pass } else { Status::BadInput };
    if json {
        let counts: std::collections::BTreeMap<_, _> =
            findings.counts().into_iter().map(|(reason, count)| (reason.to_string(), count)).collect();
        report::print_json(&serde_json::json!({
            "entries": dump.entries(), "bad": findings.bad(), "counts": counts, "findings": findings.list,
        }))?;
    } else {
        for finding in &findings.list {
            report::print(&finding.to_string())?;
        }
        if !findings.list.is_empty() {
            report::print(&format!("\n{}", findings.to_string().trim_end()))?;
        }
        report::print(&format!("{} entries are valid, {} are bad", dump.entries(), findings.bad()))?;
    }
    Ok(status)
}

fn parse_rope(text: &str) -> Result<Rope> {
    let value = serde_json::from_str(text).map_err(|error| Error::invalid_config(error.to_string()))?;
    gearbox_core::config::from_value(&value)
}

fn convert(args: &ConvertArgs, json: bool) -> Result<Status> {
    let (mut source, opened) = args.select.open(&args.source)?;
    for run in source.runs.iter_mut().filter(|run| run.layers.iter().all(|layer| layer.facts.rope.is_none())) {
        run.rope = run.rope.take().or_else(|| args.rope.clone());
    }
    let options = ConvertOptions {
        format: args.format,
        dtype: matches!(args.dtype, Target::F16).then_some(DType::F16),
        allow_inf: args.allow_inf,
        allow_fp16: args.allow_fp16,
        overwrite: args.overwrite,
    };
    let converted = dump::convert(&source, &args.out, &options)?;
    if json {
        report::print_json(&converted)?;
    } else {
        report::print(converted.to_string().trim_end())?;
    }
    Ok(opened.and(if converted.findings.is_clean() { Status::Pass } else { Status::BadInput }))
}
