//! Transforms behind the functions of the ABI.

use std::ffi::c_void;
use std::sync::Arc;

use gearbox_core::{Capabilities, Error, Kind, Lane, Latents, LossyTransform, Plugin, Result};
use serde_json::Value;

use super::{Exported, Held, Holds, answer, describe, export, given, guarded, object, pour_json};
use crate::convert::{self, Received, slice};
use crate::raw;

/// What the host holds of a transform.
type Object = Arc<dyn LossyTransform>;

impl Held for Object {
    const KIND: Kind = Kind::Transform;

    fn config(&self) -> Value {
        self.as_ref().config()
    }

    fn capabilities(&self) -> Capabilities {
        self.as_ref().capabilities()
    }
}

impl<P: LossyTransform + 'static> Holds<P> for Object {
    fn new(plugin: P) -> Self {
        Arc::new(plugin)
    }
}

/// Exports a transform.
#[doc(hidden)]
pub fn transform<P: Plugin + LossyTransform + 'static>() -> Exported {
    const TABLE: raw::TransformTable = raw::TransformTable {
        size: raw::size_of::<raw::TransformTable>(),
        bound: Some(bound),
        forward: Some(forward),
        inverse: Some(inverse),
        effective_config: Some(effective_config),
        alternative: Some(alternative),
    };
    export(raw::Plugin { transform: &raw const *Box::leak(Box::new(TABLE)), ..describe::<P, Object>() })
}

unsafe extern "C" fn bound(this: *const c_void, out: *mut raw::Bound, error: *mut raw::ErrorText) -> i32 {
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, || answer(out, convert::bound(object::<Object>(this)?.bound()))) }
}

unsafe extern "C" fn effective_config(
    this: *const c_void,
    role: u32,
    dim: usize,
    json: *const raw::Sink,
    error: *mut raw::ErrorText,
) -> i32 {
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, || pour_json(json, &object::<Object>(this)?.effective_config(convert::role(role)?, dim))) }
}

/// Copies lanes into the memory that the host gives for them.
///
/// # Safety
/// `sink` is null or valid, with a function that takes its own state and returns null or as many bytes as the lane has.
unsafe fn hand_over(latents: &Latents, sink: *const raw::LaneSink) -> Result<()> {
    // SAFETY: as the caller promises.
    let sink = unsafe { given(sink) }?;
    let place = sink.lane.ok_or_else(|| Error::invalid_input("the host's lane sink has no function"))?;
    for lane in latents.lanes() {
        let spec = convert::lane_spec(&lane.spec)?;
        // SAFETY: as the caller promises; the spec lives until the call returns.
        let target = unsafe { place(sink.state, &raw const spec) };
        if target.is_null() {
            return Err(Error::unsupported(format!("the host refuses {}", lane.spec)));
        }
        // SAFETY: the host's memory is new, and as long as the spec says, which `Latents` keeps equal to the lane's own bytes.
        unsafe { std::ptr::copy_nonoverlapping(lane.bytes.as_ptr(), target, lane.bytes.len()) };
    }
    Ok(())
}

/// # Safety
/// As [`slice`], for the lanes and for the bytes of each.
unsafe fn latents(lanes: *const raw::Lane, count: usize) -> Result<Latents> {
    let mut latents = Latents::new();
    // SAFETY: as the caller promises.
    for lane in unsafe { slice(lanes, count) } {
        // SAFETY: as the caller promises.
        let (spec, bytes) = unsafe { (convert::lane_spec_from(&lane.spec)?, slice(lane.data, lane.len)) };
        latents.push_lane(Lane { spec, bytes: bytes.to_vec() })?;
    }
    Ok(latents)
}

unsafe extern "C" fn forward(
    this: *const c_void,
    chunk: *const raw::Chunk,
    cx: *const raw::Context,
    out: *const raw::LaneSink,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI.
        let (object, chunk, received) =
            unsafe { (object::<Object>(this)?, convert::chunk_from(given(chunk)?)?, Received::new(cx)?) };
        let mut made = Latents::new();
        // SAFETY: the contract of the ABI.
        object.forward(chunk, &unsafe { received.context() }?, &mut made)?;
        // SAFETY: the contract of the ABI.
        unsafe { hand_over(&made, out) }
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}

unsafe extern "C" fn inverse(
    this: *const c_void,
    lanes: *const raw::Lane,
    lane_count: usize,
    cx: *const raw::Context,
    out: *const raw::ChunkMut,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI.
        let (object, latents, received) =
            unsafe { (object::<Object>(this)?, latents(lanes, lane_count)?, Received::new(cx)?) };
        // SAFETY: the contract of the ABI; the host's output is initialised and not shared.
        let (cx, out) = unsafe { (received.context()?, convert::chunk_mut_from(given(out)?)?) };
        object.inverse(&latents, &cx, out)
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}

unsafe extern "C" fn alternative(
    this: *const c_void,
    chunk: *const raw::Chunk,
    lanes: *const raw::Lane,
    lane_count: usize,
    out: *const raw::LaneSink,
    given_any: *mut u32,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI.
        let (object, chunk, latents) =
            unsafe { (object::<Object>(this)?, convert::chunk_from(given(chunk)?)?, latents(lanes, lane_count)?) };
        let other = object.alternative(chunk, &latents)?;
        if let Some(other) = &other {
            // SAFETY: the contract of the ABI.
            unsafe { hand_over(other, out) }?;
        }
        // SAFETY: the contract of the ABI.
        unsafe { answer(given_any, other.is_some().into()) }
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}
