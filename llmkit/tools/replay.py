"""`llmkit replay RUN --step N`: the exact samples of a step, and the step made again from the checkpoint before it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.config import UserError
from llmkit.data.loader import Batch
from llmkit.model.gpt import GPT, document_mask
from llmkit.rollout.batch import PolicyBatch
from llmkit.stages import load_recipe
from llmkit.storage import Damaged, checkpoints_of, replace_file, step_of, verify
from llmkit.tools.inspect.page import page
from llmkit.tools.inspect.shown import Text, texts_of
from llmkit.tools.inspect.terminal import colours_wanted, legend, lines_of
from llmkit.tools.opening import context, task_of
from llmkit.training import checkpoint
from llmkit.training.config import RunConfig
from llmkit.training.engine import Engine, Metrics, Refused
from llmkit.training.freeze import freeze
from llmkit.training.log import read_lines
from llmkit.training.loop import TASK

_SHOWN = ("loss", "grad_norm", "lr", "denominator", "tokens", "data_hash")
_IGNORE = -100


class Replayed:
    """A step that was made again."""

    def __init__(self) -> None:
        self.metrics: Metrics = {}
        self.refused: Refused | None = None
        self.batches: list[Any] = []
        self.losses: list[Tensor | None] = []
        """Of each micro-batch of text the loss of every label, [B, T]; None: it is no text."""
        self.tokenizer: Any = None
        self.causal = True


def run(args: argparse.Namespace) -> int:
    """Prints the step's numbers beside those of the log, and its texts; 1 if the samples or the numbers are others."""
    folder = Path(args.folder)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: no run: it holds no recipe.yaml")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    changes: dict[str, Any] = {
        "out": str(folder),
        "eval": recipe.eval.model_copy(update={"answers": None}),
        "parallel": type(recipe.parallel)(),  # one process holds everything
    }
    recipe = recipe.model_copy(update=changes)
    logged = _logged(folder, args.step)
    start = _checkpoint_before(folder, args.step)
    first = 1 if start is None else step_of(start) + 1
    print(f"{folder}: from {'the first weights' if start is None else start.name}, steps {first} to {args.step}")
    found = replayed(recipe, start, args.step)
    other = None
    if args.precision is not None and args.precision != recipe.precision:
        other = replayed(recipe, start, args.step, args.precision)
    same = _compare(logged, found, other, recipe.precision, args.precision)
    title = f"{folder.name}, step {args.step}"
    texts = [text for i, batch in enumerate(found.batches) for text in _texts(found, i, batch)]
    worst = sorted(texts, key=_largest, reverse=True)
    if args.html:
        replace_file(Path(args.html), page(title, _lines(logged, found), worst))
        print(f"{args.html}: {len(worst):,} texts, the costliest first")
    else:
        coloured = colours_wanted()
        print(legend(coloured))
        for text in worst[: args.texts]:
            print("\n".join(lines_of(text, coloured, args.tokens)))
    return 0 if same else 1


def _logged(folder: Path, step: int) -> dict[str, Any]:
    """What metrics.jsonl says of a step; empty for the one after its last, at which the run may have stopped."""
    records = {r["step"]: r for r in read_lines(folder / "metrics.jsonl") if "train/loss" in r}
    last = max(records, default=0)
    if not 1 <= step <= last + 1:
        raise UserError(f"--step {step}: {folder} made the steps 1 to {last}")
    return {k.removeprefix("train/"): v for k, v in records.get(step, {}).items() if k.startswith("train/")}


def _checkpoint_before(folder: Path, step: int) -> Path | None:
    for found in checkpoints_of(folder):
        if step_of(found) < step:
            try:
                verify(found)
            except Damaged as e:
                print(f"{found} was passed over: {e}")
                continue
            return found
    return None


# --- the step --------------------------------------------------------------------------------------------------------


def replayed(recipe: RunConfig, start: Path | None, step: int, precision: str | None = None) -> Replayed:
    """Makes the steps from a checkpoint up to one again; nothing of the run is written to.

    Args:
        recipe: the run's own.
        start: None: from the first weights.
        precision: of the last step, on the weights that the run's own precision led to. Default: the run's.
    """
    found = Replayed()
    with tempfile.TemporaryDirectory(prefix="llmkit-replay-") as scratch:
        task = task_of(recipe)
        ctx = context(recipe, Path(scratch))
        try:
            engine = _engine(task, ctx, recipe)
            if start is not None:
                tensors, state = checkpoint.load(start)
                own = tensors.pop(TASK, {})
                engine.load(tensors, state["engine"])
                task.load_state_dict(state["task"], own)
            while engine.step < step - 1:
                task.step(engine, ctx)
            if precision is not None:
                task, engine = _in_precision(task, engine, ctx, recipe, precision)
            _last_step(task, engine, ctx, found)
            found.tokenizer = getattr(task, "tokenizer", None)
            shape = getattr(task, "model_config", None)
            found.causal = shape is None or shape.causal
        finally:
            getattr(task, "close", lambda: None)()
    return found


def _engine(task: Any, ctx: Any, recipe: RunConfig) -> Engine:
    task.prepare(ctx)
    module = task.build(ctx)
    freeze(module, recipe.freeze)
    return Engine(module, recipe, ctx.ranks, task.parts)


@torch.no_grad()
def _in_precision(task: Any, engine: Engine, ctx: Any, recipe: RunConfig, precision: str) -> tuple[Any, Engine]:
    """The same place in a run of another precision."""
    wide = recipe.model_copy(update={"precision": precision})
    other = task_of(wide)
    again = _engine(other, context(wide, ctx.out), wide)
    trained = engine.masters
    for name, p in again.module.named_parameters():
        source = trained.get(name, dict(engine.module.named_parameters())[name])
        p.data.copy_(source)
        if name in again.masters and again.masters[name].data_ptr() != p.data_ptr():
            again.masters[name].copy_(source)
    state = again.optimizer.state_dict()
    for name, tensor in engine.optimizer.state_dict().items():
        state[name].copy_(tensor)
    again.step, again.windows_skipped = engine.step, engine.windows_skipped
    other.load_state_dict(task.state_dict(), task.tensors())
    getattr(task, "close", lambda: None)()
    return other, again


def _last_step(task: Any, engine: Engine, ctx: Any, found: Replayed) -> None:
    update = engine.update

    def watching(batches: Any, *args: Any, **kwargs: Any) -> Metrics:
        found.batches = list(batches)
        found.losses = [_token_losses(engine.module, batch.to(ctx.ranks.device)) for batch in batches]
        return update(batches, *args, **kwargs)

    engine.update = watching  # type: ignore[method-assign]
    try:
        found.metrics = task.step(engine, ctx)
    except Refused as e:  # this is what the run stopped at
        found.metrics, found.refused = e.metrics, e
    finally:
        engine.update = update  # type: ignore[method-assign]


@torch.no_grad()
def _token_losses(module: nn.Module, batch: Any) -> Tensor | None:
    """-log p of every label of rows of text before the step, [B, T]; 0 where nothing is learnt."""
    network: Any = getattr(module, "student", module)
    if not isinstance(batch, Batch) or isinstance(batch, PolicyBatch) or not isinstance(network, GPT):
        return None
    was_training = network.training
    network.eval()
    mask = document_mask(batch.docs_BT, network.config.causal)
    rows = []
    for b in range(len(batch.ids_BT)):  # a row at a time: the logits of all of them may not fit
        one = slice(b, b + 1)
        logits = network.logits(network(batch.ids_BT[one], batch.positions_BT[one], mask[one]))[0]
        rows.append(F.cross_entropy(logits, batch.labels_BT[b], ignore_index=_IGNORE, reduction="none"))
    network.train(was_training)
    return torch.stack(rows).cpu()


# --- what is shown ---------------------------------------------------------------------------------------------------


def _texts(found: Replayed, i: int, batch: Any) -> Iterator[Text]:
    yield from texts_of(batch, found.tokenizer, found.causal, found.losses[i])


def _largest(text: Text) -> float:
    return max((abs(t.value) for t in text.tokens if t.value is not None), default=0.0)


def _lines(logged: dict[str, Any], found: Replayed) -> list[str]:
    if found.refused is not None:
        return [str(found.refused)]
    keys = [k for k in _SHOWN if k in found.metrics]
    return [f"{k:12s} {found.metrics[k]!r}" + (f"  logged {logged[k]!r}" if k in logged else "") for k in keys]


def _compare(
    logged: dict[str, Any], found: Replayed, other: Replayed | None, precision: str, asked: str | None
) -> bool:
    """Prints the numbers side by side; whether the samples, and up to rounding the loss, are those of the log."""
    print("\n".join(_lines(logged, found)))
    if other is not None:
        print("\n".join(f"{asked}: {line}" for line in _lines({}, other)))
        if logged and other.metrics.get("data_hash") != logged.get("data_hash"):
            print(f"{asked}: the answers of this rollout are sampled anew, and are others than in {precision}")
    if not logged:
        print("the log has nothing of this step to compare with")
        return True
    if found.metrics.get("data_hash") != logged["data_hash"]:
        print("the samples are NOT those of the log: data, tokenizer or code have changed")
        return False
    differ = [k for k in logged if k in found.metrics and found.metrics[k] != logged[k]]
    if not differ:
        print("the samples are those of the log, and every number is the same to the last bit")
        return True
    loss, again = logged["loss"], found.metrics["loss"]
    near = abs(loss - again) <= 1e-3 * max(1.0, abs(loss))
    print(f"the samples are those of the log; {', '.join(differ[:4])} differ {'in rounding' if near else 'NOTABLY'}")
    return near
