//! Model folders: shards, element types, families, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use gearbox_core::DType;
use gearbox_model::{Model, Step};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::run::{dense, model, same_bits, text};

/// Tensors by name: type, shape and bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn bundled() -> (Value, Tensors) {
    let folder = gearbox_model::bundled().unwrap();
    let config = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors =
        file.iter().map(|(name, view)| (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec())));
    (config, tensors.collect())
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn folder(config: &Value, tensors: &Tensors) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let tokenizer = gearbox_model::bundled().unwrap().join("tokenizer.json");
    fs::copy(tokenizer, folder.path().join("tokenizer.json")).unwrap();
    write(&folder.path().join("model.safetensors"), tensors);
    folder
}

fn logits(model: &Model) -> Vec<f32> {
    let mut cache = model.cache(&dense(DType::F32)).unwrap();
    model.forward(&mut cache, &text(50), Step::all()).unwrap()
}

fn halves(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(2).map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32())
}

#[test]
fn shards_and_wider_types_load_alike() {
    let (config, mut tensors) = bundled();
    let expected = logits(model());
    for (dtype, _, bytes) in tensors.values_mut() {
        *bytes = halves(bytes).flat_map(f32::to_le_bytes).collect();
        *dtype = Dtype::F32;
    }
    let wide = folder(&config, &tensors);
    assert!(same_bits(&logits(&Model::load(wide.path()).unwrap()), &expected));

    let path = wide.path();
    let second = tensors.split_off("model.layers.3");
    let names = |tensors: &Tensors, file: &str| -> BTreeMap<String, String> {
        tensors.keys().map(|name| (name.clone(), file.to_owned())).collect()
    };
    let mut map = names(&tensors, "a.safetensors");
    map.extend(names(&second, "b.safetensors"));
    write(&path.join("a.safetensors"), &tensors);
    write(&path.join("b.safetensors"), &second);
    fs::remove_file(path.join("model.safetensors")).unwrap();
    let index = path.join("model.safetensors.index.json");
    fs::write(&index, json!({ "metadata": {}, "weight_map": map }).to_string()).unwrap();
    assert!(same_bits(&logits(&Model::load(path).unwrap()), &expected));

    map.insert("model.layers.9.x".into(), "b.safetensors".into());
    fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    assert!(
        Model::load(path).unwrap_err().to_string().ends_with("tensor `model.layers.9.x` is not in `b.safetensors`")
    );
    map.insert("model.layers.9.x".into(), "../b.safetensors".into());
    fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    assert!(Model::load(path).unwrap_err().to_string().contains("got `../b.safetensors`"));
}

#[test]
fn families_compute_what_their_biases_and_heads_say() {
    let (config, mut tensors) = bundled();
    let expected = logits(model());
    let zeros = |len: usize| (Dtype::BF16, vec![len], bf16::ZERO.to_le_bytes().repeat(len));
    for layer in 0..6 {
        for (name, len) in [("q", 256), ("k", 128), ("v", 128)] {
            tensors.insert(format!("model.layers.{layer}.self_attn.{name}_proj.bias"), zeros(len));
        }
    }
    let head = tensors["model.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".into(), head);
    let mut qwen = config.clone();
    qwen["model_type"] = "qwen2".into();
    qwen["tie_word_embeddings"] = false.into();
    let qwen_folder = folder(&qwen, &tensors);
    assert!(same_bits(&logits(&Model::load(qwen_folder.path()).unwrap()), &expected));
    // A bias of the keys turns every score of a query by the same amount only before rotation; one of the values shows directly.
    let one = (Dtype::BF16, vec![128], bf16::ONE.to_le_bytes().repeat(128));
    tensors.insert("model.layers.5.self_attn.v_proj.bias".into(), one);
    assert!(!same_bits(&logits(&Model::load(folder(&qwen, &tensors).path()).unwrap()), &expected));
    // A window that is longer than the text changes nothing, a short one does.
    let (_, tensors) = bundled();
    for (window, same) in [(60, true), (8, false)] {
        let mut mistral = config.clone();
        mistral["model_type"] = "mistral".into();
        mistral["sliding_window"] = window.into();
        let loaded = Model::load(folder(&mistral, &tensors).path()).unwrap();
        assert_eq!(same_bits(&logits(&loaded), &expected), same, "window of {window}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let (config, tensors) = bundled();
    let message = |config: &Value, tensors: &Tensors| {
        let folder = folder(config, tensors);
        let message = Model::load(folder.path()).unwrap_err().to_string();
        message.replace(&folder.path().display().to_string(), "DIR")
    };
    let name = "model.layers.2.mlp.up_proj.weight";
    let mut missing = tensors.clone();
    let taken = missing.remove(name).unwrap();
    assert_eq!(
        message(&config, &missing),
        format!("weights in `DIR`: expected tensor `{name}` of shape [512, 192], got none")
    );
    missing.insert(name.into(), (taken.0, vec![192, 512], taken.2));
    assert_eq!(
        message(&config, &missing),
        format!("weights in `DIR`: tensor `{name}`: expected shape [512, 192], got [192, 512]")
    );
    let mut more = tensors.clone();
    more.insert("model.layers.0.self_attn.q_norm.weight".into(), (Dtype::F16, vec![1], vec![0, 0]));
    assert_eq!(
        message(&config, &more),
        "weights in `DIR`: tensor `model.layers.0.self_attn.q_norm.weight` is not part of the model that `config.json` describes"
    );
    more.insert("model.norm.weight".into(), (Dtype::I32, vec![1], vec![0; 4]));
    assert!(message(&config, &more).ends_with("tensor `model.norm.weight`: expected F16, BF16 or F32, got I32"));
    let mut small = config.clone();
    small["vocab_size"] = 4000.into();
    assert_eq!(
        message(&small, &tensors),
        "`DIR/tokenizer.json`: expected at most the 4000 tokens of the model's `vocab_size`, got 4096"
    );
}
