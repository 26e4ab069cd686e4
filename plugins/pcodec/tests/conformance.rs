//! The conformance kit on `pcodec`.

use gearbox_pcodec as _;

gearbox_conformance::codec_tests!("pcodec");
gearbox_conformance::codec_tests!(level_0, "pcodec", json!({"level": 0}));
gearbox_conformance::codec_tests!(level_12, "pcodec", json!({"level": 12}));
