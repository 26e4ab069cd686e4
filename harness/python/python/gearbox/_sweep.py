"""Sweeps on this machine, and what every sweep gives."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._gearbox import Evaluator, Pipeline, Plan, read_results

if TYPE_CHECKING:
    import pandas

    Path = str | os.PathLike[str]

# Units with loaded plugins are evaluated together: the conformance kit attacks those plugins once per call.
_TOGETHER = 16


class Rows(list[dict[str, Any]]):
    """Rows of results: a list of dicts."""

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows with one value per column."""
        return list(self)

    def to_pandas(self) -> pandas.DataFrame:
        """The same as a pandas data frame; needs pandas."""
        import pandas

        return pandas.DataFrame(self.to_dicts())


class Results(Rows):
    """The rows of a sweep: a list of dicts, one per dump and pipeline.

    `sweep` is all of it as a dict (receipt, gate, dumps, canaries, rows), as `gearbox sweep --json` prints it, `summary` the table that it
    prints, and `passed` whether its exit status would be 0.
    """

    sweep: dict[str, Any]
    summary: str
    passed: bool

    def __init__(self, sweep: dict[str, Any], summary: str, passed: bool) -> None:
        super().__init__(sweep["rows"])
        self.sweep = sweep
        self.summary = summary
        self.passed = passed

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows with one value per column: what `measured` and the two roles hold becomes columns of their own; lists are left out."""
        return [_flat(row) for row in self]


def _flat(row):
    flat = {}
    for column, value in row.items():
        if column == "measured":
            flat.update(value)
        elif column in ("key", "value"):
            flat.update({f"{column}_{name}": number for name, number in value.items()})
        elif column == "pipeline":
            flat[column] = json.dumps(value)
        elif column == "labels":
            flat[column] = " ".join(value)
        elif column == "verdict":
            flat["passed"] = None if value is None else not value.get("violations")
        elif not isinstance(value, (dict, list)):
            flat[column] = value
    return flat


def make_plan(config, dumps, pipelines):
    """A plan from the arguments that every kind of sweep takes."""
    if dumps is None:
        dumps = []
    elif isinstance(dumps, (str, os.PathLike)):
        dumps = [dumps]
    return Plan(config, [os.path.abspath(dump) for dump in dumps], [_text(pipeline) for pipeline in pipelines or []])


def _text(pipeline):
    if isinstance(pipeline, Pipeline):
        return json.dumps(pipeline.spec)
    return json.dumps(pipeline) if isinstance(pipeline, dict) else os.fspath(pipeline)


@contextmanager
def store(results):
    """The path of a results store: the one that was named, or one that goes away again."""
    if results is not None:
        yield os.fspath(results)
        return
    with tempfile.TemporaryDirectory(prefix="gearbox-") as folder:
        yield os.path.join(folder, "results.db")


def batches(units, size=1):
    """Cuts units into batches of `size`; those with loaded plugins into larger ones."""
    by_library = {}
    for key, unit in units:
        loaded = [plugin["library"]["sha256"] for plugin in json.loads(unit)["plugins"] if "library" in plugin]
        by_library.setdefault(tuple(loaded), []).append((key, unit))
    for loaded, held in by_library.items():
        step = max(size, _TOGETHER) if loaded else size
        yield from (held[start : start + step] for start in range(0, len(held), step))


def results(
    path: Path, *, columns: Sequence[str] = (), where: str | None = None, sort: str | None = None, limit: int | None = None
) -> Rows:
    """Read rows of a results store, and return `Rows`.

    `columns` are those that docs/RESULTS-STORE.md lists (all by default). With `where`, an SQL expression over them, only rows for which it is
    true; `sort` is a column, descending with `-` before it; `limit` is the most rows.
    """
    return Rows(read_results(path, list(columns), where, sort, limit))


def sweep(
    config: dict[str, Any] | Path | None = None,
    dumps: Path | Iterable[Path] | None = None,
    *,
    pipelines: Iterable[Pipeline | dict[str, Any] | Path] | None = None,
    results: Path | None = None,
    rerun: bool = False,
    shard: str | None = None,
) -> Results:
    """Run every pipeline over every dump, as `gearbox sweep` does, and return `Results`.

    `config` is a dict, JSON text or the path of a file (by default every codec in every chunking mode, and every transform before every
    codec), `dumps` are paths, `pipelines` whatever `Pipeline` takes, with `{"sweep": [...]}` for any value. With `results`, the path of a
    results store, each row is stored when it is done and never computed again unless `rerun` is true; `shard="3/8"` runs one of eight
    equal shares. It can be interrupted between units.
    """
    plan = make_plan(config, dumps, pipelines)
    with store(results) as path:
        evaluator, units = Evaluator(), plan.units(None if rerun else path, shard)
        for batch in batches(units):
            plan.insert(path, evaluator.evaluate([unit for _, unit in batch]), rerun)
        return Results(*plan.run(path, shard, None if results is None else len(units)))
