//! Puts entries in order, and refuses those that contradict their neighbours.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use gearbox_core::{DType, Rope};
use serde_json::Value;

use super::open::{Candidate, Defect};
use super::{AttentionFacts, Entry, Findings, Layer, LayerFacts, Reason, Run, Tensor};

/// Sorts candidates into runs and layers; entries that clash with an earlier one become findings.
pub(super) fn assemble(candidates: Vec<Candidate>, findings: &mut Findings) -> Vec<Run> {
    let mut runs: BTreeMap<String, BTreeMap<u32, Vec<Candidate>>> = BTreeMap::new();
    for candidate in candidates {
        let layers = runs.entry(candidate.run.clone()).or_default();
        layers.entry(candidate.layer).or_default().push(candidate);
    }
    runs.into_iter().filter_map(|(name, layers)| run(name, layers, findings)).collect()
}

fn run(name: String, layers: BTreeMap<u32, Vec<Candidate>>, findings: &mut Findings) -> Option<Run> {
    let mut run = Run { name, rope: None, layers: Vec::new() };
    let mut facts = Facts::default();
    for (id, mut candidates) in layers {
        // Of two entries with one start the longer comes first and wins.
        candidates.sort_by(|a, b| {
            let key = |c: &Candidate| (c.entry.start, Reverse(c.entry.seq));
            key(a).cmp(&key(b)).then_with(|| a.entry.place.cmp(&b.entry.place))
        });
        let mut layer = Layer { id, ..Layer::default() };
        let (mut kinds, mut own) = (Kinds::default(), OwnFacts::default());
        for Candidate { rope, facts: stated, entry, .. } in candidates {
            let checked = check_range(layer.entries.last(), &entry)
                .and_then(|()| kinds.check(&entry))
                .and_then(|()| own.check(&stated))
                .and_then(|()| facts.check(rope.as_ref(), &stated, &entry));
            match checked {
                Ok(()) => {
                    kinds.learn(&entry);
                    facts.learn(rope, &stated, &entry);
                    own.learn(stated, &entry);
                    layer.entries.push(entry);
                }
                Err(defect) => findings.push(defect.reason, entry.place, defect.message),
            }
        }
        if let Some(entry) = layer.entries.first() {
            layer.facts = own.facts().without_usual(entry.key.shape.dim);
            run.layers.push(layer);
        }
    }
    run.rope = facts.rope.map(|(rope, _)| rope);
    (!run.layers.is_empty()).then_some(run)
}

fn range(entry: &Entry) -> String {
    format!("{}..{}", entry.start, entry.end())
}

/// Compares an entry with the one before it.
fn check_range(last: Option<&Entry>, entry: &Entry) -> Result<(), Defect> {
    let Some(last) = last else { return Ok(()) };
    if (entry.start, entry.seq) == (last.start, last.seq) {
        let message = format!("tokens {} are also in {}", range(entry), last.place);
        return Err(Defect::new(Reason::DuplicateRange, message));
    }
    if entry.start < last.end() {
        let message = format!("tokens {} overlap {} of {}", range(entry), range(last), last.place);
        return Err(Defect::new(Reason::OverlappingRange, message));
    }
    Ok(())
}

/// What the entries of a layer must agree on: dtype, heads and dim of each role, with the place that said it first.
#[derive(Default)]
struct Kinds(BTreeMap<&'static str, Stated<Kind>>);

type Kind = (DType, usize, usize);

fn kind(tensor: &Tensor) -> Kind {
    (tensor.dtype, tensor.shape.heads, tensor.shape.dim)
}

fn describe((dtype, heads, dim): Kind) -> String {
    format!("{dtype} with {heads} heads of {dim}")
}

impl Kinds {
    fn check(&self, entry: &Entry) -> Result<(), Defect> {
        for (role, tensor) in entry.tensors() {
            let got = kind(tensor);
            if let Some((expected, place)) = self.0.get(role).filter(|(expected, _)| *expected != got) {
                let (expected, got) = (describe(*expected), describe(got));
                let message = format!("{role}: expected {expected} as in {place}, got {got}");
                return Err(Defect::new(Reason::ShapeDiffersInLayer, message));
            }
        }
        Ok(())
    }

    fn learn(&mut self, entry: &Entry) {
        for (role, tensor) in entry.tensors() {
            self.0.entry(role).or_insert_with(|| (kind(tensor), entry.place.clone()));
        }
    }
}

/// A fact and the place that stated it.
type Stated<T> = (T, String);

/// What the entries of a layer must agree on besides, with the place that said it first.
#[derive(Default)]
struct OwnFacts {
    attention: Option<Stated<AttentionFacts>>,
    rope: Option<Stated<Value>>,
}

impl OwnFacts {
    fn check(&self, stated: &LayerFacts) -> Result<(), Defect> {
        let differs = |place: &str, first: String, got: String| {
            Err(Defect::new(Reason::FactsDifferInLayer, format!("expected {first} as in {place}, got {got}")))
        };
        if let (Some(got), Some((first, place))) = (&stated.attention, &self.attention)
            && got != first
        {
            return differs(place, format!("attention with {first}"), got.to_string());
        }
        if let (Some(got), Some((first, place))) = (&stated.rope, &self.rope)
            && got != first
        {
            return differs(place, format!("the rotation {first}"), got.to_string());
        }
        Ok(())
    }

    fn learn(&mut self, stated: LayerFacts, entry: &Entry) {
        let place = || entry.place.clone();
        if let (None, Some(attention)) = (&self.attention, stated.attention) {
            self.attention = Some((attention, place()));
        }
        if let (None, Some(rope)) = (&self.rope, stated.rope) {
            self.rope = Some((rope, place()));
        }
    }

    fn facts(self) -> LayerFacts {
        let attention = self.attention.map(|(attention, _)| attention);
        LayerFacts { attention, rope: self.rope.map(|(rope, _)| rope) }
    }
}

/// What all entries of a run must agree on, with the place that said it first.
#[derive(Default)]
struct Facts {
    rope: Option<Stated<Rope>>,
    /// An entry that states a rotation of its layer alone.
    rope_layer: Option<String>,
    /// By first position and number of tokens.
    tokens: BTreeMap<(u64, usize), Stated<Arc<[u32]>>>,
}

impl Facts {
    fn check(&self, rope: Option<&Rope>, stated: &LayerFacts, entry: &Entry) -> Result<(), Defect> {
        let of_all = self.rope.as_ref().map(|(_, place)| place).filter(|_| stated.rope.is_some());
        if let Some(place) = of_all.or(self.rope_layer.as_ref().filter(|_| rope.is_some())) {
            let message = format!("expected a rotation of all layers or one of each as in {place}, got the other");
            return Err(Defect::new(Reason::RopeDiffersInRun, message));
        }
        if let (Some(rope), Some((first, place))) = (rope, &self.rope)
            && rope != first
        {
            let message = format!("expected the rotation of {place}, {first:?}, got {rope:?}");
            return Err(Defect::new(Reason::RopeDiffersInRun, message));
        }
        if let (Some(tokens), Some((first, place))) = (&entry.tokens, self.tokens.get(&(entry.start, entry.seq)))
            && tokens != first
        {
            let at = tokens.iter().zip(first.iter()).position(|(a, b)| a != b).unwrap_or_default();
            let message = format!("expected the token ids of {place}, the first other one is token {at} of the entry");
            return Err(Defect::new(Reason::TokensDifferInRun, message));
        }
        Ok(())
    }

    fn learn(&mut self, rope: Option<Rope>, stated: &LayerFacts, entry: &Entry) {
        if stated.rope.is_some() && self.rope_layer.is_none() {
            self.rope_layer = Some(entry.place.clone());
        }
        if let (None, Some(rope)) = (&self.rope, rope) {
            self.rope = Some((rope, entry.place.clone()));
        }
        if let Some(tokens) = &entry.tokens {
            self.tokens.entry((entry.start, entry.seq)).or_insert_with(|| (Arc::clone(tokens), entry.place.clone()));
        }
    }
}
