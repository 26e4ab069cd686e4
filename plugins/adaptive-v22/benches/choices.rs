//! What choosing predictors costs, beside what zstd alone needs for the frames of the trials.
//!
//! `cargo bench -p gearbox-adaptive-v22`; with `-- --quick` for a first look. Data are the bundled sample: keys and values of 528 tokens
//! in six layers. Sizes, and ratios of times that were taken in turns, are printed before the throughputs.

use std::hint::black_box;
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gearbox_adaptive_v22::{Choice, Config, Encoder, Predictor, bitshuffle};
use gearbox_core::{Chunk, DType, Role, Shape};
use serde_json::Value;
use zstd::bulk::Compressor;

/// Keys and values of every layer of the sample.
fn tensors() -> Vec<(Role, Shape, Vec<u8>)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/sample/demo_prompt_512_1.safetensors");
    let file = std::fs::read(path).expect("the bundled sample");
    let data = 8 + u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&file[8..data]).expect("a header");
    let mut tensors = Vec::new();
    for layer in 0..6 {
        for role in Role::ALL {
            let tensor = &header[format!("layers.{layer}.{role}")];
            let number = |key: &str, idx: usize| tensor[key][idx].as_u64().expect("a number") as usize;
            let shape = Shape::new(number("shape", 0), number("shape", 1), number("shape", 2));
            let place = data + number("data_offsets", 0)..data + number("data_offsets", 1);
            tensors.push((role, shape, file[place].to_vec()));
        }
    }
    tensors
}

/// Everything that trials compress: each block behind each candidate, and whole streams as they were chosen.
fn trial_frames(config: &Config, tensors: &[(Role, Shape, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut zstd = Compressor::new(config.level).expect("a context");
    let mut frames = Vec::new();
    for (role, shape, bytes) in tensors {
        let row = shape.row();
        for byte in [1, 0] {
            let candidates = if *role == Role::Key { &config.key_high } else { &config.value_high };
            let stream: Vec<u8> = bytes.iter().skip(byte).step_by(2).copied().collect();
            let mut joined = Vec::new();
            for block in stream.chunks(config.block_seq as usize * row) {
                let predict = |predictor: &Predictor| {
                    let mut predicted = vec![0; block.len()];
                    predictor.forward(block, row, shape.dim, &mut predicted);
                    if config.bitshuffle {
                        let plain = predicted.clone();
                        bitshuffle::shuffle(&plain, &mut predicted);
                    }
                    predicted
                };
                let predicted: Vec<_> = candidates.iter().map(predict).collect();
                let best = predicted.iter().min_by_key(|data| zstd.compress(data).expect("a frame").len());
                joined.extend_from_slice(best.expect("a candidate"));
                frames.extend(predicted);
            }
            frames.push(joined);
        }
    }
    frames
}

/// Runs everything in turns and prints the time of the trials as a multiple of the other two: medians over rounds.
fn compare(title: &str, zstd: &mut dyn FnMut(), trial: &mut dyn FnMut(), entropy: &mut dyn FnMut()) {
    const ROUNDS: usize = 31;
    let time = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    let mut ratios = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        let [zstd, trial, entropy] = [time(zstd), time(trial), time(entropy)];
        ratios[0].push(trial / zstd);
        ratios[1].push(trial / entropy);
    }
    for list in &mut ratios {
        list.sort_by(f64::total_cmp);
    }
    let [slower, faster] = ratios.map(|list| list[ROUNDS / 2]);
    println!("{title}: trial takes {slower:.2} times zstd alone, and {faster:.1} times entropy");
}

fn bench(criterion: &mut Criterion) {
    let tensors = tensors();
    let original: usize = tensors.iter().map(|(_, _, bytes)| bytes.len()).sum();
    for (level, bitshuffle) in [(3, false), (1, false), (3, true)] {
        let title = format!("level {level}{}", if bitshuffle { ", bitshuffle" } else { "" });
        let config = |choice| Config { choice, level, bitshuffle, ..Config::default() };
        let frames = trial_frames(&config(Choice::Trial), &tensors);
        let mut zstd = Compressor::new(level).expect("a context");
        let mut out = Vec::with_capacity(zstd::compress_bound(frames.iter().map(Vec::len).max().unwrap_or(0)));
        let mut zstd_alone = || {
            for data in &frames {
                out.clear();
                zstd.compress_to_buffer(black_box(&data[..]), &mut out).expect("a frame");
            }
        };
        let [mut trial, mut entropy] = [Choice::Trial, Choice::Entropy].map(|choice| {
            let (mut encoder, mut out, tensors) = (Encoder::new(config(choice)), Vec::new(), &tensors);
            let mut encode = move || {
                out.clear();
                for (role, shape, bytes) in black_box(tensors) {
                    let chunk = Chunk::new(*shape, DType::F16, bytes).expect("a tensor");
                    encoder.encode(chunk, *role, &mut out).expect("encoded");
                }
                out.len()
            };
            println!("{title}, {choice:?}: {original} bytes become {}", encode());
            move || {
                encode();
            }
        });
        compare(&title, &mut zstd_alone, &mut trial, &mut entropy);
        let mut group = criterion.benchmark_group(&title);
        group.throughput(Throughput::Bytes(original as u64));
        group.bench_function("zstd alone, frames of trial", |b| b.iter(&mut zstd_alone));
        group.bench_function("trial", |b| b.iter(&mut trial));
        group.bench_function("entropy", |b| b.iter(&mut entropy));
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
