"""Dumps of a transformers model: keys after RoPE, values, queries and token ids of prompts and of the tokens decoded behind them.

The command line is ``gearbox-capture MODEL --text FILE… --out DIR``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import facts
from .dump import DTYPES, DumpWriter, check_run_name
from .tap import TappedCache, rows, tapped_attention

Content = str | Sequence[int]
"""What a prompt says: a text, or token ids."""


@dataclass(frozen=True)
class Prompt:
    """One request of a model."""

    name: str
    """Name of the run and of its file, ``[A-Za-z0-9._-]+``."""
    content: Content
    """A text, or the ids of its tokens."""
    source: str | None = None
    """Where it is from, for the run log; the name if absent."""


@dataclass(frozen=True)
class Captured:
    """One dump, and how it went."""

    run: str
    """Name of the run."""
    path: str
    """The dump."""
    prompt_tokens: int
    """Tokens of the prompt."""
    decode_tokens: int
    """Tokens decoded behind it."""
    prefill_s: float
    """Time of the prompt in seconds, the writing included."""
    decode_s: float
    """Time of the decoded tokens in seconds."""
    overflow: int
    """Finite elements that are infinite in the type of the dump."""


def capture(
    model: PreTrainedModel | str | os.PathLike[str],
    prompts: Mapping[str, Content] | Iterable[Prompt | Content] | str,
    out: str | os.PathLike[str],
    *,
    decode_tokens: int = 16,
    dtype: str | torch.dtype = "f16",
    tokenizer: PreTrainedTokenizerBase | Callable[[str], Sequence[int]] | None = None,
    max_tokens: int | None = None,
    block: int = 256,
    compute_dtype: str | torch.dtype = "f32",
    device: str | torch.device | None = None,
    log: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    report: Callable[[Captured], None] | None = None,
) -> list[Captured]:
    """Runs prompts through a model, decodes behind each, and writes one dump per prompt to ``out/<run>.safetensors``.

    A dump holds per layer ``layers.<L>.key`` and ``.value`` of shape ``(seq, kv_heads, head_dim)`` and ``.query`` of shape
    ``(seq, q_heads, head_dim)``, as attention is called with them: keys and queries after RoPE. ``tokens`` are the ids. The prompt is one
    prefill entry; each token behind it, always the most probable one, is a decode entry. Metadata say how the model rotates (``rope``,
    or ``rope_layers`` where layers differ) and attends (``attention``: scale, softcap and window of each layer).

    Prompts are taken one by one and tensors go to the file as they come, so memory holds the cache of one request.

    Args:
        model: a causal language model of the families in ``gearbox.hf.facts.FAMILIES`` with any attention that is dispatched by name, or
            a folder or name to load one from. A model is left as it was.
        prompts: texts or token ids: a mapping by name of the run, or an iterable (also lazy) of ``Prompt`` or of what a prompt says,
            which are then called ``prompt-0``, ``prompt-1``, …; one string is one prompt.
        out: folder to write to; it is made if it is not there.
        decode_tokens: tokens to decode behind each prompt.
        dtype: element type of the dumps: ``f16``, ``bf16`` or ``f32``, or the one of torch.
        tokenizer: makes ids of texts; the one of the model by default.
        max_tokens: most tokens of a prompt; what is longer is cut at the end.
        block: tokens of a prompt that are worked on at a time.
        compute_dtype: element type in which a model that is loaded here computes; ``auto`` for the one it is stored in.
        device: where a model that is loaded here computes.
        log: run log to append to, one JSON object per prompt; ``out/runs.jsonl`` by default.
        overwrite: whether existing dumps may be replaced.
        report: called after each dump.

    Returns:
        What was captured, in the order of the prompts.

    Raises:
        ValueError: for an unsupported model, a name that is none, an empty prompt, or more tokens than the context of the model.
        FileExistsError: if a dump exists and ``overwrite`` is off.
        OSError: if something cannot be read or written.
    """
    label = _dtype(dtype)
    for name, value, least in (("decode_tokens", decode_tokens, 0), ("block", block, 1), ("max_tokens", max_tokens, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not isinstance(model, PreTrainedModel):
        model = _load(model, compute_dtype, device)
    encode = _encoder(model, tokenizer)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "runs.jsonl" if log is None else Path(log)
    recorder = _Recorder(model, label, block, overwrite)
    done = []
    for prompt in _prompts(prompts):
        try:
            check_run_name(prompt.name)
            ids = encode(prompt.content) if isinstance(prompt.content, str) else [int(id) for id in prompt.content]
            captured = recorder.run(folder / f"{prompt.name}.safetensors", ids[:max_tokens], decode_tokens)
        except ValueError as error:
            raise ValueError(f"prompt `{prompt.name}`: {error}") from error
        _log(log, prompt, captured)
        if report is not None:
            report(captured)
        done.append(captured)
    return done


def _dtype(dtype: str | torch.dtype) -> str:
    """The short name of an element type of dumps."""
    names = {
        **{name: name for name in DTYPES},
        **{str(kind).removeprefix("torch."): name for name, kind in DTYPES.items()},
    }
    name = names.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise ValueError(f"dtype: expected {', '.join(DTYPES)}, got `{dtype}`")
    return name


def _prompts(prompts: Mapping[str, Content] | Iterable[Prompt | Content] | str) -> Iterator[Prompt]:
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Mapping):
        prompts = (Prompt(name, content) for name, content in prompts.items())
    for number, prompt in enumerate(prompts):
        yield prompt if isinstance(prompt, Prompt) else Prompt(f"prompt-{number}", prompt)


def _load(
    place: str | os.PathLike[str], compute_dtype: str | torch.dtype, device: str | torch.device | None
) -> PreTrainedModel:
    place = os.fspath(place)
    if place.startswith((".", "/", "~", os.sep)) and not Path(place).is_dir():
        raise ValueError(f"`{place}`: expected the folder of a model, got nothing or another kind of file")
    kind = "auto" if compute_dtype == "auto" else DTYPES[_dtype(compute_dtype)]
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: expected one that this machine has, got `{device}`: {error}") from error
    model = AutoModelForCausalLM.from_pretrained(place, dtype=kind)
    return model if device is None else model.to(device)


def _encoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | Callable[[str], Sequence[int]] | None
) -> Callable[[str], list[int]]:
    """Makes ids of a text, with the tokens that the model expects around it; loads a tokenizer when it is needed first."""

    def encode(text: str) -> list[int]:
        nonlocal tokenizer
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        ids = tokenizer(text)
        return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)

    return encode


class _Recorder:
    """Writes dumps of one model."""

    def __init__(self, model: PreTrainedModel, dtype: str, block: int, overwrite: bool) -> None:
        self._model, self._dtype, self._block, self._overwrite = model, dtype, block, overwrite
        self._geometry = facts.geometry(model.config)
        self._modules = facts.attention_modules(model, self._geometry.layers)
        self._metadata = self._describe()

    def _describe(self) -> dict[str, str]:
        """The strings of a dump that are the same for all prompts."""
        config = self._model.config
        strings = {}
        ropes = facts.ropes(config)
        if any(rope is not None for rope in ropes):
            common = facts.common_rope(ropes)
            strings["rope_layers" if common is None else "rope"] = json.dumps(ropes if common is None else common)
        strings["attention"] = json.dumps(facts.attention_facts(self._modules, config))
        strings["compute_dtype"] = str(self._model.dtype).removeprefix("torch.")
        name = config.name_or_path or ""
        strings["model"] = Path(name).name if os.path.exists(name) else name
        strings["writer"] = f"gearbox-capture, transformers {transformers.__version__}"
        return strings

    def run(self, path: Path, prompt: Sequence[int], decode_tokens: int) -> Captured:
        """Writes the dump of one prompt."""
        context, seq = self._geometry.context, len(prompt) + decode_tokens
        if not prompt or seq > context:
            raise ValueError(
                f"expected 1 to {context} tokens, the context of the model, got {len(prompt)} of the prompt and {decode_tokens} to decode"
            )
        vocabulary = facts.text_config(self._model.config).vocab_size
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(f"tokens: expected ids of 0 to {vocabulary - 1}, got {min(prompt)} to {max(prompt)}")
        decoded = [(at, 1, "decode") for at in range(len(prompt), seq)]
        entries = [(0, len(prompt), "prefill"), *decoded]
        tokens = list(prompt)
        attention = facts.text_config(self._model.config)._attn_implementation
        with (
            DumpWriter(path, self._geometry, self._dtype, entries, self._metadata, self._overwrite) as writer,
            tapped_attention(
                attention, self._modules, lambda call: writer.write(call.layer, "query", rows(call.query))
            ),
            _inference(self._model),
        ):
            cache = TappedCache(self._model.config, writer.write)
            start = time.perf_counter()
            for at in range(0, len(prompt), self._block):
                best = self._step(cache, prompt[at : at + self._block])
            prefilled = time.perf_counter()
            for _ in range(decode_tokens):
                tokens.append(best)
                best = self._step(cache, [best])
            end = time.perf_counter()
            writer.finish(tokens)
        return Captured(
            run=path.stem,
            path=str(path),
            prompt_tokens=len(prompt),
            decode_tokens=decode_tokens,
            prefill_s=prefilled - start,
            decode_s=end - prefilled,
            overflow=writer.overflow,
        )

    def _step(self, cache: TappedCache, ids: Sequence[int]) -> int:
        """Feeds tokens; gives the most probable next one."""
        batch = torch.tensor([ids], device=self._model.device)
        logits = self._model(input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())


@contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    """Neither gradients nor dropout."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _log(path: Path, prompt: Prompt, captured: Captured) -> None:
    """Appends a line with the keys of the run log of ``gearbox model capture``."""
    metrics = ("prompt_tokens", "decode_tokens", "prefill_s", "decode_s")
    line = {
        "prompt_file": prompt.source or prompt.name,
        "run_id": captured.run,
        "returncode": 0,
        "metrics": {name: getattr(captured, name) for name in metrics},
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gearbox-capture",
        description="Runs prompts through a transformers model and writes what its attention saw, one dump per prompt.",
        epilog="Exit status: 0 all well; 2 bad input or usage.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of the model, or its name on the hub")
    parser.add_argument(
        "--text", nargs="+", required=True, type=Path, metavar="FILE", help="text file with a prompt, one dump each"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--tokens", type=int, metavar="N", help="most tokens of each prompt [default: all]")
    parser.add_argument(
        "--decode-tokens", type=int, default=16, metavar="N", help="tokens to decode behind each prompt [default: 16]"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="f16", help="element type of the dumps [default: f16]")
    parser.add_argument(
        "--compute",
        choices=[*DTYPES, "auto"],
        default="f32",
        help="element type the model computes in; auto: as stored [default: f32]",
    )
    parser.add_argument("--device", help="where the model computes, such as cuda:0 [default: cpu]")
    parser.add_argument(
        "--block", type=int, default=256, metavar="N", help="tokens of a prompt worked on at a time [default: 256]"
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="run log to append to [default: runs.jsonl in the folder]"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing dumps")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return parser


def _read_prompts(paths: Iterable[Path]) -> Iterator[Prompt]:
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"`{path}`: expected UTF-8, got another byte at {error.start}") from error
        yield Prompt(path.stem, text, str(path))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``gearbox-capture``; gives its exit status: 0, or 2 for bad input."""
    args = _parser().parse_args(arguments)

    def report(captured: Captured) -> None:
        if captured.overflow:
            print(
                f"warning: {captured.path}: {captured.overflow} elements are infinite in this type; try --dtype bf16",
                file=sys.stderr,
            )
        if not args.json:
            print(
                f"Wrote {captured.path}: {captured.prompt_tokens} prompt tokens in {captured.prefill_s:.2f} s,"
                f" {captured.decode_tokens} decoded in {captured.decode_s:.2f} s",
                flush=True,
            )

    try:
        done = capture(
            args.model,
            _read_prompts(args.text),
            args.out,
            decode_tokens=args.decode_tokens,
            dtype=args.dtype,
            max_tokens=args.tokens,
            block=args.block,
            compute_dtype=args.compute,
            device=args.device,
            log=args.log,
            overwrite=args.overwrite,
            report=report,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([dataclasses.asdict(captured) for captured in done], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
