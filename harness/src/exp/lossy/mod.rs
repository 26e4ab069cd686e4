//! What the four lossy experiments share: entries, streams that decode, errors, columns.
//!
//! The reference counted the frames of what a transform left behind and never wrote a stream. Here the plugin `gear` or `gear-delta` writes
//! one, a second instance decodes it, and all errors are those of the decoded tensor. The reference's columns count its frames and its
//! prices; the columns on the right count the bytes of the stream, with headers and side information.

use std::time::Duration;

use clap::{Args, ValueEnum};
use gearbox_core::{Error, Registry, Result, Role};
use gearbox_plugins::quant::reference;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};

use super::InputArgs;
use super::files::Outputs;
use crate::dump::{Dump, Entry};
use crate::report;

mod logit;
mod measure;
mod summary;
mod table;

pub(super) use measure::{Coder, Measured, Shared};
pub(super) use summary::{Figures, Totals, report_of};
pub(super) use table::{Columns, Row, write_rows};

/// The flags of all four experiments.
#[derive(Clone, Debug, Args)]
pub struct CommonArgs {
    #[command(flatten)]
    pub(super) input: InputArgs,
    /// Layers below this number are lossless
    #[arg(long, value_name = "LAYERS", default_value_t = 2)]
    pub(super) lossless_first_n: u32,
    /// How tensors are compressed; lossy ones are never stored as a plain frame, `zstd` means `gear` for them
    #[arg(long, value_enum, default_value_t = CompressMode::GearDelta)]
    pub(super) compress_mode: CompressMode,
    /// Effort of zstd: negative is fastest, 22 smallest, 0 the library's default
    #[arg(long, value_name = "LEVEL", default_value_t = 3, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-7..=22))]
    pub(super) zstd_level: i32,
    /// Replace existing results
    #[arg(long)]
    pub(super) overwrite: bool,
}

/// How tensors are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompressMode {
    /// High and low bytes apart
    Gear,
    /// High and low bytes apart, the high ones as a difference along tokens
    GearDelta,
    /// One plain frame
    Zstd,
}

impl CompressMode {
    /// As flags and files have it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gear => "gear",
            Self::GearDelta => "gear-delta",
            Self::Zstd => "zstd",
        }
    }

    /// The plugin that compresses tensors, lossy ones or not.
    fn plugin(self, lossy: bool) -> &'static str {
        match self {
            Self::Zstd if lossy => Self::Gear.name(),
            mode => mode.name(),
        }
    }
}

/// An entry and where it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub run: &'a str,
    pub layer: u32,
    pub entry: &'a Entry,
}

impl CommonArgs {
    /// The entries of all layers.
    pub(super) fn all(dump: &Dump) -> Vec<Place<'_>> {
        dump.iter().map(|(run, layer, entry)| Place { run: &run.name, layer: layer.id, entry }).collect()
    }

    /// The entries of the lossy layers.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if there are none.
    pub(super) fn lossy<'a>(&self, dump: &'a Dump) -> Result<Vec<Place<'a>>> {
        let mut places = Self::all(dump);
        places.retain(|place| !self.is_lossless(place));
        if places.is_empty() {
            let (path, first) = (self.input.dump_dir.display(), self.lossless_first_n);
            return Err(Error::invalid_input(format!(
                "`{path}`: no entry of layer {first} or above is left, see --lossless-first-n"
            )));
        }
        Ok(places)
    }

    /// Whether an entry is of a lossless layer.
    pub(super) fn is_lossless(&self, place: &Place<'_>) -> bool {
        place.layer < self.lossless_first_n
    }

    /// What writes and reads the streams of lossy or lossless tensors.
    ///
    /// # Errors
    /// What building the plugin reports.
    pub(super) fn coder(&self, registry: &Registry, lossy: bool) -> Result<Coder> {
        Coder::new(registry, self.compress_mode, lossy, self.zstd_level)
    }
}

/// Gives the files their names and prints them, or JSON with them and what `more` adds; times are those of everything and of encoding.
///
/// # Errors
/// What the file system reports.
pub(super) fn finish(
    outputs: Outputs,
    [wall, encode]: [Duration; 2],
    json: bool,
    more: impl FnOnce() -> Value,
) -> Result<()> {
    let paths = outputs.commit()?;
    let (wall, encode, threads) = (wall.as_secs_f64(), encode.as_secs_f64(), rayon::current_num_threads());
    eprintln!("{wall:.3} s in all; encoding took {encode:.3} s of {threads} threads together");
    if !json {
        return paths.iter().try_for_each(|path| report::print(&format!("Wrote {path}")));
    }
    let mut value = json!({ "files": paths, "wall_s": wall, "encode_s": encode, "threads": threads });
    if let (Value::Object(fields), Value::Object(more)) = (&mut value, more()) {
        fields.extend(more);
    }
    report::print_json(&value)
}

/// Works on the keys and the values of every entry on all threads, and returns the results in the order of the entries.
///
/// # Errors
/// The first error of `work`, with the place of its entry.
pub(super) fn for_each_tensor<R: Send>(
    places: &[Place<'_>],
    name: &'static str,
    work: impl Fn(&Place<'_>, Role) -> Result<R> + Sync,
) -> Result<Vec<[R; 2]>> {
    let progress = report::progress(places.iter().map(|place| place.entry.original_bytes()).sum(), name);
    let mut tasks: Vec<(usize, Role)> = (0..places.len()).flat_map(|idx| Role::ALL.map(|role| (idx, role))).collect();
    let size = |&(idx, role): &(usize, Role)| places[idx].entry.tensor(role).bytes_len();
    // The largest first: a large one at the end would keep one thread busy alone.
    tasks.sort_by_key(|task| (std::cmp::Reverse(size(task)), *task));
    let mut results = tasks
        .into_par_iter()
        .with_max_len(1)
        .map(|(idx, role)| {
            let place = &places[idx];
            let result = work(place, role)
                .map_err(|error| error.context(format!("run `{}`, {}, {role}", place.run, place.entry.place)))?;
            progress.inc(place.entry.tensor(role).bytes_len());
            Ok((idx, role, result))
        })
        .collect::<Result<Vec<_>>>()?;
    progress.finish_and_clear();
    results.sort_by_key(|(idx, role, _)| (*idx, *role));
    let mut results = results.into_iter().map(|(_, _, result)| result);
    let mut pairs = Vec::with_capacity(places.len());
    while let (Some(key), Some(value)) = (results.next(), results.next()) {
        pairs.push([key, value]);
    }
    Ok(pairs)
}

/// A number of bits that the quantiser takes.
pub(super) fn bits(text: &str) -> Result<u8, String> {
    let range = reference::BITS;
    match text.parse() {
        Ok(bits) if range.contains(&bits) => Ok(bits),
        _ => Err(format!("expected {} to {} bits, got `{text}`", range.start(), range.end())),
    }
}

/// Values separated by commas; blanks around them and empty parts are ignored.
///
/// # Errors
/// What `parse` says, or that there is none.
pub(super) fn list<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let list: Vec<T> = parts.map(parse).collect::<Result<_, _>>()?;
    if list.is_empty() { Err("expected at least one value, got none".to_owned()) } else { Ok(list) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_ignore_blanks_and_empty_parts() {
        assert_eq!(list(" 4, 8,,10 ", bits), Ok(vec![4, 8, 10]));
        assert_eq!(list(",", bits).unwrap_err(), "expected at least one value, got none");
        for bad in ["1", "25", "x", "-4", "4.0"] {
            assert_eq!(list(bad, bits).unwrap_err(), format!("expected 2 to 24 bits, got `{bad}`"));
        }
    }
}
