"""Module + optimizer: the only place where gradients are made and applied.

Weights may be kept twice: in the precision they are computed with, and as fp32 masters that the optimizer updates.
Gradients of every micro-batch are added up in one flat fp32 buffer, which is summed over ranks as a whole: so the
result depends neither on how a batch is cut nor on the order in which gradients become ready.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
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
        if self.dtype == wide:
            self.module = module.to(device=self.ranks.device, dtype=wide)
            self.masters = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}
        else:
            # The masters first: what is frozen needs none, and must not pass through fp32 on its way.
            self.masters = {
                n: p.detach().to(device=self.ranks.device, dtype=wide, copy=True)
                for n, p in module.named_parameters()
                if p.requires_grad
            }
            self.module = module.to(device=self.ranks.device, dtype=self.dtype)  # new storage, the same parameters
        trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.parameters = trained
        self.flat_grad = torch.zeros(sum(t.numel() for t in trained.values()), dtype=wide, device=self.ranks.device)
        pieces = self.flat_grad.split([t.numel() for t in trained.values()])
        self.grads = {n: g.view(p.shape) for (n, p), g in zip(trained.items(), pieces, strict=True)}
        self._first = dict.fromkeys(trained, True)
        for name, p in trained.items():
            p.register_post_accumulate_grad_hook(self._collector(name))
        self.parts = (Part("", 1.0, config.optim.clip),) if parts is None else tuple(parts)
        self.optimizer = Optimizer(config.optim, self.masters, self.module, self.parts)
        owners = {n: next(p.prefix for p in self.parts if n.startswith(p.prefix)) for n in trained}
        sizes = [sum(t.numel() for n, t in trained.items() if owners[n] == p.prefix) for p in self.parts]
        self._flat_parts = dict(zip((p.prefix for p in self.parts), self.flat_grad.split(sizes), strict=True))
        self.ema = {n: t.clone() for n, t in self.masters.items()} if config.optim.ema_decay else {}
        self.loss_scale, self.good_steps = (2.0**16 if config.precision == "fp16" else 1.0), 0
        self.guard = Guard(config.guard, config.save_every) if config.guard.action != "none" else None
        self.refused: list[Refused] = []  # what the guard has left out, for the loop to tell of and to clear
        self.noise = NoiseScale(self.ranks) if config.log.gradient_noise else None
        self.watched: Metrics = {}  # numbers of the last step that only the log wants: norms of layers, the noise

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        """Moves a gradient into the flat buffer as soon as autograd has it, and frees it."""

        def collect(p: Tensor) -> None:
            if p.grad is None:  # autograd has been there, and found that nothing of the loss depends on it
                return
            if self.noise is not None:
                self.noise.see(p.grad)
            if self._first[name]:
                self.grads[name].copy_(p.grad)
                self._first[name] = False
            else:
                self.grads[name].add_(p.grad)
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
        self._first, self.watched = dict.fromkeys(self._first, True), {}
        parts: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        sums_dtype = torch.float32 if self.ranks.device.type == "mps" else torch.float64  # MPS has no fp64
        self.module.train()
        for i, batch in enumerate(batches):
            # Dropout is a function of (seed, step, micro-batch, rank): a resumed run draws what it would have drawn.
            torch.manual_seed(seed_of(self.config.seed, "dropout", self.step, i, self.ranks.rank))
            out = loss_fn(self.module, batch.to(self.ranks.device))
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
        self.ranks.sum_(self.flat_grad)
        self.stats = {name: self.ranks.sum_(value.contiguous()) for name, value in stats.items()}
        sums = self.ranks.sum_numbers(*(v.item() for v in parts.values()))
        metrics: Metrics = {name: s / denominator for name, s in zip(parts, sums, strict=True)}
        metrics["grad_norm"] = torch.linalg.vector_norm(self.flat_grad).item() / self.loss_scale
        if len(self.parts) > 1:
            for prefix, flat in self._flat_parts.items():
                metrics[f"{prefix.rstrip('.')}/grad_norm"] = torch.linalg.vector_norm(flat).item() / self.loss_scale
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

    def gradient_norm(self, batches: Sequence[MicroBatch], loss_fn: LossFn) -> float:
        """Norm of the gradient that a loss has on a step's batches; nothing changes. A collective.

        Args:
            batches: this rank's, as in `update`.
            loss_fn: a part of the loss, say.
        """
        (denominator,) = self.ranks.sum_numbers(sum(b.denominator for b in batches))
        trained, flat = list(self.parameters.values()), torch.zeros_like(self.flat_grad)
        sums = flat.split([p.numel() for p in trained])
        self.module.train()
        for i, batch in enumerate(batches):
            torch.manual_seed(seed_of(self.config.seed, "dropout", self.step, i, self.ranks.rank))
            total = loss_fn(self.module, batch.to(self.ranks.device)).total * (self.loss_scale / denominator)
            if not total.requires_grad:  # a micro-batch of padding
                continue
            for part, gradient in zip(sums, torch.autograd.grad(total, trained, allow_unused=True), strict=True):
                if gradient is not None:
                    part += gradient.flatten()
        self.ranks.sum_(flat)
        return torch.linalg.vector_norm(flat).item() / self.loss_scale

    def _non_finite(self, metrics: Metrics, batches: Sequence[Any]) -> Refused:
        return NonFinite(self.step + 1, metrics, [n for n, g in self.grads.items() if not g.isfinite().all()], batches)

    def _objection(self, metrics: Metrics, batches: Sequence[Any]) -> Refused | None:
        """What the guard says of this step. A collective: if one rank objects, all do."""
        if self.guard is None:
            return None
        why = self.guard.objection(metrics)
        if not self.ranks.any(why is not None):
            return None
        norms = torch.stack(torch._foreach_norm(list(self.grads.values())))
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
        norms = LayerNorms(self.masters, self.grads, self.loss_scale) if due else None
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
        if self.dtype != self.flat_grad.dtype or weights is not self.masters:
            torch._foreach_copy_([self.parameters[n].data for n in weights], list(weights.values()))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The module in evaluation mode without gradients, with the averaged weights if the recipe says so."""
        use_ema = self.config.eval.weights == "ema"
        kept = {n: p.detach().clone() for n, p in self.parameters.items()} if use_ema else {}
        was_training = self.module.training
        try:
            if use_ema:
                self._publish(self.ema)
            self.module.eval()
            with torch.no_grad():
                yield self.module
        finally:
            self.module.train(was_training)
            if use_ema:
                self._publish(kept)

    # --- state -------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that makes the model and its training, by file: to be copied before the next update.

        The model under the names and in the layout of its `state_dict`, which is what Hugging Face's class expects;
        optimizer, masters and average under our own parameters' names. Views, but where a layout must be converted.
        """
        files = saved_tensors(self.module)
        files["trainer_state/optimizer.safetensors"] = self.optimizer.state_dict()
        if self.dtype != self.flat_grad.dtype:
            files["trainer_state/master.safetensors"] = self.masters
        if self.ema:
            files["trainer_state/ema.safetensors"] = self.ema
        return {file: {n: t.detach() for n, t in tensors.items()} for file, tensors in files.items()}

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
        self.step, self.windows_skipped = state["step"], state["windows_skipped"]
        self.loss_scale, self.good_steps = state["loss_scale"], state["good_steps"]
        if self.guard is not None and state["guard"] is not None:
            self.guard.load(state["guard"])
        if self.noise is not None and state["noise"] is not None:
            self.noise.load(state["noise"])
