//! Throughput of `quant` in bytes of the tensor, forward and inverse each, beside memcpy of the same bytes.
//!
//! `cargo bench -p gearbox-quant`; with `-- --quick` for a first look. Keys are grouped by channel, values by token.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gearbox_core::{Chunk, ChunkMut, Context, DType, Latents, LossyTransform, Plugin, Role, Shape};
use gearbox_quant::{Quant, QuantConfig};

fn bench(criterion: &mut Criterion) {
    let shape = Shape::new(128, 8, 128);
    // Halves between 0.25 and 4, of both signs.
    let mut state = 1u32;
    let values: Vec<u8> = (0..shape.elements())
        .flat_map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 16 & 0x8000) as u16 | (0x3400 + (state >> 20 & 0xFFF)) as u16).to_le_bytes()
        })
        .collect();
    let chunk = Chunk::new(shape, DType::F16, &values).unwrap();

    let mut group = criterion.benchmark_group("f16, 128 tokens");
    group.throughput(Throughput::Bytes(values.len() as u64));
    let mut copy = values.clone();
    group.bench_function("memcpy", |b| b.iter(|| black_box(&mut copy[..]).copy_from_slice(black_box(&values))));
    for role in Role::ALL {
        for bits in [4, 8] {
            let transform = Quant::new(QuantConfig { bits, ..QuantConfig::default() }).unwrap();
            let cx = Context::new(0, role, 0);
            let mut latents = Latents::new();
            transform.forward(chunk, &cx, &mut latents).unwrap();
            group.bench_function(format!("{role}, {bits} bits, forward"), |b| {
                b.iter(|| {
                    let mut latents = Latents::new();
                    transform.forward(black_box(chunk), &cx, &mut latents).unwrap();
                    latents
                });
            });
            let mut out = vec![0; values.len()];
            group.bench_function(format!("{role}, {bits} bits, inverse"), |b| {
                b.iter(|| {
                    let out = ChunkMut::new(shape, DType::F16, &mut out).unwrap();
                    transform.inverse(black_box(&latents), &cx, out).unwrap();
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
