//! Throughput of the split and merge kernels beside memcpy of the same bytes.
//!
//! `cargo bench -p gearbox-gear`; with `-- --quick` for a first look.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gearbox_gear::kernels;

/// Words of one token: 2 heads of 128 channels.
const ROW: usize = 256;

type Split = fn(&[u8], &mut [u8], &mut [u8]);
type Both = fn(&[u8], usize, &mut [u8], &mut [u8], &mut [u8]);
type Merge = fn(&[u8], &[u8], &mut [u8]);

fn bench(criterion: &mut Criterion) {
    for len in [64 << 10, 1 << 20, 32 << 20] {
        let mut group = criterion.benchmark_group(format!("{} KiB", len >> 10));
        group.throughput(Throughput::Bytes(len as u64));
        // Aligned to cache lines, as a mapped tensor is; the allocator alone promises 16 bytes.
        let buffer: Vec<u8> = (0..len + 128).map(|i| (i * 7 + i / 255) as u8).collect();
        let start = buffer.as_ptr().align_offset(64).min(64);
        let src = &buffer[start..start + len];
        let unaligned = &buffer[start + 16..start + 16 + len];
        let (mut hi, mut lo) = (vec![1; len / 2], vec![1; len / 2]);
        let (mut delta, mut out) = (hi.clone(), src.to_vec());

        group.bench_function("memcpy", |b| b.iter(|| black_box(&mut out[..]).copy_from_slice(black_box(src))));

        let splits: [(_, Split); 4] = [
            ("split16", kernels::split16),
            ("split16_delta", |src, hi, lo| kernels::split16_delta(src, ROW, hi, lo)),
            ("split32", kernels::split32),
            ("split32_delta", |src, hi, lo| kernels::split32_delta(src, ROW, hi, lo)),
        ];
        for (name, split) in splits {
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter(|| split(black_box(src), black_box(&mut hi), black_box(&mut lo)));
            });
        }
        group.bench_function("split16_delta_unaligned", |b| {
            b.iter(|| kernels::split16_delta(black_box(unaligned), ROW, black_box(&mut hi), black_box(&mut lo)));
        });

        let both: [(_, Both); 2] = [("split16_both", kernels::split16_both), ("split32_both", kernels::split32_both)];
        for (name, split) in both {
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter(|| split(black_box(src), ROW, black_box(&mut hi), black_box(&mut delta), black_box(&mut lo)));
            });
        }

        let merges: [(_, Merge); 4] = [
            ("merge16", kernels::merge16),
            ("merge16_delta", |hi, lo, out| kernels::merge16_delta(hi, lo, ROW, out)),
            ("merge32", kernels::merge32),
            ("merge32_delta", |hi, lo, out| kernels::merge32_delta(hi, lo, ROW, out)),
        ];
        for (name, merge) in merges {
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter(|| merge(black_box(&hi), black_box(&lo), black_box(&mut out)));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
