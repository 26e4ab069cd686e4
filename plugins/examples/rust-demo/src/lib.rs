//! Third-party plugins in Rust: the codec `delta-varint` and the transform `hadamard`, in one shared library.
//!
//! Written as an outsider would: the crate depends on `gearbox-abi` and `gearbox-core`, implements their traits, and exports the types with
//! one macro line. `cargo build --release` makes the library; `gearbox plugin check` runs the conformance kit on it.

#![forbid(unsafe_code)]

mod delta_varint;
mod hadamard;

pub use delta_varint::DeltaVarint;
pub use hadamard::Hadamard;

gearbox_abi::export_plugins! { codecs: [DeltaVarint], transforms: [Hadamard] }
