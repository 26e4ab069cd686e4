//! Tensors: shapes, element types and borrowed chunks of one layer and role.

use std::fmt;
use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE 754 binary32.
    F32,
}

impl DType {
    /// Every element type, in stored order.
    pub const ALL: [Self; 3] = [Self::F16, Self::Bf16, Self::F32];

    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// The name used in configs, tables and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether a tensor holds keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Keys, after `RoPE`.
    Key,
    /// Values.
    Value,
}

impl Role {
    /// Both roles, in stored order: keys come first so that values may be coded with them as context.
    pub const ALL: [Self; 2] = [Self::Key, Self::Value];

    /// The name used in configs, tables and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Value => "value",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Phase of the request in which tokens were appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The prompt.
    Prefill,
    /// One generated token, or a few.
    Decode,
    /// The dump does not say.
    Unknown,
}

impl Stage {
    /// The name used in dumps, tables and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Extent of a tensor in logical order `(seq, heads, dim)`, row-major, `dim` fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Shape {
    /// Tokens.
    pub seq: usize,
    /// KV heads.
    pub heads: usize,
    /// Channels per head.
    pub dim: usize,
}

impl Shape {
    /// A shape from its three extents.
    pub const fn new(seq: usize, heads: usize, dim: usize) -> Self {
        Self { seq, heads, dim }
    }

    /// A flat lane of `len` elements: `(len, 1, 1)`.
    pub const fn flat(len: usize) -> Self {
        Self::new(len, 1, 1)
    }

    /// Elements of one token.
    ///
    /// Saturates: no slice has that many elements, so a later length check refuses it.
    pub const fn row(self) -> usize {
        self.heads.saturating_mul(self.dim)
    }

    /// Elements in all.
    ///
    /// Saturates like [`Shape::row`].
    pub const fn elements(self) -> usize {
        self.seq.saturating_mul(self.row())
    }

    /// The same heads and channels with another number of tokens.
    #[must_use]
    pub const fn with_seq(self, seq: usize) -> Self {
        Self { seq, ..self }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({}, {}, {})", self.seq, self.heads, self.dim)
    }
}

fn check_len(shape: Shape, dtype: DType, len: usize) -> Result<()> {
    let expected = shape.elements().saturating_mul(dtype.size());
    if len == expected {
        return Ok(());
    }
    Err(Error::shape(format!("{dtype} tensor of shape {shape}: expected {expected} bytes, got {len}")))
}

/// A borrowed run of tokens of one layer and role, little-endian.
///
/// # Examples
/// ```
/// use gearbox_core::{Chunk, DType, Shape};
///
/// let bytes = [0u8; 24];
/// let chunk = Chunk::new(Shape::new(3, 2, 2), DType::F16, &bytes).unwrap();
/// assert_eq!(chunk.tokens(1..3).shape(), Shape::new(2, 2, 2));
/// assert!(Chunk::new(Shape::new(3, 2, 2), DType::F32, &bytes).is_err());
/// ```
#[derive(Clone, Copy)]
pub struct Chunk<'a> {
    shape: Shape,
    dtype: DType,
    bytes: &'a [u8],
}

impl<'a> Chunk<'a> {
    /// Wraps bytes.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](crate::ErrorKind::ShapeMismatch) unless `bytes` has exactly the length of the shape.
    pub fn new(shape: Shape, dtype: DType, bytes: &'a [u8]) -> Result<Self> {
        check_len(shape, dtype, bytes.len())?;
        Ok(Self { shape, dtype, bytes })
    }

    /// Extent in `(seq, heads, dim)`.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements, little-endian, in logical order.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// A run of its tokens.
    ///
    /// # Panics
    /// If the range ends behind the last token.
    #[must_use]
    pub fn tokens(&self, range: Range<usize>) -> Self {
        let row = self.shape.row() * self.dtype.size();
        Self {
            shape: self.shape.with_seq(range.len()),
            dtype: self.dtype,
            bytes: &self.bytes[range.start * row..range.end * row],
        }
    }
}

impl fmt::Debug for Chunk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chunk({} {})", self.dtype, self.shape)
    }
}

/// A chunk whose elements are to be filled.
pub struct ChunkMut<'a> {
    shape: Shape,
    dtype: DType,
    bytes: &'a mut [u8],
}

impl<'a> ChunkMut<'a> {
    /// Wraps bytes.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](crate::ErrorKind::ShapeMismatch) unless `bytes` has exactly the length of the shape.
    pub fn new(shape: Shape, dtype: DType, bytes: &'a mut [u8]) -> Result<Self> {
        check_len(shape, dtype, bytes.len())?;
        Ok(Self { shape, dtype, bytes })
    }

    /// Extent in `(seq, heads, dim)`.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements, little-endian, in logical order.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes
    }
}

impl fmt::Debug for ChunkMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkMut({} {})", self.dtype, self.shape)
    }
}

/// How a model rotates its keys and queries (rotary position embedding).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Which channels form a pair.
    pub pairing: RopePairing,
    /// Base of the geometric series of frequencies, such as 10000.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub theta: f64,
    /// Channels that are rotated, counted from the first; even.
    #[schemars(range(min = 2))]
    pub rotary_dim: usize,
    /// Change of the frequencies for long contexts.
    #[serde(default)]
    pub scaling: RopeScaling,
}

/// Which channels one rotation turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RopePairing {
    /// `(2i, 2i + 1)`, as GPT-J does.
    Adjacent,
    /// `(i, i + rotary_dim / 2)`, as Llama does.
    HalfSplit,
}

/// Change of the `RoPE` frequencies for contexts longer than the model was trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum RopeScaling {
    /// Frequencies as they are.
    #[default]
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Divisor of all frequencies.
        #[schemars(extend("exclusiveMinimum" = 0))]
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, with a smooth step between (Llama 3.1).
    Llama3 {
        /// Divisor of low frequencies.
        #[schemars(extend("exclusiveMinimum" = 0))]
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are scaled in full.
        #[schemars(extend("exclusiveMinimum" = 0))]
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        #[schemars(extend("exclusiveMinimum" = 0))]
        high_freq_factor: f64,
        /// Context length the model was trained on, in tokens.
        original_context: u32,
    },
}
