//! Codes a row as a reference to the latest earlier row of the same token, where that is exact or close.
//!
//! A row is one token of one layer and role: all heads. In the first layer a value depends on the token id alone, so rows of equal
//! tokens are equal bit for bit, and a key differs by its rotation only: the earlier key, turned to the new position, is right up to
//! rounding. In the next layers equal tokens still resemble each other, less and less. The earlier row is looked for in the chunk and in
//! the history, by the token ids, which the decoder knows too; no position is stored. Every bit comes back.
//!
//! # Source
//! Own work. The rotation is `RoPE`: Su et al., *Enhanced transformer with rotary position embedding*, 2021.
//!
//! # Settings
//! | Key | Range | Default | Meaning |
//! |---|---|---|---|
//! | `rope` | object or null | null | how keys were rotated, for dumps that do not say |
//! | `rope.pairing` | `half-split`, `adjacent` | `half-split` | channels that form a pair |
//! | `rope.theta` | more than 0 | 10000 | base of the frequencies |
//! | `rope.rotary_dim` | 2 or more, or null | null | rotated channels, from the first on; null for all |
//! | `rope.scaling` | object with `kind` | `none` | change of the frequencies: `none`, `linear` or `llama3`, as in dumps |
//!
//! # Context
//! It wants token ids, `RoPE` facts and history. Without ids every row is literal. Without facts, keys are predicted by the earlier row as
//! it is. The rows of the history are taken to end right before the chunk; where positions have gaps, the keys before them are turned by
//! a wrong angle, on both sides, and become literal rows.
//!
//! # Lanes
//! | Lane | Type | Shape | Content |
//! |---|---|---|---|
//! | `modes` | `bits(2)` | `(seq, 1, 1)` | per row: 0 literal, 1 equal to its prediction, 2 difference to its prediction |
//! | `rows` | as the tensor | `(literal rows, heads, dim)` | literal rows |
//! | `difference-0` to `difference-3` | `u8` | `(rows with mode 2, heads, dim)` | bytes of the differences, lowest first; two for 16-bit elements |
//!
//! Lanes with nothing to say are left out: `rows` without a literal row, a byte of the differences that is zero everywhere, and `modes`
//! if all rows have one mode, which the other lanes then tell (any difference: 2, else `rows`: 0, else 1). So a chunk in which nothing
//! pays is one lane, with the codec for `rows`, and one in which all rows are equal to their predictions has no lane at all.
//!
//! The *prediction* is the earlier row. A key whose rotation is known is turned by `a(p) - a(q)` per pair, where `p` is its position, `q`
//! that of the earlier row, and `a(p) = p * frequency`, all three rounded to F32, as models do; `x * cos - y * sin` and `x * sin + y *
//! cos` are computed in F64 and rounded once. The largest exponent counts as one more power of two. Sines, cosines and frequencies are
//! made from `+`, `-`, `*` and `/` alone, so every machine finds the same prediction. The order of these operations in `rotation.rs` and
//! `number.rs` is part of the format; tests pin its bits.
//!
//! The *difference* counts floats between the prediction and the row: elements in the order of their values (-0 before +0), modulo 2^16
//! or 2^32, and as an unsigned number: 0, -1, 1, -2, 2, … for 0, 1, 2, 3, 4, …
//!
//! # Choice
//! A row that is not equal to its prediction is coded as a difference if the bit lengths of its differences add up to less than the signs
//! and mantissas of its elements. What comes on top is about two bits per element in both cases: which length it is, and the exponent.
//! (With the limit one bit lower the 2048-token run of a small model takes 0.4 % more.) A chunk in which all differences together save
//! less than 64 bytes has none, since their lanes have headers. Where they save less than three bits per element, the chunk is also encoded
//! with literal rows alone, and the smaller of both is stored: a codec may find rows by content that the transform has taken out. So a row
//! costs at most its two bits of mode more than without the transform.
//!
//! # What it is bad at
//! Text whose tokens do not repeat, layers behind the second, and random access: a chunk needs all those before it. Codecs find the
//! similarity of deeper layers by content, without ids.

mod earlier;
mod number;
mod rotation;

use std::borrow::Cow;

use earlier::Earlier;
use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, DType, Elem, ElemSet, Error, ErrorKind, Lane, LaneSpec, Latents,
    LossyTransform, Needs, Plugin, Pool, Result, Role, Rope, RopePairing, RopeScaling, Shape, register_transform,
};
use number::{Bf16, F16, F32, Format, actual, bit_length, difference, elements};
use rotation::Rotation;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Settings of [`TokenRef`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How keys were rotated, for dumps that do not say; what a dump says goes first.
    pub rope: Option<RopeConfig>,
}

/// How keys were rotated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RopeConfig {
    /// Which channels form a pair.
    pub pairing: RopePairing,
    /// Base of the geometric series of frequencies, such as 10000.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub theta: f64,
    /// Channels that are rotated, counted from the first; even. All of them if null.
    #[schemars(range(min = 2))]
    pub rotary_dim: Option<usize>,
    /// Change of the frequencies for long contexts.
    pub scaling: RopeScaling,
}

impl Default for RopeConfig {
    fn default() -> Self {
        Self { pairing: RopePairing::HalfSplit, theta: 10_000.0, rotary_dim: None, scaling: RopeScaling::None }
    }
}

/// Codes a row as a reference to the latest earlier row of the same token.
#[derive(Debug)]
pub struct TokenRef {
    config: Config,
    work: Pool<Work>,
}

impl Plugin for TokenRef {
    const ID: &'static str = "token-ref";
    const SUMMARY: &'static str = "rows as exact references to the latest earlier row of the same token";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = Config;

    fn new(config: Config) -> Result<Self> {
        Ok(Self { config, work: Pool::default() })
    }
}

register_transform!(TokenRef);

const MODES: &str = "modes";
const ROWS: &str = "rows";
const DIFFERENCES: [&str; 4] = ["difference-0", "difference-1", "difference-2", "difference-3"];

/// Modes of a row, as stored.
const LITERAL: u8 = 0;
const EQUAL: u8 = 1;
const DIFFERENT: u8 = 2;

/// Bits that the differences of a chunk must save together: the headers of their lanes and of `modes`, and tables of their codecs.
const WORTH: u64 = 8 * 64;

/// Bits per element that differences must save to be smaller than literal rows for sure.
///
/// On four runs of a small model, the largest saving of a chunk that `planes` coded in fewer bytes without it was between 1.5 and 2.
const SURE: u64 = 3;

impl LossyTransform for TokenRef {
    fn capabilities(&self) -> Capabilities {
        let wants = Needs { tokens: true, rope: true, history: true, ..Needs::NONE };
        Capabilities { wants, ..Capabilities::new(ElemSet::FLOATS) }
    }

    fn config(&self) -> Value {
        json!(self.config)
    }

    fn bound(&self) -> Bound {
        Bound::Lossless
    }

    fn forward(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()> {
        let (dtype, shape) = (chunk.dtype(), chunk.shape());
        if chunk.bytes().is_empty() {
            return Ok(());
        }
        self.work.with(Work::default, |work| {
            let source = work.prepare(&self.config, cx, dtype, shape);
            match dtype {
                DType::F16 => work.forward::<F16>(&source, chunk, out),
                DType::Bf16 => work.forward::<Bf16>(&source, chunk, out),
                DType::F32 => work.forward::<F32>(&source, chunk, out),
                _ => Err(unsupported(dtype)),
            }
        })
    }

    fn alternative(&self, chunk: Chunk<'_>, latents: &Latents) -> Result<Option<Latents>> {
        let doubtful = match chunk.dtype() {
            DType::F16 => is_doubtful::<F16>(latents),
            DType::Bf16 => is_doubtful::<Bf16>(latents),
            DType::F32 => is_doubtful::<F32>(latents),
            dtype => return Err(unsupported(dtype)),
        };
        let literal = || {
            let spec = LaneSpec::new(ROWS, chunk.dtype().into(), chunk.shape());
            let mut latents = Latents::new();
            latents.push_lane(Lane { spec, bytes: chunk.bytes().to_vec() }).map(|()| latents)
        };
        doubtful.then(literal).transpose()
    }

    fn inverse(&self, latents: &Latents, cx: &Context<'_>, mut out: ChunkMut<'_>) -> Result<()> {
        let (dtype, shape) = (out.dtype(), out.shape());
        let out = out.bytes_mut();
        self.work.with(Work::default, |work| {
            let lanes = Lanes::read(latents, dtype, if out.is_empty() { shape.with_seq(0) } else { shape })?;
            let source = work.prepare(&self.config, cx, dtype, shape);
            match dtype {
                DType::F16 => work.inverse::<F16>(&source, &lanes, out),
                DType::Bf16 => work.inverse::<Bf16>(&source, &lanes, out),
                DType::F32 => work.inverse::<F32>(&source, &lanes, out),
                _ => Err(unsupported(dtype)),
            }
        })
    }
}

fn unsupported(dtype: DType) -> Error {
    Error::new(ErrorKind::UnsupportedDType, format!("expected a tensor of {}, got {dtype}", ElemSet::FLOATS))
}

/// Where predictions of a chunk come from.
struct Source<'a> {
    /// Rows before the chunk.
    history: &'a [u8],
    before: usize,
    /// Position of the chunk's first token.
    first_token: u64,
    dim: usize,
    /// Bytes of a row.
    row: usize,
    /// Whether predictions are turned.
    turns: bool,
}

impl Source<'_> {
    /// Position of a row, counted from the start of the history.
    fn position(&self, row: usize) -> f32 {
        self.first_token.wrapping_add(row as u64).wrapping_sub(self.before as u64) as f32
    }

    /// The bytes of a row, counted from the start of the history; `chunk` holds the rows of the chunk so far.
    fn bytes<'a>(&'a self, chunk: &'a [u8], row: usize) -> &'a [u8] {
        match row.checked_sub(self.before) {
            Some(row) => &chunk[row * self.row..][..self.row],
            None => &self.history[row * self.row..][..self.row],
        }
    }
}

/// Buffers that are kept between chunks.
#[derive(Debug, Default)]
struct Work {
    earlier: Earlier,
    rotation: Rotation,
    modes: Vec<u8>,
    predicted: Vec<u32>,
    differences: Vec<u32>,
}

impl Work {
    /// Finds the earlier rows, and takes the rotation if there is one.
    fn prepare<'a>(&mut self, config: &Config, cx: &Context<'a>, dtype: DType, shape: Shape) -> Source<'a> {
        let tokens = cx.tokens.filter(|ids| ids.len() == shape.seq).unwrap_or_default();
        let history = cx.history.zip(cx.history_tokens).filter(|(chunk, ids)| {
            chunk.dtype() == dtype && chunk.shape() == shape.with_seq(ids.len()) && !tokens.is_empty()
        });
        let (history, ids) = history.map_or((&[][..], &[][..]), |(chunk, ids)| (chunk.bytes(), ids));
        self.earlier.find(ids, tokens);
        let rope = (cx.role == Role::Key).then(|| config.rope(cx, shape.dim)).flatten();
        Source {
            history,
            before: ids.len(),
            first_token: cx.first_token,
            dim: shape.dim,
            row: shape.row() * dtype.size(),
            turns: rope.is_some_and(|rope| self.rotation.set(&rope, shape.dim)),
        }
    }

    /// Predicts `row` from the row `from`, both counted from the start of the history.
    fn predict<F: Format>(&mut self, source: &Source<'_>, chunk: &[u8], from: usize, row: usize) {
        self.predicted.clear();
        self.predicted.extend(elements::<F>(source.bytes(chunk, from)));
        if source.turns {
            let (from, to) = (source.position(from), source.position(row));
            self.rotation.turn::<F>(&mut self.predicted, source.dim, from, to);
        }
    }

    fn forward<F: Format>(&mut self, source: &Source<'_>, chunk: Chunk<'_>, out: &mut Latents) -> Result<()> {
        let shape = chunk.shape();
        let rows = || chunk.bytes().chunks_exact(source.row);
        let literal = u64::from(1 + F::MANTISSA) * shape.row() as u64;
        let mut saved = 0;
        self.modes.clear();
        self.differences.clear();
        for (row, bytes) in rows().enumerate() {
            let mode = match self.earlier.of(row) {
                None => LITERAL,
                Some(from) if !source.turns && source.bytes(chunk.bytes(), from) == bytes => EQUAL,
                Some(from) => {
                    self.predict::<F>(source, chunk.bytes(), from, source.before + row);
                    let start = self.differences.len();
                    let pairs = elements::<F>(bytes).zip(&self.predicted);
                    self.differences.extend(pairs.map(|(actual, predicted)| difference::<F>(actual, *predicted)));
                    let lengths: u64 = self.differences[start..].iter().map(|d| u64::from(bit_length(*d))).sum();
                    if (1..literal).contains(&lengths) {
                        saved += literal - lengths;
                        DIFFERENT
                    } else {
                        self.differences.truncate(start);
                        if lengths == 0 { EQUAL } else { LITERAL }
                    }
                }
            };
            self.modes.push(mode);
        }
        if saved < WORTH {
            self.differences.clear();
            for mode in self.modes.iter_mut().filter(|mode| **mode == DIFFERENT) {
                *mode = LITERAL;
            }
        }
        self.write::<F>(chunk, out)
    }

    fn write<F: Format>(&self, chunk: Chunk<'_>, out: &mut Latents) -> Result<()> {
        let shape = chunk.shape();
        let mut push = |name: &'static str, elem: Elem, shape: Shape, bytes: Vec<u8>| {
            out.push_lane(Lane { spec: LaneSpec::new(name, elem, shape), bytes })
        };
        if self.modes.iter().any(|mode| *mode != self.modes[0]) {
            push(MODES, Elem::Bits(2), Shape::flat(shape.seq), self.modes.clone())?;
        }
        let literal = count(&self.modes, LITERAL);
        if literal > 0 {
            let size = shape.row() * F::BYTES;
            let mut bytes = Vec::with_capacity(literal * size);
            for (row, _) in chunk.bytes().chunks_exact(size).zip(&self.modes).filter(|(_, mode)| **mode == LITERAL) {
                bytes.extend_from_slice(row);
            }
            push(ROWS, chunk.dtype().into(), shape.with_seq(literal), bytes)?;
        }
        let rows = self.differences.len() / shape.row();
        let used = self.differences.iter().fold(0, |used, difference| used | difference);
        for (byte, name) in DIFFERENCES.into_iter().enumerate().take(F::BYTES) {
            if used.to_le_bytes()[byte] != 0 {
                let bytes = self.differences.iter().map(|difference| (difference >> (8 * byte)) as u8).collect();
                push(name, Elem::U8, shape.with_seq(rows), bytes)?;
            }
        }
        Ok(())
    }

    fn inverse<F: Format>(&mut self, source: &Source<'_>, lanes: &Lanes<'_>, out: &mut [u8]) -> Result<()> {
        let elements_per_row = source.row / F::BYTES;
        let mut literal = lanes.rows.chunks_exact(source.row.max(1));
        let mut different = 0;
        for (row, mode) in lanes.modes.iter().enumerate() {
            let (done, rest) = out.split_at_mut(row * source.row);
            let target = &mut rest[..source.row];
            if *mode == LITERAL {
                target.copy_from_slice(literal.next().unwrap_or_else(|| unreachable!("literal rows were counted")));
                continue;
            }
            let from = self.earlier.of(row).ok_or_else(|| {
                Error::corrupt(format!(
                    "row {row}: expected a literal row, since its token is new here, got mode {mode}"
                ))
            })?;
            if *mode == EQUAL && !source.turns {
                target.copy_from_slice(source.bytes(done, from));
                continue;
            }
            self.predict::<F>(source, done, from, source.before + row);
            if *mode == DIFFERENT {
                self.differences.clear();
                self.differences.resize(elements_per_row, 0);
                let range = different * elements_per_row..(different + 1) * elements_per_row;
                for (byte, lane) in lanes.differences.iter().enumerate() {
                    let Some(lane) = lane.get(range.clone()) else { continue };
                    for (difference, part) in self.differences.iter_mut().zip(lane) {
                        *difference |= u32::from(*part) << (8 * byte);
                    }
                }
                for (element, difference) in self.predicted.iter_mut().zip(&self.differences) {
                    *element = actual::<F>(*element, *difference);
                }
                different += 1;
            }
            for (bytes, element) in target.chunks_exact_mut(F::BYTES).zip(&self.predicted) {
                bytes.copy_from_slice(&element.to_le_bytes()[..F::BYTES]);
            }
        }
        Ok(())
    }
}

/// Whether there are differences, but not short ones: literal rows may be smaller, also because codecs find rows like them by content.
fn is_doubtful<F: Format>(latents: &Latents) -> bool {
    let parts = DIFFERENCES.map(|name| latents.lanes().iter().find(|lane| lane.spec.name == name));
    let Some(different) = parts.iter().flatten().map(|lane| lane.bytes.len()).max() else { return false };
    let part = |byte: usize, idx: usize| parts[byte].map_or(0, |lane| u32::from(lane.bytes[idx]) << (8 * byte));
    let difference = |idx| (0..F::BYTES).fold(0, |difference, byte| difference | part(byte, idx));
    let lengths: u64 = (0..different).map(|idx| u64::from(bit_length(difference(idx)))).sum();
    lengths + SURE * different as u64 > u64::from(1 + F::MANTISSA) * different as u64
}

/// Rows with this mode.
fn count(modes: &[u8], mode: u8) -> usize {
    modes.iter().map(|held| usize::from(*held == mode)).sum()
}

/// The lanes of a chunk, checked.
struct Lanes<'a> {
    /// By row.
    modes: Cow<'a, [u8]>,
    rows: &'a [u8],
    /// By byte; empty if it is zero everywhere.
    differences: [&'a [u8]; 4],
}

impl<'a> Lanes<'a> {
    fn read(latents: &'a Latents, dtype: DType, shape: Shape) -> Result<Self> {
        let lane = |name: &str| latents.lanes().iter().find(|lane| lane.spec.name == name);
        let names = [MODES, ROWS].into_iter().chain(DIFFERENCES.into_iter().take(dtype.size()));
        let known = names.filter(|name| lane(name).is_some()).count();
        if known != latents.lanes().len() {
            let held: Vec<_> = latents.lanes().iter().map(|lane| lane.spec.to_string()).collect();
            return Err(Error::corrupt(format!("a lane is unknown, got {}", held.join(", "))));
        }
        let modes = match lane(MODES) {
            Some(lane) => Cow::Borrowed(bytes(lane, Elem::Bits(2), Shape::flat(shape.seq))?),
            None if DIFFERENCES.iter().any(|name| lane(name).is_some()) => Cow::Owned(vec![DIFFERENT; shape.seq]),
            None if lane(ROWS).is_some() => Cow::Owned(vec![LITERAL; shape.seq]),
            None => Cow::Owned(vec![EQUAL; shape.seq]),
        };
        if let Some(unknown) = modes.iter().find(|mode| **mode > DIFFERENT) {
            return Err(Error::corrupt(format!("lane `{MODES}`: mode {unknown} is unknown")));
        }
        let literal = shape.with_seq(count(&modes, LITERAL));
        let rows = match lane(ROWS) {
            Some(lane) => bytes(lane, dtype.into(), literal)?,
            None if literal.elements() == 0 => &[],
            None => {
                return Err(Error::corrupt(format!(
                    "lane `{ROWS}` is missing, but there are {} literal rows",
                    literal.seq
                )));
            }
        };
        let different = shape.with_seq(count(&modes, DIFFERENT));
        let mut differences = [&[][..]; 4];
        for (held, name) in differences.iter_mut().zip(DIFFERENCES) {
            if let Some(lane) = lane(name) {
                *held = bytes(lane, Elem::U8, different)?;
            }
        }
        Ok(Self { modes, rows, differences })
    }
}

/// The bytes of a lane that must have this type and shape.
fn bytes(lane: &Lane, elem: Elem, shape: Shape) -> Result<&[u8]> {
    if lane.spec.elem == elem && lane.spec.shape == shape {
        return Ok(&lane.bytes);
    }
    Err(Error::corrupt(format!("expected {elem} {shape}, got {}", lane.spec)))
}

impl Config {
    /// What is known of the rotation of keys.
    fn rope(&self, cx: &Context<'_>, dim: usize) -> Option<Rope> {
        let own = self.rope.as_ref().map(|rope| Rope {
            pairing: rope.pairing,
            theta: rope.theta,
            rotary_dim: rope.rotary_dim.unwrap_or(dim),
            scaling: rope.scaling,
        });
        cx.rope.cloned().or(own)
    }
}

#[cfg(test)]
mod tests;
