use gearbox_core::{DType, Role, Shape};

use super::*;

/// The generator of the check vectors of `gear-fp16.md`, section 9.
fn f(x: u64) -> u64 {
    let a = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let a = (a ^ a >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let a = (a ^ a >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    a ^ a >> 31
}

/// A check vector: 2 heads of 64 channels.
fn vector(dtype: DType, seq: u64, seed: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for i in 0..seq * 128 {
        let (head, dim) = (i / 64 % 2, i % 64);
        let noise = f(seed * 1_000_003 + i);
        let bump = u64::from(noise >> 61 == 0);
        let sign = dim % 2;
        if dtype == DType::F32 {
            let exponent = 0x79 + (dim >> 3 & 3) + head + bump;
            let word = sign << 31 | exponent << 23 | (noise & 0x7F_FFFF);
            bytes.extend((word as u32).to_le_bytes());
        } else {
            let high = 0x34 + (dim >> 3 & 7) + head + bump + 0x80 * sign;
            bytes.extend([noise as u8, high as u8]);
        }
    }
    bytes
}

/// Frame lengths: the tensor itself, high halves, low halves, delta of the high halves.
fn frame_lens(chunk: Chunk<'_>) -> [usize; 4] {
    let (mut streams, mut frames) = (Streams::default(), Frames::new(3));
    streams.split_both(chunk).unwrap();
    [chunk.bytes(), streams.hi(), streams.lo(), streams.hi_delta()].map(|data| frames.compress(data).unwrap().len())
}

const CONTEXT: Context<'static> = Context::new(0, Role::Key, 0);

fn codec(delta: bool, mode: Mode) -> Box<dyn Codec> {
    let config = Config { level: 3, mode };
    if delta { Box::new(GearDelta::with(config)) } else { Box::new(Gear::with(config)) }
}

fn encode(codec: &dyn Codec, dtype: DType, shape: Shape, bytes: &[u8]) -> Vec<u8> {
    let spec = LaneSpec::tensor(dtype, shape);
    let mut out = Vec::new();
    codec.encode(LaneRef::new(&spec, bytes).unwrap(), &CONTEXT, &mut out).unwrap();
    out
}

/// dtype, seq, seed, then the frame lengths of tensor, high, low and delta.
const VECTORS: [(DType, u64, u64, [usize; 4]); 8] = [
    (DType::F16, 64, 1, [14170, 1790, 8202, 1765]),
    (DType::F16, 64, 2, [14174, 1843, 8202, 1796]),
    (DType::F16, 1, 3, [266, 89, 137, 89]),
    (DType::F16, 1, 4, [266, 92, 137, 92]),
    (DType::F32, 64, 1, [30297, 12719, 16394, 11294]),
    (DType::F32, 64, 2, [30258, 12722, 16394, 11329]),
    (DType::F32, 1, 3, [522, 253, 266, 253]),
    (DType::F32, 1, 4, [522, 248, 266, 248]),
];

#[test]
fn generator_gives_the_first_bytes_of_the_check_vectors() {
    assert_eq!(vector(DType::F16, 1, 1)[..8], [0x24, 0x34, 0x43, 0xB4, 0x0D, 0x34, 0xE0, 0xB4]);
    assert_eq!(vector(DType::F32, 1, 1)[..8], [0x24, 0x1D, 0xB2, 0x3C, 0x43, 0xF6, 0xA8, 0xBC]);
}

#[test]
fn frame_lengths_equal_the_check_vectors() {
    for (dtype, seq, seed, expected) in VECTORS {
        let bytes = vector(dtype, seq, seed);
        let chunk = Chunk::new(Shape::new(seq as usize, 2, 64), dtype, &bytes).unwrap();
        assert_eq!(frame_lens(chunk), expected, "{dtype}, {seq} tokens, seed {seed}");
    }
}

#[test]
fn frame_lengths_of_one_head_equal_the_check_vectors() {
    let expected = [
        (1, 0, [7075, 936, 4106, 909]),
        (1, 1, [7078, 901, 4106, 919]),
        (2, 0, [7073, 957, 4106, 934]),
        (2, 1, [7080, 946, 4106, 943]),
    ];
    for (seed, head, expected) in expected {
        let bytes = vector(DType::F16, 64, seed);
        let block: Vec<u8> = bytes.chunks(256).flat_map(|token| token[head * 128..][..128].to_vec()).collect();
        let chunk = Chunk::new(Shape::new(64, 1, 64), DType::F16, &block).unwrap();
        assert_eq!(frame_lens(chunk), expected, "seed {seed}, head {head}");
    }
}

#[test]
fn entropies_equal_the_check_vectors() {
    let check = |dtype, expected: [f64; 3]| {
        let bytes = vector(dtype, 64, 1);
        let mut streams = Streams::default();
        streams.split(Chunk::new(Shape::new(64, 2, 64), dtype, &bytes).unwrap()).unwrap();
        for (stream, expected) in [&bytes[..], streams.hi(), streams.lo()].into_iter().zip(expected) {
            let mut counts = ByteCounts::default();
            counts.add(stream);
            assert!((counts.entropy() - expected).abs() <= 1e-12, "expected {expected}, got {}", counts.entropy());
        }
    };
    check(DType::F16, [6.876_126_296_070_014, 4.162_468_031_351_315, 7.978_403_510_102_063]);
    // The specification has no entropy of the low halves: theirs is what is left out of the other two.
    let bytes = vector(DType::F32, 64, 1);
    let mut low = ByteCounts::default();
    bytes.chunks(4).for_each(|word| low.add(&word[..2]));
    check(DType::F32, [7.335_820_336_161_328, 6.152_204_684_896_754, low.entropy()]);
}

#[test]
fn reference_mode_holds_exactly_the_frames_of_the_reference() {
    for (dtype, seq, seed, [_, hi, lo, delta]) in VECTORS {
        let (shape, bytes) = (Shape::new(seq as usize, 2, 64), vector(dtype, seq, seed));
        for (is_delta, hi) in [(false, hi), (true, delta)] {
            let encoded = encode(&*codec(is_delta, Mode::Reference), dtype, shape, &bytes);
            assert_eq!(encoded.len(), 2 + varint_len(hi) + hi + lo, "{dtype}, {seq} tokens, seed {seed}, {is_delta}");
            assert_eq!(encoded[..2], [if is_delta { DELTA_FRAME } else { FRAME }, FRAME]);
        }
    }
}

#[test]
fn smallest_mode_stores_what_does_not_shrink() {
    for (dtype, seq, seed, [_, hi, _, delta]) in VECTORS {
        let (shape, bytes) = (Shape::new(seq as usize, 2, 64), vector(dtype, seq, seed));
        let half = bytes.len() / 2;
        let gear = encode(&*codec(false, Mode::Smallest), dtype, shape, &bytes);
        let hi = hi.min(half);
        assert_eq!(gear.len(), 2 + varint_len(hi) + hi + half, "the low stream of {dtype} seed {seed} is noise");
        let gear_delta = encode(&*codec(true, Mode::Smallest), dtype, shape, &bytes);
        let hi = hi.min(delta);
        assert_eq!(gear_delta.len(), 2 + varint_len(hi) + hi + half);
        assert_eq!(gear_delta[..2], [if delta < hi || seq > 1 { DELTA_FRAME } else { FRAME }, STORED]);
    }
}

#[test]
fn gear_delta_is_never_larger_than_gear() {
    let (gear, gear_delta) = (codec(false, Mode::Smallest), codec(true, Mode::Smallest));
    for dtype in DType::ALL {
        for seq in [1, 2, 3, 16, 100] {
            for (heads, dim) in [(1, 1), (2, 64), (3, 5)] {
                let shape = Shape::new(seq, heads, dim);
                let bytes = vector(dtype, 200, 5)[..shape.elements() * dtype.size()].to_vec();
                let lens = [&gear, &gear_delta].map(|codec| encode(&**codec, dtype, shape, &bytes).len());
                assert!(lens[1] <= lens[0], "{dtype} {shape}: {lens:?}");
            }
        }
    }
}

#[test]
fn noise_grows_by_the_header_only() {
    let bytes: Vec<u8> = (0..4096).map(|i| f(i) as u8).collect();
    for delta in [false, true] {
        let codec = codec(delta, Mode::Smallest);
        let shape = Shape::new(16, 2, 64);
        let encoded = encode(&*codec, DType::F16, shape, &bytes);
        assert_eq!(encoded.len(), 4 + bytes.len());
        assert_eq!(codec.max_encoded_len(&LaneSpec::tensor(DType::F16, shape)), encoded.len(), "the bound is met");
    }
}

#[test]
fn stored_bytes_are_those_of_the_documented_layout() {
    // Two tokens of one head and one channel: too short for zstd to shrink.
    let encoded = encode(&*codec(true, Mode::Smallest), DType::F16, Shape::new(2, 1, 1), &[0x10, 0x34, 0x20, 0x35]);
    assert_eq!(encoded, [STORED, STORED, 2, 0x34, 0x35, 0x10, 0x20]);
    let encoded = encode(&*codec(false, Mode::Smallest), DType::F32, Shape::new(1, 1, 1), &[1, 2, 3, 4]);
    assert_eq!(encoded, [STORED, STORED, 2, 3, 4, 1, 2]);
}

fn decode_error(delta: bool, encoded: &[u8]) -> String {
    let spec = LaneSpec::tensor(DType::F16, Shape::new(2, 1, 1));
    let error = codec(delta, Mode::Smallest).decode(encoded, &spec, &CONTEXT, &mut [0; 4]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    error.to_string()
}

#[test]
fn decode_names_what_is_wrong() {
    let at = "lane `tensor` (f16 (2, 1, 1)): ";
    assert_eq!(decode_error(true, &[0]), format!("{at}expected a header, got 1 bytes"));
    assert_eq!(decode_error(true, &[0, 0, 0x82, 0, 1, 2, 3, 4]), format!("{at}expected a header, got 8 bytes"));
    assert_eq!(decode_error(true, &[0, 0, 9, 1]), format!("{at}high stream: expected 9 bytes, got 1"));
    assert_eq!(decode_error(true, &[3, 0, 2, 1, 2, 3, 4]), format!("{at}high stream: form 3 is unknown"));
    assert_eq!(decode_error(false, &[2, 0, 2, 1, 2, 3, 4]), format!("{at}high stream: form 2 is unknown"));
    assert_eq!(decode_error(true, &[0, 2, 2, 1, 2, 3, 4]), format!("{at}low stream: form 2 is unknown"));
    assert_eq!(decode_error(true, &[0, 0, 1, 1, 2, 3, 4]), format!("{at}high stream: expected 2 bytes, got 1"));
    assert_eq!(decode_error(true, &[0, 0, 2, 1, 2, 3, 4, 5]), format!("{at}low stream: expected 2 bytes, got 3"));
}

#[test]
fn elements_without_halves_are_refused() {
    let spec = LaneSpec::new("codes", gearbox_core::Elem::U16, Shape::flat(2));
    let lane = LaneRef::new(&spec, &[0; 4]).unwrap();
    let error = codec(false, Mode::Smallest).encode(lane, &CONTEXT, &mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedDType);
    assert_eq!(error.to_string(), "lane `codes` (u16 (2, 1, 1)): expected elements f16, bf16 or f32");
}

#[test]
fn varints_come_back_in_their_shortest_form_only() {
    for value in [0, 1, 127, 128, 300, 16_383, 16_384, u32::MAX as usize] {
        let mut bytes = Vec::new();
        put_varint(value, &mut bytes);
        assert_eq!(bytes.len(), varint_len(value));
        bytes.push(0xAA);
        assert_eq!(take_varint(&bytes), Some((value as u64, &[0xAA][..])));
    }
    for refused in [&[][..], &[0x80], &[0x80, 0], &[0xFF; 20]] {
        assert_eq!(take_varint(refused), None);
    }
}
