//! What a transform may know: it fails without what it needs, and works without what it wants.

use gearbox_core::{Elem, Entry, LossyTransform, Needs, Role, Shape};
use serde_json::Value;

use super::{Subject, Trial};
use crate::Outcome;
use crate::data::{Case, DataKind, GUESSED, PARTS, WHOLE};
use crate::outcome::Check;
use crate::sharing::Subject as _;

/// More context than declared changes no result; without a needed part forward and inverse fail instead of guessing.
pub fn needs_are_honoured(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("needs_are_honoured", |cases| {
        let subject = Subject::new(entry, settings)?;
        let mut needs = subject.declared.needs;
        for (elem, role) in both_roles(&subject)? {
            let trial = |parts| trial(elem, role, parts);
            let (rich, enough) = (trial(WHOLE), trial(needs));
            cases.check(format!("{rich}, whole context"), || subject.round_trip(&rich))?;
            let latents = cases.check(format!("{rich}, needed context"), || subject.round_trip(&enough))?;
            for (name, part) in PARTS.into_iter().filter(|(_, part)| *part(&mut needs)) {
                let mut parts = WHOLE;
                *part(&mut parts) = false;
                let poor = trial(parts);
                cases.check(format!("{rich}, without {name}"), || {
                    let failed = subject.encode(&poor).is_err() && poor.inverse(&*subject.transform, &latents).is_err();
                    if failed { Ok(()) } else { Err(GUESSED.to_owned()) }
                })?;
            }
        }
        Ok(())
    })
}

/// With any of the wanted parts of the context, and with none, every chunk comes back.
pub fn wanted_context_is_optional(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("wanted_context_is_optional", |cases| {
        let subject = Subject::new(entry, settings)?;
        let mut wants = subject.declared.wants;
        let wanted: Vec<_> = PARTS.into_iter().filter(|(_, part)| *part(&mut wants)).collect();
        for (elem, role) in both_roles(&subject)? {
            for left_out in 0..1u32 << wanted.len() {
                let mut parts = subject.declared.context();
                let mut names = Vec::new();
                for (_, (name, part)) in wanted.iter().enumerate().filter(|(i, _)| left_out >> i & 1 != 0) {
                    *part(&mut parts) = false;
                    names.push(*name);
                }
                let poor = trial(elem, role, parts);
                cases.check(format!("{poor}, without {}", names.join(", ")), || subject.round_trip(&poor))?;
            }
        }
        Ok(())
    })
}

fn both_roles(subject: &Subject) -> Check<Vec<(Elem, Role)>> {
    Ok(subject.elements()?.into_iter().flat_map(|elem| Role::ALL.map(|role| (elem, role))).collect())
}

fn trial(elem: Elem, role: Role, parts: Needs) -> Trial {
    let case = Case::new(elem, Shape::new(9, 2, 16), DataKind::Repeats, 9);
    Trial { bytes: case.bytes(), around: case.surroundings(parts), case, role }
}
