//! Properties over random pipelines and entries.

mod common;

use common::registry;
use gearbox_core::container::{Container, ContainerWriter, EntryInfo, RunInfo, SequenceInfo};
use gearbox_core::{
    Chunk, ChunkMut, Chunking, Context, DType, EncodedChunk, Limits, Pipeline, PipelineSpec, PluginSpec, Role, Shape,
    Span, Stage,
};
use proptest::prelude::*;

/// Entries with gaps of 0 to 3 positions.
fn entries() -> impl Strategy<Value = Vec<Span>> {
    prop::collection::vec((0u64..4, 1usize..40), 0..12).prop_map(|parts| {
        let mut end = 0;
        let span = |(gap, seq)| {
            let start = end + gap;
            end = start + seq as u64;
            Span { start, seq }
        };
        parts.into_iter().map(span).collect()
    })
}

fn chunking() -> impl Strategy<Value = Chunking> {
    prop_oneof![
        Just(Chunking::PerEntry),
        Just(Chunking::Aggregate),
        (1usize..50).prop_map(|tokens| Chunking::Chunked { tokens }),
        (1usize..50).prop_map(|tokens| Chunking::ChunkedGrouped { tokens }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn plan_covers_every_token_once_in_order_and_crosses_no_gap(entries in entries(), chunking in chunking()) {
        let tokens: Vec<u64> = entries.iter().flat_map(|entry| (0..entry.seq as u64).map(|token| entry.start + token)).collect();
        let mut covered = Vec::new();
        for chunk in chunking.plan(&entries) {
            prop_assert!(chunk.seq > 0);
            let pieces = chunk.pieces.iter().flat_map(|(idx, range)| range.clone().map(|token| entries[*idx].start + token as u64));
            let pieces: Vec<u64> = pieces.collect();
            let expected: Vec<u64> = (chunk.first_token..chunk.first_token + chunk.seq as u64).collect();
            prop_assert_eq!(&pieces, &expected);
            covered.extend(pieces);
        }
        prop_assert_eq!(covered, tokens);
    }

    #[test]
    fn container_gives_back_any_entries(entries in entries(), chunking in chunking(), dim in 1usize..9, seed in 0u64..1000) {
        let spec = PipelineSpec::of_codec(PluginSpec::new("runs"), chunking);
        let pipeline = Pipeline::build(&spec, &registry()).unwrap();
        let row = dim * 2;
        let seq: usize = entries.iter().map(|entry| entry.seq).sum();
        let tensor = common::tensor(seq * row, seed);
        let mut writer = ContainerWriter::new(Vec::new(), &pipeline).unwrap();
        let run = writer.add_run(&RunInfo { name: "r".into(), ..RunInfo::default() }).unwrap();
        let infos = entries.iter().map(|span| EntryInfo { span: *span, stage: Stage::Unknown }).collect();
        let info = SequenceInfo { run, layer: 3, role: Role::Value, dtype: DType::Bf16, heads: 1, dim, entries: infos };
        let id = writer.add_sequence(info).unwrap();
        let mut encoded = EncodedChunk::default();
        let mut before = 0;
        let coder = pipeline.coder(3, Role::Value).unwrap();
        for plan in chunking.plan(&entries) {
            let bytes = &tensor[before * row..(before + plan.seq) * row];
            let chunk = Chunk::new(Shape::new(plan.seq, 1, dim), DType::Bf16, bytes).unwrap();
            coder.encode(chunk, &Context::new(3, Role::Value, plan.first_token), &mut encoded).unwrap();
            writer.add_chunk(id, plan.first_token, plan.seq, encoded.clone(), bytes).unwrap();
            before += plan.seq;
        }
        let (file, ledger) = writer.finish().unwrap();
        prop_assert_eq!(ledger.total(), file.len() as u64);
        let container = Container::open(file.as_slice(), &Limits::default()).unwrap();
        let sequence = container.sequences().next().unwrap();
        let mut decoded = Vec::new();
        for (number, chunk) in sequence.chunks.iter().enumerate() {
            let mut out = vec![0; chunk.seq * row];
            let target = ChunkMut::new(sequence.info.shape(chunk.seq), DType::Bf16, &mut out).unwrap();
            let cx = Context::new(3, Role::Value, chunk.first_token);
            container.decode_chunk(&pipeline, sequence, number, &cx, target).unwrap();
            decoded.extend_from_slice(&out);
        }
        prop_assert_eq!(decoded, tensor);
    }

    #[test]
    fn random_bytes_behind_a_good_header_never_panic(garbage in prop::collection::vec(any::<u8>(), 0..300)) {
        let spec = PipelineSpec::of_codec(PluginSpec::new("runs"), Chunking::PerEntry);
        let pipeline = Pipeline::build(&spec, &registry()).unwrap();
        let (mut file, _) = ContainerWriter::new(Vec::new(), &pipeline).unwrap().finish().unwrap();
        file.truncate(file.len() - 40);
        file.extend_from_slice(&garbage);
        let _ = Container::open(file.as_slice(), &Limits::default());
        let _ = Container::recover(file.as_slice(), &Limits::default());
    }

    #[test]
    fn recovery_accounts_for_every_byte_of_a_damaged_file(
        cuts in prop::collection::vec((any::<prop::sample::Index>(), 0usize..40, prop::collection::vec(any::<u8>(), 0..6)), 1..4),
    ) {
        let (mut file, ..) = common::sample(&mut common::pipeline(common::CHAIN));
        let header = common::split(&file).0.len();
        for (at, len, added) in cuts {
            let at = header + at.index(file.len() - header);
            file.splice(at..file.len().min(at + len), added);
        }
        let (container, damage) = Container::recover(file.as_slice(), &Limits::default()).unwrap();
        let damaged: u64 = damage.iter().map(|damage| damage.range.end - damage.range.start).sum();
        prop_assert_eq!(container.ledger().total() + damaged, file.len() as u64);
        let opened = Container::open(file.as_slice(), &Limits::default()).is_ok();
        prop_assert!(!opened || damage.is_empty(), "{damage:?}");
    }
}
