//! Positions of the live tokens of a layer.

use std::ops::Range;

/// Positions by slot, ascending. Slots are places in the store: all heads have as many.
#[derive(Debug)]
pub(super) enum Positions {
    /// Slot and position are the same: nothing was evicted.
    All(usize),
    /// One row while all heads hold the same tokens, else one per KV head.
    Rows(Vec<Vec<u32>>),
}

impl Positions {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::All(len) => *len,
            Self::Rows(rows) => rows[0].len(),
        }
    }

    /// 1 while all heads hold the same tokens, else the number of KV heads.
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::All(_) => 1,
            Self::Rows(rows) => rows.len(),
        }
    }

    pub(super) fn at(&self, row: usize, slot: usize) -> u32 {
        match self {
            Self::All(_) => slot as u32,
            Self::Rows(rows) => rows[row][slot],
        }
    }

    /// Bytes that they take, and those of them that are in use.
    pub(super) fn bytes(&self) -> (usize, usize) {
        let Self::Rows(rows) = self else { return (0, 0) };
        let size = size_of::<u32>();
        let held: usize = rows.iter().map(|row| row.capacity() * size + size_of::<Vec<u32>>()).sum();
        (held, rows.iter().map(|row| row.len() * size).sum())
    }

    /// Appends tokens.
    pub(super) fn append(&mut self, positions: Range<u32>) {
        match self {
            Self::All(len) => *len += positions.len(),
            Self::Rows(rows) => rows.iter_mut().for_each(|row| super::append(row, positions.len(), positions.clone())),
        }
    }

    /// Keeps the named slots: one ascending list for all heads, or lists of equal length, one per KV head.
    pub(super) fn keep(&mut self, lists: &[Vec<u32>]) {
        let count = lists.len().max(self.rows());
        let gathered = |row: usize| {
            let (list, row) = (&lists[row.min(lists.len() - 1)], row.min(self.rows() - 1));
            list.iter().map(|slot| self.at(row, *slot as usize)).collect()
        };
        let mut rows: Vec<Vec<u32>> = (0..count).map(gathered).collect();
        if rows.iter().all(|row| *row == rows[0]) {
            rows.truncate(1);
        }
        *self = Self::Rows(rows);
    }

    /// Positions `(rows, tokens)`, row-major.
    pub(super) fn flat(&self) -> Vec<u32> {
        match self {
            Self::All(len) => (0..*len as u32).collect(),
            Self::Rows(rows) => rows.concat(),
        }
    }

    /// The positions of a run of slots, if all heads hold the same tokens there.
    pub(super) fn shared(&self, slots: Range<usize>) -> Option<Vec<u32>> {
        let Self::Rows(rows) = self else { return Some((slots.start as u32..slots.end as u32).collect()) };
        let first = &rows[0][slots.clone()];
        rows.iter().all(|row| row[slots.clone()] == *first).then(|| first.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keep_sets_compose() {
        let mut positions = Positions::All(6);
        positions.keep(&[vec![0, 2, 5], vec![1, 2, 5]]);
        assert_eq!((positions.rows(), positions.flat()), (2, vec![0, 2, 5, 1, 2, 5]));
        positions.append(6..8);
        assert_eq!(positions.flat(), [0, 2, 5, 6, 7, 1, 2, 5, 6, 7]);
        assert_eq!((positions.shared(0..2), positions.shared(1..4)), (None, Some(vec![2, 5, 6])));
        positions.keep(&[vec![1, 4]]);
        assert_eq!((positions.rows(), positions.flat()), (1, vec![2, 7]), "all heads hold the same again");
        assert_eq!((positions.len(), positions.at(0, 1)), (2, 7));
    }
}
