"""Files and hub data sets -> records, read in pieces that processes share.

Text is taken as the file holds it: UTF-8 whatever the locale, a byte order mark dropped, line ends untouched. A `.txt`
file is one document; a row of any other file is a record, of which the columns asked for are read. Whatever can't be
read is one `UserError` that names the file, the line or row (from 1) and the reason. Torch-free.
"""

from __future__ import annotations

import csv
import difflib
import glob
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from llmkit.config import MachineError, UserError, locate
from llmkit.data.config import SourceConfig, template_parts

KINDS = ("txt", "jsonl", "json", "csv", "tsv", "parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
READS = f"{', '.join(KINDS)} are read, each also as .gz or .zst"
UNIT_MIN, UNIT_MAX, UNITS = 1 << 20, 64 << 20, 256  # bytes, bytes, and about how many units a large source is cut into

Rows = Iterator[tuple[int, Sequence[Any]]]  # number of the row within its piece, from 1, and the values asked for
Columns = Sequence[str] | None  # which are asked for; None: all of them, as the one value {column: value}


@dataclass(frozen=True)
class File:
    """One file of a source."""

    path: str
    kind: str
    """One of KINDS; "arrow": a hub data set's own cache; "stream": a hub data set that is read from afar."""
    compression: str
    """"gzip", "zstd" or ""."""
    size: int
    """Bytes on disk; of a stream about how many."""
    spec: str = ""
    """Of a stream: what `datasets` is asked for, as JSON."""
    n_shards: int = 1
    """Of a stream: its own parts."""
    identity: str = ""
    """Of a stream: a hash of its files' addresses, which hold the commit, and of their version marks."""
    parts: tuple[str, ...] = ()
    """Of a stream: those of its files that lie here."""


@dataclass(frozen=True)
class Piece:
    """A part of a file that one process reads."""

    path: str
    kind: str
    compression: str
    start: int
    """First byte (jsonl), row group (parquet), row (arrow) or shard (stream); 0 for the other kinds."""
    stop: int
    """One past the last; sys.maxsize: to the end."""
    size: int
    """About how many bytes of the file this is: for the progress bar."""
    spec: str = ""
    """See `File`."""
    limit: int = sys.maxsize
    """No more than so many of its rows are read."""


# --- source -> files ------------------------------------------------------------------------------------------------


def files_of(source: SourceConfig) -> list[File]:
    """The files a source names, in sorted order.

    Raises:
        UserError: there is no such file, or none of a kind that is read.
    """
    try:
        path = locate(Path(source.path).expanduser())
        hub_keys = [key for key in ("subset", "revision", "data_files", "stream") if getattr(source, key)]
        if hub_keys and (path.exists() or glob.has_magic(source.path)):
            raise UserError(f"{source.path}: `{hub_keys[0]}` is for hub data sets, and this is a path: leave it out")
        if path.is_dir():
            return _supported(source.path, [p for p in path.rglob("*") if not _hidden(p.relative_to(path))])
        if path.exists():
            file = _file(path)
            if file is None:
                raise UserError(f"{path}: unsupported extension '{path.suffix}': {READS}")
            return [file]
        if glob.has_magic(source.path):
            return _supported(source.path, _globbed(path))
        hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source.path)
        if hub_name and _kind(path) is None and (len(path.parts) == 1 or not path.parent.is_dir()):
            return [_hub_stream(source)] if source.stream else _hub(source)
        raise UserError(f"{source.path}: no such file or folder{_near_file(path)}")
    except (OSError, RuntimeError) as e:  # RuntimeError: the home of a user that doesn't exist
        raise UserError(f"{source.path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None


def _globbed(path: Path) -> list[Path]:
    plain = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
    root = locate(Path(*path.parts[:plain]))
    return [root / name for name in glob.glob(str(Path(*path.parts[plain:])), root_dir=root, recursive=True)]


def is_one_text(files: Sequence[File]) -> bool:
    """Whether a source is exactly one text document: its end is held out, not a share of its documents."""
    return len(files) == 1 and files[0].kind == "txt"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind(path: Path) -> tuple[str, str] | None:
    """Kind and compression by extension; None if the file is of no kind that is read."""
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    kind = Path(path.stem if compression else path.name).suffix.lower().removeprefix(".")
    return (kind, compression) if kind in KINDS else None


def _file(path: Path) -> File | None:
    found = _kind(path)
    return File(str(path), *found, path.stat().st_size) if found else None


def _supported(name: str, paths: Iterable[Path]) -> list[File]:
    files = [file for p in sorted(paths, key=lambda p: p.parts) if p.is_file() and (file := _file(p))]
    if not files:
        raise UserError(f"{name}: no file in it is of a kind that is read: {READS}")
    return files


def _near_file(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return f" - did you mean {path.parent / near[0]}?" if near else ""


def _hub_request(source: SourceConfig) -> dict[str, Any]:
    """The arguments with which `datasets` finds a source."""
    data_files = source.data_files if isinstance(source.data_files, str | None) else list(source.data_files)
    given = {"path": source.path, "name": source.subset, "revision": source.revision, "data_files": data_files}
    return {key: value for key, value in given.items() if value is not None}


def _not_on_the_hub(source: SourceConfig, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    near = _near_file(Path(source.path))
    return UserError(f"{source.path}: no such file or folder{near}, nor can it be loaded from the hub: {reason}")


def _hub(source: SourceConfig) -> list[File]:
    """A hub data set, downloaded by `datasets` into its cache, whose Arrow files are then read like any others."""
    import datasets

    try:
        data = datasets.load_dataset(**_hub_request(source), split=source.split)
    except Exception as e:
        raise _not_on_the_hub(source, e) from None
    names = [entry["filename"] for entry in data.cache_files]
    if sum(_arrow_table(name).num_rows for name in names) != len(data):
        raise UserError(f"{source.path}: split '{source.split}' is a slice: name a whole split, such as 'train'")
    return [File(name, "arrow", "", Path(name).stat().st_size) for name in names]


def _hub_stream(source: SourceConfig) -> File:
    """A hub data set that is read where it lies. Its commit is fixed here, so that all processes read the same one."""
    import datasets

    request = _hub_request(source)
    try:
        builder = datasets.load_dataset_builder(**request)
        data = builder.as_streaming_dataset(split=source.split)
        files = builder.config.data_files[source.split]
    except Exception as e:
        raise _not_on_the_hub(source, e) from None
    commit = re.match(r"hf://[^@]*@([0-9a-f]{40})/", files[0])
    if commit:
        request["revision"] = commit[1]
    here = tuple(str(f) for f in files if Path(f).exists())
    marks = [(f, mark) for f, mark in zip(files, files.origin_metadata, strict=True) if f not in here]
    identity = hashlib.sha256(json.dumps([source.split, source.subset, marks]).encode()).hexdigest()
    told = (builder.info.splits or {}).get(source.split)
    size = (told.num_bytes if told else 0) or UNIT_MAX * data.num_shards
    spec = json.dumps({**request, "split": source.split}, sort_keys=True)
    return File(source.path, "stream", "", size, spec, data.num_shards, identity, here)


# --- files -> units -------------------------------------------------------------------------------------------------


def units_of(files: Sequence[File], limit: int | None = None) -> list[list[Piece]]:
    """Cuts a source into units of about the same size that can be read in parallel.

    The cuts depend on the files alone, never on the number of workers. A text, a csv, a json array and a compressed
    file can't be cut: each is one piece. Small pieces share a unit.

    Args:
        limit: only the source's first rows, so many. They are counted here, so that the units know their shares; of a
            stream they are one unit, for they can't be counted without being fetched.
    """
    target = min(max(sum(f.size for f in files) // UNITS, UNIT_MIN), UNIT_MAX)
    units: list[list[Piece]] = []
    weight, left = target, sys.maxsize if limit is None else limit
    for file in files:
        for piece in _pieces(file, target):
            if left <= 0:
                return units
            if limit is not None:
                if file.kind == "stream":
                    return [[replace(piece, stop=file.n_shards, limit=left)]]
                piece = replace(piece, limit=left)
                left -= _n_rows(piece)
            if weight >= target:
                units.append([])
                weight = 0
            units[-1].append(piece)
            weight += piece.size
    return units


def _pieces(file: File, target: int) -> list[Piece]:
    def cut(bounds: Sequence[int]) -> list[Piece]:
        share = file.size // max(len(bounds) - 1, 1)
        return [Piece(file.path, file.kind, file.compression, a, b, share) for a, b in itertools.pairwise(bounds)]

    n = max(1, file.size // target)
    if file.kind == "stream":
        pieces = cut(range(file.n_shards + 1))
        return [replace(p, spec=file.spec) for p in pieces]
    if file.kind == "jsonl" and not file.compression:
        return cut([i * file.size // n for i in range(n)] + [file.size])
    if file.kind == "arrow":
        n_rows = _arrow_table(file.path).num_rows
        return cut([i * n_rows // n for i in range(n)] + [n_rows])
    if file.kind == "parquet":
        whole = Piece(file.path, file.kind, file.compression, 0, 0, 0)
        with _explained(whole):
            n_groups = _parquet(whole).num_row_groups
        n = max(1, min(n, n_groups))
        return cut([i * n_groups // n for i in range(n)] + [n_groups])
    return cut([0, sys.maxsize])


def _n_rows(piece: Piece) -> int:
    """How many rows a piece has, but no more than its limit."""
    with _explained(piece):
        if piece.kind == "arrow":
            n = piece.stop - piece.start
        elif piece.kind == "parquet":
            metadata = _parquet(piece).metadata
            n = sum(metadata.row_group(i).num_rows for i in range(piece.start, piece.stop))
        else:
            rows = _lines(piece) if piece.kind == "jsonl" else _READERS[piece.kind](piece, ())
            n = sum(1 for _ in itertools.islice(rows, piece.limit))
    return min(n, piece.limit)


# --- pieces -> records ----------------------------------------------------------------------------------------------


def _rows(piece: Piece, columns: Sequence[str]) -> Rows:
    """The one way into a file: numbered rows, each with the values of the columns, all of whose text is text."""
    with _explained(piece):
        for row, values in itertools.islice(_READERS[piece.kind](piece, columns), piece.limit):
            for column, value in zip(columns, values, strict=True):
                if type(value) is not str or not value.isascii():
                    _check_text(piece, row, column, value)
            yield row, values


def _check_text(piece: Piece, row: int, column: str, value: Any) -> None:
    """Refuses text that can't be written as UTF-8, however deep in a value."""
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError as e:
            _refuse(piece, row, f"field '{column}': character {e.start + 1} is half of a surrogate pair: no text")
    elif isinstance(value, dict | list):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_text(piece, row, column, inner)


def records(piece: Piece, fields: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a piece, in the order of the file: each with its number within the piece (see `where`) and values.

    Args:
        fields: the names that the values get -> the columns they stand in.

    Raises:
        UserError: one line, naming file, line or row, column and reason.
    """
    names = tuple(fields)
    for row, values in _rows(piece, tuple(fields.values())):
        yield row, dict(zip(names, values, strict=True))


def whole_records(piece: Piece) -> Iterator[tuple[int, dict[str, Any]]]:
    """What `records` yields, with every column of a row under its own name.

    Raises:
        UserError: one line, naming file, line or row, and reason; also for a text file, which has no columns.
    """
    if piece.kind == "txt":
        raise UserError(f"{piece.path}: a text file has no columns: rows of jsonl, json, csv or parquet are read here")
    with _explained(piece):
        for row, (record,) in itertools.islice(_READERS[piece.kind](piece, None), piece.limit):
            for column, value in record.items():
                if type(value) is not str or not value.isascii():
                    _check_text(piece, row, column, value)
            yield row, record


def numbered_documents(piece: Piece, field: str, template: str | None = None) -> Iterator[tuple[int, str]]:
    """The documents of a piece, empty ones too, in the order of the file, each with its row's number.

    Args:
        template: a text with columns in braces, such as "{title}\\n\\n{body}", that is read instead of `field`.

    Raises:
        UserError: one line, naming file, line or row, column and reason.
    """
    if template is None:
        for row, (value,) in _rows(piece, (field,)):
            if type(value) is not str:
                _refuse_value(piece, row, field, value)
            yield row, value
        return
    literals, columns = template_parts(template)
    for row, values in _rows(piece, columns):
        parts = [literals[0]]
        for column, value, literal in zip(columns, values, literals[1:], strict=True):
            if type(value) is not str:
                _refuse_value(piece, row, column, value)
            parts += (value, literal)
        yield row, "".join(parts)


def documents(piece: Piece, field: str, template: str | None = None) -> Iterator[str]:
    """What `numbered_documents` yields, without the numbers."""
    return (text for _, text in numbered_documents(piece, field, template))


def where(piece: Piece, row: int) -> str:
    """`file:line`, or `file: row n`. What lies before the piece is counted only now, when it matters."""
    if piece.kind == "parquet":
        metadata = _parquet(piece).metadata
        row += sum(metadata.row_group(i).num_rows for i in range(piece.start))
    elif piece.kind == "arrow":
        row += piece.start
    elif piece.kind == "stream":
        return f"{piece.path}: shard {piece.start + 1}: row {row}"
    elif piece.start:
        with _open(piece) as f:
            _seek_line(f, piece)
            left = f.tell()
            f.seek(0)
            while left > 0 and (data := f.read(min(left, 1 << 20))):
                row += data.count(b"\n")
                left -= len(data)
    return f"{piece.path}: row {row}" if piece.kind in ("parquet", "arrow", "json") else f"{piece.path}:{row}"


class _explained:
    """Turns what the libraries raise about a broken file into one UserError."""

    def __init__(self, piece: Piece):
        self._piece = piece

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._piece.kind == "stream" and isinstance(error, Exception) and not isinstance(error, UserError):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise MachineError(f"{where(self._piece, 1)}: the stream broke off: {reason}: run again to go on") from None
        if isinstance(error, UnicodeDecodeError):
            _refuse_encoding(self._piece, error)
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{self._piece.path}: cannot be read: {error.strerror}") from None
        if isinstance(error, OSError) or (kind and kind.__module__.startswith("pyarrow")):
            reason = " ".join(str(error).split())
            raise UserError(f"{self._piece.path}: broken or cut off: {reason}") from None


def _refuse(piece: Piece, row: int, reason: str) -> NoReturn:
    raise UserError(f"{where(piece, row)}: {reason}") from None


def _refuse_value(piece: Piece, row: int, column: str, value: Any) -> NoReturn:
    _refuse(piece, row, f"field '{column}': expected text (got {_brief(value)})")


def _refuse_encoding(piece: Piece, error: UnicodeDecodeError) -> NoReturn:
    if piece.kind in ("parquet", "arrow"):
        raise UserError(f"{piece.path}: a row is not UTF-8: {error.reason}") from None
    with _open(piece) as f:
        for number, line in enumerate(f, 1):
            try:
                line.decode()
            except UnicodeDecodeError as e:
                hint = "it seems to be UTF-16: " if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                raise UserError(
                    f"{piece.path}:{number}: not UTF-8 at byte {e.start + 1} of the line: {hint}save it as UTF-8"
                ) from None
    raise UserError(f"{piece.path}: not UTF-8: save it as UTF-8") from None


def _brief(value: Any) -> str:
    if value is None:
        return "null"
    text = json.dumps(value, default=repr)
    return f"{text[:40]}..., {type(value).__name__}" if len(text) > 43 else f"{text}, {type(value).__name__}"


def _open(piece: Piece) -> BinaryIO:
    if not piece.compression:
        return open(piece.path, "rb", buffering=1 << 20)
    import pyarrow

    # Unlike the libraries it wraps, pyarrow's stream takes several members and refuses one that is cut off.
    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(piece.path), piece.compression)
    return cast(BinaryIO, io.BufferedReader(stream, 1 << 20))


def _missing(piece: Piece, row: int, columns: Iterable[str], keys: Iterable[Any]) -> NoReturn:
    names = [str(k) for k in keys]
    field = next(c for c in columns if c not in names)
    near = difflib.get_close_matches(field, names, 1)
    hint = f" - did you mean '{near[0]}'?" if near else f": there is {', '.join(names[:20]) or 'none'}"
    _refuse(piece, row, f"no field '{field}'{hint} (set `field` in the source)")


def _txt(piece: Piece, columns: Columns) -> Rows:
    """A text has no columns: whatever the one that is asked for is called, it is the text."""
    assert columns is not None
    if len(columns) > 1:
        _refuse(piece, 1, f"a text file has no columns, but {', '.join(map(repr, columns))} are asked for")
    with _open(piece) as f:
        yield 1, (f.read().decode("utf-8-sig"),) * len(columns)


def _seek_line(f: BinaryIO, piece: Piece) -> bool:
    """Goes to the first line that begins in the piece; False if none does."""
    if not piece.start:
        return True
    f.seek(piece.start - 1)
    return f.readline(piece.stop - piece.start + 1).endswith(b"\n")


def _parse(piece: Piece, row: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        reason = e.msg[0].lower() + e.msg[1:].removesuffix(" at")
        _refuse(piece, row + e.lineno - 1, f"not JSON: {reason} at column {e.colno}")
    except RecursionError:
        _refuse(piece, row, "not JSON that can be read: nested too deep")
    except ValueError as e:  # an integer of thousands of digits
        _refuse(piece, row, f"not JSON that can be read: {e}")


def _under(piece: Piece, row: int, record: Any, columns: Columns) -> Sequence[Any]:
    if columns is None:
        if not isinstance(record, dict):
            _refuse(piece, row, f"expected an object with named fields (got {_brief(record)})")
        return [record]
    if not isinstance(record, dict):
        names = ", ".join(f"'{c}'" for c in columns)
        _refuse(piece, row, f"expected an object with the field {names} (got {_brief(record)})")
    try:
        return [record[c] for c in columns]
    except KeyError:
        _missing(piece, row, columns, record)


def _lines(piece: Piece) -> Iterator[tuple[int, str]]:
    """The lines of a piece, without blank ones."""
    with _open(piece) as f:
        if not _seek_line(f, piece):
            return
        position = f.tell() if piece.start else 0
        for row, line in enumerate(f, 1):
            if position >= piece.stop:
                return
            text = line.decode("utf-8-sig" if position == 0 else "utf-8")
            position += len(line)
            if text and not text.isspace():
                yield row, text


def _jsonl(piece: Piece, columns: Columns) -> Rows:
    for row, text in _lines(piece):
        yield row, _under(piece, row, _parse(piece, row, text.rstrip("\r\n")), columns)


def _json(piece: Piece, columns: Columns) -> Rows:
    """An array of objects, a single object, or else one object a line."""
    with _open(piece) as f:
        text = f.read().decode("utf-8-sig")
    if not text or text.isspace():
        return
    if not text.lstrip().startswith("["):
        line, _, more = text.strip().partition("\n")
        try:
            first = json.loads(line)
        except (ValueError, RecursionError):
            first = None
        if more and isinstance(first, dict):
            as_lines = Piece(piece.path, "jsonl", piece.compression, 0, sys.maxsize, piece.size)
            yield from _jsonl(as_lines, columns)
            return
    as_text = Piece(piece.path, "txt", "", 0, 0, 0)  # a mistake in the syntax has a line, one in a value a row
    data = _parse(as_text, 1, text)
    for row, record in enumerate(data if isinstance(data, list) else [data], 1):
        yield row, _under(piece, row, record, columns)


def _csv(piece: Piece, columns: Columns) -> Rows:
    """Comma or tab separated, quoted as spreadsheets do."""
    csv.field_size_limit(sys.maxsize)  # the module's own limit, 128 KiB, is shorter than many documents
    with _open(piece) as f, io.TextIOWrapper(f, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True, delimiter="\t" if piece.kind == "tsv" else ",")
        try:
            header = next(reader, None)
            if header is None:
                return
            if columns is not None and not set(columns) <= set(header):
                _missing(piece, 1, columns, header)
            where_to = [header.index(c) for c in columns or ()]
            first = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(header):
                    _refuse(piece, first, f"{len(values)} columns, but the header has {len(header)}")
                if values and columns is None:
                    yield first, [dict(zip(header, values, strict=True))]
                elif values:
                    yield first, [values[i] for i in where_to]
                first = reader.line_num + 1
        except csv.Error as e:
            _refuse(piece, max(reader.line_num, 1), f"not {piece.kind.upper()}: {e}")


def _parquet(piece: Piece) -> Any:
    import pyarrow
    import pyarrow.parquet

    if not piece.compression:
        return pyarrow.parquet.ParquetFile(piece.path)
    with _open(piece) as f:
        return pyarrow.parquet.ParquetFile(pyarrow.BufferReader(f.read()))


def _arrow_table(path: str) -> Any:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()


def _values(piece: Piece, columns: Columns, batches: Iterable[Any]) -> Rows:
    """The rows of Arrow batches."""
    row = 0
    for batch in batches:
        names = list(batch.schema.names) if columns is None else columns
        if not set(names) <= set(batch.schema.names):
            _missing(piece, row + 1, names, batch.schema.names)
        arrays = [batch.column(batch.schema.names.index(c)) for c in names]
        lists = []
        for column, array in zip(names, arrays, strict=True):
            try:
                lists.append(array.to_pylist())
            except UnicodeDecodeError:
                lists.append(_decoded(piece, row, column, array))
        for values in zip(*lists, strict=True):
            row += 1
            yield row, values if columns is not None else [dict(zip(names, values, strict=True))]


def _decoded(piece: Piece, before: int, column: str, array: Any) -> list[Any]:
    """One value at a time, so that the first that isn't UTF-8 is known by its row."""
    values = []
    for row, scalar in enumerate(array, before + 1):
        try:
            values.append(scalar.as_py())
        except UnicodeDecodeError as e:
            _refuse(piece, row, f"field '{column}': not UTF-8 at byte {e.start + 1}")
    return values


def _parquet_rows(piece: Piece, columns: Columns) -> Rows:
    file = _parquet(piece)
    if columns is not None and not set(columns) <= set(file.schema_arrow.names):
        _missing(piece, 1, columns, file.schema_arrow.names)
    groups = list(range(piece.start, piece.stop))
    if groups:
        needed = None if columns is None else sorted(set(columns))
        batches = file.iter_batches(batch_size=1024, row_groups=groups, columns=needed)
        yield from _values(piece, columns, batches)


def _arrow_rows(piece: Piece, columns: Columns) -> Rows:
    table = _arrow_table(piece.path)
    if columns is not None and not set(columns) <= set(table.schema.names):
        _missing(piece, 1, columns, table.schema.names)
    needed = table.schema.names if columns is None else sorted(set(columns))
    rows = table.select(needed).slice(piece.start, piece.stop - piece.start)
    yield from _values(piece, columns, rows.to_batches(max_chunksize=1024))


@lru_cache(8)
def _streamed(spec: str) -> Any:
    """A hub data set that is read from afar."""
    import datasets

    request = json.loads(spec)
    split = request.pop("split")
    return datasets.load_dataset_builder(**request).as_streaming_dataset(split=split).with_format("arrow")


def _stream_rows(piece: Piece, columns: Columns) -> Rows:
    data = _streamed(piece.spec)
    shards = (data.shard(num_shards=data.num_shards, index=i) for i in range(piece.start, piece.stop))
    yield from _values(piece, columns, (table for shard in shards for table in shard.iter(batch_size=1024)))


_READERS: dict[str, Callable[[Piece, Columns], Rows]] = {
    "txt": _txt,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
    "stream": _stream_rows,
}
