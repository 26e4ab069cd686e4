//! Numbers that are kept for each live token of each KV head, while tokens come and go.

use gearbox_core::{AttentionStep, CacheGeometry};

/// How the query heads that share a KV head are taken together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// Their mean.
    #[default]
    Mean,
    /// The greatest.
    Max,
}

/// Probabilities of one query and KV head over the live tokens; what is not finite counts as 0.
///
/// The mean over one head, or the greatest of it, is that head.
pub(crate) fn grouped(
    step: &AttentionStep<'_>,
    geometry: &CacheGeometry,
    query: usize,
    kv_head: usize,
    how: Group,
    out: &mut Vec<f32>,
) {
    let group = geometry.q_heads / geometry.kv_heads.max(1);
    let heads = kv_head * group..(kv_head + 1) * group;
    together(step, geometry, query, heads, how, out);
}

/// Probabilities of one query over the live tokens, of several query heads together.
pub(crate) fn together(
    step: &AttentionStep<'_>,
    geometry: &CacheGeometry,
    query: usize,
    heads: std::ops::Range<usize>,
    how: Group,
    out: &mut Vec<f32>,
) {
    let count = heads.len();
    out.clear();
    out.resize(step.tokens, 0.0);
    for head in heads {
        let start = (query * geometry.q_heads + head) * step.tokens;
        let row = &step.probabilities[start..start + step.tokens];
        for (out, probability) in out.iter_mut().zip(row) {
            let probability = if probability.is_finite() { *probability } else { 0.0 };
            *out = match how {
                Group::Mean => *out + probability,
                Group::Max => out.max(probability),
            };
        }
    }
    if how == Group::Mean {
        let scale = 1.0 / count.max(1) as f32;
        for probability in out {
            *probability *= scale;
        }
    }
}

/// Columns of numbers, one number per live token of one KV head.
#[derive(Clone, Debug, Default)]
pub(crate) struct Row<T> {
    positions: Vec<u32>,
    pub(crate) columns: Vec<Vec<T>>,
}

impl<T: Copy + Default> Row<T> {
    pub(crate) fn new(columns: usize) -> Self {
        Self { positions: Vec::new(), columns: vec![Vec::new(); columns] }
    }

    /// Makes the columns those of these tokens: numbers of tokens that are gone are dropped, those of new ones are zero.
    pub(crate) fn align(&mut self, live: &[u32]) {
        if self.positions == live {
            return;
        }
        if live.starts_with(&self.positions) {
            self.columns.iter_mut().for_each(|column| column.resize(live.len(), T::default()));
        } else {
            let mut from = 0;
            let sources: Vec<Option<usize>> = live.iter().map(|position| self.find(&mut from, *position)).collect();
            for column in &mut self.columns {
                *column = sources.iter().map(|source| source.map_or(T::default(), |idx| column[idx])).collect();
            }
        }
        self.positions.clear();
        self.positions.extend_from_slice(live);
    }

    /// The index of a position at or behind `from`, which moves there.
    fn find(&self, from: &mut usize, position: u32) -> Option<usize> {
        *from += self.positions[*from..].partition_point(|held| *held < position);
        self.positions.get(*from).is_some_and(|held| *held == position).then_some(*from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_their_tokens() {
        let mut row = Row::new(1);
        row.align(&[0, 1, 2]);
        row.columns[0] = vec![1, 2, 3];
        row.align(&[0, 1, 2, 3]);
        assert_eq!(row.columns[0], [1, 2, 3, 0]);
        row.align(&[0, 2, 3, 7, 8]);
        assert_eq!(row.columns[0], [1, 3, 0, 0, 0]);
        row.align(&[]);
        row.align(&[2]);
        assert_eq!(row.columns[0], [0]);
    }

    #[test]
    fn heads_of_a_group_are_taken_together() {
        let geometry = CacheGeometry { layer: 0, layers: 1, q_heads: 4, kv_heads: 2, dim: 8 };
        let probabilities = [1.0, 0.0, 0.5, 0.5, f32::NAN, 0.25, 0.75, 0.25];
        let step =
            AttentionStep { first_query: 1, queries: 1, tokens: 2, live: &[0, 1], probabilities: &probabilities };
        let mut out = Vec::new();
        grouped(&step, &geometry, 0, 0, Group::Mean, &mut out);
        assert_eq!(out, [0.75, 0.25]);
        grouped(&step, &geometry, 0, 1, Group::Max, &mut out);
        assert_eq!(out, [0.75, 0.25]);
        together(&step, &geometry, 0, 0..4, Group::Mean, &mut out);
        assert_eq!(out, [0.5625, 0.25]);
    }
}
