"""Distillation: a student learns from what a teacher would say, at every token, and from how it comes to say it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.config import Interrupted, UserError
from llmkit.data.chats import ChatRows, Chats
from llmkit.data.loader import RowLoader, RowMaker
from llmkit.distill.lessons import Lessons, Sources
from llmkit.distill.on_policy import is_on_policy, own_answers, questions
from llmkit.distill.teaching import attention_mask, load_teacher, precision_of, teacher_config
from llmkit.distill.terms import Terms, described, student_of
from llmkit.model.config import GPTConfig, count_params
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT
from llmkit.model.heads import Distilled
from llmkit.model.pruning import pruned, student_config
from llmkit.plan import flops_per_token, require_memory
from llmkit.plan.job import Job
from llmkit.rollout.answers import AnswerEval
from llmkit.stages.recipes import DistillRecipe
from llmkit.training.dist import Ranks, pick_device
from llmkit.training.engine import PRECISIONS, Engine, LossFn, Metrics, seed_of
from llmkit.training.jobs import frozen_net, parts_of, supervised_job
from llmkit.training.loop import Context, Outcome, Stop, Task, train
from llmkit.training.setup import (
    cost,
    describe_step,
    language_model,
    plan as plan_of,
    planned_config,
    refuse_changes,
    row_len,
    rows_per_step,
    text_loader,
)
from llmkit.training.supervised import LOAD, HeldOut, held_out, supervised_step, write_samples


class DistillTask(Task):
    """What the loop asks of distillation."""

    def __init__(self, recipe: DistillRecipe):
        self.recipe = recipe
        self.lessons: Lessons
        self.terms: Terms
        self.loader: RowLoader | None = None
        self.answers: AnswerEval | None = None
        self.flops_per_token = 0.0
        self.expert_load: Tensor | None = None  # of the last step, [layers, experts]

    # --- before the first step ---------------------------------------------------------------------------------------

    def prepare(self, ctx: Context) -> None:
        """Tokenizers, data, the teacher's answers and what it says of the data, where the recipe asks for them first."""
        recipe = self.recipe
        self.lessons = Lessons(recipe, ctx.ranks, ctx.should_stop, ctx.log.say)
        self.tokenizer, self.model_config = self.lessons.tokenizer, self.lessons.model_config
        require_memory(cost(recipe, self.model_config), ctx.ranks.device, parts_of(recipe, ctx.ranks))
        self.flops_per_token = flops_per_token(self.model_config, self.lessons.row_len)
        self.lessons.prepare()
        self.terms = Terms(
            recipe,
            self.model_config,
            self.lessons.teacher_config,
            self.tokenizer.vocab_size,
            self.lessons.teacher_tokenizer.vocab_size,
        )

    def build(self, ctx: Context) -> nn.Module:
        recipe = self.recipe
        if recipe.cache is None and recipe.losses:
            self.terms.teacher = load_teacher(recipe, ctx.ranks)
        self.loader = self.open_rows(ctx)
        student = self._student(ctx, self.loader.rows)
        if recipe.eval.answers is not None:
            self.answers = AnswerEval(
                recipe.eval.answers,
                self.tokenizer,
                chat=recipe.examples == "conversations" and recipe.data.chat,
                system=recipe.data.system,
                max_seq_len=self.model_config.max_seq_len,
                device=ctx.ranks.device,
            )
        self.loss_fn = self.terms.loss_fn(recipe.losses, recipe.ce_weight)
        self.own_loss_fn = self.terms.loss_fn(recipe.losses, 0.0)
        self.eval_loss_fn = self.terms.loss_fn(recipe.losses, recipe.ce_weight, accuracy=True)
        if ctx.ranks.is_main:
            ctx.log.say(self._describe(self.loader))
        apart = [t.label for t in recipe.losses if t.kind in ("attention", "relation")]
        if apart and ctx.ranks.tensor > 1:
            raise UserError(
                f"parallel.tensor ({ctx.ranks.tensor}) with losses: {', '.join(apart)}: the student's heads lie in several "
                "processes: use parallel.shard: full, or kind: hidden"
            )
        projections = self.terms.projections(seed_of(recipe.seed, "projections"))
        return Distilled(student, projections) if len(projections) else student

    def open_rows(self, ctx: Context) -> RowLoader:
        return text_loader(self.recipe, self.lessons.rows("train"), ctx.ranks)

    def _student(self, ctx: Context, rows: RowMaker) -> GPT:
        recipe = self.recipe
        if recipe.from_teacher is None:
            return language_model(recipe, self.model_config, self.tokenizer.vocab_size, ctx.ranks, ctx.log.say)
        exact = {"shard_teacher": False, "teacher_precision": "fp64" if recipe.precision == "fp64" else "fp32"}
        teacher = load_teacher(recipe.model_copy(update=exact), Ranks(device=ctx.ranks.device))
        student = pruned(teacher, recipe.from_teacher, self._seen(rows, ctx.ranks.device))
        student.model.activation_checkpointing = recipe.activation_checkpointing
        student.config = student.model.config = self.model_config
        n, of = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
        ctx.log.say(f"student    {n / 1e6:.2f} M of the teacher's {of / 1e6:.2f} M parameters")
        return student.to("cpu").requires_grad_(True)

    def _seen(self, rows: RowMaker, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
        """The first rows of the training data, by which the teacher's activations are measured: the same on all ranks."""
        assert self.recipe.from_teacher is not None
        micro = max(1, (self.recipe.batch.micro_tokens or 8192) // rows.row_len)
        n = min(self.recipe.from_teacher.rows, sum(rows.n_rows))
        with RowLoader(rows, rows_per_step=n, prefetch=0, micro_rows=1) as loader:
            loader.micro_rows = min(micro, n)
            for batch in loader.eval_batches(n * rows.row_len):
                here = batch.to(device)
                yield here.ids_BT, here.positions_BT, attention_mask(here.docs_BT, here.one_document), here.docs_BT >= 0

    def close(self) -> None:
        """Ends the loader's thread and the graders' processes, if they were ever begun."""
        for held in (self.loader, self.answers):
            if held is not None:
                held.close()

    # --- one step ----------------------------------------------------------------------------------------------------

    def step(self, engine: Engine, ctx: Context) -> Metrics:
        assert self.loader is not None
        recipe, student = self.recipe, student_of(engine.module)
        if self.expert_load is not None:
            student.set_expert_load(self.expert_load)
        own = is_on_policy(recipe.seed, engine.data_step, recipe.on_policy_frac)
        every = recipe.term_norms_every
        measure = every is not None and (engine.step + 1) % every == 0
        if own:
            metrics = self._own_step(engine, ctx, measure)
        else:
            told = self._term_norms(engine, self.loader.step(engine.data_step), recipe.ce_weight) if measure else {}
            metrics = supervised_step(engine, ctx, self.loader, self.loss_fn) | told
        if recipe.on_policy_frac:
            metrics["on_policy"] = float(own)
        self.expert_load = engine.stats.get(LOAD)
        sources: Sources = self.lessons.data.train
        if len(sources) > 1:
            epochs = self.loader.epochs(engine.data_step)
            metrics |= {f"epoch/{s.name}": e for s, e in zip(sources, epochs, strict=True)}
        return metrics

    def _own_step(self, engine: Engine, ctx: Context, measure: bool) -> Metrics:
        """An update on the student's own answers to the questions of the step's rows."""
        recipe, loader, length = self.recipe, self.loader, self.lessons.row_len
        assert loader is not None and isinstance(loader.rows, ChatRows)
        step = engine.data_step
        asked = questions(loader.rows, loader, step, length, recipe.seed)
        with engine.replica() as module:
            batches = own_answers(
                student_of(module),
                asked,
                recipe.on_policy,
                self.tokenizer,
                ctx.ranks,
                row_len=length,
                most_tokens=recipe.batch.micro_tokens or 8192,
                should_stop=ctx.should_stop,
            )
        told = self._term_norms(engine, batches, 0.0) if measure else {}
        metrics = engine.update(batches, self.own_loss_fn)
        tokens, written, n = ctx.ranks.sum_numbers(
            sum(b.n_tokens for b in batches), sum(b.denominator for b in batches), float(len(asked))
        )
        metrics |= {"tokens": tokens, "epoch": loader.epoch(step + 1), "own_length": written / n, **told}
        metrics["data_hash"] = ctx.ranks.sum_hash(loader.tokens_hash(step))
        return metrics

    def _term_norms(self, engine: Engine, batches: Sequence[Any], ce_weight: float) -> Metrics:
        """What each weighted term alone would do to the weights: the norm of its gradient."""
        alone: dict[str, LossFn] = {t.label: self.terms.loss_fn([t], 0.0) for t in self.recipe.losses}
        weights = {t.label: t.weight for t in self.recipe.losses}
        if ce_weight:
            alone, weights = {"ce": self.terms.loss_fn([], ce_weight), **alone}, {"ce": ce_weight, **weights}
        norms = {f"{name}/grad_norm": engine.gradient_norm(batches, fn) for name, fn in alone.items()}
        return {**{f"{name}/weight": weight for name, weight in weights.items()}, **norms}

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, engine: Engine, ctx: Context, split: str) -> Metrics | None:
        """The loss and its terms on held-out data, each source apart where there are several; answers."""
        recipe, sources = self.recipe, getattr(self.lessons.data, split)
        named: dict[str, Sequence[int]] = {split: range(len(sources))} if sources else {}
        if len(sources) > 1:
            named |= {f"{split}/{s.name}": [i] for i, s in enumerate(sources)}
        metrics: Metrics = {}
        for name, which in named.items():
            loader = text_loader(recipe, self.lessons.rows(split, which), ctx.ranks, held_out=True)
            sums = held_out(engine, ctx, loader, self.eval_loss_fn, recipe.eval.max_tokens)
            if sums is None:
                return None
            metrics |= {f"{name}/{key}": value for key, value in _figures(sums).items()}
        if split != "valid" or not all(map(math.isfinite, metrics.values())):
            return metrics  # of a loss that is not finite the loop ends the run: such a model answers nothing either
        if self.answers is not None:
            with engine.replica() as module:
                graded = self.answers.evaluate(student_of(module), ctx, engine.step)
            if graded is None:
                return None
            metrics |= graded
        chat = recipe.examples == "conversations" and recipe.data.chat
        told = write_samples(engine, ctx, recipe.eval.samples, self.tokenizer, chat, recipe.data.system)
        return None if told is None else metrics

    # --- what is kept ------------------------------------------------------------------------------------------------

    def files(self, engine: Engine) -> dict[str, bytes]:
        facts = {"stage": "distill", "teacher": self.recipe.teacher, "step": engine.step, **self.facts()}
        return model_files(self.model_config, engine.dtype, self.tokenizer, facts)

    def facts(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.hash, "data": self.lessons.data.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        """Facts, and the experts' load: the order of the data, and which steps are on-policy, follow from the step."""
        return {**self.facts(), LOAD: None if self.expert_load is None else self.expert_load.tolist()}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Refuses to go on with other data or another tokenizer."""
        refuse_changes(self.recipe, self.facts(), state)
        self.expert_load = None if state[LOAD] is None else torch.tensor(state[LOAD], dtype=torch.int64)

    def _describe(self, loader: RowLoader) -> str:
        recipe, lessons = self.recipe, self.lessons
        costs = cost(recipe, self.model_config)
        teacher = lessons.teacher_config
        asked = "asked before training" if recipe.cache else f"asked at every step, in {precision_of(recipe)}"
        lines = [
            f"teacher    {recipe.teacher}: {teacher.family}, {teacher.n_layers} layers of {teacher.d_model}; {asked}",
            *described(recipe, self.terms.pairs),
            f"data       {lessons.describe(loader)}",
        ]
        if recipe.on_policy_frac:
            lines.append(f"           {recipe.on_policy_frac:.0%} of the steps on the student's own answers")
        if self.answers is not None:
            lines += self.answers.describe()
        return describe_step(recipe, costs, self.model_config, self.tokenizer, loader, lines)


def _figures(sums: HeldOut) -> Metrics:
    figures = {name: sums.mean(name) for name in sums.parts}
    return figures | ({"perplexity": math.exp(min(figures["ce"], 700.0))} if "ce" in figures else {})


# --- commands --------------------------------------------------------------------------------------------------------


open_task = DistillTask  # `llmkit inspect`, `doctor` and `replay` open it


def run(recipe: DistillRecipe) -> Outcome:
    """`llmkit train`."""
    task = DistillTask(recipe)
    try:
        return train(recipe, task)
    finally:
        task.close()


def prepare(recipe: DistillRecipe, part: tuple[int, int] | None = None) -> bool | None:
    """`llmkit prepare`: True when data and cache are there, or this job's share of it; None if a signal stopped it."""
    stop = Stop()
    with stop.listening():
        try:
            lessons = Lessons(recipe, Ranks(device=pick_device(recipe.device)), lambda: bool(stop), print)
            whole = lessons.prepare(part)
        except Interrupted:
            return None
    if not whole:  # one job of several: it has said what is still missing
        return True
    for split in ("train", "valid", "test"):
        for source in getattr(lessons.data, split):
            told = f"{len(source):,} conversations" if isinstance(source, Chats) else f"{source.n_tokens:,} tokens"
            print(f"{split:5s} {source.name}: {told}")
    return True


def plan(recipe: DistillRecipe) -> Iterator[str]:
    """`llmkit plan`: what a run would cost, line by line; the teacher's share first, since the rest is the student's."""
    n, precision = count_params(teacher_config(recipe)).total, precision_of(recipe)
    told = "asked before training, and not held then" if recipe.cache is not None else "held beside what follows"
    yield f"teacher    {n / 1e6:.2f} M parameters, {n * PRECISIONS[precision].itemsize / 1e6:.0f} MB in {precision}; {told}"
    yield from plan_of(recipe, config=_planned(recipe))


def _planned(recipe: DistillRecipe) -> GPTConfig:
    """The student's shape."""
    if recipe.from_teacher is None:
        return planned_config(recipe)
    return student_config(teacher_config(recipe), recipe.from_teacher)


def job(recipe: DistillRecipe) -> Job:
    """What `llmkit plan` reckons with."""
    config = _planned(recipe)
    needs_head = any(term.kind in ("soft", "uld") for term in recipe.losses)
    teacher = frozen_net("teacher", teacher_config(recipe), precision_of(recipe))
    asked = [(teacher, needs_head)] if recipe.cache is None and recipe.losses else []
    length, notes, written = row_len(recipe, config), [], 0.0
    if recipe.on_policy_frac:
        n_tokens = rows_per_step(recipe, length) * length
        written = recipe.on_policy_frac * min(n_tokens, n_tokens * recipe.on_policy.max_new_tokens / length)
        notes.append("own answers: one to a row, as long as on_policy.max_new_tokens allows")
    return supervised_job("distill", recipe, config=config, asked=asked, written=written, notes=notes)
