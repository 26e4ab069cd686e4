//! Choosing predictors and writing streams.

use std::time::Duration;

use gearbox_core::{Chunk, Error, Result, Role, Shape};

use crate::estimate::Estimator;
use crate::frame::Frames;
use crate::{Choice, Config, FRAMED, Predictor, SHUFFLED, bitshuffle, blocks};

/// Level of frames for which a search for repeats does not pay: little else than the Huffman code of zstd.
const QUICK: i32 = 1;

/// Encodes chunks one after another with the same context and buffers.
///
/// This is what the codec does, with an account of it; a chunk is encoded to the same bytes.
///
/// # Examples
/// ```
/// use gearbox_adaptive_v22::{Config, Encoder, Predictor};
/// use gearbox_core::{Chunk, DType, Role, Shape};
///
/// let bytes: Vec<u8> = (0..4096_u32).map(|i| (i % 256 / 2 + i / 256) as u8).collect();
/// let chunk = Chunk::new(Shape::new(16, 1, 128), DType::F16, &bytes).unwrap();
/// let mut out = Vec::new();
/// let usage = Encoder::new(Config::default()).encode(chunk, Role::Key, &mut out).unwrap();
/// assert_eq!(usage.high(Predictor::DeltaSeq), 1, "one block of the first stream");
/// ```
#[derive(Debug)]
pub struct Encoder {
    config: Config,
    frames: Frames,
    estimator: Estimator,
    /// Bytes of the chunk, the most significant ones of all elements first.
    streams: Vec<u8>,
    scratch: Scratch,
}

/// Buffers of one stream.
#[derive(Debug, Default)]
struct Scratch {
    /// Predictors of the blocks.
    modes: Vec<Predictor>,
    /// Predicted, and perhaps shuffled, blocks in order.
    predicted: Vec<u8>,
    /// One block behind another predictor.
    candidate: Vec<u8>,
    /// A predicted block before it is shuffled.
    plain: Vec<u8>,
    /// The smallest frame so far, and the one that is compared with it.
    best: Vec<u8>,
    frame: Vec<u8>,
    /// Estimated costs: for each block those of all candidates.
    costs: Vec<u64>,
}

/// What was done to encode a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    blocks: [[u64; Predictor::ALL.len()]; 2],
    /// Time spent in zstd.
    pub zstd_time: Duration,
}

impl Usage {
    /// How many blocks of the first stream have this predictor; streams that are stored as they are have no blocks.
    pub fn high(&self, predictor: Predictor) -> u64 {
        self.blocks[0][usize::from(predictor.mode())]
    }

    /// How many blocks of the other streams have this predictor.
    pub fn low(&self, predictor: Predictor) -> u64 {
        self.blocks[1][usize::from(predictor.mode())]
    }
}

/// One stream, and how it is cut.
#[derive(Clone, Copy)]
struct Stream<'a> {
    bytes: &'a [u8],
    shape: Shape,
    block_seq: usize,
}

impl<'a> Stream<'a> {
    /// Blocks with their shapes.
    fn blocks(self) -> impl Iterator<Item = (&'a [u8], Shape)> {
        let row = self.shape.row();
        let shape = self.shape;
        self.bytes.chunks(self.block_seq * row).map(move |block| (block, shape.with_seq(block.len() / row)))
    }
}

impl Encoder {
    /// An encoder with these settings.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            frames: Frames::default(),
            estimator: Estimator::default(),
            streams: Vec::new(),
            scratch: Scratch::default(),
        }
    }

    /// Appends the encoded chunk to `out`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) for a stream of 4 GiB or more, or if zstd refuses, as it does when
    /// memory is short; `out` is then as it was.
    pub fn encode(&mut self, chunk: Chunk<'_>, role: Role, out: &mut Vec<u8>) -> Result<Usage> {
        let elements = chunk.shape().elements();
        let mut usage = Usage::default();
        if elements == 0 {
            return Ok(usage);
        }
        let mut streams = std::mem::take(&mut self.streams);
        split(chunk, &mut streams);
        let start = out.len();
        let block_seq = (self.config.block_seq as usize).min(chunk.shape().seq);
        let mut written = Ok(());
        for (idx, bytes) in streams.chunks(elements).enumerate() {
            let stream = Stream { bytes, shape: chunk.shape(), block_seq };
            written = self.stream(stream, role, idx == 0, out);
            if written.is_err() {
                out.truncate(start);
                break;
            }
            for predictor in &self.scratch.modes {
                usage.blocks[usize::from(idx > 0)][usize::from(predictor.mode())] += 1;
            }
        }
        self.streams = streams;
        usage.zstd_time = self.frames.take_time();
        written.map(|()| usage)
    }

    /// Appends one stream; leaves its modes in the scratch.
    fn stream(&mut self, stream: Stream<'_>, role: Role, high: bool, out: &mut Vec<u8>) -> Result<()> {
        let Self { config, frames, estimator, scratch, .. } = self;
        scratch.modes.clear();
        scratch.predicted.resize(stream.bytes.len(), 0);
        let candidates = config.candidates(role, high);
        match config.choice {
            Choice::Entropy => scratch.estimate(stream, candidates, config, frames, estimator)?,
            Choice::Trial | Choice::Reference => scratch.try_all(stream, candidates, config, frames)?,
        }
        let framed = scratch.modes.len() + scratch.best.len();
        let (form, block_seq, payload) = if config.choice == Choice::Reference || framed < stream.bytes.len() {
            (FRAMED | if config.bitshuffle { SHUFFLED } else { 0 }, stream.block_seq, &scratch.best[..])
        } else {
            scratch.modes.clear();
            (0, 0, stream.bytes)
        };
        let len = u32::try_from(payload.len())
            .map_err(|_| Error::unsupported(format!("a stream of {} bytes, the limit is 4 GiB", payload.len())))?;
        out.push(form);
        out.extend_from_slice(&block_seq.to_le_bytes()[..3]);
        out.extend_from_slice(&len.to_le_bytes());
        out.extend(scratch.modes.iter().map(|predictor| predictor.mode()));
        out.extend_from_slice(payload);
        Ok(())
    }
}

impl Scratch {
    /// Compresses every candidate of every block: leaves the smallest ones in `modes`, and the frame of all blocks in `best`.
    fn try_all(
        &mut self,
        stream: Stream<'_>,
        candidates: &[Predictor],
        config: &Config,
        frames: &mut Frames,
    ) -> Result<()> {
        let Self { modes, predicted, candidate, plain, best, frame, .. } = self;
        let single = blocks(stream.shape, stream.block_seq) == 1;
        let mut rest = &mut predicted[..];
        for (block, shape) in stream.blocks() {
            let (chosen, behind) = rest.split_at_mut(block.len());
            rest = behind;
            // A predictor that does the same to this block as an earlier one gives the same frame, and loses the tie.
            let is_new = |(idx, predictor): &(usize, &Predictor)| {
                candidates[..*idx].iter().all(|earlier| earlier.simplest(shape) != predictor.simplest(shape))
            };
            let mut distinct = candidates.iter().enumerate().filter(is_new).map(|(_, predictor)| *predictor).peekable();
            let mut mode = distinct.next().unwrap_or(Predictor::Raw);
            predict(mode, block, shape, config.bitshuffle, plain, chosen);
            // The frame of the only block is the one that is stored. Without a second candidate there is nothing else to compress.
            if single || distinct.peek().is_some() {
                frames.compress(config.level, chosen, best)?;
            }
            candidate.resize(block.len(), 0);
            for predictor in distinct {
                predict(predictor, block, shape, config.bitshuffle, plain, candidate);
                frames.compress(config.level, candidate, frame)?;
                if frame.len() < best.len() {
                    mode = predictor;
                    std::mem::swap(frame, best);
                    chosen.copy_from_slice(candidate);
                }
            }
            modes.push(mode);
        }
        if single { Ok(()) } else { frames.compress(config.level, predicted, best) }
    }

    /// Estimates every candidate of every block: leaves what was chosen in `modes`, and its frame in `best`.
    fn estimate(
        &mut self,
        stream: Stream<'_>,
        candidates: &[Predictor],
        config: &Config,
        frames: &mut Frames,
        estimator: &mut Estimator,
    ) -> Result<()> {
        self.costs.clear();
        let mut totals = [0; Predictor::ALL.len()];
        let candidates = &candidates[..candidates.len().min(totals.len())];
        if candidates.len() > 1 {
            for (block, shape) in stream.blocks() {
                estimator.look_at(block, shape);
                for (candidate, total) in candidates.iter().zip(&mut totals) {
                    let cost = estimator.cost(*candidate, config.bitshuffle);
                    *total += cost;
                    self.costs.push(cost);
                }
            }
        }
        let least = totals.iter().take(candidates.len()).min().copied().unwrap_or_default();
        // What is earlier in the list is simpler, and may keep repeats that the estimate does not see.
        let common = totals.iter().position(|total| *total <= least + least / 64).unwrap_or_default();
        // Planes of bits repeat where bytes do not.
        let search = config.bitshuffle || estimator.repeats(stream.bytes, stream.shape.row());
        let level = if search { config.level } else { QUICK };

        let count = blocks(stream.shape, stream.block_seq);
        self.modes.resize(count, candidates.get(common).copied().unwrap_or(Predictor::Raw));
        self.join(stream, config.bitshuffle);
        frames.compress(level, &self.predicted, &mut self.best)?;

        let mut mixed = false;
        for (mode, costs) in self.modes.iter_mut().zip(self.costs.chunks(candidates.len().max(1))) {
            let cheapest = costs.iter().zip(candidates).min_by_key(|(cost, _)| **cost);
            if let Some((_, predictor)) = cheapest.filter(|(cost, _)| **cost < costs[common] - costs[common] / 16) {
                *mode = *predictor;
                mixed = true;
            }
        }
        if mixed {
            self.join(stream, config.bitshuffle);
            frames.compress(level, &self.predicted, &mut self.frame)?;
            if self.frame.len() < self.best.len() {
                std::mem::swap(&mut self.frame, &mut self.best);
            } else {
                self.modes.fill(candidates[common]);
            }
        }
        Ok(())
    }

    /// Predicts every block by its mode.
    fn join(&mut self, stream: Stream<'_>, shuffle: bool) {
        let mut rest = &mut self.predicted[..];
        for ((block, shape), mode) in stream.blocks().zip(&self.modes) {
            let (to, behind) = rest.split_at_mut(block.len());
            rest = behind;
            predict(*mode, block, shape, shuffle, &mut self.plain, to);
        }
    }
}

/// Predicts one block and, if wanted, shuffles its bits; `plain` is scratch.
fn predict(predictor: Predictor, block: &[u8], shape: Shape, shuffle: bool, plain: &mut Vec<u8>, out: &mut [u8]) {
    if shuffle {
        plain.resize(block.len(), 0);
        predictor.forward(block, shape.row(), shape.dim, plain);
        bitshuffle::shuffle(plain, out);
    } else {
        predictor.forward(block, shape.row(), shape.dim, out);
    }
}

/// Cuts elements into streams, the most significant bytes first.
fn split(chunk: Chunk<'_>, streams: &mut Vec<u8>) {
    let elements = chunk.shape().elements();
    streams.resize(chunk.bytes().len(), 0);
    match chunk.dtype().size() {
        2 => {
            let (high, low) = streams.split_at_mut(elements);
            for ((word, high), low) in chunk.bytes().as_chunks::<2>().0.iter().zip(high).zip(low) {
                // As numbers: a loop that moves bytes is not vectorised.
                let word = u16::from_le_bytes(*word);
                (*high, *low) = ((word >> 8) as u8, word as u8);
            }
        }
        size => {
            for (place, stream) in streams.chunks_mut(elements).enumerate() {
                for (word, byte) in chunk.bytes().chunks(size).zip(stream) {
                    *byte = word[size - 1 - place];
                }
            }
        }
    }
}
