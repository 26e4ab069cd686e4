//! What a property found.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What one property found: how much it tried, and the first counter-example.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Outcome {
    /// Name of the property, which is the name of its function.
    pub property: &'static str,
    /// Cases tried, the failing one included; zero if the property asks nothing of this plugin.
    pub cases: usize,
    /// The first counter-example, with shape, element type and seed.
    pub failure: Option<String>,
}

impl Outcome {
    /// Whether there is no counter-example.
    pub fn passed(&self) -> bool {
        self.failure.is_none()
    }

    /// Ends a test.
    ///
    /// # Panics
    /// With the counter-example, if there is one.
    pub fn expect_passed(self) {
        assert!(self.passed(), "{self}");
    }

    /// Runs a property; a panic outside of any case is a counter-example too.
    pub(crate) fn of(property: &'static str, body: impl FnOnce(&mut Cases) -> Check) -> Self {
        let mut cases = Cases(0);
        let failure = unwound(|| body(&mut cases)).err();
        Self { property, cases: cases.0, failure }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.failure {
            None => write!(f, "{}: passed, {} cases", self.property, self.cases),
            Some(failure) => write!(f, "{}: failed in case {}: {failure}", self.property, self.cases),
        }
    }
}

/// One check: the error is what was found instead, as text.
pub(crate) type Check<T = ()> = Result<T, String>;

/// Counts the cases of a property.
pub(crate) struct Cases(usize);

impl Cases {
    /// Tries one case; a panic is a counter-example.
    pub(crate) fn check<T>(&mut self, case: impl fmt::Display, work: impl FnOnce() -> Check<T>) -> Check<T> {
        self.0 += 1;
        unwound(work).map_err(|found| format!("{case}: {found}"))
    }
}

fn unwound<T>(work: impl FnOnce() -> Check<T>) -> Check<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| Err(panic_text(payload.as_ref())))
}

/// What a panic said.
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("no message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_counter_example_ends_the_property() {
        let outcome = Outcome::of("p", |cases| {
            cases.check("one", || Ok(()))?;
            cases.check("two", || Err::<(), _>("expected 1, got 2".to_owned()))?;
            cases.check("three", || Ok(()))
        });
        assert_eq!(outcome.to_string(), "p: failed in case 2: two: expected 1, got 2");
    }

    #[test]
    fn panic_is_a_counter_example() {
        let outcome = Outcome::of("p", |cases| cases.check("one", || panic!("at {}", 7)));
        assert_eq!(outcome.failure.as_deref(), Some("one: panicked: at 7"));
        let outcome = Outcome::of("p", |_| panic!("early"));
        assert_eq!(outcome.to_string(), "p: failed in case 0: panicked: early");
    }
}
