"""Low-rank adapters: small matrices trained beside a model's own, which stay as they are.

LoRA (Hu et al. 2021, arXiv 2106.09685): y = W x + s B A x. DoRA (Liu et al. 2024, arXiv 2402.09353): the rows of W + s B A
are turned only, and their lengths m are trained apart: y = m / |W + s B A| * (W + s B A) x. The names of a model's own
parameters don't change, and its `state_dict` is that of the model without adapters; `adapters` saves those.

Shapes: I inputs and O outputs of a matrix, R rank.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.config import UserError
from llmkit.model.config import LoraConfig
from llmkit.model.first import Values, give, pending_of
from llmkit.model.quantized import Nf4
from llmkit.products import Linear, linear

_RANGE = re.compile(r"(\d+)-(\d+)")
# Not matrices of their own in transformers, so that PEFT can't adapt them one by one.
_EXPERTS = re.compile(r"\.mlp\.(gate$|shared_expert_gate$|experts\.)")


@dataclass(frozen=True)
class Base:
    """The model that adapters belong to: without it, or beside another, they mean nothing."""

    name: str
    """As it is named on disk or on the hub."""
    weights: str
    """See `adapters.weights_hash`."""


class AdapterWeight(nn.Module):
    """A parameter `weight` that no state dict knows: it belongs to the adapter's file, not to the model's."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.weight = nn.Parameter(value)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


def row_squares(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """Squared length of each row of W + s B A, [O], without that matrix: |w|^2 + 2 s (W A^T) . b + s^2 b (A A^T) b.

    Where W and A have a share of the columns, the sum of these over the shares is that of the whole.
    """
    wide = torch.promote_types(W_OI.dtype, torch.float32)
    A, B = A_RI.to(wide), B_OR.to(wide)
    squares_O = torch.linalg.vector_norm(W_OI, dim=1, dtype=wide).square()
    cross_OR = (W_OI @ A_RI.to(W_OI.dtype).t()).to(wide)
    return squares_O + (B * (2 * scaling * cross_OR + scaling**2 * (B @ (A @ A.t())))).sum(1)


def row_norms(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """Length of each row of W + s B A, [O]."""
    return row_squares(W_OI, A_RI, B_OR, scaling).clamp(min=0).sqrt()


@torch.no_grad()
def merged_weight(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float, magnitude_O: Tensor | None) -> Tensor:
    """The matrix that computes what W and its adapter compute together, in W's dtype; the sum is made in fp32 or better."""
    wide = torch.promote_types(W_OI.dtype, torch.float32)
    A, B = A_RI.to(wide), B_OR.to(wide)
    out_OI = W_OI.to(wide) + scaling * (B @ A)
    if magnitude_O is not None:
        out_OI = out_OI * (magnitude_O.to(wide) / torch.linalg.vector_norm(out_OI, dim=1))[:, None]
    return out_OI.to(W_OI.dtype)


class LoraLinear(nn.Linear):
    """A linear layer and its adapter: the layer's own weight, which is not trained, under its own name."""

    def __init__(self, linear: nn.Linear, config: LoraConfig, base: Base):
        """Takes over a layer's parameters; the adapter's have no values yet.

        Args:
            linear: the layer; its weight is shared, not copied.
            config: rank, scale and kind.
            base: the whole model's.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.config, self.origin, self.active = config, base, True
        W = self.weight.detach()
        self.lora_A = AdapterWeight(W.new_empty(config.r, self.in_features))
        self.lora_B = AdapterWeight(W.new_empty(self.out_features, config.r))
        self.packed = None if config.quantize is None else Nf4(W)
        self.lora_magnitude_vector: AdapterWeight | None = None
        if config.dora:
            self.lora_magnitude_vector = AdapterWeight(W.new_empty(self.out_features))
        if self.packed is not None:
            self.weight = None  # type: ignore[assignment]

    def dense(self) -> Tensor:
        """The layer's own weight [O, I]."""
        return self.weight if self.packed is None else self.packed.dense()

    @property
    def magnitude(self) -> Tensor | None:
        """The rows' trained lengths [O]; None: LoRA."""
        return None if self.lora_magnitude_vector is None else self.lora_magnitude_vector.weight

    def _own(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, self.weight, bias) if self.packed is None else self.packed(x, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x, self.bias)

    def adapted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer computes, with this bias."""
        if not self.active:
            return self._own(x, bias)
        drops = self.training and self.config.dropout > 0
        dropped = self.dropped(x) if drops else x
        scaling, A, B = self.config.scaling, self.lora_A.weight, self.lora_B.weight
        update = F.linear(F.linear(dropped, A), B) * scaling
        if self.magnitude is None:
            return self._own(x, bias) + update
        with torch.no_grad():  # a constant to the gradient (section 4.3 of the paper)
            norms_O = self.row_norms().to(self.magnitude.dtype)
        ratio_O = self.magnitude / norms_O
        if drops:  # what is turned and stretched sees the dropped input, the matrix itself the whole one, as in PEFT
            return self._own(x, bias) + (ratio_O - 1) * self._own(dropped, None) + ratio_O * update
        out = ratio_O * (self._own(x, None) + update)
        return out if bias is None else out + bias

    def dropped(self, x: Tensor) -> Tensor:
        """The input of A in training."""
        return F.dropout(x, self.config.dropout)

    def row_norms(self) -> Tensor:
        """Lengths of the rows of weight and adapter together, [O]."""
        return row_norms(self.dense(), self.lora_A.weight, self.lora_B.weight, self.config.scaling)

    def merged(self) -> Tensor:
        """The weight that computes the same as weight and adapter together."""
        weights = self.lora_A.weight, self.lora_B.weight
        return merged_weight(self.dense().detach(), *weights, self.config.scaling, self.magnitude)


# --- which matrices --------------------------------------------------------------------------------------------------


def candidates(model: nn.Module) -> dict[str, nn.Linear]:
    """Every matrix that may have an adapter, by the name of its layer: those of the blocks but experts and routers."""
    blocks = ((n, m) for n, m in model.named_modules() if n.startswith("model.layers.") and isinstance(m, nn.Linear))
    return {n: m for n, m in blocks if not _EXPERTS.search(n)}


def targets_of(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The layers that patterns mean; without patterns all candidates.

    Raises:
        UserError: a pattern means none of them.
    """
    known = candidates(model)
    if not patterns:
        return known
    meant: set[str] = set()
    for pattern in patterns:
        found = {name for name in known if any(_means(p, name) for p in _without_range(pattern))}
        if not found:
            raise UserError(f"lora.targets: '{pattern}' {_hint(pattern, known, model)}")
        meant |= found
    return {name: layer for name, layer in known.items() if name in meant}


def _means(pattern: str, name: str) -> bool:
    """Whether a pattern is a run of a name's parts (`q_proj`, `self_attn`, `layers.0`), or a glob over it."""
    short = name.removeprefix("model.")
    return f".{pattern}." in f".{name}." or fnmatchcase(name, pattern) or fnmatchcase(short, pattern)


def _without_range(pattern: str) -> list[str]:
    """`layers.0-2.mlp` -> `layers.0.mlp`, `layers.1.mlp`, `layers.2.mlp`."""
    patterns = [""]
    for part in pattern.split("."):
        match = _RANGE.fullmatch(part)
        if match and not int(match[1]) <= int(match[2]) < int(match[1]) + 100_000:
            raise UserError(f"lora.targets: '{pattern}': the range {part} is empty or too long")
        parts = range(int(match[1]), int(match[2]) + 1) if match else [part]
        patterns = [f"{p}.{n}" if p else str(n) for p in patterns for n in parts]
    return patterns


def _hint(pattern: str, known: dict[str, nn.Linear], model: nn.Module) -> str:
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in known]
    if any(_means(p, n) for p in _without_range(pattern) for n in linear):
        return (
            "names heads, experts or routers, which have no adapters here: name matrices of attention or of plain MLPs"
        )
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
    near = difflib.get_close_matches(pattern, leaves, 1, 0.6)
    return "is no matrix of the blocks: " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(leaves)}")


# --- models with adapters --------------------------------------------------------------------------------------------


def heads_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a head of scores, which is new, and so trained as a whole; a language model has none."""
    return {n: p for n, p in model.named_parameters() if not n.startswith(("model.", "lm_head."))}


def apply_lora(model: nn.Module, config: LoraConfig, seed: int, base: Base) -> None:
    """Freezes a model but for a head of scores, and gives its matrices adapters, which change nothing yet.

    Args:
        model: a GPT, or another head beside a Decoder, with its weights loaded, or with ones that wait (see `first`).
        config: the recipe's section.
        seed: of the A matrices.
        base: the model as it lies on disk.

    Raises:
        UserError: targets that mean nothing, or quantisation where bitsandbytes is not installed.
    """
    layers = targets_of(model, config.targets)
    model.requires_grad_(False)
    for p in heads_of(model).values():
        p.requires_grad_(True)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(layer, config, base))
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    weights = matrices_of(model, list(shapes)) if config.dora else None

    def values() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for name, (O, I) in shapes.items():
            # As PEFT: A uniform in +-1 / sqrt(I), which is Kaiming's with a = sqrt(5); B zero: the first output is W x.
            bound = 1 / math.sqrt(I)
            yield f"{name}.lora_A.weight", torch.empty(config.r, I).uniform_(-bound, bound, generator=generator)
            yield f"{name}.lora_B.weight", torch.zeros(O, config.r)
        for name, W_OI in weights() if weights is not None else ():
            yield f"{name}.lora_magnitude_vector.weight", torch.linalg.vector_norm(W_OI, dim=1)

    give(model, values)


def matrices_of(model: nn.Module, layers: Collection[str]) -> Values:
    """The weights of layers that were given adapters just now, by the layers' names, as they are or as they will be."""
    made, before = adapters_of(model), list(pending_of(model))
    dtypes = {f"{name}.weight": made[name].lora_B.weight.dtype for name in layers}

    def values() -> Iterator[tuple[str, Tensor]]:
        if not before:
            yield from ((name, made[name].dense().detach()) for name in layers)
        for earlier in before:
            for name, value in earlier():
                if name in dtypes:
                    yield name.removesuffix(".weight"), value.to(dtypes[name]).contiguous()

    return values


def adapter_size(model: nn.Module, config: LoraConfig) -> tuple[int, int, int]:
    """What adapters would add to a network, which may be without memory: weights of their matrices, lengths of rows, and
    how many of the network's own weights would be kept in 4 bits."""
    layers = targets_of(model, config.targets).values()
    matrices = sum(config.r * (m.in_features + m.out_features) for m in layers)
    lengths = sum(m.out_features for m in layers) if config.dora else 0
    packed = sum(m.weight.numel() for m in layers) if config.quantize is not None else 0
    return matrices, lengths, packed


def adapters_of(module: nn.Module) -> dict[str, LoraLinear]:
    """The layers that have an adapter, by name; none in a plain model."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoraLinear)}


def describe(model: nn.Module) -> str:
    """What a run says of a model with adapters."""
    layers, heads = adapters_of(model), heads_of(model)
    config = next(iter(layers.values())).config
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = sum(m.in_features * m.out_features for m in layers.values() if m.packed is not None)
    total = sum(p.numel() for p in model.parameters()) + packed
    kind = ("DoRA" if config.dora else "LoRA") + (f" on {config.quantize} weights" if config.quantize else "")
    return (
        f"{kind}, rank {config.r}, scale {config.scaling:g}, on {len(layers)} matrices"
        + (f" and all of {', '.join(heads)}" if heads else "")
        + f": training {trained:,} of {total:,} parameters ({trained / total:.2%})"
    )


@contextlib.contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """The model as it was before training, without a copy of it: a reference. A head of scores stays as it is."""
    layers = [m for m in adapters_of(module).values() if m.active]
    try:
        for layer in layers:
            layer.active = False
        yield
    finally:
        for layer in layers:
            layer.active = True


@contextlib.contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """The model with its adapters added into its weights, for generating faster; afterwards the weights are what they were.

    Takes memory for a second copy of the matrices with adapters. In half precision the sums are rounded, so that
    probabilities differ from the unmerged model's in their last digits.

    Raises:
        UserError: for a quantised model.
    """
    layers = [m for m in adapters_of(module).values() if m.active]
    _check_dense(layers)
    kept = [layer.weight.data for layer in layers]
    try:
        for layer in layers:
            layer.weight.data, layer.active = layer.merged(), False
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data, layer.active = weight, True


@torch.no_grad()
def merge_into_base(model: nn.Module) -> None:
    """Turns a model with adapters into a plain one that computes the same. Raises UserError for a quantised one."""
    layers = adapters_of(model)
    _check_dense(layers.values())
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        plain = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(layer.merged(), requires_grad=False)
        plain.bias = layer.bias
        setattr(model.get_submodule(parent), leaf, plain.train(layer.training))


def _check_dense(layers: Any) -> None:
    if any(layer.packed is not None for layer in layers):
        raise UserError(
            "lora.quantize: adapters can't be added into 4-bit weights: `llmkit merge` adds them into the base"
        )
