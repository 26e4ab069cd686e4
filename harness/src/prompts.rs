//! `gearbox prompts`: prompt files of wanted lengths in tokens, cut from a corpus.
//!
//! The reference meant to cut texts at blank lines, to join pieces by line feeds and to write one record per line, and did none of it;
//! a prompt that missed its length passed. Here it does, and such a prompt makes the command fail.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use gearbox_core::{Error, Result};
use serde::Serialize;
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use self::corpus::{JsonlFormat, Piece};
use self::twister::Twister;
use crate::exp::Outputs;
use crate::report;
use crate::status::Status;

mod corpus;
#[cfg(test)]
mod tests;
mod twister;

/// What stands between two pieces of a prompt.
const JOINER: &str = "\n\n";
/// One line for each prompt.
const MANIFEST: &str = "prompts_manifest.jsonl";

/// Writes prompt files of wanted lengths in tokens.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Writes prompt_<TARGET>_<NUMBER>.txt and a line for each in prompts_manifest.jsonl: lengths, tokenizer, seed, hash, pieces.
Exit status: 0, 1 if a prompt misses its length because the corpus is too short or cannot be cut there, 2 for bad input."
)]
pub struct PromptsArgs {
    /// Config of a model, beside whose tokenizer.json it lies [default: the bundled model]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Texts, or JSON lines in .jsonl and .json, or folders of them
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    corpus: Vec<PathBuf>,
    /// Folder for the prompts; created if needed
    #[arg(long, value_name = "DIR", default_value = "exp/gear_fp16/prompts")]
    out_dir: PathBuf,
    /// Wanted lengths in tokens, separated by commas
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',', default_values_t = [128, 512, 2048])]
    targets: Vec<usize>,
    /// Prompts of each length
    #[arg(long, value_name = "COUNT", default_value_t = 3)]
    per_target: usize,
    /// Seed of the order of pieces
    #[arg(long, value_name = "NUMBER", default_value_t = 42, allow_negative_numbers = true)]
    seed: i64,
    /// Shortest piece of a text that is used, in characters
    #[arg(long, value_name = "CHARS", default_value_t = 200)]
    min_piece_chars: usize,
    /// Share of the wanted length by which a prompt may differ
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    tolerance: f64,
    /// What counts tokens
    #[arg(long, value_enum, default_value_t = Tokenizer::Auto)]
    tokenizer: Tokenizer,
    /// What rows of JSON hold
    #[arg(long, value_enum, default_value_t = JsonlFormat::Auto)]
    jsonl_format: JsonlFormat,
    /// Folder with a tokenizer.json, instead of that of the config
    #[arg(long, value_name = "DIR")]
    hf_path: Option<PathBuf>,
    /// Never count words in place of a tokenizer that cannot be read
    #[arg(long)]
    strict: bool,
    /// Replace existing prompts
    #[arg(long)]
    overwrite: bool,
}

/// What counts tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tokenizer {
    /// The tokenizer of the model, or else words
    Auto,
    /// The engine of the reference, which is not part of this program
    Mnn,
    /// The tokenizer.json of the model
    Hf,
    /// Words between white space: far from tokens
    Approx,
}

/// Counts the tokens of a text, special ones aside.
pub trait CountTokens {
    /// Number of tokens.
    ///
    /// # Errors
    /// What the tokenizer reports.
    fn count(&self, text: &str) -> Result<usize>;
}

impl CountTokens for gearbox_model::Tokenizer {
    fn count(&self, text: &str) -> Result<usize> {
        Ok(self.encode_part(text)?.len())
    }
}

/// Words between white space.
struct Words;

impl CountTokens for Words {
    fn count(&self, text: &str) -> Result<usize> {
        // The reference's language takes these four for white space too.
        Ok(text
            .split(|c: char| c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}'))
            .filter(|w| !w.is_empty())
            .count())
    }
}

/// One line of the manifest: the reference's fields, then ours.
#[derive(Clone, Debug, Serialize)]
struct Record {
    file: String,
    target_tokens: usize,
    actual_tokens: usize,
    tokenizer: &'static str,
    chars: usize,
    within_tolerance: bool,
    seed: i64,
    /// Hash of the file (XXH3).
    xxh3: String,
    /// Where its pieces are from.
    pieces: Vec<String>,
}

impl PromptsArgs {
    /// Writes the prompts and prints where they are.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) for a corpus without pieces, existing prompts or a tokenizer that
    /// cannot be read; [`ErrorKind::Unsupported`](gearbox_core::ErrorKind::Unsupported) for the tokenizer `mnn`; else what reading and
    /// writing report.
    pub fn run(&self, json: bool) -> Result<Status> {
        self.check()?;
        let (counter, tokenizer) = self.counter()?;
        let mut pieces = corpus::pieces(&self.corpus, self.jsonl_format, self.min_piece_chars)?;
        Twister::new(self.seed.unsigned_abs()).shuffle(&mut pieces);

        let targets = || self.targets.iter().flat_map(|&target| (1..=self.per_target).map(move |idx| (target, idx)));
        let names: Vec<String> = targets().map(|(target, idx)| format!("prompt_{target}_{idx}.txt")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut outputs = Outputs::create(&self.out_dir, &names, &[], self.overwrite)?;
        let mut records = Vec::new();
        let mut cursor = 0;
        for (place, (target, _)) in targets().enumerate() {
            let prompt = self.prompt(&*counter, &pieces, &mut cursor, target)?;
            outputs.write_text(place, &prompt.text)?;
            records.push(Record {
                file: self.out_dir.join(names[place]).display().to_string(),
                target_tokens: target,
                actual_tokens: prompt.tokens,
                tokenizer,
                chars: prompt.text.chars().count(),
                within_tolerance: self.holds(prompt.tokens, target),
                seed: self.seed,
                xxh3: format!("{:016x}", xxh3_64(prompt.text.as_bytes())),
                pieces: prompt.pieces,
            });
        }
        let manifest = self.out_dir.join(MANIFEST);
        outputs.join(Outputs::file(&manifest, true)?);
        outputs.write_text(names.len(), &lines(&manifest, &records)?)?;
        outputs.commit()?;

        let missed: Vec<&Record> = records.iter().filter(|record| !record.within_tolerance).collect();
        for Record { file, target_tokens, actual_tokens, .. } in &missed {
            tracing::warn!("`{file}`: expected about {target_tokens} tokens, got {actual_tokens}");
        }
        if json {
            report::print_json(&json!({ "tokenizer": tokenizer, "manifest": manifest, "prompts": records }))?;
        } else {
            report::print(&format!("Tokenizer: {tokenizer}"))?;
            report::print(&format!("Wrote {} prompts to {}", records.len(), self.out_dir.display()))?;
            report::print(&format!("Manifest: {}", manifest.display()))?;
        }
        Ok(Status::pass_if(missed.is_empty()))
    }

    fn check(&self) -> Result<()> {
        if self.targets.contains(&0) {
            return Err(Error::invalid_config("--targets: expected at least 1 token, got 0"));
        }
        if self.targets.iter().collect::<BTreeSet<_>>().len() < self.targets.len() {
            return Err(Error::invalid_config(format!("--targets: expected each length once, got {:?}", self.targets)));
        }
        if !(0.0..1.0).contains(&self.tolerance) {
            return Err(Error::invalid_config(format!("--tolerance: expected 0 to 1, got {}", self.tolerance)));
        }
        Ok(())
    }

    /// What counts tokens, and its name in the manifest.
    fn counter(&self) -> Result<(Box<dyn CountTokens>, &'static str)> {
        match self.tokenizer {
            Tokenizer::Mnn => Err(Error::unsupported(
                "--tokenizer mnn: needs the engine of the reference; `hf` reads the tokenizer.json of the model",
            )),
            Tokenizer::Approx => Ok((Box::new(Words), "approx")),
            Tokenizer::Hf => Ok((self.model()?, "hf")),
            Tokenizer::Auto => match self.model() {
                Ok(counter) => Ok((counter, "hf")),
                Err(error) if self.strict => Err(error),
                Err(error) => {
                    tracing::warn!("words are counted, not tokens: {error}");
                    Ok((Box::new(Words), "approx"))
                }
            },
        }
    }

    /// The tokenizer of the model that the flags name, or of the bundled one.
    fn model(&self) -> Result<Box<dyn CountTokens>> {
        let beside = |config: &PathBuf| config.parent().map(Path::to_path_buf);
        let folder = match self.hf_path.clone().or_else(|| self.config.as_ref().and_then(beside)) {
            Some(folder) => folder,
            None => gearbox_model::bundled()?,
        };
        Ok(Box::new(gearbox_model::Tokenizer::load(&folder.join("tokenizer.json"))?))
    }

    /// Whether a length is near enough.
    fn holds(&self, tokens: usize, target: usize) -> bool {
        tokens.abs_diff(target) as f64 <= self.tolerance * target as f64
    }

    /// Joins pieces from the cursor on until they are long enough, and cuts the last one where the length is nearest.
    fn prompt(&self, counter: &dyn CountTokens, pieces: &[Piece], cursor: &mut usize, target: usize) -> Result<Prompt> {
        let mut prompt = Prompt { text: String::new(), tokens: 0, pieces: Vec::new() };
        let mut head = String::new();
        let mut last = "";
        while prompt.tokens < target && prompt.pieces.len() < pieces.len() {
            let piece = &pieces[*cursor % pieces.len()];
            *cursor += 1;
            head.clone_from(&prompt.text);
            last = &piece.text;
            prompt.text = joined(&head, last);
            prompt.tokens = counter.count(&prompt.text)?;
            prompt.pieces.push(piece.source.clone());
        }
        if prompt.tokens as f64 <= target as f64 * (1.0 + self.tolerance) {
            return Ok(prompt);
        }
        let words = last
            .match_indices(char::is_whitespace)
            .map(|(end, _)| end)
            .filter(|end| !last[..*end].ends_with(char::is_whitespace));
        let words: Vec<usize> = words.collect();
        let characters = || last.char_indices().map(|(end, _)| end).collect::<Vec<_>>();
        (prompt.text, prompt.tokens) = closest(counter, &head, last, &words, target)?;
        if !self.holds(prompt.tokens, target) {
            // Text without spaces, or a very long word.
            (prompt.text, prompt.tokens) = closest(counter, &head, last, &characters(), target)?;
        }
        Ok(prompt)
    }
}

/// A prompt under way.
struct Prompt {
    text: String,
    tokens: usize,
    /// Where its pieces are from.
    pieces: Vec<String>,
}

/// Two texts with a blank line between them; one of them if the other is empty.
fn joined(head: &str, tail: &str) -> String {
    if head.is_empty() || tail.is_empty() { format!("{head}{tail}") } else { format!("{head}{JOINER}{tail}") }
}

/// Of `head` with `last` cut at one of `ends`, the text whose length is nearest to the target, and its length; the shorter one of two.
///
/// More text has about as many tokens or more, so the lengths are searched by halving.
fn closest(
    counter: &dyn CountTokens,
    head: &str,
    last: &str,
    ends: &[usize],
    target: usize,
) -> Result<(String, usize)> {
    let at = |cut: usize| {
        let end = if cut == 0 { 0 } else { ends[cut - 1] };
        let text = joined(head, &last[..end]);
        counter.count(&text).map(|tokens| (text, tokens))
    };
    // The least cut with at least as many tokens; behind the last one if there is none.
    let (mut low, mut high) = (0, ends.len() + 1);
    while low < high {
        let middle = low.midpoint(high);
        if middle <= ends.len() && at(middle)?.1 < target { low = middle + 1 } else { high = middle }
    }
    let below = at(low.saturating_sub(1))?;
    let above = at(low.min(ends.len()))?;
    // An empty prompt is none.
    let is_below = !below.0.is_empty() && below.1.abs_diff(target) <= above.1.abs_diff(target);
    Ok(if is_below || above.0.is_empty() { below } else { above })
}

/// The manifest with these records; what it says of the same files is replaced, the rest stays.
fn lines(path: &Path, records: &[Record]) -> Result<String> {
    let old = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(Error::io(path, &error)),
    };
    let is_new = |line: &str| {
        let value: Value = serde_json::from_str(line).unwrap_or_default();
        records.iter().any(|record| value["file"] == record.file)
    };
    let kept = old.lines().filter(|line| !is_new(line)).map(|line| Ok(line.to_owned()));
    let new = records
        .iter()
        .map(|record| serde_json::to_string(record).map_err(|error| Error::invalid_input(error.to_string())));
    kept.chain(new).map(|line| line.map(|line| line + "\n")).collect()
}
