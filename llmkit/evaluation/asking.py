"""How a model is asked: prompts with examples in, log-probabilities of continuations or written answers out.

The harness knows a `Respondent` only, so that anything that answers can be examined. `ModelRespondent` is a GPT with its
tokenizer.

Shapes: B rows, T tokens of the longest, D channels, N tokens asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmkit.config import MachineError
from llmkit.inference.batch import check_model, evaluating
from llmkit.inference.config import SamplingConfig
from llmkit.inference.embed import BATCH_TOKENS, batches_of
from llmkit.inference.generate import generate
from llmkit.inference.stream import Generation
from llmkit.model.gpt import GPT
from llmkit.tokenizer import Tokenizer

_CHUNK = 1 << 24  # logits that exist at once
_MAX_ROWS = 64  # texts that are written side by side
_BLOCK = 512  # prompts that are encoded at a time
OnRows = Callable[[int], None]


@dataclass(frozen=True)
class Prompt:
    """A question, and examples of questions with their answers that are shown before it."""

    question: str
    examples: tuple[tuple[str, str], ...] = ()
    """Each a question and what is to follow it."""
    before: str = ""
    """What the examples begin with: a sentence on the subject, or nothing."""
    joint: str = " "
    """What stands between a question and its answer in plain text; in a conversation nothing does."""

    @property
    def text(self) -> str:
        """All of it as plain text."""
        parts = [f"{asked}{self.joint}{answer}" for asked, answer in self.examples]
        return self.before + "\n\n".join([*parts, self.question])

    @property
    def messages(self) -> list[dict[str, str]]:
        """The same as a conversation."""
        found = []
        for asked, answer in self.examples:
            found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        found.append({"role": "user", "content": self.question})
        found[0] = {**found[0], "content": self.before + found[0]["content"]}
        return found

    def without_first(self) -> Prompt:
        """The same with an example less."""
        return Prompt(self.question, self.examples[1:], self.before, self.joint)


@dataclass(frozen=True)
class Weighed:
    """What a model says of a prompt's continuations."""

    logprobs: list[float]
    """Of each continuation as a whole, in nats."""
    n_shown: int
    """Examples that found room."""
    cut: bool
    """The beginning of the question itself did not fit and was left out."""


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt."""

    text: str
    finished: bool
    """It ended by itself or at a stop string."""
    n_shown: int
    cut: bool


class Respondent(Protocol):
    """Whoever is examined."""

    @property
    def chat(self) -> bool:
        """Whether prompts reach it as conversations."""

    def weigh(self, asked: Sequence[tuple[Prompt, tuple[str, ...]]], on_rows: OnRows) -> list[Weighed]:
        """How likely it finds each continuation of each prompt."""

    def write(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str], on_rows: OnRows
    ) -> list[Written]:
        """What it writes after each prompt, greedily."""


# --- log-probabilities -----------------------------------------------------------------------------------------------


@torch.no_grad()
def continuation_logprobs(
    model: GPT,
    pairs: Sequence[tuple[list[int], list[int]]],
    vocab_size: int | None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_rows: OnRows = lambda n: None,
) -> list[tuple[float, bool]]:
    """The log-probability of each continuation after its context, in nats, and whether greedy decoding would write it.

    Pairs whose inputs are the same, such as the one-token answers to a question, share a row.

    Args:
        pairs: ids of contexts, none empty, and of continuations; together at most max_seq_len + 1.
        vocab_size: the softmax is over so many ids: the tokenizer's (B91); None: over all rows of the embedding.
        on_rows: called with the number of pairs done since the last call.

    Raises:
        MachineError: a log-probability is not finite.
    """
    longest = model.config.max_seq_len
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        inputs = (*context, *continuation[:-1])
        assert context and len(inputs) <= longest, f"pair {i}: {len(context)} + {len(continuation)} ids"
        rows.setdefault(inputs, []).append(i)
    keys, found = list(rows), [(0.0, True)] * len(pairs)
    device = model.head_weight.device
    with evaluating(model):
        for batch in batches_of(keys, batch_tokens):
            ids_BT = torch.zeros(len(batch), len(keys[batch[0]]), dtype=torch.int64)
            for b, k in enumerate(batch):
                ids_BT[b, : len(keys[k])] = torch.tensor(keys[k])
            hidden_BTD = model.forward(ids_BT.to(device))
            told = [(b, i) for b, k in enumerate(batch) for i in rows[keys[k]] if pairs[i][1]]
            row_N = [b for b, i in told for _ in pairs[i][1]]
            column_N = [len(pairs[i][0]) - 1 + n for _, i in told for n in range(len(pairs[i][1]))]
            labels_N = torch.tensor([token for _, i in told for token in pairs[i][1]], device=device)
            logprobs_N, best_N = _of_labels(model, hidden_BTD[row_N, column_N], labels_N, vocab_size)
            at = 0
            for _, i in told:
                n = len(pairs[i][1])
                found[i] = (logprobs_N[at : at + n].sum().item(), bool(best_N[at : at + n].all()))
                at += n
            if not bool(logprobs_N.isfinite().all()):
                raise MachineError(
                    "a log-probability is not finite: the model's weights or activations overflow; `llmkit verify` "
                    "checks a checkpoint's weights"
                )
            on_rows(sum(len(rows[keys[k]]) for k in batch))
    return found


def _of_labels(model: GPT, hidden_ND: Tensor, labels_N: Tensor, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """Each label's log-probability in fp64, and whether it is the most probable id; on the CPU."""
    V = vocab_size or model.head_weight.shape[0]
    logprobs, best = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.bool)]
    chunk = max(1, _CHUNK // V)
    for k in range(0, len(labels_N), chunk):
        labels = labels_N[k : k + chunk]
        logits = model.logits(hidden_ND[k : k + chunk])[:, :V]
        wide = torch.promote_types(logits.dtype, torch.float32)
        logprobs.append(torch.log_softmax(logits, -1, dtype=wide).gather(1, labels[:, None])[:, 0].double().cpu())
        best.append((logits.argmax(-1) == labels).cpu())
    return torch.cat(logprobs), torch.cat(best)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Context and continuation as the ids of one text (B70): blanks between the two belong to what follows, as in lm-eval.

    Where a token would reach over the boundary, what follows is encoded by itself: none of it may be lost.
    """
    head = context.rstrip()
    ids, whole = tokenizer.encode(head), tokenizer.encode(context + continuation)
    if whole[: len(ids)] == ids:
        return ids, whole[len(ids) :]
    return ids, tokenizer.encode_on(context[len(head) :] + continuation, ids)


def continuations(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    batch_tokens: int,
    on_rows: OnRows,
) -> list[Generation]:
    """What `generate` writes after each prompt, in batches of about one length."""
    found: dict[int, Generation] = {}
    for whole in batches_of([[0] * (len(ids) + sampling.max_new_tokens) for ids in prompts], batch_tokens):
        for k in range(0, len(whole), _MAX_ROWS):
            batch = whole[k : k + _MAX_ROWS]
            texts = generate(model, [prompts[i] for i in batch], sampling, tokenizer=tokenizer)
            found |= dict(zip(batch, texts, strict=True))
            on_rows(len(batch))
    return [found[i] for i in range(len(prompts))]


# --- a model that is asked -------------------------------------------------------------------------------------------


class ModelRespondent:
    """A GPT with its tokenizer, asked in plain text or through its chat template."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, chat: bool, batch_tokens: int = BATCH_TOKENS):
        """Raises UserError for a bidirectional model, or another model's tokenizer."""
        check_model(model, tokenizer.vocab_size)
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self._chat = chat
        self._start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    @property
    def chat(self) -> bool:
        return self._chat

    def weigh(self, asked: Sequence[tuple[Prompt, tuple[str, ...]]], on_rows: OnRows) -> list[Weighed]:
        blocks = (asked[k : k + _BLOCK] for k in range(0, len(asked), _BLOCK))
        return [weighed for block in blocks for weighed in self._weigh(block, on_rows)]

    def _weigh(self, asked: Sequence[tuple[Prompt, tuple[str, ...]]], on_rows: OnRows) -> list[Weighed]:
        pairs: list[tuple[list[int], list[int]]] = []
        told: list[tuple[int, int, bool]] = []
        for prompt, texts in asked:
            found, n_shown, cut = self._pairs(prompt, texts)
            pairs += found
            told.append((len(found), n_shown, cut))
        values = continuation_logprobs(
            self.model, pairs, self.tokenizer.vocab_size, batch_tokens=self.batch_tokens, on_rows=on_rows
        )
        results, at = [], 0
        for n, n_shown, cut in told:
            results.append(Weighed([logprob for logprob, _ in values[at : at + n]], n_shown, cut))
            at += n
        return results

    def _pairs(self, prompt: Prompt, texts: tuple[str, ...]) -> tuple[list[tuple[list[int], list[int]]], int, bool]:
        """Ids of the prompt and of each text after it, with as many examples as find room."""
        room = self.model.config.max_seq_len + 1
        while True:
            if self._chat:
                context = self.tokenizer.encode_chat(prompt.messages, add_generation_prompt=True).ids
                pairs = [(context, self.tokenizer.encode_on(text, context)) for text in texts]
            else:
                encoded = [encode_pair(self.tokenizer, prompt.text + prompt.joint, text) for text in texts]
                pairs = [([*self._start, *context] or [self.tokenizer.eos_id], rest) for context, rest in encoded]
            long = any(len(context) + len(rest) > room for context, rest in pairs)
            if not long or not prompt.examples:
                break
            prompt = prompt.without_first()
        # Of a continuation that is longer than the context only the end is asked for, after a single id.
        pairs = [(context, rest[-(room - 1) :]) for context, rest in pairs]
        pairs = [(context[-(room - len(rest)) :], rest) for context, rest in pairs]
        return pairs, len(prompt.examples), long

    def write(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str], on_rows: OnRows
    ) -> list[Written]:
        blocks = (prompts[k : k + _BLOCK] for k in range(0, len(prompts), _BLOCK))
        return [written for block in blocks for written in self._write(block, max_new_tokens, stop, on_rows)]

    def _write(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str], on_rows: OnRows
    ) -> list[Written]:
        longest = self.model.config.max_seq_len
        n_new = min(max_new_tokens, max(1, longest // 2))
        read = [self._prompt_ids(prompt, longest - n_new) for prompt in prompts]
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=n_new, stop=tuple(stop))
        texts = continuations(
            self.model, self.tokenizer, [ids for ids, _, _ in read], sampling, self.batch_tokens, on_rows
        )
        return [
            Written(text.text, text.finish_reason == "stop", n_shown, cut)
            for text, (_, n_shown, cut) in zip(texts, read, strict=True)
        ]

    def _prompt_ids(self, prompt: Prompt, room: int) -> tuple[list[int], int, bool]:
        """The ids of a prompt, with as many examples as find room, how many these are, and whether it was cut."""
        while True:
            if self._chat:
                ids = self.tokenizer.encode_chat(prompt.messages, add_generation_prompt=True).ids
            else:
                ids = [*self._start, *self.tokenizer.encode(prompt.text)]
            if len(ids) <= room or not prompt.examples:
                return ids[-room:], len(prompt.examples), len(ids) > room
            prompt = prompt.without_first()
