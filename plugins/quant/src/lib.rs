//! Lossy transforms that keep fewer levels of each value: quantisation, clipping, truncation.

pub mod reference;
