"""The documents of a recipe as text: what a tokenizer is trained and reported on. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from llmkit.config import dump
from llmkit.data.cache import take_lock
from llmkit.data.config import DataConfig
from llmkit.data.dedup import digest, normal_form
from llmkit.data.documents import Account, kept_documents
from llmkit.data.filters import Cleaner
from llmkit.data.sources import files_of, is_one_text, units_of
from llmkit.data.workers import KEPT, split_text
from llmkit.storage import replace_file
from llmkit.tokenizer import Tokenizer, TokenizerConfig


def texts(cfg: DataConfig, normalize: Callable[[str], str], split: str = KEPT) -> Iterator[str]:
    """Normalised training documents (`KEPT`) or held-out ones (`HELD_OUT`), cleaned and split as `prepare` does it.

    Of `dedup`, whatever its kind, only exact copies within the training text are left out: they are found in one pass,
    in which each document takes about 70 bytes.

    Raises:
        UserError: as reading the sources does.
    """
    given = split != KEPT and cfg.valid
    sources = cfg.valid if given else cfg.sources
    cleaner = Cleaner(cfg.clean) if cfg.clean.is_on and not given else None
    frac = 0.0 if cfg.valid else cfg.valid_frac
    seen: set[bytes] | None = set() if cfg.dedup.kind and not given else None
    for source in sources:
        files = files_of(source)
        holdout = "none" if not frac else "tail" if is_one_text(files) else "hash"
        for unit in units_of(files, source.limit):
            for text in kept_documents(unit, source.field, source.template, cleaner, None, Account()):
                if seen is not None:
                    known = digest(normal_form(text))
                    if known in seen:
                        continue
                    seen.add(known)
                for name, part in split_text(holdout, frac, normalize(text)):
                    if part and (name == split or cfg.valid):
                        yield part


def obtain_tokenizer(
    cfg: TokenizerConfig, data: DataConfig, out: Path, should_stop: Callable[[], bool] | None = None
) -> Tokenizer:
    """The tokenizer of a recipe: loaded from its `path`, else from `out`, else trained on the text and kept there.

    What is kept in `out` counts only if it was made from the same section of the recipe. Of several processes that come
    at once, one trains it and the others wait.

    Raises:
        UserError: as reading the sources or the folder does.
        Interrupted: `should_stop`, which is asked while it trains, said so.
    """
    if cfg.path is not None:
        return Tokenizer.from_config(cfg)
    if _is_kept(cfg, out):
        return Tokenizer.load(out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        take_lock(lock, should_stop or (lambda: False), f"{out}: another run trains the same tokenizer")
        return Tokenizer.load(out) if _is_kept(cfg, out) else _train(cfg, data, out, should_stop)


def _is_kept(cfg: TokenizerConfig, out: Path) -> bool:
    return (out / "recipe.yaml").is_file() and (out / "recipe.yaml").read_text("utf-8") == dump(cfg)


def normalizer_of(cfg: TokenizerConfig) -> Callable[[str], str]:
    """The normaliser that a tokenizer will have: it must be known first, as documents are split by the hash of their
    normalised text."""
    return Tokenizer.train((), TokenizerConfig(kind="byte", normalize=cfg.normalize)).normalize


def _train(cfg: TokenizerConfig, data: DataConfig, out: Path, should_stop: Callable[[], bool] | None) -> Tokenizer:
    tokenizer = Tokenizer.train(texts(data, normalizer_of(cfg)), cfg, should_stop)
    for name, content in tokenizer.files().items():
        replace_file(out / name, content)
    replace_file(out / "recipe.yaml", dump(cfg))  # last: without it the files above are made anew
    return tokenizer
