"""The step shape of supervised stages, batch -> loss -> update, and the same sums over a held-out split."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.data.loader import Batch, RowLoader
from llmkit.losses import IGNORE, LossSum, linear_cross_entropy
from llmkit.model.gpt import GPT, document_mask
from llmkit.training.engine import Engine, LossFn, Metrics
from llmkit.training.loop import Context


def next_token_loss(z_loss: float, chunk: int) -> LossFn:
    """Cross entropy of the next token on a batch of packed or padded rows."""

    def loss(module: nn.Module, batch: Batch) -> LossSum:
        mask = None if batch.one_document else document_mask(batch.docs_BT)
        hidden_BTD = module(batch.ids_BT, batch.positions_BT, mask)
        assert isinstance(module, GPT)
        return linear_cross_entropy(hidden_BTD, module.head_weight, batch.labels_BT, z_loss, chunk)

    return loss


def supervised_step(engine: Engine, ctx: Context, loader: RowLoader, loss_fn: LossFn) -> Metrics:
    """One update on the rows of the engine's step; `data_hash` identifies their tokens, whatever the number of ranks."""
    step = engine.step
    metrics = engine.update(loader.step(step), loss_fn)
    metrics["epoch"] = loader.epoch(step + 1)
    metrics["data_hash"] = ctx.ranks.sum_hash(loader.tokens_hash(step))
    return metrics


def held_out(
    engine: Engine, ctx: Context, loader: RowLoader, loss_fn: LossFn, bytes_of_token: Tensor, max_tokens: int | None
) -> Metrics | None:
    """Mean loss over all supervised tokens of a split, perplexity and bits per byte. None if asked to stop.

    Args:
        engine: its module is evaluated.
        ctx: for the ranks and the stop flag, which is polled at every batch.
        loader: gives this rank's share of the rows.
        loss_fn: as in training; its first part is the loss in nats.
        bytes_of_token: length of each token's text in UTF-8 bytes, 0 for special tokens.
        max_tokens: only the first so many; null: all.
    """
    nats, n_tokens, n_bytes = 0.0, 0.0, 0.0
    with engine.evaluating() as module:
        for batch in loader.eval_batches(max_tokens):
            if ctx.all_should_stop():
                return None
            if batch.denominator:
                batch = batch.to(ctx.ranks.device)
                nats += loss_fn(module, batch).parts["loss"].item()
                n_tokens += batch.denominator
                labels = batch.labels_BT[batch.labels_BT != IGNORE]
                n_bytes += bytes_of_token.to(labels.device)[labels].sum().item()
    nats, n_tokens, n_bytes = ctx.ranks.sum_numbers(nats, n_tokens, n_bytes)
    loss = nats / n_tokens if n_tokens else math.nan
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if n_bytes:
        metrics["bits_per_byte"] = nats / math.log(2) / n_bytes
    return metrics


def byte_lengths(tokenizer: Any, vocab_size: int) -> Tensor:
    """Text bytes of every id, [vocab_size]; 0 for special tokens and for rows beyond the tokenizer's size."""
    lengths = [tokenizer.n_bytes([i]) for i in range(tokenizer.vocab_size)]
    return torch.tensor(lengths + [0] * (vocab_size - len(lengths)), dtype=torch.int64)
