"""What a pipeline will take: seconds and bytes of each node, from earlier runs or else from shapes. Torch only where asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.config import UserError
from llmkit.model.config import GPTConfig, count_params
from llmkit.model.hf import read_config
from llmkit.pipeline.graph import Node, Pipeline
from llmkit.pipeline.runner import Action
from llmkit.pipeline.state import State
from llmkit.plan import BYTES, flops_per_token, peak_flops
from llmkit.plan.gpus import Gpu
from llmkit.storage import resolve_model
from llmkit.training.config import RunConfig

UTILISATION = 0.35  # of the machine's peak, where nothing was measured yet


@dataclass(frozen=True)
class Forecast:
    """None: nobody can say before it has run once."""

    seconds: float | None
    n_bytes: int | None
    measured: bool = False
    """The time is that of an earlier run, in proportion to the steps."""


def forecast(action: Action, pipeline: Pipeline, state: State, gpu: Gpu | None = None) -> Forecast:
    """What a node will take from here on. One that is skipped takes no time, and the disk that it has taken.

    Args:
        gpu: what times are told of, in place of earlier runs here and of this machine; one for each of the node's ranks.
    """
    node = action.node
    taken = bytes_in(node.folder)
    if action.does == "skip":
        return Forecast(0.0, taken, measured=True)
    record = state.nodes.get(node.name, {})
    spent = record.get("seconds", 0.0) if action.does == "resume" else 0.0
    took, steps = record.get("took"), getattr(node.recipe, "steps", None)
    shape = _shape(node, pipeline)
    n_bytes = _bytes_of(node, shape) or (taken or None)
    if took is not None and gpu is None:
        seconds = took["seconds"] * (steps / took["steps"] if steps and took["steps"] else 1.0)
        return Forecast(max(0.0, seconds - spent), n_bytes, measured=True)
    seconds = None if shape is None else _seconds(node, shape, gpu)
    return Forecast(None if seconds is None else max(0.0, seconds - spent), n_bytes)


def bytes_in(folder: Path) -> int:
    """Of all files below a folder, or of a file."""
    files = folder.rglob("*") if folder.is_dir() else [folder]
    return sum(file.stat().st_size for file in files if file.is_file())


def _shape(node: Node, pipeline: Pipeline) -> GPTConfig | None:
    """The network that a node trains: its recipe's, that of the node it begins with, or of a folder that is there."""
    recipe = node.recipe
    if not isinstance(recipe, RunConfig):
        return None
    before = recipe.init_from or getattr(recipe, "teacher", None)
    given: GPTConfig | None = getattr(recipe, "model", None)
    if given is not None and (recipe.init_from is None or before is None):
        return (
            given
            if given.vocab_size is not None
            else given.model_copy(update={"vocab_size": _vocabulary(node, pipeline)})
        )
    for parent in node.parents:
        if before is not None and Path(before) == pipeline.nodes[parent].folder:
            return _shape(pipeline.nodes[parent], pipeline)
    if before is None or not Path(before).is_dir():  # a hub name: nothing is downloaded for a plan
        return None
    try:
        return read_config(resolve_model(before))
    except UserError:
        return None


def _vocabulary(node: Node, pipeline: Pipeline) -> int:
    """The size that the tokenizer was asked to have."""
    recipes = [node.recipe, *(pipeline.nodes[name].recipe for name in pipeline.before(node.name))]
    sizes = [s.vocab_size for r in recipes if (s := getattr(r, "tokenizer", None)) is not None and s.vocab_size]
    return int(max(sizes, default=32_768))


def _bytes_of(node: Node, shape: GPTConfig | None) -> int | None:
    """Of the checkpoints that a run keeps: weights, moments, and the masters of narrow weights."""
    if shape is None:
        return None
    recipe: Any = node.recipe
    width, wide = BYTES[recipe.precision], 8 if recipe.precision == "fp64" else 4
    each = count_params(shape).total * (width + 2 * wide + wide * (width < wide))
    every = recipe.save_every or recipe.steps
    kept = min(recipe.save.keep, -(-recipe.steps // every)) + (recipe.save.keep_best and recipe.steps > every)
    return int(each * kept)


def _seconds(node: Node, shape: GPTConfig, gpu: Gpu | None) -> float | None:
    """Of stages that train on given text; how long answers get, nobody knows beforehand."""
    recipe: Any = node.recipe
    if recipe.stage not in ("pretrain", "sft", "distill") or recipe.batch.examples_per_step is not None:
        return None
    if gpu is not None:
        peak = gpu.peak_flops(recipe.precision)
    else:
        from llmkit.training.dist import pick_device

        peak = peak_flops(pick_device(recipe.device), recipe.precision)
    if peak is None:
        return None
    length = recipe.batch.max_len or shape.max_seq_len
    work = recipe.steps * recipe.batch.tokens_per_step * flops_per_token(shape, length)
    return float(work / (peak * node.ranks * UTILISATION))
