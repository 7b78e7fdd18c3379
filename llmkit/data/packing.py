"""Token streams and documents -> rows of inputs and labels, vectorised; and which tokens are hidden. Torch-free.

With packing, row i of a source covers tokens [i*T, i*T + T] of its stream: T inputs and, one further on, T labels. So
in an epoch every token is a label exactly once, but for the first token of each document, which nothing before it
predicts. Only the last row is padded. Without packing, row i is document i, cut to its first T + 1 tokens.

Legend: B rows, T inputs of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmkit.data.order import hashed_unit
from llmkit.data.shards import Array, TokenShards

IGNORE = -100  # the label that is not trained, as in torch's cross entropy
_BUCKET = 8  # widths of rows without packing are multiples of this: fewer shapes to compile, aligned memory


@dataclass(frozen=True)
class Rows:
    """B rows of T inputs."""

    ids_BT: NDArray[np.int64]
    labels_BT: NDArray[np.int64]
    """The token after each input; IGNORE: not trained."""
    positions_BT: NDArray[np.int64]
    """Counted from 0 within each document of the row; in a row that begins in mid-document, from the row's start."""
    docs_BT: NDArray[np.int32]
    """Number of the document within its row, from 0; -1: padding."""


def n_packed_rows(n_tokens: int, row_len: int) -> int:
    """Rows that a stream fills: its labels are all tokens but the first."""
    return max(0, -(-(n_tokens - 1) // row_len))


def n_dropped_tokens(shards: TokenShards, row_len: int) -> int:
    """Tokens that lie beyond the ends of rows when each holds one document."""
    step = 1 << 20
    lengths = (shards.doc_lengths(i, min(i + step, shards.n_docs)) for i in range(0, shards.n_docs, step))
    return sum(int(np.maximum(n - (row_len + 1), 0).sum()) for n in lengths)


def packed_rows(
    windows: NDArray[np.int64],
    is_start: NDArray[np.bool_],
    n_tokens: NDArray[np.int64],
    pad_id: int,
    cross_document_attention: bool = False,
) -> Rows:
    """Rows of a stream.

    Documents are apart by default: positions begin anew in each, and the first token of a document is no label, for the
    input before it belongs to another. With cross_document_attention the row is one text, as in GPT-2's training: one
    document number, running positions, and every label is trained.

    Args:
        windows: (B, T + 1) tokens.
        is_start: (B, T + 1) whether each token is the first of its document.
        n_tokens: (B,) how many of a row's tokens there are; the rest is padding.
    """
    n_inputs = windows.shape[1] - 1
    columns = np.arange(n_inputs)
    ids, labels = windows[:, :-1].copy(), windows[:, 1:].copy()
    if cross_document_attention:
        docs = np.zeros(ids.shape, np.int32)
        positions = np.tile(columns, (len(ids), 1))
    else:
        labels[is_start[:, 1:]] = IGNORE
        begins = is_start[:, :-1].copy()
        begins[:, 0] = False  # column 0 is document 0 at position 0, whether it begins there or goes on
        docs = np.cumsum(begins, axis=1, dtype=np.int32)
        positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    short = np.flatnonzero(n_tokens <= n_inputs)
    if short.size:
        row, column = np.nonzero(columns >= np.maximum(n_tokens[short] - 1, 0)[:, None])
        padding = (short[row], column)
        ids[padding], labels[padding], positions[padding], docs[padding] = pad_id, IGNORE, 0, -1
    return Rows(ids, labels, positions, docs)


def bucketed(length: int, row_len: int) -> int:
    """The width of rows whose longest has this many ids: rounded up, but never above row_len."""
    return min(-(-max(length, 1) // _BUCKET) * _BUCKET, row_len)


def document_rows(documents: Sequence[Array], row_len: int, pad_id: int) -> Rows:
    """One document a row, cut to row_len inputs, padded to the longest of them rounded up to a multiple of 8."""
    lengths = np.array([min(max(len(d) - 1, 0), row_len) for d in documents], np.int64)
    width = bucketed(int(lengths.max(initial=0)), row_len)
    columns = np.arange(width)
    is_text = columns < lengths[:, None]
    ids = np.full(is_text.shape, pad_id, np.int64)
    labels = np.full(is_text.shape, IGNORE, np.int64)
    for row, (document, n) in enumerate(zip(documents, lengths.tolist(), strict=True)):
        if n:
            ids[row, :n] = document[:n]
            labels[row, :n] = document[1 : n + 1]
    return Rows(ids, labels, np.where(is_text, columns, 0), np.where(is_text, 0, -1).astype(np.int32))


# --- masked tokens ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masking:
    """Which tokens are hidden, and by what (Devlin et al. 2018, arXiv 1810.04805, section 3.1)."""

    mask_id: int
    """The control token that stands for a hidden token."""
    text_ids: NDArray[np.int64]
    """Ids that may be hidden, and that a hidden token may be replaced by: all but control tokens, sorted."""
    frac: float
    """Share of the tokens that are to be predicted."""
    replace_frac: float
    """Share of those that become the mask."""
    random_frac: float
    """Share of those that become a random token; the rest stays as it is."""


def masked(rows: Rows, masking: Masking, seed: int, numbers: NDArray[np.int64]) -> Rows:
    """The same rows with some tokens hidden; the labels are what was hidden, IGNORE elsewhere.

    Every choice is a hash of (seed, sample number, column), so it depends on nothing else.

    Args:
        rows: from `packed_rows` or `document_rows`; their labels are not used.
        seed: of the choices.
        numbers: (B,) sample numbers.
    """
    cells = numbers[:, None] * (1 << 20) + np.arange(rows.ids_BT.shape[1])
    chosen, kind, which = (hashed_unit(cells, seed, draw) for draw in range(3))
    n_text = len(masking.text_ids)
    place = np.minimum(np.searchsorted(masking.text_ids, rows.ids_BT), n_text - 1)
    may_hide = (rows.docs_BT >= 0) & (masking.text_ids[place] == rows.ids_BT)
    hidden = may_hide & (chosen < masking.frac)
    ids = np.where(hidden & (kind < masking.replace_frac), masking.mask_id, rows.ids_BT)
    is_random = hidden & (kind >= masking.replace_frac) & (kind < masking.replace_frac + masking.random_frac)
    ids = np.where(is_random, masking.text_ids[(which * n_text).astype(np.int64)], ids)
    return Rows(ids, np.where(hidden, rows.ids_BT, IGNORE), rows.positions_BT, rows.docs_BT)
