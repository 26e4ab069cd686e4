"""Sees what attention sees, while a transformers model computes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, Protocol

import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Sink(Protocol):
    """Takes the next tokens of a layer."""

    def __call__(self, layer: int, part: str, rows: torch.Tensor) -> None:
        """``part`` is ``key``, ``value`` or ``query``; ``rows`` is ``(seq, heads, dim)``, and only lent for the call."""


def rows(states: torch.Tensor) -> torch.Tensor:
    """Tokens of a request: ``(1, heads, seq, dim)`` as transformers has it, ``(seq, heads, dim)`` as a dump has it; a view."""
    return states[0].transpose(0, 1)


class TappedCache(DynamicCache):
    """A ``DynamicCache`` that shows the keys, after RoPE, and values which it is given."""

    def __init__(self, config: Any, sink: Sink) -> None:
        super().__init__(config=config)
        self._sink = sink

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes new tokens, ``(1, kv_heads, seq, dim)`` each; gives all tokens that the layer may see."""
        self._sink(layer_idx, "key", rows(key_states))
        self._sink(layer_idx, "value", rows(value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@dataclass(frozen=True)
class Call:
    """What the attention function of a layer is called with; tensors are only lent for the call."""

    layer: int
    query: torch.Tensor
    """After RoPE, ``(batch, q_heads, seq, dim)``."""
    key: torch.Tensor
    """Of all tokens that the layer may see, ``(batch, kv_heads, tokens, dim)``."""
    mask: torch.Tensor | None
    """As transformers made it: true or 0 where a query sees a token, and none where the function knows by itself."""
    scale: float
    softcap: float | None


# The table of attention functions belongs to the process: one change at a time.
_table = RLock()


@contextmanager
def tapped_attention(name: str, modules: Sequence[nn.Module], sees: Callable[[Call], None]) -> Iterator[None]:
    """Shows what ``modules``, one per layer, call the attention function ``name`` (``sdpa``, ``eager``, …) with.

    The function that is there stays the one that computes; other models pass through. The table of transformers is as it was afterwards.
    """
    layers = {id(module): layer for layer, module in enumerate(modules)}
    with _table:
        base = ALL_ATTENTION_FUNCTIONS.get(name)

        def attend(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            **settings: Any,
        ) -> Any:
            layer = layers.get(id(module))
            if layer is not None:
                scale = settings.get("scaling") or module.scaling
                sees(Call(layer, query, key, attention_mask, scale, settings.get("softcap")))
            function = base
            if function is None:
                # `eager` is not in the table: every family has its own, next to its module.
                function = sys.modules[type(module).__module__].eager_attention_forward
            return function(module, query, key, value, attention_mask, **settings)

        ALL_ATTENTION_FUNCTIONS[name] = attend
        try:
            yield
        finally:
            # Ours lies over the one of the library; one that somebody else had laid there went with it.
            del ALL_ATTENTION_FUNCTIONS[name]
            if base is not None and ALL_ATTENTION_FUNCTIONS.get(name) is not base:
                ALL_ATTENTION_FUNCTIONS[name] = base
