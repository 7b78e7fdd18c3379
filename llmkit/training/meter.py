"""How fast a run is, and what it runs on."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from llmkit.training.config import RunConfig
from llmkit.training.dist import Ranks
from llmkit.training.log import RunLog

Metrics = dict[str, float]


class Meter:
    """Speed of the steps themselves: on the live line, in timing.jsonl, and as plain lines every `log.every` steps."""

    def __init__(self, config: RunConfig, log: RunLog, world: int, flops_per_token: float, peak: float | None):
        """`peak`: FLOP a second of one device, against which the utilisation is measured; None: it isn't known."""
        self._config, self._log = config, log
        self._work, self._peak = flops_per_token, peak and peak * world
        self.seconds, self.tokens, self.steps = 0.0, 0.0, 0
        self.speed = ""

    def step(self, step: int, metrics: Metrics, seconds: float) -> None:
        """Takes the numbers of one step, `tokens` among them, and the time it took."""
        self.tokens += metrics["tokens"]
        self.seconds += seconds
        self.steps += 1
        loss = f"loss {metrics['loss']:.4f}"
        if step % self._config.log.every == 0 or step == self._config.last_step:
            speed = self.tokens / self.seconds
            record = {"step": step, "step_s": self.seconds / self.steps, "tokens_per_s": speed}
            self.speed = f" | {speed:,.0f} tok/s"
            if self._peak and self._work:
                record["mfu_pct"] = 100 * speed * self._work / self._peak
                self.speed += f" | MFU {record['mfu_pct']:.1f} %"
            self._log.timing(record)
            eta = (self._config.last_step - step) * record["step_s"]
            details = f"norm {metrics['grad_norm']:.3f} | lr {metrics['lr']:.2e}"
            self._log.line(f"step {step:6d} | {loss} | {details}{self.speed} | ETA {eta:.0f} s")
            self.seconds, self.tokens, self.steps = 0.0, 0.0, 0
        self._log.advance(loss + self.speed)


def environment(ranks: Ranks) -> dict[str, Any]:
    """What the run was made with, for those who must make it again."""
    packages = {}
    for name in ("llmkit", "torch", "numpy", "tokenizers", "tiktoken", "datasets", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(ranks.device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "world_size": ranks.processes,
    }
