//! Throughput of both codecs beside zstd on the same bytes: exponents of the bundled sample, one byte each, and its tensors.
//!
//! `cargo bench -p gearbox-bitstream`; with `-- --quick` for a first look. `zstd-huffman` is zstd held to its Huffman coder: it looks
//! for matches of seven symbols at 64 places only and finds next to none. Codecs with `own` in their name store a table with the lane,
//! those with `shared` were trained with the whole sample before.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gearbox_bitstream::{Arithmetic, Codebook, Config, Huffman};
use gearbox_core::{Codec, Context, DType, Elem, LaneRef, LaneSpec, Plugin, Role, Sample, Shape};
use serde_json::Value;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, Strategy};

const CONTEXT: Context<'static> = Context::new(0, Role::Key, 0);

/// The keys and values of all layers of the sample.
fn tensors() -> Vec<Vec<u8>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/sample/demo_prompt_512_1.safetensors");
    let file = std::fs::read(path).expect("the sample is part of the repository");
    let (len, rest) = file.split_first_chunk().expect("a length of eight bytes");
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).expect("a JSON header");
    let is_cache = |name: &str| matches!(name.rsplit('.').next(), Some("key" | "value"));
    let range = |entry: &Value| [0, 1].map(|end| entry["data_offsets"][end].as_u64().expect("an offset") as usize);
    let ranges = header.iter().filter(|(name, _)| is_cache(name)).map(|(_, entry)| range(entry));
    ranges.map(|[start, end]| data[start..end].to_vec()).collect()
}

fn own<P: Plugin<Config = Config> + Codec + 'static>() -> Arc<dyn Codec> {
    Arc::new(P::new(Config { codebook: Codebook::PerDump, ..Config::default() }).expect("sound settings"))
}

/// A codec that was trained with one large lane.
fn shared<P: Plugin<Config = Config> + Codec>(spec: &LaneSpec, bytes: &[u8]) -> Arc<dyn Codec> {
    let codec = P::new(Config::default()).expect("sound settings");
    let sample = Sample { spec: spec.clone(), bytes: bytes.into(), layer: 0, role: Role::Key };
    let artifact = codec.train(&mut std::iter::once(sample)).expect("sound bytes").expect("a model");
    codec.with_artifact(&artifact.0).expect("its own artifact").expect("a codec with a model")
}

fn compressor(level: i32, only_huffman: bool) -> Compressor<'static> {
    let mut compressor = Compressor::new(level).expect("a context");
    let parameters = [
        CParameter::Strategy(Strategy::ZSTD_fast),
        CParameter::WindowLog(17),
        CParameter::HashLog(6),
        CParameter::MinMatch(7),
        CParameter::TargetLength(0),
    ];
    for parameter in parameters.into_iter().filter(|_| only_huffman) {
        compressor.set_parameter(parameter).expect("a legal parameter");
    }
    compressor
}

fn bench_lane(criterion: &mut Criterion, name: &str, spec: &LaneSpec, bytes: &[u8], sample: (&LaneSpec, &[u8])) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    let lane = LaneRef::new(spec, bytes).expect("bytes of the lane");
    let mut back = vec![0; bytes.len()];
    let codecs = [
        ("huffman-own", own::<Huffman>()),
        ("huffman-shared", shared::<Huffman>(sample.0, sample.1)),
        ("arithmetic-own", own::<Arithmetic>()),
        ("arithmetic-shared", shared::<Arithmetic>(sample.0, sample.1)),
    ];
    for (name, codec) in codecs {
        let mut encoded = Vec::new();
        group.bench_function(format!("{name}/encode"), |b| {
            b.iter(|| {
                encoded.clear();
                codec.encode(black_box(lane), &CONTEXT, &mut encoded).expect("a sound lane");
            });
        });
        group.bench_function(format!("{name}/decode"), |b| {
            b.iter(|| codec.decode(black_box(&encoded), spec, &CONTEXT, &mut back).expect("what it wrote"));
        });
        assert_eq!(back, bytes);
        println!("{name}: {} of {} bytes", encoded.len(), bytes.len());
    }
    for (name, mut compressor) in [("zstd-huffman", compressor(1, true)), ("zstd-3", compressor(3, false))] {
        let mut decompressor = Decompressor::new().expect("a context");
        let mut encoded = Vec::with_capacity(zstd::zstd_safe::compress_bound(bytes.len()));
        group.bench_function(format!("{name}/encode"), |b| {
            b.iter(|| {
                encoded.clear();
                compressor.compress_to_buffer(black_box(bytes), &mut encoded).expect("room for the frame");
            });
        });
        group.bench_function(format!("{name}/decode"), |b| {
            b.iter(|| decompressor.decompress_to_buffer(black_box(&encoded), &mut back[..]).expect("its own frame"));
        });
        assert_eq!(back, bytes);
        println!("{name}: {} of {} bytes", encoded.len(), bytes.len());
    }
    group.finish();
}

fn bench(criterion: &mut Criterion) {
    let tensors = tensors();
    let exponents = |bytes: &[u8]| -> Vec<u8> { bytes.as_chunks().0.iter().map(|[_, high]| high >> 2 & 31).collect() };
    let (keys, whole) = (exponents(&tensors[2]), tensors.concat());
    let all = exponents(&whole);
    let spec = |len: usize| LaneSpec::new("exponents", Elem::U8, Shape::flat(len));
    for (name, bytes) in
        [("exponents, 16 KiB", &keys[..16 << 10]), ("exponents of a tensor", &keys), ("exponents of the sample", &all)]
    {
        bench_lane(criterion, name, &spec(bytes.len()), bytes, (&spec(all.len()), &all));
    }
    let spec = |len: usize| LaneSpec::tensor(DType::F16, Shape::new(len / 256, 2, 64));
    for (name, bytes) in [("f16, 32 KiB", &tensors[2][..32 << 10]), ("f16 tensor", &tensors[2])] {
        bench_lane(criterion, name, &spec(bytes.len()), bytes, (&spec(whole.len()), &whole));
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
