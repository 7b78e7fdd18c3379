"""Records -> the documents that are learnt from: read, cleaned, and an account of what was left out. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llmkit.data.dedup import REASONS
from llmkit.data.filters import Cleaner
from llmkit.data.sources import Piece, documents, numbered_documents


class Judged(NamedTuple):
    """A document, and what was decided about it."""

    text: str
    verdict: int
    """0: it stays; else the place of the reason in REASONS."""
    piece: int
    """The piece that it stands in, and its row there."""
    row: int


class Account:
    """What was left out of a unit."""

    def __init__(self) -> None:
        self.removed: dict[str, list[int]] = {}
        """By the reason's name: documents, their characters, and the piece and row of the first."""

    def add(self, document: Judged) -> None:
        entry = self.removed.setdefault(REASONS[document.verdict], [0, 0, document.piece, document.row])
        entry[0] += 1
        entry[1] += len(document.text)


def judged_documents(
    pieces: Sequence[Piece],
    field: str,
    template: str | None,
    cleaner: Cleaner | None,
    verdicts: Sequence[int] | None = None,
) -> Iterator[Judged]:
    """All documents of a unit.

    Args:
        verdicts: what was decided before, document by document; without them the cleaner's rules decide.
    """
    number = 0
    for i, piece in enumerate(pieces):
        for row, text in numbered_documents(piece, field, template):
            if cleaner is not None:
                text = cleaner.edit(text)
            if verdicts is not None:
                verdict = verdicts[number]
            else:
                rule = cleaner.broken_rule(text) if cleaner is not None else None
                verdict = REASONS.index(rule) if rule else 0
            number += 1
            yield Judged(text, verdict, i, row)


def kept_documents(
    pieces: Sequence[Piece],
    field: str,
    template: str | None,
    cleaner: Cleaner | None,
    verdicts: Sequence[int] | None,
    account: Account,
) -> Iterator[str]:
    """The documents of a unit that stay; the others are put to account. Without rules this costs nothing."""
    if cleaner is None and verdicts is None:
        for piece in pieces:
            yield from documents(piece, field, template)
        return
    for document in judged_documents(pieces, field, template, cleaner, verdicts):
        if document.verdict:
            account.add(document)
        else:
            yield document.text
