//! The cache in the model: identity, requests, ledger, timings.

use std::process::Command;

use gearbox_core::{Chunking, DType, PipelineSpec, PluginSpec};
use gearbox_model::{CacheOptions, Step};
use serde_json::json;

use crate::run::{dense, model, pipeline, same_bits, text};

/// Logits of a prompt and of steps after it, one by one.
fn logits(options: &CacheOptions, ids: &[u32], prompt: usize) -> Vec<f32> {
    let mut cache = model().cache(options).unwrap();
    let mut logits = model().forward(&mut cache, &ids[..prompt], Step::all()).unwrap();
    for id in &ids[prompt..] {
        logits.extend(model().forward(&mut cache, &[*id], Step::last()).unwrap());
    }
    logits
}

fn coded(dtype: DType, json: &str) -> CacheOptions {
    CacheOptions { dtype, pipeline: Some(pipeline(json).into()), residual: 16, chunk: Some(32), block: 100 }
}

#[test]
fn lossless_pipelines_change_no_bit() {
    let ids = text(300);
    let expected = DType::ALL.map(|dtype| logits(&CacheOptions { block: 100, ..dense(dtype) }, &ids, 270));
    let check = |dtype: DType, json: String| {
        let options = coded(dtype, &json);
        assert!(options.pipeline.as_ref().unwrap().is_lossless());
        let mut cache = model().cache(&options).unwrap();
        model().forward(&mut cache, &ids, Step::silent()).unwrap();
        assert_eq!(cache.ledger().layers[5].chunks, 2 * 8, "8 of 32 tokens are older than the 16 newest of 300");
        assert!(same_bits(&logits(&options, &ids, 270), &expected[dtype as usize]), "{dtype}: {json}");
    };
    for codec in ["store", "zstd", "lz4", "pcodec", "gear", "gear-delta", "rans", "planes", "adaptive-v22"] {
        check(DType::F16, PipelineSpec::of_codec(PluginSpec::new(codec), Chunking::PerEntry).to_value().to_string());
    }
    for dtype in [DType::Bf16, DType::F32] {
        check(dtype, json!({ "routes": [{ "codec": { "id": "planes" } }] }).to_string());
    }
    // Token ids, rotations and earlier tokens; codecs that differ by layer and role.
    let mixed = json!({ "routes": [
        { "layers": "0..2", "transforms": [{ "id": "token-ref" }], "codec": { "rows": { "id": "planes" }, "*": { "id": "zstd" } } },
        { "layers": "2..", "key": { "codec": { "id": "huffman", "codebook": "per-dump" } }, "value": { "codec": { "id": "planes" } } }
    ] });
    check(DType::F16, mixed.to_string());
}

#[test]
fn lossy_pipelines_stay_near_and_are_smaller() {
    let ids = text(400);
    let loss = |options: &CacheOptions| {
        let mut cache = model().cache(&CacheOptions { block: 1, ..options.clone() }).unwrap();
        let scored = model().log_probs(&mut cache, &ids).unwrap();
        (-scored.iter().sum::<f64>() / scored.len() as f64, cache.ledger().usage)
    };
    let (expected, full) = loss(&dense(DType::F16));
    let quant = |bits: u32| {
        let route = json!({ "transforms": [{ "id": "quant", "bits": bits }], "codec": { "id": "zstd" } });
        loss(&coded(DType::F16, &json!({ "routes": [route] }).to_string()))
    };
    let (eight, small) = quant(8);
    assert!((eight - expected).abs() < 0.01, "8 bits: {eight}, dense {expected}");
    assert!(small.ratio() > 1.3 * full.ratio(), "{small:?}");
    let (two, _) = quant(2);
    assert!((two - expected).abs() > (eight - expected).abs(), "2 bits: {two}, 8 bits: {eight}, dense {expected}");
}

/// Run by other tests in processes of their own: prints the logits' digest.
#[test]
fn in_another_process() {
    if std::env::var_os("GEARBOX_MODEL_DIGEST").is_some() {
        println!("digest {:016x}", digest());
    }
}

fn digest() -> u64 {
    let json = json!({ "routes": [{ "codec": { "id": "zstd" } }] }).to_string();
    let bits = logits(&coded(DType::F16, &json), &text(200), 180).into_iter().map(f32::to_bits);
    // FNV-1a.
    bits.fold(0xcbf2_9ce4_8422_2325, |hash, bits| (hash ^ u64::from(bits)).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn a_second_request_gives_the_bits_of_a_fresh_process_at_any_thread_count() {
    let mut other = model().cache(&dense(DType::F16)).unwrap();
    model().greedy(&mut other, &text(60), 20, &[]).unwrap();
    let expected = format!("digest {:016x}", digest());
    drop(other);
    for threads in ["1", "2", "3"] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "cache::in_another_process", "--nocapture"])
            .env("GEARBOX_MODEL_DIGEST", "1")
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(printed.contains(&expected), "{threads} threads: expected {expected}, got {printed}");
    }
}

#[test]
fn the_ledger_counts_every_byte() {
    let ids = text(500);
    let mut plain = model().cache(&dense(DType::F16)).unwrap();
    model().forward(&mut plain, &ids, Step::silent()).unwrap();
    let ledger = plain.ledger();
    // Keys and values, 2 heads of 64 channels, 2 bytes each.
    let dense_bytes = 500 * 2 * 2 * 64 * 2;
    for layer in &ledger.layers {
        assert_eq!((layer.seen, layer.live, layer.chunks), (500, 500, 0));
        assert_eq!((layer.bytes.tail, layer.usage.dense), (dense_bytes, dense_bytes));
        assert_eq!((layer.bytes.payload, layer.bytes.headers, layer.bytes.positions), (0, 0, 0));
        assert!(layer.bytes.slack <= dense_bytes / 8, "{:?}", layer.bytes);
        assert_eq!(layer.usage.now, layer.bytes.total());
    }
    assert_eq!(ledger.usage.now, ledger.layers.iter().map(|layer| layer.usage.now).sum::<u64>());
    assert_eq!((ledger.usage.dense, ledger.artifacts, ledger.token_ids), (6 * dense_bytes, 0, 0));
    assert_eq!(ledger.usage.peak, ledger.usage.now);
    // Blocks of 256 and 244 tokens.
    let mean = 6.0 * (dense_bytes as f64 * 256.0 / 500.0 + dense_bytes as f64) / 2.0;
    assert!((ledger.usage.dense_average - mean).abs() < 1.0, "{ledger:?}");

    let json = json!({ "routes": [{ "codec": { "id": "planes" } }] }).to_string();
    let mut coded =
        model().cache(&CacheOptions { pipeline: Some(pipeline(&json).into()), ..dense(DType::F16) }).unwrap();
    model().forward(&mut coded, &ids, Step::silent()).unwrap();
    let ledger = coded.ledger();
    for layer in &ledger.layers {
        let bytes = layer.bytes;
        assert_eq!(layer.chunks, 2 * 3, "3 chunks of 128 tokens, 116 raw ones");
        assert_eq!(bytes.tail, dense_bytes * 116 / 500);
        assert!(bytes.payload < dense_bytes * 384 / 500 && bytes.headers > 0, "{bytes:?}");
        assert!(layer.usage.peak > layer.usage.now, "{layer:?}");
        let coded = layer.coded;
        assert_eq!((coded.chunks, coded.raw_chunks, coded.raw_bytes), (6, 0, dense_bytes * 384 / 500));
        assert_eq!(coded.stored_bytes, bytes.payload + bytes.headers);
        // The second block read the first chunk.
        assert_eq!(coded.decoded_bytes, dense_bytes * 128 / 500);
        assert!(coded.encode_ns > 0 && coded.decode_ns > 0);
    }
    assert!(ledger.usage.ratio() > 1.1 && ledger.usage.peak < plain.ledger().usage.peak, "{ledger:?}");
}

#[test]
fn timings_add_up() {
    let json = json!({ "routes": [{ "codec": { "id": "zstd" } }] }).to_string();
    let mut cache = model().cache(&coded(DType::F16, &json)).unwrap();
    let start = std::time::Instant::now();
    model().greedy(&mut cache, &text(150), 10, &[]).unwrap();
    let wall = start.elapsed().as_nanos() as u64;
    let timings = cache.timings();
    assert_eq!(timings.steps, 2 + 9);
    assert_eq!((timings.score_ns, timings.plan_ns), (0, 0));
    assert!(timings.encode_ns > 0 && timings.decode_ns > 0 && timings.attention_ns > 0 && timings.rest_ns > 0);
    assert!(timings.total_ns() <= wall && timings.total_ns() > wall / 2, "{timings:?} of {wall} ns");
}

#[test]
fn probes_see_what_the_cache_stores() {
    let ids = text(40);
    let mut seen = Vec::new();
    let mut probe = |step: gearbox_model::LayerStep<'_>| {
        assert_eq!((step.key.len(), step.value.len()), (step.tokens * 128, step.tokens * 128));
        assert_eq!(step.query.len(), step.tokens * 256);
        seen.push((step.layer, step.first_token, step.tokens));
        Ok(())
    };
    let mut cache = model().cache(&CacheOptions { block: 30, ..CacheOptions::default() }).unwrap();
    model().forward(&mut cache, &ids, Step::silent().probe(&mut probe)).unwrap();
    let expected =
        [(0, 30), (30, 10)].into_iter().flat_map(|(first, tokens)| (0..6).map(move |layer| (layer, first, tokens)));
    assert_eq!(seen, expected.collect::<Vec<_>>());
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is_changed() {
    let mut cache = model().cache(&CacheOptions::default()).unwrap();
    let ids = text(10);
    model().forward(&mut cache, &ids, Step::silent()).unwrap();
    let mut message = |ids: &[u32]| model().forward(&mut cache, ids, Step::silent()).unwrap_err().to_string();
    assert_eq!(message(&[]), "expected at least one token, got none");
    assert_eq!(message(&[1, 4096]), "expected token ids below 4096, got 4096");
    assert_eq!(message(&[1; 2039]), "2039 tokens after 10: expected at most 2048 in all, the context of the model");
    assert_eq!(cache.tokens(), ids);
    model().forward(&mut cache, &[1; 2038], Step::silent()).unwrap();

    let front = pipeline(&json!({ "routes": [{ "layers": "0..3", "codec": { "id": "zstd" } }] }).to_string());
    let error = model().cache(&CacheOptions { pipeline: Some(front.into()), ..CacheOptions::default() }).unwrap_err();
    assert_eq!(error.to_string(), "no route holds layer 3, routes are 0..3");
    let error = model().cache(&CacheOptions { block: 0, ..CacheOptions::default() }).unwrap_err();
    assert_eq!(error.to_string(), "`block`: expected at least 1 token, got 0");
}

#[test]
fn a_cache_that_failed_is_of_no_more_use() {
    // Which lanes a transform writes is known when it runs.
    let json = json!({ "routes": [{ "transforms": [{ "id": "quant" }], "codec": { "codes": { "id": "zstd" } } }] });
    let mut cache = model().cache(&coded(DType::F16, &json.to_string())).unwrap();
    let error = model().forward(&mut cache, &text(100), Step::silent()).unwrap_err().to_string();
    assert!(error.starts_with("layer 0: key, slots 0..32: no codec for lane"), "{error}");
    let error = model().forward(&mut cache, &text(1), Step::silent()).unwrap_err();
    assert_eq!(error.to_string(), "the cache failed in an earlier step, expected a new one");
}

#[test]
fn trained_models_are_counted_and_change_no_bit() {
    let json = json!({ "routes": [{ "codec": { "id": "huffman", "codebook": "global" } }] }).to_string();
    let ids = text(300);
    let expected = logits(&CacheOptions { block: 100, ..dense(DType::F16) }, &ids, 290);
    let mut learned = pipeline(&json);
    model().train(&mut learned, DType::F16, &ids).unwrap();
    let options = CacheOptions { pipeline: Some(learned.into()), ..coded(DType::F16, &json) };
    assert!(same_bits(&logits(&options, &ids, 290), &expected));
    let held = |options: &CacheOptions| {
        let mut cache = model().cache(options).unwrap();
        model().forward(&mut cache, &ids, Step::silent()).unwrap();
        let ledger = cache.ledger();
        (ledger.artifacts, ledger.layers.iter().map(|layer| layer.bytes.payload).sum::<u64>())
    };
    let (artifacts, trained) = held(&options);
    let (none, alone) = held(&coded(DType::F16, &json));
    assert!(artifacts > 0 && none == 0 && trained < alone, "{artifacts}, {trained}, {alone}");
}
