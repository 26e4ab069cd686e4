"""What `capture` writes is what attention of each family saw, computed anew from the dump alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hf_models import FAMILIES, PROMPT, WINDOW, small, watched
from safetensors import safe_open

from gearbox.hf import facts
from gearbox.hf.capture import capture

ROTATED = [family for family in FAMILIES if family not in ("gpt2", "llama-yarn")]
SLIDING = ["mistral", "qwen2", "gemma2", "gemma3-text", "gemma3"]


class Dump:
    """A dump and its strings."""

    def __init__(self, path: str | Path) -> None:
        with safe_open(path, framework="np") as file:
            self.strings = file.metadata()
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}

    def part(self, layer: int, part: str) -> np.ndarray:
        """`(seq, heads, dim)` in F64."""
        return self.tensors[f"layers.{layer}.{part}"].astype(np.float64)

    def json(self, name: str) -> Any:
        return json.loads(self.strings[name])


def attend(dump: Dump, layer: int, window: int | None) -> np.ndarray:
    """Attention of a layer in F64, `(seq, q_heads, dim)`."""
    query, key, value = (dump.part(layer, part) for part in ("query", "key", "value"))
    how = dump.json("attention")[layer]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat(group, axis=1), value.repeat(group, axis=1)
    logits = np.einsum("qhd,khd->hqk", query, key) * how["scale"]
    if how["softcap"] is not None:
        logits = np.tanh(logits / how["softcap"]) * how["softcap"]
    at = np.arange(len(query))
    distance = at[:, None] - at[None, :]
    logits[:, (distance < 0) | (distance >= (window or len(query)))] = -np.inf
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, value)


def output_projection(module: torch.nn.Module) -> torch.nn.Module:
    return module.o_proj if hasattr(module, "o_proj") else module.c_proj


def rotation_input(module: torch.nn.Module) -> torch.nn.Module:
    return module.k_norm if hasattr(module, "k_norm") else module.k_proj


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_the_dump_is_that_of_the_model(family: str, tmp_path: Path) -> None:
    model = small(family)
    geometry = facts.geometry(model.config)
    modules = facts.attention_modules(model, geometry.layers)
    with watched(modules, output_projection, inputs=True) as seen:
        capture(model, {"run": PROMPT}, tmp_path, decode_tokens=5, dtype="f32", block=7)
    dump = Dump(tmp_path / "run.safetensors")
    assert dump.json("entries") == [[0, 19, "prefill"], *([at, 1, "decode"] for at in range(19, 24))]
    assert dump.tensors["tokens"].tolist()[:19] == PROMPT
    for layer, calls in enumerate(seen):
        used = torch.cat(calls, dim=1)[0].reshape(24, geometry.q_heads, geometry.head_dim).numpy()
        window = dump.json("attention")[layer]["window"]
        # F32 has 24 bits; logits of up to about 100 turn their rounding into about 1e-5 of the largest value.
        bound = 3e-5 * np.abs(dump.part(layer, "value")).max()
        assert np.abs(attend(dump, layer, window) - used).max() < bound, f"layer {layer}"
        if window is not None:
            assert np.abs(attend(dump, layer, None) - used).max() > 100 * bound, f"layer {layer} has no window"


@pytest.mark.parametrize("family", SLIDING)
def test_windows_are_named(family: str, tmp_path: Path) -> None:
    capture(small(family), {"run": PROMPT}, tmp_path, decode_tokens=0)
    windows = [how["window"] for how in Dump(tmp_path / "run.safetensors").json("attention")]
    assert WINDOW in windows and set(windows) <= {WINDOW, None}


def frequencies(rope: dict[str, Any]) -> np.ndarray:
    """Radians per token of each pair, as the glossary of dumps defines them."""
    half = rope["rotary_dim"] // 2
    plain = rope["theta"] ** -(np.arange(half) / half)
    scaling = rope["scaling"]
    if scaling["kind"] == "linear":
        return plain / scaling["factor"]
    if scaling["kind"] == "llama3":
        turns = scaling["original_context"] * plain / (2 * np.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clip(0, 1)
        return plain * (kept + (1 - kept) / scaling["factor"])
    assert scaling == {"kind": "none"}
    return plain


def rotate(keys: np.ndarray, rope: dict[str, Any]) -> np.ndarray:
    """Rotates `(seq, heads, dim)` by position."""
    assert (rope["pairing"], rope["rotary_dim"]) == ("half-split", keys.shape[2])
    angles = np.arange(len(keys))[:, None, None] * frequencies(rope)
    first, second = np.split(keys, 2, axis=2)
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], axis=2
    )


@pytest.mark.parametrize("family", ROTATED)
def test_rotation_of_the_dump_makes_its_keys(family: str, tmp_path: Path) -> None:
    model = small(family)
    geometry = facts.geometry(model.config)
    with watched(facts.attention_modules(model, geometry.layers), rotation_input, inputs=False) as seen:
        capture(model, {"run": PROMPT}, tmp_path, decode_tokens=3, dtype="f32")
    dump = Dump(tmp_path / "run.safetensors")
    ropes = dump.json("rope_layers") if "rope_layers" in dump.strings else [dump.json("rope")] * geometry.layers
    for layer, calls in enumerate(seen):
        # A norm may stand before or behind the exchange of tokens and heads.
        states = [
            call[0].transpose(0, 1) if call.dim() == 4 and call.shape[1] == geometry.kv_heads else call[0]
            for call in calls
        ]
        before = torch.cat([rows.reshape(-1, geometry.kv_heads, geometry.head_dim) for rows in states]).double().numpy()
        keys = dump.part(layer, "key")
        assert np.abs(rotate(before, ropes[layer]) - keys).max() < 1e-5 * np.abs(keys).max(), f"layer {layer}"


def test_layers_that_rotate_differently_are_named_one_by_one(tmp_path: Path) -> None:
    capture(small("gemma3-text"), {"run": PROMPT}, tmp_path, decode_tokens=0)
    dump = Dump(tmp_path / "run.safetensors")
    thetas = [(rope["theta"], how["window"]) for rope, how in zip(dump.json("rope_layers"), dump.json("attention"))]
    assert "rope" not in dump.strings
    assert thetas == [(1e4, WINDOW), (1e6, None)] * 2


def test_rotation_that_dumps_cannot_name_is_quoted(tmp_path: Path) -> None:
    capture(small("llama-yarn"), {"run": PROMPT}, tmp_path, decode_tokens=0)
    dump = Dump(tmp_path / "run.safetensors")
    assert "rope" not in dump.strings
    assert [rope["rope_type"] for rope in dump.json("rope_layers")] == ["yarn"] * 4


def test_model_without_rotation_names_none(tmp_path: Path) -> None:
    capture(small("gpt2"), {"run": PROMPT}, tmp_path, decode_tokens=0)
    assert not {"rope", "rope_layers"} & set(Dump(tmp_path / "run.safetensors").strings)


def test_other_families_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="model type: expected one of gemma, .*, got `gpt_neox`"):
        capture(AutoModelForCausalLM.from_config(config), {"run": PROMPT}, tmp_path)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_attention_function_is_seen(attention: str, tmp_path: Path) -> None:
    capture(small("llama", attn_implementation=attention), {"run": PROMPT}, tmp_path, decode_tokens=2, dtype="f32")
    capture(small("llama"), {"default": PROMPT}, tmp_path, decode_tokens=2, dtype="f32")
    one, other = Dump(tmp_path / "run.safetensors"), Dump(tmp_path / "default.safetensors")
    for name, tensor in one.tensors.items():
        np.testing.assert_allclose(tensor, other.tensors[name], rtol=0, atol=1e-4, err_msg=name)
