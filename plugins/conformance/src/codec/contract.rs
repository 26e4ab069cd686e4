//! What the [`Codec`] trait promises about buffers, lengths, element types and context.

use gearbox_core::{Codec, Elem, Entry, ErrorKind, LaneRef, LaneSpec, Shape};
use serde_json::Value;

use super::{Subject, Trial};
use crate::Outcome;
use crate::data::{Case, DataKind, GUESSED, PARTS, WHOLE, elements, lane_spec};

/// Element counts 1, 40 and 1032, none of them a power of two above 1.
const SHAPES: [Shape; 3] = [Shape::new(1, 1, 1), Shape::new(5, 2, 4), Shape::new(43, 2, 12)];

/// Encode leaves what is in `out` alone, and appends the same bytes whatever is there; a codec that writes in place writes them too.
pub fn encode_appends(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("encode_appends", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.typical_elements()? {
            for shape in SHAPES.into_iter().chain([Shape::new(0, 2, 4)]) {
                let trial = subject.trial_of(elem, shape, DataKind::Walk);
                cases.check(&trial.case, || {
                    let alone = trial.encode(&*subject.codec)?;
                    for prefix in [vec![7; 1], (0..=255).collect::<Vec<u8>>(), alone.clone()] {
                        let mut out = prefix.clone();
                        trial
                            .lane()
                            .and_then(|lane| subject.codec.encode(lane, &trial.context(), &mut out))
                            .map_err(|error| format!("encode behind {} bytes fails: {error}", prefix.len()))?;
                        let appended = out.strip_prefix(prefix.as_slice());
                        let Some(appended) = appended else {
                            return Err(format!("the {} bytes that were in `out` are changed", prefix.len()));
                        };
                        if subject.deterministic && appended != alone {
                            return Err(format!("behind {} bytes it appends other bytes than alone", prefix.len()));
                        }
                        trial.compare(&trial.decode(&*subject.codec, appended)?)?;
                    }
                    let mut room = vec![0x5A; subject.codec.max_encoded_len(&trial.case.spec)];
                    let written = trial
                        .lane()
                        .and_then(|lane| subject.codec.encode_into(lane, &trial.context(), &mut room))
                        .map_err(|error| format!("encode_into fails: {error}"))?;
                    match written.map(|len| room.get(..len).ok_or(len)) {
                        None => Ok(()),
                        Some(Ok(written)) if subject.deterministic && written != alone => {
                            Err("encode_into writes other bytes than encode appends".to_owned())
                        }
                        Some(Ok(written)) => trial.compare(&trial.decode(&*subject.codec, written)?),
                        Some(Err(len)) => Err(format!("encode_into wrote {len} bytes to a buffer of {}", room.len())),
                    }
                })?;
            }
        }
        Ok(())
    })
}

/// Encode appends at most [`Codec::max_encoded_len`] bytes, and that can be asked for shapes that no memory holds.
pub fn max_encoded_len_holds(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("max_encoded_len_holds", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.elements()? {
            let mut trials: Vec<Trial> = Vec::new();
            for kind in DataKind::ALL {
                trials.extend(SHAPES.map(|shape| subject.trial_of(elem, shape, kind)));
            }
            trials.push(subject.trial_of(elem, Shape::new(0, 2, 4), DataKind::Zeros));
            trials.push(subject.trial_of(elem, Shape::new(70, 2, 64), DataKind::Noise));
            for trial in trials {
                cases.check(&trial.case, || {
                    let (most, got) =
                        (subject.codec.max_encoded_len(&trial.case.spec), trial.encode(&*subject.codec)?.len());
                    if got <= most { Ok(()) } else { Err(format!("expected at most {most} bytes, got {got}")) }
                })?;
            }
            for extent in [usize::MAX, usize::MAX / 16] {
                let spec = lane_spec(elem, Shape::new(extent, 2, 2));
                cases.check(&spec, || Ok(subject.codec.max_encoded_len(&spec)))?;
            }
        }
        Ok(())
    })
}

/// Decode writes every byte of `out`, whatever is there before.
pub fn decode_fills_every_byte(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("decode_fills_every_byte", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.typical_elements()? {
            for (shape, kind) in
                SHAPES.into_iter().flat_map(|shape| [(shape, DataKind::Walk), (shape, DataKind::Zeros)])
            {
                let trial = subject.trial_of(elem, shape, kind);
                cases.check(&trial.case, || {
                    let encoded = trial.encode(&*subject.codec)?;
                    for before in [0x00, 0xFF, 0x55] {
                        let mut out = vec![before; trial.bytes.len()];
                        subject
                            .codec
                            .decode(&encoded, &trial.case.spec, &trial.context(), &mut out)
                            .map_err(|error| format!("decode over bytes {before:#04x} fails: {error}"))?;
                        trial.compare(&out).map_err(|found| format!("over bytes {before:#04x}: {found}"))?;
                    }
                    Ok(())
                })?;
            }
        }
        Ok(())
    })
}

/// Decode refuses an `out` that is not as long as the lane, also if the shape is too large for any memory.
pub fn decode_rejects_wrong_lengths(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("decode_rejects_wrong_lengths", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.typical_elements()? {
            for shape in SHAPES.into_iter().chain([Shape::new(0, 2, 4)]) {
                let trial = subject.trial_of(elem, shape, DataKind::Walk);
                let encoded = cases.check(&trial.case, || trial.encode(&*subject.codec))?;
                let (spec, len) = (&trial.case.spec, trial.bytes.len());
                let huge = LaneSpec { shape: Shape::new(usize::MAX, 2, 2), ..spec.clone() };
                let tries = [
                    (spec, len + 1),
                    (spec, len + elem.size()),
                    (spec, 2 * len + 4),
                    (spec, len.saturating_sub(1)),
                    (spec, len.saturating_sub(elem.size())),
                    (spec, 0),
                    (&huge, len),
                ];
                for (spec, got) in tries.into_iter().filter(|(spec, got)| spec.byte_len() != *got) {
                    cases.check(format!("{}: {got} bytes for {spec}", trial.case), || {
                        let mut out = vec![0; got];
                        match subject.codec.decode(&encoded, spec, &trial.context(), &mut out) {
                            Ok(()) => Err(format!(
                                "expected an error, since the lane has {} bytes, got none",
                                spec.byte_len()
                            )),
                            Err(_) => Ok(()),
                        }
                    })?;
                }
            }
        }
        Ok(())
    })
}

/// Element types that are not declared are refused, by encode as [`ErrorKind::Unsupported`] or [`ErrorKind::UnsupportedDType`].
pub fn undeclared_elements_are_refused(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("undeclared_elements_are_refused", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in elements().into_iter().filter(|elem| !subject.elems.contains(*elem)) {
            let trial = subject.trial_of(elem, Shape::new(5, 2, 4), DataKind::Walk);
            cases.check(&trial.case, || {
                let mut out = vec![1, 2, 3];
                match trial.lane().and_then(|lane| subject.codec.encode(lane, &trial.context(), &mut out)) {
                    Ok(()) => {
                        return Err(format!("expected encode to refuse it, since only {} is declared", subject.elems));
                    }
                    Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::UnsupportedDType) => {}
                    Err(error) => {
                        return Err(format!(
                            "expected `Unsupported` or `UnsupportedDType`, got `{:?}`: {error}",
                            error.kind()
                        ));
                    }
                }
                if !out.starts_with(&[1, 2, 3]) {
                    return Err("the bytes that were in `out` are changed".to_owned());
                }
                match trial.decode(&*subject.codec, &trial.bytes) {
                    Ok(_) => Err(format!("expected decode to refuse it, since only {} is declared", subject.elems)),
                    Err(_) => Ok(()),
                }
            })?;
        }
        Ok(())
    })
}

/// A lane of [`Elem::Bits`] that holds a value above its width is refused by encode, or decoded exactly; never changed.
pub fn values_above_the_width_are_refused_or_kept(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("values_above_the_width_are_refused_or_kept", |cases| {
        let subject = Subject::new(entry, settings)?;
        let widths = (1..16).filter(|bits| *bits != 8).map(Elem::Bits);
        for elem in widths.filter(|elem| subject.elems.contains(*elem)) {
            for (shape, bad) in SHAPES.into_iter().flat_map(|shape| [(shape, 0), (shape, shape.elements() - 1)]) {
                let mut trial = subject.trial_of(elem, shape, DataKind::Walk);
                trial.bytes[bad * elem.size()..][..elem.size()].fill(0xFF);
                cases.check(format!("{}, all bits of element {bad} set", trial.case), || {
                    let mut out = Vec::new();
                    let encoded = LaneRef::new(&trial.case.spec, &trial.bytes)
                        .and_then(|lane| subject.codec.encode(lane, &trial.context(), &mut out));
                    if encoded.is_ok() { trial.compare(&trial.decode(&*subject.codec, &out)?) } else { Ok(()) }
                })?;
            }
        }
        Ok(())
    })
}

/// More context than declared changes no result; without a needed part encode and decode fail instead of guessing, without a wanted one
/// they work too.
pub fn needs_are_honoured(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("needs_are_honoured", |cases| {
        let subject = Subject::new(entry, settings)?;
        let (mut needs, mut wants) = (subject.needs, subject.wants);
        for elem in subject.typical_elements()? {
            let case = Case::new(elem, Shape::new(9, 2, 16), DataKind::Walk, 9);
            let trial = |parts| Trial { bytes: case.bytes(), around: case.surroundings(parts), case: case.clone() };
            let (rich, enough) = (trial(WHOLE), trial(needs));
            cases.check(format!("{case}, whole context"), || rich.round_trip(&*subject.codec))?;
            let encoded = cases.check(format!("{case}, needed context"), || enough.round_trip(&*subject.codec))?;
            for (name, part) in PARTS {
                let mut parts = WHOLE;
                *part(&mut parts) = false;
                let poor = trial(parts);
                if *part(&mut needs) {
                    cases.check(format!("{case}, without {name}"), || {
                        let failed =
                            poor.encode(&*subject.codec).is_err() && poor.decode(&*subject.codec, &encoded).is_err();
                        if failed { Ok(()) } else { Err(GUESSED.to_owned()) }
                    })?;
                } else if *part(&mut wants) {
                    cases.check(format!("{case}, without {name}"), || poor.round_trip(&*subject.codec))?;
                }
            }
        }
        Ok(())
    })
}
