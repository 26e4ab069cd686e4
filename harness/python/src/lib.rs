//! The compiled part of the Python package `gearbox`: pipelines over numpy arrays, a compressed cache, dumps and sweeps.
//!
//! It holds no codec and no measurement of its own. Each class wraps one type of the harness, each function calls one function of it, and
//! what they share is here: how arrays cross ([`arrays`]), how errors become exceptions ([`error`]), what is logged
//! ([`log`]), and which plugins there are ([`registry`]). The package around it is in `python/gearbox`.

#![expect(clippy::needless_pass_by_value, reason = "arguments arrive from Python by value")]

use pyo3::prelude::*;

mod arrays;
mod cache;
mod container;
mod dump;
mod error;
mod json;
mod log;
mod pipeline;
mod registry;
mod results;
mod sweep;
mod timing;

/// The compiled part of `gearbox`.
#[pymodule]
mod _gearbox {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::cache::Cache;
    #[pymodule_export]
    use crate::container::{decode, encode, inspect};
    #[pymodule_export]
    use crate::dump::{Dump, Entry};
    #[pymodule_export]
    use crate::error::GearboxError;
    #[pymodule_export]
    use crate::pipeline::Pipeline;
    #[pymodule_export]
    use crate::registry::{load_plugin, plugins};
    #[pymodule_export]
    use crate::results::read_results;
    #[pymodule_export]
    use crate::sweep::{Evaluator, Plan};
    #[pymodule_export]
    use crate::timing::rust_calls;

    /// Version of the package and of the program it belongs to.
    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name that Python has for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_init]
    #[expect(clippy::unnecessary_wraps, reason = "what an initialiser of a module is")]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::log::start();
        Ok(())
    }
}
