//! The Markdown files and the figures behind them.

use gearbox_core::{Role, Stage};
use serde::Serialize;

use super::Row;
use super::bins::Bins;
use super::measure::Measured;
use crate::exp::ratio;
use crate::exp::text::push;

/// A way to store a tensor, in the order of the summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Method {
    #[serde(rename = "zstd")]
    Zstd,
    #[serde(rename = "gear")]
    Gear,
    #[serde(rename = "gear+delta")]
    GearDelta,
    #[serde(rename = "split16")]
    Split16,
    #[serde(rename = "split16+delta")]
    Split16Delta,
}

impl Method {
    const ALL: [Self; 5] = [Self::Zstd, Self::Gear, Self::GearDelta, Self::Split16, Self::Split16Delta];

    fn name(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Gear => "gear",
            Self::GearDelta => "gear+delta",
            Self::Split16 => "split16",
            Self::Split16Delta => "split16+delta",
        }
    }

    /// Bytes of the frames, or `None` where the method is for another width.
    fn stored(self, tensor: &Measured) -> Option<u64> {
        let whole = &tensor.whole;
        match (self, tensor.dtype.size()) {
            (Self::Zstd, _) => Some(whole.zstd),
            (Self::Gear, 2) | (Self::Split16, 4) => Some(whole.split()),
            (Self::GearDelta, 2) | (Self::Split16Delta, 4) => Some(whole.split_delta()),
            _ => None,
        }
    }
}

fn letter(role: Role) -> &'static str {
    match role {
        Role::Key => "K",
        Role::Value => "V",
    }
}

/// Ratios of one method and role over many tensors.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Ratios {
    method: Method,
    role: Role,
    /// Mean of the tensors' ratios.
    average: f64,
    /// Bytes of all tensors ÷ bytes of all frames.
    weighted: f64,
}

/// Ratios of every method and role; zero where no tensor has the width of the method.
pub(super) fn ratios<'a>(rows: impl IntoIterator<Item = &'a Row<'a>, IntoIter: Clone>) -> Vec<Ratios> {
    let rows = rows.into_iter();
    let mut ratios = Vec::new();
    for method in Method::ALL {
        for role in Role::ALL {
            let (mut sum, mut count, mut raw, mut stored) = (0.0, 0_u64, 0, 0);
            for tensor in rows.clone().map(|row| row.measured.role(role)) {
                let Some(bytes) = method.stored(tensor) else { continue };
                sum += ratio(tensor.whole.raw, bytes);
                count += 1;
                raw += tensor.whole.raw;
                stored += bytes;
            }
            let average = if count == 0 { 0.0 } else { sum / count as f64 };
            ratios.push(Ratios { method, role, average, weighted: ratio(raw, stored) });
        }
    }
    ratios
}

/// Bytes of all tensors of one stage and role, and of their frames; methods of another width count the tensors as they are.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Totals {
    stage: Stage,
    role: Role,
    tensors: usize,
    bytes: u64,
    zstd_bytes: u64,
    split_bytes: u64,
    split_delta_bytes: u64,
}

/// Totals of every stage and role that occurs.
pub(super) fn totals(rows: &[Row<'_>]) -> Vec<Totals> {
    let mut totals = Vec::new();
    for stage in [Stage::Prefill, Stage::Decode, Stage::Unknown] {
        for role in Role::ALL {
            let mut total =
                Totals { stage, role, tensors: 0, bytes: 0, zstd_bytes: 0, split_bytes: 0, split_delta_bytes: 0 };
            for row in rows.iter().filter(|row| row.entry.stage == stage) {
                let whole = &row.measured.role(role).whole;
                total.tensors += 1;
                total.bytes += whole.raw;
                total.zstd_bytes += whole.zstd;
                total.split_bytes += whole.split();
                total.split_delta_bytes += whole.split_delta();
            }
            if total.tensors > 0 {
                totals.push(total);
            }
        }
    }
    totals
}

/// `summary.md`.
pub(super) fn markdown(rows: &[Row<'_>]) -> String {
    let mut text = format!("# Gear FP16 Summary\n\n- Dumps analyzed: {}\n", rows.len());
    let ratios = ratios(rows);
    let mut lines = |word: &str, figure: fn(&Ratios) -> f64| {
        for ratio in &ratios {
            let value = figure(ratio);
            if value > 0.0 || ratio.method == Method::Zstd {
                push(
                    &mut text,
                    format_args!("- {word} {} {} ratio: {value:.3}\n", letter(ratio.role), ratio.method.name()),
                );
            }
        }
        if word == "Avg" {
            text.push_str("\n## Weighted Ratios (by raw bytes)\n");
        }
    };
    lines("Avg", |ratio| ratio.average);
    lines("Weighted", |ratio| ratio.weighted);
    text
}

/// `grouped_summary.md`.
pub(super) fn grouped(rows: &[Row<'_>], bins: &Bins) -> String {
    let mut text = "# Grouped Summary by Prompt Tokens\n\n".to_owned();
    for bin in bins.iter() {
        let held: Vec<_> =
            rows.iter().filter(|row| row.prompt_tokens.is_some_and(|tokens| bin.holds(tokens))).collect();
        if held.is_empty() {
            continue;
        }
        push(&mut text, format_args!("## {}\n- Dumps: {}\n", bin.text, held.len()));
        for ratio in ratios(held.iter().copied()) {
            if matches!(ratio.method, Method::Zstd | Method::Gear | Method::GearDelta) {
                let (role, method) = (letter(ratio.role), ratio.method.name());
                push(&mut text, format_args!("- Weighted {role} {method}: {:.3}\n", ratio.weighted));
            }
        }
        text.push('\n');
    }
    text
}
