"""`llmkit embed`: vectors of texts, the texts nearest to a query, similar words and analogies."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llmkit.config import UserError, locate
from llmkit.data.config import SourceConfig
from llmkit.data.sources import documents, files_of, units_of
from llmkit.inference.embed import Words, context_vectors, encode_rows, layer_of, nearest, text_vectors, token_vectors
from llmkit.model.gpt import GPT
from llmkit.model.weights import load_model
from llmkit.storage import machine_errors, replace_file, resolve_model
from llmkit.tokenizer import Tokenizer
from llmkit.training.dist import pick_device

BLOCK = 2048  # texts that are read, embedded and compared at a time
WINDOW = 16  # tokens from a word on that its context vector is the mean of
_OUT = (".npy", ".npz", ".jsonl")


def run(args: argparse.Namespace) -> int:
    """Results on stdout, notes and progress on stderr."""
    _check(args)
    folder = resolve_model(args.model)
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, None, pick_device(args.device))
    layer_of(model, args.layer)
    if args.analogy or args.analogies or args.similar:
        _words(args, model, tokenizer)
    else:
        _texts(args, model, tokenizer)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses what contradicts itself before a model is loaded."""
    modes = {
        "--query": bool(args.query),
        "--analogy": bool(args.analogy),
        "--analogies": args.analogies is not None,
        "--similar": bool(args.similar),
        "--out": args.out is not None,
    }
    asked = [name for name, given in modes.items() if given]
    if len(asked) > 1:
        raise UserError(f"embed: {asked[0]} and {asked[1]} are different questions: ask one at a time")
    about_words = bool(asked) and asked[0] in ("--analogy", "--analogies", "--similar")
    if args.file is not None and args.text:
        raise UserError("embed: give --text or --file, not both")
    if about_words:
        if args.text:
            raise UserError(f"embed: {asked[0]} is about words: drop --text")
        if (args.file is not None) != (args.vectors == "context"):
            raise UserError(
                "embed: --vectors context and --file belong together: the file is where words are looked at"
            )
        if args.layer is not None and args.vectors != "context":
            raise UserError("embed: --layer is for texts and for --vectors context: an embedding has none")
    elif args.file is None and not args.text:
        raise UserError("embed: give --text, --file, --similar, --analogy or --analogies")
    elif args.file is not None and not asked:
        raise UserError("embed: --file needs --out, where the vectors go, or --query, what is looked for")
    if args.window is not None and (args.vectors != "context" or args.window < 1):
        raise UserError(f"embed: --window {args.window}: at least 1, and for --vectors context only")
    if args.k < 1:
        raise UserError(f"embed: -k must be at least 1 (got {args.k})")
    if args.out is not None and Path(args.out).suffix not in _OUT:
        raise UserError(f"embed: --out {args.out}: its name must end in {', '.join(_OUT)}")


# --- texts ----------------------------------------------------------------------------------------------------------


def read_texts(path: str, field: str) -> Iterator[str]:
    """The texts of a file: one a row under `field`, or one a line of a .txt; blank ones are left out."""
    source = SourceConfig(path=path, field=field)
    for unit in units_of(files_of(source)):
        for piece in unit:
            for document in documents(piece, field):
                lines = document.splitlines() if piece.kind == "txt" else [document]
                yield from (line for line in lines if line.strip())


class _Embedder:
    """Texts -> unit vectors, a block at a time; counts what is cut."""

    def __init__(self, args: argparse.Namespace, model: GPT, tokenizer: Tokenizer):
        self._args, self._model, self._tokenizer = args, model, tokenizer
        self.n, self.n_cut = 0, 0

    def __call__(self, texts: Sequence[str], on_batch: Callable[[int], None] | None = None) -> Tensor:
        rows, n_cut = encode_rows(self._tokenizer, texts, self._model.config.max_seq_len)
        self.n, self.n_cut = self.n + len(rows), self.n_cut + n_cut
        n_skip = int(self._tokenizer.bos_id is not None)
        return text_vectors(
            self._model, rows, n_skip=n_skip, pooling=self._args.pooling, layer=self._args.layer, on_batch=on_batch
        )

    def blocks(self, texts: Iterator[str]) -> Iterator[tuple[list[str], Tensor]]:
        """Texts and their vectors, BLOCK at a time, with a progress bar."""
        with tqdm(unit=" texts", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            while block := list(itertools.islice(texts, BLOCK)):
                yield block, self(block, bar.update)

    def note(self) -> None:
        if self.n_cut:
            longest = self._model.config.max_seq_len
            print(f"note: {self.n_cut} of {self.n} texts were cut to the context of {longest} tokens", file=sys.stderr)


def _texts(args: argparse.Namespace, model: GPT, tokenizer: Tokenizer) -> None:
    def texts() -> Iterator[str]:
        return iter(args.text) if args.text else read_texts(args.file, args.field)

    embed = _Embedder(args, model, tokenizer)
    if args.query:
        queries_QD = embed(args.query)
        products, places = nearest(queries_QD, (vectors for _, vectors in embed.blocks(texts())), args.k)
        wanted = set(places.flatten().tolist())
        found = {i: text for i, text in enumerate(texts()) if i in wanted}
        for query, row, near in zip(args.query, products.tolist(), places.tolist(), strict=True):
            if len(args.query) > 1:
                print(f"--- {_one_line(query)}")
            for cosine, place in zip(row, near, strict=True):
                print(f"{cosine:7.4f}  {place + 1:>6}  {_one_line(found[place])}")
    elif args.out is not None:
        all_texts: list[str] = []
        blocks = []
        for block, vectors in embed.blocks(texts()):
            all_texts += block
            blocks.append(vectors)
        if not blocks:
            raise UserError(f"embed: {args.file}: there is no text in it")
        _write(Path(args.out), all_texts, torch.cat(blocks).numpy())
        print(f"{args.out}: {len(all_texts)} vectors of {model.config.d_model} numbers", file=sys.stderr)
    else:
        vectors_ND = embed(args.text)
        if len(args.text) == 1:
            print(json.dumps({"text": args.text[0], "vector": vectors_ND[0].tolist()}, ensure_ascii=False))
        for text, row in zip(
            args.text, (vectors_ND @ vectors_ND.T).tolist() if len(args.text) > 1 else (), strict=False
        ):
            print("  ".join(f"{cosine:7.4f}" for cosine in row) + f"  {_one_line(text)}")
    embed.note()


def _one_line(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _write(out: Path, texts: list[str], vectors_ND: np.ndarray[Any, Any]) -> None:
    """npy: the matrix; npz: the matrix as `vectors`; jsonl: `{"text", "vector"}`. Rows as in the file, fp32, unit length."""
    with machine_errors(out.parent):
        if out.suffix == ".jsonl":
            rows = zip(texts, vectors_ND.tolist(), strict=True)
            lines = (json.dumps({"text": t, "vector": [round(x, 7) for x in v]}, ensure_ascii=False) for t, v in rows)
            replace_file(out, "".join(line + "\n" for line in lines))
            return
        buffer = io.BytesIO()
        if out.suffix == ".npy":
            np.save(buffer, vectors_ND)
        else:
            np.savez(buffer, vectors=vectors_ND)
        replace_file(out, buffer.getvalue())


# --- words ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Analogy:
    """a is to b as c is to d."""

    a: str
    b: str
    c: str
    d: str | None = None
    group: str = ""
    """Axis and language, where the file tells them."""

    @property
    def words(self) -> tuple[str, ...]:
        return (self.a, self.b, self.c) if self.d is None else (self.a, self.b, self.c, self.d)


def parse_analogy(text: str) -> Analogy:
    """`man:woman::king`, with or without the answer: `man:woman::king:queen`."""
    left, colons, right = text.partition("::")
    parts = [part.strip() for part in (*left.split(":"), *right.split(":"))]
    if not colons or left.count(":") != 1 or len(parts) not in (3, 4) or not all(parts):
        raise UserError(f"embed: --analogy {text!r}: expected a:b::c, such as man:woman::king")
    return Analogy(*parts)


def read_analogies(path: str) -> list[Analogy]:
    """Rows `{"a", "b", "c", "d"}` of a jsonl file, with `axis` and `lang` where it has them."""
    file, found = locate(path), []
    try:
        lines = file.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}: save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise UserError(f"{path}:{number}: not JSON: {e}") from None
        terms = [row.get(key) for key in "abcd"] if isinstance(row, dict) else []
        words = [term for term in terms if isinstance(term, str) and term.strip()]
        if len(words) != 4:
            raise UserError(f'{path}:{number}: expected {{"a", "b", "c", "d"}}, each a word')
        a, b, c, d = words
        found.append(Analogy(a, b, c, d, " ".join(str(row[key]) for key in ("axis", "lang") if key in row)))
    if not found:
        raise UserError(f"{path}: there are no analogies in it")
    return found


def _words(args: argparse.Namespace, model: GPT, tokenizer: Tokenizer) -> None:
    asked = [parse_analogy(text) for text in args.analogy] if args.analogy else []
    asked = read_analogies(args.analogies) if args.analogies is not None else asked
    terms = list(dict.fromkeys(word for one in asked for word in one.words)) or args.similar
    if args.vectors == "context":
        vectors_VD = _context_vectors(args, model, tokenizer)
    else:
        vectors_VD = token_vectors(model, args.vectors, tokenizer.vocab_size)
    words = Words(vectors_VD, tokenizer, terms, args.centre)
    pieces = {word: words.pieces(word) for word in terms}
    for word, ids in pieces.items():
        if len(ids) > 1:
            parts = " + ".join(repr(tokenizer.decode([i])) for i in ids)
            print(f"note: {word!r} is {len(ids)} tokens, of which the mean is taken: {parts}", file=sys.stderr)
    if not asked:
        for word in args.similar:
            print(f"--- {word}")
            for found in words.similar(word, args.k):
                print(f"{found.score:7.4f}  {found.word}")
        return
    for one in asked:
        _print_analogy(args, words, one)
    if args.analogies is not None:
        n_more = len(words.units_CD) - words.n_tokens
        more = f" and {n_more} words of several tokens" if n_more else ""
        print(f"\n{len(words.names)} words were candidates ({words.n_tokens} tokens{more})")
        single = {word for word, ids in pieces.items() if len(ids) == 1}
        print(summary(args, words, asked, single))


def _context_vectors(args: argparse.Namespace, model: GPT, tokenizer: Tokenizer) -> Tensor:
    rows, n_cut = encode_rows(tokenizer, list(read_texts(args.file, args.field)), model.config.max_seq_len)
    if n_cut:
        print(f"note: {n_cut} of {len(rows)} texts were cut to the context", file=sys.stderr)
    # By default the middle of the network: what comes first tells little of the context, what comes last the next word.
    layer = (model.config.n_layers + 1) // 2 if args.layer is None else args.layer
    window = WINDOW if args.window is None else args.window
    with tqdm(total=len(rows), unit=" texts", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        vectors_VD, _ = context_vectors(
            model, rows, tokenizer.vocab_size, layer=layer, window=window, on_batch=bar.update
        )
    return vectors_VD


def _print_analogy(args: argparse.Namespace, words: Words, one: Analogy) -> None:
    found = words.analogy(one.a, one.b, one.c, args.k, args.method)
    near = ", ".join(f"{f.word} {f.score:.3f}" for f in found)
    if one.d is None:
        print(f"{one.a} : {one.b} :: {one.c} : {near}")
        return
    rank = words.rank(one.a, one.b, one.c, one.d, args.method)
    print(f"{rank or '-':>5}  {one.a} : {one.b} :: {one.c} : {one.d}" + ("" if rank == 1 else f"   ({near})"))


def summary(args: argparse.Namespace, words: Words, asked: Sequence[Analogy], single: set[str]) -> str:
    """How many answers came first, over all rows, by group, and over the rows whose words are all one token."""
    ranks: dict[str, list[int | None]] = defaultdict(list)
    for one in asked:
        assert one.d is not None
        rank = words.rank(one.a, one.b, one.c, one.d, args.method)
        names = ["all", *([one.group] if one.group else [])]
        for name in [*names, *(["all words one token"] if single.issuperset(one.words) else [])]:
            ranks[name].append(rank)
    names = ["all", "all words one token", *sorted(ranks.keys() - {"all", "all words one token"})]
    lines = [f"{'':20}  rows  first    share  in the first five"]
    for name in names:
        places = ranks[name]
        n_first, n_five = (sum(r is not None and r <= k for r in places) for k in (1, 5))
        share = f"{100 * n_first / len(places):.1f} %" if places else "-"
        lines.append(f"{name:20}  {len(places):>4}  {n_first:>5}  {share:>7}  {n_five:>5}")
    return "\n".join(lines)
