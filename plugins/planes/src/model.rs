//! What a decoder must know before it decodes symbols: which channel uses which table, and the tables.

use crate::cluster::Map;
use crate::coder::{Coded, Encoder, MAX_CONTEXTS, MAX_LOG, MIN_LOG, Tables, boxed};
use crate::fields::MAX_PLANES;
use crate::side::{Bit, Side};
use crate::table::{Kind, Levels, Models, frequencies, levels};

/// Most tables of literal rows, and of each class of similar rows.
pub(crate) const MAX_LITERAL: usize = 16;
pub(crate) const MAX_SIMILAR: usize = 8;

/// Contexts of the symbols of a chunk.
pub(crate) const LITERAL: usize = 0;
pub(crate) const NEAR: usize = LITERAL + MAX_LITERAL;
pub(crate) const FAR: usize = NEAR + MAX_SIMILAR;
/// How each head of a token is coded.
pub(crate) const WAYS: usize = FAR + MAX_SIMILAR;
/// Distance to the reference, low and high byte.
pub(crate) const DISTANCE: usize = WAYS + 1;
/// Planes that are worth coding.
pub(crate) const PLANE: usize = DISTANCE + 2;
/// A power of two, so that counting needs no check.
pub(crate) const CONTEXTS: usize = MAX_CONTEXTS;

const _: () = assert!(PLANE + MAX_PLANES <= CONTEXTS);

/// How often each symbol occurs in each context.
pub(crate) type Counts = [[u32; 256]; CONTEXTS];

/// Counts symbols in their contexts.
pub(crate) fn count(counts: &mut Counts, coded: &[Coded]) {
    let counts = counts.as_flattened_mut();
    for coded in coded {
        counts[usize::from(*coded) % (CONTEXTS * 256)] += 1;
    }
}

/// No counts yet.
pub(crate) fn no_counts() -> Box<Counts> {
    boxed([0; 256])
}

/// Maps and tables.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    /// Frequencies sum to `1 << log`.
    pub log: u32,
    /// Levels of an octave: 2 or 4.
    pub steps: u8,
    /// Table of each channel in literal rows.
    pub literal: Map,
    /// Table of each channel in rows that resemble an earlier one, if there are such rows.
    pub similar: Option<Map>,
    /// Planes that are coded rather than stored.
    pub coded_planes: [bool; MAX_PLANES],
    /// Tables by context; those not in use stay empty.
    levels: Box<[Levels; CONTEXTS]>,
}

impl Model {
    /// A model without tables.
    pub fn new(log: u32, steps: u8, literal: Map, similar: Option<Map>, coded_planes: [bool; MAX_PLANES]) -> Self {
        Self { log, steps, literal, similar, coded_planes, levels: boxed([0; 256]) }
    }

    /// A model to be read; its number of channels is known.
    pub fn unread(channels: usize) -> Self {
        Self::new(MAX_LOG, 4, Map::single(channels), None, [false; MAX_PLANES])
    }

    /// Makes the tables of all contexts in use from counts.
    pub fn set_tables(&mut self, counts: &Counts) {
        let contexts: Vec<_> = self.contexts().flat_map(|(_, contexts)| contexts).collect();
        for context in contexts {
            self.levels[context] = levels(&counts[context], self.steps);
        }
    }

    /// Gives every symbol of literal rows a level whose exponent lies within `reach` of one that occurs.
    pub fn widen(&mut self, reach: usize) {
        for table in &mut self.levels[LITERAL..NEAR] {
            let occurs: [bool; 32] =
                std::array::from_fn(|exponent| (0..8).any(|i| table[(i >> 2) << 7 | exponent << 2 | i & 3] > 0));
            for (symbol, level) in table.iter_mut().enumerate() {
                let exponent = symbol >> 2 & 0x1F;
                let near = exponent.saturating_sub(reach)..(exponent + reach + 1).min(32);
                if *level == 0 && occurs[near].contains(&true) {
                    *level = 1;
                }
            }
        }
    }

    /// Whether the symbol has a frequency in its context.
    pub fn can_code(&self, coded: Coded) -> bool {
        self.levels[usize::from(coded >> 8) % CONTEXTS][usize::from(coded as u8)] > 0
    }

    /// Contexts in use, with the kind of their tables.
    fn contexts(&self) -> impl Iterator<Item = (Kind, std::ops::Range<usize>)> {
        let similar = self.similar.as_ref().map_or(0, |map| map.tables);
        let references = usize::from(self.similar.is_some());
        [
            (Kind::Signed, LITERAL..LITERAL + self.literal.tables),
            (Kind::Difference, NEAR..NEAR + similar),
            (Kind::Difference, FAR..FAR + similar),
            (Kind::Plain, WAYS..WAYS + 3 * references),
        ]
        .into_iter()
        .chain(
            (0..MAX_PLANES)
                .filter(|&plane| self.coded_planes[plane])
                .map(|plane| (Kind::Plain, PLANE + plane..PLANE + plane + 1)),
        )
    }

    /// Codes the model, whose number of channels both sides know; `planes` is the number of planes.
    pub fn code(&mut self, side: &mut impl Side, planes: usize) {
        self.log = MIN_LOG + side.raw(2, self.log - MIN_LOG).min(MAX_LOG - MIN_LOG);
        self.steps = if side.raw(1, u32::from(self.steps == 4)) == 1 { 4 } else { 2 };
        code_map(side, &mut self.literal, MAX_LITERAL);
        if side.raw(1, u32::from(self.similar.is_some())) == 1 {
            let map = self.similar.get_or_insert_with(|| Map::single(self.literal.of.len()));
            code_map(side, map, MAX_SIMILAR);
        } else {
            self.similar = None;
        }
        for coded in &mut self.coded_planes[..planes] {
            *coded = side.raw(1, u32::from(*coded)) == 1;
        }
        let contexts: Vec<_> = self.contexts().collect();
        let mut models: Option<Models> = None;
        for (kind, contexts) in contexts {
            // Near and far rows have similar tables, so the second continues where the first ended.
            let models = match &mut models {
                Some(models) if models.kind() == kind && kind != Kind::Plain => models,
                other => other.insert(Models::new(kind, self.steps)),
            };
            for context in contexts {
                models.code(side, &mut self.levels[context]);
            }
        }
    }

    /// Sets up an encoder.
    pub fn prepare_encoder(&self, encoder: &mut Encoder) {
        encoder.start(self.log);
        for (_, contexts) in self.contexts() {
            for context in contexts {
                encoder.set(context, &frequencies(&self.levels[context], self.steps, self.log));
            }
        }
    }

    /// Sets up decoding tables.
    pub fn prepare_tables(&self, tables: &mut Tables) {
        tables.start(self.log);
        for (_, contexts) in self.contexts() {
            for context in contexts {
                tables.set(context, &frequencies(&self.levels[context], self.steps, self.log));
            }
        }
    }
}

/// Codes which table each channel uses; channels next to each other often use the same.
pub(crate) fn code_map(side: &mut impl Side, map: &mut Map, most: usize) {
    let bits = (most - 1).ilog2() + 1;
    map.tables = side.raw(bits, map.tables as u32 - 1) as usize + 1;
    let bits = if map.tables > 1 { (map.tables - 1).ilog2() + 1 } else { 0 };
    let mut models = [[Bit::default(); MAX_LITERAL]; MAX_LITERAL];
    let mut last = 0;
    for table in &mut map.of {
        let mut prefix = 1;
        for i in (0..bits).rev() {
            let bit = side.bit(&mut models[last][prefix % MAX_LITERAL], *table >> i & 1 == 1);
            prefix = prefix << 1 | usize::from(bit);
        }
        *table = ((prefix - (1 << bits)) as u8).min(map.tables as u8 - 1);
        last = usize::from(*table);
    }
}
