//! One instance in many threads, and many instances beside each other.

use std::thread;

use gearbox_core::{Codec, Entry, Shape};
use serde_json::Value;

use super::{Subject, Trial};
use crate::Outcome;
use crate::data::DataKind;
use crate::outcome::{Check, panic_text};

const THREADS: usize = 8;

fn trials(subject: &Subject) -> Check<Vec<Trial>> {
    let shapes = [Shape::new(17, 2, 64), Shape::new(2, 1, 5), Shape::new(40, 2, 32)];
    let kinds = [DataKind::Walk, DataKind::Repeats, DataKind::Noise];
    let elems = subject.typical_elements()?;
    Ok(elems
        .into_iter()
        .flat_map(|elem| shapes.into_iter().zip(kinds).map(move |(shape, kind)| (elem, shape, kind)))
        .map(|(elem, shape, kind)| subject.trial_of(elem, shape, kind))
        .collect())
}

/// Eight threads that share one instance round-trip every lane, to the same bytes as one thread if the codec is deterministic.
pub fn eight_threads_share_one_instance(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("eight_threads_share_one_instance", |cases| {
        let subject = Subject::new(entry, settings)?;
        let mut alone = Vec::new();
        for trial in trials(&subject)? {
            let encoded = cases.check(&trial.case, || trial.round_trip(&*subject.codec))?;
            alone.push((trial, encoded));
        }
        // Each thread begins at another lane, so that different lanes meet in the instance.
        let worker = |first: usize| {
            let (late, early) = alone.split_at(first * alone.len() / THREADS);
            for (trial, expected) in early.iter().chain(late) {
                let found = trial.round_trip(&*subject.codec).and_then(|got| agrees(&subject, expected, &got));
                found.map_err(|found| format!("{}, thread {first} of {THREADS}: {found}", trial.case))?;
            }
            Ok(())
        };
        for result in thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|first| scope.spawn(move || worker(first))).collect();
            threads.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>()
        }) {
            cases
                .check("all lanes in one thread", || result.unwrap_or_else(|panic| Err(panic_text(panic.as_ref()))))?;
        }
        Ok(())
    })
}

/// Two instances write the same bytes, and one writes them again after other work; each decodes what the other wrote.
///
/// Codecs that do not declare to be deterministic are asked only the last.
pub fn instances_agree(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("instances_agree", |cases| {
        let (subject, other) = (Subject::new(entry, settings)?, Subject::new(entry, settings)?);
        let mut before = Vec::new();
        for trial in trials(&subject)? {
            let encoded = cases.check(&trial.case, || {
                let encoded = trial.round_trip(&*subject.codec)?;
                trial.compare(&trial.decode(&*other.codec, &encoded)?)?;
                Ok(encoded)
            })?;
            before.push((trial, encoded));
        }
        // Backwards, so that the second instance meets each lane in another state.
        for (trial, expected) in before.iter().rev() {
            for (name, subject) in [("the same instance", &subject), ("a second instance", &other)] {
                cases.check(format!("{}, {name}", trial.case), || {
                    agrees(subject, expected, &trial.encode(&*subject.codec)?)
                })?;
            }
        }
        Ok(())
    })
}

fn agrees(subject: &Subject, expected: &[u8], got: &[u8]) -> Check {
    if !subject.deterministic || expected == got {
        return Ok(());
    }
    let place = expected.iter().zip(got).position(|(a, b)| a != b).unwrap_or(expected.len().min(got.len()));
    let lens = (expected.len(), got.len());
    Err(format!(
        "declared deterministic, but encodes to {} bytes and then to {}, different from byte {place} on",
        lens.0, lens.1
    ))
}
