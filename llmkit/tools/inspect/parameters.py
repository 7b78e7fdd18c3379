"""The parameters of a model folder: names, shapes, norms, and totals by kind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llmkit.config import UserError
from llmkit.model.adapters import WEIGHTS, is_adapter
from llmkit.model.weights import read_tensors, weight_files


@dataclass(frozen=True)
class Parameter:
    """One tensor of a folder."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    n: int
    n_bytes: int
    norm: float | None
    """L2; None: the numbers are codes of a quantisation."""
    mean: float | None
    std: float | None
    largest: float | None
    """Magnitude."""

    @property
    def kind(self) -> str:
        """What part of the network it belongs to, by its name."""
        name = self.name
        if "lora_" in name:
            return "adapters"
        if "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            return "embeddings"
        if name.startswith(("lm_head", "score", "classifier")):
            return "head"
        if "norm" in name or ".ln_" in name:
            return "norms"
        if "attn" in name:
            return "attention"
        if "router" in name or name.endswith("mlp.gate.weight"):
            return "routers"
        return "experts" if "expert" in name else "mlp" if "mlp" in name else "other"


def parameters_of(folder: Path) -> list[Parameter]:
    """Every tensor of a model's weights, read one at a time. Raises UserError if there are none."""
    files = [folder / WEIGHTS] if is_adapter(folder) else weight_files(folder)
    found = []
    for file in files:
        for name, tensor in read_tensors(file):
            told: tuple[float | None, ...] = (None, None, None, None)
            if tensor.is_floating_point() and tensor.numel():
                wide = tensor.to(torch.float32) if tensor.dtype != torch.float64 else tensor
                told = (
                    float(wide.norm()),
                    float(wide.mean()),
                    float(wide.std(correction=0)),
                    float(wide.abs().max()),
                )
            size = tensor.numel() * tensor.itemsize
            dtype = str(tensor.dtype).removeprefix("torch.")
            found.append(Parameter(name, tuple(tensor.shape), dtype, tensor.numel(), size, *told))
    if not found:
        raise UserError(f"{folder}: its weights hold no tensor")
    return sorted(found, key=_by_layer)


def _by_layer(parameter: Parameter) -> list[tuple[int, int, str]]:
    """Layers in the order of their numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parameter.name.split(".")]


def lines(folder: Path, found: list[Parameter]) -> Iterator[str]:
    """A table of the parameters, then the totals by kind."""
    file = folder / "config.json"
    if file.is_file():
        config = json.loads(file.read_text("utf-8"))
        yield f"{folder}: {', '.join(config.get('architectures') or ['?'])}"
    rows: list[tuple[str, ...]] = [("name", "shape", "dtype", "parameters", "norm", "mean", "std", "largest")]
    for p in found:
        numbers = tuple("-" if v is None else _short(v) for v in (p.norm, p.mean, p.std, p.largest))
        rows.append((p.name, " x ".join(map(str, p.shape)), p.dtype, f"{p.n:,}", *numbers))
    yield from _table(rows)
    yield ""
    total = sum(p.n for p in found)
    totals: list[tuple[str, ...]] = [("kind", "tensors", "parameters", "share", "MB", "norm")]
    for kind in dict.fromkeys(p.kind for p in found):
        mine = [p for p in found if p.kind == kind]
        n, norms = sum(p.n for p in mine), [p.norm for p in mine if p.norm is not None]
        norm = _short(math.hypot(*norms)) if norms else "-"
        size = f"{sum(p.n_bytes for p in mine) / 1e6:.2f}"
        totals.append((kind, f"{len(mine):,}", f"{n:,}", f"{n / total:.1%}", size, norm))
    size = f"{sum(p.n_bytes for p in found) / 1e6:.2f}"
    totals.append(("all", f"{len(found):,}", f"{total:,}", "100.0%", size, ""))
    yield from _table(totals)
    if bad := [p.name for p in found if p.norm is not None and not math.isfinite(p.norm)]:
        yield f"not finite: {', '.join(bad)}"


def _short(value: float) -> str:
    return f"{value:.4g}"


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (c.ljust(w) if i < 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join(cells).rstrip()
