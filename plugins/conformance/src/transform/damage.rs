//! Damaged lanes: an error or wrong data, never a panic, a long run or a huge allocation.

use gearbox_core::{ChunkMut, Elem, Entry, Lane, LaneSpec, Latents, LossyTransform, Shape};
use serde_json::Value;

use super::{Subject, Trial};
use crate::Outcome;
use crate::damage::{SMALL, places, survives, watched};
use crate::data::Case;
use crate::outcome::{Cases, Check};
use crate::sharing::Subject as _;

/// Lanes that are missing, renamed, doubled, or of another type or shape are an error or wrong data.
pub fn inverse_survives_other_lanes(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    damaged("inverse_survives_other_lanes", entry, settings, |lanes, attack| {
        attack(&"no lane", Vec::new())?;
        for (idx, lane) in lanes.iter().enumerate() {
            let spec = &lane.spec;
            let with = |other: Option<Lane>| {
                let mut lanes = lanes.to_vec();
                lanes.splice(idx..=idx, other);
                lanes
            };
            attack(&format!("without {spec}"), with(None))?;
            let renamed = Lane { spec: LaneSpec { name: "no-such-lane".into(), ..spec.clone() }, ..lane.clone() };
            attack(&format!("{spec} renamed"), with(Some(renamed.clone())))?;
            attack(&format!("{spec} twice, once renamed"), [lanes, &[renamed]].concat())?;
            let Shape { seq, heads, dim } = spec.shape;
            let elems = [Elem::U8, Elem::U16, Elem::F16, Elem::F32, Elem::Bits(1), Elem::Bits(12), spec.elem];
            let shapes = [
                (seq + 1, heads, dim),
                (seq.saturating_sub(1), heads, dim),
                (0, heads, dim),
                (seq, heads, dim + 1),
                (heads, seq, dim),
                (seq * heads * dim, 1, 1),
                (seq, heads, 0),
            ];
            let other_elems = elems.into_iter().map(|elem| (elem, spec.shape));
            let other_shapes = shapes.into_iter().map(|(s, h, d)| (spec.elem, Shape::new(s, h, d)));
            for (elem, shape) in other_elems.chain(other_shapes) {
                let spec = LaneSpec { elem, shape, ..spec.clone() };
                let bytes = lane.bytes.iter().copied().chain(std::iter::repeat(1)).take(spec.byte_len()).collect();
                attack(&format!("{} as {spec}", lane.spec), with(Some(Lane { spec, bytes })))?;
            }
        }
        Ok(())
    })
}

/// Lanes with flipped bits, or with all bits set or cleared, are an error or wrong data; values above their width too.
pub fn inverse_survives_other_values(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    damaged("inverse_survives_other_values", entry, settings, |lanes, attack| {
        for (idx, lane) in lanes.iter().enumerate() {
            let mut damaged = lanes.to_vec();
            for place in places(lane.bytes.len()) {
                let bits = if lane.bytes.len() <= SMALL / 8 { 0..8 } else { place % 8..place % 8 + 1 };
                for bit in bits {
                    damaged[idx].bytes[place] ^= 1 << bit;
                    attack(&format!("{}, bit {bit} of byte {place} flipped", lane.spec), damaged.clone())?;
                    damaged[idx].bytes[place] ^= 1 << bit;
                }
            }
            for fill in [0x00, 0xFF] {
                damaged[idx].bytes.fill(fill);
                attack(&format!("{}, all bytes {fill:#04x}", lane.spec), damaged.clone())?;
            }
        }
        Ok(())
    })
}

/// Lanes that are inverted into a chunk of another shape or type are an error or wrong data.
pub fn inverse_survives_another_shape(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("inverse_survives_another_shape", |cases| {
        let subject = Subject::new(entry, settings)?;
        for trial in subject.varied_trials()? {
            let latents = cases.check(&trial, || subject.encode(&trial))?;
            let Shape { seq, heads, dim } = trial.case.spec.shape;
            let shapes = [
                (seq + 1, heads, dim),
                (seq - 1, heads, dim),
                (1, 1, 1),
                (seq, heads, dim * 8),
                (dim, heads, seq),
                (seq, 0, dim),
            ];
            let shapes = shapes.map(|(seq, heads, dim)| Shape::new(seq, heads, dim));
            let dtype = trial.dtype();
            let dtypes = subject.elements()?.into_iter().filter_map(Elem::dtype).filter(|other| *other != dtype);
            for (shape, dtype) in
                shapes.map(|shape| (shape, dtype)).into_iter().chain(dtypes.map(|dtype| (trial.case.spec.shape, dtype)))
            {
                // Both the context of the lanes and one that fits the other shape.
                let fitting = subject.trial(Case::seeded(dtype.into(), shape, trial.case.kind), trial.role);
                for cx in [trial.context(), fitting.context()] {
                    let mut out = vec![0; shape.elements() * dtype.size()];
                    cases.check(format!("{trial}, inverted as {dtype} {shape}"), || {
                        let out = ChunkMut::new(shape, dtype, &mut out).map_err(|error| error.to_string())?;
                        survives(|| subject.transform.inverse(&latents, &cx, out))
                    })?;
                }
            }
        }
        Ok(())
    })
}

/// Lanes that are inverted with another context than that of forward are an error or wrong data.
pub fn inverse_survives_another_context(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("inverse_survives_another_context", |cases| {
        let subject = Subject::new(entry, settings)?;
        let trials = subject.varied_trials()?;
        let mut lanes = Vec::new();
        for trial in &trials {
            lanes.push(cases.check(trial, || subject.encode(trial))?);
        }
        for (latents, trial) in lanes.iter().zip(&trials) {
            for other in &trials {
                let mut cx = other.context();
                let positions = [cx.first_token, 0, u64::MAX];
                for first_token in positions {
                    cx.first_token = first_token;
                    let mut out = vec![0; trial.bytes.len()];
                    cases.check(format!("{trial}, inverted at {first_token} with the context of {other}"), || {
                        let target = ChunkMut::new(trial.case.spec.shape, trial.dtype(), &mut out);
                        let target = target.map_err(|error| error.to_string())?;
                        // The host is at fault here, so any error will do.
                        watched(|| subject.transform.inverse(latents, &cx, target)).map(|_| ())
                    })?;
                }
            }
        }
        Ok(())
    })
}

type Attack<'a> = dyn FnMut(&dyn std::fmt::Display, Vec<Lane>) -> Check + 'a;

/// Runs `damage` over the lanes of chunks of every kind; afterwards the instance still inverts the sound lanes.
fn damaged(
    property: &'static str,
    entry: &Entry<dyn LossyTransform>,
    settings: &Value,
    damage: impl Fn(&[Lane], &mut Attack<'_>) -> Check,
) -> Outcome {
    Outcome::of(property, |cases| {
        let subject = Subject::new(entry, settings)?;
        for trial in subject.varied_trials()? {
            let latents = cases.check(&trial, || subject.encode(&trial))?;
            damage(latents.lanes(), &mut |what, lanes| try_lanes(cases, &subject, &trial, what, lanes))?;
            cases.check(format!("{trial}, sound lanes after the damaged ones"), || subject.decode(&trial, &latents))?;
        }
        Ok(())
    })
}

fn try_lanes(
    cases: &mut Cases,
    subject: &Subject,
    trial: &Trial,
    what: &dyn std::fmt::Display,
    lanes: Vec<Lane>,
) -> Check {
    let mut latents = Latents::new();
    // Two lanes of one name do not get past the container.
    if lanes.into_iter().any(|lane| latents.push_lane(lane).is_err()) {
        return Ok(());
    }
    let mut out = vec![0; trial.bytes.len()];
    cases.check(format!("{trial}, {what}"), || survives(|| trial.invert(&*subject.transform, &latents, &mut out)))
}
