#!/usr/bin/env python3
"""Compares codecs of Gearbox with Python packages that compress the same tensors; prints Markdown.

A tensor is the keys or values of one run and layer, entries end to end along the tokens. Packages make one blob of it; Gearbox makes
a container per run, with chunks as long as the tensor, and every byte of the container counts: what belongs to no tensor (header, run
names, index) is shared out evenly. Each round measures every codec once, one after the other, one thread each; speeds are medians over
the rounds. What a package decodes is compared with the tensor every time; the sweep of Gearbox compares every value too.

Times are those of coding in memory, on both sides: neither the container nor files.

Exit status: 0 if the codec of --must-win is smaller than every package on every tensor, 1 if not, 2 if something went wrong.
"""

import argparse
import json
import lzma
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple
from unittest.mock import MagicMock

import blosc2
import numpy
import pcodec
import pcodec.standalone
import zstandard

# zipnn imports these for tensors of torch; the byte format that is measured here uses neither, and gives the same bytes without them.
for name in ("torch", "safetensors", "safetensors.torch"):
    sys.modules[name] = MagicMock()
import zipnn  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


class Dtype(NamedTuple):
    """How an element type is called by the packages."""

    size: int
    numbers: str
    zipnn: str


# pcodec takes bfloat16 as 16-bit integers.
DTYPES = {
    "fp16": Dtype(2, "float16", "float16"),
    "bf16": Dtype(2, "uint16", "bfloat16"),
    "fp32": Dtype(4, "float32", "float32"),
}


class Tensor(NamedTuple):
    """The keys or values of one run and layer."""

    run: str
    layer: int
    role: str
    dtype: Dtype
    data: bytes


class Peer(NamedTuple):
    """A package at one setting: `prepare` is not measured, `encode` takes its result."""

    name: str
    prepare: Callable
    encode: Callable
    decode: Callable


def peers(dtype: Dtype) -> list[Peer]:
    """Every package, for one element type."""

    def with_blosc2(filters: list) -> Callable:
        settings = dict(codec=blosc2.Codec.ZSTD, clevel=9, typesize=dtype.size, filters=filters, nthreads=1)
        return lambda data: blosc2.compress2(data, **settings)

    def unblosc2(blob: bytes) -> bytes:
        return blosc2.decompress2(blob, nthreads=1)

    zip_nn = zipnn.ZipNN(input_format="byte", bytearray_dtype=dtype.zipnn, threads=1)
    pco = pcodec.ChunkConfig(compression_level=8)
    encoder, decoder = zstandard.ZstdCompressor(level=19), zstandard.ZstdDecompressor()
    return [
        # It works in the buffer that it is given.
        Peer("zipnn", bytearray, zip_nn.compress, zip_nn.decompress),
        Peer(
            "pcodec 8",
            lambda data: numpy.frombuffer(data, dtype.numbers),
            lambda numbers: pcodec.standalone.simple_compress(numbers, pco),
            pcodec.standalone.simple_decompress,
        ),
        Peer("blosc2 shuffle zstd 9", bytes, with_blosc2([blosc2.Filter.SHUFFLE]), unblosc2),
        Peer("blosc2 bitshuffle zstd 9", bytes, with_blosc2([blosc2.Filter.BITSHUFFLE]), unblosc2),
        Peer("zstd 19", bytes, encoder.compress, decoder.decompress),
        Peer("xz 9e", bytes, lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
    ]


class Gearbox:
    """The program, and the pipelines that are measured."""

    def __init__(self, program: str, codecs: list[str]) -> None:
        self.program = program
        self.arguments = []
        for codec in codecs:
            pipeline = {"routes": [{"codec": {"id": codec}}], "chunking": {"mode": "aggregate"}}
            self.arguments += ["--pipeline", json.dumps(pipeline)]

    def json(self, *arguments: str) -> dict:
        """What a command prints; the arguments end with `--json`."""
        done = subprocess.run([self.program, *arguments, "--json"], stdout=subprocess.PIPE, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)}: exit status {done.returncode}\n{done.stdout.decode()}")
        return json.loads(done.stdout)

    def sizes(self, runs: list[Path]) -> dict:
        """Stored bytes by codec and tensor, from containers that were decoded and compared."""
        dumps = [argument for run in runs for argument in ("--dump", str(run))]
        sizes = {}
        for row in self.json("sweep", *self.arguments, *dumps)["rows"]:
            if row["state"] != "ok" or row["changed_values"] != 0:
                raise RuntimeError(f"{row['name']} on {row['dump']}: {row.get('reason', 'changed values')}")
            keys = {(part["layer"], part["role"]): part["run"] for part in row["sequences"]}
            own = dict.fromkeys(keys, 0)
            shared = 0
            for account in row["ledger"]:
                place = (account.get("layer"), account.get("role"))
                if place in own:
                    own[place] += account["bytes"]
                else:
                    shared += account["bytes"]
            for place, stored in own.items():
                key = (row["name"], keys[place], *place)
                sizes[key] = stored + math.ceil(shared / len(own))
        return sizes

    def speeds(self, folder: Path) -> dict:
        """Seconds to encode and decode everything once, by codec."""
        found = self.json("bench", *self.arguments, "--dump", str(folder), "--repeats", "1", "--max-bytes", str(1 << 62))
        seconds = {}
        for row in found["rows"]:
            encode, decode = seconds.get(row["pipeline"], (0.0, 0.0))
            encode += row["original_bytes"] / row["encode_mb_s"]["median"] / 1e6
            decode += row["original_bytes"] / row["decode_mb_s"]["median"] / 1e6
            seconds[row["pipeline"]] = (encode, decode)
        return seconds


def read(folder: Path) -> list[Tensor]:
    """The tensors of a dump in the reference layout."""
    tensors = []
    for layer in folder.glob("*/layer_*"):
        metas = [json.loads(path.read_text()) for path in layer.glob("meta_t*.json")]
        metas.sort(key=lambda meta: meta["seq_start"])
        for role in ("key", "value"):
            data = b"".join((layer / meta[f"{role[0]}_file"]).read_bytes() for meta in metas)
            tensors.append(Tensor(layer.parent.name, metas[0]["layer_id"], role, DTYPES[metas[0]["dtype"]], data))
    return sorted(tensors)


def measure(peer: Peer, tensor: Tensor) -> tuple[int, float, float]:
    """Size of the blob, and seconds to make it and to read it."""
    prepared = peer.prepare(tensor.data)
    start = time.perf_counter()
    blob = peer.encode(prepared)
    encoded = time.perf_counter()
    decoded = peer.decode(blob)
    done = time.perf_counter()
    if memoryview(decoded).cast("B") != tensor.data:
        raise RuntimeError(f"{peer.name} does not give back {tensor.run}, layer {tensor.layer}, {tensor.role}")
    return len(blob), encoded - start, done - encoded


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown, numbers on the right; the first column is text."""
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if at else "-") for at, width in enumerate(widths)) + "|"
    return "\n".join([line(heads), rule, *map(line, rows)])


def compare(arguments: argparse.Namespace) -> bool:
    """Measures and prints; whether the codec that must win does."""
    gearbox = Gearbox(arguments.gearbox, arguments.codecs)
    with tempfile.TemporaryDirectory() as temporary:
        # One layout for all readers, whatever the dumps are in.
        folder = Path(temporary)
        for dump in arguments.dumps:
            gearbox.json("dump", "convert", str(dump), str(folder), "--dtype", "keep")
        tensors = read(folder)
        runs = sorted({folder / tensor.run for tensor in tensors})
        sizes = gearbox.sizes(runs)
        by_dtype = {tensor.dtype: peers(tensor.dtype) for tensor in tensors}
        names = [peer.name for peer in next(iter(by_dtype.values()))]
        seconds = {name: [] for name in [*names, *arguments.codecs]}
        for number in range(arguments.rounds):
            for codec, measured in gearbox.speeds(folder).items():
                seconds[codec].append(measured)
            for at, name in enumerate(names):
                encode = decode = 0.0
                for tensor in tensors:
                    size, encoded, decoded = measure(by_dtype[tensor.dtype][at], tensor)
                    sizes[name, *tensor[:3]] = size
                    encode, decode = encode + encoded, decode + decoded
                seconds[name].append((encode, decode))
            print(f"round {number + 1} of {arguments.rounds} is done", file=sys.stderr)
    total = sum(len(tensor.data) for tensor in tensors)
    columns = [*arguments.codecs, *names]
    rows = []
    for tensor in tensors:
        ratios = [len(tensor.data) / sizes[name, *tensor[:3]] for name in columns]
        place = f"{tensor.run}, layer {tensor.layer}, {tensor.role}"
        rows.append([place, *(f"**{r:.4f}**" if r == max(ratios) else f"{r:.4f}" for r in ratios)])
    print(table(["compression ratio", *columns], rows))

    rows = []
    for name in columns:
        stored = sum(sizes[name, *tensor[:3]] for tensor in tensors)
        speeds = []
        for direction in zip(*seconds[name]):
            rates = [total / spent / 1e6 for spent in direction]
            speeds.append(f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})")
        rows.append([name, str(stored), f"{total / stored:.4f}", *speeds])
    heads = ["codec", "stored bytes", "ratio", "encode MB/s", "decode MB/s"]
    print(f"\n{table(heads, rows)}\n")
    print(f"{len(tensors)} tensors, {total} bytes; medians of {arguments.rounds} rounds (least to most), one thread")

    winner = arguments.must_win
    if winner == "none":
        return True
    margins = {
        tensor[:3]: (sizes[name, *tensor[:3]] / sizes[winner, *tensor[:3]], name)
        for tensor in tensors
        for name in [min(names, key=lambda name: sizes[name, *tensor[:3]])]
    }
    for (run, layer, role), (margin, name) in margins.items():
        if margin <= 1.0:
            print(f"{winner} loses to {name} on {run}, layer {layer}, {role}: {margin:.4f} of its size")
    (run, layer, role), (margin, name) = min(margins.items(), key=lambda item: item[1])
    print(f"{winner} at its least: {name} takes {margin:.4f} times its bytes on {run}, layer {layer}, {role}")
    return margin > 1.0


def main() -> int:
    """Reads the command line."""
    shared = ROOT.parent / "shared/data/dumps/fp16"
    default = shared if shared.is_dir() else ROOT / "tests/data/sample"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dumps", nargs="*", type=Path, help=f"dumps to read; their runs have different names [{default}]")
    parser.add_argument("--gearbox", required=True, help="the program; tests/peers/run gives it")
    parser.add_argument("--codecs", default="gear,planes", help="codecs of Gearbox, separated by commas [%(default)s]")
    parser.add_argument("--must-win", metavar="ID", default="planes", help="codec that must beat every package, or none [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds [%(default)s]")
    arguments = parser.parse_args()
    arguments.dumps = arguments.dumps or [default]
    arguments.codecs = arguments.codecs.split(",")
    if arguments.must_win not in [*arguments.codecs, "none"]:
        parser.error(f"--must-win: expected one of {', '.join(arguments.codecs)} or none, got {arguments.must_win}")
    try:
        return 0 if compare(arguments) else 1
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
