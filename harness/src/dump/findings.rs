//! What is wrong with a dump: one reason per kind of defect, counted.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Serialize, Serializer};

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $bad:literal;)*) => {
        /// Why a part of a dump was left out, refused or remarked upon.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[$doc])* $variant,)*
        }

        impl Reason {
            /// Every reason, in the order of tables.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The kebab-case name used in tables and JSON.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// Whether it makes a command fail unless bad input is allowed; the others are notices.
            pub const fn is_bad(self) -> bool {
                match self {
                    $(Self::$variant => $bad,)*
                }
            }
        }
    };
}

reasons! {
    /// No valid entry is left.
    NoEntries = "no-entries", true;
    /// A folder cannot be listed.
    FolderUnreadable = "folder-unreadable", true;
    /// A meta file cannot be read or is unreasonably large.
    MetaUnreadable = "meta-unreadable", true;
    /// A meta file is not JSON.
    MetaNotJson = "meta-not-json", true;
    /// A meta file is JSON, but not an object.
    MetaNotObject = "meta-not-object", true;
    /// A required key is absent from a meta file.
    MetaKeyMissing = "meta-key-missing", true;
    /// A key of a meta file has the wrong type or an impossible value.
    MetaValueInvalid = "meta-value-invalid", true;
    /// Elements have neither two nor four bytes.
    UnsupportedElementSize = "unsupported-element-size", true;
    /// The named element type has another size than stated.
    DtypeContradictsSize = "dtype-contradicts-size", true;
    /// The run name is not `[A-Za-z0-9._-]+`, or it is `.` or `..`.
    RunIdInvalid = "run-id-invalid", true;
    /// A file name is absolute or leaves the folder of its meta file.
    PathEscapesFolder = "path-escapes-folder", true;
    /// A tensor file does not exist.
    TensorFileMissing = "tensor-file-missing", true;
    /// A tensor file is not a regular file or cannot be read.
    TensorFileUnreadable = "tensor-file-unreadable", true;
    /// A tensor has no elements.
    TensorEmpty = "tensor-empty", true;
    /// A tensor file ends within an element.
    SizeNotMultipleOfElement = "size-not-multiple-of-element", true;
    /// A tensor file has another size than its shape asks for.
    SizeDiffersFromShape = "size-differs-from-shape", true;
    /// Two entries of a layer cover the same tokens.
    DuplicateRange = "duplicate-range", true;
    /// Two entries of a layer share some tokens.
    OverlappingRange = "overlapping-range", true;
    /// An entry has other heads, dim or dtype than the first of its layer.
    ShapeDiffersInLayer = "shape-differs-in-layer", true;
    /// An entry has more or fewer token ids than tokens.
    TokensDifferFromShape = "tokens-differ-from-shape", true;
    /// Two layers name different token ids for the same range.
    TokensDifferInRun = "tokens-differ-in-run", true;
    /// Two entries of a run state different rotations.
    RopeDiffersInRun = "rope-differs-in-run", true;
    /// Two entries of a layer state different attention or rotations.
    FactsDifferInLayer = "facts-differ-in-layer", true;
    /// A safetensors file breaks its format or the naming of dumps.
    SafetensorsInvalid = "safetensors-invalid", true;
    /// A tensor holds NaN or infinite values; found by reading all of it.
    NonFiniteValues = "non-finite-values", true;
    /// A conversion would turn finite values into infinite ones.
    NewInfinities = "new-infinities", true;
    /// Another output stands where a conversion would write.
    OutputExists = "output-exists", true;
    /// The output format cannot hold what the source holds.
    NotRepresentable = "not-representable", true;
    /// The output could not be written, for example because the disk is full.
    WriteFailed = "write-failed", true;
    /// A conversion to F16 met an entry that is F16 already.
    AlreadyF16 = "already-f16", false;
    /// The entry holds fewer tokens than the engine appended.
    TruncatedEntry = "truncated-entry", false;
    /// A decode entry of the engine's warm-up, not of the request.
    TuningLeftover = "tuning-leftover", false;
    /// A packed snapshot that a longer one contains.
    SupersededPacked = "superseded-packed", false;
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// One defect or remark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind it is.
    pub reason: Reason,
    /// Where it is: a file, or a file and the part of it.
    pub place: String,
    /// What was expected and what was found.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.place, self.reason, self.message)
    }
}

/// All defects and remarks of one command, in the order of the data.
///
/// # Examples
/// ```
/// use gearbox::dump::{Findings, Reason};
///
/// let mut findings = Findings::default();
/// findings.push(Reason::TuningLeftover, "run/layer_0/meta_t0_1.json", "lies inside the prefill entry 0..128");
/// assert!(findings.is_clean(), "a notice is no defect");
/// findings.push(Reason::TensorEmpty, "run/layer_0/meta_t0_128.json", "expected 32768 bytes, got 0");
/// assert_eq!((findings.is_clean(), findings.bad()), (false, 1));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Every finding.
    pub list: Vec<Finding>,
}

/// Places that the table names per reason.
const PLACES: usize = 3;

impl Findings {
    /// Adds one.
    pub fn push(&mut self, reason: Reason, place: impl Into<String>, message: impl Into<String>) {
        self.list.push(Finding { reason, place: place.into(), message: message.into() });
    }

    /// Adds all of another list behind these.
    pub fn append(&mut self, mut other: Self) {
        self.list.append(&mut other.list);
    }

    /// How often each reason occurs.
    pub fn counts(&self) -> BTreeMap<Reason, usize> {
        let mut counts = BTreeMap::new();
        for finding in &self.list {
            *counts.entry(finding.reason).or_default() += 1;
        }
        counts
    }

    /// How many are defects.
    pub fn bad(&self) -> usize {
        self.list.iter().filter(|finding| finding.reason.is_bad()).count()
    }

    /// Whether there is no defect; notices do not count.
    pub fn is_clean(&self) -> bool {
        self.bad() == 0
    }
}

/// One line per reason: name, `bad` or `notice`, count, the first places, what is wrong at the first of them.
impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.counts();
        let width = counts.keys().map(|reason| reason.name().len()).max().unwrap_or_default();
        for (reason, count) in counts {
            let kind = if reason.is_bad() { "bad" } else { "notice" };
            write!(f, "{reason:width$}  {kind:6}  {count:>6}")?;
            let places = self.list.iter().filter(|finding| finding.reason == reason).take(PLACES);
            for (i, finding) in places.enumerate() {
                write!(f, "{}{}", if i == 0 { "  " } else { ", " }, finding.place)?;
            }
            if count > PLACES {
                write!(f, " and {} more", count - PLACES)?;
            }
            let first = self.list.iter().find(|finding| finding.reason == reason);
            if let Some(Finding { message, .. }) = first.filter(|finding| !finding.message.is_empty()) {
                write!(f, "; {}{message}", if count > 1 { "the first: " } else { "" })?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_kebab_case() {
        let names: BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        for name in names {
            assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'), "{name}");
        }
    }

    #[test]
    fn table_has_one_line_per_reason_with_count_and_first_places() {
        let mut findings = Findings::default();
        for place in ["a", "b", "c", "d", "e"] {
            findings.push(Reason::SupersededPacked, place, format!("message of {place}"));
        }
        findings.push(Reason::TensorEmpty, "x", "expected 4 bytes, got 0");
        assert_eq!(
            findings.to_string(),
            "tensor-empty       bad          1  x; expected 4 bytes, got 0\n\
             superseded-packed  notice       5  a, b, c and 2 more; the first: message of a\n"
        );
        assert_eq!(findings.counts(), BTreeMap::from([(Reason::TensorEmpty, 1), (Reason::SupersededPacked, 5)]));
        assert_eq!(Findings::default().to_string(), "");
    }

    #[test]
    fn json_holds_names_and_messages() {
        let mut findings = Findings::default();
        findings.push(Reason::TensorEmpty, "x", "expected 4 bytes, got 0");
        assert_eq!(
            serde_json::to_string(&findings).unwrap(),
            r#"{"list":[{"reason":"tensor-empty","place":"x","message":"expected 4 bytes, got 0"}]}"#
        );
        assert_eq!(findings.list[0].to_string(), "x: tensor-empty: expected 4 bytes, got 0");
    }
}
