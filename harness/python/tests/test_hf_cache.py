"""`GearboxCache` in `model.generate` beside the cache of transformers."""

from __future__ import annotations

import gc
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
gearbox = pytest.importorskip("gearbox")
if not hasattr(gearbox, "Cache"):
    pytest.skip("the compiled part of gearbox is not built: maturin develop", allow_module_level=True)

import torch
from hf_models import FAMILIES, PROMPT, small, tiny
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from gearbox.hf import GearboxCache

PLANES = {"routes": [{"codec": {"id": "planes"}}], "chunking": {"mode": "chunked-grouped", "tokens": 8}}
QUANT = {
    "routes": [{"transforms": [{"id": "quant", "bits": 4}], "codec": {"id": "zstd"}}],
    "chunking": {"mode": "chunked-grouped", "tokens": 8},
}
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def generate(
    model: PreTrainedModel, cache: Cache, ids: torch.Tensor, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `(batch, tokens)` and the logits of each step `(steps, batch, vocabulary)`."""
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    out = model.generate(ids, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences, torch.stack(out.logits)


def assert_same(model: PreTrainedModel, ids: torch.Tensor, **settings: Any) -> GearboxCache:
    """Compares every bit with the stock cache."""
    cache = GearboxCache(model, PLANES, residual=4)
    tokens, logits = generate(model, cache, ids, **settings)
    stock_tokens, stock_logits = generate(model, DynamicCache(config=model.config), ids, **settings)
    assert torch.equal(tokens, stock_tokens)
    assert torch.equal(logits, stock_logits)
    return cache


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_identity_pipeline_generates_what_the_stock_cache_does(dtype: torch.dtype) -> None:
    model = tiny(dtype)
    ids = torch.tensor([list(range(300, 340))])
    cache = assert_same(model, ids)
    ledger = cache.ledger()
    # The last token is not fed back.
    elements = 2 * 6 * 51 * 2 * 64
    assert ledger["original_bytes"] == elements * dtype.itemsize
    [sequence] = ledger["sequences"]
    assert all(layer["bytes"]["payload"] > 0 for layer in sequence["layers"]), "chunks were encoded"


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_pipeline_generates_what_the_stock_cache_does_in_every_family(family: str) -> None:
    assert_same(small(family), torch.tensor([PROMPT]))


@pytest.mark.parametrize("family", ["llama", "gemma3-text"])
def test_sequences_of_a_batch_are_held_apart(family: str) -> None:
    # The second prompt is shorter: it is padded in front, and the padding masked.
    ids = torch.tensor([PROMPT, [0] * 4 + PROMPT[:15]])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache = assert_same(small(family), ids, attention_mask=mask)
    ledgers = cache.ledger()["sequences"]
    assert len(ledgers) == 2
    assert cache.ledger()["stored_bytes"] == sum(ledger["stored_bytes"] for ledger in ledgers)


def test_prompt_in_pieces_is_the_same_as_in_the_stock_cache() -> None:
    model = small("gemma3-text")
    caches = [GearboxCache(model.config, PLANES, residual=2), DynamicCache(config=model.config)]
    for start in range(0, 19, 5):
        piece = torch.tensor([PROMPT[start : start + 5]])
        with torch.no_grad():
            ours, stock = (model(piece, past_key_values=cache).logits for cache in caches)
        assert torch.equal(ours, stock)


def test_lossy_pipeline_saves_bytes_and_changes_logits_a_little() -> None:
    model = tiny(torch.float16)
    ids = torch.tensor([list(range(300, 428))])
    cache = GearboxCache(model, QUANT, residual=16)
    _, lossy = generate(model, cache, ids, max_new_tokens=1, min_new_tokens=1)
    ledger = cache.ledger()
    assert ledger["ratio"] > 2
    _, stock = generate(model, DynamicCache(config=model.config), ids, max_new_tokens=1, min_new_tokens=1)
    # The prompt was read through decode as well.
    assert not torch.equal(lossy, stock)
    similarity = torch.nn.functional.cosine_similarity(lossy[0].float(), stock[0].float())
    assert similarity.item() > 0.95


def tensors() -> int:
    """Bytes of all tensors of torch that are alive, each storage once."""
    alive = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}.values())


def test_raw_tensors_are_gone_after_a_step() -> None:
    model = tiny()
    ids = torch.arange(300, 400)[None]
    raw = 2 * 6 * 100 * 2 * 64 * 4
    held = {}
    gc.collect()
    for name, cache in [
        ("stock", DynamicCache(config=model.config)),
        ("gearbox", GearboxCache(model, PLANES, residual=4)),
    ]:
        before = tensors()
        with torch.no_grad():
            model(ids, past_key_values=cache, logits_to_keep=1)
        held[name] = tensors() - before
    assert held == {"stock": raw, "gearbox": 0}


def test_reset_begins_anew() -> None:
    model = small("llama")
    cache = GearboxCache(model, PLANES, residual=4)
    first = generate(model, cache, torch.tensor([PROMPT]))
    cache.reset()
    assert (cache.get_seq_length(), cache.ledger()["original_bytes"], cache.ledger()["ratio"]) == (0, 0, None)
    second = generate(model, cache, torch.tensor([PROMPT]))
    assert all(torch.equal(one, other) for one, other in zip(first, second))
    cache.reset()
    generate(model, cache, torch.tensor([PROMPT, PROMPT]))


def test_what_it_cannot_do_is_refused() -> None:
    model = small("llama")
    ids = torch.tensor([PROMPT])
    with pytest.raises(NotImplementedError, match="beam search"):
        generate(model, GearboxCache(model, PLANES), ids, num_beams=2)
    cache = GearboxCache(model, PLANES)
    generate(model, cache, ids)
    with pytest.raises(NotImplementedError, match="takes no tokens back"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="layer 0: expected 1 sequences in torch.float32, got 2 in torch.float32"):
        model(torch.tensor([PROMPT, PROMPT]), past_key_values=cache)
    with pytest.raises(gearbox.GearboxError, match="no-such-codec"):
        GearboxCache(model, "no-such-codec")
