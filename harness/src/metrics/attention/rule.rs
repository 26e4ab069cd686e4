//! How logits are made of products, and which tokens a query sees.
#![expect(clippy::inline_always, reason = "what is not inlined into the dispatch is compiled without its vectors")]

use gearbox_core::{Error, Result};

use super::softmax::{exp, expm1};
use crate::dump::AttentionFacts;

/// The rule of a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// What products are multiplied with.
    pub scale: f32,
    softcap: Option<Softcap>,
    /// How far a query sees.
    window: Option<u64>,
}

impl Rule {
    /// The usual one without facts.
    pub(super) fn of(facts: Option<AttentionFacts>, dim: usize) -> Result<Self> {
        let Some(AttentionFacts { scale, softcap, window }) = facts else {
            return Ok(Self { scale: 1.0 / (dim as f32).sqrt(), softcap: None, window: None });
        };
        facts
            .map_or(Ok(()), |facts| facts.check())
            .map_err(|message| Error::invalid_input(message).context("attention"))?;
        Ok(Self { scale: scale as f32, softcap: softcap.map(Softcap), window })
    }

    /// Turns finite products into logits, where there is a softcap.
    #[inline(always)]
    pub(super) fn cap(&self, products: &mut [f32]) {
        if let Some(softcap) = self.softcap {
            softcap.cap(products);
        }
    }

    /// Turns finite changes of products into changes of logits, where there is a softcap; says whether there is.
    #[inline(always)]
    pub(super) fn cap_changes(&self, products: &[f32], changes: &mut [f32]) -> bool {
        let Some(softcap) = self.softcap else { return false };
        softcap.cap_changes(products, changes);
        true
    }

    /// Tokens in front of those that a query at a position sees, where `up_to` counts the tokens up to a position.
    pub(super) fn hidden(&self, position: u64, up_to: impl Fn(u64) -> usize) -> usize {
        self.window.and_then(|window| position.checked_sub(window)).map_or(0, up_to)
    }
}

/// Logits `z` become `c·tanh(z / c)`.
///
/// A change `δ` of `z` becomes `c·(tanh((z + δ) / c) - tanh(z / c))`, which is not computed as that difference. With `b = z / c`, `d = δ / c`
/// and `a = b + d` it is `sinh(d) / (cosh(a) cosh(b))`, and of exponentials that cannot overflow
///
/// `±2 (1 - exp(-2|d|)) exp(|d| - |a| - |b|) / ((1 + exp(-2|a|)) (1 + exp(-2|b|)))`
///
/// with the sign of `d`. So no change gives exactly zero, and a small one keeps its digits wherever on the curve it is.
#[derive(Clone, Copy, Debug)]
struct Softcap(f64);

impl Softcap {
    /// Turns finite products, already scaled, into logits.
    #[inline(always)]
    fn cap(self, logits: &mut [f32]) {
        let inverse = 1.0 / self.0;
        for logit in logits {
            let b = f64::from(*logit) * inverse;
            let below = expm1(-2.0 * b.abs());
            *logit = (self.0 * (-below / (2.0 + below)).copysign(b)) as f32;
        }
    }

    /// Turns finite changes of products, before these are capped, into changes of logits.
    #[inline(always)]
    fn cap_changes(self, products: &[f32], changes: &mut [f32]) {
        let inverse = 1.0 / self.0;
        for (product, change) in products.iter().zip(changes) {
            let (b, d) = (f64::from(*product) * inverse, f64::from(*change) * inverse);
            let a = b + d;
            // |d| - |a| - |b|: on both sides of zero nothing is left of it.
            let exponent = if (a > 0.0) == (b > 0.0) { -2.0 * a.abs().min(b.abs()) } else { 0.0 };
            let upper = -expm1(-2.0 * d.abs()) * exp(exponent);
            let lower = (1.0 + exp(-2.0 * a.abs())) * (1.0 + exp(-2.0 * b.abs()));
            *change = (self.0 * (2.0 * upper / lower).copysign(d)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caps_are_those_of_the_platform() {
        for cap in [0.5, 30.0, 50.0] {
            for i in -4000..=4000_i16 {
                let product = f32::from(i) * 0.037;
                let mut logits = [product];
                Softcap(cap).cap(&mut logits);
                let expected = (cap * (f64::from(product) / cap).tanh()) as f32;
                assert!(
                    (logits[0] - expected).abs() <= expected.abs() * f32::EPSILON,
                    "{product}: {logits:?} {expected}"
                );
            }
        }
    }

    #[test]
    fn changes_keep_their_digits_wherever_they_are_on_the_curve() {
        let changed = |product: f32, change: f32| {
            let mut changes = [change];
            Softcap(2.0).cap_changes(&[product], &mut changes);
            f64::from(changes[0])
        };
        let close = |got: f64, expected: f64| (got / expected - 1.0).abs() <= 2.0 * f64::from(f32::EPSILON);
        // The slope is 1 - tanh², far out 4·exp(-2|z / c|); a difference of two results would have no digit left of these.
        for product in [0.0, 0.75, -3.0, 20.0, -40.0] {
            let b = f64::from(product / 2.0);
            let slope = 1.0 / b.cosh().powi(2);
            for change in [1e-7, -1e-7_f32] {
                assert!(close(changed(product, change), f64::from(change) * slope), "{product} {change}");
            }
        }
        // Large ones, where the difference of two results is as good.
        for (product, change) in [(0.5, 1.0), (1.0, -3.0), (-2.0, 1.5), (-1.0, 900.0), (3.0, -4000.0)] {
            let (b, d) = (f64::from(product / 2.0), f64::from(change / 2.0));
            assert!(close(changed(product, change), 2.0 * ((b + d).tanh() - b.tanh())), "{product} {change}");
        }
        for product in [0.0, 5.0, -1e30] {
            assert_eq!(changed(product, 0.0).abs().to_bits(), 0);
        }
        assert_eq!((changed(1e30, -1e30), changed(1e30, 1e30)), (-2.0, 0.0));
    }

    #[test]
    fn facts_that_cannot_be_are_refused() {
        let facts = AttentionFacts { window: Some(0), ..AttentionFacts::usual(4) };
        let error = Rule::of(Some(facts), 4).unwrap_err();
        assert_eq!(error.to_string(), "attention: expected a `window` of at least 1, got 0");
    }
}
