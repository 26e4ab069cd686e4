//! Dumps of check vectors for tests.

use std::path::Path;

use gearbox_core::{Chunk, DType, Shape, Stage};

use super::flags;
use crate::dump::{NewEntry, write_reference_entry};

/// The generator of the reference's check vectors.
fn noise(x: u64) -> u64 {
    let a = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let a = (a ^ a >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let a = (a ^ a >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    a ^ a >> 31
}

/// A check vector: 2 heads of 64 channels.
fn vector(dtype: DType, seq: u64, seed: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for i in 0..seq * 128 {
        let (head, dim, noise) = (i / 64 % 2, i % 64, noise(seed * 1_000_003 + i));
        let (sign, bump) = (dim % 2, u64::from(noise >> 61 == 0));
        if dtype == DType::F32 {
            let word = sign << 31 | (0x79 + (dim >> 3 & 3) + head + bump) << 23 | noise & 0x7F_FFFF;
            bytes.extend((word as u32).to_le_bytes());
        } else {
            bytes.extend([noise as u8, (0x34 + (dim >> 3 & 7) + head + bump + 0x80 * sign) as u8]);
        }
    }
    bytes
}

/// Writes the check vectors of one element type as layer 0 of a run: 64 tokens of prompt, then one decoded token.
pub(crate) fn write_run(dump: &Path, run: &str, dtype: DType) {
    for (start, seq, stage, seeds) in [(0, 64, Stage::Prefill, [1, 2]), (64, 1, Stage::Decode, [3, 4])] {
        let [key, value] = seeds.map(|seed| vector(dtype, seq, seed));
        let shape = Shape::new(seq as usize, 2, 64);
        let [key, value] = [&key, &value].map(|bytes| Chunk::new(shape, dtype, bytes).unwrap());
        let entry = NewEntry::new(run, 0, start, stage, key, value);
        write_reference_entry(&dump.join(run).join("layer_0"), &entry, false).unwrap();
    }
}

/// The flags of an experiment as the command line reads them.
pub(crate) fn parse<A: clap::Args>(arguments: &[&str]) -> Result<A, clap::Error> {
    flags::parse(arguments)
}
