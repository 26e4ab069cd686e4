//! The codecs `planes` and `rans`: floats taken apart, each part coded by the statistics that it has.
//!
//! Sign and mantissa of a KV cache are nearly random, and its exponents have about 2.6 bits of entropy, so a coder that knows nothing else
//! ends at 16 / 13.6 = 1.18. What `planes` knows besides:
//!
//! - *Channels differ.* Tables are chosen by channel; channels with similar statistics share one. Sign and the top two bits of the mantissa
//!   go into the same symbol as the exponent, because some channels have a sign of their own. Worth 1 to 5 %, most for keys.
//! - *Tokens repeat.* The same token gives exactly the same values in the first layer and similar ones further up. Each row may name an
//!   earlier one, found by content alone: it is then a repetition, or its symbols are coded as differences. Worth 1 to 10 % in the values
//!   of deeper layers, and a factor of up to 2.8 in those of the first.
//! - *Most of the mantissa is noise.* It is stored as it is, unless a histogram says that coding pays, as it does after a cast.
//!
//! `rans` has only the coder: the bytes of any lane apart, each with static tables of 12 bits and a choice of contexts. It is the one for
//! quantiser codes.
//!
//! # Source
//! Own work. Asymmetric numeral systems are due to J. Duda, arXiv:1311.2540.
//!
//! # Settings of `planes`
//! | Key | Range | Default | Meaning |
//! |---|---|---|---|
//! | `references` | `similar`, `none` | `similar` | whether rows may name an earlier row; without, encoding is about twice as fast |
//! | `history` | 0 to 65535 | 0 | earlier tokens, besides those of the chunk, that rows may name; above 0 no chunk can be decoded alone |
//! | `tables` | `chunk`, `trained` | `chunk` | tables stored with each chunk, or also learned over all chunks and stored once, for short chunks |
//!
//! # Settings of `rans`
//! | Key | Range | Default | Meaning |
//! |---|---|---|---|
//! | `contexts` | `none`, `channel`, `head`, `previous` | `channel` | what chooses the table of a symbol; `previous` is the same channel one token before |
//!
//! # Bytes
//! A lane without elements takes none. Every other lane starts with a byte: 0, the lane follows as it is (narrow integers packed); 1, it is
//! coded; 2 (`planes` only), it is coded with trained tables. A coded lane goes on with
//!
//! | Bytes | Content |
//! |---|---|
//! | 1 to 5 | length of the side information, LEB128 in its shortest form |
//! | that many | side information, written by the adaptive binary coder of `side.rs` |
//! | | planes that are not coded, packed to their width |
//! | 32 or 128 | states of the rANS decoder, little-endian: 8, or 32 in lanes of 65536 elements and more |
//! | the rest | its words of 16 bits, little-endian |
//!
//! Side information of `planes`: number of repeated heads; for Bf16 and F32 the base of the exponents and a list of elements whose exponent
//! has no code (`fields.rs`); then the model (`model.rs`): logarithm of the table size, precision of the tables, table of each channel, whether
//! rows name others and with which tables, which planes are coded, and the tables (`table.rs`). With trained tables the model comes from the
//! artifact (`trained.rs`). Symbols of `planes` come in this order: two bits for each head of each token (0 literal, 1 near, 2 far, 3 repeated;
//! four heads to a symbol, the first one lowest), then low and high byte of the distance in tokens less one for each token that names another,
//! then the symbols of all heads that are not repeated, then the planes that are coded. A near or far head holds differences modulo 256 to the
//! symbols of the token it names; the two have tables of their own.
//!
//! Side information of `rans`: precision of the tables, and for each byte of the elements, highest first, whether it is coded, the table of
//! each context and the tables. Bf16 and F32 are rotated left by one bit first, so that the exponent fills a byte.
//!
//! `rans` with `previous` takes as context the symbol one token before, counted in multiples of eight elements.
//!
//! # What they are bad at
//! Chunks of one or a few tokens: states and tables take about 100 bytes, unless tables are trained. Rows of fewer than twelve channels are
//! never compared. References are found by the signs of channels, so data without signs has none. F32 keeps 21 bits of mantissa as they are,
//! whatever they hold, unless single bytes of it are skewed.

mod cluster;
mod coder;
mod fields;
mod frame;
mod math;
mod model;
mod planes;
mod rans;
mod rows;
mod side;
mod table;
mod trained;

pub use planes::{Config as PlanesConfig, Planes, References, TableSource};
pub use rans::{Config as RansConfig, Contexts, Rans};
