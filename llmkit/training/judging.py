"""What a network that judges texts may be trained for: to rank answers, to judge steps, to name classes, to give numbers.

Each objective knows its data, its loss and its figures; the stage `reward` is the same for all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmkit.config import Interrupted, UserError
from llmkit.data.examples import ExampleBatch, ExampleRows, Examples, LabelledData, prepare_examples
from llmkit.data.layouts import Dialogue, read_source
from llmkit.data.loader import RowMaker
from llmkit.data.preferences import PreferenceBatch, PreferenceData, PreferenceRows, Preferences, prepare_preferences
from llmkit.data.steps import JudgedSteps, StepBatch, StepData, StepRows, prepare_steps
from llmkit.data.turns import encode_turn
from llmkit.evaluation.reward_card import Judged
from llmkit.inference.scoring import shared_scores
from llmkit.losses import LossSum, classification, ranking, regression, step_correctness
from llmkit.model.config import GPTConfig
from llmkit.model.heads import SequenceClassifier
from llmkit.stages.recipes import RewardRecipe
from llmkit.tokenizer import Tokenizer
from llmkit.training.engine import Metrics
from llmkit.training.supervised import HeldOut

Say = Callable[[str], None]
Sources = Sequence[Any]  # of one objective's own kind


class Judging(Protocol):
    """An objective with its data."""

    n_scores: int
    classes: tuple[str, ...] = ()
    """Names of the scores; empty: they have none."""
    fingerprint: str

    def split(self, name: str) -> Sources:
        """The sources of "train", "valid" or "test"."""

    def rows(self, sources: Sources, row_len: int, pad_id: int) -> RowMaker:
        """What a loader makes its batches with."""

    def loss(self, module: nn.Module, batch: Any) -> LossSum: ...

    def figures(self, sums: HeldOut, sources: Sources) -> Metrics:
        """What is told of a held-out split."""

    def describe(self) -> str:
        """One line on the data."""

    def count(self, source: Any) -> str:
        """How much a source holds."""


def judging_of(
    recipe: RewardRecipe,
    tokenizer: Tokenizer,
    config: GPTConfig,
    row_len: int,
    should_stop: Callable[[], bool],
    say: Say,
) -> Judging:
    """The recipe's objective for a network of this shape, with its data read and encoded, or found in the cache."""
    if recipe.objective == "rank":
        return Ranking(recipe, tokenizer, config, row_len, should_stop, say)
    if recipe.objective == "process":
        return Process(recipe, tokenizer, row_len, should_stop, say)
    return Labelling(recipe, tokenizer, row_len, should_stop)


# --- which answer is better ------------------------------------------------------------------------------------------


class Ranking(Judging):
    """Pairs and rankings of answers: Bradley and Terry's model of which one people prefer."""

    n_scores = 1

    def __init__(
        self,
        recipe: RewardRecipe,
        tokenizer: Tokenizer,
        config: GPTConfig,
        row_len: int,
        should_stop: Callable[[], bool],
        say: Say,
    ):
        self.recipe = recipe
        self.shares_prompts = config.causal and config.sliding_window is None
        """Whether the answers to a prompt go through the network behind one copy of it."""
        self.data: PreferenceData = prepare_preferences(
            recipe.data,
            tokenizer,
            row_len=row_len,
            margin=recipe.margin == "data",
            should_stop=should_stop,
            say=say,
        )
        self.fingerprint = self.data.fingerprint
        self.references = self._references(tokenizer, row_len, should_stop, say)
        """Answers with their prompts, as ids, whose scores set the scale."""
        if recipe.reference is not None:
            told = b"".join(ids.tobytes() for ids in self.references)
            self.fingerprint = hashlib.sha256(self.fingerprint.encode() + told).hexdigest()

    def split(self, name: str) -> list[Preferences]:
        found: list[Preferences] = getattr(self.data, name)
        return found

    def rows(self, sources: Sources, row_len: int, pad_id: int) -> RowMaker:
        return PreferenceRows(
            sources,
            row_len=row_len,
            pad_id=pad_id,
            micro_tokens=self.recipe.batch.micro_tokens or 8192,
            share_prompts=self.shares_prompts,
        )

    def loss(self, module: nn.Module, batch: PreferenceBatch) -> LossSum:
        """Every answer is run once, in however many pairs it is."""
        assert isinstance(module, SequenceClassifier)
        scores_BC = (
            module(batch.ids_BT, batch.lengths_B) if batch.shared is None else shared_scores(module, batch.shared)
        )
        margin = self.recipe.margin
        return ranking(
            scores_BC[:, 0],
            batch.better_P,
            batch.worse_P,
            batch.weights_P,
            batch.margins_P if margin == "data" else torch.full_like(batch.margins_P, margin),
            center=self.recipe.center,
            label_smoothing=self.recipe.label_smoothing,
        )

    def figures(self, sums: HeldOut, sources: Sources) -> Metrics:
        return {name: sums.mean(name) for name in sums.parts}

    def describe(self) -> str:
        train, valid = self.data.train, self.data.valid
        n_pairs, n_answers = sum(len(s.pairs) for s in train), sum(s.n_sequences for s in train)
        dropped, cut = sum(s.n_dropped for s in train), sum(s.n_cut for s in train)
        return (
            f"{sum(map(len, train)):,} prompts with {n_answers:,} answers in {n_pairs:,} pairs to train on, "
            f"{sum(map(len, valid)):,} prompts held out; the longest answer has {max(int(s.lengths.max()) for s in train)} "
            "tokens with its prompt"
            + (f"; {cut:,} prompts were cut" if cut else "")
            + (f"; {dropped:,} pairs do not fit a row and are left out" if dropped else "")
        )

    def count(self, source: Preferences) -> str:
        return f"{len(source):,} prompts, {source.n_sequences:,} answers, {len(source.pairs):,} pairs"

    # --- scale and report card -----------------------------------------------------------------------------------------

    def _references(
        self, tokenizer: Tokenizer, row_len: int, should_stop: Callable[[], bool], say: Say
    ) -> list[NDArray[np.int32]]:
        limit, given = self.recipe.reference_limit, self.recipe.reference
        if given is None:
            best = [source.ids(i) for source in self.data.train for i in unbeaten(source)]
            return [best[i] for i in evenly(len(best), limit)]
        data, found = self.recipe.data, []
        rows = read_source(given, "dialogue", data.chat, system=data.system, say=say, on_unusable=lambda *_: None)
        for n, (_, _, row) in enumerate(rows):
            if n % 1024 == 0 and should_stop():
                raise Interrupted("stopped while reference answers were being read; run again to go on")
            assert isinstance(row, Dialogue)
            if row.messages[-1]["role"] == "assistant" and len(row.messages) > 1:
                found.append(row)
        chosen = (answered(tokenizer, found[i], row_len, data.chat) for i in evenly(len(found), limit))
        references = [ids for ids in chosen if ids is not None]
        if len(references) < 2:
            raise UserError(
                f"reference: {given.label}: {len(references)} answers that fit a row: at least 2 make a scale"
            )
        return references

    def judged(
        self, sources: Sequence[Preferences], limit: int | None = None
    ) -> tuple[list[NDArray[np.int32]], Judged]:
        """The answers of a split as ids, and what is to be known of them: their scores are still 0.

        Args:
            limit: of so many prompts only, spread evenly. Default: all.
        """
        ids: list[NDArray[np.int32]] = []
        lengths: list[int] = []
        prompts: list[int] = []
        better: list[int] = []
        worse: list[int] = []
        groups = [(source, g) for source in sources for g in range(len(source))]
        pair_starts = {id(source): source.pair_starts for source in sources}
        for number, at in enumerate(evenly(len(groups), limit or len(groups))):
            source, g = groups[at]
            first, last = source.group_starts[g : g + 2].tolist()
            starts = pair_starts[id(source)]
            of_group = source.pairs[starts[g] : starts[g + 1]]
            better += (of_group[:, 1] - first + len(ids)).tolist()
            worse += (of_group[:, 2] - first + len(ids)).tolist()
            ids += [source.ids(i) for i in range(first, last)]
            lengths += (source.lengths[first:last] - source.prompt_lengths[first:last]).tolist()
            prompts += [number] * (last - first)
        whole = [np.array(x, np.int64) for x in (lengths, prompts, better, worse)]
        return ids, Judged(np.zeros(len(ids)), *whole)


def unbeaten(source: Preferences) -> list[int]:
    """The sequences of a source that no other is preferred to."""
    beaten = set(source.pairs[:, 2].tolist())
    return [i for i in range(source.n_sequences) if i not in beaten]


def evenly(n: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below n, spread over all of them, since files are often sorted."""
    return [i * n // limit for i in range(limit)] if n > limit else list(range(n))


def answered(tokenizer: Tokenizer, row: Dialogue, row_len: int, chat: bool) -> NDArray[np.int32] | None:
    """A dialogue's last answer after its prompt, as ids; None if the answer alone is longer than a row."""
    *before, last = row.messages
    prompt, answer = encode_turn(
        tokenizer, before if chat else before[-1]["content"], last["content"], row.tools, chat=chat
    )
    return None if len(answer) >= row_len else np.array([*prompt, *answer][-row_len:], np.int32)


# --- which step is right ---------------------------------------------------------------------------------------------


class Process(Judging):
    """Answers whose steps were judged: a score at the end of each."""

    n_scores = 1

    def __init__(
        self, recipe: RewardRecipe, tokenizer: Tokenizer, row_len: int, should_stop: Callable[[], bool], say: Say
    ):
        self.data: StepData = prepare_steps(
            recipe.data, tokenizer, separator=recipe.step_separator, row_len=row_len, should_stop=should_stop, say=say
        )
        self.fingerprint = self.data.fingerprint

    def split(self, name: str) -> list[JudgedSteps]:
        found: list[JudgedSteps] = getattr(self.data, name)
        return found

    def rows(self, sources: Sources, row_len: int, pad_id: int) -> RowMaker:
        return StepRows(sources, row_len=row_len, pad_id=pad_id)

    def loss(self, module: nn.Module, batch: StepBatch) -> LossSum:
        assert isinstance(module, SequenceClassifier)
        scores_S = module.at_tokens(batch.ids_BT)[batch.rows_S, batch.ends_S, 0]
        out = step_correctness(scores_S, batch.labels_S)
        found = first_errors(scores_S.detach(), batch.labels_S, batch.rows_S, len(batch.ids_BT))
        return LossSum(out.total, out.parts, {"answers": found})

    def figures(self, sums: HeldOut, sources: Sources) -> Metrics:
        """F1 is the harmonic mean of how often the first error is found and how often a flawless answer is left alone
        (ProcessBench, arXiv 2412.06559)."""
        n_flawed, n_found, n_flawless, n_left = sums.stats["answers"].double().tolist()
        told = {"loss": sums.mean("loss"), "accuracy": sums.mean("accuracy")}
        if n_flawed + n_flawless:
            told["first_error_accuracy"] = (n_found + n_left) / (n_flawed + n_flawless)
        if n_flawed and n_flawless:
            found, left = n_found / n_flawed, n_left / n_flawless
            told["first_error_f1"] = 2 * found * left / (found + left) if found + left else 0.0
        return told

    def describe(self) -> str:
        train, valid = self.data.train, self.data.valid
        n_cut, n_steps = sum(s.n_cut for s in train), sum(len(s.labels) for s in train)
        right = float(np.concatenate([s.labels for s in train]).mean())
        return (
            f"{sum(map(len, train)):,} answers with {n_steps:,} judged steps to train on, {right:.0%} of them right; "
            f"{sum(map(len, valid)):,} answers held out" + (f"; {n_cut:,} were cut" if n_cut else "")
        )

    def count(self, source: JudgedSteps) -> str:
        return f"{len(source):,} answers, {len(source.labels):,} judged steps"


def first_errors(scores_S: Tensor, labels_S: Tensor, rows_S: Tensor, n_rows: int) -> Tensor:
    """[4]: answers with a wrong step, those of them whose first one is found, flawless answers, those left alone.

    A step is taken for wrong if its score is below 0, and is wrong if its label is below one half.
    """
    beyond = len(scores_S)  # the number of a step that isn't there
    numbers_S = torch.arange(beyond, device=scores_S.device)

    def first(is_wrong_S: Tensor) -> Tensor:
        none = torch.full((n_rows,), beyond, device=scores_S.device)
        return none.scatter_reduce(0, rows_S, numbers_S.masked_fill(~is_wrong_S, beyond), "amin")

    wrong_B, taken_B = first(labels_S < 0.5), first(scores_S < 0)
    judged_B = torch.bincount(rows_S, minlength=n_rows) > 0
    flawed_B, agrees_B = wrong_B < beyond, wrong_B == taken_B
    groups = (flawed_B, flawed_B & agrees_B, judged_B & ~flawed_B, judged_B & ~flawed_B & agrees_B)
    return torch.stack([g.sum() for g in groups])


# --- classes and numbers ---------------------------------------------------------------------------------------------


class Labelling(Judging):
    """Texts with a class or numbers each."""

    def __init__(self, recipe: RewardRecipe, tokenizer: Tokenizer, row_len: int, should_stop: Callable[[], bool]):
        assert recipe.objective in ("classify", "regress")
        self.row_len = row_len
        self.data: LabelledData = prepare_examples(
            recipe.data,
            tokenizer,
            kind=recipe.objective,
            classes=recipe.classes,
            row_len=row_len,
            should_stop=should_stop,
        )
        self.fingerprint, self.classes = self.data.fingerprint, self.data.classes
        self.n_scores = len(self.classes) or int(self.data.train[0].targets.shape[1])

    def split(self, name: str) -> list[Examples]:
        found: list[Examples] = getattr(self.data, name)
        return found

    def rows(self, sources: Sources, row_len: int, pad_id: int) -> RowMaker:
        return ExampleRows(sources, row_len=row_len, pad_id=pad_id)

    def loss(self, module: nn.Module, batch: ExampleBatch) -> LossSum:
        """Cross entropy of the class, or squared error of the numbers."""
        scores_BC = module(batch.ids_BT, batch.lengths_B)
        return (classification if self.classes else regression)(scores_BC, batch.targets)

    def figures(self, sums: HeldOut, sources: Sequence[Examples]) -> Metrics:
        loss = sums.mean("loss")
        if self.classes:
            f1 = macro_f1(sums.stats["confusion"].double().cpu().numpy())
            return {"loss": loss, "accuracy": sums.mean("accuracy"), "macro_f1": f1}
        targets = np.concatenate([e.targets for e in sources]).astype(np.float64)
        spread = float(targets.var(0).sum())  # the loss is half the squared error, added up over the numbers of a row
        r2 = {"r2": 1 - 2 * loss / spread} if spread > 0 and sums.n == len(targets) else {}
        return {"loss": loss, "rmse": math.sqrt(2 * loss / targets.shape[1]),
                "mae": sums.mean("abs_error") / targets.shape[1], **r2}  # fmt: skip

    def describe(self) -> str:
        data = self.data
        n_train, n_valid = (sum(map(len, split)) for split in (data.train, data.valid))
        n_cut = sum(s.n_cut for s in data.train)
        longest = max(int(np.diff(s.starts).max()) for s in data.train)
        judged = f"classes {', '.join(self.classes)}" if self.classes else f"{self.n_scores} number(s)"
        return f"{n_train:,} texts to train on, {n_valid:,} held out; {judged}; the longest has {longest} tokens" + (
            f"; {n_cut:,} were cut to {self.row_len}" if n_cut else ""
        )

    def count(self, source: Examples) -> str:
        return f"{len(source):,} texts, {len(source.tokens):,} tokens"


def macro_f1(confusion_CC: NDArray[Any]) -> float:
    """Mean over classes of the harmonic mean of precision and recall; rows are the right classes, columns the guesses."""
    right = np.diag(confusion_CC)
    of_class = confusion_CC.sum(0) + confusion_CC.sum(1)
    seen = of_class > 0
    return float((2 * right[seen] / of_class[seen]).mean()) if seen.any() else math.nan
