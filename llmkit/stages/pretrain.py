"""Pretraining: a network learns to predict the next token of text, or tokens that were hidden."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmkit.config import Interrupted, UserError
from llmkit.data.loader import MaskedRows, RowLoader, RowMaker, TextRows
from llmkit.data.packing import Masking
from llmkit.data.prepare import Prepared, prepare as prepare_shards
from llmkit.data.shards import TokenShards
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT
from llmkit.plan import flops_per_token, require_memory
from llmkit.plan.job import Job
from llmkit.stages.recipes import PretrainRecipe
from llmkit.tokenizer import Tokenizer
from llmkit.training.engine import Engine, Metrics, seed_of
from llmkit.training.jobs import parts_of, supervised_job
from llmkit.training.loop import Context, Outcome, Stop, Task, train
from llmkit.training.setup import (
    cost,
    describe_step,
    language_model,
    model_config,
    plan as plan,  # `llmkit plan` finds it here
    refuse_changes,
    row_len,
    rows_per_step,
    text_loader,
    tokenizer_of,
)
from llmkit.training.supervised import (
    LOAD,
    HeldOut,
    byte_lengths,
    held_out,
    label_bytes,
    supervised_step,
    token_loss,
    write_samples,
)


class PretrainTask(Task):
    """What the loop asks of pretraining."""

    def __init__(self, recipe: PretrainRecipe):
        self.recipe = recipe
        self.masked = recipe.objective == "masked"
        self.loss_fn = token_loss(recipe.z_loss, recipe.loss_chunk)
        self.eval_loss_fn = token_loss(recipe.z_loss, recipe.loss_chunk, accuracy=self.masked)
        self.tokenizer: Tokenizer
        self.data: Prepared
        self.loader: RowLoader | None = None
        self.model_config: GPTConfig
        self.row_len: int
        self.flops_per_token = 0.0
        self.expert_load: Tensor | None = None  # of the last step, [layers, experts]

    def prepare(self, ctx: Context) -> None:
        """Tokenizer and token shards."""
        recipe = self.recipe
        self.tokenizer = tokenizer_of(recipe, ctx.should_stop)
        self.model_config = model_config(recipe, self.tokenizer.vocab_size)
        self._check_objective()
        self.row_len = row_len(recipe, self.model_config)
        # Before the data is prepared for hours.
        require_memory(cost(recipe, self.model_config), ctx.ranks.device, parts_of(recipe, ctx.ranks))
        self.data = prepare_shards(recipe.data, self.tokenizer, should_stop=ctx.should_stop, progress=ctx.ranks.is_main)
        self.flops_per_token = flops_per_token(self.model_config, self.row_len)

    def _check_objective(self) -> None:
        """What only the finished tokenizer and the old model's shape can tell."""
        if self.model_config.causal == self.masked:
            raise UserError(
                f"{self.recipe.init_from}: the model sees {'what comes before a token' if self.masked else 'both sides'}"
                f": objective {self.recipe.objective} asks for model.causal={'false' if self.masked else 'true'}"
            )
        if self.masked and self.tokenizer.mask_id is None:
            raise UserError("objective masked needs a mask token: give the tokenizer `special: ['<|mask|>']`")

    def build(self, ctx: Context) -> nn.Module:
        recipe, config = self.recipe, self.model_config
        model = language_model(recipe, config, self.tokenizer.vocab_size, ctx.ranks, ctx.log.say)
        self.loader = self.open_rows(ctx)
        self.held_out = {"valid": self.data.valid, "test": self.data.test}
        self.bytes_of_token: Tensor = byte_lengths(self.tokenizer, config.vocab_size or 0)
        if ctx.ranks.is_main:
            ctx.log.say(self._describe(self.loader))
        return model

    def open_rows(self, ctx: Context) -> RowLoader:
        return self._loader(self.data.train, ctx)

    def _rows(self, shards: list[TokenShards], ctx: Context, purpose: str) -> RowMaker:
        data, pin_memory = self.recipe.data, ctx.ranks.device.type == "cuda"
        text = TextRows(
            shards,
            row_len=self.row_len,
            pad_id=self.tokenizer.pad_id,
            packing=data.packing,
            cross_document_attention=data.cross_document_attention,
            pin_memory=pin_memory,
        )
        if not self.masked:
            return text
        return MaskedRows(text, self._masking, seed_of(self.recipe.seed, "masks", purpose), pin_memory)

    @property
    def _masking(self) -> Masking:
        said, tokenizer = self.recipe.masking, self.tokenizer
        assert tokenizer.mask_id is not None
        text_ids = np.array([i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids], np.int64)
        return Masking(tokenizer.mask_id, text_ids, said.frac, said.replace_frac, said.random_frac)

    def _loader(self, shards: list[TokenShards], ctx: Context, held_out: bool = False) -> RowLoader:
        rows = self._rows(shards, ctx, "held out" if held_out else "train")
        return text_loader(self.recipe, rows, ctx.ranks, held_out)

    def close(self) -> None:
        """Ends the loader's thread, if it was ever begun."""
        if self.loader is not None:
            self.loader.close()

    def step(self, engine: Engine, ctx: Context) -> Metrics:
        assert self.loader is not None and isinstance(engine.module, GPT)
        if self.expert_load is not None:
            engine.module.set_expert_load(self.expert_load)
        metrics = supervised_step(engine, ctx, self.loader, self.loss_fn)
        self.expert_load = engine.stats.get(LOAD)
        if len(self.data.train) > 1:
            epochs = self.loader.epochs(engine.data_step)
            metrics |= {f"epoch/{s.name}": e for s, e in zip(self.data.train, epochs, strict=True)}
        if engine.step == self.recipe.last_step and ctx.ranks.is_main:
            ctx.log.say("consumed   " + "; ".join(self._consumed(engine.learnt_windows)))
        return metrics

    def _consumed(self, windows: list[tuple[int, int]]) -> list[str]:
        """What those windows of steps hold of each source."""
        assert self.loader is not None
        per_window = [(self.loader.counts(first), self.loader.counts(end)) for first, end in windows]
        counts = [sum(b[i] - a[i] for a, b in per_window) for i in range(len(self.data.train))]
        return [
            f"{s.name}: {n:,} rows of {self.row_len} ({100 * n / max(1, sum(counts)):.1f} %), {n / rows:.2f} epochs"
            for s, n, rows in zip(self.data.train, counts, self.loader.n_rows, strict=True)
        ]

    def evaluate(self, engine: Engine, ctx: Context, split: str) -> Metrics | None:
        """Loss and its kin over all sources of a split, each source apart where there are several."""
        sources = self.held_out[split]
        if not sources:
            return {}
        named = {split: sources}
        if len(sources) > 1:
            named |= {f"{split}/{s.name}": [s] for s in sources}
        metrics: Metrics = {}
        for name, shards in named.items():
            loader, limit = self._loader(shards, ctx, held_out=True), self.recipe.eval.max_tokens
            sums = held_out(engine, ctx, loader, self.eval_loss_fn, limit, label_bytes(self.bytes_of_token))
            if sums is None:
                return None
            metrics |= {f"{name}/{key}": value for key, value in self._figures(sums).items()}
        if not all(map(math.isfinite, metrics.values())):
            return metrics  # the loop ends the run: a model like this writes nothing either
        told = split != "valid" or write_samples(engine, ctx, self.recipe.eval.samples, self.tokenizer, chat=False)
        return None if told is None else metrics

    def _figures(self, sums: HeldOut) -> Metrics:
        loss = sums.mean("loss")
        figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.masked:  # bits per byte would count the bytes of hidden tokens alone, which compares with nothing
            return {**figures, "accuracy": sums.mean("accuracy")}
        return (
            {**figures, "bits_per_byte": sums.parts["loss"] / math.log(2) / sums.n_bytes} if sums.n_bytes else figures
        )

    def files(self, engine: Engine) -> dict[str, bytes]:
        facts = {"stage": "pretrain", "objective": self.recipe.objective, "step": engine.step, **self.facts()}
        facts["consumed"] = "; ".join(self._consumed(engine.learnt_windows))
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

    # --- words -------------------------------------------------------------------------------------------------------

    def _describe(self, loader: RowLoader) -> str:
        """The derived numbers of a run, as they are printed at its start."""
        data, recipe = self.data, self.recipe
        train, valid = (sum(s.n_tokens for s in shards) for shards in (data.train, data.valid))
        dropped = loader.rows.dropped_tokens if isinstance(loader.rows, TextRows) else 0
        lines = [
            f"data       {train:,} tokens to train on, {valid:,} held out; "
            f"{recipe.steps * rows_per_step(recipe, self.row_len) * self.row_len / train:.2f} epochs"
            + (f"; {dropped:,} tokens an epoch lie beyond the row length" if dropped else "")
        ]
        if len(data.train) > 1:
            lines += [f"           {line}" for line in self._consumed([(0, recipe.steps)])]
        costs = cost(recipe, self.model_config)
        return describe_step(recipe, costs, self.model_config, self.tokenizer, loader, lines)


# --- commands --------------------------------------------------------------------------------------------------------


open_task = PretrainTask  # `llmkit inspect`, `doctor` and `replay` open it


def run(recipe: PretrainRecipe) -> Outcome:
    """`llmkit train`."""
    task = PretrainTask(recipe)
    try:
        return train(recipe, task)
    finally:
        task.close()


def prepare(recipe: PretrainRecipe, part: tuple[int, int] | None = None) -> bool | None:
    """`llmkit prepare`: True when all shards are there, None if a signal stopped it."""
    stop = Stop()
    with stop.listening():
        try:
            tokenizer = tokenizer_of(recipe, lambda: bool(stop))
            data = prepare_shards(recipe.data, tokenizer, should_stop=lambda: bool(stop), part=part)
        except Interrupted:
            return None
    if data is None:  # one job of several: it has said what is still missing
        return True
    for split in ("train", "valid", "test"):
        for shards in getattr(data, split):
            print(
                f"{split:5s} {shards.name}: {shards.n_docs:,} documents, {shards.n_tokens:,} tokens, {shards.n_bytes:,} bytes"
            )
    if told := data.report():
        print(told)
    return True


def job(recipe: PretrainRecipe) -> Job:
    """What `llmkit plan` reckons with."""
    return supervised_job("pretrain", recipe)
