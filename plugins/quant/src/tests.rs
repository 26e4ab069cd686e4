//! What the lanes hold, what comes back, and which settings are refused.

use gearbox_core::{
    Bound, Chunk, ChunkMut, Context, DType, Elem, ErrorKind, Latents, LossyTransform, Registry, Role, Shape,
};
use half::f16;
use serde_json::{Value, json};

use crate::reference;

const VALUES: Context<'static> = Context::new(0, Role::Value, 0);
const KEYS: Context<'static> = Context::new(0, Role::Key, 0);

fn build(id: &str, settings: &Value) -> std::sync::Arc<dyn LossyTransform> {
    Registry::built_in().unwrap().transform(id).unwrap().build(settings).unwrap()
}

fn halves(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect()
}

fn singles(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Lanes and what they are inverted to.
fn coded(
    transform: &dyn LossyTransform,
    shape: Shape,
    dtype: DType,
    bytes: &[u8],
    cx: &Context<'_>,
) -> (Latents, Vec<u8>) {
    let mut latents = Latents::new();
    transform.forward(Chunk::new(shape, dtype, bytes).unwrap(), cx, &mut latents).unwrap();
    let mut out = vec![0xA5; bytes.len()];
    transform.inverse(&latents, cx, ChunkMut::new(shape, dtype, &mut out).unwrap()).unwrap();
    (latents, out)
}

fn names(latents: &Latents) -> Vec<String> {
    latents.lanes().iter().map(|lane| lane.spec.to_string()).collect()
}

fn as_halves(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect()
}

#[test]
fn codes_count_scales_from_the_minimum() {
    let transform = build("quant", &json!({"bits": 2}));
    let (latents, out) = coded(
        &*transform,
        Shape::new(2, 1, 4),
        DType::F16,
        &halves(&[1.0, 2.0, 3.5, 7.0, -2.0, -2.0, -1.2, 4.0]),
        &VALUES,
    );
    assert_eq!(
        names(&latents),
        ["lane `codes` (bits(2) (2, 1, 4))", "lane `scales` (f16 (2, 1, 1))", "lane `zeros` (f16 (2, 1, 1))"]
    );
    assert_eq!(latents.lane("codes").unwrap().bytes, [0, 0, 1, 3, 0, 0, 0, 3], "ties go to the even code");
    assert_eq!(latents.lane("scales").unwrap().bytes, halves(&[2.0, 2.0]));
    assert_eq!(latents.lane("zeros").unwrap().bytes, halves(&[1.0, -2.0]));
    assert_eq!(as_halves(&out), [1.0, 1.0, 3.0, 7.0, -2.0, -2.0, -2.0, 4.0]);
}

#[test]
fn symmetric_codes_have_zero_in_the_middle() {
    let transform = build("quant", &json!({"bits": 3, "symmetric": true, "granularity": "head"}));
    let values = [-6.0, 1.1, 0.0, 0.3, 2.9, 0.1, -3.2, 0.0];
    let (latents, out) = coded(&*transform, Shape::new(2, 2, 2), DType::F32, &singles(&values), &VALUES);
    assert_eq!(names(&latents), ["lane `codes` (bits(3) (2, 2, 2))", "lane `scales` (f16 (1, 2, 1))"]);
    // The first head has -6, 1.1, 2.9 and 0.1, and a scale of 2.
    assert_eq!(latents.lane("codes").unwrap().bytes, [0, 4, 3, 3, 4, 3, 0, 3]);
    let scales = as_halves(&latents.lane("scales").unwrap().bytes);
    assert_eq!(scales[..1], [2.0]);
    assert!((3.2 / 3.0..3.2 / 3.0 * 1.001).contains(&scales[1]), "rounded up: {scales:?}");
    assert_eq!(out, singles(&[-6.0, 2.0, 0.0, 0.0, 2.0, 0.0, -3.0 * scales[1], 0.0]));
}

#[test]
fn groups_of_channels_span_tokens_and_short_chunks_have_none() {
    let transform = build("quant", &json!({"bits": 4, "group": 32}));
    for (seq, parameters) in [(23, Shape::new(23, 2, 2)), (24, Shape::new(1, 2, 50)), (100, Shape::new(3, 2, 50))] {
        let shape = Shape::new(seq, 2, 50);
        let values: Vec<f32> = (0..shape.elements()).map(|i| (i * 37 % 101) as f32).collect();
        let (latents, _) = coded(&*transform, shape, DType::F16, &halves(&values), &KEYS);
        assert_eq!(latents.lane("scales").unwrap().spec.shape, parameters, "{seq} tokens");
    }
}

#[test]
fn constant_groups_come_back_exactly_and_cost_nothing() {
    for (dtype, bytes) in
        [(DType::F16, halves(&[0.1, 0.1, 65504.0, 65504.0])), (DType::F32, singles(&[0.1, 0.1, 3e38, 3e38]))]
    {
        let transform = build("quant", &json!({"granularity": "token"}));
        let (latents, out) = coded(&*transform, Shape::new(2, 1, 2), dtype, &bytes, &VALUES);
        assert_eq!(out, bytes);
        assert_eq!(latents.lanes().len(), 1, "{:?}", names(&latents));
        assert_eq!(&latents.lanes()[0].spec.name, "zeros");
    }
    let transform = build("quant", &json!({"symmetric": true}));
    let (latents, out) = coded(&*transform, Shape::new(2, 1, 2), DType::F16, &[0; 8], &VALUES);
    assert_eq!((latents.lanes().len(), out), (0, vec![0; 8]));
}

#[test]
fn scales_that_do_not_fit_their_type_are_f32() {
    let transform = build("quant", &json!({"granularity": "tensor", "bits": 8}));
    for (values, elem) in [
        (vec![0.0, 1.0, 255.0], Elem::F16),
        (vec![-3e38, 1.0, 3e38], Elem::F32),        // too large for F16
        (vec![0.0, 1e-9, 2e-9], Elem::F32),         // too small
        (vec![10.01, 10.010_1, 10.011], Elem::F32), // the minimum would be too coarse
    ] {
        let (latents, out) = coded(&*transform, Shape::new(3, 1, 1), DType::F32, &singles(&values), &VALUES);
        assert_eq!(latents.lane("scales").unwrap().spec.elem, elem, "{values:?}");
        let step = (values[2] - values[0]) / 255.0;
        for (from, to) in values.iter().zip(out.as_chunks().0) {
            let to = f32::from_le_bytes(*to);
            assert!((to - from).abs() <= step * 0.51, "{from:e}: {to:e}");
        }
    }
}

#[test]
fn what_is_not_finite_comes_back_to_the_bit() {
    let transform = build("quant", &json!({"bits": 4, "granularity": "tensor"}));
    let odd = [0x7C00u16, 0xFC00, 0x7C01, 0xFE55, 0x7E00];
    let words: Vec<u16> = (0..20).map(|i| if i % 4 == 3 { odd[i / 4] } else { 0x3C00 + i as u16 }).collect();
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (latents, out) = coded(&*transform, Shape::new(20, 1, 1), DType::F16, &bytes, &VALUES);
    let back: Vec<u16> = out.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect();
    for place in (3..20).step_by(4) {
        assert_eq!(back[place], words[place]);
    }
    assert_eq!(latents.lane("outliers").unwrap().spec.shape, Shape::flat(5));
    // The others are coded as if they were alone: 0x3C00 to 0x3C12 with 16 levels.
    assert!(back.iter().zip(&words).all(|(back, word)| back.abs_diff(*word) <= 1), "{back:x?}");
    let all: Vec<u8> = [0x7C01u16; 6].into_iter().flat_map(u16::to_le_bytes).collect();
    assert_eq!(coded(&*transform, Shape::new(6, 1, 1), DType::F16, &all, &VALUES).1, all);
}

#[test]
fn outliers_do_not_widen_the_scale() {
    let mut values: Vec<f32> = (0..64u8).map(|i| f32::from(i % 16)).collect();
    values[40] = 1000.0;
    let transform = build("quant", &json!({"bits": 4, "outliers": 0.016}));
    let (latents, out) = coded(&*transform, Shape::new(1, 1, 64), DType::F16, &halves(&values), &VALUES);
    assert_eq!(as_halves(&out), values, "16 levels are enough for all the others");
    assert_eq!(latents.lane("outliers").unwrap().bytes, halves(&[1000.0]));
}

#[test]
fn protected_tokens_are_exact() {
    let transform = build("quant", &json!({"bits": 2, "sink": 3, "recent": 2, "granularity": "tensor"}));
    let bytes = halves(&[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]);
    let rows = |first_token, end_token| {
        let cx = Context { first_token, end_token, ..VALUES };
        let (latents, out) = coded(&*transform, Shape::new(8, 1, 1), DType::F16, &bytes, &cx);
        let codes = latents.lane("codes").map_or(0, |lane| lane.spec.shape.seq);
        let exact = latents.lane("exact").map_or(0, |lane| lane.spec.shape.seq);
        assert_eq!(codes + exact, 8);
        let kept: Vec<usize> = (0..8).filter(|row| out[2 * row..2 * row + 2] == bytes[2 * row..2 * row + 2]).collect();
        (exact, kept)
    };
    assert_eq!(rows(0, Some(8)).0, 5);
    assert!([0, 1, 2, 6, 7].iter().all(|row| rows(0, Some(8)).1.contains(row)));
    assert_eq!(rows(0, None).0, 3, "where the sequence ends is not known");
    assert_eq!(rows(2, Some(11)).0, 2, "one sink, and one of the recent tokens");
    assert_eq!(rows(50, Some(1000)).0, 0);
    assert_eq!(rows(0, Some(4)).0, 8, "what lies behind the end is recent");
}

#[test]
fn differences_are_taken_where_they_pay() {
    // Each channel climbs by about one step of 256 per token: the codes are spread, their differences are few.
    let shape = Shape::new(128, 1, 16);
    let climbing: Vec<f32> = (0..shape.elements()).map(|i| (i / 16) as f32 + (i % 16 * 7 % 16) as f32 / 8.0).collect();
    let noise: Vec<f32> = (0..shape.elements()).map(|i| ((i * i * 31 + i * 17) % 251) as f32).collect();
    let auto = build("quant", &json!({"granularity": "tensor", "delta": "auto"}));
    let (climbing, noise) = (halves(&climbing), halves(&noise));
    let (latents, out) = coded(&*auto, shape, DType::F16, &climbing, &KEYS);
    assert_eq!(latents.lane("delta").unwrap().bytes, [1]);
    let codes = &latents.lane("codes").unwrap().bytes;
    assert!(codes[16..].iter().all(|code| [1, 2].contains(code)), "{codes:?}");
    let plain = build("quant", &json!({"granularity": "tensor"}));
    assert_eq!(coded(&*plain, shape, DType::F16, &climbing, &KEYS).1, out);
    let always = build("quant", &json!({"granularity": "tensor", "delta": "token"}));
    let (latents, same) = coded(&*always, shape, DType::F16, &climbing, &KEYS);
    assert_eq!((names(&latents).len(), &latents.lane("codes").unwrap().bytes, same), (2, codes, out));
    assert!(coded(&*auto, shape, DType::F16, &noise, &KEYS).0.lane("delta").is_err());
}

#[test]
fn values_are_what_codes_restore() {
    let bytes = halves(&(0..64u8).map(|i| f32::from(i) * 0.37 - 9.0).collect::<Vec<_>>());
    let shape = Shape::new(2, 1, 32);
    for (id, mode) in
        [("quant", "default"), ("quant", "reference"), ("clip-quant", "default"), ("clip-quant", "reference")]
    {
        let restored = ["codes", "values"].map(|storage| {
            let transform = build(id, &json!({"mode": mode, "bits": 4, "storage": storage}));
            let (latents, out) = coded(&*transform, shape, DType::F16, &bytes, &VALUES);
            assert_eq!(latents.lane("tensor").is_ok(), storage == "values");
            out
        });
        assert_eq!(restored[0], restored[1], "{id}, {mode}");
    }
}

#[test]
fn reference_codes_restore_what_the_reference_stores() {
    let bytes = halves(&[0.3, -0.001, 0.0, -0.0, -0.29, 0.25, 1e-7, -1e-7]);
    let shape = Shape::new(2, 1, 4);
    for bits in [2, 4, 8, 10, 16] {
        let transform = build("quant", &json!({"mode": "reference", "bits": bits}));
        let mut expected = Vec::new();
        reference::quantise(Chunk::new(shape, DType::F16, &bytes).unwrap(), bits, &mut expected).unwrap();
        let (latents, out) = coded(&*transform, shape, DType::F16, &bytes, &VALUES);
        assert_eq!(out, expected, "{bits} bits");
        assert_eq!(
            names(&latents),
            [format!("lane `codes` (bits({bits}) (2, 1, 4))"), "lane `scales` (f32 (1, 1, 1))".to_owned()]
        );
    }
    let zeros = halves(&[0.0, -0.0]);
    let transform = build("quant", &json!({"mode": "reference"}));
    assert_eq!(coded(&*transform, Shape::new(2, 1, 1), DType::F16, &zeros, &VALUES).1, zeros);
    let odd = halves(&[1.0, f32::INFINITY]);
    let out = as_halves(&coded(&*transform, Shape::new(2, 1, 1), DType::F16, &odd, &VALUES).1);
    assert!(out.iter().all(|value| value.is_nan()), "one infinity makes all values NaN");
}

#[test]
fn reference_blocks_are_stored_and_priced_as_the_reference_does() {
    let values: Vec<f32> = (0..60u8).map(|i| (f32::from(i) - 20.0) * 0.013_7).collect();
    let shape = Shape::new(3, 2, 10);
    for (dtype, bytes, scale) in [
        (DType::F16, halves(&values), "f16"),
        (DType::F32, singles(&values), "f16"),
        (DType::F32, singles(&values), "f32"),
    ] {
        let settings = json!({"mode": "reference", "block": 4, "bits": 8, "top_k": 0.2, "scale_dtype": scale});
        let transform = build("block-norm", &settings);
        let norm = reference::BlockNorm {
            block_size: 4,
            topk_ratio: 0.2,
            bits: 8,
            scale_bytes: if scale == "f16" { 2 } else { 4 },
            topk_extra_scale_bytes: 4,
            index_bytes: 4,
        };
        let normalised = norm.normalise(Chunk::new(shape, dtype, &bytes).unwrap()).unwrap();
        let mut expected = Vec::new();
        reference::narrow(&norm.restore(shape, dtype, &normalised), dtype, &mut expected);
        let (latents, out) = coded(&*transform, shape, dtype, &bytes, &VALUES);
        assert_eq!(out, expected, "{dtype}, {scale}");
        assert_eq!(latents.lane("normalised").unwrap().bytes, normalised.stored);
        let priced: usize = latents.lanes().iter().skip(1).map(|lane| lane.bytes.len()).sum();
        assert_eq!(priced as u64, norm.metadata_bytes(shape));
    }
}

#[test]
fn clipping_goes_to_representable_bounds_and_keeps_nan() {
    let transform = build("clip", &json!({"low": 25.0, "high": 75.0, "granularity": "token"}));
    let bytes = halves(&[1.0, 2.0, 3.0, 4.0, 5.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN]);
    let (latents, out) = coded(&*transform, Shape::new(1, 1, 8), DType::F16, &bytes, &VALUES);
    assert_eq!(names(&latents), ["lane `tensor` (f16 (1, 1, 8))"]);
    assert_eq!(as_halves(&out)[..7], [2.0, 2.0, 3.0, 4.0, 4.0, 4.0, 2.0]);
    assert_eq!(out[14..], bytes[14..]);
}

#[test]
fn clipped_ranges_lose_less_at_few_bits() {
    // A triangle-shaped distribution with a long tail.
    let values: Vec<f32> = (0..256u16)
        .map(|i| {
            f32::from(i * 89 % 256) / 256.0 + f32::from(i * 57 % 256) / 256.0 + if i % 64 == 9 { 1.5 } else { 0.0 }
        })
        .collect();
    let bytes = halves(&values);
    let error = |id: &str| {
        let transform = build(id, &json!({"bits": 2, "granularity": "tensor"}));
        let out = as_halves(&coded(&*transform, Shape::new(4, 1, 64), DType::F16, &bytes, &VALUES).1);
        out.iter().zip(&values).map(|(a, b)| (a - b) * (a - b)).sum::<f32>()
    };
    assert!(error("clip-quant") < 0.9 * error("quant"), "{} {}", error("clip-quant"), error("quant"));
}

#[test]
fn bounds_are_those_of_the_levels() {
    let bound = |id, settings: Value| build(id, &settings).bound();
    assert_eq!(bound("quant", json!({"bits": 2})), Bound::Peak(1.125 * 1.125 * 2.0 / 3.0));
    assert_eq!(bound("quant", json!({"bits": 8, "symmetric": true})), Bound::Peak(1.125 * 1.125 * 2.0 / 254.0));
    assert_eq!(bound("quant", json!({"mode": "reference"})), Bound::Unbounded);
    assert_eq!(bound("truncate", json!({})), Bound::Relative(1.0 / 128.0));
    assert_eq!(bound("clip-quant", json!({})), Bound::Unbounded);
}

#[test]
fn settings_without_meaning_are_refused_by_name() {
    let registry = Registry::built_in().unwrap();
    for (id, settings, message) in [
        ("quant", json!({"bits": 1}), "`/bits`: 1 is out of range, expected 2 to 16"),
        ("quant", json!({"bits": 0}), "`/bits`: 0 is out of range, expected 2 to 16"),
        ("quant", json!({"group": 0}), "`/group`: 0 is out of range"),
        ("quant", json!({"outliers": 0.6}), "`/outliers`: 0.6 is out of range, expected 0.0 to 0.5"),
        ("block-norm", json!({"top_k": 1.5}), "`/top_k`: 1.5 is out of range, expected 0.0 to 1.0"),
        ("block-norm", json!({"block": 0}), "`/block`: 0 is out of range"),
        ("block-norm", json!({"mode": "reference", "scale_dtype": "bf16"}), "`/scale_dtype`: \"bf16\" has no meaning"),
        ("truncate", json!({"mantissa_bits": 24}), "`/mantissa_bits`: 24 is out of range, expected 0 to 23"),
        ("clip", json!({"low": 99.0, "high": 1.0}), "expected `low` below `high`, got 99 and 1"),
        ("clip", json!({"low": 99.95}), "expected `low` below `high`, got 99.95 and 99.95"),
        ("clip", json!({"method": "median"}), "`/method`"),
        ("clip", json!({"sigma": 0.0}), "`/sigma`: 0.0 is out of range"),
        (
            "clip-quant",
            json!({"mode": "reference", "method": "mse"}),
            "`/method`: \"mse\" has no meaning in mode `reference`",
        ),
        (
            "quant",
            json!({"mode": "reference", "symmetric": true}),
            "`/symmetric`: true has no meaning in mode `reference`, expected false",
        ),
        ("quant", json!({"mode": "reference", "sink": 4}), "`/sink`: 4 has no meaning"),
        ("quant", json!({"bit": 4}), "`/bit`: unknown key"),
    ] {
        let error = registry.transform(id).unwrap().build(&settings).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{id} {settings}");
        assert!(error.to_string().contains(message), "{id} {settings}: {error}");
    }
}

#[test]
fn settings_that_do_the_same_are_the_same() {
    let effective = |id, settings: Value, role| build(id, &settings).effective_config(role, 64);
    let same = |id, a: Value, b: Value, role| assert_eq!(effective(id, a, role), effective(id, b, role));
    same("quant", json!({}), json!({"granularity": "channel"}), Role::Key);
    same("quant", json!({}), json!({"granularity": "token", "group": 200}), Role::Value);
    same("quant", json!({"granularity": "tensor"}), json!({"granularity": "tensor", "group": 3}), Role::Key);
    same("quant", json!({"storage": "values"}), json!({"storage": "values", "delta": "auto"}), Role::Key);
    same("block-norm", json!({"block": 128, "top_k": 0.1}), json!({"block": 64}), Role::Key);
    same(
        "block-norm",
        json!({"mode": "reference", "block": 128}),
        json!({"mode": "reference", "block": 64}),
        Role::Key,
    );
    same("clip", json!({}), json!({"low": 0.05, "high": 99.95, "sigma": 7.0}), Role::Key);
    same("clip-quant", json!({}), json!({"method": "mse", "low": 2.0}), Role::Value);
    assert_ne!(effective("quant", json!({}), Role::Key), effective("quant", json!({}), Role::Value));
    // What is effective is a legal setting, too.
    for id in ["quant", "clip", "clip-quant", "truncate", "block-norm"] {
        for role in Role::ALL {
            build(id, &effective(id, json!({}), role));
        }
    }
}
