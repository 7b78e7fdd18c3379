"""Training of each kind of tokenizer: texts -> tokenizer.json as data.

All kinds are lossless and know every text. Three write a word as its UTF-8 bytes, each as one printable character:

- bpe: merges the most frequent neighbours, again and again.
- wordpiece: trained like bpe, but encodes by taking the longest known beginning of what is left. Inside of a word a piece
  begins with `##`. So that text which holds `##` survives, every `#` is cut off before; and as encoding takes quadratic
  time, words are cut at 32 characters.
- unigram: begins with many pieces and drops those whose loss makes the text least improbable; encodes by the most
  probable cut.

sentencepiece works on characters. A space becomes the sign U+2581, and the sign itself, where a text holds it, becomes a
space: the two are swapped, which the decoder undoes. Characters without a token of their own become tokens of bytes.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from tempfile import TemporaryFile
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmkit.config import Interrupted, UserError
from llmkit.tokenizer.chat import check_text
from llmkit.tokenizer.config import SPECIAL, TokenizerConfig
from llmkit.tokenizer.encoder import GPT4_REGEX

logger = logging.getLogger(__name__)

Spec = dict[str, Any]
SIGN = "\u2581"
UNKNOWN = "<unk>"
BYTE_PIECES = tuple(f"<0x{b:02X}>" for b in range(256))
LONGEST_WORD = 32  # characters, for wordpiece
# As GPT4_REGEX, with the sign for the space. A name such as <0x41> or <|im_end|> is never whole.
SIGN_REGEX = (
    rf"{SIGN}?[\p{{L}}\p{{M}}]+|{SIGN}?\p{{N}}{{1,3}}|{SIGN}?[^{SIGN}\s\p{{L}}\p{{M}}\p{{N}}]+"
    rf"|{SIGN}+(?={SIGN}[^{SIGN}\s])|{SIGN}+|\s+"
)
_POLL_S = 0.1
_WORDS_A_LINE = 64
_LONGEST_PIECE = 18  # six Chinese characters as bytes


def train_spec(cfg: TokenizerConfig, texts: Iterable[str], should_stop: Callable[[], bool] | None = None) -> Spec:
    """Trains a tokenizer of the kind that the recipe names.

    The library's training can't be interrupted, so it runs in a thread of its own, and this one waits for it: Ctrl-C
    works at once, and `should_stop` is asked ten times a second.

    Raises:
        UserError: when there is no text, or one that isn't text.
        Interrupted: when `should_stop` said so.
    """
    stopped = threading.Event()
    result: list[Spec | BaseException] = []

    def checked() -> Iterator[str]:
        n = -1
        for n, text in enumerate(texts):
            if stopped.is_set():
                raise Interrupted
            check_text(text, f"text {n}")
            yield text
        if n < 0:
            raise UserError("tokenizer: there is no text to train it on")

    def work() -> None:
        try:
            result.append(_TRAINERS[cfg.kind](cfg, checked()))
        except BaseException as e:  # handed to the thread that waits
            result.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            if should_stop is not None and should_stop():
                raise Interrupted("training of the tokenizer was stopped")
            thread.join(_POLL_S)
    finally:
        stopped.set()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _specials(cfg: TokenizerConfig) -> list[str]:
    return [*SPECIAL, *cfg.special]


def _normalizers(cfg: TokenizerConfig) -> list[Any]:
    known: dict[str, list[Any]] = {"nfc": [normalizers.NFC()], "nfkc": [normalizers.NFKC()], "none": []}
    return known[cfg.normalize]


# --- bytes -----------------------------------------------------------------------------------------------------------


def _byte_level(cfg: TokenizerConfig, model: Any, regex: str | None = GPT4_REGEX, chunk: int = 0) -> Any:
    backend = tokenizers.Tokenizer(model)
    for normalizer in _normalizers(cfg):
        backend.normalizer = normalizer
    cuts: list[Any] = [] if regex is None else [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")]
    if chunk:
        longest = pre_tokenizers.Split(tokenizers.Regex(rf"[\s\S]{{1,{chunk}}}"), "isolated")
        cuts = [pre_tokenizers.Split("#", "isolated"), *cuts, longest]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes]) if cuts else to_bytes
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _train_byte(cfg: TokenizerConfig, texts: Iterator[str]) -> Spec:
    backend = _byte_level(cfg, models.BPE(), None)  # no merges: nothing to learn from the texts, and nothing to cut
    backend.train_from_iterator((), trainers.BpeTrainer(vocab_size=cfg.least_size, **_shared(cfg)))
    return dict(json.loads(backend.to_str()))


def _shared(cfg: TokenizerConfig) -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {"special_tokens": _specials(cfg), "initial_alphabet": alphabet, "show_progress": False}


def _train_bpe(cfg: TokenizerConfig, texts: Iterator[str]) -> Spec:
    backend = _byte_level(cfg, models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=cfg.vocab_size, min_frequency=cfg.min_frequency, **_shared(cfg))
    backend.train_from_iterator(texts, trainer)
    return dict(json.loads(backend.to_str()))


def _train_wordpiece(cfg: TokenizerConfig, texts: Iterator[str]) -> Spec:
    backend = _byte_level(cfg, models.WordPiece(max_input_chars_per_word=4 * LONGEST_WORD), chunk=LONGEST_WORD)
    # Training would know bytes inside of a word only where it saw them, in the order of a hash table.
    inner = ["##" + c for c in sorted(pre_tokenizers.ByteLevel.alphabet())]
    shared = {**_shared(cfg), "special_tokens": [*_specials(cfg), *inner]}
    trainer = trainers.WordPieceTrainer(vocab_size=cfg.vocab_size, min_frequency=cfg.min_frequency, **shared)
    backend.train_from_iterator(texts, trainer)
    spec = dict(json.loads(backend.to_str()))
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in inner]
    strip = {"type": "Replace", "pattern": {"String": "##"}, "content": ""}
    spec["decoder"] = {"type": "Sequence", "decoders": [strip, spec["decoder"]]}
    return spec


def _train_unigram(cfg: TokenizerConfig, texts: Iterator[str]) -> Spec:
    backend = _byte_level(cfg, models.Unigram())
    normal = texts if backend.normalizer is None else map(backend.normalizer.normalize_str, texts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = _unigram_pieces(normal, backend.pre_tokenizer, alphabet, cfg.vocab_size - len(_specials(cfg)))
    backend.add_special_tokens(_specials(cfg))
    return _with_pieces(backend, _specials(cfg), pieces)


def _with_pieces(backend: Any, first: list[str], pieces: list[list[Any]]) -> Spec:
    """The model's pieces after the first tokens, of which the control tokens come first."""
    spec = dict(json.loads(backend.to_str()))
    for token in spec["added_tokens"]:
        token["id"] = first.index(token["content"])
    spec["added_tokens"].sort(key=lambda token: token["id"])
    spec["model"].update(vocab=[*([token, 0.0] for token in first), *pieces], unk_id=None)
    return spec


_CUT, _MARK, _END = "\x01", "\x02", "\x00"  # between words; after some; where the trainer lets no piece go across


def _unigram_pieces(texts: Iterable[str], cutter: Any, alphabet: list[str], size: int) -> list[list[Any]]:
    """Pieces and their log probabilities, by the trainer of `tokenizers`.

    That trainer takes its first pieces from a list of all words, each listed once: substrings that occur there twice, and
    before two different characters. A word that is no part of another would never be found, however frequent it is. So
    every word that the texts hold twice is listed again, with a mark behind it, in lines of many words; pieces that hold a
    mark are dropped.
    """
    counts: Counter[str] = Counter()

    def lines() -> Iterator[str]:
        for text in texts:
            words = [word for word, _ in cutter.pre_tokenize_str(text)]
            counts.update(words)
            yield _CUT.join(words)
        twice = [word + _MARK for word, count in counts.items() if count > 1 and len(word) > 1]
        for i in range(0, len(twice), _WORDS_A_LINE):
            yield _END.join(twice[i : i + _WORDS_A_LINE])

    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Split(_CUT, "removed")
    more = size + size // 20 + 2
    trainer = trainers.UnigramTrainer(
        vocab_size=more, initial_alphabet=alphabet, max_piece_length=_LONGEST_PIECE, show_progress=False
    )
    backend.train_from_iterator(lines(), trainer)
    trained = json.loads(backend.to_str())["model"]["vocab"]  # the most probable first
    # Without any text the scores are not numbers.
    pieces = [[p, -10.0 if score is None else score] for p, score in trained if _END not in p and _MARK not in p]
    single = {p for p, _ in pieces if len(p) == 1}
    room = size - len(single)
    longer = [p for p, _ in pieces if len(p) > 1][:room]
    kept = single | set(longer)
    return [[p, score] for p, score in pieces if p in kept]


# --- characters ------------------------------------------------------------------------------------------------------


def _swap(module: Any) -> list[Any]:
    """Swaps space and sign, in three replacements that need no third character: a mark (a space) before each sign that
    was a space; signs without one become spaces; a mark and its sign become the sign."""
    unmarked = tokenizers.Regex(f"(?<! ){SIGN}")
    return [module.Replace(" ", f" {SIGN}"), module.Replace(unmarked, " "), module.Replace(f" {SIGN}", SIGN)]


class _Spool:
    """Texts on disk, to be read twice, and how often each of their characters occurs."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._file = TemporaryFile()  # noqa: SIM115 - closed and gone with this object
        self._sizes = array("Q")
        self.counts: Counter[str] = Counter()
        for text in texts:
            data = text.encode("utf-8")
            self._file.write(data)
            self._sizes.append(len(data))
            self.counts.update(text)

    def parts(self, kept: str) -> Iterator[str]:
        """The texts, cut where a character isn't among those kept."""
        other = re.compile(f"[^{re.escape(kept)}]+") if kept else re.compile(r"[\s\S]+")
        self._file.seek(0)
        for size in self._sizes:
            yield from filter(None, other.split(self._file.read(size).decode("utf-8")))


def _alphabet(cfg: TokenizerConfig, counts: Counter[str]) -> str:
    """The most frequent characters, up to the coverage, or to half of the vocabulary's room."""
    room = (cfg.vocab_size - cfg.least_size) // 2
    needed = cfg.coverage * sum(counts.values())
    kept: list[str] = []
    seen = 0
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if seen >= needed or len(kept) == room:
            break
        if char not in (_CUT, _MARK, _END):
            kept.append(char)
        seen += count
    if seen < needed:
        share = 100 * seen / sum(counts.values())
        logger.warning("tokenizer: vocab_size %d leaves room for the %d most frequent characters, %.2f %% of the text: "
                       "the others are written as bytes", cfg.vocab_size, len(kept), share)  # fmt: skip
    return "".join(kept)


def _train_sentencepiece(cfg: TokenizerConfig, texts: Iterator[str]) -> Spec:
    whole = normalizers.Sequence([*_normalizers(cfg), *_swap(normalizers)])
    spool = _Spool(map(whole.normalize_str, texts))
    kept = _alphabet(cfg, spool.counts)
    backend = tokenizers.Tokenizer(models.Unigram() if cfg.model == "unigram" else models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(SIGN_REGEX), "isolated")
    backend.decoder = decoders.Sequence([*_swap(decoders), decoders.ByteFallback(), decoders.Fuse()])
    train = {"unigram": _train_characters, "bpe": _merge_characters}[cfg.model]
    spec = train(cfg, backend, spool.parts(kept), [SIGN, " ", *kept])
    shown = tokenizers.Tokenizer(models.BPE())
    shown.normalizer = whole  # not on the backend that trains: its texts are normalised
    spec["normalizer"] = json.loads(shown.to_str())["normalizer"]
    spec["model"]["byte_fallback"] = True
    return spec


def _train_characters(cfg: TokenizerConfig, backend: Any, texts: Iterator[str], alphabet: list[str]) -> Spec:
    first = [*_specials(cfg), UNKNOWN, *BYTE_PIECES]
    pieces = _unigram_pieces(texts, backend.pre_tokenizer, alphabet, cfg.vocab_size - len(first))
    # The model wants an unknown token, though bytes make sure that it never writes it.
    backend.add_special_tokens([*_specials(cfg), UNKNOWN])
    spec = _with_pieces(backend, first, pieces)
    spec["model"]["unk_id"] = first.index(UNKNOWN)
    return spec


def _merge_characters(cfg: TokenizerConfig, backend: Any, texts: Iterator[str], alphabet: list[str]) -> Spec:
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        min_frequency=cfg.min_frequency,
        special_tokens=[*_specials(cfg), *BYTE_PIECES],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    spec = dict(json.loads(backend.to_str()))
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in BYTE_PIECES]
    return spec


_TRAINERS: dict[str, Callable[[TokenizerConfig, Iterator[str]], Spec]] = {
    "bpe": _train_bpe,
    "wordpiece": _train_wordpiece,
    "unigram": _train_unigram,
    "sentencepiece": _train_sentencepiece,
    "byte": _train_byte,
}
