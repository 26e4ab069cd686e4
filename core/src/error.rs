//! The one error type of the workspace.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// What went wrong, for programs; the message of an [`Error`] is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller's settings are wrong; the message holds the JSON pointer and the legal range.
    InvalidConfig,
    /// No plugin has this id; the message lists near ones.
    UnknownPlugin,
    /// Two plugins claim one id; the message names both origins.
    DuplicatePlugin,
    /// A legal request that this plugin or pipeline declares it cannot serve.
    Unsupported,
    /// A tensor or lane has another element type than declared.
    UnsupportedDType,
    /// Lengths and shapes disagree.
    ShapeMismatch,
    /// Stored bytes are damaged: the data's fault, never the caller's.
    Corrupt,
    /// A stored length is above [`Limits`](crate::Limits).
    LimitExceeded,
    /// A dump or another input file breaks its format.
    InvalidInput,
    /// Decoded data differs from what was encoded.
    Mismatch,
    /// The operating system refused a file operation.
    Io,
    /// A plugin panicked; the fault is its author's or ours.
    PluginPanicked,
    /// The process of an isolated plugin ended on its own: by the signal of this name, or else by `exit` or `bad-reply`.
    #[serde(skip)]
    PluginCrashed(#[serde(skip)] &'static str),
    /// An isolated plugin used up the time of a call.
    PluginTimedOut,
    /// An isolated plugin asked for more memory than it may have.
    OutOfMemory,
    /// A plugin wrote more or fewer bytes than it may, or behind the end of a buffer.
    WrongLength,
}

impl ErrorKind {
    /// The state in which a plugin that fails like this leaves a call, as tables name it.
    ///
    /// One of `unsupported`, `error`, `panicked`, `crashed(…)` with the signal, `timed-out`, `out-of-memory`, `wrong-length`, `mismatch`.
    ///
    /// # Examples
    /// ```
    /// use gearbox_core::ErrorKind;
    ///
    /// assert_eq!(ErrorKind::PluginCrashed("SIGSEGV").state(), "crashed(SIGSEGV)");
    /// assert_eq!(ErrorKind::Corrupt.state(), "error");
    /// ```
    pub fn state(self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::Unsupported | Self::UnsupportedDType => "unsupported",
            Self::PluginPanicked => "panicked",
            Self::PluginCrashed(how) => return Cow::Owned(format!("crashed({how})")),
            Self::PluginTimedOut => "timed-out",
            Self::OutOfMemory => "out-of-memory",
            Self::WrongLength => "wrong-length",
            Self::Mismatch => "mismatch",
            _ => "error",
        })
    }
}

/// Shorthand for a result with the workspace's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error: a [kind](ErrorKind), a message, and where it happened.
///
/// # Examples
/// ```
/// use gearbox_core::{Error, ErrorKind};
///
/// let error = Error::corrupt("expected 12 bytes, got 7").context("chunk 3").context("layer 7, keys");
/// assert_eq!(error.kind(), ErrorKind::Corrupt);
/// assert_eq!(error.to_string(), "layer 7, keys: chunk 3: expected 12 bytes, got 7");
/// ```
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    /// Innermost first.
    context: Vec<String>,
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident;)*) => {
        $($(#[$doc])*
        pub fn $name(message: impl Into<String>) -> Self {
            Self::new(ErrorKind::$kind, message)
        })*
    };
}

impl Error {
    /// Makes an error of any kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), context: Vec::new() }
    }

    constructors! {
        /// Makes an [`ErrorKind::InvalidConfig`].
        invalid_config => InvalidConfig;
        /// Makes an [`ErrorKind::Unsupported`].
        unsupported => Unsupported;
        /// Makes an [`ErrorKind::ShapeMismatch`].
        shape => ShapeMismatch;
        /// Makes an [`ErrorKind::Corrupt`].
        corrupt => Corrupt;
        /// Makes an [`ErrorKind::LimitExceeded`].
        limit => LimitExceeded;
        /// Makes an [`ErrorKind::InvalidInput`].
        invalid_input => InvalidInput;
        /// Makes an [`ErrorKind::Mismatch`].
        mismatch => Mismatch;
    }

    /// Makes an [`ErrorKind::Io`] that names the file.
    pub fn io(path: impl AsRef<Path>, source: &std::io::Error) -> Self {
        Self::new(ErrorKind::Io, format!("`{}`: {source}", path.as_ref().display()))
    }

    /// Adds where it happened; call it once per level, from the inside out.
    #[must_use]
    pub fn context(mut self, place: impl Into<String>) -> Self {
        self.context.push(place.into());
        self
    }

    /// What went wrong, for programs.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for place in self.context.iter().rev() {
            write!(f, "{place}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Adds context to the error of a result.
pub trait ResultExt<T> {
    /// Adds where it happened, computed only if there is an error.
    fn context(self, place: impl FnOnce() -> String) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn context(self, place: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.context(place()))
    }
}
