"""What models are compared by: how likely they find held-out text, how sure a share of right answers is, how fast they are.

Shapes: B rows, T tokens of the longest, N positions that are asked about, C of them at once, D width, V vocabulary.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.config import MachineError
from llmkit.inference.batch import evaluating
from llmkit.inference.config import SamplingConfig
from llmkit.inference.embed import batches_of
from llmkit.inference.generate import generate
from llmkit.losses import IGNORE, token_logprobs
from llmkit.model.gpt import GPT
from llmkit.tokenizer import Tokenizer

_CHUNK = 1 << 21  # logits of two models that exist at once
_Z = 1.959963984540054  # a standard normal variable lies within +-_Z with 95 %


# --- held-out text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A row of inputs, and after each the token that is asked for there, or IGNORE."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a text."""

    nats: float
    """- log-probability of all tokens asked for."""
    n_tokens: int
    n_bytes: int
    """UTF-8 bytes of the text, the same for every tokenizer."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that can't be said in a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def text_rows(tokenizer: Tokenizer, text: str, context: int) -> list[Scored]:
    """A document, every token of it asked for once, in rows of at most `context` inputs.

    The first token follows bos, or eos where the tokenizer has no bos, as documents follow one another in training. So all
    of the text is asked for under any tokenizer; its end, which not every model has learnt to tell, is not.
    """
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    labels = tokenizer.encode(text)
    ids = [start, *labels[:-1]]
    return [Scored(ids[i : i + context], labels[i : i + context]) for i in range(0, len(labels), context)]


def likelihood(
    model: GPT,
    rows: Sequence[Scored],
    vocab_size: int,
    n_bytes: int,
    on_rows: Callable[[int], None] = lambda n: None,
) -> Likelihood:
    """Asks a causal model for all labels of all rows, in batches of about one length.

    The softmax is over the tokenizer's tokens: rows of the embedding beyond them can't be written (B91).

    Raises:
        MachineError: the sum is not finite.
    """
    device = model.head_weight.device
    nats, n_tokens = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches_of([row.ids for row in rows]):
            ids_BT, labels_BT = _padded([rows[i] for i in batch])
            n_tokens += int((labels_BT != IGNORE).sum())
            hidden_BTD = model(ids_BT.to(device))
            logprobs_BT, _ = token_logprobs(hidden_BTD, model.head_weight, labels_BT.to(device), vocab_size=vocab_size)
            nats -= logprobs_BT.cpu().double().sum().item()
            on_rows(len(batch))
    if not math.isfinite(nats):
        raise MachineError("the held-out loss is not finite: the model's weights or activations overflow")
    return Likelihood(nats, n_tokens, n_bytes)


def _padded(rows: Sequence[Scored]) -> tuple[Tensor, Tensor]:
    """Ids and labels [B, T], padded on the right; nothing is asked for there."""
    longest = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels_BT = torch.full((len(rows), longest), IGNORE, dtype=torch.int64)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.ids)] = torch.tensor(row.ids)
        labels_BT[b, : len(row.labels)] = torch.tensor(row.labels)
    return ids_BT, labels_BT


@dataclass(frozen=True)
class Divergence:
    """How far a model's distributions of the next token are from those of the model it was made from."""

    kl: float
    """Mean over all tokens asked for of KL(original || model), nats."""
    same_frac: float
    """Of these, how often both find the same token the likeliest: 0 to 1."""


def divergence(
    original: GPT, model: GPT, rows: Sequence[Scored], vocab_size: int, on_rows: Callable[[int], None] = lambda n: None
) -> Divergence:
    """Compares two causal models of one tokenizer wherever a label is asked for.

    In fp64 where the device has it: of good copies the divergence is near the rounding of fp32.

    Raises:
        MachineError: the sum is not finite.
    """
    device = model.head_weight.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    n_chunk = max(1, _CHUNK // vocab_size)
    total, n_same, n_tokens = 0.0, 0, 0
    with evaluating(original), evaluating(model), torch.no_grad():
        for batch in batches_of([row.ids for row in rows]):
            ids_BT, labels_BT = _padded([rows[i] for i in batch])
            ids_BT, asked_BT = ids_BT.to(device), (labels_BT != IGNORE).to(device)
            hidden_ND, other_ND = original(ids_BT)[asked_BT], model(ids_BT)[asked_BT]
            for start in range(0, len(hidden_ND), n_chunk):
                part = slice(start, start + n_chunk)
                logp_CV = original.logits(hidden_ND[part])[:, :vocab_size].to(wide).log_softmax(-1)
                logq_CV = model.logits(other_ND[part])[:, :vocab_size].to(wide).log_softmax(-1)
                total += (logp_CV.exp() * (logp_CV - logq_CV)).sum().item()
                n_same += int((logp_CV.argmax(-1) == logq_CV.argmax(-1)).sum())
            n_tokens += len(hidden_ND)
            on_rows(len(batch))
    if not math.isfinite(total):
        raise MachineError("the divergence is not finite: a model's weights or activations overflow")
    return Divergence(total / n_tokens, n_same / n_tokens)


# --- shares ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """A mean of grades and its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float
    """NaN, as `low`, where a single grade tells nothing of how they spread."""
    is_share: bool
    """Every grade is 0 or 1."""


def mean_of(values: Sequence[float]) -> Mean | None:
    """The mean of the grades that are numbers; None if there are none.

    The interval is Wilson's (1927, J. Am. Stat. Assoc. 22, 209-212) where every grade is 0 or 1, else that of a normal
    distribution with the grades' standard error.
    """
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return None
    n, mean = len(known), statistics.fmean(known)
    if set(known) <= {0.0, 1.0}:
        return Mean(n, mean, *wilson(int(sum(known)), n), is_share=True)
    error = _Z * statistics.stdev(known) / math.sqrt(n) if n > 1 else math.nan
    return Mean(n, mean, mean - error, mean + error, is_share=False)


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of which n_right of n were seen."""
    share, z2 = n_right / n, _Z * _Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the bound is the share itself, which rounding would miss by a little.
    return (0.0 if n_right == 0 else centre - half), (1.0 if n_right == n else centre + half)


# --- speed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Tokens per second of each repeat."""

    prompt: list[float]
    """Prompt tokens over the time until the first new token is there."""
    generation: list[float]
    """The other new tokens over the time that they took."""


@dataclass(frozen=True)
class Timed:
    """A model whose speed is measured."""

    model: GPT
    tokenizer: Tokenizer


def speeds(
    models: Sequence[Timed], n_prompt: int, n_new: int, repeats: int, on_run: Callable[[], None] = lambda: None
) -> list[Speed]:
    """How fast each model reads one prompt and writes on, greedily.

    The models take turns, A B A B, so that what else the machine does hits all of them; a first round warms up and does
    not count.

    Args:
        n_prompt: tokens of the prompt, drawn from the vocabulary.
        n_new: tokens that are written, at least 2; nothing ends the text before.
        on_run: called after each run, repeats + 1 of every model.
    """
    found = [Speed([], []) for _ in models]
    for k in range(repeats + 1):
        for timed, speed in zip(models, found, strict=True):
            first_s, rest_s = time_of(timed, n_prompt, n_new)
            if k:
                speed.prompt.append(n_prompt / first_s)
                speed.generation.append((n_new - 1) / rest_s)
            on_run()
    return found


def time_of(timed: Timed, n_prompt: int, n_new: int) -> tuple[float, float]:
    """Seconds until the first new token, and from there to the last."""
    ids = random.Random(0).choices(range(timed.tokenizer.vocab_size), k=n_prompt)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=n_new, min_new_tokens=n_new)
    at: list[float] = []
    start = time.perf_counter()
    # A token's number is known on the CPU when it is told, so no work of a GPU is left out.
    generate(
        timed.model,
        [ids],
        sampling,
        tokenizer=timed.tokenizer,
        on_token=lambda _row, _token: at.append(time.perf_counter()),
    )
    return at[0] - start, at[-1] - at[0]
