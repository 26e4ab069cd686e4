"""Models for the tests of `gearbox.hf`: the bundled one, and a small random one for every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

# The tensors are small; more threads would only wait for each other.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "tests" / "data" / "tiny-llama"
SHARED = ROOT.parent / "shared"

WINDOW = 8
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    # Large, so that attention is far from even.
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA3 = {**SMALL, "sliding_window": WINDOW, "query_pre_attn_scalar": 32, "sliding_window_pattern": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "llama-scaled-linearly": (
        "LlamaConfig",
        {**SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama-3.1": ("LlamaConfig", {**SMALL, "rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaConfig", {**SMALL, "rope_parameters": YARN}),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": WINDOW}),
    "mixtral": ("MixtralConfig", {**SMALL, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", {**SMALL, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen2-moe": ("Qwen2MoeConfig", {**SMALL, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3": ("Qwen3Config", SMALL),
    "qwen3-moe": ("Qwen3MoeConfig", {**SMALL, **EXPERTS}),
    "gemma": ("GemmaConfig", SMALL),
    "gemma2": (
        "Gemma2Config",
        {**SMALL, "sliding_window": WINDOW, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0},
    ),
    "gemma3-text": ("Gemma3TextConfig", GEMMA3),
    "gemma3": ("Gemma3Config", {"text_config": GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 4}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 97,
            "n_embd": 48,
            "n_layer": 4,
            "n_head": 3,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "initializer_range": 0.3,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
}
"""Configuration class and settings of each family."""

PROMPT = [5, 17, 80, 3, 3, 41, 96, 0, 12, 64, 33, 17, 80, 3, 29, 71, 8, 50, 44]
"""Token ids that every one of them knows."""


def small(family: str, **settings: Any) -> PreTrainedModel:
    """A random model of a family (seed 7), in F32."""
    name, base = FAMILIES[family]
    config = getattr(transformers, name)(**base)
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **settings).eval()


def tiny(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The bundled model."""
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype)


def shared(name: str) -> Path:
    """A file of the shared folder; skips the test where there is none."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


@contextmanager
def watched(
    modules: list[nn.Module], pick: Callable[[nn.Module], nn.Module], inputs: bool
) -> Iterator[list[list[torch.Tensor]]]:
    """Collects, by layer and call, what goes into or comes out of a part of each module."""
    seen: list[list[torch.Tensor]] = [[] for _ in modules]
    handles = []
    for calls, module in zip(seen, modules):
        if inputs:
            handles.append(
                pick(module).register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0].clone()))
            )
        else:
            handles.append(
                pick(module).register_forward_hook(lambda _, args, out, calls=calls: calls.append(out.clone()))
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
