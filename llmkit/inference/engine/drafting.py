"""A small model that proposes the next tokens, which the model then checks in a single pass.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmkit.config import UserError
from llmkit.inference.batch import cache_dtype, check_model
from llmkit.inference.engine.choosing import Proposal, by_settings, distribution
from llmkit.inference.engine.paged import BlockTable, Chunks, PagedStore
from llmkit.inference.engine.scheduler import Row
from llmkit.inference.packed import WORTH_TOKENS, network_of
from llmkit.inference.sampling import draw
from llmkit.model.gpt import GPT


class Draft:
    """The draft model and its keys and values, which lie in the same blocks as the model's."""

    def __init__(self, model: GPT, big: GPT, table: BlockTable, n_blocks: int, vocab_size: int):
        """Raises UserError for a draft that has fewer tokens or a shorter context than the model."""
        check_model(model, vocab_size)
        if model.config.max_seq_len < big.config.max_seq_len:
            raise UserError(
                f"the draft's context max_seq_len is {model.config.max_seq_len}, the model's {big.config.max_seq_len}: "
                "take a draft that reads at least as much"
            )
        self.model, self.vocab_size, self._table = model, vocab_size, table
        self.repack()
        self.device = model.head_weight.device
        if self.device != big.head_weight.device:
            raise UserError(f"the draft is on {self.device}, the model on {big.head_weight.device}: load both on one")
        self._store = PagedStore(model.config, n_blocks, table.block_tokens, cache_dtype(model), self.device)

    def repack(self) -> None:
        """Takes note of other weights."""
        self.network = network_of(self.model, WORTH_TOKENS, self._table.n_lines)

    def read(self, chunks: Chunks) -> None:
        """Reads the part of the prompts that the model reads."""
        chunks.forward(self.network, self._store)

    def propose(self, rows: Sequence[Row], counts: Sequence[int]) -> list[list[Proposal]]:
        """The next tokens of each row, `counts` of them, drawn by its own settings from what the draft thinks of them.

        Bias and penalties are not applied here: they change what is accepted, not what comes out.
        """
        found: list[list[Proposal]] = [[] for _ in rows]
        going = [i for i, n in enumerate(counts) if n]
        while going:
            tokens = [[found[i][-1].token] if found[i] else rows[i].tokens[rows[i].n_draft_computed :] for i in going]
            before = [len(rows[i].tokens) + len(found[i]) - 1 if found[i] else rows[i].n_draft_computed for i in going]
            chunks = Chunks(self._table, [rows[i].line for i in going], tokens, before, self.device)
            hidden_BTD = chunks.forward(self.network, self._store)
            # Scores that are not finite would make a distribution of NaN; any other is fine, only not often accepted.
            logits_BV = torch.nan_to_num(self.network.logits(hidden_BTD[:, -1]))
            among = [rows[i] for i in going]
            for group in by_settings(among):
                alike = [among[g] for g in group]
                for g, proposal in zip(group, self._draw(alike, logits_BV[group]), strict=True):
                    found[going[g]].append(proposal)
            going = [i for i in going if len(found[i]) < counts[i]]
        return found

    def _draw(self, rows: Sequence[Row], logits_GV: torch.Tensor) -> list[Proposal]:
        sampling = rows[0].request.sampling
        if sampling.temperature == 0.0:
            return [Proposal(token, None) for token in logits_GV[:, : self.vocab_size].argmax(-1).tolist()]
        probs_GV = distribution(logits_GV, sampling, self.vocab_size)
        uniforms_G = torch.tensor([r.random.random() for r in rows], dtype=torch.float64).to(self.device)
        tokens = draw(probs_GV, uniforms_G).tolist()
        return [Proposal(token, probs_V) for token, probs_V in zip(tokens, probs_GV, strict=True)]
