//! What the tests share: the model, texts, caches.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use gearbox_core::{DType, Pipeline, PipelineSpec, Registry};
use gearbox_model::{CacheOptions, Model};
use gearbox_plugins as _;

/// Goldens and texts that are not part of the repository, where they lie beside it.
pub fn shared() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let path = std::env::var_os("GEARBOX_SHARED").map_or(beside, PathBuf::from);
    let found = path.join("golden").is_dir().then_some(path);
    if found.is_none() {
        eprintln!("skipped: neither ../shared nor GEARBOX_SHARED holds the reference's outputs");
    }
    found
}

/// The bundled model.
pub fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| Model::bundled().unwrap())
}

/// Token ids of a text that is in the workspace: its own licence.
pub fn text(tokens: usize) -> Vec<u32> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../LICENSE-APACHE");
    let ids = model().tokenizer().encode_part(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(ids.len() >= tokens, "{} tokens", ids.len());
    ids[..tokens].to_vec()
}

/// A cache without a pipeline.
pub fn dense(dtype: DType) -> CacheOptions {
    CacheOptions { dtype, ..CacheOptions::default() }
}

/// A pipeline of built-in plugins.
pub fn pipeline(json: &str) -> Pipeline {
    Pipeline::build(&PipelineSpec::from_json(json).unwrap(), &Registry::built_in().unwrap()).unwrap()
}

/// Whether all floats are the same bit for bit.
pub fn same_bits(left: &[f32], right: &[f32]) -> bool {
    left.len() == right.len() && left.iter().zip(right).all(|(left, right)| left.to_bits() == right.to_bits())
}
