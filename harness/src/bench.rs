//! Encode and decode time of pipelines: warm, single thread, pipelines alternating within each repeat, every result verified.

use std::time::Instant;

use gearbox_core::{
    Chunk, ChunkMut, Context, DType, EncodedChunk, Error, Limits, Pipeline, Result, ResultExt, Role, Rope, Shape, Span,
    Stage,
};
use serde::Serialize;

use crate::dump::{Dump, Entry};
use crate::engine;

/// The tensors of one run, layer and role, in memory.
struct Sequence<'a> {
    layer: u32,
    role: Role,
    rope: Option<&'a Rope>,
    dtype: DType,
    shape: Shape,
    spans: Vec<Span>,
    stages: Vec<Stage>,
    tokens: Option<Vec<u32>>,
    bytes: Vec<u8>,
}

/// The part of a dump that is measured.
pub struct Input<'a>(Vec<Sequence<'a>>);

impl<'a> Input<'a> {
    /// Reads whole layers, keys and values, until `max_bytes` are reached.
    ///
    /// # Errors
    /// What reading the files reports.
    pub fn read(dump: &'a Dump, max_bytes: u64) -> Result<Self> {
        let mut sequences = Vec::new();
        let mut total = 0;
        for run in &dump.runs {
            for layer in &run.layers {
                let Some(first) = layer.entries.first() else { continue };
                let size: u64 = layer.entries.iter().map(Entry::original_bytes).sum();
                if total > 0 && total + size > max_bytes {
                    continue;
                }
                total += size;
                let seq = layer.entries.iter().map(|entry| entry.seq).sum();
                let ids: Option<Vec<_>> = layer.entries.iter().map(|entry| entry.tokens.as_deref()).collect();
                for role in Role::ALL {
                    let mut bytes = Vec::new();
                    for entry in &layer.entries {
                        bytes.extend_from_slice(&entry.tensor(role).map()?);
                    }
                    sequences.push(Sequence {
                        layer: layer.id,
                        role,
                        rope: run.rope.as_ref(),
                        dtype: first.tensor(role).dtype,
                        shape: first.tensor(role).shape.with_seq(seq),
                        spans: layer.entries.iter().map(Entry::span).collect(),
                        stages: layer.entries.iter().map(|entry| entry.stage).collect(),
                        tokens: ids.as_ref().map(|ids| ids.concat()),
                        bytes,
                    });
                }
            }
        }
        Ok(Self(sequences))
    }

    /// Bytes that are measured.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|sequence| sequence.bytes.len() as u64).sum()
    }
}

/// One chunk of one arm.
struct Unit {
    sequence: usize,
    /// Tokens of the sequence before the chunk.
    before: usize,
    seq: usize,
    first_token: u64,
    stage: Stage,
    encoded_len: usize,
    encode_ns: Vec<u64>,
    transform_ns: Vec<u64>,
    decode_ns: Vec<u64>,
}

/// Least, median, 95th percentile and greatest of a set of measurements.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Spread {
    /// Least.
    pub min: f64,
    /// Median.
    pub median: f64,
    /// 95th percentile (nearest rank).
    pub p95: f64,
    /// Greatest.
    pub max: f64,
}

impl Spread {
    /// The spread of some measurements; zeros if there are none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let rank = |percent: usize| {
            let rank = (values.len() * percent).div_ceil(100);
            values.get(rank.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self { min: rank(0), median: rank(50), p95: rank(95), max: rank(100) }
    }
}

/// Measurements of one pipeline for one role and stage.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// The pipeline in a few words.
    pub pipeline: String,
    /// Chunking mode.
    pub chunking: String,
    /// Keys or values.
    pub role: Role,
    /// Stage of the chunks' first entry.
    pub stage: Stage,
    /// Number of chunks.
    pub chunks: usize,
    /// Bytes of the original tensors.
    pub original_bytes: u64,
    /// Bytes of encoded lanes, without the headers of a container.
    pub encoded_bytes: u64,
    /// Encoding in 10^6 original bytes per second, over repeats.
    pub encode_mb_s: Spread,
    /// Decoding in 10^6 original bytes per second, over repeats.
    pub decode_mb_s: Spread,
    /// Encoding one chunk in microseconds: each chunk's median over repeats, spread over chunks.
    pub encode_us: Spread,
    /// Decoding one chunk in microseconds: each chunk's median over repeats, spread over chunks.
    pub decode_us: Spread,
    /// Time of the transforms alone ÷ encoding time; measured apart, so noise can lift it above 1.
    pub transform_share: f64,
}

/// Measures pipelines over the same input; one warm-up, then `repeats` rounds in which the pipelines take turns.
///
/// # Errors
/// [`ErrorKind::Mismatch`](gearbox_core::ErrorKind::Mismatch) if a lossless pipeline does not give back its input;
/// else what the plugins report.
pub fn measure(dump: &Dump, input: &Input<'_>, pipelines: &mut [Pipeline], repeats: usize) -> Result<Vec<Measured>> {
    let mut arms = Vec::new();
    for pipeline in pipelines {
        let trained = engine::check(dump, pipeline).and_then(|()| engine::train(dump, pipeline));
        trained.context(|| pipeline.name().to_owned())?;
        arms.push((&*pipeline, units(input, pipeline)));
    }
    let mut buffers = Buffers::default();
    for round in 0..=repeats {
        for (pipeline, units) in &mut arms {
            for unit in units.iter_mut() {
                let timed = buffers.run(input, pipeline, unit, round == 0);
                let (encode, transform, decode) = timed.context(|| pipeline.name().to_owned())?;
                if round > 0 {
                    unit.encode_ns.push(encode);
                    unit.transform_ns.push(transform);
                    unit.decode_ns.push(decode);
                }
            }
        }
    }
    Ok(arms.iter().flat_map(|(pipeline, units)| summarise(input, pipeline, units, repeats)).collect())
}

fn units(input: &Input<'_>, pipeline: &Pipeline) -> Vec<Unit> {
    let mut units = Vec::new();
    for (idx, sequence) in input.0.iter().enumerate() {
        let mut before = 0;
        for plan in pipeline.spec().chunking.plan(&sequence.spans) {
            units.push(Unit {
                sequence: idx,
                before,
                seq: plan.seq,
                first_token: plan.first_token,
                stage: sequence.stages[plan.pieces[0].0],
                encoded_len: 0,
                encode_ns: Vec::new(),
                transform_ns: Vec::new(),
                decode_ns: Vec::new(),
            });
            before += plan.seq;
        }
    }
    units
}

/// Buffers that are used again for every chunk.
#[derive(Default)]
struct Buffers {
    encoded: EncodedChunk,
    decoded: Vec<u8>,
}

impl Buffers {
    fn run(
        &mut self,
        input: &Input<'_>,
        pipeline: &Pipeline,
        unit: &mut Unit,
        verify: bool,
    ) -> Result<(u64, u64, u64)> {
        let sequence = &input.0[unit.sequence];
        let whole = Chunk::new(sequence.shape, sequence.dtype, &sequence.bytes)?;
        let range = unit.before..unit.before + unit.seq;
        let chunk = whole.tokens(range.clone());
        let coder = pipeline.coder(sequence.layer, sequence.role)?;
        let uses = coder.context();
        // Keys stand right before the values of the same layer.
        let peer = match sequence.role {
            Role::Value if uses.peer => {
                let keys = &input.0[unit.sequence - 1];
                Some(Chunk::new(keys.shape, keys.dtype, &keys.bytes)?.tokens(range.clone()))
            }
            _ => None,
        };
        let tokens = sequence.tokens.as_deref().filter(|_| uses.tokens);
        let cx = Context {
            end_token: sequence.spans.last().map(|span| span.start + span.seq as u64),
            tokens: tokens.map(|ids| &ids[range]),
            rope: sequence.rope,
            peer,
            history: uses.history.then(|| whole.tokens(0..unit.before)),
            history_tokens: tokens.filter(|_| uses.history).map(|ids| &ids[..unit.before]),
            ..Context::new(sequence.layer, sequence.role, unit.first_token)
        };
        let start = Instant::now();
        coder.encode(chunk, &cx, &mut self.encoded)?;
        let encode = start.elapsed().as_nanos() as u64;
        let mut transform = 0;
        if coder.transforms() > 0 {
            let start = Instant::now();
            std::hint::black_box(coder.lanes(chunk, &cx)?);
            transform = start.elapsed().as_nanos() as u64;
        }
        self.decoded.resize(chunk.bytes().len(), 0);
        let start = Instant::now();
        let out = ChunkMut::new(chunk.shape(), chunk.dtype(), &mut self.decoded)?;
        coder.decode(self.encoded.lanes(), &cx, &Limits::default(), out)?;
        let decode = start.elapsed().as_nanos() as u64;
        unit.encoded_len = self.encoded.bytes.len();
        if verify && coder.is_lossless() && self.decoded != chunk.bytes() {
            return Err(Error::mismatch(format!(
                "layer {}, {}, chunk at token {}: decoded bytes differ from the input",
                sequence.layer, sequence.role, unit.first_token
            )));
        }
        Ok((encode, transform, decode))
    }
}

fn summarise(input: &Input<'_>, pipeline: &Pipeline, units: &[Unit], repeats: usize) -> Vec<Measured> {
    let mut rows = Vec::new();
    for role in Role::ALL {
        for stage in [Stage::Prefill, Stage::Decode, Stage::Unknown] {
            let held: Vec<_> =
                units.iter().filter(|unit| input.0[unit.sequence].role == role && unit.stage == stage).collect();
            if held.is_empty() {
                continue;
            }
            let bytes_of = |unit: &&Unit| {
                let sequence = &input.0[unit.sequence];
                (unit.seq * sequence.shape.row() * sequence.dtype.size()) as u64
            };
            let original_bytes: u64 = held.iter().map(bytes_of).sum();
            let total =
                |pick: fn(&Unit) -> &Vec<u64>, round: usize| held.iter().map(|unit| pick(unit)[round]).sum::<u64>();
            let rate = |pick: fn(&Unit) -> &Vec<u64>| {
                let rates = (0..repeats).map(|round| original_bytes as f64 * 1e3 / total(pick, round).max(1) as f64);
                Spread::of(rates.collect())
            };
            let micros = |pick: fn(&Unit) -> &Vec<u64>| {
                let median = |unit: &&Unit| Spread::of(pick(unit).iter().map(|ns| *ns as f64 / 1e3).collect()).median;
                Spread::of(held.iter().map(median).collect())
            };
            let sum = |pick: fn(&Unit) -> &Vec<u64>| (0..repeats).map(|round| total(pick, round)).sum::<u64>();
            rows.push(Measured {
                pipeline: pipeline.name().to_owned(),
                chunking: pipeline.spec().chunking.to_string(),
                role,
                stage,
                chunks: held.len(),
                original_bytes,
                encoded_bytes: held.iter().map(|unit| unit.encoded_len as u64).sum(),
                encode_mb_s: rate(|unit| &unit.encode_ns),
                decode_mb_s: rate(|unit| &unit.decode_ns),
                encode_us: micros(|unit| &unit.encode_ns),
                decode_us: micros(|unit| &unit.decode_ns),
                transform_share: sum(|unit| &unit.transform_ns) as f64 / sum(|unit| &unit.encode_ns).max(1) as f64,
            });
        }
    }
    rows
}

/// Highest resident memory of this process so far, in bytes, where the system tells.
pub fn peak_resident_bytes() -> Option<u64> {
    memory_bytes("/proc/self/status", "VmHWM:")
}

/// Resident memory of this process now, in bytes, where the system tells.
pub fn resident_bytes() -> Option<u64> {
    memory_bytes("/proc/self/status", "VmRSS:")
}

/// Memory that new processes may take, in bytes, where the system tells.
pub fn available_bytes() -> Option<u64> {
    memory_bytes("/proc/meminfo", "MemAvailable:")
}

fn memory_bytes(file: &str, what: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(what))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_uses_nearest_ranks() {
        let spread = Spread::of((1..=20).rev().map(f64::from).collect());
        assert_eq!((spread.min, spread.median, spread.p95, spread.max), (1.0, 10.0, 19.0, 20.0));
    }
}
