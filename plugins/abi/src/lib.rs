//! Plugins loaded at run time: one ABI for Rust and C, the loader, and the export macro.
//!
//! One set of `repr(C)` structs ([`raw`], and `include/gearbox_plugin.h` for C) is the whole boundary. A C library exports one versioned
//! function that returns them. A Rust library exports an `abi_stable` root module that returns the same, so that every layout is compared
//! when it is loaded; [`export_plugins!`] writes it from types that implement core's traits. [`load`] turns either into the
//! [entries](gearbox_core::Entry) that built-ins have. `docs/ABI.md` says what is promised, and for how long.
//!
//! ```ignore
//! // lib.rs of a cdylib
//! gearbox_abi::export_plugins! { codecs: [DeltaVarint], transforms: [Hadamard] }
//! ```
//!
//! ```no_run
//! use gearbox_abi::{Host, load};
//! use gearbox_core::Registry;
//!
//! let mut registry = Registry::built_in()?;
//! for entry in &load(&"target/release/libdemo.so".into(), &Host::default())?.entries {
//!     registry.insert(entry.clone())?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! This is the only crate of the workspace whose business is `unsafe`. What a library writes is checked as far as that is possible from
//! inside the same process; the rest is what `--isolate` is for.

#![expect(
    unsafe_code,
    reason = "pointers of other libraries are read and written here, so that no other crate needs to"
)]
#![warn(clippy::undocumented_unsafe_blocks, unsafe_op_in_unsafe_fn)]

pub mod convert;
pub mod guest;
mod host;
mod load;
pub mod raw;
#[doc(hidden)]
pub mod root;
pub mod status;

pub use guest::{Level, log, threads};
pub use load::{Abi, Host, Library, LoadError, LoadErrorKind, Log, Source, load, load_all};

#[doc(hidden)]
pub use abi_stable::library::{CheckTypeLayout, LibHeader, RootModuleResult};

/// Exports the plugins of a `cdylib`.
///
/// Every type implements [`Plugin`](gearbox_core::Plugin) and the trait of its list: [`Codec`](gearbox_core::Codec),
/// [`LossyTransform`](gearbox_core::LossyTransform) or [`EvictionPolicy`](gearbox_core::EvictionPolicy). Lists may be left out, but keep this order. Once per
/// library, at the root of the crate; a crate that is also linked as an `rlib` keeps the macro in a `cdylib` of its own.
///
/// Panics are caught, so the library must not be built with `panic = "abort"`.
///
/// ```ignore
/// gearbox_abi::export_plugins! { codecs: [A, B], transforms: [C], evictions: [D] }
/// ```
#[macro_export]
macro_rules! export_plugins {
    (
        $(codecs: [$($codec:ty),* $(,)?] $(,)?)?
        $(transforms: [$($transform:ty),* $(,)?] $(,)?)?
        $(evictions: [$($eviction:ty),* $(,)?] $(,)?)?
    ) => {
        #[cfg(panic = "abort")]
        ::std::compile_error!("plugins must be built with `panic = \"unwind\"`, since a panic would end the host");

        const _: () = {
            fn plugins() -> ::std::vec::Vec<$crate::guest::Exported> {
                ::std::vec![
                    $($($crate::guest::codec::<$codec>(),)*)?
                    $($($crate::guest::transform::<$transform>(),)*)?
                    $($($crate::guest::eviction::<$eviction>(),)*)?
                ]
            }

            unsafe extern "C" fn library(host: *const $crate::raw::Host) -> *const $crate::raw::Library {
                // SAFETY: the host passes null or what lives as long as the process; see `docs/ABI.md`.
                unsafe { $crate::guest::library(host, plugins) }
            }

            extern "C" fn root() -> $crate::RootModuleResult {
                $crate::guest::root(library)
            }

            /// What `abi_stable` looks for; a test compares the name.
            // SAFETY: the name is abi_stable's own, and one library has one root module.
            #[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
            pub static HEADER: $crate::LibHeader =
                // SAFETY: `root` returns the root module that is named here.
                unsafe {
                    $crate::LibHeader::from_constructor::<$crate::root::RootRef>(root, $crate::CheckTypeLayout::Yes)
                };
        };
    };
}
