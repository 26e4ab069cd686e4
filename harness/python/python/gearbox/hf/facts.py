"""What a dump says of its model: geometry, rotation and attention, read from a transformers configuration and its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel

FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt2",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
"""Model types that are supported. All of them rotate the pairs ``(i, i + rotary_dim / 2)``, or do not rotate (GPT-2)."""


@dataclass(frozen=True)
class Geometry:
    """Extents of a decoder."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    context: int
    """Tokens of the longest context."""

    def heads(self, part: str) -> int:
        """Heads of ``key``, ``value`` or ``query``."""
        return self.q_heads if part == "query" else self.kv_heads


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the decoder of text."""
    return config.get_text_config(decoder=True)


def geometry(config: Any) -> Geometry:
    """Reads the extents from a configuration.

    Raises:
        ValueError: for a model type that is not in ``FAMILIES``.
    """
    config = text_config(config)
    if config.model_type not in FAMILIES:
        raise ValueError(f"model type: expected one of {', '.join(FAMILIES)}, got `{config.model_type}`")
    q_heads = config.num_attention_heads
    return Geometry(
        layers=config.num_hidden_layers,
        q_heads=q_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or q_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // q_heads,
        context=config.max_position_embeddings,
    )


def attention_modules(model: PreTrainedModel, layers: int) -> list[nn.Module]:
    """The modules that attend, by layer.

    Raises:
        ValueError: if there is not exactly one per layer.
    """
    wanted = ("layer_idx", "scaling", "is_causal")
    found: list[Any] = [module for module in model.modules() if all(hasattr(module, name) for name in wanted)]
    found.sort(key=lambda module: module.layer_idx)
    indices = [module.layer_idx for module in found]
    if indices != list(range(layers)):
        raise ValueError(
            f"attention: expected one module for each of {layers} layers, got those of the layers {indices}"
        )
    return found


def attention_facts(modules: Sequence[nn.Module], config: Any) -> list[dict[str, Any]]:
    """How each layer makes weights of its logits: ``scale``, ``softcap`` (or None) and ``window`` in tokens (or None).

    A query sees itself and the ``window - 1`` tokens in front of it.
    """
    # The cache of transformers itself decides which layers slide.
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return [
        {"scale": module.scaling, "softcap": getattr(module, "attn_logit_softcapping", None), "window": window}
        for module, window in zip(modules, windows)
    ]


def ropes(config: Any) -> list[dict[str, Any] | None]:
    """How each layer rotates keys and queries; None where it does not.

    A rotation is in the terms of a dump (``pairing``, ``theta``, ``rotary_dim``, ``scaling``). One that those terms cannot express, such
    as YaRN, is what the configuration says of it.
    """
    config = text_config(config)
    layers, head_dim = config.num_hidden_layers, geometry(config).head_dim
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return [None] * layers
    if "rope_type" in parameters:
        return [_rope(parameters, head_dim)] * layers
    return [_rope(parameters[kind], head_dim) if parameters.get(kind) else None for kind in config.layer_types]


def common_rope(ropes: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The rotation of all layers, if they share one that the terms of a dump can express."""
    first = ropes[0]
    return first if first is not None and "pairing" in first and all(rope == first for rope in ropes) else None


def _rope(parameters: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    kind = parameters["rope_type"]
    partial = parameters.get("partial_rotary_factor") or 1.0
    if kind == "default":
        scaling: dict[str, Any] = {"kind": "none"}
    elif kind == "linear":
        scaling = {"kind": "linear", "factor": float(parameters["factor"])}
    elif kind == "llama3":
        scaling = {
            "kind": "llama3",
            "factor": float(parameters["factor"]),
            "low_freq_factor": float(parameters["low_freq_factor"]),
            "high_freq_factor": float(parameters["high_freq_factor"]),
            "original_context": int(parameters["original_max_position_embeddings"]),
        }
    else:
        return dict(parameters)
    if partial != 1.0:
        return dict(parameters)
    theta = float(parameters["rope_theta"])
    return {"pairing": "half-split", "theta": theta, "rotary_dim": head_dim, "scaling": scaling}
