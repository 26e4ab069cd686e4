//! Damaged input: an error or wrong data, never a panic, a long run or a huge allocation.

use gearbox_core::{Codec, Entry, Shape};
use serde_json::Value;

use super::{Subject, Trial};
use crate::damage::{SMALL, places};
use crate::data::DataKind;
use crate::outcome::{Cases, Check};
use crate::{Outcome, damage};

/// Every proper prefix of an encoded lane is an error or wrong data.
pub fn decode_survives_truncation(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    damaged("decode_survives_truncation", entry, settings, |encoded, attack| {
        for place in places(encoded.len()) {
            attack(&|| format!("cut to {place} of {} bytes", encoded.len()), &encoded[..place])?;
        }
        Ok(())
    })
}

/// An encoded lane with any one bit flipped is an error or wrong data.
pub fn decode_survives_bit_flips(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    damaged("decode_survives_bit_flips", entry, settings, |encoded, attack| {
        let mut copy = encoded.to_vec();
        for place in places(encoded.len()) {
            // Samples flip one bit each, another one at every place.
            let bits = if encoded.len() <= SMALL { 0..8 } else { place % 8..place % 8 + 1 };
            for bit in bits {
                copy[place] ^= 1 << bit;
                attack(&|| format!("bit {bit} of byte {place} of {} flipped", encoded.len()), &copy)?;
                copy[place] ^= 1 << bit;
            }
        }
        Ok(())
    })
}

/// An encoded lane with more bytes behind it is an error or wrong data.
pub fn decode_survives_trailing_bytes(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    damaged("decode_survives_trailing_bytes", entry, settings, |encoded, attack| {
        let tails = [vec![0; 1], vec![0xFF; 1], vec![0; 64], vec![0xFF; 64], encoded.to_vec()];
        for tail in tails.into_iter().filter(|tail| !tail.is_empty()) {
            let longer = [encoded, &tail].concat();
            attack(&|| format!("{} bytes behind the end, the first {:#04x}", tail.len(), tail[0]), &longer)?;
        }
        Ok(())
    })
}

/// An encoded lane that is decoded as one of another shape is an error or wrong data.
pub fn decode_survives_another_shape(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("decode_survives_another_shape", |cases| {
        let subject = Subject::new(entry, settings)?;
        for trial in trials(&subject)? {
            let encoded = cases.check(&trial.case, || trial.encode(&*subject.codec))?;
            let Shape { seq, heads, dim } = trial.case.spec.shape;
            let others = [
                (seq + 1, heads, dim),
                (seq - 1, heads, dim),
                (0, heads, dim),
                (1, 1, 1),
                (seq, heads, dim * 8),
                (dim, heads, seq),
            ];
            for (seq, heads, dim) in others {
                let other = subject.trial_of(trial.case.spec.elem, Shape::new(seq, heads, dim), DataKind::Zeros);
                cases.check(format!("{} decoded as {}", trial.case, other.case.spec), || {
                    survives(&subject, &other, &encoded)
                })?;
            }
            cases.check(&trial.case, || trial.compare(&trial.decode(&*subject.codec, &encoded)?))?;
        }
        Ok(())
    })
}

type Attack<'a> = dyn FnMut(&dyn Fn() -> String, &[u8]) -> Check + 'a;

/// Runs `damage` over lanes of every kind of element; afterwards the instance still decodes the sound bytes.
fn damaged(
    property: &'static str,
    entry: &Entry<dyn Codec>,
    settings: &Value,
    damage: impl Fn(&[u8], &mut Attack<'_>) -> Check,
) -> Outcome {
    Outcome::of(property, |cases| {
        let subject = Subject::new(entry, settings)?;
        for trial in trials(&subject)? {
            let encoded = cases.check(&trial.case, || trial.encode(&*subject.codec))?;
            damage(&encoded, &mut |what, bytes| try_damage(cases, &subject, &trial, what, bytes))?;
            cases.check(format!("{}, sound bytes after the damaged ones", trial.case), || {
                trial.compare(&trial.decode(&*subject.codec, &encoded)?)
            })?;
        }
        Ok(())
    })
}

fn try_damage(cases: &mut Cases, subject: &Subject, trial: &Trial, what: &dyn Fn() -> String, bytes: &[u8]) -> Check {
    let case = std::fmt::from_fn(|f| write!(f, "{}, {}", trial.case, what()));
    cases.check(case, || survives(subject, trial, bytes))
}

/// Lanes of 1, 24 and 1280 elements, so that codecs that switch modes with the length show each of them.
fn trials(subject: &Subject) -> Check<Vec<Trial>> {
    let kinds = [
        (Shape::new(1, 1, 1), DataKind::Walk),
        (Shape::new(3, 2, 4), DataKind::Walk),
        (Shape::new(3, 2, 4), DataKind::Zeros),
        (Shape::new(20, 2, 32), DataKind::Walk),
        (Shape::new(20, 2, 32), DataKind::Repeats),
    ];
    let elems = subject.typical_elements()?;
    Ok(elems.into_iter().flat_map(|elem| kinds.map(|(shape, kind)| subject.trial_of(elem, shape, kind))).collect())
}

/// Decodes damaged bytes.
fn survives(subject: &Subject, trial: &Trial, bytes: &[u8]) -> Check {
    let mut out = vec![0; trial.bytes.len()];
    damage::survives(|| subject.codec.decode(bytes, &trial.case.spec, &trial.context(), &mut out))
}
