//! The codec `rans`.

use gearbox_core::{
    Capabilities, Codec, Context, Elem, ElemSet, Error, LaneRef, LaneSpec, Plugin, Pool, Result, ResultExt, Shape,
    bits, register_codec,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cluster::{Budget, Map, cluster};
use crate::coder::{
    Coded, Decoder as SymbolDecoder, Encoder as SymbolEncoder, GROUP, MAX_LOG, Tables, in_context, lanes,
};
use crate::frame::{CODED, STORED, looks_random, put_len, saves, take_len};
use crate::model::{Counts, code_map, count, no_counts};
use crate::planes::SAMPLE_TOKENS;
use crate::side::{Reader, Side, Writer};
use crate::table::{Kind, Levels, Models, frequencies, levels};

/// Settings of [`Rans`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What chooses the table of a symbol.
    pub contexts: Contexts,
}

/// What chooses the table of a symbol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Contexts {
    /// Nothing: one table for each byte of the elements.
    None,
    /// The channel: channels with similar statistics share a table.
    #[default]
    Channel,
    /// The head.
    Head,
    /// The symbol of the same channel one token earlier.
    Previous,
}

/// The codec `rans`.
#[derive(Debug)]
pub struct Rans {
    config: Config,
    encoders: Pool<Encoder>,
    decoders: Pool<Decoder>,
}

impl Plugin for Rans {
    const ID: &'static str = "rans";
    const SUMMARY: &'static str = "bytes of the elements apart, each coded by interleaved rANS with static tables";
    const SOURCE: &'static str = "own work; asymmetric numeral systems: J. Duda, arXiv:1311.2540";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config, encoders: Pool::default(), decoders: Pool::default() })
    }
}

register_codec!(Rans);

/// Most bytes of an element.
const MAX_PLANES: usize = 4;

/// Most tables of a plane.
const MAX_TABLES: usize = 16;

/// Contexts of a plane beyond this share one table: their statistics would take more memory than the lane.
const MOST_CONTEXTS: usize = 1 << 14;

/// What storing a table takes, about.
const TABLE_BITS: f32 = 300.0;

impl Codec for Rans {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        let len = stored_len(lane);
        len.saturating_add(usize::from(len > 0))
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let spec = lane.spec();
        if lane.bytes().is_empty() {
            return Ok(());
        }
        let start = out.len();
        out.push(CODED);
        self.encoders.with(Encoder::default, |encoder| encoder.encode(&lane, self.config.contexts, out));
        if out.len() - start > stored_len(spec) {
            out.truncate(start);
            out.push(STORED);
            match spec.elem {
                Elem::Bits(width) => {
                    let packed = bits::pack(width, lane.bytes(), out).context(|| spec.to_string());
                    if packed.is_err() {
                        out.truncate(start);
                    }
                    return packed;
                }
                _ => out.extend_from_slice(lane.bytes()),
            }
        }
        Ok(())
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        if out.len() != lane.byte_len() {
            return Err(Error::shape(format!("{lane}: expected {} bytes, got {}", lane.byte_len(), out.len())));
        }
        let Some((&mode, body)) = encoded.split_first() else {
            return if out.is_empty() { Ok(()) } else { Err(Error::corrupt("expected a first byte, got nothing")) };
        };
        let stored = stored_len(lane);
        match mode {
            _ if out.is_empty() => Err(Error::corrupt(format!("expected no bytes, got {}", encoded.len()))),
            STORED if body.len() != stored => {
                Err(Error::corrupt(format!("expected {stored} stored bytes, got {}", body.len())))
            }
            STORED => {
                if let Elem::Bits(width) = lane.elem {
                    bits::unpack(width, body, out)
                } else {
                    out.copy_from_slice(body);
                    Ok(())
                }
            }
            CODED => {
                self.decoders.with(Decoder::default, |decoder| decoder.decode(body, lane, self.config.contexts, out))
            }
            _ => Err(Error::corrupt(format!("mode {mode} is unknown"))),
        }
        .context(|| lane.to_string())
    }
}

/// Bytes of a lane as it is, narrow integers packed.
fn stored_len(lane: &LaneSpec) -> usize {
    match lane.elem {
        Elem::Bits(width) => bits::packed_len(width, lane.shape.elements()),
        _ => lane.byte_len(),
    }
}

/// How elements are taken apart: bits of each byte, highest byte first.
fn widths(elem: Elem) -> &'static [u8] {
    const LOW: [&[u8]; 9] = [&[], &[1], &[2], &[3], &[4], &[5], &[6], &[7], &[8]];
    const HIGH: [&[u8]; 9] = [&[], &[1, 8], &[2, 8], &[3, 8], &[4, 8], &[5, 8], &[6, 8], &[7, 8], &[8, 8]];
    match elem {
        Elem::Bits(width @ 0..=8) => LOW[usize::from(width)],
        Elem::Bits(width) => HIGH[usize::from(width - 8).min(8)],
        _ => &[8; MAX_PLANES][..elem.size()],
    }
}

/// Takes elements apart. The exponent of Bf16 and F32 fills a byte once the sign has moved to the other end.
fn split(elem: Elem, bytes: &[u8], planes: &mut [Vec<u8>; MAX_PLANES]) {
    let size = elem.size();
    for plane in planes.iter_mut().take(size) {
        plane.resize(bytes.len() / size, 0);
    }
    let [first, second, third, fourth] = planes;
    match size {
        1 => first.copy_from_slice(bytes),
        2 => {
            let turn = u32::from(elem == Elem::Bf16);
            for ((bytes, first), second) in bytes.as_chunks().0.iter().zip(first).zip(second) {
                [*second, *first] = u16::from_le_bytes(*bytes).rotate_left(turn).to_le_bytes();
            }
        }
        _ => {
            let turn = u32::from(elem == Elem::F32);
            let lower = third.iter_mut().zip(fourth);
            for (((bytes, first), second), (third, fourth)) in
                bytes.as_chunks().0.iter().zip(first).zip(second).zip(lower)
            {
                [*fourth, *third, *second, *first] = u32::from_le_bytes(*bytes).rotate_left(turn).to_le_bytes();
            }
        }
    }
}

/// Undoes [`split`].
fn merge(elem: Elem, planes: &[Vec<u8>; MAX_PLANES], out: &mut [u8]) {
    let [first, second, third, fourth] = planes;
    match elem.size() {
        1 => out.copy_from_slice(&first[..out.len()]),
        2 => {
            let turn = u32::from(elem == Elem::Bf16);
            for ((out, first), second) in out.as_chunks_mut().0.iter_mut().zip(first).zip(second) {
                *out = u16::from_le_bytes([*second, *first]).rotate_right(turn).to_le_bytes();
            }
        }
        _ => {
            let turn = u32::from(elem == Elem::F32);
            let lower = third.iter().zip(fourth);
            for (((out, first), second), (third, fourth)) in
                out.as_chunks_mut().0.iter_mut().zip(first).zip(second).zip(lower)
            {
                *out = u32::from_le_bytes([*fourth, *third, *second, *first]).rotate_right(turn).to_le_bytes();
            }
        }
    }
}

/// How many contexts a plane has, and which one each symbol has.
#[derive(Clone, Copy, Debug)]
struct Layout {
    contexts: Contexts,
    shape: Shape,
}

impl Layout {
    fn new(contexts: Contexts, shape: Shape) -> Self {
        let few = match contexts {
            Contexts::None | Contexts::Previous => true,
            Contexts::Channel => shape.row() <= MOST_CONTEXTS,
            Contexts::Head => shape.heads <= MOST_CONTEXTS,
        };
        Self { contexts: if few { contexts } else { Contexts::None }, shape }
    }

    fn count(self) -> usize {
        match self.contexts {
            Contexts::None => 1,
            Contexts::Channel => self.shape.row(),
            Contexts::Head => self.shape.heads,
            Contexts::Previous => 256,
        }
    }

    /// How far back the symbol lies that is the context, if one is: a token, or the next multiple of the lanes.
    fn distance(self) -> Option<usize> {
        (self.contexts == Contexts::Previous).then(|| self.shape.row().next_multiple_of(GROUP))
    }

    /// Calls `each`, for every `step`-th token if they matter, with runs of symbols that have the contexts `0..`, or one context.
    fn runs(self, step: usize, mut each: impl FnMut(std::ops::Range<usize>, Option<usize>)) {
        let Shape { seq, heads, dim } = self.shape;
        match self.contexts {
            Contexts::None | Contexts::Previous => each(0..self.shape.elements(), Some(0)),
            Contexts::Channel => {
                (0..seq).step_by(step).for_each(|token| each(token * heads * dim..(token + 1) * heads * dim, None));
            }
            Contexts::Head => {
                let tokens = (0..seq).step_by(step).flat_map(|token| token * heads..(token + 1) * heads);
                tokens.for_each(|head| each(head * dim..(head + 1) * dim, Some(head % heads)));
            }
        }
    }
}

/// One plane that is coded.
#[derive(Clone, Debug)]
struct CodedPlane {
    map: Map,
    levels: Vec<Levels>,
}

/// Which planes are coded, and with which tables. A table is good to a quarter of an octave, or half of one in short lanes.
#[derive(Clone, Debug, Default)]
struct Model {
    fine: bool,
    planes: [Option<CodedPlane>; MAX_PLANES],
}

impl Model {
    fn steps(&self) -> u8 {
        if self.fine { 4 } else { 2 }
    }

    /// Codes the model of so many planes.
    fn code(&mut self, side: &mut impl Side, planes: usize, contexts: usize) {
        self.fine = side.raw(1, u32::from(self.fine)) == 1;
        let steps = self.steps();
        for plane in &mut self.planes[..planes] {
            if side.raw(1, u32::from(plane.is_some())) == 0 {
                *plane = None;
                continue;
            }
            let coded = plane.get_or_insert_with(|| CodedPlane { map: Map::single(contexts), levels: Vec::new() });
            code_map(side, &mut coded.map, MAX_TABLES);
            coded.levels.resize(coded.map.tables, [0; 256]);
            let mut models = Models::new(Kind::Plain, steps);
            coded.levels.iter_mut().for_each(|levels| models.code(side, levels));
        }
    }

    /// Coded planes with the number of their first table.
    fn coded(&self) -> impl Iterator<Item = (usize, usize, &CodedPlane)> {
        let mut first = 0;
        self.planes.iter().enumerate().filter_map(move |(plane, coded)| {
            let coded = coded.as_ref()?;
            let start = first;
            first += coded.levels.len();
            Some((plane, start, coded))
        })
    }
}

#[derive(Debug, Default)]
struct Encoder {
    planes: [Vec<u8>; MAX_PLANES],
    coder: SymbolEncoder,
    coded: Vec<Coded>,
    contexts: Vec<u8>,
    counts: Option<Box<Counts>>,
    side: Vec<u8>,
}

impl Encoder {
    fn encode(&mut self, lane: &LaneRef<'_>, contexts: Contexts, out: &mut Vec<u8>) {
        let spec = lane.spec();
        let layout = Layout::new(contexts, spec.shape);
        let widths = widths(spec.elem);
        split(spec.elem, lane.bytes(), &mut self.planes);
        let mut model = Model { fine: spec.shape.elements() >= 1 << 16, ..Model::default() };
        let Self { planes, coder, coded: symbols, contexts, counts: kept_counts, side } = self;
        let mut counts = kept_counts.take().unwrap_or_else(no_counts);
        symbols.clear();
        coder.start(MAX_LOG);
        let mut first = 0;
        let steps = model.steps();
        for ((plane, width), coded) in planes.iter().zip(widths).zip(&mut model.planes) {
            if looks_random(plane, *width) {
                continue;
            }
            let map = map(plane, layout);
            let tables = &mut counts[first..first + map.tables];
            tables.as_flattened_mut().fill(0);
            contexts.clear();
            table_of(plane, layout, &map, first as u8, contexts);
            let at = symbols.len();
            let pairs = plane.iter().zip(contexts.iter());
            symbols.extend(pairs.map(|(symbol, context)| in_context(usize::from(*context), *symbol)));
            count(&mut counts, &symbols[at..]);
            let tables = &counts[first..first + map.tables];
            let mut all = [0; 256];
            for counts in tables {
                all.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            }
            if !saves(&all, *width) {
                symbols.truncate(at);
                continue;
            }
            let levels: Vec<_> = tables.iter().map(|counts| levels(counts, steps)).collect();
            for (table, levels) in levels.iter().enumerate() {
                coder.set(first + table, &frequencies(levels, steps, MAX_LOG));
            }
            first += map.tables;
            *coded = Some(CodedPlane { map, levels });
        }
        *kept_counts = Some(counts);
        side.clear();
        let mut writer = Writer::new(side);
        model.code(&mut writer, widths.len(), layout.count());
        writer.finish();
        put_len(side.len(), out);
        out.extend_from_slice(side);
        for ((plane, width), coded) in planes.iter().zip(widths).zip(&model.planes) {
            // A value above its width makes this fail; the lane is then longer than stored, which names the value.
            if coded.is_none() && bits::pack(*width, plane, out).is_err() {
                out.resize(out.len() + lane.bytes().len(), 0);
            }
        }
        coder.encode(lanes(spec.shape.elements()), symbols, out);
    }
}

/// Chooses a table for each context.
fn map(plane: &[u8], layout: Layout) -> Map {
    let tables = (plane.len() / 2048).clamp(1, MAX_TABLES);
    if tables < 2 || layout.count() < 2 {
        return Map::single(layout.count());
    }
    let mut some = [0; 256];
    plane.iter().step_by((plane.len() >> 13).max(1) | 1).for_each(|symbol| some[usize::from(*symbol)] += 1);
    let bins = bins(&some);
    let bin = |symbol: u8| usize::from(bins[usize::from(symbol)]) % BINS;
    let mut counts = vec![[0; BINS]; layout.count()];
    let mut step = 1;
    if let Some(distance) = layout.distance() {
        let earlier = std::iter::repeat_n(&0, distance).chain(plane);
        for (symbol, earlier) in plane.iter().zip(earlier) {
            counts[usize::from(*earlier)][bin(*symbol)] += 1;
        }
    } else {
        // Some tokens of a long lane tell enough. A table takes a smaller share of all of them than of those.
        step = layout.shape.seq.div_ceil(SAMPLE_TOKENS);
        layout.runs(step, |run, context| match context {
            None => counts.iter_mut().zip(&plane[run]).for_each(|(counts, symbol)| counts[bin(*symbol)] += 1),
            Some(context) => plane[run].iter().for_each(|symbol| counts[context][bin(*symbol)] += 1),
        });
    }
    cluster(&counts, Budget { tables, table_bits: TABLE_BITS / step as f32 })
}

/// Classes of symbols by which contexts are told apart.
const BINS: usize = 32;

/// Classes of neighbours that occur about equally often, or one for each symbol if these are few.
fn bins(counts: &[u32; 256]) -> [u8; 256] {
    let few = counts.iter().filter(|count| **count > 0).count() <= BINS;
    let total: usize = counts.iter().map(|count| if few { usize::from(*count > 0) } else { *count as usize }).sum();
    let mut below = 0;
    counts.map(|count| {
        let weight = if few { usize::from(count > 0) } else { count as usize };
        let middle = 2 * below + weight;
        below += weight;
        // With few symbols the bin is the number of smaller ones.
        let bin = if few { below - weight } else { middle * BINS / (2 * total.max(1)) };
        bin.min(BINS - 1) as u8
    })
}

/// Appends the table of each symbol, counted from `first`.
fn table_of(plane: &[u8], layout: Layout, map: &Map, first: u8, out: &mut Vec<u8>) {
    let tables: Vec<u8> = map.of.iter().map(|table| first + table).collect();
    if let Some(distance) = layout.distance() {
        let earlier = std::iter::repeat_n(&0, distance).chain(plane);
        out.extend(plane.iter().zip(earlier).map(|(_, earlier)| tables[usize::from(*earlier)]));
        return;
    }
    layout.runs(1, |run, context| match context {
        None => out.extend_from_slice(&tables[..run.len()]),
        Some(context) => out.resize(out.len() + run.len(), tables[context]),
    });
}

#[derive(Debug, Default)]
struct Decoder {
    planes: [Vec<u8>; MAX_PLANES],
    coder: SymbolDecoder,
    tables: Tables,
    contexts: Vec<u8>,
}

impl Decoder {
    fn decode(&mut self, body: &[u8], lane: &LaneSpec, contexts: Contexts, out: &mut [u8]) -> Result<()> {
        let layout = Layout::new(contexts, lane.shape);
        let widths = widths(lane.elem);
        let elements = lane.shape.elements();
        let cut = || Error::corrupt(format!("expected a header, got {} bytes", body.len()));
        let (side_len, body) = take_len(body).ok_or_else(cut)?;
        let (side, mut body) = body.split_at_checked(side_len).ok_or_else(cut)?;
        let mut side = Reader::new(side);
        let mut model = Model::default();
        model.code(&mut side, widths.len(), layout.count());
        side.finish()?;
        for (plane, width) in widths.iter().enumerate() {
            self.planes[plane].resize(elements, 0);
            if model.planes[plane].is_none() {
                let len = bits::packed_len(*width, elements);
                let (packed, rest) = body.split_at_checked(len).ok_or_else(|| {
                    Error::corrupt(format!("byte {plane} of the elements: expected {len} bytes, got {}", body.len()))
                })?;
                bits::unpack(*width, packed, &mut self.planes[plane])?;
                body = rest;
            }
        }
        self.tables.start(MAX_LOG);
        for (_, first, coded) in model.coded() {
            for (table, levels) in coded.levels.iter().enumerate() {
                self.tables.set(first + table, &frequencies(levels, model.steps(), MAX_LOG));
            }
        }
        let Self { planes, coder, tables, contexts } = self;
        coder.start(lanes(elements), body)?;
        for (plane, first, coded) in model.coded() {
            let plane = &mut planes[plane];
            let Some(distance) = layout.distance() else {
                contexts.clear();
                table_of(plane, layout, &coded.map, first as u8, contexts);
                coder.decode(tables, contexts, plane)?;
                continue;
            };
            let of: Vec<u8> = coded.map.of.iter().map(|table| first as u8 + table).collect();
            for start in (0..elements).step_by(distance) {
                let (done, rest) = plane.split_at_mut(start);
                let len = rest.len().min(distance);
                contexts.clear();
                match done.len().checked_sub(distance) {
                    Some(before) => {
                        contexts.extend(done[before..before + len].iter().map(|symbol| of[usize::from(*symbol)]));
                    }
                    None => contexts.resize(len, of[0]),
                }
                coder.decode(tables, contexts, &mut rest[..len])?;
            }
        }
        coder.finish()?;
        if let (Elem::Bits(_), [first, ..]) = (lane.elem, widths) {
            let damaged = planes[0].iter().any(|value| u32::from(*value) >> first > 0);
            if damaged {
                return Err(Error::corrupt(format!("a value does not fit {}", lane.elem)));
            }
        }
        merge(lane.elem, planes, out);
        Ok(())
    }
}
