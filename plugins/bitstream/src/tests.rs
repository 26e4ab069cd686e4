//! Stored bytes of both codecs, what decode refuses, and shared tables.

use gearbox_conformance::data::{Case, DataKind, SplitMix64};
use gearbox_core::{DType, Elem, ErrorKind, Role, Shape};

use sha2::{Digest, Sha256};

use super::*;

const KEY: Context<'static> = Context::new(0, Role::Key, 0);
const VALUE: Context<'static> = Context::new(0, Role::Value, 0);

fn huffman() -> Huffman {
    Huffman::new(Config::default()).unwrap()
}

fn arithmetic() -> Arithmetic {
    Arithmetic::new(Config::default()).unwrap()
}

fn codes(elem: Elem, count: usize) -> LaneSpec {
    LaneSpec::new("codes", elem, Shape::flat(count))
}

fn encode(codec: &dyn Codec, spec: &LaneSpec, bytes: &[u8], cx: &Context<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    codec.encode(LaneRef::new(spec, bytes).unwrap(), cx, &mut out).unwrap();
    assert!(out.len() <= codec.max_encoded_len(spec), "{spec}: {} bytes", out.len());
    out
}

fn decode(codec: &dyn Codec, spec: &LaneSpec, encoded: &[u8], cx: &Context<'_>) -> Result<Vec<u8>> {
    let mut out = vec![0xA5; spec.byte_len()];
    codec.decode(encoded, spec, cx, &mut out)?;
    Ok(out)
}

fn message(codec: &dyn Codec, spec: &LaneSpec, encoded: &[u8]) -> String {
    let error = decode(codec, spec, encoded, &KEY).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    error.to_string().strip_prefix(&format!("{spec}: ")).unwrap().to_owned()
}

/// Symbols of so many bits that halve in frequency from one to the next, in memory.
fn geometric(bits: u8, count: usize, seed: u64) -> Vec<u8> {
    let mut random = SplitMix64::new(seed);
    let symbol = |random: u64| (random.trailing_zeros() * 37) as u16 & ((1_u32 << bits) - 1) as u16;
    let size = if bits <= 8 { 1 } else { 2 };
    (0..count).flat_map(|_| symbol(random.next_u64()).to_le_bytes().into_iter().take(size)).collect()
}

#[test]
fn stored_bytes_are_those_of_the_documented_layout() {
    // Four symbols, half of them 2: code lengths 2, 3, 1 and 3, codes 10, 110, 0 and 111.
    let symbols: Vec<u8> = [2, 0, 2, 1, 2, 3, 2, 0, 2, 2, 1, 3, 0, 2, 0, 2].repeat(4);
    let encoded = encode(&huffman(), &codes(Elem::Bits(8), 64), &symbols, &KEY);
    assert_eq!(encoded[0], 2, "one stream with its own table");
    // 252 symbols without a code are 18 and 234, which is 10 and 14 × 16.
    assert_eq!(encoded[1..5], [0x32, 0x31, 0xAE, 0x0E], "lengths, the lower half first");
    let digits = |byte: &u8| [7, 6, 5, 4, 3, 2, 1, 0].map(|bit| if byte >> bit & 1 == 1 { '1' } else { '0' });
    let bits: String = encoded[5..].iter().flat_map(digits).collect();
    let codes_of_16: String =
        symbols[..16].iter().map(|symbol| ["10", "110", "0", "111"][usize::from(*symbol)]).collect();
    assert_eq!(bits, format!("{}0000", codes_of_16.repeat(4)).split_at(bits.len()).0);
    assert_eq!(bits.len(), (4 * codes_of_16.len()).next_multiple_of(8));

    let encoded = encode(&arithmetic(), &codes(Elem::Bits(8), 64), &symbols, &KEY);
    assert_eq!(encoded[0], 2, "one stream with its own table");
    // 1024, 512, 2048 and 512 of 4096, then 252 zeros.
    assert_eq!(encoded[1..12], [0x80, 8, 0x80, 4, 0x80, 16, 0x80, 4, 0, 0xFB, 1]);
    // 112 bits of symbols fill three steps of 32; the last one is rounded up.
    assert_eq!(encoded.len(), 12 + 16);
}

#[test]
fn one_symbol_costs_almost_nothing() {
    for codec in [&huffman() as &dyn Codec, &arithmetic()] {
        let spec = LaneSpec::tensor(DType::F16, Shape::new(100, 2, 64));
        // -1.5: exponent 15, sign 1, mantissa 0x200.
        let bytes = 0xBE00_u16.to_le_bytes().repeat(12_800);
        assert_eq!(encode(codec, &spec, &bytes, &KEY), [0b01_01_01, 15, 1, 0, 2]);
    }
}

#[test]
fn noise_grows_by_the_header_alone() {
    for codec in [&huffman() as &dyn Codec, &arithmetic()] {
        for elem in [Elem::F16, Elem::Bf16, Elem::F32, Elem::U8, Elem::U16, Elem::U32, Elem::Bits(4), Elem::Bits(12)] {
            for count in [8, 1000, 20_000] {
                let case = Case::new(elem, Shape::new(count, 1, 1), DataKind::Noise, 7);
                let encoded = encode(codec, &case.spec, &case.bytes(), &KEY);
                let stored = match elem {
                    Elem::Bits(bits) => usize::from(bits) * count / 8,
                    _ => elem.size() * count,
                };
                assert!(encoded.len() <= stored + 1, "{count} of {elem}: {} bytes", encoded.len());
            }
        }
    }
}

fn stored_len<M: Model>(counts: &Counts) -> usize {
    let (mut model, mut out) = (M::default(), Vec::new());
    model.learn(counts).unwrap();
    model.store(&mut out);
    out.len()
}

#[test]
fn tables_of_64_symbols_take_less_than_100_bytes() {
    let mut counts = Counts::new(6);
    let mut random = SplitMix64::new(5);
    for symbol in 0..64 {
        counts.add(&vec![symbol; 1 + random.below(400) as usize * random.below(30) as usize]);
    }
    assert!(stored_len::<huffman::Huffman>(&counts) <= 34);
    assert!(stored_len::<range::RangeCoder>(&counts) < 100);
}

#[test]
fn streams_of_every_length_and_width_come_back() {
    for codec in [&huffman() as &dyn Codec, &arithmetic()] {
        for bits in 1..=16 {
            let spread = [2, 3, 500, 1023, 1024, 1025, 1026, 1027, 4100, 9000, 70_001];
            for (seed, count) in spread.into_iter().enumerate() {
                let bytes = geometric(bits, count, seed as u64);
                let spec = codes(Elem::Bits(bits), count);
                let encoded = encode(codec, &spec, &bytes, &KEY);
                assert!(decode(codec, &spec, &encoded, &KEY).unwrap() == bytes, "{count} symbols of {bits} bits");
                // Two bits each and the table, which is small beside long streams.
                if (3..=12).contains(&bits) && count > 4000 {
                    assert!(encoded.len() * 8 < count * 21 / 10 + 1200, "{bits} bits: {} bytes", encoded.len());
                }
            }
        }
    }
}

#[test]
fn every_pattern_of_16_bits_comes_back() {
    for codec in [&huffman() as &dyn Codec, &arithmetic()] {
        for elem in [Elem::F16, Elem::Bf16] {
            // In order, and as often as values near 1 occur.
            let ordered: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let skewed: Vec<u8> = (0..=u16::MAX).flat_map(|i| (i & 0x83FF | 0x3C00).to_le_bytes()).collect();
            for bytes in [&ordered, &skewed, &[&ordered[..], &skewed].concat()] {
                let spec = LaneSpec::new("x", elem, Shape::flat(bytes.len() / 2));
                assert!(decode(codec, &spec, &encode(codec, &spec, bytes, &KEY), &KEY).unwrap() == *bytes);
            }
        }
    }
}

#[test]
fn rounded_floats_need_only_the_bits_they_have() {
    // F16 values as F32: the last 13 bits of the mantissa are zero.
    let case = Case::new(Elem::F16, Shape::new(4000, 1, 4), DataKind::Walk, 3);
    let halves = case.bytes();
    let widened = halves.as_chunks().0.iter().flat_map(|half| {
        let half = u32::from(u16::from_le_bytes(*half));
        ((half & 0x8000) << 16 | ((half >> 10 & 31) + 112) << 23 | (half & 0x3FF) << 13).to_le_bytes()
    });
    let widened: Vec<u8> = widened.collect();
    let spec = codes(Elem::F32, 16_000);
    let encoded = encode(&huffman(), &spec, &widened, &KEY);
    assert!(encoded.len() < halves.len() * 21 / 20, "{} bytes for {}", encoded.len(), halves.len());
    assert!(decode(&huffman(), &spec, &encoded, &KEY).unwrap() == widened);
}

#[test]
fn decode_names_what_is_wrong() {
    let spec = codes(Elem::U8, 64);
    let bytes: Vec<u8> = geometric(8, 64, 1);
    let (huffman, arithmetic) = (huffman(), arithmetic());
    assert_eq!(message(&huffman, &spec, &[]), "expected 1 more bytes, got 0");
    assert_eq!(message(&huffman, &spec, &[4]), "expected 1 streams, got first byte 0x04");
    assert_eq!(message(&huffman, &spec, &[0, 1, 2]), "stream 0: expected 64 more bytes, got 2");
    assert_eq!(message(&huffman, &spec, &[1]), "stream 0: expected 1 more bytes, got 0");
    assert_eq!(message(&huffman, &spec, &[1, 5, 6]), "expected the end, got 1 more bytes");
    assert_eq!(message(&huffman, &codes(Elem::Bits(3), 9), &[1, 8]), "stream 0: expected a symbol of 3 bits, got 8");
    assert_eq!(message(&huffman, &spec, &[3, 1]), "stream 0: there is no shared model for keys of u8");
    assert_eq!(message(&huffman, &codes(Elem::U8, 0), &[0]), "expected the end, got 1 more bytes");
    // Two codes of one bit for the first two symbols, and 8 × 8 of them.
    let two = [2, 0x11, 0xCE, 0x0E, 0, 0, 0, 0, 0, 0, 0, 0xFF];
    assert!(decode(&huffman, &spec, &two, &KEY).is_ok());
    assert_eq!(message(&huffman, &spec, &two[..11]), "stream 0: codes take more than 7 bytes of 7");
    assert_eq!(message(&huffman, &spec, &[&two[..], &[0]].concat()), "stream 0: codes take 8 bytes of 9");
    assert_eq!(message(&huffman, &codes(Elem::U8, 60), &two), "stream 0: expected zero bits behind the last code");
    let under = [2, 0x21, 0xCE, 0x0E, 0, 0, 0];
    assert_eq!(message(&huffman, &spec, &under), "stream 0: code lengths fill 3072 of 4096 parts of the code space");

    let mut encoded = encode(&arithmetic, &spec, &bytes, &KEY);
    let cut = &encoded[..encoded.len() - 4];
    assert_eq!(message(&arithmetic, &spec, cut), "stream 0: the code takes 20 bytes of 16");
    assert_eq!(message(&arithmetic, &spec, &[&encoded[..], &[0]].concat()), "stream 0: the code takes 20 bytes of 21");
    encoded[1] ^= 1;
    assert!(message(&arithmetic, &spec, &encoded).starts_with("stream 0: expected frequencies of 4096 in all, got "));
}

#[test]
fn coded_streams_that_are_cut_or_longer_are_refused() {
    for codec in [&huffman() as &dyn Codec, &arithmetic()] {
        for count in [200, 3000] {
            let spec = codes(Elem::Bits(5), count);
            let encoded = encode(codec, &spec, &geometric(5, count, 9), &KEY);
            for cut in 0..encoded.len() {
                message(codec, &spec, &encoded[..cut]);
            }
            for more in [&[0][..], &[0xFF], &[0; 4], &[0; 100]] {
                message(codec, &spec, &[&encoded, more].concat());
            }
        }
    }
}

/// An artifact from these lanes, and the codec with it.
fn trained(codec: &dyn Codec, samples: &[(&LaneSpec, &[u8], Role)]) -> (Vec<u8>, Arc<dyn Codec>) {
    let mut samples = samples.iter().map(|(spec, bytes, role)| Sample {
        spec: (*spec).clone(),
        bytes: (*bytes).into(),
        layer: 0,
        role: *role,
    });
    let artifact = codec.train(&mut samples).unwrap().unwrap().0;
    let trained = codec.with_artifact(&artifact).unwrap().unwrap();
    (artifact, trained)
}

#[test]
fn shared_tables_serve_lanes_they_fit_and_no_others() {
    let spec = codes(Elem::Bits(6), 128);
    let (keys, values) = (geometric(6, 20_000, 1), geometric(6, 20_000, 2).iter().map(|s| 63 - s).collect::<Vec<_>>());
    for codec in [&huffman() as &dyn Codec, &arithmetic()] {
        let long = codes(Elem::Bits(6), 20_000);
        let (artifact, trained) = trained(codec, &[(&long, &keys, Role::Key), (&long, &values, Role::Value)]);
        assert!(artifact.len() < 120, "{} bytes", artifact.len());
        let (key, value) = (&keys[..128], &values[..128]);
        let own = encode(codec, &spec, key, &KEY);
        let shared = encode(&*trained, &spec, key, &KEY);
        assert_eq!((own[0], shared[0]), (2, 3), "a table of its own, and the shared one");
        assert!(shared.len() + 5 < own.len(), "{} and {} bytes", shared.len(), own.len());
        assert_eq!(decode(&*trained, &spec, &shared, &KEY).unwrap(), key);
        // Values have another table, and without the artifact there is none.
        assert_eq!(encode(&*trained, &spec, value, &VALUE).len(), encode(&*trained, &spec, value, &VALUE).len());
        assert_ne!(decode(&*trained, &spec, &shared, &VALUE).ok().as_deref(), Some(key));
        assert_eq!(message(codec, &spec, &shared), "stream 0: there is no shared model for keys of bits(6)");
        // A symbol that the table lacks, and symbols that it fits badly.
        let mut odd = key.to_vec();
        odd[5] = 1;
        for lane in [&odd[..], value] {
            let encoded = encode(&*trained, &spec, lane, &KEY);
            assert_eq!(encoded[0], 2, "a table of its own");
            assert_eq!(decode(&*trained, &spec, &encoded, &KEY).unwrap(), lane);
        }
    }
}

#[test]
fn bytes_of_long_lanes_and_of_artifacts_never_change() {
    let digest = |bytes: &[u8]| format!("{:016x}", u64::from_be_bytes(*Sha256::digest(bytes).first_chunk().unwrap()));
    let case = Case::new(Elem::F16, Shape::new(40, 2, 64), DataKind::Walk, 1);
    let (floats, wide) = (case.bytes(), geometric(11, 3000, 4));
    for (codec, expected) in [
        (&huffman() as &dyn Codec, ["0cdac441b425f551", "44e296d476d8f0d2", "4a5b98e9b11330ef", "afd8aca2efc7adb1"]),
        (&arithmetic(), ["678f51106bdf10a9", "057dc642d01b5416", "4b66e58ff8c4cecb", "1b8cd3aec735f0e1"]),
    ] {
        let spec = codes(Elem::Bits(11), 3000);
        let samples = [(&case.spec, &floats[..], Role::Key), (&spec, &wide[..], Role::Value)];
        let (artifact, trained) = trained(codec, &samples);
        let encoded = encode(codec, &case.spec, &floats, &KEY);
        let shared = encode(&*trained, &spec, &wide, &VALUE);
        assert_eq!((encoded[0] & 3, shared[0]), (2, 3), "coded with its own table, and with the shared one");
        let digests =
            [digest(&encoded), digest(&encode(codec, &spec, &wide, &KEY)), digest(&shared), digest(&artifact)];
        assert_eq!(digests, expected);
    }
}

#[test]
fn artifacts_that_are_damaged_are_refused() {
    let spec = codes(Elem::Bits(2), 6);
    let (artifact, _) = trained(&huffman(), &[(&spec, &[0, 0, 0, 0, 1, 2], Role::Key)]);
    assert_eq!(artifact, [18, 0, 1, 0x21, 0x02]);
    let message = |artifact: &[u8]| {
        let error = huffman().with_artifact(artifact).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        error.to_string().strip_prefix("artifact: ").unwrap().to_owned()
    };
    assert_eq!(message(&artifact[..4]), "expected 1 more bytes, got 0");
    assert_eq!(message(&[artifact.clone(), artifact.clone()].concat()), "models are not in order");
    assert_eq!(message(&[99, 0]), "element type 99 is unknown");
    assert_eq!(message(&[18, 2]), "role 2 is unknown");
    assert_eq!(message(&[18, 0, 2]), "expected 0 or 1 before a model, got 2");
    assert!(huffman().with_artifact(&[]).unwrap().is_some(), "nothing learned");
    let per_dump = Huffman::new(Config { codebook: Codebook::PerDump, ..Config::default() }).unwrap();
    assert!(per_dump.with_artifact(&artifact).unwrap().is_none());
}

/// Checks that a lane is nothing but its head and, for each field, a table and the stream of the reference.
fn holds_reference_streams<K: Kind>(case: &Case, bytes: &[u8])
where
    K::Reference: reference::Reference,
{
    let codec = Bitstream::<K>::new(Config { mode: Mode::Reference, ..Config::default() }).unwrap();
    let encoded = encode(&codec, &case.spec, bytes, &KEY);
    let mut expected = vec![0b10_10];
    for (idx, field) in reference::reference_fields(Elem::F16).unwrap().into_iter().enumerate() {
        let mut buffer = SymbolBuffer::default();
        let symbols = buffer.gather(bytes, Elem::F16, field);
        let (mut counts, mut model) = (Counts::new(field.bits), K::Reference::default());
        counts.add(symbols);
        model.learn(&counts).unwrap();
        let mut stream = Vec::new();
        model.store(&mut stream);
        model.encode(symbols, &mut stream);
        if idx == 0 {
            wire::put_number(stream.len() as u64, &mut expected);
        }
        expected.extend(stream);
    }
    assert_eq!(encoded, expected);
    // The forms of the fast mode are none of this one.
    assert!(message(&codec, &case.spec, &[0; 4000]).starts_with("stream 0: form Raw is not one of this mode"));
}

#[test]
fn reference_lanes_hold_the_streams_of_the_reference() {
    let case = Case::new(Elem::F16, Shape::new(40, 2, 16), DataKind::Walk, 1);
    let bytes = case.bytes();
    holds_reference_streams::<HuffmanKind>(&case, &bytes);
    holds_reference_streams::<ArithmeticKind>(&case, &bytes);
}

#[test]
fn carries_pass_through_bytes_that_are_written() {
    // The most frequent symbol is the last one, so `low` rises to just below 2^64 and the rare ones before it add nothing: long runs of
    // 0xFF bytes, which the next rare symbol may turn over.
    let mut symbols = vec![1; 30_000];
    let mut random = SplitMix64::new(11);
    for _ in 0..40 {
        let place = random.below(30_000) as usize;
        symbols[place] = 0;
    }
    let spec = codes(Elem::Bits(2), symbols.len());
    let encoded = encode(&arithmetic(), &spec, &symbols, &KEY);
    assert_eq!(decode(&arithmetic(), &spec, &encoded, &KEY).unwrap(), symbols);
}
