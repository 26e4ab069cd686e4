"""Dumps."""

import json

import gearbox
import numpy
import pytest
from conftest import bits


def test_dump_is_what_the_program_says(sample, program):
    dump = gearbox.Dump(sample)
    told = json.loads(program("dump", "info", "--json", "--dump", sample))
    assert dump.info() == told["info"]
    assert (len(dump), dump.findings) == (sum(1 for _ in dump), [])
    assert dump.original_bytes == sum(entry.key().nbytes + entry.value().nbytes for entry in dump)
    assert repr(dump).startswith("Dump(") and len(dump.digest()) == 32


def test_entries_are_read_by_tokens_from_their_files(sample):
    dump = gearbox.Dump(sample, stage="prefill")
    entry = dump[0]
    key = entry.key()
    assert isinstance(key, numpy.memmap) and not key.flags.writeable
    assert (key.shape, key.dtype.name) == (entry.shape, entry.dtype)
    assert bits(entry.key(3, 9)) == bits(key[3:9]) and bits(dump[-len(dump)].key()) == bits(key)
    query = entry.query()
    assert query is None or query.shape[0] == entry.seq
    assert entry.tokens is None or len(entry.tokens) == entry.seq
    for start, stop in [(0, entry.seq + 1), (4, 4), (entry.seq, None)]:
        with pytest.raises(ValueError, match="expected tokens within"):
            entry.key(start, stop)
    with pytest.raises(IndexError, match=f"expected one of {len(dump)} entries, got {len(dump)}"):
        dump[len(dump)]


def test_bfloat16_is_read_from_safetensors(tmp_path, tensor):
    array = tensor(6, dtype="bfloat16")
    shape = list(array.shape)
    tensors = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [at * array.nbytes, (at + 1) * array.nbytes]}
        for at, name in enumerate(["layers.0.key", "layers.0.value"])
    }
    head = json.dumps(tensors).encode()
    (tmp_path / "r.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + 2 * array.tobytes())
    entry = gearbox.Dump(tmp_path)[0]
    assert entry.dtype == "bfloat16" and bits(entry.key()) == bits(array)
    assert entry.key().dtype.name in ("bfloat16", "uint16")


def test_missing_dump_is_an_error_of_its_kind(tmp_path):
    with pytest.raises(gearbox.GearboxError) as caught:
        gearbox.Dump(tmp_path / "none")
    assert caught.value.kind in ("io", "invalid-input")
    with pytest.raises(ValueError, match="stage: expected prefill, decode or both, got early"):
        gearbox.Dump(tmp_path, stage="early")
