//! Shares of a sweep: each unit belongs to exactly one of them.

use std::fmt;
use std::str::FromStr;

use gearbox_core::{Error, Result};

use super::Unit;

/// One of several equal shares of a sweep, written `I/N` with `I` from 1 to `N`.
///
/// # Examples
/// ```
/// use gearbox::sweep::Shard;
///
/// let shard: Shard = "2/8".parse().unwrap();
/// assert_eq!((shard.index, shard.count), (2, 8));
/// assert!("0/8".parse::<Shard>().is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Its number, from 1.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

impl Shard {
    /// Which of the units belong to it.
    ///
    /// Every `count`th one in the order of the keys: the shares differ by at most one unit, whatever order the sweep is written in, and
    /// neighbours in the sweep, which often take equally long, are spread.
    pub fn members(self, units: &[Unit]) -> Vec<bool> {
        let mut order: Vec<_> = units.iter().map(Unit::key).enumerate().collect();
        order.sort_unstable_by(|(_, a), (_, b)| a.cmp(b));
        let mut members = vec![false; units.len()];
        for (idx, _) in order.into_iter().skip(self.index - 1).step_by(self.count) {
            members[idx] = true;
        }
        members
    }
}

impl FromStr for Shard {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once('/').and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
        match parts {
            Some((index, count)) if 0 < index && index <= count => Ok(Self { index, count }),
            _ => Err(Error::invalid_config(format!("expected I/N with I from 1 to N, such as 1/8, got `{text}`"))),
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::super::unit::tests::unit;
    use super::*;

    #[test]
    fn shards_hold_every_unit_once_whatever_their_order() {
        let mut units: Vec<_> = (0..23).map(|idx| unit(&format!("unit {idx}"), &format!("{idx:032}"))).collect();
        let members = |units: &[Unit], count| -> Vec<Vec<String>> {
            let shares = (1..=count).map(|index| Shard { index, count }.members(units));
            let share = |share: Vec<bool>| units.iter().zip(share).filter(|(_, own)| *own).map(|(unit, _)| unit.key());
            let sorted = |mut keys: Vec<String>| {
                keys.sort();
                keys
            };
            shares.map(|own| sorted(share(own).collect())).collect()
        };
        for count in [1, 2, 5, 23, 40] {
            let shares = members(&units, count);
            let mut all = shares.concat();
            all.sort();
            all.dedup();
            assert_eq!(all.len(), units.len(), "each once");
            let sizes = shares.iter().map(Vec::len);
            assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
            units.reverse();
            assert_eq!(members(&units, count), shares);
        }
    }

    #[test]
    fn shard_is_named_from_one() {
        for text in ["0/4", "5/4", "1", "1/0", "a/b", "-1/2", ""] {
            let message = text.parse::<Shard>().unwrap_err().to_string();
            assert!(message.contains(&format!("got `{text}`")), "{message}");
        }
        assert_eq!("4/4".parse::<Shard>().unwrap().to_string(), "4/4");
    }
}
