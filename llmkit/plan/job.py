"""What a recipe asks of a machine, stage by stage in the same words: networks, and tokens that go through them. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from llmkit.model.config import GPTConfig
from llmkit.plan.cost import BYTES, Cost


@dataclass(frozen=True)
class Net:
    """A network that a run holds."""

    role: str
    """What people call it: "model", "critic", "reference", "teacher"."""
    model: GPTConfig
    precision: str
    cost: Cost
    """Of training it; of a frozen one only the weights count."""
    trained: bool = True

    @property
    def state_bytes(self) -> int:
        """Weights, and of a trained one masters, moments, average and gradient."""
        return self.cost.state_bytes if self.trained else self.cost.weight_bytes


@dataclass(frozen=True)
class Pass:
    """Tokens that go through a network in one optimizer step, on average over the steps, on all ranks together."""

    net: Net
    kind: Literal["train", "ask", "write"]
    """Forward and backward; forward alone; one new token at a time, with a cache."""
    tokens: float
    """write: new ones."""
    seq_len: int
    """Of a row; write: prompt and answer."""
    side_by_side: int = 1
    """write: answers that one rank writes at once."""
    new_tokens: int = 1
    """write: of an answer."""
    with_head: bool = True
    """Whether every token is also compared with the vocabulary."""


@dataclass(frozen=True)
class Job:
    """One recipe."""

    stage: str
    steps: int
    nets: tuple[Net, ...]
    passes: tuple[Pass, ...]
    rows: int
    """Rows, or answers, of one optimizer step: more ranks than these can't have different data."""
    row_len: int
    micro_rows: Callable[[int], int] = field(repr=False)
    """Rows of one forward pass on a rank, given how many ranks have different data."""
    precision: str
    optimizer: str
    loss_chunk: int
    recompute: bool
    compiled: bool
    packed: bool
    """Whether frozen matrices are kept in 4 bits."""
    kept_checkpoints: int
    save_every: int | None
    notes: tuple[str, ...] = ()
    """What the figures assume of the data."""

    @property
    def trained(self) -> tuple[Net, ...]:
        return tuple(net for net in self.nets if net.trained)

    @property
    def checkpoint_bytes(self) -> int:
        return sum(net.cost.checkpoint_bytes for net in self.trained)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that the first network is trained on."""
        return sum(p.tokens for p in self.passes if p.kind == "train" and p.net == self.nets[0])

    @property
    def flops_per_step(self) -> float:
        """Useful work: of recomputation none is. An asked token costs a third of a trained one, and so does a written one."""
        return sum(p.tokens * p.net.cost.flops_per_token * (1.0 if p.kind == "train" else 1 / 3) for p in self.passes)

    def cache_bytes(self, written: Pass) -> int:
        """Keys and values of the answers that one rank writes at once."""
        model = written.net.model
        per_token = 2 * model.n_layers * model.kv_heads * model.width_of_head * BYTES[written.net.precision]
        return per_token * written.seq_len * written.side_by_side
