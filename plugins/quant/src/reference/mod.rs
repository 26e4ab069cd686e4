//! What the reference computes, to the bit.
