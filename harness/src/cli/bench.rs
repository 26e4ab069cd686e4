//! `gearbox bench`.

use clap::Args;
use gearbox_core::{Pipeline, Registry, Result};
use serde_json::json;

use super::DumpArgs;
use crate::bench::{self, Input, Measured, Spread};
use crate::receipt::Receipt;
use crate::report::{self, Columns};
use crate::status::Status;
use crate::{engine, pipelines};

/// Measures encode and decode time of pipelines.
///
/// One thread; one warm-up, in which decoded bytes are compared with the input; then the pipelines take turns in every repeat.
/// Only ratios between rows of one run mean something on a shared machine.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gearbox bench                                     every codec, entry by entry
  gearbox bench --pipeline gear --pipeline zstd --repeats 30")]
pub(super) struct BenchArgs {
    #[command(flatten)]
    dump: DumpArgs,
    /// Pipeline to measure, may be repeated: a `.json` file, JSON text or the id of a codec [default: every codec]
    #[arg(long, value_name = "PIPELINE")]
    pipeline: Vec<String>,
    /// Measured repeats
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    repeats: u16,
    /// Measure whole layers up to this many bytes of the dump
    #[arg(long, value_name = "BYTES", default_value_t = 64 << 20)]
    max_bytes: u64,
}

impl BenchArgs {
    pub(super) fn run(self, registry: &Registry, json: bool) -> Result<Status> {
        let mut specs = Vec::new();
        for text in &self.pipeline {
            specs.push(pipelines::parse(text, registry)?);
        }
        if specs.is_empty() {
            let first_mode = |spec: &gearbox_core::PipelineSpec| spec.chunking == gearbox_core::Chunking::default();
            specs = pipelines::defaults(registry).into_iter().filter(first_mode).collect();
        }
        let mut built: Vec<_> = specs.iter().map(|spec| Pipeline::build(spec, registry)).collect::<Result<_>>()?;
        let (dump, status) = self.dump.open()?;
        if self.pipeline.is_empty() {
            built.retain(|pipeline| match engine::check(&dump, pipeline) {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!("{} is left out: {error}", pipeline.name());
                    false
                }
            });
        }
        let input = Input::read(&dump, self.max_bytes)?;
        let rows = bench::measure(&dump, &input, &mut built, usize::from(self.repeats))?;
        let peak = bench::peak_resident_bytes();
        if json {
            report::print_json(&json!({
                "receipt": Receipt::new(registry)?, "repeats": self.repeats, "measured_bytes": input.bytes(),
                "peak_resident_bytes": peak, "rows": rows,
            }))?;
            return Ok(status);
        }
        report::print(&format!(
            "{} of {} measured, one thread, median of {} repeats (least to greatest)\n\n{}{}",
            report::bytes(input.bytes()),
            report::bytes(dump.original_bytes()),
            self.repeats,
            table(&rows),
            peak.map_or(String::new(), |peak| format!("\n\npeak resident memory {}", report::bytes(peak)))
        ))?;
        Ok(status)
    }
}

fn table(rows: &[Measured]) -> Columns {
    let mut table = Columns::new(&[
        "pipeline",
        "chunking",
        "role",
        "stage",
        ">chunks",
        ">ratio",
        ">encode MB/s",
        ">decode MB/s",
        ">encode µs p50 / p95",
        ">decode µs p50 / p95",
        ">transform",
    ]);
    let rate = |spread: &Spread| format!("{:.0} ({:.0} to {:.0})", spread.median, spread.min, spread.max);
    let micros = |spread: &Spread| format!("{:.1} / {:.1}", spread.median, spread.p95);
    for row in rows {
        table.row([
            row.pipeline.clone(),
            row.chunking.clone(),
            row.role.to_string(),
            row.stage.to_string(),
            row.chunks.to_string(),
            report::ratio(row.original_bytes, row.encoded_bytes),
            rate(&row.encode_mb_s),
            rate(&row.decode_mb_s),
            micros(&row.encode_us),
            micros(&row.decode_us),
            format!("{:.0} %", 100.0 * row.transform_share),
        ]);
    }
    table
}
