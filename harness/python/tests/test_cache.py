"""The compressed cache."""

import threading

import gearbox
import numpy
import pytest
from conftest import bits

SHAPE = {"layers": 2, "kv_heads": 2, "head_dim": 16}


@pytest.mark.parametrize("pipeline", [None, "store", "planes", "gear-delta", {"routes": [{"transforms": [{"id": "token-ref"}], "codec": {"id": "zstd"}}]}])
@pytest.mark.parametrize("dtype", [numpy.float16, numpy.float32, "bfloat16"])
def test_lossless_cache_gives_back_what_was_appended(tensor, pipeline, dtype):
    cache = gearbox.Cache(pipeline, **SHAPE, dtype=dtype, residual=8, chunk=16)
    keys, values = tensor(100, dtype=dtype), tensor(100, dtype=dtype, seed=8)
    cuts = [0, 40, 41, 42, 77, 100]
    for layer in range(2):
        for start, stop in zip(cuts, cuts[1:]):
            cache.append(layer, keys[start:stop], values[start:stop])
            assert cache.len(layer) == stop
            got = cache.read(layer)
            assert [bits(array) for array in got] == [bits(keys[:stop]), bits(values[:stop])]
            assert got[0].shape == (stop, 2, 16)


def test_ledger_counts_every_byte_once(tensor):
    cache = gearbox.Cache("planes", **SHAPE, dtype="float16", residual=8, chunk=64)
    empty = cache.ledger()
    assert (empty["original_bytes"], empty["stored_bytes"], empty["ratio"]) == (0, 0, None)
    key = numpy.zeros((500, 2, 16), numpy.float16)
    cache.append(0, key, key)
    cache.append(1, key[:10], key[:10])
    ledger = cache.ledger()
    assert ledger["original_bytes"] == 2 * 510 * 2 * 16 * 2
    accounts = [sum(layer["bytes"].values()) for layer in ledger["layers"]]
    assert ledger["stored_bytes"] == sum(accounts) + ledger["artifacts"] + ledger["token_ids"]
    assert ledger["ratio"] == pytest.approx(ledger["original_bytes"] / ledger["stored_bytes"]) and ledger["ratio"] > 3
    assert (ledger["layers"][0]["chunks"], ledger["layers"][1]["chunks"]) == (14, 0), "keys and values, 7 chunks of 64"
    cache.reset()
    assert cache.ledger() | {"scratch": 0} == empty | {"scratch": 0}
    assert (cache.len(0), cache.read(0)[0].shape) == (0, (0, 2, 16))


def test_lossy_cache_keeps_the_newest_tokens_as_they_were(tensor):
    route = {"transforms": [{"id": "quant", "bits": 4}], "codec": {"id": "zstd"}}
    pipeline = {"routes": [route], "chunking": {"mode": "chunked", "tokens": 32}}
    cache = gearbox.Cache(pipeline, **SHAPE, dtype="float16", residual=16)
    key = tensor(100)
    cache.append(0, key, key)
    read = cache.read(0)[0]
    assert bits(read[64:]) == bits(key[64:]) and bits(read[:64]) != bits(key[:64])
    assert numpy.abs(read.astype("f4") - key.astype("f4")).max() < 0.5
    assert cache.ledger()["layers"][0]["chunks"] == 4


def test_arguments_that_do_not_fit_are_refused_and_change_nothing(tensor):
    cache = gearbox.Cache("zstd", **SHAPE)
    good = tensor(4)
    cases = [
        ((0, tensor(4, heads=3), good), ValueError, r"key: expected shape \(seq, 2, 16\), got \(4, 3, 16\)"),
        ((0, good, tensor(4, dtype=numpy.float32)), TypeError, "value: expected dtype float16, got float32"),
        ((0, good, tensor(5)), gearbox.GearboxError, r"layer 0, value: expected shape \(4, 2, 16\), got \(5, 2, 16\)"),
        ((2, good, good), gearbox.GearboxError, "expected one of 2 layers, counted from 0, got 2"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            cache.append(*arguments)
    assert cache.len(0) == 0
    for settings, error, message in [
        ({"layers": 0}, gearbox.GearboxError, "`layers`: expected at least 1, got 0"),
        ({"dtype": "int8"}, ValueError, "dtype: expected float16, bfloat16 or float32, got int8"),
        ({"chunk": 0}, gearbox.GearboxError, "`chunk`: expected at least 1 token"),
        ({"q_heads": 3}, gearbox.GearboxError, "`q_heads`: expected a multiple of 2 KV heads, got 3"),
    ]:
        with pytest.raises(error, match=message):
            gearbox.Cache("zstd", **(SHAPE | settings))


def evicting(policy, **settings):
    route = {"evict": {"id": policy, "budget_tokens": 20, "min_tokens": 20, **settings}, "codec": {"id": "planes"}}
    return gearbox.Cache({"routes": [route]}, **SHAPE, q_heads=4, residual=4, chunk=8)


def test_policies_evict_by_the_attention_they_are_shown(tensor):
    key = tensor(50)
    cache = evicting("h2o", sinks=0, recent_tokens=4)
    assert (cache.evicts(0), gearbox.Cache("planes", **SHAPE).evicts(0)) == (True, False)
    cache.append(0, key, key)
    # The heads of the second group look at other tokens than those of the first.
    hit = numpy.zeros((50, 4, 50), numpy.float32)
    hit[:, :2, 5:21] = hit[:, 2:, 10:26] = 1 / 16
    cache.observe(0, hit[:30])
    assert cache.len(0) == 50, "20 queries are missing"
    cache.observe(0, hit[30:])
    assert (cache.len(0), cache.seen(0), cache.seen(1)) == (20, 50, 0)
    recent = list(range(46, 50))
    assert cache.live(0).tolist() == [[*range(5, 21), *recent], [*range(10, 26), *recent]]
    assert cache.live(0).dtype == numpy.uint32
    read = cache.read(0)[0]
    for head, positions in enumerate(cache.live(0)):
        assert bits(read[:, head]) == bits(key[positions, head])
    ledger = cache.ledger()
    assert (ledger["original_bytes"], ledger["layers"][0]["live"]) == (2 * key.nbytes, 20)
    assert ledger["layers"][0]["bytes"]["positions"] == 2 * 20 * 4


def test_attention_has_to_fit(tensor):
    cache, key = evicting("window"), tensor(4)
    cache.append(0, key, key)
    even = numpy.full((4, 4, 4), 0.25, numpy.float32)
    cases = [
        (even.tolist(), TypeError, r"probabilities: expected a numpy array of shape \(queries, q_heads, len\), got list"),
        (even[0], ValueError, r"expected shape \(queries, q_heads, len\), got \(4, 4\)"),
        (even.astype("f8"), TypeError, "expected dtype float32, got float64"),
        (even.transpose(), ValueError, "expected a C-contiguous array"),
        (even[:, :2].copy(), ValueError, r"expected shape \(queries, 4, 4\), got \(4, 2, 4\)"),
        (numpy.concatenate([even, even]), gearbox.GearboxError, "layer 0: expected probabilities of .4 queries at most"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            cache.observe(0, given)
    with pytest.raises(gearbox.GearboxError, match="expected the attention of the last 4 tokens before new ones"):
        cache.append(0, key, key)
    cache.observe(0, even)
    cache.append(0, key, key)
    with pytest.raises(gearbox.GearboxError, match="expected one of 2 layers"):
        cache.live(2)


def test_token_ids_come_with_the_tokens_that_need_them(tensor):
    pipeline = {"routes": [{"transforms": [{"id": "token-ref"}], "codec": {"id": "zstd"}}]}
    cache = gearbox.Cache(pipeline, **SHAPE, tokens=True, residual=0, chunk=8)
    key = tensor(16)
    with pytest.raises(gearbox.GearboxError, match="expected the ids of the tokens, got none"):
        cache.append(0, key, key)
    cache.append(0, key, key, list(range(16)))
    with pytest.raises(gearbox.GearboxError, match="another layer"):
        cache.append(1, key, key, [1] * 16)
    cache.append(1, key, key)
    for layer in range(2):
        assert bits(cache.read(layer)[0]) == bits(key)


def test_threads_may_share_a_cache(tensor):
    cache = gearbox.Cache("planes", layers=4, kv_heads=2, head_dim=16, residual=4, chunk=8)
    key = tensor(4)

    def work(layer):
        for _ in range(25):
            cache.append(layer, key, key)
            cache.read((layer + 1) % 4)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for layer in range(4):
        assert bits(cache.read(layer)[0]) == bits(numpy.concatenate([key] * 25))
