//! The check vectors of the reference: its synthetic dump, and what it computed on it.

#![expect(clippy::float_cmp, reason = "what is computed is exact: equal to the last bit")]

use gearbox_core::{Chunk, DType, ErrorKind, Shape};

use super::element::{Element, F16};
use super::*;

/// Shape and bytes.
type Tensor = (Shape, Vec<u8>);

fn mix(x: u32) -> u32 {
    let x = (x ^ x >> 16).wrapping_mul(0x7FEB_352D);
    let x = (x ^ x >> 15).wrapping_mul(0x846C_A68B);
    x ^ x >> 16
}

const HEADS: usize = 2;
const DIM: usize = 80;

/// A tensor of the synthetic dump.
fn synthetic(dtype: DType, tag: u32, key: bool, seq: usize) -> Tensor {
    let shape = Shape::new(seq, HEADS, DIM);
    let mut values = Vec::new();
    for t in 0..seq as u32 {
        for h in 0..HEADS as u32 {
            for d in 0..DIM as u32 {
                let a = (mix(65536 * tag + 1024 * h + d) & 0xFFF).cast_signed();
                let b = mix(0x9E37_79B9 ^ tag << 24 ^ t << 16 ^ h << 10 ^ d);
                let gain = if key && d % 16 == 7 { 16 } else { 1 };
                let sum = (a - 2048) + ((b & 0x3FF).cast_signed() - 512);
                values.push((gain * (sum * 1024 + (b >> 10 & 0x3FF).cast_signed())) as f32 / (1 << 20) as f32);
            }
        }
    }
    let mut bytes = Vec::new();
    narrow(&values, dtype, &mut bytes);
    (shape, bytes)
}

/// Keys of layer 2, prefill.
fn keys(dtype: DType) -> Tensor {
    synthetic(dtype, 8, true, 24)
}

/// Values of layer 2, prefill.
fn values(dtype: DType) -> Tensor {
    synthetic(dtype, 9, false, 24)
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 })
    })
}

fn chunk(dtype: DType, tensor: &Tensor) -> Chunk<'_> {
    Chunk::new(tensor.0, dtype, &tensor.1).unwrap()
}

fn floats(dtype: DType, values: &[f32]) -> Tensor {
    let mut bytes = Vec::new();
    narrow(values, dtype, &mut bytes);
    (Shape::new(1, 1, values.len()), bytes)
}

fn widened(dtype: DType, shape: Shape, bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::new();
    widen(Chunk::new(shape, dtype, bytes).unwrap(), &mut out);
    out
}

fn quantised(dtype: DType, tensor: &Tensor, bits: u8) -> Vec<u8> {
    let mut out = Vec::new();
    quantise(chunk(dtype, tensor), bits, &mut out).unwrap();
    out
}

fn clipped(dtype: DType, tensor: &Tensor, how: Clip) -> Tensor {
    let mut out = Vec::new();
    clip(chunk(dtype, tensor), how, &mut out);
    (tensor.0, out)
}

fn truncated(dtype: DType, tensor: &Tensor, bits: u8) -> Vec<u8> {
    let mut out = Vec::new();
    truncate(chunk(dtype, tensor), bits, &mut out);
    out
}

const PERCENTILE: Clip = Clip::Percentile { low: 1.0, high: 99.0 };
const SIGMA: Clip = Clip::Sigma(3.0);

fn norm(block_size: usize, bits: u8) -> BlockNorm {
    BlockNorm { block_size, topk_ratio: 0.8, bits, scale_bytes: 2, topk_extra_scale_bytes: 4, index_bytes: 4 }
}

#[test]
fn crc_is_that_of_ieee() {
    assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
}

#[test]
fn synthetic_dump_is_that_of_the_reference() {
    let first = &widened(DType::F32, keys(DType::F32).0, &keys(DType::F32).1)[..4];
    assert_eq!(first, [0.206_695_56, 1.222_506_5, 0.413_324_36, -0.707_330_7]);
    assert_eq!(crc32(&keys(DType::F16).1), 0xC215_E72D);
    assert_eq!(crc32(&keys(DType::F32).1), 0xD459_D42D);
    assert_eq!(crc32(&values(DType::F16).1), 0xD1A1_B431);
}

#[test]
fn quantised_bytes_are_those_of_the_reference() {
    let tensor = keys(DType::F16);
    for (bits, expected) in [(4, 0x1F44_F249), (8, 0x3080_C9F4), (10, 0x6305_C7E1)] {
        assert_eq!(crc32(&quantised(DType::F16, &tensor, bits)), expected, "{bits} bits");
    }
    assert_eq!(crc32(&quantised(DType::F32, &keys(DType::F32), 8)), 0xCE0A_D83F);
    let words = quantised(DType::F16, &tensor, 8);
    let count = |word: u16| words.as_chunks::<2>().0.iter().filter(|bytes| **bytes == word.to_le_bytes()).count();
    assert_eq!((count(0x8000), count(0)), (96, 108));
}

#[test]
fn truncated_bytes_are_those_of_the_reference() {
    assert_eq!(crc32(&truncated(DType::F16, &keys(DType::F16), 6)), 0x9E59_0FCF);
    assert_eq!(crc32(&truncated(DType::F32, &keys(DType::F32), 6)), 0xF8AD_C6CE);
}

#[test]
fn clipped_bytes_are_those_of_the_reference() {
    let tensor = keys(DType::F16);
    for (how, bounds, crc, crc_quantised) in [
        (PERCENTILE, (0xCC86_u16, 0x4CE2_u16), 0x270B_886B, 0x0F4B_AEFA),
        (SIGMA, (0xCA6B, 0x4A5F), 0xC216_D45A, 0x31A2_4303),
    ] {
        let (low, high) = clip_bounds(chunk(DType::F16, &tensor), how).unwrap();
        assert_eq!([low, high].map(F16::narrow_f64), [bounds.0.to_le_bytes(), bounds.1.to_le_bytes()]);
        let clipped = clipped(DType::F16, &tensor, how);
        assert_eq!(crc32(&clipped.1), crc);
        assert_eq!(crc32(&quantised(DType::F16, &clipped, 8)), crc_quantised);
    }
}

#[test]
fn normalised_and_restored_bytes_are_those_of_the_reference() {
    let tensor = keys(DType::F16);
    for (norm, stored, restored) in [(norm(64, 10), 0xAE05_CDB9, 0x3B92_8467), (norm(128, 8), 0x723A_B7E3, 0x75E5_F9D7)]
    {
        let normalised = norm.normalise(chunk(DType::F16, &tensor)).unwrap();
        assert_eq!(crc32(&normalised.stored), stored);
        let values = norm.restore(tensor.0, DType::F16, &normalised);
        let mut bytes = Vec::new();
        narrow(&values, DType::F32, &mut bytes);
        assert_eq!(crc32(&bytes), restored);
    }
}

/// What one transform did to keys and values: their errors.
fn errors(transform: impl Fn(&Tensor) -> Vec<f32>, dtype: DType) -> [Error; 2] {
    [keys(dtype), values(dtype)].map(|tensor| error(&widened(dtype, tensor.0, &tensor.1), &transform(&tensor)))
}

#[test]
fn errors_are_those_of_the_reference() {
    let f16 = DType::F16;
    let wide = |bytes: Vec<u8>| widened(f16, Shape::new(24, HEADS, DIM), &bytes);
    let restored = |norm: BlockNorm, dtype, tensor: &Tensor| {
        norm.restore(tensor.0, dtype, &norm.normalise(chunk(dtype, tensor)).unwrap())
    };
    let cases = [
        (
            errors(|tensor| wide(truncated(f16, tensor, 6)), f16),
            [0.010_054_993_443_191_051, 0.005_465_666_763_484_478],
            0.999_994_8,
        ),
        (
            errors(|tensor| wide(quantised(f16, tensor, 4)), f16),
            [1.082_658_648_490_905_8, 0.087_947_338_819_503_78],
            0.956_041_5,
        ),
        (
            errors(|tensor| wide(quantised(f16, tensor, 8)), f16),
            [0.061_497_576_534_748_08, 0.004_695_745_185_017_586],
            0.999_861_4,
        ),
        (
            errors(|tensor| wide(quantised(f16, tensor, 10)), f16),
            [0.015_344_923_362_135_887, 0.001_186_935_114_674_270_2],
            0.999_991_5,
        ),
        (
            errors(|tensor| wide(clipped(f16, tensor, PERCENTILE).1), f16),
            [0.089_302_569_627_761_84, 0.002_127_075_102_180_242_5],
            0.989_037_7,
        ),
        (errors(|tensor| wide(clipped(f16, tensor, SIGMA).1), f16), [0.263_049_304_485_321_04, 0.0], 0.962_211_5),
        (
            errors(|tensor| wide(quantised(f16, &clipped(f16, tensor, PERCENTILE), 8)), f16),
            [0.126_823_320_984_840_4, 0.006_399_953_272_193_67],
            0.989_041_4,
        ),
        (
            errors(|tensor| wide(quantised(f16, &clipped(f16, tensor, SIGMA), 8)), f16),
            [0.288_065_642_118_454, 0.004_695_745_185_017_586],
            0.962_128_9,
        ),
        (
            errors(|tensor| restored(norm(64, 10), f16, tensor), f16),
            [0.010_068_052_448_332_31, 0.001_050_748_513_080_179_7],
            0.999_995_9,
        ),
    ];
    for (idx, (got, mae, cosine)) in cases.iter().enumerate() {
        assert_eq!(got.map(|error| f64::from(error.mae)), *mae, "case {idx}");
        assert!((got[0].cosine - cosine).abs() < 2e-6, "case {idx}: {}", got[0].cosine);
    }
    let figures = |error: Error| [error.rmse, error.max_abs].map(f64::from);
    assert_eq!(figures(cases[0].0[0]), [0.026_183_111_593_127_25, 0.234_375]);
    assert_eq!(figures(cases[2].0[0]), [0.071_074_485_778_808_6, 0.125]);

    let wide = |bytes: Vec<u8>| widened(DType::F32, Shape::new(24, HEADS, DIM), &bytes);
    let mae = |transform: &dyn Fn(&Tensor) -> Vec<f32>| f64::from(errors(transform, DType::F32)[0].mae);
    assert_eq!(mae(&|tensor| wide(truncated(DType::F32, tensor, 6))), 0.010_833_590_291_440_487);
    assert_eq!(mae(&|tensor| wide(quantised(DType::F32, tensor, 8))), 0.061_466_321_349_143_98);
    assert_eq!(mae(&|tensor| restored(norm(64, 10), DType::F32, tensor)), 0.010_086_685_419_082_642);
}

#[test]
fn top_blocks_keep_their_scale_where_it_is_rounded() {
    // Element-weighted over the lossy layers, as the sweep does: prefill of layers 2 and 3, and one decoded token.
    let tensors =
        [synthetic(DType::F32, 8, true, 24), synthetic(DType::F32, 12, true, 24), synthetic(DType::F32, 14, true, 1)];
    for (topk_ratio, expected) in [(0.02, 0.051_230_865), (0.05, 0.051_229_115), (0.1, 0.051_226_521)] {
        let norm = BlockNorm { topk_ratio, ..norm(128, 8) };
        let (mut sum, mut count) = (0.0, 0);
        for tensor in &tensors {
            let normalised = norm.normalise(chunk(DType::F32, tensor)).unwrap();
            let restored = norm.restore(tensor.0, DType::F32, &normalised);
            let error = error(&widened(DType::F32, tensor.0, &tensor.1), &restored);
            sum += f64::from(error.mae) * restored.len() as f64;
            count += restored.len();
        }
        assert_eq!(format!("{:.9}", sum / f64::from(count as u32)), format!("{expected:.9}"), "{topk_ratio}");
    }
}

#[test]
fn codes_times_the_scale_are_the_restored_values() {
    for dtype in DType::ALL {
        for bits in [2, 7, 16, 24] {
            let tensor = keys(dtype);
            let mut codes = vec![-7];
            let scale = quantise_codes(chunk(dtype, &tensor), bits, &mut codes).unwrap();
            let largest = (1 << (bits - 1)) - 1;
            assert_eq!((codes[0], codes[1..].iter().map(|code| code.abs()).max()), (-7, Some(largest)));
            let products: Vec<f32> = codes[1..].iter().map(|code| *code as f32 * scale).collect();
            let mut restored = Vec::new();
            narrow(&products, dtype, &mut restored);
            let expected = quantised(dtype, &tensor, bits);
            // Equal as numbers: the restored zeros may be negative.
            assert_eq!(widened(dtype, tensor.0, &restored), widened(dtype, tensor.0, &expected));
        }
    }
}

#[test]
fn zeros_stay_as_they_are() {
    for dtype in DType::ALL {
        let tensor = floats(dtype, &[0.0, -0.0, 0.0]);
        assert_eq!(quantised(dtype, &tensor, 8), tensor.1);
        assert_eq!(quantise_codes(chunk(dtype, &tensor), 8, &mut Vec::new()).unwrap(), 0.0);
        assert_eq!(clipped(dtype, &tensor, PERCENTILE).1, tensor.1);
        let normalised = norm(2, 8).normalise(chunk(dtype, &tensor)).unwrap();
        assert_eq!(normalised.scales, [1.0; 2]);
        assert_eq!(normalised.stored, tensor.1);
        let empty = (Shape::new(0, 1, 3), Vec::new());
        assert!(quantised(dtype, &empty, 8).is_empty());
        assert!(clipped(dtype, &empty, SIGMA).1.is_empty());
        let normalised = norm(2, 8).normalise(chunk(dtype, &empty)).unwrap();
        assert!(normalised.stored.is_empty() && normalised.top.is_empty());
        assert_eq!(norm(2, 8).metadata_bytes(empty.0), 8, "one block is paid for");
    }
    assert_eq!(error(&[], &[]), Error::default());
    assert_eq!(error(&[0.0; 3], &[0.0; 3]).cosine, 0.0);
}

#[test]
fn one_bad_value_spoils_a_tensor_or_a_block() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let tensor = floats(DType::F16, &[1.0, bad, -2.0, 0.5]);
        let all = |values: Vec<f32>| values.iter().map(|value| value.is_nan()).collect::<Vec<_>>();
        assert_eq!(all(widened(DType::F16, tensor.0, &quantised(DType::F16, &tensor, 8))), [true; 4]);
        let normalised = norm(2, 8).normalise(chunk(DType::F16, &tensor)).unwrap();
        assert_eq!(all(norm(2, 8).restore(tensor.0, DType::F16, &normalised)), [true, true, false, false]);
        let stored = widened(DType::F16, tensor.0, &normalised.stored);
        assert_eq!((stored[0].is_nan(), stored[1].is_nan()), (bad.is_nan(), true));
        assert_eq!(normalised.top.len(), 1);
        assert_eq!(normalised.top[0], u32::from(bad.is_nan()), "NaN energies come last");
        // Clipping leaves NaN alone and moves infinities to the bound.
        let got =
            widened(DType::F16, tensor.0, &clipped(DType::F16, &tensor, Clip::Percentile { low: 0.0, high: 100.0 }).1);
        assert_eq!([got[0], got[2], got[3]], [1.0, -2.0, 0.5]);
        assert!(if bad.is_nan() { got[1].is_nan() } else { got[1] == bad.clamp(-2.0, 1.0) });
    }
    let error = error(&[1.0, 2.0], &[1.0, f32::NAN]);
    assert!(error.mae.is_nan() && error.rmse.is_nan() && error.max_abs.is_nan() && error.cosine == 0.0);
}

#[test]
fn tensor_without_finite_values_is_not_clipped() {
    let tensor = floats(DType::F32, &[f32::NAN, f32::INFINITY]);
    for how in [PERCENTILE, SIGMA] {
        assert_eq!(clip_bounds(chunk(DType::F32, &tensor), how), None);
        assert_eq!(clipped(DType::F32, &tensor, how).1, tensor.1);
    }
}

#[test]
fn percentiles_are_linear_between_values_however_many_there_are() {
    let bounds = |values: &[f32], dtype, low, high| {
        clip_bounds(chunk(dtype, &floats(dtype, values)), Clip::Percentile { low, high }).unwrap()
    };
    for dtype in DType::ALL {
        assert_eq!(bounds(&[4.0, 1.0, 3.0, 2.0], dtype, 0.0, 100.0), (1.0, 4.0));
        assert_eq!(bounds(&[4.0, 1.0, 3.0, 2.0], dtype, 50.0, 75.0), (2.5, 3.25));
        assert_eq!(bounds(&[4.0, 1.0, 3.0, 2.0], dtype, 10.0, 90.0).0, f64::from(1.0_f32 + 0.3_f64 as f32));
        assert_eq!(bounds(&[7.0], dtype, 1.0, 99.0), (7.0, 7.0));
        // Both ways to find order statistics agree: many values of two bytes are counted.
        let many: Vec<f32> = (0..5000_u32).map(|i| f32::from((i * 7919 % 251) as i16 - 125)).collect();
        assert_eq!(bounds(&many, dtype, 0.0, 100.0), (-125.0, 125.0));
        assert_eq!(bounds(&many, dtype, 50.0, 25.0), bounds(&many[..], DType::F32, 50.0, 25.0));
    }
    let crossed =
        clipped(DType::F16, &floats(DType::F16, &[1.0, 2.0, 3.0]), Clip::Percentile { low: 100.0, high: 0.0 });
    assert_eq!(widened(DType::F16, crossed.0, &crossed.1), [1.0; 3]);
}

#[test]
fn truncation_can_make_a_nan_infinite() {
    let tensor = (Shape::new(1, 1, 2), [0x7C01_u16.to_le_bytes(), 0xBC01_u16.to_le_bytes()].concat());
    assert_eq!(truncated(DType::F16, &tensor, 9), [0x00, 0x7C, 0x00, 0xBC]);
    assert_eq!(truncated(DType::F16, &tensor, 10), tensor.1);
    assert_eq!(truncated(DType::F16, &tensor, 200), tensor.1);
    let tensor = floats(DType::Bf16, &[1.0 + 1.0 / 128.0]);
    assert_eq!(truncated(DType::Bf16, &tensor, 7), tensor.1);
    assert_eq!(truncated(DType::Bf16, &tensor, 6), floats(DType::Bf16, &[1.0]).1);
    assert_eq!(truncated(DType::Bf16, &tensor, 0), floats(DType::Bf16, &[1.0]).1);
}

#[test]
fn blocks_longer_than_a_vector_are_the_vector() {
    for dtype in DType::ALL {
        let tensor = keys(dtype);
        let [exact, longer] = [DIM, 300].map(|size| norm(size, 8).normalise(chunk(dtype, &tensor)).unwrap());
        assert_eq!((&exact.stored, &exact.scales), (&longer.stored, &longer.scales));
        assert_eq!(exact.scales.len(), 48);
        assert_eq!(longer.top.len(), 38);
        assert_eq!(norm(300, 8).metadata_bytes(tensor.0), 48 * 2 + 38 * 8);
    }
    // 7 blocks per vector, the last one of 2 channels.
    let normalised = norm(13, 8).normalise(chunk(DType::F16, &keys(DType::F16))).unwrap();
    assert_eq!(normalised.scales.len(), 48 * 7);
}

#[test]
fn settings_out_of_range_are_errors() {
    let tensor = keys(DType::F16);
    let chunk = chunk(DType::F16, &tensor);
    for bits in [0, 1, 25, 255] {
        for error in [
            quantise(chunk, bits, &mut Vec::new()).unwrap_err(),
            quantise_codes(chunk, bits, &mut Vec::new()).unwrap_err(),
            norm(64, bits).normalise(chunk).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            assert_eq!(error.to_string(), format!("`/bits`: expected 2 to 24, got {bits}"));
        }
    }
    let error = norm(0, 8).normalise(chunk).unwrap_err().to_string();
    assert_eq!(error, "`/block_size`: expected at least 1, got 0");
    let error = BlockNorm { topk_ratio: 1.5, ..norm(64, 8) }.normalise(chunk).unwrap_err().to_string();
    assert_eq!(error, "`/topk_ratio`: expected 0 to 1, got 1.5");
    assert_eq!(BlockNorm { topk_ratio: 1.0, ..norm(64, 8) }.top_blocks(tensor.0), 96);
    assert_eq!(BlockNorm { topk_ratio: 0.0, ..norm(64, 8) }.top_blocks(tensor.0), 1);
}
