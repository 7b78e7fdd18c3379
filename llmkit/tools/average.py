"""`llmkit average`: one model from several of one shape, by the mean of their weights; or from a checkpoint's own average.

Works on folders, a tensor at a time: memory is that of the largest tensor, not of the models.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmkit.config import UserError
from llmkit.model.hf import read_config
from llmkit.model.layouts import from_disk, to_disk
from llmkit.model.weights import quantization_in, shapes_of, weight_files
from llmkit.storage import (
    MANIFEST,
    Damaged,
    Draft,
    checkpoints_of,
    machine_errors,
    resolve_model,
    sha256_of,
    to_json,
    verify,
)
from llmkit.training.checkpoint import DTYPES, index_of, safetensors_stream, shard

EMA = "trainer_state/ema.safetensors"
# Of config.json: what two models of one shape may say differently.
_FREE = ("llmkit", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt")
_SMALL = (".json", ".txt", ".model", ".jinja", ".md")


class Source:
    """The weights of one model folder, read one at a time."""

    def __init__(self, folder: Path, ema: bool, stack: contextlib.ExitStack):
        """Opens the files.

        Args:
            folder: a checkpoint or a Hugging Face folder.
            ema: the average of the weights, where they were trained, instead of the weights.
            stack: closes the files.
        """
        self.folder = folder
        files = weight_files(folder)
        if (quantization := quantization_in(folder)) is not None:
            raise UserError(f"{folder}: is quantised ({quantization}): take the model it was made from")
        self.shapes = shapes_of(files)
        handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        self._files = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 - not a dict
        self._converted: dict[str, Tensor] = {}
        if not ema:
            return
        if not (folder / EMA).is_file():
            raise UserError(f"{folder}: holds no {EMA}: only runs with optim.ema_decay keep an average")
        average = stack.enter_context(safe_open(folder / EMA, framework="pt"))
        names = list(average.keys())
        if self.shapes.keys() >= set(names):
            self._files |= dict.fromkeys(names, average)
        else:  # the average has our names and layouts, the folder its family's
            config = read_config(folder)
            weights = from_disk(config, {name: handle.get_tensor(name) for name, handle in self._files.items()})
            self._converted = to_disk(config, weights | {name: average.get_tensor(name) for name in names})

    def like(self, name: str) -> Tensor:
        """A tensor of the shape and dtype that the folder holds, without numbers."""
        there = self._files[name].get_slice(name)
        dtype = {v: k for k, v in DTYPES.items()}.get(there.get_dtype())
        if dtype is None:
            raise UserError(f"{self.folder}: {name}: {there.get_dtype()} is not a type that can be averaged")
        return torch.empty(there.get_shape(), dtype=dtype, device="meta")

    def get(self, name: str) -> Tensor:
        t = self._converted[name] if name in self._converted else self._files[name].get_tensor(name)
        assert isinstance(t, Tensor)
        return t


def mean(sources: list[Source], weights: list[float], name: str, dtype: torch.dtype) -> Tensor:
    """The weighted mean of one tensor, summed up in fp64. What is no floating-point number must be equal."""
    first = sources[0].get(name)
    if not first.is_floating_point():
        for other in sources[1:]:
            if not torch.equal(first, other.get(name)):
                raise UserError(
                    f"{other.folder}: {name}: differs from {sources[0].folder}, and whole numbers have no mean"
                )
        return first
    total = first.double() * weights[0]
    for source, weight in zip(sources[1:], weights[1:], strict=True):
        total.add_(source.get(name).double(), alpha=weight)
    if not total.isfinite().all():
        raise UserError(f"{name}: the average is not finite: look at the models with `llmkit verify`")
    return total.to(dtype)


def check_alike(folders: list[Path], shapes: list[dict[str, tuple[int, ...]]]) -> None:
    """Raises UserError unless all are models of one shape with one tokenizer."""
    first = folders[0]
    config = _config(first)
    for folder, found in zip(folders[1:], shapes[1:], strict=True):
        other = _config(folder)
        for key in sorted(config.keys() | other.keys()):
            if key not in _FREE and config.get(key) != other.get(key):
                raise UserError(f"{folder}: config.json: {key} is {other.get(key)}, in {first} it is {config.get(key)}")
        for name in sorted(shapes[0].keys() | found.keys()):
            mine, theirs = shapes[0].get(name, "nothing"), found.get(name, "nothing")
            if mine != theirs:
                raise UserError(
                    f"{folder}: {name} is {theirs}, in {first} it is {mine}: only models of one shape have a mean"
                )
        for name in _TOKENIZERS:
            hashes = {sha256_of(f / name) if (f / name).is_file() else None for f in (first, folder)}
            if len(hashes) > 1:
                raise UserError(
                    f"{folder}: {name} is not that of {first}: models with different tokenizers have no mean"
                )


def _config(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: config.json can't be read: {e}") from None
    if not isinstance(data, dict):
        raise UserError(f"{folder}: config.json: a JSON object is expected")
    return data


def average(out: Path, folders: list[Path], weights: list[float], ema: bool) -> None:
    """Writes the mean of models as a Hugging Face folder, whole or not at all.

    Args:
        out: is not there yet.
        folders: models of one shape.
        weights: one for each, above 0; their ratios count.
        ema: of their averages over the steps of training.
    """
    shares = [w / sum(weights) for w in weights]
    with contextlib.ExitStack() as stack, machine_errors(out.parent):
        check_alike(folders, [shapes_of(weight_files(f)) for f in folders])
        plain = Source(folders[0], False, stack)  # its dtypes are those of the result
        sources = [Source(f, ema, stack) for f in folders]
        like = {name: plain.like(name) for name in plain.shapes}
        shards = shard("model.safetensors", like)
        told = {
            "parents": [_parent(f, share) for f, share in zip(folders, shares, strict=True)],
            "weights": "ema" if ema else "model",
        }
        blobs = _small_files(folders[0], told)
        if len(shards) > 1:
            blobs["model.safetensors.index.json"] = index_of(shards)
        size = sum(t.numel() * t.element_size() for t in like.values()) + sum(map(len, blobs.values())) + (1 << 16)
        draft = Draft(out, size)
        try:
            for file, part in shards.items():
                draft.write(file, safetensors_stream(part, _means(sources, shares, part)))
            for file, content in blobs.items():
                draft.write(file, [content])
            draft.commit(told)
        except BaseException:
            draft.discard()
            raise


def _means(sources: list[Source], shares: list[float], like: dict[str, Tensor]) -> Iterator[Tensor]:
    for name, t in like.items():
        yield mean(sources, shares, name, t.dtype)


def _parent(folder: Path, share: float) -> dict[str, Any]:
    """What is told of one model: where it was, its share, and a hash that stands for all its files."""
    files = [folder / MANIFEST] if (folder / MANIFEST).is_file() else weight_files(folder)
    return {"folder": str(folder), "share": share, "sha256": {f.name: sha256_of(f) for f in files}}


def _small_files(folder: Path, told: dict[str, Any]) -> dict[str, bytes]:
    """What else makes the first folder a model, with a word on where its weights come from."""
    files = {
        p.name: p.read_bytes()
        for p in sorted(folder.iterdir())
        if p.is_file() and p.suffix in _SMALL and p.name != MANIFEST and not p.name.endswith(".index.json")
    }
    config = json.loads(files["config.json"])
    files["config.json"] = to_json({**config, "llmkit": {**config.get("llmkit", {}), "average": told}}).encode()
    lines = [f"| {p['folder']} | {p['share']:.4g} |" for p in told["parents"]]
    what = "averages kept in training (EMA)" if told["weights"] == "ema" else "weights"
    note = "\n".join(
        ["", "## Average", "", f"The mean of the {what} of:", "", "| model | share |", "|---|---|", *lines, ""]
    )
    files["README.md"] = files.get("README.md", b"") + note.encode()
    return files


def run(args: argparse.Namespace) -> int:
    """Finds the models that are meant, averages them and says where the result is."""
    out, folders = Path(args.out), [Path(m) for m in args.models]
    if out.exists():
        raise UserError(f"{out}: is there already: choose another folder for the average")
    if args.last is not None:
        if len(folders) != 1:
            raise UserError(f"--last {args.last}: name one run, whose last checkpoints are meant (got {len(folders)})")
        folders = _last(folders[0], args.last)
    else:
        folders = [resolve_model(f) for f in folders]
    if len(folders) < 2 and not args.ema:
        raise UserError(f"{folders[0]}: the mean of one model is itself: name several, or use --last or --ema")
    weights = _weights(args.weights, len(folders))
    average(out, folders, weights, args.ema)
    for folder, weight in zip(folders, weights, strict=True):
        print(f"{weight / sum(weights):8.4f}  {folder}")
    print(f"{out}: the mean of {len(folders)} {'average(s) kept in training' if args.ema else 'models'}")
    return 0


def _last(run: Path, n: int) -> list[Path]:
    good = []
    for folder in checkpoints_of(run):
        with contextlib.suppress(Damaged):
            verify(folder)
            good.append(folder)
    if not 1 <= n <= len(good):
        raise UserError(f"--last {n}: {run} holds {len(good)} good checkpoints: choose a number up to that")
    return good[:n]


def _weights(text: str | None, n: int) -> list[float]:
    if text is None:
        return [1.0] * n
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights {text}: numbers with commas between them are expected, such as 1,2") from None
    if len(weights) != n or not all(0 < w < float("inf") for w in weights):
        raise UserError(f"--weights {text}: {n} positive numbers are expected, one for each model")
    return weights
