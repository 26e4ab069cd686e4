//! Logarithmic axes with a band for zeros, which a logarithm has no place for.

/// Height of the band.
pub(super) const BAND: f64 = 44.0;

/// A logarithmic axis between two places of a picture.
#[derive(Debug)]
pub(super) struct Axis {
    from: f64,
    to: f64,
    low: f64,
    high: f64,
    /// Whether there are zeros, which lie in the band at the low end.
    pub zeros: bool,
}

impl Axis {
    /// An axis that has a place for each of these numbers; negative ones and NaN have none.
    pub fn new(numbers: impl Iterator<Item = f64> + Clone, from: f64, to: f64) -> Self {
        let zeros = numbers.clone().any(|number| number == 0.0);
        let positive = numbers.filter(|number| *number > 0.0 && number.is_finite());
        let (low, high) = positive.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), number| {
            (low.min(number.log10()), high.max(number.log10()))
        });
        let (low, high) = if low > high { (0.0, 0.0) } else { (low, high) };
        let slack = ((high - low) * 0.06).max(0.03);
        Self { from, to, low: low - slack, high: high + slack, zeros }
    }

    /// Where the numbers above zero begin.
    pub fn start(&self) -> f64 {
        if self.zeros { self.from + BAND * (self.to - self.from).signum() } else { self.from }
    }

    /// The place of a number.
    pub fn at(&self, number: f64) -> f64 {
        if number > 0.0 {
            self.start() + (number.log10() - self.low) / (self.high - self.low) * (self.to - self.start())
        } else {
            self.from + BAND / 2.0 * (self.to - self.from).signum()
        }
    }

    /// Round numbers along it.
    pub fn ticks(&self) -> Vec<f64> {
        let steps: &[f64] = match self.high - self.low {
            span if span > 5.0 => &[1.0],
            span if span > 1.2 => &[1.0, 2.0, 5.0],
            span if span > 0.5 => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
            _ => &[1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.0],
        };
        let powers = self.low.floor() as i32..=self.high.floor() as i32;
        let ticks = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
        ticks.filter(|tick| (self.low..=self.high).contains(&tick.log10())).collect()
    }
}

/// A number with three digits that count.
pub(super) fn short(number: f64) -> String {
    if number == 0.0 {
        return "0".into();
    }
    let power = number.abs().log10().floor() as i32;
    if (-3..6).contains(&power) {
        let decimals = usize::try_from(2 - power).unwrap_or(0);
        let text = format!("{number:.decimals$}");
        let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
        return text.to_owned();
    }
    let digits = format!("{:.1}", number / 10f64.powi(power));
    let digits = digits.trim_end_matches(".0");
    let power: String = power.to_string().chars().map(superscript).collect();
    if digits == "1" { format!("10{power}") } else { format!("{digits}·10{power}") }
}

fn superscript(character: char) -> char {
    let digits = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    character.to_digit(10).and_then(|digit| digits.get(digit as usize).copied()).unwrap_or('⁻')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits_that_count() {
        let texts = [0.0, 1.0, 16.0, 0.01, 0.004_321, 1234.5, 1e-4, 2.5e-5, 3e7].map(short);
        assert_eq!(texts, ["0", "1", "16", "0.01", "0.00432", "1234", "10⁻⁴", "2.5·10⁻⁵", "3·10⁷"]);
    }

    #[test]
    fn zeros_have_a_band_and_every_number_its_place() {
        let numbers = [0.0, 1e-4, 1e-2, 1.0];
        let axis = Axis::new(numbers.into_iter(), 400.0, 0.0);
        let places = numbers.map(|number| axis.at(number));
        assert!(axis.zeros && places.is_sorted_by(|a, b| a > b), "{places:?}");
        assert!(places[0] > axis.start() && places[1] < axis.start() && places[3] > 0.0, "{places:?}");
        assert_eq!(axis.ticks().len(), 13);
        // One number, or none, is no reason to divide by zero.
        assert!(Axis::new([3.0].into_iter(), 0.0, 100.0).at(3.0).is_finite());
        assert!(Axis::new([].into_iter(), 0.0, 100.0).at(3.0).is_finite());
    }
}
