//! One instance in many threads, and many instances beside each other, whatever the kind of plugin.

use std::fmt;
use std::thread;

use crate::outcome::{Cases, Check, panic_text};

const THREADS: usize = 8;

/// A plugin under test that turns trials into something, and back.
pub(crate) trait Subject: Sync {
    /// What it encodes, with its context.
    type Trial: fmt::Display + Sync;
    /// What it encodes it to.
    type Encoded: Sync;

    /// Encodes a trial.
    fn encode(&self, trial: &Self::Trial) -> Check<Self::Encoded>;
    /// Decodes and compares with the trial.
    fn decode(&self, trial: &Self::Trial, encoded: &Self::Encoded) -> Check;
    /// Says where two outputs differ, if the plugin declares that they do not.
    fn agree(&self, expected: &Self::Encoded, got: &Self::Encoded) -> Check;

    /// Encodes, decodes and compares; returns what was encoded.
    fn round_trip(&self, trial: &Self::Trial) -> Check<Self::Encoded> {
        let encoded = self.encode(trial)?;
        self.decode(trial, &encoded)?;
        Ok(encoded)
    }
}

/// Eight threads that share one instance round-trip every trial, to the same output as one thread.
pub(crate) fn threads_agree<S: Subject>(cases: &mut Cases, subject: &S, trials: Vec<S::Trial>) -> Check {
    let mut alone = Vec::new();
    for trial in trials {
        let encoded = cases.check(&trial, || subject.round_trip(&trial))?;
        alone.push((trial, encoded));
    }
    // Each thread begins at another trial, so that different ones meet in the instance.
    let worker = |first: usize| {
        let (late, early) = alone.split_at(first * alone.len() / THREADS);
        for (trial, expected) in early.iter().chain(late) {
            let found = subject.round_trip(trial).and_then(|got| subject.agree(expected, &got));
            found.map_err(|found| format!("{trial}, thread {first} of {THREADS}: {found}"))?;
        }
        Ok(())
    };
    for result in thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|first| scope.spawn(move || worker(first))).collect();
        threads.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>()
    }) {
        cases.check("all trials in one thread", || result.unwrap_or_else(|panic| Err(panic_text(panic.as_ref()))))?;
    }
    Ok(())
}

/// Two instances give the same output, and one gives it again after other work; each decodes that of the other.
pub(crate) fn instances_agree<S: Subject>(cases: &mut Cases, [one, other]: [&S; 2], trials: Vec<S::Trial>) -> Check {
    let mut before = Vec::new();
    for trial in trials {
        let encoded = cases.check(&trial, || {
            let encoded = one.round_trip(&trial)?;
            other.decode(&trial, &encoded)?;
            Ok(encoded)
        })?;
        before.push((trial, encoded));
    }
    // Backwards, so that the second instance meets each trial in another state.
    for (trial, expected) in before.iter().rev() {
        for (name, subject) in [("the same instance", one), ("a second instance", other)] {
            cases.check(format!("{trial}, {name}"), || subject.agree(expected, &subject.encode(trial)?))?;
        }
    }
    Ok(())
}
