"""A teacher with another tokenizer: the same text in its tokens, and where the tokens of both end at the same place.

What a position stands for is the text up to it. So a student's position and a teacher's say the same thing if the bytes
of their texts do, and only there can their distributions be compared. A text is cut where control tokens stand, and where
what is learnt begins and ends; each stretch is encoded anew. A conversation is told to the teacher in its own template.

Legend: B rows of T inputs of the student, U rows of the teacher, M positions that are aligned.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.config import UserError
from llmkit.data.chats import ChatRows
from llmkit.data.loader import PADDING, Batch, TextRows, text_batch
from llmkit.data.packing import IGNORE, Rows, bucketed
from llmkit.data.sequences import moved
from llmkit.distill.config import LossConfig, UldConfig
from llmkit.distill.transcripts import Side, Transcripts, common_length, told_in, whole_characters
from llmkit.tokenizer import Tokenizer

Ints = NDArray[np.int64]
_HELD_TOKENS = 1 << 22  # documents of so many tokens together are aligned once, and not in every epoch


def check_tokenizers(student: Tokenizer, teacher: Tokenizer, losses: Sequence[LossConfig]) -> bool:
    """Whether the two give the same ids, going by the hashes of what defines them.

    Raises:
        UserError: they don't, and a term compares the two models token for token.
    """
    if student.hash == teacher.hash:
        return True
    for term in losses:
        if not isinstance(term, UldConfig):
            raise UserError(
                f"losses: {term.label} compares the two models token for token, but the teacher has another tokenizer: "
                f"{_difference(student, teacher)}: give the student the teacher's (leave `tokenizer` out, or set "
                "tokenizer.path to the teacher), or take `losses: [{kind: uld}]`"
            )
    return False


def _difference(student: Tokenizer, teacher: Tokenizer) -> str:
    """Why two tokenizers are not the same."""
    for i in range(min(student.vocab_size, teacher.vocab_size)):
        ours, theirs = student.token_bytes(i), teacher.token_bytes(i)
        if ours != theirs:
            return f"id {i} is {ours!r} to the student and {theirs!r} to the teacher"
    if student.vocab_size != teacher.vocab_size:
        return f"the student's has {student.vocab_size:,} tokens, the teacher's {teacher.vocab_size:,}"
    return "the ids stand for the same text, but text is cut into them in another way"


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AlignedBatch(Batch):
    """The student's rows, the same documents for the teacher, and the positions at which both stand at the same place."""

    teacher_ids_UT: Tensor
    """int64, in rows and a width of their own."""
    teacher_positions_UT: Tensor
    """int64, within the document."""
    teacher_docs_UT: Tensor
    """int32, number of the document within its row; -1: padding."""
    student_at_M: Tensor
    """int64, b * T + t of each aligned position whose label is trained, rising."""
    teacher_at_M: Tensor
    """int64, the same place in the teacher's rows, u * T' + t."""

    def to(self, device: torch.device | str) -> AlignedBatch:
        return AlignedBatch(**moved(self, device))


class AlignedRows:
    """Makes the batches of a `RowLoader` out of another's rows. They depend on nothing but the rows.

    Args:
        rows: the student's.
        max_len: most inputs of a document that the teacher takes; of a longer one the beginning is aligned.
        chat: the rows are conversations in the student's template.
        pin_memory: batches lie in pinned memory, for copies to a GPU.
    """

    def __init__(
        self,
        rows: ChatRows | TextRows,
        student: Tokenizer,
        teacher: Tokenizer,
        *,
        max_len: int,
        chat: bool,
        pin_memory: bool = False,
    ):
        self.rows, self.n_rows, self.row_len = rows, rows.n_rows, rows.row_len
        self._aligner = Aligner(student, teacher, chat)
        self._max_len, self._pad_id, self._pin_memory = max_len, teacher.pad_id, pin_memory
        self._held: dict[bytes, Aligned] = {}
        self._n_held = 0

    def batch(
        self, numbers: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> tuple[AlignedBatch, list[NDArray[Any]]]:
        """See `RowMaker`; the sample numbers make no difference."""
        rows, tokens = self.rows.rows(source, row)
        found = [self._row(rows, b) for b in range(len(rows.ids_BT))]
        longest = max((sum(len(a.ids) for _, a in row_) for row_ in found), default=0)
        shape = (len(found), bucketed(longest, longest + 8))
        ids_UT, positions_UT = np.full(shape, self._pad_id, np.int64), np.zeros(shape, np.int64)
        docs_UT = np.full(shape, -1, np.int32)
        ours, theirs = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for b, documents in enumerate(found):
            at = 0
            for n, (start, aligned) in enumerate(documents):
                here = slice(at, at + len(aligned.ids))
                ids_UT[b, here], positions_UT[b, here], docs_UT[b, here] = aligned.ids, np.arange(len(aligned.ids)), n
                ours.append(b * rows.ids_BT.shape[1] + start + aligned.student_at)
                theirs.append(b * shape[1] + at + aligned.teacher_at)
                at = here.stop
        arrays = (ids_UT, positions_UT, docs_UT, np.concatenate(ours), np.concatenate(theirs))
        tensors = [torch.from_numpy(a) for a in arrays]
        names = ("teacher_ids_UT", "teacher_positions_UT", "teacher_docs_UT", "student_at_M", "teacher_at_M")
        more: dict[str, Any] = {
            k: t.pin_memory() if self._pin_memory else t for k, t in zip(names, tensors, strict=True)
        }
        return AlignedBatch(**{**vars(text_batch(rows, self._pin_memory)), **more}), tokens

    def aligned_frac(self, n_rows: int = 32) -> float:
        """Share of the trained positions that are aligned, in the first rows of each source.

        Raises:
            UserError: none is, so that nothing could be learnt from the teacher.
        """
        n_trained = n_aligned = 0.0
        for source, n in enumerate(self.n_rows):
            row = np.arange(min(n, n_rows))
            batch, _ = self.batch(row, np.full(len(row), source), row)
            n_trained += batch.denominator
            n_aligned += len(batch.student_at_M)
        if not n_aligned:
            raise UserError(
                "losses: uld finds no place at which the student's and the teacher's tokens end together: the teacher's "
                "tokenizer changes all text, or its chat template leaves no room for the answers"
            )
        return n_aligned / n_trained

    def _row(self, rows: Rows, b: int) -> list[tuple[int, Aligned]]:
        """A row's documents: where each begins, and what the teacher sees of it."""
        docs, found = rows.docs_BT[b], []
        edges = [0, *(np.flatnonzero(np.diff(docs)) + 1).tolist(), len(docs)]
        for start, stop in itertools.pairwise(edges):
            if docs[start] != PADDING:
                found.append((start, self._document(rows.ids_BT[b, start:stop], rows.labels_BT[b, start:stop])))
        return found

    def _document(self, inputs: Ints, labels: Ints) -> Aligned:
        """Its whole tokens, the last label among them, are what is aligned; then what the teacher need not see is cut."""
        key = inputs.tobytes() + labels.tobytes()
        if key in self._held:
            return self._held[key]
        is_trained = labels != IGNORE
        ids = np.append(inputs, labels[-1:][is_trained[-1:]])
        whole = self._aligner(ids, np.append(False, is_trained)[: len(ids)])
        made = whole.cut(self._max_len)
        if self._n_held + len(ids) <= _HELD_TOKENS:
            self._held[key] = made
            self._n_held += len(ids)
        return made


# --- a document ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aligned:
    """A document in the teacher's tokens."""

    ids: Ints
    """The teacher's."""
    student_at: Ints
    """(M,) positions of the student, whose next token is trained, rising."""
    teacher_at: Ints
    """(M,) the teacher's positions that stand at the same place."""

    def cut(self, most: int) -> Aligned:
        """At most so many of its tokens, and none behind the last place that counts: no earlier one sees them."""
        kept = self.teacher_at < most
        student_at, teacher_at = self.student_at[kept], self.teacher_at[kept]
        return Aligned(self.ids[: int(teacher_at.max(initial=-1)) + 1], student_at, teacher_at)


class Aligner:
    """Says a document of the student's in the teacher's tokens.

    Args:
        chat: documents are conversations in the student's template. Where the teacher's is another, they are read back
            into messages, if these give the same ids again, and told in the teacher's; only the assistant's turns are
            aligned then. Any other is said as it stands, with the teacher's counterparts of the control tokens: of the
            same name, else of the same role; one that has none is written as plain text.
    """

    def __init__(self, student: Tokenizer, teacher: Tokenizer, chat: bool):
        self._student, self._teacher = Side(student), Side(teacher)
        self._counterparts = _counterparts(student, teacher, chat)
        retold = chat and teacher.template is not None and student.chat_template != teacher.chat_template
        self._transcripts = Transcripts(student) if retold and student.template is not None else None

    def __call__(self, ids: Ints, trained: NDArray[np.bool_]) -> Aligned:
        """Args: ids: (n,) the document's; trained: (n,) which of them are learnt, the first never."""
        tokens = ids.tolist()
        found = None if self._transcripts is None else self._retold(tokens)
        theirs, ours_at, theirs_at = self._said(tokens, trained) if found is None else found
        student_at, teacher_at = paired(ours_at, theirs_at)
        counts = np.append(trained[1:], False)[student_at]
        return Aligned(np.array(theirs, np.int64), student_at[counts], teacher_at[counts])

    # Both ways give the teacher's ids and, of each position of either side, its place: how much of the text it has seen,
    # in bytes; -1 for a place that the other side can't stand at.

    def _said(self, ids: list[int], trained: NDArray[np.bool_]) -> tuple[list[int], Ints, Ints]:
        """The document as it stands."""
        student, teacher = self._student, self._teacher
        pieces, places = student.pieces(ids), np.zeros(len(ids), np.int64)
        made: list[int] = []
        made_at: list[Ints] = []
        at, fresh = 0, True

        def add(new: list[int], where: Ints) -> None:
            made.extend(new)
            made_at.append(where)

        if student.tokenizer.bos_id is None and teacher.tokenizer.bos_id is not None:
            add([teacher.tokenizer.bos_id], np.zeros(1, np.int64))
        for start, stop in _stretches(ids, trained, student.control):
            if ids[start] in student.control:
                is_bos = self._is_bos(ids[start], start)
                at += not is_bos  # a text is the same with and without it
                places[start] = at
                counterpart = teacher.tokenizer.bos_id if is_bos else self._counterparts.get(ids[start])
                if counterpart is not None:
                    add([counterpart], np.array([at]))
                elif not is_bos:
                    new = teacher.encoded(student.tokenizer.token_bytes(ids[start]).decode(), made, fresh)
                    add(new, np.append(np.full(len(new) - 1, -1), at))
                    fresh = False
                continue
            data = b"".join(pieces[start:stop])
            places[start:stop] = at + _ends(pieces[start:stop])
            text, skipped, n_bytes = whole_characters(data)
            if text:
                new = teacher.encoded(text, made, fresh)
                said = teacher.pieces(new, fresh)
                where = _places(b"".join(said), _ends(said), data[skipped : skipped + n_bytes])
                add(new, np.where(where < 0, -1, where + at + skipped))
                fresh = False
            at += len(data)
        return made, places, np.concatenate([np.empty(0, np.int64), *made_at])

    def _is_bos(self, token: int, position: int) -> bool:
        """Whether a token begins a text; where it also ends one, only at the very beginning."""
        tokenizer = self._student.tokenizer
        return token == tokenizer.bos_id and (position == 0 or token != tokenizer.eos_id)

    def _retold(self, ids: list[int]) -> tuple[list[int], Ints, Ints] | None:
        """The conversation in the teacher's template; None if it can't be read back, or the teacher's refuses it."""
        assert self._transcripts is not None
        read = self._transcripts.read(ids)
        told = None if read is None else told_in(self._teacher.tokenizer, read.messages, read.only_last)
        if read is None or told is None or len(told[1]) != len(read.turns):
            return None
        theirs, their_turns = told
        pieces, said = self._student.pieces(ids), self._teacher.pieces(theirs)
        ours_at, theirs_at = np.full(len(ids), -1, np.int64), np.full(len(theirs), -1, np.int64)
        base = 0
        for (a, b), (c, d) in zip(read.turns, their_turns, strict=True):
            ours, turn = pieces[a:b], said[c:d]
            # The position before a turn has seen none of it, the one before the turn's last token all but that.
            ours_at[a - 1 : b - 1] = base + np.append(0, _ends(ours))[:-1]
            where = _places(b"".join(turn), np.append(0, _ends(turn)), b"".join(ours))[:-1]
            theirs_at[c - 1 : d - 1] = np.where(where < 0, -1, base + where)
            base += sum(map(len, ours)) + 1
        return theirs, ours_at, theirs_at


def paired(ours_at: Ints, theirs_at: Ints) -> tuple[Ints, Ints]:
    """The positions that stand at the same place.

    Several do where a token adds no text. The last of them is followed by what comes there, so they are paired from the
    last on.

    Args:
        ours_at: places, rising; -1: none.
        theirs_at: the same of the other side.
    """
    sides = []
    longest = max(len(ours_at), len(theirs_at)) + 1
    for places in (ours_at, theirs_at):
        index = np.flatnonzero(places >= 0)
        kept = places[index]
        from_last = np.searchsorted(kept, kept, "right") - 1 - np.arange(len(kept))
        sides.append((index, kept * longest + from_last))
    (ours, our_keys), (theirs, their_keys) = sides
    _, i, j = np.intersect1d(our_keys, their_keys, assume_unique=True, return_indices=True)
    order = np.argsort(ours[i])
    return ours[i][order], theirs[j][order]


def _counterparts(student: Tokenizer, teacher: Tokenizer, chat: bool) -> dict[int, int]:
    """The teacher's control token for each of the student's that it has one for, but for what begins a text."""
    found = {student.eos_id: teacher.eos_id}
    if chat:
        found[student.end_of_turn_id] = teacher.end_of_turn_id
    return found | {i: teacher.special[name] for name, i in student.special.items() if name in teacher.special}


def _stretches(ids: list[int], trained: NDArray[np.bool_], control: frozenset[int]) -> list[tuple[int, int]]:
    """Where a document is cut: each control token alone, and text that is learnt apart from text that isn't."""
    is_control = np.fromiter((i in control for i in ids), np.bool_, len(ids))
    turns = trained[1:] != trained[:-1]
    turns[:1] = False  # nothing stands before the first token, so it is never learnt: that makes no end of a stretch
    edges = [0, *(np.flatnonzero(is_control[1:] | is_control[:-1] | turns) + 1).tolist(), len(ids)]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def _ends(pieces: Sequence[bytes]) -> Ints:
    return np.cumsum([len(p) for p in pieces], dtype=np.int64)


def _places(theirs: bytes, ends: Ints, ours: bytes) -> Ints:
    """Where in our text the ends of their tokens lie; -1: nowhere.

    The two are the same text, but for what a template puts before an answer or a normaliser changes within it.
    """
    longer = len(theirs) - len(ours)
    if theirs.endswith(ours) or ours.endswith(theirs):
        return np.maximum(ends - longer, -1)
    same = common_length(theirs, ours)
    rest = min(len(theirs), len(ours)) - same
    tail = common_length(theirs[::-1][:rest], ours[::-1][:rest])
    in_tail = ends >= len(theirs) - tail
    return np.where(ends <= same, ends, np.where(in_tail, ends - longer, -1))
