"""Weights in Hugging Face folders: safetensors into our models, checked by name and shape before anything is read.

`hf` knows config.json, `layouts` the names and layouts of each family.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmkit.config import UserError
from llmkit.model.adapters import adapter_heads, base_of, is_adapter, read_adapter
from llmkit.model.config import GPTConfig, count_params
from llmkit.model.first import give
from llmkit.model.gpt import GPT
from llmkit.model.heads import SequenceClassifier
from llmkit.model.hf import read_config, read_json, read_labels
from llmkit.model.layouts import canonical_names, config_of, from_disk, to_disk
from llmkit.model.quantization import QUANTIZED, Quantization, fill, quantization_of, stored_shapes

MAX_TENSORS = 1_000_000
_WINDOW = (
    32 << 20
)  # bytes of a file that are looked at before it is opened anew: what was read stays in memory until then
# Tensors with a row for each token.
_VOCABULARY: tuple[str, ...] = ("model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or those that the index names; of adapters those of their base."""
    if is_adapter(folder):
        folder = base_of(folder)
    # Quantised ones have a name of their own, so that no other reader takes what it doesn't find for new weights.
    quantized = any((folder / name).is_file() for name in (QUANTIZED, f"{QUANTIZED}.index.json"))
    whole = QUANTIZED if quantized else "model.safetensors"
    index = folder / f"{whole}.index.json"
    if not index.is_file():
        names = [whole]
    else:
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{index}: not an index of weights: {e}") from None
        if not names or not all(isinstance(n, str) for n in names):
            raise UserError(f"{index}: not an index of weights: weight_map must name files")
    files = [folder / n for n in names]
    for file in files:
        if file.parent.resolve() != folder.resolve():
            raise UserError(f"{index}: '{file.name}' points outside the folder")
        if not file.is_file():
            only = ": only safetensors are read, `llmkit import` converts .bin and .pt" if len(files) == 1 else ""
            raise UserError(f"{file}: no such file{only}")
    return files


def read_tensors(file: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, or those of some names, one at a time.

    They are views of the file: numbers are read where they are looked at, and leave memory with the last view of them.

    Raises:
        UserError: it is no such file.
    """
    try:
        names: deque[str] | None = None
        while names is None or names:
            with safe_open(file, framework="pt") as f:
                if names is None:
                    names = deque(n for n in f.keys() if only is None or n in only)  # noqa: SIM118 - not a dict
                if len(names) > MAX_TENSORS:
                    raise UserError(f"{file}: {len(names)} tensors: at most {MAX_TENSORS} are read")
                n_bytes = 0
                while names and n_bytes < _WINDOW:
                    name = names.popleft()
                    tensor = f.get_tensor(name)
                    n_bytes += tensor.nbytes
                    yield name, tensor
    except UserError:
        raise
    except Exception as e:  # safetensors raises its own class, OSError and ValueError for malformed files
        raise UserError(f"{file}: not a readable safetensors file: {e}") from None


def shapes_of(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                shapes |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 - not a dict
        except Exception as e:
            raise UserError(f"{file}: not a readable safetensors file: {e}") from None
    return shapes


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did."""

    folder: Path
    loaded: tuple[str, ...]
    """Names on disk of the tensors that were read."""
    resized: dict[str, tuple[int, int]]
    """Embeddings and heads that got more rows: how many of the old ones count, and how many there are now."""
    new: tuple[str, ...]
    """Names of the tensors that keep their initial values, because the folder has none and may lack them."""
    adapted: tuple[str, ...] = ()
    """Names of our tensors that the folder's adapters changed, or brought."""

    def __str__(self) -> str:
        lines = [f"{self.folder}: {len(self.loaded)} tensors loaded"]
        lines += [
            f"  {name}: rows {old} to {rows - 1} start at the mean of the {old} before them"
            for name, (old, rows) in self.resized.items()
        ]
        lines += [f"  {name}: new, not in the folder" for name in self.new]
        lines += [f"  adapters merged into {len(self.adapted)} of them"] if self.adapted else []
        return "\n".join(lines)


def checkpoint_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a model's checkpoint has, for a module with a Decoder as `.model`; nothing is copied."""
    own = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()}
    return {name: tuple(t.shape) for name, t in to_disk(config_of(model), own).items()}


def misfits(asked: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> list[str]:
    """Every tensor that is missing, unknown or of another shape, a sentence each; equal ones of many blocks together."""
    groups: dict[tuple[str, Any, Any], list[str]] = {}
    for name in dict.fromkeys((*asked, *found)):
        want, got = asked.get(name, "nothing"), found.get(name, "nothing")
        if want != got:
            groups.setdefault((re.sub(r"\.\d+\.", ".*.", name), got, want), []).append(name)
    return [
        f"{names[0] if len(names) == 1 else f'{pattern} ({len(names)} times)'}: the weights hold {got}, config.json asks "
        f"for {want}"
        for (pattern, got, want), names in groups.items()
    ]


def _real_rows(folder: Path, rows: int) -> int:
    """How many rows of a folder's embedding its tokenizer uses; all of them where it has no tokenizer.json."""
    file = folder / "tokenizer.json"
    try:
        data = json.loads(file.read_bytes())
        vocab = data["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return min(rows, 1 + max((*ids, *(token["id"] for token in data.get("added_tokens") or ()))))
    except FileNotFoundError:
        return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{file}: no tokenizer whose tokens could be counted: {e}") from None


def load_weights(
    model: nn.Module, folder: Path, *, n_tokens: int | None = None, may_lack: tuple[str, ...] = (),
    may_hold: tuple[str, ...] = (),
) -> LoadReport:  # fmt: skip
    """Fills a model from a folder's safetensors; what of them doesn't fit is refused before anything is read. While the
    model has no memory, they wait (see `first`).

    An embedding with more rows than the folder's, as for a tokenizer to which tokens were added, is filled up with the
    mean of the rows that the folder's tokenizer uses; an untied head likewise.

    Args:
        model: a GPT, or another module with a Decoder as `.model`.
        folder: a Hugging Face folder or checkpoint; adapters are read with their base, and merged into it.
        n_tokens: size of the tokenizer that goes with the model: rows of padding that it puts to use are also filled.
        may_lack: tensors that the folder need not have: they keep their values, as a new classifier's "score.weight".
        may_hold: tensors that the folder may have in vain, as the "lm_head.weight" a classifier has no use for.

    Raises:
        UserError: naming every tensor that is missing, unknown or of another shape. Nothing is filled in silently.
    """
    config, adapter = config_of(model), None
    if is_adapter(folder):
        adapter, folder = read_adapter(folder, config), base_of(folder, check=True)
        adapter.check({name: tuple(p.shape) for name, p in model.named_parameters()})
        may_lack = (*may_lack, *adapter.whole)
    if (quantization := quantization_in(folder)) is not None:
        raise UserError(
            f"{folder}: its weights are quantised ({quantization}), which can't be trained: take the model they were made from"
        )
    files = weight_files(folder)
    raw, asked = shapes_of(files), checkpoint_shapes(model)
    names = canonical_names(config, raw)
    found = {name: raw[at] for at, name in names.items() if name not in may_hold}
    repeated = "lm_head.weight" if config.tie_embeddings and "lm_head.weight" in found else None
    if repeated is not None:
        del found[repeated]  # some writers repeat the tied tensor
    new = tuple(name for name in may_lack if name in asked and name not in found)
    told = read_json(folder).get("vocab_size")
    grown = {n for n in _VOCABULARY if n in found and n in asked and found[n][0] == told and told < asked[n][0]}
    fits = {n: (asked[n][0], *shape[1:]) if n in grown else shape for n, shape in found.items()}
    if wrong := misfits({n: shape for n, shape in asked.items() if n not in new}, fits):
        raise UserError("\n".join(f"{folder}: {line}" for line in wrong))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    resized: dict[str, tuple[int, int]] = {}
    rows_of: dict[str, tuple[int, int]] = {}  # the same by our names
    if grown or n_tokens is not None:
        for name in (n for n in _VOCABULARY if n in found):
            old, rows = _real_rows(folder, found[name][0]), asked[name][0]
            if name in grown or old < (n_tokens or 0):
                (own,) = from_disk(config, {name: torch.empty(1)})
                resized[name] = rows_of[own] = old, rows

    def stored(wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for file in files:
            for at, tensor in read_tensors(file, [at for at, name in names.items() if name in wanted]):
                if not tensor.is_floating_point():
                    raise UserError(f"{file}: {at} is {tensor.dtype}: floating-point weights are expected")
                yield from from_disk(config, {names[at]: tensor}).items()

    def values() -> Iterator[tuple[str, Tensor]]:
        whole = set() if adapter is None else set(adapter.whole)
        for name, tensor in stored(found):
            if repeated is not None and name == "model.embed_tokens.weight":
                for _, head in stored([repeated]):
                    _check_tied(folder, head.to(dtypes[name]), tensor.to(dtypes[name]))
            if name in rows_of:
                tensor = _filled_up(tensor.to(dtypes[name]), *rows_of[name])
            yield name, tensor if adapter is None else adapter.apply(name, tensor.to(dtypes[name]))
            whole.discard(name)
        for name in whole:
            assert adapter is not None
            yield name, adapter.whole[name]

    give(model, values)
    if adapter is None:
        return LoadReport(folder, tuple(found), resized, new)
    new = tuple(name for name in new if name not in adapter.whole)
    return LoadReport(adapter.folder, tuple(found), resized, new, adapter.names)


def _check_tied(folder: Path, head: Tensor, embedding: Tensor) -> None:
    if not torch.equal(head, embedding[: len(head)]):
        raise UserError(
            f"{folder}: config.json ties the embeddings, but lm_head.weight is another tensor than the embedding: "
            "set tie_word_embeddings to false there to keep it"
        )


def _filled_up(tensor: Tensor, old: int, rows: int) -> Tensor:
    """A tensor of so many rows; those from `old` on are the mean of those before."""
    out = tensor.new_empty(rows, *tensor.shape[1:])
    out[: len(tensor)] = tensor
    out[old:] = out[:old].mean(0, dtype=torch.promote_types(out.dtype, torch.float32)).to(out.dtype)
    return out


def _dtype_of(config: GPTConfig, file: Path) -> torch.dtype:
    """Of the first weight in a file."""
    names = canonical_names(config, shapes_of([file]))
    dtype = next((tensor.dtype for name, tensor in read_tensors(file) if name in names), torch.float32)
    if not dtype.is_floating_point:
        raise UserError(f"{file}: the weights are {dtype}: floating-point weights are expected")
    return dtype


def quantization_in(folder: Path) -> Quantization | None:
    """How a folder's matrices are held in few bits; None: they are not. Raises UserError for adapters beside such ones."""
    own = base_of(folder) if is_adapter(folder) else folder
    quantization = quantization_of(read_json(own), str(own / "config.json"))
    if quantization is not None and own != folder:
        raise UserError(
            f"{folder}: its base {own} is quantised ({quantization}): adapters need the model it was made from"
        )
    return quantization


def _check_size(folder: Path, config: GPTConfig, files: list[Path], least_bits: int = 8) -> None:
    """Refuses a config.json that claims more than the files can hold, before anything is allocated."""
    on_disk = sum(file.stat().st_size for file in files)
    if (n_params := count_params(config).total) * least_bits > on_disk * 8:
        raise UserError(
            f"{folder}: config.json asks for {n_params} parameters, the weights are {on_disk} bytes: they do not "
            "belong together"
        )


def load_model(folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> GPT:
    """A model from a Hugging Face folder or checkpoint, in evaluation mode.

    Args:
        folder: see `storage.resolve_model` for what may be named on a command line.
        dtype: of the parameters. Default: as saved.
        device: where the parameters live.

    Raises:
        UserError: for an unsupported or damaged folder; sizes are checked before anything is allocated.
    """
    config = read_config(folder)
    if (labels := read_labels(folder)) is not None:
        can = ": `llmkit score` asks it for scores" if len(labels) == 1 else ""
        raise UserError(f"{folder}: scores whole texts ({', '.join(labels[:5])}): it holds no language model{can}")
    files, quantization = weight_files(folder), quantization_in(folder)
    _check_size(folder, config, files, 8 if quantization is None else quantization.bits)
    with torch.device("meta"):
        model = GPT(config)
    if quantization is not None:
        _load_quantized(model, folder, files, quantization, dtype, device)
        return model.eval().requires_grad_(False)
    if dtype is None:
        dtype = _dtype_of(config, files[0])
    model = model.to(dtype=dtype).to_empty(device=device)
    load_weights(model, folder)
    return model.eval().requires_grad_(False)


def load_classifier(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", n_scores: int | None = None
) -> SequenceClassifier:
    """A classifier or reward model from a Hugging Face folder or checkpoint, in evaluation mode.

    Nothing of it is made up: a head that is missing, or that was never trained, is refused.

    Args:
        folder: see `storage.resolve_model` for what may be named on a command line.
        dtype: of the parameters. Default: as saved.
        device: where the parameters live.
        n_scores: how many scores it must have: 1 for a reward model. Default: any number.

    Raises:
        UserError: for an unsupported or damaged folder, or one whose head is none; before anything is allocated.
    """
    config, labels, files = read_config(folder), read_labels(folder), weight_files(folder)
    quantization = quantization_in(folder)
    if labels is None:
        raise UserError(
            f"{folder}: holds a language model, no scores of texts: train a reward model from it with `stage: reward`"
        )
    if n_scores not in (None, len(labels)):
        raise UserError(
            f"{folder}: has {len(labels)} scores ({', '.join(labels[:5])}), {n_scores} expected: a reward model is "
            "trained with `stage: reward, objective: rank`"
        )
    # There is no head for words.
    bare = config.model_copy(update={"tie_embeddings": True})
    _check_size(folder, bare, files, 8 if quantization is None else quantization.bits)
    with torch.device("meta"):
        model = SequenceClassifier(config, len(labels))
    if quantization is not None:
        _load_quantized(model, folder, files, quantization, dtype, device)
        return model.eval().requires_grad_(False)
    found = (*canonical_names(config, shapes_of(files)).values(), *adapter_heads(folder))
    if missing := [name for name in model.head_names if name not in found]:
        raise UserError(
            f"{folder}: the weights hold no {missing[0]}: the head, and with it every score, would be random"
        )
    model = model.to(dtype=_dtype_of(config, files[0]) if dtype is None else dtype).to_empty(device=device)
    load_weights(model, folder, may_hold=("lm_head.weight",))
    if not model.get_parameter("score.weight" if config.causal else "classifier.weight").any():
        raise UserError(f"{folder}: every weight of the head is 0: it was never trained")
    return model.eval().requires_grad_(False)


def _load_quantized(
    model: nn.Module, folder: Path, files: list[Path], quantization: Quantization, dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:  # fmt: skip
    """Gives a model without memory the codes and scales of a quantised folder, if all of them are there and fit."""
    if wrong := misfits(stored_shapes(model, quantization), shapes_of(files)):
        raise UserError("\n".join(f"{folder}: {line}" for line in wrong))
    stored = (pair for file in files for pair in read_tensors(file))
    fill(model, stored, quantization, str(folder), dtype, device)
