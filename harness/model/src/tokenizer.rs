//! `tokenizer.json`: text to token ids and back.

use std::path::Path;

use gearbox_core::{Error, Result};

/// A tokenizer of the Hugging Face `tokenizers` library.
///
/// # Examples
/// ```
/// use gearbox_model::Tokenizer;
///
/// let folder = gearbox_model::bundled()?;
/// let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"))?;
/// let ids = tokenizer.encode("It was a dark night.")?;
/// assert_eq!(tokenizer.decode(&ids)?, "It was a dark night.");
/// # Ok::<(), gearbox_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tokenizer(tokenizers::Tokenizer);

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if it is none.
    pub fn load(path: &Path) -> Result<Self> {
        let loaded = tokenizers::Tokenizer::from_file(path);
        loaded.map(Self).map_err(|error| Error::invalid_input(format!("`{}`: {error}", path.display())))
    }

    /// Ids of a text, with the tokens that the model expects around it, such as one for the beginning.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if the tokenizer has no token for a part of it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, true)
    }

    /// Ids of a text that stands in the middle of another: without tokens around it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_part(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, false)
    }

    fn ids(&self, text: &str, whole: bool) -> Result<Vec<u32>> {
        let encoded = self.0.encode_fast(text, whole);
        encoded.map(|encoded| encoded.get_ids().to_vec()).map_err(|error| Error::invalid_input(error.to_string()))
    }

    /// Text of token ids, without special tokens.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](gearbox_core::ErrorKind::InvalidInput) if they make no text.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.0.decode(ids, true).map_err(|error| Error::invalid_input(error.to_string()))
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.0.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }
}
