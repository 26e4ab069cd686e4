//! The lossy experiments beside what the reference wrote, on the same dumps and on its synthetic one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gearbox::dump::{NewEntry, Stage, write_reference_entry};
use gearbox_core::{Chunk, DType, Shape};

use crate::run::{gearbox, json, run, shared, stderr, text};

/// A CSV file without quotes: header, and cells of each row.
fn table(path: &Path) -> (Vec<String>, Vec<Vec<String>>) {
    let content = fs::read_to_string(path).unwrap();
    // One line end throughout: CRLF by entry, LF by setting.
    let end = if content.contains('\r') { "\r\n" } else { "\n" };
    assert!(content.ends_with(end) && content.matches('\n').count() == content.matches(end).count());
    let mut lines = content.split_terminator(end).map(|line| line.split(',').map(ToOwned::to_owned).collect());
    (lines.next().unwrap(), lines.collect())
}

fn cells(path: &Path) -> Vec<BTreeMap<String, String>> {
    let (header, rows) = table(path);
    rows.into_iter().map(|row| header.iter().cloned().zip(row).collect()).collect()
}

/// Most that cosines may differ: ours are summed in F64, those of the reference in F32, in the order of its build.
const COSINE: f64 = 2e-6;

/// The same for many elements, where the reference drifts: of the 260 096 of a prompt of 2032 tokens by up to 1.2e-5 from an F64 sum, from
/// which ours differ by less than 1e-15.
const DRIFTED_COSINE: f64 = 2e-5;

/// Elements from which on the reference drifts.
const MANY: f64 = 32_768.0;

fn close(got: &str, expected: &str, within: f64) -> bool {
    match (got.parse::<f64>(), expected.parse::<f64>()) {
        (Ok(got), Ok(expected)) => (got - expected).abs() <= within,
        _ => false,
    }
}

/// Compares the columns of the reference: cosines nearly, all else to the last digit. Its rows are in the order of its folders.
fn tables_equal(ours: &Path, theirs: &Path) {
    let ((header, mut got), (reference, mut expected)) = (table(ours), table(theirs));
    let name = ours.display();
    assert_eq!(header[..reference.len()], reference, "{name}");
    assert!(header.len() > reference.len(), "{name}: our columns are missing");
    assert_eq!(got.len(), expected.len(), "{name}");
    let is_cosine: Vec<bool> = reference.iter().map(|column| column.ends_with("cosine")).collect();
    let exact = |row: &Vec<String>| -> Vec<String> {
        row.iter().zip(&is_cosine).filter(|(_, cosine)| !**cosine).map(|(cell, _)| cell.clone()).collect()
    };
    if !name.to_string().ends_with("sweep.csv") {
        got.sort_by_cached_key(exact);
        expected.sort_by_cached_key(exact);
    }
    for (got, expected) in got.iter().zip(&expected) {
        let of =
            |name| reference.iter().position(|column| column == name).map(|idx| expected[idx].parse::<f64>().unwrap());
        let elements: Option<f64> = ["seq_len", "kv_heads", "head_dim"].into_iter().map(of).product();
        let within = if elements.is_some_and(|elements| elements >= MANY) { DRIFTED_COSINE } else { COSINE };
        for ((column, is_cosine), (got, expected)) in reference.iter().zip(&is_cosine).zip(got.iter().zip(expected)) {
            let equal = got == expected || *is_cosine && close(got, expected, within);
            assert!(equal, "{name}, {column}: expected {expected}, got {got}");
        }
    }
}

/// Compares a summary: what follows `cosine` or `cos` nearly, all else byte by byte.
fn summaries_equal(ours: &Path, theirs: &Path) {
    let [got, expected] = [ours, theirs].map(|path| fs::read_to_string(path).unwrap());
    assert_eq!(got.lines().count(), expected.lines().count(), "{}", ours.display());
    assert_eq!(got.ends_with('\n'), expected.ends_with('\n'));
    for (got, expected) in got.lines().zip(expected.lines()) {
        let (got_words, words): (Vec<_>, Vec<_>) = (got.split(' ').collect(), expected.split(' ').collect());
        assert_eq!(got_words.len(), words.len(), "{got}");
        let mut before = "";
        for (got_word, word) in got_words.into_iter().zip(words) {
            let [a, b] = [got_word, word].map(|word| word.trim_end_matches(','));
            // Both are rounded to six decimals.
            let near = before.to_lowercase().starts_with("cos") && close(a, b, DRIFTED_COSINE + 1e-6);
            assert!(got_word == word || near, "expected `{expected}`, got `{got}`");
            before = word;
        }
    }
}

fn dump(name: &str) -> Option<PathBuf> {
    shared().map(|shared| shared.join("data/dumps").join(name))
}

/// Runs an experiment on a dump of the reference and compares all files of its folder.
fn equals(name: &str, experiment: &str, dump_name: &str, flags: &[&str]) {
    let (Some(shared), Some(dump)) = (shared(), dump(dump_name)) else { return };
    let golden = shared.join("golden").join(name);
    let folder = tempfile::tempdir().unwrap();
    let paths = ["exp", experiment, "--dump-dir", text(&dump), "--out-dir", text(folder.path())];
    run(&[&paths, flags].concat(), 0);
    let names = |path: &Path| -> Vec<_> {
        let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(folder.path()), names(&golden));
    for file in names(&golden) {
        let (ours, theirs) = (folder.path().join(&file), golden.join(&file));
        if ours.extension().is_some_and(|ending| ending == "csv") {
            tables_equal(&ours, &theirs);
        } else {
            summaries_equal(&ours, &theirs);
        }
    }
}

#[test]
fn mixed_equals_the_reference_in_every_mode() {
    let quant = |mode| ["--lossy-method", "quant", "--lossy-bits", "8", "--compress-mode", mode];
    for mode in ["gear-delta", "gear", "zstd"] {
        equals(&format!("mixed-quant8-{mode}"), "mixed", "fp16", &quant(mode));
    }
    equals("mixed-truncate", "mixed", "fp16", &[]);
    equals("mixed-quant8-fp32", "mixed", "fp32", &quant("gear-delta"));
}

#[test]
fn blocknorm_equals_the_reference() {
    equals("blocknorm", "blocknorm", "fp16", &["--block-size", "32", "--topk-ratio", "0.05", "--bits", "10"]);
}

#[test]
fn blocknorm_sweep_equals_the_reference() {
    equals("blocknorm-sweep", "blocknorm-sweep", "fp16", &["--lossless-first-n", "2"]);
    let grid = ["--block-sizes", "16,32,64", "--topk-ratios", "0.05", "--bits-list", "6,8,10"];
    let limits = ["--max-k-mae", "0.05", "--max-v-mae", "0.05", "--min-k-cosine", "0.999", "--min-v-cosine", "0.999"];
    equals("blocknorm-sweep-small", "blocknorm-sweep", "fp16", &[&grid[..], &limits].concat());
}

#[test]
fn lossy_compare_equals_the_reference() {
    equals("lossy-compare", "lossy-compare", "fp16", &["--bits-list", "4,6,8,10"]);
}

fn mix(x: u32) -> u32 {
    let x = (x ^ x >> 16).wrapping_mul(0x7FEB_352D);
    let x = (x ^ x >> 15).wrapping_mul(0x846C_A68B);
    x ^ x >> 16
}

/// A tensor of the reference's synthetic dump: 2 heads of 80 channels.
fn tensor(dtype: DType, tag: u32, key: bool, seq: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (t, h, d) in (0..seq).flat_map(|t| (0..2).flat_map(move |h| (0..80).map(move |d| (t, h, d)))) {
        let a = i64::from(mix(65536 * tag + 1024 * h + d) & 0xFFF);
        let b = mix(0x9E37_79B9 ^ tag << 24 ^ t << 16 ^ h << 10 ^ d);
        let gain = if key && d % 16 == 7 { 16 } else { 1 };
        let value = gain * (((a - 2048) + (i64::from(b & 0x3FF) - 512)) * 1024 + i64::from(b >> 10 & 0x3FF));
        let chunk = (value as f32 / 1_048_576.0).to_le_bytes();
        let wide = Chunk::new(Shape::flat(1), DType::F32, &chunk).unwrap();
        let mut values = Vec::new();
        gearbox_plugins::quant::reference::widen(wide, &mut values);
        gearbox_plugins::quant::reference::narrow(&values, dtype, &mut bytes);
    }
    bytes
}

/// Writes the synthetic dump: four layers of 24 tokens of prompt, and one decoded token in the last.
fn write_synthetic(folder: &Path, dtype: DType) {
    let entries = (0..4).map(|layer| (layer, 4 * layer, 4 * layer + 1, 0, 24, Stage::Prefill));
    for (layer, key, value, start, seq, stage) in entries.chain([(3, 14, 15, 24, 1, Stage::Decode)]) {
        let tensors = [tensor(dtype, key, true, seq), tensor(dtype, value, false, seq)];
        let shape = Shape::new(seq as usize, 2, 80);
        let [key, value] = [0, 1].map(|role: usize| Chunk::new(shape, dtype, &tensors[role]).unwrap());
        let entry = NewEntry::new("synthetic", layer, start, stage, key, value);
        write_reference_entry(&folder.join(format!("synthetic/layer_{layer}")), &entry, false).unwrap();
    }
}

/// Runs an experiment on the synthetic dump; results lie in the folder that comes back.
fn synthetic(experiment: &str, dtype: DType, flags: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (dump, out) = (folder.path().join("dump"), folder.path().join("out"));
    write_synthetic(&dump, dtype);
    let paths = ["exp", experiment, "--dump-dir", text(&dump), "--out-dir", text(&out)];
    run(&[&paths, flags].concat(), 0);
    folder
}

/// Checks the first cells that match, of prefill entries of layer 2 unless another one is given.
fn check(path: &Path, entry: (&str, &str), own: &[(&str, &str)], expected: &[(&str, &str)]) {
    let rows = cells(path);
    let row = rows.iter().find(|row| {
        (row["layer_id"].as_str(), row["stage"].as_str()) == entry && own.iter().all(|(name, cell)| row[*name] == *cell)
    });
    let row = row.unwrap();
    for (column, expected) in expected {
        let equal = row[*column] == *expected || column.ends_with("cosine") && close(&row[*column], expected, COSINE);
        assert!(equal, "{entry:?} {own:?}, {column}: expected {expected}, got {}", row[*column]);
    }
}

const LAYER_2: (&str, &str) = ("2", "prefill");

#[test]
fn synthetic_dump_gives_the_figures_of_the_reference_by_entry() {
    let folder = synthetic("lossy-compare", DType::F16, &["--bits-list", "4,8,10"]);
    let path = folder.path().join("out/lossy_compare.csv");
    for (method, bits, ratios, errors, cosine) in [
        (
            "quant_only",
            "4",
            ("6.014095536413469", "2.3153451914380465"),
            ("1.0826586484909058", "0.08794733881950378"),
            "0.9560415",
        ),
        (
            "quant_only",
            "8",
            ("1.95618950585838", "1.4944541739638062"),
            ("0.06149757653474808", "0.004695745185017586"),
            "0.9998614",
        ),
        (
            "quant_only",
            "10",
            ("1.6473616473616473", "1.4050493962678376"),
            ("0.015344923362135887", "0.0011869351146742702"),
            "0.9999915",
        ),
        (
            "clip_percentile",
            "0",
            ("1.2286034234522476", "1.2313612313612314"),
            ("0.08930256962776184", "0.0021270751021802425"),
            "0.9890377",
        ),
        ("clip_sigma", "0", ("1.2307692307692308", "1.2313612313612314"), ("0.26304930448532104", "0.0"), "0.9622115"),
        (
            "clip_percentile+quant",
            "8",
            ("1.8731707317073172", "1.4959096221269965"),
            ("0.1268233209848404", "0.00639995327219367"),
            "0.9890414",
        ),
        (
            "clip_sigma+quant",
            "8",
            ("1.7881257275902211", "1.4944541739638062"),
            ("0.288065642118454", "0.004695745185017586"),
            "0.9621289",
        ),
    ] {
        let expected = [
            ("k_ratio", ratios.0),
            ("v_ratio", ratios.1),
            ("k_mae", errors.0),
            ("v_mae", errors.1),
            ("k_cosine", cosine),
        ];
        check(&path, LAYER_2, &[("method", method), ("bits", bits)], &expected);
    }
    let expected = [("k_ratio", "1.391304347826087"), ("v_ratio", "1.056105610561056")];
    check(&path, ("3", "decode"), &[("method", "quant_only"), ("bits", "8")], &expected);

    let folder = synthetic("blocknorm", DType::F16, &[]);
    let path = folder.path().join("out/blocknorm_metrics.csv");
    let errors = [("k_mae", "0.01006805244833231"), ("v_mae", "0.0010507485130801797"), ("k_cosine", "0.9999959")];
    let ratios = [("k_ratio", "1.355692850838482"), ("v_ratio", "1.1442193087008343")];
    check(&path, LAYER_2, &[], &[&errors[..], &ratios].concat());
    let expected = [("k_ratio", "1.06312292358804"), ("v_ratio", "0.9248554913294798")];
    check(&path, ("3", "decode"), &[], &expected);

    let folder = synthetic("mixed", DType::F16, &[]);
    let out = folder.path().join("out");
    let ratios = [("k_ratio", "1.734809125818839"), ("v_ratio", "1.7450579413769598")];
    check(&out.join("mixed_layer_metrics.csv"), LAYER_2, &[], &ratios);
    let errors = [
        ("k_mae", "0.010054993443191051"),
        ("v_mae", "0.005465666763484478"),
        ("k_rmse", "0.02618311159312725"),
        ("k_max_abs", "0.234375"),
        ("k_cosine", "0.9999948"),
    ];
    check(&out.join("lossy_error_metrics.csv"), LAYER_2, &[], &errors);
}

#[test]
fn synthetic_dump_gives_the_figures_of_the_reference_in_every_mode() {
    let lossless = [("gear-delta", "1.21866074262139"), ("gear", "1.1648718337630821"), ("zstd", "1.0829103214890017")];
    for (mode, expected) in lossless {
        let folder = synthetic("mixed", DType::F16, &["--lossy-method", "quant", "--compress-mode", mode]);
        let path = folder.path().join("out/mixed_layer_metrics.csv");
        check(&path, ("1", "prefill"), &[("lossless", "True")], &[("k_ratio", expected)]);
        let (k, v) = if mode == "gear-delta" {
            ("1.95618950585838", "1.4944541739638062")
        } else {
            ("1.913303437967115", "1.4676094018727308")
        };
        check(&path, LAYER_2, &[("lossless", "False")], &[("k_ratio", k), ("v_ratio", v)]);
    }
    let folder = synthetic("mixed", DType::F32, &[]);
    let out = folder.path().join("out");
    let ratios = [("k_ratio", "2.8683473389355743"), ("v_ratio", "2.875865942707358")];
    check(&out.join("mixed_layer_metrics.csv"), LAYER_2, &[], &ratios);
    check(&out.join("lossy_error_metrics.csv"), LAYER_2, &[], &[("k_mae", "0.010833590291440487")]);
    let folder = synthetic("lossy-compare", DType::F32, &["--modes", "quant"]);
    let expected =
        [("k_ratio", "2.490272373540856"), ("v_ratio", "1.4877954281286323"), ("k_mae", "0.06146632134914398")];
    check(&folder.path().join("out/lossy_compare.csv"), LAYER_2, &[], &expected);
    let folder = synthetic("blocknorm", DType::F32, &[]);
    let expected =
        [("k_ratio", "1.5421686746987953"), ("v_ratio", "1.125769569041337"), ("k_mae", "0.010086685419082642")];
    check(&folder.path().join("out/blocknorm_metrics.csv"), LAYER_2, &[], &expected);
}

#[test]
fn synthetic_dump_gives_the_summaries_of_the_reference() {
    let summary =
        |folder: &tempfile::TempDir, file: &str| fs::read_to_string(folder.path().join("out").join(file)).unwrap();
    let holds =
        |text: &str, lines: &[&str]| lines.iter().for_each(|line| assert!(text.contains(line), "{line}\n{text}"));

    let text = summary(&synthetic("mixed", DType::F16, &[]), "mixed_summary.md");
    holds(&text, &["K ratio: 1.423\n", "V ratio: 1.433\n", "KV ratio: 1.428\n", "K: 1.216\n- V: 1.225\n"]);
    holds(&text, &["K: 1.708\n- V: 1.719\n", "K MAE: 0.010483\n- K RMSE: 0.029600\n- K max_abs (avg): 0.312500\n"]);
    holds(&text, &["K cosine: 0.999994\n"]);
    let text = summary(&synthetic("mixed", DType::F16, &["--lossy-method", "quant"]), "mixed_summary.md");
    holds(&text, &["K ratio: 1.508\n", "V ratio: 1.354\n", "KV ratio: 1.427\n", "K: 1.972\n- V: 1.510\n"]);
    holds(&text, &["K MAE: 0.068454\n", "V MAE: 0.004752\n"]);
    let text = summary(&synthetic("blocknorm", DType::F16, &[]), "blocknorm_summary.md");
    holds(
        &text,
        &["K ratio: 1.350\n", "V ratio: 1.135\n", "KV ratio: 1.233\n", "K MAE: 0.011242\n", "V MAE: 0.001060\n"],
    );

    let folder = synthetic("blocknorm-sweep", DType::F16, &[]);
    let (_, rows) = table(&folder.path().join("out/blocknorm_sweep.csv"));
    assert_eq!(rows.len(), 18);
    assert_eq!(rows[0][0], "bs128_topk0.02_b8");
    assert_eq!(rows[0][4..7], ["1.8241042345276872", "1.4385321100917432", "1.6085350841198194"]);
    assert_eq!((rows[1][0].as_str(), &rows[1][6]), ("bs256_topk0.02_b8", &rows[0][6]));
    assert_eq!((rows[17][0].as_str(), rows[17][6].as_str()), ("bs64_topk0.1_b10", "1.3483532547940493"));
    let mut errors: Vec<_> = rows.iter().map(|row| &row[7..11]).collect();
    errors.sort();
    errors.dedup();
    assert_eq!(errors.len(), 4);
    assert!(rows.iter().all(|row| row[12] == "False"));
    let text = summary(&folder, "blocknorm_best.md");
    assert!(text.contains("- Passing precision: 0\n") && text.ends_with("\n## Top Passing Precision\n"), "{text}");
    let one = ["--block-sizes", "64", "--topk-ratios", "0.05", "--bits-list", "10", "--max-k-mae", "0.02"];
    let folder = synthetic("blocknorm-sweep", DType::F16, &one);
    let (_, rows) = table(&folder.path().join("out/blocknorm_sweep.csv"));
    assert_eq!((rows[0][6].as_str(), rows[0][12].as_str(), rows.len()), ("1.3576933067798078", "True", 1));

    let grid = ["--block-sizes", "128", "--bits-list", "8"];
    let (_, rows) = table(&synthetic("blocknorm-sweep", DType::F32, &grid).path().join("out/blocknorm_sweep.csv"));
    for (row, (kv, mae)) in
        rows.iter().zip([("1.83055", "0.051230865"), ("1.82884", "0.051229115"), ("1.82543", "0.051226521")])
    {
        let [got_kv, got_mae] = [&row[6], &row[7]].map(|cell| cell.parse::<f64>().unwrap());
        assert_eq!((format!("{got_kv:.5}").as_str(), format!("{got_mae:.9}").as_str()), (kv, mae));
    }
}

#[test]
fn streams_are_measured_beside_the_columns_of_the_reference() {
    let folder = synthetic("lossy-compare", DType::F16, &["--bits-list", "8"]);
    for row in cells(&folder.path().join("out/lossy_compare.csv")) {
        let number = |column: &str| row[column].parse::<f64>().unwrap();
        let values: f64 = row["seq_len"].parse::<f64>().unwrap() * 160.0;
        for role in ["k", "v"] {
            let [ratio, bytes, bits] =
                ["ratio", "actual_bytes", "bits_per_value"].map(|column| number(&format!("{role}_{column}")));
            // Frames, and a header of 4 or 5 bytes for each of them.
            let frames = (2.0 * values / ratio).round();
            assert!((frames + 3.0..=frames + 5.0).contains(&bytes), "{frames} {bytes}");
            assert!((bits - 8.0 * bytes / values).abs() < 1e-12);
            let cosine = number(&format!("{role}_cosine"));
            assert!(
                number(&format!("{role}_worst_head_cosine")) <= cosine + 1e-9,
                "no head is worse than all together"
            );
            assert!(number(&format!("{role}_worst_head")) < 2.0);
            assert!((0.0..1.0).contains(&number(&format!("{role}_nmse"))));
        }
        assert_eq!((row["run_id"].as_str(), row["dtype"].as_str()), ("synthetic", "f16"));
        assert_eq!(row["k_logit_error"], "", "the dump has no queries");
    }
    let Some(dump) = dump("fp16") else { return };
    let out = tempfile::tempdir().unwrap();
    let flags = ["--modes", "quant", "--bits-list", "4,8", "--stage", "prefill"];
    run(&[&["exp", "lossy-compare", "--dump-dir", text(&dump), "--out-dir", text(out.path())], &flags[..]].concat(), 0);
    let rows = cells(&out.path().join("lossy_compare.csv"));
    for pair in rows.chunks(2) {
        let [few, many] = [&pair[0], &pair[1]].map(|row| row["k_logit_error"].parse::<f64>().unwrap());
        assert!(many > 0.0 && many < few, "{many} {few}");
    }
}

#[test]
fn saved_settings_hold_the_files_of_single_runs_and_threads_do_not_matter() {
    let flags = ["--block-sizes", "16,64", "--topk-ratios", "0.5,1", "--bits-list", "6", "--save-combo"];
    let sweep = synthetic("blocknorm-sweep", DType::F32, &flags);
    let single = synthetic("blocknorm", DType::F32, &["--block-size", "16", "--topk-ratio", "1", "--bits", "6"]);
    for file in ["blocknorm_metrics.csv", "blocknorm_summary.md"] {
        let [ours, theirs] =
            [sweep.path().join("out/bs16_topk1.0_b6").join(file), single.path().join("out").join(file)]
                .map(|path| fs::read_to_string(path).unwrap());
        assert_eq!(ours, theirs, "{file}");
    }
    let dump = sweep.path().join("dump");
    let again = sweep.path().join("again");
    let paths = ["exp", "blocknorm-sweep", "--dump-dir", text(&dump), "--out-dir", text(&again)];
    let output = gearbox().args([&paths[..], &flags].concat()).env("RAYON_NUM_THREADS", "1").output().unwrap();
    assert!(output.status.success());
    let [one, two] = ["again", "out"]
        .map(|name| fs::read_to_string(sweep.path().join(name).join("bs16_topk1.0_b6/blocknorm_metrics.csv")).unwrap());
    assert_eq!(one, two);

    // A smaller grid in the same folder: the other settings are refused, or removed.
    let fewer =
        [&paths[..4], &["--out-dir", text(&again), "--save-combo", "--bits-list", "6", "--block-sizes", "16"]].concat();
    let message = stderr(&[&fewer[..], &["--topk-ratios", "1"]].concat(), 2);
    assert!(message.contains("--overwrite"), "{message}");
    run(&[&fewer[..], &["--topk-ratios", "1", "--overwrite"]].concat(), 0);
    assert!(!again.join("bs64_topk0.5_b6/blocknorm_metrics.csv").exists());
    assert!(again.join("bs16_topk1.0_b6/blocknorm_metrics.csv").exists());
}

#[test]
fn optional_file_of_an_earlier_run_is_refused_or_removed() {
    let folder = synthetic("mixed", DType::F16, &[]);
    let (dump, out) = (folder.path().join("dump"), folder.path().join("out"));
    let flags = ["exp", "mixed", "--dump-dir", text(&dump), "--out-dir", text(&out), "--lossless-first-n", "4"];
    for file in ["mixed_layer_metrics.csv", "mixed_summary.md"] {
        fs::remove_file(out.join(file)).unwrap();
    }
    let message = stderr(&flags, 2);
    assert!(message.contains("lossy_error_metrics.csv`: left by an earlier run"), "{message}");
    assert!(!out.join("mixed_summary.md").exists());
    let printed = json(&[&flags[..], &["--overwrite"]].concat());
    assert_eq!((&printed["dumps"], &printed["lossy_dumps"]), (&5.into(), &0.into()));
    assert!(out.join("mixed_summary.md").exists() && !out.join("lossy_error_metrics.csv").exists());
}

#[test]
fn bad_flags_are_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let (dump, out) = (folder.path().join("dump"), folder.path().join("out"));
    write_synthetic(&dump, DType::F16);
    for (experiment, flags, expected) in [
        ("mixed", ["--lossy-bits", "1"], "expected 2 to 24 bits, got `1`"),
        ("mixed", ["--lossy-mantissa-bits", "24"], "24 is not in 0..=23"),
        ("mixed", ["--lossy-method", "round"], "[possible values: truncate, quant]"),
        ("blocknorm", ["--block-size", "0"], "expected a block of at least 1 channel, got `0`"),
        ("blocknorm", ["--topk-ratio", "1.01"], "expected a share of 0 to 1, got `1.01`"),
        ("blocknorm", ["--bits", "25"], "expected 2 to 24 bits, got `25`"),
        ("blocknorm-sweep", ["--bits-list", "8,,x"], "expected 2 to 24 bits, got `x`"),
        ("blocknorm-sweep", ["--block-sizes", ","], "expected at least one value, got none"),
        ("lossy-compare", ["--clip-percentiles", "99,1"], "the lower one first, got `99,1`"),
        ("lossy-compare", ["--clip-sigma", "0"], "expected a number above 0, got `0`"),
        ("lossy-compare", ["--modes", "clip,quan"], "mode `quan` is unknown; did you mean `quant`"),
        ("lossy-compare", ["--lossless-first-n", "9"], "no entry of layer 9 or above is left"),
    ] {
        let paths = ["exp", experiment, "--dump-dir", text(&dump), "--out-dir", text(&out)];
        let message = stderr(&[&paths[..], &flags].concat(), 2);
        assert!(message.contains(expected), "{message}");
        assert!(!out.exists());
    }
}
