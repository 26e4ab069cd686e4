"""What attention does, as policies look at it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .tap import Call

NUMBERS = 1 << 24
"""Probabilities that are computed at a time: 64 MiB."""
LEAST_QUERIES = 16
"""Queries of a block at least: policies take a block of one query for a step of decoding."""


def expect_fitting(call: Call) -> None:
    """Checks that the mask is made for as many tokens as the layer may see.

    Raises:
        ValueError: if it is not, because layers came to hold different numbers of tokens.
    """
    seq, tokens, mask = call.query.shape[-2], call.key.shape[-2], call.mask
    if mask is None and seq in (1, tokens) or mask is not None and mask.ndim == 4 and mask.shape[-1] == tokens:
        return
    got = "none" if mask is None else f"one of shape {tuple(mask.shape)}"
    raise ValueError(
        f"layer {call.layer}: expected a mask for {seq} queries over {tokens} tokens, got {got};"
        " layers that keep different numbers of tokens cannot share one"
    )


def expect_causal(call: Call) -> None:
    """Checks that each query sees all tokens that the layer holds, apart from the new ones behind it; for a mask that fits.

    Raises:
        ValueError: if the mask says otherwise, because of padding or a window.
    """
    mask = call.mask
    if mask is None:
        return
    visible = mask if mask.dtype == torch.bool else mask == 0
    if not torch.equal(visible, (~_hidden(call, 0, call.query.shape[-2])).expand_as(visible)):
        raise ValueError(
            f"layer {call.layer}: expected attention to all earlier tokens, got a mask that hides some;"
            " tokens cannot be evicted with padding in front or sliding windows"
        )


def probabilities(call: Call, sequence: int) -> Iterator[torch.Tensor]:
    """Softmax probabilities of one sequence of the batch, in blocks of queries: float32 ``(queries, q_heads, tokens)`` each."""
    query, key = call.query[sequence].detach(), call.key[sequence].detach()
    (heads, seq, dim), (kv_heads, tokens, _) = query.shape, key.shape
    columns = key.float().transpose(1, 2)
    count = max(1, min(-(-seq * heads * tokens // NUMBERS), seq // LEAST_QUERIES))
    edges = [seq * block // count for block in range(count + 1)]
    for start, stop in zip(edges, edges[1:]):
        # The query heads of a group share their keys.
        block = query[:, start:stop].float().reshape(kv_heads, -1, dim)
        logits = (block @ columns).view(heads, stop - start, tokens) * call.scale
        if call.softcap is not None:
            logits = (logits / call.softcap).tanh() * call.softcap
        logits.masked_fill_(_hidden(call, start, stop), -torch.inf)
        yield logits.softmax(-1).transpose(0, 1).contiguous()


def _hidden(call: Call, start: int, stop: int) -> torch.Tensor:
    """The tokens behind each of some queries: ``(queries, tokens)``."""
    seq, tokens = call.query.shape[-2], call.key.shape[-2]
    slots = torch.arange(tokens, device=call.query.device)
    return slots > slots[tokens - seq + start : tokens - seq + stop, None]
