//! Records: the frame that all have in common, and what the head of each kind says.

use std::borrow::Cow;

use super::wire::Cursor;
use super::{EntryInfo, ReadAt, RunId, SequenceInfo, tag};
use crate::coder::{checked_bytes, stored_len};
use crate::{DType, Elem, Error, LaneCoding, LaneSpec, Limits, Result, ResultExt, Role, Rope, Shape, Span, Stage};

/// Bytes of the name of a lane.
pub(super) const MAX_LANE_NAME: usize = 255;
/// Bytes of the name of a run.
pub(super) const MAX_RUN_NAME: usize = 4096;
/// Numbers of lanes and of codecs.
pub(super) const MAX_NUMBER: usize = u16::MAX as usize;

/// Bytes of a record that are read at once: most heads are shorter, and only longer ones cost another read.
pub(super) const FIRST: usize = 256;

/// Bytes of the longest varint.
const VARINT: usize = 10;
const CRC: usize = 4;

/// Bytes that the head of a record can have; none if the tag is unknown.
pub(super) fn max_head(tag: u8, limits: &Limits) -> Option<usize> {
    let most = match tag {
        tag::RUN | tag::SEQUENCE => limits.record_head,
        tag::LANE => 2 * VARINT + 2 + MAX_LANE_NAME,
        tag::ARTIFACT | tag::INDEX => 2 * VARINT + CRC,
        tag::CHUNK => limits.lanes.saturating_mul(5 * VARINT + CRC).saturating_add(4 * VARINT),
        tag::DIGEST => VARINT + 16,
        _ => return None,
    };
    Some(most.min(limits.record_head))
}

/// Bytes that the payload of a record with one checksum can have.
pub(super) fn max_payload(tag: u8, limits: &Limits) -> usize {
    if tag == tag::INDEX { limits.index } else { limits.artifact }
}

/// Length and checksum of a payload that is read as a whole.
#[derive(Clone, Copy)]
pub(super) struct Payload {
    pub(super) len: usize,
    pub(super) checksum: u32,
}

/// A lane as the head of its chunk describes it.
pub(super) struct LaneHead {
    /// Number in the lane table, 0 for the tensor itself.
    pub(super) number: usize,
    pub(super) coding: LaneCoding,
    /// Shape, except for the tensor.
    pub(super) shape: Option<Shape>,
    pub(super) len: usize,
    pub(super) checksum: u32,
}

/// The head of a chunk.
pub(super) struct ChunkHead {
    pub(super) sequence: usize,
    pub(super) first_token: u64,
    pub(super) seq: usize,
    /// Bytes of the head from the number of lanes on.
    pub(super) lanes_len: usize,
    pub(super) lanes: Vec<LaneHead>,
}

/// What the head of a record says.
pub(super) enum Head {
    Run { id: usize, name: String, rope: Option<Rope>, spans: Vec<(u64, usize)>, payload: Payload },
    Sequence { id: usize, info: SequenceInfo },
    Lane { id: usize, name: String, elem: Elem },
    Artifact { slot: usize, payload: Payload },
    Chunk(ChunkHead),
    Digest { id: usize, digest: u128 },
    Index(Payload),
}

/// A record whose head is whole, and whose payload lies within the file.
pub(super) struct Record {
    pub(super) tag: u8,
    pub(super) head: Head,
    pub(super) offset: u64,
    /// Bytes before the payload.
    head_len: usize,
    pub(super) payload_len: usize,
}

impl Record {
    /// Reads the head of the record at `offset`, which must end at or before `end`.
    ///
    /// What heads longer than [`FIRST`] bytes cost is taken from `budget`, and given back if the record is whole.
    pub(super) fn read(source: &impl ReadAt, offset: u64, end: u64, limits: &Limits, budget: &mut u64) -> Result<Self> {
        let left = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut first = [0; FIRST];
        let first = &mut first[..FIRST.min(left)];
        source.read_at(offset, first)?;
        Self::parse(source, first, offset, end, limits, budget)
    }

    /// As [`Record::read`], with the first bytes at hand: [`FIRST`] of them, or all up to `end`.
    pub(super) fn parse(
        source: &impl ReadAt,
        first: &[u8],
        offset: u64,
        end: u64,
        limits: &Limits,
        budget: &mut u64,
    ) -> Result<Self> {
        let left = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut cursor = Cursor::new(first);
        let tag = cursor.u8()?;
        let most = max_head(tag, limits).ok_or_else(|| {
            Error::corrupt(format!("`{}` is not the tag of a record", char::from(tag).escape_default()))
        })?;
        let len = cursor.varint_max(most, "length of a record head")?;
        let start = cursor.pos();
        let head_len = len.saturating_add(start + CRC);
        if head_len > left {
            return Err(Error::corrupt(format!("expected {head_len} more bytes, {left} are left")));
        }
        let mut bytes = Cow::Borrowed(&first[..head_len.min(first.len())]);
        let cost = if head_len > first.len() { head_len as u64 } else { 0 };
        if cost > 0 {
            check_begin(tag, &first[start..]).context(|| "record head".into())?;
            *budget = budget.checked_sub(cost).ok_or_else(|| {
                Error::limit(format!("a record head of {head_len} bytes, too many long ones were damaged"))
            })?;
            let bytes = bytes.to_mut();
            bytes.resize(head_len, 0);
            source.read_at(offset + first.len() as u64, &mut bytes[first.len()..])?;
        }
        let (checked, checksum) = bytes.split_at(start + len);
        check_crc(checked, Cursor::new(checksum).u32()?).context(|| "record head".into())?;
        let (head, payload_len) = read_head(tag, &checked[start..], limits)?;
        if payload_len > left - head_len {
            return Err(Error::corrupt(format!("expected {payload_len} more bytes, {} are left", left - head_len)));
        }
        *budget += cost;
        Ok(Self { tag, head, offset, head_len, payload_len })
    }

    pub(super) fn len(&self) -> usize {
        self.head_len + self.payload_len
    }

    pub(super) fn end(&self) -> u64 {
        self.offset + self.len() as u64
    }

    pub(super) fn payload_offset(&self) -> u64 {
        self.offset + self.head_len as u64
    }
}

/// Checks that a long head can begin like this: in a damaged file, chance must not cost a checksum over megabytes.
fn check_begin(tag: u8, first: &[u8]) -> Result<()> {
    let mut cursor = Cursor::new(first);
    match tag {
        tag::SEQUENCE => read_place(&mut cursor).map(|_| ()),
        tag::RUN => {
            cursor.varint()?;
            let len = cursor.varint_max(MAX_RUN_NAME, "length of a run name")?;
            let name = cursor.take(len.min(cursor.remaining()))?;
            match std::str::from_utf8(name) {
                // The name may be cut within a character.
                Err(error) if error.error_len().is_some() || name.len() == len => {
                    Err(Error::corrupt(format!("run name is not UTF-8: {error}")))
                }
                Ok(_) if cursor.remaining() > VARINT && cursor.varint()? != 0 && cursor.u8()? != b'{' => {
                    Err(Error::corrupt("RoPE facts are not a JSON object"))
                }
                _ => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

pub(super) fn check_crc(bytes: &[u8], expected: u32) -> Result<()> {
    let got = crc32c::crc32c(bytes);
    if got == expected {
        return Ok(());
    }
    Err(Error::corrupt(format!("checksum differs: expected {expected:08x}, got {got:08x}")))
}

/// Checks what every chunk keeps to, whoever writes it: each lane and all together within the limits, a stored lane as long as its
/// packed form and a coded one shorter.
pub(super) fn check_lanes<'a>(
    lanes: impl Iterator<Item = (&'a LaneSpec, LaneCoding, usize)>,
    limits: &Limits,
) -> Result<()> {
    let mut total = 0usize;
    for (spec, coding, len) in lanes {
        let bytes = checked_bytes(spec.shape, spec.elem.size(), limits).context(|| spec.to_string())?;
        total = total.saturating_add(bytes);
        let stored = stored_len(spec);
        let error = match coding {
            _ if total > limits.lane => {
                Error::limit(format!("{total} bytes of lanes up to here, the limit is {}", limits.lane))
            }
            LaneCoding::Stored if len != stored => Error::corrupt(format!("expected {stored} stored bytes, got {len}")),
            LaneCoding::Codec if len >= stored => {
                Error::corrupt(format!("expected less than {stored} coded bytes, got {len}"))
            }
            _ => continue,
        };
        return Err(error.context(spec.to_string()));
    }
    Ok(())
}

/// What a head says, and the length of the payload behind it.
fn read_head(tag: u8, head: &[u8], limits: &Limits) -> Result<(Head, usize)> {
    let mut cursor = Cursor::new(head);
    let (head, len) = match tag {
        tag::RUN => read_run(&mut cursor, limits).context(|| "run".into())?,
        tag::SEQUENCE => (read_sequence(&mut cursor, limits).context(|| "sequence".into())?, 0),
        tag::LANE => {
            let id = cursor.varint_max(MAX_NUMBER, "lane number")?;
            if id == 0 {
                return Err(Error::corrupt("lane number 0 is the tensor itself"));
            }
            let elem = read_elem(&mut cursor)?;
            let name = cursor.str_max(MAX_LANE_NAME, "length of a lane name")?.to_owned();
            (Head::Lane { id, name, elem }, 0)
        }
        tag::ARTIFACT => {
            let slot = cursor.varint_max(MAX_NUMBER, "codec number")?;
            let payload = read_payload(&mut cursor, max_payload(tag, limits))?;
            (Head::Artifact { slot, payload }, payload.len)
        }
        tag::CHUNK => read_chunk(&mut cursor, limits).context(|| "chunk".into())?,
        tag::DIGEST => {
            let id = cursor.varint_max(usize::MAX, "sequence number")?;
            (Head::Digest { id, digest: cursor.u128()? }, 0)
        }
        tag::INDEX => {
            let payload = read_payload(&mut cursor, max_payload(tag, limits))?;
            (Head::Index(payload), payload.len)
        }
        _ => unreachable!("`max_head` knows the same tags"),
    };
    cursor.end()?;
    Ok((head, len))
}

fn read_payload(head: &mut Cursor<'_>, limit: usize) -> Result<Payload> {
    Ok(Payload { len: head.varint_max(limit, "length of a payload")?, checksum: head.u32()? })
}

fn read_run(head: &mut Cursor<'_>, limits: &Limits) -> Result<(Head, usize)> {
    let id = head.varint_max(usize::MAX, "run number")?;
    let name = head.str_max(MAX_RUN_NAME, "length of a run name")?.to_owned();
    let rope = match head.str_max(limits.record_head, "length of the RoPE facts")? {
        "" => None,
        json => Some(serde_json::from_str(json).map_err(|error| Error::corrupt(format!("RoPE facts: {error}")))?),
    };
    // A span takes at least two bytes, so the head bounds their number.
    let count = head.varint_max(head.remaining() / 2, "number of token spans")?;
    let mut spans = Vec::with_capacity(count);
    let (mut end, mut total) = (0u64, 0usize);
    for _ in 0..count {
        let start = head.varint()?;
        let ids = head.varint_max(limits.artifact, "number of token ids")?;
        if start < end {
            return Err(Error::corrupt(format!("token ids from token {start} on, expected {end} or later")));
        }
        end = start.checked_add(ids as u64).ok_or_else(|| Error::corrupt("position of a token overflows"))?;
        total = total.saturating_add(ids);
        spans.push((start, ids));
    }
    let payload = read_payload(head, limits.artifact)?;
    // A token id takes at least one byte.
    if total > payload.len {
        return Err(Error::corrupt(format!("{total} token ids in {} bytes", payload.len)));
    }
    Ok((Head::Run { id, name, rope, spans, payload }, payload.len))
}

/// The token ids of a run, from its payload.
pub(super) fn read_tokens(spans: &[(u64, usize)], payload: &[u8]) -> Result<Vec<(u64, Vec<u32>)>> {
    let mut cursor = Cursor::new(payload);
    let mut id = || u32::try_from(cursor.varint()?).map_err(|_| Error::corrupt("token id does not fit 32 bits"));
    let tokens = spans
        .iter()
        .map(|(start, count)| Ok((*start, (0..*count).map(|_| id()).collect::<Result<_>>()?)))
        .collect::<Result<_>>()?;
    cursor.end()?;
    Ok(tokens)
}

/// Number, run, layer, role and element type of a sequence.
fn read_place(head: &mut Cursor<'_>) -> Result<(usize, RunId, u32, Role, DType)> {
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
    Ok((id, run, layer, role, dtype))
}

fn read_sequence(head: &mut Cursor<'_>, limits: &Limits) -> Result<Head> {
    let (id, run, layer, role, dtype) = read_place(head)?;
    let heads = head.varint_max(limits.lane, "number of heads")?;
    let dim = head.varint_max(limits.lane, "channels per head")?;
    checked_bytes(Shape::new(1, heads, dim), dtype.size(), limits)?;
    // An entry takes at least three bytes, so the head bounds their number.
    let count = head.varint_max(head.remaining() / 3, "number of entries")?;
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
    Ok(Head::Sequence { id, info: SequenceInfo { run, layer, role, dtype, heads, dim, entries } })
}

fn read_chunk(head: &mut Cursor<'_>, limits: &Limits) -> Result<(Head, usize)> {
    let sequence = head.varint_max(usize::MAX, "sequence number")?;
    let first_token = head.varint()?;
    let seq = head.varint_max(usize::MAX, "tokens of a chunk")?;
    let lanes_len = head.remaining();
    let count = head.varint_max(limits.lanes, "number of lanes")?;
    let mut lanes = Vec::new();
    let mut total = 0usize;
    for _ in 0..count {
        let code = head.varint()?;
        let coding = if code & 1 == 1 { LaneCoding::Stored } else { LaneCoding::Codec };
        let number = usize::try_from(code >> 1).unwrap_or(usize::MAX);
        let mut extent = || head.varint_max(limits.lane, "extent of a lane");
        let shape = if number == 0 { None } else { Some(Shape::new(extent()?, extent()?, extent()?)) };
        let len = head.varint_max(limits.lane, "stored length")?;
        total = total.saturating_add(len);
        lanes.push(LaneHead { number, coding, shape, len, checksum: head.u32()? });
    }
    Ok((Head::Chunk(ChunkHead { sequence, first_token, seq, lanes_len, lanes }), total))
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
        _ => Err(Error::corrupt(format!("lane type {code} of width {width} is unknown"))),
    }
}
