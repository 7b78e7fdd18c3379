"""Which layers learn from which, what is seen of them, and the projections between their widths.

Layers are counted from 1, as in a recipe: layer 3's hidden states are what the third block leaves in the residual
stream. Shapes as in `model.gpt`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.config import UserError
from llmkit.distill.config import LayerMap
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, Attention, Block

LayerPair = tuple[int, int]  # of the student, of the teacher


def layer_pairs(layers: LayerMap, n_student: int, n_teacher: int, label: str) -> list[LayerPair]:
    """The pairs (student's layer, teacher's layer) of a term.

    Args:
        layers: the recipe's map. uniform: layer m of M learns from layer m N / M of N, halves rounded up (TinyBERT, arXiv
            1909.10351), but never from one before the first.
        n_student: M, layers of the student.
        n_teacher: N, layers of the teacher.
        label: what the term is called, for messages.

    Raises:
        UserError: a pair names a layer that one of the models doesn't have.
    """
    if layers == "last":
        return [(n_student, n_teacher)]
    if layers == "uniform":
        # In integers: floor(m N / M + 1/2).
        return [(m, max(1, (2 * m * n_teacher + n_student) // (2 * n_student))) for m in range(1, n_student + 1)]
    for pair in layers:
        for layer, n, who in zip(pair, (n_student, n_teacher), ("student", "teacher"), strict=True):
            if not 1 <= layer <= n:
                raise UserError(
                    f"losses: {label}: layers: {list(pair)}: the {who} has no layer {layer}, its layers are 1 to {n}"
                )
    return list(layers)


class Taps:
    """What the layers of a model held in its last forward pass.

    ```
    with Taps(model, hidden=[2], attention=[4]) as taps:
        model(ids_BT)
    taps.hidden[2], taps.queries[4]
    ```

    They are the very tensors that the model went on with, not computed again: gradients flow through them, in a model
    with dropout in its adapters too, and with activation checkpointing, whose second run of a block is not looked at. A
    model that was compiled runs uncompiled meanwhile, if there is anything to see: what was compiled knows of no taps.
    """

    def __init__(self, model: GPT, hidden: Collection[int] = (), attention: Collection[int] = ()):
        """Args:
            model: is looked into between entering and leaving.
            hidden: layers whose output is kept.
            attention: layers whose queries, keys and values are kept.

        Raises:
            ValueError: the model doesn't have such a layer.
        """
        n_layers = model.config.n_layers
        if odd := [layer for layer in (*hidden, *attention) if not 1 <= layer <= n_layers]:
            raise ValueError(f"layer {odd[0]}: the model's layers are 1 to {n_layers}")
        self.hidden: dict[int, Tensor] = {}
        """[B, T, D] by layer: the residual stream after it, before the final norm."""
        self.queries: dict[int, Tensor] = {}
        """[B, H, T, E] by layer, as they are multiplied with the keys: after norms and rotation."""
        self.keys: dict[int, Tensor] = {}
        """[B, K, T, E] by layer, likewise; not repeated for the queries that share them."""
        self.values: dict[int, Tensor] = {}
        """[B, K, T, E] by layer."""
        self._model, self._of_hidden, self._of_attention = model, sorted(set(hidden)), sorted(set(attention))
        self._open = False  # while the model runs: a block that is run again in the backward pass is not looked at
        self._handles: list[Any] = []
        self._compiled: list[tuple[nn.Module, Callable[..., Any] | None]] = []

    def __enter__(self) -> Taps:
        if not self._of_hidden and not self._of_attention:
            return self
        decoder = self._model.model
        for module in (self._model, *decoder.layers):  # spread over processes, blocks are compiled one by one
            self._compiled.append((module, module._compiled_call_impl))
            module._compiled_call_impl = None
        self._handles = [decoder.register_forward_pre_hook(self._begin), decoder.register_forward_hook(self._end)]
        for layer in self._of_hidden:
            self._handles.append(decoder.layers[layer - 1].register_forward_hook(self._keep_hidden(layer)))
        for layer in self._of_attention:
            self._attention(layer).tap = self._keep_attention(layer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        for layer in self._of_attention:
            self._attention(layer).tap = None
        self._handles, self._open = [], False
        for module, compiled in self._compiled:
            module._compiled_call_impl = compiled
        self._compiled = []

    def _attention(self, layer: int) -> Attention:
        block = self._model.model.layers[layer - 1]
        assert isinstance(block, Block)
        return block.self_attn

    def _begin(self, decoder: nn.Module, args: Any) -> None:
        for kept in (self.hidden, self.queries, self.keys, self.values):
            kept.clear()
        self._open = True

    def _end(self, decoder: nn.Module, args: Any, out: Any) -> None:
        self._open = False

    def _keep_hidden(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(block: nn.Module, args: Any, out: Any) -> None:
            if self._open:
                assert isinstance(block, Block)
                self.hidden[layer] = block.whole(out[0], args[-1])  # of whole rows, whoever computes them

        return keep

    def _keep_attention(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        def keep(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> None:
            if self._open:
                self.queries[layer], self.keys[layer], self.values[layer] = q_BHTE, k_BKTE, v_BKTE

        return keep


def projection_name(label: str, student: int, teacher: int) -> str:
    """A projection's key in the dictionary of `projections_of`: `label/student-teacher`, without dots and slashes, which
    separate the names of modules and files."""
    name = f"{label}/{student}-{teacher}"
    for character in "%./":  # the first is what the others are written with
        name = name.replace(character, f"%{ord(character):02X}")
    return name


def projections_of(
    pairs: Mapping[str, Sequence[LayerPair]], student: GPTConfig, teacher: GPTConfig, seed: int
) -> nn.ModuleDict:
    """Matrices that turn the student's hidden states into vectors as wide as the teacher's, fp32, on the CPU.

    Lengths and angles are what they were: the columns (the rows, of a student that is wider than its teacher) begin
    orthonormal.

    Args:
        pairs: the layers of each term that compares hidden states, by its label.
        student: its network.
        teacher: its network.
        seed: of the matrices.

    Returns:
        Linear layers without bias by `projection_name`; none where both are as wide, since nothing has to be turned.
    """
    projections, generator = nn.ModuleDict(), torch.Generator().manual_seed(seed)
    if student.d_model == teacher.d_model:
        return projections
    for label, of_term in pairs.items():
        for s, t in of_term:
            # Not on the meta device, and no numbers drawn that are thrown away.
            weight_TS = torch.empty(teacher.d_model, student.d_model, dtype=torch.float32, device="cpu")
            nn.init.orthogonal_(weight_TS, generator=generator)
            layer = nn.Linear(student.d_model, teacher.d_model, bias=False, device="meta")
            layer.weight = nn.Parameter(weight_TS)
            projections[projection_name(label, s, t)] = layer
    return projections
