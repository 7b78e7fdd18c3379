"""Small shards made by hand, and a tokenizer whose ids are the bytes of the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from llmkit import storage
from llmkit.data.shards import ShardWriter, TokenShards, write_index

MakeShards = Callable[..., TokenShards]


class Bytes:
    """Ids 3.. are bytes; 0 pad, 1 bos, 2 eos."""

    vocab_size, bos_id, eos_id, hash = 259, 1, 2, "bytes"

    def normalize(self, text: str) -> str:
        return text

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        return [np.frombuffer(t.encode(), np.uint8).astype(np.uint16) + 3 for t in texts]

    def save(self, folder: str | Path) -> None:
        raise AssertionError("small texts are prepared without other processes")


@pytest.fixture
def byte_tokenizer() -> Bytes:
    return Bytes()


@pytest.fixture
def make_shards(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> MakeShards:
    """make_shards([files of [documents of [ids]]]): one shard file per outer entry; hundreds of them, so not synced."""
    monkeypatch.setattr(storage.disk, "sync", lambda fd: None)

    def make(files: Sequence[Sequence[Sequence[int]]], vocab_size: int = 50_000) -> TokenShards:
        folder = tmp_path_factory.mktemp("shards")
        names = []
        for n, documents in enumerate(files):
            names.append(f"{n:06d}.tokens")
            writer = ShardWriter(folder / names[-1], vocab_size, "hash")
            for ids in documents:
                writer.add(np.array(ids, np.int64), [len(ids)], len(ids))
            writer.close()
        write_index(folder, names)
        return TokenShards(folder)

    return make
