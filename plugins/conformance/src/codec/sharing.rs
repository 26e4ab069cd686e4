//! One instance in many threads, and many instances beside each other.

use gearbox_core::{Codec, Entry, Shape};
use serde_json::Value;

use super::{Subject, Trial};
use crate::data::DataKind;
use crate::outcome::Check;
use crate::{Outcome, sharing};

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
        sharing::threads_agree(cases, &subject, trials(&subject)?)
    })
}

/// Two instances write the same bytes, and one writes them again after other work; each decodes what the other wrote.
///
/// Codecs that do not declare to be deterministic are asked only the last.
pub fn instances_agree(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("instances_agree", |cases| {
        let (subject, other) = (Subject::new(entry, settings)?, Subject::new(entry, settings)?);
        sharing::instances_agree(cases, [&subject, &other], trials(&subject)?)
    })
}

impl sharing::Subject for Subject {
    type Trial = Trial;
    type Encoded = Vec<u8>;

    fn encode(&self, trial: &Trial) -> Check<Vec<u8>> {
        trial.encode(&*self.codec)
    }

    fn decode(&self, trial: &Trial, encoded: &Vec<u8>) -> Check {
        trial.compare(&trial.decode(&*self.codec, encoded)?)
    }

    fn agree(&self, expected: &Vec<u8>, got: &Vec<u8>) -> Check {
        if !self.deterministic || expected == got {
            return Ok(());
        }
        let place = expected.iter().zip(got).position(|(a, b)| a != b).unwrap_or(expected.len().min(got.len()));
        let lens = (expected.len(), got.len());
        Err(format!(
            "declared deterministic, but encodes to {} bytes and then to {}, different from byte {place} on",
            lens.0, lens.1
        ))
    }
}
