//! The Pareto front: rows that no other row beats on every count.

use super::Row;
use crate::gate::Metric;

/// Marks the rows of each dump that no other row of it beats: stored bytes, worst-head error, encoding and decoding time.
///
/// A row beats another if it is nowhere worse and somewhere better, so ties stay. Only rows that ended well take part.
pub(super) fn mark(rows: &mut [Row]) {
    let front = front(&rows.iter().map(|row| (row.dump.as_str(), row)).collect::<Vec<_>>());
    for (row, on_front) in rows.iter_mut().zip(front) {
        row.pareto = on_front;
    }
}

/// Whether each row is on the front of its group, which is its dump.
pub(crate) fn front<G: PartialEq>(rows: &[(G, &Row)]) -> Vec<bool> {
    let counts: Vec<_> = rows.iter().map(|(_, row)| row.is_ok().then(|| counts(row))).collect();
    let on_front = |(group, own): (&G, &Option<Counts>)| {
        let Some(own) = own else { return false };
        let rivals = rows.iter().zip(&counts).filter(|((other, _), _)| other == group);
        !rivals.filter_map(|(_, rival)| rival.as_ref()).any(|rival| beats(rival, own))
    };
    rows.iter().zip(&counts).map(|((group, _), own)| on_front((group, own))).collect()
}

/// What is to be small.
type Counts = [f64; 4];

fn counts(row: &Row) -> Counts {
    let error = row.measured(Metric::WorstHeadNmse).unwrap_or(f64::INFINITY);
    [row.stored_bytes as f64, error, row.encode_ns as f64, row.decode_ns as f64]
}

fn beats(rival: &Counts, own: &Counts) -> bool {
    rival.iter().zip(own).all(|(rival, own)| rival <= own) && rival.iter().zip(own).any(|(rival, own)| rival < own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_stay_and_beaten_rows_go() {
        let rows = [[1.0, 5.0, 1.0, 1.0], [1.0, 5.0, 1.0, 1.0], [2.0, 5.0, 1.0, 1.0], [9.0, 0.0, 9.0, 9.0]];
        let front: Vec<_> = rows.iter().map(|own| !rows.iter().any(|rival| beats(rival, own))).collect();
        assert_eq!(front, [true, true, false, true]);
    }
}
