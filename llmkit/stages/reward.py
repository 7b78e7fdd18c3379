"""Judging texts: rewards from what people prefer, right and wrong steps, a class, or numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.config import Interrupted, UserError
from llmkit.data.loader import RowLoader
from llmkit.data.preferences import PreferenceRows
from llmkit.evaluation.reward_card import card_lines, draw_card, report_card, share_right
from llmkit.inference.scoring import score_sequences
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import init_weights
from llmkit.model.heads import SequenceClassifier, init_head
from llmkit.model.reward_facts import RewardFacts
from llmkit.model.weights import load_weights
from llmkit.plan import flops_per_token, require_memory
from llmkit.plan.job import Job
from llmkit.stages.recipes import RewardRecipe
from llmkit.storage import replace_file, resolve_model, to_json
from llmkit.tokenizer import Tokenizer
from llmkit.training.engine import Engine, Metrics, seed_of
from llmkit.training.jobs import parts_of, supervised_job
from llmkit.training.judging import Judging, Ranking, Sources, judging_of
from llmkit.training.loop import Context, Outcome, Stop, Task, train
from llmkit.training.setup import (
    adapt,
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
    where_built,
)
from llmkit.training.supervised import held_out, supervised_step


def network(config: GPTConfig) -> nn.Module:
    """The stage's network with one score, for its names and sizes."""
    return SequenceClassifier(config, 1)


class RewardTask(Task):
    """What the loop asks of a network that judges texts."""

    def __init__(self, recipe: RewardRecipe):
        self.recipe = recipe
        self.tokenizer: Tokenizer
        self.judging: Judging
        self.loader: RowLoader | None = None
        self.model_config: GPTConfig
        self.row_len: int
        self.flops_per_token = 0.0
        self.reward_facts: RewardFacts | None = None  # of the weights after the last step, where they were measured

    def prepare(self, ctx: Context) -> None:
        """Tokenizer and encoded texts."""
        recipe = self.recipe
        self.tokenizer = tokenizer_of(recipe, ctx.should_stop)
        self.model_config = _shape(recipe, self.tokenizer.vocab_size)
        self.row_len = row_len(recipe, self.model_config)
        require_memory(cost(recipe, self.model_config, network), ctx.ranks.device, parts_of(recipe, ctx.ranks))
        words = 6 * (self.model_config.vocab_size or 0) * self.model_config.d_model  # a head that is not there
        self.flops_per_token = flops_per_token(self.model_config, self.row_len) - words
        say = ctx.log.say if ctx.ranks.is_main else _quiet
        self.judging = judging_of(recipe, self.tokenizer, self.model_config, self.row_len, ctx.should_stop, say)

    def build(self, ctx: Context) -> nn.Module:
        recipe, config = self.recipe, self.model_config
        with where_built(recipe, ctx.ranks):
            model = SequenceClassifier(config, self.judging.n_scores, recipe.activation_checkpointing)
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
            adapt(model, recipe, recipe.init_from, report, ctx.log.say)
        self.loader = self.open_rows(ctx)
        if ctx.ranks.is_main:
            ctx.log.say(self._describe(self.loader))
        return model

    def open_rows(self, ctx: Context) -> RowLoader:
        train_set = self.judging.split("train")
        return self._loader(train_set, ctx, mixture_weights(self.recipe.data, [len(source) for source in train_set]))

    def _loader(self, sources: Sources, ctx: Context, weights: list[float] | None = None) -> RowLoader:
        """Rows to train on; without weights, rows to evaluate."""
        recipe, world = self.recipe, ctx.ranks.world
        rows = self.judging.rows(sources, self.row_len, self.tokenizer.pad_id)
        cut, most = None, most_rows(recipe, self.row_len)
        if isinstance(rows, PreferenceRows):  # a prompt has several answers, of any lengths
            cut, most = rows.cut, self._micro_tokens // rows.widest
        n_rows = max(1, most) * world if weights is None else rows_per_step(recipe, self.row_len)
        micro = n_rows // world if weights is None else 1 if cut else micro_rows(recipe, n_rows // world, self.row_len)
        return RowLoader(
            rows,
            rows_per_step=n_rows,
            seed=seed_of(recipe.seed, "order"),
            weights=weights,
            rank=ctx.ranks.rank,
            world=world,
            micro_rows=micro,
            cut=cut,
            prefetch=0 if weights is None else 2,
        )

    @property
    def _micro_tokens(self) -> int:
        return self.recipe.batch.micro_tokens or 8192

    def close(self) -> None:
        """Ends the loader's thread, if it was ever begun."""
        if self.loader is not None:
            self.loader.close()

    def step(self, engine: Engine, ctx: Context) -> Metrics:
        assert self.loader is not None
        metrics = supervised_step(engine, ctx, self.loader, self.judging.loss)
        # Before the checkpoint of this step, whose config.json tells them.
        self.reward_facts = self._measure(engine, ctx) if self._facts_due(engine.step) else None
        return metrics

    def evaluate(self, engine: Engine, ctx: Context, split: str) -> Metrics | None:
        """How well a split is judged, each source apart where there are several; at the end also the report card."""
        sources = self.judging.split(split)
        named = {split: sources} | ({f"{split}/{s.name}": [s] for s in sources} if len(sources) > 1 else {})
        metrics: Metrics = {}
        for name, part in named.items():
            if not part:
                continue
            loader = self._loader(part, ctx)
            sums = held_out(engine, ctx, loader, self.judging.loss, self.recipe.eval.max_tokens)
            if sums is None:
                return None
            metrics |= {f"{name}/{key}": value for key, value in self.judging.figures(sums, part).items()}
        if split == "test" and not self._report(engine, ctx):
            return None
        return metrics

    # --- the scale of rewards, and the report card -----------------------------------------------------------------------

    def _facts_due(self, step: int) -> bool:
        """Whether a checkpoint or an evaluation follows: a function of recipe and step, so that a resumed run agrees."""
        recipe = self.recipe
        intervals = [n for n in (recipe.save_every, recipe.eval.every) if n is not None]
        return step in (recipe.steps, recipe.last_step) or any(step % n == 0 for n in intervals)

    def _measure(self, engine: Engine, ctx: Context) -> RewardFacts | None:
        """Scale and accuracy of the weights as they are, from few enough answers to be worth no thought of a signal."""
        if not isinstance(self.judging, Ranking):
            return None
        answers, judged = self.judging.judged(self.judging.split("valid"), self.recipe.reference_limit)
        references = self.judging.references
        with engine.replica(averaged=False) as module:
            scores = self._scores(module, [*references, *answers], ctx)
        assert scores is not None
        of_references, leads_P = scores[: len(references)], replace(judged, scores_N=scores[len(references) :]).leads_P
        return RewardFacts(
            reward_mean=float(of_references.mean()),
            reward_std=float(of_references.std()),
            reward_n=len(references),
            reward_accuracy=share_right(leads_P) if len(leads_P) else None,
            reward_n_pairs=len(leads_P),
        )

    def _scores(
        self, module: nn.Module, rows: Sequence[Any], ctx: Context, should_stop: Callable[[], bool] | None = None
    ) -> Any:
        """Scores of rows of ids, on every rank; None if asked to stop."""
        assert isinstance(module, SequenceClassifier)
        share = (ctx.ranks.rank, ctx.ranks.world)
        scores_N1 = score_sequences(module, rows, batch_tokens=self._micro_tokens, share=share, should_stop=should_stop)
        if scores_N1 is None:
            return None
        wide = torch.float32 if ctx.ranks.device.type == "mps" else torch.float64
        return ctx.ranks.sum_(scores_N1[:, 0].to(ctx.ranks.device, wide)).double().cpu().numpy()

    def _report(self, engine: Engine, ctx: Context) -> bool:
        """Writes the report card of the finished model; False if asked to stop."""
        if not isinstance(self.judging, Ranking):
            return True
        sources = self.judging.split("test") or self.judging.split("valid")
        answers, judged = self.judging.judged(sources)
        if not answers:
            ctx.log.say("report     no pair was held out, so nothing can be said of this reward model: set data.valid")
            return True
        with engine.replica() as module:
            scores = self._scores(module, answers, ctx, ctx.all_should_stop)
        if scores is None:
            return False
        if ctx.ranks.is_main:
            card = report_card(replace(judged, scores_N=scores))
            replace_file(ctx.out / "reward_card.json", to_json(card))
            drawn = draw_card(card, ctx.out / "reward_card.png", ctx.out.name) if self.recipe.log.plot else None
            for line in card_lines(card):
                ctx.log.say(line)
            ctx.log.say(f"report     {ctx.out / 'reward_card.json'}" + (f" and {drawn.name}" if drawn else ""))
        return True

    # --- what a checkpoint tells -----------------------------------------------------------------------------------------

    def files(self, engine: Engine) -> dict[str, bytes]:
        facts = {"stage": "reward", "objective": self.recipe.objective, "step": engine.step, **self.facts()}
        facts |= self.reward_facts.to_json() if self.reward_facts is not None else {}
        if not self.recipe.is_labelled:
            facts |= {"chat": self.recipe.data.chat, "system": self.recipe.data.system}
        if self.recipe.objective == "process":
            facts["step_separator"] = self.recipe.step_separator
        return model_files(
            self.model_config,
            engine.dtype,
            self.tokenizer,
            facts,
            head="classify",
            n_labels=self.judging.n_scores,
            labels=self.judging.classes or None,
            problem_type="single_label_classification" if self.judging.classes else "regression",
        )

    def facts(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.hash, "data": self.judging.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        """Facts alone, for the order of the data is a function of the step; and what was measured after the last one."""
        return {**self.facts(), "reward": self.reward_facts and self.reward_facts.to_json()}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Refuses to go on with other data or another tokenizer."""
        refuse_changes(self.recipe, self.facts(), state)
        self.reward_facts = RewardFacts(**state["reward"]) if state.get("reward") else None

    def _describe(self, loader: RowLoader) -> str:
        recipe, costs = self.recipe, cost(self.recipe, self.model_config, network)
        epochs = recipe.steps * loader.rows_per_step / sum(loader.n_rows)
        told = f"data       {self.judging.describe()}; {epochs:.2f} epochs"
        lines = describe_step(recipe, costs, self.model_config, self.tokenizer, loader, [told]).splitlines()
        if isinstance(self.judging, Ranking):  # whose micro-batches are cut by length
            lines = [line for line in lines if not line.startswith("step ")] + [
                f"step       {loader.rows_per_step:,} prompts with all their answers on {loader.world} rank(s), at most "
                f"{self._micro_tokens:,} tokens in a forward pass; {recipe.steps} steps"
            ]
        return "\n".join(lines)


def _shape(recipe: RewardRecipe, vocab_size: int) -> GPTConfig:
    """The network's; a judge of answers says the same of the same text, so it has no dropout."""
    config = model_config(recipe, vocab_size)
    if recipe.objective == "process" and not config.causal:
        raise UserError("objective process judges a step by what stands before it, and this model sees both sides")
    return config if recipe.is_labelled else config.model_copy(update={"dropout": 0.0})


def _quiet(line: str) -> None:
    """Ranks other than the first say nothing."""


# --- commands --------------------------------------------------------------------------------------------------------


open_task = RewardTask  # `llmkit inspect`, `doctor` and `replay` open it


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
            config = _shape(recipe, tokenizer.vocab_size)
            length = row_len(recipe, config)
            judging = judging_of(recipe, tokenizer, config, length, lambda: bool(stop), print)
        except Interrupted:
            return None
    for split in ("train", "valid", "test"):
        for source in judging.split(split):
            print(f"{split:5s} {source.name}: {judging.count(source)}")
    return True


def plan(recipe: RewardRecipe) -> Iterator[str]:
    """`llmkit plan`: what a run would cost, line by line."""
    return plan_of(recipe, network)


def job(recipe: RewardRecipe) -> Job:
    """What `llmkit plan` reckons with."""
    n_rows = 2 if recipe.objective == "rank" else 1
    full = f"{n_rows} text(s) to an example, each as long as a row: real ones are shorter"
    return supervised_job("reward", recipe, network, rows_of_example=n_rows, with_head=False, notes=[full])
