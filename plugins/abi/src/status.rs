//! Status codes and error texts.

use gearbox_core::{Error, ErrorKind, Result};

use crate::raw::ErrorText;

/// The call did what it should.
pub const OK: i32 = 0;
/// The plugin failed for a reason that no other code names.
pub const OTHER: i32 = 255;

/// Error kinds by status code, from 1 on. Codes are never given another meaning.
const KINDS: [ErrorKind; 12] = [
    ErrorKind::Unsupported,
    ErrorKind::UnsupportedDType,
    ErrorKind::InvalidConfig,
    ErrorKind::InvalidInput,
    ErrorKind::ShapeMismatch,
    ErrorKind::Corrupt,
    ErrorKind::LimitExceeded,
    ErrorKind::Mismatch,
    ErrorKind::Io,
    ErrorKind::PluginPanicked,
    ErrorKind::OutOfMemory,
    ErrorKind::WrongLength,
];

/// The code of a kind; [`OTHER`] for kinds that a plugin has no use for.
pub fn of(kind: ErrorKind) -> i32 {
    let idx = (1i32..).zip(KINDS).find(|(_, known)| *known == kind);
    idx.map_or(OTHER, |(code, _)| code)
}

/// The kind of a code.
///
/// [`OTHER`] is [`ErrorKind::Unsupported`]: the plugin says that it cannot, and not why. A code that does not exist is the plugin's fault,
/// [`ErrorKind::PluginPanicked`].
pub fn kind(code: i32) -> ErrorKind {
    let known = usize::try_from(code).ok().and_then(|code| KINDS.get(code.checked_sub(1)?));
    known.copied().unwrap_or(if code == OTHER { ErrorKind::Unsupported } else { ErrorKind::PluginPanicked })
}

/// Bytes of an error text that the host takes; longer ones are cut.
const TEXT: usize = 2048;

/// Calls a function of a plugin with room for the text of an error.
pub(crate) fn checked(call: impl FnOnce(*mut ErrorText) -> i32) -> Result<()> {
    let mut text = ErrorText { data: std::ptr::null_mut(), capacity: 0, len: 0 };
    let mut buffer = [const { std::mem::MaybeUninit::<u8>::uninit() }; TEXT];
    text.data = buffer.as_mut_ptr().cast();
    text.capacity = TEXT;
    let code = call(&raw mut text);
    if code == OK { Ok(()) } else { Err(failure(code, &text)) }
}

#[cold]
fn failure(code: i32, text: &ErrorText) -> Error {
    // SAFETY: `checked` made the buffer, which is as long as its capacity; the plugin promises that it wrote `len` bytes, and the length is
    // cut to what exists. The data pointer is the host's own unless the plugin replaced it, which the ABI forbids.
    let bytes = unsafe { std::slice::from_raw_parts(text.data, text.len.min(TEXT)) };
    let message = String::from_utf8_lossy(bytes);
    let message = message.trim_end_matches(char::REPLACEMENT_CHARACTER);
    let known = kind(code);
    match (message, known) {
        ("", _) if code == OTHER || code == of(known) => {
            Error::new(known, format!("failed with status {code} and no text"))
        }
        (_, ErrorKind::PluginPanicked) if code != of(known) => {
            Error::new(known, format!("returned status {code}, which does not exist; its text: {message}"))
        }
        _ => Error::new(known, message),
    }
}

/// Writes an error into the caller's buffer, cut at a character, and returns its code.
///
/// # Safety
/// `place` is null, or points to an [`ErrorText`] whose buffer is writable for `capacity` bytes.
pub(crate) unsafe fn report(place: *mut ErrorText, kind: ErrorKind, message: &str) -> i32 {
    // SAFETY: null or valid for the duration of the call, as the caller promises.
    if let Some(text) = unsafe { place.as_mut() } {
        let len = message.floor_char_boundary(text.capacity.min(message.len()));
        if !text.data.is_null() {
            // SAFETY: `data` is writable for `capacity` bytes, `len` is at most that, and a message of ours does not overlap it.
            unsafe { std::ptr::copy_nonoverlapping(message.as_ptr(), text.data, len) };
            text.len = len;
        }
    }
    of(kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_kinds_are_inverse() {
        for kind in KINDS {
            assert_eq!(super::kind(of(kind)), kind);
        }
        assert_eq!(of(ErrorKind::DuplicatePlugin), OTHER);
        assert_eq!(kind(OTHER), ErrorKind::Unsupported);
        assert_eq!(kind(77), ErrorKind::PluginPanicked);
        assert_eq!(kind(-1), ErrorKind::PluginPanicked);
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let message = "é".repeat(TEXT);
        // SAFETY: `checked` hands over its own buffer.
        let error = checked(|text| unsafe { report(text, ErrorKind::Corrupt, &message) }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(error.to_string(), "é".repeat(TEXT / 2));
    }

    #[test]
    fn unknown_codes_and_missing_texts_are_named() {
        let text = |code| checked(|_| code).unwrap_err().to_string();
        assert_eq!(text(6), "failed with status 6 and no text");
        assert_eq!(text(OTHER), "failed with status 255 and no text");
        assert_eq!(text(99), "returned status 99, which does not exist; its text: ");
    }
}
