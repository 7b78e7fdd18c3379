"""A smaller model made of parts of a larger one: some of its layers, channels, neurons and heads.

Which layers is told, or they are spread evenly; of the rest those stay whose activations are largest on data (Minitron,
Muralidharan et al. 2024, arXiv 2407.14679). What is cut away is lost: training, best by distillation, makes up for it.

Shapes as in `gpt`; D channels of the residual stream, F neurons of an MLP, K key-value heads.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.config import UserError, validate
from llmkit.distill.config import FromTeacherConfig
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, Block, RMSNorm
from llmkit.model.moe import MoE

Rows = tuple[
    Tensor, Tensor, Tensor | None, Tensor
]  # ids_BT, positions_BT, mask (see `GPT.forward`), real_BT: no padding


def kept_layers(spec: FromTeacherConfig, n_layers: int) -> list[int]:
    """The teacher's layers that stay, counted from 0.

    A number of them is spread evenly, the first and the last among them; one alone is the first.

    Raises:
        UserError: the teacher doesn't have them.
    """
    if spec.layers is None:
        return list(range(n_layers))
    if isinstance(spec.layers, int):
        n = spec.layers
        _check("layers", n, n_layers, "layers")
        # In integers: floor(i (n_layers - 1) / (n - 1) + 1/2), which for n <= n_layers never comes twice.
        return [(2 * i * (n_layers - 1) + n - 1) // (2 * (n - 1)) for i in range(n)] if n > 1 else [0]
    if spec.layers[-1] > n_layers:
        raise UserError(f"from_teacher.layers: {spec.layers[-1]}: the teacher's layers are 1 to {n_layers}")
    return [layer - 1 for layer in spec.layers]


def student_config(teacher: GPTConfig, spec: FromTeacherConfig) -> GPTConfig:
    """The network that `pruned` makes. What is not named stays as wide as the teacher's; heads stay as wide in any case.

    Raises:
        UserError: more is asked for than the teacher has, a network that no Hugging Face class expresses, or narrower
            MLPs of a teacher that has experts in their place.
    """
    kept = kept_layers(spec, teacher.n_layers)
    changes: dict[str, Any] = {}
    if len(kept) < teacher.n_layers:
        changes |= _without_layers(teacher, kept)
    if spec.d_ff is not None:
        if teacher.experts is not None:
            raise UserError(
                "from_teacher.d_ff: the teacher has experts in place of an MLP, which can't be narrowed: leave it out"
            )
        _check("d_ff", spec.d_ff, teacher.width_of_mlp, "neurons in each MLP")
        if spec.d_ff < teacher.width_of_mlp:
            changes["d_ff"] = spec.d_ff
    if spec.d_model is not None:
        _check("d_model", spec.d_model, teacher.d_model, "channels")
        if spec.d_model < teacher.d_model:  # from which the MLP's and the heads' widths may have been derived
            changes = {"d_ff": teacher.width_of_mlp, **changes, "d_model": spec.d_model}
    if spec.n_kv_heads is not None:
        _check("n_kv_heads", spec.n_kv_heads, teacher.kv_heads, "key-value heads")
        if spec.n_kv_heads < teacher.kv_heads:
            changes["n_kv_heads"] = spec.n_kv_heads
            changes["n_heads"] = spec.n_kv_heads * (teacher.n_heads // teacher.kv_heads)
    if {"d_model", "n_heads"} & changes.keys():
        d_model, n_heads = changes.get("d_model", teacher.d_model), changes.get("n_heads", teacher.n_heads)
        width = teacher.width_of_head
        changes["head_dim"] = None if d_model == n_heads * width else width
        if d_model != n_heads * width and teacher.family in ("gpt2", "qwen2_moe"):
            raise UserError(
                f"from_teacher: {d_model} channels, and {n_heads} heads of {width}: in a {teacher.family} they must be "
                "as many: choose d_model and n_kv_heads together"
            )
    if not changes:
        return teacher
    student: GPTConfig = validate(GPTConfig, {**teacher.model_dump(mode="json"), **changes}, {(): "from_teacher"})
    return student


def _check(key: str, asked: int, has: int, what: str) -> None:
    if asked > has:
        raise UserError(f"from_teacher.{key}: {asked}: the teacher has {has} {what}: set it to {has} at most")


def _without_layers(teacher: GPTConfig, kept: list[int]) -> dict[str, Any]:
    """What changes in a network of which only these layers, counted from 0, are left."""
    changes: dict[str, Any] = {"n_layers": len(kept)}
    n_full = sum(layer < teacher.n_full_layers for layer in kept)
    changes["n_full_layers"] = n_full
    if n_full == len(kept):
        changes |= {"sliding_window": None, "n_full_layers": 0}
    if teacher.experts is not None:
        dense = [new for new, old in enumerate(kept) if not teacher.experts.has_experts(old)]
        experts = {**teacher.experts.model_dump(mode="json"), "every": 1, "dense_layers": dense}
        changes["experts"] = experts if len(dense) < len(kept) else None
    return changes


# --- what the teacher does on data -----------------------------------------------------------------------------------


class _Sizes:
    """Hooks that add up how large activations are while a teacher runs: per channel, neuron or head, in fp64 on the CPU.

    `sums` is keyed by the module's name and what is added up of it.
    """

    def __init__(self, teacher: GPT, kept: list[int], config: GPTConfig):
        """Args:
        teacher: is looked into until `close`.
        kept: the layers that stay.
        config: the student's; what is as wide as the teacher's is not measured.
        """
        old = teacher.config
        self.teacher, self.n_positions = teacher, 0
        self.sums: defaultdict[str, Tensor | float] = defaultdict(float)
        self._real_BT = torch.empty(0, dtype=torch.bool)
        self._handles: list[Any] = []
        for layer in kept:
            block, name = teacher.model.layers[layer], f"model.layers.{layer}"
            assert isinstance(block, Block)
            if config.d_model < old.d_model:
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    self._watch_norm(f"{name}.{norm}")
            if config.width_of_mlp < old.width_of_mlp and not isinstance(block.mlp, MoE):
                self._watch_input(f"{name}.mlp.down_proj", None)
            if config.kv_heads < old.kv_heads:
                self._watch_input(f"{name}.self_attn.o_proj", old.kv_heads)
        if config.d_model < old.d_model:
            self._watch_norm("model.norm")

    @property
    def any(self) -> bool:
        """Whether there is something to measure."""
        return bool(self._handles)

    def add(self, ids_BT: Tensor, positions_BT: Tensor, mask: Tensor | None, real_BT: Tensor) -> None:
        """Runs the teacher."""
        self._real_BT = real_BT
        self.n_positions += int(real_BT.sum())
        self.teacher.forward(ids_BT, positions_BT, mask)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, key: str, value_BTX: Tensor) -> None:
        self.sums[key] = self.sums[key] + value_BTX[self._real_BT].sum(0).cpu().double()

    def _watch_norm(self, name: str) -> None:
        """The size of each channel it gives out, and each channel's share in what it divides by."""

        def hook(norm: nn.Module, args: tuple[Tensor], out_BTD: Tensor) -> None:
            x_BTD, width = _wide(args[0]), args[0].shape[-1:]
            if isinstance(norm, nn.LayerNorm):
                plain_BTD = F.layer_norm(x_BTD, width, eps=norm.eps)
            else:
                assert isinstance(norm, RMSNorm)
                plain_BTD = F.rms_norm(x_BTD, width, eps=norm.eps)
            self._add(f"{name} size", _wide(out_BTD).abs())
            self._add(f"{name} energy", plain_BTD.square())

        self._handles.append(self.teacher.get_submodule(name).register_forward_hook(hook))

    def _watch_input(self, name: str, n_heads: int | None) -> None:
        """The size of each number that goes into a matrix; or of the vectors that so many heads make of them."""

        def hook(linear: nn.Module, args: tuple[Tensor]) -> None:
            x_BTX = _wide(args[0])
            if n_heads is None:
                self._add(f"{name} size", x_BTX.abs())
            else:
                self._add(f"{name} size", torch.linalg.vector_norm(x_BTX.unflatten(-1, (n_heads, -1)), dim=-1))

        self._handles.append(self.teacher.get_submodule(name).register_forward_pre_hook(hook))

    def largest(self, names: list[str], n: int) -> Tensor:
        """The n places with the largest sizes, summed over these modules, in rising order; among equals the first."""
        total_X = sum(self.sums[f"{name} size"] for name in names)
        assert isinstance(total_X, Tensor)
        if not total_X.isfinite().all():
            raise UserError(f"from_teacher: the teacher's activations at {names[0]} are not finite: nothing is larger")
        return torch.sort(total_X, descending=True, stable=True).indices[:n].sort().values

    def shrinkage(self, norm: str, channels: Tensor) -> float:
        """How many times smaller what a norm divides by becomes, root mean square over positions, if these channels stay."""
        energy_D = self.sums[f"{norm} energy"]
        assert isinstance(energy_D, Tensor)
        ratio = energy_D[channels].mean() / energy_D.mean()
        return math.sqrt(ratio.item()) if ratio > 0 else 1.0


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- the student -----------------------------------------------------------------------------------------------------

# Of which kind the rows and the columns of a matrix are, or the entries of a vector: D channels, F neurons, Q and K the
# entries of query and key-value heads. What is not named stays whole.
_AXES: dict[str, tuple[str, str]] = {
    "embed_tokens": ("", "D"), "embed_positions": ("", "D"), "lm_head": ("", "D"),
    "q_proj": ("Q", "D"), "k_proj": ("K", "D"), "v_proj": ("K", "D"), "o_proj": ("D", "Q"),
    "gate_proj": ("F", "D"), "up_proj": ("F", "D"), "down_proj": ("D", "F"),
    "gate": ("", "D"), "shared_expert_gate": ("", "D"),
    "input_layernorm": ("D", ""), "post_attention_layernorm": ("D", ""), "norm": ("D", ""),
    "q_norm": ("", ""), "k_norm": ("", ""),
}  # fmt: skip


@torch.no_grad()
def pruned(teacher: GPT, spec: FromTeacherConfig, batches: Iterable[Rows]) -> GPT:
    """The student: a new model with what is kept of the teacher's weights, in their dtype and on their device.

    The norms' weights make up for channels that are gone, so that what they give out stays as large as it was. A spec
    that names nothing copies the teacher.

    Args:
        teacher: stays as it is.
        spec: the recipe's section.
        batches: data to measure activations on; not read if only layers are chosen.

    Raises:
        UserError: see `student_config`; or activations can't be measured, since there are no data or they are not finite.
    """
    config, kept = student_config(teacher.config, spec), kept_layers(spec, teacher.config.n_layers)
    sizes = _measured(teacher, kept, config, batches)
    places, norms = _places(sizes, kept, config)
    weight = teacher.model.embed_tokens.weight
    with torch.device("meta"):
        student = GPT(config)
    student = student.to(dtype=weight.dtype).to_empty(device=weight.device)
    for name, p in student.named_parameters():
        parts, layer = name.split("."), ""
        if parts[1] == "layers":
            layer = parts[2] = str(kept[int(parts[2])])
        source = ".".join(parts)
        value: Tensor = teacher.get_parameter(source)
        for axis, kind in enumerate(_AXES[parts[-2]][: value.dim()]):
            at = places.get(kind, places.get(f"{kind} {layer}"))
            if at is not None:
                value = value.index_select(axis, at.to(value.device))
        p.copy_(value * norms[source] if source in norms else value)
    return student


def _places(sizes: _Sizes, kept: list[int], config: GPTConfig) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What stays of each axis that becomes narrower, keyed by "D", "F layer", "Q layer" and "K layer"; and the factor of
    each norm's weight."""
    old, places, norms = sizes.teacher.config, dict[str, Tensor](), dict[str, float]()
    if config.d_model < old.d_model:
        names = [key.removesuffix(" energy") for key in sizes.sums if key.endswith(" energy")]
        places["D"] = sizes.largest(names, config.d_model)
        norms = {f"{name}.weight": sizes.shrinkage(name, places["D"]) for name in names}
    width, groups = old.width_of_head, old.n_heads // old.kv_heads
    for layer in kept:
        name = f"model.layers.{layer}"
        if f"{name}.mlp.down_proj size" in sizes.sums:
            places[f"F {layer}"] = sizes.largest([f"{name}.mlp.down_proj"], config.width_of_mlp)
        if f"{name}.self_attn.o_proj size" in sizes.sums:
            heads_K = sizes.largest([f"{name}.self_attn.o_proj"], config.kv_heads)
            places[f"K {layer}"] = _entries(heads_K, width)
            places[f"Q {layer}"] = _entries(heads_K, width * groups)
    return places, norms


def _entries(blocks: Tensor, width: int) -> Tensor:
    """The places of all entries of blocks of this width."""
    return (blocks[:, None] * width + torch.arange(width)).flatten()


def _measured(teacher: GPT, kept: list[int], config: GPTConfig, batches: Iterable[Rows]) -> _Sizes:
    sizes, was_training = _Sizes(teacher, kept, config), teacher.training
    if not sizes.any:
        return sizes
    teacher.eval()
    try:
        for rows in batches:
            sizes.add(*rows)
    finally:
        sizes.close()
        teacher.train(was_training)
    if not sizes.n_positions:
        raise UserError("from_teacher: there is not one token of training data to measure the teacher's activations on")
    return sizes
