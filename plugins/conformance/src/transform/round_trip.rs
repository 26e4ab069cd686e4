//! What comes back: every bit, or values within the declared bound.

use gearbox_core::{DType, Elem, Entry, ErrorKind, Latents, LossyTransform, Role, Shape, bits};
use serde_json::Value;

use super::{Subject, Trial};
use crate::Outcome;
use crate::data::{Case, DATA_SHAPES, DataKind, EMPTY_SHAPES, SplitMix64, collect, grid, mantissa, width};
use crate::outcome::Check;
use crate::sharing::Subject as _;

/// Every shape of the grid comes back within the bound, as values and as keys, on walk data.
pub fn round_trip_keeps_the_bound_over_shapes(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("round_trip_keeps_the_bound_over_shapes", |cases| {
        let subject = Subject::new(entry, settings)?;
        let elems = subject.elements()?;
        for trial in
            grid(&elems, &elems).into_iter().flat_map(|(elem, shape)| subject.trials_of(elem, shape, DataKind::Walk))
        {
            cases.check(&trial, || subject.round_trip(&trial))?;
        }
        Ok(())
    })
}

/// Every kind of data comes back within the bound, and what is not finite as it was; see [`Bound`](gearbox_core::Bound).
pub fn round_trip_keeps_the_bound_over_data(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("round_trip_keeps_the_bound_over_data", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.elements()? {
            for kind in DataKind::ALL {
                let complete = (kind == DataKind::Patterns).then_some(DataKind::PATTERNS_SHAPE);
                for trial in
                    DATA_SHAPES.into_iter().chain(complete).flat_map(|shape| subject.trials_of(elem, shape, kind))
                {
                    cases.check(&trial, || subject.round_trip(&trial))?;
                }
            }
        }
        Ok(())
    })
}

/// Where the numbers of a chunk lie, for bounds that are relative to them.
#[derive(Clone, Copy, Debug)]
enum Span {
    /// All subnormal.
    Subnormal,
    /// Next to the largest finite number, of both signs.
    Huge,
    /// Next to the smallest normal number, of one sign.
    Tiny,
    /// Each channel a few steps around a value of its own.
    Narrow,
    /// Each channel one value.
    Still,
    /// Small numbers, and one in fifty the largest.
    Spiky,
    /// Each channel of another magnitude, over all exponents.
    Wide,
}

impl Span {
    const ALL: [Self; 7] =
        [Self::Subnormal, Self::Huge, Self::Tiny, Self::Narrow, Self::Still, Self::Spiky, Self::Wide];

    fn bytes(self, case: &Case) -> Vec<u8> {
        let (elem, shape) = (case.spec.elem, case.spec.shape);
        let (sign, mantissa) = (1u32 << (width(elem) - 1), mantissa(elem).unwrap_or_default());
        let infinity = sign - (1 << mantissa);
        let mut random = SplitMix64::new(case.seed);
        // Room for a few steps on each side.
        let values: Vec<u32> =
            (0..shape.row()).map(|_| 4 + random.below(infinity - 8) + random.below(2) * sign).collect();
        let elements = (0..shape.elements()).map(|element| {
            let own = values[element % values.len()];
            match self {
                Self::Subnormal => random.below(1 << mantissa) + random.below(2) * sign,
                Self::Huge => infinity - 1 - random.below(5) + random.below(2) * sign,
                Self::Tiny => (1 << mantissa) + random.below(5),
                Self::Narrow => own - 2 + random.below(5),
                Self::Still => own,
                Self::Spiky if random.below(50) == 0 => infinity - 1,
                Self::Spiky => infinity / 2 + random.below(1 << mantissa),
                Self::Wide => own & (sign | infinity) | random.below(1 << mantissa),
            }
        });
        collect(elem, elements)
    }
}

/// Chunks of subnormal, huge, tiny, nearly equal and very different numbers come back within the bound.
pub fn round_trip_keeps_the_bound_over_magnitudes(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("round_trip_keeps_the_bound_over_magnitudes", |cases| {
        let subject = Subject::new(entry, settings)?;
        let shapes = [Shape::new(1, 1, 80), Shape::new(40, 2, 33), Shape::new(130, 1, 7)];
        for elem in subject.elements()? {
            for (span, shape) in Span::ALL.into_iter().flat_map(|span| shapes.map(|shape| (span, shape))) {
                for trial in subject.trials_of(elem, shape, DataKind::Walk) {
                    let trial = Trial { bytes: span.bytes(&trial.case), ..trial };
                    cases.check(format!("{trial}, but {span:?} numbers"), || subject.round_trip(&trial))?;
                }
            }
        }
        Ok(())
    })
}

/// A chunk without elements comes back, whichever extent is zero.
pub fn empty_chunks_round_trip(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("empty_chunks_round_trip", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.elements()? {
            for trial in EMPTY_SHAPES.into_iter().flat_map(|shape| subject.trials_of(elem, shape, DataKind::Walk)) {
                cases.check(&trial, || subject.round_trip(&trial))?;
            }
        }
        Ok(())
    })
}

/// Lanes have names that a container takes, legal widths, and no element above its width.
pub fn lanes_are_well_formed(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("lanes_are_well_formed", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.elements()? {
            for kind in DataKind::ALL {
                for trial in subject.trials_of(elem, Shape::new(21, 2, 16), kind) {
                    cases.check(&trial, || well_formed(&subject.encode(&trial)?))?;
                }
            }
        }
        Ok(())
    })
}

fn well_formed(latents: &Latents) -> Check {
    for lane in latents.lanes() {
        let name = &lane.spec.name;
        if name.is_empty() || name.len() > 255 || name.contains('.') {
            return Err(format!("expected a name of 1 to 255 bytes without `.`, got `{name}`"));
        }
        if let Elem::Bits(width) = lane.spec.elem {
            bits::pack(width, &lane.bytes, &mut Vec::new()).map_err(|error| format!("{}: {error}", lane.spec))?;
        }
    }
    Ok(())
}

/// Inverse writes every byte of its target, whatever is there before.
pub fn inverse_fills_every_byte(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("inverse_fills_every_byte", |cases| {
        let subject = Subject::new(entry, settings)?;
        for trial in subject.varied_trials()? {
            cases.check(&trial, || {
                let latents = subject.encode(&trial)?;
                let expected = trial.inverse(&*subject.transform, &latents)?;
                for before in [0x00, 0xFF, 0x55] {
                    let mut out = vec![before; trial.bytes.len()];
                    let filled = trial.invert(&*subject.transform, &latents, &mut out);
                    filled.map_err(|error| format!("inverse over bytes {before:#04x} fails: {error}"))?;
                    crate::codec::same(&expected, &out, trial.case.spec.elem.size())
                        .map_err(|found| format!("over bytes {before:#04x}: {found}"))?;
                }
                Ok(())
            })?;
        }
        Ok(())
    })
}

/// Tensors of undeclared types are refused by forward as [`ErrorKind::Unsupported`] or [`ErrorKind::UnsupportedDType`], and by inverse.
pub fn undeclared_dtypes_are_refused(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("undeclared_dtypes_are_refused", |cases| {
        let subject = Subject::new(entry, settings)?;
        let undeclared = DType::ALL.into_iter().map(Elem::from).filter(|elem| !subject.declared.elems.contains(*elem));
        for elem in undeclared {
            let trial = subject.trial(Case::new(elem, Shape::new(5, 2, 4), DataKind::Walk, 5), Role::Value);
            cases.check(&trial, || {
                let mut latents = Latents::new();
                match trial.chunk().and_then(|chunk| subject.transform.forward(chunk, &trial.context(), &mut latents)) {
                    Ok(()) => {
                        Err(format!("expected forward to refuse it, since only {} is declared", subject.declared.elems))
                    }
                    Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::UnsupportedDType) => {
                        Ok(())
                    }
                    Err(error) => {
                        Err(format!("expected `Unsupported` or `UnsupportedDType`, got `{:?}`: {error}", error.kind()))
                    }
                }?;
                match trial.inverse(&*subject.transform, &Latents::new()) {
                    Ok(_) => {
                        Err(format!("expected inverse to refuse it, since only {} is declared", subject.declared.elems))
                    }
                    Err(_) => Ok(()),
                }
            })?;
        }
        Ok(())
    })
}
