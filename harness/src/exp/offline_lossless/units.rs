//! What is coded at once: entries, groups of them, and chunks of either.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use gearbox_core::{DType, Role, Stage};

use super::rejected::{COMPRESSION_FAILED, Rejected};
use super::{EntryMode, LayerArgs, UnitArgs};
use crate::dump::{Dump, Entry};

/// Reasons for leaving something out, in the order of their first use, and how often each was one.
#[derive(Clone, Debug, Default)]
pub(super) struct Skips(pub Vec<(String, u64)>);

impl Skips {
    pub fn add(&mut self, reason: &str) {
        match self.0.iter_mut().find(|(known, _)| known == reason) {
            Some((_, count)) => *count += 1,
            None => self.0.push((reason.to_owned(), 1)),
        }
    }

    pub fn total(&self) -> u64 {
        self.0.iter().map(|(_, count)| count).sum()
    }
}

/// Entries that count together or not at all, in order of position.
#[derive(Debug)]
pub(super) struct Group<'a> {
    pub layer: i64,
    pub entries: Vec<&'a Entry>,
    /// Whether an entry that belongs to it cannot be coded.
    pub is_broken: bool,
}

/// What is to be measured.
#[derive(Debug, Default)]
pub(super) struct Plan<'a> {
    pub groups: Vec<Group<'a>>,
    /// Entries that were accepted before anything was coded.
    pub selected: usize,
    pub layers: BTreeSet<i64>,
    pub runs: BTreeSet<String>,
    /// Entries that are rounded from F32.
    pub converted: usize,
    pub skips: Skips,
}

/// Run, layer, heads, channels, and the stage if it counts.
type Key = (String, i64, u64, u64, Option<Stage>);

impl<'a> Plan<'a> {
    /// Selects and groups entries.
    pub fn new(
        dump: &'a Dump,
        rejected: Vec<Rejected>,
        layers: &LayerArgs,
        units: UnitArgs,
        strict_fp16: bool,
    ) -> Self {
        let mut plan = Self::default();
        let mut groups: BTreeMap<Key, Group<'a>> = BTreeMap::new();
        let stage_of = |stage: Stage| units.aggregate_by_stage.then_some(stage);
        for (run, layer, entry) in dump.iter() {
            let layer = i64::from(layer.id);
            if !layers.hold(layer) {
                continue;
            }
            let is_f32 = [&entry.key, &entry.value].iter().any(|tensor| tensor.dtype == DType::F32);
            if is_f32 && strict_fp16 {
                plan.skips.add("skip_fp32_strict");
                continue;
            }
            plan.select(layer, &run.name, is_f32);
            if units.entry_mode.is_grouped() {
                let shape = entry.key.shape;
                let key = (run.name.clone(), layer, shape.heads as u64, shape.dim as u64, stage_of(entry.stage));
                let group = groups.entry(key).or_insert_with(|| Group { layer, entries: Vec::new(), is_broken: false });
                group.entries.push(entry);
            } else {
                plan.groups.push(Group { layer, entries: vec![entry], is_broken: false });
            }
        }
        for Rejected { reason, meta } in rejected {
            let meta = meta.filter(|_| reason == COMPRESSION_FAILED);
            let Some(meta) = meta else {
                plan.skips.add(&reason);
                continue;
            };
            let is_f32 = meta.bytes_per_elem == 4;
            if is_f32 && strict_fp16 {
                plan.skips.add("skip_fp32_strict");
                continue;
            }
            let run = meta.run_id.clone().unwrap_or_default();
            plan.select(meta.layer_id, &run, is_f32);
            let broken = Group { layer: meta.layer_id, entries: Vec::new(), is_broken: true };
            if units.entry_mode.is_grouped() {
                let [heads, dim] = meta.heads_and_dim();
                let key = (run, meta.layer_id, heads, dim, stage_of(meta.stage()));
                groups.entry(key).or_insert(broken).is_broken = true;
            } else {
                plan.groups.push(broken);
            }
        }
        plan.groups.extend(groups.into_values());
        plan
    }

    fn select(&mut self, layer: i64, run: &str, is_f32: bool) {
        self.selected += 1;
        self.layers.insert(layer);
        self.runs.insert(run.to_owned());
        self.converted += usize::from(is_f32);
    }

    /// Everything that is coded, by index of its group.
    pub fn pieces(&self, units: UnitArgs) -> Vec<Piece<'_>> {
        let whole = self.groups.iter().enumerate().filter(|(_, group)| !group.is_broken);
        whole.flat_map(|(idx, group)| Role::ALL.into_iter().flat_map(move |role| group.cut(idx, role, units))).collect()
    }
}

/// Keys or values of a run of tokens of a group, coded at once.
#[derive(Clone, Debug)]
pub(super) struct Piece<'a> {
    /// Its place in the plan.
    pub group: usize,
    pub role: Role,
    entries: &'a [&'a Entry],
    pub tokens: Range<usize>,
    /// Bytes beside the streams that the reference charges for it.
    pub framing: u64,
}

impl<'a> Group<'a> {
    fn cut(&'a self, group: usize, role: Role, units: UnitArgs) -> impl Iterator<Item = Piece<'a>> {
        let seq: usize = self.entries.iter().map(|entry| entry.seq).sum();
        let len = match units.online_chunk_seq {
            1.. if units.entry_mode.is_chunked() => units.online_chunk_seq,
            _ => seq,
        };
        let framing = match units.entry_mode {
            EntryMode::PerMeta => 0,
            EntryMode::Aggregate => 4 + 4 * self.entries.len() as u64,
            EntryMode::Chunked | EntryMode::ChunkedGrouped => units.online_framing_bytes,
        };
        (0..seq).step_by(len.max(1)).map(move |start| {
            let tokens = start..seq.min(start.saturating_add(len));
            Piece { group, role, entries: &self.entries, tokens, framing }
        })
    }
}

impl Piece<'_> {
    /// Bytes in F16.
    pub fn bytes(&self) -> u64 {
        let row = self.entries.first().map_or(0, |entry| entry.tensor(self.role).shape.row());
        2 * (self.tokens.len() * row) as u64
    }

    /// The entries it consists of, each with a range of its tokens.
    pub fn parts(&self) -> impl Iterator<Item = (&Entry, Range<usize>)> {
        let mut start = 0;
        self.entries.iter().filter_map(move |entry| {
            let first = start;
            start += entry.seq;
            let within = |token: usize| token.clamp(first, start) - first;
            let tokens = within(self.tokens.start)..within(self.tokens.end);
            (!tokens.is_empty()).then_some((*entry, tokens))
        })
    }
}

/// The piece as messages name it: its first entry and how far it reaches.
impl std::fmt::Display for Piece<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = self.parts().next().map(|(entry, _)| entry.place.as_str()).unwrap_or_default();
        write!(f, "{place}, {}, {} tokens", self.role, self.tokens.len())
    }
}
