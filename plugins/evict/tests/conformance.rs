//! The conformance kit on the eviction policies.

use gearbox_evict as _;

gearbox_conformance::eviction_tests!(h2o, "h2o");
gearbox_conformance::eviction_tests!(
    h2o_blocks,
    "h2o",
    json!({"block_tokens": 8, "group": "max", "score": "sum", "target_ratio": 2.5, "margin_tokens": 7})
);
gearbox_conformance::eviction_tests!(
    h2o_reference,
    "h2o",
    json!({
        "mode": "reference", "block_tokens": 8, "sinks": 4, "recent_tokens": 16, "min_tokens": 32, "update_interval": 3,
        "layers": "0..",
    })
);
gearbox_conformance::eviction_tests!(
    h2o_static,
    "h2o",
    json!({"mode": "reference", "kept_fraction": 0.4, "recent_tokens": 40, "block_tokens": 16, "min_tokens": 1})
);
gearbox_conformance::eviction_tests!(
    h2o_pyramid,
    "h2o",
    json!({"budget_tokens": 50, "layers": "1..4", "layer_budgets": {"mode": "pyramid", "beta": 3.0}})
);
gearbox_conformance::eviction_tests!(snapkv, "snapkv");
gearbox_conformance::eviction_tests!(
    snapkv_small,
    "snapkv",
    json!({"window": 5, "kernel": 2, "budget_tokens": 20, "recent_tokens": 5, "sinks": 0, "min_tokens": 3})
);
gearbox_conformance::eviction_tests!(tova, "tova");
gearbox_conformance::eviction_tests!(tova_protected, "tova", json!({"sinks": 4, "recent_fraction": 0.5}));
gearbox_conformance::eviction_tests!(window, "window");
gearbox_conformance::eviction_tests!(
    window_explicit,
    "window",
    json!({"layer_budgets": {"mode": "explicit", "weights": [1.0, 2.0, 1.0, 0.5]}, "min_tokens": 80})
);
gearbox_conformance::eviction_tests!(random, "random");
gearbox_conformance::eviction_tests!(
    random_seeded,
    "random",
    json!({"seed": 7, "budget_tokens": 1, "sinks": 0, "recent_tokens": 0})
);
gearbox_conformance::eviction_tests!(none, "none");
