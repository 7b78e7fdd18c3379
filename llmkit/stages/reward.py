"""Judging whole texts: a class, or numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from llmkit.config import Interrupted
from llmkit.data.examples import ExampleBatch, ExampleRows, Examples, LabelledData, prepare_examples
from llmkit.data.loader import RowLoader
from llmkit.losses import LossSum, classification, regression
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import init_weights
from llmkit.model.heads import SequenceClassifier, init_head
from llmkit.model.weights import load_weights
from llmkit.plan import flops_per_token, require_memory
from llmkit.stages.recipes import RewardRecipe
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.engine import Engine, Metrics, seed_of
from llmkit.training.loop import Context, Outcome, Stop, Task, train
from llmkit.training.setup import (
    cost,
    describe_step,
    micro_rows,
    mixture_weights,
    model_config,
    most_rows,
    plan as plan_of,
    refuse_changes,
    row_len,
    rows_per_step,
    tokenizer_of,
)
from llmkit.training.supervised import HeldOut, held_out, supervised_step


def sequence_loss(module: nn.Module, batch: ExampleBatch) -> LossSum:
    """Cross entropy of the class, or squared error of the numbers, as the targets are."""
    scores_BC = module(batch.ids_BT, batch.lengths_B)
    return (regression if batch.targets.is_floating_point() else classification)(scores_BC, batch.targets)


def network(config: GPTConfig) -> nn.Module:
    """The stage's network with one score, for its names and sizes."""
    return SequenceClassifier(config, 1)


class RewardTask(Task):
    """What the loop asks of a classifier or a regression."""

    def __init__(self, recipe: RewardRecipe):
        self.recipe = recipe
        self.tokenizer: Tokenizer
        self.data: LabelledData
        self.loader: RowLoader | None = None
        self.model_config: GPTConfig
        self.row_len: int
        self.flops_per_token = 0.0

    def prepare(self, ctx: Context) -> None:
        """Tokenizer and encoded texts."""
        recipe = self.recipe
        self.tokenizer = tokenizer_of(recipe, ctx.should_stop)
        self.model_config = model_config(recipe, self.tokenizer.vocab_size)
        self.row_len = row_len(recipe, self.model_config)
        require_memory(cost(recipe, self.model_config, network), ctx.ranks.device)
        words = 6 * (self.model_config.vocab_size or 0) * self.model_config.d_model  # a head that is not there
        self.flops_per_token = flops_per_token(self.model_config, self.row_len) - words
        self.data = _examples(recipe, self.tokenizer, self.row_len, ctx.should_stop)

    def build(self, ctx: Context) -> nn.Module:
        recipe, config = self.recipe, self.model_config
        model = SequenceClassifier(config, self.n_scores, recipe.activation_checkpointing)
        if recipe.init_from is None:
            init_weights(model, recipe.seed)
        init_head(model, seed_of(recipe.seed, "head"))
        if recipe.init_from is not None:
            report = load_weights(
                model,
                resolve_model(recipe.init_from),
                n_tokens=self.tokenizer.vocab_size,
                may_lack=model.head_names,
                may_hold=("lm_head.weight",),
            )
            ctx.log.say(f"init_from  {report}")
        weights = mixture_weights(recipe.data, [len(source) for source in self.data.train])
        self.loader = self._loader(self.data.train, ctx, weights)
        self.held_out = {"valid": self.data.valid, "test": self.data.test}
        if ctx.ranks.is_main:
            ctx.log.say(self._describe(self.loader))
        return model

    @property
    def n_scores(self) -> int:
        """Outputs of the head: one a class, or one a number."""
        return len(self.data.classes) or int(self.data.train[0].targets.shape[1])

    def _loader(self, sources: list[Examples], ctx: Context, weights: list[float] | None = None) -> RowLoader:
        """Rows to train on; without weights, rows to evaluate."""
        recipe, world = self.recipe, ctx.ranks.world
        n_rows = most_rows(recipe, self.row_len) * world if weights is None else rows_per_step(recipe, self.row_len)
        return RowLoader(
            ExampleRows(sources, row_len=self.row_len, pad_id=self.tokenizer.pad_id),
            rows_per_step=n_rows,
            seed=seed_of(recipe.seed, "order"),
            weights=weights,
            rank=ctx.ranks.rank,
            world=world,
            micro_rows=micro_rows(recipe, n_rows // world, self.row_len),
            prefetch=0 if weights is None else 2,
        )

    def close(self) -> None:
        """Ends the loader's thread, if it was ever begun."""
        if self.loader is not None:
            self.loader.close()

    def step(self, engine: Engine, ctx: Context) -> Metrics:
        assert self.loader is not None
        return supervised_step(engine, ctx, self.loader, sequence_loss)

    def evaluate(self, engine: Engine, ctx: Context, split: str) -> Metrics | None:
        """How well a split is judged, each source apart where there are several."""
        sources = self.held_out[split]
        if not sources:
            return {}
        named = {split: sources} | ({f"{split}/{s.name}": [s] for s in sources} if len(sources) > 1 else {})
        metrics: Metrics = {}
        for name, examples in named.items():
            sums = held_out(engine, ctx, self._loader(examples, ctx), sequence_loss, self.recipe.eval.max_tokens)
            if sums is None:
                return None
            metrics |= {f"{name}/{key}": value for key, value in self._figures(sums, examples).items()}
        return metrics

    def _figures(self, sums: HeldOut, examples: list[Examples]) -> Metrics:
        loss = sums.mean("loss")
        if self.data.classes:
            f1 = macro_f1(sums.stats["confusion"].double().cpu().numpy())
            return {"loss": loss, "accuracy": sums.mean("accuracy"), "macro_f1": f1}
        targets = np.concatenate([e.targets for e in examples]).astype(np.float64)
        spread = float(targets.var(0).sum())  # the loss is half the squared error, added up over the numbers of a row
        r2 = {"r2": 1 - 2 * loss / spread} if spread > 0 and sums.n == len(targets) else {}
        return {"loss": loss, "rmse": math.sqrt(2 * loss / targets.shape[1]),
                "mae": sums.mean("abs_error") / targets.shape[1], **r2}  # fmt: skip

    def files(self, engine: Engine) -> dict[str, bytes]:
        facts = {"stage": "reward", "objective": self.recipe.objective, "step": engine.step, **self.facts()}
        return model_files(
            self.model_config,
            engine.dtype,
            self.tokenizer,
            facts,
            head="classify",
            n_labels=self.n_scores,
            labels=self.data.classes or None,
            problem_type="single_label_classification" if self.data.classes else "regression",
        )

    def facts(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.hash, "data": self.data.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        """Nothing but facts: the order of the data is a function of the step."""
        return self.facts()

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Refuses to go on with other data or another tokenizer."""
        refuse_changes(self.recipe, self.facts(), state)

    def _describe(self, loader: RowLoader) -> str:
        data = self.data
        n_train, n_valid = (sum(map(len, split)) for split in (data.train, data.valid))
        n_cut = sum(s.n_cut for s in data.train)
        longest = max(int(np.diff(s.starts).max()) for s in data.train)
        judged = f"classes {', '.join(data.classes)}" if data.classes else f"{self.n_scores} number(s)"
        epochs = self.recipe.steps * loader.rows_per_step / n_train
        lines = [
            f"data       {n_train:,} texts to train on, {n_valid:,} held out; {epochs:.2f} epochs; {judged}; the longest "
            f"has {longest} tokens" + (f"; {n_cut:,} were cut to {self.row_len}" if n_cut else "")
        ]
        costs = cost(self.recipe, self.model_config, network)
        return describe_step(self.recipe, costs, self.model_config, self.tokenizer, loader, lines)


def macro_f1(confusion_CC: np.ndarray[Any, Any]) -> float:
    """Mean over classes of the harmonic mean of precision and recall; rows are the right classes, columns the guesses."""
    right = np.diag(confusion_CC)
    of_class = confusion_CC.sum(0) + confusion_CC.sum(1)
    seen = of_class > 0
    return float((2 * right[seen] / of_class[seen]).mean()) if seen.any() else math.nan


def _examples(recipe: RewardRecipe, tokenizer: Tokenizer, length: int, should_stop: Any) -> LabelledData:
    return prepare_examples(
        recipe.data,
        tokenizer,
        kind=recipe.objective,
        classes=recipe.classes,
        row_len=length,
        should_stop=should_stop,
    )


# --- commands --------------------------------------------------------------------------------------------------------


def run(recipe: RewardRecipe) -> Outcome:
    """`llmkit train`."""
    task = RewardTask(recipe)
    try:
        return train(recipe, task)
    finally:
        task.close()


def prepare(recipe: RewardRecipe) -> bool | None:
    """`llmkit prepare`: True when all texts are encoded, None if a signal stopped it."""
    stop = Stop()
    with stop.listening():
        try:
            tokenizer = tokenizer_of(recipe, lambda: bool(stop))
            length = row_len(recipe, model_config(recipe, tokenizer.vocab_size))
            data = _examples(recipe, tokenizer, length, lambda: bool(stop))
        except Interrupted:
            return None
    for split in ("train", "valid", "test"):
        for examples in getattr(data, split):
            print(f"{split:5s} {examples.name}: {len(examples):,} texts, {len(examples.tokens):,} tokens")
    return True


def plan(recipe: RewardRecipe) -> Iterator[str]:
    """`llmkit plan`: what a run would cost, line by line."""
    return plan_of(recipe, network)
