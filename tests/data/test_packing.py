"""Rows hold every token once, know where documents begin, and are built fast."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from llmkit.data.packing import (
    IGNORE,
    Masking,
    Rows,
    document_rows,
    masked,
    n_dropped_tokens,
    n_packed_rows,
    packed_rows,
)
from llmkit.data.shards import TokenShards

PAD = 0
FILES = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=4)


def rows_of(shards: TokenShards, row_len: int, cross: bool = False) -> Rows:
    n = n_packed_rows(shards.n_tokens, row_len)
    firsts = np.arange(n) * row_len
    windows, is_start = shards.windows(firsts, row_len + 1, PAD)
    return packed_rows(windows, is_start, np.minimum(shards.n_tokens - firsts, row_len + 1), PAD, cross)


def numbered(lengths: list[list[int]]) -> list[list[list[int]]]:
    """Documents of these lengths whose ids count up through all files, so that each token is known by its id."""
    ids = iter(range(1, 10_000))
    return [[[next(ids) for _ in range(n)] for n in file] for file in lengths]


@given(lengths=FILES, row_len=st.integers(1, 13))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_are_conserved(make_shards, lengths: list[list[int]], row_len: int) -> None:
    """B33, D2, B7: each token is a label once, but for the first of each document, which is none."""
    files = numbered(lengths)
    documents = [d for file in files for d in file]
    shards = make_shards(files)
    rows = rows_of(shards, row_len)
    labels = rows.labels_BT[rows.labels_BT != IGNORE]
    assert sorted(labels.tolist()) == sorted(t for d in documents for t in d[1:])
    trained = rows.labels_BT != IGNORE
    assert np.array_equal(rows.labels_BT[trained], rows.ids_BT[trained] + 1)  # the token after, of the same document
    inputs = rows.ids_BT[rows.docs_BT >= 0]
    assert inputs.tolist() == [t for d in documents for t in d][: len(inputs)]
    assert len(inputs) >= sum(map(len, documents)) - 1


@given(lengths=FILES, row_len=st.integers(1, 13))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_and_positions(make_shards, lengths: list[list[int]], row_len: int) -> None:
    """B31, B32: against a plain loop over the tokens."""
    files = numbered(lengths)
    document_of = {t: n for n, d in enumerate(d for file in files for d in file) for t in d}
    rows = rows_of(make_shards(files), row_len)
    for ids, positions, docs in zip(rows.ids_BT, rows.positions_BT, rows.docs_BT, strict=True):
        seen: list[int] = []
        for t, (token, position, doc) in enumerate(zip(ids.tolist(), positions.tolist(), docs.tolist(), strict=True)):
            if doc < 0:
                assert (token, position) == (PAD, 0)
                continue
            if document_of[token] not in seen:
                seen.append(document_of[token])
                began = t
            assert doc == len(seen) - 1
            assert position == t - began


def test_rows_in_numbers(make_shards) -> None:
    rows = rows_of(make_shards([[[11, 12, 13], [21, 22]], [[31, 32, 33, 34, 35]]]), 4)
    x = IGNORE
    assert rows.ids_BT.tolist() == [[11, 12, 13, 21], [22, 31, 32, 33], [34, PAD, PAD, PAD]]
    assert rows.labels_BT.tolist() == [[12, 13, x, 22], [x, 32, 33, 34], [35, x, x, x]]
    assert rows.positions_BT.tolist() == [[0, 1, 2, 0], [0, 0, 1, 2], [0, 0, 0, 0]]
    assert rows.docs_BT.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, -1, -1, -1]]


def test_cross_document_attention_is_one_text(make_shards) -> None:
    rows = rows_of(make_shards([[[11, 12, 13], [21, 22]], [[31, 32, 33, 34, 35]]]), 4, cross=True)
    x = IGNORE
    assert rows.labels_BT.tolist() == [[12, 13, 21, 22], [31, 32, 33, 34], [35, x, x, x]]
    assert rows.positions_BT.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert rows.docs_BT.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, -1, -1, -1]]


def test_one_document_a_row() -> None:
    documents = [np.array(d, np.uint16) for d in ([11, 12, 13], [21], [], list(range(1, 14)))]
    rows = document_rows(documents, 10, PAD)
    x = IGNORE
    assert rows.ids_BT.shape == (4, 10)  # 16, the next multiple of 8, is beyond the longest row
    assert rows.ids_BT[0].tolist() == [11, 12] + [PAD] * 8
    assert rows.labels_BT[0].tolist() == [12, 13] + [x] * 8
    assert rows.docs_BT[0].tolist() == [0, 0] + [-1] * 8
    assert rows.positions_BT[3].tolist() == list(range(10))
    assert rows.labels_BT[3].tolist() == list(range(2, 12))
    assert (rows.docs_BT[1:3] == -1).all() and (rows.labels_BT[1:3] == x).all()


@pytest.mark.parametrize(("length", "width"), [(0, 8), (2, 8), (9, 8), (10, 16), (17, 16), (18, 20), (90, 20)])
def test_rows_are_padded_to_the_longest(length: int, width: int) -> None:
    assert document_rows([np.arange(length)], 20, PAD).ids_BT.shape == (1, width)


def test_cut_tokens_are_counted(make_shards) -> None:
    """B33: what the cut drops is known."""
    shards = make_shards([[[1] * 5, [2] * 6], [[3] * 7, [4] * 9]])
    assert n_dropped_tokens(shards, 5) == 0 + 0 + 1 + 3


def test_rows_are_built_fast(make_shards) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50_000, n).tolist() for n in rng.integers(1, 800, 1000)]
    shards = make_shards([documents[:500], documents[500:]])
    speeds = []
    for _ in range(5):
        start = time.perf_counter()
        rows = rows_of(shards, 256)
        speeds.append(rows.ids_BT.size / (time.perf_counter() - start))
    assert max(speeds) > 8e6  # tokens a second; 20 million and more on an idle core


# --- masked tokens ---------------------------------------------------------------------------------------------------

MASK = 1
TEXT_IDS = np.array([i for i in range(10, 1000) if i % 50], np.int64)  # some ids in between are control tokens


def masked_rows(n: int = 400, width: int = 64, seed: int = 3, numbers: np.ndarray | None = None, **shares: float):
    rng = np.random.default_rng(0)
    ids = rng.integers(10, 1000, (n, width))
    docs = np.zeros(ids.shape, np.int32)
    docs[:, -4:] = -1
    rows = Rows(ids, np.zeros_like(ids), np.tile(np.arange(width), (n, 1)), docs)
    masking = Masking(MASK, TEXT_IDS, **{"frac": 0.15, "replace_frac": 0.8, "random_frac": 0.1, **shares})
    return rows, masked(rows, masking, seed, np.arange(n) if numbers is None else numbers)


def test_masked_shares_are_80_10_10_of_15_percent() -> None:
    """Within four standard deviations; control tokens and padding are never hidden."""
    before, after = masked_rows()
    hidden = after.labels_BT != IGNORE
    allowed = np.isin(before.ids_BT, TEXT_IDS) & (before.docs_BT >= 0)
    assert not (hidden & ~allowed).any()
    assert (after.labels_BT[hidden] == before.ids_BT[hidden]).all()
    assert (after.ids_BT[~hidden] == before.ids_BT[~hidden]).all()
    n = hidden.sum()
    assert abs(n / allowed.sum() - 0.15) < 4 * (0.15 * 0.85 / allowed.sum()) ** 0.5
    replaced = (after.ids_BT[hidden] == MASK).sum() / n
    kept = (after.ids_BT[hidden] == before.ids_BT[hidden]).sum() / n
    assert abs(replaced - 0.8) < 4 * (0.16 / n) ** 0.5 and abs(kept - 0.1) < 4 * (0.09 / n) ** 0.5 + 2 / len(TEXT_IDS)
    drawn = after.ids_BT[hidden & (after.ids_BT != MASK) & (after.ids_BT != before.ids_BT)]
    assert np.isin(drawn, TEXT_IDS).all()
    assert len(np.unique(drawn)) > 0.2 * len(drawn) and drawn.min() < 60 and drawn.max() > 950


def test_masks_are_a_function_of_seed_and_sample_number() -> None:
    """D1: a row hides the same tokens wherever it stands in a batch; another seed or epoch hides others."""
    _, whole = masked_rows()
    rows, _ = masked_rows()
    part = Rows(*(a[100:103] for a in (rows.ids_BT, rows.labels_BT, rows.positions_BT, rows.docs_BT)))
    masking = Masking(MASK, TEXT_IDS, 0.15, 0.8, 0.1)
    alone = masked(part, masking, 3, np.arange(100, 103))
    assert (alone.labels_BT == whole.labels_BT[100:103]).all() and (alone.ids_BT == whole.ids_BT[100:103]).all()
    assert (masked(part, masking, 4, np.arange(100, 103)).labels_BT != alone.labels_BT).any()
    later = masked(part, masking, 3, np.arange(5100, 5103)).labels_BT
    both = ((later != IGNORE) & (alone.labels_BT != IGNORE)).sum() / (alone.labels_BT != IGNORE).sum()
    assert both < 0.5  # 0.15 where the two choices have nothing to do with each other


@pytest.mark.parametrize("frac", [1.0, 1e-9])
def test_all_or_nothing_is_hidden(frac: float) -> None:
    before, after = masked_rows(frac=frac, replace_frac=1.0, random_frac=0.0)
    allowed = np.isin(before.ids_BT, TEXT_IDS) & (before.docs_BT >= 0)
    assert ((after.labels_BT != IGNORE) == (allowed if frac == 1.0 else False)).all()
    assert (after.ids_BT[after.labels_BT != IGNORE] == MASK).all()
