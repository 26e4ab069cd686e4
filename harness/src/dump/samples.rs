//! Small dumps for the tests of this module.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::meta::Meta;
use super::{Dump, Selection};

/// An entry of three tokens, two heads and four channels in F16, as the reference engine writes it, to be changed before it is written.
pub(super) struct Sample {
    root: PathBuf,
    pub meta: Meta,
    pub key: Vec<u8>,
    pub value: Vec<u8>,
    pub query: Option<Vec<u8>>,
    range: String,
}

impl Sample {
    pub fn new(root: &Path) -> Self {
        let mut meta = Meta::default();
        for (key, value) in [
            ("layer_id", Value::from(0)),
            ("seq_start", 0.into()),
            ("seq_len", 3.into()),
            ("seq_end_exclusive", 3.into()),
            ("kv_heads", 2.into()),
            ("head_dim", 4.into()),
            ("bytes_per_elem", 2.into()),
            ("dtype", "fp16".into()),
            ("add", 3.into()),
            ("tensor_seq_len", 3.into()),
            ("quant_key", false.into()),
            ("quant_value", false.into()),
            ("flash_attention", false.into()),
            ("stage", "prefill".into()),
            ("run_id", "sample".into()),
            ("k_file", "k_t0_3.bin".into()),
            ("v_file", "v_t0_3.bin".into()),
        ] {
            meta.set(key, value);
        }
        let mut sample =
            Self { root: root.to_path_buf(), meta, key: vec![], value: vec![], query: None, range: String::new() };
        sample.range(0, 3);
        sample
    }

    /// Changes a key, `seq_start` together with the end.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.meta.set(key, value);
        if key == "seq_start" {
            self.meta.set("seq_end_exclusive", Value::Null);
        }
    }

    /// Moves the entry, with new file names and tensors of the right size.
    pub fn range(&mut self, start: u64, seq: usize) {
        let end = start + seq as u64;
        self.range = format!("t{start}_{end}");
        self.meta.set("seq_start", start);
        self.meta.set("seq_len", seq);
        self.meta.set("seq_end_exclusive", end);
        self.meta.set("add", seq);
        self.meta.set("k_file", format!("k_{}.bin", self.range));
        self.meta.set("v_file", format!("v_{}.bin", self.range));
        let words = |first: u16| (0..seq as u16 * 8).flat_map(move |i| (first + i).to_le_bytes()).collect();
        self.key = words(0x3c00);
        self.value = words(0x3400);
    }

    /// Turns the tensors into F32 with these values at the beginning.
    pub fn f32(&mut self, values: &[f32]) {
        self.meta.set("bytes_per_elem", 4);
        self.meta.set("dtype", "fp32");
        for tensor in [&mut self.key, &mut self.value] {
            let count = tensor.len() / 2;
            let all = values.iter().copied().chain((0..).map(|i| 0.1 * i as f32)).take(count);
            *tensor = all.flat_map(f32::to_le_bytes).collect();
        }
    }

    /// Adds queries of four heads and token ids.
    pub fn extend(&mut self) {
        let seq = self.meta.get("seq_len").and_then(Value::as_u64).unwrap();
        self.meta.set("q_file", format!("q_{}.bin", self.range));
        self.meta.set("q_heads", 4);
        self.meta.set("tokens", (0..seq).map(|i| 100 + i).collect::<Vec<_>>());
        self.query = Some([self.key.as_slice(), &self.value].concat());
    }

    pub fn layer_dir(&self) -> PathBuf {
        let layer = self.meta.get("layer_id").and_then(Value::as_u64).unwrap_or_default();
        self.root.join(format!("sample/layer_{layer}"))
    }

    pub fn meta_path(&self) -> PathBuf {
        self.layer_dir().join(format!("meta_{}.json", self.range))
    }

    pub fn write(&self) {
        let folder = self.layer_dir();
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("k_{}.bin", self.range)), &self.key).unwrap();
        fs::write(folder.join(format!("v_{}.bin", self.range)), &self.value).unwrap();
        if let Some(query) = &self.query {
            fs::write(folder.join(format!("q_{}.bin", self.range)), query).unwrap();
        }
        fs::write(self.meta_path(), self.meta.to_bytes()).unwrap();
    }
}

/// Opens everything below a folder.
pub(super) fn open(root: &Path) -> Dump {
    Dump::open(root, &Selection::default()).unwrap()
}
