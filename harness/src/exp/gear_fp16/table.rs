//! The CSV files: the reference's columns, then our own on the right.

use gearbox_core::Role;

use super::Row;
use super::measure::Metrics;
use crate::exp::ratio;
use crate::exp::text::{Cells, Float};

/// Columns of one role where elements have two bytes.
const SPLIT_8: [&str; 7] =
    ["hi_entropy", "lo_entropy", "hi_ratio", "lo_ratio", "gear_ratio", "hi_delta_ratio", "gear_delta_ratio"];

/// Columns of one role where elements have four bytes.
const SPLIT_16: [&str; 7] = [
    "hi16_entropy",
    "lo16_entropy",
    "hi16_ratio",
    "lo16_ratio",
    "split16_ratio",
    "hi16_delta_ratio",
    "split16_delta_ratio",
];

/// Our columns of one role: bytes of the tensor and of the frames.
const BYTES: [&str; 5] = ["bytes", "zstd_bytes", "hi_bytes", "lo_bytes", "hi_delta_bytes"];

/// Columns of keys, then the same of values.
fn both(names: &[&str]) -> Vec<String> {
    ["k_", "v_"].iter().flat_map(|prefix| names.iter().map(move |name| format!("{prefix}{name}"))).collect()
}

fn named(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

/// Header of `layer_metrics.csv`.
pub(super) fn layer_header() -> Vec<String> {
    let place = ["layer_id", "stage", "seq_start", "seq_len", "kv_heads", "head_dim", "bytes_per_elem", "run_id"];
    let whole = ["prompt_tokens", "k_entropy", "v_entropy", "k_zstd_ratio", "v_zstd_ratio"];
    [named(&place), named(&whole), both(&SPLIT_8), both(&SPLIT_16), named(&["dtype"]), both(&BYTES)].concat()
}

/// Fills one row of `layer_metrics.csv`.
pub(super) fn layer_row(row: &Row<'_>, cells: &mut Cells) {
    let key = &row.measured.key;
    let metrics = Role::ALL.map(|role| row.measured.role(role).whole);
    cells.push(row.layer);
    cells.push(row.entry.stage);
    cells.push(row.entry.start);
    cells.extend([row.entry.seq, key.shape.heads, key.shape.dim, key.dtype.size()]);
    cells.push(row.run);
    match row.prompt_tokens {
        Some(tokens) => cells.push(tokens),
        None => cells.push(""),
    }
    push_whole(metrics, cells);
    push_split(row, metrics, &[2, 4], cells);
    push_bytes(row, metrics, cells);
}

/// Header of `head_metrics.csv`, with the split columns of these widths.
pub(super) fn head_header(widths: &[usize]) -> Vec<String> {
    let place = ["layer_id", "head_id", "stage", "seq_start", "seq_len", "head_dim", "bytes_per_elem"];
    let whole = ["k_entropy", "v_entropy", "k_zstd_ratio", "v_zstd_ratio"];
    let mut header = [named(&place), named(&whole)].concat();
    for width in widths {
        header.extend(both(if *width == 2 { &SPLIT_8 } else { &SPLIT_16 }));
    }
    header.extend(named(&["run_id", "dtype"]));
    header.extend(both(&BYTES));
    header
}

/// Every row with every head.
pub(super) fn heads<'a>(rows: &'a [Row<'a>]) -> impl Iterator<Item = (&'a Row<'a>, usize)> {
    rows.iter().flat_map(|row| {
        let count = row.measured.key.heads.len().max(row.measured.value.heads.len());
        (0..count).map(move |head| (row, head))
    })
}

/// Fills one row of `head_metrics.csv`, with the split columns of these widths.
pub(super) fn head_row(row: &Row<'_>, head: usize, widths: &[usize], cells: &mut Cells) {
    let key = &row.measured.key;
    // Zeros where keys and values differ in their number of heads.
    let metrics = Role::ALL.map(|role| row.measured.role(role).heads.get(head).copied().unwrap_or_default());
    cells.push(row.layer);
    cells.push(head);
    cells.push(row.entry.stage);
    cells.push(row.entry.start);
    cells.extend([row.entry.seq, key.shape.dim, key.dtype.size()]);
    push_whole(metrics, cells);
    push_split(row, metrics, widths, cells);
    cells.push(row.run);
    push_bytes(row, metrics, cells);
}

/// Bytes per element that occur.
pub(super) fn widths(rows: &[Row<'_>]) -> Vec<usize> {
    let occurs = |width: &usize| {
        rows.iter().any(|row| Role::ALL.iter().any(|role| row.measured.role(*role).dtype.size() == *width))
    };
    [2, 4].into_iter().filter(occurs).collect()
}

/// Entropies and zstd ratios.
fn push_whole(metrics: [Metrics; 2], cells: &mut Cells) {
    cells.extend(metrics.map(|metrics| Float(metrics.entropy)));
    cells.extend(metrics.map(|metrics| Float(ratio(metrics.raw, metrics.zstd))));
}

/// The split columns of some widths; zeros for roles of another.
fn push_split(row: &Row<'_>, metrics: [Metrics; 2], widths: &[usize], cells: &mut Cells) {
    for width in widths {
        for (role, m) in Role::ALL.into_iter().zip(metrics) {
            if row.measured.role(role).dtype.size() != *width {
                cells.extend([Float(0.0); 7]);
                continue;
            }
            let ratios = [
                ratio(m.half(), m.hi),
                ratio(m.half(), m.lo),
                ratio(m.raw, m.split()),
                ratio(m.half(), m.hi_delta),
                ratio(m.raw, m.split_delta()),
            ];
            cells.extend([m.hi_entropy, m.lo_entropy].into_iter().chain(ratios).map(Float));
        }
    }
}

/// Our columns: the element type, and the bytes of keys and values.
fn push_bytes(row: &Row<'_>, metrics: [Metrics; 2], cells: &mut Cells) {
    let [key, value] = Role::ALL.map(|role| row.measured.role(role).dtype);
    if key == value {
        cells.push(key);
    } else {
        cells.push(format_args!("{key}/{value}"));
    }
    for m in metrics {
        cells.extend([m.raw, m.zstd, m.hi, m.lo, m.hi_delta]);
    }
}
