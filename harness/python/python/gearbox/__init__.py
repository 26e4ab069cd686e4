"""Pipelines for KV caches of large language models.

`encode` and `decode` turn numpy arrays into containers and back, `Cache` holds the keys and values of a request compressed, `Dump` reads
captured caches, `sweep` compares pipelines on them, and `plugins` tells what a pipeline can be made of. The numbers are those of the program `gearbox`: the same code runs.

>>> import numpy, gearbox
>>> keys = numpy.zeros((256, 8, 64), numpy.float16)
>>> stored = gearbox.encode((keys, keys), "planes")
>>> key, value = gearbox.decode(stored)
>>> bool((key == keys).all()), len(stored) < keys.nbytes
(True, True)
"""

from typing import TYPE_CHECKING

from ._gearbox import (
    Cache,
    Dump,
    Entry,
    GearboxError,
    Pipeline,
    __version__,
    decode,
    encode,
    inspect,
    load_plugin,
    plugins,
)
from ._sweep import Results, Rows, results, sweep

if TYPE_CHECKING:
    from .hf import GearboxCache as GearboxCache
    from .hf.capture import capture as capture

__all__ = [
    "Cache",
    "Dump",
    "Entry",
    "GearboxError",
    "Pipeline",
    "Results",
    "Rows",
    "__version__",
    "decode",
    "encode",
    "inspect",
    "load_plugin",
    "plugins",
    "results",
    "sweep",
]


def __getattr__(name: str) -> object:
    # Torch and transformers are imported when they are asked for.
    if name == "capture":
        from .hf.capture import capture

        return capture
    if name == "GearboxCache":
        from .hf import GearboxCache

        return GearboxCache
    raise AttributeError(f"module `{__name__}` has no `{name}`")
