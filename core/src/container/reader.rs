//! Reading containers, whole or damaged.

use std::ops::Range;

use super::wire::Cursor;
use super::{END_MAGIC, EntryInfo, Header, MAGIC, ReadAt, RunId, RunInfo, SequenceInfo, TRAILER, VERSION, tag};
use crate::coder::checked_bytes;
use crate::ledger::{Account, Ledger, Section};
use crate::{
    Artifact, ChunkMut, Context, DType, Elem, Error, ErrorKind, LaneCoding, LaneSpec, Limits, Pipeline, Pool, Registry,
    Result, ResultExt, Role, Shape, Span, Stage, StoredLane,
};

/// A chunk of a container: where it lies and which tokens it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredChunk {
    /// Position of the first token.
    pub first_token: u64,
    /// Number of tokens.
    pub seq: usize,
    /// Offset of its record in the file.
    pub offset: u64,
}

/// A sequence of a container with its chunks in order.
#[derive(Clone, Debug)]
pub struct StoredSequence {
    /// Run, layer, role, type, shape and entries.
    pub info: SequenceInfo,
    /// xxh3-128 of the decoded tensor, all chunks end to end; absent only in a damaged file.
    pub digest: Option<u128>,
    /// Chunks in the order of their tokens.
    pub chunks: Vec<StoredChunk>,
    /// Tokens for which there is no chunk; 0 unless the file is damaged.
    pub missing: usize,
}

/// A damaged stretch of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Bytes of the file that could not be read.
    pub range: Range<u64>,
    /// What is wrong there.
    pub message: String,
}

/// A lane of a chunk head: spec, coding, place of its bytes behind the head, checksum.
struct LaneHead {
    spec: LaneSpec,
    coding: LaneCoding,
    range: Range<usize>,
    checksum: u32,
}

/// A container that was opened: everything but the payloads is read and checked.
#[derive(Debug)]
pub struct Container<S> {
    source: S,
    size: u64,
    limits: Limits,
    header: Header,
    runs: Vec<Option<RunInfo>>,
    sequences: Vec<Option<StoredSequence>>,
    lanes: Vec<Option<(String, Elem)>>,
    artifacts: Vec<(usize, Artifact)>,
    ledger: Ledger,
    /// Payloads that are being decoded.
    payloads: Pool<Vec<u8>>,
}

impl<S: ReadAt> Container<S> {
    /// Opens a complete container.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] or [`ErrorKind::LimitExceeded`], naming the record, if anything but a payload is damaged;
    /// [`ErrorKind::Unsupported`] if a newer version wrote it.
    pub fn open(source: S, limits: &Limits) -> Result<Self> {
        let (mut container, start) = Self::read_header(source, limits)?;
        let index_offset = container.read_trailer(start)?;
        let index = container.index(index_offset)?;
        let mut offset = start;
        let mut cursor = Cursor::new(&index);
        while cursor.remaining() > 0 {
            let read = || {
                let tag = cursor.u8()?;
                let len = cursor.varint()?;
                let end = offset.checked_add(len).filter(|end| *end <= index_offset);
                let end = end.ok_or_else(|| {
                    Error::corrupt(format!("the index names a record of {len} bytes at byte {offset}"))
                })?;
                Ok((tag, end))
            };
            let (tag, end) = { read }().context(|| "index".into())?;
            let place = || format!("record at byte {offset}");
            let record = container.record(offset, end).context(place)?;
            if record.tag != tag || record.end() != end {
                return Err(Error::corrupt(format!(
                    "the index names a record `{}` that ends at byte {end}, got `{}` that ends at byte {}",
                    char::from(tag),
                    char::from(record.tag),
                    record.end()
                ))
                .context(place()));
            }
            container.add(&record).context(place)?;
            offset = end;
        }
        if offset != index_offset {
            return Err(Error::corrupt(format!(
                "the index covers the file up to byte {offset}, expected {index_offset}"
            )));
        }
        container.ledger.add(Section::Index, (container.size - index_offset) as usize);
        container.check_complete()?;
        Ok(container)
    }

    /// Walks a container whose end is missing or damaged and keeps every record that is whole.
    ///
    /// # Errors
    /// As [`Container::open`] if the header itself is damaged: without the pipeline nothing can be decoded.
    pub fn recover(source: S, limits: &Limits) -> Result<(Self, Vec<Damage>)> {
        let (mut container, start) = Self::read_header(source, limits)?;
        let mut damage: Vec<Damage> = Vec::new();
        let mut offset = start;
        let end = match container.read_trailer(start) {
            Ok(_) => container.size - TRAILER,
            Err(error) => {
                damage.push(Damage { range: container.size..container.size, message: error.to_string() });
                container.size
            }
        };
        while offset < end {
            let read = container.record(offset, end).and_then(|record| {
                if record.tag == tag::INDEX {
                    container.payload(&record)?;
                    container.ledger.add(Section::Index, record.len());
                } else {
                    container.add(&record)?;
                }
                Ok(record.end())
            });
            match read {
                Ok(next) => offset = next,
                Err(error) => {
                    let next = container.next_record(offset + 1, end)?;
                    damage.push(Damage { range: offset..next, message: error.to_string() });
                    offset = next;
                }
            }
        }
        damage.sort_by_key(|damage| damage.range.start);
        Ok((container, damage))
    }

    /// The first byte at which a whole record begins, or `end`.
    fn next_record(&self, mut from: u64, end: u64) -> Result<u64> {
        let mut window = vec![0; 1 << 16];
        while from < end {
            let len = window.len().min(usize::try_from(end - from).unwrap_or(usize::MAX));
            self.source.read_at(from, &mut window[..len])?;
            let tags = window[..len].iter().enumerate().filter(|(_, byte)| tag::ALL.contains(byte));
            if let Some((at, _)) = tags.into_iter().find(|(at, _)| self.record(from + *at as u64, end).is_ok()) {
                return Ok(from + at as u64);
            }
            from += len as u64;
        }
        Ok(end)
    }

    fn record(&self, offset: u64, end: u64) -> Result<Record> {
        Record::read(&self.source, offset, end, &self.limits)
    }

    /// The payload of a record that has one checksum for all of it.
    fn payload(&self, record: &Record) -> Result<Vec<u8>> {
        let mut payload = vec![0; record.payload_len];
        self.source.read_at(record.payload_offset(), &mut payload)?;
        record.checksum.map_or(Ok(()), |checksum| check_crc(&payload, checksum))?;
        Ok(payload)
    }

    fn read_header(source: S, limits: &Limits) -> Result<(Self, u64)> {
        let size = source.size()?;
        let fixed = 16.min(usize::try_from(size).unwrap_or(usize::MAX));
        let mut bytes = vec![0; fixed];
        source.read_at(0, &mut bytes)?;
        if bytes.get(..MAGIC.len()).is_none_or(|magic| magic != MAGIC) {
            return Err(Error::corrupt("not a Gearbox container: the first 8 bytes differ"));
        }
        let mut read = || {
            let mut cursor = Cursor::new(&bytes[MAGIC.len()..]);
            let version = (cursor.u16()?, cursor.u16()?);
            if version.0 != VERSION.0 {
                return Err(Error::unsupported(format!(
                    "container version {}.{}, this program reads {}.x",
                    version.0, version.1, VERSION.0
                )));
            }
            let len = cursor.u32()? as usize;
            if len > limits.header {
                return Err(Error::limit(format!("header of {len} bytes, the limit is {}", limits.header)));
            }
            if (fixed + len + 4) as u64 > size {
                return Err(Error::corrupt(format!("expected {} bytes, the file has {size}", fixed + len + 4)));
            }
            bytes.resize(fixed + len + 4, 0);
            source.read_at(fixed as u64, &mut bytes[fixed..])?;
            let (checked, checksum) = bytes.split_at(fixed + len);
            check_crc(checked, Cursor::new(checksum).u32()?)?;
            serde_json::from_slice(&checked[fixed..]).map_err(|error| Error::corrupt(format!("header JSON: {error}")))
        };
        let header = read().context(|| "file header".into())?;
        let mut ledger = Ledger::default();
        ledger.add(Section::FileHeader, bytes.len());
        let container = Self {
            source,
            size,
            limits: *limits,
            header,
            runs: Vec::new(),
            sequences: Vec::new(),
            lanes: Vec::new(),
            artifacts: Vec::new(),
            ledger,
            payloads: Pool::default(),
        };
        Ok((container, bytes.len() as u64))
    }

    /// Offset of the index record.
    fn read_trailer(&self, start: u64) -> Result<u64> {
        let cut = || Error::corrupt("the end of the file is missing: it was cut off or its writer was interrupted");
        let at = self.size.checked_sub(TRAILER).filter(|at| *at >= start).ok_or_else(cut)?;
        let mut bytes = [0; TRAILER as usize];
        self.source.read_at(at, &mut bytes)?;
        let mut cursor = Cursor::new(&bytes);
        let offset = cursor.u64()?;
        let checksum = cursor.u32()?;
        if cursor.take(END_MAGIC.len())? != END_MAGIC {
            return Err(cut());
        }
        check_crc(&bytes[..8], checksum).context(|| "trailer".into())?;
        if (start..=at).contains(&offset) {
            return Ok(offset);
        }
        Err(Error::corrupt(format!("the trailer points to byte {offset}, expected {start} to {at}")))
    }

    /// The payload of the index record.
    fn index(&self, offset: u64) -> Result<Vec<u8>> {
        let end = self.size - TRAILER;
        let read = || {
            let record = self.record(offset, end)?;
            if record.tag != tag::INDEX || record.end() != end {
                return Err(Error::corrupt("the trailer does not point to an index that ends where it begins"));
            }
            self.payload(&record)
        };
        read().context(|| "index".into())
    }

    fn add(&mut self, record: &Record) -> Result<()> {
        let mut head = Cursor::new(&record.head);
        match record.tag {
            tag::RUN => {
                let payload = self.payload(record)?;
                let (id, run) = read_run(&mut head, &payload, &self.limits).context(|| "run".into())?;
                put_at(&mut self.runs, id, run, "run")?;
                self.ledger.add(Section::Run, record.len());
            }
            tag::SEQUENCE => {
                let (id, info) = read_sequence(&mut head, &self.limits).context(|| "sequence".into())?;
                if self.runs.get(info.run.0).is_none_or(Option::is_none) {
                    return Err(Error::corrupt(format!(
                        "sequence {id} belongs to run {}, which is missing",
                        info.run.0
                    )));
                }
                self.ledger.add_to(super::writer::account(Section::Sequence, &info), record.len());
                let missing = info.seq();
                put_at(
                    &mut self.sequences,
                    id,
                    StoredSequence { info, digest: None, chunks: Vec::new(), missing },
                    "sequence",
                )?;
            }
            tag::LANE => {
                let id = head.varint_max(usize::from(u16::MAX), "lane number")?;
                let elem = read_elem(&mut head)?;
                let name = head.str()?.to_owned();
                head.end()?;
                let id = id.checked_sub(1).ok_or_else(|| Error::corrupt("lane number 0 is the tensor itself"))?;
                put_at(&mut self.lanes, id, (name, elem), "lane")?;
                self.ledger.add(Section::LaneTable, record.len());
            }
            tag::ARTIFACT => {
                let slot = head.varint_max(usize::from(u16::MAX), "codec number")?;
                let payload = self.payload(record)?;
                self.artifacts.push((slot, Artifact(payload)));
                self.ledger.add(Section::Artifact, record.len());
            }
            tag::CHUNK => self.add_chunk(record)?,
            tag::DIGEST => {
                let id = head.varint_max(usize::MAX, "sequence number")?;
                let digest = head.u128()?;
                head.end()?;
                let sequence = self.sequence_mut(id)?;
                sequence.digest = Some(digest);
                let account = super::writer::account(Section::Sequence, &sequence.info);
                self.ledger.add_to(account, record.len());
            }
            other => return Err(Error::corrupt(format!("unexpected record `{}`", char::from(other).escape_default()))),
        }
        Ok(())
    }

    fn add_chunk(&mut self, record: &Record) -> Result<()> {
        let mut head = Cursor::new(&record.head);
        let (id, chunk) = read_chunk(&mut head, record.offset)?;
        let fixed = head.pos();
        let sequence = self
            .sequences
            .get(id)
            .and_then(Option::as_ref)
            .ok_or_else(|| Error::corrupt(format!("sequence {id} is missing")))?;
        let info = &sequence.info;
        let describe =
            || format!("chunk {} of sequence {id} (layer {}, {})", sequence.chunks.len(), info.layer, info.role);
        if chunk.seq > sequence.missing {
            let left = sequence.missing;
            return Err(
                Error::corrupt(format!("{} tokens, {left} are left in the sequence", chunk.seq)).context(describe())
            );
        }
        let lanes = self.read_lanes(&mut head, info, chunk.seq).context(describe)?;
        let (layer, role) = (Some(info.layer), Some(info.role));
        let account = |section, lane| Account { section, layer, role, lane };
        let lanes_len = record.head.len() - fixed;
        self.ledger.add_to(account(Section::LaneHeader, None), lanes_len);
        self.ledger.add_to(account(Section::ChunkHeader, None), record.len() - record.payload_len - lanes_len);
        for lane in lanes {
            self.ledger.add_to(account(Section::Payload, Some(lane.spec.name.into_owned())), lane.range.len());
        }
        let sequence = self.sequence_mut(id)?;
        sequence.missing -= chunk.seq;
        sequence.chunks.push(chunk);
        Ok(())
    }

    /// Reads the lanes of a chunk head, whose fixed part is already consumed.
    fn read_lanes(&self, head: &mut Cursor<'_>, info: &SequenceInfo, seq: usize) -> Result<Vec<LaneHead>> {
        let count = head.varint_max(self.limits.lanes, "number of lanes")?;
        let mut lanes = Vec::with_capacity(count);
        let mut start = 0;
        for _ in 0..count {
            let code = head.varint()?;
            let coding = if code & 1 == 1 { LaneCoding::Stored } else { LaneCoding::Codec };
            let spec = if code >> 1 == 0 {
                LaneSpec::tensor(info.dtype, info.shape(seq))
            } else {
                let id = usize::try_from(code >> 1).unwrap_or(usize::MAX) - 1;
                let (name, elem) = self
                    .lanes
                    .get(id)
                    .and_then(Option::as_ref)
                    .ok_or_else(|| Error::corrupt(format!("lane number {} is not in the lane table", id + 1)))?;
                let mut extent = || head.varint_max(self.limits.lane, "extent of a lane");
                let shape = Shape::new(extent()?, extent()?, extent()?);
                LaneSpec::new(name.clone(), *elem, shape)
            };
            checked_bytes(spec.shape, spec.elem.size(), &self.limits).context(|| spec.to_string())?;
            let len =
                head.varint_max(self.limits.lane.saturating_mul(2), "stored length").context(|| spec.to_string())?;
            let checksum = head.u32()?;
            lanes.push(LaneHead { spec, coding, range: start..start + len, checksum });
            start += len;
        }
        head.end()?;
        Ok(lanes)
    }

    fn sequence_mut(&mut self, id: usize) -> Result<&mut StoredSequence> {
        self.sequences
            .get_mut(id)
            .and_then(Option::as_mut)
            .ok_or_else(|| Error::corrupt(format!("sequence {id} is missing")))
    }

    fn check_complete(&self) -> Result<()> {
        for (id, sequence) in self.sequences.iter().enumerate() {
            let Some(sequence) = sequence else { return Err(Error::corrupt(format!("sequence {id} is missing"))) };
            if sequence.missing > 0 {
                let expected = sequence.info.seq();
                let got = expected - sequence.missing;
                return Err(Error::corrupt(format!("sequence {id}: expected {expected} tokens, got {got}")));
            }
            if sequence.digest.is_none() {
                return Err(Error::corrupt(format!("sequence {id} has no digest")));
            }
        }
        Ok(())
    }

    /// The JSON header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.size
    }

    /// A run by number.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if it is missing, which only a damaged file can be.
    pub fn run(&self, id: RunId) -> Result<&RunInfo> {
        self.runs.get(id.0).and_then(Option::as_ref).ok_or_else(|| Error::corrupt(format!("run {} is missing", id.0)))
    }

    /// All sequences that are there, in stored order.
    pub fn sequences(&self) -> impl Iterator<Item = &StoredSequence> {
        self.sequences.iter().flatten()
    }

    /// Every stored byte by account; sums to the file size unless the file is damaged.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Builds the pipeline that wrote the container, with its trained models.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownPlugin`] if a plugin is missing; [`ErrorKind::Unsupported`] if a plugin here is older than the one that wrote.
    pub fn pipeline(&self, registry: &Registry) -> Result<Pipeline> {
        for plugin in &self.header.plugins {
            let known = registry.get(&plugin.id)?.format_version();
            if plugin.format_version > known {
                return Err(Error::unsupported(format!(
                    "written by `{}` format version {}, this program has version {known}",
                    plugin.id, plugin.format_version
                )));
            }
        }
        let mut pipeline = Pipeline::build(&self.header.pipeline, registry)?;
        for (slot, artifact) in &self.artifacts {
            pipeline.set_artifact(*slot, artifact.clone())?;
        }
        Ok(pipeline)
    }

    /// Decodes a chunk of one of the container's sequences into `out`.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], naming run, layer, role, chunk and lane, if the stored bytes are damaged.
    pub fn decode_chunk(
        &self,
        pipeline: &Pipeline,
        sequence: &StoredSequence,
        number: usize,
        cx: &Context<'_>,
        out: ChunkMut<'_>,
    ) -> Result<()> {
        let info = &sequence.info;
        let decode = |payload: &mut Vec<u8>| {
            let chunk = sequence.chunks.get(number);
            let chunk = chunk.ok_or_else(|| Error::shape(format!("there are {} chunks", sequence.chunks.len())))?;
            let record = self.record(chunk.offset, self.size)?;
            let mut head = Cursor::new(&record.head);
            read_chunk(&mut head, chunk.offset)?;
            let heads = self.read_lanes(&mut head, info, chunk.seq)?;
            payload.resize(record.payload_len, 0);
            self.source.read_at(record.payload_offset(), payload)?;
            for lane in &heads {
                check_crc(&payload[lane.range.clone()], lane.checksum).context(|| lane.spec.to_string())?;
            }
            let lanes = heads.iter().map(|lane| StoredLane {
                spec: &lane.spec,
                coding: lane.coding,
                bytes: &payload[lane.range.clone()],
            });
            pipeline.coder(info.layer, info.role)?.decode(lanes, cx, &self.limits, out)
        };
        self.payloads.with(Vec::new, decode).context(|| {
            let run = self.run(info.run).map_or("?", |run| run.name.as_str());
            format!("run `{run}`, layer {}, {}, chunk {number}", info.layer, info.role)
        })
    }
}

/// A record whose head is whole, and whose payload lies within the file.
struct Record {
    tag: u8,
    head: Vec<u8>,
    offset: u64,
    /// Bytes before the payload.
    head_len: usize,
    payload_len: usize,
    /// Checksum of the payload as a whole, for records that have one.
    checksum: Option<u32>,
}

impl Record {
    /// Reads the head of the record at `offset`, which must end at or before `end`.
    fn read(source: &impl ReadAt, offset: u64, end: u64, limits: &Limits) -> Result<Self> {
        // Most heads are shorter than this.
        const FIRST: usize = 256;
        let left = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; FIRST.min(left)];
        source.read_at(offset, &mut bytes)?;
        let mut cursor = Cursor::new(&bytes);
        let tag = cursor.u8()?;
        if !tag::ALL.contains(&tag) {
            return Err(Error::corrupt(format!("`{}` is not the tag of a record", char::from(tag).escape_default())));
        }
        let len = cursor.varint_max(limits.record_head, "length of a record head")?;
        let start = cursor.pos();
        let head_len = start + len + 4;
        if head_len > left {
            return Err(Error::corrupt(format!("expected {head_len} more bytes, {left} are left")));
        }
        if head_len > bytes.len() {
            let first = bytes.len();
            bytes.resize(head_len, 0);
            source.read_at(offset + first as u64, &mut bytes[first..])?;
        }
        let checksum = Cursor::new(&bytes[start + len..]).u32()?;
        check_crc(&bytes[..start + len], checksum).context(|| "record head".into())?;
        bytes.truncate(start + len);
        bytes.drain(..start);
        let (payload_len, checksum) = payload_len(tag, &bytes, limits)?;
        if payload_len > left - head_len {
            return Err(Error::corrupt(format!("expected {payload_len} more bytes, {} are left", left - head_len)));
        }
        Ok(Self { tag, head: bytes, offset, head_len, payload_len, checksum })
    }

    fn len(&self) -> usize {
        self.head_len + self.payload_len
    }

    fn end(&self) -> u64 {
        self.offset + self.len() as u64
    }

    fn payload_offset(&self) -> u64 {
        self.offset + self.head_len as u64
    }
}

/// Length of the payload behind a head; chunks have a checksum per lane instead of one for all.
fn payload_len(tag: u8, head: &[u8], limits: &Limits) -> Result<(usize, Option<u32>)> {
    let mut cursor = Cursor::new(head);
    match tag {
        tag::SEQUENCE | tag::LANE | tag::DIGEST => return Ok((0, None)),
        tag::ARTIFACT => {
            cursor.varint()?;
        }
        tag::RUN => {
            cursor.varint()?;
            cursor.str()?;
            cursor.str()?;
            for _ in 0..cursor.varint_max(head.len(), "number of token spans")? {
                cursor.varint()?;
                cursor.varint()?;
            }
        }
        tag::CHUNK => {
            read_chunk(&mut cursor, 0)?;
            let mut total = 0usize;
            for _ in 0..cursor.varint_max(limits.lanes, "number of lanes")? {
                if cursor.varint()? >> 1 != 0 {
                    for _ in 0..3 {
                        cursor.varint()?;
                    }
                }
                let len = cursor.varint_max(limits.lane.saturating_mul(2), "stored length")?;
                total = total.saturating_add(len);
                cursor.u32()?;
            }
            return Ok((total, None));
        }
        _ => {}
    }
    let limit = if tag == tag::INDEX { limits.index } else { limits.artifact };
    let len = cursor.varint_max(limit, "length of a payload")?;
    let checksum = cursor.u32()?;
    cursor.end()?;
    Ok((len, Some(checksum)))
}

fn check_crc(bytes: &[u8], expected: u32) -> Result<()> {
    let got = crc32c::crc32c(bytes);
    if got == expected {
        return Ok(());
    }
    Err(Error::corrupt(format!("checksum differs: expected {expected:08x}, got {got:08x}")))
}

/// Puts a numbered record in place; numbers are given out in order, so a gap can only be as long as what was lost.
fn put_at<T>(list: &mut Vec<Option<T>>, id: usize, item: T, what: &str) -> Result<()> {
    const GAP: usize = 1 << 16;
    if id > list.len() + GAP {
        return Err(Error::limit(format!("{what} number {id}, expected about {}", list.len())));
    }
    if list.len() <= id {
        list.resize_with(id + 1, || None);
    }
    if list[id].is_some() {
        return Err(Error::corrupt(format!("{what} {id} is there twice")));
    }
    list[id] = Some(item);
    Ok(())
}

fn read_run(head: &mut Cursor<'_>, payload: &[u8], limits: &Limits) -> Result<(usize, RunInfo)> {
    let id = head.varint_max(usize::MAX, "run number")?;
    let name = head.str()?.to_owned();
    let rope = head.str()?;
    let rope = match rope {
        "" => None,
        json => Some(serde_json::from_str(json).map_err(|error| Error::corrupt(format!("RoPE facts: {error}")))?),
    };
    let mut ids = Cursor::new(payload);
    let mut tokens = Vec::new();
    for _ in 0..head.varint_max(limits.record_head, "number of token spans")? {
        let start = head.varint()?;
        // A token id takes at least one byte, so the payload bounds their number.
        let count = head.varint_max(payload.len(), "number of tokens")?;
        if start.checked_add(count as u64).is_none() {
            return Err(Error::corrupt("position of a token overflows"));
        }
        let read = |ids: &mut Cursor<'_>| {
            u32::try_from(ids.varint()?).map_err(|_| Error::corrupt("token id does not fit 32 bits"))
        };
        tokens.push((start, (0..count).map(|_| read(&mut ids)).collect::<Result<Vec<_>>>()?));
    }
    ids.end()?;
    Ok((id, RunInfo { name, rope, tokens }))
}

fn read_sequence(head: &mut Cursor<'_>, limits: &Limits) -> Result<(usize, SequenceInfo)> {
    let id = head.varint_max(usize::MAX, "sequence number")?;
    let run = RunId(head.varint_max(usize::MAX, "run number")?);
    let layer = u32::try_from(head.varint()?).map_err(|_| Error::corrupt("layer does not fit 32 bits"))?;
    let role = match head.u8()? {
        0 => Role::Key,
        1 => Role::Value,
        other => return Err(Error::corrupt(format!("role {other}, expected 0 or 1"))),
    };
    let dtype = match head.u8()? {
        0 => DType::F16,
        1 => DType::Bf16,
        2 => DType::F32,
        other => return Err(Error::corrupt(format!("tensor type {other}, expected 0 to 2"))),
    };
    let heads = head.varint_max(limits.lane, "number of heads")?;
    let dim = head.varint_max(limits.lane, "channels per head")?;
    // An entry takes at least three bytes, so the head bounds their number.
    let count = head.varint_max(head.remaining(), "number of entries")?;
    let mut entries = Vec::with_capacity(count);
    let (mut end, mut total) = (0u64, 0usize);
    for _ in 0..count {
        let gap = head.varint()?;
        let seq = head.varint_max(usize::MAX, "tokens of an entry")?;
        let stage = match head.u8()? {
            0 => Stage::Prefill,
            1 => Stage::Decode,
            2 => Stage::Unknown,
            other => return Err(Error::corrupt(format!("stage {other}, expected 0 to 2"))),
        };
        let overflow = || Error::corrupt("position of a token overflows");
        let start = end.checked_add(gap).ok_or_else(overflow)?;
        end = start.checked_add(seq as u64).ok_or_else(overflow)?;
        total = total.checked_add(seq).ok_or_else(overflow)?;
        entries.push(EntryInfo { span: Span { start, seq }, stage });
    }
    head.end()?;
    Ok((id, SequenceInfo { run, layer, role, dtype, heads, dim, entries }))
}

fn read_chunk(head: &mut Cursor<'_>, offset: u64) -> Result<(usize, StoredChunk)> {
    let id = head.varint_max(usize::MAX, "sequence number")?;
    let first_token = head.varint()?;
    let seq = head.varint_max(usize::MAX, "tokens of a chunk")?;
    Ok((id, StoredChunk { first_token, seq, offset }))
}

fn read_elem(head: &mut Cursor<'_>) -> Result<Elem> {
    let (code, width) = (head.u8()?, head.u8()?);
    match (code, width) {
        (0, 0) => Ok(Elem::F16),
        (1, 0) => Ok(Elem::Bf16),
        (2, 0) => Ok(Elem::F32),
        (3, 0) => Ok(Elem::U8),
        (4, 0) => Ok(Elem::U16),
        (5, 0) => Ok(Elem::U32),
        (6, 1..=16) => Ok(Elem::Bits(width)),
        _ => Err(Error::new(ErrorKind::Corrupt, format!("lane type {code} of width {width} is unknown"))),
    }
}
