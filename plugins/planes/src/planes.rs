//! The codec `planes`.

use std::ops::Range;
use std::sync::Arc;

use gearbox_core::{
    Artifact, Capabilities, Chunk, Codec, Context, DType, ElemSet, Error, ErrorKind, LaneRef, LaneSpec, Needs, Plugin,
    Pool, Result, ResultExt, Sample, Shape, bits, register_codec,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cluster::{Budget, Map, cluster};
use crate::coder::{Coded, Decoder as SymbolDecoder, Encoder as SymbolEncoder, Tables, in_context, in_contexts, lanes};
use crate::fields::{Fields, MAX_PLANES, Planes as Rest};
use crate::frame::{CODED, STORED, pays, put_len, take_len};
use crate::math::entropy_bits;
use crate::model::{
    Counts, DISTANCE, FAR, LITERAL, MAX_LITERAL, MAX_SIMILAR, Model, NEAR, PLANE, WAYS, count, no_counts,
};
use crate::rows::Search;
use crate::side::{Bit, Reader, Side, Writer};
use crate::trained::{Learned, Trained};

/// Settings of [`Planes`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Which rows may refer to an earlier row of the chunk.
    pub references: References,
    /// Earlier tokens that rows may refer to besides those of their own chunk. Above 0 a chunk can no longer be decoded alone.
    #[schemars(range(max = 65_535))]
    pub history: u32,
    /// Where tables come from.
    pub tables: TableSource,
}

impl Default for Config {
    fn default() -> Self {
        Self { references: References::Similar, history: 0, tables: TableSource::Chunk }
    }
}

/// Where tables come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TableSource {
    /// Each chunk stores its own.
    #[default]
    Chunk,
    /// Learned from all chunks and stored once; a chunk takes its own where that is smaller.
    Trained,
}

/// Which rows may refer to an earlier one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum References {
    /// No row: fastest.
    None,
    /// Rows that repeat an earlier one, and rows that resemble one.
    #[default]
    Similar,
}

/// The codec `planes`.
#[derive(Debug)]
pub struct Planes {
    config: Config,
    trained: Option<Trained>,
    encoders: Pool<Encoder>,
    decoders: Pool<Decoder>,
}

impl Plugin for Planes {
    const ID: &'static str = "planes";
    const SUMMARY: &'static str =
        "sign, exponent and mantissa planes, coded by channel and by reference to similar earlier rows";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config, trained: None, encoders: Pool::default(), decoders: Pool::default() })
    }
}

register_codec!(Planes);

/// First byte of a lane that is coded with trained tables.
const TRAINED: u8 = 2;

/// Chunks up to this size try trained tables; longer ones pay for their own easily.
const TRAINED_ELEMENTS: usize = 1 << 16;

/// How one head of one token is coded: two bits.
const LITERAL_WAY: u8 = 0;
const NEAR_WAY: u8 = 1;
const FAR_WAY: u8 = 2;
const EXACT_WAY: u8 = 3;

/// A head is near its reference up to this share of different signs, and far up to the next; measured on the dumps of the tiny model,
/// November 2026: at 35 % a row costs as much as without reference.
const NEAR_PERCENT: usize = 15;
const FAR_PERCENT: usize = 27;

/// Bits that a token with a reference takes besides its symbols.
const REFERENCE_BITS: f32 = 16.0;

/// Chunks below this number of elements choose the tables of literal heads once more when it is known which heads these are.
const SHORT: usize = 1 << 15;

/// Tables that a chunk with references has besides those of its symbols, and one of these.
const REFERENCE_TABLES: f32 = 4.0;

/// Tokens from which channels are told apart, about.
pub(crate) const SAMPLE_TOKENS: usize = 512;

/// What storing a table takes, about.
pub(crate) const TABLE_BITS: f32 = 300.0;

/// What tables by channel leave of the bits of differences, about.
const CHANNELS_SAVE: f32 = 0.985;

/// What two bits of mantissa take, about.
const MANTISSA_BITS: f32 = 1.97;

impl Codec for Planes {
    fn capabilities(&self) -> Capabilities {
        let wants = Needs { history: self.config.history > 0, ..Needs::NONE };
        Capabilities { wants, ..Capabilities::new(ElemSet::FLOATS) }
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        let len = lane.byte_len();
        len.saturating_add(usize::from(len > 0))
    }

    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let rows = Rows::new(lane.spec(), lane.bytes(), self.history(cx))?;
        if lane.bytes().is_empty() {
            return Ok(());
        }
        let start = out.len();
        let learned =
            self.learned(lane.spec(), &rows.frame, cx).filter(|_| lane.spec().shape.elements() <= TRAINED_ELEMENTS);
        let coded = self.encoders.with(Encoder::default, |encoder| {
            out.push(CODED);
            let own = encoder.encode(&rows, self.config.references, out);
            let len = if own { out.len() - start } else { usize::MAX };
            let middle = out.len();
            out.push(TRAINED);
            if learned.is_some_and(|learned| encoder.encode_trained(&rows, learned, out)) && out.len() - middle < len {
                out.drain(start..middle);
                return true;
            }
            out.truncate(middle);
            own
        });
        if !coded || out.len() - start > lane.bytes().len() {
            out.truncate(start);
            out.push(STORED);
            out.extend_from_slice(lane.bytes());
        }
        Ok(())
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, cx: &Context<'_>, out: &mut [u8]) -> Result<()> {
        let frame = Frame::new(lane, out.len(), self.history(cx))?;
        let Some((&mode, body)) = encoded.split_first() else {
            return if out.is_empty() { Ok(()) } else { Err(Error::corrupt("expected a first byte, got nothing")) };
        };
        match mode {
            _ if out.is_empty() => Err(Error::corrupt(format!("expected no bytes, got {}", encoded.len()))),
            STORED if body.len() == out.len() => {
                out.copy_from_slice(body);
                Ok(())
            }
            STORED => Err(Error::corrupt(format!("expected {} stored bytes, got {}", out.len(), body.len()))),
            CODED => self.decoders.with(Decoder::default, |decoder| decoder.decode(body, &frame, out)),
            TRAINED => match self.learned(lane, &frame, cx) {
                Some(learned) => {
                    self.decoders.with(Decoder::default, |decoder| decoder.decode_trained(body, &frame, learned, out))
                }
                None => Err(Error::corrupt("there are no trained tables for this layer, role and shape")),
            },
            _ => Err(Error::corrupt(format!("mode {mode} is unknown"))),
        }
        .context(|| lane.to_string())
    }

    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        if self.config.tables == TableSource::Chunk {
            return Ok(None);
        }
        Ok(Some(Artifact(Trained::learn(samples).to_bytes())))
    }

    fn with_artifact(&self, artifact: &[u8]) -> Result<Option<Arc<dyn Codec>>> {
        if self.config.tables == TableSource::Chunk {
            return Ok(None);
        }
        let trained = Some(Trained::from_bytes(artifact)?);
        let config = self.config.clone();
        Ok(Some(Arc::new(Self { config, trained, encoders: Pool::default(), decoders: Pool::default() })))
    }
}

impl Planes {
    /// The trained tables for a lane.
    fn learned(&self, lane: &LaneSpec, frame: &Frame<'_>, cx: &Context<'_>) -> Option<&Learned> {
        self.trained.as_ref()?.find(lane, frame.dtype, cx.layer, cx.role)
    }

    /// The earlier tokens that rows may refer to.
    fn history<'a>(&self, cx: &Context<'a>) -> Option<Chunk<'a>> {
        let history = cx.history.filter(|_| self.config.history > 0)?;
        let seq = history.shape().seq;
        Some(history.tokens(seq - seq.min(self.config.history as usize)..seq))
    }
}

/// What both sides know of a chunk.
#[derive(Clone, Copy, Debug)]
struct Frame<'a> {
    shape: Shape,
    dtype: DType,
    /// Tokens before the chunk, in whole rows.
    history: &'a [u8],
    history_seq: usize,
}

impl<'a> Frame<'a> {
    fn new(lane: &LaneSpec, len: usize, history: Option<Chunk<'a>>) -> Result<Self> {
        let dtype = lane.elem.dtype().ok_or_else(|| {
            Error::new(ErrorKind::UnsupportedDType, format!("{lane}: expected elements f16, bf16 or f32"))
        })?;
        if len != lane.byte_len() {
            return Err(Error::shape(format!("{lane}: expected {} bytes, got {len}", lane.byte_len())));
        }
        // History of another form, as for lanes of a transform, is of no use.
        let fits = |chunk: &Chunk<'_>| chunk.dtype() == dtype && chunk.shape().with_seq(lane.shape.seq) == lane.shape;
        let history = history.filter(fits);
        let history_seq = history.map_or(0, |chunk| chunk.shape().seq);
        Ok(Self { shape: lane.shape, dtype, history: history.map_or(&[], |chunk| chunk.bytes()), history_seq })
    }

    fn row_bytes(&self) -> usize {
        self.shape.row() * self.dtype.size()
    }

    /// Bytes of one head of one token.
    fn head_bytes(&self) -> usize {
        self.shape.dim * self.dtype.size()
    }

    /// Where a head of a token lies among all elements of the chunk.
    fn head(&self, token: usize, head: usize) -> Range<usize> {
        let start = token * self.shape.row() + head * self.shape.dim;
        start..start + self.shape.dim
    }

    /// Symbols that tell how the heads of a token are coded: four to a symbol.
    fn ways_per_token(&self) -> usize {
        self.shape.heads.div_ceil(4)
    }
}

/// A chunk to encode.
struct Rows<'a> {
    frame: Frame<'a>,
    bytes: &'a [u8],
}

impl<'a> Rows<'a> {
    fn new(lane: &LaneSpec, bytes: &'a [u8], history: Option<Chunk<'a>>) -> Result<Self> {
        Ok(Self { frame: Frame::new(lane, bytes.len(), history)?, bytes })
    }

    /// Bytes of a head; tokens are counted from the first of the history.
    fn head_bytes(&self, token: usize, head: usize) -> &[u8] {
        let (row, len) = (self.frame.row_bytes(), self.frame.head_bytes());
        let (bytes, token) = match token.checked_sub(self.frame.history_seq) {
            Some(token) => (self.bytes, token),
            None => (self.frame.history, token),
        };
        let start = token * row + head * len;
        &bytes[start..start + len]
    }
}

/// Heads that repeat the one they refer to.
fn repeats(ways: &[u8]) -> usize {
    ways.iter().map(|way| usize::from(*way == EXACT_WAY)).sum()
}

/// Contexts of the channels of a token, by way, shifted to their place in a [`Coded`].
fn context_rows(model: &Model) -> [Vec<Coded>; 3] {
    let row = |map: Option<&Map>, first: usize| {
        map.map_or(Vec::new(), |map| map.of.iter().map(|of| in_context(first + usize::from(*of), 0)).collect())
    };
    let similar = model.similar.as_ref();
    [row(Some(&model.literal), LITERAL), row(similar, NEAR), row(similar, FAR)]
}

/// Finds the form of a chunk and writes it; kept between chunks.
#[derive(Debug, Default)]
struct Encoder {
    search: Search,
    /// Symbols of history and chunk.
    symbols: Vec<u8>,
    rest: Rest,
    /// Way of each head of each token.
    ways: Vec<u8>,
    /// Distance to the reference of each token, or zero.
    distances: Vec<usize>,
    /// Symbols as they are coded.
    coded: Vec<Coded>,
    counts: Option<Box<Counts>>,
    coder: SymbolEncoder,
    side: Vec<u8>,
}

impl Encoder {
    /// Appends the coded form; `false` if that is not possible, with anything appended.
    fn encode(&mut self, rows: &Rows<'_>, references: References, out: &mut Vec<u8>) -> bool {
        let frame = rows.frame;
        let Shape { seq, heads, dim } = frame.shape;
        let fields = Fields::of(frame.dtype, rows.bytes);
        self.symbols.clear();
        fields.split(frame.history, &mut self.symbols, &mut self.rest);
        let history = self.symbols.len();
        fields.split(rows.bytes, &mut self.symbols, &mut self.rest);

        self.ways.clear();
        self.ways.resize(seq * heads, LITERAL_WAY);
        self.distances.clear();
        self.distances.resize(seq, 0);
        if references == References::Similar {
            self.find_references(rows);
        }
        let mut counts = self.counts.take().unwrap_or_else(no_counts);
        let mut model = self.choose(&frame, history, &mut counts);

        // Planes.
        let exact = repeats(&self.ways);
        if exact > 0 {
            for plane in &mut self.rest[..fields.widths().len()] {
                let mut kept = 0;
                for (idx, way) in self.ways.iter().enumerate() {
                    if *way != EXACT_WAY {
                        plane.copy_within(idx * dim..(idx + 1) * dim, kept);
                        kept += dim;
                    }
                }
                plane.truncate(kept);
            }
        }
        for (plane, width) in fields.widths().iter().enumerate() {
            let counts = &mut counts[PLANE + plane];
            if pays(&self.rest[plane], *width, counts) {
                model.coded_planes[plane] = true;
            }
        }
        self.emit(&frame, history, &model, &mut counts);
        model.set_tables(&counts);

        let exceptions: Vec<_> = fields.exceptions(rows.bytes, &self.symbols[history..]).collect();
        if exceptions.len() > rows.bytes.len() / 64 {
            self.counts = Some(counts);
            return false;
        }
        self.side.clear();
        let mut side = Writer::new(&mut self.side);
        let mut head = Head { base: fields.base, exact, exceptions };
        head.code(&mut side, &frame);
        model.code(&mut side, fields.widths().len());
        side.finish();
        put_len(self.side.len(), out);
        out.extend_from_slice(&self.side);
        self.pack_planes(fields, &model, out);
        model.prepare_encoder(&mut self.coder);
        self.coder.encode(lanes(frame.shape.elements()), &self.coded, out);
        self.counts = Some(counts);
        true
    }

    /// Appends the form with trained tables; `false` if they lack a symbol, with anything appended.
    fn encode_trained(&mut self, rows: &Rows<'_>, learned: &Learned, out: &mut Vec<u8>) -> bool {
        let (frame, fields, model) = (rows.frame, learned.fields, &learned.model);
        self.symbols.clear();
        fields.split(rows.bytes, &mut self.symbols, &mut self.rest);
        let row = &context_rows(model)[0];
        self.coded.clear();
        self.symbols.chunks_exact(row.len()).for_each(|symbols| self.coded.extend(in_contexts(row, symbols)));
        let exceptions: Vec<_> = fields.exceptions(rows.bytes, &self.symbols).collect();
        let known = self.coded.iter().all(|coded| model.can_code(*coded));
        if !known || exceptions.len() > rows.bytes.len() / 64 {
            return false;
        }
        self.side.clear();
        let mut side = Writer::new(&mut self.side);
        Head { base: fields.base, exact: 0, exceptions }.code(&mut side, &frame);
        side.finish();
        put_len(self.side.len(), out);
        out.extend_from_slice(&self.side);
        self.pack_planes(fields, model, out);
        model.prepare_encoder(&mut self.coder);
        self.coder.encode(lanes(frame.shape.elements()), &self.coded, out);
        true
    }

    /// Appends the planes that are not coded.
    fn pack_planes(&self, fields: Fields, model: &Model, out: &mut Vec<u8>) {
        for (plane, width) in fields.widths().iter().enumerate().filter(|(plane, _)| !model.coded_planes[*plane]) {
            if bits::pack(*width, &self.rest[plane], out).is_err() {
                unreachable!("planes hold numbers of their width");
            }
        }
    }

    /// Chooses a reference for every token that has one, and the way of each head.
    fn find_references(&mut self, rows: &Rows<'_>) {
        let frame = rows.frame;
        let (heads, dim, before) = (frame.shape.heads, frame.shape.dim, frame.history_seq);
        let Self { search, symbols, ways, distances, .. } = self;
        let shape = frame.shape.with_seq(before + frame.shape.seq);
        search.run(symbols, shape, before, |token, reference, differences| {
            if token - reference > usize::from(u16::MAX) {
                return;
            }
            let mut used = false;
            for (head, &difference) in differences.iter().enumerate() {
                let percent = difference as usize * 100;
                let way = if difference == 0 && rows.head_bytes(token, head) == rows.head_bytes(reference, head) {
                    EXACT_WAY
                } else if percent <= dim * NEAR_PERCENT {
                    NEAR_WAY
                } else if percent <= dim * FAR_PERCENT {
                    FAR_WAY
                } else {
                    continue;
                };
                ways[(token - before) * heads + head] = way;
                used = true;
            }
            if used {
                distances[token - before] = token - reference;
            }
        });
    }

    /// Chooses maps, and gives up classes of references that do not pay.
    fn choose(&mut self, frame: &Frame<'_>, history: usize, counts: &mut Counts) -> Model {
        let Shape { seq, heads, dim } = frame.shape;
        let row = frame.shape.row();
        let symbols = &self.symbols[history..];
        let (log, steps) = match symbols.len() {
            65_536.. => (12, 4),
            8_192.. => (11, 2),
            _ => (10, 2),
        };
        counts.as_flattened_mut().fill(0);

        // Symbols of each channel by class: literal, near, far. Of classes with a reference also the differences, of all channels together.
        // Some tokens of a long chunk tell enough.
        let step = seq.div_ceil(SAMPLE_TOKENS);
        let bins = literal_bins(&exponents(symbols));
        let any = |way| self.ways.contains(&way);
        let mut own = [true, any(NEAR_WAY), any(FAR_WAY)].map(|used| vec![[0; 32]; if used { row } else { 0 }]);
        let mut elements = [0; 4];
        let sampled = || (0..seq).step_by(step);
        for token in sampled() {
            for head in 0..heads {
                let idx = token * heads + head;
                let (way, symbols) = (self.ways[idx], &symbols[idx * dim..(idx + 1) * dim]);
                elements[usize::from(way) % 4] += dim;
                let Some(own) = own.get_mut(usize::from(way)) else { continue };
                for (counts, symbol) in own[head * dim..].iter_mut().zip(symbols) {
                    counts[usize::from(bins[usize::from(*symbol)]) % 32] += 1;
                }
                if way != LITERAL_WAY {
                    // Two tables in turn, because the same difference twice in a row would wait for itself.
                    let first = if way == NEAR_WAY { NEAR } else { FAR };
                    for (i, (symbol, earlier)) in symbols.iter().zip(self.earlier(frame, history, idx)).enumerate() {
                        counts[first + i % 2][usize::from(symbol.wrapping_sub(*earlier))] += 1;
                    }
                }
            }
        }

        // A table takes a smaller share of all tokens than of the sampled ones.
        let table_bits = TABLE_BITS / step as f32;
        let budget =
            |most: usize, elements: usize| Budget { tables: (elements * step / 2048).clamp(1, most), table_bits };
        let [mut kept, nears, fars, _] = elements;
        let [mut own, near, far] = own;
        let mut all = own.clone();
        add(&mut all, &near);
        add(&mut all, &far);
        let mut literal = cluster(&all, budget(MAX_LITERAL, kept + nears + fars));

        // Give up the farther class first, then both, as long as that saves bits.
        let mut similar = 0;
        for (way, context, class, more) in [(FAR_WAY, FAR, far, fars), (NEAR_WAY, NEAR, near, nears)] {
            // A class that only tokens apart from the sampled ones have is given up.
            if similar == 0 && !class.is_empty() {
                let tokens = self.ways.chunks_exact(heads).step_by(step).filter(|ways| ways.contains(&way)).count();
                let both: [u32; 256] = std::array::from_fn(|i| counts[context][i] + counts[context + 1][i]);
                let symbols = CHANNELS_SAVE * entropy_bits(&both);
                let coded = symbols + REFERENCE_BITS * tokens as f32 + REFERENCE_TABLES * table_bits;
                // The bins leave out the two bits of mantissa.
                let without = literal.added_bits(&own, &class) + MANTISSA_BITS * more as f32;
                if coded > without {
                    add(&mut own, &class);
                    kept += more;
                    self.ways.iter_mut().filter(|held| **held == way).for_each(|held| *held = LITERAL_WAY);
                    continue;
                }
            }
            similar += more;
        }
        // A short chunk has room for few tables; these had better fit the heads that are left.
        if similar > 0 && symbols.len() < SHORT {
            literal = cluster(&own, budget(MAX_LITERAL, kept));
        }
        let deltas = delta_bins();
        let mut differences = vec![[0; 32]; if similar > 0 { row } else { 0 }];
        for idx in sampled().filter(|_| similar > 0).flat_map(|token| token * heads..(token + 1) * heads) {
            let first = match self.ways[idx] {
                NEAR_WAY => 0,
                FAR_WAY => 16,
                _ => continue,
            };
            let pairs = symbols[idx * dim..(idx + 1) * dim].iter().zip(self.earlier(frame, history, idx));
            for (counts, (symbol, earlier)) in differences[idx % heads * dim..].iter_mut().zip(pairs) {
                counts[usize::from(deltas[usize::from(symbol.wrapping_sub(*earlier))] + first) % 32] += 1;
            }
        }
        let similar = cluster(&differences, budget(MAX_SIMILAR, similar));
        counts[NEAR..WAYS].as_flattened_mut().fill(0);
        for (distance, ways) in self.distances.iter_mut().zip(self.ways.chunks_exact(heads)) {
            if ways.iter().all(|way| *way == LITERAL_WAY) {
                *distance = 0;
            }
        }
        let refers = self.distances.iter().any(|distance| *distance > 0);
        Model::new(log, steps, literal, refers.then_some(similar), [false; MAX_PLANES])
    }

    /// Symbols of the head to which the head `idx` of the chunk refers.
    fn earlier(&self, frame: &Frame<'_>, history: usize, idx: usize) -> &[u8] {
        let dim = frame.shape.dim;
        let distance = self.distances[idx / frame.shape.heads] * frame.shape.row();
        let start = history + idx * dim - distance;
        &self.symbols[start..start + dim]
    }

    /// Lists the symbols to code with their contexts, and counts those that were not counted before.
    fn emit(&mut self, frame: &Frame<'_>, history: usize, model: &Model, counts: &mut Counts) {
        let Shape { heads, dim, .. } = frame.shape;
        let mut coded = std::mem::take(&mut self.coded);
        coded.clear();
        coded.reserve(frame.shape.elements());
        let chunk = &self.symbols[history..];
        let rows = context_rows(model);
        if model.similar.is_none() {
            chunk.chunks_exact(frame.shape.row()).for_each(|symbols| coded.extend(in_contexts(&rows[0], symbols)));
        } else {
            for ways in self.ways.chunks_exact(heads) {
                let symbols = ways.chunks(4).map(|ways| ways.iter().rev().fold(0, |symbol, way| symbol << 2 | way));
                coded.extend(symbols.map(|symbol| in_context(WAYS, symbol)));
            }
            let distances =
                self.distances.iter().filter(|distance| **distance > 0).map(|distance| *distance as u16 - 1);
            coded.extend(distances.flat_map(|distance| {
                let [low, high] = distance.to_le_bytes();
                [in_context(DISTANCE, low), in_context(DISTANCE + 1, high)]
            }));
            for (idx, (way, symbols)) in self.ways.iter().zip(chunk.chunks_exact(dim)).enumerate() {
                let Some(row) = rows.get(usize::from(*way)) else { continue };
                let contexts = &row[idx % heads * dim..(idx % heads + 1) * dim];
                if *way == LITERAL_WAY {
                    coded.extend(in_contexts(contexts, symbols));
                } else {
                    let pairs = contexts.iter().zip(symbols.iter().zip(self.earlier(frame, history, idx)));
                    coded.extend(
                        pairs.map(|(context, (own, earlier))| context | Coded::from(own.wrapping_sub(*earlier))),
                    );
                }
            }
        }
        count(counts, &coded);
        for (plane, rest) in self.rest.iter().enumerate().filter(|(plane, _)| model.coded_planes[*plane]) {
            coded.extend(rest.iter().map(|symbol| in_context(PLANE + plane, *symbol)));
        }
        self.coded = coded;
    }
}

/// Adds counts to those of the same channels, if there are any.
fn add(sums: &mut [[u32; 32]], more: &[[u32; 32]]) {
    for (sum, more) in sums.as_flattened_mut().iter_mut().zip(more.as_flattened()) {
        *sum += more;
    }
}

/// How often each exponent code occurs in a part of the chunk, which shows where its exponents lie.
fn exponents(symbols: &[u8]) -> [u32; 32] {
    let mut counts = [0; 32];
    for symbol in symbols.iter().step_by((symbols.len() / 4096).max(1) | 1) {
        counts[usize::from(symbol >> 2 & 0x1F)] += 1;
    }
    counts
}

/// Sixteen exponents around the most frequent ones, for both signs: enough to tell channels apart.
pub(crate) fn literal_bins(exponents: &[u32; 32]) -> [u8; 256] {
    let covered = |first: usize| exponents[first..first + 16].iter().sum::<u32>();
    let first = (0..=16).rev().max_by_key(|&first| covered(first)).unwrap_or_default() as u8;
    std::array::from_fn(|symbol| {
        let exponent = (symbol >> 2 & 0x1F) as u8;
        (symbol >> 7 << 4) as u8 | exponent.saturating_sub(first).min(15)
    })
}

/// Sixteen classes of differences by sign and size.
fn delta_bins() -> [u8; 256] {
    std::array::from_fn(|delta| {
        let delta = (delta as u8).cast_signed();
        let size = delta.unsigned_abs();
        let octave = (8 - size.leading_zeros()) as u8;
        if size == 0 { 0 } else { (2 * octave - u8::from(delta > 0)).min(15) }
    })
}

/// What stands before the model.
#[derive(Debug, Default)]
struct Head {
    base: u8,
    /// Heads of tokens that repeat their reference.
    exact: usize,
    /// Elements whose exponent has no code.
    exceptions: Vec<(usize, u8)>,
}

impl Head {
    fn code(&mut self, side: &mut impl Side, frame: &Frame<'_>) {
        let mut models = [Bit::default(); 32];
        self.exact = side.number(&mut models, self.exact as u32) as usize;
        if frame.dtype == DType::F16 {
            return;
        }
        self.base = side.raw(8, u32::from(self.base)) as u8;
        let mut models = [Bit::default(); 32];
        let count = side.number(&mut [Bit::default(); 32], self.exceptions.len() as u32) as usize;
        let mut next = 0;
        for i in 0..count {
            let (idx, exponent) = self.exceptions.get(i).copied().unwrap_or((next, 0));
            let idx = next.saturating_add(side.number(&mut models, idx.wrapping_sub(next) as u32) as usize);
            let exponent = side.raw(8, u32::from(exponent)) as u8;
            // Damaged bytes may announce any number; no more are kept than there are elements.
            if idx >= frame.shape.elements() {
                self.exceptions.clear();
                self.exceptions.push((usize::MAX, 0));
                return;
            }
            if i >= self.exceptions.len() {
                self.exceptions.push((idx, exponent));
            }
            next = idx + 1;
        }
    }
}

/// Reads chunks; kept between them.
#[derive(Debug, Default)]
struct Decoder {
    symbols: Vec<u8>,
    rest: Rest,
    ways: Vec<u8>,
    distances: Vec<usize>,
    coded: Vec<u8>,
    contexts: Vec<u8>,
    coder: SymbolDecoder,
    tables: Tables,
}

impl Decoder {
    fn decode(&mut self, body: &[u8], frame: &Frame<'_>, out: &mut [u8]) -> Result<()> {
        let (side, body) = take_side(body)?;
        let mut side = Reader::new(side);
        let mut head = Head::default();
        head.code(&mut side, frame);
        let fields = Fields::new(frame.dtype, head.base);
        let mut model = Model::unread(frame.shape.row());
        model.code(&mut side, fields.widths().len());
        side.finish()?;
        self.decode_with(body, frame, fields, &model, &head, out)
    }

    fn decode_trained(&mut self, body: &[u8], frame: &Frame<'_>, learned: &Learned, out: &mut [u8]) -> Result<()> {
        let (side, body) = take_side(body)?;
        let mut side = Reader::new(side);
        let mut head = Head::default();
        head.code(&mut side, frame);
        side.finish()?;
        if head.exact > 0 {
            return Err(Error::corrupt("trained tables know no repeated heads"));
        }
        self.decode_with(body, frame, learned.fields, &learned.model, &head, out)
    }

    fn decode_with(
        &mut self,
        mut body: &[u8],
        frame: &Frame<'_>,
        fields: Fields,
        model: &Model,
        head: &Head,
        out: &mut [u8],
    ) -> Result<()> {
        let elements = frame.shape.elements();
        let exact = head.exact.checked_mul(frame.shape.dim).filter(|exact| *exact <= elements);
        let literal = elements - exact.ok_or_else(|| Error::corrupt(format!("{} repeated heads", head.exact)))?;
        for (plane, &width) in fields.widths().iter().enumerate() {
            let len = bits::packed_len(width, literal);
            self.rest[plane].resize(literal, 0);
            if !model.coded_planes[plane] {
                let (packed, rest) = body.split_at_checked(len).ok_or_else(|| {
                    Error::corrupt(format!("plane {plane}: expected {len} bytes, got {}", body.len()))
                })?;
                bits::unpack(width, packed, &mut self.rest[plane])?;
                body = rest;
            }
        }
        model.prepare_tables(&mut self.tables);
        self.coder.start(lanes(elements), body)?;
        self.read_references(model, frame, head.exact)?;
        self.read_symbols(model, frame, literal)?;
        for (plane, rest) in self.rest.iter_mut().enumerate().filter(|(plane, _)| model.coded_planes[*plane]) {
            self.contexts.clear();
            self.contexts.resize(literal, (PLANE + plane) as u8);
            self.coder.decode(&self.tables, &self.contexts, rest)?;
        }
        self.coder.finish()?;

        if model.similar.is_none() {
            let planes = self.rest.each_ref().map(|plane| plane.get(..literal).unwrap_or_default());
            fields.merge(&self.coded, planes, out);
        } else {
            self.resolve(frame, fields, out);
        }
        for (idx, exponent) in &head.exceptions {
            let start = idx.saturating_mul(frame.dtype.size());
            let element = out.get_mut(start..start.saturating_add(frame.dtype.size()));
            let element = element.ok_or_else(|| Error::corrupt("an exception lies behind the last element"))?;
            fields.set_exponent(element, *exponent);
        }
        self.copy_repeats(frame, out);
        Ok(())
    }

    /// Reads how the heads are coded and to which tokens they refer.
    fn read_references(&mut self, model: &Model, frame: &Frame<'_>, exact: usize) -> Result<()> {
        let Shape { seq, heads, .. } = frame.shape;
        self.ways.clear();
        self.distances.clear();
        if model.similar.is_none() {
            return if exact == 0 { Ok(()) } else { Err(Error::corrupt("repeated heads without references")) };
        }
        let per_token = frame.ways_per_token();
        self.coded.resize(seq * per_token, 0);
        self.contexts.clear();
        self.contexts.resize(seq * per_token, WAYS as u8);
        self.coder.decode(&self.tables, &self.contexts, &mut self.coded)?;
        for symbols in self.coded.chunks_exact(per_token) {
            self.ways.extend((0..heads).map(|head| symbols[head / 4] >> (2 * (head % 4)) & 3));
        }
        let found = repeats(&self.ways);
        if found != exact {
            return Err(Error::corrupt(format!("expected {exact} repeated heads, got {found}")));
        }
        let refers = |ways: &[u8]| ways.iter().any(|way| *way != LITERAL_WAY);
        let count = self.ways.chunks_exact(heads).filter(|ways| refers(ways)).count();
        self.coded.resize(2 * count, 0);
        self.contexts.clear();
        (0..count).for_each(|_| self.contexts.extend([DISTANCE as u8, DISTANCE as u8 + 1]));
        self.coder.decode(&self.tables, &self.contexts, &mut self.coded)?;
        let mut distances = self.coded.as_chunks::<2>().0.iter();
        for (token, ways) in self.ways.chunks_exact(heads).enumerate() {
            let distance = match refers(ways).then(|| distances.next()).flatten() {
                Some(distance) => usize::from(u16::from_le_bytes(*distance)) + 1,
                None => 0,
            };
            if distance > token + frame.history_seq {
                return Err(Error::corrupt(format!("token {token} refers {distance} tokens back")));
            }
            self.distances.push(distance);
        }
        Ok(())
    }

    /// Reads the symbols of all heads that do not repeat their reference.
    fn read_symbols(&mut self, model: &Model, frame: &Frame<'_>, literal: usize) -> Result<()> {
        let Shape { seq, heads, dim } = frame.shape;
        self.contexts.clear();
        self.contexts.reserve(literal);
        let rows = context_rows(model).map(|row| row.iter().map(|context| (context >> 8) as u8).collect::<Vec<_>>());
        if self.ways.is_empty() {
            (0..seq).for_each(|_| self.contexts.extend_from_slice(&rows[0]));
        }
        for (idx, way) in self.ways.iter().enumerate() {
            if let Some(row) = rows.get(usize::from(*way)) {
                self.contexts.extend_from_slice(&row[idx % heads * dim..(idx % heads + 1) * dim]);
            }
        }
        self.coded.resize(literal, 0);
        self.coder.decode(&self.tables, &self.contexts, &mut self.coded)
    }

    /// Adds references to the symbols and puts elements together, all but repeated heads.
    fn resolve(&mut self, frame: &Frame<'_>, fields: Fields, out: &mut [u8]) {
        let Shape { heads, dim, .. } = frame.shape;
        let row = frame.shape.row();
        let size = frame.dtype.size();
        self.symbols.clear();
        let mut unused = Rest::default();
        fields.split(frame.history, &mut self.symbols, &mut unused);
        let history = self.symbols.len();
        self.symbols.resize(history + frame.shape.elements(), 0);
        let mut at = 0;
        for (idx, way) in self.ways.iter().enumerate() {
            let start = history + idx * dim;
            let (before, own) = self.symbols.split_at_mut(start);
            let own = &mut own[..dim];
            let distance = self.distances[idx / heads] * row;
            let earlier = before.get(start - distance..start - distance + dim);
            if *way == EXACT_WAY {
                own.copy_from_slice(earlier.unwrap_or_else(|| unreachable!("distances were checked")));
                continue;
            }
            let coded = &self.coded[at..at + dim];
            match earlier.filter(|_| *way != LITERAL_WAY) {
                None => own.copy_from_slice(coded),
                Some(earlier) => {
                    for ((own, coded), earlier) in own.iter_mut().zip(coded).zip(earlier) {
                        *own = coded.wrapping_add(*earlier);
                    }
                }
            }
            let planes = self.rest.each_ref().map(|plane| plane.get(at..at + dim).unwrap_or_default());
            let place = frame.head(idx / heads, idx % heads);
            fields.merge(own, planes, &mut out[place.start * size..place.end * size]);
            at += dim;
        }
    }

    /// Copies heads that repeat their reference.
    fn copy_repeats(&self, frame: &Frame<'_>, out: &mut [u8]) {
        let (row, len, heads) = (frame.row_bytes(), frame.head_bytes(), frame.shape.heads);
        for (idx, _) in self.ways.iter().enumerate().filter(|(_, way)| **way == EXACT_WAY) {
            let (token, distance) = (idx / heads, self.distances[idx / heads]);
            let offset = idx % heads * len;
            let place = token * row + offset;
            if let Some(earlier) = token.checked_sub(distance) {
                let start = earlier * row + offset;
                out.copy_within(start..start + len, place);
            } else {
                let start = (frame.history_seq + token - distance) * row + offset;
                out[place..place + len].copy_from_slice(&frame.history[start..start + len]);
            }
        }
    }
}

/// Side information and what follows it.
fn take_side(body: &[u8]) -> Result<(&[u8], &[u8])> {
    let cut = || Error::corrupt(format!("expected a header, got {} bytes", body.len()));
    let (len, rest) = take_len(body).ok_or_else(cut)?;
    rest.split_at_checked(len).ok_or_else(cut)
}
