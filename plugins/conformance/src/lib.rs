//! The kit that every Gearbox plugin passes, built in or not.
//!
//! A *property* is a plain function that takes the thing under test and its settings and returns an [`Outcome`]: how many cases it tried,
//! and the first counter-example with shape, element type and seed. [`run`] runs all of them for a program such as `gearbox plugin check`;
//! [`codec_tests!`], [`transform_tests!`] and [`eviction_tests!`] make one named test per property in a plugin's `tests/conformance.rs`:
//!
//! ```ignore
//! use gearbox_zstd as _;
//!
//! gearbox_conformance::codec_tests!("zstd");
//! gearbox_conformance::codec_tests!(level_19, "zstd", json!({"level": 19}));
//! ```
//!
//! The tests also pin the schema of the settings ([`files::schema_is_pinned`]) and, of codecs and transforms, decode what earlier versions
//! wrote ([`files::goldens_decode`]); run them once with `GEARBOX_BLESS=1` to write the missing files.
//!
//! | What the kit attacks | How |
//! |---|---|
//! | exactness, declared bounds | grids of shapes and kinds of data, among them every 16-bit pattern, NaN payloads, subnormals; chunks of huge, tiny, nearly equal and very different numbers |
//! | context | with and without every part that is needed or wanted, keys and values |
//! | buffers | prefix of `out`, `max_encoded_len`, unfilled bytes, wrong lengths |
//! | damage | every truncation and bit flip of small outputs, samples of larger ones, bytes behind the end; lanes missing or of another shape |
//! | eviction | whole requests, the prompt in one step and in many, with attention that is even, zero or not finite; what is promised of a plan; caches without tokens and with one |
//! | sharing | eight threads on one instance, two instances side by side |
//! | settings | resolved settings build the same plugin; unknown keys and values outside a range are refused |
//!
//! What it cannot see: a hang (the test hangs too; a call that ends late is reported), and allocations below 1 GiB or on other systems
//! than Linux, where no safe way to count them exists. Reading data that was never written stays to the sanitizers.

pub mod codec;
pub mod config;
mod damage;
pub mod data;
pub mod eviction;
pub mod files;
mod memory;
mod outcome;
pub mod reference;
mod sharing;
pub mod transform;

use gearbox_core::AnyEntry;
use serde_json::Value;

pub use outcome::Outcome;

#[doc(hidden)]
pub use serde_json::json;

/// Runs every property of a plugin's kind.
pub fn run(entry: &AnyEntry, settings: &Value) -> Vec<Outcome> {
    match entry {
        AnyEntry::Codec(entry) => codec::run_codec(entry, settings),
        AnyEntry::Transform(entry) => transform::run_transform(entry, settings),
        AnyEntry::Eviction(entry) => eviction::run_eviction(entry, settings),
    }
}

/// A built-in plugin, for tests.
///
/// # Panics
/// If it is not linked into this program.
fn linked<T>(entry: gearbox_core::Result<T>) -> T {
    entry.unwrap_or_else(|error| panic!("{error}; does the test file name the plugin, as in `use gearbox_zstd as _;`?"))
}

/// Makes one named test per property of a built-in codec.
///
/// The test file needs one more line that links the plugin, such as `use gearbox_zstd as _;`. Tests live in a module `codec`, or in the
/// module that the first argument names; settings default to `{}`. `json!` is in scope for the settings.
///
/// ```ignore
/// gearbox_conformance::codec_tests!("zstd");
/// gearbox_conformance::codec_tests!("zstd", json!({"level": 19}));
/// gearbox_conformance::codec_tests!(level_19, "zstd", json!({"level": 19}));
/// ```
#[macro_export]
macro_rules! codec_tests {
    ($($arguments:tt)*) => {
        $crate::__plugin_tests!(codec; $($arguments)*);
    };
}

/// Makes one named test per property of a built-in transform, in a module `transform` or the one that the first argument names.
///
/// See [`codec_tests!`] for the arguments.
///
/// ```ignore
/// gearbox_conformance::transform_tests!("quant");
/// gearbox_conformance::transform_tests!(four_bits, "quant", json!({"bits": 4}));
/// ```
#[macro_export]
macro_rules! transform_tests {
    ($($arguments:tt)*) => {
        $crate::__plugin_tests!(transform; $($arguments)*);
    };
}

/// Makes one named test per property of a built-in eviction policy, in a module `eviction` or the one that the first argument names.
///
/// See [`codec_tests!`] for the arguments.
///
/// ```ignore
/// gearbox_conformance::eviction_tests!("h2o");
/// gearbox_conformance::eviction_tests!(blocks, "h2o", json!({"block_tokens": 16}));
/// ```
#[macro_export]
macro_rules! eviction_tests {
    ($($arguments:tt)*) => {
        $crate::__plugin_tests!(eviction; $($arguments)*);
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __plugin_tests {
    ($kind:ident; $id:literal $(, $settings:expr)?) => {
        $crate::__plugin_tests!($kind; $kind, $id $(, $settings)?);
    };
    ($kind:ident; $module:ident, $id:literal) => {
        $crate::__plugin_tests!($kind; $module, $id, $crate::json!({}));
    };
    ($kind:ident; $module:ident, $id:literal, $settings:expr) => {
        mod $module {
            #[allow(unused_imports, reason = "settings are often written with `json!`, but need not be")]
            use $crate::json;

            $crate::__properties!($kind, __tests, $id, $settings);

            #[test]
            fn schema_is_pinned() {
                let folder = ::std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
                $crate::files::schema_is_pinned(&$crate::$kind::find($id), &folder).expect_passed();
            }

            $crate::__goldens!($kind, $id, $settings);
        }
    };
}

/// Eviction policies write no bytes.
#[doc(hidden)]
#[macro_export]
macro_rules! __goldens {
    (eviction, $id:expr, $settings:expr) => {};
    ($kind:ident, $id:expr, $settings:expr) => {
        #[test]
        fn goldens_decode() {
            let folder = ::std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens");
            $crate::files::goldens_decode(&$crate::$kind::find($id), &$settings, &folder).expect_passed();
        }
    };
}

/// The one list of properties of each kind: hands it to another macro of this crate.
#[doc(hidden)]
#[macro_export]
macro_rules! __properties {
    (codec, $then:ident $(, $argument:expr)*) => {
        $crate::$then! {
            [codec, $($argument),*]
            round_trip_is_exact_over_shapes
            round_trip_is_exact_over_data
            empty_lanes_round_trip
            encode_appends
            max_encoded_len_holds
            decode_fills_every_byte
            decode_survives_truncation
            decode_survives_bit_flips
            decode_survives_trailing_bytes
            decode_survives_another_shape
            decode_rejects_wrong_lengths
            undeclared_elements_are_refused
            values_above_the_width_are_refused_or_kept
            needs_are_honoured
            eight_threads_share_one_instance
            instances_agree
            artifacts_round_trip
            settings_are_a_fixed_point
            settings_are_strict
            entry_is_described
        }
    };
    (transform, $then:ident $(, $argument:expr)*) => {
        $crate::$then! {
            [transform, $($argument),*]
            round_trip_keeps_the_bound_over_shapes
            round_trip_keeps_the_bound_over_data
            round_trip_keeps_the_bound_over_magnitudes
            empty_chunks_round_trip
            lanes_are_well_formed
            inverse_fills_every_byte
            inverse_survives_other_lanes
            inverse_survives_other_values
            inverse_survives_another_shape
            inverse_survives_another_context
            undeclared_dtypes_are_refused
            needs_are_honoured
            wanted_context_is_optional
            eight_threads_share_one_instance
            instances_agree
            settings_are_a_fixed_point
            settings_are_strict
            entry_is_described
        }
    };
    (eviction, $then:ident $(, $argument:expr)*) => {
        $crate::$then! {
            [eviction, $($argument),*]
            keep_sets_are_well_formed
            budget_is_met
            sinks_and_recent_tokens_stay
            strange_attention_is_harmless
            small_caches_are_planned
            steps_may_be_split
            sessions_are_independent
            instances_agree
            settings_are_a_fixed_point
            settings_are_strict
            entry_is_described
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __tests {
    ([$kind:ident, $id:expr, $settings:expr] $($property:ident)*) => {
        $(#[test]
        fn $property() {
            $crate::$kind::$property(&$crate::$kind::find($id), &$settings).expect_passed();
        })*
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __outcomes {
    ([$kind:ident, $entry:expr, $settings:expr] $($property:ident)*) => {
        vec![$($crate::$kind::$property($entry, $settings)),*]
    };
}
