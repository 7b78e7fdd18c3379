"""Shards hold what was written, say what they are, and are refused when they aren't that."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from llmkit import storage
from llmkit.config import MachineError, UserError
from llmkit.data.shards import Shard, ShardWriter, TokenShards, write_index

FILES = st.lists(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=7), max_size=5), min_size=1, max_size=4)


@given(files=FILES, data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_many_files_are_one_stream(make_shards, files: list[list[list[int]]], data: st.DataObject) -> None:
    documents = [d for file in files for d in file]
    stream = [t for d in documents for t in d]
    shards = make_shards(files)
    shards.verify()
    assert (shards.n_tokens, shards.n_docs, shards.n_bytes) == (len(stream), len(documents), len(stream))
    assert [shards.document(i).tolist() for i in range(len(documents))] == documents
    assert shards.doc_starts.tolist() == np.cumsum([0, *map(len, documents)])[:-1].tolist()
    a = data.draw(st.integers(0, len(stream)))
    b = data.draw(st.integers(a, len(stream)))
    assert shards.tokens(a, b).tolist() == stream[a:b]
    starts = shards.doc_starts
    assert shards.starts(a, b).tolist() == starts[(starts >= a) & (starts < b)].tolist()
    first = data.draw(st.integers(0, len(documents)))
    last = data.draw(st.integers(first, len(documents)))
    assert shards.doc_lengths(first, last).tolist() == [len(d) for d in documents[first:last]]


def write(path: Path, ids: list[int], vocab_size: int, tokenizer: str = "hash") -> Path:
    writer = ShardWriter(path, vocab_size, tokenizer)
    writer.add(np.array(ids, np.int64), [len(ids)], 10)
    writer.close()
    return path


@pytest.mark.parametrize(("vocab_size", "dtype"), [(259, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_dtype_holds_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    """B35, B36: the header says how wide ids are, and the largest id survives."""
    shard = Shard(write(tmp_path / "a.tokens", [0, vocab_size - 1], vocab_size))
    assert shard.header.dtype == dtype == shard.tokens.dtype.name
    assert shard.tokens.tolist() == [0, vocab_size - 1]
    assert shard.header.max_id == vocab_size - 1


@pytest.mark.parametrize("ids", [[0, 259], [-1], [2**40]])
def test_writer_refuses_ids_beyond_the_vocabulary(tmp_path: Path, ids: list[int]) -> None:
    """B35."""
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 259\)"):
        write(tmp_path / "a.tokens", ids, 259)
    assert not list(tmp_path.iterdir())


def test_layout_is_aligned_and_stable(tmp_path: Path) -> None:
    """Other programs may read it: the format is as the module says."""
    content = write(tmp_path / "a.tokens", [1, 2, 3], 259).read_bytes()
    magic, version, length = struct.unpack("<8sII", content[:16])
    header = json.loads(content[16 : 16 + length])
    assert (magic, version, (16 + length) % 64) == (b"LLMKTOK\0", 2, 0)
    assert np.frombuffer(content, "<u2", 3, 16 + length).tolist() == [1, 2, 3]
    assert np.frombuffer(content, "<u8", 1, 16 + length + 64).tolist() == [0]
    assert header["n_tokens"] == 3 and header["n_bytes"] == 10
    assert write(tmp_path / "b.tokens", [1, 2, 3], 259).read_bytes() == content


def edited(path: Path, **changes: object) -> Path:
    """The shard with another header, as an attacker or a bug would write it."""
    content = path.read_bytes()
    length = struct.unpack("<I", content[12:16])[0]
    text = json.dumps({**json.loads(content[16 : 16 + length]), **changes}).encode()
    text += b" " * (-(16 + len(text)) % 64)
    path.write_bytes(content[:12] + struct.pack("<I", len(text)) + text + content[16 + length :])
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"n_tokens": 4_000},
        {"n_tokens": -1},
        {"n_tokens": 10**30},
        {"n_tokens": "3"},
        {"n_docs": 2},
        {"dtype": "uint32", "n_tokens": 40},
        {"dtype": "float64"},
        {"max_id": 259},
        {"vocab_size": 3},
        {"max_id": None},
    ],
)
def test_reader_refuses_a_header_that_lies(tmp_path: Path, changes: dict[str, object]) -> None:
    """B35, B36."""
    path = edited(write(tmp_path / "a.tokens", [1, 2, 3], 259), **changes)
    with pytest.raises(UserError, match=r"a\.tokens: (damaged|holds token id)"):
        Shard(path)


def test_reader_refuses_any_truncation(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens", list(range(200)), 259)
    content = path.read_bytes()
    for size in {0, 1, 8, 15, 16, 17, *range(0, len(content), 61), len(content) - 1}:
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"a\.tokens"):
            Shard(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(UserError, match="damaged"):
        Shard(path)


def test_reader_refuses_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    np.arange(1000, dtype=np.uint16).tofile(path)
    with pytest.raises(UserError, match="not a token shard"):
        Shard(path)
    content = write(path, [1], 259).read_bytes()
    path.write_bytes(content[:8] + struct.pack("<I", 1) + content[12:])
    with pytest.raises(UserError, match="shard format 1, but 2 is read"):
        Shard(path)
    with pytest.raises(UserError, match="cannot be read"):
        Shard(tmp_path / "none")


def test_verify_finds_every_flipped_bit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens", list(range(200)), 259)
    content = path.read_bytes()
    first = 16 + struct.unpack("<I", content[12:16])[0]
    for at in range(first, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(UserError, match="doesn't match its hash"):
            Shard(path).verify()


def test_another_tokenizer_is_refused(make_shards) -> None:
    """B36, B43."""
    folder = make_shards([[[1, 2]]]).folder
    assert TokenShards(folder, "hash").n_tokens == 2
    with pytest.raises(UserError, match="made with another tokenizer: hash, not other"):
        TokenShards(folder, "other")


def test_an_unfinished_or_mixed_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.tokens", [1, 2], 259)
    with pytest.raises(UserError, match=r"index\.json is missing: prepare again"):
        TokenShards(tmp_path)
    write_index(tmp_path, ["a.tokens"])
    assert TokenShards(tmp_path).n_tokens == 2
    write(tmp_path / "a.tokens", [1, 3], 259)
    with pytest.raises(UserError, match=r"not the shard that index\.json names"):
        TokenShards(tmp_path)
    for text in ("", "[]", "{}", '{"shards": [1]}', "\xff"):
        (tmp_path / "index.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match="damaged"):
            TokenShards(tmp_path)


def test_empty_shards(make_shards) -> None:
    shards = make_shards([[], []])
    assert (shards.n_tokens, shards.n_docs) == (0, 0)
    assert shards.tokens(0, 0).tolist() == shards.doc_starts.tolist() == shards.doc_lengths().tolist() == []
    with pytest.raises(IndexError):
        shards.document(0)
    with pytest.raises(IndexError):
        shards.tokens(0, 1)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.disk, "write", full)
    with pytest.raises(MachineError, match=r"a\.tokens: cannot be written: No space left on device"):
        write(tmp_path / "a.tokens", [1], 259)
    assert not (tmp_path / "a.tokens").exists()
