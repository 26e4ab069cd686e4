//! Frames against the library's own, and what decode refuses.

use gearbox_core::{DType, ErrorKind, Role, Shape};

use super::*;

const CX: Context<'_> = Context::new(0, Role::Key, 0);

fn codec(level: i32) -> Zstd {
    Zstd::new(Config { level }).unwrap()
}

fn spec(len: usize) -> LaneSpec {
    LaneSpec::tensor(DType::F16, Shape::new(len / 2, 1, 1))
}

fn encode(codec: &Zstd, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    codec.encode(LaneRef::new(&spec(bytes.len()), bytes).unwrap(), &CX, &mut out).unwrap();
    out
}

fn decode(encoded: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut out = vec![0xA5; len];
    codec(3).decode(encoded, &spec(len), &CX, &mut out)?;
    Ok(out)
}

fn message(encoded: &[u8], len: usize) -> String {
    let error = decode(encoded, len).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    error.to_string()
}

/// Compressible bytes of several scales: runs, repeats far apart, a skewed alphabet. Seeded by `seed`.
fn text(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 16
    };
    let mut bytes: Vec<u8> = Vec::with_capacity(len + 64);
    while bytes.len() < len {
        let run = 4 + next() as usize % 60;
        match next() % 3 {
            0 if bytes.len() > 100 => {
                let from = next() as usize * 37 % (bytes.len() - 64);
                bytes.extend_from_within(from..from + run);
            }
            1 => bytes.extend((0..run).map(|_| (next() % 16 * (next() % 16)) as u8)),
            _ => bytes.extend(std::iter::repeat_n(next() as u8, run)),
        }
    }
    bytes.truncate(len);
    bytes
}

#[test]
fn frames_equal_those_of_the_library_also_with_a_used_context() {
    let inputs: Vec<Vec<u8>> =
        [2, 100, 5_000, 70_000, 300_000, 1_000].into_iter().zip(1..).map(|(len, seed)| text(len, seed)).collect();
    for level in -7..=19 {
        let codec = codec(level);
        // The second round meets a context that has seen all of them.
        for round in 0..2 {
            for input in &inputs {
                let expected = zstd::bulk::compress(input, level).unwrap();
                let got = encode(&codec, input);
                assert!(
                    got == expected,
                    "level {level}, round {round}, {} bytes: expected {}, got {}",
                    input.len(),
                    expected.len(),
                    got.len()
                );
            }
        }
    }
    for level in 20..=22 {
        let (input, codec) = (text(20_000, 9), codec(level));
        assert_eq!(encode(&codec, &input), zstd::bulk::compress(&input, level).unwrap(), "level {level}");
    }
}

#[test]
fn level_zero_is_level_three() {
    let input = text(10_000, 1);
    assert_eq!(encode(&codec(0), &input), encode(&codec(3), &input));
}

#[test]
fn frame_lengths_are_the_known_ones() {
    // Level 3, libzstd 1.5.7.
    let bytes: Vec<u8> = (0..32).collect();
    assert_eq!(encode(&codec(3), &bytes).len(), 41);
    assert_eq!(encode(&codec(3), &[0; 32]).len(), 17);
    assert_eq!(encode(&codec(3), &[0; 300]).len(), 19);
}

#[test]
fn empty_lane_takes_no_bytes() {
    assert!(encode(&codec(3), &[]).is_empty());
    assert!(decode(&[], 0).unwrap().is_empty());
    assert_eq!(message(&[1], 0), "expected no bytes, got 1");
}

#[test]
fn encode_keeps_capacity_and_prefix() {
    let input = text(1_000, 1);
    let mut out = Vec::with_capacity(4_096);
    out.extend_from_slice(b"before");
    let place = out.as_ptr();
    codec(3).encode(LaneRef::new(&spec(1_000), &input).unwrap(), &CX, &mut out).unwrap();
    assert_eq!(out.as_ptr(), place, "it wrote into the capacity that was there");
    assert!(out.starts_with(b"before"));
    assert_eq!(decode(&out[6..], 1_000).unwrap(), input);
}

#[test]
fn decode_rejects_other_sizes_before_decompressing() {
    let frame = encode(&codec(3), &text(1_000, 1));
    assert_eq!(message(&frame, 1_002), "expected a zstd frame of 1002 bytes, got one of 1000");
}

#[test]
fn decode_rejects_frames_without_content_size() {
    let mut stream = zstd::stream::Encoder::new(Vec::new(), 3).unwrap();
    stream.include_contentsize(false).unwrap();
    std::io::Write::write_all(&mut stream, &text(1_000, 1)).unwrap();
    let message = message(&stream.finish().unwrap(), 1_000);
    assert_eq!(message, "expected a zstd frame that states its content size");
}

#[test]
fn decode_rejects_what_is_no_single_frame() {
    let input = text(1_000, 1);
    let frame = encode(&codec(3), &input);
    assert_eq!(message(b"plain text", 1_000), "expected a zstd frame, got 10 other bytes");
    let (len, twice) = (frame.len(), [frame.clone(), frame.clone()].concat());
    assert_eq!(message(&twice, 1_000), format!("expected a zstd frame of {len} bytes alone, got {}", 2 * len));
    // An empty frame behind it adds nothing to the content, and is trailing data all the same.
    let padded = [frame.clone(), zstd::bulk::compress(&[], 3).unwrap()].concat();
    assert_eq!(message(&padded, 1_000), format!("expected a zstd frame of {len} bytes alone, got {}", len + 9));
    assert!(message(&frame[..len - 1], 1_000).starts_with("expected a whole zstd frame: "));
    assert!(decode(&[], 1_000).is_err());
}
