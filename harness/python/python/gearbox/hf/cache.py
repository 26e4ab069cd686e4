"""A key/value cache for ``model.generate`` that holds tokens compressed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from . import facts
from .attention import expect_causal, expect_fitting, probabilities
from .tap import Call, tapped_attention

PLAIN = (torch.float16, torch.bfloat16, torch.float32)
"""Element types that a cache holds."""


class GearboxCache(Cache):
    """Stands in for ``DynamicCache``: tokens are held as a pipeline stores them, and decoded when attention reads them.

    The newest ``residual`` tokens of a layer stay raw; older ones are encoded, ``chunk`` at a time. Each step decodes a layer, hands it to
    attention, and lets it go, so the raw tensors of one layer are there at a time. With a lossless pipeline a model generates exactly
    what it generates with ``DynamicCache``.

    Every sequence of a batch has a store of its own. Layers with a sliding window read their window only, but hold all tokens.

    A policy of the pipeline sees attention inside of ``attending``, and nowhere else::

        cache = GearboxCache(model, pipeline)
        with cache.attending(model):
            model.generate(**inputs, past_key_values=cache)

    Beam search and assisted decoding, which reorder or take back tokens, raise ``NotImplementedError``. Pipelines that need token ids are
    refused with ``gearbox.GearboxError``: a cache of transformers does not see them.

    Args:
        model: the model, or its configuration; of the families in ``gearbox.hf.facts.FAMILIES``.
        pipeline: whatever ``gearbox.Pipeline`` takes: the id of a codec, a dict, JSON text or the path of a file.
        residual: newest tokens of a layer that are never encoded.
        chunk: tokens that are encoded at a time; those of the pipeline's chunking by default, or 128 if that names none.

    Raises:
        ValueError: for a model of another family, and for a policy in a layer with a sliding window.
        gearbox.GearboxError: for a pipeline that is not legal here.
    """

    def __init__(
        self, model: PreTrainedModel | Any, pipeline: Any, *, residual: int = 64, chunk: int | None = None
    ) -> None:
        config = model.config if isinstance(model, PreTrainedModel) else model
        self._store = _Store(config, pipeline, residual, chunk)
        # The cache of transformers itself decides which layers slide.
        windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        for index, window in enumerate(windows):
            if window is not None and self._store.evicts(index):
                raise ValueError(
                    f"layer {index}: expected a layer without a window to evict tokens from, got a window of {window} tokens"
                )
        super().__init__(layers=[_Layer(self._store, index, window) for index, window in enumerate(windows)])

    @contextmanager
    def attending(self, model: PreTrainedModel) -> Iterator[GearboxCache]:
        """Shows the policy of the pipeline what attention of ``model`` does, so that it can evict tokens after each step.

        Probabilities are computed a second time from queries and keys, in blocks of queries, so that any attention function may be in use.
        The positions of new tokens go on as if nothing were evicted. After an error in here the cache is of no more use until ``reset``.

        Raises:
            ValueError: for a model with another number of layers. In a step: for batches with padding in front, and where layers or
                sequences come to hold different numbers of tokens and a mask has to fit them all.
        """
        modules = facts.attention_modules(model, len(self.layers))
        function = facts.text_config(model.config)._attn_implementation
        with tapped_attention(function, modules, self._store.observe), self._store.attended():
            yield self

    def live(self, layer: int) -> list[np.ndarray]:
        """Positions of the tokens that a layer holds, by sequence: ``(rows, tokens)`` each, with one row if all heads hold the same,
        else one per KV head.
        """
        return [held.live(layer) for held in self._store.sequences]

    def ledger(self) -> dict[str, Any]:
        """Every byte that is held: ``original_bytes``, ``stored_bytes``, ``ratio`` of the two (None while there are no tokens), and
        ``sequences``, the ledger of ``gearbox.Cache`` for each sequence of the batch.
        """
        sequences = [held.ledger() for held in self._store.sequences]
        original, stored = (sum(ledger[name] for ledger in sequences) for name in ("original_bytes", "stored_bytes"))
        ratio = original / stored if original else None
        return {"original_bytes": original, "stored_bytes": stored, "ratio": ratio, "sequences": sequences}

    def reset(self) -> None:
        """Forgets all tokens; the next batch may have another size and element type."""
        self._store.clear()


class _Store:
    """One compressed cache per sequence, made when the first tokens say how many there are and of which type."""

    def __init__(self, config: Any, pipeline: Any, residual: int, chunk: int | None) -> None:
        geometry = facts.geometry(config)
        self._settings = {
            "layers": geometry.layers,
            "q_heads": geometry.q_heads,
            "kv_heads": geometry.kv_heads,
            "head_dim": geometry.head_dim,
            "residual": residual,
            "chunk": chunk,
            "rope": facts.common_rope(facts.ropes(config)),
        }
        self._pipeline = pipeline
        self._attended = 0
        self.clear()
        # So that an illegal pipeline is refused here and not in the middle of a request.
        empty = self._make("float16")
        self._evicts = [empty.evicts(layer) for layer in range(geometry.layers)]

    def _make(self, dtype: str) -> Any:
        from gearbox import Cache as Compressed

        return Compressed(self._pipeline, dtype=dtype, **self._settings)

    def clear(self) -> None:
        self.sequences: list[Any] = []
        self._dtype: torch.dtype | None = None
        self._due: set[int] = set()

    def evicts(self, layer: int) -> bool:
        """Whether a policy decides which tokens of a layer stay."""
        return self._evicts[layer]

    def len(self, layer: int) -> int:
        """Tokens that a layer holds, the same for all sequences."""
        return self.sequences[0].len(layer) if self.sequences else 0

    def seen(self, layer: int) -> int:
        """Tokens that a layer has seen, evicted ones included."""
        return self.sequences[0].seen(layer) if self.sequences else 0

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Attention is shown by ``observe`` in here."""
        self._attended += 1
        try:
            yield
        finally:
            self._attended -= 1

    def observe(self, call: Call) -> None:
        """Takes in what attention does with the tokens that were appended last, after which policies evict."""
        layer = call.layer
        # Another cache may be in use with the same model.
        if layer not in self._due:
            return
        expect_fitting(call)
        if not self._evicts[layer]:
            self._due.remove(layer)
            return
        expect_causal(call)
        for sequence, held in enumerate(self.sequences):
            for block in probabilities(call, sequence):
                held.observe(layer, block.cpu().numpy())
        self._due.remove(layer)
        kept = [held.len(layer) for held in self.sequences]
        if len(set(kept)) > 1:
            raise ValueError(f"layer {layer}: expected all sequences to keep as many tokens, got {kept}")

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Takes the next tokens, ``(batch, kv_heads, seq, head_dim)`` each."""
        batch, dtype = key.shape[0], key.dtype
        if not self.sequences:
            if dtype not in PLAIN or value.dtype != dtype:
                names = ", ".join(str(kind) for kind in PLAIN)
                raise ValueError(
                    f"layer {layer}: expected keys and values of one type of {names}, got {dtype} and {value.dtype}"
                )
            self._dtype = dtype
            self.sequences = [self._make(str(dtype).removeprefix("torch.")) for _ in range(batch)]
        if (batch, dtype) != (len(self.sequences), self._dtype):
            expected = f"{len(self.sequences)} sequences in {self._dtype}"
            raise ValueError(f"layer {layer}: expected {expected}, got {batch} in {dtype}; `reset` begins anew")
        if self._attended:
            self._due.add(layer)
        elif self._evicts[layer]:
            raise RuntimeError(
                f"layer {layer}: the pipeline evicts tokens, which takes attention: expected `with cache.attending(model):` around"
            )
        for held, *new in zip(self.sequences, key, value):
            held.append(layer, *(_to_numpy(states) for states in new))

    def read(self, layer: int, newest: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes the newest tokens of a layer: keys and values, ``(batch, kv_heads, newest, head_dim)`` each."""
        decoded = [held.read(layer) for held in self.sequences]
        key, value = (torch.stack([self._to_torch(array[-newest:]) for array in role]) for role in zip(*decoded))
        return key.to(device), value.to(device)

    def _to_torch(self, array: np.ndarray) -> torch.Tensor:
        """``(seq, kv_heads, head_dim)`` as a view of shape ``(kv_heads, seq, head_dim)``."""
        if self._dtype == torch.bfloat16:
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        return tensor.transpose(0, 1)


def _to_numpy(states: torch.Tensor) -> np.ndarray:
    """``(kv_heads, seq, head_dim)`` as an array of shape ``(seq, kv_heads, head_dim)``, bfloat16 as its bits."""
    rows = states.detach().transpose(0, 1).contiguous().cpu()
    return rows.view(torch.int16).numpy().view(np.uint16) if rows.dtype == torch.bfloat16 else rows.numpy()


class _Layer(CacheLayerMixin):
    """One layer of a ``GearboxCache``; the tokens are in the store."""

    supports_early_init = False

    def __init__(self, store: _Store, index: int, window: int | None) -> None:
        super().__init__()
        self._store, self._index, self._window = store, index, window
        self.is_sliding = window is not None
        if window is not None:
            self.sliding_window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the store makes itself with the first tokens."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes new tokens, ``(batch, kv_heads, seq, head_dim)`` each; gives those that attention may see, decoded."""
        length, _ = self.get_mask_sizes(key_states.shape[-2])
        self._store.append(self._index, key_states, value_states)
        return self._store.read(self._index, length, key_states.device)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that the next ``query_length`` queries may see, these included, and the position of the first of them.

        Tokens that a policy left count as the last ones in front of the queries, which all of them see.
        """
        seen, before = self.get_seq_length(), self._store.len(self._index)
        if self._window is not None:
            before = min(before, self._window - 1)
        return before + query_length, seen - before

    def get_seq_length(self) -> int:
        """Tokens so far, evicted ones included: the position of the next one."""
        return self._store.seen(self._index)

    def get_max_length(self) -> int:
        """The window, or -1 for no limit."""
        return -1 if self._window is None else self._window

    def offload(self) -> None:
        """Nothing: what is held lies in main memory anyway."""

    def prefetch(self) -> None:
        """Nothing; see ``offload``."""

    def reset(self) -> None:
        """Refused: layers forget together."""
        raise NotImplementedError("one layer cannot forget its tokens; `GearboxCache.reset` forgets those of all")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refused, except that it changes nothing."""
        self._keep(beam_idx, "beam search")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused, except that it changes nothing."""
        self._keep(indices, "selecting sequences")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused, except that it changes nothing."""
        if repeats != 1:
            raise NotImplementedError(f"`GearboxCache` cannot repeat sequences, expected 1 of each, got {repeats}")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, except that it changes nothing."""
        if tokens_to_remove:
            raise NotImplementedError("`GearboxCache` takes no tokens back, as assisted decoding needs it")

    def _keep(self, order: torch.Tensor, what: str) -> None:
        if order.tolist() != list(range(len(self._store.sequences))):
            raise NotImplementedError(f"`GearboxCache` cannot reorder sequences, as {what} needs it")
