//! Tables learned from many chunks and stored once, for chunks that are too short to pay for their own.

use std::collections::BTreeMap;

use gearbox_core::{DType, Error, LaneSpec, Result, Role, Sample};

use crate::cluster::{Budget, cluster};
use crate::coder::MAX_LOG;
use crate::fields::{Fields, MAX_PLANES, Planes as Rest};
use crate::frame::{put_len, take_len};
use crate::model::{LITERAL, MAX_LITERAL, Model, no_counts};
use crate::planes::{TABLE_BITS, literal_bins};
use crate::side::{Reader, Writer};

/// Exponents this far from one that occurred may occur elsewhere.
const REACH: usize = 2;

/// Which lanes a model is for.
type Key = (u32, u8, u8, usize);

fn key(layer: u32, role: Role, dtype: DType, row: usize) -> Key {
    (layer, role as u8, dtype as u8, row)
}

/// A model of literal rows and the base of its exponents.
#[derive(Clone, Debug)]
pub(crate) struct Learned {
    pub fields: Fields,
    pub model: Model,
}

/// What was learned, by layer, role, type and elements of a token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trained(BTreeMap<Key, Learned>);

impl Trained {
    /// Learns from samples; of each layer, role and form the first sample sets the base of the exponents.
    pub fn learn(samples: &mut dyn Iterator<Item = Sample<'_>>) -> Self {
        let mut counted: BTreeMap<Key, (Fields, Vec<[u32; 256]>)> = BTreeMap::new();
        let (mut symbols, mut rest) = (Vec::new(), Rest::default());
        for sample in samples {
            let row = sample.spec.shape.row();
            let Some(dtype) = sample.spec.elem.dtype().filter(|_| !sample.bytes.is_empty()) else { continue };
            let (fields, counts) = counted
                .entry(key(sample.layer, sample.role, dtype, row))
                .or_insert_with(|| (Fields::of(dtype, &sample.bytes), vec![[0; 256]; row]));
            symbols.clear();
            fields.split(&sample.bytes, &mut symbols, &mut rest);
            for symbols in symbols.chunks_exact(row) {
                for (counts, symbol) in counts.iter_mut().zip(symbols) {
                    counts[usize::from(*symbol)] += 1;
                }
            }
        }
        let learned =
            counted.into_iter().map(|(key, (fields, counts))| (key, Learned { fields, model: model(&counts) }));
        Self(learned.collect())
    }

    /// The model for a lane, if one was learned.
    pub fn find(&self, lane: &LaneSpec, dtype: DType, layer: u32, role: Role) -> Option<&Learned> {
        self.0.get(&key(layer, role, dtype, lane.shape.row()))
    }

    /// The bytes of an artifact: for each model its layer, role, type, elements of a token, base, and side information with its length.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for ((layer, role, dtype, row), learned) in &self.0 {
            out.extend_from_slice(&layer.to_le_bytes());
            out.extend_from_slice(&[*role, *dtype, learned.fields.base]);
            put_len(*row, &mut out);
            let mut side = Vec::new();
            let mut writer = Writer::new(&mut side);
            learned.model.clone().code(&mut writer, learned.fields.widths().len());
            writer.finish();
            put_len(side.len(), &mut out);
            out.extend_from_slice(&side);
        }
        out
    }

    /// Undoes [`Trained::to_bytes`].
    pub fn from_bytes(mut bytes: &[u8]) -> Result<Self> {
        let cut = || Error::corrupt("trained tables: the bytes end early");
        let mut all = BTreeMap::new();
        while !bytes.is_empty() {
            let (head, rest) = bytes.split_first_chunk::<7>().ok_or_else(cut)?;
            let [l0, l1, l2, l3, role, dtype, base] = *head;
            let role = Role::ALL.into_iter().find(|known| *known as u8 == role);
            let dtype = DType::ALL.into_iter().find(|known| *known as u8 == dtype);
            let (Some(role), Some(dtype)) = (role, dtype) else {
                return Err(Error::corrupt("trained tables: a role or type is unknown"));
            };
            let (row, rest) = take_len(rest).ok_or_else(cut)?;
            let (len, rest) = take_len(rest).ok_or_else(cut)?;
            let (side, rest) = rest.split_at_checked(len).ok_or_else(cut)?;
            // A channel takes at least a part of a bit, so that short bytes cannot ask for a large map.
            if row == 0 || row > len.saturating_mul(1 << 12) {
                return Err(Error::corrupt(format!("trained tables: {row} channels in {len} bytes")));
            }
            let fields = Fields::new(dtype, base);
            let mut model = Model::unread(row);
            let mut side = Reader::new(side);
            model.code(&mut side, fields.widths().len());
            side.finish()?;
            if model.similar.is_some() || model.coded_planes != [false; MAX_PLANES] {
                return Err(Error::corrupt("trained tables: expected tables of literal rows alone"));
            }
            all.insert(key(u32::from_le_bytes([l0, l1, l2, l3]), role, dtype, row), Learned { fields, model });
            bytes = rest;
        }
        Ok(Self(all))
    }
}

/// A model of literal rows from the counts of each channel.
fn model(channels: &[[u32; 256]]) -> Model {
    let mut pooled = [0_u32; 32];
    for counts in channels {
        for (symbol, count) in counts.iter().enumerate() {
            pooled[symbol >> 2 & 0x1F] += count;
        }
    }
    let bins = literal_bins(&pooled);
    let binned: Vec<[u32; 32]> = channels
        .iter()
        .map(|counts| {
            let mut sums = [0; 32];
            counts.iter().zip(&bins).for_each(|(count, bin)| sums[usize::from(*bin) % 32] += count);
            sums
        })
        .collect();
    let elements: u32 = pooled.iter().sum();
    let tables = (elements as usize / 2048).clamp(1, MAX_LITERAL);
    let map = cluster(&binned, Budget { tables, table_bits: TABLE_BITS });
    let mut counts = no_counts();
    for (channel, table) in channels.iter().zip(&map.of) {
        let sums = &mut counts[LITERAL + usize::from(*table)];
        sums.iter_mut().zip(channel).for_each(|(sum, count)| *sum += count);
    }
    let mut model = Model::new(MAX_LOG, 4, map, None, [false; MAX_PLANES]);
    model.set_tables(&counts);
    model.widen(REACH);
    model
}
