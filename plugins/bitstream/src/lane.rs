//! Lanes: which streams they have, how each of them is stored, and the models that lanes share.

use std::collections::BTreeMap;

use gearbox_core::{Artifact, Elem, Error, LaneRef, LaneSpec, Pool, Result, ResultExt, Role, Sample};

use crate::counts::Counts;
use crate::model::Model;
use crate::symbols::{Field, SymbolBuffer, check_range, values};
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
    stream: Stream<M>,
}

/// Buffers of one stream.
#[derive(Debug, Default)]
struct Stream<M> {
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
}

impl<M: Model> Stream<M> {
    /// Appends the symbols of a field and says how.
    fn put(&mut self, symbols: &[u8], field: Field, shared: Option<&M>, out: &mut Vec<u8>) -> Result<Form> {
        if M::REFERENCE {
            self.put_reference(symbols, field, shared, out)
        } else {
            self.put_fast(symbols, field, shared, out)
        }
    }

    fn put_reference(&mut self, symbols: &[u8], field: Field, shared: Option<&M>, out: &mut Vec<u8>) -> Result<Form> {
        let start = out.len();
        self.counts.reset(field.bits);
        self.counts.add(symbols);
        if let Some(shared) = shared.filter(|shared| shared.encoded_len(&self.counts).is_some()) {
            shared.encode(symbols, out);
            // A model of other lanes may fit so badly that no bound holds.
            if out.len() - start <= reference_len(field, symbols.len() / field.symbol_size()) {
                return Ok(Form::Shared);
            }
            out.truncate(start);
        }
        self.own.learn(&self.counts)?;
        self.own.store(out);
        self.own.encode(symbols, out);
        Ok(Form::Own)
    }

    fn put_fast(&mut self, symbols: &[u8], field: Field, shared: Option<&M>, out: &mut Vec<u8>) -> Result<Form> {
        let count = symbols.len() / field.symbol_size();
        let start = out.len();
        self.counts.reset(field.bits);
        // Counting the many symbols of a mantissa takes longer than looking at some of them.
        if field.bits > 8 && count >= 2 * Counts::SAMPLE {
            if self.counts.is_noise(symbols) {
                self.planes.put_raw(symbols, field, out)?;
                return Ok(Form::Raw);
            }
            self.counts.reset(field.bits);
        }
        self.counts.add(symbols);
        if let Some(symbol) = self.counts.only_symbol() {
            out.extend_from_slice(&symbol.to_le_bytes()[..field.symbol_size()]);
            return Ok(Form::Constant);
        }
        let raw_len = field.raw_len(count);
        let form = match self.choose(raw_len, shared)? {
            Some((form, model)) => {
                if form == Form::Own {
                    model.store(out);
                }
                model.encode(symbols, out);
                form
            }
            None => Form::Raw,
        };
        // What was estimated may be a little more.
        if form.is_coded() && out.len() - start < raw_len {
            return Ok(form);
        }
        out.truncate(start);
        self.planes.put_raw(symbols, field, out)?;
        Ok(Form::Raw)
    }

    /// The model that makes the stream with the present counts smallest, if one makes it small enough.
    fn choose<'a>(&'a mut self, raw_len: usize, shared: Option<&'a M>) -> Result<Option<(Form, &'a M)>> {
        // Less than a hundredth of a stream is not worth the time that decoding it takes.
        let limit = (raw_len - raw_len / 128) as u64;
        let least = self.counts.entropy_bytes();
        if least >= limit {
            return Ok(None);
        }
        let shared_len = shared.and_then(|shared| shared.encoded_len(&self.counts)).unwrap_or(u64::MAX);
        let mut own_len = u64::MAX;
        // An own model can at best be perfect and take half a byte per symbol.
        if least + self.counts.used().count() as u64 / 2 < shared_len.min(limit) {
            self.own.learn(&self.counts)?;
            let mut stored = Vec::new();
            self.own.store(&mut stored);
            own_len = self.own.encoded_len(&self.counts).map_or(u64::MAX, |len| len + stored.len() as u64);
        }
        Ok(match shared {
            _ if own_len.min(shared_len) >= limit => None,
            Some(shared) if shared_len <= own_len => Some((Form::Shared, shared)),
            _ => Some((Form::Own, &self.own)),
        })
    }
}

/// Most bytes of a coded stream of the reference and its model.
///
/// A Huffman code that is made for a stream is no longer than its symbols; an arithmetic one loses up to two bits for every symbol of the
/// alphabet and a part of 2^-20 of each bit. Of the model, no number takes more than five bytes, and a run of zeros no more than three.
fn reference_len(field: Field, count: usize) -> usize {
    let coded = count.saturating_mul(usize::from(field.bits)) / 8;
    let model = (1_usize << field.bits).min(count).saturating_mul(8) + 3;
    coded.saturating_add(count / 1024 + (1 << field.bits) / 4 + 16).saturating_add(model)
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
            let Scratch { symbols, stream } = scratch;
            for (idx, field) in fields.into_iter().enumerate() {
                let symbols = symbols.gather(elements, elem, field);
                let shared = self.shared.model(elem, role, idx);
                let before = out.len();
                let form = stream.put(symbols, field, shared, out).inspect_err(|_| out.truncate(start))?;
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
                let Scratch { symbols, stream: Stream { own, .. } } = scratch;
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
            return self.stream.planes.take_raw(from, elements, elem, field);
        }
        let symbol = from.take(field.symbol_size())?;
        let value = values(symbol, field.bits).next().unwrap_or_default();
        if u32::from(value) >> field.bits != 0 {
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
