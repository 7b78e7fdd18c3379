"""Labelled texts become rows with a class or numbers; what is wrong with one is told with its file and row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkit.config import Interrupted, UserError
from llmkit.data.config import DataConfig
from llmkit.data.examples import ExampleRows, LabelledData, prepare_examples
from llmkit.data.loader import RowLoader
from llmkit.data.packing import IGNORE
from llmkit.tokenizer import Tokenizer, TokenizerConfig

BYTES = Tokenizer.train((), TokenizerConfig(kind="byte"))


def written(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(file)


def made(tmp_path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> LabelledData:
    source = {"path": written(tmp_path / "train.jsonl", rows), "columns": options.pop("columns", {})}
    data = {"train": [source], "valid_frac": 0.0}
    data |= {k: options.pop(k) for k in ("valid", "valid_frac", "add_eos") if k in options}
    cfg = DataConfig.model_validate_json(json.dumps({**data, "cache_dir": str(tmp_path / "cache")}))
    defaults = {"kind": "classify", "classes": (), "row_len": 32}
    return prepare_examples(cfg, BYTES, **{**defaults, **options})


ROWS = [{"text": f"text {i}", "label": "10" if i % 3 else "9"} for i in range(30)]


def test_ids_and_classes(tmp_path: Path) -> None:
    """Numbers sort as numbers; every text is between bos and eos."""
    data = made(tmp_path, ROWS)
    (train,) = data.train
    assert data.classes == ("9", "10") and len(train) == 30 and train.n_cut == 0
    for i, row in enumerate(ROWS):
        ids = train.ids(i).tolist()
        assert ids[0] == BYTES.bos_id and ids[-1] == BYTES.eos_id and BYTES.decode(ids) == row["text"]
        assert data.classes[train.targets[i]] == row["label"]


def test_a_long_text_is_cut_and_keeps_its_end_token(tmp_path: Path) -> None:
    """The score is read there (B78, B79)."""
    data = made(tmp_path, [{"text": "x" * 100, "label": 1}, {"text": "y", "label": 2}])
    ids = data.train[0].ids(0).tolist()
    assert len(ids) == 32 and ids[-1] == BYTES.eos_id and data.train[0].n_cut == 1


def test_columns_and_conversations(tmp_path: Path) -> None:
    rows = [{"review": "gut", "stars": n} for n in (1, 2)]
    assert made(tmp_path, rows, columns={"text": "review", "label": "stars"}).classes == ("1", "2")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<|eos|> ho"}]
    data = made(tmp_path, [{"m": chat, "label": 0.5}], kind="regress", columns={"messages": "m"}, row_len=200)
    assert data.train[0].ids(0).tolist() == BYTES.encode_chat(chat).ids
    short = made(tmp_path, [{"m": chat, "label": 0.5}], kind="regress", columns={"messages": "m"}, row_len=20)
    assert short.train[0].ids(0).tolist() == BYTES.encode_chat(chat).ids[-20:] and short.train[0].n_cut == 1


def test_numbers(tmp_path: Path) -> None:
    one = made(tmp_path, [{"text": "a", "label": 2}, {"text": "b", "label": -0.5}], kind="regress")
    assert one.train[0].targets.tolist() == [[2.0], [-0.5]] and one.classes == ()
    two = made(tmp_path, [{"text": "a", "label": [1, 2]}, {"text": "b", "label": [3, 4]}], kind="regress")
    assert two.train[0].targets.tolist() == [[1, 2], [3, 4]]


def test_held_out_by_text(tmp_path: Path) -> None:
    """B44: copies of a text lie on one side; both sides together are everything."""
    data = made(tmp_path, ROWS * 2, valid_frac=0.3)
    texts = [{BYTES.decode(e.ids(i)) for i in range(len(e))} for e in (data.train[0], data.valid[0])]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 30 and len(texts[1]) > 2
    assert len(data.train[0]) + len(data.valid[0]) == 60


def test_the_cache_follows_what_it_depends_on(tmp_path: Path) -> None:
    """B43: the second call reads no file; another text, column, length or kind makes a new one."""
    first = made(tmp_path, ROWS)
    again = made(tmp_path, ROWS)
    assert again.fingerprint == first.fingerprint
    caches = len(list((tmp_path / "cache").glob("*.examples.safetensors")))
    assert caches == 1
    for options in ({"row_len": 16}, {"add_eos": False}, {"columns": {"text": "label"}}):
        made(tmp_path, ROWS, **options)
        caches += 1
        assert len(list((tmp_path / "cache").glob("*.examples.safetensors"))) == caches
    assert made(tmp_path, [*ROWS, {"text": "new", "label": "9"}]).fingerprint != first.fingerprint
    file = next((tmp_path / "cache").glob("*.examples.safetensors"))
    for f in (tmp_path / "cache").glob("*.examples.safetensors"):
        f.write_bytes(f.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"examples\.safetensors: damaged"):
        made(tmp_path, ROWS)
    assert file.is_file()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}], {}, r"train\.jsonl:1: no field 'label'"),
        ([{"text": "a", "label": "x"}, {"text": "", "label": "y"}], {}, r"train\.jsonl:2: text: text is expected"),
        ([{"text": 5, "label": "x"}], {}, r"train\.jsonl:1: text: text is expected \(got 5\)"),
        ([{"text": "a", "label": 1.5}], {}, r"train\.jsonl:1: label: the name or number of a class"),
        ([{"text": "a", "label": "x"}] * 3, {}, "every label is 'x': a classifier needs at least two"),
        (ROWS, {"classes": ("9", "11")}, r"train\.jsonl:2: label '10' is none of the classes '9', '11'"),
        ([{"text": "a", "label": "good"}], {"kind": "regress"}, r"train\.jsonl:1: label: a number"),
        ([{"text": "a", "label": True}], {"kind": "regress"}, r"train\.jsonl:1: label: a number"),
        (
            [{"text": "a", "label": [1, 2]}, {"text": "b", "label": [1]}],
            {"kind": "regress"},
            r"train\.jsonl:2: 1 numbers, the first row has 2",
        ),
        ([{"messages": "hi", "label": 1}], {"columns": {"messages": "messages"}}, r"train\.jsonl:1: "),
        ([], {}, r"train\.jsonl: no labelled text"),
    ],
)
def test_mistakes(tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        made(tmp_path, rows, **options)
    assert "\n" not in str(e.value)


def test_a_signal_is_heard(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        made(tmp_path, ROWS, should_stop=lambda: True)
    assert not list((tmp_path / "cache").glob("*.examples.safetensors"))


@pytest.mark.parametrize("kind", ["classify", "regress"])
def test_batches(tmp_path: Path, kind: str) -> None:
    """Rows of padding have no target; every example is evaluated once on any number of ranks (B46)."""
    rows = [{"text": f"text {i}" * (i % 3 + 1), "label": i % 4} for i in range(7)]
    data = made(tmp_path, rows, kind=kind)
    makers = ExampleRows(data.train, row_len=32, pad_id=0)
    seen: list[float] = []
    for rank in range(2):
        loader = RowLoader(makers, rows_per_step=4, rank=rank, world=2, micro_rows=2, prefetch=0)
        for batch in loader.eval_batches():
            real = batch.lengths_B > 0
            empty = batch.targets.isnan().any(-1) if kind == "regress" else batch.targets == IGNORE
            assert torch.equal(real, ~empty) and batch.denominator == real.sum()
            assert batch.ids_BT.shape[1] % 8 == 0
            for i in range(len(real)):
                assert (batch.ids_BT[i, int(batch.lengths_B[i]) :] == 0).all()
            seen += batch.targets[real].flatten().tolist()
    assert sorted(seen) == sorted(i % 4 for i in range(7))
    whole = RowLoader(makers, rows_per_step=4, prefetch=0, seed=1)
    parts = [RowLoader(makers, rows_per_step=4, rank=r, world=2, prefetch=0, seed=1) for r in range(2)]
    assert np.array_equal(
        torch.cat([b.targets for p in parts for b in p.step(3)]).numpy(), whole.step(3)[0].targets.numpy()
    )
    assert sum(p.tokens_hash(3) for p in parts) % 2**63 == whole.tokens_hash(3)
