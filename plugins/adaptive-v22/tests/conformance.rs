//! The conformance kit on `adaptive-v22`.

use gearbox_adaptive_v22 as _;

gearbox_conformance::codec_tests!("adaptive-v22");
gearbox_conformance::codec_tests!(trial, "adaptive-v22", json!({"choice": "trial", "block_seq": 5}));
gearbox_conformance::codec_tests!(reference, "adaptive-v22", json!({"choice": "reference", "level": -1}));
gearbox_conformance::codec_tests!(
    shuffled,
    "adaptive-v22",
    json!({"bitshuffle": true, "block_seq": 7, "value_high": ["pair_delta_delta_seq"]})
);
