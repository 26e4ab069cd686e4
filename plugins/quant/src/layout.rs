//! Which elements of a chunk share a scale.

use gearbox_core::{Role, Shape};

use crate::settings::Granularity;

/// Chunks with fewer rows than this have no groups along tokens: the scales of such groups cost more than they save.
///
/// Keys of the 512-token sample run at 4 bits, whole chunks of so many tokens as groups: with 24 tokens, groups of channels take 0.83 bits
/// per value more than groups of 64 channels of a token, and give an error that is worth 0.92 bits; with 16 tokens 1.50 and 1.10.
pub(crate) const FEWEST_ROWS: usize = 24;

/// Groups of a tensor, in the order of their parameters in the lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Rows that are coded, heads and channels.
    pub(crate) shape: Shape,
    pub(crate) kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One group.
    Tensor,
    /// One group for each head.
    Head,
    /// So many groups along the channels of each token and head.
    Token(usize),
    /// So many groups along the tokens of each channel.
    Channel(usize),
}

impl Layout {
    pub(crate) fn new(granularity: Granularity, group: Option<usize>, role: Role, shape: Shape) -> Self {
        let Shape { seq, dim, .. } = shape;
        let kind = match granularity.of(role) {
            Granularity::Tensor => Kind::Tensor,
            Granularity::Head => Kind::Head,
            Granularity::Channel if seq >= FEWEST_ROWS => Kind::Channel(pieces(seq, group)),
            _ => Kind::Token(pieces(dim, group)),
        };
        Self { shape, kind }
    }

    /// Shape of the lanes with one number for each group.
    pub(crate) fn parameters(&self) -> Shape {
        let Shape { seq, heads, dim } = self.shape;
        match self.kind {
            _ if self.shape.elements() == 0 => Shape::new(0, 0, 0),
            Kind::Tensor => Shape::new(1, 1, 1),
            Kind::Head => Shape::new(1, heads, 1),
            Kind::Token(parts) => Shape::new(seq, heads, parts),
            Kind::Channel(parts) => Shape::new(parts, heads, dim),
        }
    }

    /// The elements of each group, in the order of the groups.
    pub(crate) fn groups(&self) -> impl Iterator<Item = Members> + use<> {
        let Self { shape, kind } = *self;
        let row = shape.row();
        (0..self.parameters().elements()).map(move |group| match kind {
            Kind::Tensor => Members { start: 0, run: shape.elements(), runs: 1, stride: 0 },
            Kind::Head => Members { start: group * shape.dim, run: shape.dim, runs: shape.seq, stride: row },
            Kind::Token(parts) => {
                let (from, to) = piece(shape.dim, parts, group % parts);
                Members { start: group / parts * shape.dim + from, run: to - from, runs: 1, stride: 0 }
            }
            Kind::Channel(parts) => {
                let (from, to) = piece(shape.seq, parts, group / row);
                Members { start: from * row + group % row, run: 1, runs: to - from, stride: row }
            }
        })
    }
}

/// Groups that fit best into an axis: their lengths differ by at most one, and are as near to the asked length as such groups can be.
pub(crate) fn pieces(len: usize, group: Option<usize>) -> usize {
    // Half a group is no group of its own.
    group.map_or(1, |group| (len / group + usize::from(len % group > group / 2)).max(1))
}

/// Start and end of one of the pieces of an axis.
pub(crate) fn piece(len: usize, pieces: usize, idx: usize) -> (usize, usize) {
    let (short, longer) = (len / pieces, len % pieces);
    let start = idx * short + idx.min(longer);
    (start, start + short + usize::from(idx < longer))
}

/// The elements of one group: `runs` runs of neighbours.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Members {
    start: usize,
    run: usize,
    runs: usize,
    stride: usize,
}

impl Members {
    pub(crate) fn places(self) -> impl Iterator<Item = usize> {
        (0..self.runs).flat_map(move |run| {
            let start = self.start + run * self.stride;
            start..start + self.run
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(granularity: Granularity, group: Option<usize>, shape: Shape) -> Vec<Vec<usize>> {
        let layout = Layout::new(granularity, group, Role::Key, shape);
        layout.groups().map(|members| members.places().collect()).collect()
    }

    #[test]
    fn groups_are_those_of_their_axis() {
        let shape = Shape::new(2, 2, 3);
        assert_eq!(places(Granularity::Tensor, None, shape), [(0..12).collect::<Vec<_>>()]);
        assert_eq!(places(Granularity::Head, None, shape), [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]);
        assert_eq!(places(Granularity::Token, Some(2), shape), [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]);
        assert_eq!(places(Granularity::Token, Some(1), shape).len(), 12);
        // Too few rows for groups of channels.
        assert_eq!(places(Granularity::Channel, None, shape), places(Granularity::Token, None, shape));
        let long = places(Granularity::Channel, Some(16), Shape::new(33, 1, 2));
        assert_eq!(long.len(), 4);
        assert_eq!(long[1], (0..17).map(|row| row * 2 + 1).collect::<Vec<_>>());
        assert_eq!(long[2], (17..33).map(|row| row * 2).collect::<Vec<_>>());
    }

    #[test]
    fn every_element_is_in_one_group() {
        let axes = [Granularity::Tensor, Granularity::Head, Granularity::Token, Granularity::Channel];
        for granularity in axes {
            for group in [None, Some(1), Some(7), Some(64)] {
                for shape in [Shape::new(1, 1, 1), Shape::new(40, 3, 10), Shape::new(17, 2, 100), Shape::new(0, 2, 4)] {
                    let mut all = places(granularity, group, shape).concat();
                    all.sort_unstable();
                    assert_eq!(all, (0..shape.elements()).collect::<Vec<_>>(), "{granularity:?} {group:?} {shape}");
                }
            }
        }
    }

    #[test]
    fn lengths_of_groups_are_near_the_asked_one() {
        for (len, group, expected) in [(128, 64, 2), (100, 64, 2), (96, 64, 1), (97, 64, 2), (1, 64, 1), (20, 7, 3)] {
            assert_eq!(pieces(len, Some(group)), expected, "{len} by {group}");
        }
        assert_eq!([0, 1, 2].map(|idx| piece(20, 3, idx)), [(0, 7), (7, 14), (14, 20)]);
    }
}
