//! The store of one layer: encoded chunks, then raw recent tokens.

use std::ops::Range;

use gearbox_core::{
    AttentionStep, CacheView, Chunk, ChunkCoder, ChunkMut, Context, EncodedChunk, EncodedLane, Error, EvictionSession,
    LaneCoding, Limits, Needs, Result, ResultExt, Role,
};
use rayon::prelude::*;

use super::Spec;
use super::ledger::{Coded, LayerBytes, LayerLedger, Usage};
use super::positions::Positions;
use super::{keep_lists, shrink};

/// Bytes of the head of a chunk in a container, about: frame, sequence, position, tokens, number of lanes and checksum.
const CHUNK_HEADER: usize = 16;

/// Keys and values of a run of slots.
#[derive(Debug)]
struct Stored {
    seq: usize,
    /// By role.
    coded: [EncodedChunk; 2],
}

impl Stored {
    fn bytes(&self) -> LayerBytes {
        let mut bytes = LayerBytes::default();
        for coded in &self.coded {
            let headers = CHUNK_HEADER + coded.stored_len() - coded.bytes.len();
            let held = coded.bytes.capacity() + size_of_val(coded) + coded.lanes.capacity() * size_of::<EncodedLane>();
            bytes.payload += coded.bytes.len() as u64;
            bytes.headers += headers as u64;
            bytes.slack += held.saturating_sub(coded.bytes.len() + headers) as u64;
        }
        bytes
    }

    /// What encoding it came to, apart from time; `row` are the bytes of a token of one role.
    fn coded(&self, row: usize) -> Coded {
        let bytes = self.bytes();
        let is_raw = |coded: &&EncodedChunk| coded.lanes.iter().all(|lane| lane.coding == LaneCoding::Stored);
        Coded {
            chunks: 2,
            raw_chunks: self.coded.iter().filter(is_raw).count() as u64,
            raw_bytes: 2 * (self.seq * row) as u64,
            stored_bytes: bytes.payload + bytes.headers,
            ..Coded::default()
        }
    }
}

/// The store of one layer.
pub(super) struct Layer {
    pub(super) id: u32,
    chunks: Vec<Stored>,
    /// Tokens in chunks.
    coded: usize,
    /// Bytes of the chunks.
    coded_bytes: LayerBytes,
    /// Raw tokens behind the chunks, by role, in the storage type.
    pub(super) tail: [Vec<u8>; 2],
    pub(super) positions: Positions,
    pub(super) session: Option<Box<dyn EvictionSession>>,
    pub(super) usage: Usage,
    /// What coding came to so far; time is added by the cache.
    pub(super) coding: Coded,
}

/// The decoded chunks of the layer that is worked on, by role, in the storage type; after [`Layer::evict`] all its tokens.
pub(super) type Decoded = [Vec<u8>; 2];

impl Layer {
    pub(super) fn new(id: u32) -> Self {
        Self {
            id,
            chunks: Vec::new(),
            coded: 0,
            coded_bytes: LayerBytes::default(),
            tail: Default::default(),
            positions: Positions::All(0),
            session: None,
            usage: Usage::default(),
            coding: Coded::default(),
        }
    }

    pub(super) fn chunks(&self) -> usize {
        2 * self.chunks.len()
    }

    /// Resident bytes.
    pub(super) fn bytes(&self) -> LayerBytes {
        let mut bytes = self.coded_bytes;
        let (held, used) = self.positions.bytes();
        bytes.positions += used as u64;
        bytes.slack += (held - used) as u64;
        for tail in &self.tail {
            bytes.tail += tail.len() as u64;
            bytes.slack += (tail.capacity() - tail.len()) as u64;
        }
        bytes
    }

    /// What it holds, after so many tokens.
    pub(super) fn ledger(&self, seen: u64) -> LayerLedger {
        LayerLedger {
            layer: self.id,
            seen,
            live: self.positions.len() as u64,
            chunks: self.chunks() as u64,
            bytes: self.bytes(),
            usage: self.usage,
            coded: self.coding,
        }
    }

    /// Bytes of the decoded chunks of one role.
    pub(super) fn coded_len(&self, spec: &Spec) -> usize {
        self.coded * spec.row()
    }

    /// Fills `out` with the decoded chunks.
    pub(super) fn decode(&mut self, spec: &Spec, ids: &[u32], out: &mut Decoded) -> Result<()> {
        for out in out.iter_mut() {
            out.resize(self.coded_len(spec), 0);
        }
        let [keys, values] = out;
        self.decode_into(spec, ids, [keys, values])?;
        self.coding.decoded_bytes += 2 * self.coded_len(spec) as u64;
        Ok(())
    }

    /// Decodes the chunks into memory of [`Layer::coded_len`] bytes each.
    pub(super) fn decode_into(&self, spec: &Spec, ids: &[u32], [keys, values]: [&mut [u8]; 2]) -> Result<()> {
        if self.chunks.is_empty() {
            return Ok(());
        }
        let coding = Coding::new(spec, self.id, &self.positions, ids)?;
        let mut start = 0;
        if coding.uses.history {
            for chunk in &self.chunks {
                let end = start + chunk.seq;
                let (key_history, key) = keys[..end * spec.row()].split_at_mut(start * spec.row());
                let (value_history, value) = values[..end * spec.row()].split_at_mut(start * spec.row());
                coding.decode(chunk, start..end, [key_history, value_history], [key, value])?;
                start = end;
            }
            return Ok(());
        }
        let (mut keys, mut values) = (&mut keys[..], &mut values[..]);
        let jobs = self.chunks.iter().map(|chunk| {
            let slots = start..start + chunk.seq;
            start = slots.end;
            let key = keys.split_off_mut(..chunk.seq * spec.row()).unwrap_or_default();
            let value = values.split_off_mut(..chunk.seq * spec.row()).unwrap_or_default();
            (chunk, slots, [key, value])
        });
        let jobs: Vec<_> = jobs.collect();
        jobs.into_par_iter().try_for_each(|(chunk, slots, out)| coding.decode(chunk, slots, [&[]; 2], out))
    }

    /// Whether coding its chunks takes the decoded ones before them.
    pub(super) fn looks_back(&self, spec: &Spec) -> Result<bool> {
        Ok(Coding::uses(spec, self.id)?.history)
    }

    /// Shows the policy, if there is one, probabilities `(queries, q_heads, live)` of consecutive queries.
    pub(super) fn observe(&mut self, first_query: usize, queries: usize, probabilities: &[f32]) -> Result<()> {
        let Some(session) = self.session.as_deref_mut() else { return Ok(()) };
        let (first_query, tokens, live) = (first_query as u64, self.positions.len(), self.positions.flat());
        session.observe(&AttentionStep { first_query, queries, tokens, live: &live, probabilities })
    }

    /// The slots that the policy keeps after so many tokens, for [`Layer::evict`]; none if all stay.
    pub(super) fn plan(&mut self, spec: &Spec, seen: usize) -> Result<Option<Vec<Vec<u32>>>> {
        let Some(session) = self.session.as_deref_mut() else { return Ok(None) };
        let (tokens, live) = (self.positions.len(), self.positions.flat());
        let keep = session.plan(&CacheView { seen: seen as u64, tokens, live: &live })?;
        keep_lists(keep, tokens, spec.kv_heads)
    }

    /// Keeps the named slots: one ascending list for all heads, or one per KV head of equal length.
    ///
    /// Chunks that lose tokens become raw: their tokens are named in the result and lie in `decoded`, which holds every token of the
    /// layer then. A chunk in front of which less than half a chunk is left goes with it, so that chunks do not crumble.
    pub(super) fn evict(
        &mut self,
        spec: &Spec,
        lists: &[Vec<u32>],
        decoded: &mut Decoded,
    ) -> Result<Vec<Range<usize>>> {
        self.positions.keep(lists);
        if self.chunks.is_empty() {
            for tail in &mut self.tail {
                gather(tail, spec, lists);
                shrink(tail, spec.row());
            }
            return Ok(Vec::new());
        }
        for (decoded, tail) in decoded.iter_mut().zip(&self.tail) {
            decoded.extend_from_slice(tail);
            gather(decoded, spec, lists);
        }
        let history = self.looks_back(spec)?;
        let mut kept = Vec::new();
        let mut raw = Vec::new();
        let (mut start, mut done) = (0, 0);
        for chunk in std::mem::take(&mut self.chunks) {
            let end = start + chunk.seq;
            let at = lists[0].partition_point(|slot| (*slot as usize) < start);
            let holds =
                |list: &Vec<u32>, at: usize, slot: usize| list.get(at).is_some_and(|held| *held as usize == slot);
            let whole = lists.iter().all(|list| holds(list, at, start) && holds(list, at + chunk.seq - 1, end - 1));
            let crumb = at > done && at - done < spec.chunk / 2;
            if whole && !crumb && (!history || at == start) {
                raw.extend(pieces(done..at, spec.chunk));
                done = at + chunk.seq;
                kept.push(chunk);
            }
            start = end;
        }
        // Slots where any head has a token of the tail are raw; so is what does not fill a chunk before them.
        let boundary = lists.iter().map(|list| list.partition_point(|slot| (*slot as usize) < self.coded)).min();
        let boundary = boundary.unwrap_or(done);
        let full = done + (boundary - done) / spec.chunk * spec.chunk;
        raw.extend(pieces(done..full, spec.chunk));
        for (tail, decoded) in self.tail.iter_mut().zip(decoded) {
            tail.clear();
            tail.extend_from_slice(&decoded[full * spec.row()..]);
            shrink(tail, spec.row());
        }
        self.coded = full;
        self.chunks = kept;
        self.measure();
        Ok(raw)
    }

    /// Encodes the raw runs of slots that [`Layer::evict`] left, and whole chunks of tokens that are older than the newest ones.
    ///
    /// `decoded` holds all slots before the tail.
    pub(super) fn encode(
        &mut self,
        spec: &Spec,
        ids: &[u32],
        mut raw: Vec<Range<usize>>,
        decoded: &mut Decoded,
    ) -> Result<()> {
        let mut left = self.tail[0].len() / spec.row();
        let mut end = self.coded;
        while spec.ages(left) {
            raw.push(end..end + spec.chunk);
            end += spec.chunk;
            left -= spec.chunk;
        }
        if raw.is_empty() {
            return Ok(());
        }
        let aged = (end - self.coded) * spec.row();
        for (decoded, tail) in decoded.iter_mut().zip(&mut self.tail) {
            decoded.truncate(self.coded * spec.row());
            decoded.extend_from_slice(&tail[..aged]);
            tail.drain(..aged);
            shrink(tail, spec.row());
        }
        let coding = Coding::new(spec, self.id, &self.positions, ids)?;
        let new = coding.encode_all(&raw, decoded)?;
        for chunk in &new {
            self.coding += chunk.coded(spec.row());
        }
        // The new runs lie between the chunks that stayed, in order.
        let mut old = std::mem::take(&mut self.chunks).into_iter();
        let mut start = 0;
        for (chunk, slots) in new.into_iter().zip(raw) {
            while start < slots.start {
                let Some(chunk) = old.next() else { unreachable!("slots before a run are those of chunks") };
                start += chunk.seq;
                self.chunks.push(chunk);
            }
            start = slots.end;
            self.chunks.push(chunk);
        }
        self.chunks.extend(old);
        self.coded = end;
        self.measure();
        Ok(())
    }
}

impl Layer {
    fn measure(&mut self) {
        self.coded_bytes = LayerBytes::default();
        for chunk in &self.chunks {
            self.coded_bytes += chunk.bytes();
        }
    }
}

/// Moves the named slots to the front, and drops the rest.
fn gather(bytes: &mut Vec<u8>, spec: &Spec, lists: &[Vec<u32>]) {
    let row = spec.row();
    // One list moves whole rows, several move one head each.
    let width = row / lists.len();
    for (part, list) in lists.iter().enumerate() {
        for (to, from) in list.iter().enumerate() {
            let from = *from as usize * row + part * width;
            bytes.copy_within(from..from + width, to * row + part * width);
        }
    }
    bytes.truncate(lists[0].len() * row);
}

/// Cuts a run of slots into pieces of nearly equal length, none longer than a chunk.
fn pieces(slots: Range<usize>, chunk: usize) -> impl Iterator<Item = Range<usize>> {
    let count = slots.len().div_ceil(chunk);
    let at = move |piece: usize| slots.start + slots.len() * piece / count;
    (0..count).map(move |piece| at(piece)..at(piece + 1))
}

fn place(role: Role, slots: &Range<usize>) -> String {
    format!("{role}, slots {}..{}", slots.start, slots.end)
}

/// What coding the chunks of one layer takes.
struct Coding<'a> {
    spec: &'a Spec,
    layer: u32,
    /// By role.
    coders: [&'a ChunkCoder; 2],
    uses: Needs,
    positions: &'a Positions,
    /// Ids of all tokens seen, if they are known.
    ids: &'a [u32],
}

/// What both sides know of a run of slots, apart from tensors.
struct Facts {
    first: u64,
    /// Token ids, if they are used and all heads hold the same tokens.
    tokens: Option<Vec<u32>>,
    history_tokens: Option<Vec<u32>>,
    /// Whether positions follow each other, as plugins that know of rotations expect.
    gapless: bool,
}

impl<'a> Coding<'a> {
    /// What the coders of a layer look at.
    fn uses(spec: &Spec, layer: u32) -> Result<Needs> {
        Ok(Self::coders(spec, layer)?.iter().fold(Needs::NONE, |uses, coder| uses.or(coder.context())))
    }

    fn coders(spec: &Spec, layer: u32) -> Result<[&ChunkCoder; 2]> {
        let pipeline = spec.pipeline.as_deref();
        let pipeline =
            pipeline.ok_or_else(|| Error::unsupported("a cache without a pipeline has no encoded chunks"))?;
        Ok([pipeline.live_coder(layer, Role::Key)?, pipeline.live_coder(layer, Role::Value)?])
    }

    fn new(spec: &'a Spec, layer: u32, positions: &'a Positions, ids: &'a [u32]) -> Result<Self> {
        let (coders, uses) = (Self::coders(spec, layer)?, Self::uses(spec, layer)?);
        Ok(Self { spec, layer, coders, uses, positions, ids })
    }

    fn facts(&self, slots: &Range<usize>) -> Facts {
        let shared = self.positions.shared(slots.clone());
        let first = shared.as_ref().map_or_else(
            || (0..self.positions.rows()).map(|row| self.positions.at(row, slots.start)).min().unwrap_or(0),
            |positions| positions[0],
        );
        let gapless = shared.as_ref().is_some_and(|positions| {
            positions.iter().enumerate().all(|(idx, position)| *position as usize == first as usize + idx)
        });
        let ids = |positions: Vec<u32>| positions.into_iter().map(|position| self.ids[position as usize]).collect();
        let wanted = self.uses.tokens && self.spec.knows_ids;
        let history_tokens = (wanted && self.uses.history).then(|| self.positions.shared(0..slots.start)).flatten();
        Facts {
            first: first.into(),
            tokens: shared.filter(|_| wanted).map(ids),
            history_tokens: history_tokens.map(ids),
            gapless,
        }
    }

    /// The context of one role. `history` are the decoded slots before, `peer` the decoded keys.
    fn context<'b>(
        &'b self,
        role: Role,
        facts: &'b Facts,
        history: &'b [u8],
        peer: Option<&'b [u8]>,
    ) -> Result<Context<'b>> {
        let uses = self.coders[role as usize].context();
        let chunk = |bytes: &'b [u8]| {
            let shape = self.spec.shape(bytes.len() / self.spec.row());
            Chunk::new(shape, self.spec.dtype, bytes)
        };
        let mut cx = Context::new(self.layer, role, facts.first);
        cx.tokens = facts.tokens.as_deref().filter(|_| uses.tokens);
        cx.rope = self.spec.rope.as_ref().filter(|_| facts.gapless);
        cx.peer = peer.filter(|_| uses.peer).map(chunk).transpose()?;
        if uses.history {
            cx.history = Some(chunk(history)?);
            cx.history_tokens = facts.history_tokens.as_deref().filter(|_| uses.tokens);
        }
        Ok(cx)
    }

    fn decode_role(
        &self,
        role: Role,
        (stored, slots): (&Stored, &Range<usize>),
        (facts, history, peer): (&Facts, &[u8], Option<&[u8]>),
        out: &mut [u8],
    ) -> Result<()> {
        let cx = self.context(role, facts, history, peer)?;
        let out = ChunkMut::new(self.spec.shape(slots.len()), self.spec.dtype, out)?;
        let coder = self.coders[role as usize];
        let decoded = coder.decode(stored.coded[role as usize].lanes(), &cx, &Limits::default(), out);
        decoded.context(|| place(role, slots))
    }

    /// Decodes a chunk; `history` holds all slots before it if a coder looks at them.
    fn decode(&self, stored: &Stored, slots: Range<usize>, history: [&[u8]; 2], out: [&mut [u8]; 2]) -> Result<()> {
        let facts = self.facts(&slots);
        let chunk = (stored, &slots);
        let [key, value] = out;
        let [key_history, value_history] = history;
        if self.uses.peer {
            self.decode_role(Role::Key, chunk, (&facts, key_history, None), key)?;
            return self.decode_role(Role::Value, chunk, (&facts, value_history, Some(key)), value);
        }
        let (keys, values) = rayon::join(
            || self.decode_role(Role::Key, chunk, (&facts, key_history, None), key),
            || self.decode_role(Role::Value, chunk, (&facts, value_history, None), value),
        );
        keys.and(values)
    }

    fn encode_role(
        &self,
        role: Role,
        slots: &Range<usize>,
        (facts, history, peer): (&Facts, &[u8], Option<&[u8]>),
        bytes: &[u8],
    ) -> Result<EncodedChunk> {
        let coder = self.coders[role as usize];
        let mut encoded = EncodedChunk::default();
        let mut work = || {
            if !facts.gapless {
                let offered = Needs { tokens: facts.tokens.is_some(), rope: false, ..self.spec.offered() };
                coder.check(self.spec.dtype, offered)?;
            }
            let cx = self.context(role, facts, history, peer)?;
            coder.encode(Chunk::new(self.spec.shape(slots.len()), self.spec.dtype, bytes)?, &cx, &mut encoded)
        };
        work().context(|| place(role, slots))?;
        // Without the capacity that growing left.
        Ok(encoded.clone())
    }

    /// Encodes a run of slots. `before` holds all earlier slots if a coder looks at them.
    fn encode(&self, slots: &Range<usize>, before: [&[u8]; 2], [key, value]: [&[u8]; 2]) -> Result<Stored> {
        let facts = self.facts(slots);
        let seq = slots.len();
        if !self.uses.peer {
            let (keys, values) = rayon::join(
                || self.encode_role(Role::Key, slots, (&facts, before[0], None), key),
                || self.encode_role(Role::Value, slots, (&facts, before[1], None), value),
            );
            return Ok(Stored { seq, coded: [keys?, values?] });
        }
        let coded = self.encode_role(Role::Key, slots, (&facts, before[0], None), key)?;
        let mut stored = Stored { seq, coded: [coded, EncodedChunk::default()] };
        let mut peer = key.to_vec();
        if !self.coders[0].is_lossless() {
            self.decode_role(Role::Key, (&stored, slots), (&facts, before[0], None), &mut peer)?;
        }
        stored.coded[1] = self.encode_role(Role::Value, slots, (&facts, before[1], Some(&peer)), value)?;
        Ok(stored)
    }

    /// Encodes runs of slots. `decoded` holds all slots; where coders look at earlier ones, it then holds what decoding gives.
    fn encode_all(&self, runs: &[Range<usize>], decoded: &mut Decoded) -> Result<Vec<Stored>> {
        let row = self.spec.row();
        if !self.uses.history {
            let bytes = |role: usize, slots: &Range<usize>| &decoded[role][slots.start * row..slots.end * row];
            let encode = |slots| self.encode(slots, [&[]; 2], [bytes(0, slots), bytes(1, slots)]);
            return runs.par_iter().map(encode).collect();
        }
        let mut done = Vec::with_capacity(runs.len());
        for slots in runs {
            let [keys, values] = decoded;
            let (key_history, key) = keys[..slots.end * row].split_at_mut(slots.start * row);
            let (value_history, value) = values[..slots.end * row].split_at_mut(slots.start * row);
            let history: [&[u8]; 2] = [key_history, value_history];
            let stored = self.encode(slots, history, [key, value])?;
            if !self.coders.iter().all(|coder| coder.is_lossless()) {
                self.decode(&stored, slots.clone(), history, [key, value])?;
            }
            done.push(stored);
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_even_and_cover_the_run() {
        let cut = |slots, chunk| pieces(slots, chunk).collect::<Vec<_>>();
        assert!(cut(3..3, 4).is_empty());
        assert_eq!(cut(3..9, 4), [3..6, 6..9]);
        assert_eq!(cut(3..11, 4), [3..7, 7..11]);
        assert_eq!(cut(0..9, 4), [0..3, 3..6, 6..9]);
    }
}
