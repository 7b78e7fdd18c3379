"""Matrices held as small whole numbers and computed with as they are: the weights of a folder that `llmkit quantize` wrote.

In 8 bits a row has one scale: w = s c, c from -127 to 127. In 4 bits every group of neighbours in a row has a scale and
the value of code 0: w = s c + low, c from 0 to 15, two codes a byte. How codes are chosen is told in `export.rounding`.

A `QuantizedWeight` stands where the matrix stood, as the parameter of a linear layer or an embedding, so a tied head stays
tied and no layer is another than before. Only inference computes with it: nothing here has a gradient for the weights.

Shapes: N rows (outputs, or tokens), K columns, G groups of a row, M rows of input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from llmkit.config import UserError
from llmkit.model.coded import (
    FEW_TILED,
    dense_of,
    dynamic_product,
    int4_product,
    int8_product,
    tiled_product,
    tiled_works,
    tiles_of,
)

KEY = "quantization_config"  # of config.json: other readers look there, and refuse a method that they don't know
METHOD = "llmkit"
QUANTIZED = "quantized.safetensors"  # the file; of several, how their index is called
BITS = (8, 4)
GROUP = 32
MAX_GROUP = 1 << 16
# Routers and heads of scores are tiny, and what they decide is not: they stay as they are.
_KEPT = (".mlp.gate.weight", ".shared_expert_gate.weight")
# The parts of a quantised matrix, as they are called on disk behind its name.
_CODES, _SCALES, _LOWS = ".codes", ".scales", ".lows"


@dataclass(frozen=True)
class Quantization:
    """How a model's matrices are held."""

    bits: int
    """8 or 4."""
    group: int = GROUP
    """Weights that share a scale; of 4 bits only."""
    dynamic: bool = False
    """Whether what a matrix is multiplied with is rounded to 8 bits as well, row by row as it comes; of 8 bits only."""

    def to_json(self) -> dict[str, Any]:
        """The section of config.json."""
        section: dict[str, Any] = {"quant_method": METHOD, "bits": self.bits}
        if self.bits == 4:
            return section | {"group": self.group}
        return section | ({"dynamic": True} if self.dynamic else {})

    def __str__(self) -> str:
        if self.bits == 4:
            return f"int4 in groups of {self.group}"
        return "int8, a scale a row" + (", inputs in int8 as well" if self.dynamic else "")


def quantization_of(hf: dict[str, Any], name: str) -> Quantization | None:
    """What a config.json tells of it; None: the weights are floating-point numbers.

    Raises:
        UserError: another program's method, or a section of ours that can't be.
    """
    told = hf.get(KEY)
    if told is None:
        return None
    method = told.get("quant_method") if isinstance(told, dict) else told
    if method != METHOD:
        raise UserError(
            f"{name}: {KEY}: weights quantised by {method!r} are not read: take the model they were made from, and "
            "`llmkit quantize`"
        )
    bits, group = told.get("bits"), told.get("group", GROUP)
    if bits not in BITS or type(group) is not int or not 2 <= group <= MAX_GROUP or group % 2:
        raise UserError(f"{name}: {KEY}: bits must be 8 or 4 and group even, up to {MAX_GROUP}: got {bits} and {group}")
    dynamic = told.get("dynamic", False)
    if type(dynamic) is not bool or (dynamic and bits == 4):
        raise UserError(f"{name}: {KEY}: dynamic must be true or false, and true with 8 bits alone: got {dynamic!r}")
    return Quantization(bits, group, dynamic)


# --- a matrix --------------------------------------------------------------------------------------------------------


def groups_of(n_columns: int, group: int) -> tuple[int, int]:
    """How many groups a row has, and their size; a row shorter than a group is one. The last may be filled up."""
    size = min(group, n_columns + n_columns % 2)
    return -(-n_columns // size), size


class QuantizedWeight(Tensor):
    """A matrix [N, K] of which only codes and scales are held. To whoever asks it has the dtype it is computed in.

    Products and lookups use the codes; a slice of rows is one again. Any other function gets the dense matrix, and none
    can write into it.
    """

    codes: Tensor
    """int8 [N, K], or uint8 [N, G * group / 2]."""
    scales: Tensor
    """fp32 [N], or [N, G] in fp16, or in fp32 where fp16 can't hold them."""
    lows: Tensor | None
    """The value of code 0 [N, G], in the dtype of the scales; None in 8 bits."""
    dynamic: bool
    """Whether products round their input as well (`coded.dynamic_product`); in 8 bits only."""
    tiles: tuple[Tensor, Tensor] | None
    """See `tiles_of`; made when they are first used."""

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, lows: Tensor | None, n_columns: int, dtype: torch.dtype,
        dynamic: bool = False,
    ) -> QuantizedWeight:  # fmt: skip
        shape = (codes.shape[0], n_columns)
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        weight.codes, weight.scales, weight.lows, weight.dynamic, weight.tiles = codes, scales, lows, dynamic, None
        return weight

    def __init__(
        self, codes: Tensor, scales: Tensor, lows: Tensor | None, n_columns: int, dtype: torch.dtype,
        dynamic: bool = False,
    ) -> None:  # fmt: skip
        """Holds what it is given, without a copy.

        Args:
            codes: this and the next two as in the class's fields.
            n_columns: K, which may be less than the codes that are held.
            dtype: what it is computed in.
            dynamic: as in the class's fields.
        """

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedWeight({tuple(self.shape)}, {8 if self.lows is None else 4} bits, {self.dtype})"

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [N, K]; made in fp32 or better, then rounded."""
        return dense_of(self.codes, self.scales, self.lows, self.shape[1]).to(dtype or self.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of the matrix, [..., K] for ids [...]: what an embedding looks up."""
        at, lows = ids.reshape(-1), self.lows
        found = dense_of(self.codes[at], self.scales[at], None if lows is None else lows[at], self.shape[1])
        return found.to(self.dtype).view(*ids.shape, -1)

    def product(self, x: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """x W^T + bias, [..., N] for x [..., K]; differentiable in x."""
        x_MK = x.reshape(-1, x.shape[-1])
        if x.requires_grad and torch.is_grad_enabled():
            out_MN = F.linear(x_MK, self.dense(x.dtype))
        elif self.lows is None:
            out_MN = (dynamic_product if self.dynamic else int8_product)(x_MK, self.codes, self.scales)
        elif self._is_tiled_for(x_MK):
            self.tiles = tiles_of(self.codes, self.scales, self.lows) if self.tiles is None else self.tiles
            out_MN = tiled_product(x_MK, self.scales.shape[1], *self.tiles)
        else:
            out_MN = int4_product(x_MK, self.codes, self.scales, self.lows)
        out = out_MN.view(*x.shape[:-1], self.shape[0])
        return out if bias_N is None else out + bias_N

    def _is_tiled_for(self, x_MK: Tensor) -> bool:
        """Whether PyTorch's own product in 4 bits can take them, and works. What is no parameter, as a slice of one, doesn't
        live long enough for tiles to pay."""
        if not isinstance(self, nn.Parameter):
            return False
        few = 0 < len(x_MK) <= FEW_TILED and x_MK.dtype == torch.bfloat16 and self.codes.is_cpu
        whole = self.shape[0] % 16 == 0 and self.shape[1] == 2 * self.codes.shape[1]
        return few and whole and tiled_works(self.shape[1] // self.scales.shape[1])

    def _with(self, part: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> QuantizedWeight:
        """The same of other parts: rows of them, or copies."""
        lows = None if self.lows is None else part(self.lows)
        dtype = dtype or self.dtype
        return QuantizedWeight(part(self.codes), part(self.scales), lows, self.shape[1], dtype, self.dynamic)

    # What PyTorch asks of a tensor that holds others: with it `module.to(...)` exchanges the parameter as a whole.
    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.dtype, bool]]:
        names = ["codes", "scales"] + ([] if self.lows is None else ["lows"])
        return names, (self.shape[1], self.dtype, self.dynamic)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], told: tuple[int, torch.dtype, bool], *_: Any) -> QuantizedWeight:
        return QuantizedWeight(parts["codes"], parts["scales"], parts.get("lows"), *told)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Products and lookups, before they are taken apart into what the codes can't do."""
        kwargs = kwargs or {}
        if func is F.linear and len(args) > 1 and isinstance(args[1], cls):
            return args[1].product(args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
        if func is F.embedding and len(args) > 1 and isinstance(args[1], cls):
            return args[1].rows(args[0])
        if func is Tensor.requires_grad_ and (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)):
            raise UserError(
                "the model's weights are quantised, which can't be trained: begin with the model they were made from"
            )
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors, unless told otherwise below
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Copies, casts, slices of rows; anything else is given the dense matrix."""
        kwargs = kwargs or {}
        aten = torch.ops.aten
        weight = args[0] if args else None
        if isinstance(weight, cls):
            if func in (aten.detach.default, aten.alias.default):
                return weight._with(lambda t: t)
            if func is aten.clone.default:
                return weight._with(torch.clone)
            if func is aten._to_copy.default and (kwargs.get("dtype") or weight.dtype).is_floating_point:
                device = kwargs.get("device")
                return weight._with(lambda t: t.to(device=device, copy=True), kwargs.get("dtype"))
            if func is aten.slice.Tensor and (args[1] if len(args) > 1 else 0) == 0:
                return weight._with(lambda t: func(t, 0, *args[2:], **kwargs))
        if func.__name__ == "_linear_pointwise.default" and isinstance(args[1], cls):  # see `llmkit.products`
            return args[1].product(args[0], args[2])
        for at, told in enumerate(func._schema.arguments):
            written = told.alias_info is not None and told.alias_info.is_write
            if written and isinstance(args[at] if at < len(args) else kwargs.get(told.name), cls):
                raise UserError("the model's weights are quantised: nothing can be written into them")
        plain_args, plain_kwargs = tree_map(lambda t: t.dense() if isinstance(t, cls) else t, (args, kwargs))
        return func(*plain_args, **plain_kwargs)


# --- a model ---------------------------------------------------------------------------------------------------------


def quantizable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices that are held in few bits, by name: all of the decoder and a vocabulary's head, but routers."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.dim() == 2 and name.startswith(("model.", "lm_head.")) and not name.endswith(_KEPT)
    }


def is_quantized(model: nn.Module) -> bool:
    """Whether any of its parameters is held in few bits."""
    return any(isinstance(p, QuantizedWeight) for p in model.parameters())


def set_weight(model: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in a parameter's place; it is not trained."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def stored_shapes(model: nn.Module, quantization: Quantization) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a quantised model's files hold, for a model that may be without memory.

    The names and layouts are ours, in every family: no other program reads these files.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    held = quantizable(model)
    for name, p in model.named_parameters():
        if name not in held:
            shapes[name] = tuple(p.shape)
        elif quantization.bits == 8:
            shapes |= {name + _CODES: tuple(p.shape), name + _SCALES: (p.shape[0],)}
        else:
            G, size = groups_of(p.shape[1], quantization.group)
            shapes[name + _CODES] = (p.shape[0], G * size // 2)
            shapes |= dict.fromkeys((name + _SCALES, name + _LOWS), (p.shape[0], G))
    return shapes


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a quantised model's files hold: the parts of every matrix, and what is not quantised; views."""
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if not isinstance(p, QuantizedWeight):
            tensors[name] = p.detach()
            continue
        tensors |= {name + _CODES: p.codes, name + _SCALES: p.scales}
        if p.lows is not None:
            tensors[name + _LOWS] = p.lows
    return tensors


def fill(
    model: nn.Module, stored: Iterable[tuple[str, Tensor]], quantization: Quantization, where: str,
    dtype: torch.dtype | None, device: torch.device | str,
) -> None:  # fmt: skip
    """Gives a model without memory its parameters from what its files hold, whose names and shapes are known to fit.

    Args:
        model: on the meta device.
        stored: names and tensors; copied, since a file may be replaced while the model is used (B116).
        quantization: how they are held.
        where: the folder, for errors.
        dtype: what is computed in. Default: that of the final norm.
        device: where the parameters live.

    Raises:
        UserError: a tensor has a dtype that it can't have.
    """
    held, parts = quantizable(model), {name: t.to(device=device, copy=True) for name, t in stored}
    dtype = parts["model.norm.weight"].dtype if dtype is None else dtype
    for name, p in dict(model.named_parameters()).items():
        if name not in held:
            _check_dtype(where, name, parts[name], (torch.float32, torch.float64, torch.bfloat16, torch.float16))
            set_weight(model, name, parts.pop(name).to(dtype))
            continue
        codes, scales, lows = (parts.pop(name + part, None) for part in (_CODES, _SCALES, _LOWS))
        assert codes is not None and scales is not None
        _check_dtype(where, name + _CODES, codes, (torch.int8,) if lows is None else (torch.uint8,))
        _check_dtype(
            where, name + _SCALES, scales, (torch.float32,) if lows is None else (torch.float16, torch.float32)
        )
        if lows is not None:
            _check_dtype(where, name + _LOWS, lows, (scales.dtype,))
        set_weight(model, name, QuantizedWeight(codes, scales, lows, p.shape[1], dtype, quantization.dynamic))


def _check_dtype(where: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise UserError(f"{where}: {name} is {str(tensor.dtype).removeprefix('torch.')}: {names} is expected")
