"""Arrays to containers and back."""

import gc
import json
import pickle
import sys
import threading

import gearbox
import numpy
import pytest
from conftest import bits

TOKEN_REF = {"routes": [{"transforms": [{"id": "token-ref"}], "codec": {"id": "zstd"}}]}
QUANT = {"routes": [{"transforms": [{"id": "quant", "bits": 4}], "codec": {"codes": {"id": "rans"}, "*": {"id": "zstd"}}}]}
LOSSLESS = ["gear-delta", "planes", "rans", "store", TOKEN_REF, "zstd"]


@pytest.mark.parametrize("pipeline", ["planes", "gear-delta", "zstd"])
@pytest.mark.parametrize("dtype", [numpy.float16, numpy.float32, "bfloat16"])
def test_every_form_of_data_comes_back_as_it_was_given(tensor, dtype, pipeline):
    key, value = tensor(70, dtype=dtype), tensor(70, dtype=dtype, seed=8)
    assert bits(gearbox.decode(gearbox.encode(key, pipeline))) == bits(key)
    assert bits(gearbox.decode(gearbox.encode(value, pipeline, role="value", layer=3))) == bits(value)
    pair = gearbox.decode(gearbox.encode((key, value), pipeline))
    assert [bits(array) for array in pair] == [bits(key), bits(value)]
    layers = {2: (key, value), 5: (value, key)}
    decoded = gearbox.decode(gearbox.encode(layers, pipeline))
    assert {layer: tuple(map(bits, pair)) for layer, pair in decoded.items()} == {
        layer: tuple(map(bits, pair)) for layer, pair in layers.items()
    }
    assert decoded[2][0].shape == key.shape
    if dtype != "bfloat16":
        assert decoded[2][0].dtype == key.dtype


def test_bfloat16_comes_back_as_ml_dtypes_has_it_or_as_bits(tensor):
    decoded = gearbox.decode(gearbox.encode(tensor(9, dtype="bfloat16"), "zstd"))
    try:
        import ml_dtypes
    except ImportError:
        assert decoded.dtype == numpy.uint16
        return
    assert decoded.dtype == ml_dtypes.bfloat16
    again = gearbox.decode(gearbox.encode(decoded, "zstd"))
    assert bits(again) == bits(decoded)


@pytest.mark.parametrize("pipeline", ["planes", QUANT])
def test_dump_gives_the_bytes_that_the_program_writes(sample, program, tmp_path, pipeline):
    text = pipeline if isinstance(pipeline, str) else json.dumps(pipeline)
    program("encode", "--dump", sample, "--pipeline", text, "--out", tmp_path / "a.gbx")
    written = (tmp_path / "a.gbx").read_bytes()
    assert gearbox.encode(gearbox.Dump(sample), pipeline) == written
    shown = gearbox.inspect(tmp_path / "a.gbx")
    assert shown == json.loads(program("inspect", "--json", tmp_path / "a.gbx"))
    assert sum(row["bytes"] for row in shown["ledger"]) == shown["file_bytes"] == len(written)


@pytest.mark.parametrize("codec", LOSSLESS)
def test_arrays_give_the_bytes_of_a_dump_with_the_same_content(sample, codec):
    dump = gearbox.Dump(sample, stage="prefill")
    layers = {entry.layer: (entry.key(), entry.value()) for entry in dump}
    assert len(layers) == len(dump), "one entry per layer"
    first = dump[0]
    facts = {"run": first.run, "start": first.start, "stage": "prefill", "rope": first.rope}
    tokens = None if first.tokens is None else first.tokens.tolist()
    stored = gearbox.encode(layers, codec, tokens=tokens, **facts)
    assert stored == gearbox.encode(dump, codec)
    for layer, pair in gearbox.decode(stored).items():
        assert [bits(array) for array in pair] == [bits(array) for array in layers[layer]]


def test_whole_dump_comes_back(sample):
    dump = gearbox.Dump(sample)
    decoded = gearbox.decode(gearbox.encode(dump, "gear"))
    for run, layers in (decoded if len(dump.runs) > 1 else {dump.runs[0]: decoded}).items():
        for layer, pair in layers.items():
            entries = [entry for entry in dump if (entry.run, entry.layer) == (run, layer)]
            whole = [numpy.concatenate([read(entry) for entry in entries]) for read in (type(entries[0]).key, type(entries[0]).value)]
            assert [bits(array) for array in pair] == [bits(array) for array in whole]


def test_file_is_decoded_from_its_path(tensor, tmp_path):
    (tmp_path / "a.gbx").write_bytes(gearbox.encode(tensor(5), "store"))
    assert bits(gearbox.decode(tmp_path / "a.gbx")) == bits(tensor(5))
    assert bits(gearbox.decode(str(tmp_path / "a.gbx"))) == bits(tensor(5))


class Misfit:
    """Not an array."""


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda t: t(8).astype(numpy.float64), TypeError, "key: expected dtype float16, float32, bfloat16 or uint16.*got float64"),
        (lambda t: t(8).astype(numpy.int16), TypeError, "got int16"),
        (lambda t: t(8).astype(">f2"), ValueError, "key: expected little-endian elements, got >f2"),
        (lambda t: t(8)[::2], ValueError, r"key: expected a C-contiguous array, got strides \(128, 32, 2\)"),
        (lambda t: t(8).transpose(1, 0, 2), ValueError, "C-contiguous"),
        (lambda t: t(8)[0], ValueError, r"key: expected shape \(seq, heads, dim\), got \(2, 16\)"),
        (lambda t: t(0), gearbox.GearboxError, "expected at least one token"),
        (lambda t: (t(8), t(7)), gearbox.GearboxError, "values: expected 8 tokens, got 7"),
        (lambda t: (t(8), Misfit()), TypeError, r"value: expected a numpy array of shape \(seq, heads, dim\), got Misfit"),
        (lambda t: (t(8),) * 3, ValueError, "expected a pair of keys and values, got 3 items"),
        (lambda t: Misfit(), TypeError, r"data: expected an array, \(key, value\), a dict or a Dump, got Misfit"),
        (lambda t: {1: t(8)}, TypeError, "layer 1, data"),
    ],
)
def test_bad_arrays_are_refused_with_what_was_expected(tensor, make, error, message):
    with pytest.raises(error, match=message):
        gearbox.encode(make(tensor), "zstd")


def test_errors_carry_their_kind(tensor):
    with pytest.raises(gearbox.GearboxError, match="zstd") as caught:
        gearbox.encode(tensor(4), "zstdd")
    assert caught.value.kind == "unknown-plugin"
    with pytest.raises(gearbox.GearboxError, match="/routes/0") as caught:
        gearbox.Pipeline({"routes": [{"codec": {"id": "zstd", "level": 99}}]})
    assert caught.value.kind == "invalid-config"
    stored = bytearray(gearbox.encode(tensor(400), "zstd"))
    stored[len(stored) // 2] ^= 1
    with pytest.raises(gearbox.GearboxError) as caught:
        gearbox.decode(bytes(stored))
    assert caught.value.kind == "corrupt"
    with pytest.raises(gearbox.GearboxError) as caught:
        gearbox.decode("no-such-file.gbx")
    assert caught.value.kind == "io"
    with pytest.raises(TypeError, match="data: expected bytes or the path of a container, got int"):
        gearbox.decode(3)
    assert issubclass(gearbox.GearboxError, Exception)


def test_arrays_are_left_alone_and_not_held(tensor):
    key = tensor(64)
    before, held = bits(key), sys.getrefcount(key)
    key.flags.writeable = False
    gearbox.encode((key, key), "planes")
    gc.collect()
    assert (bits(key), sys.getrefcount(key)) == (before, held)


def test_other_threads_run_while_it_encodes(tensor):
    key = tensor(20_000, heads=8, dim=64)
    done, counted = threading.Event(), 0

    def work():
        gearbox.encode((key, key), {"routes": [{"codec": {"id": "zstd", "level": 9}}]})
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.001):
        counted += 1
    thread.join()
    assert counted > 5, counted


def test_pipeline_tells_what_it_resolved():
    pipeline = gearbox.Pipeline("zstd")
    assert pipeline.name == "zstd" and pipeline.lossless
    assert pipeline.spec["routes"][0]["codec"]["id"] == "zstd"
    assert "level" in pipeline.spec["routes"][0]["codec"], "defaults are filled in"
    assert pipeline == gearbox.Pipeline(pipeline.spec) and hash(pipeline) == hash(gearbox.Pipeline(pipeline.spec))
    assert repr(pipeline).startswith('Pipeline({"') and [used["id"] for used in pipeline.plugins] == ["zstd"]
    again = pickle.loads(pickle.dumps(pipeline))
    assert again == pipeline


def test_plugins_are_those_of_the_program(program):
    found = gearbox.plugins()
    assert found == json.loads(program("plugin", "list", "--json"))
    assert {"planes", "quant", "h2o"} <= {plugin["id"] for plugin in found}
    with pytest.raises(gearbox.GearboxError, match="no-such-library.so"):
        gearbox.load_plugin("no-such-library.so")
