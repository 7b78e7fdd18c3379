"""The step shape of supervised stages, batch -> loss -> update, and the same sums over a held-out split."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.data.loader import Batch, RowLoader
from llmkit.data.turns import prompt_ids
from llmkit.inference.generate import generate
from llmkit.losses import IGNORE, LossSum, linear_cross_entropy
from llmkit.model.gpt import GPT, document_mask
from llmkit.tokenizer import Tokenizer
from llmkit.training.config import SampleConfig
from llmkit.training.engine import Engine, LossFn, Metrics
from llmkit.training.loop import Context

LOAD = "expert_load"  # engine.stats: how many tokens each expert of each layer got in the last step


def token_loss(z_loss: float, chunk: int, accuracy: bool = False) -> LossFn:
    """Cross entropy of a batch's labels on packed or padded rows: the next tokens, or hidden ones.

    With experts, the balance of their load is added (see `model.moe`); its share of the sum is the part `balance`.
    """

    def loss(module: nn.Module, batch: Batch) -> LossSum:
        assert isinstance(module, GPT)
        causal = module.config.causal
        needs_mask = not (batch.one_document if causal else batch.full)
        mask = document_mask(batch.docs_BT, causal) if needs_mask and batch.part is None else None
        hidden_BTD = module(batch.ids_BT, batch.positions_BT, batch.part or mask)
        out = linear_cross_entropy(hidden_BTD, module.head_weight, batch.labels_BT, z_loss, chunk, accuracy)
        return with_balance(out, module, batch.labels_BT)

    return loss


def with_balance(out: LossSum, model: GPT, labels_BT: Tensor) -> LossSum:
    """The same loss with the balance of the experts' load in the last forward pass, where there are experts in training."""
    experts = model.config.experts
    if experts is None or not model.training:
        return out
    assert model.routing is not None
    balance, load_LE = model.routing.loss(labels_BT != IGNORE)
    total, parts = out.total, out.parts
    if experts.balance:
        total, parts = total + experts.balance * balance.to(total.dtype), {**parts, "balance": balance.detach()}
    return LossSum(total, parts, {LOAD: load_LE})


def supervised_step(engine: Engine, ctx: Context, loader: RowLoader, loss_fn: LossFn) -> Metrics:
    """One update on the rows of the engine's step; `data_hash` identifies their tokens, whatever the number of ranks."""
    step = engine.data_step
    batches = loader.step(step)
    metrics = engine.update(batches, loss_fn)
    (metrics["tokens"],) = ctx.ranks.sum_numbers(sum(b.n_tokens for b in batches))
    metrics["epoch"] = loader.epoch(step + 1)
    metrics["data_hash"] = ctx.ranks.sum_hash(loader.tokens_hash(step))
    if LOAD in engine.stats:
        load_LE = engine.stats[LOAD].double()
        # 1 is an even load; n / n_active, the most: every token at the same experts.
        metrics["expert_load_max"] = (load_LE.amax(-1) / load_LE.mean(-1)).mean().item()
    return metrics


@dataclass(frozen=True)
class HeldOut:
    """Sums over a split, of all ranks."""

    parts: dict[str, float]
    """Of the loss function's parts."""
    stats: dict[str, Tensor]
    """Of its statistics."""
    n: float
    """What the loss is divided by: how many labels there are."""
    n_bytes: float
    """Bytes of text that the labels stand for."""

    def mean(self, part: str) -> float:
        """A part per label; NaN where there are no labels."""
        return self.parts[part] / self.n if self.n else math.nan


def held_out(
    engine: Engine,
    ctx: Context,
    loader: RowLoader,
    loss_fn: LossFn,
    max_tokens: int | None,
    bytes_of: Callable[[Any], float] = lambda batch: 0.0,
) -> HeldOut | None:
    """Sums of a loss over a split. None if asked to stop.

    Args:
        engine: its module is evaluated.
        ctx: for the ranks and the stop flag, which is polled at every batch.
        loader: gives this rank's share of the rows.
        loss_fn: as in training.
        max_tokens: only the first so many; null: all.
        bytes_of: how many bytes of text a batch's labels are.
    """
    parts: dict[str, float] = {}
    stats: dict[str, Tensor] = {}
    n, n_bytes = 0.0, 0.0
    with engine.evaluating() as module:
        for batch in loader.eval_batches(max_tokens):
            if ctx.all_should_stop():
                return None
            batch = batch.to(ctx.ranks.device)
            out = loss_fn(module, batch)  # also of a batch of padding, so that all ranks know the same parts
            for name, value in out.parts.items():
                parts[name] = parts.get(name, 0.0) + value.item()
            for name, tensor in out.stats.items():
                stats[name] = stats[name] + tensor if name in stats else tensor.clone()
            n += batch.denominator
            n_bytes += bytes_of(batch)
    n, n_bytes, *sums = ctx.ranks.sum_numbers(n, n_bytes, *parts.values())
    for tensor in stats.values():
        ctx.ranks.sum_(tensor)
    return HeldOut(dict(zip(parts, sums, strict=True)), stats, n, n_bytes)


def label_bytes(lengths_V: Tensor) -> Callable[[Batch], float]:
    """Counts the bytes of text of a batch's labels; `lengths_V` is from `byte_lengths`."""

    def count(batch: Batch) -> float:
        labels = batch.labels_BT[batch.labels_BT != IGNORE]
        return lengths_V.to(labels.device)[labels].sum().item()

    return count


def byte_lengths(tokenizer: Any, vocab_size: int) -> Tensor:
    """Text bytes of every id, [vocab_size]; 0 for special tokens and for rows beyond the tokenizer's size."""
    lengths = [tokenizer.n_bytes([i]) for i in range(tokenizer.vocab_size)]
    return torch.tensor(lengths + [0] * (vocab_size - len(lengths)), dtype=torch.int64)


def write_samples(
    engine: Engine, ctx: Context, samples: SampleConfig, tokenizer: Tokenizer, chat: bool, system: str | None = None
) -> bool | None:
    """Writes each prompt with what the model says to it, `samples.n` times, to the log and samples.jsonl.

    Args:
        chat: the prompts are a user's turns; else texts that go on.
        system: a system message before them.

    Returns:
        None if asked to stop, on all ranks: the samples may be cut short then, and an evaluation counts, and is written,
        as a whole or not at all.
    """
    texts: list[tuple[str, str]] = []
    if samples.prompts and (ctx.ranks.is_main or engine.split is not None):
        before = [{"role": "system", "content": system}] if system is not None else []
        prompts = [
            prompt_ids(tokenizer, [*before, {"role": "user", "content": p}] if chat else p, chat)
            for p in samples.prompts
        ]
        with engine.replica() as module:
            model = module if isinstance(module, GPT) else module.get_submodule("student")
            assert isinstance(model, GPT)
            asked = prompts if ctx.ranks.is_main else []
            results = generate(model, asked, samples, tokenizer=tokenizer, should_stop=ctx.should_stop) if asked else []
        named = [prompt for prompt in samples.prompts for _ in range(samples.n)]
        texts = [(prompt, result.text) for prompt, result in zip(named, results, strict=False)]
    if ctx.all_should_stop():
        return None
    for prompt, text in texts:
        ctx.log.samples({"step": engine.step, "prompt": prompt, "text": text})
        ctx.log.say(f"    {prompt}{' | ' if chat else '|'}{text}")
    return True
