use std::fs;
use std::path::Path;

use gearbox_core::{DType, Result};

use super::*;
use crate::exp::samples::{parse, write_run};

fn run(dump: &Path, out: &Path, more: &[&str]) -> Result<Status> {
    let paths = ["--dump-dir", dump.to_str().unwrap(), "--out-dir", out.to_str().unwrap()];
    parse::<GearFp16Args>(&[&paths, more].concat()).unwrap().run(false)
}

/// Header and rows.
fn table(path: &Path) -> (Vec<String>, Vec<Vec<String>>) {
    let text = fs::read_to_string(path).unwrap();
    let mut lines = text.split_terminator("\r\n").map(|line| line.split(',').map(ToOwned::to_owned).collect());
    (lines.next().unwrap(), lines.collect())
}

fn cell<'a>((header, rows): &'a (Vec<String>, Vec<Vec<String>>), row: usize, column: &str) -> &'a str {
    &rows[row][header.iter().position(|name| name == column).unwrap()]
}

#[test]
fn f16_check_vectors_give_the_figures_of_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let (dump, out) = (folder.path().join("dump"), folder.path().join("new/out"));
    write_run(&dump, "a", DType::F16);
    assert_eq!(run(&dump, &out, &[]).unwrap(), Status::Pass);

    let layers = table(&out.join("layer_metrics.csv"));
    assert_eq!(layers.0.len(), 41 + 11);
    assert_eq!(layers.1.len(), 2);
    for (column, expected) in [
        ("k_entropy", "6.876126296070014"),
        ("k_hi_entropy", "4.162468031351315"),
        ("k_lo_entropy", "7.978403510102063"),
        ("k_zstd_ratio", "1.1562455892731123"),
        ("k_gear_ratio", "1.6397117694155323"),
        ("k_gear_delta_ratio", "1.6438246212501255"),
        ("k_split16_ratio", "0.0"),
        ("prompt_tokens", ""),
        ("dtype", "f16"),
        ("k_bytes", "16384"),
        ("k_zstd_bytes", "14170"),
        ("k_hi_bytes", "1790"),
        ("k_lo_bytes", "8202"),
        ("k_hi_delta_bytes", "1765"),
        ("v_hi_delta_bytes", "1796"),
    ] {
        match (expected.parse::<f64>(), column.ends_with("_entropy")) {
            (Ok(expected), true) => {
                assert!((cell(&layers, 0, column).parse::<f64>().unwrap() - expected).abs() <= 1e-12);
            }
            _ => assert_eq!(cell(&layers, 0, column), expected, "{column}"),
        }
    }
    assert_eq!(cell(&layers, 1, "k_hi_delta_bytes"), "89", "the delta of one token is the token");

    let heads = table(&out.join("head_metrics.csv"));
    assert_eq!((heads.0.len(), heads.1.len()), (25 + 12, 4));
    assert_eq!((cell(&heads, 1, "head_id"), cell(&heads, 1, "k_hi_delta_bytes")), ("1", "919"));

    let summary = fs::read_to_string(out.join("summary.md")).unwrap();
    let expected = "# Gear FP16 Summary\n\n- Dumps analyzed: 2\n- Avg K zstd ratio: 1.059\n- Avg V zstd ratio: 1.059\n\
                    - Avg K gear ratio: 1.386\n- Avg V gear ratio: 1.374\n- Avg K gear+delta ratio: 1.388\n\
                    - Avg V gear+delta ratio: 1.378\n\n## Weighted Ratios (by raw bytes)\n\
                    - Weighted K zstd ratio: 1.153\n- Weighted V zstd ratio: 1.152\n- Weighted K gear ratio: 1.628\n\
                    - Weighted V gear ratio: 1.620\n- Weighted K gear+delta ratio: 1.632\n- Weighted V gear+delta ratio: 1.627\n";
    assert_eq!(summary, expected);
    assert!(!out.join("grouped_summary.md").exists());
}

#[test]
fn f32_check_vectors_fill_the_columns_of_16_bit_halves() {
    let folder = tempfile::tempdir().unwrap();
    let (dump, out) = (folder.path().join("dump"), folder.path().join("out"));
    write_run(&dump, "a", DType::F32);
    run(&dump, &out, &["--stage", "prefill"]).unwrap();
    let layers = table(&out.join("layer_metrics.csv"));
    assert_eq!(cell(&layers, 0, "k_split16_ratio"), "1.1255452890461306");
    assert_eq!(cell(&layers, 0, "k_split16_delta_ratio"), "1.1834729846865069");
    assert_eq!(cell(&layers, 0, "k_gear_ratio"), "0.0");
    let heads = table(&out.join("head_metrics.csv"));
    assert_eq!(heads.0.len(), 25 + 12);
    assert!(heads.0.contains(&"k_hi16_entropy".to_owned()) && !heads.0.contains(&"k_hi_entropy".to_owned()));
    assert!(fs::read_to_string(out.join("summary.md")).unwrap().contains("- Weighted K split16+delta ratio: 1.183\n"));
}

#[test]
fn mixed_element_types_share_one_schema() {
    let folder = tempfile::tempdir().unwrap();
    let (dump, out) = (folder.path().join("dump"), folder.path().join("out"));
    write_run(&dump, "b", DType::F16);
    write_run(&dump, "a", DType::F32);
    run(&dump, &out, &[]).unwrap();
    let heads = table(&out.join("head_metrics.csv"));
    assert_eq!(heads.0.len(), 25 + 14 + 12);
    assert!(heads.1.iter().all(|row| row.len() == heads.0.len()));
    let order: Vec<_> = (0..8).map(|row| (cell(&heads, row, "run_id"), cell(&heads, row, "dtype"))).collect();
    assert_eq!(order, [[("a", "f32"); 4], [("b", "f16"); 4]].concat(), "rows are sorted by run");
    assert_eq!((cell(&heads, 0, "k_gear_ratio"), cell(&heads, 4, "k_split16_ratio")), ("0.0", "0.0"));
    assert_eq!(cell(&heads, 5, "k_hi_delta_bytes"), "919");
}

#[test]
fn existing_results_are_kept_unless_overwritten_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (dump, out) = (folder.path().join("dump"), folder.path().join("out"));
    write_run(&dump, "a", DType::F16);
    run(&dump, &out, &["--skip-head-metrics"]).unwrap();
    assert!(!out.join("head_metrics.csv").exists());
    let first = fs::read(out.join("layer_metrics.csv")).unwrap();
    let error = run(&dump, &out, &[]).unwrap_err().to_string();
    assert!(error.contains("layer_metrics.csv") && error.contains("exists already"), "{error}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 2, "nothing was left behind");
    run(&dump, &out, &["--overwrite"]).unwrap();
    assert_eq!(fs::read(out.join("layer_metrics.csv")).unwrap(), first);
}

#[test]
fn run_log_adds_prompt_tokens_and_groups() {
    let folder = tempfile::tempdir().unwrap();
    let (dump, out, log) = (folder.path().join("dump"), folder.path().join("out"), folder.path().join("log.jsonl"));
    write_run(&dump, "a", DType::F16);
    write_run(&dump, "b", DType::F16);
    fs::write(&log, "{\"run_id\": \"a\", \"metrics\": {\"prompt_tokens\": 64}}\n").unwrap();
    let flags = ["--run-log", log.to_str().unwrap(), "--group-bins", "0-63,64-64,10+"];
    run(&dump, &out, &flags).unwrap();
    let layers = table(&out.join("layer_metrics.csv"));
    assert_eq!((cell(&layers, 0, "prompt_tokens"), cell(&layers, 2, "prompt_tokens")), ("64", ""));
    let group = |bin| {
        format!(
            "## {bin}\n- Dumps: 2\n- Weighted K zstd: 1.153\n- Weighted V zstd: 1.152\n- Weighted K gear: 1.628\n\
             - Weighted V gear: 1.620\n- Weighted K gear+delta: 1.632\n- Weighted V gear+delta: 1.627\n\n"
        )
    };
    let grouped = fs::read_to_string(out.join("grouped_summary.md")).unwrap();
    assert_eq!(grouped, format!("# Grouped Summary by Prompt Tokens\n\n{}{}", group("64-64"), group("10+")));
}

#[test]
fn bad_settings_are_known_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let (dump, out, log) = (folder.path().join("dump"), folder.path().join("out"), folder.path().join("log.jsonl"));
    write_run(&dump, "a", DType::F16);
    fs::write(&log, "{}\n").unwrap();
    let error = run(&dump, &out, &["--run-log", log.to_str().unwrap()]).unwrap_err().to_string();
    assert!(error.ends_with("log.jsonl`: line 1: expected a string in `run_id`, got none"), "{error}");
    assert!(!out.exists());
    let error = parse::<GearFp16Args>(&["--dump-dir", "x", "--group-bins", "9-1"]).unwrap_err().to_string();
    assert!(error.contains("bin `9-1`: expected"), "{error}");
    assert!(parse::<GearFp16Args>(&["--dump-dir", "x", "--zstd-level", "23"]).is_err());
}

#[test]
fn bad_entries_are_left_out_and_change_the_status() {
    let folder = tempfile::tempdir().unwrap();
    let (dump, out) = (folder.path().join("dump"), folder.path().join("out"));
    write_run(&dump, "a", DType::F16);
    fs::remove_file(dump.join("a/layer_0/v_t64_65.bin")).unwrap();
    assert_eq!(run(&dump, &out, &[]).unwrap(), Status::BadInput);
    assert_eq!(table(&out.join("layer_metrics.csv")).1.len(), 1);
    assert_eq!(run(&dump, &out, &["--overwrite", "--allow-bad"]).unwrap(), Status::Pass);
    for nothing in [["--stage", "decode"], ["--min-seq-len", "65"]] {
        assert!(run(&dump, &out, &[&["--overwrite", "--allow-bad"], &nothing[..]].concat()).is_err());
    }
}
