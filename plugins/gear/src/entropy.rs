//! Order-0 entropy of bytes.

/// How often each byte value occurs.
///
/// # Examples
/// ```
/// use gearbox_gear::ByteCounts;
///
/// let mut counts = ByteCounts::default();
/// counts.add(&[0, 1, 0, 1]);
/// assert_eq!(counts.entropy(), 1.0);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ByteCounts([u64; 256]);

impl Default for ByteCounts {
    fn default() -> Self {
        Self([0; 256])
    }
}

impl ByteCounts {
    /// Counts bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        // Four tables, so that runs of one value do not wait for their own last increment; adding them up pays from here on.
        let (blocks, tail) = if bytes.len() < 1024 { (&[][..], bytes) } else { bytes.as_chunks::<4>() };
        if !blocks.is_empty() {
            let mut tables = [Self::default(), Self::default(), Self::default(), Self::default()];
            for block in blocks {
                for (table, byte) in tables.iter_mut().zip(block) {
                    table.0[usize::from(*byte)] += 1;
                }
            }
            for table in &tables {
                self.merge(table);
            }
        }
        for byte in tail {
            self.0[usize::from(*byte)] += 1;
        }
    }

    /// Adds the counts of another.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.0.iter_mut().zip(other.0) {
            *count += more;
        }
    }

    /// Shannon entropy in bits per byte, 0 to 8.
    ///
    /// Zero for no bytes, negative zero for a single value. The terms are summed pairwise in ascending order of the value, as `NumPy` does,
    /// so that results differ from its by no more than the last bits of `log2`.
    pub fn entropy(&self) -> f64 {
        let total: u64 = self.0.iter().sum();
        if total == 0 {
            return 0.0;
        }
        // Which values occur is unpredictable, so no branch depends on it.
        let mut present = [0; 256];
        let mut used = 0;
        for &count in &self.0 {
            present[used] = count;
            used += usize::from(count > 0);
        }
        // Few bytes have few different counts, and the logarithm is what takes time.
        let mut known = [f64::NAN; 32];
        let mut terms = [0.0; 256];
        for (sum, &count) in terms.iter_mut().zip(&present[..used]) {
            let term = || {
                let p = count as f64 / total as f64;
                p * p.log2()
            };
            *sum = match known.get_mut(count as usize) {
                Some(known) if known.is_nan() => {
                    *known = term();
                    *known
                }
                Some(known) => *known,
                None => term(),
            };
        }
        -pairwise_sum(&terms[..used])
    }
}

/// `NumPy`'s pairwise sum.
fn pairwise_sum(terms: &[f64]) -> f64 {
    if terms.len() < 8 {
        return terms.iter().fold(-0.0, |sum, term| sum + term);
    }
    if terms.len() > 128 {
        let (left, right) = terms.split_at(terms.len() / 2 / 8 * 8);
        return pairwise_sum(left) + pairwise_sum(right);
    }
    let (groups, tail) = terms.as_chunks::<8>();
    let mut r = [-0.0; 8];
    for group in groups {
        for (sum, term) in r.iter_mut().zip(group) {
            *sum += term;
        }
    }
    let sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
    tail.iter().fold(sum, |sum, term| sum + term)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entropy(bytes: &[u8]) -> f64 {
        let mut counts = ByteCounts::default();
        counts.add(bytes);
        counts.entropy()
    }

    #[test]
    fn entropies_known_by_hand() {
        let all: Vec<u8> = (0..=255).collect();
        let known: [(&[u8], f64); 5] =
            [(&[], 0.0), (&[9; 5], -0.0), (&[1, 2, 3, 4], 2.0), (&all, 8.0), (&[0, 0, 0, 1], 0.811_278_124_459_132_8)];
        for (bytes, expected) in known {
            assert_eq!(entropy(bytes).to_bits(), expected.to_bits(), "expected {expected:?}");
        }
    }

    #[test]
    fn merged_counts_equal_counts_of_both() {
        let (mut both, mut second) = (ByteCounts::default(), ByteCounts::default());
        both.add(&[1, 2, 3, 4, 5]);
        second.add(&[5, 5, 9]);
        both.merge(&second);
        let mut whole = ByteCounts::default();
        whole.add(&[1, 2, 3, 4, 5, 5, 5, 9]);
        assert_eq!(both, whole);
    }

    #[test]
    fn pairwise_sum_splits_at_a_multiple_of_eight() {
        let ones = [1.0; 256];
        assert!(pairwise_sum(&[]).is_sign_negative(), "negated, no terms are zero");
        for len in [1, 7, 8, 9, 127, 128, 129, 130, 255, 256] {
            let expected = len as f64;
            assert_eq!(pairwise_sum(&ones[..len]).to_bits(), expected.to_bits());
        }
    }
}
