"""Mixture of experts: a router, many small MLPs of which each token visits a few, and what keeps their loads equal.

Named as Hugging Face's Qwen2-MoE and Qwen3-MoE are on disk: `mlp.gate` (the router), `mlp.experts.0.up_proj`,
`mlp.shared_expert`, `mlp.shared_expert_gate`.

Shapes: B batch, T positions, N = B * T tokens, D d_model, E experts, K active experts, S = N * K visits, sorted by expert
and within an expert by token; L layers with experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkit.model.config import ExpertsConfig


class LayerRouting(NamedTuple):
    """One layer's share of `Routing`."""

    balance_BT: Tensor
    chosen_BTK: Tensor


@dataclass(frozen=True)
class Routing:
    """Where one forward pass in training sent its tokens."""

    balance_BT: Tensor
    """Mean over layers of E * sum_e f_e p_e: 1 where the load f is even, above where a token follows the crowd."""
    chosen_LBTK: Tensor
    """int64, the experts of each token, the one with the largest weight first."""
    n_experts: int

    def loss(self, loss_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The balance term and the load over the tokens of the mask alone.

        With f from the step before, the term is a plain sum over tokens: how a step is cut into micro-batches and ranks
        can't change it.

        Returns:
            The sum over those tokens of `balance_BT`, differentiable, without its weight in the loss; and int64 counts
            [L, E] of visits, n_active of each token: summed over the whole step they are what `set_load` takes.
        """
        n_layers, E = len(self.chosen_LBTK), self.n_experts
        offsets_L1 = torch.arange(0, n_layers * E, E, device=self.chosen_LBTK.device)[:, None, None]
        cells = self.chosen_LBTK[:, loss_mask_BT] + offsets_L1
        counts_LE = torch.bincount(cells.flatten(), minlength=n_layers * E).view(n_layers, E)
        return (self.balance_BT * loss_mask_BT).sum(), counts_LE


def gather_routing(layers: Sequence[LayerRouting], n_experts: int) -> Routing | None:
    """All layers' routing; None without any, that is in a dense model or in evaluation."""
    if not layers:
        return None
    balance_BT = torch.stack([layer.balance_BT for layer in layers]).mean(0)
    return Routing(balance_BT, torch.stack([layer.chosen_BTK for layer in layers]), n_experts)


def set_load(layers: Iterable[nn.Module], counts_LE: Tensor) -> None:
    """Gives every layer with experts the load of the step before, as `Routing.loss` counted it over the whole step."""
    mixtures = [module for layer in layers for module in layer.modules() if isinstance(module, MoE)]
    expected = (len(mixtures), mixtures[0].config.n if mixtures else 0)
    if tuple(counts_LE.shape) != expected:
        raise ValueError(f"the experts' load has the shape {tuple(counts_LE.shape)}, the model {expected}")
    for mixture, counts_E in zip(mixtures, counts_LE, strict=True):
        mixture.set_load(counts_E)


def top_k(p_NE: Tensor, k: int) -> Tensor:
    """Places of the k largest of each row, largest first; among equals, which bf16 makes common, the lowest place.

    `torch.topk` promises nothing about equals, so two devices or versions would send a token to different experts.
    """
    return torch.sort(p_NE.detach(), dim=-1, descending=True, stable=True).indices[:, :k]


class Dispatch(torch.autograd.Function):
    """x[tokens]: a token's state once for each of its visits. The gradient is gathered and added up in a fixed order.

    That of PyTorch's indexing adds in whatever order its threads come.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_S: Tensor, visit_NK: Tensor) -> Tensor:
        ctx.save_for_backward(visit_NK)
        return x_ND.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (visit_NK,) = ctx.saved_tensors
        total_ND = grad_SD.index_select(0, visit_NK[:, 0])
        if visit_NK.shape[1] > 1:
            total_ND = total_ND.to(_wide(grad_SD.dtype))
            for k in range(1, visit_NK.shape[1]):
                total_ND += grad_SD.index_select(0, visit_NK[:, k])
        return total_ND.to(grad_SD.dtype), None, None


class _Combine(torch.autograd.Function):
    """sum_k weight[n, k] * y[visit[n, k]]: added up in fp32 or better, in a fixed order, without [N, K, D]."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, weight_NK: Tensor, visit_NK: Tensor, order_S: Tensor) -> Tensor:
        ctx.save_for_backward(y_SD, weight_NK, visit_NK, order_S)
        out_ND = y_SD.index_select(0, visit_NK[:, 0]) * weight_NK[:, :1]  # weights are wide, and so is the product
        for k in range(1, visit_NK.shape[1]):
            out_ND.addcmul_(y_SD.index_select(0, visit_NK[:, k]), weight_NK[:, k, None])
        return out_ND.to(y_SD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_SD, weight_NK, visit_NK, order_S = ctx.saved_tensors
        grad_SD = grad_ND.index_select(0, order_S // visit_NK.shape[1])
        # Products in the dtype of the states, which are rounded to it anyway; sums are wide.
        grad_weight_S = (y_SD * grad_SD).sum(-1, dtype=weight_NK.dtype)
        grad_SD *= weight_NK.flatten()[order_S, None].to(grad_SD.dtype)
        return grad_SD, grad_weight_S[visit_NK], None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Experts(nn.ModuleList):
    """A layer's experts, which compute all visits of one call."""

    def forward(self, x_SD: Tensor, sizes: list[int]) -> Tensor:
        """What they make of the states, [S, D].

        Args:
            x_SD: sorted by expert.
            sizes: how many visits each gets.
        """
        # An expert that no token visits is not called: its weights then have no gradient at all.
        visits = zip(self, x_SD.split(sizes), sizes, strict=True)
        computed = [expert(x) for expert, x, size in visits if size]
        return torch.cat(computed) if computed else x_SD.clone()


class MoE(nn.Module):
    """sum over a token's experts of weight * expert(x), and sigmoid(x . g) * shared_expert(x) if there is a shared one.

    Visits are sorted by expert, so that each expert is one dense product over its own tokens. None is dropped: however
    uneven the load, the result is that of `transformers`.
    """

    def __init__(self, config: ExpertsConfig, d_model: int, mlp: Callable[[int], nn.Module]):
        """Allocates.

        Args:
            config: numbers and widths.
            d_model: width of what comes in and goes out.
            mlp: makes a plain MLP of the width it is given.
        """
        super().__init__()
        self.config = config
        self.gate = nn.Linear(d_model, config.n, bias=False)
        self.experts = Experts(mlp(config.d_ff) for _ in range(config.n))
        if config.shared_d_ff is not None:
            self.shared_expert = mlp(config.shared_d_ff)
            self.shared_expert_gate = nn.Linear(d_model, 1, bias=False)
        # No buffer: a cast of the module to bf16 would round it, and `to_empty` would leave it without a value.
        self.load_E: Tensor | None = None
        self.exchange: Callable[[Experts, Tensor, Tensor], Tensor] | None = None
        """Where other processes hold some of the experts: `exchange.Exchange`."""

    def set_load(self, counts_E: Tensor) -> None:
        """Takes the step's visits to each expert: their shares are the constants f of the next step's balance term."""
        share_E = counts_E.double().cpu() / counts_E.sum().item()
        self.load_E = share_E.to(self.gate.weight.device, _wide(self.gate.weight.dtype))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, LayerRouting | None]:
        """The mixture's output, and in training where the tokens went."""
        B, T, _ = x_BTD.shape
        x_ND = x_BTD.flatten(0, 1)
        K = self.config.n_active
        logits_NE = self.gate(x_ND)
        p_NE = torch.softmax(logits_NE, dim=-1, dtype=_wide(logits_NE.dtype))
        chosen_NK = top_k(p_NE, K)
        weight_NK = p_NE.gather(1, chosen_NK)
        if self.config.normalize:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        out_ND = self._experts(x_ND, chosen_NK, weight_NK)
        if self.config.shared_d_ff is not None:
            out_ND = out_ND + torch.sigmoid(self.shared_expert_gate(x_ND)) * self.shared_expert(x_ND)
        routing = None
        if self.training:
            E = self.config.n
            # The router may have been in main memory when the load was set: `parallel.offload`.
            load_E = p_NE.new_full((E,), 1 / E) if self.load_E is None else self.load_E.to(p_NE.device)
            # No view of a product: FSDP2 warns of views that a block returns.
            routing = LayerRouting(p_NE.view(B, T, E) @ (E * load_E), chosen_NK.view(B, T, K))
        return out_ND.view_as(x_BTD), routing

    def _experts(self, x_ND: Tensor, chosen_NK: Tensor, weight_NK: Tensor) -> Tensor:
        expert_S = chosen_NK.flatten()
        order_S = expert_S.argsort(stable=True)
        visit_NK = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        visit_NK = visit_NK.view_as(chosen_NK)
        x_SD = Dispatch.apply(x_ND, order_S // self.config.n_active, visit_NK)
        sizes_E = torch.bincount(expert_S, minlength=self.config.n)
        y_SD = (
            self.experts(x_SD, sizes_E.tolist())
            if self.exchange is None
            else self.exchange(self.experts, x_SD, sizes_E)
        )
        out_ND: Tensor = _Combine.apply(y_SD, weight_NK, visit_NK, order_S)
        return out_ND
