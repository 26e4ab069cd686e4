//! Transforms: tensor to lanes, and back to the type that attention reads.

use std::fmt::Debug;

use serde::Serialize;
use serde_json::Value;

use crate::{Capabilities, Chunk, ChunkMut, Context, Latents, Result, Role};

/// The error that a transform promises, per element.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// Every bit comes back, NaN payloads included.
    Lossless,
    /// `|decoded - original|` is at most this.
    Absolute(f64),
    /// `|decoded - original|` is at most this fraction of `|original|`.
    Relative(f64),
    /// `|decoded - original|` is at most this fraction of the largest finite `|original|` of the chunk.
    Peak(f64),
    /// Nothing is promised.
    Unbounded,
}

/// Tensor to lanes, and back to the type that attention reads. [`Bound::Lossless`] makes it an exact predictor.
///
/// In a chain, every transform but the last writes a lane named [`LaneSpec::TENSOR`](crate::LaneSpec::TENSOR) of the
/// type and shape of its input, which the next one transforms.
pub trait LossyTransform: Send + Sync + Debug {
    /// Which tensors it takes, and what it needs to know.
    fn capabilities(&self) -> Capabilities;

    /// The settings with every default filled in; stored in containers.
    fn config(&self) -> Value;

    /// The settings as they act on one role with so many channels per head: where two settings do the same there, both give one value.
    ///
    /// A sweep runs pipelines with equal effective settings once. Example: blocks of 128 and of 256 channels are the same where there are
    /// 128 channels.
    fn effective_config(&self, role: Role, dim: usize) -> Value {
        let _ = (role, dim);
        self.config()
    }

    /// The error it promises: a claim that the conformance kit attacks.
    fn bound(&self) -> Bound;

    /// Adds the lanes of `chunk` to `out`, which is empty.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for tensors outside the declared capabilities.
    fn forward(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()>;

    /// Other lanes for the chunk that [`LossyTransform::forward`] turned into `latents`, if it is in doubt which take fewer bytes.
    ///
    /// Where the transform stands alone, both are encoded and the smaller ones are stored; [`LossyTransform::inverse`] takes either.
    ///
    /// # Errors
    /// As [`LossyTransform::forward`].
    fn alternative(&self, chunk: Chunk<'_>, latents: &Latents) -> Result<Option<Latents>> {
        let _ = (chunk, latents);
        Ok(None)
    }

    /// Fills `out` from the lanes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) if the lanes are not what [`LossyTransform::forward`] writes for such a chunk.
    fn inverse(&self, latents: &Latents, cx: &Context<'_>, out: ChunkMut<'_>) -> Result<()>;
}
