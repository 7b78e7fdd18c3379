"""Every layout is read in any number of pieces; whatever can't be read is one line with file and row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings, strategies as st

from llmkit.config import MachineError, UserError, validate
from llmkit.data import sources
from llmkit.data.config import DataConfig, SourceConfig
from llmkit.data.sources import documents, files_of, is_one_text, records, units_of

TEXTS = [
    "one",
    "",
    "two\nlines\r\n",
    'a "quoted", word',
    "three \u2028 é 中文 🙂",
    "null \x00 and\ttab",
    " ",
    "x" * 200_000,
]


def read(path: str | Path, field: str = "text", **more: Any) -> list[str]:
    source = SourceConfig(path=str(path), field=field, **more)
    units = units_of(files_of(source), source.limit)
    return [text for unit in units for piece in unit for text in documents(piece, field, source.template)]


def jsonl(rows: list[object]) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def parquet(columns: dict[str, object], **options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **options)
    return out.getvalue()


def table_as_csv(rows: list[list[str]], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue().encode()


# --- what can be read -----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": lambda texts: jsonl([{"id": 1, "text": t} for t in texts]),
    "a.json": lambda texts: json.dumps([{"text": t} for t in texts], indent=1).encode(),
    "lines.json": lambda texts: jsonl([{"text": t} for t in texts]),
    "a.csv": lambda texts: table_as_csv([["id", "text"], *(["1", t] for t in texts)]),
    "a.tsv": lambda texts: table_as_csv([["id", "text"], *(["1", t] for t in texts)], "\t"),
    "a.parquet": lambda texts: parquet({"id": range(len(texts)), "text": texts}, row_group_size=2),
    "A.JSONL": lambda texts: b"\xef\xbb\xbf" + jsonl([{"text": t} for t in texts]),
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str, compression: str) -> None:
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](LAYOUTS[name](TEXTS)))
    assert read(path) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_text_file_is_one_document(tmp_path: Path, compression: str) -> None:
    """B47: UTF-8 whatever the locale; the mark at the start goes, line ends stay."""
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression](b"\xef\xbb\xbf" + "Grüße\r\n中文\n".encode()))
    assert read(path) == ["Grüße\r\n中文\n"]
    assert is_one_text(files_of(SourceConfig(path=str(path))))


def test_members_of_a_compressed_file_follow_each_other(tmp_path: Path) -> None:
    for suffix, compress in list(COMPRESS.items())[1:]:
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(compress(jsonl([{"text": "a"}])) + compress(jsonl([{"text": "b"}])))
        assert read(path) == ["a", "b"]


def test_a_single_object_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n "text": "a"\n}')
    (tmp_path / "b.jsonl").write_text('\n{"text": "b"}\n  \r\n{"text": "c"}')
    assert read(tmp_path / "a.json") == ["a"]
    assert read(tmp_path / "b.jsonl") == ["b", "c"]


def test_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.jsonl", "sub/c.txt", ".hidden/d.txt", "notes.md"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jsonl([{"text": "a"}]) if name == "a.jsonl" else path.stem.encode())
    assert read(tmp_path / "folder") == ["a", "b", "c"]
    assert read(tmp_path / "folder" / "**" / "*.txt") == ["b", "c"]
    monkeypatch.chdir(tmp_path)
    assert read("folder/*") == ["a", "b"]
    assert read("fold*/sub/?.txt") == ["c"]
    (tmp_path / "x[1].txt").write_text("brackets")
    assert read("x[1].txt") == ["brackets"]


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    made.save_to_disk(tmp_path / "saved")
    data = datasets.load_from_disk(tmp_path / "saved")
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **request: (asked.append(request), data)[1])
    monkeypatch.chdir(tmp_path)
    assert read("owner/name") == ["a", "b", "c"]
    read("owner/name", subset="zh", revision="v1", data_files=("a", "b"), split="test")
    assert asked == [
        {"path": "owner/name", "split": "train"},
        {"path": "owner/name", "name": "zh", "revision": "v1", "data_files": ["a", "b"], "split": "test"},
    ]
    assert read("owner/name", limit=2) == ["a", "b"]
    with pytest.raises(UserError, match=r"no field 'txt' - did you mean 'text'"):
        read("owner/name", "txt")
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: data.select([0]))
    with pytest.raises(UserError, match="is a slice"):
        read("owner/name")

    def fail(**_: object) -> None:
        raise ConnectionError("no network\nlong story")

    for name, stream in (("load_dataset", False), ("load_dataset_builder", True)):
        monkeypatch.setattr(datasets, name, fail)
        with pytest.raises(UserError) as e:
            read("owner/name", stream=stream)
        assert str(e.value) == "owner/name: no such file or folder, nor can it be loaded from the hub: no network"


# --- streams ----------------------------------------------------------------------------------------------------------

SHARDS = [[f"{i}-{j} 中文\nline" for j in range(4 + i)] for i in range(5)]
WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "json": lambda texts: jsonl([{"id": i, "text": t} for i, t in enumerate(texts)]),
    "csv": LAYOUTS["a.csv"],
    "parquet": lambda texts: parquet({"text": texts}, row_group_size=2),
    "text": lambda texts: "".join(t.replace("\n", " ") + "\n" for t in texts).encode(),
}


def shards_in(folder: Path, builder: str) -> str:
    folder.mkdir(exist_ok=True)
    for i, texts in enumerate(SHARDS):
        (folder / f"{i}.{builder}").write_bytes(WRITERS[builder](texts))
    return str(folder / f"*.{builder}")


@pytest.mark.parametrize("builder", WRITERS)
def test_streams_are_cut_into_their_own_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: str) -> None:
    monkeypatch.chdir(tmp_path)  # no folder here is called like the builder
    data_files = shards_in(tmp_path / "data", builder)
    expected = [t.replace("\n", " ") if builder == "text" else t for texts in SHARDS for t in texts]
    source = SourceConfig(path=builder, data_files=data_files, stream=True)
    units = units_of(files_of(source))
    assert len(units) == len(SHARDS)
    assert [t for unit in reversed(units) for p in unit for t in documents(p, "text")] != expected
    assert read(builder, data_files=data_files, stream=True) == expected
    for limit in (1, 4, 5, 11, 10**9):
        assert read(builder, data_files=data_files, stream=True, limit=limit) == expected[:limit]
    with pytest.raises(UserError, match=rf"^{builder}: shard 1: row 1: no field 'txt' - did you mean 'text'"):
        read(builder, "txt", data_files=data_files, stream=True)


def test_a_value_of_a_stream_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.jsonl").write_bytes(GOOD)
    (tmp_path / "1.jsonl").write_bytes(GOOD + b'{"text": null}\n')
    with pytest.raises(UserError, match=r"^json: shard 2: row 2: field 'text': expected text \(got null\)"):
        read("json", data_files=str(tmp_path / "*.jsonl"), stream=True)
    (tmp_path / "1.jsonl").write_bytes(GOOD + b"{broken\n")
    with pytest.raises(MachineError, match=r"^json: shard 2: row 1: the stream broke off: .*: run again to go on$"):
        read("json", data_files=str(tmp_path / "*.jsonl"), stream=True)


def test_a_stream_is_fixed_to_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever is pushed to the branch meanwhile; and the content's name is the files' addresses, with the commit."""
    commit = "0123456789abcdef" * 2 + "01234567"

    class Files(list[str]):
        origin_metadata = [("owner/name", commit), ("owner/name", commit)]

    class Builder:
        def __init__(self, **request: object):
            files = Files(f"hf://datasets/owner/name@{commit}/{i}.parquet" for i in range(2))
            self.config = SimpleNamespace(data_files={"train": files})
            self.info = SimpleNamespace(splits={"train": SimpleNamespace(num_bytes=1000)})

        def as_streaming_dataset(self, split: str) -> SimpleNamespace:
            return SimpleNamespace(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    monkeypatch.chdir(tmp_path)
    (file,) = files_of(SourceConfig(path="owner/name", revision="main", subset="zh", stream=True))
    assert json.loads(file.spec) == {"path": "owner/name", "name": "zh", "revision": commit, "split": "train"}
    assert (file.n_shards, file.size, file.parts) == (2, 1000, ())
    first = file.identity
    commit = commit[::-1]
    assert files_of(SourceConfig(path="owner/name", subset="zh", stream=True))[0].identity != first


def test_a_data_set_is_downloaded_where_it_is_not_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    data_files = shards_in(tmp_path / "data", "json")
    assert read("json", data_files=data_files) == [t for texts in SHARDS for t in texts]


def test_keys_of_the_hub_are_refused_for_paths(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for key, value in {"subset": "x", "revision": "x", "data_files": "x", "stream": True}.items():
        with pytest.raises(UserError, match=f"`{key}` is for hub data sets, and this is a path: leave it out"):
            read(tmp_path / "a.txt", **{key: value})


# --- columns ----------------------------------------------------------------------------------------------------------


def all_records(path: Path, fields: dict[str, str]) -> list[tuple[int, dict[str, object]]]:
    pieces = [p for unit in units_of(files_of(SourceConfig(path=str(path)))) for p in unit]
    return [record for piece in pieces for record in records(piece, fields)]


ROWS = [("q1", "a1", "x"), ('q, "2"', "a\n2", ""), ("问题三", "答案三", "x")]
TABLES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: jsonl([{"x": x, "question": q, "answer": a} for q, a, x in ROWS]),
    "a.json": lambda: json.dumps([{"question": q, "answer": a, "x": x} for q, a, x in ROWS]).encode(),
    "a.csv": lambda: table_as_csv([["question", "x", "answer"], *([q, x, a] for q, a, x in ROWS)]),
    "a.tsv": lambda: table_as_csv([["question", "x", "answer"], *([q, x, a] for q, a, x in ROWS)], "\t"),
    "a.parquet": lambda: parquet(dict(zip(("question", "answer", "x"), zip(*ROWS, strict=True), strict=True))),
}


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("name", TABLES)
def test_columns_get_our_names(tmp_path: Path, name: str, compression: str) -> None:
    """In any order, also one column under two names."""
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](TABLES[name]()))
    found = all_records(path, {"completion": "answer", "prompt": "question", "again": "answer"})
    assert [r for _, r in found] == [{"completion": a, "prompt": q, "again": a} for q, a, _ in ROWS]
    assert all(list(r) == ["completion", "prompt", "again"] for _, r in found)
    with pytest.raises(UserError, match=r"(:1|row 1): no field 'answers' - did you mean 'answer'\?"):
        all_records(path, {"prompt": "question", "completion": "answers"})


def test_values_of_any_type_are_records(tmp_path: Path) -> None:
    rows = [{"label": 3, "messages": [{"role": "user", "content": "你好"}]}, {"label": None, "messages": []}]
    (tmp_path / "a.jsonl").write_bytes(b"\n" + jsonl(rows))
    assert all_records(tmp_path / "a.jsonl", {"label": "label", "chat": "messages"}) == [
        (2, {"label": 3, "chat": rows[0]["messages"]}),
        (3, {"label": None, "chat": []}),
    ]
    (tmp_path / "b.jsonl").write_bytes(b'{"chat": [{"content": ["ok", "\\ud800"]}]}\n')
    with pytest.raises(UserError, match=r"b.jsonl:1: field 'chat': character 1 is half of a surrogate pair"):
        all_records(tmp_path / "b.jsonl", {"chat": "chat"})


def test_a_text_file_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("all of it")
    assert all_records(tmp_path / "a.txt", {"text": "whatever"}) == [(1, {"text": "all of it"})]
    with pytest.raises(UserError, match=r"a.txt:1: a text file has no columns, but 'q', 'a' are asked for"):
        all_records(tmp_path / "a.txt", {"prompt": "q", "completion": "a"})


@pytest.mark.parametrize("name", TABLES)
def test_templates(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(TABLES[name]())
    found = read(path, template="{{Q}}: {question}\n\nA: {answer}{x}{{")
    assert found == [f"{{Q}}: {q}\n\nA: {a}{x}{{" for q, a, x in ROWS]
    with pytest.raises(UserError, match=r"(:1|row 1): no field 'title': there is "):
        read(path, template="{title}\n{answer}")


def test_a_template_takes_text_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"a": "x", "b": "y"}, {"a": "x", "b": 7}]))
    with pytest.raises(UserError, match=r"a.jsonl:2: field 'b': expected text \(got 7, int\)"):
        read(tmp_path / "a.jsonl", template="{a}{b}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"template": "{a} {"}, "a single '{' in '{a} {': a column is written {name}, a brace twice"),
        ({"template": "{}"}, "a single '{'"),
        ({"template": "}} }"}, "a single '}'"),
        ({"template": "a {{b}}"}, "no column in 'a {{b}}'"),
        ({"template": "{a}", "field": "b"}, "give `field` or `template`, not both"),
        ({"epochs": 2.0, "weight": 3.0}, "give `weight` or `epochs`, not both"),
    ],
)
def test_sources_that_contradict_themselves(source: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        validate(DataConfig, {"train": [{"path": "a", **source}]})


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [30, 10**9])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet", "two.jsonl"])
def test_a_limit_is_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, unit: int) -> None:
    """Whatever the units, and over several files."""
    monkeypatch.setattr(sources, "UNIT_MIN", unit)
    monkeypatch.setattr(sources, "UNIT_MAX", unit)
    texts = [f"text {i}" for i in range(40)]
    (tmp_path / "data").mkdir()
    for i, half in enumerate((texts[:25], texts[25:])):
        content = LAYOUTS["a." + name.split(".")[1]](half)
        (tmp_path / "data" / f"{i}{name}").write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for limit in (1, 7, 24, 25, 26, 39, 40, 99):
        assert read(tmp_path / "data", limit=limit) == texts[:limit]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 3 + b"broken\n")
    assert read(tmp_path / "a.jsonl", limit=3) == ["good"] * 3
    with pytest.raises(UserError, match=r"a\.jsonl:4: not JSON"):
        read(tmp_path / "a.jsonl", limit=4)


@given(
    lengths=st.lists(st.integers(0, 30), max_size=30),
    unit=st.integers(1, 100),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_make_the_whole(tmp_path: Path, lengths: list[int], unit: int, end: str, last: bool) -> None:
    """B33: cut anywhere, every line is read once, in order."""
    texts = [f"{i}" + "é" * n for i, n in enumerate(lengths)]
    content = end.join(json.dumps({"text": t}, ensure_ascii=False) for t in texts) + (end if last else "")
    path = tmp_path / "a.jsonl"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_MIN", unit)
        patch.setattr(sources, "UNIT_MAX", unit)
        assert read(path) == texts


def test_units_are_even_and_cover_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_MIN", 5_000)
    path = tmp_path / "a.parquet"
    texts = [f"{i:>40}" for i in range(2_000)]
    path.write_bytes(parquet({"text": texts}, row_group_size=100, compression="none"))
    units = units_of(files_of(SourceConfig(path=str(path))))
    assert len(units) > 5
    assert read(path) == texts


def test_small_files_share_a_unit(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    assert len(units_of(files_of(SourceConfig(path=str(tmp_path))))) == 1


def test_locale_does_not_matter(tmp_path: Path) -> None:
    """B47: under LC_ALL=C without UTF-8 mode."""
    (tmp_path / "é.jsonl").write_bytes('{"text": "é中"}\n'.encode())
    (tmp_path / "a.csv").write_bytes("text\né中\n".encode())
    code = (
        "from llmkit.data.sources import *; from llmkit.data.config import SourceConfig\n"
        f"for u in units_of(files_of(SourceConfig(path={os.fspath(tmp_path)!a}))):\n"
        "  for p in u: print(ascii(list(documents(p, 'text'))))"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.split() == [ascii(["é中"])] * 2


# --- what can't -----------------------------------------------------------------------------------------------------

GOOD = b'{"text": "good"}\n'
BAD_LINES: dict[str, tuple[bytes, str]] = {  # B51: what stands on line 3 of a jsonl file, and what is said of it
    "null": (b'{"text": null}', "field 'text': expected text (got null)"),
    "integer": (b'{"text": 7}', "expected text (got 7, int)"),
    "float": (b'{"text": 1.5}', "expected text (got 1.5, float)"),
    "nan": (b'{"text": NaN}', "expected text (got NaN, float)"),
    "infinity": (b'{"text": -Infinity}', "expected text (got -Infinity, float)"),
    "bool": (b'{"text": true}', "expected text (got true, bool)"),
    "list": (b'{"text": ["a"]}', 'expected text (got ["a"], list)'),
    "object": (b'{"text": {"a": 1}}', 'expected text (got {"a": 1}, dict)'),
    "long list": (b'{"text": [' + b"1, " * 1000 + b"1]}", "expected text (got [1, 1,"),
    "missing": (b'{"id": 1}', "no field 'text': there is id"),
    "near": (b'{"texts": "a"}', "no field 'text' - did you mean 'texts'?"),
    "no keys": (b"{}", "no field 'text': there is none"),
    "bare string": (b'"text"', "expected an object with the field 'text' (got \"text\", str)"),
    "bare null": (b"null", "expected an object with the field 'text' (got null)"),
    "bare list": (b"[1]", "expected an object"),
    "plain text": (b"hello", "not JSON: expecting value at column 1"),
    "cut off": (b'{"text": "a', "not JSON: unterminated string starting at column 10"),
    "no brace": (b'{"text": "a"', "not JSON: expecting ',' delimiter at column"),
    "comma": (b'{"text": "a",}', "not JSON"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "not JSON: extra data at column 14"),
    "single quotes": (b"{'text': 'a'}", "not JSON: expecting property name"),
    "nul bytes": (b"\x00\x00\x00", "not JSON"),
    "nul in text": (b'{"text": "a\x00"}', "not JSON: invalid control character at"),
    "tab in text": (b'{"text": "a\tb"}', "not JSON: invalid control character at"),
    "bad escape": (rb'{"text": "\x41"}', "not JSON: invalid \\escape"),
    "short escape": (rb'{"text": "\u12"}', "not JSON: invalid \\uXXXX escape"),
    "surrogate": (rb'{"text": "ab\ud800"}', "character 3 is half of a surrogate pair"),
    "low surrogate": (rb'{"text": "\udc00\ud800"}', "character 1 is half of a surrogate pair"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "not UTF-8 at byte 11 of the line"),
    "cut character": (b'{"text": "\xe4\xb8"}', "not UTF-8 at byte 11 of the line"),
    "overlong": (b'{"text": "\xc0\xaf"}', "not UTF-8 at byte 11 of the line"),
    "encoded surrogate": (b'{"text": "\xed\xa0\x80"}', "not UTF-8 at byte 11 of the line"),
    "deep": (b'{"text": ' + b"[" * 100_000, "nested too deep"),
    "huge integer": (b'{"text": ' + b"9" * 10_000 + b"}", "not JSON that can be read: Exceeds the limit"),
    "late mark": (b'\xef\xbb\xbf{"text": "a"}', "not JSON"),
    "python": (b'{"text": None}', "not JSON: expecting value at column 10"),
}

PARQUET = parquet({"text": ["a", "b", "c", None]}, row_group_size=2)
BAD_UTF8 = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"ab\xff"))
BAD_FILES: dict[str, tuple[str, bytes, str]] = {  # name, content, what is said after the folder
    "utf-16 text": (
        "a.txt",
        "hello".encode("utf-16"),
        "a.txt:1: not UTF-8 at byte 1 of the line: it seems to be UTF-16",
    ),
    "binary text": ("a.txt", b"ok\nok\n\x80\x81", "a.txt:3: not UTF-8 at byte 1"),
    "latin-1 text": ("a.txt", "ok\nné".encode("latin-1"), "a.txt:2: not UTF-8 at byte 2"),
    "utf-16 jsonl": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl:1: not UTF-8 at byte 1"),
    "not gzip": ("a.jsonl.gz", GOOD, "a.jsonl.gz: broken or cut off: "),
    "not zstd": ("a.jsonl.zst", GOOD, "a.jsonl.zst: broken or cut off: "),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD * 99)[:-9], "a.jsonl.gz: broken or cut off: Truncated"),
    "cut zstd": ("a.txt.zst", COMPRESS[".zst"](os.urandom(999).hex().encode())[:-9], "a.txt.zst: broken or cut off: "),
    "gzip checksum": ("a.txt.gz", gzip.compress(b"a" * 99)[:-8] + bytes(8), "a.txt.gz: broken or cut off: "),
    "gz bad line": ("a.jsonl.gz", gzip.compress(GOOD + b"x\n"), "a.jsonl.gz:2: not JSON"),
    "gz latin-1": ("a.txt.gz", gzip.compress(b"a\n\xe9"), "a.txt.gz:2: not UTF-8 at byte 1"),
    "parquet is text": ("a.parquet", b"hello", "a.parquet: broken or cut off: "),
    "parquet empty": ("a.parquet", b"", "a.parquet: broken or cut off: "),
    "parquet cut": ("a.parquet", PARQUET[:-20], "a.parquet: broken or cut off: "),
    "parquet footer": ("a.parquet", PARQUET[:-300] + bytes(292) + PARQUET[-8:], "a.parquet: broken or cut off: "),
    "parquet null": ("a.parquet", PARQUET, "a.parquet: row 4: field 'text': expected text (got null)"),
    "parquet column": ("a.parquet", parquet({"txt": ["a"]}), "a.parquet: row 1: no field 'text' - did you mean 'txt'?"),
    "parquet integers": (
        "a.parquet",
        parquet({"text": [7]}),
        "a.parquet: row 1: field 'text': expected text (got 7, int)",
    ),
    "parquet nan": (
        "a.parquet",
        parquet({"text": [float("nan")]}),
        "row 1: field 'text': expected text (got NaN, float)",
    ),
    "parquet list": ("a.parquet", parquet({"text": [["a"]]}), "row 1: field 'text': expected text (got [\"a\"], list)"),
    "parquet bytes": ("a.parquet", parquet({"text": [b"a"]}), "a.parquet: row 1: field 'text': expected text (got"),
    "parquet utf-8": ("a.parquet", parquet({"text": BAD_UTF8}), "a.parquet: row 3: field 'text': not UTF-8 at byte 1"),
    "parquet gz": ("a.parquet.gz", gzip.compress(PARQUET), "a.parquet.gz: row 4: field 'text': expected text"),
    "csv column": ("a.csv", b"id,texts\n1,a\n", "a.csv:1: no field 'text' - did you mean 'texts'?"),
    "csv short row": ("a.csv", b"id,text\n1,a\n2\n", "a.csv:3: 1 columns, but the header has 2"),
    "csv long row": ("a.csv", b"id,text\n1,a\n\n2,b,c\n", "a.csv:4: 3 columns, but the header has 2"),
    "csv after quotes": ("a.csv", b'text,id\n"a\nb\nc",1\nd\n', "a.csv:5: 1 columns"),
    "csv open quote": ("a.csv", b'text\na\n"b\n', "a.csv:3: not CSV: unexpected end of data"),
    "csv after quote": ("a.csv", b'text\n"a"b\n', "a.csv:2: not CSV: ',' expected after '\"'"),
    "csv latin-1": ("a.csv", b"text\nok\n\xe9\n", "a.csv:3: not UTF-8 at byte 1"),
    "json cut": ("a.json", b'[\n {"text": "a"},\n {"text"', "a.json:3: not JSON: expecting ':' delimiter"),
    "json item": ("a.json", b'[{"text": "a"}, {"text": 2}]', "a.json: row 2: field 'text': expected text (got 2, int)"),
    "json no object": ("a.json", b"[1]", "a.json: row 1: expected an object"),
    "json number": ("a.json", b"7", "a.json: row 1: expected an object with the field 'text' (got 7, int)"),
    "json key": ("a.json", b'{"data": []}', "a.json: row 1: no field 'text': there is data"),
    "json lines": ("a.json", b'{"text": "a"}\n{"text": 2}\n', "a.json: row 2: field 'text': expected text"),
    "json deep": ("a.json", b"[" * 100_000, "a.json:1: not JSON that can be read: nested too deep"),
    "pdf": ("a.pdf", b"%PDF", "a.pdf: unsupported extension '.pdf': txt, jsonl, json, csv, tsv, parquet are read"),
    "no extension": ("a", b"text", "a: unsupported extension '': "),
    "only gz": ("a.gz", gzip.compress(b"a"), "a.gz: unsupported extension '.gz'"),
}


def refused(path: Path) -> str:
    with pytest.raises(UserError) as e:
        read(path)
    message = str(e.value)
    assert "\n" not in message and len(message) < 400 + len(str(path))
    return message


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line(tmp_path: Path, name: str) -> None:
    content, expected = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 2 + content + b"\n" + GOOD)
    message = refused(path)
    assert message.startswith(f"{path}:3: ") and expected in message


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path: Path, name: str) -> None:
    file, content, expected = BAD_FILES[name]
    path = tmp_path / file
    path.write_bytes(content)
    message = refused(path)
    assert message.startswith(str(path)) and expected in message


@pytest.mark.parametrize("bad", [0, 1, 57, 199])
def test_line_numbers_count_from_the_file_not_the_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    monkeypatch.setattr(sources, "UNIT_MIN", 100)
    lines = [GOOD] * 200
    lines[bad] = b"{}\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    assert refused(path).startswith(f"{path}:{bad + 1}: ")


def test_wrong_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("a")
    assert refused(tmp_path / "tran.jsonl").endswith(f"no such file or folder - did you mean {tmp_path}/train.jsonl?")
    assert refused(tmp_path / "x" / "y.txt").endswith("no such file or folder")
    assert "is of a kind that is read" in refused(tmp_path / "empty")
    assert "is of a kind that is read" in refused(tmp_path / "notes")
    assert "is of a kind that is read" in refused(tmp_path / "*.csv")
    assert "no such file or folder" in refused(Path("nul\0byte.txt"))
    monkeypatch.chdir(tmp_path)
    assert refused(Path("notes/b")) == "notes/b: no such file or folder"  # beside files, so no name on the hub


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources, "open", refuse, raising=False)  # the tests may run as root, whom no mode stops
    assert refused(path) == f"{path}: cannot be read: Permission denied"
