"""What a rollout is: answers with all that is known of their tokens, and the micro-batches that updates are made of.

Prompt and answer stand together, padded on the right, so causal attention needs no mask and position t is column t.
Position t stands for the choice of token t + 1: an action, if the policy sampled it. Prompts, what a tool said, and
padding are no actions. Masks come from lengths, never from the ids of padding.

Shapes: N answers, B of them in a micro-batch, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from llmkit.data.shared import SharedRows
from llmkit.losses import IGNORE
from llmkit.model.gpt import GPT

_PART = "part."


@dataclass(frozen=True)
class Rollouts:
    """All answers of one rollout, the same on every rank, on the CPU."""

    ids_NT: Tensor
    """int64."""
    actions_NT: Tensor
    """bool: the policy sampled token t + 1, and is to learn from it."""
    lengths_N: Tensor
    """int64: tokens of prompt and answer."""
    prompt_lengths_N: Tensor
    """int64."""
    group_N: Tensor
    """int64: which of the run's prompts was answered, counted as they are drawn; the samples of a prompt share it."""
    prompt_N: Tensor
    """int64: which row of the prompts that is."""
    finished_N: Tensor
    """bool: the answer ended at a stop token; else it was cut off."""
    sampler_NT: Tensor
    """Log-probability of every action, as it was sampled."""
    scores_N: Tensor
    """The weighted sum of the rewards; NaN where a grader failed."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """[N] each: the rewards by name, before their weights."""
    old_NT: Tensor | None = None
    """Log-probability of every action under the policy as it was, computed as in training."""
    ref_NT: Tensor | None = None
    """The same under the reference."""
    values_NT: Tensor | None = None
    """The critic's, of the state before each action."""
    advantages_NT: Tensor | None = None
    returns_NT: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids_NT)

    @property
    def n_actions(self) -> int:
        return int(self.actions_NT.sum())

    @property
    def labels_NT(self) -> Tensor:
        """The next token where it is an action, IGNORE elsewhere."""
        following_NT = torch.cat([self.ids_NT[:, 1:], self.ids_NT[:, :1]], 1)
        return following_NT.where(self.actions_NT, IGNORE)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, as it is kept in a checkpoint."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parts"}
        kept = {name: t for name, t in named.items() if t is not None}
        return kept | {f"{_PART}{name}": t for name, t in self.parts.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Rollouts:
        """What `tensors` gave."""
        parts = {name.removeprefix(_PART): t for name, t in tensors.items() if name.startswith(_PART)}
        return cls(**{name: t for name, t in tensors.items() if not name.startswith(_PART)}, parts=parts)

    def knowing(self, found: Mapping[str, Tensor]) -> Rollouts:
        """The same answers with more known of them, by the fields' names."""
        return Rollouts.of({**self.tensors(), **found})

    def rows(self, rows_K: Tensor) -> Rollouts:
        """Some of the answers, in this order; columns that all of them leave empty are cut off."""
        width = max(1, int(self.lengths_N[rows_K].max())) if len(rows_K) else 1
        picked = {
            name: t[rows_K][:, :width] if name.endswith("_NT") else t[rows_K] for name, t in self.tensors().items()
        }
        return Rollouts.of({name: t.contiguous() for name, t in picked.items()})

    def joined(self, others: Sequence[Rollouts]) -> Rollouts:
        """These answers and those of the others, as one rollout."""
        everything = [self, *others]
        width = max(r.ids_NT.shape[1] for r in everything)

        def wide(name: str, t: Tensor) -> Tensor:
            return torch.nn.functional.pad(t, (0, width - t.shape[1])) if name.endswith("_NT") else t

        named = [r.tensors() for r in everything]
        return Rollouts.of({name: torch.cat([wide(name, t[name]) for t in named]) for name in named[0]})

    def without_ungraded(self) -> Rollouts:
        """The answers that have no reward keep their place, but nothing in them is an action any more."""
        return replace(self, actions_NT=self.actions_NT & self.scores_N.isfinite()[:, None])


@dataclass(frozen=True)
class AnswerBatch:
    """B answers that go through a network together; fields as in `Rollouts`."""

    ids_BT: Tensor
    labels_BT: Tensor
    prompt_lengths_B: Tensor
    shared: SharedRows | None
    """The same answers in rows that hold each prompt once. None: they go through the network as they stand."""

    def to(self, device: torch.device | str) -> Self:
        """The batch on a device."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor | SharedRows)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class PolicyBatch(AnswerBatch):
    """Micro-batch of an update. weights_BT are those of the aggregation (`token_weights`)."""

    actions_BT: Tensor
    weights_BT: Tensor
    lengths_B: Tensor
    sampler_BT: Tensor
    advantages_BT: Tensor
    old_BT: Tensor | None
    """None: the policy has not moved since it sampled, so that its own log-probabilities are the old ones."""
    ref_BT: Tensor | None
    values_BT: Tensor | None
    returns_BT: Tensor | None
    denominator: float
    n_tokens: float


def by_length(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Cuts texts into batches of at most so many tokens, padding included, the longest first; a text alone may be longer."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > most_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def hidden_states(model: GPT, batch: AnswerBatch) -> Tensor:
    """A model's states after its final norm at every position of some answers, [B, T, D].

    Where prompts are shared they are 0 at positions that no token of an answer follows.
    """
    shared = batch.shared
    if shared is None:
        return model(batch.ids_BT)
    hidden_RTD = model(shared.ids_RT, shared.positions_RT, shared.mask())
    column_N = batch.prompt_lengths_B[shared.sequence_N] - 1 + shared.offset_N
    hidden_BTD = hidden_RTD.new_zeros(*batch.ids_BT.shape, hidden_RTD.shape[-1])
    return hidden_BTD.index_put((shared.sequence_N, column_N), hidden_RTD.flatten(0, 1)[shared.from_N])
