//! A container gives back what was written, and its ledger accounts for every byte.

mod common;

use common::{CHAIN, RUNS, decode, pipeline, registry, sample};
use gearbox_core::container::Container;
use gearbox_core::ledger::Section;
use gearbox_core::{Elem, ErrorKind, Limits, Pipeline, PipelineSpec};

const LEARNED: &str = r#"{ "routes": [{ "codec": { "id": "learned" } }], "chunking": { "mode": "aggregate" } }"#;

#[test]
fn tensors_come_back_from_the_bytes_alone() {
    for json in [RUNS, CHAIN, LEARNED] {
        let (bytes, tensors, _) = sample(&mut pipeline(json));
        assert_eq!(decode(&bytes).unwrap(), tensors, "{json}");
    }
}

#[test]
fn ledger_rows_sum_to_the_file_size_and_agree_between_writer_and_reader() {
    for json in [RUNS, CHAIN, LEARNED] {
        let (bytes, _, written) = sample(&mut pipeline(json));
        let container = Container::open(bytes.as_slice(), &Limits::default()).unwrap();
        assert_eq!(&written, container.ledger(), "{json}");
        assert_eq!(written.total(), bytes.len() as u64, "{json}");
    }
}

#[test]
fn artifact_is_stored_once_and_counted() {
    let (bytes, _, ledger) = sample(&mut pipeline(LEARNED));
    assert!(ledger.sum(|account| account.section == Section::Artifact) > 1);
    let container = Container::open(bytes.as_slice(), &Limits::default()).unwrap();
    let built = container.pipeline(&registry()).unwrap();
    assert_eq!(built.artifacts().count(), 1);
}

#[test]
fn narrow_lanes_are_stored_packed() {
    let (_, tensors, ledger) = sample(&mut pipeline(CHAIN));
    let elements: usize = tensors.iter().map(|tensor| tensor.len() / 2).sum();
    let stored = ledger.sum(|account| account.section == Section::Payload && account.lane.as_deref() == Some("lower"));
    assert!(stored <= elements as u64 / 2, "{stored} bytes for {elements} nibbles");
    assert_eq!(Elem::Bits(4).size(), 1);
}

#[test]
fn no_chunk_grows_by_more_than_its_header() {
    let (_, tensors, ledger) = sample(&mut pipeline(RUNS));
    let original: usize = tensors.iter().map(Vec::len).sum();
    assert!(ledger.sum(|account| account.section == Section::Payload) <= original as u64);
}

#[test]
fn run_facts_and_entries_come_back() {
    let (bytes, ..) = sample(&mut pipeline(RUNS));
    let container = Container::open(bytes.as_slice(), &Limits::default()).unwrap();
    let sequence = container.sequences().next().unwrap();
    let run = container.run(sequence.info.run).unwrap();
    assert_eq!((run.name.as_str(), run.rope.as_ref().unwrap().rotary_dim), ("demo", common::DIM));
    assert_eq!(run.tokens(2, 3), Some(vec![300, 4, 5]));
    assert_eq!(run.tokens(9, 2), Some(vec![70_000, 8]));
    assert_eq!(run.tokens(5, 2), None, "position 6 is in a gap");
    let entries: Vec<_> = sequence.info.entries.iter().map(|entry| (entry.span.start, entry.span.seq)).collect();
    assert_eq!(entries, common::ENTRIES);
}

#[test]
fn same_input_gives_the_same_bytes() {
    assert_eq!(sample(&mut pipeline(CHAIN)).0, sample(&mut pipeline(CHAIN)).0);
}

#[test]
fn missing_plugin_is_named() {
    let (bytes, ..) = sample(&mut pipeline(RUNS));
    let container = Container::open(bytes.as_slice(), &Limits::default()).unwrap();
    let error = container.pipeline(&gearbox_core::Registry::empty()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnknownPlugin);
    assert!(error.to_string().contains("`runs`"), "{error}");
}

#[test]
fn missing_library_is_named() {
    let mut pipeline = Pipeline::build(pipeline(RUNS).spec(), &common::loaded("runs")).unwrap();
    let (bytes, ..) = sample(&mut pipeline);
    let container = Container::open(bytes.as_slice(), &Limits::default()).unwrap();
    let error = container.pipeline(&gearbox_core::Registry::empty()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnknownPlugin);
    let sha256 = "0123456789abcdef".repeat(4);
    let expected = format!("`runs` is a plugin of the library `libtests.so` (SHA-256 {sha256}), which is not loaded");
    assert_eq!(error.to_string(), expected);
}

#[test]
fn container_of_a_newer_plugin_is_refused() {
    let (bytes, ..) = sample(&mut pipeline(RUNS));
    let needle = br#""format_version":2"#;
    let newer = bytes.windows(needle.len()).position(|window| window == needle).unwrap();
    let mut changed = bytes.clone();
    changed[newer + needle.len() - 1] = b'3';
    let header = u32::from_le_bytes(changed[12..16].try_into().unwrap()) as usize + 16;
    let checksum = crc32c::crc32c(&changed[..header]);
    changed[header..header + 4].copy_from_slice(&checksum.to_le_bytes());
    let container = Container::open(changed.as_slice(), &Limits::default()).unwrap();
    let error = container.pipeline(&registry()).unwrap_err();
    assert_eq!(error.to_string(), "written by `runs` format version 3, this program has version 2");
}

#[test]
fn resolved_pipeline_is_a_fixed_point() {
    let first = pipeline(CHAIN);
    let again = Pipeline::build(first.spec(), &registry()).unwrap();
    assert_eq!(first.spec(), again.spec());
    let text = serde_json::to_string(first.spec()).unwrap();
    assert_eq!(&PipelineSpec::from_json(&text).unwrap(), first.spec());
}
