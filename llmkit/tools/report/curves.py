"""The logs of a run as curves of a bounded number of points."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.config import UserError

Record = dict[str, Any]
Points = list[tuple[int, float]]
_LINES = 20_000  # of a log that are parsed; a longer one is read at equal distances, evaluations whole


def read_some(path: Path, most: int = _LINES) -> list[Record]:
    """The complete lines of a log, or about `most` of them: those of evaluations all, those of steps at equal distances."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    stride = max(1, math.ceil(len(lines) / most))
    kept = [line for i, line in enumerate(lines) if not i % stride or b'"train/' not in line]
    return parsed(kept, path)


def parsed(lines: Sequence[bytes], path: Path) -> list[Record]:
    """Lines as JSON objects. Raises UserError naming the file where one is none."""
    try:
        return [json.loads(line) for line in lines]
    except ValueError as e:
        raise UserError(f"{path}: a line is not JSON ({e}): move the file away, or mend it") from None


def thin(points: Points, most: int) -> Points:
    """At most about `most` points, with the first, the last and every stretch's lowest and highest: no spike is lost."""
    if len(points) <= most:
        return points
    width = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for at in range(0, len(points), width):
        stretch = range(at, min(at + width, len(points)))
        kept.add(min(stretch, key=lambda i: points[i][1]))
        kept.add(max(stretch, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def curves_of(records: Sequence[Record], most: int) -> dict[str, list[list[float]]]:
    """By metric, the steps and the values, as far as they are finite numbers that change or are few.

    Args:
        records: lines of metrics.jsonl or timing.jsonl.
        most: points of a curve.
    """
    found: dict[str, Points] = {}
    for record in records:
        for name, value in record.items():
            # A hash is a name, and no quantity.
            if name == "step" or name.endswith("_hash") or isinstance(value, bool):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append((record["step"], value))
    return {name: _columns(thin(points, most)) for name, points in found.items()}


def _columns(points: Points) -> list[list[float]]:
    return [[step for step, _ in points], [short(value) for _, value in points]]


def short(value: float, digits: int = 6) -> float:
    """A number with as many digits as anybody reads."""
    number = float(f"{value:.{digits}g}")
    return int(number) if number.is_integer() and abs(number) < 1e15 else number
