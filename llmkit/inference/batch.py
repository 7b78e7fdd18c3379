"""Prompts of several lengths as one batch: what they must fulfil, and the token grid that keeps them in step.

Shapes: B rows, T tokens of this call, S columns of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmkit.config import MachineError, UserError
from llmkit.model.gpt import GPT


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every submodule is in the mode in which it was found, also after an exception."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def check_prompt(prompt: Sequence[int], index: int, model: GPT, vocab_size: int) -> None:
    """Raises UserError for a prompt that is empty, fills the context, or holds ids outside the vocabulary."""
    n, longest = len(prompt), model.config.max_seq_len
    if n == 0:
        raise UserError(f"prompt {index} has no tokens: begin it with the tokenizer's bos token")
    if n >= longest:
        raise UserError(
            f"prompt {index} has {n} tokens, the model's context max_seq_len {longest}: shorten it to at most "
            f"{longest - 1}"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise UserError(
            f"prompt {index} holds ids from {min(prompt)} to {max(prompt)}, the vocabulary 0 to {vocab_size - 1}"
        )


def check_model(model: GPT, vocab_size: int) -> None:
    """Raises UserError for a model that can't continue text, or one that another tokenizer belongs to."""
    if not model.config.causal:
        raise UserError(
            "this model sees text from both sides (causal: false), so it can't continue any: `llmkit embed` uses it"
        )
    check_vocabulary(model, vocab_size)


def check_vocabulary(model: GPT, vocab_size: int) -> None:
    """Raises UserError if the model's embedding has fewer rows than the tokenizer has tokens."""
    n_rows = model.head_weight.shape[0]
    if vocab_size > n_rows:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens, the model's embedding {n_rows}: they do not belong together"
        )


def not_finite(n_new: int, index: int) -> MachineError:
    """What to raise when a model's scores hold NaN or infinity."""
    return MachineError(
        f"the model's scores are not finite at new token {n_new} of prompt {index}: its weights or activations overflow; "
        "`llmkit verify` checks a checkpoint's weights"
    )


def cache_dtype(model: GPT) -> torch.dtype:
    """Of the keys and values that the model will compute here."""
    weight = model.head_weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


class LeftPadded:
    """The token grid of a ragged batch: prompts end in the same column, so that all rows go on in step.

    Every token keeps the position it has when alone, and sees only columns from its row's start on, so a row's logits
    are those of a batch of one.
    """

    def __init__(self, prompts: list[list[int]], n_columns: int, device: torch.device):
        self.width = max(map(len, prompts))
        self.starts_B = torch.tensor([self.width - len(p) for p in prompts], device=device)
        self.columns_S = torch.arange(n_columns, device=device)
        self.ids_BT = torch.tensor([[0] * (self.width - len(p)) + p for p in prompts], device=device)
        self.positions_BT = (self.columns_S[: self.width] - self.starts_B[:, None]).clamp(min=0)
        self._see()

    def _see(self) -> None:
        """Which columns each row may see [B, 1, 1, S]; None if it is all of them, which attention computes faster."""
        ragged = bool(self.starts_B.any())
        self.seen_B11S = (self.columns_S >= self.starts_B[:, None])[:, None, None] if ragged else None

    def prompt_mask(self) -> Tensor | None:
        """[B, 1, T, T]. Padding sees itself: a softmax over nothing would be NaN and spread through the cache."""
        if self.seen_B11S is None:
            return None
        columns_T = self.columns_S[: self.width]
        causal_TT = columns_T <= columns_T[:, None]
        return (self.seen_B11S[..., : self.width] & causal_TT) | (columns_T == columns_T[:, None])

    def step_mask(self, n_columns: int) -> Tensor | None:
        """[B, 1, 1, S] for one token per row, which becomes the last of `n_columns`."""
        return None if self.seen_B11S is None else self.seen_B11S[..., :n_columns]

    def select(self, rows: Tensor) -> None:
        """Keeps only the given rows."""
        self.starts_B, self.positions_BT = self.starts_B[rows], self.positions_BT[rows]
        self._see()
