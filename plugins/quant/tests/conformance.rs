//! The conformance kit on every transform, with settings of every kind.

use gearbox_quant as _;

mod quant {
    gearbox_conformance::transform_tests!("quant");
    gearbox_conformance::transform_tests!(two_bits, "quant", json!({"bits": 2, "granularity": "head"}));
    gearbox_conformance::transform_tests!(four_bits, "quant", json!({"bits": 4, "group": 7, "delta": "auto"}));
    gearbox_conformance::transform_tests!(
        sixteen_bits,
        "quant",
        json!({"bits": 16, "granularity": "channel", "group": null, "scale_dtype": "f32"})
    );
    gearbox_conformance::transform_tests!(
        symmetric,
        "quant",
        json!({"bits": 2, "symmetric": true, "granularity": "token", "group": 5, "scale_dtype": "bf16"})
    );
    gearbox_conformance::transform_tests!(
        tensor,
        "quant",
        json!({"bits": 12, "symmetric": true, "granularity": "tensor", "delta": "token"})
    );
    gearbox_conformance::transform_tests!(
        protected,
        "quant",
        json!({"bits": 3, "outliers": 0.01, "sink": 10, "recent": 9, "scale_dtype": "bf16"})
    );
    gearbox_conformance::transform_tests!(
        values,
        "quant",
        json!({"bits": 5, "outliers": 0.5, "storage": "values", "granularity": "tensor"})
    );
    gearbox_conformance::transform_tests!(reference, "quant", json!({"mode": "reference", "bits": 4}));
    gearbox_conformance::transform_tests!(
        reference_values,
        "quant",
        json!({"mode": "reference", "bits": 10, "storage": "values"})
    );
}

mod clip {
    gearbox_conformance::transform_tests!("clip");
    gearbox_conformance::transform_tests!(
        sigma,
        "clip",
        json!({"method": "sigma", "sigma": 1.5, "granularity": "token", "group": 6})
    );
    gearbox_conformance::transform_tests!(reference, "clip", json!({"mode": "reference"}));
}

mod clip_quant {
    gearbox_conformance::transform_tests!("clip-quant");
    gearbox_conformance::transform_tests!(
        percentile,
        "clip-quant",
        json!({"bits": 2, "method": "percentile", "low": 1.0, "symmetric": true, "outliers": 0.01})
    );
    gearbox_conformance::transform_tests!(
        reference,
        "clip-quant",
        json!({"mode": "reference", "method": "sigma", "storage": "values"})
    );
}

mod truncate {
    gearbox_conformance::transform_tests!("truncate");
    gearbox_conformance::transform_tests!(no_bits, "truncate", json!({"mantissa_bits": 0}));
    gearbox_conformance::transform_tests!(all_bits, "truncate", json!({"mantissa_bits": 23}));
    gearbox_conformance::transform_tests!(reference, "truncate", json!({"mode": "reference"}));
}

mod block_norm {
    gearbox_conformance::transform_tests!("block-norm");
    gearbox_conformance::transform_tests!(four_bits, "block-norm", json!({"bits": 4, "block": 16, "symmetric": false}));
    gearbox_conformance::transform_tests!(
        reference,
        "block-norm",
        json!({"mode": "reference", "top_k": 0.05, "bits": 8})
    );
    gearbox_conformance::transform_tests!(
        reference_singles,
        "block-norm",
        json!({"mode": "reference", "block": 12, "scale_dtype": "f32"})
    );
}
