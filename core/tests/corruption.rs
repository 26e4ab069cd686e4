//! Damaged containers are refused, located and, as far as they are whole, recovered.

mod common;

use std::panic::catch_unwind;

use common::{CHAIN, RUNS, decode, pipeline, registry, sample};
use gearbox_core::container::Container;
use gearbox_core::{ChunkMut, Context, ErrorKind, Limits};

#[test]
fn every_flipped_bit_is_an_error() {
    for json in [RUNS, CHAIN] {
        let (bytes, ..) = sample(&mut pipeline(json));
        for at in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[at / 8] ^= 1 << (at % 8);
            let result = catch_unwind(|| decode(&flipped));
            let error = result.unwrap_or_else(|_| panic!("bit {at}: panicked")).map(|_| ()).unwrap_err();
            assert_ne!(error.kind(), ErrorKind::Mismatch, "bit {at}");
        }
    }
}

#[test]
fn every_truncation_is_an_error() {
    for json in [RUNS, CHAIN] {
        let (bytes, ..) = sample(&mut pipeline(json));
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "cut to {len} bytes");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(decode(&longer).is_err());
    }
}

#[test]
fn damaged_payload_names_run_layer_role_chunk_and_lane() {
    let (bytes, ..) = sample(&mut pipeline(RUNS));
    let container = Container::open(bytes.as_slice(), &Limits::default()).unwrap();
    let sequence = container.sequences().last().unwrap();
    let record = sequence.chunks[2].offset as usize;
    // The payload ends where the next record, a digest, begins.
    let next = bytes[record..].windows(3).position(|three| three == [b'D', 17, 0]).unwrap();
    let mut damaged = bytes.clone();
    damaged[record + next - 1] ^= 0x10;
    let error = decode(&damaged).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let text = error.to_string();
    assert!(
        text.starts_with("run `demo`, layer 1, value, chunk 2: lane `tensor` (f16 (2, 2, 4)): checksum differs"),
        "{text}"
    );
}

#[test]
fn file_without_its_end_is_walked_and_whole_chunks_come_back() {
    let (bytes, tensors, _) = sample(&mut pipeline(RUNS));
    let whole = Container::open(bytes.as_slice(), &Limits::default()).unwrap();
    let last = whole.sequences().last().unwrap().chunks[1].offset as usize;
    let cut = &bytes[..last + 4];
    let error = Container::open(cut, &Limits::default()).unwrap_err();
    assert_eq!(error.to_string(), "the end of the file is missing: it was cut off or its writer was interrupted");
    let (container, damage) = Container::recover(cut, &Limits::default()).unwrap();
    assert_eq!(damage.len(), 2, "the cut record and the missing end: {damage:?}");
    assert_eq!(damage[0].range, last as u64..cut.len() as u64);
    let sequences: Vec<_> = container.sequences().collect();
    assert_eq!(sequences.len(), 4);
    assert_eq!((sequences[0].missing, sequences[3].missing), (0, 3));
    let built = container.pipeline(&registry()).unwrap();
    let mut out = vec![0; 5 * common::HEADS * common::DIM * 2];
    let info = &sequences[3].info;
    let target = ChunkMut::new(info.shape(5), info.dtype, &mut out).unwrap();
    container.decode_chunk(&built, sequences[3], 0, &Context::new(1, info.role, 0), target).unwrap();
    assert_eq!(out, tensors[3][..out.len()]);
}

#[test]
fn damage_in_the_middle_is_located_and_the_rest_is_found_again() {
    let (bytes, ..) = sample(&mut pipeline(RUNS));
    let whole = Container::open(bytes.as_slice(), &Limits::default()).unwrap();
    let sequence = whole.sequences().next().unwrap();
    let (first, second) = (sequence.chunks[0].offset as usize, sequence.chunks[1].offset as usize);
    let mut damaged = bytes.clone();
    damaged[first + 2] ^= 0xFF;
    let (container, damage) = Container::recover(damaged.as_slice(), &Limits::default()).unwrap();
    assert_eq!(damage.len(), 1, "{damage:?}");
    assert!(damage[0].range.start == first as u64 && damage[0].range.end <= second as u64, "{damage:?}");
    assert_eq!(container.sequences().next().unwrap().missing, 5);
}

#[test]
fn sizes_beyond_the_limits_are_refused_before_allocation() {
    let (bytes, ..) = sample(&mut pipeline(CHAIN));
    let tight = Limits { lane: 16, ..Limits::default() };
    let error = Container::open(bytes.as_slice(), &tight).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    assert!(Container::open(bytes.as_slice(), &Limits { header: 8, ..Limits::default() }).is_err());
}
