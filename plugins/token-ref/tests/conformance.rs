//! The conformance kit on `token-ref`: with the rotation that the context tells, and with one of its own where it tells none.

use gearbox_token_ref as _;

gearbox_conformance::transform_tests!("token-ref");
gearbox_conformance::transform_tests!(own_rope, "token-ref", json!({"rope": {"theta": 500.0}}));
gearbox_conformance::transform_tests!(adjacent_rope, "token-ref", json!({"rope": {"pairing": "adjacent"}}));
