//! Damaged containers are refused, located and, as far as they are whole, recovered.

mod common;

use std::panic::catch_unwind;

use common::{CHAIN, RUNS, decode, header, join, payload, pipeline, record, registry, sample, split, varints};
use gearbox_core::container::{Container, ContainerWriter, EntryInfo, RunId, RunInfo, SequenceInfo, VERSION};
use gearbox_core::{
    ChunkMut, Context, DType, Elem, EncodedChunk, EncodedLane, Error, ErrorKind, LaneCoding, LaneSpec, Limits, Role,
    Shape, Span, Stage,
};

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
    assert_eq!(damage[0].range, last as u64..cut.len() as u64);
    let missing: Vec<_> = damage[2..].iter().map(|damage| damage.message.as_str()).collect();
    let expected = [
        "run `demo`, layer 0, key: the digest is missing",
        "run `demo`, layer 0, value: the digest is missing",
        "run `demo`, layer 1, key: 2 of 8 tokens are missing, the digest is missing",
        "run `demo`, layer 1, value: 3 of 8 tokens are missing, the digest is missing",
    ];
    assert_eq!(missing, expected, "behind the cut record and the missing end: {damage:?}");
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
    assert_eq!(damage.len(), 2, "{damage:?}");
    assert_eq!(damage[1].message, "run `demo`, layer 0, key: 5 of 8 tokens are missing");
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

/// Records of a small file without lanes: one run, then these.
fn crafted(records: &[Vec<u8>]) -> Vec<u8> {
    let (header, _) = split(&sample(&mut pipeline(RUNS)).0);
    let run = record(b'R', &[&[0, 1, b'r', 0, 0][..], &payload(&[])].concat(), &[]);
    join(&header, &[&[run], records].concat())
}

/// A sequence of run 0, F16, with one head and one channel; entries are gap and seq.
fn sequence(id: u64, layer: u64, entries: &[(u64, u64)]) -> Vec<u8> {
    let mut head = varints(&[id, 0, layer, 0, 0, 1, 1, entries.len() as u64]);
    for (gap, seq) in entries {
        head.extend(varints(&[*gap, *seq, 2]));
    }
    record(b'S', &head, &[])
}

/// A chunk of one stored lane, the tensor.
fn chunk(sequence: u64, first: u64, seq: u64) -> Vec<u8> {
    let bytes = vec![7; 2 * seq as usize];
    record(b'C', &[varints(&[sequence, first, seq, 1, 1]), payload(&bytes)].concat(), &bytes)
}

fn digest(sequence: u64) -> Vec<u8> {
    record(b'D', &[varints(&[sequence]), vec![0; 16]].concat(), &[])
}

fn open(file: &[u8]) -> Result<(), Error> {
    Container::open(file, &Limits::default()).map(|_| ())
}

#[track_caller]
fn assert_refused(records: &[Vec<u8>], kind: ErrorKind, message: &str) {
    let file = crafted(records);
    let error = open(&file).unwrap_err();
    assert!(error.to_string().contains(message), "{error}");
    assert_eq!(error.kind(), kind, "{error}");
    Container::recover(file.as_slice(), &Limits::default()).unwrap();
}

#[test]
fn crafted_file_is_whole() {
    open(&crafted(&[sequence(0, 0, &[(0, 2), (0, 3), (4, 1)]), chunk(0, 0, 5), chunk(0, 9, 1), digest(0)])).unwrap();
}

#[test]
fn chunks_cover_the_entries_in_order_and_cross_no_gap() {
    let tokens = || sequence(0, 0, &[(0, 5), (4, 1)]);
    let refused = |chunks: &[Vec<u8>], message: &str| {
        assert_refused(&[&[tokens()], chunks].concat(), ErrorKind::Corrupt, message);
    };
    refused(&[chunk(0, 1, 4)], "expected a chunk that starts at token 0, got 1");
    refused(&[chunk(0, 0, 3), chunk(0, 2, 2)], "expected a chunk that starts at token 3, got 2");
    refused(&[chunk(0, 0, 5), chunk(0, 5, 1)], "expected a chunk that starts at token 9, got 5");
    refused(&[chunk(0, 0, 6)], "expected at most 5 tokens from token 0 to the next gap, got 6");
    refused(&[chunk(0, 0, 0)], "expected at least 1 token, got 0");
    refused(&[chunk(0, 0, 5), chunk(0, 9, 1), chunk(0, 10, 1)], "expected no more chunks");
}

#[test]
fn recovery_accepts_chunks_behind_a_lost_one_but_none_before() {
    let records = [sequence(0, 0, &[(0, 5), (4, 3)]), chunk(0, 2, 2), chunk(0, 0, 1), chunk(0, 10, 1), digest(0)];
    let file = crafted(&records);
    let (container, damage) = Container::recover(file.as_slice(), &Limits::default()).unwrap();
    let sequence = container.sequences().next().unwrap();
    let firsts: Vec<_> = sequence.chunks.iter().map(|chunk| chunk.first_token).collect();
    assert_eq!((firsts, sequence.missing), (vec![2, 10], 5));
    assert_eq!(damage.len(), 2, "{damage:?}");
    assert_eq!(damage[1].message, "run `r`, layer 0, key: 5 of 8 tokens are missing");
}

#[test]
fn nothing_is_there_twice() {
    let one = || sequence(0, 0, &[(0, 1)]);
    let twice = |records: &[Vec<u8>], message: &str| assert_refused(records, ErrorKind::Corrupt, message);
    twice(&[one(), one()], "run 0, layer 0, key has one already");
    twice(&[one(), sequence(1, 0, &[])], "run 0, layer 0, key has one already");
    twice(&[one(), sequence(0, 1, &[])], "sequence 0 is there twice");
    twice(&[one(), chunk(0, 0, 1), digest(0), digest(0)], "the digest of sequence 0 is there twice");
    let artifact = || record(b'A', &[vec![0], payload(&[9])].concat(), &[9]);
    twice(&[artifact(), artifact()], "the artifact of codec 0 is there twice");
}

#[test]
fn numbers_follow_each_other() {
    assert_refused(&[sequence(1, 0, &[])], ErrorKind::Corrupt, "expected sequence 0, got 1");
    let run = record(b'R', &[&[9, 0, 0, 0][..], &payload(&[])].concat(), &[]);
    assert_refused(&[run], ErrorKind::Corrupt, "expected run 1, got 9");
    assert_refused(&[record(b'L', &[2, 3, 0, 0], &[])], ErrorKind::Corrupt, "expected lane 1, got 2");
    // In a damaged file any number costs the same.
    let file = crafted(&[sequence(u64::MAX, 0, &[]), digest(u64::MAX)]);
    let (_, damage) = Container::recover(file.as_slice(), &Limits::default()).unwrap();
    assert_eq!(damage.len(), 1, "{damage:?}");
    assert!(damage[0].message.ends_with("sequences are missing"), "{damage:?}");
}

#[test]
fn long_names_are_refused() {
    let named = |tag: u8, before: &[u8], len: usize, after: &[u8]| {
        record(tag, &[before, &varints(&[len as u64]), &vec![b'n'; len], after].concat(), &[])
    };
    open(&crafted(&[named(b'L', &[1, 3, 0], 255, &[])])).unwrap();
    assert_refused(&[named(b'L', &[1, 3, 0], 256, &[])], ErrorKind::LimitExceeded, "256, the limit is 255");
    let after = [&[0, 0][..], &payload(&[])].concat();
    open(&crafted(&[named(b'R', &[1], 4096, &after)])).unwrap();
    assert_refused(&[named(b'R', &[1], 4097, &after)], ErrorKind::LimitExceeded, "4097, the limit is 4096");
}

#[test]
fn stored_lengths_follow_from_the_lane() {
    let lane =
        |coding: u64, bytes: &[u8]| record(b'C', &[varints(&[0, 0, 2, 1, coding]), payload(bytes)].concat(), bytes);
    let refused = |lane: Vec<u8>, message: &str| {
        assert_refused(&[sequence(0, 0, &[(0, 2)]), lane], ErrorKind::Corrupt, message);
    };
    refused(lane(1, &[0; 3]), "expected 4 stored bytes, got 3");
    refused(lane(1, &[0; 5]), "expected 4 stored bytes, got 5");
    refused(lane(0, &[0; 4]), "expected less than 4 coded bytes, got 4");
    // An empty lane is stored, never coded.
    let empty = |coding: u64| {
        let head = [varints(&[0, 0, 2, 2, 1]), payload(&[1; 4]), varints(&[2 + coding, 0, 1, 1]), payload(&[])];
        [
            sequence(0, 0, &[(0, 2)]),
            record(b'L', &[1, 6, 4, 1, b'n'], &[]),
            record(b'C', &head.concat(), &[1; 4]),
            digest(0),
        ]
    };
    open(&crafted(&empty(1))).unwrap();
    assert_refused(&empty(0), ErrorKind::Corrupt, "expected less than 0 coded bytes, got 0");
}

#[test]
fn lanes_of_a_chunk_share_one_limit() {
    let head = [varints(&[0, 0, 2, 2, 1]), payload(&[1; 4]), varints(&[3, 5, 1, 1]), payload(&[2; 5])].concat();
    let chunk = record(b'C', &head, &[1, 1, 1, 1, 2, 2, 2, 2, 2]);
    let file = crafted(&[sequence(0, 0, &[(0, 2)]), record(b'L', &[1, 3, 0, 1, b'n'], &[]), chunk, digest(0)]);
    Container::open(file.as_slice(), &Limits { lane: 9, ..Limits::default() }).unwrap();
    let error = Container::open(file.as_slice(), &Limits { lane: 8, ..Limits::default() }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    assert!(error.to_string().contains("9 bytes of lanes up to here, the limit is 8"), "{error}");
}

#[test]
fn sizes_that_overflow_are_refused() {
    let huge = 1 << 31;
    let token = record(b'S', &varints(&[0, 0, 0, 0, 0, huge, huge, 0]), &[]);
    assert_refused(&[token], ErrorKind::LimitExceeded, "exceeds the limit");
    // No lane, but a tensor of 2^63 bytes.
    let chunk = record(b'C', &varints(&[0, 0, 1 << 62, 0]), &[]);
    assert_refused(&[sequence(0, 0, &[(0, 1 << 62)]), chunk], ErrorKind::LimitExceeded, "exceeds the limit");
    let entries = (0..2).map(|_| EntryInfo { span: Span { start: 0, seq: usize::MAX }, stage: Stage::Unknown });
    let info = SequenceInfo {
        run: RunId(0),
        layer: 0,
        role: Role::Key,
        dtype: DType::F32,
        heads: 1,
        dim: 1,
        entries: entries.collect(),
    };
    assert_eq!((info.seq(), info.original_bytes()), (usize::MAX, u64::MAX));
    let run = RunInfo { tokens: vec![(u64::MAX, vec![1, 2]), (0, vec![3])], ..RunInfo::default() };
    assert_eq!((run.tokens(u64::MAX, 2), run.tokens(0, 1)), (None, Some(vec![3])));
}

#[test]
fn lost_records_are_reported_although_all_others_are_whole() {
    let (bytes, ..) = sample(&mut pipeline(RUNS));
    let (header, records) = split(&bytes);
    let mut start = header.len();
    for record in &records {
        let cut = [&bytes[..start], &bytes[start + record.len()..]].concat();
        let (container, damage) = Container::recover(cut.as_slice(), &Limits::default()).unwrap();
        assert!(damage.iter().any(|damage| damage.message.starts_with("expected an index at byte")), "{damage:?}");
        let damaged: u64 = damage.iter().map(|damage| damage.range.end - damage.range.start).sum();
        assert_eq!(container.ledger().total() + damaged, cut.len() as u64);
        assert!(damage.len() > 1, "what is missing is named: {damage:?}");
        start += record.len();
    }
}

#[test]
fn recovered_ledger_of_a_whole_file_is_complete() {
    let (bytes, _, written) = sample(&mut pipeline(CHAIN));
    let (container, damage) = Container::recover(bytes.as_slice(), &Limits::default()).unwrap();
    assert_eq!((container.ledger(), damage), (&written, vec![]));
}

#[test]
fn recovery_takes_time_in_proportion_to_the_file() {
    // Every fourth byte begins a head of megabytes; with a checksum each this would take hours.
    let run = [&b"R"[..], &varints(&[8 << 20]), &[0, 0, 0]].concat();
    let (header, _) = split(&sample(&mut pipeline(RUNS)).0);
    let file = [header, run.repeat((10 << 20) / run.len())].concat();
    let start = std::time::Instant::now();
    let (_, damage) = Container::recover(file.as_slice(), &Limits::default()).unwrap();
    assert_eq!(damage.len(), 2, "all of it, and the missing end");
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

#[test]
fn damaged_payload_does_not_hide_the_next_record() {
    // The token ids of the first run are damaged, and they look like a record.
    let ids = digest(0);
    let mut run = record(b'R', &[&[1, 0, 0, 0][..], &payload(&ids)].concat(), &ids);
    *run.last_mut().unwrap() ^= 1;
    let file = crafted(&[run.clone(), sequence(0, 0, &[]), digest(0)]);
    let (container, damage) = Container::recover(file.as_slice(), &Limits::default()).unwrap();
    assert_eq!(damage.len(), 1, "{damage:?}");
    assert_eq!(damage[0].range.end - damage[0].range.start, run.len() as u64);
    assert!(container.sequences().next().unwrap().digest.is_some());
}

#[test]
fn newer_minor_version_is_named_only_where_it_matters() {
    let (bytes, ..) = sample(&mut pipeline(RUNS));
    let (old, records) = split(&bytes);
    let json = std::str::from_utf8(&old[16..old.len() - 4]).unwrap();
    let json = format!("{},\"added\":[1]}}", json.strip_suffix('}').unwrap());
    assert!(decode(&join(&header(VERSION.1 + 1, &json), &records)).is_ok(), "keys of a minor version are passed over");
    let added = [records, vec![record(b'Z', &[], &[])]].concat();
    let error = open(&join(&header(VERSION.1 + 1, &json), &added)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().ends_with("record `Z` is of container version 1.2, this program reads 1.1"), "{error}");
    assert_eq!(open(&join(&old, &added)).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn writer_refuses_what_no_reader_opens() {
    let pipeline = pipeline(RUNS);
    let mut writer = ContainerWriter::new(Vec::new(), &pipeline).unwrap();
    let name = |len| RunInfo { name: "n".repeat(len), ..RunInfo::default() };
    assert_eq!(writer.add_run(&name(4097)).unwrap_err().kind(), ErrorKind::LimitExceeded);
    let run = writer.add_run(&name(4096)).unwrap();
    let spans = [(0, 3), (5, 3)];
    let entries = spans.map(|(start, seq)| EntryInfo { span: Span { start, seq }, stage: Stage::Unknown }).to_vec();
    let info = SequenceInfo { run, layer: 0, role: Role::Key, dtype: DType::F16, heads: 1, dim: 1, entries };
    assert!(writer.add_sequence(SequenceInfo { run: RunId(1), ..info.clone() }).is_err(), "no such run");
    assert!(writer.add_sequence(SequenceInfo { heads: 1 << 40, ..info.clone() }).is_err(), "token too large");
    let id = writer.add_sequence(info.clone()).unwrap();
    assert!(writer.add_sequence(info).is_err(), "there already");
    let lane = |name: &str, elem, len: usize, coding, range| EncodedLane {
        spec: LaneSpec::new(name.to_owned(), elem, Shape::flat(len)),
        coding,
        range,
    };
    let tensor = |seq: usize| {
        let spec = LaneSpec::tensor(DType::F16, Shape::new(seq, 1, 1));
        let lane = EncodedLane { spec, coding: LaneCoding::Stored, range: 0..2 * seq };
        EncodedChunk { lanes: vec![lane], bytes: vec![0; 2 * seq] }
    };
    let mut add = |first, seq: usize, chunk: EncodedChunk| writer.add_chunk(id, first, seq, chunk, &vec![0; 2 * seq]);
    for (first, seq) in [(1, 2), (0, 4), (0, 0)] {
        assert_eq!(add(first, seq, tensor(seq)).unwrap_err().kind(), ErrorKind::ShapeMismatch, "{first} {seq}");
    }
    let (u8, stored, coded) = (Elem::U8, LaneCoding::Stored, LaneCoding::Codec);
    let refused = [
        (lane(&"n".repeat(256), u8, 1, stored, 0..1), ErrorKind::LimitExceeded),
        (lane("n", u8, 5 << 30, coded, 0..1), ErrorKind::LimitExceeded),
        (lane("n", u8, 2, stored, 0..1), ErrorKind::ShapeMismatch),
        (lane("n", u8, 1, coded, 0..1), ErrorKind::ShapeMismatch),
        (lane("n", u8, 0, coded, 0..0), ErrorKind::ShapeMismatch),
        (lane("n", u8, 2, stored, 0..2), ErrorKind::ShapeMismatch),
    ];
    for (lane, kind) in refused {
        let chunk = EncodedChunk { bytes: vec![0; lane.range.len().min(1)], lanes: vec![lane] };
        assert_eq!(add(0, 3, chunk.clone()).unwrap_err().kind(), kind, "{:?}", chunk.lanes);
    }
    let many = EncodedChunk { lanes: vec![lane("n", u8, 0, stored, 0..0); 257], bytes: vec![] };
    assert_eq!(add(0, 3, many).unwrap_err().kind(), ErrorKind::LimitExceeded);
    // What was refused left nothing behind.
    add(0, 3, tensor(3)).unwrap();
    add(5, 3, tensor(3)).unwrap();
    open(&writer.finish().unwrap().0).unwrap();
}
