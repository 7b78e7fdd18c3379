"""What a run can tell of its gradients: norms layer by layer, and the noise scale of the batch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkit.config import UserError
from llmkit.training.dist import Ranks
from llmkit.training.parallel import Split

_LAYER = re.compile(r"^(?:model\.)?((?:.*?\.)?\d+(?=\.)|[^.]+)")
Metrics = dict[str, float]


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameters by layer: `layers.0`, `layers.1`, ..., and `embed_tokens`, `norm`, `lm_head`."""
    layers: dict[str, list[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        layers.setdefault(match[1] if match else name, []).append(name)
    return layers


def norms_of(layers: dict[str, list[str]], tensors: dict[str, Tensor], split: Split | None = None) -> dict[str, float]:
    """The L2 norm of each layer; a collective where the tensors are pieces."""
    names = [n for members in layers.values() for n in members]
    if split is None:
        squares = torch.stack(torch._foreach_norm([tensors[n] for n in names])).square()
    else:
        squares = split.squares({n: tensors[n] for n in names})
    sums = torch.stack([part.sum() for part in squares.split([len(m) for m in layers.values()])])
    return dict(zip(layers, sums.sqrt().tolist(), strict=True))


class LayerNorms:
    """Norm of the gradient, norm of the weights and relative size of the update of each layer, for one step.

    Made before the optimizer's step, whose weights it copies: memory of one more set of weights until `metrics`.
    """

    def __init__(self, weights: dict[str, Tensor], grads: dict[str, Tensor], scale: float, split: Split | None = None):
        """Looks at the state before the update.

        Args:
            weights: masters, updated in place afterwards.
            grads: of the same names, before the clip.
            scale: the gradients are so many times too large.
            split: what these are pieces of; None: they are whole.
        """
        self._layers, self._split = layers_of(weights), split
        self._weights, self._before = weights, {n: t.clone() for n, t in weights.items()}
        self._grad = {layer: norm / scale for layer, norm in norms_of(self._layers, grads, split).items()}
        self._weight = norms_of(self._layers, weights, split)

    def metrics(self) -> Metrics:
        """`norms/<layer>/grad`, `/weight` and `/update_ratio` = |new - old| / |old|; called after the update."""
        torch._foreach_sub_(list(self._before.values()), list(self._weights.values()))
        update = norms_of(self._layers, self._before, self._split)
        return {
            f"norms/{layer}/{key}": value
            for layer, weight in self._weight.items()
            for key, value in (
                ("grad", self._grad[layer]),
                ("weight", weight),
                ("update_ratio", update[layer] / weight if weight else 0.0),
            )
        }


class NoiseScale:
    """The simple noise scale B = tr(S) / |G|^2 (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).

    S is the covariance of one token's gradient, G the true gradient: B is the batch, in tokens, beyond which a larger
    one buys little. Both come from the same step, without bias, by comparing a large batch with the small ones in it.
    With micro-batch gradients G_i over n_i tokens, m of them, and the step's gradient G_N over N tokens:

        A = sum_i (n_i / N) |G_i|^2        E A       = |G|^2 + tr(S) m / N
                                           E |G_N|^2 = |G|^2 + tr(S) / N
        tr(S) = (A - |G_N|^2) N / (m - 1)   |G|^2 = |G_N|^2 - tr(S) / N

    The weights n_i / N keep this exact for micro-batches of unequal size. One step's estimate is far too noisy, so
    both numbers are smoothed, each by itself: the ratio of means is wanted, not the mean of ratios.
    """

    def __init__(self, ranks: Ranks, decay: float = 0.99):
        self._ranks, self._decay = ranks, decay
        self._trace, self._square, self._weight = 0.0, 0.0, 0.0
        self._norms: list[Tensor] = []  # of the gradients of the micro-batch under way, parameter by parameter
        self._sums: list[Tensor] = []  # |sum of the gradients of a micro-batch's tokens|^2 / tokens
        self._n_micro: float | None = None

    def begin(self, batches: Sequence[Any]) -> None:
        """Before the micro-batches of a step. Raises UserError if in the first there is nothing to compare."""
        first = self._n_micro is None
        self._norms, self._sums = [], []
        (self._n_micro,) = self._ranks.sum_numbers(float(sum(b.denominator > 0 for b in batches)))
        if first and self._n_micro < 2:
            raise UserError(
                "log.gradient_noise compares the micro-batches of a step, and there is one: lower batch.micro_tokens, or "
                "set log.gradient_noise: false"
            )

    def see(self, grad: Tensor) -> None:
        """A micro-batch's gradient of one parameter."""
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        self._norms.append(torch.linalg.vector_norm(grad, dtype=wide))

    def end_micro(self, tokens: float) -> None:
        """After the backward pass of a micro-batch."""
        if tokens and self._norms:
            self._sums.append(torch.stack(self._norms).square().sum() / tokens)
        self._norms = []

    def update(self, tokens: float, square: float, scale: float) -> Metrics:
        """Takes in the step. A collective.

        Args:
            tokens: N.
            square: |G_N|^2.
            scale: what the gradients seen are multiples of the tokens' gradients by.

        Returns:
            `noise/trace` = tr(S), `noise/grad_square` = |G|^2, and `noise/scale_tokens` = B where |G|^2 is positive,
            which the estimate need not be while noise drowns the gradient.
        """
        mine = sum(torch.stack(self._sums).tolist()) if self._sums else 0.0
        (total,) = self._ranks.sum_numbers(mine)
        if self._n_micro is None or self._n_micro < 2:
            return {}
        small = total / scale**2 / tokens
        trace = (small - square) * tokens / (self._n_micro - 1)
        rest = 1 - self._decay
        self._trace = self._decay * self._trace + rest * trace
        self._square = self._decay * self._square + rest * (square - trace / tokens)
        self._weight = self._decay * self._weight + rest
        metrics = {"noise/trace": self._trace / self._weight, "noise/grad_square": self._square / self._weight}
        if self._square > 0:
            metrics["noise/scale_tokens"] = self._trace / self._square
        return metrics

    def state(self) -> dict[str, Any]:
        return {"trace": self._trace, "square": self._square, "weight": self._weight}

    def load(self, state: dict[str, Any]) -> None:
        self._trace, self._square, self._weight = state["trace"], state["square"], state["weight"]
