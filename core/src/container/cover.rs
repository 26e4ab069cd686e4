//! Which tokens of a sequence have chunks already: chunks cover its entries in order and cross no gap.

use super::EntryInfo;

/// How far the chunks of a sequence have come.
#[derive(Clone, Debug)]
pub(super) struct Cover {
    /// Start and end of the stretches without a gap: entries that follow each other are one.
    spans: Vec<(u64, u64)>,
    /// The stretch that holds the next token.
    at: usize,
    /// Position of the next token, if there is one.
    next: u64,
}

impl Cover {
    /// Nothing is covered yet. `entries` are ascending without overlap, and their ends fit 64 bits.
    pub(super) fn new(entries: &[EntryInfo]) -> Self {
        let mut spans: Vec<(u64, u64)> = Vec::new();
        for span in entries.iter().map(|entry| entry.span).filter(|span| span.seq > 0) {
            let end = span.start + span.seq as u64;
            match spans.last_mut() {
                Some(last) if last.1 == span.start => last.1 = end,
                _ => spans.push((span.start, end)),
            }
        }
        let next = spans.first().map_or(0, |span| span.0);
        Self { spans, at: 0, next }
    }

    /// Covers the next `seq` tokens, from `first` on; with `may_skip`, tokens before may stay uncovered.
    ///
    /// Says what is wrong if the tokens are not the next ones; nothing is covered then.
    pub(super) fn take(&mut self, first: u64, seq: usize, may_skip: bool) -> Result<(), String> {
        if seq == 0 {
            return Err("expected at least 1 token, got 0".into());
        }
        let at = if may_skip { self.spans.partition_point(|span| span.1 <= first).max(self.at) } else { self.at };
        let Some(&(start, end)) = self.spans.get(at) else {
            return Err(format!("expected no more chunks, got one that starts at token {first}"));
        };
        let expected = if at == self.at { self.next } else { start };
        if first < expected || (first > expected && !may_skip) {
            return Err(format!("expected a chunk that starts at token {expected}, got {first}"));
        }
        let left = end - first;
        if seq as u64 > left {
            return Err(format!("expected at most {left} tokens from token {first} to the next gap, got {seq}"));
        }
        self.next = first + seq as u64;
        self.at = at;
        if self.next == end {
            self.at += 1;
            self.next = self.spans.get(self.at).map_or(end, |span| span.0);
        }
        Ok(())
    }
}
