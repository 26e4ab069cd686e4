//! The structs that cross the boundary, field for field those of `include/gearbox_plugin.h`.
//!
//! The header documents every field for authors in C; here stands what Rust adds. Structs that begin with `size` may grow at their end
//! in a later minor version, and are read as far as `size` says; all others never change within a major version. Every function is an
//! `Option`, because a library may leave any field null: the host checks before it calls.
//!
//! Nothing here has padding between or behind its fields, so a field appended later starts where the struct ends now.

use std::ffi::c_void;

use abi_stable::StableAbi;

/// Major version of the ABI: changes when a library built for another one cannot be used.
pub const ABI_MAJOR: u32 = 1;
/// Minor version of the ABI: counts the fields appended since the major version began.
pub const ABI_MINOR: u32 = 0;

/// Text in UTF-8, not terminated.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Str {
    /// First byte; may be anything, null included, if `len` is zero.
    pub data: *const u8,
    /// Bytes.
    pub len: usize,
}

/// A caller's buffer for the text of an error.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct ErrorText {
    /// First byte.
    pub data: *mut u8,
    /// Bytes that fit.
    pub capacity: usize,
    /// Bytes written; zero when the call starts.
    pub len: usize,
}

/// Takes bytes of a length that only the plugin knows, in one or more pieces.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Sink {
    /// First argument of `append`.
    pub state: *mut c_void,
    /// Appends bytes; anything but [`OK`](crate::status::OK) means that no more are taken.
    pub append: Option<unsafe extern "C" fn(state: *mut c_void, data: *const u8, len: usize) -> i32>,
}

/// Name, element type and shape of a lane.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct LaneSpec {
    /// Name within its chunk.
    pub name: Str,
    /// Element type: a place in [`ELEMS`](crate::convert::ELEMS).
    pub elem: u32,
    /// Width of `bits` elements, zero for all others.
    pub bits: u32,
    /// Tokens.
    pub seq: usize,
    /// KV heads.
    pub heads: usize,
    /// Channels per head.
    pub dim: usize,
}

/// A lane and its elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Lane {
    /// Name, element type and shape.
    pub spec: LaneSpec,
    /// Elements, little-endian.
    pub data: *const u8,
    /// Bytes.
    pub len: usize,
}

/// A run of tokens.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Chunk {
    /// Tokens.
    pub seq: usize,
    /// KV heads.
    pub heads: usize,
    /// Channels per head.
    pub dim: usize,
    /// Element type, one of the first three.
    pub elem: u32,
    /// Zero.
    pub reserved: u32,
    /// Elements, little-endian.
    pub data: *const u8,
    /// Bytes.
    pub len: usize,
}

/// A run of tokens to fill.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct ChunkMut {
    /// Tokens.
    pub seq: usize,
    /// KV heads.
    pub heads: usize,
    /// Channels per head.
    pub dim: usize,
    /// Element type, one of the first three.
    pub elem: u32,
    /// Zero.
    pub reserved: u32,
    /// Elements, little-endian.
    pub data: *mut u8,
    /// Bytes.
    pub len: usize,
}

/// How keys were rotated.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Rope {
    /// Bytes of this struct that are filled.
    pub size: u64,
    /// 0: pairs `(2i, 2i + 1)`; 1: pairs `(i, i + rotary_dim / 2)`.
    pub pairing: u32,
    /// 0: none; 1: linear; 2: Llama 3.
    pub scaling: u32,
    /// Base of the frequencies.
    pub theta: f64,
    /// Channels that are rotated.
    pub rotary_dim: u64,
    /// Divisor of frequencies, for scaling 1 and 2.
    pub factor: f64,
    /// For scaling 2.
    pub low_freq_factor: f64,
    /// For scaling 2.
    pub high_freq_factor: f64,
    /// Tokens, for scaling 2.
    pub original_context: u64,
}

/// What encoder and decoder both know.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Context {
    /// Bytes of this struct that are filled.
    pub size: u64,
    /// Layer of the model.
    pub layer: u32,
    /// 0: keys; 1: values.
    pub role: u32,
    /// Position of the chunk's first token.
    pub first_token: u64,
    /// Position behind the last token of the sequence; `u64::MAX` if unknown.
    pub end_token: u64,
    /// Token ids of the chunk, or null.
    pub tokens: *const u32,
    /// Number of them.
    pub token_count: usize,
    /// Or null.
    pub rope: *const Rope,
    /// The decoded sibling, or null.
    pub peer: *const Chunk,
    /// Decoded earlier tokens, or null.
    pub history: *const Chunk,
    /// Token ids of the history, or null.
    pub history_tokens: *const u32,
    /// Number of them.
    pub history_token_count: usize,
}

/// What a plugin declares.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Capabilities {
    /// Bytes of this struct that the host knows.
    pub size: u64,
    /// Bit `n`: element type `n`.
    pub elems: u32,
    /// Parts of the context that it cannot do without: bits of [`NEEDS`](crate::convert::NEEDS).
    pub needs: u32,
    /// Parts that help it.
    pub wants: u32,
    /// Bit 0: deterministic; bit 1: streaming.
    pub flags: u32,
}

/// The error that a transform promises.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Bound {
    /// 0: lossless; 1: absolute; 2: relative; 3: of the peak; 4: unbounded.
    pub kind: u64,
    /// The error or the fraction, for kinds 1 to 3.
    pub value: f64,
}

/// Gives the lanes of a transformed chunk their memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct LaneSink {
    /// First argument of `lane`.
    pub state: *mut c_void,
    /// Adds a lane of zeros and returns its bytes to fill, or null if it is refused.
    pub lane: Option<unsafe extern "C" fn(state: *mut c_void, spec: *const LaneSpec) -> *mut u8>,
}

/// A lane that a codec may learn from.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Sample {
    /// The lane.
    pub lane: Lane,
    /// Layer of the model.
    pub layer: u32,
    /// 0: keys; 1: values.
    pub role: u32,
}

/// The lanes that a codec may learn from, one after the other.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Samples {
    /// First argument of `next`.
    pub state: *mut c_void,
    /// Writes the next sample, valid until the next call, and returns 1; 0 at the end.
    pub next: Option<unsafe extern "C" fn(state: *mut c_void, sample: *mut Sample) -> i32>,
}

/// Extent of the cache of one layer.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Geometry {
    /// Bytes of this struct that are filled.
    pub size: u64,
    /// Layer of the model.
    pub layer: u32,
    /// Layers of the model.
    pub layers: u32,
    /// Query heads.
    pub q_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels per head.
    pub dim: usize,
}

/// What attention did while tokens were appended.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct AttentionStep {
    /// Bytes of this struct that are filled.
    pub size: u64,
    /// Position of the first query.
    pub first_query: u64,
    /// Number of queries.
    pub queries: usize,
    /// Live tokens of each head.
    pub tokens: usize,
    /// Positions of the live tokens `(rows, tokens)`, ascending in each row.
    pub live: *const u32,
    /// Number of them.
    pub live_count: usize,
    /// Probabilities `(queries, q_heads, tokens)`, row-major.
    pub probabilities: *const f32,
    /// Number of them.
    pub probability_count: usize,
}

/// The cache at the moment of a decision.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct CacheView {
    /// Bytes of this struct that are filled.
    pub size: u64,
    /// Tokens seen so far.
    pub seen: u64,
    /// Live tokens of each head.
    pub tokens: usize,
    /// Positions of the live tokens `(rows, tokens)`, ascending in each row.
    pub live: *const u32,
    /// Number of them.
    pub live_count: usize,
}

/// What a policy promises of every plan.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Retention {
    /// Most tokens of each head; all bits set if there is no such number.
    pub most: u64,
    /// First tokens that stay.
    pub sinks: u64,
    /// Last tokens that stay.
    pub recent: u64,
}

/// Takes the tokens that stay.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct KeepSink {
    /// First argument of `keep`.
    pub state: *mut c_void,
    /// Takes a list. `mode` 0: all tokens; 1: the same for every KV head; 2: those of the next KV head.
    pub keep: Option<unsafe extern "C" fn(state: *mut c_void, mode: u32, indices: *const u32, count: usize) -> i32>,
}

/// What the host offers for as long as the library is loaded, which is until the process ends.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Host {
    /// Bytes of this struct that are filled.
    pub size: u64,
    /// [`ABI_MAJOR`] of the host.
    pub abi_major: u32,
    /// [`ABI_MINOR`] of the host.
    pub abi_minor: u32,
    /// First argument of `log`.
    pub state: *mut c_void,
    /// Takes a line of text from any thread. `level` 1: error; 2: warning; 3: information; 4: debugging.
    pub log: Option<unsafe extern "C" fn(state: *mut c_void, level: u32, text: Str)>,
    /// Threads that one call may use, its own included; 1 if the host keeps the other cores busy itself.
    pub threads: u64,
}

/// Functions of a codec.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct CodecTable {
    /// Bytes of this struct that are filled.
    pub size: u64,
    /// [`Codec::max_encoded_len`](gearbox_core::Codec::max_encoded_len).
    pub max_encoded_len: Option<
        unsafe extern "C" fn(
            object: *const c_void,
            lane: *const LaneSpec,
            len: *mut usize,
            error: *mut ErrorText,
        ) -> i32,
    >,
    /// [`Codec::encode`](gearbox_core::Codec::encode).
    pub encode: Option<
        unsafe extern "C" fn(
            object: *const c_void,
            lane: *const Lane,
            cx: *const Context,
            out: *mut u8,
            capacity: usize,
            len: *mut usize,
            error: *mut ErrorText,
        ) -> i32,
    >,
    /// [`Codec::decode`](gearbox_core::Codec::decode).
    pub decode: Option<
        unsafe extern "C" fn(
            object: *const c_void,
            encoded: *const u8,
            encoded_len: usize,
            lane: *const LaneSpec,
            cx: *const Context,
            out: *mut u8,
            len: usize,
            error: *mut ErrorText,
        ) -> i32,
    >,
    /// [`Codec::train`](gearbox_core::Codec::train); null if it learns nothing.
    pub train: Option<
        unsafe extern "C" fn(
            object: *const c_void,
            samples: *const Samples,
            artifact: *const Sink,
            trained: *mut u32,
            error: *mut ErrorText,
        ) -> i32,
    >,
    /// [`Codec::with_artifact`](gearbox_core::Codec::with_artifact); null if it takes none.
    pub with_artifact: Option<
        unsafe extern "C" fn(
            object: *const c_void,
            artifact: *const u8,
            len: usize,
            with: *mut *mut c_void,
            error: *mut ErrorText,
        ) -> i32,
    >,
}

/// Functions of a transform.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct TransformTable {
    /// Bytes of this struct that are filled.
    pub size: u64,
    /// [`LossyTransform::bound`](gearbox_core::LossyTransform::bound).
    pub bound: Option<unsafe extern "C" fn(object: *const c_void, bound: *mut Bound, error: *mut ErrorText) -> i32>,
    /// [`LossyTransform::forward`](gearbox_core::LossyTransform::forward).
    pub forward: Option<
        unsafe extern "C" fn(
            object: *const c_void,
            chunk: *const Chunk,
            cx: *const Context,
            out: *const LaneSink,
            error: *mut ErrorText,
        ) -> i32,
    >,
    /// [`LossyTransform::inverse`](gearbox_core::LossyTransform::inverse).
    pub inverse: Option<
        unsafe extern "C" fn(
            object: *const c_void,
            lanes: *const Lane,
            lane_count: usize,
            cx: *const Context,
            out: *const ChunkMut,
            error: *mut ErrorText,
        ) -> i32,
    >,
    /// [`LossyTransform::effective_config`](gearbox_core::LossyTransform::effective_config); null if it is the settings.
    pub effective_config: Option<
        unsafe extern "C" fn(
            object: *const c_void,
            role: u32,
            dim: usize,
            json: *const Sink,
            error: *mut ErrorText,
        ) -> i32,
    >,
    /// [`LossyTransform::alternative`](gearbox_core::LossyTransform::alternative); null if it never has one.
    pub alternative: Option<
        unsafe extern "C" fn(
            object: *const c_void,
            chunk: *const Chunk,
            lanes: *const Lane,
            lane_count: usize,
            out: *const LaneSink,
            given: *mut u32,
            error: *mut ErrorText,
        ) -> i32,
    >,
}

/// Functions of an eviction policy.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct EvictionTable {
    /// Bytes of this struct that are filled.
    pub size: u64,
    /// [`EvictionPolicy::session`](gearbox_core::EvictionPolicy::session).
    pub session: Option<
        unsafe extern "C" fn(
            object: *const c_void,
            geometry: *const Geometry,
            session: *mut *mut c_void,
            error: *mut ErrorText,
        ) -> i32,
    >,
    /// [`EvictionSession::observe`](gearbox_core::EvictionSession::observe).
    pub observe:
        Option<unsafe extern "C" fn(session: *mut c_void, step: *const AttentionStep, error: *mut ErrorText) -> i32>,
    /// [`EvictionSession::plan`](gearbox_core::EvictionSession::plan).
    pub plan: Option<
        unsafe extern "C" fn(
            session: *mut c_void,
            cache: *const CacheView,
            out: *const KeepSink,
            error: *mut ErrorText,
        ) -> i32,
    >,
    /// Frees a session.
    pub drop_session: Option<unsafe extern "C" fn(session: *mut c_void)>,
    /// [`EvictionPolicy::retention`](gearbox_core::EvictionPolicy::retention); null if nothing is promised.
    pub retention: Option<
        unsafe extern "C" fn(
            object: *const c_void,
            geometry: *const Geometry,
            seen: u64,
            retention: *mut Retention,
            error: *mut ErrorText,
        ) -> i32,
    >,
}

/// One plugin of a library.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Plugin {
    /// Bytes of this struct that are filled.
    pub size: u64,
    /// 0: codec; 1: transform; 2: eviction policy.
    pub kind: u32,
    /// Version of the bytes it writes.
    pub format_version: u32,
    /// Kebab-case id.
    pub id: Str,
    /// One line for tables.
    pub summary: Str,
    /// Paper or repository that the method comes from.
    pub source: Str,
    /// JSON Schema of its settings, as text.
    pub schema: Str,
    /// Other spellings of the id.
    pub aliases: *const Str,
    /// Number of them.
    pub alias_count: usize,
    /// Builds an object from settings as JSON text.
    pub build: Option<unsafe extern "C" fn(config: Str, object: *mut *mut c_void, error: *mut ErrorText) -> i32>,
    /// Frees an object.
    pub drop: Option<unsafe extern "C" fn(object: *mut c_void)>,
    /// Writes the resolved settings as JSON text.
    pub config: Option<unsafe extern "C" fn(object: *const c_void, json: *const Sink, error: *mut ErrorText) -> i32>,
    /// What the object declares.
    pub capabilities:
        Option<unsafe extern "C" fn(object: *const c_void, out: *mut Capabilities, error: *mut ErrorText) -> i32>,
    /// Functions of a codec, else null.
    pub codec: *const CodecTable,
    /// Functions of a transform, else null.
    pub transform: *const TransformTable,
    /// Functions of an eviction policy, else null.
    pub eviction: *const EvictionTable,
}

/// What the entry point returns.
#[repr(C)]
#[derive(Clone, Copy, Debug, StableAbi)]
pub struct Library {
    /// Bytes of this struct that are filled.
    pub size: u64,
    /// [`ABI_MAJOR`] that it was built with.
    pub abi_major: u32,
    /// [`ABI_MINOR`] that it was built with.
    pub abi_minor: u32,
    /// Its plugins.
    pub plugins: *const *const Plugin,
    /// Number of them.
    pub count: usize,
}

/// A struct that begins with its `size`.
///
/// # Safety
/// The struct is `repr(C)`, its first field is `size: u64`, it has no padding, and all bytes zero are a value of it.
pub unsafe trait Sized64: Copy {}

macro_rules! sized {
    ($($name:ident)*) => {
        $(
            // SAFETY: as the definitions above show; that there is no padding is tested with the offsets.
            unsafe impl Sized64 for $name {}
        )*
    };
}

sized! { Rope Context Capabilities Geometry AttentionStep CacheView Host CodecTable TransformTable EvictionTable Plugin Library }

/// Bytes of a struct, as its own `size` field states them.
pub const fn size_of<T: Sized64>() -> u64 {
    std::mem::size_of::<T>() as u64
}

/// Reads a struct as far as its `size` says; what the other side does not know stays zero.
///
/// `None` if it is null or shorter than in version 1.0.
///
/// # Safety
/// `place` is null or points to a struct that is readable for as many bytes as its first field says, aligned as `T` is.
pub(crate) unsafe fn read<T: Sized64>(place: *const T) -> Option<T> {
    if place.is_null() {
        return None;
    }
    let known = std::mem::size_of::<T>();
    // SAFETY: not null, and readable and aligned as the caller promises; the first field is a `u64`.
    let size = unsafe { place.cast::<u64>().read() };
    // All fields are of version 1.0 so far. When one is appended, the least size stays what it is now.
    if size < known as u64 {
        return None;
    }
    // SAFETY: readable for `size` bytes, which are at least as many as `T` has.
    Some(unsafe { place.read() })
}
