//! How far the lossless codecs get on real caches, all stored bytes counted.

use std::path::Path;

use gearbox::dump::{Dump, Selection};
use gearbox_core::{Codec, Context, LaneRef, LaneSpec, Role, Shape};
use serde_json::{Value, json};

use crate::run::{json, sample, shared, text};

/// The keys or values of one layer of one run.
struct Tensor {
    place: String,
    layer: u32,
    role: Role,
    spec: LaneSpec,
    bytes: Vec<u8>,
}

/// All tensors of a dump, entries joined along tokens.
fn tensors(path: &Path) -> Vec<Tensor> {
    let dump = Dump::open(path, &Selection::default()).unwrap();
    let mut tensors = Vec::new();
    for run in &dump.runs {
        for layer in &run.layers {
            for role in Role::ALL {
                let parts = layer.entries.iter().map(|entry| entry.tensor(role));
                let bytes: Vec<u8> = parts.clone().flat_map(|tensor| tensor.map().unwrap().to_vec()).collect();
                let seq = parts.clone().map(|tensor| tensor.shape.seq).sum();
                let first = parts.clone().next().unwrap();
                let spec = LaneSpec::tensor(first.dtype, Shape { seq, ..first.shape });
                let place = format!("run `{}`, layer {}, {role}", run.name, layer.id);
                tensors.push(Tensor { place, layer: layer.id, role, spec, bytes });
            }
        }
    }
    tensors
}

fn stored(codec: &dyn Codec, tensor: &Tensor) -> usize {
    let cx = Context::new(tensor.layer, tensor.role, 0);
    let mut encoded = Vec::new();
    codec.encode(LaneRef::new(&tensor.spec, &tensor.bytes).unwrap(), &cx, &mut encoded).unwrap();
    let mut decoded = vec![0; tensor.bytes.len()];
    codec.decode(&encoded, &tensor.spec, &cx, &mut decoded).unwrap();
    assert!(decoded == tensor.bytes, "{}", tensor.place);
    encoded.len()
}

/// The peers that need no other program; `tests/peers` compares with those that do.
const PEERS: [(&str, &str); 6] = [
    ("gear", r#"{"level": 3}"#),
    ("gear", r#"{"level": 19}"#),
    ("gear-delta", "{}"),
    ("zstd", r#"{"level": 19}"#),
    ("pcodec", r#"{"level": 8}"#),
    ("lz4", "{}"),
];

#[test]
fn planes_beats_every_peer_on_every_tensor() {
    let registry = gearbox_plugins::registry().unwrap();
    let planes = registry.codec("planes").unwrap().build(&json!({})).unwrap();
    let peers = PEERS.map(|(id, settings)| {
        let settings: Value = serde_json::from_str(settings).unwrap();
        (id, registry.codec(id).unwrap().build(&settings).unwrap())
    });
    let dumps = shared().map(|shared| shared.join("data/dumps/fp16"));
    for tensor in [sample()].into_iter().chain(dumps).flat_map(|dump| tensors(&dump)) {
        let own = stored(planes.as_ref(), &tensor);
        for (id, peer) in &peers {
            let theirs = stored(peer.as_ref(), &tensor);
            assert!(own <= theirs, "{}: planes takes {own} bytes, {id} {} takes {theirs}", tensor.place, peer.config());
        }
    }
}

#[test]
fn first_two_layers_reach_1_4_in_chunks_of_128_tokens() {
    // The other layers are stored as they are, and everything but their values is counted against the first two.
    let rope = json!({"pairing": "half-split", "theta": 10_000.0, "rotary_dim": 64});
    let pipeline = json!({
        "routes": [
            {
                "layers": "..2",
                "transforms": [{"id": "token-ref", "rope": rope}],
                "codec": {"rows": {"id": "planes"}, "*": {"id": "rans"}}
            },
            {"layers": "2..", "codec": {"id": "store"}}
        ],
        "chunking": {"mode": "chunked-grouped", "tokens": 128}
    });
    let pipeline = pipeline.to_string();
    let mut runs = vec![sample()];
    if let Some(shared) = shared() {
        runs.extend(["demo_prompt_512_1", "demo_prompt_2048_1"].map(|run| shared.join("data/dumps/fp16").join(run)));
    }
    for run in runs {
        let sweep = json(&["sweep", "--dump", text(&run), "--pipeline", &pipeline]);
        let row = &sweep["rows"][0];
        assert_eq!((&row["state"], &row["changed_values"]), (&Value::from("ok"), &Value::from(0)), "{row}");
        let (mut first, mut others) = (0, 0);
        for tensor in tensors(&run) {
            *if tensor.layer < 2 { &mut first } else { &mut others } += tensor.bytes.len() as u64;
        }
        let stored = row["stored_bytes"].as_u64().unwrap();
        assert!(first * 10 >= 14 * (stored - others), "{}: {first} bytes in {}", run.display(), stored - others);
    }
}
