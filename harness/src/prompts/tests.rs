use super::*;
use crate::exp::samples::parse;

/// One token per character.
struct Characters;

impl CountTokens for Characters {
    fn count(&self, text: &str) -> Result<usize> {
        Ok(text.chars().count())
    }
}

fn cut(head: &str, last: &str, ends: &[usize], target: usize) -> String {
    closest(&Characters, head, last, ends, target).unwrap().0
}

#[test]
fn nearest_cut_wins_and_keeps_line_breaks() {
    let last = "ab\ncdef g";
    let words = [2, 7];
    for (target, expected) in [(1, "ab"), (3, "ab"), (4, "ab"), (5, "ab\ncdef"), (7, "ab\ncdef"), (9, "ab\ncdef")] {
        assert_eq!(cut("", last, &words, target), expected, "{target}");
    }
    assert_eq!(cut("head", last, &words, 5), "head", "nothing of the last piece is nearest");
    assert_eq!(cut("head", last, &words, 8), "head\n\nab");
    assert_eq!(cut("", "abc", &[], 2), "");
}

/// Runs with a corpus of paragraphs and gives status, prompts and manifest.
fn run(folder: &Path, corpus: &str, flags: &[&str]) -> Result<(Status, Vec<String>, Vec<Value>)> {
    let [text, out] = ["corpus.txt", "out"].map(|name| folder.join(name));
    fs::write(&text, corpus).unwrap();
    let paths = ["--corpus", text.to_str().unwrap(), "--out-dir", out.to_str().unwrap()];
    let status = parse::<PromptsArgs>(&[&paths[..], flags].concat()).unwrap().run(false)?;
    let manifest = fs::read_to_string(out.join(MANIFEST)).unwrap();
    let records: Vec<Value> = manifest.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let read = |record: &Value| fs::read_to_string(record["file"].as_str().unwrap()).unwrap();
    Ok((status, records.iter().map(read).collect(), records))
}

const APPROX: [&str; 5] = ["--tokenizer", "approx", "--min-piece-chars", "1", "--per-target"];

#[test]
fn prompts_join_pieces_and_meet_their_length() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = (0..20).map(|i| format!("p{i} one two\nthree four")).collect::<Vec<_>>().join("\n\n");
    let flags = [&APPROX[..], &["2", "--targets", "7,10"]].concat();
    let (status, texts, records) = run(folder.path(), &corpus, &flags).unwrap();
    assert_eq!((status, texts.len()), (Status::Pass, 4));
    for (text, record) in texts.iter().zip(&records) {
        let count = Words.count(text).unwrap();
        assert_eq!(record["target_tokens"], count);
        assert_eq!((&record["actual_tokens"], &record["tokenizer"]), (&count.into(), &"approx".into()));
        assert_eq!((&record["within_tolerance"], &record["seed"]), (&true.into(), &42.into()));
        assert_eq!(text.matches("\n\n").count(), 1, "{text}");
        assert!(!text.contains('\\') && !text.ends_with(char::is_whitespace) && text.contains("two\nthree"), "{text}");
        assert_eq!(record["pieces"].as_array().unwrap().len(), 2);
    }
    // No piece is used again before the others.
    let used: BTreeSet<_> =
        records.iter().flat_map(|record| record["pieces"].as_array().unwrap()).map(Value::to_string).collect();
    assert_eq!(used.len(), 8);

    let again = tempfile::tempdir().unwrap();
    assert_eq!(run(again.path(), &corpus, &flags).unwrap().1, texts, "the same seed");
    assert_ne!(run(again.path(), &corpus, &[&flags[..], &["--seed", "1", "--overwrite"]].concat()).unwrap().1, texts);
}

#[test]
fn existing_prompts_are_refused_or_replaced_with_their_records() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = "a b c d e f g h";
    let flags = [&APPROX[..], &["1", "--targets"]].concat();
    assert_eq!(run(folder.path(), corpus, &[&flags[..], &["4"]].concat()).unwrap().1, ["a b c d"]);
    assert!(
        run(folder.path(), corpus, &[&flags[..], &["4"]].concat()).unwrap_err().to_string().contains("exists already")
    );
    let (_, texts, _) = run(folder.path(), corpus, &[&flags[..], &["3"]].concat()).unwrap();
    assert_eq!(texts, ["a b c d", "a b c"], "the manifest grows");
    let (_, texts, _) = run(folder.path(), corpus, &[&flags[..], &["4", "--overwrite"]].concat()).unwrap();
    assert_eq!(texts, ["a b c", "a b c d"], "and says one thing of each file");
}

#[test]
fn prompt_that_misses_its_length_fails() {
    let folder = tempfile::tempdir().unwrap();
    let (status, texts, records) =
        run(folder.path(), "a b c", &[&APPROX[..], &["1", "--targets", "9"]].concat()).unwrap();
    assert_eq!((status, texts[0].as_str()), (Status::Fail, "a b c"));
    assert_eq!(records[0]["within_tolerance"], false);
}

#[test]
fn bad_flags_and_tokenizers_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let none = folder.path().to_str().unwrap();
    for (flags, message) in [
        (&["--targets", "0"][..], "--targets: expected at least 1 token, got 0"),
        (&["--targets", "4,4"], "--targets: expected each length once, got [4, 4]"),
        (&["--tolerance", "nan"], "--tolerance: expected 0 to 1, got NaN"),
        (&["--tokenizer", "mnn"], "--tokenizer mnn: needs the engine of the reference"),
        (&["--tokenizer", "hf", "--hf-path", none], "tokenizer.json`: No such file"),
        (&["--strict", "--hf-path", none], "tokenizer.json`: No such file"),
    ] {
        let error = run(folder.path(), "a b c", flags).unwrap_err().to_string();
        assert!(error.contains(message), "{flags:?}: {error}");
    }
    let flags = ["--hf-path", none, "--targets", "2", "--min-piece-chars", "1"];
    assert_eq!(run(folder.path(), "a b c", &flags).unwrap().2[0]["tokenizer"], "approx");
    let strict = [&APPROX[..], &["1", "--strict", "--targets", "2", "--overwrite"]].concat();
    assert_eq!(run(folder.path(), "a b c", &strict).unwrap().0, Status::Pass, "words were asked for");
}
