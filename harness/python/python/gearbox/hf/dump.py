"""Writes a run as a safetensors dump, tokens as they come, without holding a tensor in memory."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from .facts import Geometry

try:
    import fcntl
except ImportError:  # Not on this system; nobody removes leftovers there by their locks.
    fcntl = None  # type: ignore[assignment]

PARTS = ("key", "value", "query")
"""Tensors of a layer, in the order of the file."""

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
"""Element types of dumps."""

_LABELS = {"f16": "F16", "bf16": "BF16", "f32": "F32"}
_RUN = re.compile(r"[A-Za-z0-9._-]+")


def check_run_name(name: str) -> None:
    """Raises ``ValueError`` unless ``name`` can name a run and its file."""
    if not _RUN.fullmatch(name) or name in (".", ".."):
        raise ValueError(f"run name: expected letters, digits, `.`, `_` or `-`, got `{name}`")


class DumpWriter:
    """A dump that gets its name when it is complete; as a context manager it leaves nothing otherwise.

    Every tensor has its place in the file from the beginning, because the number of tokens is known: ``entries`` are
    ``(start, seq, stage)``, and their tokens follow each other.
    """

    def __init__(
        self,
        path: Path,
        geometry: Geometry,
        dtype: str,
        entries: Sequence[tuple[int, int, str]],
        metadata: Mapping[str, str],
        overwrite: bool,
    ) -> None:
        """Starts the file under a temporary name.

        Raises:
            FileExistsError: if ``path`` exists and ``overwrite`` is off.
            IsADirectoryError: if it is a folder.
            OSError: if the folder takes no new file.
        """
        self._path, self._geometry, self._overwrite = path, geometry, overwrite
        self._dtype = DTYPES[dtype]
        self._seq = sum(seq for _, seq, _ in entries)
        self._written: dict[tuple[int, str], int] = {}
        self.overflow = 0
        """Finite elements so far that are infinite in the type of the dump."""
        if path.is_dir():
            raise IsADirectoryError(f"`{path}`: expected a file, got a folder")
        if os.path.lexists(path) and not overwrite:
            raise _exists(path)
        header, self._offsets = self._layout(_LABELS[dtype], entries, metadata)
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.gearbox-tmp")
        self._file: BinaryIO = open(self._temporary, "xb", buffering=0)
        try:
            if fcntl is not None:
                # Tells other programs of Gearbox that this is no leftover. A file system without locks has to do without.
                with suppress(OSError):
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._put(0, header)
        except BaseException:
            self._discard()
            raise

    def _layout(
        self, label: str, entries: Sequence[tuple[int, int, str]], metadata: Mapping[str, str]
    ) -> tuple[bytes, dict[str, int]]:
        """The header, and where the tensors begin in the file."""

        def compact(value: object) -> str:
            return json.dumps(value, separators=(",", ":"))

        strings = {
            "format": "gearbox-dump",
            "version": "1",
            "run": self._path.stem,
            "entries": compact(entries),
            **metadata,
        }
        tensors: dict[str, object] = {"__metadata__": strings}
        offsets, end = {}, 0

        def add(name: str, label: str, shape: list[int], size: int) -> None:
            nonlocal end
            offsets[name], start = end, end
            end += size
            tensors[name] = {"dtype": label, "shape": shape, "data_offsets": [start, end]}

        # Token ids come first, because they have the widest elements: what follows stays aligned.
        add("tokens", "I64", [self._seq], self._seq * 8)
        for layer in range(self._geometry.layers):
            for part in PARTS:
                shape = [self._seq, self._geometry.heads(part), self._geometry.head_dim]
                add(f"layers.{layer}.{part}", label, shape, math.prod(shape) * self._dtype.itemsize)
        text = compact(tensors).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        return header, {name: len(header) + offset for name, offset in offsets.items()}

    def write(self, layer: int, part: str, rows: torch.Tensor) -> None:
        """Appends the next tokens ``(seq, heads, dim)`` of a tensor, rounded to nearest even.

        Raises:
            ValueError: if the shape is another than the geometry says, or more tokens come than announced.
        """
        seq, *extents = rows.shape
        expected = [self._geometry.heads(part), self._geometry.head_dim]
        start = self._written.get((layer, part), 0)
        if extents != expected or start + seq > self._seq or not 0 <= layer < self._geometry.layers:
            raise ValueError(
                f"layer {layer}, {part}: expected up to {self._seq - start} tokens of {tuple(expected)}"
                f" in {self._geometry.layers} layers, got {tuple(rows.shape)}"
            )
        rounded = rows.to(self._dtype)
        if rounded.dtype != rows.dtype and (infinite := rounded.isinf()).any():
            self.overflow += int((infinite & rows.isfinite()).sum())
        size = self._dtype.itemsize
        words = rounded.contiguous().cpu().view(torch.int16 if size == 2 else torch.int32).numpy()
        offset = self._offsets[f"layers.{layer}.{part}"] + start * math.prod(expected) * size
        self._put(offset, words.astype(words.dtype.newbyteorder("<"), copy=False).data)
        self._written[layer, part] = start + seq

    def finish(self, tokens: Sequence[int]) -> None:
        """Adds the token ids, and gives the file its name.

        Raises:
            ValueError: if a tensor or the ids are not complete.
            FileExistsError: if the name was taken meanwhile and ``overwrite`` is off.
        """
        for layer in range(self._geometry.layers):
            for part in PARTS:
                got = self._written.get((layer, part), 0)
                if got != self._seq:
                    raise ValueError(f"layer {layer}, {part}: expected {self._seq} tokens, got {got}")
        if len(tokens) != self._seq:
            raise ValueError(f"tokens: expected {self._seq} ids, got {len(tokens)}")
        self._put(self._offsets["tokens"], np.asarray(tokens, dtype="<i8").data)
        self._file.close()
        if self._overwrite:
            os.replace(self._temporary, self._path)
            return
        try:
            # Unlike a renaming, this fails if the name is taken.
            os.link(self._temporary, self._path)
        except FileExistsError:
            raise _exists(self._path) from None
        except OSError:
            # A file system without links.
            if os.path.lexists(self._path):
                raise _exists(self._path) from None
            os.rename(self._temporary, self._path)
            return
        os.unlink(self._temporary)

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        self._file.seek(offset)
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[self._file.write(rest) :]

    def _discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> DumpWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()


def _exists(path: Path) -> FileExistsError:
    """The error for an output that is there already."""
    return FileExistsError(f"`{path}`: exists already; overwrite replaces it")
