//! The conformance kit on `planes` and `rans`.

use gearbox_planes as _;

gearbox_conformance::codec_tests!(planes, "planes");
gearbox_conformance::codec_tests!(planes_without_references, "planes", json!({"references": "none"}));
gearbox_conformance::codec_tests!(planes_with_history, "planes", json!({"history": 100}));
gearbox_conformance::codec_tests!(rans, "rans");
gearbox_conformance::codec_tests!(rans_plain, "rans", json!({"contexts": "none"}));
gearbox_conformance::codec_tests!(rans_head, "rans", json!({"contexts": "head"}));
gearbox_conformance::codec_tests!(rans_previous, "rans", json!({"contexts": "previous"}));
gearbox_conformance::codec_tests!(planes_trained, "planes", json!({"tables": "trained"}));
