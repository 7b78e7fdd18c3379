"""Supervised fine-tuning: a base model learns to answer, from conversations of which the assistant's turns are trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.config import Interrupted
from llmkit.data.chats import ChatData, ChatRows, Chats, prepare_chats
from llmkit.data.loader import Batch, RowLoader
from llmkit.losses import LossSum
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT
from llmkit.plan import flops_per_token, require_memory
from llmkit.plan.job import Job
from llmkit.rollout.answers import AnswerEval
from llmkit.stages.recipes import SftRecipe
from llmkit.tokenizer import Tokenizer
from llmkit.training.engine import Engine, LossFn, Metrics
from llmkit.training.jobs import parts_of, supervised_job
from llmkit.training.loop import Context, Outcome, Stop, train
from llmkit.training.setup import (
    cost,
    describe_step,
    language_model,
    model_config,
    plan as plan,  # `llmkit plan` finds it here
    refuse_changes,
    row_len,
    text_loader,
    tokenizer_of,
)
from llmkit.training.supervised import LOAD, HeldOut, held_out, supervised_step, token_loss, write_samples
from llmkit.training.task import Task


class EmbeddingNoise:
    """NEFTune (Jain et al. 2023, arXiv 2310.05914): x + u * alpha / sqrt(T D), u uniform in (-1, 1), in training only.

    T counts the tokens of the conversation, not of the row; padding gets none. The draws come from the generator that
    the engine seeds for each micro-batch, as dropout's do, so a run that is resumed draws what it would have drawn.
    """

    def __init__(self, model: GPT, alpha: float):
        self.alpha = alpha
        self.scale_BT: Tensor | None = None  # of the batch in work
        model.model.embed_tokens.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: Any, x_BTD: Tensor) -> Tensor | None:
        if self.scale_BT is None:
            return None
        noise_BTD = torch.empty_like(x_BTD).uniform_(-1, 1)
        return x_BTD + noise_BTD * self.scale_BT[..., None].to(x_BTD.dtype)

    def around(self, loss_fn: LossFn) -> LossFn:
        """The same loss, with noise while the network is trained."""

        def loss(module: nn.Module, batch: Batch) -> LossSum:
            assert isinstance(module, GPT)
            if module.training:
                part = batch.part
                lengths = conversation_lengths(batch.docs_BT if part is None else part.docs_BS)
                lengths_BT = lengths if part is None else part.context.own(lengths)
                self.scale_BT = self.alpha * (lengths_BT * module.config.d_model).rsqrt()
                self.scale_BT = self.scale_BT.masked_fill(batch.docs_BT < 0, 0.0)
            try:
                return loss_fn(module, batch)
            finally:
                self.scale_BT = None

        return loss


def conversation_lengths(docs_BT: Tensor) -> Tensor:
    """How many inputs the conversation of each position has, fp32 [B, T]; of padding how much padding the row has."""
    B, T = docs_BT.shape
    cells_BT = docs_BT.long() + 1 + torch.arange(B, device=docs_BT.device)[:, None] * (T + 1)
    return torch.bincount(cells_BT.flatten(), minlength=B * (T + 1))[cells_BT].float()


class SftTask(Task):
    """What the loop asks of supervised fine-tuning."""

    def __init__(self, recipe: SftRecipe):
        self.recipe = recipe
        self.loss_fn = token_loss(recipe.z_loss, recipe.loss_chunk)
        self.eval_loss_fn = token_loss(recipe.z_loss, recipe.loss_chunk, accuracy=True)
        self.tokenizer: Tokenizer
        self.data: ChatData
        self.loader: RowLoader | None = None
        self.answers: AnswerEval | None = None
        self.model_config: GPTConfig
        self.row_len: int
        self.flops_per_token = 0.0
        self.expert_load: Tensor | None = None  # of the last step, [layers, experts]

    def prepare(self, ctx: Context) -> None:
        """Tokenizer and encoded conversations."""
        recipe = self.recipe
        self.tokenizer = tokenizer_of(recipe, ctx.should_stop)
        self.model_config = model_config(recipe, self.tokenizer.vocab_size)
        self.row_len = row_len(recipe, self.model_config)
        require_memory(cost(recipe, self.model_config), ctx.ranks.device, parts_of(recipe, ctx.ranks))
        self.flops_per_token = flops_per_token(self.model_config, self.row_len)
        self.data = _chats(recipe, self.tokenizer, self.row_len, ctx.should_stop, ctx.log.say)

    def build(self, ctx: Context) -> nn.Module:
        recipe, config = self.recipe, self.model_config
        model = language_model(recipe, config, self.tokenizer.vocab_size, ctx.ranks, ctx.log.say)
        if recipe.neftune_alpha is not None:
            self.loss_fn = EmbeddingNoise(model, recipe.neftune_alpha).around(self.loss_fn)
        self.loader = self.open_rows(ctx)
        self.held_out = {"valid": self.data.valid, "test": self.data.test}
        if recipe.eval.answers is not None:
            self.answers = AnswerEval(
                recipe.eval.answers,
                self.tokenizer,
                chat=recipe.data.chat,
                system=recipe.data.system,
                max_seq_len=config.max_seq_len,
                device=ctx.ranks.device,
            )
        if ctx.ranks.is_main:
            ctx.log.say(self._describe(self.loader))
        return model

    def open_rows(self, ctx: Context) -> RowLoader:
        return self._loader(self.data.train, ctx)

    def _loader(self, sources: list[Chats], ctx: Context, held_out: bool = False) -> RowLoader:
        rows = ChatRows(
            sources,
            row_len=self.row_len,
            pad_id=self.tokenizer.pad_id,
            packing=self.recipe.data.packing,
            pin_memory=ctx.ranks.device.type == "cuda",
        )
        return text_loader(self.recipe, rows, ctx.ranks, held_out)

    def close(self) -> None:
        """Ends the loader's thread and the graders' processes, if they were ever begun."""
        if self.loader is not None:
            self.loader.close()
        if self.answers is not None:
            self.answers.close()

    def step(self, engine: Engine, ctx: Context) -> Metrics:
        assert self.loader is not None and isinstance(engine.module, GPT)
        if self.expert_load is not None:
            engine.module.set_expert_load(self.expert_load)
        metrics = supervised_step(engine, ctx, self.loader, self.loss_fn)
        self.expert_load = engine.stats.get(LOAD)
        if len(self.data.train) > 1:
            epochs = self.loader.epochs(engine.data_step)
            metrics |= {f"epoch/{s.name}": e for s, e in zip(self.data.train, epochs, strict=True)}
        return metrics

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, engine: Engine, ctx: Context, split: str) -> Metrics | None:
        """Loss, perplexity and accuracy per token that is learnt, each source apart where there are several; answers."""
        sources = self.held_out[split]
        named = {split: sources} if sources else {}
        if len(sources) > 1:
            named |= {f"{split}/{s.name}": [s] for s in sources}
        metrics: Metrics = {}
        for name, chats in named.items():
            loader, limit = self._loader(chats, ctx, held_out=True), self.recipe.eval.max_tokens
            sums = held_out(engine, ctx, loader, self.eval_loss_fn, limit)
            if sums is None:
                return None
            metrics |= {f"{name}/{key}": value for key, value in _figures(sums).items()}
        if split != "valid":
            return metrics
        if not all(map(math.isfinite, metrics.values())):
            return metrics  # the loop ends the run: a model like this answers nothing either
        if self.answers is not None:
            with engine.replica() as module:
                assert isinstance(module, GPT)
                graded = self.answers.evaluate(module, ctx, engine.step)
            if graded is None:
                return None
            metrics |= graded
        data = self.recipe.data
        told = write_samples(engine, ctx, self.recipe.eval.samples, self.tokenizer, data.chat, data.system)
        return None if told is None else metrics

    # --- what is kept ------------------------------------------------------------------------------------------------

    def files(self, engine: Engine) -> dict[str, bytes]:
        facts = {"stage": "sft", "train_on": self.recipe.train_on, "step": engine.step, **self.facts()}
        return model_files(self.model_config, engine.dtype, self.tokenizer, facts)

    def facts(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.hash, "data": self.data.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        """Facts, and the experts' load: the order of the data is a function of the step."""
        return {**self.facts(), LOAD: None if self.expert_load is None else self.expert_load.tolist()}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Refuses to go on with other data or another tokenizer."""
        refuse_changes(self.recipe, self.facts(), state)
        self.expert_load = None if state[LOAD] is None else torch.tensor(state[LOAD], dtype=torch.int64)

    def _describe(self, loader: RowLoader) -> str:
        """The derived numbers of a run, as they are printed at its start."""
        data, recipe, rows = self.data, self.recipe, loader.rows
        assert isinstance(rows, ChatRows)
        n_train, n_valid = (sum(map(len, split)) for split in (data.train, data.valid))
        n_tokens, n_trained = (sum(int(f(s)) for s in data.train) for f in (_n_tokens, _n_trained))
        lines = [
            f"data       {n_train:,} conversations to train on, {n_valid:,} held out; {n_tokens:,} tokens, of which "
            f"{n_trained:,} ({100 * n_trained / n_tokens:.0f} %) are learnt ({recipe.train_on})",
            f"rows       {sum(rows.n_rows):,} of {self.row_len}, {100 * rows.fill:.0f} % filled; "
            f"{recipe.steps * loader.rows_per_step / sum(rows.n_rows):.2f} epochs",
        ]
        counts = {
            "left out": sum(s.n_dropped for s in data.train),
            "cut": sum(s.n_cut for s in data.train),
            "split into turns": sum(s.n_split for s in data.train),
        }
        if told := "; ".join(f"{n:,} {what}" for what, n in counts.items() if n):
            lines.append(f"           {told}")
        if self.answers is not None:
            lines += self.answers.describe()
        costs = cost(recipe, self.model_config)
        return describe_step(recipe, costs, self.model_config, self.tokenizer, loader, lines)


def _n_tokens(chats: Chats) -> int:
    return len(chats.tokens)


def _n_trained(chats: Chats) -> int:
    return int(chats.trained.sum())


def _figures(sums: HeldOut) -> Metrics:
    loss = sums.mean("loss")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": sums.mean("accuracy")}


def _chats(recipe: SftRecipe, tokenizer: Tokenizer, length: int, should_stop: Any, say: Any) -> ChatData:
    return prepare_chats(
        recipe.data, tokenizer, row_len=length, train_on=recipe.train_on, should_stop=should_stop, say=say
    )


# --- commands --------------------------------------------------------------------------------------------------------


open_task = SftTask  # `llmkit inspect`, `doctor` and `replay` open it


def run(recipe: SftRecipe) -> Outcome:
    """`llmkit train`."""
    task = SftTask(recipe)
    try:
        return train(recipe, task)
    finally:
        task.close()


def prepare(recipe: SftRecipe) -> bool | None:
    """`llmkit prepare`: True when all conversations are encoded, None if a signal stopped it."""
    stop = Stop()
    with stop.listening():
        try:
            tokenizer = tokenizer_of(recipe, lambda: bool(stop))
            length = row_len(recipe, model_config(recipe, tokenizer.vocab_size))
            data = _chats(recipe, tokenizer, length, lambda: bool(stop), print)
        except Interrupted:
            return None
    for split in ("train", "valid", "test"):
        for chats in getattr(data, split):
            print(
                f"{split:5s} {chats.name}: {len(chats):,} conversations, {_n_tokens(chats):,} tokens, "
                f"{_n_trained(chats):,} of them learnt; {chats.n_dropped:,} left out, {chats.n_cut:,} cut"
            )
    return True


def job(recipe: SftRecipe) -> Job:
    """What `llmkit plan` reckons with."""
    notes = [] if recipe.train_on == "all" else ["every token is learnt: the loss passes over those that aren't"]
    if not recipe.data.packing:
        notes.append("every conversation is as long as a row: real ones are shorter")
    return supervised_job("sft", recipe, notes=notes)
