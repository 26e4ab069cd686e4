//! The search for the cheapest setting that holds all limits: a coarse grid, then refinement around the best point.

use std::collections::BTreeMap;

use gearbox_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Row;
use crate::gate::{Gate, Verdict};
use crate::pipelines::points;

/// What a search is after. Every `{ "sweep": [ … ] }` of a pipeline is an axis; list its values in order.
///
/// First come the ends and the middle of every axis, all combined. Then points around the best one, at half the distance each time, until
/// no neighbour is better; neighbours differ on one axis or two. That finds the best point where bytes and errors go one way along each
/// axis, in far fewer rows than all products.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Search {
    /// What is to be small.
    pub minimise: Objective,
    /// The limits that must hold, for every dump.
    pub subject_to: Gate,
}

/// What a search minimises, summed over the dumps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Stored bytes.
    Bytes,
    /// Encoding time; noisy, so the result may change from run to run.
    EncodeNs,
    /// Decoding time; noisy, so the result may change from run to run.
    DecodeNs,
}

impl Objective {
    fn of(self, row: &Row) -> u64 {
        match self {
            Self::Bytes => row.stored_bytes,
            Self::EncodeNs => row.encode_ns,
            Self::DecodeNs => row.decode_ns,
        }
    }
}

/// How good a point is; the smaller, the better.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub(super) struct Score {
    /// How far the worst limit is exceeded; 0 if all hold, infinite if a row did not end well.
    pub excess: f64,
    /// What is minimised.
    pub cost: f64,
}

impl Score {
    /// Of a point that is not legal or failed: worse than any other.
    const NONE: Self = Self { excess: f64::INFINITY, cost: f64::INFINITY };
}

impl Search {
    /// Checks the limits.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) with the JSON pointer.
    pub fn check(&self) -> Result<()> {
        if self.subject_to.0.is_empty() {
            return Err(Error::invalid_config("`/search/subject_to`: expected at least one limit, got none"));
        }
        self.subject_to.check("/search/subject_to")
    }

    /// The score of a pipeline from its rows, one per dump.
    pub(super) fn score<'a>(&self, rows: impl Iterator<Item = &'a Row>) -> Score {
        rows.fold(Score { excess: 0.0, cost: 0.0 }, |sum, row| {
            if !row.is_ok() {
                return Score::NONE;
            }
            let excess = sum.excess.max(self.judge(row).excess());
            Score { excess, cost: sum.cost + self.minimise.of(row) as f64 }
        })
    }

    /// Judges a row by the limits, and by the default one on the worst head.
    pub(super) fn judge(&self, row: &Row) -> Verdict {
        self.subject_to.clone().with_default().judge(|metric| row.measured(metric))
    }
}

/// What a search found in one pipeline.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Found {
    /// Number of products that the pipeline stands for.
    pub products: usize,
    /// How many of them were run.
    pub evaluated: usize,
    /// The best one, by the numbers of its rows: the cheapest that holds all limits, else the nearest miss.
    pub best: Vec<usize>,
    /// Whether it holds all limits.
    pub passed: bool,
    /// What it violates, by row.
    pub violations: Vec<Verdict>,
}

/// Walks over a grid with so many points per axis, and returns the best point.
///
/// # Errors
/// What `evaluate` reports.
pub(super) fn walk(lens: &[usize], mut evaluate: impl FnMut(&[usize]) -> Result<Score>) -> Result<Vec<usize>> {
    let mut known = BTreeMap::new();
    let mut score = |point: &[usize]| match known.get(point) {
        Some(score) => Ok(*score),
        None => evaluate(point).inspect(|score| {
            known.insert(point.to_vec(), *score);
        }),
    };
    let mut steps: Vec<usize> = lens.iter().map(|len| len.saturating_sub(1).div_ceil(2).max(1)).collect();
    let axes = lens.iter().zip(&steps).map(|(len, step)| coarse(*len, *step));
    let mut best: Option<(Score, Vec<usize>)> = None;
    for point in points(axes) {
        take(&mut best, score(&point)?, point);
    }
    let (mut held, mut at) = best.ok_or_else(|| Error::invalid_config("nothing to search"))?;
    loop {
        let mut better = Some((held, at.clone()));
        for point in neighbours(&at, lens, &steps) {
            take(&mut better, score(&point)?, point);
        }
        let (next, point) = better.unwrap_or_else(|| unreachable!("it began with a point"));
        if point != at {
            (held, at) = (next, point);
        } else if steps.iter().all(|step| *step == 1) {
            return Ok(at);
        } else {
            for step in &mut steps {
                *step = step.div_ceil(2);
            }
        }
    }
}

/// Keeps the better point; of equals the first.
fn take(best: &mut Option<(Score, Vec<usize>)>, score: Score, point: Vec<usize>) {
    if best.as_ref().is_none_or(|(held, _)| score < *held) {
        *best = Some((score, point));
    }
}

/// Both ends of an axis and what lies between them in steps.
fn coarse(len: usize, step: usize) -> Vec<usize> {
    let mut places: Vec<_> = (0..len).step_by(step).collect();
    if places.last() != Some(&(len - 1)) {
        places.push(len - 1);
    }
    places
}

/// Points at one step on one axis or two.
fn neighbours(at: &[usize], lens: &[usize], steps: &[usize]) -> Vec<Vec<usize>> {
    let moved = |axis: usize| {
        let (place, last) = (at[axis], lens[axis] - 1);
        let mut places = vec![place, place.saturating_sub(steps[axis]), (place + steps[axis]).min(last)];
        places.dedup();
        places
    };
    let mut found = Vec::new();
    for first in 0..at.len() {
        for second in first..at.len() {
            for a in moved(first) {
                for b in if second == first { vec![a] } else { moved(second) } {
                    let mut point = at.to_vec();
                    (point[first], point[second]) = (a, b);
                    if point != at && !found.contains(&point) {
                        found.push(point);
                    }
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks over a grid where more costs more and errs less; returns the point and how many were evaluated.
    fn walk_over(lens: &[usize], limit: f64, error: impl Fn(&[usize]) -> f64) -> (Vec<usize>, usize) {
        let mut evaluated = 0;
        let best = walk(lens, |point| {
            evaluated += 1;
            let excess = (error(point) / limit - 1.0).max(0.0);
            Ok(Score { excess, cost: point.iter().sum::<usize>() as f64 })
        });
        (best.unwrap(), evaluated)
    }

    #[test]
    fn cheapest_point_within_the_limit_is_found_without_trying_all() {
        let half = |place: usize| 1.0 / (1u64 << place) as f64;
        for wanted in 0..15 {
            let (best, evaluated) = walk_over(&[15], half(wanted), |point| half(point[0]));
            assert_eq!(best, [wanted]);
            assert!(evaluated <= 11, "{evaluated}");
        }
        // The second axis matters four times as much.
        let error = |point: &[usize]| half(point[0]) + 4.0 * half(point[1]);
        let (best, evaluated) = walk_over(&[15, 15], 0.1, error);
        assert_eq!((best, evaluated < 80), (vec![4, 7], true), "{evaluated}");
    }

    #[test]
    fn nearest_miss_is_found_where_nothing_passes() {
        let (best, _) = walk_over(&[6, 4], 1e-9, |point| 1.0 / (1.0 + point[0] as f64 + point[1] as f64));
        assert_eq!(best, [5, 3]);
    }

    #[test]
    fn single_points_and_short_axes_are_walked() {
        assert_eq!(walk_over(&[], 1.0, |_| 0.0), (vec![], 1));
        assert_eq!(walk_over(&[1, 2], 1.0, |_| 0.0), (vec![0, 0], 2));
    }
}
