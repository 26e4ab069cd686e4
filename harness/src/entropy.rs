//! How many bits the values of a dump carry, each looked at alone: order-0 entropies, and the floor that they set.
//!
//! A *tensor* is the keys or values of one run and layer, all entries end to end. Its values are cut into *streams*:
//!
//! | Stream | F16 | Bf16 | F32 |
//! |---|---|---|---|
//! | sign | 1 bit | 1 bit | 1 bit |
//! | exponent | 5 bits | 8 bits | 8 bits |
//! | mantissa | 10 bits | 7 bits | the upper 12 of 23 bits; the other 11 count as incompressible |
//! | hi, lo | highest and lowest byte | highest and lowest byte | highest and lowest byte, not the two between |
//!
//! and each stream is looked at in three *views*:
//!
//! | View | Entropy of |
//! |---|---|
//! | raw | the stream as it is |
//! | delta | the difference to the same channel of the token before, modulo the alphabet; the first token as it is |
//! | channel | the stream given its head and channel: the mean over channels of the entropy within each |
//!
//! The **floor** is the bits per value of a coder that codes sign, exponent and mantissa each alone and knows no more than how often each
//! symbol occurs in the tensor: `H(sign) + H(exponent) + H(mantissa)`, all raw. The channel floor takes the exponent in the view `channel`.
//! The **ceiling** is the compression ratio that goes with a floor: bits of an element ÷ floor. Neither is a law: a coder that finds repeated
//! rows, or a dependence between the streams, goes below the floor.
//!
//! # Estimate
//! Counts understate an entropy, because what is rare has often not occurred yet. Miller and Madow's correction adds
//! `(K - 1) / (2 N ln 2)` bits, with `K` the symbols that occur and `N` the values; for a conditional entropy the terms of the contexts are
//! added up. Results are capped at `log2` of the alphabet. With few tokens per channel the plain estimate of the view `channel` is far too
//! low, because `n` tokens show no more than `log2(n)` bits, and the corrected one is still biased: trust it for exponents from some hundreds
//! of tokens on, and for mantissas hardly ever.
//!
//! # Source
//! G. A. Miller, *Note on the bias of information estimates*, 1955; differences from it: the cap.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::LazyLock;

use gearbox_core::{DType, Error, Result, ResultExt, Role};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::dump::{Dump, Layer};
use crate::number;
use crate::report::{self, Columns};

/// One number for each stream, in bits per value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Streams {
    /// Sign bit.
    pub sign: f64,
    /// Exponent.
    pub exponent: f64,
    /// Mantissa; of F32 its upper 12 bits.
    pub mantissa: f64,
    /// Highest byte.
    pub hi: f64,
    /// Lowest byte.
    pub lo: f64,
}

/// Entropies of a tensor, or means over several, each weighted by its values. All in bits per value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Entropy {
    /// Number of values.
    pub values: u64,
    /// Bits of an element.
    pub element_bits: f64,
    /// Streams as they are.
    pub raw: Streams,
    /// Differences along the tokens of each channel.
    pub delta: Streams,
    /// Given head and channel.
    pub channel: Streams,
    /// Raw sign, exponent and mantissa, and the mantissa bits of F32 that are in no stream.
    pub floor: f64,
    /// Bits of an element ÷ floor; infinite (`null` in JSON) where the floor is zero.
    #[serde(deserialize_with = "number::or_infinite")]
    pub ceiling: f64,
    /// The floor with the exponent given its channel.
    pub channel_floor: f64,
    /// Bits of an element ÷ that floor.
    #[serde(deserialize_with = "number::or_infinite")]
    pub channel_ceiling: f64,
}

/// Entropies of one run, layer and role.
#[derive(Clone, Debug, Serialize)]
pub struct TensorEntropy {
    /// Name of the run.
    pub run: String,
    /// Layer of the model.
    pub layer: u32,
    /// Keys or values.
    pub role: Role,
    /// Element type.
    pub dtype: DType,
    /// Its entropies.
    #[serde(flatten)]
    pub entropy: Entropy,
}

/// Means over the tensors of one role, of one layer and role, or of all.
#[derive(Clone, Debug, Serialize)]
pub struct Mean {
    /// Layer, unless the mean is over layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<u32>,
    /// Role, unless the mean is over roles.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// The means.
    #[serde(flatten)]
    pub entropy: Entropy,
}

/// Entropies of a dump.
#[derive(Clone, Debug, Serialize)]
pub struct Entropies {
    /// Means over everything.
    pub all: Entropy,
    /// Means by role.
    pub roles: Vec<Mean>,
    /// Means by layer and role.
    pub layers: Vec<Mean>,
    /// Each run, layer and role.
    pub tensors: Vec<TensorEntropy>,
}

impl Entropies {
    /// Reads all keys and values of a dump once, a megabyte at a time, in parallel over tensors and groups of channels.
    ///
    /// # Errors
    /// What reading the files reports, with the place of the entry.
    pub fn of(dump: &Dump) -> Result<Self> {
        let layers = dump.runs.iter().flat_map(|run| run.layers.iter().map(move |layer| (run.name.as_str(), layer)));
        let tensors: Vec<Tensor<'_>> =
            layers.flat_map(|(run, layer)| Role::ALL.map(|role| Tensor { run, layer, role })).collect();
        let tensors = tensors.par_iter().map(Tensor::entropy).collect::<Result<Vec<_>>>()?;
        let by = |key: fn(&TensorEntropy) -> (Option<u32>, Role)| {
            let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
            for tensor in &tensors {
                groups.entry(key(tensor)).or_default().push(tensor.entropy);
            }
            let mean = |((layer, role), group): ((Option<u32>, Role), Vec<Entropy>)| Mean {
                layer,
                role: Some(role),
                entropy: Entropy::mean(&group),
            };
            groups.into_iter().map(mean).collect()
        };
        Ok(Self {
            all: Entropy::mean(&tensors.iter().map(|tensor| tensor.entropy).collect::<Vec<_>>()),
            roles: by(|tensor| (None, tensor.role)),
            layers: by(|tensor| (Some(tensor.layer), tensor.role)),
            tensors,
        })
    }

    /// A table with a row per role, or per layer and role, and one for all.
    pub fn table(&self, by_layer: bool) -> String {
        let mut table = Columns::new(&[
            "tensors",
            ">sign",
            ">exponent",
            ">mantissa",
            ">hi",
            ">lo",
            ">floor",
            ">ceiling",
            ">exponent/channel",
            ">floor/channel",
            ">ceiling/channel",
        ]);
        let mut row = |name: String, entropy: &Entropy| {
            let Entropy { raw, channel, floor, ceiling, channel_floor, channel_ceiling, .. } = *entropy;
            let streams = [raw.sign, raw.exponent, raw.mantissa, raw.hi, raw.lo];
            let floors = [floor, ceiling, channel.exponent, channel_floor, channel_ceiling];
            let cells = streams.into_iter().chain(floors).map(|number| report::decimal(Some(number), 3));
            table.row(std::iter::once(name).chain(cells));
        };
        for mean in if by_layer { &self.layers } else { &self.roles } {
            let layer = mean.layer.map(|layer| format!("layer {layer} "));
            row(layer.unwrap_or_default() + mean.role.map_or("", Role::name), &mean.entropy);
        }
        row("all".to_owned(), &self.all);
        table.to_string()
    }
}

impl Streams {
    fn each(streams: [f64; STREAMS]) -> Self {
        let [sign, exponent, mantissa, hi, lo] = streams;
        Self { sign, exponent, mantissa, hi, lo }
    }

    fn add(&mut self, other: &Self, weight: f64) {
        self.sign += weight * other.sign;
        self.exponent += weight * other.exponent;
        self.mantissa += weight * other.mantissa;
        self.hi += weight * other.hi;
        self.lo += weight * other.lo;
    }
}

impl Entropy {
    fn mean(parts: &[Self]) -> Self {
        let mut mean = Self { values: parts.iter().map(|part| part.values).sum(), ..Self::default() };
        for part in parts {
            let weight = part.values as f64 / mean.values.max(1) as f64;
            mean.element_bits += weight * part.element_bits;
            mean.raw.add(&part.raw, weight);
            mean.delta.add(&part.delta, weight);
            mean.channel.add(&part.channel, weight);
            mean.floor += weight * part.floor;
            mean.channel_floor += weight * part.channel_floor;
        }
        mean.with_ceilings()
    }

    fn with_ceilings(self) -> Self {
        let (ceiling, channel_ceiling) = (self.element_bits / self.floor, self.element_bits / self.channel_floor);
        Self { ceiling, channel_ceiling, ..self }
    }
}

/// Sign, exponent, mantissa, hi and lo.
const STREAMS: usize = 5;

/// Mantissa bits that are looked at: more of them would need more counters than a tensor has values.
const MAX_MANTISSA: u32 = 12;

/// Channels that are counted at a time, so that their counters stay in the cache: 1.6 MiB for F16, 5 MiB for F32.
const GROUP: usize = 256;

/// Bytes that are mapped at a time, so that pages can be dropped behind the reader.
const WINDOW: usize = 1 << 20;

/// The keys or values of one run and layer.
struct Tensor<'a> {
    run: &'a str,
    layer: &'a Layer,
    role: Role,
}

impl Tensor<'_> {
    fn entropy(&self) -> Result<TensorEntropy> {
        let first = self.layer.entries.first().map(|entry| entry.tensor(self.role));
        let (dtype, channels) = first.map_or((DType::F16, 0), |tensor| (tensor.dtype, tensor.shape.row()));
        let entropy = match dtype {
            DType::F16 => self.count::<F16>(channels)?,
            DType::Bf16 => self.count::<Bf16>(channels)?,
            DType::F32 => self.count::<F32>(channels)?,
            _ => return Err(Error::unsupported(format!("entropies of {dtype} tensors"))),
        };
        Ok(TensorEntropy { run: self.run.to_owned(), layer: self.layer.id, role: self.role, dtype, entropy })
    }

    fn count<F: Format>(&self, channels: usize) -> Result<Entropy> {
        let groups: Vec<_> = (0..channels).step_by(GROUP).map(|start| start..channels.min(start + GROUP)).collect();
        let counted = groups.into_par_iter().map(|group| self.count_group::<F>(group)).collect::<Result<Vec<_>>>()?;
        let (mut raw, mut delta) = (vec![0; F::SPACE], vec![0; F::SPACE]);
        let mut channel = [Estimate::default(); STREAMS];
        for group in &counted {
            raw.iter_mut().zip(&group.raw).for_each(|(sum, count)| *sum += count);
            delta.iter_mut().zip(&group.delta).for_each(|(sum, count)| *sum += count);
            channel.iter_mut().zip(&group.channel).for_each(|(sum, estimate)| sum.add(estimate));
        }
        let estimates = |counts: &[u64]| F::each(|stream| Estimate::of(&counts[stream]));
        let bits = |estimates: [Estimate; STREAMS]| {
            let alphabets = F::each(|stream| stream.len());
            Streams::each(std::array::from_fn(|i| estimates[i].bits_per_value(alphabets[i])))
        };
        let (raw, delta, channel) = (bits(estimates(&raw)), bits(estimates(&delta)), bits(channel));
        let rest = raw.sign + raw.mantissa + f64::from(F::UNSEEN);
        let entropy = Entropy {
            values: counted.iter().map(|group| group.values).sum(),
            element_bits: 8.0 * F::SIZE as f64,
            raw,
            delta,
            channel,
            floor: rest + raw.exponent,
            channel_floor: rest + channel.exponent,
            ..Entropy::default()
        };
        Ok(entropy.with_ceilings())
    }

    /// Counts some of the channels.
    fn count_group<F: Format>(&self, group: Range<usize>) -> Result<Counted> {
        // A channel has no more values than tokens; no run has 2^32 of them.
        let mut channels = vec![0u32; group.len() * F::SPACE];
        let mut delta = vec![0u64; F::SPACE];
        let mut before = vec![[0; STREAMS]; group.len()];
        let mut values = 0;
        for entry in &self.layer.entries {
            let tensor = entry.tensor(self.role);
            let row = tensor.shape.row() * F::SIZE;
            let step = (WINDOW / row.max(1)).max(1);
            for start in (0..entry.seq).step_by(step) {
                let rows = tensor.map_tokens(start..entry.seq.min(start + step)).context(|| entry.place.clone())?;
                for row in rows.chunks_exact(row) {
                    let elements = row[group.start * F::SIZE..group.end * F::SIZE].chunks_exact(F::SIZE);
                    values += elements.len() as u64;
                    let counters = channels.chunks_exact_mut(F::SPACE).zip(&mut before);
                    for (element, (counters, before)) in elements.zip(counters) {
                        F::count(element, before, counters, &mut delta);
                    }
                }
            }
        }
        let mut raw = vec![0; F::SPACE];
        let mut channel = [Estimate::default(); STREAMS];
        for counters in channels.chunks_exact(F::SPACE) {
            raw.iter_mut().zip(counters).for_each(|(sum, count)| *sum += u64::from(*count));
            let estimates = F::each(|stream| Estimate::of(&counters[stream]));
            channel.iter_mut().zip(&estimates).for_each(|(sum, estimate)| sum.add(estimate));
        }
        Ok(Counted { values, raw, delta, channel })
    }
}

/// Counts of a group of channels, stream after stream.
struct Counted {
    values: u64,
    raw: Vec<u64>,
    delta: Vec<u64>,
    channel: [Estimate; STREAMS],
}

/// How an element is cut into streams.
trait Format {
    /// Bytes of an element.
    const SIZE: usize;
    /// Bits of the exponent.
    const EXPONENT: u32;
    /// Bits of the mantissa.
    const MANTISSA: u32;
    /// Mantissa bits below those that are looked at.
    const UNSEEN: u32 = Self::MANTISSA.saturating_sub(MAX_MANTISSA);
    /// Where the counters of each stream begin, and where all end; alphabets are powers of two.
    const OFFSETS: [usize; STREAMS + 1] = {
        let (sign, exponent, mantissa) = (2, 1 << Self::EXPONENT, 1 << (Self::MANTISSA - Self::UNSEEN));
        let hi = sign + exponent + mantissa;
        [0, sign, sign + exponent, hi, hi + 256, hi + 512]
    };
    /// Counters of all streams.
    const SPACE: usize = Self::OFFSETS[STREAMS];

    /// Something of each stream, from the range of its counters.
    fn each<T>(of: impl Fn(Range<usize>) -> T) -> [T; STREAMS] {
        std::array::from_fn(|i| of(Self::OFFSETS[i]..Self::OFFSETS[i + 1]))
    }

    /// Counts the symbols of an element and their differences to those of the same channel before.
    fn count(element: &[u8], before: &mut [usize; STREAMS], counters: &mut [u32], delta: &mut [u64]) {
        let word = element.iter().rev().fold(0, |word, byte| word << 8 | usize::from(*byte));
        let symbols = [
            word >> (Self::EXPONENT + Self::MANTISSA),
            word >> Self::MANTISSA & ((1 << Self::EXPONENT) - 1),
            (word & ((1 << Self::MANTISSA) - 1)) >> Self::UNSEEN,
            word >> (8 * (Self::SIZE - 1)),
            word & 0xFF,
        ];
        for i in 0..STREAMS {
            let (start, alphabet) = (Self::OFFSETS[i], Self::OFFSETS[i + 1] - Self::OFFSETS[i]);
            counters[start + symbols[i]] += 1;
            delta[start + (symbols[i].wrapping_sub(before[i]) & (alphabet - 1))] += 1;
        }
        *before = symbols;
    }
}

struct F16;

impl Format for F16 {
    const SIZE: usize = 2;
    const EXPONENT: u32 = 5;
    const MANTISSA: u32 = 10;
}

struct Bf16;

impl Format for Bf16 {
    const SIZE: usize = 2;
    const EXPONENT: u32 = 8;
    const MANTISSA: u32 = 7;
}

struct F32;

impl Format for F32 {
    const SIZE: usize = 4;
    const EXPONENT: u32 = 8;
    const MANTISSA: u32 = 23;
}

/// An entropy that was counted, possibly over several contexts.
#[derive(Clone, Copy, Debug, Default)]
struct Estimate {
    /// Values.
    values: u64,
    /// Plain estimate for all values together, in bits.
    bits: f64,
    /// Symbols that occur besides the first, summed over contexts.
    spare: u64,
}

/// `n * log2(n)` of small numbers: the logarithm is what takes time.
static SMALL: LazyLock<Vec<f64>> =
    LazyLock::new(|| (0..4096).map(|n| f64::from(n) * f64::from(n.max(1)).log2()).collect());

fn n_log2_n(n: u64) -> f64 {
    let small = usize::try_from(n).ok().and_then(|n| SMALL.get(n));
    small.copied().unwrap_or_else(|| n as f64 * (n as f64).log2())
}

impl Estimate {
    /// Of one context.
    fn of<T: Copy + Into<u64>>(counts: &[T]) -> Self {
        let (mut values, mut seen, mut sum) = (0, 0u64, 0.0);
        for &count in counts {
            let count: u64 = count.into();
            values += count;
            seen += u64::from(count > 0);
            sum += n_log2_n(count);
        }
        Self { values, bits: n_log2_n(values) - sum, spare: seen.saturating_sub(1) }
    }

    /// Adds another context.
    fn add(&mut self, other: &Self) {
        self.values += other.values;
        self.bits += other.bits;
        self.spare += other.spare;
    }

    /// The corrected estimate, from zero to `log2` of the alphabet.
    fn bits_per_value(&self, alphabet: usize) -> f64 {
        let correction = self.spare as f64 / (2.0 * std::f64::consts::LN_2);
        let bits = (self.bits + correction) / self.values.max(1) as f64;
        bits.clamp(0.0, (alphabet as f64).log2())
    }
}

#[cfg(test)]
mod tests {
    use gearbox_core::{Chunk, Shape, Stage};

    use super::*;
    use crate::dump::{NewEntry, Selection, write_reference_entry};

    /// Entropies of keys that hold these elements.
    fn of_keys<const SIZE: usize>(dtype: DType, shape: Shape, element: impl Fn(usize) -> [u8; SIZE]) -> Entropy {
        let keys: Vec<u8> = (0..shape.elements()).flat_map(element).collect();
        let chunk = Chunk::new(shape, dtype, &keys).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let entry = NewEntry::new("run", 0, 0, Stage::Prefill, chunk, chunk);
        write_reference_entry(&folder.path().join("run/layer_0"), &entry, false).unwrap();
        Entropies::of(&Dump::open(folder.path(), &Selection::default()).unwrap()).unwrap().tensors[0].entropy
    }

    #[test]
    fn constant_carries_nothing_but_the_bits_that_are_not_looked_at() {
        let found = of_keys(DType::F16, Shape::new(40, 2, 8), |_| 0x3C01u16.to_le_bytes());
        assert_eq!((found.raw, found.channel, found.floor), (Streams::default(), Streams::default(), 0.0));
        assert!(found.ceiling.is_infinite());
        let found = of_keys(DType::F32, Shape::new(40, 2, 8), |_| 0x3F80_0001u32.to_le_bytes());
        assert_eq!((found.raw, found.floor, found.ceiling), (Streams::default(), 11.0, 32.0 / 11.0));
    }

    #[test]
    fn every_pattern_once_carries_all_bits() {
        let shape = Shape::new(64, 8, 128);
        let found = of_keys(DType::F16, shape, |i| (i as u16).to_le_bytes());
        assert_eq!(found.raw, Streams { sign: 1.0, exponent: 5.0, mantissa: 10.0, hi: 8.0, lo: 8.0 });
        assert_eq!((found.values, found.floor, found.ceiling), (1 << 16, 16.0, 1.0));
        let found = of_keys(DType::Bf16, shape, |i| (i as u16).to_le_bytes());
        assert_eq!(found.raw, Streams { sign: 1.0, exponent: 8.0, mantissa: 7.0, hi: 8.0, lo: 8.0 });
        let found = of_keys(DType::F32, Shape::new(32, 8, 1_024), |i| (i as u32 * 16_381).to_le_bytes());
        assert!(found.raw.mantissa > 11.99, "{found:?}");
    }

    #[test]
    fn stream_that_each_channel_holds_constant_carries_nothing_given_the_channel() {
        // More channels than are counted at a time; signs and exponents depend on the channel only.
        let (channels, tokens) = (300, 50);
        let found = of_keys(DType::F16, Shape::new(tokens, 3, 100), |i| {
            let (channel, token) = (i % channels, i / channels);
            let (sign, exponent, mantissa) = (channel % 2, channel / 2 % 4, (token * 7 + channel) % 16);
            ((sign * (1 << 15) + exponent * (1 << 10) + mantissa) as u16).to_le_bytes()
        });
        assert_eq!((found.raw.sign, found.channel.sign, found.channel.exponent), (1.0, 0.0, 0.0));
        assert_eq!((found.channel_floor, found.channel.hi), (1.0 + found.raw.mantissa, 0.0));
        assert!((found.raw.exponent - 2.0).abs() < 1e-3 && found.channel.mantissa > 3.9, "{found:?}");
    }

    #[test]
    fn delta_of_a_ramp_is_one_symbol_behind_the_first_token() {
        let found = of_keys(DType::F16, Shape::new(256, 1, 4), |i| (i as u16 / 4).to_le_bytes());
        assert_eq!((found.raw.lo, found.raw.sign), (8.0, 0.0));
        // One symbol in 256 is another.
        let plain = 8.0 / 256.0 - 255.0 / 256.0 * f64::log2(255.0 / 256.0);
        assert!((found.delta.lo - plain - 0.5 / (1_024.0 * 2f64.ln())).abs() < 1e-12, "{found:?}");
    }

    #[test]
    fn correction_is_that_of_miller_and_madow_and_is_capped() {
        let plain = 2.0 - 0.75 * 3f64.log2();
        let known = [(&[3u32, 1][..], plain + 1.0 / (8.0 * 2f64.ln())), (&[1, 1, 1, 1], 2.0), (&[7], 0.0), (&[], 0.0)];
        for (counts, expected) in known {
            assert!((Estimate::of(counts).bits_per_value(4) - expected).abs() < 1e-12, "{counts:?}");
        }
    }
}
