"""What the tests share: the sample dump, the program, arrays."""

import json
import os
import pathlib
import shutil
import subprocess

import numpy
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture
def sample():
    """The bundled sample dump."""
    return ROOT / "tests/data/sample"


@pytest.fixture
def program():
    """Runs `gearbox` and returns its standard output; skips where there is no program."""
    path = os.environ.get("GEARBOX_PROGRAM") or shutil.which("gearbox")
    if path is None:
        pytest.skip("no program: GEARBOX_PROGRAM names it")

    def run(*arguments):
        command = [path, *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout

    return run


@pytest.fixture
def library(tmp_path):
    """Builds the example in C, a library with the codec `plane-runs` and the transform `channel-major`; skips where nothing compiles C."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")

    def build(name, *options):
        path = tmp_path / name
        source = ["-I", ROOT / "plugins/abi/include", ROOT / "plugins/examples/c-demo/demo.c"]
        subprocess.run(["cc", "-std=c11", "-O1", *options, "-shared", "-fPIC", *source, "-o", path], check=True)
        return path

    return build


@pytest.fixture
def tensor():
    """Makes arrays that look like keys, the same ones each time."""

    def make(seq, heads=2, dim=16, dtype=numpy.float16, seed=7):
        values = numpy.random.default_rng(seed).standard_normal((seq, heads, dim), dtype=numpy.float32)
        if dtype == "bfloat16":
            return (values.view(numpy.uint32) >> 16).astype(numpy.uint16)
        return values.astype(dtype)

    return make


@pytest.fixture
def small(tmp_path):
    """A dump so small that a unit is done in no time."""
    layers = range(2)
    values = numpy.random.default_rng(5).standard_normal((len(layers), 2, 64, 2, 16)).astype(numpy.float16)
    tensors, at = {}, 0
    for layer in layers:
        for role in ("key", "value"):
            end = at + values[layer, 0].nbytes
            tensors[f"layers.{layer}.{role}"] = {"dtype": "F16", "shape": [64, 2, 16], "data_offsets": [at, end]}
            at = end
    head = json.dumps(tensors).encode()
    folder = tmp_path / "dump"
    folder.mkdir()
    (folder / "r.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + values.tobytes())
    return folder


def bits(array):
    """The bytes of an array: equal bits, whatever the dtype says of them."""
    return numpy.ascontiguousarray(array).view(numpy.uint8).tobytes()
