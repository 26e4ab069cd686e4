//! Where each row's token stood before.

use std::collections::HashMap;

/// Buckets of the filter in front of the map.
const BUCKETS: usize = 4096;

/// Finds for each row the latest earlier row of the same token.
#[derive(Debug, Default)]
pub(crate) struct Earlier {
    /// First row in the chunk of each of its tokens.
    first: HashMap<u32, usize>,
    /// Tokens of the chunk that were not met in the history yet, counted by their low bits: most rows of a long history belong to none.
    waiting: Vec<u32>,
    /// Rows are counted from the start of the history.
    found: Vec<Option<usize>>,
}

impl Earlier {
    /// Looks at all rows; `history` and `tokens` are the ids before the chunk and in it.
    pub(crate) fn find(&mut self, history: &[u32], tokens: &[u32]) {
        let Self { first, waiting, found } = self;
        found.clear();
        found.resize(tokens.len(), None);
        first.clear();
        for (row, token) in tokens.iter().enumerate().rev() {
            if let Some(later) = first.insert(*token, row) {
                found[later] = Some(history.len() + row);
            }
        }
        waiting.clear();
        waiting.resize(BUCKETS, 0);
        for token in first.keys() {
            waiting[*token as usize % BUCKETS] += 1;
        }
        let mut pending = first.len();
        for (row, token) in history.iter().enumerate().rev() {
            let bucket = &mut waiting[*token as usize % BUCKETS];
            if *bucket == 0 {
                continue;
            }
            let Some(first) = first.get(token).map(|first| &mut found[*first]) else { continue };
            if first.is_none() {
                *first = Some(row);
                *bucket -= 1;
                pending -= 1;
                if pending == 0 {
                    break;
                }
            }
        }
    }

    /// The earlier row of a row of the chunk, counted from the start of the history.
    pub(crate) fn of(&self, row: usize) -> Option<usize> {
        self.found.get(row).copied().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(history: &[u32], tokens: &[u32]) -> Vec<Option<usize>> {
        let mut earlier = Earlier::default();
        earlier.find(&[9; 5], &[9; 70]); // what is left of it must not matter
        earlier.find(history, tokens);
        (0..tokens.len()).map(|row| earlier.of(row)).collect()
    }

    #[test]
    fn latest_row_of_the_same_token_is_found() {
        assert_eq!(found(&[], &[5, 6, 5, 5, 6]), [None, None, Some(0), Some(2), Some(1)]);
        assert_eq!(found(&[5, 7, 5], &[6, 5, 7, 5]), [None, Some(2), Some(1), Some(4)]);
        assert_eq!(found(&[5, 6], &[]), []);
    }

    #[test]
    fn tokens_with_equal_low_bits_are_told_apart() {
        let far = BUCKETS as u32 + 1;
        assert_eq!(found(&[far, 1, far], &[1, far]), [Some(1), Some(2)]);
        assert_eq!(found(&[far], &[1]), [None]);
    }
}
