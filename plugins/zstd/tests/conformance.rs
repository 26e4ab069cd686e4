//! The conformance kit on `zstd`.

use gearbox_zstd as _;

gearbox_conformance::codec_tests!("zstd");
gearbox_conformance::codec_tests!(level_7, "zstd", json!({"level": 7}));
gearbox_conformance::codec_tests!(fastest, "zstd", json!({"level": -7}));
