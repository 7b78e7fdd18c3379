"""One model on many processes: rows computed together (tensor parallelism), weights in shares (PyTorch's FSDP2).

Every process holds a rectangular piece of each parameter, its master, its gradient and its optimizer state, as a plain
tensor: `Split` knows which, so that norms, Muon, replicas and checkpoints need not know how the model is spread.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.config import UserError
from llmkit.model.first import Values, pending_of
from llmkit.model.gpt import GPT, Block, Decoder, parallel_plan
from llmkit.model.heads import SequenceClassifier
from llmkit.model.lora import LoraLinear, adapters_of, row_squares
from llmkit.model.moe import MoE
from llmkit.model.sequence import SequenceParallel
from llmkit.products import Linear, linear
from llmkit.training.config import ParallelConfig, RunConfig
from llmkit.training.dist import Ranks
from llmkit.training.experts import check_experts, experts_mesh, same_place_group, share_experts

Index = tuple[slice, ...]


# --- rows computed together ------------------------------------------------------------------------------------------


class _RowLinear(Linear):
    """A linear layer of which this process has some inputs: outputs are added up, and the bias once after that, each position
    in one process."""

    sequence: SequenceParallel

    def forward(self, x: Tensor) -> Tensor:
        out = self.sequence.summed(linear(x, self.weight))
        return out if self.bias is None else out + self.bias


class _RowLora(LoraLinear):
    """The same with an adapter: A has this share of the inputs too, B and the rows' lengths are whole for each, and one
    sum does for weight and adapter. Gradients of B and of the lengths are then partial."""

    sequence: SequenceParallel

    def forward(self, x: Tensor) -> Tensor:
        out = self.sequence.summed(self.adapted(x, None))
        return out if self.bias is None else out + self.bias

    def dropped(self, x: Tensor) -> Tensor:
        # The whole layer's draw, of which this is a part: what one process draws, and the same from there on.
        kept = F.dropout(x.new_ones(*x.shape[:-1], self.in_features), self.config.dropout)
        first = self.sequence.place * x.shape[-1]
        return x * kept[..., first : first + x.shape[-1]]

    def row_norms(self) -> Tensor:
        squares_O = row_squares(self.dense(), self.lora_A.weight, self.lora_B.weight, self.config.scaling)
        dist.all_reduce(squares_O, group=self.sequence.group)
        return squares_O.clamp(min=0).sqrt()


def _refuse(module: nn.Module, config: RunConfig, ranks: Ranks) -> None:
    """Raises UserError for what can't be spread as the recipe asks, naming what could."""
    said = config.parallel
    keys = [f"parallel.shard: {said.shard}"] if said.shard != "none" else []
    keys += [f"parallel.{key}: {n}" for key, n in (("tensor", said.tensor), ("experts", said.experts)) if n > 1]
    spread = " and ".join(keys)
    if any(layer.packed is not None for layer in adapters_of(module).values()):
        raise UserError(
            f"lora.quantize with {spread}: a base in 4 bits is not cut up: drop lora.quantize (bf16 in shares over 4 ranks "
            "takes as little memory), or leave `parallel` out"
        )
    models = _models(module)
    inside = {p for model in models for p in model.parameters()}
    if said.offload and any(p not in inside for p in module.parameters()):
        raise UserError(
            f"parallel.offload: true with {spread}: what is trained beside a network (a distillation's projections) is not in "
            "shares: set offload: false, or leave out the losses that need it"
        )
    if config.log.gradient_noise:
        raise UserError(
            f"log.gradient_noise with {spread}: a rank's own gradient is never in one place: set it to false, or leave "
            "`parallel` out"
        )
    if ranks.experts > 1:
        check_experts(module, ranks)
    for model in models:
        shape, n = model.config, ranks.tensor
        if n > 1 and shape.experts is not None:
            raise UserError(
                f"parallel.tensor ({n}): experts are not split by width: use parallel.experts, parallel.shard: full or both "
                "instead"
            )
        widths = {"n_heads": shape.n_heads, "n_kv_heads": shape.kv_heads, "d_ff": shape.width_of_mlp}
        for name, width in widths.items():
            if width % n:
                raise UserError(
                    f"parallel.tensor ({n}) does not divide model.{name} ({width}): choose a divisor of it, or "
                    "parallel.shard: full"
                )


def _models(module: nn.Module) -> list[GPT | SequenceClassifier]:
    """The networks in what is trained: it is one, or holds a policy and its critic, or a student and projections."""
    return [m for m in module.modules() if isinstance(m, (GPT, SequenceClassifier))]


def _share_rows(module: nn.Module, ranks: Ranks) -> tuple[dict[str, int], set[str]]:
    """Cuts the blocks' weights as `parallel_plan` says.

    Returns:
        Parameter -> the dimension along which it is cut; and the parameters whose gradients are partial.
    """
    cut: dict[str, int] = {}
    partial: set[str] = set()
    names = {id(p): n for n, p in module.named_parameters()}

    def keep(p: Tensor | None, dim: int) -> None:
        if p is not None:
            cut[names[id(p)]] = dim
            p.data = p.data.chunk(ranks.tensor, dim)[ranks.place].clone()

    def add_up(*parameters: Tensor | None) -> None:
        partial.update(names[id(p)] for p in parameters if p is not None)

    for decoder in (m for m in module.modules() if isinstance(m, Decoder)):
        again = not decoder.activation_checkpointing
        sequence: Any = SequenceParallel(ranks.tensor, ranks.place, ranks.tensor_group, again)
        decoder.share_rows(sequence)
        add_up(*decoder.norm.parameters())
        for found, how in ((m, h) for block in decoder.layers for m, h in _planned(block)):
            if how == "partial":
                add_up(*found.parameters())
                continue
            assert isinstance(found, Linear | LoraLinear)
            keep(found.weight, 0 if how == "columns" else 1)
            if how == "columns":
                keep(found.bias, 0)
                if isinstance(found, LoraLinear):  # A meets whole inputs, and sees a share of the outputs
                    keep(found.lora_B.weight, 0)
                    keep(found.magnitude, 0)
                    add_up(found.lora_A.weight)
                continue
            add_up(found.bias)
            if isinstance(found, LoraLinear):
                found.__class__, found.sequence = _RowLora, sequence
                keep(found.lora_A.weight, 1)
                add_up(found.lora_B.weight, found.magnitude)
            else:
                found.__class__, found.sequence = _RowLinear, sequence
    return cut, partial


def _planned(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The block's modules that `parallel_plan` names, and how they are shared: GPT-2 has no gate."""
    found = dict(block.named_modules())
    return ((found[name], how) for name, how in parallel_plan().items() if name in found)


# --- weights in shares -----------------------------------------------------------------------------------------------


def _mesh(config: ParallelConfig, ranks: Ranks) -> tuple[Any, int]:
    """The DeviceMesh over which FSDP2 shares weights, and how many shares there are."""
    from torch.distributed.device_mesh import init_device_mesh

    kind = ranks.device.type
    if config.shard == "full":
        mesh = init_device_mesh(kind, (ranks.world,)) if ranks.mesh is None else ranks.mesh["data"]
        return mesh, ranks.world
    replicas = config.replicas or max(1, ranks.processes // ranks.per_node)
    if ranks.world % replicas:
        raise UserError(
            f"parallel.replicas ({replicas}) does not divide the {ranks.world} ranks: choose a divisor, or shard: full"
        )
    shares = ranks.world // replicas
    names = ("replicate", "shard", "tensor")
    whole = init_device_mesh(kind, (replicas, shares, ranks.tensor), mesh_dim_names=names)
    return whole["replicate", "shard"], shares


def _shard(
    model: GPT | SequenceClassifier, mesh: Any, experts: Any, dtype: torch.dtype, wide: torch.dtype, offload: bool
) -> None:
    """Shares a network's weights: those of a block are put together just before it computes, those around the blocks for
    a whole step, since the loss takes the head's matrix itself. `experts`: the mesh of the experts that this rank holds,
    where others hold the rest; None: they are as the other weights. `offload`: shares lie in main memory."""
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Not pinned: from pinned memory FSDP2 may copy gradients without waiting for them, but the engine reads each as soon as
    # its hook is called; and it may give shares other memory, when the masters are already these.
    where = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()

    # Angles of rotary positions are inputs of a block, and must stay in fp32 (B59).
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype != wide:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    for mixture in (m for m in model.modules() if isinstance(m, MoE) and experts is not None):
        absent = {p for p in mixture.experts.parameters() if not p.numel()}
        fully_shard(mixture.experts, mesh=experts, mp_policy=policy, offload_policy=where, ignored_params=absent)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=where)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=where, reshard_after_forward=False)
    for name in ("at_tokens", "at_ends"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # a loss is a sum: nothing is averaged
            part.set_force_sum_reduction_for_comms(True)
    assert isinstance(model, FSDPModule)
    # An expert that no token of this rank visits has no gradient here, but may have one elsewhere.
    model.set_reduce_scatter_unused_params(any(isinstance(m, MoE) for m in model.modules()))


def local(tensor: Tensor) -> Tensor:
    """This process's numbers of a parameter or of its gradient, in the same memory."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --- who holds what --------------------------------------------------------------------------------------------------


class Split:
    """A module spread over processes, and where each of its numbers is. Methods with a sum or a gather are collectives."""

    def __init__(self, module: nn.Module, config: RunConfig, ranks: Ranks, dtype: torch.dtype, wide: torch.dtype):
        """Spreads the module in place.

        Args:
            module: its networks each with their weights, whole, the same in every process, on the CPU; or on the meta
                device, with first values that wait (see `model.first`): those are made one tensor at a time, and of each
                this process keeps its piece.
            config: the recipe, for `parallel`, and what does not go with it.
            ranks: this process's place.
            dtype: what is computed in.
            wide: of shares and of sums of gradients.

        Raises:
            UserError: for what can't be spread so.
        """
        _refuse(module, config, ranks)
        self.ranks, self.dtype = ranks, dtype
        self.offload = config.parallel.offload
        self.home = torch.device("cpu") if self.offload else ranks.device
        """Where pieces lie: of weights, masters, gradients, averages and optimizer state. Collectives and wholes are of
        `ranks.device`."""
        first = _Pending(module)
        self.skeleton = skeleton_of(module, dtype)
        self.shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
        self.sharded: set[str] = set()
        """Parameters whose gradients FSDP2 adds up over ranks."""
        cut, self.partial = _share_rows(module, ranks) if ranks.tensor > 1 else ({}, set())
        self.owners = share_experts(module, ranks) if ranks.experts > 1 else {}
        """Experts' parameters: the place of the ranks that hold them."""
        for p in module.parameters():
            if not p.is_meta:
                p.data = p.data.to(self.home)
        self._models: list[Any] = []
        shares = 1
        if config.parallel.shard != "none":
            mesh, shares = _mesh(config.parallel, ranks)
            experts = experts_mesh(ranks, shares) if self.owners else None
            names = {id(p): n for n, p in module.named_parameters()}
            for model in _models(module):
                self.sharded |= {names[id(p)] for p in model.parameters()}
                for p in model.parameters():  # what is frozen is no master, and stays as it was rounded
                    p.data = p.data.to(wide if p.requires_grad else dtype)
                _shard(model, mesh, experts, dtype, wide, self.offload)
                self._models.append(model)
        if config.compile:  # block by block: weights are put together, and sums made, between what is compiled
            for block in (m for m in module.modules() if isinstance(m, Block)):
                block.compile()
        self.size = max(shares * ranks.tensor, ranks.experts)
        """Processes that hold one whole model together; they are neighbours."""
        self.member = ranks.process % self.size
        self.replica_number = ranks.process // self.size
        self.group = _group(self.size, ranks)
        self._same_place = same_place_group(ranks) if self.owners and not self.sharded else None
        self.pieces = {
            name: [self._piece(name, cut.get(name), shares if name in self.sharded else 1, m) for m in range(self.size)]
            for name in self.shapes
        }
        first.keep_pieces(self, self.home)
        for name, p in module.named_parameters():
            held = local(p)
            assert held.device.type == self.home.type, name
            assert held.shape == torch.empty(self.shapes[name], device="meta")[self.index(name)].shape, name

    def _piece(self, name: str, dim: int | None, shares: int, member: int) -> Index:
        """What a member of those that hold one model has of a parameter that is cut along `dim` and in shares."""
        shape = self.shapes[name]
        if name not in self.owners:
            share, place = divmod(member, self.ranks.tensor)
            return _index(shape, dim, self.ranks.tensor, place, shares, share)
        share, place = divmod(member, self.ranks.experts)
        if place != self.owners[name]:
            return tuple(slice(0, 0 if i == 0 else n) for i, n in enumerate(shape))
        return _index(shape, None, 1, 0, shares // self.ranks.experts, share)

    def index(self, name: str) -> Index:
        """Which part of a whole parameter this process holds."""
        return self.pieces[name][self.member]

    def reshard(self) -> None:
        """Forgets weights that were put together: before others are computed with."""
        for model in self._models:
            model.reshard()

    def there(self, tensor: Tensor) -> Tensor:
        """On this process's device, which is all that collectives take: itself, unless pieces lie elsewhere."""
        return tensor.to(self.ranks.device)

    def back(self, tensor: Tensor) -> Tensor:
        """Where pieces lie."""
        return tensor.to(self.home)

    # --- sums ----------------------------------------------------------------------------------------------------------

    def sum_gradients(self, flat: Tensor, grads: dict[str, Tensor]) -> None:
        """Adds gradients up over the ranks, in place, where that was not done in the backward pass."""
        if not self.sharded and not self.owners:
            self.ranks.sum_(flat)
        elif not self.sharded:  # runs of experts hold the tokens of all N already: only ranks with the same add them up
            kinds = [(held, list(run)) for held, run in itertools.groupby(grads, self.owners.__contains__)]
            sizes = [sum(grads[name].numel() for name in run) for _, run in kinds]
            for (held, _), part in zip(kinds, flat.split(sizes), strict=True):
                if not held:
                    self.ranks.sum_(part)
                elif part.numel():
                    dist.all_reduce(part, group=self._same_place)
        for name, grad in grads.items():
            if self.sharded and name not in self.sharded:
                self.ranks.sum_(grad)
            if name in self.partial:
                whole = self.there(grad)
                dist.all_reduce(whole, group=self.ranks.tensor_group)
                if whole is not grad:
                    grad.copy_(whole)

    def squares(self, tensors: dict[str, Tensor]) -> Tensor:
        """The squared L2 norm of each whole tensor, of which these are pieces; every number counts once."""
        mine = self.there(torch.stack(torch._foreach_norm(list(tensors.values()))).square())
        first = [self.pieces[name].index(self.index(name)) == self.member for name in tensors]
        mine = torch.where(torch.tensor(first, device=mine.device), mine, 0.0)
        dist.all_reduce(mine, group=self.group)
        return self.back(mine)

    # --- whole tensors -------------------------------------------------------------------------------------------------

    def whole(self, name: str, piece: Tensor, to: int | None = None) -> Tensor | None:
        """A whole tensor from the pieces of it, on this process's device.

        Args:
            name: the parameter whose shape and pieces it has.
            piece: this process's.
            to: the only member that gets it, the others get None. Default: all get it.
        """
        shape, pieces = self.shapes[name], self.pieces[name]
        if len(set(map(str, pieces))) == 1:
            return self.there(piece) if to in (None, self.member) else None
        sizes = [torch.empty(shape, device="meta")[index].shape for index in pieces]
        buffer = torch.zeros(max(s.numel() for s in sizes), dtype=piece.dtype, device=self.ranks.device)
        buffer[: piece.numel()] = piece.reshape(-1)
        out = [torch.empty_like(buffer) for _ in pieces] if to in (None, self.member) else None
        if to is None:
            dist.all_gather(out, buffer, group=self.group)
        else:
            dist.gather(buffer, out, group=self.group, group_dst=to)
        if out is None:
            return None
        result = buffer.new_empty(shape)
        for index, size, part in zip(pieces, sizes, out, strict=True):
            result[index] = part[: size.numel()].view(size)
        return result

    def on_wholes(
        self, names: Sequence[str], pieces: Sequence[Tensor], work: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Pieces of what a function makes of whole matrices of one shape [K, A, B]; each is worked on by one process, on its
        device. Where pieces lie in main memory, a process has one matrix there at a time."""
        n = self.size if self.offload else len(names)
        found = (self._on_wholes(names[a : a + n], pieces[a : a + n], work) for a in range(0, len(names), n))
        return list(itertools.chain.from_iterable(found))

    def _on_wholes(
        self, names: Sequence[str], pieces: Sequence[Tensor], work: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        mine: list[Tensor] = []
        for i, (name, piece) in enumerate(zip(names, pieces, strict=True)):
            found = self.whole(name, piece, to=i % self.size)
            if i % self.size == self.member:
                assert found is not None
                mine.append(found)
        done = list(work(torch.stack(mine)).to(pieces[0].dtype)) if mine else []
        out = []
        for i, name in enumerate(names):
            shape, owner = self.shapes[name], i % self.size
            if owner == self.member:
                result = done[i // self.size].contiguous()
            else:
                result = torch.empty(shape, dtype=pieces[0].dtype, device=self.ranks.device)
            dist.broadcast(result, group=self.group, group_src=owner)
            out.append(self.back(result[self.index(name)]))
        return out

    def replica(self, weights: dict[str, Tensor]) -> nn.Module:
        """A whole copy of the module on this process, in evaluation mode and without gradients.

        Args:
            weights: this process's pieces of all parameters.
        """
        module = copy.deepcopy(self.skeleton)
        wholes = {}
        for name, piece in weights.items():
            found = self.whole(name, piece.to(self.dtype))
            assert found is not None
            wholes[name] = found.clone() if found.data_ptr() == piece.data_ptr() else found
        fill(module, wholes)
        return module.eval().requires_grad_(False)


class _Pending:
    """The first values of networks without memory."""

    def __init__(self, module: nn.Module):
        """Takes them out of a module that is still whole."""
        self._module = module
        self._dtypes = {name: p.dtype for name, p in module.named_parameters() if p.is_meta}
        """What values are rounded to first."""
        self._values: list[tuple[str, Values]] = []
        for name, model in module.named_modules():
            if isinstance(model, GPT | SequenceClassifier):
                self._values += [(f"{name}." if name else "", values) for values in pending_of(model)]
                pending_of(model).clear()

    @torch.no_grad()
    def keep_pieces(self, split: Split, device: torch.device) -> None:
        """Gives the module, which is cut up by now, memory and this process's pieces."""
        for model in _models(self._module):
            if any(p.is_meta for p in model.parameters()):
                model.to_empty(device=device)
        pieces = {name: local(p) for name, p in self._module.named_parameters() if name in self._dtypes}
        left = set(pieces)
        for prefix, values in self._values:
            for name, value in values():
                own = prefix + name
                pieces[own].copy_(value[split.index(own)].to(self._dtypes[own]))
                left.discard(own)
        assert not left, f"{min(left)} has no initial value"


def _group(size: int, ranks: Ranks) -> Any:
    """The process group of neighbours that hold one model together; None: all processes."""
    if size == ranks.processes:
        return None
    if size == ranks.tensor:
        return ranks.tensor_group
    groups = [dist.new_group(list(range(a, a + size))) for a in range(0, ranks.processes, size)]
    return groups[ranks.process // size]


def _index(shape: Sequence[int], dim: int | None, tensor: int, place: int, shares: int, share: int) -> Index:
    """The piece of a tensor that is cut along `dim` in `tensor` parts, and each of those in rows over the shares as
    `torch.chunk` does."""
    starts, ends = [0] * len(shape), list(shape)
    if dim is not None:
        width = shape[dim] // tensor
        starts[dim], ends[dim] = place * width, (place + 1) * width
    if shares > 1:
        first, rows = starts[0], ends[0] - starts[0]
        each = -(-rows // shares)
        starts[0], ends[0] = first + min(rows, share * each), first + min(rows, (share + 1) * each)
    return tuple(slice(a, b) for a, b in zip(starts, ends, strict=True))


# --- modules without weights -----------------------------------------------------------------------------------------


def skeleton_of(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a module whose parameters have shapes, but no memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=dtype, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives parameters these values, in whatever dtype and place they are."""
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def is_spread(config: ParallelConfig, ranks: Ranks) -> bool:
    """Whether a process holds less than the whole model: one process alone always holds all of it."""
    return ranks.tensor > 1 or ranks.experts > 1 or (config.shard != "none" and ranks.processes > 1)
