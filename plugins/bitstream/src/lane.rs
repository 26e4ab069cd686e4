//! Lanes: which streams they have, how each of them is stored, and the models that lanes share.

use std::collections::BTreeMap;

use gearbox_core::{Artifact, Elem, Error, LaneRef, LaneSpec, Pool, Result, ResultExt, Role, Sample};

use crate::counts::Counts;
use crate::model::Model;
use crate::symbols::{Field, SymbolBuffer, check_range};
use crate::wire::{Reader, put_number};

/// How a stream is stored: two bits of the first byte of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// As it is.
    Raw = 0,
    /// All symbols are equal: one of them.
    Constant = 1,
    /// Coded, with its model in front of it.
    Own = 2,
    /// Coded with the model of the artifact.
    Shared = 3,
}

impl Form {
    fn is_coded(self) -> bool {
        matches!(self, Self::Own | Self::Shared)
    }

    /// The form of stream `idx` in the first byte of a lane.
    fn of(forms: u8, idx: usize) -> Self {
        match forms >> (2 * idx) & 3 {
            0 => Self::Raw,
            1 => Self::Constant,
            2 => Self::Own,
            _ => Self::Shared,
        }
    }
}

/// Most bytes of a stored length.
const LENGTH_MOST: usize = 9;

/// Codes lanes; an object for every kind of model.
pub trait LaneCoder: std::fmt::Debug + Send + Sync {
    /// See [`Codec::max_encoded_len`](gearbox_core::Codec::max_encoded_len).
    fn max_encoded_len(&self, lane: &LaneSpec) -> usize;

    /// See [`Codec::encode`](gearbox_core::Codec::encode).
    fn encode(&self, lane: LaneRef<'_>, role: Role, out: &mut Vec<u8>) -> Result<()>;

    /// See [`Codec::decode`](gearbox_core::Codec::decode).
    fn decode(&self, encoded: &[u8], lane: &LaneSpec, role: Role, out: &mut [u8]) -> Result<()>;

    /// See [`Codec::train`](gearbox_core::Codec::train).
    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>>;
}

/// Codes lanes with one kind of model.
#[derive(Debug)]
pub struct Lanes<M> {
    shared: Shared<M>,
    scratch: Pool<Scratch<M>>,
}

/// Buffers of one lane.
#[derive(Debug, Default)]
struct Scratch<M> {
    symbols: SymbolBuffer,
    planes: SymbolBuffer,
    counts: Counts,
    own: M,
}

/// The models of an artifact: by element type and role, one per stream, none where a model does not pay.
#[derive(Debug)]
struct Shared<M>(BTreeMap<(u8, Role), Vec<Option<M>>>);

impl<M: Model> Lanes<M> {
    /// Without an artifact.
    pub fn new() -> Self {
        Self { shared: Shared(BTreeMap::new()), scratch: Pool::default() }
    }

    /// With the models of an artifact.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](gearbox_core::ErrorKind::Corrupt) if it is none.
    pub fn with_artifact(artifact: &[u8]) -> Result<Self> {
        let shared = Shared::load(artifact).context(|| "artifact".to_owned())?;
        Ok(Self { shared, scratch: Pool::default() })
    }

    /// Appends one stream and says how; `symbols` are those of the field.
    fn put_stream(
        symbols: &[u8],
        field: Field,
        shared: Option<&M>,
        (planes, counts, own): (&mut SymbolBuffer, &mut Counts, &mut M),
        out: &mut Vec<u8>,
    ) -> Result<Form> {
        let count = symbols.len() / field.symbol_size();
        let raw_len = field.raw_len(count);
        let start = out.len();
        counts.reset(field.bits);
        // Counting the many symbols of a mantissa takes longer than looking at some of them.
        if !M::REFERENCE && field.bits > 8 && count >= 2 * Counts::SAMPLE {
            if counts.is_noise(symbols) {
                planes.put_raw(symbols, field, out)?;
                return Ok(Form::Raw);
            }
            counts.reset(field.bits);
        }
        counts.add(symbols);
        let put_own = |own: &M, out: &mut Vec<u8>| {
            own.store(out);
            own.encode(symbols, out);
            Form::Own
        };
        if M::REFERENCE {
            if let Some(shared) = shared.filter(|shared| shared.encoded_len(counts).is_some()) {
                shared.encode(symbols, out);
                // A model of other lanes may fit so badly that no bound holds.
                if out.len() - start <= reference_len(field, count) {
                    return Ok(Form::Shared);
                }
                out.truncate(start);
            }
            own.learn(counts)?;
            return Ok(put_own(own, out));
        }

        if let Some(symbol) = counts.only_symbol() {
            out.extend_from_slice(&symbol.to_le_bytes()[..field.symbol_size()]);
            return Ok(Form::Constant);
        }
        // Less than a hundredth of a stream is not worth the time that decoding it takes.
        let limit = (raw_len - raw_len / 128) as u64;
        let least = counts.entropy_bytes();
        let form = if least >= limit {
            Form::Raw
        } else {
            let shared_len = shared.and_then(|shared| shared.encoded_len(counts)).unwrap_or(u64::MAX);
            // An own model can at best be perfect and take half a byte per symbol.
            let own_len = if least + counts.used().count() as u64 / 2 >= shared_len.min(limit) {
                u64::MAX
            } else {
                own.learn(counts)?;
                own.store(out);
                let stored = out.len() - start;
                out.truncate(start);
                own.encoded_len(counts).map_or(u64::MAX, |len| len + stored as u64)
            };
            match shared {
                Some(shared) if shared_len <= own_len && shared_len < limit => {
                    shared.encode(symbols, out);
                    Form::Shared
                }
                _ if own_len < limit => put_own(own, out),
                _ => Form::Raw,
            }
        };
        // What was estimated may be a little more.
        if form.is_coded() && out.len() - start < raw_len {
            return Ok(form);
        }
        out.truncate(start);
        planes.put_raw(symbols, field, out)?;
        Ok(Form::Raw)
    }
}

/// Most bytes of a coded stream of the reference and its model.
///
/// A Huffman code that is made for a stream is no longer than its symbols; an arithmetic one loses less than a bit for every symbol of the
/// alphabet and a part of 2^-20 of each bit. Of the model, no number takes more than five bytes, and a run of zeros no more than three.
fn reference_len(field: Field, count: usize) -> usize {
    let coded = count.saturating_mul(usize::from(field.bits)) / 8;
    let model = (1_usize << field.bits).min(count).saturating_mul(8) + 3;
    coded.saturating_add(count / 1024 + (1 << field.bits) / 8 + 16).saturating_add(model)
}

impl<M: Model> LaneCoder for Lanes<M> {
    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        let count = lane.shape.elements();
        let Ok(fields) = M::fields(lane.elem) else { return 0 };
        if count == 0 {
            return 0;
        }
        fields.iter().fold(1, |sum: usize, field| {
            let len = if M::REFERENCE { reference_len(*field, count) } else { field.raw_len(count) };
            sum.saturating_add(len).saturating_add(LENGTH_MOST)
        })
    }

    fn encode(&self, lane: LaneRef<'_>, role: Role, out: &mut Vec<u8>) -> Result<()> {
        let (elem, elements) = (lane.spec().elem, lane.bytes());
        let fields = M::fields(elem)?;
        check_range(elem, elements)?;
        if elements.is_empty() {
            return Ok(());
        }
        let start = out.len();
        out.push(0);
        // Where the last coded stream starts; it needs a length as soon as another follows.
        let mut coded: Option<(usize, usize)> = None;
        self.scratch.with(Scratch::default, |scratch| {
            let Scratch { symbols, planes, counts, own } = scratch;
            for (idx, field) in fields.into_iter().enumerate() {
                let symbols = symbols.gather(elements, elem, field);
                let shared = self.shared.model(elem, role, idx);
                let before = out.len();
                let form = Self::put_stream(symbols, field, shared, (planes, counts, own), out)
                    .inspect_err(|_| out.truncate(start))?;
                out[start] |= (form as u8) << (2 * idx);
                if form.is_coded() {
                    let mut added = 0;
                    if let Some((place, len)) = coded {
                        let mut length = Vec::with_capacity(LENGTH_MOST);
                        put_number(len as u64, &mut length);
                        added = length.len();
                        out.splice(place..place, length);
                    }
                    coded = Some((before + added, out.len() - before - added));
                }
            }
            Ok(())
        })
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, role: Role, out: &mut [u8]) -> Result<()> {
        let elem = lane.elem;
        let fields = M::fields(elem)?;
        LaneRef::new(lane, out)?;
        let mut reader = Reader::new(encoded);
        if out.is_empty() {
            return reader.end();
        }
        let count = out.len() / elem.size();
        let forms = reader.byte()?;
        if usize::from(forms) >> (2 * fields.len()) != 0 {
            return Err(Error::corrupt(format!("expected {} streams, got first byte {forms:#04x}", fields.len())));
        }
        // A stream that is the lane itself is written, all others are added.
        if fields.len() > 1 || !Form::of(forms, 0).is_coded() {
            out.fill(0);
        }
        self.scratch.with(Scratch::default, |scratch| {
            for (idx, field) in fields.iter().enumerate() {
                let form = Form::of(forms, idx);
                let stream = || format!("stream {idx}");
                if M::REFERENCE && !form.is_coded() {
                    return Err(Error::corrupt(format!("stream {idx}: form {form:?} is not one of this mode")));
                }
                if !form.is_coded() {
                    scratch.take_plain(form, &mut reader, out, elem, *field).context(stream)?;
                    continue;
                }
                // The last coded stream goes up to those behind it, whose lengths are known.
                let behind = || fields.iter().enumerate().skip(idx + 1);
                let len = if behind().any(|(idx, _)| Form::of(forms, idx).is_coded()) {
                    reader.length().context(stream)?
                } else {
                    let plain = |(idx, field): (usize, &Field)| match Form::of(forms, idx) {
                        Form::Raw => field.raw_len(count),
                        _ => field.symbol_size(),
                    };
                    let behind = behind().map(plain).fold(0, usize::saturating_add);
                    reader.remaining().saturating_sub(behind)
                };
                let mut stored = Reader::new(reader.take(len).context(stream)?);
                let Scratch { symbols, own, .. } = scratch;
                let model = if form == Form::Own {
                    own.load(field.bits, &mut stored, count).context(stream)?;
                    &*own
                } else {
                    let missing =
                        || Error::corrupt(format!("stream {idx}: there is no shared model for {role}s of {elem}"));
                    self.shared.model(elem, role, idx).ok_or_else(missing)?
                };
                let coded = stored.take(stored.remaining())?;
                symbols.scatter(out, elem, *field, |symbols| model.decode(coded, symbols)).context(stream)?;
            }
            reader.end()
        })
    }

    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        let mut groups: BTreeMap<(u8, Role), Vec<Counts>> = BTreeMap::new();
        let mut symbols = SymbolBuffer::default();
        for sample in samples {
            let elem = sample.spec.elem;
            let fields = M::fields(elem)?;
            check_range(elem, LaneRef::new(&sample.spec, &sample.bytes)?.bytes())?;
            let counts = groups
                .entry((elem_code(elem), sample.role))
                .or_insert_with(|| fields.iter().map(|field| Counts::new(field.bits)).collect());
            for (counts, field) in counts.iter_mut().zip(fields) {
                counts.add(symbols.gather(&sample.bytes, elem, field));
            }
        }
        groups.retain(|_, counts| counts.iter().any(|counts| counts.total() > 0));
        if groups.is_empty() {
            return Ok(None);
        }
        let mut artifact = Vec::new();
        let mut model = M::default();
        for ((elem, role), streams) in groups {
            artifact.extend([elem, role as u8]);
            for counts in streams {
                let raw = u128::from(counts.total()) * u128::from(counts.bits()) / 8;
                let pays = counts.only_symbol().is_none() && u128::from(counts.entropy_bytes()) < raw - raw / 128;
                artifact.push(u8::from(M::REFERENCE || pays));
                if M::REFERENCE || pays {
                    model.learn(&counts)?;
                    model.store(&mut artifact);
                }
            }
        }
        Ok(Some(Artifact(artifact)))
    }
}

impl<M> Scratch<M> {
    /// Puts a stream that is not coded into elements that are zero there.
    fn take_plain(
        &mut self,
        form: Form,
        from: &mut Reader<'_>,
        elements: &mut [u8],
        elem: Elem,
        field: Field,
    ) -> Result<()> {
        if form == Form::Raw {
            return self.planes.take_raw(from, elements, elem, field);
        }
        let symbol = from.take(field.symbol_size())?;
        let value = symbol.iter().rev().fold(0, |value, byte| value << 8 | u16::from(*byte));
        if value >> field.bits != 0 {
            return Err(Error::corrupt(format!("expected a symbol of {} bits, got {value}", field.bits)));
        }
        self.symbols.scatter(elements, elem, field, |symbols| {
            symbols.chunks_exact_mut(symbol.len()).for_each(|to| to.copy_from_slice(symbol));
            Ok(())
        })
    }
}

/// The number of an element type in artifacts.
fn elem_code(elem: Elem) -> u8 {
    match elem {
        Elem::F16 => 0,
        Elem::Bf16 => 1,
        Elem::F32 => 2,
        Elem::U8 => 3,
        Elem::U16 => 4,
        Elem::U32 => 5,
        Elem::Bits(bits) => 16 + bits,
        // A new type gets a number with the fields that make it legal.
        _ => u8::MAX,
    }
}

fn elem_of(code: u8) -> Result<Elem> {
    Ok(match code {
        0 => Elem::F16,
        1 => Elem::Bf16,
        2 => Elem::F32,
        3 => Elem::U8,
        4 => Elem::U16,
        5 => Elem::U32,
        17..=32 => Elem::Bits(code - 16),
        _ => return Err(Error::corrupt(format!("element type {code} is unknown"))),
    })
}

impl<M: Model> Shared<M> {
    fn model(&self, elem: Elem, role: Role, stream: usize) -> Option<&M> {
        self.0.get(&(elem_code(elem), role))?.get(stream)?.as_ref()
    }

    fn load(artifact: &[u8]) -> Result<Self> {
        let mut groups = BTreeMap::new();
        let mut reader = Reader::new(artifact);
        while reader.remaining() > 0 {
            let code = reader.byte()?;
            let role = match reader.byte()? {
                0 => Role::Key,
                1 => Role::Value,
                other => return Err(Error::corrupt(format!("role {other} is unknown"))),
            };
            if groups.last_key_value().is_some_and(|(last, _)| *last >= (code, role)) {
                return Err(Error::corrupt("models are not in order"));
            }
            let mut models = Vec::new();
            for field in M::fields(elem_of(code)?)? {
                models.push(match reader.byte()? {
                    0 => None,
                    1 => {
                        let mut model = M::default();
                        model.load(field.bits, &mut reader, usize::MAX)?;
                        model.ready_to_encode();
                        Some(model)
                    }
                    other => return Err(Error::corrupt(format!("expected 0 or 1 before a model, got {other}"))),
                });
            }
            groups.insert((code, role), models);
        }
        Ok(Self(groups))
    }
}
