"""Which files of a checkpoint hold a module's weights: a plain model, adapters alone, an actor with its critic, or
a student with its projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.model.adapters import (
    adapter_files,
    adapter_parameters,
    adapter_sources,
    adapter_tensors,
    adapter_values,
)
from llmkit.model.gpt import GPT
from llmkit.model.heads import ActorCritic, Distilled, SequenceClassifier
from llmkit.model.layouts import config_of, from_disk, to_disk
from llmkit.model.lora import adapters_of

Tensors = dict[str, Tensor]
MODEL, ADAPTERS = "model.safetensors", "adapter_model.safetensors"
PROJECTIONS = "trainer_state/projections.safetensors"


def saved_tensors(module: nn.Module) -> dict[str, Tensors]:
    """File -> the tensors in it, under the names and in the layout of `state_dict`, which Hugging Face's class expects.

    Views, but where a layout must be converted.
    """
    if isinstance(module, ActorCritic):
        return {f"{folder}{file}": t for folder, part in module.folders for file, t in saved_tensors(part).items()}
    if isinstance(module, Distilled):
        return {**saved_tensors(module.student), PROJECTIONS: dict(module.projections.state_dict())}
    if adapters_of(module):
        return {ADAPTERS: adapter_tensors(module)}
    return {MODEL: _without_aliases(module.state_dict())}


def merged_tensors(model: GPT, n_tokens: int) -> Tensors:
    """A language model as its Hugging Face class expects it, for others to write with: adapters are merged, and embedding
    and head have a row for each token and no more. Views, but where adapters or a layout need new tensors."""
    layers = adapters_of(model)
    added = tuple(f"{name}.lora_" for name in layers)
    own = {name: p.detach() for name, p in model.named_parameters() if not name.startswith(added)}
    own |= {f"{name}.weight": layer.merged() for name, layer in layers.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in own:
            own[name] = own[name][:n_tokens]
    return to_disk(model.config, own)


def saved_parameters(module: nn.Module) -> tuple[set[str], set[str]]:
    """The parameters that the files hold, by their names in the module; and others without which those files can't be
    made. Beside adapters a base is in neither."""
    if isinstance(module, ActorCritic | Distilled):
        parts = [(name, *saved_parameters(part)) for name, part in module.named_children()]
        return (
            {f"{name}.{n}" for name, held, _ in parts for n in held},
            {f"{name}.{n}" for name, _, others in parts for n in others},
        )
    if adapters_of(module):
        return adapter_parameters(module), adapter_sources(module)
    return {name for name, _ in module.named_parameters()}, set()


def saved_files(files: dict[str, bytes], module: nn.Module) -> dict[str, bytes]:
    """The small files beside the weights: with adapters, those of adapters in place of a model's."""
    if isinstance(module, Distilled):
        return saved_files(files, module.student)
    if not isinstance(module, ActorCritic):
        return adapter_files(files, module)
    out: dict[str, bytes] = {}
    for folder, part in module.folders:
        others = [f for f, _ in module.folders if f.startswith(folder) and f != folder]
        own = {
            n.removeprefix(folder): b
            for n, b in files.items()
            if n.startswith(folder) and not n.startswith(tuple(others))
        }
        out |= {f"{folder}{name}": b for name, b in adapter_files(own, part).items()}
    return out


@torch.no_grad()
def load_saved(module: nn.Module, files: dict[str, Tensors]) -> None:
    """Puts back what `saved_tensors` gave; names and shapes are those of this module."""
    if not isinstance(module, ActorCritic | Distilled | GPT | SequenceClassifier):  # its state dict may be anything
        whole, given = module.state_dict(), files[MODEL]
        kept = {_place(t): name for name, t in _without_aliases(whole).items()}
        module.load_state_dict({n: given[n if n in given else kept[_place(t)]] for n, t in whole.items()})
        return
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for file in saved_tensors(module):
        for name, value in saved_values(module, file, files[file]):
            own[name].copy_(value)


def saved_values(module: nn.Module, file: str, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """The parameters that tensors of one of a module's files hold, by their names in the module; views.

    Args:
        module: its parameters need have no memory.
        file: as `saved_tensors` names it.
        tensors: all of the file's if it is of adapters; else any.
    """
    if isinstance(module, ActorCritic):
        # The critic's folder is in the actor's, which is that of the checkpoint.
        folder, inner, part = next(found for found in reversed(_parts(module)) if file.startswith(found[0]))
        found = saved_values(part, file.removeprefix(folder), tensors)
    elif isinstance(module, Distilled):
        inner = "projections" if file == PROJECTIONS else "student"
        found = iter(tensors.items()) if file == PROJECTIONS else saved_values(module.student, file, tensors)
    elif file == ADAPTERS:
        inner, found = "", adapter_values(module, tensors)
    else:
        inner = ""
        known = isinstance(module, GPT | SequenceClassifier)
        found = iter((from_disk(config_of(module), tensors) if known else tensors).items())
    yield from ((f"{inner}.{name}".lstrip("."), value) for name, value in found)


def saved_part(module: nn.Module, parameters: Tensors) -> dict[str, Tensors]:
    """File -> what `saved_tensors` would give of some parameters, by their names in a module without adapters.

    Args:
        module: its own parameters are not looked at.
        parameters: of those that share a tensor on disk all or none.
    """
    if isinstance(module, ActorCritic):
        return {
            f"{folder}{file}": tensors
            for folder, name, part in _parts(module)
            for file, tensors in saved_part(part, _below(parameters, name)).items()
        }
    if isinstance(module, Distilled):
        projections = _below(parameters, "projections")
        files = saved_part(module.student, _below(parameters, "student"))
        return {**files, PROJECTIONS: projections} if projections else files
    known = isinstance(module, GPT | SequenceClassifier)
    found = to_disk(config_of(module), parameters) if known else parameters
    return {MODEL: found} if found else {}


def _parts(module: ActorCritic) -> list[tuple[str, str, nn.Module]]:
    """Folder, name in the module, and network."""
    return [
        (folder, name, part) for (folder, part), (name, _) in zip(module.folders, module.named_children(), strict=True)
    ]


def _below(parameters: Tensors, name: str) -> Tensors:
    return {n.removeprefix(f"{name}."): t for n, t in parameters.items() if n.startswith(f"{name}.")}


def _place(t: Tensor) -> tuple[Any, ...]:
    """The same for two tensors exactly if they are the same numbers in memory."""
    return t.device, t.data_ptr(), t.dtype, t.shape, t.stride()


def _without_aliases(state: Tensors) -> Tensors:
    """A state dict in which a tensor that has two names (tied weights) is there once, under the first."""
    places: set[tuple[Any, ...]] = set()
    kept = {}
    for name, t in state.items():
        if t.numel() == 0 or t.is_meta or _place(t) not in places:
            places.add(_place(t))
            kept[name] = t
    return kept
