"""Gearbox and Hugging Face transformers: dumps of real models, and a compressed cache for ``model.generate``.

``gearbox.hf.capture.capture`` writes what attention of a causal language model sees to dumps, ``GearboxCache`` stands in for
``DynamicCache``. Both need the packages ``torch`` and ``transformers``, which are loaded with the first use of a name.

Raises:
    ModuleNotFoundError: if one of the two is not installed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import GearboxCache
    from .capture import Captured, Prompt

__all__ = ["Captured", "GearboxCache", "Prompt"]

for _package in ("torch", "transformers"):
    if find_spec(_package) is None:
        raise ModuleNotFoundError(
            f"gearbox.hf needs the package `{_package}`: pip install 'gearbox[hf]'", name=_package
        )

_HOMES = {"Captured": ".capture", "GearboxCache": ".cache", "Prompt": ".capture"}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module `{__name__}` has no `{name}`")
    return getattr(import_module(home, __name__), name)
