#!/usr/bin/env python3
"""Writes a large dump by repeating a small one along the tokens: tests/large_dump.py SAMPLE.safetensors OUT.safetensors GIGABYTES

The memory and scaling measurements of docs/RESULTS.md use it. The result is one run whose first entry is one long prompt.
"""

import json
import struct
import sys
from pathlib import Path


def main(sample: Path, out: Path, gigabytes: float) -> None:
    data = sample.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    metadata = header.pop("__metadata__")
    tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
    size = sum(end - start for name, t in tensors if "query" not in name for start, end in [t["data_offsets"]])
    times = max(1, round(gigabytes * 1e9 / size))
    offset = 0
    for _, tensor in tensors:
        start, end = tensor["data_offsets"]
        tensor["shape"][0] *= times
        tensor["data_offsets"] = [offset, offset + (end - start) * times]
        offset += (end - start) * times
    kept = {name: t for name, t in tensors}
    seq = kept["tokens"]["shape"][0]
    metadata["entries"] = json.dumps([[0, seq, "prefill"]])
    text = json.dumps({"__metadata__": metadata, **kept}).encode()
    text += b" " * (-len(text) % 8)
    old = json.loads(data[8 : 8 + length])
    with out.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, _ in tensors:
            start, end = old[name]["data_offsets"]
            for _ in range(times):
                file.write(body[start:end])
    print(f"{out}: {times} times the sample, {seq} tokens, {out.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
