"""Sweeps on a Ray cluster: `sweep`, and the command `gearbox-ray`.

A task evaluates a few units and returns a record for each; this process alone writes the results store. Ray may run a task more than once
when a node is lost; records are keyed by everything they depend on, so a row is never doubled. See docs/CLUSTER.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import secrets
import sys
import tempfile

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ._gearbox import Evaluator, GearboxError, Pipeline, load_plugin
from ._sweep import Results, batches, make_plan

if TYPE_CHECKING:
    from ._sweep import Path

__all__ = ["main", "sweep"]


def _ray():
    try:
        import ray
    except ImportError as error:
        raise ImportError("sweeps on a cluster need Ray: pip install 'gearbox[ray]'") from error
    return ray


def _secure(address):
    """What a cluster of this machine alone is started with. Ray reads it when it is imported."""
    if address is None and "ray" not in sys.modules:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _connect(ray, address):
    """Joins the cluster at an address, or starts one on this machine that listens to nobody else. Tells whether it was connected here."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    if address is None:
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    else:
        ray.init(address=address, **quiet)
    return True


@functools.lru_cache(maxsize=4)
def _evaluator(job, libraries, places):
    """One evaluator per sweep and worker process: it holds the dumps open. `job` tells sweeps apart."""
    for path, sha256 in libraries:
        load_plugin(path, sha256=sha256)
    return Evaluator(dict(places))


@functools.lru_cache(maxsize=4)
def _unpacked(job, path):
    """The folder of a dump that came through the object store, named as the first call for it filled it."""
    return tempfile.mkdtemp(prefix="gearbox-dump-")


def _unpack(job, path, files):
    folder = _unpacked(job, path)
    for name, contents in files.items():
        target = os.path.join(folder, name)
        if not os.path.exists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as file:
                file.write(contents)
    return folder


def _evaluate(job, libraries, units, shipped):
    """The task: records as JSON text, or what went wrong and where. It raises nothing, so that Ray repeats only what was lost."""
    import socket

    # Before the first call: one thread per task, as one processor is reserved for it.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    try:
        ray = _ray()
        places = tuple((path, _unpack(job, path, ray.get(files))) for path, files in shipped)
        return {"records": _evaluator(job, libraries, places).evaluate(units)}
    except Exception as error:
        node = f"{socket.gethostname()} ({_ray().util.get_node_ip_address()})"
        return {"error": f"{type(error).__name__}: {error}", "kind": getattr(error, "kind", None), "node": node}


def _files(path):
    """All files of a dump by their names within it."""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            return {os.path.basename(path): file.read()}
    files = {}
    for folder, _, names in os.walk(path):
        for name in names:
            whole = os.path.join(folder, name)
            with open(whole, "rb") as file:
                files[os.path.relpath(whole, path)] = file.read()
    return files


def sweep(
    config: dict[str, Any] | Path | None = None,
    dumps: Path | Iterable[Path] | None = None,
    *,
    results: Path,
    pipelines: Iterable[Pipeline | dict[str, Any] | Path] | None = None,
    plugins: Iterable[Path] = (),
    address: str | None = None,
    batch: int | None = None,
    ship: bool = False,
    max_retries: int = 3,
    rerun: bool = False,
) -> Results:
    """Run a sweep on a Ray cluster, and return `Results`.

    `config`, `dumps`, `pipelines` and `rerun` are those of `gearbox.sweep`. `results` is the store, written by this process alone; what it
    holds is not computed again. `address` is that of a cluster (by default `RAY_ADDRESS`, else one is started on this machine and ends with
    the call). Dumps are read by their absolute paths, which every node must have, unless `ship` sends them through Ray's object store.
    `plugins` are libraries to load, by path, on every node; one whose SHA-256 differs from the one here is an error that names the node.
    A task evaluates `batch` units and is repeated up to `max_retries` times if its node is lost; an error in a task is not repeated: the
    other units are finished and stored, then `GearboxError` says what failed where.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    _secure(address)
    ray, plugins = _ray(), list(plugins)
    for path in plugins:
        load_plugin(path)
    plan = make_plan(config, dumps, pipelines)
    units = plan.units(None if rerun else results)
    libraries = [(os.path.abspath(path), None) for path in plugins]
    libraries += [(os.path.abspath(path), sha256) for path, sha256 in plan.libraries]
    connected = _connect(ray, address)
    try:
        failures = _run(ray, plan, units, results, (tuple(libraries), batch, ship, max_retries, rerun))
    finally:
        if connected:
            ray.shutdown()
    if failures:
        error = GearboxError("; ".join(f"node {one['node']}: {one['error']}" for one in failures))
        error.kind = failures[0]["kind"]
        raise error
    return Results(*plan.run(os.fspath(results), None, len(units)))


def _run(ray, plan, units, results, options):
    """Evaluates units on the cluster and stores their records; returns what failed, each message once."""
    libraries, batch, ship, max_retries, rerun = options
    cpus = int(ray.cluster_resources().get("CPU", 1)) or 1
    # Enough batches for all processors to end at about the same time, and few enough for the scheduler.
    size = batch or max(1, min(16, len(units) // (8 * cpus)))
    job = secrets.token_hex(8)
    shipped = [(dump["path"], ray.put(_files(dump["path"]))) for dump in plan.dumps] if ship else []
    task = ray.remote(_evaluate).options(max_retries=max_retries, num_cpus=1, scheduling_strategy="SPREAD", name="gearbox")
    waiting = list(batches(units, size))
    running, failures = {}, {}
    while waiting or running:
        while waiting and len(running) < 4 * cpus:
            texts = [unit for _, unit in waiting.pop(0)]
            running[task.remote(job, libraries, texts, shipped)] = len(texts)
        done, _ = ray.wait(list(running), num_returns=1)
        for reference in done:
            del running[reference]
            try:
                outcome = ray.get(reference)
            except ray.exceptions.RayError as error:
                outcome = {"error": str(error).strip().splitlines()[0], "kind": "plugin-crashed", "node": "lost"}
            if "records" in outcome:
                plan.insert(results, outcome["records"], rerun)
            else:
                failures[outcome["node"], outcome["error"]] = outcome
    return list(failures.values())


def _arguments():
    parser = argparse.ArgumentParser(
        prog="gearbox-ray",
        description="Runs a sweep on a Ray cluster and keeps its rows in a results store.",
        epilog="Exit status: 0 pass; 1 a row or a canary failed, or nothing holds the limits of the config; 2 usage, data or cluster error.",
    )
    parser.add_argument("config", nargs="?", help="sweep as JSON [default: every codec, and every transform before every codec]")
    parser.add_argument("--dump", action="append", metavar="PATH", help="dump to read, may be repeated [default: the config's]")
    parser.add_argument("--pipeline", action="append", metavar="PIPELINE", help="a .json file, JSON text or the id of a codec; may be repeated")
    parser.add_argument("--plugin", action="append", default=[], metavar="LIB", help="library that every node loads, may be repeated")
    parser.add_argument("--results", required=True, metavar="FILE", help="results store; what it holds is not computed again")
    parser.add_argument("--address", metavar="ADDRESS", help="the cluster [default: RAY_ADDRESS, else one on this machine]")
    parser.add_argument("--batch", type=int, metavar="UNITS", help="units per task [default: by their number]")
    parser.add_argument("--ship", action="store_true", help="send the dumps through the object store")
    parser.add_argument("--max-retries", type=int, default=3, metavar="N", help="how often a task is repeated whose node was lost [default: 3]")
    parser.add_argument("--rerun", action="store_true", help="compute and replace rows that are there")
    parser.add_argument("--json", action="store_true", help="print the sweep as JSON instead of a table")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command `gearbox-ray`; returns its exit status."""
    given = vars(_arguments().parse_args(arguments))
    as_json = given.pop("json")
    renamed = {"dump": "dumps", "pipeline": "pipelines", "plugin": "plugins"}
    settings = {renamed.get(name, name): value for name, value in given.items()}
    try:
        found = sweep(settings.pop("config"), settings.pop("dumps"), **settings)
    except (GearboxError, ImportError, ConnectionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.sweep, indent=2) if as_json else found.summary)
    return 0 if found.passed else 1


if __name__ == "__main__":
    sys.exit(main())
