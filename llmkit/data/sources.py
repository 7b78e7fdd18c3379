"""Files and hub data sets -> documents, read in pieces that processes share.

Text is taken as the file holds it: UTF-8 whatever the locale, a byte order mark dropped, line ends untouched. A `.txt`
file is one document; a row of any other file is one, found under the source's `field`. Whatever can't be read is one
`UserError` that names the file, the line or row (from 1) and the reason. Torch-free.
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from llmkit.config import UserError, locate
from llmkit.data.config import SourceConfig

KINDS = ("txt", "jsonl", "json", "csv", "parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
READS = f"{', '.join(KINDS)} are read, each also as .gz or .zst"
UNIT_MIN, UNIT_MAX, UNITS = 1 << 20, 64 << 20, 256  # bytes, bytes, and about how many units a large source is cut into

Rows = Iterator[tuple[int, Any]]  # number of the row within its piece, from 1, and the value under `field`


@dataclass(frozen=True)
class File:
    """One file of a source."""

    path: str
    kind: str
    """One of KINDS, or "arrow": a hub data set's own cache."""
    compression: str
    """"gzip", "zstd" or ""."""
    size: int
    """Bytes on disk."""


@dataclass(frozen=True)
class Piece:
    """A part of a file that one process reads."""

    path: str
    kind: str
    compression: str
    start: int
    """First byte (jsonl), row group (parquet) or row (arrow); 0 for the other kinds."""
    stop: int
    """One past the last; sys.maxsize: to the end."""
    size: int
    """About how many bytes of the file this is: for the progress bar."""


# --- source -> files ------------------------------------------------------------------------------------------------


def files_of(source: SourceConfig) -> list[File]:
    """The files a source names, in sorted order.

    Raises:
        UserError: there is no such file, or none of a kind that is read.
    """
    try:
        path = locate(Path(source.path).expanduser())
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
            return _hub(source)
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


def _hub(source: SourceConfig) -> list[File]:
    """A hub data set, downloaded by `datasets` into its cache, whose Arrow files are then read like any others."""
    import datasets

    try:
        data = datasets.load_dataset(source.path, split=source.split)
    except Exception as e:
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        near = _near_file(Path(source.path))
        raise UserError(
            f"{source.path}: no such file or folder{near}, nor can it be loaded from the hub: {reason}"
        ) from None
    names = [entry["filename"] for entry in data.cache_files]
    if sum(_arrow_table(name).num_rows for name in names) != len(data):
        raise UserError(f"{source.path}: split '{source.split}' is a slice: name a whole split, such as 'train'")
    return [File(name, "arrow", "", Path(name).stat().st_size) for name in names]


# --- files -> units -------------------------------------------------------------------------------------------------


def units_of(files: Sequence[File]) -> list[list[Piece]]:
    """Cuts a source into units of about the same size that can be read in parallel.

    The cuts depend on the files alone, never on the number of workers. A text, a csv, a json array and a compressed
    file can't be cut: each is one piece. Small pieces share a unit.
    """
    target = min(max(sum(f.size for f in files) // UNITS, UNIT_MIN), UNIT_MAX)
    units: list[list[Piece]] = []
    weight = target
    for file in files:
        for piece in _pieces(file, target):
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


# --- pieces -> documents --------------------------------------------------------------------------------------------


def documents(piece: Piece, field: str) -> Iterator[str]:
    """The documents of a piece, empty ones too, in the order of the file.

    Raises:
        UserError: one line, naming file, line or row, field and reason.
    """
    with _explained(piece):
        for row, value in _READERS[piece.kind](piece, field):
            if type(value) is not str:
                _refuse(piece, row, f"field '{field}': expected text (got {_brief(value)})")
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as e:
                    _refuse(
                        piece, row, f"field '{field}': character {e.start + 1} is half of a surrogate pair: no text"
                    )
            yield value


class _explained:
    """Turns what the libraries raise about a broken file into one UserError."""

    def __init__(self, piece: Piece):
        self._piece = piece

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, UnicodeDecodeError):
            _refuse_encoding(self._piece, error)
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{self._piece.path}: cannot be read: {error.strerror}") from None
        if isinstance(error, OSError) or (kind and kind.__module__.startswith("pyarrow")):
            reason = " ".join(str(error).split())
            raise UserError(f"{self._piece.path}: broken or cut off: {reason}") from None


def _refuse(piece: Piece, row: int, reason: str) -> NoReturn:
    raise UserError(f"{_where(piece, row)}: {reason}") from None


def _where(piece: Piece, row: int) -> str:
    """`file:line`, or `file: row n`. What lies before the piece is counted only now, when it matters."""
    if piece.kind == "parquet":
        metadata = _parquet(piece).metadata
        row += sum(metadata.row_group(i).num_rows for i in range(piece.start))
    elif piece.kind == "arrow":
        row += piece.start
    elif piece.start:
        with _open(piece) as f:
            _seek_line(f, piece)
            left = f.tell()
            f.seek(0)
            while left > 0 and (data := f.read(min(left, 1 << 20))):
                row += data.count(b"\n")
                left -= len(data)
    return f"{piece.path}: row {row}" if piece.kind in ("parquet", "arrow", "json") else f"{piece.path}:{row}"


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


def _missing(piece: Piece, row: int, field: str, keys: Iterable[Any]) -> NoReturn:
    names = [str(k) for k in keys]
    near = difflib.get_close_matches(field, names, 1)
    hint = f" - did you mean '{near[0]}'?" if near else f": there is {', '.join(names[:20]) or 'none'}"
    _refuse(piece, row, f"no field '{field}'{hint} (set `field` in the source)")


def _txt(piece: Piece, field: str) -> Rows:
    with _open(piece) as f:
        yield 1, f.read().decode("utf-8-sig")


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


def _under(piece: Piece, row: int, record: Any, field: str) -> Any:
    if not isinstance(record, dict):
        _refuse(piece, row, f"expected an object with the field '{field}' (got {_brief(record)})")
    if field not in record:
        _missing(piece, row, field, record)
    return record[field]


def _jsonl(piece: Piece, field: str) -> Rows:
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
                yield row, _under(piece, row, _parse(piece, row, text.rstrip("\r\n")), field)


def _json(piece: Piece, field: str) -> Rows:
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
            yield from _jsonl(as_lines, field)
            return
    as_text = Piece(piece.path, "txt", "", 0, 0, 0)  # a mistake in the syntax has a line, one in a value a row
    data = _parse(as_text, 1, text)
    for row, record in enumerate(data if isinstance(data, list) else [data], 1):
        yield row, _under(piece, row, record, field)


def _csv(piece: Piece, field: str) -> Rows:
    csv.field_size_limit(sys.maxsize)  # the module's own limit, 128 KiB, is shorter than many documents
    with _open(piece) as f, io.TextIOWrapper(f, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if field not in header:
                _missing(piece, 1, field, header)
            column = header.index(field)
            first = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(header):
                    _refuse(piece, first, f"{len(values)} columns, but the header has {len(header)}")
                if values:
                    yield first, values[column]
                first = reader.line_num + 1
        except csv.Error as e:
            _refuse(piece, max(reader.line_num, 1), f"not CSV: {e}")


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


def _values(piece: Piece, field: str, batches: Iterable[Any]) -> Rows:
    """The rows of Arrow batches, each of the one column `field`."""
    row = 0
    for batch in batches:
        try:
            values = batch.column(0).to_pylist()
        except UnicodeDecodeError:
            values = _decoded(piece, row, field, batch.column(0))
        for value in values:
            row += 1
            yield row, value


def _decoded(piece: Piece, before: int, field: str, column: Any) -> Iterator[Any]:
    """One value at a time, so that the first that isn't UTF-8 is known by its row."""
    for row, scalar in enumerate(column, before + 1):
        try:
            yield scalar.as_py()
        except UnicodeDecodeError as e:
            _refuse(piece, row, f"field '{field}': not UTF-8 at byte {e.start + 1}")


def _parquet_rows(piece: Piece, field: str) -> Rows:
    file = _parquet(piece)
    if field not in file.schema_arrow.names:
        _missing(piece, 1, field, file.schema_arrow.names)
    groups = list(range(piece.start, piece.stop))
    if groups:
        yield from _values(piece, field, file.iter_batches(batch_size=1024, row_groups=groups, columns=[field]))


def _arrow_rows(piece: Piece, field: str) -> Rows:
    table = _arrow_table(piece.path)
    if field not in table.schema.names:
        _missing(piece, 1, field, table.schema.names)
    rows = table.select([field]).slice(piece.start, piece.stop - piece.start)
    yield from _values(piece, field, rows.to_batches(max_chunksize=1024))


_READERS: dict[str, Callable[[Piece, str], Rows]] = {
    "txt": _txt,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
}
