//! Exactness: what is decoded is what was encoded.

use gearbox_core::{Codec, Elem, Entry};
use serde_json::Value;

use super::Subject;
use crate::Outcome;
use crate::data::{DATA_SHAPES, DataKind, EMPTY_SHAPES, grid};

/// Every shape of the grid decodes to what was encoded.
///
/// Small shapes run with every declared element type, large ones with one each in turn, on walk data.
pub fn round_trip_is_exact_over_shapes(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("round_trip_is_exact_over_shapes", |cases| {
        let subject = Subject::new(entry, settings)?;
        for (elem, shape) in grid(&subject.elements()?, &subject.typical_elements()?) {
            let trial = subject.trial_of(elem, shape, DataKind::Walk);
            cases.check(&trial.case, || trial.round_trip(&*subject.codec))?;
        }
        Ok(())
    })
}

/// Every kind of data decodes to what was encoded, for every declared element type: NaN payloads, ±0, subnormals and ±Inf among them.
pub fn round_trip_is_exact_over_data(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("round_trip_is_exact_over_data", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.elements()? {
            for kind in DataKind::ALL {
                let complete = kind == DataKind::Patterns && (elem.dtype().is_some() || elem == Elem::U16);
                for shape in DATA_SHAPES.into_iter().chain(complete.then_some(DataKind::PATTERNS_SHAPE)) {
                    let trial = subject.trial_of(elem, shape, kind);
                    cases.check(&trial.case, || trial.round_trip(&*subject.codec))?;
                }
            }
        }
        Ok(())
    })
}

/// A lane without elements decodes to nothing, whichever extent is zero.
pub fn empty_lanes_round_trip(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("empty_lanes_round_trip", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.elements()? {
            for shape in EMPTY_SHAPES {
                let trial = subject.trial_of(elem, shape, DataKind::Walk);
                cases.check(&trial.case, || trial.round_trip(&*subject.codec))?;
            }
        }
        Ok(())
    })
}
