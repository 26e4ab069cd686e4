//! The CSV files by entry: the reference's columns, then our own on the right.

use std::io::Write;
use std::path::Path;

use gearbox_core::Result;

use super::Place;
use super::measure::Measured;
use crate::exp::ratio;
use crate::exp::text::{Cells, Float, write_csv};
use crate::metrics::error::ErrorSums;

/// Keys and values of one entry.
#[derive(Clone, Debug)]
pub(in crate::exp) struct Row<'a> {
    pub place: Place<'a>,
    pub pair: [Measured; 2],
}

/// A group of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::exp) enum Columns {
    /// Layer, stage and shape.
    Entry,
    /// Columns of this experiment alone.
    Own(&'static [&'static str]),
    /// Bytes of the tensor ÷ bytes as the reference counts them.
    Ratios,
    /// All errors of the reference, those of keys first.
    Errors,
    /// Mean absolute error and cosine.
    ShortErrors,
    /// Ours: run, first token, element type.
    Where,
    /// Ours: bytes of the streams.
    Bytes,
    /// Ours: errors of the decoded tensor, and of the logits with its keys where the dump has queries.
    Decoded,
}

impl Columns {
    fn header(self) -> Vec<String> {
        let both = |names: &[&str]| -> Vec<String> {
            ["k_", "v_"].iter().flat_map(|prefix| names.iter().map(move |name| format!("{prefix}{name}"))).collect()
        };
        let own = |names: &[&str]| -> Vec<String> { names.iter().map(ToString::to_string).collect() };
        match self {
            Self::Entry => own(&["layer_id", "stage", "seq_len", "kv_heads", "head_dim", "bytes_per_elem"]),
            Self::Own(names) => own(names),
            Self::Ratios => both(&["ratio"]),
            Self::Errors => both(&["mae", "rmse", "max_abs", "cosine"]),
            Self::ShortErrors => both(&["mae", "cosine"]),
            Self::Where => own(&["run_id", "seq_start", "dtype"]),
            Self::Bytes => both(&["actual_bytes", "bits_per_value"]),
            Self::Decoded => [both(&["nmse", "worst_head_cosine", "worst_head"]), own(&["k_logit_error"])].concat(),
        }
    }

    fn fill(self, row: &Row<'_>, cells: &mut Cells) {
        let [key, value] = &row.pair;
        match self {
            Self::Entry => {
                cells.push(row.place.layer);
                cells.push(row.place.entry.stage);
                cells.extend([key.shape.seq, key.shape.heads, key.shape.dim, key.dtype.size()]);
            }
            Self::Own(_) => {}
            Self::Where => {
                cells.push(row.place.run);
                cells.push(row.place.entry.start);
                if key.dtype == value.dtype {
                    cells.push(key.dtype);
                } else {
                    cells.push(format_args!("{}/{}", key.dtype, value.dtype));
                }
            }
            Self::Decoded => {
                row.pair.iter().for_each(|tensor| self.fill_tensor(tensor, cells));
                match key.logits.and_then(|logits| logits.error()) {
                    Some(error) => cells.push(Float(error)),
                    None => cells.push(""),
                }
            }
            _ => row.pair.iter().for_each(|tensor| self.fill_tensor(tensor, cells)),
        }
    }

    /// The columns of one role.
    fn fill_tensor(self, tensor: &Measured, cells: &mut Cells) {
        let error = &tensor.error;
        let [mae, rmse, max_abs] = [error.mae, error.rmse, error.max_abs].map(|figure| Float(figure.into()));
        match self {
            Self::Ratios => cells.push(Float(ratio(tensor.raw, tensor.compressed))),
            Self::Errors => cells.extend([mae, rmse, max_abs, Float(error.cosine)]),
            Self::ShortErrors => cells.extend([mae, Float(error.cosine)]),
            Self::Bytes => {
                cells.push(tensor.actual);
                cells.push(Float(ratio(8 * tensor.actual, tensor.values())));
            }
            Self::Decoded => {
                let (head, cosine) = worst_head(tensor.heads.heads());
                cells.push(Float(tensor.heads.total().error().nmse));
                cells.push(Float(cosine));
                cells.push(head);
            }
            Self::Entry | Self::Own(_) | Self::Where => {}
        }
    }
}

/// The first of the heads with the lowest cosine, NaN being the lowest, and that cosine.
fn worst_head(heads: &[ErrorSums]) -> (usize, f64) {
    let cosines = heads.iter().map(|sums| sums.error().cosine).enumerate();
    cosines.reduce(|worst, head| if worst.1.is_nan() || head.1 >= worst.1 { worst } else { head }).unwrap_or((0, 1.0))
}

/// Writes rows of some groups of columns; `own` fills the cells of [`Columns::Own`].
///
/// # Errors
/// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io), naming `path`.
pub(in crate::exp) fn write_rows<'a, R>(
    out: &mut dyn Write,
    path: &Path,
    groups: &[Columns],
    rows: impl IntoIterator<Item = R>,
    row_of: impl Fn(&R) -> &Row<'a>,
    own: impl Fn(&R, &mut Cells),
) -> Result<()> {
    let header: Vec<String> = groups.iter().flat_map(|columns| columns.header()).collect();
    write_csv(out, path, &header, rows, |row, cells| {
        for columns in groups {
            match columns {
                Columns::Own(_) => own(&row, cells),
                columns => columns.fill(row_of(&row), cells),
            }
        }
    })?;
    Ok(())
}
