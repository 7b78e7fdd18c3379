"""What a recipe's data are, in numbers: how much is learnt, how much is padding, what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmkit.data.chats import Chats
from llmkit.data.examples import ExampleBatch
from llmkit.data.feedback import FeedbackBatch
from llmkit.data.loader import RowLoader, TextRows
from llmkit.data.preferences import PreferenceBatch
from llmkit.data.sequences import Sequences
from llmkit.data.steps import StepBatch
from llmkit.losses import IGNORE

_TOKENS = 200_000  # that are looked at, about


@dataclass(frozen=True)
class Shares:
    """Of the first steps of a run."""

    n_steps: int
    n_rows: int
    n_cells: int
    """Places for a token, padding included."""
    n_tokens: int
    n_learnt: int


def _cells(batch: Any) -> int:
    """Places of the tensor that goes through the network."""
    if isinstance(batch, FeedbackBatch):
        return batch.matched.ids_BT.numel()
    if isinstance(batch, PreferenceBatch) and batch.shared is not None:
        return batch.shared.ids_RT.numel()
    ids: Tensor = batch.ids_BT
    return ids.numel()


def _learnt(batch: Any) -> int:
    """Tokens, or ends of texts and steps, that the loss asks for."""
    if isinstance(batch, PreferenceBatch):
        return int((batch.lengths_B - batch.prompt_lengths_B).sum())
    if isinstance(batch, FeedbackBatch):
        return int((batch.matched.lengths_B - batch.matched.prompt_lengths_B).sum())
    if isinstance(batch, ExampleBatch | StepBatch):
        return int(batch.denominator)
    return int((batch.labels_BT != IGNORE).sum())


def _real(batch: Any) -> int:
    """Places that hold a token: a prompt that several answers share counts once."""
    if isinstance(batch, PreferenceBatch) and batch.shared is not None:
        return int((batch.shared.groups_RT >= 0).sum())
    return int(batch.n_tokens)


def shares(loader: RowLoader, steps: int) -> Shares:
    """Counts over the first steps of a run, or as many of them as are quickly made."""
    n_cells = n_tokens = n_learnt = done = 0
    for k in range(steps):
        for batch in loader.step(k):
            n_cells, n_tokens, n_learnt = (
                n + more
                for n, more in zip(
                    (n_cells, n_tokens, n_learnt), (_cells(batch), _real(batch), _learnt(batch)), strict=True
                )
            )
        done += 1
        if n_cells >= _TOKENS:
            break
    return Shares(done, done * loader.rows_per_step, n_cells, n_tokens, n_learnt)


def described(found: Shares, loader: RowLoader, steps: int) -> Iterator[str]:
    """The shares, a line each."""
    yield (
        f"step       {loader.rows_per_step:,} rows; an epoch has {sum(loader.n_rows):,}, the run {loader.epoch(steps):.2f} "
        "epochs"
    )
    padding, tokens = found.n_cells - found.n_tokens, max(1, found.n_tokens)
    yield (
        f"shares     of {found.n_tokens:,} tokens in {found.n_steps} step(s) {found.n_learnt:,} are learnt "
        f"({found.n_learnt / tokens:.1%}); {padding / max(1, found.n_cells):.1%} of {found.n_cells:,} places are padding"
    )


def left_out(sources: Sequence[Any]) -> Iterator[str]:
    """What of each source is not learnt, a line each."""
    for source in sources:
        told: list[str] = []
        if isinstance(source, Chats):
            told.append(f"{len(source):,} rows, {int(source.trained.sum()) / max(1, len(source.tokens)):.1%} learnt")
            counts = {"left out": source.n_dropped, "cut": source.n_cut, "split into turns": source.n_split}
            told += [f"{n:,} {what}" for what, n in counts.items() if n]
        elif isinstance(source, Sequences):
            told.append(f"{source.n_sequences:,} answers")
            told += [f"{source.n_cut:,} prompts cut"] if source.n_cut else []
            told += [f"{source.n_dropped:,} left out"] if source.n_dropped else []
        elif hasattr(source, "n_docs"):
            told.append(f"{source.n_docs:,} documents, {source.n_tokens:,} tokens")
        else:
            told.append(f"{len(source):,} texts")
            told += [f"{source.n_cut:,} cut"] if source.n_cut else []
        yield f"source     {source.name}: {'; '.join(told)}"


def dropped_tokens(loader: RowLoader) -> Iterator[str]:
    """Of plain text, what no row holds."""
    if isinstance(loader.rows, TextRows) and (n := loader.rows.dropped_tokens):
        yield f"           {n:,} tokens of an epoch lie beyond the row length"
