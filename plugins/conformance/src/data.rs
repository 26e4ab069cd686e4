//! Deterministic lanes to test with: the same name, shape and seed give the same bytes on every machine, for ever.
//!
//! Goldens are compared with what this module makes, so a change of its output is a new [`DataKind`], never an edit.

use std::fmt;

use gearbox_core::{Chunk, Context, DType, Elem, LaneSpec, Needs, Role, Rope, RopePairing, RopeScaling, Shape};

/// A small fast generator of random numbers with one word of state.
///
/// # Source
/// Steele, Lea, Flood, *Fast splittable pseudorandom number generators*, 2014; differences from it: none.
///
/// # Examples
/// ```
/// use gearbox_conformance::data::SplitMix64;
///
/// assert_eq!(SplitMix64::new(0).next_u64(), 0xE220_A839_7B1D_CDAF);
/// ```
#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// A generator with this seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let a = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let b = (a ^ a >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        b ^ b >> 31
    }

    /// A number below `end`, which is at least 1; the bias is below 2⁻³² for the small `end` of tests.
    pub fn below(&mut self, end: u32) -> u32 {
        (((self.next_u64() >> 32) * u64::from(end)) >> 32) as u32
    }
}

/// Tokens after which [`DataKind::Repeats`] repeats.
const REPEATS_PERIOD: u32 = 3;

/// Tokens of the history in [`Surroundings`].
const HISTORY: usize = 8;

/// Token ids are below this: few, so that they meet again after few rows, while a [`DataKind::Walk`] is still near.
const TOKENS: u32 = 3;

/// A part of a context: its name and its place in [`Needs`].
pub(crate) type Part = (&'static str, fn(&mut Needs) -> &mut bool);

/// Each part of a context.
pub(crate) const PARTS: [Part; 4] = [
    ("token ids", |parts| &mut parts.tokens),
    ("rotation", |parts| &mut parts.rope),
    ("peer", |parts| &mut parts.peer),
    ("history", |parts| &mut parts.history),
];

/// What is wrong with a plugin that works without a part it needs.
pub(crate) const GUESSED: &str = "expected encoding and decoding to fail, since it is declared as needed";

/// Every part of a context.
pub(crate) const WHOLE: Needs = Needs { tokens: true, rope: true, peer: true, history: true };

/// What the elements of a generated lane look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DataKind {
    /// A random walk along the tokens of every channel, as KV data does.
    Walk,
    /// A walk of three tokens that repeats.
    Repeats,
    /// One value.
    Constant,
    /// Zeros.
    Zeros,
    /// Every element another value, as far as the width goes.
    Distinct,
    /// Random bits.
    Noise,
    /// Edges: ±0, subnormals, ±Inf, quiet and signalling NaN with payloads; for integers the ends and the middle.
    Special,
    /// Every 16-bit pattern in order (the upper half of 32-bit elements), see [`DataKind::PATTERNS_SHAPE`].
    Patterns,
}

impl DataKind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Walk,
        Self::Repeats,
        Self::Constant,
        Self::Zeros,
        Self::Distinct,
        Self::Noise,
        Self::Special,
        Self::Patterns,
    ];

    /// A shape of 65536 elements, so that [`DataKind::Patterns`] is complete.
    pub const PATTERNS_SHAPE: Shape = Shape::new(64, 8, 128);

    /// The name used in messages and file names.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Walk => "walk",
            Self::Repeats => "repeats",
            Self::Constant => "constant",
            Self::Zeros => "zeros",
            Self::Distinct => "distinct",
            Self::Noise => "noise",
            Self::Special => "special",
            Self::Patterns => "patterns",
        }
    }
}

impl fmt::Display for DataKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Every lane element type: the fixed ones and each width of [`Elem::Bits`].
pub fn elements() -> Vec<Elem> {
    let fixed = [Elem::F16, Elem::Bf16, Elem::F32, Elem::U8, Elem::U16, Elem::U32];
    fixed.into_iter().chain((1..=16).map(Elem::Bits)).collect()
}

/// The fixed element types, and two widths that stand for all: one below and one above a byte.
pub fn typical_elements() -> Vec<Elem> {
    let typical = |elem: &Elem| !matches!(elem, Elem::Bits(bits) if ![4, 10].contains(bits));
    elements().into_iter().filter(typical).collect()
}

/// Shapes that every kind of data is tried with.
pub(crate) const DATA_SHAPES: [Shape; 4] =
    [Shape::new(1, 1, 1), Shape::new(2, 1, 64), Shape::new(7, 3, 5), Shape::new(33, 2, 32)];

/// Shapes without elements.
pub(crate) const EMPTY_SHAPES: [Shape; 5] =
    [Shape::new(0, 8, 128), Shape::new(0, 1, 1), Shape::new(5, 0, 64), Shape::new(5, 8, 0), Shape::new(0, 0, 0)];

/// Every shape of a grid: small ones with all element types, larger ones with typical ones, large ones with one of them each in turn.
pub(crate) fn grid(all: &[Elem], typical: &[Elem]) -> Vec<(Elem, Shape)> {
    let (heads, dims) = ([1, 8], [1, 64, 80, 128]);
    let mut grid = Vec::new();
    for (s, seq) in [0, 1, 2, 15, 16, 17, 127, 128, 129, 1000].into_iter().enumerate() {
        for (h, heads) in heads.into_iter().enumerate() {
            for (d, dim) in dims.into_iter().enumerate() {
                let shape = Shape::new(seq, heads, dim);
                // Turned by one per length, or a type would always meet the same heads and channels.
                let turn = (s + h * dims.len() + d) % typical.len();
                let elems = match shape.elements() {
                    0..=1024 => all,
                    1025..=8192 => typical,
                    _ => &typical[turn..=turn],
                };
                grid.extend(elems.iter().map(|elem| (*elem, shape)));
            }
        }
    }
    grid
}

/// The lane of these elements: the tensor itself for floats, codes otherwise.
pub fn lane_spec(elem: Elem, shape: Shape) -> LaneSpec {
    elem.dtype().map_or_else(|| LaneSpec::new("codes", elem, shape), |dtype| LaneSpec::tensor(dtype, shape))
}

/// The bytes of a lane.
///
/// # Examples
/// ```
/// use gearbox_conformance::data::{DataKind, generate, lane_spec};
/// use gearbox_core::{Elem, Shape};
///
/// let spec = lane_spec(Elem::Bits(3), Shape::new(4, 1, 2));
/// let bytes = generate(&spec, DataKind::Noise, 1);
/// assert_eq!(bytes.len(), 8);
/// assert!(bytes.iter().all(|byte| *byte < 8));
/// ```
pub fn generate(spec: &LaneSpec, kind: DataKind, seed: u64) -> Vec<u8> {
    let mut random = SplitMix64::new(seed);
    let (elem, count) = (spec.elem, spec.shape.elements());
    let mask = u32::MAX >> (32 - width(elem));
    match kind {
        DataKind::Walk => walk(elem, spec.shape, &mut random),
        DataKind::Repeats => {
            let period = walk(elem, spec.shape.with_seq(REPEATS_PERIOD as usize), &mut random);
            period.iter().copied().cycle().take(spec.byte_len()).collect()
        }
        DataKind::Constant => {
            let value = random.next_u64() as u32 & mask;
            collect(elem, (0..count).map(|_| value))
        }
        DataKind::Zeros => vec![0; spec.byte_len()],
        DataKind::Distinct => {
            // An odd factor permutes the numbers of any width.
            let start = random.next_u64() as u32;
            collect(elem, (0..count).map(|i| start.wrapping_add(i as u32).wrapping_mul(0x9E37_79B1) & mask))
        }
        DataKind::Noise => collect(elem, (0..count).map(|_| random.next_u64() as u32 & mask)),
        DataKind::Special => {
            let edges = edges(elem);
            collect(elem, (0..count).map(|_| edges[random.below(edges.len() as u32) as usize]))
        }
        DataKind::Patterns if elem.size() == 4 => {
            collect(elem, (0..count).map(|i| (i as u32) << 16 | random.next_u64() as u32 & 0xFFFF))
        }
        DataKind::Patterns => collect(elem, (0..count).map(|i| i as u32 & mask)),
    }
}

/// The value of a float, little-endian; not a number for integers.
pub(crate) fn value(elem: Elem, bytes: &[u8]) -> f64 {
    let Some(mantissa) = mantissa(elem) else { return f64::NAN };
    let bits = bytes.iter().rev().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
    let sign = if bits >> (width(elem) - 1) == 0 { 1.0 } else { -1.0 };
    let largest = (1 << (width(elem) - 1 - mantissa)) - 1;
    let (exponent, fraction) = ((bits >> mantissa & largest).cast_signed(), bits & ((1 << mantissa) - 1));
    let scale = largest.cast_signed() / 2 + mantissa.cast_signed();
    let magnitude = match exponent.cast_unsigned() {
        0 => f64::from(fraction) * 2f64.powi(1 - scale),
        exponent if exponent < largest => {
            f64::from(fraction | 1 << mantissa) * 2f64.powi(exponent.cast_signed() - scale)
        }
        _ if fraction == 0 => f64::INFINITY,
        _ => f64::NAN,
    };
    sign * magnitude
}

/// Bits that an element may use.
pub(crate) fn width(elem: Elem) -> u32 {
    match elem {
        Elem::Bits(bits) => u32::from(bits.clamp(1, 16)),
        other => other.size() as u32 * 8,
    }
}

/// Bits of the mantissa; `None` for integers.
pub(crate) fn mantissa(elem: Elem) -> Option<u32> {
    match elem {
        Elem::F16 => Some(10),
        Elem::Bf16 => Some(7),
        Elem::F32 => Some(23),
        _ => None,
    }
}

/// The bytes of elements.
pub(crate) fn collect(elem: Elem, values: impl Iterator<Item = u32>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.size_hint().0.saturating_mul(elem.size()));
    for value in values {
        bytes.extend_from_slice(&value.to_le_bytes()[..elem.size()]);
    }
    bytes
}

fn walk(elem: Elem, shape: Shape, random: &mut SplitMix64) -> Vec<u8> {
    // Magnitudes of floats are ordered like their bits, so the walk runs on integers and is exact everywhere.
    let sign = 1 << (width(elem) - 1);
    let top = u32::MAX >> (32 - width(elem));
    let (end, step) = match mantissa(elem) {
        // Infinity is not reached; a step is up to a quarter of a power of two.
        Some(mantissa) => ((sign - 1) - (1 << mantissa), 1 << (mantissa - 2)),
        None => (top, (top / 16).max(1)),
    };
    let mut channels: Vec<(u32, u32)> = (0..shape.row())
        .map(|_| match mantissa(elem) {
            Some(mantissa) => {
                // Exponents of 2⁻⁴ to 2¹.
                let exponent = (end >> mantissa) / 2 - random.below(6) + 1;
                (exponent << mantissa | random.below(1 << mantissa), random.below(2) * sign)
            }
            None => (top / 4 + random.below(top / 2 + 1), 0),
        })
        .collect();
    let mut bytes = Vec::with_capacity(shape.elements().saturating_mul(elem.size()));
    for _ in 0..shape.seq {
        for (magnitude, channel_sign) in &mut channels {
            let moved = (u64::from(*magnitude) + u64::from(random.below(2 * step + 1))).saturating_sub(u64::from(step));
            *magnitude = moved.min(u64::from(end)) as u32;
            let flip = if mantissa(elem).is_some() && random.below(16) == 0 { sign } else { 0 };
            let value = *magnitude | (*channel_sign ^ flip);
            bytes.extend_from_slice(&value.to_le_bytes()[..elem.size()]);
        }
    }
    bytes
}

fn edges(elem: Elem) -> Vec<u32> {
    let top = u32::MAX >> (32 - width(elem));
    let Some(mantissa) = mantissa(elem) else {
        return vec![0, 1 & top, top / 2, top / 2 + 1, top.saturating_sub(1), top, top / 3, top / 3 * 2];
    };
    let sign = 1 << (width(elem) - 1);
    let infinity = (sign - 1) >> mantissa << mantissa;
    let quiet = 1 << (mantissa - 1);
    let magnitudes = [
        0,
        1,                                      // smallest subnormal
        (1 << mantissa) - 1,                    // largest subnormal
        1 << mantissa,                          // smallest normal
        infinity - 1,                           // largest finite
        infinity,                               // infinity
        infinity | 1,                           // signalling NaN
        infinity | (quiet - 1),                 // signalling NaN, whole payload
        infinity | quiet,                       // the usual NaN
        infinity | quiet | 5,                   // quiet NaN with a payload
        sign - 1,                               // quiet NaN, whole payload
        (infinity / 2) >> mantissa << mantissa, // 1
    ];
    magnitudes.into_iter().flat_map(|magnitude| [magnitude, magnitude | sign]).collect()
}

/// A lane by name: what a message prints is all that is needed to make it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Element type and shape.
    pub spec: LaneSpec,
    /// What the elements look like.
    pub kind: DataKind,
    /// Seed of the generator.
    pub seed: u64,
}

impl Case {
    /// A case over the usual lane of an element type, see [`lane_spec`].
    pub fn new(elem: Elem, shape: Shape, kind: DataKind, seed: u64) -> Self {
        Self { spec: lane_spec(elem, shape), kind, seed }
    }

    /// A case whose seed is made from its shape.
    pub(crate) fn seeded(elem: Elem, shape: Shape, kind: DataKind) -> Self {
        let seed = [shape.seq, shape.heads, shape.dim].into_iter().fold(0, |seed, extent| seed * 131 + extent as u64);
        Self::new(elem, shape, kind, seed)
    }

    /// The elements.
    pub fn bytes(&self) -> Vec<u8> {
        generate(&self.spec, self.kind, self.seed)
    }

    /// What encoder and decoder both know beside the lane, as far as `parts` asks for it.
    pub fn surroundings(&self, parts: Needs) -> Surroundings {
        let shape = self.spec.shape;
        let dtype = self.spec.elem.dtype().unwrap_or(DType::F16);
        let mut random = SplitMix64::new(self.seed ^ 0x746F_6B65_6E73);
        let chunk = |wanted: bool, shape: Shape, (kind, seed): (DataKind, u64)| {
            wanted.then(|| (shape, generate(&LaneSpec::tensor(dtype, shape), kind, seed)))
        };
        // Where rows repeat, their tokens do too, and the history goes on with both.
        let repeats = self.kind == DataKind::Repeats;
        let mut tokens = |count: usize| -> Vec<u32> {
            (0..count).map(|row| if repeats { row as u32 % REPEATS_PERIOD } else { random.below(TOKENS) }).collect()
        };
        let history = if repeats { (self.kind, self.seed) } else { (DataKind::Walk, self.seed ^ 2) };
        Surroundings {
            dtype,
            end_token: (HISTORY + shape.seq + 3) as u64,
            tokens: parts.tokens.then(|| tokens(shape.seq)),
            history_tokens: (parts.tokens && parts.history).then(|| tokens(HISTORY)),
            rope: parts.rope.then(|| Rope {
                pairing: RopePairing::HalfSplit,
                theta: 10_000.0,
                rotary_dim: shape.dim / 2 * 2,
                scaling: RopeScaling::None,
            }),
            peer: chunk(parts.peer, shape, (DataKind::Walk, self.seed ^ 1)),
            history: chunk(parts.history, shape.with_seq(HISTORY), history),
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}, {}, seed {:#x}", self.spec.elem, self.spec.shape, self.kind, self.seed)
    }
}

/// Owned parts of a [`Context`].
#[derive(Clone, Debug)]
pub struct Surroundings {
    dtype: DType,
    end_token: u64,
    tokens: Option<Vec<u32>>,
    rope: Option<Rope>,
    peer: Option<(Shape, Vec<u8>)>,
    history: Option<(Shape, Vec<u8>)>,
    history_tokens: Option<Vec<u32>>,
}

impl Surroundings {
    fn chunk<'a>(&self, part: Option<&'a (Shape, Vec<u8>)>) -> Option<Chunk<'a>> {
        let (shape, bytes) = part?;
        Chunk::new(*shape, self.dtype, bytes).ok()
    }

    /// The context: values of layer 3 that begin right behind the history, at token 8, in a sequence that ends three tokens behind them.
    pub fn context(&self) -> Context<'_> {
        Context {
            end_token: Some(self.end_token),
            tokens: self.tokens.as_deref(),
            rope: self.rope.as_ref(),
            peer: self.chunk(self.peer.as_ref()),
            history: self.chunk(self.history.as_ref()),
            history_tokens: self.history_tokens.as_deref(),
            ..Context::new(3, Role::Value, HISTORY as u64)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(case: &Case) -> Vec<u32> {
        let size = case.spec.elem.size();
        let value = |element: &[u8]| element.iter().rev().fold(0, |v, byte| v << 8 | u32::from(*byte));
        case.bytes().chunks_exact(size).map(value).collect()
    }

    #[test]
    fn every_kind_fits_its_lane() {
        for elem in elements() {
            for kind in DataKind::ALL {
                for shape in [Shape::new(0, 8, 64), Shape::new(1, 1, 1), Shape::new(5, 2, 3)] {
                    let case = Case::new(elem, shape, kind, 7);
                    assert_eq!(case.bytes().len(), case.spec.byte_len(), "{case}");
                    let top = u32::MAX >> (32 - width(elem));
                    assert!(values(&case).iter().all(|value| *value <= top), "{case}");
                }
            }
        }
    }

    #[test]
    fn walk_of_floats_is_finite_and_smooth() {
        for elem in [Elem::F16, Elem::Bf16, Elem::F32] {
            let case = Case::new(elem, Shape::new(100, 1, 4), DataKind::Walk, 1);
            let magnitude = |value: u32| value & ((1 << (width(elem) - 1)) - 1);
            let infinity = magnitude(u32::MAX) >> mantissa(elem).unwrap() << mantissa(elem).unwrap();
            let values = values(&case);
            assert!(values.iter().all(|value| magnitude(*value) < infinity), "{case}");
            let step = 1 << (mantissa(elem).unwrap() - 2);
            assert!(values.windows(5).all(|w| magnitude(w[0]).abs_diff(magnitude(w[4])) <= step), "{case}");
        }
        let f32s = Case::new(Elem::F32, Shape::new(1, 1, 100), DataKind::Walk, 1);
        let floats = values(&f32s).into_iter().map(|bits| f32::from_bits(bits).abs());
        assert!(floats.into_iter().all(|float| (0.05..5.0).contains(&float)));
    }

    #[test]
    fn distinct_elements_are_distinct() {
        let mut values = values(&Case::new(Elem::U16, DataKind::PATTERNS_SHAPE, DataKind::Distinct, 3));
        values.sort_unstable();
        values.dedup();
        assert_eq!(values.len(), 65536);
    }

    #[test]
    fn values_of_floats_are_what_their_bits_say() {
        let same = |elem: Elem, bits: u32, expected: f64| {
            let got = value(elem, &bits.to_le_bytes()[..elem.size()]);
            assert_eq!(got.to_bits(), expected.to_bits(), "{elem} {bits:#x}: {got}, {expected}");
        };
        for (bits, expected) in [(0x3C00, 1.0), (0xC000, -2.0), (0x7BFF, 65504.0), (1, 2f64.powi(-24)), (0x8000, -0.0)]
        {
            same(Elem::F16, bits, expected);
        }
        same(Elem::Bf16, 0xBFC0, -1.5);
        for float in [1.0f32, -0.1, f32::MAX, f32::MIN_POSITIVE, 1e-45, f32::NEG_INFINITY] {
            same(Elem::F32, float.to_bits(), float.into());
        }
        assert!(value(Elem::F16, &[0x01, 0x7C]).is_nan());
    }

    #[test]
    fn edges_of_floats_hold_both_kinds_of_nan() {
        let edges = edges(Elem::F32);
        for pattern in [0, 0x8000_0000, 1, 0x7F80_0000, 0xFF80_0000, 0x7F80_0001, 0x7FC0_0000, 0xFFFF_FFFF, 0x3F80_0000]
        {
            assert!(edges.contains(&pattern), "{pattern:#x}");
        }
        assert!(super::edges(Elem::F16).contains(&0x7C01), "signalling NaN");
    }

    #[test]
    fn patterns_are_complete() {
        let f16 = values(&Case::new(Elem::F16, DataKind::PATTERNS_SHAPE, DataKind::Patterns, 1));
        assert!(f16.into_iter().eq(0..65536));
        let f32 = values(&Case::new(Elem::F32, DataKind::PATTERNS_SHAPE, DataKind::Patterns, 1));
        assert!(f32.into_iter().map(|value| value >> 16).eq(0..65536));
    }

    #[test]
    fn output_never_changes() {
        // Goldens of every plugin depend on these bytes: add kinds, never edit one.
        let hash = |kind| {
            let lanes = elements().into_iter().map(|elem| Case::new(elem, Shape::new(5, 2, 3), kind, 1).bytes());
            // FNV-1a.
            lanes
                .flatten()
                .fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
        };
        let expected = [
            0xCB30_9149_67FF_A2EC,
            0xD0CD_77EA_0182_FC70,
            0xDCB7_415D_51BB_9A03,
            0x2AB6_87EE_DAAC_4D2D,
            0x2265_2A72_DDDF_6ADB,
            0x477A_97B8_4EC2_8A85,
            0x4405_885F_CA6B_F1E9,
            0xDDA5_7A67_8E89_610F,
        ];
        assert_eq!(DataKind::ALL.map(hash), expected, "got {:#x?}", DataKind::ALL.map(hash));
    }
}
