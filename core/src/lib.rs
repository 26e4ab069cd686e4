//! Traits, tensors, registry, pipeline and container of Gearbox.
//!
//! A [`Chunk`] is a run of tokens of one layer and role, in logical order `(seq, heads, dim)`. A [`LossyTransform`] turns it into
//! lanes, a [`Codec`] turns each lane into bytes, and the [`container`] stores them so that they can be decoded from the file alone.
//! A [`Pipeline`] says which plugins do that for which layer and role; an [`EvictionPolicy`] says which tokens are kept at all.
//! This crate holds no codec and no `unsafe`.

pub mod bits;
mod codec;
mod coder;
pub mod config;
pub mod container;
mod error;
mod eviction;
mod lane;
pub mod ledger;
mod limits;
mod pipeline;
mod plugin;
mod registry;
mod tensor;
mod transform;

pub use codec::{Artifact, Codec, Sample};
pub use coder::{ChunkCoder, EncodedChunk, EncodedLane, LaneCoding, RoutedLane, StoredLane};
pub use error::{Error, ErrorKind, Result, ResultExt};
pub use eviction::{
    AttentionStep, CacheGeometry, CacheView, EvictionPolicy, EvictionSession, KeepSet, LiveTokens, Retention,
};
pub use lane::{Elem, ElemSet, Lane, LaneRef, LaneSpec, Latents};
pub use limits::Limits;
pub use pipeline::{
    ChunkPlan, Chunking, CodecSpec, LayerRange, Pipeline, PipelineSpec, PluginSpec, RoleSpec, RouteSpec, Span,
};
pub use plugin::{Capabilities, Context, Needs, Plugin, Pool};
pub use registry::{AnyEntry, Entry, Kind, LibraryUse, NameLibrary, PluginUse, Registration, Registry};
pub use tensor::{Chunk, ChunkMut, DType, Role, Rope, RopePairing, RopeScaling, Shape, Stage};
pub use transform::{Bound, LossyTransform};

#[doc(hidden)]
pub use inventory;
