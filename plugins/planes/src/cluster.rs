//! Groups contexts with similar statistics, so that few tables serve many channels.

use pulp::{Arch, NullaryFnOnce};

use crate::math::{entropy_bits, log2};

/// Which table each context uses.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Map {
    /// Table of each context, below `tables`.
    pub of: Vec<u8>,
    /// Number of tables, at least one.
    pub tables: usize,
    /// What symbols and tables take in all, as far as the bins tell.
    pub bits: f32,
}

impl Map {
    /// One table for all, whose bits are not known.
    pub fn single(contexts: usize) -> Self {
        Self { of: vec![0; contexts], tables: 1, bits: 0.0 }
    }

    /// What symbols add to the bits of others that use the same tables.
    pub fn added_bits<const BINS: usize>(&self, counts: &[[u32; BINS]], more: &[[u32; BINS]]) -> f32 {
        let mut groups = vec![[[0; BINS]; 2]; self.tables];
        for ((of, counts), more) in self.of.iter().zip(counts).zip(more) {
            let [before, after] = &mut groups[usize::from(*of)];
            add(before, counts);
            add(after, counts);
            add(after, more);
        }
        groups.iter().map(|[before, after]| entropy_bits(after) - entropy_bits(before)).sum()
    }
}

/// The most tables that a [`Map`] has.
const MOST_TABLES: usize = 16;

/// How finely a [`Map`] may divide.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// The most tables.
    pub tables: usize,
    /// Bits that storing one more table takes.
    pub table_bits: f32,
}

/// Groups the contexts whose counts are rows of `BINS` in `counts`.
///
/// Contexts are sorted by their mean bin and cut into groups, each then moves to the group in which it takes the fewest bits, twice, and
/// groups are joined as long as that saves more bits of tables than it costs.
pub(crate) fn cluster<const BINS: usize>(counts: &[[u32; BINS]], budget: Budget) -> Map {
    Arch::new().dispatch(Clustering { counts, budget })
}

/// What [`cluster`] works on. A closure in its place would not be inlined, and so not get the wider vectors.
struct Clustering<'a, const BINS: usize> {
    counts: &'a [[u32; BINS]],
    budget: Budget,
}

impl<const BINS: usize> NullaryFnOnce for Clustering<'_, BINS> {
    type Output = Map;

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
    fn call(self) -> Map {
        cluster_inlined(self.counts, self.budget)
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn cluster_inlined<const BINS: usize>(counts: &[[u32; BINS]], budget: Budget) -> Map {
    let tables = budget.tables.min(counts.len()).min(MOST_TABLES);
    if tables < 2 {
        let mut all = [0; BINS];
        for counts in counts {
            add(&mut all, counts);
        }
        return Map { bits: entropy_bits(&all) + budget.table_bits, ..Map::single(counts.len()) };
    }
    let mut of = by_mean(counts, tables);
    let mut groups = sums(counts, &of, tables);
    let mut all = [0; BINS];
    for group in &groups {
        add(&mut all, group);
    }
    for _ in 0..2 {
        if tables <= 8 {
            assign::<BINS, 8>(&mut of, counts, &groups, &all);
        } else {
            assign::<BINS, MOST_TABLES>(&mut of, counts, &groups, &all);
        }
        groups = sums(counts, &of, tables);
    }
    let bits = join(&mut of, &mut groups, budget.table_bits);
    let mut map = Map { of, tables: 0, bits };
    // Tables are numbered by their first context, without gaps.
    let mut names = [u8::MAX; 256];
    for of in &mut map.of {
        let name = &mut names[usize::from(*of)];
        if *name == u8::MAX {
            *name = map.tables as u8;
            map.tables += 1;
        }
        *of = *name;
    }
    map
}

/// Cuts the contexts, sorted by mean bin, into groups of equal size.
fn by_mean<const BINS: usize>(counts: &[[u32; BINS]], tables: usize) -> Vec<u8> {
    let mean = |counts: &[u32; BINS]| {
        let total: u64 = counts.iter().map(|count| u64::from(*count)).sum();
        let weighted: u64 = (0..).zip(counts).map(|(bin, count)| bin * u64::from(*count)).sum();
        (weighted << 20) / total.max(1)
    };
    let mut order: Vec<(u64, usize)> = counts.iter().map(mean).zip(0..).collect();
    order.sort_unstable();
    let mut of = vec![0; counts.len()];
    for (rank, (_, context)) in order.into_iter().enumerate() {
        of[context] = (rank * tables / counts.len()) as u8;
    }
    of
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn sums<const BINS: usize>(counts: &[[u32; BINS]], of: &[u8], tables: usize) -> Vec<[u32; BINS]> {
    let mut groups = vec![[0; BINS]; tables];
    for (counts, of) in counts.iter().zip(of) {
        add(&mut groups[usize::from(*of)], counts);
    }
    groups
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn add<const BINS: usize>(sum: &mut [u32; BINS], counts: &[u32; BINS]) {
    for (sum, count) in sum.iter_mut().zip(counts) {
        *sum += count;
    }
}

/// Bits of each bin in a group; bins it has not seen take what all groups together suggest.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn costs<const BINS: usize>(group: &[u32; BINS], all: &[u32; BINS]) -> [f32; BINS] {
    let total = |counts: &[u32; BINS]| counts.iter().sum::<u32>() as f32;
    let (own, whole) = (total(group), total(all).max(1.0));
    let prior = 8.0;
    std::array::from_fn(|bin| {
        let p = (group[bin] as f32 + prior * (all[bin] as f32 + 0.1) / whole) / (own + prior);
        -log2(p.max(1e-9))
    })
}

/// Gives each context to the group, of up to `WIDTH`, in which it takes the fewest bits.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn assign<const BINS: usize, const WIDTH: usize>(
    of: &mut [u8],
    counts: &[[u32; BINS]],
    groups: &[[u32; BINS]],
    all: &[u32; BINS],
) {
    // Groups lie side by side, so that the compiler adds up the bits of a context in all of them at once.
    let mut by_bin = [[1e9; WIDTH]; BINS];
    for (idx, group) in groups.iter().enumerate() {
        for (by_bin, bits) in by_bin.iter_mut().zip(costs(group, all)) {
            by_bin[idx % WIDTH] = bits;
        }
    }
    for (of, counts) in of.iter_mut().zip(counts) {
        let mut sums = [0.0_f32; WIDTH];
        for (count, bits) in counts.iter().zip(&by_bin) {
            let count = count.cast_signed() as f32;
            for (sum, bits) in sums.iter_mut().zip(bits) {
                *sum += count * bits;
            }
        }
        // The lowest bits of a sum tell nothing; the group in their place makes the search for the least a search for the smallest number.
        let mut least = i32::MAX;
        for (idx, sum) in (0..).zip(sums) {
            least = least.min(sum.to_bits().cast_signed() & !0xF | idx);
        }
        *of = least.cast_unsigned() as u8 & 0xF;
    }
}

/// Bits of two groups as one.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn joined<const BINS: usize>(groups: &[[u32; BINS]], a: usize, b: usize) -> f32 {
    let mut sum = groups[a];
    add(&mut sum, &groups[b]);
    entropy_bits(&sum)
}

/// How far apart groups may be that are joined. They start out sorted by their mean bin, so those far apart have little in common.
const NEIGHBOURS: usize = 4;

/// Joins pairs of groups as long as one table less saves more than it costs; returns the bits of what is left.
#[inline(always)]
#[expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]
fn join<const BINS: usize>(of: &mut [u8], groups: &mut [[u32; BINS]], table_bits: f32) -> f32 {
    let mut live: Vec<usize> =
        (0..groups.len()).filter(|&group| groups[group].iter().any(|count| *count > 0)).collect();
    let mut bits: Vec<f32> = groups.iter().map(entropy_bits).collect();
    let mut costs = vec![f32::INFINITY; groups.len() * groups.len()];
    let len = groups.len();
    let at = |a: usize, b: usize| a.min(b) * len + a.max(b);
    for (i, &a) in live.iter().enumerate() {
        for &b in &live[i.saturating_sub(NEIGHBOURS)..i] {
            costs[at(a, b)] = joined(groups, a, b) - bits[a] - bits[b];
        }
    }
    while live.len() > 1 {
        let pairs = live.iter().enumerate().flat_map(|(i, &a)| live[..i].iter().map(move |&b| (b, a)));
        let cheapest = pairs.min_by(|x, y| costs[at(x.0, x.1)].total_cmp(&costs[at(y.0, y.1)]));
        let Some((a, b)) = cheapest.filter(|&(a, b)| costs[at(a, b)] <= table_bits) else { break };
        let taken = groups[b];
        add(&mut groups[a], &taken);
        bits[a] = entropy_bits(&groups[a]);
        live.retain(|&group| group != b);
        of.iter_mut().filter(|of| usize::from(**of) == b).for_each(|of| *of = a as u8);
        let place = live.iter().position(|&group| group == a).unwrap_or_default();
        let near = place.saturating_sub(NEIGHBOURS)..(place + NEIGHBOURS + 1).min(live.len());
        for &other in live[near].iter().filter(|&&other| other != a) {
            costs[at(a, other)] = joined(groups, a, other) - bits[a] - bits[other];
        }
    }
    live.iter().map(|&group| bits[group] + table_bits).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contexts of two kinds, alternating.
    fn two_kinds(contexts: usize) -> Vec<[u32; 16]> {
        (0..contexts)
            .map(|context| std::array::from_fn(|bin| if (bin < 8) == (context % 2 == 0) { 50 + bin as u32 } else { 1 }))
            .collect()
    }

    #[test]
    fn kinds_get_a_table_each() {
        let map = cluster(&two_kinds(20), Budget { tables: 8, table_bits: 100.0 });
        assert_eq!(map.tables, 2);
        assert!((0..20).all(|context| map.of[context] == (context % 2) as u8), "{map:?}");
    }

    #[test]
    fn tables_that_cost_more_than_they_save_are_joined() {
        let map = |counts: &[[u32; 16]], table_bits| cluster(counts, Budget { tables: 8, table_bits }).of;
        assert_eq!(map(&two_kinds(20), 1e6), [0; 20]);
        assert_eq!(map(&two_kinds(1), 1.0), [0]);
        assert!(map(&[], 1.0).is_empty());
    }
}
