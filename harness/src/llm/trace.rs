//! What the policy decided, while it decides.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use gearbox_core::{
    AnyEntry, AttentionStep, CacheGeometry, CacheView, Capabilities, Entry, EvictionPolicy, EvictionSession, KeepSet,
    Plugin, Registry, Result, Retention, config,
};
use gearbox_plugins::evict::h2o::H2o;
use gearbox_plugins::evict::reference::{Decision, Reference};
use serde::Serialize;
use serde_json::Value;

/// A decision of one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Traced {
    /// Layer of the model.
    pub layer: u32,
    /// What was decided.
    pub decision: Decision,
    /// Time that it took, in nanoseconds; neither scoring nor moving is in it.
    pub plan_ns: u64,
}

impl Traced {
    /// Tokens that were evicted.
    pub fn evicted(&self) -> usize {
        if self.decision.dominated { 0 } else { self.decision.tokens - self.decision.kept }
    }
}

/// The decisions of one request, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Trace(Arc<Mutex<Vec<Traced>>>);

impl Trace {
    /// The decisions since it was last asked.
    pub fn take(&self) -> Vec<Traced> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn push(&self, traced: Traced) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(traced);
    }

    /// The registry with an `h2o` whose sessions of mode `reference` are traced; it decides nothing else.
    ///
    /// # Errors
    /// What [`Registry::insert`] reports.
    pub fn registry(&self, registry: &Registry) -> Result<Registry> {
        let mut traced = Registry::empty();
        for entry in registry.entries().filter(|entry| entry.id() != H2o::ID) {
            traced.insert(entry.clone())?;
        }
        let trace = self.clone();
        let entry = Entry {
            build: Arc::new(move |value| {
                let policy = H2o::new(config::from_value(value)?)?;
                Ok(Arc::new(TracedH2o { policy, trace: trace.clone() }) as Arc<dyn EvictionPolicy>)
            }),
            ..registry.eviction(H2o::ID)?.clone()
        };
        traced.insert(AnyEntry::Eviction(entry))?;
        Ok(traced)
    }
}

/// The policy `h2o`, which tells what it decided.
#[derive(Debug)]
struct TracedH2o {
    policy: H2o,
    trace: Trace,
}

impl EvictionPolicy for TracedH2o {
    fn capabilities(&self) -> Capabilities {
        self.policy.capabilities()
    }

    fn config(&self) -> Value {
        self.policy.config()
    }

    fn retention(&self, geometry: &CacheGeometry, seen: u64) -> Retention {
        self.policy.retention(geometry, seen)
    }

    fn session(&self, geometry: &CacheGeometry) -> Result<Box<dyn EvictionSession>> {
        Ok(match self.policy.reference(geometry)? {
            None => self.policy.session(geometry)?,
            Some(session) => Box::new(TracedSession { session, layer: geometry.layer, trace: self.trace.clone() }),
        })
    }
}

struct TracedSession {
    session: Reference,
    layer: u32,
    trace: Trace,
}

impl EvictionSession for TracedSession {
    fn observe(&mut self, step: &AttentionStep<'_>) -> Result<()> {
        self.session.observe(step)
    }

    fn plan(&mut self, cache: &CacheView<'_>) -> Result<KeepSet> {
        let start = Instant::now();
        let keep = self.session.plan(cache)?;
        let plan_ns = start.elapsed().as_nanos() as u64;
        if let Some(decision) = self.session.decision() {
            self.trace.push(Traced { layer: self.layer, decision: decision.clone(), plan_ns });
        }
        Ok(keep)
    }
}
