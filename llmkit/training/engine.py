"""Module + optimizer: the only place where gradients are made and applied.

Weights may be kept twice: in the precision they are computed with, and as fp32 masters that the optimizer updates.
Gradients of every micro-batch are added up in one flat fp32 buffer, which is summed over ranks as a whole: so the
result depends neither on how a batch is cut nor on the order in which gradients become ready.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import math
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from llmkit.config import TrainingStopped, UserError
from llmkit.losses import LossSum
from llmkit.model.saving import load_saved, saved_tensors
from llmkit.training.config import RunConfig
from llmkit.training.dist import Ranks
from llmkit.training.guard import Guard, learnt_windows
from llmkit.training.norms import LayerNorms, NoiseScale
from llmkit.training.optim import Optimizer, Part, check_named, copy_named, ema_decay, learning_rate
from llmkit.training.parallel import Split, is_spread, local
from llmkit.training.wholes import Wholes

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
Metrics = dict[str, float]


class MicroBatch(Protocol):
    """What the engine must know of a batch: its share of the denominator (see house rule: a loss is a sum)."""

    @property
    def denominator(self) -> float: ...

    def to(self, device: torch.device) -> Self: ...


LossFn = Callable[[nn.Module, Any], LossSum]


class Refused(TrainingStopped):
    """A step that was not made: nothing was updated. Raised, or kept in `Engine.refused` where the run goes on."""

    folder: ClassVar[str]  # of the run: where the batch that did it is kept

    def __init__(self, step: int, metrics: Metrics, why: str, tensors: Sequence[str] = (), batches: Sequence[Any] = ()):
        self.step, self.metrics, self.tensors, self.batches = step, metrics, list(tensors), batches
        super().__init__(f"step {step}: {why}")


class NonFinite(Refused):
    """Loss or gradient is NaN or infinite. `tensors` names the parameters with such gradients."""

    folder = "nonfinite"

    def __init__(self, step: int, metrics: Metrics, tensors: Sequence[str] = (), batches: Sequence[Any] = ()):
        shown = ", ".join(tensors[:3]) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "")
        why = ", ".join(f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value))
        super().__init__(step, metrics, why + (f" in {shown}" if shown else ""), tensors, batches)


class Spike(Refused):
    """The guard's thresholds were passed. `tensors` names the parameters with the largest gradients."""

    folder = "spikes"


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory in the process. Fresh pages cost more than the arithmetic done on them."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: below 1 GiB allocate from the heap, which is reused
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: don't hand it back to the system


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from a run's seed and what it is for: a pure function, so that nothing random need be saved."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class Engine:
    """Computes one optimizer step from micro-batches. Knows tensors and losses, no data and no stages."""

    def __init__(
        self, module: nn.Module, config: RunConfig, ranks: Ranks | None = None, parts: Sequence[Part] | None = None
    ):
        """Takes over a module with its initial weights.

        Args:
            module: any module; parameters that require no gradient stay as they are.
            config: precision, optimizer, seed and number of steps are read from it.
            ranks: default: this process alone.
            parts: what has a rate and a clip of its own; each stands together in the module. Default: all is one part.
        """
        self.config = config
        self.ranks = ranks or Ranks()
        self.step = 0  # steps made so far
        self.windows_skipped = 0  # of the data, each what one step would have seen: a rollback leaves them out
        self.stats: dict[str, Tensor] = {}  # of the last step: `LossSum.stats` summed over micro-batches and ranks
        self.dtype = PRECISIONS[config.precision]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.module = module
        self.split: Split | None = None
        """Which part of every tensor here is this process's, where it has not all of the model."""
        if config.parallel.offload and self.ranks.processes == 1:
            raise UserError(
                "parallel.offload: true on one process: shares are of several: start more, or set parallel.offload: false"
            )
        if is_spread(config.parallel, self.ranks):
            self.split = Split(module, config, self.ranks, self.dtype, wide)
        self.masters = self._masters(wide)
        trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.parameters = {n: self._own(p) for n, p in trained.items()}
        """What is computed with, in the same memory: the masters themselves, or rounded copies."""
        home = self.ranks.device if self.split is None else self.split.home
        self.flat_grad = torch.zeros(sum(t.numel() for t in self.masters.values()), dtype=wide, device=home)
        pieces = self.flat_grad.split([t.numel() for t in self.masters.values()])
        self.grads = {n: g.view(t.shape) for (n, t), g in zip(self.masters.items(), pieces, strict=True)}
        self._first = dict.fromkeys(trained, True)
        for name, p in trained.items():
            p.register_post_accumulate_grad_hook(self._collector(name))
        self.parts = (Part("", 1.0, config.optim.clip),) if parts is None else tuple(parts)
        self.optimizer = Optimizer(config.optim, self.masters, self.module, self.parts, self.split)
        owners = {n: next(p.prefix for p in self.parts if n.startswith(p.prefix)) for n in trained}
        sizes = [sum(t.numel() for n, t in self.masters.items() if owners[n] == p.prefix) for p in self.parts]
        self._flat_parts = dict(zip((p.prefix for p in self.parts), self.flat_grad.split(sizes), strict=True))
        self.ema = {n: t.clone() for n, t in self.masters.items()} if config.optim.ema_decay else {}
        self.loss_scale, self.good_steps = (2.0**16 if config.precision == "fp16" else 1.0), 0
        self.guard = Guard(config.guard, config.save_every) if config.guard.action != "none" else None
        self.refused: list[Refused] = []  # what the guard has left out, for the loop to tell of and to clear
        self.noise = NoiseScale(self.ranks) if config.log.gradient_noise else None
        self.watched: Metrics = {}  # numbers of the last step that only the log wants: norms of layers, the noise
        self._replica: nn.Module | None = None

    def _own(self, tensor: Tensor) -> Tensor:
        """This process's numbers of a parameter or its gradient, in the same memory."""
        return tensor.detach() if self.split is None else local(tensor).detach()

    def _masters(self, wide: torch.dtype) -> dict[str, Tensor]:
        """Moves the module to its device and precision; returns what the optimizer updates.

        Shares of FSDP2 are wide, and are rounded when they are put together: they are masters themselves.
        """
        device, sharded = self.ranks.device, frozenset() if self.split is None else self.split.sharded
        if self.split is not None and self.split.offload:  # all is in shares, and stays where these are
            return {n: self._own(p) for n, p in self.module.named_parameters() if p.requires_grad}
        if self.dtype == wide:
            self.module.to(device=device, dtype=wide)
            return {n: self._own(p) for n, p in self.module.named_parameters() if p.requires_grad}
        # The masters first: what is frozen needs none, and must not pass through fp32 on its way.
        masters = {
            n: self._own(p) if n in sharded else p.detach().to(device=device, dtype=wide, copy=True)
            for n, p in self.module.named_parameters()
            if p.requires_grad
        }
        if not sharded:
            self.module.to(device=device, dtype=self.dtype)  # new storage, the same parameters
        for name, p in self.module.named_parameters() if sharded else ():
            if name not in sharded:
                p.data = p.data.to(device=device, dtype=self.dtype)
        return masters

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        """Moves a gradient into the flat buffer as soon as autograd has it, and frees it."""

        def collect(p: Tensor) -> None:
            if p.grad is None:  # autograd has been there, and found that nothing of the loss depends on it
                return
            grad = self._own(p.grad)
            if self.noise is not None:
                self.noise.see(grad)
            if self._first[name]:
                self.grads[name].copy_(grad)
                self._first[name] = False
            else:
                self.grads[name].add_(grad)
            p.grad = None

        return collect

    def update(
        self,
        batches: Sequence[MicroBatch],
        loss_fn: LossFn,
        accept: Callable[[Metrics], bool] | None = None,
        resting: Collection[str] = (),
    ) -> Metrics:
        """One optimizer step: forward and backward of every micro-batch, reduction over ranks, clip, update.

        Args:
            batches: this rank's micro-batches; those of all ranks together are the step's batch.
            loss_fn: sums over a micro-batch (see `losses.LossSum`).
            accept: sees the reduced metrics before anything changes; False leaves weights and optimizer untouched.
            resting: prefixes of the parts that this step leaves as they are.

        Returns:
            `loss` (and the loss function's other parts) per unit of the denominator, `grad_norm` before the clip, `lr`,
            and `denominator`; with several parts `grad_norm` is the norm over all, and each has its own.

        Raises:
            Refused: if loss or gradient is not finite on any rank, or the guard objects: raised on all of them, before
                the update. Where the recipe says skip, the step counts, changes nothing, and has the metric `skipped`.
            UserError: if nothing in the whole step is trained on.
        """
        (denominator,) = self.ranks.sum_numbers(sum(b.denominator for b in batches))
        if denominator <= 0:
            raise UserError(f"step {self.step + 1}: no position of the batch is trained on")
        if self.noise is not None:
            self.noise.begin(batches)
        self.watched = {}
        metrics = self._gradients(batches, loss_fn, denominator, resting) | self._norms()
        metrics["lr"] = learning_rate(self.config.optim, self.step, self.config.steps)
        metrics["denominator"] = denominator
        finite = all(math.isfinite(v) for v in metrics.values())
        if not finite and self.config.precision == "fp16" and math.isfinite(metrics["loss"]) and self.loss_scale > 1:
            self.loss_scale, self.good_steps = self.loss_scale / 2, 0  # an overflow of the scaled gradient
            return {**metrics, "grad_norm": 0.0, "overflow": 1.0, **self._finish_step()}
        if finite and self.guard is not None:
            metrics |= self.guard.scores(metrics["loss"], metrics["grad_norm"])
        failure = self._objection(metrics, batches) if finite else self._non_finite(metrics, batches)
        if failure is not None:
            self._leave_out(failure)
            metrics["skipped"] = 1.0
        elif accept is None or accept(metrics):
            if self.noise is not None:
                self.watched |= self.noise.update(denominator, metrics["grad_norm"] ** 2, self.loss_scale / denominator)
            self._apply(metrics, resting)
            if self.guard is not None:
                self.guard.accept(self.step + 1, metrics["loss"], metrics["grad_norm"])
        return {**metrics, **self._finish_step()}

    def _gradients(
        self, batches: Sequence[MicroBatch], loss_fn: LossFn, denominator: float, resting: Collection[str]
    ) -> Metrics:
        """Forward and backward of every micro-batch, and sums over ranks: fills `grads` and `stats`, returns the parts of
        the loss per unit of the denominator."""
        self._first = dict.fromkeys(self._first, True)
        parts: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        sums_dtype = torch.float32 if self.ranks.device.type == "mps" else torch.float64  # MPS has no fp64
        self.module.train()
        for i, batch in enumerate(self._as_many(batches)):
            # Dropout is a function of (seed, step, micro-batch, rank): a resumed run draws what it would have drawn.
            torch.manual_seed(seed_of(self.config.seed, "dropout", self.step, i, self.ranks.rank))
            out = loss_fn(self.module, batch.to(self.ranks.device))
            if i >= len(batches):
                (out.total * 0.0).backward()
                continue
            (out.total * (self.loss_scale / denominator)).backward()
            if self.noise is not None:
                self.noise.end_micro(batch.denominator)
            for name, value in out.parts.items():
                value = value.detach().to(sums_dtype)
                parts[name] = parts[name] + value if name in parts else value
            for name, value in out.stats.items():
                value = value.detach().to(sums_dtype if value.is_floating_point() else torch.int64)
                stats[name] = stats[name] + value if name in stats else value
        for name, untouched in self._first.items():
            if untouched:  # no micro-batch of this rank reached the parameter
                self.grads[name].zero_()
        for prefix in resting:
            self._flat_parts[prefix].zero_()
        if self.split is None:
            self.ranks.sum_(self.flat_grad)
        else:
            self.split.sum_gradients(self.flat_grad, self.grads)
        self.stats = {name: self.ranks.sum_(value.contiguous()) for name, value in stats.items()}
        sums = self.ranks.sum_numbers(*(v.item() for v in parts.values()))
        return {name: s / denominator for name, s in zip(parts, sums, strict=True)}

    def _as_many(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """A rank's micro-batches. Where weights are in shares all ranks must make as many passes, since each puts every
        layer together: a rank that has fewer repeats its last one, whose gradient counts nothing."""
        if self.split is None:
            return batches
        return [*batches, *[batches[-1]] * (int(self.ranks.max_number(len(batches))) - len(batches))]

    def _norms(self) -> Metrics:
        """L2 norms of the gradient: of all, and where there are several parts of each."""
        if self.split is None:
            found = {prefix: torch.linalg.vector_norm(flat).item() for prefix, flat in self._flat_parts.items()}
            whole = torch.linalg.vector_norm(self.flat_grad).item()
        else:
            squares = dict(zip(self.grads, self.split.squares(self.grads).tolist(), strict=True))
            found = {p: math.sqrt(sum(s for n, s in squares.items() if n.startswith(p))) for p in self._flat_parts}
            whole = math.sqrt(sum(squares.values()))
        norms = {"grad_norm": whole / self.loss_scale}
        if len(self.parts) > 1:
            norms |= {f"{prefix.rstrip('.')}/grad_norm": norm / self.loss_scale for prefix, norm in found.items()}
        return norms

    def gradient_norm(self, batches: Sequence[MicroBatch], loss_fn: LossFn) -> float:
        """Norm of the gradient that a loss has on a step's batches; nothing changes. A collective.

        Args:
            batches: this rank's, as in `update`.
            loss_fn: a part of the loss, say.
        """
        (denominator,) = self.ranks.sum_numbers(sum(b.denominator for b in batches))
        noise, self.noise = self.noise, None
        try:
            self._gradients(batches, loss_fn, denominator, ())
        finally:
            self.noise = noise
        return self._norms()["grad_norm"]

    def _non_finite(self, metrics: Metrics, batches: Sequence[Any]) -> Refused:
        if self.split is None:
            spoilt = [not bool(g.isfinite().all()) for g in self.grads.values()]
        else:  # the same names on all ranks, whoever holds the piece
            spoilt = (~self.split.squares(self.grads).isfinite()).tolist()
        return NonFinite(self.step + 1, metrics, list(itertools.compress(self.grads, spoilt)), batches)

    def _objection(self, metrics: Metrics, batches: Sequence[Any]) -> Refused | None:
        """What the guard says of this step. A collective: if one rank objects, all do."""
        if self.guard is None:
            return None
        why = self.guard.objection(metrics)
        if not self.ranks.any(why is not None):
            return None
        if self.split is None:
            norms = torch.stack(torch._foreach_norm(list(self.grads.values())))
        else:
            norms = self.split.squares(self.grads)
        largest = [list(self.grads)[i] for i in norms.argsort(descending=True)[:5].tolist()]
        return Spike(self.step + 1, metrics, why or "another rank objects", largest, batches)

    def _leave_out(self, failure: Refused) -> None:
        """Notes that the step is skipped; raises the failure if it is not to be, or not any more."""
        guard = self.guard
        if guard is None or guard.config.action == "stop":
            raise failure
        if guard.config.action == "rollback" and guard.target(self.step) > 0:
            raise failure  # the loop goes back
        guard.check_budget(failure)
        window = self.data_step
        guard.refuse({"step": failure.step, "action": "skip", "why": str(failure), "data": [window, window + 1]})
        self.refused.append(failure)

    def _apply(self, metrics: Metrics, resting: Collection[str]) -> None:
        every = self.config.log.norms_every
        due = every is not None and (self.step + 1) % every == 0
        norms = LayerNorms(self.masters, self.grads, self.loss_scale, self.split) if due else None
        for part in self.parts:
            norm = metrics["grad_norm" if len(self.parts) == 1 else f"{part.prefix.rstrip('.')}/grad_norm"]
            factor = (part.clip / norm if part.clip is not None and norm > part.clip else 1.0) / self.loss_scale
            if factor != 1.0:
                self._flat_parts[part.prefix].mul_(factor)
        self.optimizer.step(self.grads, metrics["lr"], resting)
        self._publish()
        if self.ema:
            decay = ema_decay(self.config.optim, self.step)
            torch._foreach_lerp_(list(self.ema.values()), list(self.masters.values()), 1 - decay)
        if norms is not None:
            self.watched |= norms.metrics()
        self.good_steps += 1
        if self.config.precision == "fp16" and self.good_steps % 2000 == 0:
            self.loss_scale = min(self.loss_scale * 2, 2.0**24)

    def _finish_step(self) -> Metrics:
        self.step += 1
        return {"loss_scale": self.loss_scale} if self.config.precision == "fp16" else {}

    @property
    def data_step(self) -> int:
        """Which step's data comes next: the step itself, and on from it as many windows as rollbacks have left out."""
        return self.step + self.windows_skipped

    @property
    def learnt_windows(self) -> list[tuple[int, int]]:
        """Which steps' data the weights have learnt from, [first, end) each."""
        return learnt_windows(self.data_step, self.guard.events if self.guard is not None else ())

    @torch.no_grad()
    def _publish(self, weights: dict[str, Tensor] | None = None) -> None:
        """Copies master weights (or others of the same names) into the module, where they are not the same tensors."""
        weights = self.masters if weights is None else weights
        names = [n for n, t in weights.items() if t.data_ptr() != self.parameters[n].data_ptr()]
        if names:
            torch._foreach_copy_([self.parameters[n] for n in names], [weights[n] for n in names])

    @contextlib.contextmanager
    def evaluating(self, averaged: bool | None = None) -> Iterator[nn.Module]:
        """The module in evaluation mode without gradients.

        Args:
            averaged: with the averaged weights. Default: if the recipe says so.
        """
        use_ema = self.config.eval.weights == "ema" if averaged is None else averaged
        kept = {n: p.clone() for n, p in self.parameters.items()} if use_ema else {}
        was_training = self.module.training
        try:
            if use_ema:
                self._publish(self.ema)
            self.module.eval()
            with torch.no_grad():
                yield self.module
        finally:
            self.module.train(was_training)
            if self.split is not None:
                self.split.reshard()
            if use_ema:
                self._publish(kept)

    @contextlib.contextmanager
    def replica(self, averaged: bool | None = None) -> Iterator[nn.Module]:
        """As `evaluating`, but of a module that this process may ask as often as it likes, whatever the others do: a
        whole copy, where the model is spread over several. A collective. `asked` is that module."""
        if self._replica is not None:
            yield self._replica
            return
        with self.evaluating(averaged) as module:
            if self.split is None:
                yield module
                return
            self._replica = self.split.replica({n: self._own(p) for n, p in module.named_parameters()})
            try:
                yield self._replica
            finally:
                self._replica = None

    @property
    def asked(self) -> nn.Module:
        """What this process may ask by itself: the module, or within `replica` the whole copy of it."""
        return self.module if self._replica is None else self._replica

    # --- state -------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that makes the model and its training, by file: to be copied before the next update.

        The model under the names and in the layout of its `state_dict`, which is what Hugging Face's class expects;
        optimizer, masters and average under our own parameters' names. Views, but where a layout must be converted.
        Where the model is spread over processes: this one's share of the files, copies in main memory; a collective.
        """
        if self.split is not None:
            return self.wholes.gather()
        files = {**saved_tensors(self.module), **self._states()}
        return {file: {n: t.detach() for n, t in tensors.items()} for file, tensors in files.items()}

    def _states(self) -> dict[str, dict[str, Tensor]]:
        """What belongs to parameters beside their weights, by file."""
        files = {"trainer_state/optimizer.safetensors": self.optimizer.state_dict()}
        if self.dtype != self.flat_grad.dtype:
            files["trainer_state/master.safetensors"] = self.masters
        if self.ema:
            files["trainer_state/ema.safetensors"] = self.ema
        return files

    @functools.cached_property
    def wholes(self) -> Wholes:
        """Who writes what, where the model is spread over processes."""
        assert self.split is not None
        weights = {n: self._own(p) for n, p in self.module.named_parameters()}
        return Wholes(self.split, weights, self._states())

    def state(self) -> dict[str, Any]:
        """The numbers that change during training."""
        return {
            "step": self.step,
            "windows_skipped": self.windows_skipped,
            "loss_scale": self.loss_scale,
            "good_steps": self.good_steps,
            "guard": None if self.guard is None else self.guard.state(),
            "noise": None if self.noise is None else self.noise.state(),
        }

    @torch.no_grad()
    def load(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Puts back what `tensors` and `state` gave. Raises ValueError on any difference in names or shapes."""
        own = self.tensors()
        if odd := sorted(own.keys() ^ tensors.keys()):
            raise ValueError(f"{odd[0]}: in {'this run' if odd[0] in own else 'the checkpoint'} only")
        for file, mine in own.items():
            check_named(mine, tensors[file], file)
        for file, mine in own.items():
            if file.startswith("trainer_state/"):
                copy_named(mine, tensors[file])
        load_saved(self.module, tensors)
        self._load_state(state)

    def load_pieces(self, folder: Path, but: Collection[str], state: dict[str, Any]) -> None:
        """The same of a model that is spread over processes, from a checkpoint's folder without the files `but`."""
        self.wholes.load(folder, but)
        self._load_state(state)

    def _load_state(self, state: dict[str, Any]) -> None:
        self.step, self.windows_skipped = state["step"], state["windows_skipped"]
        self.loss_scale, self.good_steps = state["loss_scale"], state["good_steps"]
        if self.guard is not None and state["guard"] is not None:
            self.guard.load(state["guard"])
        if self.noise is not None and state["noise"] is not None:
            self.noise.load(state["noise"])
