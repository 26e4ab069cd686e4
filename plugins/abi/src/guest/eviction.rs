//! Eviction policies behind the functions of the ABI.

use std::ffi::c_void;
use std::sync::Arc;

use gearbox_core::{
    AttentionStep, CacheGeometry, CacheView, Capabilities, Error, EvictionPolicy, EvictionSession, KeepSet, Kind,
    Plugin, Result, Retention,
};
use serde_json::Value;

use super::{Exported, Held, Holds, answer, describe, export, give, given, guarded, object, take};
use crate::convert::slice;
use crate::raw;
use crate::status::OK;

/// What the host holds of a policy.
type Object = Arc<dyn EvictionPolicy>;
/// What the host holds of a session.
type Session = Box<dyn EvictionSession>;

impl Held for Object {
    const KIND: Kind = Kind::Eviction;

    fn config(&self) -> Value {
        self.as_ref().config()
    }

    fn capabilities(&self) -> Capabilities {
        self.as_ref().capabilities()
    }
}

impl<P: EvictionPolicy + 'static> Holds<P> for Object {
    fn new(plugin: P) -> Self {
        Arc::new(plugin)
    }
}

/// Exports an eviction policy.
#[doc(hidden)]
pub fn eviction<P: Plugin + EvictionPolicy + 'static>() -> Exported {
    const TABLE: raw::EvictionTable = raw::EvictionTable {
        size: raw::size_of::<raw::EvictionTable>(),
        session: Some(session),
        observe: Some(observe),
        plan: Some(plan),
        drop_session: Some(drop_session),
        retention: Some(retention),
    };
    export(raw::Plugin { eviction: &raw const *Box::leak(Box::new(TABLE)), ..describe::<P, Object>() })
}

/// # Safety
/// `geometry` is null or can be read as far as its size says.
unsafe fn read_geometry(geometry: *const raw::Geometry) -> Result<CacheGeometry> {
    // SAFETY: as the caller promises.
    let raw = unsafe { raw::read(geometry) };
    let raw = raw.ok_or_else(|| Error::invalid_input("the geometry is null or too short"))?;
    let raw::Geometry { layer, layers, q_heads, kv_heads, dim, .. } = raw;
    Ok(CacheGeometry { layer, layers, q_heads, kv_heads, dim })
}

unsafe extern "C" fn retention(
    this: *const c_void,
    geometry: *const raw::Geometry,
    seen: u64,
    out: *mut raw::Retention,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI.
        let (object, geometry) = unsafe { (object::<Object>(this)?, read_geometry(geometry)?) };
        let Retention { most, sinks, recent } = object.retention(&geometry, seen);
        // SAFETY: the contract of the ABI.
        unsafe { answer(out, raw::Retention { most: most.unwrap_or(u64::MAX), sinks, recent }) }
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}

unsafe extern "C" fn session(
    this: *const c_void,
    geometry: *const raw::Geometry,
    out: *mut *mut c_void,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI.
        let (object, geometry) = unsafe { (object::<Object>(this)?, read_geometry(geometry)?) };
        let session: Session = object.session(&geometry)?;
        // SAFETY: the contract of the ABI.
        unsafe { give(out, session) }
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}

/// # Safety
/// `session` is null, or came from `session` and is used by this call alone.
unsafe fn session_mut<'a>(session: *mut c_void) -> Result<&'a mut Session> {
    // SAFETY: as the caller promises.
    unsafe { session.cast::<Session>().as_mut() }.ok_or_else(|| Error::invalid_input("the session is null"))
}

unsafe extern "C" fn observe(this: *mut c_void, step: *const raw::AttentionStep, error: *mut raw::ErrorText) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI; the host lets one thread at a time use a session.
        let (session, raw) = unsafe { (session_mut(this)?, raw::read(step)) };
        let raw = raw.ok_or_else(|| Error::invalid_input("the attention step is null or too short"))?;
        // SAFETY: the contract of the ABI.
        let (live, probabilities) =
            unsafe { (slice(raw.live, raw.live_count), slice(raw.probabilities, raw.probability_count)) };
        let raw::AttentionStep { first_query, queries, tokens, .. } = raw;
        session.observe(&AttentionStep { first_query, queries, tokens, live, probabilities })
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}

unsafe extern "C" fn plan(
    this: *mut c_void,
    cache: *const raw::CacheView,
    out: *const raw::KeepSink,
    error: *mut raw::ErrorText,
) -> i32 {
    let work = || {
        // SAFETY: the contract of the ABI; the host lets one thread at a time use a session.
        let (session, raw, sink) = unsafe { (session_mut(this)?, raw::read(cache), given(out)?) };
        let raw = raw.ok_or_else(|| Error::invalid_input("the view of the cache is null or too short"))?;
        // SAFETY: the contract of the ABI.
        let live = unsafe { slice(raw.live, raw.live_count) };
        let keep = sink.keep.ok_or_else(|| Error::invalid_input("the host's keep sink has no function"))?;
        let put = |mode, list: &[u32]| {
            // SAFETY: the contract of the ABI: the function takes its own state; the list lives until the call returns.
            let code = unsafe { keep(sink.state, mode, list.as_ptr(), list.len()) };
            if code == OK { Ok(()) } else { Err(Error::unsupported("the host refuses the keep set")) }
        };
        match session.plan(&CacheView { seen: raw.seen, tokens: raw.tokens, live })? {
            KeepSet::All => put(0, &[]),
            KeepSet::Shared(list) => put(1, &list),
            KeepSet::PerHead(lists) => lists.iter().try_for_each(|list| put(2, list)),
        }
    };
    // SAFETY: the contract of the ABI.
    unsafe { guarded(error, work) }
}

unsafe extern "C" fn drop_session(this: *mut c_void) {
    // SAFETY: the contract of the ABI.
    unsafe { take::<Session>(this) };
}
