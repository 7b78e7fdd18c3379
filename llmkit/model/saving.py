"""Which files of a checkpoint hold a module's weights: a plain model, adapters alone, an actor with its critic, or
a student with its projections."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmkit.model.adapters import (
    adapter_files,
    adapter_parameters,
    adapter_sources,
    adapter_tensors,
    load_adapter_tensors,
)
from llmkit.model.gpt import GPT
from llmkit.model.heads import ActorCritic, Distilled
from llmkit.model.layouts import to_disk
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


def load_saved(module: nn.Module, files: dict[str, Tensors]) -> None:
    """Puts back what `saved_tensors` gave; names and shapes are those of this module."""
    if isinstance(module, ActorCritic):
        for folder, part in module.folders:
            load_saved(part, {file: files[f"{folder}{file}"] for file in saved_tensors(part)})
        return
    if isinstance(module, Distilled):
        load_saved(module.student, files)
        module.projections.load_state_dict(files[PROJECTIONS])
        return
    if adapters_of(module):
        load_adapter_tensors(module, files[ADAPTERS])
        return
    whole, given = module.state_dict(), files[MODEL]
    kept = {_place(t): name for name, t in _without_aliases(whole).items()}
    module.load_state_dict({n: given[n if n in given else kept[_place(t)]] for n, t in whole.items()})


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
