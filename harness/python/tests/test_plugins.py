"""Plugins of others. A library stays in the process that loaded it, so each test has processes of its own."""

import hashlib
import json
import subprocess
import sys

import gearbox


def run(code, *arguments, status=0):
    """Standard output of a Python program, or standard error of one that must fail."""
    ran = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == status, ran.stderr
    return ran.stderr if status else ran.stdout


def test_library_brings_a_codec_that_codes(library):
    code = """
import sys, numpy, gearbox
print(*gearbox.load_plugin(sys.argv[1], sha256=sys.argv[2]))
print(*gearbox.load_plugin(sys.argv[1]))
held = {plugin["id"]: plugin for plugin in gearbox.plugins()}["plane-runs"]
assert sys.argv[1] in held["origin"], held
array = (numpy.arange(64 * 2 * 16) % 7).astype(numpy.float16).reshape(64, 2, 16)
data = gearbox.encode(array, "plane-runs")
assert (gearbox.decode(data) == array).all() and len(data) < array.nbytes
"""
    path = library("libdemo.so")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert run(code, path, sha256).split("\n")[:2] == ["plane-runs channel-major"] * 2
    told = run(code, path, "0" * 64, status=1)
    assert "gearbox.GearboxError" in told and sha256 in told and "libdemo.so" in told


def test_sweep_names_the_library_of_its_config(library, small, tmp_path):
    config = {
        "plugins": [{"path": str(library("libdemo.so"))}],
        "pipelines": [{"routes": [{"transforms": [{"id": "channel-major"}], "codec": {"id": "plane-runs"}}]}],
    }
    code = """
import json, sys, gearbox
rows = gearbox.sweep(json.loads(sys.argv[1]), sys.argv[2], results=sys.argv[3])
print(json.dumps(list(rows)))
"""
    store = tmp_path / "results.db"
    [row] = json.loads(run(code, json.dumps(config), small, store))
    assert row["state"] == "ok" and "lossless" in row["labels"]
    # A store is read without the library.
    assert [held["name"] for held in gearbox.results(store)] == [row["name"]]
