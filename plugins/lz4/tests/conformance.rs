//! The conformance kit on `lz4`.

use gearbox_lz4 as _;

gearbox_conformance::codec_tests!("lz4");
