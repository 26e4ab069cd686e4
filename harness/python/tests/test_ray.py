"""Sweeps on a Ray cluster."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import gearbox
import pytest

UNITS = {
    "pipelines": [
        {
            "routes": [{"codec": {"id": "zstd", "level": {"sweep": list(range(1, 11))}}}],
            "chunking": {"mode": "chunked", "tokens": {"sweep": list(range(4, 24))}},
        }
    ],
    "attention": None,
}
ALONE = ["unshare", "-n", "-p", "-f", "--mount-proc", "--kill-child"]
SINGLE = "import sys; sys.path.insert(0, sys.argv.pop(1)); import cluster; cluster.loopback_up();"


@pytest.fixture
def alone():
    """Runs Python in namespaces of its own, with a folder as its home; skips where that is not permitted."""
    pytest.importorskip("ray")
    if not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("namespaces of its own are not permitted here")
    # Sockets have short names only.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="gbx-", dir="/tmp"))
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def run(*arguments, **environment):
        command = [*ALONE, sys.executable, *map(str, arguments)]
        home = {"HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
        ran = subprocess.run(command, env=kept | home | environment, capture_output=True, text=True, timeout=240)
        logs = "".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
        assert ran.returncode == 0, ran.stderr + logs
        return ran.stdout

    run.folder = folder
    yield run
    shutil.rmtree(folder, ignore_errors=True)


def numbers(rows):
    """Rows without their times and places."""
    left_out = ("encode_ns", "decode_ns", "dump", "sequences", "pareto")
    return [{name: value for name, value in row.items() if name not in left_out} for row in rows]


def test_without_ray_the_message_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['ray'] = None; import gearbox.ray as r; sys.exit(r.main(['--results', 'r.db']))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert told.returncode == 2 and "pip install 'gearbox[ray]'" in told.stderr


def test_cluster_that_loses_a_node_gives_every_row_once(small, alone):
    folder, config = alone.folder, alone.folder / "sweep.json"
    config.write_text(json.dumps(UNITS))
    script = pathlib.Path(__file__).with_name("cluster.py")
    alone(script, folder, config, small, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    rows = json.loads((folder / "rows.json").read_text())
    assert numbers(rows) == numbers(gearbox.sweep(UNITS, small)) and len(rows) == 200
    started = (folder / "started.txt").read_text().splitlines()
    units = [line.rpartition(" ")[0] for line in started]
    lost = {line.rpartition(" ")[0] for line in started if line.endswith("127.0.0.2")}
    assert len(set(units)) == 200 and lost and all(units.count(unit) >= 2 for unit in lost)
    again = gearbox.sweep(UNITS, small, results=folder / "results.db")
    assert [row["encode_ns"] for row in again] == [row["encode_ns"] for row in rows], "the store holds these rows"
    assert json.loads((folder / "left.json").read_text()) == []


PLUGINS = """
import os, gearbox.ray
library, other, dump, results = sys.argv[1:]
[row] = gearbox.ray.sweep(dumps=dump, pipelines=["plane-runs"], plugins=[library], results=results)
assert row["state"] == "ok" and "lossless" in row["labels"], row
connect = gearbox.ray._connect


def connected(*arguments):
    # Workers find another library than this process did, as on a node where another build lies.
    os.replace(other, library)
    return connect(*arguments)


gearbox.ray._connect = connected
pipeline = '{"routes": [{"codec": {"id": "plane-runs", "planes": false}}]}'
try:
    gearbox.ray.sweep(dumps=dump, pipelines=[pipeline], plugins=[library], results=results)
except gearbox.GearboxError as error:
    print(error.kind, error)
"""


def test_plugins_are_loaded_on_every_node_and_one_that_differs_is_an_error(library, small, alone):
    first, other = library("libdemo.so"), library("other.so", "-g")
    here, folder = pathlib.Path(__file__).parent, alone.folder
    told = alone("-c", SINGLE + PLUGINS, here, first, other, small, folder / "r.db", RAY_TMPDIR=str(folder))
    assert told.startswith("mismatch node ") and "plane-runs" in told, told


def test_command_sweeps_on_this_machine_and_ships_its_dumps(small, alone):
    here, folder = pathlib.Path(__file__).parent, alone.folder
    options = ["--dump", small, "--pipeline", "zstd", "--pipeline", "store", "--results", folder / "r.db", "--ship", "--json"]
    code = SINGLE + "import gearbox.ray; sys.exit(gearbox.ray.main(sys.argv[1:]))"
    rows = json.loads(alone("-c", code, here, *options, RAY_TMPDIR=str(folder)))["rows"]
    assert numbers(rows) == numbers(gearbox.sweep(dumps=small, pipelines=["zstd", "store"]))
