"""Several processes are one process: the same samples, the same loss, the same weights, and nobody waits for ever."""

from __future__ import annotations

import itertools
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from ports import free_port
from torch import Tensor
from toys import (
    VOCAB,
    T,
    largest_difference,
    linear,
    points,
    recipe,
    regression,
    rows,
    same_bits,
    snapshot,
    tiny_gpt,
    uneven_documents,
    write_shards,
)

from llmkit.config import MachineError, UserError
from llmkit.data.loader import Batch, RowLoader, TextRows
from llmkit.data.shards import TokenShards
from llmkit.training.dist import Ranks, connect
from llmkit.training.engine import Engine, NonFinite
from llmkit.training.supervised import held_out, label_bytes, supervised_step, token_loss

LOSS = token_loss(z_loss=1e-3, chunk=24)
STEPS = 3


def _child(rank: int, world: int, port: int, work: Callable[..., Any], out: str, args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    ranks = connect("cpu", timeout_s=30)
    try:
        result = work(ranks, *args)
    except BaseException:
        traceback.print_exc()
        raise
    torch.save(result, f"{out}/{rank}")
    ranks.close()


def on_ranks(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(ranks, *args)` returns on each of `world` gloo ranks."""
    port = free_port()
    with tempfile.TemporaryDirectory() as out:
        mp.spawn(_child, (world, port, work, out, args), nprocs=world)
        return [torch.load(f"{out}/{r}", weights_only=False) for r in range(world)]


# --- what is run on every rank ---------------------------------------------------------------------------------------


def _train(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Six rows a step of uneven documents, in micro-batches of one: clipped AdamW with an average."""
    engine = Engine(tiny_gpt(), recipe(lr=1e-2, clip=0.5, ema_decay=0.9), ranks)
    ctx: Any = SimpleNamespace(ranks=ranks)
    loader = rows(TokenShards(folder), rows_per_step=6, micro_rows=1, rank=ranks.rank, world=ranks.world)
    metrics = [supervised_step(engine, ctx, loader, LOSS) for _ in range(STEPS)]
    counts = [[b.denominator for b in loader.step(k)] for k in range(STEPS)]
    return {"state": snapshot(engine), "metrics": metrics, "counts": counts}


def _evaluate(ranks: Ranks, folders: dict[int, Path]) -> dict[int, dict[str, float]]:
    engine = Engine(tiny_gpt(), recipe(), ranks)
    ctx: Any = SimpleNamespace(ranks=ranks, all_should_stop=lambda: ranks.any(False))
    n_bytes = torch.arange(VOCAB) % 4
    result = {}
    for n, folder in folders.items():
        for micro_rows in (1, 2):
            loader = rows(
                TokenShards(folder), rows_per_step=micro_rows * ranks.world, micro_rows=micro_rows,
                rank=ranks.rank, world=ranks.world,
            )  # fmt: skip
            sums = held_out(engine, ctx, loader, LOSS, None, label_bytes(n_bytes))
            assert sums is not None
            result[10 * n + micro_rows] = {"loss": sums.mean("loss"), "n": sums.n, "n_bytes": sums.n_bytes}
    return result


def _batch(n_labels: int, seed: int, rows: int = 20) -> Batch:
    """A batch of which only the first labels are trained."""
    g = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, VOCAB, (rows, T), generator=g) for _ in "ab")
    labels.view(-1)[n_labels:] = -100
    positions = torch.arange(T).expand(rows, T)
    return Batch(ids, labels, positions, torch.zeros(rows, T, dtype=torch.int32), float(n_labels), float(rows * T))


def _lopsided(ranks: Ranks, counts: list[int], world: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One step in which batch i of the list is rank i's; a single rank takes all of them."""
    engine = Engine(tiny_gpt(), recipe(lr=1e-2), ranks)
    mine = range(world) if ranks.world == 1 else [ranks.rank]
    metrics = engine.update([_batch(counts[i], seed=i) for i in mine], LOSS)
    return snapshot(engine), metrics


def _odds_and_ends(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Everything of `Ranks` in one process group, then each kind of failure on one rank."""
    result: dict[str, Any] = {
        "any": [ranks.any(ranks.rank == r) for r in (0, 1, 5)],
        "sum": ranks.sum_numbers(0.1, float(ranks.rank)),
        "hash": ranks.sum_hash(2**63 - 1 - ranks.rank),
        "from_main": ranks.from_main({"rank": ranks.rank}),
    }
    order = folder / "order"

    def work() -> str:
        with order.open("a") as f:
            f.write(f"{ranks.rank}\n")
        return order.read_text()

    result["first"] = ranks.main_first("good", work, KeyError)[:2]

    def fail(error: type[Exception]) -> Callable[[], None]:
        def work() -> None:
            raise error("bad data") if ranks.is_main else AssertionError("a rank went on after rank 0 failed")

        return work

    with pytest.raises(
        UserError if ranks.is_main else MachineError, match="bad data" if ranks.is_main else "rank 0 failed in 'bad'"
    ):
        ranks.main_first("bad", fail(UserError), KeyError)
    with pytest.raises(KeyError):  # the type that all ranks are to see
        ranks.main_first("shared", fail(KeyError), KeyError)

    # A NaN on rank 1 alone: all ranks stop before the update, and go on together afterwards.
    engine = Engine(linear(), recipe(ema_decay=0.5), ranks)
    data = points(seed=ranks.rank)
    engine.update([data], regression)
    before = snapshot(engine)
    spoilt = points(seed=ranks.rank)
    spoilt.y[0, 1] = torch.nan if ranks.rank == 1 else 0.0
    with pytest.raises(NonFinite, match="step 2: loss nan"):
        engine.update([spoilt], regression)
    assert same_bits(before, snapshot(engine))
    result["asked"] = []
    engine.update([data], regression, accept=lambda m: result["asked"].append(m["loss"]) or False)
    assert same_bits(before, snapshot(engine))
    engine.update([data], regression)
    result["state"] = snapshot(engine)
    with pytest.raises(UserError, match="no position"):
        engine.update([points(0)], regression)
    return result


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_shards(path, uneven_documents())
    return path


@pytest.mark.parametrize("world", [2, 3])
def test_training_is_the_same(folder: Path, world: int) -> None:
    """D1, D4, B1, B3, B9, B25: weights, moments and average to 1e-12, the same metrics and data hash at every step."""
    alone, together = _train(Ranks(), folder), on_ranks(world, _train, folder)
    shares = [[sum(r["counts"][k]) for r in together] for k in range(STEPS)]
    assert any(max(s) - min(s) >= 5 for s in shares), "the ranks' shares should be uneven"
    for result in together:
        assert same_bits(result["state"], together[0]["state"])  # all ranks hold the same bits
        assert result["metrics"] == together[0]["metrics"]
    assert largest_difference(alone["state"], together[0]["state"]) <= 1e-12
    for a, b in zip(alone["metrics"], together[0]["metrics"], strict=True):
        assert a["data_hash"] == b["data_hash"] and a["denominator"] == b["denominator"]
        assert {**a, "data_hash": 0} == pytest.approx({**b, "data_hash": 0}, rel=1e-12)


def brute_force(shards: TokenShards) -> float:
    """sum(nats) / sum(labels), a document's part of a row at a time, through torch's own cross entropy."""
    model, nats, n_labels = tiny_gpt().double().eval(), 0.0, 0
    stream, starts = torch.from_numpy(shards.tokens(0, shards.n_tokens).astype("int64")), shards.doc_starts.tolist()
    for first in range(0, len(stream) - 1, T):
        last = min(first + T, len(stream) - 1)  # this row's last label; a document that begins there is no label
        edges = [first, *(s for s in starts if first < s <= last), last + 1]
        for a, b in itertools.pairwise(edges):
            ids = stream[a:b]
            if len(ids) > 1:
                logits = model.logits(model(ids[None, :-1]))[0]
                nats += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
                n_labels += len(ids) - 1
    return nats / n_labels


def test_evaluation_is_the_same(tmp_path: Path) -> None:
    """B5, B46: 7 rows on 1, 2 and 3 ranks, in batches of 1 and 2; also fewer rows than ranks. Nothing counts twice."""
    folders = {}
    for n in (1, 2, 7):
        folders[n] = tmp_path / str(n)
        write_shards(
            folders[n],
            [[3 + (i * 7 + n) % 60 for i in range(n * T - 20 + 11)], list(range(3, 13))] if n > 1 else [[5, 6, 7, 8]],
        )
        assert rows(TokenShards(folders[n]), rows_per_step=1).n_rows == [n]
    expected = _evaluate(Ranks(), folders)
    for n, folder in folders.items():
        assert expected[10 * n + 1]["loss"] == pytest.approx(brute_force(TokenShards(folder)), rel=1e-12)
        assert expected[10 * n + 1] == pytest.approx(expected[10 * n + 2], rel=1e-12)
    assert {"loss", "n", "n_bytes"} == set(expected[71])
    for world in (2, 3):
        for result in on_ranks(world, _evaluate, folders):
            for key, metrics in expected.items():
                assert result[key] == pytest.approx(metrics, rel=1e-12)


@pytest.mark.parametrize("counts", [[3, 300], [0, 40]], ids=str)
def test_lopsided_ranks(counts: list[int]) -> None:
    """B3: 3 loss tokens on one rank and 300 on the other. B8: none at all on one rank. Both as on one rank."""
    state, metrics = _lopsided(Ranks(), counts, 2)
    assert metrics["denominator"] == sum(counts)
    for other_state, other_metrics in on_ranks(2, _lopsided, counts, 2):
        assert largest_difference(state, other_state) <= 1e-12
        assert other_metrics == pytest.approx(metrics, rel=1e-12)


def test_ranks_act_together(tmp_path: Path) -> None:
    """D8, H2: flags, sums, order of work, and the failures of one rank, which all of them learn of."""
    results = on_ranks(2, _odds_and_ends, tmp_path)
    for result in results:
        assert result["any"] == [True, True, False]
        assert result["sum"] == [0.2, 1.0]
        assert result["hash"] == (2 * (2**63 - 1) - 1) % 2**63
        assert result["from_main"] == {"rank": 0}
        assert result["first"] == "0\n"  # rank 0 had written before anyone else looked
        assert result["asked"] == results[0]["asked"] and len(result["asked"]) == 1
        assert same_bits(result["state"], results[0]["state"])
    assert (tmp_path / "order").read_text() == "0\n1\n"


def test_one_rank_is_no_group() -> None:
    """Alone, nothing is initialised and every answer is one's own."""
    ranks = Ranks()
    assert ranks.any(True) and not ranks.any(False)
    assert ranks.sum_numbers(1.5, 2) == [1.5, 2] and ranks.sum_hash(2**63 + 5) == 5
    assert ranks.from_main("x") == "x" and ranks.main_first("a", lambda: 3, KeyError) == 3
    assert not torch.distributed.is_initialized()
    ranks.close()


def test_rows_that_cannot_be_shared() -> None:
    """The loader refuses, naming what would do."""
    with pytest.raises(UserError, match="can't be shared by 4 ranks"):
        RowLoader(TextRows([], row_len=T, pad_id=0), rows_per_step=6, world=4, micro_rows=1)
