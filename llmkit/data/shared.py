"""Groups of answers in rows that hold each prompt once: its answers follow, and none of them sees another.

Half of what a pair of answers costs is often the prompt that both begin with. Here it is computed once, whatever the
number of answers, and several groups share a row, so that hardly anything is padding.

Legend: R rows, T ids of each, N answer tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.data.packing import bucketed

_WIDTH = 256  # rows are as wide as the longest group, but not much narrower than this: fewer, fuller rows


@dataclass(frozen=True)
class SharedRows:
    """The sequences of a batch, in rows."""

    ids_RT: Tensor
    positions_RT: Tensor
    """int64: every answer goes on from its prompt's last position."""
    groups_RT: Tensor
    """int32: the group's number within its row, from 0; -1: padding."""
    answers_RT: Tensor
    """int32: 0 in a prompt, 1, 2, ... in the answers to it."""
    from_N: Tensor
    """int64: where in the rows, end to end, each answer token is predicted: a prompt's last position for all firsts."""
    labels_N: Tensor
    """int64: the answer tokens, in the order of the sequences."""
    sequence_N: Tensor
    """int64: which sequence of the batch each is of ..."""
    offset_N: Tensor
    """... and the how-many-th of it."""
    ends_B: Tensor
    """int64: where in the rows, end to end, each sequence's last token is."""
    longest: int
    """Most answer tokens of a sequence."""

    def to(self, device: torch.device | str) -> SharedRows:
        """The rows on a device."""
        fields: dict[str, Any] = dict(vars(self))
        tensors = {k: v.to(device, non_blocking=True) for k, v in fields.items() if isinstance(v, Tensor)}
        return SharedRows(**{**fields, **tensors})

    def mask(self) -> Tensor:
        """Which positions may see which, [R, 1, T, T]: what comes before them of their own prompt and their own answer."""
        T = self.ids_RT.shape[1]
        group, answer = self.groups_RT, self.answers_RT
        same_RTT = group[:, :, None] == group[:, None, :]
        same_RTT &= (answer[:, None, :] == 0) | (answer[:, :, None] == answer[:, None, :])
        return (same_RTT & torch.ones(T, T, dtype=torch.bool, device=group.device).tril())[:, None]


def share_prompts(
    texts: Sequence[NDArray[Any]], prompt_lengths: Sequence[int], group_sizes: Sequence[int], pad_id: int
) -> SharedRows:
    """Lays sequences out.

    Args:
        texts: all sequences, a group after the other.
        prompt_lengths: of each sequence; equal within a group, as are the prompts themselves.
        group_sizes: how many sequences each group has.
        pad_id: fills the rows up.
    """
    firsts = np.cumsum([0, *group_sizes[:-1]]) if len(group_sizes) else np.empty(0, np.int64)
    totals = [
        prompt_lengths[first] + sum(len(texts[i]) - prompt_lengths[i] for i in range(first, first + size))
        for first, size in zip(firsts.tolist(), group_sizes, strict=True)
    ]
    width = bucketed(max([_WIDTH if sum(totals) > _WIDTH else sum(totals), *totals]), 1 << 30)
    starts, n_rows = _first_fit(totals, width)
    ids = np.full((n_rows, width), pad_id, np.int64)
    positions = np.zeros((n_rows, width), np.int64)
    groups = np.full((n_rows, width), -1, np.int32)
    answers = np.zeros((n_rows, width), np.int32)
    ends: list[int] = []
    sources: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for g, (first, size) in enumerate(zip(firsts.tolist(), group_sizes, strict=True)):
        row, at = starts[g]
        n_prompt = prompt_lengths[first]
        ids[row, at : at + n_prompt] = texts[first][:n_prompt]
        positions[row, at : at + n_prompt] = np.arange(n_prompt)
        groups[row, at : at + totals[g]] = g
        last, at = row * width + at + n_prompt - 1, at + n_prompt
        for k in range(size):
            answer = texts[first + k][n_prompt:]
            end = at + len(answer)
            ids[row, at:end], answers[row, at:end] = answer, k + 1
            positions[row, at:end] = np.arange(n_prompt, n_prompt + len(answer))
            sources.append(np.array([last, *range(row * width + at, row * width + end - 1)][: len(answer)], np.int64))
            ends.append(row * width + end - 1 if len(answer) else last)
            at = end
    counts = np.array([len(s) for s in sources[1:]], np.int64)
    labels = [np.empty(0, np.int64), *(t[n:] for t, n in zip(texts, prompt_lengths, strict=True))]
    offsets = np.concatenate([np.empty(0, np.int64), *map(np.arange, counts)]).astype(np.int64)
    return SharedRows(
        ids_RT=torch.from_numpy(ids),
        positions_RT=torch.from_numpy(positions),
        groups_RT=torch.from_numpy(groups),
        answers_RT=torch.from_numpy(answers),
        from_N=torch.from_numpy(np.concatenate(sources)),
        labels_N=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        sequence_N=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        offset_N=torch.from_numpy(offsets),
        ends_B=torch.tensor(ends, dtype=torch.int64),
        longest=int(counts.max(initial=1)),
    )


def _first_fit(sizes: Sequence[int], width: int) -> tuple[list[tuple[int, int]], int]:
    """Row and column where each piece begins, the longest placed first, and the number of rows (at least one)."""
    places = [(0, 0)] * len(sizes)
    filled: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        row = next((r for r, n in enumerate(filled) if n + sizes[i] <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        places[i] = (row, filled[row])
        filled[row] += sizes[i]
    return places, max(1, len(filled))


def cut_by_sum(sizes: NDArray[np.int64], limit: int) -> list[NDArray[np.int64]]:
    """Cuts groups into micro-batches, the longest first, of at most `limit` ids each unless a group alone has more."""
    parts: list[list[int]] = []
    n = 0
    for i in np.argsort(-sizes, kind="stable").tolist():
        if not parts or n + int(sizes[i]) > limit:
            parts.append([])
            n = 0
        parts[-1].append(i)
        n += int(sizes[i])
    return [np.array(p, np.int64) for p in parts]
