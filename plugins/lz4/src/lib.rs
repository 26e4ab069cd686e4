//! Gearbox codec that compresses each lane as one LZ4 block.
