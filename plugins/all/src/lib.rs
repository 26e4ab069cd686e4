//! All built-in plugins behind one dependency.
//!
//! A plugin registers itself when it is linked, and the linker drops crates that nothing names. So each built-in is named here once: adding
//! one means one dependency line and one `use` line, and the test below lists what must come out.
//!
//! ```
//! let registry = gearbox_plugins::registry()?;
//! let zstd = registry.codec("zstd")?.build(&serde_json::json!({"level": 19}))?;
//! assert_eq!(zstd.config()["level"], 19);
//! # Ok::<(), gearbox_core::Error>(())
//! ```

use gearbox_adaptive_v22 as _;
use gearbox_bitstream as _;
use gearbox_core::{Registry, Result};
use gearbox_evict as _;
use gearbox_gear as _;
use gearbox_lz4 as _;
use gearbox_pcodec as _;
use gearbox_planes as _;
use gearbox_quant as _;
use gearbox_store as _;
use gearbox_token_ref as _;
use gearbox_zstd as _;

#[doc(no_inline)]
pub use gearbox_adaptive_v22 as adaptive_v22;
#[doc(no_inline)]
pub use gearbox_bitstream as bitstream;
#[doc(no_inline)]
pub use gearbox_evict as evict;
#[doc(no_inline)]
pub use gearbox_gear as gear;
#[doc(no_inline)]
pub use gearbox_quant as quant;

/// A registry of all built-in plugins.
///
/// # Errors
/// [`ErrorKind::DuplicatePlugin`](gearbox_core::ErrorKind::DuplicatePlugin) if two plugins that are linked into the program claim one id.
pub fn registry() -> Result<Registry> {
    Registry::built_in()
}

#[cfg(test)]
mod tests {
    use gearbox_core::AnyEntry;

    use super::*;

    #[test]
    fn built_in_ids_are_exactly_these() {
        let registry = registry().unwrap();
        let ids: Vec<_> = registry.entries().map(AnyEntry::id).collect();
        assert_eq!(
            ids,
            [
                "adaptive-v22",
                "arithmetic",
                "block-norm",
                "clip",
                "clip-quant",
                "gear",
                "gear-delta",
                "h2o",
                "huffman",
                "lz4",
                "none",
                "pcodec",
                "planes",
                "quant",
                "random",
                "rans",
                "snapkv",
                "store",
                "token-ref",
                "tova",
                "truncate",
                "window",
                "zstd"
            ]
        );
    }

    #[test]
    fn defaults_of_every_plugin_build() {
        for entry in registry().unwrap().entries() {
            entry.default_config().unwrap();
        }
    }
}
