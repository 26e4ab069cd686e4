//! Throughput of `planes` and `rans` beside zstd level 3, in tensor bytes, on the keys and values of the bundled sample.
//!
//! `cargo bench -p gearbox-planes`; with `-- --quick` for a first look. One thread.

use std::fs;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gearbox_core::{Codec, Context, DType, LaneRef, LaneSpec, Registry, Role, Shape};
use gearbox_planes as _;
use serde_json::{Value, json};

/// A tensor of the sample.
struct Tensor {
    spec: LaneSpec,
    role: Role,
    layer: u32,
    bytes: Vec<u8>,
}

/// Keys and values of all layers, read from the safetensors file of the sample.
fn sample() -> Vec<Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/sample/demo_prompt_512_1.safetensors");
    let file = fs::read(path).unwrap();
    let (len, rest) = file.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(usize::try_from(u64::from_le_bytes(*len)).unwrap());
    let header: Value = serde_json::from_slice(header).unwrap();
    let mut tensors = Vec::new();
    for layer in 0.. {
        for role in Role::ALL {
            let Some(found) = header.get(format!("layers.{layer}.{role}")) else { return tensors };
            let numbers = |key: &str| -> Vec<usize> { serde_json::from_value(found[key].clone()).unwrap() };
            let (place, shape) = (numbers("data_offsets"), numbers("shape"));
            let spec = LaneSpec::tensor(DType::F16, Shape::new(shape[0], shape[1], shape[2]));
            tensors.push(Tensor { spec, role, layer, bytes: data[place[0]..place[1]].to_vec() });
        }
    }
    tensors
}

fn bench(criterion: &mut Criterion) {
    let registry = Registry::built_in().unwrap();
    let tensors = sample();
    let total: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();
    let settings = [
        ("planes", "planes", json!({})),
        ("planes without references", "planes", json!({"references": "none"})),
        ("rans by channel", "rans", json!({})),
        ("rans without contexts", "rans", json!({"contexts": "none"})),
    ];
    let mut group = criterion.benchmark_group("sample");
    group.throughput(Throughput::Bytes(total as u64));
    for (name, id, settings) in settings {
        let codec = registry.codec(id).unwrap().build(&settings).unwrap();
        let encoded: Vec<Vec<u8>> = tensors.iter().map(|tensor| encode(codec.as_ref(), tensor)).collect();
        println!("{name}: ratio {:.4}", total as f64 / encoded.iter().map(Vec::len).sum::<usize>() as f64);
        group.bench_function(format!("encode {name}"), |b| {
            b.iter(|| tensors.iter().map(|tensor| encode(codec.as_ref(), black_box(tensor)).len()).sum::<usize>());
        });
        let mut out = vec![0; tensors[0].bytes.len()];
        group.bench_function(format!("decode {name}"), |b| {
            b.iter(|| {
                for (tensor, encoded) in tensors.iter().zip(&encoded) {
                    let cx = Context::new(tensor.layer, tensor.role, 0);
                    codec.decode(black_box(encoded), &tensor.spec, &cx, &mut out).unwrap();
                }
            });
        });
    }
    let frames: Vec<_> = tensors.iter().map(|tensor| zstd::bulk::compress(&tensor.bytes, 3).unwrap()).collect();
    println!("zstd 3: ratio {:.4}", total as f64 / frames.iter().map(Vec::len).sum::<usize>() as f64);
    let mut compressor = zstd::bulk::Compressor::new(3).unwrap();
    group.bench_function("encode zstd 3", |b| {
        b.iter(|| {
            tensors.iter().map(|tensor| compressor.compress(black_box(&tensor.bytes)).unwrap().len()).sum::<usize>()
        });
    });
    let mut decompressor = zstd::bulk::Decompressor::new().unwrap();
    let mut out = vec![0; tensors[0].bytes.len()];
    group.bench_function("decode zstd 3", |b| {
        b.iter(|| {
            for frame in &frames {
                decompressor.decompress_to_buffer(black_box(&frame[..]), &mut out[..]).unwrap();
            }
        });
    });
    group.finish();
}

fn encode(codec: &dyn Codec, tensor: &Tensor) -> Vec<u8> {
    let mut out = Vec::with_capacity(tensor.bytes.len() + 1);
    let cx = Context::new(tensor.layer, tensor.role, 0);
    codec.encode(LaneRef::new(&tensor.spec, &tensor.bytes).unwrap(), &cx, &mut out).unwrap();
    out
}

criterion_group!(benches, bench);
criterion_main!(benches);
