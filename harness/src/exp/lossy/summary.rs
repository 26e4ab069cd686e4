//! Figures over many tensors.

use gearbox_core::Role;
use serde::Serialize;
use serde_json::{Value, json};

use super::logit::LogitSums;
use super::measure::Measured;
use super::table::Row;
use crate::exp::ratio;
use crate::metrics::error::{ErrorReport, PlacedSums};

/// Sums over tensors of one role, with the weights of the reference: each tensor's figure counts once per element.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::exp) struct Totals {
    pub raw: u64,
    pub compressed: u64,
    pub actual: u64,
    pub values: u64,
    pub tensors: u64,
    logits: LogitSums,
    mae: f64,
    rmse: f64,
    max_abs: f64,
    cosine: f64,
}

/// Means over tensors.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(in crate::exp) struct Figures {
    pub mae: f64,
    pub rmse: f64,
    /// Every tensor counts the same, as in the reference.
    pub max_abs: f64,
    pub cosine: f64,
}

impl Totals {
    /// The sums over tensors.
    pub fn of<'a>(tensors: impl IntoIterator<Item = &'a Measured>) -> Self {
        let mut totals = Self::default();
        for tensor in tensors {
            let weight = tensor.values() as f64;
            totals.raw += tensor.raw;
            totals.compressed += tensor.compressed;
            totals.actual += tensor.actual;
            totals.values += tensor.values();
            totals.tensors += 1;
            tensor.logits.iter().for_each(|logits| totals.logits.merge(logits));
            totals.mae += f64::from(tensor.error.mae) * weight;
            totals.rmse += f64::from(tensor.error.rmse) * weight;
            totals.max_abs += f64::from(tensor.error.max_abs);
            totals.cosine += tensor.error.cosine * weight;
        }
        totals
    }

    /// The sums of keys, and of values.
    pub fn of_rows(rows: &[Row<'_>]) -> [Self; 2] {
        [0, 1].map(|role: usize| Self::of(rows.iter().map(|row| &row.pair[role])))
    }

    /// Bytes of all tensors ÷ bytes as the reference counts them; zero if there are none.
    pub fn ratio(&self) -> f64 {
        ratio(self.raw, self.compressed)
    }

    /// The same over both roles.
    pub fn ratio_of_both([key, value]: &[Self; 2]) -> f64 {
        ratio(key.raw + value.raw, key.compressed + value.compressed)
    }

    /// Bits of the streams that were written, for each element.
    pub fn bits_per_value(&self) -> f64 {
        ratio(8 * self.actual, self.values)
    }

    /// Error of the logits over all entries with queries, if there are any.
    pub fn logit_error(&self) -> Option<f64> {
        self.logits.error()
    }

    /// Bytes, ratio, bits per value and error of logits.
    pub fn to_json(self) -> Value {
        json!({
            "tensors": self.tensors,
            "values": self.values,
            "original_bytes": self.raw,
            "counted_bytes": self.compressed,
            "actual_bytes": self.actual,
            "ratio": self.ratio(),
            "bits_per_value": self.bits_per_value(),
            "logit_error": self.logit_error(),
        })
    }

    /// Means weighted by elements, of which there are `values`: the reference divides both roles by those of the keys.
    pub fn figures(&self, values: u64) -> Figures {
        let mean = |sum: f64, weight: u64| if weight == 0 { 0.0 } else { sum / weight as f64 };
        Figures {
            mae: mean(self.mae, values),
            rmse: mean(self.rmse, values),
            max_abs: mean(self.max_abs, self.tensors),
            cosine: mean(self.cosine, values),
        }
    }
}

/// Errors of the decoded tensors: pooled, by layer and by head.
pub(in crate::exp) fn report_of<'a>(rows: impl IntoIterator<Item = &'a Row<'a>>) -> ErrorReport {
    ErrorReport::of(rows.into_iter().flat_map(|row| {
        Role::ALL.into_iter().zip(&row.pair).flat_map(move |(role, tensor)| {
            tensor.heads.heads().iter().enumerate().map(move |(head, sums)| PlacedSums {
                run: row.place.run.to_owned(),
                layer: row.place.layer,
                role,
                head,
                sums: *sums,
            })
        })
    }))
}
