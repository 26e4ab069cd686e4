//! Rust and the C header agree on every struct, offset and constant.

mod support;

use std::fmt::Write as _;
use std::process::Command;

use gearbox_abi::raw::{
    AttentionStep, Bound, CacheView, Capabilities, Chunk, ChunkMut, CodecTable, Context, ErrorText, EvictionTable,
    Geometry, Host, KeepSink, Lane, LaneSink, LaneSpec, Library, Plugin, Retention, Rope, Sample, Samples, Sink, Str,
    TransformTable,
};
use gearbox_abi::{convert, raw, status};
use gearbox_core::ErrorKind;

/// Name in C, size, and each field with its offset and size.
struct Layout {
    name: &'static str,
    size: usize,
    fields: Vec<(&'static str, usize, usize)>,
}

fn size_behind<S, T>(_: fn(&S) -> &T) -> usize {
    size_of::<T>()
}

macro_rules! layouts {
    ($($rust:ident as $c:ident { $($field:ident),* $(,)? })*) => {
        vec![$(Layout {
            name: stringify!($c),
            size: size_of::<$rust>(),
            fields: vec![$((
                stringify!($field),
                std::mem::offset_of!($rust, $field),
                size_behind(|raw: &$rust| &raw.$field),
            )),*],
        }),*]
    };
}

fn layouts() -> Vec<Layout> {
    layouts! {
        Str as gearbox_str { data, len }
        ErrorText as gearbox_error { data, capacity, len }
        Sink as gearbox_sink { state, append }
        LaneSpec as gearbox_lane_spec { name, elem, bits, seq, heads, dim }
        Lane as gearbox_lane { spec, data, len }
        Chunk as gearbox_chunk { seq, heads, dim, elem, reserved, data, len }
        ChunkMut as gearbox_chunk_mut { seq, heads, dim, elem, reserved, data, len }
        Rope as gearbox_rope {
            size, pairing, scaling, theta, rotary_dim, factor, low_freq_factor, high_freq_factor, original_context,
        }
        Context as gearbox_context {
            size, layer, role, first_token, end_token, tokens, token_count, rope, peer, history, history_tokens,
            history_token_count,
        }
        Capabilities as gearbox_capabilities { size, elems, needs, wants, flags }
        Bound as gearbox_bound { kind, value }
        LaneSink as gearbox_lane_sink { state, lane }
        Sample as gearbox_sample { lane, layer, role }
        Samples as gearbox_samples { state, next }
        Geometry as gearbox_geometry { size, layer, layers, q_heads, kv_heads, dim }
        AttentionStep as gearbox_attention_step {
            size, first_query, queries, tokens, live, live_count, probabilities, probability_count,
        }
        CacheView as gearbox_cache_view { size, seen, tokens, live, live_count }
        Retention as gearbox_retention { most, sinks, recent }
        KeepSink as gearbox_keep_sink { state, keep }
        Host as gearbox_host { size, abi_major, abi_minor, state, log, threads }
        CodecTable as gearbox_codec { size, max_encoded_len, encode, decode, train, with_artifact }
        TransformTable as gearbox_transform { size, bound, forward, inverse, effective_config, alternative }
        EvictionTable as gearbox_eviction { size, session, observe, plan, drop_session, retention }
        Plugin as gearbox_plugin {
            size, kind, format_version, id, summary, source, schema, aliases, alias_count, build, drop, config,
            capabilities, codec, transform, eviction,
        }
        Library as gearbox_library { size, abi_major, abi_minor, plugins, count }
    }
}

/// Constants of the header, and what Rust takes them for.
fn constants() -> Vec<(&'static str, u64)> {
    let status = |kind| u64::try_from(status::of(kind)).unwrap();
    let bit = |list: &[&str], name| 1 << list.iter().position(|known| *known == name).unwrap();
    let elem = |name| convert::ELEMS.iter().position(|known| *known == name).unwrap() as u64;
    vec![
        ("GEARBOX_ABI_MAJOR", raw::ABI_MAJOR.into()),
        ("GEARBOX_ABI_MINOR", raw::ABI_MINOR.into()),
        ("GEARBOX_OK", 0),
        ("GEARBOX_UNSUPPORTED", status(ErrorKind::Unsupported)),
        ("GEARBOX_UNSUPPORTED_DTYPE", status(ErrorKind::UnsupportedDType)),
        ("GEARBOX_INVALID_CONFIG", status(ErrorKind::InvalidConfig)),
        ("GEARBOX_INVALID_INPUT", status(ErrorKind::InvalidInput)),
        ("GEARBOX_SHAPE_MISMATCH", status(ErrorKind::ShapeMismatch)),
        ("GEARBOX_CORRUPT", status(ErrorKind::Corrupt)),
        ("GEARBOX_LIMIT", status(ErrorKind::LimitExceeded)),
        ("GEARBOX_MISMATCH", status(ErrorKind::Mismatch)),
        ("GEARBOX_IO", status(ErrorKind::Io)),
        ("GEARBOX_PANICKED", status(ErrorKind::PluginPanicked)),
        ("GEARBOX_OUT_OF_MEMORY", status(ErrorKind::OutOfMemory)),
        ("GEARBOX_WRONG_LENGTH", status(ErrorKind::WrongLength)),
        ("GEARBOX_OTHER", status(ErrorKind::UnknownPlugin)),
        ("GEARBOX_F16", elem("f16")),
        ("GEARBOX_BF16", elem("bf16")),
        ("GEARBOX_F32", elem("f32")),
        ("GEARBOX_U8", elem("u8")),
        ("GEARBOX_U16", elem("u16")),
        ("GEARBOX_U32", elem("u32")),
        ("GEARBOX_BITS", elem("bits")),
        ("GEARBOX_ALL_ELEMS", (1 << convert::ELEMS.len()) - 1),
        ("GEARBOX_NEEDS_TOKENS", bit(&convert::NEEDS, "tokens")),
        ("GEARBOX_NEEDS_ROPE", bit(&convert::NEEDS, "rope")),
        ("GEARBOX_NEEDS_PEER", bit(&convert::NEEDS, "peer")),
        ("GEARBOX_NEEDS_HISTORY", bit(&convert::NEEDS, "history")),
        ("GEARBOX_DETERMINISTIC", convert::DETERMINISTIC.into()),
        ("GEARBOX_STREAMING", convert::STREAMING.into()),
    ]
}

#[test]
fn c_and_rust_agree_on_every_offset_and_constant() {
    let (mut source, mut expected) = (String::new(), String::new());
    source.push_str("#include <stdio.h>\n#include \"gearbox_plugin.h\"\n#define P(x) printf(\"%s %llu\\n\", #x, (unsigned long long)(x))\n");
    source.push_str("int main(void) {\n");
    let mut line = |text: String, value: u64| {
        let _ = writeln!(source, "    P({text});");
        let _ = writeln!(expected, "{text} {value}");
    };
    for Layout { name, size, fields } in layouts() {
        line(format!("sizeof({name})"), size as u64);
        for (field, offset, _) in fields {
            line(format!("offsetof({name}, {field})"), offset as u64);
        }
    }
    for (name, value) in constants() {
        line(name.to_owned(), value);
    }
    source.push_str("    return 0;\n}\n");
    let folder = tempfile::tempdir().unwrap();
    let (file, program) = (folder.path().join("layout.c"), folder.path().join("layout"));
    std::fs::write(&file, &source).unwrap();
    // The macro's text is that of its argument, macros in it not expanded: constants are named, not numbered.
    support::cc(&[], &file, &program);
    let output = Command::new(&program).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}

/// The end of each field is the start of the next: no field is missing above, none is padded, and one appended later changes no offset.
#[test]
fn structs_have_no_padding() {
    for Layout { name, size, fields } in layouts() {
        let mut end = 0;
        for (field, offset, len) in fields {
            assert_eq!(offset, end, "{name}.{field}");
            end += len;
        }
        assert_eq!(size, end, "{name}");
    }
}

#[test]
fn header_compiles_as_c_and_as_cpp() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("user.c");
    std::fs::write(&file, "#include \"gearbox_plugin.h\"\nint user(void);\nint user(void) { return GEARBOX_OK; }\n")
        .unwrap();
    support::cc(&["-c"], &file, &folder.path().join("user.o"));
    let cpp = Command::new("c++")
        .args(["-std=c++17", "-x", "c++", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-c", "-I"])
        .arg(support::root().join("include"))
        .arg(&file)
        .arg("-o")
        .arg(folder.path().join("user-cpp.o"))
        .status();
    match cpp {
        Ok(status) => assert!(status.success(), "the header is no C++"),
        Err(error) => eprintln!("skipped C++: {error}"),
    }
}

#[test]
fn name_of_the_root_module_is_that_of_abi_stable() {
    let text = std::fs::read_to_string(support::root().join("src/lib.rs")).unwrap();
    assert!(text.contains(&format!("export_name = \"{}\"", abi_stable::library::ROOT_MODULE_LOADER_NAME)));
}
