"""Pretraining: a GPT learns to predict the next token of text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmkit.config import Interrupted, UserError
from llmkit.data.loader import RowLoader
from llmkit.data.prepare import Prepared, prepare as prepare_shards
from llmkit.data.shards import TokenShards
from llmkit.data.texts import obtain_tokenizer
from llmkit.inference.generate import generate
from llmkit.model.config import GPTConfig
from llmkit.model.files import model_files
from llmkit.model.gpt import GPT, init_weights
from llmkit.model.hf import load_weights, read_config
from llmkit.plan import Cost, cost_of, flops_per_token, require_memory
from llmkit.stages.recipes import PretrainRecipe
from llmkit.storage import resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.engine import Engine, Metrics, seed_of
from llmkit.training.loop import Context, Outcome, Stop, train
from llmkit.training.supervised import byte_lengths, held_out, next_token_loss, supervised_step


class PretrainTask:
    """What the loop asks of pretraining."""

    def __init__(self, recipe: PretrainRecipe):
        self.recipe = recipe
        self.loss_fn = next_token_loss(recipe.z_loss, recipe.loss_chunk)
        self.tokenizer: Tokenizer
        self.data: Prepared
        self.loader: RowLoader | None = None
        self.model_config: GPTConfig
        self.row_len: int
        self.flops_per_token = 0.0

    def prepare(self, ctx: Context) -> None:
        """Tokenizer and token shards."""
        recipe = self.recipe
        self.tokenizer = obtain_tokenizer(recipe.tokenizer, recipe.data, Path(recipe.out) / "tokenizer")
        self.model_config = model_config(recipe, self.tokenizer.vocab_size)
        require_memory(cost(recipe, self.model_config), ctx.ranks.device)  # before the data is prepared for hours
        self.data = prepare_shards(recipe.data, self.tokenizer, should_stop=ctx.should_stop, progress=ctx.ranks.is_main)
        self.row_len = recipe.batch.max_len or self.model_config.max_seq_len
        self.flops_per_token = flops_per_token(self.model_config, self.row_len)

    def build(self, ctx: Context) -> nn.Module:
        recipe, config = self.recipe, self.model_config
        model = GPT(config, recipe.activation_checkpointing)
        if recipe.init_from is None:
            init_weights(model, recipe.seed)
        else:
            load_weights(model, resolve_model(recipe.init_from))
        self.loader = self._loader(self.data.train, ctx, self.data.train_weights)
        self.held_out = {"valid": self.data.valid, "test": self.data.test}
        self.bytes_of_token: Tensor = byte_lengths(self.tokenizer, config.vocab_size or 0)
        if ctx.ranks.is_main:
            ctx.log.say(describe(recipe, config, self.tokenizer, self.data, self.loader))
        return model

    def _loader(
        self, shards: list[TokenShards], ctx: Context, weights: list[float] | None = None, held_out: bool = False
    ) -> RowLoader:
        recipe, world = self.recipe, ctx.ranks.world
        most = max(1, (recipe.batch.micro_tokens or 8192) // self.row_len)
        rows = most * world if held_out else rows_per_step(recipe, self.row_len)
        return RowLoader(
            shards,
            row_len=self.row_len,
            rows_per_step=rows,
            pad_id=self.tokenizer.pad_id,
            seed=seed_of(recipe.seed, "order"),
            weights=weights,
            rank=ctx.ranks.rank,
            world=world,
            micro_rows=micro_rows(recipe, rows // world, self.row_len),
            prefetch=0 if held_out else 2,
            packing=recipe.data.packing,
            cross_document_attention=recipe.data.cross_document_attention,
            pin_memory=ctx.ranks.device.type == "cuda",
        )

    def close(self) -> None:
        """Ends the loader's thread, if it was ever begun."""
        if self.loader is not None:
            self.loader.close()

    def step(self, engine: Engine, ctx: Context) -> Metrics:
        assert self.loader is not None
        return supervised_step(engine, ctx, self.loader, self.loss_fn)

    def evaluate(self, engine: Engine, ctx: Context, split: str) -> Metrics | None:
        """Loss, perplexity and bits per byte over all sources of a split, each source apart where there are several."""
        sources = self.held_out[split]
        if not sources:
            return {}
        named = {split: sources}
        if len(sources) > 1:
            named |= {f"{split}/{Path(s.name).stem}": [s] for s in sources}
        metrics: Metrics = {}
        for name, shards in named.items():
            limit = self.recipe.eval.max_tokens
            sums = held_out(
                engine, ctx, self._loader(shards, ctx, held_out=True), self.loss_fn, self.bytes_of_token, limit
            )
            if sums is None:
                return None
            metrics |= {f"{name}/{key}": value for key, value in sums.items()}
        texts = self._samples(engine, ctx) if split == "valid" and ctx.ranks.is_main else {}
        if ctx.all_should_stop():
            return None  # the samples may be cut short; an evaluation counts, and is written, as a whole or not at all
        for prompt, text in texts.items():
            ctx.log.samples({"step": engine.step, "prompt": prompt, "text": text})
            ctx.log.say(f"    {prompt}|{text}")
        return metrics

    def _samples(self, engine: Engine, ctx: Context) -> dict[str, str]:
        """What the model writes after each prompt."""
        samples = self.recipe.eval.samples
        if not samples.prompts:
            return {}
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        prompts = [bos + self.tokenizer.encode(p) for p in samples.prompts]
        with engine.evaluating() as module:
            assert isinstance(module, GPT)
            results = generate(module, prompts, samples, tokenizer=self.tokenizer, should_stop=ctx.should_stop)
        return {prompt: result.text for prompt, result in zip(samples.prompts, results, strict=True)}

    def files(self, engine: Engine) -> dict[str, bytes]:
        facts = {"stage": "pretrain", "step": engine.step, **self.facts()}
        return model_files(self.model_config, engine.dtype, self.tokenizer, facts)

    def facts(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.hash, "data": self.data.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        """Nothing but facts: the order of the data is a function of the step."""
        return self.facts()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses to go on with other data or another tokenizer."""
        for key, value in self.facts().items():
            if state[key] != value and not self.recipe.allow_changes:
                raise UserError(
                    f"{self.recipe.out}: the {key} is not what the run was started with (hash {value[:12]}, then "
                    f"{state[key][:12]}): put it back, choose another `out`, or allow it with allow_changes=true"
                )


# --- derived numbers -------------------------------------------------------------------------------------------------


def model_config(recipe: PretrainRecipe, vocab_size: int) -> GPTConfig:
    """The model's shape with its vocabulary filled in: the tokenizer's size, rounded up to a multiple of 64."""
    if recipe.init_from is not None:
        old = read_config(resolve_model(recipe.init_from))
        if recipe.model is not None and recipe.model.model_copy(update={"vocab_size": old.vocab_size}) != old:
            raise UserError(
                f"init_from: {recipe.init_from} has another shape than `model`: leave `model` out to keep its own"
            )
        given = old
    else:
        assert recipe.model is not None
        given = recipe.model
    rounded = -(-vocab_size // 64) * 64
    if given.vocab_size is None:
        return given.model_copy(update={"vocab_size": rounded})
    if given.vocab_size < vocab_size:
        raise UserError(f"model.vocab_size ({given.vocab_size}) is below the tokenizer's {vocab_size}: set {rounded}")
    return given


def rows_per_step(recipe: PretrainRecipe, row_len: int) -> int:
    """Rows of one optimizer step. Raises UserError unless they make up tokens_per_step exactly."""
    tokens = recipe.batch.tokens_per_step
    if tokens % row_len:
        below, above = tokens // row_len * row_len, (tokens // row_len + 1) * row_len
        raise UserError(
            f"batch.tokens_per_step ({tokens}) is no multiple of the row length {row_len}: set "
            + (f"{below} or {above}" if below else str(above))
        )
    return tokens // row_len


def micro_rows(recipe: PretrainRecipe, rows: int, row_len: int) -> int:
    """Rows of one forward pass: as many as divide the rank's share and hold at most micro_tokens."""
    limit = max(1, (recipe.batch.micro_tokens or 8192) // row_len)
    pairs = ((n, rows // n) for n in range(1, math.isqrt(rows) + 1) if rows % n == 0)
    return max(n for pair in pairs for n in pair if n <= limit)


def cost(recipe: PretrainRecipe, config: GPTConfig) -> Cost:
    row_len = recipe.batch.max_len or config.max_seq_len
    rows = rows_per_step(recipe, row_len)
    return cost_of(
        config,
        seq_len=row_len,
        micro_tokens=micro_rows(recipe, rows, row_len) * row_len,
        precision=recipe.precision,
        optimizer=recipe.optim.name,
        loss_chunk=recipe.loss_chunk,
        activation_checkpointing=recipe.activation_checkpointing,
        ema=recipe.optim.ema_decay is not None,
        momentum=bool(recipe.optim.momentum),
    )


def describe(recipe: PretrainRecipe, config: GPTConfig, tokenizer: Tokenizer, data: Prepared, loader: RowLoader) -> str:
    """The derived numbers of a run, as they are printed at its start."""
    costs = cost(recipe, config)
    tokens = recipe.batch.tokens_per_step
    train, valid = (sum(s.n_tokens for s in shards) for shards in (data.train, data.valid))
    accumulation = loader.rows_per_step // (loader.micro_rows * loader.world)
    return "\n".join(
        [
            f"model      {config.family}, {costs.n_params / 1e6:.2f} M parameters ({costs.n_embedding_params / 1e6:.2f} M "
            f"embeddings), vocabulary {config.vocab_size} for a tokenizer of {tokenizer.vocab_size}",
            f"data       {train:,} tokens to train on, {valid:,} held out; {recipe.steps * tokens / train:.2f} epochs"
            + (
                f"; {loader.dropped_tokens:,} tokens an epoch lie beyond the row length"
                if loader.dropped_tokens
                else ""
            ),
            f"step       {tokens:,} tokens = {loader.world} rank(s) x {accumulation} micro-batch(es) x "
            f"{loader.micro_rows} rows x {loader.row_len}; {recipe.steps} steps",
            f"memory     {costs.state_bytes / 1e6:.0f} MB weights, gradients and optimizer + about "
            f"{costs.activation_bytes / 1e6:.0f} MB activations; checkpoint {costs.checkpoint_bytes / 1e6:.0f} MB",
        ]
    )


# --- commands --------------------------------------------------------------------------------------------------------


def run(recipe: PretrainRecipe) -> Outcome:
    """`llmkit train`."""
    task = PretrainTask(recipe)
    try:
        return train(recipe, task)
    finally:
        task.close()


def prepare(recipe: PretrainRecipe) -> bool | None:
    """`llmkit prepare`: True when all shards are there, None if a signal stopped it."""
    stop = Stop()
    with stop.listening():
        try:
            tokenizer = obtain_tokenizer(recipe.tokenizer, recipe.data, Path(recipe.out) / "tokenizer")
            data = prepare_shards(recipe.data, tokenizer, should_stop=lambda: bool(stop))
        except Interrupted:
            return None
    for split in ("train", "valid", "test"):
        for shards in getattr(data, split):
            print(
                f"{split:5s} {shards.name}: {shards.n_docs:,} documents, {shards.n_tokens:,} tokens, {shards.n_bytes:,} bytes"
            )
    return True


def plan(recipe: PretrainRecipe) -> str:
    """`llmkit plan`: what a run would cost, without reading its data."""
    vocab = 261 if recipe.tokenizer.kind == "byte" else recipe.tokenizer.vocab_size
    vocab = Tokenizer.from_config(recipe.tokenizer).vocab_size if recipe.tokenizer.path else vocab
    config = model_config(recipe, vocab)
    costs = cost(recipe, config)
    tokens = recipe.steps * recipe.batch.tokens_per_step
    return "\n".join(
        [
            f"parameters   {costs.n_params:,} ({costs.n_embedding_params:,} in embeddings), {config.family}",
            f"tokens       {tokens:,} in {recipe.steps:,} steps of {recipe.batch.tokens_per_step:,}",
            f"work         {costs.flops_per_token * tokens:.3g} FLOP ({costs.flops_per_token:.3g} a token)",
            f"memory       {costs.memory_bytes / 1e9:.3f} GB: {costs.state_bytes / 1e9:.3f} weights, gradients and optimizer, "
            f"about {costs.activation_bytes / 1e9:.3f} activations",
            f"checkpoint   {costs.checkpoint_bytes / 1e9:.3f} GB each, {recipe.save.keep + recipe.save.keep_best} kept",
        ]
    )
