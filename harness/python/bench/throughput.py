"""Compares `gearbox.encode` and `gearbox.decode` with the calls of Rust that they wrap, and measures the memory that they take.

    python harness/python/bench/throughput.py --dump DIR [--pipeline ID]... [--threads N]... [--rounds N] [--mib N]

The tensors of the dump are joined to one pair of keys and values of at most so many MiB. Both sides work on it in one process and in
turns; each number of threads has a process of its own. Speeds are medians in MB/s of tensor bytes, with the least and the greatest; the
ratio is the median of the ratios of neighbouring calls, which other programs on the machine disturb least.
Memory is the growth of peak resident memory over what was resident before the call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import gearbox
import numpy


def pair(path: str, mib: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Keys and values of a dump, one entry behind the other."""
    keys, values, left = [], [], mib * 2**20
    for entry in gearbox.Dump(path):
        key, value = entry.key(), entry.value()
        if keys and (left < key.nbytes + value.nbytes or key.shape[1:] != keys[0].shape[1:]):
            continue
        left -= key.nbytes + value.nbytes
        keys.append(key)
        values.append(value)
    return numpy.concatenate(keys), numpy.concatenate(values)


def status(name: str) -> int:
    """A number of bytes from the status of this process."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def growth(call, *arguments) -> tuple[object, int]:
    """What a call gives, and by how much resident memory grew at most meanwhile."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    before = status("VmRSS")
    return call(*arguments), status("VmHWM") - before


def measure(path: str, pipelines: list[str], rounds: int, mib: float) -> list[dict]:
    """One row per pipeline and direction."""
    data = pair(path, mib)
    size = sum(array.nbytes for array in data)
    rows = []
    for name in pipelines:
        pipeline = gearbox.Pipeline(name)
        stored = gearbox.encode(data, pipeline)
        assert all((got.view("u1") == array.view("u1")).all() for got, array in zip(gearbox.decode(stored), data))
        seconds: dict[tuple[str, str], list[float]] = {
            (side, way): [] for side in ("rust", "wheel") for way in ("encode", "decode")
        }

        def rust():
            encode_ns, decode_ns, length = gearbox._gearbox.rust_calls(*data, pipeline)
            assert length == len(stored)
            seconds["rust", "encode"].append(encode_ns / 1e9)
            seconds["rust", "decode"].append(decode_ns / 1e9)

        def wheel():
            start = time.perf_counter()
            stored = gearbox.encode(data, pipeline)
            middle = time.perf_counter()
            decoded = gearbox.decode(stored)
            end = time.perf_counter()
            seconds["wheel", "encode"].append(middle - start)
            seconds["wheel", "decode"].append(end - middle)
            del decoded

        for turn in range(rounds):
            # Who comes first finds the memory as the other left it.
            for side in (rust, wheel) if turn % 2 else (wheel, rust):
                side()
        del stored
        stored, encode_growth = growth(gearbox.encode, data, pipeline)
        decoded, decode_growth = growth(gearbox.decode, stored)
        del decoded
        for way, grown in (("encode", encode_growth), ("decode", decode_growth)):
            row = {"pipeline": name, "way": way, "bytes": size, "stored": len(stored), "growth": grown}
            for side in ("rust", "wheel"):
                rates = [size / 1e6 / taken for taken in seconds[side, way]]
                row[side] = {"median": statistics.median(rates), "least": min(rates), "greatest": max(rates)}
            turns = zip(seconds["rust", way], seconds["wheel", way])
            row["ratio"] = statistics.median(rust / wheel for rust, wheel in turns)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dump", required=True)
    parser.add_argument("--pipeline", action="append")
    parser.add_argument("--threads", action="append", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mib", type=float, default=64)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    pipelines = args.pipeline or ["planes", "zstd", "gear"]
    if args.here:
        print(json.dumps(measure(args.dump, pipelines, args.rounds, args.mib)))
        return
    print(
        "| pipeline | way | threads | Rust MB/s | wheel MB/s | wheel / Rust | memory, MiB | stored, MiB | tensors, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for threads in args.threads or [1, 2]:
        command = [
            sys.executable,
            __file__,
            "--here",
            "--dump",
            args.dump,
            "--rounds",
            str(args.rounds),
            "--mib",
            str(args.mib),
        ]
        command += [word for name in pipelines for word in ("--pipeline", name)]
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
        told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
        for row in json.loads(told):
            rates = [
                f"{side['median']:.0f} ({side['least']:.0f} to {side['greatest']:.0f})"
                for side in (row["rust"], row["wheel"])
            ]
            sizes = [f"{row[name] / 2**20:.1f}" for name in ("growth", "stored", "bytes")]
            print(
                "|",
                " | ".join([row["pipeline"], row["way"], str(threads), *rates, f"{row['ratio']:.3f}", *sizes]),
                "|",
                flush=True,
            )


if __name__ == "__main__":
    main()
