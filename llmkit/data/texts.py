"""The documents of a recipe as text: what a tokenizer is trained and reported on. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from llmkit.config import dump
from llmkit.data.config import DataConfig
from llmkit.data.sources import documents, files_of, is_one_text, units_of
from llmkit.data.workers import KEPT, split_text
from llmkit.storage import replace_file
from llmkit.tokenizer import Tokenizer, TokenizerConfig


def texts(cfg: DataConfig, normalize: Callable[[str], str], split: str = KEPT) -> Iterator[str]:
    """Normalised training documents (`KEPT`) or held-out ones (`HELD_OUT`), split exactly as `prepare` splits them.

    Raises:
        UserError: as reading the sources does.
    """
    sources = cfg.valid if split != KEPT and cfg.valid else cfg.sources
    frac = 0.0 if cfg.valid else cfg.valid_frac
    for source in sources:
        files = files_of(source)
        holdout = "none" if not frac else "tail" if is_one_text(files) else "hash"
        for unit in units_of(files):
            for piece in unit:
                for text in documents(piece, source.field):
                    for name, part in split_text(holdout, frac, normalize(text)):
                        if part and (name == split or cfg.valid):
                            yield part


def obtain_tokenizer(cfg: TokenizerConfig, data: DataConfig, out: Path) -> Tokenizer:
    """The tokenizer of a recipe: loaded from its `path`, else from `out`, else trained on the text and kept there.

    What is kept in `out` counts only if it was made from the same section of the recipe.
    """
    if cfg.path is not None:
        return Tokenizer.from_config(cfg)
    if (out / "recipe.yaml").is_file() and (out / "recipe.yaml").read_text("utf-8") == dump(cfg):
        return Tokenizer.load(out)
    # The normaliser must be known before the tokenizer is: documents are split by the hash of their normalised text.
    normalize = Tokenizer.train((), TokenizerConfig(kind="byte", normalize=cfg.normalize)).normalize
    tokenizer = Tokenizer.train(texts(data, normalize), cfg)
    for name, content in tokenizer.files().items():
        replace_file(out / name, content)
    replace_file(out / "recipe.yaml", dump(cfg))  # last: without it the files above are made anew
    return tokenizer
