//! Codecs behind the functions of the ABI.

use std::ffi::c_void;
use std::sync::Arc;

use gearbox_core::{Capabilities, Codec, Error, ErrorKind, Kind, LaneRef, Plugin, Pool, Result, Sample};
use serde_json::Value;

use super::{Exported, Held, Holds, answer, describe, export, give, given, guarded, object, pour};
use crate::convert::{self, Received, slice, slice_mut};
use crate::raw;

/// What the host holds of a codec.
struct Object {
    codec: Arc<dyn Codec>,
    /// Buffers to append to, of codecs that cannot write in place.
    buffers: Pool<Vec<u8>>,
}

impl Object {
    fn of(codec: Arc<dyn Codec>) -> Self {
        Self { codec, buffers: Pool::default() }
    }
}

impl Held for Object {
    const KIND: Kind = Kind::Codec;

    fn config(&self) -> Value {
        self.codec.config()
    }

    fn capabilities(&self) -> Capabilities {
        self.codec.capabilities()
    }
}

impl<P: Codec + 'static> Holds<P> for Object {
    fn new(plugin: P) -> Self {
        Self::of(Arc::new(plugin))
    }
}

/// Exports a codec.
#[doc(hidden)]
pub fn codec<P: Plugin + Codec + 'static>() -> Exported {
    const TABLE: raw::CodecTable = raw::CodecTable {
        size: raw::size_of::<raw::CodecTable>(),
        max_encoded_len: Some(max_encoded_len),
        encode: Some(encode),
        decode: Some(decode),
        train: Some(train),
        with_artifact: Some(with_artifact),
    };
    export(raw::Plugin { codec: &raw const *Box::leak(Box::new(TABLE)), ..describe::<P, Object>() })
}

unsafe extern "C" fn max_encoded_len(
    this: *const c_void,
    lane: *const raw::LaneSpec,
    len: *mut usize,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI.
        let (codec, lane) = unsafe { (&object::<Object>(this)?.codec, convert::lane_spec_from(given(lane)?)?) };
        // SAFETY: the contract of the ABI.
        unsafe { answer(len, codec.max_encoded_len(&lane)) }
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}

unsafe extern "C" fn encode(
    this: *const c_void,
    lane: *const raw::Lane,
    cx: *const raw::Context,
    out: *mut u8,
    capacity: usize,
    len: *mut usize,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI.
        let (object, lane, received) = unsafe { (object::<Object>(this)?, given(lane)?, Received::new(cx)?) };
        // SAFETY: the contract of the ABI.
        let (spec, bytes, cx) =
            unsafe { (convert::lane_spec_from(&lane.spec)?, slice(lane.data, lane.len), received.context()?) };
        let lane = LaneRef::new(&spec, bytes)?;
        // SAFETY: the contract of the ABI: `out` is writable for `capacity` bytes, by nobody else. They come from outside of this library, so
        // they have some value, whatever the host's own compiler may know of them.
        let out = unsafe { slice_mut(out, capacity) };
        let written = match object.codec.encode_into(lane, &cx, out)? {
            Some(written) => written,
            None => object.buffers.with(Vec::new, |buffer| {
                buffer.clear();
                object.codec.encode(lane, &cx, buffer)?;
                let too_long = || {
                    let len = buffer.len();
                    let text = format!("expected at most {capacity} bytes (`max_encoded_len`), got {len}");
                    Error::new(ErrorKind::WrongLength, text)
                };
                out.get_mut(..buffer.len()).ok_or_else(too_long)?.copy_from_slice(buffer);
                Ok::<_, Error>(buffer.len())
            })?,
        };
        // SAFETY: the contract of the ABI.
        unsafe { answer(len, written) }
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}

unsafe extern "C" fn decode(
    this: *const c_void,
    encoded: *const u8,
    encoded_len: usize,
    lane: *const raw::LaneSpec,
    cx: *const raw::Context,
    out: *mut u8,
    len: usize,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI.
        let (object, spec, received) =
            unsafe { (object::<Object>(this)?, convert::lane_spec_from(given(lane)?)?, Received::new(cx)?) };
        // SAFETY: the contract of the ABI; the host's output is initialised and not shared.
        let (cx, encoded, out) = unsafe { (received.context()?, slice(encoded, encoded_len), slice_mut(out, len)) };
        object.codec.decode(encoded, &spec, &cx, out)
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}

/// The samples of the host.
struct Incoming<'a> {
    samples: &'a raw::Samples,
    /// The first sample that could not be read; ends the iteration.
    failed: Option<Error>,
}

impl Iterator for Incoming<'_> {
    type Item = Sample<'static>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.samples.next?;
        let empty = raw::LaneSpec { name: convert::text(""), elem: 0, bits: 0, seq: 0, heads: 0, dim: 0 };
        let lane = raw::Lane { spec: empty, data: std::ptr::null(), len: 0 };
        let mut sample = raw::Sample { lane, layer: 0, role: 0 };
        // SAFETY: the contract of the ABI: the function takes its own state, and writes a sample that is valid until the next call.
        let more = self.failed.is_none() && unsafe { next(self.samples.state, &raw mut sample) } == 1;
        // SAFETY: as above; the bytes are copied before the next call, because the trait lets a codec keep them.
        let read = more.then(|| unsafe { read_sample(&sample) })?;
        read.map_err(|error| self.failed = Some(error)).ok()
    }
}

/// # Safety
/// The sample is valid for the call.
unsafe fn read_sample(sample: &raw::Sample) -> Result<Sample<'static>> {
    // SAFETY: as the caller promises.
    let (spec, bytes) =
        unsafe { (convert::lane_spec_from(&sample.lane.spec)?, slice(sample.lane.data, sample.lane.len)) };
    Ok(Sample { spec, bytes: bytes.to_vec().into(), layer: sample.layer, role: convert::role(sample.role)? })
}

unsafe extern "C" fn train(
    this: *const c_void,
    samples: *const raw::Samples,
    artifact: *const raw::Sink,
    trained: *mut u32,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI.
        let (object, samples) = unsafe { (object::<Object>(this)?, given(samples)?) };
        let mut samples = Incoming { samples, failed: None };
        let made = object.codec.train(&mut samples)?;
        if let Some(error) = samples.failed {
            return Err(error);
        }
        if let Some(made) = &made {
            // SAFETY: the contract of the ABI.
            unsafe { pour(artifact, &made.0) }?;
        }
        // SAFETY: the contract of the ABI.
        unsafe { answer(trained, made.is_some().into()) }
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}

unsafe extern "C" fn with_artifact(
    this: *const c_void,
    artifact: *const u8,
    len: usize,
    with: *mut *mut c_void,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI.
        let (object, artifact) = unsafe { (object::<Object>(this)?, slice(artifact, len)) };
        match object.codec.with_artifact(artifact)? {
            // SAFETY: the contract of the ABI.
            Some(codec) => unsafe { give(with, Object::of(codec)) },
            // SAFETY: the contract of the ABI.
            None => unsafe { answer(with, std::ptr::null_mut()) },
        }
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}
