//! Encoder and decoder give plugins the same context, also when tensors are lossy, and with any number of threads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::sync::{Arc, Mutex};

use gearbox::compare::{self, Options};
use gearbox::dump::{Dump, Selection};
use gearbox::engine;
use gearbox::sweep::{Containers, Opened, Outcome, Plan, SweepConfig};
use gearbox_core::container::{Container, ContainerWriter, EntryInfo, RunId, RunInfo, SequenceInfo};
use gearbox_core::{
    AnyEntry, Artifact, Bound, Capabilities, Chunk, ChunkMut, Chunking, Codec, Context, DType, ElemSet, EncodedChunk,
    Entry, Error, LaneRef, LaneSpec, Latents, Limits, LossyTransform, Needs, Pipeline, PipelineSpec, Plugin,
    PluginSpec, Registry, Result, Role, Sample, Shape, Span, Stage, config,
};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::run::{sample, stderr, text};

/// Adds to every byte a number made of everything that the context tells, and of a trained one.
#[derive(Debug)]
struct Nosy {
    config: NosySettings,
    trained: u8,
}

/// Settings of [`Nosy`].
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct NosySettings {
    /// Whether it works without the context too.
    optional: bool,
}

/// Parts of the context that the optional [`Nosy`] was given: token ids, RoPE facts, peer, history and its token ids.
static SEEN: Mutex<BTreeSet<[bool; 5]>> = Mutex::new(BTreeSet::new());

/// No settings.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct NoSettings {}

impl Plugin for Nosy {
    const ID: &'static str = "nosy";
    const SUMMARY: &'static str = "uses the whole context, for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = NosySettings;

    fn new(config: NosySettings) -> Result<Self> {
        Ok(Self { config, trained: 0 })
    }
}

fn fold(bytes: &[u8]) -> u8 {
    bytes.iter().fold(1, |sum: u8, byte| sum.wrapping_mul(31).wrapping_add(*byte))
}

impl Nosy {
    fn secret(&self, cx: &Context<'_>) -> Result<u8> {
        let given = [
            ("tokens", cx.tokens.is_some()),
            ("rope", cx.rope.is_some()),
            ("peer", cx.peer.is_some() || cx.role == Role::Key),
            ("history", cx.history.is_some()),
            ("tokens of the history", cx.history_tokens.is_some()),
        ];
        if self.config.optional {
            SEEN.lock().unwrap().insert(given.map(|(_, given)| given));
        } else if let Some((what, _)) = given.iter().find(|(_, given)| !given) {
            return Err(Error::invalid_input(format!("{what} missing")));
        }
        let ids =
            |ids: Option<&[u32]>| ids.unwrap_or_default().iter().fold(0, |sum: u32, id| sum.wrapping_add(*id)) as u8;
        let bytes = |chunk: Option<Chunk<'_>>| chunk.map_or(0, |chunk| fold(chunk.bytes()));
        let history = cx.history.map_or(0, |history| history.shape().seq);
        if cx.history.is_some() && history as u64 != cx.first_token
            || cx.history_tokens.is_some_and(|ids| ids.len() != history)
        {
            return Err(Error::invalid_input(format!("{history} tokens of history at {}", cx.first_token)));
        }
        let rope = cx.rope.map_or(0, |rope| rope.rotary_dim) as u8;
        let sums = ids(cx.tokens).wrapping_add(ids(cx.history_tokens).wrapping_mul(3));
        Ok(bytes(cx.history) ^ bytes(cx.peer) ^ rope ^ sums ^ self.trained ^ cx.layer as u8)
    }
}

impl Codec for Nosy {
    fn capabilities(&self) -> Capabilities {
        let all = Needs { tokens: true, rope: true, peer: true, history: true };
        let (needs, wants) = if self.config.optional { (Needs::NONE, all) } else { (all, Needs::NONE) };
        Capabilities { needs, wants, ..Capabilities::new(ElemSet::FLOATS) }
    }

    fn config(&self) -> Value {
        json!(self.config)
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
        Ok(Some(Arc::new(Self { config: self.config.clone(), trained: artifact[0] })))
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

/// `coarse`, then `nosy` with these settings.
fn nosy(settings: Value, chunking: &Value) -> (Registry, PipelineSpec) {
    let mut registry = Registry::empty();
    registry.insert(AnyEntry::Codec(Entry::of::<Nosy>("tests", |p| Arc::new(p)))).unwrap();
    registry.insert(AnyEntry::Transform(Entry::of::<Coarse>("tests", |p| Arc::new(p)))).unwrap();
    let mut codec = settings;
    codec["id"] = "nosy".into();
    let spec = json!({ "routes": [{ "transforms": [{ "id": "coarse" }], "codec": codec }], "chunking": chunking });
    (registry, config::from_value(&spec).unwrap())
}

/// Encodes the dump, decodes the container and checks that only low bytes differ.
fn only_low_bytes_differ(dump: &Dump, (registry, spec): &(Registry, PipelineSpec)) -> Container<File> {
    let mut pipeline = Pipeline::build(spec, registry).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    let bar = ProgressBar::hidden();
    let (_, encoded) = engine::encode(dump, &mut pipeline, &mut file, &bar).unwrap();
    let container: Container<File> = Container::open(file, &Limits::default()).unwrap();
    assert_eq!(encoded.ledger.total(), container.file_bytes());
    let decoder = container.pipeline(registry).unwrap();
    let compared = compare::with_dump(&container, &decoder, dump, Options::default(), &bar).unwrap();
    assert!(compared.decoded.failures.is_empty(), "{}", compared.decoded.failures[0]);
    let changed = dump.iter().flat_map(|(_, _, entry)| [&entry.key, &entry.value]).map(|tensor| {
        let bytes = tensor.map().unwrap();
        bytes.chunks_exact(2).filter(|word| word[0] != 0).count() as u64
    });
    assert_eq!(compared.changed_values, changed.sum::<u64>(), "low bytes, and nothing else");
    container
}

#[test]
fn context_is_the_same_on_both_sides_and_decoding_follows_the_stored_bytes() {
    let dump = Dump::open(sample(), &Selection::default()).unwrap();
    for chunking in [json!({ "mode": "per-entry" }), json!({ "mode": "chunked-grouped", "tokens": 100 })] {
        only_low_bytes_differ(&dump, &nosy(json!({}), &chunking));
    }
}

#[test]
fn wanted_context_is_what_the_dump_holds_on_both_sides() {
    let setup = nosy(json!({ "optional": true }), &json!({ "mode": "chunked-grouped", "tokens": 100 }));
    let sample = || Dump::open(sample(), &Selection::default()).unwrap();
    let seen = || std::mem::take(&mut *SEEN.lock().unwrap());

    let container = only_low_bytes_differ(&sample(), &setup);
    assert!(container.run(RunId(0)).unwrap().tokens(0, 512).is_some());
    assert_eq!(seen(), BTreeSet::from([[true; 5]]));

    // One layer lacks ids: those of another layer belong to the same tokens.
    let mut dump = sample();
    let entries = |dump: &mut Dump, layer: usize| std::mem::take(&mut dump.runs[0].layers[layer].entries);
    let without_ids =
        |entries: Vec<_>| entries.into_iter().map(|entry| gearbox::dump::Entry { tokens: None, ..entry }).collect();
    dump.runs[0].layers[1].entries = without_ids(entries(&mut dump, 1));
    only_low_bytes_differ(&dump, &setup);
    assert_eq!(seen(), BTreeSet::from([[true; 5]]));

    // No ids and no RoPE facts at all.
    dump.runs[0].rope = None;
    for layer in 0..dump.runs[0].layers.len() {
        dump.runs[0].layers[layer].entries = without_ids(entries(&mut dump, layer));
    }
    let container = only_low_bytes_differ(&dump, &setup);
    assert!(container.run(RunId(0)).unwrap().tokens.is_empty());
    // Before the first token there is no id that could be unknown.
    assert_eq!(seen(), [false, true].map(|first| [false, false, true, true, first]).into());

    let (registry, spec) = nosy(json!({}), &json!({ "mode": "per-entry" }));
    let refused = engine::check(&dump, &Pipeline::build(&spec, &registry).unwrap()).unwrap_err();
    assert!(refused.to_string().ends_with("a plugin needs token ids, which the dump does not hold"), "{refused}");
}

/// Stored bytes by layer, and those that belong to none, after a lossless round trip of the sample.
fn stored_by_layer(dump: &Dump, route: &Value) -> BTreeMap<Option<u32>, u64> {
    let registry = gearbox_plugins::registry().unwrap();
    let spec = json!({ "routes": [route], "chunking": { "mode": "chunked-grouped", "tokens": 128 } });
    let mut pipeline = Pipeline::build(&config::from_value(&spec).unwrap(), &registry).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    let bar = ProgressBar::hidden();
    let (_, encoded) = engine::encode(dump, &mut pipeline, &mut file, &bar).unwrap();
    let container: Container<File> = Container::open(file, &Limits::default()).unwrap();
    let compared =
        compare::with_dump(&container, &container.pipeline(&registry).unwrap(), dump, Options::default(), &bar)
            .unwrap();
    assert!(compared.decoded.failures.is_empty(), "{}", compared.decoded.failures[0]);
    assert_eq!(compared.changed_values, 0);
    let mut bytes = BTreeMap::new();
    for (account, count) in encoded.ledger.rows() {
        *bytes.entry(account.layer).or_default() += count;
    }
    bytes
}

#[test]
fn token_references_shrink_the_first_layers_and_cost_nothing_in_the_others() {
    let dump = Dump::open(sample(), &Selection::default()).unwrap();
    let alone = stored_by_layer(&dump, &json!({ "codec": { "id": "gear" } }));
    let codec = json!({ "rows": { "id": "gear" }, "*": { "id": "zstd" } });
    let referring = stored_by_layer(&dump, &json!({ "transforms": [{ "id": "token-ref" }], "codec": codec }));
    let original: u64 =
        dump.iter().filter(|(_, layer, _)| layer.id < 2).map(|(_, _, entry)| entry.original_bytes()).sum();
    // All that belongs to no layer counts as if these two needed it: token ids among it.
    let stored = referring[&None] + referring[&Some(0)] + referring[&Some(1)];
    assert!(original * 10 > stored * 14, "{original} bytes in {stored}");
    for (layer, bytes) in alone.iter().filter(|(layer, _)| layer.is_some()) {
        assert!(referring[layer] <= bytes + 200, "layer {layer:?}: {} bytes, {bytes} without", referring[layer]);
    }
}

/// Panics in encode.
#[derive(Debug)]
struct Fragile;

impl Plugin for Fragile {
    const ID: &'static str = "fragile";
    const SUMMARY: &'static str = "panics, for tests";
    const SOURCE: &'static str = "own work";
    const FORMAT_VERSION: u32 = 1;
    type Config = NoSettings;

    fn new(_: NoSettings) -> Result<Self> {
        Ok(Self)
    }
}

impl Codec for Fragile {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(ElemSet::ALL)
    }

    fn config(&self) -> Value {
        json!({})
    }

    fn max_encoded_len(&self, _: &LaneSpec) -> usize {
        0
    }

    fn encode(&self, _: LaneRef<'_>, cx: &Context<'_>, _: &mut Vec<u8>) -> Result<()> {
        assert!(cx.layer < 2, "layer {} is too deep", cx.layer);
        Ok(())
    }

    fn decode(&self, _: &[u8], _: &LaneSpec, _: &Context<'_>, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
}

#[test]
fn panic_of_a_plugin_is_a_failed_row_and_the_sweep_goes_on() {
    let mut registry = gearbox_plugins::registry().unwrap();
    registry.insert(AnyEntry::Codec(Entry::of::<Fragile>("tests", |p| Arc::new(p)))).unwrap();
    let dump = Dump::open(sample(), &Selection::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let containers = Containers { folder: folder.path().to_owned(), keep: false, overwrite: false };
    let specs = ["fragile", "store"].map(|id| PipelineSpec::of_codec(PluginSpec::new(id), Chunking::PerEntry));
    let config = SweepConfig { pipelines: specs.map(|spec| spec.to_value()).to_vec(), ..SweepConfig::default() };
    let rows = Plan::new(&config, &registry).unwrap().run(vec![Opened::new(dump).unwrap()], &containers).unwrap().rows;
    let Outcome::Failed { state, reason } = &rows[0].outcome else { panic!("{:?}", rows[0].outcome) };
    assert_eq!(state, "panicked");
    assert!(reason.contains("layer 2") && reason.contains("a plugin panicked: layer 2 is too deep"), "{reason}");
    assert_eq!(rows[1].outcome, Outcome::Ok);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn run_name_of_a_container_cannot_leave_the_output_folder() {
    let registry = gearbox_plugins::registry().unwrap();
    let spec = PipelineSpec::of_codec(PluginSpec::new("store"), Chunking::PerEntry);
    let pipeline = Pipeline::build(&spec, &registry).unwrap();
    let mut writer = ContainerWriter::new(Vec::new(), &pipeline).unwrap();
    let run = writer.add_run(&RunInfo { name: "../evil".into(), ..RunInfo::default() }).unwrap();
    let span = Span { start: 0, seq: 1 };
    for role in Role::ALL {
        let mut encoded = EncodedChunk::default();
        let entries = vec![EntryInfo { span, stage: Stage::Prefill }];
        let info = SequenceInfo { run, layer: 0, role, dtype: DType::F16, heads: 1, dim: 2, entries };
        let id = writer.add_sequence(info).unwrap();
        let chunk = Chunk::new(Shape::new(1, 1, 2), DType::F16, &[0; 4]).unwrap();
        pipeline.coder(0, role).unwrap().encode(chunk, &Context::new(0, role, 0), &mut encoded).unwrap();
        writer.add_chunk(id, 0, 1, encoded, &[0; 4]).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("evil.gbx");
    std::fs::write(&file, writer.finish().unwrap().0).unwrap();
    for format in ["reference", "safetensors"] {
        let out = folder.path().join("out");
        let message = stderr(&["decode", text(&file), "--out", text(&out), "--format", format], 2);
        assert!(message.contains("run name") && message.contains("../evil"), "{message}");
    }
    assert!(!folder.path().join("evil").exists());
}
