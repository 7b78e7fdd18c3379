"""`llmkit bench`: what a model takes, loses and gains in each of its forms: size, perplexity, divergence and speed in fp32
and bf16, and of the folders that `llmkit quantize` made of it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmkit.config import MachineError, UserError
from llmkit.inference.command import DTYPES
from llmkit.model.config import count_params
from llmkit.model.weights import quantization_in
from llmkit.storage import machine_errors, replace_file
from llmkit.tools.compare import (
    Compared,
    HeldOut,
    Record,
    load,
    names_of,
    plain,
    progress,
    read_held_out,
    speed_lengths,
    told_likelihood,
)
from llmkit.tools.comparison import Panel, Span, draw, markdown, notes, speed_of
from llmkit.tools.measures import Timed, divergence, likelihood, speeds
from llmkit.training.dist import pick_device

PROMPT_TOKENS, NEW_TOKENS = 512, 128  # llama-bench's pp512 and tg128


@dataclass(frozen=True)
class Form:
    """The original in a precision, or a model that was made from it."""

    compared: Compared
    width: int | None
    """Bytes of a weight, where all of them have one precision; None: what the folder's files say counts."""

    @property
    def n_params(self) -> int:
        return count_params(self.compared.model.config).total

    @property
    def n_bytes(self) -> int:
        """Of the weights on disk; of a precision that they aren't saved in, what they would take there."""
        return self.compared.n_bytes if self.width is None else self.width * self.n_params


def run(args: argparse.Namespace) -> int:
    """The table to stdout and, with the numbers and a picture, to --out; notes and progress to stderr."""
    precisions = _precisions_of(args.precisions)
    _check(args)
    device = pick_device(args.device)
    forms = _load(args, precisions, device)
    models = [form.compared for form in forms]
    n_prompt, n_new = speed_lengths(args, models, PROMPT_TOKENS, NEW_TOKENS)
    held_out = None if args.text is None and args.chats is None else _held_out(args, models)
    if args.out is not None:
        with machine_errors(Path(args.out)):
            Path(args.out).mkdir(parents=True, exist_ok=True)
    report: Record = {
        "models": [_size(form) for form in forms],
        "original": {"path": str(models[0].folder), "bytes": models[0].n_bytes},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "same_tokenizer": True,
        "same_template": True,
        "questions": None,
        "held_out": None if held_out is None else held_out.facts,
        "speed": {"prompt_tokens": n_prompt, "new_tokens": n_new, "repeats": args.repeats} if args.repeats else None,
    }
    if held_out is not None:
        for found, result in zip(_quality(models, held_out), report["models"], strict=True):
            result |= found
    if args.repeats:
        timed = [Timed(m.model, m.tokenizer) for m in models]
        with progress("speed", (args.repeats + 1) * len(models), " runs") as step:
            measured = speeds(timed, n_prompt, n_new, args.repeats, lambda: step(1))
        for speed, result in zip(measured, report["models"], strict=True):
            result["speed"] = {"prompt": speed.prompt, "generation": speed.generation}
    report = plain(report)
    text = markdown(list(_rows(report)), list(_remarks(report)))
    if args.out is not None:
        _write(Path(args.out), report, text)
    print(text, end="")
    return 0


# --- options ---------------------------------------------------------------------------------------------------------


def _precisions_of(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DTYPES or names.count(name) > 1:
            raise UserError(f"bench: --precisions {text}: each of {', '.join(DTYPES)} once at most, such as fp32,bf16")
    return names


def _check(args: argparse.Namespace) -> None:
    """Refuses what contradicts itself before a model is loaded."""
    if args.text is not None and args.chats is not None:
        raise UserError("bench: --text and --chats: a table has one perplexity: ask for one at a time")
    if args.field is not None and args.text is None:
        raise UserError("bench: --field is where the text of --text stands: give that too")
    if args.context is not None and args.text is None and args.chats is None:
        raise UserError("bench: --context is for held-out text: give --text or --chats")
    least = {"limit": 1, "context": 1, "repeats": 0, "prompt_tokens": 1, "new_tokens": 2}
    for option, low in least.items():
        value = getattr(args, option)
        if value is not None and value < low:
            raise UserError(f"bench: --{option.replace('_', '-')} must be at least {low} (got {value})")
    if args.out is not None and Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"bench: --out {args.out}: is a file: name a folder")


def _load(args: argparse.Namespace, precisions: Sequence[str], device: torch.device) -> list[Form]:
    models = [load(p, args.model, DTYPES[p], args.raw, device) for p in precisions]
    original = models[0]
    # Weights that are quantised already stay so: a precision is then only what is computed in.
    quantised = quantization_in(original.folder) is not None
    forms = [Form(m, None if quantised else DTYPES[m.name].itemsize) for m in models]
    for name, path in zip(names_of(args.others, None), args.others, strict=True):
        while name in [form.compared.name for form in forms]:
            name += "'"
        forms.append(Form(load(name, path, None, args.raw, device), None))
        if forms[-1].compared.tokenizer.hash != original.tokenizer.hash:
            raise UserError(
                f"{path}: its tokenizer is not that of {args.model}: bench is about forms of one model; "
                "`llmkit compare` puts different ones side by side"
            )
    return forms


def _size(form: Form) -> Record:
    m = form.compared
    return {
        "name": m.name,
        "path": str(m.folder),
        "parameters": form.n_params,
        "bytes": form.n_bytes,
        "bits_per_weight": 8 * form.n_bytes / form.n_params,
    }


# --- quality ---------------------------------------------------------------------------------------------------------


def _held_out(args: argparse.Namespace, models: Sequence[Compared]) -> HeldOut:
    """The rows that every form is asked about: they have one tokenizer, so the first one's serve all."""
    smallest = min(models, key=lambda m: m.context)
    return read_held_out(args, [smallest])


def _quality(models: Sequence[Compared], held_out: HeldOut) -> Iterator[Record]:
    """Of every form how likely it finds the text, and how far it is from the first."""
    (rows,), original, before = held_out.rows, models[0], None
    for k, m in enumerate(models):
        vocab_size = m.tokenizer.vocab_size
        with progress(f"{m.name}: perplexity", (2 if k else 1) * len(rows), " rows") as step:
            try:
                found = likelihood(m.model, rows, vocab_size, held_out.n_bytes, step)
                told = told_likelihood(found)
                if before is None:
                    before = found.perplexity
                else:
                    far = divergence(original.model, m.model, rows, vocab_size, step)
                    told |= {"perplexity_change_pct": 100 * (found.perplexity / before - 1)}
                    told |= {"kl": far.kl, "same_choice_pct": 100 * far.same_frac}
            except MachineError as e:
                raise MachineError(f"{m.name}: {e}; `llmkit verify {m.folder}` looks at its weights") from None
        yield told


# --- what came of it -------------------------------------------------------------------------------------------------


def _rows(report: Record) -> Iterator[list[str]]:
    """The table's head, and a row for each form."""
    first, held_out, speed = report["models"][0], report["held_out"], report["speed"]
    head = ["", "size, MB", "bits per weight"]
    if held_out is not None:
        head += ["PPL", f"against {first['name']}, %", "KL, nats per token", "same choice, %"]
    if speed is not None:
        head += [f"PP {speed['prompt_tokens']:,}, tokens/s", f"TG {speed['new_tokens']:,}, tokens/s"]
    yield head
    for m in report["models"]:
        cells = [
            " ".join(m["name"].replace("|", "/").split()),
            f"{m['bytes'] / 1e6:,.2f}",
            f"{m['bits_per_weight']:.2f}",
        ]
        if held_out is not None:
            cells.append(_cell(m["perplexity"], ",.4f"))
            cells += [
                _cell(m.get(key), form)
                for key, form in (("perplexity_change_pct", "+.3f"), ("kl", ".3g"), ("same_choice_pct", ".2f"))
            ]
        if speed is not None:
            cells += [speed_of(m["speed"]["prompt"]), speed_of(m["speed"]["generation"])]
        yield cells


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _remarks(report: Record) -> Iterator[str]:
    """What the numbers are."""
    first, original = report["models"][0], report["original"]
    yield (
        f"{first['parameters']:,} weights, {original['bytes'] / 1e6:,.2f} MB as {original['path']} has them; of a "
        "precision, size is what they take in it, of a folder what its weight files do"
    )
    yield from notes(report)
    if report["held_out"] is not None:
        yield (
            f"KL: mean of KL({first['name']} || form) over {first['held_out_tokens']:,} tokens; same choice: how often "
            "both find the same token the likeliest"
        )
    if report["speed"] is not None:
        yield "PP: prompt processing, until the first new token is there; TG: text generation, the tokens after it"


def _panels(report: Record) -> Iterator[Panel]:
    """Bars for each column of the table."""
    models = report["models"]
    without: list[Span] = [None] * len(models)
    yield "size, MB", [m["bytes"] / 1e6 for m in models], without, ",.3g"
    yield "bits per weight", [m["bits_per_weight"] for m in models], without, ".3g"
    if report["held_out"] is not None:
        yield "perplexity", [m["perplexity"] for m in models], without, ",.4g"
        yield f"KL to {models[0]['name']}", [m.get("kl") for m in models], without, ".2g"
    if report["speed"] is not None:
        for key, title in (("prompt", "PP, tokens/s"), ("generation", "TG, tokens/s")):
            runs = [m["speed"][key] for m in models]
            yield title, [statistics.median(r) for r in runs], [(min(r), max(r)) for r in runs], ",.0f"


def _write(out: Path, report: Record, text: str) -> None:
    with machine_errors(out):
        replace_file(out / "bench.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        replace_file(out / "bench.md", text)
    picture = draw(report, out / "bench.png", list(_panels(report)))
    told = f"written: {out / 'bench.md'}, bench.json" + ("" if picture is None else f", {picture.name}")
    print(told, file=sys.stderr, flush=True)
    if picture is None:
        print("note: no picture is drawn: matplotlib is not installed (pip install 'llmkit[log]')", file=sys.stderr)
