use gearbox_core::{
    Bound, Capabilities, Chunk, Context, DType, Elem, ElemSet, ErrorKind, LaneSpec, Latents, Needs, Role, Shape, config,
};
use serde_json::json;

use super::Limits;
use super::shared::{Buffer, GUARD, Part, part};
use super::wire::{self, Answer, Ask, Asked, Facts, Known, Promise, Spec};

#[test]
fn frames_carry_version_and_length() {
    let frame = wire::frame(&Answer::Done).unwrap();
    assert_eq!(frame, b"gbw\x01\x06\0\0\0\"done\"");
    let head = |bytes: &[u8]| wire::text_len(*bytes.first_chunk().unwrap());
    assert_eq!(head(&frame), Some(6));
    assert_eq!(head(b"gbw\x02\x06\0\0\0"), None, "another version");
    assert_eq!(head(b"\nrunning"), None, "something printed");
    assert_eq!(head(b"gbw\x01\x01\0\0\x04"), None, "64 MiB and one byte");
    assert_eq!(head(b"gbw\x01\0\0\0\x04"), Some(64 << 20));
}

#[test]
fn failures_keep_their_kind() {
    let kinds = [
        ErrorKind::InvalidConfig,
        ErrorKind::Unsupported,
        ErrorKind::UnsupportedDType,
        ErrorKind::ShapeMismatch,
        ErrorKind::Corrupt,
        ErrorKind::Mismatch,
        ErrorKind::PluginPanicked,
        ErrorKind::WrongLength,
        ErrorKind::OutOfMemory,
    ];
    for kind in kinds {
        let text = serde_json::to_string(&Answer::Failed { kind, message: "why".into() }).unwrap();
        let Answer::Failed { kind: read, .. } = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
        assert_eq!(read, kind);
    }
    // Only the host sees how a process ended.
    assert!(serde_json::from_str::<Answer>(r#"{"failed":{"kind":"plugin-crashed","message":""}}"#).is_err());
}

#[test]
fn lane_specs_of_every_type_cross() {
    let elems = [Elem::F16, Elem::Bf16, Elem::F32, Elem::U8, Elem::U16, Elem::U32, Elem::Bits(1), Elem::Bits(16)];
    for elem in elems {
        let spec = LaneSpec::new("codes", elem, Shape::new(3, 2, 1));
        assert_eq!(Spec::of(&spec).lane(), Some(spec));
    }
    let strange = json!({ "name": "codes", "elem": "f64", "shape": { "seq": 1, "heads": 1, "dim": 1 } });
    assert_eq!(serde_json::from_value::<Spec>(strange).unwrap().lane(), None);
}

#[test]
fn facts_cross() {
    for elems in [ElemSet::F16, ElemSet::ALL, ElemSet::BITS.or(ElemSet::U32)] {
        let needs = Needs { rope: true, history: true, ..Needs::NONE };
        let declared = Capabilities { needs, deterministic: false, ..Capabilities::new(elems) };
        let text = serde_json::to_string(&Facts::new(declared, json!({}), None)).unwrap();
        assert_eq!(serde_json::from_str::<Facts>(&text).unwrap().capabilities(), Some(declared));
    }
    let nothing = json!({
        "elems": [], "needs": [false, false, false, false], "wants": [false, false, false, false],
        "deterministic": true, "streaming": false, "config": {}, "bound": null
    });
    assert_eq!(serde_json::from_value::<Facts>(nothing).unwrap().capabilities(), None);
    for bound in [Bound::Lossless, Bound::Absolute(f64::INFINITY), Bound::Relative(0.1), Bound::Peak(1e-300)] {
        let text = serde_json::to_string(&Promise::from(bound)).unwrap();
        assert_eq!(Bound::from(serde_json::from_str::<Promise>(&text).unwrap()), bound);
    }
}

#[test]
fn buffers_grow_on_either_side() {
    let mut host = Buffer::create().unwrap();
    let mut worker = Buffer::open(host.path()).unwrap();
    host.opened();
    let large: Vec<u8> = (0..3_000_000_u32).map(|idx| idx as u8).collect();
    let mut parts = host.rewrite();
    let (small, rest) = (parts.put(b"small").unwrap(), parts.put(&large).unwrap());
    let used = parts.used();
    assert_eq!((small.at, rest.at, used), (0, 64, 64 + large.len()));
    worker.follow(used).unwrap();
    assert_eq!(part(worker.bytes(), small), Some(b"small".as_slice()));
    assert!(part(worker.bytes(), rest) == Some(&large));
    assert!(host.follow(1 << 30).is_err(), "nobody wrote that much");
    let beyond = Part { at: usize::MAX, len: 2 };
    assert_eq!(part(worker.bytes(), beyond), None);
    worker.grow(9 << 20).unwrap();
    worker.guarded((9 << 20) - GUARD).unwrap().bytes.fill(3);
    host.follow(9 << 20).unwrap();
    assert_eq!(host.bytes()[(9 << 20) - GUARD - 1], 3);
}

#[test]
#[cfg(target_os = "linux")]
fn nobody_shortens_a_buffer() {
    let buffer = Buffer::create().unwrap();
    let other = std::fs::File::options().write(true).open(buffer.path()).unwrap();
    assert!(other.set_len(0).is_err());
    assert_eq!(buffer.bytes()[100], 0);
}

#[test]
fn guards_see_one_byte_too_many() {
    let mut buffer = Buffer::create().unwrap();
    let mut other = Buffer::open(buffer.path()).unwrap();
    for len in [0, 1, 64, 1 << 20, (1 << 20) - GUARD] {
        let filled = buffer.guarded(len).unwrap();
        filled.bytes.fill(9);
        assert!(filled.holds());
        other.follow(len + 1).unwrap();
        other.guarded(len + 1).unwrap().bytes[len] = 9;
        assert!(!filled.holds(), "{len}");
    }
}

#[test]
fn contexts_cross() {
    let (mut buffer, tensor) = (Buffer::create().unwrap(), [1, 2, 3, 4]);
    let chunk = Chunk::new(Shape::new(2, 1, 1), DType::F16, &tensor).unwrap();
    let cx = Context { tokens: Some(&[5, 1 << 31]), peer: Some(chunk), ..Context::new(3, Role::Value, 9) };
    let mut parts = buffer.rewrite();
    parts.put(&[0; 3]).unwrap();
    let known = Known::put(&cx, &mut parts).unwrap();
    let read = known.with(buffer.bytes(), |read| {
        assert_eq!((read.layer, read.role, read.first_token, read.tokens), (3, Role::Value, 9, cx.tokens));
        assert_eq!(
            read.peer.map(|peer| (peer.shape(), peer.dtype(), peer.bytes())),
            Some((chunk.shape(), DType::F16, &tensor[..]))
        );
        assert!(read.history.is_none() && read.rope.is_none() && read.end_token.is_none());
        Ok(())
    });
    read.unwrap();
}

#[test]
fn lanes_that_lie_are_refused() {
    let (mut buffer, mut latents) = (Buffer::create().unwrap(), Latents::new());
    latents.push(LaneSpec::new("codes", Elem::U8, Shape::flat(10))).unwrap().fill(1);
    let mut lanes = wire::put_lanes(&latents, &mut buffer.rewrite()).unwrap();
    assert_eq!(wire::read_lanes(&lanes, buffer.bytes()).unwrap(), latents);
    lanes[0].bytes.len = 11;
    assert_eq!(wire::read_lanes(&lanes, buffer.bytes()).unwrap_err().kind(), ErrorKind::ShapeMismatch);
    lanes[0].bytes = Part { at: usize::MAX, len: 10 };
    assert_eq!(wire::read_lanes(&lanes, buffer.bytes()).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn questions_are_read_as_they_were_asked() {
    let text = wire::frame(&Asked { number: 7, used: 3, ask: Ask::Train { object: 2 } }).unwrap();
    let asked: Asked = serde_json::from_slice(&text[wire::HEAD..]).unwrap();
    assert!(matches!(asked, Asked { number: 7, used: 3, ask: Ask::Train { object: 2 } }));
}

#[test]
fn limits_are_strict() {
    let read = |value| config::from_value::<Limits>(&value);
    assert_eq!(read(json!({})).unwrap(), Limits::default());
    assert_eq!(read(json!(Limits::default())).unwrap(), Limits::default());
    for wrong in [
        json!({ "wall_seconds": 0 }),
        json!({ "cpu_seconds": 0 }),
        json!({ "address_space_bytes": 1 << 20 }),
        json!({ "output_bytes": 0 }),
        json!({ "wall": 1 }),
    ] {
        assert_eq!(read(wrong.clone()).unwrap_err().kind(), ErrorKind::InvalidConfig, "{wrong}");
    }
}
