"""Beam search: the most probable texts, as `transformers` finds them, with the cache following its beams.

Shapes: P prompts still being searched, W beams of each, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llmkit.config import UserError
from llmkit.inference.batch import LeftPadded, cache_dtype, not_finite
from llmkit.inference.config import SamplingConfig
from llmkit.inference.packed import Network
from llmkit.inference.sampling import log_probs
from llmkit.inference.steering import Steering
from llmkit.inference.stream import FinishReason, Generation, TextStream
from llmkit.model.gpt import GPT, KVCache

if TYPE_CHECKING:
    from llmkit.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Beam:
    """A text being written, or written to its end."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Of its tokens under the model alone."""
    total: float = 0.0
    """Sum of its tokens' log-probabilities after bias and penalties: what beams are ranked by. -inf: a mere filler."""
    finish_reason: FinishReason = "interrupted"

    def score(self, length_penalty: float) -> float:
        return self.total / len(self.ids) ** length_penalty


@dataclass(frozen=True)
class _Step:
    """A beam and one more token."""

    total: float
    beam: int
    token: int
    logprob: float


class _Search:
    """The search for one prompt's best continuations."""

    def __init__(self, index: int, limit: int, sampling: SamplingConfig, tokenizer: Tokenizer):
        self.index, self.limit = index, limit
        self.running = [_Beam()]
        self.parents = [0]
        """Which of the beams before the last step each running beam goes on from."""
        self.finished: list[_Beam] = []
        self.done = False
        self._sampling, self._tokenizer = sampling, tokenizer

    def step(self, steps: Sequence[_Step]) -> None:
        """Takes the best next tokens of all beams, best first.

        Texts that end count only if they are among the first `beams`; of those that go on, the first `beams` do.
        """
        K = self._sampling.beams
        running: list[_Beam] = []
        parents: list[int] = []
        for place, step in enumerate(steps):
            before = self.running[step.beam]
            beam = _Beam((*before.ids, step.token), (*before.logprobs, step.logprob), step.total)
            reason: FinishReason | None = "stop" if self._stops(beam) else None
            if reason is None and len(beam.ids) == self.limit:
                reason = "length"
            if reason is not None:
                self.finished += [replace(beam, finish_reason=reason)] if place < K else []
            elif len(running) < K:
                running.append(beam)
                parents.append(step.beam)
        self.finished = self._ranked(self.finished)[:K]
        self.done = not running or not self._can_improve(running[0])
        filler = K - len(running)
        self.running = [*running, *[replace(b, total=-math.inf) for b in running[:1]] * filler]
        self.parents = [*parents, *parents[:1] * filler]

    def _stops(self, beam: _Beam) -> bool:
        if beam.ids[-1] in self._tokenizer.stop_ids:
            return True
        return bool(self._sampling.stop) and self._written(beam)[1]

    def _written(self, beam: _Beam) -> tuple[str, bool]:
        """Its text, and whether a stop token or string ended it."""
        stream = TextStream(self._tokenizer, self._sampling.stop)
        text = "".join([*map(stream.push, beam.ids), stream.finish()])
        return text, stream.stopped

    def _ranked(self, beams: list[_Beam]) -> list[_Beam]:
        return sorted(beams, key=lambda b: -b.score(self._sampling.length_penalty))

    def _can_improve(self, best: _Beam) -> bool:
        """Whether a running beam may still get among the finished: judged by the score that the best one has now.

        With length_penalty above 0 a longer text may score better than that: the guess is `transformers`' own.
        """
        if len(self.finished) < self._sampling.beams:
            return True
        penalty = self._sampling.length_penalty
        return not self._sampling.early_stopping and best.score(penalty) > self.finished[-1].score(penalty)

    def results(self) -> list[Generation]:
        """The n best, best first; of a search that was interrupted also those that were being written."""
        n, penalty = self._sampling.n, self._sampling.length_penalty
        beams = self.finished
        if not self.done:
            begun = [b for b in self.running if b.ids and b.total > -math.inf]
            beams = self._ranked([*self.finished, *begun])
            beams = [*beams, *[_Beam()] * (n - len(beams))]
        if len(beams) < n:
            raise UserError(f"prompt {self.index} has only {len(beams)} continuations to give: lower n ({n})")
        return [
            Generation(
                list(b.ids),
                list(b.logprobs),
                self._written(b)[0],
                b.finish_reason,
                b.score(penalty) if b.ids else None,
            )
            for b in beams[:n]
        ]


def search(
    model: GPT,
    network: Network,
    prompts: list[list[int]],
    limits: Sequence[int],
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    should_stop: Callable[[], bool],
) -> list[Generation]:
    """The `sampling.n` best of `sampling.beams` beams for every prompt: see `generate`, which checks what is passed in."""
    device, V = model.head_weight.device, tokenizer.vocab_size
    n_columns = max(map(len, prompts)) + max(limits) - 1
    grid = LeftPadded(prompts, n_columns, device)
    cache = KVCache(model.config, len(prompts), n_columns, cache_dtype(model), device)
    steering = Steering.of(sampling, tokenizer, prompts, device)
    searches = [_Search(i, limit, sampling, tokenizer) for i, limit in enumerate(limits)]
    # So many that `beams` are left to go on with, however many of the best are stop tokens.
    n_best = max(2, 1 + len(tokenizer.stop_ids)) * sampling.beams
    live, ids_BT, mask = searches, grid.ids_BT, grid.prompt_mask()
    while live and not should_stop():
        hidden_BTD = network.forward(ids_BT, grid.positions_BT, mask, cache)
        logprobs_BV = log_probs(network.logits(hidden_BTD[:, -1]), 1.0, V)
        scores_BV = logprobs_BV if steering is None else steering(logprobs_BV)
        P, W = len(live), len(live[0].running)
        totals_PW = torch.tensor([[b.total for b in s.running] for s in live], dtype=scores_BV.dtype, device=device)
        totals_PC = (scores_BV.view(P, W, V) + totals_PW[:, :, None]).view(P, W * V)
        best = totals_PC.topk(min(n_best, W * V))
        logprobs_PC = logprobs_BV.view(P, W * V).gather(1, best.indices)
        going: list[_Search] = []
        rows: list[int] = []
        columns = (best.values.tolist(), best.indices.tolist(), logprobs_PC.tolist())
        for p, (one, totals, places, logprobs) in enumerate(zip(live, *columns, strict=True)):
            if any(map(math.isnan, totals)):
                raise not_finite(len(one.running[0].ids), one.index)
            found = zip(totals, places, logprobs, strict=True)
            one.step([_Step(t, at // V, at % V, logprob) for t, at, logprob in found if t > -math.inf])
            if not one.done:
                going.append(one)
                rows += [p * W + parent for parent in one.parents]
        live = going
        rows_B = torch.tensor(rows, dtype=torch.long, device=device)
        ids_B = torch.tensor([b.ids[-1] for s in live for b in s.running], dtype=torch.long, device=device)
        grid.positions_BT = grid.positions_BT[:, -1:] + 1
        grid.select(rows_B)
        cache.select(rows_B)
        if steering is not None:
            steering.select(rows_B)
            steering.update(ids_B)
        ids_BT, mask = ids_B[:, None], grid.step_mask(cache.length + 1)
    return [result for one in searches for result in one.results()]
