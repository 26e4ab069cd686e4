//! The combination matrix: every transform before every codec, for every element type, with how each pairing ends.
//!
//! `tests/data/matrix.txt` holds one of *success*, *unsupported with reason* and *failure with reason* for each pairing. A changed cell
//! fails until it is accepted with `GEARBOX_BLESS=1 cargo test -p gearbox-tests matrix`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use gearbox::dump::{Dump, LayerSpec, RunSpec, SafetensorsWriter, Selection, Stage, TensorSpec};
use gearbox::sweep::{Containers, Opened, Outcome, Plan, Row, SweepConfig};
use gearbox_core::{AnyEntry, DType, Kind, Registry};
use half::{bf16, f16};
use serde_json::{Value, json};

use crate::run::root;

const SEQ: usize = 40;
const HEADS: usize = 2;
const DIM: usize = 16;

/// A dump of one layer: a smooth walk over tokens, another one per channel, in four tokens of decoding and the rest of prefill.
fn dump(path: &Path, dtype: DType) -> Dump {
    let tensor = TensorSpec { dtype, heads: HEADS, dim: DIM };
    let spec = RunSpec {
        name: "matrix".into(),
        entries: vec![(0, SEQ - 4, Stage::Prefill), ((SEQ - 4) as u64, 4, Stage::Decode)],
        tokens: Some((0..SEQ as u32).map(|token| token % 7).collect()),
        layers: vec![LayerSpec { id: 0, key: tensor, value: tensor, query: Some(tensor) }],
        ..RunSpec::default()
    };
    let value = |role: usize, idx: usize| {
        let (token, channel) = (idx / (HEADS * DIM), idx % (HEADS * DIM));
        let phase = 0.3 * token as f32 + 1.7 * channel as f32 + role as f32;
        phase.sin() * (1.0 + channel as f32 / 4.0)
    };
    let bytes = |value: f32| match dtype {
        DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        DType::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    };
    let mut writer = SafetensorsWriter::create(path, &spec, false).unwrap();
    for (role, name) in ["layers.0.key", "layers.0.value", "layers.0.query"].into_iter().enumerate() {
        let tensor: Vec<u8> = (0..SEQ * HEADS * DIM).flat_map(|idx| bytes(value(role, idx))).collect();
        let (prefill, decode) = tensor.split_at((SEQ - 4) * HEADS * DIM * dtype.size());
        writer.append(name, prefill).unwrap();
        writer.append(name, decode).unwrap();
    }
    writer.finish().unwrap();
    Dump::open(path, &Selection::default()).unwrap()
}

fn ids(registry: &Registry, kind: Kind) -> Vec<&str> {
    registry.entries().filter(|entry| entry.kind() == kind).map(AnyEntry::id).collect()
}

fn pipeline(transform: Option<&str>, codec: &str) -> Value {
    let codec = json!({ "id": codec });
    let transforms: Vec<_> = transform.iter().map(|id| json!({ "id": id })).collect();
    let lanes = match transform {
        // The codec codes what holds most of the data; scales, positions and modes go elsewhere.
        Some(_) => json!({ "tensor": codec, "codes": codec, "rows": codec, "*": { "id": "zstd" } }),
        None => codec,
    };
    json!({ "routes": [{ "transforms": transforms, "codec": lanes }], "chunking": { "mode": "chunked-grouped", "tokens": 16 } })
}

fn cell(row: &Row) -> String {
    match &row.outcome {
        Outcome::Ok => "success".into(),
        Outcome::Unsupported(reason) => format!("unsupported: {reason}"),
        Outcome::Failed { state, reason } => format!("failure ({state}): {reason}"),
    }
}

#[test]
fn every_pairing_ends_as_recorded() {
    let registry = gearbox_plugins::registry().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut transforms = vec![None];
    transforms.extend(ids(&registry, Kind::Transform).into_iter().map(Some));
    let codecs = ids(&registry, Kind::Codec);
    let pairs = || transforms.iter().flat_map(|transform| codecs.iter().map(move |codec| (*transform, *codec)));
    let pipelines = pairs().map(|(transform, codec)| pipeline(transform, codec)).collect();
    let config = SweepConfig { pipelines, ..SweepConfig::default() };
    let containers = Containers { folder: folder.path().to_owned(), keep: false, overwrite: false };
    let mut text = String::new();
    for (name, dtype) in [("f16", DType::F16), ("bf16", DType::Bf16), ("f32", DType::F32)] {
        let dump = dump(&folder.path().join(format!("{name}.safetensors")), dtype);
        let sweep = Plan::new(&config, &registry).unwrap().run(vec![Opened::new(dump).unwrap()], &containers).unwrap();
        assert!(sweep.same.is_empty(), "{:?}", sweep.same);
        for ((transform, codec), row) in pairs().zip(&sweep.rows) {
            writeln!(text, "{name} {} + {codec}: {}", transform.unwrap_or("-"), cell(row)).unwrap();
        }
    }
    let path = root().join("tests/data/matrix.txt");
    if std::env::var_os("GEARBOX_BLESS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let held = fs::read_to_string(&path).unwrap_or_default();
    let changed: Vec<_> = text.lines().filter(|line| !held.lines().any(|held| held == *line)).collect();
    assert!(held == text, "GEARBOX_BLESS=1 accepts these cells:\n{}", changed.join("\n"));
}
