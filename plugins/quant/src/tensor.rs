//! Transforms that write the restored tensor itself.

use gearbox_core::{ChunkMut, Error, LaneSpec, Latents, Result};

/// Copies the only lane, `tensor`.
pub(crate) fn inverse(latents: &Latents, mut out: ChunkMut<'_>) -> Result<()> {
    let expected = LaneSpec::tensor(out.dtype(), out.shape());
    match latents.lanes() {
        [lane] if lane.spec == expected => out.bytes_mut().copy_from_slice(&lane.bytes),
        // A chunk without elements may have no lane.
        [] if out.bytes_mut().is_empty() => {}
        lanes => {
            let held: Vec<_> = lanes.iter().map(|lane| lane.spec.to_string()).collect();
            return Err(Error::corrupt(format!("expected only {expected}, got {}", held.join(", "))));
        }
    }
    Ok(())
}
