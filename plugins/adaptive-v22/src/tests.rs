use gearbox_conformance::reference::{Entry, dataset_a, dataset_b};
use gearbox_core::DType;

use super::*;

/// Bytes and blocks of each predictor over all entries: keys, then values. Every lane is decoded again.
fn encode_all(config: &Config, entries: &[Entry]) -> [(usize, [u64; 5], [u64; 5]); 2] {
    let codec = AdaptiveV22::new(config.clone()).unwrap();
    let mut with_account = Encoder::new(config.clone());
    Role::ALL.map(|role| {
        let (mut total, mut high, mut low) = (0, [0; 5], [0; 5]);
        for entry in entries {
            let bytes = if role == Role::Key { &entry.key } else { &entry.value };
            let mut encoded = Vec::new();
            let chunk = Chunk::new(entry.shape, DType::F16, bytes).unwrap();
            let usage = with_account.encode(chunk, role, &mut encoded).unwrap();
            total += encoded.len();
            for (idx, predictor) in Predictor::ALL.into_iter().enumerate() {
                high[idx] += usage.high(predictor);
                low[idx] += usage.low(predictor);
            }
            let (spec, context) =
                (LaneSpec::tensor(DType::F16, entry.shape), Context::new(entry.layer, role, entry.start));
            let mut again = Vec::new();
            codec.encode(LaneRef::new(&spec, bytes).unwrap(), &context, &mut again).unwrap();
            assert_eq!(again, encoded, "the codec writes what the encoder writes");
            let mut back = vec![0xEE; bytes.len()];
            codec.decode(&encoded, &spec, &context, &mut back).unwrap();
            assert_eq!(back, *bytes);
        }
        (total, high, low)
    })
}

fn reference(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config { choice: Choice::Reference, ..Config::default() };
    change(&mut config);
    config
}

#[test]
fn reference_choice_has_the_sizes_and_modes_of_the_reference() {
    let a = |bitshuffle| encode_all(&reference(|config| config.bitshuffle = bitshuffle), &dataset_a());
    let all_raw = [12, 0, 0, 0, 0];
    assert_eq!(a(false), [(16814, [6, 6, 0, 0, 0], all_raw), (17079, all_raw, all_raw)]);
    assert_eq!(a(true), [(17372, [6, 6, 0, 0, 0], all_raw), (18477, [6, 6, 0, 0, 0], all_raw)]);
    let b = encode_all(&reference(|config| config.block_seq = 16), &dataset_b());
    assert_eq!(b, [(5426, [3, 7, 5, 2, 5], [4, 6, 4, 2, 6]), (4856, [10, 10, 2, 0, 0], [8, 14, 0, 0, 0])]);
}

#[test]
fn legacy_sizes_are_those_of_one_block_without_header_and_mode() {
    // Eight entries of two streams.
    let without = |total: usize, entries: usize| total - 2 * entries * (HEADER + 1);
    for (bitshuffle, entries, expected) in
        [(false, dataset_a(), [16536, 17668]), (false, dataset_b(), [7387, 6054]), (true, dataset_b(), [6096, 4873])]
    {
        let config = Config {
            choice: Choice::Reference,
            block_seq: Config::MAX_BLOCK,
            bitshuffle,
            key_high: vec![Predictor::DeltaSeq],
            key_low: vec![Predictor::Raw],
            value_high: vec![Predictor::DeltaSeq],
            value_low: vec![Predictor::Raw],
            ..Config::default()
        };
        let totals = encode_all(&config, &entries).map(|(total, ..)| without(total, entries.len()));
        assert_eq!(totals, expected);
    }
}

/// Tensors of the bundled sample in F16: keys and values of every layer, 528 tokens.
fn sample() -> Vec<(Role, Shape, Vec<u8>)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/sample/demo_prompt_512_1.safetensors");
    let file = std::fs::read(path).unwrap();
    let (len, rest) = file.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    let header: Value = serde_json::from_slice(header).unwrap();
    let tensor = |layer, role: Role| {
        let tensor = &header[format!("layers.{layer}.{role}")];
        let extent = |axis: usize| tensor["shape"][axis].as_u64().unwrap() as usize;
        let place = |end: usize| tensor["data_offsets"][end].as_u64().unwrap() as usize;
        (role, Shape::new(extent(0), extent(1), extent(2)), data[place(0)..place(1)].to_vec())
    };
    (0..6).flat_map(|layer| Role::ALL.map(|role| tensor(layer, role))).collect()
}

fn encoded_len(config: &Config, shape: Shape, bytes: &[u8], role: Role) -> usize {
    let mut out = Vec::new();
    let chunk = Chunk::new(shape, DType::F16, bytes).unwrap();
    Encoder::new(config.clone()).encode(chunk, role, &mut out).unwrap();
    out.len()
}

#[test]
fn entropy_stays_close_to_trial_and_to_every_single_predictor() {
    for (bitshuffle, thousandths) in [(false, 1000), (true, 1010)] {
        let (mut entropy, mut trial, mut single) = (0, 0, 0);
        for (role, shape, bytes) in sample() {
            let len = |config: Config| encoded_len(&Config { bitshuffle, ..config }, shape, &bytes, role);
            entropy += len(Config::default());
            trial += len(Config { choice: Choice::Trial, ..Config::default() });
            let with = |predictor| {
                let only = vec![predictor];
                let [key_high, key_low, value_high, value_low] = std::array::from_fn(|_| only.clone());
                len(Config { key_high, key_low, value_high, value_low, ..Config::default() })
            };
            single += Predictor::ALL.map(with).into_iter().min().unwrap_or_default();
        }
        assert!(entropy * 100 <= trial * 101, "bitshuffle {bitshuffle}: entropy {entropy}, trial {trial}");
        assert!(entropy * 1000 <= single * thousandths, "bitshuffle {bitshuffle}: {entropy}, one predictor {single}");
    }
}

#[test]
fn entropy_mixes_predictors_where_blocks_differ() {
    let total = |choice| {
        let config = Config { block_seq: 16, choice, ..Config::default() };
        let [(keys, high, _), (values, ..)] = encode_all(&config, &dataset_b());
        (keys + values, high.iter().filter(|blocks| **blocks > 0).count())
    };
    let ((entropy, used), (trial, _)) = (total(Choice::Entropy), total(Choice::Trial));
    assert!(used > 1 && entropy * 100 <= trial * 103, "{used} predictors, {entropy} and {trial} bytes");
}

#[test]
fn noise_grows_by_the_headers_only() {
    let mut random = gearbox_conformance::data::SplitMix64::new(1);
    let bytes: Vec<u8> = (0..8192).map(|_| random.next_u64() as u8).collect();
    for (dtype, dim) in [(DType::F16, 64), (DType::F32, 32)] {
        let shape = Shape::new(32, 2, dim);
        let chunk = Chunk::new(shape, dtype, &bytes).unwrap();
        for choice in [Choice::Entropy, Choice::Trial] {
            let config = Config { choice, ..Config::default() };
            let mut out = Vec::new();
            let usage = Encoder::new(config.clone()).encode(chunk, Role::Key, &mut out).unwrap();
            assert_eq!(out.len(), bytes.len() + HEADER * dtype.size());
            assert_eq!(out.len(), AdaptiveV22::new(config).unwrap().max_encoded_len(&LaneSpec::tensor(dtype, shape)));
            assert_eq!(Predictor::ALL.map(|predictor| usage.high(predictor) + usage.low(predictor)), [0; 5]);
        }
    }
}

#[test]
fn bytes_are_those_of_the_documented_layout() {
    // Two tokens of one head and one channel: too short for zstd to shrink.
    let chunk = Chunk::new(Shape::new(2, 1, 1), DType::F16, &[0x10, 0x34, 0x20, 0x35]).unwrap();
    let mut out = Vec::new();
    Encoder::new(Config::default()).encode(chunk, Role::Key, &mut out).unwrap();
    assert_eq!(out, [0, 0, 0, 0, 2, 0, 0, 0, 0x34, 0x35, 0, 0, 0, 0, 2, 0, 0, 0, 0x10, 0x20]);

    let bytes: Vec<u8> = (0..1000_u32).flat_map(|i| [7, (i / 4) as u8]).collect();
    let chunk = Chunk::new(Shape::new(250, 1, 4), DType::F16, &bytes).unwrap();
    let [key_high, key_low] = [vec![Predictor::XorSeq], vec![Predictor::Raw]];
    let config = Config { block_seq: 100, bitshuffle: true, key_high, key_low, ..Config::default() };
    let mut out = Vec::new();
    Encoder::new(config).encode(chunk, Role::Key, &mut out).unwrap();
    let len = u32::from_le_bytes(out[4..8].try_into().unwrap()) as usize;
    assert_eq!((&out[..4], &out[8..11]), (&[3, 100, 0, 0][..], &[2, 2, 2][..]));
    let low = &out[11 + len..];
    let low_len = u32::from_le_bytes(low[4..8].try_into().unwrap()) as usize;
    assert_eq!((&low[..4], &low[8..11], low.len()), (&[3, 100, 0, 0][..], &[0, 0, 0][..], 11 + low_len));
    let mut first = vec![0; 1000];
    frame::Unframer::default().decompress(&low[11..], &mut first).unwrap();
    assert_eq!(first[..50], [0xFF; 50], "the lowest bit of 400 sevens");
    assert_eq!(first[150..400], [0; 250], "their upper five bits");
}

#[test]
fn decode_names_what_is_wrong() {
    let error = |encoded: &[u8]| {
        let spec = LaneSpec::tensor(DType::F16, Shape::new(2, 1, 1));
        let codec = AdaptiveV22::new(Config::default()).unwrap();
        let error = codec.decode(encoded, &spec, &Context::new(0, Role::Key, 0), &mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        error.to_string().strip_prefix("lane `tensor` (f16 (2, 1, 1)): ").unwrap().to_owned()
    };
    assert_eq!(error(&[0; 7]), "stream 0: expected a header, got 7 bytes");
    assert_eq!(error(&[4, 0, 0, 0, 0, 0, 0, 0]), "stream 0: form 4 with blocks of 0 tokens is unknown");
    assert_eq!(error(&[0, 1, 0, 0, 0, 0, 0, 0]), "stream 0: form 0 with blocks of 1 tokens is unknown");
    assert_eq!(error(&[1, 3, 0, 0, 0, 0, 0, 0]), "stream 0: form 1 with blocks of 3 tokens is unknown");
    assert_eq!(error(&[1, 1, 0, 0, 0, 0, 0, 0, 0]), "stream 0: expected 2 modes, got 1 bytes");
    assert_eq!(error(&[0, 0, 0, 0, 2, 0, 0, 0, 9]), "stream 0: expected 2 bytes, got 1 bytes");
    assert_eq!(error(&[0, 0, 0, 0, 1, 0, 0, 0, 9]), "stream 0: expected 2 bytes, got 1");
    let frame = zstd::bulk::compress(&[1, 2], 3).unwrap();
    let framed = |mode| [&[1, 2, 0, 0, frame.len() as u8, 0, 0, 0, mode], &frame[..]].concat();
    assert_eq!(error(&framed(5)), "stream 0: predictor 5 is unknown");
    assert_eq!(error(&framed(0)), "stream 1: expected a header, got 0 bytes");
    let twice = [framed(0), framed(4)].concat();
    assert_eq!(error(&[&twice[..], &[0]].concat()), "expected the end, got 1 more bytes");
    let streamed = zstd::encode_all(&[1, 2][..], 3).unwrap();
    let other = [&[1, 2, 0, 0, streamed.len() as u8, 0, 0, 0, 0], &streamed[..]].concat();
    assert_eq!(error(&other), "stream 0: expected one zstd frame of 2 bytes, got something else");
}

#[test]
fn lists_of_predictors_are_neither_empty_nor_repetitive() {
    let entry = gearbox_core::Registry::built_in().unwrap();
    let build = |list: Value| entry.codec("adaptive_v22").unwrap().build(&json!({"key_low": list}));
    for list in [json!([]), json!(["raw", "raw"])] {
        let error = build(list.clone()).unwrap_err().to_string();
        let expected = "expected a list of predictors that is not empty and names none twice";
        assert_eq!(error, format!("plugin `adaptive-v22`: `/key_low`: {expected}, got `{list}`"));
    }
    assert!(build(json!(["delta"])).unwrap_err().to_string().contains("`/key_low/0`: expected one of"));
    assert_eq!(build(json!(["xor_seq"])).unwrap().config()["key_low"], json!(["xor_seq"]));
}
