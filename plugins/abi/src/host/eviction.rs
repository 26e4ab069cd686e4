//! Loaded eviction policies.

use std::ffi::c_void;
use std::sync::Arc;

use gearbox_core::{
    AttentionStep, CacheGeometry, CacheView, Capabilities, EvictionPolicy, EvictionSession, KeepSet, Result, Retention,
};
use serde_json::Value;

use super::{Object, required};
use crate::convert;
use crate::raw;
use crate::status::{OK, OTHER, checked};

/// An eviction policy of a loaded library.
#[derive(Debug)]
pub(super) struct LoadedPolicy {
    object: Arc<Object>,
    table: raw::EvictionTable,
}

impl LoadedPolicy {
    #[expect(clippy::unnecessary_wraps, reason = "one signature for the three kinds")]
    pub(super) fn new(object: Object, table: raw::EvictionTable) -> Result<Self> {
        Ok(Self { object: Arc::new(object), table })
    }
}

impl EvictionPolicy for LoadedPolicy {
    fn capabilities(&self) -> Capabilities {
        self.object.declared
    }

    fn config(&self) -> Value {
        self.object.config.clone()
    }

    /// A failure has no place here; nothing is promised then.
    fn retention(&self, geometry: &CacheGeometry, seen: u64) -> Retention {
        let Some(ask) = self.table.retention else { return Retention::default() };
        let geometry = raw_geometry(geometry);
        let mut promise = raw::Retention { most: u64::MAX, sinks: 0, recent: 0 };
        // SAFETY: the object belongs to this table; everything pointed to lives for the call.
        let asked =
            checked(|error| unsafe { ask(self.object.place, &raw const geometry, seen, &raw mut promise, error) });
        let raw::Retention { most, sinks, recent } = promise;
        asked.map_or(Retention::default(), |()| Retention { most: (most < u64::MAX).then_some(most), sinks, recent })
    }

    fn session(&self, geometry: &CacheGeometry) -> Result<Box<dyn EvictionSession>> {
        let session = required(self.table.session, "session")?;
        let kv_heads = geometry.kv_heads;
        let geometry = raw_geometry(geometry);
        let mut place = std::ptr::null_mut();
        // SAFETY: the object belongs to this table; everything pointed to lives for the call.
        checked(|error| unsafe { session(self.object.place, &raw const geometry, &raw mut place, error) })?;
        if place.is_null() {
            return Err(self.object.fault("expected a session, got null and no error"));
        }
        Ok(Box::new(LoadedSession { place, policy: Arc::clone(&self.object), table: self.table, kv_heads }))
    }
}

fn raw_geometry(geometry: &CacheGeometry) -> raw::Geometry {
    let CacheGeometry { layer, layers, q_heads, kv_heads, dim } = *geometry;
    raw::Geometry { size: raw::size_of::<raw::Geometry>(), layer, layers, q_heads, kv_heads, dim }
}

/// A session of a loaded policy, which outlives it.
struct LoadedSession {
    place: *mut c_void,
    policy: Arc<Object>,
    table: raw::EvictionTable,
    kv_heads: usize,
}

// SAFETY: the ABI demands that a session can be used, and freed, by any thread, one at a time.
unsafe impl Send for LoadedSession {}

impl Drop for LoadedSession {
    fn drop(&mut self) {
        if let Some(drop_session) = self.table.drop_session {
            // SAFETY: the plugin made the session, nobody else holds it, and it is not used again. Its policy still exists.
            unsafe { drop_session(self.place) };
        }
    }
}

impl EvictionSession for LoadedSession {
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()> {
        let observe = required(self.table.observe, "observe")?;
        let step = raw::AttentionStep {
            size: raw::size_of::<raw::AttentionStep>(),
            first_query: step.first_query,
            queries: step.queries,
            tokens: step.tokens,
            live: step.live.as_ptr(),
            live_count: step.live.len(),
            probabilities: step.probabilities.as_ptr(),
            probability_count: step.probabilities.len(),
        };
        // SAFETY: the session belongs to this table and is used by this call alone; everything pointed to lives for the call.
        checked(|error| unsafe { observe(self.place, &raw const step, error) })
    }

    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet> {
        let plan = required(self.table.plan, "plan")?;
        let tokens = cache.tokens;
        let cache = raw::CacheView {
            size: raw::size_of::<raw::CacheView>(),
            seen: cache.seen,
            tokens,
            live: cache.live.as_ptr(),
            live_count: cache.live.len(),
        };
        let kv_heads = self.kv_heads;
        let mut kept = Kept { all: false, shared: None, heads: Vec::new(), tokens, kv_heads, wrong: None };
        let sink = raw::KeepSink { state: (&raw mut kept).cast(), keep: Some(keep) };
        // SAFETY: the session belongs to this table and is used by this call alone; everything pointed to lives for the call.
        let called = checked(|error| unsafe { plan(self.place, &raw const cache, &raw const sink, error) });
        if let Some(wrong) = kept.wrong {
            return Err(self.policy.fault(&wrong));
        }
        called?;
        let keep = match kept {
            Kept { all: true, shared: None, heads, .. } if heads.is_empty() => KeepSet::All,
            Kept { all: false, shared: Some(list), heads, .. } if heads.is_empty() => KeepSet::Shared(list),
            Kept { all: false, shared: None, heads, .. } if heads.len() == kv_heads => KeepSet::PerHead(heads),
            Kept { all, shared, heads, .. } => {
                return Err(self.policy.fault(&format!(
                    "expected all tokens, one shared list or {kv_heads} lists, got {}, {} and {}",
                    if all { "all" } else { "not all" },
                    usize::from(shared.is_some()),
                    heads.len()
                )));
            }
        };
        keep.check(tokens, kv_heads).map_err(|error| self.policy.fault(&error.to_string()))?;
        Ok(keep)
    }
}

/// What a plan says so far.
struct Kept {
    all: bool,
    shared: Option<Vec<u32>>,
    heads: Vec<Vec<u32>>,
    tokens: usize,
    kv_heads: usize,
    wrong: Option<String>,
}

impl Kept {
    fn take(&mut self, mode: u32, list: &[u32]) -> Result<(), String> {
        if list.len() > self.tokens {
            return Err(format!("expected at most the {} live tokens, got {} indices", self.tokens, list.len()));
        }
        match mode {
            0 if list.is_empty() => self.all = true,
            1 if self.shared.is_none() => self.shared = Some(list.to_vec()),
            2 if self.heads.len() < self.kv_heads => self.heads.push(list.to_vec()),
            0 => return Err("expected no list with all tokens".to_owned()),
            1 => return Err("expected one shared list, got another".to_owned()),
            2 => return Err(format!("expected lists for {} KV heads, got another", self.kv_heads)),
            other => return Err(format!("expected a keep set of mode 0, 1 or 2, got {other}")),
        }
        Ok(())
    }
}

unsafe extern "C" fn keep(state: *mut c_void, mode: u32, indices: *const u32, count: usize) -> i32 {
    // SAFETY: `plan` made the state, which lives until the plugin's call returns; the plugin uses it from one thread at a time.
    let kept = unsafe { &mut *state.cast::<Kept>() };
    // SAFETY: the plugin promises that `indices` is readable for `count` numbers during this call.
    match kept.take(mode, unsafe { convert::slice(indices, count) }) {
        Ok(()) => OK,
        Err(wrong) => {
            kept.wrong.get_or_insert(wrong);
            OTHER
        }
    }
}
