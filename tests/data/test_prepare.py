"""Preparing is repeatable, resumable, parallel without a trace of it, and keyed by all that it depends on."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit import storage
from llmkit.config import Interrupted, MachineError, UserError
from llmkit.data import prepare as prepare_module, sources, workers
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.prepare import Prepared, prepare
from llmkit.data.shards import TokenShards
from llmkit.data.workers import is_held_out
from llmkit.tokenizer import Tokenizer, TokenizerConfig


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    return path


def words(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(99)}é" for _ in range(rng.randrange(1, 30))) + f" {i}" for i in range(n)]


def config(tmp_path: Path, path: str | Path, **options: Any) -> DataConfig:
    return DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **options)


def texts_of(shards: TokenShards) -> list[str]:
    """Back from the ids of the byte tokenizer; checks bos and eos on the way (B26: one of each)."""
    texts = []
    for i in range(shards.n_docs):
        ids = shards.document(i)
        assert ids[0] == 1 and ids[-1] == 2 and ids[1:-1].min(initial=3) >= 3
        texts.append((ids[1:-1] - 3).astype(np.uint8).tobytes().decode())
    return texts


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.suffix in (".tokens", ".json") and p.name != "hashes.json"]
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_MIN", 2_000)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train(words(300), TokenizerConfig(vocab_size=400))


# --- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_the_end_of_a_single_text_is_held_out(tmp_path: Path, byte_tokenizer, suffix: str) -> None:
    text = "".join(words(50))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    done = prepare(config(tmp_path, path), byte_tokenizer)
    cut = int(len(text) * 0.9)
    assert texts_of(done.train[0]) == [text[:cut]]
    assert texts_of(done.valid[0]) == [text[cut:]]
    assert done.train[0].n_bytes == len(text[:cut].encode())
    assert done.test == []


def test_documents_are_held_out_by_their_text(tmp_path: Path, byte_tokenizer) -> None:
    """B44: a copy of a document is on the same side, in whatever file, order and company it comes."""
    texts = words(600)
    done = prepare(config(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts + texts[:200])), byte_tokenizer)
    train, valid = texts_of(done.train[0]), texts_of(done.valid[0])
    assert sorted(train + valid) == sorted(texts + texts[:200])
    assert not set(train) & set(valid)
    assert 30 <= len(set(valid)) <= 90
    random.Random(1).shuffle(texts)
    for i, text in enumerate(texts):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{i}.txt").write_text(text, encoding="utf-8")
    again = prepare(config(tmp_path, tmp_path / "folder"), byte_tokenizer)
    assert set(texts_of(again.valid[0])) == set(valid)
    assert {t for t in texts if is_held_out(t, 0.1)} == set(valid)


def test_given_splits_are_used_whole(tmp_path: Path, byte_tokenizer) -> None:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", words(20, i)) for i in range(4)]
    cfg = DataConfig(
        train=(SourceConfig(path=str(paths[0]), weight=3.0), SourceConfig(path=str(paths[1]), weight=1.0)),
        valid=(SourceConfig(path=str(paths[2]), weight=1.0),),
        test=(SourceConfig(path=str(paths[3]), weight=1.0),),
        cache_dir=str(tmp_path / "cache"),
    )
    done = prepare(cfg, byte_tokenizer)
    found = [texts_of(s) for s in [*done.train, *done.valid, *done.test]]
    assert found == [words(20, i) for i in range(4)]
    assert done.train_weights == [3.0, 1.0]
    assert [s.name for s in done.train] == [str(p) for p in paths[:2]]


def test_nothing_held_out(tmp_path: Path, byte_tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", words(20))
    done = prepare(config(tmp_path, path, valid_frac=0.0), byte_tokenizer)
    assert texts_of(done.train[0]) == words(20) and done.valid == []


def test_no_ends(tmp_path: Path, byte_tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["ab", "c"])
    done = prepare(config(tmp_path, path, valid_frac=0.0, add_bos=False, add_eos=False), byte_tokenizer)
    shards = done.train[0]
    assert (shards.tokens(0, shards.n_tokens) - 3).tolist() == list(b"abc")
    assert shards.doc_starts.tolist() == [0, 2]


def test_a_tokenizer_without_bos(tmp_path: Path, byte_tokenizer) -> None:
    byte_tokenizer.bos_id = None
    done = prepare(config(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["ab"]), valid_frac=0.0), byte_tokenizer)
    assert done.train[0].document(0).tolist() == [ord("a") + 3, ord("b") + 3, 2]


# --- edge sizes (F6) ------------------------------------------------------------------------------------------------


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, byte_tokenizer, caplog) -> None:
    caplog.set_level(logging.INFO)
    path = write_jsonl(tmp_path / "a.jsonl", ["", "a", "", "", "b"])
    done = prepare(config(tmp_path, path, valid_frac=0.0), byte_tokenizer)
    assert texts_of(done.train[0]) == ["a", "b"] and done.train[0].n_empty == 3
    assert "3 empty documents were left out" in caplog.text


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_an_empty_file(tmp_path: Path, byte_tokenizer, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="no text in it"):
        prepare(config(tmp_path, tmp_path / name), byte_tokenizer)


def test_only_empty_documents(tmp_path: Path, byte_tokenizer) -> None:
    with pytest.raises(UserError, match="no text in it: 3 documents, all of them empty"):
        prepare(config(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["", "", ""])), byte_tokenizer)


def test_an_empty_split_is_said_aloud(tmp_path: Path, byte_tokenizer, caplog) -> None:
    held_out = next(t for t in words(99) if is_held_out(t, 0.1))
    kept = next(t for t in words(99) if not is_held_out(t, 0.1))
    done = prepare(config(tmp_path, write_jsonl(tmp_path / "a.jsonl", [kept])), byte_tokenizer)
    assert done.valid == [] and "none of 1 documents fell into valid_frac=0.1" in caplog.text
    with pytest.raises(UserError, match="valid_frac holds out all 1 documents"):
        prepare(config(tmp_path, write_jsonl(tmp_path / "b.jsonl", [held_out])), byte_tokenizer)


def test_a_short_text(tmp_path: Path, byte_tokenizer) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="valid_frac holds out all 1 documents"):
        prepare(config(tmp_path, tmp_path / "a.txt"), byte_tokenizer)


# --- the cache ------------------------------------------------------------------------------------------------------


def test_nothing_is_done_twice(tmp_path: Path, byte_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path, write_jsonl(tmp_path / "a.jsonl", words(20)))
    first = prepare(cfg, byte_tokenizer)
    monkeypatch.setattr(workers, "run_job", None)
    assert prepare(cfg, byte_tokenizer).fingerprint == first.fingerprint


def test_every_input_is_part_of_the_key(tmp_path: Path, byte_tokenizer) -> None:
    """B43: changing any of them is a miss; changing none, or only where the file lies, is a hit."""
    texts = words(20)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    base = config(tmp_path, path)

    def folders() -> set[str]:
        return {p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()}

    def fingerprint(cfg: DataConfig, tokenizer: Any = byte_tokenizer, new: bool = True) -> str:
        before = folders()
        done = prepare(cfg, tokenizer)
        assert bool(folders() - before) == new
        return done.fingerprint

    (tmp_path / "cache").mkdir()
    seen = [fingerprint(base)]
    seen.append(fingerprint(config(tmp_path, path, valid_frac=0.2)))
    seen.append(fingerprint(config(tmp_path, path, add_bos=False)))
    seen.append(fingerprint(config(tmp_path, path, add_eos=False)))
    (tmp_path / "moved").mkdir()
    assert fingerprint(config(tmp_path, write_jsonl(tmp_path / "moved" / "b.jsonl", texts)), new=False) == seen[0]
    assert fingerprint(config(tmp_path, path, packing=False, workers=2), new=False) == seen[0]

    class Other(type(byte_tokenizer)):
        hash = "other"

    seen.append(fingerprint(base, Other()))

    class OtherEnds(type(byte_tokenizer)):
        eos_id = 0

    seen.append(fingerprint(base, OtherEnds()))
    rows = "".join(json.dumps({"text": t, "other": t}) + "\n" for t in texts)
    (tmp_path / "two.jsonl").write_text(rows)
    for field in ("text", "other"):
        source = SourceConfig(path=str(tmp_path / "two.jsonl"), field=field, weight=1.0)
        seen.append(fingerprint(DataConfig(train=(source,), cache_dir=str(tmp_path / "cache"))))
    write_jsonl(path, [texts[1], texts[0], *texts[2:]])  # as many bytes as before, and maybe the same time stamp
    seen.append(fingerprint(base))
    assert len(set(seen)) == len(seen)


def test_hashes_of_files_are_remembered(tmp_path: Path, byte_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", words(20))
    os.utime(path, ns=(10**18, 10**18))
    first = prepare(config(tmp_path, path), byte_tokenizer).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(storage, "sha256_of", None)
        assert prepare(config(tmp_path, path), byte_tokenizer).fingerprint == first
    write_jsonl(path, words(20, 1))
    assert prepare(config(tmp_path, path), byte_tokenizer).fingerprint != first
    (tmp_path / "cache" / "hashes.json").write_text("{broken")
    prepare(config(tmp_path, path), byte_tokenizer)


@pytest.mark.parametrize("damage", ["shard", "index", "missing"])
def test_a_damaged_cache_is_mended(tmp_path: Path, byte_tokenizer, damage: str) -> None:
    cfg = config(tmp_path, write_jsonl(tmp_path / "a.jsonl", words(20)))
    folder = prepare(cfg, byte_tokenizer).train[0].folder
    before = digests(tmp_path / "cache")
    if damage == "index":
        (folder / "index.json").write_text("{")
    elif damage == "shard":
        with (folder / "000000.tokens").open("r+b") as f:
            f.truncate(100)
    else:
        (folder / "000000.tokens").unlink()
    prepare(cfg, byte_tokenizer)
    assert digests(tmp_path / "cache") == before


def test_a_cache_that_cannot_be_written(tmp_path: Path, byte_tokenizer) -> None:
    (tmp_path / "file").write_text("")
    path = write_jsonl(tmp_path / "a.jsonl", words(5))
    with pytest.raises(MachineError, match=r"the cache cannot be written: .* \(set data.cache_dir\)"):
        prepare(DataConfig(path=str(path), cache_dir=str(tmp_path / "file" / "cache")), byte_tokenizer)


def test_a_file_that_changes_meanwhile(tmp_path: Path, byte_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", words(5))
    run_job = workers.run_job
    monkeypatch.setattr(workers, "run_job", lambda *a: (run_job(*a), write_jsonl(path, words(6))))
    with pytest.raises(UserError, match="changed while it was being read: run again"):
        prepare(config(tmp_path, path), byte_tokenizer)


# --- stopping and going on ------------------------------------------------------------------------------------------


def test_stopped_work_goes_on(tmp_path: Path, byte_tokenizer, small_units, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished units are kept; the result is what an undisturbed run makes."""
    path = write_jsonl(tmp_path / "a.jsonl", words(200))
    whole = DataConfig(path=str(path), cache_dir=str(tmp_path / "whole"))
    expected = prepare(whole, byte_tokenizer)
    ran: list[int] = []
    run_job = workers.run_job
    monkeypatch.setattr(workers, "run_job", lambda job, t: (ran.append(job.number), run_job(job, t)))
    n_units = len(list(expected.train[0].folder.glob("*.tokens")))
    assert n_units > 5
    stops = 0
    while True:
        polls = iter(range(3))
        try:
            done = prepare(config(tmp_path, path), byte_tokenizer, should_stop=lambda p=polls: next(p, 9) > 1)
            break
        except Interrupted:
            stops += 1
    assert stops >= n_units // 2 - 1
    assert ran == list(range(n_units))
    assert done.fingerprint == expected.fingerprint
    assert digests(tmp_path / "cache") == digests(tmp_path / "whole")


SCRIPT = """
import sys
from llmkit.data import prepare as p, sources
from llmkit.data.config import DataConfig
from llmkit.tokenizer import Tokenizer
p.IN_PROCESS, sources.UNIT_MIN = 0, 20_000
text, cache, tokenizer, n = sys.argv[1:]
done = p.prepare(DataConfig(path=text, cache_dir=cache, workers=int(n)), Tokenizer.load(tokenizer))
print(done.fingerprint)
"""


def start(tmp_path: Path, path: Path, cache: str, workers: int) -> subprocess.Popen[str]:
    args = [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / cache), str(tmp_path / "tokenizer"), str(workers)]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children_of(pid: int) -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                yield int(stat.parent.name)
        except OSError:
            continue


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds child processes by /proc")
def test_killed_work_goes_on_to_the_same_bytes(tmp_path: Path, bpe: Tokenizer) -> None:
    """kill -9 of the whole, at several moments; its children end by themselves; one or three processes alike."""
    bpe.save(tmp_path / "tokenizer")
    path = write_jsonl(tmp_path / "a.jsonl", words(8_000))
    assert start(tmp_path, path, "one", 1).communicate()[1] == ""
    for _ in range(2):
        process = start(tmp_path, path, "killed", 3)
        deadline = time.monotonic() + 30
        while len(list((tmp_path / "killed").glob("*/kept/*.tokens"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.002)
        children = list(children_of(process.pid))
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not list((tmp_path / "killed").glob("*/*/index.json"))
    out, err = start(tmp_path, path, "killed", 3).communicate()
    assert err == "" and out
    drop_tokenizer = {k: v for k, v in digests(tmp_path / "killed").items() if "/tokenizer/" not in k}
    assert drop_tokenizer == digests(tmp_path / "one")
    assert not list((tmp_path / "killed").rglob(".*.tmp-*"))


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even small texts are shared with children."""
    monkeypatch.setattr(prepare_module, "IN_PROCESS", 0)
    monkeypatch.setattr(sources, "UNIT_MIN", 20_000)


def test_the_number_of_processes_leaves_no_trace(tmp_path: Path, bpe: Tokenizer, parallel: None) -> None:
    """B37: and the ids are the tokenizer's own."""
    texts = words(3_000)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    made: list[Prepared] = []
    for n in (1, 2, 4):
        cfg = DataConfig(path=str(path), cache_dir=str(tmp_path / f"cache{n}"), workers=n)
        made.append(prepare(cfg, bpe))
    assert len({m.fingerprint for m in made}) == 1
    streams = [m.train[0].tokens(0, m.train[0].n_tokens).tolist() for m in made]
    assert streams[0] == streams[1] == streams[2]
    kept = [t for t in texts if not is_held_out(t, 0.1)]
    assert streams[0] == [i for t in kept for i in (bpe.bos_id, *bpe.encode(t), bpe.eos_id)]
    assert made[0].train[0].n_bytes == sum(len(t.encode()) for t in kept)


def test_a_mistake_in_the_text_reaches_the_user_from_any_process(tmp_path: Path, bpe, parallel: None) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", words(2_000))
    with path.open("a") as f:
        f.write("{}\n")
    with pytest.raises(UserError) as e:
        prepare(config(tmp_path, path, workers=3), bpe)
    assert str(e.value) == f"{path}:2001: no field 'text': there is none (set `field` in the source)"


def test_a_killed_process_is_an_error_not_a_hang(
    tmp_path: Path, bpe: Tokenizer, parallel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    child = workers._Child

    def remember(*args: Any) -> Any:
        made.append(child(*args))
        made[-1]._process.send_signal(signal.SIGKILL)
        return made[-1]

    monkeypatch.setattr(workers, "_Child", remember)
    path = write_jsonl(tmp_path / "a.jsonl", words(2_000))
    with pytest.raises(MachineError, match=r"killed by signal 9 \(SIGKILL\), often for want of memory"):
        prepare(config(tmp_path, path, workers=2), bpe)
    monkeypatch.setattr(workers, "_Child", child)
    assert prepare(config(tmp_path, path, workers=2), bpe).train[0].n_docs


def test_a_process_that_cannot_start_is_an_error(tmp_path: Path, bpe, parallel: None) -> None:
    class Broken(Tokenizer):
        """Can't be imported by its name from another process."""

    Broken.__qualname__ = "Missing"
    broken = Broken.load(_saved(bpe, tmp_path))
    path = write_jsonl(tmp_path / "a.jsonl", words(2_000))
    with pytest.raises(MachineError, match="a process that prepares data ended with code 1"):
        prepare(config(tmp_path, path, workers=2), broken)
    assert not [t for t in threading.enumerate() if "_drive" in t.name]


def _saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_fault_of_ours_is_never_swallowed(tmp_path: Path, byte_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An IndexError of a unit must not look like the end of the work; from a child it comes with its traceback."""

    def fail(*_: object) -> None:
        raise IndexError("a bug")

    monkeypatch.setattr(workers, "run_job", fail)
    with pytest.raises(IndexError, match="a bug"):
        prepare(config(tmp_path, write_jsonl(tmp_path / "a.jsonl", words(5))), byte_tokenizer)
    kind, text = workers._answer(workers.Job("", 0, (), "", "none", 0.0, 1, 2).to_json(), byte_tokenizer)
    assert kind == "fault" and "Traceback" in text and "IndexError: a bug" in text


def test_signals_are_left_to_the_parent(tmp_path: Path, bpe: Tokenizer) -> None:
    """B100: a terminal's Ctrl-C or a scheduler's SIGTERM goes to the whole group; work isn't lost by it."""
    command = [sys.executable, "-m", "llmkit.data.workers", str(_saved(bpe, tmp_path)), "llmkit.tokenizer:Tokenizer"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        path = write_jsonl(tmp_path / "a.jsonl", words(50))
        piece = sources.Piece(str(path), "jsonl", "", 0, path.stat().st_size, 0)
        (tmp_path / "kept").mkdir()
        job = workers.Job(str(tmp_path), 0, (piece,), "text", "none", 0.0, 1, 2)
        for number in (None, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if number is not None:
                process.send_signal(number)
            process.stdin.write(job.to_json() + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline()) == ["done", ""]
        process.stdin.close()
        assert process.wait(10) == 0


def test_two_runs_at_once_share_the_work(tmp_path: Path, bpe: Tokenizer) -> None:
    bpe.save(tmp_path / "tokenizer")
    path = write_jsonl(tmp_path / "a.jsonl", words(3_000))
    both = [start(tmp_path, path, "cache", 1) for _ in range(2)]
    results = [p.communicate() for p in both]
    assert results[0] == results[1] and results[0][1] == ""


def test_no_torch_where_text_is_prepared() -> None:
    """Starting a process takes a fraction of what importing torch does."""
    code = "import sys, llmkit.data.workers, llmkit.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- progress -------------------------------------------------------------------------------------------------------


def test_progress_is_lines_where_there_is_no_terminal(
    tmp_path: Path, byte_tokenizer, caplog, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(prepare_module, "_LOG_EVERY_S", 0.0)
    cfg = config(tmp_path, write_jsonl(tmp_path / "a.jsonl", words(200)))
    prepare(cfg, byte_tokenizer)
    assert "preparing: 0.0 of 0.0 MB" in caplog.text
    assert capsys.readouterr() == ("", "")
    caplog.clear()
    prepare(cfg, byte_tokenizer)
    assert "preparing" not in caplog.text
