//! Reads packed snapshots of the reference engine: its own storage layout, rewritten in full after every append.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gearbox_core::{DType, Role, Shape, Stage};

use super::open::{Candidate, Defect, Reading, Selection};
use super::reference::{Fields, check_file, dtype, read_meta};
use super::{Entry, LayerFacts, Layout, Packed, Reason, Tensor};

struct Snapshot {
    place: String,
    shape: Shape,
    dtype: DType,
    key: (PathBuf, Packed),
    value: (PathBuf, Packed),
}

/// Reads the longest valid snapshot of each layer.
pub(super) fn read(root: &Path, metas: &[PathBuf], selection: &Selection, reading: &mut Reading) {
    let mut layers: BTreeMap<(String, u32), Vec<Snapshot>> = BTreeMap::new();
    for path in metas {
        let place = path.display().to_string();
        match describe(path, &place, root) {
            Ok((run, layer, snapshot)) => {
                // A snapshot holds the prompt and all that followed, so no stage fits and none is filtered.
                if selection.admits(None, snapshot.shape.seq, &mut reading.dropped) {
                    layers.entry((run, layer)).or_default().push(snapshot);
                }
            }
            Err(defect) => reading.findings.push(defect.reason, place, defect.message),
        }
    }
    for ((run, layer), mut snapshots) in layers {
        snapshots.sort_by(|a, b| (Reverse(a.shape.seq), &a.place).cmp(&(Reverse(b.shape.seq), &b.place)));
        let mut taken: Option<(usize, String)> = None;
        for snapshot in snapshots {
            let Snapshot { place, shape, .. } = &snapshot;
            if let Some((longest, by)) = &taken {
                let message = format!("{} tokens, superseded by {longest} tokens in {by}", shape.seq);
                reading.findings.push(Reason::SupersededPacked, place.clone(), message);
                continue;
            }
            let longest = (shape.seq, place.clone());
            match locate(snapshot) {
                Ok(entry) => {
                    taken = Some(longest);
                    let facts = LayerFacts::default();
                    reading.candidates.push(Candidate { run: run.clone(), layer, rope: None, facts, entry });
                }
                Err(defect) => reading.findings.push(defect.reason, longest.1, defect.message),
            }
        }
    }
}

fn describe(path: &Path, place: &str, root: &Path) -> Result<(String, u32, Snapshot), Defect> {
    let meta = read_meta(path)?;
    let fields = Fields(&meta);
    if fields.optional::<String>("layout")?.is_some_and(|layout| layout != "packed") {
        return Err(fields.invalid("layout", "`packed`"));
    }
    let dtype = dtype(fields.required("bytes_per_elem")?, None)?;
    let seq = fields.at_least_one("used_seq_len")?;
    let shape = Shape::new(seq, fields.at_least_one("kv_heads")?, fields.at_least_one("head_dim")?);
    // Without flash attention the engine blocks values by the capacity.
    let upper = match fields.required::<i64>("flash_upper_kv")? {
        upper @ 1.. => upper.unsigned_abs(),
        _ => match fields.optional::<i64>("max_seq_len")? {
            Some(capacity @ 1..) => capacity.unsigned_abs(),
            _ => seq as u64,
        },
    };
    let (pack_h, pack_l) = (fields.at_least_one("pack_h")? as u64, fields.at_least_one("pack_l")? as u64);
    let side = |role, bytes_key: &str, file_key: &str| -> Result<(PathBuf, Packed), Defect> {
        let packed = Packed { role, head_bytes: fields.required(bytes_key)?, pack_h, pack_l, upper };
        if !packed.holds(shape, dtype.size()) {
            return Err(fields.invalid(bytes_key, &format!("enough bytes for the packed shape {shape}")));
        }
        Ok((fields.file(file_key, path)?, packed))
    };
    let snapshot = Snapshot {
        place: place.to_owned(),
        shape,
        dtype,
        key: side(Role::Key, "key_used_bytes", "k_file")?,
        value: side(Role::Value, "value_used_bytes", "v_file")?,
    };
    Ok((fields.run(path, root)?, fields.required("layer_id")?, snapshot))
}

fn locate(snapshot: Snapshot) -> Result<Entry, Defect> {
    let Snapshot { place, shape, dtype, key, value } = snapshot;
    let tensor = |(path, packed): (PathBuf, Packed)| -> Result<Tensor, Defect> {
        check_file(&path, packed.file_bytes(shape), dtype)?;
        Ok(Tensor { dtype, shape, path: path.into(), offset: 0, layout: Layout::Packed(packed) })
    };
    let (key, value) = (tensor(key)?, tensor(value)?);
    Ok(Entry {
        stage: Stage::Unknown,
        start: 0,
        seq: shape.seq,
        key,
        value,
        query: None,
        tokens: None,
        place,
        meta: None,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::super::samples::{Sample, open};
    use super::super::{Dropped, Dump};
    use super::*;

    /// Writes a snapshot of one head and two channels with `pack_h` 2, `pack_l` 1 and blocks of four values.
    fn write(folder: &Path, tokens: usize, change: impl FnOnce(&mut Value)) -> PathBuf {
        let blocks = tokens.div_ceil(2);
        // Keys: two tokens of channel 0, then two of channel 1; values: four tokens of each channel, twice interleaved.
        let key: Vec<u8> = (0..blocks * 4).flat_map(|i| [i as u8, 0x10]).collect();
        let value: Vec<u8> = (0..tokens.div_ceil(4) * 8).flat_map(|i| [i as u8, 0x20]).collect();
        let name = |part: &str, ending: &str| format!("packed_{part}_packed_t0_{tokens}.{ending}");
        let mut meta = json!({
            "layout": "packed", "layer_id": 0, "used_seq_len": tokens, "max_seq_len": tokens + 64, "kv_heads": 1, "head_dim": 2,
            "bytes_per_elem": 2, "pack_h": 2, "pack_l": 1, "flash_upper_kv": 4, "key_stride_bytes": 1000,
            "value_stride_bytes": 1000, "key_used_bytes": key.len(), "value_used_bytes": value.len(), "stage": "decode",
            "run_id": "packed", "k_file": name("k", "bin"), "v_file": name("v", "bin"),
        });
        change(&mut meta);
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join(name("k", "bin")), key).unwrap();
        fs::write(folder.join(name("v", "bin")), value).unwrap();
        let path = folder.join(name("meta", "json"));
        fs::write(&path, serde_json::to_vec(&meta).unwrap()).unwrap();
        path
    }

    fn low_bytes(tensor: &Tensor) -> Vec<u8> {
        tensor.map().unwrap().iter().copied().step_by(2).collect()
    }

    #[test]
    fn longest_snapshot_of_a_layer_is_read_in_logical_order() {
        let folder = tempfile::tempdir().unwrap();
        let layer = folder.path().join("packed/layer_0");
        for tokens in [2, 3, 10] {
            write(&layer, tokens, |_| {});
        }
        let dump = open(folder.path());
        assert_eq!(dump.findings.counts(), BTreeMap::from([(Reason::SupersededPacked, 2)]));
        assert!(dump.findings.is_clean());
        let entry = &dump.runs[0].layers[0].entries[0];
        assert_eq!((dump.entries(), entry.seq, entry.start, entry.stage), (1, 10, 0, Stage::Unknown));
        assert_eq!(low_bytes(&entry.key), [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 16, 18, 17, 19]);
        assert_eq!(low_bytes(&entry.value), (0..20).collect::<Vec<u8>>());
    }

    #[test]
    fn damaged_snapshot_gives_way_to_the_next_longest() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 4, |_| {});
        write(folder.path(), 2, |_| {});
        write(folder.path(), 6, |meta| meta["k_file"] = "missing".into());
        let dump = open(folder.path());
        assert_eq!(dump.runs[0].layers[0].entries[0].seq, 4);
        let reasons: Vec<_> = dump.findings.list.iter().map(|finding| finding.reason).collect();
        assert_eq!(reasons, [Reason::TensorFileMissing, Reason::SupersededPacked]);
    }

    #[test]
    fn packed_and_logical_entries_are_read_apart() {
        let folder = tempfile::tempdir().unwrap();
        Sample::new(folder.path()).write();
        write(&folder.path().join("sample/layer_0"), 5, |_| {});
        assert_eq!(open(folder.path()).runs[0].name, "sample");
        let packed = Selection { packed: true, stage: Some(Stage::Prefill), ..Selection::default() };
        let dump = Dump::open(folder.path(), &packed).unwrap();
        assert_eq!((dump.runs[0].name.as_str(), dump.entries()), ("packed", 1));
        let long = Selection { min_seq: 6, ..packed };
        assert!(Dump::open(folder.path(), &long).unwrap_err().to_string().contains("1 shorter than the minimum"));
        let dropped = Dump::open(folder.path(), &Selection { max_seq: 5, ..Selection::default() }).unwrap().dropped;
        assert_eq!(dropped, Dropped::default());
    }

    #[test]
    fn blocks_of_values_without_flash_attention_follow_the_capacity() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 4, |meta| {
            meta["flash_upper_kv"] = 0.into();
            meta["max_seq_len"] = 4.into();
        });
        assert_eq!(low_bytes(&open(folder.path()).runs[0].layers[0].entries[0].value), (0..8).collect::<Vec<u8>>());
        write(folder.path(), 4, |meta| {
            meta["flash_upper_kv"] = (-1).into();
            meta["max_seq_len"] = 0.into();
        });
        assert_eq!(low_bytes(&open(folder.path()).runs[0].layers[0].entries[0].value), (0..8).collect::<Vec<u8>>());
    }

    #[test]
    fn each_bad_snapshot_has_a_named_reason() {
        type Row = (fn(&mut Value), Reason, &'static str);
        let rows: [Row; 11] = [
            (|meta| meta["layout"] = "logical".into(), Reason::MetaValueInvalid, "`layout`: expected `packed`"),
            (|meta| meta["pack_h"] = 0.into(), Reason::MetaValueInvalid, "`pack_h`: expected at least 1, got 0"),
            (|meta| meta["pack_l"] = u64::MAX.into(), Reason::MetaValueInvalid, "enough bytes for the packed shape"),
            (|meta| meta["key_used_bytes"] = 15.into(), Reason::MetaValueInvalid, "`key_used_bytes`"),
            (|meta| meta["value_used_bytes"] = 0.into(), Reason::MetaValueInvalid, "`value_used_bytes`"),
            (|meta| meta["used_seq_len"] = Value::Null, Reason::MetaKeyMissing, "`used_seq_len`"),
            (|meta| meta["flash_upper_kv"] = Value::Null, Reason::MetaKeyMissing, "`flash_upper_kv`"),
            (|meta| meta["bytes_per_elem"] = 1.into(), Reason::UnsupportedElementSize, "expected 2 or 4, got 1"),
            (|meta| meta["key_used_bytes"] = 18.into(), Reason::SizeDiffersFromShape, "expected 18 bytes, got 16"),
            (|meta| meta["kv_heads"] = 2.into(), Reason::SizeDiffersFromShape, "expected 32 bytes, got 16"),
            (|meta| meta["k_file"] = "../k.bin".into(), Reason::PathEscapesFolder, "`../k.bin`"),
        ];
        for (change, reason, message) in rows {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), 4, change);
            let findings = open(folder.path()).findings;
            assert_eq!(findings.list[0].reason, reason, "{findings:?}");
            assert!(findings.list[0].message.contains(message), "{findings:?}");
            assert_eq!(findings.list[1].reason, Reason::NoEntries);
        }
    }
}
