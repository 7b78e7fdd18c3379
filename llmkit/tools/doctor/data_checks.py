"""Checks of what a recipe learns from: its own rows, encoded as training encodes them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from llmkit.data.feedback import FeedbackBatch
from llmkit.data.layouts import Dialogue, read_source
from llmkit.data.loader import Batch, RowLoader
from llmkit.data.order import SampleOrder
from llmkit.data.preferences import PreferenceBatch
from llmkit.data.turns import encode_dialogue, encode_turn, prompt_ids
from llmkit.losses import IGNORE
from llmkit.rollout.prompts import PromptOrder
from llmkit.tools.doctor.check import Check
from llmkit.tools.doctor.patient import NotHere, Patient
from llmkit.training.engine import seed_of

_STEPS = 12  # whose batches are looked at
_DIALOGUES = 60


def _batches(patient: Patient) -> Iterator[Any]:
    """Micro-batches of the first steps. Of ppo and grpo there are none."""
    for k in range(min(_STEPS, patient.recipe.steps)):
        yield from patient.loader.step(k)


def _text_batches(patient: Patient) -> Iterator[Batch]:
    if not patient.is_text:
        raise NotHere("the rows are no text whose next tokens are learnt")
    yield from _batches(patient)


def _sequences(patient: Patient) -> Iterator[list[int]]:
    """The ids of texts as the network gets them."""
    if patient.is_policy:
        order = PromptOrder(patient.task.prompts, seed_of(patient.recipe.seed, "order"))
        yield from (list(row.ids) for row in order.draw(0, 100))
        return
    for batch in _batches(patient):
        if isinstance(batch, Batch):
            for ids_T, docs_T in zip(batch.ids_BT, batch.docs_BT, strict=True):
                for d in range(int(docs_T.max()) + 1):
                    yield ids_T[docs_T == d].tolist()
        else:
            rows: Any = batch.matched if isinstance(batch, FeedbackBatch) else batch
            for ids_T, length in zip(rows.ids_BT, rows.lengths_B.tolist(), strict=True):
                yield ids_T[:length].tolist()


def _round_trip(patient: Patient) -> str | None:
    """Text that the tokenizer wrote is text that it reads back."""
    tokenizer = patient.tokenizer
    if tokenizer.kind != "BPE":
        raise NotHere(f"{tokenizer.kind} changes blanks and case by design")
    for ids in itertools.islice(_sequences(patient), 200):
        plain = [i for i in ids if i not in tokenizer.special_ids and i != tokenizer.mask_id]
        text = tokenizer.decode(plain)
        if "\ufffd" in text:  # a row that begins or ends inside a character
            continue
        again = tokenizer.decode(tokenizer.encode(text))
        if again != text:
            at = next((i for i, (a, b) in enumerate(zip(text, again, strict=False)) if a != b), 0)
            return f"{text[max(0, at - 20) : at + 20]!r} comes back as {again[max(0, at - 20) : at + 20]!r}"
    return None


def _double_bos(patient: Patient) -> str | None:
    bos = patient.tokenizer.bos_id
    if bos is None:
        raise NotHere("the tokenizer has no bos token")
    for ids in _sequences(patient):
        if ids[:2] == [bos, bos]:
            return f"a text begins with {patient.tokenizer.decode(ids[:6], skip_special=False)!r}"
    return None


def _labels(patient: Patient) -> str | None:
    n = 0
    for batch in _text_batches(patient):
        following = batch.ids_BT[:, 1:]
        here = (batch.docs_BT[:, 1:] == batch.docs_BT[:, :-1]) & (batch.docs_BT[:, 1:] >= 0)
        asked = batch.labels_BT[:, :-1]
        wrong = here & (asked != IGNORE) & (asked != following)
        n += int((batch.labels_BT != IGNORE).sum())
        if wrong.any():
            b, t = wrong.nonzero()[0].tolist()
            decode = patient.tokenizer.decode
            return (
                f"after {decode([int(batch.ids_BT[b, t])], skip_special=False)!r} comes "
                f"{decode([int(following[b, t])], skip_special=False)!r}, but "
                f"{decode([int(asked[b, t])], skip_special=False)!r} is asked for ({int(wrong.sum())} such labels)"
            )
        if (batch.labels_BT[batch.docs_BT < 0] != IGNORE).any():
            return "padding is learnt"
        crossing = (batch.docs_BT[:, 1:] != batch.docs_BT[:, :-1]) & (batch.docs_BT[:, 1:] >= 0)
        leak = crossing & (asked != IGNORE) & (asked == following)
        if leak.float().sum() > 0.5 * max(1.0, float(crossing.sum())):
            return f"{int(leak.sum())} of {int(crossing.sum())} documents are to be foretold from the one before them"
    return None if n else "no token at all is learnt"


def _positions(patient: Patient) -> str | None:
    for batch in _text_batches(patient):
        docs, places = batch.docs_BT, batch.positions_BT
        first = docs.clone().fill_(0).bool()
        first[:, 0] = True
        first[:, 1:] = docs[:, 1:] != docs[:, :-1]
        real = docs >= 0
        steps = places[:, 1:] - places[:, :-1]
        if (places[first & real] != 0).any():
            return f"a document begins at position {int(places[first & real].max())}, not 0"
        if (steps[~first[:, 1:] & real[:, 1:]] != 1).any():
            return "positions within a document are not one apart"
    return None


# --- conversations ---------------------------------------------------------------------------------------------------


def _dialogues(patient: Patient) -> list[Dialogue]:
    """The first of the recipe's conversations, read from its files."""
    recipe = patient.recipe
    is_chat = recipe.stage == "sft" or (recipe.stage == "distill" and recipe.examples == "conversations")
    if not is_chat or not recipe.data.chat:
        raise NotHere("the data are no conversations that are answered")
    found: list[Dialogue] = []
    data = patient.task.recipe.data if recipe.stage == "sft" else patient.task.lessons.recipe.data
    for source in data.sources:
        rows = read_source(source, "dialogue", True, system=data.system, on_unusable=lambda *_: None)
        found += [row for _, _, row in itertools.islice(rows, _DIALOGUES) if isinstance(row, Dialogue)]
    return found


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _mask_coverage(patient: Patient) -> str | None:
    """What is learnt of each conversation, as text, is what the assistant says in it, and nothing else."""
    tokenizer, dialogues = patient.tokenizer, _dialogues(patient)
    train_on = patient.recipe.train_on
    if train_on == "all":
        raise NotHere("train_on: all")
    for dialogue in dialogues:
        said = [str(m.get("content") or "") for m in dialogue.messages if m["role"] == "assistant"]
        if any(m.get("tool_calls") or m.get("reasoning_content") for m in dialogue.messages):
            continue  # templates write those in words of their own
        wanted = _squeezed("".join(said if train_on == "assistant" else said[-1:]))
        learnt = ""
        for turns in encode_dialogue(tokenizer, dialogue.messages, dialogue.tools, train_on, True):
            ids = [i for i, m in zip(turns.ids, turns.is_trained, strict=True) if m]
            learnt += tokenizer.decode([i for i in ids if i not in tokenizer.special_ids])
        if _squeezed(learnt) != wanted:
            return f"the assistant says {''.join(said)[:80]!r}, but {learnt[:80]!r} is learnt"
    return None


def _loader_mask(patient: Patient) -> str | None:
    """The rows of the loader learn the same tokens as their conversations."""
    if not patient.is_text or patient.recipe.stage == "pretrain":
        raise NotHere("the data are no conversations")
    _dialogues(patient)
    task, asked, given = patient.task, 0, 0
    data = task.data if hasattr(task, "data") else task.lessons.data
    for source in data.train:
        asked += int(source.trained.sum())
    rows = patient.loader
    for batch in rows.eval_batches():
        given += int((batch.labels_BT != IGNORE).sum())
    return None if asked == given else f"{asked:,} tokens are marked as learnt, the rows of an epoch learn {given:,}"


def _end_of_turn(patient: Patient) -> str | None:
    tokenizer = patient.tokenizer
    if patient.recipe.stage in ("dpo", "reward") and not getattr(patient.recipe, "is_labelled", False):
        return _answers_end(patient)
    _dialogues(patient)
    ends = ended = 0
    for batch in _text_batches(patient):
        # The last learnt label of each run of them: an answer is over there, unless the row was cut.
        learnt = batch.labels_BT != IGNORE
        last = learnt.clone()
        last[:, :-1] &= ~learnt[:, 1:]
        ends += int(last.sum())
        ended += int((batch.labels_BT[last] == tokenizer.end_of_turn_id).sum())
    if ended < 0.5 * ends:
        name = tokenizer.decode([tokenizer.end_of_turn_id], skip_special=False)
        return f"{ended} of {ends} answers are learnt with their end ({name})"
    return None


def _answers_end(patient: Patient) -> str | None:
    tokenizer, n, ended = patient.tokenizer, 0, 0
    end = tokenizer.end_of_turn_id if patient.recipe.data.chat else tokenizer.eos_id
    for batch in _batches(patient):
        if not isinstance(batch, PreferenceBatch | FeedbackBatch):
            raise NotHere("steps are judged, not ends")
        rows = batch.matched if isinstance(batch, FeedbackBatch) else batch
        last = rows.ids_BT.gather(1, (rows.lengths_B - 1)[:, None])[:, 0]
        n, ended = n + len(last), ended + int((last == end).sum())
    return None if ended == n else f"{n - ended} of {n} answers don't end with {tokenizer.decode([end], False)!r}"


def _generation_prompt(patient: Patient) -> str | None:
    """What a model is asked with is the beginning of what it was trained on."""
    tokenizer = patient.tokenizer
    if not patient.recipe.data.chat or tokenizer.template is None or patient.recipe.stage == "pretrain":
        raise NotHere("no chat template is used")
    prompt = [{"role": "user", "content": "What is said first?"}]
    before, answer = encode_turn(tokenizer, prompt, "This, and then it ends.")
    asked = prompt_ids(tokenizer, prompt)
    whole = tokenizer.encode_chat(
        [*prompt, {"role": "assistant", "content": "This, and then it ends."}], train_on="all"
    )
    if whole.ids[: len(asked)] != asked:
        shown = [tokenizer.decode(ids[-12:], skip_special=False) for ids in (whole.ids[: len(asked)], asked)]
        return f"trained after {shown[0]!r}, asked after {shown[1]!r}"
    if before != asked or whole.ids[len(before) : len(before) + len(answer)] != answer:
        return "the answer's tokens are others in training than in generation"
    return None


# --- order and splits ------------------------------------------------------------------------------------------------


def _order(patient: Patient) -> str | None:
    """An epoch holds every row once, and its order is a function of the seed."""
    prompts = patient.task.prompts.train if patient.is_policy else []
    n_rows = list(map(len, prompts)) or patient.loader.n_rows
    for s, n in enumerate(n_rows):
        order = SampleOrder([n], None, seed_of(patient.recipe.seed, "order"))
        rows = order.rows(np.arange(min(n, 50_000)))[1]
        if n <= 50_000 and len(np.unique(rows)) < n:
            return f"source {s}: an epoch of {n} rows holds {len(np.unique(rows))} different ones"
        if n > 8 and (rows == np.arange(len(rows))).all():
            return f"source {s}: the rows come in the order of the file"
    if not patient.is_policy:
        first = [patient.loader.tokens_hash(k) for k in (0, 1)]
        again = [patient.loader._build(k)[1] for k in (0, 1)]
        if first != again:
            return "a step made twice holds other tokens"
    return None


def _shares_of_ranks(patient: Patient) -> str | None:
    """The rows of two ranks together are those of one."""
    whole = patient.loader
    if whole.rows_per_step % 2:
        raise NotHere("a step has an odd number of rows")
    shares = [
        RowLoader(whole.rows, rows_per_step=whole.rows_per_step, seed=seed_of(patient.recipe.seed, "order"),
                  rank=rank, world=2, micro_rows=1, prefetch=0)
        for rank in (0, 1)
    ]  # fmt: skip
    alone = RowLoader(
        whole.rows,
        rows_per_step=whole.rows_per_step,
        seed=seed_of(patient.recipe.seed, "order"),
        micro_rows=1,
        prefetch=0,
    )
    together = np.sort(np.concatenate([share.samples(0)[0] for share in shares]))
    if not np.array_equal(together, np.sort(alone.samples(0)[0])):
        return (
            f"the samples of two ranks are {together[:8].tolist()} ..., of one {alone.samples(0)[0][:8].tolist()} ..."
        )
    if sum(share.tokens_hash(0) for share in shares) % (1 << 63) != alone.tokens_hash(0):
        return "two ranks together read other tokens than one"
    return None


def _held_out(patient: Patient) -> str | None:
    """Nothing that is held out is trained on."""
    task = patient.task
    splits: list[set[Any]]
    if patient.is_policy:
        splits = [
            {tuple(r.ids) for source in split for r in source} for split in (task.prompts.train, task.prompts.valid)
        ]
    else:
        source_of = task.judging.split if hasattr(task, "judging") else None
        data = None if source_of else task.lessons.data if hasattr(task, "lessons") else task.data
        found = [source_of(s) if source_of else getattr(data, s) for s in ("train", "valid")]
        splits = [{key for source in split for key in _keys(source)} for split in found]
    if not splits[1]:
        raise NotHere("nothing is held out")
    both = len(splits[0] & splits[1])
    if both > 0.2 * len(splits[1]):
        return f"{both} of {len(splits[1])} held-out texts are trained on"
    return None


def _keys(source: Any) -> Iterator[bytes]:
    if hasattr(source, "document"):
        yield from (source.document(i).tobytes() for i in range(min(source.n_docs, 2000)))
        return
    starts = source.starts
    yield from (source.tokens[a:b].tobytes() for a, b in itertools.pairwise(starts.tolist()))


CHECKS = (
    Check("round-trip", "text comes back from the tokenizer as it went in",
          "a normaliser or pre-tokenizer that loses characters", "train the tokenizer anew, or take another",
          _round_trip),
    Check("double-bos", "no text begins with two bos tokens",
          "the chat template writes the bos token and the encoder adds one too",
          "take it out of the template (tokenizer.chat_template)", _double_bos),
    Check("labels", "the label of every token is the next one of the same document",
          "labels that are shifted once too often or not at all, or run over documents' ends",
          "build labels where rows are built, once: ids[1:] under ids[:-1]", _labels),
    Check("positions", "positions count from 0 in every document",
          "positions of the row instead of the document", "derive positions from the documents' beginnings", _positions,
          ("labels",)),
    Check("mask-coverage", "what is learnt is what the assistant says, all of it and nothing else",
          "a template whose turns are found wrongly, or a mask of the wrong turns",
          "mark the assistant's turns in the template with {% generation %}, or choose another template",
          _mask_coverage, ("round-trip",)),
    Check("loader-mask", "the rows of an epoch learn every token that is marked",
          "rows that lose or add labels when they are packed", "compare data.packing true and false",
          _loader_mask, ("labels", "mask-coverage")),
    Check("end-of-turn", "every answer is learnt with the token that ends it",
          "the end of turn is masked, cut off, or is the padding token", "raise batch.max_len; give padding a token of its "
          "own; choose a template that ends turns", _end_of_turn, ("loader-mask",)),
    Check("generation-prompt", "a model is asked with the beginning of what it was trained on",
          "the template writes other text before an answer in generation than in training",
          "choose another template (tokenizer.chat_template)", _generation_prompt),
    Check("order", "an epoch holds every row once, in an order of the seed's", "a shuffle that draws with replacement, or "
          "none", "use data.order's permutation", _order),
    Check("rank-shares", "two ranks together read what one would", "ranks that read the same rows, or leave some out",
          "cut a step by (rank, world) in the loader alone", _shares_of_ranks, ("order",)),
    Check("held-out", "nothing that is held out is trained on", "the same file in data.train and data.valid, or copies",
          "drop data.valid and use valid_frac, or remove copies (data.dedup)", _held_out),
)  # fmt: skip
