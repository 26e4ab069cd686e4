//! Loaded codecs.

use std::ffi::c_void;
use std::sync::Arc;

use gearbox_core::{
    Artifact, Capabilities, Codec, Context, Error, ErrorKind, LaneRef, LaneSpec, Limits, Result, ResultExt, Sample,
};
use serde_json::Value;

use super::{GUARD, HeldPanic, Object, poured, required};
use crate::convert::{self, Around};
use crate::raw;
use crate::status::checked;

/// The most that `max_encoded_len` may ask for: this many times the lane, and [`SLACK`] more. A codec that could need more is broken.
const GROWTH: usize = 64;
const SLACK: usize = 16 << 20;

/// A codec of a loaded library.
#[derive(Debug)]
pub(super) struct LoadedCodec {
    object: Object,
    table: raw::CodecTable,
}

impl LoadedCodec {
    #[expect(clippy::unnecessary_wraps, reason = "one signature for the three kinds")]
    pub(super) fn new(object: Object, table: raw::CodecTable) -> Result<Self> {
        Ok(Self { object, table })
    }

    fn max_len(&self, lane: &raw::LaneSpec) -> Result<usize> {
        let max_encoded_len = required(self.table.max_encoded_len, "max_encoded_len")?;
        let mut len = 0;
        // SAFETY: the object belongs to this table; the spec and the places for results live for the call.
        checked(|error| unsafe { max_encoded_len(self.object.place, lane, &raw mut len, error) })?;
        Ok(len)
    }

    /// A lane for the plugin, and the bytes that it asks for to encode it.
    fn admit(&self, lane: LaneRef<'_>, cx: &Context<'_>) -> Result<(raw::Lane, usize)> {
        let (spec, bytes) = (lane.spec(), lane.bytes());
        self.object.admit(spec.elem, cx)?;
        let lane = raw::Lane { spec: convert::lane_spec(spec)?, data: bytes.as_ptr(), len: bytes.len() };
        let capacity = self.max_len(&lane.spec).context(|| "max_encoded_len".into())?;
        if capacity > bytes.len().saturating_mul(GROWTH).saturating_add(SLACK) {
            let what = format!("asks for {capacity} bytes to encode {}", bytes.len());
            return Err(self.object.plugin.fault(ErrorKind::OutOfMemory, &what));
        }
        Ok((lane, capacity))
    }

    /// Has the plugin encode, and returns the length.
    ///
    /// # Safety
    /// `lane` is valid; `buffer` is writable for `capacity` bytes and used by nobody else.
    unsafe fn call(&self, lane: &raw::Lane, cx: &Context<'_>, buffer: *mut u8, capacity: usize) -> Result<usize> {
        let encode = required(self.table.encode, "encode")?;
        let around = Around::of(cx)?;
        let cx = around.context(cx);
        let mut len = 0;
        // SAFETY: the object belongs to this table. Everything pointed to lives for the call; the rest is as the caller promises.
        checked(|error| unsafe {
            encode(self.object.place, lane, &raw const cx, buffer, capacity, &raw mut len, error)
        })?;
        if len > capacity {
            return Err(self.object.wrong_length(&format!(
                "encode returned {len} bytes, its buffer has the {capacity} of max_encoded_len"
            )));
        }
        Ok(len)
    }
}

impl Codec for LoadedCodec {
    fn capabilities(&self) -> Capabilities {
        self.object.declared
    }

    fn config(&self) -> Value {
        self.object.config.clone()
    }

    /// `usize::MAX` if the plugin fails; encoding reports why.
    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        convert::lane_spec(lane).and_then(|lane| self.max_len(&lane)).unwrap_or(usize::MAX)
    }

    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let (lane, capacity) = self.admit(lane, cx)?;
        if out.try_reserve(capacity + GUARD.len()).is_err() {
            return Err(Error::new(ErrorKind::OutOfMemory, format!("no memory for {capacity} bytes")));
        }
        let spare = &mut out.spare_capacity_mut()[..capacity + GUARD.len()];
        let (buffer, behind) = spare.split_at_mut(capacity);
        behind.write_copy_of_slice(&GUARD);
        let buffer = buffer.as_mut_ptr().cast();
        // SAFETY: the lane was made above, and the buffer is the spare capacity.
        let encoded = unsafe { self.call(&lane, cx, buffer, capacity) };
        // SAFETY: written above, and by nobody else than the plugin since, which leaves it initialised whatever it wrote.
        let behind: &[u8] = unsafe { std::slice::from_raw_parts(buffer.add(capacity), GUARD.len()) };
        self.object.check_guard(behind, "encode")?;
        // SAFETY: the spare capacity has as many bytes, compared in the call, and the plugin promises that it wrote them all. Whether it did
        // cannot be seen from here; a library that breaks this could as well write anywhere.
        unsafe { out.set_len(out.len() + encoded?) };
        Ok(())
    }

    /// Who calls this looks after what lies behind `out`.
    fn encode_into(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut [u8]) -> Result<Option<usize>> {
        let (lane, capacity) = self.admit(lane, cx)?;
        // SAFETY: the lane was made above, and `out` is borrowed for this call alone.
        unsafe { self.call(&lane, cx, out.as_mut_ptr(), capacity.min(out.len())) }.map(Some)
    }

    fn decode(&self, encoded: &[u8], lane: &LaneSpec, cx: &Context<'_>, out: &mut [u8]) -> Result<()> {
        LaneRef::new(lane, out)?;
        self.object.admit(lane.elem, cx)?;
        let decode = required(self.table.decode, "decode")?;
        let (lane, around, len) = (convert::lane_spec(lane)?, Around::of(cx)?, out.len());
        let cx = around.context(cx);
        self.object.fill(out, "decode", |out| {
            checked(|error| {
                let (place, encoded_len, encoded) = (self.object.place, encoded.len(), encoded.as_ptr());
                // SAFETY: the object belongs to this table. Everything pointed to lives for the call; `out` is writable for `len` bytes, all of
                // them initialised, and used by nobody else.
                unsafe { decode(place, encoded, encoded_len, &raw const lane, &raw const cx, out, len, error) }
            })
        })
    }

    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        let Some(train) = self.table.train else { return Ok(None) };
        let mut feed = Feed { samples, current: None, failed: None, panic: HeldPanic::default() };
        let place = &raw mut feed;
        let samples = raw::Samples { state: place.cast(), next: Some(next_sample) };
        let mut trained = 0;
        let artifact = poured(Limits::default().artifact, |sink, error| {
            // SAFETY: the object belongs to this table. Everything pointed to lives for the call.
            unsafe { train(self.object.place, &raw const samples, sink, &raw mut trained, error) }
        });
        feed.panic.release();
        if let Some(error) = feed.failed {
            return Err(error);
        }
        Ok((trained != 0).then_some(Artifact(artifact?)))
    }

    fn with_artifact(&self, artifact: &[u8]) -> Result<Option<Arc<dyn Codec>>> {
        let Some(with_artifact) = self.table.with_artifact else { return Ok(None) };
        let mut place = std::ptr::null_mut();
        checked(|error| {
            // SAFETY: the object belongs to this table. Everything pointed to lives for the call.
            unsafe { with_artifact(self.object.place, artifact.as_ptr(), artifact.len(), &raw mut place, error) }
        })?;
        if place.is_null() {
            return Ok(None);
        }
        let object = Object::of(&self.object.plugin, place)?;
        Ok(Some(Arc::new(Self { object, table: self.table })))
    }
}

/// The samples on their way to a plugin.
struct Feed<'a, 'b> {
    samples: &'a mut dyn Iterator<Item = Sample<'b>>,
    /// What the plugin reads now.
    current: Option<Sample<'b>>,
    failed: Option<Error>,
    panic: HeldPanic,
}

impl Feed<'_, '_> {
    fn next(&mut self) -> Option<raw::Sample> {
        if self.failed.is_some() || self.panic.0.is_some() {
            return None;
        }
        self.current = None;
        let samples = &mut *self.samples;
        self.current = self.panic.hold(|| samples.next())?;
        let Sample { spec, bytes, layer, role } = self.current.as_ref()?;
        match convert::lane_spec(spec) {
            Ok(spec) => {
                let lane = raw::Lane { spec, data: bytes.as_ptr(), len: bytes.len() };
                Some(raw::Sample { lane, layer: *layer, role: convert::role_code(*role) })
            }
            Err(error) => {
                self.failed = Some(error);
                None
            }
        }
    }
}

unsafe extern "C" fn next_sample(state: *mut c_void, sample: *mut raw::Sample) -> i32 {
    // SAFETY: `train` made the state, which lives until the plugin's call returns; the plugin uses it from one thread at a time. The shorter
    // lifetimes end with that call too.
    let feed = unsafe { &mut *state.cast::<Feed<'_, '_>>() };
    // SAFETY: the plugin promises null or a place to write to.
    match (feed.next(), unsafe { sample.as_mut() }) {
        (Some(next), Some(place)) => {
            *place = next;
            1
        }
        _ => 0,
    }
}
