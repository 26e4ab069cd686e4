//! Throughput of the comparison of tensors, in bytes of the original, and of attention replay, in pairs of a query and a token it sees.
//!
//! `cargo bench -p gearbox --bench metrics`; with `-- --quick` for a first look.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gearbox::metrics::attention::{Attention, AttentionOptions, LayerInput, Queries, Sides};
use gearbox::metrics::error::HeadErrors;
use gearbox_core::{Chunk, DType, Shape, Span};

fn errors(criterion: &mut Criterion) {
    for shape in [Shape::new(128, 2, 64), Shape::new(2048, 8, 128)] {
        let mut group = criterion.benchmark_group(format!("errors {shape}"));
        for dtype in DType::ALL {
            let len = shape.elements() * dtype.size();
            group.throughput(Throughput::Bytes(len as u64));
            // Exponents near 1, every mantissa, both signs.
            let word = |i: usize| (i.wrapping_mul(0x9e37_79b1) >> 7) as u32;
            let original: Vec<u8> = match dtype {
                DType::F16 => (0..len / 2).flat_map(|i| (word(i) as u16 & 0xbfff | 0x3000).to_le_bytes()).collect(),
                DType::Bf16 => (0..len / 2).flat_map(|i| (word(i) as u16 & 0x81ff | 0x3e00).to_le_bytes()).collect(),
                _ => (0..len / 4).flat_map(|i| (word(i) & 0x81ff_ffff | 0x3e00_0000).to_le_bytes()).collect(),
            };
            let decoded: Vec<u8> = original.iter().enumerate().map(|(i, byte)| byte ^ u8::from(i % 2 == 0)).collect();
            for (name, decoded) in [("equal", &original), ("changed", &decoded)] {
                group.bench_function(BenchmarkId::new(name, dtype), |b| {
                    b.iter(|| {
                        let mut errors = HeadErrors::default();
                        let chunk = |bytes| Chunk::new(shape, dtype, bytes).unwrap();
                        errors.add(chunk(black_box(&original)), chunk(black_box(decoded))).unwrap();
                        errors
                    });
                });
            }
        }
    }
}

fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    group.sample_size(10);
    let (kv, q) = (Shape::new(1024, 2, 64), Shape::new(1024, 4, 64));
    // Elements from -2 to 2, without order.
    let bytes = |shape: Shape, salt: usize| -> Vec<u8> {
        let word = |i: usize| ((i + salt).wrapping_mul(0x9e37_79b1) >> 7) as u16 & 0xbfff;
        (0..shape.elements()).flat_map(|i| word(i).min(0xbc00).to_le_bytes()).collect()
    };
    let (original, queries) = (bytes(kv, 0), bytes(q, 1));
    let changed: Vec<u8> = original.iter().enumerate().map(|(i, byte)| byte ^ u8::from(i % 2 == 0)).collect();
    let chunk = |shape, bytes| Chunk::new(shape, DType::F16, bytes).unwrap();
    let (original, changed) = ([chunk(kv, &original)], [chunk(kv, &changed)]);
    let attention = Attention::new(AttentionOptions::default()).unwrap();
    group.throughput(Throughput::Elements((q.heads * q.seq * (q.seq + 1) / 2) as u64));
    for (name, key, value) in [
        ("equal", &original, &original),
        ("keys", &changed, &original),
        ("values", &original, &changed),
        ("both", &changed, &changed),
    ] {
        let input = LayerInput {
            spans: &[Span { start: 0, seq: kv.seq }],
            key: Sides { original: &original, decoded: key },
            value: Sides { original: &original, decoded: value },
            queries: &[Queries { first: 0, chunk: chunk(q, &queries) }],
            facts: None,
        };
        group.bench_function(name, |b| b.iter(|| attention.layer(black_box(&input)).unwrap()));
    }
}

criterion_group!(benches, errors, attention);
criterion_main!(benches);
