//! The ledger: every stored byte belongs to exactly one row.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Role;

/// What a stored byte is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Section {
    /// Encoded lanes.
    Payload,
    /// Name, length and checksum of each lane of a chunk.
    LaneHeader,
    /// Place and length of each chunk, and the checksum of its head.
    ChunkHeader,
    /// Trained models.
    Artifact,
    /// Names of runs, their `RoPE` facts, and token ids where a plugin needs them.
    Run,
    /// Shapes and entries of sequences, and the digests of their decoded tensors.
    Sequence,
    /// Names and types of the lanes that transforms write.
    LaneTable,
    /// Magic, version and pipeline.
    FileHeader,
    /// Index and end of the file.
    Index,
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Payload => "payload",
            Self::LaneHeader => "lane-header",
            Self::ChunkHeader => "chunk-header",
            Self::Artifact => "artifact",
            Self::Run => "run",
            Self::Sequence => "sequence",
            Self::LaneTable => "lane-table",
            Self::FileHeader => "file-header",
            Self::Index => "index",
        })
    }
}

/// Where stored bytes are accounted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Account {
    /// What the bytes are for.
    pub section: Section,
    /// Layer and role of what belongs to one chunk or sequence.
    pub layer: Option<u32>,
    /// Role of what belongs to one chunk or sequence.
    pub role: Option<Role>,
    /// Lane name of payload.
    pub lane: Option<String>,
}

/// Stored bytes by account; the rows sum to the file size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    rows: BTreeMap<Account, u64>,
}

impl Ledger {
    /// Adds bytes to what belongs to the whole file.
    pub fn add(&mut self, section: Section, bytes: usize) {
        self.add_to(Account { section, layer: None, role: None, lane: None }, bytes);
    }

    /// Adds bytes to an account.
    pub fn add_to(&mut self, account: Account, bytes: usize) {
        if bytes > 0 {
            *self.rows.entry(account).or_default() += bytes as u64;
        }
    }

    /// All rows in order.
    pub fn rows(&self) -> impl Iterator<Item = (&Account, u64)> {
        self.rows.iter().map(|(account, bytes)| (account, *bytes))
    }

    /// All stored bytes: the size of the file.
    pub fn total(&self) -> u64 {
        self.rows.values().sum()
    }

    /// Stored bytes of the accounts that pass a test.
    pub fn sum(&self, mut test: impl FnMut(&Account) -> bool) -> u64 {
        self.rows.iter().filter(|(account, _)| test(account)).map(|(_, bytes)| bytes).sum()
    }
}
