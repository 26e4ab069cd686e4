//! Reads all tensors of a dump: the content scan and the digest.

use gearbox_core::{DType, Result, ResultExt};
use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::{AttentionFacts, Dump, Entry, Findings, Reason, Tensor};

impl Dump {
    /// Reads every tensor and reports those that hold NaN or infinite values, in sorted order.
    ///
    /// A tensor that can no longer be read becomes a finding as well.
    pub fn scan(&self) -> Findings {
        let entries: Vec<&Entry> = self.iter().map(|(_, _, entry)| entry).collect();
        let scanned: Vec<Findings> = entries.into_par_iter().map(scan_entry).collect();
        let mut findings = Findings::default();
        for found in scanned {
            findings.append(found);
        }
        findings
    }

    /// The xxh3-128 of everything an experiment can see, in hexadecimal.
    ///
    /// Covers run names, rotations, layers, ranges, stages, token ids, element types, shapes, the bytes of keys, values and
    /// queries in logical order, and the attention of layers where it is not the usual one. File names and formats do not matter: a converted copy with the same elements has the same digest.
    ///
    /// # Errors
    /// Those of [`Tensor::map`], with the place of the entry.
    pub fn digest(&self) -> Result<String> {
        let mut hash = Hash(Xxh3::new());
        hash.text("gearbox-dump-1");
        hash.number(self.runs.len() as u64);
        for run in &self.runs {
            hash.text(&run.name);
            let rope = run.rope.as_ref().map(serde_json::to_string);
            hash.text(&rope.transpose().unwrap_or_else(|_| unreachable!("all keys are strings")).unwrap_or_default());
            hash.number(run.layers.len() as u64);
            for layer in &run.layers {
                hash.number(layer.id.into());
                hash.number(layer.entries.len() as u64);
                for entry in &layer.entries {
                    hash.entry(entry).context(|| entry.place.clone())?;
                }
            }
        }
        hash.attention(self);
        Ok(format!("{:032x}", hash.0.digest128()))
    }
}

/// Every variable-length part is preceded by its length, so that no two dumps hash the same bytes.
struct Hash(Xxh3);

impl Hash {
    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text.as_bytes());
    }

    /// Adds nothing where attention is the usual one, so that such dumps keep the digest that they had before it could be told.
    fn attention(&mut self, dump: &Dump) {
        for (number, run) in dump.runs.iter().enumerate() {
            for layer in &run.layers {
                let Some(AttentionFacts { scale, softcap, window }) = layer.facts.attention else { continue };
                self.text("attention");
                self.number(number as u64);
                self.number(layer.id.into());
                // No softcap or window is 0, so 0 says that there is none.
                for number in [scale.to_bits(), softcap.unwrap_or(0.0).to_bits(), window.unwrap_or(0)] {
                    self.number(number);
                }
            }
        }
    }

    fn entry(&mut self, entry: &Entry) -> Result<()> {
        self.number(entry.start);
        self.number(entry.seq as u64);
        self.text(entry.stage.name());
        let tokens = entry.tokens.as_deref().unwrap_or_default();
        self.number(tokens.len() as u64);
        for id in tokens {
            self.0.update(&id.to_le_bytes());
        }
        self.number(entry.tensors().count() as u64);
        for (role, tensor) in entry.tensors() {
            self.text(role);
            self.text(tensor.dtype.name());
            self.number(tensor.shape.heads as u64);
            self.number(tensor.shape.dim as u64);
            for window in tensor.windows() {
                self.0.update(&window?);
            }
        }
        Ok(())
    }
}

fn scan_entry(entry: &Entry) -> Findings {
    let mut findings = Findings::default();
    for (role, tensor) in entry.tensors() {
        match count_non_finite(tensor) {
            Ok((0, 0)) => {}
            Ok((nan, infinite)) => {
                let values = tensor.shape.elements();
                let message = format!("{role}: {nan} NaN and {infinite} infinite among {values} values");
                findings.push(Reason::NonFiniteValues, entry.place.clone(), message);
            }
            Err(error) => findings.push(Reason::TensorFileUnreadable, entry.place.clone(), format!("{role}: {error}")),
        }
    }
    findings
}

fn count_non_finite(tensor: &Tensor) -> Result<(u64, u64)> {
    tensor.windows().try_fold((0, 0), |(nan, infinite), window| {
        let found = count_in(tensor.dtype, &window?);
        Ok((nan + found.0, infinite + found.1))
    })
}

fn count_in(dtype: DType, bytes: &[u8]) -> (u64, u64) {
    match dtype {
        DType::F16 => count16(bytes, 0x7c00),
        DType::Bf16 => count16(bytes, 0x7f80),
        DType::F32 => {
            let words = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word) & 0x7fff_ffff);
            count(words, 0x7f80_0000)
        }
        // `DType` may grow; a new type is not scanned before it is known here.
        _ => (0, 0),
    }
}

fn count16(bytes: &[u8], infinity: u32) -> (u64, u64) {
    count(bytes.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_le_bytes(*word)) & 0x7fff), infinity)
}

/// Counts NaN and infinite values among words without sign.
fn count(words: impl Iterator<Item = u32>, infinity: u32) -> (u64, u64) {
    words.fold((0, 0), |(nan, infinite), word| {
        (nan + u64::from(word > infinity), infinite + u64::from(word == infinity))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::samples::{Sample, open};
    use super::*;

    #[test]
    fn scan_counts_nan_and_infinite_values_per_tensor() {
        let folder = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(folder.path());
        sample.write();
        assert!(open(folder.path()).scan().list.is_empty());

        // Two NaN and one infinity among the keys, one infinity among the values.
        sample.key[..6].copy_from_slice(&[0x01, 0x7c, 0xff, 0xff, 0x00, 0x7c]);
        sample.value[2..4].copy_from_slice(&[0x00, 0xfc]);
        sample.write();
        let found = open(folder.path()).scan();
        let messages: Vec<_> = found.list.iter().map(|finding| (finding.reason, finding.message.as_str())).collect();
        assert_eq!(
            messages,
            [
                (Reason::NonFiniteValues, "key: 2 NaN and 1 infinite among 24 values"),
                (Reason::NonFiniteValues, "value: 0 NaN and 1 infinite among 24 values"),
            ]
        );
        assert!(!found.is_clean());
    }

    #[test]
    fn infinity_is_told_from_nan_in_every_dtype() {
        let b16 = |words: &[u16]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        assert_eq!(count16(&b16(&[0x7bff, 0x7c00, 0xfc00, 0x7c01, 0xfe00]), 0x7c00), (2, 2));
        assert_eq!(count16(&b16(&[0x7f7f, 0x7f80, 0xff80, 0x7f81]), 0x7f80), (1, 2));
    }

    #[test]
    fn scan_reports_a_tensor_that_vanished() {
        let folder = tempfile::tempdir().unwrap();
        let sample = Sample::new(folder.path());
        sample.write();
        let dump = open(folder.path());
        std::fs::remove_file(sample.layer_dir().join("k_t0_3.bin")).unwrap();
        assert_eq!(dump.scan().list[0].reason, Reason::TensorFileUnreadable);
        let error = dump.digest().unwrap_err();
        assert!(error.to_string().contains("meta_t0_3.json: `"), "{error}");
    }

    #[test]
    fn digest_depends_on_content_names_and_ranges_only() {
        let digest = |change: fn(&mut Sample)| {
            let folder = tempfile::tempdir().unwrap();
            let mut sample = Sample::new(folder.path());
            change(&mut sample);
            sample.write();
            open(folder.path()).digest().unwrap()
        };
        let first = digest(|_| {});
        assert_eq!(first, digest(|_| {}), "another folder");
        assert_eq!(first.len(), 32);
        assert_eq!(first, digest(|sample| sample.set("flash_attention", true)), "a key no experiment sees");
        let usual =
            |sample: &mut Sample| sample.set("attention", json!({"scale": 0.5, "softcap": null, "window": null}));
        assert_eq!(first, digest(usual), "the usual attention of four channels");
        for (what, other) in [
            ("bytes", digest(|sample| sample.value[5] ^= 1)),
            ("run", digest(|sample| sample.set("run_id", "other"))),
            ("layer", digest(|sample| sample.set("layer_id", 1))),
            ("start", digest(|sample| sample.set("seq_start", 1))),
            ("stage", digest(|sample| sample.set("stage", "decode"))),
            ("dtype", digest(|sample| sample.set("dtype", "bf16"))),
            ("tokens", digest(|sample| sample.set("tokens", vec![1, 2, 3]))),
            ("attention", digest(|sample| sample.set("attention", json!({"scale": 0.5, "softcap": 50.0})))),
            ("window", digest(|sample| sample.set("attention", json!({"scale": 0.5, "window": 50})))),
            ("scale", digest(|sample| sample.set("attention", json!({"scale": 1.0})))),
            (
                "heads",
                digest(|sample| {
                    sample.set("kv_heads", 4);
                    sample.set("head_dim", 2);
                }),
            ),
        ] {
            assert_ne!(first, other, "{what}");
        }
    }
}
