//! The receipt of a run: what is needed to reproduce its rows.

use std::borrow::Cow;

use gearbox_core::{AnyEntry, PluginUse, Registry, Result};
use serde::{Deserialize, Serialize};

/// What a result depends on besides its input and its pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Version of this program.
    pub version: Cow<'static, str>,
    /// Commit it was built from, if it was built in a checkout.
    pub commit: Option<Cow<'static, str>>,
    /// Every plugin by id, with the version of the bytes it writes and the library it was loaded from.
    pub plugins: Vec<PluginUse>,
    /// Vector extensions of the processor that matter here.
    pub cpu_features: Vec<Cow<'static, str>>,
    /// Worker threads.
    pub threads: usize,
}

impl Receipt {
    /// The receipt of the running process.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](gearbox_core::ErrorKind::Io) if the library of a loaded plugin cannot be read any more.
    pub fn new(registry: &Registry) -> Result<Self> {
        Ok(Self {
            plugins: registry.entries().map(AnyEntry::as_use).collect::<Result<_>>()?,
            version: env!("CARGO_PKG_VERSION").into(),
            commit: option_env!("GEARBOX_COMMIT").map(Cow::Borrowed),
            cpu_features: cpu_features(),
            threads: rayon::current_num_threads(),
        })
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<Cow<'static, str>> {
    let features = [
        ("sse4.2", is_x86_feature_detected!("sse4.2")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("f16c", is_x86_feature_detected!("f16c")),
    ];
    features.into_iter().filter_map(|(name, has)| has.then_some(name.into())).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<Cow<'static, str>> {
    vec![std::env::consts::ARCH.into()]
}
