"""The documents of a recipe as text: what a tokenizer is trained and reported on. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llmkit.data.config import DataConfig
from llmkit.data.sources import documents, files_of, is_one_text, units_of
from llmkit.data.workers import KEPT, split_text


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
