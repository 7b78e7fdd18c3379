"""Learning from preferences without a reward model: DPO and its family, and KTO for answers judged one by one.

What the reference says of every answer is computed once, before the first step, and kept: training holds one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmkit.config import Interrupted, TrainingStopped, UserError
from llmkit.data.feedback import FeedbackBatch, FeedbackData, FeedbackRows, FeedbackSequences, prepare_feedback
from llmkit.data.loader import RowLoader
from llmkit.data.preferences import PreferenceData, PreferenceRows, Preferences, prepare_preferences
from llmkit.inference.logprobs import Texts, cached_logprobs
from llmkit.losses import LossSum
from llmkit.model.adapters import base_of, is_adapter
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT
from llmkit.model.weights import load_model
from llmkit.plan import flops_per_token, require_memory
from llmkit.plan.job import Job
from llmkit.rollout.answers import AnswerEval
from llmkit.stages.recipes import DPORecipe
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import Ranks, pick_device
from llmkit.training.engine import PRECISIONS, Engine, Metrics, seed_of
from llmkit.training.jobs import parts_of, supervised_job
from llmkit.training.loop import Context, Outcome, Stop, train
from llmkit.training.preferring import feedback_figures, feedback_loss, loss_at_start, mismatch_sum, pair_loss
from llmkit.training.setup import (
    cost,
    language_model,
    mixture_weights,
    model_config,
    plan as plan_of,
    refuse_changes,
    refuse_other_tokenizer,
    row_len,
    rows_per_step,
    tokenizer_of,
)
from llmkit.training.supervised import HeldOut, held_out, supervised_step
from llmkit.training.task import Task

Data = PreferenceData | FeedbackData
Sources = Sequence[Preferences | FeedbackSequences]


# --- the task --------------------------------------------------------------------------------------------------------


class DPOTask(Task):
    """What the loop asks of learning from preferences."""

    def __init__(self, recipe: DPORecipe):
        self.recipe = recipe
        self.tokenizer: Tokenizer
        self.data: Data
        self.reference: dict[str, list[NDArray[Any]] | None] = dict.fromkeys(("train", "valid", "test"))
        self.loader: RowLoader | None = None
        self.answers: AnswerEval | None = None
        self.model_config: GPTConfig
        self.row_len: int
        self.flops_per_token = 0.0
        self.warned = False  # of better answers that become unlikely

    def read(self, ctx: Context) -> None:
        """Tokenizer and encoded answers."""
        recipe = self.recipe
        self.tokenizer, self.model_config, self.row_len = _basics(recipe, ctx.should_stop)
        if recipe.loss == "kto" and rows_per_step(recipe, self.row_len) < 2:
            raise UserError(
                "batch.examples_per_step: kto sets answers against each other's prompts: at least 2 are needed"
            )
        require_memory(cost(recipe, self.model_config), ctx.ranks.device, parts_of(recipe, ctx.ranks))
        self.flops_per_token = flops_per_token(self.model_config, self.row_len)
        self.data = _answers(recipe, self.tokenizer, self.row_len, ctx.should_stop, ctx.log.say)

    def prepare(self, ctx: Context) -> None:
        """Tokenizer, encoded answers, and what the reference says of them."""
        self.read(ctx)
        device = ctx.ranks.device
        self.reference = _reference(
            self.recipe,
            self.data,
            self.tokenizer,
            self.model_config,
            self.row_len,
            device,
            ctx.should_stop,
            ctx.log.say,
        )

    def build(self, ctx: Context) -> nn.Module:
        recipe = self.recipe
        model = language_model(recipe, self.model_config, self.tokenizer.vocab_size, ctx.ranks, ctx.log.say)
        self.loader = self.open_rows(ctx)
        if recipe.eval.answers is not None:
            self.answers = AnswerEval(
                recipe.eval.answers,
                self.tokenizer,
                chat=recipe.data.chat,
                system=recipe.data.system,
                max_seq_len=self.model_config.max_seq_len,
                device=ctx.ranks.device,
            )
        if ctx.ranks.is_main:
            ctx.log.say(self._describe(self.loader))
        return model

    def open_rows(self, ctx: Context) -> RowLoader:
        weights = mixture_weights(self.recipe.data, [len(source) for source in self.data.train])
        return self._loader("train", range(len(self.data.train)), ctx, weights)

    def _loader(self, split: str, which: Sequence[int], ctx: Context, weights: list[float] | None = None) -> RowLoader:
        """Rows of some of a split's sources to train on; without weights, to evaluate."""
        recipe, world = self.recipe, ctx.ranks.world
        sources = [getattr(self.data, split)[i] for i in which]
        found = self.reference[split]
        micro_tokens = recipe.batch.micro_tokens or 8192
        options: dict[str, Any] = {
            "row_len": self.row_len,
            "pad_id": self.tokenizer.pad_id,
            "micro_tokens": micro_tokens,
            "extra": None if found is None else [found[i] for i in which],
        }
        rows: FeedbackRows | PreferenceRows
        if recipe.loss == "kto":
            rows = FeedbackRows(sources, **options)
        else:
            rows = PreferenceRows(sources, **options, share_prompts=self.model_config.sliding_window is None)
        micro = 1 if weights is not None else max(1, micro_tokens // rows.widest)
        return RowLoader(
            rows,
            rows_per_step=micro * world if weights is None else rows_per_step(recipe, self.row_len),
            seed=seed_of(recipe.seed, "order"),
            weights=weights,
            rank=ctx.ranks.rank,
            world=world,
            micro_rows=micro,
            cut=rows.cut,
            prefetch=0 if weights is None else 2,
        )

    def close(self) -> None:
        """Ends the loader's thread and the graders' processes, if they were ever begun."""
        if self.loader is not None:
            self.loader.close()
        if self.answers is not None:
            self.answers.close()

    # --- steps -------------------------------------------------------------------------------------------------------

    def step(self, engine: Engine, ctx: Context) -> Metrics:
        assert self.loader is not None
        first = engine.step == 0
        if self.recipe.loss == "kto":
            z0 = self._divergence(engine, ctx, self.loader.step(engine.data_step))
            metrics = supervised_step(engine, ctx, self.loader, feedback_loss(self.recipe, z0))
            metrics |= feedback_figures(engine.stats, z0)
        else:
            metrics = supervised_step(engine, ctx, self.loader, pair_loss(self.recipe))
        if first:
            self._check_start(metrics, ctx)
        self._watch(metrics, engine, ctx)
        return metrics

    def _divergence(self, engine: Engine, ctx: Context, batches: Sequence[FeedbackBatch]) -> float:
        """z0 of a step, from a pass over all of it before the update.

        A pass of its own, and not the sums of the step before: it is then exact, in the first step too, depends on
        neither micro-batches nor ranks, and nothing need be saved.
        """
        with engine.replica(averaged=False) as module:
            sums = [mismatch_sum(module, batch.to(ctx.ranks.device)).total.item() for batch in batches]
        total, n = ctx.ranks.sum_numbers(sum(sums), sum(b.denominator for b in batches))
        return max(0.0, total / n)

    def _check_start(self, metrics: Metrics, ctx: Context) -> None:
        """At step 1 policy and reference are one model, so the loss is known: anything else is a mistake in one of them."""
        expected = loss_at_start(self.recipe)
        if expected is None or "skipped" in metrics:
            return
        found = metrics.get("preference", metrics["loss"])
        off = abs(found - expected) / max(1.0, expected)
        if off <= 1e-3:
            return
        told = (
            f"step 1: the loss is {found:.4f}, and {expected:.4f} where policy and reference are the same model, as they "
            "are now"
        )
        if self.recipe.precision in ("fp32", "fp64"):
            raise TrainingStopped(f"{told}: the reference's log-probabilities are of something else: delete *.logprobs.* "
                                  f"in {self.recipe.data.cache_dir} and start again")  # fmt: skip
        if off > 0.05:
            ctx.log.say(f"warning: {told}: {self.recipe.precision} is too coarse for this model: set precision to fp32")

    def _watch(self, metrics: Metrics, engine: Engine, ctx: Context) -> None:
        """Says once that the better answers become unlikely: what is often the first that users see of a bad run."""
        limit, drift = self.recipe.max_drift, metrics.get("drift/chosen", 0.0)
        if self.warned or limit is None or drift >= -limit:
            return
        self.warned = True
        has_nll = self.recipe.loss in ("dpo", "robust", "hinge", "ipo")
        remedy = "set nll_weight (1 is usual), or" if has_nll and not self.recipe.nll_weight else "try"
        ctx.log.say(
            f"warning: step {engine.step}: the better answers are less likely than under the reference by {-drift:.2f} "
            f"nats a token (max_drift {limit:g}): {remedy} a lower optim.lr or a higher beta"
        )

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, engine: Engine, ctx: Context, split: str) -> Metrics | None:
        """The loss and its kin on held-out answers, each source apart where there are several."""
        sources: Sources = getattr(self.data, split)
        named: dict[str, Sequence[int]] = {split: range(len(sources))} if sources else {}
        if len(sources) > 1:
            named |= {f"{split}/{s.name}": [i] for i, s in enumerate(sources)}
        metrics: Metrics = {}
        for name, which in named.items():
            figures = self._figures(engine, ctx, split, which)
            if figures is None:
                return None
            metrics |= {f"{name}/{key}": value for key, value in figures.items()}
        if split != "valid" or self.answers is None:
            return metrics
        with engine.replica() as module:
            assert isinstance(module, GPT)
            graded = self.answers.evaluate(module, ctx, engine.step)
        return None if graded is None else metrics | graded

    def _figures(self, engine: Engine, ctx: Context, split: str, which: Sequence[int]) -> Metrics | None:
        loader, limit = self._loader(split, which, ctx), self.recipe.eval.max_tokens

        def summed(loss: Callable[[nn.Module, Any], LossSum]) -> HeldOut | None:
            return held_out(engine, ctx, loader, loss, limit)

        if self.recipe.loss != "kto":
            sums = summed(pair_loss(self.recipe))
            return None if sums is None else {name: sums.mean(name) for name in sums.parts}
        moved = summed(mismatch_sum)
        if moved is None:
            return None
        z0 = max(0.0, moved.mean("w"))
        sums = summed(feedback_loss(self.recipe, z0))
        return None if sums is None else {"loss": sums.mean("loss"), **feedback_figures(sums.stats, z0)}

    # --- what is kept ------------------------------------------------------------------------------------------------

    def files(self, engine: Engine) -> dict[str, bytes]:
        facts = {"stage": "dpo", "loss": self.recipe.loss, "step": engine.step, **self.facts()}
        return model_files(self.model_config, engine.dtype, self.tokenizer, facts)

    def facts(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.hash, "data": self.data.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        """Facts, and what was said already: the order of the data is a function of the step."""
        return {**self.facts(), "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Refuses to go on with other data or another tokenizer."""
        refuse_changes(self.recipe, self.facts(), state)
        self.warned = state["warned"]

    def _describe(self, loader: RowLoader) -> str:
        recipe, data = self.recipe, self.data
        n_train, n_valid = (sum(map(len, split)) for split in (data.train, data.valid))
        what = "judged answers" if recipe.loss == "kto" else "prompts with answers"
        n_cut, n_dropped = (sum(getattr(s, f"n_{how}") for s in data.train) for how in ("cut", "dropped"))
        longest = max(int(s.lengths.max()) for s in data.train)
        costs = cost(recipe, self.model_config)
        lines = [
            f"model      {self.model_config.family}, {costs.n_params / 1e6:.2f} M parameters",
            f"data       {n_train:,} {what} to train on, {n_valid:,} held out; the longest has {longest} tokens"
            + (f"; {n_cut:,} prompts were cut to fit {self.row_len}" if n_cut else "")
            + (f"; {n_dropped:,} were left out" if n_dropped else ""),
            f"step       {loader.rows_per_step:,} of them on {loader.world} rank(s), at most "
            f"{recipe.batch.micro_tokens or 8192:,} tokens in a forward pass; {recipe.steps} steps, "
            f"{loader.epoch(recipe.steps):.2f} epochs",
            f"reference  {recipe.reference or recipe.init_from if recipe.needs_reference else 'none'}",
            f"memory     {costs.state_bytes / 1e6:.0f} MB weights, gradients and optimizer + about "
            f"{costs.activation_bytes / 1e6:.0f} MB activations; checkpoint {costs.checkpoint_bytes / 1e6:.0f} MB",
        ]
        return "\n".join([*lines, *(self.answers.describe() if self.answers is not None else ())])


# --- before the first step -------------------------------------------------------------------------------------------


def _basics(recipe: DPORecipe, should_stop: Callable[[], bool]) -> tuple[Tokenizer, GPTConfig, int]:
    """Tokenizer, shape (without dropout: policy and reference must differ by their weights alone) and row length."""
    tokenizer = tokenizer_of(recipe, should_stop)
    config = model_config(recipe, tokenizer.vocab_size).model_copy(update={"dropout": 0.0})
    if not config.causal:
        raise UserError(
            f"init_from ({recipe.init_from}): a model with causal: false can't be asked how likely an answer is"
        )
    return tokenizer, config, row_len(recipe, config)


def _answers(
    recipe: DPORecipe, tokenizer: Tokenizer, length: int, should_stop: Callable[[], bool], say: Callable[[str], None]
) -> Data:
    prepare = prepare_feedback if recipe.loss == "kto" else prepare_preferences
    return prepare(recipe.data, tokenizer, row_len=length, should_stop=should_stop, say=say)


def _reference(
    recipe: DPORecipe,
    data: Data,
    tokenizer: Tokenizer,
    config: GPTConfig,
    length: int,
    device: torch.device,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> dict[str, list[NDArray[Any]] | None]:
    """The reference's log-probability of every sequence, by split and source; None where the loss has no reference."""
    if not recipe.needs_reference:
        return dict.fromkeys(("train", "valid", "test"))
    name = recipe.reference or recipe.init_from
    assert name is not None
    folder = resolve_model(name)
    if recipe.reference is not None:
        refuse_other_tokenizer(folder, tokenizer, f"reference ({name})")
    held: list[GPT] = []

    def load() -> GPT:
        """The reference, loaded once for all sources."""
        if not held:
            say(f"reference  {name}: log-probabilities of all answers")
            held.append(_reference_model(recipe, config, tokenizer, device))
        return held[0]

    def of(source: Preferences | FeedbackSequences) -> NDArray[Any]:
        texts = _texts(source, length)
        found = cached_logprobs(
            Path(recipe.data.cache_dir),
            [folder, base_of(folder)] if is_adapter(folder) else [folder],
            load,
            texts,
            inputs={"precision": recipe.precision, "quantize": recipe.lora and recipe.lora.quantize, "row_len": length},
            micro_tokens=recipe.batch.micro_tokens or 8192,
            pad_id=tokenizer.pad_id,
            device=device,
            should_stop=should_stop,
            say=say,
        )
        return found.reshape(2, -1).T.copy() if isinstance(source, FeedbackSequences) else found

    return {split: [of(s) for s in getattr(data, split)] for split in ("train", "valid", "test")}


def _reference_model(recipe: DPORecipe, config: GPTConfig, tokenizer: Tokenizer, device: torch.device) -> GPT:
    """The policy as it starts, adapters and all, unless the recipe names another model."""
    if recipe.reference is not None:
        return load_model(resolve_model(recipe.reference), PRECISIONS[recipe.precision], device)
    model = language_model(recipe, config, tokenizer.vocab_size, Ranks(device=device), lambda line: None)
    return model.to(device=device, dtype=PRECISIONS[recipe.precision]).eval().requires_grad_(False)


def _texts(source: Preferences | FeedbackSequences, length: int) -> Texts:
    """What the reference is asked: of judged answers, all matched sequences and then all mismatched ones."""
    n = source.n_sequences

    def get(i: int) -> tuple[NDArray[np.int32], int]:
        if i < n:
            return source.ids(i), int(source.prompt_lengths[i])
        assert isinstance(source, FeedbackSequences)
        return source.mismatched(i - n, length)

    lengths = source.lengths
    if isinstance(source, FeedbackSequences):
        mismatched = np.array([len(source.mismatched(i, length)[0]) for i in range(n)], np.int64)
        lengths = np.concatenate([lengths, mismatched])
    return Texts(lengths, get, source.hash)


# --- commands --------------------------------------------------------------------------------------------------------


open_task = DPOTask  # `llmkit inspect`, `doctor` and `replay` open it


def run(recipe: DPORecipe) -> Outcome:
    """`llmkit train`."""
    task = DPOTask(recipe)
    try:
        return train(recipe, task)
    finally:
        task.close()


def prepare(recipe: DPORecipe) -> bool | None:
    """`llmkit prepare`: True when all answers are encoded and the reference was asked, None if a signal stopped it."""
    stop = Stop()
    with stop.listening():
        try:
            tokenizer, config, length = _basics(recipe, lambda: bool(stop))
            data = _answers(recipe, tokenizer, length, lambda: bool(stop), print)
            device = pick_device(recipe.device)
            _reference(recipe, data, tokenizer, config, length, device, lambda: bool(stop), print)
        except Interrupted:
            return None
    for split in ("train", "valid", "test"):
        for source in getattr(data, split):
            print(f"{split:5s} {source.name}: {source.n_sequences:,} answers, {len(source.tokens):,} tokens")
    return True


def plan(recipe: DPORecipe) -> Iterator[str]:
    """`llmkit plan`: what a run would cost, line by line."""
    return plan_of(recipe)


def job(recipe: DPORecipe) -> Job:
    """What `llmkit plan` reckons with."""
    n_rows = 1 if recipe.loss == "kto" else 2
    notes = [f"{n_rows} answer(s) to an example, each with its prompt as long as a row: real ones are shorter"]
    if recipe.needs_reference:
        notes.append("the reference is asked once, before training, and is not held then")
    return supervised_job("dpo", recipe, rows_of_example=n_rows, notes=notes)
