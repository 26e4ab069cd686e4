//! Blocks along the channels of one vector, each normalised by its largest magnitude.

use gearbox_core::{Chunk, DType, Error, Result, Shape};
use pulp::Arch;

use super::element::{Element, F16, room, with_element};
use super::pairwise::{LEAF, sum};
use super::quantise::{code, largest_code};

/// Settings of the block normalisation, and what its side information is priced at.
///
/// Blocks lie along `dim` within one token and head, in that order; the last one of a vector may be shorter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockNorm {
    /// Channels of a block, at least 1; more than there are make one block.
    pub block_size: usize,
    /// Share of the blocks, those with the most energy, whose scale is kept unrounded: 0 to 1, at least one block.
    pub topk_ratio: f64,
    /// Bits of a code, see [`BITS`](super::BITS).
    pub bits: u8,
    /// Price of a scale in bytes; with 2 it is rounded to F16, with any other number it stays F32.
    pub scale_bytes: usize,
    /// Price of an unrounded scale in bytes; with 0 there are none, but their indices are still paid for.
    pub topk_extra_scale_bytes: usize,
    /// Price of the index of an unrounded scale in bytes.
    pub index_bytes: usize,
}

/// A tensor in normalised form.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Normalised {
    /// Codes divided by the largest code, -1 to 1, in the element type and shape of the tensor.
    pub stored: Vec<u8>,
    /// The largest magnitude of each block, 1.0 for zeros; not yet rounded.
    pub scales: Vec<f32>,
    /// The blocks whose scale is kept unrounded, ascending.
    pub top: Vec<u32>,
}

impl BlockNorm {
    /// Blocks of a tensor.
    pub fn blocks(&self, shape: Shape) -> usize {
        shape.seq.saturating_mul(shape.heads).saturating_mul(shape.dim.div_ceil(self.block_size.max(1)))
    }

    /// Blocks whose scale is kept unrounded, and paid for: at least one.
    pub fn top_blocks(&self, shape: Shape) -> usize {
        let wanted = (self.blocks(shape) as f64 * self.topk_ratio).max(1.0);
        #[expect(clippy::cast_sign_loss, reason = "at least 1; the cast saturates")]
        let blocks = wanted as usize;
        blocks
    }

    /// Bytes of scales, unrounded scales and indices, at their prices.
    pub fn metadata_bytes(&self, shape: Shape) -> u64 {
        let (blocks, top) = (self.blocks(shape) as u64, self.top_blocks(shape) as u64);
        let extra = (self.topk_extra_scale_bytes as u64).saturating_add(self.index_bytes as u64);
        blocks.saturating_mul(self.scale_bytes as u64).saturating_add(top.saturating_mul(extra))
    }

    /// Whether an unrounded scale can differ from the rounded one, so that it matters which blocks keep theirs.
    ///
    /// The scales of an F16 tensor are F16 numbers.
    pub fn rounds_scales(&self, dtype: DType) -> bool {
        self.scale_bytes == 2 && dtype != DType::F16
    }

    /// Whether blocks keep an unrounded scale that differs from the rounded one.
    pub fn keeps_scales(&self, dtype: DType) -> bool {
        self.topk_extra_scale_bytes > 0 && self.rounds_scales(dtype)
    }

    /// Normalises a tensor.
    ///
    /// A NaN makes its block NaN, an infinity leaves zeros and NaN.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](gearbox_core::ErrorKind::InvalidConfig) for settings out of range.
    ///
    /// # Examples
    /// ```
    /// use gearbox_core::{Chunk, DType, Shape};
    /// use gearbox_quant::reference::BlockNorm;
    ///
    /// let tensor: Vec<u8> = [4.0_f32, -2.0, 0.5, 0.1].iter().flat_map(|value| value.to_le_bytes()).collect();
    /// let (shape, norm) = (Shape::new(1, 1, 4), BlockNorm {
    ///     block_size: 2, topk_ratio: 0.5, bits: 2, scale_bytes: 4, topk_extra_scale_bytes: 4, index_bytes: 4,
    /// });
    /// let normalised = norm.normalise(Chunk::new(shape, DType::F32, &tensor).unwrap()).unwrap();
    /// assert_eq!(normalised.scales, [4.0, 0.5]);
    /// assert_eq!(normalised.top, [0]);
    /// assert_eq!(norm.restore(shape, DType::F32, &normalised), [4.0, -0.0, 0.5, 0.0]);
    /// ```
    pub fn normalise(&self, chunk: Chunk<'_>) -> Result<Normalised> {
        let mut normalised = Normalised::default();
        self.normalise_into(chunk, &mut normalised)?;
        self.find_top(chunk, &mut normalised.top)?;
        Ok(normalised)
    }

    /// Like [`BlockNorm::normalise`], into reused buffers, and without looking for the blocks that keep their scale.
    ///
    /// # Errors
    /// As [`BlockNorm::normalise`].
    pub fn normalise_into(&self, chunk: Chunk<'_>, out: &mut Normalised) -> Result<()> {
        let largest = self.check()?;
        out.stored.clear();
        out.scales.clear();
        out.top.clear();
        out.scales.resize(self.blocks(chunk.shape()), 1.0);
        with_element!(chunk.dtype(), E => {
            let elements = E::elements(chunk.bytes());
            let stored = room::<E>(&mut out.stored, elements.len());
            let scales = out.scales.iter_mut();
            let dim = chunk.shape().dim.max(1);
            Arch::new().dispatch(
                #[inline(always)]
                move || {
                    let mut scales = scales;
                    for (vector, stored) in elements.chunks_exact(dim).zip(stored.chunks_exact_mut(dim)) {
                        let blocks = vector.chunks(self.block_size).zip(stored.chunks_mut(self.block_size));
                        for ((block, stored), scale) in blocks.zip(&mut scales) {
                            let peak = block.iter().fold(0, |peak, element| E::magnitude(*element).max(peak));
                            if peak > 0 {
                                *scale = E::of_magnitude(peak);
                            }
                            let scale = *scale;
                            for (stored, element) in stored.iter_mut().zip(block) {
                                // Normalised first, then multiplied: not the quotient by one scale.
                                let level = code(E::widen(*element) / scale * largest, 1.0, largest);
                                *stored = E::narrow(level / largest);
                            }
                        }
                    }
                },
            );
        });
        Ok(())
    }

    /// The restored values: `stored` times the rounded scale of the block, or its unrounded one. They stay F32.
    pub fn restore(&self, shape: Shape, dtype: DType, normalised: &Normalised) -> Vec<f32> {
        let mut values = Vec::new();
        self.restore_into(shape, dtype, normalised, &mut values);
        values
    }

    /// Like [`BlockNorm::restore`], into a reused buffer.
    pub fn restore_into(&self, shape: Shape, dtype: DType, normalised: &Normalised, out: &mut Vec<f32>) {
        let (dim, size) = (shape.dim.max(1), self.block_size.max(1));
        out.clear();
        with_element!(dtype, E => {
            let stored = E::elements(&normalised.stored);
            out.resize(stored.len(), 0.0);
            let rounds = self.rounds_scales(dtype);
            let (mut scales, values) = (normalised.scales.iter(), out.as_mut_slice());
            Arch::new().dispatch(
                #[inline(always)]
                move || {
                    let out = values;
                    for (out, stored) in out.chunks_exact_mut(dim).zip(stored.chunks_exact(dim)) {
                        for ((out, stored), scale) in out.chunks_mut(size).zip(stored.chunks(size)).zip(&mut scales) {
                            let scale = if rounds { F16::widen(F16::narrow(*scale)) } else { *scale };
                            for (out, stored) in out.iter_mut().zip(stored) {
                                *out = E::widen(*stored) * scale;
                            }
                        }
                    }
                },
            );
            if !self.keeps_scales(dtype) {
                return;
            }
            let blocks = dim.div_ceil(size);
            for &block in &normalised.top {
                let block = block as usize;
                let start = block / blocks * dim + block % blocks * size;
                let range = start..(start + size).min((block / blocks + 1) * dim);
                let Some(scale) = normalised.scales.get(block) else { continue };
                let (Some(out), Some(stored)) = (out.get_mut(range.clone()), stored.get(range)) else { continue };
                for (out, stored) in out.iter_mut().zip(stored) {
                    *out = E::widen(*stored) * scale;
                }
            }
        });
    }

    /// The largest code, after a check of all settings.
    fn check(&self) -> Result<f32> {
        if self.block_size == 0 {
            return Err(Error::invalid_config("`/block_size`: expected at least 1, got 0"));
        }
        if !(0.0..=1.0).contains(&self.topk_ratio) {
            return Err(Error::invalid_config(format!("`/topk_ratio`: expected 0 to 1, got {}", self.topk_ratio)));
        }
        largest_code(self.bits)
    }

    /// Replaces `top` by the blocks with the most energy, ascending; of equals the first ones, and NaN last.
    ///
    /// # Errors
    /// As [`BlockNorm::normalise`].
    pub fn find_top(&self, chunk: Chunk<'_>, top: &mut Vec<u32>) -> Result<()> {
        self.check()?;
        top.clear();
        with_element!(chunk.dtype(), E => self.find_top_of::<E>(chunk, top));
        Ok(())
    }

    fn find_top_of<E: Element>(&self, chunk: Chunk<'_>, top: &mut Vec<u32>) {
        let (elements, dim) = (E::elements(chunk.bytes()), chunk.shape().dim.max(1));
        let mut values = Vec::new();
        let blocks = elements.chunks_exact(dim).flat_map(|vector| vector.chunks(self.block_size));
        let mut keys: Vec<u64> = (0_u64..)
            .zip(blocks)
            .map(|(idx, block)| {
                values.clear();
                values.extend(block.iter().map(|bytes| E::widen(*bytes)));
                let energy = energy(&values, self.block_size);
                // Energies are not negative, so their bits are in their order.
                let rank = if energy.is_nan() { 0 } else { energy.to_bits() + 1 };
                u64::from(!rank) << 32 | idx & u64::from(u32::MAX)
            })
            .collect();
        let count = self.top_blocks(chunk.shape()).min(keys.len());
        if count > 0 && count < keys.len() {
            keys.select_nth_unstable(count - 1);
        }
        top.extend(keys[..count].iter().map(|key| *key as u32));
        top.sort_unstable();
    }
}

/// The sum of the squares of values that are padded with zeros to `len`: these take part in the order of the sum.
fn energy(values: &[f32], len: usize) -> f32 {
    if len <= LEAF {
        let mut padded = [0.0; LEAF];
        padded[..values.len()].copy_from_slice(values);
        return sum(
            &padded[..len],
            #[inline(always)]
            move |x| x * x,
        );
    }
    let middle = len / 2 / 8 * 8;
    match values.split_at_checked(middle) {
        Some((left, right)) => energy(left, middle) + energy(right, len - middle),
        None => energy(values, middle),
    }
}
