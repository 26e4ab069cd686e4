//! Dataset A through all three steps, and what happens to folders that hold something already.

use std::fs;
use std::path::Path;

use gearbox_conformance::reference::dataset_a;
use gearbox_core::{ErrorKind, Result};
use gearbox_plugins::bitstream::reference::{Arithmetic, Huffman};
use serde_json::json;

use super::folder::Encoded;
use super::*;
use crate::dump::{Dump, Selection};
use crate::exp::samples::parse;
use crate::status::Status;

/// Writes dataset A with no more meta fields than the specification names.
fn write_dataset_a(root: &Path) {
    for entry in dataset_a() {
        let folder = root.join(entry.run).join(format!("layer_{}", entry.layer));
        fs::create_dir_all(&folder).unwrap();
        let name = format!("t{}_{}", entry.start, entry.start + entry.shape.seq as u64);
        let mut meta = Object::default();
        meta.set("layer_id", u64::from(entry.layer));
        meta.set("seq_start", entry.start);
        meta.set("seq_len", entry.shape.seq as u64);
        meta.set("kv_heads", entry.shape.heads as u64);
        meta.set("head_dim", entry.shape.dim as u64);
        meta.set("bytes_per_elem", 2_u64);
        meta.set("stage", entry.stage.name());
        meta.set("run_id", entry.run);
        meta.set("k_file", format!("k_{name}.bin").as_str());
        meta.set("v_file", format!("v_{name}.bin").as_str());
        fs::write(folder.join(format!("k_{name}.bin")), &entry.key).unwrap();
        fs::write(folder.join(format!("v_{name}.bin")), &entry.value).unwrap();
        fs::write(folder.join(format!("meta_{name}.json")), meta.to_bytes()).unwrap();
    }
}

/// A dump and a folder for what is made of it.
struct Work {
    folder: tempfile::TempDir,
}

impl Work {
    fn new() -> Self {
        let work = Self { folder: tempfile::tempdir().unwrap() };
        write_dataset_a(&work.path("dump"));
        work
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn encode<C: Coder>(&self, more: &[&str]) -> Result<Status> {
        let (dump, out) = (self.text("dump"), self.text("out"));
        parse::<EncodeArgs>(&[&["--dump-dir", &dump, "--out-dir", &out], more].concat()).unwrap().run::<C>(true)
    }

    fn decode<C: Coder>(&self, more: &[&str]) -> Result<Status> {
        let (dump, out) = (self.text("dump"), self.text("out"));
        let flags = ["--orig-dump-dir", &dump, "--bitstream-dir", &out, "--verify"];
        parse::<DecodeArgs>(&[&flags, more].concat()).unwrap().run::<C>(true)
    }

    fn analyze<C: Coder>(&self, more: &[&str]) -> Result<Status> {
        let (dump, out, results) = (self.text("dump"), self.text("out"), self.text("results"));
        let flags = ["--orig-dump-dir", &dump, "--bitstream-dir", &out, "--out-dir", &results, "--overwrite"];
        parse::<AnalyzeArgs>(&[&flags, more].concat()).unwrap().run::<C>(true)
    }

    /// The ratios of the summary: K, V and both.
    fn ratios<C: Coder>(&self, more: &[&str]) -> [String; 3] {
        assert_eq!(self.analyze::<C>(more).unwrap(), Status::Pass);
        let summary = fs::read_to_string(self.path("results").join(format!("{}_summary.md", C::RESULTS))).unwrap();
        ["K", "V", "KV"].map(|name| {
            let label = format!("- Weighted {name} ratio: ");
            summary.lines().find_map(|line| line.strip_prefix(&label)).unwrap().to_owned()
        })
    }

    fn len(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap().len()
    }
}

#[test]
fn sizes_of_dataset_a_are_those_of_the_reference() {
    let work = Work::new();
    work.encode::<Huffman>(&[]).unwrap();
    work.encode::<Arithmetic>(&[]).unwrap();
    assert_eq!((work.len("out/global_codebook.json"), work.len("out/global_codebook_arith.json")), (17_199, 16_421));
    let first = "out/runA/layer_0";
    assert_eq!(work.len(&format!("{first}/bitstream_meta_t0_150.json")), 464);
    assert_eq!(work.len(&format!("{first}/arith_meta_t0_150.json")), 454);
    assert_eq!(work.len(&format!("{first}/k_hi6_meta_t0_150.huff")), 2527);
    assert_eq!(work.len(&format!("{first}/v_lo10_meta_t150_151.ac")), 41);
    assert_eq!(work.decode::<Huffman>(&[]).unwrap(), Status::Pass);
    assert_eq!(work.decode::<Arithmetic>(&[]).unwrap(), Status::Pass);
    assert_eq!(work.ratios::<Huffman>(&[]), ["1.129", "1.183", "1.155"]);
    assert_eq!(work.ratios::<Huffman>(&["--include-meta"])[2], "0.714");
    assert_eq!(work.ratios::<Arithmetic>(&[]), ["1.132", "1.188", "1.159"]);
    assert_eq!(work.ratios::<Arithmetic>(&["--include-meta"])[2], "0.727");

    let work = Work::new();
    let per_dump = ["--codebook", "per-dump"];
    work.encode::<Huffman>(&per_dump).unwrap();
    work.encode::<Arithmetic>(&per_dump).unwrap();
    assert!(!work.path("out/global_codebook.json").exists());
    assert_eq!(work.len(&format!("{first}/bitstream_meta_t0_150.json")), 17_487);
    assert_eq!(work.len(&format!("{first}/arith_meta_t0_150.json")), 15_888);
    assert_eq!(work.len(&format!("{first}/k_lo10_meta_t0_150.ac")), 5901);
    assert_eq!(work.decode::<Huffman>(&[]).unwrap(), Status::Pass);
    assert_eq!(work.decode::<Arithmetic>(&[]).unwrap(), Status::Pass);
    assert_eq!(work.ratios::<Huffman>(&[]), ["1.145", "1.201", "1.172"]);
    assert_eq!(work.ratios::<Huffman>(&["--include-meta"])[2], "0.240");
    assert_eq!(work.ratios::<Arithmetic>(&[]), ["1.148", "1.205", "1.176"]);
    assert_eq!(work.ratios::<Arithmetic>(&["--include-meta"])[2], "0.245");
}

#[test]
fn decoded_dump_is_valid_and_has_the_same_bytes() {
    let work = Work::new();
    work.encode::<Huffman>(&[]).unwrap();
    let out = work.text("decoded");
    work.decode::<Huffman>(&["--out-dir", &out]).unwrap();
    let [before, after] = ["dump", "decoded"].map(|name| Dump::open(work.path(name), &Selection::default()).unwrap());
    assert!(after.findings.list.is_empty(), "{}", after.findings);
    assert_eq!(before.entries(), after.entries());
    for ((_, _, before), (_, _, after)) in before.iter().zip(after.iter()) {
        for role in Role::ALL {
            assert_eq!(*before.tensor(role).map().unwrap(), *after.tensor(role).map().unwrap());
        }
        let metas = [before, after].map(|entry| fs::read(entry.meta.as_deref().unwrap()).unwrap());
        assert_eq!(metas[0], metas[1]);
    }
    // A second time there is something in the way.
    assert_eq!(work.decode::<Huffman>(&["--out-dir", &out]).unwrap(), Status::BadInput);
    assert_eq!(work.decode::<Huffman>(&["--out-dir", &out, "--overwrite"]).unwrap(), Status::Pass);
}

#[test]
fn entries_that_are_there_are_skipped_or_replaced() {
    let work = Work::new();
    work.encode::<Huffman>(&[]).unwrap();
    let stream = work.path("out/runA/layer_0/k_hi6_meta_t0_150.huff");
    fs::write(&stream, b"damaged").unwrap();
    work.encode::<Huffman>(&[]).unwrap();
    assert_eq!(fs::read(&stream).unwrap(), b"damaged", "skipped");
    assert_eq!(work.decode::<Huffman>(&[]).unwrap(), Status::BadInput);
    work.encode::<Huffman>(&["--overwrite"]).unwrap();
    assert_eq!(work.decode::<Huffman>(&[]).unwrap(), Status::Pass);
}

#[test]
fn codebook_is_never_replaced_under_entries_that_need_it() {
    let work = Work::new();
    work.encode::<Arithmetic>(&["--stage", "prefill"]).unwrap();
    let error = work.encode::<Arithmetic>(&[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("2 entries there use a codebook of other dumps"), "{error}");
    assert_eq!(work.decode::<Arithmetic>(&[]).unwrap(), Status::Pass, "nothing has changed");
    // Entries with tables of their own are in nobody's way.
    work.encode::<Arithmetic>(&["--stage", "decode", "--codebook", "per-dump"]).unwrap();
    assert_eq!(folder::metas::<Arithmetic>(&work.path("out")).unwrap().len(), 8);
    assert_eq!(work.decode::<Arithmetic>(&[]).unwrap(), Status::Pass);
    // Replacing means that no entry is left with the codebook that is gone.
    work.encode::<Arithmetic>(&["--stage", "decode", "--overwrite"]).unwrap();
    assert_eq!(folder::metas::<Arithmetic>(&work.path("out")).unwrap().len(), 6);
    assert!(!work.path("out/runA/layer_0/k_hi6_meta_t0_150.ac").exists());
    assert_eq!(work.decode::<Arithmetic>(&[]).unwrap(), Status::Pass);
}

#[test]
fn differences_fail_and_missing_files_are_bad_input() {
    let work = Work::new();
    work.encode::<Huffman>(&[]).unwrap();
    let original = work.path("dump/runA/layer_1/v_t151_152.bin");
    let mut bytes = fs::read(&original).unwrap();
    bytes[9] ^= 1;
    fs::write(&original, bytes).unwrap();
    assert_eq!(work.decode::<Huffman>(&[]).unwrap(), Status::Fail);
    fs::remove_file(original).unwrap();
    assert_eq!(work.decode::<Huffman>(&[]).unwrap(), Status::BadInput);
    // The analysis leaves that entry out.
    work.analyze::<Huffman>(&[]).unwrap();
    let table = fs::read_to_string(work.path("results/huffman_metrics.csv")).unwrap();
    assert_eq!(table.lines().count(), 8);
    fs::remove_file(work.path("out/global_codebook.json")).unwrap();
    assert_eq!(work.decode::<Huffman>(&[]).unwrap_err().kind(), ErrorKind::Io);
    assert!(parse::<DecodeArgs>(&["--bitstream-dir", "x", "--verify"]).is_err(), "nothing to compare with");
}

#[test]
fn entries_that_are_not_f16_are_skipped() {
    let work = Work::new();
    crate::exp::samples::write_run(&work.path("dump"), "wide", gearbox_core::DType::F32);
    work.encode::<Huffman>(&[]).unwrap();
    assert_eq!(folder::metas::<Huffman>(&work.path("out")).unwrap().len(), 8);
    fs::remove_dir_all(work.path("dump/runA")).unwrap();
    assert_eq!(work.encode::<Huffman>(&[]).unwrap_err().kind(), ErrorKind::InvalidInput, "nothing to encode");
}

#[test]
fn meta_files_keep_what_they_hold_in_its_order() {
    let work = Work::new();
    let path = work.path("dump/runA/layer_0/meta_t0_150.json");
    let mut meta = folder::read_json(&path).unwrap();
    meta.set("note", "é \"x\"");
    let nested: Json = serde_json::from_str(r#"{"z": 1, "a": [], "m": {"scale": 1e5, "ok": true}}"#).unwrap();
    meta.set("nested", nested);
    fs::write(&path, meta.to_bytes()).unwrap();
    work.encode::<Arithmetic>(&[]).unwrap();
    let text = fs::read_to_string(work.path("out/runA/layer_0/arith_meta_t0_150.json")).unwrap();
    let expected = r#"  "v_file": "v_t0_150.bin",
  "note": "é \"x\"",
  "nested": {
    "z": 1,
    "a": [],
    "m": {
      "scale": 100000.0,
      "ok": true
    }
  },
  "layout": "bitstream_arith",
  "codebook": "global",
  "num_elements": 4800,
  "k_hi6_file": "k_hi6_meta_t0_150.ac",
  "k_lo10_file": "k_lo10_meta_t0_150.ac",
  "v_hi6_file": "v_hi6_meta_t0_150.ac",
  "v_lo10_file": "v_lo10_meta_t0_150.ac"
}"#;
    assert!(text.ends_with(expected), "{text}");
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    let work = Work::new();
    work.encode::<Huffman>(&[]).unwrap();
    let path = work.path("out/runA/layer_0/bitstream_meta_t0_150.json");
    for name in ["../k.bin", "/etc/passwd", "..", "", "a/b"] {
        let mut entry = Encoded::read(path.clone()).unwrap();
        entry.meta.set("k_hi6_file", name);
        assert_eq!(entry.streams().unwrap_err().kind(), ErrorKind::InvalidInput, "{name}");
    }
    let mut entry = Encoded::read(path.clone()).unwrap();
    entry.meta.set("num_elements", u64::MAX);
    fs::write(path, entry.meta.to_bytes()).unwrap();
    assert_eq!(work.decode::<Huffman>(&[]).unwrap(), Status::BadInput);
}

#[test]
fn values_of_tables_are_those_of_the_reference() {
    let values: Json = serde_json::from_value(json!([null, true, 3, -2, 0.5, "x,y"])).unwrap();
    let Json::Array(values) = values else { panic!("a list") };
    let shown: Vec<String> = values.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["None", "True", "3", "-2", "0.5", "x,y"]);
}
