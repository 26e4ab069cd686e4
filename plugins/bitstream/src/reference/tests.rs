//! The vectors of the reference.

use gearbox_conformance::reference::dataset_a;
use gearbox_core::{Elem, Stage};
use sha2::{Digest, Sha256};

use super::*;
use crate::counts::Counts;
use crate::symbols::SymbolBuffer;

fn counts_of(bits: u8, symbols: &[u8]) -> Counts {
    let mut counts = Counts::new(bits);
    counts.add(symbols);
    counts
}

/// A coder for symbols of which each occurs so many times.
fn learned<M: Model>(bits: u8, occurrences: &[usize]) -> M {
    let mut symbols = Vec::new();
    for (symbol, count) in occurrences.iter().enumerate() {
        symbols.resize(symbols.len() + count, symbol as u8);
    }
    let mut model = M::default();
    model.learn(&counts_of(bits, &symbols)).unwrap();
    model
}

fn encoded<M: Model>(model: &M, symbols: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    model.encode(symbols, &mut out);
    let mut back = vec![0; symbols.len()];
    model.decode(&out, &mut back).unwrap();
    assert_eq!(back, symbols);
    out
}

#[test]
fn ties_between_lengths_are_broken_as_the_reference_does() {
    let cases: [(&[usize], &[u64]); 8] = [
        (&[1, 1, 1, 1, 1], &[3, 3, 2, 2, 2]),
        (&[1, 1, 1, 1, 1, 1], &[3, 3, 3, 3, 2, 2]),
        (&[2, 1, 1, 2], &[2, 3, 3, 1]),
        (&[3, 1, 1, 2, 3], &[2, 3, 3, 2, 2]),
        (&[1, 1, 2, 2, 2, 4, 4], &[4, 4, 3, 3, 3, 2, 2]),
        (&[0, 2, 0, 2, 4, 0, 4, 8], &[0, 4, 0, 4, 3, 0, 2, 1]),
        (&[1; 9], &[4, 4, 3, 3, 3, 3, 3, 3, 3]),
        (&[0, 7, 0], &[0, 1, 0]),
    ];
    for (counts, lengths) in cases {
        let code: Huffman = learned(4, counts);
        assert_eq!(code.table()[..lengths.len()], *lengths, "{counts:?}");
    }
}

#[test]
fn small_streams_have_the_bytes_of_the_reference() {
    let symbols = [0, 1, 2, 3, 0, 0, 3];
    assert_eq!(encoded(&learned::<Huffman>(2, &[2, 1, 1, 2]), &symbols), [0xB7, 0x50]);
    assert_eq!(encoded(&learned::<Arithmetic>(2, &[2, 1, 1, 2]), &symbols), [0x25, 0x34]);
    let symbols = [0, 0, 1, 0, 2, 0, 0, 0, 3, 1];
    assert_eq!(encoded(&learned::<Arithmetic>(2, &[6, 2, 1, 1]), &symbols), [0x40, 0x5F, 0x80]);
    assert_eq!(encoded(&learned::<Arithmetic>(2, &[0, 7, 0]), &[1, 1, 1]), [0x40]);
    assert_eq!(encoded(&learned::<Huffman>(2, &[0, 7, 0]), &[1, 1, 1]), [0]);
    assert!(encoded(&learned::<Huffman>(2, &[1]), &[]).is_empty());
    assert_eq!(encoded(&learned::<Arithmetic>(2, &[1]), &[]), [0x40]);
}

/// One stream of dataset A, with the counts over all of its entries.
struct Streams {
    prompt: Vec<u8>,
    decoded: Vec<u8>,
    global: Counts,
}

/// K-hi6, K-lo10, V-hi6 and V-lo10: layer 0 of dataset A, first the prompt, then the first decoded token.
fn streams() -> Vec<(u8, Streams)> {
    let entries = dataset_a();
    let mut buffer = SymbolBuffer::default();
    let mut streams = Vec::new();
    for is_key in [true, false] {
        for field in reference_fields(Elem::F16).unwrap() {
            let mut global = Counts::new(field.bits);
            let mut symbols = Vec::new();
            for entry in &entries {
                let tensor = if is_key { &entry.key } else { &entry.value };
                let stream = buffer.gather(tensor, Elem::F16, field);
                global.add(stream);
                if entry.layer == 0 {
                    symbols.push((entry.stage, stream.to_vec()));
                }
            }
            assert_eq!((symbols[0].0, symbols[1].0), (Stage::Prefill, Stage::Decode));
            let (decoded, prompt) = (symbols.swap_remove(1).1, symbols.swap_remove(0).1);
            streams.push((field.bits, Streams { prompt, decoded, global }));
        }
    }
    streams
}

fn digest(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    format!("{:016x}", u64::from_be_bytes(*digest.first_chunk().unwrap()))
}

/// Checks the sizes of both entries and the digest of the prompt's stream.
fn dataset_a_equals<M: Reference>(global: bool, expected: [(usize, &str, usize); 4]) {
    for ((bits, streams), (prompt_len, prompt_digest, decoded_len)) in streams().into_iter().zip(expected) {
        let model = |symbols: &[u8]| {
            let mut model = M::default();
            let own = counts_of(bits, symbols);
            model.learn(if global { &streams.global } else { &own }).unwrap();
            // What the reference stores is enough to decode.
            M::from_table(bits, model.table()).unwrap()
        };
        let prompt = encoded(&model(&streams.prompt), &streams.prompt);
        assert_eq!((prompt.len(), digest(&prompt).as_str()), (prompt_len, prompt_digest));
        assert_eq!(encoded(&model(&streams.decoded), &streams.decoded).len(), decoded_len);
    }
}

#[test]
fn huffman_streams_of_dataset_a_equal_the_reference() {
    dataset_a_equals::<Huffman>(
        true,
        [
            (2527, "b6b12960af033ec8", 18),
            (5977, "5610b829da72ecd1", 39),
            (2134, "4015ba278aa7df32", 17),
            (5968, "d45d532eed7e4d17", 41),
        ],
    );
    dataset_a_equals::<Huffman>(
        false,
        [
            (2524, "111f9d3d05a7f5b7", 16),
            (5918, "a1901c612aecda82", 20),
            (2134, "768546d79b3e3aea", 15),
            (5915, "e055b5f007229f19", 20),
        ],
    );
}

#[test]
fn arithmetic_streams_of_dataset_a_equal_the_reference() {
    dataset_a_equals::<Arithmetic>(
        true,
        [
            (2518, "3269f3162ed8d990", 18),
            (5955, "593454e96c27bb3f", 40),
            (2119, "2cbee4303b5bfdf6", 17),
            (5950, "8192ae0e1a56348b", 41),
        ],
    );
    dataset_a_equals::<Arithmetic>(
        false,
        [
            (2518, "00f1d7a5f477a0ac", 16),
            (5901, "2e6d2a153c979b8a", 21),
            (2118, "0e7fd0c6e1786288", 15),
            (5898, "967a8c35e9c918a2", 21),
        ],
    );
}

#[test]
fn streams_that_are_cut_or_longer_are_refused() {
    fn refuses<M: Reference>() {
        let symbols: Vec<u8> = (0..200_u32).map(|i| (i * i % 23 % 7) as u8).collect();
        let mut model = M::default();
        model.learn(&counts_of(3, &symbols)).unwrap();
        let bytes = encoded(&model, &symbols);
        let decode = |bytes: &[u8], count| model.decode(bytes, &mut vec![0; count]);
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut], 200).is_err(), "cut to {cut}");
        }
        for more in [0x00, 0x80, 0xFF] {
            assert!(decode(&[&bytes[..], &[more]].concat(), 200).is_err(), "with {more:#x} behind");
        }
        assert!(decode(&bytes, 150).is_err(), "fewer symbols");
        assert!(decode(&bytes, 300).is_err(), "more symbols");
    }
    refuses::<Huffman>();
    refuses::<Arithmetic>();
}

#[test]
fn tables_that_are_no_models_are_refused() {
    let message = |result: Result<Huffman>| result.unwrap_err().to_string();
    assert_eq!(message(Huffman::from_table(2, &[1, 1, 1, 0])), "code lengths are not those of a tree");
    assert_eq!(message(Huffman::from_table(2, &[1, 2, 0, 0])), "code lengths are not those of a tree");
    assert_eq!(message(Huffman::from_table(2, &[0, 2, 0, 0])), "code lengths are not those of a tree");
    assert_eq!(message(Huffman::from_table(2, &[64, 1, 0, 0])), "expected codes of up to 63 bits, got 64");
    assert_eq!(message(Huffman::from_table(2, &[1, 1])), "expected 4 code lengths, got 2");
    assert!(Huffman::from_table(2, &[0, 1, 0, 0]).is_ok());
    let message = |result: Result<Arithmetic>| result.unwrap_err().to_string();
    assert_eq!(message(Arithmetic::from_table(1, &[0, 0])), "expected counts of 1 to 1073741824 in all, got 0");
    assert!(Arithmetic::from_table(1, &[u64::MAX, u64::MAX]).is_err());
    assert!(Arithmetic::from_table(1, &[1 << 30, 0]).is_ok());
}

#[test]
fn codes_of_39_bits_come_back() {
    let lengths: Vec<u64> = (0..64).map(|symbol| if symbol < 40 { 39.min(symbol + 1) } else { 0 }).collect();
    let code = Huffman::from_table(6, &lengths).unwrap();
    let symbols: Vec<u8> = (0..40).chain([39, 0, 38]).collect();
    assert_eq!(encoded(&code, &symbols).len(), (lengths.iter().sum::<u64>() + 39 + 1 + 39).div_ceil(8) as usize);
}
