//! Lanes: the homogeneous arrays that codecs encode.

use std::borrow::Cow;
use std::fmt;

use crate::{Chunk, DType, Error, Result, Shape};

/// Element type of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Elem {
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE 754 binary32.
    F32,
    /// Unsigned byte.
    U8,
    /// Unsigned 16-bit integer.
    U16,
    /// Unsigned 32-bit integer.
    U32,
    /// Unsigned integer of 1 to 16 bits.
    ///
    /// In memory it takes one byte up to 8 bits and a little-endian `u16` above; what is stored is up to the codec.
    Bits(u8),
}

impl Elem {
    /// Bytes per element in memory.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bits(bits) => {
                if bits <= 8 {
                    1
                } else {
                    2
                }
            }
            Self::F16 | Self::Bf16 | Self::U16 => 2,
            Self::F32 | Self::U32 => 4,
        }
    }

    /// The tensor type with the same elements, if there is one.
    pub const fn dtype(self) -> Option<DType> {
        match self {
            Self::F16 => Some(DType::F16),
            Self::Bf16 => Some(DType::Bf16),
            Self::F32 => Some(DType::F32),
            _ => None,
        }
    }
}

impl From<DType> for Elem {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::Bf16 => Self::Bf16,
            DType::F32 => Self::F32,
        }
    }
}

impl fmt::Display for Elem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F16 => f.write_str("f16"),
            Self::Bf16 => f.write_str("bf16"),
            Self::F32 => f.write_str("f32"),
            Self::U8 => f.write_str("u8"),
            Self::U16 => f.write_str("u16"),
            Self::U32 => f.write_str("u32"),
            Self::Bits(bits) => write!(f, "bits({bits})"),
        }
    }
}

/// A set of lane element types; [`ElemSet::BITS`] stands for every width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ElemSet(u8);

impl ElemSet {
    /// IEEE 754 binary16.
    pub const F16: Self = Self(1);
    /// bfloat16.
    pub const BF16: Self = Self(1 << 1);
    /// IEEE 754 binary32.
    pub const F32: Self = Self(1 << 2);
    /// Unsigned byte.
    pub const U8: Self = Self(1 << 3);
    /// Unsigned 16-bit integer.
    pub const U16: Self = Self(1 << 4);
    /// Unsigned 32-bit integer.
    pub const U32: Self = Self(1 << 5);
    /// [`Elem::Bits`] of every width.
    pub const BITS: Self = Self(1 << 6);
    /// The three tensor types.
    pub const FLOATS: Self = Self(0b111);
    /// Everything.
    pub const ALL: Self = Self(0b111_1111);

    /// Both sets together.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the set holds this type.
    pub const fn contains(self, elem: Elem) -> bool {
        let bit = match elem {
            Elem::F16 => Self::F16,
            Elem::Bf16 => Self::BF16,
            Elem::F32 => Self::F32,
            Elem::U8 => Self::U8,
            Elem::U16 => Self::U16,
            Elem::U32 => Self::U32,
            Elem::Bits(_) => Self::BITS,
        };
        self.0 & bit.0 != 0
    }
}

impl fmt::Display for ElemSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = ["f16", "bf16", "f32", "u8", "u16", "u32", "bits"];
        let held: Vec<_> = (0..names.len()).filter(|i| self.0 & (1 << i) != 0).map(|i| names[i]).collect();
        f.write_str(&held.join(", "))
    }
}

/// Name, element type and shape of a lane: all that a decoder knows besides the stored bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneSpec {
    /// Name within its chunk, such as `codes`; the untransformed tensor is [`LaneSpec::TENSOR`].
    pub name: Cow<'static, str>,
    /// Element type.
    pub elem: Elem,
    /// Extent in `(seq, heads, dim)`; lanes without those axes are [`Shape::flat`].
    pub shape: Shape,
}

impl LaneSpec {
    /// Name of the lane that is the tensor itself.
    pub const TENSOR: &'static str = "tensor";

    /// A lane with a name.
    pub fn new(name: impl Into<Cow<'static, str>>, elem: Elem, shape: Shape) -> Self {
        Self { name: name.into(), elem, shape }
    }

    /// The lane of an untransformed tensor.
    pub fn tensor(dtype: DType, shape: Shape) -> Self {
        Self::new(Self::TENSOR, dtype.into(), shape)
    }

    /// Bytes of the lane in memory; saturates like [`Shape::elements`].
    pub fn byte_len(&self) -> usize {
        self.shape.elements().saturating_mul(self.elem.size())
    }
}

impl fmt::Display for LaneSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lane `{}` ({} {})", self.name, self.elem, self.shape)
    }
}

/// A borrowed lane: what a codec encodes.
#[derive(Clone, Copy, Debug)]
pub struct LaneRef<'a> {
    spec: &'a LaneSpec,
    bytes: &'a [u8],
}

impl<'a> LaneRef<'a> {
    /// Wraps bytes.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](crate::ErrorKind::ShapeMismatch) unless `bytes` has exactly the length of the spec.
    pub fn new(spec: &'a LaneSpec, bytes: &'a [u8]) -> Result<Self> {
        let expected = spec.byte_len();
        if bytes.len() == expected {
            return Ok(Self { spec, bytes });
        }
        Err(Error::shape(format!("{spec}: expected {expected} bytes, got {}", bytes.len())))
    }

    /// Name, element type and shape.
    pub fn spec(&self) -> &'a LaneSpec {
        self.spec
    }

    /// The elements, little-endian.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

/// An owned lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lane {
    /// Name, element type and shape.
    pub spec: LaneSpec,
    /// The elements, little-endian; as long as the spec says.
    pub bytes: Vec<u8>,
}

/// All lanes of a transformed chunk, in the order in which they are stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latents {
    lanes: Vec<Lane>,
}

impl Latents {
    /// No lanes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a lane of zeros and returns its bytes to fill.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](crate::ErrorKind::ShapeMismatch) if the name is taken.
    pub fn push(&mut self, spec: LaneSpec) -> Result<&mut [u8]> {
        let bytes = vec![0; spec.byte_len()];
        self.push_lane(Lane { spec, bytes })?;
        Ok(self.lanes.last_mut().map(|lane| lane.bytes.as_mut_slice()).unwrap_or_default())
    }

    /// Adds a lane.
    ///
    /// # Errors
    /// [`ErrorKind::ShapeMismatch`](crate::ErrorKind::ShapeMismatch) if the name is taken or the bytes have another length than the spec says.
    pub fn push_lane(&mut self, lane: Lane) -> Result<()> {
        LaneRef::new(&lane.spec, &lane.bytes)?;
        if self.lanes.iter().any(|other| other.spec.name == lane.spec.name) {
            return Err(Error::shape(format!("two lanes are named `{}`", lane.spec.name)));
        }
        self.lanes.push(lane);
        Ok(())
    }

    /// The lane of this name.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) if there is none: an inverse asks only for what its forward wrote.
    pub fn lane(&self, name: &str) -> Result<&Lane> {
        self.lanes.iter().find(|lane| lane.spec.name == name).ok_or_else(|| {
            let held: Vec<_> = self.lanes.iter().map(|lane| format!("`{}`", lane.spec.name)).collect();
            Error::corrupt(format!("lane `{name}` is missing, got {}", held.join(", ")))
        })
    }

    /// Removes and returns the lane of this name.
    pub fn take(&mut self, name: &str) -> Option<Lane> {
        let idx = self.lanes.iter().position(|lane| lane.spec.name == name)?;
        Some(self.lanes.remove(idx))
    }

    /// All lanes in order.
    pub fn lanes(&self) -> &[Lane] {
        &self.lanes
    }

    /// All lanes in order, owned.
    pub fn into_lanes(self) -> Vec<Lane> {
        self.lanes
    }
}

impl Lane {
    /// The lane as a tensor.
    ///
    /// # Errors
    /// [`ErrorKind::UnsupportedDType`](crate::ErrorKind::UnsupportedDType) if its elements are not floats.
    pub fn as_chunk(&self) -> Result<Chunk<'_>> {
        let dtype = self.spec.elem.dtype().ok_or_else(|| {
            Error::new(crate::ErrorKind::UnsupportedDType, format!("{}: expected f16, bf16 or f32", self.spec))
        })?;
        Chunk::new(self.spec.shape, dtype, &self.bytes)
    }
}
