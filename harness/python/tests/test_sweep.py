"""Sweeps on this machine."""

import json

import gearbox
import pytest

PIPELINES = [{"routes": [{"codec": {"id": "zstd", "level": {"sweep": [1, 3]}}}]}, "store", gearbox.Pipeline("gear")]


def numbers(row):
    """What two runs of one row must agree on."""
    return {name: value for name, value in row.items() if name not in ("encode_ns", "decode_ns", "dump", "sequences", "pareto")}


def test_rows_are_those_of_the_program(small, program, tmp_path):
    found = gearbox.sweep(dumps=small, pipelines=PIPELINES)
    (tmp_path / "sweep.json").write_text(json.dumps({"pipelines": [PIPELINES[0], *[gearbox.Pipeline(p).spec for p in PIPELINES[1:]]]}))
    told = json.loads(program("sweep", tmp_path / "sweep.json", "--dump", small, "--json"))
    assert [numbers(row) for row in found] == [numbers(row) for row in told["rows"]]
    assert found.passed and "| zstd" in found.summary and len(found.sweep["canaries"]) == 2


def test_warnings_are_records_of_logging(small, caplog):
    (small / "bad.safetensors").write_bytes(b"no tensors")
    with caplog.at_level("INFO", logger="gearbox"):
        assert len(gearbox.sweep(dumps=small, pipelines=["store"])) == 1
    warnings = [record for record in caplog.records if (record.name, record.levelname) == ("gearbox", "WARNING")]
    assert str(small) in warnings[0].getMessage() and "bad.safetensors" in warnings[0].getMessage()


def test_store_is_read_instead_of_computed_again(small, tmp_path):
    store = tmp_path / "results.db"
    first = gearbox.sweep(dumps=small, pipelines=["zstd"], results=store)
    plan = gearbox._sweep.make_plan(None, small, ["zstd", "lz4"])
    assert [json.loads(unit)["name"] for _, unit in plan.units(str(store))] == ["lz4"]
    both = gearbox.sweep(dumps=small, pipelines=["zstd", "lz4"], results=store)
    assert first[0]["encode_ns"] == both[0]["encode_ns"], "read, not measured again"
    assert "1 units computed, 0 read" in first.summary and "1 units computed, 1 read" in both.summary
    assert both.sweep["resumed"]["computed"] == 1 and "computed" not in gearbox.sweep(dumps=small, pipelines=["store"]).summary
    assert [row["name"] for row in both] == ["zstd", "lz4"]


def test_rows_of_a_store_are_read(small, tmp_path):
    store = tmp_path / "results.db"
    swept = gearbox.sweep(dumps=small, pipelines=["zstd", "store"], results=store)
    rows = gearbox.results(store, columns=["name", "stored_bytes"], sort="-stored_bytes")
    assert rows == sorted(({name: row[name] for name in ("name", "stored_bytes")} for row in swept), key=lambda row: -row["stored_bytes"])
    assert [row["name"] for row in gearbox.results(store, where="name = 'zstd'", limit=1)] == ["zstd"]
    assert gearbox.results(store, where="0") == []
    with pytest.raises(gearbox.GearboxError, match="no column is called `bytes`"):
        gearbox.results(store, columns=["bytes"])


def test_shards_make_up_the_whole(small, tmp_path):
    plan = gearbox._sweep.make_plan(None, small, PIPELINES)
    keys = [key for key, _ in plan.units()]
    parts = [[key for key, _ in plan.units(None, f"{part}/3")] for part in (1, 2, 3)]
    assert sorted(keys) == sorted(sum(parts, [])) and len(set(keys)) == 4
    rows = gearbox.sweep(dumps=small, pipelines=PIPELINES, results=tmp_path / "part.db", shard="1/3")
    assert len(rows) == len(parts[0])


def test_rows_become_columns(small):
    found = gearbox.sweep(dumps=small, pipelines=["store"])
    row = found.to_dicts()[0]
    assert row["stored_bytes"] == found[0]["stored_bytes"] and row["ratio"] == found[0]["measured"]["ratio"]
    assert not any(isinstance(value, (dict, list)) for value in row.values())
    pandas = pytest.importorskip("pandas")
    assert isinstance(found.to_pandas(), pandas.DataFrame)


def test_bad_settings_and_foreign_units_are_refused(small):
    with pytest.raises(gearbox.GearboxError, match="pipeline") as caught:
        gearbox.sweep({"pipeline": []}, small)
    assert caught.value.kind == "invalid-config"
    plan = gearbox._sweep.make_plan(None, small, ["store"])
    unit = json.loads(plan.units()[0][1]) | {"digest": "0" * 32}
    with pytest.raises(gearbox.GearboxError, match="digest of the dump") as caught:
        gearbox._sweep.Evaluator().evaluate([json.dumps(unit)])
    assert caught.value.kind == "mismatch"
