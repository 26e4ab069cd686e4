//! Trained models: stored once, and read back as suspiciously as any other bytes.

use std::sync::Arc;

use gearbox_core::{Codec, Entry, ErrorKind, Result, Sample, Shape};
use serde_json::Value;

use super::{Subject, Trial};
use crate::Outcome;
use crate::data::{DataKind, SplitMix64};
use crate::outcome::Check;

/// Damaged places tried in one artifact.
const SAMPLES: u32 = 100;

/// A codec that trains can be rebuilt from its artifact, is exact on lanes it has not seen, and survives damaged artifacts; one that
/// does not train takes no artifact.
pub fn artifacts_round_trip(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    Outcome::of("artifacts_round_trip", |cases| {
        let subject = Subject::new(entry, settings)?;
        for elem in subject.typical_elements()? {
            let lessons = [Shape::new(30, 2, 16), Shape::new(0, 2, 16), Shape::new(7, 2, 16)]
                .map(|shape| subject.trial_of(elem, shape, DataKind::Walk));
            let artifact = cases.check(format!("training on {elem} lanes"), || train(&*subject.codec, &lessons))?;
            let Some(artifact) = artifact else {
                cases.check(format!("{elem}, an artifact for a codec that trains none"), || {
                    let taken = matches!(subject.codec.with_artifact(b"no artifact"), Ok(Some(_)));
                    if taken { Err("expected nothing or an error, got a codec".to_owned()) } else { Ok(()) }
                })?;
                continue;
            };
            let trained = cases.check(format!("{elem}, rebuilding from {} bytes", artifact.len()), || {
                expect_codec(subject.codec.with_artifact(&artifact)).map(Subject::of)
            })?;
            for kind in DataKind::ALL {
                let unseen = subject.trial_of(elem, Shape::new(12, 2, 16), kind);
                cases.check(format!("{}, trained", unseen.case), || unseen.round_trip(&*trained.codec))?;
            }
            let probe = subject.trial_of(elem, Shape::new(3, 2, 4), DataKind::Walk);
            let encoded = cases.check(&probe.case, || probe.encode(&*trained.codec))?;
            let mut random = SplitMix64::new(1);
            let len = u32::try_from(artifact.len()).unwrap_or(u32::MAX);
            for _ in 0..if len == 0 { 0 } else { SAMPLES } {
                let (place, bit) = (random.below(len) as usize, random.below(8));
                let mut flipped = artifact.clone();
                flipped[place] ^= 1 << bit;
                let what = format!("artifact of {len} bytes for {elem}");
                cases.check(format!("{what}, bit {bit} of byte {place} flipped"), || {
                    survives(&*subject.codec, &flipped, &probe, &encoded)
                })?;
                cases.check(format!("{what}, cut to {place}"), || {
                    survives(&*subject.codec, &artifact[..place], &probe, &encoded)
                })?;
            }
        }
        Ok(())
    })
}

fn train(codec: &dyn Codec, lessons: &[Trial]) -> Check<Option<Vec<u8>>> {
    let mut samples = lessons.iter().map(|lesson| Sample {
        spec: lesson.case.spec.clone(),
        bytes: lesson.bytes.as_slice().into(),
        layer: lesson.context().layer,
        role: lesson.context().role,
    });
    let artifact = codec.train(&mut samples).map_err(|error| format!("train fails: {error}"))?;
    Ok(artifact.map(|artifact| artifact.0))
}

fn expect_codec(made: Result<Option<Arc<dyn Codec>>>) -> Check<Arc<dyn Codec>> {
    made.map_err(|error| format!("with_artifact fails: {error}"))?
        .ok_or_else(|| "expected a codec from its own artifact, got none".to_owned())
}

/// A damaged artifact is refused as corrupt, or makes a codec that does not panic.
fn survives(codec: &dyn Codec, artifact: &[u8], probe: &Trial, encoded: &[u8]) -> Check {
    match codec.with_artifact(artifact) {
        Ok(Some(codec)) => {
            // Wrong data is fine here; a panic is not.
            let _ = probe.decode(&*codec, encoded);
            let _ = probe.encode(&*codec);
            Ok(())
        }
        Ok(None) => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::LimitExceeded) => Ok(()),
        Err(error) => Err(format!("expected `Corrupt` or `LimitExceeded`, got `{:?}`: {error}", error.kind())),
    }
}
