//! The kit finds what it looks for: every fault below fails its property, and a sound codec passes all.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, ThreadId};

use gearbox_conformance::Outcome;
use gearbox_conformance::codec::{self, run_codec};
use gearbox_core::{
    Artifact, Capabilities, Codec, Context, Elem, ElemSet, Entry, Error, LaneRef, LaneSpec, Needs, Result, Sample,
};
use serde_json::{Value, json};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    WrongAtOneShape,
    QuietsNan,
    PanicsOnEmpty,
    ClearsOut,
    DiffersInPlace,
    BoundTooSmall,
    BoundOverflows,
    SkipsZeros,
    PanicsOnShort,
    BlamesCaller,
    PanicsOnTag,
    TrustsLength,
    PanicsOnTail,
    PanicsOnShape,
    IgnoresLength,
    TakesUndeclared,
    MasksValues,
    GuessesTokens,
    BelongsToOneThread,
    Counts,
    ForgetsModel,
    PanicsOnModel,
    SettingsDrift,
    SettingsLax,
    IdNotKebab,
}

use Fault::*;

/// Stores lanes behind a tag byte and a 32-bit length.
#[derive(Debug)]
struct Mutant {
    fault: Fault,
    level: u64,
    trained: bool,
    owner: OnceLock<ThreadId>,
    calls: AtomicU8,
}

const HEAD: usize = 5;

impl Mutant {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }
}

impl Codec for Mutant {
    fn capabilities(&self) -> Capabilities {
        let elems = if self.is(TakesUndeclared) { ElemSet::F16 } else { ElemSet::ALL };
        let needs = Needs { tokens: self.is(GuessesTokens), ..Needs::default() };
        Capabilities { needs, ..Capabilities::new(elems) }
    }

    fn config(&self) -> Value {
        json!({"level": self.level + u64::from(self.is(SettingsDrift))})
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        match self.fault {
            BoundTooSmall => lane.byte_len(),
            BoundOverflows => lane.shape.seq.checked_mul(lane.shape.row() * 4).unwrap() + HEAD,
            _ => lane.byte_len().saturating_add(HEAD + 1),
        }
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (spec, mut bytes) = (lane.spec(), lane.bytes().to_vec());
        let owner = *self.owner.get_or_init(|| thread::current().id());
        match self.fault {
            PanicsOnEmpty => assert!(!bytes.is_empty(), "nothing to do"),
            ClearsOut => out.clear(),
            WrongAtOneShape if (spec.shape.seq, spec.shape.heads, spec.shape.dim) == (129, 8, 80) => bytes[77] ^= 1,
            QuietsNan if spec.elem == Elem::F16 => {
                for word in bytes.chunks_exact_mut(2).filter(|w| w[1] & 0x7C == 0x7C && (w[1] & 3 != 0 || w[0] != 0)) {
                    word[1] |= 2;
                }
            }
            MasksValues => {
                if let Elem::Bits(bits @ ..8) = spec.elem {
                    for byte in &mut bytes {
                        *byte &= (1 << bits) - 1;
                    }
                }
            }
            BelongsToOneThread if owner != thread::current().id() => bytes.fill(0),
            _ => {}
        }
        out.push(7);
        out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        out.extend_from_slice(&bytes);
        if self.is(Counts) {
            out.push(self.calls.fetch_add(1, Ordering::Relaxed));
        }
        Ok(())
    }

    fn encode_into(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut [u8]) -> Result<Option<usize>> {
        if !matches!(self.fault, None | DiffersInPlace) {
            return Ok(Option::None);
        }
        let mut encoded = Vec::new();
        self.encode(lane, cx, &mut encoded)?;
        out[..encoded.len()].copy_from_slice(&encoded);
        if self.is(DiffersInPlace) {
            out[0] ^= 1;
        }
        Ok(Some(encoded.len()))
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        if !self.is(IgnoresLength) {
            LaneRef::new(lane, out)?;
        }
        let Some((head, payload)) = encoded.split_at_checked(HEAD) else {
            assert!(!self.is(PanicsOnShort), "index out of bounds");
            return Err(if self.is(BlamesCaller) {
                Error::invalid_config("too short")
            } else {
                Error::corrupt("too short")
            });
        };
        if head[0] != 7 {
            assert!(!self.is(PanicsOnTag), "unknown tag");
            return Err(Error::corrupt("unknown tag"));
        }
        let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if self.is(TrustsLength) {
            std::hint::black_box(vec![0u8; len]);
        }
        let payload = if self.is(Counts) { &payload[..payload.len().saturating_sub(1)] } else { payload };
        assert!(!(self.is(PanicsOnTail) && payload.len() > len), "bytes behind the end");
        let fits = payload.len() == len && (len == out.len() || self.is(IgnoresLength));
        assert!(fits || !self.is(PanicsOnShape) || payload.len() != len, "another shape");
        if !fits {
            return Err(Error::corrupt(format!("expected {} bytes, got {}", out.len(), payload.len())));
        }
        for (to, from) in out.iter_mut().zip(payload) {
            if !(self.is(SkipsZeros) && *from == 0) {
                *to = *from;
            }
        }
        if self.trained && self.is(ForgetsModel) {
            out.fill(0);
        }
        Ok(())
    }

    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        Ok(Some(Artifact(vec![samples.count() as u8; 20])))
    }

    fn with_artifact(&self, artifact: &[u8]) -> Result<Option<Arc<dyn Codec>>> {
        if artifact.len() != 20 || artifact.iter().any(|byte| *byte != artifact[0]) {
            assert!(!self.is(PanicsOnModel), "a strange model");
            return Err(Error::corrupt("not a model"));
        }
        Ok(Some(Arc::new(Self { trained: true, ..mutant(self.fault, self.level) })))
    }
}

fn mutant(fault: Fault, level: u64) -> Mutant {
    Mutant { fault, level, trained: false, owner: OnceLock::new(), calls: AtomicU8::new(0) }
}

fn entry(fault: Fault) -> Entry<dyn Codec> {
    Entry {
        id: if fault == IdNotKebab { "Mutant_1" } else { "mutant-1" }.to_owned(),
        aliases: vec![],
        summary: "a codec with one fault".to_owned(),
        source: "own work".to_owned(),
        format_version: 1,
        schema: json!({
            "type": "object",
            "properties": {"level": {"description": "Effort.", "type": "integer", "minimum": 0, "maximum": 255}},
            "additionalProperties": fault == SettingsLax,
        }),
        origin: "this test".to_owned(),
        library: Option::None,
        build: Arc::new(move |settings| Ok(Arc::new(mutant(fault, settings["level"].as_u64().unwrap_or(3))))),
    }
}

/// The kit watches the memory of the process, so a fault that takes much of it must not meet another test.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

type Property = fn(&Entry<dyn Codec>, &Value) -> Outcome;

#[test]
fn sound_codec_passes_everything() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let outcomes = run_codec(&entry(None), &json!({}));
    for outcome in &outcomes {
        assert!(outcome.passed(), "{outcome}");
        let asks_nothing = outcome.property == "undeclared_elements_are_refused";
        assert_eq!(outcome.cases == 0, asks_nothing, "{outcome}");
    }
}

#[test]
fn every_fault_is_found_by_its_property() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let expected: [(Fault, Property); 24] = [
        (WrongAtOneShape, codec::round_trip_is_exact_over_shapes),
        (QuietsNan, codec::round_trip_is_exact_over_data),
        (PanicsOnEmpty, codec::empty_lanes_round_trip),
        (ClearsOut, codec::encode_appends),
        (DiffersInPlace, codec::encode_appends),
        (BoundTooSmall, codec::max_encoded_len_holds),
        (BoundOverflows, codec::max_encoded_len_holds),
        (SkipsZeros, codec::decode_fills_every_byte),
        (PanicsOnShort, codec::decode_survives_truncation),
        (BlamesCaller, codec::decode_survives_truncation),
        (PanicsOnTag, codec::decode_survives_bit_flips),
        (PanicsOnTail, codec::decode_survives_trailing_bytes),
        (PanicsOnShape, codec::decode_survives_another_shape),
        (IgnoresLength, codec::decode_rejects_wrong_lengths),
        (TakesUndeclared, codec::undeclared_elements_are_refused),
        (MasksValues, codec::values_above_the_width_are_refused_or_kept),
        (GuessesTokens, codec::needs_are_honoured),
        (BelongsToOneThread, codec::eight_threads_share_one_instance),
        (Counts, codec::instances_agree),
        (ForgetsModel, codec::artifacts_round_trip),
        (PanicsOnModel, codec::artifacts_round_trip),
        (SettingsDrift, codec::settings_are_a_fixed_point),
        (SettingsLax, codec::settings_are_strict),
        (IdNotKebab, codec::entry_is_described),
    ];
    for (fault, property) in expected {
        let outcome = property(&entry(fault), &json!({}));
        assert!(!outcome.passed(), "{fault:?} is not found: {outcome}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn trusted_length_is_found_by_the_memory_it_takes() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let failure = codec::decode_survives_bit_flips(&entry(TrustsLength), &json!({})).failure.unwrap();
    assert!(failure.contains("expected decode to allocate less than 1 GiB, got "), "{failure}");
}

#[test]
fn counter_example_names_shape_type_and_seed() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let outcome = codec::round_trip_is_exact_over_shapes(&entry(WrongAtOneShape), &json!({}));
    let failure = outcome.failure.unwrap();
    assert!(failure.contains(" (129, 8, 80), walk, seed 0x"), "{failure}");
    assert!(failure.contains(": element "), "{failure}");
}
