//! Where to damage, and what a plugin must do with it: fail or give wrong data, but not panic, hang or take all memory.

use std::time::{Duration, Instant};

use gearbox_core::{ErrorKind, Result};

use crate::data::SplitMix64;
use crate::memory::Memory;
use crate::outcome::Check;

/// Longest time that one call on damaged input may take; generous, because the machine may be busy.
const TIME: Duration = Duration::from_secs(5);

/// Address space that one call on damaged input may ask for. Threads that start meanwhile take 64 MiB each.
const MEMORY: u64 = 1 << 30;

/// Outputs up to this length are damaged at every place, longer ones at [`SAMPLES`] places.
pub(crate) const SMALL: usize = 400;

const SAMPLES: u32 = 250;

/// Byte positions to damage: all, or the first and last 64 and a seeded sample.
pub(crate) fn places(len: usize) -> Vec<usize> {
    if len <= SMALL {
        return (0..len).collect();
    }
    let mut random = SplitMix64::new(len as u64);
    let end = u32::try_from(len).unwrap_or(u32::MAX);
    let sample = (0..SAMPLES).map(|_| random.below(end) as usize);
    (0..64).chain(len - 64..len).chain(sample).collect()
}

/// Decodes damaged input: any result is fine but a panic, an error that blames someone else, a late end or a huge allocation.
pub(crate) fn survives(decode: impl FnOnce() -> Result<()>) -> Check {
    match watched(decode)? {
        Err(error) if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::LimitExceeded) => {
            Err(format!("expected `Corrupt` or `LimitExceeded`, got `{:?}`: {error}", error.kind()))
        }
        _ => Ok(()),
    }
}

/// Runs a call that may fail as it likes, but not late or with a huge allocation.
pub(crate) fn watched<T>(call: impl FnOnce() -> T) -> Check<T> {
    let (before, start) = (Memory::read(), Instant::now());
    let result = call();
    let took = start.elapsed();
    if took > TIME {
        return Err(format!("expected decode to end within {TIME:?}, got {took:?}"));
    }
    let grown = before.map_or(0, Memory::grown_since);
    if grown > MEMORY {
        return Err(format!("expected decode to allocate less than 1 GiB, got {} MiB", grown >> 20));
    }
    Ok(result)
}
