//! The cache of tensors beside the one that attends by itself.

use gearbox_core::{Chunk, ErrorKind};

use super::*;

fn cache(options: &CacheOptions, tokens: bool) -> TensorCache {
    let rope = Some(config().rope);
    let model = TensorCacheSpec { layers: 1, q_heads: Some(Q_HEADS), kv_heads: KV_HEADS, dim: DIM, rope, tokens };
    TensorCache::new(&model, options).unwrap()
}

/// Appends what came to the other cache last.
fn append(cache: &mut TensorCache, pair: &Pair, tokens: usize) {
    let bytes = [&pair.keys, &pair.values].map(|all| {
        let mut bytes = Vec::new();
        narrow(pair.dtype, &all[all.len() - tokens * KV_HEADS * DIM..], &mut bytes).unwrap();
        bytes
    });
    let chunk = |role: usize| Chunk::new(gearbox_core::Shape::new(tokens, KV_HEADS, DIM), pair.dtype, &bytes[role]);
    let seen = cache.seen(0);
    cache.append(0, chunk(0).unwrap(), chunk(1).unwrap(), Some(&ids(seen..seen + tokens))).unwrap();
}

#[test]
fn shown_attention_evicts_what_the_attending_cache_evicts() {
    let budget = |id: &str| json!({ "id": id, "budget_tokens": 24, "sinks": 2, "min_tokens": 24, "margin_tokens": 5 });
    let policies = ["h2o", "snapkv", "tova", "window", "random"].map(budget);
    for evict in [&policies[..], &[thin(3, true)]].concat() {
        for codec in ["planes", "test-around"] {
            let dtype = if codec == "planes" { DType::F16 } else { DType::F32 };
            let pipeline = coded(&json!({ "id": codec }), Some(evict.clone()));
            let mut pair = Pair::new(Some(pipeline.clone()), dtype, None);
            let mut shown = cache(&options(Some(pipeline), dtype), true);
            for tokens in [23, 17, 1, 1, 30, 1, 1, 1, 1, 1, 1, 1] {
                pair.step(tokens);
                append(&mut shown, &pair, tokens);
                // In two blocks.
                let row = pair.probabilities.len() / tokens;
                let (first, second) = pair.probabilities.split_at(tokens / 2 * row);
                for block in [first, second] {
                    if !block.is_empty() {
                        shown.observe(0, block.len() / row, block).unwrap();
                    }
                }
                assert_eq!(shown.live(0).unwrap(), pair.live(), "{evict}");
            }
            assert!(shown.len(0) < 30 && shown.seen(0) == pair.cache.seen(), "{evict}");
            let (ledger, expected) = (shown.ledger().layers[0], pair.cache.ledger().layers[0]);
            assert_eq!((ledger.seen, ledger.live, ledger.chunks), (expected.seen, expected.live, expected.chunks));
            let held = |bytes: LayerBytes| [bytes.payload, bytes.headers, bytes.tail, bytes.positions];
            assert_eq!(held(ledger.bytes), held(expected.bytes), "{evict}");
            assert!(ledger.bytes.positions > 0);
            assert_eq!((ledger.usage.dense, shown.ledger().usage.dense), (expected.usage.dense, expected.usage.dense));
            let room = shown.len(0) * KV_HEADS * DIM * dtype.size();
            let (mut keys, mut values) = (vec![0; room], vec![0; room]);
            shown.read(0, &mut keys, &mut values).unwrap();
            let layer = &mut pair.cache.layers[0];
            layer.decode(&pair.cache.spec, &pair.cache.ids, &mut pair.cache.decoded).unwrap();
            for (got, (decoded, tail)) in [keys, values].into_iter().zip(pair.cache.decoded.iter().zip(&layer.tail)) {
                assert_eq!(got, [&decoded[..], tail].concat(), "{evict}");
            }
        }
    }
}

#[test]
fn attention_is_due_before_the_next_tokens() {
    let options = options(Some(coded(&json!({ "id": "store" }), Some(thin(0, false)))), DType::F16);
    let mut shown = cache(&options, false);
    let bytes = vec![0; 30 * KV_HEADS * DIM * 2];
    let tokens = Chunk::new(gearbox_core::Shape::new(30, KV_HEADS, DIM), DType::F16, &bytes).unwrap();
    shown.append(0, tokens, tokens, None).unwrap();
    let error = shown.append(0, tokens, tokens, None).unwrap_err();
    assert_eq!(error.to_string(), "layer 0: expected the attention of the last 30 tokens before new ones");
    let even = vec![1.0 / 30.0; 31 * Q_HEADS * 30];
    let error = shown.observe(0, 31, &even).unwrap_err();
    let message = "layer 0: expected probabilities of (30 queries at most, 6, 30), got 5580 of 31 queries";
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::ShapeMismatch, message.to_owned()));
    assert!(shown.observe(0, 29, &even[1..29 * Q_HEADS * 30]).is_err());
    shown.observe(0, 29, &even[..29 * Q_HEADS * 30]).unwrap();
    assert_eq!(shown.len(0), 30, "one query is missing");
    shown.observe(0, 1, &even[..Q_HEADS * 30]).unwrap();
    assert_eq!((shown.len(0), shown.seen(0), shown.evicts(0)), (23, 30, true));
    shown.append(0, tokens, tokens, None).unwrap();
    shown.reset().unwrap();
    assert_eq!((shown.len(0), shown.seen(0), shown.live(0).unwrap()), (0, 0, Vec::new()));
    shown.append(0, tokens, tokens, None).unwrap();
}

#[test]
fn query_heads_are_shared_evenly() {
    let model = TensorCacheSpec { layers: 1, q_heads: Some(5), kv_heads: 2, dim: 4, ..TensorCacheSpec::default() };
    let error = TensorCache::new(&model, &CacheOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "`q_heads`: expected a multiple of 2 KV heads, got 5");
}
