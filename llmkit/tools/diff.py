"""`llmkit diff`: what differs between two runs or checkpoints: recipe, data, code, packages, metrics, weights."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.config import UserError, flatten, parse_yaml
from llmkit.lineage import manifest_of
from llmkit.storage import resolve_model, to_json
from llmkit.tools.comparison import markdown

Record = dict[str, Any]
Pair = tuple[Any, Any]
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


@dataclass(frozen=True)
class Side:
    """One of the two."""

    given: str
    folder: Path
    """The checkpoint, or another model's folder."""
    run: Path | None
    """The run that it belongs to, where one was given or lies around it."""
    manifest: Record

    @classmethod
    def find(cls, given: str) -> Side:
        folder = resolve_model(given)
        run = folder.parent.parent if folder.parent.name == "checkpoints" else None
        return cls(given, folder, run, manifest_of(folder) or {})

    @property
    def recipe(self) -> Record:
        if (kept := self.manifest.get("recipe")) is not None:
            return dict(kept)
        file = None if self.run is None else self.run / "recipe.yaml"
        return flatten(parse_yaml(file.read_text("utf-8"), str(file))[0]) if file is not None and file.is_file() else {}

    @property
    def environment(self) -> Record:
        """Of the run; of a checkpoint that was taken out of it, the packages that its manifest names."""
        file = None if self.run is None else self.run / "environment.json"
        if file is not None and file.is_file():
            return flatten(json.loads(file.read_bytes()))
        return flatten({"packages": (self.manifest.get("lineage") or {}).get("packages") or {}})

    def metrics(self) -> dict[str, float]:
        """The last value of every number up to the checkpoint's step."""
        found: dict[str, float] = {}
        file = None if self.run is None else self.run / "metrics.jsonl"
        step = self.manifest.get("step")
        for line in file.read_bytes().splitlines() if file is not None and file.is_file() else []:
            record = json.loads(line)
            if step is None or record.get("step", 0) <= step:
                found |= {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return found


def run(args: argparse.Namespace) -> int:
    """Prints what differs, section by section, or all of it as JSON."""
    a, b = Side.find(args.a), Side.find(args.b)
    if a.folder.resolve() == b.folder.resolve():
        raise UserError(f"{args.a} and {args.b}: are the same folder: name two")
    told = compare(a, b, args.weights)
    if args.json:
        print(to_json(told), end="")
        return 0
    print(f"A  {a.folder}\nB  {b.folder}")
    for line in _lines(told):
        print(line)
    return 0


def compare(a: Side, b: Side, weights: bool = True) -> Record:
    """All that differs, as JSON: key -> [A's value, B's], null where one has none."""
    facts = [_facts(side) for side in (a, b)]
    told: Record = {
        "recipe": differing(a.recipe, b.recipe),
        "origin": differing(*facts),
        "environment": differing(a.environment, b.environment),
        "metrics": differing(a.metrics(), b.metrics()),
    }
    return {**told, "weights": distances(a.folder, b.folder)} if weights else told


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Pair]:
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def _facts(side: Side) -> Record:
    """What the two are made of, by hashes."""
    manifest = side.manifest
    lineage = manifest.get("lineage") or {}
    told = {
        key: manifest.get(key) for key in ("step", "data", "tokenizer", "world_size", "quantize", "merge", "average")
    }
    parents = {f"parent {p['role']}": p["manifest"] or p["path"] for p in lineage.get("parents", [])}
    return {**flatten(told), "version": lineage.get("version"), "code": lineage.get("code"), **parents}


# --- weights ---------------------------------------------------------------------------------------------------------


def distances(a: Path, b: Path) -> Record:
    """How far weights have moved, by layer: |B - A| / |A| over all of a layer's tensors, and the largest change of a number.

    A tensor at a time: memory is that of the largest one. Tensors that only one of the two has, or that have other shapes,
    are named.
    """
    import torch

    from llmkit.model.weights import read_tensors, weight_files

    tensors = {name: tensor for file in weight_files(a) for name, tensor in read_tensors(file)}
    groups: dict[str, list[float]] = {}
    odd: dict[str, Pair] = {}
    for file in weight_files(b):
        for name, new in read_tensors(file):
            old = tensors.pop(name, None)
            if old is None or old.shape != new.shape:
                odd[name] = (None if old is None else list(old.shape), list(new.shape))
                continue
            moved, was = new.to(torch.float64) - old.to(torch.float64), old.to(torch.float64)
            total = groups.setdefault(_group(name), [0.0, 0.0, 0.0])
            total[0] += float(moved.square().sum())
            total[1] += float(was.square().sum())
            total[2] = max(total[2], float(moved.abs().max()) if moved.numel() else 0.0)
    odd |= {name: (list(old.shape), None) for name, old in tensors.items()}
    by_layer = {
        name: {"relative": math.sqrt(d / w) if w else (0.0 if not d else None), "largest": top}
        for name, (d, w, top) in groups.items()
    }
    return {"layers": by_layer, "other_shapes": odd}


def _group(name: str) -> str:
    match = _LAYER.search(name)
    if match is None:
        return name
    kind = "mlp" if "mlp" in name else "attention" if "attn" in name else "norms"
    return f"layer {match[1]} {kind}"


# --- as text ---------------------------------------------------------------------------------------------------------

_TITLES = {"recipe": "recipe", "origin": "data, code, parents", "environment": "environment", "metrics": "last metrics"}


def _lines(told: Record) -> Iterator[str]:
    for key, title in _TITLES.items():
        rows = [(name, _text(a), _text(b)) for name, (a, b) in told[key].items()]
        yield "\n" + (markdown([(title, "A", "B"), *rows], []).strip() if rows else f"{title}: the same")
    if "weights" in told:
        yield from _weights(told["weights"])


def _weights(told: Record) -> Iterator[str]:
    layers = told["layers"]
    moved = {name: one for name, one in layers.items() if one["largest"]}
    rows = [
        (name, "from 0" if one["relative"] is None else f"{one['relative']:.3g}", f"{one['largest']:.3g}")
        for name, one in moved.items()
    ]
    if layers:
        head = ("weights", "relative change", "largest change")
        yield "\n" + (markdown([head, *rows], []).strip() if rows else "weights: bitwise the same")
    if rows and len(moved) < len(layers):
        yield f"\nthe same: {', '.join(name for name in layers if name not in moved)}"
    if odd := told["other_shapes"]:
        shown = (
            f"{n} ({'only B' if a is None else 'only A' if b is None else f'{a} -> {b}'})" for n, (a, b) in odd.items()
        )
        yield f"\nof other shapes: {', '.join(shown)}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "-" if value is None else " ".join(str(value).replace("|", "/").split())
    return text if len(text) <= 48 else f"{text[:45]}..."
