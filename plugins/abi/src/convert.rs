//! Core's types as the ABI's structs, and back.

use std::borrow::Cow;

use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, DType, Elem, ElemSet, Error, Kind, LaneSpec, Needs, Result, Role,
    Rope, RopePairing, RopeScaling, Shape,
};

use crate::raw;

/// Element types by code: the place in this list, which is also the bit in [`raw::Capabilities::elems`].
pub const ELEMS: [&str; 7] = ["f16", "bf16", "f32", "u8", "u16", "u32", "bits"];

/// Parts of the context by bit in [`raw::Capabilities::needs`] and `wants`.
pub const NEEDS: [&str; 4] = ["tokens", "rope", "peer", "history"];

/// Bit of [`raw::Capabilities::flags`]: same input, same bytes.
pub const DETERMINISTIC: u32 = 1;
/// Bit of [`raw::Capabilities::flags`]: tokens can be appended.
pub const STREAMING: u32 = 2;

const BITS: u32 = 6;

/// Code and width.
pub(crate) fn elem_code(elem: Elem) -> Result<(u32, u32)> {
    Ok(match elem {
        Elem::F16 => (0, 0),
        Elem::Bf16 => (1, 0),
        Elem::F32 => (2, 0),
        Elem::U8 => (3, 0),
        Elem::U16 => (4, 0),
        Elem::U32 => (5, 0),
        Elem::Bits(bits) => (BITS, bits.into()),
        other => return Err(Error::unsupported(format!("the plugin ABI has no element type {other}"))),
    })
}

pub(crate) fn elem(code: u32, bits: u32) -> Result<Elem> {
    Ok(match (code, bits) {
        (0, 0) => Elem::F16,
        (1, 0) => Elem::Bf16,
        (2, 0) => Elem::F32,
        (3, 0) => Elem::U8,
        (4, 0) => Elem::U16,
        (5, 0) => Elem::U32,
        (BITS, 1..=16) => Elem::Bits(bits as u8),
        _ => {
            return Err(Error::unsupported(format!(
                "expected an element type from 0 to 5, or 6 of 1 to 16 bits; got {code} of {bits} bits"
            )));
        }
    })
}

pub(crate) fn dtype(code: u32) -> Result<DType> {
    elem(code, 0)?.dtype().ok_or_else(|| {
        let got = ELEMS.get(code as usize).unwrap_or(&"another");
        Error::new(gearbox_core::ErrorKind::UnsupportedDType, format!("expected f16, bf16 or f32, got {got}"))
    })
}

pub(crate) fn dtype_code(dtype: DType) -> Result<u32> {
    Ok(elem_code(dtype.into())?.0)
}

pub(crate) fn role_code(role: Role) -> u32 {
    match role {
        Role::Key => 0,
        Role::Value => 1,
    }
}

pub(crate) fn role(code: u32) -> Result<Role> {
    Role::ALL
        .get(code as usize)
        .copied()
        .ok_or_else(|| Error::invalid_input(format!("expected role 0 or 1, got {code}")))
}

pub(crate) fn kind_code(kind: Kind) -> u32 {
    match kind {
        Kind::Codec => 0,
        Kind::Transform => 1,
        Kind::Eviction => 2,
    }
}

pub(crate) fn kind(code: u32) -> Option<Kind> {
    [Kind::Codec, Kind::Transform, Kind::Eviction].get(code as usize).copied()
}

/// Text of this side; it must outlive what is made from it.
pub(crate) fn text(text: &str) -> raw::Str {
    raw::Str { data: text.as_ptr(), len: text.len() }
}

/// Elements of the other side; null is an empty slice.
///
/// # Safety
/// `data` is null, or valid and unchanged for `len` elements as long as `'a` lasts.
pub(crate) unsafe fn slice<'a, T: Copy>(data: *const T, len: usize) -> &'a [T] {
    if data.is_null() || len == 0 {
        return &[];
    }
    // SAFETY: not null, and valid for `'a` as the caller promises.
    unsafe { std::slice::from_raw_parts(data, len) }
}

/// Elements of the other side to fill; null is an empty slice.
///
/// # Safety
/// `data` is null, or valid for `len` elements, initialised, and used by nobody else as long as `'a` lasts.
pub(crate) unsafe fn slice_mut<'a>(data: *mut u8, len: usize) -> &'a mut [u8] {
    if data.is_null() || len == 0 {
        return &mut [];
    }
    // SAFETY: not null, valid and exclusive for `'a` as the caller promises.
    unsafe { std::slice::from_raw_parts_mut(data, len) }
}

/// Text of the other side.
///
/// # Safety
/// As [`slice`].
pub(crate) unsafe fn str<'a>(text: raw::Str) -> Result<&'a str, String> {
    // SAFETY: as the caller promises.
    let bytes = unsafe { slice(text.data, text.len) };
    std::str::from_utf8(bytes).map_err(|error| {
        format!("expected UTF-8, got byte {:#04x} at {}", bytes[error.valid_up_to()], error.valid_up_to())
    })
}

pub(crate) fn lane_spec(spec: &LaneSpec) -> Result<raw::LaneSpec> {
    let (elem, bits) = elem_code(spec.elem)?;
    let Shape { seq, heads, dim } = spec.shape;
    Ok(raw::LaneSpec { name: text(&spec.name), elem, bits, seq, heads, dim })
}

/// # Safety
/// The name is valid text, see [`slice`].
pub(crate) unsafe fn lane_spec_from(spec: &raw::LaneSpec) -> Result<LaneSpec> {
    // SAFETY: as the caller promises.
    let name = unsafe { str(spec.name) }.map_err(|why| Error::invalid_input(format!("name of a lane: {why}")))?;
    let name = if name == LaneSpec::TENSOR { Cow::Borrowed(LaneSpec::TENSOR) } else { Cow::Owned(name.to_owned()) };
    Ok(LaneSpec::new(name, elem(spec.elem, spec.bits)?, Shape::new(spec.seq, spec.heads, spec.dim)))
}

pub(crate) fn chunk(chunk: &Chunk<'_>) -> Result<raw::Chunk> {
    let Shape { seq, heads, dim } = chunk.shape();
    let bytes = chunk.bytes();
    let elem = dtype_code(chunk.dtype())?;
    Ok(raw::Chunk { seq, heads, dim, elem, reserved: 0, data: bytes.as_ptr(), len: bytes.len() })
}

/// # Safety
/// The elements are valid for `'a`, see [`slice`].
pub(crate) unsafe fn chunk_from<'a>(chunk: &raw::Chunk) -> Result<Chunk<'a>> {
    // SAFETY: as the caller promises.
    let bytes = unsafe { slice(chunk.data, chunk.len) };
    Chunk::new(Shape::new(chunk.seq, chunk.heads, chunk.dim), dtype(chunk.elem)?, bytes)
}

/// # Safety
/// The elements are valid and exclusive for `'a`, see [`slice_mut`].
pub(crate) unsafe fn chunk_mut_from<'a>(chunk: &raw::ChunkMut) -> Result<ChunkMut<'a>> {
    // SAFETY: as the caller promises.
    let bytes = unsafe { slice_mut(chunk.data, chunk.len) };
    ChunkMut::new(Shape::new(chunk.seq, chunk.heads, chunk.dim), dtype(chunk.elem)?, bytes)
}

/// A context in the form of the ABI: the structs that [`raw::Context`] points to.
pub(crate) struct Around {
    rope: Option<raw::Rope>,
    peer: Option<raw::Chunk>,
    history: Option<raw::Chunk>,
}

impl Around {
    pub(crate) fn of(cx: &Context<'_>) -> Result<Self> {
        Ok(Self {
            rope: cx.rope.map(rope),
            peer: cx.peer.as_ref().map(chunk).transpose()?,
            history: cx.history.as_ref().map(chunk).transpose()?,
        })
    }

    /// The context; it points into `self` and into what `cx` borrows.
    pub(crate) fn context(&self, cx: &Context<'_>) -> raw::Context {
        let (tokens, token_count) = ids(cx.tokens);
        let (history_tokens, history_token_count) = ids(cx.history_tokens);
        raw::Context {
            size: raw::size_of::<raw::Context>(),
            layer: cx.layer,
            role: role_code(cx.role),
            first_token: cx.first_token,
            end_token: cx.end_token.unwrap_or(u64::MAX),
            tokens,
            token_count,
            rope: pointer(self.rope.as_ref()),
            peer: pointer(self.peer.as_ref()),
            history: pointer(self.history.as_ref()),
            history_tokens,
            history_token_count,
        }
    }
}

fn pointer<T>(value: Option<&T>) -> *const T {
    value.map_or(std::ptr::null(), std::ptr::from_ref)
}

/// Null is unknown; an empty list is not null, since slices never are.
fn ids(tokens: Option<&[u32]>) -> (*const u32, usize) {
    tokens.map_or((std::ptr::null(), 0), |tokens| (tokens.as_ptr(), tokens.len()))
}

fn rope(rope: &Rope) -> raw::Rope {
    let mut raw = raw::Rope {
        size: raw::size_of::<raw::Rope>(),
        pairing: match rope.pairing {
            RopePairing::Adjacent => 0,
            RopePairing::HalfSplit => 1,
        },
        scaling: 0,
        theta: rope.theta,
        rotary_dim: rope.rotary_dim as u64,
        factor: 0.0,
        low_freq_factor: 0.0,
        high_freq_factor: 0.0,
        original_context: 0,
    };
    match rope.scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            raw.scaling = 1;
            raw.factor = factor;
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            raw.scaling = 2;
            raw.factor = factor;
            raw.low_freq_factor = low_freq_factor;
            raw.high_freq_factor = high_freq_factor;
            raw.original_context = original_context.into();
        }
    }
    raw
}

fn rope_from(raw: &raw::Rope) -> Result<Rope> {
    let pairing = match raw.pairing {
        0 => RopePairing::Adjacent,
        1 => RopePairing::HalfSplit,
        other => return Err(Error::unsupported(format!("expected RoPE pairing 0 or 1, got {other}"))),
    };
    let number = |what: &str, value: u64| Error::invalid_input(format!("RoPE: {what} of {value} is out of range"));
    let scaling = match raw.scaling {
        0 => RopeScaling::None,
        1 => RopeScaling::Linear { factor: raw.factor },
        2 => RopeScaling::Llama3 {
            factor: raw.factor,
            low_freq_factor: raw.low_freq_factor,
            high_freq_factor: raw.high_freq_factor,
            original_context: u32::try_from(raw.original_context)
                .map_err(|_| number("original context", raw.original_context))?,
        },
        other => return Err(Error::unsupported(format!("expected RoPE scaling 0, 1 or 2, got {other}"))),
    };
    let rotary_dim = usize::try_from(raw.rotary_dim).map_err(|_| number("rotary dim", raw.rotary_dim))?;
    Ok(Rope { pairing, theta: raw.theta, rotary_dim, scaling })
}

/// A context of the other side, with what has to be owned to borrow a [`Context`] from it.
pub(crate) struct Received {
    raw: raw::Context,
    rope: Option<Rope>,
}

impl Received {
    /// # Safety
    /// `place` points to a context, and it and everything that it points to stay valid as long as what is made from it.
    pub(crate) unsafe fn new(place: *const raw::Context) -> Result<Self> {
        // SAFETY: as the caller promises.
        let raw =
            unsafe { raw::read(place) }.ok_or_else(|| Error::invalid_input("the context is null or too short"))?;
        // SAFETY: null or a struct, as the caller promises.
        let rope = unsafe { raw::read(raw.rope) }.map(|raw| rope_from(&raw)).transpose()?;
        Ok(Self { raw, rope })
    }

    /// # Safety
    /// As [`Received::new`].
    pub(crate) unsafe fn context(&self) -> Result<Context<'_>> {
        let raw = &self.raw;
        let known = |data: *const u32, len| {
            // SAFETY: null or valid for as many tokens, as the caller promises.
            (!data.is_null()).then(|| unsafe { slice(data, len) })
        };
        let chunk = |place: *const raw::Chunk| {
            // SAFETY: null or a struct whose elements are valid, as the caller promises.
            unsafe { place.as_ref().map(|chunk| chunk_from(chunk)) }.transpose()
        };
        Ok(Context {
            layer: raw.layer,
            role: role(raw.role)?,
            first_token: raw.first_token,
            end_token: (raw.end_token != u64::MAX).then_some(raw.end_token),
            tokens: known(raw.tokens, raw.token_count),
            rope: self.rope.as_ref(),
            peer: chunk(raw.peer)?,
            history: chunk(raw.history)?,
            history_tokens: known(raw.history_tokens, raw.history_token_count),
        })
    }
}

const ELEM_SETS: [(Elem, ElemSet); 7] = [
    (Elem::F16, ElemSet::F16),
    (Elem::Bf16, ElemSet::BF16),
    (Elem::F32, ElemSet::F32),
    (Elem::U8, ElemSet::U8),
    (Elem::U16, ElemSet::U16),
    (Elem::U32, ElemSet::U32),
    (Elem::Bits(1), ElemSet::BITS),
];

fn needs_bits(needs: Needs) -> u32 {
    [needs.tokens, needs.rope, needs.peer, needs.history].iter().rev().fold(0, |bits, set| bits << 1 | u32::from(*set))
}

fn needs(bits: u32) -> Needs {
    let set = |bit: u32| bits >> bit & 1 != 0;
    Needs { tokens: set(0), rope: set(1), peer: set(2), history: set(3) }
}

/// Fills what the caller knows of it.
pub(crate) fn capabilities(declared: &Capabilities) -> raw::Capabilities {
    let elems = ELEM_SETS.iter().rev().fold(0, |bits, (elem, _)| bits << 1 | u32::from(declared.elems.contains(*elem)));
    let flags = if declared.deterministic { DETERMINISTIC } else { 0 } | if declared.streaming { STREAMING } else { 0 };
    raw::Capabilities {
        size: raw::size_of::<raw::Capabilities>(),
        elems,
        needs: needs_bits(declared.needs),
        wants: needs_bits(declared.wants),
        flags,
    }
}

/// Refuses bits that this version does not know, since ignoring one would drop a need.
pub(crate) fn capabilities_from(raw: &raw::Capabilities) -> Result<Capabilities> {
    let known = [
        ("element types", raw.elems, ELEMS.len()),
        ("needs", raw.needs, NEEDS.len()),
        ("wants", raw.wants, NEEDS.len()),
        ("flags", raw.flags, 2),
    ];
    if let Some((what, bits, known)) = known.into_iter().find(|(_, bits, known)| bits >> known != 0) {
        return Err(Error::unsupported(format!("capabilities: expected {what} of {known} bits, got {bits:#x}")));
    }
    let mut elems = ELEM_SETS.iter().enumerate().filter(|(bit, _)| raw.elems >> bit & 1 != 0).map(|(_, (_, set))| *set);
    // A policy looks at no elements; a codec or transform without any is refused where it is used.
    let first =
        elems.next().ok_or_else(|| Error::unsupported("capabilities: expected at least one element type, got none"))?;
    Ok(Capabilities {
        elems: elems.fold(first, ElemSet::or),
        needs: needs(raw.needs),
        wants: needs(raw.wants),
        deterministic: raw.flags & DETERMINISTIC != 0,
        streaming: raw.flags & STREAMING != 0,
    })
}

pub(crate) fn bound(bound: Bound) -> raw::Bound {
    let (kind, value) = match bound {
        Bound::Lossless => (0, 0.0),
        Bound::Absolute(error) => (1, error),
        Bound::Relative(fraction) => (2, fraction),
        Bound::Peak(fraction) => (3, fraction),
        Bound::Unbounded => (4, 0.0),
    };
    raw::Bound { kind, value }
}

pub(crate) fn bound_from(raw: raw::Bound) -> Result<Bound> {
    let value = raw.value;
    if (1..=3).contains(&raw.kind) && !(value >= 0.0 && value.is_finite()) {
        return Err(Error::invalid_input(format!("bound: expected a finite number of at least 0, got {value}")));
    }
    Ok(match raw.kind {
        0 => Bound::Lossless,
        1 => Bound::Absolute(value),
        2 => Bound::Relative(value),
        3 => Bound::Peak(value),
        4 => Bound::Unbounded,
        other => return Err(Error::unsupported(format!("bound: expected a kind from 0 to 4, got {other}"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_types_survive_both_ways() {
        let widths = (1..=16).map(Elem::Bits);
        for expected in [Elem::F16, Elem::Bf16, Elem::F32, Elem::U8, Elem::U16, Elem::U32].into_iter().chain(widths) {
            let (code, bits) = elem_code(expected).unwrap();
            assert_eq!(elem(code, bits).unwrap(), expected);
        }
        for (code, bits) in [(0, 1), (6, 0), (6, 17), (7, 0), (u32::MAX, 0)] {
            assert!(elem(code, bits).is_err(), "{code} of {bits} bits");
        }
        assert!(dtype(3).is_err());
    }

    #[test]
    fn capabilities_survive_both_ways() {
        for elems in ELEM_SETS.map(|(_, set)| set).into_iter().chain([ElemSet::ALL, ElemSet::FLOATS]) {
            for parts in 0..16 {
                let declared = Capabilities {
                    elems,
                    needs: needs(parts),
                    wants: needs(parts ^ 5),
                    deterministic: parts & 1 == 0,
                    streaming: parts & 2 == 0,
                };
                assert_eq!(capabilities_from(&capabilities(&declared)).unwrap(), declared);
            }
        }
        let unknown = raw::Capabilities { size: 24, elems: 1, needs: 16, wants: 0, flags: 0 };
        let error = capabilities_from(&unknown).unwrap_err().to_string();
        assert_eq!(error, "capabilities: expected needs of 4 bits, got 0x10");
    }

    #[test]
    fn bounds_survive_both_ways() {
        let bounds =
            [Bound::Lossless, Bound::Absolute(0.5), Bound::Relative(0.25), Bound::Peak(0.125), Bound::Unbounded];
        for expected in bounds {
            assert_eq!(bound_from(bound(expected)).unwrap(), expected);
        }
        for (kind, value) in [(5, 0.0), (1, f64::NAN), (2, -1.0), (3, f64::INFINITY)] {
            assert!(bound_from(raw::Bound { kind, value }).is_err(), "{kind} {value}");
        }
    }

    #[test]
    fn context_survives_both_ways() {
        let bytes = [1u8; 24];
        let scalings = [
            RopeScaling::None,
            RopeScaling::Linear { factor: 2.0 },
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 },
        ];
        for scaling in scalings {
            let rope = Rope { pairing: RopePairing::HalfSplit, theta: 1e4, rotary_dim: 2, scaling };
            let chunk = Chunk::new(Shape::new(3, 2, 2), DType::F16, &bytes).unwrap();
            let cx = Context {
                end_token: Some(9),
                tokens: Some(&[1, 2, 3]),
                rope: Some(&rope),
                peer: Some(chunk),
                history: Some(chunk.tokens(0..1)),
                history_tokens: Some(&[]),
                ..Context::new(7, Role::Value, 4)
            };
            for cx in [cx, Context::new(0, Role::Key, 0)] {
                let around = Around::of(&cx).unwrap();
                let raw = around.context(&cx);
                // SAFETY: `raw` points into `around` and into what `cx` borrows, which both live to the end of the loop.
                let received = unsafe { Received::new(&raw const raw) }.unwrap();
                // SAFETY: as above.
                let got = unsafe { received.context() }.unwrap();
                assert_eq!(format!("{got:?}"), format!("{cx:?}"));
            }
        }
    }
}
