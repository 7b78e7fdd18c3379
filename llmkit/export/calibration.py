"""A whole model in few bits: each matrix by itself, or by what its products are on texts of calibration.

Shapes: T tokens of a text, D width, K inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.config import UserError
from llmkit.export.rounding import quantize_weight
from llmkit.inference.batch import evaluating
from llmkit.model.layouts import config_of
from llmkit.model.quantization import Quantization, quantizable, set_weight

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    quantization: Quantization,
    texts: Sequence[Sequence[int]] = (),
    on_matrix: Callable[[], Any] = lambda: None,
) -> None:
    """Puts a model's matrices into few bits, in place.

    With texts the blocks are done one after the other, each on what the blocks before it, already in few bits, make of
    them: a block so mends a part of what came before. The embedding is done first, and a head last.

    Args:
        model: a GPT or another head beside a Decoder, with its weights.
        quantization: how.
        texts: ids of texts such as the model will see, none empty; without them every matrix is done by itself.
        on_matrix: called after each matrix.

    Raises:
        UserError: a weight is not finite.
    """
    names = list(quantizable(model))

    def put(name: str, hessian_KK: Tensor | None = None) -> None:
        try:
            set_weight(model, name, quantize_weight(model.get_parameter(name), quantization, hessian_KK))
        except UserError as e:
            raise UserError(f"{name}: {e}") from None
        on_matrix()

    with evaluating(model):
        if texts:
            _by_products(model, names, texts, put)
        else:
            for name in names:
                put(name)


def _by_products(
    model: nn.Module, names: Sequence[str], texts: Sequence[Sequence[int]], put: Callable[..., None]
) -> None:
    device = next(model.parameters()).device
    rows = [torch.tensor([list(ids)], device=device) for ids in texts]
    blocks = list(model.get_submodule("model.layers").children())
    for name in names:
        if name.startswith("model.embed_"):
            put(name)
    hidden, others = _entering(model, blocks, rows)
    for i, block in enumerate(blocks):
        prefix = f"model.layers.{i}."
        inside = {n.removesuffix(".weight"): n for n in names if n.startswith(prefix)}
        inputs = Inputs({n: model.get_submodule(n) for n in inside})
        with inputs.watched():
            for x_1TD, rest in zip(hidden, others[i], strict=True):
                block(x_1TD, *rest)
        for module, name in inside.items():
            put(name, inputs.hessian(module))
        hidden = [block(x_1TD, *rest)[0] for x_1TD, rest in zip(hidden, others[i], strict=True)]
    if _HEAD in names:
        norm = model.get_submodule("model.norm")
        put(_HEAD, sum((_products(norm(x_1TD)) for x_1TD in hidden), torch.zeros((), device=device)))


def _entering(
    model: nn.Module, blocks: Sequence[nn.Module], rows: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[tuple[Any, ...]]]]:
    """What the first block is given of each text, and what else every block is given with it: masks and angles."""
    first: list[Tensor] = []
    others: list[list[tuple[Any, ...]]] = [[] for _ in blocks]
    decoder, causal = model.get_submodule("model"), config_of(model).causal

    def recorded(i: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            others[i].append(args[1:])
            if i == 0:
                first.append(args[0])

        return hook

    handles = [block.register_forward_pre_hook(recorded(i)) for i, block in enumerate(blocks)]
    try:
        for ids_1T in rows:
            T = ids_1T.shape[1]
            positions_1T = torch.arange(T, device=ids_1T.device)[None]
            decoder(ids_1T, positions_1T, None, causal and T > 1, None)
    finally:
        for handle in handles:
            handle.remove()
    return first, others


def _products(x: Tensor) -> Tensor:
    """Sum of x x^T over all inputs, fp32 [K, K]."""
    x_TK = x.flatten(0, -2).float()
    return x_TK.t() @ x_TK


class Inputs:
    """What some linear layers are given: the sum of x x^T, kept once for layers that are given the same."""

    def __init__(self, layers: dict[str, nn.Module]):
        self._layers = layers
        self._like: dict[str, str] = {}  # the layer whose sum a layer has
        self._sums: dict[str, Tensor] = {}
        self._last: tuple[str, Tensor] | None = None

    def hessian(self, name: str) -> Tensor | None:
        """The sum [K, K] of a layer's inputs; None: it was not visited, as an expert that no token chose."""
        return self._sums.get(self._like.get(name, name))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Adds up what the layers are given meanwhile."""
        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if self._last is not None and self._last[1] is args[0] and name not in self._sums:
                self._like[name] = self._like.get(self._last[0], self._last[0])
            elif name not in self._like:
                found = _products(args[0])
                self._sums[name] = self._sums[name] + found if name in self._sums else found
            self._last = (name, args[0])

        return hook
