//! Pieces of text from files.

use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use gearbox_core::{Error, Result};
use serde_json::Value;

/// A text that is used as a whole, or cut at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub text: String,
    /// File and number, counted from 1: of the paragraph, or of the line of JSON.
    pub source: String,
}

/// What rows of JSON hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum JsonlFormat {
    /// A question with choices, or else a text
    Auto,
    /// `question`, `prompt` or `input`, and `choices` or `options`
    Mmlu,
    /// `text`, `prompt`, `input` or `question`
    Text,
}

/// The pieces of all files, in the order of the paths and of the names in folders.
pub(super) fn pieces(paths: &[PathBuf], format: JsonlFormat, min_chars: usize) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    for path in paths {
        if path.is_dir() {
            let mut files = Vec::new();
            for item in fs::read_dir(path).map_err(|error| Error::io(path, &error))? {
                files.push(item.map_err(|error| Error::io(path, &error))?.path());
            }
            files.sort();
            for file in files.iter().filter(|file| is_json(file) || has_ending(file, &["txt"])) {
                read(file, format, min_chars, &mut pieces)?;
            }
        } else {
            read(path, format, min_chars, &mut pieces)?;
        }
    }
    if pieces.is_empty() {
        let message = "expected text in the corpus, got no piece that is long enough, see --min-piece-chars";
        return Err(Error::invalid_input(message));
    }
    Ok(pieces)
}

fn has_ending(path: &Path, endings: &[&str]) -> bool {
    path.extension().and_then(|ending| ending.to_str()).is_some_and(|ending| endings.contains(&ending))
}

fn is_json(path: &Path) -> bool {
    has_ending(path, &["jsonl", "json"])
}

fn read(path: &Path, format: JsonlFormat, min_chars: usize, pieces: &mut Vec<Piece>) -> Result<()> {
    let bytes = fs::read(path).map_err(|error| Error::io(path, &error))?;
    // Bytes that are no UTF-8 are dropped.
    let text: String = bytes.utf8_chunks().map(|chunk| chunk.valid()).collect();
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let source = |number: usize| format!("{}#{}", path.display(), number + 1);
    if is_json(path) {
        let mut unusable = 0;
        for (line, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
            match serde_json::from_str(text).ok().and_then(|row| row_text(&row, format)) {
                Some(text) => pieces.push(Piece { text, source: source(line) }),
                None => unusable += 1,
            }
        }
        if unusable > 0 {
            tracing::warn!("`{}`: {unusable} rows hold no text", path.display());
        }
        return Ok(());
    }
    for (number, text) in paragraphs(&text).into_iter().enumerate() {
        if text.chars().count() >= min_chars {
            pieces.push(Piece { text, source: source(number) });
        }
    }
    Ok(())
}

/// What stands between blank lines.
fn paragraphs(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let blocks = lines.split(|line| line.trim().is_empty()).map(|block| block.join("\n").trim().to_owned());
    blocks.filter(|block| !block.is_empty()).collect()
}

/// The text of a row of JSON, if it holds any.
fn row_text(row: &Value, format: JsonlFormat) -> Option<String> {
    match format {
        JsonlFormat::Mmlu => question(row),
        JsonlFormat::Text => first_text(row, &["text", "prompt", "input", "question"]),
        JsonlFormat::Auto => question(row).or_else(|| row_text(row, JsonlFormat::Text)),
    }
}

/// The first of these fields that holds text.
fn first_text(row: &Value, names: &[&str]) -> Option<String> {
    let mut texts = names.iter().filter_map(|name| row.get(name)?.as_str()).filter(|text| !text.is_empty());
    texts.next().map(|text| text.trim().to_owned())
}

/// A question and its choices, each in a line.
fn question(row: &Value) -> Option<String> {
    let question = first_text(row, &["question", "prompt", "input"])?;
    let mut lists = ["choices", "options"].into_iter().filter_map(|name| row.get(name)?.as_array());
    let choices = lists.find(|choices| !choices.is_empty())?;
    let lines = choices.iter().enumerate().map(|(idx, choice)| {
        let label = u8::try_from(idx).ok().filter(|idx| *idx < 26);
        let label = label.map_or_else(|| format!("Choice{}", idx + 1), |idx| char::from(b'A' + idx).to_string());
        let choice = choice.as_str().map_or_else(|| choice.to_string(), ToOwned::to_owned);
        format!("\n{label}. {}", choice.trim())
    });
    Some(lines.fold(format!("Q: {question}"), |text, line| text + &line))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn paragraphs_end_at_blank_lines() {
        let text = "\n a b\nc \n \t\n\n\nd\n";
        assert_eq!(paragraphs(text), ["a b\nc", "d"]);
        assert!(paragraphs(" \n").is_empty());
    }

    #[test]
    fn rows_are_questions_or_texts() {
        let row = json!({ "question": " Why? ", "options": ["x ", 7], "choices": [], "text": "t" });
        let asked = "Q: Why?\nA. x\nB. 7";
        assert_eq!(row_text(&row, JsonlFormat::Auto).as_deref(), Some(asked));
        assert_eq!(row_text(&row, JsonlFormat::Mmlu).as_deref(), Some(asked));
        assert_eq!(row_text(&row, JsonlFormat::Text).as_deref(), Some("t"));
        let row = json!({ "text": "", "prompt": " p " });
        assert_eq!(row_text(&row, JsonlFormat::Auto).as_deref(), Some("p"));
        assert_eq!(row_text(&row, JsonlFormat::Mmlu), None);
        assert_eq!(row_text(&json!(["t"]), JsonlFormat::Auto), None);
        let many = json!({ "question": "q", "choices": vec!["c"; 27] });
        let text = question(&many).unwrap();
        assert!(text.contains("\nZ. c\nChoice27. c"), "{text}");
    }

    #[test]
    fn files_of_a_folder_are_read_in_order_and_short_pieces_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("b.txt"), b"long \xFFenough\r\rshort\r\nand long").unwrap();
        fs::write(path("a.jsonl"), "{\"text\": \"x\"}\n\nbroken\n[1]\n{\"text\": \"y\"}\n").unwrap();
        fs::write(path("c.md"), "long enough too").unwrap();
        let name = |name: &str| path(name).display().to_string();
        let found = pieces(&[folder.path().to_path_buf()], JsonlFormat::Auto, 10).unwrap();
        let found: Vec<_> = found.iter().map(|piece| (piece.text.as_str(), piece.source.clone())).collect();
        let expected = [
            ("x", name("a.jsonl") + "#1"),
            ("y", name("a.jsonl") + "#5"),
            ("long enough", name("b.txt") + "#1"),
            ("short\nand long", name("b.txt") + "#2"),
        ];
        assert_eq!(found, expected);
        assert_eq!(pieces(&[path("c.md")], JsonlFormat::Auto, 10).unwrap().len(), 1, "a file that is named is a text");
        assert!(pieces(&[path("c.md")], JsonlFormat::Auto, 100).is_err());
        assert!(pieces(&[path("z")], JsonlFormat::Auto, 1).is_err());
    }
}
