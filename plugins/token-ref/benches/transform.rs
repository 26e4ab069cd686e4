//! Throughput of both directions on chunks of a first layer, beside memcpy of the same bytes.
//!
//! `cargo bench -p gearbox-token-ref`; with `-- --quick` for a first look.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gearbox_core::{
    Chunk, ChunkMut, Context, DType, Latents, LossyTransform, Plugin, Role, Rope, RopePairing, RopeScaling, Shape,
};
use gearbox_token_ref::{Config, TokenRef};

/// Different tokens; half of the rows repeat one.
const TOKENS: u32 = 64;

fn bench(criterion: &mut Criterion) {
    let rope = Rope { pairing: RopePairing::HalfSplit, theta: 10_000.0, rotary_dim: 128, scaling: RopeScaling::None };
    let transform = TokenRef::new(Config::default()).unwrap();
    let shape = Shape::new(128, 8, 128);
    let ids: Vec<u32> = (0..128).map(|row| row * 37 % TOKENS).collect();
    let row = |id: u32| (0..shape.row() as u32).map(move |i| ((id * 77 + i * 13) % 256) as u16 | 0x3C00);
    let values: Vec<u8> = ids.iter().flat_map(|id| row(*id)).flat_map(u16::to_le_bytes).collect();

    let mut group = criterion.benchmark_group("128 tokens");
    group.throughput(Throughput::Bytes(values.len() as u64));
    let mut copy = values.clone();
    group.bench_function("memcpy", |b| b.iter(|| black_box(&mut copy[..]).copy_from_slice(black_box(&values))));

    let context = |role| Context { tokens: Some(&ids), rope: Some(&rope), ..Context::new(0, role, 5000) };
    let mut latents = Latents::new();
    let chunk = Chunk::new(shape, DType::F16, &values).unwrap();
    transform.forward(chunk, &context(Role::Value), &mut latents).unwrap();
    // The lanes of values, read as those of keys, are keys that equal their predictions.
    for (name, role) in [("values", Role::Value), ("keys", Role::Key)] {
        let (cx, mut tensor) = (context(role), vec![0; values.len()]);
        group.bench_function(format!("inverse, {name}"), |b| {
            b.iter(|| {
                let out = ChunkMut::new(shape, DType::F16, &mut tensor).unwrap();
                transform.inverse(black_box(&latents), &cx, out).unwrap();
            });
        });
        let chunk = Chunk::new(shape, DType::F16, &tensor).unwrap();
        group.bench_function(format!("forward, {name}"), |b| {
            b.iter(|| {
                let mut latents = Latents::new();
                transform.forward(black_box(chunk), &cx, &mut latents).unwrap();
                latents
            });
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
