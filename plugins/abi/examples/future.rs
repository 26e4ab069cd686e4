//! A Rust library built for version 2 of the ABI, as far as version 1 can see: for the tests of the loader.

#![expect(unsafe_code, reason = "exports a root module by hand")]
#![expect(clippy::expl_impl_clone_on_copy, reason = "written by the derive of abi_stable")]

use abi_stable::StableAbi;
use abi_stable::library::{CheckTypeLayout, IntoRootModuleResult, LibHeader, RootModule, RootModuleResult};
use abi_stable::prefix_type::PrefixTypeTrait;
use abi_stable::sabi_types::VersionStrings;

/// The root module of another version.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = RootRef, prefix_fields = RootPrefix)))]
pub struct Root {
    /// Another function.
    #[sabi(last_prefix_field)]
    pub plugins: extern "C" fn() -> u32,
}

impl RootModule for RootRef {
    abi_stable::declare_root_module_statics! {RootRef}
    const BASE_NAME: &'static str = "gearbox_plugin";
    const NAME: &'static str = "gearbox_plugin";
    const VERSION_STRINGS: VersionStrings = VersionStrings::new("2.3.0");
}

extern "C" fn plugins() -> u32 {
    0
}

fn module() -> RootRef {
    Root { plugins }.leak_into_prefix()
}

extern "C" fn root() -> RootModuleResult {
    abi_stable::library::__call_root_module_loader(module)
}

type Module = <RootRef as IntoRootModuleResult>::Module;

/// What `abi_stable` looks for.
#[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
pub static HEADER: LibHeader =
    // SAFETY: `root` returns this very module.
    unsafe { LibHeader::from_constructor::<Module>(root, CheckTypeLayout::Yes) };
