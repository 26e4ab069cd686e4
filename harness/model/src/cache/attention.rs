//! Attention over a layer of the cache.

use candle_core::{CpuStorage, DType as CandleDType, Device, InplaceOp1, Layout, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use gearbox_core::DType;

use super::Spec;
use super::layer::Decoded;
use super::positions::Positions;
use crate::element::widen;

/// Tokens by which the buffers grow.
const GROWTH: usize = 256;

/// Buffers that all layers share.
#[derive(Default)]
pub(super) struct Scratch {
    /// Keys and values of one layer as F32, `(tokens, kv_heads, dim)`, in memory of the CPU.
    values: Option<[Tensor; 2]>,
    /// The mask of the current step for so many live tokens: without a window, layers of equal length have the same.
    mask: Option<(usize, Tensor)>,
}

/// Fills the front of a tensor with stored elements.
struct Widen<'a> {
    dtype: DType,
    parts: [&'a [u8]; 2],
}

impl InplaceOp1 for Widen<'_> {
    fn name(&self) -> &'static str {
        "widen"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(values) = storage else { candle_core::bail!("expected a buffer of F32") };
        let mut rest = &mut values[layout.start_offset()..];
        for part in self.parts {
            let (front, back) = rest.split_at_mut(part.len() / self.dtype.size());
            widen(self.dtype, part, front);
            rest = back;
        }
        Ok(())
    }
}

impl Scratch {
    /// Begins a step: masks of the last one are of no use.
    pub(super) fn begin(&mut self) {
        self.mask = None;
    }

    pub(super) fn bytes(&self) -> u64 {
        let elements = |tensor: &Tensor| tensor.elem_count() as u64;
        4 * (self.values.iter().flatten().map(elements).sum::<u64>()
            + self.mask.iter().map(|(_, mask)| elements(mask)).sum::<u64>())
    }

    /// Keys and values of a layer, `(tokens, kv_heads, dim)`: its decoded chunks, then its tail.
    fn widened(&mut self, spec: &Spec, [decoded, tail]: [&Decoded; 2], device: &Device) -> Result<[Tensor; 2]> {
        let live = (decoded[0].len() + tail[0].len()) / spec.row();
        let room = self.values.as_ref().map_or(0, |[keys, _]| keys.dims()[0]);
        if room < live {
            let room = (live + live / 8).next_multiple_of(GROWTH);
            let zeros = || Tensor::zeros((room, spec.kv_heads, spec.dim), CandleDType::F32, &Device::Cpu);
            self.values = Some([zeros()?, zeros()?]);
        }
        let Some(buffers) = &self.values else { candle_core::bail!("attention over no tokens") };
        let fill = |role: usize| {
            buffers[role].inplace_op1(&Widen { dtype: spec.dtype, parts: [&decoded[role], &tail[role]] })?;
            buffers[role].narrow(0, 0, live)?.to_device(device)
        };
        let (keys, values) = rayon::join(|| fill(0), || fill(1));
        Ok([keys?, values?])
    }

    /// What a query must not see, as `(rows, 1, queries, live)` of 0 and -∞; `None` if every query sees everything.
    fn mask(
        &mut self,
        queries: usize,
        positions: &Positions,
        window: Option<usize>,
        device: &Device,
    ) -> Result<Option<Tensor>> {
        let live = positions.len();
        let last = positions.at(0, live - 1) as usize;
        let window =
            window.filter(|window| (0..positions.rows()).any(|row| last - positions.at(row, 0) as usize >= *window));
        if queries == 1 && window.is_none() {
            return Ok(None);
        }
        if let (None, Some((known, mask))) = (window, &self.mask)
            && *known == live
        {
            return Ok(Some(mask.clone()));
        }
        let rows = if window.is_some() { positions.rows() } else { 1 };
        let mut mask = Vec::with_capacity(rows * queries * live);
        for row in 0..rows {
            for query in last + 1 - queries..=last {
                mask.extend((0..live).map(|slot| {
                    let position = positions.at(row, slot) as usize;
                    let seen = position <= query && window.is_none_or(|window| query - position < window);
                    if seen { 0.0 } else { f32::NEG_INFINITY }
                }));
            }
        }
        let mask = Tensor::from_vec(mask, (rows, 1, queries, live), device)?;
        if window.is_none() {
            self.mask = Some((live, mask.clone()));
        }
        Ok(Some(mask))
    }

    /// Attends with queries `(seq, q_heads, dim)`. `stored` are decoded chunks and tail.
    /// Gives `(seq, q_heads * dim)`, and the probabilities `(q_heads, seq, live)`.
    pub(super) fn attend(
        &mut self,
        spec: &Spec,
        query: &Tensor,
        stored: [&Decoded; 2],
        positions: &Positions,
        window: Option<usize>,
    ) -> Result<(Tensor, Tensor)> {
        let (seq, live, device) = (query.dim(0)?, positions.len(), query.device());
        let [keys, values] = self.widened(spec, stored, device)?;
        let group = spec.q_heads / spec.kv_heads;
        // The query heads of a group share their keys, so they are rows of one product.
        let query = (query.transpose(0, 1)?.contiguous()? * (spec.dim as f64).sqrt().recip())?;
        let query = query.reshape((spec.kv_heads, group * seq, spec.dim))?;
        let (keys, values) = (keys.permute((1, 2, 0))?, values.transpose(0, 1)?);
        // The product in Rust takes strides as they are, the libraries want rows without gaps.
        let strided = device.is_cpu() && !cfg!(feature = "mkl");
        let (keys, values) = if strided { (keys, values) } else { (keys.contiguous()?, values.contiguous()?) };
        let mut scores = query.matmul(&keys)?;
        if let Some(mask) = self.mask(seq, positions, window, device)? {
            let by_query = scores.reshape((spec.kv_heads, group, seq, live))?;
            scores = by_query.broadcast_add(&mask)?.reshape((spec.kv_heads, group * seq, live))?;
        }
        let probabilities = softmax_last_dim(&scores)?;
        let output = probabilities.matmul(&values)?.reshape((spec.q_heads, seq, spec.dim))?;
        let output = output.transpose(0, 1)?.reshape((seq, spec.q_heads * spec.dim))?;
        Ok((output, probabilities.reshape((spec.q_heads, seq, live))?))
    }
}
