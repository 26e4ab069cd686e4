//! Upper bounds on what stored bytes may ask for.

/// What a reader accepts before it allocates anything.
///
/// Every stored length is checked against these and against the bytes that remain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the JSON header.
    pub header: usize,
    /// Bytes of the head of one record.
    pub record_head: usize,
    /// Bytes of one tensor chunk, and of all its decoded lanes together.
    pub lane: usize,
    /// Lanes in one chunk.
    pub lanes: usize,
    /// Bytes of one artifact.
    pub artifact: usize,
    /// Bytes of the index.
    pub index: usize,
}

impl Default for Limits {
    /// 16 MiB headers and record heads, 4 GiB lanes, 256 lanes, 256 MiB artifacts, 1 GiB index.
    fn default() -> Self {
        Self { header: 16 << 20, record_head: 16 << 20, lane: 4 << 30, lanes: 256, artifact: 256 << 20, index: 1 << 30 }
    }
}
