//! What every plugin states about itself, whatever its kind.

use std::sync::{Mutex, PoisonError};

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Chunk, ElemSet, Result, Role, Rope};

/// The author's side of a plugin: a strict config struct and constants beside it.
///
/// A plugin implements this and one of [`Codec`](crate::Codec), [`LossyTransform`](crate::LossyTransform) or
/// [`EvictionPolicy`](crate::EvictionPolicy), and submits itself with one macro line such as
/// [`register_codec!`](crate::register_codec).
pub trait Plugin: Sized {
    /// Kebab-case id that describes the method; never reused or renamed.
    const ID: &'static str;
    /// Other spellings that are accepted, such as a former id.
    const ALIASES: &'static [&'static str] = &[];
    /// One line for tables.
    const SUMMARY: &'static str;
    /// Paper or repository that the method comes from, or `own work`.
    const SOURCE: &'static str;
    /// Version of the bytes it writes; a decoder refuses a newer one.
    const FORMAT_VERSION: u32;
    /// Settings: `#[serde(deny_unknown_fields, default)]`, doc comments on every field, ranges as `#[schemars(range(...))]`.
    type Config: Serialize + DeserializeOwned + JsonSchema + Default;

    /// Builds the plugin from settings that already passed its schema.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) for what a schema cannot say.
    fn new(config: Self::Config) -> Result<Self>;
}

/// What encoder and decoder both know without paying for it.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Layer of the model.
    pub layer: u32,
    /// Keys or values.
    pub role: Role,
    /// Position of the chunk's first token.
    pub first_token: u64,
    /// Position behind the last token of the sequence that the chunk belongs to, if it is known: where recent tokens end.
    pub end_token: Option<u64>,
    /// Token ids of this chunk, one per token.
    pub tokens: Option<&'a [u32]>,
    /// How keys were rotated.
    pub rope: Option<&'a Rope>,
    /// The already decoded sibling: the keys of these tokens while their values are coded.
    pub peer: Option<Chunk<'a>>,
    /// Already decoded earlier tokens of this layer and role, in the order of their positions, which may have gaps.
    pub history: Option<Chunk<'a>>,
    /// Token ids of the history, one per token; given only if all of them are known.
    pub history_tokens: Option<&'a [u32]>,
}

impl Context<'_> {
    /// A context that knows nothing but the place of the chunk.
    pub const fn new(layer: u32, role: Role, first_token: u64) -> Self {
        Self {
            layer,
            role,
            first_token,
            end_token: None,
            tokens: None,
            rope: None,
            peer: None,
            history: None,
            history_tokens: None,
        }
    }
}

/// Parts of the [`Context`]: those that a plugin cannot do without, or those that help it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is one independent part of the context")]
pub struct Needs {
    /// Token ids.
    pub tokens: bool,
    /// How keys were rotated.
    pub rope: bool,
    /// The decoded sibling.
    pub peer: bool,
    /// Decoded earlier tokens; chunks are then no longer decodable alone.
    pub history: bool,
}

impl Needs {
    /// No part.
    pub const NONE: Self = Self { tokens: false, rope: false, peer: false, history: false };

    /// The parts of either of both.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self {
            tokens: self.tokens | other.tokens,
            rope: self.rope | other.rope,
            peer: self.peer | other.peer,
            history: self.history | other.history,
        }
    }
}

/// What a plugin declares; the conformance kit attacks every claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Element types of lanes it encodes, or of tensors it transforms.
    pub elems: ElemSet,
    /// Parts of the context it cannot do without.
    pub needs: Needs,
    /// Parts that help it, and without which it works too. A host gives the decoder exactly those that the encoder had.
    pub wants: Needs,
    /// Same input, same bytes, on every machine.
    pub deterministic: bool,
    /// Tokens can be appended without coding earlier ones again.
    pub streaming: bool,
}

impl Capabilities {
    /// A deterministic plugin for these element types that looks at no context.
    pub const fn new(elems: ElemSet) -> Self {
        Self { elems, needs: Needs::NONE, wants: Needs::NONE, deterministic: true, streaming: false }
    }

    /// The parts of the context that a host provides, as far as it has them: what is needed or wanted.
    pub const fn context(&self) -> Needs {
        self.needs.or(self.wants)
    }
}

/// Objects kept between calls: codec contexts and scratch buffers of a plugin whose methods take `&self`.
///
/// # Examples
/// ```
/// use gearbox_core::Pool;
///
/// let pool: Pool<Vec<u8>> = Pool::default();
/// pool.with(Vec::new, |buffer| buffer.resize(1000, 0));
/// let capacity = pool.with(Vec::new, |buffer| buffer.capacity());
/// assert!(capacity >= 1000, "the buffer of the first call is used again");
/// ```
pub struct Pool<T>(Mutex<Vec<T>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self(Mutex::new(Vec::new()))
    }
}

impl<T> std::fmt::Debug for Pool<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

impl<T> Pool<T> {
    /// Runs `work` with a pooled object, or with a new one if all are in use.
    pub fn with<R>(&self, new: impl FnOnce() -> T, work: impl FnOnce(&mut T) -> R) -> R {
        let pooled = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut object = pooled.unwrap_or_else(new);
        let result = work(&mut object);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(object);
        result
    }
}
