//! Frame lengths and entropies of one tensor and its heads.

use std::time::{Duration, Instant};

use gearbox_core::{Chunk, DType, Pool, Result, Role, Shape};
use gearbox_plugins::gear::{ByteCounts, Frames, Streams};

use crate::dump::Tensor;

/// What was measured on one tensor, or on one head of it.
///
/// High and low halves have one byte each in tensors of two bytes per element, and two in those of four.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Metrics {
    /// Bytes of the tensor.
    pub raw: u64,
    /// Length of the tensor's frame.
    pub zstd: u64,
    /// Length of the high stream's frame.
    pub hi: u64,
    /// Length of the low stream's frame.
    pub lo: u64,
    /// Length of the frame of the high stream's delta.
    pub hi_delta: u64,
    /// Bits per byte of the tensor.
    pub entropy: f64,
    /// Bits per byte of the high stream.
    pub hi_entropy: f64,
    /// Bits per byte of the low stream.
    pub lo_entropy: f64,
}

impl Metrics {
    /// Bytes of either stream.
    pub fn half(&self) -> u64 {
        self.raw / 2
    }

    /// Both streams apart.
    pub fn split(&self) -> u64 {
        self.hi + self.lo
    }

    /// Both streams apart, the high one as a delta.
    pub fn split_delta(&self) -> u64 {
        self.hi_delta + self.lo
    }
}

/// What was measured on one tensor.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub dtype: DType,
    pub shape: Shape,
    /// All heads together.
    pub whole: Metrics,
    /// One for each head, or none if heads were left out.
    pub heads: Vec<Metrics>,
    /// Time spent in zstd.
    pub zstd_time: Duration,
}

/// Keys and values of one entry.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    pub key: Measured,
    pub value: Measured,
}

impl Pair {
    pub fn role(&self, role: Role) -> &Measured {
        match role {
            Role::Key => &self.key,
            Role::Value => &self.value,
        }
    }
}

/// Measures tensors on many threads; contexts and buffers are kept between them.
pub(super) struct Measurer {
    level: i32,
    heads: bool,
    pool: Pool<Scratch>,
}

struct Scratch {
    streams: Streams,
    frames: Frames,
    gathered: Vec<u8>,
    zstd_time: Duration,
}

impl Measurer {
    /// With `heads`, each head is measured too.
    pub fn new(level: i32, heads: bool) -> Self {
        Self { level, heads, pool: Pool::default() }
    }

    /// Measures one tensor.
    pub fn measure(&self, tensor: &Tensor) -> Result<Measured> {
        let bytes = tensor.map()?;
        let chunk = Chunk::new(tensor.shape, tensor.dtype, &bytes)?;
        self.pool.with(|| Scratch::new(self.level), |scratch| scratch.measure(chunk, self.heads))
    }
}

impl Scratch {
    fn new(level: i32) -> Self {
        Self {
            streams: Streams::default(),
            frames: Frames::new(level),
            gathered: Vec::new(),
            zstd_time: Duration::ZERO,
        }
    }

    fn measure(&mut self, chunk: Chunk<'_>, heads: bool) -> Result<Measured> {
        let shape = chunk.shape();
        self.zstd_time = Duration::ZERO;
        self.streams.split_both(chunk)?;
        let mut measured = Vec::new();
        let mut counts = Counts::default();
        // A single head is the whole tensor: nothing is compressed or counted twice.
        let separate = heads && shape.heads > 1;
        if separate {
            measured.reserve(shape.heads);
            for head in 0..shape.heads {
                let mut of_head = Counts::default();
                let mut metrics = self.metrics(chunk, Some(head), Some(&mut of_head))?;
                metrics.set_entropies(&of_head);
                counts.hi.merge(&of_head.hi);
                counts.lo.merge(&of_head.lo);
                measured.push(metrics);
            }
        }
        let mut whole = self.metrics(chunk, None, (!separate).then_some(&mut counts))?;
        whole.set_entropies(&counts);
        if heads && !separate {
            measured.push(whole);
        }
        Ok(Measured { dtype: chunk.dtype(), shape, whole, heads: measured, zstd_time: self.zstd_time })
    }

    /// Frame lengths of the whole tensor or of one head, whose streams are counted where that is wanted.
    fn metrics(&mut self, chunk: Chunk<'_>, head: Option<usize>, mut counts: Option<&mut Counts>) -> Result<Metrics> {
        let Self { streams, frames, gathered, zstd_time } = self;
        let shape = chunk.shape();
        let mut frame_len = |stream: &[u8], counts: Option<&mut ByteCounts>| {
            let stream = cut(stream, shape, head, gathered);
            if let Some(counts) = counts {
                counts.add(stream);
            }
            let start = Instant::now();
            let len = frames.compress(stream)?.len() as u64;
            *zstd_time += start.elapsed();
            Ok(len)
        };
        let hi = frame_len(streams.hi(), counts.as_mut().map(|counts| &mut counts.hi))?;
        Ok(Metrics {
            raw: chunk.bytes().len() as u64 / head.map_or(1, |_| shape.heads as u64),
            zstd: frame_len(chunk.bytes(), None)?,
            hi,
            lo: frame_len(streams.lo(), counts.map(|counts| &mut counts.lo))?,
            // The delta of a single token is the token itself.
            hi_delta: if shape.seq > 1 { frame_len(streams.hi_delta(), None)? } else { hi },
            ..Metrics::default()
        })
    }
}

/// Bytes of the high and of the low stream.
#[derive(Default)]
struct Counts {
    hi: ByteCounts,
    lo: ByteCounts,
}

impl Metrics {
    fn set_entropies(&mut self, counts: &Counts) {
        self.hi_entropy = counts.hi.entropy();
        self.lo_entropy = counts.lo.entropy();
        // The bytes of a tensor are those of its two streams.
        let mut both = counts.hi.clone();
        both.merge(&counts.lo);
        self.entropy = both.entropy();
    }
}

/// The part of a tensor or stream that belongs to one head; `None` is all of it.
fn cut<'a>(data: &'a [u8], shape: Shape, head: Option<usize>, gathered: &'a mut Vec<u8>) -> &'a [u8] {
    let Some(head) = head else { return data };
    let run = data.len() / (shape.seq * shape.heads).max(1);
    let part = head * run..(head + 1) * run;
    if shape.seq == 1 {
        return data.get(part).unwrap_or_default();
    }
    gathered.clear();
    for token in data.chunks_exact((run * shape.heads).max(1)) {
        gathered.extend_from_slice(token.get(part.clone()).unwrap_or_default());
    }
    gathered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_cut_out_of_every_token() {
        let mut gathered = Vec::new();
        let data: Vec<u8> = (0..24).collect();
        let shape = Shape::new(3, 2, 2);
        assert_eq!(cut(&data, shape, None, &mut gathered), data);
        assert_eq!(cut(&data, shape, Some(1), &mut gathered), [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]);
        assert_eq!(cut(&data[..8], Shape::new(1, 2, 2), Some(1), &mut gathered), [4, 5, 6, 7]);
    }

    #[test]
    fn a_single_head_is_the_whole_tensor() {
        let bytes: Vec<u8> = (0..4096_u32).map(|i| ((i * i) >> 3) as u8).collect();
        let measure = |heads, dim| {
            let chunk = Chunk::new(Shape::new(64, heads, dim), DType::F16, &bytes).unwrap();
            Scratch::new(3).measure(chunk, true).unwrap()
        };
        let one = measure(1, 32);
        assert_eq!(one.heads.len(), 1);
        assert_eq!((one.heads[0].raw, one.heads[0].zstd), (4096, one.whole.zstd));
        let two = measure(2, 16);
        assert_eq!(two.heads.iter().map(|head| head.raw).collect::<Vec<_>>(), [2048, 2048]);
        assert_eq!(two.whole.entropy.to_bits(), one.whole.entropy.to_bits(), "counts of heads add up");
    }
}
