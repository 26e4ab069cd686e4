"""`capture` and `gearbox-capture`: their dumps beside those of `gearbox model capture`, what they refuse, and what they leave."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hf_models import PROMPT, TINY, shared, small, tiny
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gearbox.hf.capture import Prompt, capture, main

TEXT = "It was a dark and stormy night, and Sherlock Holmes sat in his chair by the fire. " * 5
TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", TYPES)
def test_dump_equals_that_of_gearbox_within_rounding(
    model: PreTrainedModel, program: Callable[..., str], dtype: str, tmp_path: Path
) -> None:
    text = tmp_path / "night.txt"
    text.write_text(TEXT)
    program("model", "capture", "--model", TINY, "--text", text, "--out", tmp_path, "--dtype", dtype)
    capture(model, {"night": TEXT}, tmp_path / "hf", dtype=dtype)
    ours, theirs = load_file(tmp_path / "hf" / "night.safetensors"), load_file(tmp_path / "night.safetensors")
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours.pop("tokens"), theirs.pop("tokens"))
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.shape, tensor.dtype) == (other.shape, TYPES[dtype])
        # Both compute in F32, in another order: up to 1e-4 apart, then each is rounded by up to half a step.
        step = 0 if dtype == "f32" else torch.finfo(tensor.dtype).eps
        bound = 1e-4 + step * torch.maximum(tensor.abs(), other.abs()).float()
        assert ((tensor.float() - other.float()).abs() <= bound).all(), name


def test_dump_is_read_without_findings(model: PreTrainedModel, program: Callable[..., str], tmp_path: Path) -> None:
    capture(model, {"night": TEXT}, tmp_path, dtype="bf16", decode_tokens=2)
    capture(small("gpt2"), {"gpt2": PROMPT}, tmp_path, decode_tokens=2)
    capture(small("gemma3-text"), {"gemma3": PROMPT}, tmp_path, dtype="f32", decode_tokens=2)
    assert json.loads(program("dump", "check", "--dump", tmp_path, "--json"))["findings"] == []
    found = json.loads(program("sweep", "--dump", tmp_path / "gemma3.safetensors", "--pipeline", "planes", "--json"))
    [row] = found["rows"]
    assert (row["state"], row["changed_values"]) == ("ok", 0)


def test_logits_are_those_that_gearbox_is_tested_with(model: PreTrainedModel) -> None:
    ids = json.loads(shared("golden/model/tokens_128.json").read_text())
    stored = np.fromfile(shared("golden/model/logits_128x4096_f32.bin"), dtype="<f4").reshape(128, 4096)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(logits - stored).max() < 1e-3


def test_decoded_tokens_are_the_greedy_ones(model: PreTrainedModel, tmp_path: Path) -> None:
    golden = json.loads(shared("golden/model/greedy_64_64.json").read_text())
    capture(model, {"greedy": golden[:64]}, tmp_path, decode_tokens=64)
    assert load_file(tmp_path / "greedy.safetensors")["tokens"].tolist() == golden


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_narrow_dump_is_the_rounded_wide_one(dtype: str, tmp_path: Path) -> None:
    model = small("qwen3")
    capture(model, {"wide": PROMPT}, tmp_path, decode_tokens=1, dtype="f32")
    capture(model, {"narrow": PROMPT}, tmp_path, decode_tokens=1, dtype=TYPES[dtype])
    wide, narrow = (load_file(tmp_path / f"{name}.safetensors") for name in ("wide", "narrow"))
    for name in wide.keys() - {"tokens"}:
        assert torch.equal(narrow[name], wide[name].to(TYPES[dtype])), name


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_dump_in_the_type_of_the_model_loses_nothing(dtype: str, tmp_path: Path) -> None:
    model = small("llama").to(TYPES[dtype])
    capture(model, {"same": PROMPT}, tmp_path, decode_tokens=1, dtype=dtype)
    capture(model, {"wide": PROMPT}, tmp_path, decode_tokens=1, dtype="f32")
    same, wide = (load_file(tmp_path / f"{name}.safetensors") for name in ("same", "wide"))
    for name in wide.keys() - {"tokens"}:
        assert torch.equal(same[name].float(), wide[name]), name


def test_elements_that_become_infinite_are_counted(tmp_path: Path) -> None:
    model = small("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1e5)
    [narrow] = capture(model, {"narrow": PROMPT}, tmp_path, decode_tokens=1, dtype="f16")
    [wide] = capture(model, {"wide": PROMPT}, tmp_path, decode_tokens=1, dtype="bf16")
    dump = load_file(tmp_path / "narrow.safetensors")
    infinite = sum(int(tensor.isinf().sum()) for tensor in dump.values())
    assert narrow.overflow == infinite > 0
    assert wide.overflow == 0


def test_prompts_are_taken_one_by_one_and_nothing_of_them_stays(tmp_path: Path) -> None:
    model = small("llama")
    caches: list[weakref.ref] = []

    def meet(_: torch.nn.Module, args: object, kwargs: dict) -> None:
        caches.append(weakref.ref(kwargs["past_key_values"]))

    def prompts() -> Iterator[Prompt]:
        for number in range(3):
            assert len(caches) == 2 * number
            assert names(tmp_path) == sorted([*(f"p{i}.safetensors" for i in range(number)), *["runs.jsonl"][:number]])
            gc.collect()
            assert all(cache() is None for cache in caches)
            yield Prompt(f"p{number}", PROMPT)

    model.register_forward_pre_hook(meet, with_kwargs=True)
    done = capture(model, prompts(), tmp_path, decode_tokens=1)
    assert [captured.run for captured in done] == ["p0", "p1", "p2"]


def test_run_log_has_the_keys_of_gearbox(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    prompts = [Prompt("a", PROMPT, "texts/a.txt"), PROMPT[:4]]
    done = capture(small("llama"), prompts, tmp_path / "out", decode_tokens=2, log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    metrics = [
        {"prompt_tokens": n, "decode_tokens": 2, "prefill_s": d.prefill_s, "decode_s": d.decode_s}
        for n, d in zip((19, 4), done)
    ]
    assert lines == [
        {"prompt_file": "texts/a.txt", "run_id": "a", "returncode": 0, "metrics": metrics[0]},
        {"prompt_file": "prompt-1", "run_id": "prompt-1", "returncode": 0, "metrics": metrics[1]},
    ]
    assert names(tmp_path / "out") == ["a.safetensors", "prompt-1.safetensors"]


def test_existing_dump_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    model = small("llama")
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="run.safetensors`: exists already"):
        capture(model, {"run": PROMPT}, tmp_path)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["run.safetensors"])
    capture(model, {"run": PROMPT}, tmp_path, overwrite=True)
    assert load_file(path)["tokens"].tolist()[:19] == PROMPT
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="folder.safetensors`: expected a file, got a folder"):
        capture(model, {"folder": PROMPT}, tmp_path, overwrite=True)


def test_failure_leaves_neither_files_nor_hooks(tmp_path: Path) -> None:
    model = small("llama").train()
    before = dict(ALL_ATTENTION_FUNCTIONS)
    calls = []

    def fail(*_: object) -> None:
        calls.append(ALL_ATTENTION_FUNCTIONS["sdpa"])
        if len(calls) == 2:
            raise RuntimeError("on purpose")

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        capture(model, {"run": PROMPT}, tmp_path, block=8)
    handle.remove()
    assert calls[0] is not before["sdpa"], "it was there while the model ran"
    assert (dict(ALL_ATTENTION_FUNCTIONS), names(tmp_path), model.training) == (before, [], True)


def test_somebody_elses_attention_function_is_called_and_kept(tmp_path: Path) -> None:
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls = []

    def theirs(module: torch.nn.Module, *args: object, **kwargs: object) -> object:
        calls.append(module.layer_idx)
        return plain(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
    try:
        capture(small("llama"), {"run": PROMPT}, tmp_path, decode_tokens=0)
        assert (calls, ALL_ATTENTION_FUNCTIONS["sdpa"]) == ([0, 1, 2, 3], theirs)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ({"../run": PROMPT}, {}, "got `../run`"),
        ({"a b": PROMPT}, {}, "prompt `a b`: run name: expected letters"),
        (
            {"run": []},
            {},
            "prompt `run`: expected 1 to 64 tokens, the context of the model, got 0 of the prompt and 16 to decode",
        ),
        ({"run": PROMPT}, {"decode_tokens": 46}, "got 19 of the prompt and 46 to decode"),
        ({"run": [3, 97]}, {}, "expected ids of 0 to 96, got 3 to 97"),
        ({"run": PROMPT}, {"decode_tokens": -1}, "decode_tokens: expected at least 0, got -1"),
        ({"run": PROMPT}, {"block": 0}, "block: expected at least 1, got 0"),
        ({"run": PROMPT}, {"dtype": "f64"}, "dtype: expected f16, bf16, f32, got `f64`"),
    ],
)
def test_bad_input_is_named(prompts: dict, settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        capture(small("llama"), prompts, tmp_path, **settings)
    assert names(tmp_path) == []


def test_command_captures_files_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "night.txt"
    text.write_text(TEXT)
    arguments = [
        str(TINY),
        "--text",
        str(text),
        "--out",
        str(tmp_path / "out"),
        "--decode-tokens",
        "3",
        "--tokens",
        "20",
        "--dtype",
        "bf16",
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {tmp_path}/out/night.safetensors: 20 prompt tokens in ")
    assert load_file(tmp_path / "out" / "night.safetensors")["layers.5.query"].shape == (23, 4, 64)
    assert json.loads((tmp_path / "out" / "runs.jsonl").read_text())["prompt_file"] == str(text)
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--json"]) == 0
    [captured] = json.loads(capsys.readouterr().out)
    assert (captured["run"], captured["prompt_tokens"], captured["overflow"]) == ("night", 20, 0)


def test_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binary = tmp_path / "bad.txt"
    binary.write_bytes(b"ab\xff")
    out = str(tmp_path / "out")
    for model, text, message in [
        (str(TINY), str(tmp_path / "no.txt"), "no.txt"),
        (str(TINY), str(binary), "bad.txt`: expected UTF-8, got another byte at 2"),
        ("./no-model", str(binary), "`./no-model`: expected the folder of a model"),
    ]:
        assert main([model, "--text", text, "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert main([str(TINY), "--text", str(binary), "--out", out, "--device", "toaster"]) == 2
    assert "device: expected one that this machine has, got `toaster`" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main([str(TINY), "--out", out])
    assert usage.value.code == 2
