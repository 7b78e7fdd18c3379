"""Optimizers over named master weights, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkit.training.config import OptimConfig
from llmkit.training.parallel import Split

# Output projections are not hidden matrices: Muon's orthogonal updates suit maps between hidden spaces. The routers of
# experts are such heads: a row scores one expert, and an orthogonal update would move the row of an expert that few tokens
# saw as far as any other.
_OUTPUT_HEADS = (
    "lm_head.weight",
    "score.weight",
    "classifier.weight",
    "mlp.gate.weight",
    "mlp.shared_expert_gate.weight",
)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of update number `step` (counted from 0) of `total_steps`.

    Warm-up is linear and ends at the peak; the floor `min_lr_frac * lr` would be reached at `total_steps`.
    """
    warmup = config.warmup(total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    floor = config.min_lr_frac
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if config.schedule == "constant":
        share = 1.0
    elif config.schedule == "linear":
        share = 1 - (1 - floor) * progress
    elif config.schedule == "cosine":
        share = floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    else:
        decay_steps = max(1, round(config.decay_frac * total_steps))
        done = min(1.0, max(0.0, (step - (total_steps - decay_steps)) / decay_steps))
        share = 1 - (1 - floor) * (done if config.decay_shape == "linear" else math.sqrt(done))
    return config.lr * share


def ema_decay(config: OptimConfig, step: int) -> float:
    """The decay of the weights' average in update number `step`, counted from 0.

    The warm-up is that of TensorFlow's `ExponentialMovingAverage(num_updates)`.
    """
    assert config.ema_decay is not None
    return min(config.ema_decay, (1 + step) / (10 + step)) if config.ema_warmup else config.ema_decay


def decayed_names(module: nn.Module) -> set[str]:
    """Parameters with weight decay: matrices of linear layers; not embeddings, norms or biases (B14)."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return {n for n, p in module.named_parameters() if p.dim() >= 2 and id(p) not in embeddings}


def hidden_matrices(module: nn.Module) -> set[str]:
    """The matrices Muon updates: weights between hidden spaces, each kept whole and apart (B15)."""
    return {n for n in decayed_names(module) if not n.endswith(_OUTPUT_HEADS)}


@dataclass(frozen=True)
class Part:
    """The parameters whose names begin with `prefix`: they have a rate and a clip of their own."""

    prefix: str
    lr_scale: float = 1.0
    """Their rate as a share of the schedule's."""
    clip: float | None = None
    """Largest L2 norm of their gradient; None: any."""


class Optimizer:
    """AdamW, SGD or Muon on a fixed set of named tensors. Its state is named after the parameters, never numbered."""

    def __init__(
        self,
        config: OptimConfig,
        weights: dict[str, Tensor],
        module: nn.Module,
        parts: Sequence[Part] = (Part(""),),
        split: Split | None = None,
    ):
        """Sets up zero state.

        Args:
            config: the recipe's section.
            weights: master weights by name; updated in place by `step`.
            module: tells which of the names are embeddings, norms or hidden matrices.
            parts: what has rates of its own; together they hold every name, each once.
            split: what the weights are pieces of; None: they are whole.
        """
        self.config, self.split = config, split
        self.weights = weights
        decayed = decayed_names(module) & weights.keys()
        muon = hidden_matrices(module) & weights.keys() if config.name == "muon" else set()
        sgd = set(weights) if config.name == "sgd" else set()
        adam = [n for n in weights if n not in muon and n not in sgd]
        kinds = {  # name of the group -> (its parameters, its weight decay)
            "muon": ([n for n in weights if n in muon], config.weight_decay),
            "sgd/decay": ([n for n in weights if n in sgd and n in decayed], config.weight_decay),
            "sgd": ([n for n in weights if n in sgd and n not in decayed], 0.0),
            "adamw/decay": ([n for n in adam if n in decayed], config.weight_decay),
            "adamw": ([n for n in adam if n not in decayed], 0.0),
        }
        self.parts = {part.prefix: part for part in parts}
        self.groups = {
            f"{kind}@{prefix}" if prefix else kind: ([n for n in names if n.startswith(prefix)], decay)
            for prefix in self.parts
            for kind, (names, decay) in kinds.items()
        }
        self.momentum = config.momentum if config.momentum is not None else (0.95 if muon else 0.0)
        self.state: dict[str, dict[str, Tensor]] = {}
        if adam:
            self.state |= {k: {n: torch.zeros_like(weights[n]) for n in adam} for k in ("exp_avg", "exp_avg_sq")}
            self.state["step"] = {n: torch.zeros((), dtype=torch.float32, device=weights[n].device) for n in adam}
        if muon or (sgd and self.momentum):
            self.state["momentum"] = {n: torch.zeros_like(weights[n]) for n in sorted(muon | sgd)}

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], lr: float, resting: Collection[str] = ()) -> None:
        """One update from gradients of the same names and dtype as the weights; parts that rest stay wholly as they are:
        neither momentum nor decay moves them."""
        for group, (names, decay) in self.groups.items():
            prefix = group.partition("@")[2]
            if not names or prefix in resting:
                continue
            rate = lr * self.parts[prefix].lr_scale
            weights, g = [self.weights[n] for n in names], [grads[n] for n in names]
            if group.startswith("adamw"):
                self._adamw(names, weights, g, rate, decay)
            elif group.startswith("sgd"):
                self._sgd(names, weights, g, rate, decay)
            else:
                self._muon(names, weights, g, rate, decay)

    def _adamw(self, names: list[str], weights: list[Tensor], grads: list[Tensor], lr: float, decay: float) -> None:
        # The kernel behind torch.optim.AdamW(fused=True), called directly: importing torch.optim's class pulls in
        # torch._dynamo, a second of start-up.
        torch._fused_adamw_(
            weights,
            grads,
            [self.state["exp_avg"][n] for n in names],
            [self.state["exp_avg_sq"][n] for n in names],
            [],
            self._count(names),
            lr=lr,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            weight_decay=decay,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
        )

    def _count(self, names: list[str]) -> list[Tensor]:
        steps = [self.state["step"][n] for n in names]
        torch._foreach_add_(steps, 1.0)
        return steps

    def _sgd(self, names: list[str], weights: list[Tensor], grads: list[Tensor], lr: float, decay: float) -> None:
        if self.momentum:
            momenta = [self.state["momentum"][n] for n in names]
            torch._foreach_mul_(momenta, self.momentum)
            torch._foreach_add_(momenta, grads)
            grads = momenta
        if decay:
            torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_add_(weights, grads, alpha=-lr)

    def _muon(self, names: list[str], weights: list[Tensor], grads: list[Tensor], lr: float, decay: float) -> None:
        momenta = [self.state["momentum"][n] for n in names]
        torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
        nesterov = torch._foreach_lerp(grads, momenta, self.momentum)
        torch._foreach_mul_(weights, 1 - lr * decay)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, name in enumerate(names):
            by_shape.setdefault(tuple(grads[i].shape) if self.split is None else self.split.shapes[name], []).append(i)
        for shape, members in by_shape.items():
            # Orthogonal is of full size however small the momentum: an expert that no token visited would be moved
            # by what is left of old gradients, step after step.
            if self.split is None:
                update = orthogonalize(torch.stack([nesterov[i] for i in members]))
                has_gradient = torch.stack([grads[i].count_nonzero() > 0 for i in members])
                updates = list((update * has_gradient[:, None, None]).to(weights[0].dtype))
            else:
                whole = [names[i] for i in members]
                updates = self.split.on_wholes(whole, [nesterov[i] for i in members], orthogonalize)
                has_gradient = self.split.squares({names[i]: grads[i] for i in members}) > 0
                updates = [u * has for u, has in zip(updates, has_gradient, strict=True)]
            scale = 0.2 * math.sqrt(max(shape))  # the size of an AdamW update, so that both share one learning rate
            torch._foreach_add_([weights[i] for i in members], updates, alpha=-lr * scale)

    def state_dict(self) -> dict[str, Tensor]:
        """The state's own tensors under `<kind>.<parameter>`."""
        return {f"{kind}.{name}": t for kind, tensors in self.state.items() for name, t in tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Fills the state. Raises ValueError unless names and shapes are exactly those of this optimizer."""
        own = self.state_dict()
        check_named(own, state, "optimizer state")
        copy_named(own, state)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of each in a batch [K, A, B], roughly: Muon's quintic Newton-Schulz.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; in bf16, whose error the iteration tolerates. Same
    coefficients as torch.optim.Muon; batched, since many small matrices of one shape are the rule.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a, alpha=1.0)
    return x.mT if tall else x


def check_named(own: dict[str, Tensor], given: dict[str, Tensor], what: str) -> None:
    """Raises ValueError naming the first tensor that is missing, unknown or of another shape."""
    for name in [*own, *given]:
        mine, theirs = own.get(name), given.get(name)
        if mine is None or theirs is None or mine.shape != theirs.shape:
            raise ValueError(
                f"{what}: {name}: {'nothing' if theirs is None else tuple(theirs.shape)} is saved, "
                f"{'nothing' if mine is None else tuple(mine.shape)} is expected"
            )


@torch.no_grad()
def copy_named(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Copies tensors of the same names."""
    for name, tensor in own.items():
        tensor.copy_(given[name])


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
