//! Puts entries in order, and refuses those that contradict their neighbours.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use gearbox_core::{DType, Rope};

use super::open::{Candidate, Defect};
use super::{Entry, Findings, Layer, Reason, Run, Tensor};

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
        let mut layer = Layer { id, entries: Vec::new() };
        let mut kinds = Kinds::default();
        for Candidate { rope, entry, .. } in candidates {
            let checked = check_range(layer.entries.last(), &entry)
                .and_then(|()| kinds.check(&entry))
                .and_then(|()| facts.check(rope.as_ref(), &entry));
            match checked {
                Ok(()) => {
                    kinds.learn(&entry);
                    facts.learn(rope, &entry);
                    layer.entries.push(entry);
                }
                Err(defect) => findings.push(defect.reason, entry.place, defect.message),
            }
        }
        if !layer.entries.is_empty() {
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

/// What all entries of a run must agree on, with the place that said it first.
#[derive(Default)]
struct Facts {
    rope: Option<Stated<Rope>>,
    /// By first position and number of tokens.
    tokens: BTreeMap<(u64, usize), Stated<Arc<[u32]>>>,
}

impl Facts {
    fn check(&self, rope: Option<&Rope>, entry: &Entry) -> Result<(), Defect> {
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

    fn learn(&mut self, rope: Option<Rope>, entry: &Entry) {
        if let (None, Some(rope)) = (&self.rope, rope) {
            self.rope = Some((rope, entry.place.clone()));
        }
        if let Some(tokens) = &entry.tokens {
            self.tokens.entry((entry.start, entry.seq)).or_insert_with(|| (Arc::clone(tokens), entry.place.clone()));
        }
    }
}
