"""Text <-> ids, and the only place that turns a conversation into ids and a loss mask.

The whole definition of a tokenizer is its `tokenizer.json`, which `transformers` loads with the same ids. `tokenizers`
defines what is right; for byte-level BPE, `tiktoken`, built from the same merges and regex and checked when it is built, is
several times as fast. Any text survives encode -> decode with what is trained here (`kinds`); foreign tokenizers may
lose some, and say so (`lossless`).

Text of users never becomes a control token: `encode` knows none. Only `encode_chat` writes them, from the template.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmkit.config import UserError
from llmkit.tokenizer import folders
from llmkit.tokenizer.backend import (
    add_tokens,
    build_backend,
    text_normalizer,
    unmatchable,
    without_charsmap,
    without_prefix,
)
from llmkit.tokenizer.chat import (
    ChatTemplate,
    Rendered,
    Shield,
    TurnsUnclear,
    check_messages,
    check_text,
    check_tools,
    check_written,
)
from llmkit.tokenizer.config import MASKS, TokenizerConfig, is_control
from llmkit.tokenizer.encoder import MAX_RUN, SAMPLE, ByteEngine, TiktokenEngine, build_engine, has_long_blank
from llmkit.tokenizer.kinds import UNKNOWN, train_spec
from llmkit.tokenizer.pieces import Pieces, model_type

logger = logging.getLogger(__name__)

# Characters that Unicode promises never to change under NFC: no need to ask the normaliser. Everything below U+0300, and
# of the rest what Chinese and Japanese text mostly consists of (U+302A-302F and U+3099-309A combine).
_NOT_SURELY_NFC = re.compile("[^\x00-\u02ff\u2010-\u2027\u2030-\u205e\u3000-\u3029\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uff01-\uff5e]")  # fmt: skip # noqa: E501


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


class StreamDecoder:
    """Decodes ids one at a time: what `push` returns, and `finish` at last, adds up to `decode` of all of them.

    A character is returned once all its bytes are there; bytes that aren't UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, start: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._at_start = self._start = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, often empty. Raises ValueError for an id outside the vocabulary."""
        if token_id in self._skip:
            return ""
        data = self._tokenizer.token_bytes(token_id, self._at_start)
        self._at_start = False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD if the last character isn't whole. The decoder may be used again afterwards."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._at_start = self._start
        return text


class Tokenizer:
    """Made by `train`, `load` or `from_config`; never changes; may be shared by threads and sent to processes.

    Attributes:
        kind: what its tokenizer.json holds: `BPE`, `WordPiece` or `Unigram`.
        vocab_size: highest id + 1.
        pad_id, eos_id: ids; bos_id, mask_id: an id, or None where there is no such token.
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
        """Args: spec: tokenizer.json as data; names: `bos_token`, `eos_token`, `pad_token`, and others of folders.NAMED."""
        self._spec = spec
        self.kind = model_type(spec)
        self.names = dict(names)
        self.template = template
        self.asked_vocab_size = asked_vocab_size
        self._extra_stop_ids = tuple(extra_stop_ids)
        added: list[dict[str, Any]] = spec["added_tokens"]
        self.special = {t["content"]: int(t["id"]) for t in added if t["special"]}
        self.special_ids = frozenset(self.special.values())
        spec, self._charsmap = without_charsmap(spec)
        self._backend, self._remap = build_backend(spec)
        pieces = Pieces(spec, self._backend)
        self.vocab_size = pieces.size
        self._first, self._bytes = pieces.first, pieces.rest
        counted = [0 if i in self.special_ids else len(b) for i, b in enumerate(self._bytes)]
        self._n_bytes = np.array(counted, dtype=np.int64)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 65_535 else np.uint32)
        ids = {k: self.special[v] for k, v in self.names.items() if v is not None}
        self.bos_id, self.mask_id = ids.get("bos_token"), ids.get("mask_token")
        self.eos_id, self.pad_id = ids["eos_token"], ids["pad_token"]
        self._unknown = {self.special[t] for t in (self.names.get("unk_token"),) if t is not None}
        self._normalizer, self._normal_type, self._is_text_normalizer = text_normalizer(spec)
        self._shield = Shield(list(self.special))
        # Tokens such as <think> that a foreign tokenizer matches in any text: only `tokenizers` does that.
        texts = [t["content"] for t in added if not t["special"]]
        self._matched = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._scan = _scanner(added)
        self._prefix, bare = without_prefix(spec)
        # For text that goes on after other text: without the space that some put before every text.
        self._bare = self._backend if self._prefix == "never" else build_backend(bare)[0]
        self._refuse_leaks()

    def _refuse_leaks(self) -> None:
        control = self.special_ids - self._unknown
        for text in self.special:
            if control & {*self._slow(text), *self._slow(unmatchable(text))}:
                raise UserError(f"tokenizer: the text {text!r} of a control token is encoded as that token: rename it")

    # - making -

    @classmethod
    def train(
        cls, texts: Iterable[str], cfg: TokenizerConfig, should_stop: Callable[[], bool] | None = None
    ) -> Tokenizer:
        """Trains a tokenizer: the same texts in the same order give the same bytes on disk, but for `unigram`.

        Raises:
            UserError: when there is no text, or one that isn't text.
            Interrupted: when `should_stop`, which is asked all the time, said so.
        """
        spec = train_spec(cfg, texts, should_stop)
        names: dict[str, str | None] = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
        masks = [t for t in MASKS if t in cfg.special]
        names |= {"mask_token": masks[0]} if masks else {}
        names |= {"unk_token": UNKNOWN} if any(t["content"] == UNKNOWN for t in spec["added_tokens"]) else {}
        asked = cfg.vocab_size if cfg.kind != "byte" else None
        template = folders.read_template(cfg.chat_template or "chatml")
        made = cls(spec, names, template, asked_vocab_size=asked)
        if asked is not None and made.vocab_size < asked:
            why = "no more pieces" if made.kind == "Unigram" else f"no more pairs that occur {cfg.min_frequency} times"
            logger.warning("tokenizer: vocabulary of %d reached, %d asked for: the text has %s", made.vocab_size, asked,
                           why)  # fmt: skip
        return made

    @classmethod
    def load(cls, folder: str | Path, chat_template: str | None = None, add: Sequence[str] = ()) -> Tokenizer:
        """Reads a folder with a tokenizer.json or, failing that, a tokenizer.model of sentencepiece, or a run folder (its
        newest checkpoint that has one). Runs no code of it.

        Control tokens are those marked special, and those that tokenizer_config.json names. A missing pad token, or one
        that is also the end token (which would never be learnt), is replaced by a control token called pad, reserved or
        unused, or unk; failing that, by the end token, with a warning. BERT's separator serves as its missing end token.

        Args:
            folder: where to look.
            chat_template: `chatml` or a file, instead of the folder's own.
            add: tokens to add: control tokens when written like `<|name|>`, else plain text.

        Raises:
            UserError: when files are missing, damaged, or of a kind that isn't known here.
        """
        folder = folders.find(Path(folder))
        try:
            found = folders.read(folder)
            add_tokens(found, add)
            new_pads = [t for t in add if "pad" in t.lower() and is_control(t)]
            if new_pads and found.names["pad_token"] == found.names["eos_token"]:
                found.names["pad_token"] = new_pads[0]
            given = found.template if chat_template is None else None
            known = {t["content"] for t in found.spec["added_tokens"]}
            if given is not None:
                template: ChatTemplate | None = ChatTemplate(given, f"{folder}: chat template")
            elif chat_template is not None or {"<|im_start|>", "<|im_end|>"} <= known:
                template = folders.read_template(chat_template or "chatml")
            else:
                template = None
            return cls(found.spec, found.names, template, found.stops)
        except UserError as e:
            raise UserError(f"{folder}: {str(e).removeprefix(f'{folder}: ')}") from None
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise UserError(f"{folder}: tokenizer.json is damaged: {type(e).__name__}: {e}") from None
        except BaseException as e:
            # A panic of the library is no Exception, and its class can't be imported.
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            raise UserError(f"{folder}: tokenizer.json cannot be read: {' '.join(str(e).split())}") from None

    @classmethod
    def from_config(cls, cfg: TokenizerConfig, texts: Iterable[str] | None = None) -> Tokenizer:
        """The tokenizer of a recipe: loaded when it names a path, else trained on `texts`."""
        if cfg.path is not None:
            return cls.load(cfg.path, cfg.chat_template, cfg.add)
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
        return build_engine(self._spec, self._backend) if self._is_text_normalizer else None

    def normalize(self, text: str) -> str:
        """The Unicode normalisation of text: what `decode(encode(text))` gives back, if the tokenizer is lossless.

        Raises UserError for what isn't text."""
        check_text(text)
        kind = self._normal_type
        if kind is None:
            return text
        if (kind in ("NFC", "NFKC") and text.isascii()) or (kind == "NFC" and not _NOT_SURELY_NFC.search(text)):
            return text
        # Not `unicodedata`: it may know another version of Unicode than `tokenizers`, and so than transformers.
        return str(self._normalizer.normalize_str(text))

    @cached_property
    def lost(self) -> str | None:
        """A short text that doesn't survive encode -> decode, or None when all of the samples do."""
        blanks = ("a b", " a", "a ", "a  b", "a\nb", "a\tb", "a .", "don 't")
        signs = ("\u2581", " \u2581a", "##a", "a##b", "<0x41>", "A", "漢", "\U0001f600", "\x00")
        samples = (*blanks, *signs, *self.special, *SAMPLE)
        return next((t for t in samples if self.decode(self.encode(t)) != self.normalize(t)), None)

    @property
    def lossless(self) -> bool:
        """Whether any text survives encode -> decode but for its normalisation, going by a sample of hard texts."""
        return self.lost is None

    def _slow(self, text: str, prefix: bool = True) -> list[int]:
        backend = self._backend if prefix else self._bare
        text = text if self._charsmap is None else self._charsmap.apply(text)
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=False)
        return self._mapped(encoding.ids)

    def _mapped(self, ids: list[int]) -> list[int]:
        return list(ids) if not self._remap else [self._remap.get(i, i) for i in ids]

    def _array(self, text: str, prefix: bool = True) -> np.ndarray:
        normal = self.normalize(text)
        fast = self._fast
        if fast is None or (self._matched is not None and self._matched.search(text)):
            return np.array(self._slow(text, prefix), dtype=np.int64)
        if isinstance(fast, TiktokenEngine) and len(normal) >= MAX_RUN and has_long_blank(normal):
            return np.array(self._slow(text, prefix), dtype=np.int64)
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
        if self._fast is None:  # built once, before the threads; `tokenizers` brings its own
            for text in texts:
                check_text(text)
            mapped = list(texts) if self._charsmap is None else [self._charsmap.apply(t) for t in texts]
            batch = self._backend.encode_batch_fast(mapped, add_special_tokens=False)
            return [np.array(self._mapped(encoding.ids), dtype=self.dtype) for encoding in batch]
        n = min(len(texts), threads * 8)
        slices = [texts[len(texts) * i // n : len(texts) * (i + 1) // n] for i in range(n)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for part in pool.map(lambda s: [one(t) for t in s], slices) for ids in part]

    # - ids to text -

    def token_bytes(self, token_id: int, at_start: bool = False) -> bytes:
        """The bytes that a token stands for; of a control token, its name. Raises ValueError outside the vocabulary.

        Args:
            token_id: the token.
            at_start: at the very beginning of a text, where some foreign tokenizers drop the space that they put there.
        """
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"id {token_id} is outside the vocabulary of {self.vocab_size}")
        return (self._first if at_start else self._bytes)[token_id]

    def decode(self, ids: Iterable[int], skip_special: bool = True, start: bool = True) -> str:
        """The text of ids; bytes that aren't UTF-8 become U+FFFD. Raises ValueError for an id outside the vocabulary.

        Args:
            ids: what to decode.
            skip_special: leave control tokens out.
            start: these ids begin a text. False: they go on from others (a reply after its prompt), which makes a difference
                only for foreign tokenizers that put a space before every text.
        """
        skip = self.special_ids if skip_special else frozenset()
        kept = [i for i in map(int, ids) if i not in skip]
        data = [self.token_bytes(i, at_start=start and n == 0) for n, i in enumerate(kept)]
        return b"".join(data).decode("utf-8", "replace")

    def stream(self, skip_special: bool = True, start: bool = True) -> StreamDecoder:
        """A decoder for ids that come one by one; the arguments are those of `decode`."""
        return StreamDecoder(self, skip_special, start)

    def n_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Bytes of text that ids stand for, control tokens none: what a loss is divided by for bits per byte."""
        return int(self._n_bytes[np.asarray(ids, dtype=np.int64)].sum())

    # - conversations -

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        train_on: Literal["assistant", "last", "all"] = "assistant",
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
            train_on: what `loss_mask` covers: the assistant's turns, the last of them alone, or every token.
            tools: JSON schemas of tools, which the template must list.

        Raises:
            TurnsUnclear: the template doesn't tell what the assistant wrote.
            UserError: for a wrong message, or a template that fails or leaves out tools and calls of them.
        """
        checked, variables = check_messages(messages), self._variables(add_generation_prompt, tools)
        rendered = self._rendered(checked, variables)
        assert self.template is not None
        spans = rendered.spans
        if spans is None:
            try:
                only_last = train_on == "last"
                spans = self.template.derive_spans(checked, self._shield, variables, rendered.text, only_last)
            except UserError:
                if not add_generation_prompt and train_on != "all":
                    raise
        elif train_on == "last":
            spans = spans[-1:]
        must_mask = train_on != "all" and any(m["role"] == "assistant" for m in checked)
        if spans is None and must_mask and not add_generation_prompt:
            raise TurnsUnclear(
                f"{self.template.name}: it has no generation tags, and a longer conversation changes the text of an "
                "earlier turn, so what the assistant wrote cannot be told: put {% generation %} tags around it in a copy "
                "(tokenizer.chat_template), or give each turn as a conversation of its own"
            )
        spans = spans or []
        ids, bounds = self._encode_rendered(rendered.shielded, rendered.restore, spans)
        if must_mask and rendered.spans is not None and not bounds:
            raise UserError(f"{self.template.name}: nothing of what the assistant wrote is within generation tags")
        mask = [int(train_on == "all")] * len(ids)
        if train_on != "all":
            for first, last in bounds:
                mask[first:last] = [1] * (last - first)
                if last < len(ids) and ids[last] in self.stop_ids and not self.stop_ids & set(ids[first:last]):
                    raise UserError(
                        f"{self.template.name}: its generation block ends before the end-of-turn token, so the model "
                        "would never learn to stop: move that token inside in a copy (tokenizer.chat_template)"
                    )
        return ChatEncoding(ids, mask, rendered.text, bounds)

    def render_chat(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The text that `encode_chat` encodes. Raises UserError as it does."""
        return self._rendered(check_messages(messages), self._variables(add_generation_prompt, tools)).text

    def _variables(self, add_generation_prompt: bool, tools: list[Any] | None) -> dict[str, Any]:
        names = {k: v for k, v in self.names.items() if v is not None}
        return {**names, "add_generation_prompt": add_generation_prompt, "tools": check_tools(tools)}

    def _rendered(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> Rendered:
        if self.template is None:
            raise UserError("this tokenizer has no chat template: set tokenizer.chat_template to chatml or to a file")
        rendered = self.template.render(messages, self._shield, variables)
        check_written(self.template.name, rendered.text, messages, variables["tools"])
        return rendered

    def _encode_rendered(
        self, text: str, restore: dict[int, str], spans: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of rendered text, in which every control token is the template's; and the spans in tokens."""
        ids: list[int] = []
        token_at: dict[int, int] = {}  # character of a cut -> number of tokens before it
        cuts = [cut for span in spans for cut in span][::-1]
        at = 0

        after_control = False

        def encode_to(end: int) -> None:
            nonlocal at, after_control
            if end > at:
                prefix = at == 0 or (after_control and self._prefix == "always")
                ids.extend(self._array(text[at:end].translate(restore), prefix).tolist())
                after_control = False
            at = end

        for match in (*self._scan.finditer(text), None):
            start, end = match.span() if match else (len(text), len(text))
            while cuts and cuts[-1] <= start:
                encode_to(cuts[-1])
                token_at[cuts.pop()] = len(ids)
            encode_to(start)
            if match:
                ids.append(self.special[match[0] if match[0] in self.special else match[0].strip()])
                at, after_control = end, True
            while cuts and cuts[-1] <= end:  # within the blanks that a control token swallows
                token_at[cuts.pop()] = len(ids)
        bounds = [(token_at[a], token_at[b]) for a, b in spans]
        return ids, [(a, b) for a, b in bounds if b > a]

    def encode_on(self, text: str, before: Sequence[int]) -> list[int]:
        """The ids of text that goes on from others: without the space that some tokenizers put before every text."""
        prefix = not before or (before[-1] in self.special_ids and self._prefix == "always")
        return list(self._array(text, prefix).tolist()) if text else []

    def encode_reply(self, text: str, prompt: Sequence[int]) -> list[int]:
        """The ids of what is said after a prompt, its end of turn included and nothing after it."""
        return [*self.encode_on(text, prompt), self.end_of_turn_id]

    @cached_property
    def _turn_end(self) -> int | None:
        """The control token that the template writes after the assistant's text."""
        if self.template is None:
            return None
        probe = "A1z9B2y8"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
        try:
            text = self.template.render(messages, self._shield, self._variables(False, None)).text
        except UserError:
            return None
        match = self._shield.pattern.search(text, text.rfind(probe) + len(probe)) if probe in text else None
        return self.special[match[0]] if match else None

    @property
    def ends_turns(self) -> bool:
        """Whether the chat template writes a control token after the assistant's text, by which a model learns to stop."""
        return self._turn_end is not None

    @property
    def end_of_turn_id(self) -> int:
        """The control token that the template writes after the assistant's text, else `eos_id`."""
        return self.eos_id if self._turn_end is None else self._turn_end

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
