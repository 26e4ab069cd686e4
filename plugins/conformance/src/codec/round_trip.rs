//! Exactness: what is decoded is what was encoded.

use gearbox_core::{Codec, Elem, Entry, Shape};
use serde_json::Value;

use super::Subject;
use crate::Outcome;
use crate::data::DataKind;

const SEQ: [usize; 10] = [0, 1, 2, 15, 16, 17, 127, 128, 129, 1000];
const HEADS: [usize; 2] = [1, 8];
const DIM: [usize; 4] = [1, 64, 80, 128];

/// Every shape of the grid decodes to what was encoded.
///
/// Small shapes run with every declared element type, large ones with one each in turn, on walk data.
pub fn round_trip_is_exact_over_shapes(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("round_trip_is_exact_over_shapes", |cases| {
        let subject = Subject::new(entry, settings)?;
        let (all, typical) = (subject.elements()?, subject.typical_elements()?);
        for (s, seq) in SEQ.into_iter().enumerate() {
            for (h, heads) in HEADS.into_iter().enumerate() {
                for (d, dim) in DIM.into_iter().enumerate() {
                    let shape = Shape::new(seq, heads, dim);
                    // Turned by one per length, or a type would always meet the same heads and channels.
                    let turn = (s + h * DIM.len() + d) % typical.len();
                    let elems = match shape.elements() {
                        0..=1024 => all.as_slice(),
                        1025..=8192 => &typical,
                        _ => &typical[turn..=turn],
                    };
                    for elem in elems {
                        let trial = subject.trial_of(*elem, shape, DataKind::Walk);
                        cases.check(&trial.case, || trial.round_trip(&*subject.codec))?;
                    }
                }
            }
        }
        Ok(())
    })
}

/// Every kind of data decodes to what was encoded, for every declared element type: NaN payloads, ±0, subnormals and ±Inf among them.
pub fn round_trip_is_exact_over_data(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    let shapes = [Shape::new(1, 1, 1), Shape::new(2, 1, 64), Shape::new(7, 3, 5), Shape::new(33, 2, 32)];
    Outcome::of("round_trip_is_exact_over_data", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.elements()? {
            for kind in DataKind::ALL {
                let complete = kind == DataKind::Patterns && (elem.dtype().is_some() || elem == Elem::U16);
                for shape in shapes.into_iter().chain(complete.then_some(DataKind::PATTERNS_SHAPE)) {
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
    let shapes =
        [Shape::new(0, 8, 128), Shape::new(0, 1, 1), Shape::new(5, 0, 64), Shape::new(5, 8, 0), Shape::new(0, 0, 0)];
    Outcome::of("empty_lanes_round_trip", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.elements()? {
            for shape in shapes {
                let trial = subject.trial_of(elem, shape, DataKind::Walk);
                cases.check(&trial.case, || trial.round_trip(&*subject.codec))?;
            }
        }
        Ok(())
    })
}
