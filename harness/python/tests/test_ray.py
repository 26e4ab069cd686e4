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


def numbers(rows):
    """Rows without their times and places."""
    left_out = ("encode_ns", "decode_ns", "dump", "sequences", "pareto")
    return [{name: value for name, value in row.items() if name not in left_out} for row in rows]


def test_without_ray_the_message_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['ray'] = None; import gearbox.ray as r; sys.exit(r.main(['--results', 'r.db']))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert told.returncode == 2 and "pip install 'gearbox[ray]'" in told.stderr


def test_cluster_that_loses_a_node_gives_every_row_once(small):
    pytest.importorskip("ray")
    if not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("namespaces of its own are not permitted here")
    # Sockets have short names only.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="gbx-", dir="/tmp"))
    try:
        config = folder / "sweep.json"
        config.write_text(json.dumps(UNITS))
        home = {"HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
        script = pathlib.Path(__file__).with_name("cluster.py")
        command = [*ALONE, sys.executable, script, folder, config, small]
        ran = subprocess.run(command, env=os.environ | home, capture_output=True, text=True, timeout=240)
        logs = "".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
        assert ran.returncode == 0, ran.stderr + logs
        rows = json.loads((folder / "rows.json").read_text())
        assert numbers(rows) == numbers(gearbox.sweep(UNITS, small)) and len(rows) == 200
        started = (folder / "started.txt").read_text().splitlines()
        units = [line.rpartition(" ")[0] for line in started]
        lost = {line.rpartition(" ")[0] for line in started if line.endswith("127.0.0.2")}
        assert len(set(units)) == 200 and lost and all(units.count(unit) >= 2 for unit in lost)
        again = gearbox.sweep(UNITS, small, results=folder / "results.db")
        assert [row["encode_ns"] for row in again] == [row["encode_ns"] for row in rows], "the store holds these rows"
        assert json.loads((folder / "left.json").read_text()) == []
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_command_sweeps_on_this_machine_and_ships_its_dumps(small):
    pytest.importorskip("ray")
    if not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("namespaces of its own are not permitted here")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="gbx-", dir="/tmp"))
    try:
        code = (
            "import sys; sys.path.insert(0, sys.argv.pop(1)); import cluster; cluster.loopback_up();"
            "import gearbox.ray; sys.exit(gearbox.ray.main(sys.argv[1:]))"
        )
        options = ["--dump", small, "--pipeline", "zstd", "--pipeline", "store", "--results", folder / "r.db", "--ship", "--json"]
        command = [*ALONE, sys.executable, "-c", code, pathlib.Path(__file__).parent, *options]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"HOME": str(folder)}
        ran = subprocess.run(command, env=environment | {"RAY_TMPDIR": str(folder)}, capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, ran.stderr
        assert numbers(json.loads(ran.stdout)["rows"]) == numbers(gearbox.sweep(dumps=small, pipelines=["zstd", "store"]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
