"""Policies in `model.generate`, through `GearboxCache.attending`."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
gearbox = pytest.importorskip("gearbox")
if not hasattr(gearbox, "Cache"):
    pytest.skip("the compiled part of gearbox is not built: maturin develop", allow_module_level=True)

import numpy
import torch
from hf_models import PROMPT, small, tiny
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gearbox.hf import GearboxCache
from gearbox.hf import attention as blocks

IDS = torch.tensor([list(range(300, 340))])


def evicting(policy: str, budget: int = 16, **settings: Any) -> dict[str, Any]:
    evict = {"id": policy, "budget_tokens": budget, "min_tokens": budget, "sinks": 2, **settings}
    chunking = {"mode": "chunked-grouped", "tokens": 8}
    return {"routes": [{"evict": evict, "codec": {"id": "planes"}}], "chunking": chunking}


def generate(
    model: PreTrainedModel, cache: Any, ids: torch.Tensor = IDS, steps: int = 12, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `(batch, tokens)` and the logits of each step `(steps, batch, vocabulary)`."""
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, **settings}
    settings |= {"max_new_tokens": steps, "min_new_tokens": steps}
    out = model.generate(ids, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences, torch.stack(out.logits)


def evicted(model: PreTrainedModel, pipeline: Any, ids: torch.Tensor = IDS, **settings: Any) -> tuple[Any, ...]:
    """The cache, ids and logits of a request in which a policy evicts."""
    cache = GearboxCache(model, pipeline, residual=4)
    with cache.attending(model):
        return cache, *generate(model, cache, ids, **settings)


def assert_near(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for roundings of F32, which grow with the greatest logit."""
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "tova", "window", "random"])
def test_a_budget_above_the_length_is_the_stock_cache(policy: str) -> None:
    model = tiny()
    cache, tokens, logits = evicted(model, evicting(policy, budget=100))
    stock_tokens, stock_logits = generate(model, DynamicCache(config=model.config))
    assert torch.equal(tokens, stock_tokens) and torch.equal(logits, stock_logits)
    assert all((cache.live(layer)[0] == numpy.arange(51)).all() for layer in range(6))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["tiny", "qwen3", "gpt2"])
def test_window_is_dense_attention_with_its_mask(family: str, attention: str) -> None:
    model = tiny() if family == "tiny" else small(family)
    model.set_attn_implementation(attention)
    ids = IDS if family == "tiny" else torch.tensor([PROMPT + PROMPT])
    cache, tokens, logits = evicted(model, evicting("window"), ids)
    prompt, total = ids.shape[1], tokens.shape[1] - 1
    query, key = torch.arange(total)[:, None], torch.arange(total)
    # A prompt sees itself. Behind it a token sees the 2 sinks, the 14 tokens that were left of those in front of it, and itself.
    kept = (query < prompt) | (key < 2) | (key >= query - 14)
    mask = torch.where((key <= query) & kept, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        dense = model(tokens[:, :-1], attention_mask=mask[None, None], use_cache=False).logits
    assert_near(logits[:, 0], dense[0, prompt - 1 :])
    stays = [0, 1, *range(total - 14, total)]
    assert all(cache.live(layer)[0].tolist() == [stays] for layer in range(len(cache.layers)))


@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
def test_policies_see_the_attention_that_the_model_computes(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of 20 queries.
    monkeypatch.setattr(blocks, "NUMBERS", 20 * 40 * 3)
    model, pipeline = tiny(), evicting(policy)
    cache = GearboxCache(model, pipeline, residual=4)
    with cache.attending(model), torch.no_grad():
        model(IDS, past_key_values=cache)
    model.set_attn_implementation("eager")
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        shown = model(IDS, past_key_values=stock, output_attentions=True).attentions
    heads = {"q_heads": model.config.num_attention_heads, "kv_heads": 2, "head_dim": 64}
    held = gearbox.Cache(pipeline, layers=6, dtype="float32", residual=4, **heads)
    for layer, weights in enumerate(shown):
        states = stock.layers[layer].keys, stock.layers[layer].values
        held.append(layer, *(tensor[0].transpose(0, 1).contiguous().numpy() for tensor in states))
        held.observe(layer, weights[0].transpose(0, 1).contiguous().numpy())
        assert cache.live(layer)[0].tolist() == held.live(layer).tolist()
        assert held.len(layer) == 16


def test_probabilities_are_those_of_eager_attention() -> None:
    model = small("gemma2", attn_implementation="eager")
    ids = torch.tensor([PROMPT[:7]])
    from gearbox.hf import facts
    from gearbox.hf.tap import tapped_attention

    seen: dict[int, torch.Tensor] = {}

    def see(call: Any) -> None:
        blocks.expect_fitting(call)
        blocks.expect_causal(call)
        seen[call.layer] = torch.cat(list(blocks.probabilities(call, 0)))

    with torch.no_grad(), tapped_attention("eager", facts.attention_modules(model, 4), see):
        shown = model(ids, output_attentions=True).attentions
    for layer, weights in enumerate(shown):
        torch.testing.assert_close(seen[layer], weights[0].transpose(0, 1), atol=1e-6, rtol=1e-5)


def test_what_is_held_is_counted() -> None:
    model = tiny(torch.float16)
    cache, tokens, _ = evicted(model, evicting("h2o", margin_tokens=4), steps=30)
    assert tokens.shape == (1, 70)
    # The last token is not fed back.
    assert cache.get_seq_length() == 69
    ledger = cache.ledger()
    assert ledger["original_bytes"] == 2 * 6 * 69 * 2 * 64 * 2
    assert ledger["ratio"] > 2
    for layer in ledger["sequences"][0]["layers"]:
        rows, live = cache.live(layer["layer"])[0].shape
        assert (layer["seen"], layer["live"], layer["bytes"]["positions"]) == (69, live, 4 * rows * live)
        assert 12 <= live <= 16


def test_prompts_may_follow_what_was_evicted() -> None:
    model = tiny()
    cache = GearboxCache(model, evicting("window"), residual=4)
    pieces = [IDS[:, :30], IDS[:, 30:37]]
    with cache.attending(model), torch.no_grad():
        first, second = (model(piece, past_key_values=cache).logits for piece in pieces)
        query, key = torch.arange(37)[:, None], torch.arange(37)
        kept = (query < 30) | (key < 2) | (key >= 16)
        mask = torch.where((key <= query) & kept, 0.0, torch.finfo(torch.float32).min)
        dense = model(IDS[:, :37], attention_mask=mask[None, None], use_cache=False).logits
    assert_near(torch.cat([first, second], 1), dense)


def test_sequences_of_a_batch_have_policies_of_their_own() -> None:
    model = tiny()
    ids = torch.cat([IDS, IDS.flip(1)])
    cache, tokens, _ = evicted(model, evicting("h2o"), ids)
    alone = [evicted(model, evicting("h2o"), one[None]) for one in ids]
    for sequence, (held, sequence_tokens, _) in enumerate(alone):
        assert torch.equal(tokens[sequence], sequence_tokens[0])
        for layer in range(6):
            assert (cache.live(layer)[sequence] == held.live(layer)[0]).all()


def test_layers_may_keep_different_numbers_while_no_mask_is_needed() -> None:
    model, pipeline = tiny(), evicting("window")
    pipeline["routes"] = [{"layers": "0..3", **pipeline["routes"][0]}, {"layers": "3..", "codec": {"id": "planes"}}]
    cache = GearboxCache(model, pipeline, residual=4)
    with cache.attending(model):
        generate(model, cache)
        assert [cache.live(layer)[0].shape[1] for layer in range(6)] == [16] * 3 + [51] * 3
        with pytest.raises(ValueError, match="cannot share one"), torch.no_grad():
            model(IDS, past_key_values=cache)


def test_what_cannot_be_evicted_is_refused() -> None:
    model = tiny()
    cache = GearboxCache(model, evicting("h2o"))
    with pytest.raises(RuntimeError, match=r"layer 0: the pipeline evicts tokens, .* `with cache.attending\(model\):`"):
        generate(model, cache)
    cache.reset()
    padded = torch.cat([torch.tensor([[0, 0]]), IDS], 1)
    mask = (padded > 0).long()
    with cache.attending(model), pytest.raises(ValueError, match="layer 0: .* padding in front"):
        generate(model, cache, padded, attention_mask=mask)
    cache.reset()
    with cache.attending(model):
        generate(model, cache, steps=2)
    with pytest.raises(
        ValueError, match="layer 1: expected a layer without a window .* got a window of 8 tokens|layer 0: expected"
    ):
        GearboxCache(small("gemma2"), evicting("h2o"))
    with pytest.raises(gearbox.GearboxError):
        GearboxCache(model, evicting("h2o", budget=2, recent_tokens=4))


def test_the_table_of_attention_functions_is_left_as_it_was() -> None:
    model = tiny()
    before = dict(ALL_ATTENTION_FUNCTIONS)
    cache, other = GearboxCache(model, evicting("window")), DynamicCache(config=model.config)
    with cache.attending(model):
        # Another cache of the same model is not touched.
        generate(model, other, steps=2)
        # Without a policy nothing changes.
        plain = GearboxCache(model, "planes", residual=4)
        with plain.attending(model):
            assert torch.equal(
                generate(model, plain, steps=2)[1], generate(model, DynamicCache(config=model.config), steps=2)[1]
            )
    assert cache.get_seq_length() == 0 and dict(ALL_ATTENTION_FUNCTIONS) == before
