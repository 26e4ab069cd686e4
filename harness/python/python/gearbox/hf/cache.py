"""A key/value cache for ``model.generate`` that holds tokens compressed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from . import facts

PLAIN = (torch.float16, torch.bfloat16, torch.float32)
"""Element types that a cache holds."""


class GearboxCache(Cache):
    """Stands in for ``DynamicCache``: tokens are held as a pipeline stores them, and decoded when attention reads them.

    The newest ``residual`` tokens of a layer stay raw; older ones are encoded, ``chunk`` at a time. Each step decodes a layer, hands it to
    attention, and lets it go, so the raw tensors of one layer are there at a time. With a lossless pipeline a model generates exactly
    what it generates with ``DynamicCache``.

    Every sequence of a batch has a store of its own. Layers with a sliding window read their window only, but hold all tokens.

    Beam search and assisted decoding, which reorder or take back tokens, raise ``NotImplementedError``. Pipelines that evict tokens or
    need token ids are refused with ``gearbox.GearboxError``: a cache of transformers sees neither attention nor ids.

    Args:
        model: the model, or its configuration; of the families in ``gearbox.hf.facts.FAMILIES``.
        pipeline: whatever ``gearbox.Pipeline`` takes: the id of a codec, a dict, JSON text or the path of a file.
        residual: newest tokens of a layer that are never encoded.
        chunk: tokens that are encoded at a time; those of the pipeline's chunking by default, or 128 if that names none.

    Raises:
        ValueError: for a model of another family.
        gearbox.GearboxError: for a pipeline that is not legal here.
    """

    def __init__(
        self, model: PreTrainedModel | Any, pipeline: Any, *, residual: int = 64, chunk: int | None = None
    ) -> None:
        config = model.config if isinstance(model, PreTrainedModel) else model
        self._store = _Store(config, pipeline, residual, chunk)
        # The cache of transformers itself decides which layers slide.
        windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        super().__init__(layers=[_Layer(self._store, index, window) for index, window in enumerate(windows)])

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
            "kv_heads": geometry.kv_heads,
            "head_dim": geometry.head_dim,
            "residual": residual,
            "chunk": chunk,
            "rope": facts.common_rope(facts.ropes(config)),
        }
        self._pipeline = pipeline
        self.clear()
        # So that an illegal pipeline is refused here and not in the middle of a request.
        self._make("float16")

    def _make(self, dtype: str) -> Any:
        from gearbox import Cache as Compressed

        return Compressed(self._pipeline, dtype=dtype, **self._settings)

    def clear(self) -> None:
        self.sequences: list[Any] = []
        self._dtype: torch.dtype | None = None

    def len(self, layer: int) -> int:
        """Tokens of a layer, the same for all sequences."""
        return self.sequences[0].len(layer) if self.sequences else 0

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
        """Tokens that the next ``query_length`` queries may see, these included, and the position of the first of them."""
        seen = self.get_seq_length()
        before = seen if self._window is None else min(seen, self._window - 1)
        return before + query_length, seen - before

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self._store.len(self._index)

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
