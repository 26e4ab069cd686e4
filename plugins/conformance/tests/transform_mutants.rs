//! The kit finds what it looks for in transforms: every fault below fails its property, and a sound transform passes all.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, ThreadId};

use gearbox_conformance::Outcome;
use gearbox_conformance::transform::{self, run_transform};
use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, DType, Elem, ElemSet, Entry, Error, ErrorKind, LaneSpec, Latents,
    LossyTransform, Needs, Result,
};
use serde_json::{Value, json};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    WrongAtOneShape,
    QuietsNan,
    BreaksBound,
    FlushesSubnormals,
    PanicsOnEmpty,
    DottedName,
    ValuesAboveWidth,
    SkipsZeros,
    PanicsWithoutLane,
    BlamesCaller,
    PanicsOnValue,
    TrustsShape,
    PanicsOnOtherTokens,
    TakesUndeclared,
    GuessesTokens,
    NeedsWhatItWants,
    BelongsToOneThread,
    Counts,
    SettingsDrift,
}

use Fault::*;

/// High and low bytes of F16 apart; token ids are added to the high ones where they are known.
#[derive(Debug)]
struct Mutant {
    fault: Fault,
    owner: OnceLock<ThreadId>,
    calls: AtomicU8,
}

impl Mutant {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn ids<'a>(&self, cx: &Context<'a>) -> Result<&'a [u32]> {
        if cx.tokens.is_none() && self.is(NeedsWhatItWants) {
            return Err(Error::invalid_input("token ids are missing"));
        }
        Ok(cx.tokens.unwrap_or_default())
    }
}

fn shift(ids: &[u32], element: usize, row: usize) -> u8 {
    ids.get(element / row.max(1)).map_or(0, |id| *id as u8)
}

impl LossyTransform for Mutant {
    fn capabilities(&self) -> Capabilities {
        let tokens = Needs { tokens: true, ..Needs::NONE };
        let (needs, wants) = if self.is(GuessesTokens) { (tokens, Needs::NONE) } else { (Needs::NONE, tokens) };
        Capabilities { needs, wants, ..Capabilities::new(ElemSet::F16) }
    }

    fn config(&self) -> Value {
        json!(if self.is(SettingsDrift) { json!({"drift": true}) } else { json!({}) })
    }

    fn bound(&self) -> Bound {
        match self.fault {
            BreaksBound => Bound::Absolute(1e-3),
            FlushesSubnormals => Bound::Peak(1e-3),
            _ => Bound::Lossless,
        }
    }

    fn forward(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()> {
        if chunk.dtype() != DType::F16 && !self.is(TakesUndeclared) {
            return Err(Error::new(ErrorKind::UnsupportedDType, "expected f16"));
        }
        let (shape, ids) = (chunk.shape(), self.ids(cx)?);
        assert!(!(self.is(PanicsOnEmpty) && chunk.bytes().is_empty()), "nothing to do");
        let owner = *self.owner.get_or_init(|| thread::current().id());
        let mut words: Vec<[u8; 2]> = chunk.bytes().chunks_exact(2).map(|word| [word[0], word[1]]).collect();
        for (element, word) in words.iter_mut().enumerate() {
            match self.fault {
                WrongAtOneShape if (shape.seq, shape.heads, shape.dim) == (17, 8, 80) && element == 9 => word[0] ^= 1,
                QuietsNan if word[1] & 0x7C == 0x7C && (word[1] & 3 != 0 || word[0] != 0) => word[1] |= 2,
                BreaksBound => word[0] = 0,
                FlushesSubnormals if word[1] & 0x7C == 0 => *word = [0; 2],
                BelongsToOneThread if owner != thread::current().id() => *word = [0; 2],
                _ => {}
            }
            word[1] = word[1].wrapping_add(shift(ids, element, shape.row()));
        }
        let name = if self.is(DottedName) { "0.high" } else { "high" };
        let elem = if self.is(ValuesAboveWidth) { Elem::Bits(4) } else { Elem::U8 };
        out.push(LaneSpec::new(name, elem, shape))?.iter_mut().zip(&words).for_each(|(to, word)| *to = word[1]);
        out.push(LaneSpec::new("low", Elem::U8, shape))?.iter_mut().zip(&words).for_each(|(to, word)| *to = word[0]);
        if self.is(Counts) {
            out.push(LaneSpec::new("count", Elem::U8, gearbox_core::Shape::flat(1)))?[0] =
                self.calls.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn inverse(&self, latents: &Latents, cx: &Context<'_>, mut out: ChunkMut<'_>) -> Result<()> {
        if out.dtype() != DType::F16 && !self.is(TakesUndeclared) {
            return Err(Error::corrupt("expected f16"));
        }
        let (shape, ids) = (out.shape(), self.ids(cx)?);
        assert!(!(self.is(PanicsOnOtherTokens) && ids.len() > shape.seq), "index out of bounds");
        let high = if self.is(DottedName) { "0.high" } else { "high" };
        let lane = |name: &str| {
            let found = latents.lane(name);
            assert!(found.is_ok() || !self.is(PanicsWithoutLane), "no such lane");
            found.map_err(|error| if self.is(BlamesCaller) { Error::invalid_config("no such lane") } else { error })
        };
        let (high, low) = (lane(high)?, lane("low")?);
        for lane in [high, low] {
            if (lane.spec.shape != shape || lane.bytes.len() != shape.elements()) && !self.is(TrustsShape) {
                return Err(Error::corrupt(format!("expected {shape}, got {}", lane.spec)));
            }
        }
        assert!(!(self.is(PanicsOnValue) && high.bytes.contains(&0xFF)), "impossible value");
        for (element, word) in out.bytes_mut().chunks_exact_mut(2).enumerate() {
            let restored = [low.bytes[element], high.bytes[element].wrapping_sub(shift(ids, element, shape.row()))];
            if !(self.is(SkipsZeros) && restored[0] == 0) {
                word.copy_from_slice(&restored);
            }
        }
        Ok(())
    }
}

fn entry(fault: Fault) -> Entry<dyn LossyTransform> {
    Entry {
        id: "mutant".to_owned(),
        aliases: vec![],
        summary: "a transform with one fault".to_owned(),
        source: "own work".to_owned(),
        format_version: 1,
        schema: json!({"type": "object", "additionalProperties": false}),
        origin: "this test".to_owned(),
        library: Option::None,
        build: Arc::new(move |_| {
            Ok(Arc::new(Mutant { fault, owner: OnceLock::new(), calls: AtomicU8::new(0) }) as Arc<dyn LossyTransform>)
        }),
    }
}

type Property = fn(&Entry<dyn LossyTransform>, &Value) -> Outcome;

#[test]
fn sound_transform_passes_everything() {
    for outcome in run_transform(&entry(None), &json!({})) {
        assert!(outcome.passed() && outcome.cases > 0, "{outcome}");
    }
}

#[test]
fn every_fault_is_found_by_its_property() {
    let expected: [(Fault, Property); 19] = [
        (WrongAtOneShape, transform::round_trip_keeps_the_bound_over_shapes),
        (QuietsNan, transform::round_trip_keeps_the_bound_over_data),
        (BreaksBound, transform::round_trip_keeps_the_bound_over_data),
        (FlushesSubnormals, transform::round_trip_keeps_the_bound_over_magnitudes),
        (PanicsOnEmpty, transform::empty_chunks_round_trip),
        (DottedName, transform::lanes_are_well_formed),
        (ValuesAboveWidth, transform::lanes_are_well_formed),
        (SkipsZeros, transform::inverse_fills_every_byte),
        (PanicsWithoutLane, transform::inverse_survives_other_lanes),
        (BlamesCaller, transform::inverse_survives_other_lanes),
        (PanicsOnValue, transform::inverse_survives_other_values),
        (TrustsShape, transform::inverse_survives_another_shape),
        (PanicsOnOtherTokens, transform::inverse_survives_another_context),
        (TakesUndeclared, transform::undeclared_dtypes_are_refused),
        (GuessesTokens, transform::needs_are_honoured),
        (NeedsWhatItWants, transform::wanted_context_is_optional),
        (BelongsToOneThread, transform::eight_threads_share_one_instance),
        (Counts, transform::instances_agree),
        (SettingsDrift, transform::settings_are_a_fixed_point),
    ];
    for (fault, property) in expected {
        let outcome = property(&entry(fault), &json!({}));
        assert!(!outcome.passed(), "{fault:?} is not found: {outcome}");
    }
}
