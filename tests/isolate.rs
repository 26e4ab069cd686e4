//! Isolated plugins give what they give in this process, and what misbehaves ends in a named state without harm to the next call.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use gearbox::dump::{Dump, Selection};
use gearbox::engine;
use gearbox::isolate::{Isolation, Limits, Spawn, isolated};
use gearbox::pipelines;
use gearbox_core::{
    AnyEntry, AttentionStep, Bound, CacheGeometry, CacheView, Chunk, ChunkMut, Codec, Context, DType, Elem, Error,
    EvictionPolicy, LaneRef, LaneSpec, Latents, Pipeline, Registry, Result, Role, Rope, RopePairing, RopeScaling,
    Sample, Shape,
};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::run::{gearbox, root, sample};

mod plugins;

/// The worker of the tests, built once in the profile of the tests.
fn worker() -> Spawn {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
        let build = std::process::Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--locked", "--workspace", "--example", "isolate-worker"])
            .args(["--profile", profile])
            .current_dir(root())
            .status();
        assert!(build.unwrap().success(), "the worker does not build");
        let test = std::env::current_exe().unwrap();
        test.parent().unwrap().parent().unwrap().join("examples/isolate-worker")
    });
    Spawn { program: program.clone(), arguments: Vec::new() }
}

/// Limits that the tests meet soon.
fn tight() -> Limits {
    Limits { wall_seconds: 20.0, cpu_seconds: 20, address_space_bytes: 1 << 30, output_bytes: 64 << 20 }
}

fn here() -> Registry {
    plugins::registry().unwrap()
}

/// The same plugins in workers.
fn there(limits: Limits) -> Registry {
    let isolation = Isolation::new(worker(), limits);
    let mut registry = Registry::empty();
    for entry in here().entries() {
        registry.insert(isolation.isolated(entry)).unwrap();
    }
    registry
}

fn codec(registry: &Registry, id: &str, settings: &Value) -> std::sync::Arc<dyn Codec> {
    registry.codec(id).unwrap().build(settings).unwrap()
}

/// Bytes that neither repeat nor look like noise.
fn bytes(len: usize) -> Vec<u8> {
    let wave = |idx: usize| ((idx as f32 * 0.37).sin() * 20.0 + 64.0) as i32;
    (0..len).map(|idx| wave(idx).to_le_bytes()[0] + (idx % 7) as u8).collect()
}

fn encode(codec: &dyn Codec, spec: &LaneSpec, bytes: &[u8], cx: &Context<'_>) -> Result<Vec<u8>> {
    let mut out = b"before".to_vec();
    codec.encode(LaneRef::new(spec, bytes)?, cx, &mut out)?;
    assert!(out.starts_with(b"before"), "what was there stays");
    Ok(out.split_off(6))
}

fn decode(codec: &dyn Codec, encoded: &[u8], spec: &LaneSpec, cx: &Context<'_>) -> Result<Vec<u8>> {
    let mut out = vec![0x55; spec.byte_len()];
    codec.decode(encoded, spec, cx, &mut out)?;
    Ok(out)
}

/// A context that tells everything.
struct Told {
    tokens: Vec<u32>,
    rope: Rope,
    tensor: Vec<u8>,
}

impl Told {
    fn new() -> Self {
        let scaling = RopeScaling::Linear { factor: 0.1 };
        let rope = Rope { pairing: RopePairing::Adjacent, theta: 12345.678, rotary_dim: 4, scaling };
        Self { tokens: vec![7, u32::MAX, 0], rope, tensor: bytes(2 * 3 * 2 * 4) }
    }

    fn context(&self) -> Context<'_> {
        let chunk = Chunk::new(Shape::new(3, 2, 4), DType::Bf16, &self.tensor).unwrap();
        Context {
            end_token: Some(1 << 40),
            tokens: Some(&self.tokens),
            rope: Some(&self.rope),
            peer: Some(chunk),
            history: Some(chunk.tokens(1..2)),
            history_tokens: Some(&self.tokens[1..2]),
            ..Context::new(31, Role::Value, u64::MAX)
        }
    }
}

const CX: Context<'_> = Context::new(2, Role::Key, 64);

#[test]
fn entries_of_a_worker_are_those_of_its_registry() {
    let listed = Isolation::new(worker(), tight()).entries().unwrap();
    let (here, there) = (here(), listed);
    assert_eq!(here.entries().count(), there.len());
    for (here, there) in here.entries().zip(&there) {
        assert_eq!(
            (here.kind(), here.id(), here.aliases(), here.summary(), here.source(), here.format_version()),
            (there.kind(), there.id(), there.aliases(), there.summary(), there.source(), there.format_version())
        );
        assert_eq!((here.schema(), here.origin()), (there.schema(), there.origin()));
        assert_eq!(here.default_config().unwrap(), there.default_config().unwrap(), "{}", here.id());
    }
}

#[test]
fn the_program_itself_serves_built_ins_and_no_missing_library() {
    let gearbox = PathBuf::from(gearbox().get_program());
    let listed = Isolation::new(Spawn::program(&gearbox, &[]), tight()).entries().unwrap();
    let built_in = gearbox_plugins::registry().unwrap();
    assert_eq!(
        listed.iter().map(AnyEntry::id).collect::<Vec<_>>(),
        built_in.entries().map(AnyEntry::id).collect::<Vec<_>>()
    );
    let missing = Spawn::program(&gearbox, &["/nonexistent/plugin.so".into()]);
    assert!(Isolation::new(missing, tight()).entries().is_err());
}

#[test]
fn every_built_in_codec_gives_the_same_bytes_isolated() {
    let (here, there) = (here(), there(Limits::default()));
    let sizes = [(4, 2, 16), (128, 2, 64), (0, 2, 64)];
    let told = Told::new();
    for entry in here.entries().filter(|entry| entry.origin() != "tests") {
        let AnyEntry::Codec(local) = entry else { continue };
        let (local, remote) = (local.build(&json!({})).unwrap(), codec(&there, entry.id(), &json!({})));
        assert_eq!((local.config(), local.capabilities()), (remote.config(), remote.capabilities()), "{}", entry.id());
        for (elem, (seq, heads, dim)) in [Elem::F16, Elem::F32, Elem::U8, Elem::Bits(12)].into_iter().zip(sizes) {
            let spec = LaneSpec::new("codes", elem, Shape::new(seq, heads, dim));
            let mut lane = bytes(spec.byte_len());
            if elem == Elem::Bits(12) {
                lane.as_chunks_mut::<2>().0.iter_mut().for_each(|pair| pair[1] &= 0xF);
            }
            if !local.capabilities().elems.contains(elem) {
                continue;
            }
            assert_eq!(local.max_encoded_len(&spec), remote.max_encoded_len(&spec), "{}", entry.id());
            let cx = told.context();
            let encoded = encode(local.as_ref(), &spec, &lane, &cx).unwrap();
            assert_eq!(encoded, encode(remote.as_ref(), &spec, &lane, &cx).unwrap(), "{} {elem}", entry.id());
            assert_eq!(lane, decode(remote.as_ref(), &encoded, &spec, &cx).unwrap(), "{} {elem}", entry.id());
            let (cut, longer) = (&encoded[..encoded.len() / 2], [&encoded[..], &[0]].concat());
            for damaged in [cut, &longer] {
                let [local, remote] = [&local, &remote]
                    .map(|codec| decode(codec.as_ref(), damaged, &spec, &cx).map_err(|error| key(&error)));
                assert_eq!(local, remote, "{} {elem}", entry.id());
            }
        }
    }
}

/// Kind and message.
fn key(error: &Error) -> (String, String) {
    (format!("{:?}", error.kind()), error.to_string())
}

#[test]
fn training_and_artifacts_cross() {
    let (here, there) = (here(), there(tight()));
    let spec = LaneSpec::new("tensor", Elem::F16, Shape::new(32, 2, 16));
    let lanes: Vec<_> = (0..3).map(|part| bytes(spec.byte_len() + part)[part..].to_vec()).collect();
    for (id, settings) in [("rans", json!({})), ("huffman", json!({ "codebook": "global" })), ("zstd", json!({}))] {
        let Ok(local) = here.codec(id).unwrap().build(&settings) else { continue };
        let remote = codec(&there, id, &settings);
        let samples =
            || lanes.iter().map(|lane| Sample { spec: spec.clone(), bytes: lane.into(), layer: 1, role: Role::Value });
        let [learnt, isolated] = [&local, &remote].map(|codec| codec.train(&mut samples()).unwrap());
        assert_eq!(learnt, isolated, "{id}");
        assert!(learnt.is_some() || id != "huffman", "this one learns");
        let Some(artifact) = learnt else { continue };
        let [local, remote] = [&local, &remote].map(|codec| codec.with_artifact(&artifact.0).unwrap().unwrap());
        let encoded = encode(local.as_ref(), &spec, &lanes[1], &CX).unwrap();
        assert_eq!(encoded, encode(remote.as_ref(), &spec, &lanes[1], &CX).unwrap(), "{id}");
        assert_eq!(lanes[1], decode(remote.as_ref(), &encoded, &spec, &CX).unwrap(), "{id}");
    }
    let spec = LaneSpec::new("codes", Elem::Bits(3), Shape::flat(5));
    let sample = || Sample { spec: spec.clone(), bytes: [1, 2, 3, 4, 5].as_slice().into(), layer: 9, role: Role::Key };
    let [local, remote] = [&here, &there].map(|registry| codec(registry, "hostile-codec", &json!({})));
    let learnt = local.train(&mut [sample(), sample()].into_iter()).unwrap();
    assert_eq!(learnt, remote.train(&mut [sample(), sample()].into_iter()).unwrap());
    assert_eq!(remote.train(&mut std::iter::empty()).unwrap(), None);
    assert!(remote.with_artifact(b"").unwrap().is_none());
    let twice = remote.with_artifact(b"first").unwrap().unwrap().with_artifact(b"second").unwrap().unwrap();
    let spec = LaneSpec::new("codes", Elem::U8, Shape::flat(3));
    assert!(encode(twice.as_ref(), &spec, &[1, 2, 3], &CX).unwrap().ends_with(b"second\x01\x02\x03"));
}

#[test]
fn the_whole_context_crosses() {
    let (here, there) = (here(), there(tight()));
    let told = Told::new();
    let spec = LaneSpec::new("codes", Elem::U8, Shape::new(5, 1, 3));
    for cx in [told.context(), CX] {
        let [local, remote] = [&here, &there]
            .map(|registry| encode(&*codec(registry, "hostile-codec", &json!({})), &spec, &bytes(15), &cx).unwrap());
        assert_eq!(local, remote);
        assert_eq!(decode(&*codec(&there, "hostile-codec", &json!({})), &local, &spec, &cx).unwrap(), bytes(15));
    }
}

#[test]
fn transforms_give_the_same_lanes_isolated() {
    let (here, there) = (here(), there(Limits::default()));
    let told = Told::new();
    let shape = Shape::new(6, 2, 8);
    let values = (0..shape.elements()).map(|idx| (idx as f32 * 0.7).sin() * (1.0 + (idx % 8) as f32));
    let tensor: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
    let cases = [
        ("quant", json!({ "bits": 3, "delta": "auto", "outliers": 0.1 })),
        ("clip", json!({})),
        ("block-norm", json!({})),
        ("truncate", json!({})),
        ("token-ref", json!({})),
        ("hostile-transform", json!({ "act": "alternative" })),
        ("hostile-transform", json!({})),
    ];
    for (id, settings) in cases {
        let [local, remote] = [&here, &there].map(|registry| registry.transform(id).unwrap().build(&settings).unwrap());
        assert_eq!(local.bound(), remote.bound(), "{id}");
        assert_eq!((local.config(), local.capabilities()), (remote.config(), remote.capabilities()), "{id}");
        assert_eq!(local.effective_config(Role::Key, 8), remote.effective_config(Role::Key, 8), "{id}");
        let tokens: Vec<u32> = (0..6).map(|token| token % 3).collect();
        let history = Chunk::new(shape, DType::F32, &tensor).unwrap();
        let cx =
            Context { tokens: Some(&tokens), history: Some(history), history_tokens: Some(&tokens), ..told.context() };
        let chunk = Chunk::new(shape, DType::F32, &tensor).unwrap();
        let [forward, isolated] = [&local, &remote].map(|transform| {
            let mut latents = Latents::new();
            transform.forward(chunk, &cx, &mut latents).unwrap();
            latents
        });
        assert_eq!(forward, isolated, "{id}");
        let [other, isolated] = [&local, &remote].map(|transform| transform.alternative(chunk, &forward).unwrap());
        assert_eq!(other, isolated, "{id}");
        assert_eq!(other.is_some(), settings["act"] == "alternative" || id == "quant" && other.is_some(), "{id}");
        let [local, remote] = [&local, &remote].map(|transform| {
            let mut out = vec![0; tensor.len()];
            transform.inverse(&forward, &cx, ChunkMut::new(shape, DType::F32, &mut out).unwrap()).unwrap();
            out
        });
        assert_eq!(local, remote, "{id}");
    }
}

#[test]
fn infinite_bounds_cross() {
    let transform = there(tight()).transform("hostile-transform").unwrap().build(&json!({})).unwrap();
    assert_eq!(transform.bound(), Bound::Absolute(f64::MAX));
}

fn watch(policy: &dyn EvictionPolicy) -> Result<Vec<gearbox_core::KeepSet>> {
    let geometry = CacheGeometry { layer: 1, layers: 4, q_heads: 4, kv_heads: 2, dim: 8 };
    let mut session = policy.session(&geometry)?;
    let mut plans = Vec::new();
    for step in 1..6_u32 {
        let tokens = step as usize * 2;
        // From the third step on, heads hold other tokens.
        let rows = if step < 3 { 1 } else { geometry.kv_heads as u32 };
        let live: Vec<u32> = (0..rows).flat_map(|row| row..row + step * 2).collect();
        let probabilities: Vec<f32> = (0..4 * tokens).map(|idx| (idx as f32 * 1.3 + step as f32).sin().abs()).collect();
        let first_query = u64::from(step);
        session.observe(&AttentionStep {
            first_query,
            queries: 1,
            tokens,
            live: &live,
            probabilities: &probabilities,
        })?;
        plans.push(session.plan(&CacheView { seen: u64::from(step) * 2, tokens, live: &live })?);
    }
    Ok(plans)
}

#[test]
fn eviction_sessions_keep_their_state_apart() {
    let (here, there) = (here(), there(tight()));
    for settings in [json!({}), json!({ "act": "share" })] {
        let [local, remote] =
            [&here, &there].map(|registry| registry.eviction("hostile-policy").unwrap().build(&settings).unwrap());
        let expected = watch(local.as_ref()).unwrap();
        let geometry = CacheGeometry { layer: 1, layers: 4, q_heads: 4, kv_heads: 2, dim: 8 };
        assert_eq!(remote.retention(&geometry, 7), local.retention(&geometry, 7));
        std::thread::scope(|scope| {
            let sessions: Vec<_> = (0..4).map(|_| scope.spawn(|| watch(remote.as_ref()).unwrap())).collect();
            for session in sessions {
                assert_eq!(session.join().unwrap(), expected);
            }
        });
    }
}

#[test]
fn many_threads_call_at_once() {
    let there = there(tight());
    let spec = LaneSpec::new("tensor", Elem::F16, Shape::new(16, 2, 16));
    let codecs =
        ["zstd", "store", "gear-delta"].map(|id| (codec(&here(), id, &json!({})), codec(&there, id, &json!({}))));
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (spec, codecs) = (&spec, &codecs);
            scope.spawn(move || {
                for call in 0..20 {
                    let (local, remote) = &codecs[(thread + call) % 3];
                    let lane = bytes(spec.byte_len() + thread + call).split_off(thread + call);
                    let encoded = encode(remote.as_ref(), spec, &lane, &CX).unwrap();
                    assert_eq!(encoded, encode(local.as_ref(), spec, &lane, &CX).unwrap());
                    assert_eq!(decode(remote.as_ref(), &encoded, spec, &CX).unwrap(), lane);
                }
            });
        }
    });
}

/// Around the sizes at which the shared buffers grow, from a codec that appends and one that writes in place.
#[test]
fn long_lanes_come_back_whole() {
    let (here, there) = (here(), there(tight()));
    for (id, settings) in [("store", json!({})), ("hostile-codec", json!({ "at": "encode_into" }))] {
        let [local, remote] = [&here, &there].map(|registry| codec(registry, id, &settings));
        for len in [0, (1 << 20) - 65, (1 << 20) - 64, (1 << 20) - 63, 1 << 20, 3_000_001] {
            let spec = LaneSpec::new("codes", Elem::U8, Shape::flat(len));
            let lane = bytes(len);
            let encoded = encode(local.as_ref(), &spec, &lane, &CX).unwrap();
            assert!(encode(remote.as_ref(), &spec, &lane, &CX).unwrap() == encoded, "{id} {len}");
            assert!(decode(remote.as_ref(), &encoded, &spec, &CX).unwrap() == lane, "{id} {len}");
        }
    }
}

/// More objects than a worker remembers, one after the other and again.
#[test]
fn forgotten_objects_are_built_again() {
    let there = there(tight());
    let spec = LaneSpec::new("codes", Elem::U8, Shape::flat(3));
    let codecs: Vec<_> = (0..40)
        .map(|number: u8| codec(&there, "hostile-codec", &json!({})).with_artifact(&[number]).unwrap().unwrap())
        .collect();
    for (number, codec) in codecs.iter().enumerate().chain(codecs.iter().enumerate().rev()) {
        let encoded = encode(codec.as_ref(), &spec, &[9, 8, 7], &CX).unwrap();
        assert!(encoded.ends_with(&[number as u8, 9, 8, 7]));
    }
}

#[test]
fn containers_of_isolated_plugins_are_the_same_bytes() {
    let dump = Dump::open(sample(), &Selection::default()).unwrap();
    let (here, there) = (here(), there(Limits::default()));
    let pipelines = [
        json!({ "codec": { "id": "gear-delta" } }),
        json!({ "codec": { "id": "huffman" } }),
        json!({ "transforms": [{ "id": "token-ref" }], "codec": { "id": "lz4" } }),
        json!({
            "transforms": [{ "id": "quant", "bits": 4 }],
            "codec": { "codes": { "id": "rans" }, "*": { "id": "store" } },
        }),
    ];
    for route in pipelines {
        let pipeline = json!({ "routes": [route], "chunking": { "mode": "chunked", "tokens": 128 } });
        let spec = pipelines::expand(&pipeline).unwrap().remove(0);
        let [local, remote] = [&here, &there].map(|registry| {
            let mut pipeline = Pipeline::build(&spec, registry).unwrap();
            engine::encode(&dump, &mut pipeline, Vec::new(), &ProgressBar::hidden()).unwrap().0
        });
        assert!(local == remote, "{pipeline}");
    }
}

/// A call of a plugin that misbehaves, and a call of the same plugin that must work then.
fn deed(registry: &Registry, at: &str, act: &str) -> Result<()> {
    let settings = json!({ "at": at, "act": act });
    let spec = LaneSpec::new("codes", Elem::U8, Shape::flat(100));
    let lane = bytes(100);
    let codec = || registry.codec("hostile-codec")?.build(&settings);
    let transform = || registry.transform("hostile-transform")?.build(&settings);
    let (shape, told) = (Shape::new(2, 1, 4), Told::new());
    let tensor = bytes(16);
    let chunk = Chunk::new(shape, DType::F16, &tensor).unwrap();
    match at {
        "decode" => {
            let encoded = encode(&*codec()?, &spec, &lane, &CX)?;
            assert_eq!(decode(&*codec()?, &encoded, &spec, &CX)?, lane);
        }
        "train" | "sample" => {
            let sample = Sample { spec: spec.clone(), bytes: lane.into(), layer: 0, role: Role::Key };
            codec()?.train(&mut std::iter::once(sample))?;
        }
        "with_artifact" => drop(codec()?.with_artifact(b"some")?),
        "forward" | "inverse" | "alternative" | "bound" => {
            let (transform, mut latents) = (transform()?, Latents::new());
            transform.forward(chunk, &told.context(), &mut latents)?;
            transform.alternative(chunk, &latents)?;
            let mut out = vec![0; 16];
            transform.inverse(&latents, &told.context(), ChunkMut::new(shape, DType::F16, &mut out)?)?;
            assert_eq!(out, tensor);
        }
        "session" | "observe" | "plan" => drop(watch(&*registry.eviction("hostile-policy")?.build(&settings)?)?),
        _ => drop(encode(&*codec()?, &spec, &lane, &CX)?),
    }
    Ok(())
}

#[track_caller]
fn ends(registry: &Registry, at: &str, act: &str, state: &str, words: &str) {
    let error = deed(registry, at, act).unwrap_err();
    assert_eq!(error.kind().state(), state, "{at} {act}: {error}");
    assert!(error.to_string().contains(words), "{at} {act}: {error}");
    assert!(!error.to_string().contains('\n'), "{at} {act}: {error}");
    if matches!(state, "panicked" | "timed-out" | "out-of-memory" | "wrong-length") || state.starts_with("crashed") {
        assert!(error.to_string().contains("plugin `hostile-"), "{at} {act}: {error}");
    }
    deed(registry, at, "nothing").unwrap();
}

#[test]
fn a_panic_in_any_callback_is_named() {
    let there = there(tight());
    let places = [
        "new",
        "capabilities",
        "config",
        "max_encoded_len",
        "encode",
        "encode_into",
        "decode",
        "train",
        "sample",
        "with_artifact",
        "forward",
        "inverse",
        "alternative",
        "bound",
        "session",
        "observe",
        "plan",
    ];
    for place in places {
        ends(&there, place, "panic", "panicked", &format!("as the test asked, at {place}"));
    }
}

#[test]
fn crashes_are_named_by_their_signal() {
    let there = there(tight());
    for place in ["new", "encode", "train", "inverse", "observe"] {
        ends(&there, place, "abort", "crashed(SIGABRT)", "signal 6");
        ends(&there, place, "exit", "crashed(exit)", "exit status: 0");
    }
    ends(&there, "decode", "kill", "crashed(SIGKILL)", "signal 9");
    ends(&there, "encode", "overflow", "crashed(SIGABRT)", "overflowed its stack");
    ends(&there, "encode", "garbage", "crashed(bad-reply)", "not the answer");
    ends(&there, "encode", "complain", "crashed(SIGABRT)", "complaint 99999");
}

#[test]
fn lengths_that_are_wrong_are_named() {
    let there = there(tight());
    ends(&there, "encode", "longer", "wrong-length", "expected at most 4196 bytes (`max_encoded_len`), got 4");
    ends(&there, "encode_into", "claim", "wrong-length", "expected at most 4196 bytes (`max_encoded_len`), got 4197");
    ends(&there, "encode_into", "overwrite", "wrong-length", "behind the end");
    ends(&there, "decode", "overwrite", "wrong-length", "behind the end");
    let small = self::there(Limits { output_bytes: 150, ..tight() });
    let error = deed(&small, "encode", "longer").unwrap_err();
    assert_eq!(error.kind().state(), "wrong-length");
    assert!(error.to_string().contains("expected at most 150 bytes (`output_bytes`)"), "{error}");
}

#[test]
fn memory_beyond_the_limit_is_named() {
    let there = there(tight());
    for place in ["encode", "decode", "forward", "plan"] {
        ends(&there, place, "allocate", "out-of-memory", "memory allocation of 67108864 bytes failed");
    }
}

#[test]
fn calls_that_never_end_are_named() {
    let slow = there(Limits { wall_seconds: 0.5, ..tight() });
    deed(&slow, "encode", "nothing").unwrap();
    for (place, act) in [("encode", "spin"), ("decode", "sleep"), ("sample", "sleep"), ("plan", "spin")] {
        let start = Instant::now();
        ends(&slow, place, act, "timed-out", "no answer within 0.5 s (`wall_seconds`)");
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    let busy = there(Limits { cpu_seconds: 1, ..tight() });
    ends(&busy, "encode", "spin", "timed-out", "`cpu_seconds`");
}

#[test]
fn own_errors_are_handed_on_as_they_are() {
    let (here, there) = (here(), there(tight()));
    for (at, act) in [("new", "refuse"), ("encode", "refuse-lane")] {
        let [local, remote] = [&here, &there].map(|registry| key(&deed(registry, at, act).unwrap_err()));
        assert_eq!(local, remote);
    }
    let wrong = json!({ "at": 3 });
    let [local, remote] =
        [&here, &there].map(|registry| key(&registry.codec("hostile-codec").unwrap().build(&wrong).unwrap_err()));
    assert_eq!(local, remote);
}

#[test]
fn printing_and_reading_break_nothing() {
    let there = there(tight());
    for place in ["new", "encode", "train", "observe"] {
        deed(&there, place, "print").unwrap();
    }
}

#[test]
fn failures_without_a_place_meet_the_next_call() {
    let there = there(tight());
    let settings = json!({ "at": "max_encoded_len", "act": "abort" });
    let codec = codec(&there, "hostile-codec", &settings);
    let spec = LaneSpec::new("codes", Elem::U8, Shape::flat(10));
    assert_eq!(codec.max_encoded_len(&spec), 10);
    let error = encode(codec.as_ref(), &spec, &bytes(10), &CX).unwrap_err();
    assert_eq!(error.kind().state(), "crashed(SIGABRT)");
    let settings = json!({ "at": "effective_config", "act": "panic" });
    let transform = there.transform("hostile-transform").unwrap().build(&settings).unwrap();
    assert_eq!(transform.effective_config(Role::Key, 8), transform.config());
}

#[test]
fn a_lost_session_stays_lost() {
    let there = there(tight());
    let policy = there.eviction("hostile-policy").unwrap().build(&json!({ "at": "plan", "act": "panic" })).unwrap();
    let geometry = CacheGeometry { layer: 0, layers: 1, q_heads: 1, kv_heads: 1, dim: 1 };
    let mut session = policy.session(&geometry).unwrap();
    let view = CacheView { seen: 1, tokens: 1, live: &[0] };
    assert_eq!(session.plan(&view).unwrap_err().kind().state(), "panicked");
    let error = session.plan(&view).unwrap_err();
    assert_eq!(error.kind().state(), "panicked");
    assert!(error.to_string().contains("its process ended in an earlier call"), "{error}");
}

#[test]
fn a_worker_that_does_not_start_is_an_error() {
    let missing = Spawn { program: "/nonexistent/worker".into(), arguments: Vec::new() };
    let AnyEntry::Codec(entry) = isolated(here().get("store").unwrap(), missing, tight()) else { panic!() };
    let error = entry.build(&json!({})).unwrap_err();
    assert!(error.to_string().contains("starting a worker: `/nonexistent/worker`"), "{error}");
    let failing = Spawn { arguments: vec!["--fail".into()], ..worker() };
    let error = Isolation::new(failing, tight()).entries().unwrap_err();
    assert_eq!(error.kind().state(), "panicked");
    let other = Spawn { program: "/bin/echo".into(), arguments: Vec::new() };
    let error = Isolation::new(other, tight()).entries().unwrap_err();
    assert!(error.kind().state().starts_with("crashed("), "{error}");
}

#[test]
fn a_worker_ends_with_its_host() {
    let Spawn { program, .. } = worker();
    let mut child = std::process::Command::new(program)
        .args(["--limits", "{}"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "it waits for questions");
    drop(child.stdin.take());
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(10), "it is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What isolation costs: `cargo nextest run --release -p gearbox-tests isolation_cost --run-ignored only --no-capture`.
#[test]
#[ignore = "a measurement"]
fn isolation_cost() {
    let there = there(Limits::default());
    let (local, remote) = (codec(&here(), "store", &json!({})), codec(&there, "store", &json!({})));
    for len in [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20] {
        let spec = LaneSpec::new("tensor", Elem::U8, Shape::flat(len));
        let lane = bytes(len);
        let (mut copy, mut out, mut encoded) = (vec![0; len], vec![0; len], Vec::with_capacity(len));
        let mut times: [Vec<f64>; 5] = Default::default();
        let mut time = |which: usize, work: &mut dyn FnMut()| {
            let start = Instant::now();
            work();
            times[which].push(start.elapsed().as_secs_f64() * 1e6);
        };
        for _ in 0..((1 << 30) / len).clamp(30, 2000) {
            time(0, &mut || std::hint::black_box(&mut copy).copy_from_slice(std::hint::black_box(&lane)));
            for (which, codec) in [(1, &local), (3, &remote)] {
                encoded.clear();
                time(which, &mut || codec.encode(LaneRef::new(&spec, &lane).unwrap(), &CX, &mut encoded).unwrap());
                time(which + 1, &mut || codec.decode(&encoded, &spec, &CX, &mut out).unwrap());
            }
        }
        let medians = times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        let [copy, encode, decode, isolated_encode, isolated_decode] = medians;
        println!(
            "{:>6} KiB: memcpy {copy:.1} us; encode {encode:.1}, isolated {isolated_encode:.1} (adds {:.2} memcpy); \
             decode {decode:.1}, isolated {isolated_decode:.1} (adds {:.2} memcpy)",
            len >> 10,
            (isolated_encode - encode) / copy,
            (isolated_decode - decode) / copy
        );
    }
    let mut spawns: Vec<f64> = (0..20)
        .map(|_| {
            let start = Instant::now();
            codec(&self::there(Limits::default()), "store", &json!({}));
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    spawns.sort_by(f64::total_cmp);
    println!("start of a worker and first object: {:.1} ms", spawns[10]);
}
