//! Prompt tokens of runs, from the log of the capturing tool.

use std::collections::BTreeMap;
use std::path::Path;

use gearbox_core::{Error, Result};
use serde_json::Value;

/// Prompt tokens by run.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PromptTokens(BTreeMap<String, u64>);

impl PromptTokens {
    /// Reads a log: one JSON object per line; later lines win.
    ///
    /// A line of a run that failed, by its `returncode` or its `error`, may lack its metrics.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
        Self::parse(&text).map_err(|error| error.context(format!("`{}`", path.display())))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut tokens = BTreeMap::new();
        for (line, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
            let bad = |message: String| Error::invalid_input(message).context(format!("line {}", line + 1));
            let record: Value = serde_json::from_str(text).map_err(|error| bad(format!("expected JSON: {error}")))?;
            if !record.is_object() {
                return Err(bad(format!("expected an object, got {record}")));
            }
            let run =
                record["run_id"].as_str().ok_or_else(|| bad("expected a string in `run_id`, got none".to_owned()))?;
            let metric = &record["metrics"]["prompt_tokens"];
            match (metric.as_u64(), record["returncode"].as_i64()) {
                (Some(count), _) => {
                    tokens.insert(run.to_owned(), count);
                }
                // `run-demo` says why a run does not count.
                (None, Some(code)) if metric.is_null() && (code != 0 || record["error"].is_string()) => {
                    tracing::warn!(
                        "run log, line {}: run `{run}` failed with {code} and has no prompt tokens",
                        line + 1
                    );
                }
                (None, _) => {
                    return Err(bad(format!(
                        "run `{run}`: expected a number of tokens in `metrics.prompt_tokens`, got {metric}"
                    )));
                }
            }
        }
        Ok(Self(tokens))
    }

    /// Prompt tokens of a run, if the log names it.
    pub fn of(&self, run: &str) -> Option<u64> {
        self.0.get(run).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_lines_win_and_blank_ones_are_skipped() {
        let log = "{\"run_id\": \"a\", \"metrics\": {\"prompt_tokens\": 3}}\n\n\
                   {\"run_id\": \"b\", \"returncode\": -9, \"metrics\": {}}\n\
                   {\"run_id\": \"b\", \"returncode\": 0, \"metrics\": {}, \"error\": \"no table\"}\n\
                   {\"run_id\": \"a\", \"returncode\": 0, \"metrics\": {\"prompt_tokens\": 128}}\n";
        let tokens = PromptTokens::parse(log).unwrap();
        assert_eq!((tokens.of("a"), tokens.of("b")), (Some(128), None));
    }

    #[test]
    fn bad_lines_are_named() {
        for (log, message) in [
            ("{", "line 1: expected JSON: EOF while parsing an object at line 1 column 1"),
            ("\n[]", "line 2: expected an object, got []"),
            ("{\"metrics\": {}}", "line 1: expected a string in `run_id`, got none"),
            (
                "{\"run_id\": \"a\", \"returncode\": 0, \"metrics\": {}}",
                "line 1: run `a`: expected a number of tokens in `metrics.prompt_tokens`, got null",
            ),
            (
                "{\"run_id\": \"a\", \"returncode\": 1, \"metrics\": {\"prompt_tokens\": -2}}",
                "line 1: run `a`: expected a number of tokens in `metrics.prompt_tokens`, got -2",
            ),
        ] {
            assert_eq!(PromptTokens::parse(log).unwrap_err().to_string(), message);
        }
    }
}
