"""Text <-> ids: byte-level BPE and plain bytes, and the only place that turns a conversation into ids and a loss mask.

Every tokenizer here is byte level, so that any text survives encode -> decode. Its whole definition is `tokenizer.json`,
which `transformers` loads with the same ids. `tokenizers` defines what is right; `tiktoken`, built from the same merges
and regex and checked when it is built, is several times as fast.

Text of users never becomes a control token: `encode` knows none. Only `encode_chat` writes them, from the template.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from pydantic import Field, field_validator, model_validator
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmkit.chat import CHATML, ChatTemplate, Shield, check_messages, check_text, check_tools
from llmkit.config import Config, UserError
from llmkit.encoder import (
    BYTE_OF_CHAR,
    GPT4_REGEX,
    MAX_RUN,
    ByteEngine,
    TiktokenEngine,
    build_tiktoken,
    bytes_of_token,
    has_long_blank,
    regex_of,
)

logger = logging.getLogger(__name__)

SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
# Characters that Unicode promises never to change under NFC: no need to ask the normaliser. Everything below U+0300, and
# of the rest what Chinese and Japanese text mostly consists of (U+302A-302F and U+3099-309A combine).
_NOT_SURELY_NFC = re.compile("[^\x00-\u02ff\u2010-\u2027\u2030-\u205e\u3000-\u3029\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uff01-\uff5e]")  # fmt: skip # noqa: E501


class TokenizerConfig(Config):
    """How text becomes ids. A recipe may write `tokenizer: FOLDER` for `tokenizer: {path: FOLDER}`."""

    kind: Literal["byte", "bpe"] = "bpe"
    """`bpe`: byte-level byte pair encoding, trained; `byte`: 256 bytes and the special tokens."""
    vocab_size: int = Field(4096, ge=1, le=1 << 20)
    """Tokens asked for, special ones included; a small corpus may yield fewer. `byte` ignores it."""
    normalize: Literal["nfc", "nfkc", "none"] = "nfc"
    """Unicode normalisation before encoding. NFKC would turn Chinese punctuation into ASCII."""
    min_frequency: int = Field(2, ge=1)
    """A pair must occur this often to be merged."""
    special: tuple[str, ...] = ()
    """More control tokens, such as `<|tool|>`, after the five that every tokenizer has."""
    path: str | None = None
    """A folder that holds a tokenizer.json (a run, a checkpoint, a Hugging Face folder), instead of training one."""
    chat_template: str | None = None
    """`chatml` or a file with a Jinja template; null: the folder's own, or else chatml."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data

    @field_validator("special", mode="before")
    @classmethod
    def _tuple(cls, special: Any) -> Any:
        # A model validator that runs before turns JSON into Python data, where strict types know no list for a tuple.
        return tuple(special) if isinstance(special, list) else special

    @field_validator("special")
    @classmethod
    def _check_special(cls, special: tuple[str, ...]) -> tuple[str, ...]:
        for i, token in enumerate(special):
            # Brackets around a letter: the regex cuts such text apart, so no merge can ever produce the whole token.
            if not re.fullmatch(r"[<\[][^\s]*[A-Za-z][^\s]*[>\]]", token) or not token.isascii():
                raise ValueError(
                    f"{token!r}: a control token is written like <|name|>, <name> or [NAME], without spaces"
                )
            if token in SPECIAL or token in special[:i]:
                raise ValueError(f"{token!r} is there already: name each control token once")
        return special

    @model_validator(mode="after")
    def _check_together(self) -> TokenizerConfig:
        least = 256 + len(SPECIAL) + len(self.special)
        if self.kind == "bpe" and self.vocab_size < least:
            raise ValueError(
                f"vocab_size {self.vocab_size} is too small: 256 bytes and the special tokens need {least}"
            )
        if self.path is not None:
            fields = ("kind", "vocab_size", "normalize", "min_frequency", "special")
            extra = [f for f in fields if getattr(self, f) != type(self).model_fields[f].default]
            if extra:
                raise ValueError(f"path names a finished tokenizer, so drop {', '.join(extra)} (or drop path)")
        return self


@dataclass(frozen=True)
class ChatEncoding:
    """A conversation as ids."""

    ids: list[int]
    loss_mask: list[int]
    """1: the model is to learn to write this token (the assistant's text and its end of turn)."""
    text: str
    """What the template wrote."""
    turns: list[tuple[int, int]]
    """First and last + 1 token of each assistant turn; empty when the template doesn't tell."""


# --- training --------------------------------------------------------------------------------------------------------


def _new_backend(cfg: TokenizerConfig, regex: str | None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    if cfg.normalize != "none":
        backend.normalizer = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC}[cfg.normalize]()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = [] if regex is None else [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _train(cfg: TokenizerConfig, texts: Iterable[str], vocab_size: int, regex: str | None) -> tokenizers.Tokenizer:
    backend = _new_backend(cfg, regex)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=cfg.min_frequency,
        special_tokens=[*SPECIAL, *cfg.special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _train_byte(cfg: TokenizerConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
    return _train(cfg, (), 256 + len(SPECIAL) + len(cfg.special), None)  # no merges, so nothing to learn from the texts


def _train_bpe(cfg: TokenizerConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
    seen = 0

    def checked() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            check_text(text, f"text {seen}")
            seen += 1
            yield text

    backend = _train(cfg, checked(), cfg.vocab_size, GPT4_REGEX)
    if not seen:
        raise UserError("tokenizer: there is no text to train it on")
    return backend


TRAINERS: dict[str, Callable[[TokenizerConfig, Iterable[str]], tokenizers.Tokenizer]] = {
    "byte": _train_byte,
    "bpe": _train_bpe,
}


class StreamDecoder:
    """Decodes ids one at a time: what `push` returns, and `finish` at last, adds up to `decode` of all of them.

    A character is returned once all its bytes are there; bytes that aren't UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, often empty. Raises ValueError for an id outside the vocabulary."""
        return "" if token_id in self._skip else self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD if the last character isn't whole. The decoder may be used again afterwards."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


# --- the tokenizer ---------------------------------------------------------------------------------------------------


class Tokenizer:
    """Made by `train`, `load` or `from_config`; never changes; may be shared by threads and sent to processes.

    Attributes:
        vocab_size: highest id + 1.
        pad_id, eos_id: ids; bos_id: an id, or None where a foreign tokenizer has none.
        special_ids: ids of all control tokens.
        template: the chat template, or None.
        asked_vocab_size: what the recipe asked for, when this tokenizer was just trained.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        names: Mapping[str, str | None],
        template: ChatTemplate | None,
        extra_stop_ids: Iterable[int] = (),
        asked_vocab_size: int | None = None,
    ) -> None:
        """Args: spec: tokenizer.json as data; names: `bos_token`, `eos_token`, `pad_token`."""
        self._spec = spec
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._backend.encode_special_tokens = True
        self.names = dict(names)
        self.template = template
        self.asked_vocab_size = asked_vocab_size
        self._extra_stop_ids = tuple(extra_stop_ids)
        self._regex = regex_of(spec)
        self._normalizer = spec.get("normalizer")
        added: list[dict[str, Any]] = spec["added_tokens"]
        self.special = {t["content"]: int(t["id"]) for t in added if t["special"]}
        self.special_ids = frozenset(self.special.values())
        table: dict[int, bytes] = {i: bytes_of_token(t) for t, i in spec["model"]["vocab"].items()}
        table.update({int(t["id"]): t["content"].encode("utf-8") for t in added})
        self.vocab_size = max(table) + 1
        self._bytes = [table.get(i, b"") for i in range(self.vocab_size)]
        counted = [0 if i in self.special_ids else len(b) for i, b in enumerate(self._bytes)]
        self._n_bytes = np.array(counted, dtype=np.int64)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 65_535 else np.uint32)
        ids = {k: self.special[v] if v is not None else None for k, v in self.names.items()}
        self.bos_id = ids["bos_token"]
        self.eos_id, self.pad_id = self._required(ids, "eos_token"), self._required(ids, "pad_token")
        self._shield = Shield(list(self.special))
        # Tokens such as <think> that a foreign tokenizer matches in any text: only `tokenizers` does that.
        texts = [t["content"] for t in added if not t["special"]]
        self._matched = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._scan = _scanner(added)
        self._refuse_leaks()

    @staticmethod
    def _required(ids: Mapping[str, int | None], name: str) -> int:
        value = ids[name]
        assert value is not None, name
        return value

    def _refuse_leaks(self) -> None:
        for text in self.special:
            if self.special_ids & set(self._slow(text)):
                raise UserError(f"tokenizer: the text {text!r} of a control token is encoded as that token: rename it")

    # - making -

    @classmethod
    def train(cls, texts: Iterable[str], cfg: TokenizerConfig) -> Tokenizer:
        """Trains a tokenizer: the same texts in the same order give the same bytes on disk.

        Raises:
            UserError: when there is no text, or one that isn't text.
        """
        spec = json.loads(TRAINERS[cfg.kind](cfg, texts).to_str())
        names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
        asked = cfg.vocab_size if cfg.kind == "bpe" else None
        made = cls(spec, names, _read_template(cfg.chat_template or "chatml"), asked_vocab_size=asked)
        if asked is not None and made.vocab_size < asked:
            logger.warning("tokenizer: vocabulary of %d reached, %d asked for: the text has no more pairs that occur %d "
                           "times", made.vocab_size, asked, cfg.min_frequency)  # fmt: skip
        return made

    @classmethod
    def load(cls, folder: str | Path, chat_template: str | None = None) -> Tokenizer:
        """Reads a folder with a tokenizer.json, or a run folder (its newest checkpoint that has one). Runs no code of it.

        Control tokens are those marked special, and those that tokenizer_config.json names. A missing pad token, or one
        that is also the end token (which would never be learnt), is replaced by a control token called pad, reserved or
        unused, or unk; failing that, by the end token, with a warning.

        Raises:
            UserError: when files are missing, damaged, or of a kind that isn't known here.
        """
        folder = _find(Path(folder))
        spec, config = _read_json(folder / "tokenizer.json"), _read_json(folder / "tokenizer_config.json", {})
        if spec.get("model", {}).get("type", "BPE") != "BPE" or "merges" not in spec.get("model", {}):
            raise UserError(f"{folder}: tokenizer.json is not byte pair encoding, the only kind known here")
        if config.get("auto_map"):
            logger.warning(
                "%s: its own tokenizer code (auto_map) is ignored: code of a model folder never runs", folder
            )
        spec.update(truncation=None, padding=None)  # else every text would be cut or filled up
        spec.setdefault("added_tokens", [])
        try:
            names, stops = _control_tokens(folder, spec, config)
            source = _folder_template(folder, config) if chat_template is None else None
            if source is not None:
                template: ChatTemplate | None = ChatTemplate(source, f"{folder}: chat template")
            elif chat_template is not None or {"<|im_start|>", "<|im_end|>"} <= {
                t["content"] for t in spec["added_tokens"]
            }:
                template = _read_template(chat_template or "chatml")
            else:
                template = None
            return cls(spec, names, template, stops)
        except UserError as e:
            raise UserError(f"{folder}: {str(e).removeprefix(f'{folder}: ')}") from None
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{folder}: tokenizer.json is damaged: {type(e).__name__}: {e}") from None
        except Exception as e:
            raise UserError(f"{folder}: tokenizer.json cannot be read: {e}") from None

    @classmethod
    def from_config(cls, cfg: TokenizerConfig, texts: Iterable[str] | None = None) -> Tokenizer:
        """The tokenizer of a recipe: loaded when it names a path, else trained on `texts`."""
        if cfg.path is not None:
            return cls.load(cfg.path, cfg.chat_template)
        return cls.train(() if texts is None else texts, cfg)

    # - keeping -

    def files(self, model_max_length: int | None = None) -> dict[str, bytes]:
        """What `save` writes, by name: the same bytes every time."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.update({k: v for k, v in self.names.items() if v is not None})
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        config["clean_up_tokenization_spaces"] = False
        config["model_input_names"] = ["input_ids", "attention_mask"]
        if self.template is not None:
            config["chat_template"] = self.template.source
        return {
            name: (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode("utf-8")
            for name, data in (("tokenizer.json", self._spec), ("tokenizer_config.json", config))
        }

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Writes tokenizer.json and tokenizer_config.json (a checkpoint's writer takes `files` instead)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files(model_max_length).items():
            (folder / name).write_bytes(content)

    def __reduce__(self) -> tuple[Any, ...]:
        source = None if self.template is None else (self.template.source, self.template.name)
        return _restore, (self._spec, self.names, source, self._extra_stop_ids, self.asked_vocab_size)

    @cached_property
    def hash(self) -> str:
        """Names the mapping from text to ids (hex SHA-256 of the canonical tokenizer.json)."""
        text = json.dumps(self._spec, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    @cached_property
    def template_hash(self) -> str:
        """Names the chat template (hex SHA-256 of its source; of nothing when there is none)."""
        return hashlib.sha256((self.chat_template or "").encode("utf-8")).hexdigest()

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template."""
        return None if self.template is None else self.template.source

    # - text to ids -

    @cached_property
    def _fast(self) -> ByteEngine | TiktokenEngine | None:
        vocab = self._spec["model"]["vocab"]
        if not self._spec["model"]["merges"] and all(c in vocab for c in BYTE_OF_CHAR):
            # Without merges no regex can make a difference.
            return ByteEngine(
                np.array([vocab[c] for c, _ in sorted(BYTE_OF_CHAR.items(), key=lambda x: x[1])], np.int64)
            )
        fast = build_tiktoken(self._spec, self._backend)
        if isinstance(fast, str):
            logger.warning("tokenizer: encoding takes the slow way (`tokenizers`), as %s", fast)
            return None
        return fast

    def normalize(self, text: str) -> str:
        """The text that `decode(encode(text))` gives back. Raises UserError for what isn't text."""
        check_text(text)
        if self._backend.normalizer is None:
            return text
        kind = self._normalizer["type"] if self._normalizer else None
        if (kind in ("NFC", "NFKC") and text.isascii()) or (kind == "NFC" and not _NOT_SURELY_NFC.search(text)):
            return text
        # Not `unicodedata`: it may know another version of Unicode than `tokenizers`, and so than transformers.
        return str(self._backend.normalizer.normalize_str(text))

    def _slow(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _array(self, text: str) -> np.ndarray:
        normal = self.normalize(text)
        fast = self._fast
        if fast is None or (self._matched is not None and self._matched.search(text)):
            return np.array(self._slow(text), dtype=np.int64)
        if isinstance(fast, TiktokenEngine) and len(normal) >= MAX_RUN and has_long_blank(normal):
            return np.array(self._slow(text), dtype=np.int64)
        return fast.encode(normal)

    def encode(self, text: str) -> list[int]:
        """The ids of a user's text: never a control token, nothing added at either end.

        Raises:
            UserError: for anything but text, and for half a surrogate pair.
        """
        return list(self._array(text).tolist())

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """`encode` of each text, as arrays of uint16 (uint32 when the vocabulary needs it), in the order of the texts."""

        def one(text: str) -> np.ndarray:
            return self._array(text).astype(self.dtype)

        if threads <= 1 or len(texts) <= 1:
            return [one(t) for t in texts]
        self._fast  # noqa: B018 - built once, before the threads
        n = min(len(texts), threads * 8)
        slices = [texts[len(texts) * i // n : len(texts) * (i + 1) // n] for i in range(n)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for part in pool.map(lambda s: [one(t) for t in s], slices) for ids in part]

    # - ids to text -

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; of a control token, its name. Raises ValueError outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._bytes[token_id]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; bytes that aren't UTF-8 become U+FFFD. Raises ValueError for an id outside the vocabulary."""
        skip = self.special_ids if skip_special else frozenset()
        return b"".join(self.token_bytes(i) for i in map(int, ids) if i not in skip).decode("utf-8", "replace")

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that come one by one."""
        return StreamDecoder(self, skip_special)

    def n_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Bytes of text that ids stand for, control tokens none: what a loss is divided by for bits per byte."""
        return int(self._n_bytes[np.asarray(ids, dtype=np.int64)].sum())

    # - conversations -

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        train_on: Literal["assistant", "all"] = "assistant",
        tools: list[Any] | None = None,
    ) -> ChatEncoding:
        """Renders a conversation and encodes it: control tokens come from the template alone.

        The text is also cut where the assistant's turns begin and end, so that a prompt's ids are the beginning of the
        whole conversation's, and the mask covers the turn exactly. (transformers doesn't cut, so a reply that begins
        with a newline has other ids there.)

        Args:
            messages: `{role, content}` each, with any other fields that the template reads.
            add_generation_prompt: end with the beginning of the assistant's turn. Spans that a template doesn't tell
                are then no error, as a prompt isn't trained on.
            train_on: what `loss_mask` covers: the assistant's turns, or every token.
            tools: JSON schemas of tools, if the template lists them.

        Raises:
            UserError: for a wrong message, a template that fails, or one that doesn't tell what the assistant wrote.
        """
        checked = check_messages(messages)
        if self.template is None:
            raise UserError("this tokenizer has no chat template: set tokenizer.chat_template to chatml or to a file")
        variables: dict[str, Any] = {k: v for k, v in self.names.items() if v is not None}
        variables |= {"add_generation_prompt": add_generation_prompt, "tools": check_tools(tools)}
        rendered = self.template.render(checked, self._shield, variables)
        spans = rendered.spans
        if spans is None:
            try:
                spans = self.template.derive_spans(checked, self._shield, variables, rendered.text)
            except UserError:
                if not add_generation_prompt and train_on == "assistant":
                    raise
        has_assistant = any(m["role"] == "assistant" for m in checked)
        must_mask = has_assistant and train_on == "assistant"
        if spans is None and must_mask and not add_generation_prompt:
            raise UserError(
                f"{self.template.name}: it has no generation tags, and a longer conversation changes the text of an "
                "earlier turn, so what the assistant wrote cannot be told: put {% generation %} tags around it in a copy "
                "(tokenizer.chat_template), or give each turn as a conversation of its own"
            )
        spans = spans or []
        ids, bounds = self._encode_rendered(rendered.shielded, rendered.restore, spans)
        if must_mask and rendered.spans is not None and not bounds:
            raise UserError(f"{self.template.name}: nothing of what the assistant wrote is within generation tags")
        mask = [int(train_on == "all")] * len(ids)
        if train_on == "assistant":
            for first, last in bounds:
                mask[first:last] = [1] * (last - first)
                if last < len(ids) and ids[last] in self.stop_ids and not self.stop_ids & set(ids[first:last]):
                    raise UserError(
                        f"{self.template.name}: its generation block ends before the end-of-turn token, so the model "
                        "would never learn to stop: move that token inside in a copy (tokenizer.chat_template)"
                    )
        return ChatEncoding(ids, mask, rendered.text, bounds)

    def _encode_rendered(
        self, text: str, restore: dict[int, str], spans: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of rendered text, in which every control token is the template's; and the spans in tokens."""
        ids: list[int] = []
        token_at: dict[int, int] = {}  # character of a cut -> number of tokens before it
        cuts = [cut for span in spans for cut in span][::-1]
        at = 0

        def encode_to(end: int) -> None:
            nonlocal at
            ids.extend(self.encode(text[at:end].translate(restore)) if end > at else ())
            at = end

        for match in (*self._scan.finditer(text), None):
            start, end = match.span() if match else (len(text), len(text))
            while cuts and cuts[-1] <= start:
                encode_to(cuts[-1])
                token_at[cuts.pop()] = len(ids)
            encode_to(start)
            if match:
                ids.append(self.special[match[0] if match[0] in self.special else match[0].strip()])
                at = end
            while cuts and cuts[-1] <= end:  # within the blanks that a control token swallows
                token_at[cuts.pop()] = len(ids)
        bounds = [(token_at[a], token_at[b]) for a, b in spans]
        return ids, [(a, b) for a, b in bounds if b > a]

    @cached_property
    def end_of_turn_id(self) -> int:
        """The control token that the template writes after the assistant's text, else `eos_id`."""
        if self.template is None:
            return self.eos_id
        probe = "A1z9B2y8"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
        variables: dict[str, Any] = {k: v for k, v in self.names.items() if v is not None}
        try:
            text = self.template.render(messages, self._shield, {**variables, "add_generation_prompt": False}).text
        except UserError:
            return self.eos_id
        match = self._shield.pattern.search(text, text.rfind(probe) + len(probe)) if probe in text else None
        return self.special[match[0]] if match else self.eos_id

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generation: end of text, end of turn, and what a folder's generation_config.json adds."""
        return frozenset({self.eos_id, self.end_of_turn_id, *self._extra_stop_ids})


def _restore(
    spec: dict[str, Any],
    names: dict[str, str | None],
    template: tuple[str, str] | None,
    extra_stop_ids: tuple[int, ...],
    asked: int | None,
) -> Tokenizer:
    return Tokenizer(spec, names, ChatTemplate(*template) if template else None, extra_stop_ids, asked)


def _scanner(added: list[dict[str, Any]]) -> re.Pattern[str]:
    """Finds control tokens as `tokenizers` does: the longest first; some of them swallow the blanks at their sides."""
    special = sorted((t for t in added if t["special"]), key=lambda t: -len(t["content"]))
    parts = [
        (r"\s*" if t.get("lstrip") else "") + re.escape(t["content"]) + (r"\s*" if t.get("rstrip") else "")
        for t in special
    ]
    return re.compile("|".join(parts) or r"(?!)")


# --- reading folders -------------------------------------------------------------------------------------------------


def _find(folder: Path) -> Path:
    """The folder itself, or a run's newest checkpoint that holds a tokenizer."""
    places = [folder, *sorted(folder.glob("checkpoints/step-*"), reverse=True)]
    for place in places:
        if (place / "tokenizer.json").is_file():
            return place
    raise UserError(f"{folder}: no tokenizer.json here, nor in checkpoints/step-*")


def _read_json(file: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not file.is_file():
        return default
    try:
        data = json.loads(file.read_bytes())
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not JSON: {e}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: a JSON object is expected (got {type(data).__name__})")
    return data


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 at byte {e.start}") from None


def _read_template(name: str) -> ChatTemplate:
    return ChatTemplate(CHATML, "chatml") if name == "chatml" else ChatTemplate(_read_text(Path(name)), name)


def _folder_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja goes before tokenizer_config.json, as in transformers."""
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default")
    if source is not None and not isinstance(source, str):
        raise UserError(f"tokenizer_config.json: chat_template must be text (got {type(source).__name__})")
    return source


def _control_tokens(
    folder: Path, spec: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, str | None], list[int]]:
    """bos, eos and pad of a foreign folder, and further ids that end a generation; marks named tokens as special."""
    added: list[dict[str, Any]] = spec["added_tokens"]
    text_of = {i: t for t, i in spec["model"]["vocab"].items()} | {t["id"]: t["content"] for t in added}
    generation = _read_json(folder / "generation_config.json", {})

    def name_of(key: str) -> str | None:
        value = config.get(key)
        return value.get("content") if isinstance(value, dict) else value

    names = {key: name_of(key) for key in ("bos_token", "eos_token", "pad_token")}
    stops = generation.get("eos_token_id")
    if stops is None:
        stops = _read_json(folder / "config.json", {}).get("eos_token_id")
    stops = [i for i in (stops if isinstance(stops, list) else [stops]) if i in text_of]
    if names["eos_token"] is None and stops:
        names["eos_token"] = text_of[stops[0]]
    if names["eos_token"] is None:
        raise UserError("no end-of-text token: neither tokenizer_config.json nor generation_config.json names one")
    more = config.get("additional_special_tokens") or []
    more = [t.get("content") if isinstance(t, dict) else t for t in more]
    for name in dict.fromkeys([*names.values(), *more, *(text_of[i] for i in stops)]):
        _mark_special(spec, name)
    if names["pad_token"] in (None, names["eos_token"]):
        controls = [
            t["content"] for t in added if t["special"] and t["content"] not in (names["eos_token"], names["bos_token"])
        ]
        spare = [t for word in ("pad", "reserved", "unused", "unk") for t in controls if word in t.lower()]
        names["pad_token"] = spare[0] if spare else names["eos_token"]
        if not spare:
            logger.warning(
                "%s: no control token is free for padding, so the end token serves: never mask by its id", folder
            )
    return names, stops


def _mark_special(spec: dict[str, Any], name: str | None) -> None:
    if name is None:
        return
    for token in spec["added_tokens"]:
        if token["content"] == name:
            token["special"] = True
            return
    if name not in spec["model"]["vocab"]:
        raise UserError(f"tokenizer_config.json names {name!r}, which tokenizer.json doesn't hold")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"].append({"id": spec["model"]["vocab"][name], "content": name, **flags})
