//! Gearbox codec that predicts the byte streams of floats block by block and compresses them with zstd.
