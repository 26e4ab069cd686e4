//! Pairwise sums of F32 in the order of `NumPy` 2.3 and later, which sums the whole array that way.

#![expect(clippy::inline_always, reason = "what runs inside `dispatch` must be inlined into it")]

use std::ops::Range;

use pulp::Arch;

/// Longest run that is summed without being split.
pub(super) const LEAF: usize = 128;

/// Several sums over the same elements: `leaf` sums at most [`LEAF`] of them.
pub(super) fn pairwise<const N: usize>(
    range: Range<usize>,
    leaf: &mut impl FnMut(Range<usize>) -> [f32; N],
) -> [f32; N] {
    if range.len() <= LEAF {
        return leaf(range);
    }
    let middle = range.start + range.len() / 2 / 8 * 8;
    let mut sums = pairwise(range.start..middle, leaf);
    for (sum, more) in sums.iter_mut().zip(pairwise(middle..range.end, leaf)) {
        *sum += more;
    }
    sums
}

/// Adds up eight running sums.
#[inline(always)]
pub(super) fn combine(r: [f32; 8]) -> f32 {
    ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]))
}

/// The sum of `term(x)` over at most [`LEAF`] values.
#[inline(always)]
fn leaf(values: &[f32], term: impl Fn(f32) -> f32 + Copy) -> f32 {
    let (groups, rest) = values.as_chunks::<8>();
    let Some((first, groups)) = groups.split_first() else {
        return values.iter().fold(-0.0, |sum, value| sum + term(*value));
    };
    let mut r = first.map(term);
    for group in groups {
        for (sum, value) in r.iter_mut().zip(group) {
            *sum += term(*value);
        }
    }
    rest.iter().fold(combine(r), |sum, value| sum + term(*value))
}

/// The sum of `term(x)` over values.
#[inline(always)]
pub(super) fn sum(values: &[f32], term: impl Fn(f32) -> f32 + Copy) -> f32 {
    let arch = Arch::new();
    let [sum] = pairwise(0..values.len(), &mut |range| {
        let (values, mut sum) = (&values[range], 0.0);
        let found = &mut sum;
        arch.dispatch(
            #[inline(always)]
            move || {
                let found = found;
                *found = leaf(values, term);
            },
        );
        [sum]
    });
    sum
}

/// The mean as `NumPy` has it: the F32 sum divided in F64, rounded to F32.
pub(super) fn mean(sum: f32, count: usize) -> f32 {
    (f64::from(sum) / count as f64) as f32
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "sums of small integers are exact")]
mod tests {
    use super::*;

    #[test]
    fn sums_split_at_multiples_of_eight() {
        assert!(sum(&[], |x| x).is_sign_negative());
        for len in [1, 7, 8, 9, 127, 128, 129, 137, 4097] {
            assert_eq!(sum(&vec![1.0; len], |x| x), len as f32);
        }
        // 129 values are 64 and 65. The large one loses the seven of its running sum, then the odd one behind the groups.
        let mut values = vec![1.0; 129];
        values[64] = 16_777_216.0;
        assert_eq!(sum(&values, |x| x), 16_777_216.0 + 7.0 * 8.0 + 64.0);
        // One after the other, each 1 would be lost.
        assert_eq!(sum(&[16_777_216.0, 1.0, 1.0], |x| x), 16_777_216.0);
    }

    #[test]
    fn mean_is_divided_in_f64() {
        assert_eq!(mean(1.0, 3), (1.0 / 3.0_f64) as f32);
    }
}
