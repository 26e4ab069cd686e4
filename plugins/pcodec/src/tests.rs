//! Every mode and delta of the library on bits that arithmetic does not keep, and what decode refuses.

use gearbox_core::{ErrorKind, Role, Shape};
use pco::metadata::Mode;
use pco::standalone::simple_compress;

use super::*;

const CX: Context<'_> = Context::new(0, Role::Key, 0);

fn codec() -> Pcodec {
    Pcodec::new(Config::default()).unwrap()
}

fn spec(elem: Elem, bytes: &[u8]) -> LaneSpec {
    LaneSpec::new("codes", elem, Shape::flat(bytes.len() / elem.size()))
}

fn encode(elem: Elem, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    codec().encode(LaneRef::new(&spec(elem, bytes), bytes).unwrap(), &CX, &mut out).unwrap();
    out
}

fn decode(elem: Elem, encoded: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut out = vec![0xA5; len];
    codec().decode(encoded, &spec(elem, &out), &CX, &mut out)?;
    Ok(out)
}

/// How the library stored the first chunk.
fn meta<T: Number>(encoded: &[u8]) -> ChunkMeta {
    let (file, chunk) = FileDecompressor::new(encoded).unwrap();
    file.chunk_decompressor::<T, _>(chunk).unwrap().0.meta().clone()
}

fn round_trips(elem: Elem, bytes: &[u8]) -> Vec<u8> {
    let encoded = encode(elem, bytes);
    assert!(decode(elem, &encoded, bytes.len()).unwrap() == bytes, "{elem}: other bytes come back");
    encoded
}

#[test]
fn nan_payloads_and_zero_signs_survive_the_modes_that_multiply_and_round() {
    // Quiet and signalling NaN of both signs with payloads, infinities, zeros, a subnormal.
    let odd = [0x7FC0_1234, 0x7F80_0001, 0xFFC0_0007, 0xFF81_2345, 0x7F80_0000, 0xFF80_0000, 0, 1 << 31, 77u32];
    let tenths = (0..4_000u32).map(|i| (f64::from(i * 37 % 1_000) * 0.1) as f32).map(f32::to_bits);
    let bytes: Vec<u8> = tenths.chain(odd).flat_map(u32::to_le_bytes).collect();
    let encoded = round_trips(Elem::F32, &bytes);
    assert!(matches!(meta::<f32>(&encoded).mode, Mode::FloatMult(_)));

    let coarse = (0..4_000u32).map(|i| f32::to_bits(1.0) + ((i * i % 1_009) << 14));
    let bytes: Vec<u8> = coarse.chain(odd).flat_map(u32::to_le_bytes).collect();
    let encoded = round_trips(Elem::F32, &bytes);
    assert!(matches!(meta::<f32>(&encoded).mode, Mode::FloatQuant(_)));

    let odd = [0x7E12, 0x7C01, 0xFE07, 0xFD23, 0x7C00, 0xFC00, 0, 1 << 15, 77u16];
    let coarse = (0..4_000u32).map(|i| ((i * i % 1_889) << 4) as u16);
    let bytes: Vec<u8> = coarse.chain(odd).flat_map(u16::to_le_bytes).collect();
    let encoded = round_trips(Elem::F16, &bytes);
    assert!(matches!(meta::<f16>(&encoded).mode, Mode::FloatQuant(_)));
}

#[test]
fn long_lane_takes_no_more_than_a_file_of_the_library() {
    let numbers: Vec<u16> =
        (0..2 * DEFAULT_MAX_PAGE_N as u32 + 5).map(|i| (u64::from(i).pow(2) / 3 % 1_013) as u16).collect();
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    let file = simple_compress(&numbers, &ChunkConfig::default()).unwrap();
    let lens: Vec<_> = chunk_lens(numbers.len()).collect();
    assert_eq!(lens, [174_765, 174_764, 174_764]);
    // Type and length of each of three chunks, magic number, version, type, length of all and end of the file.
    assert_eq!(round_trips(Elem::U16, &bytes).len() + 3 * 4 + 4 + 1 + 1 + 4 + 1, file.len());
    assert_eq!(round_trips(Elem::Bits(10), &bytes), round_trips(Elem::Bf16, &bytes), "both are their 16 bits");
}

#[test]
fn decode_rejects_a_dictionary_and_a_window_beyond_its_chunk() {
    let numbers: Vec<u16> = (0..600u16).map(|i| i % 100 * 601).collect();
    let config =
        ChunkConfig::default().with_mode_spec(pco::ModeSpec::Classic).with_delta_spec(pco::DeltaSpec::TryLookback);
    let file = FileCompressor::default();
    let mut compressor = file.chunk_compressor(&numbers, &config).unwrap();
    let mut encoded = file.write_header(Vec::new()).unwrap();
    encoded = compressor.write_meta(encoded).unwrap();
    encoded = compressor.write_page(0, encoded).unwrap();
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    assert_eq!(decode(Elem::U16, &encoded, bytes.len()).unwrap(), bytes);
    // Behind the header: mode in the low half of a byte, kind of delta in its high half, then five bits of window.
    assert_eq!((encoded[2], encoded[3] & 0x1F), (0x20, 9), "classic mode, a window of 2^10");
    let message = |encoded: &[u8]| {
        let error = decode(Elem::U16, encoded, bytes.len()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        error.to_string()
    };
    encoded[3] = encoded[3] & !0x1F | 0x17;
    assert_eq!(message(&encoded), "expected a window within 600 numbers, got 2^24");
    encoded[2] = 0x24;
    assert_eq!(message(&encoded), "expected a mode without a dictionary");
}

#[test]
fn decode_rejects_bytes_behind_the_last_chunk_and_other_lengths() {
    let bytes: Vec<u8> = (0..600u32).flat_map(|i| (i * i % 977).to_le_bytes()).collect();
    let encoded = encode(Elem::U32, &bytes);
    let longer = [&encoded[..], &[0]].concat();
    for (encoded, len) in [(&longer, bytes.len()), (&encoded, bytes.len() + 4), (&encoded, 0), (&Vec::new(), 4)] {
        assert_eq!(decode(Elem::U32, encoded, len).unwrap_err().kind(), ErrorKind::Corrupt, "{len}");
    }
}
