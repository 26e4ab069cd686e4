//! Blocks against the library's own, and what decode refuses.

use gearbox_core::{Elem, ErrorKind, Role, Shape};

use super::*;

const CX: Context<'_> = Context::new(0, Role::Key, 0);

fn spec(len: usize) -> LaneSpec {
    LaneSpec::new("codes", Elem::U8, Shape::flat(len))
}

fn encode(codec: &Lz4, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    codec.encode(LaneRef::new(&spec(bytes.len()), bytes).unwrap(), &CX, &mut out).unwrap();
    out
}

fn decode(encoded: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut out = vec![0xA5; len];
    Lz4::new(Config {})?.decode(encoded, &spec(len), &CX, &mut out)?;
    Ok(out)
}

/// Words of a small vocabulary in an order without a period: repeats at many distances.
fn words(len: usize) -> Vec<u8> {
    (0u64..).flat_map(|word| (word * word / 7 % 53).to_le_bytes().map(|byte| byte.wrapping_mul(67))).take(len).collect()
}

#[test]
fn blocks_equal_those_of_the_library_also_after_larger_and_smaller_lanes() {
    let codec = Lz4::new(Config {}).unwrap();
    // The second round meets tables that have seen all of them.
    for _ in 0..2 {
        for len in [1, 13, 3_000, LARGE - 1, LARGE, 300_000, 20, 64_000] {
            let input = words(len);
            let block = encode(&codec, &input);
            assert_eq!(block, lz4_flex::block::compress(&input), "{len} bytes");
            assert_eq!(decode(&block, len).unwrap(), input);
        }
    }
}

#[test]
fn incompressible_lane_meets_the_bound_of_the_format() {
    let mut state = 1u32;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    let noise: Vec<u8> = noise.take(100_000).collect();
    let codec = Lz4::new(Config {}).unwrap();
    let (len, bound) = (encode(&codec, &noise).len(), codec.max_encoded_len(&spec(noise.len())));
    assert!((100_000 + 390..=bound).contains(&len), "{len} of at most {bound}");
    assert_eq!(codec.max_encoded_len(&spec(usize::MAX)), usize::MAX);
}

#[test]
fn decode_rejects_blocks_of_another_length() {
    let block = encode(&Lz4::new(Config {}).unwrap(), &words(1_000));
    for (encoded, len) in [(&block[..], 999), (&block, 1_001), (&block, 0), (&[], 1_000)] {
        assert_eq!(decode(encoded, len).unwrap_err().kind(), ErrorKind::Corrupt, "{len}");
    }
    // The block of nothing is one byte; an empty lane takes none.
    assert_eq!(decode(&[0], 0).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(decode(&[], 0).unwrap().is_empty());
}
