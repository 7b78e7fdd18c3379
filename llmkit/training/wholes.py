"""Checkpoints of a model that is spread over processes: whole tensors are gathered, each by its owner.

The files are those of one process, or parts of them: a folder is a plain Hugging Face model whatever the mesh it was
trained on, and any number of processes, on any mesh, resumes it. A layer has one owner, which writes all that belongs to
it; owners are chosen so that each has about as many bytes. Adapters are one file of PEFT's, and so one process's; of
their base nothing is gathered.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmkit.model.lora import adapters_of
from llmkit.model.saving import ADAPTERS, saved_parameters, saved_part, saved_tensors, saved_values
from llmkit.model.weights import read_tensors, shapes_of
from llmkit.training.checkpoint import MAX_SHARD_BYTES, Tensors, index_of, whole_name
from llmkit.training.norms import layers_of
from llmkit.training.optim import tensor_bytes
from llmkit.training.parallel import Index, Split, fill

Pieces = dict[str, Tensor]
_BUCKET = 64 << 20  # bytes that a process gathers at once: so much more memory a save takes on its device


class _Item(NamedTuple):
    """A tensor of a checkpoint: a parameter's weight, or what belongs to it in another file."""

    own: str
    file: str | None = None
    name: str = ""


class Wholes:
    """Who gathers what, and into which files. Every process makes the same plan."""

    def __init__(self, split: Split, weights: Pieces, states: dict[str, Pieces]):
        """Plans.

        Args:
            split: what the tensors are pieces of.
            weights: this process's pieces of all parameters, as they are computed with.
            states: file -> this process's pieces of what belongs to parameters, under `<parameter>` or
                `<kind>.<parameter>`; a tensor without dimensions is no piece.
        """
        self.split, self.weights, self.states = split, weights, states
        self.held, others = saved_parameters(split.skeleton)
        """The parameters that a checkpoint holds: not a base, beside adapters."""
        self._looked_at = self.held | others
        self.units = list(layers_of(split.shapes).values())
        self._of = {file: self._by_parameter(tensors) for file, tensors in states.items()}
        sizes = [self._shapes(unit) for unit in self.units]
        self.sizes = {(file, n): t for files in sizes for file, tensors in files.items() for n, t in tensors.items()}
        """Shapes and dtypes by (file of one process, tensor)."""
        n_bytes = [
            sum(tensor_bytes(t.values()) for file, t in files.items() if not _is_adapters(file)) for files in sizes
        ]
        self.total_bytes = sum(tensor_bytes(t.values()) for files in sizes for t in files.values())
        filled = [self.total_bytes - sum(n_bytes), *[0] * (split.size - 1)]
        self.owners = [0] * len(self.units)
        for u in sorted(range(len(self.units)), key=lambda u: (-n_bytes[u], u)):
            self.owners[u] = filled.index(min(filled))
            filled[self.owners[u]] += n_bytes[u]
        self.writers = [
            0 if any(map(_is_adapters, files)) else owner for files, owner in zip(sizes, self.owners, strict=True)
        ]
        """Who gathers a layer's weights: its owner, or of adapters process 0."""
        self._items = self._plan_items()
        self.names = self._name(sizes)
        """The file that a tensor stands in, by (file of one process, tensor)."""

    def _by_parameter(self, tensors: Pieces) -> dict[str, list[tuple[str, Tensor]]]:
        """Parameter -> the tensors that belong to it, with their names."""
        known: dict[str, list[tuple[str, Tensor]]] = {}
        for name, t in tensors.items():
            own = name
            while own not in self.split.shapes:
                own = own.partition(".")[2]
                assert own, name
            known.setdefault(own, []).append((name, t))
        return known

    def _shapes(self, unit: list[str]) -> dict[str, Tensors]:
        """What the files of a unit hold, without memory."""
        split = self.split
        known = [n for n in unit if n in self._looked_at]
        files = _saved(split.skeleton, {n: torch.zeros(1, dtype=split.dtype).expand(split.shapes[n]) for n in known})
        for file, of in self._of.items():
            found = {
                name: torch.empty(split.shapes[own] if t.dim() else (), dtype=t.dtype, device="meta")
                for own in unit
                for name, t in of.get(own, ())
            }
            if found:
                files[file] = found
        return files

    def _name(self, sizes: list[dict[str, Tensors]]) -> dict[tuple[str, str], str]:
        """Gives every tensor its file: one per owner, or several where a model's part is very large."""
        bins: dict[str, list[list[str]]] = {}
        for member in range(self.split.size):
            filled: dict[str, int] = {}
            for files, owner, writer in zip(sizes, self.owners, self.writers, strict=True):
                mine = {f: t for f, t in files.items() if (owner if f in self.states else writer) == member}
                for file, tensors in mine.items():
                    for name, t in tensors.items():
                        size = tensor_bytes([t])
                        full = not _is_adapters(file) and filled.get(file, 0) + size > MAX_SHARD_BYTES
                        if file not in filled or full:
                            bins.setdefault(file, []).append([])
                            filled[file] = 0
                        bins[file][-1].append(name)
                        filled[file] += size
        names: dict[tuple[str, str], str] = {}
        for file, parts in bins.items():
            stem = file.removesuffix(".safetensors")
            for i, part in enumerate(parts, 1):
                own = file if len(parts) == 1 else f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors"
                names |= {(file, name): own for name in part}
        return names

    @torch.no_grad()
    def gather(self) -> dict[str, Tensors]:
        """This process's files, whole, in main memory. A collective of the processes that hold one model; where several
        groups hold one each, the first one's."""
        out: dict[str, Tensors] = {}
        if self.split.replica_number:
            return out
        mine: dict[_Item, Tensor] = {}
        for items in itertools.zip_longest(*map(self._buckets, self._items), fillvalue=[]):
            mine |= self._exchange(list(items))
        for unit in self.units:
            # Weights are taken out: where the layout on disk differs, what they are converted to takes their place.
            whole = {own: mine.pop(item) for own in unit if (item := _Item(own)) in mine}
            files = _saved(self.split.skeleton, whole) if whole else {}
            for file, of in self._of.items():
                states = (_Item(own, file, name) for own in unit for name, _ in of.get(own, ()))
                files[file] = {item.name: mine[item] for item in states if item in mine}
            for file, tensors in files.items():
                for name, t in tensors.items():
                    out.setdefault(self.names[file, name], {})[name] = t
        if self.split.member == 0:
            out |= {file: {} for file, tensors in self.states.items() if not tensors}
        return out

    def _plan_items(self) -> list[list[_Item]]:
        """What each process gathers, in order."""
        items: list[list[_Item]] = [[] for _ in range(self.split.size)]
        for unit, owner, writer in zip(self.units, self.owners, self.writers, strict=True):
            for own in unit:
                if own in self._looked_at:
                    items[writer].append(_Item(own))
                for file, of in self._of.items():
                    items[owner] += [_Item(own, file, name) for name, _ in of.get(own, ())]
        return items

    def _buckets(self, items: list[_Item]) -> list[list[_Item]]:
        """Parts of about `_BUCKET` bytes, or of one tensor."""
        buckets: list[list[_Item]] = []
        filled = 0
        for item in items:
            size = math.prod(self._shape(item)) * self._piece(item)[1].itemsize
            if not buckets or filled + size > _BUCKET:
                buckets.append([])
                filled = 0
            buckets[-1].append(item)
            filled += size
        return buckets

    def _exchange(self, items: list[list[_Item]]) -> dict[_Item, Tensor]:
        """Whole tensors in main memory, by one message from each process to each.

        Args:
            items: by who gets them.

        Returns:
            This process's own.
        """
        split, me = self.split, self.split.member
        sent_sizes = [sum(self._room(item, me, m) for item in to) for m, to in enumerate(items)]
        sent_sizes[me] = 0
        sent = torch.empty(sum(sent_sizes), dtype=torch.uint8, device=split.ranks.device)
        at = 0
        for member, to in enumerate(items):
            for item in to if member != me else ():
                if room := self._room(item, me, member):
                    piece, dtype = self._piece(item)
                    _typed(sent, at, dtype, piece.shape).copy_(piece)
                    at += room
        sizes = [sum(self._room(item, m, me) for item in items[me]) for m in range(split.size)]
        sizes[me] = 0
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=split.ranks.device)
        if split.size > 1:
            dist.all_to_all_single(received, sent, sizes, sent_sizes, group=split.group)
        received = received.cpu()
        whole = {item: torch.empty(self._shape(item), dtype=self._piece(item)[1]) for item in items[me]}
        at = 0
        for member in range(split.size):
            for item, t in whole.items():
                if room := self._room(item, member, me):
                    part = t[split.pieces[item.own][member]] if t.dim() else t
                    if member == me:
                        part.copy_(self._piece(item)[0])
                    else:
                        part.copy_(_typed(received, at, t.dtype, part.shape))
                        at += room
        return whole

    def _piece(self, item: _Item) -> tuple[Tensor, torch.dtype]:
        """This process's piece, and the dtype that is saved."""
        if item.file is None:
            return self.weights[item.own], self.split.dtype
        piece = self.states[item.file][item.name]
        return piece, piece.dtype

    def _shape(self, item: _Item) -> tuple[int, ...]:
        return self.split.shapes[item.own] if self._piece(item)[0].dim() else ()

    def _room(self, item: _Item, member: int, to: int) -> int:
        """Bytes of a process's piece of a tensor, filled up to a multiple of 8: none if another, or the one that gets it,
        has the same piece."""
        piece, dtype = self._piece(item)
        pieces: list[Index] = self.split.pieces[item.own] if piece.dim() else [()] * self.split.size
        if member != (to if pieces[member] == pieces[to] else pieces.index(pieces[member])):
            return 0
        n = math.prod(s.stop - s.start for s in pieces[member]) * dtype.itemsize
        return -(-n // 8) * 8

    def index_files(self) -> dict[str, bytes]:
        """For every model in several files: its index."""
        indices: dict[str, dict[str, Tensors]] = {}
        for (file, name), own in self.names.items():
            if own != file and file.rpartition("/")[2] == "model.safetensors":
                parts = indices.setdefault(f"{file}.index.json", {})
                parts.setdefault(own.rpartition("/")[2], {})[name] = self.sizes[file, name]
        return {file: index_of(parts) for file, parts in indices.items()}

    @torch.no_grad()
    def load(self, folder: Path, but: Collection[str] = ()) -> None:
        """Fills this process's pieces from a checkpoint's folder, of any mesh, a tensor at a time: no more than the pieces is
        read.

        Args:
            folder: verified.
            but: files that are not for here.

        Raises:
            ValueError: on any difference in names or shapes.
        """
        found = {file: paths for file, paths in _files(folder).items() if file not in but}
        model = {file for file, _ in self.names if file not in self.states}
        for file in [*model, *self.states]:
            if file not in found:
                raise ValueError(f"{file}: in this run only")
        extra = sorted(found.keys() - model - self.states.keys())
        if extra:
            raise ValueError(f"{extra[0]}: in the checkpoint only")
        for file in model:
            own = {n: tuple(t.shape) for (f, n), t in self.sizes.items() if f == file}
            check_shapes(file, own, shapes_of(found[file]))
            stored = (pair for path in found[file] for pair in read_tensors(path))
            # A tensor after the other: but adapters, which are few, share matrices on disk.
            for tensors in [dict(stored)] if _is_adapters(file) else ({name: t} for name, t in stored):
                for name, value in saved_values(self.split.skeleton, file, tensors):
                    self.weights[name].copy_(value[self.split.index(name)].to(self.split.dtype))
        for file, tensors in self.states.items():  # masters after the weights, which are they, rounded
            self._load_state(file, tensors, found[file])

    def _load_state(self, file: str, tensors: Pieces, paths: list[Path]) -> None:
        missing = dict(tensors)
        owned = {name: own for own, of in self._of[file].items() for name, _ in of}
        for path in paths:
            for name, given in read_tensors(path):
                piece = missing.pop(name, None)
                shape = () if piece is None or not piece.dim() else self.split.shapes[owned[name]]
                if piece is None or tuple(given.shape) != shape:
                    raise ValueError(
                        f"{file}: {name}: {tuple(given.shape)} is saved, "
                        f"{'nothing' if piece is None else shape} is expected"
                    )
                piece.copy_(given[self.split.index(owned[name])] if shape else given)
        if missing:
            raise ValueError(f"{file}: {next(iter(missing))}: nothing is saved")


def _typed(buffer: Tensor, at: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor in a buffer of bytes, from one of them on."""
    return buffer[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _is_adapters(file: str) -> bool:
    """Whether a file is one that PEFT must find in one piece."""
    return file.rpartition("/")[2] == ADAPTERS


def check_shapes(file: str, own: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError naming the first tensor of a model that is missing, unknown or of another shape."""
    for name in [*own, *given]:
        saved, expected = given.get(name, "nothing"), own.get(name, "nothing")
        if saved != expected:
            raise ValueError(f"{file}: {name}: {saved} is saved, {expected} is expected")


def _files(folder: Path) -> dict[str, list[Path]]:
    """The safetensors files of a checkpoint, parts of one together under its name."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found.setdefault(whole_name(path.relative_to(folder).as_posix()), []).append(path)
    return found


def _saved(skeleton: nn.Module, whole: Pieces) -> dict[str, Tensors]:
    """What a checkpoint's files hold of the parameters of a layer, under the family's names and in its layout."""
    if not adapters_of(skeleton):
        return saved_part(skeleton, whole)
    module = copy.deepcopy(skeleton)
    fill(module, whole)
    files = {
        file: {name: t for name, t in tensors.items() if not t.is_meta}
        for file, tensors in saved_tensors(module).items()
    }
    return {file: tensors for file, tensors in files.items() if tensors}
