//! Coding of one chunk: transforms in order, then a codec per lane, with a stored fallback.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;

use crate::{
    Bound, Capabilities, Chunk, ChunkMut, Codec, Context, DType, Elem, Error, Lane, LaneRef, LaneSpec, Latents, Limits,
    LossyTransform, Needs, Result, ResultExt, Role, Shape, bits,
};

/// How the bytes of a stored lane are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneCoding {
    /// The codec of the lane wrote them.
    Codec,
    /// The lane as it is, [`Elem::Bits`] packed: the codec would have needed as much or more.
    Stored,
}

/// One lane of an encoded chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedLane {
    /// Name, element type and shape.
    pub spec: LaneSpec,
    /// How to read its bytes.
    pub coding: LaneCoding,
    /// Where its bytes lie in [`EncodedChunk::bytes`].
    pub range: Range<usize>,
}

/// An encoded chunk: lanes and their bytes, end to end. Reused between chunks to spare allocations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncodedChunk {
    /// Lanes in stored order.
    pub lanes: Vec<EncodedLane>,
    /// The bytes of all lanes.
    pub bytes: Vec<u8>,
}

/// Bytes that the header of a lane takes in a container, about: number, shape, length and checksum.
const LANE_HEADER: usize = 17;

impl EncodedChunk {
    /// Bytes that it takes in a container, about: its lanes and their headers.
    pub fn stored_len(&self) -> usize {
        self.bytes.len() + self.lanes.len() * LANE_HEADER
    }

    /// The lanes with their bytes, for decoding.
    pub fn lanes(&self) -> impl Iterator<Item = StoredLane<'_>> {
        self.lanes.iter().map(|lane| StoredLane {
            spec: &lane.spec,
            coding: lane.coding,
            bytes: &self.bytes[lane.range.clone()],
        })
    }
}

/// A lane as it is read back.
#[derive(Clone, Copy, Debug)]
pub struct StoredLane<'a> {
    /// Name, element type and shape.
    pub spec: &'a LaneSpec,
    /// How to read its bytes.
    pub coding: LaneCoding,
    /// The stored bytes.
    pub bytes: &'a [u8],
}

/// A lane on its way to its codec.
#[derive(Clone, Debug)]
pub struct RoutedLane<'a> {
    /// Slot of the codec in the pipeline.
    pub slot: usize,
    /// Name, element type and shape.
    pub spec: LaneSpec,
    /// The elements, little-endian; borrowed if they are the tensor itself.
    pub bytes: Cow<'a, [u8]>,
}

/// What codes the chunks of one layer and role.
#[derive(Clone, Debug)]
pub struct ChunkCoder {
    transforms: Vec<Arc<dyn LossyTransform>>,
    /// Lane name to codec and its slot in the pipeline; `*` for the rest.
    codecs: BTreeMap<String, (usize, Arc<dyn Codec>)>,
    needs: Needs,
    context: Needs,
    lossless: bool,
}

impl ChunkCoder {
    pub(crate) fn new(
        transforms: Vec<Arc<dyn LossyTransform>>,
        codecs: BTreeMap<String, (usize, Arc<dyn Codec>)>,
    ) -> Self {
        let lossless = transforms.iter().all(|transform| transform.bound() == Bound::Lossless);
        let declared = transforms.iter().map(|transform| transform.capabilities());
        let declared: Vec<_> = declared.chain(codecs.values().map(|(_, codec)| codec.capabilities())).collect();
        let mut coder = Self { transforms, codecs, needs: Needs::NONE, context: Needs::NONE, lossless };
        for declared in declared {
            coder.add(declared);
        }
        coder
    }

    fn add(&mut self, declared: Capabilities) {
        self.needs = self.needs.or(declared.needs);
        self.context = self.context.or(declared.context());
    }

    pub(crate) fn replace_codec(&mut self, slot: usize, codec: &Arc<dyn Codec>) {
        if self.uses(slot) {
            self.add(codec.capabilities());
        }
        for (_, held) in self.codecs.values_mut().filter(|(place, _)| *place == slot) {
            *held = Arc::clone(codec);
        }
    }

    /// The codec of a lane: by its name, by the name without the index of an earlier transform, or the one for the rest.
    fn find(&self, lane: &str) -> Option<(usize, &dyn Codec)> {
        let bare = side_name(lane).and_then(|(_, name)| self.codecs.get(name));
        let found = self.codecs.get(lane).or(bare).or_else(|| self.codecs.get("*"));
        found.map(|(slot, codec)| (*slot, codec.as_ref()))
    }

    fn codec(&self, lane: &str) -> Result<(usize, &dyn Codec)> {
        self.find(lane).ok_or_else(|| {
            let known: Vec<_> = self.codecs.keys().map(|name| format!("`{name}`")).collect();
            Error::unsupported(format!(
                "no codec for lane `{lane}`: there are codecs for {} and no `*`",
                known.join(", ")
            ))
        })
    }

    /// Whether every bit comes back.
    pub fn is_lossless(&self) -> bool {
        self.lossless
    }

    /// Whether every transform promises a bound on the error.
    pub fn is_bounded(&self) -> bool {
        self.transforms.iter().all(|transform| transform.bound() != Bound::Unbounded)
    }

    /// Whether equal input gives equal bytes, as its plugins declare.
    pub fn is_deterministic(&self) -> bool {
        let transforms = self.transforms.iter().map(|transform| transform.capabilities());
        let codecs = self.codecs.values().map(|(_, codec)| codec.capabilities());
        transforms.chain(codecs).all(|declared| declared.deterministic)
    }

    /// Number of transforms before the codecs.
    pub fn transforms(&self) -> usize {
        self.transforms.len()
    }

    /// The settings of its transforms as they act on tensors of this role and so many channels per head.
    pub(crate) fn effective(&self, role: Role, dim: usize) -> impl Iterator<Item = Value> {
        self.transforms.iter().map(move |transform| transform.effective_config(role, dim))
    }

    /// The parts of the context that its plugins need or want: what a host provides, as far as it has them.
    pub fn context(&self) -> Needs {
        self.context
    }

    /// Checks that tensors of a type can be coded, before any work starts.
    ///
    /// Lanes that a transform will write are known only when it runs; their codecs refuse them then.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) with the reason: element type, or a need that `offered` lacks.
    pub fn check(&self, dtype: DType, offered: Needs) -> Result<()> {
        let needs = self.needs;
        let lacks = [
            (needs.tokens && !offered.tokens, "token ids"),
            (needs.rope && !offered.rope, "RoPE facts"),
            (needs.peer && !offered.peer, "the decoded keys"),
            (needs.history && !offered.history, "decoded earlier tokens"),
        ];
        if let Some((_, what)) = lacks.iter().find(|(lacks, _)| *lacks) {
            return Err(Error::unsupported(format!("a plugin needs {what}, which the dump does not hold")));
        }
        let elem = Elem::from(dtype);
        let codec =
            if self.transforms.is_empty() { Some(self.codec(LaneSpec::TENSOR)?.1.capabilities()) } else { None };
        let transforms = self.transforms.iter().map(|transform| transform.capabilities());
        match codec.into_iter().chain(transforms).find(|takes| !takes.elems.contains(elem)) {
            Some(takes) => Err(Error::unsupported(format!("expected a tensor of {}, got {elem}", takes.elems))),
            None => Ok(()),
        }
    }

    /// Whether the codec in this slot of the pipeline codes any lane of this layer and role.
    pub fn uses(&self, slot: usize) -> bool {
        self.codecs.values().any(|(held, _)| *held == slot)
    }

    /// The lanes that reach the codecs.
    ///
    /// # Errors
    /// What the transforms report; [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) if one writes no tensor for the next, a lane
    /// with a `.` in its name, or a lane without a codec.
    pub fn lanes<'a>(&self, chunk: Chunk<'a>, cx: &Context<'_>) -> Result<Vec<RoutedLane<'a>>> {
        let Some(first) = self.transforms.first() else {
            let (slot, _) = self.codec(LaneSpec::TENSOR)?;
            let spec = LaneSpec::tensor(chunk.dtype(), chunk.shape());
            return Ok(vec![RoutedLane { slot, spec, bytes: Cow::Borrowed(chunk.bytes()) }]);
        };
        self.routed(forward(first.as_ref(), chunk, cx)?, chunk, cx)
    }

    /// The lanes that reach the codecs, from what the first transform gave.
    fn routed<'a>(&self, mut latents: Latents, chunk: Chunk<'_>, cx: &Context<'_>) -> Result<Vec<RoutedLane<'a>>> {
        check_names(0, &latents)?;
        let mut done = Vec::new();
        for (idx, transform) in self.transforms.iter().enumerate().skip(1) {
            let expected = LaneSpec::tensor(chunk.dtype(), chunk.shape());
            let tensor = latents.take(LaneSpec::TENSOR).filter(|lane| lane.spec == expected);
            let tensor = tensor.ok_or_else(|| not_a_tensor(idx - 1, &expected))?;
            done.extend(latents.into_lanes().into_iter().map(|lane| side_lane(idx - 1, lane)));
            latents = forward(transform.as_ref(), tensor.as_chunk()?, cx)?;
            check_names(idx, &latents)?;
        }
        done.extend(latents.into_lanes());
        done.into_iter()
            .map(|Lane { spec, bytes }| Ok(RoutedLane { slot: self.codec(&spec.name)?.0, spec, bytes: bytes.into() }))
            .collect()
    }

    /// Encodes a chunk into `out`, replacing what is there.
    ///
    /// # Errors
    /// What the plugins report, with the lane.
    pub fn encode(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut EncodedChunk) -> Result<()> {
        let [transform] = &self.transforms[..] else {
            return self.encode_lanes(self.lanes(chunk, cx)?, cx, out);
        };
        let latents = forward(transform.as_ref(), chunk, cx)?;
        let other = transform.alternative(chunk, &latents)?;
        self.encode_lanes(self.routed(latents, chunk, cx)?, cx, out)?;
        if let Some(latents) = other {
            let mut other = EncodedChunk::default();
            self.encode_lanes(self.routed(latents, chunk, cx)?, cx, &mut other)?;
            if other.stored_len() < out.stored_len() {
                *out = other;
            }
        }
        Ok(())
    }

    fn encode_lanes(&self, lanes: Vec<RoutedLane<'_>>, cx: &Context<'_>, out: &mut EncodedChunk) -> Result<()> {
        out.lanes.clear();
        out.bytes.clear();
        for RoutedLane { spec, bytes, .. } in lanes {
            let start = out.bytes.len();
            let (_, codec) = self.codec(&spec.name)?;
            let takes = codec.capabilities().elems;
            if !takes.contains(spec.elem) {
                let refused = Error::unsupported(format!("its codec takes {takes}, got {}", spec.elem));
                return Err(refused.context(spec.to_string()));
            }
            let lane = LaneRef::new(&spec, &bytes)?;
            codec.encode(lane, cx, &mut out.bytes).context(|| spec.to_string())?;
            let mut coding = LaneCoding::Codec;
            let stored = stored_len(&spec);
            let encoded = out.bytes.len().checked_sub(start);
            let encoded =
                encoded.ok_or_else(|| Error::invalid_input(format!("the codec of {spec} removed earlier bytes")))?;
            if encoded >= stored {
                out.bytes.truncate(start);
                match spec.elem {
                    Elem::Bits(width) => bits::pack(width, &bytes, &mut out.bytes).context(|| spec.to_string())?,
                    _ => out.bytes.extend_from_slice(&bytes),
                }
                coding = LaneCoding::Stored;
            }
            out.lanes.push(EncodedLane { spec, coding, range: start..out.bytes.len() });
        }
        Ok(())
    }

    /// Decodes a chunk from its stored lanes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt), naming the lane, if the bytes are not what [`ChunkCoder::encode`] writes for
    /// such a chunk;
    /// [`ErrorKind::LimitExceeded`](crate::ErrorKind::LimitExceeded) if a lane is larger than allowed.
    pub fn decode<'a>(
        &self,
        lanes: impl IntoIterator<Item = StoredLane<'a>>,
        cx: &Context<'_>,
        limits: &Limits,
        mut out: ChunkMut<'_>,
    ) -> Result<()> {
        let mut lanes = lanes.into_iter();
        if self.transforms.is_empty() {
            let expected = LaneSpec::tensor(out.dtype(), out.shape());
            let lane = lanes.next().ok_or_else(|| Error::corrupt("chunk has no lane"))?;
            if *lane.spec != expected || lanes.next().is_some() {
                return Err(Error::corrupt(format!("expected only {expected}, got {}", lane.spec)));
            }
            return self.decode_lane(lane, cx, out.bytes_mut());
        }
        let mut latents = Latents::new();
        for lane in lanes {
            let len = lane.spec.byte_len();
            if len > limits.lane {
                return Err(Error::limit(format!("{}: {len} bytes, the limit is {}", lane.spec, limits.lane)));
            }
            let mut bytes = vec![0; len];
            self.decode_lane(lane, cx, &mut bytes)?;
            latents.push_lane(Lane { spec: lane.spec.clone(), bytes })?;
        }
        self.inverse(latents, cx, out)
    }

    fn decode_lane(&self, lane: StoredLane<'_>, cx: &Context<'_>, out: &mut [u8]) -> Result<()> {
        let stored = stored_len(lane.spec);
        match (lane.coding, lane.spec.elem) {
            (LaneCoding::Codec, _) => match self.find(&lane.spec.name) {
                Some((_, codec)) => codec.decode(lane.bytes, lane.spec, cx, out),
                None => Err(Error::corrupt("the pipeline has no codec for it")),
            },
            (LaneCoding::Stored, _) if lane.bytes.len() != stored => {
                Err(Error::corrupt(format!("expected {stored} stored bytes, got {}", lane.bytes.len())))
            }
            (LaneCoding::Stored, Elem::Bits(width)) => bits::unpack(width, lane.bytes, out),
            (LaneCoding::Stored, _) => {
                out.copy_from_slice(lane.bytes);
                Ok(())
            }
        }
        .context(|| lane.spec.to_string())
    }

    fn inverse(&self, mut latents: Latents, cx: &Context<'_>, out: ChunkMut<'_>) -> Result<()> {
        // Lanes of earlier transforms carry their index as a prefix; give each transform its own back.
        let mut own: Vec<Latents> = vec![Latents::new(); self.transforms.len()];
        let last = self.transforms.len() - 1;
        for lane in std::mem::take(&mut latents).into_lanes() {
            let (idx, lane) = side_owner(lane, last);
            own[idx].push_lane(lane)?;
        }
        let (dtype, shape) = (out.dtype(), out.shape());
        let mut out = Some(out);
        for idx in (0..=last).rev() {
            let transform = &self.transforms[idx];
            if idx == 0 {
                let out = out.take().unwrap_or_else(|| unreachable!("the first transform is inverted once"));
                transform.inverse(&own[0], cx, out)?;
            } else {
                let mut bytes = vec![0; shape.elements() * dtype.size()];
                transform.inverse(&own[idx], cx, ChunkMut::new(shape, dtype, &mut bytes)?)?;
                own[idx - 1].push_lane(Lane { spec: LaneSpec::tensor(dtype, shape), bytes })?;
            }
        }
        Ok(())
    }
}

/// Bytes of a lane when it is stored as it is.
pub(crate) fn stored_len(spec: &LaneSpec) -> usize {
    match spec.elem {
        Elem::Bits(width) => bits::packed_len(width, spec.shape.elements()),
        _ => spec.byte_len(),
    }
}

fn forward(transform: &dyn LossyTransform, chunk: Chunk<'_>, cx: &Context<'_>) -> Result<Latents> {
    let mut latents = Latents::new();
    transform.forward(chunk, cx, &mut latents)?;
    Ok(latents)
}

fn not_a_tensor(idx: usize, expected: &LaneSpec) -> Error {
    Error::unsupported(format!("`/transforms/{idx}`: another transform follows, but this one writes no {expected}"))
}

/// Refuses names that could be taken for those of [`side_lane`].
fn check_names(idx: usize, latents: &Latents) -> Result<()> {
    let dotted = latents.lanes().iter().find(|lane| lane.spec.name.contains('.'));
    dotted.map_or(Ok(()), |lane| {
        Err(Error::unsupported(format!(
            "`/transforms/{idx}`: expected lane names without `.`, which ends the index of an earlier transform, got `{}`",
            lane.spec.name
        )))
    })
}

/// Index of the transform and bare name of a lane that [`side_lane`] named.
fn side_name(name: &str) -> Option<(usize, &str)> {
    let (idx, name) = name.split_once('.')?;
    Some((idx.parse().ok()?, name))
}

fn side_lane(idx: usize, lane: Lane) -> Lane {
    let spec = LaneSpec { name: format!("{idx}.{}", lane.spec.name).into(), ..lane.spec };
    Lane { spec, ..lane }
}

fn side_owner(lane: Lane, last: usize) -> (usize, Lane) {
    let owner = side_name(&lane.spec.name).map(|(idx, name)| (idx, name.to_owned()));
    match owner {
        Some((idx, name)) if idx < last => (idx, Lane { spec: LaneSpec { name: name.into(), ..lane.spec }, ..lane }),
        _ => (last, lane),
    }
}

/// Checks that a shape read from a file can be a tensor within the limits, and returns its bytes.
pub(crate) fn checked_bytes(shape: Shape, size: usize, limits: &Limits) -> Result<usize> {
    let bytes =
        shape.seq.checked_mul(shape.heads).and_then(|n| n.checked_mul(shape.dim)).and_then(|n| n.checked_mul(size));
    match bytes {
        Some(bytes) if bytes <= limits.lane => Ok(bytes),
        _ => Err(Error::limit(format!(
            "shape {shape} of {size}-byte elements exceeds the limit of {} bytes",
            limits.lane
        ))),
    }
}
