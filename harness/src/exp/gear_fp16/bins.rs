//! Groups of prompt lengths.

use std::str::FromStr;

/// Groups in the order in which they were given; they may overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bins(Vec<Bin>);

/// One group: prompt tokens from `low` to `high`, both included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bin {
    /// As it was given.
    pub text: String,
    low: u64,
    high: u64,
}

impl Bin {
    pub fn holds(&self, prompt_tokens: u64) -> bool {
        (self.low..=self.high).contains(&prompt_tokens)
    }
}

impl Bins {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Bin> {
        self.0.iter()
    }
}

impl FromStr for Bins {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let bins: Vec<_> = parts.map(Bin::from_str).collect::<Result<_, _>>()?;
        if bins.is_empty() { Err("expected at least one bin, got none".to_owned()) } else { Ok(Self(bins)) }
    }
}

impl FromStr for Bin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let range = match text.strip_suffix('+') {
            Some(low) => low.trim().parse().ok().map(|low| (low, u64::MAX)),
            None => {
                text.split_once('-').and_then(|(low, high)| Some((low.trim().parse().ok()?, high.trim().parse().ok()?)))
            }
        };
        match range {
            Some((low, high)) if low <= high => Ok(Self { text: text.to_owned(), low, high }),
            _ => Err(format!("bin `{text}`: expected `LOW-HIGH` with LOW not above HIGH, or `LOW+`")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_belong_to_a_bin() {
        let bins: Bins = "0-256, 257-512,,2049+".parse().unwrap();
        let holding =
            |tokens| bins.iter().filter(|bin| bin.holds(tokens)).map(|bin| bin.text.as_str()).collect::<Vec<_>>();
        assert_eq!(holding(0), ["0-256"]);
        assert_eq!(holding(256), ["0-256"]);
        assert_eq!(holding(257), ["257-512"]);
        assert!(holding(600).is_empty(), "gaps hold nothing");
        assert_eq!(holding(u64::MAX), ["2049+"]);
    }

    #[test]
    fn malformed_bins_are_named() {
        for bad in ["5-1", "-5", "1-", "x", "1-2-3", "+"] {
            let message = format!("0-1,{bad}").parse::<Bins>().unwrap_err();
            assert!(message.starts_with(&format!("bin `{bad}`: expected")), "{message}");
        }
        assert!(" , ".parse::<Bins>().is_err());
    }
}
