//! Memory of the process, as far as a program may see it without `unsafe`.

/// Address space of the process.
///
/// Address space rather than resident memory: a runaway `vec![0; 1 << 40]` is never touched and so never resident.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// Bytes held now.
    now: u64,
    /// The most bytes ever held.
    peak: u64,
}

impl Memory {
    /// Asks the system; `None` where it does not tell.
    pub(crate) fn read() -> Option<Self> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let bytes = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
        };
        Some(Self { now: bytes("VmSize:")?, peak: bytes("VmPeak:")? })
    }

    /// Bytes that were held on top of these at some time since, zero if the peak of the process is older.
    pub(crate) fn grown_since(self) -> u64 {
        match Self::read() {
            Some(after) if after.peak > self.peak => after.peak - self.now,
            _ => 0,
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn untouched_allocation_is_seen() {
        let Some(before) = Memory::read() else { return };
        let len = usize::try_from(before.peak).unwrap() + (64 << 20);
        std::hint::black_box(vec![0u8; len]);
        // Less than `len`, because another test may give memory back meanwhile.
        assert!(before.grown_since() >= before.peak);
    }
}
