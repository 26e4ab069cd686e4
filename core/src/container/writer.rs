//! Writing containers.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

use xxhash_rust::xxh3::Xxh3;

use super::cover::Cover;
use super::record::{MAX_LANE_NAME, MAX_NUMBER, MAX_RUN_NAME, check_lanes, max_head, max_payload};
use super::sink::Sink;
use super::wire::{put_str, put_varint};
use super::{END_MAGIC, Header, MAGIC, RunInfo, SequenceInfo, VERSION, tag};
use crate::coder::checked_bytes;
use crate::ledger::{Account, Ledger, Section};
use crate::{
    DType, Elem, EncodedChunk, Error, ErrorKind, LaneCoding, LaneSpec, Limits, Pipeline, Result, ResultExt, Role,
    Shape, Stage,
};

/// A run that was added to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId(pub usize);

/// A sequence that was added to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub usize);

struct OpenSequence {
    info: SequenceInfo,
    /// Tokens whose chunks are still to come.
    missing: usize,
    cover: Cover,
    digest: Xxh3,
}

/// Writes a container front to back; nothing is ever rewritten.
///
/// It refuses what [`Container::open`](super::Container::open) would refuse under the default [`Limits`].
///
/// Call [`ContainerWriter::finish`]: a container without its end is readable only by [`Container::recover`](super::Container::recover).
pub struct ContainerWriter<W: Sink> {
    out: W,
    written: u64,
    ledger: Ledger,
    /// Tag and length of every record.
    index: Vec<u8>,
    runs: usize,
    sequences: Vec<OpenSequence>,
    /// Run, layer and role of every sequence.
    places: BTreeSet<(RunId, u32, Role)>,
    lanes: BTreeMap<(String, u8, u8), u64>,
    /// Scratch of the record that is being made.
    head: Vec<u8>,
    record: Vec<u8>,
}

impl<W: Sink> ContainerWriter<W> {
    /// Starts a container: magic, version, the resolved pipeline and its trained models.
    ///
    /// # Errors
    /// [`ErrorKind::LimitExceeded`] if pipeline or models are too large; [`ErrorKind::Io`] if `out` fails.
    pub fn new(out: W, pipeline: &Pipeline) -> Result<Self> {
        let mut writer = Self {
            out,
            written: 0,
            ledger: Ledger::default(),
            index: Vec::new(),
            runs: 0,
            sequences: Vec::new(),
            places: BTreeSet::new(),
            lanes: BTreeMap::new(),
            head: Vec::new(),
            record: Vec::new(),
        };
        let header = Header {
            writer: concat!("gearbox ", env!("CARGO_PKG_VERSION")).to_owned(),
            pipeline: pipeline.spec().clone(),
            plugins: pipeline.plugins().to_vec(),
        };
        let json = serde_json::to_vec(&header).map_err(|error| Error::invalid_config(error.to_string()))?;
        check_limit("bytes of the header", json.len(), Limits::default().header)?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.0.to_le_bytes());
        bytes.extend_from_slice(&VERSION.1.to_le_bytes());
        bytes.extend_from_slice(&(json.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&json);
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        writer.put(&bytes)?;
        writer.ledger.add(Section::FileHeader, bytes.len());
        for (slot, artifact) in pipeline.artifacts() {
            check_limit("codec number", slot, MAX_NUMBER)?;
            put_varint(&mut writer.head, slot as u64);
            put_payload(&mut writer.head, &artifact.0);
            let len = writer.put_record(tag::ARTIFACT, artifact.0.as_slice().into())?;
            writer.ledger.add(Section::Artifact, len);
        }
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.out.put(bytes).map_err(|error| failed(&error))
    }

    fn put_payload(&mut self, payload: Cow<'_, [u8]>) -> Result<()> {
        match payload {
            Cow::Borrowed(bytes) => self.put(bytes),
            Cow::Owned(bytes) => {
                self.written += bytes.len() as u64;
                self.out.give(bytes).map_err(|error| failed(&error))
            }
        }
    }

    /// Writes `self.head` and a payload as one record; returns its length.
    fn put_record(&mut self, tag: u8, payload: Cow<'_, [u8]>) -> Result<usize> {
        let limits = Limits::default();
        let mut head = std::mem::take(&mut self.head);
        check_limit("bytes of a record head", head.len(), max_head(tag, &limits).unwrap_or(0))?;
        if tag != tag::CHUNK {
            check_limit("bytes of a payload", payload.len(), max_payload(tag, &limits))?;
        }
        self.record.clear();
        self.record.push(tag);
        put_varint(&mut self.record, head.len() as u64);
        self.record.append(&mut head);
        self.head = head;
        let checksum = crc32c::crc32c(&self.record);
        self.record.extend_from_slice(&checksum.to_le_bytes());
        let record = std::mem::take(&mut self.record);
        let len = record.len() + payload.len();
        let written = self.put(&record).and_then(|()| self.put_payload(payload));
        self.record = record;
        written?;
        self.index.push(tag);
        put_varint(&mut self.index, len as u64);
        Ok(len)
    }

    /// Adds a request.
    ///
    /// # Errors
    /// [`ErrorKind::LimitExceeded`] if its name has more than 4096 bytes or there are too many token ids; [`ErrorKind::ShapeMismatch`]
    /// if spans of token ids overlap or are not ascending; [`ErrorKind::Io`] if the output fails.
    pub fn add_run(&mut self, run: &RunInfo) -> Result<RunId> {
        check_limit("bytes of a run name", run.name.len(), MAX_RUN_NAME)?;
        let mut end = 0;
        for (start, ids) in &run.tokens {
            end = next_end(end, *start, ids.len())?;
        }
        let rope = match &run.rope {
            Some(rope) => serde_json::to_string(rope).map_err(|error| Error::invalid_config(error.to_string()))?,
            None => String::new(),
        };
        put_varint(&mut self.head, self.runs as u64);
        put_str(&mut self.head, &run.name);
        put_str(&mut self.head, &rope);
        put_varint(&mut self.head, run.tokens.len() as u64);
        let mut tokens = Vec::new();
        for (start, ids) in &run.tokens {
            put_varint(&mut self.head, *start);
            put_varint(&mut self.head, ids.len() as u64);
            for id in ids {
                put_varint(&mut tokens, u64::from(*id));
            }
        }
        put_payload(&mut self.head, &tokens);
        let len = self.put_record(tag::RUN, tokens.into())?;
        self.ledger.add(Section::Run, len);
        self.runs += 1;
        Ok(RunId(self.runs - 1))
    }

    /// Adds a sequence of a run; its chunks follow in the order of their tokens.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`] if its run was not added, the run has a sequence of this layer and role already, or its entries
    /// overlap or are not ascending; [`ErrorKind::LimitExceeded`] if a token or the list of entries is too large;
    /// [`ErrorKind::Io`] if the output fails.
    pub fn add_sequence(&mut self, info: SequenceInfo) -> Result<SequenceId> {
        let id = self.sequences.len();
        let place = (info.run, info.layer, info.role);
        if info.run.0 >= self.runs {
            return Err(Error::shape(format!("run {} was not added", info.run.0)));
        }
        if self.places.contains(&place) {
            return Err(Error::shape(format!(
                "run {}, layer {}, {} has a sequence already",
                info.run.0, info.layer, info.role
            )));
        }
        checked_bytes(info.shape(1), info.dtype.size(), &Limits::default())?;
        let mut end = 0;
        for entry in &info.entries {
            end = next_end(end, entry.span.start, entry.span.seq)?;
        }
        for value in [id as u64, info.run.0 as u64, u64::from(info.layer)] {
            put_varint(&mut self.head, value);
        }
        self.head.extend_from_slice(&[info.role as u8, dtype_code(info.dtype)]);
        for value in [info.heads, info.dim, info.entries.len()] {
            put_varint(&mut self.head, value as u64);
        }
        let mut end = 0;
        for entry in &info.entries {
            put_varint(&mut self.head, entry.span.start - end);
            put_varint(&mut self.head, entry.span.seq as u64);
            self.head.push(stage_code(entry.stage));
            end = entry.span.start + entry.span.seq as u64;
        }
        let len = self.put_record(tag::SEQUENCE, (&[]).into())?;
        self.ledger.add_to(account(Section::Sequence, &info), len);
        self.places.insert(place);
        let (missing, cover) = (info.seq(), Cover::new(&info.entries));
        self.sequences.push(OpenSequence { info, missing, cover, digest: Xxh3::new() });
        Ok(SequenceId(id))
    }

    /// Number of a lane in the lane table; 0 is the tensor itself.
    fn lane_id(&mut self, spec: &LaneSpec, tensor: &LaneSpec) -> Result<u64> {
        if spec == tensor {
            return Ok(0);
        }
        let (code, width) = elem_code(spec.elem);
        let key = (spec.name.clone().into_owned(), code, width);
        if let Some(id) = self.lanes.get(&key) {
            return Ok(*id);
        }
        check_limit("lane number", self.lanes.len() + 1, MAX_NUMBER)?;
        let id = self.lanes.len() as u64 + 1;
        put_varint(&mut self.head, id);
        self.head.extend_from_slice(&[code, width]);
        put_str(&mut self.head, &spec.name);
        let len = self.put_record(tag::LANE, (&[]).into())?;
        self.ledger.add(Section::LaneTable, len);
        self.lanes.insert(key, id);
        Ok(id)
    }

    /// Adds the next chunk of a sequence. `decoded` is the tensor that decoding gives; its digest is stored.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`] if the chunk does not hold the next tokens of its sequence or crosses a gap, its lanes do not make
    /// up its bytes, or `decoded` has another length; [`ErrorKind::LimitExceeded`] if chunk, lanes or lane names are too large;
    /// [`ErrorKind::Io`] if the output fails.
    pub fn add_chunk(
        &mut self,
        sequence: SequenceId,
        first_token: u64,
        seq: usize,
        chunk: EncodedChunk,
        decoded: &[u8],
    ) -> Result<()> {
        let open = self
            .sequences
            .get_mut(sequence.0)
            .ok_or_else(|| Error::shape(format!("sequence {} was not added", sequence.0)))?;
        let info = &open.info;
        let place = || format!("chunk of sequence {} (layer {}, {})", sequence.0, info.layer, info.role);
        let tensor = LaneSpec::tensor(info.dtype, info.shape(seq));
        check_chunk(&chunk, &tensor).context(place)?;
        if decoded.len() != tensor.byte_len() {
            return Err(Error::shape(format!("expected {} decoded bytes, got {}", tensor.byte_len(), decoded.len())));
        }
        open.cover.take(first_token, seq, false).map_err(Error::shape).context(place)?;
        open.missing -= seq;
        open.digest.update(decoded);
        let (layer, role) = (info.layer, info.role);
        let ids: Vec<_> = chunk.lanes.iter().map(|lane| self.lane_id(&lane.spec, &tensor)).collect::<Result<_>>()?;
        for value in [sequence.0 as u64, first_token, seq as u64] {
            put_varint(&mut self.head, value);
        }
        let fixed = self.head.len();
        put_varint(&mut self.head, chunk.lanes.len() as u64);
        for (lane, id) in chunk.lanes.iter().zip(ids) {
            put_varint(&mut self.head, id << 1 | u64::from(lane.coding == LaneCoding::Stored));
            if id != 0 {
                let Shape { seq, heads, dim } = lane.spec.shape;
                for extent in [seq, heads, dim] {
                    put_varint(&mut self.head, extent as u64);
                }
            }
            put_payload(&mut self.head, &chunk.bytes[lane.range.clone()]);
        }
        let lanes_len = self.head.len() - fixed;
        let payload = chunk.bytes.len();
        let len = self.put_record(tag::CHUNK, chunk.bytes.into())?;
        let place = |section, lane| Account { section, layer: Some(layer), role: Some(role), lane };
        self.ledger.add_to(place(Section::LaneHeader, None), lanes_len);
        self.ledger.add_to(place(Section::ChunkHeader, None), len - payload - lanes_len);
        for lane in chunk.lanes {
            self.ledger.add_to(place(Section::Payload, Some(lane.spec.name.into_owned())), lane.range.len());
        }
        Ok(())
    }

    /// Writes digests, index and end, and returns the output with the ledger of all that was written.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`] if chunks of a sequence are missing; [`ErrorKind::Io`] if the output fails.
    pub fn finish(mut self) -> Result<(W, Ledger)> {
        for (id, open) in std::mem::take(&mut self.sequences).iter().enumerate() {
            if open.missing > 0 {
                return Err(Error::shape(format!("sequence {id}: chunks of {} tokens are missing", open.missing)));
            }
            put_varint(&mut self.head, id as u64);
            self.head.extend_from_slice(&open.digest.digest128().to_le_bytes());
            let len = self.put_record(tag::DIGEST, (&[]).into())?;
            self.ledger.add_to(account(Section::Sequence, &open.info), len);
        }
        let offset = self.written;
        let index = std::mem::take(&mut self.index);
        put_payload(&mut self.head, &index);
        let len = self.put_record(tag::INDEX, index.into())?;
        let mut trailer = offset.to_le_bytes().to_vec();
        trailer.extend_from_slice(&crc32c::crc32c(&trailer).to_le_bytes());
        trailer.extend_from_slice(&END_MAGIC);
        self.put(&trailer)?;
        self.ledger.add(Section::Index, len + trailer.len());
        self.out.end().map_err(|error| failed(&error))?;
        Ok((self.out, self.ledger))
    }
}

fn failed(error: &io::Error) -> Error {
    Error::new(ErrorKind::Io, error.to_string())
}

fn check_limit(what: &str, value: usize, limit: usize) -> Result<()> {
    if value <= limit {
        return Ok(());
    }
    Err(Error::limit(format!("{what}: {value}, the limit is {limit}")))
}

/// The end of `len` tokens from `start` on, which must not begin before `end`, where the previous ones stop.
fn next_end(end: u64, start: u64, len: usize) -> Result<u64> {
    if start < end {
        return Err(Error::shape(format!(
            "entry at token {start} starts before token {end}, where the previous one ends"
        )));
    }
    let stop = start.checked_add(len as u64);
    stop.ok_or_else(|| Error::shape(format!("{len} tokens from token {start} on: the position overflows")))
}

/// Checks that a reader will accept a chunk.
fn check_chunk(chunk: &EncodedChunk, tensor: &LaneSpec) -> Result<()> {
    let limits = Limits::default();
    checked_bytes(tensor.shape, tensor.elem.size(), &limits)?;
    check_limit("number of lanes", chunk.lanes.len(), limits.lanes)?;
    let mut end = 0;
    for lane in &chunk.lanes {
        if lane.range.start != end || lane.range.end < end {
            return Err(Error::shape(format!("{}: expected bytes from {end} on, got {:?}", lane.spec, lane.range)));
        }
        check_limit("bytes of a lane name", lane.spec.name.len(), MAX_LANE_NAME)?;
        end = lane.range.end;
    }
    if end != chunk.bytes.len() {
        return Err(Error::shape(format!("lanes of {end} bytes, the chunk has {}", chunk.bytes.len())));
    }
    let lanes = chunk.lanes.iter().map(|lane| (&lane.spec, lane.coding, lane.range.len()));
    check_lanes(lanes, &limits).map_err(|error| match error.kind() {
        // Here the caller is at fault, not stored data.
        ErrorKind::Corrupt => Error::shape(error.to_string()),
        _ => error,
    })
}

/// Length and checksum of a payload.
fn put_payload(head: &mut Vec<u8>, payload: &[u8]) {
    put_varint(head, payload.len() as u64);
    head.extend_from_slice(&crc32c::crc32c(payload).to_le_bytes());
}

pub(super) fn account(section: Section, info: &SequenceInfo) -> Account {
    Account { section, layer: Some(info.layer), role: Some(info.role), lane: None }
}

fn dtype_code(dtype: DType) -> u8 {
    elem_code(dtype.into()).0
}

fn elem_code(elem: Elem) -> (u8, u8) {
    match elem {
        Elem::F16 => (0, 0),
        Elem::Bf16 => (1, 0),
        Elem::F32 => (2, 0),
        Elem::U8 => (3, 0),
        Elem::U16 => (4, 0),
        Elem::U32 => (5, 0),
        Elem::Bits(width) => (6, width),
    }
}

fn stage_code(stage: Stage) -> u8 {
    match stage {
        Stage::Prefill => 0,
        Stage::Decode => 1,
        Stage::Unknown => 2,
    }
}
