"""Rows of every public layout -> one form; what fits none is told with file and row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.config import UserError
from llmkit.data.config import SourceConfig
from llmkit.data.layouts import (
    Dialogue,
    Feedback,
    Preference,
    Prompt,
    Steps,
    UnusableRow,
    keys_of,
    read_source,
    reader,
)
from llmkit.data.sources import files_of

SHARED = Path("/work/shared/data")
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def read(row: dict[str, Any], kind: Any, **options: Any) -> Any:
    return reader(row.keys(), kind, **options).read(row)


CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "the time"}}]
DIALOGUES: dict[str, tuple[dict[str, Any], Dialogue]] = {
    "messages": (
        {"messages": [SYSTEM, user("a"), bot("b"), user("c"), bot("d")], "item": {"kind": "x"}},
        Dialogue([SYSTEM, user("a"), bot("b"), user("c"), bot("d")]),
    ),
    "messages with parts, nulls and tools": (
        {
            "messages": [
                {"role": "developer", "content": "Be brief.", "name": None},
                {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "time?"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "noon", "tool_call_id": "1"},
                {"role": "assistant", "content": "Noon.", "tool_calls": []},
            ],
            "tools": json.dumps(TOOLS),
        },
        Dialogue(
            [
                SYSTEM,
                user("What time?"),
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "noon", "tool_call_id": "1"},
                bot("Noon."),
            ],
            TOOLS,
        ),
    ),
    "prompt/completion": ({"prompt": "a", "completion": "b"}, Dialogue([user("a"), bot("b")])),
    "prompt/completion as messages": (
        {"prompt": [user("a")], "completion": [bot("b"), user("c"), bot("d")]},
        Dialogue([user("a"), bot("b"), user("c"), bot("d")]),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["x", "y"]], "system": "Be brief."},
        Dialogue([SYSTEM, user("x"), bot("y"), user("Add.\n1 2"), bot("3")]),
    ),
    "alpaca without input": ({"instruction": "Add.", "input": "", "output": "3"}, Dialogue([user("Add."), bot("3")])),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "What time?"},
                {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
                {"from": "observation", "value": "noon"},
                {"from": "gpt", "value": "Noon."},
            ],
            "system": "Be brief.",
            "tools": json.dumps(TOOLS),
        },
        Dialogue(
            [
                SYSTEM,
                user("What time?"),
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "noon"},
                bot("Noon."),
            ],
            TOOLS,
        ),
    ),
    "question/answer": ({"question": "a", "answer": "b #### 1"}, Dialogue([user("a"), bot("b #### 1")])),
}


@pytest.mark.parametrize("name", DIALOGUES)
def test_dialogues(name: str) -> None:
    row, expected = DIALOGUES[name]
    assert read(row, "dialogue") == expected


PAIR = [(0, 1, 0.0)]
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
PREFERENCES: dict[str, tuple[dict[str, Any], Preference]] = {
    "text": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2},
        Preference([user("a")], ["b", "c"], [(0, 1, 2.0)]),
    ),
    "messages": (
        {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("")]},
        Preference([user("a")], ["b", ""], PAIR),
    ),
    "whole conversations beside the prompt": (
        {"prompt": "a", "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        Preference([user("a")], ["b", "c"], PAIR),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        Preference([user("a")], ["b", "c"], PAIR),
    ),
    "hh": (
        {"chosen": HH + "good", "rejected": HH + "bad"},
        Preference([user("a"), bot("b"), user("c")], ["good", "bad"], PAIR),
    ),
    "implicit prompt": (
        {"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        Preference([user("a")], ["b", "c"], PAIR),
    ),
    "ranking": (
        {"prompt": "a", "responses": ["x", "y", "z"], "ranking": [2, [0, 1]]},
        Preference([user("a")], ["x", "y", "z"], [(2, 0, 0.0), (2, 1, 0.0)]),
    ),
    "scores": (
        {"prompt": "a", "responses": ["x", "y", "z"], "scores": [1, 3, 1]},
        Preference([user("a")], ["x", "y", "z"], [(1, 0, 0.0), (1, 2, 0.0)], [1.0, 3.0, 1.0]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name: str) -> None:
    row, expected = PREFERENCES[name]
    assert read(row, "preference") == expected


def test_the_difference_of_scores_is_the_margin_only_when_asked() -> None:
    row = {"prompt": "a", "responses": ["x", "y"], "scores": [1, 3.5]}
    assert read(row, "preference", margin=True).pairs == [(1, 0, 2.5)]


def test_feedback_prompts_and_steps() -> None:
    good = Feedback([user("a")], "b", True)
    assert read({"prompt": "a", "completion": "b", "label": True}, "feedback") == good
    assert read({"messages": [user("a"), bot("b")], "label": "true"}, "feedback") == good
    assert read({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "kto_tag": 1}, "feedback") == good  # fmt: skip # noqa: E501
    assert read({"prompt": "a", "answer": 4, "kind": "sum"}, "prompt") == Prompt(
        [user("a")], {"answer": 4, "kind": "sum"}
    )
    assert read({"messages": [user("a"), bot("b")]}, "prompt") == Prompt([user("a")], {"answer": "b"})
    assert read({"question": "a", "answer": "so\n#### 1,000"}, "prompt") == Prompt(
        [user("a")], {"answer": "1,000", "solution": "so\n#### 1,000"}
    )
    assert read({"instruction": "a", "input": "b", "output": "c"}, "prompt") == Prompt([user("a\nb")], {"output": "c"})
    row = {"prompt": "a", "completions": ["1", "2", "3"], "labels": [True, None, 0.5]}
    assert read(row, "steps") == Steps([user("a")], ["1", "2", "3"], [1.0, None, 0.5])


def test_columns_rename_and_system_messages_are_added_where_none_is() -> None:
    row = {"q": "a", "text": "b", "kind": "x"}
    renamed = {"prompt": "q", "completion": "text"}
    assert read(row, "dialogue", columns=renamed, system="Be brief.") == Dialogue([SYSTEM, user("a"), bot("b")])
    assert read(row, "prompt", columns={"prompt": "q", "answer": "text"}) == Prompt(
        [user("a")], {"answer": "b", "kind": "x"}
    )
    own = {"messages": [{"role": "system", "content": "Hm."}, user("a"), bot("b")]}
    assert read(own, "dialogue", system="Be brief.").messages[0]["content"] == "Hm."
    with pytest.raises(UserError, match="no field 'txt', which `columns` names - did you mean 'text'"):
        reader(row.keys(), "dialogue", {"prompt": "q", "completion": "txt"})


def test_plain_text_stays_text() -> None:
    """data.chat: false."""
    assert read({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", chat=False) == Preference(
        "a", ["b", "c"], PAIR
    )
    hh = read({"chosen": HH + "good", "rejected": HH + "bad"}, "preference", chat=False)
    assert hh == Preference(HH.removesuffix(" "), [" good", " bad"], PAIR)
    with pytest.raises(UserError, match=r"data\.chat is false"):
        read({"messages": [user("a"), bot("b"), user("c"), bot("d")]}, "dialogue", chat=False)
    with pytest.raises(UserError, match=r"data\.chat is false"):
        read({"prompt": [user("a")]}, "prompt", chat=False)


def test_text_that_looks_like_json_is_text() -> None:
    asked = '[{"role": "user"}] What is wrong with this JSON?'
    assert read({"prompt": asked, "completion": "[]"}, "dialogue").messages == [user(asked), bot("[]")]


WRONG: list[tuple[dict[str, Any], Any, str]] = [
    ({"messages": []}, "dialogue", "messages: a conversation without a message"),
    ({"messages": "hello"}, "dialogue", r'messages: a list is expected \(got "hello"\)'),
    ({"messages": [{"role": "narrator", "content": ""}]}, "dialogue", "message 0: role must be one of"),
    ({"messages": [{"role": "user", "content": 3}]}, "dialogue", r"message 0 \(user\): content must be text \(got 3\)"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "dialogue", "only parts of text"),
    ({"conversations": [{"from": "function_call", "value": "clock()"}]}, "dialogue", "not JSON"),
    ({"prompt": "a", "completion": None}, "dialogue", "completion: a list is expected"),
    ({"instruction": "a", "output": "b", "history": ["x"]}, "dialogue", "history: item 0: a pair"),
    ({"prompt": "a", "responses": ["x", "y"], "ranking": [1, 1]}, "preference", "every number from 0 to 1 once"),
    ({"prompt": "a", "responses": ["x", "y"], "ranking": [0]}, "preference", "every number from 0 to 1 once"),
    ({"prompt": "a", "responses": ["x", "y"], "scores": [1]}, "preference", "1 numbers for 2 responses"),
    ({"prompt": "a", "responses": ["x", "y"], "scores": [1, float("nan")]}, "preference", "item 1: a number"),
    ({"prompt": "a", "chosen": [user("b")], "rejected": "c"}, "preference", "chosen: one answer of the assistant"),
    ({"prompt": [user("a"), bot("b")], "chosen": "x", "rejected": "y"}, "preference", "must be the user's or a tool's"),
    ({"chosen": "no turns", "rejected": "none"}, "preference", "a dialogue of 'Human:' and 'Assistant:' turns"),
    ({"prompt": "a", "completion": "b", "label": "maybe"}, "feedback", "label: true or false"),
    ({"prompt": "a", "completions": ["b"], "labels": []}, "steps", "labels: 0 of them for 1 completions"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "preference", "margin: a number"),
]  # fmt: skip


@pytest.mark.parametrize("row, kind, message", WRONG, ids=[m[2][:30] for m in WRONG])
def test_what_is_wrong_is_said(row: dict[str, Any], kind: Any, message: str) -> None:
    """B51: null, number or list where text is expected."""
    with pytest.raises(UserError, match=message):
        read(row, kind)


USELESS: list[tuple[dict[str, Any], Any]] = [
    ({"messages": [user("a")]}, "dialogue"),
    ({"instruction": "a", "output": " "}, "dialogue"),
    ({"prompt": "a", "responses": ["x", "y"], "ranking": [[0, 1]]}, "preference"),
    ({"prompt": "a", "responses": ["x", "y"], "scores": [1, 1]}, "preference"),
    ({"chosen": HH + "x", "rejected": HH.replace("b", "q") + "y"}, "preference"),
    ({"prompt": "a", "completions": ["b"], "labels": [None]}, "steps"),
]


@pytest.mark.parametrize("row, kind", USELESS)
def test_rows_from_which_nothing_can_be_learnt_are_told_apart(row: dict[str, Any], kind: Any) -> None:
    with pytest.raises(UnusableRow):
        read(row, kind)


def test_no_layout_names_those_that_are_known() -> None:
    with pytest.raises(UserError) as error:
        reader(["text", "id"], "dialogue")
    assert "messages" in str(error.value) and "instruction, output (alpaca)" in str(error.value)


# --- files -----------------------------------------------------------------------------------------------------------


def source_of(path: Path) -> SourceConfig:
    return SourceConfig(path=str(path))


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f"q{i}", "completion": f"an\nswer {i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    with (tmp_path / "d.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    said: list[str] = []
    found = list(read_source(source_of(tmp_path), "dialogue", say=said.append))
    assert [v for _, _, v in found] == [Dialogue([user(r["prompt"]), bot(r["completion"])]) for r in rows] * 4
    assert len(said) == 4 and all(s.endswith("layout prompt/completion") for s in said)
    assert [keys_of(f) for f in files_of(source_of(tmp_path))] == [["prompt", "completion"]] * 4


def test_lists_of_a_csv_are_json(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["prompt", "responses", "ranking"], ["a", '["x", "y"]', "[1, 0]"]])
    ((_, _, found),) = read_source(source_of(tmp_path / "a.csv"), "preference")
    assert found == Preference([user("a")], ["x", "y"], [(1, 0, 0.0)])


def test_errors_name_file_and_row(tmp_path: Path) -> None:
    """A row that lacks what the first has, one that is no object, one that is useless, and a text file."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:3: no field 'completion', which the first row of the file has"):
        list(read_source(source_of(file), "dialogue"))
    file.write_text('{"prompt": "a", "completion": "b"}\n3\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: expected an object"):
        list(read_source(source_of(file), "dialogue"))
    file.write_text('{"prompt": "a", "completion": ""}\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: every turn of the assistant is empty"):
        list(read_source(source_of(file), "dialogue"))
    left: list[int] = []
    found = list(read_source(source_of(file), "dialogue", on_unusable=lambda piece, row, why: left.append(row)))
    assert left == [1] and len(found) == 1
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(UserError, match="a text file has no columns"):
        list(read_source(source_of(tmp_path / "b.txt"), "dialogue"))


SAMPLES = {
    "alpaca_en_demo.json": ("dialogue", "alpaca", 999),
    "gsm8k_train.jsonl": ("dialogue", "question/answer", 7473),
    "dpo_en_demo.json": ("preference", "sharegpt preference", 300),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_sample_files_are_read_as_they_are(name: str) -> None:
    kind, layout, n = SAMPLES[name]
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not here: only rows of its shape were read")
    said: list[str] = []
    found = list(read_source(source_of(SHARED / name), kind, say=said.append))  # type: ignore[arg-type]
    assert len(found) == n and said[0].endswith(f"layout {layout}")
