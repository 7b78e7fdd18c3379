"""Judged steps as rows of ids: where a step ends, what is cut, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.config import Interrupted, UserError
from llmkit.data.config import DataConfig
from llmkit.data.layouts import Steps
from llmkit.data.loader import PADDING
from llmkit.data.steps import StepData, StepRows, encode_steps, prepare_steps
from llmkit.tokenizer import Tokenizer, TokenizerConfig

CHAT = [{"role": "user", "content": "2 + 3 * 4?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([], TokenizerConfig(kind="byte"))


def prepared(
    folder: Path, rows: list[dict[str, Any]], tokenizer: Tokenizer, row_len: int = 96, **data: Any
) -> StepData:
    (folder / "steps.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    cfg = DataConfig(
        **{"path": str(folder / "steps.jsonl"), "cache_dir": str(folder / "cache"), "valid_frac": 0.0, **data}
    )
    return prepare_steps(cfg, tokenizer, separator="\n", row_len=row_len)


def test_a_step_ends_at_its_separator(tokenizer: Tokenizer) -> None:
    """The ids before each end are prompt and steps exactly as they are written one after the other."""
    steps = ["3 * 4 is 12.", "2 + 12 is 14."]
    ids, ends, n_prompt, was_cut = encode_steps(tokenizer, Steps(CHAT, steps, [1, 1]), "\n\n", 200, True)
    text = tokenizer.decode(ids, skip_special=False)
    assert text.endswith("<|im_start|>assistant\n3 * 4 is 12.\n\n2 + 12 is 14.\n\n") and not was_cut
    assert tokenizer.decode(ids[:n_prompt], skip_special=False).endswith("assistant\n")
    for n, end in enumerate(ends, 1):
        assert tokenizer.decode(ids[n_prompt : end + 1]) == "".join(f"{s}\n\n" for s in steps[:n])
    plain, _, n_plain, _ = encode_steps(tokenizer, Steps("2 + 3?", steps, [1, 1]), "\n", 200, False)
    assert tokenizer.decode(plain[:n_plain]) == "2 + 3?" and plain[0] == tokenizer.bos_id


def test_what_does_not_fit(tokenizer: Tokenizer) -> None:
    """The prompt loses its beginning first; then steps are left out from the end."""
    whole, ends, n_prompt, _ = encode_steps(tokenizer, Steps(CHAT, ["a" * 10, "b" * 10], [1, 0]), "\n", 200, True)
    ids, cut_ends, n_cut, was_cut = encode_steps(tokenizer, Steps(CHAT, ["a" * 10, "b" * 10], [1, 0]), "\n", 30, True)
    assert was_cut and ids == whole[-30:] and n_cut == 8
    assert [e - (n_cut - n_prompt) for e in cut_ends] == ends
    ids, ends, n_prompt, was_cut = encode_steps(tokenizer, Steps(CHAT, ["a" * 10, "b" * 20], [1, 0]), "\n", 20, True)
    assert was_cut and len(ends) == 1 and len(ids) == 20 and n_prompt == 9
    with pytest.raises(UserError, match="step_separator '' has no tokens"):
        encode_steps(tokenizer, Steps(CHAT, ["a"], [1]), "", 20, True)


@pytest.mark.parametrize("key", ["steps", "completions"])
def test_layouts_labels_and_batches(tokenizer: Tokenizer, tmp_path: Path, key: str) -> None:
    """Ours and TRL's; an unlabelled step is read and not judged; a row of padding has no step."""
    rows = [
        {"prompt": "p", key: ["one", "two", "three"], "labels": [True, None, False]},
        {"prompt": "q", key: ["four"], "labels": [0.25]},
    ]
    data = prepared(tmp_path, rows, tokenizer)
    (source,) = data.train
    assert len(source) == 2 and source.labels.tolist() == [1, 0, 0.25] and source.step_starts.tolist() == [0, 2, 3]
    maker = StepRows([source], row_len=96, pad_id=tokenizer.pad_id)
    batch, tokens = maker.batch(np.arange(3), np.array([0, PADDING, 0]), np.array([1, 0, 0]))
    assert batch.denominator == 3 and batch.rows_S.tolist() == [0, 2, 2] and batch.labels_S.tolist() == [0.25, 1, 0]
    assert batch.lengths_B.tolist() == [len(t) for t in tokens] and batch.lengths_B[1] == 0
    newline = tokenizer.encode("\n")[-1]
    assert {int(batch.ids_BT[r, e]) for r, e in zip(batch.rows_S, batch.ends_S, strict=True)} == {newline}
    assert batch.n_tokens == sum(map(len, tokens))


def test_the_cache_and_the_split(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """B43, B44: read once; another separator or row length is another file; all rows of a prompt are on one side."""
    rows = [{"prompt": f"p{i % 40}", "steps": [f"s{i}"], "labels": [i % 2]} for i in range(120)]
    first = prepared(tmp_path, rows, tokenizer, valid_frac=0.3)
    assert first.fingerprint == prepared(tmp_path, rows, tokenizer, valid_frac=0.3).fingerprint
    n_files = len(list((tmp_path / "cache").glob("*.steps.safetensors")))
    assert prepared(tmp_path, rows, tokenizer, row_len=64).fingerprint != first.fingerprint and n_files == 1
    assert len(list((tmp_path / "cache").glob("*.steps.safetensors"))) == 2
    prompts = [{tuple(s.ids(i)[: s.prompt_lengths[i]]) for i in range(len(s))} for s in (*first.train, *first.valid)]
    assert not prompts[0] & prompts[1] and sum(map(len, prompts)) == 40
    assert len(first.train[0]) + len(first.valid[0]) == 120


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "steps": ["a"], "labels": [2]}, r"steps.jsonl:2: labels: item 0: a number from 0 \(wrong\)"),
        ({"prompt": "p", "steps": ["a"], "labels": []}, "steps.jsonl:2: labels: 0 of them for 1 steps"),
        ({"prompt": "p", "steps": ["a"], "labels": [None]}, "1 of 2 rows .* no step is labelled"),
        (
            {"prompt": "p", "steps": ["a" * 99], "labels": [1]},
            "1 of 2 rows .* no labelled step fits a row of 96 tokens",
        ),
    ],
)
def test_wrong_rows(tokenizer: Tokenizer, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"prompt": "p", "steps": ["a"], "labels": [1]}
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, [good, row], tokenizer)
    if "of 2 rows" in message:  # allowed, it is left out
        assert len(prepared(tmp_path, [good, row], tokenizer, max_dropped_frac=0.5).train[0]) == 1


def test_it_stops_when_asked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"prompt": "p", "steps": ["a"], "labels": [1]}\n')
    cfg = DataConfig(path=str(tmp_path / "s.jsonl"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(Interrupted):
        prepare_steps(cfg, tokenizer, separator="\n", row_len=64, should_stop=lambda: True)
    assert not list((tmp_path / "cache").glob("*.safetensors"))
