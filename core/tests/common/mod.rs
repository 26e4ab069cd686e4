//! Small plugins with which the container's own properties are tested: a run-length codec, a codec that learns a table, a transform
//! that splits a tensor into lanes, and one that writes a tensor and a side lane.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::sync::Arc;

use gearbox_core::container::{ContainerWriter, EntryInfo, RunInfo, SequenceId, SequenceInfo};
use gearbox_core::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NoSettings {}

/// Byte runs: count, value.
#[derive(Debug)]
pub struct Runs;

impl Plugin for Runs {
    const ID: &'static str = "runs";
    const ALIASES: &'static [&'static str] = &["run_length"];
    const SUMMARY: &'static str = "run lengths, for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 2;
    type Config = NoSettings;

    fn new(_: NoSettings) -> Result<Self> {
        Ok(Self)
    }
}

fn encode_runs(bytes: &[u8], out: &mut Vec<u8>) {
    for run in bytes.chunk_by(|a, b| a == b) {
        for part in run.chunks(255) {
            out.extend_from_slice(&[part.len() as u8, part[0]]);
        }
    }
}

fn decode_runs(encoded: &[u8], out: &mut [u8]) -> Result<()> {
    let mut at = 0;
    for pair in encoded.chunks(2) {
        let [count, value] = pair else { return Err(Error::corrupt("half a run")) };
        let end = at + usize::from(*count);
        out.get_mut(at..end).ok_or_else(|| Error::corrupt("a run passes the end of the lane"))?.fill(*value);
        at = end;
    }
    if at == out.len() { Ok(()) } else { Err(Error::corrupt(format!("expected {} bytes, got {at}", out.len()))) }
}

impl Codec for Runs {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        serde_json::json!({})
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        2 * lane.byte_len()
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        encode_runs(lane.bytes(), out);
        Ok(())
    }

    fn decode(&self, encoded: &[u8], _: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        decode_runs(encoded, out)
    }
}

/// Subtracts the most frequent byte of all samples, then stores runs.
#[derive(Debug)]
pub struct Learned {
    common: Option<u8>,
}

impl Plugin for Learned {
    const ID: &'static str = "learned";
    const SUMMARY: &'static str = "learns one byte, for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = NoSettings;

    fn new(_: NoSettings) -> Result<Self> {
        Ok(Self { common: None })
    }
}

impl Codec for Learned {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        serde_json::json!({})
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        2 * lane.byte_len()
    }

    fn encode(&self, lane: LaneRef<'_>, _: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let common = self.common.ok_or_else(|| Error::invalid_config("was not trained"))?;
        let shifted: Vec<_> = lane.bytes().iter().map(|byte| byte.wrapping_sub(common)).collect();
        encode_runs(&shifted, out);
        Ok(())
    }

    fn decode(&self, encoded: &[u8], _: &LaneSpec, _: &Context<'_>, out: &mut [u8]) -> Result<()> {
        let common = self.common.ok_or_else(|| Error::corrupt("the artifact is missing"))?;
        decode_runs(encoded, out)?;
        for byte in out {
            *byte = byte.wrapping_add(common);
        }
        Ok(())
    }

    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        let mut counts = [0usize; 256];
        for sample in samples {
            for byte in sample.bytes.iter() {
                counts[usize::from(*byte)] += 1;
            }
        }
        let common = (0..=255u8).max_by_key(|byte| counts[usize::from(*byte)]).unwrap_or(0);
        Ok(Some(Artifact(vec![common])))
    }

    fn with_artifact(&self, artifact: &[u8]) -> Result<Option<Arc<dyn Codec>>> {
        match artifact {
            [common] => Ok(Some(Arc::new(Self { common: Some(*common) }))),
            _ => Err(Error::corrupt(format!("expected an artifact of 1 byte, got {}", artifact.len()))),
        }
    }
}

/// Splits FP16 into an 8-bit lane of high bytes and a 4-bit lane pair of low nibbles.
#[derive(Debug)]
pub struct Nibbles;

impl Plugin for Nibbles {
    const ID: &'static str = "nibbles";
    const SUMMARY: &'static str = "high bytes and nibbles as lanes, for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = NoSettings;

    fn new(_: NoSettings) -> Result<Self> {
        Ok(Self)
    }
}

impl LossyTransform for Nibbles {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::F16)
    }

    fn config(&self) -> Value {
        serde_json::json!({})
    }

    fn bound(&self) -> Bound {
        Bound::Lossless
    }

    fn forward(&self, chunk: Chunk<'_>, _: &Context<'_>, out: &mut Latents) -> Result<()> {
        let words = || chunk.bytes().chunks_exact(2);
        let lane = out.push(LaneSpec::new("high", Elem::U8, chunk.shape()))?;
        lane.iter_mut().zip(words()).for_each(|(byte, word)| *byte = word[1]);
        for (name, shift) in [("upper", 4), ("lower", 0)] {
            let lane = out.push(LaneSpec::new(name, Elem::Bits(4), chunk.shape()))?;
            lane.iter_mut().zip(words()).for_each(|(byte, word)| *byte = word[0] >> shift & 15);
        }
        Ok(())
    }

    fn inverse(&self, latents: &Latents, _: &Context<'_>, mut out: ChunkMut<'_>) -> Result<()> {
        let lanes = [latents.lane("high")?, latents.lane("upper")?, latents.lane("lower")?];
        let [high, upper, lower] = lanes.map(|lane| lane.bytes.as_slice());
        if high.len() * 2 != out.bytes_mut().len() || upper.len() != high.len() || lower.len() != high.len() {
            return Err(Error::corrupt("lanes and tensor have other lengths"));
        }
        for (idx, word) in out.bytes_mut().chunks_exact_mut(2).enumerate() {
            word.copy_from_slice(&[upper[idx] << 4 | lower[idx], high[idx]]);
        }
        Ok(())
    }
}

/// Flips every bit of the tensor and remembers the number of tokens in a side lane.
#[derive(Debug)]
pub struct Negative;

impl Plugin for Negative {
    const ID: &'static str = "negative";
    const SUMMARY: &'static str = "bitwise complement, for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = NoSettings;

    fn new(_: NoSettings) -> Result<Self> {
        Ok(Self)
    }
}

impl LossyTransform for Negative {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::FLOATS)
    }

    fn config(&self) -> Value {
        serde_json::json!({})
    }

    fn bound(&self) -> Bound {
        Bound::Lossless
    }

    fn forward(&self, chunk: Chunk<'_>, _: &Context<'_>, out: &mut Latents) -> Result<()> {
        let lane = out.push(LaneSpec::tensor(chunk.dtype(), chunk.shape()))?;
        lane.iter_mut().zip(chunk.bytes()).for_each(|(to, from)| *to = !from);
        let seq = chunk.shape().seq as u32;
        out.push(LaneSpec::new("seq", Elem::U32, Shape::flat(1)))?.copy_from_slice(&seq.to_le_bytes());
        Ok(())
    }

    fn inverse(&self, latents: &Latents, _: &Context<'_>, mut out: ChunkMut<'_>) -> Result<()> {
        let tensor = latents.lane(LaneSpec::TENSOR)?;
        let seq = out.shape().seq as u32;
        if latents.lane("seq")?.bytes != seq.to_le_bytes() || tensor.bytes.len() != out.bytes_mut().len() {
            return Err(Error::corrupt("lanes and tensor have other lengths"));
        }
        out.bytes_mut().iter_mut().zip(&tensor.bytes).for_each(|(to, from)| *to = !from);
        Ok(())
    }
}

pub fn registry() -> Registry {
    let mut registry = Registry::empty();
    let origin = "tests";
    let insert = |registry: &mut Registry, entry| registry.insert(entry).unwrap();
    insert(&mut registry, AnyEntry::Codec(Entry::of::<Runs>(origin, |p| Arc::new(p))));
    insert(&mut registry, AnyEntry::Codec(Entry::of::<Learned>(origin, |p| Arc::new(p))));
    insert(&mut registry, AnyEntry::Transform(Entry::of::<Nibbles>(origin, |p| Arc::new(p))));
    insert(&mut registry, AnyEntry::Transform(Entry::of::<Negative>(origin, |p| Arc::new(p))));
    registry
}

/// The same plugins, one of them from a library.
pub fn loaded(id: &str) -> Registry {
    let library = LibraryUse { file: "libtests.so".into(), sha256: "0123456789abcdef".repeat(4) };
    let mut loaded = Registry::empty();
    for entry in registry().entries() {
        let mut entry = entry.clone();
        if let AnyEntry::Codec(codec) = &mut entry
            && codec.id == id
        {
            let library = library.clone();
            codec.library = Some(Arc::new(move || Ok(library.clone())));
        }
        loaded.insert(entry).unwrap();
    }
    loaded
}

pub fn pipeline(json: &str) -> Pipeline {
    Pipeline::build(&PipelineSpec::from_json(json).unwrap(), &registry()).unwrap()
}

pub const RUNS: &str = r#"{ "routes": [{ "codec": { "id": "runs" } }] }"#;
pub const CHAIN: &str = r#"{ "routes": [{
    "transforms": [{ "id": "negative" }, { "id": "nibbles" }],
    "codec": { "high": { "id": "runs" }, "*": { "id": "run_length" } } }],
    "chunking": { "mode": "chunked-grouped", "tokens": 3 } }"#;

/// Bytes of tensors that look like nothing in particular but have runs: splitmix64, seed 7.
pub fn tensor(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB) >> 56
    };
    (0..len).map(|idx| if idx % 8 < 5 { 0x3C } else { next() as u8 }).collect()
}

pub const HEADS: usize = 2;
pub const DIM: usize = 4;
pub const ENTRIES: [(u64, usize); 3] = [(0, 5), (5, 1), (9, 2)];

/// A container of one run with two layers; returns the file and the tensors in stored order.
pub fn sample(pipeline: &mut Pipeline) -> (Vec<u8>, Vec<Vec<u8>>, ledger::Ledger) {
    let row = HEADS * DIM * 2;
    let seq: usize = ENTRIES.iter().map(|(_, seq)| seq).sum();
    let tensors: Vec<Vec<u8>> = (0..4).map(|idx| tensor(seq * row, 7 + idx)).collect();
    let lanes = tensors.clone();
    pipeline
        .train(&|_| {
            let spec = LaneSpec::tensor(DType::F16, Shape::new(seq, HEADS, DIM));
            let lanes = lanes.clone().into_iter();
            Box::new(lanes.map(move |bytes| Sample {
                spec: spec.clone(),
                bytes: bytes.into(),
                layer: 0,
                role: Role::Key,
            }))
        })
        .unwrap();
    let mut writer = ContainerWriter::new(Vec::new(), pipeline).unwrap();
    let rope = Rope { pairing: RopePairing::HalfSplit, theta: 10_000.0, rotary_dim: DIM, scaling: RopeScaling::None };
    let run = RunInfo {
        name: "demo".into(),
        rope: Some(rope),
        tokens: vec![(0, vec![1, 2, 300, 4, 5, 6]), (9, vec![70_000, 8])],
    };
    let run = writer.add_run(&run).unwrap();
    let entries: Vec<_> = ENTRIES
        .iter()
        .map(|&(start, seq)| EntryInfo {
            span: Span { start, seq },
            stage: if seq > 1 { Stage::Prefill } else { Stage::Decode },
        })
        .collect();
    let mut encoded = EncodedChunk::default();
    for layer in 0..2u32 {
        let ids: Vec<SequenceId> = Role::ALL
            .iter()
            .map(|&role| {
                let entries = entries.clone();
                let info = SequenceInfo { run, layer, role, dtype: DType::F16, heads: HEADS, dim: DIM, entries };
                writer.add_sequence(info).unwrap()
            })
            .collect();
        let mut before = 0;
        for plan in pipeline.spec().chunking.plan(&entries.iter().map(|entry| entry.span).collect::<Vec<_>>()) {
            for role in Role::ALL {
                let bytes = &tensors[2 * layer as usize + role as usize][before * row..(before + plan.seq) * row];
                let chunk = Chunk::new(Shape::new(plan.seq, HEADS, DIM), DType::F16, bytes).unwrap();
                let cx = Context::new(layer, role, plan.first_token);
                pipeline.coder(layer, role).unwrap().encode(chunk, &cx, &mut encoded).unwrap();
                writer.add_chunk(ids[role as usize], plan.first_token, plan.seq, encoded.clone(), bytes).unwrap();
            }
            before += plan.seq;
        }
    }
    let (bytes, ledger) = writer.finish().unwrap();
    (bytes, tensors, ledger)
}

/// Opens and decodes everything, from the bytes alone.
pub fn decode(bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let container = container::Container::open(bytes, &Limits::default())?;
    let pipeline = container.pipeline(&registry())?;
    container
        .sequences()
        .map(|sequence| {
            let info = &sequence.info;
            let mut tensor = Vec::new();
            for (number, chunk) in sequence.chunks.iter().enumerate() {
                let shape = info.shape(chunk.seq);
                let mut out = vec![0; shape.elements() * info.dtype.size()];
                let cx = Context::new(info.layer, info.role, chunk.first_token);
                let target = ChunkMut::new(shape, info.dtype, &mut out)?;
                container.decode_chunk(&pipeline, sequence, number, &cx, target)?;
                tensor.extend_from_slice(&out);
            }
            Ok(tensor)
        })
        .collect()
}

/// Appends a shortest LEB128 integer.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub fn varints(values: &[u64]) -> Vec<u8> {
    let mut out = Vec::new();
    for value in values {
        put_varint(&mut out, *value);
    }
    out
}

fn varint(bytes: &mut &[u8]) -> usize {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= usize::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

/// A record with a good checksum, whatever its head says.
pub fn record(tag: u8, head: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    put_varint(&mut out, head.len() as u64);
    out.extend_from_slice(head);
    let checksum = crc32c::crc32c(&out);
    out.extend_from_slice(&checksum.to_le_bytes());
    out.extend_from_slice(payload);
    out
}

/// Length and checksum, as heads name them.
pub fn payload(bytes: &[u8]) -> Vec<u8> {
    let mut out = varints(&[bytes.len() as u64]);
    out.extend_from_slice(&crc32c::crc32c(bytes).to_le_bytes());
    out
}

/// The file header and the records before the index.
pub fn split(file: &[u8]) -> (Vec<u8>, Vec<Vec<u8>>) {
    let (mut records, trailer) = file.split_at(file.len() - 20);
    let index = u64::from_le_bytes(trailer[..8].try_into().unwrap()) as usize;
    let header = u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize + 20;
    let mut entries = &records[index + 1..];
    let head = varint(&mut entries);
    entries = &entries[head + 4..];
    records = &records[header..index];
    let mut list = Vec::new();
    while !entries.is_empty() {
        entries = &entries[1..];
        let (record, rest) = records.split_at(varint(&mut entries));
        list.push(record.to_vec());
        records = rest;
    }
    (file[..header].to_vec(), list)
}

/// A file with index and trailer around these records.
pub fn join(header: &[u8], records: &[Vec<u8>]) -> Vec<u8> {
    let mut file = header.to_vec();
    let mut index = Vec::new();
    for record in records {
        file.extend_from_slice(record);
        index.push(record[0]);
        put_varint(&mut index, record.len() as u64);
    }
    let offset = (file.len() as u64).to_le_bytes();
    file.extend(record(b'I', &payload(&index), &index));
    file.extend_from_slice(&offset);
    file.extend_from_slice(&crc32c::crc32c(&offset).to_le_bytes());
    file.extend_from_slice(b"GBXEND\r\n");
    file
}

/// A new header with other JSON or another minor version.
pub fn header(minor: u16, json: &str) -> Vec<u8> {
    let mut out = b"\x89GBX\r\n\x1a\n\x01\0".to_vec();
    out.extend_from_slice(&minor.to_le_bytes());
    out.extend_from_slice(&(json.len() as u32).to_le_bytes());
    out.extend_from_slice(json.as_bytes());
    let checksum = crc32c::crc32c(&out);
    out.extend_from_slice(&checksum.to_le_bytes());
    out
}
