//! Properties of transforms. Each takes a registry entry and settings for it.

mod context;
mod damage;
mod round_trip;

use std::fmt;
use std::sync::Arc;

use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, DType, Elem, Entry, Latents, LossyTransform, Registry, Result, Role,
    Shape,
};
use serde_json::Value;

use crate::data::{Case, DataKind, Surroundings, value};
use crate::outcome::Check;
use crate::{__properties, Outcome, codec, config, sharing};

pub use context::{needs_are_honoured, wanted_context_is_optional};
pub use damage::{
    inverse_survives_another_context, inverse_survives_another_shape, inverse_survives_other_lanes,
    inverse_survives_other_values,
};
pub use round_trip::{
    empty_chunks_round_trip, inverse_fills_every_byte, lanes_are_well_formed, round_trip_keeps_the_bound_over_data,
    round_trip_keeps_the_bound_over_magnitudes, round_trip_keeps_the_bound_over_shapes, undeclared_dtypes_are_refused,
};

/// Runs every property, in the order of the tests that [`transform_tests!`](crate::transform_tests) makes.
pub fn run_transform(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Vec<Outcome> {
    __properties!(transform, __outcomes, entry, settings)
}

/// Resolved settings pass the schema and build the same transform again; see [`config::fixed_point`].
pub fn settings_are_a_fixed_point(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    config::fixed_point(entry, settings, LossyTransform::config)
}

/// Unknown keys and numbers outside their range are refused; see [`config::strict`].
pub fn settings_are_strict(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    config::strict(entry, settings, LossyTransform::config)
}

/// The entry says what the transform is; see [`config::described`].
pub fn entry_is_described(entry: &Entry<dyn LossyTransform>, _settings: &Value) -> Outcome {
    config::described(entry)
}

/// The built-in transform with this id, for tests.
///
/// # Panics
/// If no such transform is linked into this program.
pub fn find(id: &str) -> Entry<dyn LossyTransform> {
    crate::linked(Registry::built_in().and_then(|registry| registry.transform(id).cloned()))
}

/// Eight threads that share one instance round-trip every chunk, to the same lanes as one thread if the transform is deterministic.
pub fn eight_threads_share_one_instance(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("eight_threads_share_one_instance", |cases| {
        let subject = Subject::new(entry, settings)?;
        sharing::threads_agree(cases, &subject, subject.varied_trials()?)
    })
}

/// Two instances write the same lanes, and one writes them again after other work; each inverts what the other wrote.
///
/// Transforms that do not declare to be deterministic are asked only the last.
pub fn instances_agree(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Outcome {
    Outcome::of("instances_agree", |cases| {
        let (subject, other) = (Subject::new(entry, settings)?, Subject::new(entry, settings)?);
        sharing::instances_agree(cases, [&subject, &other], subject.varied_trials()?)
    })
}

/// The transform under test.
struct Subject {
    transform: Arc<dyn LossyTransform>,
    declared: Capabilities,
    bound: Bound,
}

impl Subject {
    fn new(entry: &Entry<dyn LossyTransform>, settings: &Value) -> Check<Self> {
        let transform = config::build(entry, settings)?;
        Ok(Self { declared: transform.capabilities(), bound: transform.bound(), transform })
    }

    /// Declared element types.
    fn elements(&self) -> Check<Vec<Elem>> {
        let elems: Vec<_> =
            DType::ALL.into_iter().map(Elem::from).filter(|elem| self.declared.elems.contains(*elem)).collect();
        let none = || "expected at least one tensor type to be declared, got none".to_owned();
        if elems.is_empty() { Err(none()) } else { Ok(elems) }
    }

    /// A case as values or keys, with its bytes and the context that the transform declares it needs or wants.
    fn trial(&self, case: Case, role: Role) -> Trial {
        Trial { bytes: case.bytes(), around: case.surroundings(self.declared.context()), case, role }
    }

    /// Trials of these elements as values and as keys, the seed made from all that is given.
    fn trials_of(&self, elem: Elem, shape: Shape, kind: DataKind) -> [Trial; 2] {
        Role::ALL.map(|role| self.trial(Case::seeded(elem, shape, kind), role))
    }

    /// Small chunks of several kinds and shapes.
    fn varied_trials(&self) -> Check<Vec<Trial>> {
        let shapes = [
            (Shape::new(17, 2, 64), DataKind::Walk),
            (Shape::new(2, 1, 5), DataKind::Repeats),
            (Shape::new(12, 2, 16), DataKind::Repeats),
            (Shape::new(40, 2, 32), DataKind::Noise),
            (Shape::new(1, 1, 1), DataKind::Walk),
        ];
        let elems = self.elements()?;
        let trials = |elem| shapes.into_iter().flat_map(move |(shape, kind)| self.trials_of(elem, shape, kind));
        Ok(elems.into_iter().flat_map(trials).collect())
    }

    /// Compares what was decoded with what was encoded, as the declared bound says.
    fn compare(&self, trial: &Trial, got: &[u8]) -> Check {
        let elem = trial.case.spec.elem;
        let originals = trial.bytes.chunks_exact(elem.size()).map(|bytes| value(elem, bytes).abs());
        let peak = originals.filter(|value| value.is_finite()).fold(0.0, f64::max);
        let allowed = |original: f64| match self.bound {
            Bound::Lossless => 0.0,
            Bound::Absolute(error) => error,
            Bound::Relative(fraction) => fraction * original.abs(),
            Bound::Peak(fraction) => fraction * peak,
            Bound::Unbounded => f64::INFINITY,
        };
        if self.bound == Bound::Lossless {
            return codec::same(&trial.bytes, got, elem.size());
        }
        let pairs = trial.bytes.chunks_exact(elem.size()).zip(got.chunks_exact(elem.size()));
        for (idx, (original, decoded)) in pairs.enumerate() {
            let (original, decoded) = (value(elem, original), value(elem, decoded));
            let kept = if original.is_finite() {
                (decoded - original).abs() <= allowed(original) || self.bound == Bound::Unbounded
            } else {
                self.bound == Bound::Unbounded
                    || decoded.total_cmp(&original).is_eq()
                    || decoded.is_nan() && original.is_nan()
            };
            if !kept {
                return Err(format!(
                    "element {idx} breaks the bound `{:?}`: expected {original:e}, got {decoded:e}",
                    self.bound
                ));
            }
        }
        Ok(())
    }
}

impl sharing::Subject for Subject {
    type Trial = Trial;
    type Encoded = Latents;

    fn encode(&self, trial: &Trial) -> Check<Latents> {
        trial.forward(&*self.transform)
    }

    fn decode(&self, trial: &Trial, latents: &Latents) -> Check {
        self.compare(trial, &trial.inverse(&*self.transform, latents)?)
    }

    fn agree(&self, expected: &Latents, got: &Latents) -> Check {
        if !self.declared.deterministic || expected == got {
            return Ok(());
        }
        let names = |latents: &Latents| latents.lanes().iter().map(|lane| lane.spec.to_string()).collect::<Vec<_>>();
        let (names, other_names) = (names(expected), names(got));
        if names != other_names {
            return Err(format!("declared deterministic, but gives {names:?} and then {other_names:?}"));
        }
        let pairs = expected.lanes().iter().zip(got.lanes());
        let differs = pairs.filter(|(a, b)| a != b).map(|(lane, _)| lane.spec.to_string()).next().unwrap_or_default();
        Err(format!("declared deterministic, but {differs} has other elements the second time"))
    }
}

/// A chunk to transform, with its context.
struct Trial {
    case: Case,
    role: Role,
    bytes: Vec<u8>,
    around: Surroundings,
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.case, self.role)
    }
}

impl Trial {
    fn dtype(&self) -> DType {
        self.case.spec.elem.dtype().unwrap_or_else(|| unreachable!("transforms are tried with tensors only"))
    }

    fn context(&self) -> Context<'_> {
        Context { role: self.role, ..self.around.context() }
    }

    fn chunk(&self) -> Result<Chunk<'_>> {
        Chunk::new(self.case.spec.shape, self.dtype(), &self.bytes)
    }

    fn forward(&self, transform: &dyn LossyTransform) -> Check<Latents> {
        let mut latents = Latents::new();
        self.chunk()
            .and_then(|chunk| transform.forward(chunk, &self.context(), &mut latents))
            .map_err(|error| format!("forward fails: {error}"))?;
        Ok(latents)
    }

    fn inverse(&self, transform: &dyn LossyTransform, latents: &Latents) -> Check<Vec<u8>> {
        let mut out = vec![0xA5; self.bytes.len()];
        self.invert(transform, latents, &mut out).map_err(|error| format!("inverse fails: {error}"))?;
        Ok(out)
    }

    /// Inverts into `out`, which has the length of the chunk.
    fn invert(&self, transform: &dyn LossyTransform, latents: &Latents, out: &mut [u8]) -> Result<()> {
        let out = ChunkMut::new(self.case.spec.shape, self.dtype(), out)?;
        transform.inverse(latents, &self.context(), out)
    }
}
