"""`llmkit merge`: one plain model from adapters and the model they belong to.

Works on folders, a tensor at a time: memory is that of the largest tensor, not of the model.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.config import UserError
from llmkit.model.adapters import CONFIG, OWN, Adapter, base_of, is_adapter, read_adapter
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_card
from llmkit.model.hf import read_config, read_json, read_labels
from llmkit.model.layouts import canonical_names, from_disk, to_disk
from llmkit.storage import MANIFEST, Draft, machine_errors, resolve_model, to_json
from llmkit.tools.average import Source
from llmkit.training.checkpoint import index_of, safetensors_stream, shard

_SMALL = (".json", ".txt", ".model", ".jinja")
_NOT_COPIED = ("config.json", CONFIG, OWN, MANIFEST)


def merge(folder: Path, out: Path) -> Path:
    """Writes a model with its adapters merged in, whole or not at all, in the dtypes of the base; returns the base.

    Args:
        folder: adapters, ours or PEFT's.
        out: is not there yet.

    Raises:
        UserError: the base is missing or another than the adapters were trained beside, or they don't fit it.
    """
    base = base_of(folder, check=True)
    config = read_config(base)
    adapter = read_adapter(folder, config)
    told = {"base": str(base), "adapters": str(folder)}
    with contextlib.ExitStack() as stack, machine_errors(out.parent):
        source = Source(base, False, stack)
        at = _weights(config, source, adapter, classifies=read_labels(folder) is not None)
        like = {name: source.like(place) for name, place in at.items()}
        adapter.check({n: tuple(t.shape) for n, t in from_disk(config, like).items()} | _new(adapter, at, config))
        dtype = next(iter(like.values())).dtype
        like |= {
            n: t.to(device="meta", dtype=dtype) for n, t in to_disk(config, adapter.whole).items() if n not in like
        }
        shards = shard("model.safetensors", like)
        blobs = _small_files(folder, base, read_config(folder), dtype, told)
        if len(shards) > 1:
            blobs["model.safetensors.index.json"] = index_of(shards)
        size = sum(t.numel() * t.element_size() for t in like.values()) + sum(map(len, blobs.values())) + (1 << 16)
        draft = Draft(out, size)
        try:
            for file, part in shards.items():
                draft.write(file, safetensors_stream(part, _merged(config, source, at, adapter, part)))
            for file, content in blobs.items():
                draft.write(file, [content])
            draft.commit({"merge": told})
        except BaseException:
            draft.discard()
            raise
    return base


def _weights(config: GPTConfig, source: Source, adapter: Adapter, classifies: bool) -> dict[str, str]:
    """Names of the result -> names in the base. A classifier has no head for words, a tied one is not repeated."""
    names = {name: place for place, name in canonical_names(config, source.shapes).items()}
    if config.tie_embeddings and "lm_head.weight" in adapter.whole:
        raise UserError(f"{adapter.folder}: brings an lm_head of its own, but the base's is tied to its embeddings")
    if config.tie_embeddings or classifies:
        names.pop("lm_head.weight", None)
    return names


def _new(adapter: Adapter, at: dict[str, str], config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that the base doesn't have, by our names: heads of scores, which are as wide as the model."""
    new = {n: t for n, t in adapter.whole.items() if n.startswith(("score.", "dense.", "classifier.")) and n not in at}
    return {n: (*t.shape[:-1], config.d_model) if t.dim() == 2 else tuple(t.shape) for n, t in new.items()}


def _merged(
    config: GPTConfig, source: Source, at: dict[str, str], adapter: Adapter, like: dict[str, Tensor]
) -> Iterator[Tensor]:
    whole = to_disk(config, adapter.whole)
    for name, t in like.items():
        if name not in at:
            yield whole[name].to(t.dtype)
            continue
        own = {n: adapter.apply(n, piece) for n, piece in from_disk(config, {name: source.get(at[name])}).items()}
        (tensor,) = to_disk(config, own).values()
        if not tensor.isfinite().all():
            raise UserError(f"{name}: the merged weights are not finite: look at both with `llmkit verify`")
        yield tensor


def _small_files(
    folder: Path, base: Path, config: GPTConfig, dtype: torch.dtype, told: dict[str, str]
) -> dict[str, bytes]:
    """What else makes a model: the base's files, those that the adapters brought in their place, config and card."""
    files = {
        p.name: p.read_bytes()
        for place in (base, folder)
        for p in sorted(place.iterdir())
        if p.is_file() and p.suffix in _SMALL and p.name not in _NOT_COPIED and not p.name.endswith(".index.json")
    }
    hf: dict[str, Any] = read_json(folder)
    facts = hf.get("llmkit") if isinstance(hf.get("llmkit"), dict) else {}
    name = str(dtype).removeprefix("torch.")
    hf |= {"dtype": name, "torch_dtype": name, "llmkit": {**(facts or {}), "merge": told}}
    files["config.json"] = to_json(hf).encode()
    task = "classify" if read_labels(folder) is not None else "generate" if config.causal else "fill"
    card = model_card(config, {"stage": "merged", "step": 0, **(facts or {})}, task)
    files["README.md"] = f"{card}\n## Merged\n\nThe adapters {folder} merged into {base}.\n".encode()
    return files


def run(args: argparse.Namespace) -> int:
    """Finds the adapters that are meant, merges them and says where the result is."""
    folder, out = resolve_model(args.adapter), Path(args.out)
    if not is_adapter(folder):
        raise UserError(f"{folder}: holds no adapters but a whole model: there is nothing to merge")
    if out.exists():
        raise UserError(f"{out}: is there already: choose another folder for the merged model")
    base = merge(folder, out)
    print(f"{out}: {folder} merged into {base}")
    return 0
