"""A tokenizer is trained on the text that a model is trained on, once, however many jobs ask for it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmkit.config import validate
from llmkit.data import texts as texts_module
from llmkit.data.config import DataConfig
from llmkit.data.prepare import prepare
from llmkit.data.texts import obtain_tokenizer, texts
from llmkit.data.workers import HELD_OUT
from llmkit.tokenizer import TokenizerConfig


def corpus(folder: Path) -> list[str]:
    rng = random.Random(0)
    good = [" ".join(rng.choices(["mill", "river", "stone", "bridge", "磨坊", "小河"], k=12)) for _ in range(120)]
    rows = [*good, good[3].upper(), "short", "\x00\x01 control characters", good[7], "https://a.example/b\n" + good[0]]
    rng.shuffle(rows)
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in rows), "utf-8")
    return rows


@pytest.mark.parametrize("frac", [0.0, 0.3])
def test_the_same_documents_as_the_model_sees(tmp_path: Path, byte_tokenizer, frac: float) -> None:
    corpus(tmp_path)
    source = {"path": str(tmp_path / "a.jsonl"), "template": "<{body}>", "limit": 122}
    told = {"train": [source], "valid_frac": frac, "clean": "default", "dedup": "exact"}
    cfg = validate(DataConfig, {**told, "cache_dir": str(tmp_path / "cache")})
    done = prepare(cfg, byte_tokenizer)
    for split, shards in ((None, done.train), (HELD_OUT, done.valid)):
        found = list(texts(cfg, str, split) if split else texts(cfg, str))
        seen = [(s.document(i)[1:-1] - 3).astype(np.uint8).tobytes().decode() for s in shards for i in range(s.n_docs)]
        assert found == seen and all(t.startswith("<") for t in found)
        assert not split or bool(found) == bool(frac)
    assert done.train[0].removed.keys() >= {"exact_copy", "min_chars"}


def test_given_validation_text_is_left_as_it_is(tmp_path: Path) -> None:
    rows = corpus(tmp_path)
    source = {"path": str(tmp_path / "a.jsonl"), "field": "body"}
    cfg = validate(DataConfig, {"train": [source], "valid": [source], "clean": "default", "dedup": "near"})
    assert list(texts(cfg, str, HELD_OUT)) == rows
    assert len(list(texts(cfg, str))) < len(rows)


SCRIPT = """
import sys
from pathlib import Path
from llmkit.data import texts
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.tokenizer import TokenizerConfig
train = texts._train
texts._train = lambda *a: (print("trained"), train(*a))[1]
data = DataConfig(train=(SourceConfig(path=sys.argv[1], field="body"),))
print(texts.obtain_tokenizer(TokenizerConfig(kind="unigram", vocab_size=300), data, Path(sys.argv[2])).hash)
"""


def test_jobs_that_come_at_once_share_one_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unigram training is not deterministic: two tokenizers would make shards that don't fit each other."""
    corpus(tmp_path)
    args = [sys.executable, "-c", SCRIPT, str(tmp_path / "a.jsonl"), str(tmp_path / "out")]
    jobs = [subprocess.Popen(args, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [job.communicate()[0].split() for job in jobs]
    assert sum("trained" in t for t in told) == 1
    assert len({t[-1] for t in told}) == 1
    monkeypatch.setattr(texts_module, "_train", None)
    cfg, data = TokenizerConfig(kind="unigram", vocab_size=300), DataConfig(path="missing")
    assert obtain_tokenizer(cfg, data, tmp_path / "out").hash == told[0][-1]
