"""sentencepiece's `tokenizer.model` -> tokenizer.json as data, with the ids that sentencepiece itself gives.

What its normaliser does (https://github.com/google/sentencepiece, src/normalizer.cc) becomes steps of tokenizer.json: the
character map, extra blanks taken out, a space before the text, spaces written as U+2581. `tokenizers` applies such a map
to whole graphemes, and so differently where a mark or a line feed follows (it loses the U+FE0F behind a wide space, and
doesn't compose kana). The step is marked `exact`, which that library ignores: `CharsMap` does it here.

Its models map one to one, but for:

- A Unigram model there doesn't find byte tokens in text; here the text `<0x41>` is cut after its `<`.
- Symbols that the user defined are found before anything else. A Unigram model scores them so that they win; for BPE
  the text is cut around them.
- BPE there needs no list of merges: any two neighbours whose join is a piece may be joined, best score first.
"""

from __future__ import annotations

import base64
import math
import re
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.config import UserError

SIGN = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2


def read_model(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The model as tokenizer.json, and which of its pieces are bos, eos, pad and unknown.

    Raises:
        UserError: when the extra isn't installed, or the file is damaged or of a kind that isn't known.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2 as schema
    except ImportError:
        raise UserError(f"{file}: reading it needs the extra: pip install 'llmkit[sentencepiece]'") from None
    proto: Any = schema.ModelProto()  # type: ignore[attr-defined]  # made at run time
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as e:
        raise UserError(f"{file}: not a sentencepiece model: {e}") from None
    trained, pieces = proto.trainer_spec, list(proto.pieces)
    types = {p.type for p in pieces}
    bad = [p.piece for p in pieces if not math.isfinite(p.score)]
    if not pieces or types - set(range(1, 7)) or bad or len({p.piece for p in pieces}) != len(pieces):
        raise UserError(f"{file}: not a sentencepiece model: it has no pieces, or wrong ones")
    if trained.model_type not in (_UNIGRAM, _BPE):
        raise UserError(f"{file}: of sentencepiece's models only unigram and bpe are known here, not char and word")
    if _UNUSED in types or trained.treat_whitespace_as_suffix:
        raise UserError(f"{file}: it has unused pieces, or spaces at the end of words: neither is known here")
    if trained.byte_fallback and sum(p.type == _BYTE for p in pieces) != 256:
        raise UserError(f"{file}: it falls back to bytes, but doesn't hold 256 of them")
    if sum(p.type == _UNKNOWN for p in pieces) != 1:
        raise UserError(f"{file}: it has {sum(p.type == _UNKNOWN for p in pieces)} unknown pieces, one is expected")
    user = [p.piece for p in pieces if p.type == _USER]
    make = _unigram if trained.model_type == _UNIGRAM else _bpe
    model, cuts = make(pieces, trained.byte_fallback)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    controls = {p.piece: i for i, p in enumerate(pieces) if p.type in (_CONTROL, _UNKNOWN)}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": piece, **flags} for piece, i in controls.items()],
        "normalizer": _sequence("normalizers", _normalizer(proto.normalizer_spec, user)),
        "pre_tokenizer": _sequence("pretokenizers", cuts),
        "post_processor": None,
        "decoder": _sequence("decoders", _decoder(proto.normalizer_spec)),
        "model": model,
    }
    named = {
        "bos_token": (trained.bos_id, trained.bos_piece),
        "eos_token": (trained.eos_id, trained.eos_piece),
        "pad_token": (trained.pad_id, trained.pad_piece),
        "unk_token": (trained.unk_id, trained.unk_piece),
    }
    return spec, {key: piece for key, (i, piece) in named.items() if i >= 0 and piece in controls}


def _sequence(inner: str, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"type": "Sequence", inner: steps} if steps else None


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


_BYTE_NAMES = _split("<(?=0x[0-9A-F]{2}>)", "MergedWithPrevious")


def _normalizer(given: Any, user: list[str]) -> list[dict[str, Any]]:
    """Its order is that of sentencepiece: what is blank at the end is cut last, signs that the text itself held included."""
    steps: list[dict[str, Any]] = []
    if given.precompiled_charsmap:
        charsmap = base64.b64encode(given.precompiled_charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap, "exact": sorted(user)})
    blank = SIGN if given.escape_whitespaces else " "
    if given.remove_extra_whitespaces:
        steps += [_replace(r"\A +", ""), _replace(" {2,}", " ")]
    if given.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": blank})
    if given.escape_whitespaces:
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SIGN})
    if given.remove_extra_whitespaces:
        steps.append(_replace(rf"{blank}+\z", ""))
    return steps


def _decoder(given: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SIGN}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if given.add_dummy_prefix or given.remove_extra_whitespaces:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _cut_at_signs(texts: list[str]) -> list[dict[str, Any]]:
    """Cuts before each run of signs where no piece goes across such a place: the same ids, found faster."""
    if any(a != SIGN and b == SIGN for text in texts for a, b in pairwise(text)):
        return []
    return [_split(f"{SIGN}+[^{SIGN}]*|[^{SIGN}]+")]


def _unigram(pieces: list[Any], byte_fallback: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    best = max((p.score for p in pieces if p.type == _NORMAL), default=0.0)
    vocab = [
        [p.piece, len(p.piece.encode("utf-8")) * best - 0.1 if p.type == _USER else float(p.score)] for p in pieces
    ]
    unknown = next(i for i, p in enumerate(pieces) if p.type == _UNKNOWN)
    cuts = _cut_at_signs([p.piece for p in pieces if p.type in (_NORMAL, _USER)])
    cuts += [_BYTE_NAMES] if byte_fallback else []
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": byte_fallback}, cuts


def _bpe(pieces: list[Any], byte_fallback: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    joined = {p.piece: p.score for p in pieces if p.type in (_NORMAL, _USER)}
    ranked = []
    for piece, score in joined.items():
        for n in range(1, len(piece)):
            left, right = piece[:n], piece[n:]
            if left in joined and right in joined:
                ranked.append((-score, piece, n, left, right))
    ranked.sort()
    user = sorted((p.piece for p in pieces if p.type == _USER), key=lambda t: (-len(t), t))
    cuts = [_split("|".join(map(re.escape, user))), *([_BYTE_NAMES] if byte_fallback else [])] if user else []
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(p.piece for p in pieces if p.type == _UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "ignore_merges": bool(user),  # a symbol that was cut out is a piece as it stands
        "vocab": {p.piece: i for i, p in enumerate(pieces)},
        "merges": [[left, right] for *_, left, right in ranked],
    }
    return model, cuts + _cut_at_signs(list(joined) if not user else [SIGN + "x" + SIGN])


# --- the character map -----------------------------------------------------------------------------------------------


class CharsMap:
    """What sentencepiece's normaliser turns characters into: always the longest entry of its map that comes next.

    The map is a double array (https://github.com/s-yata/darts-clone) and the texts that its values point at.
    """

    def __init__(self, encoded: str, user: tuple[str, ...]) -> None:
        """Args: encoded: the map, in base64; user: symbols that the user defined, which stay as they are."""
        data = base64.b64decode(encoded)
        n_bytes = int.from_bytes(data[:4], "little")
        self._units = np.frombuffer(data[4 : 4 + n_bytes], dtype="<u4").astype(np.int64)
        self._texts = data[4 + n_bytes :]
        self._user = re.compile("|".join(map(re.escape, sorted(user, key=lambda t: (-len(t), t)))) or r"(?!)")
        self._single, later = self._walk()
        # An entry of several characters goes on with some of these.
        self._cluster = re.compile(f"[\\s\\S][{re.escape(later)}]+" if later else r"(?!)")
        self._found: dict[str, str] = {}

    def apply(self, text: str) -> str:
        """The text as the map has it."""
        parts, at = [], 0
        for match in (*self._user.finditer(text), None):
            start, end = match.span() if match else (len(text), len(text))
            parts += [self._map(text[at:start]), text[start:end]]
            at = end
        return "".join(parts)

    def _map(self, text: str) -> str:
        parts, at = [], 0
        for match in self._cluster.finditer(text):
            parts += [text[at : match.start()].translate(self._single), self._longest(match[0])]
            at = match.end()
        return "".join([*parts, text[at:].translate(self._single)])

    def _children(self, base: Any) -> tuple[Any, Any, Any]:
        """Of nodes: the number of the parent, the byte and the index of every child."""
        children = base[:, None] ^ np.arange(1, 256)[None, :]
        inside = children < len(self._units)
        labels = self._units[np.where(inside, children, 0)] & 0x800000FF
        parent, byte = np.nonzero(inside & (labels == np.arange(1, 256)[None, :]))
        return parent, byte + 1, children[parent, byte]

    @staticmethod
    def _offset(units: Any) -> Any:
        return (units >> 10) << ((units & 0x200) >> 6)

    def _value(self, unit: int) -> str:
        start = int(unit) & 0x7FFFFFFF
        return self._texts[start : self._texts.index(b"\0", start)].decode("utf-8")

    def _walk(self) -> tuple[dict[int, str], str]:
        """Entries of one character, and all characters that entries of several have after the first."""
        single: dict[int, str] = {}
        later: set[int] = set()
        # Of each node: where its children are, the code point read so far, bytes that it lacks, whole characters before.
        todo = [(self._offset(self._units[:1]), *(np.zeros(1, dtype=np.int64) for _ in range(3)))]
        while todo:
            base, point, lacking, before = todo.pop()
            if len(base) > 4096:
                todo += [
                    tuple(x[half] for x in (base, point, lacking, before)) for half in (slice(4096), slice(4096, None))
                ]
                continue
            parent, byte, node = self._children(base)
            if not len(node):
                continue
            begins = lacking[parent] == 0
            n_more = (byte >= 0xC0).astype(np.int64) + (byte >= 0xE0) + (byte >= 0xF0)
            low = np.where(begins, byte & np.array([0x7F, 0x1F, 0x0F, 0x07])[n_more], byte & 0x3F)
            point = np.where(begins, low, (point[parent] << 6) | low)
            lacking = np.where(begins, n_more, lacking[parent] - 1)
            before = before[parent]
            units = self._units[node]
            base = node ^ self._offset(units)
            whole = lacking == 0
            later.update(point[whole & (before > 0)].tolist())
            leaf = whole & (before == 0) & (((units >> 8) & 1) == 1)
            single |= {
                p: self._value(u) for p, u in zip(point[leaf].tolist(), self._units[base[leaf]].tolist(), strict=True)
            }
            todo.append((base, point, lacking, before + whole))
        return single, "".join(map(chr, sorted(later)))

    def _longest(self, cluster: str) -> str:
        """Maps a cluster, the longest entry first."""
        if cluster not in self._found:
            data, out = cluster.encode("utf-8"), ""
            while data:
                base, best = int(self._offset(self._units[0])), 0
                value = ""
                for n, byte in enumerate(data, 1):
                    node = base ^ byte
                    if byte == 0 or node >= len(self._units) or int(self._units[node]) & 0x800000FF != byte:
                        break
                    base = node ^ int(self._offset(self._units[node]))
                    if (int(self._units[node]) >> 8) & 1:
                        best, value = n, self._value(self._units[base])
                if not best:  # a character that stays as it is
                    best = 1 + (data[0] >= 0xC0) + (data[0] >= 0xE0) + (data[0] >= 0xF0)
                    value = data[:best].decode("utf-8")
                out, data = out + value, data[best:]
            if len(self._found) >= 100_000:
                self._found.clear()
            self._found[cluster] = out
        return self._found[cluster]


@lru_cache(maxsize=4)
def chars_map(encoded: str, user: tuple[str, ...]) -> CharsMap:
    """A map, read once: that takes most of a second."""
    return CharsMap(encoded, user)
