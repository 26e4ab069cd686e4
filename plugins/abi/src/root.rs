//! The root module of Rust libraries, which `abi_stable` finds and compares.

#![expect(clippy::expl_impl_clone_on_copy, reason = "written by the derive of abi_stable")]

use abi_stable::StableAbi;
use abi_stable::library::RootModule;
use abi_stable::sabi_types::VersionStrings;

use crate::raw;

/// What a Rust library exports: one function, which returns what the entry point of a C library returns.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = RootRef, prefix_fields = RootPrefix)))]
pub struct Root {
    /// Takes in the host and lists the plugins; null if that fails.
    #[sabi(last_prefix_field)]
    pub library: unsafe extern "C" fn(host: *const raw::Host) -> *const raw::Library,
}

impl RootModule for RootRef {
    abi_stable::declare_root_module_statics! {RootRef}
    const BASE_NAME: &'static str = "gearbox_plugin";
    const NAME: &'static str = "gearbox_plugin";
    /// Of the ABI, not of this crate.
    const VERSION_STRINGS: VersionStrings = VersionStrings::new("1.0.0");
}
