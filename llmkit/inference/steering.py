"""What changes the scores before a token is chosen: bias, penalties for repeating, a least length.

Shapes: B rows, V the tokenizer's vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmkit.config import UserError
from llmkit.inference.config import BAN, SamplingConfig

if TYPE_CHECKING:
    from llmkit.tokenizer import Tokenizer


def token_of(name: str, tokenizer: Tokenizer) -> int:
    """The id that a key of `logit_bias` names: an id in digits, a control token, or the text of one token.

    Raises UserError where there is no such id, or the text is none or several tokens.
    """
    if name.isascii() and name.isdigit():
        if int(name) >= tokenizer.vocab_size:
            raise UserError(f"logit_bias: there is no token {name}: ids end at {tokenizer.vocab_size - 1}")
        return int(name)
    if name in tokenizer.special:
        return tokenizer.special[name]
    text = name
    if len(name) > 2 and name[0] == name[-1] == '"':
        try:
            text = json.loads(name)
        except ValueError as e:
            raise UserError(f"logit_bias: {name}: not a text in double quotes: {e}") from None
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        pieces = " + ".join(repr(tokenizer.decode([i])) for i in ids) or "nothing"
        other = tokenizer.encode(" " + text)
        hint = f": {' ' + text!r} is one" if len(other) == 1 else ""
        raise UserError(f"logit_bias: {text!r} is no single token but {pieces}{hint}")
    return ids[0]


def biases_of(logit_bias: dict[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    """Token id -> what is added to its score; -inf for a ban."""
    found: dict[int, float] = {}
    for name, bias in logit_bias.items():
        token = token_of(name, tokenizer)
        if token in found:
            raise UserError(f"logit_bias: {name!r} names token {token}, which another entry names too: keep one")
        found[token] = float("-inf") if bias <= BAN else bias
    return found


def penalise_repetition(scores_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Seen tokens' scores: s / penalty where positive, s * penalty where negative (CTRL, arXiv 1909.05858, section 4.1)."""
    penalised_BV = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return torch.where(seen_BV, penalised_BV, scores_BV)


class Steering:
    """Changes the scores of every row before its next token is chosen, by what the row holds so far.

    In this order: logit_bias; repetition_penalty (prompt and new text); presence and frequency penalty (new text);
    stop tokens banned before min_new_tokens. Each row has its own counts, so it is independent of its neighbours.
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ):
        """Raises UserError for a logit_bias that names no token, or that leaves no token over."""
        B, V = len(prompts), tokenizer.vocab_size
        self.sampling, self.vocab_size = sampling, V
        self.n_new = 0
        """New tokens of every row: rows of a batch go in step."""
        self.stop_ids = torch.tensor(sorted(tokenizer.stop_ids), device=device)
        biases = biases_of(sampling.logit_bias, tokenizer)
        self.bias_V: Tensor | None = None
        if biases:
            self.bias_V = torch.zeros(V, device=device)
            self.bias_V[torch.tensor(list(biases), device=device)] = torch.tensor(list(biases.values()), device=device)
            banned = {i for i, bias in biases.items() if bias == float("-inf")}
            if len(banned | (tokenizer.stop_ids if sampling.min_new_tokens else frozenset())) == V:
                raise UserError("logit_bias bans every token: leave at least one that is no stop token")
        self.seen_BV: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen_BV = torch.zeros(B, V, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.seen_BV[row, torch.tensor(list(prompt), device=device)] = True
        self.counts_BV: Tensor | None = None
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts_BV = torch.zeros(B, V, dtype=torch.int32, device=device)

    @classmethod
    def of(
        cls,
        sampling: SamplingConfig,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> Steering | None:
        """None where nothing of it is asked for, so that it costs nothing."""
        off = (
            not sampling.logit_bias
            and not sampling.min_new_tokens
            and sampling.repetition_penalty == 1.0
            and not sampling.presence_penalty
            and not sampling.frequency_penalty
        )
        return None if off else cls(sampling, tokenizer, prompts, device)

    def __call__(self, scores: Tensor) -> Tensor:
        """The scores from which the next token is chosen, [B, V] in fp32 or better.

        Args:
            scores: [B, V or more], logits or log-probabilities; not changed.
        """
        scores_BV = scores[:, : self.vocab_size].to(torch.promote_types(scores.dtype, torch.float32))
        if self.bias_V is not None:
            scores_BV = scores_BV + self.bias_V
        if self.seen_BV is not None:
            scores_BV = penalise_repetition(scores_BV, self.seen_BV, self.sampling.repetition_penalty)
        if self.counts_BV is not None:
            taken_off_BV = self.sampling.presence_penalty * (self.counts_BV > 0)
            scores_BV = scores_BV - taken_off_BV - self.sampling.frequency_penalty * self.counts_BV
        if self.n_new < self.sampling.min_new_tokens:
            scores_BV = scores_BV.index_fill(1, self.stop_ids, float("-inf"))
        return scores_BV

    def update(self, ids_B: Tensor) -> None:
        """Counts the token that each row was given."""
        self.n_new += 1
        ids_B1 = ids_B[:, None]
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, ids_B1, True)
        if self.counts_BV is not None:
            self.counts_BV.scatter_add_(1, ids_B1, torch.ones_like(ids_B1, dtype=torch.int32))

    def select(self, rows: Tensor) -> None:
        """Keeps only the given rows, in this order; a row may be named several times."""
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV[rows]
        if self.counts_BV is not None:
            self.counts_BV = self.counts_BV[rows]
