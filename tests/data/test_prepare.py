"""Preparing is repeatable, resumable, parallel without a trace of it, and keyed by all that it depends on."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import re
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

from llmkit import cli, storage
from llmkit.config import Interrupted, MachineError, UserError, validate
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
    for how in ({}, {"field": "other"}, {"template": "{text}"}, {"template": "{other}"}, {"limit": 15}, {"limit": 16}):
        source = SourceConfig(path=str(tmp_path / "two.jsonl"), **how)
        seen.append(fingerprint(DataConfig(train=(source,), cache_dir=str(tmp_path / "cache"))))
    named = SourceConfig(path=str(tmp_path / "two.jsonl"), name="two", weight=2.0)
    fingerprint(DataConfig(train=(named,), cache_dir=str(tmp_path / "cache")), new=False)
    for clean in ({"min_chars": 2}, {"min_chars": 3}, {"drop_url_lines": True}, "default"):
        seen.append(fingerprint(validate(DataConfig, {**base.model_dump(), "clean": clean})))
    fingerprint(validate(DataConfig, {**base.model_dump(), "clean": {"preset": "default"}}), new=False)
    other = str(write_jsonl(tmp_path / "other.jsonl", words(9, 5)))
    for dedup in ("exact", "near", {"kind": "near", "threshold": 0.7}, {"kind": "near", "ngram": 3},
                  {"kind": "near", "permutations": 64}):  # fmt: skip
        told = {**base.model_dump(), "valid_frac": 0.0, "dedup": dedup}
        seen.append(fingerprint(validate(DataConfig, told)))
        seen.append(fingerprint(validate(DataConfig, {**told, "valid": [{"path": other}]})))
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
text, cache, tokenizer, n, part = sys.argv[1:]
part = tuple(map(int, part.split("/"))) if part else None
done = p.prepare(DataConfig(path=text, cache_dir=cache, workers=int(n)), Tokenizer.load(tokenizer), part=part)
print(done and done.fingerprint)
"""


def start(tmp_path: Path, path: Path, cache: str, workers: int, part: str = "") -> subprocess.Popen[str]:
    args = [str(path), str(tmp_path / cache), str(tmp_path / "tokenizer"), str(workers), part]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


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
    assert digests(tmp_path / "killed") == digests(tmp_path / "one")
    assert not list((tmp_path / "killed").rglob(".*.tmp-*"))


# --- rules and copies -------------------------------------------------------------------------------------------------


def both_kinds(tmp_path: Path, cache: str, **more: Any) -> DataConfig:
    """Two training sources and given validation text, cleaned, without copies."""
    rng = random.Random(3)
    good = [" ".join(rng.choices([f"w{i}" for i in range(500)], k=60)) for _ in range(300)]
    held_out = [" ".join(rng.choices([f"v{i}" for i in range(500)], k=60)) for _ in range(20)]
    planted = [t.upper() for t in good[:20]] + [t + " more" for t in good[20:40]]
    planted += [held_out[0], held_out[1] + " more", "short", "\x00" + "binary " * 9, ""]
    rng.shuffle(both := good + planted)
    paths = {
        "a": write_jsonl(tmp_path / "a.jsonl", both[:200]),
        "b": write_jsonl(tmp_path / "b.jsonl", both[200:]),
        "v": write_jsonl(tmp_path / "v.jsonl", [*held_out, held_out[0], "tiny"]),
    }
    told = {
        "train": [{"path": str(paths["a"])}, {"path": str(paths["b"]), "name": "second"}],
        "valid": [{"path": str(paths["v"])}],
        "cache_dir": str(tmp_path / cache),
        "clean": "default",
        "dedup": "near",
    }
    return validate(DataConfig, {**told, **more})


def test_what_breaks_a_rule_or_is_a_copy_is_left_out_and_told(tmp_path: Path, byte_tokenizer, caplog) -> None:
    caplog.set_level(logging.INFO)
    cfg = both_kinds(tmp_path, "cache")
    done = prepare(cfg, byte_tokenizer)
    texts = [json.loads(line)["text"] for p in ("a", "b") for line in (tmp_path / f"{p}.jsonl").open()]
    totals: dict[str, int] = {}
    for shards in done.train:
        for reason, told in shards.removed.items():
            totals[reason] = totals.get(reason, 0) + told.documents
            file, line = told.example.rsplit(":", 1)
            text = json.loads(Path(file).read_text("utf-8").splitlines()[int(line) - 1])["text"]
            assert text not in texts_of(shards) and told.chars >= len(text)
            assert f"{shards.name}: {reason}: {told.documents} documents of {told.chars:,} char" in done.report()
    assert totals == {"min_chars": 1, "max_control_chars": 1, "exact_copy": 20, "near_copy": 20, "copy_of_held_out": 2}
    kept = [t for s in done.train for t in texts_of(s)]
    assert kept == [t for t in texts if t in set(kept)] and len(kept) == 300
    assert sum(s.n_empty for s in done.train) == 1
    assert "were left out: " in caplog.text and "second: " in caplog.text
    # What is measured on stays as it was given.
    assert texts_of(done.valid[0])[-2:] == [texts_of(done.valid[0])[0], "tiny"] and done.valid[0].removed == {}


def test_held_out_documents_have_no_copies_in_training(tmp_path: Path, byte_tokenizer) -> None:
    """B44: a share held out by the hash of the text, with near copies all around."""
    rng = random.Random(0)
    originals = [" ".join(rng.choices([f"w{i}" for i in range(500)], k=60)) for _ in range(200)]
    texts = originals + [f"{t} {i}" for i in range(3) for t in originals]
    rng.shuffle(texts)
    cfg = validate(DataConfig, {
        "path": str(write_jsonl(tmp_path / "a.jsonl", texts)), "cache_dir": str(tmp_path / "cache"), "dedup": "near",
        "valid_frac": 0.3,
    })  # fmt: skip
    done = prepare(cfg, byte_tokenizer)
    train, valid = ([frozenset(t.split()[:60]) for t in texts_of(s[0])] for s in (done.train, done.valid))
    assert len(train) + len(valid) == 200 and len(valid) > 30
    assert not set(train) & set(valid)


def test_exact_copies_alone(tmp_path: Path, byte_tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one two", "One  TWO", "one two three", "one two"])
    cfg = validate(DataConfig, {"path": str(path), "cache_dir": str(tmp_path / "c"), "valid_frac": 0, "dedup": "exact"})
    done = prepare(cfg, byte_tokenizer)
    assert texts_of(done.train[0]) == ["one two", "one two three"]
    assert done.train[0].removed["exact_copy"].documents == 2


def test_nothing_left(tmp_path: Path, byte_tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    cfg = validate(DataConfig, {"path": str(path), "cache_dir": str(tmp_path / "c"), "clean": "default"})
    with pytest.raises(UserError, match=r"no text in it: all 2 documents were left out \(min_chars 2\)"):
        prepare(cfg, byte_tokenizer)


def test_a_source_depends_on_those_before_it_only(tmp_path: Path, byte_tokenizer, monkeypatch) -> None:
    """Another source behind leaves the tokens of the first alone; another tokenizer leaves the verdicts."""
    cfg = both_kinds(tmp_path, "cache")
    first = prepare(cfg.model_copy(update={"train": cfg.train[:1]}), byte_tokenizer).train[0].folder
    assert prepare(cfg, byte_tokenizer).train[0].folder == first

    class Other(type(byte_tokenizer)):
        hash = "other"

    monkeypatch.setattr(workers.SignatureJob, "run", None)
    monkeypatch.setattr(prepare_module.dedup, "CopyFinder", None)
    assert prepare(cfg, Other()).train[0].n_docs == prepare(cfg, byte_tokenizer).train[0].n_docs


def test_stopped_in_any_phase(tmp_path: Path, byte_tokenizer, small_units) -> None:
    """Signatures, the search for copies, tokens: stopped again and again, the result is the same."""
    cfg = both_kinds(tmp_path, "whole")
    prepare(cfg, byte_tokenizer)
    cfg = both_kinds(tmp_path, "stopped")
    for patience in range(1, 99):
        polls = iter(range(patience))
        try:
            prepare(cfg, byte_tokenizer, should_stop=lambda p=polls: next(p, None) is None)
            break
        except Interrupted:
            continue
    assert patience > 5
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


# --- parts ------------------------------------------------------------------------------------------------------------


def all_digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "hashes.json")]
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("kind", [None, "near"])
def test_parts_make_what_one_job_makes(
    tmp_path: Path, byte_tokenizer, small_units, kind: str | None, monkeypatch, capsys
) -> None:
    """In any order; without copies to look for in one round, else in two; the last call only writes the index."""
    prepare(both_kinds(tmp_path, "one", dedup={"kind": kind}), byte_tokenizer)
    cfg = both_kinds(tmp_path, "parts", dedup={"kind": kind})
    for i in (3, 1, 2):
        assert prepare(cfg, byte_tokenizer, part=(i, 3)) is None
    told = capsys.readouterr().out.splitlines()
    if kind:
        assert re.fullmatch(r"part 3/3: signatures done, but those of \d+ units are missing: when all .*", told[0])
        # The last of the first round went on at once.
        assert told[2].startswith("part 2/3: done; ")
        for i in (1, 3):
            assert prepare(cfg, byte_tokenizer, part=(i, 3)) is None
        told = capsys.readouterr().out.splitlines()
    assert told[-1].endswith("done; and so are all others; at the end run without `part`, which writes the index")
    assert not list((tmp_path / "parts").glob("*/*/index.json"))
    with monkeypatch.context() as patch:
        patch.setattr(workers, "run_job", None)
        prepare(cfg, byte_tokenizer)
    assert all_digests(tmp_path / "parts") == all_digests(tmp_path / "one")


def test_a_part_is_every_nth_unit(tmp_path: Path, byte_tokenizer, small_units, monkeypatch, capsys) -> None:
    """Counted from 1 over all sources; what another job has done meanwhile changes nothing."""
    cfg = both_kinds(tmp_path, "cache", dedup={})
    ran: list[tuple[str, int]] = []
    run_job = workers.run_job
    monkeypatch.setattr(workers, "run_job", lambda job, t: (ran.append((job.folder, job.number)), run_job(job, t)))
    prepare(both_kinds(tmp_path, "whole", dedup={}), byte_tokenizer)
    whole = [(Path(folder).name, n) for folder, n in ran]
    for i in (2, 1, 4, 3):
        ran.clear()
        prepare(cfg, byte_tokenizer, part=(i, 4))
        assert [(Path(folder).name, n) for folder, n in ran] == whole[i - 1 :: 4]
    prepare(cfg, byte_tokenizer, part=(2, 4))
    assert len(whole) > 20


def test_parts_run_at_once(tmp_path: Path, bpe: Tokenizer) -> None:
    """Two jobs on one cache, each with children of its own."""
    bpe.save(tmp_path / "tokenizer")
    path = write_jsonl(tmp_path / "a.jsonl", words(3_000))
    assert start(tmp_path, path, "one", 1).communicate()[1] == ""
    both = [start(tmp_path, path, "parts", 2, f"{i}/2") for i in (1, 2)]
    results = [p.communicate() for p in both]
    assert all("None" in out for out, _ in results), results
    assert start(tmp_path, path, "parts", 1).communicate()[1] == ""
    assert all_digests(tmp_path / "parts") == all_digests(tmp_path / "one")


@pytest.mark.parametrize("text", ["3", "0/3", "4/3", "1/0", "a/b", "1/2/3", "-1/3", ""])
def test_a_part_that_is_none(tmp_path: Path, text: str, capsys) -> None:
    (tmp_path / "r.yaml").write_text("stage: pretrain\n")
    assert cli.main(["prepare", str(tmp_path / "r.yaml"), f"part={text}"]) == 2
    assert f"part={text}: expected part=I/N, job I of N, counted from 1" in capsys.readouterr().err


def test_part_is_not_part_of_the_recipe(tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = {
        "stage": "pretrain", "out": str(tmp_path / "run"), "steps": 1, "batch": {"tokens_per_step": 64},
        "tokenizer": {"kind": "byte"}, "model": {"n_layers": 1, "n_heads": 1, "d_model": 8, "max_seq_len": 64},
        "data": {"path": str(write_jsonl(tmp_path / "a.jsonl", words(50))), "cache_dir": str(tmp_path / "cache")},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "r.yaml", "part=2/2"]) == 0
    assert "part 2/2: done; 1 units are missing that other parts make" in capsys.readouterr().out
    assert cli.main(["prepare", "r.yaml", "part=1/2", "seed=3"]) == 0
    assert cli.main(["prepare", "r.yaml"]) == 0
    (tmp_path / "t.yaml").write_text(json.dumps({k: recipe[k] for k in ("out", "data")} | {"stage": "tokenizer"}))
    assert cli.main(["prepare", "t.yaml", "part=1/2"]) == 2
    assert "there is nothing to prepare in parts" in capsys.readouterr().err


# --- streams, names ---------------------------------------------------------------------------------------------------


def test_a_stream_is_prepared_in_parallel_and_resumed(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, parallel: None
) -> None:
    """The same tokens as from the files; a shard that is done is not read again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    for i in range(5):
        write_jsonl(tmp_path / "files" / f"{i}.jsonl", words(50, i))
    told = {"path": "json", "data_files": str(tmp_path / "files" / "*.jsonl"), "stream": True}
    made = []
    for n in (1, 2):
        cfg = validate(DataConfig, {"train": [told], "cache_dir": f"cache{n}", "workers": n, "valid_frac": 0})
        made.append(prepare(cfg, bpe))
    local = prepare(DataConfig(path=str(tmp_path / "files"), cache_dir="local", valid_frac=0.0), bpe)
    streams = [d.train[0].tokens(0, d.train[0].n_tokens).tolist() for d in (*made, local)]
    assert streams[0] == streams[1] == streams[2]
    assert made[0].fingerprint == made[1].fingerprint
    assert len(list(made[0].train[0].folder.glob("*.tokens"))) == 5
    (made[0].train[0].folder / "index.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(workers, "run_job", None)
        prepare(validate(DataConfig, {"train": [told], "cache_dir": "cache1", "valid_frac": 0}), bpe)
    write_jsonl(tmp_path / "files" / "3.jsonl", words(50, 99))
    cfg = validate(DataConfig, {"train": [told], "cache_dir": "cache1", "workers": 1, "valid_frac": 0})
    assert prepare(cfg, bpe).fingerprint != made[0].fingerprint


def test_names_and_epochs(tmp_path: Path, byte_tokenizer) -> None:
    paths = [str(write_jsonl(tmp_path / f"{i}.jsonl", words(20, i))) for i in range(4)]
    told = {
        "train": [{"path": paths[0], "epochs": 1}, {"path": paths[1], "epochs": 0.5, "name": "web"}],
        "valid": [{"path": paths[2], "name": "zh"}, {"path": paths[3], "name": "en"}],
        "cache_dir": str(tmp_path / "cache"),
    }
    done = prepare(validate(DataConfig, told), byte_tokenizer)
    assert [s.name for s in done.train] == [paths[0], "web"] and [s.name for s in done.valid] == ["zh", "en"]
    for change, message in (
        ({"train": [told["train"][0], {"path": "b"}]}, "`epochs` counts for all sources of `train` or for none: b has"),
        ({"valid": [{"path": "a", "name": "x"}, {"path": "b", "name": "x"}]}, "valid: two sources are named 'x'"),
        ({"valid": [{"path": "a", "weight": 2}]}, "valid: a: weight and epochs are for training"),
        ({"test": [{"path": "a", "epochs": 2}]}, "test: a: weight and epochs are for training"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            validate(DataConfig, {**told, **change})
    with pytest.raises(UserError, match="`columns` is for stages that read several"):
        prepare(validate(DataConfig, {"train": [{"path": paths[0], "columns": {"a": "b"}}]}), byte_tokenizer)


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
    kind, text = workers._answer(
        workers.TokenJob("", 0, (), "", None, None, "none", 0.0, 1, 2).to_json(), byte_tokenizer
    )
    assert kind == "fault" and "Traceback" in text and "IndexError: a bug" in text


def test_signals_are_left_to_the_parent(tmp_path: Path, bpe: Tokenizer) -> None:
    """B100: a terminal's Ctrl-C or a scheduler's SIGTERM goes to the whole group; work isn't lost by it."""
    command = [sys.executable, "-m", "llmkit.data.workers", str(_saved(bpe, tmp_path)), "llmkit.tokenizer:Tokenizer"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        path = write_jsonl(tmp_path / "a.jsonl", words(50))
        piece = sources.Piece(str(path), "jsonl", "", 0, path.stat().st_size, 0)
        (tmp_path / "kept").mkdir()
        job = workers.TokenJob(str(tmp_path), 0, (piece,), "text", None, None, "none", 0.0, 1, 2)
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
