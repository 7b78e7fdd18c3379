"""What a job takes on this machine's CPU: memory counted, time told from one block, one slice of the loss and one update.

The three are run for a moment at the recipe's sizes, and the whole is added up from them. A calibration corrects for what
no part shows: holes in the heap, the loader beside it. It comes from runs of two recipes (scripts/bench/plan.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from llmkit.config import UserError
from llmkit.losses import linear_cross_entropy
from llmkit.model.config import count_params
from llmkit.model.gpt import Block, KVCache, causal_mask
from llmkit.model.rope import rope_tables
from llmkit.plan.cost import activation_bytes, block_bytes, flops_per_token
from llmkit.plan.job import Job, Net, Pass
from llmkit.plan.report import duration
from llmkit.training.optim import orthogonalize

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_WORK = 2e10  # FLOP of one try: some tenths of a second on one core
_TRIES, _PATIENCE_S = 3, 0.7  # of each part, and seconds after which one try is enough
_LARGEST = 2**31  # bytes of a block that is tried
_AT_ONCE = 2**28  # bytes of what a try computes, about


@dataclass(frozen=True)
class Calibration:
    """What measured runs needed beyond the sum of their parts."""

    time: float = 0.95
    """Seconds measured / seconds told."""
    activations: float = 1.25
    """The same of the bytes of forward and backward pass."""
    base_bytes: float = 1.2e8
    """And what every run needs, however small: buffers of the libraries, the loader's rows."""


def read_calibration(file: str | None) -> Calibration:
    """From the file that the bench has written; None: what it found where llmkit was made. Raises UserError."""
    if file is None:
        return Calibration()
    try:
        told = json.loads(Path(file).read_bytes())
        return Calibration(**{f.name: float(told[f.name]) for f in fields(Calibration)})
    except OSError as e:
        raise UserError(f"--calibration {file}: {e.strerror}: make it with scripts/bench/plan.py") from None
    except (ValueError, KeyError, TypeError):
        names = ", ".join(f.name for f in fields(Calibration))
        raise UserError(
            f"--calibration {file}: expected JSON with {names}, as scripts/bench/plan.py writes it"
        ) from None


@dataclass(frozen=True)
class Here:
    """A job on this machine."""

    peak_bytes: float
    """Most resident memory, beyond what the imports take."""
    seconds: dict[str, float] | None
    """Of a step, by what they are spent on; None: the model is too large to try a block of it."""

    def lines(self, job: Job) -> Iterator[str]:
        """For people."""
        yield f"process      about {self.peak_bytes / 1e9:.2f} GB at most, beyond the imports' 0.4"
        if self.seconds is None:
            yield "time         not told: the model is too large to try a block of it here; see --gpu"
            return
        total = sum(self.seconds.values())
        shares = ", ".join(f"{name} {duration(s)}" for name, s in self.seconds.items() if s >= 0.01 * total)
        eager = "; compiled it is faster, after a minute" if job.compiled else ""
        yield (
            f"time         about {duration(total)} a step on {torch.get_num_threads()} thread(s) ({shares}), "
            f"{duration(job.steps * total)} for {job.steps:,} steps{eager}"
        )
        for note in job.notes:
            yield f"assumed      {note}"


def predict(job: Job, calibration: Calibration | None = None) -> Here:
    """Memory and time of a job in one process on this CPU, evaluations left out.

    Args:
        job: the recipe's.
        calibration: default: the constants above.
    """
    corrected = calibration or Calibration()
    blocks = [8 * count_params(net.model).hidden / net.model.n_layers for net in job.nets]
    seconds = None
    if max(blocks) <= _LARGEST:
        seconds = {name: corrected.time * s for name, s in _seconds(job).items()}
    return Here(memory_bytes(job) + corrected.base_bytes + (corrected.activations - 1) * activation_peak(job), seconds)


# --- memory ----------------------------------------------------------------------------------------------------------


def activation_peak(job: Job) -> float:
    """Bytes that come and go: the update's, or the cache's of a rollout."""
    tokens = job.micro_rows(1) * job.row_len
    update = sum(
        activation_bytes(net.model, job.row_len, tokens, net.precision, job.loss_chunk, job.recompute)
        for net in job.trained
    )
    caches = [float(job.cache_bytes(p)) for p in job.passes if p.kind == "write"]
    return max(update, *caches) if caches else update


def memory_bytes(job: Job) -> float:
    """All of a job in one process: what is held, the copy that saving writes from, and what comes and goes."""
    return sum(net.state_bytes for net in job.nets) + job.checkpoint_bytes + activation_peak(job)


# --- time ------------------------------------------------------------------------------------------------------------


def _seconds(job: Job) -> dict[str, float]:
    names = {"train": "forward, backward", "ask": "forward of others", "write": "answers"}
    spent: dict[str, float] = {}
    for p in job.passes:
        tokens = job.micro_rows(1) * job.row_len
        if p.kind == "write":
            seconds = _writing(p)
        else:
            train = p.kind == "train"
            block = _block_seconds(p.net, job.row_len, tokens, train)
            if train and job.recompute:
                block += _block_seconds(p.net, job.row_len, tokens, False)
            head = _head_seconds(p.net, tokens, job.loss_chunk, train) if p.with_head else 0.0
            seconds = p.tokens / tokens * (p.net.model.n_layers * block + head)
        spent[names[p.kind]] = spent.get(names[p.kind], 0.0) + seconds
    for net in job.trained:
        n_micro = max(1.0, sum(p.tokens for p in job.passes if p.kind == "train" and p.net is net) / tokens)
        spent["optimizer"] = spent.get("optimizer", 0.0) + _update_seconds(net, job.optimizer, n_micro)
    return spent


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some tries: what else the machine does only ever adds to it.

    On one thread they are that thread's own, so that other work counts even less.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best, begun = float("inf"), clock()
    run()
    for _ in range(_TRIES):
        start = clock()
        run()
        best = min(best, clock() - start)
        if clock() - begun > _PATIENCE_S:
            break
    return best


def _block_seconds(net: Net, row_len: int, tokens: int, train: bool) -> float:
    """One block on a micro-batch; where that is much, told from fewer or shorter rows by their FLOPs."""
    model = net.model
    per_token = flops_per_token(model.model_copy(update={"n_layers": 1, "vocab_size": 1}), row_len)
    most = min(_WORK / per_token, _AT_ONCE / block_bytes(model, row_len, net.precision))
    length = min(row_len, max(8, min(4096, int(most))))
    rows = max(1, min(tokens // row_len, int(most / length)))
    one = model.model_copy(update={"n_layers": 1, "n_full_layers": 0, "vocab_size": 1, "max_seq_len": length})
    block = Block(one, 0).to(_DTYPES[net.precision]).train(train)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
        p.requires_grad_(train)
    x_BTD = torch.randn(rows, length, model.d_model).to(_DTYPES[net.precision]).requires_grad_(train)
    rope = None if model.positions == "learned" else rope_tables(one, torch.arange(length)[None])

    mask = causal_mask(0, length, x_BTD.device) if model.causal else None  # packed rows have one

    def run() -> None:
        with torch.set_grad_enabled(train):
            out_BTD, _ = block(x_BTD, rope, mask, model.causal, None)
            if train:
                out_BTD.backward(torch.ones_like(out_BTD))

    tried = flops_per_token(one, length) * rows * length
    return _best(run) * per_token * tokens / tried


def _head_seconds(net: Net, tokens: int, chunk: int, train: bool) -> float:
    """The loss over a micro-batch: its chunks, and what it does once, which is told from two sizes."""
    model, V = net.model, net.model.vocab_size or 1
    n_most = min(2 * chunk, tokens)
    rows = int(min(_WORK / (3 * model.d_model * n_most), _AT_ONCE / 8 / max(model.d_model, n_most)))
    rows = min(V, max(1, rows))  # of a large vocabulary a part
    weight_VD = torch.randn(rows, model.d_model).to(_DTYPES[net.precision]).requires_grad_(train)
    sizes = (min(chunk, tokens), n_most)
    spent = []
    for n in sizes:
        hidden_ND = torch.randn(n, model.d_model).to(_DTYPES[net.precision]).requires_grad_(train)
        labels_N = torch.zeros(n, dtype=torch.int64)

        def run(hidden_ND: torch.Tensor = hidden_ND, labels_N: torch.Tensor = labels_N) -> None:
            with torch.set_grad_enabled(train):
                total = linear_cross_entropy(hidden_ND, weight_VD, labels_N, chunk=chunk).total
                if train:
                    total.backward()
                    weight_VD.grad = None

        spent.append(_best(run) * V / rows)
    if sizes[0] == sizes[1]:
        return spent[0] * tokens / sizes[0]
    each = max(0.0, spent[1] - spent[0]) / (sizes[1] - sizes[0])
    return max(0.0, spent[0] - each * sizes[0]) + each * tokens


def _update_seconds(net: Net, optimizer: str, n_micro: float) -> float:
    """Optimizer and gradients: passes over memory, at the rate of one over a slice; Muon's products beside them."""
    n, n_slice = net.cost.n_trained_params, 1 << 22
    a, b = torch.ones(n_slice), torch.ones(n_slice)
    per_weight = _best(lambda: a.add_(b)) / n_slice  # reads two, writes one
    seconds = n * per_weight * (1.5 * n_micro + 6)
    if optimizer == "muon":
        hidden = count_params(net.model).hidden
        D, width = net.model.d_model, min(net.model.width_of_mlp, 4 * net.model.d_model)
        D, width = min(D, 1024), min(width, 4096)
        matrix = torch.randn(1, D, width)
        scale = max(1.0, net.model.d_model / D)
        seconds += _best(lambda: orthogonalize(matrix)) * hidden / (D * width) * scale
    return seconds


def _writing(p: Pass) -> float:
    """Answers side by side, a token at a time, with half of the cache filled."""
    model, dtype = p.net.model, _DTYPES[p.net.precision]
    filled = max(1, p.seq_len - p.new_tokens // 2)
    per_token = flops_per_token(model.model_copy(update={"n_layers": 1, "vocab_size": 1}), filled)
    most = max(1, int(min(_WORK / per_token, _AT_ONCE / block_bytes(model, filled, p.net.precision))))
    filled = min(filled, most)
    rows = min(p.side_by_side, max(1, most // filled))
    one = model.model_copy(update={"n_layers": 1, "n_full_layers": 0, "vocab_size": 1, "max_seq_len": filled + 1})
    block = Block(one, 0).to(dtype).eval()
    cache = KVCache(one, rows, filled + 1, dtype)
    x_BTD = torch.randn(rows, filled, model.d_model).to(dtype)
    learned, x_B1D = model.positions == "learned", x_BTD[:, :1]
    with torch.no_grad():
        block(x_BTD, None if learned else rope_tables(one, torch.arange(filled)[None]), None, True, cache)
    rope = None if learned else rope_tables(one, torch.tensor([[filled]]))
    n_rows = min(model.vocab_size or 1, max(1, _AT_ONCE // 8 // max(model.d_model, rows)))
    weight_VD = torch.randn(n_rows, model.d_model).to(dtype)

    def run() -> None:
        cache.length = filled
        with torch.no_grad():
            block(x_B1D, rope, None, False, cache)

    head = _best(lambda: torch.softmax((x_B1D[:, 0] @ weight_VD.t()).float(), -1))
    token = model.n_layers * _best(run) + head * (model.vocab_size or 1) / len(weight_VD)
    return p.tokens / rows * token
