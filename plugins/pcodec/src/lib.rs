//! Gearbox codec that compresses each lane with pcodec.
