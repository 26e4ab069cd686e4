//! `exp huffman-*` and `exp arith-*`: the reference's bit-level coders on the sign and exponent (`hi6`) and the mantissa (`lo10`) of F16 dumps.
//!
//! `-encode` writes four streams and a meta file per entry, and in the mode `global` one codebook for all; `-decode` reads them back and
//! `-analyze` adds up their sizes. Every file has the bytes of the reference's. The files hold neither checksums nor lengths, so they serve
//! to compare with the reference; what our own containers need for the same data is what `gearbox sweep --pipeline huffman` reports.

use clap::ValueEnum;
use gearbox_core::{Elem, Result, ResultExt, Role};
use gearbox_plugins::bitstream::reference::{Arithmetic, Huffman, Reference, reference_fields};
use gearbox_plugins::bitstream::{Counts, Field, SymbolBuffer};

use self::json::{Json, Object};

mod analyze;
mod decode;
mod encode;
mod folder;
mod json;
#[cfg(test)]
mod tests;

pub use analyze::AnalyzeArgs;
pub use decode::DecodeArgs;
pub use encode::EncodeArgs;

/// One of the reference's coders and the names of its files.
pub trait Coder: Reference {
    /// Ending of the streams.
    const ENDING: &'static str;
    /// Start of the names of meta files, before the name of the entry's own.
    const META: &'static str;
    /// Name of the codebook.
    const BOOK: &'static str;
    /// What meta files call the format.
    const LAYOUT: &'static str;
    /// What codebooks call the table of a stream, behind the stream's name.
    const TABLE: &'static str;
    /// Whether meta files name the streams before the codebook.
    const STREAMS_FIRST: bool;
    /// First line of the summary.
    const TITLE: &'static str;
    /// Start of the names of results.
    const RESULTS: &'static str;
}

impl Coder for Huffman {
    const ENDING: &'static str = "huff";
    const META: &'static str = "bitstream_";
    const BOOK: &'static str = "global_codebook.json";
    const LAYOUT: &'static str = "bitstream_huffman";
    const TABLE: &'static str = "code_lengths";
    const STREAMS_FIRST: bool = true;
    const TITLE: &'static str = "# Huffman Bitstream Summary";
    const RESULTS: &'static str = "huffman";
}

impl Coder for Arithmetic {
    const ENDING: &'static str = "ac";
    const META: &'static str = "arith_";
    const BOOK: &'static str = "global_codebook_arith.json";
    const LAYOUT: &'static str = "bitstream_arith";
    const TABLE: &'static str = "freq";
    const STREAMS_FIRST: bool = false;
    const TITLE: &'static str = "# Arithmetic Bitstream Summary";
    const RESULTS: &'static str = "arith";
}

/// Where the tables of an entry are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Codebook {
    /// In the meta file of each entry
    PerDump,
    /// In one file, made from all selected entries
    Global,
}

impl Codebook {
    fn name(self) -> &'static str {
        match self {
            Self::PerDump => "per-dump",
            Self::Global => "global",
        }
    }
}

/// The streams of an entry, in the order of all files.
const STREAMS: [(&str, Role, usize); 4] =
    [("k_hi6", Role::Key, 0), ("k_lo10", Role::Key, 1), ("v_hi6", Role::Value, 0), ("v_lo10", Role::Value, 1)];

/// The fields of both streams of a tensor, in the order of [`STREAMS`].
fn fields() -> Result<Vec<Field>> {
    reference_fields(Elem::F16)
}

/// Counts of all streams of some entries.
fn count(tensors: [&[u8]; 2]) -> Result<[Counts; 4]> {
    let fields = fields()?;
    let mut buffer = SymbolBuffer::default();
    Ok(STREAMS.map(|(_, role, field)| {
        let mut counts = Counts::new(fields[field].bits);
        counts.add(buffer.gather(tensors[role as usize], Elem::F16, fields[field]));
        counts
    }))
}

/// A model for each stream.
#[derive(Debug)]
struct Book<C>([C; 4]);

impl<C: Coder> Book<C> {
    fn learn(counts: &[Counts; 4]) -> Result<Self> {
        let mut book = Self(std::array::from_fn(|_| C::default()));
        for ((model, counts), (stream, ..)) in book.0.iter_mut().zip(counts).zip(STREAMS) {
            model.learn(counts).context(|| stream.to_owned())?;
        }
        Ok(book)
    }

    /// Adds the tables to a codebook or a meta file.
    fn write(&self, object: &mut Object) {
        for (model, (stream, ..)) in self.0.iter().zip(STREAMS) {
            let numbers = model.table().iter().map(|number| Json::from(*number)).collect();
            object.set(&format!("{stream}_{}", C::TABLE), Json::Array(numbers));
        }
    }

    /// Reads the tables of a codebook or a meta file.
    fn read(object: &Object) -> Result<Self> {
        let fields = fields()?;
        let mut models = Vec::with_capacity(STREAMS.len());
        for (stream, _, field) in STREAMS {
            let key = format!("{stream}_{}", C::TABLE);
            let table = object.numbers(&key)?;
            models.push(C::from_table(fields[field].bits, &table).context(|| format!("`{key}`"))?);
        }
        Ok(Self(models.try_into().unwrap_or_else(|_| unreachable!("one model per stream"))))
    }

    /// The codebook file of the mode `global`.
    fn to_bytes(&self) -> Vec<u8> {
        let mut object = Object::default();
        object.set("codebook", Codebook::Global.name());
        self.write(&mut object);
        object.to_bytes()
    }
}
