//! Loaded plugins at work: settings, context, errors, panics, guards.

mod support;

use std::sync::{Arc, Mutex};

use gearbox_abi::{Abi, Host, Level, Source};
use gearbox_core::{
    AttentionStep, Bound, CacheGeometry, CacheView, Chunk, ChunkMut, Codec, Context, DType, Elem, ElemSet, Error,
    ErrorKind, KeepSet, LaneRef, LaneSpec, Latents, LossyTransform, Registry, Retention, Role, Rope, RopePairing,
    RopeScaling, Sample, Shape,
};
use serde_json::json;
use support::{
    c_demo, codec, codec_entry, eviction_entry, example, hostile, loaded, other_c_demo, rust_demo, transform_entry,
};
use tempfile::tempdir;

const SHAPE: Shape = Shape::new(5, 2, 4);

fn spec() -> LaneSpec {
    LaneSpec::tensor(DType::F16, SHAPE)
}

fn bytes() -> Vec<u8> {
    (0..80).map(|byte| byte / 3).collect()
}

fn cx() -> Context<'static> {
    Context::new(1, Role::Value, 7)
}

fn encode(codec: &dyn Codec) -> Result<Vec<u8>, Error> {
    let mut out = vec![9];
    codec.encode(LaneRef::new(&spec(), &bytes())?, &cx(), &mut out)?;
    assert_eq!(out.remove(0), 9);
    Ok(out)
}

fn round_trip(codec: &dyn Codec) {
    let encoded = encode(codec).unwrap();
    let mut out = vec![0; 80];
    codec.decode(&encoded, &spec(), &cx(), &mut out).unwrap();
    assert_eq!(out, bytes());
}

fn transformed(transform: &dyn LossyTransform) -> Result<Latents, Error> {
    let mut latents = Latents::new();
    transform.forward(Chunk::new(SHAPE, DType::F16, &bytes())?, &cx(), &mut latents)?;
    Ok(latents)
}

fn said<T>(result: Result<T, Error>) -> (ErrorKind, String) {
    let error = result.err().unwrap();
    (error.kind(), error.to_string())
}

#[test]
fn libraries_of_both_worlds_are_registered_side_by_side() {
    let folder = tempdir().unwrap();
    let libraries = [loaded(&rust_demo()), loaded(&example("zoo")), loaded(&c_demo(folder.path()))];
    let mut registry = Registry::empty();
    for entry in libraries.iter().flat_map(|library| &library.entries) {
        registry.insert(entry.clone()).unwrap();
    }
    let ids: Vec<_> = registry.entries().map(|entry| format!("{} {}", entry.kind(), entry.id())).collect();
    assert_eq!(
        ids,
        [
            "transform channel-major",
            "codec copy",
            "codec copy-via-vec",
            "codec delta-varint",
            "transform hadamard",
            "eviction keeper",
            "codec learner",
            "codec odd",
            "codec plane-runs",
            "codec witness",
        ]
    );
    assert_eq!(libraries.each_ref().map(|library| library.abi), [Abi::Rust, Abi::Rust, Abi::C]);
    for id in ["delta-varint", "copy", "former-copy-via-vec", "plane-runs"] {
        let entry = registry.codec(id).unwrap();
        assert!(libraries.iter().any(|library| library.path.display().to_string() == entry.origin));
        round_trip(&*entry.build(&json!({})).unwrap());
    }
    let copy = registry.codec("copy").unwrap();
    assert_eq!((copy.format_version, &*copy.summary, &*copy.source), (3, "for tests", "own work"));
    let chunk = bytes();
    let transform = registry.transform("channel-major").unwrap().build(&json!({})).unwrap();
    let latents = transformed(&*transform).unwrap();
    assert_eq!(latents.lanes()[0].spec, LaneSpec::new("channels", Elem::F16, Shape::new(2, 4, 5)));
    let mut back = vec![0; 80];
    transform.inverse(&latents, &cx(), ChunkMut::new(SHAPE, DType::F16, &mut back).unwrap()).unwrap();
    assert_eq!((back, transform.bound()), (chunk, Bound::Lossless));
}

#[test]
fn settings_are_checked_resolved_and_used() {
    let folder = tempdir().unwrap();
    let (rust, c) = (loaded(&rust_demo()), loaded(&c_demo(folder.path())));
    let varint = codec(&rust, "delta-varint", &json!({"from": "element"}));
    assert_eq!(varint.config(), json!({"from": "element"}));
    assert_eq!(codec(&rust, "delta-varint", &json!({})).config(), json!({"from": "token"}));
    let runs = codec(&c, "plane-runs", &json!({"planes": false}));
    assert_eq!(runs.config(), json!({"planes": false}));
    assert_ne!(encode(&*runs).unwrap(), encode(&*codec(&c, "plane-runs", &json!({}))).unwrap());
    let (kind, text) = said(codec_entry(&c, "plane-runs").build(&json!({"planes": 1})));
    assert_eq!(kind, ErrorKind::InvalidConfig);
    assert!(text.starts_with("plugin `plane-runs`: `/planes`"), "{text}");
}

#[test]
fn context_crosses_whole() {
    let zoo = loaded(&example("zoo"));
    let witness = codec(&zoo, "witness", &json!({}));
    let declared = witness.capabilities();
    assert!(declared.needs.tokens && declared.needs.history && declared.streaming && !declared.deterministic);
    assert_eq!(declared.elems, ElemSet::ALL);
    let (data, tokens) = (bytes(), [1, 2, 3, 4, 5]);
    let rope = Rope { pairing: RopePairing::Adjacent, theta: 5e5, rotary_dim: 4, scaling: RopeScaling::None };
    let chunk = Chunk::new(SHAPE, DType::F16, &data).unwrap();
    let cx = Context {
        end_token: Some(99),
        tokens: Some(&tokens),
        rope: Some(&rope),
        peer: Some(chunk),
        history: Some(chunk.tokens(1..3)),
        history_tokens: Some(&tokens[1..3]),
        ..cx()
    };
    let mut out = Vec::new();
    witness.encode(LaneRef::new(&spec(), &data).unwrap(), &cx, &mut out).unwrap();
    let expected = format!("{cx:?} {:?} {:?}", data, &data[16..48]);
    assert_eq!(String::from_utf8(out).unwrap(), expected);
    let (kind, text) = said(encode(&*witness));
    assert_eq!((kind, &*text), (ErrorKind::Unsupported, "expected token ids in the context, got none"));
    let mut out = [0; 80];
    witness.decode(&[], &spec(), &cx, &mut out).unwrap();
    assert_eq!(out, [3; 80], "threads that the host allows");
}

#[test]
fn errors_and_panics_cross_with_kind_text_and_place() {
    let zoo = loaded(&example("zoo"));
    let build = |mode: &str| codec_entry(&zoo, "odd").build(&json!({ "mode": mode }));
    let odd = |mode| build(mode).unwrap();
    assert_eq!(said(build("fail-in-new")).1, "plugin `odd`: odd: `/mode`: expected another mode");
    assert_eq!(said(build("fail-in-new")).0, ErrorKind::InvalidConfig);
    assert_eq!(said(encode(&*odd("fail-in-encode"))), (ErrorKind::LimitExceeded, "expected less".to_owned()));
    let mut out = [0; 80];
    let found = [
        (said(build("panic-in-new")), "in new"),
        (said(build("panic-in-config")), "in config"),
        (said(encode(&*odd("panic-in-max"))), "in max_encoded_len"),
        (said(encode(&*odd("panic-in-encode"))), "in encode of lane `tensor` (f16 (5, 2, 4))"),
        (said(odd("panic-in-decode").decode(&[], &spec(), &cx(), &mut out)), "in decode"),
    ];
    for ((kind, text), expected) in found {
        assert_eq!(kind, ErrorKind::PluginPanicked, "{text}");
        assert!(text.contains("panicked at ") && text.contains("zoo.rs:") && text.ends_with(expected), "{text}");
    }
    assert_eq!(odd("panic-in-max").max_encoded_len(&spec()), usize::MAX);
    drop(odd("panic-in-drop"));
    let (kind, text) = said(encode(&*odd("exceed")));
    assert_eq!(kind, ErrorKind::WrongLength);
    assert_eq!(text, "expected at most 80 bytes (`max_encoded_len`), got 81");
    round_trip(&*odd("nothing"));
}

#[test]
fn undeclared_elements_and_wrong_lengths_never_reach_the_plugin() {
    let zoo = loaded(&example("zoo"));
    let odd = codec(&zoo, "odd", &json!({}));
    let lane = LaneSpec::new("codes", Elem::U8, SHAPE);
    let (kind, text) = said(odd.encode(LaneRef::new(&lane, &[0; 40]).unwrap(), &cx(), &mut Vec::new()));
    assert_eq!((kind, &*text), (ErrorKind::UnsupportedDType, "expected f16, bf16, f32, got u8"));
    assert_eq!(said(odd.decode(&[], &spec(), &cx(), &mut [0; 79])).0, ErrorKind::ShapeMismatch);
}

#[test]
fn training_and_artifacts_cross() {
    let zoo = loaded(&example("zoo"));
    let learner = codec(&zoo, "learner", &json!({}));
    let lane = LaneSpec::new("codes", Elem::Bits(3), Shape::flat(3));
    let samples = [(4, [1u8, 2, 3]), (9, [5, 6, 7])];
    let mut samples = samples.iter().map(|(layer, bytes)| Sample {
        spec: lane.clone(),
        bytes: bytes.as_slice().into(),
        layer: *layer,
        role: Role::Key,
    });
    let artifact = learner.train(&mut samples).unwrap().unwrap();
    assert_eq!(artifact.0, [24]);
    assert!(learner.train(&mut std::iter::empty()).unwrap().is_none());
    let trained = learner.with_artifact(&artifact.0).unwrap().unwrap();
    assert_eq!(encode(&*trained).unwrap()[..4], [24, 24, 24, 25]);
    round_trip(&*trained);
    assert!(learner.with_artifact(&[]).unwrap().is_none());
    assert_eq!(said(learner.with_artifact(&[1, 2])).1, "expected 1 byte, got 2");
    // A codec that learns nothing.
    let copy = codec(&zoo, "copy", &json!({}));
    assert!(copy.train(&mut std::iter::empty()).unwrap().is_none());
    assert!(copy.with_artifact(&[1]).unwrap().is_none());
}

#[test]
fn panic_of_the_samples_passes_through_the_plugin() {
    let learner = codec(&loaded(&example("zoo")), "learner", &json!({}));
    let mut samples = std::iter::from_fn(|| -> Option<Sample<'_>> { panic!("of the host") });
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| learner.train(&mut samples)));
    assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"of the host"));
}

#[test]
fn log_reaches_the_host() {
    let lines: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = {
        let lines = Arc::clone(&lines);
        Arc::new(move |level: Level, line: &str| lines.lock().unwrap().push(format!("{level:?}: {line}")))
    };
    let folder = tempdir().unwrap();
    let host = Host { log: Some(log), ..Host::default() };
    gearbox_abi::load(&Source::from(other_c_demo(folder.path(), &["-O1"])), &host).unwrap();
    assert_eq!(*lines.lock().unwrap(), ["Debug: c-demo is loaded"]);
}

fn plan(library: &gearbox_abi::Library, id: &str, settings: &serde_json::Value) -> Result<KeepSet, Error> {
    let policy = eviction_entry(library, id).build(settings)?;
    let geometry = CacheGeometry { layer: 0, layers: 2, q_heads: 4, kv_heads: 2, dim: 8 };
    let mut session = policy.session(&geometry)?;
    drop(policy);
    let live = [0, 3, 4, 9];
    session.observe(&AttentionStep {
        first_query: 9,
        queries: 2,
        tokens: 4,
        live: &live,
        probabilities: &[0.5; 32],
    })?;
    session.plan(&CacheView { seen: 11, tokens: 4, live: &live })
}

#[test]
fn eviction_sessions_cross() {
    let zoo = loaded(&example("zoo"));
    let plan = |mode: &str| plan(&zoo, "keeper", &json!({ "mode": mode }));
    assert_eq!(plan("all").unwrap(), KeepSet::All);
    assert_eq!(plan("shared").unwrap(), KeepSet::Shared(vec![0, 2]));
    assert_eq!(plan("heads").unwrap(), KeepSet::PerHead(vec![vec![0], vec![1]]));
    for (mode, expected) in [
        ("outside", "expected indices below the 4 live tokens, got 4"),
        ("unordered", "expected ascending indices of tokens, got 1 and then 0"),
        ("uneven", "expected lists of one length, got 1 and 2 tokens"),
        ("many", "expected at most the 4 live tokens, got 5 indices"),
        ("few", "expected all tokens, one shared list or 2 lists, got not all, 0 and 1"),
        ("panic", "after probabilities of 16"),
    ] {
        let (kind, text) = said(plan(mode));
        assert_eq!(kind, ErrorKind::PluginPanicked);
        assert!(text.ends_with(expected), "{text}");
    }
    let policy = eviction_entry(&zoo, "keeper").build(&json!({})).unwrap();
    let geometry = CacheGeometry { layer: 1, layers: 2, q_heads: 4, kv_heads: 2, dim: 8 };
    assert_eq!(policy.retention(&geometry, 10), Retention { most: Some(2), sinks: 10, recent: 1 });
    assert_eq!(policy.retention(&geometry, 9), Retention { most: None, sinks: 9, recent: 1 });
    let geometry = CacheGeometry { layer: 0, layers: 2, q_heads: 4, kv_heads: 0, dim: 8 };
    assert_eq!(said(policy.session(&geometry)).1, "expected at least one KV head, got none");
}

#[test]
fn c_eviction_policy_decides() {
    let folder = tempdir().unwrap();
    let library = loaded(&hostile(folder.path(), &[]));
    assert_eq!(plan(&library, "ends", &json!({})).unwrap(), KeepSet::Shared(vec![0, 3]));
    let (_, text) = said(plan(&library, "ends", &json!({"mode": "null-session"})));
    assert!(text.ends_with("expected a session, got null and no error"), "{text}");
}

/// Everything that a C library can get wrong and that shows from inside the process.
#[test]
fn breaches_of_the_contract_are_named() {
    let folder = tempdir().unwrap();
    let library = loaded(&hostile(folder.path(), &[]));
    let build = |mode: &str| codec_entry(&library, "hostile").build(&json!({ "mode": mode }));
    let codec = |mode| build(mode).unwrap();
    let mut out = [0; 80];
    let cases = [
        (said(build("fail")), ErrorKind::InvalidConfig, "plugin `hostile`: expected another mode"),
        (said(build("null-object")), ErrorKind::PluginPanicked, "expected an object, got null and no error"),
        (said(build("bad-json")), ErrorKind::PluginPanicked, "resolved settings: expected JSON, got 1 bytes"),
        (said(build("no-elems")), ErrorKind::Unsupported, "expected at least one element type, got none"),
        (said(build("unknown-elem")), ErrorKind::Unsupported, "expected element types of 7 bits, got 0x80"),
        (said(encode(&*codec("greedy"))), ErrorKind::OutOfMemory, "asks for 4611686018427387903 bytes to encode 80"),
        (said(encode(&*codec("overrun"))), ErrorKind::WrongLength, "encode wrote behind the end"),
        (said(encode(&*codec("long"))), ErrorKind::WrongLength, "encode returned 81 bytes"),
        (said(encode(&*codec("silent"))), ErrorKind::Corrupt, "failed with status 6 and no text"),
        (
            said(encode(&*codec("unknown-status"))),
            ErrorKind::PluginPanicked,
            "returned status 77, which does not exist",
        ),
        (said(encode(&*codec("bad-text"))), ErrorKind::Corrupt, "not \u{FFFD} text"),
        (said(encode(&*codec("long-text"))), ErrorKind::Corrupt, "xxxx"),
        (
            said(codec("overrun-decode").decode(&bytes(), &spec(), &cx(), &mut out)),
            ErrorKind::WrongLength,
            "decode wrote behind the end",
        ),
    ];
    for ((kind, text), expected, part) in cases {
        assert_eq!(kind, expected, "{text}");
        assert!(text.contains(part), "{text}");
    }
    round_trip(&*codec(""));
}

#[test]
fn breaches_of_a_transform_are_named() {
    let folder = tempdir().unwrap();
    let library = loaded(&hostile(folder.path(), &[]));
    let build = |mode: &str| transform_entry(&library, "hostile-transform").build(&json!({ "mode": mode }));
    let forward = |mode| said(transformed(&*build(mode).unwrap()));
    let cases = [
        (said(build("bad-bound")), ErrorKind::Unsupported, "bound: expected a kind from 0 to 4, got 9"),
        (forward("overrun"), ErrorKind::WrongLength, "forward of lane `tensor`"),
        (forward("huge-lane"), ErrorKind::LimitExceeded, "the limit of all lanes is"),
        (forward("odd-elem"), ErrorKind::Unsupported, "expected an element type from 0 to 5"),
        (forward("two-lanes"), ErrorKind::ShapeMismatch, "two lanes are named `tensor`"),
    ];
    for ((kind, text), expected, part) in cases {
        assert_eq!(kind, expected, "{text}");
        assert!(text.contains(part), "{text}");
    }
    let transform = build("overrun-inverse").unwrap();
    let latents = transformed(&*transform).unwrap();
    let mut out = [0; 80];
    let (_, text) = said(transform.inverse(&latents, &cx(), ChunkMut::new(SHAPE, DType::F16, &mut out).unwrap()));
    assert!(text.contains("inverse wrote behind the end"), "{text}");
}
