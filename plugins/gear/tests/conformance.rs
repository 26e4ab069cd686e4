//! The conformance kit on `gear` and `gear-delta`.

use gearbox_gear as _;

gearbox_conformance::codec_tests!(gear, "gear");
gearbox_conformance::codec_tests!(gear_reference, "gear", json!({"mode": "reference"}));
gearbox_conformance::codec_tests!(gear_delta, "gear-delta");
gearbox_conformance::codec_tests!(gear_delta_reference, "gear-delta", json!({"mode": "reference", "level": -1}));
