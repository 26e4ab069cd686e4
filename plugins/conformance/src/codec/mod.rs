//! Properties of codecs. Each takes a registry entry and settings for it.

mod artifact;
mod contract;
mod damage;
mod round_trip;
mod sharing;

use std::fmt;
use std::sync::Arc;

use gearbox_core::{Capabilities, Codec, Context, Elem, ElemSet, Entry, LaneRef, Needs, Registry, Result, Shape};
use serde_json::Value;

use crate::config;
use crate::data::{self, Case, DataKind, Surroundings};
use crate::outcome::Check;
use crate::{__properties, Outcome};

pub use artifact::artifacts_round_trip;
pub use contract::{
    decode_fills_every_byte, decode_rejects_wrong_lengths, encode_appends, max_encoded_len_holds, needs_are_honoured,
    undeclared_elements_are_refused, values_above_the_width_are_refused_or_kept,
};
pub use damage::{
    decode_survives_another_shape, decode_survives_bit_flips, decode_survives_trailing_bytes,
    decode_survives_truncation,
};
pub use round_trip::{empty_lanes_round_trip, round_trip_is_exact_over_data, round_trip_is_exact_over_shapes};
pub use sharing::{eight_threads_share_one_instance, instances_agree};

/// Runs every property, in the order of the tests that [`codec_tests!`](crate::codec_tests) makes.
pub fn run_codec(entry: &Entry<dyn Codec>, settings: &Value) -> Vec<Outcome> {
    __properties!(codec, __outcomes, entry, settings)
}

/// Resolved settings pass the schema and build the same codec again; see [`config::fixed_point`].
pub fn settings_are_a_fixed_point(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    config::fixed_point(entry, settings, Codec::config)
}

/// Unknown keys and numbers outside their range are refused; see [`config::strict`].
pub fn settings_are_strict(entry: &Entry<dyn Codec>, settings: &Value) -> Outcome {
    config::strict(entry, settings, Codec::config)
}

/// The entry says what the codec is; see [`config::described`].
pub fn entry_is_described(entry: &Entry<dyn Codec>, _settings: &Value) -> Outcome {
    config::described(entry)
}

/// The built-in codec with this id, for tests.
///
/// # Panics
/// If no such codec is linked into this program.
pub fn find(id: &str) -> Entry<dyn Codec> {
    crate::linked(Registry::built_in().and_then(|registry| registry.codec(id).cloned()))
}

/// The codec under test.
struct Subject {
    codec: Arc<dyn Codec>,
    elems: ElemSet,
    needs: Needs,
    wants: Needs,
    deterministic: bool,
}

impl Subject {
    fn new(entry: &Entry<dyn Codec>, settings: &Value) -> Check<Self> {
        Ok(Self::of(config::build(entry, settings)?))
    }

    fn of(codec: Arc<dyn Codec>) -> Self {
        let Capabilities { elems, needs, wants, deterministic, .. } = codec.capabilities();
        Self { codec, elems, needs, wants, deterministic }
    }

    /// Declared element types, every width of [`Elem::Bits`] among them.
    fn elements(&self) -> Check<Vec<Elem>> {
        self.declared(data::elements())
    }

    /// Declared ones among the [typical](data::typical_elements) element types.
    fn typical_elements(&self) -> Check<Vec<Elem>> {
        self.declared(data::typical_elements())
    }

    fn declared(&self, mut elems: Vec<Elem>) -> Check<Vec<Elem>> {
        elems.retain(|elem| self.elems.contains(*elem));
        let none = || "expected at least one element type to be declared, got none".to_owned();
        if elems.is_empty() { Err(none()) } else { Ok(elems) }
    }

    /// A case with its bytes and the context that the codec declares it needs or wants.
    fn trial(&self, case: Case) -> Trial {
        Trial { bytes: case.bytes(), around: case.surroundings(self.needs.or(self.wants)), case }
    }

    /// One trial of these elements, the seed made from all that is given.
    fn trial_of(&self, elem: Elem, shape: Shape, kind: DataKind) -> Trial {
        self.trial(Case::seeded(elem, shape, kind))
    }
}

/// A lane to encode, with its context.
struct Trial {
    case: Case,
    bytes: Vec<u8>,
    around: Surroundings,
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.case.fmt(f)
    }
}

impl Trial {
    fn lane(&self) -> Result<LaneRef<'_>> {
        LaneRef::new(&self.case.spec, &self.bytes)
    }

    fn context(&self) -> Context<'_> {
        self.around.context()
    }

    fn encode(&self, codec: &dyn Codec) -> Check<Vec<u8>> {
        let mut out = Vec::new();
        self.lane()
            .and_then(|lane| codec.encode(lane, &self.context(), &mut out))
            .map_err(|error| format!("encode fails: {error}"))?;
        Ok(out)
    }

    fn decode(&self, codec: &dyn Codec, encoded: &[u8]) -> Check<Vec<u8>> {
        let mut out = vec![0xA5; self.bytes.len()];
        codec
            .decode(encoded, &self.case.spec, &self.context(), &mut out)
            .map_err(|error| format!("decode fails: {error}"))?;
        Ok(out)
    }

    /// Encodes, decodes and compares; returns the encoded bytes.
    fn round_trip(&self, codec: &dyn Codec) -> Check<Vec<u8>> {
        let encoded = self.encode(codec)?;
        self.compare(&self.decode(codec, &encoded)?)?;
        Ok(encoded)
    }

    /// Compares what was decoded with what was encoded.
    fn compare(&self, got: &[u8]) -> Check {
        same(&self.bytes, got, self.case.spec.elem.size())
    }
}

/// Names the first element that differs.
pub(crate) fn same(expected: &[u8], got: &[u8], size: usize) -> Check {
    if expected == got {
        return Ok(());
    }
    let pairs = expected.chunks(size).zip(got.chunks(size));
    let (idx, (expected, got)) = pairs.enumerate().find(|(_, (expected, got))| expected != got).unwrap_or_default();
    let value = |element: &[u8]| element.iter().rev().fold(0u32, |value, byte| value << 8 | u32::from(*byte));
    let digits = 2 + 2 * size;
    Err(format!("element {idx} is wrong: expected {:#0digits$x}, got {:#0digits$x}", value(expected), value(got)))
}
