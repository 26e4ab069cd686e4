use std::fs;
use std::path::Path;

use gearbox_conformance::reference::{Entry, dataset_a, dataset_b};
use gearbox_core::{Chunk, DType, ErrorKind, Shape, Stage};
use serde_json::Value;

use super::*;
use crate::dump::{NewEntry, write_reference_entry};
use crate::exp::samples::parse;

/// Writes entries as a dump and returns its folder.
fn dump_of(entries: &[Entry]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in entries {
        let [key, value] = [&entry.key, &entry.value].map(|bytes| Chunk::new(entry.shape, DType::F16, bytes).unwrap());
        let new = NewEntry::new(entry.run, entry.layer, entry.start, entry.stage, key, value);
        let layer = folder.path().join(entry.run).join(format!("layer_{}", entry.layer));
        write_reference_entry(&layer, &new, false).unwrap();
    }
    folder
}

/// How a run ends, its results and its summary.
fn run(dump: &Path, flags: &[&str]) -> Result<(Status, Value, String)> {
    let out = tempfile::tempdir().unwrap();
    let [json, md] = ["new/r.json", "new/r.md"].map(|name| out.path().join(name));
    let paths =
        ["--dump-dir", dump.to_str().unwrap(), "--out-json", json.to_str().unwrap(), "--out-md", md.to_str().unwrap()];
    let args: OfflineLosslessArgs = parse(&[&paths, flags].concat()).unwrap();
    let status = args.run(&gearbox_plugins::registry()?, false)?;
    let text = fs::read_to_string(json).unwrap();
    assert!(text.is_ascii() && !text.ends_with('\n'));
    Ok((status, serde_json::from_str(&text).unwrap(), fs::read_to_string(md).unwrap()))
}

/// The numbers of a map of modes, in the order of the candidates.
fn modes(results: &Value, stream: &str) -> Vec<u64> {
    let counts = results[format!("{stream}_mode_counts")].as_object().unwrap();
    let in_order = Predictor::ALL.iter().filter_map(|predictor| counts.get(predictor.name()));
    in_order.map(|count| count.as_u64().unwrap()).collect()
}

/// Flags; compressed keys and values, bytes beside the streams of keys, groups, chunks; modes of the four streams.
type Row = (&'static str, [u64; 5], [&'static [u64]; 4]);

const ROWS_A: [Row; 10] = [
    ("", [16814, 17079, 0, 0, 0], [&[6, 6, 0, 0, 0], &[12, 0, 0, 0, 0], &[12, 0, 0], &[12, 0, 0]]),
    ("--bitshuffle", [17372, 18477, 0, 0, 0], [&[6, 6, 0, 0, 0], &[12, 0, 0, 0, 0], &[6, 6, 0], &[12, 0, 0]]),
    ("--codec-mode legacy", [16536, 17668, 0, 0, 0], [&[8], &[8], &[8], &[8]]),
    ("--entry-mode aggregate", [16572, 16844, 40, 2, 0], [&[0, 6, 0, 0, 0], &[6, 0, 0, 0, 0], &[6, 0, 0], &[6, 0, 0]]),
    (
        "--entry-mode aggregate --aggregate-by-stage",
        [16718, 16983, 48, 4, 0],
        [&[2, 6, 0, 0, 0], &[8, 0, 0, 0, 0], &[8, 0, 0], &[8, 0, 0]],
    ),
    (
        "--entry-mode chunked --online-chunk-seq 48",
        [17584, 17789, 224, 0, 28],
        [&[6, 7, 1, 0, 0], &[14, 0, 0, 0, 0], &[14, 0, 0], &[14, 0, 0]],
    ),
    (
        "--entry-mode chunked",
        [16942, 17207, 128, 0, 16],
        [&[6, 6, 0, 0, 0], &[12, 0, 0, 0, 0], &[12, 0, 0], &[12, 0, 0]],
    ),
    (
        "--entry-mode chunked_grouped --online-chunk-seq 48 --online-framing-bytes 8",
        [17170, 17377, 64, 2, 16],
        [&[0, 8, 0, 0, 0], &[8, 0, 0, 0, 0], &[8, 0, 0], &[8, 0, 0]],
    ),
    (
        "--entry-mode chunked_grouped --online-chunk-seq 48 --online-framing-bytes 8 --aggregate-by-stage",
        [17296, 17501, 80, 4, 20],
        [&[2, 7, 1, 0, 0], &[10, 0, 0, 0, 0], &[10, 0, 0], &[10, 0, 0]],
    ),
    (
        "--entry-mode aggregate --adaptive-block-seq 16 --front-n 1",
        [8476, 8435, 20, 1, 0],
        [&[0, 10, 0, 0, 0], &[10, 0, 0, 0, 0], &[10, 0, 0], &[10, 0, 0]],
    ),
];

const ROWS_B: [Row; 7] = [
    ("--adaptive-block-seq 16", [5426, 4856, 0, 0, 0], [&[3, 7, 5, 2, 5], &[4, 6, 4, 2, 6], &[10, 10, 2], &[8, 14, 0]]),
    (
        "--adaptive-block-seq 16 --entry-mode aggregate",
        [4702, 4444, 24, 2, 0],
        [&[3, 8, 5, 4, 0], &[4, 4, 4, 4, 4], &[8, 12, 0], &[8, 12, 0]],
    ),
    (
        "--adaptive-block-seq 16 --entry-mode aggregate --bitshuffle",
        [4236, 3632, 24, 2, 0],
        [&[8, 8, 0, 0, 4], &[8, 0, 0, 0, 12], &[8, 12, 0], &[8, 12, 0]],
    ),
    (
        "--adaptive-block-seq 16 --entry-mode chunked --online-chunk-seq 48",
        [5893, 5431, 160, 0, 20],
        [&[3, 7, 5, 2, 5], &[4, 6, 4, 2, 6], &[10, 10, 2], &[8, 14, 0]],
    ),
    (
        "--adaptive-block-seq 16 --entry-mode chunked_grouped --online-chunk-seq 48 --online-framing-bytes 8",
        [5371, 5049, 64, 2, 16],
        [&[3, 8, 5, 4, 0], &[4, 4, 4, 4, 4], &[8, 12, 0], &[8, 12, 0]],
    ),
    ("--codec-mode legacy", [7387, 6054, 0, 0, 0], [&[4], &[4], &[4], &[4]]),
    ("--codec-mode legacy --bitshuffle", [6096, 4873, 0, 0, 0], [&[4], &[4], &[4], &[4]]),
];

#[test]
fn datasets_give_the_table_of_the_reference() {
    for (entries, raw, rows) in [(dataset_a(), 19584, &ROWS_A[..]), (dataset_b(), 10240, &ROWS_B[..])] {
        let dump = dump_of(&entries);
        for (flags, expected, expected_modes) in rows {
            let list: Vec<&str> = flags.split_whitespace().collect();
            let (status, results, _) = run(dump.path(), &list).unwrap();
            let name = format!("{} {flags}", entries[0].run);
            assert_eq!((status, &results["complete"]), (Status::Pass, &true.into()), "{name}");
            let half = if list.contains(&"--front-n") { raw / 2 } else { raw };
            assert_eq!((&results["k_raw_bytes"], &results["v_raw_bytes"]), (&half.into(), &half.into()), "{name}");
            let figures =
                ["k_compressed_bytes", "v_compressed_bytes", "k_chunk_meta_bytes", "aggregate_groups", "online_chunks"];
            assert_eq!(figures.map(|figure| results[figure].as_u64().unwrap()), *expected, "{name}");
            for (stream, expected) in ["k_hi", "k_lo", "v_hi", "v_lo"].into_iter().zip(expected_modes) {
                assert_eq!(modes(&results, stream), *expected, "{name}, {stream}");
            }
            let of_layers = |key: &str| -> u64 {
                results["layers"].as_array().unwrap().iter().map(|layer| layer[key].as_u64().unwrap()).sum()
            };
            assert_eq!([of_layers("k_compressed_bytes"), of_layers("v_compressed_bytes")], expected[..2], "{name}");
        }
    }
}

/// Two entries of layer 0, of which the second has files of half the size that its shape asks for.
fn one_bad_entry() -> tempfile::TempDir {
    let entry = |start, stage, bytes: std::ops::Range<u8>| {
        let [key, value] = [bytes.clone(), bytes.start + 8..bytes.end + 8].map(Iterator::collect);
        Entry { run: "run", layer: 0, stage, start, shape: Shape::new(2, 1, 2), key, value }
    };
    let dump = dump_of(&[entry(0, Stage::Prefill, 0..8), entry(2, Stage::Decode, 0..8)]);
    for role in ["k", "v"] {
        let path = dump.path().join(format!("run/layer_0/{role}_t2_4.bin"));
        fs::write(&path, &fs::read(&path).unwrap()[..4]).unwrap();
    }
    dump
}

#[test]
fn entry_that_fails_takes_its_group_with_it() {
    let dump = one_bad_entry();
    for (mode, raw, compressed) in
        [("per_meta", 16, 88), ("chunked", 16, 120), ("aggregate", 0, 0), ("chunked_grouped", 0, 0)]
    {
        let (status, results, summary) = run(dump.path(), &["--entry-mode", mode]).unwrap();
        assert_eq!(status, Status::BadInput, "{mode}");
        let figures = ["raw_bytes", "compressed_bytes", "selected_entries", "skipped_entries", "scanned_entries"];
        assert_eq!(figures.map(|figure| results[figure].as_u64().unwrap()), [raw, compressed, 2, 1, 2], "{mode}");
        assert_eq!(results["skip_reasons"], serde_json::json!({"compression_failed": 1}), "{mode}");
        assert_eq!((&results["complete"], results["lossless_ratio"] == 0.0), (&false.into(), raw == 0), "{mode}");
        assert!(summary.ends_with("- Skipped entries: 1\n- Skip reasons:\n  - compression_failed: 1\n"), "{summary}");
    }
    let by_stage = ["--entry-mode", "aggregate", "--aggregate-by-stage", "--allow-bad"];
    let (status, results, _) = run(dump.path(), &by_stage).unwrap();
    assert_eq!((status, &results["raw_bytes"], &results["aggregate_groups"]), (Status::Pass, &16.into(), &2.into()));
}

#[test]
fn defects_have_the_names_of_the_reference() {
    type Defect = (&'static str, fn(&Path));
    let entries = dataset_a();
    let defects: [Defect; 6] = [
        ("meta_parse_error", |meta| fs::write(meta, "{").unwrap()),
        ("invalid_shape", |meta| edit(meta, "\"kv_heads\": 2", "\"kv_heads\": 0")),
        ("meta_invalid_numeric_fields", |meta| edit(meta, "\"kv_heads\": 2", "\"kv_heads\": \"two\"")),
        ("missing_k_or_v_file", |meta| edit(meta, "k_file", "another_file")),
        ("missing_k_or_v_binary", |meta| edit(meta, "\"v_t", "\"v_u")),
        ("unsupported_bytes_per_elem_3", |meta| edit(meta, "\"bytes_per_elem\": 2", "\"bytes_per_elem\": 3")),
    ];
    for (name, damage) in defects {
        let dump = dump_of(&entries);
        damage(&dump.path().join("runA/layer_1/meta_t150_151.json"));
        let (status, results, _) = run(dump.path(), &[]).unwrap();
        assert_eq!(results["skip_reasons"], serde_json::json!({name: 1}));
        let figures = ["scanned_entries", "selected_entries", "skipped_entries", "k_raw_bytes"];
        assert_eq!(figures.map(|figure| results[figure].as_u64().unwrap()), [8, 7, 1, 19584 - 64], "{name}");
        assert_eq!(status, Status::BadInput, "{name}");
        // Of a layer that is not asked for, only what cannot be read at all is reported.
        let (_, results, _) = run(dump.path(), &["--front-n", "1"]).unwrap();
        let unknown = ["meta_parse_error", "meta_invalid_numeric_fields"].contains(&name);
        assert_eq!(results["skipped_entries"], u64::from(unknown), "{name}");
    }
}

fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn f32_entries_are_rounded_or_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> =
        [1.0_f32, -2.5, 1e6, f32::INFINITY].into_iter().cycle().take(64).flat_map(f32::to_le_bytes).collect();
    let chunk = Chunk::new(Shape::new(4, 2, 8), DType::F32, &bytes).unwrap();
    let entry = NewEntry::new("r", 0, 0, Stage::Prefill, chunk, chunk);
    write_reference_entry(&folder.path().join("r/layer_0"), &entry, false).unwrap();
    for mode in ["per_meta", "aggregate", "chunked", "chunked_grouped"] {
        let (_, results, _) = run(folder.path(), &["--entry-mode", mode, "--online-chunk-seq", "3"]).unwrap();
        let figures = ["converted_fp32_entries", "k_raw_bytes", "v_raw_bytes", "new_infinities"];
        assert_eq!(figures.map(|figure| results[figure].as_u64().unwrap()), [1, 128, 128, 32], "{mode}");
    }
    let error = run(folder.path(), &["--strict-fp16"]).unwrap_err();
    assert!(error.to_string().ends_with("no entry of the chosen layers is left"), "{error}");
    for entry in &dataset_a()[..1] {
        let chunk = Chunk::new(entry.shape, DType::F16, &entry.key).unwrap();
        let new = NewEntry::new("s", 0, 0, Stage::Prefill, chunk, chunk);
        write_reference_entry(&folder.path().join("s/layer_0"), &new, false).unwrap();
    }
    let (status, results, _) = run(folder.path(), &["--strict-fp16"]).unwrap();
    assert_eq!(results["skip_reasons"], serde_json::json!({"skip_fp32_strict": 1}));
    assert_eq!((status, &results["complete"], &results["selected_dumps"]), (Status::Pass, &false.into(), &1.into()));
}

#[test]
fn scopes_choose_layers() {
    let mut entries = dataset_b();
    for (layer, entry) in (0..).zip(&mut entries) {
        (entry.layer, entry.start) = (layer, 0);
    }
    let dump = dump_of(&entries);
    for (flags, layers) in [
        (&["--front-n", "3"][..], &[0, 1, 2][..]),
        (&["--scope", "layer_range"], &[2, 3]),
        (&["--scope", "layer_range", "--layer-start", "1", "--layer-end", "2"], &[1, 2]),
        (&["--scope", "layer_ids", "--layer-ids", "3,0,3"], &[0, 3]),
    ] {
        let (_, results, _) = run(dump.path(), flags).unwrap();
        assert_eq!(results["selected_layers"], serde_json::json!(layers), "{flags:?}");
    }
    for flags in [&["--front-n", "0"][..], &["--front-n", "-1"], &["--scope", "layer_ids"]] {
        assert_eq!(run(dump.path(), flags).unwrap_err().kind(), ErrorKind::InvalidConfig, "{flags:?}");
    }
    let nothing = ["--scope", "layer_ids", "--layer-ids", "-1"];
    assert_eq!(run(dump.path(), &nothing).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn lists_of_predictors_are_read_as_the_reference_reads_them() {
    let list = |text: &str| text.parse::<Predictors>().map(|list| list.0);
    assert_eq!(list(" xor_seq,, raw ,xor_seq"), Ok(vec![Predictor::XorSeq, Predictor::Raw]));
    assert_eq!(list(" , "), Err("expected at least one predictor, got none".to_owned()));
    assert!(list("raw,delta").unwrap_err().starts_with("`delta` is none of `raw`, `delta_seq`"));
    let dump = dump_of(&dataset_b());
    let (_, results, summary) = run(dump.path(), &["--v-lo-predictors", "xor_seq,raw"]).unwrap();
    assert_eq!(results["v_lo_predictors"], serde_json::json!(["xor_seq", "raw"]));
    assert!(summary.contains("- V lo mode counts: {'xor_seq': "), "{summary}");
}

#[test]
fn existing_results_are_kept_unless_overwritten_with_the_same_bytes() {
    let dump = dump_of(&dataset_a());
    let out = dump.path().join("é.json");
    let run = |flags: &[&str]| {
        let paths = ["--dump-dir", dump.path().to_str().unwrap(), "--out-json", out.to_str().unwrap()];
        let args: OfflineLosslessArgs = parse(&[&paths, flags].concat()).unwrap();
        args.run(&gearbox_plugins::registry().unwrap(), true)
    };
    run(&[]).unwrap();
    let first = fs::read(&out).unwrap();
    let error = run(&[]).unwrap_err().to_string();
    assert!(error.contains("é.json") && error.contains("exists already"), "{error}");
    run(&["--overwrite"]).unwrap();
    assert_eq!(fs::read(&out).unwrap(), first);
    assert_eq!(fs::read_dir(dump.path()).unwrap().count(), 2, "the run and the results");
}
