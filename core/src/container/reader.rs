//! Reading containers, whole or damaged.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::cover::Cover;
use super::record::{ChunkHead, FIRST, Head, Payload, Record, check_crc, check_lanes, read_tokens};
use super::wire::Cursor;
use super::writer::account;
use super::{END_MAGIC, Header, MAGIC, ReadAt, RunId, RunInfo, SequenceInfo, TRAILER, VERSION, tag};
use crate::coder::checked_bytes;
use crate::ledger::{Account, Ledger, Section};
use crate::{
    Artifact, ChunkMut, Context, Elem, Error, LaneSpec, Limits, Pipeline, Pool, Registry, Result, ResultExt, Role,
    StoredLane,
};

/// Bytes that the long heads which turn out to be damaged may cost in a recovery, besides the size of the file.
const DAMAGED_HEADS: u64 = 64 << 20;

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
    cover: Cover,
}

/// A damaged stretch of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Bytes of the file that could not be read; empty, at the end of the file, for what is missing.
    pub range: Range<u64>,
    /// What is wrong there.
    pub message: String,
}

/// A container that was opened: everything but the payloads is read and checked.
#[derive(Debug)]
pub struct Container<S> {
    source: S,
    size: u64,
    limits: Limits,
    version: (u16, u16),
    header: Header,
    /// Whether numbers and chunks may be left out, because records are lost.
    recovered: bool,
    runs: BTreeMap<usize, RunInfo>,
    sequences: BTreeMap<usize, StoredSequence>,
    /// Run, layer and role of every sequence.
    places: BTreeSet<(RunId, u32, Role)>,
    lanes: BTreeMap<usize, (String, Elem)>,
    artifacts: BTreeMap<usize, Artifact>,
    ledger: Ledger,
    /// Payloads that are being decoded.
    payloads: Pool<Vec<u8>>,
}

impl<S: ReadAt> Container<S> {
    /// Opens a complete container.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) or [`ErrorKind::LimitExceeded`](crate::ErrorKind::LimitExceeded), naming the
    /// record, if anything but the payload of a chunk is damaged; [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if a newer
    /// version wrote it.
    pub fn open(source: S, limits: &Limits) -> Result<Self> {
        let (mut container, start) = Self::read_header(source, limits)?;
        let index_offset = container.read_trailer(start)?;
        let index = container.index(start, index_offset)?;
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
            if !tag::ALL.contains(&tag) {
                return Err(container.unknown_tag(tag).context(place()));
            }
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
        if let Some(missing) = container.missing().into_iter().next() {
            return Err(Error::corrupt(missing));
        }
        Ok(container)
    }

    /// Walks a container whose end is missing or damaged and keeps every record that is whole.
    ///
    /// Says where bytes are damaged, and what is missing.
    ///
    /// # Errors
    /// As [`Container::open`] if the header itself is damaged: without the pipeline nothing can be decoded.
    pub fn recover(source: S, limits: &Limits) -> Result<(Self, Vec<Damage>)> {
        let (mut container, start) = Self::read_header(source, limits)?;
        container.recovered = true;
        let size = container.size;
        let mut damage: Vec<Damage> = Vec::new();
        let (end, promised) = match container.read_trailer(start) {
            Ok(index) => {
                container.ledger.add(Section::Index, TRAILER as usize);
                (size - TRAILER, Some(index))
            }
            Err(error) => {
                damage.push(Damage { range: size..size, message: error.to_string() });
                (size, None)
            }
        };
        let mut budget = size.saturating_add(DAMAGED_HEADS);
        let mut found = None;
        let mut offset = start;
        while offset < end {
            let (next, result) = match Record::read(&container.source, offset, end, limits, &mut budget) {
                Ok(record) => (record.end(), container.keep(&record, &mut found)),
                Err(error) => (container.next_record(offset + 1, end, &mut budget)?, Err(error)),
            };
            if let Err(error) = result {
                damage.push(Damage { range: offset..next, message: error.to_string() });
            }
            offset = next;
        }
        if let Some(promised) = promised
            && found != Some(promised)
        {
            let found = found.map_or_else(|| "none".into(), |at| format!("one at byte {at}"));
            let message = format!("expected an index at byte {promised}, got {found}: bytes are missing or added");
            damage.push(Damage { range: size..size, message });
        }
        let missing = container.missing().into_iter();
        damage.extend(missing.map(|message| Damage { range: size..size, message }));
        damage.sort_by_key(|damage| damage.range.start);
        Ok((container, damage))
    }

    /// Adds a record of a damaged file; `index` is where the index was found.
    fn keep(&mut self, record: &Record, index: &mut Option<u64>) -> Result<()> {
        let Head::Index(payload) = record.head else { return self.add(record) };
        self.payload(record, payload)?;
        if index.replace(record.offset).is_some() {
            return Err(Error::corrupt("the index is there twice"));
        }
        self.ledger.add(Section::Index, record.len());
        Ok(())
    }

    /// The first byte at which a whole record begins, or `end`.
    fn next_record(&self, mut from: u64, end: u64, budget: &mut u64) -> Result<u64> {
        let mut window = Vec::new();
        // Most damage is short; windows double from a small one on.
        let mut size = 4 * FIRST;
        while from < end {
            let len = size.min(usize::try_from(end - from).unwrap_or(usize::MAX));
            window.resize(len, 0);
            self.source.read_at(from, &mut window)?;
            size = (2 * size).min(1 << 16);
            // Every start is tried with all of its first bytes in the window; the last ones are left to the next window.
            let starts = if from + len as u64 == end { len } else { len - FIRST };
            for at in (0..starts).filter(|at| tag::ALL.contains(&window[*at])) {
                let first = &window[at..len.min(at + FIRST)];
                let offset = from + at as u64;
                if Record::parse(&self.source, first, offset, end, &self.limits, budget).is_ok() {
                    return Ok(offset);
                }
            }
            from += starts as u64;
        }
        Ok(end)
    }

    fn record(&self, offset: u64, end: u64) -> Result<Record> {
        let mut unlimited = u64::MAX;
        Record::read(&self.source, offset, end, &self.limits, &mut unlimited)
    }

    /// The payload of a record that has one checksum for all of it.
    fn payload(&self, record: &Record, payload: Payload) -> Result<Vec<u8>> {
        let mut bytes = vec![0; payload.len];
        self.source.read_at(record.payload_offset(), &mut bytes)?;
        check_crc(&bytes, payload.checksum)?;
        Ok(bytes)
    }

    fn unknown_tag(&self, tag: u8) -> Error {
        let tag = char::from(tag).escape_default();
        if self.version <= VERSION {
            return Error::corrupt(format!("`{tag}` is not the tag of a record"));
        }
        Error::unsupported(format!(
            "record `{tag}` is of container version {}.{}, this program reads {}.{}",
            self.version.0, self.version.1, VERSION.0, VERSION.1
        ))
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
            let header = serde_json::from_slice(&checked[fixed..]);
            Ok((version, header.map_err(|error| Error::corrupt(format!("header JSON: {error}")))?))
        };
        let (version, header) = read().context(|| "file header".into())?;
        let mut ledger = Ledger::default();
        ledger.add(Section::FileHeader, bytes.len());
        let container = Self {
            source,
            size,
            limits: *limits,
            version,
            header,
            recovered: false,
            runs: BTreeMap::new(),
            sequences: BTreeMap::new(),
            places: BTreeSet::new(),
            lanes: BTreeMap::new(),
            artifacts: BTreeMap::new(),
            ledger,
            payloads: Pool::default(),
        };
        Ok((container, bytes.len() as u64))
    }

    /// Offset of the index record, as the trailer says.
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
        Ok(offset)
    }

    /// The payload of the index record.
    fn index(&self, start: u64, offset: u64) -> Result<Vec<u8>> {
        let end = self.size - TRAILER;
        if !(start..=end).contains(&offset) {
            return Err(Error::corrupt(format!("the trailer points to byte {offset}, expected {start} to {end}")));
        }
        let read = || {
            let record = self.record(offset, end)?;
            match record.head {
                Head::Index(payload) if record.end() == end => self.payload(&record, payload),
                _ => Err(Error::corrupt("the trailer does not point to an index that ends where it begins")),
            }
        };
        read().context(|| "index".into())
    }

    /// Checks a record against all before it and keeps what it says. The ledger comes last: what is refused costs nothing.
    fn add(&mut self, record: &Record) -> Result<()> {
        match &record.head {
            Head::Run { id, name, rope, spans, payload } => {
                let payload = self.payload(record, *payload).context(|| "token ids".into())?;
                let tokens = read_tokens(spans, &payload).context(|| "token ids".into())?;
                let run = RunInfo { name: name.clone(), rope: rope.clone(), tokens };
                insert(&mut self.runs, *id, run, self.recovered, 0, "run")?;
                self.ledger.add(Section::Run, record.len());
            }
            Head::Sequence { id, info } => self.add_sequence(*id, info, record.len())?,
            Head::Lane { id, name, elem } => {
                insert(&mut self.lanes, *id, (name.clone(), *elem), self.recovered, 1, "lane")?;
                self.ledger.add(Section::LaneTable, record.len());
            }
            Head::Artifact { slot, payload } => {
                let payload = self.payload(record, *payload).context(|| "artifact".into())?;
                if self.artifacts.contains_key(slot) {
                    return Err(Error::corrupt(format!("the artifact of codec {slot} is there twice")));
                }
                self.artifacts.insert(*slot, Artifact(payload));
                self.ledger.add(Section::Artifact, record.len());
            }
            Head::Chunk(chunk) => self.add_chunk(record, chunk)?,
            Head::Digest { id, digest } => {
                let sequence = sequence_mut(&mut self.sequences, *id)?;
                if sequence.digest.is_some() {
                    return Err(Error::corrupt(format!("the digest of sequence {id} is there twice")));
                }
                sequence.digest = Some(*digest);
                self.ledger.add_to(account(Section::Sequence, &sequence.info), record.len());
            }
            Head::Index(_) => return Err(Error::corrupt("unexpected record `I`")),
        }
        Ok(())
    }

    fn add_sequence(&mut self, id: usize, info: &SequenceInfo, len: usize) -> Result<()> {
        let run = info.run.0;
        if !self.runs.contains_key(&run) {
            return Err(Error::corrupt(format!("sequence {id} belongs to run {run}, which is missing")));
        }
        let place = (info.run, info.layer, info.role);
        if self.places.contains(&place) {
            return Err(Error::corrupt(format!(
                "sequence {id}: run {run}, layer {}, {} has one already",
                info.layer, info.role
            )));
        }
        let sequence = StoredSequence {
            info: info.clone(),
            digest: None,
            chunks: Vec::new(),
            missing: info.seq(),
            cover: Cover::new(&info.entries),
        };
        insert(&mut self.sequences, id, sequence, self.recovered, 0, "sequence")?;
        self.places.insert(place);
        self.ledger.add_to(account(Section::Sequence, info), len);
        Ok(())
    }

    fn add_chunk(&mut self, record: &Record, chunk: &ChunkHead) -> Result<()> {
        let id = chunk.sequence;
        let StoredSequence { info, chunks, missing, cover, .. } = sequence_mut(&mut self.sequences, id)?;
        let (layer, role) = (Some(info.layer), Some(info.role));
        let number = chunks.len();
        let describe = || format!("chunk {number} of sequence {id} (layer {}, {})", info.layer, info.role);
        let specs = lane_specs(&self.lanes, chunk, info, &self.limits).context(describe)?;
        let taken = cover.take(chunk.first_token, chunk.seq, self.recovered);
        taken.map_err(Error::corrupt).context(describe)?;
        *missing -= chunk.seq;
        chunks.push(StoredChunk { first_token: chunk.first_token, seq: chunk.seq, offset: record.offset });
        let account = |section, lane| Account { section, layer, role, lane };
        self.ledger.add_to(account(Section::LaneHeader, None), chunk.lanes_len);
        let rest = record.len() - record.payload_len - chunk.lanes_len;
        self.ledger.add_to(account(Section::ChunkHeader, None), rest);
        for (spec, lane) in specs.into_iter().zip(&chunk.lanes) {
            self.ledger.add_to(account(Section::Payload, Some(spec.name.into_owned())), lane.len);
        }
        Ok(())
    }

    /// What a whole container would have besides what is there.
    fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        let mut count = |what: &str, last: Option<usize>, first: usize, len: usize| {
            let expected = last.map_or(0, |last| (last - first).saturating_add(1));
            if expected > len {
                missing.push(format!("{} of {expected} {what} are missing", expected - len));
            }
        };
        count("runs", self.runs.keys().last().copied(), 0, self.runs.len());
        count("sequences", self.sequences.keys().last().copied(), 0, self.sequences.len());
        count("lanes of the lane table", self.lanes.keys().last().copied(), 1, self.lanes.len());
        for sequence in self.sequences.values() {
            let mut lacks = Vec::new();
            if sequence.missing > 0 {
                lacks.push(format!("{} of {} tokens are missing", sequence.missing, sequence.info.seq()));
            }
            if sequence.digest.is_none() {
                lacks.push("the digest is missing".into());
            }
            if !lacks.is_empty() {
                missing.push(format!("{}: {}", self.place(&sequence.info), lacks.join(", ")));
            }
        }
        missing
    }

    fn place(&self, info: &SequenceInfo) -> String {
        let run = self.run(info.run).map_or("?", |run| run.name.as_str());
        format!("run `{run}`, layer {}, {}", info.layer, info.role)
    }

    /// The JSON header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.size
    }

    /// Bytes of the original tensors of all sequences; saturates.
    pub fn original_bytes(&self) -> u64 {
        self.sequences().map(|sequence| sequence.info.original_bytes()).fold(0, u64::saturating_add)
    }

    /// A run by number.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) if it is missing, which only a damaged file can be.
    pub fn run(&self, id: RunId) -> Result<&RunInfo> {
        self.runs.get(&id.0).ok_or_else(|| Error::corrupt(format!("run {} is missing", id.0)))
    }

    /// All sequences that are there, in stored order.
    pub fn sequences(&self) -> impl Iterator<Item = &StoredSequence> {
        self.sequences.values()
    }

    /// Every stored byte by account; sums to the file size unless the file is damaged.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Builds the pipeline that wrote the container, with its trained models.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownPlugin`](crate::ErrorKind::UnknownPlugin) if a plugin is missing;
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if a plugin here is older than the one that wrote.
    pub fn pipeline(&self, registry: &Registry) -> Result<Pipeline> {
        for plugin in &self.header.plugins {
            let known = registry.get(&plugin.id).map_err(|error| match &plugin.library {
                Some(library) => {
                    Error::new(error.kind(), format!("`{}` is a plugin of {library}, which is not loaded", plugin.id))
                }
                None => error,
            })?;
            let known = known.format_version();
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
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt), naming run, layer, role, chunk and lane, if the stored bytes are damaged.
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
            let Head::Chunk(head) = &record.head else { return Err(Error::corrupt("not a chunk")) };
            let specs = lane_specs(&self.lanes, head, info, &self.limits)?;
            payload.resize(record.payload_len, 0);
            self.source.read_at(record.payload_offset(), payload)?;
            let mut rest = payload.as_slice();
            let mut lanes = Vec::with_capacity(specs.len());
            for (spec, lane) in specs.iter().zip(&head.lanes) {
                // The lanes make up the payload, so this never comes short.
                let (bytes, behind) = rest.split_at_checked(lane.len).unwrap_or_default();
                check_crc(bytes, lane.checksum).context(|| spec.to_string())?;
                lanes.push(StoredLane { spec, coding: lane.coding, bytes });
                rest = behind;
            }
            pipeline.coder(info.layer, info.role)?.decode(lanes, cx, &self.limits, out)
        };
        self.payloads.with(Vec::new, decode).context(|| format!("{}, chunk {number}", self.place(info)))
    }
}

/// Names, types and shapes of the lanes of a chunk, checked.
fn lane_specs(
    table: &BTreeMap<usize, (String, Elem)>,
    chunk: &ChunkHead,
    info: &SequenceInfo,
    limits: &Limits,
) -> Result<Vec<LaneSpec>> {
    let tensor = LaneSpec::tensor(info.dtype, info.shape(chunk.seq));
    checked_bytes(tensor.shape, tensor.elem.size(), limits)?;
    let spec = |number, shape| match shape {
        None => Ok(tensor.clone()),
        Some(shape) => match table.get(&number) {
            Some((name, elem)) => Ok(LaneSpec::new(name.clone(), *elem, shape)),
            None => Err(Error::corrupt(format!("lane number {number} is not in the lane table"))),
        },
    };
    let specs = chunk.lanes.iter().map(|lane| spec(lane.number, lane.shape)).collect::<Result<Vec<_>>>()?;
    check_lanes(specs.iter().zip(&chunk.lanes).map(|(spec, lane)| (spec, lane.coding, lane.len)), limits)?;
    Ok(specs)
}

fn sequence_mut(sequences: &mut BTreeMap<usize, StoredSequence>, id: usize) -> Result<&mut StoredSequence> {
    sequences.get_mut(&id).ok_or_else(|| Error::corrupt(format!("sequence {id} is missing")))
}

/// Puts a numbered record in place. Numbers are given out in order from `first` on; with `may_skip`, some may be lost.
fn insert<T>(
    list: &mut BTreeMap<usize, T>,
    id: usize,
    item: T,
    may_skip: bool,
    first: usize,
    what: &str,
) -> Result<()> {
    if list.contains_key(&id) {
        return Err(Error::corrupt(format!("{what} {id} is there twice")));
    }
    let next = list.len() + first;
    if !may_skip && id != next {
        return Err(Error::corrupt(format!("expected {what} {next}, got {id}")));
    }
    list.insert(id, item);
    Ok(())
}
