//! Encoder and decoder give plugins the same context, also when tensors are lossy, and with any number of threads.

use std::fs::File;
use std::sync::Arc;

use gearbox::dump::{Dump, Selection};
use gearbox::{compare, engine};
use gearbox_core::container::Container;
use gearbox_core::{
    AnyEntry, Artifact, Bound, Capabilities, Chunk, ChunkMut, Codec, Context, ElemSet, Entry, Error, LaneRef, LaneSpec,
    Latents, Limits, LossyTransform, Needs, Pipeline, PipelineSpec, Plugin, Registry, Result, Sample,
};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::run::sample;

/// Adds to every byte a number made of everything that the context tells, and of a trained one.
#[derive(Debug)]
struct Nosy {
    trained: u8,
}

/// No settings.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct NoSettings {}

impl Plugin for Nosy {
    const ID: &'static str = "nosy";
    const SUMMARY: &'static str = "uses the whole context, for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = NoSettings;

    fn new(_: NoSettings) -> Result<Self> {
        Ok(Self { trained: 0 })
    }
}

fn fold(bytes: &[u8]) -> u8 {
    bytes.iter().fold(1, |sum: u8, byte| sum.wrapping_mul(31).wrapping_add(*byte))
}

impl Nosy {
    fn secret(&self, cx: &Context<'_>) -> Result<u8> {
        let missing = |what| Error::invalid_input(format!("{what} is missing"));
        let tokens = cx.tokens.ok_or_else(|| missing("tokens"))?;
        let history = cx.history.ok_or_else(|| missing("history"))?;
        if history.shape().seq as u64 != cx.first_token {
            return Err(Error::invalid_input(format!(
                "{} tokens of history at {}",
                history.shape().seq,
                cx.first_token
            )));
        }
        let peer = match cx.role {
            gearbox_core::Role::Key => 0,
            gearbox_core::Role::Value => fold(cx.peer.ok_or_else(|| missing("peer"))?.bytes()),
        };
        let rope = cx.rope.ok_or_else(|| missing("rope"))?.rotary_dim as u8;
        let sum: u32 = tokens.iter().fold(0, |sum, id| sum.wrapping_add(*id));
        Ok(fold(history.bytes()) ^ peer ^ rope ^ sum as u8 ^ self.trained ^ cx.layer as u8)
    }
}

impl Codec for Nosy {
    fn capabilities(&self) -> Capabilities {
        let needs = Needs { tokens: true, rope: true, peer: true, history: true };
        Capabilities { needs, ..Capabilities::new(ElemSet::FLOATS) }
    }

    fn config(&self) -> Value {
        json!({})
    }

    fn max_encoded_len(&self, lane: &LaneSpec) -> usize {
        lane.byte_len() / 2
    }

    fn encode(&self, lane: LaneRef<'_>, cx: &Context<'_>, out: &mut Vec<u8>) -> Result<()> {
        let secret = self.secret(cx)?;
        // Keeps the high bytes only: shorter than the lane, so that the fallback does not step in.
        out.extend(lane.bytes().chunks_exact(2).map(|word| word[1].wrapping_add(secret)));
        Ok(())
    }

    fn decode(&self, encoded: &[u8], _: &LaneSpec, cx: &Context<'_>, out: &mut [u8]) -> Result<()> {
        let secret = self.secret(cx)?;
        for (word, byte) in out.chunks_exact_mut(2).zip(encoded) {
            word.copy_from_slice(&[0, byte.wrapping_sub(secret)]);
        }
        Ok(())
    }

    fn train(&self, samples: &mut dyn Iterator<Item = Sample<'_>>) -> Result<Option<Artifact>> {
        Ok(Some(Artifact(vec![samples.fold(7, |sum: u8, sample| sum.wrapping_add(fold(&sample.bytes)))])))
    }

    fn with_artifact(&self, artifact: &[u8]) -> Result<Option<Arc<dyn Codec>>> {
        Ok(Some(Arc::new(Self { trained: artifact[0] })))
    }
}

/// Clears the low byte of every FP16 word.
#[derive(Debug)]
struct Coarse;

impl Plugin for Coarse {
    const ID: &'static str = "coarse";
    const SUMMARY: &'static str = "clears low bytes, for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = NoSettings;

    fn new(_: NoSettings) -> Result<Self> {
        Ok(Self)
    }
}

impl LossyTransform for Coarse {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::F16)
    }

    fn config(&self) -> Value {
        json!({})
    }

    fn bound(&self) -> Bound {
        Bound::Unbounded
    }

    fn forward(&self, chunk: Chunk<'_>, _: &Context<'_>, out: &mut Latents) -> Result<()> {
        let lane = out.push(LaneSpec::tensor(chunk.dtype(), chunk.shape()))?;
        for (to, from) in lane.chunks_exact_mut(2).zip(chunk.bytes().chunks_exact(2)) {
            to.copy_from_slice(&[0, from[1]]);
        }
        Ok(())
    }

    fn inverse(&self, latents: &Latents, _: &Context<'_>, mut out: ChunkMut<'_>) -> Result<()> {
        out.bytes_mut().copy_from_slice(&latents.lane(LaneSpec::TENSOR)?.bytes);
        Ok(())
    }
}

#[test]
fn context_is_the_same_on_both_sides_and_decoding_follows_the_stored_bytes() {
    let mut registry = Registry::empty();
    registry.insert(AnyEntry::Codec(Entry::of::<Nosy>("tests", |p| Arc::new(p)))).unwrap();
    registry.insert(AnyEntry::Transform(Entry::of::<Coarse>("tests", |p| Arc::new(p)))).unwrap();
    let dump = Dump::open(sample(), &Selection::default()).unwrap();
    for chunking in [json!({ "mode": "per-entry" }), json!({ "mode": "chunked-grouped", "tokens": 100 })] {
        let spec = json!({ "routes": [{ "transforms": [{ "id": "coarse" }], "codec": { "id": "nosy" } }], "chunking": chunking });
        let spec: PipelineSpec = gearbox_core::config::from_value(&spec).unwrap();
        let mut pipeline = Pipeline::build(&spec, &registry).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let bar = ProgressBar::hidden();
        let (_, encoded) = engine::encode(&dump, &mut pipeline, &mut file, &bar).unwrap();
        let container: Container<File> = Container::open(file, &Limits::default()).unwrap();
        assert_eq!(encoded.ledger.total(), container.file_bytes());
        let decoder = container.pipeline(&registry).unwrap();
        let compared = compare::with_dump(&container, &decoder, &dump, &bar).unwrap();
        assert!(compared.decoded.failures.is_empty(), "{}", compared.decoded.failures[0]);
        let changed = dump.iter().flat_map(|(_, _, entry)| [&entry.key, &entry.value]).map(|tensor| {
            let bytes = tensor.map().unwrap();
            bytes.chunks_exact(2).filter(|word| word[0] != 0).count() as u64
        });
        assert_eq!(compared.changed_values, changed.sum::<u64>(), "low bytes, and nothing else");
    }
}
