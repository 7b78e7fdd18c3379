"""Prompts with an answer each, as ids: what the data of preferences and of single judgements share.

A prompt's ids end where the answer begins, and a sequence ends with the token that ends the turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.config import UserError
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.encoded import Arrays
from llmkit.data.packing import bucketed
from llmkit.data.sources import Piece, where
from llmkit.data.turns import encode_turn
from llmkit.data.workers import is_held_out
from llmkit.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sequences:
    """Prompts with an answer each: sequence i has the ids tokens[starts[i] : starts[i + 1]]."""

    name: str
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    """How many ids of each sequence are the prompt's; at least 1."""
    n_cut: int
    """How many prompts lost their beginning, for the answer to fit."""
    n_dropped: int
    """How many rows or pairs of the source were left out, because an answer does not fit a row as a whole."""

    @property
    def n_sequences(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    def ids(self, i: int) -> NDArray[np.int32]:
        return self.tokens[self.starts[i] : self.starts[i + 1]]

    @property
    def hash(self) -> str:
        """Names ids and judgements (hex SHA-256)."""
        digest = hashlib.sha256()
        for name, value in sorted(vars(self).items()):
            if isinstance(value, np.ndarray):
                digest.update(f"{name} {value.dtype} {value.shape}".encode())
                digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()


S = TypeVar("S", bound=Sequences)

# --- batches ---------------------------------------------------------------------------------------------------------


def moved(batch: Any, device: torch.device | str) -> dict[str, Any]:
    """The fields of a batch with their tensors on a device."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.float64 and torch.device(device).type == "mps":
            value = value.float()  # MPS has no fp64
        return value.to(device, non_blocking=True)

    return {name: move(value) for name, value in vars(batch).items()}


def numbers_of(parts: list[NDArray[Any]], n: int, extra: Sequence[NDArray[Any]] | None) -> Tensor | None:
    """The numbers of a batch's n sequences; a sequence of padding that was added has 0."""
    if extra is None:
        return None
    found = np.concatenate([*parts, np.zeros(0, extra[0].dtype)])
    return torch.from_numpy(np.pad(found, (0, n - len(found))))


def padded(
    texts: Sequence[NDArray[Any]], prompts: Sequence[int], row_len: int, pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, lengths and lengths of the prompts as tensors; without any text one sequence, which is a prompt of one id."""
    lengths = np.array([len(t) for t in texts] or [1], np.int64)
    ids = np.full((len(lengths), bucketed(int(lengths.max()), row_len)), pad_id, np.int64)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = text
    prompt_lengths = np.array(list(prompts) or [1], np.int64)
    return torch.from_numpy(ids), torch.from_numpy(lengths), torch.from_numpy(prompt_lengths)


def cut_by_length(longest: NDArray[np.int64], counts: NDArray[np.int64], limit: int) -> list[NDArray[np.int64]]:
    """Cuts rows into micro-batches, the longest first, none of more than `limit` ids unless a row alone has more.

    Args:
        longest: (n,) ids of each row's longest sequence.
        counts: (n,) sequences of each row.
        limit: ids of a micro-batch, with its padding.
    """
    order = np.argsort(-longest, kind="stable")
    parts: list[list[int]] = []
    width = n = 0
    for i in order.tolist():
        if not parts or (n + int(counts[i])) * width > limit:
            parts.append([])
            width, n = int(longest[i]), 0
        parts[-1].append(i)
        n += int(counts[i])
    return [np.array(p, np.int64) for p in parts]


# --- sources ---------------------------------------------------------------------------------------------------------


def read_splits(
    cfg: DataConfig, read: Callable[[SourceConfig, float], tuple[S, S]], what: str
) -> tuple[list[S], list[S], list[S]]:
    """The training, validation and test sources; `read(source, frac)` gives what is kept of one and what is held out.

    Raises:
        UserError: a training or test source has nothing in it.
    """
    both = [read(s, cfg.valid_frac if not cfg.valid else 0.0) for s in cfg.sources]
    train = [kept for kept, _ in both]
    valid = [read(s, 0.0)[0] for s in cfg.valid] or [held for _, held in both if held.n_sequences]
    test = [read(s, 0.0)[0] for s in cfg.test]
    for source, (kept, held) in zip(cfg.sources, both, strict=True):
        if not kept.n_sequences and held.n_sequences:
            raise UserError(f"{source.label}: valid_frac holds out all of its prompts: lower data.valid_frac")
    for found in (*train, *valid, *test):
        if not found.n_sequences:
            raise UserError(f"{found.name}: no {what} in it")
    return train, valid, test


def held_out_mask(keys: NDArray[np.uint8], frac: float) -> NDArray[np.bool_]:
    """Which rows are held out, by their keys (n, 32): all rows with the same prompt are on the same side."""
    if not frac:
        return np.zeros(len(keys), np.bool_)
    return np.array([is_held_out(key.tobytes().hex(), frac) for key in keys], np.bool_)


def prompt_key(prompt: Any) -> bytes:
    """32 bytes that name a prompt, text or messages."""
    return hashlib.sha256(json.dumps(prompt, ensure_ascii=False, sort_keys=True).encode()).digest()


class Dropped:
    """Counts what of a source is left out, and keeps the first reason."""

    def __init__(self) -> None:
        self.n, self.first = 0, ""

    def add(self, piece: Piece, number: int, why: str, n: int = 1) -> None:
        self.first = self.first or f"{where(piece, number)}: {why}"
        self.n += n

    def arrays(self) -> Arrays:
        return {"n_dropped": np.array(self.n), "why_dropped": np.frombuffer(self.first.encode(), np.uint8)}


def refuse_dropped(name: str, what: str, made: Arrays, n_kept: int, cfg: DataConfig) -> None:
    """Raises UserError if more of a source is left out than the recipe allows."""
    n_dropped, n = int(made["n_dropped"]), int(made["n_dropped"]) + n_kept
    if n_dropped > cfg.max_dropped_frac * n:
        first = made["why_dropped"].tobytes().decode()
        raise UserError(
            f"{name}: {n_dropped} of {n} {what} ({100 * n_dropped / n:.1f} %) can't be learnt from, data.max_dropped_frac "
            f"allows {100 * cfg.max_dropped_frac:g} %; the first: {first}"
        )


def encoded_answers(
    tokenizer: Tokenizer, prompt: Any, answers: Sequence[str], row_len: int, chat: bool, tools: list[Any] | None
) -> tuple[list[int], list[list[int] | None], bool]:
    """A prompt's ids, those of each answer to it, and whether the prompt was cut; None: longer than a row.

    At least one token of the prompt stays, for it predicts the answer's first.
    """
    encoded = [encode_turn(tokenizer, prompt, answer, tools, chat=chat) for answer in answers]
    fitting = [ids if len(ids) < row_len else None for _, ids in encoded]
    room = row_len - max((len(ids) for ids in fitting if ids is not None), default=0)
    prompt_ids = encoded[0][0]
    return prompt_ids[-room:], fitting, len(prompt_ids) > room


def taken(starts: NDArray[np.int64], keep: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the elements of the kept ragged rows lie, and where the rows begin when only they are left."""
    lengths = np.diff(starts)[keep]
    new = np.cumsum([0, *lengths]).astype(np.int64)
    return np.arange(new[-1]) + np.repeat(starts[:-1][keep] - new[:-1], lengths), new
