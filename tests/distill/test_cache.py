"""What a teacher said: exact, asked once however often the asking was cut short, and never of other tokens."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ports import free_port
from safetensors.torch import load_file

from llmkit import storage
from llmkit.config import Interrupted, MachineError, UserError
from llmkit.data import loader
from llmkit.data.cache import locked
from llmkit.data.chats import ChatRows, Chats
from llmkit.data.loader import PADDING, RowLoader, TextRows
from llmkit.data.packing import IGNORE
from llmkit.data.shards import ShardWriter, TokenShards, write_index
from llmkit.distill import cache as module
from llmkit.distill.asking import Kept, top_logprobs
from llmkit.distill.cache import TeacherBatch, TeacherCache, TeacherRows, teacher_key
from llmkit.distill.units import ChatUnits, RowUnits, Units
from llmkit.losses.distillation import DenseTeacher, SoftTerm, TopKTeacher, distillation_loss
from llmkit.model.config import GPTConfig
from llmkit.model.gpt import GPT, document_mask
from llmkit.training.dist import Ranks, connect

V, ROWS = 50, 64  # tokens, and rows of the embedding: the last 14 belong to none
ROW_LEN = 24


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """About 60 positions a shard; and hundreds of files needn't survive a power cut."""
    monkeypatch.setattr(module, "_POSITIONS", 60)
    monkeypatch.setattr(module, "_INPUTS", 200)
    monkeypatch.setattr(storage.disk, "sync", lambda fd: None)


def model(seed: int = 0, dtype: torch.dtype = torch.float32, **shape: Any) -> GPT:
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 24, "max_seq_len": 64, "vocab_size": ROWS}
    made = GPT(GPTConfig(**{**sizes, **shape}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.4, generator=generator)
    return made.to(dtype).eval()


def chats(n: int = 40, seed: int = 0, name: str = "talk.jsonl") -> Chats:
    """Conversations of two turns of random ids, the second trained."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, ROW_LEN + 2, n)
    trained = [np.arange(k) >= rng.integers(1, k) for k in lengths]
    tokens = rng.integers(1, V, lengths.sum()).astype(np.int32)
    return Chats(name, tokens, np.concatenate(trained), np.cumsum([0, *lengths]).astype(np.int64), 0, 0, 0)


def shards(folder: Path, seed: int = 0, n: int = 30) -> TokenShards:
    """Documents of 1 to 40 random ids, in two files."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("0.tokens", "1.tokens"):
        writer = ShardWriter(folder / name, V, "hash")
        for length in rng.integers(1, 41, n // 2).tolist():
            writer.add(rng.integers(1, V, length), [length], length)
        writer.close()
    write_index(folder, ["0.tokens", "1.tokens"])
    return TokenShards(folder, name="book.txt")


def ask(units: Units, folder: Path, teacher: Callable[[], GPT] = model, **options: Any) -> TeacherCache:
    given: dict[str, Any] = {
        "key": {"teacher": "a"}, "top_k": 8, "dtype": "fp32", "temperature": 1.0, "vocab_size": V, "batch_tokens": 64,
        "device": torch.device("cpu"), "should_stop": lambda: False, "say": lambda line: None, **options,
    }  # fmt: skip
    return TeacherCache.prepare(units, teacher, folder=folder, **given)


def content(cache: TeacherCache) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in cache.folder.iterdir() if p.name != ".lock"}


def no_teacher() -> GPT:
    raise AssertionError("the teacher was asked again")


def every_row(rows: Any) -> TeacherBatch:
    source = np.concatenate([[PADDING], *(np.full(n, s) for s, n in enumerate(rows.n_rows))])
    row = np.concatenate([[0], *(np.arange(n) for n in rows.n_rows)])
    return rows.batch(np.arange(len(row)), source, row)[0]


def live(teacher: GPT, batch: TeacherBatch, temperature: float = 1.0) -> torch.Tensor:
    """What the teacher says of a batch now, [N, V]."""
    hidden = teacher(batch.ids_BT, batch.positions_BT, document_mask(batch.docs_BT))
    return (teacher.logits(hidden)[batch.labels_BT != IGNORE][:, :V] / temperature).log_softmax(-1)


# --- what it says ----------------------------------------------------------------------------------------------------


def teacher_rows(kind: str, folder: Path, **options: Any) -> TeacherRows:
    how, what = kind.split("/")
    if how == "chats":
        sources = [chats(40), chats(15, seed=1, name="more.jsonl")]
        rows: Any = ChatRows(sources, row_len=ROW_LEN, pad_id=0, packing=what == "packed")
        units: list[Units] = [ChatUnits(s) for s in sources]
    else:
        rows = TextRows(
            [shards(folder / "a"), shards(folder / "b", seed=1, n=10)],
            row_len=ROW_LEN,
            pad_id=0,
            packing=what != "alone",
            cross_document_attention=what == "cross",
        )
        units = [RowUnits(rows, 0), RowUnits(rows, 1)]
    return TeacherRows(rows, [ask(u, folder / "cache", **options) for u in units])


KINDS = ["chats/packed", "chats/alone", "rows/packed", "rows/alone", "rows/cross"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_the_live_teacher_says(tmp_path: Path, kind: str) -> None:
    """B31, B91: all tokens kept, in fp64 up to fp32's rounding, packed or not; rows of the embedding that belong to no
    token have no share."""
    teacher = model(dtype=torch.float64)
    batch = every_row(teacher_rows(kind, tmp_path, teacher=lambda: teacher, top_k=1000, temperature=1.7))
    assert batch.top_ids_NK.shape == (int(batch.denominator), V) and batch.denominator > 100
    wanted = live(teacher, batch, 1.7)
    assert torch.allclose(batch.top_logprobs_NK.double(), wanted.gather(1, batch.top_ids_NK), atol=1e-6, rtol=1e-7)
    assert (batch.tail_N == -torch.inf).all()
    assert (batch.top_logprobs_NK.diff(dim=1) <= 0).all()


GPT2 = {
    "positions": "learned",
    "norm": "layernorm",
    "mlp": "gelu_tanh",
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "d_ff": 64,
    "max_seq_len": ROW_LEN,
    "tie_embeddings": True,
}


@pytest.mark.parametrize("shape", [{"sliding_window": 6}, GPT2], ids=["window", "gpt2"])
def test_other_networks(tmp_path: Path, shape: dict[str, Any]) -> None:
    """A window counts columns, and learned positions end: neither is moved by packing or padding."""
    teacher = model(dtype=torch.float64, **shape)
    batch = every_row(teacher_rows("chats/packed", tmp_path, teacher=lambda: teacher, top_k=V))
    assert torch.allclose(batch.top_logprobs_NK.double(), live(teacher, batch).gather(1, batch.top_ids_NK), atol=1e-6)


def test_the_likeliest_and_the_others(tmp_path: Path) -> None:
    """The K likeliest, and the log of what is left, also where that is far below the rounding of 1."""
    batch = every_row(teacher_rows("chats/packed", tmp_path, top_k=5))
    wanted = live(model(), batch)
    top, ids = wanted.topk(5)
    assert torch.equal(batch.top_ids_NK, ids) and torch.allclose(batch.top_logprobs_NK, top, atol=1e-5)
    assert torch.allclose(batch.top_logprobs_NK.exp().sum(-1) + batch.tail_N.exp(), torch.ones(len(ids)), atol=1e-6)
    sure = torch.zeros(1, V)
    sure[0, 7] = 60.0
    told = top_logprobs(sure, torch.eye(V), Kept(1, "fp32", 1.0, V))
    assert told[0].item() == 7 and told[2].item() == pytest.approx(-60 + np.log(V - 1), abs=1e-4)


@pytest.mark.parametrize(("dtype", "close"), [("fp32", 1e-5), ("bf16", 1e-2)])
@pytest.mark.parametrize("kind", ["chats/packed", "rows/packed"])
def test_training_from_the_cache_is_training_from_the_teacher(
    tmp_path: Path, kind: str, dtype: str, close: float
) -> None:
    """B90, B91: the same loss and gradient for all divergences together, with all tokens kept; in bf16 within 1 %."""
    teacher, student = model(), model(1)
    soft = [SoftTerm("f", 1.0, "forward"), SoftTerm("r", 0.5, "reverse"), SoftTerm("j", 2.0, "jsd", 0.3)]
    batch = every_row(teacher_rows(kind, tmp_path, top_k=V, dtype=dtype, temperature=2.0))
    mask, losses, grads = document_mask(batch.docs_BT), [], []
    states = teacher(batch.ids_BT, batch.positions_BT, mask).detach()
    cached = TopKTeacher(batch.top_ids_NK, batch.top_logprobs_NK, batch.tail_N)
    for told in (DenseTeacher(states, teacher.head_weight), cached):
        student.zero_grad()
        hidden = student(batch.ids_BT, batch.positions_BT, mask)
        out = distillation_loss(
            hidden, student.head_weight, batch.labels_BT, told, soft, ce_weight=0.5, temperature=2.0, vocab_size=V
        )
        out.total.backward()
        losses.append(out.total.item())
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=close)
    assert (grads[1] - grads[0]).norm() < 2 * close * grads[0].norm()


def test_size_is_said_beforehand(tmp_path: Path) -> None:
    """And is what is written, but for a few bytes of each conversation and file."""
    said: list[str] = []
    source = chats(200)
    units = ChatUnits(source)
    cache = ask(units, tmp_path, say=said.append, dtype="bf16", top_k=16)
    n = int(source.trained.sum())
    assert cache.kept.bytes_per_position == 16 * 4 + 4
    assert f"{n:,} positions x 68 bytes (top 16 of 50 tokens, bf16)" in said[0] and "to be made" in said[0]
    payload = sum(
        t.numel() * t.element_size()
        for p in cache.folder.glob("*.safetensors")
        for name, t in load_file(p).items()
        if name in ("ids", "logprobs", "tail")
    )
    assert payload == n * 68
    assert said[-1].startswith(f"teacher    {cache.n_shards} of {cache.n_shards} shards")
    again: list[str] = []
    ask(units, tmp_path, no_teacher, say=again.append, dtype="bf16", top_k=16)
    assert len(again) == 1 and "asked before" in again[0]
    assert json.loads((cache.folder / "about.json").read_text())["kept"]["top_k"] == 16


def test_no_shard_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in positions, nor in inputs where little is trained, nor in bytes; every unit is in one of them."""
    source = chats(100)
    rare = Chats("rare", source.tokens, source.trained.copy(), source.starts, 0, 0, 0)
    rare.trained[:] = False
    rare.trained[source.starts[1:] - 1] = True  # the last token alone
    for told, dtype_bytes in ((source, 1 << 26), (rare, 1 << 26), (source, 30 * (8 * 6 + 4))):
        monkeypatch.setattr(module, "_BYTES", dtype_bytes)
        units = ChatUnits(told)
        cache = TeacherCache(units, Kept(8, "fp32", 1.0, V), tmp_path, {})
        assert cache.firsts[0] == 0 and cache.firsts[-1] == 100 and (np.diff(cache.firsts) > 0).all()
        most = min(60, dtype_bytes // 52)
        for a, b in zip(cache.firsts[:-1], cache.firsts[1:], strict=True):
            assert units.n_labels[a:b].sum() < most + ROW_LEN and units.lengths[a:b].sum() < 200 + ROW_LEN + 1
        assert cache.positions(range(cache.n_shards)) == told.trained.sum()


@pytest.mark.parametrize("what", ["packed", "alone", "cross"])
def test_labels_are_counted_without_reading_the_tokens(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        options = {"packing": what != "alone", "cross_document_attention": what == "cross"}
        rows = TextRows([shards(tmp_path / f"{seed}", seed)], row_len=5 + 3 * seed, pad_id=0, **options)
        made, _ = rows.rows(np.zeros(rows.n_rows[0], np.int64), np.arange(rows.n_rows[0]))
        wanted = (made.labels_BT != IGNORE).sum(1).tolist()
        for block in (1, 100, 1 << 24):
            monkeypatch.setattr(loader, "_BLOCK", block)
            assert rows.n_labels(0).tolist() == wanted


# --- asked once ------------------------------------------------------------------------------------------------------


class Counted:
    """A teacher that counts how often it is loaded and asked."""

    def __init__(self) -> None:
        self.loaded = self.asked = 0

    def __call__(self) -> GPT:
        self.loaded += 1
        made = model()
        made.register_forward_hook(self._count)
        return made

    def _count(self, *args: Any) -> None:
        self.asked += 1


def _alone(work: Callable[[], Any]) -> None:
    torch.set_num_threads(1)  # the threads of OpenMP don't survive a fork
    work()


def in_child(work: Callable[[], Any]) -> int:
    """Runs `work` in a process of its own; its exit code, negative for a signal."""
    child = mp.get_context("fork").Process(target=_alone, args=(work,))
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def test_killed_and_resumed(tmp_path: Path) -> None:
    """Killed -9 at random file operations until one start gets through: the same bytes, and at most the shard that was
    being made is asked about again."""
    units = ChatUnits(chats(120))
    whole = ask(units, tmp_path / "whole")
    rng, kills, asked = random.Random(0), 0, Counted()

    def killed_at(n: int) -> Callable[[], None]:
        def work() -> None:
            left = [n]
            for name in ("create", "write", "sync", "rename", "mkdir"):
                original = getattr(storage.disk, name)

                def counted(*args: Any, original: Any = original) -> Any:
                    left[0] -= 1
                    if not left[0]:
                        if original.__name__ == "write":
                            original(args[0], args[1][: len(args[1]) // 2])
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*args)

                setattr(storage.disk, name, counted)
            ask(units, tmp_path / "killed")

        return work

    while in_child(killed_at(rng.randrange(1, 14))) == -signal.SIGKILL:
        kills += 1
        found = TeacherCache(units, whole.kept, tmp_path / "killed", {"teacher": "a"})
        there = set(range(found.n_shards)) - set(found.missing())
        assert there == set(range(len(there)))
        assert all(found.file(s).read_bytes() == whole.file(s).read_bytes() for s in there)
    assert kills >= 5 and whole.n_shards > 10
    assert content(ask(units, tmp_path / "killed", no_teacher)) == content(whole)  # leftovers of the killed too
    whole.file(3).unlink()
    ask(units, tmp_path / "whole", asked)
    assert asked.loaded == 1 and 0 < asked.asked <= 10 and content(whole) == content(found)


def test_stopped_and_resumed(tmp_path: Path) -> None:
    """Asked to stop after some forward passes, again and again: it goes on where it was."""
    units = ChatUnits(chats(120))
    whole, stops = ask(units, tmp_path / "whole"), 0
    polls = iter(range(10**9))
    while True:
        until = next(polls) + 9
        try:
            cache = ask(units, tmp_path / "stopped", should_stop=lambda: next(polls) >= until)  # noqa: B023
            break
        except Interrupted as e:
            assert "run again to go on" in str(e)
            stops += 1
    assert stops >= 3 and content(cache) == content(whole)


@pytest.mark.parametrize("kind", ["chats/packed", "rows/packed"])
def test_students_share_it(tmp_path: Path, kind: str) -> None:
    """Another packing, another batch size, another name of the file: the teacher is not asked again."""
    first = every_row(teacher_rows(kind, tmp_path, batch_tokens=64))
    second = every_row(teacher_rows(kind, tmp_path, teacher=no_teacher, batch_tokens=512))
    assert torch.equal(first.top_logprobs_NK, second.top_logprobs_NK)
    if kind == "chats/packed":
        alone = every_row(teacher_rows("chats/alone", tmp_path, teacher=no_teacher))
        sums = [b.top_logprobs_NK.sort(0).values for b in (first, alone)]
        assert torch.equal(*sums)


def test_jobs_and_ranks_make_the_same_bytes(tmp_path: Path) -> None:
    """Parts 1/3 to 3/3 in any order, two ranks, one process: bitwise one cache; a part alone says what is missing."""
    units = ChatUnits(chats(120))
    whole = ask(units, tmp_path / "one")
    said: list[str] = []
    shares = []
    for i in (2, 3, 1):
        cache = ask(units, tmp_path / "parts", part=(i, 3), say=said.append)
        shares.append(len(cache.missing()))
        assert not cache.missing((i, 3))
    assert shares[0] > shares[1] > shares[2] == 0
    assert said[-1].startswith("part 1/3: talk.jsonl: done; and so are all others")
    assert f"part 2/3: talk.jsonl: done; {shares[0]} shards are missing" in "\n".join(said)
    assert content(ask(units, tmp_path / "parts", no_teacher)) == content(whole)
    assert on_ranks(lambda ranks: ask(units, tmp_path / "ranks", ranks=ranks)) == [0, 0]
    assert content(ask(units, tmp_path / "ranks", no_teacher)) == content(whole)


def test_ranks_stop_together(tmp_path: Path) -> None:
    """A signal or a failure on one of them ends the work of both, in time."""
    units = ChatUnits(chats(60))

    def stop(ranks: Ranks) -> None:
        polls = iter(range(10**9))
        with pytest.raises(Interrupted):
            ask(units, tmp_path / "stop", ranks=ranks, should_stop=lambda: ranks.rank == 1 and next(polls) >= 7)

    def fail(ranks: Ranks) -> None:
        teacher = model() if ranks.is_main else model(vocab_size=V - 1)
        with pytest.raises(MachineError if ranks.is_main else UserError, match=r"another rank|do not belong together"):
            ask(units, tmp_path / "fail", lambda: teacher, ranks=ranks)

    assert on_ranks(stop) == [0, 0]
    found = TeacherCache(units, Kept(8, "fp32", 1.0, V), tmp_path / "stop", {"teacher": "a"})
    assert 0 < len(found.missing()) < found.n_shards
    assert on_ranks(fail) == [0, 0]


def on_ranks(work: Callable[[Ranks], Any]) -> list[int]:
    """Exit codes of two gloo ranks that do `work`."""
    port = free_port()

    def child(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        ranks = connect("cpu", timeout_s=30)
        work(ranks)
        ranks.close()

    children = [mp.get_context("fork").Process(target=_alone, args=(partial(child, rank),)) for rank in range(2)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
    return [int(process.exitcode if process.exitcode is not None else 99) for process in children]


def test_another_run_is_waited_for(tmp_path: Path) -> None:
    units, polls = ChatUnits(chats(10)), iter(range(10))
    folder = TeacherCache(units, Kept(8, "fp32", 1.0, V), tmp_path, {"teacher": "a"}).folder
    with (
        locked(folder, lambda: False),
        pytest.raises(Interrupted, match="another run prepares the same data"),
    ):
        ask(units, tmp_path, no_teacher, should_stop=lambda: next(polls) > 1)


def test_a_loader_reads_it_in_its_thread(tmp_path: Path) -> None:
    """Every step's batch has as many answers as labels, on any device's copy too."""
    rows = teacher_rows("rows/packed", tmp_path)
    with RowLoader(rows, rows_per_step=4, micro_rows=2, prefetch=2) as made:
        for k in range(12):
            for batch in made.step(k):
                moved = batch.to("cpu")
                assert isinstance(moved, TeacherBatch) and moved.denominator == len(moved.tail_N)
                logp = live(model(), moved)
                assert torch.allclose(moved.top_logprobs_NK, logp.gather(1, moved.top_ids_NK), atol=1e-4)


# --- never of other tokens -------------------------------------------------------------------------------------------


def test_a_changed_token_is_refused(tmp_path: Path) -> None:
    """One id, or one label, of one conversation: named, with the file of the cache."""
    source = chats(40)
    cache = ask(ChatUnits(source), tmp_path)
    at = int(source.starts[17]) + 1
    tokens, trained = source.tokens.copy(), source.trained.copy()
    tokens[at] = tokens[at] % (V - 1) + 1
    trained[at] = ~trained[at]
    for changed in (
        Chats("talk.jsonl", tokens, source.trained, source.starts, 0, 0, 0),
        Chats("talk.jsonl", source.tokens, trained, source.starts, 0, 0, 0),
    ):
        rows = TeacherRows(ChatRows([changed], row_len=ROW_LEN, pad_id=0), [cache])
        with pytest.raises(UserError, match=r"talk\.jsonl: conversation 18: its tokens are not those.*\.safetensors"):
            every_row(rows)
        assert ChatUnits(changed).hash != ChatUnits(source).hash
    with pytest.raises(UserError, match="conversation 3: "):  # another one's answers
        unit = ChatUnits(source).get(3)
        cache.of(2, unit.inputs, unit.labels, unit.positions)


def test_a_changed_token_of_a_text_is_refused(tmp_path: Path) -> None:
    rows = TextRows([shards(tmp_path / "a")], row_len=ROW_LEN, pad_id=0)
    cache = ask(RowUnits(rows, 0), tmp_path)
    unit = RowUnits(rows, 0).get(4)
    ids, logprobs, tail = cache.of(4, unit.inputs, unit.labels, unit.positions)
    assert ids.shape == logprobs.shape == (np.count_nonzero(unit.labels != IGNORE), 8) and len(tail) == len(ids)
    unit.inputs[0] += 1
    with pytest.raises(UserError, match=r"book\.txt: row 5: its tokens are not those"):
        cache.of(4, unit.inputs, unit.labels, unit.positions)
    joined = TextRows([shards(tmp_path / "a")], row_len=ROW_LEN, pad_id=0, cross_document_attention=True)
    assert RowUnits(joined, 0).hash != RowUnits(rows, 0).hash
    with pytest.raises(UserError, match="its tokens are not those"):
        every_row(TeacherRows(joined, [cache]))


def test_what_it_is_keyed_by(tmp_path: Path) -> None:
    """B43, B91: other weights, tokenizer, precision, data, labels, temperature, K, dtype or vocabulary: another cache."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    (teacher / "model.safetensors").write_bytes(b"weights")

    def key(tokenizer: str = "t", precision: str = "bf16") -> dict[str, Any]:
        return teacher_key([teacher], tokenizer, precision, tmp_path / "cache")

    units, kept = ChatUnits(chats()), {"top_k": 8, "dtype": "bf16", "temperature": 1.0, "vocab_size": V}
    relabelled = chats()
    relabelled.trained[1] = ~relabelled.trained[1]
    cases = [(units, kept, key()), (units, kept, key("u")), (units, kept, key(precision="fp32"))]
    cases += [(ChatUnits(c), kept, key()) for c in (chats(seed=1), relabelled)]
    changes: list[dict[str, Any]] = [{"top_k": 9}, {"dtype": "fp32"}, {"temperature": 2.0}, {"vocab_size": V - 1}]
    cases += [(units, {**kept, **change}, key()) for change in changes]
    (teacher / "model.safetensors").write_bytes(b"weightS")
    cases.append((units, kept, key()))
    folders = {TeacherCache(u, Kept(**k), tmp_path / "cache", told).folder for u, k, told in cases}
    assert len(folders) == len(cases)
    (teacher / "model.safetensors").write_bytes(b"weights")
    (teacher / "README.md").write_text("not what it computes")
    assert TeacherCache(units, Kept(**kept), tmp_path / "cache", key()).folder in folders


def damages(file: Path) -> Iterator[str]:
    """Every way in which a file may be another than was written, one after the other."""
    good, rng = file.read_bytes(), random.Random(0)
    n_header = 8 + int.from_bytes(good[:8], "little")
    places = [0, 7, 9, n_header - 2, n_header, len(good) - 1, *(rng.randrange(len(good)) for _ in range(30))]
    places.append(good.index(b'"sha256":"') + 12)
    for at in places:
        file.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
        yield "damaged"
    for cut in (0, 5, n_header // 2, len(good) - 1):
        file.write_bytes(good[:cut])
        yield "damaged"
    file.write_bytes(good + b"\0")
    yield "damaged"
    file.write_bytes(file.with_name("000001.safetensors").read_bytes())  # a whole shard, in another's place
    yield "damaged"
    file.unlink()
    yield "is gone"
    file.write_bytes(good)


def test_damage_is_found(tmp_path: Path) -> None:
    """One bit of one byte anywhere, a cut, another shard's bytes: found when the shard is first read, and named."""
    units = ChatUnits(chats(40))
    cache = ask(units, tmp_path)
    unit = units.get(1)
    for what in damages(cache.file(0)):
        fresh = TeacherCache(units, cache.kept, tmp_path, {"teacher": "a"})
        with pytest.raises(
            UserError, match=rf"talk\.jsonl: conversation 2: .*000000\.safetensors.*{what}|{what}.*start"
        ):
            fresh.of(1, unit.inputs, unit.labels, unit.positions)
    fresh.of(1, unit.inputs, unit.labels, unit.positions)


def test_what_would_fail_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little disk before the teacher is loaded; a teacher that says nothing, and for which conversation."""
    units = ChatUnits(chats(40))
    with (
        monkeypatch.context() as patch,
        pytest.raises(MachineError, match=r"0\.0 MB are needed .* but 0\.0 MB are free"),
    ):
        patch.setattr(storage.disk, "free", lambda path: 100)
        ask(units, tmp_path, no_teacher)
    broken = model(tie_embeddings=False)
    with torch.no_grad():
        broken.model.embed_tokens.weight[V - 1] = torch.nan
    with pytest.raises(UserError, match=r"talk\.jsonl: conversation \d+: the teacher's logits are not finite") as told:
        ask(units, tmp_path, lambda: broken)
    named = int(str(told.value).split("conversation ")[1].split(":")[0]) - 1
    assert (units.get(named).inputs == V - 1).any()
    with pytest.raises(UserError, match="has 49 rows, the tokenizer 50 tokens"):
        ask(units, tmp_path, lambda: model(vocab_size=V - 1))
