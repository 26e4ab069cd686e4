//! Logits, greedy decoding and losses beside those of transformers.

use std::fs;

use gearbox_core::DType;
use gearbox_model::{CacheOptions, Step};
use serde_json::Value;

use crate::run::{dense, model, shared};

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn logits_are_those_of_transformers() {
    let Some(shared) = shared() else { return };
    let golden = shared.join("golden/model");
    let tokens = ids(&serde_json::from_slice(&fs::read(golden.join("tokens_128.json")).unwrap()).unwrap());
    let bytes = fs::read(golden.join("logits_128x4096_f32.bin")).unwrap();
    let expected: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    for block in [256, 128, 48, 1] {
        let mut cache = model().cache(&CacheOptions { block, ..dense(DType::F32) }).unwrap();
        let logits = model().forward(&mut cache, &tokens, Step::all()).unwrap();
        assert_eq!(logits.len(), expected.len());
        let worst = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("blocks of {block}: {worst}");
        assert!(worst <= 1e-3, "blocks of {block}: {worst}");
    }
}

#[test]
fn greedy_decoding_is_that_of_transformers() {
    let Some(shared) = shared() else { return };
    let golden = fs::read(shared.join("golden/model/greedy_64_64.json")).unwrap();
    let golden = ids(&serde_json::from_slice(&golden).unwrap());
    let mut cache = model().cache(&dense(DType::F32)).unwrap();
    let text = model().greedy(&mut cache, &golden[..64], 64, &[]).unwrap();
    assert_eq!(text, golden[64..]);
}

#[test]
fn losses_are_those_of_transformers() {
    let Some(shared) = shared() else { return };
    let golden = fs::read(shared.join("golden/model/loss_first_8_windows_of_1024.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    for (name, expected) in golden.as_object().unwrap() {
        let text = fs::read_to_string(shared.join("data/text").join(name)).unwrap();
        let ids = model().tokenizer().encode_part(&text).unwrap();
        let mut sum = 0.0;
        for window in 0..8 {
            let mut cache = model().cache(&dense(DType::F32)).unwrap();
            let scored = model().log_probs(&mut cache, &ids[1024 * window..][..1025]).unwrap();
            assert_eq!(scored.len(), 1024);
            sum -= scored.iter().sum::<f64>();
        }
        let (loss, expected) = (sum / 8192.0, expected.as_f64().unwrap());
        println!("{name}: {loss}, expected {expected}");
        assert!((loss - expected).abs() <= 1e-4, "{name}: {loss}, expected {expected}");
    }
}
