"""Batches as people look at them: every token with its text, role, position, document and weight in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmkit.data.examples import ExampleBatch
from llmkit.data.feedback import FeedbackBatch
from llmkit.data.preferences import PreferenceBatch
from llmkit.data.steps import StepBatch
from llmkit.losses import IGNORE
from llmkit.rollout.batch import PolicyBatch
from llmkit.tokenizer import Tokenizer

ROLES = ("control", "system", "user", "assistant", "tool", "text", "hidden", "padding")
# Words by which templates announce who speaks, in a control token's name or in the text right after one.
_SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "inst": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "observation": "tool",
}
_LONGEST_NAME = 16  # tokens in which a speaker's name is looked for


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    id: int
    text: str
    role: str
    """One of ROLES."""
    learnt: bool
    """The loss asks for it."""
    weight: float
    """Its share of the step's loss, before the step's denominator divides it; 0: not learnt."""
    position: int
    document: int
    """Number of the document within its row; -1: padding."""
    label: str | None = None
    """What is asked for where that is another token than this one: the hidden token of masked prediction, a class."""
    value: float | None = None
    """A number that belongs to it: its loss, its advantage."""


@dataclass(frozen=True)
class Text:
    """Tokens that stand together: a document, an answer with its prompt, a prompt."""

    title: str
    tokens: tuple[Token, ...]
    n_padding: int = 0
    """Cells of padding that follow it in the batch."""


# --- who speaks ------------------------------------------------------------------------------------------------------


def _speaker(word: str) -> str | None:
    low = word.strip().strip("<>|[]/").lower()
    return next((role for name, role in _SPEAKERS.items() if low == name), None)


def roles_of(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """A role for each id, found by the control tokens: a name in one, or in the text right after one, says who speaks
    up to the next. Text without such a name is `text`.
    """
    special = tokenizer.special_ids
    found: list[str] = []
    speaker, after = "text", 0  # `after`: where the last control token ends
    for i, token in enumerate(ids):
        if token not in special:
            found.append(speaker)
            continue
        found.append("control")
        end = next((j for j in range(i + 1, i + 1 + _LONGEST_NAME) if j >= len(ids) or ids[j] in special), None)
        following = ids[i + 1 : i + 1 + _LONGEST_NAME if end is None else end]
        # A name stands in the token itself, in the line after it, or alone before it (<|start|>user<|end|>).
        speaker = (
            _speaker(_text([token], tokenizer))
            or _speaker(_text(following, tokenizer).split("\n")[0])
            or (_speaker(_text(ids[after:i], tokenizer)) if 0 < i - after <= _LONGEST_NAME else None)
            or "text"
        )
        after = i + 1
    return found


def _text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids, skip_special=False, start=False)


def text_of(
    title: str,
    ids: Sequence[int],
    weights: Sequence[float],
    tokenizer: Tokenizer,
    *,
    positions: Sequence[int] | None = None,
    document: int = 0,
    labels: Sequence[str | None] | None = None,
    values: Sequence[float | None] | None = None,
    n_padding: int = 0,
) -> Text:
    """A text of which token i weighs weights[i] in the loss; 0: not learnt."""
    roles, stream = roles_of(ids, tokenizer), tokenizer.stream(skip_special=False, start=False)
    shown = [stream.push(token) for token in ids]  # a character of several tokens stands at its last one
    tokens = tuple(
        Token(
            id=token,
            text=shown[i],
            role="hidden" if token == tokenizer.mask_id else roles[i],
            learnt=weights[i] != 0,
            weight=weights[i],
            position=i if positions is None else positions[i],
            document=document,
            label=None if labels is None else labels[i],
            value=None if values is None else values[i],
        )
        for i, token in enumerate(ids)
    )
    return Text(title, tokens, n_padding)


# --- batches ---------------------------------------------------------------------------------------------------------


def texts_of(batch: Any, tokenizer: Tokenizer, causal: bool = True, losses: Tensor | None = None) -> Iterator[Text]:
    """The texts of a micro-batch of any stage, in its order.

    Args:
        causal: a label is the token after its position; else the hidden one at it.
        losses: [B, T] of rows of text: each label's own loss.
    """
    if isinstance(batch, PreferenceBatch):
        yield from _preferences(batch, tokenizer)
    elif isinstance(batch, FeedbackBatch):
        for i, good in enumerate(batch.is_good_B.tolist()):
            answers, kind = batch.matched, "good" if good else "bad"
            yield _answer(f"{kind} answer", answers.ids_BT, answers.lengths_B, answers.prompt_lengths_B, i, tokenizer)
    elif isinstance(batch, ExampleBatch):
        for ids_T, length, target in zip(batch.ids_BT, batch.lengths_B.tolist(), batch.targets.tolist(), strict=True):
            ids = ids_T[:length].tolist()
            weights = [0.0] * (length - 1) + [1.0] if length else []
            labels: list[str | None] = [None] * (length - 1) + [str(target)] if length else []
            yield text_of(f"label {target}", ids, weights, tokenizer, labels=labels, n_padding=len(ids_T) - length)
    elif isinstance(batch, StepBatch):
        yield from _steps(batch, tokenizer)
    elif isinstance(batch, PolicyBatch):
        yield from _answers(batch, tokenizer)
    else:
        yield from _rows(batch, tokenizer, causal, losses)


def _rows(batch: Any, tokenizer: Tokenizer, causal: bool, losses: Tensor | None) -> Iterator[Text]:
    for b, docs_T in enumerate(batch.docs_BT.tolist()):
        ids, labels = batch.ids_BT[b].tolist(), batch.labels_BT[b].tolist()
        positions = batch.positions_BT[b].tolist()
        own = None if losses is None else losses[b].tolist()
        n_padding, n_docs = docs_T.count(-1), max(docs_T, default=-1) + 1
        for d in range(n_docs):
            first = docs_T.index(d)
            end = first + docs_T.count(d)
            here = slice(first, end)
            title = f"row {b}, document {d}"
            padding = n_padding if d == n_docs - 1 else 0
            found = (
                _document(ids[here], labels[here], None if own is None else own[here])
                if causal
                else _masked(ids[here], labels[here], tokenizer)
            )
            tokens, weights, names, values = found
            places = positions[here] + [positions[end - 1] + 1] * (len(tokens) - (end - first))
            yield text_of(
                title, tokens, weights, tokenizer, positions=places, document=d, labels=names, values=values,
                n_padding=padding,
            )  # fmt: skip


Columns = tuple[list[int], list[float], list[str | None], list[float | None]]


def _document(ids: list[int], labels: list[int], losses: list[float] | None) -> Columns:
    """A document with the label of its last input, which is no input itself."""
    tokens = ids + ([labels[-1]] if labels[-1] != IGNORE else [])
    asked = [IGNORE, *labels][: len(tokens)]
    weights = [float(label != IGNORE) for label in asked]
    # A label is the token that follows its input: anything else is a fault, and is shown.
    odd = [str(a) if a not in (IGNORE, token) else None for a, token in zip(asked, tokens, strict=True)]
    given: list[float | None] = [*losses] if losses is not None else [None] * len(ids)
    own = [None, *given][: len(tokens)]
    return tokens, weights, odd, [v if w else None for v, w in zip(own, weights, strict=True)]


def _masked(ids: list[int], labels: list[int], tokenizer: Tokenizer) -> Columns:
    names = [None if label == IGNORE else _text([label], tokenizer) for label in labels]
    return ids, [float(label != IGNORE) for label in labels], names, [None] * len(ids)


def _preferences(batch: PreferenceBatch, tokenizer: Tokenizer) -> Iterator[Text]:
    wins, losses = batch.better_P.tolist(), batch.worse_P.tolist()
    weights, n = [0.0] * len(batch.ids_BT), len(batch.ids_BT)
    for better, worse, weight in zip(wins, losses, batch.weights_P.tolist(), strict=True):
        weights[better] += weight
        weights[worse] += weight
    for i in range(n if wins else 0):
        told = [f"better than {losses[p]}" for p in range(len(wins)) if wins[p] == i]
        told += [f"worse than {wins[p]}" for p in range(len(wins)) if losses[p] == i]
        title = f"answer {i}: {', '.join(told)}"
        yield _answer(title, batch.ids_BT, batch.lengths_B, batch.prompt_lengths_B, i, tokenizer, weights[i])


def _answer(
    title: str, ids_BT: Tensor, lengths_B: Tensor, prompts_B: Tensor, i: int, tokenizer: Tokenizer, weight: float = 1.0
) -> Text:
    length, prompt = int(lengths_B[i]), int(prompts_B[i])
    weights = [0.0] * prompt + [weight] * (length - prompt)
    return text_of(title, ids_BT[i, :length].tolist(), weights, tokenizer, n_padding=ids_BT.shape[1] - length)


def _steps(batch: StepBatch, tokenizer: Tokenizer) -> Iterator[Text]:
    judged = list(zip(batch.rows_S.tolist(), batch.ends_S.tolist(), batch.labels_S.tolist(), strict=True))
    for b, length in enumerate(batch.lengths_B.tolist()):
        of_row = {end: label for row, end, label in judged if row == b}
        weights = [float(t in of_row) for t in range(length)]
        names = [f"{of_row[t]:g}" if t in of_row else None for t in range(length)]
        title, ids = f"answer with {len(of_row)} judged steps", batch.ids_BT[b, :length].tolist()
        yield text_of(title, ids, weights, tokenizer, labels=names, n_padding=batch.ids_BT.shape[1] - length)


def _answers(batch: PolicyBatch, tokenizer: Tokenizer) -> Iterator[Text]:
    for b, length in enumerate(batch.lengths_B.tolist()):
        actions, weights = batch.actions_BT[b].tolist(), batch.weights_BT[b].tolist()
        credit = batch.advantages_BT[b].tolist()
        # What is known of a token stands at the position before it.
        of_tokens = [0.0, *(w if a else 0.0 for a, w in zip(actions, weights, strict=True))][:length]
        values = [None, *(v if a else None for a, v in zip(actions, credit, strict=True))][:length]
        ids = batch.ids_BT[b, :length].tolist()
        yield text_of(f"answer {b}", ids, of_tokens, tokenizer, values=values, n_padding=batch.ids_BT.shape[1] - length)
