//! The conformance kit on `store`.

use gearbox_store as _;

gearbox_conformance::codec_tests!("store");
