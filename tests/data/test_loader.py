"""The order of data is a function of (seed, step): not of ranks, micro-batches, threads or where a run was resumed."""

from __future__ import annotations

import random
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from llmkit.config import UserError
from llmkit.data.loader import Batch, RowLoader, TextRows
from llmkit.data.shards import TokenShards

T = 8
MOD = 1 << 63


@pytest.fixture
def sources(make_shards) -> list[TokenShards]:
    """Two sources whose ids are all different: 37 rows and 12 rows of 8."""
    ids = iter(range(1, 10_000))
    lengths = [[5, 9, 1, 30, 2, 100], [60, 40, 49]], [[3, 20], [67]]
    return [make_shards([[[next(ids) for _ in range(n)] for n in file] for file in files]) for files in lengths]


def make(shards: list[TokenShards], **options: object) -> RowLoader:
    """A loader of text from one flat list of options."""
    of_rows = {"row_len", "pad_id", "packing", "cross_document_attention"} & options.keys()
    return RowLoader(TextRows(shards, **{k: options.pop(k) for k in of_rows}), **options)


def loader(sources: list[TokenShards], **options: object) -> RowLoader:
    defaults = {"row_len": T, "rows_per_step": 8, "pad_id": 0, "weights": [3.0, 1.0], "seed": 5, "prefetch": 0}
    return make(sources, **{**defaults, **options})


def global_hash(sources: list[TokenShards], k: int, world: int, **options: object) -> int:
    return sum(loader(sources, world=world, rank=r, **options).tokens_hash(k) for r in range(world)) % MOD


def rows(batches: list[Batch]) -> list[list[int]]:
    return [row for b in batches for row in b.ids_BT.tolist()]


# --- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_order_depends_on_seed_and_step_alone(sources, packing: bool) -> None:
    """D1, B37, B39: world sizes, micro-batches and resume points (0, within and at the edges of epochs), exactly."""
    steps = [0, 1, 4, 5, 6, 9, 10, 37, 46, 47]
    expected = [global_hash(sources, k, 1, packing=packing) for k in steps]
    assert len(set(expected)) == len(steps)
    for world in (1, 2, 4):
        for micro_rows in (None, 1, 2):
            options = {"packing": packing, "micro_rows": micro_rows}
            assert [global_hash(sources, k, world, **options) for k in steps] == expected
    assert global_hash(sources, 0, 1, packing=packing, seed=6) != expected[0]


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_make_the_whole_step(sources, packing: bool) -> None:
    """B39: the ranks' rows, one after another, are the rows of one rank."""
    whole = loader(sources, packing=packing, micro_rows=1).step(7)
    parts = [loader(sources, packing=packing, micro_rows=1, world=4, rank=r).step(7) for r in range(4)]
    assert rows([b for part in parts for b in part]) == rows(whole)
    assert sum(b.denominator for part in parts for b in part) == sum(b.denominator for b in whole)


def test_each_epoch_holds_every_row_once_in_a_new_order(sources) -> None:
    """B40, D2: epochs 0 to 3."""
    one = loader([sources[0]], weights=[1.0], rows_per_step=1)
    n = one.n_rows[0]
    epochs = [[int(one.samples(e * n + i)[2][0]) for i in range(n)] for e in range(4)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert one.epoch(2 * n) == 2.0 and one.epochs(n // 2) == [n // 2 / n]


def test_mixture_and_its_epochs_are_independent(sources) -> None:
    """B42: the shares hold, and each source is seen evenly."""
    mixed = loader(sources)
    seen = Counter((s, r) for k in range(100) for _, s, r in zip(*(a.tolist() for a in mixed.samples(k)), strict=True))
    per_source = [sum(c for (s, _), c in seen.items() if s == i) for i in (0, 1)]
    assert per_source == [600, 200]
    for source, n in enumerate(mixed.n_rows):
        counts = [seen[source, row] for row in range(n)]
        assert max(counts) - min(counts) <= 1
    assert mixed.epochs(100) == [600 / mixed.n_rows[0], 200 / mixed.n_rows[1]]


def test_resuming_twice_and_at_an_epoch_boundary(sources) -> None:
    """B40, B41: new loaders that begin at a step go on as the old one would have."""
    n_rows = loader([sources[1]], weights=[1.0]).n_rows[0]
    assert n_rows == 12 and n_rows % 4 == 0
    options = {"weights": [1.0], "rows_per_step": 4, "prefetch": 2}
    with loader([sources[1]], **options) as whole:
        expected = [(rows(whole.step(k)), whole.tokens_hash(k)) for k in range(9)]
    resumed = []
    for first, last in ((0, 2), (2, 3), (3, 6), (6, 9)):  # an epoch is three steps
        with loader([sources[1]], **options) as part:
            resumed += [(rows(part.step(k)), part.tokens_hash(k)) for k in range(first, last)]
    assert resumed == expected


def test_batches(sources) -> None:
    batches = loader(sources, micro_rows=2, world=2, rank=1).step(3)
    assert len(batches) == 2
    for batch in batches:
        assert batch.ids_BT.shape == batch.labels_BT.shape == batch.positions_BT.shape == batch.docs_BT.shape == (2, T)
        assert batch.ids_BT.dtype == batch.labels_BT.dtype == batch.positions_BT.dtype == torch.int64
        assert batch.docs_BT.dtype == torch.int32
        trained = batch.labels_BT != -100
        assert batch.denominator == trained.sum().item()
        assert (batch.labels_BT[trained] == batch.ids_BT[trained] + 1).all()
        moved = batch.to("cpu")
        assert torch.equal(moved.ids_BT, batch.ids_BT) and moved.denominator == batch.denominator


def test_cross_document_attention(sources) -> None:
    batch = loader(sources, cross_document_attention=True).step(0)[0]
    assert int(batch.docs_BT.max()) == 0
    assert torch.equal(batch.positions_BT[0], torch.arange(T))


def test_random_state_of_the_process_is_left_alone(sources) -> None:
    """B37, B38."""
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    loader(sources).step(0)
    list(loader(sources).eval_batches())
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


# --- the thread -----------------------------------------------------------------------------------------------------


def test_prefetched_steps_are_the_same_and_jumps_are_allowed(sources) -> None:
    plain, others = loader(sources), threading.active_count()  # other tests in this process may have left a monitor
    with loader(sources, prefetch=2) as ahead:
        for k in (0, 1, 2, 9, 10, 3, 3, 4):
            assert rows(ahead.step(k)) == rows(plain.step(k))
            assert ahead.tokens_hash(k) == plain.tokens_hash(k)
        assert threading.active_count() == others + sum(t.name == "prefetch" for t in threading.enumerate())
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
    assert rows(ahead.step(5)) == rows(plain.step(5))  # a closed loader can be used again
    ahead.close()
    ahead.close()


def test_the_thread_stays_a_few_steps_ahead(sources, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = RowLoader._build
    monkeypatch.setattr(RowLoader, "_build", lambda self, k: (built.append(k), build(self, k))[1])
    with loader(sources, prefetch=2) as ahead:
        ahead.step(0)
        threading.Event().wait(0.3)
        assert built == [0, 1, 2, 3]  # one handed over, two in the queue, one waiting for a place in it


def test_errors_in_the_thread_come_out_of_step(sources, monkeypatch: pytest.MonkeyPatch) -> None:
    build = RowLoader._build

    def fail(self: RowLoader, k: int) -> object:
        if k == 2:
            raise OSError("the disk is gone")
        return build(self, k)

    monkeypatch.setattr(RowLoader, "_build", fail)
    with loader(sources, prefetch=4) as ahead:
        ahead.step(0)
        ahead.step(1)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                ahead.step(2)
        assert ahead.step(3)
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


# --- evaluation -----------------------------------------------------------------------------------------------------


def eval_labels(batches: list[Batch]) -> list[int]:
    return sorted(t for b in batches for t in b.labels_BT[b.labels_BT != -100].tolist())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro_rows", [1, 3])
def test_evaluation_sees_every_row_once_on_any_number_of_ranks(sources, packing: bool, micro_rows: int) -> None:
    """B45, B46: no row twice, no row left out, as many batches on every rank, the same at every call."""
    options = {"packing": packing, "micro_rows": micro_rows, "row_len": 200 if not packing else T}
    one = loader(sources, **options, rows_per_step=micro_rows)
    expected = eval_labels(list(one.eval_batches()))
    starts = {int(s.tokens(int(i), int(i) + 1)[0]) for s in sources for i in s.doc_starts}
    assert expected == sorted(t for s in sources for t in s.tokens(0, s.n_tokens).tolist() if t not in starts)
    assert eval_labels(list(one.eval_batches())) == expected
    for world in (2, 3, 4, 7):
        ranks = [
            list(loader(sources, **options, rows_per_step=world * micro_rows, world=world, rank=r).eval_batches())
            for r in range(world)
        ]
        assert len({len(r) for r in ranks}) == 1
        assert len({b.ids_BT.shape[0] for r in ranks for b in r}) == 1
        assert eval_labels([b for r in ranks for b in r]) == expected


def test_evaluation_on_seven_rows_and_four_ranks(make_shards) -> None:
    """B46: n = 7, W = 4."""
    shards = [make_shards([[list(range(1, 7 * T + 2))]])]
    ranks = [list(make(shards, row_len=T, rows_per_step=4, pad_id=0, world=4, rank=r).eval_batches()) for r in range(4)]
    assert [len(r) for r in ranks] == [2] * 4
    assert eval_labels([b for r in ranks for b in r]) == list(range(2, 7 * T + 2))
    padding = [b for r in ranks for b in r if not b.denominator]
    assert len(padding) == 1 and (padding[0].docs_BT == -1).all() and (padding[0].labels_BT == -100).all()


def test_evaluation_can_be_limited(sources) -> None:
    one = loader(sources, micro_rows=1)
    whole = rows(list(one.eval_batches()))
    assert rows(list(one.eval_batches(max_tokens=5 * T + 3))) == whole[:5]
    assert rows(list(one.eval_batches(max_tokens=1))) == whole[:1]
    assert rows(list(one.eval_batches(max_tokens=10**9))) == whole
    two = [list(loader(sources, micro_rows=1, world=2, rank=r).eval_batches(max_tokens=5 * T)) for r in range(2)]
    assert eval_labels(two[0] + two[1]) == eval_labels(list(one.eval_batches(max_tokens=5 * T)))


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("n_docs", [1, 3, 4, 7, 8, 9])
def test_few_documents(make_shards, n_docs: int, packing: bool) -> None:
    """F6: 1, W - 1, W, B - 1, B, B + 1 documents for W = 4 and B = 8: small data comes round within a step."""
    ids = iter(range(1, 1000))
    shards = [make_shards([[[next(ids) for _ in range(5)] for _ in range(n_docs)]])]
    of_rank = lambda r: make(  # noqa: E731
        shards, row_len=4, rows_per_step=8, pad_id=0, world=4, rank=r, packing=packing, prefetch=0
    )
    seen = Counter(
        row for k in range(6) for r in range(4) for _, _, rs in [of_rank(r).samples(k)] for row in rs.tolist()
    )
    n = of_rank(0).n_rows[0]
    assert sum(seen.values()) == 48 and len(seen) == min(n, 48)
    assert max(seen.values()) - min(seen.values()) <= 1
    assert sum(b.denominator for r in range(4) for b in of_rank(r).step(0)) > 0


@pytest.mark.parametrize("packing", [True, False])
def test_a_document_longer_than_the_row(make_shards, packing: bool) -> None:
    """F6, B33: goes on in the next rows, or is cut and counted."""
    one = make([make_shards([[list(range(1, 22))]])], row_len=4, rows_per_step=1, pad_id=0, packing=packing)
    assert one.n_rows == ([5] if packing else [1])
    assert one.rows.dropped_tokens == (0 if packing else 16)
    assert eval_labels(list(one.eval_batches())) == list(range(2, 22 if packing else 6))


@pytest.mark.parametrize("files", [[[]], [[[1]]]])
def test_too_little_text(make_shards, files: list[list[list[int]]]) -> None:
    """F6: nothing to predict."""
    with pytest.raises(UserError, match="tokens make no row: at least 2 are needed"):
        make([make_shards(files)], row_len=4, rows_per_step=1, pad_id=0)


@pytest.mark.parametrize(
    ("rows_per_step", "world", "micro_rows", "message"),
    [
        (12, 4, 2, r"12 rows of 8 tokens .* 4 ranks with 2 rows a forward pass: set it to 64 or 128"),
        (3, 4, 1, r"set it to 32, or change batch\.micro_tokens"),
        (0, 1, 1, "set it to 8,"),
        (10, 4, None, "set it to 64 or 128"),
    ],
)
def test_uneven_shares_are_refused_with_the_numbers(sources, rows_per_step, world, micro_rows, message) -> None:
    with pytest.raises(UserError, match=message):
        loader(sources, rows_per_step=rows_per_step, world=world, micro_rows=micro_rows)
