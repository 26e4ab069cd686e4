//! `exp lossy-compare`: clipping, quantisation and clipping before quantisation, side by side.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use clap::{Args, ValueEnum};
use gearbox_core::config::near;
use gearbox_core::{Chunk, Registry, Result, Role};
use gearbox_plugins::quant::reference::{self, Clip};
use serde_json::json;

use super::files::Outputs;
use super::lossy::{
    Coder, Columns, CommonArgs, Measured, Place, Row, Shared, Totals, bits, finish, for_each_tensor, list, report_of,
    write_rows,
};
use super::text::push;
use crate::status::Status;

/// Measures clipping, quantisation and both.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Writes lossy_compare.csv and lossy_compare_summary.md. Lossless layers are left out.
Ratios count zstd frames only. `actual_bytes` is the length of the stream that was written and decoded.")]
pub struct LossyCompareArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Folder for the results; created if needed
    #[arg(long, value_name = "DIR", default_value = "exp/n_lossless/out")]
    out_dir: PathBuf,
    /// Bits of a value, 2 to 24
    #[arg(long, value_name = "BITS", default_value = "8", value_parser = bits)]
    bits: u8,
    /// Several numbers of bits, separated by commas, instead of `--bits`
    #[arg(long, value_name = "BITS,…", default_value = "")]
    bits_list: BitsList,
    /// Percentiles to clip to, the lower one first
    #[arg(long, value_name = "LOW,HIGH", default_value = "1,99")]
    clip_percentiles: Percentiles,
    /// Standard deviations around the mean to clip to
    #[arg(long, value_name = "COUNT", default_value = "3.0", value_parser = sigma)]
    clip_sigma: f64,
    /// What to measure: some of `clip`, `quant` and `clip-quant`, separated by commas
    #[arg(long, value_name = "MODE,…", default_value = "clip,quant,clip-quant")]
    modes: Modes,
    /// How to find the bounds
    #[arg(long, value_enum, default_value_t = ClipMethod::Both)]
    clip_method: ClipMethod,
}

/// Bits; empty if they come from `--bits`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct BitsList(Vec<u8>);

impl FromStr for BitsList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() { Ok(Self(Vec::new())) } else { list(text, bits).map(Self) }
    }
}

/// A lower and a higher percentile.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Percentiles {
    low: f64,
    high: f64,
}

impl FromStr for Percentiles {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let values = list(text, |part| part.parse::<f64>().map_err(|_| format!("`{part}` is not a number")))?;
        match values[..] {
            [low, high] if 0.0 <= low && low < high && high <= 100.0 => Ok(Self { low, high }),
            _ => Err(format!("expected two percentiles from 0 to 100, the lower one first, got `{text}`")),
        }
    }
}

fn sigma(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(count) if count > 0.0 && count.is_finite() => Ok(count),
        _ => Err(format!("expected a number above 0, got `{text}`")),
    }
}

/// What is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Modes {
    clip: bool,
    quant: bool,
    clip_quant: bool,
}

impl FromStr for Modes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const NAMES: [&str; 3] = ["clip", "quant", "clip-quant"];
        let names = list(text, |name| {
            if NAMES.contains(&name) {
                return Ok(name.to_owned());
            }
            let hint = match near(name, NAMES.into_iter()).as_slice() {
                [] => format!("expected some of `{}`", NAMES.join("`, `")),
                near => format!("did you mean `{}`?", near.join("` or `")),
            };
            Err(format!("mode `{name}` is unknown; {hint}"))
        })?;
        let [clip, quant, clip_quant] = NAMES.map(|known| names.iter().any(|name| name == known));
        Ok(Self { clip, quant, clip_quant })
    }
}

/// How to find the bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ClipMethod {
    /// Percentiles of the tensor
    Percentile,
    /// Standard deviations around its mean
    Sigma,
    /// One after the other
    Both,
}

/// One way to store a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Method {
    /// Index into [`LossyCompareArgs::clips`].
    clip: Option<usize>,
    /// None if values are clipped only.
    bits: Option<u8>,
    name: &'static str,
}

const COLUMNS: [Columns; 7] = [
    Columns::Entry,
    Columns::Own(&["method", "bits"]),
    Columns::Ratios,
    Columns::ShortErrors,
    Columns::Where,
    Columns::Bytes,
    Columns::Decoded,
];
const FILES: [&str; 2] = ["lossy_compare.csv", "lossy_compare_summary.md"];

impl LossyCompareArgs {
    /// Runs the experiment and prints which files it wrote.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for existing results or if no lossy entry is left;
    /// [`ErrorKind::Mismatch`](gearbox_core::ErrorKind::Mismatch) if a stream does not decode to its input; else what reading and writing
    /// report.
    pub fn run(&self, registry: &Registry, json: bool) -> Result<Status> {
        let start = Instant::now();
        let common = &self.common;
        let (dump, status) = common.input.open()?;
        let places = common.lossy(&dump)?;
        let mut outputs = Outputs::create(&self.out_dir, &FILES, &[], common.overwrite)?;

        let (coder, shared, methods) = (common.coder(registry, true)?, Shared::default(), self.methods());
        let pairs = for_each_tensor(&places, "lossy-compare", |place, role| {
            self.measure(&coder, &shared, place, role, &methods)
        })?;
        // By entry and, within it, by method.
        let mut rows: Vec<(Method, Row<'_>)> = Vec::with_capacity(places.len() * methods.len());
        for (place, [keys, values]) in places.into_iter().zip(pairs) {
            let pairs = keys.into_iter().zip(values);
            rows.extend(methods.iter().zip(pairs).map(|(method, (k, v))| (*method, Row { place, pair: [k, v] })));
        }

        outputs.write(0, |path, out| {
            write_rows(
                out,
                path,
                &COLUMNS,
                &rows,
                |(_, row)| row,
                |(method, _), cells| {
                    cells.push(method.name);
                    cells.push(method.bits.unwrap_or_default());
                },
            )
        })?;
        let mut of_method: BTreeMap<usize, Vec<&Row<'_>>> = BTreeMap::new();
        for (idx, (_, row)) in rows.iter().enumerate() {
            of_method.entry(idx % methods.len()).or_default().push(row);
        }
        let mut text = "# Lossy Compare Summary\n\n".to_owned();
        for (method, rows) in methods.iter().zip(of_method.values()) {
            method.markdown(rows, &mut text);
        }
        outputs.write_text(1, &text)?;
        finish(outputs, [start.elapsed(), coder.encode_time()], json, || {
            let of = |(method, rows): (&Method, &Vec<&Row<'_>>)| {
                let [key, value] = totals(rows);
                json!({
                    "method": method.name,
                    "bits": method.bits,
                    "key": key.to_json(),
                    "value": value.to_json(),
                    "error": report_of(rows.iter().copied()),
                })
            };
            let methods: Vec<_> = methods.iter().zip(of_method.values()).map(of).collect();
            json!({ "dumps": rows.len() / methods.len(), "compress_mode": common.compress_mode, "methods": methods })
        })?;
        Ok(status)
    }

    /// The ways to clip, with the names of clipping alone and before quantisation.
    fn clips(&self) -> Vec<(Clip, &'static str, &'static str)> {
        let Percentiles { low, high } = self.clip_percentiles;
        let percentile = (Clip::Percentile { low, high }, "clip_percentile", "clip_percentile+quant");
        let sigma = (Clip::Sigma(self.clip_sigma), "clip_sigma", "clip_sigma+quant");
        match self.clip_method {
            ClipMethod::Percentile => vec![percentile],
            ClipMethod::Sigma => vec![sigma],
            ClipMethod::Both => vec![percentile, sigma],
        }
    }

    /// Everything that is measured on one tensor, in the order of the rows.
    fn methods(&self) -> Vec<Method> {
        let bits = if self.bits_list.0.is_empty() { vec![self.bits] } else { self.bits_list.0.clone() };
        let clips = self.clips();
        let clips = || clips.iter().enumerate();
        let mut methods = Vec::new();
        if self.modes.clip {
            methods.extend(clips().map(|(clip, (_, name, _))| Method { clip: Some(clip), bits: None, name }));
        }
        if self.modes.quant {
            methods.extend(bits.iter().map(|bits| Method { clip: None, bits: Some(*bits), name: "quant_only" }));
        }
        if self.modes.clip_quant {
            for bits in &bits {
                let of = |(clip, (_, _, name)): (usize, &(Clip, _, &'static str))| Method {
                    clip: Some(clip),
                    bits: Some(*bits),
                    name,
                };
                methods.extend(clips().map(of));
            }
        }
        methods
    }

    fn measure(
        &self,
        coder: &Coder,
        shared: &Shared,
        place: &Place<'_>,
        role: Role,
        methods: &[Method],
    ) -> Result<Vec<Measured>> {
        let clips_any = methods.iter().any(|method| method.clip.is_some());
        shared.with(coder, place, role, |worker| {
            let chunk = worker.chunk;
            let mut clipped = Vec::new();
            for (clip, ..) in self.clips().into_iter().filter(|_| clips_any) {
                let mut out = Vec::new();
                reference::clip(chunk, clip, &mut out);
                clipped.push(out);
            }
            let mut stored = Vec::new();
            let of = |method: &Method| {
                let from = method.clip.and_then(|clip| clipped.get(clip)).map_or(chunk.bytes(), Vec::as_slice);
                let Some(bits) = method.bits else { return worker.values(from) };
                stored.clear();
                reference::quantise(Chunk::new(chunk.shape(), chunk.dtype(), from)?, bits, &mut stored)?;
                worker.values(&stored)
            };
            methods.iter().map(of).collect()
        })
    }
}

fn totals(rows: &[&Row<'_>]) -> [Totals; 2] {
    [0, 1].map(|role: usize| Totals::of(rows.iter().map(|row| &row.pair[role])))
}

impl Method {
    /// Its part of `lossy_compare_summary.md`.
    fn markdown(&self, rows: &[&Row<'_>], text: &mut String) {
        push(text, format_args!("## {} (bits={})\n", self.name, self.bits.unwrap_or_default()));
        let totals = totals(rows);
        let letters = ["K", "V"];
        for (letter, total) in letters.into_iter().zip(&totals) {
            push(text, format_args!("- Weighted {letter} ratio: {:.3}\n", total.ratio()));
        }
        for (letter, total) in letters.into_iter().zip(&totals) {
            let error = total.figures(totals[0].values);
            push(text, format_args!("- {letter} MAE: {:.6}, {letter} Cosine: {:.6}\n", error.mae, error.cosine));
        }
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_modes_name_near_ones() {
        assert_eq!(" clip, quant".parse(), Ok(Modes { clip: true, quant: true, clip_quant: false }));
        let error = "clip-quan".parse::<Modes>().unwrap_err();
        assert!(error.starts_with("mode `clip-quan` is unknown; did you mean `clip-quant`"), "{error}");
        let error = "x".parse::<Modes>().unwrap_err();
        assert_eq!(error, "mode `x` is unknown; expected some of `clip`, `quant`, `clip-quant`");
        assert!(",".parse::<Modes>().is_err());
    }

    #[test]
    fn percentiles_are_two_in_order() {
        assert_eq!("0.5, 100".parse(), Ok(Percentiles { low: 0.5, high: 100.0 }));
        for bad in ["99,1", "1", "1,2,3", "-1,5", "1,101", "5,5", "nan,5", "x,5", ""] {
            assert!(bad.parse::<Percentiles>().is_err(), "{bad}");
        }
        assert!(sigma("0").is_err() && sigma("-1").is_err() && sigma("nan").is_err() && sigma("inf").is_err());
    }
}
