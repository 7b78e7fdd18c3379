"""Every layout is read in any number of pieces; whatever can't be read is one line with file and row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings, strategies as st

from llmkit.config import UserError
from llmkit.data import sources
from llmkit.data.config import SourceConfig
from llmkit.data.sources import documents, files_of, is_one_text, units_of

TEXTS = ["one", "", "two\nlines\r\n", "three \u2028 é 中文 🙂", "null \x00 and\ttab", " ", "x" * 200_000]


def read(path: str | Path, field: str = "text") -> list[str]:
    files = files_of(SourceConfig(path=str(path), field=field))
    return [text for unit in units_of(files) for piece in unit for text in documents(piece, field)]


def jsonl(rows: list[object]) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def parquet(columns: dict[str, object], **options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **options)
    return out.getvalue()


def table_as_csv(rows: list[list[str]]) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


# --- what can be read -----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": lambda texts: jsonl([{"id": 1, "text": t} for t in texts]),
    "a.json": lambda texts: json.dumps([{"text": t} for t in texts], indent=1).encode(),
    "lines.json": lambda texts: jsonl([{"text": t} for t in texts]),
    "a.csv": lambda texts: table_as_csv([["id", "text"], *(["1", t] for t in texts)]),
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
    import datasets

    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    made.save_to_disk(tmp_path / "saved")
    data = datasets.load_from_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    monkeypatch.chdir(tmp_path)
    assert read("owner/name") == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"no field 'txt' - did you mean 'text'"):
        read("owner/name", "txt")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data.select([0]))
    with pytest.raises(UserError, match="is a slice"):
        read("owner/name")

    def fail(name: str, split: str) -> None:
        raise ConnectionError("no network\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as e:
        read("owner/name")
    assert str(e.value) == "owner/name: no such file or folder, nor can it be loaded from the hub: no network"


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
    "pdf": ("a.pdf", b"%PDF", "a.pdf: unsupported extension '.pdf': txt, jsonl, json, csv, parquet are read"),
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
