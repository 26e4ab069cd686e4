//! Loaded transforms.

use std::ffi::c_void;

use gearbox_core::{
    Bound, Capabilities, Chunk, ChunkMut, Context, Error, Lane, Latents, Limits, LossyTransform, Result, Role,
};
use serde_json::Value;

use super::{GUARD, HeldPanic, Object, json, required};
use crate::convert::{self, Around};
use crate::raw;
use crate::status::checked;

/// A transform of a loaded library.
#[derive(Debug)]
pub(super) struct LoadedTransform {
    object: Object,
    table: raw::TransformTable,
    bound: Bound,
}

impl LoadedTransform {
    pub(super) fn new(object: Object, table: raw::TransformTable) -> Result<Self> {
        let ask = required(table.bound, "bound")?;
        let mut bound = raw::Bound { kind: u64::MAX, value: 0.0 };
        // SAFETY: the object belongs to this table; the places for results live for the call.
        checked(|error| unsafe { ask(object.place, &raw mut bound, error) })?;
        Ok(Self { object, table, bound: convert::bound_from(bound)? })
    }

    /// Gathers the lanes that a plugin fills.
    fn gather(
        &self,
        call: impl FnOnce(*const raw::LaneSink, *mut raw::ErrorText) -> i32,
        out: &mut Latents,
    ) -> Result<()> {
        let mut lanes =
            Lanes { added: Vec::new(), left: Limits::default().lane, refused: None, panic: HeldPanic::default() };
        let sink = raw::LaneSink { state: (&raw mut lanes).cast(), lane: Some(new_lane) };
        let called = checked(|error| call(&raw const sink, error));
        lanes.panic.release();
        for Lane { spec, bytes } in &lanes.added {
            let end = bytes.len() - GUARD.len();
            self.object.check_guard(&bytes[end..], &format!("forward of {spec}"))?;
        }
        if let Some(refused) = lanes.refused {
            return Err(refused);
        }
        called?;
        for mut lane in lanes.added {
            lane.bytes.truncate(lane.bytes.len() - GUARD.len());
            out.push_lane(lane)?;
        }
        Ok(())
    }
}

fn raw_lanes(latents: &Latents) -> Result<Vec<raw::Lane>> {
    let raw = |lane: &Lane| {
        Ok(raw::Lane { spec: convert::lane_spec(&lane.spec)?, data: lane.bytes.as_ptr(), len: lane.bytes.len() })
    };
    latents.lanes().iter().map(raw).collect()
}

impl LossyTransform for LoadedTransform {
    fn capabilities(&self) -> Capabilities {
        self.object.declared
    }

    fn config(&self) -> Value {
        self.object.config.clone()
    }

    /// The settings themselves if the plugin fails: a sweep then runs more than it must, and nothing wrong.
    fn effective_config(&self, role: Role, dim: usize) -> Value {
        let effective = self.table.effective_config.and_then(|effective_config| {
            // SAFETY: the object belongs to this table; everything pointed to lives for the call.
            json(|sink, error| unsafe {
                effective_config(self.object.place, convert::role_code(role), dim, sink, error)
            })
            .ok()
        });
        effective.unwrap_or_else(|| self.config())
    }

    fn bound(&self) -> Bound {
        self.bound
    }

    fn forward(&self, chunk: Chunk<'_>, cx: &Context<'_>, out: &mut Latents) -> Result<()> {
        self.object.admit(chunk.dtype().into(), cx)?;
        let forward = required(self.table.forward, "forward")?;
        let (chunk, around) = (convert::chunk(&chunk)?, Around::of(cx)?);
        let cx = around.context(cx);
        self.gather(
            // SAFETY: the object belongs to this table; everything pointed to lives for the call.
            |sink, error| unsafe { forward(self.object.place, &raw const chunk, &raw const cx, sink, error) },
            out,
        )
    }

    fn alternative(&self, chunk: Chunk<'_>, latents: &Latents) -> Result<Option<Latents>> {
        let Some(alternative) = self.table.alternative else { return Ok(None) };
        let (chunk, lanes) = (convert::chunk(&chunk)?, raw_lanes(latents)?);
        let (mut given, mut other) = (0, Latents::new());
        self.gather(
            |sink, error| {
                let (place, count, lanes) = (self.object.place, lanes.len(), lanes.as_ptr());
                // SAFETY: the object belongs to this table; everything pointed to lives for the call.
                unsafe { alternative(place, &raw const chunk, lanes, count, sink, &raw mut given, error) }
            },
            &mut other,
        )?;
        Ok((given != 0).then_some(other))
    }

    fn inverse(&self, latents: &Latents, cx: &Context<'_>, mut out: ChunkMut<'_>) -> Result<()> {
        self.object.admit(out.dtype().into(), cx)?;
        let inverse = required(self.table.inverse, "inverse")?;
        let (lanes, around, elem) = (raw_lanes(latents)?, Around::of(cx)?, convert::dtype_code(out.dtype())?);
        let (cx, shape, len) = (around.context(cx), out.shape(), out.bytes_mut().len());
        self.object.fill(out.bytes_mut(), "inverse", |data| {
            let (seq, heads, dim) = (shape.seq, shape.heads, shape.dim);
            let chunk = raw::ChunkMut { seq, heads, dim, elem, reserved: 0, data, len };
            checked(|error| {
                let (place, count, lanes) = (self.object.place, lanes.len(), lanes.as_ptr());
                // SAFETY: the object belongs to this table. Everything pointed to lives for the call; `data` is writable for `len` bytes, all
                // of them initialised, and used by nobody else.
                unsafe { inverse(place, lanes, count, &raw const cx, &raw const chunk, error) }
            })
        })
    }
}

/// The lanes that a plugin asked for, each with a guard behind it.
struct Lanes {
    added: Vec<Lane>,
    /// Bytes that all further lanes may take.
    left: usize,
    refused: Option<Error>,
    panic: HeldPanic,
}

impl Lanes {
    fn add(&mut self, spec: &raw::LaneSpec) -> Result<*mut u8> {
        // SAFETY: the plugin promises that the name is readable during this call.
        let spec = unsafe { convert::lane_spec_from(spec) }?;
        let (len, limits) = (spec.byte_len(), Limits::default());
        if self.added.len() == limits.lanes {
            return Err(Error::limit(format!("expected at most {} lanes, got one more: {spec}", limits.lanes)));
        }
        if len > self.left {
            return Err(Error::limit(format!("{spec}: {len} bytes, the limit of all lanes is {}", limits.lane)));
        }
        if self.added.iter().any(|other| other.spec.name == spec.name) {
            return Err(Error::shape(format!("two lanes are named `{}`", spec.name)));
        }
        self.left -= len;
        // Pages of zeros come from the system as they are touched; filling them costs nothing twice.
        let mut bytes = vec![0; len + GUARD.len()];
        bytes[len..].copy_from_slice(&GUARD);
        self.added.push(Lane { spec, bytes });
        Ok(self.added.last_mut().map_or(std::ptr::null_mut(), |lane| lane.bytes.as_mut_ptr()))
    }
}

unsafe extern "C" fn new_lane(state: *mut c_void, spec: *const raw::LaneSpec) -> *mut u8 {
    // SAFETY: `gather` made the state, which lives until the plugin's call returns; the plugin uses it from one thread at a time.
    let lanes = unsafe { &mut *state.cast::<Lanes>() };
    // SAFETY: the plugin promises null or a spec.
    let Some(spec) = (unsafe { spec.as_ref() }) else { return std::ptr::null_mut() };
    let mut panic = HeldPanic::default();
    let place = match panic.hold(|| lanes.add(spec)) {
        Some(Ok(place)) => place,
        Some(Err(error)) => {
            lanes.refused = Some(error);
            std::ptr::null_mut()
        }
        None => std::ptr::null_mut(),
    };
    if panic.0.is_some() {
        lanes.panic = panic;
    }
    place
}
