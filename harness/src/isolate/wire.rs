//! What host and worker say to each other: frames of JSON; tensors and stored bytes travel in shared [buffers](super::shared).
//!
//! A frame is the four bytes of [`MAGIC`], whose last is the version, the length of the text as a little-endian `u32`, and the text.
//! The host asks, the worker answers, and nothing else is ever sent. The worker trusts the host; the host believes no number of the worker.

use std::path::PathBuf;

use gearbox_core::{
    AnyEntry, Bound, CacheGeometry, Capabilities, Chunk, Context, DType, Elem, ElemSet, Error, ErrorKind, KeepSet,
    LaneSpec, Latents, LibraryUse, Needs, Result, Role, Rope, Shape,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::shared::{Part, Parts, part};

/// Begins every frame; the last byte is the version of all that follows.
pub const MAGIC: [u8; 4] = *b"gbw\x01";
/// Bytes of a frame before its text.
pub const HEAD: usize = 8;
/// The longest text of a frame. Keep sets of every head are the longest that occur.
pub const LONGEST: usize = 64 << 20;

/// Puts a message into a frame.
pub fn frame(message: &impl Serialize) -> Result<Vec<u8>> {
    let mut frame = Vec::with_capacity(512);
    frame.extend(MAGIC);
    frame.extend([0; 4]);
    serde_json::to_writer(&mut frame, message).map_err(|error| Error::invalid_input(error.to_string()))?;
    let len = frame.len() - HEAD;
    let len = u32::try_from(len).ok().filter(|_| len <= LONGEST);
    let len = len.ok_or_else(|| Error::limit(format!("expected a message of at most {LONGEST} bytes")))?;
    frame[4..HEAD].copy_from_slice(&len.to_le_bytes());
    Ok(frame)
}

/// The length of the text that follows a head; `None` if it is no head of a frame.
pub fn text_len(head: [u8; HEAD]) -> Option<usize> {
    let [a, b, c, version, len @ ..] = head;
    let len = u32::from_le_bytes(len) as usize;
    ([a, b, c, version] == MAGIC && len <= LONGEST).then_some(len)
}

/// A question of the host, with the number that its answer repeats.
#[derive(Debug, Serialize, Deserialize)]
pub struct Asked {
    /// Counts from one.
    pub number: u64,
    /// Bytes of the input up to the end of its last part.
    pub used: usize,
    /// The question.
    pub ask: Ask,
}

/// An answer of the worker.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answered {
    /// The number of the question.
    pub number: u64,
    /// Processor time of the worker since it began.
    pub cpu_ms: u64,
    /// The answer.
    pub answer: Answer,
}

/// What the host may ask.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ask {
    /// Open the shared buffers: what the host writes, what the worker writes.
    Open { input: PathBuf, output: PathBuf },
    /// List the plugins.
    List,
    /// Build an object and remember it by its number; drop those in `forget` first.
    Build { object: u64, id: String, settings: Value, artifacts: Vec<Part>, forget: Vec<u64> },
    /// `Codec::max_encoded_len`.
    MaxEncodedLen { object: u64, lane: Spec },
    /// `Codec::encode`.
    Encode { object: u64, lane: Spec, bytes: Part, cx: Known },
    /// `Codec::decode`.
    Decode { object: u64, lane: Spec, bytes: Part, cx: Known },
    /// `Codec::train`; the worker asks for samples by [`Answer::More`].
    Train { object: u64 },
    /// The next sample, or none.
    Sample(Option<SampleOf>),
    /// `LossyTransform::effective_config`.
    EffectiveConfig { object: u64, role: Role, dim: usize },
    /// `LossyTransform::forward`.
    Forward { object: u64, chunk: Tensor, cx: Known },
    /// `LossyTransform::alternative`.
    Alternative { object: u64, chunk: Tensor, latents: Vec<LaneOf> },
    /// `LossyTransform::inverse`.
    Inverse { object: u64, latents: Vec<LaneOf>, shape: Shape, dtype: DType, cx: Known },
    /// `EvictionPolicy::session`; it replaces the session before it.
    Session { object: u64, geometry: Geometry },
    /// `EvictionPolicy::retention`.
    Retention { object: u64, geometry: Geometry, seen: u64 },
    /// `EvictionSession::observe`.
    Observe { first_query: u64, queries: usize, tokens: usize, live: Part, probabilities: Part },
    /// `EvictionSession::plan`.
    Plan { seen: u64, tokens: usize, live: Part },
}

/// What the worker may answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done; where a buffer was to be filled, it begins the output.
    Done,
    /// The plugins.
    List(Vec<Listed>),
    /// Facts of the object that was built; none if an artifact is not for it.
    Built(Option<Facts>),
    /// A number of bytes.
    Len(usize),
    /// So many bytes begin the output.
    Bytes(usize),
    /// An artifact of so many bytes begins the output, or nothing was learnt.
    Artifact(Option<usize>),
    /// Lanes in the output, or none.
    Lanes(Option<Vec<LaneOf>>),
    /// Settings.
    Settings(Value),
    /// The next sample, please.
    More,
    /// What a policy promises: most tokens, sinks, recent tokens.
    Retention(Option<u64>, u64, u64),
    /// Tokens to keep.
    Keep(Keep),
    /// It failed.
    Failed { kind: ErrorKind, message: String },
}

/// An entry of a registry.
#[derive(Debug, Serialize, Deserialize)]
pub struct Listed {
    pub kind: String,
    pub id: String,
    pub aliases: Vec<String>,
    pub summary: String,
    pub source: String,
    pub format_version: u32,
    pub schema: Value,
    pub origin: String,
    pub library: Option<LibraryUse>,
}

impl Listed {
    pub fn of(entry: &AnyEntry, library: Option<LibraryUse>) -> Self {
        Self {
            kind: entry.kind().to_string(),
            id: entry.id().to_owned(),
            aliases: entry.aliases().to_vec(),
            summary: entry.summary().to_owned(),
            source: entry.source().to_owned(),
            format_version: entry.format_version(),
            schema: entry.schema().clone(),
            origin: entry.origin().to_owned(),
            library,
        }
    }
}

/// What a built object says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    elems: Vec<String>,
    needs: [bool; 4],
    wants: [bool; 4],
    deterministic: bool,
    streaming: bool,
    /// The settings with every default filled in.
    pub config: Value,
    /// Of transforms.
    pub bound: Option<Promise>,
}

/// [`Bound`] as it travels: its variant, and the bits of its number, which need not be one that JSON has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Promise {
    Lossless,
    Absolute(u64),
    Relative(u64),
    Peak(u64),
    Unbounded,
}

impl From<Bound> for Promise {
    fn from(bound: Bound) -> Self {
        match bound {
            Bound::Lossless => Self::Lossless,
            Bound::Absolute(bound) => Self::Absolute(bound.to_bits()),
            Bound::Relative(bound) => Self::Relative(bound.to_bits()),
            Bound::Peak(bound) => Self::Peak(bound.to_bits()),
            Bound::Unbounded => Self::Unbounded,
        }
    }
}

impl From<Promise> for Bound {
    fn from(promise: Promise) -> Self {
        match promise {
            Promise::Lossless => Self::Lossless,
            Promise::Absolute(bits) => Self::Absolute(f64::from_bits(bits)),
            Promise::Relative(bits) => Self::Relative(f64::from_bits(bits)),
            Promise::Peak(bits) => Self::Peak(f64::from_bits(bits)),
            Promise::Unbounded => Self::Unbounded,
        }
    }
}

/// One element type per member of [`ElemSet`]; a width stands for all.
const ELEMS: [(Elem, ElemSet); 7] = [
    (Elem::F16, ElemSet::F16),
    (Elem::Bf16, ElemSet::BF16),
    (Elem::F32, ElemSet::F32),
    (Elem::U8, ElemSet::U8),
    (Elem::U16, ElemSet::U16),
    (Elem::U32, ElemSet::U32),
    (Elem::Bits(1), ElemSet::BITS),
];

const fn flags(needs: Needs) -> [bool; 4] {
    [needs.tokens, needs.rope, needs.peer, needs.history]
}

const fn needs([tokens, rope, peer, history]: [bool; 4]) -> Needs {
    Needs { tokens, rope, peer, history }
}

impl Facts {
    pub fn new(capabilities: Capabilities, config: Value, bound: Option<Bound>) -> Self {
        let Capabilities { elems, needs, wants, deterministic, streaming } = capabilities;
        let held = ELEMS.iter().filter(|(elem, _)| elems.contains(*elem)).map(|(elem, _)| elem.to_string());
        let (needs, wants) = (flags(needs), flags(wants));
        Self { elems: held.collect(), needs, wants, deterministic, streaming, config, bound: bound.map(Promise::from) }
    }

    /// `None` if it takes no element type, which no plugin can mean.
    pub fn capabilities(&self) -> Option<Capabilities> {
        let held = ELEMS.iter().filter(|(elem, _)| self.elems.contains(&elem.to_string())).map(|(_, set)| *set);
        Some(Capabilities {
            needs: needs(self.needs),
            wants: needs(self.wants),
            deterministic: self.deterministic,
            streaming: self.streaming,
            ..Capabilities::new(held.reduce(ElemSet::or)?)
        })
    }
}

/// [`LaneSpec`] as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    name: String,
    elem: String,
    shape: Shape,
}

impl Spec {
    pub fn of(spec: &LaneSpec) -> Self {
        Self { name: spec.name.to_string(), elem: spec.elem.to_string(), shape: spec.shape }
    }

    /// `None` if there is no such element type.
    pub fn lane(&self) -> Option<LaneSpec> {
        let width = || Some(Elem::Bits(self.elem.strip_prefix("bits(")?.strip_suffix(')')?.parse().ok()?));
        let named = ELEMS.iter().map(|(elem, _)| *elem).find(|elem| elem.to_string() == self.elem);
        Some(LaneSpec::new(self.name.clone(), named.or_else(width)?, self.shape))
    }
}

/// A lane in a buffer.
#[derive(Debug, Serialize, Deserialize)]
pub struct LaneOf {
    pub spec: Spec,
    pub bytes: Part,
}

/// A sample in the input.
#[derive(Debug, Serialize, Deserialize)]
pub struct SampleOf {
    pub spec: Spec,
    pub bytes: Part,
    pub layer: u32,
    pub role: Role,
}

/// A tensor in the input.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Tensor {
    shape: Shape,
    dtype: DType,
    bytes: Part,
}

impl Tensor {
    pub fn put(chunk: Chunk<'_>, parts: &mut Parts<'_>) -> std::io::Result<Self> {
        Ok(Self { shape: chunk.shape(), dtype: chunk.dtype(), bytes: parts.put(chunk.bytes())? })
    }

    pub fn chunk<'a>(&self, input: &'a [u8]) -> Result<Chunk<'a>> {
        Chunk::new(self.shape, self.dtype, bytes(input, self.bytes)?)
    }
}

/// Bytes of the input. The worker's own lengths are checked where they are used.
pub fn bytes(input: &[u8], at: Part) -> Result<&[u8]> {
    part(input, at).ok_or_else(|| {
        let end = at.at.saturating_add(at.len);
        Error::new(ErrorKind::Io, format!("expected {end} bytes in a shared buffer, got {}", input.len()))
    })
}

/// Numbers of four bytes, read from the input.
pub fn words<T>(input: &[u8], at: Part, number: fn([u8; 4]) -> T) -> Result<Vec<T>> {
    Ok(bytes(input, at)?.as_chunks::<4>().0.iter().map(|word| number(*word)).collect())
}

/// [`Context`] as it travels.
#[derive(Debug, Serialize, Deserialize)]
pub struct Known {
    layer: u32,
    role: Role,
    first_token: u64,
    end_token: Option<u64>,
    tokens: Option<Part>,
    rope: Option<Rope>,
    peer: Option<Tensor>,
    history: Option<Tensor>,
    history_tokens: Option<Part>,
}

impl Known {
    pub fn put(cx: &Context<'_>, parts: &mut Parts<'_>) -> std::io::Result<Self> {
        let mut ids = |ids: Option<&[u32]>| ids.map(|ids| parts.put_words(ids, u32::to_le_bytes)).transpose();
        let (tokens, history_tokens) = (ids(cx.tokens)?, ids(cx.history_tokens)?);
        let mut tensor = |chunk: Option<Chunk<'_>>| chunk.map(|chunk| Tensor::put(chunk, parts)).transpose();
        Ok(Self {
            layer: cx.layer,
            role: cx.role,
            first_token: cx.first_token,
            end_token: cx.end_token,
            tokens,
            rope: cx.rope.cloned(),
            peer: tensor(cx.peer)?,
            history: tensor(cx.history)?,
            history_tokens,
        })
    }

    /// Runs something with the context that was sent.
    pub fn with<R>(&self, input: &[u8], work: impl FnOnce(&Context<'_>) -> Result<R>) -> Result<R> {
        let ids = |at: Option<Part>| at.map(|at| words(input, at, u32::from_le_bytes)).transpose();
        let (tokens, history_tokens) = (ids(self.tokens)?, ids(self.history_tokens)?);
        let tensor = |tensor: Option<Tensor>| tensor.map(|tensor| tensor.chunk(input)).transpose();
        work(&Context {
            end_token: self.end_token,
            tokens: tokens.as_deref(),
            rope: self.rope.as_ref(),
            peer: tensor(self.peer)?,
            history: tensor(self.history)?,
            history_tokens: history_tokens.as_deref(),
            ..Context::new(self.layer, self.role, self.first_token)
        })
    }
}

/// [`CacheGeometry`] as it travels.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Geometry {
    layer: u32,
    layers: u32,
    q_heads: usize,
    kv_heads: usize,
    dim: usize,
}

impl From<&CacheGeometry> for Geometry {
    fn from(geometry: &CacheGeometry) -> Self {
        let CacheGeometry { layer, layers, q_heads, kv_heads, dim } = *geometry;
        Self { layer, layers, q_heads, kv_heads, dim }
    }
}

impl From<Geometry> for CacheGeometry {
    fn from(geometry: Geometry) -> Self {
        let Geometry { layer, layers, q_heads, kv_heads, dim } = geometry;
        Self { layer, layers, q_heads, kv_heads, dim }
    }
}

/// [`KeepSet`] as it travels.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    All,
    Shared(Vec<u32>),
    PerHead(Vec<Vec<u32>>),
}

impl From<KeepSet> for Keep {
    fn from(keep: KeepSet) -> Self {
        match keep {
            KeepSet::All => Self::All,
            KeepSet::Shared(tokens) => Self::Shared(tokens),
            KeepSet::PerHead(heads) => Self::PerHead(heads),
        }
    }
}

impl From<Keep> for KeepSet {
    fn from(keep: Keep) -> Self {
        match keep {
            Keep::All => Self::All,
            Keep::Shared(tokens) => Self::Shared(tokens),
            Keep::PerHead(heads) => Self::PerHead(heads),
        }
    }
}

/// Writes lanes.
pub fn put_lanes(latents: &Latents, parts: &mut Parts<'_>) -> std::io::Result<Vec<LaneOf>> {
    let put = |lane: &gearbox_core::Lane| Ok(LaneOf { spec: Spec::of(&lane.spec), bytes: parts.put(&lane.bytes)? });
    latents.lanes().iter().map(put).collect()
}

/// Reads lanes; their bytes are copied.
///
/// # Errors
/// [`ErrorKind::Io`] if one does not lie in the buffer; [`ErrorKind::ShapeMismatch`] for element types that do not exist, lengths that do not
/// fit and names that come twice.
pub fn read_lanes(lanes: &[LaneOf], buffer: &[u8]) -> Result<Latents> {
    let mut latents = Latents::new();
    for LaneOf { spec, bytes: at } in lanes {
        let lane = spec.lane().ok_or_else(|| Error::shape(format!("no element type is called `{}`", spec.elem)))?;
        latents.push_lane(gearbox_core::Lane { spec: lane, bytes: bytes(buffer, *at)?.to_vec() })?;
    }
    Ok(latents)
}
