"""What a run shows and records.

`metrics.jsonl` holds only what is deterministic, a line a step and one for each evaluation; `timing.jsonl` holds speeds
and times. `train.log` gets plain lines; a terminal gets one live line beside them. Only rank 0 writes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmkit import storage
from llmkit.training.watch import Watch

Numbers = dict[str, Any]


class _Lines:
    """An append-only file of JSON lines that can be cut back to an earlier length."""

    def __init__(self, path: Path):
        self.path = path
        self.file = path.open("ab", buffering=0)  # a line reaches the kernel at once: it survives kill -9

    def append(self, record: Numbers) -> None:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        storage.write_all(self.file.fileno(), memoryview(line))

    @property
    def length(self) -> int:
        return self.file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        storage.disk.sync(self.file.fileno())


class RunLog:
    """The log of one process. On other ranks than 0 every method does nothing."""

    def __init__(self, out: Path, active: bool = True, tensorboard: bool = False):
        self.out, self.active = out, active
        self.bar: tqdm[Any] | None = None
        self._board: Any = None
        self._want_board = tensorboard and active
        self.watch = Watch()  # it begins anew whenever the metrics are cut back
        if active:
            out.mkdir(parents=True, exist_ok=True)
            self._text = (out / "train.log").open("a", encoding="utf-8", buffering=1)
            self.metrics_file, self.samples_file = _Lines(out / "metrics.jsonl"), _Lines(out / "samples.jsonl")
            self._timing = _Lines(out / "timing.jsonl")

    def say(self, text: str) -> None:
        """One plain line: to the terminal above the live line, and to train.log with the time."""
        if not self.active:
            return
        self._text.write("".join(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n" for line in text.splitlines()))
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def line(self, text: str) -> None:
        """A line of progress: to train.log, and to the terminal unless the live line is there."""
        if self.active and self.bar is not None:
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        else:
            self.say(text)

    def metrics(self, record: Numbers) -> None:
        """Appends a line to metrics.jsonl; numbers also go to TensorBoard."""
        if self.active:
            self.metrics_file.append(record)
            self._to_board(record)
            for sentence in self.watch.see(record):
                self.say(sentence)

    def samples(self, record: Numbers) -> None:
        if self.active:
            self.samples_file.append(record)

    def timing(self, record: Numbers) -> None:
        if self.active:
            self._timing.append(record)
            self._to_board(record)

    def _to_board(self, record: Numbers) -> None:
        if not self._want_board:
            return
        if self._board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._want_board = False
                return
            self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=record["step"])
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(key, value, record["step"])

    def lengths(self) -> dict[str, int]:
        """Bytes of the deterministic files, for a checkpoint."""
        if not self.active:
            return {}
        return {"metrics.jsonl": self.metrics_file.length, "samples.jsonl": self.samples_file.length}

    def cut(self, lengths: dict[str, int]) -> None:
        """Goes back to what a checkpoint says was written, so that no step is ever logged twice."""
        if not self.active:
            return
        if self._board is not None:  # a new one begins by discarding what lies beyond its first step
            self._board.close()
            self._board = None
        for lines in (self.metrics_file, self.samples_file):
            keep = lengths.get(lines.path.name, 0)
            if lines.length < keep:
                self.say(f"{lines.path}: {keep - lines.length} bytes are missing: the file was cut by something else")
            os.truncate(lines.path, min(keep, lines.length))
        self.watch = Watch()
        for record in read_lines(self.metrics_file.path):
            for _ in self.watch.see(record):  # it was said when the step was made
                pass

    def sync(self) -> None:
        if self.active:
            self.metrics_file.sync()
            self.samples_file.sync()

    def start_bar(self, step: int, steps: int) -> None:
        """The live line: on a terminal only, so that log files don't fill with carriage returns."""
        if self.active and sys.stderr.isatty():
            self.bar = tqdm(initial=step, total=steps, unit="step", dynamic_ncols=True, file=sys.stderr, smoothing=0.05)

    def rewind(self, step: int) -> None:
        """The live line goes back to a step."""
        if self.bar is not None:
            self.bar.n = step
            self.bar.refresh()

    def advance(self, shown: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(1)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self._board is not None:
            self._board.close()
        if self.active:
            self._text.close()


def read_lines(path: Path) -> list[Numbers]:
    """The complete lines of a JSON-lines file; a last line without an end, from a killed writer, is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def plot_curves(out: Path, title: str) -> Path | None:
    """Draws plots/loss.png from metrics.jsonl; None where Matplotlib is not installed or there is nothing to draw."""
    records = read_lines(out / "metrics.jsonl")
    names = ["train/loss", *sorted({k for r in records for k in r if k.startswith("valid") and k.endswith("/loss")})]
    curves = {n: [(r["step"], r[n]) for r in records if n in r] for n in names}
    if not any(curves.values()):
        return None
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=130)
    for name, points in curves.items():
        if points:
            train = name == "train/loss"
            axes.plot(
                *zip(*points, strict=True),
                label=name,
                lw=0.8 if train else 2,
                alpha=0.5 if train else 1,
                marker="" if train else "o",
                ms=3,
            )
    first = next(points[0][1] for points in curves.values() if points)
    axes.set(xlabel="step", ylabel="nats per token", title=title, ylim=(0, 1.05 * first))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path = out / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
